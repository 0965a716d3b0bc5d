"""Head2Toe: restatements in plain torch, what biases and the lasso choose, refusals, learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience import models
from consilience.core.errors import ConsilienceError
from consilience.core.message import Module
from consilience.core.params import key
from consilience.core.source import Source, Tensors
from consilience.models.toes import head_rows

C = 4


class Net(nn.Module):
    """The second convolution keeps nothing of what the first one's last channel sees."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 6, 3, bias=False)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.deep(self.conv(x).relu()).mean((2, 3))).relu()


def net():
    torch.manual_seed(0)
    made = Net()
    made.fc.bias.data.fill_(1.0)
    return made


def source(name="t", n=40, classes=(0, 1), bright=0.0):
    g = torch.Generator().manual_seed(len(name))
    y = torch.arange(n) % 2
    x = torch.rand(n, 1, 8, 8, generator=g) + bright * y.view(-1, 1, 1, 1)
    t = Tensors(x, torch.tensor(classes)[y])
    return Source(
        name, t, t.select(torch.arange(6)), t, tuple(("s", str(i)) for i in range(C)), tuple(classes)
    )


def plain():
    return models.multi_head(models.frozen(models.wrap(net(), 5, headless=True)), C)


def biased(last=1.0):
    return models.beneficial_biases(models.wrap(net(), 5, headless=True), C, last)


def grown(model, *sources):
    params, buffers = model.init(key(0))
    for s in sources:
        params, buffers = model.grow(params, buffers, s, key(0, s.name))
    g = torch.Generator().manual_seed(7)
    for n in sorted(params):
        if n.startswith("biases."):
            params[n] = torch.randn(params[n].shape, generator=g)
    return params, buffers


def layers(m, x, b=None):
    """The outputs of the layers, and the features."""
    b = b or {"conv": torch.zeros(4), "deep": torch.zeros(6), "fc": torch.zeros(5)}
    one = F.conv2d(x, m.conv.weight, m.conv.bias, padding=1) + b["conv"].view(1, -1, 1, 1)
    two = F.conv2d(one.relu(), m.deep.weight) + b["deep"].view(1, -1, 1, 1)
    three = F.linear(two.mean((2, 3)), m.fc.weight, m.fc.bias) + b["fc"]
    return one, two, three, three.relu()


def probe(x, y, classes, name, epochs=3, batch=16, lr=1e-3, s="t", penalty=0.0):
    """A linear probe by Adam, from the same draws."""
    g = key(0, s, name)
    bound = x.shape[1] ** -0.5
    w = ((2 * torch.rand(classes, x.shape[1], generator=g) - 1) * bound).requires_grad_()
    b = ((2 * torch.rand(classes, generator=g) - 1) * bound).requires_grad_()
    adam = torch.optim.Adam([w, b], lr=lr)
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=g).split(batch):
            adam.zero_grad()
            (F.cross_entropy(x[i] @ w.T + b, y[i]) + penalty * w.norm(dim=0).sum()).backward()
            adam.step()
    return w.detach(), b.detach()


def without_validation(s):
    return Source(s.name, s.train, s.train.select(torch.arange(0)), s.test, s.labels, s.classes)


@torch.no_grad()
def all_taps(s):
    one, two, three, psi = layers(net(), s.train.x)
    return torch.cat(
        [z / z.norm(dim=1, keepdim=True) for z in (one.mean((2, 3)), two.mean((2, 3)), three, psi)], 1
    )


def test_all_of_it_without_a_lasso_is_a_linear_probe_on_all_taps():
    s, model = without_validation(source()), plain()
    toes, params, buffers = models.head2toe(model, *grown(model, s), s, keep=1, penalty=0, epochs=3, batch=16)
    z = all_taps(s)
    assert z.shape[1] == 4 + 6 + 5 + 5 and torch.equal(buffers["toes.t.index"], torch.arange(20))
    w, b = probe(z, s.train.y, 2, "head2toe")
    assert torch.allclose(params["toes.t.weight"], w, atol=1e-5) and torch.allclose(
        params["toes.t.bias"], b, atol=1e-5
    )
    out = toes(params, buffers, s.train.x, "t", True)[0]
    assert torch.allclose(out[:, :2], z @ w.T + b, atol=1e-5) and bool((out[:, 2:] == -torch.inf).all())
    assert torch.equal(toes.bind(params, buffers, True)[0](s.train.x, "t"), out)
    assert torch.equal(toes(params, buffers, s.train.x, None, False)[0], out)


