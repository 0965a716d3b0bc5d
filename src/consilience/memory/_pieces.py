"""One image cut into many: pieces of random place, size and angle."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.augment import uniform
from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.params import key
from consilience.memory._inversion import seeds_of

CHUNK = 1024
"""Pieces that are cut at once."""


def pieces(
    image: Tensor,
    count: int,
    size: tuple[int, int],
    seed: int = 0,
    scale: tuple[float, float] = (0.1, 0.5),
    angle: float = 30.0,
    flip: bool = True,
) -> Tensor:
    """Cut `count` pieces [count, C, *size] out of one image [C, H, W].

    A piece has `scale` (lowest, highest; log-uniform) of the largest size that fits, any place, a turn of up
    to `angle` degrees both ways, and with `flip` half are mirrored. Pixels are interpolated linearly. What
    one image of much detail teaches is in Asano and Saeed 2023.

    >>> pieces(torch.rand(3, 40, 60), 5, (8, 8)).shape
    torch.Size([5, 3, 8, 8])
    """
    if not isinstance(image, Tensor) or image.dim() != 3 or not image.is_floating_point():
        got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else kind_of(image)
        raise ConsilienceError(f"`image` must be one image [C, H, W] of real numbers, got {got}.")
    whole_number(count=count, height=size[0], width=size[1])
    least, most = scale
    if not 0 < least <= most <= 1:
        raise ConsilienceError(f"`scale` must be (lowest, highest) in (0, 1], got {scale}.")
    if not 0 <= angle <= 180:
        raise ConsilienceError(f"`angle` must be in [0, 180], got {angle}.")

    drawn = uniform(seeds_of(count, key(seed, "pieces")), 5).double()
    turn = torch.deg2rad(angle * (2 * drawn[:, 0] - 1))
    # As many pieces of one octave as of the next.
    part = torch.exp(math.log(least) + (math.log(most) - math.log(least)) * drawn[:, 1])
    mirror = torch.where(drawn[:, 2] < 0.5, -1.0, 1.0) if flip else torch.ones(count).double()

    # Half the sides of a piece in pixels of the image, and of the box around it once it is turned.
    fit = min(image.shape[1] / size[0], image.shape[2] / size[1]) * part / 2
    height, width = size[0] * fit, size[1] * fit
    cos, sin = turn.cos(), turn.sin()
    down = (height * cos.abs() + width * sin.abs()).clamp_max(image.shape[1] / 2)
    across = (width * cos.abs() + height * sin.abs()).clamp_max(image.shape[2] / 2)

    # In coordinates from -1 to 1 over the image: half a side is 1.
    half_rows, half_columns = image.shape[1] / 2, image.shape[2] / 2
    x_terms = [mirror * width * cos, -height * sin, (half_columns - across) * (2 * drawn[:, 3] - 1)]
    y_terms = [mirror * width * sin, height * cos, (half_rows - down) * (2 * drawn[:, 4] - 1)]
    rows = [torch.stack(x_terms, 1) / half_columns, torch.stack(y_terms, 1) / half_rows]
    found = []
    for theta in torch.stack(rows, 1).to(image).split(CHUNK):
        grid = F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)
        # One tall picture of all pieces, so that the image is not copied for each.
        tall = F.grid_sample(
            image[None], grid.flatten(0, 1)[None], padding_mode="border", align_corners=False
        )
        found.append(tall[0].view(len(image), len(theta), *size).transpose(0, 1))
    return torch.cat(found)
