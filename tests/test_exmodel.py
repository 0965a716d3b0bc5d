"""Ex-model distillation: one model learns from a stream of experts of any kind, without their data."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from consilience import testing
from consilience.consolidators.ex_model import Asked, ExModelDistillation, Samples
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Message, Weights
from consilience.core.params import key
from consilience.core.schedule import Evaluate, Exchange, Train, build
from consilience.core.source import Tensors
from consilience.core.state import State
from consilience.core.synthetic import Maker, Wanted
from consilience.core.teacher import Teacher
from consilience.core.tree import Tree, as_input, unnamed
from consilience.loop.agent import Agent
from consilience.loop.ledger import Ledger

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


@pytest.mark.parametrize("normalise", ["mean", "samples"])
def test_three_experts_are_restated_in_plain_torch(normalise):
    """The loop of Algorithm 1 over the memory that the run kept, in float64."""
    nets, start = [linear(i + 1) for i in range(3)], linear(9)
    options = {"normalise": normalise, "weight_ce": 0.3, "steps": 6, "lr": 0.02, "batch_size": 16}
    schedule = cs.settings.exmodel(given(*nets))
    states = spied(schedule, cs.models.wrap(start), **options)

    params = {n: p.detach().double() for n, p in start.named_parameters()}
    seen: list[int] = []
    for i, (net, (state, orders)) in enumerate(zip(nets, states, strict=True)):
        x, y = state.outer["x"], state.outer["y"]
        own = list(SOURCES[i].classes)
        old = F.linear(x, params["weight"], params["bias"])
        new = F.linear(x, net.weight.double(), net.bias.double()).detach()
        if normalise == "samples":
            new[:, own] -= new[:, own].mean(1, keepdim=True)
            new = (new - new.mean(0)) / new.std(0, correction=0)
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        adam = torch.optim.Adam([leaves[n] for n in sorted(leaves)], lr=0.02)
        for order in orders:
            loss = torch.zeros((), dtype=torch.float64)
            for j in order.tolist():
                columns, logits = (own, new[j]) if int(y[j]) in own else (seen, old[j])
                target = logits[columns]
                if normalise == "mean":
                    target = target - target.mean()
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


def test_targets_over_samples_ignore_scale_and_offset_of_experts():
    """An expert that is surer of all teaches as others do."""
    net, data = linear(1), cs.memory.auxiliary(torch.randn(90, D, generator=key("normal")), "random")
    surer = linear(1)
    with torch.no_grad():
        surer.weight.mul_(3)
        surer.bias.mul_(3).add_(7)
    found = [
        final(
            cs.settings.exmodel(given(one, linear(2))),
            cs.models.wrap(linear(9)),
            normalise="samples",
            targets="both",
            weight_ce=0.0,
            maker=data,
            steps=20,
        ).params
        for one in (net, surer)
    ]
    near(*found, 1e-6)


# memory


@pytest.mark.parametrize("size", [60, 59, 7])
def test_the_memory_has_the_sizes_of_eq_5_and_balanced_classes(size):
    sources = [*SOURCES, dataclasses.replace(SOURCES[0], name="again", task="again")]
    schedule = cs.settings.exmodel(given(*[linear(i) for i in range(4)], sources=sources))
    even = {"maker": Noise(), "size": size, "steps": 2}
    for i, (state, _) in enumerate(spied(schedule, cs.models.wrap(linear(8)), **even), 1):
        expert, y = state.outer["expert"].tolist(), state.outer["y"]
        assert len(expert) == size and Counter(expert)[i - 1] == size // i
        assert len(state.outer["arrived"]) == i
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


def test_the_new_samples_are_spread_over_the_classes_of_the_expert():
    asked_for: list[Wanted] = []
    state = final(
        cs.settings.exmodel(given(linear(1), sources=[joint()])), cs.models.wrap(linear(8)), size=16
    )
    assert Counter(state.outer["y"].tolist()).total() == 16
    with watching(Noise, asked_for):
        schedule = cs.settings.exmodel(given(linear(1), sources=[joint()]))
        final(schedule, cs.models.wrap(linear(8)), size=16, maker=Noise())
    (wanted,) = asked_for
    assert dict(wanted.counts) == {0: 3, 1: 3, 2: 3, 3: 3, 4: 2, 5: 2}
    assert (wanted.shape, wanted.dtype) == ((D,), torch.float64)
    assert wanted.student is not None
    assert torch.equal(wanted.student.params["weight"], linear(8).weight.detach().double())


@contextmanager
def watching(kind: type[Maker], found: list[Wanted]) -> Iterator[None]:
    """Note what makers are asked for."""
    make = kind.make

    def noting(self: Any, teacher: Teacher, wanted: Wanted, generator: torch.Generator) -> Any:
        found.append(wanted)
        return make(self, teacher, wanted, generator)

    with testing.replaced(kind, "make", noting):
        yield


def test_old_samples_stay_of_every_expert_that_shares_a_class():
    """New instances: all experts have both classes, and each keeps its share."""
    parts = [dataclasses.replace(SOURCES[0], name=f"s{i}") for i in range(4)]
    schedule = cs.settings.exmodel(given(*map(linear, range(4)), sources=parts), scenario="domain")
    state = final(schedule, cs.models.wrap(linear(8)), maker=Noise(), size=64, steps=1)
    groups = Counter(zip(state.outer["expert"].tolist(), state.outer["y"].tolist(), strict=True))
    assert set(groups) == {(i, c) for i in range(4) for c in range(2)}
    assert set(groups.values()) == {8}


def test_experts_that_come_together_share_the_memory():
    schedule = cs.settings.merging(given(*map(linear, range(3))))
    state = final(schedule, cs.models.wrap(linear(8)), maker=Noise(), size=62)
    assert Counter(state.outer["expert"].tolist()) == {0: 20, 1: 20, 2: 20}
    assert len(state.outer["arrived"]) == 3 and bool(state.outer["seen"].all())


def test_experts_of_the_same_classes_leave_an_ex_model_that_agrees():
    """Eq. 9 where all classes overlap: the mean of what the expert and the ex-model answer."""
    net = linear(1)
    parts = [dataclasses.replace(joint(), name=f"s{i}", task=f"s{i}") for i in range(2)]
    schedule = cs.settings.exmodel(given(net, net, sources=parts))
    options = {"normalise": None, "weight_ce": 0.0, "steps": 30, "lr": 0.1}
    state = final(schedule, cs.models.wrap(net), **options)
    assert torch.equal(state.params["weight"], net.weight.detach().double())
    # Another first expert: the ex-model ends between the two.
    schedule = cs.settings.exmodel(given(linear(2), net, sources=parts))
    data = cs.memory.auxiliary(torch.randn(90, D, generator=key("normal")), "random")
    options |= {"maker": data, "optimiser": "sgd", "steps": 300, "lr": 0.2, "batch_size": 60}
    state = final(schedule, cs.models.wrap(linear(3)), **options)
    middle = (linear(2).weight + net.weight).detach().double() / 2
    assert torch.allclose(state.params["weight"], middle, atol=1e-4)


def test_real_samples_are_those_of_the_source_with_their_classes():
    sources = [dataclasses.replace(source, task=f"t{i}") for i, source in enumerate(SOURCES)]
    schedule = cs.settings.exmodel(given(*map(linear, range(3)), sources=sources))
    state = final(schedule, cs.models.wrap(linear(8)), maker=cs.memory.real(sources), size=30)
    for i, source in enumerate(SOURCES):
        mine = state.outer["expert"] == i
        x, y = source.train.whole()
        rows = {tuple(row): int(c) for row, c in zip(x.double().tolist(), y, strict=True)}
        found = state.outer["x"][mine].tolist()
        assert [rows[tuple(row)] for row in found] == state.outer["y"][mine].tolist()
        assert len(found) == 10 and len({tuple(row) for row in found}) == 10
    with pytest.raises(Refusal, match=r"there is none for 'e0' \('t0'\)"):
        cs.run(schedule, method(maker=cs.memory.real(SOURCES)), cs.models.wrap(linear(8)), FP64)
    with pytest.raises(Refusal, match=r"'e0' needs 61 examples, and its source has 60"):
        cs.run(schedule, method(maker=cs.memory.real(sources), size=61), cs.models.wrap(linear(8)), FP64)
    with pytest.raises(ConsilienceError, match="got several for 't0'"):
        cs.memory.real([sources[0], sources[0]])


def test_auxiliary_samples_are_the_most_certain_of_each_class():
    net, x = linear(1), DATA.double()
    schedule = cs.settings.exmodel(given(net, sources=SOURCES))
    state = final(schedule, cs.models.wrap(linear(8)), maker=maker("confident"), size=40, steps=1)
    logits = F.linear(x, net.weight.double(), net.bias.double())[:, :2].detach()
    for c in (0, 1):
        own = logits.argmax(1) == c
        order = (logits[own, c] - logits[own, 1 - c]).argsort(descending=True)
        best = {tuple(row) for row in x[own][order[: min(20, int(own.sum()))]].tolist()}
        assert best <= {tuple(row) for row in state.outer["x"][state.outer["y"] == c].tolist()}
    assert cs.memory.auxiliary(DATA) == cs.memory.auxiliary(DATA.clone()) != cs.memory.auxiliary(DATA + 1)


# constraints: no data, one expert at a time


def test_the_consolidator_never_reads_data():
    """What the training examples are changes nothing, and to read them while it receives would fail."""
    other = [
        dataclasses.replace(s, train=Tensors(torch.rand_like(s.train.whole()[0]), s.train.whole()[1]))
        for s in SOURCES
    ]

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the consolidator reads data")

    whole = ExModelDistillation.receive

    def blind(self: Any, *args: Any) -> Any:
        with ExitStack() as stack:
            for verb in ("whole", "batches", "chunks", "select", "first", "targets", "content"):
                stack.enter_context(testing.replaced(Tensors, verb, refused))
            return whole(self, *args)

    states = []
    for sources in (SOURCES, other):
        with testing.replaced(ExModelDistillation, "receive", blind):
            schedule = cs.settings.exmodel(given(*map(linear, range(3)), sources=sources))
            states.append(final(schedule, cs.models.wrap(linear(8))))
    near(dict(states[0].params), dict(states[1].params), 0)
    near(dict(states[0].outer), dict(states[1].outer), 0)


@pytest.mark.parametrize("setting", [cs.settings.exmodel, cs.settings.merging])
@pytest.mark.parametrize("own", [False, True])
def test_no_two_experts_are_held_at_a_time(setting, own):
    alive: weakref.WeakSet[Teacher] = weakref.WeakSet()
    most: list[int] = []
    begin, make, targets = Teacher.__init__, Noise.make, ExModelDistillation.targets_of

    def born(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        begin(self, name, *args, **kwargs)
        # The ex-model, whom makers may ask, is no expert.
        if name != "ex-model":
            alive.add(self)

    def count(function: Any) -> Any:
        def counted(*args: Any) -> Any:
            found = function(*args)
            most.append(len(alive))
            return found

        return counted

    with (
        testing.replaced(Teacher, "__init__", born),
        testing.replaced(Noise, "make", count(make)),
        testing.replaced(ExModelDistillation, "targets_of", count(targets)),
        testing.replaced(ExModelDistillation, "receive", count(ExModelDistillation.receive)),
    ):
        nets = [linear(i, 2 if own else C) for i in range(3)]
        final(setting(given(*nets, own=own)), cs.models.wrap(linear(8)), maker=Noise())
    assert max(most) == 1 and most[-1] == 0


def test_experts_are_freed_once_they_have_sent():
    result = testing.quiet(
        testing.SETTINGS["exmodel"](), method(), testing.plain_model(), FP64, progress=lambda line: None
    )
    assert result.agent.state.bank == {}
    whole, held = ExModelDistillation.release, []

    def noting(self: Any, state: Any, personal: Any) -> Any:
        held.append(whole(self, state, personal))
        return held[-1]

    with testing.replaced(ExModelDistillation, "release", noting):
        testing.quiet(testing.SETTINGS["exmodel"](), method(), testing.plain_model(), FP64)
    assert len(held) == 3 and not any(state.params or state.base for state in held)


# interruption


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize("place", ["maker", "steps"])
@pytest.mark.parametrize("own", [False, True])
def test_killed_while_it_receives_and_resumed_to_the_same_bits(place, own, tmp_path):
    from consilience.consolidators import ex_model

    def run(**more: Any) -> Any:
        nets = [frozen_net(i) for i in range(3)] if own else [linear(i) for i in range(3)]
        schedule = cs.settings.exmodel(given(*nets, own=own))
        part = method(maker=cs.memory.inversion(steps=5), weight_ce=0.5)
        return testing.quiet(
            schedule, part, cs.models.mlp(D, (9,), C) if own else cs.models.wrap(linear(8)), FP64, **more
        )

    whole = run()
    make, descend = type(cs.memory.inversion()).make, ex_model.descend
    calls: list[int] = []

    def killed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            found = function(*args)
            calls.append(1)
            if len(calls) == 2:
                raise Killed
            return found

        return call

    target = (
        (type(cs.memory.inversion()), "make", make) if place == "maker" else (ex_model, "descend", descend)
    )
    with testing.replaced(target[0], target[1], killed(target[2])), pytest.raises(Killed):
        run(out=tmp_path, checkpoint_seconds=1e-9)
    again = run(out=tmp_path, resume=True)
    assert testing.state_bits(testing.state_of(again)) == testing.state_bits(testing.state_of(whole))
    assert (again.matrices == whole.matrices).all()


def frozen_net(seed: int) -> nn.Module:
    """A network with batch norm and a frozen layer of its own."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    net[0].weight.requires_grad_(False)
    return net


