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


class Viewed(Model):
    """A model seen through the views of corrections: f(view(params, task), x, task)."""

    def __init__(self, model: Model, views: Sequence[tuple[Correction, Context]]) -> None:
        self.model, self.views, self.outputs = model, tuple(views), model.outputs

    @staticmethod
    def of(model: Model, views: Sequence[tuple[Correction, Context]]) -> Model:
        """The model itself where nobody has a view."""
        return Viewed(model, views) if views else model

    def _seen(self, params: Params, task: str | None) -> Params:
        for c, ctx in self.views:
            params = c.view(params, task, ctx)
        return params

    def __call__(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        return self.model(self._seen(params, task), buffers, x, task, train)

    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        return self.model.features(self._seen(params, task), buffers, x, task)

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        held = {n: b.clone() for n, b in buffers.items()}

        def forward(x: Tensor, task: str | None) -> Tensor:
            out, new = self(params, held, x, task, train)
            held.update(new)
            return out

        return forward, held

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

    def frozen(self, entry: str) -> bool:
        return self.model.frozen(entry)

    @property
    def uses_task(self) -> bool:
        return True

    @property
    def has_batch_norm(self) -> bool:
        return self.model.has_batch_norm

    @property
    def draws(self) -> bool:
        return self.model.draws


def superposition(views: Sequence[Params]) -> Callable[[Tensor], Params]:
    """alpha [K] -> sum_k alpha_k views_k, entry by entry. What all views share, or only some have, is taken as it is.

    >>> a, b = {"w": torch.tensor([1.0]), "v": torch.ones(1)}, {"w": torch.tensor([3.0]), "v": torch.ones(1)}
    >>> superposition([a, b])(torch.tensor([0.5, 0.5]))
    {'w': tensor([2.]), 'v': tensor([1.])}
    """
    first = {n: p for view in reversed(views) for n, p in view.items()}
    apart = {}
    for n, p in first.items():
        own = [view[n] for view in views if n in view]
        if (
            len(own) == len(views)
            and p.is_floating_point()
            and not all(o is p or torch.equal(o, p) for o in own)
        ):
            apart[n] = torch.stack(own)
    if not apart:
        raise ConsilienceError("views to superpose should differ by task. Found the same parameters for all.")
    return lambda alpha: {**first, **{n: torch.tensordot(alpha.to(p), p, 1) for n, p in apart.items()}}
