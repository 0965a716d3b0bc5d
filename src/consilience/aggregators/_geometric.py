"""The geometric median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.aggregators._krum import BLOCK, squares, squares_of_gram
from consilience.core.aggregator import Linear
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class GeometricMedian(Linear):
    """(sum w) argmin_v sum_i w_i ||v - g_i||, by the smoothed Weiszfeld iteration.

    It repeats v = sum_i b_i g_i / sum b with b_i = w_i / max(nu, ||v - g_i||) until the shares b_i / sum b
    move by less than 1e-13, or for `iterations`. nu is `smoothing` times the median distance to the row in
    the middle, so that rows may have any scale; if it is 0, more than half of the rows are equal, and theirs
    is the result.

    Rows [m, n], weights [m] >= 0 -> [n]; rows with up to half of the weight may be anything. Only inner
    products of differences to the row in the middle are needed. Pillutla, Kakade & Harchaoui 2022,
    arXiv:1912.13445 (RFA).

    >>> rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3**0.5], [1.0, 9e6]])
    >>> GeometricMedian()(rows).round(decimals=3).tolist()
    [1.0, 1.7319999933242798]
    """

    takes_negative_weights: ClassVar[bool] = False
    robust: ClassVar[bool] = True

    smoothing: float = 1e-6
    iterations: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.smoothing < float("inf"):
            raise ConsilienceError(f"`smoothing` must be positive and finite, got {self.smoothing}.")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ConsilienceError(f"`iterations` must be a whole number >= 1, got {self.iterations!r}.")

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        wide = gram.double()
        middle = self._middle(squares_of_gram(wide))
        shifted = wide - wide[middle] - wide[:, middle : middle + 1] + wide[middle, middle]
        return self._weiszfeld(shifted, weights)

    def coefficients(self, rows: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        middle = self._middle(squares(rows))
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        # Differences to the row in the middle, so that a huge row leaves no rounding error in the others.
        for block in rows.split(BLOCK, 1):
            away = block.double() - block[middle].double()
            gram += away @ away.T
        return self._weiszfeld(gram, weights)

    @staticmethod
    def _middle(square: Tensor) -> int:
        """Return the row with the smallest median distance to the rows."""
        return int(square.sort(1).values[:, len(square) // 2].argmin())

    def _weiszfeld(self, gram: Tensor, weights: Tensor) -> Tensor:
        """Compute coefficients from the inner products of the rows' differences to the one in the middle."""
        mass, length = weights.double(), gram.diagonal().clamp(min=0).sqrt()

        # Rows beyond the range of float64 would get shares of 0: they are left out.
        far = ~torch.isfinite(gram).all(1) & ~torch.isfinite(length)
        gram = gram.masked_fill(far | far[:, None], 0.0)
        mass = mass.masked_fill(far, 0.0)
        if not mass.any():
            return torch.zeros_like(weights)

        # Begin at the mean of the nearer half.
        typical = length.sort().values[len(length) // 2]
        near = mass * (length <= typical)
        start = near if near.any() else mass
        shares = start / start.sum()

        nu = self.smoothing * float(typical)
        for _ in range(self.iterations if nu else 0):
            along = gram @ shares
            distance = (shares @ along - 2 * along + gram.diagonal()).clamp(min=0).sqrt()
            inverse = mass / distance.clamp(min=nu)
            new = inverse / inverse.sum()
            moved, shares = float((new - shares).abs().max()), new
            if moved < 1e-13:
                break
        return (shares * weights.double().sum()).to(weights.dtype)
