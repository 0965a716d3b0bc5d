"""How a source is trained on, against torch.optim, its learning-rate schedulers, clip_grad_norm_, GradScaler
and plain loops."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError
from consilience.core.optimiser import SGD, Adam, Torch
from consilience.core.params import same
from consilience.core.schedule import Evaluate, Exchange, Train
from consilience.core.source import Tensors
from consilience.core.state import encode_state
from consilience.core.training import Place
from consilience.core.weight_space import WeightSpace
from consilience.corrections.solved import SolvedHead
from consilience.loop.checks import in_precision
from restate import (
    A,
    B,
    batches,
    entries,
    final,
    fit,
    mlp,
    near,
    phases,
    plain,
    source,
    stopped,
    training,
)

ENGINES = pytest.mark.parametrize("engine", ["serial", "batched"])


def go(sources=(A,), method=None, model=None, engine="serial", **more):
    schedule = cs.settings.continual(list(sources), "domain")
    return cs.run(schedule, method or cs.methods.finetune(), model or mlp(), training(**more), engine=engine)


def two_clients(engine, method=None, rounds=2, **more):
    """Two clients of unequal size side by side, so that the batched engine stacks them."""
    schedule = cs.settings.federated([A, B], rounds)
    notes = []
    r = cs.run(
        schedule,
        method or cs.methods.fedavg(),
        mlp(),
        training(**more),
        engine=engine,
        progress=lambda line: notes.append(line.get("note", "")),
    )
    return r, notes


def same_on_both_engines(expect="batched", **more):
    one, _ = two_clients("serial", **more)
    both, notes = two_clients("batched", **more)
    assert any(note.startswith(expect) for note in notes), notes
    near(both.params, one.params, 1e-12)


# The learning rate

TOTAL = 8  # steps of two epochs over A


def torch_rates(make, steps=TOTAL):
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler, found = make(optimiser), []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return found


def rise_then(curve, rise):
    lr = torch.optim.lr_scheduler

    def make(optimiser):
        up = lr.LinearLR(optimiser, 1 / rise, 1.0, rise - 1)
        return lr.SequentialLR(optimiser, [up, curve(optimiser)], milestones=[rise])

    return make


CURVES = {
    "cosine": lambda left: lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, left),
    "linear": lambda left: lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, left),
    "constant": lambda left: lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0, left),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("warmup", "rise"), [(3, 3), (0.25, 2), (0.26, 3)])
def test_warmup_and_curve_are_torchs(curve, warmup, rise):
    ours = training(lr_schedule=curve, warmup=warmup)
    found = [ours.rate((i // 4, i % 4), (2, 4)) for i in range(TOTAL)]
    assert found == pytest.approx(torch_rates(rise_then(CURVES[curve](TOTAL - rise), rise)), abs=1e-15)


def test_a_function_of_t_is_a_schedule():
    steps = {"lr_schedule": lambda t: 0.1 if t >= 0.5 else 1.0}
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [4], 0.1))
    assert [training(**steps).rate((0, i), (1, 8)) for i in range(8)] == pytest.approx(expected, abs=1e-15)
    poly = torch_rates(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 8, 2.0))
    ours = training(lr_schedule=lambda t: (1 - t) ** 2)
    assert [ours.rate((0, i), (1, 8)) for i in range(8)] == pytest.approx(poly, abs=1e-15)


def rated(visits, rate):
    """Plain loops over visits (source, earlier visits), each with the learning rate `rate(visit, step)`."""
    net = plain()
    for index, (s, visit) in enumerate(visits):
        optimiser = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
        for step, (*_, x, y) in enumerate(batches(s, visit)):
            optimiser.param_groups[0]["lr"] = rate(index, step)
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimiser.step()
    return entries(net)


AT = {  # t at step i of visits to a, b, a, which have 8, 6 and 8 steps
    "visit": lambda v, i: i / (8, 6, 8)[v],
    "source": lambda v, i: (i / 16, i / 6, (8 + i) / 16)[v],
    "run": lambda v, i: (i / 24, (6 + i) / 18, (16 + i) / 24)[v],
    "rounds": lambda v, i: v / 3,
}


@pytest.mark.parametrize("over", AT)
@pytest.mark.parametrize("curve", ["cosine", "function"])
def test_a_schedule_runs_over_what_it_names(over, curve):
    factor = {"cosine": lambda t: (1 + math.cos(math.pi * t)) / 2, "function": lambda t: 0.3**t}[curve]
    plan = []
    for name in ("a", "b", "a"):
        plan += [Train({"agent": (name,)}), Exchange({"agent": ("agent",)}), Evaluate(name)]
    given = factor if curve == "function" else curve
    found = final(phases([A, B], plan), cs.methods.finetune(), lr_schedule=given, lr_over=over)
    near(found, rated([(A, 0), (B, 0), (A, 1)], lambda v, i: 0.05 * factor(AT[over](v, i))))


def test_warmup_counts_the_steps_or_rounds_of_its_span():
    run = training(warmup=10, lr_over="run")
    second = Place(visit=1, visits=3, round=1, rounds=3)
    assert [run.rate((0, i), (2, 4), second) for i in (0, 1, 2)] == pytest.approx([0.045, 0.05, 0.05])
    rounds = training(warmup=2, lr_over="rounds", lr_schedule="linear")
    found = [rounds.rate((1, 3), (2, 4), Place(round=r, rounds=6)) for r in range(6)]
    assert found == pytest.approx([0.025, 0.05, 0.05, 0.0375, 0.025, 0.0125])
    assert rounds.at(second) == training(lr=0.05) and training(lr_schedule="linear").at(second).lr == 0.05


def test_the_rate_falls_from_round_to_round():
    """The case learn/stop_and_decay: how far clients go falls over the rounds of a federation."""
    clients = [source(f"c{i}", 40, seed=i) for i in range(3)]

    def moved(**more):
        schedule = cs.settings.federated(clients, 6)
        t = training(epochs=1, momentum=0.0, **more)
        r = cs.run(schedule, cs.methods.fedavg(), mlp(), t, judge_clients=True)
        return [found["distance"] for found in r.client_drift]

    constant, visit, rounds = (
        moved(),
        moved(lr_schedule="linear"),
        moved(lr_schedule="linear", lr_over="rounds"),
    )
    assert rounds[0] == constant[0] > visit[0]
    ratio = [a / b for a, b in zip(rounds, constant, strict=True)]
    assert ratio == sorted(ratio, reverse=True) and ratio[-1] < 0.3 < min(visit) / max(visit)


@pytest.mark.parametrize("over", AT)
def test_clients_of_all_spans_are_stacked(over):
    same_on_both_engines(lr_schedule="cosine", lr_over=over, warmup=0.2)
    same_on_both_engines(lr_schedule=lambda t: 1 - t / 2, lr_over=over)


def test_scaffold_is_right_with_one_rate_per_round():
    """Its control variate divides by the learning rate of the round, which both forms below have."""
    schedule = cs.settings.federated([A, B], 3)
    rounds = {"lr_schedule": lambda t: 1 - t / 2, "lr_over": "rounds", "momentum": 0.0}
    found = cs.run(schedule, cs.methods.scaffold(2), mlp(), training(**rounds)).params
    theta, c = {n: p.double() for n, p in mlp().init(cs.core.params.key(0, "init"))[0].items()}, {}
    own = [{n: torch.zeros_like(p) for n, p in theta.items()} for _ in range(2)]
    for r in range(3):
        lr, ends, new = 0.05 * (1 - r / 6), [], []
        c = {n: (own[0][n] + own[1][n]) / 2 for n in theta}
        for i, s in enumerate((A, B)):
            net, steps = plain(params=theta), 0
            for *_, x, y in batches(s, r):
                grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
                with torch.no_grad():
                    for (n, p), g in zip(net.named_parameters(), grads, strict=True):
                        p -= lr * (g + (c[n] - own[i][n] if r else 0))
                steps += 1
            ends.append(entries(net))
            new.append(
                {n: own[i][n] - c[n] + (theta[n] - ends[i][n]) / (steps * lr) for n in theta}
                if r
                else {n: (theta[n] - ends[i][n]) / (steps * lr) for n in theta}
            )
        own = new
        sizes = [len(s.train) for s in (A, B)]
        theta = {n: sum(z * e[n] for z, e in zip(sizes, ends, strict=True)) / sum(sizes) for n in theta}
    near(found, theta, 1e-11)


def test_what_assumes_one_rate_warns():
    for more in ({"warmup": 2}, {"lr_schedule": "linear", "lr_over": "run"}, {"clip_norm": 1.0}):
        with pytest.warns(UserWarning, match="it assumes a constant learning rate|clipping shortens"):
            final(cs.settings.federated([A, B], 2), cs.methods.scaffold(), momentum=0.0, **more)


# Clipping


@pytest.mark.parametrize("clip", [{"clip_norm": 0.3}, {"clip_value": 0.02}])
@pytest.mark.parametrize("penalty", [0.0, 2.0])
@ENGINES
def test_clipping_is_torchs_and_includes_penalties(clip, penalty, engine):
    net, clipped = plain(), 0
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for *_, x, y in batches(A):
        optimiser.zero_grad()
        near_start = sum(((p - start[n]) ** 2).sum() for n, p in net.named_parameters())
        (F.cross_entropy(net(x), y) + penalty / 2 * near_start).backward()
        before = [p.grad.clone() for p in net.parameters()]
        if "clip_norm" in clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        else:
            torch.nn.utils.clip_grad_value_(net.parameters(), 0.02)
        clipped += any(not torch.equal(b, p.grad) for b, p in zip(before, net.parameters(), strict=True))
        optimiser.step()
    assert clipped > 2
    method = cs.methods.fedprox(penalty) if penalty else cs.methods.finetune()
    near(go(method=method, engine=engine, **clip).params, entries(net))
    same_on_both_engines(method=method if penalty else None, **clip)


@dataclass(frozen=True)
class Still(Correction):
    """Masks the first layer, and pulls every entry towards 3."""

    def mask(self, step, ctx):
        held = {n: torch.full(s, float(not n.startswith("1."))) for n, s in zip(*_shapes(step), strict=True)}
        return step.layout.flatten(held)

    def penalty(self, step, ctx):
        return 0.5 * (step.theta - 3).square().sum()


def _shapes(step):
    return step.layout.names, step.layout.shapes


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_what_cannot_move_does_not_count_in_the_norm(optimiser):
    method = cs.Method("still", (Still(),))
    more = {"clip_norm": 0.5, "weight_decay": 0.1, "decay": {"*.bias": 0.0}, "optimiser": optimiser}
    net = plain()
    moving = [p for n, p in net.named_parameters() if not n.startswith("1.")]
    start = entries(net)
    groups = [{"params": [p], "weight_decay": 0.1 * (p.dim() > 1)} for p in moving]
    made = torch.optim.SGD if optimiser == "sgd" else torch.optim.AdamW
    theirs = made(groups, lr=0.05, **({"momentum": 0.9} if optimiser == "sgd" else {}))
    for *_, x, y in batches(A):
        theirs.zero_grad()
        (F.cross_entropy(net(x), y) + 0.5 * sum((p - 3).square().sum() for p in moving)).backward()
        torch.nn.utils.clip_grad_norm_(moving, 0.5)
        theirs.step()
    found = go(method=method, **more).params
    near(found, entries(net))
    assert torch.equal(found["1.weight"], start["1.weight"])
    same_on_both_engines(method=cs.methods.fedavg() + method, **more)


def test_heads_that_no_loss_reaches_do_not_count_in_the_norm():
    """EWC pulls the head of the first task, which the second task cannot move."""
    model = cs.models.multi_head(cs.models.mlp(6, (5,), 4), 4)
    tasks = [source("s", 24, (0, 1), 1, task="one"), source("t", 24, (2, 3), 2, task="two")]
    schedule = cs.settings.continual(tasks, "task")
    one = cs.run(schedule, cs.methods.l2sp(1.0), model, training(clip_norm=0.4))
    two = cs.run(schedule, cs.methods.l2sp(1.0), model, training(clip_norm=0.4), engine="batched")
    near(two.params, one.params)
    assert any("one" in name for name in one.agent.state.params)


# Optimisers

NAMED = {
    "nesterov": (
        {"optimiser": "sgd", "momentum": 0.9, "arguments": {"nesterov": True}},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    ),
    "betas": (
        {"optimiser": "adam", "arguments": {"betas": [0.8, 0.95], "eps": 1e-4}},
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-4),
    ),
    "adamw": (
        {"optimiser": "adamw", "arguments": {"betas": (0.5, 0.9)}, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.5, 0.9), weight_decay=0.1),
    ),
    "RAdam": ({"optimiser": "RAdam"}, lambda p: torch.optim.RAdam(p, lr=0.05)),
    "amsgrad": (
        {"optimiser": "Adam", "arguments": {"amsgrad": True}, "weight_decay": 0.1},
        lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, weight_decay=0.1),
    ),
    "RMSprop": (
        {"optimiser": "RMSprop", "momentum": 0.5, "lr": 0.01},
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    ),
    "SGD": (
        {"optimiser": "SGD", "momentum": 0.9, "arguments": {"dampening": 0.3}},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3),
    ),
    "Rprop": ({"optimiser": "Rprop", "lr": 0.01}, lambda p: torch.optim.Rprop(p, lr=0.01)),
}


@pytest.mark.parametrize("name", NAMED)
@ENGINES
def test_a_named_optimiser_is_torchs(name, engine):
    given, made = NAMED[name]
    net = plain()
    fit(net, A, optimiser=made(net.parameters()))
    near(go(engine=engine, **{"momentum": 0.0, **given}).params, entries(net), 1e-11)
    ours = given["optimiser"] in ("sgd", "adam", "adamw")
    expect = "batched" if ours else f"one after another: torch.optim.{given['optimiser']} cannot be stacked"
    same_on_both_engines(expect, **{"momentum": 0.0, **given})


@pytest.mark.parametrize("name", ["Rprop", "RAdam"])
def test_a_schedule_gives_torchs_optimiser_its_rate(name):
    """The step of Rprop is not in proportion to its learning rate, which only its first step reads."""
    net = plain()
    optimiser = getattr(torch.optim, name)(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, TOTAL)
    for *_, x, y in batches(A):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
        scheduler.step()
    near(go(optimiser=name, lr=0.01, lr_schedule="cosine").params, entries(net), 1e-11)


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw", "AdamW", "NAdam"])
@ENGINES
def test_decay_by_pattern_is_torchs_groups(optimiser, engine):
    decay = {"3.weight": 2.0, "*.bias": 0.0}
    more = {"weight_decay": 0.1, "decay": decay, "optimiser": optimiser, "rates": {"1.*": 0.5}}
    net, share = plain(), {"1.weight": 1.0, "1.bias": 0.0, "3.weight": 2.0, "3.bias": 0.0}
    groups = [
        {"params": [p], "weight_decay": 0.1 * share[n], "lr": 0.05 * (0.5 if n[0] == "1" else 1.0)}
        for n, p in net.named_parameters()
    ]
    name = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}.get(optimiser, optimiser)
    made = getattr(torch.optim, name)(groups, **({"momentum": 0.9} if optimiser == "sgd" else {}))
    fit(net, A, optimiser=made)
    near(go(engine=engine, **more).params, entries(net), 1e-11)
    same_on_both_engines("batched" if optimiser.islower() else "one after another", **more)


def test_packnet_keeps_old_weights_under_momentum_decay_and_clipping():
    tasks = [source(f"p{i}", 32, (2 * i, 2 * i + 1), i, task=f"p{i}") for i in range(2)]
    model = cs.models.multi_head(cs.models.mlp(6, (12,), 4), 4)
    more = {"weight_decay": 0.1, "decay": {"*.bias": 0.0}, "clip_norm": 0.5, "warmup": 2, "epochs": 4}
    schedule = cs.settings.continual(tasks, "task")
    for optimiser in ("sgd", "adamw", "NAdam"):
        answers = []
        for count in (1, 2):
            part = cs.settings.continual(tasks[:count], "task")
            r = cs.run(part, cs.methods.packnet(), model, training(optimiser=optimiser, **more))
            answers.append(r.predict(tasks[0].test.x, tasks[0].name))
        assert torch.equal(answers[0][:, :2], answers[1][:, :2])
    assert schedule.sources[0].name == "p0"


# Accumulation


def tasks_of(sizes, **more):
    return [source(f"m{i}", n, (i, i + 1), i, task=f"m{i}", **more) for i, n in enumerate(sizes)]


STEP_AGGREGATORS = {
    "sum": lambda: None,
    "pcgrad": cs.aggregators.pcgrad,
    "mgda": cs.aggregators.mgda,
    "mean": cs.aggregators.mean,
}


@pytest.mark.parametrize("name", STEP_AGGREGATORS)
@pytest.mark.parametrize("batch", [4, 5])
def test_micro_batches_of_a_step_are_one_batch(name, batch):
    """With tasks of unequal sizes, whose last batches are unequal, and one of them of a single sample."""
    schedule = cs.settings.multitask(tasks_of((33, 25, 17)))
    aggregator = STEP_AGGREGATORS[name]()
    method = cs.Method("m", step_aggregator=aggregator) if aggregator else cs.methods.finetune()
    more = {"clip_norm": 0.5, "weight_decay": 0.1}
    one = cs.run(schedule, method, mlp(), training(batch_size=4 * batch, **more))
    many = cs.run(schedule, method, mlp(), training(batch_size=batch, accumulate=4, **more))
    near(many.params, one.params)
    assert not same(many.params, cs.run(schedule, method, mlp(), training(batch_size=batch, **more)).params)
    assert many.costs["steps"] == one.costs["steps"]


WITH_PARTS = {
    "er": lambda: cs.methods.er(20, 3),
    "der": lambda: cs.methods.der(20, batch_size=3),
    "lwf": cs.methods.lwf,
    "gem": cs.methods.gem,
    "agem": cs.methods.agem,
    "si": cs.methods.si,
    "ewc": cs.methods.ewc,
    "packnet": cs.methods.packnet,
}


@pytest.mark.parametrize("name", WITH_PARTS)
def test_parts_of_corrections_are_accumulated_too(name):
    """Rehearsal of three samples has fewer than there are micro-batches."""
    label = name == "packnet"
    given = tasks_of((30, 21, 26))
    schedule = cs.settings.continual(given, "task" if label else "domain")
    model = cs.models.multi_head(mlp(), 4) if label else mlp()
    one = cs.run(schedule, WITH_PARTS[name](), model, training(batch_size=12))
    many = cs.run(schedule, WITH_PARTS[name](), model, training(batch_size=3, accumulate=4))
    near(many.params, one.params, 1e-11)


@pytest.mark.parametrize(
    ("loss", "classes"),
    [(None, True), (cs.losses.CrossEntropy(weights={"0": 4.0, "1": 0.125}), True), ("huber", False)],
)
def test_micro_batches_count_by_their_targets(loss, classes):
    """Places without a target, samples with none at all, and classes that weigh more."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(37, 6, 5, generator=g, dtype=torch.float64)
    if classes:
        y = torch.randint(4, (37, 5), generator=g)
        y[torch.rand(37, 5, generator=g) < 0.5] = -100
        y[:9] = -100
    else:
        y = torch.randn(37, 4, 5, generator=g, dtype=torch.float64)
        y[torch.rand(37, 4, 5, generator=g) < 0.5] = math.nan
        y[:9] = math.nan

    net = cs.models.wrap(nn.Conv1d(6, 4, 1).double(), outputs=4)
    given = cs.data.arrays(x, y, name="places", kind="class" if classes else "value")
    schedule = cs.settings.continual([given], "domain")

    def run(**more):
        return cs.run(schedule, cs.methods.finetune(), net, training(loss=loss, **more)).params

    near(run(batch_size=3, accumulate=4), run(batch_size=12))


