"""Stacks: the state of many agents on a leading dimension [K, ..], moved by programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.batch import Batch, first_alike
from consilience.core.contexts import Context
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.engines._memory import Buffer
from consilience.engines._merge import Slot, Slots, Unbatchable, fill, fill_parts, merge, shape_of
from consilience.engines._program import Program
from consilience.engines._pure import AgentStep, Clock, Constants, StateKey
from consilience.loop.agent import input_shape
from consilience.loop.job import Job
from consilience.loop.ledger import Ledger
from consilience.loop.step import own_count

INSIDE = ("view", "losses", "rows", "penalty", "mask", "trace")
"""The verbs that run inside a program; `sample` draws outside of it."""


class StepCost(NamedTuple):
    """What one step costs, and which entries its gradient does not reach."""

    macs: int
    absent: list[str]
    model: Model
    """Kept alive, because its identity is in the key of this cost."""


@dataclass(eq=False)
class Cache:
    """What the stacks of one engine share."""

    compiled: bool | None
    """Whether programs are compiled; None: those that run long on a GPU."""
    programs: dict[object, Program] = field(default_factory=dict)
    costs: dict[object, StepCost] = field(default_factory=dict)
    inputs: defaultdict[str, Buffer] = field(default_factory=lambda: defaultdict(Buffer))
    """By the name of the part of the inputs."""


class Stack:
    """Jobs that train alike, as rows of one state; finished rows are written back to their jobs."""

    def __init__(
        self, jobs: Sequence[Job], ledgers: Sequence[Ledger], cache: Cache, note: Callable[[str], None]
    ) -> None:
        self.jobs, self.cache, self.note = list(jobs), cache, note
        self.ledgers = dict(zip(jobs, ledgers, strict=True))
        self.rows: list[Job | None] = list(jobs)
        """The job of each row; None where it has ended."""

        first = jobs[0]
        self.step, self.layout, self.training = first.step, first.layout, first.training
        self.inside = any(self.step.by_verb[verb] for verb in INSIDE)
        optimiser, theta = first.carry.optimiser, first.carry.theta
        self.vectors = tuple(key for key, tensor in optimiser.items() if tensor.shape == theta.shape)

        # The constants must be merged before the shape, which describes their slots.
        self.state = self._stacked_state()
        self.slots = Slots()
        self.constants = self._merged_constants()
        self.kind = (alike(first), repr(self.step.frame), repr(self.step.aggregator))
        self.shape = (shape_of(self.constants), tuple(self.slots.dims))
        self.programs: dict[object, Program] = {}

    def _stacked_state(self) -> dict[StateKey, Tensor]:
        """Stack what the steps of all jobs change."""
        carries = [job.carry for job in self.jobs]
        first = carries[0]
        split = [self.layout.split(carry.theta) for carry in carries]
        state = {
            StateKey("leaf", name): torch.stack([leaves[name] for leaves in split])
            for name in self.layout.names
        }
        for name, _ in self.jobs[0].moving_buffers():
            state[StateKey("buffer", name)] = torch.stack([carry.buffers[name] for carry in carries])

        # Per entry, as the parameters are: a program updates entry by entry, and never joins them.
        for key in first.optimiser:
            stacked = torch.stack([carry.optimiser[key] for carry in carries])
            if key in self.vectors:
                for name, tensor in self._by_entry(stacked).items():
                    state[StateKey("optimiser", key, name)] = tensor
            else:
                state[StateKey("optimiser", key)] = stacked

        for correction, ctx in self.step.by_verb["trace"]:
            contexts = [context_of(job, correction.name) for job in self.jobs]
            for entry in ctx.trace:
                each = [own.trace[entry] for own in contexts]
                if any(trace.shape != each[0].shape for trace in each):
                    raise Unbatchable(f"the trace of {correction.name} differs in shape between agents")
                traces = torch.stack(each)
                state[StateKey("trace", correction.name, entry)] = traces
        return state

    def _by_entry(self, stacked: Tensor) -> Params:
        """Cut stacked vectors [K, n] into stacked entries [K, ..]."""
        entries = zip(self.layout.names, self.layout.shapes, strict=True)
        return {name: stacked[:, self.layout.span(name)].reshape(-1, *shape) for name, shape in entries}

    def _merged_constants(self) -> Constants:
        """Merge what the steps of all jobs read: corrections with contexts, frozen entries, the start."""
        jobs, slots, verbs = self.jobs, self.slots, self.step.by_verb
        acting = dict.fromkeys(
            correction.name for verb, pairs in verbs.items() if verb != "sample" for correction, _ in pairs
        )
        corrections = {}
        for name in acting:
            contexts = [context_of(job, name) for job in jobs]
            own = [next(each for each, _ in job.corrections if each.name == name) for job in jobs]
            fields = {
                key: merge([getattr(ctx, key) for ctx in contexts], slots)
                for key in ("recalled", "private", "flat")
            }
            corrections[name] = (merge(own, slots), fields)

        # Entries that are equal for all agents, such as a frozen backbone, are held once.
        fixed = {name: slots.add([job.fixed[name] for job in jobs]) for name in jobs[0].fixed}
        moving = dict(jobs[0].moving_buffers())
        derived = {
            name: slots.add([job.carry.buffers[name] for job in jobs])
            for name in jobs[0].carry.buffers
            if name not in moving
        }
        if not self.inside:
            return Constants(corrections, fixed, None, {}, derived)
        start = slots.add([job.start for job in jobs])
        begun = [job.step.start_buffers for job in jobs]
        return Constants(
            corrections,
            fixed,
            start,
            {name: slots.add([buffers[name] for buffers in begun]) for name in begun[0]},
            derived,
        )

    def live(self) -> list[tuple[int, Job]]:
        """Return the rows whose jobs have not ended, with their jobs."""
        return [(row, job) for row, job in enumerate(self.rows) if job is not None]

    def advance(self, slots: Slots, parts: list[Batch], clock: Clock) -> None:
        """Take one step with all rows; `slots` holds the tensors of `parts` and `clock`."""
        self._count_apart()
        args = [*self.state.values(), *self.slots.tensors, *slots.tensors]
        # A short key of what differs between steps of one stack: the full key costs more than a small step.
        key = (
            len(self.rows),
            *[(part.task, part.weight, part.drawn_by, part.w is None, *part.extra) for part in parts],
            *first_alike(parts),
            *[tensor.shape for tensor in slots.tensors],
            clock.horizon,
        )
        program = self.programs.get(key)
        if program is None:
            program = self.programs[key] = self._program(args, slots, parts, clock)
        compiled = self.training.compile or self.cache.compiled
        for name, tensor in zip(self.state, program(args, compiled, self.note), strict=True):
            self.state[name] = tensor

    def _count_apart(self) -> None:
        """Give entries that a step leaves out counts of their own, as `Step` does."""
        counts = [key for key in self.jobs[0].carry.optimiser if key not in self.vectors and "/" not in key]
        for name in self.step.absent:
            for key in counts:
                place = StateKey("optimiser", own_count(key, name))
                if place not in self.state:
                    self.state[place] = self.state[StateKey("optimiser", key)].clone()
                    # They read another state.
                    self.programs.clear()

    def _program(self, args: list[Tensor], slots: Slots, parts: list[Batch], clock: Clock) -> Program:
        """Find the program for these arguments among those of the engine, or trace it."""
        dims = [*[0] * len(self.state), *self.slots.dims, *slots.dims]
        key = (
            self.kind,
            self.shape,
            shape_of(parts),
            shape_of(clock.horizon),
            tuple(dims),
            tuple((tuple(tensor.shape), tensor.dtype) for tensor in args),
            tuple(self.step.absent),
            tuple(self.state),
        )
        if key in self.cache.programs:
            return self.cache.programs[key]

        # In a program the data come after the constants, so their slots move up.
        moved: Any = [Slot(len(self.slots.tensors) + index) for index in range(len(slots.tensors))]
        factors, decays = self.step.factors, self.step.decays
        step = AgentStep(
            self.step,
            tuple(self.state),
            self.vectors,
            self.constants,
            fill_parts(parts, moved),
            fill(clock, moved),
            None if factors is None else self.layout.split(factors),
            None if decays is None else self.layout.split(decays),
        )
        program = self.cache.programs[key] = Program(step, args, dims, len(self.state))
        program.keeps = (self.step.model, self.constants, parts)
        return program

    def give_back(self, rows: Sequence[int]) -> None:
        """Write the state of these rows back into their jobs, and mark the rows as ended."""
        for row in rows:
            self.write_back(row)
            self.rows[row] = None

    def write_back(self, row: int) -> None:
        """Write the state of a row back into its job."""
        job = self.rows[row]
        assert job is not None
        carry = job.carry
        leaves = [self.state[StateKey("leaf", name)][row] for name in self.layout.names]
        torch.cat([leaf.reshape(-1) for leaf in leaves], out=carry.theta)
        for name, buffer in job.moving_buffers():
            buffer.copy_(self.state[StateKey("buffer", name)][row])

        for key in self.vectors:
            entries = [self.state[StateKey("optimiser", key, name)] for name in self.layout.names]
            carry.optimiser[key] = torch.cat([entry[row].reshape(-1) for entry in entries])
        for place, count in self.state.items():
            if place.kind == "optimiser" and not place.entry:
                carry.optimiser[place.name] = count[row].clone()

        for correction, ctx in job.step.by_verb["trace"]:
            keys = {entry: StateKey("trace", correction.name, entry) for entry in ctx.trace}
            ctx.trace = {entry: self.state[key][row].clone() for entry, key in keys.items()}

    def compact(self) -> None:
        """Drop finished rows. The stack shrinks only in steps of 3/4: each size needs its own program."""
        # Ended rows may stay in the stack, and are moved along with the others until it shrinks.
        live = [row for row, _ in self.live()]
        size = len(self.rows)
        while live and size * 3 // 4 >= len(live):
            size = size * 3 // 4
        if not live or size == len(self.rows):
            return

        ended = [row for row, job in enumerate(self.rows) if job is None]
        rows = sorted([*live, *ended[: size - len(live)]])
        index = torch.tensor(rows, device=self.layout.device)
        self.state = {key: tensor.index_select(0, index) for key, tensor in self.state.items()}
        self.slots.tensors = [
            tensor if dim is None else tensor.index_select(0, index)
            for tensor, dim in zip(self.slots.tensors, self.slots.dims, strict=True)
        ]
        self.rows = [self.rows[row] for row in rows]


def context_of(job: Job, name: str) -> Context:
    """Return the context of a correction in a job, by the correction's name."""
    return next(ctx for correction, ctx in job.corrections if correction.name == name)


def alike(job: Job) -> object:
    """Describe a job by what jobs must have in common to be stacked."""
    parts = tuple(
        (part.task, part.source.target, part.like, input_shape(part.examples)) for part in job.parts
    )
    corrections = tuple((correction.name, type(correction)) for correction, _ in job.corrections)
    verbs = tuple(
        (verb, tuple(correction.name for correction, _ in pairs)) for verb, pairs in job.step.by_verb.items()
    )
    # Models are compared by identity: two that are equal may still be two modules.
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
