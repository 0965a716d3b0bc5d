"""What a model does in a forward pass that its structure does not show, against torch and against
twins that do the same in the plain way."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience.core.errors import ConsilienceError
from consilience.core.params import key, same
from consilience.data.samplers import Shuffle
from restate import BATCH, C, D, batches, sgd, source, stopped, training

TWO = [source("one", 30, (0, 1), 1, dtype=torch.float32), source("two", 27, (2, 3), 2, dtype=torch.float32)]


class Net(nn.Module):
    """A perceptron; subclasses change its inputs or its hidden units."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 8), nn.Linear(8, C)

    def inputs(self, x):
        return x

    def hidden(self, h):
        return h

    def forward(self, x):
        return self.b(torch.relu(self.hidden(self.a(self.inputs(x)))))


def made(kind, seed=0):
    torch.manual_seed(seed)
    return kind()


def go(net, method=None, sources=TWO, training=None, **more):
    training = training or cs.Training(1, batch_size=BATCH)
    return cs.run(cs.settings.continual(sources), method or cs.methods.finetune(), net, training, **more)


def federated(clients, kind, engine, notes):
    """The state after two rounds; the notes of the log go to a list."""
    result = cs.run(
        cs.settings.federated(clients, 2),
        cs.methods.fedavg(),
        made(kind),
        training(),
        engine=engine,
        progress=lambda line: notes.append(line.get("note") or ""),
    )
    return result.agent.state


# Inputs stay as they are.


class InPlace(Net):
    def inputs(self, x):
        x -= 0.5
        return x


class OutOfPlace(Net):
    def inputs(self, x):
        return x - 0.5


class InTrainingOnly(Net):
    """What a probe in eval mode does not show."""

    def inputs(self, x):
        return x.mul_(0.5) if self.training else x


class NotInTraining(Net):
    def inputs(self, x):
        return x * 0.5 if self.training else x


@pytest.mark.parametrize("kinds", [(InPlace, OutOfPlace), (InTrainingOnly, NotInTraining)])
@pytest.mark.parametrize("name", ["er", "der", "gem", "icarl"])
def test_a_model_that_changes_its_inputs_learns_what_its_twin_learns(kinds, name):
    kept = [s.test.whole()[0].clone() for s in TWO]
    method = getattr(cs.methods, name)(12)
    a, b = (go(made(kind), method) for kind in kinds)
    assert same(a.params, b.params) and np.array_equal(a.matrix, b.matrix)
    assert all(torch.equal(s.test.whole()[0], x) for s, x in zip(TWO, kept, strict=True))
    mine = np.ones((3, D), dtype="float32")
    assert torch.equal(a.predict(mine), b.predict(np.ones((3, D), dtype="float32"))) and (mine == 1).all()


def test_a_part_of_several_stays_as_it_is_and_engines_agree():
    class Parts(Net):
        def forward(self, left, right):
            right.mul_(2.0)
            return super().forward(left + right)

    class Plain(Net):
        def forward(self, left, right):
            return super().forward(left + 2.0 * right)

    x = torch.randn(41, D)
    sources = [
        cs.data.arrays(
            {"left": x[i::2], "right": x[i::2].flip(0)},
            torch.arange(41)[i::2] % C,
            name=f"s{i}",
            space="toy",
        )
        for i in range(2)
    ]
    ends = []
    for kind, engine in ((Parts, "serial"), (Plain, "serial"), (Parts, "batched")):
        t = cs.Training(1, batch_size=BATCH, precision="fp64")
        ends.append(
            cs.run(
                cs.settings.federated(sources, 1), cs.methods.fedavg(), made(kind), t, engine=engine
            ).params
        )
    assert same(ends[0], ends[1])
    assert all(torch.allclose(ends[0][n], ends[2][n], atol=1e-12, rtol=0) for n in ends[0])


def test_a_model_of_ones_own_must_leave_its_inputs():
    class Own(type(cs.models.mlp(D, (5,), C))):
        def __call__(self, params, buffers, x, task, train):
            return super().__call__(params, buffers, x.add_(1), task, train)

    with pytest.raises(ConsilienceError, match="must leave its inputs as they are, and Own changes them"):
        go(Own(lambda: nn.Linear(D, C)))


# Random numbers are keyed by the step.


class Dropped(Net):
    def hidden(self, h):
        return F.dropout(h, 0.3, self.training)


class Path(Net):
    def hidden(self, h):
        return h * torch.empty(len(h), 1).bernoulli_(0.7) / 0.7 if self.training else h


