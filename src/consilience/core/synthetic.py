"""Makers of synthetic memory: samples that stand for the data of an expert that is given as a model alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.takes import Takes
from consilience.core.teacher import Teacher
from consilience.core.tree import Input


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

    needs_gradients: ClassVar[bool] = False
    """Whether it needs gradients of the teacher's answers with respect to its inputs."""

    @abstractmethod
    def make(self, teacher: Teacher, wanted: Wanted, generator: torch.Generator) -> tuple[Input, Tensor]:
        """Return samples [n, ...] and the classes [n] that they stand for, by the receiver's columns."""
