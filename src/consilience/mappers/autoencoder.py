"""Expert Gate: an autoencoder for each task; the one that reconstructs an input best says whose it is."""

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
from consilience.mappers.mixture import Anchored, Anchors, sketch


def logits(net: Params, target: Tensor) -> Tensor:
    """What the sigmoid of is the reconstruction [B, d] of targets in (0, 1)."""
    code = torch.relu(F.linear(target, net["encoder.weight"], net["encoder.bias"]))
    return F.linear(code, net["decoder.weight"], net["decoder.bias"])


def errors(item: Item, psi: Tensor) -> Tensor:
    """||r - t||^2 [B] of an anchor's autoencoder at places psi [B, d]: t = sigmoid of the standardised psi, r its
    reconstruction."""
    net = {n: t.to(psi) for n, t in item.tensors.items() if n != "validation"}
    target = torch.sigmoid((psi - net["mean"]) / net["deviation"])
    return (torch.sigmoid(logits(net, target)) - target).square().sum(1)


def relatedness(other: Item, own: Item, psi: Tensor) -> float:
    """Rel = 1 - (Er_other - Er_own) / Er_own: how well another task's autoencoder does on this task's data psi [N, d], Er mean
    errors.

    1 for the same autoencoder, less the further apart the tasks are.
    """
    mine = errors(own, psi).mean()
    return float(1 - (errors(other, psi).mean() - mine) / mine)


class Gates(Anchors):
    """-er_k of the autoencoder of each expert."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items, self.own = items, [i.tensors.get("validation") for i in items]

    def scores(self, psi: Tensor) -> Tensor:
        psi = psi.double()
        return torch.stack([-errors(i, psi) for i in self.items], 1)


@dataclass(frozen=True)
class ExpertGate(Anchored):
    """gate_k = softmax_k(-er_k / temperature), er_k = ||r_k(t) - t||^2 the error of the source's undercomplete autoencoder.

    t = sigmoid((psi - mean) / deviation) by the moments of the source; r = sigmoid(V relu(U t + a) + b), with round(`code` x d)
    hidden units, is trained on cross-entropy, by Adam with batches of 32. All goes to the expert with the largest gate; with
    `soft` the experts are averaged by their gates. Each autoencoder is fitted on one source alone, so that the order of arrival
    changes nothing. With `reject` > 0 an input is unknown where even its least error is above what that source's own validation
    examples have, but for the share `reject` of them.
    Aljundi et al. 2017 (who standardise by the moments of ImageNet's features).
    """

    code: float = 0.5
    epochs: int = 10
    lr: float = 0.01
    temperature: float = 2.0
    soft: bool = False
    on: Literal["features", "inputs"] = "inputs"
    reject: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.code < 1:
            raise ConsilienceError(
                f"`code` as a share of the inputs should be in (0, 1). Found `code = {self.code}`."
            )
        if self.epochs < 0:
            raise ConsilienceError(f"`epochs` should be at least 0. Found `epochs = {self.epochs}`.")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConsilienceError(
                    f"`{name}` should be positive and finite. Found `{name} = {getattr(self, name)}`."
                )

    def summarise(self, learned: Learned, ctx: Context) -> Module:
        psi, g = self.places(learned), learned.generator
        deviation = psi.std(0, unbiased=False)
        moments = {"mean": psi.mean(0), "deviation": torch.where(deviation > 0, deviation, 1.0)}
        target = torch.sigmoid((psi - moments["mean"]) / moments["deviation"]).float()
        d = target.shape[1]
        units = max(1, round(self.code * d))
        shapes = {"encoder": (units, d), "decoder": (d, units)}
        net = {f"{n}.weight": (2 * torch.rand(s, generator=g) - 1) * s[1] ** -0.5 for n, s in shapes.items()}
        net |= {f"{n}.bias": torch.zeros(s[0]) for n, s in shapes.items()}
        for p in net.values():
            p.requires_grad_()
        optimiser = torch.optim.Adam(net.values(), self.lr)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for batch in torch.randperm(len(target), generator=g).split(32):
                    optimiser.zero_grad()
                    loss = F.binary_cross_entropy_with_logits(
                        logits(net, target[batch]), target[batch], reduction="sum"
                    )
                    (loss / len(batch)).backward()
                    optimiser.step()
        fit = {n: p.detach() for n, p in net.items()}
        item = Module({**{n: t.float() for n, t in moments.items()}, **fit})
        if not self.rejects:
            return item
        return replace(
            item, tensors={**item.tensors, "validation": sketch(-errors(item, self.held(learned)))}
        )

    def ready(self, items: tuple[Item, ...], known: tuple[Item, ...]) -> Anchors:
        return Gates(items)

    def gate(self, errors: Tensor) -> Tensor:
        """softmax_k(-er_k / temperature) of errors [B, K]."""
        return torch.softmax(-errors / self.temperature, 1)

    def weights(self, psi: Tensor, anchors: Anchors) -> Tensor:
        hard = super().weights(psi, anchors)
        return self.gate(-anchors.scores(psi)) * hard.any(1, keepdim=True) if self.soft else hard
