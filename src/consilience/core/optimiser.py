"""Optimisers: pure init and update on flat vectors, equal to torch.optim's."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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


def _fractions(**values: float) -> None:
    """Refuse decay rates outside [0, 1)."""
    for name, v in values.items():
        if not 0 <= v < 1:
            raise ConsilienceError(f"`{name}` should be in [0, 1). Found `{name} = {v}`.")


def _positive(**values: float) -> None:
    """Refuse what is not positive and finite."""
    for name, v in values.items():
        if not 0 < v < float("inf"):
            raise ConsilienceError(f"`{name}` should be positive and finite. Found `{name} = {v}`.")


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
        _fractions(momentum=self.momentum)

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

    def __post_init__(self) -> None:
        _fractions(beta1=self.beta1, beta2=self.beta2)
        if not 0 <= self.eps < float("inf"):
            raise ConsilienceError(f"`eps` should be >= 0 and finite. Found `eps = {self.eps}`.")

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
        c1, c2 = (
            (1 - self.beta1**t, 1 - self.beta2**t)
            if self.corrected
            else (torch.ones_like(t), torch.ones_like(t))
        )
        direction = m / (v.sqrt() / c2.sqrt().to(v.dtype) + self.eps) / c1.to(v.dtype)
        if self.weight_decay and self.decoupled:
            direction = direction + self.weight_decay * theta
        return direction, {"mean": m, "square": v, "step": t}


@dataclass(frozen=True)
class Adagrad(Optimiser):
    """Adagrad: v += g^2, m = beta1 m + (1 - beta1) g, direction m / (sqrt(v) + tau). Reddi et al. 2021 (FedAdagrad, with beta1 = 0).

    v begins at 0, as torch's does, whose `eps` is tau (the paper's begins at tau^2 at least).

    >>> Adagrad(tau=1.0).update(torch.tensor([3.0]), {"square": torch.zeros(1)}, torch.zeros(1))[0].tolist()
    [0.75]
    """

    tau: float = 1e-3
    beta1: float = 0.0

    def __post_init__(self) -> None:
        _positive(tau=self.tau)
        _fractions(beta1=self.beta1)

    def init(self, theta: Tensor) -> OptimiserState:
        return {"square": torch.zeros_like(theta)} | ({"mean": torch.zeros_like(theta)} if self.beta1 else {})

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        new = {"square": state["square"] + grad * grad}
        m = grad
        if self.beta1:
            m = new["mean"] = torch.lerp(state["mean"], grad, 1 - self.beta1)
        return m / (new["square"].sqrt() + self.tau), new


@dataclass(frozen=True)
class Yogi(Optimiser):
    """Yogi: v -= (1 - beta2) g^2 sign(v - g^2), m = beta1 m + (1 - beta1) g, direction m / (sqrt(v) + tau), without bias correction.

    v moves by a part of g^2, where Adam's moves by a part of g^2 - v: it forgets slowly. Zaheer et al. 2018; Reddi et al. 2021 (FedYogi).

    >>> Yogi(0.0, 0.75, tau=1.0).update(torch.tensor([2.0]), Yogi().init(torch.zeros(1)), torch.zeros(1))[0].tolist()
    [1.0]
    """

    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _fractions(beta1=self.beta1, beta2=self.beta2)
        _positive(tau=self.tau)

    def init(self, theta: Tensor) -> OptimiserState:
        return {"mean": torch.zeros_like(theta), "square": torch.zeros_like(theta)}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        m = torch.lerp(state["mean"], grad, 1 - self.beta1)
        square = grad * grad
        v = state["square"] - (1 - self.beta2) * square * torch.sign(state["square"] - square)
        return m / (v.sqrt() + self.tau), {"mean": m, "square": v}


@dataclass(frozen=True)
class Dynamic(Optimiser):
    """FedDyn's server: u += participation x g, direction g + u.

    With g = theta - mean of those heard, u is the paper's h / alpha: h = h - alpha / m sum over those heard of (theta_i - theta), and
    theta = mean - h / alpha, m being the number of all clients and `participation` the fraction of them that is heard at once;
    alpha cancels. Acar et al. 2021.

    >>> direction, state = Dynamic(0.5).update(torch.ones(1), {"drift": torch.zeros(1)}, torch.zeros(1))
    >>> direction.tolist(), state["drift"].tolist()
    ([1.5], [0.5])
    """

    participation: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.participation <= 1:
            raise ConsilienceError(
                f"`participation` should be in (0, 1]. Found `participation = {self.participation}`."
            )

    def init(self, theta: Tensor) -> OptimiserState:
        return {"drift": torch.zeros_like(theta)}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        u = state["drift"] + self.participation * grad
        return grad + u, {"drift": u}


@dataclass(frozen=True)
class Averaging(Optimiser):
    """The running mean as an outer optimiser: theta + (aggregate - theta) / t at the t-th absorption."""

    def init(self, theta: Tensor) -> OptimiserState:
        return {"step": torch.zeros((), dtype=torch.float64, device=theta.device)}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        t = state["step"] + 1
        return grad / t.to(grad.dtype), {"step": t}


@dataclass(frozen=True)
class Torch(Optimiser):
    """One of torch.optim's optimisers by its class name, such as "RAdam", with its arguments: its direction is what it moves theta by.

    `arguments` are pairs (name, value); `lr` is 1 where they do not name it, so that the outer learning rate scales its step. Its
    state is kept as named tensors. Raises ConsilienceError for what torch.optim lacks, what needs a closure (LBFGS), what
    refuses the arguments, and what does not work on a dense vector (Muon, SparseAdam).

    >>> Torch("SGD").update(torch.ones(2), Torch("SGD").init(torch.zeros(2)), torch.zeros(2))[0].tolist()
    [1.0, 1.0]
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        kind = getattr(torch.optim, self.name, None) if isinstance(self.name, str) else None
        if (
            not isinstance(kind, type)
            or not issubclass(kind, torch.optim.Optimizer)
            or kind is torch.optim.Optimizer
        ):
            raise ConsilienceError(f"an optimiser should be a class of torch.optim. Found {self.name!r}.")
        if inspect.signature(kind.step).parameters["closure"].default is inspect.Parameter.empty:
            raise ConsilienceError(
                f"an optimiser should step by a gradient alone. Found {self.name!r}, which needs a closure."
            )
        try:
            self._step(torch.zeros(2), torch.zeros(2), {})
        except (TypeError, ValueError, RuntimeError) as e:
            raise ConsilienceError(
                f"torch.optim.{self.name} should take a vector and its arguments {dict(self.arguments)}. Found: {e}."
            ) from e

    def _step(
        self, grad: Tensor, theta: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, OptimiserState]:
        p = torch.nn.Parameter(theta.detach().clone())
        optimiser = getattr(torch.optim, self.name)([p], **{"lr": 1.0, **dict(self.arguments)})
        if state:
            optimiser.state[p] = {k: (t if t.dim() else t.cpu()).clone() for k, t in state.items()}
        p.grad = grad.detach().clone()
        optimiser.step()
        kept = {k: v for k, v in optimiser.state[p].items() if v is not None}
        tensors = {
            k: v.detach() if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64)
            for k, v in kept.items()
        }
        return p.detach(), tensors

    def init(self, theta: Tensor) -> OptimiserState:
        """The names and shapes of its state, and "new" = 1 until the first step makes it."""
        _, names = self._step(torch.zeros_like(theta), theta, {})
        return {k: torch.zeros_like(t) for k, t in names.items()} | {"new": torch.ones(())}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        held = {} if state["new"] else {k: t for k, t in state.items() if k != "new"}
        end, kept = self._step(grad, theta, held)
        return theta - end, kept | {"new": torch.zeros_like(state["new"])}
