"""Every method equals an independent restatement in plain torch: the same batches, autograd, a loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience.aggregators._mean import Mean
from consilience.consolidators.statistics import solve
from consilience.core.aggregator import Cone
from consilience.core.batch import Batch
from consilience.core.contexts import Begun, Learned, Routing, Row, StepView
from consilience.core.correction import Correction
from consilience.core.errors import Refusal
from consilience.core.losses import CrossEntropy
from consilience.core.message import Message, Module, Private, Statistics
from consilience.core.method import Method
from consilience.core.metrics import summary
from consilience.core.optimiser import SGD, Adam, Averaging
from consilience.core.params import Layout, key, same
from consilience.core.schedule import Evaluate, Exchange, Train
from consilience.core.source import Source, Target, Tensors
from consilience.corrections.baselines import Cumulative
from consilience.corrections.fisher import fisher
from consilience.corrections.moments import Moments
from consilience.corrections.quadratic import EWC
from consilience.corrections.rehearsal import ER
from consilience.mappers.confidence import Average, MinEntropy
from consilience.mappers.mixture import GaussianMixture, NearestMean
from restate import (
    BATCH,
    EPOCHS,
    LR,
    ME,
    A,
    B,
    C,
    D,
    E,
    batches,
    entries,
    final,
    fit,
    mlp,
    near,
    phases,
    plain,
    sgd,
    source,
    training,
)

# optimisers


def quadratic_steps(ours, theirs, lr, n=20):
    g = torch.Generator().manual_seed(0)
    h, target = (
        torch.rand(7, generator=g, dtype=torch.float64) + 0.1,
        torch.randn(7, generator=g, dtype=torch.float64),
    )
    theta = torch.randn(7, generator=g, dtype=torch.float64)
    leaf = theta.clone().requires_grad_()
    optimiser, state = theirs([leaf]), ours.init(theta)
    for _ in range(n):
        grad = h * (theta - target) + theta.sin()
        direction, state = ours.update(grad, state, theta)
        theta = theta - lr * direction
        leaf.grad = (h * (leaf - target) + leaf.sin()).detach()
        optimiser.step()
        assert (theta - leaf).abs().max() < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(momentum, decay, nesterov):
    if nesterov and not momentum:
        return
    quadratic_steps(
        SGD(momentum, decay, nesterov),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, weight_decay=decay, nesterov=nesterov),
        0.1,
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_and_adamw_are_torchs(decay):
    quadratic_steps(
        Adam(weight_decay=decay), lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=decay), 0.01
    )
    quadratic_steps(
        Adam(weight_decay=decay, decoupled=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=decay),
        0.01,
    )
    quadratic_steps(
        Adam(0.8, 0.95, 1e-3), lambda p: torch.optim.Adam(p, lr=0.3, betas=(0.8, 0.95), eps=1e-3), 0.3
    )


def test_averaging_is_the_running_mean():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 5, generator=g, dtype=torch.float64)
    theta, o = torch.randn(5, generator=g, dtype=torch.float64), Averaging()
    state = o.init(theta)
    for t in range(6):
        direction, state = o.update(theta - rows[t], state, theta)
        theta = theta - direction
        assert (theta - rows[: t + 1].mean(0)).abs().max() < 1e-14


# plain training


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_finetuning_is_the_plain_loop(optimiser):
    net = plain()
    made = {
        "sgd": lambda: sgd(net, weight_decay=0.01),
        "adam": lambda: torch.optim.Adam(net.parameters(), lr=LR, weight_decay=0.01),
        "adamw": lambda: torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.01),
    }[optimiser]
    fit(net, A, optimiser=made())
    fit(net, B, optimiser=made())
    near(
        final(
            cs.settings.continual([A, B], "domain"),
            cs.methods.finetune(),
            optimiser=optimiser,
            weight_decay=0.01,
        ),
        entries(net),
    )


def test_task_labels_mask_the_other_classes():
    s = [source("a", 20, (0, 1), 1), source("b", 20, (2, 3), 2)]
    net = plain()
    for one in s:
        keep = list(one.classes)
        fit(net, one, lambda net, x, y, *_: F.cross_entropy(net(x)[:, keep], y - keep[0]))  # noqa: B023
    near(final(cs.settings.continual(s, "task"), cs.methods.finetune()), entries(net))


def test_sources_of_one_task_share_the_union_of_their_classes():
    s = [source("a", 20, (0, 1), 1, task="t"), source("b", 20, (2, 3), 2, task="t")]
    schedule = cs.settings.continual(s, "task")
    assert schedule.frame.tasks == {"t": (0, 1, 2, 3)}
    net = plain()
    fit(fit(net, s[0]), s[1])
    near(final(schedule, cs.methods.finetune()), entries(net))


def test_a_regression_trains_on_the_mean_squared_error():
    s = [source("a", 20, seed=1, kind="value"), source("b", 20, seed=2, kind="value")]
    net = plain()
    for one in s:
        fit(net, one, lambda net, x, y, *_: F.mse_loss(net(x)[:, :2], y))
    r = cs.run(cs.settings.continual(s), cs.methods.finetune(), mlp(), training())
    near(r.agent.state.params, entries(net))
    assert r.metric == "r2"
    p = r.agent.predict(s[0].test.x)
    near({"p": p}, {"p": net(s[0].test.x)[:, :2].detach()})


def test_a_stream_is_its_tensors_bit_for_bit():
    x, y = A.train.whole()
    data = torch.utils.data.TensorDataset(x, y)
    held = cs.data.arrays(x, y, name="a", space="s")
    streamed = cs.data.stream(data, name="a", space="s")
    for m in (cs.methods.finetune(), cs.methods.ewc(1.0), cs.methods.er(10)):
        both = []
        for one in (held, streamed):
            schedule = cs.settings.continual([one, one.map(name="again", task="again")], "domain")
            both.append(final(schedule, m, mlp()))
        assert same(*both), m.name


def test_precisions():
    s = [source("a", 30, seed=1, dtype=torch.float32), source("b", 30, seed=2, dtype=torch.float32)]
    for m in (cs.methods.finetune(), cs.methods.ewc(1.0), cs.methods.lwf(), cs.methods.er(20)):
        end = {p: final(cs.settings.continual(s, "domain"), m, precision=p) for p in ("fp32", "fp64", "bf16")}
        assert {p: end[p]["1.weight"].dtype for p in end} == {
            "fp32": torch.float32,
            "fp64": torch.float64,
            "bf16": torch.float32,
        }
        wide = {n: t.double() for n, t in end["fp32"].items()}
        if m.name != "ewc":  # its labels are drawn from probabilities that differ in the last bits
            near(wide, end["fp64"], 1e-4)
        assert not same(end["bf16"], end["fp32"])
        near({n: t.double() for n, t in end["bf16"].items()}, end["fp64"], 0.2)


# EWC and the Fisher


def naive_fisher(net, s, labels="all", keep=None, targets=None):
    """One backward pass a sample and class."""
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    x, y = s.train.whole()
    for i in range(len(x)):
        out = net(x[i : i + 1])[0]
        logp = (out if keep is None else out.masked_fill(~keep, -torch.inf)).log_softmax(0)
        classes = {"data": [int(y[i])], "all": range(len(out))}.get(labels) or [int(targets[i])]
        for c in classes:
            weight = logp[c].exp().detach() if labels == "all" else 1.0
            if keep is not None and not keep[c]:
                continue
            grads = torch.autograd.grad(logp[c], list(net.parameters()), retain_graph=True)
            for (n, _), g in zip(net.named_parameters(), grads, strict=True):
                total[n] += weight * g**2 / len(x)
    return total


def learned(model, params, s, buffers=None, task=None, seed=0):
    trainable = {n: p for n, p in params.items() if not model.frozen(n) and p.is_floating_point()}
    return Learned(
        model, params, buffers or {}, {}, s, task, Layout.of(trainable), torch.Generator().manual_seed(seed)
    )


def double(model, seed=0):
    params, buffers = model.init(key(seed, "init"))
    return {n: p.double() for n, p in params.items()}, {
        n: b.double() if b.is_floating_point() else b for n, b in buffers.items()
    }


def test_the_fisher_is_the_sum_over_samples():
    params, _ = double(mlp())
    net, keep = plain(), torch.tensor([True, True, True, False])
    sub = source("a", 12, (0, 1, 2), 4)
    for s, task, mask in ((A, None, None), (sub, "t", keep)):
        here = learned(mlp(), params, s, task=task)
        near(fisher(here, "data", chunk=7), naive_fisher(net, s, "data", mask))
        near(fisher(here, "all", chunk=7), naive_fisher(net, s, "all", mask))
        with torch.no_grad():
            out = net(s.train.x)
            p = (out if mask is None else out.masked_fill(~mask, -torch.inf)).softmax(1)
        drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0))[:, 0]
        near(fisher(here, "model"), naive_fisher(net, s, "model", mask, drawn))
    few = fisher(learned(mlp(), params, A), "data", samples=5)
    chosen = A.train.select(torch.randperm(30, generator=torch.Generator().manual_seed(0))[:5])
    near(few, naive_fisher(net, A.map(train=chosen), "data"))


def test_draws_of_the_models_labels_average_to_all_classes():
    params, _ = double(mlp())
    draws = [fisher(learned(mlp(), params, A, seed=i), "model") for i in range(400)]
    every = fisher(learned(mlp(), params, A), "all")
    for n in every:
        stacked = torch.stack([d[n] for d in draws])
        error = stacked.std(0) / 20
        assert ((stacked.mean(0) - every[n]).abs() <= 5 * error + 1e-12).all()


class Residual(nn.Module):
    """Strides, padding, no biases, group norm, a sum of two ways, and activations that work in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=1)
        self.way = nn.Conv2d(4, 4, 1, stride=2)
        self.last = nn.Linear(4 * 9, C, bias=False)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)), inplace=True)
        y = self.second(x)
        y += self.way(x)
        return self.last(F.leaky_relu(y, inplace=True).flatten(1))