class Bag(nn.Module):
    """The mean of the embeddings of the words that are there."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 5), nn.Linear(5, 2)

    def forward(self, words, mask):
        weights = mask.unsqueeze(-1).to(self.embed.weight.dtype)
        return self.head((self.embed(words) * weights).sum(1) / weights.sum(1))


@pytest.mark.parametrize("method", [cs.methods.finetune, lambda: cs.methods.er(10, 2)])
def test_trees_of_unequal_length_are_cut_too(method):
    texts = [[1 + (i * j) % 19 for j in range(1, 3 + i % 5)] for i in range(40)]
    sources = []
    for name, rows in (("one", texts[:26]), ("two", texts[26:])):
        x = {"words": rows, "mask": [[1] * len(row) for row in rows]}
        y = [row[0] % 2 for row in rows]
        sources.append(cs.data.arrays(x, y, name=name, classes=["even", "odd"], space="parity"))
    torch.manual_seed(0)
    net, schedule = (
        Bag(),
        cs.settings.continual(sources if method is not cs.methods.finetune else sources[:1], "domain"),
    )

    def run(**more):
        return cs.run(schedule, method(), net, training(**more)).params

    near(run(batch_size=3, accumulate=3), run(batch_size=9))


def test_batch_norm_sees_micro_batches():
    """Its statistics are those of a micro-batch, as the documentation says."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    found = []
    for more in ({"batch_size": 12}, {"batch_size": 3, "accumulate": 4}):
        found.append(go(model=net, **more).agent.state)
    one, many = (state.buffers["1.num_batches_tracked"] for state in found)
    assert (int(one), int(many)) == (2 * 3, 2 * 10)


