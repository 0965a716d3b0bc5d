import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience import models
from consilience.core.errors import ConsilienceError
from consilience.core.params import Layout, key, same
from consilience.core.source import LabelFrame, Source, Tensors
from consilience.models.heads import MultiHead
from consilience.models.module import ModuleModel


def source(name="a", classes=(0, 1), task=None, labels=10):
    data = Tensors(torch.zeros(4, 6), torch.tensor([classes[0]] * 4))
    return Source(name, data, data, data, tuple(("s", str(i)) for i in range(labels)), tuple(classes), task)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 6, bias=False)
        self.decode = nn.Linear(6, 6, bias=False)
        self.decode.weight = self.encode.weight
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("scale", torch.ones(()))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return F.log_softmax(self.head(self.norm(self.decode(self.encode(x).relu()))) * self.scale, 1)


def grown(model, *sources, seed=0):
    params, buffers = model.init(key(seed))
    for s in sources:
        params, buffers = model.grow(params, buffers, s, key(seed, s.name))
    return params, buffers


def heads_on_mlp():
    return models.multi_head(models.mlp(6, (5,), 3), 10)


CASES = {
    "linear": (lambda: models.linear(6, 3), (4, 6)),
    "mlp": (lambda: models.mlp(6, (5, 4), 3), (4, 6)),
    "lenet": (lambda: models.lenet(3, 1, 12), (4, 1, 12, 12)),
    "conv": (lambda: models.conv(3, 2, 9, 4), (4, 2, 9, 9)),
    "resnet20": (lambda: models.resnet(20, 3, width=2), (4, 3, 4, 4)),
    "resnet18": (lambda: models.resnet(18, 3, 1, "batch", 2), (4, 1, 4, 4)),
    "random_features": (lambda: models.random_features(6, 8), (4, 6)),
    "tied": (lambda: models.wrap(Tied), (4, 6)),
    "given": (lambda: models.wrap(Tied()), (4, 6)),
    "frozen": (lambda: models.frozen(models.wrap(Tied), ["encode.*", "norm.*"]), (4, 6)),
    "multi_head": (heads_on_mlp, (4, 6)),
    "multi_head_tied": (lambda: models.multi_head(models.wrap(Tied), 10), (4, 6)),
    "multi_head_frozen": (
        lambda: models.multi_head(models.frozen(models.resnet(18, 3, 1, "batch", 2)), 10),
        (4, 1, 4, 4),
    ),
    "multi_head_random": (lambda: models.multi_head(models.random_features(6, 8), 10), (4, 6)),
    "multi_head_raw": (lambda: models.multi_head(models.linear(6, 3), 10), (4, 6)),
}


@pytest.fixture(params=CASES)
def case(request):
    make, shape = CASES[request.param]
    torch.manual_seed(0)
    model = make()
    sources = [source("a", (0, 1), "a"), source("b", (4, 2), "b")] if isinstance(model, MultiHead) else []
    params, buffers = grown(model, *sources)
    return model, params, buffers, torch.rand(shape), "b" if sources else None


def leaves(model, params):
    """Trainable entries as views of one flat vector, as the step has them, and the others as they are."""
    layout = Layout.of({n: p for n, p in params.items() if not model.frozen(n)})
    views = {n: v.detach().requires_grad_() for n, v in layout.split(layout.flatten(params)).items()}
    return {**params, **views}, [n for n in layout.names]


@pytest.mark.parametrize("train", [False, True])
def test_bind_equals_call(case, train):
    model, params, buffers, x, task = case
    before = {n: b.clone() for n, b in buffers.items()}
    given, names = leaves(model, params)
    forward, held = model.bind(given, buffers, train)
    out, new = model(given, buffers, x, task, train)
    bound = forward(x, task)
    assert torch.equal(out, bound)
    assert same(new, held)
    assert same(buffers, before)
    assert same(new, buffers) or (train and model.has_batch_norm)
    if names:
        y = torch.full((len(x),), 2)
        a, b = (
            torch.autograd.grad(F.cross_entropy(o, y), [given[n] for n in names], allow_unused=True)
            for o in (out, bound)
        )
        assert any(g is not None for g in a)
        for g, h in zip(a, b, strict=True):
            assert (g is None) == (h is None)
            assert g is None or (torch.equal(g, h) and g.isfinite().all())
    again, second = forward(x, task), model(given, new, x, task, train)[1]
    assert same(second, held)
    assert torch.isfinite(again).any()


