"""Buffers and their policies, iCaRL, GDumb, training from scratch, less-forgetting, streams without ends:
restatements and limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience as cs
from consilience.core.buffer import Reservoir, equal_shares
from consilience.core.contexts import Context
from consilience.core.params import key, same
from consilience.core.source import Source, Tensors
from consilience.memory.policies import ClassBalanced, Growing, Herding
from restate import LR, A, B, C, D, E, batches, entries, final, fit, mlp, near, plain, source, training

SOURCES = [source("a", 30, (0, 1), 1), source("b", 21, (2, 3), 2), source("c", 26, (1, 2), 3)]


def memory_of(result, name):
    return result.agent.state.memory[name]


def kept(method, name="ER", sources=SOURCES, **more):
    """(x, y) in the buffer after these sources, in the order of learning."""
    r = cs.run(cs.settings.continual(sources, "class"), method, mlp(), training(epochs=1, **more))
    items = memory_of(r, name)
    return {s.name: (items[s.name].tensors["x"], items[s.name].tensors["y"]) for s in sources}, r


# policies


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 45), st.integers(0, 99))
def test_equal_shares_fill_the_buffer_and_no_class_could_have_more(y, size, seed):
    y = torch.tensor(y)
    keys = torch.rand(len(y), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keep = equal_shares(keys, y, size)
    assert int(keep.sum()) == min(size, len(y))
    counts, own = y[keep].bincount(minlength=5), y.bincount(minlength=5)
    most = int(counts.max())
    for c in range(5):
        assert counts[c] >= min(
            int(own[c]), most - 1
        )  # water filling: a class has less only if it has no more
        mine = keys[y == c].sort().values
        assert torch.equal(keys[(y == c) & keep].sort().values, mine[: counts[c]])  # the smallest keys


@pytest.mark.parametrize("policy", [Reservoir(), ClassBalanced(), Growing()])
def test_what_is_kept_does_not_depend_on_when_it_was_thrown_away(policy):
    """Shrinking step by step is shrinking at once."""
    g = torch.Generator().manual_seed(0)
    keys, y = torch.rand(60, generator=g, dtype=torch.float64), torch.randint(4, (60,), generator=g)
    at_once = policy.keep(keys, y, 7)
    held = torch.zeros(60, dtype=torch.bool)
    for upto in (20, 40, 60):
        index = torch.cat([held[: upto - 20].nonzero()[:, 0], torch.arange(upto - 20, upto)])
        now = policy.keep(keys[index], y[index], 7)
        held = torch.zeros(60, dtype=torch.bool)
        held[index[now]] = True
    assert torch.equal(held, at_once)


def test_the_ring_keeps_the_last_of_each_class():
    found, _ = kept(cs.methods.er(8, 4, cs.memory.ring()))
    for c in range(C):
        stream = torch.cat([s.train.x[s.train.y == c] for s in SOURCES])
        mine = torch.cat([x[y == c] for x, y in found.values()])
        assert len(mine) == 2 and torch.equal(mine, stream[-2:])


def test_class_balanced_is_a_reservoir_of_each_class():
    from scipy.stats import chi2

    n, runs, policy = 12, 1000, ClassBalanced()
    y, counts = torch.tensor([0] * 9 + [1] * 3), torch.zeros(n)
    g = torch.Generator().manual_seed(0)
    for _ in range(runs):
        counts += policy.keep(torch.rand(n, generator=g, dtype=torch.float64), y, 5)
    assert (counts[9:] <= runs).all() and abs(float(counts.sum()) - 5 * runs) == 0
    p = float(counts[:9].sum()) / 9 / runs
    assert p == pytest.approx(2.5 / 9, abs=0.07)  # the odd place goes to either class
    statistic = float(((counts[:9] - runs * p) ** 2 / (runs * p * (1 - p))).sum()) * 8 / 9
    assert chi2.ppf(1e-4, 8) < statistic < chi2.ppf(1 - 1e-4, 8)


def test_growing_keeps_so_many_of_each_class():
    found, _ = kept(cs.methods.er(3, 4, cs.memory.growing()))
    assert torch.cat([y for _, y in found.values()]).bincount(minlength=C).tolist() == [3, 3, 3, 3]


def test_herding_restated():
    """Algorithm 4 of iCaRL, one exemplar after another."""
    found, r = kept(cs.methods.er(16, 4, cs.memory.herding()), sources=SOURCES[:2])
    net, (x, y) = plain(params=r.params), SOURCES[1].train.whole()
    psi = net[:3](x)
    psi = (psi / psi.norm(dim=1, keepdim=True)).detach()
    for c in (2, 3):
        own, chosen = psi[y == c], []
        for k in range(1, 5):
            gaps = [
                float((own.mean(0) - (own[i] + sum(own[j] for j in chosen)) / k).norm())
                for i in range(len(own))
            ]
            chosen.append(min((i for i in range(len(own)) if i not in chosen), key=gaps.__getitem__))
        bx, by = found["b"]
        assert torch.equal(bx[by == c], x[y == c][sorted(chosen)])


def test_herding_keeps_the_first_when_it_shrinks():
    keys, y = (
        torch.tensor([0.0, torch.inf, 2, 1, 0, 1, torch.inf]).double(),
        torch.tensor([0, 0, 0, 0, 1, 1, 1]),
    )
    assert Herding().keep(keys, y, 7).tolist() == [True, False, True, True, True, True, False]
    assert Herding().keep(keys, y, 4).tolist() == [True, False, False, True, True, True, False]
    assert Herding().keep(keys, y, 2).tolist() == [True, False, False, False, True, False, False]


def test_buffers_refuse():
    values = [source("a", 30, kind="value"), source("b", 30, kind="value", seed=1)]
    for schedule, method, says in (
        (cs.settings.continual(SOURCES), cs.methods.er(3), "has no place for each of the 4 classes"),
        (cs.settings.continual(SOURCES), cs.methods.icarl(3), "has no place for each of the 4 classes"),
        (cs.settings.continual(SOURCES), cs.methods.gdumb(2), "use a larger `size`"),
        (
            cs.settings.continual(values),
            cs.methods.er(policy=cs.memory.ring()),
            "use policy=memory.reservoir",
        ),
        (
            cs.settings.continual(values),
            cs.methods.icarl(),
            "ICaRL needs targets that are classes, and here some are values; use er",
        ),
        (cs.settings.continual(values), cs.methods.gdumb(), "GDumb needs targets that are classes"),
        (
            cs.settings.online(SOURCES),
            cs.methods.er(policy=cs.memory.herding()),
            "chooses at the end of a source",
        ),
    ):
        with pytest.raises(cs.Refusal, match=says):
            cs.run(schedule, method, training=cs.Training(epochs=1))
    with pytest.raises(cs.ConsilienceError, match="`policy` must be made by consilience.memory"):
        cs.methods.er(policy="ring")
    with pytest.raises(cs.Refusal, match="one linear head on the features"):
        cs.run(cs.settings.continual(SOURCES), cs.methods.icarl(), cs.models.multi_head(mlp(), C))


# iCaRL


def herded(net, s, classes, share):
    """The exemplars of a source under this network."""
    x, y = s.train.whole()
    psi = F.normalize(net[:3](x), dim=1).detach()
    index = []
    for c in classes:
        own, total = (y == c).nonzero()[:, 0].tolist(), torch.zeros(5).double()
        mean, left = psi[own].mean(0), list(own)
        for k in range(1, share + 1):
            best = min(left, key=lambda i: float((mean - (psi[i] + total) / k).norm()))
            left.remove(best)
            index.append(best)
            total = total + psi[best]
    index = sorted(index)
    return x[index], y[index]


def test_icarl_restated():
    a, b = SOURCES[:2]
    net = plain()
    seen = [0, 1]

    def loss(net, x, y, epoch, step):
        target = F.one_hot(y, C).double()
        if old is not None:
            target[:, :2] = old(x)[:, :2].sigmoid().detach()
        return F.binary_cross_entropy_with_logits(net(x)[:, seen], target[:, seen], reduction="sum") / len(x)

    old = None
    fit(net, a, loss)
    ax, ay = herded(net, a, (0, 1), 4)
    old, seen = plain(params=entries(net)), [0, 1, 2, 3]
    pool = Source.union("a+b", [replace(a, train=Tensors(ax, ay)), b])
    fit(net, pool, loss, visit=1)
    r = cs.run(cs.settings.continual([a, b], "class"), cs.methods.icarl(8), mlp(), training())
    near(r.params, entries(net), 1e-10)

    means = torch.zeros(
        C, 5
    ).double()  # old exemplars were chosen by the old features and are seen by the new
    bx, by = herded(net, b, (2, 3), 2)
    ax, ay = herded(old, a, (0, 1), 2)
    for c in range(C):
        x = torch.cat([ax[ay == c], bx[by == c]])
        means[c] = F.normalize(F.normalize(net[:3](x), dim=1).mean(0), dim=0).detach()
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nearest = torch.cdist(F.normalize(net[:3](x), dim=1), means).argmin(1)
    assert torch.equal(r.predict(x).argmax(1), nearest)
    assert len(set(nearest.tolist())) > 1 and not torch.equal(net(x).argmax(1), nearest)
    held = memory_of(r, "ICaRL")
    assert sum(len(i.tensors["y"]) for i in held.values()) == 8


def test_unseen_classes_have_no_mean():
    r = cs.run(cs.settings.continual(SOURCES, "class"), cs.methods.icarl(8), mlp(), training(epochs=1))
    assert (r.matrix[1, 1] == 0) and (r.matrix[1, 0] > 0.4)


# baselines


def test_gdumb_restated():
    """Balanced keys, a pool that is repeated to the length of the source, new parameters."""
    a, b = SOURCES[:2]
    net = plain()

    def drawn(s):
        return torch.rand(len(s.train), generator=key(0, s.name, 0, "GDumb", "begin"), dtype=torch.float64)

    def chosen(pairs, size):
        keep = equal_shares(torch.cat([k for _, k in pairs]), torch.cat([s.train.y for s, _ in pairs]), size)
        return [
            replace(s, train=s.train.select(k.nonzero()[:, 0]))
            for (s, _), k in zip(pairs, keep.split([len(k) for _, k in pairs]), strict=True)
        ]

    def repeated(s, n):
        return replace(s, train=s.train.select(torch.arange(n) % len(s.train)))

    fit(net, repeated(chosen([(a, drawn(a))], 8)[0], 30))
    both = chosen([(b, drawn(b)), (a, drawn(a))], 8)
    g = key(0, "b", 0, "GDumb", "begin")
    torch.rand(len(b.train), generator=g, dtype=torch.float64)
    net = plain(params=mlp().init(g)[0])
    fit(net, repeated(Source.union("a+b", both[::-1]), 21), visit=1)
    r = cs.run(cs.settings.continual([a, b], "class"), cs.methods.gdumb(8), mlp(), training())
    near(r.params, entries(net))
    y = torch.cat([i.tensors["y"] for i in memory_of(r, "GDumb").values()])
    assert y.bincount().tolist() == [2, 2, 2, 2]
    for s in both:
        assert torch.equal(memory_of(r, "GDumb")[s.name].tensors["x"], s.train.x)  # what it was trained on


def test_from_scratch_and_joint_begin_anew():
    r = cs.run(cs.settings.continual([A, B], "domain"), cs.methods.from_scratch(), mlp(), training())
    net = plain(params=mlp().init(key(0, "b", 0, "FromScratch", "begin"))[0])
    near(r.params, entries(fit(net, B)))
    net = plain(params=mlp().init(key(0, "b", 0, "Cumulative", "begin"))[0])
    fit(net, Source.union("a+b", [A, B]), visit=1)
    near(final(cs.settings.continual([A, B], "domain"), cs.methods.joint()), entries(net))


def test_from_scratch_draws_new_heads_too():
    sources = [source("a", 24, (0, 1), 1), source("b", 24, (2, 3), 2)]
    model = cs.models.multi_head(mlp(), C)
    r = cs.run(cs.settings.continual(sources, "task"), cs.methods.from_scratch(), model, training(epochs=0))
    assert not torch.equal(
        r.params["heads.b.weight"],
        model.grow(*model.init(key(0, "init")), sources[1], key(0, "b", "grow"))[0][
            "heads.b.weight"
        ].double(),
    )


# less-forgetting, batches in place of the Fisher


@pytest.mark.parametrize("freeze", [True, False])
def test_less_forgetting_restated(freeze):
    a, b = SOURCES[:2]
    net = fit(plain(), a)
    old, velocity = plain(params=entries(net)), None
    for _, _, x, y in batches(b):
        apart = 0.5 * (net[:3](x) - old[:3](x).detach()).square().sum(1).mean()
        grads = torch.autograd.grad(F.cross_entropy(net(x), y) + 0.7 * apart, list(net.parameters()))
        grads = [g.clone() for g in grads]
        if freeze:
            for g in grads[2:]:
                g[[0, 1]] = 0
        velocity = grads if velocity is None else [0.9 * v + g for v, g in zip(velocity, grads, strict=True)]
        with torch.no_grad():
            for p, v in zip(net.parameters(), velocity, strict=True):
                p -= LR * v
    r = cs.run(
        cs.settings.continual([a, b], "class"), cs.methods.less_forgetting(0.7, freeze), mlp(), training()
    )
    near(r.params, entries(net))
    if freeze:
        assert torch.equal(net[3].weight[:2], old[3].weight[:2])


def test_less_forgetting_refuses_frozen_features():
    with pytest.raises(cs.Refusal, match="the features are frozen"):
        cs.run(
            cs.settings.continual(SOURCES), cs.methods.less_forgetting(), cs.models.random_features(D, 8, C)
        )


def test_squared_batches_are_named_as_what_they_are():
    """The mean over batches of 32 of the squared mean gradient; and far from the Fisher."""
    s, late = source("a", 70, (0, 1, 2, 3), 5), source("b", 9, seed=6)
    found = {}
    for labels in ("batches", "data"):
        r = cs.run(
            cs.settings.continual([late, s], "domain"), cs.methods.ewc(labels=labels), mlp(), training()
        )
        found[labels] = r.agent.state.bank["agent", "a"].items["EWC"].group("precision")
        if labels == "data":
            continue
        net, (x, y) = plain(params=r.params), s.train.whole()
        total = [torch.zeros_like(p) for p in net.parameters()]
        for i in torch.randperm(70, generator=key(0, "a", 0, "EWC", "summarise")).split(32):
            for t, g in zip(
                total,
                torch.autograd.grad(F.cross_entropy(net(x[i]), y[i]), list(net.parameters())),
                strict=True,
            ):
                t += g.square() / 3
        near(found[labels], dict(zip(entries(net), total, strict=True)))
    assert sum(float(t.sum()) for t in total) < 0.5 * sum(float(f.sum()) for f in found["data"].values())


# streams


def test_a_stream_is_seen_once_and_judged_by_source():
    sources = [source("a", 50, (0, 1), 1), source("b", 35, (2, 3), 2)]
    schedule = cs.settings.online(sources, 16)
    assert [s.name for s in schedule.sources] == ["a/0", "a/1", "a/2", "a/3", "b/0", "b/1", "b/2"]
    x = torch.cat([s.train.x for s in schedule.sources[:4]])
    assert torch.equal(x.sort(0).values, sources[0].train.x.sort(0).values)
    r = cs.run(schedule, cs.methods.finetune(), mlp(), training(epochs=1))
    assert (
        r.sources == ("a", "b")
        and r.stages == ("a", "b")
        and r.learned_at == (1, 2)
        and r.matrix.shape == (3, 2)
    )
    assert r.forgetting is not None
    net = plain()
    for s in schedule.sources:
        fit(net, s, epochs=1)
    near(r.params, entries(net))
    with pytest.raises(cs.ConsilienceError, match="seen once, so `epochs` must be 1"):
        cs.run(schedule, cs.methods.finetune(), mlp(), training(epochs=2))


def test_methods_that_need_ends_say_so():
    for name in ("ewc", "si", "mas", "l2sp", "lwf", "less_forgetting", "gem", "icarl"):
        with pytest.raises(
            cs.Refusal, match="needs to know where a source ends, and this stream has no ends"
        ):
            cs.run(cs.settings.online(SOURCES, 16), getattr(cs.methods, name)(), mlp(), training(epochs=1))
    for name in (
        "er",
        "er_ace",
        "der",
        "derpp",
        "agem",
        "online_ewc",
        "gdumb",
        "joint",
        "cumulative",
        "fed3r",
    ):
        r = cs.run(cs.settings.online(SOURCES, 16), getattr(cs.methods, name)(), mlp(), training(epochs=1))
        assert r.matrix.shape == (4, 3)


def test_a_common_test_is_one_column():
    sources = [replace(s, test=A.test) for s in (A, B, E)]
    r = cs.run(cs.settings.continual(sources, "domain"), cs.methods.finetune(), mlp(), training(epochs=1))
    assert r.sources == ("a/test",) and r.matrix.shape == (4, 1) and r.forgetting is None
    labelled = cs.run(
        cs.settings.continual(sources, "task"), cs.methods.finetune(), mlp(), training(epochs=1)
    )
    assert labelled.matrix.shape == (4, 3)


# curves and metrics


def test_the_learning_curve_inside_a_task():
    r = cs.run(
        cs.settings.continual([A, B], "domain"),
        cs.methods.finetune(),
        mlp(),
        training(epochs=3),
        curve_steps=2,
    )
    assert [(p["source"], p["epoch"], p["step"]) for p in r.learning_curve[:6]] == [
        ("a", e, i) for e in range(3) for i in (2, 4)
    ]
    assert [p["source"] for p in r.learning_curve].count("b") == 4  # 9 steps
    assert r.learning_curve[5]["score"] == r.matrix[1, 0]  # the last step of the source
    again = cs.Result.from_json(r.to_json())
    assert again.learning_curve == r.learning_curve
    with pytest.raises(cs.ConsilienceError, match="`curve_steps` must be >= 1"):
        cs.run(cs.settings.continual([A, B]), cs.methods.finetune(), curve_steps=0)


def test_curves_by_source_and_what_is_left():
    r = cs.run(cs.settings.continual([A, B], "domain"), cs.methods.finetune(), mlp(), training())
    assert r.of_source("b") == r.matrix[:, 1].tolist() and r.first_source == r.matrix[:, 0].tolist()
    m = r.matrix
    assert r.normalised == pytest.approx((m[2, 0] / m[1, 0] + m[2, 1] / m[2, 1]) / 2)
    with pytest.raises(cs.ConsilienceError, match="source"):
        r.of_source("nowhere")


# they work


@pytest.fixture(scope="module")
def digits():
    return cs.data.split_classes(cs.data.digits(), 5)


def test_they_learn_the_digits(digits):
    t = cs.Training(epochs=8, lr=0.1)
    scores = {
        n: cs.run(cs.settings.continual(digits), getattr(cs.methods, n)(), training=t).score
        for n in ("finetune", "icarl", "gdumb", "joint")
    }
    assert scores["finetune"] < 0.3
    assert min(scores[n] for n in scores if n != "finetune") > 0.8, scores


@pytest.mark.parametrize("policy", ["ring", "class_balanced", "herding", "growing"])
def test_every_policy_remembers(digits, policy):
    size = 10 if policy == "growing" else 100
    r = cs.run(
        cs.settings.continual(digits),
        cs.methods.derpp(size, policy=getattr(cs.memory, policy)()),
        training=cs.Training(lr=0.1),
    )
    assert r.score > 0.7


# resume


@pytest.mark.parametrize("name", ["icarl", "gdumb", "joint", "from_scratch", "less_forgetting", "er"])
def test_interrupted_in_a_later_source_and_resumed(name, tmp_path):
    def stop(line):
        if line.get("event") == "checkpoint" and line.get("source") == "c" and line["epoch"] == 1:
            raise KeyboardInterrupt

    def go(out, **more):
        method = cs.methods.er(8, 4, cs.memory.herding()) if name == "er" else getattr(cs.methods, name)()
        return cs.run(
            cs.settings.continual(SOURCES, "class"),
            method,
            mlp(),
            training(epochs=3),
            out=out,
            checkpoint_steps=1,
            curve_steps=2,
            **more,
        )

    whole = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", progress=stop)
    again = go(tmp_path / "cut", resume=True)
    assert same(whole.params, again.params) and (whole.matrices == again.matrices).all()
    assert again.learning_curve == whole.learning_curve


# found in review


def test_er_ace_replays_its_own_source_as_if_it_were_in_the_buffer():
    """A share n_source / n_seen of the buffer's batch is the source's own."""
    ace = cs.methods.er_ace(20, 4000).corrections[0]
    r = cs.run(
        cs.settings.continual(SOURCES[:2], "class"), cs.methods.er_ace(20, 8), mlp(), training(epochs=1)
    )
    known = ace.recall(r.agent.memory(ace), (SOURCES[1],))
    assert known[1] == 30
    (part,) = ace.sample(Context(recalled=known), (SOURCES[1],), key(0))
    own = torch.isin(part.y, torch.tensor([2, 3])).double().mean()
    assert float(own) == pytest.approx(21 / 51, abs=0.03)


def test_joint_training_begins_anew_with_all_heads():
    sources = [source("a", 24, (0, 1), 1), source("b", 24, (2, 3), 2)]
    for model in (cs.models.multi_head(mlp(), C), cs.models.progressive(D, (5,), C)):
        for method in (cs.methods.joint(), cs.methods.gdumb(8), cs.methods.from_scratch()):
            r = cs.run(cs.settings.continual(sources, "task"), method, model, training(epochs=0))
            first = cs.run(
                cs.settings.continual(sources[:1], "task"), cs.methods.finetune(), model, training(epochs=0)
            )
            assert all(
                not torch.equal(r.params[n], p)
                for n, p in first.params.items()
                if p.numel() and n.endswith("weight")
            )


def test_an_untaught_task_of_icarl_is_a_guess_and_no_nan():
    r = cs.run(cs.settings.continual(SOURCES[:2], "task"), cs.methods.icarl(8), mlp(), training(epochs=1))
    assert torch.isfinite(torch.tensor(r.matrix)).all()
    x = SOURCES[0].test.whole()[0]
    one = cs.run(
        cs.settings.continual(SOURCES[:1] + SOURCES[1:2], "task"),
        cs.methods.icarl(8),
        mlp(),
        training(epochs=1),
    )
    assert torch.isfinite(one.predict(x, "b")).all()


def test_only_one_part_says_what_a_learn_trains_on():
    with pytest.raises(cs.Refusal, match="got Cumulative and GDumb"):
        cs.run(cs.settings.continual(SOURCES), [cs.methods.joint(), cs.methods.gdumb()], mlp())


def test_a_common_test_has_no_task():
    sources = [replace(s, test=A.test, task=f"t{i}") for i, s in enumerate(SOURCES[:2])]
    schedule = cs.settings.continual(sources, "class")
    r = cs.run(
        schedule, cs.methods.xdg() + cs.methods.infer(cs.mappers.min_entropy()), mlp(), training(epochs=1)
    )
    assert r.mapper_accuracy is not None and r.mapper_accuracy != r.mapper_accuracy  # undefined, and not 0
    with pytest.raises(cs.Refusal, match="is given the true task of test data"):
        cs.run(schedule, cs.methods.xdg() + cs.methods.infer(cs.mappers.oracle()), mlp(), training(epochs=1))
    heads = cs.run(schedule, cs.methods.finetune(), cs.models.multi_head(mlp(), C), training(epochs=1))
    assert heads.sources == ("a/test",)
    apart = [replace(A, test=A.test), replace(B, test=A.test, classes=(0, 1))]
    assert len(cs.settings.continual(apart, "domain").judged) == 2


def test_a_stream_of_two_sources_of_one_name_is_refused():
    with pytest.raises(cs.ConsilienceError, match="names of their own"):
        cs.settings.online([A, A])


def test_the_learning_curve_goes_over_short_chunks():
    r = cs.run(cs.settings.online([A, B], 8), cs.methods.finetune(), mlp(), training(epochs=1), curve_steps=2)
    assert len(r.learning_curve) == 3


def test_what_is_left_is_undefined_for_values():
    values = [source("a", 30, kind="value"), source("b", 30, kind="value", seed=1)]
    r = cs.run(
        cs.settings.continual(values),
        cs.methods.finetune(),
        cs.models.mlp(D, (5,), 2),
        training(epochs=1),
        repeats=3,
    )
    assert r.normalised is None and r.to_json()["normalised"] is None
