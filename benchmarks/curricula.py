"""Curricula on CIFAR-10 with 20 % wrong labels in training: does the order of examples help?

TRAIN training images (CONSILIENCE_DATA), of which a fifth got one of the nine other classes at random; TEST
test images with true labels; a conv net of width WIDTH; Adam, lr .001, batches of 32, EPOCHS epochs. Every
curriculum goes by the loss of the present model, measured before each epoch, but for the control, which
takes a random order at the pace of "competence". Settings were fixed beforehand, equal for all seeds, and
tuned for none. A seed draws the images, the wrong labels and the initial weights; SEEDS seeds give the mean
and the standard deviation, and a paired t-test compares with random order.

"Seen" are examples over those of random order: who waits with the hard ones takes fewer steps. "Random
order, as many" is random order for as many steps as "competence". "Wrong" is the share of wrong labels
among the examples that the first epochs saw (a quarter of all epochs), and the last one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import consilience as cs
from common import save, spread
from consilience.core.sampler import Scored
from consilience.data.samplers import Curriculum, SelfPaced, Shuffle

TRAIN, TEST, WIDTH, EPOCHS, SEEDS, WRONG = 2000, 2000, 16, 15, 3, 0.2
SAMPLERS: dict[str, Callable[[], Any]] = {
    "random order": Shuffle,
    "competence": lambda: Curriculum("loss", "competence", start=0.3, rescore=1),
    "competence, random order": lambda: Curriculum("random", "competence", start=0.3),
    "baby-step": lambda: Curriculum("loss", "baby-step", rescore=1),
    "anti": lambda: Curriculum("loss", "competence", start=0.3, rescore=1, anti=True),
    "self-paced": lambda: SelfPaced(start=0.5, growth=1.1),
    "self-paced, soft": lambda: SelfPaced(start=0.5, growth=1.1, soft=True),
}
FEWER = "random order, as many"


def noisy(seed: int) -> tuple[cs.Source, Tensor]:
    """Return CIFAR-10 with wrong labels, and which training labels are wrong [N]."""
    whole = cs.data.npz("cifar10_jpeg", limit=TRAIN, validation=0.0, seed=seed)
    g = torch.Generator().manual_seed(seed)
    (x, y), (x_test, y_test) = whole.train.whole(), whole.test.whole()
    wrong = torch.rand(len(y), generator=g) < WRONG
    others = (y + torch.randint(1, 10, y.shape, generator=g)) % 10
    some = torch.randperm(len(y_test), generator=g)[:TEST]
    test, classes = (x_test[some], y_test[some]), [name for _, name in whole.labels]
    labels = torch.where(wrong, others, y)
    return cs.data.arrays(x, labels, test=test, classes=classes, name="cifar10", validation=0.0), wrong


def watched(sampler: Any, seen: dict[int, Tensor]) -> Any:
    """Return a sampler that notes which examples each epoch sees."""
    kind: Any = type(sampler)

    class Watched(kind):  # type: ignore[misc]
        def plan(
            self, targets: Tensor, batch_size: int, epoch: int, *more: Any, **state: Any
        ) -> list[Tensor]:
            found: list[Tensor] = kind.plan(self, targets, batch_size, epoch, *more, **state)
            seen[epoch] = torch.cat(found)
            return found

    other = object.__new__(Watched)
    other.__dict__.update(sampler.__dict__)
    assert isinstance(other, Scored) == isinstance(sampler, Scored)
    return other


def trained(source: cs.Source, wrong: Tensor, sampler: Any, seed: int, epochs: int) -> dict[str, float]:
    """Return the accuracy, how many examples were seen, and which share of them had wrong labels."""
    seen: dict[int, Tensor] = {}
    training = cs.Training(
        epochs=epochs, batch_size=32, lr=0.001, optimiser="adam", sampler=watched(sampler, seen)
    )
    model = cs.models.conv(10, 3, 32, width=WIDTH)
    result = cs.run(cs.settings.continual([source]), cs.methods.finetune(), model, training, seed=seed)
    first = torch.cat([seen[epoch] for epoch in range(max(1, epochs // 4))])
    return {
        "accuracy": result.score,
        "examples": sum(map(len, seen.values())),
        "wrong at first": float(wrong[first].double().mean()),
        "wrong at last": float(wrong[seen[epochs - 1]].double().mean()),
    }


def main() -> None:
    from scipy.stats import ttest_rel

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in [*SAMPLERS, FEWER]}
    for seed in range(SEEDS):
        source, wrong = noisy(seed)
        for name, make in SAMPLERS.items():
            runs[name].append(trained(source, wrong, make(), seed, EPOCHS))
        # As many examples as the curriculum saw, to a whole epoch.
        epochs = round(runs["competence"][-1]["examples"] / len(source.train))
        runs[FEWER].append(trained(source, wrong, Shuffle(), seed, epochs))

    base = [run["accuracy"] for run in runs["random order"]]
    rows, lines = (
        {},
        [
            "| order | accuracy | against random order | p | seen | wrong at first | wrong at last |",
            "|---|---|---|---|---|---|---|",
        ],
    )
    for name, found in runs.items():
        mine = [run["accuracy"] for run in found]
        gain = [100 * (own - other) for own, other in zip(mine, base, strict=True)]
        p = None if name == "random order" else float(ttest_rel(mine, base).pvalue)
        share = np.mean([run["examples"] for run in found]) / np.mean(
            [run["examples"] for run in runs["random order"]]
        )
        rows[name] = {"runs": found, "gain": gain, "p": p, "seen": float(share)}
        at = [np.mean([run[f"wrong at {when}"] for run in found]) for when in ("first", "last")]
        against = "" if p is None else f"{np.mean(gain):+.1f} ± {np.std(gain, ddof=1):.1f}"
        lines.append(
            f"| {name} | {spread(mine)} | {against} | {'' if p is None else f'{p:.3f}'} | {share:.2f} | "
            f"{100 * at[0]:.1f} % | {100 * at[1]:.1f} % |"
        )
    about = (__doc__ or "").replace("TRAIN", str(TRAIN)).replace("TEST", str(TEST))
    for name, value in (("WIDTH", WIDTH), ("EPOCHS", EPOCHS), ("SEEDS", SEEDS)):
        about = about.replace(name, str(value))
    save("curricula", about, {"orders": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
