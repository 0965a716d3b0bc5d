"""The batched engine: learns that are alike, stacked on a leading dimension, one program a step for all of them."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.contexts import Context, StepView
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError, Interrupted
from consilience.core.message import Item
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Examples, Source, Tensors
from consilience.core.viewed import Viewed
from consilience.engines._graph import tidy
from consilience.engines._serial import Serial
from consilience.loop.agent import Job
from consilience.loop.engine import Engine, EngineEvents, Paused, Visit
from consilience.loop.step import Carry, Step

LONG = 300
"""Steps after which a program on a GPU is compiled, where that is left to the engine: on a CPU the tidied graph is as fast."""
SMALL = 4_000_000
"""Trainable numbers of a model up to which `auto` stacks: larger steps keep a processor busy alone."""
EARNED = 400
"""Steps of a kind after which `auto` makes a program for them: to trace one costs as much."""
WINDOW = 1 << 24
"""Bytes of examples that are gathered at once for the steps to come."""
SHARE = 0.4
"""Of the memory that is free, what stacked learns may take."""


class Unbatchable(Exception):
    """Why learns cannot be stacked: they are run one after another."""


class Ragged:
    """Stands for what differs between stacked learns in more than the numbers of its tensors: whoever reads it ends the stacking."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Unbatchable("something that a step reads differs between agents")

    __getattr__ = __getitem__ = __iter__ = __bool__ = __len__ = __call__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __eq__ = __lt__ = __gt__ = _refuse


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among the arguments of a program."""

    index: int


@dataclass
class Slots:
    """The tensor arguments of a program: stacked on dimension 0 (`dims` 0), or common to all (None)."""

    tensors: list[Tensor] = field(default_factory=list)
    dims: list[int | None] = field(default_factory=list)

    def add(self, tensors: Sequence[Tensor], stack: bool = False) -> Slot:
        """One argument of as many tensors as are stacked; those that are equal are common unless `stack`."""
        first = tensors[0]
        if not stack and all(t is first or torch.equal(t, first) for t in tensors[1:]):
            return self.put(first, None)
        return self.put(torch.stack(list(tensors)), 0)

    def put(self, tensor: Tensor, dim: int | None) -> Slot:
        self.tensors.append(tensor)
        self.dims.append(dim)
        return Slot(len(self.tensors) - 1)


def merge(values: Sequence[Any], slots: Slots, stack: bool = False) -> Any:
    """One value in the place of several: tensors of one shape become slots, equal values stay, numbers that differ are stacked.

    >>> slots = Slots()
    >>> merge([{"a": torch.ones(2), "b": 1}, {"a": torch.zeros(2), "b": 1}], slots), slots.tensors[0].tolist()
    ({'a': Slot(index=0), 'b': 1}, [[1.0, 1.0], [0.0, 0.0]])
    """
    first = values[0]
    if any(type(v) is not type(first) for v in values):
        return Ragged()
    if isinstance(first, Tensor):
        alike = all(
            v.shape == first.shape and v.dtype == first.dtype and v.device == first.device for v in values
        )
        return slots.add(values, stack) if alike else Ragged()
    if isinstance(first, float) and any(v != first for v in values):
        return slots.put(torch.tensor(values, dtype=torch.float64), 0)
    if isinstance(first, Source | Examples | Model):
        return first if all(v is first for v in values) else Ragged()
    if isinstance(first, Mapping):
        if any(v.keys() != first.keys() for v in values):
            return Ragged()
        return {k: merge([v[k] for v in values], slots, stack) for k in first}
    if isinstance(first, list | tuple):
        if any(len(v) != len(first) for v in values):
            return Ragged()
        made = [merge(list(vs), slots, stack) for vs in zip(*values, strict=True)]
        return made if isinstance(first, list) else tuple(made)
    if isinstance(
        first, Item
    ):  # facts such as a round's number change from learn to learn: a step that reads them is not stacked
        return rebuilt(first, {"tensors": merge([v.tensors for v in values], slots, stack), "meta": Ragged()})
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        made_of = {
            f.name: merge([getattr(v, f.name) for v in values], slots, stack)
            for f in dataclasses.fields(first)
        }
        return rebuilt(first, made_of)
    return first if all(v is first or v == first for v in values) else Ragged()


def rebuilt(value: Any, fields: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with other fields, not checked again."""
    other = copy.copy(value)
    for k, v in fields.items():
        object.__setattr__(other, k, v)
    return other


