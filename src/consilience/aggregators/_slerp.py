"""Spherical interpolation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Linear

PARALLEL = 0.9995
"""Rows of a larger |cosine| are interpolated linearly, as in public code (mergekit, FusionBench)."""


@dataclass(frozen=True)
class Slerp(Linear):
    """SLERP of two rows: (sum w) (sin((1 - t) a) g_1 + sin(t a) g_2) / sin a, with t = w_2 / (w_1 + w_2).

    a is the angle between the rows. For rows of one length it is the point at the fraction t of the arc
    between them. Rows [2, n], weights [2] >= 0 -> [n]. If |cos a| > 0.9995, or a row is zero, it is sum_i w_i
    g_i, as in public code: so opposite rows, which have no single arc between them, pass through zero. On
    task vectors the arc is around the base; mergekit's is around zero, tensor by tensor, of parameters.
    Raises ConsilienceError for other than two rows. Shoemake 1985, SIGGRAPH.

    >>> Slerp()(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [0.7071067690849304, 0.7071067690849304]
    """

    takes_negative_weights: ClassVar[bool] = False
    fewest_rows: ClassVar[int] = 2
    most_rows: ClassVar[int | None] = 2

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        gram, wide = gram.double(), weights.double()
        lengths, total = gram.diagonal().clamp(min=0).sqrt().prod(), wide.sum()

        # sin a would be too small to divide by between rows that are nearly parallel.
        cos = torch.where(lengths > 0, gram[0, 1] / lengths, 1.0)
        if cos.abs() > PARALLEL or total == 0:
            return weights
        angle = cos.arccos()
        return (total * (angle * (wide / total)).sin() / angle.sin()).to(weights.dtype)
