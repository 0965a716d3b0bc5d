"""Agents that share what they learn: banks in files, names that mean the same, tasks made of old ones, and what it all costs.

Nothing here imports torch before it is called.

>>> from consilience import skill
>>> skill.__all__
['Speedup', 'bank_hash', 'combine', 'covariance_macs', 'deal', 'equivalences', 'familiarity', 'give', 'load_bank', 'newcomer',
 'offer', 'save_bank', 'similarities', 'speedup', 'speedups', 'table', 'task_bytes', 'told_bytes']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from consilience.core.errors import unknown

if TYPE_CHECKING:
    from consilience.corrections.similarity import similarities
    from consilience.skill._bank import (
        bank_hash,
        familiarity,
        give,
        load_bank,
        newcomer,
        offer,
        save_bank,
        told_bytes,
    )
    from consilience.skill._costs import Speedup, covariance_macs, deal, speedup, speedups, table, task_bytes
    from consilience.skill._synergy import combine, equivalences

__all__ = [
    "Speedup",
    "bank_hash",
    "combine",
    "covariance_macs",
    "deal",
    "equivalences",
    "familiarity",
    "give",
    "load_bank",
    "newcomer",
    "offer",
    "save_bank",
    "similarities",
    "speedup",
    "speedups",
    "table",
    "task_bytes",
    "told_bytes",
]
_WHERE = {
    **dict.fromkeys(
        ("bank_hash", "familiarity", "give", "load_bank", "newcomer", "offer", "save_bank", "told_bytes"),
        "_bank",
    ),
    **dict.fromkeys(
        ("Speedup", "covariance_macs", "deal", "speedup", "speedups", "table", "task_bytes"), "_costs"
    ),
    **dict.fromkeys(("combine", "equivalences", "similarities"), "_synergy"),
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"consilience.skill.{_WHERE[name]}"), name)
    raise AttributeError(str(unknown("name", name, __all__)))


def __dir__() -> list[str]:
    return __all__
