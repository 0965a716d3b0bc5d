"""The serial engine: one agent after another, one step after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from consilience.core.agent import Agent, Job
from consilience.core.errors import Interrupted

Paused = tuple[Mapping[str, Tensor], Mapping[str, int]]


Work = tuple[Agent, tuple[str, ...], float]
"""An agent, the names of its sources, and the fraction of its steps that it does."""


def learn(
    work: Iterable[Work], tick: Callable[[Job], None], fail: Callable[[Agent, Exception], None], paused: Paused | None = None
) -> None:
    """Let each agent learn its sources; `tick` comes after every step; `fail` says what stopped an agent, and raises where that
    should stop the run; `paused` is a saved job of the first agent to go on with."""
    for agent, names, part in work:
        try:
            job = agent.prepare(names, part)
            if paused is not None:
                job.load(*paused)
                paused = None
            for _ in job.run(agent.ledger):
                tick(job)
            agent.finish(job)
        except Interrupted:
            raise
        except Exception as e:
            fail(agent, e)
