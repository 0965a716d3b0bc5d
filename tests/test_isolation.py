"""Isolation: PackNet, HAT, SupSup, PSP, XdG. What old tasks answer, restatements in plain torch, learning,
resuming, refusals."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import consilience as cs
from consilience.core.contexts import Beginning, Context
from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Module
from consilience.core.params import Layout, key, same
from consilience.core.source import Source, Tensors
from consilience.corrections.anatomy import anatomy
from consilience.corrections.isolation import HAT, PackNet
from consilience.corrections.superposition import SupSup, TopK, gates, pack, signs, unpack
from consilience.loop.agent import Agent
from restate import acting, stopped

D, C = 6, 6
METHODS = {n: getattr(cs.methods, n) for n in ("packnet", "hat", "supsup", "psp", "xdg")}
HEAVY = {"momentum": 0.9, "weight_decay": 0.01}


def source(i, n=40, classes=None, image=False):
    g = torch.Generator().manual_seed(100 + i)
    own = classes or (2 * i, 2 * i + 1)
    x = torch.randn(n, *((1, 8, 8) if image else (D,)), generator=g, dtype=torch.float64)
    x[:, ..., :2] = 0  # dead inputs: their weights tie at 0
    t = Tensors(x, torch.tensor(own)[torch.randint(len(own), (n,), generator=g)])
    return Source(f"s/{i}", t, t, t, tuple(("space", str(c)) for c in range(C)), own)


SOURCES = [source(0), source(1, 33), source(2, 37)]
IMAGES = [source(i, image=True) for i in range(3)]


def mlp():
    return cs.models.mlp(D, (12, 10), C)


def conv():
    return cs.models.conv(C, 1, 8, width=4)


def heads():
    return cs.models.multi_head(cs.models.mlp(D, (12, 10), 4), C)


def training(**more):
    given = {"epochs": 4, "batch_size": 8, "lr": 0.1, "precision": "fp64", **HEAVY, **more}
    return cs.Training(**acting(given))


def go(method, model=None, sources=SOURCES, scenario="task", **more):
    return cs.run(cs.settings.continual(sources, scenario), method, model or mlp(), training(**more))


def answers_kept(method, model, sources, monkeypatch, **more):
    """The largest change of what each task answered right after it was learned."""
    told, away = {}, [0.0]
    finish = Agent.finish

    def look(agent, job):
        finish(agent, job)
        agent.outputs(agent.state.params, agent.state.buffers, sources[0].test.x, "unknown")
        for s in sources:
            if s.name in agent.state.visits:
                out = agent.outputs(agent.state.params, agent.state.buffers, s.test.x, s.name)[
                    :, list(s.classes)
                ]
                away.append(float((told.setdefault(s.name, out) - out).abs().max()))

    monkeypatch.setattr(Agent, "finish", look)
    go(method, model, sources, **more)
    monkeypatch.undo()
    assert len(told) == len(sources)
    return max(away)


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("name", ["packnet", "hat", "supsup"])
def test_old_answers_are_bit_identical_under_momentum_and_decay(name, optimiser, monkeypatch):
    for model, sources in ((mlp(), SOURCES), (conv(), IMAGES), (heads(), SOURCES)):
        lr = 0.1 if optimiser == "sgd" else 0.02
        assert answers_kept(METHODS[name](), model, sources, monkeypatch, optimiser=optimiser, lr=lr) == 0
    assert answers_kept(cs.methods.finetune(), mlp(), SOURCES, monkeypatch) > 1e-3


def test_old_answers_stay_with_group_norm_for_packnet_and_supsup(monkeypatch):
    for name in ("packnet", "supsup"):
        model = cs.models.resnet(20, C, 1, width=2)
        assert answers_kept(METHODS[name](), model, IMAGES, monkeypatch, epochs=1, batch_size=20) == 0


def test_soft_masks_of_hat_drift(monkeypatch):
    assert answers_kept(cs.methods.hat(s_max=20.0, hard=False), mlp(), SOURCES, monkeypatch) > 1e-6
    assert answers_kept(cs.methods.hat(s_max=20.0), mlp(), SOURCES, monkeypatch) == 0


# restatements


def start(model):
    return {n: p.double() for n, p in model.init(key(0, "init"))[0].items()}


def batches(s, epochs=4, size=8):
    x, y = s.train.x, s.train.y
    for epoch in range(epochs):
        plan = torch.randperm(len(y), generator=key(0, s.name, 0, epoch, 0, "shuffle")).split(size)
        for step, i in enumerate(plan):
            yield epoch, step, len(plan), x[i], y[i]


def forward(p, x):
    h = torch.relu(F.linear(x, p["1.weight"], p["1.bias"]))
    h = torch.relu(F.linear(h, p["3.weight"], p["3.bias"]))
    return F.linear(h, p["5.weight"], p["5.bias"])


def fit(params, s, see, factors=None, extra=None, after=None, lr=0.1, **more):
    """SGD with momentum and decay; `see(params, epoch, step, steps)` is what the network uses, `factors`
    multiply gradients (0 holds)."""
    velocity = {n: torch.zeros_like(p) for n, p in params.items()}
    for epoch, step, steps, x, y in batches(s, **more):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        out = forward(see(leaves, epoch, step, steps), x)[:, list(s.classes)]
        loss = F.cross_entropy(out, y - s.classes[0])
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        f = factors(params, epoch, step, steps) if factors else {}
        added = extra(params, epoch, step, steps) if extra else {}
        for n, g in zip(leaves, grads, strict=True):
            if g is None:
                continue
            factor = f.get(n, torch.ones_like(g))
            g = g * factor + added.get(n, 0) + 0.01 * params[n]
            velocity[n] = 0.9 * velocity[n] + g
            params[n] = params[n] - lr * torch.where(factor == 0, 0, velocity[n])
        if after:
            after(params, epoch, step, steps)
    return params


def near(a, b, tolerance=1e-11):
    assert a.keys() == b.keys()
    for n in a:
        gap = float((a[n] - b[n]).abs().max() / max(1.0, float(b[n].abs().max())))
        assert gap <= tolerance, (n, gap)


LAYERS = ("1.weight", "3.weight")


def rows(s, params):
    w, b = torch.zeros_like(params["5.weight"]), torch.zeros_like(params["5.bias"])
    w[list(s.classes)], b[list(s.classes)] = 1, 1
    return {"5.weight": w, "5.bias": b}


@pytest.mark.parametrize(("epochs", "retrain", "dense"), [(4, 0.5, 2), (5, 0.5, 3), (3, 0.0, 3), (1, 0.5, 1)])
def test_packnet_is_prune_retrain_freeze(epochs, retrain, dense):
    model = mlp()
    params, owned = start(model), {n: None for n in LAYERS}
    for t, s in enumerate(SOURCES[:2]):
        before = {n: torch.zeros_like(params[n]) if owned[n] is None else owned[n] for n in LAYERS}
        keep = {n: torch.ones_like(params[n]) for n in LAYERS}
        if t:
            for n in LAYERS:
                params[n] = params[n] * before[n]

        def prune(p, epoch, step, steps, before=before, keep=keep):
            if (epoch, step) == (dense - 1, steps - 1):
                for n in LAYERS:
                    order = sorted(
                        (i for i in range(p[n].numel()) if not before[n].view(-1)[i]),
                        key=lambda i: -float(p[n].view(-1)[i].abs()),
                    )
                    keep[n] = before[n].clone()
                    keep[n].view(-1)[order[: round(0.5 * len(order))]] = 1

        def see(p, *_, keep=keep):
            return {**p, **{n: p[n] * keep[n] for n in LAYERS}}

        def factors(p, *_, t=t, s=s, before=before, keep=keep):
            found = {n: (1 - before[n]) * keep[n] for n in LAYERS} | rows(s, p)
            return found | {b: torch.zeros_like(p[b]) for b in ("1.bias", "3.bias") if t}

        params = fit(params, s, see, factors, after=prune, epochs=epochs)
        owned = keep
    r = go(cs.methods.packnet(retrain=retrain), model, SOURCES[:2], epochs=epochs)
    near(r.params, params)
    items = r.agent.state.memory["PackNet"]
    for n in LAYERS:
        both = sum(items[s.name].tensors[f"own/{n}"].int() for s in SOURCES[:2])
        assert torch.equal(both.double(), owned[n])


def test_packnet_keeps_exact_counts_with_ties():
    r = go(cs.methods.packnet(0.3), heads())
    items = r.agent.state.memory["PackNet"]
    for n, size in (("trunk.1.weight", 72), ("trunk.3.weight", 120)):
        free, total = size, torch.zeros(size)
        for s in SOURCES:
            own = items[s.name].tensors[f"own/{n}"]
            assert int(own.sum()) == round(0.3 * free)
            free, total = free - int(own.sum()), total + own.view(-1)
        assert total.max() == 1, "no weight belongs to two tasks"
    p, model = PackNet(0.3), mlp()
    params = {n: torch.zeros_like(t) for n, t in start(model).items()}
    layout = Layout.of(params)
    private = p.begin(Beginning(model, params, {}, (SOURCES[0],), p.recall({}, ()), torch.Generator()))[1]
    keep = layout.split(
        p._prune(layout.flatten(params), layout, Context(private=private, model=model))["keep"]
    )
    assert [int(keep[n].sum()) for n in LAYERS] == [22, 36], "everything ties at 0"


def test_packnet_without_epochs_still_divides():
    r = go(cs.methods.packnet(), epochs=0)
    assert [int(i.tensors["own/1.weight"].sum()) for i in r.agent.state.memory["PackNet"].values()] == [
        36,
        18,
        9,
    ]


def attention(p, task, s):
    return [torch.sigmoid(s * p[f"hat/{task}/{n}"]) for n in LAYERS]


def test_hat_is_its_restatement():
    model, s_max, c = mlp(), 6.0, 0.5
    params, past, old = start(model), None, set()
    scale = lambda b, n: 1 / s_max + (s_max - 1 / s_max) * b / (n - 1)  # noqa: E731
    for s in SOURCES[:2]:
        g = key(0, s.name, 0, "HAT", "begin")
        for n in LAYERS:
            params[f"hat/{s.name}/{n}"] = torch.randn(len(params[n]), generator=g).double()

        def see(p, epoch, b, n, s=s):
            a, z = attention(p, s.name, scale(b, n))
            gated = {"1.weight": p["1.weight"] * a[:, None], "1.bias": p["1.bias"] * a}
            return {**p, **gated, "3.weight": p["3.weight"] * z[:, None], "3.bias": p["3.bias"] * z}

        def compensate(p, k, n, s=s):
            found = {}
            for layer in LAYERS:
                e = p[f"hat/{s.name}/{layer}"]
                found[f"hat/{s.name}/{layer}"] = s_max * ((k * e).cosh() + 1) / (k * (e.cosh() + 1))
            return found

        def factors(p, epoch, b, n, s=s, past=past):
            f = compensate(p, scale(b, n), n) | rows(s, p)
            if past:
                one, two = past
                f["1.weight"], f["1.bias"] = (1 - one)[:, None].expand(12, D), 1 - one
                f["3.weight"], f["3.bias"] = (
                    1 - torch.minimum(two[:, None].expand(10, 12), one[None].expand(10, 12)),
                    1 - two,
                )
            # Serrà et al. mask no gradient of a task's own outputs, whose rows `rows` gives.
            return f

        def extra(p, epoch, b, n, s=s, past=past):
            """The gradient of the regulariser, compensated too."""
            k = scale(b, n)
            es = {f"hat/{s.name}/{m}": p[f"hat/{s.name}/{m}"].clone().requires_grad_() for m in LAYERS}
            free = [torch.ones_like(e) if past is None else 1 - past[i] for i, e in enumerate(es.values())]
            a = [torch.sigmoid(k * e) for e in es.values()]
            reg = c * sum((u * v).sum() for u, v in zip(a, free, strict=True)) / sum(v.sum() for v in free)
            grads = dict(zip(es, torch.autograd.grad(reg, list(es.values())), strict=True))
            f = compensate(p, k, n)
            return {m: grads[m] * f[m] for m in grads}

        held = {n: params.pop(n) for n in list(params) if n.startswith("hat/") and s.name not in n}
        params = fit(params, s, see, factors, extra) | held
        hard = [(params[f"hat/{s.name}/{n}"] > 0).double() for n in LAYERS]
        past = hard if past is None else [torch.maximum(a, b) for a, b in zip(past, hard, strict=True)]
        old |= set(s.classes)
    r = go(cs.methods.hat(c, s_max), model, SOURCES[:2])
    near(r.params, dict(sorted(params.items())), 1e-9)


def test_hats_scale_and_compensation():
    h = HAT(s_max=400.0)
    assert [h.scale((e, 0), (3, 11)) for e in range(3)] == [1 / 400] * 3
    assert h.scale((0, 10), (3, 11)) == pytest.approx(400) and h.scale((0, 0), (3, 1)) == 400
    steps = torch.tensor([h.scale((0, i), (1, 11)) for i in range(11)]).diff()
    assert torch.allclose(steps, steps[0].expand(10), rtol=1e-4)
    e = torch.linspace(-3, 3, 25, dtype=torch.float64)
    for s in (0.01, 1.0, 7.0):
        leaf = e.clone().requires_grad_()
        grad = torch.autograd.grad(torch.sigmoid(s * leaf).sum(), leaf)[0] * HAT(s_max=9.0).compensation(e, s)
        plain = torch.autograd.grad(torch.sigmoid(leaf).sum(), leaf)[0]
        assert torch.allclose(grad, 9.0 * plain, rtol=1e-6), "the gradient is that of sigmoid(e), s_max times"


def test_hat_through_a_flattened_map_gates_whole_units():
    """A convolution's unit stands in several inputs of the next layer."""
    a = anatomy(conv())
    known = HAT().recall({}, ())
    past = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    spread = HAT._inputs(conv(), a.head[0], replace(known, past={a.layers[1]: past}))
    _, _, x = None, None, torch.zeros(1, 8, 2, 2)
    x[0, [0, 3]] = 1
    assert torch.equal(spread, x.flatten(1).expand(spread.shape))