class Noise(Net):
    def hidden(self, h):
        return h + 0.1 * torch.randn_like(h) if self.training else h


class Leaky(Net):
    def hidden(self, h):
        return F.rrelu(h, training=self.training)


class OfPython(Net):
    def hidden(self, h):
        return h * (1 + random.random()) if self.training else h


class OfNumpy(Net):
    def hidden(self, h):
        return h * float(np.random.rand()) if self.training else h


class Sequence(Net):
    """Layers of torch that drop units by an argument."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, 2, dropout=0.4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=True)

    def hidden(self, h):
        h = self.lstm(h.view(-1, 2, 4))[0]
        return self.attention(h, h, h)[0].flatten(1)


DRAWING = [Dropped, Path, Noise, Leaky, OfPython, OfNumpy, Sequence]


@pytest.mark.parametrize("kind", DRAWING)
def test_any_randomness_is_keyed_by_the_step(kind):
    """A plain loop that seeds all global states before each step ends at the same parameters."""
    s = source("one", 30, dtype=torch.float64)
    random.seed(3)
    before = random.getstate()
    result = cs.run(cs.settings.continual([s]), cs.methods.finetune(), made(kind), training(), seed=0)

    assert random.getstate() == before
    net = made(kind).double()
    optimiser = sgd(net)
    for epoch, step, x, y in batches(s):
        seed = key(0, "one", 0, epoch, step, "forward").initial_seed()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    for name, p in net.named_parameters():
        assert torch.allclose(result.params[name].double(), p, atol=1e-12), name
    assert result.agent.model.draws


@pytest.mark.parametrize("kind", [Dropped, OfNumpy, Sequence])
def test_a_resumed_run_with_any_randomness_ends_in_the_same_bits(kind, tmp_path):
    def run(**more):
        t = cs.Training(2, batch_size=BATCH)
        return go(made(kind), cs.methods.er(12), training=t, **more)

    whole = run()
    stopped(run, tmp_path, 3)
    torch.manual_seed(7)
    np.random.seed(7)
    assert same(whole.params, run(out=tmp_path, resume=True).params)


@pytest.mark.parametrize("kind", [Dropped, Sequence])
def test_the_batched_engine_runs_what_draws_one_after_another(kind):
    clients = [source(f"c{i}", 20, seed=i) for i in range(3)]
    notes, ends = [], []
    for engine in ("serial", "batched"):
        ends.append(federated(clients, kind, engine, notes).params)
    assert same(*ends)
    assert "one after another: the model draws random numbers in its forward" in notes


def test_heads_on_a_trunk_that_draws():
    model = cs.models.multi_head(cs.models.wrap(lambda: Dropped()), C)
    schedule = cs.settings.continual(TWO, "task")
    a, b = (cs.run(schedule, cs.methods.finetune(), model, cs.Training(1)).params for _ in range(2))
    assert model.draws and same(a, b)


def test_what_no_seed_repeats_is_said():
    class Counts(Net):
        calls = 0

        def hidden(self, h):
            self.calls += 1
            return h * self.calls

    class Own(Counts):
        def hidden(self, h):
            self.calls += 1
            return h + torch.randn(h.shape, generator=torch.Generator().manual_seed(self.calls))

    for kind in (Counts, Own):
        with pytest.warns(
            UserWarning, match="differ between two calls with equal inputs, buffers and random"
        ):
            go(made(kind))

    class Always(Net):
        def hidden(self, h):
            return F.dropout(h, 0.5)

    with pytest.warns(UserWarning, match="draws random numbers in eval mode too"):
        go(made(Always))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(made(Dropped))


# Samples that see each other.


class OfBatch(Net):
    def hidden(self, h):
        return F.batch_norm(h, None, None, training=True)


class OwnNorm(Net):
    def hidden(self, h):
        return (h - h.mean(0)) / (h.std(0) + 1e-3) if self.training else h


class Attending(Net):
    """Attention between the samples of a batch."""

    def hidden(self, h):
        return torch.softmax(h @ h.T, 1) @ h if self.training else h


@pytest.mark.parametrize("kind", [Net, OfBatch, OwnNorm, Attending])
def test_batches_are_not_filled_up_where_samples_see_each_other(kind):
    clients = [source(f"c{i}", n, seed=i) for i, n in enumerate((20, 16, 11))]
    notes, ends = [], []
    for engine in ("serial", "batched"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ends.append(federated(clients, kind, engine, notes).params)
    assert all(torch.allclose(ends[0][n], ends[1][n], atol=1e-12, rtol=0) for n in ends[0])
    alone = any("outputs depend on the other samples of a batch" in note for note in notes)
    assert alone == (kind is not Net)


def test_predictions_that_depend_on_their_batch_are_said():
    with pytest.warns(UserWarning, match="predictions depend on the other samples of their batch"):
        go(made(OfBatch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(made(OwnNorm))


def test_a_probe_needs_one_sample_and_leaves_constant_inputs():
    blank = cs.data.arrays(torch.zeros(9, D), torch.arange(9) % C)
    model = cs.models.wrap(made(OwnNorm))
    assert not model.has_batch_norm
    model.check(cs.settings.continual([blank]).frame, torch.zeros(1, D), False)
    assert model.has_batch_norm and not model.draws
    # Another model of the same module knows nothing yet: its frozen parts run in another mode.
    assert not model.freeze(["a.*"]).has_batch_norm


# Buffers.


class Assigned(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))

    def moved(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)

    def inputs(self, x):
        if self.training:
            self.moved(x)
        return x - self.mean


class Updated(Assigned):
    def moved(self, x):
        self.mean.copy_(0.9 * self.mean + 0.1 * x.mean(0))


class Learnt(Net):
    """A buffer with a graph, in a part: it must not hold the graph of the step before."""

    def __init__(self):
        super().__init__()
        self.part = nn.Module()
        self.part.register_buffer("mean", torch.zeros(8))

    def hidden(self, h):
        if self.training:
            self.part.mean = 0.9 * self.part.mean.detach() + 0.1 * h.mean(0)
        return h - self.part.mean


class LearntInPlace(Learnt):
    def hidden(self, h):
        if not self.training:
            return h - self.part.mean
        mean = 0.9 * self.part.mean.clone() + 0.1 * h.mean(0)
        self.part.mean.copy_(mean.detach())
        return h - mean


@pytest.mark.parametrize("kinds", [(Assigned, Updated), (Learnt, LearntInPlace)])
@pytest.mark.parametrize("engine", ["serial", "batched"])
def test_assigned_buffers_are_kept_as_updated_ones(kinds, engine):
    clients = [source(f"c{i}", 16, seed=i) for i in range(3)]
    ends = [federated(clients, kind, engine, []) for kind in kinds]
    (name,) = ends[0].buffers
    for one, other in ((ends[0].params, ends[1].params), (ends[0].buffers, ends[1].buffers)):
        assert all(torch.allclose(one[n], other[n], atol=1e-12, rtol=0) for n in other)
    assert ends[0].buffers[name].abs().sum() > 0


def test_a_buffer_that_grows_is_refused():
    class Growing(Assigned):
        def moved(self, x):
            self.mean = torch.cat([self.mean, self.mean])[: D + 1]

        def inputs(self, x):
            self.moved(x) if self.training else None
            return x

    with pytest.raises(ConsilienceError, match=r"must keep its shape .* 'mean' goes from \(6,\)"):
        go(made(Growing))


# Batches of one sample.


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def hidden(self, h):
        return self.norm(h)


@pytest.mark.parametrize("kind", [Normed, OwnNorm])
@pytest.mark.parametrize("n", [BATCH * 3 + 1, BATCH * 3 + 2])
def test_a_last_batch_of_one_is_joined_to_the_one_before(kind, n):
    """A plain loop over the same plan, whose last two batches are one, ends at the same parameters."""
    s, lines = source("one", n, dtype=torch.float64), []
    result = cs.run(
        cs.settings.continual([s]), cs.methods.finetune(), made(kind), training(), progress=lines.append
    )

    net = made(kind).double()
    optimiser = sgd(net)
    for epoch in range(2):
        plan = [(x, y) for e, _, x, y in batches(s) if e == epoch]
        if n % BATCH == 1:
            *plan, (x, y), (x1, y1) = plan
            plan.append((torch.cat([x, x1]), torch.cat([y, y1])))
        for x, y in plan:
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimiser.step()
    for name, p in net.named_parameters():
        assert torch.allclose(result.params[name].double(), p, atol=1e-12), name

    said = [line["sources"] for line in lines if line["event"] == "batches"]
    assert said == ([["one"]] if n % BATCH == 1 else [])
    assert result.costs["steps"] == 2 * (3 if n % BATCH == 1 else 4)


def test_where_a_last_batch_of_one_stays_or_goes():
    s = source("one", BATCH * 2 + 1, dtype=torch.float64)
    for kind, sampler, steps in ((Net, None, 3), (Normed, Shuffle(drop_last=True), 2)):
        lines = []
        result = go(made(kind), None, [s], training(sampler=sampler), progress=lines.append)
        assert result.costs["steps"] == 2 * steps
        assert not any(line["event"] == "batches" for line in lines)


def test_clients_with_a_last_batch_of_one_run_in_all_engines_and_a_single_sample_is_refused():
    clients = [source(f"c{i}", n, seed=i) for i, n in enumerate((17, 16))]
    ends = [federated(clients, Normed, engine, []).params for engine in ("serial", "batched")]
    assert same(*ends)
    lonely = [*clients, source("lonely", 1)]
    with pytest.raises(ConsilienceError, match="two samples per step, and 'lonely' has one training example"):
        federated(lonely, Normed, "serial", [])
    with pytest.raises(ConsilienceError, match="two samples per step, and `batch_size` is 1"):
        go(made(Normed), training=cs.Training(1, batch_size=1))

    # A client that fails may be left out, as the setting says.
    schedule = cs.settings.federated(lonely, 1, min_clients=2)
    with pytest.warns(UserWarning, match="'client-2' failed and is left out"):
        cs.run(schedule, cs.methods.fedavg(), made(Normed), training())


# Parameters that pass through a layer, and modules that no run can take.


class Query(Net):
    """Learnt queries pass through a layer of their own."""

    def __init__(self):
        super().__init__()
        self.query, self.norm = nn.Parameter(torch.randn(1, 8)), nn.LayerNorm(8)

    def hidden(self, h):
        return h * self.norm(self.query)


def parametrised(function):
    class Parametrised(Net):
        def __init__(self):
            super().__init__()
            self.a = function(self.a)

    return Parametrised


PARAMETRISED = ["weight_norm", "spectral_norm", "orthogonal"]


@pytest.mark.parametrize("kind", ["query", *PARAMETRISED])
def test_parameters_that_pass_through_a_layer_are_trained_as_torch_trains_them(kind):
    make = Query if kind == "query" else parametrised(getattr(nn.utils.parametrizations, kind))
    s = source("one", 30, dtype=torch.float64)
    result = go(made(make), None, [s], training())
    net = made(make).double()
    optimiser = sgd(net)
    for _, _, x, y in batches(s):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    state = result.agent.state
    for name, tensor in net.state_dict().items():
        own = state.params.get(name, state.buffers.get(name))
        assert torch.allclose(own.double(), tensor, atol=1e-10), name


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Linear(D, C)
        self.w = nn.Parameter(torch.randn(D, C, dtype=torch.complex64))

    def forward(self, x):
        return self.b(x) + (x.to(torch.complex64) @ self.w).abs()


REFUSED = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(C)), "must have all its parameters, got lazy ones"),
    "lazy norm": (lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(D, C)), "got lazy ones"),
    "parallel": (lambda: nn.DataParallel(nn.Linear(D, C)), "a plain module, got DataParallel; give its"),
    "scripted": (
        lambda: torch.jit.script(nn.Linear(D, C)),
        "a plain module, got RecursiveScriptModule; give",
    ),
    "part": (lambda: nn.Sequential(torch.jit.script(nn.Linear(D, 8)), nn.Linear(8, C)), "a plain module"),
    "complex": (Complex, "must be real numbers, got torch.complex64 in 'w'"),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_modules_that_no_run_can_take_are_refused_with_what_to_do(case, given):
    make, words = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConsilienceError, match=words):
            go(make() if given else make)


# Heads that nobody named.


class ClassifierFirst(Net):
    """Defined in another order than it is called."""

    def __init__(self, hidden=C):
        super().__init__()
        self.b, self.a = nn.Linear(hidden, C), nn.Linear(D, hidden)
        self.add_module("a", self._modules.pop("a"))


class Tied(nn.Module):
    """A transformer whose last linear layer is one inside, and whose scores come from an embedding."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.embed, self.body = (
            nn.Embedding(9, 4),
            nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        )

    def forward(self, x):
        return F.linear(self.body(self.embed(x)).mean(1), self.embed.weight)[:, :C]


