"""A method of one's own: L2 towards the start, in a few lines, in every setting.

Run it with `python examples/own_method.py`, or from the command line:
`consilience run --setting continual --method examples.own_method.l2_start --method.strength 0.1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import consilience as cs
from consilience.core.contexts import Context, StepView
from consilience.core.correction import Correction


@dataclass(frozen=True)
class L2Start(Correction):
    """(strength / 2) ||theta - theta_start||^2 is added to the loss."""

    strength: float = 0.1
    neutral: ClassVar[dict[str, float]] = {"strength": 0.0}

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        """The term, as a function of the flat parameters [n]."""
        return 0.5 * self.strength * (step.theta - step.start).square().sum()


def l2_start(strength: float = 0.1) -> cs.Method:
    """Stay near where this learn began.

    Args:
        strength: of the penalty.
    """
    return cs.Method("l2_start", (L2Start(strength),))


if __name__ == "__main__":
    tasks = cs.data.split_classes(cs.data.digits(), 5)
    for schedule in (cs.settings.continual(tasks, "task"), cs.settings.federated(tasks, rounds=5)):
        result = cs.run(schedule, l2_start(0.05), training=cs.Training(epochs=3))
        print(schedule.setting, round(result.score, 3))
