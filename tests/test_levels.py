"""Gradients of tasks with respect to parameters (exact) and to features, against restatements in torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from consilience.core.aggregator import Stateful, inner_products
from consilience.core.params import key
from restate import stopped

pytest.importorskip("torchjd")
SIZE, WIDTH = 5, 4
FP64 = {"precision": "fp64", "batch_size": 8, "lr": 0.1, "momentum": 0.0, "epochs": 2}
RULES = (
    "pcgrad",
    "mgda",
    "cagrad",
    "gradvac",
    "imtl_g",
    "nash_mtl",
    "fairgrad",
    "aligned_mtl",
    "upgrad",
    "sdmgrad",
)


def tasks(x: Tensor | None = None, count: int = 3) -> list[cs.Source]:
    """Two values, a class, and one value that opposes the first in part."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, SIZE, generator=g).double() if x is None else x.double()
    first = torch.stack([x[:, 0].sin(), x[:, 1] * 2], 1)
    targets = {"a": first, "b": (x[:, 2] > 0).long(), "c": 1 - 0.8 * first[:, :1]}
    kinds = {"a": "value", "c": "value"}
    found = cs.data.tasks(x, targets, kinds, name="d", validation=0.0, test=0.2)
    return [replace(source, task=source.name) for source in found][:count]


def deep() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(SIZE, 6), nn.Tanh(), nn.Linear(6, WIDTH), nn.Tanh())


def heads(trunk: nn.Module | None = None, width: int = WIDTH) -> cs.models.MultiHead:
    return cs.models.multi_head(cs.models.wrap(trunk or deep(), headless=True, outputs=width), 5)


def run(sources, method, model=None, **more):
    given = {name: more.pop(name) for name in ("out", "resume") if name in more}
    schedule = cs.settings.multitask(sources, "task")
    return cs.run(schedule, method, model or heads(), cs.Training(**{**FP64, **more}), **given)


def restated(sources, rule, model, features: bool, epochs: int = 2) -> dict[str, Tensor]:
    """The trunk moves by the rule's weights of rows over parameters or features, heads by 1/m."""
    schedule = cs.settings.multitask(sources, "task")
    params, buffers = model.init(key(0, "init"))
    for source in schedule.sources:
        params, buffers = model.grow(params, buffers, source, key(0, source.name, "grow"))
    params, state = {n: p.double() for n, p in params.items()}, {}
    m, shared = len(schedule.sources), sorted(n for n in params if n.startswith("trunk."))
    for epoch in range(epochs):
        generator = key(0, sources[0].name, 0, epoch, 0, "shuffle")
        plan = torch.randperm(len(sources[0].train), generator=generator).split(8)
        for step, index in enumerate(plan):
            leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
            trunk = {n[6:]: leaves[n] for n in shared}
            z = torch.func.functional_call(model.trunk.module, trunk, (sources[0].train.x[index],))
            grad, rows = {n: torch.zeros_like(p) for n, p in params.items()}, []
            of = [z] if features else [leaves[n] for n in shared]
            for source in schedule.sources:
                name, y = source.name, source.train.y[index]
                out = F.linear(z, leaves[f"heads.{name}.weight"], leaves[f"heads.{name}.bias"])
                value = source.kind == "value"
                loss = F.mse_loss(out, y) if value else F.cross_entropy(out, y - source.classes[0])
                for part in ("weight", "bias"):
                    n = f"heads.{name}.{part}"
                    grad[n] = torch.autograd.grad(loss, leaves[n], retain_graph=True)[0] / m
                found = torch.autograd.grad(loss, of, retain_graph=True)
                rows.append(torch.cat([g.flatten() for g in found]))
            generator = key(0, sources[0].name, 0, epoch, step, "aggregate")
            rows, names = torch.stack(rows), [s.name for s in schedule.sources]
            if isinstance(rule, Stateful):
                made, state = rule.advance(rows, [1 / m] * m, names, state, generator)
            else:
                made = rule(rows, None, generator)
            entries = [leaves[n] for n in shared]
            if features:
                made = torch.autograd.grad(z, entries, made.view_as(z))
            else:
                made = made.split([p.numel() for p in entries])
            grad |= {n: g.view_as(params[n]) for n, g in zip(shared, made, strict=True)}
            params = {n: p - 0.1 * grad[n] for n, p in params.items()}
    return params


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for n, p in wanted.items():
        assert (found[n] - p).abs().max() < tolerance, n


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("name", RULES)
def test_each_rule_at_each_level(name: str, level: str) -> None:
    result = run(tasks(), getattr(cs.methods, name)(level=level))
    rule = getattr(cs.aggregators, name)()
    # CAGrad's solver, and torchjd's, stop at a tolerance.
    close(result.params, restated(tasks(), rule, heads(), level == "features"), 1e-6)
    other = restated(tasks(), rule, heads(), level != "features")
    assert any((result.params[n] - p).abs().max() > 1e-5 for n, p in other.items())


