"""Training for merging: TaLoS and linearised models against restatements and limits, and the analyses that
prove them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience.core.contexts import Beginning, Learned
from consilience.core.optimiser import SGD, Optimiser
from consilience.core.params import Layout, key, same
from consilience.core.schedule import Evaluate, Train, build
from consilience.core.source import Tensors
from consilience.corrections import fisher as fishers
from consilience.corrections.fisher import fisher
from consilience.corrections.sensitivity import TaLoS
from consilience.merging._analysis import Disentanglement, Transfer, disentanglement, transfer_matrix
from restate import LR, A, C, D, batches, entries, mlp, near, plain, source, training

PAIR = [source("a", 24, (0, 1), 1, task="a"), source("b", 20, (2, 3), 2, task="b")]


def drawn(name, visit=0, seed=0):
    return key(seed, name, visit, "TaLoS", "begin")


def learned(model, s, params=None, buffers=None):
    params = params or {n: p.double() for n, p in model.init(key(0, "init"))[0].items()}
    return Learned(model, params, buffers or {}, {}, s, s.task, Layout.of(params), drawn(s.name))


def gradient(net, out):
    return {
        n: g
        for (n, _), g in zip(
            net.named_parameters(), torch.autograd.grad(out, list(net.parameters())), strict=True
        )
    }


def scores(net, s, generator, of):
    """The restatement: one sample after another, its class drawn from the model among the source's own."""
    x, _ = s.train.whole()
    with torch.no_grad():
        hidden = torch.tensor([c not in s.classes for c in range(C)])
        p = net(x).masked_fill(hidden, -torch.inf).softmax(1)
    y = torch.multinomial(p, 1, generator=generator)[:, 0]
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for xi, yi in zip(x, y, strict=True):
        out = net(xi[None])[0]
        value = out[yi] if of == "logit" else out.masked_fill(hidden, -torch.inf).log_softmax(0)[yi]
        for n, g in gradient(net, value).items():
            total[n] += g * g
    return total


def restated(params, s, density, rounds, of="logit", visit=0):
    """The mask by hand: every round by a sort in plain Python over (score, index)."""
    names, generator = sorted(params), drawn(s.name, visit)
    size = sum(p.numel() for p in params.values())
    rows = {n: torch.ones_like(p) for n, p in params.items()}
    for n in ("3.weight", "3.bias"):
        rows[n][[c for c in range(C) if c not in s.classes]] = 0
    counted = set(torch.cat([rows[n].reshape(-1) for n in names]).nonzero()[:, 0].tolist())
    alive = list(range(size))
    for r in range(rounds):
        keep = torch.zeros(size, dtype=torch.bool)
        keep[alive] = True
        masks = dict(zip(names, keep.split([params[n].numel() for n in names]), strict=True))
        seen = {n: torch.where(masks[n].view(p.shape), p, 0.1 * p) for n, p in params.items()}
        found = scores(plain(params=seen), s, generator, of)
        flat = torch.cat([found[n].reshape(-1) for n in names]).tolist()
        count = math.ceil(density ** ((r + 1) / rounds) * len(counted))
        alive = sorted(sorted(set(alive) & counted, key=lambda i: (flat[i], i))[:count])
    keep = torch.zeros(size, dtype=torch.bool)
    keep[alive] = True
    return {
        n: k.view(params[n].shape)
        for n, k in zip(names, keep.split([params[n].numel() for n in names]), strict=True)
    }


def start(seed=0):
    return {n: p.double() for n, p in mlp().init(key(seed, "init"))[0].items()}


def alone(i, base=None):
    """A schedule in which one agent learns one of the pair, in the frame of both."""
    return build(
        "alone",
        PAIR,
        "task",
        lambda seed: iter([Train({"agent": (PAIR[i].name,)}), Evaluate("end")]),
        "agent",
        base=base,
    )


def run(method, sources, model=None, setting=None, **more):
    schedule = setting or cs.settings.continual(sources, "task")
    return cs.run(schedule, method, model or mlp(), training(**more))


# TaLoS: scores


@pytest.mark.parametrize("of", ["logit", "likelihood"])
@pytest.mark.parametrize("path", ["layers", "vmap"])
def test_a_score_of_a_batch_is_the_sum_of_single_ones(of, path, monkeypatch):
    model, s = mlp(), replace(A, task=None)
    if path == "vmap":
        monkeypatch.setattr(fishers, "_layers", lambda learned: None)
    whole = fisher(learned(model, s), "data", of=of)
    total = {n: torch.zeros_like(p) for n, p in whole.items()}
    for i in range(len(s.train)):
        one = replace(s, train=s.train.select(torch.tensor([i])))
        total = {n: t + fisher(learned(model, one), "data", of=of)[n] for n, t in total.items()}
    near(whole, {n: t / len(s.train) for n, t in total.items()})
    assert max(float(t.max()) for t in whole.values()) > 0.01


