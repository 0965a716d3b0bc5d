"""Merging by statistics (Fisher, RegMean), continual merging, and experts with heads of their own; against
closed forms and restatements."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience.consolidators.arrivals import OPCM, RunningArithmetic, across
from consilience.consolidators.merging import FisherSpace, RegMean
from consilience.core.message import Message, Statistics, Weights
from consilience.core.optimiser import Averaging
from consilience.core.params import key
from consilience.core.schedule import Evaluate, Train
from consilience.core.state import State, encode_state
from consilience.core.weight_space import WeightSpace
from consilience.corrections.inputs import InputMoments, gram, layers
from consilience.loop.agent import Agent
from consilience.loop.ledger import Ledger
from restate import C, D, batches, mlp, sgd, source, training

SOURCES = [source("a", 30, (0, 1), 1), source("b", 24, (2, 3), 2), source("c", 40, (0, 2), 3)]


def near(a, b, atol=1e-6):
    assert a.keys() == b.keys()
    for n in a:
        assert torch.allclose(a[n].double(), b[n].double(), rtol=0, atol=atol), (n, (a[n] - b[n]).abs().max())


def rand(seed, *shape):
    return torch.randn(*shape, generator=key("rand", seed), dtype=torch.float64)


def receiving(consolidator, base, buffers=None, model=None):
    method = cs.Method("receiving", consolidator=consolidator)
    state = State(base, buffers or {}, base, "origin")
    return Agent("me", model or mlp(), method, cs.settings.merging(SOURCES), training(), 0, state, Ledger())


def arriving(agent, sender, params, size=10, buffers=None, **statistics):
    tensors = {f"params/{n}": p for n, p in params.items()} | {
        f"buffers/{n}": b for n, b in (buffers or {}).items()
    }
    base = agent.common_hash(agent.state.base)
    facts = (1, size, "origin", base)
    messages = [Message(sender, "", *facts, {"model": Weights(tensors)})]
    if statistics:
        messages.append(
            Message(sender, f"data of {sender}", *facts, {k: Statistics(v) for k, v in statistics.items()})
        )
    return messages


def run(schedule, method, model=None, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cs.run(schedule, method, model=model or mlp(), training=training(**more))


def models_of(sources=SOURCES, model=None):
    """Each source's expert, from one start, among the classes of all."""
    found = []
    for i, s in enumerate(sources):
        schedule = replace(
            cs.settings.merging(sources),
            plan=lambda seed, s=s, i=i: [Train({f"expert-{i}": (s.name,)}), Evaluate("learned")],
            evaluated=f"expert-{i}",
        )
        found.append(run(schedule, cs.methods.finetune(), model).params)
    return found


# Fisher-weighted merging

BASE = {"w": rand(0, 4, 3), "b": rand(1, 4)}
THETA = [{"w": rand(10 + i, 4, 3), "b": rand(20 + i, 4)} for i in range(3)]
HESSIANS = [{"w": rand(30 + i, 4, 3).square(), "b": rand(40 + i, 4).square()} for i in range(3)]


def fished(hessians, by_size=False, sizes=(10, 10, 10), prior=0.0, key="Information", theta=THETA):
    agent = receiving(FisherSpace(prior=prior), BASE)
    messages = []
    for i, (t, h, size) in enumerate(zip(theta, hessians, sizes, strict=True)):
        messages += arriving(agent, f"s{i}", t, size, **{key: {f"precision/{n}": x for n, x in h.items()}})
    agent.receive(messages, by_size)
    return agent.state.params