def test_psp_and_xdg_are_their_restatements():
    def keys(p, s):
        return {**p, **{n: p[n] * signs(s.name, n, p[n].shape[1], 0.5)[None] for n in (*LAYERS, "5.weight")}}

    def silent(p, s):
        found = dict(p)
        for n in LAYERS:
            g = gates(s.name, n, len(p[n]), 0.8)
            assert int((g == 0).sum()) == round(0.8 * len(g))
            found |= {n: p[n] * g[:, None], n.replace("weight", "bias"): p[n.replace("weight", "bias")] * g}
        return found

    for method, see in ((cs.methods.psp(), keys), (cs.methods.xdg(), silent)):
        params = start(mlp())
        for s in SOURCES[:2]:
            params = fit(params, s, lambda p, *_, s=s, see=see: see(p, s))
        near(go(method, sources=SOURCES[:2]).params, params)


def test_a_key_of_ones_is_plain_and_keys_multiply_inputs():
    psp = cs.methods.psp().corrections[0]
    model, params = mlp(), start(mlp())
    x = torch.randn(5, D, dtype=torch.float64)
    seen = psp.view(params, "a", Context(model=model))
    c = signs("a", "1.weight", D, 0.5).double()
    assert torch.equal(F.linear(x, seen["1.weight"]), F.linear(x * c, params["1.weight"]))
    assert set(c.tolist()) == {-1.0, 1.0} and not torch.equal(c, signs("b", "1.weight", D, 0.5).double())
    ones = replace(psp, flips=0.0)
    assert not ones.active and same(ones.view(params, "a", Context(model=model)), params)
    assert same(go(cs.methods.psp(0.0)).params, go(cs.methods.finetune()).params)
    assert same(go(cs.methods.xdg(0.0)).params, go(cs.methods.finetune()).params)