def test_layers_of_frozen_and_headed_models_are_seen(monkeypatch):
    """The fast way and vmap agree where the head is frozen, and on the trunk under heads."""
    conv = cs.models.conv(C, 1, 8, 2)
    heads = cs.models.multi_head(conv, C)
    s = replace(
        PAIR[0],
        train=Tensors(torch.rand(7, 1, 8, 8, generator=key(0), dtype=torch.float64), torch.arange(7) % 2),
    )
    for model in (cs.models.frozen(conv, ("7.*",)), cs.models.frozen(conv, ("0.bias", "3.*")), heads):
        params, buffers = model.grow(*model.init(key(0)), s, key(1))
        params = {n: p.double() for n, p in params.items()}
        own = {n: p for n, p in params.items() if not model.frozen(n) and model.task_of(n) is None}
        asked = Learned(model, params, buffers, {}, s, "a", Layout.of(own), key(2))
        with monkeypatch.context() as m:
            m.setattr(fishers, "_by_vmap", None)
            fast = fisher(asked, "all")
        with monkeypatch.context() as m:
            m.setattr(fishers, "_layers", lambda learned: None)
            near(fast, fisher(asked, "all"))
        assert fast.keys() == own.keys() and all(float(v.max()) > 0 for v in fast.values())


@pytest.mark.parametrize("of", ["logit", "likelihood"])
def test_scores_are_those_of_classes_drawn_from_the_model(of):
    s, params = PAIR[1], start()
    found = fisher(learned(mlp(), s, params), "model", of=of)
    wanted = scores(plain(params=params), s, drawn("b"), of)
    near(found, {n: t / len(s.train) for n, t in wanted.items()})


