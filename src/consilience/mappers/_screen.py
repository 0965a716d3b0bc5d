"""Which of many anchors scores best: screened in low precision with proved bounds, settled in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TOGETHER = 8
"""How many columns share a bound of their error, by Cauchy and Schwarz."""
PAIRS = 1 << 11
"""More pairs of a place and an anchor than that go through float32 before they are scored in float64."""
ROWS = 64
"""Rows that are made, or compared, at once: so many stay near the processor."""
AT_ONCE = 1 << 6
"""Pairs that are scored at once."""

Exact = Callable[[Tensor, Tensor], Tensor]
"""(rows [P], anchors [P]) -> the scores [P] of those places by those anchors, in float64."""

Columns = Callable[[Tensor], Tensor]
"""Places [B, d] -> a [B, n] in float32, each entry to a few units of its last digit."""


@cache
def coarse() -> torch.dtype:
    """bfloat16 where the processor has products of it with float32 sums (AMX, AVX-512 BF16: five times as quick), else float32.
    What is found is the same."""
    has = (getattr(torch.cpu, f"_is_{kind}_supported", bool) for kind in ("amx_tile", "avx512_bf16"))
    return torch.bfloat16 if any(h() for h in has) else torch.float32


def _norms(t: Tensor, parts: int) -> Tensor:
    """The norms [m, blocks] of blocks of TOGETHER columns of t [m, n], of each of its `parts` apart."""
    t = t.view(len(t), parts, -1)
    t = F.pad(t, (0, -t.shape[2] % TOGETHER))
    return t.square_().view(len(t), parts, TOGETHER, -1).sum(2).flatten(1).sqrt_()


def _cut(t: Tensor, dtype: torch.dtype, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows t [m, n] in a coarse type, and the norms of their blocks as they are now and of what was lost."""
    low = t.to(dtype)
    kept = low.to(t.dtype, copy=True)
    lost = t - kept
    return low, _norms(kept, parts), _norms(lost, parts)


@dataclass(frozen=True, eq=False)
class Level:
    """Products a . b with b [J, n] in one type, and a bound of their error.

    With a = a^ + a', b = b^ + b', hats as rounded, |a . b - a^ . b^| <= |a'| (|b^| + |b'|) + |a^| |b'|, block by block; float32
    sums of n products add gamma |a^| |b^|, gamma = 2 (n + 8) 2^-24, and what comes out is rounded to its type. The bound is
    itself a product in that type, of positive terms, so that 3% more are enough.
    """

    low: Tensor
    norms: Tensor
    parts: int

    @staticmethod
    def of(b: Tensor, dtype: torch.dtype, parts: int) -> Level:
        """From b [J, n] in float32."""
        low, kept, lost = _cut(b, dtype, parts)
        gamma = 2 * (b.shape[1] + 8) * 2.0**-24
        return Level(low, torch.cat([kept + lost, lost + gamma * kept], 1).to(dtype), parts)

    def left(self, psi: Tensor, columns: Columns, constant: Tensor) -> Tensor:
        """Which anchors [B, J] may score best, a . b + constant, for places psi [B, d] with `columns` a."""
        dtype, norms = self.low.dtype, self.norms.T
        low, bound = (
            torch.empty(len(psi), self.low.shape[1], dtype=dtype),
            torch.empty(len(psi), len(norms), dtype=dtype),
        )
        for i in range(0, len(psi), ROWS):
            low[i : i + ROWS], kept, lost = _cut(columns(psi[i : i + ROWS]), dtype, self.parts)
            bound[i : i + ROWS] = torch.cat([lost, kept], 1)
        weight = self.low
        if (
            dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        ):  # float32 that is not
            low, weight, bound, norms = low.double(), weight.double(), bound.double(), norms.double()
        products, errors = low @ weight.T, bound @ norms
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
        slack, left = constant.abs() * 2.0**-22, torch.empty(products.shape, dtype=torch.bool)
        for i in range(0, len(psi), ROWS):
            out, error = products[i : i + ROWS].float(), errors[i : i + ROWS].float()
            error.mul_(1.03).add_(out.abs(), alpha=rounding).add_(slack)
            out += constant
            floor = (out - error).amax(1, keepdim=True)
            left[i : i + ROWS] = (out.add_(error) < floor).logical_not_()  # what is not finite stays
        return left


@dataclass(frozen=True, eq=False)
class Screen:
    """argmax_j a_i . b_j + c_j over anchors b [J, n], c [J], each of a group [J] (a task): the group of the best, exactly.

    Anchors whose upper bound is below the best lower bound cannot be best. Rows whose anchors left are of one group are settled
    by the first level; where many are left, those rows go through float32; what is then left is scored in float64, and ties go
    to the first group.
    """

    levels: tuple[Level, ...]
    constant: Tensor
    group: Tensor

    @staticmethod
    def of(
        b: Tensor, constant: Tensor, group: Tensor, parts: int = 1, dtype: torch.dtype | None = None
    ) -> Screen:
        """From b [J, n], of `parts` kinds of columns, constants [J] and groups [J]; `dtype` is that of the first level.

        What all anchors have in common, about their median, is left out of b: it changes no order."""
        b, first = (b - b.median(0).values).float(), dtype or coarse()
        types = (first,) if first == torch.float32 else (first, torch.float32)
        return Screen(tuple(Level.of(b, t, parts) for t in types), constant.float(), group)

    def __call__(
        self, psi: Tensor, columns: Columns, exact: Exact, scored: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The groups [B] of the best anchors of places psi [B, d], and their scores [B] in float64 (NaN for what the screen
        settled, unless `scored`)."""
        size, none = len(psi), len(self.group)
        rows, anchors = self.levels[0].left(psi, columns, self.constant).nonzero(as_tuple=True)
        for level in self.levels[1:]:
            open_ = self._open(rows, anchors, size, scored)
            kept = ~open_[rows]
            if len(rows) - int(kept.sum()) <= PAIRS:
                break
            again = open_.nonzero()[:, 0]
            where, which = level.left(psi[again], columns, self.constant).nonzero(as_tuple=True)
            rows, anchors = torch.cat([rows[kept], again[where]]), torch.cat([anchors[kept], which])
        best = torch.full((size,), none).scatter_reduce(0, rows, self.group[anchors], "amin")
        if not scored:
            ask = self._open(rows, anchors, size, False)[rows]
            rows, anchors = rows[ask], anchors[ask]
        score = torch.full((size,), torch.nan, dtype=torch.float64)
        if not len(rows):
            return best, score
        values = torch.cat(
            [exact(r, j) for r, j in zip(rows.split(AT_ONCE), anchors.split(AT_ONCE), strict=True)]
        )
        top = torch.full_like(score, -torch.inf).scatter_reduce(0, rows, values, "amax")
        won = values == top[rows]
        settled = torch.full_like(best, none).scatter_reduce(0, rows[won], self.group[anchors[won]], "amin")
        asked = torch.zeros_like(best, dtype=torch.bool).index_fill(0, rows, True)
        return torch.where(settled < none, settled, best), torch.where(asked, top, score)

    def _open(self, rows: Tensor, anchors: Tensor, size: int, scored: bool) -> Tensor:
        """Which places [size] have anchors left of more than one group, or more than one anchor where scores are asked."""
        own = (torch.arange(len(self.group)) if scored else self.group)[anchors]
        low = torch.full((size,), len(self.group)).scatter_reduce(0, rows, own, "amin")
        return low != torch.full((size,), -1).scatter_reduce(0, rows, own, "amax")
