"""Federated learning on real data: rounds to a target, final accuracy, robustness to the schedule, and a
federated-continual stream.

Data from CONSILIENCE_DATA. SIZES

Part "clients": CLIENTS clients, SAMPLED a round, Dirichlet over classes, MLP 784-200-10, ROUNDS rounds of
one epoch, batch 10, sgd lr 0.05, judged on
2,000 test images every other round. Targets: .85 (MNIST), .72 (Fashion). Strengths are chosen on MNIST,
Dirichlet .1, by the accuracy on
the *validation* images after TUNED rounds, one seed, at most three values a method; test images never
choose. Fed3R is a ridge head over one round of all
clients, on the 500 random hidden units of an MLP, and ("on features") on the 1280 features of a MobileNetV2
pretrained on ImageNet, frozen, images
enlarged to 96x96 (these rows need timm); "fed3r, then fedavg" begins from it, and "fedavg on features"
trains a linear head from zero.
Part "schedules": 2,000 MNIST images in ten pieces, five passes over every piece under each of eight
schedules; the spread is max - min (federated_schedules.svg).
Part "stream": 5 clients x 10 tasks (pairs of classes of MNIST and Fashion-MNIST, each client in its own
order), task labels, one round of
four epochs a task, Adam lr 0.001, MLP 784-100-20: the mean over a client's ten tasks by its own parameters,
and over all tasks by the server.
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
from typing import Any

import numpy as np
import torch

import consilience as cs
from common import RESULTS, save
from consilience.core.params import write_bytes
from consilience.core.source import Tensors

CLIENTS, SAMPLED, ROUNDS, TUNED, SEEDS, IMAGES = 100, 10, 60, 20, 3, 6000
TARGETS = {"mnist": 0.85, "fashion_mnist": 0.72}
STREAMS = [(d, a) for d in TARGETS for a in (0.1, 0.5)]
GRID: dict[str, list[dict[str, Any]]] = {
    "fedavg": [{}],
    "fedprox": [{"mu": m} for m in (0.01, 0.1, 1.0)],
    "fedavgm": [{"momentum": m} for m in (0.5, 0.9)],
    "scaffold": [{"clients": CLIENTS}],
    "fedcm": [{"alpha": a} for a in (0.1, 0.3, 0.6)],
    "ghbm, tau 1": [{"beta": b, "tau": 1} for b in (0.5, 0.9)],
    "ghbm, tau 5": [{"beta": b, "tau": 5} for b in (0.5, 0.9)],
    "ghbm, tau 10": [{"beta": b, "tau": 10} for b in (0.5, 0.9)],
    "local_ghbm": [{"beta": b} for b in (0.5, 0.9)],
    "fedhbm": [{"beta": b} for b in (0.5, 0.9)],
    "wsm": [{}],
    "fed3r": [{}],
    "fed3r, then fedavg": [{}],
}
FEATURES = ("fedavg on features", "fed3r on features", "fed3r, then fedavg on features")
CYCLIC = ("fedavg", "fedavgm", "ghbm, tau 10", "local_ghbm", "fedhbm")
"""Also with clients that take turns, as GHBM's analysis assumes."""


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
    if name == "fedavgm":
        return cs.methods.fedavg(outer_momentum=arguments["momentum"])
    if name == "fed3r, then fedavg":
        return cs.methods.fedavg()
    return getattr(cs.methods, name.partition(",")[0])(**arguments)  # type: ignore[no-any-return]


