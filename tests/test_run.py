"""The loop as a user meets it: identities between settings, learning, resuming, streaming, evaluation,
costs."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import consilience as cs
from consilience.core.names import PAST
from consilience.core.params import key, same
from consilience.core.schedule import Evaluate
from consilience.loop.engine import Engine

TRAINING = cs.Training(epochs=5, batch_size=32, lr=0.05)


@pytest.fixture(scope="module")
def digits() -> cs.Source:
    return cs.data.digits()


@pytest.fixture(scope="module")
def parts(digits: cs.Source) -> list[cs.Source]:
    return cs.data.split_classes(digits, 5)


# one client a round, no revisits, is continual learning: bit for bit, through serialised messages


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize(
    "method",
    [
        cs.methods.finetune(),
        cs.methods.ewc(20.0),
        cs.methods.lwf(),
        cs.methods.si(5.0),
        cs.methods.online_ewc(20.0, gamma=0.5),
        cs.methods.mas(1.0),
        cs.methods.fedprox(0.1),
        cs.methods.ewc(5.0) + cs.methods.lwf(),
    ],
    ids=lambda m: m.name,
)
def test_one_client_a_round_is_continual(parts, scenario, method):
    model = cs.models.mlp(64, (32,), 10)
    training = cs.Training(epochs=2, lr=0.05)
    alone = cs.run(cs.settings.continual(parts, scenario), method, model, training)
    served = cs.settings.federated(
        parts, rounds=len(parts), clients_per_round=1, order="cyclic", scenario=scenario
    )
    federated = cs.run(served, method, model, training)
    assert same(alone.params, federated.params)
    assert np.array_equal(alone.matrix, federated.matrix)
    assert federated.costs["bytes"] > 0 == alone.costs["bytes"]
    assert {"server", "client-0", "client-4"} <= federated.costs["by_agent"].keys()


def test_one_client_a_round_with_outer_momentum_is_continual(parts):
    from consilience.core.optimiser import SGD
    from consilience.core.weight_space import WeightSpace

    method = cs.Method("outer", consolidator=WeightSpace(None, SGD(0.5), 0.9))
    training = cs.Training(epochs=1, lr=0.05)
    model = cs.models.mlp(64, (16,), 10)
    alone = cs.run(cs.settings.continual(parts), method, model, training)
    served = cs.run(
        cs.settings.federated(parts, rounds=5, clients_per_round=1, order="cyclic"), method, model, training
    )
    assert same(alone.params, served.params)
    assert not same(
        alone.params, cs.run(cs.settings.continual(parts), cs.methods.finetune(), model, training).params
    )


def test_growing_heads_in_a_federation_equal_continual(parts):
    model = cs.models.multi_head(cs.models.mlp(64, (32,), 10), 10)
    training = cs.Training(epochs=1, lr=0.05)
    for scenario in ("task", "class"):
        alone = cs.run(cs.settings.continual(parts, scenario), cs.methods.finetune(), model, training)
        served = cs.settings.federated(
            parts, rounds=5, clients_per_round=1, order="cyclic", scenario=scenario
        )
        assert same(alone.params, cs.run(served, cs.methods.finetune(), model, training).params)


# learning is asserted, not only running


def mean_score(schedule, method, **training) -> float:
    return cs.run(
        schedule, method, training=cs.Training(**{"epochs": 5, "lr": 0.05, **training}), repeats=5
    ).score


def test_replay_beats_fine_tuning_in_class_incremental(parts):
    schedule = cs.settings.continual(parts)
    assert mean_score(schedule, cs.methods.er(500)) > mean_score(schedule, cs.methods.finetune()) + 0.2


def test_ewc_beats_fine_tuning_in_permuted_domain_incremental(digits):
    schedule = cs.settings.continual(cs.data.permute(digits, 5), "domain")
    assert mean_score(schedule, cs.methods.ewc(10.0), epochs=10) > mean_score(
        schedule, cs.methods.finetune(), epochs=10
    )


def test_federated_averaging_comes_near_joint_training(digits):
    clients = cs.data.dirichlet(digits, 10, 0.1)
    joint = mean_score(cs.settings.multitask(clients), cs.methods.joint(), epochs=10)
    federated = mean_score(cs.settings.federated(clients, rounds=40), cs.methods.fedavg())
    assert joint > 0.9
    assert federated > joint - 0.1


@pytest.mark.parametrize("method", [cs.methods.average(), cs.methods.ties(0.5)], ids=lambda m: m.name)
def test_merging_rises_above_its_base(digits, method):
    schedule = cs.settings.merging(cs.data.iid(digits, 4))
    result = cs.run(schedule, method, training=cs.Training(epochs=10, lr=0.05), repeats=5)
    assert result.score > result.matrix[0].mean() + 0.2


def test_the_task_mapper_finds_the_task(parts):
    result = cs.run(
        cs.settings.skill(parts),
        cs.methods.skill(components=10),
        training=cs.Training(epochs=10, lr=0.05),
        repeats=5,
    )
    assert result.mapper_accuracy > 0.9
    assert result.score > 0.9


def test_every_setting_learns_under_one_aggregator_list(digits):
    clients = cs.data.iid(digits, 4)
    for aggregator in (cs.aggregators.mean(), cs.aggregators.ties(0.5), cs.aggregators.pcgrad()):
        for schedule in (
            cs.settings.multitask(clients),
            cs.settings.federated(clients, rounds=3),
            cs.settings.merging(clients),
        ):
            result = cs.run(schedule, cs.methods.aggregate(aggregator), training=TRAINING)
            assert result.score > result.matrix[0].mean() + 0.2, (aggregator, schedule.setting)


# evaluation


def test_the_matrix_has_a_row_before_training_and_one_a_stage(parts):
    result = cs.run(cs.settings.continual(parts), cs.methods.finetune(), training=TRAINING, repeats=2)
    assert result.matrix.shape == (6, 5)
    assert result.matrices.shape == (2, 6, 5)
    assert result.score == pytest.approx(result.matrix[-1].mean())
    assert result.accuracy == result.score
    assert result.forgetting > 0.9
    assert result.score_std == pytest.approx(np.std([m[-1].mean() for m in result.matrices], ddof=1))
    p = result.predict(parts[-1].test.whole()[0])
    assert p.shape == (71, 10)
    assert torch.allclose(p.sum(1), torch.ones(71))
    assert result.matrices[0][-1, -1] == pytest.approx(
        float((p.argmax(1) == parts[-1].test.whole()[1]).double().mean())
    )


def test_transfer_is_null_where_a_source_is_learned_again(parts):
    result = cs.run(
        cs.settings.federated(parts, rounds=2), cs.methods.finetune(), training=cs.Training(epochs=1)
    )
    assert result.forgetting is result.backward_transfer is result.forward_transfer is None


def test_the_task_label_restricts_answers(parts):
    result = cs.run(cs.settings.continual(parts, "task"), cs.methods.finetune(), training=TRAINING)
    p = result.predict(parts[0].test.whole()[0], task=parts[0].task)
    assert float(p[:, 2:].abs().max()) == 0.0


def test_domain_maps_targets(parts):
    schedule = cs.settings.continual(parts, "domain")
    assert all(set(s.train.targets().tolist()) == {0, 1} for s in schedule.sources)
    assert schedule.frame.labels == (("domain", "0"), ("domain", "1"))


def test_joint_on_a_continual_schedule_is_training_on_all_seen(parts):
    result = cs.run(cs.settings.continual(parts), cs.methods.joint(), training=TRAINING)
    assert result.score > 0.85
    assert result.forgetting < 0.15


def test_tables_with_auroc_and_regression():
    tables = cs.data.iid(cs.data.breast_cancer(), 3)
    result = cs.run(
        cs.settings.federated(tables, rounds=3), cs.methods.fedavg(), training=TRAINING, metric="auroc"
    )
    assert result.metric == "auroc"
    assert result.score > 0.95
    with pytest.raises(cs.ConsilienceError, match="`accuracy` needs classification"):
        _ = result.accuracy
    wine = cs.run(
        cs.settings.multitask([cs.data.wine()]), cs.methods.finetune(), training=cs.Training(epochs=30)
    )
    assert wine.score > 0.9
    values = cs.run(
        cs.settings.federated(cs.data.iid(cs.data.diabetes(), 2), rounds=5),
        cs.methods.finetune(),
        training=TRAINING,
    )
    assert values.metric == "r2"
    assert values.score > 0.2


def test_a_metric_of_ones_own(parts):
    def wrong(p: torch.Tensor, y: torch.Tensor) -> float:
        return float((p.argmax(1) != y).double().mean())

    result = cs.run(cs.settings.continual(parts[:2]), cs.methods.finetune(), training=TRAINING, metric=wrong)
    assert result.metric == "wrong"
    assert result.score < 0.7


# trained models as sources


def test_given_experts_are_merged_and_heard_one_by_one(digits):
    model, sources = cs.models.mlp(64, (32,), 10), cs.data.iid(digits, 3)
    base, _ = model.init(torch.Generator().manual_seed(1))
    experts = []
    for i, s in enumerate(sources):
        schedule = cs.settings.merging(sources=[s], base=base)
        trained = cs.run(schedule, cs.methods.finetune(), model, cs.Training(epochs=20, lr=0.1))
        experts.append(cs.Expert(f"e{i}", trained.params, s))
    merged = cs.run(cs.settings.merging(experts=experts, base=base), cs.methods.task_arithmetic(1.0), model)
    mean = cs.run(cs.settings.merging(experts=experts), cs.methods.average(), model)
    for n, p in mean.params.items():
        assert torch.allclose(p, torch.stack([e.params[n] for e in experts]).mean(0), atol=1e-6)
        assert torch.allclose(p, merged.params[n], atol=1e-6)
    with pytest.raises(cs.Refusal, match="base"):
        cs.run(cs.settings.merging(experts=experts), cs.methods.ties(), model)
    ensemble = cs.run(cs.settings.exmodel(experts), cs.methods.average_ensemble(), model)
    assert ensemble.matrix.shape == (4, 3)
    assert ensemble.score > 0.8
    with pytest.raises(cs.Refusal, match="data"):
        cs.run(cs.settings.exmodel(experts), cs.methods.fed3r(), model)
    wrong = cs.Expert("bad", {n: p[:1] for n, p in base.items()}, sources[0])
    with pytest.raises(cs.ConsilienceError, match="shapes"):
        cs.run(cs.settings.exmodel([wrong]), cs.methods.average_ensemble(), model)


def test_banks_are_the_same_whatever_the_graph(parts):
    banks = []
    for graph in ("mesh", "ring"):
        schedule = cs.settings.skill([parts[:2], parts[2:4], parts[4:]], graph=graph)
        result = cs.run(schedule, cs.methods.skill("nearest_mean"), training=cs.Training(epochs=1))
        banks.append({k: (m.version, m.digest) for k, m in result.agent.state.bank.items()})
    assert banks[0] == banks[1]
    assert len(banks[0]) == 5


def test_a_task_never_changes_as_tasks_are_added_under_an_oracle(parts):
    result = cs.run(cs.settings.skill([parts]), cs.methods.skill(), training=cs.Training(epochs=2))
    oracle = cs.Method("oracle", consolidator=cs.consolidators.experts(), mapper=cs.mappers.oracle())
    model = cs.models.multi_head(cs.models.random_features(64, 512), 10)
    matrix = cs.run(cs.settings.skill([parts]), oracle, model, cs.Training(epochs=2)).matrix
    for j in range(5):
        assert len(set(matrix[j + 1 :, j])) == 1
    assert result.mapper is not None


# data that does not fit in memory


def test_a_stream_equals_tensors_bit_for_bit(parts):
    class Map(torch.utils.data.Dataset):
        def __init__(self, examples):
            self.x, self.y = examples.whole()
            self.targets = self.y

        def __len__(self):
            return len(self.y)

        def __getitem__(self, i):
            return self.x[i], self.y[i]

    from consilience.core.source import Stream

    def streamed(s: cs.Source) -> cs.Source:
        def make(e):
            return Stream(Map(e), e.targets(), torch.arange(len(e)))

        import dataclasses

        return dataclasses.replace(s, train=make(s.train), validation=make(s.validation), test=make(s.test))

    two = parts[:2]
    for method in (cs.methods.er(50), cs.methods.ewc(5.0)):
        a = cs.run(cs.settings.continual(two), method, cs.models.mlp(64, (16,), 10), cs.Training(epochs=2))
        b = cs.run(
            cs.settings.continual([streamed(s) for s in two]),
            method,
            cs.models.mlp(64, (16,), 10),
            cs.Training(epochs=2),
        )
        assert same(a.params, b.params)


def test_dropout_is_keyed(parts):
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 10)
    )
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        runs.append(
            cs.run(
                cs.settings.continual(parts[:2]),
                cs.methods.finetune(),
                cs.models.wrap(net),
                cs.Training(epochs=1),
            )
        )
        assert torch.equal(before, torch.random.get_rng_state())
    assert same(runs[0].params, runs[1].params)


# costs


def test_macs_and_bytes_are_counted(parts):
    model = cs.models.linear(64, 10)
    schedule = cs.settings.federated(parts[:2], rounds=1)
    result = cs.run(schedule, cs.methods.finetune(), model, cs.Training(epochs=1, batch_size=64))
    n = sum(len(s.train) for s in schedule.sources)
    clients = [page for a, page in result.costs["by_agent"].items() if a != "server"]
    assert sum(p["macs"] for p in clients) == pytest.approx(
        2 * n * 640, rel=0.02
    )  # forward and the weights' gradient
    weights = 650 * 4
    assert 4 * weights < result.costs["bytes"] < 4 * weights + 4 * 1500
    server = result.costs["by_agent"]["server"]
    assert server["sent"] == sum(p["received"] for p in clients)
    assert server["received"] == sum(p["sent"] for p in clients)


# the folder, and resuming

SCRIPT = """
import sys, os, signal, torch
torch.set_num_threads(1)
import consilience as cs
out, case, resume, kill = sys.argv[1], sys.argv[2], sys.argv[3] == "resume", int(sys.argv[4])
parts = cs.data.split_classes(cs.data.digits(), 5)
runs = {
    "ewc": (cs.settings.continual(parts), cs.methods.ewc(10.0), None),
    "er": (cs.settings.continual(parts), cs.methods.er(100), None),
    "si": (cs.settings.continual(parts), cs.methods.si(), None),
    "fedavg": (cs.settings.federated(parts, rounds=3), cs.methods.fedavg(outer_momentum=0.5), None),
    "skill": (cs.settings.skill([parts[:3], parts[3:]]), cs.methods.skill(components=5), None),
}
schedule, method, model = runs[case]
training = cs.Training(epochs=3, lr=0.05, **({"optimiser": "adam"} if case == "er" else {"momentum": 0.9}))
steps = 0
def progress(line):
    if line["event"] == "checkpoint" and not resume and kill and line["ran"] >= kill:
        os.kill(os.getpid(), signal.SIGKILL)
