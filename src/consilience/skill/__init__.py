"""Agents that share modules: banks in files, classes that mean the same, tasks of old classes, and costs.

Nothing here imports torch before it is called.

>>> from consilience import skill
>>> skill.__all__[:6]
['Speedup', 'bank_hash', 'combine', 'covariance_macs', 'deal', 'equivalences']
>>> skill.__all__[6:12]
['familiarity', 'give', 'load_bank', 'message_bytes', 'newcomer', 'offer']
>>> skill.__all__[12:]
['save_bank', 'similarities', 'speedup', 'speedups', 'table', 'task_bytes']
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilience import lazy

# Everything loads when it is first used, since torch takes seconds to load.
if TYPE_CHECKING:
    from consilience.corrections.similarity import similarities as similarities
    from consilience.skill._bank import bank_hash as bank_hash
    from consilience.skill._bank import familiarity as familiarity
    from consilience.skill._bank import give as give
    from consilience.skill._bank import load_bank as load_bank
    from consilience.skill._bank import message_bytes as message_bytes
    from consilience.skill._bank import newcomer as newcomer
    from consilience.skill._bank import offer as offer
    from consilience.skill._bank import save_bank as save_bank
    from consilience.skill._costs import Speedup as Speedup
    from consilience.skill._costs import covariance_macs as covariance_macs
    from consilience.skill._costs import deal as deal
    from consilience.skill._costs import speedup as speedup
    from consilience.skill._costs import speedups as speedups
    from consilience.skill._costs import table as table
    from consilience.skill._costs import task_bytes as task_bytes
    from consilience.skill._synergy import combine as combine
    from consilience.skill._synergy import equivalences as equivalences
else:
    __getattr__, __dir__ = lazy.attach(__name__)

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
    "message_bytes",
    "newcomer",
    "offer",
    "save_bank",
    "similarities",
    "speedup",
    "speedups",
    "table",
    "task_bytes",
]
