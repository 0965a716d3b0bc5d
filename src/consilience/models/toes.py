"""Head2Toe: the head of a task reads a few chosen channels of all layers of a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward
from consilience.core.params import Params, key
from consilience.core.source import Examples, Source
from consilience.models.adapted import _side, layers_of
from consilience.models.biased import Biased
from consilience.models.heads import Head, Heads, MultiHead
from consilience.models.pretrained import Backbone

TOES = "toes."


class Toes(Heads):
    """outputs[:, columns_t] = [z_i for i in I_t, logits_t] V_t^T + c_t, where z are pooled outputs of all layers of the backbone.

    Layers are the convolutions, linear layers and attentions of the trunk of `inner` (of a `models.backbone`: that it calls), each
    channel averaged on a grid of `pool` x `pool` (tokens: over all of them), and last the features psi. `by="biases"`: layers give
    what they give to the task, with its biases, and the task's own logits follow. `by="lasso"`: every layer's z are divided by its
    L2 norm (a layer of zeros stays), and there are no logits. Entries are those of `inner`, `toes.<task>.weight` [k, s] and
    `toes.<task>.bias` [k]; the buffer `toes.<task>.index` [s] is I_t. A task without them is answered as `inner` does. Made by `models.head2toe`. Evci et al. 2022.
    """

    own: ClassVar[tuple[str, ...]] = (TOES,)

    def __init__(self, inner: MultiHead, by: Literal["biases", "lasso"], pool: int = 1) -> None:
        super().__init__(inner.outputs)
        if pool < 1:
            raise ConsilienceError(f"`pool` should be at least 1. Found `pool = {pool}`.")
        if by not in ("biases", "lasso"):
            raise ConsilienceError(f"`by` should be 'biases' or 'lasso'. Found `by = {by!r}`.")
        if by == "biases" and not (isinstance(inner, Biased) and inner.layers):
            raise ConsilienceError(
                f"channels by their biases should be of models.beneficial_biases. Found {inner.name}."
            )
        self.inner, self.by, self.pool = inner, by, pool
        module = inner.trunk._module
        self.layers = layers_of(module, inner.trunk.description, "Head2Toe")
        sides = [_side(module.get_submodule(n)) for n in self.layers]
        self.sides = dict(zip(self.layers, (s for s, _ in sides), strict=True))
        self.channels = dict(zip(self.layers, (w for _, w in sides), strict=True))

    @property
    def name(self) -> str:
        return f"head2toe({self.inner.trunk.name})"

    def __repr__(self) -> str:
        return f"head2toe({self.inner!r}, by={self.by!r}, pool={self.pool})"

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        return self.inner.init(generator)

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        return self.inner.grow(params, buffers, source, generator)

    def reads(self, entry: str) -> bool:
        return entry.startswith(TOES) or self.inner.reads(entry)

    @property
    def form(self) -> str:
        return self.inner.form

    def frozen(self, entry: str) -> bool:
        return not entry.startswith(TOES) and self.inner.frozen(entry)

    def task_of(self, entry: str) -> str | None:
        return entry[len(TOES) :].rpartition(".")[0] if entry.startswith(TOES) else self.inner.task_of(entry)

    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        return self.inner.features(params, buffers, x, task)

    def __call__(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        heads, psis = self.inner._heads(params, buffers, task), []
        for i, h in enumerate(heads):
            at = f"{TOES}{h.task}"
            if f"{at}.weight" in params:
                psis.append(self.taps(params, buffers, x, h.task, buffers[f"{at}.index"]))
                heads[i] = Head(h.task, params[f"{at}.weight"], params[f"{at}.bias"], h.columns)
            else:
                psis.append(self.inner.features(params, buffers, x, h.task))
                heads[i] = h._replace(weight=self.inner.rows(h.weight))
        return (
            self._write(psis, heads) if heads else self._nothing(self.inner.features(params, buffers, x))
        ), buffers

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        held = {n: b.clone() for n, b in buffers.items()}
        return lambda x, task: self(params, held, x, task, train)[0], held

    def taps(
        self, params: Params, buffers: Params, x: Tensor, task: str, index: Tensor | None = None
    ) -> Tensor:
        """What the head of a task sees [B, s]: the chosen z (all for None), then its logits where biases chose."""
        seen: dict[str, Tensor] = {}
        spans = self.spans()
        wanted = [
            n
            for n, (a, b) in spans.items()
            if n and (index is None or bool(((index >= a) & (index < b)).any()))
        ]

        def keep(name: str) -> object:
            def hook(_: object, __: object, out: Tensor | tuple[Tensor, ...]) -> None:
                seen[name] = out[0] if isinstance(out, tuple) else out

            return hook

        module = self.inner.trunk._module
        handles = [module.get_submodule(n).register_forward_hook(keep(n)) for n in wanted]  # type: ignore[arg-type]
        try:
            psi = self.inner.features(params, buffers, x, task)
        finally:
            for h in handles:
                h.remove()
        missing = [n for n in wanted if n not in seen]
        if missing:
            features = x.ndim == 2 and isinstance(module, Backbone)
            rule = "so that it should be given images" if features else "which the module should call"
            raise ConsilienceError(f"Head2Toe reads layers, {rule}. Found none called of {missing[0]!r}.")
        parts = []
        for n, (a, b) in spans.items():
            if n and n not in seen:
                continue
            if n and len(seen[n]) != len(x):  # windows of images, or a table that is one for all
                raise ConsilienceError(
                    f"Head2Toe reads layers that give a row for each image. Found {len(seen[n])} rows of {n!r} for {len(x)} images."
                )
            z = self._pooled(n, seen[n]) if n else psi
            if self.by == "lasso":
                norm = z.norm(dim=1, keepdim=True)
                z = z / torch.where(norm > 0, norm, torch.ones_like(norm))
            parts.append(z if index is None else z[:, index[(index >= a) & (index < b)] - a])
        if self.by == "biases":
            (head,) = self.inner._heads(params, buffers, task)
            parts.append(F.linear(psi, self.inner.rows(head.weight), head.bias))
        return torch.cat(parts, 1)

    def spans(self) -> dict[str, tuple[int, int]]:
        """Where the z of each layer stand among all, and last ("") those of the features."""
        module, found, at = self.inner.trunk._module, {}, 0
        for n in self.layers:
            grid = self.pool**2 if isinstance(module.get_submodule(n), torch.nn.Conv2d) else 1
            found[n] = (at, at + self.channels[n] * grid)
            at = found[n][1]
        found[""] = (at, at + self.inner.trunk.width)
        return found

    def _pooled(self, name: str, h: Tensor) -> Tensor:
        """A layer's output as [B, channels x grid]."""
        if h.ndim == 2:
            return h
        if self.sides[name] == -1:
            return h.flatten(1, -2).mean(1)
        return F.adaptive_avg_pool2d(h, self.pool).flatten(1) if h.ndim == 4 else h.flatten(2).mean(2)


