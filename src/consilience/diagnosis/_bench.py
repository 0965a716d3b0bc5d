"""The runs of a diagnosis: planned and checked before any work, trained once each, and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from consilience.api import Given, model_for, run
from consilience.core.errors import ConsilienceError, Interrupted
from consilience.core.method import Method
from consilience.core.metrics import Metric
from consilience.core.model import Model
from consilience.core.params import SEAL, is_sealed, sealed, write_json
from consilience.core.schedule import Evaluate, Exchange, Phase, Schedule, Train, build
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.diagnosis._probe import Probe, Probing, Reading
from consilience.engines import by_name
from consilience.loop.checks import RunOptions, check_all
from consilience.loop.engine import Engine
from consilience.loop.fingerprint import fingerprint
from consilience.metrics.choice import Choice, metrics_of

LEDGER = "runs.json"
"""The file of a diagnosis that has its finished runs."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run: scores [seeds, tasks] at the end, NaN for tasks that it did not train."""

    name: str
    scores: np.ndarray
    seconds: float
    readings: Mapping[int, list[Reading]] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    left: Mapping[int, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain values."""
        found: dict[str, Any] = plain(
            {
                "scores": self.scores.tolist(),
                "seconds": self.seconds,
                "readings": {
                    str(seed): [asdict(each) for each in own] for seed, own in self.readings.items()
                },
                "layers": list(self.layers),
                "left": {str(seed): value for seed, value in self.left.items()},
            }
        )
        return found

    @classmethod
    def from_json(cls, name: str, content: Mapping[str, Any]) -> Trained:
        """Return a run from what `to_json` gave."""
        return cls(
            name,
            np.array(content["scores"], dtype=float),
            content["seconds"],
            {int(seed): list(map(Reading.from_json, own)) for seed, own in content["readings"].items()},
            tuple(content["layers"]),
            {int(seed): math.nan if value is None else value for seed, value in content["left"].items()},
        )


def plain(value: Any) -> Any:
    """Return what JSON holds: lists, and null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, eq=False)
class Spec:
    """A run to train: on which tasks, by which method, with which model."""

    name: str
    tasks: tuple[str, ...]
    method: Method
    model: Given = None
    training: Training | None = None


