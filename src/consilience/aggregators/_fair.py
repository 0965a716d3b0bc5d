"""Bargains: coefficients at which the rows agree on what each of them gains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Linear
from consilience.core.errors import ConsilienceError


def bargain(gram: Tensor, weights: Tensor, power: float) -> Tensor | None:
    """Solve (K a)_i = w_i a_i^(-power) for a > 0 [m], K [m, m] positive semi-definite, diagonal positive.

    It is where a'Ka / 2 + sum_i w_i b(a_i) is least, with b' = -a^(-power), which is convex: Newton steps,
    each made shorter until the function falls and a stays positive. None where no a was found, as where rows
    cancel, and none exists.

    >>> bargain(torch.eye(2).double(), torch.ones(2).double(), 1.0).tolist()
    [1.0, 1.0]
    """

    def height(a: Tensor) -> Tensor:
        barrier = -a.log() if power == 1 else -(a ** (1 - power)) / (1 - power)
        return a @ gram @ a / 2 + weights @ barrier

    # Where the rows stand at right angles, this is the solution.
    a = (weights / gram.diagonal()) ** (1 / (1 + power))
    last = math.inf
    for _ in range(200):
        push = weights * a**-power
        slope = gram @ a - push
        error = float((a * slope).abs().max() / (a * push).max())
        # Or no better than one step before, which is as near as rounding lets it come.
        if error <= 1e-13 or last <= error <= 1e-6:
            return a
        # Relative to a, so that the system is well scaled however different the lengths of the rows are.
        curve = a[:, None] * gram * a + torch.diag(power * a * push)
        move = -a * torch.linalg.solve_ex(curve, a * slope).result
        if not bool(torch.isfinite(move).all()):
            return None
        falls, now, size, last = move @ slope, height(a), 1.0, error
        # Near the solution the function falls by less than it is rounded, and steps are whole.
        while error > 1e-6 and size > 1e-12:
            there = a + size * move
            if bool((there > 0).all()) and bool(height(there) <= now + 1e-4 * size * falls):
                break
            size /= 2
        if size <= 1e-12:
            # No step is short enough to see the function fall: this is the lowest value in sight.
            return a if (a * slope).abs().max() <= 1e-6 * (a * push).min() else None
        a = a + size * move
    return None


@dataclass(frozen=True)
class FairGrad(Linear):
    """Alpha-fair gradients: sum_i a_i g_i with g_i . sum_j a_j g_j = w_i a_i^(-1 / alpha), scaled to sum w.

    alpha = 1 is the Nash bargain (Nash-MTL), where every row gains the same share; 0 tends to the mean, and
    infinity to the row that gains least. The papers' length, which grows as |g| falls, is replaced by
    coefficients that sum to sum_i w_i: equal rows give their weighted mean, as with every aggregator here.
    Rows of zeros get no share. Rows [m, n], weights [m] >= 0 -> [n]. Solved to rounding in each step, while
    public code solves it by a few steps of a convex solver. Raises ConsilienceError for alpha <= 0. Navon et
    al. 2022, arXiv:2202.01017; Ban & Ji 2024, arXiv:2402.15638.

    >>> FairGrad(1.0)(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).tolist()
    [0.800000011920929, 0.800000011920929]
    """

    alpha: float = 1.0

    takes_negative_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ConsilienceError(f"`alpha` must be positive and finite, got {self.alpha}.")

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        wide, given = gram.detach().double().cpu(), weights.double().cpu()
        there = (wide.diagonal() > 0) & (given > 0)
        if not bool(there.any()):
            return torch.zeros_like(weights)

        # Of the scale of K only the length depends, which is set afterwards.
        own = wide[there][:, there]
        own, parts = own / own.diagonal().mean(), given[there] / given.sum()
        found = bargain(own, parts, 1 / self.alpha)
        if found is None:
            # Where rows cancel, a little more on the diagonal gives the sum that all but vanishes.
            found = bargain(own + 1e-9 * torch.diag(own.diagonal()), parts, 1 / self.alpha)
        share = torch.zeros_like(given)
        share[there] = parts if found is None else found
        return (given.sum() * share / share.sum()).to(weights)
