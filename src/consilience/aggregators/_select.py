"""Exact selection out of core: the k-th largest magnitude of every row, and which of its ties are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from consilience.core.aggregator import Known

Array = npt.NDArray[Any]

SAMPLE = 1 << 18
"""About how many columns the first pass looks at."""
MOST = 1 << 25
"""How many candidates may be held, of all rows together."""
DIGIT = 16
"""Bits that one pass over the rows settles where the bracket was missed."""


@dataclass(frozen=True)
class Selection(Known):
    """Which entries of each row [n] are its k largest magnitudes; of equal ones those of lowest index.

    A sample of all blocks gives two magnitudes between which the k-th largest almost surely lies; one pass counts what is above and
    keeps what is between, which settles it exactly. Where it does not (the sample misled, or one magnitude fills the bracket) the bits
    of the magnitudes are settled digit by digit, in as many passes as there are digits, and one for ties.

    `least` [m] is the magnitude sought (`below` the next smaller number), `ends` the offset of the block, for each row, in which ties cease to be kept, and `rank` how many of
    that block are.
    """

    k: int = 0
    size: int = 0
    least: tuple[float, ...] = ()
    ends: tuple[int, ...] = ()
    rank: tuple[int, ...] = ()
    below: tuple[float, ...] = ()
    step: Any = None

    @staticmethod
    def begin(rows: int, size: int, k: int, block: int) -> Selection:
        """Of `rows` rows of `size` entries, the `k` largest are sought."""
        if k >= size:
            return Selection(True, None, k, size, (-1.0,) * rows, (0,) * rows, (0,) * rows, (-1.0,) * rows)
        blocks = -(-size // block)
        columns = min(block, max(8, SAMPLE // blocks))
        return Selection(False, columns, k, size, step=Sample())

    def scan(self, rows: Tensor, offset: int) -> Selection:
        """Fold a block [m, b] into the pass."""
        self.step.see(rows, offset)
        return self

    def settle(self) -> Selection:
        """What is known at the end of a pass."""
        return self.step.end(self)  # type: ignore[no-any-return]

    def trim(self, row: Tensor, i: int, offset: int) -> Tensor:
        """Row i's block [b] that begins at `offset`, with 0 for what is not kept; made anew."""
        least, end = self.least[i], self.ends[i]
        if offset != end:
            return torch.hardshrink(row, self.below[i] if offset < end else least)
        kept = torch.hardshrink(row, least)
        ties = (row.abs() == least).nonzero()[: self.rank[i], 0]
        kept[ties] = row[ties]
        return kept


def _below(x: float, wide: bool) -> float:
    """The next smaller number; below 0 for 0, so that |0| is above it."""
    kind = np.float64 if wide else np.float32
    return float(np.nextafter(kind(x), kind(-1))) if x > 0 else -1.0


class Sample:
    """Magnitudes [m][s] of the heads of all blocks; a bracket for the k-th largest."""

    def __init__(self) -> None:
        self.seen: list[Array] = []

    def see(self, rows: Tensor, offset: int) -> None:
        self.seen.append(np.abs(_array(rows)))

    def end(self, now: Selection) -> Selection:
        sample = np.concatenate(self.seen, 1)
        (m, s), share = sample.shape, now.k / now.size
        slack = 4 * (share * (1 - share) * s) ** 0.5 + 1
        high, low = int(share * s - slack), int(share * s + slack) + 1
        upper = [_largest(r, high) if high >= 1 else float("inf") for r in sample]
        lower = [_largest(r, low) if low <= s else 0.0 for r in sample]
        most = min(MOST, int(4 * m * now.size * min(1.0, (low - high) / s)) + (1 << 16))
        return replace(now, columns=None, step=Bracket(lower, upper, most))


