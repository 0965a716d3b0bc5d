"""Boxes on a grid of cells: the targets of a small detector, and boxes of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError


class Cells(NamedTuple):
    """The targets of cells of images."""

    object: Tensor
    """Whether the centre of a box lies in the cell [N, 1, H, W]: a task of kind "labels"."""
    box: Tensor
    """Of cells with an object: where in the cell the centre is, and the box's size in images [N, 4, H, W].

    (x, y, w, h); NaN in other cells: a task of kind "value"."""


def cell_targets(boxes: Sequence[Tensor], size: tuple[int, int], cell: int) -> Cells:
    """Return the targets of a detector on a grid, from the boxes of each image.

    Args:
        boxes: [boxes, 4] per image: left, top, right, bottom in pixels.
        size: height and width of the images.
        cell: pixels per side of a cell; that of `models.multi_net` is 4.

    Raises ConsilienceError for boxes that are empty or not inside the image.

    >>> found = cell_targets([torch.tensor([[0, 0, 4, 8]])], (8, 8), 4)
    >>> found.object[0, 0].tolist(), found.box[0, :, 1, 0].tolist()
    ([[0.0, 0.0], [1.0, 0.0]], [0.5, 0.0, 0.5, 1.0])
    """
    height, width = size
    if height % cell or width % cell:
        raise ConsilienceError(f"`size` must be a multiple of `cell`, got {height} x {width} and {cell}.")
    rows, columns = height // cell, width // cell
    # Cells without an object are no targets for boxes, so that their loss does not count.
    there = torch.zeros(len(boxes), 1, rows, columns)
    found = torch.full((len(boxes), 4, rows, columns), torch.nan)
    for image, own in enumerate(boxes):
        for x0, y0, x1, y1 in torch.as_tensor(own).double().reshape(-1, 4).tolist():
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise ConsilienceError(
                    f"boxes must be (left, top, right, bottom) inside the image, got {(x0, y0, x1, y1)} in "
                    f"image {image} of {width} x {height}."
                )
            x, y = (x0 + x1) / 2 / cell, (y0 + y1) / 2 / cell
            # A cell has one box: of two with their centres in one, the larger.
            column, row = min(int(x), columns - 1), min(int(y), rows - 1)
            area = (x1 - x0) * (y1 - y0) / (width * height)
            if there[image, 0, row, column] and area <= float(found[image, 2:, row, column].prod()):
                continue
            there[image, 0, row, column] = 1
            own_box = (x - column, y - row, (x1 - x0) / width, (y1 - y0) / height)
            found[image, :, row, column] = torch.tensor(own_box)
    return Cells(there, found)


def cell_boxes(there: Tensor, box: Tensor, cell: int, threshold: float = 0.5) -> list[Tensor]:
    """Return the boxes [boxes, 4] of each image, in pixels, from predictions or targets of cells.

    Args:
        there: how probable it is that a cell has an object [N, 1, H, W].
        box: of each cell [N, 4, H, W], as `cell_targets` has it.
        cell: pixels per side of a cell.
        threshold: cells with a greater probability have a box.

    >>> found = cell_targets([torch.tensor([[1.0, 0.0, 4.0, 6.0]])], (8, 8), 4)
    >>> cell_boxes(found.object, found.box, 4)[0].round(decimals=4).tolist()
    [[1.0, 0.0, 4.0, 6.0]]
    """
    rows, columns = there.shape[2:]
    found = []
    for image in range(len(there)):
        # Of cells without an object, what the answers say of a box means nothing.
        at = (there[image, 0] > threshold).nonzero()
        x, y, w, h = box[image][:, at[:, 0], at[:, 1]].double()
        x, y = (at[:, 1] + x) * cell, (at[:, 0] + y) * cell
        w, h = w * columns * cell / 2, h * rows * cell / 2
        found.append(torch.stack([x - w, y - h, x + w, y + h], 1))
    return found
