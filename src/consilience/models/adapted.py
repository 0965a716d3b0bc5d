"""Entries per task inside a frozen backbone; adapters: small residual bottlenecks after its layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward
from consilience.core.params import Params, matches
from consilience.core.source import Source
from consilience.core.tree import Input
from consilience.models.heads import HEADS, MultiHead, as_type, escape, trunk_entries
from consilience.models.module import ModuleModel, same_tensors
from consilience.models.pretrained import Backbone

DOWN, UP = "adapter_down", "adapter_up"
LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)
"""Layers whose features are the last dimension; those of all others follow the batch dimension."""

WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "normalized_shape", "embedding_dim")
"""Attributes of torch's layers that say how many features they return."""


class FeatureAxis(NamedTuple):
    """The dimension of a layer's features in its output, 1 or -1, and their number."""

    dim: int
    width: int


class Inserted(MultiHead):
    """outputs[:, columns_t] = psi_t W_t^T + b_t, psi_t from a frozen backbone with entries of task t inside.

    Subclasses say which layers and which entries: `<kind>.<task>.<layer>.<part>` for each of `parts`, or
    `<kind>.<task>.<layer>` for a part without a name. The backbone runs in eval mode and never changes: its
    content hash names what modules of this model need. Features with task None are the backbone's alone,
    common to all tasks; outputs with task None have every task's features. Layers before the first that has
    entries build no graph.
    """

    kind: ClassVar[str]
    """The first word of the names of these entries."""

    parts: ClassVar[dict[str, str]]
    """Where a layer of the prepared backbone has its empty place for each part."""

    layers: tuple[str, ...]

    def _insert(self, body: ModuleModel, layers: Sequence[str], hook: Callable[..., Any]) -> None:
        """Take the body as the trunk, frozen, with empty places after these layers."""
        self.layers, places, factory = tuple(layers), tuple(self.parts.values()), body.factory
        # A function draws new weights at each seed, and its module needs the places too.
        prepared = (
            (lambda: _prepared(factory(), layers, places, hook))
            if factory
            else _prepared(same_tensors(body.module), layers, places, hook)
        )
        self.widths = tuple(feature_axis(body.module.get_submodule(layer)).width for layer in layers)
        self.trunk = ModuleModel(prepared, body.outputs, frozen=("*",), headless=True, name=body.description)
        self.trunk.expect_head(body.guessed_head)

    @abstractmethod
    def _initial(self, layer: str, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the first values of the parts of a task's entries at a layer."""

    @property
    def name(self) -> str:
        return f"{self.kind}({self.trunk.name})"

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = super().init(generator)
        # The places are no entries of this model: those of tasks are put there.
        places = tuple(self.parts.values())
        return {name: tensor for name, tensor in params.items() if not name.endswith(places)}, buffers

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Add a head and the entries of the source's task, if it has none."""
        if self._has_head(params, buffers, source):
            return params, buffers
        params, buffers = super().grow(params, buffers, source, generator)
        task = self.head_key(source)
        like = params[f"{HEADS}{task}.weight"]

        new: Params = {}
        for layer, width in zip(self.layers, self.widths, strict=True):
            for part, tensor in self._initial(layer, width, generator).items():
                new[self._entry(task, layer, part)] = tensor.to(like)
        return {**params, **new}, buffers

    def __call__(
        self, params: Params, buffers: Params, x: Input, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        heads = self.heads(params, buffers, task)
        if not heads:
            return self._no_outputs(self._features(params, buffers, x, None)), buffers
        psis = [self._features(params, buffers, x, head.task) for head in heads]
        return self._outputs(psis, heads), buffers

    def probe(self, params: Params, buffers: Params, x: Input) -> None:
        self.trunk.probe(self._trunk_params(params, None), trunk_entries(buffers), x)

    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        return self._features(params, buffers, x, None if task is None else escape(task)).flatten(1)

    def from_features(self, params: Params, buffers: Params, psi: Tensor, task: str | None) -> Tensor | None:
        """Return None where layers have entries, because then each task has features of its own."""
        return None if self.layers else super().from_features(params, buffers, psi, task)

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        held = {name: tensor.clone() for name, tensor in buffers.items()}
        # One bound copy of the structure per task, made when it is first needed.
        trunks: dict[str | None, Forward] = {}

        def features(task: str | None, x: Input) -> Tensor:
            self._check_images(params, x, task)
            if task not in trunks:
                # In eval mode also in training, so that the frozen norms keep their statistics.
                entries = self._trunk_params(params, task)
                trunks[task] = self.trunk.bind(entries, trunk_entries(held), False)[0]
            return trunks[task](x, None)

        def forward(x: Input, task: str | None) -> Tensor:
            heads = self.heads(params, held, task)
            if not heads:
                return self._no_outputs(features(None, x))
            return self._outputs([features(head.task, x) for head in heads], heads)

        return forward, held

    def reads(self, entry: str) -> bool:
        if not entry.startswith(f"{self.kind}."):
            return super().reads(entry)
        return entry in self._entries(entry.split(".")[1])

    def _entry(self, task: str | None, layer: str, part: str) -> str:
        """Return the name of an entry."""
        return f"{self.kind}.{task}.{layer}{'.' if part else ''}{part}"

    def _entries(self, task: str | None) -> list[str]:
        """Return the names of the entries of a task inside the backbone."""
        return [self._entry(task, layer, part) for layer in self.layers for part in self.parts]

    def _features(self, params: Params, buffers: Params, x: Input, task: str | None) -> Tensor:
        """Return the backbone's features [B, d] with the entries of a task, or without any."""
        self._check_images(params, x, task)
        return self.trunk(self._trunk_params(params, task), trunk_entries(buffers), x, None, False)[0]

    def _check_images(self, params: Params, x: Input, task: str | None) -> None:
        """Refuse features of the backbone where the task has entries inside it."""
        # Such features passed the layers without the entries of the task.
        is_features = isinstance(x, Tensor) and x.ndim == 2 and isinstance(self.trunk.module, Backbone)
        if is_features and any(entry in params for entry in self._entries(task)):
            raise ConsilienceError(
                f"a task with {self.kind} inside the backbone must be given images, "
                f"got features [B, {x.shape[1]}] for {task!r}."
            )

    def _trunk_params(self, params: Params, task: str | None) -> Params:
        """Return the backbone's entries, with those of a task (or empty ones) at their places."""
        # An empty place leaves the layer's output as it is.
        entries, empty = trunk_entries(params), torch.zeros(0)
        for layer in self.layers:
            prefix = f"{layer}." if layer else ""
            for part, place in self.parts.items():
                entries[prefix + place] = params.get(self._entry(task, layer, part), empty)
        return entries


class Adapted(Inserted):
    """outputs[:, columns_t] = psi_t W_t^T + b_t; layers of a frozen backbone give h + U relu(V h).

    V [b, w] and U [w, b] of task t act on the w channels of a map [B, w, ..], or on the last dimension of
    vectors and tokens [B, .., w], as the layer has them (of a block: its last layer that says a width). U
    begins at 0, so that a new adapter leaves the backbone's outputs as they are, to the bit. Entries are
    `adapters.<task>.<layer>.down` (V) and `.up` (U), and `heads.<task>` and `trunk` as in MultiHead. The
    backbone runs in eval mode and never changes: its content hash names what modules of this model need.
    Features with task None are the backbone's alone, common to all tasks; outputs with task None have every
    task's adapters. Houlsby et al. 2019, Rebuffi et al. 2017; neither biases nor norms.

    >>> from consilience.models import mlp
    >>> model = Adapted(mlp(4, (8,)), outputs=10, bottleneck=2)
    >>> model.layers, model.task_of("adapters.t.1.up"), model.frozen("trunk.1.weight")
    (('1',), 't', True)
    """

    task_prefixes: ClassVar[tuple[str, ...]] = (HEADS, "adapters.")
    kind: ClassVar[str] = "adapters"
    parts: ClassVar[dict[str, str]] = {"down": DOWN, "up": UP}

    def __init__(
        self, backbone: ModuleModel, outputs: int, bottleneck: int = 16, layers: Sequence[str] | None = None
    ) -> None:
        super().__init__(backbone, outputs)
        whole_number(bottleneck=bottleneck)
        self.bottleneck = bottleneck
        self._insert(
            self.trunk, _chosen_layers(self.trunk.module, layers, self.trunk.description), _add_bottleneck
        )

    def __repr__(self) -> str:
        return f"adapters({self.trunk.description}, {self.outputs}, {self.bottleneck}, {self.layers})"

    def _initial(self, layer: str, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return V uniform in +-1 / sqrt(w), and U = 0."""
        down = (2 * torch.rand(self.bottleneck, width, generator=generator) - 1) * width**-0.5
        return {"down": down, "up": torch.zeros(width, self.bottleneck)}


# Where entries can be inserted.


def layers_of(module: nn.Module, description: str, what: str) -> tuple[str, ...]:
    """Return the names of all convolutions, linear layers and attentions, in module order.

    Of a backbone these are only the layers that it calls. `description` and `what` are for the error.
    """
    parts = called(module)
    # An attention reads the weights of this layer and never calls it, so that no hook would run.
    projections = {id(part.out_proj) for part in parts.values() if isinstance(part, nn.MultiheadAttention)}
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
    found = tuple(
        name for name, part in parts.items() if isinstance(part, kinds) and id(part) not in projections
    )
    if not found:
        raise ConsilienceError(
            f"{what} must have convolutions or linear layers to follow, got none in {description}."
        )
    return found


def called(module: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a module by name; of a backbone only those that it calls for an image of zeros.

    The others only hold weights that another part reads, such as the `qkv` of several of timm's: what is
    inserted after them never runs.
    """
    parts = dict(module.named_modules())
    if not isinstance(module, Backbone):
        return parts

    seen: set[str] = set()
    handles = [
        part.register_forward_hook(lambda *_, name=name: seen.add(name)) for name, part in parts.items()
    ]
    try:
        with torch.no_grad():
            module(module.blank())
    except (AssertionError, IndexError, TypeError, RuntimeError, ValueError):
        # The body takes images of another size, so that nothing is known of what it calls.
        return parts
    finally:
        for handle in handles:
            handle.remove()
    return {name: part for name, part in parts.items() if name in seen}


def feature_axis(layer: nn.Module) -> FeatureAxis:
    """Return where the features of a layer are, as its last part that says their number has them."""
    # The last layer of a block makes its output.
    for part in reversed([*layer.modules()]):
        for attribute in WIDTHS:
            width = getattr(part, attribute, None)
            if width is not None:
                dim = -1 if isinstance(part, LAST) else 1
                return FeatureAxis(dim, width if isinstance(width, int) else width[-1])
    raise ConsilienceError(
        f"`layers` must be layers of torch with a known width, or blocks of such, got {type(layer).__name__}."
    )


def output_dim(layer: nn.Module, h: Any, what: str) -> int:
    """Return the dimension of the features in a layer's output, 1 or -1; refuse widths that do not fit."""
    axis: FeatureAxis = layer.__dict__["inserted_side"]
    if not isinstance(h, Tensor) or h.ndim < 2 or h.shape[axis.dim] != axis.width:
        got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ConsilienceError(f"{what} must follow a layer that gives {axis.width} features, got {got}.")
    # With two dimensions 1 and -1 are the same.
    return axis.dim if h.ndim > 2 else -1


def _chosen_layers(module: nn.Module, patterns: Sequence[str] | None, description: str) -> tuple[str, ...]:
    """Return the layers that adapters follow; None: all convolutions, linear layers and attentions."""
    if patterns is None:
        return layers_of(module, description, "adapters")
    parts = called(module)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in parts):
            raise ConsilienceError(
                f"`layers` must match parts that the backbone calls, got {pattern!r}, "
                f"which matches none in {description}."
            )
    return tuple(name for name in parts if matches(name, patterns))


def _prepared(
    module: nn.Module, layers: Sequence[str], places: Sequence[str], hook: Callable[..., Any]
) -> nn.Module:
    """Add empty places to these layers of a module; the hook uses what is put there."""
    for name in layers:
        layer = module.get_submodule(name)
        # Public and plain, so that `structure`, and with it the hash of a feature space, has it.
        layer.__dict__["inserted_side"] = feature_axis(layer)
        for place in places:
            layer.register_parameter(place, nn.Parameter(torch.zeros(0)))
        layer.register_forward_hook(hook)
    return module


def _add_bottleneck(layer: nn.Module, args: Any, h: Any) -> Any:
    """Return h + U relu(V h) where the layer has adapters; of a tuple, as of attention, for the first."""
    down, up = layer.adapter_down, layer.adapter_up
    assert isinstance(down, Tensor) and isinstance(up, Tensor)
    # None leaves the output as it is.
    if not down.numel():
        return None
    if isinstance(h, tuple):
        return (_add_bottleneck(layer, args, h[0]), *h[1:])
    # The backbone may compute in a shorter type, which its next layer expects.
    z = as_type(h, down)
    if output_dim(layer, h, "an adapter") == -1:
        return as_type(z + F.linear(F.linear(z, down).relu(), up), h)
    # On maps these are two 1 x 1 convolutions.
    return as_type(z + (up @ (down @ z.flatten(2)).relu()).view_as(h), h)
