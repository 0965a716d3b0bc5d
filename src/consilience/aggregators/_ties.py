"""Trim, elect signs, merge."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Blockwise
from consilience.core.errors import ConsilienceError

DIGIT = 16
"""Bits that one pass over the rows settles."""


@dataclass(frozen=True)
class Threshold:
    """What the passes know of each row's smallest kept magnitude, as an integer: its leading bits, then its ties.

    `prefix` [m] holds the bits settled so far, `rank` [m] says which of the magnitudes with this prefix is the one sought
    (1 is the largest), `histogram` [m, 2^16] counts the next digit in this pass, `last` [m] is the index of the last tie
    that is kept. `shift` is the place of the next digit; below 0 the pass looks for `last`.
    """

    shift: int
    prefix: Tensor
    rank: Tensor
    histogram: Tensor
    last: Tensor
    done: bool = False


@dataclass(frozen=True)
class Ties(Blockwise):
    """TIES: trim each row to its ceil(density n) largest magnitudes over the whole vector (of equal ones, those of lowest index);
    elect s = sign(sum_i w_i trimmed_i); merge (sum_i w_i) sum_A w_i trimmed_i / sum_A w_i over the rows A whose sign is s.

    Rows [m, n], weights [m] >= 0 -> [n]. Where no sign wins the result is 0. At weights 1/m it is the mean over those that
    agree; the paper's lambda is `arithmetic`'s coefficient. Its one-row transform is the trim. Exact and out of core.
    Raises ConsilienceError for a density outside (0, 1]. Yadav et al. 2023, arXiv:2306.01708.

    >>> Ties(0.5)(torch.tensor([[4.0, 1.0, -3.0, 0.5], [2.0, 1.0, 6.0, 0.5]])).tolist()
    [3.0, 0.0, 6.0, 0.0]
    """

    density: float = 0.2

    takes_negative_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConsilienceError(f"`density` should be in (0, 1]. Found `density = {self.density}`.")

    def kept(self, size: int) -> int:
        """How many of `size` entries a row keeps: ceil(density * size)."""
        return min(size, math.ceil(self.density * size))

    def scan(self, rows: Tensor, offset: int, size: int, previous: Threshold | None) -> Threshold:
        m, k = len(rows), self.kept(size)
        bits = _magnitudes(rows)
        if previous is None:
            zero = torch.zeros(m, dtype=torch.int64, device=rows.device)
            histogram = zero[:, None].expand(m, 1 << DIGIT)
            previous = Threshold(bits.element_size() * 8 - DIGIT, zero, zero + k, histogram, zero + size, done=k == size)
        if previous.done:
            return previous
        end = offset + rows.shape[1] >= size
        if previous.shift >= 0:
            now = replace(previous, histogram=previous.histogram + _count(bits, previous))
            return _settle(now, size) if end else now
        last, rank = previous.last.clone(), previous.rank.clone()
        for i in (rank > 0).nonzero().flatten().tolist():
            ties = (bits[i] == previous.prefix[i]).nonzero().flatten()
            wanted = int(rank[i])
            if wanted <= len(ties):
                last[i] = offset + ties[wanted - 1]
            rank[i] = max(0, wanted - len(ties))
        return replace(previous, last=last, rank=rank, done=end)

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        x, bits = _floats(rows), _magnitudes(rows)
        w = weights.to(x.dtype)
        parts, total = [], torch.zeros_like(x[0])
        for row, magnitude, least, last, weight in zip(x, bits, statistics.prefix, statistics.last.tolist(), w, strict=True):
            ties = min(max(last + 1 - offset, 0), len(row))  # how many entries of this block keep their ties
            keep = torch.cat([magnitude[:ties] >= least, magnitude[ties:] > least])
            parts.append(torch.where(keep, row, 0.0) * weight)
            total += parts[-1]
        sign = total.sign()
        merged, agreed, every = torch.zeros_like(total), torch.zeros_like(total), torch.zeros_like(w[0])
        for part, weight in zip(parts, w, strict=True):
            with_it = (part * sign).clamp_(min=0)
            merged += with_it
            agreed += (with_it > 0) * weight
            every += weight
        return torch.where(sign != 0, sign * merged * (every / agreed), 0.0).to(rows.dtype)


def _floats(rows: Tensor) -> Tensor:
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def _magnitudes(rows: Tensor) -> Tensor:
    """|x| as integers, which have the order of the magnitudes."""
    x = _floats(rows)
    wide = x.dtype == torch.float64
    return x.view(torch.int64 if wide else torch.int32) & (0x7FFFFFFFFFFFFFFF if wide else 0x7FFFFFFF)


def _count(bits: Tensor, threshold: Threshold) -> Tensor:
    """The next digit's histogram [m, 2^16] over the magnitudes with the settled prefix."""
    counts = []
    for row, prefix in zip(bits, threshold.prefix.to(bits.dtype), strict=True):
        digits = row >> threshold.shift
        if threshold.shift + DIGIT < bits.element_size() * 8:
            digits = digits[digits >> DIGIT == prefix] & ((1 << DIGIT) - 1)
        counts.append(torch.bincount(digits.int(), minlength=1 << DIGIT))
    return torch.stack(counts)


def _settle(now: Threshold, size: int) -> Threshold:
    """The threshold after a pass: one more digit; done when it has all digits and no ties to choose from."""
    from_top = now.histogram.flip(1)
    sums = from_top.cumsum(1)
    place = (sums < now.rank[:, None]).sum(1, keepdim=True)
    count = from_top.gather(1, place).flatten()
    rank = now.rank - (sums.gather(1, place).flatten() - count)
    prefix = now.prefix << DIGIT | ((1 << DIGIT) - 1 - place.flatten())
    shift = now.shift - DIGIT
    if shift >= 0:
        return Threshold(shift, prefix, rank, torch.zeros_like(now.histogram), now.last)
    rank = torch.where(rank < count, rank, 0)  # rows that keep all their ties need no further pass
    return Threshold(shift, prefix, rank, now.histogram[:, :0], now.last, done=not bool(rank.any()))
