"""The shortest vector in the convex hull."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from consilience.core.aggregator import Linear
from consilience.core.errors import ConsilienceError

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

RANK = float(np.finfo(np.float64).eps)
"""Eigenvalues below this fraction of the largest, times their number, count as zero."""


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
        share = shortest(gram)
        return (weights.double().sum() * share.to(weights.device)).to(weights.dtype)


@dataclass(frozen=True)
class SDMGrad(Linear):
    """SDMGrad: (sum_i w_i) (sum_i a_i g_i + lambda g) / (1 + lambda), g the mean by weights.

    a = argmin |sum_i a_i g_i + lambda g|^2 over a >= 0, sum a = 1: between MGDA (lambda = 0) and the mean
    (lambda = infinity). Rows [m, n], weights [m] >= 0 -> [n]. Solved to rounding in each step, where the
    paper takes steps of a by gradients of three batches. Raises ConsilienceError for a negative lambda. Xiao,
    Ban & Ji 2023, arXiv:2305.18409.

    >>> SDMGrad(0.0)(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).tolist()
    [0.4000000059604645, 0.800000011920929]
    """

    towards_mean: float = 0.3
    """The paper's lambda."""

    takes_negative_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.towards_mean < float("inf"):
            raise ConsilienceError(f"`towards_mean` must be >= 0 and finite, got {self.towards_mean}.")

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        total = weights.double().cpu().sum()
        if total == 0:
            return torch.zeros_like(weights)
        mean = weights.double().cpu() / total
        # Since a sums to 1, the vector is that of MGDA over the rows g_i + lambda g.
        turned = torch.eye(len(mean), dtype=torch.float64) + self.towards_mean * mean
        rows = turned @ gram.detach().double().cpu() @ turned.T
        share = shortest(rows.to(gram.dtype).cpu()) + self.towards_mean * mean
        return (total * share / (1 + self.towards_mean)).to(weights)


def shortest(gram: Tensor) -> Tensor:
    """Return argmin_a a'Ka over a >= 0, sum a = 1 [m], in float64, for the Gramian K [m, m] of some rows.

    >>> shortest(torch.eye(2)).tolist()
    [0.5, 0.5]
    """
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
        tolerance = 8 * torch.finfo(gram.dtype).eps
        share = scale * torch.from_numpy(_nonnegative(system.numpy(), scale.numpy(), tolerance))
    return share / share.sum()


def _nonnegative(system: Array, target: Array, tolerance: float) -> Array:
    """Solve argmin_{y >= 0} y'hy / 2 - c'y for h [m, m] positive semi-definite: Lawson and Hanson 1974."""
    # In numpy, whose calls on a few numbers take a tenth of the time of torch's.
    size = len(target)
    active, barred = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)

    def solve(some: Flags) -> Array:
        found = np.zeros_like(target)
        part = np.linalg.pinv(system[np.ix_(some, some)], rcond=RANK * int(some.sum()), hermitian=True)
        found[some] = part @ target[some]
        return found

    # Often every row has a share, and then one solution is all.
    y = solve(~active)
    if (y > 0).all() and np.abs(target - system @ y).max() <= tolerance:
        return y

    y = np.zeros_like(target)
    for _ in range(10 * size):
        slope = np.where(active | barred, -np.inf, target - system @ y)
        enter = int(slope.argmax())
        if slope[enter] <= tolerance:
            break
        active[enter] = True
        while True:
            solved = solve(active)
            negative = active & (solved <= 0)

            # A row that rounding alone let in would enter for ever: it is barred until y moves.
            if y[enter] == 0 and negative[enter]:
                active[enter], barred[enter] = False, True
                break
            if not negative.any():
                y, barred = solved, np.zeros_like(barred)
                break

            # Go only as far as y stays >= 0.
            reach = np.full_like(target, np.inf)
            reach[negative] = y[negative] / (y[negative] - solved[negative])
            y = y + reach.min() * (solved - y)
            active &= (reach > reach.min()) & (y > 0)
            y = np.where(active, y, 0.0)
    return y