def test_accumulation_runs_one_after_another():
    same_on_both_engines("one after another: gradients are accumulated", batch_size=3, accumulate=3)


# Early stopping


def losses_by_epoch(s, epochs, every=None, loss_of=None):
    """The validation loss of the plain loop after each epoch, or some steps, and the parameters then."""
    net, optimiser, found = plain(), None, []
    optimiser = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for count, (_, step, x, y) in enumerate(batches(s, epochs=epochs), 1):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
        if (step == 3) if every is None else count % every == 0:
            vx, vy = s.validation.whole()
            found.append((float(F.cross_entropy(net(vx), vy).detach()), entries(net), count))
    return found


def rule_of(losses, patience, least=0.0):
    """(index of the best check, number of checks)."""
    best, at = math.inf, -1
    for i, loss in enumerate(losses):
        if loss < best - least:
            best, at = loss, i
        elif i - at >= patience:
            return at, i + 1
    return at, len(losses)


def half_seen(s, seed):
    """Half of the validation data were seen, so that their loss falls first and then rises."""
    seen, new = s.train.select(torch.arange(20)).whole(), source("v", 20, seed=seed).train.whole()
    both = [torch.cat(pair) for pair in zip(seen, new, strict=True)]
    return replace(s, validation=Tensors(*both))