result = cs.run(schedule, method, model, training, repeats=2, out=out, resume=resume, checkpoint_steps=kill
or 7, progress=progress)
from consilience.core.params import save
save(out + "/params.safetensors", result.params)
"""


def launch(tmp_path: Path, name: str, case: str, resume: bool, kill: int) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    args = [
        sys.executable,
        str(script),
        str(tmp_path / name),
        case,
        "resume" if resume else "fresh",
        str(kill),
    ]
    return subprocess.run(
        args,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def lines(folder: Path) -> list[dict]:
    return [json.loads(t) for t in (folder / "log.jsonl").read_text().splitlines()]


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("ewc", "skill", "si")]


@pytest.mark.parametrize("case", ["er", "fedavg", *SLOW])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, case):
    assert launch(tmp_path, "whole", case, False, 0).returncode == 0
    whole = lines(tmp_path / "whole")[-1]["ran"]
    span = 3 * 9
    kill = random.Random(case).randrange(span + 2, 2 * span - 2)
    while kill % 9 == 0:
        kill += 1
    assert launch(tmp_path, "cut", case, False, kill).returncode == -signal.SIGKILL
    at = lines(tmp_path / "cut")[-1]
    assert at["event"] == "checkpoint"
    assert 0 < at["step"] < at["of"], "strictly inside an epoch"
    assert at["source"] != "digits/0-1", "in the second source or later"
    done = launch(tmp_path, "cut", case, True, 0)
    assert done.returncode == 0, done.stderr
    end = lines(tmp_path / "cut")[-1]
    assert end["event"] == "end"
    assert end["ran"] == whole - kill
    a, b = ((tmp_path / n / "params.safetensors").read_bytes() for n in ("whole", "cut"))
    assert a == b
    left, right = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "cut"))
    for r in (left, right):
        r.pop("seconds")
        r.pop("sha256")
        r["costs"].pop("seconds")
        for c in r["curve"]:
            c.pop("seconds")
    assert left == right


def test_the_folder_holds_what_it_should(tmp_path, parts):
    out = tmp_path / "run"
    result = cs.run(cs.settings.continual(parts[:2]), cs.methods.finetune(), training=TRAINING, out=out)
    held = json.loads((out / "result.json").read_text())
    for k in (
        "setting",
        "data",
        "method",
        "model",
        "repeats",
        "seed",
        "metric",
        "score",
        "score_std",
        "matrix",
        "forgetting",
        "backward_transfer",
        "forward_transfer",
        "macs",
        "bytes",
        "seconds",
        "versions",
    ):
        assert k in held
    assert held["matrix"] == result.matrix.tolist()
    assert [x["event"] for x in lines(out) if x["event"] == "stage"] == ["stage"] * 3
    assert (out / "config.yaml").exists()
    assert (out / "checkpoint" / "index.json").exists()
    assert not list(out.rglob("*.part"))
    with pytest.raises(cs.ConsilienceError, match="new folder"):
        cs.run(cs.settings.continual(parts[:2]), cs.methods.finetune(), training=TRAINING, out=out)
    again = cs.run(
        cs.settings.continual(parts[:2]), cs.methods.finetune(), training=TRAINING, out=out, resume=True
    )
    assert again.matrices.tolist() == result.matrices.tolist()
    assert same(again.params, result.params)
    with pytest.raises(cs.ConsilienceError, match="`method.name` was 'finetune' and is 'ewc' now"):
        cs.run(cs.settings.continual(parts[:2]), cs.methods.ewc(), training=TRAINING, out=out, resume=True)


def test_a_broken_checkpoint_is_refused(tmp_path, parts):
    """Both that are kept are broken; tests/test_folder.py has one that is."""
    out = tmp_path / "run"
    arguments = (cs.settings.continual(parts[:2]), cs.methods.finetune(), None, cs.Training(epochs=1))
    cs.run(*arguments, out=out)
    states = sorted((out / "checkpoint").glob("state-*.safetensors"))
    held = [state.read_bytes() for state in states]
    for state, data in zip(states, held, strict=True):
        state.write_bytes(data[: len(data) // 2])
    with pytest.raises(cs.ConsilienceError, match=r"the checkpoint at .* is damaged"):
        cs.run(*arguments, out=out, resume=True)
    for state, data in zip(states, held, strict=True):
        state.write_bytes(data)
    for index in (out / "checkpoint").glob("*.json"):
        index.write_text(index.read_text()[:40])
    with pytest.raises(cs.ConsilienceError, match=r"the checkpoint at .* is damaged"):
        cs.run(*arguments, out=out, resume=True)


def test_no_space_left_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch, parts):
    import consilience.core.params as params

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(params.os, "replace", full)
    with pytest.raises(cs.ConsilienceError, match="No space left on device"):
        cs.run(
            cs.settings.continual(parts[:2]),
            cs.methods.finetune(),
            training=cs.Training(epochs=1),
            out=tmp_path / "run",
        )
    assert not list((tmp_path / "run").rglob("*.part"))
    assert not list((tmp_path / "run").rglob("result.json"))


def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path, parts):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("epochs=3", "epochs=300"))
    out = tmp_path / "run"
    args = [sys.executable, str(script), str(out), "ewc", "fresh", "0"]
    p = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(600):
        if (out / "checkpoint" / "index.json").exists():
            break
        time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 1
    assert "Interrupted: interrupted; continue with" in err
    assert lines(out)[-1]["event"] == "checkpoint"


# bad input


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": cs.models.mlp(10, (8,), 10)}, "samples must fit the model's input, got (64,)"),
        ({"model": cs.models.mlp(64, (8,), 3)}, "an output for each of the 10 classes, got 3"),
        ({"repeats": 0}, "`repeats` must be an integer >= 1, got 0"),
        ({"engine": "seriel"}, "`engine` must be one of serial, batched, ray, auto, got 'seriel'"),
        ({"checkpoint_steps": 0}, "`checkpoint_steps` must be >= 1 or None, got 0"),
        ({"metric": "r2"}, "`metric` must be for targets of kind 'class', as those of 'digits/0-1' are, got"),
        ({"metric": ["nonsense"]}, "`metric` must be one of the catalogue's, got 'nonsense'"),
        (
            {"metric": 3},
            "a function of (predictions, targets), an object of torchmetrics, or a list of these, got 3",
        ),
        ({"metric": torch.nn.Linear}, "or a list of these, got a type"),
        ({"metric": []}, "`metric` must have at least one metric, got an empty list"),
        ({"metric": ["accuracy", "accuracy"]}, "metrics must have different names, got 'accuracy' twice"),
        ({"metric": ["accuracy", "mse"]}, "got 'mse'; use accuracy, auroc,"),
        (
            {"metric": {"clas": "accuracy"}},
            "one of the tasks and the kinds of targets, got 'clas'; nearest: class",
        ),
        ({"resume": True}, "`resume` needs the folder of a run, and None has none"),
        ({"metric": "acuracy"}, "got 'acuracy'; nearest: accuracy"),
        ({"method": []}, "got an empty list"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(parts, change, text):
    arguments = {"schedule": cs.settings.continual(parts[:2]), "method": cs.methods.finetune(), **change}
    with pytest.raises(cs.ConsilienceError) as e:
        cs.run(**arguments)
    assert text in str(e.value)
    assert "\n" not in str(e.value)


def test_divergence_is_named(parts):
    with pytest.raises(
        cs.ConsilienceError,
        match="the training loss of 'digits/0-1' is NaN or infinite in 'agent' on 'digits/0-1', at step",
    ):
        cs.run(cs.settings.continual(parts[:2]), cs.methods.finetune(), training=cs.Training(lr=1e38))


def test_a_long_step_for_a_penalty_is_capped_with_a_warning(parts):
    schedule = cs.settings.continual(parts)
    with pytest.warns(UserWarning, match="above 2 training diverges; .* entries are capped at 1"):
        result = cs.run(
            schedule, cs.methods.ewc(100.0), training=cs.Training(epochs=5, batch_size=64, lr=0.05), repeats=3
        )
    assert np.isfinite(result.matrices).all()
    assert all(bool(torch.isfinite(p).all()) for p in result.params.values())


def test_composition_refuses_what_disagrees():
    with pytest.raises(cs.ConsilienceError, match="each correction once, got EWC"):
        cs.methods.ewc() + cs.methods.ewc(1.0)
    with pytest.raises(cs.ConsilienceError, match="two values of `exchange_aggregator`"):
        cs.methods.ties() + cs.methods.average()


def test_importing_is_light():
    code = (
        "import sys, consilience as cs; cs.methods, cs.settings, cs.aggregators; "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split() == [
        "False",
        "False",
    ]


# what users do


def test_a_state_dict_is_an_expert_with_its_buffers(digits):
    sources = cs.data.iid(digits, 2)
    nets = []
    torch.manual_seed(0)
    base = torch.nn.Sequential(
        torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
    )
    for s in sources:
        net = torch.nn.Sequential(
            torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
        )
        net.load_state_dict(base.state_dict())
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        x, y = s.train.whole()
        for _ in range(60):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()
        nets.append(net.eval())
    model = cs.models.wrap(base)
    experts = [
        cs.Expert(f"e{i}", net.state_dict(), s) for i, (net, s) in enumerate(zip(nets, sources, strict=True))
    ]
    split = [
        cs.Expert(e.name, dict(n.named_parameters()), e.source, dict(n.named_buffers()))
        for e, n in zip(experts, nets, strict=True)
    ]
    x, _ = digits.test.whole()
    ends = []
    for given in (experts, split):
        result = cs.run(cs.settings.exmodel(given), cs.methods.average_ensemble(), model)
        want = torch.stack([net(x).softmax(1) for net in nets]).mean(0)
        assert torch.allclose(result.predict(x), want, atol=1e-5)
        ends.append(result.predict(x))
    assert torch.equal(*ends)
    merged = cs.run(cs.settings.merging(experts, base=base.state_dict()), cs.methods.task_arithmetic(), model)
    held = merged.agent.state.buffers["1.running_mean"]
    assert torch.allclose(
        held, torch.stack([n.state_dict()["1.running_mean"] for n in nets]).mean(0), atol=1e-6
    )
    for wrong, text in (
        (
            {n: t for n, t in experts[0].params.items() if "running" not in n},
            "'bad' has none called '1.running_mean'",
        ),
        ({**experts[0].params, "bogus": torch.zeros(3)}, "'bad' has 'bogus'"),
    ):
        with pytest.raises(cs.ConsilienceError, match=text):
            cs.run(
                cs.settings.exmodel([cs.Expert("bad", wrong, sources[0])]),
                cs.methods.average_ensemble(),
                model,
            )


def test_a_module_is_taken_as_it_is(parts):
    net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    a = cs.run(cs.settings.continual(parts[:2]), cs.methods.finetune(), net, cs.Training(epochs=1))
    b = cs.run(
        cs.settings.continual(parts[:2]), cs.methods.finetune(), cs.models.wrap(net), cs.Training(epochs=1)
    )
    assert same(a.params, b.params)
    net.load_state_dict(a.params)


@pytest.mark.filterwarnings("ignore:the metric is undefined")
def test_a_metric_that_is_undefined_somewhere_is_left_out(tmp_path):
    clients = cs.data.dirichlet(cs.data.breast_cancer(), 5, 0.1, seed=0, local_test=True)
    one = [s for s in clients if len(s.test.targets().unique()) == 1]
    assert one
    result = cs.run(
        cs.settings.federated(clients, rounds=2), cs.methods.fedavg(), metric="auroc", out=tmp_path / "run"
    )
    assert np.isnan(result.matrix).any()
    assert 0 < result.score <= 1
    for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda s: cs.settings.continual(s[0]), "sources must come in a list"),
        (lambda s: cs.settings.federated_continual(s[:2]), "sources must come in a list"),
        (lambda s: cs.settings.continual([(1, 2)]), "a source must be made by consilience.data"),
        (lambda s: cs.run(cs.settings.continual(s), "er"), "`method` must be a Method"),
        (
            lambda s: cs.run(cs.settings.continual(s), cs.methods.er),
            "`method` must be a Method",
        ),
        (
            lambda s: cs.run(cs.methods.er(), cs.settings.continual(s)),
            "`schedule` must be made by consilience.settings",
        ),
        (
            lambda s: cs.run(cs.settings.continual(s), cs.methods.er(), model="mlp"),
            "`model` must be one of",
        ),
        (
            lambda s: cs.run(cs.settings.continual(s), cs.methods.er(), training={"lr": 0.1}),
            "`training` must be a",
        ),
        (lambda s: cs.run(cs.settings.continual(s), cs.methods.er(), repeats=1.5), "`repeats` must be"),
        (lambda s: cs.run(cs.settings.continual(s), cs.methods.er(), seed="a"), "`seed` must be"),
        (
            lambda s: cs.run(cs.settings.continual(s), cs.methods.er(), checkpoint_seconds=-1),
            "`checkpoint_seconds` must be",
        ),
        (lambda s: cs.methods.er() + "ewc", "a method composes with a method"),
        (lambda s: cs.methods.aggregate("ties"), "`aggregator` must be made by consilience.aggregators"),
        (lambda s: cs.Training(optimiser=torch.optim.Adam), "`optimiser` must be sgd, adam, adamw"),
        (lambda s: cs.Training(lr="0.1"), "`lr` must be positive"),
        (lambda s: cs.settings.merging(experts=["a"]), "an expert must be Expert"),
        (
            lambda s: cs.run(
                cs.settings.continual([s[0], cs.data.arrays(torch.rand(30, 4), torch.arange(30) % 2)]),
                cs.methods.finetune(),
            ),
            "samples must fit the model's input, got (4,)",
        ),
    ],
)
def test_arguments_of_another_kind_are_one_line(parts, act, text):
    with pytest.raises(cs.ConsilienceError) as e:
        act(parts)
    assert text in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("engine", ["serial", "batched"])
def test_the_learning_rate_follows_its_schedule(schedule: str, engine: str) -> None:
    """Restated with torch's SGD and LambdaLR, on two clients of different sizes side by side."""
    import math

    pieces = zip(cs.data.iid(cs.data.digits(), 2), (96, 64), strict=True)
    parts = [replace(s, train=s.train.select(torch.arange(n))) for s, n in pieces]
    training = cs.Training(epochs=3, batch_size=32, lr=0.5, lr_schedule=schedule, precision="fp64")
    model, s, tune = cs.models.linear(64), parts[0], cs.methods.finetune()
    one, both = (
        cs.run(cs.settings.federated(parts, 1), cs.methods.fedavg(), model, training, engine=e).params
        for e in ("serial", engine)
    )
    assert all(torch.allclose(one[n], both[n], atol=1e-12) for n in one)
    got = cs.run(cs.settings.continual([s]), tune, model, training, engine=engine).params
    before = cs.run(cs.settings.continual([s]), tune, model, replace(training, epochs=0)).params
    net = torch.nn.Linear(64, 10).double()
    first = model.init(key(0, "init"))[0]
    before = cs.run(
        cs.settings.continual([s]), cs.methods.finetune(), model, replace(training, epochs=0)
    ).params
    assert before.keys() == first.keys()
    net.load_state_dict({"weight": before["1.weight"].double(), "bias": before["1.bias"].double()})
    optimiser = torch.optim.SGD(net.parameters(), 0.5)
    factor = {"linear": lambda i: 1 - i / 9, "cosine": lambda i: (1 + math.cos(math.pi * i / 9)) / 2}[
        schedule
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    for epoch in range(3):
        for index in torch.randperm(96, generator=key(0, s.name, 0, epoch, 0, "shuffle")).split(32):
            x, y = s.train.select(index).whole()
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x.double().flatten(1)), y).backward()
            optimiser.step()
            scheduler.step()
    assert torch.allclose(got["1.weight"].double(), net.weight, atol=1e-9)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("engine", ["serial", "batched"])
