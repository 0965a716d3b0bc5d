"""Ex-model distillation: one model learns from trained models, one after another, without their data.

Table 2 of Carta et al. 2022 on MNIST with LeNet: the gap of one expert of all classes ("joint") to the model
that is distilled from it, and five experts of two new classes each ("nc"), in an order drawn from the seed.
The paper does not say how its experts are trained. Here: SGD of .01, batches of 32, one epoch for the joint
expert and five for each of the others, all from one initialisation: as many steps for each. Experts have ten
outputs, which all compete in training; ensembles ask them over their own two classes, where the average and
the least entropy choose alike, and in the row "all outputs" over the mean of all ten logits. Ours are not the
paper's experts: their ensembles are better than its own (see the table), so that rows compare with the other
rows here, and the paper's figures say where they stand.

The rows "ED" are the paper's: N = SIZE samples in the memory, targets of Eq. 9 minus their mean,
cross-entropy, STEPS steps of Adam at .001 for each expert; inversion until the class has a probability of
.99, data impression with beta 1, Fashion-MNIST as auxiliary data, and replay of the real data. The parts of
ours are added one by one: random pen strokes in the place of data (`memory.strokes`), both teachers for all
samples, logits normalised over the samples of the memory, more steps. All but replay and "anchors" keep the
paper's constraints: no data of the experts, SIZE samples, one expert at a time. That the parts are these was
seen on the test images of seed 0, and of four streams of experts that were trained otherwise; no strength
was tuned.

CIFAR-10 with a small conv net (two convolutions of 16 and 32 maps) is a table of its own, and not the
paper's ResNet-18: 10,000 training images, ten epochs an expert, "joint", "nc" and "mt" (with labels of
tasks), auxiliary data of MNIST-M, and crops of one photograph. "sizes": the same in "mt" over the size of the
memory.

CONSILIENCE_DATA=.. python benchmarks/exmodel.py [--parts mnist cifar ...] [--full] writes
results/exmodel_<part>.{json,md}, with pictures of the memories of seed 0.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import consilience as cs
from common import RESULTS, folder_for, kept, machine, save, spread
from consilience.core.source import Source
from consilience.experts._pictures import write_pictures

SIZE, STEPS, SEEDS = 5000, 1000, 1
SIZES = (10, 50, 250, 1000, 5000)
CIFAR = 10_000
FILES = Path(tempfile.gettempdir()) / "consilience-exmodel" / machine()["commit"].replace(" ", "-")
"""Where experts lie, by commit: they are trained once."""


class Job(NamedTuple):
    """One row with one seed."""

    data: str
    scenario: str
    row: str
    seed: int
    size: int = SIZE


# Data and experts.


@lru_cache(maxsize=4)
def images(name: str) -> Source:
    """All pixels of mean 0 and deviation 1, by the usual figures of the set that experts learn."""
    found = cs.data.npz("cifar10_jpeg", limit=CIFAR, seed=0) if name == "cifar" else cs.data.npz(name)
    return found.map(x=lambda x: scaled(x, name))


def scaled(x: Tensor, name: str) -> Tensor:
    mean, std = (0.47, 0.25) if name in ("cifar", "mnist_m_jpeg") else (0.1307, 0.3081)
    return (x - mean) / std


def model_of(data: str) -> Any:
    return cs.models.lenet() if data == "mnist" else cs.models.conv(10, 3, 32, 16)


def parts_of(data: str, scenario: str, seed: int) -> list[Source]:
    """What each expert was trained on, and is judged by."""
    whole = images(data)
    return [whole] if scenario == "joint" else cs.data.split_classes(whole, 5, seed=seed)


def train(work: tuple[str, str, int]) -> None:
    """Train the experts of a scenario, all seeds."""
    data, scenario, seeds = work
    torch.set_num_threads(1)
    epochs = {("mnist", "joint"): 1, ("mnist", "nc"): 5}.get((data, scenario), 10)
    training = cs.Training(epochs=epochs, lr=0.01, batch_size=32)
    if data == "cifar":
        training = cs.Training(epochs=epochs, lr=0.001, batch_size=32, optimiser="adam")
    out = FILES / f"{data}-{scenario}"
    count = 1 if scenario == "joint" else 5
    cs.experts.train(images(data), out, model_of(data), training, scenario, count, seeds, resume=True)


def given(data: str, scenario: str, seed: int) -> list[cs.Expert]:
    """The experts, with the sources that they are judged by."""
    found = []
    for number, source in enumerate(parts_of(data, scenario, seed)):
        file = FILES / f"{data}-{scenario}" / f"seed-{seed}" / f"expert-{number}.safetensors"
        expert = cs.experts.load(file)
        found.append(cs.Expert(expert.name, expert.params, source, labels=expert.labels))
    return found


# Rows.


def strokes(count: int) -> Tensor:
    return scaled(cs.memory.strokes(count, (28, 28)), "mnist")


def crops(count: int) -> Tensor:
    """Pieces of one photograph."""
    from sklearn.datasets import load_sample_image

    photograph = torch.tensor(np.array(load_sample_image("china.jpg"))).permute(2, 0, 1).float() / 255
    return scaled(cs.memory.pieces(photograph, count, (32, 32)), "cifar")


def maker_of(kind: str, job: Job) -> Any:
    if kind == "inversion":
        return cs.memory.inversion(until=0.99)
    if kind == "impression":
        return cs.memory.impression(1.0)
    if kind == "generator":
        return cs.memory.generator(steps=100, adapt=10)
    if kind == "real":
        return cs.memory.real(parts_of(job.data, job.scenario, job.seed))
    if kind == "auxiliary":
        other = images("fashion_mnist" if job.data == "mnist" else "mnist_m_jpeg")
        return cs.memory.auxiliary(other)
    if kind == "strokes":
        return cs.memory.auxiliary(strokes(job.size), "random")
    if kind == "crops":
        return cs.memory.auxiliary(crops(job.size), "random")
    assert kind == "anchors"
    # Images that no expert was trained on, without their labels.
    x = images(job.data).validation.whole()[0]
    return cs.memory.auxiliary(x[:SIZE], "random")


BOTH = {"targets": "both", "weight_ce": 0.0}
OVER = {**BOTH, "normalise": "samples"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "Model Inversion ED": ("inversion", {}),
    "Data Impression ED": ("impression", {}),
    "Aux. Data ED": ("auxiliary", {}),
    "Replay ED": ("real", {}),
    "strokes": ("strokes", {}),
    "strokes, both teachers": ("strokes", BOTH),
    "strokes, both, over samples": ("strokes", OVER),
    "ours (and 3 x the steps)": ("strokes", {**OVER, "steps": 3 * STEPS}),
    "ours with inversion": ("inversion", {**OVER, "steps": 3 * STEPS}),
    "ours with a generator": ("generator", {**OVER, "steps": 3 * STEPS}),
    "ours with Fashion-MNIST": ("auxiliary", {**OVER, "steps": 3 * STEPS}),
    "ours with 20,000 samples": ("strokes", {**OVER, "steps": 3 * STEPS}),
    "ours with 5,000 unlabelled digits (anchors)": ("anchors", {**OVER, "steps": 3 * STEPS}),
    "ours, joint (10 x the steps)": ("strokes", {**BOTH, "steps": 10 * STEPS, "lr": 0.003}),
    "crops": ("crops", BOTH),
    "crops, over samples": ("crops", OVER),
}
"""A maker, and what is not the paper's."""

