"""Merge trained models: `merge` for checkpoints of any size, and tools to choose how and which ones to merge.

Nothing here imports torch before it is called.

>>> from consilience import merging
>>> merging.__all__[:4]
['choose', 'diagnose', 'disentanglement', 'explore']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from consilience.core.errors import unknown

if TYPE_CHECKING:
    from consilience.merging._analysis import disentanglement, transfer_matrix
    from consilience.merging._choose import choose
    from consilience.merging._diagnose import diagnose
    from consilience.merging._explore import explore, greedy_soup
    from consilience.merging._stream import fold_normalisation, merge

__all__ = [
    "choose",
    "diagnose",
    "disentanglement",
    "explore",
    "fold_normalisation",
    "greedy_soup",
    "merge",
    "transfer_matrix",
]
# Imported at first use, so that the command line can name these functions without torch.
_WHERE = {
    "choose": "_choose",
    "diagnose": "_diagnose",
    "disentanglement": "_analysis",
    "explore": "_explore",
    "fold_normalisation": "_stream",
    "greedy_soup": "_explore",
    "merge": "_stream",
    "transfer_matrix": "_analysis",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"consilience.merging.{_WHERE[name]}"), name)
    raise AttributeError(str(unknown("name", name, __all__)))
