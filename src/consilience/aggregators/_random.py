"""Random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Linear


@dataclass(frozen=True)
class RandomWeights(Linear):
    """Random loss weighting: (sum_i w_i) sum_i a_i g_i with a = softmax(z), z ~ N(0, 1) [m] in each step.

    Rows [m, n], weights [m], of which only the sum is used -> [n]. Drawn from the generator (seed 0 if none
    is given); the rows are not read, so that a step needs one backward pass. Lin et al. 2022,
    arXiv:2111.10603.

    >>> RandomWeights()(torch.ones(3, 2)).tolist()
    [1.0, 1.0]
    """

    needs_gram: ClassVar[bool] = False

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        drawn = torch.randn(len(weights), generator=generator, device=generator.device, dtype=torch.float64)
        return (weights.double().sum() * drawn.softmax(0).to(weights.device)).to(weights.dtype)
