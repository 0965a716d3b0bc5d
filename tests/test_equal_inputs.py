"""Tasks of the same inputs: one draw per step and one forward pass, with the result of separate ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from consilience.core.batch import Batch
from consilience.core.params import key
from consilience.core.schedule import Evaluate, Exchange, Train, build
from consilience.core.source import Tensors
from consilience.models.answers import Joint
from consilience.models.experts import Mixture
from consilience.models.module import ModuleModel
from consilience.models.networks import Networks
from restate import stopped

SIZE, N = 5, 30
FP64 = {"precision": "fp64", "batch_size": 8, "lr": 0.1, "momentum": 0.9, "epochs": 2}


def tasks(name: str = "d", n: int = N, seed: int = 0) -> list[cs.Source]:
    """A class of three, two values and a class of two, of the same inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, SIZE, generator=g).double()
    values = torch.stack([x[:, 0].sin(), x.square().sum(1)], 1)
    targets = {"kind": x[:, :3].argmax(1), "size": values, "sign": (x[:, 1] > 0).long()}
    found = cs.data.tasks(x, targets, {"size": "value"}, name=name, validation=0.2, test=0.2)
    return [replace(source, task=source.name) for source in found]


def trunk(norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(SIZE, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh())


def heads(norm: bool = False) -> cs.models.MultiHead:
    return cs.models.multi_head(cs.models.wrap(trunk(norm), headless=True, outputs=6), 7)


def plain() -> nn.Module:
    return nn.Sequential(*trunk(), nn.Linear(6, 7))


MODELS = {
    "heads": heads,
    "heads with batch norm": lambda: heads(True),
    "plain": lambda: cs.models.wrap(plain()),
}


def run(sources, model, method=None, engine=None, out=None, resume=False, **more):
    training = cs.Training(**{**FP64, **more})
    schedule = cs.settings.multitask(sources, "task", rounds=2)
    method = method or cs.methods.finetune()
    kwargs = {"engine": engine} if engine else {}
    return cs.run(schedule, method, model, training, out=out, resume=resume, **kwargs)


SEEN: list[int] = []
"""The samples of each forward pass of training: modules are copied with their hooks, but not this."""


def note(module: nn.Module, args) -> None:
    # The trial of a model before a run has two samples at most.
    if module.training and torch.is_grad_enabled() and len(args[0]) > 2:
        SEEN.append(len(args[0]))


def apart(sources: list[cs.Source]) -> list[cs.Source]:
    """The same sources, each with an example of its own behind the others, so that they share nothing."""
    found = []
    for i, s in enumerate(sources):
        x, y = s.train.whole()
        found.append(replace(s, train=Tensors(torch.cat([x, x[:1] + i + 1]), torch.cat([y, y[:1]]))))
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["finetune", "mgda", "gradnorm"])
def test_one_forward_is_as_good_as_one_per_task(name: str, method: str) -> None:
    """Against plain torch, with a forward pass for each task."""
    sources, model = tasks(), MODELS[name]()
    found = cs.run(
        cs.settings.multitask(sources, "task"), getattr(cs.methods, method)(), model, cs.Training(**FP64)
    )

    params, buffers = model.init(key(0, "init"))
    frame = cs.settings.multitask(sources, "task")
    for source in frame.sources:
        params, buffers = model.grow(params, buffers, source, key(0, source.name, "grow"))
    params, buffers = (
        {n: p.to(p.double() if p.is_floating_point() else p) for n, p in held.items()}
        for held in (params, buffers)
    )
    shared = sorted(n for n in params if model.task_of(n) is None)
    weights, first, momentum = torch.ones(3).double(), None, {}
    for epoch in range(2):
        generator = key(0, "d/kind", 0, epoch, 0, "shuffle")
        plan = torch.randperm(len(sources[0].train), generator=generator).split(8)
        for index in plan:
            leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
            rows, losses = [], []
            for source in frame.sources:
                x, y = source.train.whole()
                out, moved = model(leaves, buffers, x[index], source.name, True)
                own = out[:, list(source.classes)]
                if source.kind == "value":
                    loss = F.mse_loss(own, y[index].double())
                else:
                    loss = F.cross_entropy(own, y[index] - source.classes[0])
                losses.append(loss.detach())
                grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                zeros = [torch.zeros_like(p) for p in leaves.values()]
                rows.append({n: z if g is None else g for n, g, z in zip(leaves, grads, zeros, strict=True)})
            # A norm sees the batch once.
            buffers = moved
            grad = {n: sum(w * row[n] for w, row in zip(weights / 3, rows, strict=True)) for n in params}
            flat = torch.stack([torch.cat([row[n].flatten() for n in shared]) for row in rows])
            if method == "mgda":
                together = cs.aggregators.mgda()(flat)
                pieces = together.split([params[n].numel() for n in shared])
                grad |= {n: g.view_as(params[n]) for n, g in zip(shared, pieces, strict=True)}
            if method == "gradnorm":
                now = torch.stack(losses)
                first = now if first is None else first
                norms, rates = weights * flat.norm(dim=1), now / first
                target = norms.mean() * (rates / rates.mean()) ** 1.5
                weights = weights - 0.025 * (norms - target).sign() * flat.norm(dim=1)
                weights = 3 * weights / weights.sum()
            for n, g in grad.items():
                momentum[n] = 0.9 * momentum[n] + g if n in momentum else g
            params = {n: p - 0.1 * momentum[n] for n, p in params.items()}
    assert found.params.keys() >= params.keys()
    for n, p in params.items():
        assert (found.params[n] - p).abs().max() < (1e-12 if method == "finetune" else 1e-9), n


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_inputs_are_drawn_and_forwarded_once(name: str, accumulate: int) -> None:
    model, sources = MODELS[name](), tasks()
    inner = model.trunk.module if name != "plain" else model.module

    inner.register_forward_pre_hook(note)
    SEEN.clear()
    run(sources, model, accumulate=accumulate)
    size = len(sources[0].train)
    assert sum(SEEN) == 2 * 2 * size and max(SEEN) == 8
    SEEN.clear()
    run(apart(sources), model, accumulate=accumulate)
    assert sum(SEEN) == 3 * 2 * 2 * (size + 1)


