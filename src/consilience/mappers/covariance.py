"""The Mahalanobis mapper: class means and one covariance of all tasks, from sums alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from consilience.core.correction import Learned, Me
from consilience.core.errors import ConsilienceError
from consilience.core.message import Item, Statistics
from consilience.mappers.mixture import Anchored, means


@lru_cache(maxsize=4)
def whitening(known: tuple[Item, ...], ridge: float) -> Tensor:
    """W [d, r] with W W^T = (S + ridge tr(S)/d I)^-1, the pseudo-inverse where `ridge` = 0; S the covariance within classes."""
    count = sum(float(i.tensors["count"].sum()) for i in known)
    second = sum(i.tensors["second"] for i in known) / count
    spread = torch.as_tensor(second)
    for i in known:
        n, mu = i.tensors["count"], means(i)
        spread = spread - (mu * n[n > 0][:, None]).T @ mu / count
    d = len(spread)
    values, vectors = torch.linalg.eigh((spread + spread.T) / 2)
    if ridge:
        values = values.clamp_min(0) + ridge * spread.trace() / d
    # what is left of a direction in which nothing varies is the rounding of the second moments
    there = values > d * torch.finfo(torch.float64).eps * torch.as_tensor(second).diagonal().sum() * (ridge == 0)
    return vectors[:, there] * values[there].rsqrt() if bool(there.any()) else torch.eye(d, dtype=torch.float64)


@dataclass(frozen=True)
class Mahalanobis(Anchored):
    """score = -min_c (psi - mu_c)^T S^-1 (psi - mu_c) over the classes of the source, S = 1/N sum_c sum_{i: y_i = c} (psi_i - mu_c)(psi_i - mu_c)^T.

    S is tied: over all classes of all anchors that are known, each anchor's classes being its own. Anchors are class sums, counts
    and second moments: they add, S is exact, and no example leaves its agent. S + `ridge` x (mean variance) I is inverted; with
    `ridge` = 0 it is the pseudo-inverse, which leaves out directions without variance, and any invertible linear map of the
    features changes nothing. It is LDA with equal priors, its classes grouped by source. Lee et al. 2018; Ge et al. 2023 (SKILL).
    """

    ridge: float = 1e-3
    on: Literal["features", "inputs"] = "features"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ridge < float("inf"):
            raise ConsilienceError(f"`ridge` should be at least 0 and finite. Found `ridge = {self.ridge}`.")

    def summarise(self, learned: Learned, me: Me) -> Statistics:
        return Statistics(learned.sums(self.psi(learned)))

    def scores(self, psi: Tensor, items: list[Item], known: list[Item]) -> Tensor:
        w = whitening(tuple(known), self.ridge)
        white, exact = psi @ w, "donot_use_mm_for_euclid_dist"
        return torch.stack([-torch.cdist(white, means(i) @ w, compute_mode=exact).square().min(1).values for i in items], 1)
