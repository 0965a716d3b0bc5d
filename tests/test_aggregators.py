"""Every aggregator of the catalogue: the contract, invariance to order, purity, refusals; and each one's own
identities."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import consilience as cs
from consilience import aggregators
from consilience.aggregators._breadcrumbs import Breadcrumbs
from consilience.aggregators._ties import Ties
from consilience.core.aggregator import Aggregator, Blockwise, Linear
from consilience.core.errors import ConsilienceError
from consilience.core.metrics import worst
from consilience.core.shares import exact_share
from consilience.corrections.sensitivity import TaLoS

HAS_TORCHJD = importlib.util.find_spec("torchjd") is not None
needs_torchjd = pytest.mark.skipif(not HAS_TORCHJD, reason="torchjd is not installed")
CATALOGUE = {
    n: f
    for n, f in inspect.getmembers(aggregators, inspect.isfunction)
    if f.__module__ == aggregators.__name__
}
THEIRS: dict[str, dict[str, object]] = {
    "AlignedMTL": {},
    "ConFIG": {},
    "GradDrop": {},
    "IMTLG": {},
    "Krum": {"n_byzantine": 1},
    "MGDA": {},
    "PCGrad": {},
    "Random": {},
    "Sum": {},
}
GIVEN: dict[str, dict[str, object]] = {n: {"byzantine": 0} for n in ("krum", "multi_krum", "bulyan")}
ALL: dict[str, Aggregator] = {
    n: f(**GIVEN.get(n, {})) for n, f in CATALOGUE.items() if n not in ("torchjd", "slerp")
}
"""All but `slerp`, which takes two rows: it is tested in test_merging_aggregators."""
if HAS_TORCHJD:
    ALL |= {f"torchjd {n}": aggregators.torchjd(n, **a) for n, a in THEIRS.items()}
every = pytest.mark.parametrize("name", ALL)
quick = settings(deadline=None, max_examples=40, derandomize=True)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def trimmed(row: Tensor, k: int) -> Tensor:
    """A restatement of the trim: the k largest magnitudes, those of lowest index first."""
    order = sorted(range(len(row)), key=lambda i: (-abs(float(row[i])), i))
    return torch.stack([row[i] if i in set(order[:k]) else row[i] * 0 for i in range(len(row))])


# Every aggregator


@every
@pytest.mark.parametrize("weights", [None, [0.2, 0.2, 0.2, 0.2], [0.5, 1.0, 0.0, 2.0]])
@pytest.mark.parametrize("seed", [0, 1])
def test_contract(name: str, weights: list[float] | None, seed: int) -> None:
    a, g = ALL[name], normal(50, seed=seed, dtype=torch.float64)
    total = 1.0 if weights is None else sum(weights)
    rows = g.expand(4, 50).contiguous()
    if getattr(a, "expectation", False):
        found = torch.stack([a(rows, weights, gen(s)) for s in range(4000)])
        assert ((found.mean(0) - total * g).abs() < 5 * found.std(0) / 4000**0.5).all()
        return
    own = a(g[None], [1.0]) if isinstance(a, Breadcrumbs) else trimmed(g, 10) if isinstance(a, Ties) else g
    assert torch.allclose(a(rows, weights, gen()), total * own, rtol=1e-6, atol=1e-6)


@every
@quick
@given(seed=st.integers(0, 1000), m=st.integers(4, 6), coarse=st.booleans())
def test_order_does_not_matter_to_the_bit(name: str, seed: int, m: int, coarse: bool) -> None:
    rows = normal(m, 33, seed=seed)
    rows = rows.round() if coarse else rows
    weights = torch.rand(m, generator=gen(seed))
    order = torch.randperm(m, generator=gen(seed + 1))
    assert torch.equal(ALL[name](rows, weights, gen()), ALL[name](rows[order], weights[order], gen()))


@every
def test_pure_and_seeded(name: str) -> None:
    a, rows, weights = ALL[name], normal(5, 33), torch.rand(5, generator=gen(1))
    before = rows.clone(), weights.clone(), torch.get_rng_state(), repr(a)
    first, second = (a(rows, weights, gen(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (33,) and first.dtype == rows.dtype
    assert torch.equal(rows, before[0]) and torch.equal(weights, before[1])
    assert torch.equal(torch.get_rng_state(), before[2]) and repr(a) == before[3]
    assert torch.equal(first, a(list(rows), weights.tolist(), gen(3)))


@every
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_rows(name: str, n: int, dtype: torch.dtype) -> None:
    found = ALL[name](torch.ones(4, n, dtype=dtype), generator=gen())
    assert found.shape == (n,) and found.dtype == dtype


@every
def test_zero_weights_give_zero(name: str) -> None:
    assert torch.equal(ALL[name](normal(4, 9), [0.0] * 4, gen()), torch.zeros(9))


@every
def test_zero_rows_give_no_nan(name: str) -> None:
    rows = normal(4, 9)
    rows[1:3] = 0
    assert torch.isfinite(ALL[name](rows, generator=gen())).all()
    assert torch.equal(ALL[name](torch.zeros(4, 9), generator=gen()), torch.zeros(9))


@every
def test_refusals(name: str) -> None:
    a, rows = ALL[name], normal(4, 9)
    bad = rows.clone()
    bad[2, 3] = torch.inf
    with pytest.raises(ConsilienceError, match="must be finite.*in carol"):
        a(bad, names=["ann", "bob", "carol", "dan"])
    with pytest.raises(ConsilienceError, match=r"must be \[4\]"):
        a(rows, [1.0, 1.0])
    if not a.takes_negative_weights:
        with pytest.raises(ConsilienceError, match="not negative"):
            a(rows, [1.0, -1.0, 1.0, 1.0])


@every
def test_frozen_and_documented(name: str) -> None:
    a = ALL[name]
    assert (
        dataclasses.is_dataclass(a)
        and hash(a) == hash(dataclasses.replace(a))
        and a == dataclasses.replace(a)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.new = 1  # type: ignore[attr-defined]
    assert ">>>" in (type(a).__doc__ or "")


@pytest.mark.parametrize("name", [n for n, a in ALL.items() if isinstance(a, Blockwise)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_blocks_give_the_same_bits(name: str, dtype: torch.dtype, step: int) -> None:
    a = ALL[name]
    small = type("Small", (type(a),), {"block": 7})(
        **{f.name: getattr(a, f.name) for f in dataclasses.fields(a)}
    )  # type: ignore[arg-type]
    rows = normal(5, 101, dtype=torch.float64)
    rows = ((rows * step).round() if step else rows).to(dtype)
    weights = torch.rand(5, generator=gen(2))
    assert torch.equal(a(rows, weights, gen()), small(rows, weights, gen()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aggregators.ties(1.5), "`density` must be in (0, 1], got 1.5."),
        (lambda: aggregators.ties(0.0), "`density` must be in (0, 1], got 0.0."),
        (lambda: aggregators.dare(0.0), "`density` must be in (0, 1], got 0.0."),
        (lambda: aggregators.trimmed_mean(0.5), "`trim` must be in [0, 0.5), got 0.5."),
        (
            lambda: aggregators.arithmetic(math.nan),
            "`coefficient` must be finite, got nan.",
        ),
        (
            lambda: aggregators.dare()(torch.ones(2, 3)),
            "DARE drops entries at random and needs a `generator`, got None; give a torch.Generator.",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ConsilienceError) as e:
        call()
    assert str(e.value) == message


def test_catalogue_imports_no_torch() -> None:
    code = (
        "import sys, inspect, consilience.aggregators as a;"
        "[inspect.signature(getattr(a, n)) for n in a.__all__]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_catalogue_names_stay_functions() -> None:
    assert sorted(CATALOGUE) == sorted(aggregators.__all__) and all(
        callable(getattr(aggregators, n)) for n in aggregators.__all__
    )


# Linear ones


def test_mean_and_arithmetic() -> None:
    rows, weights = normal(3, 20), torch.tensor([0.2, 0.5, 0.3])
    assert torch.allclose(aggregators.mean()(rows, weights), (weights[:, None] * rows).sum(0), atol=1e-6)
    assert torch.allclose(
        aggregators.arithmetic(0.3 * 3)(rows), 0.3 * rows.sum(0), atol=1e-6
    )  # the papers' lambda
    assert torch.equal(aggregators.arithmetic(1.0)(rows[:1]), rows[0])
    assert torch.equal(aggregators.arithmetic(0.7)(torch.stack([rows[0], -rows[0]])), torch.zeros(20))
    assert torch.equal(aggregators.arithmetic(1.0)(rows[:1], [-1.0]), -rows[0])


def paper_pcgrad(rows: Tensor, orders: list[list[int]]) -> Tensor:
    """Algorithm 1 of Yu et al., divided by m."""
    out = []
    for i, order in enumerate(orders):
        g = rows[i].clone()
        for j in order:
            if j != i and g @ rows[j] < 0:
                g = g - (g @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
        out.append(g)
    return torch.stack(out).mean(0)


def test_pcgrad_without_conflict_is_the_mean() -> None:
    rows, weights = normal(4, 30).abs(), torch.rand(4, generator=gen(5))
    assert torch.equal(aggregators.pcgrad()(rows, weights), aggregators.mean()(rows, weights))


@quick
@given(seed=st.integers(0, 1000))
def test_pcgrad_of_two_is_the_paper(seed: int) -> None:
    rows = normal(2, 30, seed=seed, dtype=torch.float64)
    rows[1] -= rows[0]
    assert torch.allclose(aggregators.pcgrad()(rows), paper_pcgrad(rows, [[0, 1], [0, 1]]), atol=1e-12)


@quick
@given(seed=st.integers(0, 1000))
def test_pcgrad_of_four_is_the_paper_in_some_order(seed: int) -> None:
    rows = normal(4, 3, seed=seed, dtype=torch.float64)
    rows, _, _ = aggregators.pcgrad().admit(rows, None)
    orders = torch.rand(4, 4, generator=gen(seed)).argsort(1).tolist()
    assert torch.allclose(
        aggregators.pcgrad()(rows, generator=gen(seed)), paper_pcgrad(rows, orders), atol=1e-12
    )


@needs_torchjd
@quick
@given(seed=st.integers(0, 1000))
def test_pcgrad_of_two_is_torchjds(seed: int) -> None:
    rows = normal(2, 5, seed=seed, dtype=torch.float64)
    assert torch.allclose(aggregators.pcgrad()(rows), aggregators.torchjd("PCGrad")(rows), atol=1e-12)


@quick
@given(seed=st.integers(0, 1000), spread=st.integers(0, 3))
def test_mgda_is_the_shortest_vector(seed: int, spread: int) -> None:
    for m in (2, 3):
        rows = normal(m, 3, seed=seed, dtype=torch.float64) + 0.5
        rows[0] *= 10.0**spread
        found = aggregators.mgda()(rows, torch.full((m,), 1 / m, dtype=torch.float64))
        best = None  # over the affine hull of each subset, where the coefficients are not negative
        for k in range(1, m + 1):
            for some in itertools.combinations(range(m), k):
                sub = rows[list(some)]
                system = torch.zeros(k + 1, k + 1, dtype=torch.float64)
                system[:k, :k], system[:k, k], system[k, :k] = sub @ sub.T, 1.0, 1.0
                c = torch.linalg.lstsq(
                    system, torch.eye(k + 1, dtype=torch.float64)[:, -1:], driver="gelsd"
                ).solution[:k, 0]
                if (c >= -1e-12).all() and (best is None or (c @ sub).norm() < best.norm()):
                    best = c @ sub
        assert best is not None and torch.allclose(found, best, atol=1e-9)
        assert ((rows @ found) >= found @ found - 1e-9).all()  # no objective is opposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [2, 8, 60])
def test_mgda_with_many_rows(rank: int, dtype: torch.dtype) -> None:
    rows = (normal(40, rank, dtype=torch.float64) @ normal(rank, 60, dtype=torch.float64) + 0.3).to(dtype)
    rows = torch.cat([rows, rows[:5], rows[:3] * 1e3])
    found = aggregators.mgda()(rows, torch.eye(1, len(rows), dtype=dtype)[0])  # a sum of exactly 1
    slack = (1e-4 if dtype == torch.float32 else 1e-9) * rows.norm(dim=1) * rows.norm(dim=1).min()
    assert ((rows @ found) >= found @ found - slack).all()


@needs_torchjd
def test_mgda_is_torchjds() -> None:
    for seed in range(5):
        rows = normal(3, 10, seed=seed, dtype=torch.float64) + 0.3
        theirs = aggregators.torchjd("MGDA", epsilon=1e-12, max_iters=3000)(rows)
        ours = aggregators.mgda()(rows)
        assert torch.allclose(ours, theirs, atol=2e-2) and ours.norm() <= theirs.norm() + 1e-9


# TIES


@quick
@given(seed=st.integers(0, 1000), m=st.integers(1, 5))
def test_ties_with_equal_signs_is_the_mean(seed: int, m: int) -> None:
    rows = (normal(m, 31, seed=seed).abs() + 1e-3) * normal(31, seed=seed + 1).sign()
    assert torch.allclose(aggregators.ties(1.0)(rows), aggregators.mean()(rows), rtol=1e-6)


@quick
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 80),
    density=st.floats(0.01, 1.0),
    levels=st.sampled_from([1, 2, 5, 0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_ties_of_one_task_is_its_trim_with_the_exact_count(
    seed: int, n: int, density: float, levels: int, dtype: torch.dtype
) -> None:
    row = normal(n, seed=seed, dtype=torch.float64)
    if levels:  # many tied magnitudes, of both signs
        row = (row.abs() * levels).floor().clamp(0, levels - 1).add(1) * torch.where(row < 0, -1, 1)
    row = row.to(dtype)
    k = math.ceil(Fraction(str(density)) * n)
    found = aggregators.ties(density)(row[None], [1.0])
    assert torch.equal(found, trimmed(row, k))
    assert int((found != 0).sum()) == k or (row == 0).any()


def test_shares_are_the_numbers_that_were_written() -> None:
    """.07 x 100 is more than 7 in floats; 1 / 3 is less than a third, and 3 / 3 of it are whole."""
    row = normal(100)
    for percent in range(1, 101):
        assert int((aggregators.ties(percent / 100)(row[None], [1.0]) != 0).sum()) == percent
    assert int((aggregators.ties(0.0701)(row[None], [1.0]) != 0).sum()) == 8
    assert exact_share(0.07, 10**15) == 7 * 10**13
    assert exact_share(1 / 3, 3) == 1
    assert exact_share(2 / 3, 10**9) == Fraction(2 * 10**9, 3)
    assert exact_share(math.pi, 1) == Fraction("3.141592653589793")

    # Whatever else rounds a share up or down: sparse masks, warm-up, the worst, clients per round.
    assert TaLoS(density=0.07).kept(100) == 7
    rates = [cs.Training(epochs=100, lr=1.0, warmup=0.07).rate((i, 0), (100, 1)) for i in range(8)]
    assert rates == [(i + 1) / 7 for i in range(7)] + [1.0]
    assert worst(torch.arange(100.0).numpy(), 0.07) == 3.0


def test_ties_reads_past_its_blocks() -> None:
    n = 3 * Blockwise.block // 2 + 5
    row = normal(n)
    row[::3] = 0.75  # a third of a large row ties at the threshold
    k = math.ceil(0.5 * n)
    found = aggregators.ties(0.5)(row[None], [1.0])
    assert int((found != 0).sum()) == k
    over = int((row.abs() > 0.75).sum())
    assert torch.equal((row == 0.75).nonzero()[: k - over], (found == 0.75).nonzero())


def test_ties_sees_zeros_infinitesimals_and_all_bits() -> None:
    row = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, 1.0, 1.0000001, -1.0])
    for k in range(1, 9):
        assert torch.equal(aggregators.ties(k / 8)(row[None], [1.0]), trimmed(row, k))


@quick
@given(seed=st.integers(0, 1000), density=st.floats(0.01, 1.0))
def test_ties_of_opposites_is_zero(seed: int, density: float) -> None:
    tau = normal(40, seed=seed)
    assert torch.equal(aggregators.ties(density)(torch.stack([tau, -tau])), torch.zeros(40))


@quick
@given(seed=st.integers(0, 1000), density=st.floats(0.01, 1.0))
def test_ties_is_the_paper_with_weights(seed: int, density: float) -> None:
    rows, w = normal(4, 23, seed=seed, dtype=torch.float64), torch.rand(4, generator=gen(seed)).double()
    t = torch.stack([trimmed(r, math.ceil(Fraction(str(density)) * 23)) for r in rows])
    sign = (w[:, None] * t).sum(0).sign()
    agree = (t.sign() == sign) & (t != 0)
    share = (w[:, None] * agree).sum(0)
    want = torch.where(share > 0, w.sum() * (w[:, None] * t * agree).sum(0) / share, 0.0)
    assert torch.allclose(aggregators.ties(density)(rows, w), want, rtol=1e-12)


# DARE and the robust ones


def test_dare_drops_and_rescales() -> None:
    row = torch.ones(1, 100_000)
    found = aggregators.dare(0.25)(row, generator=gen())
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert abs(float((found != 0).float().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 100_000)
    assert torch.equal(aggregators.dare(1.0)(row, generator=gen()), row[0])
    assert not torch.equal(found, aggregators.dare(0.25)(row, generator=gen(1)))


@quick
@given(seed=st.integers(0, 1000), counts=st.lists(st.integers(0, 4), min_size=3, max_size=6).filter(sum))
def test_whole_weights_are_repeated_rows(seed: int, counts: list[int]) -> None:
    rows = normal(len(counts), 9, seed=seed)
    repeated = rows.repeat_interleave(torch.tensor(counts), 0)
    weights = [c / sum(counts) for c in counts]
    for a in (aggregators.median(), aggregators.trimmed_mean(0.2)):
        assert torch.allclose(a(rows, weights), a(repeated), atol=1e-5)
    assert torch.allclose(
        aggregators.median()(repeated), repeated.double().quantile(0.5, dim=0).float(), atol=1e-6
    )


def test_robust_ones_ignore_outliers() -> None:
    rows = torch.cat([normal(8, 6), torch.full((1, 6), 1e30), torch.full((1, 6), -1e30)])
    inner = rows[:8].double().mean(0).float()
    assert torch.allclose(aggregators.trimmed_mean(0.1)(rows), inner, atol=1e-5)
    assert aggregators.median()(rows).abs().max() < 3


# torchjd


@needs_torchjd
def test_torchjd_refusals() -> None:
    with pytest.raises(ConsilienceError, match="nearest: UPGrad"):
        aggregators.torchjd("UpGrad")
    with pytest.raises(ConsilienceError, match="arguments of torchjd's Krum"):
        aggregators.torchjd("Krum")
    with pytest.raises(ConsilienceError, match=r"torchjd's Krum refuses rows of shape \(2, 3\)"):
        aggregators.torchjd("Krum", n_byzantine=1)(torch.eye(2, 3))
    with pytest.raises(ConsilienceError, match="nearest"):
        aggregators.torchjd("Aggregator")


@needs_torchjd
def test_torchjd_takes_lists_and_weights() -> None:
    rows = normal(3, 8)
    given_ = aggregators.torchjd("AlignedMTL", pref_vector=[0.2, 0.3, 0.5])(rows)
    assert torch.allclose(given_, aggregators.torchjd("AlignedMTL")(rows, [0.2, 0.3, 0.5]), atol=1e-6)
    assert not torch.equal(
        aggregators.torchjd("Random")(rows, None, gen(1)), aggregators.torchjd("Random")(rows, None, gen(2))
    )


@needs_torchjd
def test_torchjd_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ConsilienceError, match=r"pip install 'consilience\[torchjd\]'"):
        aggregators.torchjd("UPGrad")


def test_linear_ones_say_whether_they_need_the_gramian() -> None:
    for name, a in ALL.items():
        if isinstance(a, Linear) and not a.needs_gram:
            assert a.weigh(torch.zeros(0, 0), torch.ones(3), None).shape == (3,), name


# Step aggregators over matrices of a given rank, as TorchJD tests its own.

STEPS = ["mean", "pcgrad", "mgda", "cagrad", "gradvac", "fairgrad", "nash_mtl", "sdmgrad", "rlw"]
if HAS_TORCHJD:
    STEPS += ["imtl_g", "aligned_mtl", "upgrad"]
STEP_RULES = {name: ALL[name] for name in STEPS}
SHAPES = [(2, 5, 1), (2, 5, 2), (4, 6, 2), (4, 9, 4), (8, 5, 3), (8, 30, 8)]
"""(rows, columns, rank)."""


def ranked(rows: int, columns: int, rank: int, seed: int, kind: str = "any") -> Tensor:
    """A matrix [m, n] of this rank: any rows, rows with a common gain ("strong"), 0 in the hull ("weak")."""
    left = normal(rows, rank, seed=seed, dtype=torch.float64)
    right = torch.linalg.qr(normal(columns, rank, seed=seed + 1, dtype=torch.float64))[0].T
    if kind == "strong":
        # Every row has the same positive part along one direction.
        left[:, 0] = left[:, 0].abs() + 0.5
    if kind == "weak":
        # A positive combination of the rows vanishes: no direction serves all.
        left[-1] = -(torch.rand(rows - 1, generator=gen(seed)).double() + 0.1) @ left[:-1]
    return left @ right


shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
step_rules = pytest.mark.parametrize("name", STEP_RULES)


@step_rules
@shapes
def test_steps_do_not_depend_on_the_order_of_tasks(name: str, shape: tuple[int, int, int]) -> None:
    for kind in ("any", "strong", "weak"):
        rows = ranked(*shape, seed=3, kind=kind)
        order = torch.randperm(len(rows), generator=gen(1))
        made = STEP_RULES[name](rows, None, gen())
        assert torch.equal(made, STEP_RULES[name](rows[order], None, gen()))
        assert torch.isfinite(made).all()


@step_rules
@shapes
def test_steps_lie_in_the_span_of_their_rows(name: str, shape: tuple[int, int, int]) -> None:
    rows = ranked(*shape, seed=5)
    made = STEP_RULES[name](rows, None, gen())
    basis = torch.linalg.svd(rows)[2][: shape[2]]
    assert (made - made @ basis.T @ basis).norm() < 1e-9 * rows.norm()


@pytest.mark.parametrize("name", [n for n in ("mgda", "upgrad", "fairgrad", "nash_mtl") if n in STEP_RULES])
@shapes
def test_steps_that_promise_it_oppose_no_task(name: str, shape: tuple[int, int, int]) -> None:
    """MGDA, UPGrad and the bargains where there is a direction that serves all; PCGrad and others do not."""
    for seed in range(5):
        for kind in ("any", "strong", "weak") if name in ("mgda", "upgrad") else ("strong",):
            rows = ranked(*shape, seed=seed, kind=kind)
            made = STEP_RULES[name](rows, None, gen())
            # torchjd regularises the Gramian of UPGrad by 1e-4 of its trace.
            slack = (5e-3 if name == "upgrad" else 1e-6) * rows.norm() ** 2
            assert (rows @ made >= -slack).all(), (kind, seed)


@step_rules
@shapes
def test_steps_scale_with_all_their_rows(name: str, shape: tuple[int, int, int]) -> None:
    rows = ranked(*shape, seed=7)
    made = STEP_RULES[name](rows, None, gen())
    for factor in (1e-3, 1e3):
        again = STEP_RULES[name](factor * rows, None, gen())
        assert torch.allclose(again / factor, made, rtol=1e-4, atol=1e-5 * float(rows.norm()))


@pytest.mark.parametrize("name", [n for n in ("mean", "upgrad", "pcgrad") if n in STEP_RULES])
@shapes
def test_steps_that_promise_it_are_linear_under_scaling(name: str, shape: tuple[int, int, int]) -> None:
    """c -> A(diag(c) J) is linear for c > 0: of the mean, of UPGrad, and of PCGrad of two rows."""
    if name == "pcgrad" and shape[0] > 2:
        pytest.skip("PCGrad's order is drawn by the content of its rows")
    rows = ranked(*shape, seed=11)
    rule = STEP_RULES[name]
    if name == "upgrad":
        from torchjd.linalg import QuadprogProjector

        # By default it adds 1e-4 to the Gramian.
        rule = aggregators.torchjd("UPGrad", projector=QuadprogProjector(reg_eps=1e-10))
    one, two = (torch.rand(len(rows), generator=gen(s)).double() + 0.1 for s in (1, 2))
    a, b, both = (rule(c[:, None] * rows, None, gen()) for c in (one, two, 2 * one + 3 * two))
    assert (both - 2 * a - 3 * b).norm() < 1e-5 * both.norm() + 1e-7 * rows.norm()


@shapes
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_mgda_meets_its_conditions(shape: tuple[int, int, int], spread: float) -> None:
    """KKT: g_i . d >= d . d for all rows, equal where a row has a share; to 1e-5, also for 100 : 1."""
    for seed in range(20):
        for kind in ("any", "strong", "weak"):
            rows = ranked(*shape, seed=seed, kind=kind)
            rows[::2] *= spread
            gram = rows @ rows.T
            share = aggregators.mgda().weigh(gram, torch.full((len(rows),), 1 / len(rows)).double(), None)
            assert abs(float(share.sum()) - 1) < 1e-12 and (share >= 0).all()
            slope, unit = gram @ share, gram.diagonal().min()
            assert (slope - share @ slope >= -1e-5 * unit).all()
            assert ((slope - share @ slope) * share <= 1e-5 * unit).all()


def test_mgda_stops_after_a_number_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 10 rounds per row, also where rounding lets rows in and out for ever; what it has is a mean."""
    from consilience.aggregators import _mgda

    calls = []
    solve = np.linalg.pinv
    # Solutions that are never optimal: rows enter for ever.
    monkeypatch.setattr(_mgda.np.linalg, "pinv", lambda *a, **k: calls.append(1) or 1e-3 * solve(*a, **k))
    share = _mgda.shortest(torch.eye(6).double())
    assert len(calls) <= 10 * 6 + 7 and abs(float(share.sum()) - 1) < 1e-12 and (share >= 0).all()


