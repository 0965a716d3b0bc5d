"""Averages with a weight for every entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Blockwise, weighted, widened
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class Fisher(Blockwise):
    """Fisher-weighted averaging: sum_i f_i tau_i / (prior + sum_i f_i), entry by entry.

    Rows [m, n], weights f [m, n] >= 0, one per entry: the diagonal of each expert's Fisher matrix times its
    coefficient -> [n]. They are normalised entry by entry: over parameters it is sum_i f_i theta_i / sum_i
    f_i, the paper's. `prior` is the weight of the base, in the units of f: Fishers may be small everywhere,
    so it is 0; an entry without any weight keeps the base. With weights [m], one per row, the result is their
    plain sum_i w_i tau_i (the mean by default). Raises ConsilienceError for a prior that is not finite or
    negative. Matena and Raffel 2022, arXiv:2111.09832.

    >>> rows, fishers = torch.tensor([[1.0] * 3, [2.0] * 3]), torch.tensor([[3.0, 0.0, 0.0], [1.0, 5.0, 0.0]])
    >>> Fisher()(rows, fishers).tolist()
    [1.25, 2.0, 0.0]
    """

    prior: float = 0.0

    takes_negative_weights: ClassVar[bool] = False
    takes_entry_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.prior) and self.prior >= 0):
            raise ConsilienceError(f"`prior` must be finite and not negative, got {self.prior}.")

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        wide = widened(rows)
        weights = weights.to(wide.dtype)
        if weights.dim() == 1:
            return weighted(wide, weights).to(rows.dtype)

        # Divided by the largest first, so that neither weights nor their sum leave the range of floats.
        most = weights.amax(0)
        most = torch.where(most > 0, most, 1.0)
        every, total = torch.full_like(most, self.prior).div_(most), torch.zeros_like(wide[0])
        for row, fisher in zip(wide, weights, strict=True):
            share = fisher / most
            every += share
            total += share.mul_(row)
        return torch.where(every > 0, total / every, 0.0).to(rows.dtype)
