"""The command `consilience compare`: several methods on the same sources."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from consilience.cli.build import method_of, model_of, schedule_of
from consilience.cli.options import NAMED, Order, flat, nested, read_yaml, understand
from consilience.cli.run import carry_out
from consilience.core.errors import ConsilienceError, Interrupted, Refusal

if TYPE_CHECKING:
    from consilience.core.method import Method
    from consilience.core.schedule import Schedule
    from consilience.loop.result import Result

OTHER_CONFIGURATION = "a {} resumes with the configuration it began with, but {} has another one."
FIGURES = (
    "setting",
    "data",
    "method",
    "model",
    "repeats",
    "seed",
    "metric",
    "score",
    "score_std",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "macs",
    "bytes",
    "seconds",
)
"""What compare.json has of each result: its figures without the matrices."""


class Methods(NamedTuple):
    """The methods of a comparison by name, and the reasons of those that refuse the setting."""

    accepted: dict[str, Method]
    refused: dict[str, str]


def compare(argv: Sequence[str]) -> int:
    """Run several methods, print one table, and write one report."""
    order = understand("compare", argv)
    if order is None:
        return 0
    out = order.run.out
    folder = Path(out) if out else None
    check_folder("comparison", order.config, folder, order.run.resume)

    schedule = schedule_of(order)
    methods = accepted_methods(order, schedule)
    if not methods.accepted:
        raise ConsilienceError("; ".join(methods.refused.values()))
    # Nothing is written before at least one method is accepted.
    if folder and not order.run.resume:
        write_config(order.config, folder)

    # A method can also refuse once its run begins; the others still run.
    results: dict[str, Result] = {}
    for name, method in methods.accepted.items():
        try:
            results[name] = run_one(order, schedule, name, method, folder)
        except Refusal as error:
            methods.refused[name] = str(error)
        except Interrupted as error:
            resume = f"continue with `consilience compare --resume --out {out}`"
            raise Interrupted(
                f"interrupted; {resume if out else 'nothing was kept, without --out'}."
            ) from error
    return show(results, methods.refused, folder)


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write config.yaml with a hash of itself: what has not begun has no other record of it."""
    import yaml

    from consilience.core.params import write_bytes

    text = yaml.safe_dump(config, sort_keys=False).encode()
    write_bytes(folder / "config.yaml", text + hash_line(text))


def check_folder(kind: str, config: Mapping[str, Any], folder: Path | None, resume: bool) -> None:
    """Refuse a folder that has another run, or none of this kind to resume."""
    if resume:
        if folder is None or not (folder / "config.yaml").exists():
            where = f", but {folder} has no config.yaml" if folder else ""
            raise ConsilienceError(f"`--resume` needs a {kind} in `--out`{where}.")
        *lines, last = (folder / "config.yaml").read_bytes().splitlines(keepends=True) or [b""]
        if last != hash_line(b"".join(lines)):
            raise ConsilienceError(
                f"{folder / 'config.yaml'} is damaged or edited: its content is not what its last line says; "
                "start again in another folder."
            )
        if read_yaml(folder / "config.yaml") != flat(config):
            raise ConsilienceError(OTHER_CONFIGURATION.format(kind, folder))
        return

    files = ("compare.json", "config.yaml", "result.json", "runs.json")
    if folder and any((folder / name).exists() for name in files):
        raise ConsilienceError(
            f"`out` must be a new folder, but {folder} has a run; use --resume to continue it."
        )


def hash_line(text: bytes) -> bytes:
    """Return the last line of config.yaml: a comment with the hash of the lines above."""
    return f"# sha256 of the lines above: {hashlib.sha256(text).hexdigest()}\n".encode()


def accepted_methods(order: Order, schedule: Schedule) -> Methods:
    """Build all methods, and ask each whether it accepts the setting."""
    from consilience.api import default_model

    # A refusal does not stop the comparison: it is a line of the table.
    facts = schedule.survey(order.run.seed)
    model = model_of(order, schedule)
    found = Methods({}, {})
    for name in dict.fromkeys(name.strip() for name in order.names["methods"].split(",")):
        try:
            method = method_of(order, name, "methods")
            method.resolve(replace(facts, model=model or default_model(schedule, method)))
            found.accepted[name] = method
        except ConsilienceError as error:
            found.refused[name] = str(error)
    return found


def run_one(order: Order, schedule: Schedule, name: str, method: Method, folder: Path | None) -> Result:
    """Run one method of a comparison, or read its result if it has finished."""
    from consilience import report

    # The folder of each method is that of a run, with the configuration of a run.
    names = [part.strip() for part in name.split("+")]
    own = [part for part in order.of("methods") if part.name in names]
    keys = tuple(part.key + "." for part in own)
    arguments = [part for part in order.parts if part.choice in NAMED and part.key.startswith(keys)]
    others = [part for part in order.parts if part.choice not in ("methods", *NAMED)]
    parts = [*others, *(replace(part, choice="method") for part in own), *arguments]
    config = nested(parts, order.values)

    if folder is None:
        return carry_out(order, schedule, method, config, None, False)
    from consilience.loop.folder import Log

    # A comparison may have been killed before this method, or before its first checkpoint.
    at = folder / name
    begun = order.run.resume and Log(at).begun
    if not begun or not (at / "result.json").exists():
        return carry_out(order, schedule, method, config, str(at), begun)

    # A run that has finished is not repeated, if it is the same run.
    result = report.load(at)
    if result.config != json.loads(json.dumps(config)):
        raise ConsilienceError(OTHER_CONFIGURATION.format("comparison", at))
    print(f"{name}  was finished")
    return result


def show(results: Mapping[str, Result], refused: Mapping[str, str], folder: Path | None) -> int:
    """Print the table and the refusals, and write both to the folder; return the exit code."""
    from consilience import report
    from consilience.core.params import write_json

    found = list(results.values())
    if found:
        print(report.table(found))
    for name, reason in refused.items():
        print(f"{name}  refused: {reason.removeprefix(name + ': ')}")

    if folder:
        summaries = {name: summary(result) for name, result in results.items()}
        write_json(folder / "compare.json", {"results": summaries, "refused": dict(refused)})
        if found:
            print(f"wrote {report.write(found, folder / 'report.html')}")
    return 0 if found else 2


def summary(result: Result) -> dict[str, Any]:
    """Return the figures of result.json, without the matrices."""
    figures = result.to_json()
    # Figures of further metrics too, by the name of each.
    further = {
        name: {key: value for key, value in found.items() if key in FIGURES}
        for name, found in figures["metrics"].items()
    }
    return {**{key: figures[key] for key in FIGURES}, "metrics": further}