def test_biases_choose_the_channels():
    s, model = without_validation(source(classes=(3, 1))), biased()
    given, held = grown(model, s)
    for n in ("conv", "deep", "fc"):
        given[f"biases.t.{n}"].mul_(0.01)
    given["biases.t.conv"][2], given["biases.t.deep"][5], given["biases.t.fc"][0] = -3.0, 2.0, 1.0
    for pool, keep in ((1, 0.2), (3, 0.2), (2, 0.1)):
        toes, params, buffers = models.head2toe(model, given, held, s, keep, pool=pool, epochs=2, batch=16)
        with torch.no_grad():
            one, two, three, psi = layers(
                net(), s.train.x, {n: given[f"biases.t.{n}"] for n in ("conv", "deep", "fc")}
            )
            logits = psi @ given["heads.t.weight"].T + given["heads.t.bias"]
            maps = [F.adaptive_avg_pool2d(m, pool).flatten(1) for m in (one[:, 2:3], two[:, 5:6])]
            z = torch.cat([*maps, *([three[:, :1]] if keep == 0.2 else []), logits], 1)
        w, b = probe(z, torch.tensor([{3: 0, 1: 1}[int(i)] for i in s.train.y]), 2, "head2toe", epochs=2)
        assert torch.allclose(params["toes.t.weight"], w, atol=1e-5), (pool, keep)
        assert torch.allclose(
            toes(params, buffers, s.train.x, "t", False)[0][:, [3, 1]], z @ w.T + b, atol=1e-5
        )
    last = biased(0.3)
    given, held = grown(last, s)
    index = models.head2toe(last, given, held, s, 1.0, epochs=1)[2]["toes.t.index"]
    assert last.layers == ("fc",) and index.tolist() == [10, 11, 12, 13, 14], (
        "only layers with biases are candidates"
    )


def test_the_lasso_chooses_by_the_norms_of_columns():
    s, model = without_validation(source()), plain()
    options = {"lr": 0.02, "epochs": 5, "batch": 16}
    z, chosen = all_taps(s), []
    for penalty, keep in ((0.0, 0.2), (0.1, 0.2), (0.1, 0.45)):
        toes, params, buffers = models.head2toe(
            model, *grown(model, s), s, keep=keep, penalty=penalty, **options
        )
        norms = probe(z, s.train.y, 2, "lasso", penalty=penalty, **options)[0].square().sum(0)
        index = sorted(sorted(range(20), key=lambda i: -float(norms[i]))[: round(keep * 20)])
        assert buffers["toes.t.index"].tolist() == index
        w, b = probe(z[:, index], s.train.y, 2, "head2toe", **options)
        assert torch.allclose(params["toes.t.weight"], w, atol=1e-5)
        assert torch.allclose(
            toes(params, buffers, s.train.x, "t", False)[0][:, :2], z[:, index] @ w.T + b, atol=1e-5
        )
        chosen.append(index)
    assert chosen[0] != chosen[1], "the penalty changes the choice"


def test_the_lasso_finds_what_tells_classes():
    """Only one channel of the first layer tells them; later layers do not read it."""
    made = net()
    with torch.no_grad():
        made.conv.weight[:3] = 0  # constant channels
        made.conv.bias[:3] = torch.tensor([0.5, 0.2, 0.1])
        made.conv.weight[3].fill_(0.1)
        made.deep.weight[:, 3] = 0
    model, s = (
        models.multi_head(models.frozen(models.wrap(made, 5, headless=True)), C),
        source(n=200, bright=0.2),
    )
    toes, params, buffers = models.head2toe(
        model, *grown(model, s), s, keep=0.1, lr=0.02, epochs=30, penalty=0.01
    )
    assert 3 in buffers["toes.t.index"].tolist() and len(buffers["toes.t.index"]) == 2
    accuracy = (toes(params, buffers, s.test.x, "t", False)[0].argmax(1) == s.test.y).float().mean()
    assert accuracy > 0.95, "the features themselves are all alike"


