"""A penalty of your own: L2 towards the parameters at the start of a visit.

Run it with `python examples/penalty.py`, or from the command line:
`consilience run --setting continual --method examples.penalty.l2_start --method.strength 0.1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import consilience as cs


@dataclass(frozen=True)
class L2Start(cs.Correction):
    """Stay near the start: (strength / 2) ||theta - theta_start||^2 is added to the loss."""

    strength: float = 0.1
    neutral: ClassVar[dict[str, float]] = {"strength": 0.0}

    def penalty(self, step: cs.StepView, ctx: cs.Context) -> Tensor:
        """A scalar of the flat trainable parameters `step.theta` [n]."""
        return 0.5 * self.strength * (step.theta - step.start).square().sum()


def l2_start(strength: float = 0.1) -> cs.Method:
    """Stay near where a visit began.

    Args:
        strength: of the penalty; 0 is plain training.
    """
    return cs.Method("l2_start", (L2Start(strength),))


if __name__ == "__main__":
    print(cs.testing.check(l2_start()))
    tasks = cs.data.split_classes(cs.data.digits(), 5)
    for schedule in (cs.settings.continual(tasks, "task"), cs.settings.federated(tasks, rounds=5)):
        result = cs.run(schedule, l2_start(0.05), training=cs.Training(epochs=3))
        print(schedule.setting, round(result.score, 3))