def test_the_score_of_values_is_the_sum_of_the_squared_gradients_of_outputs():
    s = source("v", 9, kind="value")
    model = cs.models.mlp(D, (5,), 2)
    found = fisher(learned(model, s), "all", of="logit")
    net = nn.Sequential(nn.Flatten(), nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    net.load_state_dict({n: p.double() for n, p in model.init(key(0, "init"))[0].items()})
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for x in s.train.whole()[0]:
        for j in range(2):
            total = {n: total[n] + g * g for n, g in gradient(net, net(x[None])[0, j]).items()}
    near(found, {n: t / 9 for n, t in total.items()})


# TaLoS: masks


@pytest.mark.parametrize(
    ("density", "rounds", "of"), [(0.1, 4, "logit"), (0.3, 1, "logit"), (0.25, 3, "likelihood")]
)
def test_the_mask_is_the_restated_one(density, rounds, of):
    for s in (A, PAIR[0]):
        s = replace(s, task="a")
        found, idle = TaLoS(density, rounds, of).draw(
            Beginning(mlp(), start(), {}, (s,), None, drawn(s.name))
        )
        assert same(found, restated(start(), s, density, rounds, of)) and 0 <= idle <= 1
        absent = (C - len(s.classes)) * (5 + 1)
        size = sum(k.numel() for k in found.values()) - absent
        assert sum(int(k.sum()) for k in found.values()) == math.ceil(density * size)


def test_the_kept_count_is_exact_and_ties_go_by_index():
    """Inputs that are always zero have a score of exactly 0: of them the first are kept, in the order of the
    flat vector."""
    x = torch.zeros(12, D, dtype=torch.float64)
    x[:, 0] = torch.linspace(0.1, 1, 12)
    s = replace(A, train=Tensors(x, torch.arange(12) % C), task="a")
    model = cs.models.linear(D, C)
    params = {n: p.double() for n, p in model.init(key(0))[0].items()}
    keep, idle = TaLoS(0.3, 2).draw(Beginning(model, params, {}, (s,), None, key(1)))
    assert idle == 1
    assert sum(int(k.sum()) for k in keep.values()) == math.ceil(0.3 * (C * D + C)) == 9
    weight = keep["1.weight"]
    assert not keep["1.bias"].any() and not weight[:, 0].any()
    free = [(i, j) for i in range(C) for j in range(1, D)]
    assert [bool(weight[i, j]) for i, j in free] == [True] * 9 + [False] * (len(free) - 9)
    live, idle = TaLoS(0.3, 2, reached=True).draw(Beginning(model, params, {}, (s,), None, key(1)))
    assert idle == 0 and live["1.weight"][:, 0].sum() + live["1.bias"].sum() == math.ceil(0.3 * 2 * C) == sum(
        k.sum() for k in live.values()
    )
    with pytest.warns(UserWarning, match="100 % of the entries that it trains reach no answer"):
        end = run(cs.methods.talos(0.3, 2), [s], model)
    assert same(end.params, params_of(model)), "and so nothing moves"


def params_of(model, seed=0):
    return {n: p.double() for n, p in model.init(key(seed, "init"))[0].items()}


@pytest.mark.parametrize("density", [0.05, 1 / 3, 0.5, 0.999])
def test_counts(density):
    c = TaLoS(density, 5)
    assert c.kept(1001) == c.kept(1001, 4) == math.ceil(density * 1001)
    assert [c.kept(1001, r) for r in range(5)] == sorted((c.kept(1001, r) for r in range(5)), reverse=True)
    assert c.kept(1) == 1


# TaLoS: training


@pytest.mark.parametrize("optimiser", [SGD(0.9, 0.1, True), "adam", "adamw"], ids=str)
def test_held_entries_do_not_move(optimiser):
    """Under momentum and weight decay: tau is exactly 0 where the mask is, and not where it is not."""
    keep = restated(start(), PAIR[0], 0.2, 4)
    end = run(cs.methods.talos(0.2), PAIR[:1], optimiser=optimiser, weight_decay=0.1).params
    for n, p in start().items():
        assert torch.equal(end[n][~keep[n]], p[~keep[n]])
    moved = torch.cat([(end[n] != p)[keep[n]] for n, p in start().items()])
    assert moved.float().mean() > 0.9


@dataclass(frozen=True)
class Clipped(Optimiser):
    """SGD with momentum on gradients of at most a norm."""

    norm: float = 0.05

    def init(self, theta):
        return {"velocity": torch.zeros_like(theta)}

    def update(self, grad, state, theta):
        v = 0.9 * state["velocity"] + grad * min(1.0, self.norm / float(grad.norm()))
        return v, {"velocity": v}


def test_training_is_the_plain_loop_whose_masked_gradient_is_clipped():
    s, net, keep = PAIR[0], plain(), restated(start(), PAIR[0], 0.4, 4)
    optimiser = torch.optim.SGD(net.parameters(), LR, 0.9)
    hidden = torch.tensor([c not in s.classes for c in range(C)])
    clipped = 0
    for _, _, x, y in batches(s):
        optimiser.zero_grad()
        F.cross_entropy(net(x).masked_fill(hidden, -torch.inf), y).backward()
        for n, p in net.named_parameters():
            p.grad.mul_(keep[n])
        clipped += int(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.05)
        optimiser.step()
    assert clipped > 1
    near(run(cs.methods.talos(0.4), [s], optimiser=Clipped()).params, entries(net), 1e-6)


def test_all_kept_is_plain_training_and_fewer_are_not():
    a, b, c = (
        run(m, PAIR).params for m in (cs.methods.talos(1.0), cs.methods.finetune(), cs.methods.talos(0.9))
    )
    assert same(a, b) and not same(b, c)
    assert run(cs.methods.talos(1.0), PAIR).costs["macs"] == run(cs.methods.finetune(), PAIR).costs["macs"]


def test_one_after_another_each_source_has_its_own_mask_from_where_it_began():
    first = run(cs.methods.talos(0.2), PAIR[:1]).params
    end = run(cs.methods.talos(0.2), PAIR).params
    keep = restated(first, PAIR[1], 0.2, 4)
    assert not same(keep, restated(start(), PAIR[0], 0.2, 4))
    for n, p in first.items():
        assert torch.equal(end[n][~keep[n]], p[~keep[n]])
    assert not same(end, first)


def test_a_client_keeps_its_mask_over_rounds():
    """What two clients hold is what neither of their first masks lets move, in all rounds; their masks stay
    with them."""
    rounds = cs.settings.federated([replace(s, task=None) for s in PAIR], 3, scenario="task")
    result = cs.run(rounds, cs.methods.talos(0.1), mlp(), training(), seed=0)
    keep = [restated(start(), s, 0.1, 4) for s in PAIR]
    either = {n: keep[0][n] | keep[1][n] for n in keep[0]}
    for n, p in start().items():
        moved = (result.params[n] - p).abs()
        assert moved[~either[n]].numel() == 0 or float(moved[~either[n]].max()) < 1e-15, (
            "but for the rounding of averages"
        )
        assert moved[either[n]].numel() == 0 or float(moved[either[n]].max()) > 1e-4
    one = cs.run(cs.settings.federated(PAIR, 1, scenario="task"), cs.methods.talos(0.1), mlp(), training())
    assert not same(one.params, result.params)


def test_several_sources_in_a_step_have_one_mask_of_the_sum_of_their_scores():
    together, _ = TaLoS(0.2, 1).draw(Beginning(mlp(), start(), {}, tuple(PAIR), None, drawn("a")))
    g = drawn("a")
    net = plain()
    parts = [scores(net, s, g, "logit") for s in PAIR]
    total = torch.cat([(parts[0][n] + parts[1][n]).reshape(-1) for n in sorted(parts[0])])
    kept = total.argsort(stable=True)[: math.ceil(0.2 * len(total))]
    flat = torch.cat([together[n].reshape(-1) for n in sorted(together)])
    assert sorted(flat.nonzero()[:, 0].tolist()) == sorted(kept.tolist())
    end = run(cs.methods.talos(0.2, 1), PAIR, setting=cs.settings.multitask(PAIR, "task")).params
    assert all(torch.equal(end[n][~k], start()[n][~k]) for n, k in together.items())


def test_heads_of_tasks_are_trained_whole_and_experts_merge():
    model = cs.models.multi_head(cs.models.mlp(D, (5,)), C)
    schedule = cs.settings.merging(PAIR, scenario="task")
    merged = cs.run(schedule, cs.methods.talos(0.2) + cs.methods.ties(1.0), model, training())
    base = {n: p.double() for n, p in model.init(key(0, "init"))[0].items()}
    held = sum(int((merged.params[n] == p).sum()) for n, p in base.items())
    size = sum(p.numel() for p in base.values())
    assert size - 2 * math.ceil(0.2 * size) <= held < size
    grown = model.grow(base, {}, PAIR[0], key(0, "a", "grow"))[0]["heads.a.weight"]
    assert bool((merged.params["heads.a.weight"] != grown).all())


def test_stacked_clients_train_as_one_by_one():
    rounds = cs.settings.federated(PAIR, 2, scenario="task")
    one, two = (
        cs.run(rounds, cs.methods.talos(0.3), mlp(), training(), engine=engine).params
        for engine in ("serial", "batched")
    )
    near(one, two)


def test_scores_are_taken_with_the_running_statistics_of_the_start():
    norm = cs.models.wrap(lambda: nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, C)))
    params, buffers = ({n: t.double() for n, t in own.items()} for own in norm.init(key(0)))
    moved = {n: b + (torch.arange(5) * 3 if n.endswith("running_mean") else 0) for n, b in buffers.items()}
    s, found = PAIR[0], []
    for own in (buffers, moved):
        keep, _ = TaLoS(0.3, 1).draw(Beginning(norm, params, own, (s,), None, drawn("a")))
        layout = Layout.of(params)
        rows = torch.zeros(C)
        rows[list(s.classes)] = 1
        there = layout.flatten(
            {
                n: torch.ones_like(p) * (rows.view(-1, *[1] * (p.ndim - 1)) if n[0] == "2" else 1)
                for n, p in params.items()
            }
        )
        seen = Learned(norm, params, own, {}, s, s.task, layout, drawn("a"))
        scores = layout.flatten(fisher(seen, "model", TaLoS().samples, of=TaLoS().score)).masked_fill(
            there == 0, torch.inf
        )
        lowest = torch.zeros(layout.size).index_fill(
            0, scores.argsort(stable=True)[: TaLoS(0.3, 1).kept(int(there.sum()))], 1
        )
        found.append(layout.flatten({n: k.to(params[n]) for n, k in keep.items()}))
        assert torch.equal(found[-1].float(), lowest)
    assert not torch.equal(*found)


