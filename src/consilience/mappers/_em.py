"""Gaussian mixtures with diagonal covariances by expectation maximisation: whole batches of examples and components at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 10 * torch.finfo(torch.float64).eps
"""Added to the examples of every component, so that one without any has a mean."""

SHARE = 1e-30
"""Below this an example is no part of a component: smaller floats are slow."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A mixture: `mean` and `variance` [k, d], `weight` [k], all float64; `bound` is the mean log-likelihood of an example where
    it ended."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bound: float
    steps: int
    converged: bool


def log_density(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor) -> Tensor:
    """log(weight_j N(x; mean_j, diag variance_j)) [N, k] of x [N, d], in the type of x, as products of matrices.

    >>> one = torch.zeros(1, 1)
    >>> round(float(log_density(one, one, one + 1, one[0] + 1)), 6)  # -log(2 pi) / 2
    -0.918939
    """
    mean, variance, weight = (t.to(x) for t in (mean, variance, weight))
    precision = 1 / variance
    distance = x.square() @ precision.T - 2 * x @ (mean * precision).T + (mean.square() * precision).sum(1)
    return weight.log() - 0.5 * (distance + variance.log().sum(1) + x.shape[1] * math.log(2 * math.pi))


def seeds(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The rows [k] of x [N, d] where k-means++ begins: each the best of 2 + log k, drawn by their squared distance to those
    before.

    Arthur and Vassilvitskii 2007, the greedy form.
    """
    n, square = len(x), x.square().sum(1)

    def near(rows: Tensor) -> Tensor:
        return (square + square[rows, None] - 2 * x[rows] @ x.T).clamp_min_(0)

    trials = 2 + int(math.log(k))
    chosen = [torch.randint(n, (1,), generator=generator).to(x.device)]
    least = near(chosen[0])[0]
    for _ in range(1, k):
        mass = least.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64).to(x.device)
        # examples that are all alike leave no mass: any will do
        rows = torch.searchsorted(mass, draws * mass[-1]) if mass[-1] > 0 else (draws * n).long()
        tried = torch.minimum(least, near(rows.clamp_max(n - 1)))
        best = int(tried.double().sum(1).argmin())
        chosen.append(rows.clamp_max(n - 1)[best : best + 1])
        least = tried[best]
    return torch.cat(chosen)


def fit(
    x: Tensor,
    k: int,
    generator: torch.Generator,
    floor: float = 1e-6,
    tol: float = 1e-3,
    max_iter: int = 100,
    start: Tensor | None = None,
) -> Fit:
    """The mixture of at most k components of x [N, d] with diagonal covariances, by expectation maximisation.

    r_ij = softmax_j log(w_j N(x_i; mu_j, diag s_j)); w_j = mean_i r_ij, mu_j and s_j the mean and variance of x weighted by
    r_ij, plus `floor`. It begins at k-means++'s examples, or at the rows `start` [k], with variance `floor`, and ends where the
    mean log-likelihood changes by less than `tol`, or after `max_iter` steps. Large products are in float32, of x less its mean
    and over its scale (with their squares: [N, 2 d], made once); what is returned, and sums over examples of log-likelihoods,
    are in float64. Devices follow x; draws are those of `generator` on the CPU.
    """
    n, d = x.shape
    k = min(k, n)
    centre = x.mean(0, dtype=torch.float64)
    if k == 1:
        z = x - centre
        variance = z.square().mean(0, keepdim=True) + floor
        one = torch.ones(1, dtype=torch.float64, device=x.device)
        bound = float(log_density(z, torch.zeros_like(variance), variance, one).mean())
        return Fit(centre[None], variance, one, bound, 1, True)
    centre = centre.to(x.dtype)
    both = torch.empty(n, 2 * d, dtype=torch.float32, device=x.device)
    both[:, :d] = x - centre
    torch.square(both[:, :d], out=both[:, d:])
    scale = float(both[:, d:].mean(dtype=torch.float64).sqrt()) or 1.0
    both[:, :d] /= scale
    both[:, d:] /= scale**2
    least, jacobian = floor / scale**2, d * (math.log(scale) + 0.5 * math.log(2 * math.pi))
    rows = seeds(both[:, :d], k, generator) if start is None else start
    mean, weight = both[rows, :d].double(), torch.full((k,), 1 / k, dtype=torch.float64, device=x.device)
    variance = torch.full_like(mean, least)

    def settle(r: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = r.sum(0, dtype=torch.float64) + TINY
        first, second = (moments.double() / count[:, None]).split(d, 1)
        return first, (second - first.square()).clamp_min_(0) + least, count / n

    bound, converged, step = -math.inf, False, 0
    for step in range(1, max_iter + 1):  # noqa: B007
        precision = 1 / variance
        constant = weight.log() - 0.5 * ((mean.square() * precision).sum(1) + variance.log().sum(1))
        log = torch.addmm(
            constant.float(), both, torch.cat([mean * precision, -0.5 * precision], 1).float().T
        )
        total = log.logsumexp(1)
        r = torch.threshold_(log.sub_(total[:, None]).exp_(), SHARE, 0.0)
        mean, variance, weight = settle(r, r.T @ both)
        before, bound = bound, float(total.double().mean()) - jacobian
        if abs(bound - before) < tol:
            converged = True
            break
    return Fit(mean * scale + centre, variance * scale**2, weight / weight.sum(), bound, step, converged)
