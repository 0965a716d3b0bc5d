"""The serial engine: one agent after another, one step after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilience.core.errors import Interrupted
from consilience.loop.engine import Engine, EngineEvents, Paused, Visit


@dataclass(frozen=True)
class Serial(Engine):
    """Run one agent after another; a run can stop at every step."""

    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        """Train the agents in order."""
        for visit in visits:
            agent = visit.agent
            try:
                job = visit.prepare()
                if paused is not None:
                    job.load(*paused)
                    paused = None

                for _ in job.run(agent.ledger):
                    events.tick(job)
                agent.finish(job)
            except Interrupted:
                # The user stopped the run: that is no failure of this agent.
                raise
            except Exception as error:
                events.fail(agent, error)
            events.done(agent)
