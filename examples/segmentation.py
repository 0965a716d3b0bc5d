"""A segmentation net: which pixels of a noisy image belong to the digit?

Targets have places: one class per pixel, [B, H, W]. Pixels at the border are left out of the loss and of the
scores: their target is -100. Run it with `python examples/segmentation.py`.
"""

from __future__ import annotations

import torch
from torch import nn

import consilience as cs

CAMERAS = {"clear": (1.0, 0.2), "noisy": (1.0, 0.5), "dark": (0.5, 0.2)}


def net() -> nn.Module:
    """Three convolutions: images [B, 1, H, W] -> outputs [B, 2, H, W]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 2, 1),
    )


def model() -> cs.Model:
    """The net as a model; without a linear head its number of outputs must be given."""
    return cs.models.wrap(net, outputs=2)


def sources() -> list[cs.Source]:
    """Digits as three cameras see them, each with a contrast and a strength of noise."""
    digits, _ = cs.data.digits(image=True).train.whole()
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, (name, (contrast, noise)) in enumerate(CAMERAS.items()):
        clean = digits[i :: len(CAMERAS)]
        x = contrast * clean + noise * torch.randn(clean.shape, generator=generator)

        # Targets [N, H, W]; the border has none.
        ink = (clean[:, 0] > 0.4).long()
        y = torch.full_like(ink, -100)
        y[:, 1:-1, 1:-1] = ink[:, 1:-1, 1:-1]
        found.append(cs.data.arrays(x, y, classes=["paper", "ink"], name=name, space="pixels"))
    return found


def main() -> None:
    """Run one model in four settings."""
    cameras = sources()
    training = cs.Training(epochs=3, lr=0.02, optimiser="adam")
    runs = [
        (cs.settings.continual(cameras, "domain"), cs.methods.lwf()),
        (cs.settings.federated(cameras, rounds=3, scenario="domain"), cs.methods.fedavg()),
        (cs.settings.multitask(cameras, "domain"), cs.methods.pcgrad()),
        (cs.settings.merging(cameras, scenario="domain"), cs.methods.average()),
    ]
    results = [
        cs.run(schedule, method, model(), training, metric=["accuracy", "iou"]) for schedule, method in runs
    ]
    print(cs.report.table(results))


if __name__ == "__main__":
    main()
