"""The step: a function of tensors, built once per visit from the verbs that corrections override."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Cone, Linear, Stateful, StatefulLinear, inner_products
from consilience.core.batch import Batch, first_alike
from consilience.core.contexts import Context, StepView
from consilience.core.correction import Correction, knows_gradient, overrides
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.model import Forward, ForwardEach, Model
from consilience.core.names import joined
from consilience.core.optimiser import Optimiser, OptimiserState
from consilience.core.params import Layout, Params, all_finite
from consilience.core.scaling import LossScale, ScaleState
from consilience.core.source import LabelFrame, Target
from consilience.core.training import Place, Training
from consilience.core.tree import Input, concat
from consilience.core.viewed import Viewed
from consilience.loop.compiled import Compiled

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The type of autocast, by precision."""

Pairs = Sequence[tuple[Correction, Context]]
"""Corrections with their contexts in this visit."""

_Forwarded = tuple[int, int, str | None]
"""The inputs that are forwarded, by identity; the part that they stand alone for, or -1; and the task."""


@dataclass(eq=False)
class Carry:
    """What moves from step to step: trainable parameters [n], buffers, and the optimiser's state.

    Traces move too; each is in the context of its correction.
    """

    theta: Tensor
    buffers: Params
    optimiser: OptimiserState
    scaling: ScaleState = field(default_factory=dict)
    """The loss scale of "fp16"; {} for other precisions."""
    aggregator: dict[str, Tensor] = field(default_factory=dict)
    """What the aggregator of a step remembers, by the names of its rows; {} for most."""


class Objectives(NamedTuple):
    """The losses of one step with their weights, and those losses that constrain the gradient only."""

    losses: list[Tensor]
    weights: list[float]
    constraints: list[Tensor]
    parts: list[int | None]
    """The part over whose samples each loss is a mean; None: those of all sources."""
    parts_of_constraints: list[int | None]
    names: list[str]
    """What each loss is of: the source of its part, or the correction that made it."""
    own: list[int]
    """The parts whose losses the first of them are."""

    @property
    def each(self) -> list[tuple[str, Tensor]]:
        """What each objective is of, and its loss without a gradient."""
        return [(name, loss.detach()) for name, loss in zip(self.names, self.losses, strict=True)]

    @property
    def total(self) -> Tensor:
        """The weighted sum of the losses, without a gradient."""
        total = self.losses[0].detach()
        total = total if self.weights[0] == 1 else total * self.weights[0]
        for loss, weight in zip(self.losses[1:], self.weights[1:], strict=True):
            total = total + loss.detach() * weight
        return total

    def shared(self, shares: Sequence[float], parts: Sequence[Batch]) -> Objectives:
        """Return the objectives of a micro-batch, scaled by the share of their parts in the whole batch."""
        own = [share for share, part in zip(shares, parts, strict=True) if not part.drawn_by]
        mean = sum(own) / len(own)

        def scaled(losses: list[Tensor], of: list[int | None]) -> list[Tensor]:
            each = [mean if part is None else shares[part] for part in of]
            return [loss * share for loss, share in zip(losses, each, strict=True)]

        return self._replace(
            losses=scaled(self.losses, self.parts),
            constraints=scaled(self.constraints, self.parts_of_constraints),
        )