LAYERED = {
    "mlp": (mlp, A),
    "in place": (
        lambda: cs.models.wrap(
            lambda: nn.Sequential(nn.Linear(D, 5), nn.ReLU(inplace=True), nn.Linear(5, C, bias=False))
        ),
        A,
    ),
    "conv": (
        lambda: cs.models.conv(C, size=8, width=2),
        source("i", 9, seed=5, d=64).map(x=lambda x: x.view(-1, 1, 8, 8)),
    ),
    "residual": (
        lambda: cs.models.wrap(Residual),
        source("j", 9, seed=6, d=36).map(x=lambda x: x.view(-1, 1, 6, 6)),
    ),
}


@pytest.mark.parametrize("name", LAYERED)
def test_fisher_and_sensitivity_by_layers_are_the_vmapped_ones(name, monkeypatch):
    from consilience.corrections import fisher as room

    make, s = LAYERED[name]
    model = make()
    params, buffers = double(model)
    params = {
        n: p.detach() + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        for n, p in params.items()
    }
    here = lambda: learned(model, params, s, buffers)  # noqa: E731
    assert room._layers(here()) is not None
    made = [room.fisher(here(), labels, chunk=4) for labels in ("data", "all", "model")] + [
        room.sensitivity(here(), chunk=4)
    ]
    with monkeypatch.context() as m:
        m.setattr(room, "NUMBERS", 200)
        sliced = [room.fisher(here(), "data", chunk=4), room.sensitivity(here(), chunk=4)]
    monkeypatch.setattr(room, "_layers", lambda learned: None)
    slow = [room.fisher(here(), labels, chunk=4) for labels in ("data", "all", "model")] + [
        room.sensitivity(here(), chunk=4)
    ]
    for fast, wanted in zip([*made, *sliced], [*slow, slow[0], slow[3]], strict=True):
        assert any(v.any() for v in wanted.values())
        near(fast, wanted, 1e-12)


def naive_by_model(model, params, buffers, s, task, keep=None):
    """Like `naive_fisher` with the data's labels, through the pure model."""
    names = [n for n in params if not model.frozen(n)]
    total = {n: torch.zeros_like(params[n]) for n in names}
    for x, y in zip(*s.train.whole(), strict=True):
        leaves = {n: p.clone().requires_grad_(n in names) for n, p in params.items()}
        out = model(leaves, buffers, x[None], task, False)[0]
        out = out if keep is None else out.masked_fill(~keep, -torch.inf)
        grads = torch.autograd.grad(
            -F.cross_entropy(out, y[None]), [leaves[n] for n in names], allow_unused=True
        )
        for n, g in zip(names, grads, strict=True):
            if g is not None:
                total[n] += g**2 / len(s.train)
    return total


def test_the_fisher_of_other_models():
    g = torch.Generator().manual_seed(0)
    images = source("i", 8, seed=5, d=64)
    images = images.map(x=lambda x: x.view(-1, 1, 8, 8))
    conv = cs.models.conv(C, size=8, width=2)
    params, buffers = double(conv)
    near(
        fisher(learned(conv, params, images, buffers), "data"),
        naive_by_model(conv, params, buffers, images, None),
        1e-12,
    )

    heads = cs.models.multi_head(mlp(), C)
    params, buffers = double(heads)
    for s in (source("a", 10, (0, 1), 1, task="a"), source("b", 10, (2, 3), 2, task="b")):
        params, buffers = heads.grow(params, buffers, s, g)
    keep = torch.tensor([False, False, True, True])
    near(
        fisher(learned(heads, params, s, buffers, "b"), "data"),
        naive_by_model(heads, params, buffers, s, "b", keep),
        1e-12,
    )

    class Tokens(nn.Module):  # linear layers on vectors, but several of them a sample
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(2, 3), nn.Linear(3, C)

        def forward(self, x):
            return self.outer(self.inner(x.reshape(-1, 2)).relu().reshape(-1, 3, 3).mean(1))

    tokens = cs.models.wrap(Tokens)
    params, _ = double(tokens)
    near(fisher(learned(tokens, params, A), "data"), naive_by_model(tokens, params, {}, A, None), 1e-12)

    value = source("v", 9, seed=1, kind="value")
    params, _ = double(mlp())
    made = fisher(learned(mlp(), params, value), "data")
    net = plain()
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for x, y in zip(*value.train.whole(), strict=True):
        grads = torch.autograd.grad(-0.5 * (net(x[None])[0, :2] - y).square().sum(), list(net.parameters()))
        for n, gr in zip(total, grads, strict=True):
            total[n] += gr**2 / 9
    near(made, total)


def penalised(net, anchors, strength):
    return sum(
        strength / 2 * (f[n] * (p - at[n]) ** 2).sum() for f, at in anchors for n, p in net.named_parameters()
    )


def test_ewc_is_the_explicit_sum_over_sources():
    net, anchors = plain(), []
    for s in (A, B, E):
        fit(net, s, lambda net, x, y, *_: F.cross_entropy(net(x), y) + penalised(net, anchors, 3.0))
        anchors.append((naive_fisher(net, s), entries(net)))
    r = cs.run(cs.settings.continual([A, B, E], "domain"), cs.methods.ewc(3.0, "all"), mlp(), training())
    near(r.agent.state.params, entries(net), 1e-11)

    job = r.agent.prepare(("c",))  # revisited: the sums of the two others, one vector each
    ((c, ctx),) = job.corrections
    assert isinstance(c, EWC)
    layout = job.layout
    assert {k: tuple(v.shape) for k, v in ctx.flat.items()} == {
        "precision": (layout.size,),
        "shift": (layout.size,),
    }
    near({"p": ctx.flat["precision"]}, {"p": sum(layout.flatten(f) for f, _ in anchors[:2])}, 1e-11)

    leaf = torch.randn(layout.size, dtype=torch.float64, generator=key(0)).requires_grad_()
    ours = torch.autograd.grad(c.penalty(SimpleNamespace(theta=leaf), ctx), leaf)[0]
    at = {n: p.detach().requires_grad_() for n, p in layout.split(leaf).items()}
    naive = sum(1.5 * (f[n] * (at[n] - old[n]) ** 2).sum() for f, old in anchors[:2] for n in at)
    near(
        {"g": ours},
        {"g": layout.flatten(dict(zip(at, torch.autograd.grad(naive, list(at.values())), strict=True)))},
        1e-11,
    )


def test_a_revisited_sources_own_summary_is_left_out():
    plan = [step for n in "aba" for step in (Train({"agent": (n,)}), Exchange(ME))] + [Evaluate("end")]
    net, anchors = plain(), {}
    for visit, s in ((0, A), (0, B), (1, A)):
        others = [v for n, v in anchors.items() if n != s.name]
        fit(
            net,
            s,
            lambda net, x, y, *_: F.cross_entropy(net(x), y) + penalised(net, others, 3.0),  # noqa: B023
            visit,
        )
        anchors[s.name] = (naive_fisher(net, s), entries(net))
    near(final(phases([A, B], plan), cs.methods.ewc(3.0, "all")), entries(net), 1e-11)


@pytest.mark.parametrize(
    "method",
    [cs.methods.ewc(0.0), cs.methods.si(0.0), cs.methods.lwf(0.0), cs.methods.er(0), cs.methods.fedprox(0.0)],
)
def test_strength_zero_is_plain_training_bit_for_bit(method):
    for schedule in (
        cs.settings.continual([A, B, E], "domain"),
        cs.settings.federated_continual([[A, B], [E]], 2, scenario="domain"),
    ):
        assert same(final(schedule, method), final(schedule, cs.methods.finetune()))


# SI