def test_a_layer_of_zeros_gives_no_nan():
    made = net()
    made.deep.weight.data.zero_()
    model, s = models.multi_head(models.frozen(models.wrap(made, 5, headless=True)), C), source()
    toes, params, buffers = models.head2toe(model, *grown(model, s), s, keep=0.5, epochs=3)
    assert torch.isfinite(params["toes.t.weight"]).all()
    out = toes(params, buffers, s.test.x, "t", False)[0]
    assert torch.isfinite(out[:, :2]).all()
    z = toes.taps(params, buffers, s.test.x, "t")
    assert not z[:, 4:10].any() and torch.allclose(z[:, :4].norm(dim=1), torch.ones(40))


def test_validation_chooses_the_epoch():
    s, model = source(), plain()
    given = grown(model, s)
    runs = [
        models.head2toe(model, *given, without_validation(s), keep=1, penalty=0, epochs=e, lr=0.1)[1:]
        for e in range(1, 7)
    ]
    z = all_taps(s)

    def score(params):
        out = z[:6] @ params["toes.t.weight"].T + params["toes.t.bias"]
        return float((out.argmax(1) == s.validation.y).float().mean()), -float(
            F.cross_entropy(out, s.validation.y)
        )

    best = max((p for p, _ in runs), key=score)
    found = models.head2toe(model, *given, s, keep=1, penalty=0, epochs=6, lr=0.1)[1]
    assert torch.allclose(found["toes.t.weight"], best["toes.t.weight"], atol=1e-5)


def test_tasks_stand_apart_and_fit_in_a_module():
    a, b = source("a"), source("bb", classes=(2, 3))
    model = biased()
    given, held = grown(model, a, b)
    toes, params, buffers = models.head2toe(model, given, held, a, 0.2, epochs=2)
    x = b.test.x
    assert torch.equal(toes(params, buffers, x, "bb", False)[0], model(given, held, x, "bb", False)[0]), (
        "as before, without toes"
    )
    before = toes(params, buffers, x, "a", False)[0]
    toes, params, buffers = models.head2toe(toes, params, buffers, b, 0.2, epochs=2)
    assert torch.equal(toes(params, buffers, x, "a", False)[0], before)
    assert not torch.equal(toes(params, buffers, x, "bb", False)[0], model(given, held, x, "bb", False)[0])
    none = toes(params, buffers, x, None, False)[0]
    assert torch.equal(none[:, :2], before[:, :2]) and torch.equal(
        none[:, 2:], toes(params, buffers, x, "bb", False)[0][:, 2:]
    )
    assert toes.backbone(params) == model.backbone(given) and torch.equal(
        toes.features(params, buffers, x), model.features(given, held, x)
    )
    assert {toes.task_of(n) for n in (*params, *buffers) if n.startswith(("toes.", "biases.", "heads."))} == {
        "a",
        "bb",
    }
    assert not any(toes.frozen(n) for n in params if n.startswith("toes."))
    mine = {f"entries/{n}": p for n, p in params.items() if toes.task_of(n) == "a"}
    item = Module(
        {**mine, **{f"buffers/{n}": p for n, p in buffers.items() if toes.task_of(n) == "a"}}, {"task": "a"}
    )
    assert set(item.group("buffers")) == {
        "heads.a.columns",
        "toes.a.index",
    } and "toes.a.weight" in item.group("entries")


def test_examples_are_read_where_the_parameters_are():
    from torch._subclasses.fake_tensor import FakeTensorMode

    s, model = source(classes=(3, 1)), plain()
    given = grown(model, s)
    toes = models.head2toe(model, *given, s, epochs=1)[0]
    with FakeTensorMode(
        allow_non_fake_inputs=True
    ) as fake:  # stands for a device that is not there: a mix of two is an error
        params, buffers = (
            {n: fake.from_tensor(t).to("lazy") for n, t in tensors.items()} for tensors in given
        )
        held = Tensors(fake.from_tensor(s.train.x), fake.from_tensor(s.train.y))
        with pytest.raises(RuntimeError, match="on the same device"):
            toes.taps(params, buffers, held.x, "t")
        x, y = head_rows(toes, params, buffers, held, "t", None, 16)
    assert (x.shape, y.shape) == ((40, 20), (40,)) and x.device.type == y.device.type == "lazy"


