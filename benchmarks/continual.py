"""Continual learning on real data: accuracy after the last source, forgetting and cost, SEEDS seeds, tuned by
one protocol.

Data from CONSILIENCE_DATA. Streams and their training, the same for every method:

STREAMS

Buffers hold 500 examples in all; GEM 100 of each source. A network is an MLP, or a small conv net; a last
batch that is not full is left out; PNN has columns of half its width. Test sets are 2,000 images, drawn
once (whole with --full).

Protocol: strengths are chosen for every stream by the accuracy on the *validation* parts of its first three
sources only (one seed, at most TUNE training images a source); the final streams and the test data are
never used to choose. STRENGTHS Methods that have none (fine-tuning, joint, cumulative, ER, ER-ACE, A-GEM,
iCaRL, GDumb, PNN) are run as they are. Learning rates, batch sizes and epochs are set by hand for each
stream, equal for all methods, and tuned for none. Seeds give the mean and the standard deviation; a paired
t-test compares with fine-tuning.

At these sizes CIFAR-10's sources have 64 steps each: too few for fine-tuning to move from old classes to
new ones without task labels, so that its row and those near it say little. On ten permutations, strengths
that three sources choose may be too strong: a low accuracy with little forgetting is a lack of plasticity.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

import consilience as cs
from common import PROTOCOL, Choice, save, spread, tune
from consilience.data.samplers import Shuffle

SEEDS, TUNE, TEST = 3, 2000, 2000


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
        return list(_sources(self.data, per, not self.conv, 10000 if per == self.full else TEST))

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
def _sources(data: str, per: int, flat: bool, test: int) -> tuple[cs.Source, ...]:
    permuted = data == "permuted"
    whole = cs.data.npz("mnist" if permuted else data, flat=flat, limit=per if permuted else 5 * per)
    some = torch.randperm(len(whole.test), generator=torch.Generator().manual_seed(0))[:test]
    whole = replace(whole, test=whole.test.select(some))
    return tuple(cs.data.permute(whole, 10) if permuted else cs.data.split_classes(whole, 5))


FULL = Shuffle(drop_last=True)  # a last batch of one odd example at lr .1 can undo a task
SGD = cs.Training(epochs=2, batch_size=32, lr=0.1, sampler=FULL)
ADAM = cs.Training(epochs=1, batch_size=32, lr=0.001, optimiser="adam", sampler=FULL)
CONV = cs.Training(epochs=4, batch_size=16, lr=0.001, optimiser="adam", sampler=FULL)
DOMAINS = ("finetune", "joint", "ewc", "online_ewc", "si", "mas", "lwf", "er", "derpp", "gem", "agem")
CLASSES = ("finetune", "joint", "ewc", "si", "lwf", "er", "derpp", "agem", "icarl", "gdumb", "fed3r")
TASKS = ("finetune", "joint", "ewc", "si", "lwf", "er", "derpp", "packnet", "hat", "supsup", "pnn")
STREAMS = {
    "Split MNIST, class": Stream("mnist", "class", 1500, 12000, SGD),
    "Split MNIST, task": Stream("mnist", "task", 1000, 12000, SGD),
    "Split Fashion, class": Stream("fashion_mnist", "class", 1500, 12000, SGD),
    "Split CIFAR-10, class": Stream("cifar10_jpeg", "class", 300, 10000, CONV, 16, True, CLASSES),
    "Split CIFAR-10, task": Stream("cifar10_jpeg", "task", 300, 10000, CONV, 16, True, TASKS),
    "Permuted MNIST, domain": Stream("permuted", "domain", 1000, 60000, ADAM, width=400, only=DOMAINS),
}

METHODS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "joint": {},
    "cumulative": {},
    "ewc": {"samples": 1000},
    "online_ewc": {"gamma": 1.0, "samples": 1000},
    "si": {},
    "mas": {"samples": 500},
    "lwf": {},
    "er": {"batch_size": 64},
    "er_ace": {"batch_size": 64},
    "derpp": {"batch_size": 64},
    "gem": {"size": 100, "batch_size": 64},
    "agem": {"batch_size": 64},
    "icarl": {},
    "gdumb": {},
    "packnet": {},
    "hat": {},
    "supsup": {},
    "pnn": {},
    "fed3r": {},
}
"""The methods and what is set by hand."""
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "ewc": ("strength", (1.0, 10.0, 100.0, 1000.0, 10000.0)),
    "online_ewc": ("strength", (1.0, 10.0, 100.0, 1000.0, 10000.0)),
    "si": ("strength", (0.2, 1.0, 5.0, 25.0, 125.0)),
    "mas": ("strength", (0.001, 0.01, 0.1, 1.0, 10.0)),
    "lwf": ("strength", (0.1, 0.3, 1.0, 3.0, 10.0)),
    "derpp": ("alpha", (0.03, 0.1, 0.3, 1.0, 3.0)),
    "gem": ("margin", (0.0, 0.25, 0.5, 1.0, 2.0)),
    "packnet": ("keep", (0.1, 0.2, 0.3, 0.5, 0.7)),
    "hat": ("sparsity", (0.001, 0.01, 0.1, 0.5, 2.0)),
    "supsup": ("keep", (0.1, 0.2, 0.3, 0.5, 0.7)),
    "fed3r": ("strength", (0.01, 0.1, 1.0, 10.0, 100.0)),
}
"""What is tuned, and its five values."""
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
    found = [m for m in METHODS if not stream.only or m in stream.only]
    if stream.scenario != "task":
        found = [m for m in found if m not in TASK_ONLY]
    if stream.scenario != "class":
        found = [m for m in found if m not in CLASS_ONLY]
    return found


def run_stream(pool: ProcessPoolExecutor, name: str, methods: list[str], per: int) -> list[dict[str, Any]]:
    """Tune and run the methods of one stream; a row for each."""

    def given(method: str, value: float | None) -> dict[str, Any]:
        return METHODS[method] | ({} if value is None else {STRENGTHS[method][0]: value})

    def scores(trials: list[tuple[str, float]]) -> list[float]:
        work = [(name, m, given(m, v), 1000, per, True) for m, v in trials]
        return [r.get("score", -1.0) for r in pool.map(one, work)]

    chosen: dict[str, Choice] = tune({m: STRENGTHS[m][1] for m in methods if m in STRENGTHS}, scores)
    work = [
        (name, m, given(m, chosen[m].value if m in chosen else None), seed, per, False)
        for m in methods
        for seed in range(SEEDS)
    ]
    done = list(pool.map(one, work))
    by = {m: [r for w, r in zip(work, done, strict=True) if w[1] == m] for m in methods}

    rows: list[dict[str, Any]] = []
    for m in methods:
        row: dict[str, Any] = {"stream": name, "method": m, "given": METHODS[m]}
        if "refused" in by[m][0]:
            rows.append({**row, "refused": by[m][0]["refused"]})
            continue
        if m in chosen:
            row |= {"tuned": STRENGTHS[m][0], **chosen[m]._asdict()}
        scores_ = [r["score"] for r in by[m]]
        rows.append(
            {
                **row,
                "scores": scores_,
                "score": float(np.mean(scores_)),
                "std": float(np.std(scores_, ddof=1)),
                "forgettings": [r["forgetting"] for r in by[m]],
                "p": paired(scores_, [r["score"] for r in by["finetune"]]) if "finetune" in by else None,
                "gmacs": by[m][0]["macs"] / 1e9,
                "seconds": float(np.mean([r["seconds"] for r in by[m]])),
                "diverged": sum("diverged" in r for r in by[m]),
                "matrix": by[m][0]["matrix"],
            }
        )
        print({k: rows[-1].get(k) for k in ("stream", "method", "value", "score", "std")}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all training and test images; hours")
    parser.add_argument("--streams", nargs="*", default=list(STREAMS), choices=list(STREAMS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    minutes: dict[str, float] = {}
    with ProcessPoolExecutor(chosen.workers) as pool:
        for name in chosen.streams:
            stream, start = STREAMS[name], time.time()
            methods = [m for m in methods_of(stream) if m in chosen.methods]
            rows += run_stream(pool, name, methods, stream.full if chosen.full else stream.per)
            minutes[name] = round((time.time() - start) / 60, 1)
    about, facts, table = written(rows, minutes, chosen)
    if chosen.streams == list(STREAMS) and chosen.methods == list(METHODS):
        save("continual" + "_full" * chosen.full, about, facts, table)
    else:
        print(f"{table}\nParts alone are not written.")


def written(
    rows: list[dict[str, Any]], minutes: dict[str, float], chosen: argparse.Namespace
) -> tuple[str, dict[str, Any], str]:
    """The text about the streams, the facts, and the table."""
    table = [
        "| stream | method | tuned | accuracy % | forgetting % | p against finetune | GMACs | CPU s a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "refused" in r:
            table.append(f"| {r['stream']} | {r['method']} | | refuses: {r['refused']} | | | | |")
            continue
        tuned = f"{r['tuned']} {Choice(r['value'], r['tried'], r['edge'])}" if "tuned" in r else ""
        note = f" ({r['diverged']} of {SEEDS} diverged)" if r["diverged"] else ""
        p = "" if r["p"] is None else f"{r['p']:.1g}"
        table.append(
            f"| {r['stream']} | {r['method']} | {tuned} | {spread(r['scores'])}{note} "
            f"| {spread(r['forgettings'])} | {p} | {r['gmacs']:.1f} | {r['seconds']:.1f} |"
        )

    streams = []
    for name in minutes:
        s, t = STREAMS[name], STREAMS[name].training
        inputs = 3072 if s.data == "cifar10_jpeg" else 784
        net = f"conv net of width {s.width}" if s.conv else f"MLP {inputs}-{s.width}-{s.width}-10"
        streams.append(
            f"- {name}: {s.full if chosen.full else s.per} training images a source (before the "
            f"validation tenth), {t.epochs} "
            f"epoch{'s' * (t.epochs > 1)}, batch {t.batch_size}, {t.optimiser} lr {t.lr}, {net}"
        )
    about = (__doc__ or "").replace("STREAMS\n", "\n".join(streams) + "\n").replace("TUNE", str(TUNE))
    about = about.replace("SEEDS", str(SEEDS)).replace("STRENGTHS", PROTOCOL)
    ladders = [f"- {m}: {n} {', '.join(f'{v:g}' for v in values)}" for m, (n, values) in STRENGTHS.items()]
    by_hand = [f"- {m}: {', '.join(f'{k} {v:g}' for k, v in a.items())}" for m, a in METHODS.items() if a]
    lead = f"- seeds: {SEEDS}\n- minutes by stream: {minutes} ({chosen.workers} processes)"
    text = [
        lead,
        "",
        *table,
        "",
        "## The five values of each",
        "",
        *ladders,
        "",
        "## Set by hand",
        "",
        *by_hand,
    ]
    facts = {
        "by stream": minutes,
        "seeds": SEEDS,
        "strengths": STRENGTHS,
        "set by hand": METHODS,
        "rows": rows,
    }
    return about, facts, "\n".join(text)


if __name__ == "__main__":
    main()
