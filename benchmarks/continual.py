"""Continual learning on real data: accuracy after the last source, forgetting and cost, five seeds, tuned by one protocol.

Streams (from CONSILIENCE_DATA): Split MNIST and Split Fashion-MNIST in five pairs of classes, class- and task-incremental, and
Permuted MNIST, ten permutations, domain-incremental. MLP 784-256-256-10, SGD, batch 64, buffers of 500. Sizes here: PER training
images a source (`--full`: all of them); test sets whole.

Protocol: each method's strength is chosen from a grid of at most three values by the accuracy on the *validation* parts of the
first three sources only (one seed), the same budget for every method; the final streams and the test data are never used to
choose. Seeds give the mean and the standard deviation; a paired t-test compares with fine-tuning.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import consilience as cs
from common import save

PER, FULL_PER, SEEDS = 2000, 12000, 5
STREAMS = ("Split MNIST, class", "Split MNIST, task", "Split Fashion, class", "Permuted MNIST, domain")

GRID: dict[str, list[dict[str, Any]]] = {
    "finetune": [{}],
    "joint": [{}],
    "ewc": [{"strength": s} for s in (1.0, 10.0, 50.0)],
    "online_ewc": [{"strength": s} for s in (1.0, 10.0, 50.0)],
    "si": [{"strength": s} for s in (0.1, 1.0, 5.0)],
    "mas": [{"strength": s, "samples": 500} for s in (0.01, 0.1, 1.0)],
    "l2sp": [{"strength": s} for s in (0.01, 0.1, 1.0)],
    "lwf": [{"strength": s} for s in (0.3, 1.0, 3.0)],
    "er": [{"batch_size": 64}],
    "er_ace": [{"batch_size": 64}],
    "derpp": [{"batch_size": 64, "alpha": a, "beta": 0.5} for a in (0.1, 0.3, 1.0)],
    "gem": [{"size": 100, "batch_size": 64, "margin": m} for m in (0.0, 0.5)],
    "agem": [{"batch_size": 64}],
    "fed3r": [{}],
}
EXTRA: dict[str, list[dict[str, Any]]] = {
    "icarl": [{}],
    "gdumb": [{}],
    "packnet": [{}],
    "hat": [{}],
    "supsup": [{}],
}
TASK_ONLY = {"packnet", "hat", "supsup"}


def stream(name: str, per: int) -> tuple[list[cs.Source], str]:
    """The sources and the scenario."""
    data, scenario = name.split(", ")
    file = "fashion_mnist" if "Fashion" in data else "mnist"
    if data.startswith("Permuted"):
        return cs.data.permute(cs.data.npz(file, flat=True, limit=per), 10), scenario
    whole = cs.data.npz(file, flat=True, limit=5 * per)
    return cs.data.split_classes(whole, 5), scenario


def one(task: tuple[str, str, dict[str, Any], int, int, bool]) -> dict[str, Any]:
    """One run: on the whole stream, or on the validation parts of the first three sources."""
    name, method, arguments, seed, per, tuning = task
    torch.set_num_threads(1)
    sources, scenario = stream(name, per)
    if tuning:
        sources = [replace(s, test=s.validation) for s in sources[:3]]
    training = cs.Training(epochs=5, batch_size=64, lr=0.05)
    model = cs.models.mlp(784, (256, 256), 10)
    start = time.process_time()
    try:
        r = cs.run(cs.settings.continual(sources, scenario), getattr(cs.methods, method)(**arguments), model, training, seed=seed)
    except cs.Refusal as e:
        return {"refused": str(e)}
    except cs.ConsilienceError as e:
        return {"score": 0.0, "forgetting": 0.0, "diverged": str(e), "macs": 0, "seconds": 0.0}
    return {"score": r.score, "forgetting": r.forgetting, "macs": r.costs["macs"], "seconds": time.process_time() - start}


def paired(a: list[float], b: list[float]) -> float:
    """The p-value of a paired t-test."""
    from scipy.stats import ttest_rel

    return 1.0 if np.allclose(a, b) else float(ttest_rel(a, b).pvalue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all training images")
    parser.add_argument("--streams", nargs="*", default=list(STREAMS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    per = FULL_PER if arguments.full else PER
    began = time.time()
    grid = {**GRID, **{k: v for k, v in EXTRA.items() if hasattr(cs.methods, k)}}
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(arguments.workers) as pool:
        for name in arguments.streams:
            methods = [m for m in grid if name.endswith("task") or m not in TASK_ONLY]
            trials = [(m, a) for m in methods for a in grid[m] if len(grid[m]) > 1]
            tuned = list(pool.map(one, [(name, m, a, 1000, per, True) for m, a in trials]))
            chosen = {m: grid[m][0] for m in methods}
            for m in methods:
                own = [
                    (r["score"], i) for i, ((t, _), r) in enumerate(zip(trials, tuned, strict=True)) if t == m and "score" in r
                ]
                if own:
                    chosen[m] = trials[max(own, key=lambda s: (s[0], -s[1]))[1]][1]
            work = [(name, m, chosen[m], seed, per, False) for m in methods for seed in range(SEEDS)]
            done = list(pool.map(one, work))
            by = {m: [r for w, r in zip(work, done, strict=True) if w[1] == m] for m in methods}
            base = [r["score"] for r in by["finetune"]]
            for m in methods:
                if "refused" in by[m][0]:
                    rows.append({"stream": name, "method": m, "refused": by[m][0]["refused"]})
                    continue
                scores = [r["score"] for r in by[m]]
                rows.append({
                    "stream": name, "method": m, "arguments": chosen[m], "scores": scores, "score": float(np.mean(scores)),
                    "std": float(np.std(scores, ddof=1)), "forgetting": float(np.mean([r["forgetting"] for r in by[m]])),
                    "p": paired(scores, base), "gmacs": by[m][0]["macs"] / 1e9, "seconds": float(np.mean([r["seconds"] for r in by[m]])),
                    "diverged": sum("diverged" in r for r in by[m]),
                })  # fmt: skip
                print({k: rows[-1][k] for k in ("stream", "method", "score", "std", "seconds")}, flush=True)
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
                f"| {r['stream']} | {r['method']} | {text} | {100 * r['score']:.1f} ± {100 * r['std']:.1f}{note} "
                f"| {100 * r['forgetting']:.1f} | {r['p']:.1g} | {r['gmacs']:.1f} | {r['seconds']:.1f} |"
            )
    facts = {
        "training images a source": per,
        "seeds": SEEDS,
        "minutes": round((time.time() - began) / 60, 1),
        "grid": grid,
        "rows": rows,
    }
    head = f"- training images a source: {per} (before the validation tenth)\n- seeds: {SEEDS}\n- minutes: {facts['minutes']}\n\n"
    save(Path(__file__).stem, __doc__.replace("PER training", f"{per} training"), facts, head + "\n".join(table))


if __name__ == "__main__":
    main()
