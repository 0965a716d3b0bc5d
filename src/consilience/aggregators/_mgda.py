"""The shortest vector in the convex hull."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Linear


@dataclass(frozen=True)
class MGDA(Linear):
    """MGDA: (sum_i w_i) sum_i a_i g_i, with a = argmin |sum_i a_i g_i|^2 over a >= 0, sum a = 1.

    Rows [m, n], weights [m] >= 0, of which only the sum is used -> [n]. Solved to rounding by an active set, not by
    Frank-Wolfe. A zero row makes the result zero: leave absent objectives out. Désidéri 2012, C. R. Acad. Sci. 350;
    Sener and Koltun 2018, arXiv:1810.04650.

    >>> MGDA()(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).tolist()
    [0.4000000059604645, 0.800000011920929]
    """

    takes_negative_weights: ClassVar[bool] = False

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        g = gram.detach().double().cpu()
        square = g.diagonal()
        if (square <= 0).any():
            share = (square <= 0).double()
        else:
            # With x = t a, min |x g|^2 + s (sum x - 1)^2 has the same a for every s > 0, and knows only x >= 0. Rows are
            # scaled to length 1, so that short and long ones are solved equally well.
            norm = square.sqrt()
            scale = norm.min() / norm
            share = scale * _nonnegative(
                g / norm.outer(norm) + scale.outer(scale), scale, 8 * torch.finfo(gram.dtype).eps
            )
        return (weights.double().sum() * (share / share.sum()).to(weights.device)).to(weights.dtype)


def _nonnegative(h: Tensor, c: Tensor, tolerance: float) -> Tensor:
    """argmin y'hy / 2 - c'y over y >= 0, for h [m, m] positive semi-definite and c [m]: Lawson and Hanson 1974."""
    m = len(c)
    y = torch.zeros_like(c)
    active, barred = torch.zeros(m, dtype=torch.bool), torch.zeros(m, dtype=torch.bool)
    for _ in range(10 * m):
        slope = (c - h @ y).masked_fill(active | barred, -torch.inf)
        enter = int(slope.argmax())
        if slope[enter] <= tolerance:
            break
        active[enter] = True
        while True:
            z = torch.zeros_like(c)
            z[active] = torch.linalg.pinv(h[active][:, active], hermitian=True) @ c[active]
            negative = active & (z <= 0)
            if y[enter] == 0 and negative[enter]:
                active[enter], barred[enter] = False, True
                break
            if not negative.any():
                y, barred = z, torch.zeros_like(barred)
                break
            reach = torch.where(negative, y / (y - z), torch.inf)
            y = y + reach.min() * (z - y)
            active &= (reach > reach.min()) & (y > 0)
            y = torch.where(active, y, 0.0)
    return y