def si_loop(net, s, omegas, strength, xi, path=None, visit=0, second=None):
    """One learn: the path integral of the task's own gradient, then Omega; s and `second` in one step each
    half."""
    path = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    start, optimiser = entries(net), sgd(net)
    steps = max(-(-len(o.train) // BATCH) for o in (s, second) if o)
    streams = [batches(o, visit, steps=steps) for o in (s, second) if o]
    for parts in zip(*streams, strict=True):
        own = sum(F.cross_entropy(net(x), y) for *_, x, y in parts) / len(parts)
        g = torch.autograd.grad(own, list(net.parameters()), retain_graph=True)
        before = entries(net)
        total = {
            n: sum(o[n] for o, _ in omegas).clamp(min=0) if omegas else torch.zeros_like(p)
            for n, p in start.items()
        }
        penalty = sum(strength * (total[n] * (p - start[n]) ** 2).sum() for n, p in net.named_parameters())
        optimiser.zero_grad()
        (own + penalty).backward()
        optimiser.step()
        for (n, p), gi in zip(net.named_parameters(), g, strict=True):
            path[n] -= gi * (p.detach() - before[n])
    end = entries(net)
    return {n: path[n] / ((end[n] - start[n]) ** 2 + xi) for n in end}, end


def test_si_restated():
    net, omegas = plain(), []
    for s in (A, B, E):
        omegas.append(si_loop(net, s, omegas, 2.0, 0.01))
    near(final(cs.settings.continual([A, B, E], "domain"), cs.methods.si(2.0, 0.01)), entries(net), 1e-10)


def test_si_of_sources_learned_together_adds_to_the_whole_path():
    net = plain()
    omegas = [si_loop(net, A, [], 2.0, 0.01, second=B)]
    si_loop(net, E, omegas, 2.0, 0.01)
    plan = [
        Train({"agent": ("a", "b")}),
        Exchange(ME),
        Train({"agent": ("c",)}),
        Exchange(ME),
        Evaluate("end"),
    ]
    near(final(phases([A, B, E], plan), cs.methods.si(2.0, 0.01)), entries(net), 1e-10)


# LwF


def distil(student, teacher, t=2.0):
    p, q = (teacher / t).softmax(1), (student / t).softmax(1)
    return t * t * (p * (p.log() - q.log())).sum(1).mean()


TASKS = [source("a", 20, (0, 1), 1), source("b", 20, (2, 3), 2), source("c", 18, (0, 1), 3)]


@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize("match", ["probabilities", "logits"])
def test_lwf_restated(scenario, match):
    net, seen = plain(), []
    for s in TASKS:
        teacher, own = copy.deepcopy(net), list(s.classes)
        groups = seen if scenario == "task" else [sorted({c for g in seen for c in g})] if seen else []

        def loss(net, x, y, *_):
            out, old = net(x), teacher(x).detach()  # noqa: B023
            value = (
                F.cross_entropy(out[:, own], y - own[0])  # noqa: B023
                if scenario == "task"
                else F.cross_entropy(out, y)
            )
            for g in groups:  # noqa: B023
                pair = out[:, g], old[:, g]
                value = value + 0.7 * (
                    distil(*pair) if match == "probabilities" else ((pair[0] - pair[1]) ** 2).mean()
                )
            return value

        fit(net, s, loss)
        seen.append(own)
    near(final(cs.settings.continual(TASKS, scenario), cs.methods.lwf(0.7, match=match)), entries(net), 1e-11)


def test_lwf_of_values_keeps_the_outputs():
    s = [source("a", 20, seed=1, kind="value"), source("b", 20, seed=2, kind="value")]
    net = plain()
    fit(net, s[0], lambda net, x, y, *_: F.mse_loss(net(x)[:, :2], y))
    old = copy.deepcopy(net)
    fit(
        net,
        s[1],
        lambda net, x, y, *_: (
            F.mse_loss(net(x)[:, :2], y) + F.mse_loss(net(x)[:, :2], old(x)[:, :2].detach())
        ),
    )
    # Values have no probabilities, so that both ways to match are one.
    for match in ("logits", "probabilities"):
        near(final(cs.settings.continual(s), cs.methods.lwf(match=match)), entries(net))


def test_the_first_source_of_lwf_is_plain_training():
    plan = [
        Train({"agent": ("a",)}),
        Exchange(ME),
        Evaluate("a"),
        Train({"agent": ("b",)}),
        Exchange(ME),
        Evaluate("b"),
    ]
    seen = {}

    def after_receive(self, before, after, memory, fresh):
        seen.setdefault("first", {n: p.clone() for n, p in after.params.items()})
        return memory

    cs.run(
        phases([A, B], plan),
        cs.methods.lwf() + Method("", (toy(after_receive=after_receive),)),
        mlp(),
        training(),
    )
    assert same(seen["first"], final(cs.settings.continual([A], "domain"), cs.methods.finetune()))


def test_lwf_of_heads_asks_each_through_its_own_head():
    model = cs.models.multi_head(mlp(), C)
    s = [source("a", 20, (0, 1), 1), source("b", 20, (2, 3), 2)]
    trunk = nn.Linear(D, 5).double()
    init = double(mlp())[0]
    trunk.load_state_dict({"weight": init["1.weight"], "bias": init["1.bias"]})
    heads = {}
    for one in s:
        head = nn.Linear(5, 2).double()
        p, _ = model.grow({"trunk.1.weight": init["1.weight"]}, {}, one, key(0, one.name, "grow"))
        head.load_state_dict({k: p[f"heads.{one.name}.{k}"] for k in ("weight", "bias")})
        heads[one.name] = head
        teacher = copy.deepcopy((trunk, heads))
        used = [*trunk.parameters(), *(p for h in heads.values() for p in h.parameters())]
        optimiser = torch.optim.SGD(used, lr=LR, momentum=0.9)
        for *_, x, y in batches(one):
            value = F.cross_entropy(head(trunk(x).relu()), y - one.classes[0])
            if one.name == "b":
                with torch.no_grad():
                    old = teacher[1]["a"](teacher[0](x).relu())
                value = value + distil(heads["a"](trunk(x).relu()), old)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    expected = {f"trunk.1.{k}": p.detach() for k, p in trunk.named_parameters()}
    expected |= {f"heads.{t}.{k}": p.detach() for t, h in heads.items() for k, p in h.named_parameters()}
    near(final(cs.settings.continual(s, "task"), cs.methods.lwf(), model), expected, 1e-11)


# federated


def clients(n=3):
    return [source(f"c{i}", 10 + 7 * i, seed=10 + i) for i in range(n)]


def federate(s, rounds, mu=0.0, momentum=0.9, outer=None, epochs=EPOCHS, batch=BATCH):
    """FedAvg (and FedProx) by hand; `outer(theta, aggregate)` is the server's step."""
    server = entries(plain())
    for r in range(rounds):
        ends = []
        for one in s:
            net = plain(params=server)

            def pull(net, start=server):
                return sum(mu / 2 * ((p - start[n]) ** 2).sum() for n, p in net.named_parameters())

            fit(
                net,
                one,
                lambda net, x, y, *_, pull=pull: F.cross_entropy(net(x), y) + pull(net),
                r,
                sgd(net, momentum=momentum),
                epochs=epochs,
                batch=batch,
            )
            ends.append((len(one.train), entries(net)))
        total = sum(n for n, _ in ends)
        mean = {k: sum(n / total * e[k] for n, e in ends) for k in server}
        server = outer(server, mean) if outer else mean
    return server


def test_fedavg_is_the_mean_by_size():
    near(
        final(cs.settings.federated(clients(), 2, scenario="domain"), cs.methods.fedavg()),
        federate(clients(), 2),
    )


def test_the_order_of_clients_changes_nothing():
    s = clients(4)
    ends = [
        final(cs.settings.federated(o, 2, scenario="domain"), cs.methods.fedavg())
        for o in (s, [s[2], s[0], s[3], s[1]])
    ]
    near(*ends, 1e-12)


@pytest.mark.parametrize("mu", [0.1, 5.0])
def test_fedprox_restated(mu):
    near(
        final(cs.settings.federated(clients(), 2, scenario="domain"), cs.methods.fedprox(mu)),
        federate(clients(), 2, mu),
        1e-11,
    )


def test_the_first_local_step_of_fedprox_does_not_know_mu():
    once = {"epochs": 1, "batch_size": 100}
    ends = [
        final(cs.settings.federated(clients(), 3, scenario="domain"), cs.methods.fedprox(mu), **once)
        for mu in (0.1, 7.0)
    ]
    assert same(*ends)
    assert same(
        ends[0], final(cs.settings.federated(clients(), 3, scenario="domain"), cs.methods.fedavg(), **once)
    )


def test_outer_optimisers_restated():
    velocity, m, v, past = {}, {}, {}, []

    def momentum(theta, mean):
        for k in theta:
            velocity[k] = 0.5 * velocity.get(k, 0) + theta[k] - mean[k]
        return {k: theta[k] - 0.8 * velocity[k] for k in theta}

    def adam(theta, mean):
        for k in theta:
            d = mean[k] - theta[k]
            m[k], v[k] = 0.9 * m.get(k, 0) + 0.1 * d, 0.99 * v.get(k, 0) + 0.01 * d * d
        return {k: theta[k] + 0.1 * m[k] / (v[k].sqrt() + 1e-3) for k in theta}

    def averaging(theta, mean):
        past.append(mean)
        return {k: sum(p[k] for p in past) / len(past) for k in theta}

    for method, outer in (
        (cs.methods.fedavg(outer_momentum=0.5, outer_lr=0.8), momentum),
        (cs.methods.fedavg("adam", 0.1), adam),
        (cs.methods.fedavg("averaging"), averaging),
    ):
        near(
            final(cs.settings.federated(clients(), 3, scenario="domain"), method),
            federate(clients(), 3, outer=outer),
            1e-11,
        )


@pytest.mark.parametrize(
    "method",
    [
        cs.methods.finetune(),
        cs.methods.ewc(3.0),
        cs.methods.si(),
        cs.methods.lwf(),
        cs.methods.fedprox(),
        cs.methods.fed3r(),
    ],
    ids=lambda m: m.name,
)
def test_one_client_a_round_without_revisits_is_continual_learning(method):
    one = cs.settings.federated([A, B, E], 3, 1, "cyclic", scenario="domain")
    assert same(final(one, method), final(cs.settings.continual([A, B, E], "domain"), method))


def test_clients_hear_of_each_others_fisher():
    s = clients(2)
    server, known = entries(plain()), {}
    for r in range(3):
        ends = []
        for one in s:
            net = plain(params=server)
            others = [v for n, v in known.items() if n != one.name]
            fit(
                net,
                one,
                lambda net, x, y, *_: F.cross_entropy(net(x), y) + penalised(net, others, 2.0),  # noqa: B023
                r,
            )
            ends.append((one, net))
        known = {one.name: (naive_fisher(net, one), entries(net)) for one, net in ends}
        total = sum(len(one.train) for one in s)
        server = {n: sum(len(one.train) / total * entries(net)[n] for one, net in ends) for n in server}
    near(final(cs.settings.federated(s, 3, scenario="domain"), cs.methods.ewc(2.0, "all")), server, 1e-11)


# rehearsal


def drawn(er, s, seed):
    return er.summarise(
        SimpleNamespace(source=s, generator=torch.Generator().manual_seed(seed), task=None, order=0), None
    )


def test_the_buffer_is_a_reservoir():
    from scipy.stats import chi2

    sizes, er, runs = {"a": 45, "b": 20, "c": 35}, ER(20), 1200
    s = {
        n: Source(
            n,
            t := Tensors(torch.arange(k)[:, None], torch.zeros(k, dtype=torch.long)),
            t,
            t,
            (("s", "0"),),
            (0,),
        )
        for n, k in sizes.items()
    }
    counts = {n: torch.zeros(k) for n, k in sizes.items()}
    for run in range(runs):
        memory, seen = {}, 0
        for i, n in enumerate(s):
            memory[n], seen = drawn(er, s[n], 3 * run + i), seen + sizes[n]
            memory = dict(er.trim(memory, SimpleNamespace(source=s[n], generator=torch.Generator())))
            assert sum(len(m.tensors["y"]) for m in memory.values()) == min(20, seen)
        for n, m in memory.items():
            counts[n][m.tensors["x"][:, 0]] += 1
    observed, p = torch.cat(list(counts.values())), 0.2
    statistic = float(((observed - runs * p) ** 2 / (runs * p * (1 - p))).sum()) * 99 / 100
    assert chi2.ppf(1e-4, 99) < statistic < chi2.ppf(1 - 1e-4, 99)
    by_source = {n: float(c.sum()) / runs for n, c in counts.items()}
    for n, k in sizes.items():
        assert abs(by_source[n] - 20 * k / 100) < 0.25, by_source


def reservoir(size, *seen):
    """(x, y) kept after these sources."""
    keys = [
        torch.rand(len(s.train), generator=key(0, s.name, 0, "ER", "summarise"), dtype=torch.float64)
        for s in seen
    ]
    bound = torch.cat(keys).sort().values[size - 1]
    kept = []
    for s, k in zip(seen, keys, strict=True):
        kept.append((s.train.x[k <= bound], s.train.y[k <= bound]))
    return torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept])


