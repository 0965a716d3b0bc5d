"""Gradients per sample: Fisher, importances and directions of any model, against one backward per sample."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from consilience.core.contexts import Context, Learned
from consilience.core.correction import Correction
from consilience.core.params import Layout, key
from consilience.core.schedule import reframe
from consilience.core.source import Source, Tensors
from consilience.core.tree import Tree
from consilience.core.viewed import Viewed
from consilience.corrections import fisher as fishers
from consilience.corrections import gradients
from consilience.corrections.fisher import fisher, sensitivity
from consilience.corrections.gss import directions

N, T, D, C = 7, 5, 6, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 12, shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, seed: int = 9) -> Tensor:
    return torch.randint(0, C, shape, generator=torch.Generator().manual_seed(seed))


class ByToken(nn.Module):
    """Linear, layer norm and linear on every token, and the mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(D, 8), nn.LayerNorm(8), nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).tanh().mean(1))


class Words(nn.Module):
    """Embeddings, attention and a head that reads the first token; it asks whether any token is padding."""

    def __init__(self, asks: bool = False) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(12, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.asks = nn.Linear(8, C), asks

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        # As transformers do, whose masks are left out where nothing is padded.
        mask = None if self.asks and bool((x > 0).all()) else x == 0
        h = h + self.attend(h, h, h, key_padding_mask=mask, need_weights=False)[0]
        return self.head(h[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn, self.head = getattr(nn, kind)(D, 5, batch_first=True), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder transposed, under a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(D, 5), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.encode(x).tanh(), self.encode.weight.T).tanh())


class BiasTwice(Tied):
    """A layer whose bias is added once more after it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * (self.encode(x).tanh() + self.encode.bias).sum(1, keepdim=True))


class Tagger(nn.Module):
    """Outputs [B, C, T] for tokens [B, T]."""

    def __init__(self, outputs: int = C) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh()).transpose(1, 2)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, C)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([a, b], 1).tanh())


class Normed(nn.Module):
    """A layer under the old weight_norm or the parametrised one, and a norm without a rule of its own."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm, self.head = (
            norm(nn.Linear(D, 6)),
            nn.InstanceNorm1d(3, affine=True),
            nn.Linear(6, C),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x).view(-1, 3, 2)).flatten(1).tanh())


