"""Feeds: give a stack the batches of every step, until all of its jobs have ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.batch import Batch, first_alike
from consilience.core.source import Tensors
from consilience.core.tree import Input, Tree, tensors_of
from consilience.engines._memory import WINDOW
from consilience.engines._merge import Slot, Slots, Unbatchable, rebuilt
from consilience.engines._pure import Clock
from consilience.engines._stack import Stack, StepCost
from consilience.loop.job import Job, Part

Drawn = tuple[tuple[int, str | None, int], ...]
"""The batches of a step: the size and the task of each, and the first of them with the same inputs."""


class Feed:
    """Give a stack the batches of every step.

    Batches of unequal size are padded to the width of their part with samples of weight 0.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        sizes = [[len(part.examples) for part in job.parts] for job in stack.jobs]
        batch = stack.training.batch_size
        self.widths = [min(batch, max(column)) for column in zip(*sizes, strict=True)]
        self.padded = any(size % width for row in sizes for size, width in zip(row, self.widths, strict=True))
        self.costs: dict[Drawn, StepCost] = {}
        """What a step costs by what its batches are."""

        inputs = (part.examples.whole()[0] for job in stack.jobs for part in job.parts if in_memory(part))
        if any(isinstance(x, Tree) and x.ragged for x in inputs):
            raise Unbatchable("batches of ragged inputs are padded to lengths that differ")
        if self.padded and stack.step.model.has_batch_norm:
            raise Unbatchable(
                "outputs depend on the other samples of a batch (batch norm), and batches of unequal size "
                "would be filled up"
            )

    def run(self) -> dict[int, Exception]:
        """Run all jobs to their ends; return what stopped some of them, by their position."""
        jobs = self.stack.jobs
        gathered = all(in_memory(part) and part.augment is None for job in jobs for part in job.parts)
        # Later epochs may depend on what is learned in earlier ones.
        ahead = gathered and all(job.scored is None for job in jobs)
        if ahead and len(self.widths) == 1 and not self.stack.step.by_verb["sample"]:
            self._run_windows()
            return {}
        return self._run_drawn()

    # Batches that are drawn step by step

    def _run_drawn(self) -> dict[int, Exception]:
        """Let every job draw the parts of each step."""
        stack = self.stack
        streams = {job: job.draw(stack.ledgers[job]) for job in stack.jobs}
        position = {job: index for index, job in enumerate(stack.jobs)}
        failed: dict[int, Exception] = {}
        while True:
            drawn: dict[Job, list[Batch]] = {}
            for row, job in stack.live():
                # A sampler may measure the model before an epoch.
                if job.scored is not None and job.index in (0, job.step.horizon[1]):
                    stack.write_back(row)
                try:
                    found = next(streams[job], None)
                except Exception as error:
                    failed[position[job]] = error
                    continue
                if found is not None:
                    drawn[job] = found[0]

            stack.give_back([row for row, job in stack.live() if job not in drawn])
            if not drawn:
                return failed
            stack.compact()
            self._step(drawn)

    def _step(self, drawn: dict[Job, list[Batch]]) -> None:
        """Take one step with the parts that the jobs drew."""
        stack, slots = self.stack, Slots()
        # Rows that have ended repeat another job's batch: a row needs some numbers, which nobody reads.
        filler = next(iter(drawn))
        rows = [job or filler for job in stack.rows]
        parts = self._padded_parts([drawn[job] for job in rows], slots)
        device = stack.layout.device
        # In double precision, as the quotients of Python's whole numbers are in the serial engine.
        moments = torch.tensor([job.moment for job in rows], dtype=torch.float64, device=device).T
        rates = torch.tensor([job.rate for job in rows], dtype=torch.float64, device=device)

        kinds = {job: drawn_as(parts) for job, parts in drawn.items()}
        for job, kind in kinds.items():
            if kind not in self.costs:
                self._measure(job, drawn[job], kind)
            # Another task's batch reaches another head.
            stack.step.absent = self.costs[kind].absent
        stack.advance(slots, parts, self._clock(moments, rates, slots))
        for job, kind in kinds.items():
            self._charge(job, kind)
            job.index += 1

    def _padded_parts(self, drawn: Sequence[list[Batch]], slots: Slots) -> list[Batch]:
        """Stack the parts of all jobs; parts of the sources are padded to their widths."""
        stacked: list[Batch] = []
        firsts = [first_alike(parts) for parts in drawn]
        for index, batches in enumerate(zip(*drawn, strict=True)):
            first = batches[0]
            if any(part_kind(batch) != part_kind(first) for batch in batches):
                raise Unbatchable("the parts of a step differ between agents")
            fit = self.padded and not first.drawn_by
            width = self.widths[index] if fit else len(first.y)
            if not fit and any(len(batch.y) != width for batch in batches):
                raise Unbatchable("parts that a correction draws differ in size between agents")
            # Inputs that two parts share in every job are one argument of the program.
            first_of = {own[index] for own in firsts}
            alike = stacked[min(first_of)].x if len(first_of) == 1 and min(first_of) < index else None
            stacked.append(self._padded_part(batches, (width, fit), alike, slots))
        return stacked

    def _padded_part(
        self, batches: Sequence[Batch], fitted: tuple[int, bool], alike: Any, slots: Slots
    ) -> Batch:
        """Stack one part of all jobs, whose inputs are `alike` those of another part, if that is not None.

        `fitted` is its width, and whether padding is marked with weight 0.
        """
        width, fit = fitted
        first, dtype = batches[0], self.stack.layout.dtype

        def put(tensors: list[Tensor]) -> Slot:
            return slots.put(torch.stack([padded(tensor, width) for tensor in tensors]), 0)

        weights: Slot | None = None
        if fit or first.w is not None:
            weights = put(
                [
                    torch.ones(len(batch.y), dtype=dtype, device=batch.y.device)
                    if batch.w is None
                    else batch.w
                    for batch in batches
                ]
            )
        xs = [tensors_of(batch.x) for batch in batches]
        inputs = alike or like_parts(first.x, {name: put([x[name] for x in xs]) for name in xs[0]})
        extra = {name: put([batch.extra[name] for batch in batches]) for name in first.extra}
        fields = {
            "x": inputs,
            "y": put([batch.y for batch in batches]),
            "w": weights,
            "extra": extra,
            "source": first.source if all(batch.source == first.source for batch in batches) else "",
        }
        if first.index is not None:
            fields["index"] = put([batch.index for batch in batches if batch.index is not None])
        part: Batch = rebuilt(first, fields)
        return part

    # Batches that are gathered for several steps at once

    def _run_windows(self) -> None:
        """Run jobs with one part in memory; the batches of several steps are gathered at once."""
        stack = self.stack
        lines = {job: Line.of(job, self.widths[0]) for job in stack.jobs}
        blank = self._blank()
        while True:
            stack.give_back([row for row, job in stack.live() if lines[job].ended])
            stack.compact()
            live = {job: lines[job] for _, job in stack.live()}
            if not live:
                return

            window = self._gather(lines, blank)
            taken = 0
            try:
                for slots, batch, clock in self._batches(window, blank):
                    stack.advance(slots, [batch], clock)
                    taken += 1
            finally:
                # An interrupted window keeps the steps that were taken, so that each job can go on alone.
                for job, line in live.items():
                    for size, times in Counter(line.sizes[line.done : line.done + taken]).items():
                        self._charge(job, ((size, blank.task, 0),), times)
                    line.done += taken
                    job.epoch, job.index = line.clock()

    def _blank(self) -> Batch:
        """Return a batch of one sample, which shows shapes and types."""
        part = self.stack.jobs[0].parts[0]
        x, y = next(iter(part.examples.batches([torch.zeros(1, dtype=torch.long)])))
        same = all(job.parts[0].source.name == part.source.name for job in self.stack.jobs)
        return Batch(x, y, part.task, source=part.source.name if same else "", target=part.source.target)

    def _gather(self, lines: dict[Job, Line], blank: Batch) -> Window:
        """Gather the batches of the next steps of all rows, as many as `WINDOW` bytes hold."""
        stack, device, width = self.stack, self.stack.layout.device, self.widths[0]
        rows, live = len(stack.rows), stack.live()
        # Within a window no row ends, so the stack keeps its size and its program.
        steps = min(len(lines[job].sizes) - lines[job].done for _, job in live)
        steps = max(1, min(steps, WINDOW // max(1, rows * width * blank.x.nbytes)))

        # Rows that have ended are set to 0: nobody reads their results, but a class must be in its range.
        some_ended, y = len(live) < rows, blank.y
        inputs = {
            name: stack.cache.inputs[name].view((rows, steps, width, *x.shape[1:]), x, some_ended)
            for name, x in tensors_of(blank.x).items()
        }
        targets = (y.new_zeros if some_ended else y.new_empty)(rows, steps, width, *y.shape[1:])
        counts = torch.full((rows, steps), width, device=device)
        indices = None
        if stack.step.reads_index:
            indices = torch.zeros(rows, steps, width, dtype=torch.long, device=device)
        moments = torch.ones(rows, 4, steps, dtype=torch.float64, device=device)
        rates = torch.ones(rows, steps, dtype=torch.float64, device=device)

        for row, job in live:
            line, examples = lines[job], job.parts[0].examples
            assert isinstance(examples, Tensors)
            span = slice(line.done, line.done + steps)
            index = line.index[span].reshape(-1).to(device)
            for name, x in tensors_of(examples.x).items():
                torch.index_select(x, 0, index, out=inputs[name][row].view(-1, *x.shape[1:]))
            torch.index_select(examples.y, 0, index, out=targets[row].view(-1, *y.shape[1:]))
            if indices is not None:
                indices[row] = index.view(steps, width)
            if self.padded:
                counts[row] = torch.tensor(line.sizes[span], device=device)
            if stack.inside:
                moments[row] = torch.tensor(line.moments[span], dtype=torch.float64, device=device).T
            if stack.training.varies:
                rates[row] = torch.tensor(line.rates[span], dtype=torch.float64, device=device)

            for step, size in enumerate(line.sizes[span], line.done):
                kind = ((size, blank.task, 0),)
                if kind not in self.costs:
                    which = line.index[step, :size]
                    alone = next(examples.batches([which]))
                    batch = replace(blank, x=alone[0], y=alone[1], index=which.to(device))
                    self._measure(job, [batch], kind)

        weights = None
        if self.padded:
            weights = (torch.arange(width, device=device) < counts[..., None]).to(stack.layout.dtype)
        return Window(inputs, targets, indices, weights, moments, rates)

    def _batches(self, window: Window, blank: Batch) -> Iterator[tuple[Slots, Batch, Clock]]:
        """Yield the batch and the clock of each step of a window, with the tensors in their slots."""
        for step in range(window.targets.shape[1]):
            slots = Slots()
            weights = None if window.weights is None else slots.put(window.weights[:, step], 0)
            parts = {name: slots.put(part[:, step], 0) for name, part in window.inputs.items()}
            fields = {
                "x": like_parts(blank.x, parts),
                "y": slots.put(window.targets[:, step], 0),
                "w": weights,
            }
            if window.indices is not None:
                fields["index"] = slots.put(window.indices[:, step], 0)
            batch: Batch = rebuilt(blank, fields)
            yield slots, batch, self._clock(window.moments[:, :, step].T, window.rates[:, step], slots)

    # What both ways need

    def _clock(self, moments: Tensor, rates: Tensor, slots: Slots) -> Clock:
        """Return the clock of all rows, from moments [4, K] and the learning rates [K].

        A moment is (epoch, step, epochs, steps per epoch).
        """
        # A rate that never changes is a number in the program.
        training = self.stack.training
        rate = slots.put(rates, 0) if training.varies else training.lr

        # Where no verb reads the time, it is left out of the program, which then serves all epochs.
        if not self.stack.inside:
            return Clock((0, 0), (0, 0), rate)
        epoch, index, epochs, steps = moments
        now = (slots.put(epoch, 0), slots.put(index, 0))

        # A horizon that all rows share is a number in the program: fewer operations.
        def horizon(values: Tensor) -> int | Slot:
            return int(values[0]) if bool((values == values[0]).all()) else slots.put(values, 0)

        return Clock(now, (horizon(epochs), horizon(steps)), rate)

    def _measure(self, job: Job, parts: list[Batch], kind: Drawn) -> None:
        """Measure the cost of a step with such batches.

        For this, one job takes the step alone, and its state is restored. The step also shows which entries
        the gradient does not reach.
        """
        stack, cost = self.stack, job.cost(parts)
        key = (stack.kind, stack.shape, kind, cost)
        costs = stack.cache.costs
        # Measured on one job alone, as the serial engine does: a stack would count its padding too.
        if key not in costs:
            kept, ledger = job.save(), stack.ledgers[job]
            _, macs = ledger.measure(cost, lambda: job.step(parts, (job.epoch, job.index), None))
            job.load(*kept)
            costs[key] = StepCost(macs, job.step.absent, stack.step.model)
        self.costs[kind] = costs[key]
        stack.step.absent = costs[key].absent

    def _charge(self, job: Job, kind: Drawn, times: int = 1) -> None:
        """Charge steps with such batches to a job's agent."""
        ledger = self.stack.ledgers[job]
        ledger.add(job.agent, "macs", self.costs[kind].macs * times)
        ledger.steps += times


class Window(NamedTuple):
    """The batches of the next S steps of K rows."""

    inputs: dict[str, Tensor]
    """[K, S, B, ..]"""
    targets: Tensor
    """[K, S, B, ..]"""
    indices: Tensor | None
    """[K, S, B], of the examples; None where no correction reads them."""
    weights: Tensor | None
    """[K, S, B], 0 for padding; None where no batch is padded."""
    moments: Tensor
    """[K, 4, S]: epoch, step in the epoch, epochs, steps per epoch."""
    rates: Tensor
    """[K, S]: learning rates, where they vary."""


@dataclass
class Line:
    """The steps left of a job with one part: indices [S, width], each batch padded with its first."""

    index: Tensor
    sizes: list[int]
    moments: list[tuple[int, int, int, int]]
    rates: list[float]
    done: int = 0

    @staticmethod
    def of(job: Job, width: int) -> Line:
        """Plan all steps of a job."""
        batches: list[Tensor] = []
        moments: list[tuple[int, int, int, int]] = []
        start = job.index
        for epoch in range(job.epoch, job.training.epochs):
            plan = job.left(epoch, start)[0]
            batches += plan
            moments += [(epoch, start + step, *job.step.horizon) for step in range(len(plan))]
            start = 0

        filled = [
            batch if len(batch) == width else torch.cat([batch, batch[:1].expand(width - len(batch))])
            for batch in batches
        ]
        index = torch.cat(filled).view(-1, width) if filled else torch.zeros(0, width, dtype=torch.long)
        rates = [job.rate_at((epoch, step), (epochs, steps)) for epoch, step, epochs, steps in moments]
        return Line(index, [len(batch) for batch in batches], moments, rates)

    @property
    def ended(self) -> bool:
        """Whether all steps are done."""
        return self.done == len(self.sizes)

    def clock(self) -> tuple[int, int]:
        """Return (epoch, step in the epoch) of the next step."""
        if not self.ended:
            return self.moments[self.done][:2]
        epoch, index, _, per_epoch = self.moments[-1]
        return (epoch + 1, 0) if index + 1 == per_epoch else (epoch, index + 1)


def drawn_as(parts: Sequence[Batch]) -> Drawn:
    """Return what the batches of a step are."""
    firsts = first_alike(parts)
    return tuple((len(part.y), part.task, first) for part, first in zip(parts, firsts, strict=True))


def in_memory(part: Part) -> bool:
    """Whether the examples of a part are tensors, which can be gathered for many steps at once."""
    return type(part.examples) is Tensors


def like_parts(x: Input, parts: Mapping[str, Any]) -> Any:
    """Return inputs of the kind of `x` from their parts, which may be slots."""
    return parts[""] if isinstance(x, Tensor) else rebuilt(x, {"parts": parts})


def part_kind(batch: Batch) -> tuple[object, ...]:
    """Return what the batches of one part must have in common to be stacked."""
    return (batch.task, batch.target, batch.weight, batch.drawn_by, batch.extra.keys(), batch.x.shape[1:])


def padded(tensor: Tensor, width: int) -> Tensor:
    """Pad a tensor [B, ..] with zeros to [width, ..]."""
    if len(tensor) == width:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(width - len(tensor), *tensor.shape[1:])])