class HeadFirst(Tied):
    """A classifier that is defined before its transformer."""

    def __init__(self):
        super().__init__()
        body = self._modules.pop("body")
        self.head, self.body = nn.Linear(4, C), body

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1)).log_softmax(1)


TOKENS = cs.data.arrays(torch.arange(120).reshape(40, 3) % 9, torch.arange(40) % C)


@pytest.mark.parametrize(
    ("kind", "source", "head"), [(ClassifierFirst, TWO[0], "b"), (HeadFirst, TOKENS, "head")]
)
def test_the_head_is_the_last_layer_that_is_called(kind, source, head):
    x, schedule = source.train.whole()[0][:5], cs.settings.continual([source])
    net, seen = made(kind).eval(), []
    net.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(x)

    def wrapped():
        return cs.models.wrap(made(kind))

    tried, asked = wrapped(), wrapped()
    result = cs.run(schedule, cs.methods.icarl(12), tried, cs.Training(1))
    named = cs.run(schedule, cs.methods.icarl(12), cs.models.wrap(made(kind), head=head), cs.Training(1))
    assert same(result.params, named.params) and np.array_equal(result.matrix, named.matrix)
    for model in (tried, asked):
        assert torch.allclose(model.features(*model.init(key(0)), x), seen[0])
        assert model.head_layer == head and model.outputs == C and model.width == seen[0].shape[1]

    # A body without a layer inside of it is another module.
    for heads in (cs.models.multi_head(wrapped(), C), cs.models.beneficial_biases(wrapped(), C)):
        with pytest.raises(ConsilienceError, match=rf"the module ends in '{head}'; .*head='{head}'\)"):
            cs.run(schedule, cs.methods.finetune(), heads, cs.Training(1))
    cs.run(schedule, cs.methods.finetune(), cs.models.multi_head(tried, C), cs.Training(1))


