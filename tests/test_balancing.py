"""Balancing of tasks, and aggregators that know their rows: against ten-line restatements in plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import consilience as cs
from consilience.aggregators._fair import FairGrad
from consilience.aggregators._vaccine import GradVac
from consilience.core.source import Tensors
from restate import stopped

FP64 = {"precision": "fp64", "batch_size": 8, "momentum": 0.0}
METHODS = {
    "task_weights": lambda: cs.methods.task_weights({"a": 3.0}),
    "task_weights by size": lambda: cs.methods.task_weights(),
    "uncertainty": lambda: cs.methods.uncertainty(),
    "dwa": lambda: cs.methods.dwa(),
    "gradnorm": lambda: cs.methods.gradnorm(),
    "famo": lambda: cs.methods.famo(),
    "worst_task": lambda: cs.methods.worst_task(),
    "scale_invariant": lambda: cs.methods.scale_invariant(),
    "gradvac": lambda: cs.methods.gradvac(0.1),
    "rlw": lambda: cs.methods.rlw(),
}


def data(count: int = 24, values: bool = False) -> list[cs.Source]:
    """Two or three tasks; equal inputs of 5 numbers, other targets."""
    g = torch.Generator().manual_seed(3)
    found = []
    for i, name in enumerate(("a", "b", "c")):
        x = torch.randn(count + 8 * i, 5, generator=g)
        y = x @ torch.randn(5, 3, generator=g)
        target = y[:, :1] if values and name == "b" else y.argmax(1)
        found.append(cs.data.arrays(x, target, name=name, validation=0, test=0.25, space=name))
    return [replace(source, task=source.name) for source in found]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 9))


class Watch(cs.Sampler):
    """Examples in their order, so that a restatement can take the same batches."""

    def plan(self, targets, batch_size, epoch, generator):
        return list(torch.arange(len(targets)).split(batch_size))


def ran(method, epochs=3, rounds=1, sources=None, **more):
    training = cs.Training(epochs=epochs, lr=0.1, sampler=Watch(), **{**FP64, **more})
    schedule = cs.settings.multitask(sources or data(), scenario="task", rounds=rounds)
    return cs.run(schedule, method, net(), training)


def restated(weigh, epochs=3, sources=None, sigma=False):
    """Plain torch: weigh(losses, norms, epoch, step) gives the weights of a step."""
    model, sources = net().double(), sources or data()
    columns = {"a": slice(0, 3), "b": slice(3, 6), "c": slice(6, 9)}
    parts = [tuple(t.double() if t.is_floating_point() else t for t in s.train.whole()) for s in sources]
    params = list(model.parameters())
    steps = max(-(-len(y) // 8) for _, y in parts)

    # Shorter tasks begin again.
    plans = [(list(torch.arange(len(y)).split(8)) * 3)[:steps] for _, y in parts]
    for epoch in range(epochs):
        for step in range(steps):
            losses = []
            for (x, y), plan, s in zip(parts, plans, sources, strict=True):
                out = model(x[plan[step]])[:, columns[s.name]]
                losses.append(F.cross_entropy(out, y[plan[step]]))
            each = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
            flat = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each])
            found = weigh([float(loss) for loss in losses], flat, (epoch, step, steps))
            grad = found if found.dim() == 1 and len(found) == flat.shape[1] else found @ flat
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(
                    torch.nn.utils.parameters_to_vector(params) - 0.1 * grad, params
                )
    return torch.cat([p.detach().flatten() for p in params])


def flat_of(result) -> Tensor:
    own = [n for n in result.params if not n.startswith("uncertainty/")]
    return torch.cat([result.params[n].flatten() for n in own])


def close(result, wanted: Tensor) -> None:
    found = flat_of(result)
    assert found.shape == wanted.shape
    # Losses have 1e-12 added where they are divided by.
    assert (found - wanted).abs().max() < 1e-8


def test_weights_are_fixed_by_name_or_size() -> None:
    a = torch.tensor([3.0, 1.0, 1.0]).double()
    close(ran(cs.methods.task_weights({"a": 3.0})), restated(lambda *_: a / a.sum()))
    n = torch.tensor([float(len(s.train)) for s in data()]).double()
    assert len(set(n.tolist())) == 3
    close(ran(cs.methods.task_weights()), restated(lambda *_: n / n.sum()))
    # Equal ones are plain training.
    equal = ran(cs.methods.task_weights({"a": 2.0, "b": 2.0, "c": 2.0}))
    close(ran(cs.methods.finetune()), flat_of(equal))


def test_uncertainty_is_learned_next_to_the_model() -> None:
    s = torch.zeros(3).double()

    def weigh(losses, flat, clock):
        nonlocal s
        weights = (-s).exp() / 3
        # Plain descent on the mean of e^-s L + s / 2.
        s = s - 0.1 * (-(-s).exp() * torch.tensor(losses, dtype=torch.float64) + 0.5) / 3
        return weights

    result = ran(cs.methods.uncertainty())
    close(result, restated(weigh))
    found = torch.stack([result.params[f"uncertainty/{name}"] for name in "abc"])
    assert (found - s).abs().max() < 1e-10 and found.abs().min() > 1e-3


def test_uncertainty_halves_losses_of_values() -> None:
    """At s = 0 the first step has factor 1/2 for values, and 1 for classes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, generator=g)
    sources = [
        replace(cs.data.arrays(x, y, name=name, kind=kind, validation=0, test=(x, y), space=name), task=name)
        for name, y, kind in (("a", torch.arange(8) % 3, "class"), ("b", x[:, 0] * 2, "value"))
    ]
    first, model = net().double(), net().double()
    result = ran(cs.methods.uncertainty(), epochs=1, sources=sources)
    out = model(x.double())
    loss = F.cross_entropy(out[:, :3], torch.arange(8) % 3) / 2
    loss = loss + 0.5 * F.mse_loss(out[:, 3], x[:, 0].double() * 2) / 2
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for p, q, grad in zip(first.parameters(), result.params.values(), grads, strict=False):
        assert (p - 0.1 * grad - q.reshape(p.shape)).abs().max() < 1e-10


