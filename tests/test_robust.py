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
from consilience import aggregators, testing
from consilience.aggregators._krum import squares
from consilience.consolidators.normalised import Normalised
from consilience.core.aggregator import Aggregator
from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Shared, Statistics, Weights
from consilience.core.params import Params, content_hash
from consilience.core.state import State
from consilience.core.weight_space import WeightSpace
from consilience.data.samplers import Shuffle
from consilience.loop.agent import Agent
from consilience.loop.ledger import Ledger

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


# what senders claim, and all that they send: buffers, entries of one task, sizes, steps

SENDERS = 11
STATISTICS = {"mean": (3,), "var": (3,), "small": (2, 2)}
"""Buffers by shape; those called small are a thousandth of the others."""


def receiver(consolidator: WeightSpace) -> tuple[Agent, Params]:
    model = testing.plain_model()
    base = model.init(torch.Generator().manual_seed(0))[0]
    method = cs.Method("receiver", consolidator=consolidator)
    state = State(base, {}, base, content_hash(base))
    setting = testing.SETTINGS["merging"]()
    return Agent("me", model, method, setting, testing.TRAINING, 0, state, Ledger()), base


def sent(i: int, base: Params, scale: float = 0.1, steps: float | None = None, /, **facts: object) -> Message:
    """Parameters near the base with buffers near 1, or `scale` away; trained, with a size of 10 + i."""
    g = torch.Generator().manual_seed(i)
    tensors = {f"params/{n}": p + scale * torch.randn(p.shape, generator=g) for n, p in base.items()}
    for n, shape in STATISTICS.items():
        value = 1 + scale * torch.randn(shape, generator=g)
        tensors[f"buffers/{n}"] = value / 1000 if n == "small" else value
    items: dict[str, Shared] = {"model": Weights(tensors)}
    if steps is not None:
        items["LocalSteps"] = Statistics({"steps": torch.tensor(steps, dtype=torch.float64)})
    origin = content_hash(base)
    message = Message(f"sender-{i:02}", "", 1, 10 + i, origin, origin, items)
    return replace(message, digest="", **facts)  # type: ignore[arg-type]


def received(consolidator: WeightSpace, messages: list[Message], by_size: bool = True) -> State:
    agent, _ = receiver(consolidator)
    agent.receive(messages, by_size)
    return agent.state


@every
def test_robust_aggregators_cover_buffers(name: str) -> None:
    """Each floating-point buffer by itself, as the aggregator combines rows; bad ones change little."""
    a, (_, base) = ROBUST[name], receiver(WeightSpace())
    bad = 1 if name == "bulyan" else 2
    honest = [sent(i, base) for i in range(bad, SENDERS)]
    for scale in (1e3, 1e30):
        ill = received(WeightSpace(a), [*(sent(i, base, scale) for i in range(bad)), *honest])
        for n in STATISTICS:
            good = torch.stack([m.items["model"].tensors[f"buffers/{n}"] for m in honest])
            wrong = [sent(i, base, scale).items["model"].tensors[f"buffers/{n}"] for i in range(bad)]
            assert torch.allclose(
                ill.buffers[n].flatten(), a(torch.stack([*wrong, *good]).flatten(1)), rtol=1e-6, atol=0
            )
            assert ((ill.buffers[n] - good.mean(0)).abs() <= (good.max() - good.min())).all()
        assert max(float((ill.params[n] - p).abs().max()) for n, p in base.items()) < 1
    # A bad sender may hide in one buffer whose numbers are small: its parameters and other buffers are good.
    sly = sent(0, base)
    tensors = dict(sly.items["model"].tensors)
    tensors["buffers/small"] = torch.full((2, 2), 0.5)
    sly = replace(sly, items={"model": Weights(tensors)}, digest="")
    found = received(WeightSpace(a), [sly, *(sent(i, base) for i in range(1, SENDERS))]).buffers["small"]
    assert float((found - 0.001).abs().max()) < 5e-4


