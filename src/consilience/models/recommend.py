"""Recommendation: embedding tables of sparse ids, one trunk, a tower per task, and ESMM's chain.

Names of classes and of public attributes are part of `models.module.structure` and of backbone hashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def chained(first: Tensor, then: Tensor) -> Tensor:
    """Return the logit of sigmoid(first) sigmoid(then), exact where a factor is near 0 or 1.

    >>> float(chained(torch.tensor(0.0), torch.tensor(0.0)).sigmoid())
    0.25
    """
    log = F.logsigmoid(first) + F.logsigmoid(then)
    # log(1 - p) of p = e^log: 1 - ab = (1 - a) + a (1 - b), of which neither term cancels.
    rest = torch.logaddexp(F.logsigmoid(-first), F.logsigmoid(first) + F.logsigmoid(-then))
    return log - rest


class Recommender(nn.Module):
    """ids [B, tables] and numbers [B, d] -> {task: outputs [B, k]}.

    Ids are looked up in embedding tables, put next to the numbers, and pass a trunk of ReLU layers; each task
    has a tower. With `chain` (a, b) the tower of b gives the logit of b after a, and b answers the logit of
    P(a) P(b after a).
    """

    def __init__(
        self,
        ids: Sequence[int],
        numbers: int,
        widths: Mapping[str, int],
        chain: tuple[str, str] | None,
        embedding: int,
        hidden: Sequence[int],
    ) -> None:
        super().__init__()
        self.tasks, self.chain = list(widths), chain
        # Dense gradients: optimisers move whole tables, as they move all other entries.
        self.tables = nn.ModuleList(nn.Embedding(rows, embedding) for rows in ids)
        size, layers = len(ids) * embedding + numbers, []
        for width in hidden:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.trunk = nn.Sequential(*layers)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, k)) for k in widths.values()
        )

    def forward(self, ids: Tensor, numbers: Tensor | None = None) -> dict[str, Tensor]:
        parts = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        h = self.trunk(torch.cat(parts if numbers is None else [*parts, numbers], 1))
        found = {task: tower(h) for task, tower in zip(self.tasks, self.towers, strict=True)}
        # The tower of the second stays a rate after the first: only its product with the first is trained.
        if self.chain is not None:
            first, then = self.chain
            found[then] = chained(found[first], found[then])
        return found
