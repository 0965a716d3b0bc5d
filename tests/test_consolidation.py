"""Consolidation by outputs and latents: DAC, Deep Model Consolidation and Batch Model Consolidation; model
patching; experts that arrive in other orders, late, or again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
import restate
from consilience import testing
from consilience.consolidators.ex_model import ExModelDistillation
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.params import key
from consilience.corrections.distillation import Stability
from test_exmodel import FP64, SOURCES, final, given, joint, maker, method, near, spied

D, C, H = testing.INPUTS, testing.CLASSES, 5
BOTH: dict[str, Any] = {"targets": "both", "weight_ce": 0.0}


def network(seed: int, hidden: int = H, outputs: int = C) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(D, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=key(seed, i)))
    return net


def latents(net: nn.Sequential, x: Tensor) -> Tensor:
    return net[:2].double()(x).detach()


# DAC


@pytest.mark.parametrize("options", [{}, {"weight_logits": 0.0}, {"project": False}])
def test_a_student_that_is_its_teacher_stays(options: dict[str, Any]) -> None:
    """With projectors that are the identity, the loss is 0."""
    net = network(1)
    given_options = {**BOTH, "normalise": None, "weight_latents": 1.0, "steps": 20, "lr": 0.1, **options}
    schedule = cs.settings.exmodel(given(net, sources=[joint()]))
    state = final(schedule, cs.models.wrap(net), **given_options)
    assert all(torch.equal(state.params[n], p.to(state.params[n].dtype)) for n, p in net.named_parameters())
    # Latents alone make it move.
    other = final(schedule, cs.models.wrap(network(2)), **given_options).params["0.weight"]
    assert float((other - network(2)[0].weight).detach().abs().max()) > 1e-2


def test_without_latents_it_is_ex_model_distillation_bit_for_bit() -> None:
    schedule, model = cs.settings.exmodel(given(*[network(i) for i in range(3)])), cs.models.wrap(network(9))
    plain = {"size": 60, "steps": 10, "weight_ce": 0.0}
    one = cs.methods.exmodel_distillation(maker(), targets="both", **plain)  # type: ignore[arg-type]
    other = cs.methods.dac(maker(), size=60, steps=10, weight_latents=0.0)
    first, second = (testing.quiet(schedule, each, model, FP64).params for each in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = testing.quiet(schedule, cs.methods.dac(maker(), size=60, steps=10), model, FP64).params
    assert not torch.equal(first["0.weight"], moved["0.weight"])


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("targets", ["document", "both"])
def test_latents_of_both_teachers_are_restated_in_plain_torch(project: bool, targets: str) -> None:
    """Outputs and latents of two experts, one after the other, over the memory that the run kept."""
    nets, student = [network(i + 1, 4 if project and i else H) for i in range(2)], network(9).double()
    options = {"weight_ce": 0.3, "weight_logits": 0.5, "weight_latents": 2.0, "targets": targets}
    schedule = cs.settings.exmodel(given(*nets, own=True))
    more = {"steps": 8, "lr": 0.02, "batch_size": 16, "normalise": None, "project": project}
    states = spied(schedule, cs.models.wrap(network(9)), **options, **more)

    seen: list[int] = []
    for i, (net, (state, orders)) in enumerate(zip(nets, states, strict=True)):
        x, y, own = state.outer["x"], state.outer["y"], list(SOURCES[i].classes)
        teachers = [(net.double(), own)] if not i else [(network(0).double(), seen), (net.double(), own)]
        if i:
            teachers[0][0].load_state_dict(student.state_dict())
        said = [(t(x).detach(), latents(t, x), classes) for t, classes in teachers]
        maps = [torch.eye(psi.shape[1], H).double().requires_grad_(project) for _, psi, _ in said]
        leaves = [*student.parameters(), *(maps if project else [])]
        adam, among = torch.optim.Adam(leaves, lr=0.02), sorted({*seen, *own})
        for order in orders:
            out, psi, loss = student(x[order]), student[:2](x[order]), torch.zeros(()).double()
            for p, (logits, hidden, classes) in zip(maps, said, strict=True):
                taught = torch.tensor([targets == "both" or int(c) in classes for c in y[order]])[:, None]
                apart = (out - logits[order])[:, classes] * taught
                loss = loss + 0.5 * apart.square().sum(1).mean()
                loss = loss + 2.0 * ((F.linear(psi, p) - hidden[order]) * taught).square().mean()
            label = torch.tensor([among.index(int(c)) for c in y[order]])
            loss = loss + 0.3 * F.cross_entropy(out[:, among], label)
            adam.zero_grad()
            loss.backward()
            adam.step()
        seen += own
        near(dict(state.params), {n: p.detach() for n, p in student.named_parameters()}, 1e-9)


def test_with_task_labels_the_former_model_teaches_its_heads_on_new_samples() -> None:
    """Double distillation: after both experts each head answers as its own on all samples of the memory."""
    model = cs.models.multi_head(cs.models.mlp(D, (48,), C), C)
    experts = given(*[network(i + 1) for i in range(2)], own=True)
    schedule = cs.settings.exmodel(experts, scenario="task")
    options = {**BOTH, "steps": 200, "lr": 0.02, "size": 60, "normalise": None, "weight_latents": 0.1}
    (_, _), (state, _) = spied(schedule, model, **options)
    x, errors = state.outer["x"], []
    for net, source in zip([network(1), network(2)], SOURCES, strict=False):
        columns, task = list(source.classes), source.task or source.name
        out = model(state.params, state.buffers, x, task, False)[0][:, columns]
        target = net.double()(x).detach()[:, columns]
        errors.append(float((out - target).square().mean() / target.var()))
    assert max(errors) < 0.1, errors
    assert all(not name.startswith("projector") for name in state.params)


def test_crops_of_one_image_consolidate() -> None:
    """One image is enough data (Carta et al. 2023): the experts' answers on crops of another are learned."""
    images = torch.randn(2, 40 * D, generator=key("images")).unfold(1, 2, 1).sum(2)
    crops, others = (image.unfold(0, D, 1) for image in images)
    nets, student = [network(i + 1) for i in range(2)], cs.models.mlp(D, (48,), C)
    options = {"size": 150, "steps": 120, "lr": 0.02}
    dac = cs.methods.dac(cs.memory.auxiliary(crops, "random"), **options)  # type: ignore[arg-type]
    params = testing.quiet(cs.settings.exmodel(given(*nets, own=True)), dac, student, FP64).params
    learned = student(dict(params), {}, others.to(next(iter(params.values())).dtype), None, False)[0]
    start = network(9)(others).detach()
    right = [
        [
            float((z[:, own].argmax(1) == net(others)[:, own].argmax(1)).double().mean())
            for z in (learned, start)
        ]
        for net, own in zip(nets, (list(source.classes) for source in SOURCES), strict=False)
    ]
    assert min(now for now, _ in right) > 0.8 > sum(before for _, before in right) / 2, right


