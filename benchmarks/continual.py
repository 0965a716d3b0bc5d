"""Continual learning on real data: accuracy after the last source, forgetting and cost, five seeds, tuned by
one protocol.

Data from CONSILIENCE_DATA. Streams and their training, the same for every method:

STREAMS

Buffers hold 500 examples in all; GEM 100 of each source. A network is an MLP, or a small conv net; a last
batch that is not full is left out; PNN
has columns of half its width. Test sets are whole, but for CIFAR-10's (2,000 images; whole with --full).

Protocol: each method's strength is chosen from a grid of at most three values by the accuracy on the
*validation* parts of the
first three sources only (one seed, at most TUNE training images a source), the same budget for every method;
the final streams and
the test data are never used to choose. Seeds give the mean and the standard deviation; a paired t-test
compares with fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import consilience as cs
from common import RESULTS, machine, save
from consilience.data.samplers import Shuffle

SEEDS, TUNE = 5, 2000


@dataclass(frozen=True)
class Stream:
    """A stream: its data, how it is cut, how it is trained on; `per` training images a source, `full` of
    them with --full."""

    data: str
    scenario: str
    per: int
    full: int
    training: cs.Training
    width: int = 256
    conv: bool = False
    only: tuple[str, ...] = ()

    def sources(self, per: int) -> list[cs.Source]:
        return list(_sources(self.data, per, not self.conv))

    def model(self, method: str) -> Any:
        channels = 3 if self.data == "cifar10_jpeg" else 1
        size = 32 if self.data == "cifar10_jpeg" else 28
        if self.conv:
            if method == "pnn":
                return cs.models.progressive_conv(10, channels, size, width=self.width // 2)
            return cs.models.conv(10, channels, size, width=self.width)
        inputs = channels * size * size
        if method == "pnn":
            return cs.models.progressive(inputs, (self.width // 2, self.width // 2), 10)
        return cs.models.mlp(inputs, (self.width, self.width), 10)


@lru_cache(maxsize=1)
def _sources(data: str, per: int, flat: bool) -> tuple[cs.Source, ...]:
    if data == "permuted":
        return tuple(cs.data.permute(cs.data.npz("mnist", flat=True, limit=per), 10))
    whole = cs.data.npz(data, flat=flat, limit=5 * per)
    if not flat and per < 10000:
        some = torch.randperm(len(whole.test), generator=torch.Generator().manual_seed(0))[:2000]
        whole = replace(whole, test=whole.test.select(some))
    return tuple(cs.data.split_classes(whole, 5))


FULL = Shuffle(drop_last=True)  # a last batch of one odd example at lr .1 can undo a task
SGD = cs.Training(epochs=2, batch_size=32, lr=0.1, sampler=FULL)
ADAM = cs.Training(epochs=1, batch_size=128, lr=0.001, optimiser="adam", sampler=FULL)
CONV = cs.Training(epochs=4, batch_size=16, lr=0.001, optimiser="adam", sampler=FULL)
DOMAINS = ("finetune", "joint", "ewc", "online_ewc", "si", "mas", "lwf", "er", "derpp", "gem", "agem")
CLASSES = ("finetune", "joint", "ewc", "si", "lwf", "er", "derpp", "agem", "icarl", "gdumb", "fed3r")
TASKS = ("finetune", "joint", "ewc", "si", "lwf", "er", "derpp", "packnet", "hat", "supsup", "pnn")
STREAMS = {
    "Split MNIST, class": Stream("mnist", "class", 5000, 12000, SGD),
    "Split MNIST, task": Stream("mnist", "task", 3000, 12000, SGD),
    "Split Fashion, class": Stream("fashion_mnist", "class", 3000, 12000, SGD),
    "Split CIFAR-10, class": Stream("cifar10_jpeg", "class", 600, 10000, CONV, 16, True, CLASSES),
    "Split CIFAR-10, task": Stream("cifar10_jpeg", "task", 600, 10000, CONV, 16, True, TASKS),
    "Permuted MNIST, domain": Stream("permuted", "domain", 15000, 60000, ADAM, width=400, only=DOMAINS),
}

SPLIT = [n for n, s in STREAMS.items() if s.data != "permuted"]
"""What runs by default, in half an hour on two idle cores; the permuted stream takes another quarter of
one."""

GRID: dict[str, list[dict[str, Any]]] = {
    "finetune": [{}],
    "joint": [{}],
    "cumulative": [{}],
    "ewc": [{"strength": s, "samples": 1000} for s in (1.0, 10.0, 100.0)],
    "online_ewc": [{"strength": s, "gamma": 1.0, "samples": 1000} for s in (1.0, 10.0, 100.0)],
    "si": [{"strength": s} for s in (0.5, 5.0, 20.0)],
    "mas": [{"strength": s, "samples": 500} for s in (0.01, 0.1, 1.0)],
    "lwf": [{"strength": s} for s in (0.3, 1.0, 3.0)],
    "er": [{"batch_size": 64}],
    "er_ace": [{"batch_size": 64}],
    "derpp": [{"batch_size": 64, "alpha": a} for a in (0.1, 0.3, 1.0)],
    "gem": [{"size": 100, "batch_size": 64, "margin": m} for m in (0.0, 0.5)],
    "agem": [{"batch_size": 64}],
    "icarl": [{}],
    "gdumb": [{}],
    "packnet": [{"keep": k} for k in (0.3, 0.5)],
    "hat": [{"sparsity": s} for s in (0.01, 0.1, 0.5)],
    "supsup": [{"keep": k} for k in (0.3, 0.5)],
    "pnn": [{}],
    "fed3r": [{}],
}
TASK_ONLY = {"packnet", "hat", "supsup", "pnn"}
CLASS_ONLY = {"er_ace", "gdumb", "icarl", "fed3r", "cumulative"}
"""Left out of streams in which they add nothing to the picture, to keep the time."""


def one(task: tuple[str, str, dict[str, Any], int, int, bool]) -> dict[str, Any]:
    """One run: on the whole stream, or on the validation parts of the first three sources."""
    name, method, arguments, seed, per, tuning = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    stream = STREAMS[name]
    sources = stream.sources(per)
    if tuning:
        few = [
            torch.randperm(len(s.train), generator=torch.Generator().manual_seed(0))[:TUNE]
            for s in sources[:3]
        ]
        sources = [
            replace(s, test=s.validation, train=s.train.select(i))
            for s, i in zip(sources[:3], few, strict=True)
        ]
    training = stream.training
    if (
        tuning and per > TUNE
    ):  # as many steps a source as the whole stream has, up to five times over what is there
        training = replace(training, epochs=min(5, max(1, round(training.epochs * per / TUNE))))
    start = time.process_time()
    try:
        r = cs.run(
            cs.settings.continual(sources, stream.scenario),
            getattr(cs.methods, method)(**arguments),
            stream.model(method),
            training,
            seed=seed,
        )
    except cs.Refusal as e:
        return {"refused": str(e)}
    except cs.ConsilienceError as e:
        return {"score": 0.0, "forgetting": 0.0, "diverged": str(e), "macs": 0, "seconds": 0.0, "matrix": []}
    return {
        "score": r.score,
        "forgetting": r.forgetting,
        "normalised": r.normalised,
        "macs": r.costs["macs"],
        "seconds": time.process_time() - start,
        "matrix": r.matrix.tolist(),
    }


def paired(a: list[float], b: list[float]) -> float:
    """The p-value of a paired t-test."""
    from scipy.stats import ttest_rel

    return 1.0 if np.allclose(a, b) else float(ttest_rel(a, b).pvalue)


def methods_of(stream: Stream) -> list[str]:
    """What stands in a stream's table."""
    found = [m for m in GRID if not stream.only or m in stream.only]
    if stream.scenario != "task":
        found = [m for m in found if m not in TASK_ONLY]
    if stream.scenario != "class":
        found = [m for m in found if m not in CLASS_ONLY]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all training images")
    parser.add_argument(
        "--streams", nargs="*", default=SPLIT, choices=list(STREAMS), help="others keep their results"
    )
    parser.add_argument("--methods", nargs="*", default=list(GRID), choices=list(GRID))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    began = time.time()
    file = RESULTS / f"{Path(__file__).stem}{'_full' if arguments.full else ''}.json"
    known = json.loads(file.read_text()) if file.exists() else {"rows": [], "by stream": {}}
    rows: list[dict[str, Any]] = [
        r
        for r in known["rows"]
        if r["stream"] not in arguments.streams or r["method"] not in arguments.methods
    ]
    minutes: dict[str, Any] = {n: m for n, m in known["by stream"].items() if n not in arguments.streams}
    with ProcessPoolExecutor(arguments.workers) as pool:
        for name in arguments.streams:
            stream, start = STREAMS[name], time.time()
            per = stream.full if arguments.full else stream.per
            methods = [m for m in methods_of(stream) if m in arguments.methods]
            trials = [(m, a) for m in methods for a in GRID[m] if len(GRID[m]) > 1]
            tuned = list(pool.map(one, [(name, m, a, 1000, per, True) for m, a in trials]))
            chosen = {m: GRID[m][0] for m in methods}
            for m in methods:
                own = [
                    (r["score"], i)
                    for i, ((t, _), r) in enumerate(zip(trials, tuned, strict=True))
                    if t == m and "score" in r
                ]
                if own:
                    chosen[m] = trials[max(own, key=lambda s: (s[0], -s[1]))[1]][1]
            work = [(name, m, chosen[m], seed, per, False) for m in methods for seed in range(SEEDS)]
            done = list(pool.map(one, work))
            by = {m: [r for w, r in zip(work, done, strict=True) if w[1] == m] for m in methods}
            base = [r["score"] for r in by[methods[0]]]
            minutes[name] = {
                "minutes": round((time.time() - start) / 60, 1),
                **{k: machine()[k] for k in ("date", "machine", "commit")},
            }
            for m in methods:
                if "refused" in by[m][0]:
                    rows.append({"stream": name, "method": m, "refused": by[m][0]["refused"]})
                    continue
                scores = [r["score"] for r in by[m]]
                rows.append(
                    {
                        "stream": name,
                        "method": m,
                        "arguments": chosen[m],
                        "scores": scores,
                        "score": float(np.mean(scores)),
                        "std": float(np.std(scores, ddof=1)),
                        "forgetting": float(np.mean([r["forgetting"] for r in by[m]])),
                        "p": paired(scores, base),
                        "gmacs": by[m][0]["macs"] / 1e9,
                        "seconds": float(np.mean([r["seconds"] for r in by[m]])),
                        "diverged": sum("diverged" in r for r in by[m]),
                        "matrix": by[m][0]["matrix"],
                    }
                )
                print({k: rows[-1][k] for k in ("stream", "method", "score", "std", "seconds")}, flush=True)
            write(rows, minutes, arguments, began)  # after every stream, so that nothing is lost