def test_where_sparse_training_refuses():
    heads = cs.models.multi_head(cs.models.random_features(D, 8), C)
    with pytest.raises(cs.Refusal, match="no trainable entry that tasks share"):
        run(cs.methods.talos(), PAIR, heads)
    broken = {n: torch.full_like(p, torch.nan) for n, p in start().items()}
    with pytest.raises((cs.ConsilienceError, RuntimeError)):
        TaLoS().draw(Beginning(mlp(), broken, {}, (PAIR[0],), None, drawn("a")))


def test_anchored_and_early_stopped_experts_are_there():
    """fedprox pulls to the base where experts are merged; epochs = 0 leaves it; half the work is half the
    plain loop's steps."""
    schedule = cs.settings.merging(PAIR, scenario="task")
    base = start()

    def away(method, **more):
        end = cs.run(schedule, method, mlp(), training(**more)).params
        return sum(float((end[n] - p).square().sum()) for n, p in base.items())

    assert 0 < away(cs.methods.fedprox(5.0)) < 0.7 * away(cs.methods.finetune())
    assert (
        away(cs.methods.finetune(), epochs=0)
        == 0
        < away(cs.methods.finetune(), epochs=1)
        < away(cs.methods.finetune())
    )
    early = cs.settings.merging([A], scenario="task", fraction=0.5)
    with pytest.raises(cs.ConsilienceError, match=r"`fraction` must be .*in \(0, 1\], got 0"):
        cs.settings.merging([A], fraction=0)
    net = plain()
    optimiser = torch.optim.SGD(net.parameters(), LR, 0.9)
    many = list(batches(A))
    for _, _, x, y in many[: len(many) // 2]:
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    near(cs.run(early, cs.methods.finetune(), mlp(), training()).params, entries(net))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"rounds": 2.5}, r"`rounds` must be a whole number >= 1, got 2.5"),
        ({"rounds": True}, "`rounds` must be .* got True"),
        ({"rounds": 0}, "`rounds` must be .* got 0"),
        (
            {"samples": 0.5},
            r"`samples` must be a whole number >= 1, or None for all, got 0.5",
        ),
        ({"samples": True}, "`samples` must be .* got True"),
        ({"samples": 0}, "`samples` must be .* got 0"),
        ({"density": True}, r"`density` must be a number in \(0, 1\], got True"),
        ({"density": "0.1"}, "`density` must be .* got '0.1'"),
        ({"density": math.nan}, "`density` must be .* got nan"),
        ({"density": 1.5}, "`density` must be .* got 1.5"),
    ],
)
def test_arguments_of_sparse_training_are_numbers(given, why):
    with pytest.raises(cs.ConsilienceError, match=why):
        TaLoS(**given)


# linearised models


INNER = {
    "mlp": (lambda: cs.models.mlp(D, (5,), C), (4, D)),
    "conv": (lambda: cs.models.conv(C, 1, 8, 2), (4, 1, 8, 8)),
    "group": (lambda: cs.models.resnet(20, C, 1, "group", 2), (4, 1, 8, 8)),
    "batch": (lambda: cs.models.resnet(20, C, 1, "batch", 2), (4, 1, 8, 8)),
    "frozen": (lambda: cs.models.frozen(cs.models.mlp(D, (5,), C), ("1.*",)), (4, D)),
    "heads": (lambda: cs.models.multi_head(cs.models.mlp(D, (5,)), C), (4, D)),
}


def tangent(name):
    """The linearised model, its own, parameters (with heads) in float64, buffers, an input and a
    direction."""
    make, shape = INNER[name]
    inner = make()
    model, g = cs.models.linearised(inner), key(3)
    params, buffers = model.init(key(0))
    for s in PAIR:
        params, buffers = model.grow(params, buffers, s, key(0, s.name))
    params = {n: p.double() for n, p in params.items()}
    jitter = {
        n: 0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64)
        for n, p in inner.init(key(0))[0].items()
    }
    for n, noise in jitter.items():  # away from kinks, where biases are 0
        params |= {k: params[k] + noise for k in (n, f"origin.{n}") if k in params}
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in buffers.items()}
    tau = {
        n: 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64)
        for n, p in params.items()
        if not model.frozen(n)
    }
    return model, inner, params, buffers, torch.rand(shape, generator=g, dtype=torch.float64), tau


def at(params, *taus):
    return {n: p + sum(t[n] for t in taus) if n in taus[0] else p for n, p in params.items()}


