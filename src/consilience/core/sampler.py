"""Samplers: which examples a step sees. A part of `Training`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.takes import Takes


class Sampler(Takes, ABC):
    """An order of examples. Subclasses are frozen dataclasses."""

    instead: ClassVar[str] = "use Shuffle"
    needs_lengths: ClassVar[bool] = False
    """Whether `plan` is also given `lengths=` [N] of sequences; None where all inputs have one shape."""

    @abstractmethod
    def plan(self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator) -> list[Tensor]:
        """Return the batches of one pass over `targets` [N], as indices; at least one.

        The generator is keyed by seed, source, visit and epoch, so that a plan can be made again when a run
        resumes.
        """


@dataclass(frozen=True)
class Shuffle(Sampler):
    """Every example once per pass, in a new order. `drop_last` leaves out a last batch that is not full.

    >>> plan = Shuffle().plan(torch.zeros(5), 2, 0, torch.Generator().manual_seed(0))
    >>> [len(b) for b in plan], sorted(torch.cat(plan).tolist())
    ([2, 2, 1], [0, 1, 2, 3, 4])
    """

    # A last batch of one sample breaks batch norm and makes a noisy step.
    drop_last: bool = False

    def plan(self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator) -> list[Tensor]:
        batches = list(torch.randperm(len(targets), generator=generator).split(batch_size))
        # A single batch stays, or there would be nothing to train on.
        if self.drop_last and len(batches) > 1 and len(batches[-1]) < batch_size:
            return batches[:-1]
        return batches
