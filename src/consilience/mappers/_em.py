"""Gaussian mixtures with diagonal covariances by expectation maximisation, on all examples at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 10 * torch.finfo(torch.float64).eps
"""Added to the examples of every component, so that one without any has a mean."""

SHARE = 1e-30
"""An example with a smaller share is no part of a component; subnormal floats would be slow."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A mixture: `mean`, `variance` [k, d], `weight` [k], all float64; `bound` is its mean log-likelihood."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bound: float
    steps: int
    converged: bool


class Mixture(NamedTuple):
    """The parameters of a mixture between two steps: mean and variance [k, d], weight [k]."""

    mean: Tensor
    variance: Tensor
    weight: Tensor


class Scaled(NamedTuple):
    """Examples less their mean and over their scale, with their squares: `both` [N, 2 d] in float32."""

    both: Tensor
    centre: Tensor
    scale: float


def log_density(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor) -> Tensor:
    """Return log(weight_j N(x; mean_j, diag variance_j)) [N, k] of x [N, d], in the type of x.

    Distances are products of matrices, not [N, k, d] differences.

    >>> one = torch.zeros(1, 1)
    >>> round(float(log_density(one, one, one + 1, one[0] + 1)), 6)  # -log(2 pi) / 2
    -0.918939
    """
    mean, variance, weight = (t.to(x) for t in (mean, variance, weight))
    # Expanded squares: the cross term is a product of matrices.
    precision = 1 / variance
    distance = x.square() @ precision.T - 2 * x @ (mean * precision).T + (mean.square() * precision).sum(1)
    return weight.log() - 0.5 * (distance + variance.log().sum(1) + x.shape[1] * math.log(2 * math.pi))


def seeds(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return the rows [k] of x [N, d] where k-means++ begins.

    Each is the best of 2 + log k rows drawn by their squared distance to those before. Arthur and
    Vassilvitskii 2007, the greedy form.
    """
    count, square = len(x), x.square().sum(1)

    def near(rows: Tensor) -> Tensor:
        return (square + square[rows, None] - 2 * x[rows] @ x.T).clamp_min_(0)

    trials = 2 + int(math.log(k))
    chosen = [torch.randint(count, (1,), generator=generator).to(x.device)]
    least = near(chosen[0])[0]
    for _ in range(1, k):
        mass = least.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64).to(x.device)
        # Examples that are all alike leave no mass: any will do.
        rows = torch.searchsorted(mass, draws * mass[-1]) if mass[-1] > 0 else (draws * count).long()
        rows = rows.clamp_max(count - 1)
        tried = torch.minimum(least, near(rows))
        best = int(tried.double().sum(1).argmin())
        chosen.append(rows[best : best + 1])
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
    """Fit a mixture of at most k components to x [N, d] by expectation maximisation.

    r_ij = softmax_j log(w_j N(x_i; mu_j, diag s_j)); w_j = mean_i r_ij, mu_j and s_j the mean and variance of
    x weighted by r_ij, plus `floor`. It begins at k-means++'s examples, or at the rows `start` [k], with
    variance `floor`, and ends where the mean log-likelihood changes by less than `tol`, or after `max_iter`
    steps. Large products are in float32, of x less its mean and over its scale (with their squares: [N, 2 d],
    made once); the result, and sums over examples of log-likelihoods, are in float64. Devices follow x; draws
    are those of `generator` on the CPU.
    """
    width = x.shape[1]
    k = min(k, len(x))
    if k == 1:
        return _single(x, floor)

    both, centre, scale = _scaled(x)
    # Densities of scaled examples differ by the determinant of the scaling.
    least, jacobian = floor / scale**2, width * (math.log(scale) + 0.5 * math.log(2 * math.pi))
    rows = seeds(both[:, :width], k, generator) if start is None else start
    mean = both[rows, :width].double()
    weight = torch.full((k,), 1 / k, dtype=torch.float64, device=x.device)
    mixture = Mixture(mean, torch.full_like(mean, least), weight)

    bound, converged, step = -math.inf, False, 0
    for step in range(1, max_iter + 1):  # noqa: B007
        shares, total = _expect(both, mixture)
        mixture = _maximise(both, shares, least)
        before, bound = bound, float(total.double().mean()) - jacobian
        if abs(bound - before) < tol:
            converged = True
            break

    mean, variance, weight = mixture
    return Fit(mean * scale + centre, variance * scale**2, weight / weight.sum(), bound, step, converged)


def _single(x: Tensor, floor: float) -> Fit:
    """Return the mixture of one component, which needs no search: the mean and the variance of x."""
    centre = x.mean(0, dtype=torch.float64)
    centred = x - centre
    variance = centred.square().mean(0, keepdim=True) + floor
    one = torch.ones(1, dtype=torch.float64, device=x.device)
    bound = float(log_density(centred, torch.zeros_like(variance), variance, one).mean())
    return Fit(centre[None], variance, one, bound, 1, True)


def _scaled(x: Tensor) -> Scaled:
    """Prepare x [N, d] for products in float32, whose error grows with the distance from 0."""
    count, width = x.shape
    centre = x.mean(0, dtype=torch.float64).to(x.dtype)
    both = torch.empty(count, 2 * width, dtype=torch.float32, device=x.device)
    both[:, :width] = x - centre
    torch.square(both[:, :width], out=both[:, width:])

    # Equal examples have no scale.
    scale = float(both[:, width:].mean(dtype=torch.float64).sqrt()) or 1.0
    both[:, :width] /= scale
    both[:, width:] /= scale**2
    return Scaled(both, centre, scale)


def _expect(both: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Return r [N, k], the share of each component in each example, and the examples' log-likelihoods [N]."""
    mean, variance, weight = mixture
    precision = 1 / variance
    constant = weight.log() - 0.5 * ((mean.square() * precision).sum(1) + variance.log().sum(1))
    factors = torch.cat([mean * precision, -0.5 * precision], 1).float()
    # One product gives the linear and the quadratic term.
    log = torch.addmm(constant.float(), both, factors.T)
    total = log.logsumexp(1)
    return torch.threshold_(log.sub_(total[:, None]).exp_(), SHARE, 0.0), total


def _maximise(both: Tensor, shares: Tensor, least: float) -> Mixture:
    """Return the mixture that is likeliest given the shares [N, k], with variances of at least `least`."""
    count = shares.sum(0, dtype=torch.float64) + TINY
    mean, second = ((shares.T @ both).double() / count[:, None]).split(both.shape[1] // 2, 1)
    # The difference of two moments may come out negative by rounding.
    variance = (second - mean.square()).clamp_min_(0) + least
    return Mixture(mean, variance, count / len(both))