# Deep Model Consolidation


def test_deep_model_consolidation_is_the_paper_s_loss() -> None:
    """Zhang et al. 2020: regress to the centred logits of the old and the new model, side by side."""
    nets, data = [network(i + 1) for i in range(2)], torch.rand(40, D, generator=key("aux"))
    part = cs.methods.deep_model_consolidation(data, size=40, steps=1, lr=0.01).consolidator
    assert isinstance(part, ExModelDistillation)
    options = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    options |= {"optimiser": "sgd", "batch_size": 40}
    schedule, student = cs.settings.exmodel(given(*nets)), network(9).double()
    states = spied(schedule, cs.models.wrap(network(9)), **options)

    old, columns = student, list(SOURCES[0].classes)
    for i, (state, _) in enumerate(states):
        x, own = state.outer["x"], list(SOURCES[i].classes)
        # The first expert comes without a former model.
        new = nets[i].double()(x)[:, own]
        parts = [new] if not i else [old(x)[:, columns], new]
        target = torch.cat([z - z.mean(1, keepdim=True) for z in parts], 1).detach()
        among = columns if not i else columns + own
        loss = (student(x)[:, among] - target).square().mean()
        grads = torch.autograd.grad(loss, list(student.parameters()))
        with torch.no_grad():
            for p, grad in zip(student.parameters(), grads, strict=True):
                p -= 0.01 * len(among) * grad
        near(dict(state.params), {n: p.detach() for n, p in student.named_parameters()}, 1e-9)


# Batch Model Consolidation


