"""Priors of synthetic samples: what is added to the loss of an inversion, and what the teacher sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.augment import scattered, uniform
from consilience.core.errors import ConsilienceError
from consilience.core.teacher import Norm


@dataclass(frozen=True)
class Seen:
    """What a forward pass on samples [B, ...] showed."""

    logits: Tensor
    """The teacher's answers [B, k]."""
    norms: Sequence[Norm] = ()
    """What its batch norms saw, for priors that need it."""
    student: Tensor | None = None
    """The student's answers [B, k] for the same classes, for priors that need them."""


class Prior:
    """A prior of samples x [B, ...]. Subclasses are frozen dataclasses.

    The loss of a batch is the mean over samples of what a maker minimises, plus each penalty. Penalties of
    single samples are means over the batch, so that no weight depends on its size.
    """

    needs_norms: ClassVar[bool] = False
    """Whether it reads `seen.norms`."""
    needs_student: ClassVar[bool] = False
    """Whether it reads `seen.student`."""
    needs_images: ClassVar[bool] = False
    """Whether samples must be images [C, H, W], of at least two rows and columns."""

    def view(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return what the teacher sees of samples x [B, ...]; `seeds` [B] are of sample and step."""
        return x

    def penalty(self, x: Tensor, seen: Seen) -> Tensor | None:
        """Return the penalty of samples x [B, ...], a scalar with its strength; None for no penalty."""
        return None


@dataclass(frozen=True)
class Penalty(Prior):
    """A prior with a strength, the weight of its penalty in the loss."""

    strength: float

    def __post_init__(self) -> None:
        if isinstance(self.strength, bool) or not 0 < self.strength < math.inf:
            raise ConsilienceError(
                f"`strength` of {type(self).__name__} must be positive and finite, got {self.strength!r}; "
                "leave the prior out to have none."
            )


@dataclass(frozen=True)
class L2(Penalty):
    """strength x ||x||_2^2, the mean over the batch."""

    strength: float = 1e-4

    def penalty(self, x: Tensor, seen: Seen) -> Tensor:
        return self.strength * square(x) / len(x)


@dataclass(frozen=True)
class Blur(Penalty):
    """strength x ||x - blur(x)||_2^2, the mean over the batch; blur is (1 2 1)^T (1 2 1) / 16.

    Borders are reflected, so that a constant image has none.
    """

    strength: float = 0.01

    needs_images: ClassVar[bool] = True

    def penalty(self, x: Tensor, seen: Seen) -> Tensor:
        found: Tensor = _Sharp.apply(x)  # type: ignore[no-untyped-call]
        return self.strength * found / len(x)


@dataclass(frozen=True)
class TotalVariation(Penalty):
    """strength x sum of |difference|^power of neighbours in rows and in columns, the mean over the batch."""

    strength: float = 1e-3
    power: Literal[1, 2] = 1

    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power not in (1, 2):
            raise ConsilienceError(f"`power` must be 1 or 2, got {self.power!r}.")

    def penalty(self, x: Tensor, seen: Seen) -> Tensor:
        steps = [x.diff(dim=dim) for dim in (-2, -1)]
        # A constant image has none, since borders have no neighbours outside.
        down, across = ((step.abs() if self.power == 1 else step.square()).sum() for step in steps)
        return self.strength * (down + across) / len(x)


@dataclass(frozen=True)
class BatchNormStatistics(Penalty):
    """strength x sum_l ||mu_l - mu_l^syn||^2 + ||sigma_l - sigma_l^syn||^2, over all batch norms l.

    mu_l and sigma_l are the running mean and standard deviation of the inputs of layer l of the teacher, and
    mu_l^syn, sigma_l^syn those of this batch. sigma is sqrt(variance + eps) with the layer's eps, since sqrt
    has no derivative at 0; `of` "variance" compares variances. Yin et al. 2020 (DeepInversion).
    """

    strength: float = 1.0
    of: Literal["std", "variance"] = "std"

    needs_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in ("std", "variance"):
            raise ConsilienceError(f"`of` must be 'std' or 'variance', got {self.of!r}.")

    def penalty(self, x: Tensor, seen: Seen) -> Tensor:
        found = [*(norm.mean for norm in seen.norms), *(self._spread(n.variance, n.eps) for n in seen.norms)]
        kept = [
            *(norm.running_mean for norm in seen.norms),
            *(self._spread(norm.running_variance, norm.eps) for norm in seen.norms),
        ]
        # As one vector, because a deep network has many short ones.
        return self.strength * square(torch.cat(found) - torch.cat(kept))

    def _spread(self, variance: Tensor, eps: float) -> Tensor:
        return (variance + eps).sqrt() if self.of == "std" else variance


@dataclass(frozen=True)
class Disagreement(Penalty):
    """strength x (1 - JS(p_teacher, p_student)), the mean over the batch: samples on which the two disagree.

    JS is the Jensen-Shannon divergence in nats, and p are softmax over the teacher's classes. Yin et al. 2020
    (Adaptive DeepInversion).
    """

    strength: float = 1.0

    needs_student: ClassVar[bool] = True

    def penalty(self, x: Tensor, seen: Seen) -> Tensor:
        assert seen.student is not None
        logs = [seen.logits.log_softmax(1), seen.student.log_softmax(1)]
        # log((p + q) / 2), which is finite where one of the two is 0.
        middle = torch.logaddexp(*logs) - math.log(2)
        halves = [(log.exp() * (log - middle)).sum(1) / 2 for log in logs]
        return self.strength * (1 - (halves[0] + halves[1])).mean()


@dataclass(frozen=True)
class Augmented(Prior):
    """The teacher sees each sample turned, moved and mirrored at random, in another way at every step.

    `shift` is the largest move as a part of each side, `angle` the largest turn in degrees, both ways; with
    `flip` half are mirrored left to right. Pixels are interpolated linearly, and the border goes on. On CUDA
    its derivative adds in no fixed order, so that bits can differ between runs.
    """

    shift: float = 0.1
    angle: float = 10.0
    flip: bool = False

    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, high in (("shift", 1), ("angle", 180)):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value <= high:
                raise ConsilienceError(f"`{name}` must be in [0, {high}], got {value!r}.")
        if not isinstance(self.flip, bool):
            raise ConsilienceError(f"`flip` must be true or false, got {self.flip!r}.")
        if not (self.shift or self.angle or self.flip):
            raise ConsilienceError(
                "`shift`, `angle` or `flip` must change something, got none; leave it out."
            )

    def view(self, x: Tensor, seeds: Tensor) -> Tensor:
        # By sample and step, so that no view depends on the batch.
        drawn = uniform(seeds, 4).double()
        turn = torch.deg2rad(self.angle * (2 * drawn[:, 0] - 1))
        # A grid has a length of two from border to border.
        moves = 2 * self.shift * (2 * drawn[:, 1:3] - 1)
        mirror = torch.where(drawn[:, 3] < 0.5, -1.0, 1.0) if self.flip else torch.ones(len(x)).double()

        # Coordinates are scaled by the sides, so that a turn of a long image keeps its angles.
        ratio = x.shape[-2] / x.shape[-1]
        cos, sin = turn.cos(), turn.sin()
        rows = [
            torch.stack([mirror * cos, -mirror * sin * ratio, moves[:, 0]], 1),
            torch.stack([sin / ratio, cos, moves[:, 1]], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1).to(x), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class _Sharp(torch.autograd.Function):
    """||x - R x C^T||^2 of images, with R and C the matrices that blur columns and rows.

    Products of small matrices are faster than convolutions of one channel, and a derivative by hand takes
    half the passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows, columns = (smoothing(size, x) for size in x.shape[-2:])
        rest = x - rows @ (x @ columns.T)
        ctx.save_for_backward(rest, rows, columns)
        return square(rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        rest, rows, columns = ctx.saved_tensors
        return torch.sub(rest, rows.T @ (rest @ columns)).mul_(2 * grads[0])


def square(x: Tensor) -> Tensor:
    """Return the sum of squares of all numbers."""
    return x.flatten().dot(x.flatten())


def smoothing(size: int, like: Tensor) -> Tensor:
    """Return the matrix [size, size] that blurs a line with (1 2 1) / 4, with reflected borders.

    >>> smoothing(3, torch.zeros(1)).tolist()
    [[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]]
    """
    line = torch.arange(size, device=like.device)
    matrix = like.new_zeros(size, size)
    for step, weight in ((-1, 0.25), (0, 0.5), (1, 0.25)):
        # -1 is 1, and `size` is `size - 2`.
        at = (size - 1 - (size - 1 - (line + step).abs()).abs())[:, None]
        matrix.scatter_add_(1, at, matrix.new_full((size, 1), weight))
    return matrix


def at_step(seeds: Tensor, step: int) -> Tensor:
    """Return the seeds [B] of samples at a step."""
    return scattered(seeds + step) & ((1 << 63) - 1)
