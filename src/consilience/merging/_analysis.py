"""What experts do to each other: the error of weight disentanglement, and accuracies of every expert on every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Source

COEFFICIENTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
CHUNK = 512
"""Samples that go through the model at once."""


@dataclass(frozen=True)
class Disentanglement:
    """What `disentanglement` found: errors[i][j] = xi(coefficients[i], coefficients[j]), in [0, 2], for two tasks."""

    tasks: tuple[str, str]
    coefficients: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> float:
        """The mean error over the grid."""
        return sum(map(sum, self.errors)) / len(self.coefficients) ** 2

    def table(self) -> str:
        """A line for each coefficient of the first task, a column for each of the second."""
        return _table(" x ".join(self.tasks), *self._named(), self.errors)

    def write(self, path: str | Path) -> Path:
        """Write the heat map as SVG; the darker, the more the tasks disturb each other."""
        title = f"Disentanglement error of {self.tasks[0]} (down) and {self.tasks[1]} (across) by coefficient"
        return _heat(
            path, title, *self._named(), self.errors, 0.0, max(1e-9, *(v for row in self.errors for v in row))
        )

    def _named(self) -> tuple[list[str], list[str]]:
        names = [f"{a:g}" for a in self.coefficients]
        return names, names


@dataclass(frozen=True)
class Transfer:
    """What `transfer_matrix` found: accuracies of the base on each task, and accuracies[i][j] of the expert of task i on task j."""

    tasks: tuple[str, ...]
    base: tuple[float, ...]
    accuracies: tuple[tuple[float, ...], ...]

    @property
    def ratios(self) -> tuple[tuple[float, ...], ...]:
        """accuracy(expert i on j) / accuracy(base on j); NaN where the base has none right."""
        return tuple(
            tuple(a / b if b else math.nan for a, b in zip(row, self.base, strict=True))
            for row in self.accuracies
        )

    @property
    def others(self) -> float:
        """The mean of |ratio - 1| off the diagonal: how far an expert moves what the base did on other tasks."""
        away = [
            abs(v - 1)
            for i, row in enumerate(self.ratios)
            for j, v in enumerate(row)
            if i != j and math.isfinite(v)
        ]
        return sum(away) / len(away) if away else math.nan

    @property
    def own(self) -> float:
        """The mean accuracy of the experts on their own tasks."""
        return sum(row[i] for i, row in enumerate(self.accuracies)) / len(self.tasks)

    def table(self) -> str:
        """A line for each expert, a column for each task: ratios of accuracies; then the base's own."""
        return _table(
            "expert \\ task", [*self.tasks, "base (accuracy)"], self.tasks, [*self.ratios, self.base]
        )

    def write(self, path: str | Path) -> Path:
        """Write the heat map of the ratios as SVG."""
        seen = [v for row in self.ratios for v in row if math.isfinite(v)] or [1.0]
        title = "Accuracy of each expert (down) on each task (across), over the base's"
        return _heat(path, title, self.tasks, self.tasks, self.ratios, min(seen), max(seen))


def disentanglement(
    model: Model,
    base: Mapping[str, Any],
    experts: Sequence[Mapping[str, Any]],
    sources: Sequence[Source],
    coefficients: Sequence[float] = COEFFICIENTS,
    buffers: Params | None = None,
) -> Disentanglement:
    """How far two task vectors tau_t = theta_t - theta_0 disturb each other, on a grid of coefficients.

    xi(a1, a2) = sum over t of the share of test samples x of task t with argmax f(x; theta_0 + a_t tau_t) other than
    argmax f(x; theta_0 + a_1 tau_1 + a_2 tau_2). Entries of a task (heads) are taken as its expert has them, and classes are
    chosen among the source's own.

    Args:
        model: of base and experts.
        base: theta_0, by entry.
        experts: the parameters of two experts, in the order of the sources.
        sources: the two tasks; their test data is read. Sources with classes, in the model's columns (`schedule.sources`).
        coefficients: of the grid, the same for both.
        buffers: of the model, for all; what is not among them is taken from `base` where it stands there, else from what the model
            begins with.

    Raises:
        ConsilienceError: not two experts and two sources, no or infinite coefficients, values instead of classes; experts whose
            floating-point buffers (the statistics of batch norm, which do not extrapolate) are not those of the base.

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
            f"a disentanglement error should be of two tasks. Found {len(experts)} experts and {len(sources)} sources."
        )
    grid = tuple(float(a) for a in coefficients)
    if not grid or not all(map(math.isfinite, grid)):
        raise ConsilienceError(
            f"`coefficients` should be finite, and at least one. Found `coefficients = {grid}`."
        )
    start, theta, held, own = _together(model, base, experts, sources, buffers)
    for i, told in enumerate(own):
        for n, b in told.items():
            if b.is_floating_point() and not torch.equal(b, held[n].to(b.dtype)):
                raise ConsilienceError(
                    f"experts should have the base's buffers, as statistics do not extrapolate. Found others in {n!r} of expert {i}."
                )

    def answers(a: tuple[float, float], t: int) -> Tensor:
        moved = dict(start)
        for n in theta[0].keys() | theta[1].keys():
            for scale, expert in zip(a, theta, strict=True):
                if scale and n in expert:
                    moved[n] = moved[n] + scale * (expert[n] - start[n])
        return torch.cat([p for p, _ in _answers(model, moved, held, sources[t])])

    alone = [[answers((a, 0.0) if t == 0 else (0.0, a), t) for a in grid] for t in (0, 1)]
    errors = [
        [
            sum(float((alone[t][k] != answers((a, b), t)).double().mean()) for t, k in ((0, i), (1, j)))
            for j, b in enumerate(grid)
        ]
        for i, a in enumerate(grid)
    ]
    return Disentanglement((sources[0].name, sources[1].name), grid, tuple(map(tuple, errors)))


def transfer_matrix(
    model: Model,
    base: Mapping[str, Any],
    experts: Sequence[Mapping[str, Any]],
    sources: Sequence[Source],
    buffers: Params | None = None,
) -> Transfer:
    """The test accuracy of every expert on every task, over the base's: off the diagonal, 1 is an expert that leaves others alone.

    Entries of a task (heads) are taken as its own expert has them, by all; classes are chosen among the source's own.

    Args:
        model: of base and experts.
        base: theta_0, by entry.
        experts: the parameters of an expert for each source, in their order.
        sources: the tasks; their test data is read. Sources with classes, in the model's columns (`schedule.sources`).
        buffers: of the model, for all; what is not among them is taken from each expert and from `base` where it stands there, else
            from what the model begins with.

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
            f"there should be an expert for each source. Found {len(experts)} and {len(sources)} sources."
        )
    start, theta, held, own = _together(model, base, experts, sources, buffers)

    def accuracies(params: Params, told: Params) -> tuple[float, ...]:
        pairs = [list(_answers(model, params, {**held, **told}, s)) for s in sources]
        return tuple(
            sum(int((p == y).sum()) for p, y in some) / sum(len(y) for _, y in some) for some in pairs
        )

    found = tuple(accuracies({**start, **expert}, told) for expert, told in zip(theta, own, strict=True))
    return Transfer(tuple(s.name for s in sources), accuracies(start, {}), found)