NOISY = half_seen(A, 9)
OVERFIT = {"lr": 0.3, "epochs": 15}


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("best", [True, False])
def test_a_visit_stops_by_its_validation_loss(every, patience, best):
    found = losses_by_epoch(NOISY, 15, every)
    at, checks = rule_of([loss for loss, *_ in found], patience)
    assert at + 1 < checks < len(found), "it stops early, and the best is not the last"
    stopping = cs.Stopping(patience, best=best, every=every)
    r = go([NOISY], stopping=stopping, **OVERFIT)
    near(r.params, found[at if best else checks - 1][1], 1e-10)
    assert r.costs["steps"] == found[checks - 1][2]
    if every is None and best:
        assert same(go([NOISY], stopping=patience, **OVERFIT).params, r.params)


def test_least_is_what_counts_as_better():
    found = losses_by_epoch(NOISY, 15)
    at, checks = rule_of([loss for loss, *_ in found], 2, 0.1)
    assert (at, checks) != rule_of([loss for loss, *_ in found], 2)
    r = go([NOISY], stopping={"patience": 2, "least": 0.1}, **OVERFIT)
    near(r.params, found[at][1], 1e-10)
    assert r.costs["steps"] == 4 * checks


@pytest.mark.parametrize("method", [cs.methods.si, cs.methods.ewc, cs.methods.er])
def test_a_stopped_visit_is_one_of_fewer_epochs(method):
    """Traces, counts and summaries are those of a visit that ended at its best epoch."""
    schedule = cs.settings.continual([NOISY, B], "domain")

    def visited(**more):
        agent = cs.run(schedule, method(), mlp(), training(epochs=0)).agent
        agent.training = training(lr=0.3, **more)
        job = agent.prepare(["a"])
        steps = sum(1 for _ in job.run(agent.ledger))
        agent.finish(job)
        return steps, job.steps, encode_state(agent.state)[0]

    ran, kept, mine = visited(epochs=15, stopping=2)
    assert kept < ran < 60 and kept % 4 == 0
    once, same_steps, theirs = visited(epochs=kept // 4)
    assert once == same_steps == kept
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_several_sources_of_a_visit_count_alike():
    pair = [NOISY, half_seen(B, 8)]
    schedule = cs.settings.multitask(pair)
    found = []
    for epochs in range(1, 9):
        net = plain(
            params=cs.run(schedule, cs.methods.finetune(), mlp(), training(lr=0.3, epochs=epochs)).params
        )
        with torch.no_grad():
            each = [F.cross_entropy(net(s.validation.x), s.validation.y) for s in pair]
        found.append((float(sum(each)) / 2, entries(net)))
    at, checks = rule_of([loss for loss, _ in found], 2)
    assert checks < 8
    r = cs.run(schedule, cs.methods.finetune(), mlp(), training(lr=0.3, epochs=8, stopping=2))
    near(r.params, found[at][1], 1e-10)


@pytest.mark.parametrize("at", [5, 9, 18, 21])
def test_a_killed_visit_stops_on_the_same_bits(at, tmp_path):
    schedule = cs.settings.continual([NOISY, half_seen(B, 8)], "domain")

    def run(**more):
        return cs.run(schedule, cs.methods.si(), mlp(), training(stopping=2, **OVERFIT), **more)

    expected = run()
    stopped(run, tmp_path, at)
    found = run(out=tmp_path, resume=True)
    assert same(found.params, expected.params) and found.costs["steps"] == expected.costs["steps"]


def test_visits_that_stop_run_one_after_another():
    same_on_both_engines("one after another: each agent stops by its own", stopping=1, epochs=4, lr=0.3)


def rounds_of(stopping=None, rounds=12, **more):
    clients = [NOISY, half_seen(B, 8)]
    schedule = cs.settings.federated(clients, rounds)
    more = {"seed": 0, **more}
    return cs.run(schedule, cs.methods.fedavg(), mlp(), training(lr=0.3, epochs=1), stopping=stopping, **more)


def test_a_federation_stops_by_its_validation_score():
    """The case learn/stop_and_decay: stopping returns a result, with the parameters of the best round."""
    clients = [NOISY, half_seen(B, 8)]
    scores, ends = [], []
    for rounds in range(1, 13):
        ends.append(rounds_of(rounds=rounds))
        right = [ends[-1].predict(s.validation.x).argmax(1) == s.validation.y for s in clients]
        scores.append(sum(float(r.double().mean()) for r in right) / 2)
    at, checks = rule_of([-score for score in scores], 3)
    assert at + 1 < checks < 12

    r, full = rounds_of(3), ends[-1]
    assert r.stages == full.stages[:checks] and r.matrices.shape == (1, checks + 1, 2)
    assert (r.matrix == full.matrix[: checks + 1]).all()
    assert same(r.params, ends[at].params) and r.score == ends[at].score
    assert r.costs["steps"] == ends[checks - 1].costs["steps"]
    (stop,) = r.stopped
    assert stop == {
        "stage": checks,
        "why": "no better validation score in 3 stages",
        "returned": at + 1,
        "score": pytest.approx(scores[at]),
    }
    last = rounds_of(cs.Stopping(3, best=False))
    assert last.stopped[0]["returned"] == checks and same(last.params, ends[checks - 1].params)
    never = rounds_of(12)
    assert never.stopped[0]["why"] == "the schedule ended" and never.matrices.shape == full.matrices.shape
    assert never.stopped[0]["returned"] == scores.index(max(scores)) + 1
    assert full.stopped == () and "stopped" in full.to_json()


@pytest.mark.parametrize("at", [30, 55])
def test_a_killed_federation_stops_on_the_same_bits(at, tmp_path):
    def run(**more):
        return rounds_of(cs.Stopping(3), repeats=2, **more)

    expected = run()
    stopped(run, tmp_path, at, every=2)
    found = run(out=tmp_path, resume=True)
    assert same(found.params, expected.params) and found.stopped == expected.stopped
    assert found.matrices == pytest.approx(expected.matrices, nan_ok=True, abs=0)

    # Resumed after its end, it says the same again.
    again = run(out=tmp_path, resume=True)
    assert same(again.params, expected.params) and again.score == expected.score
    with pytest.raises(cs.ConsilienceError, match=r"`stopping` was Stopping\(patience=3"):
        rounds_of(2, repeats=2, out=tmp_path, resume=True)


def test_repeats_stop_on_their_own(tmp_path):
    r = rounds_of(2, repeats=3, out=tmp_path, judge_clients=True)
    last = [stop["stage"] for stop in r.stopped]
    assert len(set(last)) > 1 and len(r.stages) == max(last) == r.matrices.shape[1] - 1
    for repeat, stop in enumerate(r.stopped):
        alone = rounds_of(2, seed=repeat)
        assert alone.stopped[0] == stop
        assert (r.matrices[repeat, : stop["stage"] + 1] == alone.matrices[0]).all()
        assert torch.tensor(r.matrices[repeat, stop["stage"] + 1 :]).isnan().all()
        assert r.scores[repeat] == alone.score and len(r.final[repeat]) == stop["returned"] + 1

    # Means over the repeats that reached a stage; files and reports hold all of it.
    longest = r.matrices[last.index(max(last)), -1]
    assert last.count(max(last)) > 1 or (r.matrix[-1] == longest).all()
    kept = cs.Result.load(tmp_path)
    assert kept.stopped == r.stopped and kept.scores == r.scores
    assert kept.matrices == pytest.approx(r.matrices, nan_ok=True, abs=0)
    assert "NaN" not in (tmp_path / "result.json").read_text()
    assert "fedavg" in kept.table() and kept.report(tmp_path / "r.html").exists()


def test_forgetting_is_that_of_the_stage_that_is_returned():
    r = rounds_of(3)
    (R,) = r.final
    gap = (R[1:-1].max(0) - R[-1]) if len(R) > 2 else None
    assert r.global_forgetting == (None if gap is None else pytest.approx(float(gap.mean())))


STOP_REFUSED = {
    "patience": ({"stopping": 0}, "`patience` of `stopping` must be a whole number >= 1, got 0"),
    "true": ({"stopping": True}, "`stopping` must be a number of checks or a Stopping, got True"),
    "field": ({"stopping": {"wait": 3}}, "`stopping` has no 'wait'; it takes patience, least, best, every"),
    "least": ({"stopping": {"least": math.nan}}, "`least` of `stopping` must be >= 0 and finite, got nan"),
    "best": ({"stopping": {"best": 1}}, "`best` of `stopping` must be true or false, got 1"),
}


@pytest.mark.parametrize("name", STOP_REFUSED)
def test_a_stopping_that_means_nothing_is_refused(name):
    given, text = STOP_REFUSED[name]
    for act in (lambda: cs.Training(**given), lambda: rounds_of(**given)):
        with pytest.raises(cs.ConsilienceError, match=re.escape(text)):
            act()


def test_a_stopping_that_could_not_act_is_refused():
    none = replace(A, validation=A.train.select(torch.arange(0)))
    tasks = tasks_of((30, 21))
    model = cs.models.multi_head(cs.models.mlp(6, (12,), 4), 4)
    for act, text in (
        (lambda: go([none], stopping=2), "`stopping` needs validation data, and 'a' has none"),
        (lambda: rounds_of(cs.Stopping(2, every=3)), "`every` of `stopping` has no effect on a run"),
        (
            lambda: cs.run(cs.settings.continual(tasks), cs.methods.finetune(), mlp(), stopping=2),
            "`stopping` of a run would leave out sources that agents train on later (up to 2 in turn here)",
        ),
        (
            lambda: cs.run(cs.settings.multitask(tasks), cs.methods.finetune(), mlp(), stopping=2),
            "`stopping` of a run needs two stages or more, got 1",
        ),
        (
            lambda: cs.run(
                cs.settings.continual(tasks, "task"), cs.methods.packnet(), model, training(stopping=2)
            ),
            "PackNet acts at set steps of a visit, so visits need all of them; no `stopping`.",
        ),
    ):
        with pytest.raises(cs.ConsilienceError, match=re.escape(text)):
            act()


def test_stopping_from_the_command_line(tmp_path):
    from consilience.cli.build import training_of
    from consilience.cli.main import main
    from consilience.cli.options import understand

    for words, stopping in (
        (["3"], cs.Stopping(3)),
        (['{"patience": 2, "best": false}'], cs.Stopping(2, best=False)),
    ):
        order = understand("run", ["--training.stopping", *words, "--stopping", *words])
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(order.config))
        again = understand("run", ["--config", str(path)])
        assert training_of(again).stopping == stopping == cs.Stopping.of(again.run.stopping)
        assert again.config == order.config

    argv = "run --setting federated --setting.rounds 3 --stopping 1 --training.epochs 1 --training.lr 1e-9"
    assert main([*argv.split(), "--out", str(tmp_path / "run")]) == 0
    (stop,) = cs.Result.load(tmp_path / "run").stopped
    assert stop["stage"] == 2 and stop["returned"] == 1