def test_dwa_weighs_by_the_rates_of_epochs() -> None:
    means: list[Tensor] = []
    total = torch.zeros(3).double()

    def weigh(losses, flat, clock):
        nonlocal total
        epoch, step, steps = clock
        weights = torch.ones(3).double()
        if epoch >= 2:
            weights = 3 * ((means[-1] / means[-2]) / 2).softmax(0)
        total = total + torch.tensor(losses, dtype=torch.float64)
        if step == steps - 1:
            means.append(total / steps)
            total = torch.zeros(3).double()
        return weights / 3

    result = ran(cs.methods.dwa(), epochs=4)
    close(result, restated(weigh, epochs=4))
    # It goes on over rounds: two rounds of two epochs are four epochs.
    close(ran(cs.methods.dwa(), epochs=2, rounds=2), flat_of(result))


def test_gradnorm_brings_norms_together() -> None:
    w, first = torch.ones(3).double(), None

    def weigh(losses, flat, clock):
        nonlocal w, first
        used, now = w.clone(), torch.tensor(losses, dtype=torch.float64)
        first = now if first is None else first
        raw = flat.norm(dim=1)
        rates = (now / first) / (now / first).mean()
        target = (w * raw).mean() * rates**1.5
        leaf = w.clone().requires_grad_()
        (slope,) = torch.autograd.grad((leaf * raw - target).abs().sum(), leaf)
        w = w - 0.025 * slope
        w = 3 * w / w.sum()
        return used / 3

    close(ran(cs.methods.gradnorm()), restated(weigh))
    assert (w - 1).abs().max() > 0.01


def test_famo_lets_losses_fall_alike() -> None:
    xi = torch.zeros(3, requires_grad=True, dtype=torch.float64)
    optimiser = torch.optim.Adam([xi], lr=0.025, weight_decay=0.01)
    last = None

    def weigh(losses, flat, clock):
        nonlocal last
        logs = torch.tensor(losses, dtype=torch.float64).log()
        each = xi.detach().softmax(0) / torch.tensor(losses, dtype=torch.float64)
        fell = torch.zeros(3).double() if last is None else last - logs
        optimiser.zero_grad()
        xi.softmax(0).backward(fell)
        optimiser.step()
        last = logs
        return each / each.sum()

    close(ran(cs.methods.famo()), restated(weigh))


def test_worst_task_is_trained_alone() -> None:
    def worst(losses, flat, clock):
        return F.one_hot(torch.tensor(losses).argmax(), 3).double()

    close(ran(cs.methods.worst_task()), restated(worst))
    close(
        ran(cs.methods.scale_invariant()),
        restated(lambda now, *_: 1 / torch.tensor(now, dtype=torch.float64) / 3),
    )