def test_another_model_of_an_expert_is_another_run(tmp_path):
    def run(net: nn.Module, **more: Any) -> Any:
        state = {"0.weight": torch.ones(2, D), "0.bias": torch.zeros(2)}
        expert = cs.Expert("e", state, SOURCES[0], model=cs.models.wrap(net, outputs=2))
        schedule = cs.settings.exmodel([expert])
        return testing.quiet(schedule, method(), cs.models.linear(D, C), FP64, out=tmp_path, **more)

    run(nn.Sequential(nn.Linear(D, 2)))
    run(nn.Sequential(nn.Linear(D, 2)), resume=True)
    with pytest.raises(ConsilienceError, match="experts"):
        run(Squashed(nn.Linear(D, 2)), resume=True)


class Squashed(nn.Sequential):
    """Layers, and tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


# students of other kinds


def test_a_student_with_batch_norm_trains_with_its_buffers():
    """The last batch, which would have one sample, is joined to the one before it."""
    schedule = cs.settings.exmodel(given(linear(1, 2), linear(2, 2), own=True))
    state = final(schedule, cs.models.wrap(conv(C)), size=33, batch_size=16, steps=5)
    assert int(state.buffers["2.num_batches_tracked"]) == 2 * 5
    assert float((state.buffers["2.running_var"] - 1).abs().max()) > 1e-3
    with pytest.raises(Refusal, match="`batch_size` is 1"):
        final(schedule, cs.models.wrap(conv(C)), batch_size=1)


def test_a_student_with_dropout_is_keyed_and_leaves_the_random_state():
    schedule = cs.settings.exmodel(given(linear(1, 2), linear(2, 2), own=True))

    def dropping() -> Any:
        torch.manual_seed(0)
        return cs.models.wrap(nn.Sequential(nn.Linear(D, 9), nn.Dropout(0.5), nn.Linear(9, C)))

    found = []
    for seed in (1, 2):
        model = dropping()
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        found.append(final(schedule, model))
        assert torch.equal(torch.random.get_rng_state(), before)
    near(dict(found[0].params), dict(found[1].params), 0)


def test_frozen_entries_of_the_student_stay():
    net = linear(8)
    net.bias.requires_grad_(False)
    twins = [linear(1), linear(2)]
    for twin in twins:
        twin.bias.data.copy_(net.bias.data)
    state = final(cs.settings.exmodel(given(*twins)), cs.models.wrap(net))
    assert torch.equal(state.params["bias"], net.bias.double())
    assert not torch.equal(state.params["weight"], net.weight.detach().double())


def test_views_are_the_same_for_teacher_and_student():
    """Both see the same view, so that a linear teacher is still recovered; equal runs have equal bits."""
    teacher = linear(1)
    schedule = cs.settings.exmodel(given(teacher, sources=[joint()]))
    options = {"normalise": None, "weight_ce": 0.0, "optimiser": "sgd", "lr": 0.1, "batch_size": 30}
    options |= {"augment": cs.data.augment.noise(1.0), "steps": 150}
    state = final(schedule, cs.models.wrap(linear(2)), **options)
    near(dict(state.params), {n: p.detach().double() for n, p in teacher.named_parameters()}, 1e-2)

    options |= {"steps": 3}
    runs = [final(schedule, cs.models.wrap(linear(2)), **options) for _ in range(2)]
    near(dict(runs[0].params), dict(runs[1].params), 0)
    plain = final(schedule, cs.models.wrap(linear(2)), **(options | {"augment": None}))
    assert not torch.equal(plain.params["weight"], runs[0].params["weight"])


# tasks with labels


def test_with_task_labels_a_target_has_the_columns_of_its_task():
    part = ExModelDistillation(maker(), normalise=None, targets="both")
    former, expert = asked(OLD, [0, 1], 2, 0), asked(NEW, [2, 3], 2, 1)
    target, units = part.targets_of([former, expert], samples([1, 3, 2], [0, 1, 1]))
    assert units.tolist() == [[True, True, False, False]] + [[False, False, True, True]] * 2
    assert target.tolist() == [[1, 2, 0, 0], [0, 0, 2, 8], [0, 0, 4, 0]]


def test_heads_of_tasks_learn_their_experts():
    """Each head answers as the expert of its task does, and a head is trained by its own samples alone."""
    nets = [linear(i + 1, 2) for i in range(3)]
    model = cs.models.multi_head(cs.models.mlp(D, (24,), C), C)
    schedule = cs.settings.exmodel(given(*nets, own=True), scenario="task")
    state = final(schedule, model, size=60, steps=100, lr=0.03, weight_ce=0.0, batch_size=30)
    assert state.outer["task"].tolist() == state.outer["expert"].tolist()
    assert state.outer["seen"].tolist() == [[c // 2 == t for c in range(C)] for t in range(3)]
    for i, (net, source) in enumerate(zip(nets, SOURCES, strict=True)):
        x = state.outer["x"][state.outer["task"] == i]
        out = model(state.params, state.buffers, x, source.name, False)[0][:, list(source.classes)]
        logits = F.linear(x, net.weight.double(), net.bias.double()).detach()
        target = logits - logits.mean(1, keepdim=True)
        assert float((out - target).square().mean()) < 0.1 * float(target.square().mean())


def test_heads_come_with_experts_that_were_trained_with_heads():
    """The trunk is shared, and a head for each task is drawn when its expert comes."""
    model = cs.models.multi_head(testing.plain_model(), C)
    schedule = cs.settings.exmodel(sources=SOURCES, scenario="task")
    found = spied(schedule, model)
    for i, (state, _) in enumerate(found, 1):
        heads = {model.task_of(name) for name in state.params} - {None}
        assert heads == {source.name for source in SOURCES[:i]}
    assert found[-1][0].buffers[f"heads.{SOURCES[2].name}.columns"].tolist() == [4, 5]


def test_one_expert_per_task_where_tasks_have_labels():
    def plan(seed: int) -> Any:
        yield Train({"a": (SOURCES[0].name, SOURCES[1].name)})
        yield Exchange({"learner": ("a",)})
        yield Evaluate("end")

    schedule = build("own", SOURCES, "task", plan, "learner")
    for scenario in ("task", "class"):
        named = dataclasses.replace(schedule, scenario=scenario)
        with pytest.raises(Refusal, match="each expert must have one task"):
            cs.run(named, method(), cs.models.multi_head(testing.plain_model(), C), FP64)
    state = final(dataclasses.replace(schedule, scenario="class"), testing.plain_model())
    assert set(state.outer["y"].tolist()) <= {0, 1, 2, 3}


# trees, tokens and tables


class Bag(nn.Module):
    """The mean embedding of tokens that are there, and a linear layer."""

    def __init__(self, outputs: int, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, width), nn.Linear(width, outputs)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask.unsqueeze(-1).to(self.embed.weight)
        return self.head((self.embed(ids) * weight).sum(1) / weight.sum(1).clamp_min(1))


def sentences(count: int, seed: int) -> Any:
    """Token ids of unequal lengths, with their mask."""
    generator = key("sentences", seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    ids = [torch.randint(20, (n,), generator=generator).tolist() for n in lengths]
    return as_input({"ids": ids, "mask": [[1] * n for n in lengths]})


def test_tokens_of_unequal_lengths_with_auxiliary_data():
    sources, nets = [], []
    for i in range(2):
        y = torch.tensor([2 * i, 2 * i + 1] * 10)
        parts = [Tensors(sentences(20, 3 * i + j), y) for j in range(3)]
        sources.append(cs.Source(f"s{i}", *parts, SOURCES[0].labels[:4], (2 * i, 2 * i + 1)))
        torch.manual_seed(i)
        nets.append(Bag(2))
    schedule = cs.settings.exmodel(given(*nets, sources=sources, own=True))
    for other in (cs.memory.auxiliary(sentences(80, 99), "random"), cs.memory.real(sources)):
        check_tokens(schedule, other, nets[1])


def check_tokens(schedule: Any, other: Maker, net: Any) -> None:
    """The student answers as the second expert does, on the samples that were made of it."""
    torch.manual_seed(7)
    student = cs.models.wrap(Bag(4, 12))
    state = final(schedule, student, maker=other, size=20, steps=150, lr=0.03, weight_ce=0.0)
    x, mine = unnamed("x", state.outer), state.outer["expert"] == 1
    assert isinstance(x, Tree) and len(x) == 20
    out = student(state.params, state.buffers, x[mine], None, False)[0][:, 2:]
    logits = copy.deepcopy(net).double()(**x[mine].parts).detach()
    target = logits - logits.mean(1, keepdim=True)
    assert float((out - target).square().mean()) < 0.1 * float(target.square().mean())


def test_tables_with_auxiliary_rows():
    rows = {"age": list(range(40)), "city": ["Rome", "Oslo"] * 20, "sick": ["no", "no", "yes", "yes"] * 10}
    source = cs.data.table(rows, "sick", validation=0.2, test=rows)
    x = source.train.whole()[0]
    net = nn.Linear(x.shape[1], 2)
    schedule = cs.settings.exmodel(given(net, sources=[source], own=True))
    near_x = cs.memory.auxiliary(x + 0.1 * torch.randn(x.shape, generator=key("rows")), "random")
    model = cs.models.mlp(x.shape[1], (8,), 2)
    result = testing.quiet(schedule, method(maker=near_x, size=20, steps=100), model, FP64)
    with torch.no_grad():
        answers = net(x.float()).argmax(1)
    assert float((result.predict(x).argmax(1) == answers).float().mean()) > 0.9


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
    with pytest.raises(Refusal, match="all entries of the model are frozen"):
        cs.run(schedule, method(), cs.models.frozen(cs.models.linear(D, C)), FP64)
    with pytest.raises(Refusal, match="Inversion needs inputs that are real numbers"):
        whole = [s.map(x=lambda x: (9 * x).long()) for s in SOURCES[:2]]
        part = method(maker=cs.memory.inversion())
        schedule = cs.settings.exmodel(given(linear(1), linear(2), sources=whole))
        cs.run(
            schedule,
            part,
            cs.models.wrap(lambda: nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(16, C))),
            FP64,
        )


def test_messages_that_are_not_the_expert_of_the_schedule_are_refused():
    agent, message = learner_and_message()
    agent.receive([message])
    assert len(agent.state.outer["arrived"]) == 1

    for change, rule in (
        ({"sender": "stranger"}, "nothing is of 'stranger'"),
        (
            {"items": {"model": Weights({"params/weight": torch.zeros(C, D).double()})}},
            "got none in the model",
        ),
        (
            {"items": {"model": Weights({**message.items["model"].tensors, "params/bias": torch.zeros(2)})}},
            r"'bias' \(6,\) too, got \(2,\)",
        ),
    ):
        agent, message = learner_and_message()
        with pytest.raises(ConsilienceError, match=rule):
            agent.receive([dataclasses.replace(message, digest="", **change)])
        assert not agent.state.outer


def learner_and_message() -> tuple[Agent, Message]:
    schedule, model = cs.settings.exmodel(given(linear(1))), cs.models.wrap(linear(8))
    resolved = method().resolve(schedule.survey())
    params = {n: p.double() for n, p in model.init(key(0))[0].items()}
    state = State(params, {}, params, "origin")
    agent = Agent("learner", model, resolved, schedule, FP64, 0, state, Ledger())
    sent = {f"params/{n}": p.detach().double() for n, p in linear(1).named_parameters()}
    return agent, Message("e0", "", 1, 1, "origin", "base", {"model": Weights(sent)})


def test_a_broadcast_is_adopted():
    agent, message = learner_and_message()
    agent.receive([dataclasses.replace(message, trained=False)])
    near(dict(agent.state.params), {n: p.detach().double() for n, p in linear(1).named_parameters()}, 0)
    assert not agent.state.outer


@pytest.mark.parametrize("sources", [3, int, [], ["a"]])
def test_real_data_are_sources(sources: Any) -> None:
    with pytest.raises(cs.ConsilienceError, match="`sources` must be those that the experts were trained on"):
        cs.memory.real(sources)
