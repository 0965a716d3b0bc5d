"""Isolation: each task has its own entries or units, which later tasks do not move. Columns, PackNet, HAT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Private
from consilience.core.model import Model
from consilience.core.names import owned_by
from consilience.core.params import Layout, Params
from consilience.core.shares import exact_share
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.core.warning import warn
from consilience.corrections.anatomy import (
    anatomy,
    not_alone,
    own_entries,
    rows_in_common,
    rows_with_units,
    spread,
    with_heads,
    without_tasks,
)
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True)
class Columns(Correction):
    """Columns of a progressive network: a visit trains the entries of its own tasks alone.

    Where a later column reads them, only the head trains. So the outputs of every other task stay
    bit-identical, under rehearsal, penalties, momentum and decay, and when a source comes again. Rusu et al.
    2016.
    """

    def default_model(self, inputs: tuple[int, ...], outputs: int) -> Model:
        """Return convolutional columns for square images of side >= 8, else perceptrons with 128 units."""
        # Rooms of parts do not import one another when they are loaded.
        from consilience.models import progressive, progressive_conv

        if len(inputs) == 3 and inputs[1] == inputs[2] and inputs[1] >= 8:
            return progressive_conv(outputs, channels=inputs[0], size=inputs[1])
        return progressive(prod(inputs), (128,), outputs)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        from consilience.models.columns import Progressive

        if not facts.trains:
            return NO_TRAINING
        if not facts.aware:
            return (
                "it needs to know the task, and there is neither a label nor a mapper; "
                "use scenario='task', or compose it with a mapper"
            )
        if facts.model is not None and not isinstance(facts.model, Progressive):
            return (
                "the model has no columns; use models.progressive or models.progressive_conv "
                "(heads and adapters on a frozen backbone are kept by finetune)"
            )
        return not_alone(facts)

    def begin(self, start: Beginning) -> Begun:
        """Return the parameters unchanged. Private: one tensor per frozen entry, under its name."""
        from consilience.models.columns import Progressive

        model, params = start.model, start.params
        assert isinstance(model, Progressive)
        # Task None: entries that no task owns train as they do without this class.
        own, read = {None, *(model.head_key(source) for source in start.sources)}, model.read(params)
        held = [name for name in params if name in read or model.task_of(name) not in own]
        return Begun(params, {name: torch.zeros(()) for name in held})

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        factor = torch.ones_like(step.theta)
        for name in ctx.private:
            factor[step.layout.span(name)] = 0
        return factor


@dataclass(frozen=True, eq=False)
class Division:
    """How the earlier tasks divided the weights of PackNet."""

    taken_by: Mapping[str, Tensor]
    """The order of the visit that took each weight (-1: free), by entry."""
    tasks: Mapping[str, int]
    """The last such order of each task."""
    classes: frozenset[int]
    """The outputs that other tasks took."""
    current: frozenset[str]
    """The tasks of this visit; none in predict."""


@dataclass(frozen=True)
class PackNet(Correction):
    """PackNet: prune each task to its largest weights, retrain and freeze them; later tasks use the rest.

    A visit trains all free weights (from 0 but in the first one). After the first (1 - `retrain`) of the
    epochs each layer keeps the round(`keep` x free) largest |w| among its free weights, ranked, so exactly
    that many (at least 1); its other free weights are 0 for this task. Task t uses the weights taken up to
    t, so its outputs stay bit-identical. Layers are the trainable shared weights of two or more dimensions,
    without the head. Biases and norms are frozen after the first task. In a shared head each task trains the
    rows of its own classes; tasks with classes in common need `models.multi_head`, which is the default.
    Masks are private. It refuses a schedule in which a layer has no free weight left for a task. Mallya &
    Lazebnik 2018.
    """

    keep: float = 0.5
    retrain: float = 0.5

    shared_items: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = True
    needs_last_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConsilienceError(f"`keep` (of the free weights) must be in (0, 1], got {self.keep}.")
        if not 0 <= self.retrain < 1:
            raise ConsilienceError(f"`retrain` (of the epochs) must be in [0, 1), got {self.retrain}.")

    def kept(self, free: int) -> int:
        """Return how many of a layer's free weights a task keeps."""
        return min(free, max(1, round(self.keep * free)))

    def default_model(self, inputs: tuple[int, ...], outputs: int) -> Model:
        return with_heads(inputs, outputs)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        why = without_tasks(facts) or not_alone(facts) or rows_in_common(facts)
        if why is None and facts.revisited:
            why = (
                "what a source trained is frozen, and here one comes again; use hat, or give each source once"
            )
        if why is None and facts.model is not None:
            why = self._exhausted(facts.model, facts.most_sources)
        return why

    def _exhausted(self, model: Model, tasks: int) -> str | None:
        """Return why a model has too few weights for so many tasks, or None."""
        parts = anatomy(model)
        for name in parts.layers:
            # Every task leaves a part of the free weights, so small layers run out first.
            free = torch.Size(parts.shapes[name]).numel()
            for task in range(1, tasks + 1):
                if not free:
                    return (
                        f"layer {name!r} has no free weight left for task {task} of {tasks}; "
                        "use a smaller `keep`, or a wider model"
                    )
                free -= self.kept(free)
        return None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Division:
        """Return the division so far, from the first task to the last."""
        current = frozenset(str(source.task) for source in sources)
        taken_by: dict[str, Tensor] = {}
        tasks: dict[str, int] = {}
        classes: set[int] = set()
        for item in sorted(memory.values(), key=lambda item: item.meta["order"]):
            order = item.meta["order"]
            for name, own in item.group("own").items():
                free = torch.full(own.shape, -1, device=own.device)
                taken_by[name] = torch.where(own, order, taken_by.get(name, free))
            tasks[item.meta["task"]] = order
            # A later source of a task goes on with the task's own rows.
            if item.meta["task"] not in current:
                classes |= set(item.meta["classes"])
        return Division(taken_by, tasks, frozenset(classes), current)

    def begin(self, start: Beginning) -> Begun:
        """Set free weights to 0, but in the first visit. Private: 1 for entries that may train, by name."""
        parts, division, params = anatomy(start.model), start.recalled, dict(start.params)
        free = own_entries(start.model, params, start.sources, division.classes)
        for name in parts.layers:
            weight = start.params[name]
            free[name] = torch.ones_like(weight)
            if name in division.taken_by:
                taken = division.taken_by[name].to(weight.device) >= 0
                free[name], params[name] = (~taken).to(weight.dtype), weight * taken

        # All tasks use the same biases and norms, so only the first task may train them.
        if division.taken_by:
            biases = [parts.biases[name] for name in parts.layers if name in parts.biases]
            for name in (*biases, *parts.others):
                free[name] = torch.zeros_like(start.params[name])
        return Begun(params, {f"free/{name}": factor for name, factor in free.items()})

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return the weights taken up to a task; in its own visit also the free ones that are not pruned."""
        division: Division = ctx.recalled
        if task in division.current:
            assert ctx.model is not None and ctx.layout is not None
            keep = ctx.layout.split(ctx.trace["keep"])
            return {**params, **{name: params[name] * keep[name] for name in anatomy(ctx.model).layers}}
        if task not in division.tasks:
            return params

        # Weights of later tasks are 0 for this one.
        last = division.tasks[str(task)]
        used = {name: ((order >= 0) & (order <= last)) for name, order in division.taken_by.items()}
        return {
            **params,
            **{name: params[name] * mask.to(params[name].device) for name, mask in used.items()},
        }

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        return spread(step.layout, group(ctx.private, "free")) * ctx.trace["keep"]

    def trace_init(self, ctx: Context) -> dict[str, Tensor]:
        """Return `keep` [n]: 0 for weights that were pruned in this visit; `pruned`: 1 once they were."""
        return {"keep": torch.ones_like(ctx.theta), "pruned": ctx.theta.new_zeros(())}

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        # The last step before retraining.
        epochs, steps = step.horizon
        if step.clock != (epochs - int(exact_share(self.retrain, epochs)) - 1, steps - 1):
            return ctx.trace
        return self._prune(step.theta + delta, step.layout, ctx)

    def _prune(self, theta: Tensor, layout: Layout, ctx: Context) -> dict[str, Tensor]:
        """Return the trace that keeps the largest free weights of each layer, and those of earlier tasks."""
        assert ctx.model is not None
        values, keep = layout.split(theta), {}
        for name in anatomy(ctx.model).layers:
            free = ctx.private[f"free/{name}"].to(theta.device).reshape(-1)
            size = values[name].abs().reshape(-1).masked_fill(free == 0, -1)

            # By rank and not by a threshold: weights of dead inputs tie at 0.
            largest = size.argsort(descending=True, stable=True)[: self.kept(int(free.sum()))]
            keep[name] = (1 - free).index_fill(0, largest, 1).view(values[name].shape)
        return {"keep": spread(layout, keep), "pruned": theta.new_ones(())}

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """Return the weights that this task took, as masks `own/<entry>`."""
        # Without epochs no step has pruned, and the task must still leave weights to later ones.
        trace = ctx.trace
        if not trace["pruned"]:
            trace = self._prune(learned.layout.flatten(learned.params), learned.layout, ctx)

        keep, names = learned.layout.split(trace["keep"]), anatomy(learned.model).layers
        own = {f"own/{name}": (keep[name] * ctx.private[f"free/{name}"]) > 0 for name in names}
        meta = {"task": learned.task, "order": learned.order, "classes": list(learned.source.classes)}
        return Private(own, meta)


@dataclass(frozen=True, eq=False)
class Attention:
    """The masks of HAT so far."""

    masks: Mapping[str, Mapping[str, Tensor]]
    """The mask [units] of every task and layer."""
    past: Mapping[str, Tensor]
    """The largest mask over the other sources, by layer."""
    classes: frozenset[int]
    """The outputs that other tasks took."""
    current: frozenset[str]
    """The tasks of this visit; none in predict."""


class _Scaled(torch.autograd.Function):
    """x, whose gradient is multiplied by `factor`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor, None]:
        return out * ctx.saved_tensors[0], None


