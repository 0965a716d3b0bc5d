"""An aggregator of your own: rows count by direction, not by length.

The same object combines the gradients of tasks, the updates of clients and the task vectors of experts.
Run it with `python examples/aggregator.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import consilience as cs


@dataclass(frozen=True)
class EqualLengths(cs.Linear):
    """Give all rows one length: sum_i w_i (l / ||r_i||) r_i, l being their weighted mean length.

    Rows are [m, n], weights [m]. A zero row stays zero.

    >>> EqualLengths()(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).tolist()  # l = 2, w = 1/2
    [1.0, 1.0]
    """

    needs_gram: ClassVar[bool] = True
    needs_base: ClassVar[bool] = (
        True  # the coefficients do not sum to 1, so rows must be changes from a common base
    )

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        """Coefficients [m] from the inner products [m, m] of the rows and their weights [m]."""
        lengths = gram.diagonal().clamp(min=0).sqrt()
        mean = (weights * lengths).sum() / weights.sum()
        return torch.where(lengths > 0, weights * mean / lengths, 0.0)


def equal_lengths() -> cs.Method:
    """Combine by direction wherever the setting combines."""
    return cs.methods.aggregate(EqualLengths())


if __name__ == "__main__":
    print(cs.testing.check(EqualLengths()))
    parts = cs.data.iid(cs.data.digits(), 4)
    settings = [
        cs.settings.multitask(parts),
        cs.settings.federated(parts, rounds=3),
        cs.settings.merging(parts),
    ]
    for schedule in settings:
        result = cs.run(schedule, equal_lengths(), training=cs.Training(epochs=3))
        print(f"{schedule.setting:10} {result.score:.3f}")
