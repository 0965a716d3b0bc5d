"""Merging checkpoints out of core: CPU time and memory against a floor that reads every file once and adds
what it reads.

`python benchmarks/merging.py [--full]`: eight checkpoints of 24.5 M float32 numbers (safetensors in memory:
tmpfs, as a warm page cache) and their base, one thread, then two; every case in a process of its own,
interleaved. `--full` adds the growth with parameters (up to 8 x 1 B, in sparse files) and experts. Files
are made in a temporary folder and deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import save

LIMITS = {"average": 1.5, "task arithmetic": 1.5, "ties": 10.0}
OURS = {
    "average": "mean()",
    "task arithmetic": "arithmetic(2.0)",
    "ties": "ties(0.2)",
    "ties, float16": "ties(0.2)",
    "dare": "dare(0.2)",
    "dare ties": "dare(0.2, ties(1.0))",
    "slerp of two": "slerp()",
    "median": "median()",
    "consensus": "consensus()",
    "model stock": "model_stock()",
}


def shapes(numbers: int) -> dict[str, tuple[int, ...]]:
    """Entries like a vision transformer's: `numbers` in all, one of them large."""
    made: dict[str, tuple[int, ...]] = {"embedding.weight": (numbers // 5 // 512, 512)}
    left = numbers - made["embedding.weight"][0] * 512
    block = 0
    while left > 0:
        for name, shape in {
            "attention.weight": (1024, 512),
            "attention.bias": (1024,),
            "mlp.weight": (512, 1536),
            "norm.weight": (512,),
        }.items():
            size = 1
            for x in shape:
                size *= x
            if size > left:
                shape, size = (left,), left
            if left:
                made[f"blocks.{block}.{name}"] = shape
                left -= size
        block += 1
    return made


def make(folder: Path, numbers: int, experts: int, sparse: bool = False, dtype: str = "float32") -> None:
    """Files of a base and of experts a little away from it; sparse ones are holes with a header."""
    import torch
    from safetensors.torch import save_file

    if sparse:
        for i in range(experts + 1):
            head, end = {}, 0
            for n, s in shapes(numbers).items():
                size = 4 * torch.Size(s).numel()
                head[n] = {"dtype": "F32", "shape": list(s), "data_offsets": [end, end + size]}
                end += size
            text = json.dumps(head).encode()
            with open(folder / f"{i}.safetensors", "wb") as f:
                f.write(len(text).to_bytes(8, "little") + text)
                f.truncate(8 + len(text) + end)
        return
    kind = getattr(torch, dtype)
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=g) * 0.05 for n, s in shapes(numbers).items()}
    save_file({n: t.to(kind) for n, t in base.items()}, folder / "0.safetensors")
    for i in range(experts):
        save_file(
            {
                n: (t + torch.randn(t.shape, generator=g) * 2e-3 * (1 + j % 7)).to(kind)
                for j, (n, t) in enumerate(base.items())
            },
            folder / f"{i + 1}.safetensors",
        )


def child(case: str, folder: Path, out: Path, threads: int, experts: int) -> dict[str, float]:
    """One case in this process: CPU and wall seconds, and MiB beyond what importing took."""
    import torch

    torch.set_num_threads(threads)
    files = [folder / f"{i}.safetensors" for i in range(experts + 1)]
    if case == "floor":
        block = torch.empty(1 << 15)
        view, total = memoryview(block.numpy()).cast("B"), torch.zeros(1 << 15)
        step = lambda: floor(files, view, block, total)  # noqa: E731
    else:
        import consilience as cs
        from consilience import aggregators as a

        aggregator = eval(OURS[case], {n: getattr(a, n) for n in a.__all__})
        few = {"w": torch.zeros(8)}
        cs.merge(
            few, [few, few], aggregator, folder / f"warm-{os.getpid()}.safetensors"
        )  # imports what a first merge does
        (folder / f"warm-{os.getpid()}.safetensors").unlink()
        used = files[1:3] if case == "slerp of two" else files[1:]
        step = lambda: cs.merge(files[0], used, aggregator, out, threads=threads)  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    more = memory("VmHWM") - before
    out.unlink(missing_ok=True)
    return {"cpu": cpu, "wall": wall, "mib": more}


