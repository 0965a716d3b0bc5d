"""The ledger: what training and exchanging cost."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar
from weakref import WeakSet

from torch import Tensor

from consilience.core.message import Message
from consilience.core.params import Layout
from consilience.core.source import Examples, Source, Tensors

T = TypeVar("T")

RECEIVE = "receive"
"""The first word of the kinds of work whose MACs are counted as `receiving` too."""

NEAR = 0.01
"""Up to which relative difference two measures of a kind of work are taken for one cost."""


class Cost(NamedTuple):
    """What the measures of a kind of work gave."""

    macs: int
    """By the first measure."""
    state: Literal["new", "exact", "near", "varies"] = "new"
    """Measured once; twice with equal or nearly equal numbers; or to be measured each time."""

    def after(self, macs: int) -> Cost:
        """Return the cost after another measure."""
        if self.state == "varies" or abs(macs - self.macs) > NEAR * max(macs, self.macs):
            return Cost(self.macs, "varies")
        return Cost(self.macs, "exact" if macs == self.macs else "near")


@dataclass
class Ledger:
    """MACs (forward and backward: half of the FLOPs of loop/flops.py), bytes, steps, seconds.

    To count takes longer than a small step, so each kind of work is measured twice, and multiplied
    afterwards; if the two differ, every time. `by_agent` has the `macs`, the serialised bytes `sent` and
    `received`, and the part of `macs` that went into `receiving`.
    """

    by_agent: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: dict[Hashable, Cost] = field(default_factory=dict)
    """By kind of work."""
    seconds: float = 0.0
    steps: int = 0
    visit: dict[str, Any] | None = None
    """What the log says of the last visit that was finished, until the trial has written it."""
    warned: set[str] = field(default_factory=set)
    """Corrections that warned already: once per run is enough."""
    admitted: WeakSet[Message] = field(default_factory=WeakSet, repr=False)
    """Messages whose content was checked already: once per run is enough."""
    _since: float = field(default_factory=time.perf_counter)
    _before: dict[str, Cost] = field(default_factory=dict)
    """What was measured before an interruption, by the text of a kind."""

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
        """Do some work and charge it to an agent."""
        result, macs = self.measure(kind, work)
        self.add(agent, "macs", macs)
        if isinstance(kind, tuple) and kind[0] == RECEIVE:
            self.add(agent, "receiving", macs)
        return result

    def measure(self, kind: Hashable, work: Callable[[], T]) -> tuple[T, int]:
        """Do some work, and return its result and its MACs, which are charged to nobody yet.

        Work of no kind, None, is measured each time.
        """
        known = self.measured.get(kind)
        if known is None and self._before:
            known = self._before.get(repr(kind))
        if known is not None and known.state in ("exact", "near"):
            return work(), known.macs
        # Imported here, since it takes a tenth of a second.
        from consilience.loop.flops import Flops

        with Flops() as counter:
            result = work()
        macs = counter.total // 2
        if kind is not None:
            self.measured[kind] = Cost(macs) if known is None else known.after(macs)
        return result, macs

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
        """Return what a checkpoint keeps."""
        # What is exact is measured again, with the same number.
        unsure = {repr(kind): list(c) for kind, c in self.measured.items() if c.state in ("near", "varies")}
        measured = {**{kind: list(cost) for kind, cost in self._before.items()}, **unsure}
        return {
            "seconds": self.clock(),
            "by_agent": self.by_agent,
            "steps": self.steps,
            "measured": measured,
        }

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Continue from what `kept` gave."""
        self.by_agent, self.seconds, self.steps = facts["by_agent"], facts["seconds"], facts["steps"]
        self._before = {kind: Cost(*cost) for kind, cost in facts.get("measured", {}).items()}


def outline(*values: Any) -> str:
    """Return a digest of what decides the cost of work on these values: types and shapes, not numbers.

    >>> import torch
    >>> outline({"a": torch.ones(2)}) == outline({"b": torch.zeros(2)}) != outline({"a": torch.ones(3)})
    True
    """
    text = repr([_shapes(value) for value in values])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _shapes(value: Any) -> object:
    """Return the shapes of all tensors in a value."""
    kind = type(value)
    reader = _READERS.get(kind)
    if reader is None:
        reader = _READERS[kind] = _reader(kind)
    return reader(value)


_READERS: dict[type, Callable[[Any], object]] = {}
"""By type: what an agent recalls may have hundreds of items."""


def _reader(kind: type) -> Callable[[Any], object]:
    """Return what reads the shapes of a value of this type."""
    if issubclass(kind, Tensor):
        return lambda value: tuple(value.shape)
    if issubclass(kind, Mapping):
        return lambda value: [_shapes(entry) for entry in value.values()]
    if issubclass(kind, list | tuple):
        return lambda value: [_shapes(entry) for entry in value]
    if issubclass(kind, Source):
        return lambda value: (_shapes(value.train), len(value.classes))
    if issubclass(kind, Tensors):
        return lambda value: (len(value), tuple(value.x.shape[1:]))
    if issubclass(kind, Examples):
        return len

    # Which entries are trained decides how far gradients go, so here names count.
    if issubclass(kind, Layout):
        return lambda value: (value.names, value.shapes)
    name = kind.__name__
    if dataclasses.is_dataclass(kind):
        names = [entry.name for entry in dataclasses.fields(kind)]
        return lambda value: (name, [_shapes(getattr(value, entry)) for entry in names])
    # A count or a name is another at every visit, and says nothing of the work.
    return (lambda value: value) if kind in (bool, type(None)) else (lambda value: name)
