"""Targets: losses against torch, places, missing targets, and tasks of different kinds in one schedule."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from consilience.core.batch import Batch
from consilience.core.correction import Correction
from consilience.core.losses import BCE, DEFAULTS, L1, MSE, CrossEntropy, Focal, Huber, Loss, Poisson, loss_of
from consilience.core.params import key
from consilience.core.schedule import reframe
from consilience.core.source import LabelFrame, Source, Target, Tensors, masked
from consilience.core.tree import Tree
from consilience.corrections.distillation import soft_labels, soft_targets

m = cs.methods
FP64 = cs.Training(epochs=2, batch_size=8, lr=0.1, precision="fp64")


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=drawn(seed), dtype=torch.float64)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=drawn(seed))


def some(y: Tensor, seed: int = 5) -> Tensor:
    gone = torch.rand(y.shape, generator=drawn(seed)) < 0.4
    return y.masked_fill(gone, torch.nan if y.is_floating_point() else -100)


def mean(p: Tensor, y: Tensor) -> float:
    """A metric for any kind of target: it only refuses predictions that are no numbers."""
    assert bool(torch.isfinite(p).all())
    return float(p.double().mean())


def run(schedule: Any, method: cs.Method, model: Any, training: cs.Training = FP64, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cs.run(schedule, method, model, training, metric=mean, **more)


def near(found: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).detach().abs().max()) <= tolerance, name


# Losses are those of torch.

NAMES = ("a", "b", "c", "d")
SHAPES = [(9,), (9, 5), (9, 3, 4)]


def fitted(loss: Loss) -> Loss:
    return loss.fitted(NAMES, len(NAMES), range(len(NAMES)))


@pytest.mark.parametrize("shape", SHAPES, ids=["samples", "tokens", "pixels"])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("weights", [None, {"a": 0.5, "d": 3.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(shape, missing, weights, smoothing):
    out, y = normal(9, 4, *shape[1:]), integers(4, *shape, seed=1)
    y = some(y) if missing else y
    loss = fitted(CrossEntropy(weights, smoothing if weights is None else 0.0))
    given = None if weights is None else torch.tensor([0.5, 1.0, 1.0, 3.0], dtype=torch.float64)
    wanted = F.cross_entropy(
        out, y, given, ignore_index=-100, label_smoothing=smoothing if weights is None else 0.0
    )
    for complete in (False, not missing):
        found = Target("class", loss, complete=complete).mean(out, y)
        assert torch.allclose(found, wanted, rtol=1e-6 if weights else 1e-12)


def test_the_loss_of_tokens_is_the_mean_over_all_tokens_of_a_batch():
    """Not the mean over samples of their means: a sample with few tokens counts for few."""
    out, y = normal(2, 3, 6), integers(3, 2, 6)
    y[0, 1:] = -100
    flat = F.cross_entropy(out.movedim(1, -1).reshape(-1, 3), y.flatten(), ignore_index=-100)
    assert torch.allclose(Target("class", CrossEntropy(), complete=False).mean(out, y), flat)
    each = F.cross_entropy(out, y, reduction="none", ignore_index=-100)
    assert not torch.allclose((each.sum(1) / (y != -100).sum(1)).mean(), flat)

    # The samples of a batch are weighted as its tokens are.
    w = torch.tensor([2.0, 0.5], dtype=torch.float64)
    weighted = (each * w[:, None]).sum() / ((y != -100) * w[:, None]).sum()
    assert torch.allclose(Target("class", CrossEntropy(), complete=False).mean(out, y, w), weighted)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_focal_by_hand(gamma, shape):
    out, y = normal(9, 4, *shape[1:]), some(integers(4, *shape, seed=1))
    p = out.softmax(1)
    total, count = 0.0, 0
    for at in (y != -100).nonzero().tolist():
        own = p[(at[0], int(y[tuple(at)]), *at[1:])]
        total, count = total - (1 - own) ** gamma * own.log(), count + 1
    assert torch.allclose(Target("class", Focal(gamma=gamma), complete=False).mean(out, y), total / count)


@pytest.mark.parametrize("shape", [(9, 4), (9, 4, 5), (9, 4, 3, 2)])
@pytest.mark.parametrize("missing", [False, True])
def test_losses_of_labels_and_values_are_torchs(shape, missing):
    out, values = normal(*shape), normal(*shape, seed=1)
    labels = (values > 0).double()
    factors = torch.tensor([0.5, 1.0, 1.0, 3.0]).double().view(-1, *[1] * (len(shape) - 2))
    wanted = {
        BCE(): lambda o, y, f: F.binary_cross_entropy_with_logits(o, y),
        fitted(BCE({"a": 0.5, "d": 3.0})): lambda o, y, f: F.binary_cross_entropy_with_logits(
            o, y, pos_weight=f
        ),
        MSE(): lambda o, y, f: F.mse_loss(o, y),
        L1(): lambda o, y, f: F.l1_loss(o, y),
        Huber(0.7): lambda o, y, f: F.huber_loss(o, y, delta=0.7),
        Poisson(): lambda o, y, f: F.poisson_nll_loss(o, y),
    }
    for loss, torchs in wanted.items():
        y = labels if "labels" in loss.kinds else values
        y = some(y) if missing else y
        there = ~torch.isnan(y)
        target = Target(loss.kinds[0], loss, complete=not missing)
        chosen = (out[there], y[there], factors.expand(shape)[there])
        assert torch.allclose(target.mean(out, y), torchs(*chosen)), loss


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (CrossEntropy(), torch.full((3, 5), -100)),
        (fitted(CrossEntropy({"a": 2.0})), torch.full((3,), -100)),
        (Focal(), torch.full((3, 5), -100)),
        (BCE(), torch.full((3, 4), torch.nan).double()),
        (MSE(), torch.full((3, 4, 5), torch.nan).double()),
        (Poisson(), torch.full((3, 4), torch.nan).double()),
    ],
)
def test_a_batch_without_any_target_has_loss_and_gradient_0(loss, y):
    out = normal(3, 4, *(y.shape[1:] if loss.kinds == ("class",) else y.shape[2:])).requires_grad_()
    value = Target(loss.kinds[0], loss, complete=False).mean(out, y)
    assert float(value.detach()) == 0 and not bool(torch.autograd.grad(value, out)[0].any())


@pytest.mark.parametrize("kind", ["class", "value", "labels"])
@pytest.mark.parametrize("places", [(), (4,)])
def test_a_sample_without_a_target_is_as_if_it_were_not_there(kind, places):
    """The gradient of a batch is that of the samples that have targets, to the last digits."""
    torch.manual_seed(0)
    net = nn.Linear(6, 3).double()
    x = normal(8, *places, 6)
    y = {
        "class": integers(3, 8, *places),
        "value": normal(8, 3, *places, seed=1),
        "labels": (normal(8, 3, *places, seed=1) > 0).double(),
    }[kind]
    y[::3] = torch.nan if y.is_floating_point() else -100
    there = torch.tensor([i % 3 != 0 for i in range(8)])
    target = Target(kind, {"class": CrossEntropy(), "value": MSE(), "labels": BCE()}[kind], complete=False)

    def gradients(x: Tensor, y: Tensor) -> list[Tensor]:
        loss = target.mean(net(x).movedim(-1, 1), y)
        return list(torch.autograd.grad(loss, list(net.parameters())))

    for found, wanted in zip(gradients(x, y), gradients(x[there], y[there]), strict=True):
        assert torch.allclose(found, wanted, atol=1e-15)


@pytest.mark.parametrize(
    "loss", [CrossEntropy(), CrossEntropy(smoothing=0.2), Focal(), fitted(CrossEntropy({"c": 3.0}))]
)
@pytest.mark.parametrize("shape", SHAPES, ids=["samples", "tokens", "pixels"])
def test_columns_of_other_tasks_change_neither_loss_nor_gradient(loss, shape):
    """With columns a and c masked out, losses are those of b and d alone, with missing targets too."""
    out, y = normal(9, 4, *shape[1:]).requires_grad_(), some(integers(2, *shape, seed=1))
    shown = masked(out, (1, 3))
    found = Target("class", loss, complete=False).mean(shown, torch.where(y == 0, 1, y.where(y != 1, 3)))
    small = replace(loss, weights=None) if loss.weights is None else replace(loss, weights=(1.0, 1.0))
    wanted = Target("class", small, complete=False).mean(out[:, [1, 3]], y)

    assert torch.allclose(found, wanted, rtol=1e-12)
    gradient, alone = torch.autograd.grad(found, out)[0], torch.autograd.grad(wanted, out)[0]
    assert torch.allclose(gradient, alone, atol=1e-15)


def test_a_sample_without_targets_under_weights_in_float64_counts_for_nothing():
    """The smallest float64 is no float32: a count of 0 must not divide 0 by 0."""
    loss, out = fitted(CrossEntropy({"c": 3.0})), normal(2, 4, 5).requires_grad_()
    y = integers(4, 2, 5, seed=1)
    y[0] = -100
    wanted = F.cross_entropy(out[1:], y[1:], torch.tensor([1.0, 1, 3, 1], dtype=torch.float64))
    assert torch.allclose(Target("class", loss, complete=False).mean(out, y), wanted, rtol=1e-12)


# Distillation is a mean over places.


def test_distillation_is_the_mean_over_places():
    s, t = normal(4, 3, 6), normal(4, 3, 6, seed=1)
    rows = soft_targets(s.movedim(1, -1).reshape(-1, 3), t.movedim(1, -1).reshape(-1, 3), 2.0)
    assert torch.allclose(soft_targets(s, t, 2.0), rows)
    assert torch.allclose(soft_targets(s[..., None], t[..., None], 2.0), rows), "of pixels too"

    # Places without a target do not count.
    y = some(integers(3, 4, 6))
    part = cs.core.batch.Batch(s, y)
    there = (y != -100).flatten()
    own = [v.movedim(1, -1).reshape(-1, 3)[there] for v in (s, t)]
    assert torch.allclose(soft_targets(s, t, 2.0, part), soft_targets(*own, 2.0))


def test_labels_are_distilled_as_questions_of_their_own():
    s, t = normal(4, 3), normal(4, 3, seed=1)
    p, q = (t / 2).sigmoid(), (s / 2).sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    part = cs.core.batch.Batch(s, torch.zeros(4, 3))
    assert torch.allclose(soft_labels(s, t, 2.0, part), 4 * kl.mean())
    assert float(soft_labels(s, s, 2.0, part)) == pytest.approx(0, abs=1e-15)


# What a user of token targets tried first.


class Last(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.transpose(1, 2)


WORDS, WINDOW = 20, 6


def next_tokens(name: str, count: int) -> Source:
    x = integers(WORDS, count, WINDOW + 1, seed=count)
    part = Tensors(x[:, :-1].contiguous(), x[:, 1:].contiguous())
    labels = tuple(("c", str(i)) for i in range(WORDS))
    return Source(name, part, part, part, labels, tuple(range(WORDS)))


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, WORDS), Last())


def test_token_targets_train_alike_alone_in_a_federation_and_stacked():
    parts = [next_tokens("a", 40), next_tokens("b", 23)]
    found = {}
    for engine in ("serial", "batched"):
        notes: list[str] = []
        result = run(
            cs.settings.federated(parts, rounds=2),
            m.fedavg(),
            language_model(),
            engine=engine,
            progress=lambda line, notes=notes: notes.append(line.get("note", "")),
        )
        found[engine] = result.params
    assert any("batched: 2 agents a step" in note for note in notes)
    near(found["batched"], found["serial"])

    # One epoch of one client, by hand.
    one = replace(FP64, epochs=1, batch_size=40)
    found = run(cs.settings.continual(parts[:1]), m.finetune(), language_model(), one).params
    net = language_model().double()
    x, y = parts[0].train.whole()
    loss = F.cross_entropy(net(x).movedim(1, -1).reshape(-1, WORDS), y.flatten())
    grads = torch.autograd.grad(loss, list(net.parameters()))
    near(found, {n: p - 0.1 * g for (n, p), g in zip(net.named_parameters(), grads, strict=True)})


def test_no_target_stays_no_target_in_every_frame():
    sources = [
        replace(next_tokens(name, 8), labels=tuple((name, str(i)) for i in range(WORDS))) for name in "ab"
    ]
    for source in sources:
        source.train.y[:, 0] = -100
    for scenario in ("class", "task", "domain"):
        framed, frame = reframe(sources, scenario)
        assert all(source.train.targets()[:, 0].eq(-100).all() for source in framed)
        shift = 0 if scenario == "domain" else WORDS
        later = framed[1].train.targets()[:, 1:]
        assert torch.equal(later, sources[1].train.y[:, 1:] + shift)
        assert not any(target.complete for target in frame.targets.values())


def test_lwf_on_tokens_is_the_loss_plus_the_mean_divergence_of_tokens():
    parts = [next_tokens("a", 16), next_tokens("b", 16)]
    one = replace(FP64, epochs=1, batch_size=16)
    found = run(cs.settings.continual(parts, "domain"), m.lwf(0.7, 2.0), language_model(), one).params
    net = language_model().double()
    for number, part in enumerate(parts):
        x, y = part.train.whole()
        old = copy.deepcopy(net)
        # Two steps from one teacher would differ, so every visit has one step.
        s, t = net(x), old(x).detach()
        loss = F.cross_entropy(s, y)
        if number:
            p = (t / 2).softmax(1)
            loss = loss + 0.7 * 4 * (p * (p.log() - (s / 2).log_softmax(1))).sum(1).mean()
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p -= 0.1 * g
    near(found, dict(net.named_parameters()))


def test_der_on_tokens_is_the_mean_square_of_tokens():
    parts = [next_tokens("a", 12), next_tokens("b", 12)]
    parts[0].train.y[:, 2:] = -100
    one = replace(FP64, epochs=1, batch_size=12)
    schedule = cs.settings.continual(parts, "domain")
    found = run(schedule, m.der(size=12, batch_size=12, alpha=0.5), language_model(), one).params
    net = language_model().double()

    def step(loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p -= 0.1 * g

    x, y = parts[0].train.whole()
    step(F.cross_entropy(net(x), y))
    stored = net(x).detach()
    index = torch.randint(12, (12,), generator=key(0, "b", 0, 0, 0, "DER"))
    new_x, new_y = parts[1].train.whole()
    # The buffer keeps the examples in their order, and only the first two tokens have targets.
    gap = (net(x)[index] - stored[index])[:, :, :2]
    step(F.cross_entropy(net(new_x), new_y) + 0.5 * gap.square().mean())
    near(found, dict(net.named_parameters()))


def test_feddf_on_tokens_is_the_mean_divergence_of_tokens():
    """One step from the average of two models, on unlabelled sentences of unequal length."""
    sources = [padded_tags(name, seed) for seed, name in enumerate("ab")]
    shared = padded_tags("c", 7).train.whole()[0]
    training = replace(FP64, epochs=1)
    schedule = cs.settings.merging(sources, scenario="domain")
    method = m.feddf(shared, steps=1, lr=0.5, batch_size=99, optimiser="sgd")
    found = run(schedule, method, tagger(), training).params

    average = run(schedule, m.average(), tagger(), training).params
    teachers = []
    for source in sources:
        alone = run(cs.settings.continual([source], "domain"), m.finetune(), tagger(), training).params
        teachers.append(functional(alone, shared))
    p = (sum(teachers) / 2).softmax(1).movedim(1, -1)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in average.items()}
    log = functional(leaves, shared).log_softmax(1).movedim(1, -1)
    there = shared.parts["mask"] == 1
    loss = -(p * log).sum(-1)[there].mean()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    near(found, {n: average[n] - 0.5 * g for n, g in zip(leaves, grads, strict=True)}, 1e-10)


def test_regmean_reads_no_padding():
    """The second moments of a layer on tokens are those of the tokens that are there."""
    source = padded_tags("a", 3)
    result = run(cs.settings.merging([source, padded_tags("b", 4)], scenario="domain"), m.regmean(), tagger())
    state = result.agent.state
    items = {name: message.items["InputMoments"] for (_, name), message in state.bank.items()}
    counted = items["a"].tensors["second/head.weight"][0]
    alone = run(cs.settings.continual([source], "domain"), m.finetune(), tagger()).params
    x = source.train.whole()[0]
    h = F.embedding(x.parts["ids"], alone["embed.weight"]).tanh()[x.parts["mask"] == 1]
    assert torch.allclose(counted, h.T @ h)


class Tags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh()).transpose(1, 2)


def tagger() -> nn.Module:
    torch.manual_seed(0)
    return Tags()


def functional(params: Any, x: Tree) -> Tensor:
    return torch.func.functional_call(Tags().double(), dict(params), (), dict(x.parts))


def padded_tags(name: str, seed: int) -> Source:
    lengths = integers(6, 20, seed=seed) + 1
    there = torch.arange(6) < lengths[:, None]
    x = Tree({"ids": integers(9, 20, 6, seed=seed), "mask": there.long()}, {"ids": 0.0, "mask": 0.0}, lengths)
    y = integers(3, 20, 6, seed=seed + 1).masked_fill(~there, -100)
    part = Tensors(x, y)
    return Source(name, part, part, part, tuple(("tag", str(i)) for i in range(3)), (0, 1, 2))


# Tasks of different kinds in one schedule.


class Apart(nn.Module):
    """A net for each kind of column, so that no task has a part in what another one trains."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, k)) for k in (3, 2, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) for net in self.nets], 1)


