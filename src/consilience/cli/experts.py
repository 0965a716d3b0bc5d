"""The command `consilience experts`: train streams of experts, show their cards, and suggest some."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from consilience.cli.build import as_list, model_of, sources_of, training_of
from consilience.cli.catalogue import nearest
from consilience.cli.choose import progress_line
from consilience.cli.distil import data_of, data_parts, options_of, order_for
from consilience.cli.options import (
    Part,
    own_options,
    parts_of,
    read,
    take_choice,
)
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class TrainOptions:
    """Options of the stream.

    Args:
        out: a folder for seed-0/expert-0.safetensors and so on.
        scenario: joint (one expert for all), nc (new classes), mt (the same, with task labels), ni (new
            instances) or nic (some classes of some instances); with --split, or data of several sources, each
            source has one expert, and only mt differs.
        experts: how many.
        seeds: how many streams, with seeds from 0.
        licence: of the weights, for the cards.
        resume: keep the experts that are in --out, and train the others.
    """

    out: str | None = None
    scenario: Literal["joint", "nc", "mt", "ni", "nic"] = "nc"
    experts: int = 5
    seeds: int = 1
    licence: str = ""
    resume: bool = False


@dataclass(frozen=True)
class SuggestOptions:
    """Options of the choice among the experts in a folder.

    Args:
        wanted: names of classes, with commas.
        budget: the most experts to suggest; none is all that add something.
    """

    wanted: str | None = None
    budget: int | None = None


def experts(argv: Sequence[str]) -> int:
    """Call what the first word names."""
    # Options may stand before the word, too.
    name = next((word for word in argv if not word.startswith("-")), "")
    if not name:
        print("usage: consilience experts train|card|suggest [options]\n")
        for key, call in CALLS.items():
            print(f"  {key:9}{(call.__doc__ or '').splitlines()[0]}")
        return 0 if argv else 2
    if name not in CALLS:
        raise ConsilienceError(
            f"`consilience experts` does train, card or suggest, got {name!r}; {nearest(name, CALLS, '')}."
        )
    rest = list(argv)
    rest.remove(name)
    return CALLS[name](rest)


def train(argv: Sequence[str]) -> int:
    """Train a stream of experts, and save each with its card."""
    from consilience.core.training import Training

    given, words = read(argv)
    helping = given.pop("help", None) is not None
    if words:
        raise ConsilienceError(f"`consilience experts train` takes options only, got {words[0]!r}.")
    names = {
        key: take_choice(given, key, usual, helping)
        for key, usual in (("data", "digits"), ("split", "none"), ("model", "auto"))
    }
    parts = [
        *data_parts("data", names["data"]),
        *parts_of("split", names["split"]),
        *parts_of("model", names["model"]),
        Part("training", "training", "training", Training, ("sampler",)),
        Part("", "", "experts", TrainOptions),
    ]
    order = order_for("experts", parts, given, names, helping)
    if order is None:
        return 0
    options = TrainOptions(**options_of(order, TrainOptions))
    if not options.out:
        raise ConsilienceError("`--out` must be a folder for the experts.")

    from consilience import experts as room
    from consilience import settings

    # A split leaves a list of sources: one expert each.
    sources = sources_of(order)
    # Sizes of the data make the model, whatever the split.
    model = model_of(order, settings.continual(as_list(sources)))
    with progress_line() as progress:
        places = room.train(
            sources if isinstance(sources, list) else as_list(sources)[0],
            options.out,
            model,
            training_of(order),
            scenario=options.scenario,
            experts=options.experts,
            seeds=options.seeds,
            licence=options.licence,
            resume=options.resume,
            progress=progress,
        )
    print(cards_of(places))
    return 0


def cards_of(places: Sequence[Path]) -> str:
    """Write the cards of some files as a table."""
    from consilience import experts as room
    from consilience.core.names import clean
    from consilience.report._text import Column, grid

    found = [(place, room.card(place)) for place in places]
    # Files without a card are nobody's to describe.
    cards = [(place, card) for place, card in found if card is not None]

    def listed(names: Sequence[str]) -> str:
        return ", ".join(names[:6]) + ", .." * (len(names) > 6)

    return grid(
        [
            Column("file", [clean(str(place)) for place, _ in cards], False),
            Column("model", [clean(card.model)[:40] for _, card in cards], False),
            Column("classes", [clean(listed([name for _, name in card.knows])) for _, card in cards], False),
            Column("data", [clean(card.data) for _, card in cards], False),
            Column("licence", [clean(card.licence) or "-" for _, card in cards], False),
            Column(
                "accuracy %",
                [f"{100 * max(card.accuracy.values()):.1f}" if card.accuracy else "-" for _, card in cards],
            ),
        ]
    )


def card(argv: Sequence[str]) -> int:
    """Print the cards of files as JSON."""
    from consilience import experts as room

    _, words = read(argv)
    if not words:
        raise ConsilienceError("`consilience experts card` needs files of experts.")
    for word in words:
        found = room.card(word)
        if found is None:
            raise ConsilienceError(f"{word} has no card; write one with experts.save.")
        print(json.dumps(found.to_json(), indent=1))
    return 0


def suggest(argv: Sequence[str]) -> int:
    """Say which experts of a folder of cards to use for some classes, and why."""
    given, words = read(argv)
    # Data is a choice with options of its own; the others are of the command.
    data = given.pop("data", None)
    rest = [f"--{key}" if value is None else f"--{key}={value}" for key, value in given.items()]
    options, _ = own_options("experts", rest, SuggestOptions)
    if options is None:
        return 0
    if len(words) != 1 or options.wanted is None:
        raise ConsilienceError(
            "`consilience experts suggest` needs a folder of experts and `--wanted`, the names of classes."
        )
    from consilience import experts as room

    order = order_for("experts", data_parts("data", data or "none"), {}, {}, False)
    assert order is not None
    unlabelled = data_of(order, "data")
    wanted = [name.strip() for name in options.wanted.split(",")]
    found = room.suggest(words[0], wanted, data=unlabelled, budget=options.budget)
    print(found.table())
    return 0


CALLS: dict[str, Callable[[Sequence[str]], int]] = {"train": train, "card": card, "suggest": suggest}