def memory(what: str) -> float:
    """MiB of this process."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what)]
    return int(line.split()[1]) / 1024


def floor(files: list[Path], view: memoryview, block: object, total: object) -> None:
    """Read all files once; add every block to a sum."""
    for f in files:
        handle = os.open(f, os.O_RDONLY)
        while os.readv(handle, [view]):
            total.add_(block)  # type: ignore[attr-defined]
        os.close(handle)


def measure(case: str, folder: Path, threads: int = 1, experts: int = 8) -> dict[str, float]:
    """A case in a process of its own."""
    out = folder / "out.safetensors"
    command = [
        sys.executable,
        __file__,
        "--child",
        case,
        "--folder",
        str(folder),
        "--threads",
        str(threads),
        "--experts",
        str(experts),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    found = subprocess.run(command, capture_output=True, text=True, env=env)
    out.unlink(missing_ok=True)
    if found.returncode:
        raise RuntimeError(found.stderr[-2000:])
    return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--numbers", type=int, default=24_500_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(OURS))
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    if args.child:
        print(
            json.dumps(
                child(args.child, args.folder, args.folder / "out.safetensors", args.threads, args.experts)
            )
        )
        return
    folder = Path(
        tempfile.mkdtemp(prefix="consilience-merging-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    )
    try:
        make(folder, args.numbers, 8)
        half = folder / "half"
        half.mkdir()
        if "ties, float16" in args.cases:
            make(half, args.numbers, 8, dtype="float16")
        table: dict[str, dict[str, object]] = {}
        for threads in (1, 2):
            found: dict[str, list[dict[str, float]]] = {"floor": [], **{c: [] for c in args.cases}}
            for _ in range(args.repeats):
                for case in found:
                    found[case].append(measure(case, half if case.endswith("float16") else folder, threads))
            for case, runs in found.items():
                key = "cpu" if threads == 1 else "wall"
                ratios = [r[key] / f[key] for r, f in zip(runs, found["floor"], strict=True)]
                table[f"{case}, {threads} thread{'s' * (threads > 1)}"] = {
                    "seconds": round(statistics.median(r[key] for r in runs), 3),
                    "over the floor": round(statistics.median(ratios), 2),
                    "its range": f"{min(ratios):.2f} to {max(ratios):.2f}",
                    "least": round(min(r[key] for r in runs) / min(r[key] for r in found["floor"]), 2),
                    "limit": LIMITS.get(case, "") if threads == 1 else "",
                    "MiB over import": round(max(r["mib"] for r in runs), 1),
                }
                print(case, threads, table[f"{case}, {threads} thread{'s' * (threads > 1)}"], flush=True)
        facts: dict[str, Any] = {"numbers": args.numbers, "experts": 8, "repeats": args.repeats}
        if args.full:
            facts["growth"] = growth(folder)
        keys = list(next(iter(table.values())))
        lines = [f"| case | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
        lines += [f"| {case} | {' | '.join(str(row[k]) for k in keys)} |" for case, row in table.items()]
        lines += [
            "",
            "CPU seconds with one thread, wall seconds with two; MiB is the largest of all repeats, "
            "the output included.",
        ]
        lines += [f"- {k}: {v}" for k, v in facts.items() if k != "growth"] + [
            f"- {k}: {v}" for k, v in facts.get("growth", {}).items()
        ]
        save("merging", __doc__, {"table": table, **facts}, "\n".join(lines))
    finally:
        shutil.rmtree(folder)


def growth(folder: Path) -> dict[str, object]:
    """CPU seconds for more parameters (8 experts, random to 200 M, 1 B in sparse files, whose changes are
    all 0) and for more experts."""
    made: dict[str, object] = {}
    for numbers in (50_000_000, 100_000_000, 200_000_000, 1_000_000_000):
        at = folder / "grown"
        at.mkdir()
        sparse = numbers > 200_000_000
        make(at, numbers, 8, sparse=sparse)
        for case in ("floor", "average", "ties"):
            name = f"{case}, 8 x {numbers / 1e6:.0f} M{', sparse' if sparse else ''}"
            made[name] = measure(case, at)
            print(name, made[name], flush=True)
        shutil.rmtree(at)
    for experts in (1, 2, 4, 8):
        for case in ("floor", "average", "ties"):
            made[f"{case}, {experts} x 24.5 M"] = measure(case, folder, experts=experts)
    return made


if __name__ == "__main__":
    main()
