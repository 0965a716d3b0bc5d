"""Every Correction, Aggregator, Consolidator, Mapper and catalogue method: how it is written, and what it
refuses."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import kit
import pytest

import consilience as cs
from consilience import testing

ROOMS = ("aggregators", "consolidators", "mappers")
CLASSES = pytest.mark.parametrize("name", sorted(kit.EVERY))
CATALOGUE = {
    f"{room}.{n}": f
    for room in ROOMS
    for n, f in vars(getattr(cs, room)).items()
    # A room also imports helpers.
    if inspect.isfunction(f) and f.__module__.startswith(f"consilience.{room}") and not n.startswith("_")
}
CATALOGUE |= {f"methods.{n}": getattr(cs.methods, n) for n in cs.methods.__all__}

GIVEN: dict[str, dict[str, Any]] = {
    "aggregators.torchjd": {"name": "IMTLG"},
    **{f"aggregators.{n}": {"byzantine": 0} for n in ("bulyan", "krum", "multi_krum")},
    "consolidators.ensemble_distillation": {"unlabelled": kit.UNLABELLED},
    "consolidators.exmodel": {"maker": cs.memory.auxiliary(kit.UNLABELLED)},
    "consolidators.teacher_distillation": {"unlabelled": kit.UNLABELLED},
    "methods.distil": {"unlabelled": kit.UNLABELLED},
    "methods.batch_model_consolidation": {"sources": testing.sources()},
    "methods.dac": {"maker": cs.memory.auxiliary(kit.UNLABELLED)},
    "methods.deep_model_consolidation": {"data": kit.UNLABELLED},
    "methods.exmodel_distillation": {"maker": cs.memory.auxiliary(kit.UNLABELLED)},
    "methods.feddf": {"unlabelled": kit.UNLABELLED},
    "methods.aggregate": {"aggregator": cs.aggregators.mean()},
    "methods.infer": {"mapper": cs.mappers.average()},
}
"""Arguments of catalogue functions that cannot be called without."""

MEANING = {
    **dict.fromkeys(
        ("DEN.drift", "DEN.threshold", "den.drift", "den.threshold"),
        "infinite is never; other bad ones in test_expansion",
    ),
    **dict.fromkeys(
        ("TorchJD.name", "TorchJDLinear.name", "TorchJDStateful.name"), "checked by name in test_aggregators"
    ),
    **dict.fromkeys(
        ("TorchJD.arguments", "TorchJDLinear.arguments", "TorchJDStateful.arguments"), "torchjd's own"
    ),
    **dict.fromkeys(("ClosedForm.then", "fed3r.then"), "an object, checked in test_fedmethods"),
    **dict.fromkeys(("Dare.then", "dare.then"), "an object, checked in test_merging_aggregators"),
    "torchjd.name": "checked by name in test_aggregators",
    "torchjd.arguments": "torchjd's own",
    **{
        f"{n}.{field}": "an object"
        for n in ("FisherSpace", "Normalised", "RegMean", "WeightSpace", "normalised_space", "weight_space")
        for field in ("aggregator", "outer")
    },
    **dict.fromkeys(("Distillation.aggregator", "Distillation.outer"), "an object"),
    **dict.fromkeys(("Dynamic.aggregator", "dynamic_space.aggregator"), "an object"),
    "Dynamic.outer": "any is refused, in test_drift",
    **dict.fromkeys(("fisher_space.outer", "regression_space.outer"), "an object"),
    **{
        f"{n}.{field}": "any is refused, in test_statmerge"
        for n in ("OPCM", "RunningArithmetic")
        for field in ("aggregator", "outer")
    },
    **dict.fromkeys(
        ("Distillation.unlabelled", "ensemble_distillation.unlabelled", "feddf.unlabelled"),
        "in test_fedmethods",
    ),
    "Distillation.content": "made of the inputs",
    **{
        f"{name}.{field}": "an object, in test_exmodel"
        for name in ("ExModelDistillation", "exmodel", "exmodel_distillation")
        for field in ("maker", "augment")
    },
    **dict.fromkeys(
        (
            *(
                "dac.maker",
                "dac.augment",
                "deep_model_consolidation.data",
                "deep_model_consolidation.augment",
            ),
            *("batch_model_consolidation.sources", "batch_model_consolidation.augment"),
        ),
        "an object, in test_exmodel",
    ),
    "ExModelDistillation.facts": "the run's",
    "TeacherDistillation.facts": "the run's",
    "TeacherDistillation.content": "made of the inputs",
    **{
        f"{name}.{field}": "in test_distil"
        for name in ("TeacherDistillation", "teacher_distillation", "distil")
        for field in ("unlabelled", "augment", "temperatures")
    },
    "personal.patterns": "checked against the model in test_fedmethods",
    "aggregate.aggregator": "an object",
    "GSS.policy": "its own",
    "HeadReuse.encoder": "a folder or a name, loaded when it is used; in test_synergy",
    "infer.mapper": "an object",
    **dict.fromkeys(("TaskWeights.given", "task_weights.weights"), "by name, in test_balancing"),
    **dict.fromkeys(("auroc.known", "auroc.unknown"), "values, in test_routing"),
}
"""Hyperparameters for which there is no bad number or word, and why."""


def test_everything_is_found() -> None:
    """What this issue names is there, so that an empty discovery cannot pass."""
    assert {"EWC", "SI", "Proximal", "LwF", "ER", "Cumulative", "Moments"} <= kit.CORRECTIONS.keys()
    assert {
        "Oracle",
        "Average",
        "MinEntropy",
        "NearestMean",
        "GaussianMixture",
        "Mahalanobis",
        "ExpertGate",
        "Superposition",
    } <= kit.MAPPERS.keys()
    assert {
        "WeightSpace",
        "ClosedForm",
        "Experts",
        "Distillation",
        "ExModelDistillation",
    } <= kit.CONSOLIDATORS.keys()
    assert {"Mean", "Arithmetic", "Ties", "PCGrad", "MGDA", "Dare", "Median"} <= kit.AGGREGATORS.keys()
    assert set(cs.methods.__all__) == kit.METHODS.keys() | kit.NEED_ARGUMENTS, (
        "a method that needs arguments needs a row in kit.ROWS"
    )


@CLASSES
def test_frozen_dataclass_with_a_docstring(name: str) -> None:
    kind = kit.EVERY[name]
    assert "__dataclass_params__" in vars(kind), "not a dataclass of its own"
    assert kind.__dataclass_params__.frozen and kind.__dataclass_params__.eq
    thing = kit.make(name)
    testing.check_written(thing)
    assert thing == kit.make(name) and hash(thing) == hash(kit.make(name))
    doc = vars(kind).get("__doc__") or ""
    assert doc and not doc.startswith(f"{name}("), "no docstring of its own"
    assert inspect.cleandoc(doc).split("\n\n")[0].endswith("."), (
        "the first paragraph should end with a period"
    )
    for f in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, f.name, getattr(thing, f.name))


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_catalogue_documents_itself(name: str) -> None:
    function = CATALOGUE[name]
    doc = inspect.getdoc(function) or ""
    assert doc.split("\n")[0].endswith("."), "the first line should be a sentence"
    arguments = list(inspect.signature(function).parameters)
    if name.startswith("methods."):
        assert re.search(r"^Paper: \S", doc, re.MULTILINE), "no line `Paper: ...`"
        for a in arguments:
            assert re.search(rf"^    {a}: \S", doc, re.MULTILINE), f"`{a}` is not under Args"
    hints = inspect.get_annotations(function)
    assert all(a in hints for a in arguments) and "return" in hints


def bad_values(kind: str) -> list[Any]:
    """What no hyperparameter of that type may be."""
    kind = kind.replace(" | None", "")
    if kind.startswith("Literal") or kind == "str":
        return ["nonsense"]
    if kind == "float":
        return [float("nan"), float("inf")]
    return {"int": [-1], "Policy": ["ring"]}.get(kind, [])


def hyperparameters() -> Iterator[Any]:
    for name, kind in sorted(kit.EVERY.items()):
        for f in dataclasses.fields(kind):
            hint = f.type if isinstance(f.type, str) else typing.get_type_hints(kind)[f.name].__name__
            yield pytest.param(kind, kit.ARGUMENTS.get(name, {}), f.name, hint, id=f"{name}.{f.name}")
    for name, function in sorted(CATALOGUE.items()):
        for a, hint in inspect.get_annotations(function).items():
            if a != "return":
                yield pytest.param(function, GIVEN.get(name, {}), a, hint, id=f"{name}.{a}")


@pytest.mark.parametrize(("make", "given", "argument", "hint"), list(hyperparameters()))
def test_bad_hyperparameters_are_refused(make: Any, given: dict[str, Any], argument: str, hint: str) -> None:
    if f"{make.__name__}.{argument}" in MEANING or hint == "bool":
        return
    wrong = bad_values(hint)
    assert wrong, f"{hint} has no bad value; name it in MEANING with the reason"
    for value in wrong:
        with pytest.raises(cs.ConsilienceError, match=r"should be.*\. Found |must .*got ") as error:
            made = make(**{**given, argument: value})
            raise AssertionError(f"{argument} = {value!r} was taken: {made}")
        assert "\n" not in str(error.value)


def test_corrections_say_what_they_are() -> None:
    """`neutral` names fields; `flat` names groups; what recalls nothing private travels or does not."""
    for name in (*kit.CORRECTIONS, *kit.MAPPERS):
        thing = kit.make(name)
        fields = {f.name for f in dataclasses.fields(thing)}
        assert set(thing.neutral) <= fields, name
        assert thing.active, f"{name} is plain training at its defaults"
        if thing.neutral:
            assert not kit.make(name, **thing.neutral).active