def test_rules_without_a_gramian_see_shared_entries_alone() -> None:
    result = run(tasks(), cs.methods.aggregate(cs.aggregators.median()))
    close(result.params, restated(tasks(), cs.aggregators.median(), heads(), False), 1e-12)


def linear(bias: bool) -> cs.models.MultiHead:
    torch.manual_seed(2)
    return heads(nn.Sequential(nn.Linear(SIZE, WIDTH, bias=bias)))


@pytest.mark.parametrize("name", RULES)
def test_levels_are_equal_for_one_shared_linear_layer(name: str) -> None:
    """<dL_i/dW, dL_j/dW> = sum over samples s, t of (x_s . x_t) (d_is . d_jt), with d = dL/dz.

    It is the Gramian of the d, times a constant, where x_s . x_t is 0 for s != t and the same for s = t: for
    orthogonal inputs of one length, and for one sample per step (with a bias too, which adds 1).
    """
    # PCGrad's order of three rows is that of their numbers, which differ between the levels.
    count = 2 if name == "pcgrad" else 3
    method = getattr(cs.methods, name)
    orthogonal = tasks(2 * torch.eye(SIZE).repeat(6, 1), count)
    which = orthogonal[0].train.x.argmax(1)
    index = torch.stack([(which == k).nonzero()[0, 0] for k in range(SIZE)])
    orthogonal = [s.select(index) for s in orthogonal]
    assert torch.equal(orthogonal[0].train.x, 2 * torch.eye(SIZE).double())
    exact, other = (
        run(orthogonal, method(level=level), linear(False)) for level in ("parameters", "features")
    )
    close(other.params, exact.params, 1e-7)

    alone = [s.select(torch.arange(6)) for s in tasks(count=count)]
    exact, other = (
        run(alone, method(level=level), linear(True), batch_size=1) for level in ("parameters", "features")
    )
    close(other.params, exact.params, 1e-7)


def test_levels_differ_where_inputs_have_much_in_common() -> None:
    exact, other = (
        run(tasks(), cs.methods.mgda(level), linear(True)) for level in ("parameters", "features")
    )
    assert (exact.params["trunk.0.weight"] - other.params["trunk.0.weight"]).abs().max() > 1e-3


def test_a_plain_model_is_cut_before_its_head() -> None:
    """One head for all tasks moves by the mean of their gradients, and the rest by the weights."""
    sources = tasks()
    net = nn.Sequential(*deep(), nn.Linear(WIDTH, 5))
    result = run(sources, cs.methods.mgda(level="features"), cs.models.wrap(net), epochs=1, batch_size=100)
    framed = cs.settings.multitask(sources, "task").sources
    model = cs.models.wrap(net)
    params = {n: p.double().requires_grad_() for n, p in model.init(key(0, "init"))[0].items()}
    x = framed[0].train.x
    seen = []
    copied = nn.Sequential(*deep(), nn.Linear(WIDTH, 5)).double()
    copied[4].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = torch.func.functional_call(copied, params, (x,))
    losses = []
    for s in framed:
        own = out[:, list(s.classes)]
        value = s.kind == "value"
        losses.append(F.mse_loss(own, s.train.y) if value else F.cross_entropy(own, s.train.y - s.classes[0]))
    rows = torch.stack(
        [torch.autograd.grad(loss, seen[0], retain_graph=True)[0].flatten() for loss in losses]
    )
    share = cs.aggregators.mgda()(rows)
    head = ["4.bias", "4.weight"]
    mean = torch.autograd.grad(sum(losses) / 3, [params[n] for n in head], retain_graph=True)
    trunk = [n for n in params if n not in head]
    moved = torch.autograd.grad(seen[0], [params[n] for n in trunk], share.view_as(seen[0]))
    wanted = dict(zip([*head, *trunk], [*mean, *moved], strict=True))
    close(result.params, {n: params[n].detach() - 0.1 * g for n, g in wanted.items()}, 1e-12)