def test_bound_tensors_are_the_given_ones():
    model = models.wrap(Tied)
    params, buffers = model.init(key(0))
    flat = Layout.of(params).flatten(params)
    views = Layout.of(params).split(flat)
    forward, _ = model.bind(views, buffers, False)
    x = torch.rand(4, 6)
    first = forward(x, None)
    flat.mul_(2)
    assert not torch.equal(first, forward(x, None))
    assert torch.equal(forward(x, None), model(views, buffers, x, None, False)[0])


def test_init_is_seeded_and_leaves_the_global_state(case):
    model, *_ = case
    state = torch.get_rng_state()
    a, b, c = (grown(model, source(), seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert same(a, b)
    inner = model.trunk if isinstance(model, MultiHead) else model
    drawn = [n for n in a if "heads." in n or inner.factory is not None]
    assert same(a, c) == (not drawn)


def test_check(case):
    model, _, _, x, _ = case
    labels = tuple(("s", str(i)) for i in range(3))
    model.check(LabelFrame(labels), x[:1], True)
    model.check(LabelFrame(labels), x[:2], True)
    with pytest.raises(ConsilienceError, match="output"):
        model.check(LabelFrame(labels * 5), x[:1], True)
    if len(x.shape) == 2:
        with pytest.raises(ConsilienceError, match="fit the model's input"):
            model.check(LabelFrame(labels), x[:1, :5], True)


def test_features_and_head(case):
    model, params, buffers, x, task = case
    psi = model.features(params, buffers, x, task)
    assert psi.shape == (4, model.width if isinstance(model, ModuleModel) else model.trunk.width)
    if getattr(model, "headless", False):
        assert torch.equal(psi, model(params, buffers, x, None, False)[0])
        with pytest.raises(ConsilienceError, match="linear head"):
            model.head(params, None)
        return
    weight, bias = model.head(params, task)
    out = model(params, buffers, x, task, False)[0]
    logits = F.linear(psi, params[weight], params[bias])
    if isinstance(model, MultiHead):
        out = out[:, buffers["heads.b.columns"]]
    if "norm.weight" in params:
        logits = logits.log_softmax(1)
    torch.testing.assert_close(out, logits, atol=1e-6, rtol=0)


def test_given_module_is_copied_with_its_weights():
    module = Tied().eval()
    model = models.wrap(module)
    was = module.encode.weight.detach().clone()
    with torch.no_grad():
        module.encode.weight.zero_()
    params, buffers = model.init(key(5))
    assert torch.equal(params["encode.weight"], was)
    assert "decode.weight" not in params
    x = torch.rand(8, 6)
    module.load_state_dict({**params, "decode.weight": params["encode.weight"], **buffers})
    assert torch.equal(model(params, buffers, x, None, False)[0], module(x))
    _, new = model(params, buffers, x, None, True)
    module.train()(x)
    assert all(torch.equal(new[n], b) for n, b in module.named_buffers())


def test_wrap_refuses():
    with pytest.raises(ConsilienceError, match="`outputs`"):
        models.wrap(nn.ReLU())
    with pytest.raises(ConsilienceError, match="head"):
        models.wrap(Tied, head="norm")
    with pytest.raises(ConsilienceError, match="torch module"):
        models.wrap(lambda: 3)
    with pytest.raises(ConsilienceError, match="torch module"):
        models.wrap("resnet")
    with pytest.raises(ConsilienceError, match="match an entry"):
        models.wrap(Tied, frozen=["body.*"])
    with pytest.raises(ConsilienceError, match="linear head"):
        models.multi_head(models.wrap(nn.ReLU(), outputs=3), 10)
    with pytest.raises(ConsilienceError, match=r"none called '1\.bias'"):
        models.linear(2, 2)({"1.weight": torch.ones(2, 2)}, {}, torch.ones(1, 2), None, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.mlp(0),
        lambda: models.mlp(3, (0,)),
        lambda: models.lenet(size=8),
        lambda: models.conv(size=3),
        lambda: models.resnet(34),
        lambda: models.resnet(norm="layer"),
        lambda: models.multi_head(models.linear(2, 2), 0),
    ],
)
def test_catalogue_refuses(make):
    with pytest.raises(ConsilienceError, match="must .*got"):
        make()


def test_frozen():
    model = models.frozen(models.wrap(Tied), ["norm.*"])
    assert not model.has_batch_norm
    assert models.wrap(Tied).has_batch_norm
    params, buffers = model.init(key(0))
    assert [n for n in params if model.frozen(n)] == ["norm.weight", "norm.bias"]
    assert same(model(params, buffers, torch.rand(4, 6), None, True)[1], buffers)
    assert models.frozen(model, "head.*").frozen("norm.bias")
    assert not model.frozen("head.bias")
    heads = models.frozen(models.multi_head(models.wrap(Tied), 10), ["trunk.norm.*", "heads.old.*"])
    assert [n for n in grown(heads, source("old"), source("new"))[0] if heads.frozen(n)] == [
        "trunk.norm.weight",
        "trunk.norm.bias",
        "heads.old.weight",
        "heads.old.bias",
    ]
    with pytest.raises(ConsilienceError, match="match an entry"):
        models.frozen(heads, ["norm.*"])
    a = models.random_features(6, 8)
    b = models.random_features(6, 8, seed=1)
    assert a.backbone(a.init(key(0))[0]) != b.backbone(b.init(key(0))[0])


def test_resnet_sizes():
    assert sum(p.numel() for p in models.resnet(20, norm="batch").init(key(0))[0].values()) == 272474
    params, _ = models.resnet(18, norm="batch", width=64).init(key(0))
    assert sum(p.numel() for p in params.values()) == 11173962


def test_vmap_equals_loop():
    model = models.mlp(6, (5,), 3)
    runs = [model.init(key(s))[0] for s in range(3)]
    x = torch.rand(3, 4, 6)
    stacked = {n: torch.stack([p[n] for p in runs]) for n in runs[0]}
    out = torch.func.vmap(lambda p, x: model(p, {}, x, None, True)[0])(stacked, x)
    each = torch.stack([model(p, {}, x[i], None, True)[0] for i, p in enumerate(runs)])
    torch.testing.assert_close(out, each, atol=1e-6, rtol=0)
    heads = heads_on_mlp()
    both = [grown(heads, source("a", (3, 1)), seed=s) for s in range(3)]
    stacked = {n: torch.stack([p[n] for p, _ in both]) for n in both[0][0]}
    buffers = both[0][1]
    for task in (None, "a"):
        out = torch.func.vmap(lambda p, x, t=task: heads(p, buffers, x, t, True)[0])(stacked, x)
        each = torch.stack([heads(p, buffers, x[i], task, True)[0] for i, (p, _) in enumerate(both)])
        torch.testing.assert_close(out, each, atol=1e-6, rtol=0)


# heads


def test_heads_are_independent():
    model = heads_on_mlp()
    one, kept = grown(model, source("a", (0, 1)))
    params, buffers = grown(model, source("a", (0, 1)), source("x/b-v1.5", (4, 2)))
    assert all(torch.equal(params[n], p) for n, p in one.items())
    assert model.grow(params, buffers, source("a", (1,)), key(9)) == (params, buffers)
    names = [n for n in params if model.task_of(n) is not None]
    assert names == ["heads.a.weight", "heads.a.bias", "heads.x/b-v1_5.weight", "heads.x/b-v1_5.bias"]
    assert model.task_of("heads.x/b-v1_5.bias") == model.head_key(source("x/b-v1.5"))
    assert model.task_of("heads.a.columns") == "a"
    assert model.task_of("trunk.1.bias") is None
    assert model.head(params, "x/b-v1.5") == ("heads.x/b-v1_5.weight", "heads.x/b-v1_5.bias")
    assert model.head(one, None) == ("heads.a.weight", "heads.a.bias")
    with pytest.raises(ConsilienceError, match="task label"):
        model.head(params, None)
    x = torch.rand(4, 6)
    everything = model(params, buffers, x, None, False)[0]
    assert torch.equal(everything[:, [0, 1]], model(one, kept, x, "a", False)[0][:, [0, 1]])
    assert everything.isinf().all(0).tolist() == [c not in (0, 1, 2, 4) for c in range(10)]
    b = model(params, buffers, x, "x/b-v1.5", False)[0]
    assert torch.equal(b[:, [2, 4]], everything[:, [2, 4]])
    assert b.isinf().all(0).sum() == 8


@pytest.mark.parametrize("task", ["a", None])
def test_columns_of_no_head_have_zero_gradient(task):
    model = heads_on_mlp()
    params, buffers = grown(model, source("a", (0, 1)), source("b", (4, 2)))
    given, names = leaves(model, params)
    forward, _ = model.bind(given, buffers, True)
    loss = F.cross_entropy(forward(torch.rand(4, 6), task), torch.tensor([0, 1, 0, 1]))
    grads = dict(
        zip(names, torch.autograd.grad(loss, [given[n] for n in names], allow_unused=True), strict=True)
    )
    assert all(g is None or g.isfinite().all() for g in grads.values())
    assert (grads["heads.b.weight"] is None) == (task == "a")
    assert grads["heads.a.weight"].abs().sum() > 0
    assert grads["trunk.1.weight"].abs().sum() > 0


def test_heads_that_do_not_exist_give_zeros():
    model = heads_on_mlp()
    params, buffers = model.init(key(0))
    x = torch.rand(4, 6)
    assert torch.equal(model(params, buffers, x, None, False)[0], torch.zeros(4, 10))
    params, buffers = grown(model, source("a"))
    assert torch.equal(model(params, buffers, x, "other", False)[0], torch.zeros(4, 10))
    assert torch.equal(model.bind(params, buffers, False)[0](x, "other"), torch.zeros(4, 10))


def test_heads_refuse():
    model = heads_on_mlp()
    params, buffers = grown(model, source("a", (0, 1)), source("b", (1, 2)))
    x = torch.rand(4, 6)
    for forward in (
        lambda t: model(params, buffers, x, t, False)[0],
        lambda t: model.bind(params, buffers, False)[0](x, t),
    ):
        with pytest.raises(ConsilienceError, match="task label, or a mapper"):
            forward(None)
        assert forward("b").isinf().all(0).sum() == 8
    with pytest.raises(ConsilienceError, match="classes"):
        model.grow(params, buffers, source("c", (0, 3), task="a"), key(0))
    with pytest.raises(ConsilienceError, match="outputs"):
        model.grow(params, buffers, source("c", (10,), labels=11), key(0))
    with pytest.raises(ConsilienceError, match="trunk"):
        models.multi_head(model, 10)


def test_trunk_has_the_seeds_of_its_model_and_no_head():
    model = models.mlp(6, (5,), 3)
    params, _ = models.multi_head(model, 10).init(key(3))
    assert same(
        {n.removeprefix("trunk."): p for n, p in params.items()},
        {n: p for n, p in model.init(key(3))[0].items() if n not in model.head({}, None)},
    )


def test_trunk_may_not_share_with_its_head():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 6)
            self.head.weight = self.body.weight

        def forward(self, x):
            return self.head(self.body(x))

    assert models.wrap(Shared).head({}, None) == ("body.weight", "head.bias")
    with pytest.raises(ConsilienceError, match="share"):
        models.multi_head(models.wrap(Shared), 10)