def test_more_classes_than_a_layer_inside_has_outputs():
    class Narrow(ClassifierFirst):
        def __init__(self):
            super().__init__(2)

    assert go(made(Narrow)).agent.model.outputs == C


def test_a_linear_layer_inside_is_no_head():
    schedule, model = cs.settings.continual([TOKENS]), cs.models.wrap(made(Tied), outputs=C)
    with pytest.raises(ConsilienceError, match="the module ends in 'body.layers.0.norm2'; name the layer"):
        cs.run(schedule, cs.methods.finetune(), cs.models.multi_head(model, C), cs.Training(1))
    trunk = cs.models.frozen(cs.models.multi_head(model, C))
    with pytest.raises(ConsilienceError, match="the module ends in 'body.layers.0.norm2'; name the layer"):
        cs.data.embed([TOKENS], trunk)

    # It trains, and has no features.
    cs.run(schedule, cs.methods.finetune(), model, cs.Training(1))
    with pytest.raises(ConsilienceError, match="features need a linear head or a headless module"):
        model.features(*model.init(key(0)), TOKENS.train.whole()[0])


def test_token_ids_are_no_features():
    heads = cs.models.multi_head(cs.models.linear(3, C), C)
    with pytest.raises(
        ConsilienceError, match="must return fractions, got torch.int64; token ids need an emb"
    ):
        cs.run(cs.settings.continual([TOKENS], "task"), cs.methods.finetune(), heads, cs.Training(1))


