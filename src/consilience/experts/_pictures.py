"""Pictures of synthetic memory: samples by class in one PNG file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.params import write_bytes


def grid_of(x: Tensor, y: Tensor, columns: int = 12) -> Tensor:
    """Return the first samples of each class of x [N, C, H, W], a row for each, as one picture [.., .., 3].

    Pixels are uint8. Each sample is scaled to its own range, since synthetic samples have any.

    >>> grid_of(torch.rand(4, 1, 2, 2), torch.tensor([0, 0, 1, 1]), 2).shape
    torch.Size([67, 67, 3])
    """
    # Small samples are enlarged, so that they can be seen.
    x = x.repeat_interleave(enlarged := max(1, 32 // x.shape[-1]), 2).repeat_interleave(enlarged, 3)
    rows = []
    for column in y.unique().tolist():
        own = x[y == column][:columns].float()
        low, high = own.flatten(1).amin(1), own.flatten(1).amax(1)
        spread = torch.where(high > low, high - low, 1.0)
        own = (own - low.view(-1, 1, 1, 1)) / spread.view(-1, 1, 1, 1)
        # Three channels are colours; of any other number the first is shown.
        own = own[:, :3] if own.shape[1] >= 3 else own[:, :1].expand(-1, 3, -1, -1)
        # One grey pixel between samples; what a class lacks is grey too.
        tiles = F.pad(own, (1, 0, 1, 0), value=0.5)
        missing = columns - len(tiles)
        tiles = torch.cat([tiles, tiles.new_full((missing, *tiles.shape[1:]), 0.5)])
        rows.append(torch.cat(list(tiles), 2))
    picture = F.pad(torch.cat(rows, 1), (0, 1, 0, 1), value=0.5)
    return (255 * picture).round().to(torch.uint8).permute(1, 2, 0)


def png_of(picture: Tensor) -> bytes:
    """Return the bytes of a PNG file of a picture [H, W, 3] (uint8)."""
    height, width, _ = picture.shape
    # Each line begins with the number of its filter: none.
    lines = torch.cat([picture.new_zeros(height, 1), picture.reshape(height, -1)], 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(lines.contiguous().numpy().tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def write_pictures(path: Path, x: Tensor, y: Tensor) -> bool:
    """Write samples [N, C, H, W] by class as a PNG file; False where they are no images."""
    if x.dim() != 4 or not x.is_floating_point():
        return False
    write_bytes(path, png_of(grid_of(x.cpu(), y.cpu())))
    return True
