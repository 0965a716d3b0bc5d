"""The command `consilience run`: one method in one setting."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.cli.build import listed, method_of, metrics_of, model_of, schedule_of, training_of
from consilience.cli.options import Order, understand
from consilience.core.errors import ConsilienceError
from consilience.core.names import clean

if TYPE_CHECKING:
    from consilience.api import Result
    from consilience.core.method import Method
    from consilience.core.schedule import Schedule


def run(argv: Sequence[str]) -> int:
    """Run a method, print its table, and keep the run in --out."""
    order = understand("run", argv)
    if order is None:
        return 0

    out, resume = order.run.out, order.run.resume
    if resume and not out:
        raise ConsilienceError("`--resume` needs the folder of the run to continue, `--out`.")
    if resume and not (Path(str(out)) / "config.yaml").exists():
        raise ConsilienceError(f"`--resume` needs a run in `--out`, but {out} has no config.yaml.")

    # The method is built first: its mistakes cost less time than reading the data.
    method = method_of(order, order.names["method"])
    result = carry_out(order, schedule_of(order), method, order.config, out, resume)
    print(result.table())
    if out:
        print(f"kept in {out}")
    return 0


def carry_out(
    order: Order, schedule: Schedule, method: Method, config: Mapping[str, Any], out: str | None, resume: bool
) -> Result:
    """Run one method with the options of an order."""
    import consilience as cs

    options = order.run
    stages = schedule.survey(options.seed).stages
    with progress_lines(stages, options.repeats, method.name) as progress:
        return cs.run(
            schedule,
            method,
            model_of(order, schedule),
            training_of(order),
            out=out,
            resume=resume,
            progress=progress,
            config=config,
            repeats=options.repeats,
            seed=options.seed,
            metric=None if options.metric is None else metrics_of(options.metric),
            engine=options.engine,
            checkpoint_seconds=options.checkpoint_seconds,
            checkpoint_steps=options.checkpoint_steps,
            judge_clients=options.judge_clients,
            stopping=options.stopping,
            trackers=[] if options.trackers is None else listed(options.trackers),
        )


@contextmanager
def progress_lines(stages: int, repeats: int, label: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a callback that shows the log of a run: a bar in a terminal, plain lines elsewhere."""
    # A bar redraws its line, which would fill a file or a pipe with control characters.
    if sys.stdout.isatty():
        with progress_bar(stages, repeats, label) as draw:
            yield draw
        return

    total = stages * repeats

    def write(line: Mapping[str, Any]) -> None:
        before = line.get("repeat", 0) * stages
        # Stage 0 is the evaluation before training.
        if line["event"] == "stage" and line["stage"]:
            count = f"{before + line['stage']}/{total}"
            seconds = f"{line['seconds']:.1f} s"
            print(f"{label}  {count}  {clean(line['name'])}  {scores_of(line)}  {seconds}", flush=True)
        elif line["event"] == "resume":
            done = before + max(0, line["stage"] - 1)
            print(f"{label}  resumed after {done}/{total}, step {line['steps']}", flush=True)

    yield write


def scores_of(line: Mapping[str, Any]) -> str:
    """Write the scores of a stage: one number, or each further metric by its name."""
    further = [f"{name} {score:.3f}" for name, score in line.get("metrics", {}).items()]
    # Sources with different metrics have no mean.
    first = [] if further and math.isnan(line["score"]) else [f"{line['score']:.3f}"]
    return ", ".join([*first, *further])


@contextmanager
def progress_bar(stages: int, repeats: int, label: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a callback that draws the log of a run as a bar."""
    from rich import progress

    columns = (
        # Names may have brackets, which would be markup.
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as bar:
        task = bar.add_task(label, total=stages * repeats)

        def draw(line: Mapping[str, Any]) -> None:
            if line["event"] == "stage":
                text = f"{label}, {clean(line['name'])}: {scores_of(line)}"
                bar.update(task, completed=line["repeat"] * stages + line["stage"], description=text)

        yield draw