@pytest.mark.parametrize("prior", [0.0, 0.7])
@pytest.mark.parametrize("by_size", [False, True])
def test_fisher_is_the_optimum_of_the_joint_quadratic(prior, by_size):
    """The gradient of sum_i w_i/2 H_i (theta - theta_i)^2 + prior/2 (theta - base)^2 is 0 there, and nowhere
    else."""
    sizes = (10, 30, 60)
    shares = [s / 100 for s in sizes] if by_size else [1 / 3] * 3
    found = fished(HESSIANS, by_size, sizes, prior)
    for n in BASE:
        slope = prior * (found[n] - BASE[n])
        for t, h, w in zip(THETA, HESSIANS, shares, strict=True):
            slope = slope + w * h[n] * (found[n] - t[n])
        curvature = prior + sum(w * h[n] for h, w in zip(HESSIANS, shares, strict=True))
        assert (slope / curvature).abs().max() < 1e-12


def test_fisher_limits():
    ones = [{n: torch.full_like(p, 3.0) for n, p in t.items()} for t in THETA]
    mean = {n: sum(t[n] for t in THETA) / 3 for n in BASE}
    near(fished(ones), mean, 1e-12)
    nothing = [{n: torch.zeros_like(p) for n, p in t.items()} for t in THETA]
    near(fished(nothing), mean, 1e-12)
    near(fished(nothing, prior=1.0), BASE, 1e-12)
    near(fished([nothing[0], HESSIANS[1], nothing[2]]), THETA[1], 1e-12)
    near(fished(HESSIANS, key="EWC"), fished(HESSIANS), 0)
    scaled = [{n: 1e-30 * x for n, x in h.items()} for h in HESSIANS]
    near(fished(scaled), fished(HESSIANS), 1e-12)


def test_fisher_averages_what_has_no_precision_and_adds_sources():
    agent = receiving(FisherSpace(), BASE)
    messages = []
    for i in range(2):
        messages += arriving(agent, f"s{i}", THETA[i], Information={"precision/w": HESSIANS[i]["w"]})
    more = Message(
        "s0",
        "more",
        1,
        30,
        "origin",
        messages[0].base,
        {"Information": Statistics({"precision/w": HESSIANS[2]["w"]})},
    )
    agent.receive([*messages, more])
    f = [0.25 * HESSIANS[0]["w"] + 0.75 * HESSIANS[2]["w"], HESSIANS[1]["w"]]
    wanted = {
        "w": (f[0] * THETA[0]["w"] + f[1] * THETA[1]["w"]) / (f[0] + f[1]),
        "b": (THETA[0]["b"] + THETA[1]["b"]) / 2,
    }
    near(agent.state.params, wanted, 1e-12)


def test_fisher_wants_precisions_and_no_aggregator():
    agent = receiving(FisherSpace(), BASE)
    messages = arriving(agent, "precise", THETA[0], Information={"precision/w": HESSIANS[0]["w"]}) + arriving(
        agent, "silent", THETA[1]
    )
    with pytest.raises(
        cs.ConsilienceError, match="got none from 'silent'; all senders must use fisher_merging"
    ):
        agent.receive(messages)
    with pytest.raises(
        cs.ConsilienceError,
        match="`aggregator` of FisherSpace must be None, because statistics weigh the parameters, got Ties",
    ):
        run(cs.settings.merging(SOURCES), cs.methods.fisher_merging() + cs.methods.ties())


@pytest.mark.parametrize("names", [("a", "b", "silent"), ("silent", "t", "u"), ("a", "silent", "u")])
def test_a_sender_without_statistics_costs_no_other_sender_anything(names):
    """Weights of one message need the statistics of others, which come first where the bad one is sought."""
    agent, alone = receiving(FisherSpace(), BASE), receiving(FisherSpace(), BASE)
    honest = []
    for name, theta, h in zip([n for n in names if n != "silent"], THETA, HESSIANS, strict=False):
        honest += arriving(agent, name, theta, Information={f"precision/{n}": t for n, t in h.items()})
    silent = arriving(agent, "silent", THETA[2])
    with pytest.raises(cs.ConsilienceError, match=r"1 of 5 messages were refused.*got none from 'silent'"):
        agent.receive([*honest, *silent])
    alone.receive(honest)
    near(agent.state.params, alone.state.params, 0)


