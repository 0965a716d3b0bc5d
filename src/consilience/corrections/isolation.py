"""Isolation: every task has entries or units of its own, which later tasks do not move. Columns, PackNet and HAT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Private
from consilience.core.model import Model
from consilience.core.params import Layout, Params
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.corrections.anatomy import (
    anatomy,
    not_alone,
    own_entries,
    rows_with_units,
    spread,
    without_tasks,
)
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True)
class Columns(Correction):
    """Columns of a progressive network: a learn moves the entries of its own tasks alone, whatever else is in the step.

    And of these only the head where a later column reads them, so that what every other task answers stays as it is, to the
    bit: under rehearsal, penalties, momentum and decay, and when a source comes again. Rusu et al. 2016.
    """

    def refuse(self, facts: ScheduleFacts) -> str | None:
        from consilience.models.columns import Progressive

        if not facts.trains:
            return NO_TRAINING
        if not facts.aware:
            return "it needs to know the task, and there is neither a label nor a mapper; use scenario='task', or compose it with a mapper"
        if facts.model is not None and not isinstance(facts.model, Progressive):
            return (
                "the model has no columns; use models.progressive or models.progressive_conv (heads and adapters on a frozen "
                "backbone are kept by finetune)"
            )
        return not_alone(facts)

    def begin(self, start: Beginning) -> Begun:
        """Private: the names of what is held."""
        model, params, sources = start.model, start.params, start.sources
        from consilience.models.columns import Progressive

        assert isinstance(model, Progressive)
        own, read = {None, *(model.head_key(s) for s in sources)}, model.read(params)
        return Begun(params, {n: torch.zeros(()) for n in params if n in read or model.task_of(n) not in own})

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        factor = torch.ones_like(step.theta)
        for n in ctx.private:
            factor[step.layout.span(n)] = 0
        return factor


@dataclass(frozen=True, eq=False)
class Taken:
    """What PackNet knows: the order of the learn that took each weight (-1: free), by entry; the latest order of each task;
    the outputs that are taken; the tasks of this learn (none in predict)."""

    owner: Mapping[str, Tensor]
    tasks: Mapping[str, int]
    classes: frozenset[int]
    now: frozenset[str]


@dataclass(frozen=True)
class PackNet(Correction):
    """PackNet: prune what a task learned to its largest weights, retrain these, freeze them; the rest is for later tasks.

    A learn trains all free weights (from 0 but in the first); at the end of its first (1 - `retrain`) of the epochs each layer
    keeps the round(`keep` x free) largest |w| among its free weights, by rank and so exactly that many (at least 1), and the
    other free ones are 0 to this task. Task t uses the weights taken up to t, so that its outputs stay as they are, to the
    bit. Layers are the trainable shared weights of two or more dimensions but the head; biases and norms are frozen after the
    first task; of a shared head each task trains the rows of its own classes that no earlier task took (tasks with common
    classes want `models.multi_head`). Masks are private. Refuses when a layer has no free weight left for a task.
    Mallya & Lazebnik 2018.
    """

    keep: float = 0.5
    retrain: float = 0.5

    shared_items: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConsilienceError(
                f"`keep` of the free weights should be in (0, 1]. Found `keep = {self.keep}`."
            )
        if not 0 <= self.retrain < 1:
            raise ConsilienceError(
                f"`retrain` of the epochs should be in [0, 1). Found `retrain = {self.retrain}`."
            )

    def kept(self, free: int) -> int:
        """How many of a layer's free weights a task keeps."""
        return min(free, max(1, round(self.keep * free)))

    def refuse(self, facts: ScheduleFacts) -> str | None:
        why = without_tasks(facts) or not_alone(facts)
        if why is None and facts.revisited:
            why = (
                "what a source learned is frozen, and here one comes again; use hat, or give each source once"
            )
        if why is None and facts.model is not None:
            a = anatomy(facts.model)
            for n in a.layers:
                free = torch.Size(a.shapes[n]).numel()
                for t in range(facts.most_sources):
                    if not free:
                        return f"layer {n!r} has no free weight left for task {t + 1} of {facts.most_sources}; use a smaller `keep`, or a wider model"
                    free -= self.kept(free)
        return why

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Taken:
        """Who took which weight."""
        owner: dict[str, Tensor] = {}
        tasks: dict[str, int] = {}
        classes: set[int] = set()
        for item in sorted(memory.values(), key=lambda i: i.meta["order"]):
            order = item.meta["order"]
            for n, own in item.group("own").items():
                owner[n] = torch.where(own, order, owner.get(n, torch.full(own.shape, -1, device=own.device)))
            tasks[item.meta["task"]] = order
            classes |= set(item.meta["classes"])
        return Taken(owner, tasks, frozenset(classes), frozenset(str(s.task) for s in sources))

    def begin(self, start: Beginning) -> Begun:
        """The free weights at 0 after the first learn; private: what may move, by entry."""
        model, params, sources, known = start.model, start.params, start.sources, start.recalled
        a, new = anatomy(model), dict(params)
        free = own_entries(model, params, sources, known.classes)
        for n in a.layers:
            free[n] = torch.ones_like(params[n])
            if n in known.owner:
                taken = known.owner[n].to(params[n].device) >= 0
                free[n], new[n] = (~taken).to(params[n].dtype), params[n] * taken
        if known.owner:
            for n in (*(a.biases[n] for n in a.layers if n in a.biases), *a.others):
                free[n] = torch.zeros_like(params[n])
        return Begun(new, {f"free/{n}": f for n, f in free.items()})

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """The weights that the task uses: those taken up to it; in its own learn also the free ones, until they are pruned."""
        known: Taken = ctx.recalled
        if task in known.now:
            assert ctx.model is not None and ctx.layout is not None
            keep = ctx.layout.split(ctx.trace["keep"])
            return {**params, **{n: params[n] * keep[n] for n in anatomy(ctx.model).layers}}
        if task not in known.tasks:
            return params
        last = known.tasks[str(task)]
        used = {n: ((o >= 0) & (o <= last)).to(params[n].device) for n, o in known.owner.items()}
        return {**params, **{n: params[n] * u for n, u in used.items()}}

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        return spread(step.layout, _group(ctx.private, "free")) * ctx.trace["keep"]

    def trace_init(self, theta: Tensor) -> dict[str, Tensor]:
        return {"keep": torch.ones_like(theta), "pruned": theta.new_zeros(())}

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        epochs, last = step.horizon
        if step.clock != (epochs - int(epochs * self.retrain) - 1, last - 1):
            return ctx.trace
        return self._prune(step.theta + delta, step.layout, ctx)

    def _prune(self, theta: Tensor, layout: Layout, ctx: Context) -> dict[str, Tensor]:
        assert ctx.model is not None
        values, keep = layout.split(theta), {}
        for n in anatomy(ctx.model).layers:
            free = ctx.private[f"free/{n}"].to(theta.device).reshape(-1)
            size = values[n].abs().reshape(-1).masked_fill(free == 0, -1)
            chosen = size.argsort(descending=True, stable=True)[: self.kept(int(free.sum()))]
            keep[n] = (1 - free).index_fill(0, chosen, 1).view(values[n].shape)
        return {"keep": spread(layout, keep), "pruned": theta.new_ones(())}

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        trace = (
            ctx.trace
            if ctx.trace["pruned"]
            else self._prune(learned.layout.flatten(learned.params), learned.layout, ctx)
        )
        keep = learned.layout.split(trace["keep"])
        own = {f"own/{n}": (keep[n] * ctx.private[f"free/{n}"]) > 0 for n in anatomy(learned.model).layers}
        return Private(
            own, {"task": learned.task, "order": learned.order, "classes": list(learned.source.classes)}
        )


