"""Batches: one part of a step, of one source and one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """x [B, ...], y [B] or [B, k], the weights of the samples w [B] (0 pads; None: all 1), the task, and extra named
    tensors [B, ...] such as stored logits. A step has one or more parts; each is a row of its own."""

    x: Tensor
    y: Tensor
    task: str | None = None
    w: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    source: str = ""
    """Which source it comes from."""
    weight: float | None = None
    """Of its own loss among the objectives; None: 1 / (number of such parts). 0: it is forwarded, and only `rows` use it."""
    drawn_by: str = ""
    """The correction that drew it; set by the loop."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values [B] over the samples that count: sum w v / sum w."""
        return values.mean() if self.w is None else (values * self.w).sum() / self.w.sum()


def sample_losses(out: Tensor, y: Tensor, kind: str) -> Tensor:
    """The loss of each sample [B]: cross-entropy for classes, the squared error averaged over outputs for values."""
    if kind == "class":
        return F.cross_entropy(out, y, reduction="none")
    return (out[:, : y.shape[1]] - y).square().mean(1)


def mean_loss(out: Tensor, batch: Batch, kind: str) -> Tensor:
    """The loss of a batch: the mean over its samples, weighted where some are padding."""
    if batch.w is None and kind == "class":
        return F.cross_entropy(out, batch.y)
    return batch.mean(sample_losses(out, batch.y, kind))
