"""Makers of synthetic memory: samples that stand for the data of an expert that is given as a model alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from consilience.core.buffer import ranks, smallest
from consilience.core.errors import ConsilienceError
from consilience.core.params import all_finite
from consilience.core.takes import Takes
from consilience.core.teacher import Teacher
from consilience.core.tree import Input

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

CHUNK = 1024
"""Inputs per forward pass without gradients."""


@dataclass(frozen=True)
class Wanted:
    """What samples a maker is asked for."""

    counts: Mapping[int, int]
    """The number of samples of each class, by the receiver's column."""
    shape: tuple[int, ...] | None
    """The shape of one sample; None for inputs of several parts, or ragged ones."""
    dtype: torch.dtype
    device: torch.device
    student: Teacher | None = None
    """Who learns from the samples, over the teacher's classes; for makers that look for what it lacks."""

    @property
    def total(self) -> int:
        """The number of all samples."""
        return sum(self.counts.values())


class Maker(Takes, ABC):
    """Who makes the samples that stand for an expert's data. Subclasses are frozen dataclasses.

    Pure in the teacher, what is wanted, and the generator.
    """

    instead: ClassVar[str] = "use memory.auxiliary"
    needs_gradients: ClassVar[bool] = False
    """Whether it needs gradients of the teacher's answers with respect to its inputs."""

    @abstractmethod
    def make(self, teacher: Teacher, wanted: Wanted, generator: torch.Generator) -> tuple[Input, Tensor]:
        """Return samples [n, ...] and the classes [n] that they stand for, by the receiver's columns.

        n is `wanted.total`. Classes are among the teacher's.
        """

    def refuse(self, facts: ScheduleFacts, size: int) -> str | None:
        """Return why it cannot make up to `size` samples per expert in such a schedule, and what to do.

        None: it can.
        """
        return None


def answers(teacher: Teacher, x: Input, ask: Callable[[Teacher, Input], Tensor] = Teacher.__call__) -> Tensor:
    """Return a teacher's logits [N, k], or what else it is asked, without gradients.

    Refuses NaN and infinity by the teacher's name.
    """
    with torch.no_grad():
        pieces = [ask(teacher, x if isinstance(x, Tensor) else x.trim()) for x in x.split(CHUNK)]
    found = torch.cat(pieces)
    if not all_finite(found):
        raise ConsilienceError(
            f"answers of an expert must be finite, got NaN or infinity from {teacher.name!r}; leave it out."
        )
    return found


def balanced(keys: Tensor, y: Tensor, counts: Mapping[int, int]) -> Tensor:
    """Return which samples [n] of M have the smallest keys [M] among those of their class, `counts` of each.

    What a class of y [M] lacks is taken from all others, equally. Indices are sorted. Raises ValueError where
    there are fewer than n samples.

    >>> balanced(torch.arange(5.0), torch.tensor([7, 7, 7, 7, 8]), {7: 2, 8: 2}).tolist()
    [0, 1, 2, 4]
    """
    total = sum(counts.values())
    if len(y) < total:
        raise ValueError(f"{total} of {len(y)} samples")
    place, wanted = ranks(keys, y), torch.zeros(len(y), dtype=torch.long)
    for column, count in counts.items():
        wanted[y == column] = count

    # Those that were asked for come first, then what is left, in the order of their ranks.
    within = keys.argsort(stable=True).argsort() / (2 * max(1, len(keys)))
    order = place + within + len(y) * (place >= wanted)
    return smallest(order.double(), total).nonzero()[:, 0]
