"""Metrics of values: squared and absolute errors, and the coefficient of determination."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.losses import directed
from consilience.core.metrics import Metric, Sums
from consilience.metrics._targets import of_values, rows


@dataclass(frozen=True)
class MeanError(Metric):
    """The mean of an error over all values that have a target."""

    kinds: ClassVar[tuple[str, ...]] = ("value",)

    @property
    def higher(self) -> bool:
        return False

    def value(self, sums: Sums) -> float:
        return float(sums["error"] / sums["count"]) if float(sums["count"]) else math.nan


@dataclass(frozen=True)
class MSE(MeanError):
    """The mean squared error, mean (y - p)^2.

    >>> MSE()(torch.tensor([[1.0], [4.0]]), torch.tensor([[1.0], [2.0]]))
    2.0
    """

    called: ClassVar[str] = "mse"

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        answers, targets, there = of_values(p, y)
        return {"error": (targets - answers).square().sum(), "count": there.sum()}


@dataclass(frozen=True)
class MAE(MeanError):
    """The mean absolute error, mean |y - p|.

    >>> MAE()(torch.tensor([[1.0], [4.0]]), torch.tensor([[1.0], [2.0]]))
    1.0
    """

    called: ClassVar[str] = "mae"

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        answers, targets, there = of_values(p, y)
        return {"error": (targets - answers).abs().sum(), "count": there.sum()}


@dataclass(frozen=True)
class MeanAngle(MeanError):
    """The mean angle between vectors [N, k, *places] and their predictions, in degrees.

    A vector of length 0, or with a component that is missing, is no target.

    >>> round(MeanAngle()(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [3.0, 0.0]])), 3)
    22.5
    """

    called: ClassVar[str] = "mean_angle"

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        there = rows(directed(y).unsqueeze(1))[:, 0]
        answers, targets = rows(p[:, : y.shape[1]]).double()[there], rows(y).double()[there]
        # By both chords of unit vectors (Kahan): the arc cosine loses half the digits of small angles.
        answers, targets = F.normalize(answers, dim=1), F.normalize(targets, dim=1)
        apart, together = (answers - targets).norm(dim=1), (answers + targets).norm(dim=1)
        angles = torch.rad2deg(2 * torch.atan2(apart, together))
        return {"error": angles.sum(), "count": there.sum()}


@dataclass(frozen=True)
class R2(Metric):
    """The coefficient of determination 1 - sum (y - p)^2 / sum (y - mean y)^2, over examples and outputs.

    NaN where all targets are equal: they have no variance to explain.

    >>> R2()(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]))
    1.0
    """

    called: ClassVar[str] = "r2"
    kinds: ClassVar[tuple[str, ...]] = ("value",)

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        answers, targets, there = of_values(p, y)

        # Outputs have means of their own, so everything is kept per output.
        count = there.sum(0).double()
        mean = targets.sum(0) / count.clamp(min=1)
        spread = (targets - mean).square().mul(there).sum(0)
        return {"error": (targets - answers).square().sum(0), "count": count, "mean": mean, "spread": spread}

    def add(self, *parts: Sums) -> Sums:
        total = parts[0]
        for part in parts[1:]:
            # Sums of squares would cancel where the mean is far from 0, so spreads around means are merged
            # (Chan et al. 1983).
            count = total["count"] + part["count"]
            gap = part["mean"] - total["mean"]
            weight = part["count"] / count.clamp(min=1)
            total = {
                "error": total["error"] + part["error"],
                "count": count,
                "mean": total["mean"] + gap * weight,
                "spread": total["spread"] + part["spread"] + gap.square() * total["count"] * weight,
            }
        return total

    def value(self, sums: Sums) -> float:
        # The mean of equal numbers is off by rounding, which is no spread.
        rounding = sums["count"] * (1e-14 * sums["mean"]).square()
        spread = float(sums["spread"].where(sums["spread"] > rounding, torch.zeros(())).sum())
        return 1 - float(sums["error"].sum()) / spread if spread else math.nan