def test_a_federation_stops_by_a_loss_of_which_less_is_better():
    by_loss = {"metric": "loss", "stopping": 3}
    r, full = rounds_of(**by_loss), rounds_of(metric="loss")
    (stop,) = r.stopped
    assert 1 <= stop["returned"] < stop["stage"] < 12 and stop["score"] < 0
    clients = [NOISY, half_seen(B, 8)]
    losses = []
    for rounds in range(1, 13):
        net = plain(params=rounds_of(rounds=rounds).params)
        with torch.no_grad():
            each = [F.cross_entropy(net(s.validation.x), s.validation.y) for s in clients]
        losses.append(float(sum(each)) / 2)
    assert rule_of(losses, 3) == (stop["returned"] - 1, stop["stage"])
    assert -stop["score"] == pytest.approx(min(losses), rel=1e-6)
    assert r.score == full.matrix[stop["returned"]].mean()


def test_a_run_without_one_direction_does_not_stop():
    schedule = cs.settings.federated([NOISY, half_seen(B, 8)], 3)
    none = lambda p, y: 1.0  # noqa: E731
    for given in (none, {"a": "accuracy", "b": "loss"}):
        with pytest.raises(
            cs.ConsilienceError, match="`stopping` of a run needs one metric with a direction"
        ):
            cs.run(schedule, cs.methods.fedavg(), mlp(), training(), metric=given, stopping=2)


