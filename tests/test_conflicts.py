"""Statistics of conflicts between tasks: against cosines in plain torch, and what the log says of them."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import consilience as cs
from consilience.core.params import Layout
from restate import stopped
from test_balancing import FP64, Watch, data, net, ran, restated


def cosines(epochs: int = 3) -> torch.Tensor:
    """The cosines [steps, m, m] of plain training, by `test_balancing.restated`."""
    seen = []

    def weigh(losses, flat, clock):
        seen.append(F.cosine_similarity(flat.unsqueeze(1), flat.unsqueeze(0), dim=2))
        return torch.ones(3).double() / 3

    restated(weigh, epochs)
    return torch.stack(seen)


def test_statistics_are_those_of_the_gradients_of_every_step() -> None:
    said = ran(cs.methods.conflicts(points=3)).visits[0]
    assert said["sources"] == ["a", "b", "c"] and said["agent"] == "agent"
    found, wanted = said["Conflicts"], cosines()
    steps = len(wanted) // 3
    pairs = list(itertools.combinations(range(3), 2))
    for i, j in pairs:
        own, each = found["pairs"][f"{'abc'[i]} | {'abc'[j]}"], wanted[:, i, j]
        assert own["cosine"] == pytest.approx(float(each.mean()), abs=1e-10)
        assert own["negative"] == pytest.approx(float((each < 0).double().mean()))
    every = torch.stack([wanted[:, i, j] for i, j in pairs], 1)
    assert found["cosine"] == pytest.approx(float(every.mean())) and 0 < found["negative"] < 1
    # Over training: each third of the visit is one epoch here.
    for point, own in enumerate(found["points"]):
        part = every[point * steps : (point + 1) * steps]
        assert own["cosine"] == pytest.approx(float(part.mean())), point


@pytest.mark.parametrize("name", ["pcgrad", "mgda", "gradvac"])
def test_noting_conflicts_changes_no_bit_of_training(name: str) -> None:
    """The Gramian is the aggregator's; a stateful one has its own."""
    method = getattr(cs.methods, name)()
    plain, noted = ran(method), ran(method + cs.methods.conflicts(layers=True))
    for entry, p in plain.params.items():
        assert torch.equal(p, noted.params[entry]), entry
    assert not plain.visits
    assert noted.visits[0]["Conflicts"]["cosine"] is not None


def test_the_gramian_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from consilience.loop import step

    calls, products = [], step.inner_products
    monkeypatch.setattr(step, "inner_products", lambda *given: calls.append(1) or products(*given))
    result = cs.run(
        cs.settings.multitask(data(), scenario="task"),
        cs.methods.pcgrad() + cs.methods.conflicts(),
        net(),
        cs.Training(epochs=1, sampler=Watch(), **FP64),
    )
    assert len(calls) == result.costs["steps"] > 1


def test_layers_have_statistics_of_their_own() -> None:
    model = cs.models.multi_head(cs.models.wrap(net, headless=False), outputs=9)
    training = cs.Training(epochs=1, lr=0.1, sampler=Watch(), precision="fp64", batch_size=100)
    result = cs.run(
        cs.settings.multitask(data(), scenario="task"), cs.methods.conflicts(1, layers=True), model, training
    )
    found = result.visits[0]["Conflicts"]
    # Heads are no conflict; one layer is shared, so that it says what all shared entries say.
    assert list(found["layers"]) == ["trunk.0"]
    assert found["layers"]["trunk.0"]["cosine"] == pytest.approx(found["cosine"])


def test_a_pair_counts_where_both_tasks_have_a_gradient() -> None:
    correction = cs.corrections.Conflicts(points=1)
    theta = torch.zeros(2).double()
    ctx = cs.Context(start=theta, layout=Layout.of({"w": theta}), parts=("a", "b", "c"))
    ctx.trace = correction.trace_init(ctx)
    for index, gram in enumerate((torch.tensor([[4.0, -1, 0], [-1, 1, 0], [0, 0, 0]]), torch.eye(3))):
        step = SimpleNamespace(grams={"w": gram}, clock=(0, index))
        step.horizon = (1, 2)
        ctx.trace = correction.trace(step, ctx, theta, theta)
    found = correction.figures(ctx)["pairs"]
    assert found["a | b"] == {"cosine": -0.25, "negative": 0.5}
    assert found["b | c"] == {"cosine": 0.0, "negative": 0.0}
    # It is one pair in one step.
    assert float(ctx.trace["count"][0, 0, 1, 2]) == 1


def test_the_log_and_trackers_have_them_and_a_resumed_run_the_same(tmp_path) -> None:
    order = Watch()

    def go(**more):
        training = cs.Training(epochs=2, lr=0.1, sampler=order, **FP64)
        schedule = cs.settings.multitask(data(), scenario="task", rounds=2)
        return cs.run(schedule, cs.methods.conflicts(2), net(), training, **more)

    scalars: dict[str, float] = {}
    whole = go(out=tmp_path / "whole", trackers=[lambda found, step: scalars.update(found)])
    assert len(whole.visits) == 2 and whole.visits[1]["stage"] == 2
    # Each visit begins again.
    assert whole.visits[0]["Conflicts"] != whole.visits[1]["Conflicts"]
    last = whole.visits[1]["Conflicts"]
    assert scalars["train/Conflicts/cosine"] == last["cosine"]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["figures"]["Conflicts"] for line in lines if line["event"] == "visit"] == [
        visit["Conflicts"] for visit in whole.visits
    ]
    assert list(cs.report.load(tmp_path / "whole").visits) == list(whole.visits)

    stopped(go, tmp_path / "half", 11)
    again = go(out=tmp_path / "half", resume=True)
    assert list(again.visits) == list(whole.visits)


def test_conflicts_need_several_tasks() -> None:
    with pytest.raises(cs.Refusal, match="a step has one here; use multitask"):
        cs.run(cs.settings.continual(data(), "task"), cs.methods.conflicts(), net())
