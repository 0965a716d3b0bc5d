"""Task inference: superposition, Expert Gate, Mahalanobis, anchors on inputs; and that mappers serve any
task-aware method."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

import consilience as cs
from consilience.cli.build import method_of
from consilience.cli.options import understand
from consilience.core.contexts import Learned, Routing
from consilience.core.message import Module, Statistics
from consilience.core.params import Layout, key, same
from consilience.core.source import Source, Tensors
from consilience.core.viewed import superposition
from consilience.corrections.moments import Moments
from consilience.mappers.autoencoder import ExpertGate, errors, relatedness
from consilience.mappers.covariance import Mahalanobis
from consilience.mappers.mixture import GaussianMixture, NearestMean
from consilience.mappers.superposed import Superposition, entropy
from restate import stopped

D, C = 6, 6
VIEWS = ("hat", "packnet", "psp", "supsup", "xdg")


def source(i, n=40, d=D, scale=2.0):
    g = torch.Generator().manual_seed(100 + i)
    own = (2 * i, 2 * i + 1)
    y = torch.tensor(own)[torch.arange(n) % 2]
    x = torch.randn(C, d, generator=key("centres"), dtype=torch.float64)[y] * scale
    t = Tensors(x + torch.randn(n, d, generator=g, dtype=torch.float64), y)
    return Source(f"s/{i}", t, t, t, tuple(("space", str(c)) for c in range(C)), own)


SOURCES = [source(0), source(1, 33), source(2, 37)]
SPREAD = torch.randn(50, D, generator=key(3), dtype=torch.float64) * 2


def training(**more):
    return cs.Training(**{"epochs": 4, "batch_size": 8, "lr": 0.1, "precision": "fp64", **more})


def mlp():
    return cs.models.mlp(D, (12, 10), C)


def heads():
    return cs.models.multi_head(cs.models.mlp(D, (12, 10), C), C)


def go(method, mapper=None, model=None, sources=SOURCES, scenario="class", **more):
    method = getattr(cs.methods, method)() if isinstance(method, str) else method
    method = method + cs.methods.infer(mapper) if mapper else method
    run = {k: more.pop(k) for k in ("out", "resume", "checkpoint_steps", "progress") if k in more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cs.run(
            cs.settings.continual(sources, scenario), method, model or mlp(), training(**more), **run
        )


@cache
def learned(name, n=3, model="mlp"):
    """A run of a method by tasks of which a mapper knows nothing."""
    return go(name, cs.mappers.average(), {"mlp": mlp, "heads": heads}[model](), SOURCES[:n])


def whole(agent):
    state = agent.state
    return agent.superposed(state.params, state.buffers)


# superposition


@pytest.mark.parametrize("model", ["mlp", "heads"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_one_hot_superposition_is_that_task_bit_for_bit(name, model):
    agent = learned(name, model=model).agent
    seen = []
    for s in SOURCES:
        params = agent.state.params
        for c, ctx in agent.predictor.views:
            params = c.view(params, s.name, ctx)
        seen.append(params)
    made = superposition(seen)
    for k, s in enumerate(SOURCES):
        alpha = torch.eye(3, dtype=torch.float64)[k]
        assert same(made(alpha), seen[k])
        out = whole(agent)(SPREAD, alpha)[:, list(s.classes)]
        own = agent.outputs(agent.state.params, agent.state.buffers, SPREAD, s.name)[:, list(s.classes)]
        assert torch.equal(out, own)
    mean = made(torch.full((3,), 1 / 3, dtype=torch.float64))
    assert all(torch.allclose(mean[n], torch.stack([p[n] for p in seen]).mean(0), atol=1e-12) for n in mean)
    shared = [n for n in mean if all(torch.equal(p[n], seen[0][n]) for p in seen)]
    assert all(torch.equal(mean[n], seen[0][n]) for n in shared)


def test_adding_tasks_leaves_old_superpositions_bit_equal():
    two, three = (learned("supsup", n).agent for n in (2, 3))
    for k in range(2):
        columns = list(SOURCES[k].classes)
        a = whole(two)(SPREAD, torch.eye(2, dtype=torch.float64)[k])[:, columns]
        assert torch.equal(a, whole(three)(SPREAD, torch.eye(3, dtype=torch.float64)[k])[:, columns])


def test_only_the_columns_of_experts_enter_the_entropy():
    whole_stream = cs.settings.continual(SOURCES)
    two = replace(whole_stream, plan=lambda seed: list(whole_stream.plan(seed))[:6])
    agent = cs.run(
        two, cs.methods.supsup() + cs.methods.infer(cs.mappers.average()), mlp(), training(epochs=1)
    ).agent
    out = whole(agent)(SPREAD, torch.ones(2, dtype=torch.float64) / 2)
    assert out.shape == (50, C), "the frame has a third source, which nobody learned"
    assert (out[:, 4:] == -torch.inf).all() and out[:, :4].isfinite().all()
    p = out[:, :4].softmax(1)
    assert torch.allclose(entropy(out), -(p * p.log()).sum(1), atol=1e-12)
    leaf = out.detach().requires_grad_()
    assert torch.autograd.grad(entropy(leaf).sum(), leaf)[0].isfinite().all()


def routing(agent, x=SPREAD):
    keys = [c[0] for c in agent.choices()]
    return Routing(x, lambda: x, lambda: [], keys, lambda: whole(agent))


def finite_difference(agent, x, alpha, h=1e-6):
    def at(a):
        with torch.no_grad():
            out = whole(agent)(x, a)
            p = out[:, out[0].isfinite()].softmax(1)
            return -(p * p.log()).sum(1)

    steps = torch.eye(len(alpha), dtype=alpha.dtype) * h
    return torch.stack([(at(alpha + s) - at(alpha - s)) / (2 * h) for s in steps], 1)


@pytest.mark.parametrize("name", VIEWS)
def test_slopes_are_finite_differences(name):
    """On jittered inputs; those on signed constants sit on kinks of the ReLU, so that SupSup's biases of 0
    want inputs off 0."""
    agent, alpha = learned(name).agent, torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    slopes = finite_difference(agent, SPREAD, alpha)
    with torch.no_grad():
        each = Superposition(together=False).slopes(routing(agent), alpha)
        rows = Superposition(together=False).slopes(routing(agent), alpha.expand(50, 3))
        mean = Superposition().slopes(routing(agent), alpha)
    near = (each - slopes).abs() <= 1e-5 * slopes.abs().clamp_min(1)
    assert near.double().mean() > 0.98, "all but samples whose step crosses a kink"
    assert torch.allclose(each, rows, atol=1e-10)
    assert torch.allclose(mean, each.mean(0), atol=1e-10)


def test_routes_are_the_paper_in_ten_lines():
    """argmin of the slopes at 1 / K; in halves, those not above the median of -g go to 0, the others are
    normalised."""
    agent = learned("supsup").agent
    r, forward = routing(agent), whole(agent)

    def gradient(alpha, x):
        leaf = alpha.clone().requires_grad_()
        out = forward(x, leaf)
        p = out.softmax(1)
        return torch.autograd.grad(-(p * p.clamp_min(1e-300).log()).sum(1).mean(), leaf)[0]

    start = torch.full((3,), 1 / 3, dtype=torch.float64)
    one = torch.stack([gradient(start, x[None]) for x in SPREAD]).argmin(1)
    with torch.no_grad():
        assert torch.equal(Superposition(False, False).route(r, {}).argmax(1), one)
        assert torch.equal(Superposition(True, False).route(r, {}).argmax(1), one), "half of three is one"
        together = Superposition(False, True).route(r, {})
    assert torch.equal(
        together.argmax(1), gradient(start, SPREAD).argmin().expand(50)
    ) and together.shape == (50, 3)
    assert len(one.unique()) > 1

    k = 5
    wide = torch.randn(k, 4, 3, generator=key(9), dtype=torch.float64)
    bent = lambda x, a: torch.tanh(x[:, :4]) @ torch.tensordot(a, wide, 1) * 3  # noqa: E731
    r = Routing(SPREAD, lambda: SPREAD, lambda: [], [("m", str(i)) for i in range(k)], lambda: bent)
    chosen = []
    for x in SPREAD:
        alpha = torch.full((k,), 1 / k, dtype=torch.float64)
        while (alpha > 0).sum() > 1:
            leaf = alpha.clone().requires_grad_()
            p = bent(x[None], leaf).softmax(1)
            g = -torch.autograd.grad(-(p * p.log()).sum(), leaf)[0]
            middle = g[alpha > 0].sort().values[(int((alpha > 0).sum()) + 1) // 2 - 1]
            alpha = torch.where(g <= middle, 0.0, alpha)
            alpha = alpha / alpha.sum()
        chosen.append(int(alpha.argmax()))
    weights = Superposition(together=False).route(r, {})
    assert weights.argmax(1).tolist() == chosen and torch.equal(
        weights.sum(1), torch.ones(50, dtype=torch.float64)
    )
    assert weights.argmax(1).tolist() != Superposition(False, False).route(r, {}).argmax(1).tolist()


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_superposition_on_a_conv_net_and_by_batches(scenario):
    """Convolutions, group norm; each sample's route is its own, whatever the batch."""
    images = [
        replace(
            s,
            **{
                p: Tensors(s.train.x[:, None, :, None].expand(-1, 1, 6, 6) + 0, s.train.y)
                for p in ("train", "validation", "test")
            },
        )
        for s in SOURCES
    ]
    model = cs.models.resnet(20, C, 1, width=2)
    alone = cs.mappers.superposition(together=False)
    agent = go("supsup", alone, model, images, scenario, epochs=1, batch_size=20).agent
    x = images[1].test.x[:8] + 0.01 * torch.randn(8, 1, 6, 6, generator=key(4), dtype=torch.float64)
    weights, _ = agent.route(x)
    assert torch.equal(weights, torch.cat([agent.route(part)[0] for part in x.split(3)]))


