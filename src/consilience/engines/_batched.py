"""The batched engine: agents that train alike are stacked on a leading dimension, and share one program."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from consilience.core.errors import ConsilienceError, Interrupted
from consilience.core.optimiser import Torch
from consilience.engines._feed import Feed
from consilience.engines._memory import most_agents
from consilience.engines._merge import Unbatchable
from consilience.engines._serial import Serial
from consilience.engines._stack import Cache, Stack, alike
from consilience.loop.engine import Engine, EngineEvents, Paused, Visit
from consilience.loop.job import Job

SMALL = 4_000_000
"""Trainable numbers of a model up to which `auto` stacks: one larger model keeps a processor busy alone."""
EARNED = 400
"""Steps of one kind after which `auto` traces a program for them: to trace one costs about as much."""


@dataclass(eq=False)
class Batched(Engine):
    """Train agents together: parameters [K, n], data [K, B, ..], and one program for the steps of all.

    Equal to the serial engine up to rounding. Batches of unequal size are padded with samples of weight 0;
    agents that end early leave the stack. Agents that cannot be stacked (batch norm with padded batches,
    dropout, aggregators of gradients, steps that differ) run one after another, and the log says why.
    Checkpoints lie between stacks.
    """

    stacks: ClassVar[bool] = True

    chunk: int | None = None
    compiled: bool | None = None
    auto: bool = False

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ConsilienceError(f"`chunk` must be at least 1, got {self.chunk}.")
        self.cache = Cache(self.compiled)
        self._noted: set[str] = set()
        self._steps: Counter[object] = Counter()

    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        """Train all agents, in stacks of at most `chunk`."""
        # A job that was saved inside its visit belongs to no stack, so it is finished alone.
        if paused is not None:
            Serial().train(visits[:1], events, paused)
            visits = visits[1:]

        # Between two stacks every agent is finished or untouched, so here the run may be interrupted.
        size = self.chunk or most_agents(visits)
        for start in range(0, len(visits), size):
            self._train_chunk(visits[start : start + size], events)
            events.tick(None)

    def _train_chunk(self, visits: Sequence[Visit], events: EngineEvents) -> None:
        """Prepare the jobs of some agents, run them in groups that train alike, and finish them in order."""
        jobs: dict[int, Job] = {}
        failed: dict[int, Exception] = {}
        for index, visit in enumerate(visits):
            try:
                jobs[index] = visit.prepare()
            except Exception as error:
                failed[index] = error

        # Only jobs that train alike share a program. A failed agent must not stop the others.
        groups: dict[object, dict[int, Job]] = {}
        for index, job in jobs.items():
            groups.setdefault(alike(job), {})[index] = job
        for group in groups.values():
            failed |= self._train_group(group, visits, events)

        # The loop expects agents in the order of the visits, whichever groups they ran in.
        for index, visit in enumerate(visits):
            try:
                if index in failed:
                    raise failed[index]
                visit.agent.finish(jobs[index])
            except Exception as error:
                events.fail(visit.agent, error)
            events.done(visit.agent)

    def _train_group(
        self, jobs: dict[int, Job], visits: Sequence[Visit], events: EngineEvents
    ) -> dict[int, Exception]:
        """Run jobs that train alike, by their position in `visits`; return what stopped some of them."""
        why = self._reason_to_run_alone(list(jobs.values()))
        if why is None:
            try:
                return self._train_stacked(jobs, visits, events)
            except Interrupted:
                raise
            except Exception as error:
                # Only a trace shows what a step reads. Each job goes on alone from where it is.
                why = reason(error)
        if why:
            self._note(events, f"one after another: {why}")

        failed: dict[int, Exception] = {}
        for index, job in jobs.items():
            try:
                for _ in job.run(visits[index].agent.ledger):
                    pass
            except Exception as error:
                failed[index] = error
        return failed

    def _train_stacked(
        self, jobs: dict[int, Job], visits: Sequence[Visit], events: EngineEvents
    ) -> dict[int, Exception]:
        """Run jobs as one stack; whatever stops it, each job is given back its state."""
        ledgers = [visits[index].agent.ledger for index in jobs]
        stack = Stack(list(jobs.values()), ledgers, self.cache, events.note)
        self._note(events, f"batched: {len(jobs)} agents a step, {stack.layout.size} numbers each")
        since = time.perf_counter()
        try:
            failed = Feed(stack).run()
        except Exception:
            stack.give_back([row for row, _ in stack.live()])
            raise
        finally:
            # Each job has its share of the time.
            seconds, steps = time.perf_counter() - since, sum(job.steps for job in jobs.values())
            for job in jobs.values():
                job.figures.seconds += seconds * job.steps / max(1, steps)
        positions = list(jobs)
        return {positions[index]: error for index, error in failed.items()}

    def _reason_to_run_alone(self, jobs: Sequence[Job]) -> str | None:
        """Say why jobs are not stacked: "" where stacking would save nothing, None where they are stacked."""
        first = jobs[0]
        model, optimiser, size = first.step.model, first.step.optimiser, first.layout.size
        if len(jobs) == 1 or not size:
            return ""
        if model.draws:
            return "the model draws random numbers in its forward"
        if first.training.accumulates:
            return "gradients are accumulated over micro-batches"
        if first.shares(0) is not None:
            return "tasks have shares of a step"
        if first.training.stopping is not None:
            return "each agent stops by its own validation data"
        if first.training.precision == "fp16":
            return "the loss is scaled for each agent"
        if not optimiser.elementwise:
            own = type(optimiser).__name__
            name = f"torch.optim.{optimiser.name}" if isinstance(optimiser, Torch) else own
            return f"{name} cannot be stacked, as it may not treat every number alike"
        if not self.auto:
            return None

        # `auto` stacks only what gains by it: small models, and only once their program pays for its tracing.
        if size > SMALL:
            return f"auto: a model of {size} numbers keeps the processor busy alone"
        kind = alike(first)
        self._steps[kind] += int(sum(job.fraction * prod(job.step.horizon) for job in jobs))
        if self._steps[kind] < EARNED:
            return f"auto: until {EARNED} steps of a kind show that a program for them pays"
        return None

    def _note(self, events: EngineEvents, text: str) -> None:
        """Send a note once per engine."""
        if text not in self._noted:
            self._noted.add(text)
            events.note(text)


DEPENDENT = (".item()", "data-dependent", "data dependent", "dynamic shape")
"""What torch says of a trace that would need the value of a tensor; it has no class of its own for it."""


def reason(error: Exception) -> str:
    """Say in one line why jobs could not be stacked."""
    line = str(error).splitlines()[0] if str(error) else ""
    data_dependent = any(words in line for words in DEPENDENT)
    if isinstance(error, RuntimeError) and data_dependent:
        return "a step depends on the numbers in its tensors"
    return line if isinstance(error, Unbatchable) else f"{type(error).__name__}: {line}"
