"""Task arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Linear
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class Arithmetic(Linear):
    """Task arithmetic: coefficient * sum_i w_i tau_i.

    Rows [m, n], weights [m] (any sign: a negative one forgets its task) -> [n]. The papers' lambda multiplies
    a plain sum: at the default weights 1/m it is coefficient / m. Its one-row transform is coefficient * tau.
    Raises ConsilienceError for a coefficient that is not finite. Ilharco et al. 2023, arXiv:2212.04089.

    >>> Arithmetic(2.0)(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).tolist()
    [4.0, 8.0]
    """

    coefficient: float = 1.0

    # The weights alone give the coefficients, so that no pass over the rows is needed.
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.coefficient):
            raise ConsilienceError(f"`coefficient` must be finite, got {self.coefficient}.")

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.coefficient * weights
