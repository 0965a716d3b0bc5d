"""Beneficial biases and normalised heads: restatements in plain torch, old answers to the bit, refusals,
learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience import models
from consilience.core.errors import ConsilienceError
from consilience.core.params import key, same
from consilience.core.source import Source, Tensors

C = 6


class Net(nn.Module):
    """A convolution with bias, a grouped one without, a batch norm after each, a linear layer, a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        h = self.bn(self.conv(x)).relu()
        return self.head(self.fc(self.norm(self.deep(h)).relu().mean((2, 3))).relu())


def net():
    torch.manual_seed(0)
    made = Net()
    for bn in (made.bn, made.norm):
        for t in (bn.running_mean, bn.weight.data, bn.bias.data):
            t.normal_()
        bn.running_var.uniform_(0.1, 0.5)
    for bias in (made.bn.bias, made.norm.bias, made.fc.bias):
        bias.data.abs_().add_(0.5)  # alive
    return made


def source(i, n=30, classes=None):
    g = torch.Generator().manual_seed(100 + i)
    own = classes or (2 * i, 2 * i + 1)
    t = Tensors(
        torch.rand(n, 1, 9, 9, generator=g), torch.tensor(own)[torch.randint(len(own), (n,), generator=g)]
    )
    return Source(f"s/{i}", t, t, t, tuple(("space", str(c)) for c in range(C)), own)


SOURCES = [source(0), source(1), source(2)]
X = SOURCES[0].test.x


def grown(model, sources=SOURCES):
    params, buffers = model.init(key(0))
    for s in sources:
        params, buffers = model.grow(params, buffers, s, key(0, s.name))
    return params, buffers


def drawn(params):
    return {
        n: torch.randn(p.shape, generator=key(n)) if n.startswith("biases.") else p for n, p in params.items()
    }


def plain(m, x, biases):
    """The features by functional calls; B stands on each channel."""

    def per(n):
        return biases[n].view(1, -1, 1, 1)

    def norm(bn, h):
        return F.batch_norm(h, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)

    h = norm(m.bn, F.conv2d(x, m.conv.weight, m.conv.bias, padding=1) + per("conv")).relu()
    h = norm(m.norm, F.conv2d(h, m.deep.weight, None, 2, 0, 1, 2) + per("deep")).relu().mean((2, 3))
    return (F.linear(h, m.fc.weight, m.fc.bias) + biases["fc"]).relu()


# beneficial biases


def test_zero_biases_are_the_backbone_to_the_bit():
    model, own = models.beneficial_biases(net(), C), models.multi_head(models.frozen(models.wrap(net())), C)
    params, buffers = grown(model)
    assert model.layers == ("conv", "deep", "fc") and model.widths == (4, 8, 5)
    assert all(
        not params[f"biases.s/1.{n}"].any() and params[f"biases.s/1.{n}"].shape == (w,)
        for n, w in zip(model.layers, model.widths, strict=True)
    )
    mine, held = grown(own)
    assert model.backbone(params) == own.backbone(mine)
    for task in ("s/0", "s/2", None):
        assert torch.equal(model.features(params, buffers, X, task), own.features(mine, held, X))
        assert torch.equal(model(params, buffers, X, task, True)[0], own(mine, held, X, task, True)[0])
    moved = drawn(params)
    assert torch.equal(model.features(moved, buffers, X), own.features(mine, held, X)), (
        "features without a task are the backbone's"
    )
    assert not torch.allclose(
        model.features(moved, buffers, X, "s/0"), own.features(mine, held, X), atol=1e-3
    )
    alone = {n: moved[n] if n.startswith("biases.s/0") else p for n, p in params.items()}
    assert torch.equal(model.features(alone, buffers, X, "s/1"), own.features(mine, held, X)), (
        "each task has its own"
    )


