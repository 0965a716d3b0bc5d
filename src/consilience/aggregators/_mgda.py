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

    Rows [m, n], weights [m] >= 0, of which only the sum is used -> [n]. Solved to rounding by an active set,
    not by Frank-Wolfe. A zero row makes the result zero: leave absent objectives out. Désidéri 2012, C. R.
    Acad. Sci. 350; Sener and Koltun 2018, arXiv:1810.04650.

    >>> MGDA()(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).tolist()
    [0.4000000059604645, 0.800000011920929]
    """

    takes_negative_weights: ClassVar[bool] = False

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        wide = gram.detach().double().cpu()
        square = wide.diagonal()
        if (square <= 0).any():
            share = (square <= 0).double()
        else:
            # With x = t a, min |x g|^2 + s (sum x - 1)^2 has the same a for every s > 0, and its only
            # constraint is x >= 0. Rows are scaled to length 1, to solve short and long ones equally well.
            norm = square.sqrt()
            scale = norm.min() / norm
            system = wide / norm.outer(norm) + scale.outer(scale)
            share = scale * _nonnegative(system, scale, 8 * torch.finfo(gram.dtype).eps)
        return (weights.double().sum() * (share / share.sum()).to(weights.device)).to(weights.dtype)


def _nonnegative(system: Tensor, target: Tensor, tolerance: float) -> Tensor:
    """Solve argmin_{y >= 0} y'hy / 2 - c'y for h [m, m] positive semi-definite: Lawson and Hanson 1974."""
    size = len(target)
    y = torch.zeros_like(target)
    active, barred = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)

    for _ in range(10 * size):
        slope = (target - system @ y).masked_fill(active | barred, -torch.inf)
        enter = int(slope.argmax())
        if slope[enter] <= tolerance:
            break
        active[enter] = True
        while True:
            solved = torch.zeros_like(target)
            inverse = torch.linalg.pinv(system[active][:, active], hermitian=True)
            solved[active] = inverse @ target[active]
            negative = active & (solved <= 0)

            # A row that rounding alone let in would enter for ever: it is barred until y moves.
            if y[enter] == 0 and negative[enter]:
                active[enter], barred[enter] = False, True
                break
            if not negative.any():
                y, barred = solved, torch.zeros_like(barred)
                break

            # Go only as far as y stays >= 0.
            reach = torch.where(negative, y / (y - solved), torch.inf)
            y = y + reach.min() * (solved - y)
            active &= (reach > reach.min()) & (y > 0)
            y = torch.where(active, y, 0.0)
    return y
