"""Teachers into a student: the run, the student's file, and a report of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience import methods, models
from consilience.api import Result, run
from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.losses import NONE
from consilience.core.model import Model
from consilience.core.params import content_hash
from consilience.core.schedule import Evaluate, Exchange, Expert, Phase, Schedule, build
from consilience.core.source import Examples, Label, Source, Tensors, inputs_of
from consilience.core.synthetic import answers
from consilience.core.teacher import Teacher
from consilience.core.tree import Input
from consilience.experts._card import Origin
from consilience.experts._files import load

STUDENT = "student"


def experts_of(teachers: Iterable[Any], trust: bool = False) -> list[Expert]:
    """Return experts with models; paths are read. Raises ConsilienceError for two of one name."""
    found = []
    for one in teachers:
        if isinstance(one, str | Path):
            one = load(Path(one), None, None, None, None, trust, None)
        if not isinstance(one, Expert):
            raise ConsilienceError(f"a teacher must be an Expert or the path of one, got {kind_of(one)}.")
        if one.model is None:
            raise ConsilienceError(f"a teacher must have its `model`, got none in {one.name!r}.")
        found.append(one)

    # Messages, temperatures and reports go by these names.
    names = [one.name for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConsilienceError(f"teachers must have names of their own, got {twice[0]!r} twice.")
    if not found:
        raise ConsilienceError("a student needs at least one teacher, got none.")
    return found


def apart(experts: Sequence[Expert]) -> list[Expert]:
    """Return experts whose sources have names of their own: those of the experts, where names repeat."""
    # Sources of a schedule need names of their own, and two experts may be of the same data.
    names = [expert.source.name for expert in experts]
    if len(set(names)) == len(names):
        return list(experts)
    return [replace(one, source=replace(one.source, name=one.name)) for one in experts]


def union(experts: Sequence[Expert]) -> tuple[Label, ...]:
    """Return the labels that some expert knows, in the order of the experts."""
    # In the order of arrival, as columns of a frame are.
    known = [expert.source.labels[target] for expert in experts for target in expert.source.classes]
    return tuple(dict.fromkeys(known))


def known_part(source: Source, labels: Sequence[Label]) -> Source | None:
    """Return a source that is only judged: its test examples of these labels; None without any."""
    if source.kind != "class" or not len(source.test):
        return None
    classes = tuple(target for target in source.classes if source.labels[target] in set(labels))
    y = source.test.targets()
    there = torch.isin(y, torch.tensor(classes, dtype=y.dtype, device=y.device)).nonzero()[:, 0].cpu()
    if not len(there):
        return None
    # Nobody trains on it, and its own training examples may be of other classes.
    x, _ = source.train.first()
    x = x * 0 if isinstance(x, Tensor) else x.map(torch.zeros_like)
    kept = tuple(source.labels[target] for target in classes)
    table = torch.full((len(source.labels),), NONE)
    table[list(classes)] = torch.arange(len(classes))
    # Classes that nobody teaches are not declared: a student has no outputs for them.
    test = source.test.select(there).map(y=lambda y: table.to(y.device)[y])
    return Source(
        source.name,
        Tensors(x, torch.zeros(1, dtype=torch.long)),
        test.select(there[:0]),
        test,
        kept,
        tuple(range(len(kept))),
        task=source.task,
        metric=source.metric,
    )


def test_of(data: Any, test: Source | None, labels: Sequence[Label]) -> Source | None:
    """Return what a student is judged on: `test`, or the test part of the data; None without labels."""
    if test is None:
        test = data if isinstance(data, Source) else None
    return None if test is None else known_part(test, labels)


def student_of(result: Result, teachers: Sequence[Expert], model: Model, name: str) -> Expert:
    """Return the student of a run as an expert that knows all classes of its teachers."""
    x, _ = teachers[0].source.train.first()
    x = x * 0 if isinstance(x, Tensor) else x.map(torch.zeros_like)
    labels, known = result.labels, set(union(teachers))
    classes = tuple(column for column, label in enumerate(labels) if label in known)
    one, none = Tensors(x, torch.tensor(classes[:1])), Tensors(x[:0], torch.zeros(0, dtype=torch.long))
    data = ", ".join(dict.fromkeys(teacher.source.name for teacher in teachers))
    source = Source(data, one, none, none, labels, classes)
    return Expert(name, dict(result.params), source, labels=labels, model=model)


def origin_of(teacher: Expert) -> Origin:
    """Return what the card of a student says of a teacher."""
    content = content_hash({**teacher.params, **teacher.buffers})
    return Origin(teacher.name, content, teacher.source.name)


def schedule_of(experts: Sequence[Expert], judged: Source | None, stream: bool) -> Schedule:
    """Return the schedule of one learner that receives experts: one by one, or all at once."""
    experts = apart(experts)
    names = [expert.name for expert in experts]
    sources = [expert.source for expert in experts]

    def plan(seed: int) -> Iterable[Phase]:
        for group, stage in zip([[n] for n in names] if stream else [names], names, strict=False):
            yield Exchange({STUDENT: tuple(group)}, by_size=False)
            yield Evaluate(stage if stream else STUDENT)

    setting = "exmodel" if stream else "merging"
    given = {expert.name: expert for expert in experts}
    # The learner gets no task with what it is judged on.
    tests = [] if judged is None else [replace(judged, name=_free(judged.name, sources), task=None)]
    return build(setting, sources, "class", plan, STUDENT, tests, experts=given)


def _free(name: str, sources: Sequence[Source]) -> str:
    """Return a name that no source has."""
    taken = {source.name for source in sources}
    while name in taken:
        name = f"{name}, test"
    return name


def distil(
    teachers: Sequence[Any],
    student: Any,
    data: Any,
    test: Source | None,
    calibrate: str | None,
    base: Mapping[str, Any] | None,
    running: Mapping[str, Any],
    **options: Any,
) -> Result:
    """Distil teachers into a student; see `consilience.distil`."""
    experts = experts_of(teachers)
    unlabelled = inputs_of(data, "data")
    labels = union(experts)
    judged = test_of(data, test, labels)
    if calibrate == "labels":
        options["temperatures"] = temperatures(experts, data)
    elif calibrate is not None:
        options["calibrate"] = calibrate
    schedule = replace(schedule_of(experts, judged, stream=False), base=base)
    method = methods.distil(unlabelled, **options)
    return quietly(judged, lambda: run(schedule, method, student, **running))


def quietly(judged: Source | None, call: Callable[[], Result]) -> Result:
    """Call a run; without a source to judge by, it does not warn that no score is defined."""
    with warnings.catch_warnings():
        if judged is None:
            warnings.filterwarnings("ignore", message="the metric is undefined")
        return call()


# Temperatures.


def temperatures(experts: Sequence[Expert], data: Any) -> dict[str, float]:
    """Return T of each expert: the one with the least cross-entropy on validation examples of its classes."""
    if not isinstance(data, Source) or data.kind != "class" or not len(data.validation):
        raise ConsilienceError(
            '`calibrate="labels"` needs a source of classes with validation examples as `data`; use "scale".'
        )
    found = {}
    for expert in experts:
        teacher, own = teacher_of(expert)
        asked = labelled(data.validation, data.labels, own)
        if asked is None:
            raise ConsilienceError(
                f"`calibrate` needs validation examples of the classes of {expert.name!r}, got none; use "
                '"scale".'
            )
        x, y = asked
        found[expert.name] = temperature_of(answers(teacher, x), y)
    return found


def temperature_of(logits: Tensor, y: Tensor) -> float:
    """Return the T in [1/20, 20] with the least cross-entropy of logits / T [N, k] for classes y [N].

    The cross-entropy is convex in 1 / T, so that halving finds where its slope is 0. Guo et al. 2017.

    >>> temperature_of(torch.tensor([[0.0, 5.0]] * 4), torch.tensor([1, 1, 1, 0])) < 20
    True
    """
    logits, low, high = logits.double(), 0.05, 20.0
    chosen = logits.gather(1, y[:, None])[:, 0].mean()
    for _ in range(60):
        beta = (low + high) / 2
        slope = ((beta * logits).softmax(1) * logits).sum(1).mean() - chosen
        low, high = (beta, high) if slope < 0 else (low, beta)
    return 2 / (low + high)


# What teachers and students are worth.


class Row(NamedTuple):
    """One line of a report."""

    name: str
    own: float | None
    """Accuracy on the examples of its own classes, among these; None without labels."""
    accuracy: float | None
    """Accuracy on all examples, where it answers one of its own classes."""
    parameters: int
    bytes: int
    macs: int | None
    """Multiply-accumulates of one forward pass of one sample."""


def teacher_of(expert: Expert) -> tuple[Teacher, tuple[Label, ...]]:
    """Return an expert as a teacher of the classes of its source, and their labels."""
    source = expert.source
    own = tuple(source.labels[target] for target in source.classes)
    # A model with as many outputs as its source has classes answers with these, in their order.
    labels = own if expert.labels == source.labels and len(own) == expert.model.outputs else expert.labels
    outputs = tuple(labels.index(label) for label in own)
    return Teacher(
        name=expert.name,
        model=expert.model,
        params=dict(expert.params),
        buffers=dict(expert.buffers),
        classes=tuple(range(len(own))),
        outputs=outputs,
        task=source.task if expert.model.uses_task else None,
    ), own


def labelled(
    examples: Examples, labels: Sequence[Label], own: Sequence[Label]
) -> tuple[Input, Tensor] | None:
    """Return the examples of some labels, with targets by their place among these; None without any."""
    # Targets count in the labels of their source, and are asked for in those of a teacher.
    place = {label: number for number, label in enumerate(own)}
    table = torch.tensor([place.get(label, NONE) for label in labels])
    y = examples.targets()
    y = torch.where(y >= 0, table.to(y.device)[y.clamp_min(0)], NONE)
    there = (y != NONE).nonzero()[:, 0].cpu()
    if not len(there):
        return None
    return examples.select(there).whole()[0], y[there.to(y.device)]


def row_of(expert: Expert, test: Source | None, labels: Sequence[Label]) -> Row:
    """Return what an expert is worth on test examples of these labels."""
    teacher, own = teacher_of(expert)

    def accuracy(asked: Sequence[Label]) -> float | None:
        some = None if test is None else labelled(test.test, test.labels, asked)
        if some is None:
            return None
        x, y = some
        place = torch.tensor([list(asked).index(label) for label in own])
        return float((place[answers(teacher, x).argmax(1).cpu()] == y.cpu()).double().mean())

    return Row(expert.name, accuracy(own), accuracy(labels), *costs_of(expert.model, expert))


def costs_of(model: Model, expert: Expert) -> tuple[int, int, int | None]:
    """Return the numbers of parameters, bytes and MACs of a model."""
    # Bytes are what a file has: statistics of norms too.
    tensors = [*expert.params.values(), *expert.buffers.values()]
    x, _ = expert.source.train.first()
    return (
        sum(tensor.numel() for tensor in expert.params.values()),
        sum(tensor.nbytes for tensor in tensors),
        models.macs(model, x) if isinstance(x, Tensor) else None,
    )


def ensemble_row(experts: Sequence[Expert], test: Source | None, labels: Sequence[Label]) -> Row:
    """Return what the mean of the logits over the teachers that know a class is worth."""
    some = None if test is None else labelled(test.test, test.labels, labels)
    accuracy = None
    if some is not None:
        # As a student is taught: the mean over those that know a class.
        x, y = some
        total, times = torch.zeros(len(y), len(labels)), torch.zeros(len(labels))
        for expert in experts:
            teacher, own = teacher_of(expert)
            place = torch.tensor([list(labels).index(label) for label in own])
            total.index_add_(1, place, answers(teacher, x).float().cpu())
            times[place] += 1
        accuracy = float(((total / times).argmax(1) == y.cpu()).double().mean())
    each = [costs_of(expert.model, expert) for expert in experts]
    macs = [cost[2] for cost in each]
    whole = None if None in macs else sum(cost for cost in macs if cost is not None)
    return Row("all teachers", accuracy, accuracy, sum(c[0] for c in each), sum(c[1] for c in each), whole)


def table_of(rows: Sequence[Row]) -> str:
    """Write rows as a text table."""
    from consilience.report._text import Column, grid, human, number

    def score(value: float | None) -> str:
        return "-" if value is None else number(value, True)

    return grid(
        [
            Column("model", [row.name for row in rows], False),
            Column("own classes %", [score(row.own) for row in rows]),
            Column("all classes %", [score(row.accuracy) for row in rows]),
            Column("parameters", [human(row.parameters) for row in rows]),
            Column("bytes", [human(row.bytes) for row in rows]),
            Column("MACs", ["-" if row.macs is None else human(row.macs) for row in rows]),
        ]
    )