class Bracket:
    """How many magnitudes are above `upper` [m], and all that are between `lower` and it, as long as these are not more than `most`."""

    def __init__(self, lower: list[float], upper: list[float], most: int) -> None:
        self.lower, self.upper, self.left = lower, upper, most
        self.above = [0] * len(lower)
        self.found: list[list[Array]] = [[] for _ in lower]
        self.counts: list[list[int]] = [[] for _ in lower]
        self.offsets: list[int] = []
        self.wide = False

    def see(self, rows: Tensor, offset: int) -> None:
        arrays = _array(rows)
        self.wide = arrays.dtype == np.float64
        self.offsets.append(offset)
        size, over, between = np.empty_like(arrays[0]), *(np.empty(arrays.shape[1], bool) for _ in "ab")
        for i, row in enumerate(arrays):
            np.abs(row, out=size)
            self.above[i] += int(np.count_nonzero(np.greater(size, self.upper[i], out=over)))
            if self.left >= 0:
                np.logical_xor(np.greater_equal(size, self.lower[i], out=between), over, out=between)
                self.found[i].append(size[between])
                self.counts[i].append(len(self.found[i][-1]))
                self.left -= self.counts[i][-1]
                if len(self.found[i]) == 256:
                    self.found[i] = [np.concatenate(self.found[i])]

    def end(self, now: Selection) -> Selection:
        rest = [now.k - above for above in self.above]
        counts = [np.cumsum(c) for c in self.counts]
        if self.left < 0 or any(not 1 <= r <= c[-1] for r, c in zip(rest, counts, strict=True)):
            return replace(now, step=Digits.begin(len(rest), now.k, self.wide))
        least, ends, ranks = [], [], []
        for wanted, parts, count in zip(rest, self.found, counts, strict=True):
            own = np.concatenate(parts)
            t = _largest(own, wanted)
            rank = wanted - int(np.count_nonzero(own > t))
            block = int(np.searchsorted(count, np.flatnonzero(own == t)[rank - 1], side="right"))
            before = own[: count[block - 1] if block else 0]
            least.append(t)
            ends.append(self.offsets[block])
            ranks.append(rank - int(np.count_nonzero(before == t)))
        below = tuple(_below(t, self.wide) for t in least)
        return Selection(True, None, now.k, now.size, tuple(least), tuple(ends), tuple(ranks), below)


class Digits:
    """The bits of the magnitudes, which as integers have their order: digits of 16 bits from the leading one, then the place of the last tie.

    `prefix` [m] holds the bits settled so far, `rank` [m] says which of the magnitudes with this prefix is sought (1 is the largest).
    """

    def __init__(self, shift: int, prefix: list[int], rank: list[int], wide: bool) -> None:
        self.shift, self.prefix, self.rank, self.wide = shift, prefix, rank, wide
        self.histogram = np.zeros((len(prefix), 1 << DIGIT), np.int64)
        self.ends = [-1] * len(prefix)

    @staticmethod
    def begin(m: int, k: int, wide: bool) -> Digits:
        return Digits((64 if wide else 32) - DIGIT, [0] * m, [k] * m, wide)

    def see(self, rows: Tensor, offset: int) -> None:
        arrays = _array(rows)
        for i, row in enumerate(arrays):
            bits = np.abs(row).view(np.int64 if self.wide else np.int32)
            if self.shift < 0:
                ties = int(np.count_nonzero(bits == self.prefix[i])) if self.ends[i] < 0 else 0
                if self.ends[i] < 0 and ties >= self.rank[i]:
                    self.ends[i] = offset
                elif self.ends[i] < 0:
                    self.rank[i] -= ties
                continue
            digits = bits >> self.shift
            if self.shift + DIGIT < (64 if self.wide else 32):
                digits = digits[digits >> DIGIT == self.prefix[i]] & ((1 << DIGIT) - 1)
            self.histogram[i] += np.bincount(digits, minlength=1 << DIGIT)

    def end(self, now: Selection) -> Selection:
        if self.shift < 0:
            least = np.array(self.prefix, np.int64 if self.wide else np.int32).view(
                np.float64 if self.wide else np.float32
            )
            found, below = tuple(least.tolist()), tuple(_below(t, self.wide) for t in least.tolist())
            return Selection(True, None, now.k, now.size, found, tuple(self.ends), tuple(self.rank), below)
        prefix, rank = [], []
        for counts, before, r in zip(self.histogram, self.prefix, self.rank, strict=True):
            sums = np.cumsum(counts[::-1])
            place = int(np.searchsorted(sums, r))
            prefix.append(before << DIGIT | ((1 << DIGIT) - 1 - place))
            rank.append(r - (int(sums[place - 1]) if place else 0))
        return replace(now, step=Digits(self.shift - DIGIT, prefix, rank, self.wide))


def _array(rows: Tensor) -> Array:
    """Rows as an array, whose comparisons are ten times as quick as a tensor's."""
    return rows.detach().cpu().numpy()


def _largest(values: Array, k: int) -> float:
    """The k-th largest."""
    return float(np.partition(values, len(values) - k)[len(values) - k])
