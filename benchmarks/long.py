"""Long runs: 200 rounds, 50 tasks and 1,000 clients of a tiny net; `--full` runs 2,000, 500 and 10,000.

Before every Train phase a run notes its processor time, memory, open files and threads. The last tenth of the
phases is compared with the first (without the first phases of all, in which costs are measured): the least
time per phase, to which other processes add nothing, and the largest of the others. Nothing is evaluated but
the end. Each case runs in a process of its own. "keeps" says what a method must keep, so that it may grow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import consilience as cs
from common import save
from consilience.core.schedule import Evaluate, Phase, Schedule
from consilience.core.source import Source
from consilience.loop.engine import Engine, EngineEvents, Paused, Visit

WARM = 5
"""Phases that are left out at the start: they measure costs and fill caches."""
MOST = 1.1
"""What the last tenth may be of the first."""
NAMES = ("seconds", "memory", "files", "threads")


@dataclass(eq=False)
class Watched(Engine):
    """The serial engine; `seen` has the processor time, memory, files and threads before every phase."""

    seen: list[tuple[float, int, int, int]] = field(default_factory=list)

    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        files = len(list(Path("/proc/self/fd").iterdir()))
        self.seen.append((time.process_time(), memory(), files, threading.active_count()))
        cs.engines.serial().train(visits, events, paused)


def memory() -> int:
    """Return the resident memory of this process in KiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1])


def sources(count: int) -> list[Source]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        x, y = torch.randn(32, 8, generator=draw), torch.arange(32) % 2
        found.append(cs.data.arrays(x, y, name=f"s{number}", validation=0.0))
    return found


def unjudged(schedule: Schedule) -> Schedule:
    """Return the schedule with its last evaluation alone."""

    def plan(seed: int) -> Iterable[Phase]:
        phases = list(schedule.plan(seed))
        return [phase for phase in phases[:-1] if not isinstance(phase, Evaluate)] + phases[-1:]

    return replace(schedule, plan=plan)


@dataclass(frozen=True)
class Case:
    """A run: its schedule for a number of phases, its method, and what that must keep."""

    schedule: Callable[[int], Schedule]
    method: Callable[[], Any]
    phases: int
    """With `--full`."""
    keeps: str = ""
    folder: bool = False
    """Whether it writes a folder, with a checkpoint every two steps."""


def rounds(count: int) -> Schedule:
    return cs.settings.federated(sources(10), count, scenario="domain")


def tasks(count: int) -> Schedule:
    return cs.settings.continual(sources(count), "domain")


def once(count: int) -> Schedule:
    """Return rounds of 10 clients, each of which trains once."""
    return cs.settings.federated(sources(10 * count), count, 10, order="cyclic", scenario="domain")


CASES = {
    "fedavg, 10 clients": Case(rounds, cs.methods.fedavg, 2000),
    "scaffold, 10 clients": Case(rounds, cs.methods.scaffold, 2000),
    "fedavg, 10 clients, folder": Case(rounds, cs.methods.fedavg, 2000, folder=True),
    "scaffold, 10 clients, folder": Case(rounds, cs.methods.scaffold, 2000, folder=True),
    "many clients, each once": Case(once, cs.methods.fedavg, 1000, "the state of each client"),
    "finetune, tasks": Case(tasks, cs.methods.finetune, 500),
    "finetune, tasks, folder": Case(
        tasks, cs.methods.finetune, 500, "how often each source was visited", folder=True
    ),
    "er(100), tasks": Case(tasks, lambda: cs.methods.er(100), 500),
    "ewc, tasks": Case(tasks, lambda: cs.methods.ewc(1.0), 500, "a Fisher matrix per task"),
    "online_ewc, tasks": Case(tasks, lambda: cs.methods.online_ewc(1.0), 500),
    "gdumb(100), tasks": Case(tasks, lambda: cs.methods.gdumb(100), 500, "a part per task with an example"),
    "gem, tasks": Case(tasks, lambda: cs.methods.gem(10), 500, "a constraint per task"),
}


def measured(name: str, phases: int) -> dict[str, Any]:
    """Run a case in this process, and return its row."""
    torch.set_num_threads(1)
    case, engine = CASES[name], Watched()
    training = cs.Training(epochs=1, batch_size=16, lr=0.05)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as out:
        warnings.simplefilter("ignore")
        more: dict[str, Any] = {"out": Path(out) / "run", "checkpoint_steps": 2} if case.folder else {}
        schedule = unjudged(case.schedule(phases))
        cs.run(schedule, case.method(), cs.models.mlp(8, (8,), 2), training, engine=engine, **more)

    seen = engine.seen[WARM:]
    tenth = len(seen) // 10
    row: dict[str, Any] = {"case": name, "phases": phases, "keeps": case.keeps}
    for place, kind in enumerate(NAMES):
        values = [line[place] for line in seen]
        if kind == "seconds":
            values = [after - before for before, after in pairwise(values)]
        of = min if kind == "seconds" else max
        first, last = of(values[:tenth]), of(values[-tenth:])
        row[kind] = {"first": first, "last": last, "ratio": last / first}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--case")
    arguments = parser.parse_args()
    if arguments.case is not None:
        phases = CASES[arguments.case].phases
        print(json.dumps(measured(arguments.case, phases if arguments.full else phases // 10)))
        return

    rows = []
    for name in CASES:
        command = [sys.executable, __file__, "--case", name, *(["--full"] if arguments.full else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(name, {kind: round(rows[-1][kind]["ratio"], 3) for kind in NAMES}, flush=True)

    lines = ["| case | phases | ms per phase | ratio | MiB | ratio | files | threads | keeps |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        time_, kept, files, threads = (row[kind] for kind in NAMES)
        spans = [f"{1e3 * time_['first']:.2f} to {1e3 * time_['last']:.2f}", f"{time_['ratio']:.2f}"]
        spans += [f"{kept['first'] / 1024:.0f} to {kept['last'] / 1024:.0f}", f"{kept['ratio']:.2f}"]
        spans += [f"{each['first']} to {each['last']}" for each in (files, threads)]
        lines.append(f"| {row['case']} | {row['phases']} | {' | '.join(spans)} | {row['keeps']} |")
    grown = [r["case"] for r in rows if not r["keeps"] and any(r[kind]["ratio"] > MOST for kind in NAMES)]
    lines += ["", f"Above {MOST} without anything that must be kept: {', '.join(grown) or 'none'}."]
    save("long_full" if arguments.full else "long", __doc__, {"rows": rows, "grown": grown}, "\n".join(lines))


if __name__ == "__main__":
    main()
