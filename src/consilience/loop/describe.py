"""The arguments of a run in words: what config.yaml has of a run that was begun from Python."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor

from consilience.core.model import Model
from consilience.core.params import content_hash
from consilience.core.schedule import Schedule
from consilience.loop.agents import Setup
from consilience.loop.checks import RunOptions

LONGEST = 200
"""Lines of a module, and labels, that are written out."""


def describe(setup: Setup, method: str, options: RunOptions) -> dict[str, Any]:
    """Return the arguments of a run, with every hyperparameter of method, model, data and training."""
    schedule, about = setup.schedule, setup.facts
    data = {
        "setting": schedule.setting,
        "scenario": schedule.scenario,
        "stages": about.stages,
        "rounds": about.rounds,
        "sources": data_of(schedule),
        "labels": [f"{space}: {name}" for space, name in schedule.frame.labels[:LONGEST]],
    }

    # The method as it acts here: aggregators are in their places.
    parts = {
        entry.name: written(value)
        for entry in fields(setup.method)
        if (value := getattr(setup.method, entry.name)) and entry.name != "name"
    }
    return {
        **data,
        **({"name": options.name} if options.name else {}),
        "method": method,
        "parts": parts,
        "model": repr(setup.model),
        **layers_of(setup.model),
        "training": {name: written(value) for name, value in vars(setup.training).items()},
        "metrics": metrics_of(setup),
        "seed": options.seed,
        "repeats": options.repeats,
        "judge_clients": options.judge_clients,
        "stopping": written(options.stopping),
    }


def data_of(schedule: Schedule) -> dict[str, str]:
    """Return what each source has, on one line: there may be thousands of them."""
    found = {}
    for source in (*schedule.sources, *schedule.judged):
        parts = [f"{len(getattr(source, part))} {part}" for part in ("train", "validation", "test")]
        views = [f"augment {written(source.augment)}"] if source.augment is not None else []
        found[source.name] = ", ".join([*parts, f"{len(source.labels)} x {source.kind}", *views])
    return found


def metrics_of(setup: Setup) -> Any:
    """Return the metrics of a run: one list, or one for each source where they differ."""
    found = {name: [written(metric) for metric in chosen] for name, chosen in setup.metrics.items()}
    first = next(iter(found.values()))
    return first if all(chosen == first for chosen in found.values()) else found


def layers_of(model: Model) -> dict[str, Any]:
    """Return the layers of a module of the user; those of the catalogue say theirs in their `repr`."""
    module = getattr(model, "module", None)
    if module is None or getattr(model, "description", "") != type(module).__name__:
        return {}
    lines = str(module).splitlines()
    more = [f"... {len(lines) - LONGEST} more lines"] if len(lines) > LONGEST else []
    return {"layers": [*lines[:LONGEST], *more]}


def written(value: Any) -> Any:
    """Return a value as YAML and JSON have it: parts by their class and fields, functions by name.

    >>> from consilience.corrections import EWC
    >>> written(EWC(3.0))
    {'EWC': {'strength': 3.0, 'labels': 'model', 'samples': None}}
    >>> written([len, float("inf")])
    ['builtins.len', 'inf']
    """
    if isinstance(value, bool | int | str | None):
        return value
    # JSON has neither infinity nor NaN.
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path | torch.device | torch.dtype):
        return str(value)
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return {str(name): written(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [written(entry) for entry in value]

    # Its content may be large: a hash tells it from others.
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)} {content_hash({'': value})[:12]}"
    if is_dataclass(value) and not isinstance(value, type):
        held = {entry.name: written(getattr(value, entry.name)) for entry in fields(value) if entry.repr}
        return {type(value).__name__: held}
    # The address of an object is another one in every process.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
