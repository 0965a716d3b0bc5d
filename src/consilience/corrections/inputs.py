"""What merging by statistics asks of a learn: the diagonal Fisher information, and second moments of the inputs of layers."""

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
from consilience.core.message import Statistics
from consilience.core.model import Model
from consilience.core.source import Source
from consilience.core.viewed import Viewed
from consilience.corrections.fisher import fisher, module_of
from consilience.corrections.quadratic import EWC, Running

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

NUMBERS = 4_000_000
"""How many numbers of patches in float64 are made at once."""


@dataclass(frozen=True)
class Information(Correction):
    """F = (1/N) sum_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2] by entry, as `EWC` tells it, without its penalty or its shift.

    `labels` and `samples` are those of `EWC`. It leaves training as it is. Matena & Raffel 2022.
    """

    labels: Literal["model", "all", "data", "batches"] = "model"
    samples: int | None = None

    def __post_init__(self) -> None:
        EWC(0.0, self.labels, self.samples)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> None:
        """Nothing: it is read by those that merge."""

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        return Running.precision(fisher(learned, self.labels, self.samples))


@dataclass(frozen=True)
class InputMoments(Correction):
    """G = sum_x X^T X [g, d, d] of the inputs X of each trained linear layer or 2-d convolution, in float64, and the count of samples.

    A convolution's inputs are its patches, for each of its g groups; a linear layer has g = 1; layers with d > `largest` are left
    out. Sums add over sources, batches and agents; they can leak rare samples: they are not private. Jin et al. 2023 (RegMean).
    """

    largest: int = 2048

    def __post_init__(self) -> None:
        if isinstance(self.largest, bool) or not isinstance(self.largest, int) or self.largest < 1:
            raise ConsilienceError(
                f"`largest` should be a whole number >= 1. Found `largest = {self.largest!r}`."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.model is not None and not layers(facts.model):
            return "it reads the inputs of linear layers and convolutions of one module, and this model has none; use average"
        return None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> None:
        """Nothing: they are read by those that merge."""

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        total: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                g = gram(layer, inputs[0].detach())
                total[name] = total[name] + g if name in total else g

            return add

        trained, handles = set(learned.layout.names), []
        for name, layer in layers(learned.model):
            if name in trained and _width(layer) <= self.largest:
                handles.append(layer.register_forward_pre_hook(watch(name)))
        try:
            for x, _ in learned.source.train.chunks(1024):
                with torch.no_grad():
                    learned.model(learned.params, learned.buffers, x, learned.task, False)
        finally:
            for h in handles:
                h.remove()
        count = torch.tensor(float(len(learned.source.train)), dtype=torch.float64)
        return Statistics({"count": count} | {f"second/{n}": g for n, g in total.items()})


def layers(model: Model) -> list[tuple[str, nn.Module]]:
    """The linear layers and 2-d convolutions of a model's module by the entry of their weight; those that share it with another kind of
    layer are left out.

    >>> from consilience.models import mlp
    >>> [n for n, _ in layers(mlp(4, (8,), 2))]
    ['1.weight', '3.weight']
    """
    while isinstance(model, Viewed):
        model = model.model
    prefix, module = module_of(model)
    if not isinstance(module, nn.Module):
        return []
    names = {id(p): n for n, p in module.named_parameters()}
    kinds = (nn.Linear, nn.Conv2d)
    others = {
        id(p) for m in module.modules() if not isinstance(m, kinds) for p in m.parameters(recurse=False)
    }
    found = [
        m
        for m in module.modules()
        if isinstance(m, kinds) and id(m.weight) in names and id(m.weight) not in others
    ]
    return [(prefix + names[id(m.weight)], m) for m in found]


def gram(layer: nn.Module, x: Tensor) -> Tensor:
    """X^T X [g, d, d] in float64 of a layer's inputs: [.., d] of a linear one (g = 1), [B, C, H, W] of a convolution with g groups.

    >>> gram(nn.Linear(2, 3), torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[[1.0, 2.0], [2.0, 5.0]]]
    """
    if not isinstance(layer, nn.Conv2d):
        flat = x.reshape(-1, x.shape[-1]).double()
        return (flat.T @ flat)[None]
    groups, d = layer.groups, _width(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    total = torch.zeros(groups, d, d, dtype=torch.float64, device=x.device)
    step = max(1, NUMBERS // max(1, x[0].numel() * layer.kernel_size[0] * layer.kernel_size[1]))
    for part in x.split(step):
        padded = F.pad(part.double(), layer._reversed_padding_repeated_twice, mode)
        patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        rows = patches.view(len(part), groups, d, -1).permute(1, 2, 0, 3).reshape(groups, d, -1)
        total += rows @ rows.transpose(1, 2)
    return total


def _width(layer: nn.Module) -> int:
    """The number d of inputs of one unit."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight[0].numel()
