"""Batches: one part of a step, of one source and one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one source. A step has one or more batches, and each is an objective of its own."""

    x: Tensor
    """Inputs [B, ...]."""
    y: Tensor
    """Targets: classes [B], or values [B, k]."""
    task: str | None = None
    """What the model is given as task."""
    w: Tensor | None = None
    """Weights of the samples [B], 0 for padding; None: all 1."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Named tensors [B, ...] that belong to the samples, such as stored logits."""
    source: str = ""
    """The name of the source."""
    weight: float | None = None
    """The weight of its loss among the objectives. None: 1 / (number of such batches). 0: for `rows` only."""
    drawn_by: str = ""
    """The name of the correction that drew it; set by the loop."""

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values [B] over the samples that count: sum w v / sum w."""
        return values.mean() if self.w is None else (values * self.w).sum() / self.w.sum()


def sample_losses(out: Tensor, y: Tensor, kind: str) -> Tensor:
    """Return the loss of each sample [B]: cross-entropy for classes, mean squared error for values."""
    if kind == "class":
        return F.cross_entropy(out, y, reduction="none")
    # A model may have more outputs than there are targets.
    return (out[:, : y.shape[1]] - y).square().mean(1)


def mean_loss(out: Tensor, batch: Batch, kind: str) -> Tensor:
    """Return the loss of a batch: the mean over its samples, by their weights."""
    # One fused call where it is possible: it is the loss of almost every step.
    if batch.w is None and kind == "class":
        return F.cross_entropy(out, batch.y)
    return batch.mean(sample_losses(out, batch.y, kind))