def test_entries_have_learning_rates_of_their_own(optimiser: str, engine: str) -> None:
    """Restated with torch's parameter groups, on one source; two clients side by side are the same on both
    engines."""
    rates = {"*.bias": 0.0, "3.*": 10.0, "*": 2.0}
    training = cs.Training(
        epochs=2,
        batch_size=32,
        lr=0.01,
        optimiser=optimiser,
        weight_decay=0.1,
        precision="fp64",
        lr_schedule="linear",
        rates=rates,
    )
    pieces = zip(cs.data.iid(cs.data.digits(), 2), (96, 64), strict=True)
    parts = [replace(s, train=s.train.select(torch.arange(n))) for s, n in pieces]
    model, s, tune = cs.models.mlp(64, (8,), 10), parts[0], cs.methods.finetune()
    one, both = (
        cs.run(cs.settings.federated(parts, 1), cs.methods.fedavg(), model, training, engine=e).params
        for e in ("serial", engine)
    )
    assert all(torch.allclose(one[n], both[n], atol=1e-12) for n in one)
    before = cs.run(cs.settings.continual([s]), tune, model, replace(training, epochs=0)).params
    got = cs.run(cs.settings.continual([s]), tune, model, training, engine=engine).params
    assert sorted(got) == ["1.bias", "1.weight", "3.bias", "3.weight"]
    leaves = {n: p.double().clone().requires_grad_() for n, p in before.items()}
    factor = {"1.bias": 0.0, "3.bias": 0.0, "3.weight": 10.0, "1.weight": 2.0}
    groups = [{"params": [p], "lr": 0.01 * factor[n]} for n, p in leaves.items()]
    torch_one = torch.optim.SGD if optimiser == "sgd" else torch.optim.AdamW
    theirs = torch_one(groups, lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda i: 1 - i / 6)
    for epoch in range(2):
        for index in torch.randperm(96, generator=key(0, s.name, 0, epoch, 0, "shuffle")).split(32):
            x, y = s.train.select(index).whole()
            h = torch.relu(x.double().flatten(1) @ leaves["1.weight"].T + leaves["1.bias"])
            theirs.zero_grad()
            torch.nn.functional.cross_entropy(h @ leaves["3.weight"].T + leaves["3.bias"], y).backward()
            theirs.step()
            schedule.step()
    assert all(torch.allclose(got[n], p, atol=1e-12) for n, p in leaves.items())


