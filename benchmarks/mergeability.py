"""Training for merging, end to end on real data: full, sparse, anchored, linearised and undertrained experts,
merged by every aggregator, over SEEDS seeds of everything.

Data from CONSILIENCE_DATA: MNIST, Fashion-MNIST, USPS, notMNIST and CIFAR-10, gray, 28x28; MNIST-M (gray)
is the base task. A net of three 3x3 convolutions (WIDE maps, then twice and four times as many) with group
norm, ReLU and pooling, and one linear head of 60 outputs, of which each task has its ten, is pretrained on
`pretrain` images of each, ten times as many of the base task, and its head held. Every expert trains the
convolutions from there on another part of one data set (SGD, momentum .9). The learning rate is chosen for
every regime in the same way, by the validation images of the first two tasks (first seed, a third of the
work). STRENGTHS Densities, the strength of the anchor and epochs are set by hand, epochs equal for all
regimes.

Merged at the coefficient 1 of the aggregator's own merge, and at the one of LAMBDAS by which base + lambda
(merge - base) is best on *validation* images, in each seed; test images never choose. In brackets stand the
lambdas of the seeds, with a star at the ends of the list. Normalised: accuracy over that of the task's own
expert, mean over tasks. Control: accuracy on the base task, whose own value is in the table. Transfer:
accuracy of expert i on task j over the base's. Disentanglement: xi on a grid for the first two tasks.
Figures (mergeability_*.svg) show means over seeds, or the first seed where they say so. Each value: mean
and standard deviation over seeds.
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
from common import PROTOCOL, RESULTS, Choice, save, spread, tune
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.schedule import Evaluate, Expert, Phase, Schedule, Train, build
from consilience.core.source import Source, Tensors
from consilience.merging._analysis import disentanglement, transfer_matrix
from consilience.report._figure import standing
from consilience.report._svg import Axis, lines_chart

NAMES = {
    "mnist": "mnist",
    "fashion_mnist": "fashion",
    "usps": "usps",
    "notmnist10k": "notmnist",
    "cifar10_jpeg": "cifar10",
    "mnist_m_jpeg": "mnist-m",
}
SEEDS = 3
SIZES = {
    "pretrain": 200,
    "train": 1000,
    "validation": 100,
    "test": 300,
    "pretraining": 6,
    "epochs": 3,
    "wide": 8,
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
LAMBDAS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
WORK = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Fractions of the steps of full experts."""
REGIMES: dict[str, Callable[[], cs.Method]] = {
    "full": cs.methods.finetune,
    "talos .1": lambda: cs.methods.talos(0.1, samples=500),
    "talos .5": lambda: cs.methods.talos(0.5, samples=500),
    "anchored": lambda: cs.methods.fedprox(1.0),
    "linearised": cs.methods.finetune,
}
RATES = (0.002, 0.008, 0.03, 0.12, 0.5)
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


