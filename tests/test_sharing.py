"""Models that tasks share in part: restatements of the papers' equations, identities to the bit, settings."""

from __future__ import annotations

import functools
import math
import runpy
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience.core.contexts import Context
from consilience.core.errors import ConsilienceError
from consilience.core.params import Layout, key, same
from consilience.core.source import Source, Tensors
from consilience.core.tree import Tree

D, W = 6, 4


def source(i, n=24, x=None, task=None, name=None):
    g = torch.Generator().manual_seed(i)
    x = torch.randn(n, D, generator=g, dtype=torch.float64) if x is None else x
    t = Tensors(x, torch.tensor((2 * i, 2 * i + 1))[torch.randint(2, (len(x),), generator=g)])
    labels = tuple(("space", str(c)) for c in range(6))
    return Source(name or f"s/{i}", t, t, t, labels, (2 * i, 2 * i + 1), task)


TASKS = [source(0), source(1)]


def trunk():
    tanh = nn.Tanh()
    # One activation stands in two places.
    return nn.Sequential(nn.Linear(D, W), tanh, nn.Linear(W, W), tanh)


def first():
    return nn.Sequential(nn.Linear(D, W), nn.Tanh())


def second():
    return nn.Sequential(nn.Linear(W, W), nn.Tanh())


MODELS = {
    "hard": lambda: cs.models.multi_head(cs.models.wrap(trunk, W, headless=True), 6, hidden=(8,)),
    "depth 1": lambda: cs.models.multi_head(trunk, 6, shared=1),
    "depth 0": lambda: cs.models.multi_head(trunk, 6, shared=0, hidden=(8,)),
    "cross_stitch": lambda: cs.models.cross_stitch(trunk, 6),
    "nddr": lambda: cs.models.nddr(trunk, 6, shared=1),
    "sluice": lambda: cs.models.sluice(trunk, 6),
    "mmoe": lambda: cs.models.mmoe(trunk, 6, experts=2),
    "cgc": lambda: cs.models.cgc(trunk, 6),
    "ple": lambda: cs.models.ple([first, second, second], 6),
    "mtan": lambda: cs.models.mtan(trunk, 6),
    **{
        form: functools.partial(cs.models.conditioned, trunk, 6, form, 3)
        for form in ("sum", "concatenation", "multiplicative", "film", "gating")
    },
}
each_model = pytest.mark.parametrize("name", list(MODELS))


def grown(model, sources=TASKS):
    """Return entries of a model with these tasks, in float64, all different from their first values."""
    params, buffers = model.init(key(0))
    for each in sources:
        params, buffers = model.grow(params, buffers, each, key(0, each.name))
    g = torch.Generator().manual_seed(1)
    moved = {n: p.double() + 0.3 * torch.randn(p.shape, generator=g) for n, p in params.items()}
    return moved, buffers


def training(**more):
    given = {"epochs": 2, "batch_size": 8, "lr": 0.1, "momentum": 0.9, "precision": "fp64", **more}
    return cs.Training(**given)


def joint(model, method=None, sources=TASKS, **more):
    schedule = cs.settings.multitask(sources, "task")
    return cs.run(schedule, method or cs.methods.finetune(), model, training(**more))


# Identities, to the bit, over whole runs.


def entries(result, prefix):
    return {n[len(prefix) :]: p for n, p in result.params.items() if n.startswith(prefix)}


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_one_expert_and_all_layers_are_hard_sharing(hidden):
    hard = joint(cs.models.multi_head(cs.models.wrap(trunk, W, headless=True), 6, hidden=hidden))
    one = joint(cs.models.mmoe(trunk, 6, experts=1, hidden=hidden))
    every = joint(cs.models.multi_head(trunk, 6, shared=2, hidden=hidden))
    assert same(entries(hard, "trunk."), entries(one, "experts.0.0."))
    assert same(entries(hard, "heads."), entries(one, "heads."))
    assert same(hard.params, {n: p for n, p in every.params.items() if n != "seed"})
    assert (hard.matrices == one.matrices).all()
    # A gate over one expert learns nothing, and a second expert is no hard sharing.
    two = joint(cs.models.mmoe(trunk, 6, experts=2, hidden=hidden))
    assert not same(entries(hard, "trunk."), entries(two, "experts.0.0."))


