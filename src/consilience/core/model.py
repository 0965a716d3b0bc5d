"""Models: pure functions of parameters and buffers.

What whoever receives parameters must run is a Model; what only the learner does is a Correction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import Params, content_hash
from consilience.core.source import LabelFrame, Source

Forward = Callable[[Tensor, str | None], Tensor]
"""(x, task) -> outputs."""


class Model(ABC):
    """(params, buffers, x [B, ...], task, train) -> (outputs [B, C], new buffers).

    Entries are named tensors. An entry is frozen (`frozen`), belongs to one task (`task_of`), or is shared by
    all. Frozen entries never change, and their hash names the backbone. `grow` adds entries and never changes
    a shape.
    """

    outputs: int
    """The number C of output columns."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        """Return the first parameters and buffers, drawn from the generator alone."""

    @abstractmethod
    def __call__(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        """Return the outputs [B, C] and the new buffers; it changes none of its arguments."""

    @abstractmethod
    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        """Return the inputs of the head [B, d], in eval mode."""

    def from_features(self, params: Params, buffers: Params, psi: Tensor, task: str | None) -> Tensor | None:
        """Return the outputs [B, C] in eval mode for features psi [B, d]; None if these do not suffice.

        psi are `features` without a task.
        """
        return None

    @abstractmethod
    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        """Return a fast (x, task) -> outputs over these tensors, and the buffers that it updates in place."""

    # The head and what grows.

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        """Return the names of the linear head's weight [C, d] and bias [C], or None for a missing bias."""
        raise ConsilienceError(
            f"a closed-form head needs a model with one linear head, got {type(self).__name__}."
        )

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Return parameters and buffers with the entries that a new source needs."""
        return params, buffers

    def head_key(self, source: Source) -> str:
        """Return the task name in the names of this source's own entries."""
        return source.task or source.name

    # What an entry is.

    def task_of(self, entry: str) -> str | None:
        """Return the task that an entry belongs to, or None if it is shared."""
        return None

    def frozen(self, entry: str) -> bool:
        """Whether an entry never changes."""
        return False

    def reads(self, entry: str) -> bool:
        """Whether this model runs an entry of a received module."""
        return True

    # What experts must have in common.

    @property
    def form(self) -> str:
        """A name for how entries act, where models of another form have entries of the same names."""
        return ""

    @property
    def feature_space(self) -> str:
        """The hash of all that features depend on; "" where some of it is trained, or drawn by a seed."""
        return ""

    def backbone(self, params: Params) -> str:
        """Return the content hash of the frozen entries; "" without any."""
        frozen = {name: tensor for name, tensor in params.items() if self.frozen(name)}
        return content_hash(frozen) if frozen else ""

    # What engines must know.

    @property
    def uses_task(self) -> bool:
        """Whether the outputs depend on the task that the model is given."""
        return False

    @property
    def has_batch_norm(self) -> bool:
        """Whether outputs of a sample in training depend on the others of its batch."""
        return False

    @property
    def draws(self) -> bool:
        """Whether its training forward draws random numbers (dropout). They are then keyed at every step."""
        return False

    def check(self, frame: LabelFrame, sample: Tensor, aware: bool) -> None:
        """Refuse inputs that do not fit, or too few outputs, before any training.

        `aware` says whether the model will be given tasks.
        """
        if self.outputs < len(frame.labels):
            raise ConsilienceError(
                f"the model must have an output for each of the {len(frame.labels)} classes, "
                f"got {self.outputs} outputs (data sets share classes only where they share their `space`)."
            )
        params, buffers = self.init(torch.Generator().manual_seed(0))
        dtype = next(
            (tensor.dtype for tensor in params.values() if tensor.is_floating_point()), torch.float32
        )
        try:
            with torch.no_grad():
                self(params, buffers, sample.to(dtype) if sample.is_floating_point() else sample, None, False)
        except (RuntimeError, ValueError, IndexError) as error:
            # Our own errors say more than their first line.
            if isinstance(error, ConsilienceError):
                raise
            line = str(error).splitlines()[0]
            raise ConsilienceError(
                f"samples must fit the model's input, got {tuple(sample.shape[1:])}: {line}."
            ) from error