def test_fisher_merging_restated():
    """In a run: experts by the plain loop, F by one backward pass a sample, the weighted mean."""
    found = run(cs.settings.merging(SOURCES), cs.methods.fisher_merging(labels="data"), momentum=0.0).params
    above, below = {}, {}
    for s in cs.settings.merging(SOURCES).sources:
        net = nn.Sequential(nn.Flatten(), nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, C)).double()
        net.load_state_dict({n: p.double() for n, p in mlp().init(key(0, "init"))[0].items()})
        step = sgd(net, momentum=0.0)
        for _, _, x, y in batches(s):
            step.zero_grad()
            F.cross_entropy(net(x), y).backward()
            step.step()
        x, y = s.train.whole()
        for i in range(len(y)):
            net.zero_grad()
            F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
            for n, p in net.named_parameters():
                f = p.grad.square() / len(y)
                above[n], below[n] = above.get(n, 0) + f * p.detach(), below.get(n, 0) + f
    near(found, {n: above[n] / below[n] for n in above}, 1e-9)


def test_rounds_are_weighed_by_the_summaries_of_ewc_too():
    """In the first round EWC knows nothing, and its summaries are those of `Information`."""
    schedule = cs.settings.federated(SOURCES, rounds=1)
    own = run(schedule, cs.methods.fisher_merging(labels="all"))
    assert {k[1] for k in own.agent.state.bank} == {s.name for s in SOURCES}
    space = cs.Method("fisher_space", consolidator=cs.consolidators.fisher_space())
    two = cs.settings.federated(SOURCES, rounds=2)
    after = [run(two, [cs.methods.ewc(strength, "all"), space]) for strength in (1e-12, 0.5)]
    assert all(set(m.items) == {"EWC"} for m in after[0].agent.state.bank.values())
    plain = run(two, cs.methods.fisher_merging(labels="all"))
    near(after[0].params, plain.params, 1e-9)
    assert any((plain.params[n] - after[1].params[n]).abs().max() > 1e-6 for n in plain.params)
    average = run(schedule, cs.methods.fedavg())
    assert any((own.params[n] - average.params[n]).abs().max() > 1e-3 for n in own.params)


# RegMean


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), groups=2, bias=False),
        nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular", bias=False),
        nn.Conv2d(4, 4, 3, padding=(2, 1), groups=4, bias=False),
        nn.Linear(7, 3, bias=False),
    ],
    ids=str,
)
def test_gram_gives_the_energy_of_any_output(layer):
    """sum of squared outputs = sum over units of w^T G w, for any weights."""
    layer = layer.double()
    x = rand(5, 6, layer.in_channels, 8, 7) if isinstance(layer, nn.Conv2d) else rand(6, 5, 4, 7)
    g = gram(layer, x)
    w = layer.weight.detach().reshape(len(g), -1, g.shape[-1])
    energy = torch.einsum("god,gde,goe->go", w, g, w).flatten()
    out = layer(x).detach()
    direct = (
        out.square().sum((0, 2, 3)) if isinstance(layer, nn.Conv2d) else out.square().flatten(0, -2).sum(0)
    )
    assert torch.allclose(energy, direct, rtol=1e-10)


def regressed(xs, ws, alpha=1.0, ridge=0.0, by_size=False):
    """Weights [out, d] of experts merged on inputs [n, d]."""
    agent = receiving(RegMean(alpha=alpha, ridge=ridge), {"w": torch.zeros_like(ws[0])})
    messages = []
    for i, (x, w) in enumerate(zip(xs, ws, strict=True)):
        moments = {"count": torch.tensor(float(len(x)), dtype=torch.float64), "second/w": (x.T @ x)[None]}
        messages += arriving(agent, f"s{i}", {"w": w}, len(x), InputMoments=moments)
    agent.receive(messages, by_size)
    return agent.state.params["w"]