@lru_cache(maxsize=3)
def sources(sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """(what the base learns, what experts learn): six data sets, gray and 28x28, with common validation and
    test images."""
    n, first, later = dict(sizes), [], []
    for i, (file, name) in enumerate(NAMES.items()):
        s = cs.data.npz(
            file,
            limit=max(11 * n["pretrain"], n["pretrain"] + n["train"]) + 10 * n["validation"],
            seed=n["seed"],
        )

        def gray(x: Tensor) -> Tensor:
            x = x.float().mean(1, keepdim=True)
            return x if x.shape[-1] == 28 else F.interpolate(x, size=28, mode="bilinear", antialias=True)

        g = torch.Generator().manual_seed(i + 100 * n["seed"])
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


def pretrain(sizes: Any) -> Params:
    _quiet()
    n = dict(sizes)
    first, _ = sources(sizes)
    plan = cs.settings.multitask(first, "task")
    how = training(0.03, n["pretraining"])
    return dict(cs.run(plan, cs.methods.finetune(), net(n["wide"]), how, seed=n["seed"]).params)


def expert(task: tuple[Any, str, int, float, float, Params]) -> dict[str, Any]:
    """One expert: its regime, task, rate and fraction of the steps."""
    sizes, regime, i, rate, work, base = task
    _quiet()
    n = dict(sizes)
    _, later = sources(sizes)
    model, start = model_of(regime, n["wide"], base)
    began = time.process_time()
    try:
        how = training(rate, n["epochs"])
        schedule = alone(later, i, start, work)
        params = cs.run(schedule, REGIMES[regime](), model, how, seed=n["seed"]).params
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
            result = cs.run(schedule, method, model, training(rate, n["epochs"]), seed=n["seed"])
        else:
            labels = alone(later, 0, start).frame.labels  # their columns in the net
            given = [Expert(s.name, p, s, labels=labels) for s, p in zip(later[:many], experts, strict=False)]
            result = cs.run(
                cs.settings.merging(experts=given, base=start, scenario="task"),
                AGGREGATORS[aggregator](),
                model,
                seed=n["seed"],
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
    standing([(title, chart)]).save(into / f"mergeability_{name}.svg")
    return f"![{title}](mergeability_{name}.svg)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more images and epochs, a wider net")
    parser.add_argument(
        "--tiny", action="store_true", help="a try of every part, written to a temporary folder"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    into = Path(tempfile.mkdtemp()) if chosen.tiny else RESULTS
    n = FULL if chosen.full else TINY if chosen.tiny else SIZES
    began, found = time.time(), []
    with ProcessPoolExecutor(chosen.workers) as pool:
        rates: dict[str, Choice] = {}
        for seed in range(SEEDS):
            sizes = tuple({**n, "seed": seed}.items())
            base = pool.submit(pretrain, sizes).result()
            rates = rates or chosen_rates(pool, sizes, base)
            found.append(one_seed(pool, into, sizes, base, {r: c.value for r, c in rates.items()}))
            print(f"seed {seed} after {time.time() - began:.0f} s", flush=True)
    lines = [
        f"Sizes: {', '.join(f'{k} {v}' for k, v in n.items())} (images a data set; epochs; maps); "
        f"{SEEDS} seeds; {chosen.workers} processes.",
        "",
        *own(found, rates),
        *aggregators(found),
        *counts(into, found),
        *steps(into, found),
        *analyses(found),
    ]
    facts = {"sizes": n, "lambdas": LAMBDAS, "rates": {r: c._asdict() for r, c in rates.items()}}
    about = (__doc__ or "").replace("STRENGTHS", PROTOCOL)
    for name, value in (
        ("SEEDS", SEEDS),
        ("WIDE", n["wide"]),
        ("LAMBDAS", ", ".join(f"{v:g}" for v in LAMBDAS)),
    ):
        about = about.replace(name, str(value))
    if chosen.tiny:
        print(about, "\n".join(lines), into, sep="\n")
    else:
        save("mergeability" + "_full" * chosen.full, about, {**facts, "seeds": found}, "\n".join(lines))


def chosen_rates(pool: ProcessPoolExecutor, sizes: Any, base: Params) -> dict[str, Choice]:
    """The learning rate of every regime by the validation accuracy of its first two experts."""

    def scores(trials: list[tuple[str, float]]) -> list[float]:
        work = [(sizes, r, i, rate, 1 / 3, base) for r, rate in trials for i in range(2)]
        found = [f["validation"] for f in pool.map(expert, work)]
        return [(a + b) / 2 for a, b in zip(found[::2], found[1::2], strict=True)]

    return tune({r: RATES for r in REGIMES}, scores)


def one_seed(
    pool: ProcessPoolExecutor, into: Path, sizes: Any, base: Params, rates: Mapping[str, float]
) -> dict[str, Any]:
    """Everything that is measured with one seed."""
    n = dict(sizes)
    _, later = sources(sizes)
    model, _ = model_of("full", n["wide"], base)
    framed = alone(later, 0, base).sources
    facts: dict[str, Any] = {"base": accuracies(model, base, framed)}

    # Experts with all steps of all regimes, and undertrained full ones.
    work = [(r, i, 1.0) for r in REGIMES for i in range(5)]
    work += [("full", i, w) for w in WORK if w < 1 for i in range(5)]
    done = dict(
        zip(work, pool.map(expert, [(sizes, r, i, rates[r], w, base) for r, i, w in work]), strict=True)
    )
    experts = {r: [done[r, i, 1.0]["params"] for i in range(5)] for r in REGIMES}
    facts["experts"] = {}
    for r, some in experts.items():
        m, _ = model_of(r, n["wide"], base)
        facts["experts"][r] = {
            "accuracy": [accuracies(m, p, [framed[i]])[0] for i, p in enumerate(some)],
            "lr": rates[r],
            "seconds": mean(done[r, i, 1.0]["seconds"] for i in range(5)),
        }

    # Merges: all five experts by every aggregator, fewer of them, and undertrained ones.
    fewer = [(r, a, k, 1.0) for r, a in PAIRS for k in (2, 3, 4)]
    early = [("full", "average", 5, w) for w in WORK if w < 1]
    merges = [(r, a, 5, 1.0) for r in REGIMES for a in AGGREGATORS] + fewer + early
    merges += [(r, a, 5, 1.0) for r in TRAINED_AGAIN for a in BY_DATA]
    given = [
        (sizes, r, a, rates[r], k, base, [done[r, i, w]["params"] for i in range(5)]) for r, a, k, w in merges
    ]
    facts["merged"] = [
        {"regime": r, "aggregator": a, "experts": k, "work": w, **f}
        for (r, a, k, w), f in zip(merges, pool.map(merged, given), strict=True)
    ]
    facts["alone"] = [
        mean(accuracies(model, done["full", i, w]["params"], [framed[i]])[0] for i in range(5)) for w in WORK
    ]
    facts["steps"] = [max(1, round(w * n["epochs"] * -(-len(later[0].train) // 32))) for w in WORK]

    # Figures of the first seed alone.
    facts["transfer"], facts["disentanglement"] = {}, {}
    for r, some in experts.items():
        m, start = model_of(r, n["wide"], base)
        framed = alone(later, 0, start).sources[:5]
        t = transfer_matrix(m, start, some, framed)
        facts["transfer"][r] = {"base": t.base, "accuracies": t.accuracies, "others": t.others, "own": t.own}
        few = [replace(s, test=s.test.select(torch.arange(min(100, len(s.test))))) for s in framed[:2]]
        d = disentanglement(m, start, some[:2], few, GRID)
        facts["disentanglement"][r] = {"coefficients": d.coefficients, "errors": d.errors, "mean": d.mean}
        if n["seed"] == 0:
            facts["transfer"][r]["table"] = t.table()
            t.write(into / f"mergeability_transfer_{short(r)}.svg")
            d.write(into / f"mergeability_disentanglement_{short(r)}.svg")
    return facts


PAIRS = [(r, "average") for r in REGIMES] + [(r, "ties .2") for r in ("full", "talos .5")]
"""Whose merges of two, three and four experts are measured too."""


def short(regime: str) -> str:
    return regime.replace(" ", "").replace(".", "")


def own(found: Sequence[dict[str, Any]], rates: Mapping[str, Choice]) -> list[str]:
    """What the experts can before they are merged."""
    tasks = list(NAMES.values())[:5]
    lines = [f"| experts | lr | {' | '.join(tasks)} | mean | CPU s each |", "|---" * 9 + "|"]

    def row(accuracy: Sequence[Sequence[float]]) -> str:
        cells = [spread(values) for values in zip(*accuracy, strict=True)]
        return " | ".join([*cells, spread([mean(a) for a in accuracy])])

    control = spread([f["base"][5] for f in found])
    lines.append(f"| base (control: {control}) | | {row([f['base'][:5] for f in found])} | |")
    for r in REGIMES:
        seconds = mean(f["experts"][r]["seconds"] for f in found)
        accuracy = row([f["experts"][r]["accuracy"] for f in found])
        lines.append(f"| {r} | {rates[r]} | {accuracy} | {seconds:.1f} |")
    return ["## Experts, each on its own task (accuracy %)", "", *lines, ""]


def merges_of(found: Sequence[dict[str, Any]], regime: str, aggregator: str, many: int, work: float) -> Any:
    """One merge in every seed; None where it was not tried."""
    wanted = (regime, aggregator, many, work)
    same = [
        m
        for f in found
        for m in f["merged"]
        if (m["regime"], m["aggregator"], m["experts"], m["work"]) == wanted
    ]
    return same or None


def normalised(
    found: Sequence[dict[str, Any]], regime: str, values: Sequence[Sequence[float]]
) -> list[float]:
    """Accuracies over those of the experts, mean over tasks, by seed."""
    return [
        mean(v / max(best, 1e-9) for v, best in zip(values_, f["experts"][regime]["accuracy"], strict=False))
        for f, values_ in zip(found, values, strict=True)
    ]


def aggregators(found: Sequence[dict[str, Any]]) -> list[str]:
    """Five experts of every regime by every aggregator."""
    lines = ["## Five experts merged: accuracy % on the five tasks, and the control", ""]
    for r in REGIMES:
        lines += [
            f"**{r}**",
            "",
            "| aggregator | at 1 | normalised | tuned (lambdas) | normalised | control |",
            "|---" * 6 + "|",
        ]
        for a in (*AGGREGATORS, *BY_DATA):
            merges = merges_of(found, r, a, 5, 1.0)
            if merges is None:
                continue
            if "refused" in merges[0]:
                lines.append(f"| {a} | refuses: {merges[0]['refused']} | | | | |")
                continue
            one, tuned = ([m[how][:5] for m in merges] for how in ("plain", "tuned"))
            lambdas = ", ".join(
                f"{m['lambda']:g}{' *' * (m['lambda'] in (LAMBDAS[0], LAMBDAS[-1]))}" for m in merges
            )
            lines.append(
                f"| {a} | {spread([mean(v) for v in one])} | {spread(normalised(found, r, one))} "
                f"| {spread([mean(v) for v in tuned])} ({lambdas}) | {spread(normalised(found, r, tuned))} "
                f"| {spread([m['tuned'][5] for m in merges])} |"
            )
        lines.append("")
    return [
        *lines,
        "`average` tuned is task arithmetic with its coefficient searched (lambda / 5 for a sum).",
        "",
    ]


def counts(into: Path, found: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy against the number of experts."""
    many = (2, 3, 4, 5)
    lines = ["## Against the number of experts (normalised accuracy %, tuned)", ""]
    lines += [f"| experts, aggregator | {' | '.join(map(str, many))} |", "|---" * 5 + "|"]
    shown = []
    for r, a in PAIRS:
        by_count = [
            normalised(found, r, [m["tuned"][:k] for m in merges_of(found, r, a, k, 1.0)]) for k in many
        ]
        lines.append(f"| {r}, {a} | {' | '.join(map(spread, by_count))} |")
        if a == "average":
            shown.append((f"{r}, tuned arithmetic", [mean(v) for v in by_count]))
    title = "Normalised accuracy against the number of experts"
    return [*lines, "", figure(into, "experts", title, [str(k) for k in many], shown), ""]


def steps(into: Path, found: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy against the fraction of steps that full experts train (undertraining)."""
    merges = [merges_of(found, "full", "average", 5, w) for w in WORK]
    series = {
        "experts, each on its own": [[f["alone"][i] for f in found] for i in range(len(WORK))],
        "average": [[mean(m["plain"][:5]) for m in some] for some in merges],
        "task arithmetic, tuned": [[mean(m["tuned"][:5]) for m in some] for some in merges],
        "control, tuned": [[m["tuned"][5] for m in some] for some in merges],
    }
    many = [str(v) for v in found[0]["steps"]]
    lines = ["## Against the steps of the experts (accuracy %)", ""]
    lines += [f"| steps (MNIST) | {' | '.join(many)} |", "|---" * (len(WORK) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(map(spread, values))} |" for name, values in series.items()]
    shown = [(name, [mean(v) for v in values]) for name, values in series.items()]
    return [*lines, "", figure(into, "steps", "Accuracy against the steps of the experts", many, shown), ""]


def analyses(found: Sequence[dict[str, Any]]) -> list[str]:
    """Transfer matrices and disentanglement errors."""
    lines = [
        "## Task x task: accuracy of the expert (row) on the task (column) over the base's, first seed",
        "",
    ]
    for r in REGIMES:
        of = [f["transfer"][r] for f in found]
        lines += [
            f"**{r}**: mean |ratio - 1| off the diagonal {number([t['others'] for t in of])}, own accuracy "
            f"{spread([t['own'] for t in of])} % (all seeds; [figure](mergeability_transfer_{short(r)}.svg))",
            "",
            "```",
            of[0]["table"],
            "```",
            "",
        ]
    lines += [
        "## Disentanglement error of mnist and fashion, mean over the grid (0: none, 2: all)",
        "",
        "| experts | mean xi | first seed |",
        "|---|---|---|",
    ]
    for r in REGIMES:
        picture = f"[figure](mergeability_disentanglement_{short(r)}.svg)"
        lines.append(f"| {r} | {number([f['disentanglement'][r]['mean'] for f in found])} | {picture} |")
    return [*lines, ""]


def number(values: Sequence[float]) -> str:
    """Mean and standard deviation, not in %."""
    middle = mean(values)
    return f"{middle:.3f} ± {(sum((v - middle) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
