"""Exact selection out of core: the k-th largest magnitude of every row, and which of its ties are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from consilience.core.aggregator import ScanState

Array = npt.NDArray[Any]

SAMPLE = 1 << 18
"""About how many columns the first pass reads."""
MOST = 1 << 25
"""How many candidates may be held, of all rows together."""
DIGIT = 16
"""Bits that one pass over the rows decides if the bracket missed."""


@dataclass(frozen=True)
class Selection(ScanState):
    """Which entries of each row [n] are its k largest magnitudes; of equal ones those of lowest index.

    A sample of all blocks gives two magnitudes that almost surely enclose the k-th largest. One pass counts
    the magnitudes above and keeps those between, which gives the k-th largest exactly. If it does not (the
    sample misled, or one magnitude fills the bracket), the bits of the magnitudes are found digit by digit:
    one pass per digit, and one for ties.

    `least` [m] is the k-th largest magnitude, and `below` [m] the next smaller number. Ties with it are kept
    in the blocks before offset `tie_block` [m], and the first `tie_count` [m] of them in that block.
    """

    k: int = 0
    size: int = 0
    least: tuple[float, ...] = ()
    tie_block: tuple[int, ...] = ()
    tie_count: tuple[int, ...] = ()
    below: tuple[float, ...] = ()
    step: Any = None

    @staticmethod
    def begin(rows: int, size: int, k: int, block: int) -> Selection:
        """Begin to select the `k` largest of `size` entries in each of `rows` rows."""
        if k >= size:
            # Every magnitude is above -1: nothing is trimmed.
            return Selection(True, None, k, size, (-1.0,) * rows, (0,) * rows, (0,) * rows, (-1.0,) * rows)
        # The head of every block is sampled: layers differ in scale, and blocks cover all of them.
        blocks = -(-size // block)
        columns = min(block, max(8, SAMPLE // blocks))
        return Selection(False, columns, k, size, step=Sample())

    def scan(self, rows: Tensor, offset: int) -> Selection:
        """Add a block [m, b] to the pass."""
        self.step.see(rows, offset)
        return self

    def settle(self) -> Selection:
        """Return the state at the end of a pass."""
        return self.step.end(self)  # type: ignore[no-any-return]

    def trim(self, row: Tensor, i: int, offset: int) -> Tensor:
        """Return a new block [b] of row i that begins at `offset`, with 0 for what is not kept."""
        least, last = self.least[i], self.tie_block[i]
        if offset != last:
            return torch.hardshrink(row, self.below[i] if offset < last else least)
        kept = torch.hardshrink(row, least)
        ties = (row.abs() == least).nonzero()[: self.tie_count[i], 0]
        kept[ties] = row[ties]
        return kept


def _below(value: float, wide: bool) -> float:
    """Return the next smaller number; a negative one for 0, so that |0| is above it."""
    dtype = np.float64 if wide else np.float32
    return float(np.nextafter(dtype(value), dtype(-1))) if value > 0 else -1.0


class Sample:
    """First pass: magnitudes [m][s] of the heads of all blocks give a bracket for the k-th largest."""

    def __init__(self) -> None:
        self.seen: list[Array] = []

    def see(self, rows: Tensor, offset: int) -> None:
        self.seen.append(np.abs(_array(rows)))

    def end(self, state: Selection) -> Selection:
        sample = np.concatenate(self.seen, 1)
        (rows, drawn), share = sample.shape, state.k / state.size

        # Four standard deviations of the rank in the sample, and one for rounding.
        slack = 4 * (share * (1 - share) * drawn) ** 0.5 + 1
        high, low = int(share * drawn - slack), int(share * drawn + slack) + 1
        upper = [_largest(row, high) if high >= 1 else float("inf") for row in sample]
        lower = [_largest(row, low) if low <= drawn else 0.0 for row in sample]
        expected = int(4 * rows * state.size * min(1.0, (low - high) / drawn)) + (1 << 16)
        return replace(state, columns=None, step=Bracket(lower, upper, min(MOST, expected)))


class Bracket:
    """Second pass: count magnitudes above `upper` [m], and hold those down to `lower` [m], up to `most`."""

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

        # Buffers for all rows: allocating them per row would cost as much as the comparisons.
        size, over, between = np.empty_like(arrays[0]), *(np.empty(arrays.shape[1], bool) for _ in "ab")
        for i, row in enumerate(arrays):
            np.abs(row, out=size)
            self.above[i] += int(np.count_nonzero(np.greater(size, self.upper[i], out=over)))
            if self.left >= 0:
                np.logical_xor(np.greater_equal(size, self.lower[i], out=between), over, out=between)
                self.found[i].append(size[between])
                self.counts[i].append(len(self.found[i][-1]))
                self.left -= self.counts[i][-1]
                # Many small arrays cost more memory than their numbers.
                if len(self.found[i]) == 256:
                    self.found[i] = [np.concatenate(self.found[i])]

    def end(self, state: Selection) -> Selection:
        ranks = [state.k - above for above in self.above]
        counts = [np.cumsum(count) for count in self.counts]
        if self.left < 0 or any(not 1 <= r <= c[-1] for r, c in zip(ranks, counts, strict=True)):
            return replace(state, step=Digits.begin(len(ranks), state.k, self.wide))

        least, blocks, kept = [], [], []
        for rank, parts, count in zip(ranks, self.found, counts, strict=True):
            own = np.concatenate(parts)
            sought = _largest(own, rank)
            ties = rank - int(np.count_nonzero(own > sought))

            # `count` tells in which block the last kept tie lies, since candidates are held in order.
            block = int(np.searchsorted(count, np.flatnonzero(own == sought)[ties - 1], side="right"))
            before = own[: count[block - 1] if block else 0]
            least.append(sought)
            blocks.append(self.offsets[block])
            kept.append(ties - int(np.count_nonzero(before == sought)))
        below = tuple(_below(value, self.wide) for value in least)
        return Selection(True, None, state.k, state.size, tuple(least), tuple(blocks), tuple(kept), below)


class Digits:
    """Further passes: digits of 16 bits of the k-th largest magnitude, then the place of the last kept tie.

    The bits of magnitudes, read as integers, have the magnitudes' order. `prefix` [m] holds the bits found so
    far, and `rank` [m] which of the magnitudes with this prefix is sought (1 is the largest).
    """

    def __init__(self, shift: int, prefix: list[int], rank: list[int], wide: bool) -> None:
        self.shift, self.prefix, self.rank, self.wide = shift, prefix, rank, wide
        self.histogram = np.zeros((len(prefix), 1 << DIGIT), np.int64)
        self.tie_block = [-1] * len(prefix)

    @staticmethod
    def begin(rows: int, k: int, wide: bool) -> Digits:
        return Digits((64 if wide else 32) - DIGIT, [0] * rows, [k] * rows, wide)

    def see(self, rows: Tensor, offset: int) -> None:
        arrays = _array(rows)
        for i, row in enumerate(arrays):
            bits = np.abs(row).view(np.int64 if self.wide else np.int32)

            # All digits are found: the last pass counts ties until `rank` of them are passed.
            if self.shift < 0:
                ties = int(np.count_nonzero(bits == self.prefix[i])) if self.tie_block[i] < 0 else 0
                if self.tie_block[i] < 0 and ties >= self.rank[i]:
                    self.tie_block[i] = offset
                elif self.tie_block[i] < 0:
                    self.rank[i] -= ties
                continue

            digits = bits >> self.shift
            if self.shift + DIGIT < (64 if self.wide else 32):
                digits = digits[digits >> DIGIT == self.prefix[i]] & ((1 << DIGIT) - 1)
            self.histogram[i] += np.bincount(digits, minlength=1 << DIGIT)

    def end(self, state: Selection) -> Selection:
        if self.shift < 0:
            integers, floats = (np.int64, np.float64) if self.wide else (np.int32, np.float32)
            least = tuple(np.array(self.prefix, integers).view(floats).tolist())
            below = tuple(_below(value, self.wide) for value in least)
            places, counts = tuple(self.tie_block), tuple(self.rank)
            return Selection(True, None, state.k, state.size, least, places, counts, below)

        prefix, ranks = [], []
        for histogram, found, rank in zip(self.histogram, self.prefix, self.rank, strict=True):
            # From the largest digit down: `rank` counts from the largest magnitude.
            sums = np.cumsum(histogram[::-1])
            place = int(np.searchsorted(sums, rank))
            prefix.append(found << DIGIT | ((1 << DIGIT) - 1 - place))
            ranks.append(rank - (int(sums[place - 1]) if place else 0))
        return replace(state, step=Digits(self.shift - DIGIT, prefix, ranks, self.wide))


def _array(rows: Tensor) -> Array:
    """Return rows as an array, whose comparisons are faster than a tensor's."""
    return rows.detach().cpu().numpy()


def _largest(values: Array, k: int) -> float:
    """Return the k-th largest value."""
    return float(np.partition(values, len(values) - k)[len(values) - k])
