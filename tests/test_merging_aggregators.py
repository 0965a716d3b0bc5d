"""Aggregators for merging: closed forms and restatements, the masks' statistics, out of core from the
Gramian, and other libraries."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import sys
import types
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import consilience as cs
from consilience import aggregators
from consilience.aggregators._dare import Dare, uniform
from consilience.core.aggregator import Aggregator, Blockwise, Linear
from consilience.core.errors import ConsilienceError, Refusal

HAS_TORCHJD = importlib.util.find_spec("torchjd") is not None
CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=30, derandomize=True)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64).to(dtype)


def in_blocks(
    a: Aggregator, rows: Tensor, weights: Tensor | list[float] | None = None, block: int = 7
) -> Tensor:
    """The aggregator's result where it sees few columns at once."""
    small = type("Small", (type(a),), {"block": block})
    fields = {f.name: getattr(a, f.name) for f in dataclasses.fields(a)}
    return small(**fields)(rows, weights, gen())


# DARE


def rejected(observed: Tensor, expected: Tensor | float) -> bool:
    """A chi-squared test at 5 standard deviations."""
    k = observed.numel() - 1
    return bool(((observed - expected) ** 2 / expected).sum() > k + 5 * math.sqrt(2 * k) + 15)


@pytest.mark.parametrize("seed", [0, 1, 2, 0x123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 2**32 - 50_000, 7 * 2**33])
def test_hashes_are_uniform_and_independent(seed: int, offset: int) -> None:
    n = 1 << 17
    bits = [b.clone() for b in uniform(seed, 3, offset, n, CPU)]
    assert all(int(b.min()) >= 0 for b in bits)
    for b in bits:
        for shift in (23, 15):  # what a threshold looks at, and what comes after
            assert not rejected(torch.bincount((b >> shift) % 256, minlength=256), n / 256)
    classes = [b >> 27 for b in bits]
    for i, j, lag in [
        (0, 1, 0),
        (1, 2, 0),
        (0, 2, 0),
        (0, 1, 1),
        (0, 2, 64),
        *((0, 0, lag) for lag in (1, 2, 4, 64, 1000, 4096)),
    ]:
        pairs = classes[i][: n - lag] * 16 + classes[j][lag:]
        assert not rejected(torch.bincount(pairs, minlength=256), (n - lag) / 256), (i, j, lag)


def test_hashes_of_seeds_rows_and_pages_differ() -> None:
    keys = [(seed, offset) for seed in (0, 1, 2, 2**61) for offset in (0, 1 << 32, 1 << 33)]
    rows = torch.stack([b.clone() for seed, offset in keys for b in uniform(seed, 2, offset, 4096, CPU)])
    same = (rows[:, None] >> 30 == rows >> 30).double().mean(2).fill_diagonal_(0.5)
    assert (same - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(4096)


@quick
@given(
    seed=st.integers(0, 2**62),
    cut=st.integers(0, 300),
    offset=st.sampled_from([0, 12345, 2**31 - 100, 2**32 - 100, 2**40]),
)
def test_hashes_know_their_column_and_nothing_else(seed: int, cut: int, offset: int) -> None:
    whole = [b.clone() for b in uniform(seed, 4, offset, 300, CPU)]
    parts = (
        [b.clone() for b in uniform(seed, 2, offset, cut, CPU)],
        [b.clone() for b in uniform(seed, 4, offset + cut, 300 - cut, CPU)],
    )
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([parts[0][i], parts[1][i]]))


@pytest.mark.parametrize("density", [0.001, 0.1, 1 / 3, 0.9, 0.999])
def test_dare_keeps_its_share(density: float) -> None:
    n = 1 << 18
    kept = aggregators.dare(density)(torch.ones(1, n), generator=gen(3)) != 0
    assert abs(float(kept.double().mean()) - density) < 5 * math.sqrt(density * (1 - density) / n)


