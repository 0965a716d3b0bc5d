"""The command `consilience check`: whether the folders of runs are complete and undamaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from consilience.cli.options import own_options
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class CheckOptions:
    """Options of the check: none."""


def check(argv: Sequence[str]) -> int:
    """Print what each folder of a run holds and what is wrong with it; 0 where nothing is, else 1."""
    options, words = own_options("check", argv, CheckOptions)
    if options is None:
        return 0
    if not words:
        raise ConsilienceError("`consilience check` needs folders of runs: consilience check DIR...")

    from consilience.loop.folder import Log

    folders = [folder for word in words for folder in runs_in(Path(word))]
    damaged = False
    for folder in folders:
        state, problems = Log(folder).check()
        print(f"{folder}  {state}, {'damaged' if problems else 'undamaged'}")
        for problem in problems:
            print(f"  {problem}")
        damaged |= bool(problems)
    return int(damaged)


def runs_in(top: Path) -> list[Path]:
    """List the folders of runs: this one, or those below it, as a comparison has them."""
    from consilience.loop.folder import Log

    # The log is the first file that only a run has; the checkpoint may be all that is left of one.
    below = {path.parent for path in top.rglob("log.jsonl")}
    below |= {path.parent for path in top.rglob("checkpoint") if path.is_dir()}
    if not below and not (top.is_dir() and Log(top).begun):
        raise ConsilienceError(f"`consilience check` needs the folder of a run, and {top} has none.")
    return sorted(below) or [top]
