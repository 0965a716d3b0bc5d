"""What must be the same for a run to be resumed: data, code, schedule, method, model, training, versions."""

from __future__ import annotations

import dis
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from consilience.core.model import Model
from consilience.core.params import content_hash, key
from consilience.core.schedule import Schedule
from consilience.core.source import Source
from consilience.loop.agents import Setup
from consilience.loop.checks import RunOptions, names_of
from consilience.version import __version__


def fingerprint(setup: Setup, options: RunOptions) -> dict[str, Any]:
    """Return what must be the same for a run to be resumed, as JSON holds it."""
    schedule, method, model = setup.schedule, setup.method, setup.model
    nothing = torch.zeros(0)
    augments = {name: repr(views) for name, views in schedule.augments.items()}

    # The repr, if the model has one, says what it will grow.
    params, buffers = model.init(key(options.seed, "init"))
    shape = {} if type(model).__repr__ is object.__repr__ else {repr(model): nothing}

    # Two functions may have one name, and the values of a schedule of learning rates are all that matters.
    training: dict[str, Any] = {name: identity(value) for name, value in vars(setup.training).items()}
    curve = setup.training.lr_schedule
    if callable(curve):
        training["lr_curve"] = [float(curve(i / 8)) for i in range(8)]

    # All parts of a method are dataclasses, so their reprs have all hyperparameters.
    parts = {f: repr(getattr(method, f)) for f in method.__dataclass_fields__}
    metrics = {source.name: names_of(setup.metrics[source.name]) for source in schedule.judged}
    own = (method, model, setup.training, setup.metrics, schedule.frame.targets, schedule.augments)
    return {
        "setting": schedule.setting,
        "scenario": schedule.scenario,
        "targets": {task or "all": identity(target) for task, target in schedule.frame.targets.items()},
        "data": {source.name: data_hash(source) for source in (*schedule.sources, *schedule.judged)},
        "base": None if schedule.base is None else content_hash(tensors_of(schedule.base)),
        "experts": {
            name: content_hash(tensors_of({**expert.params, **expert.buffers}) | _kind(expert.model))
            for name, expert in schedule.experts.items()
        },
        "schedule": plan_hash(schedule, range(options.seed, options.seed + options.repeats)),
        "method": parts,
        "model": content_hash({**params, **buffers, **shape}),
        "training": training,
        "seed": options.seed,
        "repeats": options.repeats,
        "metric": metrics if len({*metrics.values()}) > 1 else next(iter(metrics.values())),
        "stopping": None if options.stopping is None else repr(options.stopping),
        "judge_clients": options.judge_clients,
        "curve_steps": options.curve_steps,
        "threads": torch.get_num_threads(),
        "versions": {"consilience": __version__, "torch": torch.__version__},
        "code": code_of(own),
        **({"augment": augments} if augments else {}),
    }


def _kind(model: Model | None) -> dict[str, Tensor]:
    """Return what a hash has of an expert's own model: its repr; nothing without one."""
    return {} if model is None or type(model).__repr__ is object.__repr__ else {repr(model): torch.zeros(0)}


def data_hash(source: Source) -> str:
    """Return a hash of all examples of a source; those that are not in memory count by a sample."""
    parts = {"train": source.train, "validation": source.validation, "test": source.test}
    held = {f"{part}/{name}": t for part, some in parts.items() for name, t in some.content().items()}
    return content_hash(held)


def plan_hash(schedule: Schedule, seeds: Iterable[int]) -> str:
    """Return a hash of all phases, for each seed."""
    total = hashlib.sha256()
    for seed in seeds:
        for phase in schedule.plan(seed):
            total.update(repr(phase).encode())
    return total.hexdigest()[:32]


