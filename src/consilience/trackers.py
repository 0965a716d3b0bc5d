"""The catalogue of trackers: where the numbers of a run go while it runs, for `run(trackers=[...])`.

A tracker gets scalars by name, and the number of steps so far. After each visit these are `train/loss`,
`train/grad_norm`, `train/lr` and `train/seconds_per_step`, with a curriculum also `train/pace/<source>`
(`train/<agent>/...` of agents that are not evaluated), and what corrections say of it as
`train/<correction>/<what>`; after each evaluation `test/score`, `test/<source>`, `metric/<name>` and
`cost/<what>`. A run of several seeds puts `seed <n>/` before them, and a sweep the name of the run where all
share one tracker.

Trackers are names of this catalogue, what its functions return, objects whose `log(scalars, step)` is called,
and functions of the two. A resumed run goes on in the same files and repeats no row. No default uses the
network.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from consilience.core.errors import ConsilienceError, kind_of, suggest_arguments, unknown
from consilience.core.warning import warn

__all__ = ["csv", "mlflow", "tensorboard", "wandb"]

Log = Callable[[Mapping[str, float], int], object]


class Run(NamedTuple):
    """What a tracker is opened for."""

    name: str
    config: Mapping[str, Any]
    folder: Path | None
    """Where the run is kept."""

    def place(self, tracker: str, given: str | Path | None, name: str) -> Path:
        """Return where a tracker writes: what was given, or `name` in the folder of the run."""
        if given is None and self.folder is None:
            raise ConsilienceError(
                f"the tracker {tracker!r} writes into the folder of the run, and there is none; give `out`, "
                f"or a place, as in trackers.{tracker}(path)."
            )
        return Path(given) if given is not None else (self.folder or Path()) / name

    def remembered(self, tracker: str, make: Callable[[], str]) -> str:
        """Return the id of this run at a service, which a resumed run must know."""
        if self.folder is None:
            return make()
        # Imported here, because it loads torch, and the command line reads this catalogue.
        from consilience.core.params import write_json

        path = self.folder / "trackers.json"
        ids = json.loads(path.read_text()) if path.exists() else {}
        if tracker not in ids:
            ids[tracker] = make()
            write_json(path, ids)
        return str(ids[tracker])


class Opened(NamedTuple):
    """A tracker that takes numbers."""

    log: Log
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Tracker:
    """A tracker of the catalogue, before it is opened."""

    name: str
    open: Callable[[Run], Opened]


def csv(path: str | Path | None = None) -> Tracker:
    """Append rows of step, name and value to a file; None: metrics.csv in the folder of the run."""

    def opened(run: Run) -> Opened:
        import csv

        file = run.place("csv", path, "metrics.csv")
        file.parent.mkdir(parents=True, exist_ok=True)

        def log(scalars: Mapping[str, float], step: int) -> None:
            # Opened for every line, so that a killed run has all rows.
            begun = file.exists()
            with open(file, "a", newline="", encoding="utf-8") as out:
                rows = csv.writer(out)
                if not begun:
                    rows.writerow(["step", "name", "value"])
                rows.writerows([step, name, value] for name, value in scalars.items())

        return Opened(log)

    return Tracker("csv", opened)


def tensorboard(path: str | Path | None = None) -> Tracker:
    """Write event files for TensorBoard into a folder; None: `tensorboard` in the folder of the run."""
    _need("tensorboard")

    def opened(run: Run) -> Opened:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run.place("tensorboard", path, "tensorboard")))

        def log(scalars: Mapping[str, float], step: int) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return Opened(log, writer.close)

    return Tracker("tensorboard", opened)


def wandb(project: str = "consilience", **arguments: Any) -> Tracker:
    """Log to Weights & Biases; `arguments` are those of `wandb.init`.

    It is offline (for `wandb sync`), unless you are logged in, or WANDB_MODE or `mode` says otherwise.
    """
    _need("wandb")

    def opened(run: Run) -> Opened:
        # It would report its own errors to its makers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        given: dict[str, Any] = {"name": run.name, "config": dict(run.config), "reinit": "create_new"}
        given |= {"id": run.remembered("wandb", lambda: secrets.token_hex(4)), "resume": "allow"}
        if run.folder is not None:
            given["dir"] = str(run.folder)
        if "WANDB_MODE" not in os.environ and not wandb.api.api_key:
            given["mode"] = "offline"
        own = wandb.init(project=project, **{**given, **arguments})

        # Its own steps must rise, and those of a second seed begin again.
        own.define_metric("*", step_metric="steps")
        return Opened(lambda scalars, step: own.log({**scalars, "steps": step}), own.finish)

    return Tracker("wandb", opened)


def mlflow(experiment: str = "consilience", uri: str | None = None) -> Tracker:
    """Log to MLflow at `uri`, else at MLFLOW_TRACKING_URI, else in mlflow.db in the folder of the run."""
    _need("mlflow")

    def opened(run: Run) -> Opened:
        # It would count its use at its makers.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        local = f"sqlite:///{((run.folder or Path()) / 'mlflow.db').resolve()}"
        client = MlflowClient(uri or os.environ.get("MLFLOW_TRACKING_URI") or local)
        found = client.get_experiment_by_name(experiment)
        number = client.create_experiment(experiment) if found is None else found.experiment_id

        def begin() -> str:
            begun: str = client.create_run(number, run_name=run.name).info.run_id
            for name, value in _flat(run.config):
                client.log_param(begun, _plain_name(name), str(value)[:500])
            return begun

        own = run.remembered("mlflow", begin)

        def log(scalars: Mapping[str, float], step: int) -> None:
            for name, value in scalars.items():
                client.log_metric(own, _plain_name(name), value, step=step)

        return Opened(log, lambda: client.set_terminated(own))

    return Tracker("mlflow", opened)


def _need(package: str) -> None:
    """Refuse a tracker whose package is missing."""
    if importlib.util.find_spec(package) is None:
        raise ConsilienceError(
            f"the tracker {package!r} needs the package {package}, which is not installed: "
            "pip install 'consilience[trackers]'."
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the numbers and texts of a configuration, by dotted names."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def _plain_name(name: str) -> str:
    """Return a name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