def test_equal_tensors_are_found_and_others_are_not() -> None:
    sources = tasks()
    x, y = sources[1].train.whole()
    copied = [sources[0], replace(sources[1], train=Tensors(x.clone(), y)), sources[2]]
    same, other = run(sources, heads()), run(copied, heads())
    assert all(torch.equal(p, other.params[n]) for n, p in same.params.items())

    # In another order the examples of one step are other ones.
    turned = [sources[0], replace(sources[1], train=Tensors(x.flip(0), y.flip(0))), sources[2]]
    mixed = run(turned, heads())
    assert any(not torch.equal(p, mixed.params[n]) for n, p in same.params.items())


DRAWN: list[list[Tensor]] = []
"""The inputs of each part of each step."""


class Seen(cs.Correction):
    name = "Seen"

    def penalty(self, step, ctx):
        DRAWN.append([part.x for part in step.parts])
        return step.theta.new_zeros(())


def drawn(sources, **more) -> list[list[Tensor]]:
    DRAWN.clear()
    run(sources, heads(), cs.Method("seen", (Seen(),)), epochs=1, **more)
    return list(DRAWN)


def test_draws_of_a_step_are_the_same_object() -> None:
    assert all(len({id(x) for x in step}) == 1 for step in drawn(tasks()))
    assert all(len({id(x) for x in step}) == 3 for step in drawn(apart(tasks())))


