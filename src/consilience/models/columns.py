"""Progressive networks: one column for each task, which reads what the earlier columns compute and changes nothing in them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.models.heads import Heads, escape, tasks

COLUMNS = "columns."


class Progressive(Heads):
    """Columns of layers, one for each task: h_i = f(W_i h_{i-1} + b_i + U_i relu(V_i [alpha_1 h_{i-1}^1, ..] + c_i)).

    [alpha_j h^j] are the activations of all earlier columns at the layer before, detached and one after another, each times
    its learned scalar; V_i (1 x 1 on maps) makes `bottleneck` channels of them, by default as many as h_{i-1} has, and U_i is
    of the kind of W_i. f is ReLU, on maps with 2 x 2 max pooling after it. The first layer reads the input alone; the head of
    a task reads psi = [h_L, relu(V [alpha_j h_L^j] + c)] [B, d], so that the U of the head are the last columns of its weight.

    `inputs` is the shape of a sample, (n,) for a perceptron, which flattens, or (channels, side, side) for 3 x 3 convolutions;
    `widths` are the units (maps) of the layers. Column k = 0, 1, .. has max(1, round(shrink^k w)) of them. Entries are
    `columns.<task>.<layer>.` weight, bias, alpha [k], down (V), offset (c), up (U), and `heads.<task>.` weight and bias as in
    MultiHead; the buffer `columns.<task>.order` is k. With task None the outputs of all columns are written, where no two
    share one. Without laterals (up = 0) a column is an independent network. Features with task None are the first column's.
    Rusu et al. 2016; one scalar for each earlier column, drawn from U(0, 0.1) ("small random values").

    >>> model = Progressive((4,), (3,), outputs=2)
    >>> model.init(torch.Generator()), model.task_of("columns.a.0.weight")
    (({}, {}), 'a')
    """

    def __init__(
        self,
        inputs: Sequence[int],
        widths: Sequence[int],
        outputs: int,
        bottleneck: int | None = None,
        shrink: float = 1.0,
    ) -> None:
        super().__init__(outputs)
        self.inputs, self.widths, self.bottleneck, self.shrink = (
            tuple(inputs),
            tuple(widths),
            bottleneck,
            shrink,
        )
        if not self.widths or min(*self.inputs, *self.widths, bottleneck or 1) < 1 or bottleneck == 0:
            raise ConsilienceError(
                "a column should have a hidden layer, and all widths should be at least 1. "
                f"Found inputs {self.inputs}, layers {self.widths}, `bottleneck = {bottleneck}`."
            )
        if not 0 < shrink <= 1:
            raise ConsilienceError(
                f"`shrink` of later columns should be in (0, 1]. Found `shrink = {shrink}`."
            )
        self.maps = len(self.inputs) == 3
        side = self.inputs[-1] >> len(self.widths) if self.maps else 1
        if side < 1:
            raise ConsilienceError(
                f"`size` should be at least {1 << len(self.widths)}. Found `size = {self.inputs[-1]}`."
            )
        self.places = side * side
        """How often a unit of the last layer stands in the features."""

    @property
    def name(self) -> str:
        """The catalogue's name."""
        return "progressive_conv" if self.maps else "progressive"

    def __repr__(self) -> str:
        return f"{self.name}({self.inputs}, {self.widths}, {self.outputs}, {self.bottleneck}, {self.shrink})"

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        """Nothing: the first task brings the first column."""
        return {}, {}

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Parameters and buffers with a column for the source's task, uniform in +-1 / sqrt(inputs of a unit), if it has none."""
        if self._has(params, buffers, source):
            return params, buffers
        task, earlier = self.head_key(source), _columns(params, buffers)
        like = next((p for p in params.values() if p.is_floating_point()), torch.zeros(0))
        widths = [max(1, round(self.shrink ** len(earlier) * w)) for w in self.widths]
        new: Params = {}

        def draw(name: str, *shape: int, inputs: int) -> None:
            value = (2 * torch.rand(shape, generator=generator) - 1) * inputs**-0.5
            new[f"{COLUMNS}{task}.{name}"] = value.to(like)

        size, before, depth = (
            (3, 3) if self.maps else (),
            self.inputs[0] if self.maps else prod(self.inputs),
            len(widths),
        )
        for i in range(depth + 1):
            if i < depth:
                draw(f"{i}.weight", widths[i], before, *size, inputs=before * prod(size))
                draw(f"{i}.bias", widths[i], inputs=before * prod(size))
            if i and earlier:
                read, narrow = (
                    sum(len(params[f"{COLUMNS}{t}.{i - 1}.weight"]) for t in earlier),
                    self.bottleneck or before,
                )
                new[f"{COLUMNS}{task}.{i}.alpha"] = (0.1 * torch.rand(len(earlier), generator=generator)).to(
                    like
                )
                draw(f"{i}.down", narrow, read, inputs=read)
                draw(f"{i}.offset", narrow, inputs=read)
                if i < depth:
                    draw(f"{i}.up", widths[i], narrow, *size, inputs=narrow * prod(size))
            before = widths[i] if i < depth else before
        width = (before + (self.bottleneck or before if earlier else 0)) * self.places
        params, buffers = self._grow({**params, **new}, buffers, source, width, like, generator)
        return params, {**buffers, f"{COLUMNS}{task}.order": torch.tensor(len(earlier), device=like.device)}

    def __call__(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        return self.bind(params, buffers, train)[0](x, task), buffers

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        held, order = {n: b.clone() for n, b in buffers.items()}, _columns(params, buffers)

        def forward(x: Tensor, task: str | None) -> Tensor:
            heads = self._heads(params, held, task)
            psis = self._features(params, order, [h.task for h in heads], x)
            return self._write([psis[h.task] for h in heads], heads) if heads else self._nothing(x)

        return forward, held

    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        order = _columns(params, buffers)
        chosen = escape(task) if task is not None else (order or [""])[0]
        if chosen not in order:
            raise ConsilienceError(
                f"features should be those of a task that has a column. Found {task!r}, and {len(order)} columns."
            )
        return self._features(params, order, [chosen], x)[chosen]

    def task_of(self, entry: str) -> str | None:
        return entry.split(".")[1] if entry.startswith(COLUMNS) else super().task_of(entry)

    def read(self, params: Params) -> set[str]:
        """The entries that later columns read: all below the heads, but those of the last column."""
        k = len(tasks(params)) - 1
        last = {t for t in tasks(params) if len(params.get(f"{COLUMNS}{t}.1.alpha", ())) == k}
        inner = {n: n.split(".") for n in params if n.startswith(COLUMNS)}
        return {
            n
            for n, (_, task, layer, _) in inner.items()
            if task not in last and int(layer) < len(self.widths)
        }

    def _features(
        self, params: Params, order: Sequence[str], wanted: Sequence[str], x: Tensor
    ) -> dict[str, Tensor]:
        """psi [B, d] of the wanted columns; the others before them are run without gradient."""
        fits = tuple(x.shape[1:]) == self.inputs if self.maps else x.shape[1:].numel() == prod(self.inputs)
        if not fits:
            raise ValueError(f"columns take inputs {self.inputs}, not {tuple(x.shape[1:])}")
        found: dict[str, Tensor] = {}
        below: list[list[Tensor]] = []
        for task in order[: 1 + max((order.index(t) for t in wanted), default=-1)]:
            with nullcontext() if task in wanted else torch.no_grad():
                own, found[task] = self._column(params, task, x, below)
            below.append([h.detach() for h in own])
        return found

    def _column(
        self, params: Params, task: str, x: Tensor, below: Sequence[Sequence[Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        """The activations [B, w, ..] of a column's layers, and psi [B, d]."""
        at, layers, h = f"{COLUMNS}{task}.", list[Tensor](), x if self.maps else x.flatten(1)
        for i in range(len(self.widths)):
            out = self._layer(h, params[f"{at}{i}.weight"], params[f"{at}{i}.bias"])
            if i and below:
                out = out + self._layer(
                    self._lateral(params, f"{at}{i}.", below, i), params[f"{at}{i}.up"], None
                )
            h = F.max_pool2d(out.relu(), 2) if self.maps else out.relu()
            layers.append(h)
        psi = h.flatten(1)
        if below:
            psi = torch.cat(
                [psi, self._lateral(params, f"{at}{len(layers)}.", below, len(layers)).flatten(1)], 1
            )
        return layers, psi

    def _layer(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(h, weight, bias, padding=1) if self.maps else F.linear(h, weight, bias)

    def _lateral(self, params: Params, at: str, below: Sequence[Sequence[Tensor]], i: int) -> Tensor:
        """relu(V [alpha_j h_{i-1}^j] + c) [B, bottleneck, ..]."""
        alpha, down, offset = (params[at + n] for n in ("alpha", "down", "offset"))
        h = torch.cat([alpha[j] * layers[i - 1] for j, layers in enumerate(below)], 1)
        return (F.conv2d(h, down[..., None, None], offset) if self.maps else F.linear(h, down, offset)).relu()


def _columns(params: Params, buffers: Params) -> list[str]:
    """The tasks that have columns, in their order."""
    order = {t: int(buffers.get(f"{COLUMNS}{t}.order", -1)) for t in tasks(params)}
    found = sorted(order, key=order.__getitem__)
    if [order[t] for t in found] != list(range(len(found))):
        raise ConsilienceError(
            f"columns should be those of one agent, numbered 0 .. {len(found) - 1}. Found {sorted(order.values())}; "
            "what several agents learn merges in models.adapters or models.multi_head."
        )
    return found