@quick
@given(seed=st.integers(0, 1000), density=st.floats(0.05, 1.0), dtype=dtypes)
def test_dare_is_a_masked_and_rescaled_sum(seed: int, density: float, dtype: torch.dtype) -> None:
    rows, w = normal(3, 50, seed=seed, dtype=dtype), torch.rand(3, generator=gen(seed)) - 0.5
    a = Dare(density)
    rows, w, _ = a.admit(rows, w)
    seeded = int(torch.randint(1 << 62, (), generator=gen(seed)))
    masks = torch.stack([b < density * 2**31 for b in uniform(seeded, 3, 0, 50, CPU)])
    want = (w.double()[:, None] * masks * rows.double() / density).sum(0)
    assert torch.allclose(
        a(rows, w, gen(seed)).double(), want, rtol=1e-2, atol=1e-6 if dtype.itemsize > 2 else 0.1
    )
    assert torch.equal(in_blocks(a, rows, w), a(rows, w, gen()))


@settings(quick, max_examples=6)
@given(seed=st.integers(0, 1000), density=st.sampled_from([0.2, 0.5, 1.0]))
@pytest.mark.parametrize(
    "then",
    [aggregators.ties(1.0), aggregators.ties(0.3), aggregators.median(), aggregators.breadcrumbs(0.3, 0.1)],
)
def test_dare_passes_masked_rows_on(then: Aggregator, seed: int, density: float) -> None:
    a, rows, w = Dare(density, then), normal(4, 101, seed=seed), torch.rand(4, generator=gen(seed))
    rows, w, _ = a.admit(rows, w)
    dropped = torch.stack([Dare(density)(rows, torch.eye(4)[i], gen(seed)) for i in range(4)])
    want = then.combine(dropped, w, None)
    assert torch.allclose(a(rows, w, gen(seed)), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(in_blocks(a, rows, w), a(rows, w, gen()))


def test_dare_ties_leaves_signs_to_the_survivors() -> None:
    rows = torch.tensor([[1.0], [-3.0]]).repeat(1, 2000)
    found = aggregators.dare(0.5, aggregators.ties(1.0))(rows, generator=gen())
    assert set(found.tolist()) == {0.0, 2.0, -6.0}  # neither, the first alone, the second alone or both
    counts = torch.tensor([(found == v).sum() for v in (0.0, 2.0, -6.0)])
    assert not rejected(counts, torch.tensor([500.0, 500.0, 1000.0]))


def test_dare_refusals() -> None:
    with pytest.raises(
        Refusal,
        match=r"`then` must be an aggregator that works block by block, such as ties\(1.0\), got Mean.",
    ):
        aggregators.dare(0.5, aggregators.mean())
    with pytest.raises(Refusal, match="got 3"):
        aggregators.dare(0.5, 3)  # type: ignore[arg-type]
    with pytest.raises(ConsilienceError, match="not negative"):
        aggregators.dare(0.5, aggregators.ties(1.0))(torch.ones(2, 3), [1.0, -1.0], gen())
    entries = aggregators.dare(1.0, aggregators.fisher())(normal(2, 3), torch.rand(2, 3), gen())
    assert entries.shape == (3,)


# SLERP


def arc(t: float, a: Tensor, b: Tensor) -> Tensor:
    angle = torch.acos(a @ b / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@quick
@given(seed=st.integers(0, 1000), t=st.floats(0.0, 1.0), total=st.sampled_from([1.0, 0.3, 4.0]))
def test_slerp_is_its_formula(seed: int, t: float, total: float) -> None:
    a, b = normal(2, 30, seed=seed)
    found = aggregators.slerp()(torch.stack([a, b]), torch.tensor([1 - t, t], dtype=torch.float64) * total)
    assert torch.allclose(found, total * arc(t, a, b), atol=1e-12)


@pytest.mark.parametrize("setting", ["merging", "federated", "multitask"])
def test_slerp_of_more_than_two_is_refused_before_any_training(setting: str) -> None:
    parts = cs.data.iid(cs.data.digits(), 3)
    schedule = getattr(cs.settings, setting)(parts)
    with pytest.raises(cs.Refusal, match="Slerp combines 2 rows, and 3 "):
        cs.run(schedule, cs.methods.aggregate(aggregators.slerp()))


def test_slerp_goes_at_constant_speed_along_the_sphere() -> None:
    a, b = torch.nn.functional.normalize(normal(2, 30))
    path = [aggregators.slerp()(torch.stack([a, b]), [1 - t / 8, t / 8]) for t in range(9)]
    assert torch.equal(path[0], a) and torch.equal(path[-1], b)
    assert all(abs(float(p.norm()) - 1) < 1e-12 for p in path)
    steps = torch.stack([torch.acos(p @ q) for p, q in itertools.pairwise(path)])
    assert torch.allclose(steps, torch.acos(a @ b) / 8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slerp_where_there_is_no_arc(dtype: torch.dtype) -> None:
    g, slerp = normal(20, dtype=dtype), aggregators.slerp()
    for other in (g, -g, 2 * g, torch.zeros_like(g)):
        rows, w = torch.stack([g, other]), torch.tensor([0.25, 0.75], dtype=dtype)
        assert torch.allclose(
            slerp(rows, w), (w[:, None] * rows).sum(0), atol=1e-2 if dtype == torch.bfloat16 else 1e-6
        )
    assert torch.equal(
        slerp(torch.stack([g, normal(20, seed=1, dtype=dtype)]), [0.0, 0.0]), torch.zeros_like(g)
    )
    assert slerp(torch.ones(2, 0)).shape == (0,)


@quick
@given(seed=st.integers(0, 1000))
def test_slerp_does_not_know_the_order_of_its_rows(seed: int) -> None:
    rows, w = normal(2, 33, seed=seed, dtype=torch.float32), torch.rand(2, generator=gen(seed))
    assert torch.equal(aggregators.slerp()(rows, w), aggregators.slerp()(rows.flip(0), w.flip(0)))


@pytest.mark.parametrize("m", [1, 3])
def test_slerp_takes_two_rows(m: int) -> None:
    with pytest.raises(ConsilienceError, match=rf"needs (at least )?2 rows, got {m}\."):
        aggregators.slerp()(normal(m, 5))


# Model stock


@quick
@given(seed=st.integers(0, 1000), m=st.integers(2, 6), common=st.floats(0.0, 3.0))
def test_model_stock_is_its_formula(seed: int, m: int, common: float) -> None:
    rows = normal(m, 30, seed=seed) + common * normal(30, seed=seed + 1)
    cos = (
        torch.stack([torch.cosine_similarity(rows[i], rows[j], 0) for i in range(m) for j in range(i)])
        .mean()
        .clamp(min=0)
    )
    want = m * cos / (1 + (m - 1) * cos) * rows.mean(0)
    assert torch.allclose(aggregators.model_stock()(rows), want, atol=1e-12)


def test_model_stock_is_the_foot_of_a_perpendicular() -> None:
    """With rows of one length and one angle between all, the merged point is nearest to their centre, which
    is at right angles to each."""
    m, centre = 4, torch.zeros(8, dtype=torch.float64)
    centre[0] = 2.0
    spread = torch.zeros(m, 8, dtype=torch.float64)
    spread[torch.arange(m), torch.arange(m) + 1] = 3.0
    merged = aggregators.model_stock()(centre + spread)
    mean = (centre + spread).mean(0)
    assert (
        abs(float((merged - centre) @ mean)) < 1e-12
    )  # the closest point to the centre on the line from the base to the mean


def test_model_stock_at_its_limits() -> None:
    stock, g = aggregators.model_stock(), normal(20)
    assert torch.equal(stock(g[None], [1.0]), g)
    assert torch.equal(stock(torch.eye(3)), torch.zeros(3))  # right angles: the base
    assert torch.equal(stock(torch.stack([g, -g, normal(20, seed=1) * 1e-3])), torch.zeros(20, dtype=g.dtype))
    half = stock(torch.stack([g, g, torch.zeros_like(g)]), [1.0, 1.0, 1.0])  # cosines 1, 0, 0
    assert torch.allclose(half, 3 / 3 / (1 + 2 / 3) * 2 * g, atol=1e-12)


# Consensus


@quick
@given(
    seed=st.integers(0, 1000),
    m=st.integers(1, 5),
    strength=st.floats(0.0, 1.5),
    agree=st.integers(0, 6),
    dtype=dtypes,
)
def test_consensus_is_the_paper(seed: int, m: int, strength: float, agree: int, dtype: torch.dtype) -> None:
    a, rows = aggregators.consensus(strength, agree), normal(m, 60, seed=seed, dtype=dtype)
    w = torch.rand(m, generator=gen(seed)).to(dtype)
    total = rows.float().sum(0) if dtype.itemsize == 2 else rows.sum(0)
    gap = rows.abs() - strength * (total - rows).abs()
    sure = (gap.abs() > 1e-5).all(0)  # entries that rounding does not decide
    keep = (gap >= 0).sum(0) >= min(agree, m)
    want = torch.where(keep, (w.double()[:, None] * rows.double()).sum(0), 0.0)
    found = a(rows, w).double()
    assert torch.allclose(
        found[sure],
        want[sure],
        rtol=1e-2 if dtype.itemsize == 2 else 1e-5,
        atol=0.05 if dtype.itemsize == 2 else 1e-6,
    )
    assert torch.equal(in_blocks(a, rows, w), a(rows, w))


def test_consensus_leaves_out_what_serves_one_task_and_what_serves_none() -> None:
    rows = torch.tensor([[5.0, 1.0, 1.0, 0.3], [0.1, 1.0, 0.0, -1.0], [0.0, 0.0, -2.0, 1.0]])
    sum_ = rows.sum(0)
    masks = rows.abs() >= 1.0 * (sum_ - rows).abs()
    assert masks.sum(0).tolist() == [1, 2, 1, 2]
    assert torch.equal(aggregators.consensus(1.0)(rows) != 0, torch.tensor([False, True, False, True]))
    assert torch.equal(aggregators.consensus(1.0, agree=1)(rows), aggregators.mean()(rows))
    assert torch.equal(aggregators.consensus(1.0, agree=3)(rows), torch.zeros(4))
    assert torch.equal(aggregators.consensus(5.0, agree=0)(rows), aggregators.mean()(rows))


@pytest.mark.parametrize("m", [2, 3, 5, 7])
def test_consensus_of_equal_rows(m: int) -> None:
    """The sum of m equal ones is (m - 1) lengths away from each: the paper's masks leave them out beyond 1 /
    strength."""
    g = normal(9)
    found = aggregators.consensus(0.2)(g.expand(m, 9).contiguous())
    assert torch.allclose(found, g if m < 6 else torch.zeros_like(g), atol=1e-12)


def test_consensus_at_its_threshold_does_not_depend_on_blocks() -> None:
    rows = (
        normal(1001, dtype=torch.float32).expand(6, 1001).contiguous()
    )  # strength * (m - 1) = 1: rounding decides
    assert torch.equal(in_blocks(aggregators.consensus(0.2), rows), aggregators.consensus(0.2)(rows))


# Fisher


@quick
@given(seed=st.integers(0, 1000), m=st.integers(1, 5), prior=st.sampled_from([0.0, 1e-3, 2.0]), dtype=dtypes)
def test_fisher_is_the_paper_over_parameters(seed: int, m: int, prior: float, dtype: torch.dtype) -> None:
    a, base, theta = (
        aggregators.fisher(prior),
        normal(40, seed=seed + 1, dtype=dtype),
        normal(m, 40, seed=seed, dtype=dtype),
    )
    f = (torch.rand(m, 40, generator=gen(seed)) * (torch.rand(m, 40, generator=gen(seed + 2)) < 0.7)).to(
        dtype
    )
    found = base.double() + a(theta - base, f).double()
    fd = f.double()
    top, bottom = (fd * theta.double()).sum(0) + prior * base.double(), fd.sum(0) + prior
    want = torch.where(bottom > 0, top / bottom, base.double())
    assert torch.allclose(found, want, atol=0.1 if dtype.itemsize == 2 else 1e-5)
    assert torch.equal(in_blocks(a, theta, f), a(theta, f))
    assert torch.equal(a(theta, f), a(theta.flip(0), f.flip(0)))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
def test_fisher_knows_no_scale(scale: float) -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    f = torch.tensor([[1.0, 0.0], [1.0, 1.0]]) * scale
    assert torch.equal(aggregators.fisher()(rows, f), torch.tensor([2.0, -2.0]))


def test_fisher_of_one_weight_a_row_is_the_mean() -> None:
    rows, w = normal(3, 20), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert torch.equal(aggregators.fisher()(rows, w), aggregators.mean()(rows, w))
    assert torch.allclose(
        aggregators.fisher()(rows, w[:, None].expand(3, 20)), aggregators.mean()(rows, w), atol=1e-12
    )
    with pytest.raises(ConsilienceError, match="not negative"):
        aggregators.fisher()(rows, -torch.ones(3, 20))


# Breadcrumbs


def crumbs(row: Tensor, density: float, gamma: float) -> Tensor:
    order = sorted(range(len(row)), key=lambda i: (-abs(float(row[i])), i))
    top = math.floor(Fraction(str(gamma)) * len(row))
    kept = set(order[top : top + math.ceil(Fraction(str(density)) * len(row))])
    return torch.stack([row[i] if i in kept else row[i] * 0 for i in range(len(row))])


@quick
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 80),
    density=st.floats(0.01, 0.7),
    gamma=st.floats(0.0, 0.3),
    levels=st.integers(0, 4),
    dtype=dtypes,
)
def test_breadcrumbs_of_one_task_are_its_middle(
    seed: int, n: int, density: float, gamma: float, levels: int, dtype: torch.dtype
) -> None:
    a, row = aggregators.breadcrumbs(density, gamma), normal(n, seed=seed)
    row = ((row * levels).round() if levels else row).to(dtype)  # with levels: many ties and zeros
    assert torch.equal(a(row[None], [1.0]), crumbs(row, density, gamma))
    assert torch.equal(in_blocks(a, row[None], [1.0]), crumbs(row, density, gamma))


@quick
@given(seed=st.integers(0, 1000), m=st.integers(1, 5))
def test_breadcrumbs_add_up(seed: int, m: int) -> None:
    rows, w = normal(m, 50, seed=seed), torch.rand(m, generator=gen(seed)).double() - 0.3
    want = (w[:, None] * torch.stack([crumbs(r, 0.3, 0.1) for r in rows])).sum(0)
    assert torch.allclose(aggregators.breadcrumbs(0.3, 0.1)(rows, w), want, atol=1e-12)


def test_breadcrumbs_of_decimal_shares_are_exact() -> None:
    """In floats .29 x 100 is less than 29, .07 x 100 is more than 7, and 1 - .9 is less than .1."""
    row = normal(100)
    ranked = row.abs().argsort(descending=True)
    found = aggregators.breadcrumbs(0.07, 0.29)(row[None], [1.0])
    assert sorted(found.nonzero()[:, 0].tolist()) == sorted(ranked[29:36].tolist())
    assert int((aggregators.breadcrumbs(0.9, 0.1)(row[None], [1.0]) != 0).sum()) == 90


def test_breadcrumbs_over_many_blocks() -> None:
    n = 3 * Blockwise.block + 5
    row = normal(n, dtype=torch.float32)
    found = aggregators.breadcrumbs(0.2, 0.01)(row[None], [1.0])
    assert int((found != 0).sum()) == math.ceil(0.2 * n)
    top = math.floor(0.01 * n)
    ranked = row.abs().sort(descending=True).values
    assert (
        found.abs().max() == ranked[top]
        and found[found != 0].abs().min() == ranked[top + math.ceil(0.2 * n) - 1]
    )
    assert torch.equal(aggregators.breadcrumbs(1.0, 0.0)(row[None], [1.0]), row)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aggregators.breadcrumbs(0.0), "`density` must be in (0, 1], got 0.0."),
        (
            lambda: aggregators.breadcrumbs(0.5, 0.6),
            "`gamma` must be in [0, 1 - density], got 0.6.",
        ),
        (
            lambda: aggregators.consensus(-1.0),
            "`strength` must be finite and not negative, got -1.0.",
        ),
        (
            lambda: aggregators.consensus(agree=-1),
            "`agree` must be a number of tasks, not negative, got -1.",
        ),
        (
            lambda: aggregators.fisher(math.nan),
            "`prior` must be finite and not negative, got nan.",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ConsilienceError) as e:
        call()
    assert str(e.value) == message


