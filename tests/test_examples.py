"""Examples with inputs and targets of many forms: every run beats chance, resumes, and runs in any engine."""

from __future__ import annotations

import functools
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import consilience as cs

EXAMPLES = Path(__file__).parents[1] / "examples"
TAGS = Path(os.environ.get("CONSILIENCE_DATA", "")) / "ewt_pos_ner.json.xz"
SETTINGS = {"continual", "federated", "multitask", "merging"}

needs_tags = pytest.mark.skipif(
    not TAGS.is_file(), reason="needs ewt_pos_ner.json.xz in the folder that CONSILIENCE_DATA names"
)
needs_pillow = pytest.mark.skipif(find_spec("PIL") is None, reason="needs pillow")
NAMES = [
    pytest.param("image_folder", marks=needs_pillow),
    "language_model",
    "mixed_targets",
    "multi_label",
    "segmentation",
    "table",
    pytest.param("tagger", marks=needs_tags),
    "text_classifier",
]
each_example = pytest.mark.parametrize("name", NAMES)

Run = Callable[..., cs.Result]
run: Run = cs.run


def played(name: str, how: Run) -> list[cs.Result]:
    """Run an example as a script, each of its runs by `how`, and return what these found."""
    results = []

    def recorded(*args: Any, **options: Any) -> cs.Result:
        results.append(how(*args, **options))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cs, "run", recorded)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return results


def briefly(schedule: cs.Schedule, *parts: Any, **options: Any) -> cs.Result:
    """Run one epoch per visit, in float64."""
    method, model, training = parts
    return run(schedule, method, model, replace(training, epochs=1, precision="fp64"), **options)


@functools.cache
def brief(name: str) -> list[cs.Result]:
    """Return the results of brief runs in the serial engine, to which others are compared."""
    return played(name, briefly)


def equal(one: cs.Result, other: cs.Result, within: float = 0.0) -> bool:
    """Whether two results have the same scores and parameters."""
    assert one.params.keys() == other.params.keys()
    gaps = torch.stack([(value - other.params[name]).abs().max() for name, value in one.params.items()])
    same = np.allclose(one.matrices, other.matrices, rtol=0, atol=within, equal_nan=True)
    return same and bool((gaps <= within).all())


def untimed(result: cs.Result) -> list[dict[str, Any]]:
    """Return the curve of a result without what the clock says."""
    return [{name: value for name, value in point.items() if name != "seconds"} for point in result.curve]


# Scores.


def constants(source: cs.Source) -> list[torch.Tensor]:
    """Return answers [N, C, *places] that are the same for all samples and places."""
    y = source.test.targets()
    if source.kind == "value":
        return [y.nanmean().expand_as(y)]
    if source.kind == "labels":
        return [torch.full_like(y, probability) for probability in (0.01, 0.99)]
    shape = (len(y), len(source.labels), *y.shape[1:])
    columns = torch.eye(shape[1]).view(shape[1], 1, shape[1], *[1] * (y.dim() - 1))
    return [column.expand(shape) for column in columns]


def chance(schedule: cs.Schedule, metric: str, sources: list[cs.Source]) -> float:
    """Return the mean score of the best constant answer; each task has its own where it is known."""
    measure = getattr(cs.metrics, metric)()
    scores = np.array([[measure(p, s.test.targets()) for p in constants(s)] for s in sources])
    return float(scores.max(1).mean() if schedule.labelled else scores.mean(0).max())


@each_example
def test_every_run_of_an_example_beats_chance(name, capsys):
    schedules = []

    def kept(schedule: cs.Schedule, *args: Any, **options: Any) -> cs.Result:
        schedules.append(schedule)
        return run(schedule, *args, **options)

    results = played(name, kept)
    table = capsys.readouterr().out
    assert {result.setting for result in results} == SETTINGS
    for schedule, result in zip(schedules, results, strict=True):
        assert result.setting in table and result.method in table
        measured = result.measured_by or (result.metric,) * len(schedule.judged)
        for metric in dict.fromkeys(measured):
            own = [s for s, by in zip(schedule.judged, measured, strict=True) if by == metric]
            score = np.mean([result.of_source(s.name)[-1] for s in own])
            assert score > chance(schedule, metric, own) + 0.07, (result.setting, metric)


# Engines, and interruptions. Brief runs in float64 are enough: rounding does not grow in them.


STACKED = {"image_folder", "multi_label", "segmentation", "table"}
"""The examples whose clients train in one program: their samples and models are alike."""


@each_example
def test_engines_agree_on_an_example(name):
    notes: dict[str, str] = {}

    def batched(schedule: cs.Schedule, *args: Any, **options: Any) -> cs.Result:
        def keep(line: dict[str, Any]) -> None:
            notes[schedule.setting] = notes.get(schedule.setting, "") + line.get("note", "")

        return briefly(schedule, *args, **options, engine="batched", progress=keep)

    for one, many in zip(brief(name), played(name, batched), strict=True):
        assert equal(one, many, within=1e-9), one.setting
    for setting in ("federated", "merging"):
        alone = "one after another" in notes[setting]
        assert ("batched: " in notes[setting] and not alone) == (name in STACKED), notes[setting]


class Stop(Exception):
    """Ends a run in the middle."""


def until(steps: float, end: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """Return a progress function that calls `end` at the first checkpoint after so many steps."""

    def progress(line: dict[str, Any]) -> None:
        if line["event"] == "checkpoint" and line["steps"] >= steps:
            end()

    return progress


def stop() -> None:
    raise Stop


@each_example
def test_every_run_of_an_example_resumes_to_the_same_bits(name, tmp_path):
    whole = {result.setting: result for result in brief(name)}

    def interrupted(*args: Any, **options: Any) -> cs.Result:
        out = tmp_path / args[0].setting
        half = until(whole[out.name].costs["steps"] / 2, stop)
        with pytest.raises(Stop):
            briefly(*args, **options, out=out, checkpoint_steps=2, progress=half)
        return briefly(*args, **options, out=out, resume=True)

    for again in played(name, interrupted):
        one = whole[again.setting]
        assert equal(one, again), again.setting
        assert one.costs["macs"] == again.costs["macs"]
        assert untimed(one) == untimed(again)


def killed(out: str, steps: float) -> None:
    """Run an example, and kill this process in the middle of its federated run."""

    def run_until(schedule: cs.Schedule, *args: Any, **options: Any) -> cs.Result | None:
        if schedule.setting != "federated":
            return None
        die = until(steps, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return briefly(schedule, *args, **options, out=out, checkpoint_steps=2, progress=die)

    played("mixed_targets", run_until)


def test_a_killed_example_resumes_to_the_same_bits(tmp_path, monkeypatch):
    whole = next(result for result in brief("mixed_targets") if result.setting == "federated")
    folder, arguments = str(Path(__file__).parent), (str(tmp_path / "run"), whole.costs["steps"] / 2)
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_examples as t; t.killed{arguments}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr

    def resumed(schedule: cs.Schedule, *args: Any, **options: Any) -> cs.Result | None:
        if schedule.setting != "federated":
            return None
        return briefly(schedule, *args, **options, out=tmp_path / "run", resume=True)

    monkeypatch.setattr(cs.report, "table", str)
    (again,) = filter(None, played("mixed_targets", resumed))
    assert equal(whole, again)
