"""Models: pure functions of parameters and buffers. What a receiver must run is a Model; what only the learner does is a Correction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import Params, content_hash
from consilience.core.source import LabelFrame, Source

Forward = Callable[[Tensor, str | None], Tensor]


class Model(ABC):
    """(params, buffers, x [B, ...], task, train) -> (outputs [B, C], new buffers).

    Entries are named tensors. `grow` adds entries for a source and never changes a shape; `task_of` says which task an
    entry belongs to (None: shared); frozen entries never change and their hash names the backbone.
    """

    outputs: int
    """The number C of output columns."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        """Parameters and buffers, drawn by the generator alone."""

    @abstractmethod
    def __call__(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool
    ) -> tuple[Tensor, Params]: ...

    @abstractmethod
    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        """What the head sees [B, d], in eval mode."""

    def from_features(self, params: Params, buffers: Params, psi: Tensor, task: str | None) -> Tensor | None:
        """The outputs [B, C] in eval mode of inputs whose `features` (of no task) are psi [B, d]; None where these do not suffice."""
        return None

    @abstractmethod
    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        """A fast (x, task) -> outputs over these very tensors, and the buffers that it updates in place."""

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        """The entries (weight [C, d], bias [C] or None) of the linear head."""
        raise ConsilienceError(
            f"a closed-form head needs a model with one linear head. Found {type(self).__name__}."
        )

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Parameters and buffers with the entries that a new source needs."""
        return params, buffers

    def head_key(self, source: Source) -> str:
        """The task name under which this source's own entries stand."""
        return source.task or source.name

    def task_of(self, entry: str) -> str | None:
        """The task that an entry belongs to, or None where it is shared."""
        return None

    def frozen(self, entry: str) -> bool:
        """Whether an entry never changes."""
        return False

    @property
    def form(self) -> str:
        """How entries act that have the same names in models of another form, such as rows divided by their norm."""
        return ""

    def reads(self, entry: str) -> bool:
        """Whether an entry of a module that was heard of is one that this model runs."""
        return True

    @property
    def feature_space(self) -> str:
        """The hash of all that its features depend on, where nothing of it is trained or drawn by a seed; else ""."""
        return ""

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
        """Whether its training forward draws random numbers (dropout): they are then keyed at every step."""
        return False

    def check(self, frame: LabelFrame, sample: Tensor, aware: bool) -> None:
        """Refuse inputs that do not fit, or too few outputs, before any work is lost; `aware`: it will be told tasks."""
        if self.outputs < len(frame.labels):
            raise ConsilienceError(
                f"the model should have an output for each of the {len(frame.labels)} classes. Found {self.outputs} outputs "
                "(data sets share classes only where they share their `space`)."
            )
        params, buffers = self.init(torch.Generator().manual_seed(0))
        dtype = next((p.dtype for p in params.values() if p.is_floating_point()), torch.float32)
        try:
            with torch.no_grad():
                self(params, buffers, sample.to(dtype) if sample.is_floating_point() else sample, None, False)
        except (RuntimeError, ValueError, IndexError) as e:
            if isinstance(e, ConsilienceError):
                raise
            line = str(e).splitlines()[0]
            raise ConsilienceError(
                f"samples should fit the model's input. Found {tuple(sample.shape[1:])}: {line}."
            ) from e

    def backbone(self, params: Params) -> str:
        """The content hash of the frozen entries ("" where none is)."""
        frozen = {n: t for n, t in params.items() if self.frozen(n)}
        return content_hash(frozen) if frozen else ""
