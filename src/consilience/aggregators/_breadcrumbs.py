"""Task vectors without their largest and smallest entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.aggregators._select import Selection
from consilience.core.aggregator import Blockwise, Known, weighted
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class Between(Known):
    """Selections: the outliers with what is kept, and the outliers alone (left out where there are none)."""

    parts: tuple[Selection, ...] = ()

    @staticmethod
    def of(parts: Iterable[Selection]) -> Between:
        """All, with what they want from the next pass together."""
        parts = tuple(parts)
        asked = [s.columns for s in parts if not s.done]
        return Between(
            not asked, None if None in asked else max((c for c in asked if c), default=None), parts
        )

    def each(self, move: Callable[[Selection], Selection]) -> Between:
        """All a step further, as far as they are not done."""
        return Between.of(s if s.done else move(s) for s in self.parts)


@dataclass(frozen=True)
class Breadcrumbs(Blockwise):
    """Model breadcrumbs: sum_i w_i kept_i, where of each row's magnitudes over the whole vector the floor(gamma n) largest (outliers) are
    dropped, the next ceil(density n) are kept, and the rest is dropped; of equal ones that of lowest index counts as the larger.

    Rows [m, n], weights [m] (any sign) -> [n]. Its one-row transform is that mask. Exact and out of core. The paper takes
    layer by layer.
    Raises ConsilienceError for a density outside (0, 1] and a gamma outside [0, 1 - density].
    Davari and Belilovsky 2024, arXiv:2312.06795.

    >>> Breadcrumbs(0.5, 0.25)(torch.tensor([[9.0, 0.1, -2.0, 1.0]])).tolist()
    [0.0, 0.0, -2.0, 1.0]
    """

    density: float = 0.15
    gamma: float = 0.006

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConsilienceError(f"`density` should be in (0, 1]. Found `density = {self.density}`.")
        if not 0 <= self.gamma <= 1 - self.density:
            raise ConsilienceError(f"`gamma` should be in [0, 1 - density]. Found `gamma = {self.gamma}`.")

    def init(self, rows: int, size: int, generator: torch.Generator | None) -> Between:
        top = math.floor(self.gamma * size)
        kept = min(size, top + math.ceil(self.density * size))
        return Between.of(
            Selection.begin(rows, size, k, self.block) for k in ((kept, top) if top else (kept,))
        )

    def scan(self, rows: Tensor, offset: int, statistics: Any) -> Between:
        x = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        return statistics.each(lambda s: s.scan(x[:, : s.columns], offset))  # type: ignore[no-any-return]

    def settle(self, statistics: Any) -> Between:
        return statistics.each(Selection.settle)  # type: ignore[no-any-return]

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        x = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        made = torch.empty_like(x)
        for i, row in enumerate(x):
            made[i] = statistics.parts[0].trim(row, i, offset)
            for outliers in statistics.parts[1:]:
                made[i] -= outliers.trim(row, i, offset)
        return weighted(made, weights.to(x.dtype)).to(rows.dtype)
