"""Methods in which clients keep something to themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.method import Method


def fedweit(sparsity: float = 0.001, drift: float = 100.0, prune: float = 0.001) -> Method:
    """Each task masks the shared parameters, and adds sparse ones of its own and a weighed sum of those that other clients told.

    It needs task labels, and trains with Adam at lr 3.3e-4 in the paper (`Training(optimiser="adam", lr=3.3e-4)`).

    Paper: Yoon et al. 2021.

    Args:
        sparsity: of the L1 norms of the mask and of what is a task's own (lambda_1).
        drift: of the squared distance by which earlier tasks' parameters move (lambda_2).
        prune: entries of a task's own that are not larger are left out once it is learned, also in what is told.
    """
    from consilience.core.method import Method
    from consilience.corrections.fedweit import FedWeIt

    return Method("fedweit", (FedWeIt(sparsity, drift, prune),), personal=("fedweit/*",))


def personal(patterns: str | Sequence[str] = "head") -> Method:
    """Entries that stay with their client: each keeps its own, and all else is averaged.

    With the head it is FedPer; with the norms, such as `personal("*norm*")`, FedBN. The server keeps the first ones: a client is
    judged by its own where it is the evaluated agent. Not for a head in closed form, which the server makes.

    Paper: Arivazhagan et al. 2019 (FedPer); Li et al. 2021 (FedBN).

    Args:
        patterns: shell patterns of names of entries and buffers; "head" is the model's head, or each task's.
    """
    from consilience.core.errors import ConsilienceError
    from consilience.core.method import Method

    own = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not own or any(not isinstance(p, str) or not p for p in own):
        raise ConsilienceError(
            f"`patterns` should be names of entries, such as 'head'. Found `patterns = {patterns!r}`."
        )
    return Method("personal", personal=own)
