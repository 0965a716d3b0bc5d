"""Coordinate by coordinate, robust to outliers: the weighted median and the weighted trimmed mean."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Blockwise
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class _Sorted(Blockwise):
    """An aggregator of each coordinate's sorted values."""

    takes_negative_weights: ClassVar[bool] = False
    robust: ClassVar[bool] = True

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        # Stable, so that weights of equal values stay in canonical order.
        values, order = rows.sort(dim=0, stable=True)
        wide = weights.double()
        # Sums of weights that differ by less than their own rounding error count as equal.
        precision = torch.finfo(weights.dtype).eps + len(wide) * torch.finfo(torch.float64).eps
        slack = precision * float(wide.sum())
        return self.reduce(values.double(), wide[order], wide.sum(), slack).to(rows.dtype)

    @abstractmethod
    def reduce(self, values: Tensor, weights: Tensor, total: Tensor, slack: float) -> Tensor:
        """Reduce values [m, b] in ascending order with their weights [m, b] and the sum of weights to [b]."""


@dataclass(frozen=True)
class Median(_Sorted):
    """The weighted median of every coordinate: (sum w) (lower + upper) / 2.

    `lower` and `upper` are the smallest values at which the weight so far reaches, and exceeds, half of the
    sum. Rows [m, n], weights [m] >= 0 -> [n]. Equal weights give the usual median, the midpoint for an even
    m. Yin et al. 2018, arXiv:1803.01498.

    >>> Median()(torch.tensor([[1.0], [2.0], [4.0], [900.0]])).tolist()
    [3.0]
    """

    def reduce(self, values: Tensor, weights: Tensor, total: Tensor, slack: float) -> Tensor:
        # `below` is the weight of all values before this one.
        below, lower, upper = torch.zeros_like(values[0]), values[0], values[0]
        for value, weight in zip(values, weights, strict=True):
            lower = torch.where(below < total / 2 - slack, value, lower)
            upper = torch.where(below <= total / 2 + slack, value, upper)
            below = below + weight
        return total * (lower / 2 + upper / 2)


@dataclass(frozen=True)
class TrimmedMean(_Sorted):
    """The weighted trimmed mean of every coordinate: (sum w) sum_i v_i x_(i) / sum_i v_i.

    v_i is the part of the weight of the i-th smallest value x_(i) that lies between the fractions `trim` and
    1 - `trim` of the sum of weights. Rows [m, n], weights [m] >= 0 -> [n]. At equal weights it drops the trim
    * m smallest and largest values; if trim * m is not whole, the last one in part. Raises ConsilienceError
    for a trim outside [0, 0.5) (0.5 is the median). Yin et al. 2018, arXiv:1803.01498.

    >>> TrimmedMean(0.25)(torch.tensor([[1.0], [2.0], [4.0], [900.0]])).tolist()
    [3.0]
    """

    trim: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ConsilienceError(f"`trim` must be in [0, 0.5), got {self.trim}.")

    def reduce(self, values: Tensor, weights: Tensor, total: Tensor, slack: float) -> Tensor:
        low, high = self.trim * total, (1 - self.trim) * total
        below, mass, result = (torch.zeros_like(values[0]) for _ in range(3))
        for value, weight in zip(values, weights, strict=True):
            after = below + weight
            part = torch.minimum(after, high) - torch.maximum(below, low)
            part = torch.where(part > slack, part, 0.0)
            below, mass, result = after, mass + part, result + part * value
        return torch.where(mass > 0, result * (total / mass), 0.0)