def test_er_restated():
    net = plain()
    fit(net, A)
    for s, past in ((B, (A,)), (E, (A, B))):
        bx, by = reservoir(12, *past)
        assert len(by) == 12

        def loss(net, x, y, epoch, step):
            i = torch.randint(len(by), (5,), generator=key(0, s.name, 0, epoch, step, "ER"))  # noqa: B023
            return (F.cross_entropy(net(x), y) + F.cross_entropy(net(bx[i]), by[i])) / 2  # noqa: B023

        fit(net, s, loss)
    r = cs.run(cs.settings.continual([A, B, E], "domain"), cs.methods.er(12, 5), mlp(), training())
    near(r.agent.state.params, entries(net))
    kept = r.agent.state.memory["ER"]
    assert sum(len(m.tensors["y"]) for m in kept.values()) == 12
    assert all(isinstance(m, Private) for m in kept.values())
    assert all("ER" not in m.items for m in r.agent.send({}))
    with pytest.raises(TypeError, match="Private"):
        Message("agent", "a", 1, 1, "", "", {"ER": kept["a"]})


def test_cumulative_training_is_on_the_union():
    net, pool = plain(), []
    for learns, s in enumerate((A, B, E)):
        pool.append(s)
        union = Source.union("+".join(p.name for p in pool), pool)
        fit(net, union, visit=learns)
    near(final(cs.settings.continual([A, B, E], "domain"), Method("joint", (Cumulative(),))), entries(net))


def test_a_pool_is_shuffled_anew_in_every_round():
    s = clients(2)
    plan = [Train({"agent": ("c0",)}), Exchange(ME)]
    for _ in range(2):
        plan += [Train({"agent": ("c1",)}), Exchange(ME)]
    net = fit(plain(), s[0])
    for learns in (1, 2):
        fit(net, Source.union("c0+c1", s), visit=learns)
    near(final(phases(s, [*plan, Evaluate("end")]), cs.methods.cumulative()), entries(net))


# closed form


def ridge(sources, strength, model=None, scale=1.0):
    """W [d + 1, C] from all examples at once."""
    model = model or mlp()
    params, buffers = double(model)
    x, y = (torch.cat(t) for t in zip(*(s.train.whole() for s in sources), strict=True))
    psi = model.features(params, buffers, x)
    psi = torch.cat([psi, torch.ones(len(psi), 1).double()], 1)
    return (
        torch.linalg.solve(
            psi.T @ psi + strength * torch.eye(psi.shape[1]).double(), psi.T @ F.one_hot(y, C).double()
        ),
        psi,
        y,
    )


def head_of(params):
    return torch.cat([params["3.weight"].T, params["3.bias"][None]])


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_fed3r_is_the_centralised_solution_whatever_the_schedule():
    s = [source(f"s{i}", 20 + 5 * i, seed=20 + i) for i in range(4)]
    w, *_ = ridge(s, 0.01)
    x, y = (torch.cat(t) for t in zip(*(one.train.whole() for one in s), strict=True))
    order = torch.randperm(len(y), generator=key(1))
    resplit = [
        s[0].map(name=f"p{i}", train=Tensors(x[j], y[j]), task=None) for i, j in enumerate(order.split(17))
    ]
    settings = [
        cs.settings.continual(s, "domain"),
        cs.settings.continual(s[::-1], "domain"),
        cs.settings.continual(resplit, "domain"),
        cs.settings.multitask(s, "domain", rounds=2),
        cs.settings.federated(s, 2, scenario="domain"),
        cs.settings.federated(resplit, 6, 2, "cyclic", scenario="domain"),
        cs.settings.federated_continual([s[:2], s[2:]], 2, scenario="domain"),
        cs.settings.merging(s, scenario="domain"),
        cs.settings.exmodel(s, scenario="domain"),
        cs.settings.skill([s[:2], s[2:]], scenario="domain"),
        cs.settings.skill(s, graph="ring", scenario="domain"),
    ]
    for schedule in settings:
        params = final(schedule, cs.methods.fed3r())
        assert relative(head_of(params), w) < 1e-10, schedule.setting
        assert torch.equal(params["1.weight"], double(mlp())[0]["1.weight"])


def test_fed3r_options():
    s = [
        source("a", 30, (0, 1, 2), 1).map(classes=(0, 1, 2, 3)),
        source("b", 25, (0, 1, 2), 2).map(classes=(0, 1, 2, 3)),
    ]
    schedule = cs.settings.continual(s, "domain")
    w, psi, y = ridge(s, 0.02)
    got = head_of(final(schedule, cs.methods.fed3r(0.02)))
    assert relative(got, w) < 1e-10
    assert not got[:, 3].any()  # a class without examples

    mean = head_of(final(schedule, cs.methods.fed3r(0.02, average=True)))
    leaf = mean.clone().requires_grad_()
    objective = (psi @ leaf - F.one_hot(y, C)).square().sum() / len(y) + 0.02 * leaf.square().sum()
    assert float(torch.autograd.grad(objective, leaf)[0].abs().max()) < 1e-12

    norm = w[:-1].norm(dim=0)
    norm[norm == 0] = 1e-6
    assert relative(head_of(final(schedule, cs.methods.fed3r(0.02, normalise=True))), w / norm) < 1e-10

    twice = cs.settings.continual([s[0], s[0].map(name="again", task=None)], "domain")
    assert relative(head_of(final(twice, cs.methods.fed3r(0.02))), ridge(s[:1], 0.01)[0]) < 1e-10


def test_sums_forget_a_client_and_learn_a_sample_exactly():
    params, _ = double(mlp())
    sums = [Moments().summarise(learned(mlp(), params, s), None) for s in (A, B, E)]
    total = sums[0] + sums[1] + sums[2]
    left = {k: total.tensors[k] - sums[1].tensors[k] for k in total.tensors}
    assert relative(solve(left["second"], left["first"], 0.01), ridge([A, E], 0.01)[0]) < 1e-10
    assert float(total.tensors["count"].sum()) == len(A.train) + len(B.train) + len(E.train)

    _, psi, y = ridge([A, B, E], 0.5)
    inverse, b = torch.eye(psi.shape[1]).double() / 0.5, torch.zeros(psi.shape[1], C).double()
    for row, c in zip(psi, y, strict=True):  # Sherman and Morrison
        u = inverse @ row
        inverse -= torch.outer(u, u) / (1 + row @ u)
        b[:, c] += row
    assert relative(solve(total.tensors["second"], total.tensors["first"], 0.5), inverse @ b) < 1e-10


# mappers


def routing(x, keys, probabilities=None):
    return Routing(x, lambda: x, lambda: probabilities, keys)


KEYS = [("m", "a"), ("m", "b"), ("m", "c")]


def chosen(mapper, x, items):
    weights = mapper.route(routing(x, list(items)), items)
    assert torch.equal(weights.sum(1), torch.ones(len(x), dtype=weights.dtype))
    return weights.argmax(1)


def blobs(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=g).double() * 2


def test_nearest_mean_is_brute_force():
    model = cs.models.multi_head(cs.models.random_features(D, 7), C)
    params, buffers = double(model)
    sources = dict(zip(KEYS, (A, B, E), strict=True))
    items = {k: NearestMean().summarise(learned(model, params, s, buffers), None) for k, s in sources.items()}
    x = torch.randn(50, D, generator=key(3)).double()
    psi = model.features(params, buffers, x)
    best = []
    for p in psi:
        distances = []
        for s in sources.values():
            own = model.features(params, buffers, s.train.x)
            distances.append(
                min(float((p - own[s.train.y == c].mean(0)).square().sum()) for c in s.train.y.unique())
            )
        best.append(int(np.argmin(distances)))
    weights = NearestMean().route(Routing(x, lambda: psi, lambda: [], KEYS), items)
    assert weights.argmax(1).tolist() == best
    halves = [
        Source("h", Tensors(A.train.x[i], A.train.y[i]), A.train, A.train, A.labels, A.classes)
        for i in (slice(0, 11), slice(11, 30))
    ]
    one, two = (NearestMean().summarise(learned(model, params, h, buffers), None) for h in halves)
    near(dict((one + two).tensors), dict(items[KEYS[0]].tensors))