@needs_torchjd
@shapes
@pytest.mark.parametrize("name", ["imtl_g", "aligned_mtl", "upgrad", "cagrad", "nash_mtl", "mgda"])
def test_steps_are_torchjds_where_they_mean_the_same(name: str, shape: tuple[int, int, int]) -> None:
    """In direction; CAGrad and the Nash bargain are scaled here so that equal rows give their mean."""
    import torchjd.aggregation as theirs

    if name == "cagrad":
        pytest.importorskip("cvxpy")
    rows = ranked(*shape, seed=13, kind="strong")
    other = {
        "imtl_g": lambda: theirs.IMTLG(),
        "aligned_mtl": lambda: theirs.AlignedMTL(),
        "upgrad": lambda: theirs.UPGrad(),
        "cagrad": lambda: theirs.CAGrad(c=0.5, norm_eps=1e-12),
        "nash_mtl": lambda: theirs.FairGrad(alpha=1.0),
        "mgda": lambda: theirs.MGDA(epsilon=1e-9, max_iters=20_000),
    }[name]()(rows)
    mine = STEP_RULES[name](rows)
    tolerance = {"cagrad": 1e-3, "mgda": 5e-3}.get(name, 1e-5)
    assert (mine / mine.norm() - other / other.norm()).norm() < tolerance