@dataclass(eq=False)
class Bench:
    """Trains runs on some of the tasks. All have the outputs of all tasks, so that seeds begin alike."""

    sources: Sequence[Source]
    scenario: str
    options: RunOptions
    engine: str | Engine
    probe: Probe
    """What joint training is looked at by; runs of one task measure the loss that is left."""
    report: Callable[[Mapping[str, Any]], object] | None = None
    folder: Path | None = None
    finished: dict[str, Trained] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    """Of each run, the hash of all that it depends on."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """The content of the ledger that is resumed."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(source.name for source in self.sources)

    def schedule(self, tasks: Sequence[str]) -> Schedule:
        """Return the multi-task schedule that trains on some of the tasks, in the frame of all."""
        # In the order of all tasks, so that a group is the same run however it is found.
        names = tuple(name for name in self.tasks if name in tasks)

        def plan(seed: int) -> Sequence[Phase]:
            return [Train({"agent": names}), Exchange({"agent": ("agent",)}), Evaluate("end")]

        return build("multitask", self.sources, self.scenario, plan, "agent")

    def check(self, spec: Spec) -> Spec:
        """Refuse a run that could not be trained; return it with the model that it will have.

        Raises ConsilienceError, or Refusal for a method that could not act.
        """
        # The same checks as before a run, so that a diagnosis of hours does not end in a refusal.
        schedule = self.schedule(spec.tasks)
        model: Model = model_for(schedule, spec.method, spec.model)
        training = spec.training or Training()
        setup = check_all(schedule, spec.method, model, training, self.options)
        mark = json.dumps(fingerprint(setup, self.options), sort_keys=True, default=str)
        self.marks[spec.name] = hashlib.sha256(f"{spec.tasks}{mark}".encode()).hexdigest()

        # The name of a run says what is tried, but not with which numbers.
        kept = self.kept.get(spec.name)
        if kept is not None and kept["mark"] != self.marks[spec.name]:
            raise ConsilienceError(
                f"a diagnosis resumes with the data, models and settings it began with, but {spec.name!r} in "
                f"{self.folder} has others; use another `out`."
            )
        return replace(spec, model=model)

    def metrics(self) -> list[Metric]:
        """Return the metric of each task; refuse one without a direction."""
        schedule = self.schedule(self.tasks)
        by_source = metrics_of(self.options.metric, schedule.sources, schedule.frame)
        found = [by_source[name][0] for name in self.tasks]
        for name, metric in zip(self.tasks, found, strict=True):
            if metric.higher is None:
                raise ConsilienceError(
                    f"transfer needs a metric with a direction, got {metric.name!r} for {name!r}; use "
                    "cs.metrics.own(f, higher=True), or False where less is better."
                )
        return found

    def train(self, spec: Spec) -> Trained:
        """Train a run, or return it where it is finished."""
        # Parts share runs, such as training together.
        if spec.name in self.finished:
            return self.finished[spec.name]
        if spec.name in self.kept:
            found = Trained.from_json(spec.name, self.kept[spec.name])
        else:
            found = self._run(spec)
        self.finished[spec.name] = found
        self._save()
        if self.report is not None:
            scores = np.nanmean(found.scores) if np.isfinite(found.scores).any() else math.nan
            line = {"event": "stage", "repeat": 0, "stage": len(self.finished), "name": spec.name}
            self.report({**line, "score": float(scores), "seconds": found.seconds})
        return found

    def _run(self, spec: Spec) -> Trained:
        """Train a run with all seeds."""
        began = time.perf_counter()
        # Alone and all together are looked at; what else is trained has an engine that may be faster.
        joint = spec.name == "together"
        looked_at = joint or len(spec.tasks) == 1
        probe = self.probe if joint else Probe(places=1)
        try:
            result = run(
                self.schedule(spec.tasks),
                spec.method,
                spec.model,
                spec.training,
                repeats=self.options.repeats,
                seed=self.options.seed,
                metric=self.options.metric,
                engine=Probing(probe) if looked_at else self.engine,
                progress=False,
            )
        except (Interrupted, KeyboardInterrupt) as error:
            kept = f"the {len(self.finished)} finished runs are in {self.folder}; go on with `resume=True`"
            raise Interrupted(
                f"interrupted in {spec.name!r}; {kept if self.folder else 'nothing was kept, without `out`'}."
            ) from error

        # Tasks that were not trained are judged too, and their scores say nothing.
        scores = result.matrices[:, -1].copy()
        scores[:, [name not in spec.tasks for name in self.tasks]] = math.nan
        seconds = time.perf_counter() - began
        return Trained(spec.name, scores, seconds, dict(probe.readings), probe.layers, dict(probe.left))

    def _save(self) -> None:
        """Write all finished runs, so that an interrupted diagnosis loses one run at most."""
        if self.folder is None:
            return
        runs = {
            name: {"mark": self.marks[name], **trained.to_json()} for name, trained in self.finished.items()
        }
        # Those of an earlier call that this one has not come to yet are kept.
        write_json(self.folder / LEDGER, sealed({"runs": {**self.kept, **runs}}))


def kept_runs(folder: Path | None, resume: bool) -> Mapping[str, Any]:
    """Return the finished runs of a folder. Raises ConsilienceError for a used folder that is not resumed."""
    path = None if folder is None else folder / LEDGER
    if path is None or not path.exists():
        if resume:
            raise ConsilienceError(f"`resume` needs the folder of a diagnosis, and {folder} has none.")
        return {}
    if not resume:
        raise ConsilienceError(
            f"`out` must be a new folder, but {folder} has a diagnosis; use `resume=True`."
        )
    # A file that was cut or edited would give wrong numbers without a word.
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConsilienceError(f"{path} must be complete JSON, got {error}; use another `out`.") from error
    if not isinstance(content, dict) or SEAL not in content or not is_sealed(content):
        raise ConsilienceError(f"{path} is damaged or edited: its hash is another; use another `out`.")
    runs: Mapping[str, Any] = content["runs"]
    return runs


def options_of(
    repeats: int, seed: int, metric: Choice, engine: str | Engine
) -> tuple[RunOptions, str | Engine]:
    """Check what all runs have in common."""
    options = RunOptions(repeats=repeats, seed=seed, metric=metric)
    if not isinstance(engine, Engine):
        by_name(engine)
    return options, engine