def test_on_features_of_a_backbone_it_wants_images():
    model = models.multi_head(models.backbone(models.wrap(net(), 5, headless=True)), C)
    s = source()
    given = grown(model, s)
    toes, params, buffers = models.head2toe(model, *given, s, keep=0.2, epochs=1)
    assert toes.from_features(params, buffers, torch.rand(2, 5), "t") is None
    with pytest.raises(ConsilienceError, match="must be given images, not features, got no call of 'body"):
        toes(params, buffers, torch.rand(2, 5), "t", False)


class Shares(nn.Module):
    """A layer whose weights are read, and that is never called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.qkv = nn.Linear(4, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(F.linear(self.conv(x).mean((2, 3)), self.qkv.weight).relu())


@pytest.mark.parametrize("by", ["biases", "lasso"])
def test_layers_that_a_backbone_never_calls_are_not_read(by):
    torch.manual_seed(0)
    module, s = Shares(), source()
    backbone = models.backbone(models.wrap(module, 5, headless=True), size=8)
    model = models.beneficial_biases(backbone, C) if by == "biases" else models.multi_head(backbone, C)
    toes, params, buffers = models.head2toe(model, *grown(model, s), s, keep=1, by=by, epochs=1)
    assert toes.layers == ("body.conv", "body.fc") and toes.spans()[""] == (9, 14)
    assert len(buffers["toes.t.index"]) == (9 if by == "biases" else 14)
    assert torch.isfinite(toes(params, buffers, s.test.x, "t", False)[0][:, :2]).all()
    wrapped = models.multi_head(models.frozen(models.wrap(module, 5, headless=True)), C)
    with pytest.raises(ConsilienceError, match="needs layers that the module calls, got no call of 'qkv'"):
        models.head2toe(wrapped, *grown(wrapped, s), s, epochs=1)


def test_a_layer_without_a_row_for_each_image_is_refused():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(x.reshape(-1, 16, 4)).reshape(len(x), -1, 5).mean(1)

    model, s = (
        models.multi_head(models.backbone(models.wrap(Windows(), 5, headless=True), size=16), C),
        source(),
    )
    with pytest.raises(
        ConsilienceError, match="a row for each image, got 480 rows of 'body.fc' for 40 images"
    ):
        models.head2toe(model, *grown(model, s), s, epochs=1)


def test_refusals():
    s, model = source(), plain()
    given = grown(model, s)
    for more, said in (
        ({"keep": 0}, r"`keep` must be in \(0, 1\], got 0"),
        ({"keep": 1.5}, "`keep`"),
        ({"epochs": 0}, "`epochs` must be a whole number >= 1"),
        ({"lr": -1}, "`lr` must be at least 0"),
        ({"pool": 0}, "`pool` must be a whole number >= 1"),
        ({"by": "magic"}, "`by` must be 'biases' or 'lasso'"),
        ({"by": "biases"}, "needs biases of models.beneficial_biases, got multi_head"),
    ):
        with pytest.raises(ConsilienceError, match=said):
            models.head2toe(model, *given, s, **more)
    with pytest.raises(ConsilienceError, match="got none for 'other'"):
        models.head2toe(model, *given, source("other"))
    trained = models.multi_head(models.wrap(net(), 5, headless=True), C)
    with pytest.raises(ConsilienceError, match="frozen trunk"):
        models.head2toe(trained, *grown(trained, s), s)
    toes, params, buffers = models.head2toe(model, *given, s, epochs=1)
    with pytest.raises(ConsilienceError, match="one `by` and `pool`"):
        models.head2toe(toes, params, buffers, s, pool=2)
    with pytest.raises(ConsilienceError, match="needs a model of models.multi_head"):
        models.head2toe(models.linear(4), {}, {}, s)


def test_it_learns_digits_on_trained_biases():
    s = cs.data.digits(image=True)
    torch.manual_seed(0)
    model = models.beneficial_biases(models.backbone(models.conv(10, 1, 8, 8)), 10)
    r = cs.run(
        cs.settings.continual([s], "task"),
        cs.methods.finetune(),
        model,
        cs.Training(epochs=5, lr=0.003, optimiser="adam"),
    )
    toes, params, buffers = models.head2toe(
        model, r.params, r.agent.state.buffers, s, 0.5, pool=4, epochs=5, lr=0.01
    )
    with torch.no_grad():
        got = (toes(params, buffers, s.test.x, "digits", False)[0].argmax(1) == s.test.y).float().mean()
    assert got > max(0.9, r.score)
