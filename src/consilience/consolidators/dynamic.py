"""FedDyn's server: the average minus a running sum of what the clients moved by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.message import Message
from consilience.core.model import Model
from consilience.core.optimiser import Optimiser, OptimiserState
from consilience.core.schedule import ScheduleFacts
from consilience.core.state import State
from consilience.core.weight_space import WeightSpace, message_weights, with_weights


@dataclass(frozen=True)
class Drift(Optimiser):
    """An outer step with memory: u += share x g, direction g + u.

    g is theta minus the mean of the received parameters, `share` their part of all weights.

    >>> direction, state = Drift(0.5).update(torch.ones(1), {"drift": torch.zeros(1)}, torch.zeros(1))
    >>> direction.tolist(), state["drift"].tolist()
    ([1.5], [0.5])
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConsilienceError(f"`share` of Drift must be in (0, 1], got {self.share}.")

    def init(self, theta: Tensor) -> OptimiserState:
        return {"drift": torch.zeros_like(theta)}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        u = state["drift"] + self.share * grad
        return grad + u, {"drift": u}


@dataclass(frozen=True)
class Dynamic(WeightSpace):
    """FedDyn: u <- u + sum_i w_i (theta - theta_i) / sum_j w_j, then theta <- mean_i theta_i - u.

    i runs over the agents that are received, j over all that may send (`Exchange.totals`; those received,
    where a schedule has none). u is the paper's h / alpha, and alpha cancels. The weights w are those of the
    mean, so that it ends at the optimum of the loss that the mean weighs by: with sizes sum_i n_i f_i, and
    without them sum_i f_i, the paper's. Clients need the correction `FedDyn`. Acar et al. 2021,
    arXiv:2111.04263.
    """

    total: float | None = None
    """sum_j w_j, which the loop fills in before an exchange."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outer is not None or self.lr != 1:
            raise ConsilienceError(
                "`outer` of Dynamic must be None and `lr` 1, because its step is FedDyn's, "
                f"got {self.outer!r} and {self.lr}."
            )
        if self.total is not None and not 0 < self.total < float("inf"):
            raise ConsilienceError(f"`total` of Dynamic must be positive and finite, got {self.total}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if self.robust:
            return (
                f"{type(self.aggregator).__name__} leaves out some of what is received, and FedDyn's server "
                "adds up all of it; use feddyn's own mean"
            )
        if not facts.totals:
            return (
                "FedDyn's server counts all agents that may send, also those that do not in a round: they "
                "must send to one server, and the schedule must say what they weigh (Exchange.totals); use "
                "federated, or fedprox"
            )
        return super().refuse(facts)

    def among(self, total: float | None) -> Dynamic:
        return replace(self, total=total)

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        trained = [m for m in with_weights(fresh) if m.trained]
        share = 1.0
        if trained and self.total is not None:
            share = min(1.0, sum(message_weights(trained, by_size)) / self.total)
        step = WeightSpace(self.aggregator, Drift(share))
        return step.receive(model, state, fresh, by_size, generator)
