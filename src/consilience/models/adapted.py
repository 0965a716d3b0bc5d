"""Entries of each task inside a frozen backbone; adapters: small residual bottlenecks after its layers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward
from consilience.core.params import Params, matches
from consilience.core.source import Source
from consilience.models.heads import HEADS, MultiHead, _stripped, escape
from consilience.models.module import ModuleModel
from consilience.models.pretrained import Backbone

DOWN, UP = "adapter_down", "adapter_up"
LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)
"""Layers whose features stand last; those of all others stand after the batch."""


class Inserted(MultiHead):
    """outputs[:, columns_t] = psi_t W_t^T + b_t, where psi_t are the features of a frozen backbone into whose layers task t puts
    entries of its own.

    Subclasses say which layers and which entries: `<own>.<task>.<layer>.<part>` for each of `parts`, or `<own>.<task>.<layer>`
    where it has no name. The backbone runs in eval mode and never changes: its content hash names what modules of this model
    stand on. Features with task None are the backbone's own, which all tasks have in common; with task None every task is
    answered through its own entries. Layers before the first that has entries build no graph.
    """

    kind: ClassVar[str]
    """How the names of the entries begin."""

    parts: ClassVar[dict[str, str]]
    """Where a layer of the prepared backbone has its empty place for each part."""

    layers: tuple[str, ...]

    def _place(self, body: ModuleModel, layers: Sequence[str], hook: Callable[..., Any]) -> None:
        """Take the body as the trunk, frozen, with empty places after these layers."""
        self.layers, places, factory = tuple(layers), tuple(self.parts.values()), body._factory
        made = (
            (lambda: _prepared(factory(), layers, places, hook))
            if factory
            else _prepared(copy.deepcopy(body._module), layers, places, hook)
        )
        self.widths = tuple(_side(body._module.get_submodule(n))[1] for n in layers)
        self.trunk = ModuleModel(made, body.outputs, frozen=("*",), headless=True, name=body.description)

    @abstractmethod
    def _new(self, layer: str, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The parts of a task's entries at a layer, as they begin."""

    @property
    def name(self) -> str:
        return f"{self.kind}({self.trunk.name})"

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = super().init(generator)
        places = tuple(self.parts.values())
        return {n: p for n, p in params.items() if not n.endswith(places)}, buffers

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Parameters and buffers with a head, and the entries of the source's task, if it has none."""
        if self._has(params, buffers, source):
            return params, buffers
        params, buffers = super().grow(params, buffers, source, generator)
        task, like = self.head_key(source), params[f"{HEADS}{self.head_key(source)}.weight"]
        new: Params = {}
        for n, w in zip(self.layers, self.widths, strict=True):
            new |= {self._entry(task, n, part): t.to(like) for part, t in self._new(n, w, generator).items()}
        return {**params, **new}, buffers

    def __call__(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        heads = self._heads(params, buffers, task)
        psis = [self._features(params, buffers, x, h.task) for h in heads]
        return (
            self._write(psis, heads) if heads else self._nothing(self._features(params, buffers, x, None))
        ), buffers

    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        return self._features(params, buffers, x, None if task is None else escape(task)).flatten(1)

    def from_features(self, params: Params, buffers: Params, psi: Tensor, task: str | None) -> Tensor | None:
        """None: each task has features of its own."""
        return None if self.layers else super().from_features(params, buffers, psi, task)

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        held = {n: b.clone() for n, b in buffers.items()}
        trunks: dict[str | None, Forward] = {}

        def through(task: str | None, x: Tensor) -> Tensor:
            self._fits(params, x, task)
            if task not in trunks:
                trunks[task] = self.trunk.bind(self._seen(params, task), _stripped(held), False)[0]
            return trunks[task](x, None)

        def forward(x: Tensor, task: str | None) -> Tensor:
            heads = self._heads(params, held, task)
            return (
                self._write([through(h.task, x) for h in heads], heads)
                if heads
                else self._nothing(through(None, x))
            )

        return forward, held

    def reads(self, entry: str) -> bool:
        if not entry.startswith(f"{self.kind}."):
            return super().reads(entry)
        task = entry.split(".")[1]
        return any(entry == self._entry(task, n, part) for n in self.layers for part in self.parts)

    def task_of(self, entry: str) -> str | None:
        return entry.split(".")[1] if entry.startswith(f"{self.kind}.") else super().task_of(entry)

    def _entry(self, task: str | None, layer: str, part: str) -> str:
        return f"{self.kind}.{task}.{layer}{'.' if part else ''}{part}"

    def _features(self, params: Params, buffers: Params, x: Tensor, task: str | None) -> Tensor:
        """The backbone's features [B, d] through the entries of a task, or through none."""
        self._fits(params, x, task)
        return self.trunk(self._seen(params, task), _stripped(buffers), x, None, False)[0]

    def _fits(self, params: Params, x: Tensor, task: str | None) -> None:
        """Refuse a backbone's own features for a task that has entries inside it."""
        inside = (self._entry(task, n, part) for n in self.layers for part in self.parts)
        if x.ndim == 2 and isinstance(self.trunk._module, Backbone) and any(n in params for n in inside):
            raise ConsilienceError(
                f"a task with {self.kind} inside the backbone should be given images. Found features [B, {x.shape[1]}] for {task!r}."
            )

    def _seen(self, params: Params, task: str | None) -> Params:
        """The backbone's entries, and in their places the entries of a task; an empty one where it has none."""
        trunk, none = _stripped(params), torch.zeros(0)
        for n in self.layers:
            at = f"{n}." if n else ""
            for part, place in self.parts.items():
                trunk[at + place] = params.get(self._entry(task, n, part), none)
        return trunk


class Adapted(Inserted):
    """outputs[:, columns_t] = psi_t W_t^T + b_t, where psi_t are the features of a frozen backbone, each of whose chosen layers
    gives h + U relu(V h) to task t.

    V [b, w] and U [w, b] act on the w channels of a map [B, w, ..], or on the last dimension of vectors and tokens [B, .., w],
    as the layer (of a block, its last one that says a width) has them; U begins at 0, so that a new adapter is the backbone to
    the bit. Entries are `adapters.<task>.<layer>.down` (V) and `.up` (U), and `heads.<task>` and `trunk` as in MultiHead. The
    backbone runs in eval mode and never changes: its content hash names what modules of this model stand on. Features with
    task None are the backbone's own, which all tasks have in common; with task None every task is answered through its own
    adapters. Houlsby et al. 2019, Rebuffi et al. 2017; neither biases nor norms.

    >>> from consilience.models import mlp
    >>> model = Adapted(mlp(4, (8,)), outputs=10, bottleneck=2)
    >>> model.layers, model.task_of("adapters.t.1.up"), model.frozen("trunk.1.weight")
    (('1',), 't', True)
    """

    own: ClassVar[tuple[str, ...]] = (HEADS, "adapters.")
    kind: ClassVar[str] = "adapters"
    parts: ClassVar[dict[str, str]] = {"down": DOWN, "up": UP}

    def __init__(
        self, backbone: ModuleModel, outputs: int, bottleneck: int = 16, layers: Sequence[str] | None = None
    ) -> None:
        super().__init__(backbone, outputs)
        if bottleneck < 1:
            raise ConsilienceError(f"`bottleneck` should be at least 1. Found `bottleneck = {bottleneck}`.")
        self.bottleneck = bottleneck
        self._place(self.trunk, _chosen(self.trunk._module, layers, self.trunk.description), _residual)

    def __repr__(self) -> str:
        return f"adapters({self.trunk.description}, {self.outputs}, {self.bottleneck}, {self.layers})"

    def _new(self, layer: str, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """V uniform in +-1 / sqrt(w), and U = 0."""
        down = (2 * torch.rand(self.bottleneck, width, generator=generator) - 1) * width**-0.5
        return {"down": down, "up": torch.zeros(width, self.bottleneck)}


def layers_of(module: nn.Module, whose: str, what: str) -> tuple[str, ...]:
    """The names of all convolutions, linear layers and attentions, in module order; of a backbone, of those that it calls."""
    parts = called(module)
    attention = {
        id(m.out_proj) for m in parts.values() if isinstance(m, nn.MultiheadAttention)
    }  # read there, never called
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
    found = tuple(n for n, m in parts.items() if isinstance(m, kinds) and id(m) not in attention)
    if not found:
        raise ConsilienceError(
            f"{what} should have convolutions or linear layers to stand after. Found none in {whose}."
        )
    return found


def called(module: nn.Module) -> dict[str, nn.Module]:
    """The parts of a module by name: all, but of a backbone those alone that are called when it sees an image of zeros.

    Some only have weights that another part reads, as the `qkv` of several of timm's: what stands after them is never reached.
    """
    parts = dict(module.named_modules())
    if not isinstance(module, Backbone):
        return parts
    seen: set[str] = set()
    handles = [m.register_forward_hook(lambda *_, n=n: seen.add(n)) for n, m in parts.items()]
    try:
        with torch.no_grad():
            module(module.blank())
    except (
        AssertionError,
        IndexError,
        TypeError,
        RuntimeError,
        ValueError,
    ):  # it wants images of another size
        return parts
    finally:
        for h in handles:
            h.remove()
    return {n: m for n, m in parts.items() if n in seen}


def _chosen(module: nn.Module, patterns: Sequence[str] | None, whose: str) -> tuple[str, ...]:
    """The names of the layers that adapters stand after; None: all convolutions, linear layers and attentions."""
    if patterns is None:
        return layers_of(module, whose, "adapters")
    parts = called(module)
    for p in patterns:
        if not any(matches(n, [p]) for n in parts):
            raise ConsilienceError(
                f"`layers` should match parts that the backbone calls. Found none like {p!r} in {whose}."
            )
    return tuple(n for n in parts if matches(n, patterns))


def _side(layer: nn.Module) -> tuple[int, int]:
    """Where the features of a layer stand (1 or -1), and how many there are: as its last part that says so has them."""
    for part in reversed([*layer.modules()]):
        for attribute in (
            "out_channels",
            "out_features",
            "num_features",
            "num_channels",
            "normalized_shape",
            "embedding_dim",
        ):
            width = getattr(part, attribute, None)
            if width is not None:
                return -1 if isinstance(part, LAST) else 1, width if isinstance(width, int) else width[-1]
    raise ConsilienceError(
        f"`layers` should be layers that have entries, or blocks of such, so that their width is known. Found {type(layer).__name__}."
    )


def _prepared(
    module: nn.Module, layers: Sequence[str], places: Sequence[str], hook: Callable[..., Any]
) -> nn.Module:
    """The module with empty places after these layers, which the hook fills."""
    for n in layers:
        layer = module.get_submodule(n)
        layer.__dict__["inserted_side"] = _side(layer)
        for place in places:
            layer.register_parameter(place, nn.Parameter(torch.zeros(0)))
        layer.register_forward_hook(hook)
    return module


def placed(layer: nn.Module, h: Any, what: str) -> int:
    """Where the features of a layer's output stand, 1 or -1; refuses other widths than the layer says."""
    side, width = layer.__dict__["inserted_side"]
    if not isinstance(h, Tensor) or h.ndim < 2 or h.shape[side] != width:
        shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ConsilienceError(
            f"{what} should stand after a layer that gives {width} features. Found {shape}."
        )
    return side if h.ndim > 2 else -1


def _residual(layer: nn.Module, args: Any, h: Any) -> Any:
    """h + U relu(V h), where the layer was given adapters; of a tuple, such as attention gives, the first."""
    down, up = layer.adapter_down, layer.adapter_up
    assert isinstance(down, Tensor) and isinstance(up, Tensor)
    if not down.numel():
        return None
    if isinstance(h, tuple):
        return (_residual(layer, args, h[0]), *h[1:])
    if placed(layer, h, "an adapter") == -1:
        return h + F.linear(F.linear(h, down).relu(), up)
    return h + (up @ (down @ h.flatten(2)).relu()).view_as(h)
