"""Gradient vaccine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import StatefulLinear
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class GradVac(StatefulLinear):
    """GradVac: sum_i w_i g_i', where g_i' is g_i turned towards the rows it agrees with less than it used to.

    g_i' starts at g_i; for the others j in a random order, with c = cos(g_i', g_j) and the average s_ij of
    earlier c: if c < s_ij, g_i' += |g_i'| (s sqrt(1 - c^2) - c sqrt(1 - s^2)) / (|g_j| sqrt(1 - s^2)) g_j,
    after which their cosine is s_ij. Then s_ij = (1 - beta) s_ij + beta c. s starts at 0, where it is PCGrad.
    Rows [m, n], weights [m] >= 0 -> [n]. Works on coefficients, from the Gramian alone. Raises
    ConsilienceError for beta outside [0, 1]. Wang et al. 2021, arXiv:2010.05874.

    >>> GradVac()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]])).tolist()
    [0.25, 0.75]
    """

    beta: float = 0.01

    takes_negative_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ConsilienceError(f"`beta` must be in [0, 1], got {self.beta}.")

    def init(self, rows: int) -> dict[str, Tensor]:
        return {"cosines": torch.zeros(rows, rows, dtype=torch.float64)}

    def move_weights(
        self, gram: Tensor, weights: Tensor, state: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        wide, seen = gram.detach().double().cpu(), state["cosines"].cpu().clone()
        count, length = len(weights), wide.diagonal().clamp_min(0).sqrt()
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        draws = torch.rand(count, count, generator=generator, device=generator.device)

        turned = torch.eye(count, dtype=torch.float64)
        for i, order in enumerate(draws.argsort(1).tolist()):
            for j in order:
                own = (turned[i] @ wide @ turned[i]).clamp_min(0).sqrt()
                if j == i or length[j] == 0 or own == 0:
                    continue
                now = ((turned[i] @ wide[j]) / (own * length[j])).clamp(-1, 1)
                goal = seen[i, j]
                if now < goal:
                    more = goal * (1 - now**2).sqrt() - now * (1 - goal**2).sqrt()
                    turned[i, j] += own * more / (length[j] * (1 - goal**2).sqrt())
                seen[i, j] = (1 - self.beta) * goal + self.beta * now
        return (weights.double().cpu() @ turned).to(weights), {"cosines": seen}
