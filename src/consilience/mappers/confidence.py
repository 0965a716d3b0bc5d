"""Mappers that need nothing but the experts' own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.correction import Mapper, Memory, Routing
from consilience.core.schedule import Facts


@dataclass(frozen=True)
class Oracle(Mapper):
    """The true task is told at evaluation; experts of that task share the weight. An upper bound."""

    needs_label: ClassVar[bool] = True

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        """Without a label all experts weigh the same."""
        return Average().route(routing, memory)


@dataclass(frozen=True)
class Average(Mapper):
    """weights = 1 / experts: the ensemble's mean of class probabilities."""

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        shape = (len(routing.x), len(routing.experts))
        return torch.full(shape, 1 / len(routing.experts), dtype=torch.float64, device=routing.x.device)


@dataclass(frozen=True)
class MinEntropy(Mapper):
    """The expert with the least entropy -sum p log p of its class probabilities, over the log of its number of classes."""

    def refuse(self, facts: Facts) -> str | None:
        return "values have no entropy to compare; use the average" if facts.kind == "value" else None

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        scores = []
        for p in routing.probabilities():
            entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(1)
            scores.append(entropy / max(torch.log(torch.tensor(float(p.shape[1]))).item(), 1e-12))
        best = torch.stack(scores, 1).argmin(1)
        return F.one_hot(best, len(scores)).to(scores[0].dtype)