def test_scores_of_other_tasks_stay_out_of_theta():
    r = cs.run(cs.settings.continual(SOURCES, "task"), cs.methods.supsup(), mlp(), cs.Training(epochs=1))
    job = r.agent.prepare([SOURCES[1].name])
    names = (*LAYERS, "5.weight")
    assert {n for n in job.layout.names if n.startswith("supsup/")} == {f"supsup/s/1/{n}" for n in names}
    assert {f"supsup/s/{i}/{n}" for i in (0, 2) for n in names} <= set(job.fixed)


@pytest.mark.parametrize("k", [1, 3, 7, 10])
def test_the_k_largest_are_those_of_a_stable_sort(k):
    scores = torch.tensor([[2.0, 1.0, 2.0, 0.0, 1.0], [1.0, 3.0, 1.0, 0.0, 2.0]])
    chosen = scores.view(-1).sort(descending=True, stable=True).indices[:k]
    assert TopK.apply(scores, k).view(-1).nonzero()[:, 0].tolist() == chosen.sort().values.tolist()


def test_supsup_is_its_restatement():
    model, params = mlp(), start(mlp())
    names = (*LAYERS, "5.weight")

    def top(v):
        chosen = v.abs().view(-1).argsort(descending=True)[: round(v.numel() / 2)]
        return torch.zeros_like(v).view(-1).index_fill(0, chosen, 1).view(v.shape)

    class Through(torch.autograd.Function):
        """To the bit: signed constants cancel exactly, so that inputs sit on kinks of the ReLU."""

        @staticmethod
        def forward(ctx, v):
            ctx.save_for_backward(v)
            return top(v)

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].sign()

    masks = {}
    fixed = {
        n: torch.where(params[n] < 0, -1.0, 1.0).double() * (2 / (0.5 * params[n].shape[1])) ** 0.5
        for n in names
    }
    zero = {n: torch.zeros_like(p) for n, p in params.items() if n.endswith("bias")}
    scores = {}
    for s in SOURCES[:2]:
        g = key(0, s.name, 0, "SupSup", "begin")
        for n in names:
            value = (2 * torch.rand(params[n].shape, generator=g) - 1) * params[n].shape[1] ** -0.5
            scores[f"supsup/{s.name}/{n}"] = value.double()
        mine = {n: v for n, v in scores.items() if s.name in n}

        def see(p, *_, s=s):
            through = {n: p[f"supsup/{s.name}/{n}"] for n in names}
            return {**zero, **{n: fixed[n] * Through.apply(v) for n, v in through.items()}}

        scores |= fit(mine, s, see)
        masks[s.name] = {n: top(scores[f"supsup/{s.name}/{n}"]) for n in names}
    r = go(cs.methods.supsup(), model, SOURCES[:2])
    near({n: p for n, p in r.params.items() if "supsup" in n}, dict(sorted(scores.items())), 1e-9)
    assert all(torch.equal(r.params[n], params[n]) for n in params), "weights never change"
    known = SupSup().recall(r.agent.memory(SupSup()), ())
    for s in SOURCES[:2]:
        assert same(known.masks[s.name], {n: m.float() for n, m in masks[s.name].items()})