# torchjd, from the Gramian alone

GRAMIAN = ["AlignedMTL", "DualProj", "IMTLG", "MGDA", "PCGrad", "UPGrad"]
GIVEN = {"Krum": {"n_byzantine": 1}}


@pytest.mark.skipif(not HAS_TORCHJD, reason="torchjd is not installed")
@pytest.mark.parametrize("name", [*GRAMIAN, "Krum"])
def test_torchjd_needs_the_gramian_alone(name: str) -> None:
    a = aggregators.torchjd(name, **GIVEN.get(name, {}))
    assert isinstance(a, Linear) and a.needs_gram
    for seed in range(5):
        rows, w, _ = a.admit(normal(4, 20, seed=seed), torch.rand(4, generator=gen(seed)))
        c = a.weigh(rows @ rows.T, w, gen(seed))
        assert c.shape == (4,) and torch.allclose(c @ rows, a(rows, w, gen(seed)), rtol=1e-6, atol=1e-9)
        assert torch.equal(c, a.coefficients(rows, w, gen(seed)))
    assert torch.equal(a.weigh(rows @ rows.T, torch.zeros(4), None), torch.zeros(4))


@pytest.mark.skipif(not HAS_TORCHJD, reason="torchjd is not installed")
@pytest.mark.parametrize("name", ["ConFIG", "GradDrop", "Mean", "Random", "Sum"])
def test_torchjds_others_want_rows(name: str) -> None:
    assert not isinstance(aggregators.torchjd(name), Linear)


