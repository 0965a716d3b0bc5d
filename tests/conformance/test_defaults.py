"""A hyperparameter has one default: in the class that declares it and in the catalogue that users type."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import kit
import pytest

import consilience as cs
from consilience import testing
from consilience.corrections.quadratic import EWC, OnlineEWC

NEED_ARGUMENTS: dict[str, dict[str, Any]] = {
    "aggregate": {"aggregator": cs.aggregators.mean()},
    "distil": {"unlabelled": kit.UNLABELLED},
    "batch_model_consolidation": {"sources": testing.sources()},
    "dac": {"maker": cs.memory.auxiliary(kit.UNLABELLED)},
    "deep_model_consolidation": {"data": kit.UNLABELLED},
    "exmodel_distillation": {"maker": cs.memory.auxiliary(kit.UNLABELLED)},
    "feddf": {"unlabelled": kit.UNLABELLED},
    "infer": {"mapper": cs.mappers.average()},
}

SERVER = (
    "the class serves all methods, and 1 takes the average as it is; the paper of this one has a smaller step"
)
POLICY = "None stands for Reservoir(), so that signatures import no torch"
EXCEPTIONS = {
    **{
        ("er", "ER.policy"): POLICY,
        ("er_ace", "ERACE.policy"): POLICY,
        ("agem", "AverageConstraint.policy"): POLICY,
    },
    **{("der", "DER.policy"): POLICY, ("derpp", "DER.policy"): POLICY},
    ("derpp", "DER.beta"): "DER++ is DER with a beta above 0, which is all that differs",
    ("fedavg", "WeightSpace.outer"): "the catalogue takes the name of an optimiser, the class an object",
    (
        "fedavgm",
        "SGD.momentum",
    ): "FedAvgM is an outer SGD with momentum, which is all that differs from FedAvg",
    ("fedadam", "Adam.beta2"): "the optimiser has the default of torch.optim, FedAdam that of its paper",
    **{(method, "WeightSpace.lr"): SERVER for method in ("fedadagrad", "fedadam", "fedyogi")},
    **{
        (method, "ExModelDistillation.weight_latents"): "latents are what it adds to ex-model distillation"
        for method in ("batch_model_consolidation", "dac")
    },
    ("fed3r", "ClosedForm.temperature"): "None stands for 1, or .1 where training goes on from the head",
    (
        "feddf",
        "Distillation.lr",
    ): "in the catalogue it is the rate of the distillation, in the class that of the outer step",
}
"""Where the two differ, (method, Class.field), and why."""


def parts_of(value: Any) -> Iterator[Any]:
    """The dataclasses inside a method: its parts, and the parts of these."""
    if isinstance(value, tuple):
        for inner in value:
            yield from parts_of(inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in dataclasses.fields(value):
            yield from parts_of(getattr(value, field.name))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, as an object."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def defaults(method: str) -> Iterator[tuple[str, Any, Any, Any]]:
    """(Class.field, its default, that of the parameter, the value made) of parameters that are called like a
    field."""
    function = getattr(cs.methods, method)
    parameters = inspect.signature(function).parameters
    made = function(**NEED_ARGUMENTS.get(method, {}))
    for part in parts_of(tuple(getattr(made, field.name) for field in dataclasses.fields(made))):
        for field in dataclasses.fields(part):
            if field.name in parameters and parameters[field.name].default is not inspect.Parameter.empty:
                name = f"{type(part).__name__}.{field.name}"
                yield name, default_of(field), parameters[field.name].default, getattr(part, field.name)


@pytest.mark.parametrize("method", cs.methods.__all__)
def test_class_and_catalogue_have_the_same_defaults(method: str) -> None:
    for name, declared, typed, made in defaults(method):
        if (method, name) not in EXCEPTIONS:
            assert declared == typed == made, f"{name} is {declared!r}, and methods.{method} has {typed!r}"


def test_exceptions_are_needed() -> None:
    differ = {
        (method, name)
        for method in cs.methods.__all__
        for name, declared, typed, _ in defaults(method)
        if declared != typed
    }
    assert differ == EXCEPTIONS.keys()


def test_online_ewc_has_the_strength_of_ewc() -> None:
    """In 0.1 its class had 1, that of a base for other penalties, and the catalogue 10."""
    assert OnlineEWC().strength == EWC().strength == 10.0
    assert cs.methods.online_ewc().corrections == (OnlineEWC(),)


def typed_defaults(kind: Any) -> dict[str, Any]:
    """The defaults of a function's arguments, or of a dataclass's fields."""
    if dataclasses.is_dataclass(kind):
        fields = {f.name: f for f in dataclasses.fields(kind)}
        missing = dataclasses.MISSING
        made = {n: f.default_factory() for n, f in fields.items() if f.default_factory is not missing}
        return {n: f.default for n, f in fields.items() if f.default is not missing} | made
    return {n: p.default for n, p in inspect.signature(kind).parameters.items() if p.default is not p.empty}


def options() -> list[Any]:
    """What users type, and the option objects behind it."""
    from consilience.cli import merge as command
    from consilience.loop.checks import RunOptions
    from consilience.merging._plan import MergeSettings

    pairs = [(cs.run, RunOptions), (cs.sweep, RunOptions), (cs.merge, MergeSettings)]
    pairs += [(cs.merge, command.MergeOptions)]
    return [pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1].__name__}") for pair in pairs]


@pytest.mark.parametrize(("function", "kind"), options())
def test_option_objects_have_the_defaults_that_users_type(function: Any, kind: type) -> None:
    typed, held = typed_defaults(function), typed_defaults(kind)
    common = (typed.keys() & held.keys()) - {
        "engine",
        "memory",
    }  # a sweep stacks; the command line takes memory in words
    assert len(common) >= 5
    differ = {n: (typed[n], held[n]) for n in common if typed[n] != held[n] and (typed[n] or held[n])}
    assert not differ


def test_the_lock_file_and_make_have_one_torch() -> None:
    make = (kit.ROOT / "Makefile").read_text()
    pinned = make.split("torch==")[1].split()[0]
    assert f"\ntorch=={pinned} " in (kit.ROOT / "requirements-dev.lock").read_text()