def test_regmean_is_joint_least_squares():
    """Experts that solve their own least squares merge to the solution on all data, by examples."""
    xs, ys = (
        [rand(50 + i, 20 + 10 * i, 5) for i in range(3)],
        [rand(60 + i, 20 + 10 * i, 2) for i in range(3)],
    )
    ws = [torch.linalg.lstsq(x, y).solution.T for x, y in zip(xs, ys, strict=True)]
    joint = torch.linalg.lstsq(torch.cat(xs), torch.cat(ys)).solution.T
    assert torch.allclose(regressed(xs, ws, by_size=True), joint, atol=1e-10)
    assert (regressed(xs, ws) - joint).abs().max() > 1e-3  # equally weighted, as merging is
    assert torch.allclose(regressed(xs, ws, ridge=1e-9, by_size=True), joint, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_regmean_limits(ridge):
    ws = [rand(70 + i, 3, 6) for i in range(2)]
    x = rand(80, 30, 6)
    for alpha in (0.0, 0.9, 1.0):
        assert torch.allclose(
            regressed([x, x], ws, alpha, ridge), (ws[0] + ws[1]) / 2, atol=1e-12
        )  # the same inputs
        assert torch.equal(regressed([x], ws[:1], alpha, ridge), ws[0])  # one expert is itself
    basis = torch.linalg.qr(rand(81, 6, 6)).Q
    xs = [
        rand(82, 20, 3) @ basis[:3],
        rand(83, 20, 2) @ basis[3:5],
    ]  # of orthogonal spaces, and one direction of neither
    found = regressed(xs, ws, 1.0, ridge)
    for x, w in zip(xs, ws, strict=True):
        assert torch.allclose(x @ found.T, x @ w.T, atol=1e-4 if ridge else 1e-10)
    lost = basis[5]
    assert torch.allclose(
        found @ lost, (ws[0] + ws[1]) @ lost / 2, atol=1e-9
    )  # where nobody has inputs: the mean
    x0, x1 = rand(84, 9, 6), rand(85, 9, 6)
    share = x0.square().sum(0) / (x0.square().sum(0) + x1.square().sum(0))
    assert torch.allclose(
        regressed([x0, x1], ws, 0.0, 0.0), share * ws[0] + (1 - share) * ws[1], atol=1e-12
    )  # diagonals alone


def test_regmean_restated():
    """In a run, on a perceptron: G by hand, layer by layer; biases averaged."""
    experts = models_of()
    found = run(cs.settings.merging(SOURCES), cs.methods.regmean(0.9, 0.0)).params
    wanted = {n: sum(p[n] for p in experts) / 3 for n in experts[0]}
    for n in ("1.weight", "3.weight"):
        left, right = 0.0, 0.0
        for p, s in zip(experts, SOURCES, strict=True):
            x = s.train.whole()[0]
            x = x if n == "1.weight" else F.relu(F.linear(x, p["1.weight"], p["1.bias"]))
            g = x.T @ x / len(x)
            g = 0.9 * g + 0.1 * g.diagonal().diag()
            left, right = left + g, right + g @ p[n].T
        wanted[n] = (torch.linalg.pinv(left) @ right).T if n == "1.weight" else found[n]
        assert torch.allclose(
            found[n] @ left, right.T, atol=1e-9
        )  # hidden units may be dead: the normal equations
    near(found, wanted, 1e-8)


def test_moments_add_and_large_layers_are_left_out():
    def moments(sources, largest=2048):
        method = cs.Method("m", (InputMoments(largest),))
        result = run(cs.settings.multitask(sources, "task"), method, lr=1e-9)
        return [m.items["InputMoments"].tensors for m in result.agent.state.bank.values()]

    whole, (one, two) = (
        moments([SOURCES[0]])[0],
        moments([replace(SOURCES[0], name="x"), replace(SOURCES[0], name="y")]),
    )
    total = Statistics(one) + Statistics(two)
    near(dict(total.tensors), {n: 2 * t for n, t in whole.items()}, 1e-4)
    assert set(whole) == {"count", "second/1.weight", "second/3.weight"} and whole["count"] == 30
    assert set(moments([SOURCES[0]], 5)[0]) == {"count", "second/3.weight"}


def test_layers_know_tied_weights_trunks_and_frozen_entries():
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight
    assert [n for n, _ in layers(cs.models.wrap(tied))] == ["0.weight", "0.weight", "3.weight"]
    assert [n for n, _ in layers(cs.models.multi_head(mlp(), C))] == ["trunk.1.weight"]
    assert layers(cs.models.progressive(D, (4,), C)) == []
    with pytest.raises(cs.Refusal, match="of one module, and this model has none; use average"):
        run(
            cs.settings.merging(SOURCES, scenario="task"),
            cs.methods.regmean(),
            cs.models.progressive(D, (4,), C),
        )


def test_regmean_on_convolutions_is_the_least_of_all_merges():
    """The merged first layer's outputs on each expert's inputs are nearer to that expert's, in sum: the
    least of all merges."""
    sources = [s.map(x=lambda x: x.reshape(-1, 1, 2, 3).repeat(1, 1, 2, 2)) for s in SOURCES]

    def conv():
        return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(72, C))

    model = cs.models.wrap(conv)
    experts = models_of(sources, model)
    found = [
        run(cs.settings.merging(sources), m, model).params
        for m in (cs.methods.regmean(1.0, 0.0), cs.methods.average())
    ]

    def distance(w):
        parts = [
            F.conv2d(s.train.whole()[0], w - e["0.weight"], padding=1)
            for s, e in zip(sources, experts, strict=True)
        ]
        return sum(out.square().sum() / len(out) for out in parts)

    slopes = []
    for p in found:
        w = p["0.weight"].clone().requires_grad_()
        slopes.append(float(torch.autograd.grad(distance(w), w)[0].abs().max()))
    assert slopes[0] < 1e-9 < 1e-3 < slopes[1]
    assert distance(found[0]["0.weight"]) < distance(found[1]["0.weight"])
    near({"b": found[0]["0.bias"]}, {"b": found[1]["0.bias"]}, 1e-12)


