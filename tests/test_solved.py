"""Heads in closed form: the ridge and prototype solutions restated, on both sides of d = n, as a start and
on their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid

import consilience as cs
from consilience.core.params import key
from consilience.core.source import Source, Tensors
from consilience.corrections.solved import SolvedHead

C = 6


def source(i, n=60, d=8):
    y = torch.tensor((2 * i, 2 * i + 1))[torch.arange(n) % 2]
    x = torch.randn(C, d, generator=key("centres"), dtype=torch.float64)[y] + torch.randn(
        n, d, generator=key(i), dtype=torch.float64
    )
    t = Tensors(x, y)
    return Source(
        f"s/{i}", t, t, t, tuple(("space", str(c)) for c in range(C)), (2 * i, 2 * i + 1), task=f"s/{i}"
    )


def learned(kind, s, width=5, ridge=None):
    model = cs.models.multi_head(cs.models.random_features(s.train.x.shape[1], width), C)
    method = cs.Method("closed", (SolvedHead(kind, ridge),), fixed={"epochs": 0})
    r = cs.run(cs.settings.continual([s], "task"), method, model, cs.Training(precision="fp64"))
    params = r.agent.state.params
    x = s.train.x
    return (
        r,
        model.features(params, r.agent.state.buffers, x).numpy(),
        params[f"heads.{s.name}.weight"],
        params[f"heads.{s.name}.bias"],
    )


@pytest.mark.parametrize("width", [5, 90])
def test_the_ridge_head_is_scikit_learns(width):
    s = source(1)
    _, psi, w, b = learned("ridge", s, width)
    y = np.eye(C)[s.train.y.numpy()][:, [2, 3]]
    centred = psi - psi.mean(0)
    alpha = 0.1 * (centred**2).sum() / psi.shape[1]
    own = Ridge(alpha=alpha).fit(psi, y)
    np.testing.assert_allclose(w.numpy(), own.coef_, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(b.numpy(), own.intercept_, rtol=1e-5, atol=1e-7)


def test_the_prototype_head_answers_as_the_nearest_mean():
    s = source(2)
    r, psi, w, b = learned("prototype", s, 20)
    wanted = NearestCentroid().fit(psi, s.train.y.numpy()).predict(psi)
    assert ((psi @ w.numpy().T + b.numpy()).argmax(1) + 4 == wanted).all()
    mu = np.stack([psi[s.train.y.numpy() == c].mean(0) for c in (4, 5)])
    spread = ((psi - mu[s.train.y.numpy() - 4]) ** 2).mean()
    logits = -((psi[:, None] - mu) ** 2).sum(2) / (2 * spread)
    p = np.exp(logits - logits.max(1, keepdims=True))
    answers = r.agent.predict(s.train.x, "s/2").numpy()
    np.testing.assert_allclose(answers[:, 4:], p / p.sum(1, keepdims=True), atol=1e-5)
    assert not answers[:, :4].any()


@pytest.mark.parametrize(("width", "ridge"), [(5, None), (90, 0.3)])
def test_the_logistic_head_is_scikit_learns(width, ridge):
    s = source(1, 90)
    y = torch.arange(90) % 3
    t = Tensors(s.train.x, y)
    s = replace(s, train=t, validation=t, test=t, classes=(0, 1, 2))
    _, psi, w, b = learned("logistic", s, width, ridge)
    pull = (0.01 if ridge is None else ridge) * (psi - psi.mean(0)).var(0).mean()
    own = LogisticRegression(C=1 / (90 * pull), tol=1e-10, max_iter=10_000).fit(psi.astype(float), y.numpy())
    np.testing.assert_allclose(w.numpy(), own.coef_, rtol=1e-3, atol=1e-4)
    shift = b.numpy() - own.intercept_  # a number for all classes changes no probability
    np.testing.assert_allclose(shift, shift.mean() * np.ones(3), atol=1e-3)


def test_lp_ft_begins_at_the_logistic_head_and_trains_the_biases():
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Flatten())
    backbone = cs.models.backbone(cs.models.wrap(body, outputs=216, headless=True), size=8)
    y = torch.arange(60) % 3
    x = torch.rand(60, 3, 8, 8, generator=key("images")) + y[:, None, None, None] / 50
    t = Tensors(x / x.max(), y)
    s = Source("s", t, t, t, tuple(("space", str(c)) for c in range(3)), (0, 1, 2), task="s")
    model = cs.models.beneficial_biases(backbone, 3)

    def at(head, epochs, **more):
        training = cs.Training(epochs=epochs, optimiser="adam", lr=1e-3, **more)
        return cs.run(cs.settings.skill([[s]]), cs.methods.skill("nearest_mean", head=head), model, training)

    solved, begun, after = at("logistic", 3), at("lp_ft", 0), at("lp_ft", 10, rates={"biases.*": 20.0})
    heads, trained = (next(iter(r.agent.state.experts.values())).group("entries") for r in (begun, after))
    assert torch.equal(solved.agent.predict(t.x, "s"), begun.agent.predict(t.x, "s")), (
        "no steps where the head is solved for"
    )
    assert not heads["biases.s.body.0"].any() and trained["biases.s.body.0"].abs().max() > 0.01
    loss = [float(torch.nn.functional.nll_loss(r.agent.predict(t.x, "s").log(), y)) for r in (begun, after)]
    assert loss[1] < loss[0]


def test_steps_go_on_from_the_head_and_other_rows_stay():
    s = source(0)
    model = cs.models.mlp(8, (), C)
    method = cs.Method("closed", (SolvedHead(),))
    now = replace(s, task=None)
    first, after, plain = (
        cs.run(
            cs.settings.continual([now]), m, model, cs.Training(epochs=e, lr=1e-6, precision="fp64")
        ).params["1.weight"]
        for m, e in ((method, 0), (method, 1), (cs.methods.finetune(), 0))
    )
    assert torch.equal(first[2:], plain[2:]) and not torch.isclose(first[:2], plain[:2]).any(), (
        "rows of other classes stay"
    )
    assert 0 < (first - after).abs().max() < 1e-4, "a tiny step from the closed form"


def test_what_cannot_be_solved_is_refused():
    with pytest.raises(cs.ConsilienceError, match=r"`kind` must be ridge, prototype or logistic, got 'svm'"):
        SolvedHead("svm")
    with pytest.raises(cs.ConsilienceError, match=r"`ridge` must be positive and finite, got 0"):
        SolvedHead(ridge=0)
    same = replace(source(0), train=Tensors(torch.ones(6, 8, dtype=torch.float64), torch.tensor([0, 1] * 3)))
    for kind in ("ridge", "prototype", "logistic"):
        _, _, w, b = learned(kind, same)
        assert torch.isfinite(w).all() and torch.isfinite(b).all(), "features that do not vary"


def test_sources_of_one_head_are_solved_together_and_visits_are_refused():
    a, b = (
        source(0),
        replace(source(1), classes=(0, 1), train=Tensors(source(1).train.x, source(1).train.y - 2)),
    )
    both = replace(a, train=Tensors(torch.cat([a.train.x, b.train.x]), torch.cat([a.train.y, b.train.y])))
    model, method = cs.models.linear(8, C), cs.Method("closed", (SolvedHead(),), fixed={"epochs": 0})
    runs = [
        cs.run(
            cs.settings.multitask([replace(s, task="t") for s in own], "class"),
            method,
            model,
            cs.Training(precision="fp64"),
        )
        for own in ([a, b], [both])
    ]
    assert torch.allclose(runs[0].params["1.weight"], runs[1].params["1.weight"], atol=1e-12)
    with pytest.raises(cs.Refusal, match="overwritten at each visit"):
        cs.run(cs.settings.federated([a, b], rounds=2), method, model)
    bare = cs.models.wrap(lambda: torch.nn.Linear(8, C, bias=False))
    with pytest.raises(cs.Refusal, match="needs a bias, and 'weight' has none"):
        cs.run(cs.settings.continual([a]), method, bare)
    lacking = replace(a, classes=(0, 1, 2))
    _, _, w, bias = learned("prototype", lacking)
    assert float(bias[2]) == -1e9 and bool((w[2] == 0).all()), "a class without examples never wins"


def spoilt(s: Source, value: float) -> Source:
    x = s.train.x.clone()
    x[3, 0] = value
    return replace(s, train=Tensors(x, s.train.y))


@pytest.mark.filterwarnings("ignore:training example")
@pytest.mark.parametrize("kind", ["ridge", "prototype", "logistic"])
def test_one_outlier_moves_a_clipped_head_little(kind):
    """Whatever its size, it counts as one at three median distances: nearer the clean head than without."""
    s, heads = source(1), {}
    cases = {"clean": (None, 0.0), "clip": (1e6, 3.0), "larger": (1e9, 3.0), "plain": (1e6, 0.0)}
    for name, (value, clip) in cases.items():
        data = s if value is None else spoilt(s, value)
        model = cs.models.multi_head(cs.models.random_features(8, 16), C)
        method = cs.Method("closed", (SolvedHead(kind, clip=clip),), fixed={"epochs": 0})
        schedule, training = cs.settings.continual([data], "task"), cs.Training(precision="fp64")
        heads[name] = cs.run(schedule, method, model, training).score
    assert heads["clip"] >= heads["clean"] - 0.05 and heads["clip"] == heads["larger"]
    assert heads["plain"] < heads["clip"] - 0.3


def test_sums_are_clipped_at_each_client():
    """Fed3R: one sentinel at one of five clients; and the sums restated."""
    parts = cs.data.iid(cs.data.digits(), 5)
    x = parts[0].train.x.clone()
    x[0, 0] = 1e4
    data = [replace(parts[0], train=Tensors(x, parts[0].train.y)), *parts[1:]]
    model = cs.models.linear(64, 10)

    def score(data, clip):
        return cs.run(cs.settings.federated(data, 1), cs.methods.fed3r(0.01, clip=clip), model).score

    with pytest.warns(UserWarning, match="training example 0 of"):
        clipped, plain = score(data, 3.0), score(data, 0.0)
    assert clipped > score(parts, 0.0) - 0.01 and plain <= clipped
    result = cs.run(cs.settings.federated(data, 1), cs.methods.fed3r(clip=3.0), model)
    item = next(m for m in result.agent.state.bank.values() if m.source == parts[0].name).items["Moments"]
    psi = x.double().numpy()
    centre = np.sort(psi, 0)[(len(psi) - 1) // 2]
    length = np.linalg.norm(psi - centre, axis=1)
    limit = 3 * np.sort(length)[(len(psi) - 1) // 2]
    psi = np.where((length > limit)[:, None], centre + (psi - centre) * (limit / length)[:, None], psi)
    psi = np.concatenate([psi, np.ones((len(psi), 1))], 1)
    np.testing.assert_allclose(item.tensors["second"].numpy(), psi.T @ psi, rtol=1e-9, atol=1e-9)


def test_features_that_overflow_are_refused_by_their_example():
    for method in (cs.methods.fed3r(), cs.Method("closed", (SolvedHead(),), fixed={"epochs": 0})):
        data = [spoilt(source(1), 1e25)]
        schedule = cs.settings.federated(data, 1) if method.name == "fed3r" else cs.settings.continual(data)
        with (
            pytest.warns(UserWarning, match="training example 3 of 's/1'"),
            pytest.raises(
                cs.ConsilienceError, match="finite squares, got .* for training example 3 of 's/1'"
            ),
        ):
            cs.run(schedule, method, cs.models.linear(8, C))