def apart() -> Any:
    torch.manual_seed(3)
    return cs.models.wrap(Apart().double(), outputs=7)


def made(name: str, kind: str, y: Tensor, names: Sequence[str]) -> Source:
    x = normal(len(y), 5, seed=sum(map(ord, name))).float()
    options: dict[str, Any] = {"kind": kind, "name": name, "classes": names, "test": 0.2, "validation": 0.0}
    return cs.data.arrays(x, y if kind == "class" else y.float(), **options)


def mixed() -> list[Source]:
    """Classes, two values of which some are missing, and two labels, as one table would have."""
    return [
        made("digit", "class", integers(3, 40), list("xyz")),
        made("sugar", "value", some(normal(40, 2, seed=2)), ["low", "high"]),
        made("signs", "labels", (normal(40, 2, seed=4) > 0).double(), ["cough", "fever"]),
    ]


TASKS = {"digit": ("0", "class"), "sugar": ("1", "value"), "signs": ("2", "labels")}


def nets(params: Any, number: str) -> dict[str, Tensor]:
    return {name: p for name, p in params.items() if name.startswith(f"nets.{number}.")}


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_every_task_of_a_mixed_schedule_is_trained_as_if_alone(scenario):
    sources = mixed()
    # Each of three tasks has a third of the loss.
    faster = replace(FP64, lr=3 * FP64.lr)
    together = run(cs.settings.multitask(sources, scenario), m.finetune(), apart(), faster).params
    stream = run(cs.settings.continual(sources, scenario), m.finetune(), apart()).params

    torch.manual_seed(3)
    one = Apart().double()
    for source in sources:
        number, _ = TASKS[source.name]
        alone = run(
            cs.settings.continual([source]), m.finetune(), cs.models.wrap(one.nets[int(number)])
        ).params
        wanted = {f"nets.{number}.{name}": p for name, p in alone.items()}
        near(nets(together, number), wanted)
        near(nets(stream, number), wanted)


