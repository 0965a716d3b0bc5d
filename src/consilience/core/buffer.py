"""Buffers: which of the examples that were seen are kept.

A policy gives each example a key when it arrives, and keeps those with the smallest keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.contexts import Learned
from consilience.core.errors import ConsilienceError
from consilience.core.losses import NONE
from consilience.core.takes import Takes


class Policy(Takes, ABC):
    """Which examples a buffer keeps. Subclasses are frozen dataclasses, without side effects.

    An example's key never changes. So what is kept of a stream does not depend on how the stream was cut, and
    a buffer that shrinks keeps the best of what it had.
    """

    instead: ClassVar[str] = "use policy=memory.reservoir()"
    grows: ClassVar[bool] = False
    """Whether the size is that of each class, so that the buffer grows with the number of classes."""
    needs_boundaries: ClassVar[bool] = False
    """Whether it needs to know where a source ends."""

    @abstractmethod
    def keys(self, learned: Learned, size: int) -> Tensor:
        """Return keys [N] of the training examples of a source, in float64. The smallest are kept longest."""

    @abstractmethod
    def keep(self, keys: Tensor, y: Tensor, size: int) -> Tensor:
        """Return which of M examples with these keys [M] and targets [M] stay: bool [M]."""


@dataclass(frozen=True)
class Reservoir(Policy):
    """Reservoir sampling: every example seen is kept with probability size / seen.

    Each draws a uniform key and the `size` smallest stay. Vitter 1985.
    """

    def keys(self, learned: Learned, size: int) -> Tensor:
        return torch.rand(len(learned.source.train), generator=learned.generator, dtype=torch.float64)

    def keep(self, keys: Tensor, y: Tensor, size: int) -> Tensor:
        return smallest(keys, size)


def smallest(keys: Tensor, size: int) -> Tensor:
    """Mark the `size` smallest keys: bool [M].

    >>> smallest(torch.tensor([0.3, 0.1, 0.2]), 2).tolist()
    [False, True, True]
    """
    # By rank, not by a threshold: equal keys must not exceed the size.
    kept = torch.zeros(len(keys), dtype=torch.bool)
    kept[keys.argsort(stable=True)[:size]] = True
    return kept


def ranks(keys: Tensor, y: Tensor) -> Tensor:
    """Return the rank [M] of each key among the keys of its class, from 0.

    >>> ranks(torch.tensor([0.3, 0.1, 0.2]), torch.tensor([7, 7, 8])).tolist()
    [1, 0, 0]
    """
    if y.is_floating_point() or y.dim() > 1:
        raise ConsilienceError(
            "a buffer by class needs one class per example as target, got others; use memory.reservoir()."
        )
    order = keys.argsort(stable=True)
    # Then by class: the sort is stable, so that each class stays sorted by key.
    order = order[y.cpu()[order].argsort(stable=True)]
    _, counts = y.cpu()[order].unique_consecutive(return_counts=True)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)) - first)


def equal_shares(keys: Tensor, y: Tensor, size: int) -> Tensor:
    """Mark the smallest keys of each class, equally many of each: bool [M].

    What small classes leave of `size` goes to larger ones. Examples without a class are not kept.

    >>> equal_shares(torch.arange(5.0), torch.tensor([0, 0, 0, 0, 1]), 3).tolist()
    [True, True, False, False, True]
    """
    # First all keys of rank 0, then all of rank 1, and so on; within a rank by key.
    within = keys.argsort(stable=True).argsort() / (2 * max(1, len(keys)))
    there = y.cpu() != NONE
    order = (ranks(keys, y).double() + within).masked_fill(~there, torch.inf)
    return smallest(order, size) & there
