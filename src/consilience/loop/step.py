"""The step: a pure function of tensors, built once per learn from the verbs that are really overridden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Cone, Linear
from consilience.core.batch import Batch, mean_loss, sample_losses
from consilience.core.contexts import Context, StepView
from consilience.core.correction import Correction, knows_gradient, overrides
from consilience.core.errors import Refusal
from consilience.core.model import Forward, Model
from consilience.core.optimiser import Optimiser, OptimiserState
from consilience.core.params import Layout, Params
from consilience.core.source import LabelFrame
from consilience.core.training import Training
from consilience.core.viewed import Viewed


@dataclass(eq=False)
class Carry:
    """What a step takes and gives: the flat trainable parameters [n], buffers, and the optimiser's state. Traces live in each `Me`."""

    theta: Tensor
    buffers: Params
    optimiser: OptimiserState


def acts(c: Correction, ctx: Context) -> bool:
    """Whether a correction bends this learn: one that needs something known does not before there is."""
    return not (c.needs_history and ctx.recalled is None)


class Step:
    """One learn's step over parameters theta [n]: forward all parts, one row an objective, aggregate, add penalties, update.

    g = A(rows) + grad(penalties);  theta' = theta + U(g).  Masked entries are restored after the optimiser, those without
    any gradient do not move.
    """

    def __init__(
        self,
        model: Model,
        frame: LabelFrame,
        training: Training,
        aggregator: Aggregator | None,
        corrections: Sequence[tuple[Correction, Context]],
        layout: Layout,
        fixed: Params,
        carry: Carry,
        start: Tensor,
        horizon: tuple[int, int],
    ) -> None:
        self.model, self.frame, self.training, self.aggregator = model, frame, training, aggregator
        self.layout, self.fixed, self.carry, self.start, self.horizon = layout, fixed, carry, start, horizon
        self.optimiser: Optimiser = training.inner()
        self.by_verb = {
            verb: [
                (c, ctx) for c, ctx in corrections if overrides(c, verb) and (verb == "trace" or acts(c, ctx))
            ]
            for verb in ("sample", "view", "losses", "rows", "penalty", "mask", "trace")
        }
        self.alone = {c.name for c, _ in corrections if c.adds_constraints}
        self.closed_form = {c.name for c, _ in self.by_verb["penalty"] if knows_gradient(c)}
        for c, ctx in self.by_verb["trace"]:
            ctx.trace = c.trace_init(carry.theta)
        self.factors = training.factors(layout)
        self.shared = torch.ones(layout.size, dtype=torch.bool, device=layout.device)
        for name in layout.names:
            if model.task_of(name) is not None:
                self.shared[layout.span(name)] = False
        self.all_shared = bool(self.shared.all())
        self._columns: dict[str, Tensor] = {}
        self.bound: Forward | None = None
        self.start_buffers = {n: b.clone() for n, b in carry.buffers.items()}
        self.absent: list[str] = []
        self._before: Forward | None = None

    @cached_property
    def leaves(self) -> Params:
        """The trainable entries, over the very memory of theta."""
        return {n: v.detach().requires_grad_() for n, v in self.layout.split(self.carry.theta).items()}

    def columns(self, task: str) -> Tensor:
        """The output columns [C] that are a task's."""
        if task not in self._columns:
            keep = torch.zeros(self.model.outputs, dtype=torch.bool, device=self.layout.device)
            keep[list(self.frame.tasks[task])] = True
            self._columns[task] = keep
        return self._columns[task]

    def _autocast(self) -> AbstractContextManager[object]:
        if self.training.precision == "bf16":
            return torch.autocast(self.layout.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def before(self, x: Tensor, task: str | None) -> Tensor:
        """The outputs [B, C] of the model as it was when this learn began, without gradient."""
        if self._before is None:
            params = {**self.fixed, **self.layout.split(self.start)}
            model = Viewed.of(self.model, self.by_verb["view"])
            self._before, _ = model.bind(params, self.start_buffers, False)
        with torch.no_grad(), self._autocast():
            return self._before(x, task).to(x.dtype if x.is_floating_point() else self.start.dtype)

    def features(self, x: Tensor, task: str | None, before: bool = False) -> Tensor:
        """The features [B, d] in eval mode; those of the model as it was when this learn began are without gradient."""
        params: Params = {**self.fixed, **(self.layout.split(self.start) if before else self.leaves)}
        model = Viewed.of(self.model, self.by_verb["view"])
        with torch.no_grad() if before else nullcontext(), self._autocast():
            buffers = self.start_buffers if before else self.carry.buffers
            return model.features(params, buffers, x, task).to(self.layout.dtype)

    def now(self, x: Tensor, task: str | None) -> Tensor:
        """The outputs [B, C] of the model as it is, in eval mode."""
        params = {**self.fixed, **self.layout.split(self.carry.theta)}
        return Viewed.of(self.model, self.by_verb["view"])(params, self.carry.buffers, x, task, False)[0]

    def forward(self, x: Tensor, task: str | None) -> Tensor:
        """The outputs [B, C] in training mode."""
        if not self.by_verb["view"]:
            if self.bound is None:
                self.bound, self.carry.buffers = self.model.bind(
                    {**self.fixed, **self.leaves}, self.carry.buffers, True
                )
            return self.bound(x, task)
        return self.seen(x, task)

    def seen(self, x: Tensor, task: str | None) -> Tensor:
        """The outputs [B, C] in training mode, through the views."""
        params: Params = {**self.fixed, **self.leaves}
        for c, ctx in self.by_verb["view"]:
            params = c.view(params, task, ctx)
        out, self.carry.buffers = self.model(params, self.carry.buffers, x, task, True)
        return out

    def forward_all(self, parts: list[Batch]) -> list[Tensor]:
        """The outputs of every part; parts that the model treats alike go through it together.

        Those of a constraint go alone: its gradient is a pass of its own, and should be one through its own samples only.
        """
        if len(parts) == 1:
            return [self.forward(parts[0].x, parts[0].task)]
        apart = self.model.uses_task or bool(self.by_verb["view"])
        groups: dict[tuple[str | None, int], list[int]] = {}
        for i, p in enumerate(parts):
            groups.setdefault((p.task if apart else None, i if p.drawn_by in self.alone else -1), []).append(
                i
            )
        outs: list[Tensor] = [parts[0].x] * len(parts)
        for (task, _), members in groups.items():
            if len(members) == 1:
                outs[members[0]] = self.forward(parts[members[0]].x, task)
                continue
            out = self.forward(torch.cat([parts[i].x for i in members]), task)
            for i, o in zip(members, out.split([len(parts[i].x) for i in members]), strict=True):
                outs[i] = o
        return outs

    def gradient(self, loss: Tensor, keep: bool) -> tuple[Tensor, list[str]]:
        """The flat gradient [n] of a scalar, and the names of the entries that it does not reach."""
        if not loss.requires_grad:  # such as what an earlier task answers through its own mask
            return torch.zeros(self.layout.size, dtype=self.layout.dtype, device=self.layout.device), list(
                self.layout.names
            )
        inputs = [self.leaves[n] for n in self.layout.names]
        grads = torch.autograd.grad(loss, inputs, retain_graph=keep, allow_unused=True)
        absent = [n for n, g in zip(self.layout.names, grads, strict=True) if g is None]
        flat = torch.cat(
            [
                torch.zeros_like(p).view(-1) if g is None else g.reshape(-1)
                for g, p in zip(grads, inputs, strict=True)
            ]
        )
        return flat, absent

    def __call__(self, parts: list[Batch], clock: tuple[int, int], generator: torch.Generator | None) -> None:
        """One step: `carry` and the traces move on."""
        carry = self.carry
        see = self.look(parts, carry.theta, clock, *self.outputs(parts, clock))
        objectives, weights, constraints = self.objectives(see)
        factor = self._mask_of(see)
        grad, self.absent = self._aggregate(objectives, weights, constraints, factor, generator)
        trained = grad
        if self.by_verb["penalty"]:
            trained = self._penalised(grad, see)
        lr = self.training.rate(clock, self.horizon)
        direction, state = self.optimiser.update(trained, carry.optimiser, carry.theta)
        if self.absent:
            direction = self._hold(direction, state, carry.optimiser, self.absent)
        if factor is not None:
            direction = direction.masked_fill(factor == 0, 0)
        if self.factors is not None:
            direction = direction * self.factors
        carry.optimiser = state
        for c, ctx in self.by_verb["trace"]:
            ctx.trace = c.trace(see, ctx, grad, direction * -lr)
        carry.theta.add_(direction, alpha=-lr)

    def outputs(self, parts: list[Batch], clock: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
        """The model's outputs of all parts, before and after `outputs` verbs and task masks."""
        for _, ctx in self.by_verb["view"]:
            ctx.clock, ctx.horizon = clock, self.horizon
        with self._autocast():
            raw = self.forward_all(parts)
        if self.training.precision == "bf16":
            raw = [o.to(self.layout.dtype) for o in raw]
        outs = []
        for o, p in zip(raw, parts, strict=True):
            if p.task is not None and self.frame.kind == "class" and p.task in self.frame.tasks:
                o = o.masked_fill(~self.columns(p.task), -torch.inf)
            outs.append(o)
        return raw, outs

    def look(
        self, parts: list[Batch], theta: Tensor, clock: tuple[int, int], raw: list[Tensor], outs: list[Tensor]
    ) -> StepView:
        """What the verbs of a step see."""

        def answer(part: int, task: str | None) -> Tensor:
            if task == parts[part].task or not (self.model.uses_task or self.by_verb["view"]):
                return raw[part]
            with self._autocast():
                return self.forward(parts[part].x, task).to(self.layout.dtype)

        return StepView(
            theta,
            self.start,
            self.layout,
            parts,
            raw,
            outs,
            self.before,
            clock,
            self.horizon,
            answer,
            lambda i: self.features(parts[i].x, parts[i].task),
            lambda x, task: self.features(x, task, True),
        )

    def objectives(self, see: StepView) -> tuple[list[Tensor], list[float], list[Tensor]]:
        """The objectives of a step with their weights, and its constraints."""
        share = 1 / max(1, sum(p.weight is None for p in see.parts))
        losses = self._losses(see, self.frame.kind)
        kept = [(o, share if p.weight is None else p.weight) for o, p in zip(losses, see.parts, strict=True)]
        objectives, weights = [o for o, w in kept if w], [w for _, w in kept if w]
        constraints: list[Tensor] = []
        for c, ctx in self.by_verb["rows"]:
            for row in c.rows(see, ctx):
                if row.kind == "constraint":
                    constraints.append(row.loss)
                else:
                    objectives.append(row.loss)
                    weights.append(row.weight)
        return objectives, weights, constraints

    def penalty_gradients(
        self, see: StepView
    ) -> tuple[list[tuple[Tensor, float]], list[tuple[Correction, Context]]]:
        """The gradients of the penalties that say them, as vectors [n] with factors; and who leaves its own to autograd."""
        said = [
            (c, ctx, c.penalty_gradient(see, ctx) if c.name in self.closed_form else None)
            for c, ctx in self.by_verb["penalty"]
        ]
        return [penalty_gradient for *_, penalty_gradient in said if penalty_gradient is not None], [
            (c, ctx) for c, ctx, penalty_gradient in said if penalty_gradient is None
        ]

    @staticmethod
    def penalty(see: StepView, penalties: Sequence[tuple[Correction, Context]]) -> Tensor:
        """The sum of penalties: a function of `see.theta`."""
        return sum((c.penalty(see, ctx) for c, ctx in penalties), start=see.theta.new_zeros(()))

    def _penalised(self, grad: Tensor, see: StepView) -> Tensor:
        """grad + the gradient of the penalties; grad itself stays where somebody traces it."""
        known, left = self.penalty_gradients(see)
        own = not self.by_verb["trace"]
        if left:
            leaf = see.theta.detach().requires_grad_()
            grad, own = (
                grad + torch.autograd.grad(self.penalty(replace(see, theta=leaf), left), leaf)[0],
                True,
            )
        for vector, factor in known:
            grad, own = (
                (grad.add_(vector, alpha=factor) if own else torch.add(grad, vector, alpha=factor)),
                True,
            )
        return grad

    def _losses(self, see: StepView, kind: str) -> list[Tensor]:
        if not self.by_verb["losses"]:
            return [mean_loss(o, p, kind) for o, p in zip(see.outputs, see.parts, strict=True)]
        each = {
            i: sample_losses(o, p.y, kind)
            for i, (o, p) in enumerate(zip(see.outputs, see.parts, strict=True))
        }
        for c, ctx in self.by_verb["losses"]:
            each = c.losses(each, see, ctx)
        return [p.mean(each[i]) for i, p in enumerate(see.parts)]

    def _mask_of(self, see: StepView) -> Tensor | None:
        factor: Tensor | None = None
        for c, ctx in self.by_verb["mask"]:
            m = c.mask(see, ctx)
            factor = m if factor is None else factor * m
        return factor

    def _aggregate(
        self,
        objectives: list[Tensor],
        weights: list[float],
        constraints: list[Tensor],
        factor: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, list[str]]:
        a = self.aggregator
        if a is None or len(objectives) == 1 or (isinstance(a, Linear) and not a.needs_gram):
            w = weights
            if isinstance(a, Linear) and len(objectives) > 1:
                w = a.weigh(torch.zeros(0, 0), torch.tensor(weights, dtype=torch.float64), None).tolist()
            total = objectives[0] if w[0] == 1 else objectives[0] * w[0]
            for o, c in zip(objectives[1:], w[1:], strict=True):
                total = total + o * c
            grad, absent = self.gradient(total, keep=bool(constraints))
            grad = grad if factor is None else grad * factor
        else:
            last = len(objectives) - 1
            pairs = [self.gradient(o, keep=i < last or bool(constraints)) for i, o in enumerate(objectives)]
            rows = torch.stack([g for g, _ in pairs])
            rows = rows if factor is None else rows * factor
            absent = [n for n in pairs[0][1] if all(n in missing for _, missing in pairs)]
            if self.all_shared:
                grad = a(rows, weights, generator)
            else:
                grad = torch.tensor(weights, dtype=rows.dtype, device=rows.device) @ rows
                grad[self.shared] = a(rows[:, self.shared], weights, generator)
        if constraints:
            if not isinstance(a, Cone):
                raise Refusal(
                    f"constraint rows need an aggregator that honours them (a cone). Found {type(a).__name__}."
                )
            each = [self.gradient(c, keep=i < len(constraints) - 1)[0] for i, c in enumerate(constraints)]
            rows = torch.stack(each) if len(each) > 1 else each[0][None]
            grad = a.project(grad, rows if factor is None else rows * factor)
        return grad, absent

    def _hold(
        self, direction: Tensor, state: OptimiserState, old: Mapping[str, Tensor], absent: list[str]
    ) -> Tensor:
        """No gradient means no update: those entries stay, and so does what the optimiser keeps of them."""
        held = direction.clone()
        for name in absent:
            span = self.layout.span(name)
            held[span] = 0
            for k, v in state.items():
                if v.shape == held.shape and k in old:
                    v[span] = old[k][span]
        return held
