"""Expert Gate: one autoencoder per task; an input belongs to the task that reconstructs it best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.contexts import Context, Learned
from consilience.core.errors import ConsilienceError
from consilience.core.message import Item, Module
from consilience.core.params import Params
from consilience.mappers.mixture import Anchored, Anchors, misshapen, sketch


def logits(net: Params, target: Tensor) -> Tensor:
    """Return the logits [B, d] of the reconstruction of targets [B, d] in (0, 1)."""
    code = torch.relu(F.linear(target, net["encoder.weight"], net["encoder.bias"]))
    return F.linear(code, net["decoder.weight"], net["decoder.bias"])


def errors(item: Item, psi: Tensor) -> Tensor:
    """Return ||r - t||^2 [B] of an anchor's autoencoder at places psi [B, d].

    t = sigmoid of the standardised psi, r its reconstruction.
    """
    net = {name: t.to(psi) for name, t in item.tensors.items() if name != "validation"}
    target = torch.sigmoid((psi - net["mean"]) / net["deviation"])
    return (torch.sigmoid(logits(net, target)) - target).square().sum(1)


def relatedness(other: Item, own: Item, psi: Tensor) -> float:
    """Return Rel = 1 - (Er_other - Er_own) / Er_own, Er the mean errors on this task's data psi [N, d].

    It is how well another task's autoencoder does on them: 1 for the same autoencoder, less the further apart
    the tasks are.
    """
    mine = errors(own, psi).mean()
    return float(1 - (errors(other, psi).mean() - mine) / mine)


class Gates(Anchors):
    """-er_k of the autoencoder of each expert."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items, self.own = items, [item.tensors.get("validation") for item in items]

    def scores(self, psi: Tensor) -> Tensor:
        psi = psi.double()
        return torch.stack([-errors(item, psi) for item in self.items], 1)


@dataclass(frozen=True)
class ExpertGate(Anchored):
    """gate_k = softmax_k(-er_k / temperature), er_k = ||r_k(t) - t||^2 the error of an autoencoder.

    It is undercomplete: t = sigmoid((psi - mean) / deviation) by the moments of the source; r = sigmoid(V
    relu(U t + a) + b), with round(`code` x d) hidden units, is trained on cross-entropy, by Adam with batches
    of 32. The expert with the largest gate answers alone; with `soft` the experts are averaged by their
    gates. Each autoencoder is fitted on one source alone, so that the order of arrival changes nothing. With
    `reject` > 0 an input is unknown where even its least error is above all but the fraction `reject` of the
    errors of that source's own validation examples. Aljundi et al. 2017 (who standardise by the moments of
    ImageNet's features).
    """

    code: float = 0.5
    epochs: int = 10
    lr: float = 0.01
    temperature: float = 2.0
    soft: bool = False
    on: Literal["features", "inputs"] = "inputs"
    reject: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.code < 1:
            raise ConsilienceError(f"`code`, a share of the inputs, must be in (0, 1), got {self.code}.")
        if self.epochs < 0:
            raise ConsilienceError(f"`epochs` must be at least 0, got {self.epochs}.")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConsilienceError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")

    def misfit(self, anchor: Item) -> str | None:
        form = {"mean": "d", "deviation": "d", "encoder.weight": "hd", "encoder.bias": "h"}
        form |= {"decoder.weight": "dh", "decoder.bias": "d"} | ({"validation": "V"} if self.rejects else {})
        reason = misshapen(anchor, form, {})
        if reason is None and not bool((anchor.tensors["deviation"] > 0).all()):
            reason = "deviations of an anchor must be positive, got others"
        return reason

    def width(self, anchor: Item) -> int:
        return len(anchor.tensors["mean"])

    def summarise(self, learned: Learned, ctx: Context) -> Module:
        psi = self.places(learned)
        deviation = psi.std(0, unbiased=False)
        # Numbers that never vary are only centred.
        moments = {"mean": psi.mean(0), "deviation": torch.where(deviation > 0, deviation, 1.0)}
        target = torch.sigmoid((psi - moments["mean"]) / moments["deviation"]).float()
        net = self.fit(target, learned.generator)
        # Single precision halves what is sent.
        item = Module({**{name: t.float() for name, t in moments.items()}, **net})
        if not self.rejects:
            return item
        own = sketch(-errors(item, self.held(learned)))
        return replace(item, tensors={**item.tensors, "validation": own})

    def fit(self, target: Tensor, generator: torch.Generator) -> Params:
        """Train an autoencoder on targets [N, d] in (0, 1)."""
        width = target.shape[1]
        units = max(1, round(self.code * width))
        shapes = {"encoder": (units, width), "decoder": (width, units)}
        # Weights begin uniform within 1 / sqrt(inputs), biases at 0.
        net = {
            f"{name}.weight": (2 * torch.rand(shape, generator=generator) - 1) * shape[1] ** -0.5
            for name, shape in shapes.items()
        }
        net |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
        for p in net.values():
            p.requires_grad_()

        optimiser = torch.optim.Adam(net.values(), self.lr)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for index in torch.randperm(len(target), generator=generator).split(32):
                    optimiser.zero_grad()
                    batch = target[index]
                    loss = F.binary_cross_entropy_with_logits(logits(net, batch), batch, reduction="sum")
                    (loss / len(index)).backward()
                    optimiser.step()
        return {name: p.detach() for name, p in net.items()}

    def ready(self, items: tuple[Item, ...], every: tuple[Item, ...]) -> Anchors:
        return Gates(items)

    def gate(self, errors: Tensor) -> Tensor:
        """Return softmax_k(-er_k / temperature) of errors [B, K]."""
        return torch.softmax(-errors / self.temperature, 1)

    def weights(self, psi: Tensor, anchors: Anchors) -> Tensor:
        hard = super().weights(psi, anchors)
        # An input that no expert knows keeps no weight at all.
        return self.gate(-anchors.scores(psi)) * hard.any(1, keepdim=True) if self.soft else hard