# torch.compile


def test_compiled_steps_are_the_same_to_rounding():
    """With dropout and batch norm; visits, tasks and sizes of batches share what was compiled."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 4))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    runs = [go([A, B], cs.methods.ewc(1.0), net.double(), compile=c) for c in (False, True)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    near(runs[1].params, runs[0].params, 1e-11)
    assert runs[0].costs["macs"] == runs[1].costs["macs"]


def test_a_model_that_cannot_be_compiled_runs_as_it_is(monkeypatch):
    def none(forward, **_):
        def fail(x, task):
            raise RuntimeError("no C++ compiler\nsecond line")

        return fail

    expected = go().params
    monkeypatch.setattr(torch, "compile", none)
    with pytest.warns(
        UserWarning, match="the model is not compiled: RuntimeError: no C.. compiler; its forward"
    ):
        assert same(go(compile=True).params, expected)


def test_compiling_what_corrections_view_has_no_effect():
    tasks = tasks_of((16, 16))
    model = cs.models.multi_head(cs.models.mlp(6, (12,), 4), 4)
    with pytest.warns(UserWarning, match="`compile` has no effect with PackNet"):
        cs.run(cs.settings.continual(tasks, "task"), cs.methods.packnet(), model, training(compile=True))


def test_stacked_programs_are_compiled_too():
    one, _ = two_clients("serial")
    both, notes = two_clients("batched", compile=True)
    near(both.params, one.params)
    assert any(note.startswith("batched") for note in notes)


# Half precision


def big(seed=1, size=1.0):
    s = source("big", 40, seed=seed, dtype=torch.float32)
    return replace(s, train=s.train.map(lambda x: x * size, lambda y: y))


def by_grad_scaler(s, optimiser, clip=None):
    net = plain().float()
    theirs = optimiser(net.parameters())
    scaler = torch.amp.GradScaler("cpu")
    for *_, x, y in batches(s):
        theirs.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            out = net(x)
        scaler.scale(F.cross_entropy(out.float(), y)).backward()
        scaler.unscale_(theirs)
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(theirs)
        scaler.update()
    return net, scaler.get_scale()


@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_half_precision_is_grad_scalers(size, optimiser):
    """Inputs of a large size overflow at the first scale, so that steps are left out."""
    s = big(size=size)
    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    }[optimiser]
    net, scale = by_grad_scaler(s, made, clip=0.5)
    assert (scale < 2**16) == (size > 1)
    jobs = []
    r = go([s], precision="fp16", lr=0.01, optimiser=optimiser, clip_norm=0.5)
    near(r.params, entries(net), 2e-3)
    near(r.params, entries(net), 1e-5) if size == 1 else None
    assert all(p.dtype == torch.float32 for p in r.params.values()) and not jobs


def test_the_scale_follows_grad_scalers_rule():
    from consilience.core.scaling import LossScale

    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    theirs.scale(torch.zeros(()))
    ours = LossScale(8.0, 3)
    state = ours.init(torch.device("cpu"))
    for finite in (1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1):
        parameter.grad = torch.full((1,), 1.0 if finite else math.inf)
        theirs.unscale_(optimiser)
        theirs.step(optimiser)
        theirs.update()
        state = ours.update(state, bool(finite))
        assert float(state["scale"]) == theirs.get_scale()


def test_steps_left_out_move_nothing_and_are_no_divergence_up_to_a_number():
    from consilience.core.scaling import LossScale

    scale = LossScale(most=3)
    state = scale.init(torch.device("cpu"))
    for finite in (False, False, False, True, False, False, False):
        state = scale.update(state, finite)
    with pytest.raises(
        cs.ConsilienceError, match="got 4 steps in a row without any, down to a loss scale of 1024"
    ):
        scale.update(state, False)

    # Infinite inputs leave out every step: 10 are no divergence, and nothing moves; 50 are.
    s = big(size=math.inf)
    start = go([s], precision="fp16", epochs=0).params
    assert same(go([s], precision="fp16", weight_decay=0.1).params, start)
    with pytest.raises(cs.ConsilienceError, match="got 21 steps in a row without any"):
        go([s], precision="fp16", epochs=10)


def test_traces_see_steps_that_are_left_out():
    """PackNet prunes at a given step, which may be one that is left out."""
    tasks = tasks_of((32, 32))
    spoilt = [replace(s, train=s.train.map(lambda x: x.float() * math.inf, lambda y: y)) for s in tasks]
    schedule = cs.settings.continual(spoilt[:1], "task")
    t = training(precision="fp16", epochs=4)
    r = cs.run(schedule, cs.methods.packnet(), cs.models.multi_head(mlp(), 4), t)
    (item,) = r.agent.state.memory["PackNet"].values()
    assert any(bool((t == 0).any()) for n, t in item.tensors.items() if t.numel() > 1)


def test_half_precision_with_objectives_and_engines():
    schedule = cs.settings.multitask(tasks_of((33, 25), dtype=torch.float32))
    method = cs.Method("m", step_aggregator=cs.aggregators.pcgrad())
    half = cs.run(schedule, method, mlp(), training(precision="fp16")).params
    full = cs.run(schedule, method, mlp(), training(precision="fp32")).params
    near(half, full, 0.02)
    assert not same(half, full)
    same_on_both_engines("one after another: the loss is scaled", precision="fp16")


def test_a_precision_that_torch_lacks_is_refused_by_name(monkeypatch):
    def none(*_, **__):
        raise RuntimeError("unsupported")

    monkeypatch.setattr(torch, "autocast", none)
    with pytest.raises(
        cs.ConsilienceError, match="precision='fp16' was requested, but torch .* has no autocast"
    ):
        go(precision="fp16")


# Arguments that would be ignored are refused

REFUSED = {
    "lr nan": ({"lr": math.nan}, "`lr` must be positive and finite, got nan"),
    "lr negative": ({"lr": -0.1}, "`lr` must be positive and finite, got -0.1"),
    "lr none": ({"lr": None}, "`lr` must be positive and finite, got None"),
    "decay nan": ({"weight_decay": math.nan}, "`weight_decay` must be >= 0 and finite, got nan"),
    "decay infinite": ({"weight_decay": math.inf}, "`weight_decay` must be >= 0 and finite, got inf"),
    "momentum nan": ({"momentum": math.nan}, "`momentum` must be >= 0 and finite, got nan"),
    "momentum negative": ({"momentum": -0.9}, "`momentum` must be >= 0 and finite, got -0.9"),
    "momentum one": ({"momentum": 1.0}, "`momentum` must be in [0, 1), got 1.0"),
    "momentum text": ({"momentum": "0.9"}, "`momentum` must be >= 0 and finite, got '0.9'"),
    "epochs true": ({"epochs": True}, "`epochs` must be a whole number >= 0, got True"),
    "warmup negative": ({"warmup": -1}, "`warmup` must be >= 0 and finite, got -1"),
    "warmup 2.5": (
        {"warmup": 2.5},
        "`warmup` must be a whole number of steps, or a fraction below 1, got 2.5",
    ),
    "clip 0": ({"clip_norm": 0.0}, "`clip_norm` must be positive and finite, got 0.0"),
    "clip nan": ({"clip_value": math.nan}, "`clip_value` must be positive and finite, got nan"),
    "clip both": ({"clip_value": 1.0, "clip_norm": 1.0}, "the gradient can be clipped in one way"),
    "momentum, adam": (
        {"optimiser": "adam", "momentum": 0.5},
        "`momentum` has no effect on adam, got 0.5; set `betas` in `arguments`.",
    ),
    "momentum, object": (
        {"optimiser": SGD(), "momentum": 0.9},
        "`momentum` has no effect with an Optimiser",
    ),
    "decay, object": (
        {"optimiser": Adam(), "weight_decay": 0.5},
        "`weight_decay` has no effect with an Optimiser object, got 0.5",
    ),
    "arguments, object": ({"optimiser": SGD(), "arguments": {"nesterov": True}}, "`arguments` has no effect"),
    "momentum, RAdam": ({"optimiser": "RAdam", "momentum": 0.9}, "unexpected keyword argument 'momentum'"),
    "decay, Rprop": (
        {"optimiser": "Rprop", "weight_decay": 0.1},
        "unexpected keyword argument 'weight_decay'",
    ),
    "lr twice": (
        {"optimiser": Torch("SGD", (("lr", 0.05),))},
        "`lr` must be given once, as Training(lr=...)",
    ),
    "lr twice, name": ({"optimiser": "RAdam", "arguments": {"lr": 0.1}}, "`lr` must be given once"),
    "momentum twice": (
        {"optimiser": "SGD", "arguments": {"momentum": 0.9}},
        "`momentum` must be given as Training(momentum=...), not in `arguments`.",
    ),
    "nesterov alone": ({"arguments": {"nesterov": True}}, "`nesterov` has no effect without momentum"),
    "nesterov text": (
        {"momentum": 0.9, "arguments": {"nesterov": "yes"}},
        "`nesterov` must be true or false",
    ),
    "betas of sgd": (
        {"arguments": {"betas": (0.9, 0.9)}},
        "`arguments` of sgd must be among nesterov, got 'betas'",
    ),
    "betas three": (
        {"optimiser": "adam", "arguments": {"betas": (0.9,)}},
        "`betas` must be two numbers in [0, 1)",
    ),
    "betas one": (
        {"optimiser": "adam", "arguments": {"betas": (0.9, 1)}},
        "`betas` must be two numbers in [0, 1)",
    ),
    "amsgrad of adam": (
        {"optimiser": "adam", "arguments": {"amsgrad": True}},
        "by names such as 'SGD', 'Adam'",
    ),
    "no class": (
        {"optimiser": "Adan"},
        "an optimiser must be a class of torch.optim by its name, got 'Adan'; nearest: Adam",
    ),
    "closure": ({"optimiser": "LBFGS"}, "which needs a closure"),
    "decay without": ({"decay": {"*": 0.0}}, "`decay` has no effect without `weight_decay`"),
    "decay negative": (
        {"weight_decay": 0.1, "decay": {"*": -1.0}},
        "factors of `decay` must be >= 0 and finite, got -1.0 for '*'",
    ),
    "decay number": ({"weight_decay": 0.1, "decay": 0.5}, "`decay` must be a mapping of patterns to factors"),
    "over": ({"lr_over": "run"}, "`lr_over` has no effect on a constant learning rate"),
    "over unknown": (
        {"lr_schedule": "linear", "lr_over": "epoch"},
        "`lr_over` must be one of visit, source, run",
    ),
    "schedule": (
        {"lr_schedule": "step"},
        "`lr_schedule` must be one of constant, linear, cosine or a function",
    ),
    "compile": ({"compile": "default"}, "`compile` must be true or false, got 'default'"),
    "device": ({"device": "gpu"}, "`device` must be a device of torch, got 'gpu'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_without_effect_is_refused(name):
    given, text = REFUSED[name]
    with pytest.raises(cs.ConsilienceError, match=re.escape(text)) as e:
        cs.Training(**given)
    assert "\n" not in str(e.value)


def test_what_only_a_run_can_refuse():
    for given, text in (
        (
            {"weight_decay": 0.1, "decay": {"head.*": 0.0}},
            "each pattern of `decay` must match a trained entry",
        ),
        ({"lr_schedule": lambda t: 2 - t}, "`lr_schedule` must return factors in (0, 1], got 2.0 at t = 0"),
        (
            {"lr_schedule": lambda t: 0.5 - t},
            "`lr_schedule` must return factors in (0, 1], got 0.0 at t = 0.5",
        ),
    ):
        with pytest.raises(cs.ConsilienceError, match=re.escape(text)):
            go(**given)


def test_the_outer_optimiser_refuses_the_same():
    with pytest.raises(cs.ConsilienceError, match="`outer_momentum` has no effect on 'adam', got 0.9"):
        cs.methods.fedavg("adam", outer_momentum=0.9)
    with pytest.raises(cs.ConsilienceError, match="`lr` of the outer optimiser must be given once, got 0.5"):
        WeightSpace(None, Torch("SGD", (("lr", 0.1),)), 0.5)


def test_a_learning_rate_is_given_once():
    """The case learn/optimiser_args_ignored: sgd and torch's SGD move alike, by name and as objects."""
    plain_one = go(momentum=0.0, lr=0.1).params
    near(go(optimiser="SGD", momentum=0.0, lr=0.1).params, plain_one)
    near(go(optimiser=Torch("SGD"), lr=0.1).params, plain_one)