@pytest.mark.parametrize("name", list(INNER))
def test_a_tangent_is_the_model_where_it_touches_and_affine(name):
    model, inner, params, buffers, x, tau = tangent(name)

    def f(a):
        return model(at(params, {n: a * t for n, t in tau.items()}), buffers, x, None, True)[0]

    own = {n: p for n, p in params.items() if not n.startswith("origin.")}
    assert torch.equal(f(0.0), inner(own, buffers, x, None, False)[0])
    first, last = f(0.0), f(1.0)
    assert float((last - first).abs().max()) > 0.01
    for a in (-2.0, 0.3, 5.0):
        assert torch.allclose(f(a), (1 - a) * first + a * last, atol=1e-10)
    quotient = (
        inner(at(own, {n: 1e-6 * t for n, t in tau.items()}), buffers, x, None, False)[0] - first
    ) / 1e-6
    assert torch.allclose(last - first, quotient, atol=1e-3)


@pytest.mark.parametrize("name", list(INNER))
def test_the_gradient_of_a_tangent_is_that_of_the_model(name):
    """At theta_0; elsewhere J stays, so that it is the gradient at theta_0 of a loss of other outputs."""
    model, inner, params, buffers, x, tau = tangent(name)
    y = torch.arange(4) % C

    def grads(f, p):
        leaves = {n: p[n].clone().requires_grad_() for n in tau}
        loss = F.cross_entropy(f({**p, **leaves}, buffers, x, None, False)[0], y)
        return dict(
            zip(tau, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True)
        )

    for n, g in grads(model, params).items():
        assert torch.allclose(g, grads(inner, params)[n], atol=1e-12), n
    moved = at(params, tau)
    out = model(moved, buffers, x, None, False)[0].detach()
    by_output = (out.softmax(1) - F.one_hot(y, C)) / len(y)
    leaves = {n: params[n].clone().requires_grad_() for n in tau}
    wanted = torch.autograd.grad(
        inner({**params, **leaves}, buffers, x, None, False)[0], list(leaves.values()), by_output
    )
    for (n, g), w in zip(grads(model, moved).items(), wanted, strict=True):
        assert torch.allclose(g, w, atol=1e-10), n


@pytest.mark.parametrize("name", ["mlp", "group", "heads"])
def test_linear_models_merge_as_functions(name):
    model, _, params, buffers, x, tau = tangent(name)
    more = {n: 0.2 * torch.randn(t.shape, generator=key(9), dtype=torch.float64) for n, t in tau.items()}
    f = lambda *t: model(at(params, *t) if t else params, buffers, x, None, False)[0]  # noqa: E731
    assert torch.allclose(f(tau, more), f() + (f(tau) - f()) + (f(more) - f()), atol=1e-10)


def test_linearised_experts_train_and_merge_from_a_given_base():
    """The average of linear experts answers as their mean; theta_0 stays and is the base."""
    inner, base = mlp(), {n: p + 0.1 for n, p in start().items()}
    for model, given in (
        (cs.models.linearised(inner, base), None),
        (cs.models.linearised(inner), cs.models.linearised(inner).at(base)),
    ):
        schedule = cs.settings.merging(PAIR, base=given, scenario="task")
        merged = cs.run(schedule, cs.methods.average(), model, training())
        apart = [cs.run(alone(i, given), cs.methods.finetune(), model, training()) for i in (0, 1)]
        x = A.train.whole()[0]
        outs = [model(r.params, {}, x, None, False)[0] for r in (merged, *apart)]
        assert torch.allclose(outs[0], (outs[1] + outs[2]) / 2, atol=1e-10)
        for r in (merged, *apart):
            for n, p in base.items():
                assert torch.equal(r.params[f"origin.{n}"], p)
            assert not same({n: r.params[n] for n in base}, base)


def test_linearised_heads_and_sparse_linearised_training():
    model = cs.models.linearised(cs.models.multi_head(cs.models.mlp(D, (5,)), C))
    result = run(cs.methods.talos(0.2), PAIR, model)
    shared = [n for n in result.params if n.startswith("trunk.")]
    size = sum(result.params[n].numel() for n in shared)
    moved = sum(int((result.params[n] != result.params[f"origin.{n}"]).sum()) for n in shared)
    assert 0 < moved <= 2 * math.ceil(0.2 * size) < size
    assert not torch.equal(result.params["heads.b.bias"], result.params["origin.heads.b.bias"])
    assert model.task_of("origin.heads.b.bias") == "b" and model.frozen("origin.trunk.1.bias")
    rounds = cs.settings.federated(PAIR, 2, scenario="task")
    one, two = (
        cs.run(rounds, cs.methods.fedavg(), model, training(), engine=e).params for e in ("serial", "batched")
    )
    near(one, two)


@pytest.mark.parametrize("make", [lambda m: m, cs.models.linearised], ids=["plain", "linearised"])
def test_no_head_row_of_an_absent_class_is_kept(make):
    """Their score is 0, the lowest there is: they would take the whole budget."""
    model = make(cs.models.mlp(20, (16,), 10))
    halves = [source("low", 60, (0, 1), 1, 20), source("high", 60, (2, 3), 2, 20)]
    method, schedule = cs.methods.talos(0.2), cs.settings.merging(halves)
    first = params_of(model)
    for s in schedule.sources:
        keep, _ = TaLoS(0.2).draw(Beginning(model, first, {}, (replace(s, task=None),), None, drawn(s.name)))
        absent = [c for c in range(10) if c not in s.classes]
        assert not keep["3.weight"][absent].any() and not keep["3.bias"][absent].any()
        size = 16 * (20 + 1) + len(s.classes) * (16 + 1)
        assert sum(int(k.sum()) for k in keep.values()) == math.ceil(0.2 * size)
    end = cs.run(schedule, method, model, training()).params
    assert all(torch.equal(end[n][4:], first[n][4:]) for n in ("3.weight", "3.bias"))
    assert not same({n: end[n] for n in ("1.weight", "1.bias")}, first)


