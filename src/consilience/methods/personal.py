"""Methods in which clients keep entries of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.method import Method


def fedweit(sparsity: float = 0.001, drift: float = 100.0, prune: float = 0.001) -> Method:
    """FedWeIt: a task masks the shared parameters and adds its own sparse ones and a sum of other clients'.

    It needs task labels, and trains with Adam at lr 3.3e-4 in the paper (`Training(optimiser="adam",
    lr=3.3e-4)`).

    Paper: Yoon et al. 2021.

    Args:
        sparsity: of the L1 norms of the mask and of a task's own parameters (lambda_1).
        drift: of the squared distance by which earlier tasks' parameters move (lambda_2).
        prune: own entries of a task that are not larger than this are set to 0 after training, and are not
            sent.
    """
    from consilience.core.method import Method
    from consilience.corrections.fedweit import FedWeIt

    return Method("fedweit", (FedWeIt(sparsity, drift, prune),), personal=("fedweit/*",))


def personal(patterns: str | Sequence[str] = "head") -> Method:
    """Entries that stay with their client: each keeps its own, and all else is averaged.

    With the head it is FedPer; with the norms, such as `personal("*norm*")`, FedBN. The server keeps its
    initial ones, so the score on a client's source is that of its own model: its entries over the server's
    (`Result.agents` has them). A head in closed form is made by the server, so it cannot be personal.

    Paper: Arivazhagan et al. 2019 (FedPer); Li et al. 2021 (FedBN).

    Args:
        patterns: shell patterns of names of entries and buffers; "head" is the model's head, or each task's.
    """
    from consilience.core.errors import ConsilienceError
    from consilience.core.method import Method

    own = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not own or any(not isinstance(pattern, str) or not pattern for pattern in own):
        raise ConsilienceError(
            f"`patterns` must be names of entries, such as 'head', got `patterns = {patterns!r}`."
        )
    return Method("personal", personal=own)