def test_a_penalty_is_capped_by_the_rate_of_each_entry() -> None:
    """A quarter of the lr and four times the rate are the same training, cap and warning of EWC included."""
    tasks = cs.data.permute(cs.data.digits(), 2)
    found = []
    for lr, rates in ((0.2, None), (0.05, {"*": 4.0})):
        training = cs.Training(epochs=1, lr=lr, rates=rates, precision="fp64")
        with pytest.warns(UserWarning, match=r"are capped at 1") as said:
            r = cs.run(
                cs.settings.continual(tasks, "domain"),
                cs.methods.ewc(strength=1e4),
                cs.models.linear(64),
                training,
            )
        found.append((r.params, [str(w.message) for w in said]))
    assert found[0][1] == found[1][1]
    assert all(torch.allclose(p, found[1][0][n], rtol=1e-9, atol=1e-12) for n, p in found[0][0].items())


@pytest.mark.parametrize(
    ("rates", "text"),
    [
        ({"head.*": 2.0}, "each pattern of `rates` must match a trained entry, got 'head.*'"),
        ({"*": -1.0}, "factors of `rates` must be >= 0 and finite, got -1.0 for '*'"),
        ({"*": "fast"}, "got 'fast'"),
    ],
)
def test_rates_that_mean_nothing_are_refused(rates: dict[str, float], text: str) -> None:
    with pytest.raises(cs.ConsilienceError, match=re.escape(text)):
        cs.run(
            cs.settings.continual([cs.data.digits()]),
            cs.methods.finetune(),
            training=cs.Training(rates=rates),
        )


