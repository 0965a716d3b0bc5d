"""Which of many anchors scores best: screened in low precision with proved bounds, settled in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TOGETHER = 8
"""How many columns share a bound of their error, by Cauchy and Schwarz."""
PAIRS = 1 << 11
"""With more pairs of a place and an anchor left than that, float32 comes before float64."""
ROWS = 64
"""How many rows are made, or compared, at once; so many stay in the processor's cache."""
AT_ONCE = 1 << 6
"""How many pairs are scored at once."""

Exact = Callable[[Tensor, Tensor], Tensor]
"""(rows [P], anchors [P]) -> the scores [P] of those places by those anchors, in float64."""

Columns = Callable[[Tensor], Tensor]
"""Places [B, d] -> a [B, n] in float32, each entry to a few units of its last digit."""


class Rounded(NamedTuple):
    """Rows [m, n] in a coarse type, and the norms [m, blocks] of what was kept and of what was lost."""

    low: Tensor
    kept: Tensor
    lost: Tensor


class Pairs(NamedTuple):
    """Which anchors [P] may be best for which places [P]."""

    rows: Tensor
    anchors: Tensor


@cache
def coarse() -> torch.dtype:
    """Return bfloat16 where the processor multiplies it with float32 sums, else float32.

    With AMX or AVX-512 BF16 it is several times as fast. The answers of a screen are the same.
    """
    has = (getattr(torch.cpu, f"_is_{kind}_supported", bool) for kind in ("amx_tile", "avx512_bf16"))
    return torch.bfloat16 if any(supported() for supported in has) else torch.float32


def _norms(t: Tensor, parts: int) -> Tensor:
    """Return the norms [m, blocks] of blocks of TOGETHER columns of t [m, n], each of `parts` separately."""
    t = t.view(len(t), parts, -1)
    t = F.pad(t, (0, -t.shape[2] % TOGETHER))
    return t.square_().view(len(t), parts, TOGETHER, -1).sum(2).flatten(1).sqrt_()


def _rounded(t: Tensor, dtype: torch.dtype, parts: int) -> Rounded:
    """Round rows t [m, n] to a coarse type."""
    low = t.to(dtype)
    kept = low.to(t.dtype, copy=True)
    lost = t - kept
    return Rounded(low, _norms(kept, parts), _norms(lost, parts))


