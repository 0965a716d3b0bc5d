"""Samplers: which examples a step sees. Keyed like all else; a part of Training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Sampler(ABC):
    """plan(targets [N], batch_size, epoch, generator) -> the index batches of one pass."""

    @abstractmethod
    def plan(
        self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator
    ) -> list[Tensor]: ...


@dataclass(frozen=True)
class Shuffle(Sampler):
    """Every example once a pass, in a new order; `drop_last` leaves out a last batch that is not full.

    >>> plan = Shuffle().plan(torch.zeros(5), 2, 0, torch.Generator().manual_seed(0))
    >>> [len(b) for b in plan], sorted(torch.cat(plan).tolist())
    ([2, 2, 1], [0, 1, 2, 3, 4])
    """

    drop_last: bool = False

    def plan(self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator) -> list[Tensor]:
        batches = list(torch.randperm(len(targets), generator=generator).split(batch_size))
        return (
            batches[:-1] if self.drop_last and len(batches) > 1 and len(batches[-1]) < batch_size else batches
        )
