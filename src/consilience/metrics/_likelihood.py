"""Metrics of probabilities: perplexity, and the loss that is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from consilience.core.losses import DEFAULTS, NONE, Loss
from consilience.core.metrics import Metric, Sums

if TYPE_CHECKING:
    from consilience.core.source import Target


@dataclass(frozen=True)
class MeanLoss(Metric):
    """A mean over targets: its sums are the loss and the count."""

    @property
    def higher(self) -> bool:
        return False

    def value(self, sums: Sums) -> float:
        return float(sums["loss"]) / float(sums["count"]) if float(sums["count"]) else math.nan


@dataclass(frozen=True)
class Perplexity(MeanLoss):
    """exp of the mean of -log p(y) over targets: per token for a language model.

    A probability of 0 counts as the smallest positive number of its type, so that it is finite, and a row of
    zeros, which is no answer, as equal probabilities.

    >>> round(Perplexity()(torch.tensor([[0.5, 0.5], [0.875, 0.125]]), torch.tensor([0, 1])), 9)
    4.0
    """

    called: ClassVar[str] = "perplexity"
    kinds: ClassVar[tuple[str, ...]] = ("class",)

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        # -100 is no column to read from.
        there = y != NONE
        true = y.where(there, 0).unsqueeze(1)
        surprise = -possible(p, y).gather(1, true).squeeze(1).log()
        return {"loss": surprise[there].sum(), "count": there.sum()}

    def value(self, sums: Sums) -> float:
        return math.exp(super().value(sums))


@dataclass(frozen=True)
class EvaluationLoss(MeanLoss):
    """The mean loss over targets, by the loss that the task is trained by, without corrections and penalties.

    `loss` is None for cross entropy of classes and the squared error of others; a run puts in that of each
    task. Probabilities of 0 and 1 are rounded ones, so their loss is large and finite (as of `Perplexity`).

    >>> round(EvaluationLoss()(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)
    0.6931
    """

    loss: Loss | None = None

    called: ClassVar[str] = "loss"

    @property
    def name(self) -> str:
        # One name for all tasks: each has a loss of its own.
        return self.called

    def of(self, target: Target) -> EvaluationLoss:
        return EvaluationLoss(target.loss)

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        loss = self.loss or DEFAULTS["value" if y.is_floating_point() else "class"]
        if "class" in loss.kinds:
            p = possible(p, y)
        elif "labels" in loss.kinds:
            limits = torch.finfo(p.dtype)
            p = p.double().clamp(limits.tiny, 1 - limits.eps / 2)

        # Losses are of outputs, and these are what the predictions came from.
        found = loss(loss.outputs(p.double()), y)
        counts = torch.ones_like(found.values) if found.counts is None else found.counts
        return {"loss": (found.values * counts).double().sum(), "count": counts.double().sum()}


def possible(p: Tensor, y: Tensor) -> Tensor:
    """Return class probabilities [N, C, *places], in float64, with that of the target above 0."""
    least = torch.finfo(p.dtype).tiny
    p = p.double()

    # A row of zeros is no answer, which is to say nothing about the classes.
    p = torch.where(p.amax(1, keepdim=True) == 0, 1 / p.shape[1], p)
    true = y.where(y != NONE, 0).unsqueeze(1)
    return p.scatter(1, true, p.gather(1, true).clamp(min=least))
