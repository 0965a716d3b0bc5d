"""The modules behind the catalogue of models: plain torch.

Names of classes and of public attributes are part of `models.module.structure` and of backbone hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor, nn


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def lenet(outputs: int, channels: int, size: int) -> nn.Sequential:
    """Return two 5 x 5 convolutions and three linear layers."""
    side = (size // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * side * side, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, outputs),
    )


def conv(outputs: int, channels: int, size: int, width: int) -> nn.Sequential:
    """Return two 3 x 3 convolutions and a linear head."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (size // 4) ** 2, outputs),
    )


def random_features(inputs: int, width: int, seed: int) -> nn.Sequential:
    """Return max(W x + b, 0) with W ~ N(0, 12 / inputs) and b = -W c."""
    generator = torch.Generator().manual_seed(seed)
    # On "meta" the layer draws no first values, which would move torch's random state.
    layer = nn.Linear(inputs, width, device="meta").to_empty(device="cpu")
    weight = torch.randn(width, inputs, generator=generator) * (12 / inputs) ** 0.5
    through = torch.rand(width, inputs, generator=generator) * torch.rand(width, 1, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(-(weight * through).sum(1))
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU())


class Fourier(nn.Module):
    """A linear head on sqrt(2 / D) cos(Omega psi + b) of a body's features psi [B, d]."""

    def __init__(
        self, body: nn.Module, inputs: int, width: int, sigma: float, seed: int, outputs: int
    ) -> None:
        super().__init__()
        self.body, self.fourier, self.head = body, nn.Linear(inputs, width), nn.Linear(width, outputs)
        # The features have their own seed, so that all agents have the same whatever theirs is.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.fourier.weight.copy_(torch.randn(width, inputs, generator=generator) / sigma)
            self.fourier.bias.copy_(2 * torch.pi * torch.rand(width, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        psi = self.fourier(self.body(x).flatten(1)).cos() * (2 / self.fourier.out_features) ** 0.5
        out: Tensor = self.head(psi)
        return out


class Block(nn.Module):
    """relu(x' + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, inputs: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm1 = normalise(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = normalise(norm, width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), normalise(norm, width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of blocks (double width, half the size), the mean over places, a linear head."""

    def __init__(self, depth: int, outputs: int, channels: int, norm: str, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), normalise(norm, width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate((3, 3, 3) if depth == 20 else (2, 2, 2, 2)):
            for i in range(count):
                # The first block of every stage but the first halves the size.
                blocks.append(Block(inputs, width << stage, 2 if stage and not i else 1, norm))
                inputs = width << stage
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, outputs)

        # He et al. 2015, as torchvision's networks begin; torch's own default is narrower.
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return out


def normalise(norm: str, channels: int) -> nn.Module:
    """Return a group norm (at most 8 groups of at least two channels) or a batch norm."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    # A group of one channel at one place would normalise a single number, to zero.
    return nn.GroupNorm(gcd(8, channels, max(channels // 2, 1)), channels)


# Plain operations instead of nn.LSTM, so that vmap can run many clients at once.
class LSTM(nn.Module):
    """One layer over x [B, T, d] -> [B, T, h]: the equations and the initial values of nn.LSTM."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        bound = hidden**-0.5
        self.input = nn.Parameter(torch.empty(4 * hidden, inputs).uniform_(-bound, bound))
        self.state = nn.Parameter(torch.empty(4 * hidden, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(4 * hidden).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        # The inputs of all times at once: only the state needs the loop.
        inputs = x @ self.input.T + self.bias
        state = x.new_zeros(len(x), self.state.shape[1])
        cell, states = state, []
        for now in inputs.unbind(1):
            enter, forget, candidate, show = (now + state @ self.state.T).chunk(4, 1)
            cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
            state = torch.sigmoid(show) * torch.tanh(cell)
            states.append(state)
        return torch.stack(states, 1)


class CharLSTM(nn.Module):
    """An embedding, LSTM layers, a linear head on the last state."""

    def __init__(self, outputs: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(outputs, embedding)
        self.body = nn.Sequential(*[LSTM(hidden if i else embedding, hidden) for i in range(layers)])
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embedding(x))[:, -1])
        return out


class Attention(nn.Module):
    """x + causal self-attention of its norm, then x + perceptron of its norm; [B, T, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, size)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)

        # A character sees itself and those before it.
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = query @ key.transpose(-1, -2) * size**-0.5
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CharTransformer(nn.Module):
    """Embeddings of characters and places, blocks of causal attention, a linear head on the last place."""

    def __init__(self, outputs: int, window: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(outputs, width)
        self.places = nn.Parameter(0.02 * torch.randn(window, width))
        self.body = nn.Sequential(*[Attention(width, heads) for _ in range(layers)], nn.LayerNorm(width))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embedding(x) + self.places[: x.shape[1]])[:, -1])
        return out
