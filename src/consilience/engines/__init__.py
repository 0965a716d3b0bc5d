"""Engines: who runs the steps of a learn. They never show to a method. Signatures import no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.engines._batched import Batched
    from consilience.engines._ray import Ray
    from consilience.engines._serial import Serial

NAMES = ("serial", "batched", "ray", "auto")
"""Those that `run(engine=...)` knows by name."""

__all__ = ["auto", "batched", "ray", "serial"]


def serial() -> Serial:
    """One agent after another, one step after another; stoppable at every step."""
    from consilience.engines._serial import Serial

    return Serial()


def batched(chunk: int | None = None, compiled: bool | None = None) -> Batched:
    """Many agents that learn alike, stacked on a leading dimension: one program a step for all of them.

    Args:
        chunk: how many are stacked at most; None: as many as fit in a part of the memory that is free.
        compiled: whether programs go through torch.compile (seconds, once for each); None: on a GPU, those that run long.
    """
    from consilience.engines._batched import Batched

    return Batched(chunk, compiled)


def auto() -> Batched:
    """Batched where several agents learn alike, their models are small, and they take many steps, else serial; the log says which."""
    from consilience.engines._batched import Batched

    return Batched(auto=True)


def ray(
    workers: int | None = None, address: str | None = None, cpus: float = 1, gpus: float = 0, retries: int = 3
) -> Ray:
    """Agents as tasks of Ray, on one machine or a cluster; what is learned is the same as with "serial", to the bit.

    Args:
        workers: how many learn at once; None: as many as there are CPUs (and GPUs) for.
        address: of a cluster, "auto" for one that runs on this machine; None starts a Ray here, and stops it at the end of the run
            (where `RAY_ADDRESS` is set, that cluster is used). A Ray that was started before is used, and left running.
        cpus: of each agent that learns.
        gpus: of each agent that learns: 0.25 lets four share one.
        retries: how often an agent whose worker died (killed, out of memory, a lost machine) begins its learn again.
    """
    from consilience.engines._ray import Ray

    return Ray(workers, address, cpus, gpus, retries)
