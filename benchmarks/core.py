"""The overhead of continual training over a plain SGD loop on tensors in memory, as ratios of CPU time.

MLP 784-256-256-10, batch 64, 60,000 samples in 5 domains, one epoch, one thread; all cases are timed in
turns. `make results` writes results/core.{json,md}. The loop has no evaluation. "with metrics" evaluates all
five test sets (10,000 samples) before training and after each source: 60,000 forward passes, which the "loop
that evaluates" makes too. Memory batches are of 64 (DER++ draws two of them) or, where the row says so, of
32 (so that DER++ sees 64 remembered examples per step, as ER does). "by hand" is the same method in plain
torch for this one net, with a buffer that is full from the first step: what a step of it must cost; the last
column is our time over it. Data: MNIST from CONSILIENCE_DATA, else random numbers of the same shape (the
time is the same).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

os.environ["OMP_NUM_THREADS"] = "1"

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import consilience as cs
from common import save
from consilience.core.source import Source, Tensors

LIMITS = {
    "plain": 1.10,
    "with metrics": 1.20,
    "er": 1.65,
    "lwf": 1.6,
    "si": 1.6,
    "ewc": 2.1,
    "agem": 1.65,
    "derpp": 1.8,
    "gem": 8.0,
}
SOURCES = 5


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class Named(nn.Module):
    """The same net, called by the names of two parts, of which it reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.net(image)


def as_trees(sources: list[Source]) -> list[Source]:
    """Return the sources with inputs of two parts."""
    return [s.map(x=lambda x: cs.Tree({"image": x, "weight": torch.ones(len(x), 1)})) for s in sources]


def data(samples: int, tests: int, few: bool) -> list[Source]:
    """Make five domains of the same ten classes; `few` keeps ten test samples each, to evaluate for free."""
    if os.environ.get("CONSILIENCE_DATA"):
        whole = cs.data.npz("mnist", flat=True)
        (x, y), (xt, yt) = whole.train.whole(), whole.test.whole()
        v, w = whole.validation.whole()
        x, y = torch.cat([x, v])[:samples], torch.cat([y, w])[:samples]
        xt, yt = xt[:tests], yt[:tests]
    else:
        g = torch.Generator().manual_seed(0)
        x, xt = torch.rand(samples, 784, generator=g), torch.rand(tests, 784, generator=g)
        y, yt = torch.randint(10, (samples,), generator=g), torch.randint(10, (tests,), generator=g)
    labels = tuple(("mnist", str(i)) for i in range(10))
    parts = zip(x.chunk(SOURCES), y.chunk(SOURCES), xt.chunk(SOURCES), yt.chunk(SOURCES), strict=True)
    sources = []
    for i, (a, b, c, d) in enumerate(parts):
        test = Tensors(c[:10], d[:10]) if few else Tensors(c, d)
        sources.append(
            Source(f"mnist/{i}", Tensors(a, b), Tensors(a[:1], b[:1]), test, labels, tuple(range(10)))
        )
    return sources


def loop(sources: list[Source], epochs: int, evaluate: bool = False) -> None:
    """Run a plain loop over tensors in memory; with `evaluate`, also the forward passes of the matrix."""
    torch.manual_seed(0)
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for s in sources:
        x, y = s.train.whole()
        for _ in range(epochs):
            order = torch.randperm(len(x))
            for i in range(0, len(x), 64):
                index = order[i : i + 64]
                optimiser.zero_grad()
                loss = nn.functional.cross_entropy(model(x[index]), y[index])
                loss.backward()
                optimiser.step()
        if evaluate:
            judge(model, sources)
    if evaluate:
        judge(model, sources)


def by_hand(sources: list[Source], method: str, batch: int = 64) -> None:
    """Run ER, A-GEM or DER++ in plain torch: the same passes, with parts that go together in one."""
    torch.manual_seed(0)
    model = net()
    params = list(model.parameters())
    entropy = nn.functional.cross_entropy
    for s in sources:
        x, y = s.train.whole()
        mx, my, mz = x[:500], y[:500], torch.zeros(500, 10)
        order = torch.randperm(len(x))
        for i in range(0, len(x), 64):
            index = order[i : i + 64]
            a, b = torch.randint(500, (2, batch))
            if method == "agem":
                grads = torch.autograd.grad(entropy(model(x[index]), y[index]), params)
                others = torch.autograd.grad(entropy(model(mx[a]), my[a]), params)
                g, r = (torch.cat([t.view(-1) for t in ts]) for ts in (grads, others))
                dot = torch.dot(g, r)
                if dot < 0:
                    g -= (dot / torch.dot(r, r)) * r
                grads = [
                    t.view(p.shape) for t, p in zip(g.split([p.numel() for p in params]), params, strict=True)
                ]
            elif method == "er":
                out = model(torch.cat([x[index], mx[a]]))
                loss = (entropy(out[: len(index)], y[index]) + entropy(out[len(index) :], my[a])) / 2
                grads = torch.autograd.grad(loss, params)
            else:
                out, old, again = model(torch.cat([x[index], mx[a], mx[b]])).split([len(index), batch, batch])
                loss = (
                    entropy(out, y[index])
                    + 0.1 * nn.functional.mse_loss(old, mz[a])
                    + 0.5 * entropy(again, my[b])
                )
                mz[a] = old.detach()
                grads = torch.autograd.grad(loss, params)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p.add_(g, alpha=-0.05)


def judge(model: nn.Module, sources: list[Source]) -> list[float]:
    """Accuracy on every test set, in batches of 512 (the fastest here)."""
    with torch.no_grad():
        return [
            float(torch.cat([model(x).argmax(1) == y for x, y in s.test.chunks(512)]).double().mean())
            for s in sources
        ]


