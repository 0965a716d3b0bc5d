"""What an engine is: it runs the steps of visits. Methods and settings never see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from consilience.core.training import Place
from consilience.loop.agent import Agent
from consilience.loop.job import Job


class Visit(NamedTuple):
    """One agent that trains on some sources, for a fraction of the steps (below 1 for a straggler)."""

    agent: Agent
    sources: tuple[str, ...]
    fraction: float
    place: Place = Place()
    """Where the visit lies in the run."""

    def prepare(self) -> Job:
        """Make the job of this visit."""
        return self.agent.prepare(self.sources, self.fraction, self.place)


Paused = tuple[Mapping[str, Tensor], Mapping[str, float]]
"""What `Job.save` gave for an interrupted job."""


@dataclass(frozen=True)
class EngineEvents:
    """What an engine calls while it trains."""

    tick: Callable[[Job | None], None]
    """After every step with its job, or with None between groups of agents. It may raise Interrupted."""
    done: Callable[[Agent], None]
    """When an agent has finished or failed, in the order of the visits."""
    fail: Callable[[Agent, Exception], None]
    """When an exception stopped an agent's visit. It raises if that must stop the run."""
    note: Callable[[str], None]
    """With what the engine chose to do, once per choice."""


class Engine(ABC):
    """Runs the visits of agents, one after another or side by side; the results are equal, to rounding."""

    stacks: ClassVar[bool] = False
    """Whether visits of several seeds and methods are better given together."""

    @abstractmethod
    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        """Let each agent train: `prepare`, the steps, `finish`. `paused` continues the first visit."""

    def close(self) -> None:  # noqa: B027 (optional: most engines hold nothing)
        """Free what the engine holds at the end of a run."""
