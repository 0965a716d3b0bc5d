"""What the log says of a visit: training loss, gradient norm, learning rate, and time per step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from consilience.loop.step import Step

EVERY = 20
"""Steps between two looks at a step: each costs a few microseconds, and waits for the device."""

HELD = 256
"""Steps after which the losses are read."""


def is_looked_at(steps: int) -> bool:
    """Whether a visit is looked at after this many steps: 1, 2, 4, 8, 16, 20, 32, 40, ...

    A rate that is too high shows in the first steps.
    """
    return steps % EVERY == 0 or steps & (steps - 1) == 0


@dataclass(eq=False)
class Figures:
    """Sums over the steps that a visit ran, and the numbers of the last of them, which stay on the device."""

    steps: int = 0
    loss: float = 0.0
    """The sum of the training losses, but for those in `losses`."""
    looks: int = 0
    norm: float = 0.0
    """The sum of the gradient norms of the steps that were looked at, but for those in `norms`."""
    seconds: float = 0.0
    """The time of the steps. It decides nothing."""
    recent: list[tuple[int, list[tuple[str, Tensor]]]] = field(default_factory=list)
    """The step, and the loss of each of its objectives, of the steps since the last look."""
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Add the step that was just taken."""
        self.steps += 1
        # References alone: to stack or read them in each step would take 2 % of a small one.
        self.recent = [] if is_looked_at(self.steps - 1) else self.recent
        self.recent.append((self.steps, step.each))
        if step.loss is not None:
            self.losses.append(step.loss)
        if step.norm is not None:
            self.norms.append(step.norm)
        # To add or read each loss by itself would take 2 % of a small step.
        if len(self.losses) == HELD:
            self._read()

    def first_bad(self) -> tuple[int, list[str]] | None:
        """Return the first step since the last look with losses that are not finite, and of what they are."""
        for number, each in self.recent:
            bad = [name for name, loss in each if not math.isfinite(loss)]
            if bad:
                return number, list(dict.fromkeys(bad))
        return None

    def _read(self) -> None:
        """Add what is on the device to the sums."""
        self.looks += len(self.norms)
        self.loss += sum(torch.stack(self.losses).tolist()) if self.losses else 0.0
        self.norm += sum(torch.stack(self.norms).tolist()) if self.norms else 0.0
        self.losses, self.norms = [], []

    def log(self, steps: int, lr: float) -> dict[str, Any]:
        """Return the entries of a line of the log, for a visit of this many steps.

        Stacked agents have no losses and norms: their program computes gradients alone.
        """
        self._read()
        # Early stopping goes back to a step before the last one that ran.
        ran = max(steps, self.steps)
        complete = self.steps == ran
        found: dict[str, Any] = {"steps": ran, "lr": lr}
        found["loss"] = _mean(self.loss, self.steps if complete else 0)
        found["grad_norm"] = _mean(self.norm, self.looks if complete else 0)
        return {**found, "seconds_per_step": round(self.seconds / ran, 7)}

    def kept(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        self._read()
        return {name: getattr(self, name) for name in KEPT}

    def resume(self, kept: Mapping[str, float]) -> None:
        """Continue from what `kept` gave."""
        self.losses, self.norms = [], []
        for name in KEPT:
            # JSON has no infinity, so that a sum that is not finite is kept as None.
            value = math.nan if kept[name] is None and name in ("loss", "norm") else kept[name]
            if not isinstance(value, int if name in ("steps", "looks") else int | float):
                raise TypeError(f"{name!r} is no number")
            setattr(self, name, value)


KEPT = ("steps", "loss", "looks", "norm", "seconds")


def _mean(total: float, count: int) -> float | None:
    """Return a mean; None where nothing was counted, or the sum is not finite."""
    return total / count if count and math.isfinite(total) else None