def tensors_of(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return entries of a state_dict as tensors; other facts in it are left out."""
    found = {name: torch.as_tensor(value) for name, value in entries.items() if not isinstance(value, str)}
    return {name: tensor.detach() for name, tensor in found.items()}


def identity(value: object) -> str:
    """Return a text that is the same in every process: functions by name, also inside of other values.

    >>> identity({"loss": [len]})
    "{'loss': [builtins.len]}"
    """
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {identity(entry)}' for name, entry in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(identity, value))}]"

    # The repr of a dataclass has the addresses of functions in its fields.
    if is_dataclass(value) and not isinstance(value, type):
        held = ", ".join(f"{f.name}={identity(getattr(value, f.name))}" for f in fields(value) if f.repr)
        return f"{type(value).__qualname__}({held})"
    return repr(value)


# Code of the user's own


def code_of(value: object) -> dict[str, str]:
    """Return hashes of the functions outside of libraries that a value consists of, by name.

    What a function finds in its module counts too: other functions, classes, and simple constants.
    """
    found: dict[str, set[str]] = {}
    left, seen = [value], set[int]()
    while left:
        entry = left.pop()
        if isinstance(entry, SIMPLE | Tensor | ModuleType) or id(entry) in seen:
            continue
        seen.add(id(entry))
        left += _parts(entry)
        if isinstance(entry, FunctionType) and not _is_library(entry.__module__):
            name = f"{entry.__module__}.{entry.__qualname__}"
            found.setdefault(name, set()).add(_code_hash(entry))
    return {name: "+".join(sorted(found[name])) for name in sorted(found)}


SIMPLE = str | bytes | int | float | complex | None
"""The types of constants that have one text in every process."""


def _parts(value: object) -> Iterable[object]:
    """Return what may be code, or have some, inside a value."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, *(() if _is_library(value.__module__) else _reads(value).values())]
    if isinstance(value, type):
        own = () if _is_library(value.__module__) else vars(value).values()
        # Methods may be wrapped: class methods, properties, cached ones.
        unwrapped = [
            getattr(entry, name)
            for entry in own
            for name in ("__func__", "fget", "func")
            if hasattr(entry, name)
        ]
        functions = [entry for entry in (*own, *unwrapped) if isinstance(entry, FunctionType)]
        return [*functions, *value.__bases__]
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    return type(value), getattr(value, "__dict__", {})


def _is_filled(cell: CellType) -> bool:
    """Whether a variable of a closure has a value yet."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _reads(function: FunctionType) -> dict[str, object]:
    """Return what a function finds by name in its module and in modules there, and its defaults."""
    names = function.__code__.co_names
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for module in [entry for entry in found.values() if isinstance(entry, ModuleType)]:
        if not _is_library(module.__name__):
            found |= {name: getattr(module, name) for name in names if hasattr(module, name)}
    named = tuple(sorted((function.__kwdefaults__ or {}).items()))
    return found | {"()": function.__defaults__, "{}": named}


def _code_hash(function: FunctionType) -> str:
    """Return a hash of what a function computes; where it is written does not matter."""
    code, read = function.__code__, _reads(function)
    enclosed = zip(code.co_freevars, function.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in enclosed if _is_filled(cell)}

    # What it writes itself, such as a counter, is no constant; other variables in capitals are.
    written = {step.argval for step in dis.get_instructions(code) if step.opname.startswith("STORE_")}
    constants = {name: value for name, value in read.items() if name.isupper() or name in ("()", "{}")}
    constants |= {name: value for name, value in held.items() if name not in written}
    known = [(name, _constant(constants[name])) for name in sorted(constants)]
    return hashlib.sha256(f"{_instructions(code)} {known}".encode()).hexdigest()[:16]


def _instructions(code: CodeType) -> str:
    """Return the instructions of a function, with those of functions inside it."""
    constants = [
        _instructions(value) if isinstance(value, CodeType) else _constant(value) for value in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {constants}"


def _constant(value: object) -> str:
    """Return a text for a constant that is the same in every process; "" for other objects."""
    if isinstance(value, SIMPLE):
        return repr(value)
    # Mutable ones may have changed since the run began, as those do that collect what was seen.
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    # The order of a set of texts differs between processes.
    return f"{{{', '.join(sorted(map(_constant, value)))}}}" if isinstance(value, frozenset) else ""


@cache
def _is_library(module: str | None) -> bool:
    """Whether a module belongs to Python, to an installed package or to this one, whose version counts."""
    top = (module or "").partition(".")[0]
    if top in (__name__.partition(".")[0], "builtins") or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None:
        return False
    # Packages may lie elsewhere than those of this environment: in the system's, or in the user's.
    installed = {"site-packages", "dist-packages"} & {*Path(str(file)).parts}
    places = {sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")}
    return bool(installed) or any(str(file).startswith(place) for place in places)
