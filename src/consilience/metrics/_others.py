"""Metrics from elsewhere: functions of users, and objects of torchmetrics."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch  # noqa: F401 (the examples use it)
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.metrics import Metric, Running, Sums


@dataclass(frozen=True)
class Own(Metric):
    """A function of all predictions and targets. `direction` says whether more is better; None: unknown.

    >>> Own(lambda p, y: p.mean(), True, "mean")(torch.ones(2, 1), torch.zeros(2))
    1.0
    """

    function: Callable[..., Any]
    direction: bool | None = None
    label: str = ""

    keeps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConsilienceError(f"an own metric must be a function, got {kind_of(self.function)}.")

    @property
    def name(self) -> str:
        return self.label or name_of(self.function)

    @property
    def higher(self) -> bool | None:
        return self.direction

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        return {"p": p.cpu(), "y": y.cpu()}

    def value(self, sums: Sums) -> float:
        return number(self.function(sums["p"], sums["y"]), self.name)


@dataclass(frozen=True)
class TorchMetric(Metric):
    """An object with torchmetrics' `update`, `compute` and `reset`; each use has a copy of its own.

    Its `higher_is_better` says the direction.
    """

    metric: Any

    keeps: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return type(self.metric).__name__

    @property
    def higher(self) -> bool | None:
        found = getattr(self.metric, "higher_is_better", None)
        return None if found is None else bool(found)

    def sums(self, p: Tensor, y: Tensor) -> Sums:
        return {"p": p.cpu(), "y": y.cpu()}

    def value(self, sums: Sums) -> float:
        # One update with everything: objects of torchmetrics cannot add sums of others.
        running = self.running()
        running.update(sums["p"], sums["y"])
        return running.value()

    def running(self) -> Running:
        return TorchRunning(self)


class TorchRunning(Running):
    """An object of torchmetrics over chunks: it keeps what it needs, not the predictions."""

    metric: TorchMetric

    def __init__(self, metric: TorchMetric) -> None:
        super().__init__(metric)
        self.used = False

        # The user's object may be in use elsewhere, also by another seed of this run.
        self.copy = copy.deepcopy(metric.metric)
        self.copy.reset()

    def update(self, p: Tensor, y: Tensor) -> None:
        self.copy.update(p.cpu(), y.cpu())
        self.used = True

    def value(self) -> float:
        # It would warn, and give 0, before any chunk.
        value = number(self.copy.compute(), self.metric.name) if self.used else math.nan
        return value if math.isfinite(value) else math.nan


def name_of(function: Callable[..., Any]) -> str:
    """Name a function: with its arguments if some are bound, by its class if it is an object.

    >>> name_of(functools.partial(round, ndigits=2)), name_of(len)
    ('round(ndigits=2)', 'len')
    """
    # A partial has no name, and its arguments are what distinguishes it from another.
    if isinstance(function, functools.partial):
        bound = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(bound)})"
    return getattr(function, "__name__", type(function).__name__)


def number(value: Any, name: str) -> float:
    """Return what a metric gave as a float: also a tensor or an array of one number.

    >>> number(torch.tensor([0.5]), "m")
    0.5
    """
    # JSON takes no scalars of numpy or torch.
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConsilienceError(f"the metric {name!r} must give one number, got {kind_of(value)}.") from error