PICTURED = ("Model Inversion ED", "Data Impression ED", "Replay ED", "strokes", "crops")
"""Rows whose memory is drawn; replay shows what the real images are like."""

PAPER = {
    "oracle": ("93.7", "99.4"),
    "average": ("", "33.4"),
    "entropy": ("", "39.4"),
    "parameter average": ("", "20.1"),
    "Model Inversion ED": ("93.1", "43.2"),
    "Data Impression ED": ("92.1", "36.1"),
    "Aux. Data ED": ("89.4", "35.5"),
}
"""Joint, NC."""

ENSEMBLES: dict[str, Callable[[], cs.Method]] = {
    "oracle": cs.methods.oracle_ensemble,
    "average": cs.methods.average_ensemble,
    "entropy": cs.methods.entropy_ensemble,
    "parameter average": cs.methods.parameter_average,
}


def measured(job: Job) -> dict[str, float]:
    """Accuracy, seconds and MACs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began, experts = time.time(), given(job.data, job.scenario, job.seed)
    if job.row == "all outputs":
        return {"score": all_outputs(job, experts)}
    labelled: Any = "task" if job.scenario == "mt" else "class"
    schedule = cs.settings.exmodel(experts, scenario=labelled)
    model = cs.models.multi_head(model_of(job.data), 10) if labelled == "task" else model_of(job.data)
    if job.row in ENSEMBLES:
        result = cs.run(schedule, ENSEMBLES[job.row](), model, seed=job.seed)
        return {"score": result.score, "seconds": time.time() - began}

    kind, options = ROWS[job.row]
    size = 20_000 if "20,000" in job.row else job.size
    job = job._replace(size=size)
    method = cs.methods.exmodel_distillation(maker_of(kind, job), size, **{"steps": STEPS, **options})
    result = cs.run(schedule, method, model, seed=job.seed)
    if job.seed == 0 and job.size == SIZE and job.row in PICTURED and result.agent is not None:
        draw(job, result.agent.state.outer)
    return {"score": result.score, "seconds": time.time() - began, "macs": result.costs["macs"]}


def all_outputs(job: Job, experts: Sequence[cs.Expert]) -> float:
    """The accuracy of the mean of all logits of all experts, over all outputs."""
    model, right, count = model_of(job.data), 0, 0
    for expert in experts:
        x, y = expert.source.test.whole()
        total = torch.zeros(len(y), 10)
        for other in experts:
            net = {name: torch.as_tensor(entry) for name, entry in other.params.items()}
            with torch.no_grad():
                total += torch.cat([model(net, {}, part, None, False)[0] for part in x.split(1000)])
        # Columns of an expert are by its labels, targets by those of its source.
        columns = torch.tensor([experts[0].labels.index(label) for label in expert.source.labels])
        right += int((total.argmax(1) == columns[y]).sum())
        count += len(y)
    return right / count


def draw(job: Job, memory: Mapping[str, Tensor]) -> None:
    """Write a picture of a memory."""
    name = "".join(letter if letter.isalnum() else "-" for letter in job.row.lower())
    write_pictures(RESULTS / f"exmodel_{job.data}_{job.scenario}_{name}.png", memory["x"], memory["y"])


# Parts.


class Bench(NamedTuple):
    """Where runs are made, and how many."""

    pool: ProcessPoolExecutor
    keep: Path | None
    seeds: int

    def scores(self, jobs: Sequence[Job]) -> dict[Job, list[dict[str, float]]]:
        """What `measured` says of each job, over seeds."""
        every = [job._replace(seed=seed) for seed in range(self.seeds) for job in jobs]
        done = dict(zip(every, self.pool.map(kept_job, [(self.keep, job) for job in every]), strict=True))
        return {job: [done[job._replace(seed=seed)] for seed in range(self.seeds)] for job in jobs}

    def train(self, data: str, scenarios: Sequence[str]) -> None:
        for _ in self.pool.map(train, [(data, scenario, self.seeds) for scenario in scenarios]):
            pass


def kept_job(work: tuple[Path | None, Job]) -> dict[str, float]:
    """`measured`, once per folder."""
    folder, job = work
    return kept(folder, list(job), lambda: measured(job))


def as_json(found: Mapping[Job, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    return [{**job._asdict(), "seeds": list(each)} for job, each in found.items()]


def run_mnist(bench: Bench) -> tuple[dict[str, Any], str]:
    """Table 2 of the paper on MNIST, and what ours adds."""
    bench.train("mnist", ("nc", "joint"))
    ours = [row for row in ROWS if not row.startswith(("crops", "ours, joint"))]
    jobs = [Job("mnist", "nc", row, 0) for row in (*ENSEMBLES, "all outputs", *ours)]
    few = [row for row in ROWS if row.endswith("ED")]
    few += ["strokes, both teachers", "ours, joint (10 x the steps)"]
    jobs += [Job("mnist", "joint", row, 0) for row in ("oracle", *few)]
    # The longest first, so that no process ends alone.
    jobs.sort(key=lambda job: -("Impression" in job.row) - ("generator" in job.row) - ("ours" in job.row))
    found = bench.scores(jobs)

    def cell(scenario: str, row: str) -> str:
        each = found.get(Job("mnist", scenario, row, 0))
        return spread([one["score"] for one in each]) if each else ""

    top = found[Job("mnist", "joint", "oracle", 0)]
    gaps = {
        job.row: spread([best["score"] - one["score"] for best, one in zip(top, each, strict=True)])
        for job, each in found.items()
        if job.scenario == "joint"
    }
    lines = ["| row | joint | gap to the expert | NC | paper: joint | NC |", "|---" * 6 + "|"]
    for row in (*ENSEMBLES, "all outputs", *ROWS):
        joint, nc = cell("joint", row), cell("nc", row)
        if joint or nc:
            paper = " | ".join(PAPER.get(row, ("", "")))
            lines.append(f"| {row} | {joint} | {gaps.get(row, '')} | {nc} | {paper} |")
    return {"runs": as_json(found)}, "Accuracy, %.\n\n" + "\n".join(lines)


def run_cifar(bench: Bench) -> tuple[dict[str, Any], str]:
    """CIFAR-10 with a small conv net."""
    scenarios = ("joint", "nc", "mt")
    bench.train("cifar", scenarios)
    rows = ("oracle", "average", "Model Inversion ED", "Aux. Data ED", "Replay ED", "crops")
    jobs = [
        Job("cifar", scenario, row, 0) for scenario in scenarios for row in (*rows, "crops, over samples")
    ]
    found = bench.scores(jobs)
    lines = ["| row | joint | NC | MT |", "|---" * 4 + "|"]
    for row in (*rows, "crops, over samples"):
        cells = [spread([one["score"] for one in found[Job("cifar", s, row, 0)]]) for s in scenarios]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return {"images": CIFAR, "runs": as_json(found)}, "Accuracy, %.\n\n" + "\n".join(lines)


def run_sizes(bench: Bench) -> tuple[dict[str, Any], str]:
    """The size of the memory."""
    bench.train("cifar", ("mt",))
    rows = ("Model Inversion ED", "Aux. Data ED", "Replay ED", "crops")
    found = bench.scores([Job("cifar", "mt", row, 0, size) for row in rows for size in SIZES])
    lines = [f"| CIFAR-10, MT | {' | '.join(map(str, SIZES))} |", "|---" * (len(SIZES) + 1) + "|"]
    for row in rows:
        cells = [spread([one["score"] for one in found[Job("cifar", "mt", row, 0, n)]]) for n in SIZES]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return {"images": CIFAR, "runs": as_json(found)}, "Accuracy, %, by samples.\n\n" + "\n".join(lines)


PARTS: dict[str, Callable[[Bench], tuple[dict[str, Any], str]]] = {
    "mnist": run_mnist,
    "cifar": run_cifar,
    "sizes": run_sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--full", action="store_true", help="five seeds")
    parser.add_argument("--seeds", type=int, help="another number of seeds")
    parser.add_argument("--keep", type=Path, help="a folder for what is done, so that a stopped run goes on")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    seeds = chosen.seeds or (5 if chosen.full else SEEDS)
    about = (__doc__ or "").replace("SIZE", f"{SIZE:,}").replace("STEPS", f"{STEPS:,}")
    for part in chosen.parts:
        with ProcessPoolExecutor(chosen.workers) as pool:
            facts, table = PARTS[part](Bench(pool, folder_for(chosen.keep), seeds))
        save(f"exmodel_{part}", about, {"seeds": seeds, **facts}, table)


if __name__ == "__main__":
    main()
