"""The serial engine: one agent after another, one step after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilience.core.engine import Engine, Paused, Watch, Work
from consilience.core.errors import Interrupted


@dataclass(frozen=True)
class Serial(Engine):
    """One agent after another; stoppable at every step."""

    def learn(self, work: Sequence[Work], watch: Watch, paused: Paused | None = None) -> None:
        for agent, names, part in work:
            try:
                job = agent.prepare(names, part)
                if paused is not None:
                    job.load(*paused)
                    paused = None
                for _ in job.run(agent.ledger):
                    watch.tick(job)
                agent.finish(job)
            except Interrupted:
                raise
            except Exception as e:
                watch.fail(agent, e)
            watch.done(agent)