@pytest.mark.parametrize(("target", "task"), [("digit", None), ("", "digit"), ("", None), ("digits", None)])
def test_a_batch_of_a_correction_says_which_targets_it_has(target, task):
    """Tasks differ, and no task is taken for another that happens to come first."""
    x, y = mixed()[0].train.whole()

    class Again(Correction):
        def sample(self, ctx, sources, generator):
            return [Batch(x[:4].double(), y[:4], task, target=target)]

    method = cs.Method("again", (Again(),))
    schedule = cs.settings.continual(mixed())
    if (target, task) in (("", None), ("digits", None)):
        with pytest.raises(
            cs.ConsilienceError, match=f"`target` which of .* digit, .* got '{target}' from 'Again'"
        ):
            run(schedule, method, apart())
        return

    # The net of the classes goes on learning; the others' losses do not see the batch.
    found = run(schedule, method, apart()).params
    without = run(schedule, m.finetune(), apart()).params
    assert any(not torch.equal(p, without[name]) for name, p in nets(found, "0").items())


def test_losses_are_chosen_by_task_and_by_kind():
    sources = mixed()
    sources[1] = replace(sources[1], loss="huber")
    chosen = {"digit": CrossEntropy({"x": 2.0}), "labels": BCE({"fever": 4.0}), "value": "l1"}
    training = replace(FP64, loss=chosen, lr=0.3)
    found = run(cs.settings.multitask(sources), m.finetune(), apart(), training).params
    torch.manual_seed(3)
    one = Apart().double()
    own = {"digit": CrossEntropy({"x": 2.0}), "sugar": "huber", "signs": BCE({"fever": 4.0})}
    for source in sources:
        number, _ = TASKS[source.name]
        alone = replace(source, loss=own[source.name])
        result = run(
            cs.settings.continual([alone]), m.finetune(), cs.models.wrap(one.nets[int(number)])
        ).params
        near(nets(found, number), {f"nets.{number}.{name}": p for name, p in result.items()})


