"""Streams of experts, trained one by one as in the ex-model paper, and kept as files with cards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from consilience import data, methods, settings
from consilience.api import model_for, run
from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError, unknown
from consilience.core.params import key
from consilience.core.schedule import Expert
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.experts._distil import row_of, union
from consilience.experts._files import card_for, save

SCENARIOS = ("joint", "nc", "mt", "ni", "nic")


class Stream(NamedTuple):
    """What experts of a scenario are trained on, one source each."""

    sources: list[Source]
    scenario: Literal["class", "task"]
    """How targets become columns, as `settings.continual` has it."""


def stream(given: Source | Sequence[Source], scenario: str, experts: int, seed: int) -> Stream:
    """Return the sources of the experts of a scenario; several sources are taken as they are.

    "joint": one expert for all. "nc": new classes, in an order drawn from the seed; "mt" the same, with task
    labels, so that an expert's classes compete with one another alone. "ni": new instances, dealt at random
    in equal shares. "nic": instances dealt at random in shares, of which each expert has some classes of one.
    """
    if scenario not in SCENARIOS:
        raise unknown("scenario", scenario, SCENARIOS, "the protocol's")
    whole_number(experts=experts)
    labelled: Literal["class", "task"] = "task" if scenario == "mt" else "class"
    if not isinstance(given, Source):
        return Stream(list(given), labelled)
    if scenario == "joint":
        return Stream([given], labelled)
    if scenario in ("nc", "mt"):
        return Stream(data.split_classes(given, experts, seed=seed), labelled)
    if scenario == "ni":
        return Stream(data.iid(given, experts, seed=seed), labelled)

    # Two shares of the instances, so that every class comes back once with other instances.
    count = len(given.train) + len(given.validation)
    groups = torch.randint(2, (count,), generator=key(seed, given.name, "nic"))
    each = max(1, -(-2 * len(given.classes) // experts))
    return Stream(data.new_instances_and_classes(given, groups, each=each, seed=seed), labelled)


def train(
    given: Source | Sequence[Source],
    out: Path,
    model: Any,
    training: Training | None,
    chosen: tuple[str, int, int],
    licence: str,
    resume: bool,
    progress: Callable[[str], object] | None,
) -> list[Path]:
    """Train experts and save them; `chosen` are the scenario, the number of experts and the seed."""
    scenario, experts, seed = chosen
    say = progress or (lambda _: None)
    # A stream is known before any training, so that a wrong number of experts costs nothing.
    sources, labelled = stream(given, scenario, experts, seed)
    places = [out / f"expert-{number}.safetensors" for number in range(len(sources))]
    there = [place for place in places if place.exists()]
    if there and not resume:
        raise ConsilienceError(
            f"`out` must have no experts yet, got {there[0]}; give another folder, or `resume` to keep them."
        )

    for number, (source, place) in enumerate(zip(sources, places, strict=True)):
        # A file is written whole, so that one that is there is done.
        if place in there:
            continue
        say(f"expert {number + 1}/{len(sources)}: {source.name}")
        schedule, method = settings.continual([source], labelled), methods.finetune()
        # All begin from the same weights: those of the seed.
        made = model_for(schedule, method, model)
        result = run(schedule, method, made, training, seed=seed)
        expert = Expert(place.stem, dict(result.params), source, labels=result.labels, model=made)
        # On the test examples of its own classes: those of new instances have a test of all.
        own = row_of(expert, source, union([expert])).own
        accuracy = {} if own is None else {f"{source.name}, test": own}
        facts = {"data": source.name, "licence": licence, "accuracy": accuracy}
        save(expert, place, card_for(expert, made, None, {}, **facts), made)
    return places
