"""Task vectors without their largest and smallest entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.aggregators._select import Selection
from consilience.core.aggregator import Blockwise, ScanState, weighted, widened
from consilience.core.errors import ConsilienceError
from consilience.core.shares import exact_share


@dataclass(frozen=True)
class Between(ScanState):
    """Two selections: the outliers with the entries to keep, and the outliers alone (if there are any)."""

    parts: tuple[Selection, ...] = ()

    @staticmethod
    def of(parts: Iterable[Selection]) -> Between:
        """Join selections; the next pass reads as many columns as the one that needs most."""
        parts = tuple(parts)
        asked = [part.columns for part in parts if not part.done]
        # None asks for all columns, so that one such selection decides for both.
        columns = None if None in asked else max((count for count in asked if count), default=None)
        return Between(not asked, columns, parts)

    def each(self, move: Callable[[Selection], Selection]) -> Between:
        """Move every unfinished selection on."""
        return Between.of(part if part.done else move(part) for part in self.parts)


@dataclass(frozen=True)
class Breadcrumbs(Blockwise):
    """Model breadcrumbs: sum_i w_i kept_i, with only the magnitudes of middle rank kept in each row.

    Of each row's magnitudes over the whole vector the floor(gamma n) largest (outliers) are dropped, the next
    ceil(density n) are kept, and all others are dropped. Of equal magnitudes, that of lowest index counts as
    the larger.

    Rows [m, n], weights [m] (any sign) -> [n]. Its one-row transform is that mask. Exact and out of core. The
    paper treats each layer by itself. Raises ConsilienceError for a density outside (0, 1] and a gamma
    outside [0, 1 - density]. Davari and Belilovsky 2024, arXiv:2312.06795.

    >>> Breadcrumbs(0.5, 0.25)(torch.tensor([[9.0, 0.1, -2.0, 1.0]])).tolist()
    [0.0, 0.0, -2.0, 1.0]
    """

    density: float = 0.15
    gamma: float = 0.006

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConsilienceError(f"`density` must be in (0, 1], got {self.density}.")
        if not 0 <= self.gamma <= 1 or exact_share(self.gamma, 1) + exact_share(self.density, 1) > 1:
            raise ConsilienceError(f"`gamma` must be in [0, 1 - density], got {self.gamma}.")

    def init(self, rows: int, size: int, generator: torch.Generator | None) -> Between:
        top = math.floor(exact_share(self.gamma, size))
        kept = min(size, top + math.ceil(exact_share(self.density, size)))
        ranks = (kept, top) if top else (kept,)
        return Between.of(Selection.begin(rows, size, rank, self.block) for rank in ranks)

    def scan(self, rows: Tensor, offset: int, statistics: Any) -> Between:
        wide = widened(rows)

        def read(part: Selection) -> Selection:
            # One selection may want fewer columns than the other, for which the block was read.
            return part.scan(wide[:, : part.columns], offset)

        return statistics.each(read)  # type: ignore[no-any-return]

    def settle(self, statistics: Any) -> Between:
        return statistics.each(Selection.settle)  # type: ignore[no-any-return]

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        wide = widened(rows)
        made = torch.empty_like(wide)
        for i, row in enumerate(wide):
            made[i] = statistics.parts[0].trim(row, i, offset)
            # Subtracting an outlier from itself leaves an exact 0.
            for outliers in statistics.parts[1:]:
                made[i] -= outliers.trim(row, i, offset)
        return weighted(made, weights.to(wide.dtype)).to(rows.dtype)
