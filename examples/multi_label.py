"""Several labels at once: a digit may be even, above four, prime, and have a loop.

Each label is a question of its own: targets [N, L] are 0 or 1, and NaN where the answer is missing. Here four
people label the digits, and each answers two of the four questions. Run it with
`python examples/multi_label.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import consilience as cs

LABELS = {"even": (0, 2, 4, 6, 8), "above four": (5, 6, 7, 8, 9), "prime": (2, 3, 5, 7), "loop": (0, 6, 8, 9)}


def model() -> nn.Module:
    """A perceptron with one output per label."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(LABELS)))


def labels_of(digits: Tensor) -> Tensor:
    """Labels [N, L] of digits [N]."""
    holds = [torch.isin(digits, torch.tensor(those)) for those in LABELS.values()]
    return torch.stack(holds, 1).float()


def sources() -> list[cs.Source]:
    """One source per person, with two answers per image; all answers are in the test."""
    found = []
    for person, part in enumerate(cs.data.iid(cs.data.digits(), 4)):
        x, digits = part.train.whole()
        test_x, test_digits = part.test.whole()
        y = labels_of(digits)
        y[:, [person, (person + 1) % 4]] = torch.nan
        found.append(
            cs.data.arrays(
                x,
                y,
                test=(test_x, labels_of(test_digits)),
                kind="labels",
                classes=[*LABELS],
                name=f"person {person}",
                space="labels",
            )
        )
    return found


def main() -> None:
    """Run one model in four settings."""
    people = sources()
    training = cs.Training(epochs=5, lr=0.01, optimiser="adam")
    runs = [
        (cs.settings.continual(people, "domain"), cs.methods.er(size=100)),
        (cs.settings.federated(people, rounds=3, scenario="domain"), cs.methods.fedavg()),
        (cs.settings.multitask(people, "domain"), cs.methods.pcgrad()),
        (cs.settings.merging(people, scenario="domain"), cs.methods.average()),
    ]
    results = [cs.run(schedule, method, model, training, metric=["f1", "auroc"]) for schedule, method in runs]
    print(cs.report.table(results))


if __name__ == "__main__":
    main()
