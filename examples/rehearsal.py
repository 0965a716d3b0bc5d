"""Rehearsal with a buffer policy of your own: keep the examples on which the model is most certain.

A policy gives each example a key when it arrives; a buffer keeps the examples with the smallest keys.
Run it with `python examples/rehearsal.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import consilience as cs


@dataclass(frozen=True)
class MostCertain(cs.Policy):
    """Keep examples with a large margin p_1 - p_2 of the two likeliest classes, equally many per class."""

    def keys(self, learned: cs.Learned, size: int) -> Tensor:
        """The negative margins [N] of the training examples, by the model at the end of the visit."""
        margins = []
        for x, _ in learned.source.train.chunks(1024):
            with torch.no_grad():
                logits, _ = learned.model(learned.params, learned.buffers, x, learned.task, False)
            top = logits.double().softmax(1).topk(2, dim=1).values
            margins.append(top[:, 1] - top[:, 0])
        return torch.cat(margins).cpu()

    def keep(self, keys: Tensor, y: Tensor, size: int) -> Tensor:
        """Which of M examples with keys [M] and targets [M] stay: bool [M]."""
        rank = torch.empty(len(keys), dtype=torch.double)
        for c in y.unique():
            own = (y == c).nonzero()[:, 0]
            rank[own] = keys[own].argsort(stable=True).argsort(stable=True).double()
        kept = torch.zeros(len(keys), dtype=torch.bool)
        # By rank within the class first, and by margin among equal ranks.
        kept[(rank + keys / 2).argsort(stable=True)[:size]] = True
        return kept


def certain_replay(size: int = 200) -> cs.Method:
    """Experience replay of the most certain examples.

    Args:
        size: how many examples the buffer holds.
    """
    replay = cs.methods.er(size=size, policy=MostCertain())
    return cs.Method("certain_replay", replay.corrections)


if __name__ == "__main__":
    print(cs.testing.check(certain_replay()))
    tasks = cs.data.split_classes(cs.data.digits(), 5)
    for method in (cs.methods.er(size=50), certain_replay(size=50)):
        result = cs.run(cs.settings.continual(tasks), method, training=cs.Training(epochs=3))
        print(f"{method.name:16} {result.score:.3f}, forgetting {result.forgetting:.3f}")