def test_masks_travel_one_bit_a_weight(monkeypatch):
    told = []
    to_bytes = Message.to_bytes
    monkeypatch.setattr(Message, "to_bytes", lambda m: told.append(m) or to_bytes(m))
    parts = cs.data.split_classes(cs.data.digits(), 5)
    schedule = cs.settings.federated_continual([parts[:3], parts[3:]], 1, scenario="task")
    r = cs.run(
        schedule,
        cs.methods.supsup(),
        cs.models.mlp(64, (128,), 10),
        cs.Training(epochs=6, lr=0.05, momentum=0.9),
    )
    assert r.score > 0.85, "the server never learned: it has the masks of all"
    items = [m.items["SupSup"] for m in told if "SupSup" in m.items]
    assert items and all(
        type(i) is Module and i.tensors["mask/1.weight"].numel() == 64 * 128 // 8 for i in items
    )
    assert not any("supsup" in n for m in told if "model" in m.items for n in m.items["model"].tensors), (
        "scores stay"
    )
    for shape in ([3], [8], [4, 5], [2, 3, 3, 3]):
        mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()
        assert torch.equal(unpack(pack(mask), shape), mask)


def test_a_new_task_trains_its_own_rows_of_a_shared_head_on_units_that_others_took():
    """Serrà et al. have a head per task; a shared one must give a task as much: its rows, on all units."""
    for model, sources in ((mlp(), SOURCES), (conv(), IMAGES)):
        head = anatomy(model).head.weight
        before = go(cs.methods.hat(0.0, 20.0), model, sources[:1], epochs=1).params
        after = go(cs.methods.hat(0.0, 20.0), model, sources[:2], epochs=1).params
        last = anatomy(model).layers[-1]
        taken = before[f"hat/{sources[0].name}/{last}"] > 0
        taken = taken.repeat_interleave(before[head].shape[1] // len(taken))
        moved = (after[head] - before[head]).abs()
        assert taken.any() and (moved[2:4][:, taken] > 0).any(1).all(), "its own rows, on taken units"
        assert not moved[[0, 1, 4, 5]].any(), "rows of other tasks stay, used or not"


@pytest.mark.parametrize("name", ["packnet", "hat"])
def test_a_later_source_of_a_task_goes_on_with_the_tasks_rows(name):
    """With a head per task that head trains again; the task's rows of a shared one must too."""
    parts = [replace(source(0), name=f"part/{i}", task="same") for i in range(2)]
    other = replace(source(1), task="other")
    before = go(METHODS[name](), sources=[parts[0], other]).params["5.weight"]
    after = go(METHODS[name](), sources=[parts[0], other, parts[1]]).params["5.weight"]
    assert (after[:2] != before[:2]).any() and torch.equal(after[2:4], before[2:4])


# learning


@pytest.mark.parametrize("scenario", ["task", "domain"])
@pytest.mark.parametrize("name", ["packnet", "hat"])
def test_tasks_with_classes_in_common_have_heads_of_their_own_by_default(name, scenario):
    """Permuted digits: with one head (now refused) later tasks scored .2 to .35, below fine-tuning."""
    parts = cs.data.permute(cs.data.digits(), 3)
    method = METHODS[name]()
    if scenario == "domain":
        method += cs.methods.infer(cs.mappers.nearest_mean(on="inputs"))
    schedule, fit = cs.settings.continual(parts, scenario), cs.Training(epochs=4, lr=0.1)
    r = cs.run(schedule, method, training=fit)
    learned = r.matrix[1:].diagonal()
    assert (learned > 0.8).all() and r.forgetting == 0, r.matrix
    with pytest.raises(cs.Refusal, match="classes in common and one head.*use models.multi_head"):
        cs.run(schedule, method, cs.models.mlp(64), fit)


@pytest.mark.parametrize("name", ["packnet", "hat"])
def test_tasks_of_values_have_heads_of_their_own_by_default(name):
    """All tasks of values answer with the same outputs, so that one head would stay with the first."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 4, generator=g)
    parts = [
        cs.data.arrays(x + i, x @ torch.randn(4, 1, generator=g), kind="value", name=f"v{i}")
        for i in range(2)
    ]
    # One label space: the outputs of both tasks are the same columns.
    parts = [part.map(labels=parts[0].labels) for part in parts]
    schedule, fit = cs.settings.continual(parts, "task"), cs.Training(epochs=20, lr=0.05)
    r = cs.run(schedule, METHODS[name](), training=fit)
    assert (r.matrix[1:].diagonal() > 0.7).all() and r.forgetting == 0, r.matrix
    assert {"heads.v0.weight", "heads.v1.weight"} <= r.params.keys()
    assert "classes in common" in refusal(schedule, METHODS[name](), cs.models.mlp(4, (8,), 2))


def refusal(schedule, method, model):
    try:
        cs.run(schedule, method, model, training(epochs=1))
    except cs.Refusal as error:
        return str(error)
    return ""


def test_a_frozen_head_in_common_is_no_rows_to_divide():
    """Tasks then differ in what they feed to it."""
    parts = [source(i, classes=(0, 1)) for i in range(2)]
    model = cs.models.mlp(D, (12,), C)
    assert "classes in common" in refusal(cs.settings.continual(parts, "task"), cs.methods.hat(), model)
    model = cs.models.frozen(model, ["3.*"])
    assert not refusal(cs.settings.continual(parts, "task"), cs.methods.hat(), model)


@pytest.mark.parametrize(
    ("name", "low"), [("packnet", 0.9), ("hat", 0.9), ("supsup", 0.85), ("psp", 0.9), ("xdg", 0.9)]
)
@pytest.mark.parametrize("model", ["mlp", "conv", "heads"])
def test_learns_digits_in_five_tasks(name, low, model):
    image = model == "conv"
    parts = cs.data.split_classes(cs.data.digits(image), 5)
    trunk = cs.models.mlp(64, (128,), 10)
    made = {"mlp": trunk, "conv": cs.models.conv(10, 1, 8, 16), "heads": cs.models.multi_head(trunk, 10)}[
        model
    ]
    fit = cs.Training(epochs=8, lr=0.05, momentum=0.9, weight_decay=1e-4)
    # In eight epochs the default silences all channels of the small net for the last task of some seeds.
    method = cs.methods.hat(0.02) if name == "hat" else METHODS[name]()
    r = cs.run(cs.settings.continual(parts, "task"), method, made, fit)
    assert r.score > low, r.matrix
    if name in ("packnet", "hat", "supsup"):
        after = r.matrix[1:]
        assert all((after[j:, j] == after[j, j]).all() for j in range(5)), "nothing is forgotten"


@pytest.mark.parametrize(("sparsity", "silent"), [(100.0, True), (0.0, False)])
def test_a_task_whose_units_all_fell_silent_is_warned_about(sparsity, silent):
    """Its answers are the same for every input; without sparsity they are not."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        r = go(cs.methods.hat(sparsity), sources=SOURCES[:2])
    texts = [str(w.message) for w in found if "silenced all units" in str(w.message)]
    assert bool(texts) == silent
    answers = r.agent.predict(SOURCES[0].test.whole()[0], "s/0")
    assert bool((answers == answers[0]).all()) == silent
    if silent:
        assert "for task 's/0'" in texts[0] and "use a smaller `sparsity`" in texts[0]


def test_a_mapper_takes_the_place_of_the_label():
    parts = cs.data.split_classes(cs.data.digits(), 5)
    method = cs.methods.packnet() + cs.Method("entropy", mapper=cs.mappers.min_entropy())
    r = cs.run(
        cs.settings.continual(parts),
        method,
        cs.models.mlp(64, (128,), 10),
        cs.Training(epochs=4, momentum=0.9),
    )
    plain = cs.run(
        cs.settings.continual(parts),
        cs.methods.finetune(),
        cs.models.mlp(64, (128,), 10),
        cs.Training(epochs=4),
    )
    assert r.score > 0.3 > plain.score


def test_summaries_and_teachers_see_what_the_model_sees():
    """The Fisher of a silent unit is 0; the teacher of LwF has the gates of the task."""
    r = go((cs.methods.xdg() + cs.methods.ewc(0.01)), sources=SOURCES[:2])
    item = next(m.items["EWC"] for m in r.agent.state.bank.values() if m.source == "s/0")
    g = gates("s/0", "3.weight", 10, 0.8)
    f = item.tensors["precision/3.weight"].sum(1)
    assert (f[g == 0] == 0).all() and (f[g == 1] > 0).any()
    seen = []
    from consilience.corrections.distillation import LwF

    rows = LwF.rows

    def look(self, step, ctx):
        if step.clock == (0, 0):
            seen.append((step.before(SOURCES[1].test.x, "s/1"), step.answer(0, "s/1"), step.parts[0].x))
        return rows(self, step, ctx)

    LwF.rows = look
    try:
        r = go((cs.methods.xdg() + cs.methods.lwf()), sources=SOURCES[:2], epochs=1)
    finally:
        LwF.rows = rows
    before, now, x = seen[0]
    where = [int((SOURCES[1].test.x == one).flatten(1).all(1).nonzero()[0]) for one in x]
    assert torch.allclose(before[where], now, atol=1e-12)


# resuming


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("at", [7, 24])
def test_resumes_mid_task_to_the_same_bits(name, at, tmp_path):
    def run(**more):
        return cs.run(cs.settings.continual(SOURCES, "task"), METHODS[name](), mlp(), training(), **more)

    whole = run()
    stopped(run, tmp_path / "run", at)
    again = run(out=tmp_path / "run", resume=True)
    assert same(whole.params, again.params) and (whole.matrices == again.matrices).all()


# refusals


@pytest.mark.parametrize("name", list(METHODS))
def test_refuses_without_a_task(name):
    for scenario in ("class", "domain"):
        with pytest.raises(cs.Refusal, match="neither a label nor a mapper; use scenario='task'"):
            go(METHODS[name](), scenario=scenario)
    with pytest.raises(cs.Refusal, match="no trainable layer that tasks share"):
        go(METHODS[name](), cs.models.linear(D, C))
    batch = cs.models.resnet(20, C, 1, norm="batch", width=2)
    with pytest.raises(cs.Refusal, match="batch norm"):
        go(METHODS[name](), batch, IMAGES)


@pytest.mark.parametrize("name", ["packnet", "hat"])
def test_refuses_where_others_move_what_it_keeps(name):
    with pytest.raises(cs.Refusal, match="what is received moves"):
        cs.run(
            cs.settings.federated_continual([SOURCES[:2], SOURCES[2:]], 1, scenario="task"),
            METHODS[name](),
            mlp(),
        )
    with pytest.raises(cs.Refusal, match="a step has several"):
        cs.run(cs.settings.multitask(SOURCES, "task"), METHODS[name](), mlp())


class Moving(torch.nn.Module):
    """A norm of a user's own, with statistics that move."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return x - self.mean


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "norm",
    [lambda: torch.nn.InstanceNorm2d(4, track_running_stats=True), lambda: torch.nn.BatchNorm2d(4), Moving],
)
def test_refuses_running_statistics_of_any_kind(name, norm):
    def net():
        nn = torch.nn
        return nn.Sequential(nn.Conv2d(1, 4, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(144, C))

    with pytest.raises(ConsilienceError, match="running statistics .* move with every task"):
        go(METHODS[name](), cs.models.wrap(net), IMAGES)


def test_packnet_refuses_without_capacity():
    few = [source(i, classes=(0, 1)) for i in range(9)]
    small = cs.models.multi_head(cs.models.mlp(D, (12,), C), C)
    with pytest.raises(cs.Refusal, match="no free weight left for task 2 of 3; use a smaller `keep`"):
        go(cs.methods.packnet(1.0))
    with pytest.raises(cs.Refusal, match="no free weight left for task 8 of 9"):
        go(cs.methods.packnet(), small, few)
    go(cs.methods.packnet(0.3), small, few, epochs=1)


@pytest.mark.parametrize("name", ["hat", "xdg"])
def test_gates_refuse_norms_and_branches(name):
    with pytest.raises(cs.Refusal, match="norms undo"):
        go(METHODS[name](), cs.models.resnet(20, C, 1, width=2), IMAGES)


def test_hat_warns_when_units_run_out():
    with pytest.warns(UserWarning, match="has no unit left"):
        go(
            cs.methods.hat(sparsity=0.0),
            cs.models.multi_head(cs.models.mlp(D, (1,), C), C),
            [source(i, classes=(0, 1)) for i in range(12)],
            epochs=1,
        )


@pytest.mark.parametrize(
    "method", [cs.methods.packnet(0.5), cs.methods.hat(), cs.methods.icarl(20)], ids=lambda m: m.name
)
def test_a_state_dict_without_its_view_is_warned_about_by_name(method):
    """Its module does not answer as the result does, and only then is that said."""
    tasks = cs.data.split_classes(cs.data.digits(), 5)[:2]
    scenario = "class" if method.name == "icarl" else "task"
    result = cs.run(cs.settings.continual(tasks, scenario), method, training=cs.Training(epochs=1))
    (name,) = (part.name for part in method.corrections)
    with pytest.warns(UserWarning, match=f"^{name} answers with a view.*result.predict"):
        state = result.state_dict()
    agent, x = result.agent, tasks[0].test.whole()[0]
    bare = agent.model(agent.state.params, agent.state.buffers, x, agent.schedule.sources[0].task, False)[0]
    seen = agent.outputs(agent.state.params, agent.state.buffers, x, agent.schedule.sources[0].task)
    assert set(agent.state.params) <= set(state) and not torch.allclose(bare, seen)

    plain = cs.run(
        cs.settings.continual(tasks, scenario), cs.methods.finetune(), training=cs.Training(epochs=1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.state_dict()