def mixture(mean, variance, weight, count):
    return Module(
        {"mean": mean, "variance": variance, "weight": weight, "count": torch.tensor([float(count)])}
    )


def test_the_mixture_is_the_largest_weighted_density():
    g = torch.Generator().manual_seed(0)
    items = {
        k: mixture(
            torch.randn(4, 3, generator=g),
            torch.rand(4, 3, generator=g) + 0.3,
            torch.rand(4, generator=g).softmax(0),
            n,
        )
        for k, n in zip(KEYS, (10, 100, 1000), strict=True)
    }
    x = blobs(200)
    for prior in ("size", "uniform"):
        scores = []
        for item in items.values():
            t = {k: v.double() for k, v in item.tensors.items()}
            normal = torch.distributions.Independent(
                torch.distributions.Normal(t["mean"], t["variance"].sqrt()), 1
            )
            density = t["weight"] * normal.log_prob(x[:, None]).exp() * (t["count"] if prior == "size" else 1)
            scores.append(density.max(1).values)
        assert torch.equal(chosen(GaussianMixture(4, prior), x, items), torch.stack(scores, 1).argmax(1))
    assert not torch.equal(
        chosen(GaussianMixture(4, "size"), x, items), chosen(GaussianMixture(4, "uniform"), x, items)
    )


def test_one_spherical_component_each_is_nearest_mean():
    means = torch.randn(3, 3, generator=key(5))
    items = {
        k: mixture(m[None], torch.full((1, 3), 0.7), torch.ones(1), 10)
        for k, m in zip(KEYS, means, strict=True)
    }
    x = blobs()
    for prior in ("size", "uniform"):
        assert torch.equal(
            chosen(GaussianMixture(1, prior), x, items), torch.cdist(x, means.double()).argmin(1)
        )


@pytest.mark.parametrize("fit", ["torch", "sklearn"])
def test_a_small_task_has_few_components_and_is_found_beside_a_large_one(fit):
    """24 examples next to 600 of a wider task, in 40 dimensions: 25 components of one example each would be
    points."""
    x = {
        n: torch.randn(k + 200, 40, generator=key(0, n)).double() for n, k in (("small", 24), ("large", 600))
    }
    x["large"] += 0.6
    y = torch.zeros(800, dtype=torch.long)
    sources = [
        Source(n, *[Tensors(v[:-200], y[: len(v) - 200])] * 3, ((n, "c"),), (0,), n) for n, v in x.items()
    ]
    model = cs.models.mlp(40, (4,), 2)
    params, _ = model.init(key(0))
    found = {}
    for least in (1, 20):
        mapper = GaussianMixture(on="inputs", fit=fit, least=least)
        items = [mapper.summarise(learned(model, params, s), None) for s in sources]
        assert [len(i.tensors["weight"]) for i in items] == ([24, 25] if least == 1 else [1, 25])
        found[least] = float((mapper.scores(x["small"][24:], items, items).argmax(1) == 0).double().mean())
    assert found[1] < 0.9 < found[20], found


@pytest.mark.parametrize("mapper", ["gaussian_mixture", "nearest_mean"])
def test_the_order_of_arrival_changes_no_route(mapper):
    s = [
        source(n, 40, c, seed, task=n)
        for n, c, seed in (("a", (0, 1), 1), ("b", (2, 3), 2), ("c", (1, 2), 3))
    ]
    model, x = (
        cs.models.multi_head(cs.models.random_features(D, 16), C),
        torch.randn(60, D, generator=key(0)).double(),
    )
    told = []
    for order in (s, s[::-1], [s[1], s[2], s[0]]):
        agent = cs.run(cs.settings.skill(order), cs.methods.skill(mapper, 3), model, training(epochs=1)).agent
        weights, keys = agent.route(x)
        told.append([keys[i][1] for i in weights.argmax(1).tolist()])
    assert told[0] == told[1] == told[2]
    assert len(set(told[0])) > 1


def test_confidence_mappers():
    g = torch.Generator().manual_seed(0)
    p = [torch.randn(20, k, generator=g).mul(3).softmax(1) for k in (2, 3, 5)]
    x = torch.zeros(20, 1)
    entropy = torch.stack([-(q * q.log()).sum(1) / np.log(q.shape[1]) for q in p], 1)
    assert torch.equal(MinEntropy().route(routing(x, KEYS, p), {}).argmax(1), entropy.argmin(1))
    assert torch.equal(
        Average().route(routing(x, KEYS, p), {}), torch.full((20, 3), 1 / 3, dtype=torch.float64)
    )


def test_ensembles_are_weighted_sums_of_softmaxes():
    x = torch.randn(40, D, generator=key(1)).double()
    experts = []
    for s in TASKS:
        keep = list(s.classes)
        net = fit(
            plain(),
            s,
            lambda net, x, y, *_: F.cross_entropy(net(x)[:, keep], y - keep[0]),  # noqa: B023
        )
        p = torch.zeros(40, C).double()
        p[:, keep] = net(x).detach()[:, keep].softmax(1)
        experts.append(p)
    stacked = torch.stack(experts, 1)
    for setting in (cs.settings.merging(TASKS), cs.settings.exmodel(TASKS)):
        agent = cs.run(setting, cs.methods.average_ensemble(), mlp(), training()).agent
        near({"p": agent.predict(x)}, {"p": stacked.mean(1)})
        agent = cs.run(setting, cs.methods.oracle_ensemble(), mlp(), training()).agent
        for s, p in zip(TASKS, experts, strict=True):
            near({"p": agent.predict(x, s.name)}, {"p": p})
        agent = cs.run(setting, cs.methods.entropy_ensemble(), mlp(), training()).agent
        entropy = -(stacked * stacked.clamp_min(1e-300).log()).sum(2)  # all have two classes
        near({"p": agent.predict(x)}, {"p": stacked[torch.arange(40), entropy.argmin(1)]})


def test_the_oracle_picks_its_expert():
    r = cs.run(cs.settings.merging(TASKS), cs.methods.oracle_ensemble(), mlp(), training())
    assert r.mapper_accuracy == 1.0


# merging


def tuned():
    return [entries(fit(plain(), s)) for s in (A, B, E)]


def test_the_mean_of_models_is_the_base_plus_the_mean_task_vector():
    base, models = entries(plain()), tuned()
    expected = {n: base[n] + sum(m[n] - base[n] for m in models) / 3 for n in base}
    schedule = cs.settings.merging([A, B, E], scenario="domain")  # of unequal sizes, equally weighted
    near(final(schedule, cs.methods.average()), expected)
    near(final(schedule, cs.methods.task_arithmetic(1.0)), expected)
    near(
        final(schedule, cs.methods.task_arithmetic(0.9)),
        {n: base[n] + 0.3 * sum(m[n] - base[n] for m in models) for n in base},
    )


def test_coefficients_one_and_zero_are_bit_equal():
    end = final(cs.settings.continual([A], "domain"), cs.methods.finetune())
    one = cs.settings.merging([A], scenario="domain")
    assert same(final(one, cs.methods.task_arithmetic(1.0)), end)
    assert same(final(one, cs.methods.average()), end)
    base = {n: p.double() for n, p in mlp().init(key(0, "init"))[0].items()}
    assert same(final(one, cs.methods.task_arithmetic(0.0)), base)
    assert same(final(cs.settings.merging([A, B], scenario="domain"), cs.methods.task_arithmetic(0.0)), base)


def test_the_parameter_average_is_a_running_mean():
    models = tuned()
    for k in (1, 2, 3):
        schedule = cs.settings.exmodel([A, B, E][:k], scenario="domain")
        near(
            final(schedule, cs.methods.parameter_average()),
            {n: sum(m[n] for m in models[:k]) / k for n in models[0]},
        )


@pytest.mark.parametrize("density", [0.2, 0.65, 1.0])
def test_ties_on_the_flat_vector(density):
    base, models = entries(plain()), tuned()
    names = sorted(base)
    flat = lambda m: np.concatenate([m[n].numpy().ravel() for n in names])  # noqa: E731
    tau = np.stack([flat(m) - flat(base) for m in models])
    keep = int(np.ceil(density * tau.shape[1]))
    for row in tau:
        row[np.argsort(-np.abs(row), kind="stable")[keep:]] = 0
    sign = np.sign(tau.sum(0))
    agree = (np.sign(tau) == sign) & (sign != 0)
    merged = flat(base) + np.where(agree, tau, 0).sum(0) / np.maximum(agree.sum(0), 1)
    params = final(cs.settings.merging([A, B, E], scenario="domain"), cs.methods.ties(density))
    assert np.abs(flat(params) - merged).max() < 1e-12


def test_a_tasks_own_entries_are_neither_trimmed_nor_scaled():
    s = [source("a", 20, (0, 1), 1), source("b", 20, (2, 3), 2)]
    model = cs.models.multi_head(mlp(), C)
    ends = [final(cs.settings.continual([one], "task"), cs.methods.finetune(), model) for one in s]
    for method in (cs.methods.ties(0.2), cs.methods.task_arithmetic(0.5)):
        merged = final(cs.settings.merging(s, scenario="task"), method, model)
        for name, end in zip("ab", ends, strict=True):
            for k in ("weight", "bias"):
                assert torch.equal(merged[f"heads.{name}.{k}"], end[f"heads.{name}.{k}"])


# multi-task


def surgery(rows):
    """PCGrad of two rows, averaged."""
    a, b = rows
    dot = a @ b
    return (a - min(dot, 0) / (b @ b) * b + b - min(dot, 0) / (a @ a) * a) / 2