# continual merging


def arrive(
    consolidator, models, base=BASE, order=None, by_size=True, sizes=None, at_once=False, buffers=None
):
    agent = receiving(consolidator, base, {"m": torch.zeros(3)} if buffers else None)
    sizes = sizes or [10] * len(models)
    messages = {}
    for i in order or range(len(models)):
        messages[i] = arriving(agent, f"s{i}", models[i], sizes[i], {"m": buffers[i]} if buffers else None)
        if not at_once:
            agent.receive(messages[i], by_size)
    if at_once:
        agent.receive([m for ms in messages.values() for m in ms], by_size)
    return agent.state


def weight(state):
    """The bytes of all tensors of a state."""
    return sum(t.numel() * t.element_size() for t in encode_state(state)[0].values())


MANY = [{"w": rand(100 + i, 4, 3), "b": rand(120 + i, 4)} for i in range(6)]
ONE_BY_ONE = {
    "average": RunningArithmetic(),
    "arithmetic": RunningArithmetic(coefficient=0.4),
    "sum": RunningArithmetic(coefficient=0.4, of="sum"),
    "opcm": OPCM(),
    "parameter_average": WeightSpace(None, Averaging()),
}


@pytest.mark.parametrize("name", list(ONE_BY_ONE))
def test_memory_is_constant_in_the_number_of_experts(name):
    two, six = arrive(ONE_BY_ONE[name], MANY[:2]), arrive(ONE_BY_ONE[name], MANY)
    assert weight(two) == weight(six) and not six.bank
    copies = {"average": 2, "parameter_average": 2, "arithmetic": 4, "sum": 3, "opcm": 3}[name]
    assert (
        weight(six) <= copies * weight(State(BASE, {}, {}, "")) + 24
    )  # parameters and base; what it keeps; three numbers