# What a run uses


def of(given: object) -> list[Any]:
    """Return trackers from names, objects and functions. Raises ConsilienceError for anything else."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConsilienceError(f"`trackers` must be a list, as in ['csv'], got {kind_of(given)}.")
    found: list[Any] = []
    for tracker in given:
        if isinstance(tracker, str):
            if tracker not in __all__:
                raise unknown("trackers", tracker, __all__)
            found.append(globals()[tracker]())
        elif isinstance(tracker, Tracker) or callable(tracker) or callable(getattr(tracker, "log", None)):
            found.append(tracker)
        else:
            raise ConsilienceError(
                f"a tracker must be one of {', '.join(__all__)}, an object with `log(scalars, step)`, or a "
                f"function of the two, got {kind_of(tracker)}."
            )
    return found


@dataclass(eq=False)
class Tracking:
    """The trackers of one run, which are given the lines of its log as scalars."""

    trackers: Sequence[Any]
    run: Run
    sources: Sequence[str]
    """The names of the scores of an evaluation."""
    evaluated: str
    """The agent that is evaluated."""
    seeds: Sequence[int]
    shared: str = ""
    """What the names begin with for trackers that several runs share; "" for none."""
    _logs: dict[str, Opened] = field(default_factory=dict, init=False)
    _sent: dict[str, Counter[object]] = field(default_factory=dict, init=False)
    """What each tracker has got already, of what will be done again."""
    _step: int = field(default=0, init=False)

    @property
    def names(self) -> list[str]:
        """The names of all trackers; numbered, so that two of one name are two."""
        each = [getattr(t, "name", None) or getattr(t, "__name__", type(t).__name__) for t in self.trackers]
        return [f"{name} {i + 1}" if each.count(name) > 1 else name for i, name in enumerate(map(str, each))]

    def open(self, before: Iterable[str] = (), dropped: Iterable[Mapping[str, Any]] = ()) -> None:
        """Open all trackers; those of `before` have got the lines that will be written again."""
        again = Counter(_key(*said) for line in dropped if (said := self._read(line)) is not None)
        for name, tracker in zip(self.names, self.trackers, strict=True):
            self._sent[name] = Counter(again) if name in before else Counter()
            try:
                self._logs[name] = self._opened(tracker)
            except ConsilienceError:
                raise
            except Exception as error:
                raise ConsilienceError(f"the tracker {name!r} cannot be opened: {error}.") from error

    def _opened(self, tracker: Any) -> Opened:
        if isinstance(tracker, Tracker):
            return tracker.open(self.run)
        log: Log = getattr(tracker, "log", tracker)
        if not self.shared:
            return Opened(log)
        return Opened(lambda scalars, step: log({f"{self.shared}/{n}": v for n, v in scalars.items()}, step))

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Give the scalars of a line of the log to all trackers."""
        said = self.scalars(line) if self._logs else None
        if said is None:
            return
        for name, opened in list(self._logs.items()):
            if self._sent[name][_key(*said)]:
                self._sent[name][_key(*said)] -= 1
                continue
            try:
                opened.log(dict(said[0]), said[1])
            except Exception as error:
                # A run is worth more than its curves.
                del self._logs[name]
                warn(f"the tracker {name!r} failed and gets nothing more: {type(error).__name__}: {error}")

    def _read(self, line: Mapping[str, Any]) -> tuple[dict[str, float], int] | None:
        """Return the scalars of a line that was read from a file; None for one that is damaged."""
        # No row can have come from it, so there is none to leave out.
        try:
            return self.scalars(line)
        except (AttributeError, LookupError, TypeError, ValueError):
            return None

    def scalars(self, line: Mapping[str, Any]) -> tuple[dict[str, float], int] | None:
        """Return the scalars of a line of the log and their step; None where it has none."""
        event, found = line["event"], {}
        if event == "visit":
            own = "" if line["agent"] == self.evaluated else f"{line['agent']}/"
            names = ("loss", "grad_norm", "lr", "seconds_per_step")
            found = {f"train/{own}{name}": line[name] for name in names}
            # Of a curriculum, the share of the examples that the last epoch chose from.
            found |= {f"train/{own}pace/{source}": pace for source, pace in line.get("pace", {}).items()}
            said = line.get("figures", {})
            found |= {
                f"train/{own}{part}/{name}": value
                for part, figures in said.items()
                for name, value in figures.items()
                if isinstance(value, int | float)
            }
            self._step = line["trained"]
        elif event == "stage":
            found = {"test/score": line["score"]}
            found |= {f"test/{name}": score for name, score in zip(self.sources, line["scores"], strict=True)}
            found |= {f"metric/{name}": score for name, score in line.get("metrics", {}).items()}
            found |= {f"cost/{name}": line[name] for name in ("macs", "bytes", "seconds")}
            self._step = line["steps"]
        elif event == "validation":
            found = {"validation/score": line["score"]}

        # What is undefined is left out; so is the seed where there is one.
        seed = f"seed {self.seeds[line['repeat']]}/" if found and len(self.seeds) > 1 else ""
        known = {seed + name: float(value) for name, value in found.items() if value is not None}
        known = {name: value for name, value in known.items() if math.isfinite(value)}
        return (known, self._step) if known else None

    def close(self) -> None:
        """Close all trackers."""
        logs, self._logs = self._logs, {}
        for name, opened in logs.items():
            try:
                opened.close()
            except Exception as error:
                warn(f"the tracker {name!r} failed to close: {type(error).__name__}: {error}")


def _key(scalars: Mapping[str, float], step: int) -> object:
    """Return what is the same for a row that is written again; times are others."""
    return frozenset(scalars), step


suggest_arguments(__name__)