def test_a_sampler_that_reads_targets_draws_for_each_task() -> None:
    sources = tasks()[::2]
    steps = drawn(sources, sampler=cs.data.samplers.Balanced())
    assert all(len({id(x) for x in step}) == 2 for step in steps)
    for i, source in enumerate(sources):
        # Each is balanced by its own classes.
        x, y = source.train.whole()
        rows = torch.cat([step[i] for step in steps[: len(steps) // 2]])
        labels = y[(rows[:, None] == x.double()).all(2).double().argmax(1)]
        counts = labels.bincount()[labels.unique()]
        assert counts.max() - counts.min() <= 1


def noise(x: Tensor, generator) -> Tensor:
    return x + torch.randn(x.shape, generator=generator).to(x)


def test_one_augmentation_makes_one_view() -> None:
    plain = tasks()
    same = [replace(s, augment=[noise]) for s in plain]
    steps = drawn(same)
    assert all(len({id(x) for x in step}) == 1 for step in steps)
    assert not torch.equal(steps[0][0], drawn(plain)[0][0])
    # Another one, or one that changes targets, is a task's own.
    for other in (None, cs.data.augment.joint(lambda x, y: (x + 1, y)), [noise, noise]):
        steps = drawn([same[0], replace(same[1], augment=other)])
        assert all(step[0] is not step[1] for step in steps)


def test_resumed_to_the_same_bits(tmp_path) -> None:
    def go(out, resume=False, **more):
        schedule = cs.settings.multitask(tasks(), "task", rounds=2)
        training = cs.Training(**FP64)
        return cs.run(schedule, cs.methods.pcgrad(), heads(True), training, out=out, resume=resume, **more)

    whole = go(tmp_path / "whole")
    stopped(go, tmp_path / "cut", 3)
    again = go(tmp_path / "cut", resume=True)
    assert all(torch.equal(whole.params[n], again.params[n]) for n in whole.params)


@pytest.mark.parametrize("name", MODELS)
def test_stacked_agents_are_the_serial_ones(name: str) -> None:
    """Two clients with three tasks each; those of the second have one of their inputs as a copy."""
    streams = [tasks("a"), tasks("b", seed=1)]
    x, y = streams[1][2].train.whole()
    streams[1][2] = replace(streams[1][2], train=Tensors(x.clone(), y))
    names = {f"client {i}": tuple(s.name for s in own) for i, own in enumerate(streams)}

    def plan(seed):
        for number in range(2):
            yield Train(names)
            yield Exchange({"server": tuple(names)})
            yield Evaluate(f"round {number}")
            yield Exchange({client: ("server",) for client in names})

    def go(engine):
        # One task of all clients has one head.
        sources = [
            replace(s, task=s.name[2:], labels=first.labels)
            for own in streams
            for s, first in zip(own, streams[0], strict=True)
        ]
        schedule = build("federated", sources, "task", plan, "server")
        lines = []
        training = cs.Training(**FP64)
        found = cs.run(
            schedule, cs.methods.fedavg(), MODELS[name](), training, engine=engine, progress=lines.append
        )
        return found.params, lines, found

    serial, _, one = go("serial")
    stacked, lines, other = go("batched")
    assert any("batched: 2 agents a step" in str(line) for line in lines)
    assert all((serial[n] - stacked[n]).abs().max() < 1e-12 for n in serial)
    assert one.costs["macs"] == other.costs["macs"]


def test_dropout_is_one_mask_for_all_tasks() -> None:
    model = cs.models.multi_head(
        cs.models.wrap(nn.Sequential(*trunk(), nn.Dropout(0.5)), headless=True, outputs=6), 7
    )
    a, b = (run(tasks(), model) for _ in range(2))
    assert all(torch.equal(p, b.params[n]) for n, p in a.params.items())
    assert all(bool(torch.isfinite(p).all()) for p in a.params.values())


def test_batches_say_which_have_the_same_inputs() -> None:
    from consilience.core.batch import first_alike

    x, y = torch.zeros(2, 3), torch.zeros(2)
    assert first_alike([Batch(x, y), Batch(x.clone(), y), Batch(x, y)]) == [0, 1, 0]


@pytest.mark.parametrize("kind", ["adapters", "biases"])
def test_tasks_with_entries_inside_the_backbone_are_forwarded_apart(kind: str) -> None:
    """The entries of a task inside the backbone train, also where its inputs are those of others."""
    body = cs.models.wrap(nn.Sequential(*trunk(), nn.Linear(6, 7)))
    model = {"adapters": cs.models.adapters, "biases": cs.models.beneficial_biases}[kind](body, 7)
    own = {n: p for n, p in run(tasks(), model).params.items() if n.startswith(kind)}
    assert len({n.split(".")[1] for n in own}) == 3
    assert sum(float(p.abs().sum()) for n, p in own.items() if not n.endswith("down")) > 1e-3
    once = {n: p for n, p in run(tasks(), model, epochs=1).params.items() if n in own}
    assert all(not torch.equal(p, once[n]) for n, p in own.items())


def doubling(kind: type[cs.Model]) -> type[cs.Model]:
    """Make a model of a user, who knows of one task at a time."""

    class Doubled(kind):
        def __call__(self, params, buffers, x, task, train):
            out, buffers = super().__call__(params, buffers, x, task, train)
            return 2 * out, buffers

        def bind(self, params, buffers, train):
            forward, held = super().bind(params, buffers, train)
            return lambda x, task: 2 * forward(x, task), held

    return Doubled


class Both(nn.Module):
    """A module that answers two tasks by name."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.size = nn.Linear(SIZE, 3), nn.Linear(SIZE, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"d/kind": self.kind(x), "d/size": self.size(x)}


DOUBLED = {
    "heads": lambda: doubling(cs.models.MultiHead)(cs.models.wrap(trunk(), headless=True, outputs=6), 7),
    "networks": lambda: doubling(Networks)(cs.models.wrap(trunk(), headless=True, outputs=6), 7, shared=0),
    "mmoe": lambda: doubling(Mixture)([trunk()], 7, shared=2, own=0),
    "joint": lambda: doubling(Joint)(Both(), {"d/kind": 3, "d/size": 2}),
    "module": lambda: doubling(ModuleModel)(plain()),
}


@pytest.mark.parametrize("name", DOUBLED)
def test_a_class_that_changes_one_task_changes_several(name: str) -> None:
    model = DOUBLED[name]()
    params, buffers = model.init(key(0, "init"))
    names = ("d/kind", "d/size")
    for source in cs.settings.multitask([s for s in tasks() if s.task in names], "task").sources:
        params, buffers = model.grow(params, buffers, source, key(0, source.name, "grow"))
    params = {n: p.float() for n, p in params.items()}
    x = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0))
    wanted = [model(params, buffers, x, name, False)[0] for name in names]
    # Twice what the class of the library gives.
    single = [type(model).__mro__[1].__call__(model, params, buffers, x, name, False)[0] for name in names]
    assert all(torch.equal(a, 2 * b) for a, b in zip(wanted, single, strict=True))
    forward = model.bind(params, buffers, False)[0]
    for found in (
        model.each(params, buffers, x, names, False)[0],
        model.bind_each(params, buffers, False)[0](x, names),
        [forward(x, name) for name in names],
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not model.passes_features and heads().passes_features
