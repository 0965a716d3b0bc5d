"""The geometric median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.aggregators._krum import BLOCK, squares
from consilience.core.aggregator import Linear
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class GeometricMedian(Linear):
    """(sum w) argmin_v sum_i w_i ||v - g_i||, by the smoothed Weiszfeld iteration: v = sum_i b_i g_i / sum b, b_i = w_i / max(nu, ||v - g_i||).

    Rows [m, n], weights [m] >= 0 -> [n]; half of the weight may be anything. nu is `smoothing` times the median distance to the row in the
    middle, so that rows may have any scale (where that is 0, more than half of the rows are one, which is taken); it stops when the shares b_i / sum b move by less than 1e-13, or after `iterations`. Only
    inner products of differences to that row are needed. Pillutla, Kakade & Harchaoui 2022, arXiv:1912.13445 (RFA).

    >>> GeometricMedian()(torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3**0.5], [1.0, 9e6]])).round(decimals=3).tolist()
    [1.0, 1.7319999933242798]
    """

    takes_negative_weights: ClassVar[bool] = False
    robust: ClassVar[bool] = True

    smoothing: float = 1e-6
    iterations: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.smoothing < float("inf"):
            raise ConsilienceError(
                f"`smoothing` should be positive and finite. Found `smoothing = {self.smoothing}`."
            )
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ConsilienceError(
                f"`iterations` should be a whole number >= 1. Found `iterations = {self.iterations!r}`."
            )

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        g = gram.double()
        middle = self._middle((g.diagonal()[:, None] + g.diagonal() - 2 * g).clamp(min=0))
        return self._weiszfeld(g - g[middle] - g[:, middle : middle + 1] + g[middle, middle], weights)

    def coefficients(self, rows: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        middle = self._middle(squares(rows))
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for block in rows.split(
            BLOCK, 1
        ):  # differences to a row in the middle: a huge row leaves no rounding in the others
            away = block.double() - block[middle].double()
            gram += away @ away.T
        return self._weiszfeld(gram, weights)

    @staticmethod
    def _middle(square: Tensor) -> int:
        """The row that has half of the others nearest."""
        return int(square.sort(1).values[:, len(square) // 2].argmin())

    def _weiszfeld(self, gram: Tensor, weights: Tensor) -> Tensor:
        """Coefficients from the inner products of the rows' differences to the one in the middle."""
        w, d = weights.double(), gram.diagonal().clamp(min=0).sqrt()
        far = ~torch.isfinite(gram).all(1) & ~torch.isfinite(d)  # beyond float64: their shares would be 0
        gram = gram.masked_fill(far | far[:, None], 0.0)
        w = w.masked_fill(far, 0.0)
        if not w.any():
            return torch.zeros_like(weights)
        typical = d.sort().values[len(d) // 2]
        c = w * (d <= typical)
        c = (c if c.any() else w) / (c if c.any() else w).sum()
        nu = self.smoothing * float(typical)
        for _ in range(self.iterations if nu else 0):
            along = gram @ c
            distance = (c @ along - 2 * along + gram.diagonal()).clamp(min=0).sqrt()
            b = w / distance.clamp(min=nu)
            new = b / b.sum()
            moved, c = float((new - c).abs().max()), new
            if moved < 1e-13:
                break
        return (c * weights.double().sum()).to(weights.dtype)