@pytest.mark.parametrize("name", ["average", "arithmetic", "sum", "parameter_average"])
def test_order_of_arrival_does_not_matter(name):
    one, other = (
        arrive(ONE_BY_ONE[name], MANY, order=order).params
        for order in ([0, 1, 2, 3, 4, 5], [4, 0, 5, 2, 1, 3])
    )
    near(one, other, 1e-12)
    if name != "parameter_average":
        near(one, arrive(ONE_BY_ONE[name], MANY, at_once=True).params, 1e-12)


def test_the_running_mean_is_the_mean_by_examples_with_buffers():
    sizes, buffers = [10, 20, 30, 5, 5, 30], [torch.full((3,), float(i)) for i in range(6)]
    found = arrive(RunningArithmetic(), MANY, sizes=sizes, buffers=buffers)
    near(
        found.params, {n: sum(s / 100 * m[n] for s, m in zip(sizes, MANY, strict=True)) for n in BASE}, 1e-12
    )
    assert torch.allclose(found.buffers["m"], sum(s / 100 * b for s, b in zip(sizes, buffers, strict=True)))
    near(
        arrive(RunningArithmetic(), MANY, sizes=sizes, by_size=False).params,
        {n: sum(m[n] for m in MANY) / 6 for n in BASE},
        1e-12,
    )


@pytest.mark.parametrize("coefficient", [1.0, 0.4, 0.0, -1.0])
def test_running_arithmetic_is_task_arithmetic(coefficient):
    tau = {n: sum(m[n] - BASE[n] for m in MANY) for n in BASE}
    mean = arrive(RunningArithmetic(coefficient=coefficient), MANY).params
    near(mean, {n: BASE[n] + coefficient / 6 * tau[n] for n in BASE}, 1e-12)
    total = arrive(RunningArithmetic(coefficient=coefficient, of="sum"), MANY).params
    near(total, {n: BASE[n] + coefficient * tau[n] for n in BASE}, 1e-12)


@pytest.mark.parametrize(
    ("one", "all_at_once"),
    [
        (cs.methods.running_average(), cs.methods.average()),
        (cs.methods.running_average(0.3), cs.methods.task_arithmetic(0.3)),
        (cs.methods.running_average(0.3, "sum"), cs.methods.task_arithmetic(0.9)),
        (cs.methods.parameter_average(), cs.methods.average()),
    ],
)
def test_one_by_one_in_exmodel_is_all_at_once_in_merging(one, all_at_once):
    def merged(setting, method):
        return run(setting(sources=SOURCES), method)

    wanted = merged(cs.settings.merging, all_at_once).params
    near(merged(cs.settings.exmodel, one).params, wanted, 1e-12)
    near(merged(cs.settings.merging, one).params, wanted, 1e-12)
    two, three = (run(cs.settings.exmodel(sources=SOURCES[:k]), one).agent.state for k in (2, 3))
    assert weight(two) == weight(three)


def test_given_experts_need_a_base_only_where_task_vectors_are_made():
    experts = [cs.Expert(f"e{i}", p, s) for i, (p, s) in enumerate(zip(models_of(), SOURCES, strict=True))]
    base, _ = mlp().init(key(0, "init"))
    near(
        run(cs.settings.exmodel(experts), cs.methods.running_average()).params,
        run(cs.settings.merging(experts), cs.methods.average()).params,
        1e-12,
    )
    for method in (cs.methods.running_average(0.5), cs.methods.opcm()):
        with pytest.raises(cs.Refusal, match="since the experts' base, got none; give `base`"):
            run(cs.settings.exmodel(experts), method)
        with pytest.raises(
            cs.Refusal, match="start from one base, and here agents continue from the merged model"
        ):
            run(cs.settings.federated(SOURCES, rounds=2), method)
    with pytest.raises(cs.ConsilienceError, match="`lr` 1, because it merges by itself, got Ties"):
        OPCM(cs.aggregators.ties())
    half = run(cs.settings.merging(experts, base=base), cs.methods.task_arithmetic(0.5)).params
    near(run(cs.settings.exmodel(experts, base=base), cs.methods.running_average(0.5)).params, half, 1e-12)


