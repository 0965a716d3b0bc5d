"""What several tasks agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.core.aggregator import Blockwise, weighted
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class Consensus(Blockwise):
    """Consensus merging: c * sum_i w_i tau_i, with c = 1 where at least `agree` of the masks |tau_i| >= strength |sum_j tau_j - tau_i|
    hold (the TALL masks), and 0 elsewhere: weights that serve one task alone, or none, are left out.

    Rows [m, n], weights [m] (any sign; masks do not use them) -> [n]. `agree` 0 is the weighted mean; where there are fewer rows than
    `agree`, all have to. The paper chooses `strength` (its lambda) for each task from 0.2 to 0.6 on validation data; here it is one
    for all. m equal rows g give (sum w) g while strength (m - 1) <= 1, beyond that 0: each is then far from the plain sum.
    Raises ConsilienceError for a strength that is not finite or negative, and a negative `agree`. Wang et al. 2024, arXiv:2405.07813.

    >>> Consensus(0.5)(torch.tensor([[1.0, 4.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.5]])).tolist()  # the second serves one task alone
    [1.0, 0.0, 0.8333333730697632]
    """

    strength: float = 0.2
    agree: int = 2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ConsilienceError(
                f"`strength` should be finite and not negative. Found `strength = {self.strength}`."
            )
        if self.agree < 0:
            raise ConsilienceError(
                f"`agree` should not be negative: it should be a number of tasks. Found `agree = {self.agree}`."
            )

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        x = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        total = weighted(x, torch.ones_like(weights, dtype=x.dtype))
        kind, sign = (torch.int64, 63) if x.dtype == torch.float64 else (torch.int32, 31)
        votes = torch.full_like(total, len(x), dtype=kind)
        for row in x:
            surplus = row.abs().sub_((total - row).abs_().mul_(self.strength))
            votes += surplus.view(kind) >> sign  # -1 below 0, several times as quick as a comparison
        merged = weighted(x, weights.to(x.dtype))
        return merged.masked_fill_(votes < min(self.agree, len(x)), 0.0).to(rows.dtype)