@dataclass(frozen=True, eq=False)
class Attended:
    """What HAT knows: the masks [units] of every task by layer, the largest over other sources, the outputs that these took,
    and the tasks of this learn (none in predict)."""

    masks: Mapping[str, Mapping[str, Tensor]]
    past: Mapping[str, Tensor]
    classes: frozenset[int]
    now: frozenset[str]


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
    """Hard attention to the task: each task learns which units of each hidden layer it uses, and keeps their weights.

    Unit i of layer l is multiplied by a_i = sigmoid(s e_i), with an embedding e of the task and layer; s grows in every epoch,
    s = 1/s_max + (s_max - 1/s_max) b / (B - 1) at its batch b = 0 .. B - 1. Gradients of weight (i, j) are multiplied by
    1 - min(a_i, a_j) of the earlier tasks' largest a, those of e by s_max (cosh(s e) + 1) / (s (cosh(e) + 1)), and
    `sparsity` x sum a (1 - past) / sum (1 - past) is added. With `hard` masks of earlier and predicted tasks are
    1[e > 0], and old outputs stay as they are, to the bit; without, sigmoid(s_max e), and they drift.

    Units are gated by the rows of their layers, as is exact with ReLU and max pooling, without norms. The head is not gated:
    of a shared one each task trains the rows of its own classes that no other took (or `models.multi_head`). Private. Where
    training is short a large `sparsity` silences all units of a layer. Serrà et al. 2018 (who use .75 with 200 epochs).
    """

    sparsity: float = 0.1
    s_max: float = 400.0
    hard: bool = True

    shared_items: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative("HAT", sparsity=self.sparsity)
        if not 1 <= self.s_max < float("inf"):
            raise ConsilienceError(f"`s_max` should be at least 1 and finite. Found `s_max = {self.s_max}`.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return (
            without_tasks(facts)
            or not_alone(facts)
            or (rows_with_units(facts.model) if facts.model is not None else None)
        )

    def scale(self, clock: tuple[int, int], horizon: tuple[int, int]) -> float:
        """s at a step: from 1 / s_max at the first batch of an epoch to s_max at its last."""
        low, last = 1 / self.s_max, horizon[1] - 1
        return low + (self.s_max - low) * (clock[1] / last if last > 0 else 1.0)

    def compensation(self, e: Tensor, s: float) -> Tensor:
        """What undoes the scale of the gradient of sigmoid(s e): as if it were sigmoid(e), s_max times."""
        return self.s_max / s * ((s * e).clamp(-50, 50).cosh() + 1) / (e.clamp(-50, 50).cosh() + 1)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Attended:
        now = {s.name for s in sources}
        masks: dict[str, dict[str, Tensor]] = {}
        past: dict[str, Tensor] = {}
        classes: set[int] = set()
        for (_, source), item in sorted(memory.items()):
            mine = masks.setdefault(item.meta["task"], {})
            for n, a in item.group("mask").items():
                mine[n] = torch.maximum(mine[n], a) if n in mine else a
                if source not in now:
                    past[n] = torch.maximum(past[n], a) if n in past else a
            if source not in now:
                classes |= set(item.meta["classes"])
        return Attended(masks, past, frozenset(classes), frozenset(str(s.task) for s in sources))

    def begin(self, start: Beginning) -> Begun:
        """Embeddings `hat/<task>/<layer>` ~ N(0, 1) for a new task; private: factors of the gradients, by entry."""
        model, params, sources, known, generator = (
            start.model,
            start.params,
            start.sources,
            start.recalled,
            start.generator,
        )
        a, new = anatomy(model), dict(params)
        for s in sources:
            for n in a.layers:
                name = f"hat/{s.task}/{n}"
                if name not in new:
                    new[name] = torch.randn(a.shapes[n][0], generator=generator).to(params[n])
        free = own_entries(model, params, sources, known.classes)
        for n in a.layers:
            if n in known.past:
                free[n] = 1 - torch.minimum(
                    self._units(a.shapes[n], known.past[n]), self._inputs(model, n, known)
                ).to(params[n])
                if n in a.biases:
                    free[a.biases[n]] = (1 - known.past[n]).to(params[n])
        if a.head and known.past:
            weight = a.head[0]
            free[weight] = free[weight] * (1 - self._inputs(model, weight, known)).to(params[weight])
        for n in new:
            if n.startswith("hat/") and not any(n.startswith(f"hat/{s.task}/") for s in sources):
                free[n] = torch.zeros_like(new[n])
        return Begun(new, {f"free/{n}": f for n, f in free.items()})

    @staticmethod
    def _units(shape: tuple[int, ...], a: Tensor) -> Tensor:
        """The values [units] of a layer's units on its weight."""
        return a.view(-1, *[1] * (len(shape) - 1)).expand(shape)

    @staticmethod
    def _inputs(model: Model, name: str, known: Attended) -> Tensor:
        """The values of the units before a layer on its weight: 1 where they are inputs; a flattened map's unit has several places."""
        found = anatomy(model)
        shape, before = found.shapes[name], found.previous(name)
        if before not in known.past:
            return torch.ones(shape)
        a = known.past[str(before)]
        a = a.repeat_interleave(shape[1] // len(a))
        return a.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        full = [n for n, a in ctx.recalled.past.items() if bool((a >= 1).all())]
        warning = (
            f"layer {full[0]!r} has no unit left; use a larger `sparsity`, or a wider model" if full else None
        )
        return ctx.flat, warning

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Every hidden layer with its rows multiplied by the task's attention."""
        known: Attended = ctx.recalled
        if task in known.now:
            s = self.scale(ctx.clock, ctx.horizon)
            found = {
                n[len(f"hat/{task}/") :]: torch.sigmoid(s * e)
                for n, e in params.items()
                if n.startswith(f"hat/{task}/")
            }
        else:
            found = dict(known.masks.get(str(task), {}))
        assert ctx.model is not None
        new, biases = dict(params), anatomy(ctx.model).biases
        for n, a in found.items():
            a = a.to(params[n])
            new[n] = params[n] * a.view(-1, *[1] * (params[n].ndim - 1))
            if n in biases:
                new[biases[n]] = params[biases[n]] * a
        return new

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        factors, s = _group(ctx.private, "free"), self.scale(step.clock, step.horizon)
        values = step.layout.split(step.theta)
        return spread(
            step.layout,
            {**factors, **{n: self.compensation(e, s) for n, e in values.items() if self._mine(n, ctx)}},
        )

    @staticmethod
    def _mine(name: str, ctx: Context) -> bool:
        return any(name.startswith(f"hat/{task}/") for task in ctx.recalled.now)

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        s, known = self.scale(step.clock, step.horizon), ctx.recalled
        above, below = step.theta.new_zeros(()), step.theta.new_zeros(())
        for n, e in step.layout.split(step.theta).items():
            if self._mine(n, ctx):
                layer = n[len(next(f"hat/{t}/" for t in known.now if n.startswith(f"hat/{t}/"))) :]
                free = 1 - known.past[layer].to(e) if layer in known.past else torch.ones_like(e)
                a = torch.sigmoid(s * _Scaled.apply(e, self.compensation(e.detach(), s)))  # type: ignore[no-untyped-call]
                above, below = above + (a * free).sum(), below + free.sum()
        return self.sparsity * above / below.clamp_min(1)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        start = f"hat/{learned.task}/"
        found = {n[len(start) :]: e for n, e in learned.params.items() if n.startswith(start)}
        masks = {
            n: (e > 0).to(e.dtype) if self.hard else torch.sigmoid(self.s_max * e) for n, e in found.items()
        }
        return Private(
            {f"mask/{n}": a for n, a in masks.items()},
            {"task": learned.task, "classes": list(learned.source.classes)},
        )


def _group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{prefix}/")}
