"""Samplers: which examples a step sees. A part of `Training`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.source import Examples, Source, Target
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

    def shares(self, sizes: Sequence[int], done: float) -> Sequence[float] | None:
        """Return the share of each source in a step over several of them [m], which sum to 1.

        `sizes` [m] are their numbers of training examples, and `done` in [0, 1] is the part of all epochs
        that is done, 1 in the last. None: each source has a batch of one size, and an objective of one
        weight. Shares decide both, and an epoch has as many examples as all sources.
        """
        return None

    def check(self, sources: Sequence[Source], epochs: int, pools: bool) -> None:
        """Refuse, before a run, sources that it cannot sample, and warn of what would have no effect.

        `epochs` is how long a source is trained, over all visits of an agent; `pools` says that a correction
        may gather several sources into one.
        """


@dataclass(frozen=True, eq=False)
class EpochView:
    """What a sampler that keeps a state sees of one source before an epoch."""

    source: str
    """The name of the source."""
    examples: Examples
    """Its training examples, on the device."""
    target: Target
    """What its targets are."""
    epoch: int
    """Earlier epochs on it, over all visits of the agent."""
    epochs: int
    """All epochs on it, over all visits of the agent."""
    by_output: Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]
    """by_output(f): f(outputs [B, C, *places], targets) -> [B] of all examples [N] in double precision.

    The outputs are those of the present model in eval mode, with -inf for classes that do not compete. A
    forward pass, which the ledger counts."""
    by_input: Callable[[Callable[[Any], Tensor]], Tensor]
    """by_input(f): f(inputs [B, ...]) -> [B] of all examples [N] in double precision, counted too."""
    generator: torch.Generator
    """Keyed by seed and source: the same numbers in each epoch."""


class Scored(Sampler):
    """A sampler that keeps a state per source, such as how difficult each example is.

    The state is a dictionary of tensors on the CPU. It goes on over the visits to a source, and is kept in
    checkpoints.
    """

    @abstractmethod
    def advance(self, state: Mapping[str, Tensor], view: EpochView) -> dict[str, Tensor]:
        """Return the state for an epoch; `state` is that of the epoch before, {} at first."""

    @abstractmethod
    def plan(
        self,
        targets: Tensor,
        batch_size: int,
        epoch: int,
        generator: torch.Generator,
        state: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> list[Tensor]:
        """Return the batches of one pass, as `Sampler.plan`, by the state for this epoch."""

    def weights(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """Return how much each example counts [N], > 0 for all that are planned; None: all alike."""
        return None


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