# Other libraries


def module_of(package: str, path: str) -> types.ModuleType:
    """A module of an installed package, without what the package itself imports."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"peers: {package} is not installed")
    spec = importlib.util.spec_from_file_location(
        f"{package}_{Path(path).stem}", Path(found.origin).parent / path
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peft() -> types.ModuleType:
    return module_of("peft", "utils/merge_utils.py")


@pytest.mark.peers
@pytest.mark.parametrize("tenths", range(1, 10))
def test_as_peft_where_it_is_the_paper(peft: types.ModuleType, tenths: int) -> None:
    rows, w = normal(4, 40, seed=tenths), torch.rand(4, generator=gen(tenths)).double()
    density = tenths / 10 - 1e-9  # of 40 entries a whole number, which our ceil() finds below
    above = (tenths + 1e-6) / 10  # and their int() above
    assert torch.allclose(aggregators.arithmetic()(rows, w), peft.task_arithmetic(list(rows), w), atol=1e-12)
    assert torch.allclose(
        aggregators.breadcrumbs(density, 0.0)(rows, w), peft.magnitude_prune(list(rows), w, above), atol=1e-12
    )
    assert torch.allclose(
        aggregators.ties(density)(rows), peft.ties(list(rows), torch.ones(4).double(), above), atol=1e-12
    )
    one = rows[:1]
    for found in (
        aggregators.dare(density)(one, [1.0], gen(tenths)),
        peft.dare_linear([one[0]], torch.ones(1).double(), density),
    ):
        assert torch.allclose(found[found != 0], (one[0] / density)[found != 0], rtol=1e-7)


@pytest.mark.peers
def test_where_peft_differs(peft: types.ModuleType) -> None:
    t, one = normal(50), torch.ones(2).double()
    assert torch.equal(
        peft.ties([t, -t], one, 0.999), torch.where(peft.magnitude_based_pruning(t, 0.999) != 0, t.abs(), 0.0)
    )
    assert torch.equal(aggregators.ties(1.0)(torch.stack([t, -t])), torch.zeros(50, dtype=t.dtype))
    assert int((peft.magnitude_based_pruning(t, 0.25) != 0).sum()) == 12  # floor
    assert int((aggregators.ties(0.25)(t[None], [1.0]) != 0).sum()) == 13  # ceil
    rows, w = torch.tensor([[2.0], [-3.0]]), torch.tensor([9.0, 1.0])
    with pytest.warns(UserWarning, match="no pruning"):
        by_sign = peft.ties(list(rows), w, 1.0)
    with pytest.warns(UserWarning, match="no pruning"):
        by_weight = peft.ties([rows[0], rows[0]], w / 10, 1.0)
    assert by_sign.tolist() == [-3.0]  # the sign of the plain sum
    assert by_weight.tolist() == [1.0]  # divided by the number of rows, not by their weight
    assert aggregators.ties(1.0)(rows, w).tolist() == [20.0]  # the sign of the weighted sum; (w_1 + w_2) * 2
    assert aggregators.ties(1.0)(rows[[0, 0]], w / 10).tolist() == [2.0]


def mergekit(method: str, rows: Tensor, **parameters: object) -> Tensor:
    methods = pytest.importorskip(
        "mergekit.merge_methods", reason="peers: mergekit >= 0.1.5 is not installed"
    )
    merged: Tensor = methods.merge_tensors(
        [torch.zeros_like(rows[0]), *rows], method, base_index=0, parameters=parameters
    )
    return merged


@pytest.mark.peers
def test_as_mergekit_where_it_is_the_paper() -> None:
    rows, w = normal(4, 1000), [0.1, 0.2, 0.3, 0.4]
    close = functools.partial(torch.allclose, atol=1e-12)
    assert close(aggregators.arithmetic()(rows, w), mergekit("task_arithmetic", rows, weight=w))
    assert close(aggregators.ties(0.25)(rows, w), mergekit("ties", rows, weight=w, density=0.25))
    assert close(
        aggregators.breadcrumbs(0.25, 0.125)(rows, w),
        mergekit("breadcrumbs", rows, weight=w, density=0.25, gamma=0.125),
    )
    together = rows + normal(1000, seed=9)
    assert close(aggregators.model_stock()(together), mergekit("model_stock", together))
    ends = pytest.importorskip("mergekit.merge_methods").merge_tensors
    assert close(
        aggregators.slerp()(rows[:2], [0.7, 0.3]),
        ends(list(rows[:2]), "slerp", base_index=0, parameters={"t": 0.3}),
    )


@pytest.mark.peers
def test_where_mergekit_differs() -> None:
    rows = normal(2, 1001)
    t = rows[0]
    assert torch.equal(mergekit("ties", torch.stack([t, -t]), weight=1.0), t.abs())
    assert int((mergekit("ties", rows[:1], weight=1.0, density=0.5) != 0).sum()) == 500  # floor
    assert torch.allclose(
        mergekit("ties", rows, weight=0.5), mergekit("ties", rows, weight=3.0)
    )  # weights are normalised
    dropped = mergekit("dare_linear", rows[:1], weight=1.0, density=0.3)
    kept = dropped != 0
    assert (
        abs(float(dropped.abs().sum() / t.abs().sum()) - 1) < 1e-5
    )  # the norm of what is left is made that of all,
    assert ((dropped / t)[kept] - 1 / 0.3).abs().min() > 1e-6  # by another factor than 1 / density
    unscaled = mergekit("dare_linear", rows[:1], weight=1.0, density=0.3, rescale=False)
    assert torch.allclose(unscaled[unscaled != 0], t[unscaled != 0])  # or by none
    three = torch.tensor([[3.0], [3.0], [-0.3]], dtype=torch.float64)
    assert torch.allclose(
        mergekit("dare_ties", three, weight=1 / 3), torch.tensor([2.0]).double()
    )  # a sum, not a mean
    assert torch.allclose(
        aggregators.dare(1.0, aggregators.ties(1.0))(three, generator=gen()), torch.tensor([3.0]).double()
    )
    opposed = torch.stack([t, -t + 0.5 * rows[1]])
    assert mergekit("model_stock", opposed) @ opposed.mean(0) < -opposed.mean(0) @ opposed.mean(
        0
    )  # beyond the base
    assert torch.equal(aggregators.model_stock()(opposed), torch.zeros_like(t))
    assert (
        int((mergekit("breadcrumbs", rows[:1], weight=1.0, density=1.0, gamma=0.1) != 0).sum()) == 1001
    )  # gamma is let go
