"""Trackers: what a run sends them, once each, whatever happens to them or to the run."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import socket
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import consilience as cs
from consilience.cli.main import main

PARTS = [
    replace(part, train=part.train.select(torch.arange(48)), test=part.test.select(torch.arange(20)))
    for part in cs.data.split_classes(cs.data.digits(), 5)[:2]
]
SCHEDULE = cs.settings.continual(PARTS)
TRAINING = cs.Training(epochs=1, batch_size=16)


def go(out: Path | None, trackers, *, schedule=SCHEDULE, method=None, **options):
    method = method or cs.methods.finetune()
    model = cs.models.mlp(64, (4,), 10)
    return cs.run(schedule, method, model, TRAINING, out=out, trackers=trackers, **options)


def rows(path: Path) -> list[tuple[int, str, float]]:
    with open(path, newline="") as file:
        head, *found = csv.reader(file)
    assert head == ["step", "name", "value"]
    return [(int(step), name, float(value)) for step, name, value in found]


def timeless(found):
    return [row for row in found if "seconds" not in row[1]]


def test_a_run_sends_what_its_log_says(tmp_path):
    result = go(tmp_path, ["csv"], metric=["accuracy", "loss"])
    found = rows(tmp_path / "metrics.csv")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    visits = [line for line in log if line["event"] == "visit"]
    assert [row for row in found if row[1] == "train/loss"] == [
        (step, "train/loss", visit["loss"]) for step, visit in zip((3, 6), visits, strict=True)
    ]
    for j, part in enumerate(PARTS):
        scores = [value for _, name, value in found if name == f"test/{part.name}"]
        assert scores == pytest.approx(result.matrix[:, j].tolist())
    assert [value for _, name, value in found if name == "test/score"][-1] == pytest.approx(result.score)
    losses = [value for _, name, value in found if name == "metric/loss"]
    assert losses[-1] == pytest.approx(result.of_metric("loss").score)
    assert {"train/grad_norm", "train/lr", "train/seconds_per_step", "cost/macs"} <= {n for _, n, _ in found}
    assert [step for step, name, _ in found if name == "cost/macs"] == [0, 3, 6]


class Stop(BaseException):
    """The end of a process, as far as a test in it can tell."""


@pytest.mark.parametrize("checkpoint_steps", [2, None])
def test_a_resumed_run_goes_on_and_repeats_no_row(tmp_path, checkpoint_steps):
    mine: list[tuple[int, str, float]] = []

    def own(scalars, step):
        mine.extend((step, name, value) for name, value in scalars.items())

    def stop(line):
        if line["event"] == "stage" and line["stage"] == 2 and line["repeat"] == 1:
            raise Stop

    given = {"repeats": 2, "checkpoint_steps": checkpoint_steps}
    go(tmp_path / "whole", ["csv"], **given)
    with pytest.raises(Stop):
        go(tmp_path / "cut", ["csv", own], progress=stop, **given)
    go(tmp_path / "cut", ["csv", own], resume=True, **given)

    whole = rows(tmp_path / "whole" / "metrics.csv")
    cut = rows(tmp_path / "cut" / "metrics.csv")
    assert timeless(cut) == timeless(whole) == timeless(mine)
    assert len(cut) == len(whole) and {name.split("/")[0] for _, name, _ in cut} == {"seed 0", "seed 1"}


def test_a_tracker_that_is_new_at_a_resume_gets_what_comes(tmp_path):
    def stop(line):
        if line["event"] == "visit":
            raise Stop

    with pytest.raises(Stop):
        go(tmp_path, [], progress=stop)
    go(tmp_path, ["csv"], resume=True)
    assert [step for step, name, _ in rows(tmp_path / "metrics.csv") if name == "train/loss"] == [3, 6]


def test_clients_have_names_of_their_own():
    seen = {}
    schedule = cs.settings.federated(PARTS, rounds=2)
    go(None, [lambda scalars, step: seen.update(scalars)], schedule=schedule, method=cs.methods.fedavg())
    assert {"train/client-0/loss", "train/client-1/loss", "test/score"} <= set(seen)


class Keeps:
    def __init__(self):
        self.names = set()

    def log(self, scalars, step):
        self.names |= set(scalars)


def test_a_sweep_names_its_runs_and_has_a_file_each(tmp_path):
    keeps, methods = Keeps(), {"a": cs.methods.finetune(), "b": cs.methods.er(8)}
    cs.sweep(SCHEDULE, methods, training=TRAINING, out=tmp_path, trackers=["csv", keeps], engine="serial")
    assert {name.split("/")[0] for name in keeps.names} == {"a", "b"}
    assert len(rows(tmp_path / "a" / "metrics.csv")) == len(rows(tmp_path / "b" / "metrics.csv")) > 0


def test_a_tracker_that_raises_loses_no_run(tmp_path):
    calls = []

    def broken(scalars, step):
        calls.append(step)
        raise OSError("no connection")

    with pytest.warns(UserWarning, match="tracker 'broken' failed .*OSError: no connection") as found:
        result = go(tmp_path, [broken, "csv"])
    assert len(found) == len(calls) == 1 and found[0].filename == __file__
    assert result.score == go(None, []).score
    assert len(timeless(rows(tmp_path / "metrics.csv"))) > 10


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_refused_before_work(tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))
    with pytest.raises(cs.ConsilienceError, match=rf"{name}, which is not installed: pip install"):
        go(tmp_path / "run", [name])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("trackers", "says"),
    [
        (["cvs"], "nearest: csv"),
        ("csv", "must be a list"),
        ([3], "an object with `log"),
        (["csv"], "give `out`, or a place, as in trackers.csv"),
    ],
)
def test_what_is_no_tracker_is_refused(trackers, says):
    with pytest.raises(cs.ConsilienceError, match=says):
        go(None, trackers)


def test_the_command_line_takes_names(tmp_path):
    argv = ["run", "--data", "wine", "--split.n", "2", "--method", "finetune", "--training.epochs", "1"]
    (tmp_path / "run.yaml").write_text("trackers: [csv]\n")
    assert main([*argv, "--out", str(tmp_path / "a"), "--trackers", "csv"]) == 0
    assert main([*argv, "--out", str(tmp_path / "b"), "--config", str(tmp_path / "run.yaml")]) == 0
    found = [timeless(rows(tmp_path / name / "metrics.csv")) for name in "ab"]
    assert found[0] == found[1] and found[0]


# Against the libraries, where they are installed. Nothing may leave the machine.


@pytest.fixture
def offline(monkeypatch, tmp_path):
    connect = socket.socket.connect

    def local(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def resumed(out: Path, tracker: str) -> list[tuple[int, str, float]]:
    """Run with a tracker, stopped once and resumed; return the rows that it must have."""

    def stop(line):
        if line["event"] == "stage" and line["stage"] == 1:
            raise Stop

    with pytest.raises(Stop):
        go(out, [tracker, "csv"], progress=stop)
    go(out, [tracker, "csv"], resume=True)
    return timeless(rows(out / "metrics.csv"))


def test_tensorboard_has_the_rows(offline, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = resumed(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if "seconds" not in name]
    found = [(event.step, name, event.value) for name in names for event in events.Scalars(name)]
    assert sorted((step, name) for step, name, _ in found) == sorted((s, n) for s, n, _ in expected)
    values = {(step, name): value for step, name, value in expected}
    assert all(value == pytest.approx(values[step, name], rel=1e-5) for step, name, value in found)


def test_mlflow_has_the_rows(offline, tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    expected = resumed(tmp_path / "run", "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("consilience").experiment_id])
    names = [name for name in run.data.metrics if "seconds" not in name]
    found = [(m.step, n, m.value) for n in names for m in client.get_metric_history(run.info.run_id, n)]
    assert sorted(found) == sorted(expected)
    assert run.data.params["training.lr"] == "0.05" and run.info.status == "FINISHED"


def records(data: bytes):
    """Yield the records of a log in LevelDB's format, as wandb writes it: blocks of 32 KiB, after 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        # 1: complete, 4: the last part of one.
        if kind in (1, 4):
            yield whole
            whole = b""