def test_every_column_is_answered_by_its_kind():
    sources = mixed()
    result = run(cs.settings.continual(sources), m.finetune(), apart())
    x = sources[0].test.whole()[0]
    net = Apart().double()
    net.load_state_dict({name: p for name, p in result.params.items()})
    out, p = net(x.double()), result.predict(x)
    wanted = torch.cat([out[:, :3].softmax(1), out[:, 3:5], out[:, 5:].sigmoid()], 1)
    assert torch.allclose(p, wanted, atol=1e-12)

    labelled = run(cs.settings.continual(sources, "task"), m.finetune(), apart())
    p = labelled.predict(x, task="sugar")
    assert p[:, :3].abs().sum() == 0 and p[:, 5:].abs().sum() == 0 and bool(p[:, 3:5].any())


def test_a_large_value_is_no_class():
    """Accuracy compares the columns of classes alone, however large the value next to them is."""
    sources = mixed()
    torch.manual_seed(0)
    net = Apart().double()
    with torch.no_grad():
        net.nets[1][2].bias.fill_(50.0)
    net.nets[1].requires_grad_(False)
    result = cs.run(
        cs.settings.continual(sources), cs.methods.finetune(), cs.models.wrap(net, outputs=7), FP64
    )
    x, y = sources[0].test.whole()
    p = result.predict(x)
    assert bool((p.argmax(1) >= 3).all())
    assert result.matrix[-1, 0] == float((p[:, :3].argmax(1) == y).double().mean()) > 0


def test_heads_that_are_not_there_yet_answer_nothing():
    """A schedule that begins with values has no head for classes: uniform, and no NaN."""
    classes, values, labels = mixed()
    model = cs.models.multi_head(cs.models.mlp(5, (8,)), 7)
    result = run(cs.settings.continual([values, classes, labels]), m.finetune(), model)
    assert result.matrix.shape == (4, 3)


@pytest.mark.parametrize("setting", ["merging", "continual"])
def test_experts_of_several_kinds_are_averaged_by_column(setting):
    """The mean of one expert for each kind is that expert: a value is not a third of it."""
    sources = mixed()
    schedule = getattr(cs.settings, setting)(sources)
    result = run(schedule, m.average_ensemble(), apart())
    x = sources[0].test.whole()[0]
    p = result.predict(x)
    wanted = torch.zeros(len(x), 7, dtype=torch.float64)
    for (_, name), module in result.agent.state.experts.items():
        net = Apart().double()
        net.load_state_dict(module.group("entries"))
        out = net(x.double())
        columns = {"digit": slice(0, 3), "sugar": slice(3, 5), "signs": slice(5, 7)}[name]
        own = out[:, columns]
        answers = {"digit": own.softmax(1), "sugar": own, "signs": own.sigmoid()}
        wanted[:, columns] = answers[name]
    assert torch.allclose(p, wanted, atol=1e-12)


def test_aggregators_of_rows_see_one_row_for_each_kind():
    sources = mixed()
    one = replace(FP64, epochs=1, batch_size=100)
    plain = run(cs.settings.multitask(sources), m.finetune(), apart(), one).params
    # Rows of tasks with nothing in common do not conflict.
    near(run(cs.settings.multitask(sources), m.pcgrad(), apart(), one).params, plain)

    # The shortest convex combination of orthogonal gradients weighs each by 1 / |g|^2.
    start = apart().init(key(0, "init"))[0]
    found = run(cs.settings.multitask(sources), m.aggregate(cs.aggregators.mgda()), apart(), one).params
    gradients = {
        number: torch.cat([(start[n] - plain[n]).flatten() for n in nets(start, number)]) * 3 / one.lr
        for number in "012"
    }
    inverse = {number: 1 / float(g.square().sum()) for number, g in gradients.items()}
    for number, g in gradients.items():
        moved = torch.cat([(start[n] - found[n]).flatten() for n in nets(start, number)])
        wanted = one.lr * g * inverse[number] / sum(inverse.values())
        assert torch.allclose(moved, wanted, atol=1e-4 * float(g.norm())), number


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_rehearsal_penalties_and_distillation_compose_over_kinds(scenario):
    sources = mixed()
    schedule = cs.settings.continual(sources, scenario)
    plain = run(schedule, m.finetune(), apart()).params
    replayed = run(schedule, m.er(30, 8), apart()).params
    first = nets(plain, "0")
    # Only rehearsal trains the net of an earlier task again.
    assert any(not torch.equal(p, replayed[name]) for name, p in first.items())
    for method in (m.lwf(), m.ewc(1.0), m.mas(0.1), m.lwf() + m.ewc(1.0)):
        near(nets(run(schedule, method, apart()).params, "0"), first)
    composed = run(schedule, m.er(30, 8) + m.lwf() + m.ewc(1.0), apart()).params
    assert all(bool(torch.isfinite(p).all()) for p in composed.values())


def test_the_fisher_of_a_task_is_zero_in_the_nets_of_others():
    sources = mixed()
    result = run(cs.settings.continual(sources), m.ewc(1.0), apart())
    for (_, name), message in result.agent.state.bank.items():
        precision = message.items["EWC"].group("precision")
        for number in "012":
            own = sum(float(p.sum()) for p in nets(precision, number).values())
            assert (own > 0) == (TASKS[name][0] == number), (name, number)


