"""Consilience: learning from heterogeneous sources, with one loop for tasks, time, places and trained models.

>>> import consilience as cs
>>> cs.__version__
'0.2.0'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from consilience.version import __version__ as __version__

_ROOMS = (
    "aggregators",
    "consolidators",
    "corrections",
    "data",
    "engines",
    "mappers",
    "memory",
    "merging",
    "methods",
    "models",
    "report",
    "settings",
    "skill",
)
_NAMES = {
    "ConsilienceError": "core.errors",
    "Expert": "core.schedule",
    "LabelFrame": "core.source",
    "Interrupted": "core.errors",
    "Message": "core.message",
    "Method": "core.method",
    "Refusal": "core.errors",
    "Result": "api",
    "Source": "core.source",
    "Training": "core.training",
    "merge": "merging._stream",
    "run": "api",
    "sweep": "api",
}

if TYPE_CHECKING:
    from consilience import (
        aggregators,
        consolidators,
        corrections,
        data,
        engines,
        mappers,
        memory,
        merging,
        methods,
        models,
        report,
        settings,
        skill,
    )
    from consilience.api import Result, run, sweep
    from consilience.core.errors import ConsilienceError, Interrupted, Refusal
    from consilience.core.message import Message
    from consilience.core.method import Method
    from consilience.core.schedule import Expert
    from consilience.core.source import LabelFrame, Source
    from consilience.core.training import Training
    from consilience.merging import merge

__all__ = [
    "ConsilienceError",
    "Expert",
    "Interrupted",
    "LabelFrame",
    "Message",
    "Method",
    "Refusal",
    "Result",
    "Source",
    "Training",
    "aggregators",
    "consolidators",
    "corrections",
    "data",
    "engines",
    "mappers",
    "memory",
    "merge",
    "merging",
    "methods",
    "models",
    "report",
    "run",
    "settings",
    "skill",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Rooms and names load when first used, so that importing is quick."""
    if name in _ROOMS:
        return importlib.import_module(f"consilience.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"consilience.{_NAMES[name]}"), name)
    from consilience.core.errors import unknown

    raise AttributeError(str(unknown("name", name, __all__)))


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
