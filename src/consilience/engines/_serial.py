"""The serial engine: one agent after another, one step after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilience.core.errors import Interrupted
from consilience.loop.engine import Engine, EngineEvents, Paused, Visit


@dataclass(frozen=True)
class Serial(Engine):
    """One agent after another; stoppable at every step."""

    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        for agent, names, part in visits:
            try:
                job = agent.prepare(names, part)
                if paused is not None:
                    job.load(*paused)
                    paused = None
                for _ in job.run(agent.ledger):
                    events.tick(job)
                agent.finish(job)
            except Interrupted:
                raise
            except Exception as e:
                events.fail(agent, e)
            events.done(agent)
