"""Training that leaves the finite numbers is named, and the last good state is kept."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import consilience as cs
from consilience.core.params import load

DIGITS = cs.data.split_classes(cs.data.digits(), 5)[:2]
VALUES = cs.data.iid(cs.data.diabetes(), 3)


def small(source: cs.Source, count: int = 96, scale: float = 1.0) -> cs.Source:
    x, y = source.train.select(torch.arange(min(count, len(source.train)))).whole()
    return replace(source, train=type(source.train)(x * scale, y))


def regress(lr: float, epochs: int = 60, **options):
    schedule = cs.settings.continual(VALUES)
    model, training = cs.models.linear(10, 1), cs.Training(epochs=epochs, lr=lr)
    return cs.run(schedule, cs.methods.finetune(), model, training, **options)


def test_the_last_good_state_is_kept(tmp_path):
    """No checkpoint holds a number that is not finite, and training stops soon."""
    seen = []

    def watch(line):
        if line["event"] == "checkpoint":
            index = json.loads((tmp_path / "checkpoint" / "index.json").read_text())
            tensors = load(tmp_path / "checkpoint" / index["file"])[0]
            assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
            seen.append(line["steps"])

    with pytest.raises(
        cs.ConsilienceError, match=r"in 'agent' on 'diabetes/client-0', at step \d+ of 240; try"
    ) as e:
        regress(20.0, out=tmp_path, checkpoint_steps=1, progress=watch)
    assert "a lower `lr` (now 20), `clip_norm=1`" in str(e.value)
    steps = int(str(e.value).split("at step ")[1].split()[0])
    assert seen == [*range(1, steps)] or seen == [0, *range(1, steps)]
    # Without checkpoints it is looked at every 20 steps, and the same step is named.
    with pytest.raises(cs.ConsilienceError) as e:
        regress(20.0)
    assert int(str(e.value).split("at step ")[1].split()[0]) == steps


def test_a_client_whose_buffers_overflow_is_left_out_where_that_is_allowed():
    """Its inputs are finite and so are its parameters, but not the variances of batch norm."""
    clients = [small(part, 64) for part in cs.data.iid(cs.data.digits(), 4)]
    bad = [clients[0], small(clients[1], 64, 1e25), *clients[2:]]

    def go(data, **options):
        layers = torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 10)
        torch.manual_seed(0)
        schedule = cs.settings.federated(data, rounds=2, **options)
        return cs.run(
            schedule, cs.methods.fedavg(), torch.nn.Sequential(*layers), cs.Training(epochs=1, lr=0.05)
        )

    named = "training diverged: the buffer '1.running_var' is NaN or infinite in 'client-1'"
    with pytest.raises(cs.ConsilienceError, match=named):
        go(bad)
    with pytest.warns(UserWarning, match=f"'client-1' failed and is left out: {named}"):
        result = go(bad, min_clients=3)
    without = go([clients[0], *clients[2:]])
    assert all(torch.isfinite(t).all() for t in result.agent.state.buffers.values())
    assert result.score > 0.5 * without.score


def test_an_infinite_buffer_of_the_model_is_no_divergence():
    """Masks of attention are -inf from the start."""

    class Net(torch.nn.Linear):
        def __init__(self):
            super().__init__(64, 10)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

        def forward(self, x):
            return super().forward(x) + self.mask.softmax(1).sum() * 0

    result = cs.run(
        cs.settings.continual([small(DIGITS[0])]), cs.methods.finetune(), Net(), cs.Training(epochs=1)
    )
    assert np.isfinite(result.score)


def test_statistics_that_overflow_are_named():
    """The gradients are finite, and their squares, which EWC adds, are not."""
    wild = [small(part, 32, 1e21) for part in DIGITS]
    training = cs.Training(epochs=1, lr=1e-38)
    with pytest.raises(cs.ConsilienceError, match="training diverged: the statistic of EWC, '.*' is NaN"):
        cs.run(cs.settings.continual(wild), cs.methods.ewc(), cs.models.linear(64, 10), training)


def test_finite_divergence_is_warned_about_once():
    """Each step multiplies the error of a linear model, and the numbers are still finite at the end."""
    with pytest.warns(UserWarning, match="diverged on .*though its numbers are finite: the training"):
        regress(1.65, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regress(0.05, epochs=2)


def test_a_class_at_chance_after_a_loss_that_grew_is_warned_about():
    """One huge step kills all units, and the outputs are the same for every input from then on."""
    with pytest.warns(UserWarning, match="though its numbers are finite"):
        result = cs.run(
            cs.settings.continual([small(DIGITS[0])]),
            cs.methods.finetune(),
            cs.models.mlp(64, (8,), 10),
            cs.Training(epochs=2, lr=1000.0),
        )
    assert result.score < 0.75


@pytest.mark.parametrize("give", [np.float32, torch.tensor, lambda value: np.array([value])])
def test_a_metric_of_ones_own_may_give_any_kind_of_number(tmp_path, give):
    metric = cs.metrics.own(lambda p, y: give(0.5), higher=True)
    result = regress(0.05, epochs=1, out=tmp_path, metric=metric)
    assert json.loads((tmp_path / "result.json").read_text())["matrix"] == result.matrix.tolist()
    assert result.score == 0.5


def test_a_score_of_minus_infinity_ends_in_a_result(tmp_path):
    """r2 of finite parameters may be -inf, and JSON has no infinity."""
    metric = cs.metrics.own(lambda p, y: -np.inf, higher=True)
    with pytest.warns(UserWarning, match="the metric is undefined on"):
        regress(0.05, epochs=1, out=tmp_path, metric=[metric, "r2"])
    found = cs.Result.load(tmp_path)
    assert np.isnan(found.matrices).all()
    assert np.isfinite(found.of_metric("r2").score)
    text = (tmp_path / "result.json").read_text() + (tmp_path / "log.jsonl").read_text()
    assert "Infinity" not in text
