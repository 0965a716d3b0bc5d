"""Augmentations: random views of training samples.

`augment=` of a source takes a function of one sample: it is given a tensor (or the Tree of one sample), and
returns one of the same shape and type. The transforms of torchvision fit, and so do functions that draw from
the random state of torch, Python or numpy: that state is seeded for every sample, and restored afterwards. A
function with an argument `generator` is given a torch.Generator instead. `batch` and `joint` are for
functions of a batch, and of inputs with their targets. A list applies several functions in turn. A mapping
applies functions to parts of a tree, which draw the same numbers.

Training and rehearsal see views. What a view is depends on (seed, source, visit, epoch, sample) alone, in
rehearsal on the step: not on workers, engine, agent, or whether the run was interrupted. Buffers keep the
samples themselves; evaluation, statistics, Fisher matrices and mappers read these.

>>> import consilience as cs
>>> images = cs.data.digits(image=True).map(augment=[crop(1), noise(0.05)])
>>> schedule = cs.settings.continual(cs.data.split_classes(images, 2))
>>> cs.run(schedule, cs.methods.er(size=50), training=cs.Training(epochs=1)).matrix.shape
(3, 2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.augment import Augment, normal, uniform
from consilience.core.errors import ConsilienceError, suggest_arguments

__all__ = ["batch", "crop", "flip", "joint", "noise", "normal", "uniform"]


def batch(function: Callable[..., Any]) -> Augment:
    """Apply a function of a batch [B, ...], such as a kornia augmentation.

    It may have an argument `generator`, keyed by the first sample of the batch; or `seeds` [B], of which
    `uniform` and `normal` make numbers for each sample that do not depend on the batch.

    >>> def brighter(x, seeds):
    ...     return x + uniform(seeds, 1).view(-1, 1, 1, 1)
    >>> batch(brighter)
    brighter (batch)
    """
    return Augment(function, batch=True)


def joint(function: Callable[..., Any], batch: bool = False) -> Augment:
    """Apply a function (x, y) -> (x, y), such as one that flips an image and its mask alike.

    It is given one sample, or with `batch` a batch. Targets keep their shape and type: classes are numbers,
    so mixing two samples needs targets of kind "labels" or "value".

    >>> joint(lambda x, y: (x.flip(-1), y.flip(-1))).joint
    True
    """
    return Augment(function, batch=batch, joint=True)


def flip(p: float = 0.5, dim: int = -1) -> Augment:
    """Flip images [B, C, H, W] along a dimension with probability `p`; -1 is left to right.

    >>> flip(p=1.0)(torch.tensor([[[[1.0, 2.0]]]]), torch.zeros(1), torch.tensor([7]))[0].tolist()
    [[[[2.0, 1.0]]]]
    """
    if not 0 <= p <= 1:
        raise ConsilienceError(f"`p` must be in [0, 1], got {p}.")
    return batch(Flip(p, dim))


def crop(padding: int = 4) -> Augment:
    """Pad images [B, C, H, W] with zeros on all sides, and cut out H x W at a random place.

    >>> x, y = torch.rand(5, 3, 8, 8), torch.zeros(5)
    >>> crop(2)(x, y, torch.arange(5))[0].shape
    torch.Size([5, 3, 8, 8])
    """
    if not isinstance(padding, int) or padding < 1:
        raise ConsilienceError(f"`padding` must be a whole number >= 1, got {padding!r}.")
    return batch(Crop(padding))


def noise(std: float = 0.1) -> Augment:
    """Add Gaussian noise of standard deviation `std` to inputs [B, ...].

    >>> view = noise(0.5)(torch.zeros(4, 1000), torch.zeros(4), torch.arange(4))[0]
    >>> bool((view.std(1) - 0.5).abs().max() < 0.05)
    True
    """
    if not 0 <= std < float("inf"):
        raise ConsilienceError(f"`std` must be >= 0 and finite, got {std}.")
    return batch(Noise(std))


# Classes, because the workers of a stream may need them pickled, and their names tell the arguments.


@dataclass(frozen=True)
class Flip:
    """See `flip`."""

    p: float
    dim: int

    def __call__(self, x: Tensor, seeds: Tensor) -> Tensor:
        chosen = uniform(seeds, 1)[:, 0] < self.p
        return torch.where(chosen.to(x.device).view(-1, *[1] * (images(x).dim() - 1)), x.flip(self.dim), x)


@dataclass(frozen=True)
class Crop:
    """See `crop`."""

    padding: int

    def __call__(self, x: Tensor, seeds: Tensor) -> Tensor:
        count, channels, height, width = images(x).shape
        wide = F.pad(x, [self.padding] * 4)
        places = (uniform(seeds, 2) * (2 * self.padding + 1)).long().to(x.device)

        # One gather for all samples, each at the rows and columns of its own window.
        rows = places[:, :1] + torch.arange(height, device=x.device)
        columns = places[:, 1:] + torch.arange(width, device=x.device)
        index = (rows[:, :, None] * wide.shape[-1] + columns[:, None]).view(count, 1, -1)
        return wide.flatten(2).gather(2, index.expand(-1, channels, -1)).view(x.shape)


@dataclass(frozen=True)
class Noise:
    """See `noise`."""

    std: float

    def __call__(self, x: Tensor, seeds: Tensor) -> Tensor:
        return x + normal(seeds, x[0].numel()).view(x.shape).to(x) * self.std


def images(x: Tensor) -> Tensor:
    """Return inputs that are images [B, C, H, W]; refuse others."""
    if x.dim() != 4:
        raise ConsilienceError(f"images to augment must be [B, C, H, W], got shape {tuple(x.shape)}.")
    return x


suggest_arguments(__name__)