@dataclass(frozen=True, eq=False)
class Level:
    """Products a . b with b [J, n] in one type, and a bound of their error.

    With a = a^ + a', b = b^ + b', hats as rounded, |a . b - a^ . b^| <= |a'| (|b^| + |b'|) + |a^| |b'|, block
    by block; float32 sums of n products add gamma |a^| |b^|, gamma = 2 (n + 8) 2^-24, and the result is
    rounded to its type. The bound is itself a product in that type, of positive terms, so 3 % more
    are enough.
    """

    low: Tensor
    norms: Tensor
    parts: int

    @staticmethod
    def of(b: Tensor, dtype: torch.dtype, parts: int) -> Level:
        """Make the level of b [J, n] in float32."""
        # The terms of the bound, in one product with [lost, kept] of the places.
        low, kept, lost = _rounded(b, dtype, parts)
        gamma = 2 * (b.shape[1] + 8) * 2.0**-24
        return Level(low, torch.cat([kept + lost, lost + gamma * kept], 1).to(dtype), parts)

    def left(self, psi: Tensor, columns: Columns, constant: Tensor) -> Tensor:
        """Return which anchors [B, J] may have the largest a . b + constant, a the columns of psi [B, d]."""
        products, errors = self._products(psi, columns)
        rounding = 2.0**-8 if self.low.dtype == torch.bfloat16 else 2.0**-23
        slack, left = constant.abs() * 2.0**-22, torch.empty(products.shape, dtype=torch.bool)
        for i in range(0, len(psi), ROWS):
            out, error = products[i : i + ROWS].float(), errors[i : i + ROWS].float()
            error.mul_(1.03).add_(out.abs(), alpha=rounding).add_(slack)
            out += constant
            floor = (out - error).amax(1, keepdim=True)
            # Negated, so that what is not finite stays.
            left[i : i + ROWS] = (out.add_(error) < floor).logical_not_()
        return left

    def _products(self, psi: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
        """Return the products [B, J] of the places with all anchors, and bounds of their errors [B, J]."""
        dtype, weight, norms = self.low.dtype, self.low, self.norms.T
        low = torch.empty(len(psi), weight.shape[1], dtype=dtype)
        bound = torch.empty(len(psi), len(norms), dtype=dtype)
        for i in range(0, len(psi), ROWS):
            low[i : i + ROWS], kept, lost = _rounded(columns(psi[i : i + ROWS]), dtype, self.parts)
            bound[i : i + ROWS] = torch.cat([lost, kept], 1)

        # Users may let torch multiply float32 in a coarser type, which the bound does not cover.
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            low, weight, bound, norms = low.double(), weight.double(), bound.double(), norms.double()
        return low @ weight.T, bound @ norms


@dataclass(frozen=True, eq=False)
class Screen:
    """The group of argmax_j a_i . b_j + c_j over anchors b [J, n], c [J], each of a group [J] such as a task.

    The answer is exact. Anchors whose upper bound is below the best lower bound cannot be best. Rows whose
    anchors left are of one group are settled by the first level; where many are left, those rows go through
    float32; the rest is scored in float64, and ties go to the first group.
    """

    levels: tuple[Level, ...]
    constant: Tensor
    group: Tensor

    @staticmethod
    def of(
        b: Tensor, constant: Tensor, group: Tensor, parts: int = 1, dtype: torch.dtype | None = None
    ) -> Screen:
        """Make a screen of b [J, n], of `parts` kinds of columns, constants [J] and groups [J].

        `dtype` is that of the first level.
        """
        # The part that all anchors share changes no order, and without it products are smaller.
        b, first = (b - b.median(0).values).float(), dtype or coarse()
        types = (first,) if first == torch.float32 else (first, torch.float32)
        return Screen(tuple(Level.of(b, t, parts) for t in types), constant.float(), group)

    def __call__(
        self, psi: Tensor, columns: Columns, exact: Exact, scored: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the groups [B] of the best anchors of places psi [B, d], and their scores [B] in float64.

        The score is NaN where the screen settled the place, unless `scored`.
        """
        size, none = len(psi), len(self.group)
        pairs = self._screened(psi, columns, scored)
        # Where anchors of one group are left it is the answer; other rows are settled below.
        best = torch.full((size,), none).scatter_reduce(0, pairs.rows, self.group[pairs.anchors], "amin")
        if not scored:
            asked = self._open(pairs, size, False)[pairs.rows]
            pairs = Pairs(pairs.rows[asked], pairs.anchors[asked])
        score = torch.full((size,), torch.nan, dtype=torch.float64)
        if not len(pairs.rows):
            return best, score

        # Score the pairs that are left, and take the first group of the best ones.
        rows, anchors = pairs
        values = torch.cat(
            [exact(r, j) for r, j in zip(rows.split(AT_ONCE), anchors.split(AT_ONCE), strict=True)]
        )
        top = torch.full_like(score, -torch.inf).scatter_reduce(0, rows, values, "amax")
        won = values == top[rows]
        settled = torch.full_like(best, none).scatter_reduce(0, rows[won], self.group[anchors[won]], "amin")
        was_scored = torch.zeros_like(best, dtype=torch.bool).index_fill(0, rows, True)
        return torch.where(settled < none, settled, best), torch.where(was_scored, top, score)

    def _screened(self, psi: Tensor, columns: Columns, scored: bool) -> Pairs:
        """Return the pairs that all levels leave; a finer level sees only rows that are still open."""
        left = self.levels[0].left(psi, columns, self.constant)
        pairs = Pairs(*left.nonzero(as_tuple=True))
        for level in self.levels[1:]:
            is_open = self._open(pairs, len(psi), scored)
            # Settled rows keep their pairs, which a finer level need not see.
            kept = ~is_open[pairs.rows]
            if len(pairs.rows) - int(kept.sum()) <= PAIRS:
                break
            again = is_open.nonzero()[:, 0]
            where, which = level.left(psi[again], columns, self.constant).nonzero(as_tuple=True)
            pairs = Pairs(
                torch.cat([pairs.rows[kept], again[where]]), torch.cat([pairs.anchors[kept], which])
            )
        return pairs

    def _open(self, pairs: Pairs, size: int, scored: bool) -> Tensor:
        """Return which places [size] have anchors left of several groups, or (`scored`) several anchors."""
        own = (torch.arange(len(self.group)) if scored else self.group)[pairs.anchors]
        low = torch.full((size,), len(self.group)).scatter_reduce(0, pairs.rows, own, "amin")
        return low != torch.full((size,), -1).scatter_reduce(0, pairs.rows, own, "amax")