@pytest.mark.parametrize("engine", ["serial", "batched"])
@pytest.mark.parametrize("setting", ["federated", "merging"])
def test_mixed_clients_train_their_own_nets(engine, setting):
    """Two clients for each kind of target: they share a program where they are alike."""
    sources = mixed()
    pairs = [part for source in sources for part in cs.data.iid(source, 2)]
    more = {"rounds": 2} if setting == "federated" else {}
    found = run(getattr(cs.settings, setting)(pairs, **more), m.fedavg(), apart(), engine=engine).params
    alone = run(getattr(cs.settings, setting)(pairs, **more), m.fedavg(), apart()).params
    near(found, alone)
    assert all(not torch.equal(found[n], p) for n, p in apart().init(key(0, "init"))[0].items())


# Inputs of different shapes.


class AnySize(nn.Module):
    """A convolution, the mean over the map, and a linear head: it takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def images(name: str, side: int, first: int) -> Source:
    x, y = normal(24, 1, side, side, seed=side).float(), integers(2, 24, seed=side) + first
    part = Tensors(x, y)
    return Source(name, part, part, part, tuple(("i", str(i)) for i in range(4)), (first, first + 1))


def sizes() -> list[Source]:
    return [images("small", 8, 0), images("large", 12, 2), images("again", 8, 2)]


def any_size() -> nn.Module:
    torch.manual_seed(0)
    return AnySize()


def test_a_step_over_images_of_two_sizes_is_the_mean_of_both():
    sources, one = sizes()[:2], replace(FP64, epochs=1, batch_size=24)
    found = run(cs.settings.multitask(sources), m.finetune(), any_size(), one).params
    net = any_size().double()
    losses = []
    for source in sources:
        x, y = source.train.whole()
        losses.append(F.cross_entropy(net(x.double()), y))
    grads = torch.autograd.grad(sum(losses) / 2, list(net.parameters()))
    near(found, {n: p - 0.1 * g for (n, p), g in zip(net.named_parameters(), grads, strict=True)})


@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize(
    "method",
    [
        m.er(20, 8),
        m.er_ace(20, 8),
        m.der(20, 8),
        m.derpp(20, 8),
        m.gem(8),
        m.agem(20, 8),
        m.lwf(),
        m.ewc(1.0),
        m.icarl(20),
        m.gdumb(20),
        m.cumulative(),
        m.joint(),
        m.er(20, 8, policy=cs.memory.class_balanced()) + m.pcgrad(),
    ],
    ids=lambda method: method.name,
)
def test_methods_over_images_of_two_sizes(method, scenario):
    result = run(cs.settings.continual(sizes(), scenario), method, any_size())
    assert all(bool(torch.isfinite(p).all()) for p in result.params.values())


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (m.gss(size=10), "its buffer compares inputs of one shape, and here they differ; use er"),
        (
            m.generative_replay(),
            "all inputs of a generator must have one shape, and here they differ; use er",
        ),
    ],
)
def test_methods_that_need_one_shape_refuse_before_work(method, says):
    with pytest.raises(cs.Refusal, match=says):
        run(cs.settings.continual(sizes()), method, any_size())


def test_a_pool_keeps_images_of_two_sizes_apart():
    """Joint training in one step on all: a part for each size, each with half of the loss."""
    sources, one = sizes(), replace(FP64, epochs=1, batch_size=48)
    sources = [sources[0], sources[2], sources[1]]
    found = run(cs.settings.continual(sources), m.cumulative(), any_size(), one).params
    net = any_size().double()
    seen: list[Source] = []
    for source in sources:
        seen.append(source)
        groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for other in seen:
            x, y = other.train.whole()
            groups.setdefault(x.shape[-1], []).append((x.double(), y))
        losses = [
            F.cross_entropy(net(torch.cat([x for x, _ in own])), torch.cat([y for _, y in own]))
            for own in groups.values()
        ]
        grads = torch.autograd.grad(sum(losses) / len(losses), list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p -= 0.1 * g
    near(found, dict(net.named_parameters()))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask.unsqueeze(-1).to(self.embed.weight)
        return self.head((self.embed(ids) * weight).sum(1) / weight.sum(1).clamp_min(1))


def sentences(name: str, longest: int, first: int) -> Source:
    lengths = integers(longest, 24, seed=longest) + 1
    there = torch.arange(longest) < lengths[:, None]
    ids = (integers(11, 24, longest, seed=longest) + 1) * there
    x = Tree({"ids": ids, "mask": there.long()}, {"ids": 0.0, "mask": 0.0}, lengths)
    part = Tensors(x, integers(2, 24, seed=longest) + first)
    return Source(name, part, part, part, tuple(("w", str(i)) for i in range(4)), (first, first + 1))


@pytest.mark.parametrize(
    "method",
    [m.er(20, 8), m.derpp(20, 8), m.gss(size=10), m.gem(8), m.lwf(), m.mas(), m.icarl(20), m.joint()],
    ids=lambda method: method.name,
)
def test_methods_over_sequences_whose_longest_differ(method):
    """A model with a mask does not see padding, so that the longest of other tasks changes nothing."""
    sources = [sentences("short", 4, 0), sentences("long", 9, 2)]
    padded = [
        source.map(x=lambda x: Tree({n: F.pad(p, (0, 3)) for n, p in x.parts.items()}, x.ragged, x.lengths))
        for source in sources
    ]
    found = []
    for own in (sources, padded):
        torch.manual_seed(0)
        found.append(run(cs.settings.continual(own), method, Bag()).params)
    near(found[0], found[1], 1e-10)


# Splits of data with other targets.


def test_splits_work_on_any_targets_or_refuse_by_name():
    tags = cs.data.arrays(integers(9, 40, 5), some(integers(3, 40, 5)), name="tags")
    values = cs.data.arrays(normal(40, 3), normal(40, 2), kind="value", name="values")
    labels = cs.data.arrays(normal(40, 3), (normal(40, 2) > 0).double(), kind="labels", name="labels")
    tree = cs.data.arrays({"a": normal(40, 3), "b": normal(40, 2)}, integers(3, 40), name="tree")
    d = cs.data
    for source in (tags, values, labels, tree):
        count = len(source.train)
        users = [i % 3 for i in range(count + len(source.validation))]
        for parts in (
            d.iid(source, 3),
            d.quantity_skew(source, 3),
            d.natural(source, users),
            d.new_instances(source, users),
        ):
            assert sum(len(part.train) for part in parts) == count
            assert all(part.train.targets().shape[1:] == source.train.targets().shape[1:] for part in parts)
        pair = [replace(part, task=None) for part in d.iid(source, 2)]
        mixed_up = d.blurry(pair, 0.3)
        assert [len(part.train) for part in mixed_up] == [len(part.train) for part in pair]
        assert all(label >= 0 for part in mixed_up for label in part.classes)

    for split in (
        lambda s: d.split_classes(s, 2),
        lambda s: d.dirichlet(s, 2, 1.0),
        lambda s: d.shards(s, 2),
        lambda s: d.label_sets(s, 2, 2),
        lambda s: d.new_instances_and_classes(s, [0] * (len(s.train) + len(s.validation))),
    ):
        for source, says in (
            (tags, "needs one class per sample, got 'tags', which has a target for each place"),
            (values, "needs a source of classes, got 'values', which has values"),
            (labels, "needs a source of classes, got 'labels', which has labels"),
        ):
            with pytest.raises(cs.ConsilienceError, match=says):
                split(source)
        assert split(tree)
    for change in (lambda s: d.permute(s, 2), lambda s: d.rotate(s, 2)):
        with pytest.raises(cs.ConsilienceError, match="needs inputs that are one tensor, got the parts a, b"):
            change(tree)
    scene = cs.data.arrays(normal(20, 1, 6, 6), integers(2, 20, 6, 6), name="scene")
    with pytest.raises(cs.ConsilienceError, match="rotate changes the inputs alone, got 'scene'"):
        d.rotate(scene, 2)


def test_examples_without_a_class_are_dealt_to_clients_too():
    y = integers(3, 90)
    y[::4] = -100
    source = cs.data.arrays(normal(90, 3), y, name="some")
    for parts in (cs.data.dirichlet(source, 4, 1.0), cs.data.label_sets(source, 3, 2)):
        assert sum(len(part.train) for part in parts) == len(source.train)
        missing = [int((part.train.targets() == -100).sum()) for part in parts]
        assert max(missing) - min(missing) <= 1


@pytest.mark.parametrize("policy", ["ring", "herding", "class_balanced", "growing"])
def test_buffers_by_class_keep_no_example_without_one(policy):
    y = integers(2, 60)
    y[::3] = -100
    sources = [cs.data.arrays(normal(60, 5, seed=i), y, name=n, space=n) for i, n in enumerate("ab")]
    method = m.er(6 if policy != "growing" else 3, 4, policy=getattr(cs.memory, policy)())
    result = run(cs.settings.continual(sources), method, cs.models.mlp(5, (8,), 4))
    kept = torch.cat([item.tensors["y"] for item in result.agent.state.memory["ER"].values()])
    assert bool((kept >= 0).all()) and len(kept) > 0


def test_a_balanced_sampler_counts_classes_and_refuses_other_targets():
    targets = torch.tensor([0] * 8 + [1] * 2 + [-100] * 5)
    plan = torch.cat(cs.data.samplers.Balanced().plan(targets, 4, 0, drawn(0)))
    assert sorted(set(targets[plan].tolist())) == [0, 1]
    training = cs.Training(epochs=1, sampler=cs.data.samplers.Balanced())
    with pytest.raises(cs.Refusal, match="Balanced needs one target per sample, and here .*; use Shuffle"):
        run(cs.settings.continual([next_tokens("a", 9)]), m.finetune(), language_model(), training)


def test_a_run_resumes_with_the_losses_that_it_began_with(tmp_path):
    def cubed(out, y):
        return (out - y).abs() ** 3

    class Stop(Exception): ...

    def stop(line):
        if line["event"] == "checkpoint" and line["steps"] > 0:
            raise Stop

    tasks = mixed()
    run = lambda loss, **more: cs.run(  # noqa: E731
        cs.settings.multitask(tasks, "task"),
        cs.methods.finetune(),
        training=cs.Training(epochs=2, loss={"value": loss, "class": "focal"}),
        out=tmp_path / "run",
        **more,
    )
    with pytest.raises(Stop):
        run(cubed, checkpoint_steps=1, progress=stop)
    # Of a function the name counts: its address is another in every process.
    for other in ("l1", lambda out, y: (out - y).abs()):
        with pytest.raises(cs.ConsilienceError, match="a run resumes with the configuration it began with"):
            run(other, resume=True)
    assert run(cubed, resume=True).matrices.shape[-1] == len(tasks)


def test_a_function_of_the_catalogue_is_the_loss_that_it_makes():
    assert loss_of(cs.losses.huber, "value") == Huber() and loss_of(cs.losses.focal, "class") == Focal()
    with pytest.raises(cs.ConsilienceError, match="got MSE"):
        loss_of(cs.losses.mse, "class")


@pytest.mark.parametrize(
    ("loss", "rule"),
    [
        (
            "huber",
            "the loss of targets of kind 'class' must be cross_entropy, focal or a function, got Huber",
        ),
        (cs.losses.bce(), "the loss of targets of kind 'class' must be"),
        (
            {"value": "huber"},
            "must be one of the tasks or kinds of the schedule, got 'value'; nearest: class",
        ),
    ],
)
def test_a_loss_that_fits_no_task_is_refused(loss, rule):
    schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 2))
    with pytest.raises(cs.ConsilienceError, match=rule):
        cs.run(schedule, m.finetune(), training=cs.Training(epochs=1, loss=loss))


# What output columns mean.


def blobs(classes, each=12, seed=0, shift=0):
    """Gaussian blobs [N, 4] in the plane of numbers `classes`, with the class number as target."""
    rng = np.random.default_rng(seed)
    y = np.repeat(classes, each)
    return (rng.normal(size=(len(y), 4)) + 3 * np.eye(4)[y % 4] + shift).astype("f4"), y


def trained_net(outputs, x, y):
    """A linear net of the user's own, trained in plain torch on targets as they are."""
    torch.manual_seed(0)
    net = torch.nn.Linear(x.shape[1], outputs)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(30):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(torch.as_tensor(x)), torch.as_tensor(y)).backward()
        optimiser.step()
    return net


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_labels_that_do_not_occur_keep_their_columns(scenario):
    # Numbered from 1, so that no example has class 0.
    x, y = blobs([1, 2, 3])
    source = cs.data.arrays(x, y, test=(x, y), name="one-based")
    schedule = cs.settings.federated(cs.data.iid(source, 2), rounds=2, scenario=scenario)
    net = torch.nn.Linear(4, 4)
    result = cs.run(schedule, cs.methods.fedavg(), net, cs.Training(epochs=5, lr=0.1))
    assert result.labels == tuple(("one-based", str(i)) for i in range(4))
    assert torch.equal(schedule.source("one-based/client-0").train.targets().unique(), torch.arange(1, 4))

    net.load_state_dict(result.params)
    out = net(torch.as_tensor(x))
    # A task label leaves the classes of the task alone.
    out[:, 0] -= torch.inf if scenario == "task" else 0
    exported = (out.argmax(1) == torch.as_tensor(y)).double().mean().item()
    assert result.accuracy == pytest.approx(exported) and exported > 0.9
    assert result.predict(x, names=True) == [str(i) for i in result.predict(x).argmax(1).tolist()]


