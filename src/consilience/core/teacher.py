"""Teachers: trained models that are only asked for their answers, whatever their architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from consilience.core.model import Forward, Model
from consilience.core.params import Params
from consilience.core.tree import Input


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained model: x [B, ...] -> logits [B, k] of its k classes, in eval mode; differentiable in x.

    >>> from consilience.models import linear
    >>> model = linear(4, 3)
    >>> params, buffers = model.init(torch.Generator().manual_seed(0))
    >>> Teacher("a", model, params, buffers, classes=(5, 7), outputs=(0, 2))(torch.ones(2, 4)).shape
    torch.Size([2, 2])
    """

    name: str
    """Who sent it."""
    model: Model
    params: Params
    buffers: Params
    classes: tuple[int, ...]
    """The receiver's column of each of its classes."""
    outputs: tuple[int, ...]
    """Which of the model's outputs says each class."""
    task: str | None = None

    @cached_property
    def _forward(self) -> Forward:
        return self.model.bind(self.params, self.buffers, False)[0]

    def __call__(self, x: Input) -> Tensor:
        out = self._forward(x, self.task)
        return out.index_select(1, torch.tensor(self.outputs, device=out.device))
