"""The cost of a step that combines gradients of eight tasks, as a ratio of the CPU time of their summed loss.

Eight regressions on equal inputs, trunk 256-512-512-512, heads 512-1, batch 256, one thread; `make results`
writes results/balancing.{json,md}. The summed loss is a plain loop in torch: one forward, one backward, SGD.
"by hand" is that loop with one backward pass per task, whose gradients are only added: what exact rows must
cost. Exact rows are gradients with respect to the shared parameters, "features" are those with respect to the
features. Steps are timed one by one, the cases in turns, and a case has the median of its steps. Of torchjd,
`mtl_backward` and `jac_to_grad`. Of LibMTL, its formulas: PCGrad projects one by one, and MGDA takes
Frank-Wolfe steps.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import consilience as cs
from common import save
from consilience.aggregators._mgda import shortest
from consilience.loop.job import Job

TASKS, BATCH, STEPS = 8, 256, 12
LIMITS = {
    "pcgrad": 5.6,
    "mgda": 5.6,
    "gradnorm": 5.6,
    "pcgrad, features": 1.6,
    "mgda, features": 1.6,
}
LATE = 3
"""The first steps of a run, which are left out: the ledger counts their operations."""


def trunk() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers)


def targets() -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * STEPS * 2, 256, generator=g)
    # Half of the tasks oppose the others in part.
    common = torch.randn(256, 1, generator=g)
    own = [0.1 * torch.randn(256, 1, generator=g) for _ in range(TASKS)]
    return x, {f"t{i}": x @ ((-1) ** i * 0.05 * common + own[i]) for i in range(TASKS)}


# Plain torch


class Net:
    """The net with its eight heads, and batches of the data."""

    def __init__(self) -> None:
        self.trunk, self.heads = trunk(), [nn.Linear(512, 1) for _ in range(TASKS)]
        self.shared = list(self.trunk.parameters())
        self.own = [p for head in self.heads for p in head.parameters()]
        self.x, self.y = targets()

    def batches(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        order = torch.randperm(len(self.x))
        for index in order.split(BATCH)[:STEPS]:
            yield self.x[index], [y[index] for y in self.y.values()]

    def losses(self, z: Tensor, ys: list[Tensor]) -> list[Tensor]:
        return [nn.functional.mse_loss(head(z), y) for head, y in zip(self.heads, ys, strict=True)]

    @torch.no_grad()
    def move(self, grads: Any) -> None:
        for p, g in zip([*self.shared, *self.own], grads, strict=True):
            p.add_(g, alpha=-0.01)


def summed(net: Net, x: Tensor, ys: list[Tensor]) -> None:
    loss = torch.stack(net.losses(net.trunk(x), ys)).sum()
    net.move(torch.autograd.grad(loss, [*net.shared, *net.own]))


def passes(net: Net, x: Tensor, ys: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of each task over the shared entries, one vector each; and of the heads."""
    losses = net.losses(net.trunk(x), ys)
    rows, own = [], []
    for i, loss in enumerate(losses):
        entries = [*net.shared, *net.heads[i].parameters()]
        grads = torch.autograd.grad(loss, entries, retain_graph=i < TASKS - 1)
        rows.append(torch.cat([g.flatten() for g in grads[: len(net.shared)]]))
        own += grads[len(net.shared) :]
    return rows, own


def descend(net: Net, grad: Tensor, own: list[Tensor]) -> None:
    pieces = grad.split([p.numel() for p in net.shared])
    net.move([*[g.view_as(p) for g, p in zip(pieces, net.shared, strict=True)], *own])


def by_hand(net: Net, x: Tensor, ys: list[Tensor]) -> None:
    rows, own = passes(net, x, ys)
    total = rows[0]
    for row in rows[1:]:
        total += row
    descend(net, total, own)


def libmtl_pcgrad(net: Net, x: Tensor, ys: list[Tensor]) -> None:
    rows, own = passes(net, x, ys)
    grads = torch.stack(rows)
    changed = grads.clone()
    for i in range(TASKS):
        order = list(range(TASKS))
        random.shuffle(order)
        for j in order:
            inner = torch.dot(changed[i], grads[j])
            if inner < 0:
                changed[i] -= inner * grads[j] / (grads[j].norm().pow(2) + 1e-8)
    descend(net, changed.sum(0), own)


def libmtl_mgda(net: Net, x: Tensor, ys: list[Tensor]) -> None:
    rows, own = passes(net, x, ys)
    grads = torch.stack(rows)
    gram = (grads @ grads.T).numpy()
    share = np.ones(TASKS) / TASKS
    for _ in range(250):
        slope = gram @ share
        best = int(slope.argmin())
        a, b, c = share @ slope, slope[best], gram[best, best]
        step = 1.0 if c <= b else 0.0 if b >= a else float((a - b) / (a + c - 2 * b))
        share = (1 - step) * share
        share[best] += step
        if step < 1e-5:
            break
    weights = torch.from_numpy(share).float()
    descend(net, torch.stack([w * g for w, g in zip(weights, grads, strict=True)]).sum(0), own)


def torchjd(name: str) -> Callable[[Net, Tensor, list[Tensor]], None]:
    from torchjd import aggregation
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator = getattr(aggregation, name)()

    def step(net: Net, x: Tensor, ys: list[Tensor]) -> None:
        z = net.trunk(x)
        mtl_backward(net.losses(z, ys), features=z)
        jac_to_grad(net.shared, aggregator)
        entries = [*net.shared, *net.own]
        net.move([p.grad for p in entries])
        for p in entries:
            p.grad = None

    return step


