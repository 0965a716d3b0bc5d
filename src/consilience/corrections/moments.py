"""Sums of features: the statistics behind ridge heads, nearest means, LDA and Mahalanobis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.core.contexts import Context, Learned
from consilience.core.correction import Correction
from consilience.core.message import Statistics


@dataclass(frozen=True)
class Moments(Correction):
    """A = sum psi psi^T [d+1, d+1], b = sum psi e_y^T [d+1, C], n_c [C], in float64, psi being the features and a one.

    They add over sources, batches and clients; subtracting a client's removes it exactly. Sums can leak rare samples: they
    are not private.
    """

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        def psi(x: Tensor) -> Tensor:
            f = learned.model.features(learned.params, learned.buffers, x, learned.task).double()
            return torch.cat([f, f.new_ones(len(f), 1)], 1)

        return Statistics(learned.sums(psi))
