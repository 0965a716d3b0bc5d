"""Engines: who runs the steps of a learn. They never show to a method. Signatures import no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.engines._batched import Batched
    from consilience.engines._serial import Serial

NAMES = ("serial", "batched", "auto")
"""Those that `run(engine=...)` knows by name."""

__all__ = ["auto", "batched", "serial"]


def serial() -> Serial:
    """One agent after another, one step after another; stoppable at every step."""
    from consilience.engines._serial import Serial

    return Serial()


def batched(chunk: int | None = None, compiled: bool | None = None) -> Batched:
    """Many agents that learn alike, stacked on a leading dimension: one program a step for all of them.

    Args:
        chunk: how many are stacked at most; None: as many as fit in a part of the memory that is free.
        compiled: whether programs go through torch.compile (seconds, once for each); None: those that run long.
    """
    from consilience.engines._batched import Batched

    return Batched(chunk, compiled)


def auto() -> Batched:
    """Batched where several agents learn alike and their models are small, else serial; the log says which."""
    from consilience.engines._batched import Batched

    return Batched(auto=True)
