"""Statistics of a visit for merging: the diagonal Fisher information and second moments of inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.contexts import Context, Learned, Memory
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Statistics
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.corrections.fisher import check_labels, check_samples, fisher, refuse_all
from consilience.corrections.gradients import module_of, unviewed
from consilience.corrections.quadratic import Running

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

NUMBERS = 4_000_000
"""How many numbers of patches in float64 are made at once."""


@dataclass(frozen=True)
class Information(Correction):
    """Send F = (1/N) sum_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2] by entry.

    Training is unchanged: it is `EWC` without its penalty and its shift; `labels` and `samples` are those of
    `EWC`. Matena & Raffel 2022.
    """

    labels: Literal["model", "all", "data", "batches"] = "model"
    samples: int | None = None

    def __post_init__(self) -> None:
        check_labels(self.labels)
        check_samples(self.samples)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return refuse_all(self.labels, facts.places)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> None:
        """Return None: only consolidators read these items."""

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        return Running.precision(fisher(learned, self.labels, self.samples))


@dataclass(frozen=True)
class InputMoments(Correction):
    """Send G = sum_x X^T X [g, d, d] of the inputs X of each trained linear layer or 2-d convolution.

    The sums are in float64 and come with the count of samples. A convolution's inputs are its patches, for
    each of its g groups; a linear layer has g = 1; layers with d > `largest` are left out. Sums add over
    sources, batches and agents; they can leak rare samples: they are not private. Padding of ragged inputs is
    left out where a layer has an input for every place. Jin et al. 2023 (RegMean).
    """

    largest: int = 2048

    def __post_init__(self) -> None:
        if isinstance(self.largest, bool) or not isinstance(self.largest, int) or self.largest < 1:
            raise ConsilienceError(f"`largest` must be a whole number >= 1, got {self.largest!r}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.model is not None and not layers(facts.model):
            return (
                "it reads the inputs of linear layers and convolutions of one module, and this model has "
                "none; use average"
            )
        return None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> None:
        """Return None: only consolidators read these items."""

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        total: dict[str, Tensor] = {}
        there: Tensor | None = None

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen = inputs[0].detach()
                # Padding is no data, but layers that act on every token see it.
                if there is not None and seen.dim() == 3 and seen.shape[:2] == there.shape:
                    seen = seen[there]
                moment = gram(layer, seen)
                total[name] = total[name] + moment if name in total else moment

            return add

        trained = set(learned.layout.names)
        handles = [
            layer.register_forward_pre_hook(watch(name))
            for name, layer in layers(learned.model)
            if name in trained and _width(layer) <= self.largest
        ]
        # The module belongs to the model: hooks must go even where a forward pass fails.
        try:
            for x, _ in learned.source.train.chunks(1024):
                there = None if isinstance(x, Tensor) else x.there()
                with torch.no_grad():
                    learned.model(learned.params, learned.buffers, x, learned.task, False)
        finally:
            for handle in handles:
                handle.remove()
        count = torch.tensor(float(len(learned.source.train)), dtype=torch.float64)
        return Statistics({"count": count} | {f"second/{name}": moment for name, moment in total.items()})

    def refuse_message(self, message: Message, params: Params) -> str | None:
        """Return why the moments of a layer, [groups, d, d], cannot be used, or None."""
        item = message.items.get(self.name)
        for name, moment in item.tensors.items() if item is not None else ():
            if name != "count" and (moment.dim() != 3 or moment.shape[1] != moment.shape[2]):
                return f"moments of inputs must be [groups, d, d], got {tuple(moment.shape)} for {name!r}"
        return None


def layers(model: Model) -> list[tuple[str, nn.Module]]:
    """Return the linear layers and 2-d convolutions of a model's module, by the entry of their weight.

    Layers that share their weight with another kind of layer are left out.

    >>> from consilience.models import mlp
    >>> [n for n, _ in layers(mlp(4, (8,), 2))]
    ['1.weight', '3.weight']
    """
    prefix, module = module_of(unviewed(model))
    if not isinstance(module, nn.Module):
        return []

    # Parameters are compared by identity, since a shared one has several names.
    names = {id(p): name for name, p in module.named_parameters()}
    kinds = (nn.Linear, nn.Conv2d)
    others = {
        id(p) for layer in module.modules() if not isinstance(layer, kinds) for p in layer.parameters(False)
    }
    return [
        (prefix + names[id(layer.weight)], layer)
        for layer in module.modules()
        if isinstance(layer, kinds) and id(layer.weight) in names and id(layer.weight) not in others
    ]


def gram(layer: nn.Module, x: Tensor) -> Tensor:
    """Return X^T X [g, d, d] in float64 of a layer's inputs.

    They are [.., d] for a linear layer (g = 1), and [B, C, H, W] for a convolution with g groups.

    >>> gram(nn.Linear(2, 3), torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[[1.0, 2.0], [2.0, 5.0]]]
    """
    if not isinstance(layer, nn.Conv2d):
        flat = x.reshape(-1, x.shape[-1]).double()
        return (flat.T @ flat)[None]

    groups, width = layer.groups, _width(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    total = torch.zeros(groups, width, width, dtype=torch.float64, device=x.device)
    # Patches repeat each pixel as often as the kernel has places.
    size = max(1, NUMBERS // max(1, x[0].numel() * layer.kernel_size[0] * layer.kernel_size[1]))
    for part in x.split(size):
        # The layer's own padding, which `F.unfold` knows for zeros only.
        padded = F.pad(part.double(), layer._reversed_padding_repeated_twice, mode)
        patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        rows = patches.view(len(part), groups, width, -1).permute(1, 2, 0, 3).reshape(groups, width, -1)
        total += rows @ rows.transpose(1, 2)
    return total


def _width(layer: nn.Module) -> int:
    """Return the number d of inputs of one unit."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight[0].numel()
