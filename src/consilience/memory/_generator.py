"""A generator network that is trained against a teacher: samples share what it has learned of images."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.augment import normal
from consilience.core.checks import positive, whole_number
from consilience.core.params import Params
from consilience.core.synthetic import Wanted
from consilience.core.teacher import Teacher
from consilience.memory._inversion import (
    Gradients,
    Impression,
    Objective,
    adam_of,
    are_images,
    batches,
    columns_of,
    in_turn,
    seeds_of,
)


@dataclass(frozen=True)
class Generator(Gradients):
    """Images G(z, y) of a small network, trained with its latents against a teacher: data-free distillation.

    min over G and z of CE(t, softmax(f(G(z, t)) / temperature)) + penalties, z [B, latent] from N(0, I), by
    Adam. A batch of images is what G makes of its latents at the end; the next batch begins with that G and
    new latents, so that the first takes `steps`, and each later one `adapt`. Targets t are drawn as those of
    `Impression` with `beta`, or are one-hot without; y = argmax t. G adds t times an embedding of the classes
    to z, and has a linear layer to 2 `width` maps of a quarter of the sides, and three 3 x 3 convolutions,
    with nearest upsampling and group norm between them; its outputs are clip tanh(x / clip). Fang et al. 2021
    (CMI) and 2022 (Fast-DFKD), without their contrast and meta learning.
    """

    steps: int = 200
    lr: float = 0.005
    batch: int = 256
    adapt: int = 40
    beta: float | None = 1.0
    """The concentration of soft targets, as of `Impression`; None: classes."""
    latent: int = 64
    width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number(adapt=self.adapt, latent=self.latent, width=self.width)
        if self.beta is not None:
            positive(beta=self.beta)

    def misfit(self, shape: tuple[int, ...] | None, dtype: torch.dtype) -> str | None:
        if shape is not None and not are_images(shape):
            return f"Generator needs images [C, H, W] (use memory.inversion for others), got samples {shape}"
        return super().misfit(shape, dtype)

    def make(self, teacher: Teacher, wanted: Wanted, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        goal = self.objective(teacher, wanted)
        classes = in_turn(teacher, wanted.counts)
        seeds = seeds_of(len(classes), generator)
        # Soft targets as of data impression: with one target per class images become alike.
        if self.beta is None:
            targets = F.one_hot(classes, len(teacher.classes)).to(goal.place().dtype)
        else:
            targets = Impression(beta=self.beta).targets(goal, classes, generator)
        weights = first_weights(goal, self.latent, self.width, generator)

        made: list[Tensor] = []
        # What the network has learned of images serves all batches; the latents are each batch's own.
        for rows in batches(len(classes), self.batch):
            steps = self.adapt if made else self.steps
            x, weights = self._trained(goal, weights, targets[rows], seeds[rows], steps)
            made.append(x)
        return torch.cat(made), columns_of(teacher, targets, wanted.device)

    def _trained(
        self, goal: Objective, weights: Params, targets: Tensor, seeds: Tensor, steps: int
    ) -> tuple[Tensor, Params]:
        """Return a batch of images for these probabilities [B, k], and the weights that made it."""
        place = goal.place()
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        z = normal(seeds, self.latent).to(place).requires_grad_()
        y, adam = targets.to(place.device), adam_of([*leaves.values(), z], self.lr)

        for step in range(steps):
            with torch.enable_grad():
                x = generated(leaves, z, y, goal.shape, self.clip)
                loss = goal.loss(x, goal.look(goal.view(x, seeds, step)), y) / len(y)
            # The mean, since all samples share the weights.
            grads = torch.autograd.grad(loss, [*leaves.values(), z])
            for leaf, grad in zip([*leaves.values(), z], grads, strict=True):
                leaf.grad = grad
            adam.step()
        # After the last step, which the last pass did not see.
        with torch.no_grad():
            x = generated(leaves, z, y, goal.shape, self.clip)
        return goal.checked(x), {name: leaf.detach() for name, leaf in leaves.items()}


def first_weights(goal: Objective, latent: int, width: int, generator: torch.Generator) -> Params:
    """Draw the weights of a generator of a teacher's classes, uniform in +-1 / sqrt(layer inputs)."""
    channels, height, across = goal.shape
    # Rounded up, as the sides that `generated` passes through are.
    quarter = -(-height // 4) * -(-across // 4)
    shapes = {
        "enter": (2 * width * quarter, latent),
        "first": (2 * width, 2 * width, 3, 3),
        "second": (width, 2 * width, 3, 3),
        "last": (channels, width, 3, 3),
    }
    weights: Params = {}
    # Drawn in float64 on the CPU, so that every device and precision begins alike.
    for name, shape in shapes.items():
        bound = (shape[1] * (9 if len(shape) > 2 else 1)) ** -0.5
        drawn = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        weights[f"{name}.weight"] = (drawn * bound).to(goal.place())
        weights[f"{name}.bias"] = goal.place().new_zeros(shape[0])
    embedding = torch.randn(len(goal.teacher.classes), latent, generator=generator, dtype=torch.float64)
    return {**weights, "classes": embedding.to(goal.place())}


def generated(weights: Params, z: Tensor, y: Tensor, shape: tuple[int, ...], clip: float) -> Tensor:
    """Return the images [B, *shape] of latents z [B, latent] and targets y [B, k]."""
    height, across = shape[1:]
    sides = [(-(-height // part), -(-across // part)) for part in (4, 2, 1)]
    h = F.linear(z + y @ weights["classes"], weights["enter.weight"], weights["enter.bias"])
    h = h.view(len(z), -1, *sides[0])
    for name, side in (("first", sides[1]), ("second", sides[1]), ("last", sides[2])):
        # Group norm, so that an image does not depend on its batch.
        h = F.leaky_relu(F.group_norm(h, gcd(8, h.shape[1])), 0.2)
        # Nearest neighbours: a transposed convolution would leave a chequered pattern.
        h = F.interpolate(h, side) if h.shape[2:] != side else h
        h = F.conv2d(h, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)
    return clip * (h / clip).tanh()
