"""The serial engine: one agent after another, one step after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from consilience.core.agent import Agent, Job

Paused = tuple[Mapping[str, Tensor], Mapping[str, int]]


def learn(pairs: Iterable[tuple[Agent, tuple[str, ...]]], tick: Callable[[Job], None], paused: Paused | None = None) -> None:
    """Let each agent learn its sources; `tick` comes after every step; `paused` is a saved job of the first pair to go on with."""
    for agent, names in pairs:
        job = agent.prepare(names)
        if paused is not None:
            job.load(*paused)
            paused = None
        for _ in job.run(agent.ledger):
            tick(job)
        agent.finish(job)
