"""Progressive networks: one column per task, which reads earlier columns and does not change them."""

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
from consilience.core.tree import Input, one_tensor
from consilience.models.heads import Heads, escape, tasks

COLUMNS = "columns."


class Progressive(Heads):
    """Columns of layers, one per task, which read earlier columns through laterals.

    h_i = f(W_i h_{i-1} + b_i + U_i relu(V_i [alpha_1 h_{i-1}^1, ..] + c_i))

    [alpha_j h^j] are the concatenated activations of all earlier columns at the layer before, detached, each
    times its learned scalar. V_i (1 x 1 on maps) makes `bottleneck` channels of them, by default as many as
    h_{i-1} has, and U_i is of the kind of W_i. f is ReLU, on maps followed by 2 x 2 max pooling. The first
    layer reads the input alone. The head of a task reads psi = [h_L, relu(V [alpha_j h_L^j] + c)] [B, d], so
    that the U of the head are the last columns of its weight.

    `inputs` is the shape of a sample: (n,) for a perceptron, which flattens, or (channels, side, side)
    for 3 x 3 convolutions. `widths` are the units (maps) of the layers. Column k = 0, 1, .. has
    max(1, round(shrink^k w)) of them. Entries are `columns.<task>.<layer>.` weight, bias, alpha [k],
    down (V), offset (c), up (U), and `heads.<task>.` weight and bias as in MultiHead; the buffer
    `columns.<task>.order` is k. With task None the outputs of all columns are written, if no two share an
    output. Without laterals (up = 0) a column is an independent network. Features with task None are the
    first column's. Rusu et al. 2016; one scalar per earlier column, drawn from U(0, 0.1) ("small random
    values").

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
        self.inputs, self.widths = tuple(inputs), tuple(widths)
        self.bottleneck, self.shrink = bottleneck, shrink
        # A bottleneck of 0 must not pass for None.
        if not self.widths or min(*self.inputs, *self.widths, bottleneck or 1) < 1 or bottleneck == 0:
            raise ConsilienceError(
                "a column must have a hidden layer and only widths of at least 1, "
                f"got inputs {self.inputs}, layers {self.widths}, `bottleneck={bottleneck}`."
            )
        if not 0 < shrink <= 1:
            raise ConsilienceError(f"`shrink` must be in (0, 1], got {shrink}.")

        # Every layer of maps halves the side.
        self.maps = len(self.inputs) == 3
        side = self.inputs[-1] >> len(self.widths) if self.maps else 1
        if side < 1:
            raise ConsilienceError(f"`size` must be at least {1 << len(self.widths)}, got {self.inputs[-1]}.")
        self.places = side * side
        """The number of features per unit of the last layer."""

    @property
    def name(self) -> str:
        """The catalogue's name."""
        return "progressive_conv" if self.maps else "progressive"

    def __repr__(self) -> str:
        return f"{self.name}({self.inputs}, {self.widths}, {self.outputs}, {self.bottleneck}, {self.shrink})"

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        """Return nothing: the first task brings the first column."""
        return {}, {}

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Add a column for the source's task, uniform in +-1 / sqrt(inputs of a unit), if it has none."""
        if self._has_head(params, buffers, source):
            return params, buffers
        column, earlier = f"{COLUMNS}{self.head_key(source)}.", _tasks_in_order(params, buffers)
        like = next((tensor for tensor in params.values() if tensor.is_floating_point()), torch.zeros(0))
        widths = [max(1, round(self.shrink ** len(earlier) * width)) for width in self.widths]
        new: Params = {}

        def draw(name: str, *shape: int, inputs: int) -> None:
            value = (2 * torch.rand(shape, generator=generator) - 1) * inputs**-0.5
            new[column + name] = value.to(like)

        # Layer i of `depth` is the head, which has laterals but no weight of its own here.
        kernel = (3, 3) if self.maps else ()
        before = self.inputs[0] if self.maps else prod(self.inputs)
        depth = len(widths)
        for i in range(depth + 1):
            if i < depth:
                draw(f"{i}.weight", widths[i], before, *kernel, inputs=before * prod(kernel))
                draw(f"{i}.bias", widths[i], inputs=before * prod(kernel))
            # The first layer reads the input alone.
            if i and earlier:
                read = sum(len(params[f"{COLUMNS}{task}.{i - 1}.weight"]) for task in earlier)
                narrow = self.bottleneck or before
                alpha = 0.1 * torch.rand(len(earlier), generator=generator)
                new[f"{column}{i}.alpha"] = alpha.to(like)
                draw(f"{i}.down", narrow, read, inputs=read)
                draw(f"{i}.offset", narrow, inputs=read)
                if i < depth:
                    draw(f"{i}.up", widths[i], narrow, *kernel, inputs=narrow * prod(kernel))
            before = widths[i] if i < depth else before

        width = (before + (self.bottleneck or before if earlier else 0)) * self.places
        params, buffers = self._add_head({**params, **new}, buffers, source, width, like, generator)
        return params, {**buffers, f"{column}order": torch.tensor(len(earlier), device=like.device)}

    def __call__(
        self, params: Params, buffers: Params, x: Input, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        return self.bind(params, buffers, train)[0](x, task), buffers

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        held = {name: tensor.clone() for name, tensor in buffers.items()}
        order = _tasks_in_order(params, buffers)

        def forward(x: Input, task: str | None) -> Tensor:
            heads = self.heads(params, held, task)
            psis = self._features(params, order, [head.task for head in heads], x)
            if not heads:
                return self._no_outputs(one_tensor(x, "a progressive network").flatten(1))
            return self._outputs([psis[head.task] for head in heads], heads)

        return forward, held

    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        order = _tasks_in_order(params, buffers)
        chosen = escape(task) if task is not None else (order or [""])[0]
        if chosen not in order:
            raise ConsilienceError(
                f"features need a task that has a column, got {task!r} and {len(order)} columns."
            )
        return self._features(params, order, [chosen], x)[chosen]

    def task_of(self, entry: str) -> str | None:
        return entry.split(".")[1] if entry.startswith(COLUMNS) else super().task_of(entry)

    def read(self, params: Params) -> set[str]:
        """Return the entries that later columns read: all below the heads, but those of the last column."""
        # The number of scalars says which column is last; its order is a buffer, which is not here.
        k = len(tasks(params)) - 1
        last = {task for task in tasks(params) if len(params.get(f"{COLUMNS}{task}.1.alpha", ())) == k}

        found = set()
        for name in params:
            if name.startswith(COLUMNS):
                _, task, layer, _ = name.split(".")
                if task not in last and int(layer) < len(self.widths):
                    found.add(name)
        return found

    def _features(
        self, params: Params, order: Sequence[str], wanted: Sequence[str], x: Input
    ) -> dict[str, Tensor]:
        """Return psi [B, d] of the wanted columns; the others before them run without gradient."""
        x = one_tensor(x, "a progressive network")
        fits = tuple(x.shape[1:]) == self.inputs if self.maps else x.shape[1:].numel() == prod(self.inputs)
        if not fits:
            # Not an error of ours: `Model.check` turns it into one that names the samples.
            raise ValueError(f"columns take inputs {self.inputs}, not {tuple(x.shape[1:])}")

        found: dict[str, Tensor] = {}
        below: list[list[Tensor]] = []
        # Columns after the last wanted one are read by none of these.
        for task in order[: 1 + max((order.index(name) for name in wanted), default=-1)]:
            with nullcontext() if task in wanted else torch.no_grad():
                layers, found[task] = self._column(params, task, x, below)
            # Later tasks must not train earlier columns.
            below.append([h.detach() for h in layers])
        return found

    def _column(
        self, params: Params, task: str, x: Tensor, below: Sequence[Sequence[Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the activations [B, w, ..] of a column's layers, and psi [B, d]."""
        column, layers, h = f"{COLUMNS}{task}.", list[Tensor](), x if self.maps else x.flatten(1)
        for i in range(len(self.widths)):
            out = self._layer(h, params[f"{column}{i}.weight"], params[f"{column}{i}.bias"])
            if i and below:
                lateral = self._lateral(params, f"{column}{i}.", below, i)
                out = out + self._layer(lateral, params[f"{column}{i}.up"], None)
            h = F.max_pool2d(out.relu(), 2) if self.maps else out.relu()
            layers.append(h)

        # The head's own lateral is a part of its features.
        psi = h.flatten(1)
        if below:
            lateral = self._lateral(params, f"{column}{len(layers)}.", below, len(layers))
            psi = torch.cat([psi, lateral.flatten(1)], 1)
        return layers, psi

    def _layer(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return W h + b."""
        return F.conv2d(h, weight, bias, padding=1) if self.maps else F.linear(h, weight, bias)

    def _lateral(self, params: Params, prefix: str, below: Sequence[Sequence[Tensor]], i: int) -> Tensor:
        """Return relu(V [alpha_j h_{i-1}^j] + c) [B, bottleneck, ..]."""
        alpha, down, offset = (params[prefix + part] for part in ("alpha", "down", "offset"))
        h = torch.cat([alpha[j] * layers[i - 1] for j, layers in enumerate(below)], 1)
        return (F.conv2d(h, down[..., None, None], offset) if self.maps else F.linear(h, down, offset)).relu()


def _tasks_in_order(params: Params, buffers: Params) -> list[str]:
    """Return the tasks that have columns, first to last."""
    order = {task: int(buffers.get(f"{COLUMNS}{task}.order", -1)) for task in tasks(params)}
    found = sorted(order, key=order.__getitem__)
    # Averages of two agents' states would have gaps, or one number twice.
    if [order[task] for task in found] != list(range(len(found))):
        raise ConsilienceError(
            f"columns must be those of one agent, numbered 0 .. {len(found) - 1}, "
            f"got {sorted(order.values())}; to merge several agents use models.adapters or models.multi_head."
        )
    return found
