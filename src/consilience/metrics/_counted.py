"""Metrics that count: accuracy, F1 and intersection over union."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.losses import NONE
from consilience.core.metrics import Metric, Sums
from consilience.metrics._targets import of_classes, rows


@dataclass(frozen=True)
class Accuracy(Metric):
    """The fraction of targets whose likeliest class is right.

    A row of zeros, which says that no class is likely, is wrong.

    >>> Accuracy()(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([1, 1]))
    0.5
    >>> Accuracy()(torch.zeros(2, 3), torch.tensor([0, 1]))
    0.0
    """

    called: ClassVar[str] = "accuracy"
    kinds: ClassVar[tuple[str, ...]] = ("class",)

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        # A missing target, -100, is no column. Nothing here waits for the device.
        right = (p.argmax(1) == y) & (p.amax(1) > 0)
        return {"right": right.sum(), "count": (y != NONE).sum()}

    def value(self, sums: Sums) -> float:
        return share(sums["right"], sums["count"])


@dataclass(frozen=True)
class TopK(Metric):
    """The fraction of targets whose class is among the k likeliest; of equal ones the first come first.

    >>> TopK(2)(torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]), torch.tensor([2, 2]))
    0.5
    """

    k: int = 5

    called: ClassVar[str] = "top_k"
    kinds: ClassVar[tuple[str, ...]] = ("class",)

    def __post_init__(self) -> None:
        whole_number(k=self.k)

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        p, y = of_classes(p, y)
        true = p.gather(1, y[:, None])

        # Ties are broken as argmax breaks them, so that k = 1 is accuracy.
        earlier = torch.arange(p.shape[1], device=p.device) < y[:, None]
        rank = ((p > true) | ((p == true) & earlier)).sum(1)
        right = (rank < self.k) & (true[:, 0] > 0)
        return {"right": right.sum(), "count": torch.tensor(len(y))}

    def value(self, sums: Sums) -> float:
        return share(sums["right"], sums["count"])


@dataclass(frozen=True)
class Counted(Metric):
    """What follows from three counts per class or label: right (TP), predicted (TP + FP), true (TP + FN)."""

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        # Targets of labels have the shape of the predictions, those of classes one dimension less.
        if y.dim() == p.dim():
            return counts_of_labels(p[:, : y.shape[1]], y, getattr(self, "threshold", 0.5))
        classes = p.shape[1]
        p, y = of_classes(p, y)

        # A row of zeros predicts nothing.
        answer = p.argmax(1)
        answered = p.amax(1) > 0
        found = {"right": y[(answer == y) & answered], "predicted": answer[answered], "true": y}
        return {name: index.bincount(minlength=classes) for name, index in found.items()}


def counts_of_labels(p: Tensor, y: Tensor, threshold: float) -> Sums:
    """Return the three counts [L] for labels: probabilities p and targets y [N, L, *places]."""
    p, y = rows(p), rows(y)

    # A missing target, NaN, is neither true nor counted as predicted.
    predicted, true = (p > threshold) & ~y.isnan(), y == 1
    return {"right": (predicted & true).sum(0), "predicted": predicted.sum(0), "true": true.sum(0)}


@dataclass(frozen=True)
class BalancedAccuracy(Counted):
    """The mean of TP / (TP + FN) over the classes that occur: their recall.

    >>> p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    >>> BalancedAccuracy()(p, torch.tensor([0, 0, 0, 1]))
    0.3333333333333333
    """

    called: ClassVar[str] = "balanced_accuracy"
    kinds: ClassVar[tuple[str, ...]] = ("class",)

    def value(self, sums: Sums) -> float:
        return mean_share(sums["right"], sums["true"])


@dataclass(frozen=True)
class F1(Counted):
    """2 TP / (2 TP + FP + FN).

    "macro" is the mean over classes (labels) that occur or are predicted, "micro" is that of the sums of all
    counts: for classes the accuracy. Labels with a probability above `threshold` are predicted.

    >>> p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    >>> round(F1()(p, torch.tensor([0, 0, 1, 1])), 4), F1("micro")(p, torch.tensor([0, 0, 1, 1]))
    (0.7333, 0.75)
    """

    average: str = "macro"
    threshold: float = 0.5

    called: ClassVar[str] = "f1"
    kinds: ClassVar[tuple[str, ...]] = ("class", "labels")

    def __post_init__(self) -> None:
        if self.average not in ("macro", "micro"):
            raise ConsilienceError(f"`average` must be macro or micro, got {self.average!r}.")
        check_threshold(self.threshold)

    def value(self, sums: Sums) -> float:
        # With 2 TP / (predicted + true), no false counts are needed.
        twice, total = 2 * sums["right"], sums["predicted"] + sums["true"]
        return share(twice.sum(), total.sum()) if self.average == "micro" else mean_share(twice, total)


@dataclass(frozen=True)
class IoU(Counted):
    """The mean of TP / (TP + FP + FN) over classes (labels) that occur or are predicted.

    >>> p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    >>> round(IoU()(p, torch.tensor([0, 0, 1, 1])), 4)
    0.5833
    """

    threshold: float = 0.5

    called: ClassVar[str] = "iou"
    kinds: ClassVar[tuple[str, ...]] = ("class", "labels")

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def value(self, sums: Sums) -> float:
        return mean_share(sums["right"], sums["predicted"] + sums["true"] - sums["right"])


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that is no probability."""
    if not 0 <= threshold < 1:
        raise ConsilienceError(f"`threshold` must be in [0, 1), got {threshold!r}.")


def share(part: Tensor, total: Tensor) -> float:
    """Return part / total of two numbers; NaN of nothing."""
    return float(part) / float(total) if float(total) else math.nan


def mean_share(parts: Tensor, totals: Tensor) -> float:
    """Return the mean of parts / totals [C] where there is something; NaN where nowhere is."""
    # A class without any count has no share, rather than one of 0.
    some = totals > 0
    return float((parts[some].double() / totals[some].double()).mean()) if bool(some.any()) else math.nan