def test_float64_and_grow_in_the_trunks_type():
    model = heads_on_mlp()
    params, buffers = model.init(key(0))
    wide = {n: p.double() for n, p in params.items()}
    a, _ = model.grow(params, buffers, source(), key(1))
    b, buffers = model.grow(wide, buffers, source(), key(1))
    assert torch.equal(a["heads.a.weight"].double(), b["heads.a.weight"])
    assert model(b, buffers, torch.rand(4, 6).double(), "a", False)[0].dtype == torch.float64


def test_a_recurrent_module_binds():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model = models.wrap(Recurrent)
    params, buffers = model.init(key(0))
    x = torch.rand(2, 5, 3)
    given, names = leaves(model, params)
    out = model.bind(given, buffers, True)[0](x, None)
    assert torch.equal(out, model(given, buffers, x, None, True)[0])
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.square().sum(), [given[n] for n in names]))


def test_the_catalogue_imports_no_torch():
    code = "import sys, consilience.models; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# sources of one task with other classes


def parts_of_a_task():
    """Two tasks of digits; the first comes in two sources of two classes each."""
    a, b, c = cs.data.split_classes(cs.data.digits(), 5)[:3]
    return a.map(task="low"), b.map(task="low"), c.map(task="high")


@pytest.mark.parametrize("method", ["finetune", "joint", "ewc", "pnn"])
def test_a_head_has_the_classes_of_all_sources_of_its_task(method):
    """As if its first source had declared them all; later ones used to end a run half way."""
    a, b, c = parts_of_a_task()
    net = (
        models.progressive(64, (16, 12), 10)
        if method == "pnn"
        else models.multi_head(models.mlp(64, (16,)), 10)
    )
    declared = a.map(classes=(0, 1, 2, 3))
    found, wanted = (
        cs.run(cs.settings.continual([first, b, c], "task"), getattr(cs.methods, method)(), net)
        for first in (a, declared)
    )
    (columns,) = (t for n, t in found.agent.state.buffers.items() if n == "heads.low.columns")
    assert columns.tolist() == [0, 1, 2, 3] and len(found.params["heads.low.weight"]) == 4
    assert same(found.params, wanted.params)
    assert (found.matrix[-1] == wanted.matrix[-1]).all()


def test_clients_of_one_task_with_other_classes_average_one_head():
    a, b, _ = parts_of_a_task()
    schedule = cs.settings.federated([a, b], 12, scenario="task")
    result = cs.run(schedule, cs.methods.fedavg(), models.multi_head(models.mlp(64, (32,)), 10))
    assert len(result.params["heads.low.weight"]) == 4 and result.score > 0.9
