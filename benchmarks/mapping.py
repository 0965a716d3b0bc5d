"""Mappers: fitting mixtures against scikit-learn, routing beyond the backbone, what Mahalanobis may share,
unknown inputs, and scaling to TASKS tasks.

Fit: 10,000 x 1280 features, k = 25, from the same start, to the same tolerance, 2 threads for both,
interleaved, ratios of wall time; aim 0.5. Routing: 1,000 inputs over 100 and TASKS tasks (25 components, or
10 class means, each), median, least and most of REPEATS; aim 50 ms at 100 tasks. What is routed is compared
with the largest float64 score of all. Predicting: an agent with 100 tasks answers 10,000 features, grouped
by task, against one call an input (100 of them, scaled up).

Scaling: tasks of 10 classes, 30 training and 5 test inputs a class, drawn as described at `Tasks`, SEEDS
draws; after each count of tasks the share of all test inputs so far that go to their own task, and its
regression line (the paper's, on real images: -0.0012 x + 0.952). These tasks are much easier to tell apart
than real ones (15 real ones: results/skill.md), and Gaussian with one covariance, which is Mahalanobis's
own model: the slopes say how mappers compare as tasks are added, not what real tasks would give.

Where timm and CONSILIENCE_DATA are there, the same on the mini-suite's features (images and sizes of
skill.py): both fits' log-likelihoods, mapper accuracies and bytes of an anchor, and the AUROC of
familiarity with each task left out in turn; elsewhere those of before are kept. Components, floor (.1,
which was chosen on the validation images of these tasks), ridge and reject are set by hand. Accuracies are
of one draw of images (skill.md and skill_seeds.md have others); the mean over tasks has its standard
deviation over tasks.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from torch import Tensor

import consilience as cs
from common import RESULTS, machine, save, spread
from consilience.core.contexts import Learned, Routing
from consilience.core.message import Item, Message, Module, Statistics
from consilience.core.params import Layout, key
from consilience.core.source import Source, Tensors
from consilience.mappers import _em
from consilience.mappers.covariance import Mahalanobis, triangle
from consilience.mappers.mixture import Anchored, GaussianMixture, NearestMean

D, K, REPEATS, SEEDS = 1280, 25, 15, 3
COUNTS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 300, 400, 500)
SPECTRUM = (
    (1, 1.28e-1, 4.33e-2, 2.79e-3, 7.32e-2),
    (4, 2.34e-2, 1.50e-2, 2.51e-2, 6.40e-3),
    (16, 1.18e-2, 5.68e-3, 3.39e-3, 8.41e-3),
    (64, 5.13e-3, 1.67e-3, 4.19e-4, 1.88e-3),
    (256, 1.41e-3, 2.12e-4, 4.96e-5, 1.93e-4),
    (640, 2.63e-4, 1.89e-5, 4.27e-6, 1.63e-5),
    (1280, 6.70e-5, 4.47e-6, 6.32e-7, 3.44e-6),
)
"""Variances within classes, of class means about their task's, of task means about their domain's, and of
domain means, as
shares of the trace of the first, in bands of its principal directions up to each number: as measured on the
mini-suite's 15
tasks (mobilenetv2_100 at 96 px, 302 classes; task means of one domain: the 8 Omniglot alphabets, and the two
halves of
CIFAR-10)."""
DOMAINS = 50


class Tasks:
    """Tasks of Gaussian classes: x = Q (m + t + c + w), the mean m of the task's domain (one of DOMAINS by
    chance), the task's
    t, the class's c and w within, all drawn with the variances of SPECTRUM.

    Q is a random rotation: no axis is a principal direction, which is the harder case for diagonal mixtures.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed, g = seed, torch.Generator().manual_seed(seed)
        edges = [0, *(e for e, *_ in SPECTRUM)]
        widths = torch.tensor([b - a for a, b in itertools.pairwise(edges)])
        self.within, self.classes, self.tasks, domains = (
            torch.tensor([row[i] for row in SPECTRUM]).repeat_interleave(widths).sqrt() for i in (1, 2, 3, 4)
        )
        self.domains = torch.randn(DOMAINS, D, generator=g) * domains
        self.turn = torch.linalg.qr(torch.randn(D, D, generator=g))[0]

    def draw(
        self, i: int, train: int = 30, test: int = 5, classes: int = 10
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(1000 + i + 100_000 * self.seed)
        domain = self.domains[int(torch.randint(DOMAINS, (1,), generator=g))]
        centres = (
            domain
            + torch.randn(D, generator=g) * self.tasks
            + torch.randn(classes, D, generator=g) * self.classes
        )

        def part(n: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(n * classes) % classes
            return (centres[y] + torch.randn(len(y), D, generator=g) * self.within) @ self.turn.T, y

        return *part(train), *part(test)


MODEL = cs.models.mlp(D, (4,), 2)
PARAMS, BUFFERS = MODEL.init(key(0))


def anchor(mapper: Anchored, name: str, x: Tensor, y: Tensor, seed: int = 0) -> Item:
    """What `mapper` (on inputs: features stand in for them) tells of a task. A tenth is left for
    validation."""
    y = y.long()
    held = torch.arange(len(y)) % 10 == 9
    labels = tuple((name, str(c)) for c in range(int(y.max()) + 1))
    train, kept = (
        Tensors(x[i].float(), y[i]) for i in ((~held, held) if mapper.reject else (held | ~held, held))
    )
    s = Source(name, train, kept, kept, labels, tuple(y.unique().tolist()), name)
    learned = Learned(MODEL, PARAMS, BUFFERS, PARAMS, s, name, Layout.of(PARAMS), key(seed, name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        item = mapper.summarise(learned, None)  # type: ignore[arg-type]
    assert item is not None
    return item


def routing(x: Tensor, names: list[tuple[str, str]]) -> Routing:
    return Routing(x, lambda x=x: x, lambda: [], names)  # type: ignore[misc]


def timed(f: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = f()
    return found, time.perf_counter() - start


def worked(f: Callable[[], Any]) -> float:
    """Seconds of processor time: what it would take alone on a busy machine, with one thread."""
    start = time.process_time()
    f()
    return time.process_time() - start


def likelihood(x: Tensor, fit: _em.Fit) -> float:
    return float(_em.log_density(x.double(), fit.mean, fit.variance, fit.weight).logsumexp(1).mean())


def reference(x: Tensor, rows: Tensor, floor: float, single: bool = False) -> tuple[_em.Fit, float]:
    """scikit-learn from the same start, in float64, or (`single`) in float32."""
    from sklearn.mixture import GaussianMixture as Mixture

    z = (x.float() if single else x.double()).numpy()
    k = len(rows)
    fit = Mixture(
        k,
        covariance_type="diag",
        reg_covar=floor,
        means_init=z[rows.numpy()],
        precisions_init=np.full((k, x.shape[1]), 1 / floor, z.dtype),
        weights_init=None if single else np.full(k, 1 / k),
        init_params="random_from_data",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, seconds = timed(lambda: fit.fit(z))
    mean, variance, weight = (torch.from_numpy(t) for t in (fit.means_, fit.covariances_, fit.weights_))
    return _em.Fit(
        mean, variance, weight, float(fit.lower_bound_), int(fit.n_iter_), bool(fit.converged_)
    ), seconds


def fits(x: Tensor, held: Tensor, seeds: int) -> list[dict[str, float]]:
    """Both fits from the same starts. Ours is timed from float64 features on, as the mapper has it, without
    the choice of the
    start (which both need); the time of that choice is apart."""
    rows = []
    floor = GaussianMixture().floor * float(x.double().var(0, unbiased=False).mean())
    for seed in range(seeds):
        start, seeding = timed(lambda s=seed: _em.seeds(x - x.mean(0), K, torch.Generator().manual_seed(s)))
        theirs, slow = reference(x, start, floor)
        ours, fast = timed(lambda s=start: _em.fit(x, K, torch.Generator(), floor, start=s))
        _, single = reference(x, start, floor, True)
        rows.append(
            {
                "ours s": fast,
                "sklearn s": slow,
                "start s": seeding,
                "ratio": fast / slow,
                "ratio to float32": fast / single,
                "ratio with start": (fast + seeding) / (slow + seeding),
                "steps": ours.steps,
                "sklearn steps": theirs.steps,
                "train": likelihood(x, ours),
                "sklearn train": likelihood(x, theirs),
                "held out": likelihood(held, ours),
                "sklearn held out": likelihood(held, theirs),
            }
        )
    return rows


def speed(mapper: Anchored, items: list[Item], x: Tensor) -> dict[str, float]:
    names = [("m", f"{i:04}") for i in range(len(items))]
    memory = dict(zip(names, items, strict=True))
    r = routing(x, names)
    weights, first = timed(lambda: mapper.route(r, memory))
    times = [timed(lambda: mapper.route(r, memory))[1] * 1e3 for _ in range(REPEATS)]
    exact = torch.cat([mapper.scores(part, items, items) for part in x.split(250)]).argmax(1)
    return {
        "ms": statistics.median(times),
        "processor ms": statistics.median(
            worked(lambda: mapper.route(r, memory)) * 1e3 for _ in range(REPEATS)
        ),
        "best ms": min(times),
        "worst ms": max(times),
        "first s": first,
        "as in float64": float((weights.argmax(1) == exact).double().mean()),
    }


def mixture_item(x: Tensor, seed: int, k: int = K) -> Module:
    fit = _em.fit(x, k, torch.Generator().manual_seed(seed), GaussianMixture().floor * float(x.var(0).mean()))
    tensors = {n: getattr(fit, n).float() for n in ("mean", "variance", "weight")}
    return Module({**tensors, "count": torch.tensor([float(len(x))])})


def scaling(most: int, seed: int) -> dict[str, Any]:
    """Mapper accuracy after each count of tasks, of one draw of tasks."""
    tasks, found = Tasks(seed), {}
    mappers: dict[str, Anchored] = {
        "gaussian_mixture": GaussianMixture(on="inputs"),
        "nearest_mean": NearestMean("inputs"),
        "mahalanobis, 5 images": Mahalanobis(on="inputs", images=5),
    }
    drawn = [tasks.draw(i) for i in range(most)]
    test, own = torch.cat([d[2] for d in drawn]), torch.arange(most).repeat_interleave(len(drawn[0][2]))
    for name, mapper in mappers.items():
        memory = {("m", f"{i:04}"): anchor(mapper, f"{i:04}", d[0], d[1]) for i, d in enumerate(drawn)}
        rows = []
        for count in (c for c in COUNTS if c <= most):
            some = dict(list(memory.items())[:count])
            x = test[own < count]
            best = torch.cat(
                [mapper.route(routing(part, list(some)), some).argmax(1) for part in x.split(2000)]
            )
            rows.append((count, float((best == own[own < count]).double().mean())))
        print("scaling", seed, name, rows[-1], flush=True)
        slope, intercept = np.polyfit([c for c, _ in rows], [a for _, a in rows], 1)
        found[name] = {"accuracy": rows, "slope": float(slope), "intercept": float(intercept)}
    return found


def predicting(count: int, inputs: int) -> dict[str, float]:
    """How long an agent takes whose bank has `count` tasks: one call, grouped by task, and one call an
    input."""
    tasks, sources = Tasks(), []
    for i in range(count):
        x, y, test, t = tasks.draw(i, 5, -(-inputs // (10 * count)))
        labels = tuple((f"t{i:03}", str(c)) for c in range(10))
        parts = (Tensors(x.float(), y), Tensors(x[:10].float(), y[:10]), Tensors(test.float(), t))
        sources.append(Source(f"t{i:03}", *parts, labels, tuple(range(10)), f"t{i:03}"))
    body = torch.nn.Sequential(torch.nn.Conv2d(3, D, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = cs.models.multi_head(cs.models.backbone(cs.models.wrap(body, D, headless=True)), 10 * count)
    schedule = cs.settings.skill([[s] for s in sources], "end")
    agent = cs.run(schedule, cs.methods.skill("nearest_mean", head="prototype"), model).agent
    assert agent is not None
    x = torch.cat([s.test.whole()[0] for s in sources])[:inputs]
    together, first = timed(lambda: agent.predict(x))
    whole = statistics.median(timed(lambda: agent.predict(x))[1] for _ in range(5))
    one, each = timed(lambda: torch.cat([agent.predict(x[i : i + 1]) for i in range(100)]))
    assert torch.equal(one.argmax(1), together[:100].argmax(1))
    return {
        "inputs": inputs,
        "tasks": count,
        "together s": whole,
        "first s": first,
        "one by one s": each * inputs / 100,
    }


def real() -> dict[str, Any] | None:
    """On real features: likelihoods, mappers, unknown tasks; None where timm or the data are not there."""
    if importlib.util.find_spec("timm") is None or not os.environ.get("CONSILIENCE_DATA"):
        return None
    from skill import SIZE, TEST, TRAIN, kept

    framed = cs.settings.skill([[s] for s in kept(SIZE, TRAIN, TEST)]).sources
    data = {s.name: (*s.train.whole(), *s.test.whole()) for s in framed}
    data = {n: (x, y.unique(return_inverse=True)[1], t, u) for n, (x, y, t, u) in data.items()}
    fit = {n: fits(v[0], v[2], 2) for n, v in data.items()}
    mappers: dict[str, Anchored] = {
        "gaussian_mixture": GaussianMixture(on="inputs"),
        "gaussian_mixture, sklearn": GaussianMixture(on="inputs", fit="sklearn"),
        "nearest_mean": NearestMean("inputs"),
        "mahalanobis": Mahalanobis(on="inputs"),
        "mahalanobis, rank 16": Mahalanobis(on="inputs", rank=16),
        "mahalanobis, rank 64": Mahalanobis(on="inputs", rank=64),
        "mahalanobis, 5 images": Mahalanobis(on="inputs", images=5),
        "mahalanobis, 5 images, ridge 0.1": Mahalanobis(0.1, "inputs", images=5),
    }
    test, own = (
        torch.cat([v[2] for v in data.values()]),
        torch.arange(len(data)).repeat_interleave(torch.tensor([len(v[2]) for v in data.values()])),
    )
    table, unknown = {}, {}
    for name, mapper in mappers.items():
        memory = {("m", n): anchor(mapper, n, v[0], v[1]) for n, v in data.items()}
        hit = mapper.route(routing(test, list(memory)), memory).argmax(1) == own
        each = [float(hit[own == k].double().mean()) for k in range(len(data))]
        size = sum(
            len(Message("m", k[1], 1, 1, "", "", {"a": i}).to_bytes()) for k, i in memory.items()
        ) / len(memory)  # type: ignore[dict-item]
        table[name] = {
            "accuracy": float(hit.double().mean()),
            "mean over tasks": statistics.mean(each),
            "bytes": size,
            "by task": dict(zip(data, each, strict=True)),
        }
        print(name, {k: v for k, v in table[name].items() if k != "by task"}, flush=True)
    for name in ("gaussian_mixture", "nearest_mean", "mahalanobis", "mahalanobis, 5 images, ridge 0.1"):
        mapper = replace(mappers[name], reject=0.05)  # type: ignore[type-var]
        memory = {("m", n): anchor(mapper, n, v[0], v[1]) for n, v in data.items()}
        rows = {}
        for k, left in enumerate(data):
            rest = {key_: i for key_, i in memory.items() if key_[1] != left}
            known, other = (
                mapper.familiarity(routing(x, list(rest)), rest) for x in (test[own != k], test[own == k])
            )
            gone = [
                float((mapper.route(routing(x, list(rest)), rest).sum(1) == 0).double().mean())
                for x in (test[own != k], test[own == k])
            ]
            rows[left] = {
                "auroc": cs.mappers.auroc(known, other),
                "known called unknown": gone[0],
                "unknown called unknown": gone[1],
            }
        unknown[name] = {
            "by task": rows,
            **{m: statistics.mean(r[m] for r in rows.values()) for m in next(iter(rows.values()))},
        }
        print(name, {k: v for k, v in unknown[name].items() if k != "by task"}, flush=True)
    return {"fits": fit, "mappers": table, "unknown": unknown, "commit": machine()["commit"]}


def lines(facts: dict[str, Any]) -> str:
    out = [
        "| fit (10,000 x 1280, k = 25) | ours s | scikit-learn s | ratio | steps | log-likelihood, "
        "train | held out |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, r in enumerate(facts["fit"]):
        out.append(
            f"| seed {i} | {r['ours s']:.2f} | {r['sklearn s']:.2f} | {r['ratio']:.3f} "
            f"({r['ratio with start']:.3f} with the start; to its float32 "
            f"{r['ratio to float32']:.3f}) | {r['steps']} / {r['sklearn steps']} | "
            f"{r['train']:.3f} / {r['sklearn train']:.3f} | {r['held out']:.3f} / "
            f"{r['sklearn held out']:.3f} |"
        )
    out += [
        f"\nmedian ratio {facts['fit ratio']:.3f} (aim 0.5)\n",
        "| routing 1,000 inputs | tasks | median ms (least to most) | processor ms | first s "
        "| as in float64 |",
        "|---|---|---|---|---|---|",
    ]
    for name, counts in facts["routing"].items():
        out += [
            f"| {name} | {n} | {r['ms']:.1f} ({r['best ms']:.1f} to {r['worst ms']:.1f}) "
            f"| {r['processor ms']:.1f} | "
            f"{r['first s']:.2f} | {r['as in float64']:.4f} |"
            for n, r in counts.items()
        ]
    for name in facts["scaling"][0]:
        runs = [s[name] for s in facts["scaling"]]
        slope, start = (np.array([r[k] for r in runs]) for k in ("slope", "intercept"))
        out += [
            f"\n**{name}**: accuracy = ({slope.mean():.6f} ± {slope.std(ddof=1):.6f}) tasks "
            f"+ {start.mean():.4f}; "
            + ", ".join(
                f"{rows[0][0]}: {spread([a for _, a in rows])}"
                for rows in zip(*(r["accuracy"] for r in runs), strict=True)
            )
            + " %"
        ]
    p = facts["predicting"]
    out += [
        f"\nPredicting {p['inputs']:,} features over {p['tasks']} tasks: {p['together s']:.2f} s "
        f"together (the first time, with the anchors to make "
        f"ready, {p['first s']:.2f}), {p['one by one s']:.1f} s one by one."
    ]
    if "real" in facts:
        out += [
            "\n| real features | mapper accuracy % | mean over tasks % | bytes an anchor |",
            "|---|---|---|---|",
        ]
        out += [
            f"| {n} | {100 * r['accuracy']:.1f} | {spread(list(r['by task'].values()))} | {r['bytes']:,.0f} |"
            for n, r in facts["real"]["mappers"].items()
        ]
        out += [
            "\n| each task left out, reject 0.05 | AUROC | known called unknown | unknown called unknown |",
            "|---|---|---|---|",
        ]
        out += [
            f"| {n} | {r['auroc']:.3f} | {r['known called unknown']:.3f} | "
            f"{r['unknown called unknown']:.3f} |"
            for n, r in facts["real"]["unknown"].items()
        ]
        every = [r for rows in facts["real"]["fits"].values() for r in rows]
        off = (
            max(abs(r["train"] - r["sklearn train"]) for r in every),
            max(abs(r["held out"] - r["sklearn held out"]) for r in every),
        )
        out += [
            f"\nReal features, {len(every)} fits from equal starts: log-likelihoods differ by at most "
            f"{off[0]:.4f} (train), {off[1]:.4f} (held out); median ratio of times "
            f"{statistics.median(r['ratio'] for r in every):.3f}. Measured at commit "
            f"{facts['real']['commit']}."
        ]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="500 tasks instead of 200")
    parser.add_argument("--quick", action="store_true", help="smaller, nothing written")
    args = parser.parse_args()
    tasks, most = Tasks(), 20 if args.quick else 500 if args.full else 200
    n = 1000 if args.quick else 10_000
    one = tasks.draw(0, n // 5, n // 5)
    x, held = one[0][:n].clamp_min(0), one[2][:n].clamp_min(0)
    facts: dict[str, Any] = {"fit": fits(x, held, 3)}
    facts["fit ratio"] = statistics.median(r["ratio"] for r in facts["fit"])
    print("fit", facts["fit"], flush=True)
    facts["routing"] = {"gaussian_mixture": {}, "mahalanobis": {}, "nearest_mean": {}}
    drawn = [tasks.draw(i, 30, 10) for i in range(most)]
    mixtures: list[Item] = [mixture_item(d[0].double(), i) for i, d in enumerate(drawn)]
    means: list[Item] = []
    for a, y, *_ in drawn:
        hot = torch.nn.functional.one_hot(y).double()
        means.append(Statistics({"first": a.double().T @ hot, "count": hot.sum(0)}))
    for count in sorted({min(100, most), most}):
        test = torch.cat([d[2] for d in drawn[:count]])
        test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:1000]]
        full = [
            Statistics({**i.tensors, "second": triangle(d[0].double().T @ d[0].double())})
            for i, d in zip(means[: min(count, 100)], drawn, strict=False)
        ]
        for name, mapper, items in (
            ("gaussian_mixture", GaussianMixture(), mixtures),
            ("mahalanobis", Mahalanobis(), full),
            ("nearest_mean", NearestMean(), means),
        ):
            if len(items) >= count:  # 500 whole second moments are 3 GB
                facts["routing"][name][count] = speed(mapper, items[:count], test)
                print(name, count, facts["routing"][name][count], flush=True)
        del full
    facts["scaling"] = [scaling(most, seed) for seed in range(SEEDS)]
    facts["predicting"] = predicting(most if args.quick else 100, 1000 if args.quick else 10_000)
    before = RESULTS / "mapping.json"
    if args.quick:
        print(lines(facts))
        return
    found = real() or (json.loads(before.read_text()).get("real") if before.exists() else None)
    if found:
        facts["real"] = {"commit": "unknown", **found}
    about = __doc__ or ""
    for name, value in (("TASKS", most), ("REPEATS", REPEATS), ("SEEDS", SEEDS)):
        about = about.replace(name, str(value))
    save("mapping" + "_full" * args.full, about, facts, lines(facts))


if __name__ == "__main__":
    main()