@pytest.mark.parametrize("names", [None, ["none", "a", "b", "c", "d"]])
def test_a_net_on_some_of_its_classes_is_read_as_it_was_trained(names):
    x, y = blobs([0, 1, 2, 3])
    source = cs.data.arrays(x, y, test=(x, y), classes=names)
    net = trained_net(len(source.labels), x, y)
    late = cs.data.split_classes(source, 2, order=None)[1:]
    before = cs.run(cs.settings.continual(late), cs.methods.finetune(), net, cs.Training(lr=1e-9)).matrix[0]
    held = torch.isin(torch.as_tensor(y), torch.tensor(late[0].classes))
    right = (net(torch.as_tensor(x)).argmax(1) == torch.as_tensor(y))[held].double().mean().item()
    assert before[0] == pytest.approx(right) and right > 0.9


def test_declared_labels_of_tables_and_of_validation_alone_are_kept():
    rows = {"a": [i % 2 for i in range(40)], "b": list(range(40)), "y": list("yx" * 20)}
    table = cs.data.table(rows, "y", classes=["z", "y", "w", "x"])
    assert [name for _, name in cs.settings.continual([table]).frame.labels] == ["z", "y", "w", "x"]

    # A class that only validation data have is one of the source's, in its place.
    x, y = blobs([0, 2, 3])
    source = cs.data.arrays(x, y, test=(x, y))
    without = replace(source, train=source.train.select((source.train.targets() != 2).nonzero()[:, 0]))
    for scenario in ("class", "domain"):
        (framed,), frame = reframe([without], scenario)
        assert len(frame.labels) == 4 and framed.train.targets().unique().tolist() == [0, 3]
        assert torch.equal(framed.validation.targets(), source.validation.targets())


