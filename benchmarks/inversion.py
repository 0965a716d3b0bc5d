"""How fast model inversion is: images a second, against a forward and backward pass to the input at the same
batch, which is all that no inversion can do without.

One thread; CPU seconds of this process, which other work on the machine moves less than the clock. The two
take turns, and a figure is the median over turns. `ratio` must be at least 0.9. Samples begin as noise, and
all take the same number of steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import consilience as cs
from common import save
from consilience.core.model import Model
from consilience.core.params import key
from consilience.core.synthetic import Maker, Wanted
from consilience.core.teacher import Teacher

LEAST = 0.9
PRIORS = {
    "no priors": [],
    "L2 and blur": None,
    "L2, blur and augmented": [cs.memory.priors.l2(), cs.memory.priors.blur(), cs.memory.priors.augmented()],
    "batch norm": [cs.memory.priors.batch_norm()],
}


def cases(quick: bool) -> list[tuple[str, Model, tuple[int, ...], int, str]]:
    """(name, model, shape, batch, priors)."""
    lenet = cs.models.lenet()
    resnet = cs.models.resnet(18, norm="batch", width=16)
    found: list[tuple[str, Model, tuple[int, ...], int, str]] = [
        ("LeNet", lenet, (1, 28, 28), 256, "no priors"),
        ("LeNet", lenet, (1, 28, 28), 256, "L2 and blur"),
        ("LeNet", lenet, (1, 28, 28), 256, "L2, blur and augmented"),
        ("ResNet-18, 16 maps", resnet, (3, 32, 32), 64, "L2 and blur"),
        ("ResNet-18, 16 maps", resnet, (3, 32, 32), 64, "batch norm"),
    ]
    return found[:2] if quick else found


def plain(teacher: Teacher, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    """The forward and backward passes alone."""
    x = x.requires_grad_()
    for _ in range(steps):
        torch.autograd.grad(torch.nn.functional.cross_entropy(teacher(x), y, reduction="sum"), x)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    before = time.process_time()
    work()
    return time.process_time() - before


def measure(
    model: Model, shape: Sequence[int], batch: int, maker: Maker, steps: int, turns: int
) -> list[float]:
    """Images a second of inversion and of the two passes, had they taken 500 steps; and the ratio."""
    params, buffers = model.init(key("model"))
    teacher = Teacher("expert", model, params, buffers, tuple(range(10)), tuple(range(10)))
    wanted = Wanted(
        {c: batch // 10 + (c < batch % 10) for c in range(10)},
        tuple(shape),
        torch.float32,
        torch.device("cpu"),
    )
    x, y = torch.randn(batch, *shape, generator=key("x")), torch.arange(batch) % 10
    works = [lambda: maker.make(teacher, wanted, key("made")), lambda: plain(teacher, x, y, steps)]
    # The first turn fills caches.
    spent = [[seconds(work) for work in works] for _ in range(turns + 1)][1:]
    ours, theirs = (statistics.median(row[i] for row in spent) for i in range(2))
    ratio = statistics.median(other / own for own, other in spent)
    return [batch * steps / 500 / ours, batch * steps / 500 / theirs, ratio]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="LeNet alone, few turns; writes nothing")
    quick = parser.parse_args().quick
    steps, turns = (5, 3) if quick else (20, 7)
    lines = [
        "| expert | inputs | batch | priors | images/s, 500 steps | two passes | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name, model, shape, batch, priors in cases(quick):
        maker = cs.memory.inversion(PRIORS[priors], steps=steps, batch=batch)
        own, two, ratio = measure(model, shape, batch, maker, steps, turns)
        rows.append(
            {"expert": name, "batch": batch, "priors": priors, "images/s": own, "passes": two, "ratio": ratio}
        )
        cells = [name, "x".join(map(str, shape)), batch, priors, f"{own:.2f}", f"{two:.2f}", f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if quick:
        print("\n".join(lines))
    else:
        save("inversion", __doc__, {"least": LEAST, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
