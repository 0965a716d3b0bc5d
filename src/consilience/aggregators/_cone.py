"""Cones: the nearest direction to the objectives' own that no constraint opposes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.core.aggregator import Cone
from consilience.core.errors import ConsilienceError


def nonnegative(gram: Tensor, linear: Tensor) -> Tensor:
    """Solve argmin_{x >= 0} x^T K x / 2 + b^T x [k] exactly, in float64.

    By the active set of Lawson and Hanson (1974). The diagonal of K is 1, or 0 where all of its row is.

    >>> nonnegative(torch.eye(2), torch.tensor([-1.0, 1.0])).tolist()
    [1.0, 0.0]
    """
    gram, linear = gram.double(), linear.double()
    size = len(linear)
    x, free = torch.zeros_like(linear), torch.zeros(size, dtype=torch.bool)
    # Relative to what it is compared with, so that gradients of any length are solved alike.
    tolerance = 1e-12 * float(linear.abs().max()) if size else 0.0

    for _ in range(3 * size + 1):
        slope = -(gram @ x + linear)
        slope[free] = -torch.inf
        if not size or float(slope.max()) <= tolerance:
            break
        free[int(slope.argmax())] = True
        while True:
            index = free.nonzero()[:, 0]
            # Equal constraints make the system singular: least squares by SVD takes them together.
            system, right = gram[index][:, index], -linear[index, None]
            solution = torch.linalg.lstsq(system, right, driver="gelsd").solution[:, 0]
            if bool((solution > 0).all()):
                x = torch.zeros_like(linear)
                x[index] = solution
                break

            # Go only as far as x stays >= 0, and fix at 0 what got there.
            bad = solution <= 0
            step = (x[index][bad] / (x[index][bad] - solution[bad]).clamp_min(1e-300)).min()
            x[index] = x[index] + step * (solution - x[index])
            free[index[x[index] <= tolerance]] = False
            x[~free] = 0
            if not bool(free.any()):
                break
    return x


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [k, n] divided by their lengths, and the lengths [k]; rows of zeros stay as they are.

    >>> unit_rows(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))[0].tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    # By the largest number first: squares of numbers below 1e-19 are 0 in float32.
    largest = rows.abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1)
    norms = scaled.norm(dim=1, keepdim=True)
    return scaled / torch.where(norms > 0, norms, 1), (largest * norms)[:, 0]


@dataclass(frozen=True)
class GEM(Cone):
    """Gradient episodic memory: argmin_v ||v - g||^2 with G v >= margin-shifted 0, by its dual program.

    Directions [n], constraints [k, n]: v = g + G^T (l + margin), l >= 0 minimising ||g + G^T (l + margin)||^2
    / 2, if some constraint opposes g; else g as it is. Objectives are averaged by their weights. Lopez-Paz &
    Ranzato 2017.

    >>> GEM(margin=0.0).project(torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 1.0]])).tolist()
    [1.0, 0.0]
    """

    margin: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.margin < float("inf"):
            raise ConsilienceError(f"`margin` must be finite and not negative, got {self.margin}.")

    def project(self, direction: Tensor, constraints: Tensor) -> Tensor:
        # Rows of length 1: a short constraint binds like a long one, and squares do not underflow.
        units, lengths = unit_rows(constraints)
        against = units @ direction
        if bool((against >= 0).all()):
            return direction
        gram = (units @ units.T).double().cpu()
        shift = self.margin * lengths.double().cpu()
        free = nonnegative(gram, against.double().cpu() + gram @ shift)
        return direction + units.T @ (free + shift).to(direction)


@dataclass(frozen=True)
class AGEM(Cone):
    """Averaged GEM: v = g - (g . r / r . r) r if g opposes the mean r of the constraint rows, else g.

    Chaudhry et al. 2019.

    >>> AGEM().project(torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 1.0]])).tolist()
    [1.0, 0.0]
    """

    def project(self, direction: Tensor, constraints: Tensor) -> Tensor:
        mean = constraints.mean(0, keepdim=True) if len(constraints) > 1 else constraints
        unit = unit_rows(mean)[0][0]
        # Clamping in the place of a branch: no value is read back from the device.
        opposed = torch.dot(direction, unit).clamp(max=0)
        return direction - opposed * unit
