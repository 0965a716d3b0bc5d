"""Cones: the nearest direction to the objectives' own that no constraint opposes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.core.aggregator import Cone, weighted
from consilience.core.errors import ConsilienceError

if TYPE_CHECKING:
    from collections.abc import Sequence


def nonnegative(gram: Tensor, linear: Tensor) -> Tensor:
    """argmin_{x >= 0} x^T K x / 2 + b^T x [k], exact, by the active set of Lawson and Hanson (1974), in float64.

    >>> nonnegative(torch.eye(2), torch.tensor([-1.0, 1.0])).tolist()
    [1.0, 0.0]
    """
    k, b = gram.double(), linear.double()
    n = len(b)
    x, free = torch.zeros_like(b), torch.zeros(n, dtype=torch.bool)
    tolerance = 1e-12 * float(k.diagonal().abs().max().clamp_min(1e-300)) if n else 0.0
    for _ in range(3 * n + 1):
        slope = -(k @ x + b)
        slope[free] = -torch.inf
        if not n or float(slope.max()) <= tolerance:
            break
        free[int(slope.argmax())] = True
        while True:
            index = free.nonzero()[:, 0]
            solution = torch.linalg.lstsq(k[index][:, index], -b[index, None], driver="gelsd").solution[:, 0]
            if bool((solution > 0).all()):
                x = torch.zeros_like(b)
                x[index] = solution
                break
            bad = solution <= 0
            step = (x[index][bad] / (x[index][bad] - solution[bad]).clamp_min(1e-300)).min()
            x[index] = x[index] + step * (solution - x[index])
            free[index[x[index] <= tolerance]] = False
            x[~free] = 0
            if not bool(free.any()):
                break
    return x


@dataclass(frozen=True)
class GEM(Cone):
    """Gradient episodic memory: argmin_v ||v - g||^2 with G v >= margin-shifted 0, by its dual quadratic program.

    Directions [n], constraints [k, n]: v = g + G^T (l + margin), l >= 0 minimising ||g + G^T (l + margin)||^2 / 2, when some
    constraint opposes g; else g untouched. Objectives are averaged by their weights. Lopez-Paz & Ranzato 2017.

    >>> GEM(margin=0.0).project(torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 1.0]])).tolist()
    [1.0, 0.0]
    """

    margin: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.margin < float("inf"):
            raise ConsilienceError(f"`margin` should be >= 0 and finite. Found `margin = {self.margin}`.")

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        return weighted(rows if isinstance(rows, Tensor) else torch.stack(list(rows)), weights)

    def project(self, direction: Tensor, constraints: Tensor) -> Tensor:
        against = constraints @ direction
        if bool((against >= 0).all()):
            return direction
        gram = (constraints @ constraints.T).double().cpu()
        shift = torch.full((len(constraints),), self.margin, dtype=torch.float64)
        free = nonnegative(gram, against.double().cpu() + gram @ shift)
        return direction + constraints.T @ (free + shift).to(direction)


@dataclass(frozen=True)
class AGEM(Cone):
    """Averaged GEM: v = g - (g . r / r . r) r where g opposes the mean r of the constraint rows; else g untouched.

    Chaudhry et al. 2019.

    >>> AGEM().project(torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 1.0]])).tolist()
    [1.0, 0.0]
    """

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        return weighted(rows if isinstance(rows, Tensor) else torch.stack(list(rows)), weights)

    def project(self, direction: Tensor, constraints: Tensor) -> Tensor:
        r = constraints.mean(0) if len(constraints) > 1 else constraints[0]
        opposed = torch.dot(direction, r).clamp(max=0)
        return direction - (opposed / torch.dot(r, r).clamp_min(torch.finfo(r.dtype).tiny)) * r
