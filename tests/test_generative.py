"""Generative replay and gradient-based sample selection: restatements in plain torch, mixtures, buffers,
resuming, refusals, learning."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Normal, kl_divergence

import consilience as cs
from consilience.core.contexts import Beginning, Context, Learned
from consilience.core.params import Layout, key, same
from consilience.core.schedule import Evaluate, Exchange, Train, build
from consilience.core.source import Source, Tensors
from consilience.corrections.generative import VAE, GenerativeReplay
from consilience.corrections.gss import GSS, directions
from consilience.corrections.rehearsal import ER
from consilience.loop.agent import Agent
from restate import stopped

D, C, LR = 6, 6, 0.1
GR, PICK = cs.methods.generative_replay, cs.methods.gss
SMALL = {"batch_size": 9, "hidden": 7, "latent": 2, "epochs": 3, "lr": 0.01}


def source(i, n=40, classes=None, scale=0.0, values=False):
    """Inputs in [0, 1], or with `scale` normal ones."""
    g = torch.Generator().manual_seed(100 + i)
    own = classes or (2 * i, 2 * i + 1)
    x = torch.rand(n, D, generator=g, dtype=torch.float64)
    x = scale * (x - 0.5) if scale else x
    y = torch.tensor(own)[torch.randint(len(own), (n,), generator=g)]
    t = Tensors(x, x[:, :1] * (i + 1) if values else y)
    labels = (("space", "v"),) if values else tuple(("space", str(c)) for c in range(C))
    return Source(f"s/{i}", t, t, t, labels, (0,) if values else own, kind="value" if values else "class")


SOURCES = [source(0), source(1, 33), source(2, 37)]


def mlp(outputs=C):
    return cs.models.mlp(D, (12,), outputs)


def training(**more):
    return cs.Training(**{"epochs": 2, "batch_size": 8, "lr": LR, "precision": "fp64", **more})


def go(method, sources=SOURCES, scenario="class", model=None, **more):
    return cs.run(cs.settings.continual(sources, scenario), method, model or mlp(), training(), **more)


@pytest.fixture
def states(monkeypatch):
    """The state after each learn."""
    kept, finish = [], Agent.finish

    def look(agent, job):
        finish(agent, job)
        kept.append(agent.state)

    monkeypatch.setattr(Agent, "finish", look)
    return kept


def forward(p, x):
    return F.linear(torch.relu(F.linear(x, p["1.weight"], p["1.bias"])), p["3.weight"], p["3.bias"])


def batches(s, epochs=2, size=8):
    for epoch in range(epochs):
        plan = torch.randperm(len(s.train), generator=key(0, s.name, 0, epoch, 0, "shuffle")).split(size)
        for step, i in enumerate(plan):
            yield epoch, step, s.train.x[i], s.train.y[i]


# the generator


def one_hot_vae(w, x, c, noise):
    """(log-likelihood, code) of a VAE that sees [x, one-hot of c]."""
    hot = F.one_hot(c, w["enter.condition"].shape[0]).to(x)
    h = torch.relu(
        torch.cat([x, hot], 1) @ torch.cat([w["enter.weight"], w["enter.condition"].T], 1).T + w["enter.bias"]
    )
    m, v = (h @ w["posterior.weight"].T + w["posterior.bias"]).chunk(2, 1)
    code = Normal(m, (v / 2).exp())
    h = (
        torch.cat([m + code.stddev * noise, hot], 1)
        @ torch.cat([w["decode.weight"], w["decode.condition"].T], 1).T
    )
    out = torch.relu(h + w["decode.bias"]) @ w["mean.weight"].T + w["mean.bias"]
    if "log_variance" in w:
        return Normal(out, (w["log_variance"] / 2).exp()).log_prob(x).sum(1), code
    return Bernoulli(logits=out, validate_args=False).log_prob(x).sum(1), code


@pytest.mark.parametrize("variance", [None, 0.3])
def test_elbo_is_that_of_torch_distributions(variance):
    g = torch.Generator().manual_seed(0)
    vae = VAE.init(D, 7, 3, variance, torch.zeros((), dtype=torch.float64), g).grown().grown()
    vae = VAE({k: w + torch.randn(w.shape, generator=g, dtype=w.dtype) / 3 for k, w in vae.weights.items()})
    x, c = torch.rand(11, D, generator=g, dtype=torch.float64), torch.randint(2, (11,), generator=g)
    noise = torch.randn(11, 3, generator=g, dtype=torch.float64)
    fit, code = one_hot_vae(vae.weights, x, c, noise)
    prior = Normal(torch.zeros(3).double(), torch.ones(3).double())
    for beta in (0.0, 1.0, 4.0):
        expected = fit - beta * kl_divergence(code, prior).sum(1)
        assert torch.allclose(vae.elbo(x, c, noise, beta), expected, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 5.0])
def test_generator_is_trained_on_the_mixture(scale, states, monkeypatch):
    """Its second visit restated: Adam on as many generated inputs as new ones; the third has a third of each
    source."""
    counts, elbo = [], VAE.elbo

    def count(self, x, c, noise, beta=1.0):
        counts.append(c.bincount(minlength=3).tolist())
        return elbo(self, x, c, noise, beta)

    monkeypatch.setattr(VAE, "elbo", count)
    sources = [source(i, n, scale=scale) for i, n in enumerate((40, 33, 37))]
    go(GR(**SMALL, beta=0.7), sources)
    sizes = [3 * [9, 9, 9, 9, 4], 3 * [9, 9, 9, 6], 3 * [9, 9, 9, 9, 1]]
    assert counts == [[n * (j <= i) for j in range(3)] for i, ns in enumerate(sizes) for n in ns]
    old, new = (s.memory["GenerativeReplay"] for s in states[:2])
    assert list(old) == ["s/0"] and list(new) == ["s/1"], "the newest alone is kept"
    before = old["s/0"].tensors
    assert ("log_variance" in before) == bool(scale)
    grown = {
        k: torch.cat([w, torch.zeros(1, 7)]) if k.endswith("condition") else w for k, w in before.items()
    }
    leaves = {k: w.clone().requires_grad_() for k, w in grown.items()}
    adam, g = torch.optim.Adam(leaves.values(), 0.01), key(0, "s/1", 0, "GenerativeReplay", "summarise")
    for _ in range(3):
        for i in torch.randperm(33, generator=g).split(9):
            z = torch.randn(len(i), 2, generator=g, dtype=torch.float64)
            h = torch.relu(
                z @ before["decode.weight"].T + before["decode.bias"] + before["decode.condition"][0]
            )
            made = h @ before["mean.weight"].T + before["mean.bias"]
            x = torch.cat([sources[1].train.x[i], made if scale else made.sigmoid()])
            c = torch.tensor([1] * len(i) + [0] * len(i))
            fit, code = one_hot_vae(leaves, x, c, torch.randn(len(x), 2, generator=g, dtype=torch.float64))
            kl = kl_divergence(code, Normal(torch.zeros(2).double(), torch.ones(2).double())).sum(1)
            adam.zero_grad()
            (0.7 * kl - fit).mean().backward()
            adam.step()
    for k, w in new["s/1"].tensors.items():
        assert torch.allclose(w, leaves[k], atol=1e-6), k
    assert sum(float((w - grown[k]).abs().sum()) for k, w in new["s/1"].tensors.items()) > 1


def test_the_generator_learns_its_sources():
    """Generated inputs of each condition lie near that source, after three."""
    centres = torch.tensor(
        [[0.9] * 3 + [0.1] * 3, [0.1] * 3 + [0.9] * 3, [0.1, 0.9] * 3], dtype=torch.float64
    )
    noise = torch.rand(3, 60, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 5 - 0.1
    made = [
        replace(s, train=Tensors(centres[i] + noise[i], torch.full((60,), 2 * i)))
        for i, s in enumerate(SOURCES)
    ]
    result = go(GR(batch_size=12, hidden=16, latent=2, epochs=40, lr=0.02), made)
    item = result.agent.state.memory["GenerativeReplay"]["s/2"]
    c = torch.arange(3).repeat_interleave(50)
    x = VAE(dict(item.tensors)).generate(c, torch.Generator().manual_seed(1))
    assert (x.view(3, 50, D).mean(1) - centres).abs().max() < 0.15
    assert [s[0] for s in item.meta["seen"]] == ["s/0", "s/1", "s/2"]


# replay


@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize(
    ("labels", "importance"), [("soft", "sources"), ("hard", "sources"), ("soft", "equal"), ("hard", "equal")]
)
def test_replay_restated(scenario, labels, importance, states):
    """The third source: r = 1/3, or 1/2; the answers are those of the model as it was."""
    go(GR(**SMALL, labels=labels, importance=importance), scenario=scenario)
    params, end, item = states[1].params, states[2].params, states[1].memory["GenerativeReplay"]["s/1"]
    w, start = item.tensors, dict(params)
    for epoch, step, x, y in batches(SOURCES[2]):
        g, parts = key(0, "s/2", 0, epoch, step, "GenerativeReplay"), []
        if importance == "sources":
            drawn = [torch.tensor([0] * 5), torch.tensor([1] * 4)]
        else:
            one = int(torch.randint(2, (1,), generator=g))
            alike = torch.tensor([0, 1] if scenario == "class" else [one])
            drawn = [alike[torch.randint(len(alike), (9,), generator=g)]]
        for c in drawn:
            z = torch.randn(len(c), 2, generator=g, dtype=torch.float64)
            h = torch.relu(z @ w["decode.weight"].T + w["decode.bias"] + w["decode.condition"][c])
            parts.append(((h @ w["mean.weight"].T + w["mean.bias"]).sigmoid(), int(c[0])))
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        own = slice(4, 6) if scenario == "task" else slice(None)
        total = F.cross_entropy(forward(leaves, x)[:, own], y - (own.start or 0))
        for made, i in parts:
            taught = slice(0, 4) if scenario == "class" else slice(2 * i, 2 * i + 2)
            teacher = forward(start, made)[:, taught]
            out = forward(leaves, made)[:, taught if scenario == "task" else slice(None)]
            if labels == "hard":
                total = total + F.cross_entropy(out, teacher.argmax(1))
            else:
                p, q = (teacher / 2).softmax(1), (out / 2).log_softmax(1)[:, : teacher.shape[1]]
                total = total + 4 * (p * (p.log() - q)).sum(1).mean()
        total = total / (3 if importance == "sources" else 2)
        grads = torch.autograd.grad(total, list(leaves.values()))
        params = {n: p - LR * d for (n, p), d in zip(params.items(), grads, strict=True)}
    assert all(torch.allclose(params[n], end[n], atol=1e-9) for n in end)


def test_replay_of_values_restated(states):
    sources = [source(i, values=True) for i in range(2)]
    go(GR(**SMALL), sources, "task", mlp(1))
    params, w = states[0].params, states[0].memory["GenerativeReplay"]["s/0"].tensors
    start = dict(params)
    for epoch, step, x, y in batches(sources[1]):
        z = torch.randn(
            9, 2, generator=key(0, "s/1", 0, epoch, step, "GenerativeReplay"), dtype=torch.float64
        )
        h = torch.relu(z @ w["decode.weight"].T + w["decode.bias"] + w["decode.condition"][0])
        made = (h @ w["mean.weight"].T + w["mean.bias"]).sigmoid()
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        loss = (
            F.mse_loss(forward(leaves, x), y) / 2
            + F.mse_loss(forward(leaves, made), forward(start, made)) / 2
        )
        grads = torch.autograd.grad(loss, list(leaves.values()))
        params = {n: p - LR * d for (n, p), d in zip(params.items(), grads, strict=True)}
    assert all(torch.allclose(params[n], states[1].params[n], atol=1e-9) for n in params)


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_answers_are_the_former_models_not_the_generators(labels, monkeypatch):
    """Targets that come with a generated batch are read by nobody; where nothing changed yet soft answers
    are met."""
    whole, sample, losses, first = (
        go(GR(**SMALL, labels=labels), scenario="domain", model=mlp(2)),
        GenerativeReplay.sample,
        GenerativeReplay.losses,
        [],
    )

    def other(self, ctx, sources, generator):
        return [replace(b, y=1 - b.y) for b in sample(self, ctx, sources, generator)]

    def look(self, each, step, ctx):
        bent = losses(self, each, step, ctx)
        if step.clock == (0, 0):
            teacher = step.before(step.parts[1].x, None)
            first.append((bent[1], -teacher.log_softmax(1).amax(1)))
        return bent

    monkeypatch.setattr(GenerativeReplay, "sample", other)
    monkeypatch.setattr(GenerativeReplay, "losses", look)
    assert same(whole.params, go(GR(**SMALL, labels=labels), scenario="domain", model=mlp(2)).params)
    assert len(first) == 2
    for loss, likely in first:
        assert torch.allclose(loss, torch.zeros_like(loss) if labels == "soft" else likely, atol=1e-12)


@pytest.mark.parametrize("method", [GR(**SMALL), PICK(20)])
def test_first_source_is_plain_training(method, states):
    go(method, SOURCES[:2])
    mine = states[0].params
    states.clear()
    go(cs.methods.finetune(), SOURCES[:2])
    assert same(mine, states[0].params)


@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize("method", [GR(batch_size=0), PICK(0)])
def test_nothing_replayed_is_plain_training(method, scenario):
    assert same(go(method, scenario=scenario).params, go(cs.methods.finetune(), scenario=scenario).params)


def test_a_source_seen_again_is_not_replayed_to_itself(monkeypatch):
    replayed, train = [], GenerativeReplay._train

    def look(self, vae, before, source, now, old, generator):
        replayed.append((source.name, now, list(old), len(vae.weights["enter.condition"])))
        return train(self, vae, before, source, now, old, generator)

    monkeypatch.setattr(GenerativeReplay, "_train", look)
    cs.run(cs.settings.federated_continual([SOURCES[:2]], 2), GR(**SMALL), mlp(), training(epochs=1))
    assert replayed[-1][2:] == ([0], 2) and ("s/0", 0, [], 1) in replayed
    assert all(now not in old for _, now, old, _ in replayed)


# gradient-based sample selection


def learn(s, seed=0, task=None, steps=30, name=""):
    """Something learned: a perceptron after some steps on a source."""
    params = {n: p.double() for n, p in mlp().init(key(seed, "init"))[0].items()}
    for _ in range(steps):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        grads = torch.autograd.grad(
            F.cross_entropy(forward(leaves, s.train.x), s.train.y), list(leaves.values())
        )
        params = {n: p - 0.3 * g for (n, p), g in zip(params.items(), grads, strict=True)}
    return Learned(
        mlp(),
        params,
        {},
        params,
        s,
        task,
        Layout.of(params),
        key(seed, s.name, 0, name or "GSS", "summarise"),
    )


def slow_direction(params, x, y, columns=slice(None), names=None):
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    loss = F.cross_entropy(forward(leaves, x[None])[:, columns], y[None] - (columns.start or 0))
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    flat = torch.cat([grads[n].reshape(-1) for n in names or sorted(grads)])
    return flat / flat.norm()


def test_directions_restated():
    got = learn(SOURCES[1])
    x, y = SOURCES[1].train.x, SOURCES[1].train.y
    for columns, task, names in (
        (slice(None), None, None),
        (slice(2, 4), "t", None),
        (slice(None), None, ("3.bias", "3.weight")),
    ):
        expected = torch.stack(
            [slow_direction(got.params, a, b, columns, names) for a, b in zip(x, y, strict=True)]
        )
        assert torch.allclose(directions(got, x, y, task, (2, 3), names), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("scenario", "arrivals", "layers"),
    [("class", 1, "all"), ("task", 1, "all"), ("class", 7, "head"), ("task", 7, "all")],
)
def test_buffer_restated(scenario, arrivals, layers, states):
    """The same buffer by a loop over arriving examples, with the same random numbers; batches see the buffer
    as they found it."""
    size, n = 12, 5
    go(PICK(size, subset=n, arrivals=arrivals, layers=layers), scenario=scenario)
    M = []  # x, y, key, score, source
    for t, (s, state) in enumerate(zip(SOURCES, states, strict=True)):
        M.sort(key=lambda m: m[4])
        g = key(0, s.name, 0, "GSS", "summarise")
        keys = torch.rand(len(s.train), generator=g, dtype=torch.float64)
        order = torch.randperm(len(s.train), generator=g).tolist()
        names = ("3.bias", "3.weight") if layers == "head" else None

        def unit(x, y, i, state=state, names=names):
            return slow_direction(
                state.params, x, y, slice(2 * i, 2 * i + 2) if scenario == "task" else slice(None), names
            )

        while order:
            k = min(arrivals, size - len(M) or arrivals)
            batch, order = order[:k], order[k:]
            c, full = [1.0] * len(batch), len(M) == size
            if M:
                near = [M[i] for i in torch.randperm(len(M), generator=g)[:n]]
                G = torch.stack([unit(x, y, i) for x, y, *_, i in near])
                c = [float((G @ unit(s.train.x[j], s.train.y[j], t)).max()) + 1 for j in batch]
            come = [
                (s.train.x[j], s.train.y[j], float(keys[j]), cj, t) for j, cj in zip(batch, c, strict=True)
            ]
            if not full:
                M += come
                continue
            C = torch.tensor([m[3] for m in M], dtype=torch.float64)
            places = torch.multinomial(C, len(batch), generator=g).tolist()
            chance = torch.rand(len(batch), generator=g, dtype=torch.float64).tolist()
            for m, place, r in zip(come, places, chance, strict=True):
                if m[3] < 1 and r < float(C[place]) / (float(C[place]) + m[3]):
                    M[place] = m
        items = state.memory["GSS"]
        for i in range(t + 1):
            mine = sorted((m for m in M if m[4] == i), key=lambda m: m[2])
            item = items[f"s/{i}"].tensors
            by = item["key"].argsort()
            assert item["key"][by].tolist() == [m[2] for m in mine]
            assert torch.allclose(
                item["score"][by], torch.tensor([m[3] for m in mine], dtype=torch.float64), atol=1e-8
            )
            assert len(mine) == 0 or torch.equal(item["x"][by], torch.stack([m[0] for m in mine]))
            assert item["y"][by].tolist() == [int(m[1]) for m in mine] and "gone" not in item
    assert scenario == "task" or len({m[4] for m in M}) > 1, "the last buffer has examples of several sources"


@pytest.mark.parametrize(("size", "arrivals"), [(6, 10), (7, 3), (50, 10), (80, 64), (500, 10)])
def test_size_is_never_exceeded(size, arrivals, states):
    go(PICK(size, arrivals=arrivals))
    held = [sum(len(i.tensors["y"]) for i in s.memory["GSS"].values()) for s in states]
    assert held == [min(size, n) for n in (40, 73, 110)]


def test_several_sources_in_one_learn_share_the_buffer(states):
    def plan(seed):
        for names in (("s/0", "s/1"), ("s/2",), ("s/0",)):
            yield Train({"a": names})
            yield Exchange({"a": ("a",)})
            yield Evaluate(names[0])

    schedule = build("mine", SOURCES, "class", plan, "a")
    cs.run(schedule, PICK(9), mlp(), training(epochs=1))
    assert [sum(len(i.tensors["y"]) for i in s.memory["GSS"].values()) for s in states][:2] == [9, 9]
    assert sum(len(i.tensors["y"]) for i in states[2].memory["GSS"].values()) <= 9
    with pytest.raises(cs.Refusal, match="several sources.*one after another"):
        cs.run(schedule, GR(**SMALL), mlp(), training())


def test_a_duplicate_is_never_taken_into_a_full_buffer():
    gss, x = GSS(size=10, subset=10, arrivals=4), SOURCES[0].train.x
    zeros, ones = (
        replace(SOURCES[0], name=f"all {k}", train=Tensors(x, torch.full((40,), k))) for k in (0, 1)
    )
    got = learn(zeros, steps=0)
    first = gss.trim({"s/0": gss.summarise(got, Context())}, key(0))
    item = first["s/0"].tensors
    twins = Tensors(item["x"].repeat(5, 1), item["y"].repeat(5))
    again = replace(got, source=replace(SOURCES[0], name="twins", train=twins))
    known = gss.recall({("a", "s/0"): first["s/0"]}, (again.source,))
    new = gss.summarise(again, Context(recalled=known))
    assert len(item["y"]) == 10 and len(new.tensors["y"]) == len(new.tensors["gone"]) == 0
    other = replace(got, source=ones, generator=key(1))
    assert len(gss.summarise(other, Context(recalled=known)).tensors["y"]), "another is"


def test_a_skewed_stream_is_kept_diverse():
    """Of 200 examples 190 are nearly one: gradients in the buffer differ more than in a reservoir."""
    g = torch.Generator().manual_seed(3)
    x = torch.rand(200, D, generator=g, dtype=torch.float64)
    y = torch.randint(6, (200,), generator=g)
    rare = torch.randperm(200, generator=g) < 10
    x = torch.where(rare[:, None], x, 0.5 + 0.02 * x)
    skewed = replace(SOURCES[0], train=Tensors(x, torch.where(rare, y, 0)), classes=tuple(range(6)))
    cosines = {}
    for name, kind in (("GSS", GSS(size=15)), ("ER", ER(size=15))):
        got = learn(skewed, name=name)
        item = kind.summarise(got, Context()).tensors
        units = directions(got, item["x"], item["y"])
        cosines[name] = float(((units @ units.T).sum() - 15) / (15 * 14))
    assert cosines["GSS"] < cosines["ER"] - 0.3


# resuming


@pytest.mark.parametrize("method", [GR(**SMALL), GR(**SMALL, labels="hard", importance="equal"), PICK(15)])
@pytest.mark.parametrize("at", [7, 17])
def test_resumes_mid_task_to_the_same_bits(method, at, tmp_path):
    whole = go(method)
    stopped(partial(go, method), tmp_path / "run", at)
    again = go(method, out=tmp_path / "run", resume=True)
    assert same(whole.params, again.params) and (whole.matrices == again.matrices).all()


# refusals


def test_inputs_that_cannot_be_generated_are_refused():
    whole = replace(SOURCES[0], train=Tensors((SOURCES[0].train.x * 9).long(), SOURCES[0].train.y))
    words = GenerativeReplay()
    with pytest.raises(cs.ConsilienceError, match=r"must be real numbers, got torch.int64 in 's/0'; use er"):
        words.begin(Beginning(mlp(), {}, {}, (whole,), None, key(0)))
    with pytest.raises(
        cs.ConsilienceError, match=r"Bernoulli generator must lie in \[0, 1\], got others in 's/1'; use"
    ):
        go(GR(**SMALL), [SOURCES[0], source(1, scale=5.0)])
    go(GR(**SMALL, likelihood="gaussian"), [SOURCES[0], source(1, scale=5.0)])
    item = words.summarise(replace(learn(SOURCES[0]), source=SOURCES[0]), Context())
    wide = replace(SOURCES[1], train=Tensors(SOURCES[1].train.x.view(-1, 2, 3), SOURCES[1].train.y))
    known = words.recall({("a", "s/0"): item}, (wide,))
    with pytest.raises(cs.ConsilienceError, match=r"one shape, got \(2, 3\) in 's/1' after \(6,\)"):
        words.begin(Beginning(mlp(), {}, {}, (wide,), known, key(0)))
    with pytest.raises(cs.ConsilienceError, match="finite, got NaN or infinity .* the generator after 's/0'"):
        go(GR(**{**SMALL, "lr": 1e300}))


def test_settings_without_an_earlier_source_are_refused():
    for method in (GR(**SMALL), PICK(20)):
        with pytest.raises(cs.Refusal):
            cs.run(cs.settings.multitask(SOURCES), method, mlp(), training())


# learning


def test_both_keep_what_finetuning_forgets():
    sources = cs.data.split_classes(cs.data.digits(), 5)[:3]
    train = cs.Training(epochs=6, batch_size=32, lr=0.1)

    def score(method):
        return cs.run(
            cs.settings.continual(sources, "class"), method, cs.models.mlp(64, (64,), 10), train
        ).score

    plain = score(cs.methods.finetune())
    assert plain < 0.45
    assert score(GR(hidden=64, latent=8, epochs=8, lr=5e-3)) > plain + 0.2
    assert score(PICK(100)) > plain + 0.2
