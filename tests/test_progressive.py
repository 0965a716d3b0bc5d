"""Columns of progressive networks and adapters on a frozen backbone: restatements in plain torch, old
answers to the bit,
resuming, refusals, learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience.core.errors import ConsilienceError
from consilience.core.params import Layout, key, pack, same, unpack
from consilience.core.source import Source, Tensors
from consilience.loop.agent import Agent
from restate import acting, stopped

D, C = 6, 6
HEAVY = {"momentum": 0.9, "weight_decay": 0.01}


def source(i, n=40, classes=None, image=False, task=None):
    g = torch.Generator().manual_seed(100 + i)
    own = classes or (2 * i, 2 * i + 1)
    x = torch.randn(n, *((1, 8, 8) if image else (D,)), generator=g, dtype=torch.float64)
    t = Tensors(x, torch.tensor(own)[torch.randint(len(own), (n,), generator=g)])
    return Source(f"s/{i}", t, t, t, tuple(("space", str(c)) for c in range(C)), own, task)


SOURCES = [source(0), source(1, 33), source(2, 37)]
IMAGES = [source(i, image=True) for i in range(3)]


def columns(**more):
    return cs.models.progressive(D, (7, 5), C, **more)


def conv(**more):
    return cs.models.progressive_conv(C, 1, 8, 4, **more)


def adapters(**more):
    return cs.models.adapters(cs.models.mlp(D, (12, 10), 3), C, bottleneck=3, **more)


def adapted_conv():
    return cs.models.adapters(cs.models.resnet(18, 3, 1, "batch", 2), C, 2, layers=("stem.0", "body.[13]"))


def training(**more):
    given = {"epochs": 4, "batch_size": 8, "lr": 0.1, "precision": "fp64", **HEAVY, **more}
    return cs.Training(**acting(given))


def go(method, model, sources=SOURCES, scenario="task", **more):
    return cs.run(cs.settings.continual(sources, scenario), method, model, training(**more))


def grown(model, sources=SOURCES, seed=0):
    params, buffers = model.init(key(seed))
    params = {n: p.double() for n, p in params.items()}
    for s in sources:
        params, buffers = model.grow(params, buffers, s, key(seed, s.name))
    return {n: p.double() for n, p in params.items()}, {
        n: b.double() if b.is_floating_point() else b for n, b in buffers.items()
    }


def answers_kept(method, model, sources, monkeypatch, **more):
    """The largest change of what each task answered right after it was first learned."""
    told, away = {}, [0.0]
    finish = Agent.finish

    def look(agent, job):
        finish(agent, job)
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


MADE = {
    "columns": (columns, SOURCES, cs.methods.pnn),
    "conv": (conv, IMAGES, cs.methods.pnn),
    "narrow": (lambda: columns(bottleneck=2, shrink=0.6), SOURCES, cs.methods.pnn),
    "adapters": (adapters, SOURCES, cs.methods.finetune),
    "adapted_conv": (adapted_conv, IMAGES, cs.methods.finetune),
}
CASES = pytest.mark.parametrize("name", list(MADE))


@pytest.mark.parametrize(
    ("name", "optimiser"),
    [*((n, "sgd") for n in MADE), ("columns", "adam"), ("conv", "adamw"), ("adapters", "adamw")],
)
def test_old_answers_are_bit_identical_under_momentum_and_decay(name, optimiser, monkeypatch):
    model, sources, method = MADE[name]
    lr = 0.1 if optimiser == "sgd" else 0.02
    assert answers_kept(method(), model(), sources, monkeypatch, optimiser=optimiser, lr=lr, epochs=2) == 0


def test_rehearsal_and_penalties_do_not_move_old_columns(monkeypatch):
    for more in (cs.methods.er(20), cs.methods.ewc(1.0), cs.methods.l2sp(0.1), cs.methods.gem()):
        assert answers_kept(cs.methods.pnn() + more, columns(), SOURCES, monkeypatch, epochs=2) == 0
    assert (
        answers_kept(cs.methods.finetune() + cs.methods.er(20), columns(), SOURCES, monkeypatch, epochs=2)
        > 1e-3
    )


def test_every_entry_names_its_task():
    for model in (columns(), adapters()):
        params, buffers = grown(model)
        for n in [n for n in (*params, *buffers) if not n.startswith("trunk.")]:
            assert model.task_of(n) == n.split(".")[1] and model.task_of(n) in ("s/0", "s/1", "s/2")
        assert not [n for n in params if n.startswith("trunk.") and not model.frozen(n)]
    assert model.task_of("trunk.1.weight") is None


# progressive networks: restatements


def plain(p, x, order, task):
    """h_i^k = relu(W h_{i-1}^k + b + U relu(V [alpha_j h_{i-1}^j] + c)), the paper's equation (2), by loops;
    conv where x is a map."""
    maps = x.ndim == 4
    layer = (lambda h, w, b=None: F.conv2d(h, w, b, padding=1)) if maps else F.linear
    pool = (lambda h: F.max_pool2d(h, 2)) if maps else (lambda h: h)
    hidden = {}
    for k, t in enumerate(order[: order.index(task) + 1]):
        q = {
            n.removeprefix(f"columns.{t}."): v if t == task else v.detach()
            for n, v in p.items()
            if n.startswith(f"columns.{t}.")
        }

        def lateral(i, q=q, k=k):
            h = torch.cat([q[f"{i}.alpha"][j] * hidden[order[j]][i - 1].detach() for j in range(k)], 1)
            v = q[f"{i}.down"][:, :, None, None] if maps else q[f"{i}.down"]
            return torch.relu(F.conv2d(h, v, q[f"{i}.offset"]) if maps else F.linear(h, v, q[f"{i}.offset"]))

        h, hidden[t] = x, []
        for i in range(2):
            z = layer(h, q[f"{i}.weight"], q[f"{i}.bias"])
            z = z + layer(lateral(i), q[f"{i}.up"]) if i and k else z
            h = pool(torch.relu(z))
            hidden[t].append(h)
    head, width = p[f"heads.{task}.weight"], h[0].numel()
    out = F.linear(h.flatten(1), head[:, :width], p[f"heads.{task}.bias"])
    return out + F.linear(lateral(2).flatten(1), head[:, width:]) if k else out


@pytest.mark.parametrize("name", ["columns", "conv", "narrow"])
def test_forward_is_the_papers_equation(name):
    make, sources, _ = MADE[name]
    model = make()
    params, buffers = grown(model, sources)
    order = [s.name for s in sources]
    everything = model(params, buffers, sources[0].test.x, None, False)[0]
    for s in sources:
        x = sources[0].test.x
        out = model(params, buffers, x, s.name, False)[0]
        own = list(s.classes)
        assert torch.allclose(out[:, own], plain(params, x, order, s.name), atol=1e-12)
        assert out.isinf().all(0).tolist() == [c not in own for c in range(C)]
        assert torch.equal(everything[:, own], out[:, own])
        weight, bias = model.head(params, s.name)
        psi = model.features(params, buffers, x, s.name)
        assert torch.allclose(F.linear(psi, params[weight], params[bias]), out[:, own], atol=1e-12)
    assert torch.equal(model.features(params, buffers, x), model.features(params, buffers, x, "s/0"))


def shuffled(s, epochs=4, size=8):
    for epoch in range(epochs):
        for i in torch.randperm(len(s.train.y), generator=key(0, s.name, 0, epoch, 0, "shuffle")).split(size):
            yield s.train.x[i], s.train.y[i]


def fit(params, mine, s, out):
    """SGD with momentum and decay on these entries alone."""
    velocity = {n: torch.zeros_like(params[n]) for n in mine}
    for x, y in shuffled(s):
        leaves = {n: params[n].clone().requires_grad_() for n in mine}
        loss = F.cross_entropy(out({**params, **leaves}, x), y - s.classes[0])
        for n, g in zip(mine, torch.autograd.grad(loss, [leaves[n] for n in mine]), strict=True):
            velocity[n] = 0.9 * velocity[n] + g + 0.01 * params[n]
            params[n] = params[n] - 0.1 * velocity[n]


def near(a, b):
    assert a.keys() == b.keys()
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-9


@pytest.mark.parametrize("name", ["columns", "conv", "narrow"])
def test_training_is_its_restatement(name):
    make, sources, method = MADE[name]
    model, params, buffers = make(), {}, {}
    for s in sources[:2]:
        params, buffers = model.grow(params, buffers, s, key(0, s.name, "grow"))
        params = {n: p.double() for n, p in params.items()}
        mine = [n for n in params if f".{s.name}." in n]
        order = [t.name for t in sources]
        fit(params, mine, s, lambda p, x, s=s, order=order: plain(p, x, order, s.name))
    r = go(method(), model, sources[:2])
    near(r.agent.state.params, params)
    near(go(cs.methods.finetune(), model, sources[:2]).agent.state.params, params)


@pytest.mark.parametrize("name", ["columns", "conv"])
def test_a_column_without_laterals_is_an_independent_network(name):
    make, sources, _ = MADE[name]
    model = make()
    params, buffers = grown(model, sources[:2])
    x, t = sources[1].test.x, "s/1"
    width = model.features(params, buffers, x, "s/0").shape[1]
    for n in [n for n in params if n.startswith(f"columns.{t}.") and n.endswith(".up")]:
        params[n] = torch.zeros_like(params[n])
    params[f"heads.{t}.weight"][:, width:] = 0
    alone = cs.models.mlp(D, (7, 5), 2) if name == "columns" else cs.models.conv(2, 1, 8, 4)
    names = ["1", "3", "5"] if name == "columns" else ["0", "3", "7"]
    own = {
        f"{n}.{e}": params[f"columns.{t}.{i}.{e}"]
        for i, n in enumerate(names[:2])
        for e in ("weight", "bias")
    }
    own |= {
        f"{names[2]}.weight": params[f"heads.{t}.weight"][:, :width],
        f"{names[2]}.bias": params[f"heads.{t}.bias"],
    }
    assert torch.allclose(
        model(params, buffers, x, t, False)[0][:, [2, 3]], alone(own, {}, x, None, False)[0], atol=1e-14
    )


def test_a_first_task_alone_is_a_perceptron_and_learns_like_one():
    model = columns()
    r = go(cs.methods.pnn(), model, SOURCES[:1] + SOURCES[1:2], epochs=0)
    assert [n for n in r.params if "s/0" in n and ("up" in n or "alpha" in n)] == []
    assert [n for n in r.params if n.startswith("columns.s/1.1.")] == [
        f"columns.s/1.1.{e}" for e in ("alpha", "bias", "down", "offset", "up", "weight")
    ]


def test_shapes_shrink_and_bottlenecks_narrow():
    params, buffers = grown(columns(bottleneck=2, shrink=0.5))
    shape = {n: tuple(p.shape) for n, p in params.items()}
    assert [shape[f"columns.s/{k}.0.weight"] for k in range(3)] == [(7, D), (4, D), (2, D)]
    assert shape["columns.s/2.1.down"] == (2, 7 + 4) and shape["columns.s/2.1.alpha"] == (2,)
    assert shape["columns.s/2.1.up"] == (1, 2) and shape["heads.s/2.weight"] == (2, 1 + 2)
    assert [int(buffers[f"columns.s/{k}.order"]) for k in range(3)] == [0, 1, 2]
    assert all(0 < a < 0.1 for n, p in params.items() if n.endswith("alpha") for a in p)
    params, _ = grown(conv())
    shape = {n: tuple(p.shape) for n, p in params.items()}
    assert shape["columns.s/2.1.down"] == (4, 8) and shape["columns.s/2.1.up"] == (8, 4, 3, 3)
    assert shape["heads.s/2.weight"] == (2, (8 + 8) * 4)


def test_growing_adds_entries_and_changes_none():
    for make in (columns, adapters):
        model = make()
        one, some = grown(model, SOURCES[:1])
        params, buffers = model.grow(one, some, SOURCES[1], key(0, "x"))
        assert all(params[n] is p for n, p in one.items()) and all(buffers[n] is b for n, b in some.items())
        assert len(params) > len(one)
        again = model.grow(params, buffers, SOURCES[0], key(9))
        assert again == (params, buffers)
        state = torch.get_rng_state()
        assert same(*(grown(model)[0] for _ in range(2))) and not same(
            grown(model)[0], grown(model, seed=1)[0]
        )
        assert torch.equal(state, torch.get_rng_state())


def test_earlier_columns_get_no_gradient():
    for model, sources in ((columns(), SOURCES), (conv(), IMAGES)):
        params, buffers = grown(model, sources)
        names = list(params)
        given = {n: p.requires_grad_() for n, p in params.items()}
        for task, reached in (("s/1", {"s/1"}), (None, {"s/0", "s/1", "s/2"})):
            forward, _ = model.bind(given, buffers, True)
            out = forward(sources[0].train.x[:4], task)
            assert torch.equal(out, model(given, buffers, sources[0].train.x[:4], task, True)[0])
            total = out[out.isfinite()].square().sum()
            grads = dict(
                zip(
                    names,
                    torch.autograd.grad(total, [given[n] for n in names], allow_unused=True),
                    strict=True,
                )
            )
            assert {model.task_of(n) for n in names if grads[n] is not None} == reached
        # with task None each head trains its own column alone
        out = model(given, buffers, sources[0].train.x[:4], None, True)[0][:, [4, 5]].sum()
        grads = dict(
            zip(names, torch.autograd.grad(out, [given[n] for n in names], allow_unused=True), strict=True)
        )
        assert {model.task_of(n) for n in names if grads[n] is not None and bool(grads[n].any())} == {"s/2"}


def test_a_task_that_comes_again_trains_its_head_alone(monkeypatch):
    """A later column reads the layers of an earlier one: they have moved for the last time."""
    again = source(7, classes=(0, 1), task="a")
    stream = [source(0, task="a"), source(1, task="b"), again]
    schedule = cs.settings.continual(stream, "task")
    kept = []
    finish = Agent.finish
    monkeypatch.setattr(
        Agent, "finish", lambda agent, job: finish(agent, job) or kept.append(agent.state.params)
    )
    r = cs.run(schedule, cs.methods.pnn(), columns(), training())
    end = r.agent.state.params
    moved = {n for n in end if not torch.equal(kept[1][n], end[n])}
    assert moved == {"heads.a.weight", "heads.a.bias"}
    assert list(kept[0]) == [n for n in end if ".a." in n]
    assert not same(kept[0], {n: end[n] for n in kept[0]})
    two = cs.run(cs.settings.continual([stream[0], again], "task"), cs.methods.pnn(), columns(), training())
    assert not torch.equal(two.params["columns.a.0.weight"], kept[0]["columns.a.0.weight"]), (
        "no column reads it yet"
    )


# adapters


def test_a_new_adapter_is_the_backbone_to_the_bit():
    for model, x in ((adapters(), SOURCES[0].test.x), (adapted_conv(), IMAGES[0].test.x)):
        params, buffers = grown(model, [SOURCES[0], SOURCES[1]])
        own = model.features(params, buffers, x)
        assert torch.equal(model.features(params, buffers, x, "s/1"), own) and own.std() > 0
        for n in [n for n in params if n.startswith("adapters.s/1") and n.endswith("up")]:
            params[n] = torch.randn(params[n].shape, generator=key(n)).double()
        assert not torch.allclose(model.features(params, buffers, x, "s/1"), own)
        assert torch.equal(model.features(params, buffers, x, "s/0"), own)
    backbone = cs.models.mlp(D, (12, 10), 3)
    params, buffers = grown(adapters(), SOURCES[:1])
    x = SOURCES[0].test.x
    given = {n.removeprefix("trunk."): p for n, p in params.items() if n.startswith("trunk.")}
    assert torch.equal(adapters().features(params, buffers, x), backbone.body()(given, {}, x, None, False)[0])
    same_seed = cs.models.multi_head(cs.models.frozen(backbone.body()), C)
    assert adapters().backbone(adapters().init(key(3))[0]) == same_seed.backbone(same_seed.init(key(3))[0])


def adapted_plain(p, x, task):
    h = x
    for n in ("1", "3"):
        h = F.linear(h, p[f"trunk.{n}.weight"], p[f"trunk.{n}.bias"])
        h = torch.relu(h + torch.relu(h @ p[f"adapters.{task}.{n}.down"].T) @ p[f"adapters.{task}.{n}.up"].T)
    return F.linear(h, p[f"heads.{task}.weight"], p[f"heads.{task}.bias"])


def test_adapters_train_as_their_restatement():
    model = adapters()
    params, buffers = model.init(key(0, "init"))
    begun = model.backbone(params)
    for s in SOURCES[:2]:
        params, buffers = model.grow(params, buffers, s, key(0, s.name, "grow"))
        params = {n: p.double() for n, p in params.items()}
        mine = [n for n in params if f".{s.name}." in n]
        fit(params, mine, s, lambda p, x, s=s: adapted_plain(p, x, s.name))
    r = go(cs.methods.finetune(), model, SOURCES[:2])
    near(r.agent.state.params, params)
    assert all(bool(r.params[n].any()) for n in r.params if n.endswith("up"))
    assert model.backbone({n: p.float() for n, p in r.params.items()}) == begun


def test_adapters_on_maps_are_one_by_one_convolutions():
    model = cs.models.adapters(cs.models.conv(3, 1, 8, 4), C, 2)
    assert model.layers == ("0", "3") and model.widths == (4, 8)
    p, buffers = grown(model, IMAGES[:1])
    for n in model.layers:
        p[f"adapters.s/0.{n}.up"] = torch.randn(p[f"adapters.s/0.{n}.up"].shape, generator=key(n)).double()
    h = IMAGES[0].test.x
    for n in model.layers:
        h = F.conv2d(h, p[f"trunk.{n}.weight"], p[f"trunk.{n}.bias"], padding=1)
        down, up = (p[f"adapters.s/0.{n}.{e}"][:, :, None, None] for e in ("down", "up"))
        h = F.max_pool2d(torch.relu(h + F.conv2d(torch.relu(F.conv2d(h, down)), up)), 2)
    out = F.linear(h.flatten(1), p["heads.s/0.weight"], p["heads.s/0.bias"])
    assert torch.allclose(model(p, buffers, IMAGES[0].test.x, "s/0", True)[0][:, :2], out, atol=1e-12)


def test_adapters_on_tokens_and_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = cs.models.adapters(nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)), C, 2)
    assert model.layers == ("0.self_attn", "0.linear1", "0.linear2") and model.widths == (8, 16, 8)
    params, buffers = grown(model, SOURCES[:1])
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        before = model(params, buffers, x, "s/0", False)[0]
        layer.double().eval()
        assert torch.allclose(model.features(params, buffers, x), layer(x).flatten(1))
        for n in [n for n in params if n.endswith("up")]:
            moved = {**params, n: torch.randn_like(params[n])}
            assert not torch.allclose(model(moved, buffers, x, "s/0", False)[0][:, :2], before[:, :2]), (
                "the fast path is off"
            )
    given = {n: p.requires_grad_() for n, p in params.items()}
    names = [n for n in given if n.endswith("up")]
    out = model(given, buffers, x, "s/0", True)[0][:, :2].sum()
    assert all(bool(g.any()) for g in torch.autograd.grad(out, [given[n] for n in names]))


def test_the_backbone_stays_in_eval_mode():
    module = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    model = cs.models.adapters(module, C, 2)
    assert not model.has_batch_norm and not model.draws
    buffers = model.init(key(0))[1]
    r = go(cs.methods.finetune(), model, SOURCES[:2])
    assert torch.equal(r.params["trunk.0.weight"], module[0].weight.detach().double()), (
        "a module comes with its weights"
    )
    assert all(
        torch.equal(r.agent.state.buffers[n], b.to(r.agent.state.buffers[n])) for n, b in buffers.items()
    )


def test_tied_and_root_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(D, D)
            self.head = nn.Linear(D, 3)

        def forward(self, x):
            return self.head(self.a(self.a(x)))

    for backbone in (cs.models.wrap(Twice), cs.models.wrap(nn.Linear(D, D), D, headless=True)):
        model = cs.models.adapters(backbone, C, 2)
        assert len(model.layers) == 1
        params, buffers = grown(model, SOURCES[:1])
        assert all(model.task_of(n) == "s/0" for n in params if not n.startswith("trunk."))
        x = SOURCES[0].test.x
        before = model(params, buffers, x, "s/0", False)[0]
        up = next(n for n in params if n.endswith("up"))
        params[up] = torch.ones_like(params[up])
        assert not torch.equal(model(params, buffers, x, "s/0", False)[0], before)
        assert torch.equal(
            model.bind(params, buffers, True)[0](x, "s/0"), model(params, buffers, x, "s/0", True)[0]
        )


def test_adapters_travel_in_the_bank():
    parts = cs.data.split_classes(cs.data.digits(), 5)
    model = cs.models.adapters(cs.models.mlp(64, (128,), 10), 10, 8)
    r = cs.run(
        cs.settings.skill([parts[:3], parts[3:]]),
        cs.methods.skill(),
        model,
        cs.Training(epochs=4, lr=0.05, momentum=0.9),
    )
    plain = cs.run(cs.settings.skill([parts[:3], parts[3:]]), cs.methods.skill(), None, cs.Training(epochs=0))
    assert r.score > 0.85 > plain.score
    own = model.backbone(r.params)
    for (_, s), m in r.agent.state.experts.items():
        names = m.group("entries").keys()
        assert {model.task_of(n) for n in names} == {s} and m.meta["backbone"] == own
        assert {n.split(".")[-1] for n in names} == {"down", "up", "weight", "bias"}
        assert bool(m.group("entries")[f"adapters.{s}.1.up"].any())
    x = parts[4].test.x
    with torch.no_grad():
        assert (r.predict(x, parts[4].name).argmax(1) == parts[4].test.y).float().mean() > 0.85


def test_freezing_adapters_of_a_task():
    model = cs.models.frozen(adapters(), ["adapters.s/0.*", "heads.s/0.*"])
    params, _ = grown(model, SOURCES[:2])
    assert {model.task_of(n) for n in params if not model.frozen(n)} == {"s/1"}
    with pytest.raises(ConsilienceError, match="match an entry"):
        cs.models.frozen(adapters(), ["nothing.*"])


# both


@CASES
def test_bind_equals_call_and_vmap_equals_loop(name):
    make, sources, _ = MADE[name]
    model = make()
    runs = [grown(model, sources, seed) for seed in range(2)]
    buffers, x = runs[0][1], sources[0].test.x[:5]
    params = [
        {n: p + 0.1 * torch.randn(p.shape, generator=key(i, n)).double() for n, p in q.items()}
        for i, (q, _) in enumerate(runs)
    ]
    stacked = {n: torch.stack([p[n] for p in params]) for n in params[0]}
    for task in (None, "s/1", "unknown"):
        for p in params:
            assert torch.equal(model.bind(p, buffers, True)[0](x, task), model(p, buffers, x, task, True)[0])
        each = torch.stack([model(p, buffers, x, task, True)[0] for p in params])
        out = torch.func.vmap(lambda p, t=task: model(p, buffers, x, t, True)[0])(stacked)
        torch.testing.assert_close(out.exp(), each.exp())
    layout = Layout.of({n: p for n, p in params[0].items() if not model.frozen(n)})
    flat = layout.flatten(params[0])

    def loss(theta):
        out = model({**params[0], **layout.split(theta)}, buffers, x, "s/1", True)[0]
        return F.cross_entropy(out, torch.full((5,), 2))

    leaf = flat.clone().requires_grad_()
    assert torch.allclose(torch.func.grad(loss)(flat), torch.autograd.grad(loss(leaf), leaf)[0])


@CASES
def test_state_goes_through_safetensors(name):
    model, sources, method = MADE[name]
    model = model()
    r = go(method(), model, sources, epochs=1)
    data = pack({**r.params, **{f"buffers/{n}": b for n, b in r.agent.state.buffers.items()}})
    found, _ = unpack(data)
    buffers = {n[8:]: t for n, t in found.items() if n.startswith("buffers/")}
    for s in sources:
        old = model(r.params, r.agent.state.buffers, s.test.x, s.name, False)[0]
        assert torch.equal(model(found, buffers, s.test.x, s.name, False)[0], old)


@pytest.mark.parametrize(("name", "at"), [*((n, 14) for n in MADE), ("columns", 3)])
def test_resumes_mid_task_to_the_same_bits(name, at, tmp_path):
    make, sources, method = MADE[name]

    def run(model=None, **more):
        return cs.run(
            cs.settings.continual(sources, "task"), method(), model or make(), training(epochs=2), **more
        )

    whole = run()
    stopped(run, tmp_path / "run", at)
    if name == "columns":
        with pytest.raises(ConsilienceError, match="model"):
            run(columns(shrink=0.5), out=tmp_path / "run", resume=True)
    again = run(out=tmp_path / "run", resume=True)
    assert same(whole.params, again.params) and (whole.matrices == again.matrices).all()


# learning


@pytest.mark.parametrize("image", [False, True])
def test_pnn_learns_permuted_digits_and_forgets_nothing(image):
    """The tasks share all classes; the default model is progressive."""
    parts = cs.data.permute(cs.data.digits(image), 2)
    fit = cs.Training(epochs=3, lr=0.05, momentum=0.9, weight_decay=1e-4)
    r, plain = (
        cs.run(cs.settings.continual(parts, "task"), m, training=fit)
        for m in (cs.methods.pnn(), cs.methods.finetune())
    )
    assert r.score > 0.85 and r.score > plain.score + 0.02, (r.matrix, plain.matrix)
    after = r.matrix[1:]
    assert all((after[j:, j] == after[j, j]).all() for j in range(2)), "nothing is forgotten"
    assert any(n.startswith("columns.") for n in r.params)


def test_adapters_learn_permuted_digits_and_forget_nothing():
    """A trained backbone: adapters learn more than heads alone."""
    digits = cs.data.digits()
    fit = cs.Training(epochs=6, lr=0.05, momentum=0.9)
    parts = cs.data.permute(digits, 3)
    trunk = cs.models.mlp(64, (64, 64), 10)
    base = cs.run(cs.settings.continual([digits]), cs.methods.finetune(), trunk, fit)
    module = trunk.module
    module.load_state_dict(base.params)
    trained = cs.models.wrap(module)
    schedule = cs.settings.continual(parts, "task")
    models = (
        cs.models.adapters(trained, 10, 16),
        cs.models.multi_head(cs.models.frozen(trained), 10),
        trained,
    )
    r, heads, plain = (cs.run(schedule, cs.methods.finetune(), m, fit) for m in models)
    assert r.score > heads.score + 0.02 and r.score > plain.score + 0.02, (
        r.matrix,
        heads.matrix,
        plain.matrix,
    )
    after = r.matrix[1:]
    assert all((after[j:, j] == after[j, j]).all() for j in range(3)), "nothing is forgotten"


@pytest.mark.parametrize("name", ["columns", "adapters"])
def test_a_mapper_takes_the_place_of_the_label(name):
    parts = cs.data.split_classes(cs.data.digits(), 5)
    entropy = cs.Method("entropy", mapper=cs.mappers.min_entropy())
    fit = cs.Training(epochs=4, momentum=0.9)
    method = cs.methods.pnn() + entropy if name == "columns" else entropy
    model = None if name == "columns" else cs.models.adapters(cs.models.mlp(64, (128,), 10), 10)
    r = cs.run(cs.settings.continual(parts), method, model, fit)
    plain = cs.run(cs.settings.continual(parts), cs.methods.finetune(), cs.models.mlp(64, (128,), 10), fit)
    assert r.score > 0.3 > plain.score


# refusals


def test_pnn_refuses():
    pnn = cs.methods.pnn()
    for scenario in ("class", "domain"):
        with pytest.raises(cs.Refusal, match="neither a label nor a mapper; use scenario='task'"):
            go(pnn, columns(), scenario=scenario)
    for model in (cs.models.mlp(D, (4,), C), adapters()):
        with pytest.raises(cs.Refusal, match="no columns; use models.progressive"):
            go(pnn, model)
    with pytest.raises(cs.Refusal, match="what is received moves"):
        cs.run(
            cs.settings.federated_continual([SOURCES[:2], SOURCES[2:]], 1, scenario="task"), pnn, columns()
        )
    with pytest.raises(cs.Refusal, match="a step has several"):
        cs.run(cs.settings.multitask(SOURCES, "task"), pnn, columns())
    with pytest.raises(cs.Refusal, match="only trained models are given"):
        given = cs.run(cs.settings.continual(SOURCES[:1]), cs.methods.finetune(), cs.models.mlp(D, (4,), C))
        cs.run(cs.settings.exmodel([cs.Expert("e", given.params, SOURCES[0])]), pnn, columns())


def test_models_refuse():
    with pytest.raises(ConsilienceError, match="hidden layer"):
        cs.models.progressive(D, ())
    for make in (
        lambda: cs.models.progressive(0),
        lambda: cs.models.progressive(D, (0,)),
        lambda: cs.models.progressive(D, bottleneck=0),
        lambda: cs.models.progressive(D, shrink=0.0),
        lambda: cs.models.progressive(D, shrink=2.0),
        lambda: cs.models.progressive(D, outputs=0),
        lambda: cs.models.progressive_conv(size=3),
        lambda: cs.models.progressive_conv(width=0),
        lambda: adapters(layers=("5",)),
        lambda: adapters(layers=("2",)),
        lambda: cs.models.adapters(cs.models.mlp(D), 0),
        lambda: cs.models.adapters(cs.models.mlp(D), C, 0),
        lambda: cs.models.adapters(cs.models.linear(D, 3), C),
        lambda: cs.models.adapters(columns(), C),
    ):
        with pytest.raises(ConsilienceError, match=r"must .*got"):
            make()
    for model in (columns(), conv()):
        with pytest.raises(ConsilienceError, match="fit the model's input"):
            go(cs.methods.pnn(), model, [source(i, image=model.maps is False) for i in range(2)])
    with pytest.raises(cs.Refusal, match="share classes"):
        go(cs.methods.finetune(), columns(), [source(i, classes=(0, 1)) for i in range(2)], "domain")
    model = columns()
    params, buffers = grown(model, [source(0, classes=(0, 1)), source(1, classes=(1, 2))])
    with pytest.raises(ConsilienceError, match="task label, or a mapper"):
        model(params, buffers, SOURCES[0].test.x, None, False)
    with pytest.raises(ConsilienceError, match="numbered 0 .. 1"):
        model(params, {**buffers, "columns.s/1.order": torch.tensor(0)}, SOURCES[0].test.x, "s/0", False)
    with pytest.raises(ConsilienceError, match="has a column"):
        model.features(params, buffers, SOURCES[0].test.x, "nobody")
    block = nn.Sequential(nn.Linear(D, 8), nn.Unflatten(1, (4, 2)))
    wrong = cs.models.adapters(nn.Sequential(block, nn.Flatten(), nn.Linear(8, 3)), C, layers=("0",))
    with pytest.raises(ConsilienceError, match=r"gives 8 features, got \(40, 4, 2\)"):
        wrong(*grown(wrong, SOURCES[:1]), SOURCES[0].test.x, "s/0", False)