# What predictions are asked of.


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
def test_predict_converts_bytes_as_training_did_and_takes_batches_only(shape):
    x = (torch.rand(40, *shape, generator=torch.Generator().manual_seed(0)) * 255).byte()
    result = go(None, None, [cs.data.arrays(x, torch.arange(40) % C)])
    want = result.predict(x[:4].float() / 255)
    for given in (x[:4], x[:4].numpy(), (x[:4].double() / 255).numpy()):
        assert torch.allclose(result.predict(given), want, atol=1e-6)
    for one in (x[0], x[0].float() / 255):
        with pytest.raises(ConsilienceError, match=r"must be a batch of samples .* use x\[None\]"):
            result.predict(one)
    assert torch.allclose(result.predict(x[0][None]), want[:1], atol=1e-6)
    with pytest.raises(ConsilienceError, match="the inputs are whole numbers: give pixels in"):
        result.predict(x[:4].long())


def test_predict_names_another_width_and_bytes_that_are_no_pixels():
    ids = torch.arange(120).reshape(40, 3) % 9
    make = lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, C))  # noqa: E731
    result = go(made(make), None, [cs.data.arrays(ids.byte(), torch.arange(40) % C)])
    assert torch.equal(result.predict(ids[:5].byte()), result.predict(ids[:5]))
    with pytest.raises(ConsilienceError, match=r"samples must fit the model's input, got \(2,\)"):
        result.predict(ids[:5, :2])
    with pytest.raises(ConsilienceError, match="the inputs are fractions: give"):
        result.predict(ids[:5].float())
    with pytest.raises(ConsilienceError, match=r"got one sample \[3\]; use x\[None\]"):
        result.predict(ids[0])
