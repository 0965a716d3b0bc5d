"""The command `consilience report`: one table and one report of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from consilience.cli.options import own_options
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class ReportOptions:
    """Options of the report.

    Args:
        out: the HTML file to write; it must be new.
        overwrite: replace a file that is there.
    """

    out: str = "report.html"
    overwrite: bool = False


def report(argv: Sequence[str]) -> int:
    """Print the table of finished runs, and write one report."""
    options, words = own_options("report", argv, ReportOptions)
    if options is None:
        return 0
    if not words:
        raise ConsilienceError(
            "`consilience report` needs folders of runs: consilience report DIR... [-o FILE]."
        )

    if Path(options.out).exists() and not options.overwrite:
        raise ConsilienceError(
            f"`--out` must be new, and {options.out} exists; add --overwrite to replace it."
        )

    from consilience import report as room

    results = [room.load(folder) for folder in run_folders(words)]
    print(room.table(results))
    print(f"wrote {room.write(results, options.out)}")
    return 0


def run_folders(words: Sequence[str]) -> list[Path]:
    """List the folders of runs, each once: those given, and those below folders that are none."""
    found: list[Path] = []
    for top in map(Path, words):
        below = [] if (top / "result.json").exists() else sorted(top.rglob("result.json"))
        # A folder without any run is kept, so that reading it says what is missing.
        found += [path.parent for path in below] or [top]
    return list(dict.fromkeys(found))
