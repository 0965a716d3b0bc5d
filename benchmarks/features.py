"""Features by a frozen backbone against a bare timm loop, kept features at second use, and what beneficial
biases cost.

mobilenetv2_100 with the shared weights, CIFAR-10 images 32x32 resized to 96, batches of 64, one thread. The
bare loop resizes, normalises and calls the timm module under inference_mode, and joins what comes. Loop and
ours run in turn; throughput is the loop's CPU time over ours, each round by itself, median over rounds
(least to most). Ours lays images out channels last, which the bare loop does not; the loop in that layout
stands next to it. "kept" also hashes the images and writes the files. Second use: all features are there;
wall time of `data.embed` and of reading every number, of that the hashing of the images, and, for
comparison, the bare reading of the same files. Warm: the files are in the system's memory, as they are
right after writing; cold: the system was asked to drop them, so that the disk is read. Biases: CPU time of
one forward and backward pass of 32 images that trains head and biases, over that of a forward pass without
gradients. Wants CONSILIENCE_DATA and timm (`consilience[vision]`).
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import consilience as cs
from common import save
from consilience.core.params import key
from consilience.core.params import load as load_tensors
from consilience.core.source import Source, Tensors
from consilience.data.features import input_hashes

LIMIT, LOOP = 0.95, "bare timm loop"
SIZE, BATCH = 96, 64
OPTIONS: dict[str, Any] = {"pad_type": "same", "bn_eps": 1e-3}


def sources(images: Tensor, labels: Tensor) -> Source:
    t = Tensors(images, labels)
    none = t.select(torch.arange(0))
    return Source("cifar", t, none, none, tuple(("cifar", str(i)) for i in range(10)), tuple(range(10)))


def loop(module: torch.nn.Module, x: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    found = []
    with torch.inference_mode():
        for part in x.split(BATCH):
            part = F.interpolate(part, (SIZE, SIZE), mode="bilinear")
            found.append(module(((part - 0.5) / 0.5).contiguous(memory_format=layout)))
    return torch.cat(found)


def spent(f: Callable[[], object]) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def throughput(model: Any, module: torch.nn.Module, source: Source, rounds: int) -> list[dict[str, Any]]:
    def kept() -> None:
        with tempfile.TemporaryDirectory() as folder:
            cs.data.embed(source, model, folder, BATCH)

    last = lambda: loop(module, x, torch.channels_last)  # noqa: E731
    ours: dict[str, Callable[[], object]] = {
        "bare timm loop, channels last": last,
        "embed": lambda: cs.data.embed(source, model, batch=BATCH),
        "embed, kept": kept,
    }
    x = source.train.whole()[0]
    difference = float(
        (cs.data.embed(source, model, batch=BATCH).train.whole()[0] - loop(module, x)).abs().max()
    )
    times: dict[str, list[float]] = {LOOP: [], **{n: [] for n in ours}}
    for _ in range(rounds):
        times[LOOP].append(spent(lambda: loop(module, x)))
        for name, f in ours.items():
            times[name].append(spent(f))
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(times[LOOP], own, strict=True)]
        rows.append(
            {
                "case": name,
                "ms an image": round(1000 * min(own) / len(x), 3),
                "of the loop": round(statistics.median(ratios), 3),
                "of the loop, channels last": round(
                    statistics.median(
                        a / b for a, b in zip(times[f"{LOOP}, channels last"], own, strict=True)
                    ),
                    3,
                ),
                "rounds": [round(r, 3) for r in ratios],
                "limit": None if name.startswith(LOOP) else LIMIT,
                "largest difference": None if name.startswith(LOOP) else difference,
            }
        )
    return rows


def second_use(model: Any, source: Source, rounds: int) -> dict[str, Any]:
    x = source.train.whole()[0]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cs.data.embed(source, model, folder, BATCH)
        first = time.perf_counter() - start
        files = list(Path(folder).glob("*/*.safetensors"))
        size = sum(f.stat().st_size for f in files)
        names = ("second", "of that hashing", "bare reading", "second, cold", "bare reading, cold")
        times: dict[str, list[float]] = {n: [] for n in names}

        def cold(f: Callable[[], object]) -> float:
            for path in files:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            f()
            return time.perf_counter() - start

        for _ in range(rounds):
            start = time.perf_counter()
            cs.data.embed(source, model, folder, BATCH).train.whole()[0].sum()
            times["second"].append(time.perf_counter() - start)
            start = time.perf_counter()
            for part in x.split(BATCH):
                input_hashes(part)
            times["of that hashing"].append(time.perf_counter() - start)
            start = time.perf_counter()
            for f in files:
                f.read_bytes()
            times["bare reading"].append(time.perf_counter() - start)
            times["second, cold"].append(
                cold(lambda: cs.data.embed(source, model, folder, BATCH).train.whole()[0].sum())
            )
            times["bare reading, cold"].append(cold(lambda: [f.read_bytes() for f in files]))
    found = {n: round(statistics.median(t), 4) for n, t in times.items()}
    return {
        "images": len(x),
        "megabytes": round(size / 1e6, 1),
        "first use, seconds": round(first, 1),
        **{f"{n}, seconds": t for n, t in found.items()},
        "second use, MB/s": round(size / 1e6 / found["second"]),
        "second use without hashing, MB/s": round(
            size / 1e6 / max(found["second"] - found["of that hashing"], 1e-9)
        ),
        "bare reading, MB/s": round(size / 1e6 / found["bare reading"]),
        "second use without hashing, cold, MB/s": round(
            size / 1e6 / max(found["second, cold"] - found["of that hashing"], 1e-9)
        ),
        "bare reading, cold, MB/s": round(size / 1e6 / found["bare reading, cold"]),
        "first over second": round(first / found["second"]),
    }


def biases(backbone: Any, source: Source, rounds: int) -> list[dict[str, Any]]:
    x, y = source.train.whole()
    x, y = F.interpolate(x[:32], (SIZE, SIZE), mode="bilinear"), y[:32]
    params, buffers = backbone.init(key(0))
    forward, _ = backbone.bind(params, buffers, False)

    def plain() -> None:
        with torch.no_grad():
            forward(x, None)

    cases: dict[str, Callable[[], object]] = {"forward": plain}
    numbers = {"forward": (0, 0)}
    for last in (0.0, 0.25, 0.5, 1.0):
        model = cs.models.beneficial_biases(backbone, 10, last)
        p, b = model.grow(*model.init(key(0)), source, key(0, "grow"))
        given = {n: t if model.frozen(n) else t.requires_grad_() for n, t in p.items()}
        train = [t for n, t in given.items() if not model.frozen(n)]
        bound, _ = model.bind(given, b, True)

        def step(bound: Any = bound, train: list[Tensor] = train) -> None:
            torch.autograd.grad(F.cross_entropy(bound(x, "cifar"), y), train)

        cases[f"last={last:g}"] = step
        numbers[f"last={last:g}"] = (len(model.layers), sum(model.widths))
    times: dict[str, list[float]] = {n: [] for n in cases}
    for r in range(rounds + 1):
        for name, f in cases.items():
            t = spent(f)
            if r:
                times[name].append(t)
    return [
        {
            "case": n,
            "layers": numbers[n][0],
            "biases": numbers[n][1],
            "ms an image": round(1000 * min(t) / len(x), 2),
            "of a forward pass": round(
                statistics.median(a / b for a, b in zip(t, times["forward"], strict=True)), 2
            ),
            "rounds": [round(a / b, 2) for a, b in zip(t, times["forward"], strict=True)],
        }
        for n, t in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256, help="of a round")
    parser.add_argument("--kept", type=int, default=2000, help="images of the second use")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    weights = Path(os.environ.get("CONSILIENCE_DATA", "")) / "timm_mobilenetv2_100_same.safetensors"
    try:
        import timm
    except ImportError:
        sys.exit("features.py wants timm: pip install 'consilience[vision]'")
    if not weights.is_file():
        sys.exit(f"features.py wants {weights.name} and cifar10_jpeg.npz in CONSILIENCE_DATA")
    whole = cs.data.npz("cifar10_jpeg", limit=10)
    x, y = whole.test.whole()
    module = timm.create_model("mobilenetv2_100", num_classes=0, **OPTIONS).eval()
    tensors = load_tensors(weights)[0]
    own = module.state_dict()
    module.load_state_dict({n: tensors[n].float() if own[n].is_floating_point() else tensors[n] for n in own})
    model = cs.models.backbone("mobilenetv2_100", weights, size=SIZE, mean=0.5, std=0.5, **OPTIONS)
    some = sources(x[: options.images], y[: options.images])
    rows = throughput(model, module, some, options.rounds)
    costs = biases(model, some, options.rounds)
    kept = second_use(model, sources(x[: options.kept], y[: options.kept]), options.rounds)
    macs = cs.models.macs(model, (3, SIZE, SIZE))
    load = os.getloadavg()[0]
    table = [
        "| case | ms an image | of the loop's throughput | of the loop's, channels last | limit |",
        "|---|---|---|---|---|",
    ]
    table += [
        f"| {r['case']} | {r['ms an image']} | {r['of the loop']} ({min(r['rounds'])} to {max(r['rounds'])}) "
        f"| {r['of the loop, channels last']} "
        f"| {r['limit'] or ''} |"
        for r in rows
    ]
    table += ["", "| second use | |", "|---|---|", *[f"| {k} | {v} |" for k, v in kept.items()], ""]
    table += ["| biases | layers | numbers | ms an image | of a forward pass |", "|---|---|---|---|---|"]
    table += [
        f"| {c['case']} | {c['layers']} | {c['biases']} | {c['ms an image']} | {c['of a forward pass']} "
        f"({min(c['rounds'])} to {max(c['rounds'])}) |"
        for c in costs
    ]
    table += ["", f"- macs an image: {macs}", f"- load average: {load:.1f}"]
    table += [f"- {options.images} images a round, {options.rounds} rounds"]
    facts = {
        "sizes": {k: getattr(options, k) for k in ("images", "kept", "rounds")},
        "throughput": rows,
        "second use": kept,
        "biases": costs,
        "macs an image": macs,
        "load average": load,
    }
    save(Path(__file__).stem, __doc__, facts, "\n".join(table))


if __name__ == "__main__":
    main()