def test_devices_of_torch_are_accepted():
    assert same(go(device=torch.device("cpu")).params, go().params)
    assert cs.Training(device="cpu:0") == cs.Training() == cs.Training(device=torch.device("cpu", 0))


# Files and resuming


def halved(t):
    return 0.5 if t >= 0.5 else 1.0


RESUMED = {
    "rates": {"lr_schedule": halved, "lr_over": "run", "warmup": 3, "clip_norm": 0.5},
    "half": {"precision": "fp16", "accumulate": 2, "batch_size": 4},
    "torch": {"optimiser": "NAdam", "weight_decay": 0.1, "decay": {"*.bias": 0.0}, "lr_schedule": "cosine"},
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("at", [3, 11])
def test_a_killed_run_ends_on_the_same_bits(name, at, tmp_path):
    schedule = cs.settings.federated([A, B], 2)

    def run(**more):
        return cs.run(schedule, cs.methods.ewc(0.5), mlp(), training(**RESUMED[name]), **more)

    expected = run()
    stopped(run, tmp_path, at)
    found = run(out=tmp_path, resume=True)
    assert same(found.params, expected.params) and (found.matrices == expected.matrices).all()


def test_another_schedule_is_not_resumed(tmp_path):
    def run(function=halved, **more):
        schedule = cs.settings.continual([A], "domain")
        given = training(lr_schedule=function)
        return cs.run(schedule, cs.methods.finetune(), mlp(), given, **more)

    def other(t):
        return 1 - t / 4

    stopped(run, tmp_path, 2)
    other.__qualname__ = halved.__qualname__
    for function, text in (
        (math.cos, r"`training.lr_schedule` was .*test_training.halved and is math.cos now"),
        (other, r"`training.lr_curve` was \[1.0, 1.0, .* and is \[1.0, 0.96875"),
    ):
        with pytest.raises(cs.ConsilienceError, match=text):
            run(function, out=tmp_path, resume=True)


def test_options_of_training_survive_a_config_file(tmp_path):
    from consilience.cli.build import training_of
    from consilience.cli.options import understand

    argv = {
        "optimiser": "adamw",
        "arguments": '{"betas": [0.8, 0.9]}',
        "weight_decay": "0.1",
        "decay": '{"*.bias": 0.0}',
        "rates": '{"1.*": 2.0}',
        "lr_schedule": "math.cos",
        "lr_over": "run",
        "warmup": "0.1",
        "clip_norm": "0.5",
    }
    order = understand(
        "run", [word for name, value in argv.items() for word in (f"--training.{name}", value)]
    )
    found = training_of(order)
    assert found.lr_schedule is math.cos and found.decay == {"*.bias": 0.0}
    assert found.inner() == Adam(0.8, 0.9, weight_decay=0.0, decoupled=True)

    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(order.config))
    again = understand("run", ["--config", str(path)])
    assert training_of(again) == found and again.config["training"] == order.config["training"]


