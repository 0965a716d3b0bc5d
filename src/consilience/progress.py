"""Progress: a bar while runs go on in a terminal or a notebook, or lines where they are asked for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from consilience.core.errors import ConsilienceError
from consilience.core.names import clean

if TYPE_CHECKING:
    from consilience.loop.folder import Progress


@contextmanager
def watched(
    given: Progress | bool | None, stages: Callable[[], int], repeats: int, labels: Sequence[str]
) -> Iterator[Mapping[str, Progress | None]]:
    """Give what each run, by its label, calls with the lines of its log.

    `given` is such a function; True: bars where they can be drawn, else lines; None: bars where they can be
    drawn, else nothing; False: nothing. Every run has `repeats` times `stages()` evaluations.
    """
    if not (given is None or isinstance(given, bool) or callable(given)):
        raise ConsilienceError(f"`progress` must be True, False or a function of a line, got {given!r}.")
    if callable(given) or given is False:
        yield dict.fromkeys(labels, given or None)
        return
    if not draws():
        yield {label: lines_of(label, stages(), repeats) if given else None for label in labels}
        return

    with ExitStack() as held:
        from rich.errors import LiveError

        # A bar of the user's own may be there already, and a terminal has one.
        try:
            add = held.enter_context(bars())
        except LiveError:
            yield dict.fromkeys(labels)
            return
        yield {label: add(label, stages(), repeats) for label in labels}


def draws() -> bool:
    """Whether a bar can be drawn: in a terminal, or a notebook."""
    # A bar redraws its line, which would fill a file or a pipe with control characters.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel") or bool(sys.stdout and sys.stdout.isatty())


def lines_of(label: str, stages: int, repeats: int) -> Progress:
    """Return a function that prints a line for each stage."""
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

    return write


def scores_of(line: Mapping[str, Any]) -> str:
    """Write the scores of a stage: one number, or each further metric by its name."""
    further = [f"{name} {score:.3f}" for name, score in line.get("metrics", {}).items()]
    # Sources with different metrics have no mean.
    first = [] if further and math.isnan(line["score"]) else [f"{line['score']:.3f}"]
    return ", ".join([*first, *further])


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], Progress]]:
    """Give a function of (label, stages, repeats) that adds a bar, and returns what draws it."""
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

        def add(label: str, stages: int, repeats: int) -> Progress:
            task = bar.add_task(label, total=stages * repeats)

            def draw(line: Mapping[str, Any]) -> None:
                if line["event"] == "stage":
                    text = f"{label}, {clean(line['name'])}: {scores_of(line)}"
                    bar.update(task, completed=line["repeat"] * stages + line["stage"], description=text)

            return draw

        yield add
