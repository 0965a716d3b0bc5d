"""Engines: they run the steps of visits. Methods never see them. Signatures import no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilience import lazy
from consilience.core.errors import ConsilienceError, suggest_arguments

if TYPE_CHECKING:
    from consilience.engines._batched import Batched
    from consilience.engines._ray import Ray
    from consilience.engines._serial import Serial
    from consilience.loop.engine import Engine

NAMES = ("serial", "batched", "ray", "auto")
"""The engines that `run(engine=...)` knows by name."""

__all__ = ["auto", "batched", "by_name", "ray", "serial"]


# Engines are imported where they are made, so that the command line starts without torch.


def by_name(name: str) -> Engine:
    """Make an engine with its defaults.

    >>> by_name("fast")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `engine` must be one of serial, batched, ray, auto, got 'fast'.
    """
    if name not in NAMES:
        raise ConsilienceError(f"`engine` must be one of {', '.join(NAMES)}, got {name!r}.")
    engine: Engine = globals()[name]()
    return engine


def serial() -> Serial:
    """Run one agent after another, one step after another; a run can stop at every step."""
    from consilience.engines._serial import Serial

    return Serial()


def batched(chunk: int | None = None, compiled: bool | None = None) -> Batched:
    """Stack agents that train alike on a leading dimension: one program takes the step of all of them.

    Args:
        chunk: how many are stacked at most; None: as many as fit into a fraction of the free memory.
        compiled: whether programs are compiled by torch.compile, which takes seconds for each; None: only
            those that run long on a GPU.
    """
    from consilience.engines._batched import Batched

    return Batched(chunk, compiled)


def auto() -> Batched:
    """Stack agents where that is faster, else run them one after another; the log says which.

    Stacking is faster where several agents train alike, their models are small, and they take many steps.
    """
    from consilience.engines._batched import Batched

    return Batched(auto=True)


def ray(
    workers: int | None = None, address: str | None = None, cpus: float = 1, gpus: float = 0, retries: int = 3
) -> Ray:
    """Run agents as tasks of Ray, on one machine or a cluster; results equal those of "serial" to the bit.

    Args:
        workers: how many agents train at once; None: as many as there are CPUs (and GPUs) for.
        address: of a cluster, or "auto" for one that runs on this machine; None: start a Ray here, and stop
            it at the end of the run (where `RAY_ADDRESS` is set, that cluster is used). A Ray that is already
            running in this process is used, and left running.
        cpus: CPUs per agent.
        gpus: GPUs per agent: 0.25 lets four share one.
        retries: how often a visit starts again after its worker died (killed, out of memory, a lost machine).
    """
    from consilience.engines._ray import Ray

    return Ray(workers, address, cpus, gpus, retries)


if not TYPE_CHECKING:
    __getattr__ = lazy.suggest(__name__)
    suggest_arguments(__name__)