class Positions(nn.Module):
    """A transformer as transformers has them: positions for all samples at once, and a mask that is asked."""

    def __init__(self, positions: str = "row") -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(12, 8, padding_idx=0), nn.Embedding(T, 8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.head, self.positions = nn.LayerNorm(8), nn.Linear(8, C), positions

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        h = self.words(x) + self.places(places[None] if self.positions == "row" else places)
        q, k, v = (layer(h).view(*x.shape, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = None if bool((x > 0).all()) else (x > 0)[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.head(self.norm(h + self.out(mixed))[:, 0])


class TimeFirst(nn.Module):
    """A layer over [T, B, d]: its first dimension is not that of the samples, though it may be as long."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.transpose(0, 1)).tanh().mean(0))


class Odd(nn.Module):
    """Layers as users have them: a hook that changes the output, an input by name, an output nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.aside, self.head = nn.Linear(D, 5), nn.Linear(5, 2), nn.Linear(5, C)
        self.first.register_forward_hook(double_it)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(input=x).tanh()
        self.aside(h)
        return self.head(h)


def double_it(_: nn.Module, args: object, out: Tensor) -> Tensor:
    return 2 * out.square()


def padded(n: int) -> Tensor:
    """Tokens [n, T], padded with 0 to the right, some not at all."""
    return tokens(n, T) * (torch.arange(T) < 2 + torch.arange(n)[:, None] % 5)


def wave() -> nn.Module:
    """Convolutions over time with stride, dilation and padding, and a group norm without a bias in front."""
    return nn.Sequential(
        nn.Conv1d(D, 4, 3, stride=2, padding=2, dilation=2, bias=False),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv1d(4, 4, 2),
        nn.Flatten(),
        nn.Linear(16, C),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, C))


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, C, 1))


def parted() -> Tree:
    x = normal(N, D)
    return Tree({"a": x[:, :2], "b": x[:, 2:]})


def some_missing(y: Tensor, seed: int = 4) -> Tensor:
    gone = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    gone[0] = True
    return y.masked_fill(gone, torch.nan if y.is_floating_point() else -100)


MODELS: dict[str, tuple[Callable[[], nn.Module], object, Tensor, str]] = {
    "linear": (perceptron, normal(N, D), classes(N), "class"),
    "linear and layer norm on tokens": (ByToken, normal(N, T, D), classes(N), "class"),
    "attention": (Words, tokens(N, T), classes(N), "class"),
    "attention that asks": (lambda: Words(asks=True), tokens(N, T), classes(N), "class"),
    "lstm": (lambda: Recurrent("LSTM"), normal(N, T, D), classes(N), "class"),
    "gru": (lambda: Recurrent("GRU"), normal(N, T, D), classes(N), "class"),
    "rnn": (lambda: Recurrent("RNN"), normal(N, T, D), classes(N), "class"),
    "convolution": (convolution, normal(N, 1, 4, 4), classes(N), "class"),
    "tied": (Tied, normal(N, D), classes(N), "class"),
    "bias twice": (BiasTwice, normal(N, D), classes(N), "class"),
    "encoder": (Positions, padded(N), classes(N), "class"),
    "encoder of as many positions as samples": (lambda: Positions("line"), padded(T), classes(T), "class"),
    "time first": (TimeFirst, normal(N, N, D), classes(N), "class"),
    "convolution over time": (wave, normal(N, D, 9), classes(N), "class"),
    "old weight norm": (lambda: Normed(nn.utils.weight_norm), normal(N, D), classes(N), "class"),
    "weight norm": (
        lambda: Normed(nn.utils.parametrizations.weight_norm),
        normal(N, D),
        classes(N),
        "class",
    ),
    "hooks and names": (Odd, normal(N, D), classes(N), "class"),
    "tree": (Parts, parted(), classes(N), "class"),
    "missing": (perceptron, normal(N, D), some_missing(classes(N)), "class"),
    "tokens": (Tagger, tokens(N, T), classes(N, T), "class"),
    "some tokens": (Tagger, tokens(N, T), some_missing(classes(N, T)), "class"),
    "pixels": (segmenter, normal(N, 1, 4, 4), some_missing(classes(N, 4, 4)), "class"),
    "values": (perceptron, normal(N, D), normal(N, C, seed=3), "value"),
    "some values": (perceptron, normal(N, D), some_missing(normal(N, C, seed=3)), "value"),
    "fewer values": (perceptron, normal(N, D), normal(N, 2, seed=3), "value"),
    "values at pixels": (segmenter, normal(N, 1, 4, 4), some_missing(normal(N, C, 4, 4, seed=3)), "value"),
    "labels": (perceptron, normal(N, D), (normal(N, C, seed=3) > 0).double(), "labels"),
    "some labels": (perceptron, normal(N, D), some_missing((normal(N, C, seed=3) > 0).double()), "labels"),
    "labels of tokens": (Tagger, tokens(N, T), some_missing((normal(N, C, T) > 0).double()), "labels"),
}


def made(name: str) -> tuple[nn.Module, Source]:
    make, x, y, kind = MODELS[name]
    torch.manual_seed(1)
    net = make().double().eval()
    part = Tensors(x, y)
    width = y.shape[1] if kind != "class" else C
    labels = tuple(("s", str(i)) for i in range(width))
    return net, Source("s", part, part, part, labels, tuple(range(width)), kind=kind)


def learned(net: nn.Module, source: Source, seed: int = 0, loss: object = None) -> Learned:
    model = cs.models.wrap(net, outputs=C)
    framed, frame = reframe([replace(source, loss=loss)], "class")
    params, buffers = model.init(key(0))
    return Learned(
        model, params, buffers, {}, framed[0], None, Layout.of(params, torch.float64), key(seed), frame=frame
    )


def there(y: Tensor) -> Tensor:
    return ~torch.isnan(y) if y.is_floating_point() else y != -100


def log_likelihood(out: Tensor, y: Tensor, kind: str) -> Tensor:
    """Return log p(y | out) of one sample [C, *places], the sum over the targets that are there."""
    found = out.new_zeros(())
    for at in there(y).nonzero().tolist():
        if kind == "class":
            found = found + out[(slice(None), *at)].log_softmax(0)[y[tuple(at)]]
        elif kind == "labels":
            p = out[tuple(at)].sigmoid()
            found = found + (p if y[tuple(at)] == 1 else 1 - p).log()
        else:
            found = found - (out[tuple(at)] - y[tuple(at)]) ** 2 / 2
    return found


def one_by_one(
    net: nn.Module, source: Source, score: Callable[[Tensor, Tensor], Tensor], f: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the mean over samples with a target of f(d score / d theta), one backward pass each."""
    x, y = source.train.whole()
    counted = [i for i in range(len(y)) if bool(there(y[i]).any())]
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for i in counted:
        one = x[i : i + 1]
        out = net(**one.parts) if isinstance(one, Tree) else net(one)
        grads = torch.autograd.grad(score(out[0], y[i]), list(net.parameters()), allow_unused=True)
        for part, grad in zip(total.values(), grads, strict=True):
            part += 0 if grad is None else f(grad) / len(counted)
    return total


def near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    largest = max(float(w.abs().max()) for w in wanted.values())
    assert largest > 0
    for name, w in wanted.items():
        assert float((found[name] - w).abs().max()) <= tolerance * largest, name


def quietly(function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


@pytest.mark.parametrize("name", MODELS)
def test_the_fisher_and_importances_are_those_of_one_sample_after_another(name):
    net, source = made(name)
    wanted = one_by_one(net, source, lambda out, y: log_likelihood(out, y, source.kind), torch.square)
    near(quietly(lambda: fisher(learned(net, source), "data", chunk=3)), wanted)

    def square(out: Tensor, y: Tensor) -> Tensor:
        # Outputs beyond the source's own are nobody's answers.
        own, at = (out, there(y)) if source.kind == "class" else (out[: len(y)], there(y).any(0))
        return torch.where(at, own, 0).square().sum()

    wanted = one_by_one(net, source, square, torch.abs)
    near(quietly(lambda: sensitivity(learned(net, source), chunk=4)), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_directions_are_the_unit_gradients_of_the_losses_of_single_samples(name):
    net, source = made(name)
    here = learned(net, source)
    x, y = here.source.train.whole()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = directions(here, x, y)
    for i in range(len(y)):
        out = net(**x[i : i + 1].parts) if isinstance(x, Tree) else net(x[i : i + 1])
        loss = here.target.mean(out, y[i : i + 1])
        grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
        names = [name for name, _ in net.named_parameters()]
        by_name = dict(zip(names, grads, strict=True))
        joined = torch.cat([by_name[name].flatten() for name in here.layout.names])
        assert torch.allclose(found[i], joined / joined.norm().clamp_min(1e-12), atol=1e-9)


@pytest.mark.parametrize("name", ["labels", "some labels", "values", "some values"])
def test_all_labels_are_the_expectation_over_every_answer(name):
    net, source = made(name)
    x, y = source.train.whole()
    wanted = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    count = int(there(y).any(1).sum())
    for i in range(N):
        for j in range(C):
            if not bool(there(y[i])[j]):
                continue
            out = net(x[i : i + 1])[0, j]
            p = float(out.detach().sigmoid())
            variance = p * (1 - p) if source.kind == "labels" else 1.0
            for n, grad in zip(wanted, torch.autograd.grad(out, list(net.parameters())), strict=True):
                wanted[n] += variance * grad**2 / count
    near(fisher(learned(net, source), "all"), wanted)


@pytest.mark.parametrize("name", ["some labels", "some tokens", "some values", "labels of tokens"])
def test_drawn_labels_average_to_the_expectation(name):
    """At places there is no pass over every answer; there the expectation is that of single places."""
    net, source = made(name)
    x, y = source.train.whole()
    wanted = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    count = int(there(y).flatten(1).any(1).sum())
    for i in range(N):
        for at in there(y[i]).nonzero().tolist():
            out = net(x[i : i + 1])[0]
            if source.kind == "class":
                logs = out[(slice(None), *at)].log_softmax(0)
                answers = [(float(log.detach().exp()), log) for log in logs]
            elif source.kind == "labels":
                p = out[tuple(at)].sigmoid()
                chance = float(p.detach())
                answers = [(chance, p.log()), (1 - chance, (1 - p).log())]
            else:
                answers = [(1.0, out[tuple(at)])]
            for weight, log in answers:
                grads = torch.autograd.grad(log, list(net.parameters()), retain_graph=True, allow_unused=True)
                for n, grad in zip(wanted, grads, strict=True):
                    wanted[n] += 0 if grad is None else weight * grad**2 / count
    draws = [fisher(learned(net, source, seed), "model") for seed in range(150)]
    for n in wanted:
        stacked = torch.stack([draw[n] for draw in draws])
        error = stacked.std(0) / math.sqrt(len(draws))
        assert ((stacked.mean(0) - wanted[n]).abs() <= 5.5 * error + 1e-9).all(), n


def test_counts_have_the_fisher_of_poisson():
    net, source = made("values")
    source = source.map(y=lambda y: y.abs().round())
    here = learned(net, source, loss="poisson")
    x, _ = source.train.whole()
    wanted = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for i in range(N):
        for j in range(C):
            out = net(x[i : i + 1])[0, j]
            # The variance of a count is its rate.
            for n, grad in zip(wanted, torch.autograd.grad(out, list(net.parameters())), strict=True):
                wanted[n] += float(out.detach().exp()) * grad**2 / N
    near(fisher(here, "all"), wanted)


def test_samples_without_a_target_are_as_if_left_out():
    net, source = made("missing")
    x, y = source.train.whole()
    kept = replace(source, train=Tensors(x[y != -100], y[y != -100]))
    for labels in ("data", "all", "batches"):
        near(fisher(learned(net, source), labels), fisher(learned(net, kept), labels))
    near(sensitivity(learned(net, source)), sensitivity(learned(net, kept)))


@pytest.mark.parametrize(
    "name", ["encoder", "convolution over time", "hooks and names", "linear and layer norm on tokens"]
)
def test_layers_with_rules_take_one_pass_for_all_samples(name, monkeypatch):
    """A transformer whose mask is asked does not go sample by sample; large batches are cut."""
    net, source = made(name)
    wanted = fisher(learned(net, source), "data")
    monkeypatch.setattr(fishers, "_by_vmap", None)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        near(fisher(learned(net, source), "data"), wanted)
        patch.setattr(fishers, "NUMBERS", 300)
        near(fisher(learned(net, source), "data"), wanted)


@pytest.mark.parametrize(
    "name", ["tied", "bias twice", "time first", "old weight norm", "weight norm", "attention"]
)
def test_layers_whose_rules_do_not_hold_go_sample_by_sample(name, monkeypatch):
    net, source = made(name)
    here, called = learned(net, source), []
    by_vmap = fishers._by_vmap
    monkeypatch.setattr(fishers, "_by_vmap", lambda *args: called.append(1) or by_vmap(*args))
    quietly(lambda: fisher(here, "data"))
    assert called


def test_the_fisher_is_that_of_entries_and_not_of_the_weights_that_a_view_makes_of_them():
    """Superposition multiplies weights by a key of the task: gradients of entries have that factor."""
    net, source = made("linear")
    here = learned(net, source)
    half = {name: 0.5 for name in here.layout.names}
    seen = Viewed.of(here.model, [(Halved(), Context())])
    found = fisher(replace(here, model=seen), "data")
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    plain = one_by_one(net, source, lambda out, y: log_likelihood(out, y, source.kind), torch.square)
    near(found, {name: half[name] ** 2 * w for name, w in plain.items()})


class Halved(Correction):
    def view(self, params, task, ctx):
        return {name: p / 2 for name, p in params.items()}


def test_the_old_weight_norm_runs_and_leaves_no_graph_behind():
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(D, 5)), nn.Tanh(), nn.Linear(5, C))
    model, x = cs.models.wrap(net), normal(4, D).float()
    params, buffers = model.init(key(0))
    assert torch.equal(model(params, buffers, x, None, True)[0], net(x))
    assert torch.equal(model.bind(params, buffers, True)[0](x, None), net(x))
    copy.deepcopy(model)
    for name in ("ewc", "gss"):
        run_two(lambda: net, getattr(cs.methods, name)(), lambda seed: normal(24, D, seed=seed).float())
    head = cs.models.wrap(nn.Sequential(nn.Linear(D, 5), nn.utils.weight_norm(nn.Linear(5, C))))
    with pytest.raises(cs.ConsilienceError, match="the head must be a parameter, got '1'"):
        head.head({}, None)


def test_a_pass_per_sample_is_announced_once_per_model():
    net, source = made("gru")
    here = learned(net, source)
    with pytest.warns(
        UserWarning, match="take one pass for each sample of Recurrent, because vmap cannot run"
    ):
        fisher(here, "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher(here, "data")
        sensitivity(here)


def test_a_fault_of_the_model_is_its_own_error():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.scale = nn.Linear(D, C), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                raise ValueError("one is too few")
            return self.scale * self.head(x.flatten(1).tanh())

    net = Broken().double()
    _, source = made("linear")
    with pytest.raises(ValueError, match="one is too few"):
        fisher(learned(net, source.map(x=lambda x: x[:, :, None])), "data")
    assert not gradients._ALONE & {learned(net, source).model}


@pytest.mark.parametrize("method", [cs.methods.ewc(labels="all"), cs.methods.online_ewc(labels="all")])
def test_all_labels_at_places_are_refused_before_work(method):
    sources = [places_source(name) for name in "ab"]
    with pytest.raises(cs.Refusal, match="a pass for every output at every place; use labels='model'"):
        cs.run(cs.settings.continual(sources, "domain"), method, Tagger())


def places_source(name: str) -> Source:
    y = some_missing(classes(40, T, seed=len(name)))
    return cs.data.arrays(tokens(40, T, seed=ord(name)), y, name=name, space="tags", classes=list("abcd"))


# The cases of users.


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("name", ["ewc", "online_ewc", "mas", "batches", "fisher_merging", "gss", "talos"])
def test_methods_run_on_recurrent_networks(kind, name):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = getattr(nn, kind)(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.view(-1, 3, 4))[0][:, -1])

    m = cs.methods
    method = {
        "ewc": m.ewc(),
        "online_ewc": m.online_ewc(),
        "mas": m.mas(),
        "batches": m.ewc(labels="batches"),
        "fisher_merging": m.fisher_merging(),
        "gss": m.gss(size=10),
        "talos": m.talos(0.5),
    }[name]
    run_two(Net, method, lambda seed: normal(24, 12, seed=seed).float())


class Encoder(nn.Module):
    """A transformer's encoder whose mask is left out where nothing is padded, as in `transformers`."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = Words(asks=True), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).tanh())


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = transformers.BertModel(config, add_pooling_layer=False)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            mask = (x != 0).long()
            return self.head(self.body(input_ids=x, attention_mask=mask).last_hidden_state[:, 0])

    return Net()


def test_a_model_of_transformers_agrees_in_one_pass(monkeypatch):
    """With a padding mask that it asks about, and positions that it looks up once for all samples."""
    torch.manual_seed(1)
    net, (_, source) = bert().double().eval(), made("encoder")
    source = replace(
        source, train=Tensors(padded(N), torch.arange(N) % 2), labels=source.labels[:2], classes=(0, 1)
    )
    here = replace(learned(net, source), model=cs.models.wrap(net, outputs=2))
    monkeypatch.setattr(fishers, "_by_vmap", None)
    wanted = one_by_one(net, source, lambda out, y: log_likelihood(out, y, "class"), torch.square)
    near(fisher(here, "data"), wanted, 1e-10)
    near(sensitivity(here), one_by_one(net, source, lambda out, y: out.square().sum(), torch.abs), 1e-10)


@pytest.mark.parametrize("make", [Encoder, bert], ids=["asks", "bert"])
@pytest.mark.parametrize("name", ["ewc", "mas", "online_ewc", "fisher_merging", "talos", "gss", "si"])
def test_methods_run_on_models_that_ask_for_numbers(make, name):
    method = cs.methods.gss(size=10) if name == "gss" else getattr(cs.methods, name)()
    run_two(make, method, lambda seed: tokens(24, T, seed=seed))


def run_two(make: Callable[[], nn.Module], method: cs.Method, x: Callable[[int], Tensor]) -> None:
    """Run a method on two sources, one after another or merged."""
    sources = [cs.data.arrays(x(i), torch.arange(24) % 2, name=n, space="s") for i, n in enumerate("ab")]
    merged = method.name in ("fisher_merging", "talos")
    schedule = (
        cs.settings.merging(sources, scenario="domain")
        if merged
        else cs.settings.continual(sources, "domain")
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = cs.run(schedule, method, make(), cs.Training(epochs=1))
    assert all(bool(torch.isfinite(p).all()) for p in result.params.values())
