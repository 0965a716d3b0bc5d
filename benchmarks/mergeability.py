"""Training for merging, end to end on real data: full, sparse, anchored, linearised and undertrained
experts, merged by every aggregator.

Data from CONSILIENCE_DATA: MNIST, Fashion-MNIST, USPS, notMNIST and CIFAR-10, gray, 28x28; MNIST-M (gray) is
the base task. SIZES
A net of three 3x3 convolutions (16, 32, 64 maps) with group norm, ReLU and pooling, and one linear head of
60 outputs, of which each task has
its ten, is pretrained on `pretrain` images of each, ten times as many of the base task, and its head held.
Every expert trains the convolutions from there on another part
of one data set (SGD, momentum .9, lr by regime chosen on validation images of the first two tasks). Merged
at the coefficient 1 of the aggregator's own
merge, and at the one of LAMBDAS by which base + lambda (merge - base) is best on *validation* images; test
images never choose.
Normalised: accuracy over that of the task's own expert, mean over tasks. Control: accuracy on the base task,
whose own value is in the table.
Transfer: accuracy of expert i on task j over the base's. Disentanglement: xi on a grid for the first two
tasks. Figures: mergeability_*.svg.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from common import RESULTS, save
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.schedule import Evaluate, Expert, Phase, Schedule, Train, build
from consilience.core.source import Source, Tensors
from consilience.merging._analysis import disentanglement, transfer_matrix
from consilience.merging._figures import draw
from consilience.report._svg import Axis, lines_chart

NAMES = {
    "mnist": "mnist",
    "fashion_mnist": "fashion",
    "usps": "usps",
    "notmnist10k": "notmnist",
    "cifar10_jpeg": "cifar10",
    "mnist_m_jpeg": "mnist-m",
}
SIZES = {
    "pretrain": 300,
    "train": 2500,
    "validation": 200,
    "test": 500,
    "pretraining": 6,
    "epochs": 3,
    "wide": 16,
}
FULL = {
    "pretrain": 300,
    "train": 5000,
    "validation": 500,
    "test": 1900,
    "pretraining": 10,
    "epochs": 10,
    "wide": 32,
}
TINY = {"pretrain": 120, "train": 150, "validation": 50, "test": 60, "pretraining": 1, "epochs": 1, "wide": 4}
LAMBDAS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
WORK = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Fractions of the steps of full experts."""
REGIMES: dict[str, Callable[[], cs.Method]] = {
    "full": cs.methods.finetune,
    "talos .1": lambda: cs.methods.talos(0.1, samples=500),
    "talos .5": lambda: cs.methods.talos(0.5, samples=500),
    "anchored": lambda: cs.methods.fedprox(1.0),
    "linearised": cs.methods.finetune,
}
RATES = (0.01, 0.03, 0.1, 0.3)
AGGREGATORS: dict[str, Callable[[], cs.Method]] = {
    "average": cs.methods.average,
    "ties .2": lambda: cs.methods.ties(0.2),
    "dare .5": lambda: cs.methods.aggregate(cs.aggregators.dare(0.5)),
    "dare .5 + ties": lambda: cs.methods.aggregate(cs.aggregators.dare(0.5, cs.aggregators.ties(1.0))),
    "breadcrumbs .5": lambda: cs.methods.aggregate(cs.aggregators.breadcrumbs(0.5)),
    "consensus": lambda: cs.methods.aggregate(cs.aggregators.consensus()),
    "model stock": lambda: cs.methods.aggregate(cs.aggregators.model_stock()),
    "median": lambda: cs.methods.aggregate(cs.aggregators.median()),
    "geometric median": lambda: cs.methods.aggregate(cs.aggregators.geometric_median()),
    "pcgrad": lambda: cs.methods.aggregate(cs.aggregators.pcgrad()),
    "mgda": lambda: cs.methods.aggregate(cs.aggregators.mgda()),
}
BY_DATA: dict[str, Callable[[], cs.Method]] = {
    "fisher": lambda: cs.methods.fisher_merging(samples=500),
    "regmean": cs.methods.regmean,
}
"""They need the experts' data, and so train them again with these (the same experts, to the bit)."""
TRAINED_AGAIN = ("full", "talos .1", "talos .5")
"""The regimes that these are tried with."""
GRID = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)

