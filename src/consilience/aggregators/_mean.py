"""The weighted mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Linear


@dataclass(frozen=True)
class Mean(Linear):
    """The weighted mean: sum_i w_i g_i.

    Rows [m, n], weights [m] (any sign) -> [n]. FedAvg is this at weights n_i / sum n: McMahan et al. 2017,
    arXiv:1602.05629.

    >>> Mean()(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).tolist()
    [2.0, 4.0]
    """

    needs_gram: ClassVar[bool] = False
    # The coefficients sum to 1, so that a base would cancel.
    needs_base: ClassVar[bool] = False

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        return weights