def clients(task: tuple[str, float, str, dict[str, Any], int, bool, str]) -> dict[str, Any]:
    """One run of the first part."""
    data, alpha, name, arguments, seed, tuning, order = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, on_features = name.removesuffix(" on features"), name.endswith(" on features")
    source = described(data, IMAGES) if on_features else whole(data, IMAGES)
    if tuning:
        source = replace(source, test=source.validation)
    sources = cs.data.dirichlet(source, CLIENTS, alpha=alpha, seed=seed)
    rounds = TUNED if tuning else ROUNDS
    start = time.process_time()
    training = cs.Training(epochs=1, batch_size=10, lr=0.05)
    model: Any = cs.models.mlp(784, (200,), 10)
    base, sent = None, 0
    if name.startswith("fed3r"):
        model = cs.models.mlp(784, (500,), 10)
    if on_features:
        model = cs.models.linear(1280, 10)
    if name.startswith("fed3r"):
        first = cs.run(
            cs.settings.federated(sources, rounds=1),
            cs.methods.fed3r(strength=1.0, temperature=0.1),
            model,
            training,
            seed=seed,
        )
        if name == "fed3r":
            return {
                "score": first.score,
                "rounds": 1,
                "bytes": first.costs["bytes"],
                "seconds": time.process_time() - start,
            }
        base, sent = first.params, first.costs["bytes"]
    schedule = cs.settings.federated(
        sources, rounds, SAMPLED, order, evaluate_every=2 if not tuning else rounds, base=base
    )  # type: ignore[arg-type]
    try:
        r = cs.run(schedule, method_of(name, arguments), model, training, seed=seed, engine="batched")
    except cs.ConsilienceError as e:
        return {"score": 0.0, "rounds": None, "bytes": 0, "seconds": 0.0, "why": str(e)}
    curve = r.matrix.mean(1)
    reached = [2 * i for i, v in enumerate(curve) if v >= TARGETS[data]]
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
    "ewc": {},
    "er": {"size": 500},
    "ghbm": {"beta": 0.5, "tau": 1},
    "fed3r": {"strength": 1.0},
}


def schedules(task: tuple[str, str, int]) -> dict[str, Any]:
    """One run of the second part."""
    name, which, seed = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    source = whole("mnist", 2000)
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


WEIT: dict[str, list[dict[str, Any]]] = {
    "fedavg": [{}],
    "fedprox": [{"mu": 0.1}],
    "fedweit": [{"drift": d} for d in (0.0, 1.0, 100.0)],
    "finetune": [{}],
}


def stream(task: tuple[str, dict[str, Any], str, int]) -> dict[str, Any]:
    """One run of the third part, judged by one agent."""
    name, arguments, who, seed = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tasks = [t for d in TARGETS for t in cs.data.split_classes(cs.data.npz(d, flat=True, limit=5000), 5)]
    streams = []
    for k in range(5):
        own = []
        for i in torch.randperm(10, generator=torch.Generator().manual_seed(97 * seed + k)).tolist():
            t = tasks[i]
            part = torch.arange(k, len(t.train), 5)
            own.append(replace(t, name=f"{t.name}/{k}", task=f"{t.name}/{k}", train=t.train.select(part)))
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


def mean(values: list[float]) -> str:
    return (
        f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
        if len(values) > 1
        else f"{100 * values[0]:.1f}"
    )


def main() -> None:
    global ROUNDS, SEEDS, IMAGES
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all training images, 200 rounds, five seeds")
    parser.add_argument("--parts", nargs="*", default=["clients", "schedules", "stream"])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.full:
        ROUNDS, SEEDS, IMAGES = 200, 5, 60000
    began, facts, lines = time.time(), {"grid": GRID, "by part": {}}, []  # type: ignore[var-annotated]
    with ProcessPoolExecutor(arguments.workers) as pool:
        for part in arguments.parts:
            start = time.time()
            lines += {"clients": first, "schedules": second, "stream": third}[part](pool, facts)
            facts["by part"][part] = round((time.time() - start) / 60, 1)
            told = f"- seeds: {SEEDS}\n- minutes: {facts['by part']} ({arguments.workers} processes)\n\n"
            sizes = (
                f"{IMAGES} training images in all ({IMAGES // CLIENTS} a client, before the "
                f"validation tenth)."
            )
            about = (
                (__doc__ or "")
                .replace("SIZES", sizes)
                .replace("CLIENTS", str(CLIENTS))
                .replace("SAMPLED", str(SAMPLED))
            )
            about = about.replace("ROUNDS", str(ROUNDS)).replace("TUNED", str(TUNED))
            save(
                "federated" + "_full" * arguments.full,
                about,
                {**facts, "minutes": (time.time() - began) / 60},
                told + "\n".join(lines),
            )


