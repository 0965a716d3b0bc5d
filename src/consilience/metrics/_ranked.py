"""The area under the ROC curve, which depends on the order of all scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch  # noqa: F401 (the examples use it)
from torch import Tensor

from consilience.core.metrics import Metric, Sums
from consilience.metrics._targets import of_classes, rows


@dataclass(frozen=True)
class AUROC(Metric):
    """The area under the ROC curve. Of more than two classes: each against the rest, averaged.

    Classes that do not occur are left out; with fewer than two it is NaN. Of labels it is the mean over those
    that have positives and negatives. A rank needs all scores, so it keeps them: N x C numbers.

    >>> AUROC()(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 0, 1]))
    1.0
    """

    called: ClassVar[str] = "auroc"
    kinds: ClassVar[tuple[str, ...]] = ("class", "labels")
    keeps: ClassVar[bool] = True

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        if y.dim() == p.dim():
            return {"scores": rows(p[:, : y.shape[1]]).cpu(), "targets": rows(y).cpu()}
        scores, targets = of_classes(p, y)
        return {"scores": scores.cpu(), "targets": targets.cpu()}

    def value(self, sums: Sums) -> float:
        p, y = sums["scores"], sums["targets"]
        if y.dim() == 2:
            columns = [(p[:, j], y[:, j], ~y[:, j].isnan()) for j in range(y.shape[1])]
            areas = [area(scores[there], targets[there] == 1) for scores, targets, there in columns]
        else:
            present = [int(label) for label in y.unique()]
            # Of two classes one area says all: the other's is the same.
            areas = [area(p[:, c], y == c) for c in (present[1:] if len(present) == 2 else present)]
        defined = [value for value in areas if value == value]
        return float(np.mean(defined)) if defined else math.nan


def area(scores: Tensor, positive: Tensor) -> float:
    """Return the probability that a positive has a higher score than a negative; NaN without both.

    >>> area(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, True, False, True]))
    0.875
    """
    n = float(positive.sum())
    if n in (0, len(positive)):
        return math.nan

    # The area is a rank statistic (Mann-Whitney U); equal scores share the middle of their ranks.
    _, rank, count = scores.double().unique(return_inverse=True, return_counts=True)
    middle = count.cumsum(0).double() - (count - 1) / 2
    above = float(middle[rank[positive]].sum()) - n * (n + 1) / 2
    return above / (n * (len(positive) - n))