def _together(
    model: Model,
    base: Mapping[str, Any],
    experts: Sequence[Mapping[str, Any]],
    sources: Sequence[Source],
    buffers: Params | None,
) -> tuple[Params, list[Params], Params, list[Params]]:
    """The base with the heads of all tasks; the entries in which each expert differs from it; buffers for all heads; each expert's."""
    for s in sources:
        if s.kind != "class":
            raise ConsilienceError(
                f"answers that are compared should be classes. Found values in {s.name!r}."
            )
    g = torch.Generator().manual_seed(0)
    grown, first = model.init(g)
    for s in sources:
        grown, first = model.grow(grown, first, s, g)
    start = {n: torch.as_tensor(p) for n, p in base.items() if n not in first}
    for expert, s in zip(experts, sources, strict=True):
        start |= {
            n: torch.as_tensor(p)
            for n, p in expert.items()
            if model.task_of(n) == model.head_key(s) and n not in first
        }
    given = buffers or {}
    told = [
        {
            n: torch.as_tensor(b)
            for n, b in held.items()
            if n in first and n not in given and model.task_of(n) is None
        }
        for held in (base, *experts)
    ]
    for whose, held in zip(("the base", *(f"expert {i}" for i in range(len(experts)))), told, strict=True):
        for n, b in held.items():
            if b.shape != first[n].shape:
                raise ConsilienceError(
                    f"buffers should have the model's shapes. Found {tuple(b.shape)} for {n!r} of {whose}, here {tuple(first[n].shape)}."
                )
    lacking = sorted(grown.keys() - start.keys())
    if lacking:
        raise ConsilienceError(f"`base` should have the model's entries. Found none called {lacking[0]!r}.")
    theta = []
    for i, expert in enumerate(experts):
        shared = {n: torch.as_tensor(p) for n, p in expert.items() if model.task_of(n) is None and n in start}
        for n, p in shared.items():
            if p.shape != start[n].shape:
                raise ConsilienceError(
                    f"experts should have the base's shapes. Found {tuple(p.shape)} for {n!r} of expert {i}, here {tuple(start[n].shape)}."
                )
        missing = sorted(n for n in grown if model.task_of(n) is None and n not in shared)
        if missing:
            raise ConsilienceError(
                f"experts should have the model's entries. Found none called {missing[0]!r} in expert {i}."
            )
        theta.append(
            {n: p for n, p in shared.items() if p.is_floating_point() and not torch.equal(p, start[n])}
        )
    return start, theta, {**first, **told[0], **given}, told[1:]


@torch.no_grad()
def _answers(
    model: Model, params: Params, buffers: Params, source: Source
) -> Iterator[tuple[Tensor, Tensor]]:
    """(argmax over the source's classes [B], targets [B]) of its test data, by chunks."""
    like = next(p for p in params.values() if p.is_floating_point())
    columns = torch.tensor(source.classes, device=like.device)
    cast = {
        n: b.to(like.device, like.dtype if b.is_floating_point() else b.dtype) for n, b in buffers.items()
    }
    for x, y in source.test.chunks(CHUNK):
        seen = x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
        out = model(params, cast, seen, source.task, False)[0]
        yield columns[out[:, columns].argmax(1)].cpu(), y.cpu()


def _table(corner: str, rows: Sequence[str], names: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    from consilience.report._text import Column, clean, grid, number, short

    columns = [Column(clean(corner), [clean(r) for r in rows], False)]
    return grid(
        columns + [Column(short(n, 14), [number(row[j]) for row in values]) for j, n in enumerate(names)]
    )


def _heat(
    path: str | Path,
    title: str,
    rows: Sequence[str],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    low: float,
    high: float,
) -> Path:
    from consilience.merging._diagnose import draw
    from consilience.report._svg import heat_map
    from consilience.report._text import number

    brief: Callable[[float], str] = lambda v: number(v, digits=2)  # noqa: E731
    return draw(
        path,
        [
            (
                title,
                heat_map(
                    f"Heat map: {title}.", rows, names, values, low, high, number, brief, [None] * len(names)
                )[0],
            )
        ],
    )