def libmtl(name: str, rows: Tensor) -> Tensor:
    """LibMTL's formulas, restated."""
    gram, m = rows @ rows.T, len(rows)
    if name == "imtl_g":
        units = rows / rows.norm(dim=1, keepdim=True)
        d, u = rows[:1] - rows[1:], units[:1] - units[1:]
        alpha = (rows[0] @ u.T) @ torch.linalg.inv(d @ u.T)
        return torch.cat([1 - alpha.sum()[None], alpha]) @ rows
    if name == "aligned_mtl":
        values, vectors = torch.linalg.eigh(gram)
        balance = values[0].sqrt() * vectors @ torch.diag(values.rsqrt()) @ vectors.T
        return balance.sum(0) / m @ rows
    if name == "nash_mtl":
        from scipy.optimize import fsolve

        normed = (gram / gram.norm()).numpy()
        a = fsolve(lambda a: normed @ a - 1 / a, torch.full((m,), 0.5).numpy())
        return torch.from_numpy(a) @ rows
    if name == "mgda":
        from scipy.optimize import minimize

        found = minimize(
            lambda a: float(a @ gram.numpy() @ a),
            torch.full((m,), 1 / m).numpy(),
            bounds=[(0, 1)] * m,
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return torch.from_numpy(found.x) @ rows
    raise AssertionError(name)


@needs_torchjd
@pytest.mark.parametrize("name", ["imtl_g", "aligned_mtl", "nash_mtl", "mgda"])
@pytest.mark.parametrize("m", [2, 4])
def test_steps_are_libmtls_formulas(name: str, m: int) -> None:
    """In direction: LibMTL sums where these average."""
    for seed in range(5):
        rows = ranked(m, 12, m, seed=seed, kind="strong")
        mine, other = STEP_RULES[name](rows), libmtl(name, rows)
        assert (mine / mine.norm() - other / other.norm()).norm() < 1e-4