def ours(sources: list[Source], method: cs.Method, epochs: int, model: Callable[[], nn.Module] = net) -> None:
    training = cs.Training(epochs=epochs, batch_size=64, lr=0.05)
    cs.run(cs.settings.continual(sources, "domain"), method, cs.models.wrap(model), training)


def memory(which: str, samples: int) -> float:
    """Peak resident memory [MiB] of a process that runs one case."""
    if which == "child":
        raise AssertionError
    out = subprocess.run(
        [sys.executable, __file__, "--child", which, "--samples", str(samples)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(out.stdout.split()[-1])


def importing(code: str) -> float:
    """Seconds of CPU that a fresh interpreter takes for some imports, the least of five."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="nine rounds in place of five")
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    few, many = data(arguments.samples, 10_000, True), data(arguments.samples, 10_000, False)
    trees, m = as_trees(few), cs.methods
    cases = {
        "loop": lambda: loop(few, 1),
        "loop that evaluates": lambda: loop(many, 1, True),
        "plain": lambda: ours(few, m.finetune(), 1),
        "plain, tree": lambda: ours(trees, m.finetune(), 1, Named),
        "with metrics": lambda: ours(many, m.finetune(), 1),
        "er": lambda: ours(few, m.er(500, 64), 1),
        "er, tree": lambda: ours(trees, m.er(500, 64), 1, Named),
        "er, batch 32": lambda: ours(few, m.er(500, 32), 1),
        "lwf": lambda: ours(few, m.lwf(), 1),
        "si": lambda: ours(few, m.si(), 1),
        "ewc": lambda: ours(few, m.ewc(1.0), 1),
        "agem": lambda: ours(few, m.agem(500, 64), 1),
        "agem, batch 32": lambda: ours(few, m.agem(500, 32), 1),
        "derpp": lambda: ours(few, m.derpp(500, 64), 1),
        "derpp, batch 32": lambda: ours(few, m.derpp(500, 32), 1),
        "gem": lambda: ours(few, m.gem(256), 1),
        "er by hand": lambda: by_hand(few, "er"),
        "agem by hand": lambda: by_hand(few, "agem"),
        "derpp by hand": lambda: by_hand(few, "derpp"),
    }
    if arguments.child:
        cases[arguments.child]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    times: dict[str, list[float]] = {c: [] for c in cases}
    load = os.getloadavg()[0]
    for _ in range(9 if arguments.full else 5):
        for name, case in cases.items():
            start = time.process_time()
            case()
            times[name].append(time.process_time() - start)
    base = times["loop"]

    def over(a: list[float], b: list[float]) -> float:
        return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 3)

    rows = []
    for name, t in times.items():
        ratios = [a / b for a, b in zip(t, base, strict=True)]
        rows.append(
            {
                "case": name,
                "seconds": round(statistics.median(t), 3),
                "ratio": round(statistics.median(ratios), 3),
                "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
                "least": round(min(t) / min(base), 3),
                "limit": LIMITS.get(name),
                "over hand": over(t, times[f"{name} by hand"]) if f"{name} by hand" in times else None,
            }
        )
    stats = ours_step_cost(few)
    torch_time, our_time = (
        importing("import torch"),
        importing("import torch, consilience; consilience.run, consilience.methods"),
    )
    peaks = {c: memory(c, arguments.samples) for c in ("loop", "plain", "ewc")}
    state = 2 * 4 * sum(p.numel() for p in net().parameters()) / 2**20 * SOURCES
    tree = {name: over(times[f"{name}, tree"], times[name]) for name in ("plain", "er")}
    both = [a / b for a, b in zip(times["with metrics"], times["loop that evaluates"], strict=True)]
    facts = {
        "with metrics, over a loop that evaluates as often": round(statistics.median(both), 3),
        "tree over tensor (limit 1.03)": tree,
        "samples": arguments.samples,
        "load before": load,
        "rows": rows,
        "EWC step, source 5 over source 2": stats,
        "import consilience beyond torch [s]": round(importing("import consilience"), 3),
        "import consilience and run beyond torch [s]": round(our_time - torch_time, 3),
        "peak memory [MiB]": {k: round(v, 1) for k, v in peaks.items()},
        "peak memory, plain over loop": round(peaks["plain"] / peaks["loop"], 3),
        "peak memory, (EWC - its state) over loop": round((peaks["ewc"] - state) / peaks["loop"], 3),
    }
    table = [
        "| case | CPU s | ratio (median, least to most) | ratio of the least | limit | over by hand |",
        "|---|---|---|---|---|---|",
    ]
    table += [
        f"| {r['case']} | {r['seconds']} | {r['ratio']} ({r['range']}) | {r['least']} | {r['limit'] or ''} "
        f"| {r['over hand'] or ''} |"
        for r in rows
    ]
    table += ["", *[f"- {k}: {v}" for k, v in facts.items() if k != "rows"]]
    save(Path(__file__).stem, __doc__, facts, "\n".join(table))


def ours_step_cost(sources: list[Source]) -> float:
    """CPU time a step of EWC with four past sources over that with one: the quadratics add."""
    from consilience.loop.job import Job

    marks: dict[str, float] = {}
    original = Job.run

    def timed(self, ledger):  # type: ignore[no-untyped-def]
        start = time.process_time()
        yield from original(self, ledger)
        marks[self.name] = time.process_time() - start

    ratios = []
    Job.run = timed  # type: ignore[method-assign]
    try:
        for _ in range(5):
            ours(sources, cs.methods.ewc(1.0), 1)
            ratios.append(marks["mnist/4"] / marks["mnist/1"])
    finally:
        Job.run = original  # type: ignore[method-assign]
    return round(statistics.median(ratios), 3)


if __name__ == "__main__":
    main()