def fill(value: Any, tensors: Sequence[Tensor]) -> Any:
    """A merged value with tensors in its slots."""
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {k: fill(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(fill(v, tensors) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Source | Examples | Ragged):
        return rebuilt(
            value, {f.name: fill(getattr(value, f.name), tensors) for f in dataclasses.fields(value)}
        )
    return value


def shape_of(value: Any) -> object:
    """What a program takes for granted of a merged value: all but the numbers in its tensors."""
    if isinstance(value, Ragged):
        return "ragged"
    if isinstance(value, dict):
        return tuple((k, shape_of(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(shape_of, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Source | Examples | Slot):
        return (type(value), *[shape_of(getattr(value, f.name)) for f in dataclasses.fields(value)])
    return (
        repr(value) if isinstance(value, Slot | float | int | str | bool | None) else (type(value), id(value))
    )


class CrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of a batch, weighted by `w` where some samples are padding, with its gradient made on the way: a short graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
        logs, at = out.log_softmax(1), y.unsqueeze(1)
        share = out.new_full((len(out),), 1 / len(out)) if w is None else w / w.sum()
        less = out.new_full((len(out), 1), -1.0)
        return -(logs.gather(1, at).squeeze(1) * share).sum(), out.softmax(1).scatter_add(
            1, at, less
        ) * share.unsqueeze(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, out: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * out, None, None


class Pure(Step):
    """A step of one agent as a function of tensors: what a program is traced from."""

    def __init__(
        self,
        step: Step,
        corrections: Mapping[str, tuple[Correction, Context]],
        start: Tensor,
        buffers: Params,
    ) -> None:
        self.__dict__.update(
            {k: v for k, v in step.__dict__.items() if k not in ("leaves", "bound", "_before")}
        )
        self.by_verb = {
            verb: [corrections.get(c.name, (c, ctx)) for c, ctx in pairs]
            for verb, pairs in step.by_verb.items()
        }
        self.start, self.start_buffers = start, buffers

    def forward(self, x: Tensor, task: str | None) -> Tensor:
        return self.seen(x, task)

    def _losses(self, see: StepView, kind: str) -> list[Tensor]:
        if self.by_verb["losses"] or kind != "class":
            return super()._losses(see, kind)
        return [CrossEntropy.apply(o, p.y, p.w)[0] for o, p in zip(see.outputs, see.parts, strict=True)]  # type: ignore[no-untyped-call]

    def before(self, x: Tensor, task: str | None) -> Tensor:
        params = {**self.fixed, **self.layout.split(self.start)}
        with torch.no_grad(), self._autocast():
            out = Viewed.of(self.model, self.by_verb["view"])(params, self.start_buffers, x, task, False)[0]
            return out.to(x.dtype if x.is_floating_point() else self.start.dtype)


class Stack:
    """Jobs that learn alike, stacked: state [K, ..] by entry, moved on by programs, given back to the jobs at their end."""

    def __init__(self, jobs: Sequence[Job], engine: Batched, watch: EngineEvents) -> None:
        self.jobs, self.engine, self.watch = list(jobs), engine, watch
        self.rows: list[Job | None] = list(jobs)
        first = jobs[0]
        self.step, self.layout, self.training = first.step, first.layout, first.training
        self.inside = any(
            self.step.by_verb[v] for v in ("view", "losses", "rows", "penalty", "mask", "trace")
        )
        self.timed = self.inside or self.training.lr_schedule != "constant"
        self.needs_flat = any(self.step.by_verb[v] for v in ("losses", "rows", "penalty", "mask", "trace"))
        split = [j.layout.split(j.carry.theta) for j in jobs]
        state: dict[tuple[str, ...], Tensor] = {
            ("leaf", n): torch.stack([s[n] for s in split]) for n in self.layout.names
        }
        for n in first.carry.buffers:
            state["buffer", n] = torch.stack([j.carry.buffers[n] for j in jobs])
        self.vectors = [k for k, t in first.carry.optimiser.items() if t.shape == first.carry.theta.shape]
        for k in first.carry.optimiser:
            whole = torch.stack([j.carry.optimiser[k] for j in jobs])
            if k in self.vectors:
                for n, t in self._by_entry(whole).items():
                    state["optimiser", k, n] = t
            else:
                state["optimiser", k] = whole
        for c, ctx in self.step.by_verb["trace"]:
            for k in ctx.trace:
                state["trace", c.name, k] = torch.stack([self._me(j, c).trace[k] for j in jobs])
        self.state = state
        self.programs: dict[object, Program | None] = {}
        self.kind = (alike(first), repr(self.step.frame), repr(self.step.aggregator))
        self._constants()

    def _by_entry(self, whole: Tensor) -> Params:
        return {
            n: whole[:, self.layout.span(n)].reshape(-1, *s)
            for n, s in zip(self.layout.names, self.layout.shapes, strict=True)
        }

    @staticmethod
    def _me(job: Job, c: Correction) -> Context:
        return next(ctx for d, ctx in job.corrections if d.name == c.name)

    def _constants(self) -> None:
        """What does not change during the learns: what corrections know, frozen entries, where each began."""
        self.slots, live = Slots(), [j for j in self.rows if j is not None]
        acting = {
            c.name: c for verb, pairs in self.step.by_verb.items() if verb != "sample" for c, _ in pairs
        }
        self.known = {}
        for name, c in acting.items():
            contexts = [self._me(j, c) for j in live]
            own = [next(d for d, _ in j.corrections if d.name == name) for j in live]
            fields = {
                f: merge([getattr(ctx, f) for ctx in contexts], self.slots)
                for f in ("recalled", "private", "flat")
            }
            self.known[name] = (merge(own, self.slots), fields)
        fixed = {n: self.slots.add([j.fixed[n] for j in live]) for n in live[0].fixed}
        start = self.slots.add([j.start for j in live]) if self.inside else None
        buffers = {}
        if self.inside:
            buffers = {
                n: self.slots.add([j.step.start_buffers[n] for j in live]) for n in live[0].step.start_buffers
            }
        self.common = (fixed, start, buffers)
        self.shape = (shape_of(self.known), shape_of(self.common), tuple(self.slots.dims))

    # a step

    def one(self, parts: Any, clock: Any, count: int) -> Callable[..., tuple[Tensor, ...]]:
        """The step of one agent: (its state, constants, data) -> its state."""
        names, layout, step, training = list(self.state), self.layout, self.step, self.training
        absent = set(step.absent)
        factors = None if step.factors is None else layout.split(step.factors)
        device = layout.device

        def flat(entries: Mapping[str, Tensor]) -> Tensor:
            return torch.cat([entries[n].reshape(-1) for n in layout.names])

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            state = dict(zip(names, tensors[:count], strict=True))
            rest = tensors[count:]
            fixed, start, start_buffers = fill(self.common, rest)
            batches, (epoch, index, epochs, most) = fill(parts, rest), fill(clock, rest)
            lr = training.rate((epoch, index), (epochs, most))
            leaves = {k[1]: t for k, t in state.items() if k[0] == "leaf"}
            contexts: dict[str, tuple[Correction, Context]] = {}
            for name, (c, fields) in self.known.items():
                trace = {k[2]: t for k, t in state.items() if k[0] == "trace" and k[1] == name}
                ctx = Context(**fill(fields, rest), trace=trace, model=step.model, layout=layout, start=start)
                contexts[name] = (fill(c, rest), ctx)
            pure = Pure(
                step, contexts, start if start is not None else torch.empty(0, device=device), start_buffers
            )
            pure.fixed, pure.horizon = fixed, (epochs, most)
            buffers = {k[1]: t for k, t in state.items() if k[0] == "buffer"}
            optimiser = {k[1]: t for k, t in state.items() if k[0] == "optimiser" and len(k) == 2}

            def view(leaves: Params, outs: tuple[list[Tensor], list[Tensor]] | None = None) -> StepView:
                theta = flat(leaves) if self.needs_flat else torch.empty(0, device=device)
                pure.leaves = leaves
                pure.carry = Carry(theta, dict(buffers), optimiser)
                return pure.look(
                    batches, theta, (epoch, index), *(outs or pure.outputs(batches, (epoch, index)))
                )

            def total(leaves: Params) -> tuple[Tensor, tuple[Params, tuple[list[Tensor], list[Tensor]]]]:
                see = view(leaves)
                objectives, weights, constraints = pure.objectives(see)
                if constraints or (len(objectives) > 1 and pure.aggregator is not None):
                    raise Unbatchable("an aggregator combines the objectives of a step")
                value = sum(
                    (o * w for o, w in zip(objectives[1:], weights[1:], strict=True)),
                    start=objectives[0] * weights[0],
                )
                return value, (pure.carry.buffers, (see.raw, see.outputs))

            grads, (new_buffers, outs) = torch.func.grad(total, has_aux=True)(leaves)
            masks = [c.mask(view(leaves, outs), ctx) for c, ctx in pure.by_verb["mask"]]
            if masks:
                factor = layout.split(torch.stack(masks).prod(0))
                grads = {n: g * factor[n] for n, g in grads.items()}
            trained = grads
            if pure.by_verb["penalty"]:
                known, left = pure.penalty_gradients(view(leaves, outs))
                penalty_gradients = [layout.split(vector * factor) for vector, factor in known]
                if left:
                    penalty_gradients.append(
                        torch.func.grad(lambda leaves: pure.penalty(view(leaves, outs), left))(leaves)
                    )
                trained = {
                    n: sum((penalty_gradient[n] for penalty_gradient in penalty_gradients), start=g)
                    for n, g in grads.items()
                }
            new: dict[tuple[str, ...], Tensor] = {("buffer", n): b for n, b in new_buffers.items()}
            directions: Params = {}
            for n in layout.names:
                old = {k: state["optimiser", k, n] if k in self.vectors else t for k, t in optimiser.items()}
                old |= {k: state["optimiser", k, n] for k in self.vectors}
                direction, moved = step.optimiser.update(trained[n], old, leaves[n])
                for k, t in moved.items():
                    if k not in self.vectors:
                        new["optimiser", k] = t
                    else:
                        new["optimiser", k, n] = old[k] if n in absent else t
                if n in absent:
                    direction = torch.zeros_like(direction)
                directions[n] = direction.masked_fill(factor[n] == 0, 0) if masks else direction
                if factors is not None:
                    directions[n] = directions[n] * factors[n]
                constant = training.lr_schedule == "constant"
                new["leaf", n] = (
                    torch.add(leaves[n], directions[n], alpha=-lr)
                    if constant
                    else leaves[n] - (lr * directions[n]).to(leaves[n].dtype)
                )
            if pure.by_verb["trace"]:
                see, grad, delta = view(leaves, outs), flat(grads), flat(directions) * -lr
                for c, ctx in pure.by_verb["trace"]:
                    for k, t in c.trace(see, ctx, grad, delta).items():
                        new["trace", c.name, k] = t
            return tuple(new.get(k, state[k]) for k in names)

        return run

    def parts(self, drawn: Sequence[list[Batch]], slots: Slots) -> Any:
        """The parts of all jobs as one, stacked; own parts filled up to their widths with samples of weight 0."""
        made = []
        for i, batches in enumerate(zip(*drawn, strict=True)):
            first = batches[0]
            for b in batches[1:]:
                if (b.task, b.weight, b.drawn_by, b.extra.keys(), b.x.shape[1:]) != (
                    first.task,
                    first.weight,
                    first.drawn_by,
                    first.extra.keys(),
                    first.x.shape[1:],
                ):
                    raise Unbatchable("the parts of a step differ between agents")
            fit = self.padded and not first.drawn_by
            width = self.widths[i] if fit else len(first.y)
            if not fit and any(len(b.y) != width for b in batches):
                raise Unbatchable("parts that a correction draws differ in size between agents")

            def stack(tensors: list[Tensor], width: int = width) -> Slot:
                return slots.put(torch.stack([up_to(t, width) for t in tensors]), 0)

            w: Slot | None = None
            if fit or first.w is not None:
                w = stack(
                    [
                        torch.ones(len(b.y), dtype=self.layout.dtype, device=b.x.device)
                        if b.w is None
                        else b.w
                        for b in batches
                    ]
                )
            same = all(b.source == first.source for b in batches)
            extra = {k: stack([b.extra[k] for b in batches]) for k in first.extra}
            made.append(
                rebuilt(
                    first,
                    {
                        "x": stack([b.x for b in batches]),
                        "y": stack([b.y for b in batches]),
                        "w": w,
                        "extra": extra,
                        "source": first.source if same else "",
                    },
                )
            )
        return made

    def clock(self, moments: Tensor, slots: Slots) -> Any:
        """(epoch, step in the epoch, epochs, steps an epoch) of every job [4, K], where a verb may ask."""
        if not self.timed:
            return (0, 0, 0, 0)
        epoch, index, *span = moments
        return (
            slots.put(epoch, 0),
            slots.put(index, 0),
            *[int(c[0]) if bool((c == c[0]).all()) else slots.put(c, 0) for c in span],
        )

    def advance(self, slots: Slots, parts: Any, clock: Any) -> None:
        """One step of all rows by the program for these shapes."""
        args = [*self.state.values(), *self.slots.tensors, *slots.tensors]
        here = (
            len(self.rows),
            *[(p.task, p.weight, p.drawn_by, p.w is None, *p.extra) for p in parts],
            *[t.shape for t in slots.tensors],
            clock[2:],
        )
        program = self.programs.get(here)
        if program is None:
            dims = [*[0] * len(self.state), *self.slots.dims, *slots.dims]
            shapes = tuple((tuple(t.shape), t.dtype) for t in args)
            where = (
                self.kind,
                self.shape,
                shape_of(parts),
                shape_of(clock[2:]),
                tuple(dims),
                shapes,
                tuple(self.step.absent),
            )
            program = self.programs[here] = self.engine.programs.get(where)
        if program is None:
            n = len(self.state)

            def shifted(value: Any) -> Any:
                return fill(value, [Slot(i + len(self.slots.tensors)) for i in range(len(slots.tensors))])  # type: ignore[misc]

            one = self.one(shifted(parts), shifted(clock), n)
            program = self.programs[here] = self.engine.programs[where] = Program(one, args, dims, n)
            program.about = (self.step.model, self.known, self.common, parts)
        for k, t in zip(self.state, program(args, self.engine.compiled, self.watch.note), strict=True):
            self.state[k] = t

    # the jobs

    def give_back(self, rows: Sequence[int]) -> None:
        """Write the state of these rows into their jobs."""
        for r in rows:
            job = self.rows[r]
            assert job is not None
            carry = job.carry
            torch.cat([self.state["leaf", n][r].reshape(-1) for n in self.layout.names], out=carry.theta)
            for n, b in carry.buffers.items():
                b.copy_(self.state["buffer", n][r])
            for k in carry.optimiser:
                if k in self.vectors:
                    carry.optimiser[k] = torch.cat(
                        [self.state["optimiser", k, n][r].reshape(-1) for n in self.layout.names]
                    )
                else:
                    carry.optimiser[k] = self.state["optimiser", k][r].clone()
            for c, ctx in job.step.by_verb["trace"]:
                ctx.trace = {k: self.state["trace", c.name, k][r].clone() for k in ctx.trace}
            self.rows[r] = None

    def compact(self) -> bool:
        """Leave out rows whose jobs have ended, down to one of a few numbers of rows, each three quarters of the last: each has a program."""
        live = [r for r, j in enumerate(self.rows) if j is not None]
        most = len(self.rows)
        while live and most * 3 // 4 >= len(live):
            most = most * 3 // 4
        if not live or most == len(self.rows):
            return False
        rows = sorted([*live, *[r for r, j in enumerate(self.rows) if j is None][: most - len(live)]])
        index = torch.tensor(rows, device=self.layout.device)
        self.state = {k: t.index_select(0, index) for k, t in self.state.items()}
        self.slots.tensors = [
            t if d is None else t.index_select(0, index)
            for t, d in zip(self.slots.tensors, self.slots.dims, strict=True)
        ]
        self.rows = [self.rows[r] for r in rows]
        return True

    def run(self) -> dict[int, Exception]:
        """Run all jobs to their ends; what stopped some of them, by their place."""
        sizes = [[len(e) for _, e, _ in j.parts] for j in self.jobs]
        batch = self.training.batch_size
        self.widths = [min(batch, max(s[i] for s in sizes)) for i in range(len(sizes[0]))]
        self.padded = any(n % w for s in sizes for n, w in zip(s, self.widths, strict=True))
        if self.padded and self.step.model.has_batch_norm:
            raise Unbatchable(
                "batch norm mixes the samples of a batch, and batches of unequal size would be filled up"
            )
        self.macs: dict[tuple[int, ...], int] = {}
        memory = all(type(e) is Tensors for j in self.jobs for _, e, _ in j.parts)
        if memory and len(self.widths) == 1 and not self.step.by_verb["sample"]:
            self._windows()
            return {}
        return self._drawn()

    def learn_cost(self, job: Job, parts: list[Batch], sizes: tuple[int, ...]) -> None:
        """What a step of these batch sizes costs: taken by a job alone, and taken back; it also shows which entries are not reached."""
        at = (self.kind, self.shape, sizes, job.cost(parts))
        if at not in self.engine.costs:
            kept, ledger = job.save(), self.engine.ledgers[id(job)]
            ledger.charge_work(
                job.agent, job.cost(parts), lambda: job.step(parts, (job.epoch, job.index), None)
            )
            macs = ledger.measured[job.cost(parts)]
            ledger.add(job.agent, "macs", -macs)
            job.load(*kept)
            self.engine.costs[at] = (macs, job.step.absent, self.step.model)
        self.macs[sizes], self.step.absent, _ = self.engine.costs[at]

    def _count(self, job: Job, sizes: tuple[int, ...], times: int = 1) -> None:
        """Put steps of these batch sizes on a job's account."""
        ledger = self.engine.ledgers[id(job)]
        ledger.add(job.agent, "macs", self.macs[sizes] * times)
        ledger.steps += times

    def _drawn(self) -> dict[int, Exception]:
        """Step by step: every job draws its parts."""
        streams = {id(j): j.draw() for j in self.jobs}
        place = {id(j): i for i, j in enumerate(self.jobs)}
        failed: dict[int, Exception] = {}
        while True:
            drawn: list[list[Batch] | None] = []
            for j in self.rows:
                found = None
                if j is not None:
                    try:
                        found = next(streams[id(j)], None)
                    except Exception as e:
                        failed[place[id(j)]] = e
                drawn.append(found[0] if found else None)
            self.give_back([r for r, d in enumerate(drawn) if d is None and self.rows[r] is not None])
            live = [(j, d) for j, d in zip(self.rows, drawn, strict=True) if j is not None and d is not None]
            if not live:
                return failed
            self.compact()
            own, filler, slots = {id(j): d for j, d in live}, live[0], Slots()
            parts = self.parts([own.get(id(j), filler[1]) for j in self.rows], slots)
            clock = [(j or filler[0]).moment for j in self.rows]
            sizes = [tuple([len(p.y) for p in d]) for _, d in live]
            for (j, d), size in zip(live, sizes, strict=True):
                if size not in self.macs:
                    self.learn_cost(j, d, size)
            self.advance(slots, parts, self.clock(torch.tensor(clock, device=self.layout.device).T, slots))
            for (j, _), size in zip(live, sizes, strict=True):
                self._count(j, size)
                j.index += 1

    def _windows(self) -> None:
        """Examples in memory, one part a step: the batches of several steps are gathered at once, into [K, S, B, ..]."""
        device, width = self.layout.device, self.widths[0]
        lines = {id(j): Line.of(j, width) for j in self.jobs}
        done = dict.fromkeys(lines, 0)
        x, y = next(iter(self.jobs[0].parts[0][1].batches([torch.zeros(1, dtype=torch.long)])))
        task, source = self.jobs[0].parts[0][2], self.jobs[0].parts[0][0].name
        blank = Batch(
            x, y, task, source=source if all(j.parts[0][0].name == source for j in self.jobs) else ""
        )
        while True:
            self.give_back(
                [
                    r
                    for r, j in enumerate(self.rows)
                    if j is not None and done[id(j)] == len(lines[id(j)].sizes)
                ]
            )
            self.compact()
            live = [(r, j) for r, j in enumerate(self.rows) if j is not None]
            if not live:
                return
            rows = len(self.rows)
            steps = min(len(lines[id(j)].sizes) - done[id(j)] for _, j in live)
            steps = max(1, min(steps, WINDOW // max(1, rows * width * x.nbytes)))
            xs = self.engine.room((rows, steps, width, *x.shape[1:]), x, len(live) < rows)
            ys = (y.new_zeros if len(live) < rows else y.new_empty)(rows, steps, width, *y.shape[1:])
            counts = torch.full((rows, steps), width, device=device)
            moments = torch.ones(rows, 4, steps, dtype=torch.long, device=device)
            for r, j in live:
                line, at, examples = lines[id(j)], slice(done[id(j)], done[id(j)] + steps), j.parts[0][1]
                assert isinstance(examples, Tensors)
                index = line.index[at].reshape(-1).to(device)
                torch.index_select(examples.x, 0, index, out=xs[r].view(-1, *x.shape[1:]))
                torch.index_select(examples.y, 0, index, out=ys[r].view(-1, *y.shape[1:]))
                if self.padded:
                    counts[r] = torch.tensor(line.sizes[at], device=device)
                if self.timed:
                    moments[r] = torch.tensor(line.moments[at], device=device).T
                for k, size in enumerate(line.sizes[at]):
                    if (size,) not in self.macs:
                        one = next(examples.batches([line.index[at][k, :size]]))
                        self.learn_cost(j, [replace(blank, x=one[0], y=one[1])], (size,))
            ws = None
            if self.padded:
                ws = (torch.arange(width, device=device) < counts[..., None]).to(self.layout.dtype)
            made = 0
            try:
                for s in range(steps):
                    slots = Slots()
                    w = None if ws is None else slots.put(ws[:, s], 0)
                    batch = rebuilt(blank, {"x": slots.put(xs[:, s], 0), "y": slots.put(ys[:, s], 0), "w": w})
                    self.advance(slots, [batch], self.clock(moments[:, :, s].T, slots))
                    made += 1
            finally:
                for _, j in live:
                    line, first = lines[id(j)], done[id(j)]
                    for size, times in Counter(line.sizes[first : first + made]).items():
                        self._count(j, (size,), times)
                    done[id(j)] += made
                    j.epoch, j.index = line.after(done[id(j)])


@dataclass
class Line:
    """The steps of a job of one part that are left: indices [S, width] filled up with the first of each, sizes, and moments."""

    index: Tensor
    sizes: list[int]
    moments: list[tuple[int, int, int, int]]

    @staticmethod
    def of(job: Job, width: int) -> Line:
        batches, moments, at = [], [], job.index
        for epoch in range(job.epoch, job.training.epochs):
            plan = job.left(epoch, at)[0]
            batches += plan
            moments += [(epoch, at + i, *job.step.horizon) for i in range(len(plan))]
            at = 0
        filled = [b if len(b) == width else torch.cat([b, b[:1].expand(width - len(b))]) for b in batches]
        index = torch.cat(filled).view(-1, width) if filled else torch.zeros(0, width, dtype=torch.long)
        return Line(index, [len(b) for b in batches], moments)

    def after(self, done: int) -> tuple[int, int]:
        """(epoch, step in the epoch) where so many steps are done."""
        if done < len(self.moments):
            return self.moments[done][:2]
        epoch, index, _, most = self.moments[-1]
        return (epoch + 1, 0) if index + 1 == most else (epoch, index + 1)


def up_to(t: Tensor, width: int) -> Tensor:
    """A tensor [B, ..] filled up with zeros to [width, ..]."""
    return t if len(t) == width else torch.cat([t, t.new_zeros(width - len(t), *t.shape[1:])])


class Program:
    """A step of stacked agents as a graph of tensor operations: traced once, replayed, and compiled when it runs long."""

    def __init__(
        self, one: Callable[..., tuple[Tensor, ...]], args: list[Tensor], dims: list[int | None], states: int
    ) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        with torch.enable_grad():
            graph = make_fx(torch.vmap(one, in_dims=tuple(dims)))(*args)
            if any(
                getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in graph.graph.nodes
            ):
                graph = make_fx(torch.func.functionalize(graph))(*args)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        self.whole, self.states, self.ran = graph, states, 0
        self.graph = tidy(copy.deepcopy(graph), [t.clone() for t in args], states)
        self.fast: Callable[..., None] | None = None
        self.about: object = None
        """What the program is known by its identity for, kept alive."""
        self.tried = False

    def __call__(
        self, args: list[Tensor], compiled: bool | None, note: Callable[[str], None]
    ) -> Sequence[Tensor]:
        self.ran += 1
        if not self.tried and (compiled or (compiled is None and self.ran > LONG and args[0].is_cuda)):
            self.tried = True
            self._compile(args, note)
        if self.fast is not None:
            self.fast(*args)
            return args[: self.states]
        return self.graph(*args)  # type: ignore[no-any-return]

    def _compile(self, args: list[Tensor], note: Callable[[str], None]) -> None:
        graph, states = self.whole, self.states

        def fast(*tensors: Tensor) -> None:
            for old, new in zip(tensors[:states], graph(*tensors), strict=True):
                old.copy_(new)

        made = torch.compile(fast, dynamic=False)
        limits = {
            k: max(4096, getattr(torch._dynamo.config, k))
            for k in ("recompile_limit", "accumulated_recompile_limit")
        }
        try:
            with torch._dynamo.config.patch(
                **limits, fail_on_recompile_limit_hit=True
            ):  # all programs share one code object
                made(*[t.clone() for t in args])
        except Exception as e:
            note(f"a program is not compiled: {type(e).__name__}: {str(e).splitlines()[0]}")
        else:
            self.fast = made


@dataclass(eq=False)
class Batched(Engine):
    """Agents that learn alike take their steps together: parameters [K, n], data [K, B, ..], one program for all.

    Equal to the serial engine to rounding. Batches of unequal size are filled up with samples of weight 0; agents that end early
    leave. What cannot be stacked (batch norm with filled batches, dropout, aggregators of gradients, steps that differ)
    is run one after another, and the log says why. Checkpoints lie between stacks.
    """

    stacks: ClassVar[bool] = True

    chunk: int | None = None
    compiled: bool | None = None
    auto: bool = False

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ConsilienceError(f"`chunk` should be at least 1. Found `chunk = {self.chunk}`.")
        self.programs: dict[object, Program] = {}
        self.ledgers: dict[int, Any] = {}
        self.told: set[str] = set()
        self.taken: Counter[object] = Counter()
        self.window: Tensor | None = None
        self.costs: dict[object, tuple[int, list[str], object]] = {}

    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        if paused is not None:
            Serial().train(visits[:1], events, paused)
            visits = visits[1:]
        size = self.chunk or self.most(visits)
        for at in range(0, len(visits), size):
            self._chunk(visits[at : at + size], events)
            events.tick(None)

    def room(self, shape: tuple[int, ...], like: Tensor, blank: bool) -> Tensor:
        """Memory for a window of inputs, the same again and again: fresh memory is slow. `blank` sets it to 0."""
        if (
            self.window is None
            or (self.window.dtype, self.window.device) != (like.dtype, like.device)
            or self.window.numel() < prod(shape)
        ):
            self.window = like.new_empty(prod(shape))
        made = self.window[: prod(shape)].view(shape)
        return made.zero_() if blank else made

    def most(self, visits: Sequence[Visit]) -> int:
        """How many agents are stacked at most: as their state and activations fit in memory."""
        if not visits:
            return 1
        agent = visits[0][0]
        numbers = sum(p.numel() for p in agent.state.params.values())
        each = (
            8
            * numbers
            * agent.training.dtype.itemsize
            * (2 if not isinstance(agent.training.optimiser, str) else 1)
        )
        return max(1, int(SHARE * free(agent.device)) // max(1, each))

    def note(self, events: EngineEvents, text: str) -> None:
        """Say it once."""
        if text not in self.told:
            self.told.add(text)
            events.note(text)

    def _chunk(self, visits: Sequence[Visit], events: EngineEvents) -> None:
        jobs: dict[int, Job] = {}
        failed: dict[int, Exception] = {}
        for i, (agent, names, part) in enumerate(visits):
            try:
                jobs[i] = agent.prepare(names, part)
                self.ledgers[id(jobs[i])] = agent.ledger
            except Exception as e:
                failed[i] = e
        groups: dict[object, list[int]] = {}
        for i, job in jobs.items():
            groups.setdefault(alike(job), []).append(i)
        for members in groups.values():
            own = [jobs[i] for i in members]
            why = self._alone(own)
            if why is None:
                stack = None
                try:
                    stack = Stack(own, self, events)
                    self.note(events, f"batched: {len(own)} agents a step, {own[0].layout.size} numbers each")
                    failed |= {members[k]: e for k, e in stack.run().items()}
                    continue
                except Interrupted:
                    raise
                except Exception as e:  # not stackable after all: each goes on from where it is
                    why = reason(e)
                    if stack is not None:
                        stack.give_back([r for r, j in enumerate(stack.rows) if j is not None])
            if why:
                self.note(events, f"one after another: {why}")
            for i in members:
                try:
                    for _ in jobs[i].run(visits[i][0].ledger):
                        pass
                except Exception as e:
                    failed[i] = e
        self.ledgers.clear()
        for i, (agent, _, _) in enumerate(visits):
            try:
                if i in failed:
                    raise failed[i]
                agent.finish(jobs[i])
            except Exception as e:
                events.fail(agent, e)
            events.done(agent)

    def _alone(self, jobs: Sequence[Job]) -> str | None:
        """Why these are not stacked, "" where nothing needs saying; None where they are."""
        step = jobs[0].step
        if len(jobs) == 1 or not jobs[0].layout.size:
            return ""
        if step.model.draws:
            return "the model draws random numbers in its forward"
        if not step.optimiser.elementwise:
            return f"{type(step.optimiser).__name__} does not treat every number alike"
        if self.auto and jobs[0].layout.size > SMALL:
            return f"auto: a model of {jobs[0].layout.size} numbers keeps the processor busy alone"
        if self.auto:
            kind = alike(jobs[0])
            self.taken[kind] += int(sum(j.fraction * prod(j.step.horizon) for j in jobs))
            if self.taken[kind] < EARNED:
                return f"auto: until {EARNED} steps of a kind show that a program for them pays"
        return None


def reason(e: Exception) -> str:
    """Why something could not be stacked, in one line."""
    line = str(e).splitlines()[0] if str(e) else ""
    if isinstance(e, RuntimeError) and (
        ".item()" in line or "data-dependent" in line or "data dependent" in line
    ):
        return "a step depends on the numbers in its tensors"
    return line if isinstance(e, Unbatchable) else f"{type(e).__name__}: {line}"


def alike(job: Job) -> object:
    """What jobs must share to be stacked."""
    parts = tuple(
        (task, s.kind, tuple(e.whole()[0].shape[1:]) if isinstance(e, Tensors) else None)
        for s, e, task in job.parts
    )
    corrections = tuple((c.name, type(c)) for c, _ in job.corrections)
    verbs = tuple((v, tuple(c.name for c, _ in pairs)) for v, pairs in job.step.by_verb.items())
    return (
        id(job.step.model),
        job.layout,
        parts,
        corrections,
        verbs,
        tuple(job.fixed),
        tuple(job.carry.buffers),
        job.training,
    )


def free(device: torch.device) -> int:
    """Free memory in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import os

    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 31