def plain(step: Callable[[Net, Tensor, list[Tensor]], None]) -> Callable[[], list[float]]:
    net = Net()

    def case() -> list[float]:
        times = []
        # To draw a batch is a part of a step.
        start = time.process_time()
        for x, ys in net.batches():
            step(net, x, ys)
            times.append(time.process_time() - start)
            start = time.process_time()
        return times

    return case


# Ours


def ours(method: cs.Method) -> Callable[[], list[float]]:
    x, y = targets()
    sources = cs.data.tasks(x, y, dict.fromkeys(y, "value"), validation=0.0, test=0.5)
    schedule = cs.settings.multitask(sources, "task")
    training = cs.Training(epochs=1, batch_size=BATCH, lr=0.01)

    def case() -> list[float]:
        model = cs.models.multi_head(cs.models.wrap(trunk(), headless=True, outputs=512), TASKS)
        times: list[float] = []
        original = Job.run

        def timed(self: Job, ledger: Any) -> Iterator[None]:
            start = time.process_time()
            for _ in original(self, ledger):
                times.append(time.process_time() - start)
                yield
                start = time.process_time()

        Job.run = timed  # type: ignore[method-assign]
        try:
            cs.run(schedule, method, model, training, progress=False)
        finally:
            Job.run = original  # type: ignore[method-assign]
        return times[LATE:]

    return case


# The solver


def solver() -> dict[str, float]:
    """MGDA's time for the Gramian of 8 rows, and its distance from the shortest vector, over 100 matrices."""
    times, gaps = [], []
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        rows = torch.randn(TASKS, 3 + seed % 12, generator=g).double() + 0.3
        if seed % 2:
            rows[::2] *= 100
        gram = rows @ rows.T
        start = time.process_time()
        share = shortest(gram)
        times.append(time.process_time() - start)
        # The duality gap: a'Ka - min_i (Ka)_i bounds how far |g|^2 is from its least value.
        slope = gram @ share
        gaps.append(float((share @ slope - slope.min()) / gram.diagonal().min()))
    return {"milliseconds": round(1e3 * statistics.median(times), 3), "largest gap": max(gaps)}


# Statistics of conflicts


def conflicts(turns: int) -> dict[str, float]:
    """What statistics of conflicts add to a step of PCGrad, which has the Gramian: % of its time."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    cases = {"without": ours(cs.methods.pcgrad()), "with": ours(cs.methods.pcgrad() + cs.methods.conflicts())}
    for turn in range(turns + 1):
        # In turns, each first as often as the other.
        for name in sorted(cases, reverse=turn % 2 == 0):
            found[name].append(statistics.median(cases[name]()))
    pairs = [
        with_ / without for with_, without in list(zip(found["with"], found["without"], strict=True))[1:]
    ]
    least = min(found["with"][1:]) / min(found["without"][1:])
    return {
        "median": round(100 * statistics.median(pairs) - 100, 2),
        "of the least": round(100 * least - 100, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="nine rounds in place of five")
    parser.add_argument("--only", help="names of cases that contain this, and the summed loss")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    m, exact = cs.methods, ("pcgrad", "mgda", "gradnorm", "cagrad", "nash_mtl")
    cheap = ("pcgrad", "mgda", "cagrad")
    cases = {
        "summed loss": plain(summed),
        "eight passes by hand": plain(by_hand),
        "finetune": ours(m.finetune()),
        **{name: ours(getattr(m, name)()) for name in exact},
        **{f"{name}, features": ours(getattr(m, name)(level="features")) for name in cheap},
        **{f"torchjd's {name}": plain(torchjd(name)) for name in ("PCGrad", "MGDA", "UPGrad")},
        "LibMTL's PCGrad": plain(libmtl_pcgrad),
        "LibMTL's MGDA": plain(libmtl_mgda),
    }
    base = next(iter(cases))
    if arguments.only:
        cases = {name: case for name, case in cases.items() if name == base or arguments.only in name}

    # Medians within a turn first: the load of a machine changes from turn to turn.
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    load = os.getloadavg()[0]
    for turn in range(10 if arguments.full else 6):
        found = {name: statistics.median(case()) for name, case in cases.items()}
        # The first turn warms up.
        for name, median in found.items() if turn else ():
            ratios[name].append(median / found[base])
            seconds[name].append(median)

    rows = [
        {
            "case": name,
            "milliseconds": round(1e3 * statistics.median(seconds[name]), 2),
            "ratio": round(statistics.median(own), 2),
            "range": f"{min(own):.2f} to {max(own):.2f}",
            "limit": LIMITS.get(name),
        }
        for name, own in ratios.items()
    ]
    said = {"conflict statistics, % of a step of PCGrad (limit 2)": conflicts(30 if arguments.full else 16)}
    facts = {"load before": load, "rows": rows, **said, "MGDA's solver": solver()}
    table = ["| case | ms per step | ratio (median, least to most) | limit |", "|---|---|---|---|"]
    table += [
        f"| {r['case']} | {r['milliseconds']} | {r['ratio']} ({r['range']}) | {r['limit'] or ''} |"
        for r in rows
    ]
    table += ["", *[f"- {k}: {v}" for k, v in facts.items() if k != "rows"]]
    if arguments.only:
        print("\n".join(table))
    else:
        save(Path(__file__).stem, __doc__, facts, "\n".join(table))


if __name__ == "__main__":
    main()
