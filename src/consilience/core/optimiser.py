"""Optimisers: pure init and update on flat vectors, equal to torch.optim's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError

OptimiserState = dict[str, Tensor]


class Optimiser(ABC):
    """init(theta [n]) -> state; update(grad [n], state, theta [n]) -> (direction [n], state); theta - lr x direction is the step."""

    elementwise: ClassVar[bool] = True
    """Whether every number is treated alike, so that entries may be updated one by one."""

    @abstractmethod
    def init(self, theta: Tensor) -> OptimiserState: ...

    @abstractmethod
    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]: ...

    def is_identity(self, lr: float) -> bool:
        """Whether a step along -delta lands on what was aggregated, as an outer SGD(1) without momentum does."""
        return False


@dataclass(frozen=True)
class SGD(Optimiser):
    """Stochastic gradient descent: v = momentum v + g, direction v (nesterov: g + momentum v).

    >>> SGD().update(torch.ones(2), {}, torch.zeros(2))[0].tolist()
    [1.0, 1.0]
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConsilienceError(f"`momentum` should be in [0, 1). Found `momentum = {self.momentum}`.")

    def init(self, theta: Tensor) -> OptimiserState:
        return {"velocity": torch.zeros_like(theta)} if self.momentum else {}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        if self.weight_decay:
            grad = grad + self.weight_decay * theta
        if not self.momentum:
            return grad, state
        v = state["velocity"] * self.momentum + grad
        step = grad + self.momentum * v if self.nesterov else v
        return step, {"velocity": v}

    def is_identity(self, lr: float) -> bool:
        return lr == 1.0 and not self.momentum and not self.weight_decay


@dataclass(frozen=True)
class Adam(Optimiser):
    """Adam (Kingma & Ba 2015); with `decoupled`, weight decay as in AdamW; `corrected=False` leaves out the bias correction."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    corrected: bool = True

    def init(self, theta: Tensor) -> OptimiserState:
        return {
            "mean": torch.zeros_like(theta),
            "square": torch.zeros_like(theta),
            "step": torch.zeros((), dtype=torch.float64, device=theta.device),
        }

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        if self.weight_decay and not self.decoupled:
            grad = grad + self.weight_decay * theta
        t = state["step"] + 1
        m = torch.lerp(state["mean"], grad, 1 - self.beta1)
        v = state["square"] * self.beta2 + (1 - self.beta2) * grad * grad
        c1, c2 = (1 - self.beta1**t, 1 - self.beta2**t) if self.corrected else (torch.ones_like(t), torch.ones_like(t))
        direction = m / (v.sqrt() / c2.sqrt().to(v.dtype) + self.eps) / c1.to(v.dtype)
        if self.weight_decay and self.decoupled:
            direction = direction + self.weight_decay * theta
        return direction, {"mean": m, "square": v, "step": t}


@dataclass(frozen=True)
class Averaging(Optimiser):
    """The running mean as an outer optimiser: theta + (aggregate - theta) / t at the t-th absorption."""

    def init(self, theta: Tensor) -> OptimiserState:
        return {"step": torch.zeros((), dtype=torch.float64, device=theta.device)}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        t = state["step"] + 1
        return grad / t.to(grad.dtype), {"step": t}