# float64 data


def regression(shift=0.0, dtype=np.float64, name="r", n=60):
    """Inputs [n, 3] and values of a line with noise; `shift` times normal numbers is added to the inputs."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(n, 3)), rng.normal(size=(n, 4))
    y = x @ np.array([1.0, -2.0, 0.5]) + noise[:, 3]
    x, y = (x + shift * noise[:, :3]).astype(dtype), y.astype(dtype)
    return x, y, cs.data.arrays(x, y, test=(x, y), validation=0, kind="value", name=name)


@pytest.mark.parametrize("shift", [0.0, 1e-9])
def test_regression_in_float64_is_numpys_from_float64_data(shift):
    """The ridge head, and one gradient step over all data; inputs moved by 1e-9 give another line."""
    x, y, source = regression(shift)
    closed = cs.Method("closed", (SolvedHead(),), fixed={"epochs": 0})
    fp64 = cs.Training(epochs=1, batch_size=60, lr=0.1, precision="fp64")
    model = cs.models.linear(3, 1)
    schedule = cs.settings.continual([source])
    found = cs.run(schedule, closed, model, fp64).params

    centred = x - x.mean(0)
    gram = centred.T @ centred
    gram += 0.1 * np.trace(gram) / 3 * np.eye(3)
    line = np.linalg.solve(gram, centred.T @ (y - y.mean()))
    weight, bias = (
        next(p for n, p in found.items() if n.endswith(end)).numpy() for end in ("weight", "bias")
    )
    assert np.abs(weight[0] - line).max() < 1e-12
    assert abs(bias[0] - (y.mean() - x.mean(0) @ line)) < 1e-12
    if shift:
        assert np.abs(line - regression_line()).max() > 1e-11

    # Plain training: theta - lr d/dtheta mean (x w + b - y)^2.
    start = cs.run(schedule, cs.methods.finetune(), model, replace(fp64, epochs=0)).params
    w, b = (next(p for n, p in start.items() if n.endswith(end)).numpy() for end in ("weight", "bias"))
    gap = x @ w[0] + b[0] - y
    stepped = cs.run(schedule, cs.methods.finetune(), model, fp64).params
    got = next(p for n, p in stepped.items() if n.endswith("weight")).numpy()
    assert np.abs(got[0] - (w[0] - 0.1 * 2 * (gap @ x) / len(x))).max() < 1e-12


def regression_line():
    """The ridge line of the data that are not moved."""
    x, y, _ = regression()
    centred = x - x.mean(0)
    gram = centred.T @ centred
    return np.linalg.solve(gram + 0.1 * np.trace(gram) / 3 * np.eye(3), centred.T @ (y - y.mean()))


def test_a_run_in_float32_converts_float64_data_once():
    """The same bits as from data that were float32 before; what sources share stays one object."""
    runs = []
    for dtype in (np.float32, np.float64):
        _, _, source = regression(dtype=dtype)
        result = cs.run(cs.settings.continual([source]), cs.methods.finetune(), cs.models.linear(3, 1))
        runs.append(result)
    assert same(runs[0].params, runs[1].params) and runs[0].score == runs[1].score
    assert runs[1].agent.schedule.source("r").train.x.dtype == torch.float32

    _, _, source = regression()
    clients = [source.map(name=f"c{i}") for i in range(3)]
    schedule = cs.settings.federated(clients, 2)
    short = in_precision(schedule, torch.float32)
    assert len({id(s.test) for s in schedule.sources}) == len({id(s.test) for s in short.sources}) == 1
    assert short.judged is short.sources or short.judged[0].test is short.sources[0].test
    # Examples on their way to a step are these, and no copies.
    again = short.sources[0].train.to(torch.device("cpu"), torch.float32)
    assert again.x is short.sources[0].train.x and again.y is short.sources[0].train.y
    assert in_precision(short, torch.float32).sources[0].train is short.sources[0].train


@pytest.mark.parametrize("what", ["x", "y"])
def test_float64_data_beyond_float32_are_refused_by_name(what):
    x, y, _ = regression()
    (x if what == "x" else y)[7] = 1e300
    source = cs.data.arrays(x, y, validation=0, kind="value", name="huge")
    schedule = cs.settings.continual([source])
    with pytest.raises(ConsilienceError, match="numbers of 'huge' must fit float32, got one beyond 3.4e38"):
        cs.run(schedule, cs.methods.finetune(), cs.models.linear(3, 1))