def test_a_bias_stands_on_every_channel():
    model, module = models.beneficial_biases(net(), C), net().eval()
    params, buffers = grown(model)
    moved = drawn(params)
    for task in ("s/0", "s/1"):
        biases = {n: moved[f"biases.{task}.{n}"] for n in model.layers}
        with torch.no_grad():
            psi = plain(module, X, biases)
            assert torch.allclose(model.features(moved, buffers, X, task), psi, atol=1e-6)
            out = F.linear(psi, moved[f"heads.{task}.weight"], moved[f"heads.{task}.bias"])
            columns = buffers[f"heads.{task}.columns"]
            assert torch.allclose(model(moved, buffers, X, task, True)[0][:, columns], out, atol=1e-6)
            assert torch.equal(
                model.bind(moved, buffers, True)[0](X, task), model(moved, buffers, X, task, True)[0]
            )


def test_a_bias_before_an_eval_norm_is_another_beta():
    model = models.beneficial_biases(net(), C)
    params, buffers = grown(model)
    moved, module = drawn(params), net().eval()
    with torch.no_grad():
        for bn, n in ((module.bn, "conv"), (module.norm, "deep")):
            bn.bias += bn.weight * moved[f"biases.s/0.{n}"] / (bn.running_var + bn.eps).sqrt()
        module.fc.bias += moved["biases.s/0.fc"]
        module.head = nn.Identity()
        assert torch.allclose(model.features(moved, buffers, X, "s/0"), module(X), atol=1e-6)


def test_the_last_fraction_of_the_layers():
    four = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Conv2d(2, 3, 3),
        nn.Conv2d(3, 4, 3),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.Linear(5, 2),
    )
    for last, layers in (
        (1, ("0", "1", "2", "4")),
        (0.5, ("2", "4")),
        (0.25, ("4",)),
        (0.3, ("2", "4")),
        (0, ()),
    ):
        model = models.beneficial_biases(four, C, last)
        params, buffers = grown(model, SOURCES[:1])
        assert model.layers == layers
        assert {n for n in params if n.startswith("biases.")} == {f"biases.s/0.{n}" for n in layers}
        out = model(params, buffers, X, "s/0", True)[0]
        assert torch.equal(
            out,
            models.beneficial_biases(four, C)(
                *grown(models.beneficial_biases(four, C), SOURCES[:1]), X, "s/0", True
            )[0],
        )
    for last in (-0.1, 1.1, True):
        with pytest.raises(ConsilienceError, match=r"`last` must be in \[0, 1\]"):
            models.beneficial_biases(four, C, last)
    with pytest.raises(ConsilienceError, match="biases must have convolutions or linear layers"):
        models.beneficial_biases(models.wrap(nn.Flatten(), 81, headless=True), C)
    assert models.beneficial_biases(four, C, 0).from_features(
        params, buffers, torch.rand(2, 5), "s/0"
    ).shape == (2, C)
    assert models.beneficial_biases(four, C).from_features(params, buffers, torch.rand(2, 5), "s/0") is None


def test_no_graph_before_the_first_of_them():
    model = models.beneficial_biases(net(), C, last=0.5)
    assert model.layers == ("deep", "fc")
    params, buffers = grown(model)
    given = {n: p if model.frozen(n) else p.requires_grad_() for n, p in params.items()}
    nodes, waiting = [], [model.bind(given, buffers, True)[0](X, "s/0")[:, :2].sum().grad_fn]
    while waiting:
        node = waiting.pop()
        nodes.append(node.name())
        waiting += [n for n, _ in node.next_functions if n is not None]
    assert nodes.count("ConvolutionBackward0") == 0, (
        "the biased convolution is the first, and its input needs no gradient"
    )
    full = models.beneficial_biases(net(), C)
    params, buffers = grown(full)
    given = {n: p if full.frozen(n) else p.requires_grad_() for n, p in params.items()}
    assert (
        sum(
            n is not None
            for n in torch.autograd.grad(
                full(given, buffers, X, "s/0", True)[0][:, :2].sum(),
                [given[f"biases.s/0.{n}"] for n in full.layers],
            )
        )
        == 3
    )


