"""Recipes of multi-task learning: learned weights, conflicts of gradients, accumulation and sampling by task.

Two tasks on digits share a trunk: which digit it is (a class), and how much ink it has (a value). Each recipe
is a few lines on top of the same model and data. Run it with `python examples/multitask.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from sklearn.datasets import load_digits
from torch import nn

import consilience as cs

TRAINING = cs.Training(epochs=5, lr=0.01, optimiser="adam")


def tasks() -> list[cs.Source]:
    """The digits, and their ink, of the same images."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x).float() / 16
    ink = images.sum(1)
    targets = {"digit": torch.tensor(y), "ink": (ink - ink.mean()) / ink.std()}
    return cs.data.tasks(images, targets, {"ink": "value"}, name="digits")


def model() -> cs.Model:
    """A trunk of one layer, with a head per task."""
    trunk = cs.models.wrap(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()), outputs=64, headless=True)
    return cs.models.multi_head(trunk, outputs=11)


def uncertainty_weighting(schedule: cs.Schedule) -> cs.Result:
    """Learn the weight of each task from its noise."""
    result = cs.run(schedule, cs.methods.uncertainty(), model(), TRAINING)
    for name, log_var in result.params.items():
        if name.startswith("uncertainty/"):
            print(f"{name}: log_var {float(log_var):.3f}, weight {math.exp(-log_var):.3f}")
    return result


def projected_gradients(schedule: cs.Schedule) -> cs.Result:
    """Project conflicting gradients, and say how often they conflict."""
    method = cs.methods.pcgrad() + cs.methods.conflicts()
    result = cs.run(schedule, method, model(), TRAINING)
    said = result.visits[0]["Conflicts"]
    print(f"conflict ratio {said['negative']:.2f}, mean cosine {said['cosine']:.2f}")
    print("over training:", [round(point["cosine"], 2) for point in said["points"]])
    return result


def accumulation_per_task(schedule: cs.Schedule) -> cs.Result:
    """Take four batches of digits, and one of ink, to each step."""
    return cs.run(schedule, cs.methods.finetune(), model(), replace(TRAINING, accumulate={"digits/digit": 4}))


def sampling_strategies() -> list[cs.Result]:
    """Share steps in proportion to the sizes of tasks, equally, between, and from equal to proportional."""
    digit, ink = tasks()
    fewer = replace(digit, train=digit.train.select(torch.arange(500)))
    schedule = cs.settings.multitask([fewer, ink], "task")
    mixed = [(1.0, None), (math.inf, None), (3.0, None), (math.inf, 1.0)]
    trainings = [replace(TRAINING, sampler=cs.data.samplers.Mixed(*shares)) for shares in mixed]
    return [cs.run(schedule, cs.methods.finetune(), model(), training) for training in trainings]


def main() -> None:
    """Run all recipes."""
    schedule = cs.settings.multitask(tasks(), "task")
    results = [
        uncertainty_weighting(schedule),
        projected_gradients(schedule),
        accumulation_per_task(schedule),
        *sampling_strategies(),
    ]
    for result in results:
        scores = result.of_metric("accuracy").score, result.of_metric("r2").score
        print(f"{result.method}: accuracy {scores[0]:.3f}, R2 {scores[1]:.3f}")


if __name__ == "__main__":
    main()