def test_gradvac_remembers_over_steps_and_rounds() -> None:
    def one(beta: float):
        seen = torch.zeros(3, 3).double()

        def weigh(losses, flat, clock):
            # With order fixed by what the generator draws, the result is that of the class itself.
            nonlocal seen
            rows = flat
            from consilience.core.params import key

            generator = key(0, "a", 0, clock[0], clock[1], "aggregate")
            orders = torch.rand(3, 3, generator=generator).argsort(1)
            out = []
            for i in range(3):
                g = rows[i].clone()
                for j in orders[i].tolist():
                    if j == i:
                        continue
                    c = F.cosine_similarity(g, rows[j], dim=0)
                    s = seen[i, j].clone()
                    if c < s:
                        g = (
                            g
                            + g.norm()
                            * (s * (1 - c**2).sqrt() - c * (1 - s**2).sqrt())
                            / (rows[j].norm() * (1 - s**2).sqrt())
                            * rows[j]
                        )
                        assert abs(F.cosine_similarity(g, rows[j], dim=0) - s) < 1e-9
                    seen[i, j] = (1 - beta) * s + beta * c
                out.append(g)
            return torch.stack(out).mean(0)

        return weigh

    close(ran(cs.methods.gradvac(0.2)), restated(one(0.2)))


def test_a_state_starts_as_pcgrad_and_follows_names() -> None:
    rows = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).double()
    rule, names = GradVac(0.5), ["x", "y", "z"]
    state: dict[str, Tensor] = {}
    for _ in range(3):
        made, state = rule.advance(rows, [1 / 3] * 3, names, state, torch.Generator().manual_seed(0))
    # The same rows in another order: found again by their names.
    other: dict[str, Tensor] = {}
    for _ in range(3):
        again, other = rule.advance(
            rows[[2, 0, 1]], [1 / 3] * 3, ["z", "x", "y"], other, torch.Generator().manual_seed(0)
        )
    assert torch.equal(made, again) and torch.equal(state["cosines"], other["cosines"])
    with pytest.raises(cs.ConsilienceError, match="remembers 3 rows, and cannot go on with the 2 of x, y"):
        rule.advance(rows[:2], [0.5] * 2, ["x", "y"], state)
    with pytest.raises(cs.ConsilienceError, match="must know its rows by their names"):
        rule.advance(rows[:2], [0.5] * 2, ["x", "x"], {})


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_bargains_are_solved_to_rounding(alpha: float, scale: float) -> None:
    for seed in range(5):
        rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed)).double() + 0.2
        rows[0] *= scale
        weights = torch.rand(4, generator=torch.Generator().manual_seed(seed)).double() + 0.1
        gram = rows @ rows.T
        a = FairGrad(alpha).weigh(gram, weights, None)
        assert abs(float(a.sum() - weights.sum())) < 1e-12 and bool((a > 0).all())
        # g_i . d = t w_i a_i^(-1 / alpha) with one t for all rows.
        t = (gram @ a) * a ** (1 / alpha) / weights
        assert (t / t.mean() - 1).abs().max() < 1e-6


def test_nash_and_fair_are_torchjds() -> None:
    theirs = pytest.importorskip("torchjd.aggregation")
    for seed in range(3):
        rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed)).double() + 0.3
        for alpha in (0.5, 1.0, 2.0):
            mine, other = FairGrad(alpha)(rows), theirs.FairGrad(alpha=alpha)(rows)
            assert (mine / mine.norm() - other / other.norm()).abs().max() < 1e-7


NASH = {"max_norm": 0.0, "update_weights_every": 2}
STATEFUL = [("GradVac", {"beta": 0.5}), ("ExcessMTL", {"n_warmup_steps": 2}), ("NashMTL", NASH)]
"""Those of torchjd that keep a state. NashMTL also needs cvxpy and ecos."""


def stateful(name: str, arguments: dict[str, Any]) -> Any:
    pytest.importorskip("torchjd")
    if name == "NashMTL":
        pytest.importorskip("cvxpy"), pytest.importorskip("ecos")
    return cs.aggregators.torchjd(name, **arguments)


@pytest.mark.parametrize(("name", "arguments"), STATEFUL)
def test_the_state_of_torchjds_is_carried_from_step_to_step(name: str, arguments: dict[str, Any]) -> None:
    # Two rows, which GradVac takes in the one order that there is.
    mine, count = stateful(name, arguments), 2
    kind, tasks = mine.kind(), {"n_tasks": 2} if name == "NashMTL" else {}
    theirs = kind(**arguments, **tasks)
    unit = kind(**arguments, **tasks)(torch.ones(count, 1).double())

    state: dict[str, Tensor] = {}
    away = 0.0
    for seed in range(6):
        rows = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)).double() + 0.2
        made, state = mine.advance(rows, [0.5] * count, ["x", "y"], state)
        assert (made - theirs(rows) / unit).abs().max() < 1e-9
        assert all(len(tensor) == count for tensor in state.values())
        away = max(away, float((made - mine(rows)).abs().max()))
    assert away > 1e-3, "without its state it answers alike"


