"""Dense prediction of several tasks on a small encoder and decoder: PAD-Net, MTI-Net, MultiNet.

Names of classes and of public attributes are part of `models.module.structure` and of backbone hashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.models.nets import normalise


def convolved(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a 3 x 3 convolution, a group norm and ReLU."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, normalise("group", outputs), nn.ReLU())


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Return maps [B, d, H, W] in the size of others."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class Encoder(nn.Module):
    """Images [B, c, H, W] -> maps of w channels at H x W, 2 w at a half and 4 w at a quarter of it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.fine = convolved(channels, width)
        self.middle = nn.Sequential(convolved(width, 2 * width, 2), convolved(2 * width, 2 * width))
        self.coarse = nn.Sequential(convolved(2 * width, 4 * width, 2), convolved(4 * width, 4 * width))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(x)
        half = self.middle(fine)
        # From fine to coarse, as decoders join them.
        return [fine, half, self.coarse(half)]


class Decoder(nn.Module):
    """The maps of the encoder -> one of w channels at H x W; each scale joins the next finer one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.middle, self.fine = convolved(6 * width, 2 * width), convolved(3 * width, width)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        fine, half, quarter = maps
        half = self.middle(torch.cat([half, resized(quarter, half)], 1))
        out: Tensor = self.fine(torch.cat([fine, resized(half, fine)], 1))
        return out


class Distillation(nn.Module):
    """Spatial attention between tasks: F_k + sum_{t != k} sigmoid(W_g^k F_k) * (W_t^k F_t) for each task k.

    Maps [B, w, H, W] per task, in a fixed order; W are 3 x 3 convolutions. Xu et al. 2018.
    """

    def __init__(self, tasks: int, width: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(tasks))
        # Row by row: for each task, one for each other task in their order.
        self.maps = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(tasks * (tasks - 1))
        )

    def forward(self, own: Sequence[Tensor]) -> list[Tensor]:
        found, maps = [], iter(self.maps)
        for k, gate in enumerate(self.gates):
            others = [f for t, f in enumerate(own) if t != k]
            # Without other tasks there is nothing to add.
            if not others:
                found.append(own[k])
                continue
            sent = torch.stack([next(maps)(f) for f in others]).sum(0)
            found.append(own[k] + torch.sigmoid(gate(own[k])) * sent)
        return found


class Distilled(nn.Module):
    """Tasks answer at one scale or at three, learn from one another there, and answer again in full size.

    At each scale, from the coarsest on, a task has maps of its own, made of the encoder's and of its own at
    the scale before; an answer is made of them; and `Distillation` mixes the maps of all tasks. The last
    answer is made of the mixed maps of all scales. Returns {task: (answer, one per scale)}, all [B, k, H, W].
    """

    def __init__(self, widths: Mapping[str, int], channels: int, width: int, scales: int) -> None:
        super().__init__()
        self.tasks, self.encoder = list(widths), Encoder(channels, width)
        # One scale is that of the images, behind a decoder; three are those of the encoder.
        if scales == 1:
            self.bring: nn.ModuleList = nn.ModuleList([Decoder(width)])
        else:
            self.bring = nn.ModuleList(convolved(width << i, width) for i in reversed(range(scales)))
        self.own, self.first = nn.ModuleList(), nn.ModuleList()
        for scale in range(scales):
            inputs = 2 * width if scale else width
            self.own.append(nn.ModuleList(convolved(inputs, width) for _ in widths))
            self.first.append(nn.ModuleList(nn.Conv2d(width, k, 1) for k in widths.values()))
        self.distil = nn.ModuleList(Distillation(len(widths), width) for _ in range(scales))
        self.last = nn.ModuleList(
            nn.Sequential(convolved(scales * width, width), nn.Conv2d(width, k, 1)) for k in widths.values()
        )

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
        maps = self.encoder(x)
        given = [maps] if len(self.bring) == 1 else maps[::-1]
        earlier: list[list[Tensor]] = [[] for _ in self.tasks]
        mixed: list[list[Tensor]] = [[] for _ in self.tasks]
        before: list[Tensor] = []
        # The elements of a list of modules have no type of their own.
        scales: Any = zip(self.bring, self.own, self.first, self.distil, given, strict=True)
        for bring, layers, answers, distil, map_ in scales:
            # What a task found at a coarser scale is passed on next to the shared maps.
            here = bring(map_)
            own = [
                layer(torch.cat([here, resized(before[t], here)], 1) if before else here)
                for t, layer in enumerate(layers)
            ]
            # In full size, so that all answers of a task are compared with the same targets.
            for t, answer in enumerate(answers):
                earlier[t].append(resized(answer(own[t]), x))
            for t, f in enumerate(distil(own)):
                mixed[t].append(resized(f, x))
            before = own

        return {
            task: (last(torch.cat(mixed[t], 1)), *earlier[t])
            for t, (task, last) in enumerate(zip(self.tasks, self.last, strict=True))
        }


class MultiNet(nn.Module):
    """One encoder; answers per image, per pixel (through the decoder), and per cell of 4 x 4 pixels."""

    def __init__(
        self,
        images: Mapping[str, int],
        pixels: Mapping[str, int],
        cells: Mapping[str, int],
        channels: int,
        width: int,
    ) -> None:
        super().__init__()
        self.names = [list(images), list(pixels), list(cells)]
        self.encoder, self.decoder = Encoder(channels, width), Decoder(width)
        self.images = nn.ModuleList(nn.Linear(4 * width, k) for k in images.values())
        self.pixels = nn.ModuleList(nn.Conv2d(width, k, 1) for k in pixels.values())
        self.cells = nn.ModuleList(
            nn.Sequential(convolved(4 * width, 4 * width), nn.Conv2d(4 * width, k, 1)) for k in cells.values()
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.encoder(x)
        # The decoder is run only where pixels are asked for.
        whole, fine = maps[-1].mean((2, 3)), self.decoder(maps) if self.pixels else x
        found: dict[str, Tensor] = {}
        pairs = ((self.images, whole), (self.pixels, fine), (self.cells, maps[-1]))
        for names, (heads, given) in zip(self.names, pairs, strict=True):
            found |= {name: head(given) for name, head in zip(names, heads, strict=True)}
        return found