def test_superposition_refuses_what_has_no_views():
    told = (
        "gives each task its own view of the parameters, so that there is nothing to superpose; "
        "compose it with supsup"
    )
    for method, model in (("finetune", heads()), ("ewc", heads()), (cs.methods.psp(0.0), mlp())):
        with pytest.raises(cs.Refusal, match=told):
            go(method, cs.mappers.superposition(), model)
    with pytest.raises(
        cs.Refusal, match="for the same classes have no superposition; use a model with one shared head"
    ):
        go(
            "psp",
            cs.mappers.superposition(),
            cs.models.multi_head(cs.models.mlp(D, (12,), 2), 2),
            scenario="domain",
        )
    go("psp", cs.mappers.superposition(), cs.models.mlp(D, (12,), 2), scenario="domain", epochs=1)
    with pytest.raises(cs.Refusal, match="Superposition needs targets that are classes"):
        cs.run(
            cs.settings.continual(cs.data.iid(cs.data.diabetes(), 2)),
            cs.methods.psp() + cs.methods.infer(Superposition()),
        )
    alike = [{"w": torch.ones(2)}, {"w": torch.ones(2)}]
    with pytest.raises(cs.ConsilienceError, match="must differ by task, got the same"):
        superposition(alike)


# anchors


def summary(mapper, s, model=None, seed=0):
    model = model or mlp()
    params, buffers = model.init(key(0))
    params = {n: p.double() for n, p in params.items()}
    layout = Layout.of(params)
    return mapper.summarise(
        Learned(model, params, buffers, params, s, s.task, layout, key(seed, s.name)), None
    )