def test_pcgrad_restated():
    net = plain()
    parameters, optimiser = list(net.parameters()), sgd(net)
    steps = max(-(-len(s.train) // BATCH) for s in (A, B))
    opposed = 0
    for (*_, xa, ya), (*_, xb, yb) in zip(batches(A, steps=steps), batches(B, steps=steps), strict=True):
        rows = []
        for x, y in ((xa, ya), (xb, yb)):
            rows.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(net(x), y), parameters)])
            )
        opposed += float(rows[0] @ rows[1]) < 0
        for p, g in zip(parameters, surgery(rows).split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)
        optimiser.step()
    assert opposed
    near(final(cs.settings.multitask([A, B], "domain"), cs.methods.pcgrad()), entries(net), 1e-11)


def test_without_a_conflict_pcgrad_is_the_mean():
    twin = A.map(name="twin", task=None)
    schedule = cs.settings.multitask([A, twin], "domain")
    near(*(final(schedule, m, batch_size=100) for m in (cs.methods.pcgrad(), cs.methods.finetune())), 1e-12)


def test_heads_keep_their_own_weighted_gradient_under_pcgrad():
    s = [source("a", 16, (0, 1), 1), source("b", 16, (2, 3), 2)]
    model, once = cs.models.multi_head(mlp(), C), {"epochs": 1, "batch_size": 16, "momentum": 0.0}
    schedule = cs.settings.multitask(s, "task")
    cut, mean = (
        final(schedule, cs.methods.pcgrad(), model, **once),
        final(schedule, cs.methods.finetune(), model, **once),
    )
    start, buffers = double(model)
    rows = []
    for one in s:
        start, buffers = model.grow(start, buffers, one, key(0, one.name, "grow"))
    for one in s:
        leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
        out = model(leaves, buffers, one.train.x, one.name, True)[0]
        loss = F.cross_entropy(out, one.train.y)
        names = sorted(n for n in leaves if n.startswith("trunk"))
        rows.append(
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(loss, [leaves[n] for n in names], retain_graph=True)
                ]
            )
        )
        for k in ("weight", "bias"):
            n = f"heads.{one.name}.{k}"
            g = torch.autograd.grad(loss, leaves[n], retain_graph=True)[0]
            near({n: cut[n]}, {n: start[n] - LR * g / 2})
    for got, row in ((cut, surgery(rows)), (mean, sum(rows) / 2)):
        near(
            {"t": torch.cat([got[n].flatten() for n in names])},
            {"t": torch.cat([start[n].flatten() for n in names]) - LR * row},
        )


# metrics


def test_the_summary_by_hand():
    m = np.array([[0.1, 0.2, 0.3], [0.9, 0.25, 0.35], [0.7, 0.8, 0.45], [0.6, 0.85, 0.95]])
    s = summary(m, [1, 2, 3])
    assert s["score"] == pytest.approx((0.6 + 0.85 + 0.95) / 3)
    assert s["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.8 - 0.85)) / 2)
    assert s["backward_transfer"] == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    assert s["forward_transfer"] == pytest.approx(((0.25 - 0.2) + (0.45 - 0.3)) / 2)
    assert [summary(m, [1, None, 3])[k] for k in ("forgetting", "backward_transfer", "forward_transfer")] == [
        None
    ] * 3
    assert [
        summary(m[:2], [1, 1, 1])[k] for k in ("forgetting", "backward_transfer", "forward_transfer")
    ] == [None] * 3


def test_metrics_are_scikit_learns():
    from sklearn import metrics

    g = torch.Generator().manual_seed(0)
    p, y = (
        torch.rand(200, 4, generator=g).mul(8).round().softmax(1).double(),
        torch.randint(4, (200,), generator=g),
    )
    accuracy, auroc, r2 = cs.metrics.accuracy(), cs.metrics.auroc(), cs.metrics.r2()
    assert accuracy(p, y) == pytest.approx(metrics.accuracy_score(y, p.argmax(1)))
    q = p / p.sum(1, keepdim=True)
    assert auroc(q, y) == pytest.approx(metrics.roc_auc_score(y, q, multi_class="ovr"), abs=1e-12)
    two = (y > 1).long()
    assert auroc(p[:, :2], two) == pytest.approx(metrics.roc_auc_score(two, p[:, 1]), abs=1e-12)
    values, made = torch.randn(50, 2, generator=g).double(), torch.randn(50, 3, generator=g).double()
    assert r2(made, values) == pytest.approx(
        metrics.r2_score(values, made[:, :2], multioutput="variance_weighted"), abs=1e-12
    )


# verbs


def toy(**verbs):
    """A correction made of functions."""
    return type("Toy", (Correction,), verbs)()


def ran(correction, sources=(A, B), **more):
    method = Method("toy", (correction,), **more.pop("method", {}))
    return cs.run(
        cs.settings.continual(list(sources), more.pop("scenario", "domain")),
        method,
        more.pop("model", mlp()),
        training(**more),
    )


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_masked_entries_do_not_move(optimiser):
    frozen = torch.rand(59, generator=key(0)) < 0.5
    r = ran(toy(mask=lambda self, step, ctx: (~frozen).to(step.theta)), optimiser=optimiser, weight_decay=0.1)
    layout = Layout.of(r.agent.state.params)
    assert layout.size == 59
    start, end = layout.flatten(double(mlp())[0]), layout.flatten(r.agent.state.params)
    assert torch.equal(start[frozen], end[frozen])
    assert (start[~frozen] != end[~frozen]).all()
    net = plain()
    names = sorted(dict(net.named_parameters()))
    own = dict(net.named_parameters())
    for s in (A, B):
        made = (
            sgd(net, weight_decay=0.1)
            if optimiser == "sgd"
            else torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.1)
        )
        for *_, x, y in batches(s):
            made.zero_grad()
            F.cross_entropy(net(x), y).backward()
            at = 0
            held = []
            for n in names:
                m = frozen[at : at + own[n].numel()].view_as(own[n])
                own[n].grad[m] = 0
                held.append((own[n], m, own[n].detach().clone()))
                at += own[n].numel()
            made.step()
            for p, m, old in held:
                p.data[m] = old[m]
    near(r.agent.state.params, entries(net))


def test_a_view_is_differentiated_through():
    halve = toy(view=lambda self, params, task, ctx: {**params, "1.weight": params["1.weight"] / 2})
    r = ran(halve)

    def seen(net, x):
        return F.linear(F.linear(x, net[1].weight / 2, net[1].bias).relu(), net[3].weight, net[3].bias)

    net = plain()
    for s in (A, B):
        fit(net, s, lambda net, x, y, *_: F.cross_entropy(seen(net, x), y))
    near(r.agent.state.params, entries(net))
    near({"p": r.agent.predict(A.test.x)}, {"p": seen(net, A.test.x).softmax(1).detach()})


def test_losses_are_bent():
    weight = torch.tensor([1.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    r = ran(
        toy(
            losses=lambda self, losses, step, ctx: {i: v * weight[step.parts[i].y] for i, v in losses.items()}
        )
    )
    net = plain()
    for s in (A, B):
        fit(net, s, lambda net, x, y, *_: (F.cross_entropy(net(x), y, reduction="none") * weight[y]).mean())
    near(r.agent.state.params, entries(net))


def test_a_constant_penalty_is_plain_training():
    """As that of a method which compares with an earlier visit has in the first."""
    r = ran(toy(penalty=lambda self, step, ctx: step.theta.new_zeros(())))
    net = plain()
    for s in (A, B):
        fit(net, s, lambda net, x, y, *_: F.cross_entropy(net(x), y))
    near(r.agent.state.params, entries(net))


def test_rows_are_further_objectives():
    r = ran(toy(rows=lambda self, step, ctx: [Row(step.raw[0].square().mean(), 0.3)]))
    net = plain()
    for s in (A, B):
        fit(net, s, lambda net, x, y, *_: F.cross_entropy(net(x), y) + 0.3 * net(x).square().mean())
    near(r.agent.state.params, entries(net))


@dataclass(frozen=True)
class HalfSpace(Mean, Cone):
    """One constraint: g - min(0, g.c) / |c|^2 c."""

    def project(self, direction, constraints):
        (c,) = constraints
        return direction - min(float(direction @ c), 0.0) / (c @ c) * c


def test_constraints_want_a_cone():
    opposed = lambda out: out[:, 0].mean()  # noqa: E731
    constraint = toy(rows=lambda self, step, ctx: [Row(opposed(step.raw[0]), kind="constraint")])
    with pytest.raises(Refusal, match="cone"):
        ran(constraint)
    r = ran(constraint, method={"step_aggregator": HalfSpace()})
    net, met = plain(), 0
    for s in (A, B):
        optimiser, parameters = sgd(net), list(net.parameters())
        for *_, x, y in batches(s):

            def flat(value, parameters=parameters):
                return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])

            g, c = flat(F.cross_entropy(net(x), y)), flat(opposed(net(x)))
            met += float(g @ c) < 0
            g = g - min(float(g @ c), 0.0) / (c @ c) * c
            for p, own in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
                p.grad = own.view_as(p)
            optimiser.step()
    assert met
    near(r.agent.state.params, entries(net))


