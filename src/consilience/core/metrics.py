"""Metrics: of predictions, and of the matrix R[i, j], the score on source j after stage i (row 0: before any training)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch  # noqa: F401 (the examples use it)
from torch import Tensor

Metric = Callable[[Tensor, Tensor], float]


def accuracy(p: Tensor, y: Tensor) -> float:
    """The share of samples whose likeliest class is the right one; a row of zeros, said to be of no class, is wrong.

    >>> accuracy(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([1, 1]))
    0.5
    >>> accuracy(torch.zeros(2, 3), torch.tensor([0, 1]))
    0.0
    """
    return float(((p.argmax(1) == y) & (p.amax(1) > 0)).double().mean())


def auroc(p: Tensor, y: Tensor) -> float:
    """The area under the ROC curve; with more than two classes, one against the rest, averaged over the classes present.

    >>> auroc(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 0, 1]))
    1.0
    """
    present = [int(c) for c in y.unique()]
    if len(present) < 2:
        return float("nan")
    areas = []
    for c in present[1:] if len(present) == 2 else present:
        _, rank, count = p[:, c].double().unique(return_inverse=True, return_counts=True)
        middle = count.cumsum(0).double() - (count - 1) / 2
        positive = y == c
        n = float(positive.sum())
        above = float(middle[rank[positive]].sum()) - n * (n + 1) / 2
        areas.append(above / (n * (len(y) - n)))
    return float(np.mean(areas))


def r2(p: Tensor, y: Tensor) -> float:
    """The coefficient of determination 1 - sum (y - p)^2 / sum (y - mean y)^2.

    >>> r2(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]))
    1.0
    """
    spread = float((y - y.mean(0)).square().sum())
    return 1 - float((y - p[:, : y.shape[1]]).square().sum()) / spread if spread else float("nan")


def client_drift(base: Tensor, new: Tensor, told: Tensor) -> dict[str, float]:
    """How far clients went from what they began with, and how much one way: from parameters [n] and those told [m, n].

    distance = mean_i ||theta_i - base||, distance_max = max_i of it, cosine = mean_i cos(theta_i - base, new - base), over
    those that moved; NaN where nothing did.

    >>> client_drift(torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    {'distance': 2.0, 'distance_max': 2.0, 'cosine': 0.7071067811865475}
    """
    steps, step = (told - base).double(), (new - base).double()
    far = steps.norm(dim=1)
    cosines = (steps @ step)[far > 0] / (far[far > 0] * step.norm())
    cosine = float(cosines.mean()) if len(cosines) and step.norm() > 0 else float("nan")
    return {"distance": float(far.mean()), "distance_max": float(far.max()), "cosine": cosine}


METRICS: dict[str, Metric] = {"accuracy": accuracy, "auroc": auroc, "r2": r2}


def summary(matrix: np.ndarray, learned_at: Sequence[int | None]) -> Mapping[str, float | None]:
    """Score, forgetting, backward and forward transfer of R [stages + 1, sources]; source j is learned at stage learned_at[j] only.

    ACC = mean_j R[T, j]; over sources learned before the last stage: BWT = mean (R[T, j] - R[l_j, j]), forgetting =
    mean (max_{0 < i < T} R[i, j] - R[T, j]); over those learned after the first: FWT = mean (R[l_j - 1, j] - R[0, j]);
    over all learned: normalised = mean R[T, j] / R[l_j, j]. All but ACC are None where a source is learned more than once, or
    where there is nothing to average.

    >>> r = np.array([[0.0, 0.2], [1.0, 0.3], [0.6, 0.9]])
    >>> {k: round(v, 3) for k, v in summary(r, [1, 2]).items()}
    {'score': 0.75, 'forgetting': 0.4, 'backward_transfer': -0.4, 'forward_transfer': 0.1, 'normalised': 0.8}
    """
    last = len(matrix) - 1
    out: dict[str, float | None] = {"score": float(matrix[last].mean())}
    clear = all(at is not None for at in learned_at)
    at = [a or 0 for a in learned_at]
    past = [j for j, a in enumerate(at) if 0 < a < last] if clear else []
    later = [j for j, a in enumerate(at) if a > 1] if clear else []

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    out["forgetting"] = mean([float(matrix[1:last, j].max() - matrix[last, j]) for j in past])
    out["backward_transfer"] = mean([float(matrix[last, j] - matrix[at[j], j]) for j in past])
    out["forward_transfer"] = mean([float(matrix[at[j] - 1, j] - matrix[0, j]) for j in later])
    whole = [j for j, a in enumerate(at) if a > 0 and matrix[a, j] > 0] if clear else []
    out["normalised"] = mean([float(matrix[last, j] / matrix[at[j], j]) for j in whole])
    return out


def global_forgetting(matrix: np.ndarray) -> float | None:
    """mean_j (max_{0 < i < T} R[i, j] - R[T, j]) over all sources, however often each is learned; None with one stage.

    >>> global_forgetting(np.array([[0.0, 0.0], [0.5, 1.0], [1.0, 0.75]]))
    -0.125
    """
    last = len(matrix) - 1
    if last < 2:
        return None
    lost = [
        float(np.nanmax(r[:-1]) - r[-1])
        for r in matrix[1:].T
        if np.isfinite(r[:-1]).any() and np.isfinite(r[-1])
    ]
    return float(np.mean(lost)) if lost else None


def worst(scores: np.ndarray, fraction: float) -> float:
    """The mean over the lowest `fraction` of the scores [n], at least one; NaN ones are left out.

    >>> worst(np.array([0.9, 0.1, 0.5, 0.3]), 0.5)
    0.2
    """
    kept = np.sort(scores[np.isfinite(scores)])
    return float(kept[: max(1, math.ceil(fraction * len(kept) - 1e-9))].mean()) if len(kept) else float("nan")
