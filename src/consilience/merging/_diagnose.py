"""How experts differ: angles between their task vectors, norms and sign conflicts of every entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of, suggests
from consilience.merging._files import Entries, opened, stem

BLOCK = 1 << 15
"""Elements of each expert that are read at once."""


@dataclass(frozen=True)
class Layer:
    """An entry that all models have: its size, the norm of each task vector, and how their signs conflict.

    `conflicts` is the fraction of elements where two task vectors that are not zero have opposite signs,
    `mass` the fraction of sum_i |tau_i| that lies in such elements (0 where all are zero).
    """

    name: str
    size: int
    norms: tuple[float, ...]
    conflicts: float
    mass: float

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain values."""
        return {
            "name": self.name,
            "size": self.size,
            "norms": list(self.norms),
            "conflicts": self.conflicts,
            "mass": self.mass,
        }


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`: cosines [m][m] of task vectors over all entries, and layers.

    A cosine with a task vector of zeros is NaN. `whole` is the layer of all entries together. `apart` has the
    entries that some model lacks or that are not floating point (heads of tasks, counters): they are not
    compared.
    """

    experts: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    layers: tuple[Layer, ...]
    whole: Layer
    apart: tuple[str, ...] = ()

    def table(self, most: int | None = 60) -> str:
        """Write the cosine matrix, then a line per entry; more than `most` lines are cut in the middle."""
        from consilience.core.names import clean
        from consilience.report._text import Column, grid, human, number, short

        names = [clean(name) for name in self.experts]
        cosines = [Column("cosine", names, False)]
        for j, name in enumerate(names):
            cosines.append(Column(short(name, 14), [number(row[j]) for row in self.cosines]))

        shown: list[Layer | None] = [*self.layers]
        # The first and the last entries say most: embeddings and heads.
        if most is not None and len(shown) > most:
            shown = [*shown[: most - most // 2], None, *shown[len(shown) - most // 2 :]]
        shown.append(self.whole)

        def column(head: str, say: Callable[[Layer], str], right: bool = True) -> Column:
            return Column(head, ["..." if layer is None else say(layer) for layer in shown], right)

        def norm_of(expert: int) -> Callable[[Layer], str]:
            return lambda layer: f"{layer.norms[expert]:.4g}"

        columns = [
            column("entry", lambda layer: short(layer.name, 48), False),
            column("elements", lambda layer: human(layer.size)),
            *(column(f"|{short(name, 12)}|", norm_of(i)) for i, name in enumerate(names)),
            column("conflicts %", lambda layer: number(layer.conflicts, True)),
            column("of the mass %", lambda layer: number(layer.mass, True)),
        ]
        text = f"{grid(cosines)}\n\n{grid(columns)}"
        # An entry that is missing from the table would be taken for one that agrees.
        if self.apart:
            apart = ", ".join(map(clean, self.apart))
            text += f"\n\nnot compared, since not all carry them as floats: {apart}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain values; a cosine that is NaN is None."""
        return {
            "experts": list(self.experts),
            "cosines": [[value if math.isfinite(value) else None for value in row] for row in self.cosines],
            "layers": [layer.to_json() for layer in self.layers],
            "whole": self.whole.to_json(),
            "apart": list(self.apart),
        }

    def write(self, path: str | Path) -> Path:
        """Write a figure as SVG: the cosine matrix, then norms and sign conflicts along the entries."""
        from consilience.report._figure import standing
        from consilience.report._svg import Axis, heat_map, lines_chart
        from consilience.report._text import number

        names, entries = list(self.experts), [layer.name for layer in self.layers]
        # Colours begin at 0, so that two figures with no negative cosine can be compared.
        low = min([0.0, *(value for row in self.cosines for value in row if math.isfinite(value))])
        cosines, _ = heat_map(
            f"Heat map: cosines of the task vectors of {len(names)} experts.",
            names,
            names,
            self.cosines,
            (low, 1.0),
            number,
            lambda value: number(value, digits=2),
        )
        norms = lines_chart(
            f"Line chart: norms of task vectors over {len(entries)} entries.",
            entries,
            [(name, [layer.norms[i] for layer in self.layers]) for i, name in enumerate(names)],
            Axis(False, lambda value: f"{value:.3g}", lambda value, step: f"{value:.3g}"),
        )
        conflicts = lines_chart(
            f"Line chart: sign conflicts over {len(entries)} entries.",
            entries,
            [
                ("of elements", [layer.conflicts for layer in self.layers]),
                ("of the mass", [layer.mass for layer in self.layers]),
            ],
            Axis(
                True,
                lambda value: number(value, True),
                lambda value, step: number(value, True, 0 if step >= 0.01 else 1),
            ),
        )
        charts = [
            ("Cosine of task vectors", cosines),
            ("Norm of the task vectors by entry", norms),
            ("Sign conflicts (%) by entry", conflicts),
        ]
        return standing(charts).save(path)


@suggests
def diagnose(base: Any, experts: Any) -> Diagnosis:
    """Compare the task vectors tau_i = theta_i - base of experts, before they are merged.

    cos_ij = <tau_i, tau_j> / (|tau_i| |tau_j|) over all entries that base and experts have in floating point;
    |tau_i| and sign conflicts also by entry. Weights that are tied in all models count once, by their first
    name. Sums are float64. Tensors are read in blocks, so memory does not grow with the models.

    Args:
        base: what the experts were trained from: a state dict, a module, or the path of a checkpoint.
        experts: the same, in a sequence or by name; at least one.

    Raises:
        ConsilienceError: no experts, different shapes, no common entries, NaN or infinity; all of them are
            named at once.

    Yadav et al. 2023, arXiv:2306.01708 (sign conflicts); Ilharco et al. 2023, arXiv:2212.04089 (cosines).

    >>> experts = {"a": {"w": torch.tensor([1.0, 1, 0, 2])}, "b": {"w": torch.tensor([1.0, -1, 3, 0])}}
    >>> found = diagnose({"w": torch.zeros(4)}, experts)
    >>> print(found.table())
    cosine      a      b
    ------  -----  -----
    a       1.000  0.000
    b       0.000  1.000
    <BLANKLINE>
    entry  elements    |a|    |b|  conflicts %  of the mass %
    -----  --------  -----  -----  -----------  -------------
    w             4  2.449  3.317         25.0           22.2
    all           4  2.449  3.317         25.0           22.2
    """
    # An adapter is opened with its base, whose entries it changes.
    given = named(experts)
    start = opened(base)
    read = {name: opened(expert, start) for name, expert in given.items()}
    every, shared = compared(start, read)

    # All faults are collected, since reading large files takes long.
    total, layers = Sums.zeros(len(read)), []
    faults: dict[str, None] = {}
    for name in shared:
        own = Sums.zeros(len(read))
        for block in blocks(name, start, read):
            bad = block.not_finite(read)
            if bad:
                faults |= dict.fromkeys(f"{name!r} of {whose}" for whose in bad)
            else:
                own = own.plus(Sums.of(block.rows))
        total = total.plus(own)
        layers.append(own.layer(name, prod(start.shapes[name])))
    if faults:
        raise ConsilienceError(f"checkpoints must be finite, got NaN or infinity in {'; '.join(faults)}.")

    # Rounding may bring a cosine just above 1.
    norms = total.gram.diagonal().sqrt()
    cosines = (total.gram / (norms[:, None] * norms)).clamp(-1, 1)
    return Diagnosis(
        tuple(read),
        tuple(tuple(row) for row in cosines.tolist()),
        tuple(layers),
        total.layer("all", sum(layer.size for layer in layers)),
        tuple(name for name in every if name not in shared),
    )


def compared(start: Entries, read: Mapping[str, Entries]) -> tuple[list[str], list[str]]:
    """Return the names of all entries, and of those that can be compared; refuse different shapes."""
    models = (start, *read.values())
    twins = {
        name for name, first in start.aliases.items() if all(is_tied(model, name, first) for model in models)
    }
    # A dictionary keeps the order of the base, which a set would lose.
    every = [name for name in {name: None for model in models for name in model.shapes} if name not in twins]
    shared = [
        name
        for name in every
        if all(name in model.shapes and model.dtypes[name].is_floating_point for model in models)
    ]
    faults = [
        f"{tuple(model.shapes[name])} for {name!r} of {whose}, here {tuple(start.shapes[name])}"
        for name in shared
        for whose, model in read.items()
        if tuple(model.shapes[name]) != tuple(start.shapes[name])
    ]
    if faults:
        raise ConsilienceError(f"experts must have the base's shapes, got {'; '.join(faults)}.")
    if not shared:
        raise ConsilienceError(
            f"base and experts must have floating-point entries in common, got none among {len(every)}."
        )
    return every, shared


def is_tied(model: Entries, name: str, first: str) -> bool:
    """Whether two names are one tensor; an adapter unties entries that it changes."""
    changed: set[str] = getattr(model, "changed", set())
    both = name in model.shapes and first in model.shapes
    one = model.aliases.get(name, name) == model.aliases.get(first, first)
    return both and one and not changed & {name, first}


class Block(NamedTuple):
    """A block of one entry: the base's elements [b], and the task vectors [m, b] of the experts."""

    origin: Tensor
    rows: Tensor

    def not_finite(self, read: Mapping[str, Entries]) -> list[str]:
        """Return whose elements are not finite: the base's alone, if they are, or those of experts."""
        if torch.isfinite(self.rows).all():
            return []
        # A base that is not finite makes all task vectors so.
        if not torch.isfinite(self.origin).all():
            return ["the base"]
        return [name for name, row in zip(read, self.rows, strict=True) if not torch.isfinite(row).all()]


def blocks(name: str, start: Entries, read: Mapping[str, Entries]) -> Iterator[Block]:
    """Read an entry of all models block by block, in float64."""
    size = prod(start.shapes[name])
    for at in range(0, size, BLOCK):
        end = min(at + BLOCK, size)
        origin = start.read(name, at, end).double()
        rows = [model.read(name, at, end).double() - origin for model in read.values()]
        yield Block(origin, torch.stack(rows))


class Sums(NamedTuple):
    """What adds up over blocks: inner products [m, m], and counts [3].

    The counts are the elements with conflicts, the mass in them, and the mass of all.
    """

    gram: Tensor
    counts: Tensor

    @staticmethod
    def zeros(experts: int) -> Sums:
        """Return the sums of nothing."""
        return Sums(torch.zeros(experts, experts, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    @staticmethod
    def of(rows: Tensor) -> Sums:
        """Return the sums of a block of task vectors [m, b]."""
        # Zeros conflict with nothing: an expert that leaves an element alone does not object.
        against = (rows > 0).any(0) & (rows < 0).any(0)
        mass = rows.abs().sum(0)
        counts = torch.stack([against.sum().double(), mass[against].sum(), mass.sum()])
        return Sums(rows @ rows.T, counts)

    def plus(self, other: Sums) -> Sums:
        """Return the sum of both."""
        return Sums(self.gram + other.gram, self.counts + other.counts)

    def layer(self, name: str, size: int) -> Layer:
        """Return the sums as norms and fractions."""
        against, inside, mass = self.counts.tolist()
        norms = tuple(self.gram.diagonal().sqrt().tolist())
        # An entry may be empty, or the same in all models.
        return Layer(name, size, norms, against / size if size else 0.0, inside / mass if mass else 0.0)


def named(experts: Any) -> dict[str, Any]:
    """Return experts by name: as given, by the name of their file, or numbered.

    >>> list(named(["a/digits.safetensors", {}])), list(named({"x": {}}))
    (['digits', 'expert-1'], ['x'])
    """
    # A state dict is a mapping too, of tensors.
    if isinstance(experts, Mapping) and not any(isinstance(value, Tensor) for value in experts.values()):
        found = {str(name): expert for name, expert in experts.items()}
    elif isinstance(experts, Mapping | str | Path) or not isinstance(experts, Sequence):
        raise ConsilienceError(f"`experts` must be a sequence, or by name, got {kind_of(experts)}.")
    else:
        found = dict(zip(names_of(experts), experts, strict=True))
    if not found:
        raise ConsilienceError("`experts` must have at least one expert, got none.")
    return found


def names_of(experts: Sequence[Any]) -> list[str]:
    """Return the names of experts in a sequence: of their files, their paths if two are equal, or numbers."""
    paths = [str(expert) if isinstance(expert, str | Path) else None for expert in experts]
    numbered = [f"expert-{i}" for i in range(len(experts))]
    names = [number if path is None else stem(path) for path, number in zip(paths, numbered, strict=True)]
    if len(set(names)) < len(names):
        names = [number if path is None else path for path, number in zip(paths, numbered, strict=True)]
    if len(set(names)) < len(names):
        raise ConsilienceError(
            f"experts must have names of their own, got {max(names, key=names.count)} twice; give a mapping."
        )
    return names
