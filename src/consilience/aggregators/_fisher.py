"""Averages with a weight for every entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Blockwise, weighted
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class Fisher(Blockwise):
    """Fisher-weighted averaging: sum_i f_i tau_i / (prior + sum_i f_i), entry by entry.

    Rows [m, n], weights f [m, n] >= 0, one an entry: the diagonal of each expert's Fisher matrix times its coefficient -> [n]. They are
    normalised entry by entry: over parameters it is sum_i f_i theta_i / sum_i f_i, the paper's. `prior` is the weight of the base, in
    the units of f: Fishers may be small everywhere, so it is 0; an entry that nothing weighs keeps the base. Weights [m], one a
    row, say nothing of entries: the result is their plain sum_i w_i tau_i (the mean at the default weights).
    Raises ConsilienceError for a prior that is not finite or negative. Matena and Raffel 2022, arXiv:2111.09832.

    >>> Fisher()(torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), torch.tensor([[3.0, 0.0, 0.0], [1.0, 5.0, 0.0]])).tolist()
    [1.25, 2.0, 0.0]
    """

    prior: float = 0.0

    takes_negative_weights: ClassVar[bool] = False
    takes_entry_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.prior) and self.prior >= 0):
            raise ConsilienceError(
                f"`prior` should be finite and not negative. Found `prior = {self.prior}`."
            )

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        x = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        w = weights.to(x.dtype)
        if w.dim() == 1:
            return weighted(x, w).to(rows.dtype)
        most = w.amax(
            0
        )  # by which weights are divided first, so that neither they nor their sum leaves the range of floats
        most = torch.where(most > 0, most, 1.0)
        every, total = torch.full_like(most, self.prior).div_(most), torch.zeros_like(x[0])
        for row, own in zip(x, w, strict=True):
            share = own / most
            every += share
            total += share.mul_(row)
        return torch.where(every > 0, total / every, 0.0).to(rows.dtype)
