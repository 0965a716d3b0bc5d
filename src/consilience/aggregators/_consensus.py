"""Entries of task vectors that several tasks agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.core.aggregator import Blockwise, weighted, widened
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class Consensus(Blockwise):
    """Consensus merging: c * sum_i w_i tau_i, c = 1 for entries that matter to `agree` or more tasks, else 0.

    An entry matters to task i if |tau_i| >= strength |sum_j tau_j - tau_i| (the TALL masks). Entries that
    serve one task alone, or none, are thus left out.

    Rows [m, n], weights [m] (any sign; masks do not use them) -> [n]. `agree` 0 is the weighted mean; with
    fewer rows than `agree`, all rows must agree. The paper chooses `strength` (its lambda) per task from 0.2
    to 0.6 on validation data; here it is one for all. m equal rows g give (sum w) g while strength (m - 1) <=
    1, and 0 beyond: each is then far from the plain sum. Raises ConsilienceError for a strength that is not
    finite or negative, and a negative `agree`. Wang et al. 2024, arXiv:2405.07813.

    >>> rows = torch.tensor([[1.0, 4.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.5]])
    >>> Consensus(0.5)(rows).tolist()  # the second entry serves one task alone
    [1.0, 0.0, 0.8333333730697632]
    """

    strength: float = 0.2
    agree: int = 2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ConsilienceError(f"`strength` must be finite and not negative, got {self.strength}.")
        if self.agree < 0:
            raise ConsilienceError(f"`agree` must be a number of tasks, not negative, got {self.agree}.")

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        wide = widened(rows)
        total = weighted(wide, torch.ones_like(weights, dtype=wide.dtype))

        # The sign bit, shifted down, is -1 for a negative surplus: several times as fast as a comparison.
        integers, sign = (torch.int64, 63) if wide.dtype == torch.float64 else (torch.int32, 31)
        votes = torch.full_like(total, len(wide), dtype=integers)
        for row in wide:
            surplus = row.abs().sub_((total - row).abs_().mul_(self.strength))
            votes += surplus.view(integers) >> sign

        merged = weighted(wide, weights.to(wide.dtype))
        return merged.masked_fill_(votes < min(self.agree, len(wide)), 0.0).to(rows.dtype)
