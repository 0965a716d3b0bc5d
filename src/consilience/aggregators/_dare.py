"""Drop and rescale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class Dare(Aggregator):
    """DARE: sum_i w_i b_i * tau_i / density, with b_i ~ Bernoulli(density) for every entry (the drop rate is 1 - density).

    Rows [m, n], weights [m] (any sign) -> [n]. Equal rows get different masks: the contract holds in expectation.
    Masks are drawn row after row in the canonical order, so the same generator gives the same result for any order of rows.
    Raises ConsilienceError for a density outside (0, 1] or without a generator. Yu et al. 2024, arXiv:2311.03099.

    >>> Dare(0.5)(torch.ones(1, 6), generator=torch.Generator().manual_seed(0)).tolist()
    [2.0, 0.0, 2.0, 2.0, 2.0, 0.0]
    """

    density: float = 0.1

    expectation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConsilienceError(f"`density` should be in (0, 1]. Found `density = {self.density}`.")

    def combine(self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            raise ConsilienceError("`generator` should be given to DARE, which drops entries at random. Found None.")
        total = torch.zeros_like(rows[0])
        for row, w in zip(rows, weights, strict=True):
            kept = torch.rand(row.shape, generator=generator, device=generator.device) < self.density
            total += torch.where(kept.to(row.device), row * (w / self.density), 0.0)
        return total
