"""A model seen through the views of corrections."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from consilience.core.contexts import Context
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward, Model
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.tree import Input


class Viewed(Model):
    """A model seen through the views of corrections: f(view(params, task), x, task)."""

    def __init__(self, model: Model, views: Sequence[tuple[Correction, Context]]) -> None:
        self.model, self.views, self.outputs = model, tuple(views), model.outputs

    @staticmethod
    def of(model: Model, views: Sequence[tuple[Correction, Context]]) -> Model:
        """Return the model through these views; the model itself without any."""
        return Viewed(model, views) if views else model

    def _seen(self, params: Params, task: str | None) -> Params:
        for correction, ctx in self.views:
            params = correction.view(params, task, ctx)
        return params

    def __call__(
        self, params: Params, buffers: Params, x: Input, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        return self.model(self._seen(params, task), buffers, x, task, train)

    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        return self.model.features(self._seen(params, task), buffers, x, task)

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        # Views depend on the task of each call, so that nothing can be bound in advance.
        held = {name: buffer.clone() for name, buffer in buffers.items()}

        def forward(x: Input, task: str | None) -> Tensor:
            out, new = self(params, held, x, task, train)
            held.update(new)
            return out

        return forward, held

    # A view changes what the parameters are, not which: all else is the model's.

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        return self.model.init(generator)

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        return self.model.head(params, task)

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        return self.model.grow(params, buffers, source, generator)

    def head_key(self, source: Source) -> str:
        return self.model.head_key(source)

    def task_of(self, entry: str) -> str | None:
        return self.model.task_of(entry)

    def shared(self, entry: str) -> bool:
        return self.model.shared(entry)

    def frozen(self, entry: str) -> bool:
        return self.model.frozen(entry)

    def derived(self, buffer: str) -> bool:
        return self.model.derived(buffer)

    @property
    def uses_task(self) -> bool:
        # A view may be a task's own, also where the model's outputs are not.
        return True

    @property
    def has_batch_norm(self) -> bool:
        return self.model.has_batch_norm

    @property
    def moves_buffers(self) -> bool:
        return self.model.moves_buffers

    @property
    def draws(self) -> bool:
        return self.model.draws


def superposition(views: Sequence[Params]) -> Callable[[Tensor], Params]:
    """Return a function from alpha [K] to sum_k alpha_k views_k, entry by entry.

    Entries that all views share, or that only some have, are taken as they are. Raises ConsilienceError where
    no entry differs.

    >>> a, b = {"w": torch.tensor([1.0]), "v": torch.ones(1)}, {"w": torch.tensor([3.0]), "v": torch.ones(1)}
    >>> superposition([a, b])(torch.tensor([0.5, 0.5]))
    {'w': tensor([2.]), 'v': tensor([1.])}
    """
    # Reversed, so that the first view that has an entry wins.
    first = {name: tensor for view in reversed(views) for name, tensor in view.items()}
    apart = {}
    for name, tensor in first.items():
        seen = [view[name] for view in views if name in view]
        if len(seen) < len(views) or not tensor.is_floating_point():
            continue
        if not all(other is tensor or torch.equal(other, tensor) for other in seen):
            apart[name] = torch.stack(seen)
    if not apart:
        raise ConsilienceError("views to superpose must differ by task, got the same parameters for all.")

    def mixed(alpha: Tensor) -> Params:
        return {
            **first,
            **{name: torch.tensordot(alpha.to(stack), stack, 1) for name, stack in apart.items()},
        }

    return mixed