# A result is whole.


class Tied(torch.nn.Module):
    """Batch norm, an encoder whose weight is the decoder's, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(64)
        self.first = torch.nn.Linear(64, 64)
        self.second = torch.nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = torch.nn.Linear(64, 10)
        self.register_buffer("factor", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return self.head(self.second(self.first(self.norm(x)).relu()).relu()) * self.factor


def normed():
    return torch.nn.Sequential(
        torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
    )


def weight_normed():
    norm = torch.nn.utils.parametrizations.weight_norm
    return torch.nn.Sequential(norm(torch.nn.Linear(64, 16)), torch.nn.ReLU(), torch.nn.Linear(16, 10))


@pytest.mark.parametrize("make", [normed, Tied, weight_normed])
def test_a_state_dict_of_a_result_is_whole(digits, make):
    clients = cs.data.iid(digits.map(x=lambda x: 5 * x + 3), 2)
    training = cs.Training(epochs=2, lr=0.1, batch_size=64)
    first = cs.run(cs.settings.federated(clients, 2), cs.methods.fedavg(), make(), training)
    x, y = clients[0].test.whole()
    net = make()
    for state in (first.params, first.state_dict()):
        assert list(state) == list(net.state_dict())
        net.load_state_dict(state)
        out = net.eval()(x)
        torch.testing.assert_close(out.softmax(1), first.predict(x))
    assert first.accuracy == pytest.approx((out.argmax(1) == y).double().mean().item())

    # A further run begins where the first ended, and an expert answers as the agent did.
    again = cs.run(
        cs.settings.federated(clients, 1, base=first.params), cs.methods.fedavg(), make(), training
    )
    assert again.matrix[0].tolist() == first.matrix[-1].tolist()
    expert = cs.Expert("e", net.state_dict(), clients[0])
    given = cs.run(cs.settings.merging(experts=[expert]), cs.methods.average(), make())
    torch.testing.assert_close(given.predict(x), first.predict(x))


def test_two_weights_where_a_model_has_one_are_refused(digits):
    state = Tied().state_dict()
    state["second.weight"] = state["second.weight"] + 1
    schedule = cs.settings.continual([digits], base=state)
    with pytest.raises(
        cs.ConsilienceError, match="'first.weight' and 'second.weight' are one entry of the model"
    ):
        cs.run(schedule, cs.methods.finetune(), Tied())
    # A file that keeps a tied weight once may have either name.
    state = Tied().state_dict()
    del state["first.weight"]
    result = cs.run(cs.settings.continual([digits], base=state), cs.methods.finetune(), Tied(), TRAINING)
    assert result.score > 0.8


def test_models_of_clients_are_in_the_result(digits):
    clients = cs.data.dirichlet(digits, 3, 0.3, local_test=True)
    for schedule, more in (
        (cs.settings.federated(clients, 2, personalise=True), {}),
        (cs.settings.federated(clients, 2), {"judge_clients": True}),
    ):
        result = cs.run(schedule, cs.methods.fedavg(), normed(), TRAINING, **more)
        for i, client in enumerate(clients):
            name, (x, y) = f"client-{i}", client.test.whole()
            net = normed()
            net.load_state_dict(result.state_dict(name))
            torch.testing.assert_close(net.eval()(x).softmax(1), result.predict(x, agent=name))
            right = (net(x).argmax(1) == y).double().mean().item()
            assert result.personal[name] == pytest.approx(right)
    with pytest.raises(
        cs.ConsilienceError, match="`agent` must be one of .*, got 'client-9'; nearest: client-"
    ):
        result.predict(x, agent="client-9")


@pytest.mark.parametrize(("patterns", "own"), [("head", "3."), ("1.*", "1.")])
def test_the_headline_of_a_personal_method_is_its_clients_own(digits, patterns, own):
    clients = cs.data.dirichlet(digits, 3, 0.3, local_test=True)
    schedule, method, start = cs.settings.federated(clients, 2), cs.methods.personal(patterns), normed()
    result = cs.run(schedule, method, start, TRAINING, repeats=2)
    server, net = result.state_dict(), normed()
    for i, client in enumerate(clients):
        # The server's parameters and buffers under the client's.
        state, (x, y) = result.state_dict(f"client-{i}"), client.test.whole()
        changed = {name for name, tensor in state.items() if not torch.equal(tensor, server[name])}
        assert changed and all(name.startswith(own) for name in changed)
        net.load_state_dict(state)
        right = (net.eval()(x).argmax(1) == y).double().mean().item()
        assert result.matrices[0, -1, i] == pytest.approx(right)

    # What else is judged changes no score. After personal training, each client answers with all its own.
    judged = cs.run(schedule, method, start, TRAINING, judge_clients=True)
    assert judged.matrices[0].tolist() == result.matrices[0].tolist()
    schedule = cs.settings.federated(clients, 2, personalise=True)
    result = cs.run(schedule, method, start, TRAINING)
    scores = [result.personal[f"client-{i}"] for i in range(3)]
    assert result.matrix[-1].tolist() == scores and result.score == pytest.approx(np.mean(scores))


def test_predictions_of_a_run_with_task_labels_ask_for_the_task(parts):
    result = cs.run(cs.settings.continual(parts[:2], "task"), cs.methods.finetune(), training=TRAINING)
    x = parts[0].test.whole()[0][:3]
    with pytest.warns(UserWarning, match=f"give `task`, one of {parts[0].name}, {parts[1].name}"):
        result.predict(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.predict(x, task=parts[0].name)


# Long runs: what a visit costs does not depend on how many there were before.


class Counted(Engine):
    """The serial engine; `at` has the number of Python calls so far, at the start of every Train phase.

    They are counted in phases 6 to 15 and from 55 on only, because counting is slow.
    """

    def __init__(self) -> None:
        self.calls, self.at = 0, []

    def train(self, visits, events, paused=None):
        counted = 6 <= len(self.at) < 16 or len(self.at) >= 55
        sys.setprofile(self.note if counted else None)
        self.at.append(self.calls)
        cs.engines.serial().train(visits, events, paused)

    def note(self, frame, event, arg):
        self.calls += event == "call"


def unjudged(schedule):
    """The schedule with its last evaluation alone."""

    def plan(seed):
        phases = list(schedule.plan(seed))
        return [phase for phase in phases[:-1] if not isinstance(phase, Evaluate)] + phases[-1:]

    return replace(schedule, plan=plan)


def small(count):
    draw = torch.Generator().manual_seed(0)
    rows = [(torch.randn(24, 4, generator=draw), torch.arange(24) % 2) for _ in range(count)]
    return [cs.data.arrays(x, y, name=f"s{i}", validation=0.0) for i, (x, y) in enumerate(rows)]


LONG = {
    "finetune": lambda: (cs.settings.continual(small(66), "domain"), cs.methods.finetune()),
    "er": lambda: (cs.settings.continual(small(66), "domain"), cs.methods.er(60, 8)),
    "er_ace": lambda: (cs.settings.continual(small(66), "domain"), cs.methods.er_ace(60, 8)),
    "fedavg": lambda: (cs.settings.federated(small(2), 66, scenario="domain"), cs.methods.fedavg()),
    "clients": lambda: (
        cs.settings.federated(small(132), 66, 2, order="cyclic", scenario="domain"),
        cs.methods.fedavg(),
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_the_sixtieth_visit_calls_as_many_functions_as_the_tenth(name):
    schedule, method = LONG[name]()
    engine = Counted()
    try:
        result = cs.run(
            unjudged(schedule), method, cs.models.mlp(4, (4,), 2), cs.Training(epochs=1), engine=engine
        )
    finally:
        sys.setprofile(None)

    # Phases differ a little: some make room in a buffer, and some costs are measured again.
    phases = np.diff(engine.at)
    assert len(phases) == 65
    assert phases[55:].mean() <= 1.1 * phases[6:16].mean()
    if name == "clients":
        # Nor does a request grow: a client asks for no weights of others.
        page = result.costs["by_agent"]
        assert page["client-130"]["received"] <= 1.02 * page["client-010"]["received"]


def test_a_buffer_forgets_sources_of_which_it_has_no_example_but_not_their_counts():
    sources = small(30)
    method = cs.methods.er_ace(5, 4)
    agent = cs.run(
        cs.settings.continual(sources, "domain"), method, cs.models.mlp(4, (4,), 2), cs.Training(epochs=1)
    ).agent
    held = agent.state.memory["ERACE"]
    assert sum(len(item.tensors["y"]) for name, item in held.items() if name != PAST) == 5
    assert len(held) <= 1 + 5 + 1

    # Of a source that comes again, its own examples are no earlier ones.
    (ace,) = method.corrections
    total = sum(len(source.train) for source in sources)
    assert ace.recall(agent.memory(ace), ()).seen == total
    assert ace.recall(agent.memory(ace), (sources[0],)).seen == total - len(sources[0].train)


# progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def quickly(**more):
    sources = cs.data.split_classes(cs.data.digits(), 2)
    training = cs.Training(epochs=1, batch_size=256)
    return cs.run(cs.settings.continual(sources), cs.methods.finetune(), training=training, **more)


def test_progress_is_a_bar_lines_or_nothing(monkeypatch, capsys):
    quickly()
    quickly(progress=False)
    assert capsys.readouterr().out == ""
    quickly(progress=True, repeats=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["finetune", f"{i}/4"] for i in range(1, 5)]

    # In a terminal a bar comes by itself; `False` is quiet there too.
    terminal, threads = Terminal(), threading.active_count()
    monkeypatch.setattr(sys, "stdout", terminal)
    quickly()
    assert "finetune, digits/5-6-7-8-9: 0." in terminal.getvalue() and "2/2" in terminal.getvalue()
    # The thread that draws ends at its next turn.
    for _ in range(100):
        if threading.active_count() == threads:
            break
        time.sleep(0.05)
    assert threading.active_count() == threads
    before = terminal.getvalue()
    quickly(progress=False)
    assert terminal.getvalue() == before
    with pytest.raises(cs.ConsilienceError, match="`progress` must be True, False or a function"):
        quickly(progress=3)


def test_a_sweep_has_a_bar_for_each_run_and_leaves_one_of_the_users_alone(monkeypatch):
    from rich.progress import Progress

    def both():
        sources = cs.data.split_classes(cs.data.digits(), 2)
        methods = {"one": cs.methods.finetune(), "two": cs.methods.ewc()}
        schedule, training = cs.settings.continual(sources), cs.Training(epochs=1, batch_size=256)
        return cs.sweep(schedule, methods, training=training)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    both()
    assert "one, digits" in terminal.getvalue() and "two, digits" in terminal.getvalue()

    # A terminal shows one live display at a time.
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Progress():
        assert list(both()) == ["one", "two"]


def test_a_notebook_gets_a_bar(monkeypatch):
    from consilience import progress

    class Shell:
        kernel = None

    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=Shell))
    assert progress.draws()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not progress.draws()


# spreads


def test_every_number_of_a_result_has_its_deviation_over_seeds():
    sources = cs.data.split_classes(cs.data.digits(), 5)
    schedule, training = cs.settings.continual(sources, "domain"), cs.Training(epochs=1)
    whole = cs.run(schedule, cs.methods.finetune(), training=training, repeats=3)
    alone = [cs.run(schedule, cs.methods.finetune(), training=training, seed=s) for s in range(3)]
    assert whole.deviation("score") == pytest.approx(whole.score_std)
    for name in ("forgetting", "backward_transfer", "stability", "plasticity", "average_incremental"):
        each = [result.figure(name) for result in alone]
        assert whole.deviation(name) == pytest.approx(np.std(each, ddof=1)) and np.std(each) > 0
        assert f"{name.replace('_', ' ')} {np.mean(each):.3f} +- {np.std(each, ddof=1):.3f}" in repr(whole)
        assert alone[0].deviation(name) is None
    assert "+-" not in repr(alone[0])
    assert whole.deviation("local_forgetting") is None
