"""Mappers that need nothing but the experts' own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.correction import Mapper, Memory, Routing
from consilience.core.errors import ConsilienceError
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
    """The expert with the least entropy -sum p log p of its class probabilities, over the log of its number of classes.

    An input for which even that is above `unknown` belongs to no expert; at 1 every input belongs to one.
    """

    unknown: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.unknown <= 1:
            raise ConsilienceError(f"`unknown` should be in (0, 1]. Found `unknown = {self.unknown}`.")

    def refuse(self, facts: Facts) -> str | None:
        return "values have no entropy to compare; use the average" if facts.kind == "value" else None

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        scores = []
        for p in routing.probabilities():
            entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(1)
            scores.append(entropy / max(torch.log(torch.tensor(float(p.shape[1]))).item(), 1e-12))
        least, best = torch.stack(scores, 1).min(1)
        weights = F.one_hot(best, len(scores)).to(scores[0].dtype)
        return weights if self.unknown >= 1 else weights * (least <= self.unknown)[:, None]
