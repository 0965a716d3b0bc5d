"""Shares of tasks in a step, and accumulation per task: plans and steps against restatements."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from consilience.data.samplers import Mixed
from restate import stopped

SIZES = {"a": 8, "b": 24, "c": 64}
INF = float("inf")


def sources() -> list[cs.Source]:
    """Three tasks of unequal sizes; the first input numbers the examples."""
    g = torch.Generator().manual_seed(0)
    found = []
    for i, (name, count) in enumerate(SIZES.items()):
        x = torch.randn(count, 4, generator=g)
        x[:, 0] = torch.arange(count) / 100
        y = (x[:, 1] + x[:, 1 + i % 3] > 0).long()
        own = cs.data.arrays(x, y, test=(x, y), classes=["no", "yes"], name=name, validation=0, space=name)
        found.append(own.map(task=name))
    return found


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 6)


class Seen(cs.Correction):
    """Notes the batches of every step: sizes, numbers of examples, weights."""

    def losses(self, losses: dict[int, Tensor], step: cs.StepView, ctx: cs.Context) -> dict[int, Tensor]:
        NOTED.append([(p.source, (p.x[:, 0] * 100).round().long().tolist(), p.weight) for p in step.parts])
        return losses


NOTED: list[list[tuple[str, list[int], float | None]]] = []


def ran(sampler=None, method=None, tasks=None, **training):
    NOTED.clear()
    given = {"epochs": 1, "batch_size": 4, "lr": 0.1, "precision": "fp64", "sampler": sampler, **training}
    method = (method or cs.methods.finetune()) + cs.Method("seen", (Seen(),))
    return cs.run(cs.settings.multitask(tasks or sources(), "task"), method, net(), cs.Training(**given))


def drawn(name: str) -> list[int]:
    """The numbers of the examples of a task, in the order of the run."""
    return [number for step in NOTED for source, numbers, _ in step if source == name for number in numbers]


def test_a_mixture_at_temperature_one_is_proportional_to_the_bit() -> None:
    ran(Mixed(1.0))
    # An epoch has as many examples as all tasks: 96 examples, 12 in a step of three batches of 4.
    assert len(NOTED) == 8
    for name, count in SIZES.items():
        assert sorted(drawn(name)) == list(range(count)), name
    for step in NOTED:
        assert [len(numbers) for _, numbers, _ in step] == [1, 3, 8]
        assert [weight for *_, weight in step] == pytest.approx([8 / 96, 24 / 96, 64 / 96])
    shares = Mixed(1.0).shares([*SIZES.values()], 0.0)
    assert torch.equal(torch.tensor(shares), torch.tensor([8 / 96, 24 / 96, 64 / 96]))


def test_an_infinite_temperature_gives_equal_shares_and_the_default_weights() -> None:
    ran(Mixed(INF))
    assert len(NOTED) == 8
    for step in NOTED:
        assert [len(numbers) for _, numbers, _ in step] == [4, 4, 4]
        assert [weight for *_, weight in step] == [None] * 3
    # The smaller ones come again, in whole passes.
    first = drawn("a")
    assert len(first) == 32 and all(sorted(first[i : i + 8]) == list(range(8)) for i in range(0, 32, 8))
    # At 1e9 it is the same, to rounding.
    shares = Mixed(1e9).shares([*SIZES.values()], 0.0)
    assert shares == pytest.approx([1 / 3] * 3, abs=1e-8)


@pytest.mark.parametrize("temperature", [2.0, 5.0])
def test_shares_at_a_temperature(temperature: float) -> None:
    p = torch.tensor([float(n) for n in SIZES.values()]).double() ** (1 / temperature)
    p = p / p.sum()
    ran(Mixed(temperature), epochs=2)
    assert len(NOTED) == 16
    for i, name in enumerate(SIZES):
        assert len(drawn(name)) == 2 * round(96 * float(p[i]))
    assert [weight for *_, weight in NOTED[0]] == pytest.approx(p.tolist())


def test_annealing_goes_from_equal_to_proportional() -> None:
    tasks = sources()
    ran(Mixed(INF, final=1.0), tasks=tasks, epochs=3)
    each = [[weight for *_, weight in NOTED[8 * epoch]] for epoch in range(3)]
    n = torch.tensor([8.0, 24.0, 64.0]).double()
    assert each[0] == [None] * 3 and each[2] == pytest.approx((n / n.sum()).tolist())
    assert each[1] == pytest.approx((n**0.5 / (n**0.5).sum()).tolist())
    # Over rounds it does not begin again.
    schedule = cs.settings.multitask(tasks, "task", rounds=3)
    NOTED.clear()
    training = cs.Training(epochs=1, batch_size=4, lr=0.1, sampler=Mixed(INF, final=1.0))
    cs.run(schedule, cs.Method("seen", (Seen(),)), net(), training)
    again = [[weight for *_, weight in NOTED[8 * epoch]] for epoch in range(3)]
    assert again[0] == each[0] and again[1] == pytest.approx(each[1]) and again[2] == pytest.approx(each[2])


def test_a_step_weighs_losses_by_shares() -> None:
    tasks, plain = sources(), net().double()
    result = ran(Mixed(2.0, within=cs.data.samplers.InOrder()), tasks=tasks, batch_size=40)
    (step,) = NOTED
    total = torch.zeros(()).double()
    for i, (s, (_, numbers, weight)) in enumerate(zip(tasks, step, strict=True)):
        x, y = s.train.whole()
        own = plain(x[numbers].double())[:, 2 * i : 2 * i + 2]
        total = total + weight * F.cross_entropy(own, y[numbers])
    grads = torch.autograd.grad(total, list(plain.parameters()))
    for (name, p), grad in zip(plain.named_parameters(), grads, strict=True):
        assert (result.params[name] - (p - 0.1 * grad)).abs().max() < 1e-12


def test_rehearsal_next_to_shares_keeps_its_weight() -> None:
    from consilience.core.batch import Batch
    from consilience.loop.job import weighed

    x = torch.zeros(1, 1)
    own, added = [Batch(x, x), Batch(x, x)], [Batch(x, x), Batch(x, x, weight=0.0)]
    found = [part.weight for part in weighed(own, added, [0.25, 0.75])]
    assert found == pytest.approx([0.25 * 2 / 3, 0.75 * 2 / 3, 1 / 3, 0.0])
    assert weighed(own, added, [0.5, 0.5]) == own + added


def test_accumulation_of_one_task_is_a_larger_batch_of_it() -> None:
    tasks = sources()
    order = cs.data.samplers.InOrder()
    result = ran(order, tasks=tasks, accumulate={"c": 4})
    # An epoch is the most steps that a task needs: 24 examples of b, 4 each, are 6; c has 64, 16 each.
    assert result.costs["steps"] == 6
    plain = net().double()
    for number in range(6):
        total = torch.zeros(()).double()
        for i, (s, batch) in enumerate(zip(tasks, (4, 4, 16), strict=True)):
            x, y = s.train.whole()
            at = (torch.arange(batch) + number * batch) % len(y)
            total = total + F.cross_entropy(plain(x[at].double())[:, 2 * i : 2 * i + 2], y[at]) / 3
        grads = torch.autograd.grad(total, list(plain.parameters()))
        with torch.no_grad():
            for p, grad in zip(plain.parameters(), grads, strict=True):
                p -= 0.1 * grad
    for name, p in plain.named_parameters():
        assert (result.params[name] - p).abs().max() < 1e-12


def test_an_interrupted_mixture_goes_on_at_the_same_bits(tmp_path) -> None:
    def go(**more):
        training = cs.Training(epochs=2, batch_size=4, lr=0.1, sampler=Mixed(5.0, final=1.0))
        schedule = cs.settings.multitask(sources(), "task")
        return cs.run(schedule, cs.methods.pcgrad(), net(), training, **more)

    whole = go()
    stopped(go, tmp_path, 11)
    again = go(out=tmp_path, resume=True)
    for name, p in whole.params.items():
        assert torch.equal(p, again.params[name])


def test_what_would_have_no_effect_is_refused() -> None:
    with pytest.raises(cs.ConsilienceError, match="`temperature` must be > 0, got 0"):
        Mixed(0)
    with pytest.raises(cs.ConsilienceError, match="of one task by itself, got Mixed"):
        Mixed(within=Mixed())
    with pytest.raises(cs.Refusal, match="Mixed gives the tasks of a step their shares, and a step has one"):
        cs.run(
            cs.settings.continual(sources(), "task"),
            cs.methods.finetune(),
            net(),
            cs.Training(sampler=Mixed()),
        )
    with pytest.raises(cs.ConsilienceError, match="no source of `accumulate` is called 'd'|'d'"):
        ran(accumulate={"d": 2})
    with pytest.raises(cs.ConsilienceError, match="`accumulate` must be a whole number >= 1, got 0"):
        cs.Training(accumulate={"c": 0})
