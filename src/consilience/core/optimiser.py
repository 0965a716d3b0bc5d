"""Optimisers: pure init and update on flat vectors, equal to torch.optim's."""

from __future__ import annotations

import copy
import difflib
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
    """A rule for steps, theta <- theta - lr x direction. Subclasses are frozen dataclasses."""

    elementwise: ClassVar[bool] = True
    """Whether every number is treated alike, so that entries may be updated one by one."""

    @abstractmethod
    def init(self, theta: Tensor) -> OptimiserState:
        """Return the state before the first step from theta [n]."""

    @abstractmethod
    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        """Return the direction [n] and the new state for a gradient [n]; it changes none of its arguments."""

    def at(self, lr: float) -> tuple[Optimiser, float]:
        """Return the optimiser of a step with this learning rate, and the factor of its direction.

        Most directions do not depend on the learning rate, which is then the factor.
        """
        return self, lr

    def is_identity(self, lr: float) -> bool:
        """Whether a step with gradient theta - aggregate ends at the aggregate, to the bit.

        An outer SGD without momentum at learning rate 1 does; the step is then left out.
        """
        return False


def _fractions(**values: float) -> None:
    """Refuse decay rates outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConsilienceError(f"`{name}` must be in [0, 1), got {value}.")


def _at_least_zero(**values: float) -> None:
    """Refuse values that are negative or not finite."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ConsilienceError(f"`{name}` must be >= 0 and finite, got {value}.")


def _positive(**values: float) -> None:
    """Refuse values that are not positive and finite."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ConsilienceError(f"`{name}` must be positive and finite, got {value}.")


@dataclass(frozen=True)
class SGD(Optimiser):
    """Stochastic gradient descent: v = momentum v + g, direction v (Nesterov: g + momentum v).

    >>> SGD().update(torch.ones(2), {}, torch.zeros(2))[0].tolist()
    [1.0, 1.0]
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _fractions(momentum=self.momentum)
        _at_least_zero(weight_decay=self.weight_decay)
        if not isinstance(self.nesterov, bool):
            raise ConsilienceError(f"`nesterov` must be true or false, got {self.nesterov!r}.")
        if self.nesterov and not self.momentum:
            raise ConsilienceError("`nesterov` has no effect without momentum; give `momentum` too.")

    def init(self, theta: Tensor) -> OptimiserState:
        return {"velocity": torch.zeros_like(theta)} if self.momentum else {}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        if self.weight_decay:
            grad = grad + self.weight_decay * theta
        # Without momentum no state is kept: there may be thousands of clients.
        if not self.momentum:
            return grad, state
        v = state["velocity"] * self.momentum + grad
        direction = grad + self.momentum * v if self.nesterov else v
        return direction, {"velocity": v}

    def is_identity(self, lr: float) -> bool:
        return lr == 1.0 and not self.momentum and not self.weight_decay


@dataclass(frozen=True)
class Adam(Optimiser):
    """Adam (Kingma & Ba 2015).

    With `decoupled`, weight decay is that of AdamW. `corrected=False` leaves out the bias correction. In
    training it is that of each entry's own steps: those in which an objective reached it, as in torch.optim.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    corrected: bool = True

    def __post_init__(self) -> None:
        _fractions(beta1=self.beta1, beta2=self.beta2)
        _at_least_zero(eps=self.eps, weight_decay=self.weight_decay)

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

        # The means begin at zero; the corrections divide by the weight that they have by now.
        correction1 = correction2 = torch.ones_like(t)
        if self.corrected:
            correction1, correction2 = 1 - self.beta1**t, 1 - self.beta2**t
        direction = m / (v.sqrt() / correction2.sqrt().to(v.dtype) + self.eps) / correction1.to(v.dtype)
        if self.weight_decay and self.decoupled:
            direction = direction + self.weight_decay * theta
        return direction, {"mean": m, "square": v, "step": t}


@dataclass(frozen=True)
class Adagrad(Optimiser):
    """Adagrad: v += g^2, m = beta1 m + (1 - beta1) g, direction m / (sqrt(v) + tau).

    v begins at 0 as in torch, whose `eps` is tau; in the paper it begins at tau^2 or more. Reddi et al. 2021
    (FedAdagrad, with beta1 = 0).

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
        # Without beta1 no mean is kept, as in the paper's FedAdagrad.
        new = {"square": state["square"] + grad * grad}
        m = grad
        if self.beta1:
            m = new["mean"] = torch.lerp(state["mean"], grad, 1 - self.beta1)
        return m / (new["square"].sqrt() + self.tau), new


