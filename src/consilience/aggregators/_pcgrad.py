"""Gradient surgery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Linear


@dataclass(frozen=True)
class PCGrad(Linear):
    """PCGrad: sum_i w_i g_i^PC, where g_i^PC is g_i without its conflicts with the other rows.

    g_i^PC starts at g_i; then, for the others j in a random order, g_i^PC -= min(0, g_i^PC . g_j) / |g_j|^2
    g_j. Rows [m, n], weights [m] >= 0 -> [n]. Without conflicts it is the weighted mean; the paper's plain
    sum is m times the result at the default weights. Each row's order is drawn from the generator (seed 0 if
    none is given). Works on coefficients, from the Gramian alone, without reading a value back. Yu et al.
    2020, arXiv:2001.06782.

    >>> PCGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]])).tolist()
    [0.25, 0.75]
    """

    takes_negative_weights: ClassVar[bool] = False

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        count, gram = len(weights), gram.double()
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        order = torch.rand(count, count, generator=generator, device=generator.device).argsort(1)

        # Row i of `projected` holds the coefficients of g_i^PC; all rows are projected at once, each in its
        # own order.
        each, square = torch.arange(count, device=gram.device), gram.diagonal()
        projected = torch.eye(count, dtype=gram.dtype, device=gram.device)
        for j in order.to(gram.device).T:
            inner = (projected * gram[j]).sum(1)
            conflict = (inner < 0) & (square[j] > 0) & (j != each)
            projected[each, j] -= torch.where(conflict, inner / square[j], 0.0)
        return (weights.double() @ projected).to(weights.dtype)