class Counted(torch.autograd.Function):
    """The identity, which counts its backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.passes += 1
        return grad


class Trunk(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self
        return nn.Sequential(*rest)(Counted.apply(first(x)))


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_features_need_one_backward_pass_of_the_trunk(level: str) -> None:
    Counted.passes = 0
    run(tasks(), cs.methods.pcgrad(level=level), heads(Trunk(*deep())), epochs=1)
    # 24 samples are three steps.
    assert Counted.passes == (3 if level == "features" else 9)


def test_resumed_to_the_same_bits(tmp_path) -> None:
    def go(out, **more):
        training = cs.Training(**FP64)
        method = cs.methods.gradvac(0.3, level="features")
        return cs.run(cs.settings.multitask(tasks(), "task"), method, heads(), training, out=out, **more)

    whole = go(tmp_path / "whole")
    stopped(go, tmp_path / "cut", 4)
    again = go(tmp_path / "cut", resume=True)
    assert all(torch.equal(whole.params[n], again.params[n]) for n in whole.params)


def test_losses_may_be_balanced_and_precision_short() -> None:
    found = run(tasks(), cs.methods.uncertainty() + cs.methods.mgda(level="features"))
    sigmas = [p for n, p in found.params.items() if n.startswith("uncertainty/")]
    assert len(sigmas) == 3 and all(float(p.abs()) > 1e-4 for p in sigmas)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_short_types_find_the_same_weights(precision: str) -> None:
    """With fp16 the losses are scaled by 65536, which no weight may depend on."""
    whole, short = (
        run(tasks(), cs.methods.mgda(level="features"), precision=p, epochs=1) for p in ("fp32", precision)
    )
    for n, p in whole.params.items():
        assert (short.params[n] - p).abs().max() < 2e-2, n
    mean = run(tasks(), cs.methods.finetune(), precision="fp32", epochs=1)
    assert any((mean.params[n] - p).abs().max() > 4e-2 for n, p in whole.params.items())


def apart() -> list[cs.Source]:
    first, second, *_ = tasks()
    return [first, second.map(x=lambda x: x + 1)]


REFUSED = {
    "other inputs": (lambda: run(apart(), cs.methods.mgda(level="features")), "needs one batch of inputs"),
    "no Gramian": (
        lambda: run(tasks(), cs.Method("m", step_aggregator=cs.aggregators.rlw(), step_level="features")),
        "which RandomWeights reads here; use mgda",
    ),
    "no aggregator": (lambda: run(tasks(), cs.Method("m", step_level="features")), "which nothing reads"),
    "an exchange": (
        lambda: cs.run(
            cs.settings.federated(tasks(), rounds=1, scenario="task"),
            cs.Method("m", aggregator=cs.aggregators.mgda(), step_level="features"),
            heads(),
        ),
        "which nothing reads here",
    ),
    "one task": (
        lambda: cs.run(cs.settings.continual(tasks()), cs.methods.mgda(level="features"), heads()),
        "a step has one here",
    ),
    "norms": (
        lambda: run(tasks(), cs.methods.gradnorm() + cs.methods.mgda(level="features")),
        "GradNorm needs the gradients",
    ),
    "features of tasks": (
        lambda: run(
            tasks(),
            cs.methods.mgda(level="features"),
            cs.models.adapters(nn.Sequential(*deep(), nn.Linear(4, 5)), 5),
        ),
        "needs a model whose tasks share features",
    ),
    "no features": (
        lambda: run(tasks(), cs.methods.mgda(level="features"), cs.models.wrap(nn.Linear(SIZE, 5))),
        "needs a model whose tasks share features",
    ),
    "micro-batches": (
        lambda: run(tasks(), cs.methods.mgda(level="features"), accumulate=2),
        "`accumulate` cuts it into parts",
    ),
    "draws by targets": (
        lambda: run(
            [replace(s, task=None) for s in two_classes()],
            cs.methods.mgda(level="features"),
            sampler=cs.data.samplers.Balanced(),
        ),
        "got 2 batches; .* use a sampler that does not read targets",
    ),
    "draws by scores": (
        lambda: run(tasks(), cs.methods.mgda(level="features"), sampler=cs.data.samplers.SelfPaced()),
        "SelfPaced chooses by the scores of each task",
    ),
    "a word": (lambda: cs.methods.mgda(level="feature"), "`level` must be 'parameters' or 'features'"),
    "a field": (lambda: cs.Method("m", step_level="rows"), "`step_level` must be 'features' or None"),
}


def two_classes() -> list[cs.Source]:
    x = torch.randn(40, SIZE, generator=torch.Generator().manual_seed(0)).double()
    return cs.data.tasks(x, {"a": (x[:, 0] > 0.5).long(), "b": (x[:, 1] > 0).long()}, name="d")


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_act_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(cs.ConsilienceError, match=message):
        call()


class Kept(cs.Correction):
    """Keeps what a trace sees of the Gramian."""

    name = "Kept"
    needs_norms = True

    def trace(self, step, ctx, grad, delta):
        KEPT.append((step.grams, step.norms))
        return {}


KEPT: list[tuple[dict[str, Tensor], Tensor]] = []


@pytest.mark.parametrize("method", ["pcgrad", "finetune"])
def test_steps_see_inner_products_by_entry(method: str) -> None:
    KEPT.clear()
    sources = tasks()
    result = run(sources, getattr(cs.methods, method)() + cs.Method("k", (Kept(),)), epochs=1, batch_size=100)
    grams, norms = KEPT[0]
    assert sorted(grams) == sorted(n for n in result.params if n.startswith("trunk."))
    total = torch.stack(list(grams.values())).sum(0)
    assert torch.allclose(total.diagonal().sqrt(), norms) and torch.equal(total, total.T)
    # The tasks at the first step, in plain torch.
    model, framed = heads(), cs.settings.multitask(sources, "task").sources
    params, buffers = model.init(key(0, "init"))
    for s in framed:
        params, buffers = model.grow(params, buffers, s, key(0, s.name, "grow"))
    leaves = {n: p.double().requires_grad_() for n, p in params.items()}
    rows = []
    for s in framed:
        own = model(leaves, buffers, s.train.x, s.name, True)[0][:, list(s.classes)]
        value = s.kind == "value"
        loss = F.mse_loss(own, s.train.y) if value else F.cross_entropy(own, s.train.y - s.classes[0])
        rows.append(torch.autograd.grad(loss, leaves["trunk.0.weight"])[0].flatten())
    assert torch.allclose(grams["trunk.0.weight"], torch.stack(rows) @ torch.stack(rows).T, atol=1e-12)


def test_inner_products_are_those_of_all_columns() -> None:
    """Over more columns than a block has, in short types, and over no column at all."""
    rows = torch.randn(5, 150_000, generator=torch.Generator().manual_seed(0))
    found = inner_products(rows, [slice(0, 100_000), slice(100_000, 150_000)])
    wide = rows.double()
    assert torch.allclose(found.sum(0).double(), wide @ wide.T, rtol=1e-5, atol=0.05)
    assert inner_products(rows.bfloat16()).dtype == torch.float32
    assert torch.equal(inner_products(rows[:, :0]), torch.zeros(1, 5, 5))