def write(
    rows: list[dict[str, Any]], minutes: dict[str, float], arguments: argparse.Namespace, began: float
) -> None:
    """results/continual.{json,md} with the streams that are done."""
    table = [
        "| stream | method | tuned | accuracy % | forgetting % | p against finetune | GMACs | CPU s a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "refused" in r:
            table.append(f"| {r['stream']} | {r['method']} | | refuses: {r['refused']} | | | | |")
        else:
            text = ", ".join(f"{k} {v}" for k, v in r["arguments"].items())
            note = f" ({r['diverged']} of {SEEDS} diverged)" if r["diverged"] else ""
            table.append(
                f"| {r['stream']} | {r['method']} | {text} | {100 * r['score']:.1f} ± "
                f"{100 * r['std']:.1f}{note} "
                f"| {100 * r['forgetting']:.1f} | {r['p']:.1g} | {r['gmacs']:.1f} | {r['seconds']:.1f} |"
            )
    told = []
    for name in minutes:
        s, t = STREAMS[name], STREAMS[name].training
        net = f"conv net of width {s.width}" if s.conv else f"MLP 784-{s.width}-{s.width}-10"
        told.append(
            f"- {name}: {s.full if arguments.full else s.per} training images a source (before the "
            f"validation tenth), {t.epochs} "
            f"epoch{'s' * (t.epochs > 1)}, batch {t.batch_size}, {t.optimiser} lr {t.lr}, {net}"
        )
    facts = {
        "minutes": round((time.time() - began) / 60, 1),
        "by stream": minutes,
        "seeds": SEEDS,
        "grid": GRID,
        "rows": rows,
    }
    about = (__doc__ or "").replace("STREAMS\n", "\n".join(told) + "\n").replace("TUNE", str(TUNE))
    grid = "\n".join(
        f"- {m}: {'; '.join(', '.join(f'{k} {v}' for k, v in a.items()) for a in g)}"
        for m, g in GRID.items()
        if g[0]
    )
    save(
        Path(__file__).stem + ("_full" if arguments.full else ""),
        about,
        facts,
        f"- seeds: {SEEDS}\n"
        + "\n".join(f"- {n}: {', '.join(f'{v}' for v in m.values())}" for n, m in minutes.items())
        + f"\n- minutes of the last run: {facts['minutes']} ({arguments.workers} processes)\n\n"
        + "\n".join(table)
        + "\n\n## The grid\n\n"
        + grid,
    )


if __name__ == "__main__":
    main()
