"""A model made linear in its parameters: its tangent at the parameters that it begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward, Model
from consilience.core.params import Params
from consilience.core.source import LabelFrame, Source

ORIGIN = "origin."


class Tangent(Model):
    """f(x; theta_0) + J(x; theta_0) (theta - theta_0): a model's first order around theta_0, as `models.linearised` makes it.

    Entries are those of the model, which are trained from theta_0 on, and frozen `origin.<name>` with theta_0. A head that is
    added for a task has its own first values for an origin. It runs in eval mode also in training: norms keep their statistics
    and dropouts are off. Features are those of first order too. Ortiz-Jimenez et al. 2023.

    >>> from consilience.models import mlp
    >>> model = Tangent(mlp(4, (), 3))
    >>> [n for n in model.init(torch.Generator())[0] if model.frozen(n)]
    ['origin.1.weight', 'origin.1.bias']
    """

    def __init__(self, model: Model, base: Mapping[str, Tensor] | None = None) -> None:
        if not isinstance(model, Model):
            raise ConsilienceError(
                f"`model` should be a Model, as models.mlp makes it. Found {type(model).__name__}."
            )
        if isinstance(model, Tangent):
            raise ConsilienceError("`model` should not be linearised twice. Found a linearised one.")
        self.model, self.outputs = model, model.outputs
        self._held = frozenset(self.model.init(torch.Generator().manual_seed(0))[1])
        self.base = None if base is None else self._checked(base)

    @property
    def name(self) -> str:
        """The catalogue's name, with the model's."""
        return f"linearised({getattr(self.model, 'name', type(self.model).__name__)})"

    def __repr__(self) -> str:
        return f"linearised({self.model!r})"

    def at(self, params: Mapping[str, Tensor]) -> Params:
        """theta = theta_0 = these parameters: what a setting's `base` should be. Buffers among them, as norms have, stay what they are.

        >>> from consilience.models import mlp
        >>> sorted(Tangent(mlp(4, (), 3)).at({"1.bias": torch.zeros(3)}))
        ['1.bias', 'origin.1.bias']
        """
        own = {n: torch.as_tensor(p) for n, p in params.items() if not n.startswith(ORIGIN)}
        return {**own, **{ORIGIN + n: p.clone() for n, p in own.items() if self._moves(n, p)}}

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = self.model.init(generator)
        given = {n: t.detach().clone() for n, t in (self.base or {}).items()}
        own = params if self.base is None else {n: given[n] for n in params}
        return self.at(own), {n: given.get(n, b) for n, b in buffers.items()}

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        own = {n: p for n, p in params.items() if not n.startswith(ORIGIN)}
        grown, buffers = self.model.grow(own, buffers, source, generator)
        new = {n: p for n, p in grown.items() if n not in own}
        return ({**params, **self.at(new)} if new else params), buffers

    def __call__(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        return self._first_order(params, lambda p: self.model(p, buffers, x, task, False)[0]), buffers

    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        return self._first_order(params, lambda p: self.model.features(p, buffers, x, task))

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        held = {n: b.clone() for n, b in buffers.items()}
        return lambda x, task: self(params, held, x, task, train)[0], held

    def head_key(self, source: Source) -> str:
        return self.model.head_key(source)

    def task_of(self, entry: str) -> str | None:
        return self.model.task_of(entry.removeprefix(ORIGIN))

    def frozen(self, entry: str) -> bool:
        return entry.startswith(ORIGIN) or self.model.frozen(entry)

    @property
    def uses_task(self) -> bool:
        return self.model.uses_task

    def check(self, frame: LabelFrame, sample: Tensor, aware: bool) -> None:
        self.model.check(frame, sample, aware)

    def _moves(self, entry: str, p: Tensor) -> bool:
        """Whether an entry is trained, and so has an origin."""
        return p.is_floating_point() and entry not in self._held and not self.model.frozen(entry)

    def _first_order(self, params: Params, f: Callable[[Params], Tensor]) -> Tensor:
        """f(theta_0) + the derivative of f at theta_0 along theta - theta_0."""
        origin = {n.removeprefix(ORIGIN): p for n, p in params.items() if n.startswith(ORIGIN)}
        fixed = {n: p for n, p in params.items() if not n.startswith(ORIGIN) and n not in origin}
        away = {n: params[n] - p for n, p in origin.items()}

        def moved(p: Params) -> Tensor:
            return f({**fixed, **p})

        found = torch.func.jvp(moved, (origin,), (away,))
        out: Tensor = found[0] + found[1]
        return out

    def _checked(self, base: Mapping[str, Any]) -> Params:
        """The given theta_0, which must have the model's entries in their shapes, and the buffers that stand in it."""
        own, buffers = self.model.init(torch.Generator().manual_seed(0))
        given = {n: torch.as_tensor(base[n]) for n in (*own, *buffers) if n in base}
        for n, p in (own | {n: b for n, b in buffers.items() if n in given}).items():
            if n not in given or given[n].shape != p.shape:
                found = tuple(given[n].shape) if n in given else "none"
                raise ConsilienceError(
                    f"`base` should have the model's entries, {n!r} of {tuple(p.shape)}. Found {found}."
                )
        return given
