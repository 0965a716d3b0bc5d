"""Head2Toe: the head of a task reads a few chosen channels of all layers of a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward
from consilience.core.params import Params, key
from consilience.core.shares import exact_share
from consilience.core.source import Examples, Source
from consilience.core.tree import Input
from consilience.models.adapted import feature_axis, layers_of
from consilience.models.biased import Biased
from consilience.models.heads import Head, Heads, MultiHead
from consilience.models.pretrained import Backbone

TOES = "toes."
By = Literal["biases", "lasso"]


class Span(NamedTuple):
    """The columns start .. stop - 1 of a layer's z among those of all layers."""

    start: int
    stop: int

    def of(self, index: Tensor) -> Tensor:
        """Return which of these columns, [s] booleans, are in the span."""
        return (index >= self.start) & (index < self.stop)


class Toes(Heads):
    """outputs[:, columns_t] = [z_i for i in I_t, logits_t] V_t^T + c_t; z are pooled outputs of all layers.

    Layers are the convolutions, linear layers and attentions of the trunk of `inner` (of a
    `models.backbone`: those that it calls), each channel averaged on a grid of `pool` x `pool` (tokens: over
    all of them), and last the features psi. `by="biases"`: layers have the task's biases, and the task's own
    logits follow z. `by="lasso"`: the z of every layer are divided by their L2 norm (zeros stay), and there
    are no logits. Entries are those of `inner`, `toes.<task>.weight` [k, s] and `toes.<task>.bias` [k]; the
    buffer `toes.<task>.index` [s] is I_t. A task without them has the outputs of `inner`. Made by
    `models.head2toe`. Evci et al. 2022.
    """

    task_prefixes: ClassVar[tuple[str, ...]] = (TOES,)

    def __init__(self, inner: MultiHead, by: By, pool: int = 1) -> None:
        super().__init__(inner.outputs)
        whole_number(pool=pool)
        if by not in ("biases", "lasso"):
            raise ConsilienceError(f"`by` must be 'biases' or 'lasso', got {by!r}.")
        if by == "biases" and not (isinstance(inner, Biased) and inner.layers):
            raise ConsilienceError(
                f"`by='biases'` needs biases of models.beneficial_biases, got {inner.name}; use by='lasso'."
            )
        self.inner, self.by, self.pool = inner, by, pool
        module = inner.trunk.module
        self.layers = layers_of(module, inner.trunk.description, "Head2Toe")
        axes = {name: feature_axis(module.get_submodule(name)) for name in self.layers}
        self.sides = {name: axis.dim for name, axis in axes.items()}
        self.channels = {name: axis.width for name, axis in axes.items()}

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

    def derived(self, buffer: str) -> bool:
        return not buffer.startswith(TOES) and self.inner.derived(buffer)

    def task_of(self, entry: str) -> str | None:
        return entry[len(TOES) :].rpartition(".")[0] if entry.startswith(TOES) else self.inner.task_of(entry)

    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        return self.inner.features(params, buffers, x, task)

    def __call__(
        self, params: Params, buffers: Params, x: Input, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        # Which tasks have heads, and which columns, is decided by the inner model.
        inner_heads = self.inner.heads(params, buffers, task)
        if not inner_heads:
            return self._no_outputs(self.inner.features(params, buffers, x)), buffers

        heads, inputs = [], []
        for head in inner_heads:
            prefix = f"{TOES}{head.task}"
            if f"{prefix}.weight" in params:
                inputs.append(self.taps(params, buffers, x, head.task, buffers[f"{prefix}.index"]))
                heads.append(
                    Head(head.task, params[f"{prefix}.weight"], params[f"{prefix}.bias"], head.columns)
                )
            else:
                inputs.append(self.inner.features(params, buffers, x, head.task))
                # Rows act here as they are given, because this model has no norm of its own.
                heads.append(head._replace(weight=self.inner.rows(head.weight)))
        return self._outputs(inputs, heads), buffers

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        held = {name: tensor.clone() for name, tensor in buffers.items()}
        return lambda x, task: self(params, held, x, task, train)[0], held

    def taps(
        self, params: Params, buffers: Params, x: Input, task: str, index: Tensor | None = None
    ) -> Tensor:
        """Return the inputs [B, s] of a task's head: the chosen z (None: all); by biases, also its logits."""
        spans = self.spans()
        used = [
            name for name, span in spans.items() if name and (index is None or bool(span.of(index).any()))
        ]
        seen, psi = self._layer_outputs(params, buffers, x, task, used)

        parts = []
        for name, span in spans.items():
            if name and name not in seen:
                continue
            # An output may have a row per window of an image, or one for all images.
            if name and len(seen[name]) != len(x):
                raise ConsilienceError(
                    "Head2Toe needs layers that give a row for each image, "
                    f"got {len(seen[name])} rows of {name!r} for {len(x)} images."
                )
            z = self._pooled(name, seen[name]) if name else psi
            if self.by == "lasso":
                # Layers of many channels would outweigh the others; zeros stay zeros.
                norm = z.norm(dim=1, keepdim=True)
                z = z / torch.where(norm > 0, norm, torch.ones_like(norm))
            parts.append(z if index is None else z[:, index[span.of(index)] - span.start])

        if self.by == "biases":
            (head,) = self.inner.heads(params, buffers, task)
            parts.append(F.linear(psi, self.inner.rows(head.weight), head.bias))
        return torch.cat(parts, 1)

    def spans(self) -> dict[str, Span]:
        """Return the span of the z of each layer, and last ("") that of the features."""
        module, found, start = self.inner.trunk.module, {}, 0
        for name in self.layers:
            # Only maps have places to average on a grid.
            is_map = isinstance(module.get_submodule(name), torch.nn.Conv2d)
            grid = self.pool**2 if is_map else 1
            found[name] = Span(start, start + self.channels[name] * grid)
            start = found[name].stop
        found[""] = Span(start, start + self.inner.trunk.width)
        return found

    def _layer_outputs(
        self, params: Params, buffers: Params, x: Input, task: str, used: list[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the outputs of these layers, and the features psi [B, d]."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: object, __: object, out: Tensor | tuple[Tensor, ...]) -> None:
                # Attention gives its weights as well.
                seen[name] = out[0] if isinstance(out, tuple) else out

            return hook

        module = self.inner.trunk.module
        handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in used]
        try:
            psi = self.inner.features(params, buffers, x, task)
        finally:
            for handle in handles:
                handle.remove()

        missing = [name for name in used if name not in seen]
        if missing:
            got_features = isinstance(x, Tensor) and x.ndim == 2 and isinstance(module, Backbone)
            rule = (
                "must be given images, not features" if got_features else "needs layers that the module calls"
            )
            raise ConsilienceError(f"Head2Toe {rule}, got no call of {missing[0]!r}.")
        return seen, psi

    def _pooled(self, name: str, h: Tensor) -> Tensor:
        """Return a layer's output as [B, channels x grid]."""
        if h.ndim == 2:
            return h
        if self.sides[name] == -1:
            return h.flatten(1, -2).mean(1)
        return F.adaptive_avg_pool2d(h, self.pool).flatten(1) if h.ndim == 4 else h.flatten(2).mean(2)


@dataclass(frozen=True)
class Options:
    """The hyperparameters of `consilience.models.head2toe`, which explains them."""

    keep: float
    by: By | None
    pool: int
    penalty: float
    epochs: int
    lr: float
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConsilienceError(f"`keep` must be in (0, 1], got {self.keep}.")
        whole_number(epochs=self.epochs, batch=self.batch)
        for name, value in (("lr", self.lr), ("penalty", self.penalty)):
            if not 0 <= value < inf:
                raise ConsilienceError(f"`{name}` must be at least 0 and finite, got {value}.")


class Rows(NamedTuple):
    """What a head is trained on: inputs [N, s], and targets [N] among the head's own columns."""

    inputs: Tensor
    targets: Tensor


class Fitted(NamedTuple):
    """A linear head: weight [k, s] and bias [k]."""

    weight: Tensor
    bias: Tensor


def fit(
    model: MultiHead | Toes, params: Params, buffers: Params, source: Source, options: Options
) -> tuple[Toes, Params, Params]:
    """See `consilience.models.head2toe`."""
    toes = _toes(model, options)
    task = toes.inner.head_key(source)
    columns = _columns(params, buffers, source, task)

    index = _largest_biases(toes, params, task, options.keep) if toes.by == "biases" else None
    train, validation = (
        head_rows(toes, params, buffers, part, task, index, options.batch)
        for part in (source.train, source.validation)
    )
    # Without validation examples nothing is read, and the width is not known.
    if not len(validation.inputs):
        validation = validation._replace(inputs=train.inputs[:0])

    if index is None:
        index = torch.arange(train.inputs.shape[1])
        if options.keep < 1:
            index = _chosen_by_lasso(train, len(columns), options, source.name)
            train, validation = (rows._replace(inputs=rows.inputs[:, index]) for rows in (train, validation))
    head = _train(train, validation, len(columns), 0.0, options, key(options.seed, source.name, "head2toe"))

    prefix = f"{TOES}{task}"
    params = {**params, f"{prefix}.weight": head.weight, f"{prefix}.bias": head.bias}
    return toes, params, {**buffers, f"{prefix}.index": index.to(columns.device)}


def _toes(model: MultiHead | Toes, options: Options) -> Toes:
    """Return the model with the choice that the options and an earlier task's model make."""
    inner = model.inner if isinstance(model, Toes) else model
    if not isinstance(inner, MultiHead):
        raise ConsilienceError(
            f"Head2Toe needs a model of models.multi_head or models.beneficial_biases, got {model!r:.60}."
        )
    if inner.has_batch_norm or not all(inner.trunk.frozen(entry) for entry in inner.trunk.entries):
        raise ConsilienceError("Head2Toe needs a frozen trunk, got one that is trained; use models.frozen.")

    has_biases = isinstance(inner, Biased) and bool(inner.layers)
    # What earlier tasks have chosen holds for all.
    default: By = model.by if isinstance(model, Toes) else "biases" if has_biases else "lasso"
    by = options.by or default
    toes = Toes(inner, by, model.pool if isinstance(model, Toes) else options.pool)
    if isinstance(model, Toes) and (model.by, model.pool) != (by, options.pool):
        raise ConsilienceError(
            "all tasks of a model must have one `by` and `pool`, "
            f"got by={by!r}, pool={options.pool} for {model!r:.60}."
        )
    return toes


def _columns(params: Params, buffers: Params, source: Source, task: str) -> Tensor:
    """Return the output columns [k] of the task's head; refuse targets that are none of them."""
    if f"heads.{task}.weight" not in params:
        raise ConsilienceError(
            f"the task of the source must have a head, got none for {task!r}; add it with `model.grow`."
        )
    columns = buffers[f"heads.{task}.columns"]
    strange = sorted(set(source.train.targets().tolist()) - set(columns.tolist()))
    if strange:
        raise ConsilienceError(
            "targets must be output columns of the task's head, as they are in a schedule's `sources`, "
            f"got target {strange[0]} in {source.name!r} and columns {columns.tolist()[:8]}."
        )
    return columns


def _largest_biases(toes: Toes, params: Params, task: str, keep: float) -> Tensor:
    """Return the indices of the z of the channels with the largest |B|, in rising order."""
    assert isinstance(toes.inner, Biased)
    # Over all layers at once: a layer may lose all of its channels.
    sizes = torch.cat([params[f"biases.{task}.{name}"].abs() for name in toes.inner.layers])

    # One row of z per channel, in the order of the biases.
    spans = toes.spans()
    grids = [
        row for name in toes.inner.layers for row in torch.arange(*spans[name]).view(toes.channels[name], -1)
    ]
    best = _largest(sizes, keep).tolist()
    return torch.cat([grids[channel] for channel in best])


def _chosen_by_lasso(train: Rows, classes: int, options: Options, source: str) -> Tensor:
    """Return the indices of the z that a group lasso gives the largest weights, in rising order."""
    # Without validation: an early epoch would have shrunk too few weights.
    none = Rows(train.inputs[:0], train.targets[:0])
    generator = key(options.seed, source, "lasso")
    head = _train(train, none, classes, options.penalty, options, generator)
    return _largest(head.weight.norm(dim=0), options.keep)


def _largest(sizes: Tensor, keep: float) -> Tensor:
    """Return the indices of the largest fraction `keep`, rounded up, in rising order."""
    return sizes.topk(ceil(exact_share(keep, len(sizes)))).indices.sort().values


def head_rows(
    toes: Toes,
    params: Params,
    buffers: Params,
    examples: Examples,
    task: str,
    index: Tensor | None,
    batch: int,
) -> Rows:
    """Return what the head reads of all examples, and their targets."""
    like, columns = params[f"heads.{task}.weight"], buffers[f"heads.{task}.columns"]
    if not len(examples):
        return Rows(like.new_zeros(0, 0), torch.zeros(0, dtype=torch.long).to(like.device))

    with torch.no_grad():
        # Small batches of training would make this pass slow.
        chunks = examples.chunks(max(batch, 64))
        inputs = torch.cat(
            [toes.taps(params, buffers, x.to(like.device, like.dtype), task, index) for x, _ in chunks]
        )
    # Targets are columns of all outputs, and the head counts its own from 0.
    position = torch.full((toes.outputs,), -1, dtype=torch.long)
    position[columns.cpu()] = torch.arange(len(columns))
    return Rows(inputs, position[examples.targets().cpu()].to(like.device))


def _train(
    train: Rows,
    validation: Rows,
    classes: int,
    penalty: float,
    options: Options,
    generator: torch.Generator,
) -> Fitted:
    """Train W [k, s] and b [k] by Adam on cross entropy + penalty sum_i ||W_i||_2 (i: columns).

    The head is that of the epoch with the best validation, or of the last epoch without validation examples.
    """
    x, y = train
    bound = max(x.shape[1], 1) ** -0.5
    weight = ((2 * torch.rand(classes, x.shape[1], generator=generator) - 1) * bound).to(x).requires_grad_()
    bias = ((2 * torch.rand(classes, generator=generator) - 1) * bound).to(x).requires_grad_()
    optimiser = torch.optim.Adam([weight, bias], lr=options.lr)

    best: tuple[tuple[float, float], Fitted] | None = None
    for _ in range(options.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(options.batch):
            loss = F.cross_entropy(F.linear(x[rows], weight, bias), y[rows])
            if penalty:
                loss = loss + penalty * torch.linalg.vector_norm(weight, dim=0).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

        if len(validation.inputs):
            # By accuracy, and among equals by loss.
            with torch.no_grad():
                out, targets = F.linear(validation.inputs, weight, bias), validation.targets
                accuracy = float((out.argmax(1) == targets).float().mean())
                score = (accuracy, -float(F.cross_entropy(out, targets)))
            if best is None or score > best[0]:
                best = score, Fitted(weight.detach().clone(), bias.detach().clone())
    return Fitted(weight.detach(), bias.detach()) if best is None else best[1]