def test_the_learner_of_a_stream_averages_what_it_was_after_each_source():
    """In continual each learn goes on from the average so far."""
    alike = cs.settings.continual([source(n, 30, (i, i + 1), i) for i, n in enumerate("xyz")])
    found = run(alike, cs.methods.running_average()).params
    near(found, run(alike, cs.methods.parameter_average()).params, 1e-12)
    last = run(alike, cs.methods.finetune()).params
    assert any((found[n] - last[n]).abs().max() > 1e-3 for n in found)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_opcm_restated(threshold):
    """With all singular vectors, entry by entry of the rotated task vector."""
    base = {"w": rand(0, 4, 3), "b": rand(1, 4)}
    tau = {n: MANY[0][n] - base[n] for n in base}
    lengths, scale = [sum(t.square().sum() for t in tau.values()).sqrt()], 1.0
    for m in MANY[1:4]:
        new = {n: m[n] - base[n] for n in base}
        lengths.append(sum(t.square().sum() for t in new.values()).sqrt())
        u, s, vh = torch.linalg.svd(tau["w"], full_matrices=True)
        inside, r, reached = u.T @ new["w"] @ vh.T, 0, s[0]
        while r < len(s) and reached <= threshold * s.sum():
            r, reached = r + 1, s[: r + 2].sum()
        for p in range(4):
            for q in range(3):
                if p == q or (p < r and q < r):
                    inside[p, q] = 0
        new["w"] = u @ inside @ vh
        total = {n: scale * tau[n] + new[n] for n in base}
        scale = sum(t.square().sum() for t in total.values()).sqrt() / (sum(lengths) / len(lengths))
        tau = {n: t / scale for n, t in total.items()}
    near(
        arrive(OPCM(threshold=threshold), MANY[:4], base).params,
        {n: base[n] + t for n, t in tau.items()},
        1e-10,
    )


def test_opcm_limits():
    near(arrive(OPCM(), MANY[:1]).params, MANY[0], 0)
    u, v = torch.linalg.qr(rand(7, 5, 5)).Q, torch.linalg.qr(rand(8, 4, 4)).Q
    there, along, apart = (
        u[:, :2] @ v[:2],
        u[:, :2] @ rand(9, 2, 2) @ v[:2],
        u[:, 2:] @ rand(10, 3, 2) @ v[2:],
    )
    assert torch.allclose(across(apart, there, 1.0), apart, atol=1e-12)  # of other directions altogether
    for threshold in (0.0, 0.5, 1.0):
        left = across(along + apart, there, threshold)
        assert abs(float((left * there).sum())) < 1e-12  # nothing stands along what is there
    assert torch.allclose(across(along + apart, 0 * there, 0.5), along + apart)
    lengths = [sum((m[n] - BASE[n]).square().sum() for n in BASE).sqrt() for m in MANY]
    found = arrive(OPCM(), MANY).params
    assert torch.allclose(sum((found[n] - BASE[n]).square().sum() for n in BASE).sqrt(), sum(lengths) / 6)


# heads and label spaces of their own


def two_spaces(other):
    """Digits in two halves whose labels are of two spaces, or digits and wine, whose measurements stand in
    the first pixels."""
    digits = cs.data.digits()
    if other == "wine":
        return [digits, cs.data.wine().map(x=lambda x: F.pad(x, (0, 64 - x.shape[1])))]
    halves = cs.data.split_classes(digits, 2)
    return [
        h.map(labels=tuple((space, name) for _, name in h.labels))
        for h, space in zip(halves, ("low", "high"), strict=True)
    ]


def headed(outputs):
    return cs.models.multi_head(cs.models.mlp(64, (64,), 10), outputs)


