"""How experts affect each other: disentanglement error, and accuracy of every expert on every task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.checks import source_of_classes
from consilience.core.errors import ConsilienceError, suggests
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.tree import cast_to

COEFFICIENTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
CHUNK = 512
"""Samples that go through the model at once."""


@dataclass(frozen=True)
class Disentanglement:
    """The result of `disentanglement`, for two tasks.

    errors[i][j] = xi(coefficients[i], coefficients[j]), in [0, 2].
    """

    tasks: tuple[str, str]
    coefficients: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> float:
        """The mean error over the grid."""
        return sum(map(sum, self.errors)) / len(self.coefficients) ** 2

    def table(self) -> str:
        """Write a line for each coefficient of the first task, a column for each of the second."""
        return matrix_table(" x ".join(self.tasks), self._names(), self._names(), self.errors)

    def write(self, path: str | Path) -> Path:
        """Write a heat map as SVG; the darker, the more the tasks disturb each other."""
        title = f"Disentanglement error of {self.tasks[0]} (down) and {self.tasks[1]} (across) by coefficient"
        # Colours need a range that is not empty, also where all errors are 0.
        high = max(1e-9, *(value for row in self.errors for value in row))
        return write_heat_map(path, title, self._names(), self.errors, (0.0, high))

    def _names(self) -> list[str]:
        return [f"{value:g}" for value in self.coefficients]


@dataclass(frozen=True)
class Transfer:
    """The result of `transfer_matrix`.

    It has the accuracies of the base on each task, and accuracies[i][j] of the expert of task i on task j.
    """

    tasks: tuple[str, ...]
    base: tuple[float, ...]
    accuracies: tuple[tuple[float, ...], ...]

    @property
    def ratios(self) -> tuple[tuple[float, ...], ...]:
        """accuracy(expert i on j) / accuracy(base on j); NaN where the base has none right."""
        return tuple(
            tuple(value / base if base else math.nan for value, base in zip(row, self.base, strict=True))
            for row in self.accuracies
        )

    @property
    def others(self) -> float:
        """The mean of |ratio - 1| off the diagonal: how much an expert changes accuracies on other tasks."""
        away = [
            abs(ratio - 1)
            for i, row in enumerate(self.ratios)
            for j, ratio in enumerate(row)
            if i != j and math.isfinite(ratio)
        ]
        return sum(away) / len(away) if away else math.nan

    @property
    def own(self) -> float:
        """The mean accuracy of the experts on their own tasks."""
        return sum(row[i] for i, row in enumerate(self.accuracies)) / len(self.tasks)

    def table(self) -> str:
        """Write a line per expert, a column per task: ratios of accuracies; then the base's accuracies."""
        rows = [*self.tasks, "base (accuracy)"]
        return matrix_table("expert \\ task", rows, self.tasks, [*self.ratios, self.base])

    def write(self, path: str | Path) -> Path:
        """Write a heat map of the ratios as SVG."""
        # NaN has no colour.
        seen = [value for row in self.ratios for value in row if math.isfinite(value)] or [1.0]
        title = "Accuracy of each expert (down) on each task (across), over the base's"
        return write_heat_map(path, title, self.tasks, self.ratios, (min(seen), max(seen)))