# batch norm


def normed():
    """A model with batch norm, and the state dict of a pretrained one, in float64."""

    def make():
        return nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, C))

    torch.manual_seed(0)
    net = make().double()
    for _ in range(30):
        net(3 + 2 * torch.randn(64, D, dtype=torch.float64))
    return cs.models.wrap(make), net.eval()


def test_a_linearised_model_has_the_pretrained_statistics():
    """At theta_0 it answers as the pretrained one, given to it or to a setting; both refuse statistics of
    other shapes."""
    inner, net = normed()
    told, x = net.state_dict(), A.test.whole()[0]
    for model, base in ((cs.models.linearised(inner, told), None), (cs.models.linearised(inner), told)):
        given = None if base is None else model.at(base)
        if given is not None:
            assert "origin.1.running_mean" not in given and torch.equal(
                given["origin.1.weight"], told["1.weight"]
            )
        agent = cs.run(alone(0, given), cs.methods.finetune(), model, training(epochs=0)).agent
        assert same(agent.state.buffers, dict(net.named_buffers()))
        assert torch.allclose(
            model(agent.state.params, agent.state.buffers, x, None, False)[0], net(x), atol=1e-12
        )
        trained = cs.run(
            cs.settings.merging(PAIR, base=given, scenario="task"), cs.methods.average(), model, training()
        ).agent.state
        assert same(trained.buffers, dict(net.named_buffers())) and not torch.equal(
            trained.params["0.weight"], told["0.weight"]
        )
    params, buffers = cs.models.linearised(inner, dict(net.named_parameters())).init(key(0))
    assert torch.equal(params["1.weight"], told["1.weight"]) and not buffers["1.running_mean"].any(), (
        "none given: those it begins with"
    )
    wrong = {**told, "1.running_var": torch.ones(4)}
    with pytest.raises(cs.ConsilienceError, match=r"'1.running_var' of \(5,\), got \(4,\)"):
        cs.models.linearised(inner, wrong)