def test_sources_of_a_schedule_of_several_kinds_are_not_framed_again():
    """Its columns were doubled: 8 in place of 4."""
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    sources = cs.data.tasks(x, {"a": x[:, :3].argmax(1), "b": x.sum(1)}, {"b": "value"}, name="d")
    first = cs.settings.multitask(sources, "task")
    with pytest.raises(cs.ConsilienceError, match="'d/a' and 'd/b' have columns side by side; give the"):
        cs.settings.multitask(first.sources, "task")
    # Of one kind they have their labels once.
    again = cs.settings.multitask(cs.settings.multitask(sources[:1], "task").sources, "task")
    assert again.frame.labels == (("d/a", "0"), ("d/a", "1"), ("d/a", "2"))


def test_columns_follow_names_where_sources_order_them_differently():
    x, y = blobs([0, 1, 2])
    names = ["a", "b", "c", "d"]
    one = cs.data.arrays(x, y, classes=names, space="s", name="one")
    # The same examples with other numbers: class i of `one` is 3 - i here.
    other = cs.data.arrays(x, 3 - y, classes=names[::-1], space="s", name="other")
    framed, frame = reframe([one, other], "class")
    assert [name for _, name in frame.labels] == names
    assert torch.equal(framed[1].train.targets(), 3 - other.train.targets())


def test_equal_names_in_several_spaces_are_warned_about():
    def site(i, **more):
        x, y = blobs([0, 1], seed=i)
        return cs.data.arrays(x, y, name=f"site{i}", **more)

    for more, name in (({"classes": ["ill", "well"]}, "ill"), ({}, "0")):
        with pytest.warns(
            UserWarning, match=f"{name}' is in 3 spaces .'site0', .* there are 6 classes; .*one `space`"
        ):
            cs.settings.federated([site(i, **more) for i in range(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs.settings.federated([site(i, space="diagnosis") for i in range(3)])
        # With task labels they never compete, and other names are other classes.
        cs.settings.continual([site(i) for i in range(3)], "task")
        cs.settings.continual([site(i, classes=[f"a{i}", f"b{i}"]) for i in range(3)])


def test_too_few_outputs_for_declared_labels_name_those_that_do_not_occur():
    x, y = blobs([1, 2, 3])
    source = cs.data.arrays(x, y, name="mine")
    with pytest.raises(
        cs.ConsilienceError, match="the 4 classes, got 3 outputs; '0' of 'mine' occurs in no source"
    ):
        cs.run(cs.settings.continual([source]), cs.methods.finetune(), torch.nn.Linear(4, 3))


def test_predictions_by_name_say_labels_places_and_spaces():
    frame = LabelFrame((("s", "cat"), ("s", "dog"), ("t", "cat")))
    p = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.0, 0.0, 0.0]])
    assert frame.names(p) == ["dog", "t: cat", None]
    # Places come after classes, and lists of lists have the form of the targets.
    assert frame.names(torch.stack([p, p], 2)) == [["dog"] * 2, ["t: cat"] * 2, [None] * 2]
    several = replace(frame, targets={"": Target("labels", DEFAULTS["labels"])})
    assert several.names(p) == [["dog"], ["t: cat"], []]
    values = replace(frame, targets={"": Target("value", DEFAULTS["value"])})
    with pytest.raises(cs.ConsilienceError, match="by name need classes or labels, got value"):
        values.names(p)
    mixed = replace(frame, targets={"a": values.targets[""], "b": Target("class", DEFAULTS["class"], (0, 1))})
    assert mixed.names(p, "b")[:2] == ["dog", "dog"]
    with pytest.raises(cs.ConsilienceError, match="give a `task`"):
        mixed.names(p)


def test_the_labels_of_a_result_are_kept_in_its_folder(tmp_path):
    x, y = blobs([0, 1])
    source = cs.data.arrays(x, y, classes=["no", "yes", "maybe"], name="mine")
    out = tmp_path / "run"
    result = cs.run(cs.settings.continual([source]), cs.methods.finetune(), training=cs.Training(1), out=out)
    assert result.labels == cs.Result.load(out).labels == (("mine", "no"), ("mine", "yes"), ("mine", "maybe"))


# Experts that were trained alone.