def test_wandb_is_offline_and_has_the_rows(offline, tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    expected, found = resumed(tmp_path / "run", "wandb"), []
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1 and len(files) == 2
    for file in files:
        for data in records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            items = record.history.item
            said = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            step = said.pop("steps", None)
            found += [(step, n, v) for n, v in said.items() if "seconds" not in n and n[0] != "_"]
    assert sorted(found) == sorted(expected) and os.environ["WANDB_ERROR_REPORTING"] == "false"


@pytest.mark.parametrize(
    "line",
    [
        {"event": "stage"},
        {"event": "stage", "score": 1.0, "scores": [0.5], "steps": 3, "macs": 1, "bytes": 1, "seconds": 1},
        {"event": "visit", "agent": []},
        {"event": "validation", "score": "x", "repeat": 0},
        {},
        [],
    ],
)
def test_a_damaged_line_of_a_log_leaves_no_row_out(line):
    from consilience.trackers import Run, Tracking

    whole = {"event": "validation", "score": 0.25, "repeat": 0}
    got: list[object] = []
    log = [lambda scalars, step: got.append(scalars)]
    tracking = Tracking(log, Run("r", {}, None), ["a", "b"], "agent", (0,))
    tracking.open(tracking.names, [line, whole])
    # The row that was sent before is left out once, whatever the damaged line says.
    tracking(whole)
    tracking(whole)
    assert got == [{"validation/score": 0.25}]
