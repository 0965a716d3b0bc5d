"""The step of one agent as a pure function of tensors, from which a program for many agents is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.contexts import Context, StepView
from consilience.core.correction import Correction
from consilience.core.params import Params
from consilience.core.source import PLAIN
from consilience.core.tree import Input
from consilience.core.viewed import Viewed
from consilience.engines._merge import Ragged, Slot, Unbatchable, fill, fill_parts
from consilience.loop.step import Carry, Step, clip_factor, own_count


class StateKey(NamedTuple):
    """The name of one tensor of the state of a stack.

    `kind` is "leaf" or "buffer" (`name` is that of the entry), "optimiser" (`name` of its state, with the
    `entry` if it has one value per parameter), or "trace" (`name` of the correction, `entry` of its trace).
    """

    kind: str
    name: str
    entry: str = ""


@dataclass(frozen=True)
class Constants:
    """What does not change during the visits of a stack; tensors are slots."""

    corrections: dict[str, tuple[Any, dict[str, Any]]]
    """By name: the merged correction, and the merged fields of its context."""
    fixed: dict[str, Slot]
    start: Slot | None
    """The parameters with which the visits began; None where no verb reads them."""
    buffers: dict[str, Slot]
    """The buffers with which they began; none where no verb reads them."""
    derived: dict[str, Slot]
    """The buffers that no step changes."""


@dataclass(frozen=True)
class Clock:
    """The time of a step: `now` is (epoch, step in the epoch), `horizon` is (epochs, steps per epoch)."""

    now: tuple[Any, Any]
    horizon: tuple[Any, Any]
    rate: Any
    """The learning rate: a number, or a tensor in double precision where it varies."""


class CrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of a batch, where padding has weight 0 in `w`.

    The gradient softmax(out) - onehot(y) is computed in the forward pass, which keeps the traced graph short.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
        logs, target = out.log_softmax(1), y.unsqueeze(1)
        share = out.new_full((len(out),), 1 / len(out)) if w is None else w / w.sum()
        minus_one = out.new_full((len(out), 1), -1.0)
        loss = -(logs.gather(1, target).squeeze(1) * share).sum()
        return loss, out.softmax(1).scatter_add(1, target, minus_one) * share.unsqueeze(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad, None, None


class PureStep(Step):
    """The step of one agent whose parameters, contexts and buffers are given from outside at each call."""

    def __init__(
        self,
        step: Step,
        corrections: Mapping[str, tuple[Correction, Context]],
        start: Tensor,
        buffers: Params,
    ) -> None:
        # Attributes of the original that cache tensors of one agent stay behind.
        cached = ("leaves", "bound", "_before")
        self.__dict__.update({name: value for name, value in step.__dict__.items() if name not in cached})
        self.by_verb = {
            verb: [corrections.get(correction.name, (correction, ctx)) for correction, ctx in pairs]
            for verb, pairs in step.by_verb.items()
        }
        self.start, self.start_buffers = start, buffers

    # The model is never bound to parameters, since these are arguments of the program.
    def forward_each(self, x: Input, tasks: tuple[str | None, ...]) -> list[Tensor]:
        if self.by_verb["view"]:
            return super().forward_each(x, tasks)
        params, buffers = {**self.fixed, **self.leaves}, self.carry.buffers
        found, self.carry.buffers = self.model.each(params, buffers, x, tasks, True)
        return found

    def part_losses(self, see: StepView) -> list[Tensor]:
        plain = all(target.loss == PLAIN and target.complete for target in see.targets)
        if self.by_verb["losses"] or not plain or any(part.y.dim() > 1 for part in see.parts):
            return super().part_losses(see)
        apply: Any = CrossEntropy.apply
        return [apply(out, part.y, part.w)[0] for out, part in zip(see.outputs, see.parts, strict=True)]

    def before(self, x: Input, task: str | None) -> Tensor:
        # Not bound once, as in `Step`: here the start is an argument of the program.
        params = {**self.fixed, **self.layout.split(self.start)}
        model = Viewed.of(self.model, self.by_verb["view"])
        with torch.no_grad(), self.autocast():
            out = model(params, self.start_buffers, x, task, False)[0]
            return out.to(x.dtype if x.is_floating_point() else self.start.dtype)


class Outputs(NamedTuple):
    """The outputs of the model per part, before and after task masks."""

    raw: list[Tensor]
    masked: list[Tensor]


@dataclass(eq=False)
class Inputs:
    """The tensors of one call, sorted by what they are."""

    state: dict[StateKey, Tensor]
    leaves: Params
    buffers: Params
    optimiser: dict[str, Tensor]
    """The optimiser's state that has one value per agent, such as a count of steps."""
    parts: list[Batch]
    clock: Clock
    pure: PureStep


