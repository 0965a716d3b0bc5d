"""How a source is trained on: epochs, batches, the inner optimiser, the sampler, precision and device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from consilience.core.errors import ConsilienceError

# The command line reads this signature to list its options, so nothing here imports torch at module level.
if TYPE_CHECKING:
    import torch

    from consilience.core.params import Layout

OPTIMISERS = ("sgd", "adam", "adamw")
PRECISIONS = ("fp32", "fp64", "bf16")
LR_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Training:
    """Hyperparameters of the inner training, the same in every setting.

    Args:
        epochs: passes over a source at each visit; 0 trains nothing.
        batch_size: samples of each part of a step.
        lr: learning rate.
        optimiser: "sgd", "adam", "adamw", or any `consilience.core.optimiser.Optimiser`. It restarts at each
        visit.
        momentum: of "sgd".
        weight_decay: L2 (decoupled for "adamw").
        sampler: which examples a step sees; None shuffles (`consilience.data.samplers`).
        precision: "fp32", "fp64" or "bf16" (autocast).
        device: where to train, such as "cpu" or "cuda:0".
        lr_schedule: how the learning rate changes over a visit, where t goes from 0 to 1: "constant",
            "linear" lr (1 - t), or "cosine" lr (1 + cos(pi t)) / 2. An agent that trains for a fraction of a
            visit stops early on the same curve.
        rates: factors of the learning rate for entries that match a shell pattern, as parameter groups do:
            `{"biases.*": 20.0}`. The first pattern that an entry matches counts; each must match a trained
            entry.
        loss: what tasks are trained by: a name, one of `consilience.losses`, a function (outputs, targets) ->
            the loss of each target, or several of these by task or kind of targets. That of a source wins.
            None: cross-entropy of classes, squared error of values, binary cross-entropy of labels.
    """

    epochs: int = 5
    batch_size: int = 32
    lr: float = 0.05
    optimiser: Any = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    sampler: Any = None
    precision: Literal["fp32", "fp64", "bf16"] = "fp32"
    device: str = "cpu"
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    rates: Mapping[str, float] | None = field(default=None, hash=False)
    loss: Any = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ConsilienceError(f"`{name}` must be a whole number >= {low}, got {value!r}.")

        # A text would compare with TypeError, and True would pass for 1.
        if isinstance(self.lr, str | bool) or not self.lr > 0 or self.lr == float("inf"):
            raise ConsilienceError(f"`lr` must be positive and finite, got {self.lr!r}.")
        if self.weight_decay < 0:
            raise ConsilienceError(f"`weight_decay` must be >= 0, got {self.weight_decay!r}.")
        # A configuration in a file may hold any text.
        for name, choices in (("precision", PRECISIONS), ("lr_schedule", LR_SCHEDULES)):
            value = getattr(self, name)
            if value not in choices:
                raise ConsilienceError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")

        named = isinstance(self.optimiser, str) and self.optimiser in OPTIMISERS
        # A class has `update` too, but only an object of it can be used.
        made = hasattr(self.optimiser, "update") and not isinstance(self.optimiser, str | type)
        if not named and not made:
            raise ConsilienceError(
                f"`optimiser` must be sgd, adam, adamw or an Optimiser, got {self.optimiser!r}."
            )

        for pattern, factor in (self.rates or {}).items():
            if isinstance(factor, str | bool) or not 0 <= factor < float("inf"):
                raise ConsilienceError(
                    f"factors of `rates` must be >= 0 and finite, got {factor!r} for {pattern!r}."
                )

    def factors(self, layout: Layout) -> torch.Tensor | None:
        """Return the factor of the learning rate for each trained number [n], or None without `rates`.

        >>> import torch
        >>> from consilience.core.params import Layout
        >>> layout = Layout.of({"body.w": torch.zeros(2), "head.w": torch.zeros(1)})
        >>> Training(rates={"head.*": 0.5}).factors(layout)
        tensor([1.0000, 1.0000, 0.5000])
        """
        if not self.rates:
            return None
        import torch

        from consilience.core.params import matches

        found = torch.ones(layout.size, dtype=layout.dtype, device=layout.device)
        # Later writes win, so that the first pattern that matches counts.
        for pattern, factor in reversed(list(self.rates.items())):
            names = [name for name in layout.names if matches(name, [pattern])]
            if not names:
                raise ConsilienceError(
                    f"each pattern of `rates` must match a trained entry, got {pattern!r}; "
                    f"entries are such as {', '.join(layout.names[:4])}."
                )
            for name in names:
                found[layout.span(name)] = factor
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The type of parameters and inputs; "bf16" keeps float32 parameters."""
        import torch

        return torch.float64 if self.precision == "fp64" else torch.float32

    def rate(self, clock: tuple[Any, Any], horizon: tuple[Any, Any]) -> Any:
        """Return the learning rate at a step of a visit.

        `clock` is (epoch, step in the epoch) and `horizon` is (epochs, steps per epoch), as numbers or
        tensors.

        >>> [round(Training(lr=1.0, lr_schedule="cosine").rate((0, i), (2, 2)), 2) for i in range(4)]
        [1.0, 0.85, 0.5, 0.15]
        """
        if self.lr_schedule == "constant":
            return self.lr
        import torch

        done = clock[0] * horizon[1] + clock[1]
        # In float64, so that engines with the clock in a tensor and engines with numbers agree.
        t = (done.double() if isinstance(done, torch.Tensor) else done) / (horizon[0] * horizon[1])
        if self.lr_schedule == "linear":
            return self.lr * (1 - t)
        cosine = torch.cos(math.pi * t) if isinstance(t, torch.Tensor) else math.cos(math.pi * t)
        return self.lr * (1 + cosine) / 2

    def inner(self) -> Any:
        """Return the inner optimiser."""
        from consilience.core.optimiser import SGD, Adam

        if not isinstance(self.optimiser, str):
            return self.optimiser
        if self.optimiser == "sgd":
            return SGD(self.momentum, self.weight_decay)
        return Adam(weight_decay=self.weight_decay, decoupled=self.optimiser == "adamw")