@dataclass(frozen=True)
class HAT(Correction):
    """Hard attention to the task: each task learns which hidden units it uses, and keeps their weights.

    Unit i of layer l is multiplied by a_i = sigmoid(s e_i), with an embedding e per task and layer. s grows
    in every epoch, s = 1/s_max + (s_max - 1/s_max) b / (B - 1) at its batch b = 0 .. B - 1. Gradients of
    weight (i, j) are multiplied by 1 - min(a_i, a_j) of the largest a of earlier tasks, those of e by s_max
    (cosh(s e) + 1) / (s (cosh(e) + 1)), and `sparsity` x sum a (1 - past) / sum (1 - past) is added. With
    `hard`, masks of earlier tasks and in predict are 1[e > 0], and old outputs stay bit-identical; otherwise
    they are sigmoid(s_max e), and old outputs drift.

    Units are gated by the rows of their layers, which is exact with ReLU and max pooling, without norms. The
    head is not gated: in a shared one each task trains the rows of its own classes, on all units; tasks with
    classes in common need `models.multi_head`, which is the default. Masks are private. In short training a
    large `sparsity` may silence all units of a layer with few, such as 8 channels, which is warned about.
    Serrà et al. 2018 (who use .75 with 200 epochs).
    """

    sparsity: float = 0.1
    s_max: float = 400.0
    hard: bool = True

    shared_items: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative("HAT", sparsity=self.sparsity)
        if not 1 <= self.s_max < float("inf"):
            raise ConsilienceError(f"`s_max` must be at least 1 and finite, got {self.s_max}.")

    def default_model(self, inputs: tuple[int, ...], outputs: int) -> Model:
        return with_heads(inputs, outputs)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        why = without_tasks(facts) or not_alone(facts) or rows_in_common(facts)
        return why or (rows_with_units(facts.model) if facts.model is not None else None)

    def scale(self, clock: tuple[int, int], horizon: tuple[int, int]) -> float:
        """Return s at a step: from 1 / s_max at the first batch of an epoch to s_max at its last."""
        low, last = 1 / self.s_max, horizon[1] - 1
        return low + (self.s_max - low) * (clock[1] / last if last > 0 else 1.0)

    def compensation(self, e: Tensor, s: float) -> Tensor:
        """Return factors that scale the gradient of sigmoid(s e) to s_max times that of sigmoid(e)."""
        # cosh overflows beyond this range; the clamp is the authors' too.
        return self.s_max / s * ((s * e).clamp(-50, 50).cosh() + 1) / (e.clamp(-50, 50).cosh() + 1)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Attention:
        """Return the masks of all tasks, and the largest over other sources than these."""
        here = {source.name for source in sources}
        current = frozenset(str(source.task) for source in sources)
        masks: dict[str, dict[str, Tensor]] = {}
        past: dict[str, Tensor] = {}
        classes: set[int] = set()
        # Several sources may have one task, which then uses the units of all of them.
        for (_, source), item in sorted(memory.items()):
            of_task = masks.setdefault(item.meta["task"], {})
            for layer, mask in item.group("mask").items():
                of_task[layer] = torch.maximum(of_task[layer], mask) if layer in of_task else mask
                if source not in here:
                    past[layer] = torch.maximum(past[layer], mask) if layer in past else mask
            # A later source of a task goes on with the task's own rows.
            if item.meta["task"] not in current:
                classes |= set(item.meta["classes"])
        return Attention(masks, past, frozenset(classes), current)

    def begin(self, start: Beginning) -> Begun:
        """Add embeddings `hat/<task>/<layer>` ~ N(0, 1) of a new task. Private: gradient factors by entry."""
        parts, params = anatomy(start.model), dict(start.params)
        for source in start.sources:
            for layer in parts.layers:
                name = f"hat/{source.task}/{layer}"
                if name not in params:
                    units = parts.shapes[layer][0]
                    params[name] = torch.randn(units, generator=start.generator).to(params[layer])

        # Embeddings of other tasks are frozen, so that momentum and decay do not move them.
        free = self._free(start)
        own = {f"hat/{source.task}/{layer}" for source in start.sources for layer in parts.layers}
        for name, embedding in params.items():
            if name.startswith("hat/") and name not in own:
                free[name] = torch.zeros_like(embedding)
        return Begun(params, {f"free/{name}": factor for name, factor in free.items()})

    def _free(self, start: Beginning) -> dict[str, Tensor]:
        """Return gradient factors by past masks: 1 - min(a_i, a_j) for weight (i, j), 1 - a_i for bias i."""
        model, params, attention = start.model, start.params, start.recalled
        parts, past = anatomy(model), attention.past
        free = own_entries(model, params, start.sources, attention.classes)
        for layer in parts.layers:
            if layer in past:
                shape = parts.shapes[layer]
                units = past[layer].view(-1, *[1] * (len(shape) - 1)).expand(shape)
                taken = torch.minimum(units, self._inputs(model, layer, attention))
                free[layer] = 1 - taken.to(params[layer])
                if layer in parts.biases:
                    free[parts.biases[layer]] = (1 - past[layer]).to(params[layer])
        # No other task reads the task's own rows of a head, so these train on taken units too.
        return free

    @staticmethod
    def _inputs(model: Model, name: str, attention: Attention) -> Tensor:
        """Return the past mask of the units that a layer reads, on its weight; 1 if it reads the inputs."""
        parts = anatomy(model)
        shape, before = parts.shapes[name], parts.previous(name)
        if before not in attention.past:
            return torch.ones(shape)

        # A unit of a flattened map has several places among the inputs.
        mask = attention.past[str(before)]
        mask = mask.repeat_interleave(shape[1] // len(mask))
        return mask.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """Warn where the earlier tasks took all units of a layer."""
        full = [layer for layer, mask in ctx.recalled.past.items() if bool((mask >= 1).all())]
        warning = (
            f"layer {full[0]!r} has no unit left; use a larger `sparsity`, or a wider model" if full else None
        )
        return ctx.flat, warning

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return the parameters with the rows of every hidden layer multiplied by the task's mask."""
        assert ctx.model is not None
        attention: Attention = ctx.recalled
        if task in attention.current:
            # Soft while they train, even where `hard` fixes them afterwards.
            s = self.scale(ctx.clock, ctx.horizon)
            masks = {layer: torch.sigmoid(s * e) for layer, e in task_entries(params, "hat", task).items()}
        else:
            masks = dict(attention.masks.get(str(task), {}))

        biases, gated = anatomy(ctx.model).biases, dict(params)
        for layer, mask in masks.items():
            weight = params[layer]
            mask = mask.to(weight)
            gated[layer] = weight * mask.view(-1, *[1] * (weight.ndim - 1))
            if layer in biases:
                gated[biases[layer]] = params[biases[layer]] * mask
        return gated

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        s, values = self.scale(step.clock, step.horizon), step.layout.split(step.theta)
        own = {name: self.compensation(e, s) for name, e in values.items() if self._layer_of(name, ctx)}
        return spread(step.layout, {**group(ctx.private, "free"), **own})

    @staticmethod
    def _layer_of(name: str, ctx: Context) -> str | None:
        """Return the layer of an entry that is an embedding of a task of this visit, else None."""
        # Names of tasks may hold slashes, so the entry cannot be split at them.
        found = any(owned_by(name, "hat", task) for task in ctx.recalled.current)
        return name.rpartition("/")[2] if found else None

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        """Return `sparsity` x sum a (1 - past) / sum (1 - past), over all layers."""
        s, past = self.scale(step.clock, step.horizon), ctx.recalled.past
        above, below = step.theta.new_zeros(()), step.theta.new_zeros(())
        for name, e in step.layout.split(step.theta).items():
            layer = self._layer_of(name, ctx)
            if layer is None:
                continue
            free = 1 - past[layer].to(e) if layer in past else torch.ones_like(e)

            # Penalties are added after `mask` is applied, so this gradient is compensated here.
            factor = self.compensation(e.detach(), s)
            scaled: Tensor = _Scaled.apply(e, factor)  # type: ignore[no-untyped-call]
            above, below = above + (torch.sigmoid(s * scaled) * free).sum(), below + free.sum()
        return self.sparsity * above / below.clamp_min(1)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """Return the task's mask of each layer."""
        embeddings = task_entries(learned.params, "hat", learned.task)
        masks = {
            layer: (e > 0).to(e.dtype) if self.hard else torch.sigmoid(self.s_max * e)
            for layer, e in embeddings.items()
        }
        # Then the task's outputs are constant, and its accuracy is that of a guess.
        silent = [layer for layer, e in embeddings.items() if not bool((e > 0).any())]
        if silent:
            warn(
                f"HAT silenced all units of layer {silent[0]!r} for task {learned.task!r}, whose outputs no "
                "longer depend on the input; use a smaller `sparsity`, more epochs, or a wider model"
            )
        meta = {"task": learned.task, "classes": list(learned.source.classes)}
        return Private({f"mask/{layer}": mask for layer, mask in masks.items()}, meta)


def task_entries(params: Mapping[str, Tensor], prefix: str, task: str | None) -> dict[str, Tensor]:
    """Return the entries `prefix/<task>/<layer>` of a task, by layer."""
    return {n.rpartition("/")[2]: p for n, p in params.items() if owned_by(n, prefix, str(task))}


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix/`, under the rest of their names."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
