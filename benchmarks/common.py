"""What all result scripts share: a heading with date, machine and commit, one protocol of tuning, and writing
JSON and Markdown."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from consilience import __version__
from consilience.core.params import write_bytes, write_json

RESULTS = Path(__file__).parent / "results"
BEGAN = time.time()
"""When the script was started."""

PROTOCOL = """Strengths: a method's strength is one of five values, as many for every method. The middle three
are tried; where the best of them is the first or the last, its neighbour beyond is tried too. A star marks a
choice at the end of what was tried; equal scores go to the value nearest the middle."""


def machine() -> dict[str, Any]:
    """Date, machine, commit and versions."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # Results themselves may be new; whatever made them may not.
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", "../src", "*.py"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        commit, dirty = "unknown", ""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "commit": commit + (" with uncommitted changes" if dirty else ""),
        "torch": torch.__version__,
        "consilience": __version__,
    }


def save(name: str, about: str | None, facts: Mapping[str, Any], table: str) -> None:
    """Write results/<name>.json and .md, and print the table.

    `minutes` are those since the script began, `cpu minutes` those of its processes: with other work on the
    machine, the first are more than the second over the number of processes.
    """
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    heading = {
        **machine(),
        "minutes": round((time.time() - BEGAN) / 60, 1),
        "cpu minutes": round(sum(used.ru_utime + used.ru_stime for used in spent) / 60, 1),
    }
    write_json(RESULTS / f"{name}.json", {**heading, **facts})
    top = "\n".join(f"- {k}: {v}" for k, v in heading.items())
    write_bytes(RESULTS / f"{name}.md", f"# {name}\n\n{(about or '').strip()}\n\n{top}\n\n{table}\n".encode())
    print(table)


def kept(folder: Path | None, key: Sequence[Any], work: Callable[[], Any]) -> Any:
    """Do some work once: its answer (JSON) lies in the folder under its key. Without a folder, just do it.

    So a stopped script goes on where it was; `folder_for` gives each commit of the code a folder.
    """
    if folder is None:
        return work()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{digest}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "answer": work()})
    return json.loads(path.read_text())["answer"]


def folder_for(keep: Path | None) -> Path | None:
    """The folder of today's code in that of a script's `--keep`."""
    return keep and keep.absolute() / machine()["commit"].replace(" ", "-")


def spread(scores: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in %."""
    mean = f"{100 * np.mean(scores):.1f}"
    return f"{mean} ± {100 * np.std(scores, ddof=1):.1f}" if len(scores) > 1 else mean


class Choice(NamedTuple):
    """A value, what was tried (value, validation score), and whether the choice is at an end of these."""

    value: float
    tried: list[tuple[float, float]]
    edge: bool

    def __str__(self) -> str:
        return f"{self.value:g}{' *' * self.edge}"


def tune(
    ladders: Mapping[Any, Sequence[float]], scores: Callable[[list[tuple[Any, float]]], Sequence[float]]
) -> dict[Any, Choice]:
    """Choose one of five values for each name, as PROTOCOL says.

    Args:
        ladders: five ascending values by name.
        scores: of (name, value) pairs, larger is better; called twice, so that it may score them in parallel.
    """
    found: dict[Any, dict[int, float]] = {name: {} for name in ladders}

    def score(trials: list[tuple[Any, int]]) -> None:
        for (name, i), s in zip(trials, scores([(n, ladders[n][i]) for n, i in trials]), strict=True):
            found[name][i] = s

    def best(name: Any) -> int:
        return max(found[name], key=lambda i: (found[name][i], -abs(i - 2)))

    score([(name, i) for name in ladders for i in (1, 2, 3)])
    score([(name, {1: 0, 3: 4}[best(name)]) for name in ladders if best(name) != 2])
    return {
        name: Choice(
            ladder[best(name)],
            [(ladder[i], s) for i, s in sorted(found[name].items())],
            best(name) in (min(found[name]), max(found[name])),
        )
        for name, ladder in ladders.items()
    }
