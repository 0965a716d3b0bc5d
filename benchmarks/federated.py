"""Federated learning on real data: rounds to a target, final accuracy, robustness to the schedule, and a
federated-continual stream.

Data from CONSILIENCE_DATA. SIZES Mean and standard deviation over SEEDS seeds.

Part "clients": CLIENTS clients, SAMPLED a round, Dirichlet over classes, MLP 784-200-10, ROUNDS rounds of
one epoch, batch 10, plain SGD, judged on 2,000 test images every other round. Targets: .85 (MNIST), .72
(Fashion). Learning rates and strengths are chosen on MNIST, Dirichlet .1, by the accuracy on the
*validation* images after TUNED rounds, one seed; test images never choose. STRENGTHS The learning rate of
every method that takes steps is chosen first, in the same way from five, at the middle strength. Fed3R is a
ridge head over one round of all clients, on the 500 random hidden units of an MLP, and ("on features") on
the 1280 features of a MobileNetV2 pretrained on ImageNet, frozen, images enlarged to 96x96 (these rows need
timm); "fed3r, then fedavg" begins from it, and its strength is the temperature of the head; "fedavg on
features" trains a linear head from zero.

Part "schedules": PIECES MNIST images in ten pieces, five passes over every piece under each of eight
schedules; the spread is max - min of the means (federated_schedules.svg). Learning rate (.05) and strengths
are set by hand here, and tuned for no method: BY_HAND.

Part "stream": 5 clients x 10 tasks (pairs of classes of MNIST and Fashion-MNIST, STREAMED training images
of each data set in all, each client in its own order), task labels, one round of four epochs a task, Adam
lr 0.001 (set by hand for all), MLP 784-100-20: the mean over a client's ten tasks by its own parameters,
and over all tasks by the server. Strengths are chosen by the validation images of the whole stream (another
seed), server and client counting alike, in the same way.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import consilience as cs
from common import PROTOCOL, RESULTS, Choice, save, spread, tune
from consilience.core.params import write_bytes
from consilience.core.source import Tensors

CLIENTS, SAMPLED, ROUNDS, TUNED, SEEDS, IMAGES, STREAMED = 100, 10, 20, 8, 3, 6000, 600
TARGETS = {"mnist": 0.85, "fashion_mnist": 0.72}
STREAMS = [("mnist", 0.1), ("fashion_mnist", 0.1)]
ALSO = [("mnist", 0.5), ("fashion_mnist", 0.5)]
"""Further streams of --full."""
PIECES = 1000
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
GIVEN: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {},
    "fedavgm": {},
    "scaffold": {"clients": CLIENTS},
    "fedcm": {},
    "ghbm, tau 10": {"tau": 10},
    "local_ghbm": {},
    "fedhbm": {},
    "wsm": {},
    "fed3r": {},
    "fed3r, then fedavg": {},
}
"""The methods, and what is set by hand."""
FEATURES = ("fedavg on features", "fed3r on features", "fed3r, then fedavg on features")
BETAS = (0.5, 0.7, 0.9, 0.95, 0.99)
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "fedprox": ("mu", (0.001, 0.01, 0.1, 1.0, 10.0)),
    "fedavgm": ("momentum", (0.1, 0.3, 0.5, 0.7, 0.9)),
    "fedcm": ("alpha", (0.03, 0.1, 0.3, 0.6, 0.9)),
    "ghbm, tau 10": ("beta", BETAS),
    "local_ghbm": ("beta", BETAS),
    "fedhbm": ("beta", BETAS),
    "fed3r": ("strength", (0.01, 0.1, 1.0, 10.0, 100.0)),
    "fed3r, then fedavg": ("temperature", (0.01, 0.03, 0.1, 0.3, 1.0)),
}
"""What is tuned next to the learning rate, and its five values."""
CYCLIC = ("fedavg", "ghbm, tau 10")
"""Also with clients that take turns, as GHBM's analysis assumes."""


