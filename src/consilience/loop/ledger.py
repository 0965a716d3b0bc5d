"""The ledger: what learning and telling cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Ledger:
    """MACs (forward and backward: half of torch.utils.flop_counter's FLOPs), bytes as serialised, steps, seconds.

    Each kind of work is measured the first time it is done and multiplied afterwards. `by_agent` holds what each agent
    computed and sent and received; `absorbing` is the part of its `macs` that went into absorbing what it heard.
    """

    by_agent: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: dict[Hashable, int] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    warned: set[str] = field(default_factory=set)
    """What was warned of already: once a run is enough."""
    _since: float = field(default_factory=time.perf_counter)

    def add(self, agent: str, what: str, amount: float) -> None:
        """Add to an agent's `macs`, `sent`, `received` or `absorbing`."""
        page = self.by_agent.setdefault(agent, {"macs": 0, "sent": 0, "received": 0, "receiving": 0})
        page[what] = page.get(what, 0) + amount

    def transfer(self, sender: str, receiver: str, size: int) -> None:
        """Bytes that went from one agent to another."""
        self.add(sender, "sent", size)
        self.add(receiver, "received", size)

    def charge_work(self, agent: str, kind: Hashable, do: Callable[[], T]) -> T:
        """Do some work of a measured kind on an agent's account; an unknown kind is measured while it is done."""
        result = self.measure(kind, do)
        self.charge(agent, kind)
        return result

    def measure(self, kind: Hashable, do: Callable[[], T]) -> T:
        """Do some work on nobody's account yet."""
        if kind in self.measured:
            return do()
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            result = do()
        self.measured[kind] = counter.get_total_flops() // 2
        return result

    def charge(self, agent: str, kind: Hashable) -> None:
        """Put work of a kind that was measured on an agent's account."""
        self.add(agent, "macs", self.measured[kind])
        if isinstance(kind, tuple) and kind[0] == "absorb":
            self.add(agent, "receiving", self.measured[kind])

    def clock(self) -> float:
        """Seconds of this run so far, with those of the runs it resumes."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        return self.seconds

    def total(self, what: str) -> int:
        return int(sum(page[what] for page in self.by_agent.values()))

    def costs(self) -> dict[str, Any]:
        """macs, bytes (sent), seconds, steps, and the pages by agent."""
        return {
            "macs": self.total("macs"),
            "bytes": self.total("sent"),
            "seconds": round(self.clock(), 3),
            "steps": self.steps,
            "by_agent": {
                a: {k: int(v) for k, v in page.items()} for a, page in sorted(self.by_agent.items())
            },
        }