def fit(
    model: MultiHead | Toes,
    params: Params,
    buffers: Params,
    source: Source,
    keep: float,
    by: Literal["biases", "lasso"] | None,
    pool: int,
    penalty: float,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
) -> tuple[Toes, Params, Params]:
    """See `consilience.models.head2toe`."""
    if not 0 < keep <= 1:
        raise ConsilienceError(f"`keep` should be in (0, 1]. Found `keep = {keep}`.")
    for name, number in (("epochs", epochs), ("batch", batch)):
        if number < 1:
            raise ConsilienceError(f"`{name}` should be at least 1. Found `{name} = {number}`.")
    for name, value in (("lr", lr), ("penalty", penalty)):
        if not 0 <= value < float("inf"):
            raise ConsilienceError(f"`{name}` should be at least 0 and finite. Found `{name} = {value}`.")
    inner = model.inner if isinstance(model, Toes) else model
    if not isinstance(inner, MultiHead):
        raise ConsilienceError(
            f"Head2Toe should stand on models.multi_head or models.beneficial_biases. Found {model!r:.60}."
        )
    if inner.has_batch_norm or not all(inner.trunk.frozen(n) for n in inner.trunk._names):
        raise ConsilienceError(
            "Head2Toe should stand on a frozen trunk. Found one that is trained; see models.frozen."
        )
    chosen = by or (
        model.by
        if isinstance(model, Toes)
        else "biases"
        if isinstance(inner, Biased) and inner.layers
        else "lasso"
    )
    toes = Toes(inner, chosen, model.pool if isinstance(model, Toes) else pool)
    if isinstance(model, Toes) and (model.by, model.pool) != (chosen, pool):
        raise ConsilienceError(
            f"all tasks of a model should have one `by` and `pool`. Found {model!r:.60} and {chosen!r}, {pool}."
        )
    task = inner.head_key(source)
    if f"heads.{task}.weight" not in params:
        raise ConsilienceError(
            f"the task of a source should have its head. Found none of {task!r}; see Model.grow."
        )
    columns = buffers[f"heads.{task}.columns"]
    strange = sorted(set(source.train.targets().tolist()) - set(columns.tolist()))
    if strange:
        raise ConsilienceError(
            "targets should be output columns of the task's head, as they are in a schedule's `sources`. "
            f"Found target {strange[0]} in {source.name!r}, and columns {columns.tolist()[:8]}."
        )
    spans = toes.spans()
    index: Tensor | None = None
    if chosen == "biases":
        index = _largest(toes, params, task, keep, spans)
    held = [
        _read(toes, params, buffers, e, task, index, batch, columns)
        for e in (source.train, source.validation)
    ]
    (x, y), (vx, vy) = held
    vx = vx if len(vx) else x[:0]
    if chosen == "lasso":
        index = torch.arange(x.shape[1])
        if keep < 1:
            weight, _ = _train(
                x,
                y,
                vx[:0],
                vy[:0],
                len(columns),
                penalty,
                epochs,
                lr,
                batch,
                key(seed, source.name, "lasso"),
            )
            index = weight.norm(dim=0).topk(ceil(keep * x.shape[1] - 1e-9)).indices.sort().values
            x, vx = x[:, index], vx[:, index]
    assert index is not None
    weight, bias = _train(
        x, y, vx, vy, len(columns), 0.0, epochs, lr, batch, key(seed, source.name, "head2toe")
    )
    at = f"{TOES}{task}"
    return (
        toes,
        {**params, f"{at}.weight": weight, f"{at}.bias": bias},
        {**buffers, f"{at}.index": index.to(columns.device)},
    )