def test_no_shared_layer_and_cross_stitch_by_the_identity_are_independent_networks():
    module = trunk()
    # The loss of a step is a mean over tasks, so that a task alone takes half the rate.
    apart = joint(cs.models.multi_head(module, 6, shared=0), lr=0.2)
    for each in TASKS:
        model = cs.models.multi_head(cs.models.wrap(module, W, headless=True), 6)
        alone = cs.run(cs.settings.continual([each], "task"), cs.methods.finetune(), model, training())
        assert same(entries(apart, f"nets.{each.name}."), entries(alone, "trunk."))
        assert same(entries(apart, f"heads.{each.name}."), entries(alone, f"heads.{each.name}."))

    for unit in (cs.models.cross_stitch, cs.models.nddr):
        fixed = cs.models.frozen(unit(module, 6, own=1, other=0), "stitch.*")
        stitched = joint(fixed, lr=0.2)
        assert same(
            {n: p for n, p in stitched.params.items() if not n.startswith("stitch.")}, apart.params
        ), unit
    # Units that may move do.
    free = joint(cs.models.cross_stitch(module, 6, own=1, other=0), lr=0.2)
    assert not same(entries(free, "nets."), entries(apart, "nets."))


# The papers' equations.


def layers(params, prefix, names=("0", "2")):
    return [(params[f"{prefix}{n}.weight"], params[f"{prefix}{n}.bias"]) for n in names]


def dense(pair, h):
    return torch.tanh(h @ pair[0].T + pair[1])


def answers(model, params, buffers, x, psis, task):
    """Compare outputs with those of a task's head on features that a restatement gives."""
    out = model(params, buffers, x, task, False)[0]
    head, columns = params[f"heads.{task}.weight"], buffers[f"heads.{task}.columns"]
    torch.testing.assert_close(out[:, columns], psis @ head.T + params[f"heads.{task}.bias"])
    bound = model.bind(params, buffers, True)[0](x, task)
    assert torch.equal(bound, out)
    torch.testing.assert_close(model.features(params, buffers, x, task), psis)


X = TASKS[0].train.x
A, B = (each.name for each in TASKS)


