"""Pictures of random pen strokes: samples that come from no data."""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.core.augment import uniform
from consilience.core.checks import whole_number
from consilience.core.params import key
from consilience.memory._inversion import seeds_of

CHUNK = 256
"""Pictures that are drawn at once."""

STROKES, POINTS = 3, 32
"""The most strokes of a picture, and the points that each is drawn as."""

JOINED = 0.6
"""How often a stroke begins where the one before it ended."""

ALONG, MARGIN = (0.4, 1.0), 1 / 7
"""Width over height of the box of all strokes, and what is left free around it."""

PEN = (0.021, 0.061)
"""Half the breadth of a pen, as a part of the picture's height."""


def strokes(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Draw `count` pictures [count, 1, *size] of one to three random strokes each, with pixels in [0, 1].

    A stroke is a cubic Bezier curve whose control points are uniform in a square; it begins where the one
    before it ended in 6 of 10 cases. All strokes of a picture are stretched to a box of 5/7 of its height. A
    pixel at the distance d of the nearest stroke has clip(1 - (d - w), 0, 1), with half a pen's breadth w.
    That experts can be distilled on procedural pictures is in Baradad et al. 2021.

    >>> strokes(5, (28, 28)).shape
    torch.Size([5, 1, 28, 28])
    """
    whole_number(count=count, height=size[0], width=size[1])
    drawn = uniform(seeds_of(count, key(seed, "strokes")), 8 * STROKES + STROKES + 2)
    return torch.cat([_pictures(part, size) for part in drawn.split(CHUNK)])


def _pictures(drawn: Tensor, size: tuple[int, int]) -> Tensor:
    """Return one picture [n, 1, *size] for each row of random numbers in [0, 1)."""
    lines, used = _lines(drawn[:, : 8 * STROKES].view(-1, STROKES, 4, 2), drawn[:, 8 * STROKES : -2])

    # The box of all strokes that are there, in the middle of the picture.
    there = used[:, :, None, None]
    low = torch.where(there, lines, torch.inf).amin((1, 2))
    high = torch.where(there, lines, -torch.inf).amax((1, 2))
    height, width = size
    scale = (1 - 2 * MARGIN) * height / (high - low).amax(1).clamp_min(0.2)
    flat = ALONG[0] + (ALONG[1] - ALONG[0]) * drawn[:, -1]
    scale = torch.stack([scale, scale * flat], 1)[:, None, None]
    middle = torch.tensor([(height - 1) / 2, (width - 1) / 2])
    lines = (lines - ((low + high) / 2)[:, None, None]) * scale + middle

    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    pixels = torch.stack([rows, columns], -1).view(-1, 2)
    pen = height * (PEN[0] + (PEN[1] - PEN[0]) * drawn[:, -2])
    # What is not drawn is far from all pixels.
    points = torch.where(there, lines, 100.0 * (height + width)).flatten(1, 2)
    near = torch.cdist(pixels.expand(len(drawn), -1, -1), points).amin(2)
    return (1 - (near - pen[:, None])).clamp(0, 1).view(-1, 1, height, width)


def _lines(points: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points [n, S, P, 2] on the curves of control points [n, S, 4, 2], and which are drawn."""
    points = points.clone()
    for stroke in range(1, STROKES):
        joined = chance[:, stroke, None] < JOINED
        points[:, stroke, 0] = torch.where(joined, points[:, stroke - 1, 3], points[:, stroke, 0])
    t = torch.linspace(0, 1, POINTS)
    weights = torch.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], 1)
    # As often one stroke as two, or three.
    used = torch.arange(STROKES) <= (STROKES * chance[:, :1]).long()
    return torch.einsum("pc,nscd->nspd", weights, points), used
