"""How experts differ: angles between their task vectors, norms and sign conflicts of every entry, read block by block."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError

if TYPE_CHECKING:
    from consilience.merging._files import Entries

BLOCK = 1 << 15
"""Elements of each expert that are read at once."""


@dataclass(frozen=True)
class Layer:
    """An entry that all share: its elements, the norm of every expert's task vector there, and how far their signs conflict.

    `conflicts` is the share of elements where two task vectors that are not zero have opposite signs, `mass` the share of
    sum_i |tau_i| that lies in such elements (0 where all are zero).
    """

    name: str
    size: int
    norms: tuple[float, ...]
    conflicts: float
    mass: float


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found: cosines [m][m] of whole task vectors (NaN for one that is zero), norms [m], layers, and the whole.

    `apart` are entries that not all carry in floating point (heads of tasks, counters): they are not compared.
    """

    experts: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    layers: tuple[Layer, ...]
    whole: Layer
    apart: tuple[str, ...] = ()

    def table(self, most: int | None = 60) -> str:
        """The cosine matrix, then a line for each entry; more than `most` are cut in the middle."""
        from consilience.report._text import Column, clean, grid, human, number, short

        names = [clean(n) for n in self.experts]
        cosines = [Column("cosine", names, False)]
        cosines += [
            Column(short(n, 14), [number(row[j]) for row in self.cosines]) for j, n in enumerate(names)
        ]
        shown: list[Layer | None] = [*self.layers]
        if most is not None and len(shown) > most:
            shown = [*shown[: most - most // 2], None, *shown[len(shown) - most // 2 :]]
        shown.append(self.whole)

        def cells(say: Callable[[Layer], str]) -> list[str]:
            return ["..." if x is None else say(x) for x in shown]

        columns = [
            Column("entry", cells(lambda x: short(x.name, 48)), False),
            Column("elements", cells(lambda x: human(x.size))),
        ]
        columns += [
            Column(f"|{short(n, 12)}|", cells(lambda x, i=i: f"{x.norms[i]:.4g}"))  # type: ignore[misc]
            for i, n in enumerate(names)
        ]
        columns += [
            Column("conflicts %", cells(lambda x: number(x.conflicts, True))),
            Column("of the mass %", cells(lambda x: number(x.mass, True))),
        ]
        apart = (
            f"\n\nnot compared, since not all carry them as floats: {', '.join(map(clean, self.apart))}"
            if self.apart
            else ""
        )
        return f"{grid(cosines)}\n\n{grid(columns)}{apart}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; a cosine of a zero vector is null."""

        def layer(x: Layer) -> dict[str, Any]:
            return {
                "name": x.name,
                "size": x.size,
                "norms": list(x.norms),
                "conflicts": x.conflicts,
                "mass": x.mass,
            }

        return {
            "experts": list(self.experts),
            "cosines": [[v if math.isfinite(v) else None for v in row] for row in self.cosines],
            "layers": [layer(x) for x in self.layers],
            "whole": layer(self.whole),
            "apart": list(self.apart),
        }

    def write(self, path: str | Path) -> Path:
        """Write a figure as SVG: the cosine matrix, then norms and sign conflicts along the entries."""
        from consilience.report._svg import Axis, heat_map, lines_chart
        from consilience.report._text import number

        names, entries = list(self.experts), [x.name for x in self.layers]
        low = min([0.0, *(v for row in self.cosines for v in row if math.isfinite(v))])
        charts = [
            (
                "Cosine of task vectors",
                heat_map(
                    f"Heat map: cosines of the task vectors of {len(names)} experts.",
                    names,
                    names,
                    self.cosines,
                    (low, 1.0),
                    number,
                    lambda v: number(v, digits=2),
                )[0],
            )
        ]
        norms = [(n, [x.norms[i] for x in self.layers]) for i, n in enumerate(names)]
        charts += [
            (
                "Norm of the task vectors by entry",
                lines_chart(
                    f"Line chart: norms of task vectors over {len(entries)} entries.",
                    entries,
                    norms,
                    Axis(False, lambda v: f"{v:.3g}", lambda v, step: f"{v:.3g}"),
                ),
            )
        ]
        shares = [
            ("of elements", [x.conflicts for x in self.layers]),
            ("of the mass", [x.mass for x in self.layers]),
        ]
        charts += [
            (
                "Sign conflicts (%) by entry",
                lines_chart(
                    f"Line chart: sign conflicts over {len(entries)} entries.",
                    entries,
                    shares,
                    Axis(
                        True,
                        lambda v: number(v, True),
                        lambda v, step: number(v, True, 0 if step >= 0.01 else 1),
                    ),
                ),
            )
        ]
        return draw(path, charts)


def diagnose(base: Any, experts: Any) -> Diagnosis:
    """How the task vectors tau_i = theta_i - base of experts differ, before they are merged.

    cos_ij = <tau_i, tau_j> / (|tau_i| |tau_j|) over all entries that base and experts share in floating point; |tau_i| and the sign
    conflicts also for each of them; weights that are tied in all count once, by their first name. Sums are float64; blocks of tensors are
    read, so that memory does not grow with the models.

    Args:
        base: what the experts started from: a state dict, a module, or the path of a checkpoint.
        experts: the same, in a sequence or by name; at least one.

    Raises:
        ConsilienceError: no experts, shapes that differ, nothing shared, NaN or infinity; all of them are named at once.

    Yadav et al. 2023, arXiv:2306.01708 (sign conflicts); Ilharco et al. 2023, arXiv:2212.04089 (cosines).

    >>> found = diagnose({"w": torch.zeros(4)}, {"a": {"w": torch.tensor([1.0, 1, 0, 2])}, "b": {"w": torch.tensor([1.0, -1, 3, 0])}})
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
    from consilience.merging._files import opened

    given = named(experts)
    start = opened(base)
    read = {n: opened(e, start) for n, e in given.items()}
    m = len(read)
    every = {n: None for e in (start, *read.values()) for n in e.shapes}
    twins = [
        n for n, first in start.aliases.items() if all(_tied(e, n, first) for e in (start, *read.values()))
    ]
    for n in twins:
        del every[n]
    shared = [
        n
        for n in every
        if all(n in e.shapes and e.dtypes[n].is_floating_point for e in (start, *read.values()))
    ]
    faults = [
        f"{tuple(e.shapes[n])} for {n!r} of {whose}, here {tuple(start.shapes[n])}"
        for n in shared
        for whose, e in read.items()
        if tuple(e.shapes[n]) != tuple(start.shapes[n])
    ]
    if faults:
        raise ConsilienceError(f"experts should have the base's shapes. Found {'; '.join(faults)}.")
    if not shared:
        raise ConsilienceError(
            f"base and experts should share entries of floats. Found none among {len(every)}."
        )
    whole, layers = torch.zeros(m, m, dtype=torch.float64), []
    counts = torch.zeros(3, dtype=torch.float64)  # conflicts, mass in conflict, mass
    for n in shared:
        gram, own, size = torch.zeros_like(whole), torch.zeros_like(counts), prod(start.shapes[n])
        for at in range(0, size, BLOCK):
            end = min(at + BLOCK, size)
            origin = start.read(n, at, end).double()
            rows = torch.stack([e.read(n, at, end).double() - origin for e in read.values()])
            if not torch.isfinite(rows).all():
                bad = [whose for whose, r in zip(read, rows, strict=True) if not torch.isfinite(r).all()]
                broken = ["the base"] if not torch.isfinite(origin).all() else bad
                faults += [f"{n!r} of {whose}" for whose in broken if f"{n!r} of {whose}" not in faults]
                continue
            gram += rows @ rows.T
            against = (rows > 0).any(0) & (rows < 0).any(0)
            mass = rows.abs().sum(0)
            own += torch.stack([against.sum().double(), mass[against].sum(), mass.sum()])
        whole, counts = whole + gram, counts + own
        layers.append(_layer(n, size, gram, own))
    if faults:
        raise ConsilienceError(f"checkpoints should be finite. Found NaN or infinity in {'; '.join(faults)}.")
    norms = whole.diagonal().sqrt()
    cosines = (whole / (norms[:, None] * norms)).clamp(-1, 1)
    return Diagnosis(
        tuple(read),
        tuple(tuple(row) for row in cosines.tolist()),
        tuple(layers),
        _layer("all", sum(x.size for x in layers), whole, counts),
        tuple(n for n in every if n not in shared),
    )


def _tied(e: Entries, name: str, first: str) -> bool:
    """Whether two names are one tensor; an adapter unties what it changes."""
    changed: set[str] = getattr(e, "changed", set())
    both = name in e.shapes and first in e.shapes
    return both and e.aliases.get(name, name) == e.aliases.get(first, first) and not changed & {name, first}


def _layer(name: str, size: int, gram: Tensor, counts: Tensor) -> Layer:
    against, inside, mass = counts.tolist()
    norms = tuple(gram.diagonal().sqrt().tolist())
    return Layer(name, size, norms, against / size if size else 0.0, inside / mass if mass else 0.0)


def named(experts: Any) -> dict[str, Any]:
    """Experts by name: as given, by the name of their file, or numbered.

    >>> list(named(["a/digits.safetensors", {}])), list(named({"x": {}}))
    (['digits', 'expert-1'], ['x'])
    """
    from consilience.merging._files import stem

    if isinstance(experts, Mapping) and not any(isinstance(v, Tensor) for v in experts.values()):
        found = {str(n): e for n, e in experts.items()}
    elif isinstance(experts, Mapping | str | Path) or not isinstance(experts, Sequence):
        raise ConsilienceError(
            f"experts should come in a sequence or by name. Found one {type(experts).__name__}."
        )
    else:
        names = [stem(e) if isinstance(e, str | Path) else f"expert-{i}" for i, e in enumerate(experts)]
        twice = len(set(names)) < len(names)
        names = (
            [str(e) if isinstance(e, str | Path) else n for n, e in zip(names, experts, strict=True)]
            if twice
            else names
        )
        if len(set(names)) < len(names):
            raise ConsilienceError(
                f"experts should have names of their own. Found {max(names, key=names.count)} twice."
            )
        found = dict(zip(names, experts, strict=True))
    if not found:
        raise ConsilienceError("there should be at least one expert. Found none.")
    return found


def draw(path: str | Path, charts: Sequence[tuple[str, str]]) -> Path:
    """Write titled charts of the report under one another, as one SVG file that stands on its own, in light and dark."""
    from consilience.core.params import write_bytes
    from consilience.report._style import STYLE
    from consilience.report._svg import SIZE, esc

    path = Path(path)
    if path.suffix.lower() != ".svg":
        raise ConsilienceError(f"a figure should be written to a .svg file. Found {path}.")
    body, wide, y = [], 0.0, 12.0
    for title, chart in charts:
        found = re.fullmatch(
            r'<svg viewBox="0 0 (\S+) (\S+)" role="img" aria-label="([^"]*)"[^>]*>(.*)</svg>', chart, re.S
        )
        assert found is not None, "charts come from report._svg.canvas"
        body.append(f'<text x="12" y="{y + SIZE:.0f}" class="n">{esc(title)}</text>')
        body.append(
            f'<g transform="translate(0 {y + 24:.0f})" role="img" aria-label="{found[3]}">{found[4]}</g>'
        )
        wide, y = max(wide, float(found[1])), y + 40 + float(found[2])
    style = STYLE.replace("]]>", "")
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {y:.0f}" width="{wide * 1.2:.0f}">'
        f"<style><![CDATA[{style}svg{{font-family:system-ui,sans-serif}}]]></style>"
        f'<rect width="100%" height="100%" style="fill:var(--card)"/>{"".join(body)}</svg>\n'
    )
    write_bytes(path, text.encode("utf-8", "replace"))
    return path