def _largest(toes: Toes, params: Params, task: str, keep: float, spans: dict[str, tuple[int, int]]) -> Tensor:
    """The indices of the z whose channels have the largest |B|, in rising order."""
    assert isinstance(toes.inner, Biased)
    sizes = torch.cat([params[f"biases.{task}.{n}"].abs() for n in toes.inner.layers])
    places = []
    for n in toes.inner.layers:
        a, b = spans[n]
        places.append(torch.arange(a, b).view(toes.channels[n], -1))
    grids = [row for p in places for row in p]  # one for each channel
    best = sizes.topk(ceil(keep * len(sizes) - 1e-9)).indices.sort().values.tolist()
    return torch.cat([grids[i] for i in best])


def _read(
    toes: Toes,
    params: Params,
    buffers: Params,
    examples: Examples,
    task: str,
    index: Tensor | None,
    batch: int,
    columns: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the head sees of all examples [N, s], and their targets among the task's own [N]."""
    where = torch.full((toes.outputs,), -1, dtype=torch.long)
    where[columns.cpu()] = torch.arange(len(columns))
    like = params[f"heads.{task}.weight"]
    with torch.no_grad():
        found = [
            toes.taps(params, buffers, x.to(like), task, index) for x, _ in _chunks(examples, max(batch, 64))
        ]
    y = where[examples.targets().cpu()] if len(examples) else torch.zeros(0, dtype=torch.long)
    return (torch.cat(found) if found else like.new_zeros(0, 0)), y.to(like.device)


def _chunks(examples: Examples, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return examples.chunks(size) if len(examples) else iter(())


def _train(
    x: Tensor,
    y: Tensor,
    vx: Tensor,
    vy: Tensor,
    classes: int,
    penalty: float,
    epochs: int,
    lr: float,
    batch: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """W [k, s] and b [k] by Adam on cross entropy + penalty sum_i ||W_i||_2 (i: columns); those of the epoch best in validation."""
    bound = max(x.shape[1], 1) ** -0.5
    weight = ((2 * torch.rand(classes, x.shape[1], generator=generator) - 1) * bound).to(x).requires_grad_()
    bias = ((2 * torch.rand(classes, generator=generator) - 1) * bound).to(x).requires_grad_()
    optimiser = torch.optim.Adam([weight, bias], lr=lr)
    best: tuple[tuple[float, float], Tensor, Tensor] | None = None
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=generator).split(batch):
            loss = F.cross_entropy(F.linear(x[i], weight, bias), y[i])
            if penalty:
                loss = loss + penalty * torch.linalg.vector_norm(weight, dim=0).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if len(vx):
            with torch.no_grad():
                out = F.linear(vx, weight, bias)
                score = (float((out.argmax(1) == vy).float().mean()), -float(F.cross_entropy(out, vy)))
            if best is None or score > best[0]:
                best = (score, weight.detach().clone(), bias.detach().clone())
    return (weight.detach(), bias.detach()) if best is None else best[1:]
