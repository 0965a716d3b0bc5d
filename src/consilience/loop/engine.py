"""Engines: who runs the steps of a learn. They never show to a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from consilience.loop.agent import Agent, Job


class Visit(NamedTuple):
    """One agent that trains on some sources, for a fraction of the steps (below 1 for a straggler)."""

    agent: Agent
    sources: tuple[str, ...]
    fraction: float


Paused = tuple[Mapping[str, Tensor], Mapping[str, int]]
"""What `Job.save` kept of the first agent's job."""


@dataclass(frozen=True)
class EngineEvents:
    """What the loop wants to be told.

    `tick(job)` after every step, or `tick(None)` where agents have finished and no job is under way: it may raise Interrupted;
    `done(agent)` when one has finished or failed, in the order of the work; `fail(agent, why)` when something stopped it: it
    raises where that should stop the run; `note(text)`, once each, what the engine chose.
    """

    tick: Callable[[Job | None], None]
    done: Callable[[Agent], None]
    fail: Callable[[Agent, Exception], None]
    note: Callable[[str], None]


class Engine(ABC):
    """Lets agents learn, side by side or one after another; what they then know is the same, to rounding."""

    stacks: ClassVar[bool] = False
    """Whether agents of several runs had better be given together."""

    @abstractmethod
    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        """Let each agent learn its sources; `paused` is a saved job of the first to go on with."""

    def close(self) -> None:  # noqa: B027 (nothing to give back)
        """Give back what the engine holds, at the end of a run."""