@suggests
def disentanglement(
    model: Model,
    base: Mapping[str, Any],
    experts: Sequence[Mapping[str, Any]],
    sources: Sequence[Source],
    coefficients: Sequence[float] = COEFFICIENTS,
    buffers: Params | None = None,
) -> Disentanglement:
    """Measure how two task vectors tau_t = theta_t - theta_0 disturb each other, on a grid of coefficients.

    xi(a1, a2) = sum over t of the fraction of test samples x of task t with argmax f(x; theta_0 + a_t tau_t)
    other than argmax f(x; theta_0 + a_1 tau_1 + a_2 tau_2). Entries of a task (heads) are taken from its
    expert, and classes are chosen among the source's.

    Args:
        model: of base and experts.
        base: theta_0, by entry.
        experts: the parameters of two experts, in the order of the sources.
        sources: the two tasks; their test data is read. Sources with classes, in the model's columns
            (`schedule.sources`).
        coefficients: of the grid, the same for both.
        buffers: of the model, for all. Others are taken from `base`, or are the model's initial ones if
            `base` lacks them.

    Raises:
        ConsilienceError: not two experts and two sources, no or infinite coefficients, values instead of
            classes; experts whose floating-point buffers (the statistics of batch norm, which do not
            extrapolate) differ from those of the base.

    Ortiz-Jimenez, Favero & Frossard 2023, arXiv:2305.12827.

    >>> import consilience as cs
    >>> schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 2), "task")
    >>> model = cs.models.linear(64)
    >>> base, other = (model.init(torch.Generator().manual_seed(i))[0] for i in (0, 1))
    >>> print(disentanglement(model, base, [base, other], schedule.sources, (0.0, 1.0)).table())
    digits/0-1-2-3-4 x digits/5-6-7-8-9      0      1
    -----------------------------------  -----  -----
    0                                    0.000  0.750
    1                                    0.000  0.750
    """
    if len(experts) != 2 or len(sources) != 2:
        raise ConsilienceError(
            f"a disentanglement error needs two tasks, got {len(experts)} experts and {len(sources)} sources."
        )
    grid = tuple(float(value) for value in coefficients)
    if not grid or not all(map(math.isfinite, grid)):
        raise ConsilienceError(f"`coefficients` must be finite, and at least one, got {grid}.")
    together = combined(model, base, experts, sources, buffers)
    refuse_other_statistics(together)

    def answers(scales: tuple[float, float], task: int) -> Tensor:
        """Return the classes chosen on one task's test data, with both task vectors scaled."""
        start, changed = together.start, together.changed
        # Entries that no expert changed, and scales of 0, leave the base's numbers to the bit.
        moved = dict(start)
        for name in changed[0].keys() | changed[1].keys():
            for scale, expert in zip(scales, changed, strict=True):
                if scale and name in expert:
                    moved[name] = moved[name] + scale * (expert[name] - start[name])
        return torch.cat([answer.chosen for answer in chunks(model, moved, together.buffers, sources[task])])

    # The answers with one task vector are compared with many others.
    alone = ([answers((a, 0.0), 0) for a in grid], [answers((0.0, a), 1) for a in grid])

    def error(i: int, j: int) -> float:
        both = (grid[i], grid[j])
        changed = (alone[task][k] != answers(both, task) for task, k in ((0, i), (1, j)))
        return sum(float(differs.double().mean()) for differs in changed)

    errors = tuple(tuple(error(i, j) for j in range(len(grid))) for i in range(len(grid)))
    return Disentanglement((sources[0].name, sources[1].name), grid, errors)


@suggests
def transfer_matrix(
    model: Model,
    base: Mapping[str, Any],
    experts: Sequence[Mapping[str, Any]],
    sources: Sequence[Source],
    buffers: Params | None = None,
) -> Transfer:
    """Measure the test accuracy of every expert on every task, over the base's.

    Off the diagonal, 1 means that an expert did not change the accuracy on another task. Entries of a task
    (heads) are taken from its expert, for all; classes are chosen among the source's.

    Args:
        model: of base and experts.
        base: theta_0, by entry.
        experts: the parameters of an expert for each source, in their order.
        sources: the tasks; their test data is read. Sources with classes, in the model's columns
            (`schedule.sources`).
        buffers: of the model, for all. Others are taken from each expert and from `base`, or are the model's
            initial ones if these lack them.

    Raises:
        ConsilienceError: not as many experts as sources, or none; values instead of classes.

    Iurada, Ciccone & Tommasi 2025, arXiv:2504.02620.

    >>> import consilience as cs
    >>> schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 2), "task")
    >>> model = cs.models.linear(64)
    >>> base = model.init(torch.Generator().manual_seed(0))[0]
    >>> transfer_matrix(model, base, [base, base], schedule.sources).ratios
    ((1.0, 1.0), (1.0, 1.0))
    """
    if not sources or len(experts) != len(sources):
        raise ConsilienceError(
            f"`experts` must have an expert for each source, got {len(experts)} and {len(sources)} sources."
        )
    together = combined(model, base, experts, sources, buffers)

    def accuracies(changed: Params, own_buffers: Params) -> tuple[float, ...]:
        params, all_buffers = {**together.start, **changed}, {**together.buffers, **own_buffers}
        return tuple(accuracy(model, params, all_buffers, source) for source in sources)

    found = tuple(map(accuracies, together.changed, together.expert_buffers))
    return Transfer(tuple(source.name for source in sources), accuracies({}, {}), found)


# Base and experts in one model.


class Combined(NamedTuple):
    """Base and experts as parameters of one model that has the heads of all tasks."""

    start: Params
    """The base, with the head of each task from its expert."""
    changed: list[Params]
    """By expert: its floating-point entries without a task that differ from the base's."""
    buffers: Params
    """The base's buffers, and those of all heads."""
    expert_buffers: list[Params]
    """By expert: its own buffers."""


def combined(
    model: Model,
    base: Mapping[str, Any],
    experts: Sequence[Mapping[str, Any]],
    sources: Sequence[Source],
    buffers: Params | None,
) -> Combined:
    """Check base and experts, and put the heads of all tasks into one model."""
    for source in sources:
        source_of_classes(source, "a comparison of answers")
    # Only the names, the shapes and the buffers of this model are used, so the seed does not matter.
    generator = torch.Generator().manual_seed(0)
    grown, first = model.init(generator)
    for source in sources:
        grown, first = model.grow(grown, first, source, generator)

    # Only an expert has the trained head of its task, whatever the base has under that name.
    start = {name: torch.as_tensor(value) for name, value in base.items() if name not in first}
    for expert, source in zip(experts, sources, strict=True):
        head = model.head_key(source)
        start |= {
            name: torch.as_tensor(value)
            for name, value in expert.items()
            if model.task_of(name) == head and name not in first
        }

    given = buffers or {}
    base_buffers = buffers_in(model, base, first, given, "the base")
    expert_buffers = [
        buffers_in(model, expert, first, given, f"expert {i}") for i, expert in enumerate(experts)
    ]
    lacking = sorted(grown.keys() - start.keys())
    if lacking:
        raise ConsilienceError(f"`base` must have the model's entries, got none called {lacking[0]!r}.")
    changed = [changed_by(model, expert, start, grown, i) for i, expert in enumerate(experts)]
    return Combined(start, changed, {**first, **base_buffers, **given}, expert_buffers)


