"""Conflict-averse gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Linear
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class CAGrad(Linear):
    """CAGrad: (sum_i w_i) (g + c |g| / |u| u) / (1 + c), g the mean by weights, u = sum_i a_i g_i.

    a = argmin u . g + c |g| |u| over a >= 0, sum a = 1: of all directions within c |g| of the mean, that in
    which the row that gains least gains most. c = 0 is the mean. Rows [m, n], weights [m] >= 0 -> [n]. Equal
    rows give their mean, for which public code divides by 1 + c^2 or not at all. Raises ConsilienceError for
    c outside [0, 1). Liu et al. 2021, arXiv:2110.14048.

    >>> CAGrad(0.0)(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [0.5, 0.5]
    """

    c: float = 0.5

    takes_negative_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.c < 1:
            raise ConsilienceError(f"`c` must be in [0, 1), got {self.c}.")

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        wide, given = gram.detach().double().cpu(), weights.double().cpu()
        total, largest = given.sum(), wide.diagonal().max()
        if total == 0 or largest <= 0:
            return weights
        mean, wide = given / total, wide / largest
        share = self._share(wide, mean)
        lengths = (mean @ wide @ mean).clamp_min(0).sqrt(), (share @ wide @ share).clamp_min(0).sqrt()
        # Where u vanishes no direction serves all rows, and the mean is as good as any.
        factor = self.c * lengths[0] / lengths[1] if lengths[1] > 1e-12 else torch.zeros(())
        return (total * (mean + factor * share) / (1 + self.c)).to(weights)

    def _share(self, gram: Tensor, mean: Tensor) -> Tensor:
        """Return a [m] for a Gramian whose largest diagonal entry is 1."""
        from scipy.optimize import minimize

        inner, radius = (gram @ mean).numpy(), self.c * float((mean @ gram @ mean).clamp_min(0).sqrt())
        matrix = gram.numpy()

        def height(a: object) -> tuple[float, object]:
            pulled = matrix @ a
            # The root has no slope at 0.
            length = max(float(a @ pulled), 0.0) ** 0.5 + 1e-12
            return float(a @ inner) + radius * length, inner + radius * pulled / length

        sums = {"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: a * 0 + 1}
        found = minimize(
            height,
            mean.numpy(),
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * len(mean),
            constraints=sums,
            options={"ftol": 1e-14, "maxiter": 200},
        )
        share = torch.from_numpy(found.x).clamp_min(0)
        return share / share.sum()
