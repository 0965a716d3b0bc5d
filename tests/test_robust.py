"""Aggregators against bad rows: restatements, huge values, and clients that send garbage, huge values or
NaN."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import consilience as cs
from consilience import aggregators
from consilience.aggregators._krum import squares
from consilience.core.aggregator import Aggregator
from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Weights
from consilience.loop.agent import Agent

ROBUST: dict[str, Aggregator] = {
    "median": aggregators.median(),
    "trimmed_mean": aggregators.trimmed_mean(0.25),
    "krum": aggregators.krum(2),
    "multi_krum": aggregators.multi_krum(2),
    "bulyan": aggregators.bulyan(1),
    "geometric_median": aggregators.geometric_median(),
}
every = pytest.mark.parametrize("name", ROBUST)


def rows(m: int, n: int = 20, seed: int = 0, bad: int = 0, scale: float = 50.0) -> Tensor:
    made = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made[:bad] *= scale
    return made[made[:, 0].argsort()]  # the canonical order, so that ties are resolved alike


# restatements, in numpy


def krum_order(x: np.ndarray, f: int, left: list[int]) -> list[int]:
    def score(i: int) -> float:
        others = sorted(float(((x[i] - x[j]) ** 2).sum()) for j in left if j != i)
        return sum(others[: max(1, len(left) - f - 2)])

    return sorted(left, key=score)


@pytest.mark.parametrize(("m", "f"), [(3, 0), (7, 2), (10, 2), (11, 3)])
def test_krum_restated(m: int, f: int) -> None:
    for seed in range(5):
        x = rows(m, seed=seed, bad=f)
        order = krum_order(x.numpy(), f, list(range(m)))
        assert torch.allclose(aggregators.krum(f)(x), x[order[0]], atol=1e-14)
        for keep in (1, 2, None):
            kept = order[: keep or m - f]
            assert torch.allclose(aggregators.multi_krum(f, keep)(x), x[kept].mean(0), atol=1e-14)
        total = torch.rand(m, generator=torch.Generator().manual_seed(seed)).double()
        assert torch.allclose(aggregators.krum(f)(x, total), total.sum() * x[order[0]], atol=1e-12), (
            "only the sum of weights counts"
        )


@pytest.mark.parametrize(("m", "f"), [(3, 0), (7, 1), (9, 1), (11, 2)])
def test_bulyan_restated(m: int, f: int) -> None:
    for seed in range(5):
        x = rows(m, seed=seed, bad=f).numpy()
        left, taken = list(range(m)), []
        while len(taken) < m - 2 * f:
            best = krum_order(x, f, left)[0] if len(left) > 1 else left[0]
            taken.append(best)
            left.remove(best)
        expected = []
        for column in x[taken].T:
            middle = np.median(column)
            near = sorted(column, key=lambda v, middle=middle: abs(v - middle))
            expected.append(np.mean(near[: m - 4 * f]))
        assert np.allclose(aggregators.bulyan(f)(torch.tensor(x)).numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [0, 2])
def test_the_geometric_median_is_the_minimum(weighted: bool, bad: int) -> None:
    from scipy.optimize import minimize

    for seed in range(4):
        x = rows(7, 4, seed, bad).numpy()
        w = np.random.default_rng(seed).uniform(0.5, 1.5, 7) if weighted else np.full(7, 1 / 7)

        def far(v: np.ndarray, x: np.ndarray = x, w: np.ndarray = w) -> float:
            return float((w * np.linalg.norm(x - v, axis=1)).sum())

        found = aggregators.geometric_median()(torch.tensor(x), w.tolist()).numpy() / w.sum()
        best = minimize(
            far,
            np.median(x, 0),
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 9000},
        ).x
        assert far(found) <= far(best) * (1 + 1e-7)  # smoothed
        assert np.allclose(found, best, atol=1e-4)


def test_the_geometric_median_on_a_line_is_the_median() -> None:
    assert (
        abs(
            float(
                aggregators.geometric_median()(torch.tensor([[1.0], [2.0], [4.0], [5.0], [900.0]]).double())
            )
            - 4
        )
        < 1e-5
    )
    assert (
        abs(float(aggregators.geometric_median()(torch.tensor([[1.0], [1.0], [1.0], [900.0]]).double())) - 1)
        < 1e-12
    )
    for scale in (1e-12, 1e12):
        x = rows(6)
        assert torch.allclose(
            aggregators.geometric_median()(x * scale), aggregators.geometric_median()(x) * scale, rtol=1e-9
        )


def test_distances_beside_huge_rows() -> None:
    """From the differences, not from inner products, whose rounding would swallow them."""
    x = rows(5).float() * 1e-3 + 1
    huge = torch.cat([x, torch.full((1, 20), 3e38)])
    assert torch.equal(squares(huge)[:5, :5], squares(x)) and float(squares(x)[0, 1]) > 0
    apart = torch.tensor([[1e308] * 3, [-1e308] * 3], dtype=torch.float64)
    assert squares(apart).tolist() == [[0, torch.inf], [torch.inf, 0]]


# what is huge


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_finite_rows_change_little(name: str, dtype: torch.dtype) -> None:
    a, most = ROBUST[name], torch.finfo(dtype).max
    x = (1 + 0.1 * rows(11)).to(dtype)
    spread = float(x.max() - x.min())
    bad = 2 if name != "bulyan" else 1
    for values in itertools.product((most, -most, 1e6), repeat=bad):
        ill = x.clone()
        for i, v in enumerate(values):
            ill[i] = v
        ill[0, ::2] *= -1
        found = a(ill)
        assert torch.isfinite(found).all() and float((found - x.mean(0)).abs().max()) < spread
        order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
        assert torch.equal(found, a(ill[order])), "in any order"


# refusals


@pytest.mark.parametrize(
    ("make", "m", "message"),
    [
        (lambda: aggregators.krum(2), 6, "Krum needs at least 7 rows, got 6."),
        (lambda: aggregators.multi_krum(1, 8), 7, "MultiKrum needs at least 8 rows, got 7."),
        (lambda: aggregators.multi_krum(3), 8, "MultiKrum needs at least 9 rows, got 8."),
        (lambda: aggregators.bulyan(2), 10, "Bulyan needs at least 11 rows, got 10."),
        (
            lambda: aggregators.krum(-1),
            9,
            "`byzantine` must be a whole number >= 0, got -1.",
        ),
        (
            lambda: aggregators.bulyan(0.5),
            9,
            "`byzantine` must be a whole number >= 0, got 0.5.",
        ),
        (
            lambda: aggregators.multi_krum(1, 0),
            9,
            "`keep` must be a whole number >= 1, or None, got 0.",
        ),
        (
            lambda: aggregators.geometric_median(0.0),
            9,
            "`smoothing` must be positive and finite, got 0.0.",
        ),
        (
            lambda: aggregators.geometric_median(1e-6, 0),
            9,
            "`iterations` must be a whole number >= 1, got 0.",
        ),
    ],
)
def test_refusals(make: object, m: int, message: str) -> None:
    with pytest.raises(ConsilienceError) as error:
        make()(rows(m))  # type: ignore[operator]
    assert str(error.value) == message
    assert make is not None


def test_enough_rows_are_enough() -> None:
    for a, m in ((aggregators.krum(2), 7), (aggregators.multi_krum(2, 7), 7), (aggregators.bulyan(2), 11)):
        assert torch.isfinite(a(rows(m))).all()


# clients that lie

CLIENTS, BAD = 10, ("client-3", "client-7")


def lie(kind: str, p: Tensor, generator: torch.Generator) -> Tensor:
    if kind == "garbage":
        return torch.randn(p.shape, generator=generator)
    return torch.full_like(p, {"huge": 1e6, "nan": torch.nan}[kind])


@pytest.fixture
def liars(monkeypatch: pytest.MonkeyPatch):
    """Two clients (or those named) tell something else than what they learned."""
    send = Agent.send

    def install(kind: str, bad: tuple[str, ...] = BAD) -> None:
        def told(agent: Agent, receipts: object) -> list[Message]:
            messages = send(agent, receipts)  # type: ignore[arg-type]
            if agent.name not in bad:
                return messages
            g = torch.Generator().manual_seed(len(agent.name) + agent.state.version)
            return [
                replace(
                    m,
                    items={
                        "model": Weights({k: lie(kind, p, g) for k, p in m.items["model"].tensors.items()})
                    },
                    digest="",
                )
                for m in messages
            ]

        monkeypatch.setattr(Agent, "send", told)

    return install


@pytest.fixture(scope="module")
def digits() -> cs.Schedule:
    return cs.settings.federated(cs.data.iid(cs.data.digits(), CLIENTS), 10)


def score(schedule: cs.Schedule, aggregator: Aggregator) -> float:
    training = cs.Training(epochs=5, batch_size=200, lr=1.0)
    return cs.run(schedule, cs.methods.aggregate(aggregator), cs.models.linear(64, 10), training).score


@pytest.fixture(scope="module")
def clean(digits: cs.Schedule) -> float:
    found = score(digits, aggregators.mean())
    assert found > 0.9
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(ROBUST, ["garbage", "huge"]), ("krum", "nan"), ("median", "nan"), ("bulyan", "nan")],
)
@pytest.mark.filterwarnings("ignore:NaN or infinity in what 'client-3', 'client-7' told. left out")
def test_two_liars_of_ten_cost_little(name: str, kind: str, digits: cs.Schedule, clean: float, liars) -> None:
    liars(kind, BAD[:1] if name == "bulyan" and kind != "nan" else BAD)  # its 10 rows are enough for one
    assert score(digits, ROBUST[name]) > clean - 0.03


@pytest.mark.parametrize("kind", ["garbage", "huge"])
def test_the_mean_is_lost(kind: str, digits: cs.Schedule, clean: float, liars) -> None:
    liars(kind)
    assert score(digits, aggregators.mean()) < clean - 0.1


def test_the_mean_refuses_nan_by_the_clients_name(digits: cs.Schedule, liars) -> None:
    liars("nan")
    with pytest.raises(
        ConsilienceError, match=r"must be finite, got NaN or infinity in '1.bias' of 'client-3'"
    ):
        score(digits, aggregators.mean())


def test_who_is_left_out_is_named(digits: cs.Schedule, liars) -> None:
    liars("nan")
    with pytest.warns(UserWarning, match="parameters of 'client-3', 'client-7' have NaN or infinity"):
        score(digits, aggregators.median())


def test_where_all_lie_the_first_is_named(liars) -> None:
    liars("nan", tuple(f"client-{i}" for i in range(3)))
    schedule = cs.settings.federated(cs.data.iid(cs.data.digits(), 3), 1)
    with pytest.raises(ConsilienceError, match="got NaN or infinity in '1.bias' of 'client-0'"):
        score(schedule, aggregators.median())
