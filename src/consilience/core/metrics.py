"""Metrics of predictions, and of a matrix R[i, j]: the score on source j after stage i (row 0: untrained)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch  # noqa: F401 (the examples use it)
from torch import Tensor

Metric = Callable[[Tensor, Tensor], float]
"""(predictions p [N, C], targets y [N] or [N, k]) -> a score, where more is better."""


def accuracy(p: Tensor, y: Tensor) -> float:
    """Return the share of samples whose likeliest class is right.

    A row of zeros, which says that no class is likely, is wrong.

    >>> accuracy(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([1, 1]))
    0.5
    >>> accuracy(torch.zeros(2, 3), torch.tensor([0, 1]))
    0.0
    """
    return float(((p.argmax(1) == y) & (p.amax(1) > 0)).double().mean())


def auroc(p: Tensor, y: Tensor) -> float:
    """Return the area under the ROC curve. Of more than two classes: each against the rest, averaged.

    Classes that do not occur in y are left out; with fewer than two it is NaN.

    >>> auroc(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 0, 1]))
    1.0
    """
    present = [int(label) for label in y.unique()]
    if len(present) < 2:
        return float("nan")
    areas = []
    # Of two classes one area says all: the other's is the same.
    for label in present[1:] if len(present) == 2 else present:
        # The area is a rank statistic (Mann-Whitney U); equal scores share the middle of their ranks.
        _, rank, count = p[:, label].double().unique(return_inverse=True, return_counts=True)
        middle = count.cumsum(0).double() - (count - 1) / 2
        positive = y == label
        n = float(positive.sum())
        above = float(middle[rank[positive]].sum()) - n * (n + 1) / 2
        areas.append(above / (n * (len(y) - n)))
    return float(np.mean(areas))


def r2(p: Tensor, y: Tensor) -> float:
    """Return the coefficient of determination 1 - sum (y - p)^2 / sum (y - mean y)^2.

    >>> r2(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]))
    1.0
    """
    # Constant targets have no variance to explain.
    spread = float((y - y.mean(0)).square().sum())
    return 1 - float((y - p[:, : y.shape[1]]).square().sum()) / spread if spread else float("nan")


METRICS: dict[str, Metric] = {"accuracy": accuracy, "auroc": auroc, "r2": r2}


def client_drift(base: Tensor, new: Tensor, sent: Tensor) -> dict[str, float]:
    """Measure how far clients moved from their base, and in how far in one direction.

    From parameters [n] and those that m clients sent [m, n]: distance = mean_i ||theta_i - base||,
    distance_max is the largest of them, and cosine = mean_i cos(theta_i - base, new - base) over clients that
    moved; NaN where nothing did.

    >>> client_drift(torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    {'distance': 2.0, 'distance_max': 2.0, 'cosine': 0.7071067811865475}
    """
    steps, step = (sent - base).double(), (new - base).double()
    # A client that did not move has no direction.
    far = steps.norm(dim=1)
    cosines = (steps @ step)[far > 0] / (far[far > 0] * step.norm())
    cosine = float(cosines.mean()) if len(cosines) and step.norm() > 0 else float("nan")
    return {"distance": float(far.mean()), "distance_max": float(far.max()), "cosine": cosine}


def summary(matrix: np.ndarray, learned_at: Sequence[int | None]) -> Mapping[str, float | None]:
    """Return score, forgetting, backward and forward transfer of R [stages + 1, sources].

    Source j is learned at stage l_j = learned_at[j] only; None: at several. T is the last stage.

    - score = mean_j R[T, j];
    - backward_transfer = mean (R[T, j] - R[l_j, j]), over sources learned before the last stage;
    - forgetting = mean (max_{0 < i < T} R[i, j] - R[T, j]), over the same;
    - forward_transfer = mean (R[l_j - 1, j] - R[0, j]), over sources learned after the first stage;
    - normalised = mean R[T, j] / R[l_j, j], over all sources that are learned.

    All but the score are None where a source is learned more than once, or where there is nothing to average.

    >>> r = np.array([[0.0, 0.2], [1.0, 0.3], [0.6, 0.9]])
    >>> {k: round(v, 3) for k, v in summary(r, [1, 2]).items()}
    {'score': 0.75, 'forgetting': 0.4, 'backward_transfer': -0.4, 'forward_transfer': 0.1, 'normalised': 0.8}
    """
    last = len(matrix) - 1
    found: dict[str, float | None] = {"score": float(matrix[last].mean())}

    # With a source that is learned twice, no stage is "before" or "after" it.
    once = all(stage is not None for stage in learned_at)
    learned = [stage or 0 for stage in learned_at]
    before_last = [j for j, stage in enumerate(learned) if 0 < stage < last] if once else []
    after_first = [j for j, stage in enumerate(learned) if stage > 1] if once else []
    scored = [j for j, stage in enumerate(learned) if stage > 0 and matrix[stage, j] > 0] if once else []

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    found["forgetting"] = mean([float(matrix[1:last, j].max() - matrix[last, j]) for j in before_last])
    found["backward_transfer"] = mean([float(matrix[last, j] - matrix[learned[j], j]) for j in before_last])
    found["forward_transfer"] = mean([float(matrix[learned[j] - 1, j] - matrix[0, j]) for j in after_first])
    found["normalised"] = mean([float(matrix[last, j] / matrix[learned[j], j]) for j in scored])
    return found


def global_forgetting(matrix: np.ndarray) -> float | None:
    """Return mean_j (max_{0 < i < T} R[i, j] - R[T, j]) over all sources; None with one stage.

    Unlike `summary`, it counts sources that are learned several times.

    >>> global_forgetting(np.array([[0.0, 0.0], [0.5, 1.0], [1.0, 0.75]]))
    -0.125
    """
    last = len(matrix) - 1
    if last < 2:
        return None
    lost = [
        float(np.nanmax(scores[:-1]) - scores[-1])
        for scores in matrix[1:].T
        if np.isfinite(scores[:-1]).any() and np.isfinite(scores[-1])
    ]
    return float(np.mean(lost)) if lost else None


def worst(scores: np.ndarray, fraction: float) -> float:
    """Return the mean over the lowest `fraction` of the scores [n], at least one. NaN ones are left out.

    >>> worst(np.array([0.9, 0.1, 0.5, 0.3]), 0.5)
    0.2
    """
    kept = np.sort(scores[np.isfinite(scores)])
    if not len(kept):
        return float("nan")
    # A little less, because 0.1 x 30 is more than 3 in floating point.
    count = max(1, math.ceil(fraction * len(kept) - 1e-9))
    return float(kept[:count].mean())
