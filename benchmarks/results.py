"""Update all results, one script after another, and say how old each table is: `make results`.

`python benchmarks/results.py [NAME ...]` runs some of them, `--ages` only prints the table. A script whose
extra, data or program is absent is left out by name; the result of before stays, with its age. What has
`--full` is run at its larger sizes by hand.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Script(NamedTuple):
    """A command: the script with its arguments, its threads per process, and the modules that it wants."""

    command: str
    threads: int = 1
    wants: tuple[str, ...] = ()
    data: bool = True


# Scripts that measure time come first, while the machine is as idle as it was when the command was given.
SCRIPTS = (
    Script("core.py", data=False),
    Script("balancing.py", data=False),
    Script("engines.py", 2, data=False),
    Script("long.py", data=False),
    Script("merging.py", data=False),
    Script("inversion.py", data=False),
    Script("frozen.py", 1, ("transformers",), data=False),
    Script("features.py", 1, ("timm",)),
    Script("mapping.py", 2, data=False),
    Script("outliers.py", data=False),
    Script("heads.py", data=False),
    Script("lengths.py"),
    Script("matrix.py", 1, ("torchjd",)),
    Script("multitask.py", 1, ("torchjd",)),
    Script("curricula.py", 1, ("scipy",)),
    Script("continual.py"),
    Script("federated.py"),
    Script("mergeability.py"),
    Script("exmodel.py"),
    Script("skill.py", 1, ("timm",)),
    Script("skill.py --seed 1", 1, ("timm",)),
    Script("skill.py --seed 2", 1, ("timm",)),
)


def absent(script: Script) -> str:
    """What a script wants and is not there."""
    missing = [name for name in script.wants if importlib.util.find_spec(name) is None]
    missing += ["CONSILIENCE_DATA"] * (script.data and not os.environ.get("CONSILIENCE_DATA"))
    return ", ".join(missing)


def git(*arguments: str) -> str:
    found = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def ages() -> str:
    """A table of all results: date, commit, how old they are, and the minutes that they took."""
    rows, now = [], datetime.datetime.now(datetime.UTC)
    for path in sorted((HERE / "results").glob("*.json")):
        facts = json.loads(path.read_text())
        date = datetime.datetime.strptime(facts["date"], "%Y-%m-%d %H:%M UTC").replace(tzinfo=datetime.UTC)
        commit = facts["commit"].split()[0]
        since = git("rev-list", "--count", f"{commit}..HEAD") or "unknown"
        spent = [facts.get(k) for k in ("minutes", "cpu minutes")]
        rows.append(
            (
                path.stem,
                facts["date"],
                facts["commit"],
                str((now - date).days),
                since,
                *(f"{m:.1f}" if isinstance(m, int | float) else "" for m in spent),
            )
        )
    head = ("result", "date", "commit", "days old", "commits since", "minutes", "CPU minutes")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(script.command.partition(".py")[0] for script in SCRIPTS))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--ages", action="store_true", help="only print how old the results are")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(names):
        parser.error(f"no script {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    failed = []
    for script in () if chosen.ages else SCRIPTS:
        if chosen.names and script.command.partition(".py")[0] not in chosen.names:
            continue
        if missing := absent(script):
            print(f"{script.command} wants {missing}: left out", flush=True)
            continue
        print(f"{script.command}:", flush=True)
        program, *arguments = script.command.split()
        done = subprocess.run(
            [sys.executable, str(HERE / program), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(script.threads)},
        )
        failed += [script.command] * (done.returncode != 0)
    print(f"\n{ages()}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