def places(items, mapper, x):
    keys = [("m", str(i)) for i in range(len(items))]
    memory = dict(zip(keys, items, strict=True))
    return mapper.route(Routing(x, lambda: x, lambda: [], keys), memory).argmax(1)


def test_mahalanobis_is_lda_with_equal_priors():
    """Its argmin is the source of LDA's argmax, from scikit-learn on the pooled data; the distance is the
    formula."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    mapper = Mahalanobis(0.0, "inputs")
    items = [summary(mapper, s) for s in SOURCES]
    x, y = torch.cat([s.train.x for s in SOURCES]), torch.cat([s.train.y for s in SOURCES])
    lda = LinearDiscriminantAnalysis(solver="svd", priors=[1 / C] * C).fit(x.numpy(), y.numpy())
    assert places(items, mapper, SPREAD).tolist() == (lda.predict(SPREAD.numpy()) // 2).tolist()
    mu = torch.stack([x[y == c].mean(0) for c in range(C)])
    s = sum((x[y == c] - mu[c]).T @ (x[y == c] - mu[c]) for c in range(C)) / len(x)
    away = SPREAD[:, None] - mu
    distance = torch.einsum("bci,ij,bcj->bc", away, torch.linalg.inv(s), away).view(-1, 3, 2).min(2).values
    assert torch.allclose(mapper.scores(SPREAD, items, items), -distance, rtol=1e-9)
    assert not torch.equal(distance.argmin(1), places(items, NearestMean("inputs"), SPREAD))


def test_mahalanobis_does_not_see_linear_maps():
    m = torch.randn(D, D, generator=key(1), dtype=torch.float64) + 2 * torch.eye(D, dtype=torch.float64)
    mapped = [replace(s, train=Tensors(s.train.x @ m, s.train.y)) for s in SOURCES]

    def scores(sources, x, ridge):
        items = [summary(Mahalanobis(ridge, "inputs"), s) for s in sources]
        return Mahalanobis(ridge, "inputs").scores(x, items, items)

    one, two = scores(SOURCES, SPREAD, 0.0), scores(mapped, SPREAD @ m, 0.0)
    assert float(((one - two) / one).abs().max()) < 1e-10
    assert float(((scores(SOURCES, SPREAD, 0.1) - scores(mapped, SPREAD @ m, 0.1)) / one).abs().max()) > 1e-3


def test_an_identity_covariance_is_the_nearest_mean():
    """Classes that are a mean and +-1 along every axis have a covariance of I / d within, with and without a
    ridge."""
    cross = torch.cat([torch.eye(D), -torch.eye(D)]).double()
    mu = torch.randn(C, D, generator=key(2), dtype=torch.float64)
    made = []
    for i, s in enumerate(SOURCES):
        x = torch.cat([mu[2 * i] + cross, mu[2 * i + 1] + cross])
        made.append(replace(s, train=Tensors(x, torch.tensor([2 * i, 2 * i + 1]).repeat_interleave(2 * D))))
    for ridge in (0.0, 0.3):
        items = [summary(Mahalanobis(ridge, "inputs"), s) for s in made]
        assert torch.equal(
            places(items, Mahalanobis(ridge, "inputs"), SPREAD), torch.cdist(SPREAD, mu).argmin(1) // 2
        )
        assert torch.equal(
            places(items, Mahalanobis(ridge, "inputs"), SPREAD), places(items, NearestMean("inputs"), SPREAD)
        )


def test_sums_are_shared_exact_and_one():
    """Halves add to the whole; nearest mean and the ridge head have the same sums; a direction without
    variance is left out."""
    s, mapper = SOURCES[0], Mahalanobis(0.0, "inputs")
    half = [replace(s, train=Tensors(s.train.x[i], s.train.y[i])) for i in (slice(0, 13), slice(13, 40))]
    one, two = (summary(mapper, h) for h in half)
    whole_item = summary(mapper, s)
    assert type(whole_item) is Statistics
    for k, t in (one + two).tensors.items():
        assert torch.allclose(t, whole_item.tensors[k], rtol=1e-12)
    assert torch.equal(summary(NearestMean("inputs"), s).tensors["first"], whole_item.tensors["first"])
    flat = cs.models.wrap(lambda: torch.nn.Linear(D, C))  # whose features are its inputs
    ridge = summary(Moments(), s, flat).tensors
    near = partial(torch.testing.assert_close, rtol=1e-13, atol=1e-13)  # another size may take another kernel
    near(ridge["second"][:-1, :-1][tuple(torch.triu_indices(D, D))], whole_item.tensors["second"])
    near(ridge["first"][:-1, list(s.classes)], whole_item.tensors["first"])
    assert torch.equal(ridge["count"][list(s.classes)], whole_item.tensors["count"])
    flat = [
        replace(t, train=Tensors(torch.cat([t.train.x, torch.full((len(t.train.y), 1), 7.0)], 1), t.train.y))
        for t in SOURCES
    ]
    items, old = [summary(mapper, t) for t in flat], [summary(mapper, t) for t in SOURCES]
    there = torch.cat([SPREAD, torch.randn(50, 1, generator=key(8), dtype=torch.float64)], 1)
    assert torch.allclose(mapper.scores(there, items, items), mapper.scores(SPREAD, old, old), rtol=1e-8)
    constant = [replace(s, train=Tensors(s.train.x * 0 + i, s.train.y)) for i, s in enumerate(SOURCES)]
    items = [summary(mapper, t) for t in constant]
    assert places(items, mapper, torch.full((1, D), 1.1).double()).tolist() == [1], (
        "without any variance: nearest mean"
    )


def test_the_covariance_is_of_all_anchors_that_are_known():
    mapper = Mahalanobis(0.0, "inputs")
    items = [summary(mapper, s) for s in SOURCES]
    two = mapper.scores(SPREAD, items[:2], items)
    assert torch.allclose(two, mapper.scores(SPREAD, items, items)[:, :2], rtol=1e-12)
    assert not torch.allclose(two, mapper.scores(SPREAD, items[:2], items[:2]))
    keys = [("m", str(i)) for i in range(3)]
    r = Routing(SPREAD, lambda: SPREAD, lambda: [], keys[:2])
    some, every = (mapper.route(r, dict(zip(keys[:n], items, strict=False))) for n in (2, 3))
    assert torch.equal(every.argmax(1), two.argmax(1)) and not torch.equal(some, every)


def parameters(d, code, seed):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "encoder.weight": (code, d),
        "encoder.bias": (code,),
        "decoder.weight": (d, code),
        "decoder.bias": (d,),
    }
    found = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    return Module(
        {
            **found,
            "mean": torch.randn(d, generator=g).double(),
            "deviation": torch.rand(d, generator=g).double() + 0.5,
        }
    )


def test_the_gate_is_a_softmax_of_errors():
    items = [parameters(D, 3, i) for i in range(3)]
    restated = []
    for item in items:
        t = item.tensors
        target = 1 / (1 + torch.exp(-(SPREAD - t["mean"]) / t["deviation"]))
        code = (target @ t["encoder.weight"].T + t["encoder.bias"]).clamp_min(0)
        r = 1 / (1 + torch.exp(-(code @ t["decoder.weight"].T + t["decoder.bias"])))
        restated.append(((r - target) ** 2).sum(1))
    er = torch.stack(restated, 1)
    gate = torch.exp(-er / 2) / torch.exp(-er / 2).sum(1, keepdim=True)
    keys = [("m", str(i)) for i in range(3)]
    r, memory = Routing(SPREAD, lambda: SPREAD, lambda: [], keys), dict(zip(keys, items, strict=True))
    assert torch.allclose(ExpertGate(soft=True).route(r, memory).double(), gate, atol=1e-6)
    assert torch.equal(ExpertGate().route(r, memory).argmax(1), er.argmin(1))
    equal = torch.full((4, 3), 0.7, dtype=torch.float64)
    assert torch.equal(ExpertGate().gate(equal), torch.full((4, 3), 1 / 3, dtype=torch.float64))
    same_items = dict(zip(keys, [items[0]] * 3, strict=True))
    assert torch.allclose(ExpertGate(soft=True).route(r, same_items), torch.full((50, 3), 1 / 3))
    hot = [float(ExpertGate(temperature=t).gate(er).max(1).values.mean()) for t in (0.5, 2.0, 8.0)]
    assert hot[0] > hot[1] > hot[2]


def test_relatedness():
    own, other = parameters(D, 3, 0), parameters(D, 3, 1)
    assert relatedness(own, own, SPREAD) == 1
    a, k = errors(other, SPREAD).mean(), errors(own, SPREAD).mean()
    assert relatedness(other, own, SPREAD) == pytest.approx(float(1 - (a - k) / k), rel=1e-12)
    s = [source(i, 200, 16) for i in range(2)]
    near = replace(s[0], train=Tensors(s[0].train.x + 0.1, s[0].train.y))
    gates = {n: summary(ExpertGate(), t) for n, t in (("own", s[0]), ("far", s[1]), ("near", near))}
    psi = s[0].train.x
    assert 1 > relatedness(gates["near"], gates["own"], psi) > relatedness(gates["far"], gates["own"], psi)


def test_an_autoencoder_is_undercomplete_keyed_and_its_own_restatement():
    s = SOURCES[0]
    item = summary(ExpertGate(epochs=2), s)
    assert same(item.tensors, summary(ExpertGate(epochs=2), s).tensors)
    assert not same(item.tensors, summary(ExpertGate(epochs=2), s, seed=1).tensors)
    assert type(item) is Module and item.tensors["encoder.weight"].shape == (3, D)
    assert ExpertGate(code=0.99).summarise and summary(ExpertGate(0.01, 0), s).tensors[
        "encoder.weight"
    ].shape == (1, D)
    g, x = key(0, s.name), s.train.x
    net = torch.nn.Sequential(torch.nn.Linear(D, 3), torch.nn.ReLU(), torch.nn.Linear(3, D))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=g) - 1) / layer.in_features**0.5)
            layer.bias.zero_()
    target = torch.sigmoid((x - x.mean(0)) / x.std(0, unbiased=False)).float()
    adam = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(2):
        for i in torch.randperm(40, generator=g).split(32):
            r = torch.sigmoid(net(target[i]))
            loss = -(target[i] * r.log() + (1 - target[i]) * (1 - r).log()).sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    assert torch.allclose(item.tensors["encoder.weight"], net[0].weight, atol=1e-6)
    assert torch.allclose(item.tensors["decoder.bias"], net[2].bias, atol=1e-6)
    flat = summary(ExpertGate(), replace(s, train=Tensors(x * 0 + 3, s.train.y)))
    assert errors(flat, SPREAD).isfinite().all(), "a constant input is divided by 1"


ANCHORS = {
    "nearest_mean": NearestMean("inputs"),
    "gaussian_mixture": GaussianMixture(3, on="inputs"),
    "mahalanobis": Mahalanobis(on="inputs"),
    "expert_gate": ExpertGate(epochs=2),
}


@pytest.mark.parametrize("name", list(ANCHORS))
def test_the_order_of_arrival_changes_no_route(name):
    told = []
    for order in (SOURCES, SOURCES[::-1], [SOURCES[1], SOURCES[2], SOURCES[0]]):
        agent = go("psp", ANCHORS[name], sources=order, epochs=1, batch_size=40).agent
        weights, keys = agent.route(SPREAD)
        told.append([keys[i][1] for i in weights.argmax(1).tolist()])
    assert told[0] == told[1] == told[2] and len(set(told[0])) > 1


@pytest.mark.parametrize("name", ["nearest_mean", "gaussian_mixture", "mahalanobis"])
def test_features_want_a_frozen_backbone_and_inputs_do_not(name):
    make = getattr(cs.mappers, name)
    for method, model in (("packnet", mlp()), ("ewc", heads())):
        with pytest.raises(cs.Refusal, match=r"use on='inputs', or models.multi_head on a frozen trunk"):
            go(method, make(), model)
        go(method, make(on="inputs"), model, epochs=1)
    part = cs.models.frozen(mlp(), ("1.*",))
    with pytest.raises(cs.Refusal, match=r"there are trainable entries under the features; use on='inputs'"):
        go("finetune", make(), part)
    trunk = cs.models.multi_head(cs.models.random_features(D, 32), C)
    assert go("finetune", make(), trunk).mapper_accuracy > 0.5


def test_anchors_travel():
    """Two agents that learn apart each route to all experts, by the anchors that they received."""
    streams = [SOURCES[:2], SOURCES[2:]]
    for name, mapper in ANCHORS.items():
        method = cs.Method(name, consolidator=cs.consolidators.experts(), mapper=mapper)
        r = cs.run(cs.settings.skill(streams), method, heads(), training())
        assert r.mapper_accuracy > 0.5, name
    assert (
        cs.run(
            cs.settings.skill(streams), cs.methods.skill("mahalanobis"), training=training()
        ).mapper_accuracy
        > 0.6
    )


def test_a_server_that_never_learned_routes_to_what_it_heard_of():
    parts = list(digits())
    fit = cs.Training(epochs=3, lr=0.05, momentum=0.9)
    schedule = cs.settings.federated_continual([parts[:2], parts[2:]], 1)
    for mapper in (cs.mappers.mahalanobis(on="inputs"), cs.mappers.superposition()):
        r = cs.run(
            schedule, cs.methods.supsup() + cs.methods.infer(mapper), cs.models.mlp(64, (96,), 10), fit
        )
        assert not r.agent.state.visits and len(r.agent.choices()) == 3
        assert r.mapper_accuracy > (0.9 if mapper.name == "Mahalanobis" else 0.34) and r.score > 0.3


# they serve any task-aware method


@cache
def digits():
    parts = cs.data.split_classes(cs.data.digits(), 5)
    return tuple(parts[:3])


SERVED = {
    "min_entropy": (cs.mappers.min_entropy(), 0.38),
    "superposition": (cs.mappers.superposition(), 0.6),
    "superposition, one gradient a sample": (cs.mappers.superposition(False, False), 0.34),
    "expert_gate": (cs.mappers.expert_gate(epochs=3), 0.75),
    "nearest_mean": (cs.mappers.nearest_mean("inputs"), 0.8),
    "gaussian_mixture": (cs.mappers.gaussian_mixture(5, on="inputs"), 0.8),
    "mahalanobis": (cs.mappers.mahalanobis(on="inputs"), 0.9),
}


@pytest.mark.parametrize("method", [*VIEWS, "finetune"])
def test_mappers_serve_any_task_aware_method(method):
    """Three tasks of digits without labels at evaluation: the task is found more often than by chance, 1/3,
    and the method's expert for it answers. Training does not depend on the mapper."""
    fit = cs.Training(epochs=3, batch_size=32, lr=0.05, momentum=0.9)
    params = None
    for name, (mapper, low) in SERVED.items():
        model = cs.models.mlp(64, (96,), 10)
        model = cs.models.multi_head(model, 10) if method == "finetune" else model
        composed = getattr(cs.methods, method)() + cs.methods.infer(mapper)
        run = lambda m=composed, net=model: cs.run(cs.settings.continual(digits()), m, net, fit)  # noqa: E731
        if method == "finetune" and mapper.superposes:
            with pytest.raises(cs.Refusal, match="nothing to superpose"):
                run()
            continue
        r = run()
        assert r.mapper_accuracy > low, (name, r.mapper_accuracy)
        assert r.score > 0.85 * low, (name, r.score)
        assert r.score <= r.mapper_accuracy + 0.02
        params = params or r.params
        assert same(r.params, params), f"{name}: training is that of any other mapper"


