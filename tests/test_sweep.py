"""Seeds and strengths side by side: the same as one after another, stacked, refused before any work, stopped
and resumed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import pytest
import yaml
from torch import nn

import consilience as cs
from consilience import report
from consilience.core.errors import ConsilienceError, Interrupted
from restate import mlp, source, training

pytestmark = pytest.mark.filterwarnings("ignore:.*capped")

SOURCES = [source(f"s/{i}", classes=(0, 1, 2, 3), seed=i) for i in range(4)]
CLIENTS = cs.settings.federated(SOURCES, 4, 2)
STREAM = cs.settings.continual(SOURCES[:3], "domain")
STRENGTHS = {f"mu {m:g}": cs.methods.fedprox(m) for m in (0.1, 0.3, 1.0)}


def close(a, b, limit=1e-12):
    assert abs(a.matrices - b.matrices).max() == 0
    assert a.params.keys() == b.params.keys()
    assert max(float((a.params[n] - b.params[n]).abs().max()) for n in a.params) < limit
    costs = [{k: v for k, v in r.costs.items() if k != "seconds"} for r in (a, b)]
    assert costs[0] == costs[1]


def noting(notes):
    return lambda line: notes.append(line["note"]) if line["event"] == "engine" else None


@pytest.mark.parametrize("schedule", [CLIENTS, STREAM], ids=lambda s: s.setting)
@pytest.mark.parametrize(
    "method", [cs.methods.finetune(), cs.methods.er(12, 8), cs.methods.si()], ids=lambda m: m.name
)
def test_seeds_are_stacked(schedule, method):
    if schedule is CLIENTS and method.name == "er":
        method = cs.methods.fedprox(0.2)
    notes = []
    stacked = cs.run(schedule, method, mlp(), training(), repeats=3, engine="batched", progress=noting(notes))
    close(stacked, cs.run(schedule, method, mlp(), training(), repeats=3))
    assert any(n.startswith(f"batched: {6 if schedule is CLIENTS else 3} agents a step") for n in notes)
    assert len({m.tobytes() for m in stacked.matrices}) == 3, "seeds differ"


def test_strengths_and_seeds_are_stacked():
    notes = []
    found = cs.sweep(
        CLIENTS, STRENGTHS, mlp(), training(), repeats=2, engine="batched", progress=noting(notes)
    )
    assert list(found) == list(STRENGTHS)
    for name, method in STRENGTHS.items():
        close(found[name], cs.run(CLIENTS, method, mlp(), training(), repeats=2))
    assert any(n.startswith("batched: 12 agents a step") for n in notes)
    ends = [r.params["1.weight"].sum().item() for r in found.values()]
    assert len(set(ends)) == 3, "strengths differ"


def test_methods_that_differ_are_not_mixed():
    methods = [
        cs.methods.finetune(),
        cs.methods.si(),
        cs.methods.lwf(),
        cs.methods.er(12, 8),
        cs.methods.ewc(2.0),
    ]
    found = cs.sweep(STREAM, methods, mlp(), training(), engine="batched")
    for m in methods:
        close(found[m.name], cs.run(STREAM, m, mlp(), training()))


def test_an_engine_that_does_not_stack_runs_one_after_another():
    found = cs.sweep(CLIENTS, STRENGTHS, mlp(), training(), engine="serial")
    for name, method in STRENGTHS.items():
        close(found[name], cs.run(CLIENTS, method, mlp(), training()), 1e-300)


def test_default_models_are_stacked():
    sources = cs.data.split_classes(cs.data.digits(), 5)
    notes = []
    methods = {"weak": cs.methods.ewc(1.0), "strong": cs.methods.ewc(100.0)}
    few = cs.Training(epochs=1)
    found = cs.sweep(
        cs.settings.continual(sources[:2], "task"),
        methods,
        training=few,
        engine="batched",
        progress=noting(notes),
    )
    assert any(n.startswith("batched: 2 agents") for n in notes) and list(found) == ["weak", "strong"]


@pytest.mark.parametrize("engine", ["batched", "serial"])
def test_stopped_and_resumed(tmp_path, engine):
    go = partial(
        cs.sweep, CLIENTS, STRENGTHS, mlp(), training(), repeats=2, engine=engine, checkpoint_seconds=1e-9
    )
    whole = go(out=tmp_path / "whole")
    seen = []

    def stop(line):
        seen.append(line)
        if line["event"] == "stage" and line["stage"] == 2:
            raise Interrupted("here")

    with pytest.raises(Interrupted):
        go(out=tmp_path / "cut", progress=stop)
    again = go(out=tmp_path / "cut", resume=True)
    for name in STRENGTHS:
        close(whole[name], again[name])
        lines = [
            (tmp_path / f / name / "log.jsonl").read_text().count('"event": "stage"')
            for f in ("whole", "cut")
        ]
        assert lines == [2 * 5, 2 * 5]


def test_repeats_stopped_side_by_side_resume_one_after_another(tmp_path):
    go = partial(
        cs.run, CLIENTS, cs.methods.fedprox(0.1), mlp(), training(), repeats=3, checkpoint_seconds=1e-9
    )

    def stop(line):
        if line["event"] == "stage" and line["stage"] == 2 and line["repeat"] == 1:
            raise Interrupted("here")

    with pytest.raises(Interrupted):
        go(out=tmp_path, engine="batched", progress=stop)
    close(go(out=tmp_path, resume=True), go())


def test_refusals_come_before_any_work():
    def never(line):
        raise AssertionError(line)

    with pytest.raises(cs.ConsilienceError, match="got 'fedprox' twice"):
        cs.sweep(CLIENTS, [cs.methods.fedprox(0.1), cs.methods.fedprox(1.0)], mlp(), training())
    with pytest.raises(cs.ConsilienceError, match="`methods` must be a mapping or a sequence of methods"):
        cs.sweep(CLIENTS, cs.methods.fedprox(0.1), mlp(), training())
    bad = {"good": cs.methods.fedavg(), "masks": cs.methods.packnet()}
    with pytest.raises(cs.Refusal) as e, warnings.catch_warnings():
        cs.sweep(CLIENTS, bad, mlp(), training(), progress=never)
    assert "in 'masks' of a sweep" in e.value.__notes__


def test_names_reach_tables_folders_and_reports(tmp_path):
    """Two strengths of one method were two rows called "ewc"."""
    methods = {"weak": cs.methods.ewc(1), "strong": cs.methods.ewc(100)}
    results = cs.sweep(STREAM, methods, mlp(), training(), out=tmp_path)
    for name, result in results.items():
        found = cs.Result.load(tmp_path / name)
        assert result.method == found.method == name
        assert result.config["name"] == name and result.config["method"] == "ewc"
        assert name in report.table([found])


def test_models_and_trainings_are_combined_as_runs_alone():
    models = {"catalogue": mlp(), "module": nn.Sequential(nn.Flatten(), nn.Linear(6, 4))}
    trainings = {f"lr {lr}": replace(training(), lr=lr) for lr in (0.1, 0.01)}
    results = cs.sweep(STREAM, {"plain": cs.methods.finetune()}, models, trainings, engine="serial")
    assert list(results) == [f"plain, {model}, {name}" for model in models for name in trainings]
    for model, given in models.items():
        for name, chosen in trainings.items():
            close(results[f"plain, {model}, {name}"], cs.run(STREAM, cs.methods.finetune(), given, chosen))
    with pytest.raises(ConsilienceError, match="`training` of a sweep must name at least one"):
        cs.sweep(STREAM, [cs.methods.finetune()], training={})


@pytest.mark.parametrize("field", ["method", "model", "training", "data"])
def test_the_configuration_of_a_run_from_python_has_every_hyperparameter(field, tmp_path):
    """Two runs that differ in one hyperparameter wrote the same file."""
    base = {"method": cs.methods.er(20), "model": nn.Linear(6, 4), "training": training(), "data": STREAM}
    other = {
        "method": cs.methods.er(20, policy=cs.memory.ring()),
        "model": nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)),
        "training": replace(training(), weight_decay=0.1),
        "data": cs.settings.continual([SOURCES[0], replace(SOURCES[1], test=SOURCES[2].train), SOURCES[2]]),
    }
    texts = []
    for i, given in enumerate((base, {**base, field: other[field]})):
        cs.run(given["data"], given["method"], given["model"], given["training"], out=tmp_path / str(i))
        texts.append((tmp_path / str(i) / "config.yaml").read_text())
    assert texts[0] != texts[1] and all("0x" not in text for text in texts)
    assert yaml.safe_load(texts[0])["parts"]["corrections"][0]["ER"]["size"] == 20