def test_a_penalty_can_be_a_linear_term_and_a_trace_follows_the_path():
    push = torch.randn(59, generator=key(2)).double() * 0.1
    kept = {}

    def trace(self, step, ctx, grad, delta):
        return {"moved": ctx.trace["moved"] + delta, "pushed": ctx.trace["pushed"] + grad}

    def summarise(self, here, ctx):
        kept[here.source.name] = {k: v.clone() for k, v in ctx.trace.items()}

    r = ran(
        toy(
            penalty=lambda self, step, ctx: step.theta @ push,
            trace_init=lambda self, ctx: {
                "moved": torch.zeros_like(ctx.theta),
                "pushed": torch.zeros_like(ctx.theta),
            },
            trace=trace,
            summarise=summarise,
        ),
        momentum=0.0,
    )
    net = plain()
    layout = Layout.of(double(mlp())[0])

    def linear(net):
        return (torch.cat([p.flatten() for _, p in sorted(net.named_parameters())]) * push).sum()

    for s in (A, B):
        start = layout.flatten(entries(net))
        fit(
            net,
            s,
            lambda net, x, y, *_: F.cross_entropy(net(x), y) + linear(net),
            optimiser=sgd(net, momentum=0.0),
        )
        end, steps = layout.flatten(entries(net)), EPOCHS * -(-len(s.train) // BATCH)
        near({"m": kept[s.name]["moved"]}, {"m": end - start})
        near(
            {"g": kept[s.name]["pushed"]}, {"g": -(end - start) / LR - steps * push}, 1e-10
        )  # before the penalty
    near(r.agent.state.params, entries(net))


def test_begin_can_add_an_entry():
    def begin(self, start):
        return Begun({"extra.shift": torch.zeros(C, dtype=torch.float64), **start.params})

    def view(self, params, task, ctx):
        shift = params.get("extra.shift", torch.zeros(C, dtype=torch.float64))
        return {**{n: p for n, p in params.items() if n != "extra.shift"}, "3.bias": params["3.bias"] + shift}

    r = ran(toy(begin=begin, view=view))
    net, shift = plain(), torch.zeros(C, dtype=torch.float64, requires_grad=True)
    for s in (A, B):
        optimiser = torch.optim.SGD([*net.parameters(), shift], lr=LR, momentum=0.9)
        fit(net, s, lambda net, x, y, *_: F.cross_entropy(net(x) + shift, y), optimiser=optimiser)
    near(r.agent.state.params, {**entries(net), "extra.shift": shift.detach()})


def test_heard_sees_every_absorption():
    def after_receive(self, before, after, memory, fresh):
        old, new = before.params, after.params
        gap = torch.stack([(new[n] - old[n]).abs().sum() for n in old]).sum()
        return {**memory, str(len(memory)): Private({"gap": gap, "new": new["3.bias"]})}

    agent = cs.run(
        cs.settings.federated(clients(), 3, scenario="domain"),
        Method("toy", (toy(after_receive=after_receive),)),
        mlp(),
        training(),
    ).agent
    history = agent.state.memory["Toy"]
    assert len(history) == 3
    assert all(float(h.tensors["gap"]) > 0 for h in history.values())
    assert torch.equal(history[max(history, key=int)].tensors["new"], agent.state.params["3.bias"])


def test_recall_sums_the_other_sources():
    memory = {("m", n): Statistics({"t": torch.tensor([v])}) for n, v in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    memory[("n", "b")] = Statistics({"t": torch.tensor([8.0]), "u": torch.tensor([1.0])})
    assert Correction().recall(memory, (A,)).tensors["t"].item() == 14.0
    assert Correction().recall(memory, (A, B)).tensors["t"].item() == 4.0
    assert Correction().recall(memory, (A, B, E)) is None
    assert Correction().recall({}, ()) is None


def test_gather_changes_what_is_trained_on():
    def gather(self, sources, known, generator):
        return tuple(s.map(train=s.train.select(torch.arange(9))) for s in sources)

    net = plain()
    for s in (A, B):
        fit(net, s.map(train=s.train.select(torch.arange(9))))
    near(ran(toy(gather=gather)).agent.state.params, entries(net))


def of_torch(kind, parameters):
    more = {"SGD": {"momentum": 0.9, "weight_decay": 0.05}, "Adam": {}, "AdamW": {"weight_decay": 0.05}}
    return getattr(torch.optim, kind)(parameters, lr=LR, **more.get(kind, {}))


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "NAdam", "Rprop"])
def test_an_unsampled_head_does_not_move_and_counts_its_own_steps(kind, late):
    """A head that is drawn in every second step has half of the steps, as in torch.optim."""
    from consilience.core.batch import Batch

    s = [source("a", 24, (0, 1), 1), source("b", 24, (2, 3), 2)]
    model = cs.models.multi_head(mlp(), C)
    calls = []

    def sample(self, ctx, sources, generator):
        calls.append(sources[0].name)
        if sources[0].name == "b" and len(calls) % 2 == late:
            return [Batch(s[0].train.x[:4], s[0].train.y[:4], "a", source="a")]
        return []

    named = kind if kind in ("NAdam", "Rprop") else kind.lower()
    more = {"weight_decay": 0.05 * (kind in ("SGD", "AdamW")), "momentum": 0.9 * (kind == "SGD")}
    r = ran(toy(sample=sample), s, model=model, scenario="task", optimiser=named, **more)

    trunk, heads, calls2 = nn.Linear(D, 5).double(), {}, 0
    init = double(mlp())[0]
    trunk.load_state_dict({"weight": init["1.weight"], "bias": init["1.bias"]})
    for one in s:
        p, _ = model.grow({"trunk.1.weight": init["1.weight"]}, {}, one, key(0, one.name, "grow"))
        heads[one.name] = nn.Linear(5, 2).double()
        heads[one.name].load_state_dict({k: p[f"heads.{one.name}.{k}"] for k in ("weight", "bias")})
        used = [*trunk.parameters(), *(p for h in heads.values() for p in h.parameters())]
        optimiser = of_torch(kind, used)  # leaves out what has no gradient
        for *_, x, y in batches(one):
            calls2 += 1
            value = F.cross_entropy(heads[one.name](trunk(x).relu()), y - one.classes[0])
            if one.name == "b" and calls2 % 2 == late:
                value = (
                    value + F.cross_entropy(heads["a"](trunk(s[0].train.x[:4]).relu()), s[0].train.y[:4])
                ) / 2
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            optimiser.step()
    expected = {f"trunk.1.{k}": p.detach() for k, p in trunk.named_parameters()}
    expected |= {f"heads.{t}.{k}": p.detach() for t, h in heads.items() for k, p in h.named_parameters()}
    near(r.agent.state.params, expected, 1e-12)


# buffers


def normed():
    return nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, C))


def normed_start(model):
    params, buffers = double(model)
    net = normed().double()
    net.load_state_dict({**params, **buffers})
    return net


def test_batch_norm_is_carried_and_averaged():
    model = cs.models.wrap(normed)
    net = normed_start(model)
    for s in (A, B):
        fit(net, s)
    agent = cs.run(cs.settings.continual([A, B], "domain"), cs.methods.finetune(), model, training()).agent
    near(agent.state.params, entries(net))
    near(agent.state.buffers, dict(net.named_buffers()))
    net.eval()
    near({"p": agent.predict(A.test.x)}, {"p": net(A.test.x).softmax(1).detach()})

    ends = [fit(normed_start(model), s) for s in (A, B)]
    total = len(A.train) + len(B.train)
    agent = cs.run(
        cs.settings.federated([A, B], 1, scenario="domain"), cs.methods.fedavg(), model, training()
    ).agent
    for k in ("1.running_mean", "1.running_var"):
        mean = sum(len(s.train) / total * e.state_dict()[k] for s, e in zip((A, B), ends, strict=True))
        near({k: agent.state.buffers[k]}, {k: mean})
    assert agent.state.buffers["1.num_batches_tracked"] == 0  # the hearer's: integers are not merged
    assert agent.state.buffers["1.num_batches_tracked"].dtype == torch.int64


def test_the_teacher_has_the_buffers_of_the_start():
    model = cs.models.wrap(normed)
    net = normed_start(model)
    fit(net, A)
    teacher = copy.deepcopy(net).eval()
    fit(net, B, lambda net, x, y, *_: F.cross_entropy(o := net(x), y) + distil(o, teacher(x).detach()))
    agent = cs.run(cs.settings.continual([A, B], "domain"), cs.methods.lwf(), model, training()).agent
    near(agent.state.params, entries(net), 1e-11)
    near(agent.state.buffers, dict(net.named_buffers()), 1e-11)


# GEM, A-GEM, DER, ER-ACE, MAS, L2-SP, online EWC


def test_the_dual_program_is_exact():
    from scipy.optimize import nnls

    from consilience.aggregators._cone import AGEM, GEM

    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        k, n = int(torch.randint(1, 7, (1,), generator=g)), int(torch.randint(1, 9, (1,), generator=g))
        rows, v = torch.randn(k, n, generator=g).double(), torch.randn(n, generator=g).double()
        dual, _ = nnls(rows.T.numpy(), -v.numpy())
        moved = GEM(0.0).project(v, rows)
        assert torch.allclose(moved, v + rows.T @ torch.from_numpy(dual), atol=1e-9)
        assert float((rows @ moved).min()) > -1e-9
        one = rows[:1]
        assert torch.allclose(GEM(0.0).project(v, one), AGEM().project(v, one), atol=1e-10)
        kept = rows * torch.sign(rows @ v)[:, None]
        for cone in (GEM(0.0), GEM(0.5), AGEM()):
            assert torch.equal(cone.project(v, kept), v), (
                "no violated constraint leaves the gradient untouched"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("short", [1e-8, 1e-13, 1e-22, 1e-30])
def test_the_length_of_a_constraint_changes_nothing(short, dtype):
    """Without a margin the cone is one of directions: a task with a tiny gradient binds like any other."""
    from consilience.aggregators._cone import AGEM, GEM

    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        rows, v = torch.randn(3, 8, generator=g).double(), torch.randn(8, generator=g).double()
        lengths = torch.tensor([1.0, short, short], dtype=torch.float64)[:, None]
        near = {"atol": 1e-5 if dtype == torch.float32 else 1e-9, "rtol": 0.0}
        wanted = GEM(0.0).project(v, rows)
        moved = GEM(0.0).project(v.to(dtype), (rows * lengths).to(dtype)).double()
        assert torch.allclose(moved, wanted, **near)
        # A tiny gradient of the step, next to constraints of common lengths.
        tiny = GEM(0.0).project((v * short).to(dtype), rows.to(dtype)).double()
        assert torch.allclose(tiny / short, wanted, **near)

        wanted = v - min(0.0, float(v @ rows[0])) / float(rows[0] @ rows[0]) * rows[0]
        moved = AGEM().project(v.to(dtype), (rows[:1] * short).to(dtype)).double()
        assert torch.allclose(moved, wanted, **near)
    zero = torch.zeros(1, 8, dtype=dtype)
    assert torch.equal(GEM(0.5).project(v.to(dtype), zero), v.to(dtype))
    assert torch.equal(AGEM().project(v.to(dtype), zero), v.to(dtype))


def test_the_margin_of_gem_is_in_lengths_of_the_constraints():
    """With a margin the dual is shifted: v = g + G^T (l + margin), l >= 0 by scipy."""
    from scipy.optimize import nnls

    from consilience.aggregators._cone import GEM

    rows = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2e-3, 1e-3]], dtype=torch.float64)
    v = torch.tensor([-1.0, 0.3, -2.0], dtype=torch.float64)
    dual, _ = nnls(rows.T.numpy(), -(v + 0.5 * rows.sum(0)).numpy())
    wanted = v + rows.T @ (torch.from_numpy(dual) + 0.5)
    assert torch.allclose(GEM(0.5).project(v, rows), wanted, atol=1e-12)