def importable(name: str) -> bool:
    try:
        import_module(name)
    except Exception:  # timm next to a build of torch without torchvision's operators raises RuntimeError
        return False
    return True


def first(pool: ProcessPoolExecutor, facts: dict[str, Any]) -> list[str]:
    trials = [(n, a) for n, g in GRID.items() if len(g) > 1 for a in g]
    tuned = list(pool.map(clients, [("mnist", 0.1, n, a, 1000, True, "uniform") for n, a in trials]))
    chosen = {n: g[0] for n, g in GRID.items()}
    for n in chosen:
        own = [(r["score"], -i) for i, ((m, _), r) in enumerate(zip(trials, tuned, strict=True)) if m == n]
        if own:
            chosen[n] = trials[-max(own)[1]][1]
    names = list(GRID)
    if importable("timm"):
        names += FEATURES
        chosen |= {n: {} for n in FEATURES}
        for data in TARGETS:
            described(data, IMAGES)
    work = [
        (d, a, n, chosen[n], s, False, "uniform") for d, a in STREAMS for n in names for s in range(SEEDS)
    ]
    work += [("mnist", 0.1, n, chosen[n], s, False, "cyclic") for n in CYCLIC for s in range(SEEDS)]
    done = list(pool.map(clients, work))
    facts["clients"] = [{"run": list(w), **r} for w, r in zip(work, done, strict=True)]
    lines = [
        "| stream | method | tuned | final accuracy % | rounds to target | MB | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for i in range(0, len(work), SEEDS):
        (d, a, n, chose, _, _, order), rs = work[i], done[i : i + SEEDS]
        rounds = [r["rounds"] for r in rs]
        reached = (
            f"{np.mean(rounds):.0f}"
            if all(r is not None for r in rounds)
            else f"{sum(r is not None for r in rounds)} of {SEEDS} seeds reach it"
        )
        lines.append(
            f"| {d}, Dirichlet {a}{', in turn' * (order == 'cyclic')} | {n} | "
            f"{', '.join(f'{k} {v}' for k, v in chose.items())} "
            f"| {mean([r['score'] for r in rs])} | {reached} | "
            f"{np.mean([r['bytes'] for r in rs]) / 1e6:.0f} | "
            f"{np.mean([r['seconds'] for r in rs]):.1f} |"
        )
    return [*lines, ""]


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
                cells.append(mean([r["score"] for r in rs]))
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
    seeds = max(1, SEEDS - 1)
    work = [
        (n, a, w, s) for n, g in WEIT.items() for a in g for w in ("server", "client-3") for s in range(seeds)
    ]
    done = list(pool.map(stream, work))
    facts["stream"] = [{"run": list(w), **r} for w, r in zip(work, done, strict=True)]
    lines = [
        f"| method | server, all tasks % | clients, own tasks % ({seeds} seeds) | MB | CPU s |",
        "|---|---|---|---|---|",
    ]
    for n, g in WEIT.items():
        for a in g:
            of = {
                w: [
                    r
                    for (m, b, v, _), r in zip(work, done, strict=True)
                    if (m, b) == (n, a) and v.startswith(w)
                ]
                for w in ("server", "client")
            }
            lines.append(
                f"| {n} {', '.join(f'{k} {v}' for k, v in a.items())} | "
                f"{mean([r['score'] for r in of['server']])} "
                f"| {mean([r['score'] for r in of['client']])} | {of['server'][0]['bytes'] / 1e6:.0f} "
                f"| {of['server'][0]['seconds']:.0f} |"
            )
    return [*lines, ""]


if __name__ == "__main__":
    main()
