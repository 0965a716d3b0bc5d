"""Targets of three kinds on one trunk: which digit it is, how much ink it has, and which labels hold.

Each task has its own head, loss and metric. Some targets are missing: -100 among classes, NaN among values
and labels. Run it with `python examples/mixed_targets.py`.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import consilience as cs

LABELS = {"even": (0, 2, 4, 6, 8), "above four": (5, 6, 7, 8, 9), "loop": (0, 6, 8, 9)}


def trunk() -> nn.Module:
    """The layer that all tasks share: features [B, 256]."""
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh())


def model() -> cs.Model:
    """One linear head per task on the trunk, with 10 + 1 + 3 outputs in all."""
    return cs.models.multi_head(cs.models.wrap(trunk, outputs=256, headless=True), outputs=14)


def sources() -> list[cs.Source]:
    """One source per task; every image lacks the targets of some tasks."""
    data = load_digits()
    x, digit = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    ink = x.sum(1)
    ink = (ink - ink.mean()) / ink.std()
    labels = torch.stack([torch.isin(digit, torch.tensor(those)) for those in LABELS.values()], 1).float()

    generator = torch.Generator().manual_seed(0)
    for y, none in ((digit, -100), (ink, torch.nan), (labels, torch.nan)):
        y[torch.rand(len(y), generator=generator) < 0.2] = none
    return cs.data.tasks(
        x,
        {"digit": digit, "ink": ink, "labels": labels},
        kinds={"ink": "value", "labels": "labels"},
        classes={"labels": [*LABELS]},
        name="digits",
    )


def main() -> None:
    """Run one model in four settings."""
    tasks = sources()
    # The trunk moves slowly, so that the average of several still fits heads that were trained apart.
    training = cs.Training(
        epochs=5, lr=0.01, optimiser="adam", rates={"trunk.*": 0.03}, loss={"ink": "huber"}
    )
    runs = [
        (cs.settings.continual(tasks, "task"), cs.methods.er(size=100)),
        (cs.settings.federated(tasks, rounds=3, scenario="task"), cs.methods.fedavg()),
        (cs.settings.multitask(tasks, "task"), cs.methods.pcgrad()),
        (cs.settings.merging(tasks, scenario="task"), cs.methods.average()),
    ]
    results = [cs.run(schedule, method, model(), training) for schedule, method in runs]
    print(cs.report.table(results))


if __name__ == "__main__":
    main()
