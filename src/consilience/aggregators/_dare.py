"""Drop and rescale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Blockwise, ScanState, weighted, widened
from consilience.core.errors import ConsilienceError, Refusal, kind_of


@dataclass(frozen=True)
class Masks(ScanState):
    """The seed of all masks, and the state of the aggregator that combines the dropped rows."""

    seed: int = 0
    inner: Any = None


@dataclass(frozen=True)
class Dare(Blockwise):
    """DARE: sum_i w_i b_i * tau_i / density, b_i ~ Bernoulli(density) per entry (drop rate 1 - density).

    Rows [m, n], weights [m] (any sign, if `then` takes negative ones) -> [n]. `then` combines the dropped and
    rescaled rows in the place of the weighted sum: `ties(1.0)` gives DARE-TIES. Equal rows get different
    masks: the contract holds in expectation. An entry is kept where a hash of (a seed drawn once from the
    generator, the rank of its row in the canonical order, its column) is below density. So masks need no
    memory, and are the same for any order of rows and any size of blocks, on every device. Raises
    ConsilienceError for a density outside (0, 1] or without a generator; Refusal for a `then` that does not
    work block by block. Yu et al. 2024, arXiv:2311.03099.

    >>> Dare(0.5)(torch.ones(1, 6), generator=torch.Generator().manual_seed(0)).tolist()
    [0.0, 0.0, 2.0, 2.0, 2.0, 0.0]
    """

    density: float = 0.1
    then: Aggregator | None = None

    expectation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConsilienceError(f"`density` must be in (0, 1], got {self.density}.")
        if self.then is None:
            return
        if not isinstance(self.then, Blockwise):
            got = type(self.then).__name__ if isinstance(self.then, Aggregator) else kind_of(self.then)
            raise Refusal(
                f"`then` must be an aggregator that works block by block, such as ties(1.0), got {got}."
            )
        # What the rows may be is decided by the aggregator that combines them in the end.
        object.__setattr__(self, "takes_negative_weights", self.then.takes_negative_weights)
        object.__setattr__(self, "takes_entry_weights", self.then.takes_entry_weights)
        object.__setattr__(self, "fewest_rows", self.then.fewest_rows)
        object.__setattr__(self, "most_rows", self.then.most_rows)

    def init(self, rows: int, size: int, generator: torch.Generator | None) -> Masks:
        # A default seed would silently give every merge the same masks.
        if generator is None:
            raise ConsilienceError(
                "DARE drops entries at random and needs a `generator`, got None; give a torch.Generator."
            )
        seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        if isinstance(self.then, Blockwise):
            return _masks(seed, self.then.init(rows, size, generator))
        return _masks(seed, ScanState())

    def scan(self, rows: Tensor, offset: int, statistics: Any) -> Masks:
        assert isinstance(self.then, Blockwise)
        dropped = self._dropped(rows, offset, statistics.seed)
        return _masks(statistics.seed, self.then.scan(dropped, offset, statistics.inner))

    def settle(self, statistics: Any) -> Masks:
        assert isinstance(self.then, Blockwise)
        return _masks(statistics.seed, self.then.settle(statistics.inner))

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        if isinstance(self.then, Blockwise):
            dropped = self._dropped(rows, offset, statistics.seed)
            return self.then.apply(dropped, weights, offset, statistics.inner).to(rows.dtype)

        wide = widened(rows)
        if self.density == 1:
            return weighted(wide, weights.to(wide.dtype)).to(rows.dtype)
        # Dropping, rescaling and weighting in one pass: no dropped row is ever stored.
        total = torch.zeros_like(wide[0])
        for kept, weight in zip(self._kept(wide, offset, statistics.seed), weights.tolist(), strict=True):
            total += kept.mul_(weight / self.density)
        return total.to(rows.dtype)

    def _dropped(self, rows: Tensor, offset: int, seed: int) -> Tensor:
        """Drop entries of rows [m, b], and rescale the others; in float32 or float64."""
        wide = widened(rows)
        if self.density == 1:
            return wide
        made = torch.empty_like(wide)
        for kept, new in zip(self._kept(wide, offset, seed), made, strict=True):
            torch.div(kept, self.density, out=new)
        return made

    def _kept(self, wide: Tensor, offset: int, seed: int) -> Iterator[Tensor]:
        """Yield each row with 0 for dropped entries. Rows share one buffer."""
        integers = torch.int64 if wide.dtype == torch.float64 else torch.int32
        least = min(round(self.density * 2**31), 2**31 - 1)
        draws = uniform(seed, len(wide), offset, wide.shape[1], wide.device)
        for row, bits in zip(wide.view(integers), draws, strict=True):
            # All ones where the entry is kept: masks of booleans take five times as long.
            bits -= least
            bits >>= 31
            yield bits.to(integers).bitwise_and_(row).view(wide.dtype)


def _masks(seed: int, inner: Any) -> Masks:
    return Masks(inner.done, inner.columns, seed, inner)


def uniform(seed: int, rows: int, offset: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield per row an int32 [size] in [0, 2^31): a hash of seed, row and columns from `offset` on.

    The finaliser of MurmurHash3 makes a number of each column, for all rows; each row has an odd factor for
    it, and half a finaliser of its own. Rows share one buffer.
    """
    place = torch.arange(offset, offset + size, device=device)
    column = place.int()
    if (offset + size) >> 32:
        # Columns beyond 2^32 must not repeat the hashes of the first ones.
        column += (place >> 32).int() * -1640531527
    column ^= _key(seed, 0)

    part, bits = torch.empty_like(column), torch.empty_like(column)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        _stir(column, part, shift).mul_(factor - (factor >> 31 << 32))
    # Odd factors are invertible modulo 2^32: no two columns of a row get one product.
    for i in range(rows):
        torch.mul(column, _key(seed, i + 1) | 1, out=bits)
        yield _stir(bits, part, 16).mul_(0x85EBCA6B - 2**32).bitwise_and_(0x7FFFFFFF)


def _stir(bits: Tensor, part: Tensor, shift: int) -> Tensor:
    """Compute bits ^= bits >> shift in place, with zeros shifted in; `part` is a buffer."""
    torch.bitwise_right_shift(bits, shift, out=part)
    bits ^= part.bitwise_and_((1 << 32 - shift) - 1)
    return bits


def _key(seed: int, i: int) -> int:
    """Return the i-th number of SplitMix64 from a seed, its upper half as an int32."""
    bits = (seed + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return ((bits ^ bits >> 31) >> 32) - 2**31