def test_training_moves_biases_and_heads_alone_and_forgets_nothing():
    model = models.beneficial_biases(net(), C)
    params, buffers = model.init(key(0))
    training = cs.Training(epochs=3, batch_size=8, optimiser="adam", lr=0.01, weight_decay=0.01)
    one = cs.run(cs.settings.continual(SOURCES[:1], "task"), cs.methods.finetune(), model, training)
    all_ = cs.run(cs.settings.continual(SOURCES, "task"), cs.methods.finetune(), model, training)
    assert model.backbone(one.params) == model.backbone(all_.params) == model.backbone(params)
    assert all(torch.equal(all_.agent.state.buffers[n], b) for n, b in buffers.items())
    assert all(torch.equal(all_.params[n], p) for n, p in one.params.items()), (
        "what the first task has does not move"
    )
    assert all(bool(all_.params[f"biases.{s.name}.{n}"].any()) for s in SOURCES for n in model.layers)


def test_they_train_as_their_restatement():
    model, module, s = models.beneficial_biases(net(), C), net().eval(), SOURCES[0]
    r = cs.run(
        cs.settings.continual([s], "task"),
        cs.methods.finetune(),
        model,
        cs.Training(epochs=4, batch_size=len(s.train), lr=0.1),
    )
    params = model.grow(*model.init(key(0, "init")), s, key(0, s.name, "grow"))[0]
    mine = {n: p.clone().requires_grad_() for n, p in params.items() if not model.frozen(n)}
    optimiser = torch.optim.SGD(mine.values(), lr=0.1)
    for _ in range(4):
        psi = plain(module, s.train.x, {n: mine[f"biases.s/0.{n}"] for n in model.layers})
        loss = F.cross_entropy(F.linear(psi, mine["heads.s/0.weight"], mine["heads.s/0.bias"]), s.train.y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for n, p in mine.items():
        assert torch.allclose(r.params[n], p, atol=1e-5), n
        assert not torch.equal(p, params[n])


def test_they_travel_in_the_bank():
    model = models.beneficial_biases(models.backbone(net()), C, last=0.5)
    r = cs.run(
        cs.settings.skill([[SOURCES[0]], SOURCES[1:]]),
        cs.methods.skill(),
        model,
        cs.Training(epochs=2, batch_size=8, lr=0.1),
    )
    assert len(r.agent.state.experts) == 3
    for (_, s), m in r.agent.state.experts.items():
        assert set(m.group("entries")) == {f"biases.{s}.{n}" for n in ("body.deep", "body.fc")} | {
            f"heads.{s}.{n}" for n in ("weight", "bias")
        }
        assert m.meta["backbone"] == model.backbone(r.params) and bool(
            m.group("entries")[f"biases.{s}.body.deep"].any()
        )


def test_a_task_with_biases_inside_wants_images():
    backbone = models.backbone(net())
    psi = torch.rand(4, 5)
    for model, word in (
        (models.beneficial_biases(backbone, C, 0.3), "biases"),
        (models.adapters(backbone, C, 2), "adapters"),
    ):
        params, buffers = grown(model)
        for call in (
            lambda task, m=model, p=params, b=buffers: m(p, b, psi, task, False)[0],
            lambda task, m=model, p=params, b=buffers: m.features(p, b, psi, task),
            lambda task, m=model, p=params, b=buffers: m.bind(p, b, True)[0](psi, task),
        ):
            with pytest.raises(
                ConsilienceError,
                match=rf"{word} inside the backbone must be given images, got features \[B, 5\] for 's/0'",
            ):
                call("s/0")
        assert torch.equal(model.features(params, buffers, psi), psi), (
            "without a task they are the backbone's own"
        )
    none = models.beneficial_biases(backbone, C, 0)
    assert torch.equal(none.features(*grown(none), psi, "s/0"), psi)


class Attending(nn.Module):
    """An attention that reads the weights of a layer that nobody calls, as several of timm's do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=3)
        self.qkv = nn.Linear(4, 12, bias=False)
        self.proj = nn.Linear(4, 5)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        h = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = F.linear(h, self.qkv.weight).chunk(3, -1)
        return self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v).mean(1)


def test_layers_that_a_backbone_never_calls_have_none(recwarn):
    torch.manual_seed(0)
    module, called = Attending(), ("body.stem", "body.proj")
    backbone = models.backbone(models.wrap(module, 5, headless=True), size=9)
    s, before = SOURCES[0], hash_of(backbone)
    model, adapted = models.beneficial_biases(backbone, C), models.adapters(backbone, C, 2)
    assert model.layers == adapted.layers == called and model.widths == (4, 5)
    assert models.beneficial_biases(backbone, C, last=0.5).layers == ("body.proj",), (
        "a fraction of those that are called"
    )
    assert models.adapters(backbone, C, 2, ("body.*",)).layers == called
    with pytest.raises(ConsilienceError, match=r"must match parts that the backbone calls, got '\*qkv'"):
        models.adapters(backbone, C, 2, ("body.stem", "*qkv"))
    params, buffers = grown(model, [s])
    for n in model.layers:
        moved = {**params, f"biases.s/0.{n}": params[f"biases.s/0.{n}"] + 1}
        assert not torch.allclose(
            model(moved, buffers, X, "s/0", False)[0], model(params, buffers, X, "s/0", False)[0]
        )
    unread = models.backbone(
        models.wrap(module, 5, headless=True)
    )  # what it wants is not known: 32 x 32 is tried
    assert models.beneficial_biases(unread, C).layers == called
    assert models.beneficial_biases(models.wrap(module, 5, headless=True), C).layers == (
        "stem",
        "qkv",
        "proj",
        "unused",
    )
    with pytest.raises(ConsilienceError, match="biases must have convolutions or linear layers"):
        models.beneficial_biases(models.backbone(models.wrap(Silent(), 9, headless=True), size=3), C)
    assert hash_of(backbone) == before and not recwarn
    assert not any(m._forward_hooks for m in backbone.module.modules())


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 9)

    def forward(self, x):
        return F.linear(x.mean(1).flatten(1), self.layer.weight)


def test_all_layers_count_where_a_backbone_cannot_be_tried():
    picky = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(98, 5), nn.Linear(5, 2))  # 9 x 9 alone
    assert models.beneficial_biases(models.backbone(picky), C).layers == ("body.0", "body.2")


def hash_of(model):
    return model.backbone(model.init(key(0))[0])


def test_on_tokens_and_vectors():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = models.beneficial_biases(nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)), C)
    assert model.layers == ("0.self_attn", "0.linear1", "0.linear2") and model.widths == (8, 16, 8)
    params, buffers = grown(model, SOURCES[:1])
    x = torch.randn(5, 3, 8)
    layer.eval()
    b = {n: torch.randn(w) for n, w in zip(model.layers, model.widths, strict=True)}
    params |= {f"biases.s/0.{n}": t for n, t in b.items()}
    with torch.no_grad():
        q, k, v = (
            F.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
            .view(5, 3, 3, 2, 4)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = ((q @ k.transpose(2, 3) / 2).softmax(3) @ v).transpose(1, 2).reshape(5, 3, 8)
        h = layer.norm1(x + layer.self_attn.out_proj(mixed) + b["0.self_attn"])
        hidden = (layer.linear1(h) + b["0.linear1"]).relu()
        psi = layer.norm2(h + layer.linear2(hidden) + b["0.linear2"]).flatten(1)
        assert torch.allclose(model.features(params, buffers, x, "s/0"), psi, atol=1e-5)
        assert not torch.allclose(model.features(params, buffers, x), psi, atol=1e-2)


# heads with normalised rows


def normed(outputs=C):
    return models.multi_head(models.frozen(models.wrap(net())), outputs, norm="inf")


def test_rows_are_divided_by_their_largest_magnitude():
    model = normed()
    params, buffers = grown(model)
    psi = model.features(params, buffers, X)
    for s in SOURCES:
        w, b = params[f"heads.{s.name}.weight"], params[f"heads.{s.name}.bias"]
        rows = torch.stack([r / max(abs(v) for v in r.tolist()) for r in w])
        assert float(rows.abs().max()) == 1
        for out in (
            model(params, buffers, X, s.name, True)[0],
            model.bind(params, buffers, True)[0](X, s.name),
            model.from_features(params, buffers, psi, s.name),
        ):
            assert torch.allclose(out[:, list(s.classes)], psi @ rows.T + b, atol=1e-6)
    assert torch.equal(
        model(params, buffers, X, "s/0", True)[0],
        model({**params, "heads.s/0.weight": 4 * params["heads.s/0.weight"]}, buffers, X, "s/0", True)[0],
    )
    biased = models.beneficial_biases(net(), C, norm="inf")
    assert torch.allclose(
        biased(*grown(biased), X, "s/1", True)[0], model(params, buffers, X, "s/1", True)[0], atol=1e-6
    )


def test_training_goes_through_the_division():
    model, s = normed(), SOURCES[0]
    r = cs.run(
        cs.settings.continual([s], "task"),
        cs.methods.finetune(),
        model,
        cs.Training(epochs=5, batch_size=len(s.train), lr=0.5),
    )
    params, buffers = model.grow(*model.init(key(0, "init")), s, key(0, s.name, "grow"))
    psi = model.features(params, buffers, s.train.x)
    w, b = (params[f"heads.s/0.{n}"].clone().requires_grad_() for n in ("weight", "bias"))
    optimiser = torch.optim.SGD([w, b], lr=0.5)
    for _ in range(5):
        optimiser.zero_grad()
        F.cross_entropy(psi @ (w / w.abs().max(1, keepdim=True).values).T + b, s.train.y).backward()
        optimiser.step()
    assert torch.allclose(r.params["heads.s/0.weight"], w, atol=1e-5) and torch.allclose(
        r.params["heads.s/0.bias"], b, atol=1e-5
    )


def test_a_row_of_zeros_gives_no_nan():
    model = normed()
    params, buffers = grown(model, SOURCES[:1])
    params["heads.s/0.weight"][0] = 0
    w = params["heads.s/0.weight"].requires_grad_()
    out = model({**params, "heads.s/0.weight": w}, buffers, X, "s/0", True)[0][:, :2]
    (g,) = torch.autograd.grad(F.cross_entropy(out, SOURCES[0].test.y), w)
    assert torch.isfinite(out).all() and torch.isfinite(g).all() and bool(g[0].any()), "it can still learn"
    assert torch.equal(out[:, 0], params["heads.s/0.bias"][0].expand(len(X)))


def test_heads_that_stand_together_keep_each_task_s_logits():
    model, sources = normed(), SOURCES[:2]
    r = cs.run(
        cs.settings.continual(sources, "task"),
        cs.methods.finetune(),
        model,
        cs.Training(epochs=3, batch_size=8, lr=0.5),
    )
    p, buffers = r.params, r.agent.state.buffers
    both = source(7, classes=(0, 1, 2, 3))
    params, buffers = model.grow(p, buffers, both, key(1))
    params["heads.s/7.weight"] = torch.cat([model.rows(p[f"heads.{s.name}.weight"]) for s in sources])
    params["heads.s/7.bias"] = torch.cat([p[f"heads.{s.name}.bias"] for s in sources])
    together = model(params, buffers, X, "s/7", False)[0]
    for s in sources:
        own, columns = model(params, buffers, X, s.name, False)[0], list(s.classes)
        assert float((own[:, columns] - together[:, columns]).abs().max()) <= 1e-6
    raw = {**params, "heads.s/7.weight": torch.cat([p[f"heads.{s.name}.weight"] for s in sources])}
    assert torch.allclose(model(raw, buffers, X, "s/7", False)[0], together, atol=1e-6), (
        "raw rows act alike, at their own step size"
    )
    plain_model = models.multi_head(models.frozen(models.wrap(net())), C)
    assert not torch.allclose(
        plain_model(raw, buffers, X, "s/7", False)[0][:, :2], together[:, :2], atol=1e-2
    )


def test_what_writes_a_head_is_refused():
    with pytest.raises(ConsilienceError, match="rows are normalised"):
        normed().head(grown(normed(), SOURCES[:1])[0], "s/0")
    with pytest.raises(ConsilienceError, match="`norm` must be 'inf' or None, got 2"):
        models.multi_head(models.linear(4), C, norm=2)
    assert "norm=inf" in repr(normed()) and "norm" not in repr(models.multi_head(models.linear(4), C))
    frozen = models.frozen(normed(), ("heads.*",))
    assert frozen.norm == "inf" and same(grown(frozen)[0], grown(normed())[0])
