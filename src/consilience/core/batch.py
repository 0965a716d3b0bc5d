"""Batches: one part of a step, of one source and one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    owner: str = ""
    """The correction that drew it; set by the loop."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values [B] over the samples that count: sum w v / sum w."""
        return values.mean() if self.w is None else (values * self.w).sum() / self.w.sum()