@pytest.mark.parametrize(("name", "arguments"), STATEFUL)
def test_the_state_of_torchjds_is_resumed(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    method = cs.Method("theirs", step_aggregator=stateful(name, arguments))

    resumes(method, tmp_path)
    sums = cs.Method("sums", step_aggregator=cs.aggregators.mean())
    assert (flat_of(ran(method)) - flat_of(ran(sums))).abs().max() > 1e-4


def test_bargains_are_found_for_all_matrices_of_full_rank() -> None:
    """Where a step is below the rounding of the function, a bargain used to be given up, for the mean."""
    for seed in range(300):
        rows = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)).double()
        gram = rows @ rows.T
        a = FairGrad(1.0).weigh(gram, torch.full((3,), 1 / 3).double(), None)
        gains = (gram @ a) * a
        assert (gains / gains.mean() - 1).abs().max() < 1e-9, seed


def test_rows_that_cancel_are_given_up_by_a_bargain() -> None:
    """Where 0 is a positive combination of the rows there is no bargain, and nothing is gained."""
    rows = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]]).double()
    for alpha in (0.2, 1.0, 5.0):
        assert FairGrad(alpha)(rows).norm() < 1e-3
    one_is_zero = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert torch.allclose(FairGrad(1.0)(one_is_zero), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("c", [0.2, 0.5, 0.9])
def test_cagrad_is_the_best_worst_direction(c: float) -> None:
    """Duality: max over |d - g| <= c |g| of min_i g_i . d = min over a of g_a . g + c |g| |g_a|."""
    from consilience.aggregators._cagrad import CAGrad

    for seed in range(5):
        rows = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed)).double() + 0.3
        mean = rows.mean(0)
        d = CAGrad(c)(rows) * (1 + c)
        assert abs(float((d - mean).norm() - c * mean.norm())) < 1e-6
        gained = float((rows @ d).min())
        for other in torch.randn(400, 10, generator=torch.Generator().manual_seed(9)).double():
            turned = mean + c * mean.norm() * other / other.norm()
            assert float((rows @ turned).min()) <= gained + 1e-6


def test_sdmgrad_lies_between_mgda_and_the_mean() -> None:
    rows = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(cs.aggregators.sdmgrad(0.0)(rows), cs.aggregators.mgda()(rows))
    assert torch.allclose(cs.aggregators.sdmgrad(1e6)(rows), rows.mean(0), atol=1e-5)
    # By its definition: no other point of the simplex is shorter.
    made = cs.aggregators.sdmgrad(0.5)(rows) * 1.5
    for a in torch.rand(300, 4, generator=torch.Generator().manual_seed(1)).double():
        assert made.norm() <= (a / a.sum() @ rows + 0.5 * rows.mean(0)).norm() + 1e-12


def test_random_weights_are_drawn_anew_in_each_step() -> None:
    from consilience.core.params import key

    def weigh(losses, flat, clock):
        generator = key(0, "a", 0, clock[0], clock[1], "aggregate")
        return torch.randn(3, generator=generator, dtype=torch.float64).softmax(0)

    close(ran(cs.methods.rlw()), restated(weigh))


@pytest.mark.parametrize("name", METHODS)
def test_resumed_to_the_same_bits(name: str, tmp_path) -> None:
    resumes(METHODS[name](), tmp_path)


def resumes(method: cs.Method, tmp_path: Path) -> None:
    def go(out, **more):
        training = cs.Training(epochs=3, lr=0.1, batch_size=8)
        schedule = cs.settings.multitask(data(), scenario="task", rounds=2)
        return cs.run(schedule, method, net(), training, out=out, **more)

    # In the second round, within an epoch.
    whole = go(tmp_path / "whole")
    stopped(go, tmp_path / "cut", 20)
    again = go(tmp_path / "cut", resume=True)
    assert all(torch.equal(whole.params[n], again.params[n]) for n in whole.params)


@pytest.mark.parametrize("name", ["uncertainty", "dwa", "gradnorm"])
def test_one_task_in_a_step_is_refused(name: str) -> None:
    with pytest.raises(cs.Refusal, match="it weighs the tasks of a step"):
        cs.run(cs.settings.continual(data(), scenario="task"), METHODS[name](), net())


def test_accumulated_steps_are_those_of_the_whole_batch() -> None:
    for name in ("dwa", "gradnorm", "uncertainty", "rlw"):
        whole = ran(METHODS[name](), epochs=3, batch_size=8)
        cut = ran(METHODS[name](), epochs=3, batch_size=4, accumulate=2)
        assert (flat_of(whole) - flat_of(cut)).abs().max() < 1e-10, name