Sizes = Mapping[str, int]


class Net(nn.Sequential):
    """Three convolutions with group norm and pooling, and a linear head."""

    def __init__(self, wide: int) -> None:
        layers: list[nn.Module] = []
        for before, after in ((1, wide), (wide, 2 * wide), (2 * wide, 4 * wide)):
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.GroupNorm(4, after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        super().__init__(*layers, nn.Flatten(), nn.Linear(4 * wide * 9, 60))


def net(wide: int) -> Any:
    return cs.models.wrap(lambda: Net(wide))


def model_of(regime: str, wide: int, base: Params) -> tuple[Model, Params]:
    """The model of a regime, its head held, and the base in its entries."""
    held = cs.models.frozen(net(wide), ("13.*",))
    if regime != "linearised":
        return held, base
    tangent = cs.models.linearised(held)
    return tangent, tangent.at(base)


@lru_cache(maxsize=1)
def sources(sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """(what the base learns, what experts learn): six data sets, gray and 28x28, with common validation and
    test images."""
    n, first, later = dict(sizes), [], []
    for i, (file, name) in enumerate(NAMES.items()):
        s = cs.data.npz(
            file, limit=max(11 * n["pretrain"], n["pretrain"] + n["train"]) + 10 * n["validation"], seed=0
        )

        def gray(x: Tensor) -> Tensor:
            x = x.float().mean(1, keepdim=True)
            return x if x.shape[-1] == 28 else F.interpolate(x, size=28, mode="bilinear", antialias=True)

        g = torch.Generator().manual_seed(i)
        x, y = s.train.whole()
        order = torch.randperm(len(y), generator=g)
        order, share = (
            order[: n["pretrain"] + n["train"] if i < 5 else 10 * n["pretrain"]],
            n["pretrain"] if i < 5 else len(order),
        )
        some = torch.randperm(len(s.test), generator=g)[: n["test"]]
        checked = torch.randperm(len(s.validation), generator=g)[: n["validation"]]
        parts = {"validation": s.validation.select(checked), "test": s.test.select(some)}
        parts = {k: Tensors(gray(v.whole()[0]), v.whole()[1]) for k, v in parts.items()}
        first.append(replace(s, name=name, train=Tensors(gray(x[order[:share]]), y[order[:share]]), **parts))
        rest = order[n["pretrain"] :] if i < 5 else order[:share]
        later.append(replace(s, name=name, train=Tensors(gray(x[rest]), y[rest]), **parts))
    return tuple(first), tuple(later)


def alone(of: Sequence[Source], i: int, base: Params, work: float = 1.0) -> Schedule:
    """One agent learns one source, in the frame of all."""

    def plan(seed: int) -> list[Phase]:
        return [Train({"agent": (of[i].name,)}, {"agent": work}), Evaluate("end")]

    return build("alone", of, "task", plan, "agent", base=base)


def training(rate: float, epochs: int) -> cs.Training:
    return cs.Training(epochs=epochs, batch_size=32, lr=rate, momentum=0.9)


@torch.no_grad()
def accuracies(model: Model, params: Params, tasks: Iterable[Source], part: str = "test") -> list[float]:
    found = []
    for s in tasks:
        columns, right = torch.tensor(s.classes), 0
        for x, y in getattr(s, part).chunks(250):
            right += int((columns[model(params, {}, x, s.task, False)[0][:, columns].argmax(1)] == y).sum())
        found.append(right / len(getattr(s, part)))
    return found


def pretrain(task: tuple[Any, int]) -> Params:
    sizes, _ = task
    _quiet()
    n = dict(sizes)
    first, _ = sources(sizes)
    plan = cs.settings.multitask(first, "task")
    return dict(cs.run(plan, cs.methods.finetune(), net(n["wide"]), training(0.03, n["pretraining"])).params)


def expert(task: tuple[Any, str, int, float, float, Params]) -> dict[str, Any]:
    """One expert: its regime, task, rate and fraction of the steps."""
    sizes, regime, i, rate, work, base = task
    _quiet()
    n = dict(sizes)
    _, later = sources(sizes)
    model, start = model_of(regime, n["wide"], base)
    began = time.process_time()
    try:
        params = cs.run(
            alone(later, i, start, work), REGIMES[regime](), model, training(rate, n["epochs"])
        ).params
    except cs.ConsilienceError as e:  # it diverged
        return {
            "params": dict(start),
            "validation": 0.0,
            "seconds": time.process_time() - began,
            "why": str(e),
        }
    framed = alone(later, i, start).sources[i]
    score = accuracies(model, dict(params), [framed], "validation")[0]
    return {"params": dict(params), "validation": score, "seconds": time.process_time() - began}


def merged(task: tuple[Any, str, str, float, int, Params, list[Params]]) -> dict[str, Any]:
    """One merge of the first experts: at coefficient 1, and at the best of LAMBDAS on validation images."""
    sizes, regime, aggregator, rate, many, base, experts = task
    _quiet()
    n = dict(sizes)
    _, later = sources(sizes)
    model, start = model_of(regime, n["wide"], base)
    framed = alone(later, 0, start).sources
    began = time.process_time()
    try:
        if aggregator in BY_DATA:
            schedule = cs.settings.merging(later[:many], base=start, scenario="task")
            method = cs.Method.of([REGIMES[regime](), BY_DATA[aggregator]()])
            result = cs.run(schedule, method, model, training(rate, n["epochs"]))
        else:
            given = [Expert(s.name, p, s) for s, p in zip(later[:many], experts, strict=False)]
            result = cs.run(
                cs.settings.merging(experts=given, base=start, scenario="task"),
                AGGREGATORS[aggregator](),
                model,
            )
    except cs.ConsilienceError as e:
        return {"refused": str(e)}
    end, seconds = dict(result.params), time.process_time() - began

    def at(a: float) -> Params:
        moves = {k for k, p in end.items() if p.is_floating_point() and not model.frozen(k)}
        return {k: start[k] + a * (p - start[k]) if k in moves and a != 1 else p for k, p in end.items()}

    tried = {a: sum(accuracies(model, at(a), framed[:many], "validation")) / many for a in LAMBDAS}
    best = max(tried, key=lambda a: tried[a])
    one, tuned = (accuracies(model, at(a), [*framed[:many], framed[-1]]) for a in (1.0, best))
    return {"plain": one, "lambda": best, "tuned": tuned, "tried": list(tried.values()), "seconds": seconds}


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def percent(v: float) -> str:
    return f"{100 * v:.1f}"


def figure(
    into: Path, name: str, title: str, stages: Sequence[str], series: Sequence[tuple[str, Sequence[float]]]
) -> str:
    """A line chart as a file; returns the line that shows it."""
    chart = lines_chart(title, stages, series, Axis(True, percent, lambda v, step: percent(v)))
    draw(into / f"mergeability_{name}.svg", [(title, chart)])
    return f"![{title}](mergeability_{name}.svg)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="more images and epochs, a wider net")
    parser.add_argument(
        "--tiny", action="store_true", help="a try of every part, written to a temporary folder"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    into = Path(tempfile.mkdtemp()) if chosen.tiny else RESULTS
    n = FULL if chosen.full else TINY if chosen.tiny else SIZES
    sizes, began = tuple(n.items()), time.time()
    tasks = list(NAMES.values())[:5]
    facts: dict[str, Any] = {"sizes": n, "lambdas": LAMBDAS}
    lines: list[str] = []
    with ProcessPoolExecutor(chosen.workers) as pool:
        base = pool.submit(pretrain, (sizes, 0)).result()
        print(f"base after {time.time() - began:.0f} s", flush=True)
        chosen_rates = rates(pool, sizes, base, facts)
        print(f"rates {chosen_rates} after {time.time() - began:.0f} s", flush=True)
        work = [(sizes, r, i, chosen_rates[r], 1.0, base) for r in REGIMES for i in range(5)]
        done = dict(zip([(r, i) for r in REGIMES for i in range(5)], pool.map(expert, work), strict=True))
        experts = {r: [done[r, i]["params"] for i in range(5)] for r in REGIMES}
        print(f"experts after {time.time() - began:.0f} s", flush=True)
        lines += own(sizes, base, experts, done, chosen_rates, facts)
        lines += aggregators(pool, sizes, base, experts, chosen_rates, facts)
        print(f"aggregators after {time.time() - began:.0f} s", flush=True)
        lines += counts(pool, into, sizes, base, experts, chosen_rates, facts)
        lines += steps(pool, into, sizes, base, chosen_rates, facts)
        print(f"counts and steps after {time.time() - began:.0f} s", flush=True)
    lines += analyses(into, sizes, base, experts, facts)
    facts["seconds"] = time.time() - began
    told = (
        f"Sizes: {', '.join(f'{k} {v}' for k, v in n.items())} (images a data set; epochs; maps). "
        f"{facts['seconds']:.0f} s on {chosen.workers} workers.\n\n"
    )
    about = (__doc__ or "").replace("SIZES\n", f"\n{', '.join(tasks)}.\n")
    if chosen.tiny:
        print(told + "\n".join(lines), into, sep="\n")
    else:
        save("mergeability", about, facts, told + "\n".join(lines))


def rates(pool: ProcessPoolExecutor, sizes: Any, base: Params, facts: dict[str, Any]) -> dict[str, float]:
    """The learning rate of every regime by the validation accuracy of its first two experts (a third of the
    work)."""
    trials = [(r, rate, i) for r in REGIMES for rate in RATES for i in range(2)]
    found = list(pool.map(expert, [(sizes, r, i, rate, 1 / 3, base) for r, rate, i in trials]))
    score = {(r, rate): 0.0 for r, rate, _ in trials}
    for (r, rate, _), f in zip(trials, found, strict=True):
        score[r, rate] += f["validation"] / 2
    facts["rates"] = [{"regime": r, "lr": rate, "validation": v} for (r, rate), v in score.items()]
    return {r: max(RATES, key=lambda rate: score[r, rate]) for r in REGIMES}


def own(
    sizes: Any,
    base: Params,
    experts: Mapping[str, list[Params]],
    done: Mapping[Any, Any],
    chosen: Mapping[str, float],
    facts: dict[str, Any],
) -> list[str]:
    """What the experts can before they are merged."""
    n, tasks = dict(sizes), list(NAMES.values())
    _, later = sources(sizes)
    model, _ = model_of("full", n["wide"], base)
    framed = alone(later, 0, base).sources
    lines = [f"| experts | lr | {' | '.join(tasks[:5])} | mean | CPU s each |", "|---" * 9 + "|"]
    first = accuracies(model, base, framed)
    facts["base"] = first
    lines.append(
        f"| base (control: {percent(first[5])}) | - | {' | '.join(map(percent, first[:5]))} | "
        f"{percent(mean(first[:5]))} | - |"
    )
    facts["experts"] = {}
    for r, some in experts.items():
        m, _ = model_of(r, n["wide"], base)
        found = [accuracies(m, p, [framed[i]])[0] for i, p in enumerate(some)]
        seconds = mean(done[r, i]["seconds"] for i in range(5))
        facts["experts"][r] = {"accuracy": found, "lr": chosen[r], "seconds": seconds}
        lines.append(
            f"| {r} | {chosen[r]} | {' | '.join(map(percent, found))} | {percent(mean(found))} | "
            f"{seconds:.0f} |"
        )
    return ["## Experts, each on its own task (accuracy %)", "", *lines, ""]


def aggregators(
    pool: ProcessPoolExecutor,
    sizes: Any,
    base: Params,
    experts: Mapping[str, list[Params]],
    chosen: Mapping[str, float],
    facts: dict[str, Any],
) -> list[str]:
    """Five experts of every regime by every aggregator."""
    work = [(r, a) for r in REGIMES for a in AGGREGATORS] + [(r, a) for r in TRAINED_AGAIN for a in BY_DATA]
    found = dict(
        zip(
            work,
            pool.map(merged, [(sizes, r, a, chosen[r], 5, base, experts[r]) for r, a in work]),
            strict=True,
        )
    )
    facts["merged"] = [{"regime": r, "aggregator": a, **f} for (r, a), f in found.items()]
    lines = ["## Five experts merged: accuracy % on the five tasks (normalised), and the control", ""]
    lines += ["| aggregator | " + " | ".join(f"{r}: at 1 | tuned (lambda) | control" for r in REGIMES) + " |"]
    lines += ["|---" * (3 * len(REGIMES) + 1) + "|"]
    for a in (*AGGREGATORS, *BY_DATA):
        cells = []
        for r in REGIMES:
            f, best = found.get((r, a), {"refused": "not tried"}), facts["experts"][r]["accuracy"]
            if "refused" in f:
                cells += [f["refused"] if f["refused"] == "not tried" else "refuses", "-", "-"]
                continue
            said = [
                f"{percent(mean(v[:5]))} "
                f"({percent(mean(x / max(y, 1e-9) for x, y in zip(v[:5], best, strict=True)))})"
                for v in (f["plain"], f["tuned"])
            ]
            cells += [said[0], f"{said[1]} ({f['lambda']:g})", percent(f["tuned"][5])]
        lines.append(f"| {a} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "`average` tuned is task arithmetic with its coefficient searched (lambda / 5 for a sum).",
        "",
    ]


def counts(
    pool: ProcessPoolExecutor,
    into: Path,
    sizes: Any,
    base: Params,
    experts: Mapping[str, list[Params]],
    chosen: Mapping[str, float],
    facts: dict[str, Any],
) -> list[str]:
    """Accuracy against the number of experts."""
    pairs = [(r, "average") for r in REGIMES] + [(r, "ties .2") for r in ("full", "talos .5")]
    work = [(r, a, k) for r, a in pairs for k in (2, 3, 4, 5)]
    found = dict(
        zip(
            work,
            pool.map(merged, [(sizes, r, a, chosen[r], k, base, experts[r]) for r, a, k in work]),
            strict=True,
        )
    )
    facts["counts"] = [{"regime": r, "aggregator": a, "experts": k, **f} for (r, a, k), f in found.items()]

    def normalised(r: str, a: str, k: int) -> float:
        best = facts["experts"][r]["accuracy"]
        return mean(x / max(y, 1e-9) for x, y in zip(found[r, a, k]["tuned"][:k], best, strict=False))

    series = [(f"{r}, {a}", [normalised(r, a, k) for k in (2, 3, 4, 5)]) for r, a in pairs]
    lines = [
        "## Against the number of experts (normalised accuracy %, tuned)",
        "",
        "| experts, aggregator | 2 | 3 | 4 | 5 |",
        "|---" * 5 + "|",
    ]
    lines += [f"| {name} | {' | '.join(map(percent, values))} |" for name, values in series]
    shown = [
        (f"{r}, tuned arithmetic", values)
        for (r, a), (_, values) in zip(pairs, series, strict=True)
        if a == "average"
    ]
    return [
        *lines,
        "",
        figure(
            into, "experts", "Normalised accuracy against the number of experts", ["2", "3", "4", "5"], shown
        ),
        "",
    ]


def steps(
    pool: ProcessPoolExecutor,
    into: Path,
    sizes: Any,
    base: Params,
    chosen: Mapping[str, float],
    facts: dict[str, Any],
) -> list[str]:
    """Accuracy against the fraction of steps that full experts train (undertraining)."""
    n = dict(sizes)
    todo = [(w, i) for w in WORK for i in range(5)]
    found = dict(
        zip(
            todo,
            pool.map(expert, [(sizes, "full", i, chosen["full"], w, base) for w, i in todo]),
            strict=True,
        )
    )
    params = {w: [found[w, i]["params"] for i in range(5)] for w in WORK}
    one = list(
        pool.map(merged, [(sizes, "full", "average", chosen["full"], 5, base, params[w]) for w in WORK])
    )
    _, later = sources(sizes)
    model, _ = model_of("full", n["wide"], base)
    framed = alone(later, 0, base).sources
    many = [max(1, round(w * n["epochs"] * -(-len(later[0].train) // 32))) for w in WORK]
    alone_ = [mean(accuracies(model, p, [framed[i]])[0] for i, p in enumerate(params[w])) for w in WORK]
    series = [
        ("experts, each on its own", alone_),
        ("average", [mean(f["plain"][:5]) for f in one]),
        ("task arithmetic, tuned", [mean(f["tuned"][:5]) for f in one]),
        ("control, tuned", [f["tuned"][5] for f in one]),
    ]
    facts["steps"] = {
        "steps": many,
        **{name: values for name, values in series},
        "lambda": [f["lambda"] for f in one],
    }
    lines = [
        "## Against the steps of the experts (accuracy %)",
        "",
        f"| steps (MNIST) | {' | '.join(map(str, many))} |",
        "|---" * (len(WORK) + 1) + "|",
    ]
    lines += [f"| {name} | {' | '.join(map(percent, values))} |" for name, values in series]
    return [
        *lines,
        "",
        figure(into, "steps", "Accuracy against the steps of the experts", [str(m) for m in many], series),
        "",
    ]


def analyses(
    into: Path, sizes: Any, base: Params, experts: Mapping[str, list[Params]], facts: dict[str, Any]
) -> list[str]:
    """Transfer matrices and disentanglement errors."""
    n = dict(sizes)
    _, later = sources(sizes)
    lines = ["## Task x task: accuracy of the expert (row) on the task (column) over the base's", ""]
    facts["transfer"], facts["disentanglement"] = {}, {}
    charts = []
    for r, some in experts.items():
        model, start = model_of(r, n["wide"], base)
        framed = alone(later, 0, start).sources[:5]
        t = transfer_matrix(model, start, some, framed)
        facts["transfer"][r] = {"base": t.base, "accuracies": t.accuracies, "others": t.others, "own": t.own}
        name = f"transfer_{r.replace(' ', '').replace('.', '')}"
        t.write(into / f"mergeability_{name}.svg")
        lines += [
            f"**{r}**: mean |ratio - 1| off the diagonal {t.others:.3f}, own accuracy "
            f"{percent(t.own)} % ([figure](mergeability_{name}.svg))",
            "",
            "```",
            t.table(),
            "```",
            "",
        ]
        few = [replace(s, test=s.test.select(torch.arange(min(200, len(s.test))))) for s in framed[:2]]
        d = disentanglement(model, start, some[:2], few, GRID)
        d.write(into / f"mergeability_disentanglement_{r.replace(' ', '').replace('.', '')}.svg")
        facts["disentanglement"][r] = {"coefficients": d.coefficients, "errors": d.errors, "mean": d.mean}
        charts.append((r, d.mean))
    lines += [
        "## Disentanglement error of mnist and fashion, mean over the grid (0: none, 2: all)",
        "",
        "| experts | mean xi |",
        "|---|---|",
    ]
    return [*lines, *[f"| {r} | {v:.3f} |" for r, v in charts], ""]


if __name__ == "__main__":
    main()
