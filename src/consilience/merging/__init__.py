"""Merge trained models: `merge` for checkpoints of any size, and tools to choose how and which ones to merge.

Nothing here imports torch before it is called.

>>> from consilience import merging
>>> merging.__all__[:4]
['choose', 'diagnose', 'disentanglement', 'explore']
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilience import lazy

# Everything loads when it is first used, so that the command line can name these functions without torch.
if TYPE_CHECKING:
    from consilience.merging._analysis import disentanglement as disentanglement
    from consilience.merging._analysis import transfer_matrix as transfer_matrix
    from consilience.merging._choose import choose as choose
    from consilience.merging._diagnose import diagnose as diagnose
    from consilience.merging._explore import explore as explore
    from consilience.merging._explore import greedy_soup as greedy_soup
    from consilience.merging._stream import fold_normalisation as fold_normalisation
    from consilience.merging._stream import merge as merge
else:
    __getattr__, __dir__ = lazy.attach(__name__)

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
