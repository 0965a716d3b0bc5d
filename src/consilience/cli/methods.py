"""The command `consilience methods`: the catalogue, with the settings in which each method runs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from consilience.cli.build import method_of
from consilience.cli.catalogue import catalogue
from consilience.cli.options import Order, Part, named_parts, own_options
from consilience.core.errors import ConsilienceError, Refusal, unknown

if TYPE_CHECKING:
    from consilience.core.method import Method
    from consilience.core.schedule import Schedule
    from consilience.core.source import Source


@dataclass(frozen=True)
class MethodsOptions:
    """Options of the list.

    Args:
        setting: list only methods that run in this setting.
        family: list only methods of this family, such as rehearsal or federated.
    """

    setting: str | None = None
    family: str | None = None


EXAMPLES = {"aggregator": "mean", "mapper": "min_entropy"}
"""Arguments for methods that need one."""


def methods(argv: Sequence[str]) -> int:
    """Print every method: what it does, where it runs, its paper."""
    options, words = own_options("methods", argv, MethodsOptions)
    if options is None:
        return 0
    if words:
        raise ConsilienceError(f"`consilience methods` takes options only, got {words[0]!r}.")

    # A method decides by a schedule, so the smallest one of each setting is enough to ask it.
    schedules = tiny()
    families = {name: call.__module__.rpartition(".")[2] for name, call in catalogue("method").items()}
    for kind, wanted, known in (
        ("setting", options.setting, schedules),
        ("family", options.family, families.values()),
    ):
        if wanted is not None and wanted not in known:
            raise unknown(kind, wanted, set(known))

    for name, call in catalogue("method").items():
        if options.family not in (None, families[name]):
            continue
        runs = settings_of(example(name, call), schedules)
        if options.setting not in (None, *runs):
            continue
        first, _, rest = (inspect.getdoc(call) or "").partition("\n")
        paper = re.search(r"^Paper: (.*?)(?=\n\n|\Z)", rest, re.M | re.S)
        print(f"{name}: {first}")
        print(f"    settings: {in_words(runs, len(schedules))}")
        print(f"    family: {families[name]}")
        print(f"    paper: {' '.join(paper[1].split()) if paper else '-'}")
    return 0


def _sources() -> Sequence[Source]:
    """Return those of `tiny`."""
    return tiny()["continual"].sources


def _maker() -> Any:
    """Return a maker of synthetic memory."""
    from consilience import memory

    return memory.auxiliary(_INPUTS)


_INPUTS = [[0.0] * 4] * 5000
OBJECTS: dict[str, Callable[[], Any]] = {
    "unlabelled": lambda: _INPUTS,
    "data": lambda: _INPUTS,
    "maker": _maker,
    "sources": _sources,
}
"""Examples of arguments that are objects."""


def example(name: str, call: Callable[..., Any]) -> Method:
    """Build a method with its defaults, and with an example for each argument that has none."""
    parameters = inspect.signature(call).parameters.items()
    needed = [argument for argument, parameter in parameters if parameter.default is parameter.empty]
    # Data cannot be given as text, so they are no option.
    objects = {name: make() for name, make in OBJECTS.items() if name in needed}
    if objects:
        # The sources of `tiny` have few examples.
        objects |= {"size": 4} if "sources" in objects else {}
        made: Method = call(**objects)
        return made

    part = Part("method", "method", name, call)
    values: dict[str, Any] = {key: parameter.default for key, parameter in part.options().items()}
    values |= {part.option(argument): EXAMPLES[argument] for argument in needed if argument in EXAMPLES}
    named = named_parts([part], values)
    for other in named:
        values |= {key: parameter.default for key, parameter in other.options().items()}
    return method_of(Order((part, *named), values), name)


def settings_of(method: Method, schedules: Mapping[str, Schedule]) -> dict[str, str]:
    """Return the settings in which a method runs, each with a note where it needs task labels."""
    from consilience.api import default_model

    runs: dict[str, str] = {}
    for setting, schedule in schedules.items():
        for scenario, note in (("class", ""), ("task", " (scenario task)")):
            facts = replace(schedule, scenario=scenario).survey()
            try:
                method.resolve(replace(facts, model=default_model(schedule, method)))
            except Refusal:
                continue
            runs[setting] = note
            break
    return runs


def in_words(runs: Mapping[str, str], count: int) -> str:
    """Write the settings, of so many, in which a method runs; one word says it where all are alike.

    >>> in_words({"skill": "", "merging": " (scenario task)"}, 9), in_words({"skill": ""}, 1)
    ('skill, merging (scenario task)', 'all')
    """
    notes = {*runs.values()}
    if len(runs) == count and len(notes) == 1:
        return f"all{notes.pop()}"
    return ", ".join(setting + note for setting, note in runs.items()) or "none"


def tiny() -> dict[str, Schedule]:
    """Build the smallest schedule of each setting."""
    import numpy as np

    from consilience import data, settings

    inputs = np.arange(160, dtype="float32").reshape(40, 4) / 160
    first, second = data.split_classes(data.arrays(inputs, np.arange(40) % 4), 2)
    pair = [first, second]
    other = [replace(source, name=source.name + "'") for source in pair]
    return {
        "multitask": settings.multitask(pair),
        "continual": settings.continual(pair),
        "federated": settings.federated(pair, rounds=2),
        "federated_continual": settings.federated_continual([pair, other], rounds=1),
        "merging": settings.merging(pair),
        "exmodel": settings.exmodel(sources=pair),
        "skill": settings.skill([pair, other]),
    }