@every
def test_robust_aggregators_cover_entries_of_one_task(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, (agent, base) = ROBUST[name], receiver(WeightSpace())
    own = next(iter(base))
    monkeypatch.setattr(type(agent.model), "task_of", lambda model, n: "t" if n == own else None)
    common = content_hash({n: p for n, p in base.items() if n != own})
    messages = [sent(i, base, 1e3 if i < 1 else 0.1, base=common) for i in range(SENDERS)]
    found = received(WeightSpace(a), messages).params[own]
    good = torch.stack([m.items["model"].tensors[f"params/{own}"] for m in messages[1:]])
    assert ((found - good.mean(0)).abs() <= (good.max() - good.min())).all()

    # Fewer senders of it than the aggregator needs to tolerate bad ones.
    few = messages[-2:]
    for m in messages[:-2]:
        rest = {n: t for n, t in m.items["model"].tensors.items() if n != f"params/{own}"}
        few.append(replace(m, items={"model": Weights(rest)}, digest=""))
    if a.fewest_rows > 2:
        with pytest.raises(ConsilienceError, match=f"rows, got 2 of '{own}'; use aggregators.median()"):
            received(WeightSpace(a), few)
    else:
        assert float((received(WeightSpace(a), few).params[own] - base[own]).abs().max()) < 1


CLAIMS = {
    "a size": {"size": 10**12},
    "nothing learned": {"trained": False},
    "no examples": {"trained": False, "size": 0},
    "another base": {"trained": False, "base": "another"},
}


@every
@pytest.mark.parametrize("by_size", [True, False])
def test_a_claim_changes_no_bit(name: str, by_size: bool) -> None:
    a, (_, base) = ROBUST[name], receiver(WeightSpace())
    honest = [sent(i, base) for i in range(1, SENDERS)]
    plain = received(WeightSpace(a), [sent(0, base, 50.0), *honest], by_size)
    for claim in CLAIMS.values():
        liar = sent(0, base, 50.0, **claim)
        found = received(WeightSpace(a), [liar, *honest], by_size)
        assert all(torch.equal(found.params[n], p) for n, p in plain.params.items())
        assert all(torch.equal(found.buffers[n], b) for n, b in plain.buffers.items())
        assert found.size <= SENDERS * 16, "the median of the claimed sizes"

    # What is not finite is left out, also of a sender that says that it trained on nothing.
    broken = sent(0, base, float("nan"), trained=False)
    with pytest.warns(UserWarning, match="parameters of 'sender-00' have NaN or infinity"):
        found = received(WeightSpace(a), [broken, *honest], by_size)
    assert all(torch.equal(found.params[n], p) for n, p in received(WeightSpace(a), honest).params.items())


def test_averages_still_go_by_size() -> None:
    _, base = receiver(WeightSpace())
    messages = [sent(i, base) for i in range(3)]
    found, name = received(WeightSpace(), messages), next(iter(base))
    for kind, got in (("params", found.params[name]), ("buffers", found.buffers["var"])):
        at = f"{kind}/{name if kind == 'params' else 'var'}"
        mean = sum(m.size * m.items["model"].tensors[at] for m in messages) / 33
        assert torch.allclose(got, mean, atol=1e-6)
    assert found.size == 33


@pytest.mark.parametrize("steps", [1e-12, 1.0, 1e12])
def test_a_claim_of_steps_changes_little(steps: float) -> None:
    """FedNova under a median: all but the liar took 4 steps, so that their changes count as they are."""
    _, base = receiver(WeightSpace())
    honest = [sent(i, base, 0.1, 4.0) for i in range(1, SENDERS)]
    space = Normalised(aggregators.median())
    found = received(space, [sent(0, base, 0.1, steps), *honest])
    for n, p in base.items():
        good = torch.stack([m.items["model"].tensors[f"params/{n}"] for m in honest])
        middle = good.sort(0).values[3:7]
        assert ((found.params[n] - p).abs() < 1).all()
        assert ((found.params[n] >= middle[0] - 1e-6) & (found.params[n] <= middle[-1] + 1e-6)).all()
    text = "(number of steps, got|got NaN or infinity in 'steps').*'sender-00'"
    for wrong in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(ConsilienceError, match=text):
            received(space, [sent(0, base, 0.1, wrong), *honest])


@pytest.mark.parametrize("size", [-1, 0, 1.5, float("nan"), True, "12", 10**301])
def test_sizes_are_positive_whole_numbers(size: object) -> None:
    _, base = receiver(WeightSpace())
    with pytest.raises(ConsilienceError, match="`size`.* must be"):
        sent(0, base, size=size)
    lie = sent(0, base)
    object.__setattr__(lie, "size", size)
    with pytest.raises(ConsilienceError, match="`size`.* must be"):
        Message.from_bytes(lie.to_bytes())
    # Who did not train, such as a server before the first round, may stand for no examples.
    if size != 0:
        with pytest.raises(ConsilienceError, match="`size`.* must be"):
            sent(0, base, size=size, trained=False)


def test_one_client_in_other_units_does_not_ruin_batch_norm() -> None:
    parts = cs.data.iid(cs.data.digits(), 8)
    bad = parts[0].map(x=lambda t: t * 1000).map(test=parts[0].test)
    more = cs.Training(epochs=2, lr=0.1, sampler=Shuffle(drop_last=True))

    def accuracy(aggregator: Aggregator, group: list[cs.Source]) -> float:
        torch.manual_seed(0)
        layers = torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        schedule = cs.settings.federated(group, rounds=4, evaluate_every=4)
        return cs.run(schedule, cs.methods.aggregate(aggregator), torch.nn.Sequential(*layers), more).accuracy

    for a in (aggregators.median(), aggregators.krum(1), aggregators.trimmed_mean(0.2)):
        assert accuracy(a, [bad, *parts[1:]]) > 0.85
    assert accuracy(aggregators.mean(), [bad, *parts[1:]]) < 0.6
