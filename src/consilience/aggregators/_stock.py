"""Model stock."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.core.aggregator import Linear


@dataclass(frozen=True)
class ModelStock(Linear):
    """Model stock: t sum_i w_i tau_i with t = m c / (1 + (m - 1) c).

    c is the mean cosine over all pairs of rows, at least 0. Rows [m, n], weights [m] (any sign) -> [n]. It is
    the point nearest to the rows' unknown centre between the base and their mean: rows at right angles give
    the base, equal ones their mean. The paper has c for two rows, and equal angles; the mean over pairs is
    mergekit's reading of it. Where rows oppose each other on average, t would pass through a pole: c is cut
    at 0, which gives the base. A zero row has cosine 0; one row is taken as it is. The paper computes t per
    layer; here it is that of the given rows. Jang et al. 2024, arXiv:2403.19522.

    >>> ModelStock()(torch.tensor([[5.0, 0.0], [3.0, 4.0]])).tolist()  # cosine 0.6, t 0.75
    [3.0, 1.5]
    """

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        count, gram = len(weights), gram.double()
        # One row makes no pair, and the mean over none is not defined.
        if count == 1:
            return weights
        lengths = gram.diagonal().clamp(min=0).sqrt()
        both = lengths.outer(lengths)
        cosines = torch.where(both > 0, gram / both, 0.0).clamp(-1, 1)
        # The diagonal holds each row with itself, which is no pair.
        cos = (cosines.sum() - cosines.diagonal().sum()).div(count * (count - 1)).clamp(0, 1)
        return (weights.double() * (count * cos / (1 + (count - 1) * cos))).to(weights.dtype)