def test_without_a_mapper_the_same_methods_refuse_or_forget():
    for name in VIEWS:
        with pytest.raises(cs.Refusal, match="compose it with a mapper"):
            cs.run(cs.settings.continual(digits()), getattr(cs.methods, name)())


# resuming


@pytest.mark.parametrize(
    "mapper", [ExpertGate(epochs=1), Superposition(True), Mahalanobis(on="inputs")], ids=lambda m: m.name
)
def test_resumes_mid_task_to_the_same_bits(mapper, tmp_path):
    def run(**more):
        return go("supsup", mapper, epochs=2, **more)

    done = run()
    stopped(run, tmp_path / "run", 14)
    again = run(out=tmp_path / "run", resume=True)
    assert same(done.params, again.params) and (done.matrices == again.matrices).all()
    a, b = done.agent.memory(mapper), again.agent.memory(mapper)
    assert a.keys() == b.keys() and all(same(a[k].tensors, b[k].tensors) for k in a)
    assert torch.equal(done.agent.route(SPREAD)[0], again.agent.route(SPREAD)[0])


# composing by name


def test_infer_is_in_the_command_line():
    order = understand("run", ["--method", "packnet+infer", "--method.infer.mapper", "expert_gate"])
    method = method_of(order, order.names["method"])
    assert method.mapper == cs.mappers.expert_gate() and method.name == "packnet+expertgate"
    order = understand(
        "run", ["--method", "hat+consilience.mappers.nearest_mean", "--method.nearest_mean.on", "inputs"]
    )
    assert method_of(order, order.names["method"]).mapper == cs.mappers.nearest_mean("inputs")
    order = understand("run", ["--method", "skill", "--method.mapper", "mahalanobis"])
    assert method_of(order, "skill").mapper == cs.mappers.mahalanobis()
    with pytest.raises(cs.ConsilienceError, match="nearest: expert_gate"):
        understand("run", ["--method", "hat+infer", "--method.infer.mapper", "expert_gat"])
    with pytest.raises(
        cs.ConsilienceError, match=r"made by consilience.mappers, such as min_entropy\(\), got 'hat'"
    ):
        cs.methods.infer("hat")


def test_bad_spaces_are_refused():
    for kind in (NearestMean, GaussianMixture, Mahalanobis, ExpertGate):
        with pytest.raises(cs.ConsilienceError, match="`on` must be features or inputs, got 'pixels'"):
            kind(on="pixels")
    for bad in ({"code": 1.0}, {"code": 0.0}, {"lr": 0.0}, {"temperature": -1.0}, {"epochs": -1}):
        with pytest.raises(cs.ConsilienceError, match="must be"):
            ExpertGate(**bad)