def pair_of_spaces():
    """Two sources of two classes each, in label spaces of their own, and a net that was trained on each."""
    sources, nets = [], []
    for i, name in enumerate("ab"):
        x, y = blobs([0, 1], seed=i, shift=i)
        sources.append(cs.data.arrays(x, y, test=(x, y), name=name, classes=[f"{name}0", f"{name}1"]))
        nets.append(trained_net(4, x, y))
    return sources, nets


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_experts_of_other_spaces_get_the_columns_of_the_schedule(scenario):
    sources, nets = pair_of_spaces()
    experts = [cs.Expert(s.name, n.state_dict(), s) for s, n in zip(sources, nets, strict=True)]
    result = cs.run(cs.settings.exmodel(experts, scenario=scenario), m.average_ensemble(), nn.Linear(4, 4))

    # In the frame of both, the first two rows of the second net are columns 2 and 3; the others make room.
    x = torch.as_tensor(blobs([0, 1], seed=7)[0])
    order = [[0, 1, 2, 3], [2, 3, 0, 1]] if scenario != "domain" else [[0, 1, 2, 3], [0, 1, 2, 3]]
    with torch.no_grad():
        outs = [n(x)[:, o] for n, o in zip(nets, order, strict=True)]
    width, keeps = (2, [[0, 1], [0, 1]]) if scenario == "domain" else (4, [[0, 1], [2, 3]])
    hide = [torch.tensor([c not in own for c in range(width)]) for own in keeps]
    wanted = [out[:, :width].masked_fill(h, -torch.inf).softmax(1) for out, h in zip(outs, hide, strict=True)]
    torch.testing.assert_close(result.predict(x), torch.stack(wanted).mean(0))


def test_an_expert_of_a_run_says_what_its_columns_mean(tmp_path):
    sources, _ = pair_of_spaces()
    both = cs.run(cs.settings.multitask(sources), m.finetune(), nn.Linear(4, 4), cs.Training(20, lr=0.1))
    assert (
        cs.Expert("e", both.params, sources[1]).labels
        == both.labels
        == tuple((name, f"{name}{i}") for name in "ab" for i in (0, 1))
    )
    # A file of torch keeps it; a plain dictionary needs `labels`.
    torch.save(both.params, tmp_path / "e.pt")
    saved = torch.load(tmp_path / "e.pt", weights_only=True)
    plain = cs.Expert("e", dict(both.params), sources[1], labels=both.labels)
    x = sources[1].test.whole()[0]
    wanted = both.predict(x)[:, 2:] / both.predict(x)[:, 2:].sum(1, keepdim=True)
    for expert in (cs.Expert("e", both.params, sources[1]), cs.Expert("e", saved, sources[1]), plain):
        # Judged on one source alone, whose classes are columns 0 and 1 there.
        again = cs.run(cs.settings.merging(experts=[expert]), m.average(), nn.Linear(4, 4))
        torch.testing.assert_close(again.predict(x), wanted)


def test_a_base_keeps_its_columns_by_name():
    sources, _ = pair_of_spaces()
    first = cs.run(cs.settings.multitask(sources), m.finetune(), nn.Linear(4, 4), cs.Training(20, lr=0.1))
    turned = cs.settings.multitask(sources[::-1])
    schedule = replace(turned, base=first.params)
    begun = cs.run(schedule, m.finetune(), nn.Linear(4, 4), cs.Training(1, lr=0.1)).matrix[0]
    assert begun.tolist() == first.matrix[-1][::-1].tolist()


class Scaled(nn.Module):
    """A module that does something with single columns after its last linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x):
        return self.layer(x) * self.scale


class Twice(nn.Module):
    """A module whose head is one of its first layers too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.first(x).relu())


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (cs.models.wrap(Scaled()), "its outputs are not those of the linear head"),
        (cs.models.wrap(nn.Linear(4, 4), frozen=["bias"]), "because 'bias' is frozen"),
        (cs.models.wrap(Twice()), "because 'first.weight' is tied"),
        (cs.models.wrap(nn.Bilinear(4, 4, 4), outputs=4), "only in a model with a linear head"),
    ],
)
def test_columns_that_cannot_be_moved_are_refused_by_name(model, text, monkeypatch):
    sources, _ = pair_of_spaces()
    monkeypatch.setattr(nn.Bilinear, "forward", lambda self, x: F.bilinear(x, x, self.weight, self.bias))
    state = model.state_dict(*model.init(drawn(0)))
    experts = [cs.Expert(s.name, state, s) for s in sources]
    with pytest.raises(cs.ConsilienceError, match=f"expert 'b' has its classes in other columns.*{text}"):
        cs.run(cs.settings.exmodel(experts), m.average_ensemble(), model)


def test_a_base_in_other_columns_than_its_experts_is_refused():
    sources, nets = pair_of_spaces()
    experts = [cs.Expert(s.name, n.state_dict(), s) for s, n in zip(sources, nets, strict=True)]
    schedule = cs.settings.merging(experts=experts, base=nets[0].state_dict())
    with pytest.raises(
        cs.ConsilienceError, match="experts must have the columns of their `base`, and 'b' has"
    ):
        cs.run(schedule, m.task_arithmetic(), nn.Linear(4, 4))
    unknown = cs.Expert("e", nets[0].state_dict(), sources[0], labels=(("x", "0"), ("x", "1")))
    with pytest.raises(cs.ConsilienceError, match="the expert 'e' must have classes of the schedule"):
        cs.run(cs.settings.exmodel([unknown]), m.average_ensemble(), nn.Linear(4, 4))


def test_choose_reads_experts_by_what_their_columns_mean():
    sources, _ = pair_of_spaces()
    start = cs.run(cs.settings.multitask(sources), m.finetune(), nn.Linear(4, 4), cs.Training(5, lr=0.1))
    schedule = cs.settings.multitask(sources[::-1])
    turned = cs.run(schedule, m.finetune(), nn.Linear(4, 4), cs.Training(20, lr=0.1))
    experts = {"turned": turned.params, "same": start.params}
    found = cs.merging.choose(nn.Linear(4, 4), start.params, experts, sources, budget=2)
    assert found["turned"].test == pytest.approx(dict(zip(turned.sources, turned.matrix[-1], strict=True)))
    assert found["same"].test == pytest.approx(dict(zip(start.sources, start.matrix[-1], strict=True)))


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_experts_trained_alone_on_parts_of_the_classes_are_read_right(scenario):
    x, y = blobs([0, 1, 2, 3], each=30)
    parts = cs.data.split_classes(cs.data.arrays(x, y, test=(x, y)), 2)
    training = cs.Training(20, lr=0.1)

    def alone(model):
        return [cs.run(cs.settings.continual([s], scenario), m.finetune(), model, training) for s in parts]

    for model in (cs.models.linear(4, 4), cs.models.multi_head(cs.models.mlp(4, (8,), 4), 4)):
        runs = alone(model)
        for held in ([r.params for r in runs], [dict(r.agent.state.params) for r in runs]):
            experts = [cs.Expert(s.name, state, s) for s, state in zip(parts, held, strict=True)]
            schedule = cs.settings.exmodel(experts, scenario=scenario)
            given = cs.run(schedule, m.oracle_ensemble(), model)
            for i, (s, r) in enumerate(zip(parts, runs, strict=True)):
                assert given.matrix[-1, i] == pytest.approx(r.matrix[-1, 0]) and r.score > 0.9
                p = given.predict(s.test.whole()[0], s.task)
                torch.testing.assert_close(p, r.predict(s.test.whole()[0], s.task))