@dataclass(frozen=True, eq=False)
class AgentStep:
    """The step of one agent: (state, constants, data) -> new state, each a list of tensors.

    g = clip(grad(weighted objectives) * mask + grad(penalties));  theta' = theta - lr U(g), entry by entry.
    """

    step: Step
    keys: tuple[StateKey, ...]
    """Names of the first arguments, which are the state."""
    vectors: tuple[str, ...]
    """The optimiser's state that has one value per parameter, such as a momentum."""
    constants: Constants
    parts: list[Batch]
    clock: Clock
    rate_factors: Params | None
    """Factors of the learning rate per entry."""
    decays: Params | None
    """Weight decay per entry, where the optimiser has none."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take one step."""
        inputs = self.bind(tensors)
        grads, buffers, outputs = self.differentiate(inputs)
        masks = self.mask(inputs, outputs)
        if masks is not None:
            grads = {name: grad * masks[name] for name, grad in grads.items()}
        penalised = self.clip(self.add_penalties(inputs, outputs, grads), masks)

        new = {StateKey("buffer", name): buffer for name, buffer in buffers.items()}
        directions: Params = {}
        # Entry by entry, since the optimiser treats every number alike: a joined vector would be a copy.
        for name in self.step.layout.names:
            directions[name] = self.update(inputs, name, penalised[name], masks, new)
            new[StateKey("leaf", name)] = self.moved(inputs, name, directions[name])
        self.trace(inputs, outputs, grads, directions, new)
        return tuple(new.get(key, inputs.state[key]) for key in self.keys)

    def bind(self, tensors: Sequence[Tensor]) -> Inputs:
        """Sort the arguments by what they are, and build the step that reads them."""
        step, constants, device = self.step, self.constants, self.step.layout.device
        state = dict(zip(self.keys, tensors, strict=False))
        rest = tensors[len(self.keys) :]
        start = fill(constants.start, rest)
        clock = fill(self.clock, rest)

        contexts: dict[str, tuple[Correction, Context]] = {}
        for name, (correction, fields) in constants.corrections.items():
            trace = {
                key.entry: tensor for key, tensor in state.items() if key.kind == "trace" and key.name == name
            }
            ctx = Context(
                **fill(fields, rest), trace=trace, model=step.model, layout=step.layout, start=start
            )
            # A program serves sources of any name and size.
            ctx.parts, ctx.sizes = Ragged(), Ragged()  # type: ignore[assignment]
            contexts[name] = (fill(correction, rest), ctx)

        # Without verbs that read the start, an empty vector stands in its place.
        start = start if start is not None else torch.empty(0, device=device)
        pure = PureStep(step, contexts, start, fill(constants.buffers, rest))
        pure.fixed, pure.horizon = fill(constants.fixed, rest), clock.horizon
        return Inputs(
            state,
            {key.name: tensor for key, tensor in state.items() if key.kind == "leaf"},
            {
                **fill(constants.derived, rest),
                **{key.name: tensor for key, tensor in state.items() if key.kind == "buffer"},
            },
            {key.name: tensor for key, tensor in state.items() if key.kind == "optimiser" and not key.entry},
            fill_parts(self.parts, rest),
            clock,
            pure,
        )

    def view(self, inputs: Inputs, leaves: Params, outputs: Outputs | None = None) -> StepView:
        """Build what the verbs see at these parameters; without `outputs`, the model is called."""
        pure, by_verb = inputs.pure, self.step.by_verb
        # To join all entries costs a copy of them, so it is left out where no verb may read theta.
        read = any(by_verb[verb] for verb in ("losses", "rows", "penalty", "mask", "trace"))
        theta = self.flat(leaves) if read else torch.empty(0, device=self.step.layout.device)
        pure.leaves = leaves
        pure.carry = Carry(theta, dict(inputs.buffers), inputs.optimiser)
        raw, masked = outputs or pure.outputs(inputs.parts, inputs.clock.now)
        return pure.look(inputs.parts, theta, inputs.clock.now, raw, masked)

    def flat(self, entries: Mapping[str, Tensor]) -> Tensor:
        """Join entries to one vector [n]."""
        return torch.cat([entries[name].reshape(-1) for name in self.step.layout.names])

    def differentiate(self, inputs: Inputs) -> tuple[Params, Params, Outputs]:
        """Compute the gradient of the objectives per entry, the new buffers, and the outputs of the model."""
        pure = inputs.pure

        def total(leaves: Params) -> tuple[Tensor, tuple[Params, Outputs]]:
            see = self.view(inputs, leaves)
            objectives, weights, constraints, *_ = pure.objectives(see)
            if constraints or (len(objectives) > 1 and pure.aggregator is not None):
                raise Unbatchable("an aggregator combines the objectives of a step")
            if len(see.parts) > 1 and not all(target.complete for target in see.targets):
                raise Unbatchable("a task may have no target in a step")
            if pure.reads_norms:
                raise Unbatchable("a correction reads the gradient of each objective")
            weighted = zip(objectives[1:], weights[1:], strict=True)
            # From the left, as the serial step adds them: another order would round otherwise.
            value = sum((loss * weight for loss, weight in weighted), start=objectives[0] * weights[0])
            return value, (pure.carry.buffers, Outputs(see.raw, see.outputs))

        grads, (buffers, outputs) = torch.func.grad(total, has_aux=True)(inputs.leaves)
        return grads, buffers, outputs

    def mask(self, inputs: Inputs, outputs: Outputs) -> Params | None:
        """Multiply the masks of all corrections, per entry."""
        masks = [
            correction.mask(self.view(inputs, inputs.leaves, outputs), ctx)
            for correction, ctx in inputs.pure.by_verb["mask"]
        ]
        return self.step.layout.split(torch.stack(masks).prod(0)) if masks else None

    def add_penalties(self, inputs: Inputs, outputs: Outputs, grads: Params) -> Params:
        """Add the gradients of the penalties: in closed form where they are known, else by autograd."""
        pure = inputs.pure
        if not pure.by_verb["penalty"]:
            return grads
        known, left = pure.penalty_gradients(self.view(inputs, inputs.leaves, outputs))
        added = [self.step.layout.split(vector * factor) for vector, factor in known]
        if left:

            def penalty(leaves: Params) -> Tensor:
                return pure.penalty(self.view(inputs, leaves, outputs), left)

            added.append(torch.func.grad(penalty)(inputs.leaves))
        return {name: sum((more[name] for more in added), start=grad) for name, grad in grads.items()}

    def clip(self, grads: Params, masks: Params | None) -> Params:
        """Bring the gradient within the limits of `Training`."""
        training = self.step.training
        if training.clip_value is not None:
            most = training.clip_value
            return {name: grad.clamp(-most, most) for name, grad in grads.items()}
        if training.clip_norm is None:
            return grads

        # Only what can move counts, as in the serial step.
        counted = {name: grad for name, grad in grads.items() if name not in self.step.absent}
        if masks is not None:
            counted = {name: grad.masked_fill(masks[name] == 0, 0) for name, grad in counted.items()}
        squares = [grad.square().sum() for grad in counted.values()]
        factor = clip_factor(torch.stack(squares).sum().sqrt(), training.clip_norm)
        return {name: grad * factor for name, grad in grads.items()}

    def update(
        self,
        inputs: Inputs,
        name: str,
        grad: Tensor,
        masks: Params | None,
        new: dict[StateKey, Tensor],
    ) -> Tensor:
        """Compute the optimiser's direction for one entry, and put its new state into `new`."""
        step, absent = self.step, name in self.step.absent
        counts = {key: count for key, count in inputs.optimiser.items() if "/" not in key}
        own = {key: own_count(key, name) for key in counts if own_count(key, name) in inputs.optimiser}
        vectors = {key: inputs.state[StateKey("optimiser", key, name)] for key in self.vectors}
        old = {**counts, **vectors, **{key: inputs.optimiser[place] for key, place in own.items()}}
        leaf = inputs.leaves[name]
        decay = None if self.decays is None else self.decays[name] * leaf
        if decay is not None and not step.training.decoupled:
            grad = grad + decay
        direction, moved = step.optimiser.update(grad, old, leaf)
        if decay is not None and step.training.decoupled:
            direction = direction + decay
        for key, tensor in moved.items():
            place = StateKey("optimiser", key, name) if key in vectors else None
            new[place or StateKey("optimiser", own.get(key, key))] = old[key] if absent else tensor

        # No gradient means no update, not even that of a momentum or a weight decay.
        if absent:
            direction = torch.zeros_like(direction)
        if masks is not None:
            direction = direction.masked_fill(masks[name] == 0, 0)
        return direction if self.rate_factors is None else direction * self.rate_factors[name]

    def moved(self, inputs: Inputs, name: str, direction: Tensor) -> Tensor:
        """Move one entry: theta - lr direction."""
        leaf, rate = inputs.leaves[name], inputs.clock.rate
        if not isinstance(rate, Tensor):
            return torch.add(leaf, direction, alpha=-rate)
        # A tensor cannot be `alpha`, and its type may be wider than the entry's.
        step: Tensor = rate * direction
        return leaf - step.to(leaf.dtype)

    def trace(
        self,
        inputs: Inputs,
        outputs: Outputs,
        grads: Params,
        directions: Params,
        new: dict[StateKey, Tensor],
    ) -> None:
        """Put the new traces of the corrections into `new`."""
        tracing = inputs.pure.by_verb["trace"]
        if not tracing:
            return
        # Traces see the parameters before the step, and the gradient before penalties.
        see = self.view(inputs, inputs.leaves, outputs)
        grad = self.flat(grads)
        delta = (self.flat(directions) * -inputs.clock.rate).to(grad.dtype)
        for correction, ctx in tracing:
            for entry, tensor in correction.trace(see, ctx, grad, delta).items():
                new[StateKey("trace", correction.name, entry)] = tensor
