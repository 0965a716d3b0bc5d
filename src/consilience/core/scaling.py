"""Loss scaling for half precision, in whose 16 bits small gradients would vanish."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError

ScaleState = dict[str, Tensor]


@dataclass(frozen=True)
class LossScale:
    """The rule of `torch.amp.GradScaler`: a factor S of the loss, by which its gradient is divided again.

    Where the gradient is not finite, the step is left out and S is halved; after `interval` steps without
    such a gradient S is doubled. Micikevicius et al. 2018.

    Args:
        start: the first S.
        interval: steps between doublings.
        most: how many steps in a row may be left out; one more is an error, as training has diverged.

    >>> scale = LossScale(start=4.0, interval=2)
    >>> state = scale.init(torch.device("cpu"))
    >>> state = scale.update(scale.update(state, True), True)
    >>> float(state["scale"]), float(scale.update(state, False)["scale"])
    (8.0, 4.0)
    """

    start: float = 2.0**16
    interval: int = 2000
    most: int = 20

    def init(self, device: torch.device) -> ScaleState:
        """Return the state before the first step: S, steps since it changed, steps left out in a row."""
        # On the device, as the gradients are: a step divides by S without waiting for it.
        count = torch.zeros((), dtype=torch.long, device=device)
        return {"scale": torch.tensor(self.start, device=device), "steps": count, "skipped": count}

    def update(self, state: ScaleState, finite: bool) -> ScaleState:
        """Return the state after a step whose gradient was finite, or was not."""
        scale, steps, skipped = state["scale"], state["steps"], state["skipped"]
        if not finite:
            if skipped >= self.most:
                raise ConsilienceError(
                    f"gradients must be finite, got {self.most + 1} steps in a row without any, down to a "
                    f"loss scale of {float(scale):g}; a lower lr or precision='bf16' helps."
                )
            return {"scale": scale / 2, "steps": torch.zeros_like(steps), "skipped": skipped + 1}

        # Doubled until it overflows now and then, so that S stays near the largest that works.
        grows = int(steps) + 1 == self.interval
        return {
            "scale": scale * 2 if grows else scale,
            "steps": torch.zeros_like(steps) if grows else steps + 1,
            "skipped": torch.zeros_like(skipped),
        }
