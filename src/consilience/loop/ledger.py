"""The ledger: what training and exchanging cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakSet

from consilience.core.message import Message

T = TypeVar("T")

RECEIVE = "receive"
"""The first word of the kinds of work whose MACs are counted as `receiving` too."""


@dataclass
class Ledger:
    """MACs (forward and backward: half of torch.utils.flop_counter's FLOPs), bytes, steps, seconds.

    Each kind of work is measured the first time it is done, and multiplied afterwards. `by_agent` has the
    `macs`, the serialised bytes `sent` and `received`, and the part of `macs` that went into `receiving`.
    """

    by_agent: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: dict[Hashable, int] = field(default_factory=dict)
    """MACs by kind of work."""
    seconds: float = 0.0
    steps: int = 0
    warned: set[str] = field(default_factory=set)
    """Corrections that warned already: once per run is enough."""
    admitted: WeakSet[Message] = field(default_factory=WeakSet, repr=False)
    """Messages whose content was checked already: once per run is enough."""
    _since: float = field(default_factory=time.perf_counter)

    def add(self, agent: str, what: str, amount: float) -> None:
        """Add to an agent's `macs`, `sent`, `received` or `receiving`."""
        # Agents that do nothing are in no table, so pages are made when needed.
        costs = self.by_agent.setdefault(agent, {"macs": 0, "sent": 0, "received": 0, "receiving": 0})
        costs[what] = costs.get(what, 0) + amount

    def transfer(self, sender: str, receiver: str, size: int) -> None:
        """Count bytes from one agent to another."""
        self.add(sender, "sent", size)
        self.add(receiver, "received", size)

    def charge_work(self, agent: str, kind: Hashable, work: Callable[[], T]) -> T:
        """Do some work and charge it to an agent; its kind is measured the first time."""
        result = self.measure(kind, work)
        self.charge(agent, kind)
        return result

    def measure(self, kind: Hashable, work: Callable[[], T]) -> T:
        """Do some work and charge it to nobody yet; its kind is measured the first time."""
        if kind in self.measured:
            return work()
        # Imported here, since it takes a tenth of a second.
        from consilience.loop.flops import Flops

        with Flops() as counter:
            result = work()
        self.measured[kind] = counter.total // 2
        return result

    def charge(self, agent: str, kind: Hashable) -> None:
        """Charge work of a measured kind to an agent."""
        self.add(agent, "macs", self.measured[kind])
        if isinstance(kind, tuple) and kind[0] == RECEIVE:
            self.add(agent, "receiving", self.measured[kind])

    def start_clock(self) -> None:
        """Count seconds from now on."""
        self._since = time.perf_counter()

    def clock(self) -> float:
        """Return seconds so far, with those before an interruption."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        return self.seconds

    def total(self, what: str) -> int:
        """Return the sum over agents of `macs`, `sent`, `received` or `receiving`."""
        return int(sum(costs[what] for costs in self.by_agent.values()))

    def costs(self) -> dict[str, Any]:
        """Return macs, bytes (sent), seconds and steps of all agents, and the costs by agent."""
        pages = sorted(self.by_agent.items())
        return {
            "macs": self.total("macs"),
            "bytes": self.total("sent"),
            "seconds": round(self.clock(), 3),
            "steps": self.steps,
            "by_agent": {agent: {what: int(n) for what, n in costs.items()} for agent, costs in pages},
        }

    def kept(self) -> dict[str, Any]:
        """Return what a checkpoint keeps. Kinds of work are measured again, maybe on another machine."""
        return {"seconds": self.clock(), "by_agent": self.by_agent, "steps": self.steps}

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Continue from what `kept` gave."""
        self.by_agent, self.seconds, self.steps = facts["by_agent"], facts["seconds"], facts["steps"]
