"""Mappers that need nothing but the experts' own answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.contexts import Memory, Routing
from consilience.core.correction import Mapper
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class Oracle(Mapper):
    """The true task is given at evaluation, and experts of that task share the weight. An upper bound."""

    needs_label: ClassVar[bool] = True

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        """Return equal weights: the experts of other tasks are left out before, where there is a label."""
        return Average().route(routing, memory)


@dataclass(frozen=True)
class Average(Mapper):
    """weights = 1 / experts: the ensemble's mean of class probabilities."""

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        # In float64: weights of many experts must still sum to 1.
        shape = (len(routing.x), len(routing.experts))
        return torch.full(shape, 1 / len(routing.experts), dtype=torch.float64, device=routing.x.device)


@dataclass(frozen=True)
class MinEntropy(Mapper):
    """The expert with the least entropy -sum p log p of its class probabilities, over the log of its classes.

    An expert of a single class is never certain: it counts as 1. Of equal entropies the first expert's wins.
    An input whose least entropy is above `unknown` belongs to no expert; at 1 every input belongs to one.

    >>> one, two = torch.ones(2, 1), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    >>> routing = Routing(torch.zeros(2, 1), lambda: one, lambda: [one, two], [("a", "one"), ("a", "two")])
    >>> MinEntropy().route(routing, {}).tolist(), MinEntropy(0.9).route(routing, {}).tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]])
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    instead: ClassVar[str] = "use the average mapper"

    unknown: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.unknown <= 1:
            raise ConsilienceError(f"`unknown` must be in (0, 1], got {self.unknown}.")

    @property
    def rejects(self) -> bool:
        return self.unknown < 1

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        scores = []
        for p in routing.probabilities():
            # p log p is 0 at p = 0.
            entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(1)
            # The largest entropy grows with the number of classes; over its log experts can be compared.
            scores.append(entropy / math.log(p.shape[1]) if p.shape[1] > 1 else torch.ones_like(entropy))
        least, best = torch.stack(scores, 1).min(1)
        weights = F.one_hot(best, len(scores)).to(scores[0].dtype)
        return weights * (least <= self.unknown)[:, None] if self.rejects else weights
