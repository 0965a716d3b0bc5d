"""A folder of images with one subfolder per class, and random views of them in training.

Views are shifted and darker; validation and test see the images themselves, and buffers keep them. It needs
pillow (`consilience[vision]`). Run it with `python examples/image_folder.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

import consilience as cs
from consilience.data import augment


def write(folder: Path) -> None:
    """Write 1,000 of scikit-learn's digits as PNG files, in folders that are called as the digits are."""
    data = load_digits()
    for i, (pixels, digit) in enumerate(zip(data.images[:1000], data.target[:1000], strict=True)):
        (folder / str(digit)).mkdir(exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(folder / str(digit) / f"{i}.png")


def fade(image: Tensor) -> Tensor:
    """Darken an image by a factor in [0.5, 1): any random function of one sample is an augmentation."""
    return image * (0.5 + torch.rand(()) / 2)


def source() -> cs.Source:
    """The images as x [N, 1, 8, 8], with two augmentations in turn."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        views = [augment.crop(1), fade]
        return cs.data.folder(folder, grey=True, in_memory=True, name="digits", augment=views)


def main() -> None:
    """Run one model in four settings."""
    everything = source()
    tasks = cs.data.split_classes(everything, 5)
    clients = cs.data.iid(everything, 3)
    model = cs.models.conv(10, channels=1, size=8, width=16)
    training = cs.Training(epochs=4, batch_size=16, lr=0.005, optimiser="adam")
    runs = [
        (cs.settings.continual(tasks, "task"), cs.methods.er(size=100)),
        (cs.settings.federated(clients, rounds=3), cs.methods.fedavg()),
        (cs.settings.multitask(tasks, "task"), cs.methods.pcgrad()),
        (cs.settings.merging(clients), cs.methods.average()),
    ]
    results = [cs.run(schedule, method, model, training) for schedule, method in runs]
    print(cs.report.table(results))


if __name__ == "__main__":
    main()