def buffers_in(model: Model, held: Mapping[str, Any], first: Params, given: Params, whose: str) -> Params:
    """Return the buffers of a checkpoint, without those of heads and those that are `given`."""
    found = {
        name: torch.as_tensor(value)
        for name, value in held.items()
        if name in first and name not in given and model.task_of(name) is None
    }
    for name, value in found.items():
        if value.shape != first[name].shape:
            raise ConsilienceError(
                f"buffers must have the model's shapes, got {tuple(value.shape)} for {name!r} of {whose}, "
                f"here {tuple(first[name].shape)}."
            )
    return found


def changed_by(model: Model, expert: Mapping[str, Any], start: Params, grown: Params, index: int) -> Params:
    """Return the entries without a task that an expert changed; refuse other shapes and missing entries."""
    shared = {
        name: torch.as_tensor(value)
        for name, value in expert.items()
        if model.task_of(name) is None and name in start
    }
    for name, value in shared.items():
        if value.shape != start[name].shape:
            raise ConsilienceError(
                f"experts must have the base's shapes, got {tuple(value.shape)} for {name!r} of expert "
                f"{index}, here {tuple(start[name].shape)}."
            )
    missing = sorted(name for name in grown if model.task_of(name) is None and name not in shared)
    if missing:
        raise ConsilienceError(
            f"experts must have the model's entries, got none called {missing[0]!r} in expert {index}."
        )
    # Equal entries are left out, so that frozen ones cost nothing and stay exact.
    return {
        name: value
        for name, value in shared.items()
        if value.is_floating_point() and not torch.equal(value, start[name])
    }


def refuse_other_statistics(together: Combined) -> None:
    """Refuse experts with other floating-point buffers than the base."""
    for i, buffers in enumerate(together.expert_buffers):
        for name, value in buffers.items():
            base = together.buffers[name].to(value.dtype)
            if value.is_floating_point() and not torch.equal(value, base):
                raise ConsilienceError(
                    "experts must have the base's buffers, since statistics do not extrapolate, got others "
                    f"in {name!r} of expert {i}."
                )


# Answers.


class Answer(NamedTuple):
    """The classes chosen [B] on a chunk of test data, and its targets [B]."""

    chosen: Tensor
    targets: Tensor


@torch.no_grad()
def chunks(model: Model, params: Params, buffers: Params, source: Source) -> Iterator[Answer]:
    """Yield a model's answers on a source's test data, among the source's classes."""
    # Inputs follow the parameters to their device and type.
    like = next(value for value in params.values() if value.is_floating_point())
    columns = torch.tensor(source.classes, device=like.device)

    ready = {name: cast_to(value, like.device, like.dtype) for name, value in buffers.items()}
    for x, y in source.test.chunks(CHUNK):
        outputs = model(params, ready, cast_to(x, like.device, like.dtype), source.task, False)[0]
        yield Answer(columns[outputs[:, columns].argmax(1)].cpu(), y.cpu())


def accuracy(model: Model, params: Params, buffers: Params, source: Source) -> float:
    """Return the accuracy on a source's test data."""
    # Counts, not means of chunks: the last chunk is smaller.
    right = total = 0
    for chosen, targets in chunks(model, params, buffers, source):
        right += int((chosen == targets).sum())
        total += len(targets)
    return right / total


# Tables and figures.


def matrix_table(
    corner: str, rows: Sequence[str], names: Sequence[str], values: Sequence[Sequence[float]]
) -> str:
    """Write a matrix with the names of its rows and columns."""
    from consilience.core.names import clean
    from consilience.report._text import Column, grid, number, short

    columns = [Column(clean(corner), [clean(row) for row in rows], False)]
    for j, name in enumerate(names):
        columns.append(Column(short(name, 14), [number(row[j]) for row in values]))
    return grid(columns)


def write_heat_map(
    path: str | Path,
    title: str,
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    colours: tuple[float, float],
) -> Path:
    """Write a square matrix as a heat map; `colours` are the values of the lightest and the darkest."""
    from consilience.report._figure import standing
    from consilience.report._svg import heat_map
    from consilience.report._text import number

    svg, _ = heat_map(
        f"Heat map: {title}.",
        names,
        names,
        values,
        colours,
        number,
        lambda value: number(value, digits=2),
    )
    return standing([(title, svg)]).save(path)
