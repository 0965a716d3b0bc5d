"""How a source is trained on: epochs, batches, the inner optimiser, the sampler, precision and device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from consilience.core.errors import ConsilienceError

if TYPE_CHECKING:
    import torch

    from consilience.core.params import Layout


@dataclass(frozen=True)
class Training:
    """Hyperparameters of the inner training, the same in every setting.

    Args:
        epochs: passes over a source at each visit; 0 trains nothing.
        batch_size: samples of each part of a step.
        lr: learning rate.
        optimiser: "sgd", "adam", "adamw", or any `consilience.core.optimiser.Optimiser`. It restarts at each visit.
        momentum: of "sgd".
        weight_decay: L2 (decoupled for "adamw").
        sampler: which examples a step sees; None shuffles (`consilience.data.samplers`).
        precision: "fp32", "fp64" or "bf16" (autocast).
        device: where to train, such as "cpu" or "cuda:0".
        schedule: of the learning rate over the steps of a visit (of a whole one, where an agent takes a part of them), t from 0 to 1: "constant", "linear" lr (1 - t), or "cosine"
            lr (1 + cos(pi t)) / 2.
        rates: for entries that match a shell pattern, a factor of the learning rate, as parameter groups do: `{"biases.*": 20.0}`; the first
            pattern that an entry matches counts, and each should match some trained entry.
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
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    rates: Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1)):
            v = getattr(self, name)
            if not isinstance(v, int) or v < low:
                raise ConsilienceError(f"`{name}` should be a whole number >= {low}. Found `{name} = {v!r}`.")
        if isinstance(self.lr, str | bool) or not self.lr > 0 or self.lr == float("inf"):
            raise ConsilienceError(f"`lr` should be positive and finite. Found `lr = {self.lr!r}`.")
        if self.weight_decay < 0:
            raise ConsilienceError(
                f"`weight_decay` should be >= 0. Found `weight_decay = {self.weight_decay!r}`."
            )
        if self.precision not in ("fp32", "fp64", "bf16"):
            raise ConsilienceError(f"`precision` should be fp32, fp64 or bf16. Found {self.precision!r}.")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ConsilienceError(
                f"`schedule` should be constant, linear or cosine. Found `schedule = {self.schedule!r}`."
            )
        if not isinstance(self.optimiser, str) and (
            isinstance(self.optimiser, type) or not hasattr(self.optimiser, "update")
        ):
            raise ConsilienceError(
                f"`optimiser` should be sgd, adam, adamw or an Optimiser. Found {self.optimiser!r}."
            )
        if isinstance(self.optimiser, str) and self.optimiser not in ("sgd", "adam", "adamw"):
            raise ConsilienceError(
                f"`optimiser` should be sgd, adam, adamw or an Optimiser. Found {self.optimiser!r}."
            )
        for pattern, factor in (self.rates or {}).items():
            if isinstance(factor, str | bool) or not 0 <= factor < float("inf"):
                raise ConsilienceError(
                    f"factors of `rates` should be at least 0 and finite. Found {factor!r} for {pattern!r}."
                )

    def factors(self, layout: Layout) -> torch.Tensor | None:
        """What `rates` multiplies the learning rate of each trained number by [n]; None where all go alike.

        >>> import torch
        >>> from consilience.core.params import Layout
        >>> Training(rates={"head.*": 0.5}).factors(Layout.of({"body.w": torch.zeros(2), "head.w": torch.zeros(1)}))
        tensor([1.0000, 1.0000, 0.5000])
        """
        if not self.rates:
            return None
        import torch

        from consilience.core.params import matches

        found = torch.ones(layout.size, dtype=layout.dtype, device=layout.device)
        for pattern, factor in reversed(list(self.rates.items())):  # the first that matches counts
            named = [n for n in layout.names if matches(n, [pattern])]
            if not named:
                raise ConsilienceError(
                    f"each pattern of `rates` should match some trained entry. Found {pattern!r}, and entries such as {', '.join(layout.names[:4])}."
                )
            for n in named:
                found[layout.span(n)] = factor
        return found

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.float64 if self.precision == "fp64" else torch.float32

    def rate(self, clock: tuple[Any, Any], horizon: tuple[Any, Any]) -> Any:
        """The learning rate at the step `clock` (epoch, step in the epoch) of `horizon` (epochs, steps an epoch), numbers or tensors.

        >>> [round(Training(lr=1.0, schedule="cosine").rate((0, i), (2, 2)), 2) for i in range(4)]
        [1.0, 0.85, 0.5, 0.15]
        """
        if self.schedule == "constant":
            return self.lr
        import math

        import torch

        done = clock[0] * horizon[1] + clock[1]
        t = (done.double() if isinstance(done, torch.Tensor) else done) / (horizon[0] * horizon[1])
        if self.schedule == "linear":
            return self.lr * (1 - t)
        return (
            self.lr
            * (1 + (torch.cos(math.pi * t) if isinstance(t, torch.Tensor) else math.cos(math.pi * t)))
            / 2
        )

    def inner(self) -> Any:
        """The inner optimiser."""
        from consilience.core.optimiser import SGD, Adam

        if not isinstance(self.optimiser, str):
            return self.optimiser
        if self.optimiser == "sgd":
            return SGD(self.momentum, self.weight_decay)
        return Adam(weight_decay=self.weight_decay, decoupled=self.optimiser == "adamw")