@pytest.mark.parametrize("name", ["famo", "worst_task", "scale_invariant"])
def test_weights_by_the_losses_of_a_step_need_its_whole_batch(name: str) -> None:
    with pytest.raises(
        cs.Refusal, match="by the losses of a whole batch, and `accumulate` cuts it into parts"
    ):
        ran(METHODS[name](), accumulate=2)


def test_a_state_is_refused_in_an_exchange() -> None:
    schedule = cs.settings.federated(data(), rounds=2)
    with pytest.raises(cs.Refusal, match="GradVac remembers earlier calls.* use one without a memory"):
        cs.run(schedule, cs.methods.aggregate(cs.aggregators.gradvac()), net())


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": 0.0}, r"`weights` must be positive and finite, got \{'a': 0.0\}"),
        ({"a": float("nan")}, "`weights` must be positive and finite"),
        ({"a": float("inf")}, "`weights` must be positive and finite"),
        ("sizes", "`weights` must be \"size\" or numbers by the name of a source, got 'sizes'"),
        ({"d": 2.0}, "`weights` must be of a, b, c, got 'd'"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: Any, says: str) -> None:
    with pytest.raises(cs.ConsilienceError, match=says):
        ran(cs.methods.task_weights(weights))


LACKING = (
    *("finetune", "uncertainty", "dwa", "gradnorm", "famo", "worst_task", "scale_invariant"),
    *("mgda", "pcgrad", "gradvac"),
)


@pytest.mark.parametrize("name", LACKING)
def test_a_batch_without_targets_of_a_task_is_a_step_of_the_others(name: str) -> None:
    """Task b has no target in the first step: it is one of tasks a and c alone, with weights 1/3 each."""
    first = []
    for s in data():
        x, y = s.train.whole()
        made = cs.data.arrays(
            x[:8], y[:8], test=(x, y), validation=0, name=s.name, space=s.name, classes=["0", "1", "2"]
        )
        first.append(made.map(task=s.name))
    x, y = first[1].train.whole()
    held = first[1].map(train=Tensors(torch.cat([x, x]), torch.cat([torch.full_like(y, -100), y])))
    method = getattr(cs.methods, name)()

    def stepped(sampler: cs.Sampler) -> cs.Result:
        training = cs.Training(epochs=1, lr=0.1, sampler=sampler, precision="fp64", batch_size=8)
        schedule = cs.settings.multitask([first[0], held, first[2]], scenario="task")
        return cs.run(schedule, method, net(), training)

    weights, model, rows = torch.full((2,), 1 / 3).double(), net().double(), []
    for s in (first[0], first[2]):
        at = {"a": slice(0, 3), "c": slice(6, 9)}[s.name]
        loss = F.cross_entropy(model(s.train.whole()[0].double())[:, at], s.train.whole()[1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append((float(loss.detach()), torch.cat([g.flatten() for g in grads])))
    losses, flat = torch.tensor([loss for loss, _ in rows]).double(), torch.stack([row for _, row in rows])
    by = {"famo": 3 * (1 / losses) / (1 / losses).sum(), "scale_invariant": 1 / losses}
    by["worst_task"] = 3.0 * F.one_hot(losses.argmax(), 2)
    wanted = (by.get(name, torch.ones(2)).double() / 3) @ flat
    if name in ("mgda", "pcgrad", "gradvac"):
        wanted = getattr(cs.aggregators, name)()(flat, weights)

    result = stepped(Once())
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (flat_of(result) - (start - 0.1 * wanted)).abs().max() < 1e-8
    # And training goes on where the task is back.
    assert torch.isfinite(flat_of(stepped(Watch()))).all()


class Once(cs.Sampler):
    """The first examples alone."""

    def plan(self, targets, batch_size, epoch, generator):
        return [torch.arange(batch_size)]


@pytest.mark.parametrize("setting", ["multitask", "federated", "merging"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gem", "GEM keeps to constraints, and here nothing sets any.* use mean, or methods.gem"),
        ("agem", "AGEM keeps to constraints, and here nothing sets any"),
        ("fisher", "Fisher weighs entries by importances.* use methods.fisher_merging"),
    ],
)
def test_what_would_be_the_mean_is_refused(setting: str, name: str, why: str) -> None:
    schedule = getattr(cs.settings, setting)(data())
    with pytest.raises(cs.Refusal, match=why):
        cs.run(schedule, cs.methods.aggregate(getattr(cs.aggregators, name)()), net())
