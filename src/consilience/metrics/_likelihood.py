"""Metrics of probabilities: perplexity, and the loss that is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from consilience.core.metrics import Metric, Sums
from consilience.metrics._targets import of_classes, of_values

if TYPE_CHECKING:
    from consilience.core.source import Source


@dataclass(frozen=True)
class Perplexity(Metric):
    """exp of the mean of -log p(y) over targets: per token for a language model.

    Probabilities of 0 count as the smallest positive number of their type, so that it is finite.

    >>> round(Perplexity()(torch.tensor([[0.5, 0.5], [0.875, 0.125]]), torch.tensor([0, 1])), 9)
    4.0
    """

    called: ClassVar[str] = "perplexity"
    kinds: ClassVar[tuple[str, ...]] = ("class",)

    @property
    def higher(self) -> bool:
        return False

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        return surprise(p, y)

    def value(self, sums: Sums) -> float:
        return math.exp(float(sums["loss"] / sums["count"])) if float(sums["count"]) else math.nan


@dataclass(frozen=True)
class EvaluationLoss(Metric):
    """The mean loss over targets: cross entropy of classes, binary cross entropy of labels, or squared error.

    `kind` is that of the targets; a run fills it in for each source.

    >>> round(EvaluationLoss("class")(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)
    0.6931
    """

    kind: str = ""

    called: ClassVar[str] = "loss"

    @property
    def name(self) -> str:
        return self.called

    @property
    def higher(self) -> bool:
        return False

    def of(self, source: Source) -> EvaluationLoss:
        return replace(self, kind=source.kind)

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        # Without a kind, whole numbers are classes and all other targets are values.
        if self.kind == "class" or not y.is_floating_point():
            return surprise(p, y)
        answers, targets, there = of_values(p, y)

        # A probability of 0 or 1 may be a rounded one, so its loss is large and finite.
        if self.kind == "labels":
            least = torch.finfo(p.dtype).tiny
            yes, no = answers.clamp(min=least).log(), (1 - answers).clamp(min=least).log()
            loss = -(targets * yes + (1 - targets) * no)
        else:
            loss = (targets - answers).square()
        return {"loss": loss.mul(there).sum(), "count": there.sum()}

    def value(self, sums: Sums) -> float:
        return float(sums["loss"] / sums["count"]) if float(sums["count"]) else math.nan


def surprise(p: Tensor, y: Tensor) -> Sums:
    """Return the sum of -log p(y) over targets, and their count."""
    p, y = of_classes(p, y)
    true = p.gather(1, y[:, None])[:, 0]
    return {"loss": -true.clamp(min=torch.finfo(p.dtype).tiny).double().log().sum(), "count": (y >= 0).sum()}