@dataclass(eq=False)
class Rows:
    """The gradients of the objectives of a step, and of its constraints."""

    objectives: Tensor
    """[m, n], one row each; one for all where they are summed."""
    weights: list[float]
    constraints: list[Tensor]
    """[n] each."""
    absent: list[str]
    """The entries that no objective reaches."""
    names: Sequence[str] = ()
    """What each objective is of, so that an aggregator knows it again in the next step."""
    own: Sequence[int] = ()
    """The parts whose own losses the first objectives are; none where objectives are summed."""
    shared: Mapping[str, slice] = field(default_factory=dict)
    """The columns of each entry that is no task's own."""

    def plus(self, other: Rows) -> Rows:
        """Add the gradients of another micro-batch, in place."""
        for mine, theirs in zip(
            [self.objectives, *self.constraints], [other.objectives, *other.constraints], strict=True
        ):
            mine.add_(theirs)
        return replace(self, absent=[name for name in self.absent if name in other.absent])

    @cached_property
    def grams(self) -> Tensor:
        """Inner products [entries, m, m] of the objectives over each shared entry."""
        return inner_products(self.objectives, list(self.shared.values()))

    @cached_property
    def gram(self) -> Tensor:
        """Inner products [m, m] of the objectives over all shared entries."""
        return self.grams.sum(0)

    def of_parts(self, count: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return the inner products [parts, parts] by entry, and the norms [parts].

        They are 0 for parts without a loss of their own.
        """
        own = torch.tensor(list(self.own), dtype=torch.long, device=self.grams.device)
        full = self.grams.new_zeros(len(self.shared), count, count)
        full[:, own[:, None], own] = self.grams[:, : len(own), : len(own)]
        norms = full.sum(0).diagonal().sqrt().to(self.objectives.dtype)
        return dict(zip(self.shared, full, strict=True)), norms


def cut(part: Batch, count: int) -> list[Batch]:
    """Cut a batch into pieces of nearly equal size; the first sample fills those that would be empty."""
    sizes = [len(part.y) // count + (i < len(part.y) % count) for i in range(count)]
    ends = [sum(sizes[: i + 1]) for i in range(count)]
    spans = [slice(end - size, end) if size else slice(0, 1) for size, end in zip(sizes, ends, strict=True)]
    return [
        replace(
            part,
            x=part.x[span],
            y=part.y[span],
            w=None if part.w is None else part.w[span],
            extra={name: tensor[span] for name, tensor in part.extra.items()},
            index=None if part.index is None else part.index[span],
        )
        for span in spans
    ]


def copy_row(grad: Tensor | None, row: Tensor) -> Tensor:
    """Copy a gradient into a row, which is 0 where there is none."""
    return row.zero_() if grad is None else row.copy_(grad.reshape(-1))


def sum_of(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, each of which may be None for none."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def runs(layout: Layout, shared: Mapping[str, slice]) -> list[tuple[slice, bool]]:
    """Return the columns of theta in runs, as long as possible, of shared entries and of those of tasks."""
    found: list[tuple[slice, bool]] = []
    for name in layout.names:
        span, common = layout.span(name), name in shared
        if found and found[-1][1] == common:
            span = slice(found.pop()[0].start, span.stop)
        found.append((span, common))
    return found


def own_count(key: str, name: str) -> str:
    """Return where an optimiser's state has an entry's own value of what is no vector, such as a count."""
    return f"{key}/{name}"


def clip_factor(norm: Tensor, most: float) -> Tensor:
    """Return what a gradient of this norm is multiplied by, as `torch.nn.utils.clip_grad_norm_` does.

    >>> clip_factor(torch.tensor(5.0), 1.0)
    tensor(0.2000)
    """
    return (most / (norm + 1e-6)).clamp(max=1.0)


def acts(correction: Correction, ctx: Context) -> bool:
    """Whether a correction is active in this visit.

    One that needs history, or revisits, is inactive until `recall` returns some.
    """
    waits = correction.needs_history or correction.needs_revisits
    return not (waits and ctx.recalled is None)


@dataclass(eq=False)
class Step:
    """One visit's step over parameters theta [n].

    It forwards all parts, aggregates the gradients of all objectives, adds those of penalties, and updates:
    g = clip(A(grad of each objective) + grad(penalties)); theta' = theta + U(g). Entries that are masked, or
    that no objective reaches, are afterwards as they were.
    """

    model: Model
    frame: LabelFrame
    training: Training
    aggregator: Aggregator | None
    """Combines the objectives; None: their weighted sum."""
    corrections: Pairs
    layout: Layout
    fixed: Params
    carry: Carry
    start: Tensor
    """theta [n] before the first step."""
    horizon: tuple[int, int]
    """(epochs, steps per epoch)."""
    place: Place = field(default_factory=Place)
    """Where the visit lies in the run."""
    level: Literal["features"] | None = None
    """"features": an aggregator weighs objectives by their gradients with respect to the features."""
    absent: list[str] = field(default_factory=list, init=False)
    """The entries that no objective of the last step reaches."""
    lacking: frozenset[int] = field(default=frozenset(), init=False)
    """The parts of this step that have no target, and so are no objectives."""
    each: list[tuple[str, Tensor]] = field(default_factory=list, init=False)
    """What each objective of the last step is of, and its loss; of all micro-batches."""
    loss: Tensor | None = field(default=None, init=False)
    """The weighted sum of the objectives of the last step; penalties are not in it."""
    measures: bool = field(default=False, init=False)
    """Whether the next step is looked at: it measures `norm`, which reads the gradient once more."""
    norm: Tensor | None = field(default=None, init=False)
    """The L2 norm of the last step's gradient, with penalties and before clipping; None: not measured."""
    bound: ForwardEach | None = field(default=None, init=False)
    """The model over `leaves` in training mode."""

    def __post_init__(self) -> None:
        self.optimiser: Optimiser = self.training.inner()
        self.scaling = LossScale() if self.training.precision == "fp16" else None

        # A verb that is not overridden, or of an inactive correction, costs nothing in a step.
        # Traces go on regardless: a later visit may read them.
        self.by_verb = {
            verb: [
                (c, ctx)
                for c, ctx in self.corrections
                if overrides(c, verb) and (verb == "trace" or acts(c, ctx))
            ]
            for verb in ("sample", "view", "losses", "rows", "penalty", "mask", "trace")
        }
        self.alone = {c.name for c, _ in self.corrections if c.adds_constraints}
        self.closed_form = {c.name for c, _ in self.by_verb["penalty"] if knows_gradient(c)}
        for correction, ctx in self.by_verb["trace"]:
            ctx.trace = correction.trace_init(ctx)

        # Aggregators see only entries that all objectives may reach: a head of one task has no conflict.
        layout = self.layout
        self.shared = {name: layout.span(name) for name in layout.names if self.model.shared(name)}
        self.runs = runs(layout, self.shared)
        self._matrices: list[Tensor] = []
        # Features of the last step, and the leaf that heads got in their place; that of each part.
        self._features: list[tuple[Tensor, Tensor]] = []
        self._cut_of: list[int] = []
        training = self.training
        self.factors, self.decays = training.factors(layout), training.decays(layout)
        # Asked for in every step, so that they are known beforehand.
        self.varies = training.varies
        self.accumulates = training.accumulates
        self.clips = training.clip_norm is not None or training.clip_value is not None
        self.reads_index = any(c.needs_index for pairs in self.by_verb.values() for c, _ in pairs)
        self.weighs = isinstance(self.aggregator, Linear) and self.aggregator.needs_gram
        self.reads_norms = any(correction.needs_norms for correction, _ in self.by_verb["trace"])

        # Copied, because steps update buffers in place; derived ones are the same after every step.
        self.start_buffers = {
            name: buffer if self.model.derived(name) else buffer.clone()
            for name, buffer in self.carry.buffers.items()
        }
        self._columns: dict[tuple[int, ...], Tensor] = {}

    # One step

    def __call__(self, parts: list[Batch], clock: tuple[int, int], generator: torch.Generator | None) -> None:
        """Move `carry` and the traces on by one step."""
        self.lacking = self._lacking(parts)
        if not self.accumulates:
            see = self._seen(parts, clock)
            objectives = self.objectives(see)
            self.each = objectives.each
            self.loss, rows = objectives.total, self._rows(objectives, generator)
        else:
            see, rows = self._accumulated(parts, clock, generator)

        self.absent = rows.absent
        if self.scaling is not None and not self._scaled(rows):
            # Nothing moves, but corrections that act at a given step must see that it is over.
            self.norm = None
            self._trace(see, *[torch.zeros_like(self.carry.theta)] * 2)
            return

        if self.by_verb["trace"] and (self.reads_norms or (self.weighs and len(rows.objectives) > 1)):
            see.grams, see.norms = rows.of_parts(len(see.parts))
        factor = self._mask(see) if self.by_verb["mask"] else None
        grad = self._aggregate(rows, factor, generator)
        trained = self._penalised(grad, see) if self.by_verb["penalty"] else grad
        self._descend(see, grad, trained, factor)

    def _lacking(self, parts: list[Batch]) -> frozenset[int]:
        """Return the parts of a step without any target, unless all are.

        They are no objectives: a row of zeros would end MGDA, and momentum would move the head of a task.
        """
        targets = [self.target(part) for part in parts] if len(parts) > 1 else []
        found = frozenset(
            i
            for i, (target, part) in enumerate(zip(targets, parts, strict=False))
            if not target.complete and not target.count(part.y, part.w) > 0
        )
        return found if len(found) < len(parts) else frozenset()

    def _seen(self, parts: list[Batch], clock: tuple[int, int]) -> StepView:
        """Return what the verbs see of these parts, after the forward pass."""
        raw, outputs = self.outputs(parts, clock)
        return self.look(parts, self.carry.theta, clock, raw, outputs)

    def _accumulated(
        self, parts: list[Batch], clock: tuple[int, int], generator: torch.Generator | None
    ) -> tuple[StepView, Rows]:
        """Return the gradients of a step's objectives as the sums of those of its micro-batches."""
        drawn = None if generator is None else generator.get_state()
        total: Rows | None = None
        self.each = []
        losses: list[Tensor] = []
        seen: list[StepView] = []
        for piece, shares in self._pieces(parts):
            see = self._seen(piece, clock)
            if self.by_verb["trace"]:
                # Only outputs stay: they are small, and the graph behind them is not.
                raw, outputs = ([out.detach() for out in some] for some in (see.raw, see.outputs))
                seen.append(replace(see, raw=raw, outputs=outputs))
            objectives = self.objectives(see).shared(shares, see.parts)
            losses.append(objectives.total)
            self.each += objectives.each
            # Random weights are those of the step, not of a micro-batch.
            if generator is not None and drawn is not None:
                generator.set_state(drawn)
            rows = self._rows(objectives, generator, 0 if total is None else 1)
            total = rows if total is None else total.plus(rows)
        self.loss = torch.stack(losses).sum()
        assert total is not None
        return self._whole(parts, seen, clock) if seen else see, total

    def _whole(self, parts: list[Batch], seen: list[StepView], clock: tuple[int, int]) -> StepView:
        """Return what the verbs see of a step whose micro-batches were `seen`."""

        def joined(pieces: list[list[Tensor]]) -> list[Tensor]:
            # A piece of a part with too few samples repeats its first one.
            each = zip(parts, zip(*pieces, strict=True), strict=True)
            return [torch.cat(outs[: len(part.y)]) for part, outs in each]

        raw, outputs = joined([see.raw for see in seen]), joined([see.outputs for see in seen])
        return self.look(parts, self.carry.theta, clock, raw, outputs)

    def _pieces(self, parts: list[Batch]) -> list[tuple[list[Batch], list[float]]]:
        """Cut the parts of a step into micro-batches of at most `batch_size` samples.

        With each micro-batch comes the share of each of its parts in the mean over that part.
        """
        own = max((len(part.y) for part in parts if not part.drawn_by), default=1)
        count = -(-own // self.training.batch_size)
        each = [cut(part, count) for part in parts]
        # Pieces of the same inputs are the same too, so that they are forwarded once.
        for i, first in enumerate(first_alike(parts)):
            each[i] = [replace(piece, x=of.x) for piece, of in zip(each[i], each[first], strict=True)]
        pieces = list(zip(*each, strict=True))

        # Means over pieces add up to the mean over the batch by how many targets each piece has.
        sizes = [[float(self.target(p).count(p.y, p.w)) for p in piece] for piece in pieces]
        counts = torch.tensor(sizes, dtype=torch.float64)
        # A part with fewer samples than there are pieces repeats its first one, which counts for nothing.
        for i, part in enumerate(parts):
            counts[len(part.y) :, i] = 0

        totals = counts.sum(0)
        shares = torch.where(totals > 0, counts / totals, 1 / count).tolist()
        return [(list(piece), share) for piece, share in zip(pieces, shares, strict=True)]

    def _scaled(self, rows: Rows) -> bool:
        """Divide gradients by the loss scale, and update it; whether they are finite."""
        assert self.scaling is not None
        # Before aggregators and clipping, which need the true sizes.
        each, scale = [rows.objectives, *rows.constraints], self.carry.scaling["scale"]
        for row in each:
            row.div_(scale)
        finite = all(map(all_finite, each))
        self.carry.scaling = self.scaling.update(self.carry.scaling, finite)
        return finite

    def _descend(self, see: StepView, grad: Tensor, trained: Tensor, factor: Tensor | None) -> None:
        """Move theta, the optimiser's state and the traces by a gradient `trained` [n].

        `grad` is the part of it without penalties, and `factor` the product of the masks.
        """
        carry, training = self.carry, self.training
        rate = training.rate(see.clock, self.horizon, self.place) if self.varies else training.lr
        optimiser, lr = self.optimiser.at(rate)
        self.norm = self._norm(trained, factor) if self.measures else None
        if self.clips:
            trained = self._clipped(trained, factor)
        if self.decays is not None and not training.decoupled:
            trained = trained + self.decays * carry.theta

        direction, state = self._updated(optimiser, trained)
        if self.decays is not None and training.decoupled:
            # The direction of some optimisers contains the learning rate, and then the decay must too.
            direction = direction + self.decays * carry.theta * (rate / lr)

        # Absent and masked entries stay as they are, whatever momentum and decay say.
        for name in self.absent:
            direction[self.layout.span(name)] = 0
        if factor is not None:
            direction = direction.masked_fill(factor == 0, 0)
        if self.factors is not None:
            direction = direction * self.factors
        carry.optimiser = state

        # Traces see theta before it moves.
        if self.by_verb["trace"]:
            self._trace(see, grad, direction * -lr)
        carry.theta.add_(direction, alpha=-lr)

    def _trace(self, see: StepView, grad: Tensor, delta: Tensor) -> None:
        """Let corrections trace the step: the gradient without penalties [n], and how far theta moves [n]."""
        for correction, ctx in self.by_verb["trace"]:
            ctx.trace = correction.trace(see, ctx, grad, delta)

    def _clipped(self, grad: Tensor, factor: Tensor | None) -> Tensor:
        """Return the gradient [n] within the limits of `Training`, as torch.nn.utils clips it."""
        most, norm = self.training.clip_value, self.training.clip_norm
        if most is not None:
            return grad.clamp(-most, most)
        assert norm is not None
        return grad * clip_factor(self._norm(grad, factor), norm)

    def _norm(self, grad: Tensor, factor: Tensor | None) -> Tensor:
        """Return the L2 norm of a gradient [n] over the entries that can move."""
        # Other entries would shorten the step of these.
        counted = grad if factor is None else grad.masked_fill(factor == 0, 0)
        if self.absent:
            counted = counted.clone()
            for name in self.absent:
                counted[self.layout.span(name)] = 0
        norm: Tensor = counted.norm()
        return norm

    # Forward

    @cached_property
    def leaves(self) -> Params:
        """The trainable entries as leaves of autograd, in the memory of theta."""
        return {name: p.detach().requires_grad_() for name, p in self.layout.split(self.carry.theta).items()}

    def autocast(self) -> AbstractContextManager[object]:
        """Return the precision of forward passes."""
        half = HALF.get(self.training.precision)
        if half is not None:
            return torch.autocast(self.layout.device.type, dtype=half)
        return nullcontext()

    def target(self, part: Batch) -> Target:
        """Return what the targets of a part are. Raises ConsilienceError where the part does not say it."""
        targets = self.frame.targets
        if len(targets) == 1:
            return next(iter(targets.values()))
        # What a model is given as task says it too, in a batch that a correction made of one.
        for key in (part.target, part.task):
            if key is not None and key in targets:
                return targets[key]
        raise ConsilienceError(
            f"a batch must say by `target` which of the tasks {', '.join(targets)} its targets are of, "
            f"because they differ, got {part.target!r} from {part.drawn_by!r}."
        )

    def masked(self, out: Tensor, part: Batch) -> Tensor:
        """Return outputs [B, C, *places] with -inf where the classes of a part do not compete."""
        columns = self.frame.within(self.target(part), part.task)
        if columns is None:
            return out

        # Kept, because steps ask for the same few columns again and again.
        if columns not in self._columns:
            others = torch.ones(self.model.outputs, dtype=torch.bool, device=self.layout.device)
            others[list(columns)] = False
            self._columns[columns] = others
        others = self._columns[columns]
        return out.masked_fill(
            others if out.dim() == 2 else others.view(-1, *[1] * (out.dim() - 2)), -torch.inf
        )

    def forward(self, x: Input, task: str | None) -> Tensor:
        """Return the outputs [B, C, *places] in training mode."""
        return self.forward_each(x, (task,))[0]

    def forward_each(self, x: Input, tasks: tuple[str | None, ...]) -> list[Tensor]:
        """Return the outputs [B, C, *places] in training mode for each task."""
        if self.by_verb["view"]:
            return [self.seen(x, task) for task in tasks]

        # Bound once: a functional call in every step costs a quarter more.
        if self.bound is None:
            params = {**self.fixed, **self.leaves}
            through = self._cut if self.level == "features" else None
            bound, self.carry.buffers = self.model.bind_each(params, self.carry.buffers, True, through)
            self.bound = Compiled(bound) if self.training.compile and through is None else bound
        return self.bound(x, tasks)

    def seen(self, x: Input, task: str | None) -> Tensor:
        """Return the outputs [B, C] in training mode, through the views of corrections."""
        params: Params = {**self.fixed, **self.leaves}
        for correction, ctx in self.by_verb["view"]:
            params = correction.view(params, task, ctx)
        out, self.carry.buffers = self.model(params, self.carry.buffers, x, task, True)
        return out

    def forward_all(self, parts: list[Batch]) -> list[Tensor]:
        """Return the outputs of every part; parts that the model treats alike go through it together.

        Parts of the very same inputs go through all that their tasks share once. Those of a constraint go
        alone: its gradient is another backward pass, through its own samples only.
        """
        if len(parts) == 1:
            return [self.forward(parts[0].x, parts[0].task)]

        views = bool(self.by_verb["view"])
        by_task = self.model.uses_task or views
        keys = []
        for i, part in enumerate(parts):
            alone = i if part.drawn_by in self.alone else -1
            keys.append((id(part.x), alone, part.task if by_task else None))
        found = self._forward_shared(parts, keys) if by_task and not views else {}

        # One forward pass of many samples is faster than one per part.
        groups: dict[tuple[str | None, int, object], dict[_Forwarded, Input]] = {}
        for part, at in zip(parts, keys, strict=True):
            if at not in found:
                _, alone, task = at
                # Inputs of other shapes, such as images of another size, cannot be joined. Ragged ones of
                # another length are apart too: padding to the longest of all parts would change what each is
                # padded to.
                groups.setdefault((task, alone, part.x.shape[1:]), {})[at] = part.x

        for (task, _, _), members in groups.items():
            xs = list(members.values())
            out = self.forward(xs[0] if len(xs) == 1 else concat(xs), task)
            own = [out] if len(xs) == 1 else out.split([len(x) for x in xs])
            found |= zip(members, own, strict=True)
        return [found[at] for at in keys]

    def _forward_shared(self, parts: list[Batch], keys: Sequence[_Forwarded]) -> dict[_Forwarded, Tensor]:
        """Return the outputs of parts whose inputs are those of other tasks too."""
        found: dict[_Forwarded, Tensor] = {}
        for part, (x, alone, _) in zip(parts, keys, strict=True):
            same = dict.fromkeys(at for at in keys if at[:2] == (x, alone))
            if len(same) > 1 and not same.keys() <= found.keys():
                outs = self.forward_each(part.x, tuple(task for _, _, task in same))
                found |= zip(same, outs, strict=True)
        return found

    def outputs(self, parts: list[Batch], clock: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of all parts, before and after task masks."""
        # `view` is called without a StepView, so it reads the clock from its context.
        for _, ctx in self.by_verb["view"]:
            ctx.clock, ctx.horizon = clock, self.horizon
        self._features.clear()
        with self.autocast():
            raw = self.forward_all(parts)
        if self.level == "features":
            # A model with a head for each task cuts once for each, in the order in which they were asked for.
            order = list(dict.fromkeys(part.task for part in parts))
            each = len(self._features) == len(order)
            self._cut_of = [order.index(part.task) if each else 0 for part in parts]
        if self.training.precision in HALF:
            raw = [out.to(self.layout.dtype) for out in raw]

        # Columns of other tasks take no part in the loss of a sample with a task.
        return raw, [self.masked(out, part) for out, part in zip(raw, parts, strict=True)]

    @cached_property
    def _before(self) -> Forward:
        params = {**self.fixed, **self.layout.split(self.start)}
        model = Viewed.of(self.model, self.by_verb["view"])
        return model.bind(params, self.start_buffers, False)[0]

    def before(self, x: Input, task: str | None) -> Tensor:
        """Return the outputs [B, C] of the model as it was before this visit, without gradient."""
        with torch.no_grad(), self.autocast():
            return self._before(x, task).to(x.dtype if x.is_floating_point() else self.start.dtype)

    def features(self, x: Input, task: str | None, before: bool = False) -> Tensor:
        """Return features [B, d] in eval mode; with `before`, those before this visit, without gradient."""
        params: Params = {**self.fixed, **(self.layout.split(self.start) if before else self.leaves)}
        model = Viewed.of(self.model, self.by_verb["view"])
        buffers = self.start_buffers if before else self.carry.buffers
        with torch.no_grad() if before else nullcontext(), self.autocast():
            return model.features(params, buffers, x, task).to(self.layout.dtype)

    def now(self, x: Input, task: str | None) -> Tensor:
        """Return the outputs [B, C] with the present parameters, in eval mode."""
        params = {**self.fixed, **self.layout.split(self.carry.theta)}
        return Viewed.of(self.model, self.by_verb["view"])(params, self.carry.buffers, x, task, False)[0]

    def look(
        self,
        parts: list[Batch],
        theta: Tensor,
        clock: tuple[int, int],
        raw: list[Tensor],
        outputs: list[Tensor],
    ) -> StepView:
        """Return what the verbs of a step may see."""

        def answer(part: int, task: str | None) -> Tensor:
            # Most models answer alike for every task, and their outputs are there already.
            if task == parts[part].task or not (self.model.uses_task or self.by_verb["view"]):
                return raw[part]
            with self.autocast():
                return self.forward(parts[part].x, task).to(self.layout.dtype)

        return StepView(
            theta=theta,
            start=self.start,
            layout=self.layout,
            parts=parts,
            raw=raw,
            outputs=outputs,
            before=self.before,
            clock=clock,
            horizon=self.horizon,
            targets=[self.target(part) for part in parts],
            answer=answer,
            features=lambda i: self.features(parts[i].x, parts[i].task),
            features_before=lambda x, task: self.features(x, task, True),
            entries=self.leaves,
            losses=lambda: self.plain_losses(parts, outputs),
        )

    # Objectives and their gradients

    def objectives(self, see: StepView) -> Objectives:
        """Return the loss of each part that has a weight, and the rows of corrections."""
        # Parts without a weight share 1. A part of weight 0 is forwarded for a correction only.
        share = 1 / max(1, sum(part.weight is None for part in see.parts))
        found = Objectives([], [], [], [], [], [], [])
        for i, (loss, part) in enumerate(zip(self.part_losses(see), see.parts, strict=True)):
            weight = share if part.weight is None else part.weight
            if weight and i not in self.lacking:
                found.losses.append(loss)
                found.weights.append(weight)
                found.parts.append(i)
                found.names.append(joined([part.drawn_by, part.source]) if part.drawn_by else part.source)
                found.own.append(i)

        for correction, ctx in self.by_verb["rows"]:
            for row in correction.rows(see, ctx):
                if row.kind == "constraint":
                    found.constraints.append(row.loss)
                    found.parts_of_constraints.append(row.part)
                else:
                    found.losses.append(row.loss)
                    found.weights.append(row.weight)
                    found.parts.append(row.part)
                    found.names.append(correction.name)
        return found

    def plain_losses(self, parts: list[Batch], outputs: list[Tensor]) -> Tensor:
        """Return the mean loss of each part [parts], without gradient and before corrections change it.

        That of a part without any target is NaN.
        """
        found = []
        for i, (part, out) in enumerate(zip(parts, outputs, strict=True)):
            loss = self.target(part).mean(out.detach(), part.y, part.w)
            found.append(torch.full_like(loss, torch.nan) if i in self.lacking else loss)
        return torch.stack(found)

    def part_losses(self, see: StepView) -> list[Tensor]:
        """Return the mean loss of each part."""
        triples = list(zip(see.targets, see.outputs, see.parts, strict=True))
        if not self.by_verb["losses"]:
            return [target.mean(out, part.y, part.w) for target, out, part in triples]

        found = [target.losses(out, part.y) for target, out, part in triples]
        each = {i: losses.values for i, losses in enumerate(found)}
        for correction, ctx in self.by_verb["losses"]:
            each = correction.losses(each, see, ctx)
        return [found[i]._replace(values=each[i]).mean(part.w) for i, part in enumerate(see.parts)]

    def gradient(self, loss: Tensor, keep: bool, out: Tensor | None = None) -> tuple[Tensor, list[str]]:
        """Return the gradient [n] of a scalar, in `out` if given, and the entries out of its reach.

        `keep` keeps the graph.
        """
        layout = self.layout
        if not loss.requires_grad:  # for example the answer of an earlier task through its own mask
            zero = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
            return zero if out is None else out.zero_(), list(layout.names)

        if self.scaling is not None:
            loss = loss * self.carry.scaling["scale"]
        leaves = [self.leaves[name] for name in layout.names]
        grads = torch.autograd.grad(loss, leaves, retain_graph=keep, allow_unused=True)
        return self._joined(grads, out)

    def _joined(self, grads: Sequence[Tensor | None], out: Tensor | None = None) -> tuple[Tensor, list[str]]:
        """Return the gradients of all entries as one vector [n], and the entries that have none."""
        absent = [name for name, grad in zip(self.layout.names, grads, strict=True) if grad is None]
        flat = [
            torch.zeros_like(self.leaves[name]).view(-1) if grad is None else grad.reshape(-1)
            for name, grad in zip(self.layout.names, grads, strict=True)
        ]
        return torch.cat(flat) if out is None else torch.cat(flat, out=out), absent

    def _matrix(self, rows: int, number: int, columns: int) -> Tensor:
        """Return a matrix [rows, columns] to write into: the same in each step, as new memory is slow."""
        size = (rows, columns)
        if number == len(self._matrices):
            self._matrices.append(torch.empty(0, device=self.layout.device))
        if self._matrices[number].shape != size:
            self._matrices[number] = torch.empty(size, dtype=self.layout.dtype, device=self.layout.device)
        return self._matrices[number]

    def _rows(self, objectives: Objectives, generator: torch.Generator | None, number: int = 0) -> Rows:
        """Return the gradients of objectives and constraints; a weighted sum needs only its own gradient.

        `number` is that of the micro-batch among those whose rows are there at once.
        """
        losses, weights = objectives.losses, objectives.weights
        if self.level == "features":
            return self._feature_rows(objectives, generator)
        if self._sums(objectives):
            if isinstance(self.aggregator, Linear) and len(losses) > 1:
                given = torch.tensor(weights, dtype=torch.float64)
                weights = self.aggregator.weigh(torch.zeros(0, 0), given, generator).tolist()

            total = losses[0] if weights[0] == 1 else losses[0] * weights[0]
            for loss, weight in zip(losses[1:], weights[1:], strict=True):
                total = total + loss * weight
            losses = [total]

        if len(losses) == 1 and not objectives.constraints:
            grad, absent = self.gradient(losses[0], keep=False)
            own = objectives.own if len(objectives.losses) == 1 else []
            return Rows(grad[None], objectives.weights, [], absent, objectives.names, own, self.shared)

        # The last backward pass frees the graph.
        every, count = [*losses, *objectives.constraints], len(losses)
        # One row becomes the gradient itself, which traces may keep.
        matrix = (
            self._matrix(count, number, self.layout.size) if count > 1 else torch.empty_like(self.start)[None]
        )
        each = [
            self.gradient(loss, i < len(every) - 1, matrix[i] if i < count else None)
            for i, loss in enumerate(every)
        ]

        # An entry moves if any objective reaches it.
        absent = [name for name in each[0][1] if all(name in missing for _, missing in each[:count])]
        constraints = [grad for grad, _ in each[count:]]
        return Rows(matrix, weights, constraints, absent, objectives.names, objectives.own, self.shared)

    def _cut(self, features: Tensor) -> Tensor:
        """Cut the graph at features z: heads get a leaf in their place."""
        leaf = features.detach().requires_grad_()
        self._features.append((features, leaf))
        return leaf

    def _feature_rows(self, objectives: Objectives, generator: torch.Generator | None) -> Rows:
        """Return the one gradient of a step whose objectives are weighed at the features z.

        d_k = dL_k/dz, c by the Gramian of the d_k, then one backward pass from z with sum_k c_k d_k. Entries
        behind z get their own gradients, by weight.
        """
        features = self._features[0][0] if self._features else None
        if features is None or not features.requires_grad or len({id(z) for z, _ in self._features}) > 1:
            raise Refusal(
                "the feature level needs one batch of inputs for all tasks of a step, and a trunk that is "
                f"trained, got {len(self._features)} batches; make tasks by data.tasks, use a sampler that "
                'does not read targets, or level="parameters".'
            )
        rows, own = self._of_features(objectives)

        assert isinstance(self.aggregator, Linear)
        gram = inner_products(rows).sum(0)
        # A step whose scaled gradients overflow is left out, and moves no state.
        found = rows.new_tensor(objectives.weights)
        if self.scaling is None or bool(torch.isfinite(gram).all()):
            gram = gram if self.scaling is None else gram / self.carry.scaling["scale"] ** 2
            of = Rows(rows, objectives.weights, [], [], objectives.names)
            found = self._coefficients(self.aggregator, gram, rows, of, generator)

        combined = (found @ rows).view_as(features).to(features.dtype)
        leaves = [self.leaves[name] for name in self.layout.names]
        trunk = torch.autograd.grad(features, leaves, combined, allow_unused=True)
        grad, absent = self._joined([sum_of(*pair) for pair in zip(trunk, own, strict=True)])
        return Rows(grad[None], [1.0], [], absent)

    def _of_features(self, objectives: Objectives) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradients of objectives by the features [m, numbers], and of their weighted sum by the
        entries behind the features."""
        leaves = [self.leaves[name] for name in self.layout.names]
        cuts = [leaf for _, leaf in self._features]
        count, weights = len(objectives.losses), objectives.weights
        rows = self._matrix(count, 0, cuts[0].numel())
        losses = objectives.losses
        if self.scaling is not None:
            losses = [loss * self.carry.scaling["scale"] for loss in losses]

        # Where each task has a head of its own, one backward pass finds all.
        at = [self._cut_of[part] for part in objectives.parts if part is not None]
        if len(set(at)) == count:
            total = torch.stack([loss * weight for loss, weight in zip(losses, weights, strict=True)]).sum()
            found = torch.autograd.grad(total, [*cuts, *leaves], allow_unused=True)
            for row, cut, weight in zip(rows, at, weights, strict=True):
                copy_row(found[cut], row).div_(weight)
            return rows, list(found[len(cuts) :])

        # Graphs behind the features are small: they are kept until the last one is done.
        own: list[Tensor | None] = [None] * len(leaves)
        for loss, weight, row in zip(losses, weights, rows, strict=True):
            of_cut, *grads = torch.autograd.grad(
                loss, [cuts[0], *leaves], retain_graph=True, allow_unused=True
            )
            copy_row(of_cut, row)
            for i, grad in enumerate(grads):
                own[i] = sum_of(own[i], None if grad is None else grad * weight)
        return rows, own

    def _sums(self, objectives: Objectives) -> bool:
        """Whether the objectives are summed by weights; other aggregators need the gradient of each."""
        aggregator = self.aggregator
        linear = isinstance(aggregator, Linear) and not aggregator.needs_gram
        summable = not self.reads_norms and (aggregator is None or linear)
        return len(objectives.losses) == 1 or summable

    def _aggregate(self, rows: Rows, factor: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Return the aggregated gradient [n]."""
        if factor is not None:
            rows = replace(rows, objectives=rows.objectives * factor)
        grad = rows.objectives[0] if len(rows.objectives) == 1 else self._combined(rows, generator)
        return self._projected(grad, rows.constraints, factor) if rows.constraints else grad

    def _combined(self, rows: Rows, generator: torch.Generator | None) -> Tensor:
        """Return the gradients of all objectives combined by the aggregator."""
        grads, aggregator = rows.objectives, self.aggregator
        weights = grads.new_tensor(rows.weights)
        # Entries of single tasks are summed by weight: there is nothing to aggregate.
        if aggregator is None or not self.shared:
            return weights @ grads
        if isinstance(aggregator, Linear) and aggregator.needs_gram:
            first = next(run for run, shared in self.runs if shared)
            found = self._coefficients(aggregator, rows.gram, grads[:, first], rows, generator)
            # Into one vector: sums of parts that are then joined would cost twice as much.
            grad = torch.empty_like(grads[0])
            for run, shared in self.runs:
                torch.mv(grads[:, run].T, found if shared else weights, out=grad[run])
            return grad

        if len(self.runs) == 1:
            return self._aggregated(aggregator, grads, rows, generator)
        common = [run for run, shared in self.runs if shared]
        together = torch.cat([grads[:, run] for run in common], 1)
        made = self._aggregated(aggregator, together, rows, generator)
        grad = weights @ grads
        for run, piece in zip(common, made.split([run.stop - run.start for run in common]), strict=True):
            grad[run] = piece
        return grad

    def _aggregated(
        self, aggregator: Aggregator, grads: Tensor, rows: Rows, generator: torch.Generator | None
    ) -> Tensor:
        """Return what the aggregator makes of rows [m, n], and move its state on if it keeps one."""
        # What it remembers is of all tasks: without some of them it acts as if it had no memory.
        if not isinstance(aggregator, Stateful) or self.lacking:
            return aggregator(grads, rows.weights, generator, rows.names)
        grad, self.carry.aggregator = aggregator.advance(
            grads, rows.weights, rows.names, self.carry.aggregator, generator
        )
        return grad

    def _coefficients(
        self, aggregator: Linear, gram: Tensor, rows: Tensor, of: Rows, generator: torch.Generator | None
    ) -> Tensor:
        """Return the coefficients [m] of a linear aggregator, and move its state on if it keeps one."""
        gram = aggregator.checked_gram(gram, rows, of.names)
        if not isinstance(aggregator, StatefulLinear) or self.lacking:
            return aggregator.solve(gram, of.weights, rows, generator)
        found, self.carry.aggregator = aggregator.advance_weights(
            gram, of.weights, of.names, self.carry.aggregator, generator
        )
        return found.to(rows.dtype)

    def _projected(self, grad: Tensor, constraints: list[Tensor], factor: Tensor | None) -> Tensor:
        """Return the gradient nearest to this one that no constraint's gradient opposes."""
        if not isinstance(self.aggregator, Cone):
            raise Refusal(
                "constraint rows need a cone as step aggregator, such as aggregators.gem, "
                f"got {type(self.aggregator).__name__}."
            )

        rows = torch.stack(constraints) if len(constraints) > 1 else constraints[0][None]
        return self.aggregator.project(grad, rows if factor is None else rows * factor)

    # Penalties, masks, and entries without gradient

    def penalty_gradients(self, see: StepView) -> tuple[list[tuple[Tensor, float]], Pairs]:
        """Return penalty gradients in closed form (vectors [n], factors), and who is left to autograd."""
        known: list[tuple[Tensor, float]] = []
        left: list[tuple[Correction, Context]] = []
        for correction, ctx in self.by_verb["penalty"]:
            in_closed_form = correction.name in self.closed_form
            gradient = correction.penalty_gradient(see, ctx) if in_closed_form else None
            if gradient is None:
                left.append((correction, ctx))
            else:
                known.append(gradient)
        return known, left

    @staticmethod
    def penalty(see: StepView, penalties: Pairs) -> Tensor:
        """Return the sum of penalties: a function of `see.theta`."""
        return sum((c.penalty(see, ctx) for c, ctx in penalties), start=see.theta.new_zeros(()))

    def _penalised(self, grad: Tensor, see: StepView) -> Tensor:
        """Add the gradient of the penalties to `grad`. `grad` itself is unchanged if a trace reads it."""
        known, left = self.penalty_gradients(see)
        in_place = not self.by_verb["trace"]
        if left:
            leaf = see.theta.detach().requires_grad_()
            value = self.penalty(replace(see, theta=leaf), left)
            # A penalty may be constant, as at a first visit with nothing to compare with.
            if value.requires_grad:
                grad = grad + torch.autograd.grad(value, leaf)[0]
                in_place = True
        for vector, scale in known:
            grad = grad.add_(vector, alpha=scale) if in_place else torch.add(grad, vector, alpha=scale)
            in_place = True
        return grad

    def _mask(self, see: StepView) -> Tensor | None:
        """Return the product of all masks [n], or None."""
        factor: Tensor | None = None
        for correction, ctx in self.by_verb["mask"]:
            mask = correction.mask(see, ctx)
            factor = mask if factor is None else factor * mask
        return factor

    def _updated(self, optimiser: Optimiser, grad: Tensor) -> tuple[Tensor, OptimiserState]:
        """Return the optimiser's direction [n] for a gradient [n], and its new state.

        An entry counts its own steps, as in torch.optim: Adam's bias correction is that of its first step
        when the entry is first reached. Entries that were absent once have counts of their own.
        """
        old, theta = self.carry.optimiser, self.carry.theta
        common = {key: value for key, value in old.items() if "/" not in key}
        direction, state = optimiser.update(grad, common, theta)
        if not self.absent and len(common) == len(old):
            return direction, state

        counts = [key for key, value in common.items() if value.shape != theta.shape]
        vectors = [key for key in state if key in common and key not in counts]
        own = {key: value for key, value in old.items() if "/" in key}
        for name in self.absent:
            for key in counts:
                own.setdefault(own_count(key, name), old[key])

        # A copy, because the direction may be the gradient itself, which traces read.
        direction, absent = direction.clone(), set(self.absent)
        for name in self.layout.names:
            span = self.layout.span(name)
            if name in absent:
                for key in vectors:
                    state[key][span] = old[key][span]
            elif counts and own_count(counts[0], name) in own:
                alone = {key: old[key][span] for key in vectors}
                alone |= {key: own[own_count(key, name)] for key in counts}
                direction[span], moved = optimiser.update(grad[span], alone, theta[span])
                for key in vectors:
                    state[key][span] = moved[key]
                own |= {own_count(key, name): moved[key] for key in counts}
        return direction, {**state, **own}
