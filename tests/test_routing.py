"""Mappers at speed: our own mixtures, screened routing, what Mahalanobis may share, and inputs that belong
to no task."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import consilience as cs
from consilience.core.contexts import Learned, Routing
from consilience.core.message import Message, Module, Samples, Statistics, join
from consilience.core.outliers import Clip, far_out, outliers
from consilience.core.params import Layout, key, same
from consilience.core.source import Source, Tensors
from consilience.mappers import _em, _screen, covariance, mixture
from consilience.mappers.autoencoder import ExpertGate
from consilience.mappers.confidence import MinEntropy
from consilience.mappers.covariance import Mahalanobis, factors, symmetric, triangle, whitening
from consilience.mappers.mixture import GaussianMixture, NearestMean

D, C = 8, 3
MODEL = cs.models.mlp(D, (4,), C)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def source(i, n=60, d=D, held=40, noise=1.0, scale=3.0, classes=C, dtype=torch.float64):
    """Task i: classes about means of its own."""
    g = gen(100 + i)
    mu = torch.randn(classes, d, generator=g, dtype=torch.float64) * scale

    def part(n):
        y = torch.arange(n) % classes
        return Tensors((mu[y] + noise * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype), y)

    labels = tuple((f"task{i}", str(c)) for c in range(classes))
    return Source(f"task{i}", part(n), part(held), part(200), labels, tuple(range(classes)), f"task{i}")


def summary(mapper, s, seed=0):
    params, buffers = MODEL.init(key(0))
    params = (
        {n: p.to(s.train.x.dtype) for n, p in params.items()} if s.train.x.is_floating_point() else params
    )
    return mapper.summarise(
        Learned(MODEL, params, buffers, params, s, s.task, Layout.of(params), key(seed, s.name)), None
    )


def routing(x, names, features=None):
    return Routing(x, features or (lambda x=x: x), lambda: [], names)


def keys(n):
    return [("m", f"task{i}") for i in range(n)]


def told(mapper, sources):
    return {("m", s.name): summary(mapper, s) for s in sources}


SOURCES = [source(i) for i in range(5)]
KNOWN = torch.cat([s.test.x for s in SOURCES])
FAR = torch.randn(300, D, generator=gen(9), dtype=torch.float64) * 3 + 25

MAPPERS = {
    "nearest_mean": NearestMean("inputs"),
    "gaussian_mixture": GaussianMixture(4, on="inputs"),
    "gaussian_mixture by size": GaussianMixture(4, "size", on="inputs"),
    "mahalanobis": Mahalanobis(on="inputs"),
    "mahalanobis, images": Mahalanobis(on="inputs", images=5),
    "mahalanobis, rank": Mahalanobis(on="inputs", rank=3),
    "expert_gate": ExpertGate(epochs=3),
    "expert_gate, soft": ExpertGate(epochs=3, soft=True),
}
EACH = pytest.mark.parametrize("mapper", list(MAPPERS.values()), ids=list(MAPPERS))


# mixtures


def likelihood(x, fit):
    """mean log sum_j w_j N(x; mu_j, s_j), by torch.distributions."""
    normal = torch.distributions.Independent(torch.distributions.Normal(fit.mean, fit.variance.sqrt()), 1)
    return float((normal.log_prob(x.double()[:, None]) + fit.weight.log()).logsumexp(1).mean())


def blobs(n=400, d=20, k=5, seed=0):
    g = gen(seed)
    mu, width = torch.randn(k, d, generator=g) * 2, torch.rand(k, d, generator=g) + 0.2
    j = torch.randint(k, (n,), generator=g)
    return (mu[j] + width[j] * torch.randn(n, d, generator=g)).clamp_min(0)


@pytest.mark.parametrize("seed", range(4))
def test_expectation_maximisation_is_that_of_scikit_learn(seed):
    """From the same start: the same steps, parameters and log-likelihood; features are ReLU's, with many
    zeros."""
    from sklearn.mixture import GaussianMixture as Reference

    x, held = blobs(seed=seed).split([300, 100])
    rows, floor = _em.seeds(x, 6, gen(seed)), 1e-3
    made = _em.fit(x, 6, gen(), floor, start=rows)
    near = Reference(
        6,
        covariance_type="diag",
        reg_covar=floor,
        means_init=x[rows].double().numpy(),
        precisions_init=np.full((6, 20), 1 / floor),
        weights_init=np.full(6, 1 / 6),
        init_params="random_from_data",
    ).fit(x.double().numpy())
    assert made.steps == near.n_iter_ and made.converged
    assert made.bound == pytest.approx(near.lower_bound_, abs=5e-3)
    np.testing.assert_allclose(made.mean, near.means_, atol=1e-3)
    np.testing.assert_allclose(made.variance, near.covariances_, rtol=1e-2, atol=1e-4)
    for part in (x, held):
        assert likelihood(part, made) == pytest.approx(near.score(part.double().numpy()), abs=1e-2)
        log = _em.log_density(part.double(), made.mean, made.variance, made.weight)
        assert float(log.logsumexp(1).mean()) == pytest.approx(likelihood(part, made), abs=1e-6)


def test_one_component_is_the_mean_and_the_variance():
    x = blobs()
    fit = _em.fit(x, 1, gen(), 1e-3)
    assert torch.equal(fit.mean[0], x.double().mean(0))
    assert torch.allclose(fit.variance[0], x.double().var(0, unbiased=False) + 1e-3, rtol=1e-12)
    assert fit.weight.tolist() == [1.0] and fit.bound == pytest.approx(likelihood(x, fit), abs=1e-9)


def test_mixtures_of_little_of_nothing_and_of_the_same():
    few = _em.fit(blobs(3), 25, gen(), 1e-3)
    assert len(few.mean) == 3 and sorted(few.mean.sum(1).tolist()) == pytest.approx(
        sorted(blobs(3).double().sum(1).tolist()), rel=1e-4
    )
    constant = _em.fit(torch.full((40, 5), 3.0), 4, gen(), 1e-3)
    assert torch.allclose(constant.mean, torch.tensor(3.0).double()) and torch.allclose(
        constant.variance, torch.tensor(1e-3).double()
    )
    twice = torch.cat([blobs(10)] * 5)
    fit = _em.fit(twice, 20, gen(), 1e-3)
    assert (
        fit.mean.isfinite().all()
        and fit.weight.sum() == pytest.approx(1)
        and (fit.variance >= 1e-3 * (1 - 1e-6)).all()
    )
    one = _em.fit(blobs(1), 3, gen(), 1e-3)
    assert torch.equal(one.mean, blobs(1).double()) and torch.allclose(
        one.variance, torch.tensor(1e-3).double()
    )
    a, b, c = (_em.fit(blobs(), 4, gen(s)) for s in (1, 1, 2))
    assert torch.equal(a.mean, b.mean) and not torch.equal(a.mean, c.mean)


def test_k_means_plus_plus_spreads_its_seeds():
    """Five far clusters have a seed each; rows are drawn by the generator alone."""
    centres = torch.eye(5) * 100
    x = torch.cat([c + torch.randn(20, 5, generator=gen(i)) for i, c in enumerate(centres)])
    for seed in range(5):
        assert sorted((_em.seeds(x, 5, gen(seed)) // 20).tolist()) == [0, 1, 2, 3, 4]
    assert len(_em.seeds(torch.zeros(7, 2), 3, gen())) == 3


def test_the_fit_of_scikit_learn_is_its_own(monkeypatch):
    from sklearn.mixture import GaussianMixture as Reference

    asked: list[tuple[int, int]] = []
    made = Reference.fit

    def fit(self, x, y=None):
        asked.append((self.n_components, len(x)))
        return made(self, x, y)

    monkeypatch.setattr(Reference, "fit", fit)
    s = source(0, n=200)
    ours = summary(GaussianMixture(4, on="inputs"), s)
    assert not asked
    theirs = summary(GaussianMixture(4, on="inputs", fit="sklearn"), s)
    assert asked == [(4, 200)] and not torch.equal(ours.tensors["mean"], theirs.tensors["mean"])
    assert theirs.tensors["mean"].shape == (4, D)


def test_both_fits_are_as_good():
    found = {}
    for fit in ("torch", "sklearn"):
        s = replace(SOURCES[0], train=Tensors(blobs(300).double(), torch.arange(300) % 3))
        items = [summary(GaussianMixture(5, on="inputs", fit=fit), s, seed) for seed in range(8)]
        held = blobs(900)[300:]
        made = [
            _em.Fit(*(i.tensors[n].double() for n in ("mean", "variance", "weight")), 0.0, 0, True)
            for i in items
        ]
        found[fit] = sum(likelihood(held, m) for m in made) / 8
    assert found["torch"] > found["sklearn"] - 1.0, found


# screening


def exactly(a, b, c):
    return lambda rows, j: (a[rows].double() * b[j].double()).sum(1) + c[j].double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("spread", "decades"), [(1.0, 0), (1.0, 2), (1e-2, 2), (1e-6, 2)])
def test_a_screened_argmax_is_the_exact_one(dtype, spread, decades):
    """Anchors that differ by ever less, of unequal groups, with wild scales by column."""
    g = gen(1)
    wild = torch.logspace(-decades, decades, 50)[torch.randperm(50, generator=g)]
    b = (torch.randn(50, generator=g) + spread * torch.randn(90, 50, generator=g)) * wild
    a, c = torch.randn(200, 50, generator=g) / wild, torch.randn(90, generator=g) * spread
    group = torch.arange(12).repeat_interleave(torch.randint(1, 30, (12,), generator=g))[:90].sort().values
    score = a.double() @ b.double().T + c.double()
    screen = _screen.Screen.of(b, c, group, 2, dtype)
    best, _ = screen(a, lambda x: x, exactly(a, b, c))
    assert torch.equal(best, group[score.argmax(1)])
    best, top = screen(a, lambda x: x, exactly(a, b, c), scored=True)
    assert torch.equal(best, group[score.argmax(1)]) and torch.allclose(top, score.amax(1), rtol=1e-12)
    for level in screen.levels:
        left = level.left(a, lambda x: x, screen.constant)
        assert left.gather(1, score.argmax(1)[:, None]).all()
        assert decades or left.double().mean() < 0.1, "it screens"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bounds_hold(dtype):
    """Products on the two ends of what rounding may do: no true score leaves its bounds, which are found by
    what is left."""
    g = gen(2)
    b = torch.randn(40, 64, generator=g).sign() * (1 + 2.0**-8 + 2.0**-9 * torch.rand(40, 64, generator=g))
    a = (b[torch.arange(100) % 40].sign()) * (1 + 2.0**-9 - 2.0**-12)
    score = a.double() @ b.double().T
    left = _screen.Level.of(b, dtype, 1).left(a, lambda x: x, torch.zeros(40))
    assert left.gather(1, score.argmax(1)[:, None]).all()


def test_ties_and_what_is_not_finite():
    b, c, group = torch.ones(4, 6), torch.zeros(4), torch.tensor([0, 1, 1, 2])
    a = torch.randn(5, 6, generator=gen())
    assert _screen.Screen.of(b, c, group)(a, lambda x: x, exactly(a, b, c))[0].tolist() == [0] * 5
    a[1, 2], a[3, 0] = math.nan, math.inf
    b = torch.randn(4, 6, generator=gen(1))
    best, score = _screen.Screen.of(b, c, group)(a, lambda x: x, exactly(a, b, c), scored=True)
    assert (best < 3).all() and score[1].isnan() and score[[0, 2, 4]].isfinite().all()


@EACH
def test_routes_are_the_largest_exact_scores_whatever_the_batch(mapper):
    sources = [source(i, 30 + i, scale=1.0) for i in range(40)]
    memory = told(mapper, sources)
    x = torch.cat([s.test.x[:20] for s in sources])
    names = list(memory)
    scores = mapper.scores(
        x, list(memory.values()), [memory[k] for k in sorted(memory, key=lambda k: (k[1], k[0]))]
    )
    weights = mapper.route(routing(x, names), memory)
    assert torch.equal(weights.argmax(1), scores.argmax(1)) and weights.shape == (800, 40)
    assert torch.allclose(weights.sum(1), torch.ones(800))
    parts = torch.cat([mapper.route(routing(p, names), memory) for p in x.split(7)])
    assert torch.equal(parts.argmax(1), weights.argmax(1))
    single = mapper.route(routing(x.float(), names), memory)
    assert float((single.argmax(1) == weights.argmax(1)).double().mean()) > 0.99


def test_a_bank_is_read_once(monkeypatch):
    """The whitening is that of the bank, not of the batch; images pass the features once an anchor."""
    made, seen = [], []
    monkeypatch.setattr(covariance, "whitening", lambda *a: made.append(1) or whitening(*a))
    mapper = Mahalanobis(images=3)
    memory = told(replace(mapper, on="inputs"), SOURCES)

    def features(x=KNOWN):
        seen.append(len(x))
        return x

    for _ in range(3):
        mapper.route(routing(KNOWN, list(memory), features), memory)
    assert len(made) == 1 and seen == [len(KNOWN)] + [9] * 5 + [len(KNOWN)] * 2
    more = memory | told(replace(mapper, on="inputs"), [source(7)])
    mapper.route(routing(KNOWN, list(more), features), more)
    assert len(made) == 2 and seen.count(9) == 6


# what Mahalanobis shares


def test_triangles_and_factors():
    x = torch.randn(30, 6, generator=gen(), dtype=torch.float64)
    s = x.T @ x
    assert torch.allclose(symmetric(triangle(s), 6), s, rtol=1e-13) and len(triangle(s)) == 21
    u, rest = factors(s, 2)
    assert u.shape == (2, 6) and torch.allclose((u.T @ u + rest.diag()).diagonal(), s.diagonal())
    assert torch.allclose(torch.linalg.svdvals(u).square(), torch.linalg.eigvalsh(s)[-2:].flip(0))
    u, rest = factors(s, 9)
    assert torch.allclose(u.T @ u, s) and float(rest.abs().max()) < 1e-9


def test_a_rank_that_is_enough_is_exact():
    thin = [source(i, n=9) for i in range(4)]  # 9 examples in 3 classes: scatters of rank 6
    x = torch.cat([s.test.x for s in thin])
    whole = Mahalanobis(on="inputs")
    exact = whole.scores(x, *[list(told(whole, thin).values())] * 2)
    off = []
    for rank in (1, 3, 6, 8, 99):
        mapper = Mahalanobis(on="inputs", rank=rank)
        items = list(told(mapper, thin).values())
        assert type(items[0]) is Module and items[0].tensors["factor"].shape == (min(rank, D), D)
        off.append(float(((mapper.scores(x, items, items) - exact) / exact).abs().max()))
    assert max(off[2:]) < 1e-6 < off[1] < off[0]


def test_a_rank_too_small_leaves_the_diagonal():
    """S is U^T U + diag(rest) over the examples of all anchors, restated; its variances are exact at any
    rank."""
    mapper = Mahalanobis(on="inputs", rank=2)
    items = list(told(mapper, SOURCES).values())
    total = sum(
        i.tensors["factor"].double().T @ i.tensors["factor"].double() + i.tensors["rest"].double().diag()
        for i in items
    )
    n = sum(len(s.train) for s in SOURCES)
    s, _ = covariance.spread(items)
    assert torch.allclose(s, total / n, rtol=1e-12) and len(items[0].tensors["factor"]) == 2
    exact, _ = covariance.spread(list(told(Mahalanobis(on="inputs"), SOURCES).values()))
    assert torch.allclose(s.diagonal(), exact.diagonal(), rtol=1e-6) and not torch.allclose(
        s, exact, rtol=0.01
    )


def test_the_pseudo_inverse_takes_no_rounding_for_variance():
    """Features of 5 directions out of 8, far from zero: the directions without any variance are left out,
    though float64 sums give them some, by rounding."""
    turn = torch.linalg.qr(torch.randn(D, D, generator=gen(6), dtype=torch.float64))[0][:5]
    thin = [source(i, n=90, d=5) for i in range(4)]
    far = [s.map(x=lambda x: x @ turn + 1e4) for s in thin]
    plain, mapper = Mahalanobis(0.0, "inputs"), Mahalanobis(0.0, "inputs")
    items, small = (list(told(mapper, each).values()) for each in (far, thin))
    values = torch.linalg.eigvalsh(covariance.spread(items)[0])
    assert float(values[:3].abs().max()) > 0 and float(values[3]) > 1e-2, "nothing but rounding"
    assert covariance.whitening(items, 0.0).shape == (D, 5)
    x, off = torch.cat([s.test.x for s in thin]), torch.randn(800, D, generator=gen(7), dtype=torch.float64)
    off = off - off @ turn.T @ turn  # what lies off those directions is seen by no anchor
    assert torch.allclose(
        mapper.scores(x @ turn + 1e4 + off, items, items), plain.scores(x, small, small), rtol=1e-4
    )


def test_all_images_are_as_good_as_sums():
    """m = all: S is that of the shared sums. Bytes are what they were made from, and less of them."""
    grey = [s.map(x=lambda x: (x * 20 + 128).round().clamp(0, 255).float().div(255)) for s in SOURCES]
    x = torch.cat([s.test.x for s in grey])
    sums, images = Mahalanobis(on="inputs"), Mahalanobis(on="inputs", images=10**6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = told(images, grey)
    item = next(iter(whole.values()))
    assert (
        type(item) is Samples and item.tensors["bytes"].dtype == torch.uint8 and "second" not in item.tensors
    )
    a, b = (m.scores(x, *[list(t.values())] * 2) for m, t in ((sums, told(sums, grey)), (images, whole)))
    assert torch.allclose(a, b, rtol=1e-6)
    off = told(Mahalanobis(on="inputs", images=2), SOURCES)
    assert all(i.tensors["x"].dtype == torch.float32 and len(i.tensors["x"]) == 6 for i in off.values())


def test_five_images_give_the_tied_covariance_of_the_paper():
    mapper = Mahalanobis(0.1, "inputs", images=5)
    memory = told(mapper, SOURCES)
    residuals, mus = [], []
    for s, item in zip(SOURCES, memory.values(), strict=True):
        mu = torch.stack([s.train.x[s.train.y == c].mean(0) for c in range(C)])
        x, y = item.tensors["x"].double(), item.tensors["y"].long()
        assert y.bincount().tolist() == [5] * C
        assert all(
            (s.train.x[s.train.y == c].float() == r.float()).all(1).any() for r, c in zip(x, y, strict=True)
        )
        residuals.append(x - mu[y])
        mus.append(mu)
    r = torch.cat(residuals)
    tied = r.T @ r / len(r)
    inverse = torch.linalg.inv(tied + 0.1 * tied.trace() / D * torch.eye(D).double())
    away = KNOWN[:, None, None] - torch.stack(mus)
    restated = -torch.einsum("bkci,ij,bkcj->bkc", away, inverse, away).amin(2)
    assert torch.allclose(mapper.scores(KNOWN, *[list(memory.values())] * 2), restated, rtol=1e-6)
    assert not same(summary(mapper, SOURCES[0], 1).tensors, summary(mapper, SOURCES[0], 2).tensors)


def test_few_images_single_classes_and_singular_covariances():
    s = SOURCES[0]
    rare = replace(s, train=Tensors(s.train.x[:7], torch.tensor([0, 0, 0, 0, 0, 1, 1])), classes=(0, 1))
    with pytest.warns(
        UserWarning,
        match=r"1 classes of 'task0' have fewer than `images = 4` examples; they give all that they have",
    ):
        assert summary(Mahalanobis(on="inputs", images=4), rare).tensors["y"].tolist() == [0, 0, 0, 0, 1, 1]
    single = replace(s, train=Tensors(s.train.x[:1], torch.tensor([2])), classes=(2,))
    for more in ({}, {"rank": 2}, {"images": 1}):
        for ridge in (0.0, 1e-3):
            mapper = Mahalanobis(ridge, "inputs", **more)
            alone = [
                summary(mapper, single),
                summary(mapper, replace(single, name="b", train=Tensors(s.train.x[1:2], torch.tensor([2])))),
            ]
            both = mapper.scores(s.train.x[:2], alone, alone)
            assert both.argmax(1).tolist() == [0, 1], "no variance at all: nearest mean"
            mixed = [summary(mapper, single), summary(mapper, SOURCES[1])]
            assert mapper.scores(KNOWN, mixed, mixed).isfinite().all()
    thin = [source(i, n=6) for i in range(2)]  # rank 6 of 8 at ridge 0
    items = list(told(Mahalanobis(0.0, "inputs"), thin).values())
    residual = torch.cat(
        [
            t.train.x - torch.stack([t.train.x[t.train.y == c].mean(0) for c in range(C)])[t.train.y]
            for t in thin
        ]
    )
    pseudo = torch.linalg.pinv(residual.T @ residual / 12, rtol=1e-10)
    mu = torch.stack([t.train.x[t.train.y == c].mean(0) for t in thin for c in range(C)])
    away = KNOWN[:, None] - mu
    restated = -torch.einsum("bci,ij,bcj->bc", away, pseudo, away).view(-1, 2, C).amin(2)
    assert torch.allclose(Mahalanobis(0.0, "inputs").scores(KNOWN, items, items), restated, rtol=1e-6)
    for bad, match in (
        ({"images": -1}, "`images` must be at least 0"),
        ({"rank": -1}, "`rank` must be at least 0"),
        ({"images": 1, "rank": 1}, "`images` or `rank` must be 0"),
    ):
        with pytest.raises(cs.ConsilienceError, match=match):
            Mahalanobis(**bad)


def test_the_full_anchor_is_half_and_adds():
    item = summary(Mahalanobis(on="inputs"), SOURCES[0])
    assert type(item) is Statistics and item.tensors["second"].shape == (D * (D + 1) // 2,)
    halves = [replace(SOURCES[0], train=SOURCES[0].train.select(i)) for i in torch.arange(60).split(25)]
    parts = [summary(Mahalanobis(on="inputs"), h) for h in halves]
    whole = parts[0] + parts[1] + parts[2]
    assert all(torch.allclose(whole.tensors[n], t) for n, t in item.tensors.items())


# what is known of no one


@EACH
def test_unknown_inputs_have_no_expert_and_few_known_ones(mapper):
    mapper = replace(mapper, reject=0.1)
    memory = told(mapper, SOURCES)
    names = list(memory)
    assert not any(type(i) is Statistics for i in memory.values()), "scores of examples do not add"
    weights = mapper.route(routing(KNOWN, names), memory)
    accepted = weights.sum(1)
    assert torch.allclose(accepted, accepted.round(), atol=1e-6)
    share = float((accepted == 0).double().mean())
    assert 0.02 < share < 0.3, share
    assert float((mapper.route(routing(FAR, names), memory).sum(1) == 0).double().mean()) > (
        0.5 if "gate" in type(mapper).__name__.lower() else 0.95
    )
    for i, s in enumerate(SOURCES):  # each calibrated on its own validation examples
        alone = mapper.route(routing(s.validation.x, names[i : i + 1]), memory)
        assert 0.1 - 2 / 40 <= float((alone.sum(1) == 0).double().mean()) <= 0.1
    hard = replace(mapper, reject=0.0, **({"soft": False} if isinstance(mapper, ExpertGate) else {}))
    best = hard.route(routing(KNOWN, names), memory).argmax(1)
    free = replace(mapper, reject=0.0).route(routing(KNOWN, names), memory)
    alone = torch.stack(
        [mapper.route(routing(KNOWN, names[i : i + 1]), memory).sum(1) > 0 for i in range(5)], 1
    )
    takes = alone.gather(1, best[:, None])[:, 0]
    assert torch.equal(weights, free * takes[:, None]), (
        "what its best task accepts goes where it went, all else nowhere"
    )
    familiar = [mapper.familiarity(routing(x, names), memory) for x in (KNOWN, FAR)]
    assert cs.mappers.auroc(*familiar) > (0.7 if isinstance(mapper, ExpertGate) else 0.99)


def test_the_threshold_and_the_familiarity_are_what_they_say():
    mapper = NearestMean("inputs", reject=0.25)
    memory = told(mapper, SOURCES[:2])
    score, own = [], []
    for s in SOURCES[:2]:
        mu = torch.stack([s.train.x[s.train.y == c].mean(0) for c in range(C)])
        score.append(-(KNOWN[:, None] - mu).square().sum(2).amin(1))
        own.append(-(s.validation.x[:, None] - mu).square().sum(2).amin(1).sort(descending=True).values)
        assert torch.allclose(
            memory[("m", s.name)].tensors["validation"], -(-own[-1]).sort(descending=True).values
        )
    best = torch.stack(score, 1).argmax(1)
    top = torch.stack(score, 1).amax(1)
    cut, median, quartile = (
        torch.stack([-(-o).sort(descending=True).values[at] for o in own]) for at in (9, 20, 10)
    )
    median, quartile = median[best], quartile[best]
    weights = mapper.route(routing(KNOWN, keys(2)), memory)
    takes = top >= cut[best]
    assert torch.equal(weights.sum(1) > 0, takes) and 0 < int(takes.sum()) < len(takes)
    assert torch.equal(weights.argmax(1)[takes], best[takes])
    assert torch.allclose(
        mapper.familiarity(routing(KNOWN, keys(2)), memory), (top - median) / (median - quartile)
    )


def line(name, low, high, held=1000):
    """A task of one class, uniform on [low, high]."""
    train, validation, test = (
        low + (high - low) * torch.rand(n, 1, generator=key(0, name), dtype=torch.float64)
        for n in (500, held, 4000)
    )
    parts = [Tensors(x, torch.zeros(len(x), dtype=torch.long)) for x in (train, validation, test)]
    return Source(name, *parts, ((name, "0"),), (0,), name)


NARROW = {
    "nearest_mean": NearestMean("inputs", reject=0.05),
    "gaussian_mixture": GaussianMixture(1, on="inputs", reject=0.05),
    "mahalanobis": Mahalanobis(on="inputs", reject=0.05),
}


def test_a_tight_task_calls_no_example_of_a_broad_one_unknown():
    """Likelihoods heed how wide tasks are: x = 6.5 is nearer to the mean of B = 6 +- 0.1, and goes to A =
    [-10, 10] all the same."""
    mapper = NARROW["gaussian_mixture"]
    broad, tight = line("task0", -10, 10), line("task1", 5.9, 6.1)
    memory = told(mapper, [broad, tight])
    at = torch.tensor([[6.0], [6.5], [-9.0], [3.5], [30.0], [math.nan]], dtype=torch.float64)
    assert mapper.route(routing(at, keys(2)), memory).tolist() == [
        [0, 1],
        [1, 0],
        [1, 0],
        [1, 0],
        [0, 0],
        [0, 0],
    ]
    for s in (broad, tight):
        for part, most in ((s.validation.x, 0.05), (s.test.x, 0.05 + 0.03)):  # 256 examples are sent
            goes = replace(mapper, reject=0.0).route(routing(part, keys(2)), memory).argmax(1) == int(
                s.name[-1]
            )
            lost = mapper.route(routing(part, keys(2)), memory).sum(1) == 0
            assert float((goes & lost).double().mean()) <= most and float(goes.double().mean()) > 0.95


@pytest.mark.parametrize("mapper", list(NARROW.values()), ids=list(NARROW))
def test_a_broad_task_does_not_vouch_for_what_is_nearest_to_a_tight_one(mapper):
    """An input near B and outside it is unknown, however far A's own examples are from A: one broad task
    would make all known."""
    broad, tight = line("task0", -10, 10), line("task1", 19.9, 20.1)
    memory = told(mapper, [broad, tight])
    at = torch.tensor([[20.0], [20.5], [19.0], [1.0], [math.nan]], dtype=torch.float64)
    free = replace(mapper, reject=0.0).route(routing(at[:-1], keys(2)), memory).argmax(1)
    known = mapper.route(routing(at, keys(2)), memory)
    assert known[[0, 3, 4]].tolist() == [[0, 1], [1, 0], [0, 0]]
    assert free[3] == 0 and (mapper.reject and known[1:3][free[1:3] == 1].sum() == 0)
    for s in (broad, tight):
        goes = replace(mapper, reject=0.0).route(routing(s.test.x, keys(2)), memory).argmax(1) == int(
            s.name[-1]
        )
        lost = mapper.route(routing(s.test.x, keys(2)), memory)[goes].sum(1) == 0
        assert float(lost.double().mean()) <= 0.05 + (
            0.1 if isinstance(mapper, Mahalanobis) else 0.03
        )  # 64 or 256 are sent


@pytest.mark.parametrize("mapper", list(NARROW.values()), ids=list(NARROW))
def test_scores_are_exact_far_from_zero(mapper):
    away = [
        line(f"task{i}", *ends).map(x=lambda x: x + 1e6) for i, ends in enumerate([(-10, 10), (5.9, 6.1)])
    ]
    items = tuple(told(mapper, away).values())
    best, top = mapper.ready(items, items).best(away[0].test.x, True)
    assert torch.allclose(
        mapper.scores(away[0].test.x, items, items).gather(1, best[:, None])[:, 0], top, rtol=1e-9
    )


@EACH
def test_routes_with_reject_are_the_largest_scores_if_these_reach_their_marks(mapper):
    """40 tasks that overlap, of ever wider classes: a tight task often scores best where only a broad one
    would accept."""
    mapper = replace(mapper, reject=0.3, **({"soft": False} if isinstance(mapper, ExpertGate) else {}))
    memory = told(mapper, [source(i, 30 + i, scale=1.0, noise=0.3 + i / 10) for i in range(40)])
    names = sorted(memory, key=lambda k: k[1])
    x = torch.cat([KNOWN[::3], KNOWN[::5] / 3, FAR[:50]])
    items = tuple(memory[k] for k in names)
    settled = tuple(mapper.settle(i, lambda x: x) for i in items)
    anchors, scores = mapper.ready(settled, settled), mapper.scores(x, items, items)
    marks = torch.stack([o[int(0.3 * (len(o) - 1))] for o in anchors.own])
    top, best = scores.max(1)
    takes = top >= (marks - 1e-6 * marks.abs())[best]
    weights = mapper.route(routing(x, names), memory)
    assert torch.equal(weights.sum(1) > 0, takes) and torch.equal(weights.argmax(1)[takes], best[takes])
    assert 0 < int(takes.sum()) < len(takes)


@pytest.mark.parametrize("held", [1, 2, 255, 256, 257, 1004, 1500])
@pytest.mark.parametrize("reject", [0.01, 0.2, 0.5, 0.9, 0.99])
def test_at_most_that_share_of_validation_examples_is_below_the_mark(held, reject):
    scores = torch.randn(held, generator=gen(held), dtype=torch.float64)
    anchors = mixture.Anchors()
    anchors.own = [mixture.sketch(scores)]
    below = int((scores < anchors.marks(reject)[0, 0]).sum())
    assert reject * held - 2 - held / 255 <= below <= reject * held
    assert anchors.own[0][[0, -1]].tolist() == [scores.min(), scores.max()] and len(anchors.own[0]) == min(
        held, 256
    )


@EACH
def test_a_lone_expert_is_asked(mapper):
    mapper = replace(mapper, reject=0.1)
    memory = told(mapper, SOURCES[:1])
    assert mapper.rejects and not replace(mapper, reject=0.0).rejects
    own, far = (mapper.route(routing(x, keys(1)), memory) for x in (SOURCES[0].validation.x, FAR))
    assert own.shape == (40, 1) and int(own.sum()) in range(36, 40)
    assert float(far.mean()) < (0.5 if isinstance(mapper, ExpertGate) else 0.05)
    assert (replace(mapper, reject=0.0).route(routing(FAR, keys(1)), memory) == 1).all()


def test_mappers_of_answers_have_a_lone_expert_too():
    p = torch.tensor([[0.5, 0.5], [0.99, 0.01]])
    r = Routing(torch.zeros(2, 1), lambda: torch.zeros(2, 1), lambda: [p], keys(1))
    for mapper in (cs.mappers.oracle(), cs.mappers.average(), cs.mappers.superposition(), MinEntropy()):
        assert not mapper.rejects and mapper.route(r, {}).tolist() == [[1], [1]]
    assert MinEntropy(0.5).rejects and MinEntropy(0.5).route(r, {}).tolist() == [[0], [1]]


def test_scores_of_shared_images_on_features_are_refused():
    """They would be settled without features, and `route` would read that: it reads the features of its
    model instead."""
    mapper, seen = Mahalanobis(images=3), lambda x=KNOWN: x[:, :4].square()
    raw = told(replace(mapper, on="inputs"), SOURCES)
    sums = told(replace(mapper, on="inputs"), [s.map(x=seen) for s in SOURCES])
    memory = {k: replace(i, tensors={**i.tensors, "first": sums[k].tensors["first"]}) for k, i in raw.items()}
    items = list(memory.values())
    with pytest.raises(cs.ConsilienceError, match="of sums or factors, got an anchor of images; use `route`"):
        mapper.scores(seen(), items, items)
    settled = []
    for i in items:
        mu = i.tensors["first"].T / i.tensors["count"][:, None]
        residual = seen(i.tensors["x"].double()) - mu[i.tensors["y"].long()]
        settled.append(
            Module({"first": i.tensors["first"], "count": i.tensors["count"], "residual": residual})
        )
    weights = mapper.route(routing(KNOWN, list(memory), seen), memory)
    assert torch.equal(weights.argmax(1), mapper.scores(seen(), settled, settled).argmax(1))


@pytest.mark.parametrize("n", [1, 40])
def test_one_component_or_one_example_is_the_same_by_both_fits(n):
    few = replace(SOURCES[0], train=SOURCES[0].train.select(torch.arange(n)))
    a, b = (
        summary(GaussianMixture(1 if n > 1 else 5, on="inputs", fit=f), few) for f in ("torch", "sklearn")
    )
    assert same(a.tensors, b.tensors) and a.tensors["weight"].tolist() == [1.0]


def test_gates_are_scored_in_float64_whatever_the_batch():
    items = [summary(ExpertGate(epochs=1), s) for s in SOURCES[:2]]
    single = KNOWN.float()
    found = ExpertGate().ready(tuple(items), ()).scores(single)
    assert found.dtype == torch.float64
    assert torch.allclose(found, ExpertGate().scores(single.double(), items, items), rtol=1e-13)


def test_calibration_needs_validation_and_a_reject():
    empty = replace(SOURCES[0], validation=SOURCES[0].validation.select(torch.arange(0)))
    for mapper in MAPPERS.values():
        with pytest.raises(
            cs.ConsilienceError,
            match=r"validation examples, and 'task0' has none",
        ):
            summary(replace(mapper, reject=0.1), empty)
        summary(mapper, empty)
        memory = told(mapper, SOURCES[:2])
        with pytest.raises(cs.ConsilienceError, match="every anchor must hold scores of validation examples"):
            replace(mapper, reject=0.1).route(routing(KNOWN, keys(2)), memory)
        with pytest.raises(cs.ConsilienceError, match="`reject` must be above 0"):
            mapper.familiarity(routing(KNOWN, keys(2)), memory)
        for bad in (-0.1, 1.0, math.nan):
            with pytest.raises(cs.ConsilienceError, match=r"`reject` must be in \[0, 1\)"):
                replace(mapper, reject=bad)
    many = replace(SOURCES[0], validation=source(0, held=900).validation)
    assert summary(NearestMean("inputs", 0.1), many).tensors["validation"].shape == (256,)
    assert summary(Mahalanobis(on="inputs", reject=0.1), many).tensors["validation"].shape == (64, D)


def test_auroc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    for seed in range(5):
        a, b = (
            torch.randint(6, (40,), generator=gen(seed)).double(),
            torch.randint(5, (30,), generator=gen(seed + 9)).double(),
        )
        y = [1] * 40 + [0] * 30
        assert cs.mappers.auroc(a, b) == pytest.approx(roc_auc_score(y, torch.cat([a, b]).numpy()), abs=1e-12)
    assert cs.mappers.auroc(a, a) == 0.5
    with pytest.raises(cs.ConsilienceError, match="values of both kinds, got 40 known and 0 unknown"):
        cs.mappers.auroc(a, a[:0])


@EACH
@pytest.mark.parametrize("reject", [0.0, 0.2])
def test_no_order_of_arrival_and_no_repetition_changes_a_bit(mapper, reject):
    mapper = replace(mapper, reject=reject)
    items = told(mapper, SOURCES)
    messages = [Message("m", s.name, 1, 60, "o", "b", {"mapper": items[("m", s.name)]}) for s in SOURCES]
    x = torch.cat([KNOWN, FAR[:50]])
    first = familiar = None
    for seed in range(4):
        order = [Message.from_bytes(m.to_bytes()) for m in messages * 2]
        random.Random(seed).shuffle(order)
        bank = {}
        for m in order:
            bank = join(bank, [m])
        memory = {m.key: bank[m.key].items["mapper"] for m in dict.fromkeys(order)} | {}
        names = list(memory)
        random.Random(seed + 1).shuffle(names)
        weights = mapper.route(routing(x, names), memory)[:, [names.index(k) for k in keys(5)]]
        first = weights if first is None else first
        assert torch.equal(weights, first)
        if reject:
            now = mapper.familiarity(routing(x, names), memory)
            familiar = now if familiar is None else familiar
            assert torch.equal(now, familiar)


def test_two_anchors_alike_go_to_the_first_name():
    for mapper in MAPPERS.values():
        item = summary(mapper, SOURCES[0])
        memory = {("m", "b"): item, ("m", "a"): item}
        weights = mapper.route(routing(KNOWN, [("m", "b"), ("m", "a")]), memory)
        assert (weights[:, 1] == (0.5 if getattr(mapper, "soft", False) else 1)).all()


def test_an_answer_that_is_never_certain_is_unknown():
    p = torch.tensor([[0.5, 0.5], [0.99, 0.01], [0.7, 0.3]])
    q = torch.tensor([[0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [0.98, 0.01, 0.01]])
    r = Routing(torch.zeros(3, 1), lambda: torch.zeros(3, 1), lambda: [p, q], keys(2))
    assert MinEntropy().route(r, {}).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert MinEntropy(0.5).route(r, {}).tolist() == [[0, 0], [1, 0], [0, 1]]
    with pytest.raises(cs.ConsilienceError, match=r"`unknown` must be in \(0, 1\]"):
        cs.mappers.min_entropy(0.0)


def test_an_expert_of_one_class_is_never_certain():
    one, p = torch.ones(3, 1), torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]])
    q = torch.tensor([[0.99, 0.01], [0.8, 0.2], [0.55, 0.45]])
    r = Routing(torch.zeros(3, 1), lambda: torch.zeros(3, 1), lambda: [one, p, q], keys(3))
    assert MinEntropy().route(r, {}).argmax(1).tolist() == [2, 1, 2]
    alike = Routing(torch.zeros(3, 1), lambda: torch.zeros(3, 1), lambda: [one, one], keys(2))
    assert MinEntropy().route(alike, {}).tolist() == [[1, 0]] * 3, "the first of equal ones"
    assert MinEntropy(0.9).route(alike, {}).tolist() == [[0, 0]] * 3


def test_an_expert_gate_on_wide_features():
    wide = [source(i, 64, 1280, dtype=torch.float32) for i in range(2)]
    mapper = ExpertGate(0.05, 3, 1e-3, on="features", reject=0.1)
    memory = {("m", s.name): summary(replace(mapper, on="inputs"), s) for s in wide}
    x = torch.cat([s.test.x for s in wide])
    weights = mapper.route(routing(x, list(memory)), memory)
    y = torch.arange(2).repeat_interleave(200)
    assert float((weights.argmax(1) == y)[weights.sum(1) > 0].double().mean()) > 0.9


def test_it_is_in_the_catalogue():
    assert cs.mappers.mahalanobis(images=5) == Mahalanobis(images=5)
    assert cs.mappers.mahalanobis(rank=8, reject=0.1) == Mahalanobis(rank=8, reject=0.1)
    assert cs.mappers.gaussian_mixture(fit="sklearn", reject=0.05) == GaussianMixture(
        fit="sklearn", reject=0.05
    )
    assert cs.mappers.nearest_mean(reject=0.1) == NearestMean(reject=0.1)
    assert cs.mappers.expert_gate(reject=0.1) == ExpertGate(reject=0.1)
    with pytest.raises(cs.ConsilienceError, match="`fit` must be torch or sklearn, got 'jax'"):
        cs.mappers.gaussian_mixture(fit="jax")
    assert mixture.sketch(torch.tensor([2.0, 1.0])).tolist() == [1.0, 2.0]


# One outlier.


def with_sentinel(s: Source, value: float) -> Source:
    """The source with one number of its first training example replaced."""
    x = s.train.whole()[0].clone()
    x.view(len(x), -1)[0, 0] = value
    return replace(s, train=Tensors(x, s.train.targets()))


@pytest.fixture(scope="module")
def digits() -> list[Source]:
    return cs.data.split_classes(cs.data.digits(), 5)


def by_task(data: list[Source], method: cs.Method) -> np.ndarray:
    model = cs.models.multi_head(cs.models.random_features(64, 128), 10)
    return cs.run(cs.settings.skill([data[:2], data[2:]]), method, model).matrix[-1]


@pytest.mark.parametrize(
    "kind",
    [
        {"mapper": "gaussian_mixture", "components": 5},
        {"mapper": "mahalanobis"},
        {"mapper": "mahalanobis", "images": 5},
        {"mapper": "nearest_mean"},
    ],
    ids=["mixture", "sums", "images", "means"],
)
def test_one_sentinel_costs_nobody_anything_with_clip(digits, kind):
    """Without it a sentinel spoils at least its own task, with a warning that names the example."""
    data = [with_sentinel(digits[0], 1e3), *digits[1:]]
    clean = by_task(digits, cs.methods.skill(**kind, head="ridge"))
    with pytest.warns(UserWarning, match=r"training example 0 of 'digits/0-1' has numbers up to 1e\+03"):
        clipped, plain = (by_task(data, cs.methods.skill(**kind, head="ridge", clip=c)) for c in (3.0, 0.0))
    assert (clipped > clean - 0.05).all() and (plain < clean - 0.04).any()


@pytest.mark.parametrize("kind", [NearestMean, GaussianMixture, Mahalanobis, ExpertGate])
def test_anchors_of_features_that_overflow_are_refused_by_their_example(kind):
    """1e30 is finite, and so is its square in float64, but not the squares of those who read the anchor."""
    far = with_sentinel(source(0), 1e30)
    with pytest.raises(cs.ConsilienceError, match="squares, got 1e.30 for training example 0 of 'task0'"):
        summary(kind(on="inputs"), far)
    clipped = summary(kind(on="inputs", clip=3.0), far)
    assert all(tensor.abs().max() < 1e6 for tensor in clipped.tensors.values())


def test_clip_moves_far_examples_alone():
    """Restated: within `clip` median distances to the median nothing changes, to the bit."""
    psi = torch.randn(200, 6, generator=gen(3)) * torch.tensor([1.0, 5, 1, 1, 0.1, 1])
    psi[7] *= 1e6
    clipped = Clip.of(psi, 3.0)(psi)
    # Of an even number torch's median is the lower one.
    centre = np.sort(psi.numpy().astype(float), 0)[99]
    length = np.linalg.norm(psi.numpy() - centre, axis=1)
    limit = 3 * np.sort(length)[99]
    far = length > limit
    assert far[7] and torch.equal(clipped[~torch.from_numpy(far)], psi[~torch.from_numpy(far)])
    wanted = centre + (psi.numpy() - centre) * (limit / length)[:, None]
    np.testing.assert_allclose(clipped.numpy()[far], wanted[far], rtol=1e-5)
    assert torch.equal(Clip.of(torch.ones(4, 2), 3.0)(torch.ones(4, 2)), torch.ones(4, 2))
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(cs.ConsilienceError, match="`clip` must be 0"):
            NearestMean(clip=wrong)
    with pytest.raises(
        cs.ConsilienceError, match="`clip` limits the features of anchors and of solved heads"
    ):
        cs.methods.skill("oracle", clip=3.0)


@pytest.mark.parametrize("options", [{}, {"rank": 3}])
def test_one_anchor_cannot_make_the_covariance_its_own(options):
    """What another agent sent without a clip: its variance counts as thrice the median at most."""
    items = [summary(Mahalanobis(on="inputs", clip=3.0, **options), source(i)) for i in range(5)]
    plain, _ = covariance.spread(items)
    same_bits, _ = covariance.spread(items, 3.0)
    assert torch.allclose(plain, same_bits)
    wild = [*items, summary(Mahalanobis(on="inputs", **options), source(5, noise=1e4))]
    limited, unlimited = covariance.spread(wild, 3.0)[0], covariance.spread(wild)[0]
    assert float(limited.trace()) < 2 * float(plain.trace()) < 1e-3 * float(unlimited.trace())


def test_who_is_far_out():
    """By the largest number of each example; sparse inputs, constants and integers are nobody's outliers."""
    x = torch.rand(50, 4, 4, generator=gen())
    assert not len(far_out(x)) and not len(far_out(torch.zeros(9, 3))) and not len(far_out(x.mul(255).byte()))
    sparse = torch.zeros(50, 16)
    sparse[:5, 3] = 1.0
    assert not len(far_out(sparse))
    for value in (-999.0, 1e9, float("nan"), float("inf")):
        other = x.clone()
        other[31, 2, 1] = value
        assert far_out(other).tolist() == [31]
    data = source(0)
    data.train.x[5, 1] = 1e7
    assert "training example 5 of 'task0' has numbers up to 1e+07" in str(outliers(data))