def test_a_setting_begins_with_the_statistics_of_its_base():
    model, net = normed()
    told, x = net.state_dict(), A.test.whole()[0]
    begun = cs.run(alone(0, told), cs.methods.finetune(), model, training(epochs=0)).agent.state
    assert same(begun.buffers, dict(net.named_buffers()))
    assert torch.allclose(model(begun.params, begun.buffers, x, None, False)[0], net(x), atol=1e-12)
    first = {n: t.clone() for n, t in told.items()}
    end = cs.run(alone(0, told), cs.methods.finetune(), model, training(epochs=1)).agent.state.buffers
    assert same(told, first), "what is given stays"
    steps = -(-len(PAIR[0].train) // training().batch_size)
    assert end["1.num_batches_tracked"] == told["1.num_batches_tracked"] + steps
    net.train()
    optimiser = torch.optim.SGD(net.parameters(), LR, 0.9)
    hidden = torch.tensor([c not in PAIR[0].classes for c in range(C)])
    for _, _, bx, by in batches(PAIR[0], epochs=1):
        optimiser.zero_grad()
        F.cross_entropy(net(bx).masked_fill(hidden, -torch.inf), by).backward()
        optimiser.step()
    near(
        {n: b for n, b in end.items() if b.is_floating_point()},
        {n: net.state_dict()[n] for n in ("1.running_mean", "1.running_var")},
    )
    with pytest.raises(
        cs.ConsilienceError,
        match=r"`base` must have the shapes of the model, got \(4,\) for '1.running_mean', whose",
    ):
        cs.run(alone(0, {**told, "1.running_mean": torch.zeros(4)}), cs.methods.finetune(), model, training())


def test_analyses_judge_by_the_statistics_of_checkpoints():
    model, net = normed()
    base = {n: b.clone() for n, b in net.state_dict().items()}
    moved = {
        n: 2 * torch.randn(p.shape, generator=key(5, n), dtype=torch.float64)
        for n, p in net.named_parameters()
    }
    params = [{**base, **{n: base[n] + (1 if i == 0 else -1) * t for n, t in moved.items()}} for i in (0, 1)]
    shifted = [
        {**p, "1.running_mean": p["1.running_mean"] + 4 * (i + 1), "1.running_var": p["1.running_var"] * 9}
        for i, p in enumerate(params)
    ]

    def right(entries, s):
        net.load_state_dict(entries)
        x, y = s.test.whole()
        return float(
            (torch.tensor(s.classes)[net.eval()(x)[:, list(s.classes)].argmax(1)] == y).double().mean()
        )

    for experts_ in (params, shifted):
        found = transfer_matrix(model, base, experts_, PAIR)
        assert found.base == tuple(pytest.approx(right(base, s)) for s in PAIR)
        assert found.accuracies == tuple(tuple(pytest.approx(right(e, s)) for s in PAIR) for e in experts_)
    held = {n: base[n] for n in dict(net.named_buffers())}
    bare = [{n: t for n, t in e.items() if n not in held} for e in (base, *params)]
    wanted = transfer_matrix(model, base, params, PAIR)
    assert (
        transfer_matrix(model, bare[0], bare[1:], PAIR, held)
        == transfer_matrix(model, base, shifted, PAIR, held)
        == wanted
    )
    assert wanted != transfer_matrix(model, bare[0], bare[1:], PAIR) and wanted != transfer_matrix(
        model, base, shifted, PAIR
    )
    grid = (-1.0, 0.0, 1.0)
    d = disentanglement(model, base, params, PAIR, grid)
    assert (
        d
        == disentanglement(model, bare[0], bare[1:], PAIR, grid, held)
        == disentanglement(model, base, bare[1:], PAIR, grid)
    )
    assert d != disentanglement(model, bare[0], bare[1:], PAIR, grid)
    steps = [{**p, "1.num_batches_tracked": torch.tensor(7)} for p in params]
    assert (
        d
        == disentanglement(model, base, steps, PAIR, grid)
        == disentanglement(model, base, shifted, PAIR, grid, held)
    )
    with pytest.raises(
        cs.ConsilienceError, match=r"base's buffers.*got others in '1.running_mean' of expert 1"
    ):
        disentanglement(model, base, [params[0], shifted[1]], PAIR, grid)
    with pytest.raises(cs.ConsilienceError, match=r"got \(4,\) for '1.running_var' of expert 0, here \(5,\)"):
        transfer_matrix(model, base, [{**params[0], "1.running_var": torch.ones(4)}, params[1]], PAIR)


def test_what_cannot_be_linearised_is_refused():
    with pytest.raises(cs.ConsilienceError, match=r"must be a Model.*got Linear"):
        cs.models.linearised(nn.Linear(2, 2))
    with pytest.raises(cs.ConsilienceError, match="twice"):
        cs.models.linearised(cs.models.linearised(mlp()))
    with pytest.raises(
        cs.ConsilienceError, match=r"`base` must have the model's entries, '3.bias' of \(4,\), got none"
    ):
        cs.models.linearised(mlp(), {n: p for n, p in start().items() if n != "3.bias"})
    with pytest.raises(cs.ConsilienceError, match="got none called 'origin"):
        run(
            cs.methods.finetune(),
            PAIR,
            cs.models.linearised(mlp()),
            cs.settings.merging(PAIR, base=start(), scenario="task"),
        )
    with pytest.raises(cs.ConsilienceError, match="one linear head"):
        cs.models.linearised(mlp()).head({}, None)


# analyses


def experts(method, model, base):
    """The parameters of an expert for each of the pair, from one base."""
    return [cs.run(alone(i, base), method, model, training()).params for i in (0, 1)]


def test_the_error_of_disentanglement_is_the_restated_one():
    params = [
        at(
            start(),
            {
                n: 0.5 * torch.randn(p.shape, generator=key(i, n), dtype=torch.float64)
                for n, p in start().items()
            },
        )
        for i in (1, 2)
    ]
    found = disentanglement(mlp(), start(), params, PAIR, (-1.0, 0.0, 0.5, 1.0))

    def answers(s, a, b):
        net = plain(
            params={n: p + a * (params[0][n] - p) + b * (params[1][n] - p) for n, p in start().items()}
        )
        return net(s.test.whole()[0])[:, list(s.classes)].argmax(1)

    for i, a in enumerate(found.coefficients):
        for j, b in enumerate(found.coefficients):
            wanted = (answers(PAIR[0], a, 0) != answers(PAIR[0], a, b)).double().mean()
            wanted += (answers(PAIR[1], 0, b) != answers(PAIR[1], a, b)).double().mean()
            assert found.errors[i][j] == pytest.approx(float(wanted), abs=1e-12)
    assert found.errors[1][1] == 0 < found.mean


def test_task_vectors_that_act_on_other_inputs_are_disentangled():
    """Task a lives in the first inputs, b in the others: a linear model's task vectors in their own columns
    disturb nothing."""
    half = torch.tensor([1.0] * 3 + [0.0] * 3, dtype=torch.float64)
    apart = [s.map(x=lambda x, m=m: x * m) for s, m in zip(PAIR, (half, 1 - half), strict=True)]
    model = cs.models.linear(D, C)
    base = {n: p.double() for n, p in model.init(key(0))[0].items()}
    tau = torch.randn(C, D, generator=key(1), dtype=torch.float64)
    params = [{**base, "1.weight": base["1.weight"] + 3 * tau * m} for m in (half, 1 - half)]
    assert disentanglement(model, base, params, apart).mean == 0
    assert disentanglement(model, base, params[::-1], apart).mean > 0.1
    found = transfer_matrix(model, base, params, apart)
    assert found.others == 0 and found.accuracies[0][1] == found.base[1] != found.accuracies[1][1]


def test_a_transfer_matrix_is_a_table_of_accuracies():
    base = start()
    params = experts(cs.methods.finetune(), mlp(), base)
    found = transfer_matrix(mlp(), base, params, PAIR)
    for i, p in enumerate([*params, base]):
        for j, s in enumerate(PAIR):
            x, y = s.test.whole()
            right = float(
                (torch.tensor(s.classes)[plain(params=p)(x)[:, list(s.classes)].argmax(1)] == y)
                .double()
                .mean()
            )
            assert (found.base[j] if i == 2 else found.accuracies[i][j]) == pytest.approx(right, abs=1e-12)
            if i < 2:
                assert found.ratios[i][j] == pytest.approx(right / found.base[j])
    assert found.own == pytest.approx((found.accuracies[0][0] + found.accuracies[1][1]) / 2)
    still = transfer_matrix(mlp(), base, [base, base], PAIR)
    assert still.others == 0 and still.ratios == ((1.0, 1.0), (1.0, 1.0))


def test_sparse_experts_leave_other_tasks_alone_on_real_digits():
    """A conv net trained on half of the digits, then on pairs of the other half, its head held: as good on
    their own, nearer to 1 elsewhere."""
    whole = cs.data.digits().map(x=lambda x: x.view(-1, 1, 8, 8))
    order = torch.randperm(len(whole.train), generator=key(0))
    halves = [replace(whole, train=whole.train.select(part)) for part in order.chunk(2)]
    model = cs.models.conv(10, 1, 8, 8)
    base = cs.run(
        cs.settings.continual(halves[:1]),
        cs.methods.finetune(),
        model,
        cs.Training(epochs=3, lr=0.05, momentum=0.9),
    ).params
    tasks, model = cs.data.split_classes(halves[1], 5), cs.models.frozen(model, ("7.*",))

    def transfer(method):
        found = []
        for s in tasks:
            plan = lambda seed, s=s: iter([Train({"agent": (s.name,)}), Evaluate("end")])  # noqa: E731
            schedule = build("alone", tasks, "task", plan, "agent", base=base)
            found.append(cs.run(schedule, method, model, cs.Training(epochs=5, lr=0.1, momentum=0.9)).params)
        return transfer_matrix(model, base, found, schedule.sources)

    full, sparse = transfer(cs.methods.finetune()), transfer(cs.methods.talos(0.7, rounds=2, reached=True))
    assert sparse.others < 0.6 * full.others
    assert sparse.own > full.own - 0.02 > sum(full.base) / 5


def test_heads_are_those_of_their_own_experts():
    model = cs.models.multi_head(cs.models.mlp(D, (5,)), C)
    base = {n: p.double() for n, p in model.init(key(0, "init"))[0].items()}
    params = experts(cs.methods.finetune(), model, base)
    heads = {n: p for p_i in params for n, p in p_i.items() if n.startswith("heads.")}
    assert any(n.startswith("heads.a") for n in heads) and any(n.startswith("heads.b") for n in heads)
    found = transfer_matrix(model, base, params, PAIR)
    x, y = PAIR[1].test.whole()
    h = (x @ params[0]["trunk.1.weight"].T + params[0]["trunk.1.bias"]).relu()
    out = h @ heads["heads.b.weight"].T + heads["heads.b.bias"]
    assert found.accuracies[0][1] == pytest.approx(float((out.argmax(1) + 2 == y).double().mean()))
    assert disentanglement(model, base, params, PAIR, (0.0, 1.0)).errors[0][0] == 0


def test_analyses_are_written(tmp_path):
    d = Disentanglement(("a", "b"), (0.0, 1.0), ((0.0, 0.5), (0.25, 1.0)))
    assert d.table().splitlines()[0].split() == ["a", "x", "b", "0", "1"] and d.table().splitlines()[
        3
    ].split() == [
        "1",
        "0.250",
        "1.000",
    ]
    t = Transfer(("a", "b"), (0.5, 0.0), ((1.0, 0.5), (0.25, 0.5)))
    assert t.ratios[0] == (2.0, pytest.approx(math.nan, nan_ok=True)) and t.others == 0.5 and t.own == 0.75
    assert "base (accuracy)" in t.table() and "2.000" in t.table()
    for thing in (d, t):
        text = thing.write(tmp_path / "figure.svg").read_text()
        assert text.startswith("<svg") and "<title>" in text and thing.tasks[0] in text
    with pytest.raises(cs.ConsilienceError, match=r"\.svg"):
        d.write(tmp_path / "figure.png")


def test_what_cannot_be_analysed_is_refused():
    params = [start(), start()]
    for sources, given, more, why in (
        (PAIR[:1], params[:1], {}, "two tasks"),
        (PAIR, params, {"coefficients": ()}, "finite, and at least one"),
        (PAIR, params, {"coefficients": (math.inf,)}, "finite, and at least one"),
        ([source("v", kind="value"), PAIR[1]], params, {}, "needs a source of classes"),
        (
            PAIR,
            [start(), {**start(), "1.bias": torch.zeros(3)}],
            {},
            r"base's shapes, got \(3,\) for '1.bias' of expert 1",
        ),
        (PAIR, [start(), {"1.bias": start()["1.bias"]}], {}, "got none called '1.weight' in expert 1"),
    ):
        with pytest.raises(cs.ConsilienceError, match=why):
            disentanglement(mlp(), start(), given, sources, **more)
    with pytest.raises(cs.ConsilienceError, match="an expert for each source"):
        transfer_matrix(mlp(), start(), params, PAIR[:1])
    with pytest.raises(cs.ConsilienceError, match=r"`base` must have the model's entries"):
        transfer_matrix(mlp(), {}, params, PAIR)


def test_the_command_line_has_both(capsys):
    from consilience.cli.main import main

    chosen = [
        "--setting",
        "merging",
        "--setting.scenario",
        "task",
        "--data",
        "digits",
        "--split",
        "classes",
        "--split.n",
        "2",
    ]
    chosen += [
        "--model",
        "mlp+linearised",
        "--method",
        "talos+ties",
        "--method.talos.density",
        "0.9",
        "--training.epochs",
        "1",
    ]
    assert main(["run", *chosen]) == 0
    assert "model linearised(mlp)" in capsys.readouterr().out