def plain(name: str) -> str:
    return name.removesuffix(" on features")


@lru_cache(maxsize=1)
def whole(data: str, images: int) -> cs.Source:
    s = cs.data.npz(data, flat=True, limit=images)
    some = torch.randperm(len(s.test), generator=torch.Generator().manual_seed(0))[:2000]
    return replace(s, test=s.test.select(some))


@lru_cache(maxsize=1)
def described(data: str, images: int) -> cs.Source:
    """The same images as features of the frozen backbone, made once and kept in a temporary folder."""
    import tempfile

    from safetensors.torch import load_file, save_file

    source, parts = whole(data, images), ("train", "validation", "test")
    kept = Path(tempfile.gettempdir()) / f"consilience-features-{data}-{images}.safetensors"
    if not kept.exists():
        import timm

        net = timm.create_model("mobilenetv2_100", pretrained=False, pad_type="same", bn_eps=1e-3).eval()
        weights = load_file(Path(os.environ["CONSILIENCE_DATA"]) / "timm_mobilenetv2_100_same.safetensors")
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
        net.reset_classifier(0)
        found = {}
        with torch.no_grad():
            for part in parts:
                x = getattr(source, part).whole()[0].view(-1, 1, 28, 28)
                assert float(x.min()) >= 0 and float(x.max()) <= 1, "images in [0, 1]"
                wide = (
                    torch.nn.functional.interpolate(b, size=96, mode="bilinear").expand(-1, 3, -1, -1) * 2 - 1
                    for b in x.split(100)
                )
                found[part] = torch.cat([net(b) for b in wide])
        save_file(found, f"{kept}.{os.getpid()}")
        os.replace(f"{kept}.{os.getpid()}", kept)
    found = load_file(kept)
    scale = found["train"].std()
    return replace(
        source, **{part: Tensors(found[part] / scale, getattr(source, part).whole()[1]) for part in parts}
    )


def method_of(name: str, arguments: dict[str, Any]) -> cs.Method:
    if name == "fed3r, then fedavg":
        return cs.methods.fedavg()
    return getattr(cs.methods, name.partition(",")[0])(**arguments)  # type: ignore[no-any-return]


class Run(NamedTuple):
    """A run of the first part: on one data set, by a method with its arguments and learning rate."""

    data: str
    alpha: float
    name: str
    arguments: dict[str, Any]
    lr: float
    seed: int
    tuning: bool = False
    order: str = "uniform"


