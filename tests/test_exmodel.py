"""Ex-model distillation: one model learns from a stream of experts of any kind, without their data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from consilience import testing
from consilience.consolidators.ex_model import Asked, ExModelDistillation, Samples
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.params import key
from consilience.core.synthetic import Maker, Wanted
from consilience.core.teacher import Teacher

SOURCES = testing.sources()
D, C = testing.INPUTS, testing.CLASSES
DATA = torch.rand(300, D, generator=torch.Generator().manual_seed(3))
FP64 = cs.Training(epochs=1, batch_size=16, lr=0.2, precision="fp64")


def maker(choose: Any = "random") -> Any:
    return cs.memory.auxiliary(DATA, choose)


def method(**options: Any) -> cs.Method:
    """Distillation with few steps; the options are those of the class."""
    options = {"maker": maker(), "size": 60, "steps": 10, "lr": 0.01, **options}
    return cs.Method("exm", consolidator=ExModelDistillation(**options))


def linear(seed: int, outputs: int = C) -> nn.Linear:
    net = nn.Linear(D, outputs)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=key(seed, tuple(p.shape))))
    return net


def given(*nets: nn.Module, sources: Any = SOURCES, own: bool = False) -> list[cs.Expert]:
    """Experts of networks, with the model of the run or with their own."""
    return [
        cs.Expert(f"e{i}", net.state_dict(), source, model=net if own else None)
        for i, (net, source) in enumerate(zip(nets, sources, strict=False))
    ]


def final(schedule: Any, model: Any, training: Any = FP64, **options: Any) -> Any:
    return testing.quiet(schedule, method(**options), model, training).agent.state


def near(a: Any, b: Any, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance), name


# what is learned


def joint() -> cs.Source:
    """All classes in one source."""
    whole = cs.Source.union("all", SOURCES)
    return dataclasses.replace(whole, classes=tuple(range(C)))


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("training", [FP64, testing.TRAINING])
def test_an_ex_model_that_answers_as_its_first_expert_does_stays(optimiser, training):
    """Distilling a model into itself changes nothing; only the memory is filled."""
    net = linear(1)
    schedule = cs.settings.exmodel(given(net, sources=[joint()]))
    options = {"normalise": None, "weight_ce": 0.0, "optimiser": optimiser, "steps": 50, "lr": 0.1}
    state = final(schedule, cs.models.wrap(net), training, **options)
    assert all(torch.equal(state.params[n], p.to(state.params[n].dtype)) for n, p in net.named_parameters())
    assert len(state.outer["y"]) == 60
    # With the cross-entropy, or with centred targets, there is something to learn.
    for more in ({"weight_ce": 1.0}, {"normalise": "mean"}):
        moved = final(schedule, cs.models.wrap(net), training, **(options | more)).params["weight"]
        assert float((moved - net.weight.detach()).abs().max()) > 1e-3


@pytest.mark.parametrize("normalise", [None, "mean"])
def test_a_linear_teacher_is_recovered_by_a_linear_student(normalise):
    teacher = linear(1)
    schedule = cs.settings.exmodel(given(teacher, sources=[joint()]))
    # Of zero mean, so that the steps converge fast.
    data = cs.memory.auxiliary(torch.randn(90, D, generator=key("normal")), "random")
    options = {"normalise": normalise, "weight_ce": 0.0, "optimiser": "sgd", "steps": 300, "maker": data}
    state = final(schedule, cs.models.wrap(linear(2)), **options, lr=0.2, batch_size=60)
    wanted = {name: p.detach().double() for name, p in teacher.named_parameters()}
    if normalise:
        wanted = {name: p - p.mean(0, keepdim=True) for name, p in wanted.items()}
    near(dict(state.params), wanted, 1e-4)


def test_three_experts_are_restated_in_plain_torch():
    """The loop of Algorithm 1 over the memory that the run kept, in float64."""
    nets, start = [linear(i + 1) for i in range(3)], linear(9)
    options = {"normalise": "mean", "weight_ce": 0.3, "steps": 12, "lr": 0.02, "batch_size": 16}
    schedule = cs.settings.exmodel(given(*nets))
    states = spied(schedule, cs.models.wrap(start), **options)

    params = {n: p.detach().double() for n, p in start.named_parameters()}
    seen: list[int] = []
    for i, (net, (state, orders)) in enumerate(zip(nets, states, strict=True)):
        x, y = state.outer["x"], state.outer["y"]
        own = list(SOURCES[i].classes)
        old = F.linear(x, params["weight"], params["bias"])
        new = F.linear(x, net.weight.double(), net.bias.double()).detach()
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        adam = torch.optim.Adam([leaves[n] for n in sorted(leaves)], lr=0.02)
        for order in orders:
            loss = torch.zeros((), dtype=torch.float64)
            for j in order.tolist():
                columns, logits = (own, new[j]) if int(y[j]) in own else (seen, old[j])
                target = logits[columns] - logits[columns].mean()
                out = F.linear(x[j], leaves["weight"], leaves["bias"])
                among = sorted({*seen, *own})
                loss = loss + (out[columns] - target).square().sum()
                loss = loss + 0.3 * (out[among].logsumexp(0) - out[y[j]])
            adam.zero_grad()
            (loss / len(order)).backward()
            adam.step()
        params = {n: p.detach() for n, p in leaves.items()}
        seen += own
        near(dict(state.params), params, 1e-9)


def spied(schedule: Any, model: Any, **options: Any) -> list[tuple[Any, list[Tensor]]]:
    """The state after each expert, and the batches of its steps."""
    from consilience.consolidators import _distil, ex_model

    found: list[tuple[Any, list[Tensor]]] = []
    orders: list[Tensor] = []
    whole, descend = ExModelDistillation.receive, _distil.descend

    def watched(loss: Any, *rest: Any) -> Tensor:
        def noting(params: Any, batch: Tensor, step: int) -> Tensor:
            orders.append(batch)
            return loss(params, batch, step)

        return descend(noting, *rest)

    def receive(self: Any, *args: Any) -> Any:
        orders.clear()
        state = whole(self, *args)
        found.append((state, list(orders)))
        return state

    with (
        testing.replaced(ExModelDistillation, "receive", receive),
        testing.replaced(ex_model, "descend", watched),
    ):
        final(schedule, model, **options)
    return found


# targets


def asked(logits: Tensor, classes: list[int], tasks: int = 1, task: int = 0) -> Asked:
    """One who answers every sample with the row of its number."""
    knows = torch.zeros(tasks, logits.shape[1], dtype=torch.bool)
    knows[task, classes] = True
    return Asked(lambda x, task: logits[x[:, 0].long()], knows)


def samples(y: list[int], task: list[int] | None = None) -> Samples:
    number = torch.arange(len(y))
    zeros = torch.zeros(len(y), dtype=torch.long)
    return Samples(
        number.double()[:, None], torch.tensor(y), zeros, zeros if task is None else torch.tensor(task)
    )


OLD = torch.tensor([[1.0, 2.0, 6.0, 50.0], [4.0, 2.0, 0.0, 50.0], [0.0, 3.0, 9.0, 50.0]]).double()
NEW = torch.tensor([[70.0, 70.0, 1.0, 5.0], [70.0, 70.0, 2.0, 8.0], [70.0, 70.0, 4.0, 0.0]]).double()


def test_a_target_has_the_units_of_the_teacher_that_knows_the_class():
    """Eq. 9: the former ex-model knows 0, 1, 2, the expert 2, 3; y = 2 is known to both."""
    part = ExModelDistillation(maker(), normalise=None)
    target, units = part.targets_of([asked(OLD, [0, 1, 2]), asked(NEW, [2, 3])], samples([1, 3, 2]))
    assert units.tolist() == [[True, True, True, False], [False, False, True, True], [True] * 4]
    assert target.tolist() == [[1, 2, 6, 0], [0, 0, 2, 8], [0, 3, (9 + 4) / 2, 0]]


def test_targets_of_both_have_the_units_of_both_teachers():
    part = ExModelDistillation(maker(), normalise="mean", targets="both")
    target, units = part.targets_of([asked(OLD, [0, 1]), asked(NEW, [2, 3])], samples([1, 3, 2]))
    assert bool(units.all())
    assert target.tolist() == [[-0.5, 0.5, -2, 2], [1, -1, -3, 3], [-1.5, 1.5, 2, -2]]


def test_identical_teachers_of_the_same_classes_are_the_target():
    for name in ("document", "both"):
        part = ExModelDistillation(maker(), normalise=None, targets=name)
        target, units = part.targets_of([asked(OLD, [0, 1, 2, 3])] * 2, samples([0, 1, 3]))
        assert torch.equal(target, OLD) and bool(units.all())


@pytest.mark.parametrize("normalise", ["mean", "standard"])
def test_normalised_targets_ignore_an_offset(normalise):
    part = ExModelDistillation(maker(), normalise=normalise)
    plain, shifted = (
        part.targets_of([asked(logits, [0, 1, 2])], samples([0, 1, 2]))[0] for logits in (OLD, OLD + 7)
    )
    assert torch.allclose(plain, shifted, atol=1e-12)
    assert torch.allclose(plain.sum(1), torch.zeros(3).double(), atol=1e-12)
    scaled = part.targets_of([asked(3 * OLD, [0, 1, 2])], samples([0, 1, 2]))[0]
    assert torch.allclose(scaled, plain if normalise == "standard" else 3 * plain, atol=1e-12)


# memory


@pytest.mark.parametrize("size", [60, 59, 7])
def test_the_memory_has_the_sizes_of_eq_5_and_balanced_classes(size):
    sources = [*SOURCES, dataclasses.replace(SOURCES[0], name="again", task="again")]
    schedule = cs.settings.exmodel(given(*[linear(i) for i in range(4)], sources=sources))
    even = {"maker": Noise(), "size": size, "steps": 2}
    for i, (state, _) in enumerate(spied(schedule, cs.models.wrap(linear(8)), **even), 1):
        expert, y = state.outer["expert"].tolist(), state.outer["y"]
        assert len(expert) == size and Counter(expert)[i - 1] == size // i
        assert int(state.outer["count"]) == i
        new = Counter(y[state.outer["expert"] == i - 1].tolist()).values()
        old = Counter(y[state.outer["expert"] < i - 1].tolist()).values()
        assert max(new) - min(new) <= 1
        assert not old or max(old) - min(old) <= 1


@dataclasses.dataclass(frozen=True)
class Noise(Maker):
    """Random samples, as many of each class as are wanted."""

    def make(self, teacher: Teacher, wanted: Wanted, generator: torch.Generator) -> Any:
        assert wanted.shape is not None
        x = torch.rand(wanted.total, *wanted.shape, generator=generator, dtype=wanted.dtype)
        return x, torch.cat([torch.full((n,), c) for c, n in wanted.counts.items()])


# experts of other kinds


def conv(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, D)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(18, outputs)
    )


def test_experts_may_have_other_architectures_and_outputs():
    """The student answers as they do on the samples, over the classes of each."""
    torch.manual_seed(0)
    nets = [linear(1, 2), conv(2), nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, C))]
    for setting in (cs.settings.exmodel, cs.settings.merging):
        experts = given(*nets, own=True)
        options = {"weight_ce": 0.0, "steps": 150, "lr": 0.03, "size": 90}
        state = final(setting(experts), cs.models.mlp(D, (32,), C), **options)
        model, x = cs.models.mlp(D, (32,), C), state.outer["x"]
        out = model(state.params, state.buffers, x, None, False)[0]
        for i, (net, source) in enumerate(zip(nets, SOURCES, strict=True)):
            mine, own = state.outer["expert"] == i, list(source.classes)
            assert bool(torch.isin(state.outer["y"][mine], torch.tensor(own)).all())
            logits = net.double().eval()(x[mine]).detach()
            logits = logits if logits.shape[1] == 2 else logits[:, own]
            target = logits - logits.mean(1, keepdim=True)
            error = (out[mine][:, own] - target).square().mean()
            assert float(error) < 0.1 * float(target.square().mean()), (setting, i)
            net.float()


def test_an_own_model_is_refused_by_name_where_entries_are_combined():
    schedule = cs.settings.merging(given(linear(1, 2), linear(2, 2), own=True))
    for other in (cs.methods.average(), cs.methods.average_ensemble(), cs.methods.opcm()):
        with pytest.raises(Refusal, match=r"the expert 'e0' has its own; use exmodel_distillation"):
            cs.run(schedule, other, cs.models.linear(D, C), FP64)


def test_an_own_model_must_fit():
    with pytest.raises(ConsilienceError, match=r"as many as its model's outputs, got 6 and 3 in 'e0'"):
        cs.settings.exmodel(given(linear(1, 3), own=True))
    expert = cs.Expert("e", linear(1, 2).state_dict(), SOURCES[0], labels=SOURCES[0].labels[1:3])
    with pytest.raises(ConsilienceError, match=r"got none for \('tiny', '0'\) in 'e'"):
        cs.settings.exmodel([dataclasses.replace(expert, model=linear(1, 2))]).survey()
    wide = cs.settings.exmodel(given(nn.Linear(D + 1, 2), own=True))
    with pytest.raises(ConsilienceError, match=r"the expert 'e0': samples must fit the model's input"):
        cs.run(wide, method(maker=Noise()), cs.models.linear(D, C), FP64)
    with pytest.raises(ConsilienceError, match="the model of the expert 'e' cannot be used"):
        cs.settings.exmodel([dataclasses.replace(expert, model=nn.Flatten())])


def test_experts_with_logits_that_are_not_finite_are_refused_by_name():
    bad = nn.Sequential(nn.Linear(D, 2), nn.Softplus(), Logarithm())
    with torch.no_grad():
        bad[0].bias.fill_(-1000.0)
    model = cs.models.wrap(bad, outputs=2)
    expert = cs.Expert("broken", bad.state_dict(), SOURCES[0], model=model)
    with pytest.raises(ConsilienceError, match="NaN or infinity from 'broken'"):
        final(cs.settings.exmodel([expert]), cs.models.linear(D, C))


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def test_refusals():
    with pytest.raises(ConsilienceError, match="`maker` must make samples"):
        ExModelDistillation(maker=None)
    with pytest.raises(ConsilienceError, match="must be of inputs alone"):
        method(augment=cs.data.augment.joint(lambda x, y: (x, y)))
    for setting in ("continual (class)", "federated", "skill"):
        with pytest.raises(Refusal, match="it learns from experts"):
            cs.run(testing.SETTINGS[setting](), method(), cs.models.linear(D, C), FP64)
    schedule = cs.settings.exmodel(given(linear(1), linear(2)))
    with pytest.raises(Refusal, match="2 experts come to a `size` of 1"):
        cs.run(schedule, method(size=1), cs.models.linear(D, C), FP64)
    with pytest.raises(Refusal, match="needs 301 samples of the auxiliary data, and there are 300"):
        cs.run(schedule, method(size=301), cs.models.linear(D, C), FP64)
    with pytest.raises(Refusal, match=r"auxiliary data must fit the model, got samples \(9,\)"):
        wide = cs.memory.auxiliary(torch.rand(60, D + 1))
        cs.run(schedule, method(maker=wide), cs.models.linear(D, C), FP64)
    with pytest.raises(Refusal, match="without the personal entries"):
        cs.run(schedule, method() + cs.Method("p", personal=("head",)), cs.models.linear(D, C), FP64)