TRAIN = cs.Training(epochs=5, batch_size=32, lr=0.2)


@pytest.mark.parametrize("other", ["halves", "wine"])
def test_trunks_are_merged_and_heads_kept(other):
    sources = two_spaces(other)
    # Each half declares the ten labels of its own space.
    classes = sum(len(s.labels) for s in sources)
    schedule = cs.settings.merging(sources, scenario="task")
    assert len(schedule.frame.labels) == classes

    def go(method, setting=schedule):
        return cs.run(setting, method, model=headed(classes), training=TRAIN)

    result, alone = go(cs.methods.average()), []
    for s in schedule.sources:
        alone.append(go(cs.methods.finetune(), cs.settings.merging([s], scenario="task")))
    # heads are named by tasks and are drawn by sources: one that is alone among its labels begins as it does
    # here
    for a in alone:
        head = {n: p for n, p in a.agent.state.params.items() if "heads." in n}
        assert len(head) == 2 and all(torch.equal(result.params[n], p) for n, p in head.items())
    for n in ("trunk.1.weight", "trunk.1.bias"):
        assert torch.allclose(result.params[n], (alone[0].params[n] + alone[1].params[n]) / 2, atol=1e-6)
    assert result.matrix[-1].min() > 0.8  # given the task
    for method in (
        cs.methods.regmean(),
        cs.methods.fisher_merging(),
        cs.methods.running_average(),
        cs.methods.opcm(),
    ):
        assert go(method).matrix[-1].min() > 0.8


@pytest.mark.parametrize("scenario", ["class", "domain"])
@pytest.mark.parametrize(
    "mapper", [cs.mappers.mahalanobis(on="inputs"), cs.mappers.min_entropy(), cs.mappers.oracle()], ids=str
)
def test_a_mapper_routes_to_the_heads_of_a_merged_trunk(mapper, scenario):
    """Also one that keeps nothing of the sources: the heads say which there are."""
    sources = two_spaces("halves")
    schedule = cs.settings.merging(sources, scenario=scenario)
    method = cs.methods.average() + cs.methods.infer(mapper)
    result = cs.run(schedule, method, model=headed(20), training=TRAIN)
    assert result.matrix[-1].min() > 0.65 and result.mapper[0, 0] > 0.8
    assert [k[1] for k, *_ in result.agent.choices()] == [s.name for s in sources]
    if scenario == "domain":
        with pytest.raises(cs.Refusal, match="need a task label or a mapper"):
            cs.run(schedule, cs.methods.average(), model=headed(10), training=TRAIN)


@pytest.mark.parametrize("setting", [cs.settings.merging, cs.settings.exmodel])
def test_given_experts_of_other_label_spaces_find_their_columns(setting):
    """Each was trained alone, where the columns are those of its own ten labels."""
    sources, experts = two_spaces("halves"), []
    base, _ = headed(10).init(key(7))
    for s in sources:
        trained = cs.run(
            cs.settings.continual([s], "task", base), cs.methods.finetune(), model=headed(10), training=TRAIN
        )
        experts.append(cs.Expert(s.name, trained.params, s, trained.agent.state.buffers))
        assert next(iter(trained.agent.state.buffers.values())).tolist() == list(s.classes)
    result = cs.run(
        setting(experts, base=base, scenario="task"), cs.methods.running_average(), model=headed(20)
    )
    assert result.matrix[-1].min() > 0.8
    columns = sorted(b.tolist() for n, b in result.agent.state.buffers.items() if n.endswith("columns"))
    assert columns == [[0, 1, 2, 3, 4], [15, 16, 17, 18, 19]]
    wrong = replace(experts[1], source=replace(sources[1], classes=sources[1].classes[:3]))
    with pytest.raises(
        cs.ConsilienceError, match="the head of an expert must have the 3 classes of its source, got 5"
    ):
        cs.run(
            setting([experts[0], wrong], base=base, scenario="task"),
            cs.methods.running_average(),
            model=headed(20),
        )