def test_gem_with_one_past_task_is_agem():
    from consilience.aggregators._cone import AGEM, GEM
    from consilience.corrections.projection import EpisodicConstraints

    schedule = cs.settings.continual([A, B], "domain")
    ends = [
        final(schedule, Method("gem", (EpisodicConstraints(20, 8),), step_aggregator=cone))
        for cone in (GEM(0.0), AGEM())
    ]
    near(ends[0], ends[1], 1e-9)
    assert not same(ends[0], final(schedule, cs.methods.finetune()))


def test_der_restated():
    """One step on the second source: CE + alpha MSE(z) + beta CE, on the batches that were drawn."""
    from consilience.loop.job import Job

    drawn = []
    original = Job.run

    def watch(self, ledger):
        step = self.step
        call = type(step).__call__

        class Watched(type(step)):
            def __call__(self, parts, clock, generator):
                drawn.append(
                    (parts, {n: v.clone() for n, v in self.layout.split(self.carry.theta).items()}, None)
                )
                call(self, parts, clock, generator)
                drawn[-1] = (
                    *drawn[-1][:2],
                    {n: v.clone() for n, v in self.layout.split(self.carry.theta).items()},
                )

        step.__class__ = Watched
        return original(self, ledger)

    Job.run = watch
    try:
        cs.run(
            cs.settings.continual([A, B], "domain"),
            cs.methods.derpp(30, 8, 0.3, 0.7),
            mlp(),
            training(momentum=0.0),
        )
    finally:
        Job.run = original
    parts, before, after = drawn[-1]
    assert [p.weight for p in parts] == [None, 0.0, 0.7]
    net = plain(params=before)
    x, z = parts[1].x, parts[1].extra["logits"]
    loss = (
        F.cross_entropy(net(parts[0].x), parts[0].y)
        + 0.3 * ((net(x) - z) ** 2).mean()
        + 0.7 * F.cross_entropy(net(parts[2].x), parts[2].y)
    )
    loss.backward()
    for n, p in net.named_parameters():
        assert torch.allclose(after[n], before[n] - LR * p.grad, atol=1e-10)


def test_er_ace_restated():
    correction = cs.methods.er_ace(30, 8).corrections[0]
    out, y = torch.randn(6, 5).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    memory = torch.randn(4, 5).double(), torch.tensor([2, 3, 4, 2])
    parts = [Batch(out, y), Batch(*memory, drawn_by="ERACE")]
    targets = [Target("class", CrossEntropy())] * 2
    see = StepView(
        out, out, None, parts, [], [out, memory[0]], None, (0, 0), (1, 1), targets, None, None, None, {}, None
    )
    bent = correction.losses({0: F.cross_entropy(out, y, reduction="none"), 1: torch.ones(4)}, see, None)
    assert torch.allclose(bent[0], F.cross_entropy(out[:, :2], y, reduction="none"))
    assert torch.equal(bent[1], torch.ones(4))


def test_mas_l2sp_and_online_ewc_restated():
    from consilience.core.message import Statistics
    from consilience.corrections.quadratic import L2SP, MAS, OnlineEWC

    model = mlp()
    params, buffers = model.init(key(0, "init"))
    params = {n: p.double() for n, p in params.items()}
    l = learned(model, params, A, buffers)  # noqa: E741
    omega = {n: torch.zeros_like(p) for n, p in params.items()}
    net = plain(params=params)
    x, _ = A.train.whole()
    for xi in x.double():
        for (n, _), g in zip(
            net.named_parameters(),
            torch.autograd.grad((net(xi[None]) ** 2).sum(), list(net.parameters())),
            strict=True,
        ):
            omega[n] += g.abs() / len(x)
    got = MAS().summarise(l, None)
    near(got.group("precision"), {n: 2 * o for n, o in omega.items()}, 1e-10)
    assert all(bool((p == 1).all()) for p in L2SP().summarise(l, None).group("precision").values())

    items = {}
    for i in range(3):
        items[("agent", f"s{i}")] = Statistics({"precision/w": torch.rand(4).double()}, {"order": i})
    known = OnlineEWC(gamma=0.5).recall(items, ())
    f = [items[("agent", f"s{i}")].tensors["precision/w"] for i in range(3)]
    decayed = 0.5 * (0.5 * f[0] + f[1]) + f[2]  # F <- gamma F + F_k
    assert torch.allclose(known.tensors["precision/w"], decayed)
    assert OnlineEWC().recall({}, ()) is None


@pytest.mark.parametrize("kind", ["class", "value", "labels"])
def test_mas_counts_the_outputs_that_a_source_is_trained_by(kind):
    """With a task label those of its own classes; never the net's outputs beyond the values or labels."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=g)
    y = {
        "class": torch.arange(12) % 2,
        "value": torch.randn(12, 2, generator=g),
        "labels": (torch.randn(12, 2, generator=g) > 0).float(),
    }[kind]
    # Classes of two tasks have columns of their own; values and labels of one space have the same ones.
    sources = [
        cs.data.arrays(
            x + i,
            y,
            test=(x, y),
            validation=0,
            kind=kind,
            name=name,
            space=name if kind == "class" else "one",
        )
        for i, name in enumerate(("first", "second"))
    ]
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 6))
    schedule = cs.settings.continual(sources, "task")
    r = cs.run(schedule, cs.methods.mas(), net, cs.Training(epochs=0, precision="fp64"))

    omega = {n: torch.zeros_like(p) for n, p in r.params.items()}
    for sample in x.double():
        leaves = {n: p.clone().requires_grad_() for n, p in r.params.items()}
        out = torch.func.functional_call(net, leaves, (sample[None],))[:, :2]
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        for n, grad in zip(leaves, grads, strict=True):
            omega[n] += grad.abs() / len(x)
    item = r.agent.state.bank["agent", "first"].items["MAS"]
    near(item.group("precision"), {n: 2 * o for n, o in omega.items()}, 1e-12)
    assert not item.tensors["precision/2.weight"][2:].any(), "nothing protects what is not trained yet"


@pytest.mark.parametrize("name", ["mas", "online_ewc"])
def test_running_precisions_have_one_centre(name):
    """Over three sources: what was kept of each, summed (with gamma, decayed), around where the learn
    begins."""
    method = cs.methods.mas(0.02) if name == "mas" else cs.methods.online_ewc(0.5, 0.5, "all")
    r = cs.run(cs.settings.continual([A, B, E], "domain"), method, mlp(), training())
    items = [
        r.agent.state.bank["agent", s.name].items[method.corrections[0].name].group("precision")
        for s in (A, B)
    ]
    net = fit(plain(), A)
    for s, gains in ((B, (1.0,)), (E, (0.5 if name == "online_ewc" else 1.0, 1.0))):
        start = entries(net)
        total = {n: sum(g * i[n] for g, i in zip(gains, items, strict=False)) for n in start}

        def loss(net, x, y, epoch, step, total=total, start=start):
            away = sum((total[n] * (p - start[n]) ** 2).sum() for n, p in net.named_parameters())
            return F.cross_entropy(net(x), y) + method.corrections[0].strength / 2 * away

        fit(net, s, loss)
    near(r.params, entries(net), 1e-10)


def test_a_capped_precision_keeps_its_centre():
    """An entry beyond the cap returns to its centre in one step of the penalty; others are untouched."""
    from consilience.core.contexts import Context

    p, centre = torch.tensor([0.5, 3.0, 40.0]).double(), torch.tensor([1.0, -2.0, 0.3]).double()
    ctx = Context(flat={"precision": p, "shift": p * centre})
    flat, said = EWC(strength=10.0).prepare_step(ctx, cs.Training(lr=0.05))
    assert "2 of 3 entries are capped" in said
    assert ctx.flat["precision"] is p
    assert torch.allclose(flat["precision"], torch.tensor([0.5, 2.0, 2.0]).double())
    assert torch.allclose(flat["shift"] / flat["precision"], centre)
    theta = torch.randn(3).double()
    moved = theta - 0.05 * 10.0 * (flat["precision"] * theta - flat["shift"])
    assert torch.allclose(moved[1:], centre[1:])
    for correction, training_ in (
        (EWC(strength=0.01), cs.Training(lr=0.05)),
        (EWC(strength=10.0), cs.Training(optimiser="adam")),
    ):
        flat, said = correction.prepare_step(ctx, training_)
        assert said is None
        assert flat["precision"] is p
