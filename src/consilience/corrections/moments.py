"""Sums of features: the statistics behind ridge heads, nearest means, LDA and Mahalanobis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from consilience.core.correction import Correction, Learned, Me
from consilience.core.message import Statistics


@dataclass(frozen=True)
class Moments(Correction):
    """A = sum psi psi^T [d+1, d+1], b = sum psi e_y^T [d+1, C], n_c [C], in float64, psi being the features and a one.

    They add over sources, batches and clients; subtracting a client's removes it exactly. Sums can leak rare samples: they
    are not private.
    """

    def summarise(self, learned: Learned, me: Me) -> Statistics:
        classes = len(learned.source.labels)
        second: torch.Tensor | None = None
        first = count = torch.zeros(0)
        for x, y in learned.source.train.chunks(1024):
            with torch.no_grad():
                psi = learned.model.features(learned.params, learned.buffers, x, learned.task).double()
            psi = torch.cat([psi, psi.new_ones(len(psi), 1)], 1)
            hot = y.double() if learned.source.kind == "value" else F.one_hot(y, classes).double()
            a, b, n = psi.T @ psi, psi.T @ hot, hot.sum(0) if learned.source.kind == "class" else hot.new_tensor([len(y)])
            second, first, count = (a, b, n) if second is None else (second + a, first + b, count + n)
        assert second is not None
        return Statistics({"second": second, "first": first, "count": count})