@dataclass(frozen=True)
class Yogi(Optimiser):
    """Yogi: v -= (1 - beta2) g^2 sign(v - g^2), m = beta1 m + (1 - beta1) g, direction m / (sqrt(v) + tau).

    There is no bias correction, and m and v begin at 0 (FedYogi's v at tau^2 or more). v moves by a part of
    g^2, where Adam's moves by a part of g^2 - v, so that it forgets slowly. Zaheer et al. 2018; Reddi et al.
    2021 (FedYogi).

    >>> yogi = Yogi(beta1=0.0, beta2=0.75, tau=1.0)
    >>> yogi.update(torch.tensor([2.0]), yogi.init(torch.zeros(1)), torch.zeros(1))[0].tolist()
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
        # The sign decides whether v rises or falls; the size of the change is g^2 in both cases.
        m = torch.lerp(state["mean"], grad, 1 - self.beta1)
        square = grad * grad
        v = state["square"] - (1 - self.beta2) * square * torch.sign(state["square"] - square)
        return m / (v.sqrt() + self.tau), {"mean": m, "square": v}


@dataclass(frozen=True)
class Averaging(Optimiser):
    """The running mean as an outer optimiser: theta + (aggregate - theta) / t at the t-th exchange."""

    def init(self, theta: Tensor) -> OptimiserState:
        return {"step": torch.zeros((), dtype=torch.float64, device=theta.device)}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        # With g = theta - aggregate this is the mean of all aggregates so far.
        t = state["step"] + 1
        return grad / t.to(grad.dtype), {"step": t}


@dataclass(frozen=True)
class Torch(Optimiser):
    """One of torch.optim's optimisers by its class name, such as "RAdam", with its arguments.

    The direction is what it moves theta by. `arguments` are pairs (name, value). Where they do not name `lr`,
    a step of training takes place at its learning rate (`at`), and an outer step at 1, scaled by the outer
    learning rate. The state is kept as named tensors.

    Raises ConsilienceError for a name that torch.optim lacks, for optimisers that need a closure (LBFGS),
    that refuse the arguments, or that do not work on a dense vector (Muon, SparseAdam).

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
            classes = [name for name in dir(torch.optim) if name[:1].isupper()]
            near = difflib.get_close_matches(str(self.name), classes, n=3, cutoff=0.5)
            nearest = f"; nearest: {', '.join(near)}" if near else ""
            raise ConsilienceError(
                f"an optimiser must be a class of torch.optim by its name, got {self.name!r}{nearest}."
            )
        if inspect.signature(kind.step).parameters["closure"].default is inspect.Parameter.empty:
            raise ConsilienceError(
                f"an optimiser must step by a gradient alone, got {self.name!r}, which needs a closure."
            )

        # Only a try shows what its arguments and tensors may be.
        try:
            self._step(torch.zeros(2), torch.zeros(2), {})
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConsilienceError(
                f"torch.optim.{self.name} must take a vector and its arguments {dict(self.arguments)}, "
                f"got: {error}."
            ) from error

    def _step(
        self, grad: Tensor, theta: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, OptimiserState]:
        """Return theta after one step, and the state as tensors."""
        parameter = torch.nn.Parameter(theta.detach().clone())
        optimiser = getattr(torch.optim, self.name)([parameter], **{"lr": 1.0, **dict(self.arguments)})
        if state:
            # torch keeps step counts on the CPU.
            optimiser.state[parameter] = {
                name: (tensor if tensor.dim() else tensor.cpu()).clone() for name, tensor in state.items()
            }
        parameter.grad = grad.detach().clone()
        optimiser.step()

        tensors = {
            name: value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            for name, value in optimiser.state[parameter].items()
            if value is not None
        }
        return parameter.detach(), tensors

    def at(self, lr: float) -> tuple[Optimiser, float]:
        if "lr" in dict(self.arguments):
            return self, lr

        # The step of some, such as Rprop and Adafactor, is not in proportion to their learning rate. Copied
        # without the checks, which take a step each.
        other = copy.copy(self)
        object.__setattr__(other, "arguments", (*self.arguments, ("lr", lr)))
        return other, 1.0

    def init(self, theta: Tensor) -> OptimiserState:
        """Return zeros in the names and shapes of its state, and "new" = 1 until the first step makes it."""
        _, made = self._step(torch.zeros_like(theta), theta, {})
        return {name: torch.zeros_like(tensor) for name, tensor in made.items()} | {"new": torch.ones(())}

    def update(self, grad: Tensor, state: OptimiserState, theta: Tensor) -> tuple[Tensor, OptimiserState]:
        # Not from zeros: torch's first step makes the state itself, and not always from zeros.
        held = {} if state["new"] else {name: tensor for name, tensor in state.items() if name != "new"}
        end, kept = self._step(grad, theta, held)
        return theta - end, kept | {"new": torch.zeros_like(state["new"])}
