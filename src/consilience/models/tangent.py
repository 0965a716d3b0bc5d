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
from consilience.core.tree import Input

ORIGIN = "origin."


class Tangent(Model):
    """f(x; theta_0) + J(x; theta_0) (theta - theta_0): a model to first order around theta_0.

    `models.linearised` makes it. Entries are those of the model, which are trained from theta_0 on, and
    frozen `origin.<name>` with theta_0. The origin of a head that is added for a task is that head's first
    values. The model runs in eval mode also in training: norms keep their statistics and dropouts are off.
    Features are to first order too. Ortiz-Jimenez et al. 2023.

    >>> from consilience.models import mlp
    >>> model = Tangent(mlp(4, (), 3))
    >>> [n for n in model.init(torch.Generator())[0] if model.frozen(n)]
    ['origin.1.weight', 'origin.1.bias']
    """

    def __init__(self, model: Model, base: Mapping[str, Tensor] | None = None) -> None:
        if not isinstance(model, Model):
            raise ConsilienceError(
                f"`model` must be a Model, as models.mlp and models.wrap make it, got {type(model).__name__}."
            )
        if isinstance(model, Tangent):
            raise ConsilienceError("`model` must not be linearised twice, got a linearised one.")
        self.model, self.outputs = model, model.outputs
        # A checkpoint has buffers among its parameters; these names tell them apart.
        self._buffers = frozenset(self.model.init(torch.Generator().manual_seed(0))[1])
        self.base = None if base is None else self._checked(base)

    @property
    def name(self) -> str:
        """The catalogue's name, with the model's."""
        return f"linearised({getattr(self.model, 'name', type(self.model).__name__)})"

    def __repr__(self) -> str:
        return f"linearised({self.model!r})"

    def at(self, params: Mapping[str, Tensor]) -> Params:
        """Return the entries for theta = theta_0 = these parameters, as `base` of a setting.

        Buffers among them, such as the statistics of norms, get no origin.

        >>> from consilience.models import mlp
        >>> sorted(Tangent(mlp(4, (), 3)).at({"1.bias": torch.zeros(3)}))
        ['1.bias', 'origin.1.bias']
        """
        entries = {
            name: torch.as_tensor(tensor) for name, tensor in params.items() if not name.startswith(ORIGIN)
        }
        trained = {name: tensor for name, tensor in entries.items() if self._is_trained(name, tensor)}
        return {**entries, **{ORIGIN + name: tensor.clone() for name, tensor in trained.items()}}

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = self.model.init(generator)
        given = {name: tensor.detach().clone() for name, tensor in (self.base or {}).items()}
        start = params if self.base is None else {name: given[name] for name in params}
        return self.at(start), {name: given.get(name, tensor) for name, tensor in buffers.items()}

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        entries = {name: tensor for name, tensor in params.items() if not name.startswith(ORIGIN)}
        grown, buffers = self.model.grow(entries, buffers, source, generator)
        # Only new entries get an origin: that of the others must not move.
        new = {name: tensor for name, tensor in grown.items() if name not in entries}
        return ({**params, **self.at(new)} if new else params), buffers

    def __call__(
        self, params: Params, buffers: Params, x: Input, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        return self._first_order(params, lambda moved: self.model(moved, buffers, x, task, False)[0]), buffers

    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        return self._first_order(params, lambda moved: self.model.features(moved, buffers, x, task))

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        # Nothing else can be prepared, because theta - theta_0 changes at every step.
        held = {name: tensor.clone() for name, tensor in buffers.items()}
        return lambda x, task: self(params, held, x, task, train)[0], held

    def head_key(self, source: Source) -> str:
        return self.model.head_key(source)

    def task_of(self, entry: str) -> str | None:
        return self.model.task_of(entry.removeprefix(ORIGIN))

    def shared(self, entry: str) -> bool:
        return self.model.shared(entry.removeprefix(ORIGIN))

    def frozen(self, entry: str) -> bool:
        return entry.startswith(ORIGIN) or self.model.frozen(entry)

    def derived(self, buffer: str) -> bool:
        return self.model.derived(buffer)

    @property
    def reads_others(self) -> bool:
        return self.model.reads_others

    @property
    def uses_task(self) -> bool:
        return self.model.uses_task

    def check(self, frame: LabelFrame, sample: Input, aware: bool, places: tuple[int, ...] = ()) -> None:
        self.model.check(frame, sample, aware, places)

    def _is_trained(self, entry: str, tensor: Tensor) -> bool:
        """Whether an entry is trained, and so has an origin."""
        return tensor.is_floating_point() and entry not in self._buffers and not self.model.frozen(entry)

    def _first_order(self, params: Params, f: Callable[[Params], Tensor]) -> Tensor:
        """Return f(theta_0) + the derivative of f at theta_0 along theta - theta_0."""
        origin = {
            name.removeprefix(ORIGIN): tensor for name, tensor in params.items() if name.startswith(ORIGIN)
        }
        # Frozen entries have no origin and are constants of f.
        fixed = {
            name: tensor
            for name, tensor in params.items()
            if not name.startswith(ORIGIN) and name not in origin
        }
        direction = {name: params[name] - tensor for name, tensor in origin.items()}

        # One forward pass gives both terms, and J is never built.
        value, slope = torch.func.jvp(lambda moved: f({**fixed, **moved}), (origin,), (direction,))[:2]
        out: Tensor = value + slope
        return out

    def _checked(self, base: Mapping[str, Any]) -> Params:
        """Return the given theta_0 and buffers; refuse those that are not the model's entries."""
        params, buffers = self.model.init(torch.Generator().manual_seed(0))
        given = {name: torch.as_tensor(base[name]) for name in (*params, *buffers) if name in base}
        # A checkpoint may lack buffers, but those that it has must fit.
        expected = params | {name: tensor for name, tensor in buffers.items() if name in given}
        for name, tensor in expected.items():
            if name not in given or given[name].shape != tensor.shape:
                got = tuple(given[name].shape) if name in given else "none"
                raise ConsilienceError(
                    f"`base` must have the model's entries, {name!r} of {tuple(tensor.shape)}, got {got}."
                )
        return given
