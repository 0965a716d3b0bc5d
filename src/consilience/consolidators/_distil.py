"""The steps that train a student towards targets: all consolidators that distil take them here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from consilience.core.optimiser import SGD, Adam
from consilience.core.params import Layout, Params

Loss = Callable[[Params, Tensor, int], Tensor]
"""(parameters, numbers [B] of the samples, number of the step) -> the loss of a batch."""


class Steps(NamedTuple):
    """How a student is trained."""

    number: int
    """The number of steps."""
    lr: float
    batch_size: int
    optimiser: Literal["adam", "sgd"]
    least: int = 1
    """The fewest samples of a batch; a last one that is smaller is joined to the one before it."""
    decay: Literal["constant", "cosine"] = "constant"
    """The factor of the learning rate at step i of n: 1, or (1 + cos(pi i / n)) / 2."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step.

        >>> [Steps(2, 0.5, 8, "sgd", decay="cosine").rate(step) for step in range(2)]
        [0.5, 0.25]
        """
        if self.decay == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * step / self.number)) / 2


def descend(
    loss: Loss, params: Params, layout: Layout, samples: int, steps: Steps, generator: torch.Generator
) -> Tensor:
    """Return the entries of the layout, as one vector [n], after steps down a loss from `params`.

    Batches are shuffled passes over so many samples, drawn from the generator.
    """
    optimiser, theta = Adam() if steps.optimiser == "adam" else SGD(), layout.flatten(params)
    held, order = optimiser.init(theta), torch.zeros(0, dtype=torch.long)
    with torch.enable_grad():
        for step in range(steps.number):
            if not len(order):
                order = torch.randperm(samples, generator=generator)
            size = len(order) if len(order) - steps.batch_size < steps.least else steps.batch_size
            batch, order = order[:size].to(theta.device), order[size:]

            leaf = theta.detach().requires_grad_()
            value = loss({**params, **layout.split(leaf)}, batch, step)
            grad = torch.autograd.grad(value, leaf)[0]
            direction, held = optimiser.update(grad, held, theta)
            theta = theta - steps.rate(step) * direction
    return theta


def is_rounding(out: Tensor, target: Tensor) -> bool:
    """Whether outputs differ from their targets by rounding errors alone.

    Adam's first steps have length lr even for a gradient of rounding errors: without a difference none is to
    be taken.

    >>> is_rounding(torch.tensor([9.0]), torch.tensor([9.00001])), is_rounding(torch.ones(1), torch.zeros(1))
    (True, False)
    """
    if not target.numel():
        return True
    scale = float(target.abs().max().clamp_min(1))
    return float((out - target).abs().max()) <= 100 * torch.finfo(target.dtype).eps * scale