def test_the_stability_loss_is_restated_in_plain_torch() -> None:
    """CE and the distance of latents to those at the start, from the first source on."""
    source, start = restate.source("own"), restate.plain()

    def loss(net: nn.Sequential, x: Tensor, y: Tensor, *_: Any) -> Tensor:
        apart = (net[:3](x) - start[:3](x).detach()).square().mean()
        return F.cross_entropy(net(x), y) + 3.0 * apart

    net, free = restate.fit(restate.plain(), source, loss), restate.fit(restate.plain(), source)
    stable = cs.Method("stable", (Stability(3.0),))
    result = cs.run(cs.settings.continual([source]), stable, restate.mlp(), restate.training())
    restate.near(result.params, restate.entries(net))
    assert not torch.allclose(net[1].weight, free[1].weight, atol=1e-3)


def test_experts_of_one_base_are_consolidated_in_one_batch_on_replayed_data() -> None:
    """The CE of all classes, and the features of the expert that each sample is from, as they are."""
    nets, student = [network(i + 1).double() for i in range(3)], network(9).double()
    part = cs.methods.batch_model_consolidation(SOURCES, size=30, steps=6, lr=0.02, weight_latents=2.0)
    options = {f.name: getattr(part.consolidator, f.name) for f in dataclasses.fields(part.consolidator)}
    schedule = cs.settings.merging(given(*nets))
    ((state, orders),) = spied(schedule, cs.models.wrap(network(9)), **options)
    x, y, expert = (state.outer[name] for name in ("x", "y", "expert"))
    assert expert.unique().tolist() == [0, 1, 2]
    # Replayed examples are those of the sources.
    held = torch.cat([source.train.whole()[0] for source in SOURCES]).to(x.dtype)
    assert bool((x[:, None] == held[None]).all(2).any(1).all())

    hidden = torch.stack([nets[int(e)][:2](row).detach() for e, row in zip(expert, x, strict=True)])
    adam = torch.optim.Adam(student.parameters(), lr=0.02)
    for order in orders:
        loss = F.cross_entropy(student(x[order]), y[order])
        # A mean over units and the batch, summed over experts.
        loss = loss + 2.0 * (student[:2](x[order]) - hidden[order]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    near(dict(state.params), {n: p.detach() for n, p in student.named_parameters()}, 1e-9)


def test_batch_model_consolidation_learns_all_experts() -> None:
    """Trained from one base, in parallel and one after the other, above the average of their parameters."""
    for setting in (cs.settings.merging, cs.settings.exmodel):
        sources = testing.sources()
        method = cs.methods.batch_model_consolidation(sources, size=60, steps=60, lr=0.02)
        scores = [
            testing.quiet(setting(sources=sources), m, cs.models.mlp(D, (16,), C), testing.TRAINING).score
            for m in (method, cs.methods.parameter_average())
        ]
        assert scores[0] > scores[1] + 0.1, (setting.__name__, scores)


# refusals


def test_refusals_of_latents() -> None:
    with pytest.raises(ConsilienceError, match="one of weight_ce, weight_logits, weight_latents must be"):
        method(weight_ce=0.0, weight_logits=0.0)
    with pytest.raises(ConsilienceError, match="`project` is about latents"):
        method(project=False)
    with pytest.raises(ConsilienceError, match="`weight_latents` must be >= 0 and finite"):
        method(weight_latents=-1.0)

    schedule, options = cs.settings.exmodel(given(network(1), network(2))), {"weight_latents": 1.0}
    with pytest.raises(Refusal, match="frozen, or empty, and latents cannot move; use exmodel_distillation"):
        cs.run(schedule, method(**options), cs.models.linear(D, C), FP64)
    wide = cs.settings.exmodel(given(network(1), network(2, H + 1), own=True))
    with pytest.raises(Refusal, match="those of the model of 'e1' have another width; use a projector"):
        cs.run(wide, method(project=False, **options), cs.models.wrap(network(9)), FP64)
    columns = cs.models.progressive(D, (8,), C)
    with pytest.raises(Refusal, match="the model has no head whose inputs are latents to teach"):
        cs.run(cs.settings.exmodel(given(network(1), own=True), scenario="task"), method(**options), columns)


# model patching


def test_model_patching_is_the_path_that_explore_searches() -> None:
    """PAINT (Ilharco et al. 2022): (1 - a) base + a tuned, a chosen on the old and the new task."""
    old, new = testing.sources()[:2]
    model = cs.models.mlp(D, (16,), C)
    training = cs.Training(epochs=20, batch_size=16, lr=0.2)
    base, tuned = (
        testing.quiet(cs.settings.continual(s), cs.methods.finetune(), model, training).params
        for s in ([old], [old, new])
    )
    grid = [i / 10 for i in range(11)]
    found = cs.merging.explore(model, base, {"tuned": tuned}, [old, new], grid=grid, optimiser=None)
    by_a = {m.coefficients[0]: m for m in found.mixtures}
    for a in grid:
        params = {n: (1 - a) * base[n] + a * tuned[n] for n in base}
        for source in (old, new):
            x, y = source.validation.whole()
            out = model(params, {}, x, None, False)[0].argmax(1)
            assert by_a[a].scores[source.name] == pytest.approx(float((out == y).double().mean()), abs=0.021)
    # The paper's choice, of the highest mean accuracy, is no worse than either end.
    patched = max(found.mixtures, key=lambda m: sum(m.scores.values()))
    ends = [sum(by_a[a].scores.values()) for a in (0.0, 1.0)]
    assert sum(patched.scores.values()) >= max(ends) and min(by_a) == 0


# other orders, late, and again


def phases(*order: tuple[str, ...]) -> Any:
    """A schedule in which a learner receives trained agents in this order; "e0" may come twice."""
    from consilience.core.schedule import Evaluate, Exchange, Train, build

    own = {f"e{i}": (source.name,) for i, source in enumerate(SOURCES)}

    def plan(seed: int) -> Any:
        for step, names in enumerate(order):
            yield Train({name: own[name] for name in names})
            yield Exchange({"learner": names}, by_size=False)
            yield Evaluate(f"step {step}")

    return build("exmodel", SOURCES, "class", plan, "learner")


@pytest.mark.parametrize("latents", [0.0, 1.0])
def test_experts_may_come_in_any_order_late_and_again(latents: float) -> None:
    """e2 comes first, e1 late, and a version of e2 that trained on comes between them."""
    schedule = phases(("e2",), ("e0", "e2"), ("e1",))
    options = {"size": 90, "steps": 20, "lr": 0.01, "targets": "both", "weight_latents": latents}
    part = ExModelDistillation(maker=cs.memory.auxiliary(torch.rand(200, D)), **options)
    result = testing.quiet(
        schedule, cs.Method("exm", consolidator=part), cs.models.mlp(D, (32,), C), testing.TRAINING
    )
    outer = testing.state_of(result).outer
    # Four messages of three experts came: the newer version of e2 took the place of the older one.
    assert outer["arrived"].tolist() == [0, 1, 2] and outer["expert"].bincount().tolist() == [30, 30, 30]
    assert bool(outer["seen"].all()) and len(outer["y"]) == 90


def test_a_newer_version_alone_is_what_is_learned() -> None:
    """The older one left nothing: neither samples nor targets of the former model."""
    part = ExModelDistillation(maker=cs.memory.auxiliary(torch.rand(200, D)), size=30, steps=5, weight_ce=0)
    asked: list[list[Any]] = []
    whole = ExModelDistillation.targets_of

    def targets_of(self: Any, teachers: Any, samples: Any) -> Any:
        asked.append(list(teachers))
        return whole(self, asked[-1], samples)

    with testing.replaced(ExModelDistillation, "targets_of", targets_of):
        schedule = phases(("e2",), ("e2",), ("e1",))
        model = cs.models.mlp(D, (32,), C)
        result = testing.quiet(schedule, cs.Method("exm", consolidator=part), model, testing.TRAINING)
    assert [len(teachers) for teachers in asked] == [1, 1, 2]
    assert testing.state_of(result).outer["expert"].bincount().tolist() == [15, 15]


def test_experts_are_sent_every_few_epochs() -> None:
    """Each trains on in several visits, and is sent after each: as a newer version of itself."""
    schedule = cs.settings.exmodel(sources=SOURCES, visits=3)
    part = ExModelDistillation(maker=cs.memory.auxiliary(torch.rand(200, D)), size=30, steps=5)
    model = cs.models.mlp(D, (32,), C)
    result = testing.quiet(schedule, cs.Method("exm", consolidator=part), model, testing.TRAINING)
    names = [source.name for source in SOURCES]
    assert list(result.stages[-len(names) :]) == [f"{name}, visit 3" for name in names]
    assert len(result.stages) == 3 * len(names)
    outer = testing.state_of(result).outer
    assert outer["expert"].bincount().tolist() == [10, 10, 10] and len(outer["arrived"]) == 3
    with pytest.raises(cs.ConsilienceError, match="`visits` has no effect on experts that are given"):
        cs.settings.exmodel([cs.Expert("a", {}, SOURCES[0])], visits=2)
