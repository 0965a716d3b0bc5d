"""Batches: one part of a step, of one source and one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consilience.core.augment import Origins
from consilience.core.losses import present
from consilience.core.tree import Input


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one source. A step has one or more batches, and each is an objective of its own."""

    x: Input
    """Inputs [B, ...]."""
    y: Tensor
    """Targets: classes [B, *places], or values or labels [B, k, *places]."""
    task: str | None = None
    """What the model is given as task."""
    w: Tensor | None = None
    """Weights of the samples [B], 0 for padding; None: all 1."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Named tensors [B, ...] that belong to the samples, such as stored logits."""
    source: str = ""
    """The source whose samples these are, and whose augmentation they get; "" for generated ones."""
    weight: float | None = None
    """The weight of its loss among the objectives. None: 1 / (number of such batches). 0: for `rows` only."""
    target: str = ""
    """The key of what its targets are in `LabelFrame.targets`; "" where all tasks are alike."""
    drawn_by: str = ""
    """The name of the correction that drew it; set by the loop."""
    origins: Origins | None = None
    """The source of each sample, where there are several with an augmentation; the loop takes it away."""
    index: Tensor | None = None
    """The index of each sample among the training examples of its part [B], where a correction has
    `needs_index`; None of batches that a correction drew."""

    def kept(self, table: Tensor, values: Tensor) -> Tensor:
        """Return a table [N, ...] of one entry per example, with `values` [B, ...] at these samples.

        Padding is left out; of a sample that is there twice, one value is kept.

        >>> part = Batch(torch.zeros(2, 1), torch.zeros(2), index=torch.tensor([2, 0]))
        >>> part.kept(torch.zeros(3), torch.tensor([5.0, 7.0]))
        tensor([7., 0., 5.])
        """
        assert self.index is not None, "only parts of the sources have an index, where `needs_index` asks"
        if self.w is None:
            return table.index_copy(0, self.index, values)
        # Padding goes to one entry more, as its index is that of some other sample.
        spare = torch.cat([table, table[:1]])
        return spare.index_copy(0, torch.where(self.w > 0, self.index, len(table)), values)[:-1]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values [B] or [B, *places] over the samples that count: sum w v / sum w.

        Places without a target, such as padding, do not count.
        """
        if values.dim() == 1:
            return values.mean() if self.w is None else (values * self.w).sum() / self.w.sum()
        there = self.there(values)
        if self.w is not None:
            there = there * self.w.view(-1, *[1] * (values.dim() - 1))
        return (values * there).sum() / there.sum().clamp_min(torch.finfo(there.dtype).tiny)

    def there(self, like: Tensor) -> Tensor:
        """Return 1 for places that have a target, else 0, as values [B, *places]."""
        found = present(self.y)
        # A place of values or labels has a target where any of its outputs has one.
        found = found.any(1) if self.y.is_floating_point() else found
        # One target for a whole sample says nothing about its places.
        if found.dim() < like.dim():
            return torch.ones_like(like)
        return found.to(like.dtype)


def first_alike(parts: Sequence[Batch]) -> list[int]:
    """Return for each batch the number of the first one that has the same inputs: the very same object.

    >>> x, y = torch.zeros(2, 3), torch.zeros(2)
    >>> first_alike([Batch(x, y), Batch(x.clone(), y), Batch(x, y + 1)])
    [0, 1, 0]
    """
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(part.x), i) for i, part in enumerate(parts)]