def clients(run: Run) -> dict[str, Any]:
    """One run of the first part."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, on_features = plain(run.name), run.name.endswith(" on features")
    source = described(run.data, IMAGES) if on_features else whole(run.data, IMAGES)
    if run.tuning:
        source = replace(source, test=source.validation)
    sources = cs.data.dirichlet(source, CLIENTS, alpha=run.alpha, seed=run.seed)
    rounds = TUNED if run.tuning else ROUNDS
    start = time.process_time()
    training = cs.Training(epochs=1, batch_size=10, lr=run.lr)
    model: Any = cs.models.mlp(784, (500 if name.startswith("fed3r") else 200,), 10)
    if on_features:
        model = cs.models.linear(1280, 10)

    base, sent = None, 0
    if name.startswith("fed3r"):
        solve = cs.methods.fed3r(**run.arguments)
        first = cs.run(cs.settings.federated(sources, rounds=1), solve, model, training, seed=run.seed)
        if name == "fed3r":
            found = {"score": first.score, "rounds": 1, "bytes": first.costs["bytes"]}
            return {**found, "seconds": time.process_time() - start}
        base, sent = first.params, first.costs["bytes"]
    schedule = cs.settings.federated(
        sources, rounds, SAMPLED, run.order, evaluate_every=rounds if run.tuning else 2, base=base
    )  # type: ignore[arg-type]
    method = method_of(name, run.arguments)
    try:
        r = cs.run(schedule, method, model, training, seed=run.seed, engine="batched")
    except cs.ConsilienceError as e:
        return {"score": 0.0, "rounds": None, "bytes": 0, "seconds": 0.0, "why": str(e)}
    curve = r.matrix.mean(1)
    reached = [2 * i for i, v in enumerate(curve) if v >= TARGETS[run.data]]
    return {
        "score": float(curve[-1]),
        "rounds": reached[0] if reached else None,
        "bytes": sent + r.costs["bytes"],
        "seconds": time.process_time() - start,
        "curve": curve.tolist(),
    }


SCHEDULES = (
    "one by one, sorted",
    "one by one, reversed",
    "one by one, mixed",
    "sorted, 1 a round in turn",
    "sorted, 2 a round",
    "sorted, 5 a round",
    "sorted, all at once",
    "Dirichlet .1, all at once",
)
ROBUST = {
    "finetune": {},
    "fedprox": {"mu": 0.1},
    "ewc": {"strength": 10.0},
    "er": {"size": 500},
    "ghbm": {"beta": 0.5, "tau": 1},
    "fed3r": {"strength": 1.0},
}


def schedules(task: tuple[str, str, int]) -> dict[str, Any]:
    """One run of the second part."""
    name, which, seed = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    source = whole("mnist", PIECES)
    pieces = cs.data.split_classes(source, 10)
    pieces = [replace(p, test=source.test) for p in pieces]
    if "mixed" in which:
        pieces = cs.data.iid(source, 10, seed=seed)
    if "Dirichlet" in which:
        pieces = cs.data.dirichlet(source, 10, alpha=0.1, seed=seed)
    pieces = pieces[::-1] if "reversed" in which else pieces
    s, visits = cs.settings, 5
    if which.startswith("one by one"):
        schedule, epochs = s.continual(pieces), visits
    elif "in turn" in which:
        schedule, epochs = s.federated(pieces, 10 * visits, 1, "cyclic", evaluate_every=1000), 1
    else:
        k = {"2": 2, "5": 5}.get(which.split(", ")[1][0], 10)
        schedule, epochs = s.federated(pieces, 10 * visits // k, k, evaluate_every=1000), 1
    model = cs.models.mlp(784, (500,), 10) if name == "fed3r" else cs.models.mlp(784, (200,), 10)
    try:
        r = cs.run(
            schedule,
            getattr(cs.methods, name)(**ROBUST[name]),
            model,
            cs.Training(epochs=epochs, batch_size=10, lr=0.05),
            seed=seed,
            engine="auto",
        )
    except cs.ConsilienceError as e:
        return {"refused": str(e)}
    return {"score": float(r.matrix[-1].mean())}


WEIT: dict[str, tuple[str, tuple[float, ...]] | None] = {
    "fedavg": None,
    "fedprox": ("mu", (0.001, 0.01, 0.1, 1.0, 10.0)),
    "fedweit": ("drift", (0.0, 1.0, 10.0, 100.0, 1000.0)),
    "finetune": None,
}


def stream(task: tuple[str, dict[str, Any], str, int, bool]) -> dict[str, Any]:
    """One run of the third part, judged by one agent."""
    name, arguments, who, seed, tuning = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tasks = [t for d in TARGETS for t in cs.data.split_classes(cs.data.npz(d, flat=True, limit=STREAMED), 5)]
    streams = []
    for k in range(5):
        own = []
        for i in torch.randperm(10, generator=torch.Generator().manual_seed(97 * seed + k)).tolist():
            t = tasks[i]
            part = torch.arange(k, len(t.train), 5)
            test = t.validation if tuning else t.test
            own.append(
                replace(t, name=f"{t.name}/{k}", task=f"{t.name}/{k}", train=t.train.select(part), test=test)
            )
        streams.append(own)
    schedule = replace(cs.settings.federated_continual(streams, rounds=1, scenario="task"), evaluated=who)
    start = time.process_time()
    r = cs.run(
        schedule,
        getattr(cs.methods, name)(**arguments),
        cs.models.mlp(784, (100,), 20),
        cs.Training(epochs=4, batch_size=32, lr=0.001, optimiser="adam"),
        seed=seed,
    )
    mine = [i for i, n in enumerate(r.sources) if who == "server" or n.endswith(f"/{who[-1]}")]
    return {
        "score": float(r.matrix[-1, mine].mean()),
        "bytes": r.costs["bytes"],
        "seconds": time.process_time() - start,
    }


def main() -> None:
    global ROUNDS, SEEDS, IMAGES, STREAMED, PIECES
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all training images, 200 rounds, five seeds")
    parts = {"clients": first, "schedules": second, "stream": third}
    parser.add_argument("--parts", nargs="*", default=list(parts), choices=list(parts))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.full:
        ROUNDS, SEEDS, IMAGES, STREAMED, PIECES = 200, 5, 60000, 5000, 2000
        STREAMS.extend(ALSO)
    facts: dict[str, Any] = {"rates": RATES, "strengths": STRENGTHS, "set by hand": GIVEN, "by part": {}}
    lines: list[str] = []
    with ProcessPoolExecutor(arguments.workers) as pool:
        for part in arguments.parts:
            start = time.time()
            lines += parts[part](pool, facts)
            facts["by part"][part] = round((time.time() - start) / 60, 1)
    by_hand = "; ".join(f"{n} {k} {v:g}" for n, a in ROBUST.items() for k, v in a.items())
    sizes = f"{IMAGES} training images in all ({IMAGES // CLIENTS} a client, before the validation tenth)."
    about = __doc__ or ""
    for name, value in (
        ("SIZES", sizes),
        ("CLIENTS", CLIENTS),
        ("SAMPLED", SAMPLED),
        ("ROUNDS", ROUNDS),
        ("TUNED", TUNED),
        ("SEEDS", SEEDS),
        ("STREAMED", STREAMED),
        ("PIECES", PIECES),
        ("STRENGTHS", PROTOCOL),
        ("BY_HAND", by_hand),
    ):
        about = about.replace(name, str(value))
    lead = f"- seeds: {SEEDS}\n- minutes by part: {facts['by part']} ({arguments.workers} processes)\n\n"
    if arguments.parts == list(parts):
        save("federated" + "_full" * arguments.full, about, facts, lead + "\n".join(lines))
    else:
        print("\n".join(lines), "Parts alone are not written.", sep="\n")


def importable(name: str) -> bool:
    try:
        import_module(name)
    except Exception:  # timm next to a build of torch without torchvision's operators raises RuntimeError
        return False
    return True


def choose(pool: ProcessPoolExecutor, names: list[str]) -> tuple[dict[str, Choice], dict[str, Choice]]:
    """The learning rates and strengths of the first part, on the validation images of one stream."""
    strengths: dict[str, Choice] = {}

    def scores(runs: list[tuple[str, float, float | None]]) -> list[float]:
        work = []
        for name, lr, value in runs:
            given = arguments_of(name, value, strengths)
            work.append(Run("mnist", 0.1, name, given, lr, 1000, tuning=True))
        return [r["score"] for r in pool.map(clients, work)]

    # What has no learning rate comes first, since the second part of its sequel begins from it.
    solved = [n for n in names if plain(n) == "fed3r"]
    strengths |= tune(
        {n: STRENGTHS[plain(n)][1] for n in solved}, lambda t: scores([(n, 0.1, v) for n, v in t])
    )
    rates = tune(
        {n: RATES for n in names if n not in solved},
        lambda trials: scores([(n, lr, middle(n)) for n, lr in trials]),
    )
    strengths |= tune(
        {n: STRENGTHS[plain(n)][1] for n in names if plain(n) in STRENGTHS and n not in solved},
        lambda trials: scores([(n, rates[n].value, v) for n, v in trials]),
    )
    return rates, strengths


def middle(name: str) -> float | None:
    return STRENGTHS[plain(name)][1][2] if plain(name) in STRENGTHS else None


def arguments_of(name: str, value: float | None, strengths: dict[str, Choice]) -> dict[str, Any]:
    """Arguments of a method: what is set by hand, its strength, and that of the ridge head before it."""
    given = dict(GIVEN[plain(name)])
    if value is not None:
        given[STRENGTHS[plain(name)][0]] = value
    if plain(name) == "fed3r, then fedavg":
        given["strength"] = strengths[name.replace(", then fedavg", "")].value
    return given


def first(pool: ProcessPoolExecutor, facts: dict[str, Any]) -> list[str]:
    names = list(GIVEN)
    if importable("timm"):
        names += FEATURES
        for data in TARGETS:
            described(data, IMAGES)
    rates, strengths = choose(pool, names)
    facts["chosen rates"] = {n: c._asdict() for n, c in rates.items()}
    facts["chosen strengths"] = {n: c._asdict() for n, c in strengths.items()}

    def runs(data: str, alpha: float, name: str, order: str = "uniform") -> list[Run]:
        lr = rates[name].value if name in rates else 0.1
        given = arguments_of(name, strengths[name].value if name in strengths else None, strengths)
        return [Run(data, alpha, name, given, lr, seed, False, order) for seed in range(SEEDS)]

    work = [r for data, alpha in STREAMS for n in names for r in runs(data, alpha, n)]
    work += [r for n in CYCLIC for r in runs("mnist", 0.1, n, "cyclic")]
    done = list(pool.map(clients, work))
    facts["clients"] = [{"run": w._asdict(), **r} for w, r in zip(work, done, strict=True)]
    lines = [
        "| stream | method | lr | strength | final accuracy % | rounds to target | MB | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for i in range(0, len(work), SEEDS):
        run, rs = work[i], done[i : i + SEEDS]
        rounds = [r["rounds"] for r in rs if r["rounds"] is not None]
        reached = f"{np.mean(rounds):.0f} ± {np.std(rounds, ddof=1):.0f}" if len(rounds) == SEEDS else ""
        chosen = strengths.get(run.name)
        strength = f"{STRENGTHS[plain(run.name)][0]} {chosen}" if chosen else ""
        failed = sum("why" in r for r in rs)
        lines.append(
            f"| {run.data}, Dirichlet {run.alpha}{', in turn' * (run.order == 'cyclic')} | {run.name} "
            f"| {rates.get(run.name, '')} | {strength} "
            f"| {spread([r['score'] for r in rs])}{f' ({failed} diverged)' * bool(failed)} "
            f"| {reached or f'{len(rounds)} of {SEEDS} seeds reach it'} "
            f"| {np.mean([r['bytes'] for r in rs]) / 1e6:.0f} | {np.mean([r['seconds'] for r in rs]):.1f} |"
        )
    ladders = [f"- {n}: {k} {', '.join(f'{v:g}' for v in values)}" for n, (k, values) in STRENGTHS.items()]
    ladders.insert(0, f"- all: lr {', '.join(f'{v:g}' for v in RATES)}")
    return [*lines, "", "The five values of each:", "", *ladders, ""]


def second(pool: ProcessPoolExecutor, facts: dict[str, Any]) -> list[str]:
    work = [(n, w, s) for n in ROBUST for w in SCHEDULES for s in range(SEEDS)]
    done = list(pool.map(schedules, work))
    facts["schedules"] = [{"run": list(w), **r} for w, r in zip(work, done, strict=True)]
    drawn: dict[str, list[float]] = {}
    lines = [f"| method | {' | '.join(SCHEDULES)} | spread |", "|---" * (len(SCHEDULES) + 2) + "|"]
    for n in ROBUST:
        cells, means = [], []
        for w in SCHEDULES:
            rs = [r for (m, v, _), r in zip(work, done, strict=True) if (m, v) == (n, w)]
            if "refused" in rs[0]:
                cells.append("refuses")
            else:
                means.append(float(np.mean([r["score"] for r in rs])))
                cells.append(spread([r["score"] for r in rs]))
        lines.append(f"| {n} | {' | '.join(cells)} | {100 * (max(means) - min(means)):.1f} |")
        drawn[n] = means
    write_bytes(RESULTS / "federated_schedules.svg", figure(drawn).encode())
    return [*lines, "", "![accuracy by method, a mark a schedule](federated_schedules.svg)", ""]


def figure(means: dict[str, list[float]]) -> str:
    """Accuracy by method, a mark a schedule and a bar from the worst to the best, as a standalone SVG."""
    left, wide, row = 110, 520, 34
    high = row * len(means) + 50
    at = lambda v: left + wide * v  # noqa: E731
    body = [f'<rect width="{left + wide + 70}" height="{high}" fill="#fff"/>']
    for tenth in range(0, 11, 2):
        x = at(tenth / 10)
        body.append(
            f'<path d="M{x} 12V{high - 32}" stroke="#ddd"/><text x="{x}" y="{high - 14}" '
            f'text-anchor="middle">{10 * tenth}%</text>'
        )
    for i, (name, values) in enumerate(means.items()):
        y = 30 + row * i
        body.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{name}</text>')
        body.append(
            f'<path d="M{at(min(values)):.1f} {y}H{at(max(values)):.1f}" stroke="#4477aa" '
            f'stroke-width="6" opacity=".35"/>'
        )
        body += [
            f'<circle cx="{at(v):.1f}" cy="{y}" r="4.5" fill="#4477aa"><title>{100 * v:.1f}%</title></circle>'
            for v in values
        ]
        body.append(
            f'<text x="{left + wide + 12}" y="{y + 4}">{100 * (max(values) - min(values)):.1f}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 70} {high}" '
        f'font-family="sans-serif" font-size="12" fill="#222">'
        f"<title>Final accuracy under eight schedules of the same data; at the right the spread in "
        f"points</title>{''.join(body)}</svg>\n"
    )


def third(pool: ProcessPoolExecutor, facts: dict[str, Any]) -> list[str]:
    who = ("server", "client-3")

    def given(name: str, value: float | None) -> dict[str, Any]:
        ladder = WEIT[name]
        return {} if ladder is None or value is None else {ladder[0]: value}

    def scores(trials: list[tuple[str, float]]) -> list[float]:
        found = list(pool.map(stream, [(n, given(n, v), w, 1000, True) for n, v in trials for w in who]))
        return [(a["score"] + b["score"]) / 2 for a, b in zip(found[::2], found[1::2], strict=True)]

    chosen = tune({n: ladder[1] for n, ladder in WEIT.items() if ladder}, scores)
    work = [
        (n, given(n, chosen[n].value if n in chosen else None), w, s, False)
        for n in WEIT
        for w in who
        for s in range(SEEDS)
    ]
    done = list(pool.map(stream, work))
    facts["stream"] = [{"run": list(w), **r} for w, r in zip(work, done, strict=True)]
    facts["stream strengths"] = {n: c._asdict() for n, c in chosen.items()}
    lines = [
        "| method | strength | server, all tasks % | a client, own tasks % | MB | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for n, ladder in WEIT.items():
        of = {w: [r for v, r in zip(work, done, strict=True) if (v[0], v[2]) == (n, w)] for w in who}
        strength = f"{ladder[0]} {chosen[n]}" if ladder else ""
        lines.append(
            f"| {n} | {strength} | {spread([r['score'] for r in of['server']])} "
            f"| {spread([r['score'] for r in of['client-3']])} | {of['server'][0]['bytes'] / 1e6:.0f} "
            f"| {np.mean([r['seconds'] for r in of['server']]):.0f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