@pytest.mark.parametrize("unit", ["stitch", "nddr", "sluice"])
def test_stitched_networks_are_those_of_the_papers(unit):
    make = {"stitch": "cross_stitch", "nddr": "nddr", "sluice": "sluice"}[unit]
    model = getattr(cs.models, make)(trunk, 6)
    params, buffers = grown(model)
    h, kept = {A: X, B: X}, {A: [], B: []}
    for i, name in enumerate(("0", "2")):
        out = {t: dense(layers(params, f"nets.{t}.", [name])[0], h[t]) for t in (A, B)}
        for t in (A, B):
            alpha = {s: params[f"stitch.{t}.{i}.{s}"] for s in (A, B)}
            if unit == "stitch":
                h[t] = alpha[A] * out[A] + alpha[B] * out[B]
            elif unit == "nddr":
                h[t] = torch.cat([out[A], out[B]], 1) @ torch.cat([alpha[A], alpha[B]], 1).T
            else:
                parts = {s: out[s].view(-1, 2, W // 2) for s in (A, B)}
                h[t] = sum(torch.einsum("gh,bhw->bgw", alpha[s], parts[s]) for s in (A, B)).flatten(1)
            kept[t].append(h[t])
    for t in (A, B):
        beta = params[f"stitch.{t}.beta"] if unit == "sluice" else torch.tensor([0.0, 1.0])
        answers(model, params, buffers, X, beta[0] * kept[t][0] + beta[1] * kept[t][1], t)


def test_the_scale_of_three_stitched_networks_is_that_of_two():
    third = source(2)
    model = cs.models.cross_stitch(nn.Sequential(nn.Identity(), nn.Linear(D, D)), 6)
    params, buffers = model.init(key(0))
    for each in (*TASKS, third):
        params, buffers = model.grow(params, buffers, each, key(0, each.name))
    alone = model.layers[0](*model.trunk.init(key(0)), X.float(), None, False)[0]
    # Networks of one module with weights are equal at first: 0.9 + 0.1 of the same.
    torch.testing.assert_close(model.features(params, buffers, X.float(), A), alone)


def gate(params, name, z):
    return z @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def test_mmoe_is_that_of_the_paper():
    model = cs.models.mmoe(trunk, 6, experts=3)
    params, buffers = grown(model)
    experts = []
    for i in range(3):
        one, two = layers(params, f"experts.0.{i}.")
        experts.append(dense(two, dense(one, X)))
    for t in (A, B):
        g = gate(params, f"gates.{t}.0", X).softmax(1)
        answers(model, params, buffers, X, torch.einsum("be,ebw->bw", g, torch.stack(experts)), t)


def test_ple_of_one_layer_is_cgc_to_the_bit():
    model = cs.models.ple([first], 6, shared=2, own=1)
    params, buffers = grown(model)

    def expert(prefix):
        return torch.tanh(F.linear(X, params[f"{prefix}0.weight"], params[f"{prefix}0.bias"]))

    for t in (A, B):
        outs = torch.stack([expert(f"{p}.") for p in (f"own.{t}.0.0", "experts.0.0", "experts.0.1")], 1)
        g = F.linear(X, params[f"gates.{t}.0.weight"], params[f"gates.{t}.0.bias"]).softmax(1)
        psi = (g[:, :, None] * outs).sum(1)
        out = F.linear(psi, params[f"heads.{t}.weight"], params[f"heads.{t}.bias"])
        columns = buffers[f"heads.{t}.columns"]
        assert torch.equal(model(params, buffers, X, t, False)[0][:, columns], out)
    one, two = (joint(m) for m in (model, cs.models.cgc(first, 6, shared=2, own=1)))
    assert same(one.params, two.params)


def test_ple_is_that_of_the_paper():
    model = cs.models.ple([first, second], 6, shared=2, own=1)
    params, buffers = grown(model)

    def expert(prefix, h):
        return dense(layers(params, prefix, ["0"])[0], h)

    own = {t: expert(f"own.{t}.0.0.", X) for t in (A, B)}
    common = [expert(f"experts.0.{i}.", X) for i in range(2)]
    h = {}
    for t in (A, B):
        g = gate(params, f"gates.{t}.0", X).softmax(1)
        h[t] = sum(g[:, i : i + 1] * e for i, e in enumerate([own[t], *common]))
    rows = [gate(params, f"own.{t}.0.gate", X) for t in (A, B)]
    g = torch.cat([*rows, gate(params, "gate.0", X)], 1).softmax(1)
    shared = sum(g[:, i : i + 1] * e for i, e in enumerate([own[A], own[B], *common]))
    for t in (A, B):
        last = [expert(f"own.{t}.1.0.", h[t]), *(expert(f"experts.1.{i}.", shared) for i in range(2))]
        g = gate(params, f"gates.{t}.1", h[t]).softmax(1)
        answers(model, params, buffers, X, sum(g[:, i : i + 1] * e for i, e in enumerate(last)), t)


def test_mtan_is_that_of_the_paper():
    model = cs.models.mtan(trunk, 6)
    params, buffers = grown(model)
    one, two = layers(params, "trunk.")
    (merge,) = layers(params, "merge.", ["2"])
    h1 = X @ one[0].T + one[1]
    h2 = torch.tanh(h1) @ two[0].T + two[1]

    def attention(place, h):
        return torch.sigmoid(gate(params, f"{place}.mask", gate(params, f"{place}.hidden", h).relu()))

    for t in (A, B):
        q1 = torch.tanh(attention(f"attention.{t}.0", h1) * h1)
        read = torch.cat([h2, q1 @ merge[0].T + merge[1]], 1)
        answers(model, params, buffers, X, torch.tanh(attention(f"attention.{t}.1", read) * h2), t)


@pytest.mark.parametrize("form", ["sum", "concatenation", "multiplicative", "film", "gating"])
def test_conditions_are_as_their_forms_say(form):
    model = cs.models.conditioned(trunk, 6, form, 3)
    params, buffers = grown(model)
    for t in (A, B):
        e, h = params[f"conditions.{t}"], X
        for i, (weight, bias) in enumerate(layers(params, "trunk.")):
            h = h @ weight.T + bias
            at = {n: params.get(f"condition.{i}.{n}") for n in ("weight", "shift", "bias", "matrix")}
            said = None if at["weight"] is None else at["weight"] @ e
            if form == "sum":
                h = h + said
            elif form == "concatenation":
                h = torch.cat([h, e.expand(len(h), 3)], 1) @ at["matrix"].T
            elif form == "gating":
                h = h * torch.sigmoid(said + at["bias"])
            else:
                h = h * (1 + said) + (at["shift"] @ e if form == "film" else 0)
            h = torch.tanh(h)
        answers(model, params, buffers, X, h, t)
    # Layers that are left out read nothing.
    assert "condition.0.weight" not in cs.models.conditioned(trunk, 6, form, 3, layers=[1]).init(key(0))[0]


def test_hidden_layers_come_before_a_head():
    model = MODELS["hard"]()
    params, buffers = grown(model)
    psi = X
    for pair in layers(params, "trunk."):
        psi = dense(pair, psi)
    psi = gate(params, f"hidden.{A}.0", psi).relu()
    answers(model, params, buffers, X, psi, A)
    assert params[f"hidden.{A}.0.weight"].shape == (8, W)
    assert model.task_of(f"hidden.{A}.0.weight") == model.task_of(f"heads.{A}.weight") == A


# Which entries tasks share.


@each_model
def test_shared_entries_are_those_that_several_losses_reach(name):
    model = MODELS[name]()
    params, buffers = grown(model)
    leaves = {n: p.requires_grad_() for n, p in params.items()}
    reached = {n: set() for n in leaves}
    for each in TASKS:
        out = model(leaves, buffers, X, each.name, True)[0]
        loss = F.cross_entropy(out, each.train.y)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for n, grad in zip(leaves, grads, strict=True):
            if grad is not None and grad.any():
                reached[n].add(each.name)
    for n, by in reached.items():
        assert by, n
        assert model.shared(n) == (len(by) == 2), (n, by)
        assert len(by) == 2 or by == {model.task_of(n)}, n


@dataclass(frozen=True)
class Watching(cs.Aggregator):
    """The mean, which notes how long rows are."""

    seen: list = field(default_factory=list)

    def combine(self, rows, weights, generator):
        self.seen.append(rows.shape[1])
        return weights @ rows


def test_aggregators_see_what_networks_of_tasks_share():
    for name in ("cross_stitch", "ple", "mmoe", "depth 1"):
        model, watching = MODELS[name](), Watching()
        params = joint(model, cs.methods.aggregate(watching), epochs=1).params
        shared = [p for n, p in params.items() if p.is_floating_point() and model.shared(n)]
        assert set(watching.seen) == {sum(p.numel() for p in shared)}, name


# Settings, engines, kinds of inputs.


QUICK = ("depth 1", "cross_stitch", "ple", "film", "mtan")
"""One of each kind; the others are left to `make test-all`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_models_learn_in_each_setting_and_engines_agree(name):
    make, clients = MODELS[name], [source(i % 2, name=f"c/{i}", task=f"t{i % 2}") for i in range(4)]
    schedules = {
        "multitask": cs.settings.multitask(TASKS, "task"),
        "continual": cs.settings.continual(TASKS, "task"),
        "federated": cs.settings.federated(clients, rounds=2, scenario="task"),
    }
    for setting, schedule in schedules.items():
        one, many = (
            cs.run(schedule, cs.methods.finetune(), make(), training(epochs=1, lr=0.02), engine=engine)
            for engine in ("serial", "batched")
        )
        assert one.params.keys() == many.params.keys()
        for n, p in one.params.items():
            torch.testing.assert_close(many.params[n], p, rtol=1e-7, atol=1e-9, msg=f"{setting} {n}")
        assert one.matrix.shape[1] == len(schedule.judged)


def test_clients_of_one_task_begin_with_equal_networks():
    clients = [source(0, name=f"c/{i}", task="t") for i in range(2)]
    model = MODELS["depth 0"]()
    init = model.init(key(0))
    one, two = (model.grow(*init, each, key(0, each.name))[0] for each in clients)
    assert all(torch.equal(p, two[n]) for n, p in one.items() if n.startswith("nets."))
    other = model.init(key(1))
    assert not same(entries_of(model.grow(*other, clients[0], key(0, "c/0"))[0]), entries_of(one))


def entries_of(params):
    return {n: p for n, p in params.items() if n.startswith("nets.")}


def image_trunk():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


IMAGES = {
    "depth": lambda: cs.models.multi_head(image_trunk, 6, shared=1),
    "cross_stitch": lambda: cs.models.cross_stitch(image_trunk, 6),
    "nddr": lambda: cs.models.nddr(image_trunk, 6),
    "mmoe": lambda: cs.models.mmoe(image_trunk, 6),
    "stem": lambda: cs.models.mmoe(nn.Flatten(), 6, stem=lambda: nn.Conv2d(1, 4, 3)),
    "ple": lambda: cs.models.ple([image_trunk, second], 6),
    "mtan": lambda: cs.models.mtan(image_trunk, 6),
    "film": lambda: cs.models.conditioned(image_trunk, 6),
    "concatenation": lambda: cs.models.conditioned(image_trunk, 6, "concatenation"),
}


@pytest.mark.parametrize("name", list(IMAGES))
def test_images(name):
    g = torch.Generator().manual_seed(0)
    tasks = [source(i, x=torch.rand(16, 1, 8, 8, generator=g)) for i in range(2)]
    model = IMAGES[name]()
    result = joint(model, sources=tasks, epochs=1, precision="fp32")
    trained = result.params
    assert all(torch.isfinite(p).all() for p in trained.values())
    begun = {}
    for each in tasks:
        begun = {**begun, **model.grow(*model.init(key(0)), each, key(0, each.name))[0]}
    assert begun.keys() <= trained.keys()
    # Statistics of batches move, wherever a trunk is.
    means = [b for n, b in result.agent.state.buffers.items() if n.endswith("running_mean")]
    assert all(b.any() for b in means)
    assert bool(means) == (name != "stem")


class Bag(nn.Module):
    """The mean of the embeddings of tokens that are no padding, or the embeddings."""

    def __init__(self, mean):
        super().__init__()
        self.embed, self.mean = nn.Embedding(20, W, padding_idx=0), mean

    def forward(self, ids):
        h = self.embed(ids)
        if not self.mean:
            return h
        there = (ids > 0)[..., None]
        return (h * there).sum(1) / there.sum(1).clamp_min(1)


TEXTS = {
    "depth": lambda: cs.models.multi_head(lambda: nn.Sequential(Bag(True), nn.Linear(W, W)), 6, shared=1),
    "cross_stitch": lambda: cs.models.cross_stitch(lambda: nn.Sequential(Bag(True), nn.Linear(W, W)), 6),
    "mmoe": lambda: cs.models.mmoe(second, 6, stem=lambda: Bag(True)),
    "places": lambda: cs.models.mmoe(second, 6, stem=lambda: Bag(False)),
    "film": lambda: cs.models.conditioned(
        lambda: nn.Sequential(nn.Embedding(20, W), nn.Linear(W, W), nn.Tanh()), 6
    ),
    "mtan": lambda: cs.models.mtan(lambda: nn.Sequential(nn.Embedding(20, W), nn.Linear(W, W)), 6),
}


@pytest.mark.parametrize("name", list(TEXTS))
def test_texts_with_padding(name):
    at_places = name in ("places", "film", "mtan")
    g = torch.Generator().manual_seed(0)
    made = []
    for i in range(2):
        lengths = torch.randint(1, 6, (16,), generator=g)
        ids = torch.randint(1, 20, (16, 5), generator=g) * (torch.arange(5) < lengths[:, None])
        y = torch.tensor((2 * i, 2 * i + 1))[torch.randint(2, (16, 5) if at_places else (16,), generator=g)]
        if at_places:
            y = torch.where(torch.arange(5) < lengths[:, None], y, -100)
        t = Tensors(Tree({"0": ids}, {"0": 0}, lengths), y)
        labels = tuple(("space", str(c)) for c in range(6))
        made.append(Source(f"s/{i}", t, t, t, labels, (2 * i, 2 * i + 1)))
    model = TEXTS[name]()
    result = joint(model, sources=made, epochs=1, precision="fp32")
    params, buffers = result.params, result.agent.state.buffers

    # Padding changes nothing: neither what gates read nor what experts give at a place.
    short = Tree({"0": torch.tensor([[3, 4]])}, {"0": 0}, torch.tensor([2]))
    out = model(params, buffers, short, "s/0", False)[0]
    padded = model(params, buffers, short.padded(5), "s/0", False)[0]
    torch.testing.assert_close(padded[..., :2] if at_places else padded, out)


# What is reported.


def test_patterns_are_the_means_of_gates_and_their_entropy(tmp_path):
    model = MODELS["mmoe"]()
    result = cs.run(
        cs.settings.multitask(TASKS, "task"), cs.methods.finetune(), model, training(), out=tmp_path
    )
    for each in TASKS:
        g = gate(result.params, f"gates.{each.name}.0", each.train.x).softmax(1)
        found = result.sharing[each.name]["layer 0"]
        assert found["parts"] == ["expert 0.0", "expert 0.1"]
        assert found["weights"] == pytest.approx(g.mean(0).tolist())
        assert found["entropy"] == pytest.approx(float(-(g * g.log()).sum(1).mean()))
    buffers = result.agent.state.buffers
    assert cs.models.sharing(model, result.params, buffers, TASKS) == result.sharing
    assert cs.report.load(tmp_path).sharing == result.sharing
    page = (cs.report.write([result], tmp_path / "page.html")).read_text()
    assert "what each task shares" in page
    assert f"{found['entropy']:.3f} of 0.693" in page
    assert joint(MODELS["hard"]()).sharing == {}


def test_patterns_of_networks_are_their_units():
    result = joint(MODELS["cross_stitch"]())
    found = result.sharing[A]["layer 1"]
    assert found["weights"] == pytest.approx([float(result.params[f"stitch.{A}.1.{s}"]) for s in (A, B)])
    assert found["entropy"] is None
    skip = joint(MODELS["sluice"]()).sharing[B]["skip"]
    assert skip["parts"] == ["layer 0", "layer 1"]
    places = joint(MODELS["ple"]()).sharing[A]
    assert list(places) == [*(f"layer {i}" for i in range(3)), *(f"layer {i}, shared gate" for i in range(2))]
    assert all(sum(own["weights"]) == pytest.approx(1) for own in places.values())


def test_experts_that_die_are_named():
    class Dead(type(MODELS["mmoe"]())):
        def own_entries(self, task, stages, generator):
            new = super().own_entries(task, stages, generator)
            new[f"gates.{task}.0.bias"] = torch.tensor([30.0, 0.0 if task == A else self.other])
            return new

    for other, dies in ((0.0, True), (30.0, False)):
        model = Dead([trunk], 6, 2)
        model.other = other
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            joint(model, epochs=1, lr=1e-4)
        assert any("expert 0.1 died" in str(w.message) for w in seen) == dies


# Refusals.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cs.models.multi_head(trunk, 6, shared=3), "must be in 0 .. 2"),
        (lambda: cs.models.cross_stitch(trunk, 6, shared=2), "must leave a layer"),
        (lambda: cs.models.cross_stitch(trunk, 6, own=float("nan")), "`own` must be finite"),
        (lambda: cs.models.conditioned(trunk, 6, "product"), "`form` must be one of"),
        (lambda: cs.models.conditioned(trunk, 6, layers=[2]), "numbers of the 2 layers"),
        (lambda: cs.models.mtan(lambda: Bag(True), 6), None),
        (lambda: cs.models.mtan(nn.LSTMCell(3, 3), 6), "must say their widths"),
        (lambda: cs.models.ple([], 6), "a module per extraction layer"),
        (lambda: cs.models.mmoe(3, 6), "must be a torch module"),
        (lambda: cs.models.mmoe(trunk, 6, experts=0), "shared"),
        (lambda: cs.models.multi_head(cs.models.mlp(D), 6, hidden=(0,)), "hidden"),
    ],
)
def test_what_cannot_be_made_is_refused(make, words):
    if words is None:
        make()
        return
    with pytest.raises(ConsilienceError, match=words):
        make()


def test_what_cannot_run_is_refused_before_training():
    tokens = [replace(t, train=Tensors(torch.ones(4, 3).long(), t.train.y[:4])) for t in TASKS]
    with pytest.raises(ConsilienceError, match="give a `stem`"):
        joint(cs.models.mmoe(lambda: Bag(True), 6), sources=tokens)
    unequal = cs.models.sluice(lambda: nn.Sequential(nn.Linear(D, 4), nn.Linear(4, 2)), 6)
    with pytest.raises(ConsilienceError, match="layers of one shape"):
        joint(unequal)
    with pytest.raises(ConsilienceError, match="must divide the width"):
        joint(cs.models.sluice(trunk, 6, subspaces=3))
    # Domains share classes, so that a head needs to know which task it is.
    domains = [source(0, name=f"d/{i}", task=f"t{i}") for i in range(2)]
    with pytest.raises(ConsilienceError, match="task label or a mapper"):
        cs.run(
            cs.settings.multitask(domains, "domain"),
            cs.methods.finetune(),
            MODELS["cross_stitch"](),
            training(),
        )
    with pytest.raises(ConsilienceError, match="read those of other tasks"):
        schedule = cs.settings.skill(TASKS)
        cs.run(schedule, cs.methods.average_ensemble(), MODELS["cross_stitch"](), training())
    tied = nn.Linear(D, D)
    with pytest.raises(ConsilienceError, match="must not share entries"):
        cs.models.cross_stitch(nn.Sequential(tied, nn.Tanh(), tied), 6)
    with pytest.raises(ConsilienceError, match="cannot be frozen by patterns"):
        cs.models.frozen(cs.models.cross_stitch(image_trunk, 6), "nets.*")
    with pytest.raises(ConsilienceError, match="must match an entry"):
        cs.models.frozen(MODELS["mmoe"](), "trunk.*")


def test_frozen_layers_of_a_module_stay():
    module = trunk()
    module[0].requires_grad_(False)
    result = joint(cs.models.cross_stitch(module, 6))
    assert torch.equal(result.params[f"nets.{A}.0.weight"], module[0].weight)
    assert not torch.equal(result.params[f"nets.{A}.2.weight"].float(), module[2].weight)


# The examples.


@pytest.mark.parametrize(("name", "lines"), [("hard_sharing", 92), ("mmoe", 76)])
def test_an_example_is_a_tenth_of_the_plain_code(name, lines, monkeypatch, capsys):
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    text = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith('"""')]
    assert len(text) <= lines / 10

    found, run = [], cs.run
    monkeypatch.setattr(cs, "run", lambda *args: found.append(run(*args)) or found[0])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    scores = dict(zip(found[0].sources, found[0].matrix[-1], strict=True))
    if name == "mmoe":
        entropies = [own["layer 0"]["entropy"] for own in found[0].sharing.values()]
        assert len(entropies) == 3
        assert all(0 < value <= math.log(8) for value in entropies)
        assert all(f"gate entropy: {value:.3f}" in out for value in entropies)
        return
    # Classes by accuracy against chance, and values by a metric of their own.
    assert scores["data/sentiment"] > 1 / 3 + 0.07
    assert scores["data/ner"] > 1 / 9 + 0.07
    assert found[0].measured_by == ("accuracy", "accuracy", "r2")
    assert scores["data/rating"] > 0.1
    assert "data/rating" in out


# Soft sharing.


def distances(form, rows, rank):
    """Restate what ties entries M [T, n] of tasks."""
    if form == "l2":
        pairs = [(rows[i] - rows[j]).square().sum() for i in range(len(rows)) for j in range(i)]
        return sum(pairs) / (2 * len(rows))
    if form == "trace_norm":
        return torch.linalg.matrix_norm(rows, "nuc")
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    nearest = (left[:, :rank] * sizes[:rank]) @ right[:rank]
    return (rows - nearest).square().sum() / 2


TIES = [("l2", 1), ("trace_norm", 1), ("low_rank", 1), ("low_rank", 2)]


@pytest.mark.parametrize(("form", "rank"), TIES)
def test_ties_are_their_formula_and_gradient(form, rank):
    model, three = cs.models.multi_head(trunk, 6, shared=1), [*TASKS, source(2)]
    params, _ = grown(model, three)
    layout, tie = Layout.of(params), cs.corrections.SoftSharing(0.3, form, rank)
    theta, ctx = layout.flatten(params).requires_grad_(), Context(model=model)
    value = tie.penalty(SimpleNamespace(theta=theta, layout=layout), ctx)
    # Neither the common layer nor heads are tied.
    rows = [
        torch.stack([params[f"nets.{each.name}.{name}"].flatten() for each in three])
        for name in ("2.weight", "2.bias")
    ]
    torch.testing.assert_close(value, 0.3 * sum(distances(form, own, rank) for own in rows))

    vector, factor = tie.penalty_gradient(SimpleNamespace(theta=theta.detach(), layout=layout), ctx)
    torch.testing.assert_close(vector * factor, torch.autograd.grad(value, theta)[0])


def test_ties_of_equal_networks_are_finite():
    model = cs.models.multi_head(trunk(), 6, shared=0)
    params, buffers = model.init(key(0))
    for each in TASKS:
        params, buffers = model.grow(params, buffers, each, key(0, each.name))
    layout = Layout.of(params)
    view, ctx = SimpleNamespace(theta=layout.flatten(params), layout=layout), Context(model=model)
    for form, _ in TIES:
        vector, _ = cs.corrections.SoftSharing(1.0, form).penalty_gradient(view, ctx)
        assert torch.isfinite(vector).all()
        assert form == "trace_norm" or float(vector.abs().max()) < 1e-6


def apart(result):
    one, two = (entries(result, f"nets.{each.name}.") for each in TASKS)
    return sum(float((p - two[n]).square().sum()) for n, p in one.items())


def test_soft_sharing_lies_between_independent_networks_and_one():
    make = MODELS["depth 0"]
    free = joint(make(), momentum=0)
    assert same(joint(make(), cs.methods.soft_sharing(0), momentum=0).params, free.params)
    found = [apart(free)]
    for strength in (0.5, 10):
        found.append(apart(joint(make(), cs.methods.soft_sharing(strength), momentum=0)))
    assert found[0] > 1.5 * found[1] > 15 * found[2]
    # Of two matrices the trace norm shrinks, and one of rank 2 is near none.
    low = joint(make(), cs.methods.soft_sharing(0.5, "low_rank"), momentum=0)
    assert apart(low) != found[0]
    same_rank = joint(make(), cs.methods.soft_sharing(0.5, "low_rank", rank=2), momentum=0)
    assert same(same_rank.params, free.params)


def test_soft_sharing_refuses_what_it_cannot_tie():
    for model in (MODELS["hard"](), cs.models.multi_head(trunk, 6, shared=2), MODELS["mmoe"]()):
        with pytest.raises(ConsilienceError, match="networks of tasks, and the model has none"):
            joint(model, cs.methods.soft_sharing())
    with pytest.raises(ConsilienceError, match="lr x strength must be at most 1"):
        joint(MODELS["depth 0"](), cs.methods.soft_sharing(11))
    with pytest.raises(ConsilienceError, match="`form` must be one of"):
        cs.methods.soft_sharing(form="l1")
    with pytest.raises(ConsilienceError, match="`rank` must be"):
        cs.methods.soft_sharing(form="low_rank", rank=0)
    # Without a model it takes networks that fit the data.
    schedule = cs.settings.multitask(TASKS, "task")
    assert any(
        n.startswith("nets.")
        for n in cs.run(schedule, cs.methods.soft_sharing(), None, training(epochs=1)).params
    )


def test_clients_are_tied_to_the_networks_of_others():
    clients = [source(i % 2, name=f"c/{i}", task=f"t{i % 2}") for i in range(4)]
    schedule = cs.settings.federated(clients, rounds=3, scenario="task")

    def run(strength, engine="serial"):
        method = cs.methods.soft_sharing(strength)
        result = cs.run(schedule, method, MODELS["depth 0"](), training(epochs=1), engine=engine)
        one, two = (entries(result, f"nets.t{i}.") for i in range(2))
        return result, sum(float((p - two[n]).square().sum()) for n, p in one.items())

    (_, free), (tied, near) = run(0), run(5)
    assert near < 0.5 * free
    batched = run(5, "batched")[0]
    for n, p in tied.params.items():
        torch.testing.assert_close(batched.params[n], p, rtol=1e-7, atol=1e-9)
