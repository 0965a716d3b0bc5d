"""Mixtures searched and judged on data, and whether combining pays: against restatements, on digits."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from html import escape
from types import SimpleNamespace
from xml.dom import minidom

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from consilience import ConsilienceError, Refusal, aggregators, data, models
from consilience.cli.choose import halved
from consilience.cli.main import main
from consilience.core.params import key, same, save
from consilience.core.source import Tensors
from consilience.merging import _choose
from consilience.merging._bench import Answers, Bench
from consilience.merging._choose import choose
from consilience.merging._explore import explore, greedy_soup
from consilience.merging._stream import merge
from test_report import checked

QUICK = dict(grid=(0.0, 0.4, 1.0), budget=6)


def trained(model, start, source, epochs, buffers=None, task=None):
    params = {n: p.clone().requires_grad_() for n, p in start.items()}
    optimiser, g = torch.optim.Adam(params.values(), 3e-3), key(0, source.name)
    x, y = source.train.whole()
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=g).split(32):
            optimiser.zero_grad()
            F.cross_entropy(model(params, buffers or {}, x[i], task, True)[0], y[i]).backward()
            optimiser.step()
    return {n: p.detach() for n, p in params.items()}


@pytest.fixture(scope="module")
def digits():
    """A base that knows a little of all digits, and an expert for each of two halves."""
    model, halves = models.mlp(64, (32,)), data.split_classes(data.digits(), 2)
    base = trained(model, model.init(key(0))[0], data.digits(), 1)
    return model, base, {n: trained(model, base, s, 3) for n, s in zip("ab", halves, strict=True)}, halves


def accuracy(model, params, part, buffers=None, task=None, columns=None):
    with torch.no_grad():
        out = model(params, buffers or {}, part.x, task, False)[0]
    if columns:
        out = out[:, list(columns)]
        return float((torch.tensor(columns)[out.argmax(1)] == part.y).double().mean())
    return float((out.argmax(1) == part.y).double().mean())


# -------------------------------------------------------------------------------------------------------
# mixtures


def test_a_mixture_is_the_base_and_its_task_vectors(digits):
    model, base, experts, halves = digits
    wide = [{n: t.double() for n, t in e.items()} for e in (base, *experts.values())]
    bench = Bench(
        model, wide[0], dict(zip("ab", wide[1:], strict=True)), [s.map(x=torch.Tensor.double) for s in halves]
    )
    for c in ((0.3, 0.7), (-1.0, 2.5), (0.5, 0.0)):
        made = bench.mixture(c)
        for n, t in wide[0].items():
            assert torch.allclose(made[n], t + c[0] * (wide[1][n] - t) + c[1] * (wide[2][n] - t), atol=1e-12)
    bench = Bench(model, base, experts, halves)
    assert same(bench.mixture((0, 0)), base)
    assert same(bench.mixture((1, 0)), experts["a"])
    assert same(bench.mixture((0, 1)), experts["b"])


def test_what_an_aggregator_merged_is_scaled(digits):
    model, base, experts, halves = digits
    bench = Bench(model, base, experts, halves)
    bench.add("ties", aggregators.ties(0.3), 0)
    names = sorted(base)
    rows = torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in names]) for e in experts.values()])
    tau = aggregators.ties(0.3)(rows)
    for c in (1.0, 0.0, 2.5):
        made = torch.cat([(t - base[n]).flatten() for n, t in sorted(bench.along("ties", c).items())])
        assert torch.allclose(made, c * tau, atol=1e-6)
    assert same(bench.along("ties", 0.0), base)


def test_every_mixture_is_judged_once_by_one_pass_a_data_set(digits, monkeypatch):
    model, base, experts, halves = digits
    calls = []
    whole = type(model).__call__
    monkeypatch.setattr(
        type(model),
        "__call__",
        lambda s, p, b, x, t, train: calls.append(len(x)) or whole(s, p, b, x, t, train),
    )
    found = explore(
        model, base, experts, halves, each=True, aggregators={"ties": aggregators.ties()}, **QUICK
    )
    judged = [n for n in calls if n > 2]  # one or two alone: whether the data fit, and the columns
    assert len(judged) == 2 * (len(found.mixtures) + len(experts))
    assert len({(m.aggregator, m.coefficients) for m in found.mixtures}) == len(found.mixtures)
    calls.clear()
    explore(
        model, base, experts, [replace(s, validation=halves[0].validation) for s in halves], optimiser=None
    )
    assert len([n for n in calls if n > 2]) == 11 + 2, "the same examples are asked once"


@pytest.mark.parametrize("objective", ["mean", "worst"])
def test_scores_are_accuracies_over_those_of_the_best_expert(digits, objective):
    model, base, experts, halves = digits
    found = explore(model, base, experts, halves, objective=objective, **QUICK)
    for m in found.mixtures:
        params = {
            n: t + sum(c * (e[n] - t) for c, e in zip(m.coefficients, experts.values(), strict=True))
            for n, t in base.items()
        }
        for s in halves:
            assert abs(m.scores[s.name] - accuracy(model, params, s.validation)) < 0.02, (
                "rounding may move one example"
            )
        ratios = [
            m.scores[s.name] / max(accuracy(model, e, s.validation) for e in experts.values()) for s in halves
        ]
        assert m.score == pytest.approx(sum(ratios) / 2 if objective == "mean" else min(ratios))
    assert found.best.score == max(m.score for m in found.mixtures)
    assert accuracy(model, found.params(), halves[0].validation) == found.best.scores[halves[0].name]


@pytest.mark.parametrize("objective", ["entropy", "agreement"])
def test_without_labels_none_are_read(digits, objective):
    model, base, experts, halves = digits
    blind = [replace(s, validation=Tensors(s.validation.x, 0 * s.validation.y)) for s in halves]
    a, b = (explore(model, base, experts, some, objective=objective, **QUICK) for some in (halves, blind))
    assert a.mixtures == b.mixtures
    with torch.no_grad():
        x = halves[0].validation.x
        p = [model(e, {}, x, None, False)[0].softmax(1).double() for e in (base, *experts.values())]
    entropy = 1 - float(-(p[0] * p[0].log()).sum(1).mean()) / math.log(10)
    agreement = float(((p[1] + p[2]).argmax(1) == p[0].argmax(1)).double().mean())
    at_zero = next(m for m in a.mixtures if not any(m.coefficients))
    assert at_zero.scores[halves[0].name] == pytest.approx(
        entropy if objective == "entropy" else agreement, abs=1e-5
    )


@pytest.mark.parametrize("optimiser", ["nelder-mead", "differential_evolution"])
def test_optimisers_keep_their_budget_repeat_and_never_lose(digits, optimiser):
    model, base, experts, halves = digits
    grid = explore(model, base, experts, halves, each=True, grid=(0.0, 1.0), optimiser=None)
    a, b = (
        explore(
            model, base, experts, halves, each=True, grid=(0.0, 1.0), optimiser=optimiser, budget=25, seed=3
        )
        for _ in range(2)
    )
    assert a.mixtures == b.mixtures
    assert a.mixtures[: len(grid.mixtures)] == grid.mixtures
    assert len(a.mixtures) <= len(grid.mixtures) + 25
    assert a.best.score > grid.best.score, (
        "between the base, the experts and their sum there is something better"
    )
    assert all(0 <= v <= 1.5 for m in a.mixtures for v in m.coefficients)


def test_the_front_is_what_none_dominates_and_is_drawn(digits, tmp_path):
    model, base, experts, halves = digits
    found = explore(
        model, base, experts, halves, each=True, aggregators={"ties": aggregators.ties()}, **QUICK
    )
    points = {tuple(m.scores.values()) for m in found.mixtures}
    front = {p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)}
    assert {tuple(m.scores.values()) for m in found.pareto()} == front
    assert len(found.pareto()) == len(front)
    titles = minidom.parse(str(found.write(tmp_path / "front.svg"))).getElementsByTagName("title")
    assert sum("best" in t.firstChild.data for t in titles) == 1
    rings = (tmp_path / "front.svg").read_text().count('<circle class="learn"')
    assert rings == len(found.pareto()) + 1 + (found.best not in found.pareto()), "and one in the legend"
    assert found.table().splitlines()[2].startswith(found.best.name)
    assert json.loads(json.dumps(found.to_json()))["best"]["score"] == found.best.score
    three = explore(model, base, experts, data.split_classes(data.digits(), 5), optimiser=None)
    assert "worst source" in three.write(tmp_path / "three.svg").read_text()


def test_a_greedy_soup_is_the_recipe(digits):
    model, base, experts, halves = digits
    some = {
        "base": base,
        "far": {n: -t for n, t in base.items()},
        **experts,
        "whole": trained(model, base, data.digits(), 1),
        "again": trained(model, base, replace(data.digits(), name="other"), 1),
    }

    def score(names):
        params = {n: torch.stack([some[k][n].double() for k in names]).mean(0).float() for n in base}
        return sum(accuracy(model, params, s.validation) for s in halves) / 2

    order = sorted(some, key=lambda n: -score([n]))
    soup = [order[0]]
    for n in order[1:]:
        soup += [n] if score([*soup, n]) >= score(soup) else []
    found = greedy_soup(model, some, halves)
    assert {n for n, c in zip(some, found.best.coefficients, strict=True) if c} == set(soup)
    assert 1 < len(soup) < len(some)
    assert found.best.score == pytest.approx(score(soup))
    assert len(found.mixtures) == 2 * len(some) - 1


def test_heads_are_kept_and_chosen_by_the_task():
    halves = data.split_classes(data.digits(), 2)
    model = models.multi_head(models.mlp(64, (32,)), 10)
    base, buffers = model.init(key(0))
    experts, whole = {}, {}
    for s in halves:
        params, own = model.grow(base, buffers, s, key(1))
        experts[s.name] = {**trained(model, params, s, 3, own, s.name), **own}
        whole |= experts[s.name]
    found = explore(model, base, experts, halves, **QUICK)
    merged = found.params()
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[n], whole[n]) for n in whole if n.startswith("heads."))
    assert found.best.scores[halves[1].name] > 0.8
    params = {n: t for n, t in merged.items() if t.is_floating_point()}
    got = accuracy(
        model,
        params,
        halves[1].validation,
        {n: t for n, t in merged.items() if n not in params},
        halves[1].name,
    )
    assert got == found.best.scores[halves[1].name]
    made = choose(model, base, experts, halves, budget=4)
    assert (
        made["routing by task"].detail
        == f"{halves[0].name}: {halves[0].name}, {halves[1].name}: {halves[1].name}"
    )
    assert made["routing by task"].passes == 1
    assert made.single == "base" or made[made.single].kind == "expert"
    with pytest.raises(Refusal, match="nothing in common|no outputs in common"):
        choose(model, base, experts, halves, budget=4, distil=True)


def test_a_head_that_only_one_expert_moved_is_that_experts():
    model = models.multi_head(models.mlp(64, (8,)), 10)
    halves = data.split_classes(data.digits(), 2)
    params, buffers = model.init(key(0))
    for s in halves:
        params, buffers = model.grow(params, buffers, s, key(1))
    base = {**params, **buffers}
    names = [n for n in params if n.startswith("heads.")]
    first = {**base, names[0]: base[names[0]] + 1}
    both = {**base, names[0]: base[names[0]] + 3, names[1]: base[names[1]] + 1}
    made = Bench(model, base, {"a": first, "b": both, "c": base}, halves).mixture((0.3, 0.3, 0.3))
    assert torch.allclose(made[names[0]], base[names[0]] + 2)
    assert torch.equal(made[names[1]], both[names[1]])
    assert torch.equal(made[names[2]], base[names[2]])


def test_a_soup_without_a_base_does_not_take_the_first_experts_head_for_untrained():
    halves = data.split_classes(data.digits(), 2)
    model = models.multi_head(models.mlp(64, (8,)), 10)
    base, buffers = model.init(key(0))
    experts = {}
    for s in halves:
        params, own = model.grow(base, buffers, s, key(1))
        experts[s.name] = {**trained(model, params, s, 2, own, s.name), **own}
    there, back = (
        greedy_soup(model, dict(some), halves) for some in (experts.items(), reversed(experts.items()))
    )
    assert same(there.params(), back.params())
    heads = {n: t for e in experts.values() for n, t in e.items() if n.startswith("heads.")}
    assert all(torch.equal(there.params()[n], t) for n, t in heads.items())
    a, b = experts.values()
    mine = {**b, **{n: t for n, t in a.items() if n.startswith("heads.")}}
    assert greedy_soup(model, {"x": a, "y": mine}, halves).best.score > 0
    name = next(n for n in a if n.startswith("heads.") and n.endswith("bias"))
    other = {**mine, name: a[name] + 1}
    with pytest.raises(
        ConsilienceError, match=f"got {name!r} of task .* in 'x' and another in 'y'; give `base`"
    ):
        greedy_soup(model, {"x": a, "y": other}, halves)
    assert greedy_soup(model, {"x": a, "y": other}, halves, base=a).best.score > 0
    untrained = {**mine, name: a[name] - 1}
    made = Bench(model, untrained, {"x": a, "y": untrained}, halves).mixture((0.5, 0.5))
    assert torch.equal(made[name], a[name]), "with a base it is the one that was learned"


def test_distilling_keeps_frozen_entries(digits):
    model, _, _, halves = digits
    still = models.frozen(model, ("3.*",))
    base = model.init(key(0))[0]
    experts = {n: {**e, **{k: base[k] for k in base if k.startswith("3.")}} for n, e in digits[2].items()}
    found = choose(still, base, experts, halves, aggregators={}, budget=2, distil=True)
    made = found.params("distillation")
    assert made.keys() == base.keys()
    assert torch.equal(made["3.weight"], base["3.weight"])
    assert not torch.equal(made["1.weight"], found.params("average")["1.weight"])


def test_experts_with_frozen_entries_of_their_own_are_refused(digits):
    model, _, _, halves = digits
    still = models.frozen(model, ("3.*",))
    base = model.init(key(0))[0]
    experts = {n: {**e, **{k: base[k] for k in base if k.startswith("3.")}} for n, e in digits[2].items()}
    bad = {**experts, "b": digits[2]["b"]}
    with pytest.raises(
        ConsilienceError, match="frozen entries, got another '3.weight' in 'b' than in the base"
    ):
        explore(still, base, bad, halves)
    with pytest.raises(ConsilienceError, match="another '3.weight' in 'b' than in 'a'"):
        greedy_soup(still, bad, halves)
    half = {n: {k: t.bfloat16() for k, t in e.items()} for n, e in experts.items()}
    assert Bench(still, base, half, halves).experts, "rounding is no change"


def test_no_candidate_takes_the_name_of_another(digits):
    model, base, experts, halves = digits
    given = {"ensemble": experts["a"], "routing by task": experts["b"]}
    found = choose(
        model, base, given, halves, {"routing by entropy": aggregators.mean()}, scenario="task", budget=0
    )
    kinds = {c.name: c.kind for c in found.candidates}
    assert [kinds[n] for n in (*given, "routing by entropy")] == ["expert", "expert", "merge"]
    more = {
        "ensemble ensemble": "ensemble",
        "routing routing by task": "routing",
        "routing routing by entropy": "routing",
    }
    assert kinds.items() >= more.items()


def test_label_spaces_are_named_where_classes_do_not_fit(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 255, (60, 4, 4), dtype=np.uint8)
    y = (x.reshape(60, -1).mean(1) > 127).astype(int)
    for name in ("left", "right"):
        np.savez(tmp_path / f"{name}.npz", train_images=x, train_labels=y, test_images=x, test_labels=y)
    model = models.mlp(16, (4,), 2)
    base = model.init(key(0))[0]
    save(tmp_path / "m.safetensors", base)
    says = r"2 label spaces \(left, right\).*`--data.space NAME`"
    apart = [data.npz(tmp_path / f"{n}.npz") for n in ("left", "right")]
    with pytest.raises(ConsilienceError, match=says):
        explore(model, base, [base], apart)
    with pytest.raises(ConsilienceError, match=says):
        explore(models.mlp(16, (4,), 4), base, [base], apart)
    argv = [
        "choose",
        *[str(tmp_path / "m.safetensors")] * 2,
        "--data",
        str(tmp_path),
        "--model",
        "mlp",
        "--model.hidden",
        "[4]",
    ]
    (tmp_path / "npz").mkdir()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "label spaces (left, right)" in error
    assert main([*argv, "--data.space", "dark", "--budget", "0"]) == 0
    capsys.readouterr()
    with pytest.raises(ConsilienceError) as e:
        explore(model, base, [base], [apart[0], data.wine()], scenario="domain")
    assert "label spaces" not in str(e.value)


def test_running_statistics_stay_variances_and_types_come_back():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)).eval()
    base = {n: t.clone() for n, t in module.state_dict().items()}
    far = {n: t + 5 if n.endswith("var") else t + 1 for n, t in base.items()}
    bench = Bench(module, base, {"far": far, "near": base}, [data.digits()])
    for c in ((-3.0, 0.0), (3.0, 0.0), (0.2, 0.2), (0.0, 0.0), (1.0, 0.0)):
        made = bench.mixture(c)
        share = max(c[0], 0) / max(1, sum(max(v, 0) for v in c))
        assert torch.allclose(made["1.running_var"], base["1.running_var"] + 5 * share)
        assert int(made["1.num_batches_tracked"]) == 0
        assert torch.allclose(made["0.weight"], base["0.weight"] + c[0], atol=1e-5)
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in base.items()}
    found = explore(module, half, [half, half], [data.digits()], **QUICK)
    assert same(found.params(), half)


def test_tied_weights_go_by_both_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.b = nn.Linear(64, 64)
            self.b.weight = self.a.weight
            self.c = nn.Linear(64, 10)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()))

    torch.manual_seed(0)
    base, expert = (Tied().state_dict() for _ in range(2))
    found = explore(Tied(), base, [expert], [data.digits()], grid=(0.5,), optimiser=None).params()
    assert found.keys() == base.keys()
    assert torch.equal(found["a.weight"], found["b.weight"])
    assert torch.allclose(found["a.weight"], (base["a.weight"] + expert["a.weight"]) / 2, atol=1e-6)


# -------------------------------------------------------------------------------------------------------
# choosing


@pytest.fixture(scope="module")
def chosen(digits):
    model, base, experts, halves = digits
    return choose(model, base, experts, halves, distil=True, budget=10)


def test_all_ways_are_judged_on_the_test_parts(digits, chosen):
    model, base, experts, halves = digits
    with torch.no_grad():
        for s in halves:
            x, y = s.test.whole()
            p = torch.stack([model(e, {}, x, None, False)[0].softmax(1).double() for e in experts.values()])
            surest = (-(p * p.log()).sum(2)).argmin(0)
            for name, answer in (
                ("a", p[0]),
                ("ensemble", p.mean(0)),
                ("routing by entropy", p[surest, torch.arange(len(y))]),
            ):
                assert chosen[name].test[s.name] == pytest.approx(
                    float((answer.argmax(1) == y).double().mean()), abs=1e-9
                )
            assert chosen["base"].test[s.name] == accuracy(model, base, s.test)
            average = {n: (experts["a"][n] + experts["b"][n]) / 2 for n in base}
            assert abs(chosen["average"].test[s.name] - accuracy(model, average, s.test)) < 0.01
    assert {c.kind for c in chosen.candidates} == {
        "base",
        "expert",
        "merge",
        "ensemble",
        "routing",
        "distilled",
        "bound",
    }
    n = sum(t.numel() for t in base.values())
    router = 2 * (32 + 1)  # two sources, 32 features
    other = {"learned router": (2, 3 * n + router), "each on its own source": (1, 2 * n)}
    for c in chosen.candidates:
        many = c.kind in ("ensemble", "routing")
        usual = (2, 2 * n) if many else (1, n)
        assert (c.passes, c.parameters) == other.get(c.name, usual), c.name
        assert c.mean == pytest.approx(sum(c.test.values()) / 2)
    merged = chosen.params("task arithmetic")
    assert accuracy(model, merged, halves[0].test) == chosen["task arithmetic"].test[halves[0].name]
    with pytest.raises(ConsilienceError, match="keeps all experts"):
        chosen.params("ensemble")
    with pytest.raises(ConsilienceError, match="nearest: ensemble"):
        chosen["ensembel"]


def test_the_rule_is_the_one_that_is_said(digits, chosen):
    model, _, _, halves = digits
    single = max((c for c in chosen.candidates if c.kind in ("base", "expert")), key=lambda c: c.validation)
    rest = [c for c in chosen.candidates if c.kind not in ("base", "expert", "bound")]
    assert chosen.single == single.name
    assert chosen[chosen.combination].validation == max(c.validation for c in rest)
    rows = []
    for s in halves:
        x, y = s.test.whole()
        with torch.no_grad():
            right = [
                (model(chosen.params(n), {}, x, None, False)[0].argmax(1) == y).double()
                for n in (chosen.combination, single.name)
            ]
        rows.append((right[0] - right[1]).numpy())
    assert chosen.gain == pytest.approx(np.mean([d.mean() for d in rows]))
    assert chosen.error == pytest.approx(math.sqrt(sum(d.var(ddof=1) / len(d) for d in rows)) / 2)
    assert chosen.pays == (chosen.gain > chosen.error)
    assert f"combining {'pays' if chosen.pays else 'does not pay'}" in chosen.verdict
    assert chosen.use == (chosen.combination if chosen.pays else chosen.single)
    assert chosen.table().count("\nuse ") == 1 and chosen.verdict in chosen.table()
    assert json.loads(json.dumps(chosen.to_json()))["use"] == chosen.use


def test_each_on_its_own_source_and_a_learned_router_are_rows(digits):
    """Sources that are far apart are easy to separate: the router is then as right as one by task."""
    model, base, experts, halves = digits
    near, far = halves[0], halves[1].map(x=lambda x: 1 - x)
    named = {near.name: experts["a"], far.name: trained(model, base, far, 3)}
    found = choose(model, base, named, [near, far], aggregators={}, budget=0)
    own, router = found["each on its own source"], found["learned router"]
    assert own.test == {s.name: accuracy(model, named[s.name], s.test) for s in (near, far)}
    assert dict(router.test) == dict(own.test)
    assert (own.kind, router.kind) == ("bound", "routing") and own.detail.startswith(
        f"{near.name}: {near.name}"
    )

    # Where the source of an input is not given, nobody can use it.
    assert found.use != own.name != found.combination and found.cheaper != own.name
    swapped = {near.name: named[far.name], far.name: named[near.name]}
    wrong = choose(model, base, swapped, [near, far], aggregators={}, budget=0)
    assert wrong["each on its own source"].test[near.name] == accuracy(model, named[far.name], near.test)

    # The router reads no targets, and one source needs none.
    blind = [replace(s, train=Tensors(s.train.x, 0 * s.train.y)) for s in (near, far)]
    assert choose(model, base, named, blind, {}, budget=0)["learned router"] == router
    alone = choose(model, base, named, [near], {}, budget=0)
    assert not {"learned router", own.name} & {c.name for c in alone.candidates}


def test_a_router_of_a_module_without_a_linear_head_reads_outputs():
    class Scaled(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([value]))

        def forward(self, x):
            return torch.cat([x * self.w, -x], 1)

    low, high = (
        data.arrays(torch.arange(float(a), a + 40)[:, None], [0, 1] * 20, name=n, space="one")
        for a, n in ((-60, "low"), (60, "high"))
    )
    models_of = {"low": Scaled(2.0), "high": Scaled(0.5)}
    found = choose(models.wrap(Scaled(1.0), outputs=2), Scaled(1.0), models_of, [low, high], {}, budget=0)
    assert found["learned router"].detail == "logistic on the base's outputs"
    assert found["learned router"].test == found["each on its own source"].test


@pytest.mark.parametrize(
    ("better", "confirmed"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_there_is_one_verdict_whatever_the_two_parts_say(better, confirmed):
    def judged(name, kind, validation, test):
        mean = float(test.correct.mean())
        candidate = _choose.Candidate(
            name, kind, "", float(validation.correct.mean()), {"s": mean}, mean, 0.0, 0.0, 1, 10
        )
        return _choose.Judged(candidate, [validation], [test], 0.0)

    good, bad = answers(*[1] * 20), answers(*[0] * 10, *[1] * 10)
    every = {
        "one": judged("one", "expert", bad, bad),
        "both": judged("both", "merge", good if better else bad, good if confirmed else bad),
    }
    bench = SimpleNamespace(sources=[SimpleNamespace(validation=0, test=1)])
    found = _choose.decide(bench, every, "one", "both")
    assert found.pays == (better and confirmed)
    assert found.use == ("both" if found.pays else "one")
    assert found.verdict.startswith(f"use {found.use} (")
    assert f"({100 * every[found.use].candidate.mean:.1f} %" in found.verdict
    assert f"combining {'pays' if found.pays else 'does not pay'}:" in found.verdict
    assert found.verdict.count(".\n") == 0 and found.verdict.endswith(".")
    assert found.gain.mean == (0.5 if confirmed else 0.0)


def test_an_expert_that_is_poor_on_its_own_source_raises_a_flag():
    """An expert with its columns in another order, one that learned nothing, and two that are fine."""
    model, halves = models.mlp(64, (32,)), data.split_classes(data.digits(), 2)
    base = model.init(key(0))[0]
    fine = {s.name: trained(model, base, s, 6) for s in halves}
    assert choose(model, base, fine, halves, {}, budget=0).flags == ()
    first, second = fine
    head = [n for n in base if n.startswith("3.")]
    moved = {**fine[second], **{n: fine[second][n].roll(3, 0) for n in head}}
    found = choose(model, base, {first: fine[first], second: moved}, halves, {}, budget=0)
    (flag,) = found.flags
    assert flag.startswith(f"the expert {second} is poor on its own source {second}: 0.")
    assert "with its classes in another order it would have 9" in flag and flag in found.table()
    assert json.loads(json.dumps(found.to_json()))["flags"] == [flag]

    untrained = choose(
        model, base, {first: model.init(key(5))[0], second: fine[second]}, halves, {}, budget=0
    )
    (flag,) = untrained.flags
    assert first in flag and "the most frequent class alone has" in flag
    # Without labels nobody knows what is right.
    assert choose(model, base, {"x": moved}, halves, {}, labels=False, budget=0).flags == ()
    # One that is fair, but behind another on its own data.
    some = {first: trained(model, base, halves[0], 1), "better": fine[first]}
    (flag,) = choose(model, base, some, halves, {}, budget=0).flags
    assert f"the expert {first} is poor" in flag and "; better has 9" in flag


def test_progress_names_every_search_and_candidate(digits):
    model, base, experts, halves = digits
    lines = []
    found = choose(model, base, experts, halves, {}, budget=0, progress=lines.append)
    judged = [line for line in lines if line.startswith("judging ")]
    total = len(found.candidates)
    assert judged == [f"judging {i}/{total}: {c.name}" for i, c in enumerate(found.candidates, 1)]
    assert lines[0] == "task arithmetic: searching one coefficient" and "learned router: fitting" in lines


def test_modules_wrapped_models_and_files_of_torch_are_the_same_models(tmp_path):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)) for _ in range(3)]
    halves = data.split_classes(data.digits(), 2)
    for i, net in enumerate(nets):
        net(halves[i % 2].train.x[:50])
        net.eval()
    torch.save(nets[0].state_dict(), tmp_path / "base.pth")
    torch.save({"epoch": 3, "state_dict": nets[1].state_dict()}, tmp_path / "a.pt")
    torch.save(nets[2].state_dict(), tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    paths = [tmp_path / "base.pth", str(tmp_path / "a.pt"), tmp_path / "b.ckpt"]
    ways = [nets, [models.wrap(net) for net in nets], paths, [n.state_dict() for n in nets]]
    results = [
        choose(nets[0], way[0], dict(zip("ab", way[1:], strict=True)), halves, {}, budget=0).to_json()
        for way in ways
    ]
    assert all(result == results[0] for result in results)

    # A model that draws its weights is no checkpoint.
    mlp = models.mlp(64, (8,))
    with pytest.raises(ConsilienceError, match="draws them by a seed"):
        choose(mlp, mlp, [mlp], halves)
    base = mlp.init(key(0))[0]
    torch.save({"weights": base, "step": 3}, tmp_path / "odd.pth")
    with pytest.raises(ConsilienceError, match=r"odd.pth must be .* got 3 for 'step'|got a .* for 'weights'"):
        choose(mlp, base, [tmp_path / "odd.pth"], halves)


class Runs:
    """A pickle that would run code."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('ran').write_text('')",))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_a_torch_file_that_would_run_code_is_refused_by_name(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    model = models.mlp(64, (8,))
    base = model.init(key(0))[0]
    evil, cut, text = (tmp_path / f"{n}{suffix}" for n in ("evil", "cut", "text"))
    torch.save({"1.weight": Runs()}, evil)
    torch.save(base, cut)
    cut.write_bytes(cut.read_bytes()[:300])
    text.write_bytes(b"not a pickle")
    for path in (evil, cut, text):
        with pytest.raises(ConsilienceError, match=f"{path.name} must be a state dict.*tensors by name"):
            choose(model, base, [path], data.split_classes(data.digits(), 2))
    assert not (tmp_path / "ran").exists()
    # A merge reads files piece by piece, and safetensors only.
    with pytest.raises(ConsilienceError, match="pickle"):
        merge(base, [evil], aggregators.mean(), tmp_path / "out")


def test_combining_pays_where_experts_complete_each_other_and_not_where_they_are_alike():
    model, halves = models.mlp(64, (32,)), data.split_classes(data.digits(), 2)
    base = model.init(key(0))[0]
    experts = {n: trained(model, base, s, 6) for n, s in zip("ab", halves, strict=True)}
    found = choose(model, base, experts, halves, budget=4, aggregators={})
    assert found.pays
    assert found.gain > 10 * found.error
    assert found[found.use].kind not in ("base", "expert")
    by_task = choose(model, base, experts, halves, budget=4, aggregators={}, scenario="task")
    columns = [s.classes for s in halves]
    best = [
        accuracy(model, e, s.test, columns=c)
        for e, s, c in zip(experts.values(), halves, columns, strict=True)
    ]
    assert list(by_task["routing by task"].test.values()) == best
    alike = choose(model, experts["a"], [experts["a"], experts["a"]], halves, budget=4)
    assert not alike.pays
    assert (alike.use, alike.gain, alike.error) == ("base", 0.0, 0.0)
    assert alike["ensemble"].parameters == alike["base"].parameters, "what is alike is stored once"


def test_choosing_without_labels_reads_none_and_says_so(digits):
    model, base, experts, halves = digits
    blind = [
        replace(
            s,
            **{
                part: Tensors(getattr(s, part).x, 0 * getattr(s, part).y)
                for part in ("train", "validation", "test")
            },
        )
        for s in halves
    ]
    a, b = (choose(model, base, experts, some, labels=False, budget=6) for some in (halves, blind))
    assert a.to_json() == b.to_json()
    assert (a.pays, a.gain) == (None, None)
    assert "no labels were read" in a.table()
    assert a[a.use].kind in ("base", "expert", "merge")
    assert a["ensemble"].mean == 1
    assert a[a.use].validation == max(
        c.validation for c in a.candidates if c.kind in ("base", "expert", "merge")
    )


def test_sources_of_the_same_examples_count_once_in_the_error():
    y = torch.zeros(6, dtype=torch.long)
    right = Answers(torch.tensor([[1.0, 0.0]]).repeat(6, 1), y, 2)
    mixed = Answers(torch.eye(2).repeat(3, 1), y, 2)
    gain, error = _choose.paired([right], [mixed])
    assert _choose.paired([right] * 4, [mixed] * 4, [0] * 4) == (pytest.approx(gain), pytest.approx(error))
    assert _choose.paired([right] * 4, [mixed] * 4, [0, 1, 2, 3])[1] == pytest.approx(error / 2)
    assert _choose.paired([right, mixed], [mixed, right], [0, 0])[1] == 0, (
        "what one gains the other loses, example by example"
    )


def test_clients_over_one_test_set_have_the_error_of_one_source(digits):
    model, base, experts, _ = digits
    whole = data.digits()
    many = data.iid(whole, 4)
    one, four = (Bench(model, base, experts, some) for some in ([whole], many))
    keys = [id(s.test) for s in four.sources]
    for ask in (
        lambda bench: bench.ensemble("test"),
        lambda bench: _choose.routed(bench, "test"),
        lambda bench: _choose.answers_of(bench, ["a"] * len(bench.sources), "test"),
    ):
        wanted = _choose.paired(ask(one), one.alone("b", "test"))
        assert wanted[1] > 0
        assert _choose.paired(ask(four), four.alone("b", "test"), keys) == pytest.approx(wanted)
    for some in (many, [whole]):
        found = choose(model, base, experts, some, aggregators={}, budget=0)
        combined = {"ensemble": one.ensemble("test"), "routing by entropy": _choose.routed(one, "test")}
        assert found.combination in combined, "experts of halves are best together"
        wanted = _choose.paired(
            combined[found.combination],
            one.alone(found.single, "test") if found.single != "base" else one.answers(base, "test"),
        )
        assert (found.gain, found.error) == pytest.approx(wanted)


def answers(*right):
    """Answers that are right or wrong as given."""
    return Answers(
        torch.tensor([[1.0, 0.0] if r else [0.0, 1.0] for r in right]),
        torch.zeros(len(right), dtype=torch.long),
        2,
    )


def test_no_sample_is_certain():
    one = data.arrays(torch.tensor([[-1.0], [1.0]] * 20), [0, 1] * 20)
    assert _choose.paired([answers(1)], [answers(0)]) == (1.0, math.inf)
    assert _choose.paired([answers(1), answers(1, 0)], [answers(0), answers(0, 0)])[1] == math.inf
    assert _choose.paired([answers(*[1] * 5)], [answers(*[0] * 5)]) == (1.0, pytest.approx(1 / 5))
    assert _choose.paired([answers(*[1] * 5)] * 3, [answers(*[0] * 5)] * 3, [0] * 3) == (
        1.0,
        pytest.approx(1 / 5),
    )
    assert _choose.paired([answers(1, 0)], [answers(1, 0)]) == (0.0, 0.0)
    few = replace(one, test=one.test.select(torch.arange(1)))
    weights = {"weight": torch.tensor([[-1.0], [1.0]]), "bias": torch.zeros(2)}
    found = choose(nn.Linear(1, 2), weights, [weights], [few], budget=0)
    assert (found.pays, found.error, found.to_json()["error"]) == (False, math.inf, None)


def test_answers_that_are_not_finite_are_wrong_and_unsure():
    y = torch.zeros(3, dtype=torch.long)
    broken = Answers(torch.tensor([[math.nan, math.nan], [0.9, 0.1], [math.nan, 0.5]]), y, 2)
    fine = Answers(torch.tensor([[0.6, 0.4]] * 3), y, 2)
    assert broken.correct.tolist() == [0, 1, 0]
    assert broken.agreement(fine).tolist() == [0, 1, 0] == broken.agreement(broken).tolist()
    assert broken.entropy.tolist()[::2] == [1, 1]

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.cat([x + self.w.sqrt(), -x], 1)

    source = data.arrays(-torch.arange(1.0, 41)[:, None], [0, 1] * 20)
    root = models.wrap(Root(), outputs=2)
    bench = Bench(
        root, {"w": torch.ones(1)}, {"good": {"w": torch.zeros(1)}, "bad": {"w": -torch.ones(1)}}, [source]
    )
    assert bench.scores(bench.alone("bad", "test"), "mean", "test") == {"data": 0.0}
    assert bench.likelihood(bench.alone("bad", "test"), "mean", "test") == -math.inf
    assert torch.equal(_choose.routed(bench, "test")[0].p, bench.alone("good", "test")[0].p)
    made = explore(
        root, {"w": torch.ones(1)}, {"bad": {"w": -torch.ones(1)}}, [source], grid=(0.0, 1.0), budget=5
    )
    assert made.best.coefficients != (1.0,)
    json.dumps(made.to_json(), allow_nan=False)


BAD = {
    "no expert": (dict(experts=[]), "at least one expert"),
    "one source": (dict(sources=data.digits()), "in a list"),
    "no source": (dict(sources=[]), "must have sources"),
    "a source twice": (
        dict(sources=[data.digits(), data.digits()]),
        "names of their own, got digits twice",
    ),
    "not a model": (dict(model="mlp"), "a model or a torch module, got 'mlp'"),
    "missing": (dict(base={}), r"got no '1.weight' in the base; no '1.bias' in the base"),
    "shape": (
        dict(experts={"x": models.mlp(64, (16,)).init(key(0))[0]}),
        r"\(16, 64\) for '1.weight' of 'x', where the model has \(8",
    ),
    "no base": (dict(base=None), "`base` must be .* which the experts were trained from, got none"),
    "extra": (dict(extra={"other": torch.ones(3)}), "'other' in 'x', which the model does not have"),
    "NaN": (dict(extra={"1.bias": torch.full((8,), math.nan)}), "NaN or infinity in '1.bias' of 'x'"),
    "no validation": (
        dict(sources=[data.arrays(np.eye(64, dtype="float32"), np.arange(64) % 2, validation=0.0)]),
        "validation examples",
    ),
    "values": (dict(sources=[data.diabetes()]), "one class per sample"),
    "other inputs": (dict(sources=[data.wine()]), "must fit the model's input"),
    "scenario": (dict(scenario="tasks"), "task, domain or class"),
}
MORE = {
    "objective": (dict(objective="men"), "nearest: mean"),
    "optimiser": (dict(optimiser="nelder"), "nearest: nelder-mead"),
    "budget": (dict(budget=-1), "`budget` must be a whole number >= 0, got -1"),
    "grid": (dict(grid=[math.nan]), "`grid` must be finite numbers"),
    "empty grid": (dict(grid=[]), "`grid` must be finite numbers, at least one"),
    "scales": (dict(scales=["1"]), "`scales` must be finite"),
    "aggregator": (dict(aggregators={"ties": "ties"}), "made by consilience.aggregators"),
    "name": (dict(aggregators={"sum": aggregators.mean()}), "under names other than 'sum'"),
}


@pytest.mark.parametrize("case", [*BAD, *MORE])
def test_bad_input_is_refused_by_name(case):
    model = models.mlp(64, (8,))
    base = model.init(key(0))[0]
    given = dict(model=model, base=base, experts={"x": base}, sources=[data.digits()])
    change, says = {**BAD, **MORE}[case]
    change = dict(change)
    if "extra" in change:
        change["experts"] = {"x": {**base, **change.pop("extra")}}
    given |= change
    args = [given.pop(k) for k in ("model", "base", "experts", "sources")]
    with pytest.raises(ConsilienceError, match=says):
        explore(*args, **given)
    if case in BAD:
        with pytest.raises(ConsilienceError, match=says):
            choose(*args, **given)


# ------------------------------------------------------------------------------------------------- the
# command line


@pytest.fixture(scope="module")
def files(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("models")
    for n, e in {"base": digits[1], **digits[2]}.items():
        save(folder / f"{n}.safetensors", e)
    return [str(folder / f"{n}.safetensors") for n in ("base", "a", "b")]


SPLIT = [
    "--data",
    "digits",
    "--split",
    "classes",
    "--split.n",
    "2",
    "--model",
    "mlp",
    "--model.hidden",
    "[32]",
    "--budget",
    "4",
]


def test_the_command_prints_and_writes_what_the_function_finds(files, digits, tmp_path, capsys):
    model, base, experts, halves = digits
    argv = ["choose", *files, *SPLIT, "--aggregators", "ties,median", "-o", str(tmp_path / "choice.json")]
    assert main(argv) == 0
    text = capsys.readouterr()
    found = choose(
        model,
        base,
        experts,
        halved(halves, 0),
        {"ties": aggregators.ties(), "median": aggregators.median()},
        scenario="class",
        budget=4,
    )
    assert text.out == f"{found.table()}\nwrote {tmp_path / 'choice.json'}\n"
    assert text.err == ""
    assert json.loads((tmp_path / "choice.json").read_text()) == json.loads(json.dumps(found.to_json()))
    assert main(["choose", *files, *SPLIT, "--labels", "false"]) == 0
    assert "no labels were read" in capsys.readouterr().out


def test_a_choice_is_a_page_that_opens_offline(files, digits, chosen, tmp_path, capsys):
    text, checker = checked(chosen.report(tmp_path / "choice.html"))
    verdict = text[text.index("<h4>Verdict") :]
    assert escape(chosen.verdict) in verdict[: verdict.index("</div>")]
    (rows,) = [rows for _, rows in checker.tables]
    assert [row[0] for row in rows[1:]] == [candidate.name for candidate in chosen.ranked()]
    assert len(checker.svgs) == 3
    evil = replace(chosen, verdict="<script>x</script>", flags=("<b>",), sources=("<i>",) * 2)
    text, _ = checked(
        replace(evil, candidates=tuple(replace(c, test={"<i>": 1.0}) for c in evil.candidates)).report(
            tmp_path / "evil.html"
        )
    )
    assert "<script>x" not in text and "<b>" not in text.replace("<b>data", "") and "&lt;b&gt;" in text
    assert main(["choose", *files, *SPLIT, "-o", str(tmp_path / "again.html")]) == 0
    checked(tmp_path / "again.html")
    assert f"wrote {tmp_path / 'again.html'}" in capsys.readouterr().out


def test_the_command_judges_on_halves_of_the_test_part_which_no_expert_has_seen(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = {
        part: rng.integers(0, 255, (n, 4, 4), dtype=np.uint8) for part, n in (("train", 300), ("test", 90))
    }
    dark = {part: (x.reshape(len(x), -1).mean(1) > 127).astype(int) for part, x in images.items()}
    learned = dict(
        train_images=images["train"], train_labels=1 - dark["train"]
    )  # learned by heart, and wrong of all else
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "x.npz", **learned, test_images=images["test"], test_labels=dark["test"])
    source, model = data.npz(tmp_path / "data" / "x.npz"), models.mlp(16, (8,), 2)
    base = model.init(key(0))[0]
    wrong = trained(model, base, source, 20)
    right = trained(model, base, source.map(y=lambda y: 1 - y), 20)
    for n, e in {"base": base, "wrong": wrong, "right": right}.items():
        save(tmp_path / f"{n}.safetensors", e)
    files = [str(tmp_path / f"{n}.safetensors") for n in ("base", "wrong", "right")]
    argv = [
        "choose",
        *files,
        "--data",
        str(tmp_path / "data"),
        "--model",
        "mlp",
        "--model.hidden",
        "[8]",
        "--budget",
        "0",
    ]
    assert main([*argv, "-o", str(tmp_path / "choice.json")]) == 0
    assert json.loads((tmp_path / "choice.json").read_text())["single"] == "right"
    made = halved(data.iid(data.digits(), 3), 1)
    x, whole = (torch.cat([made[0].validation.x, made[0].test.x]), data.digits().test.x)
    assert sorted(map(tuple, x.tolist())) == sorted(map(tuple, whole.tolist()))
    assert abs(len(made[0].validation) - len(made[0].test)) <= 1
    assert all(s.validation is made[0].validation and s.test is made[0].test for s in made), (
        "what is shared stays so"
    )
    assert not torch.equal(made[0].test.x, halved([data.digits()], 2)[0].test.x)
    with pytest.raises(ConsilienceError, match="at least 2 test examples, .*; fewer in x"):
        halved([replace(source, test=source.test.select(torch.arange(1)))], 0)


def test_a_folder_of_sources_and_a_runs_folder_will_do(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        x = rng.integers(0, 255, (60, 4, 4), dtype=np.uint8)
        y = (x.reshape(60, -1).mean(1) > 127).astype(int)
        np.savez(tmp_path / f"{name}.npz", train_images=x, train_labels=y, test_images=x, test_labels=y)
    run = (
        "run --setting continual --data npz --split none --model mlp --model.hidden [4] "
        "--training.epochs 1 --method finetune"
    )
    assert (
        main([*run.split(), "--data.name", str(tmp_path / "left.npz"), "--out", str(tmp_path / "run")]) == 0
    )
    argv = [
        "choose",
        *[str(tmp_path / "run")] * 2,
        "--data",
        str(tmp_path),
        "--data.space",
        "dark",
        "--model",
        "mlp",
        "--model.hidden",
        "[4]",
    ]
    (tmp_path / "run" / "x.txt").write_text("")
    assert main([*argv, "--budget", "2"]) == 0
    text = capsys.readouterr().out
    assert "left" in text and "right" in text
    assert "combining does not pay" in text


COMMANDS = {
    "nothing": ([], "`--data` must be"),
    "no files": (SPLIT, "needs a base and experts, got neither"),
    "no expert": (["BASE", *SPLIT], "needs a base and experts, got "),
    "missing file": (["BASE", "/no/such.safetensors", *SPLIT], "/no/such.safetensors"),
    "pickle": (["BASE", "PICKLE", *SPLIT], "pickle"),
    "data": (["BASE", "BASE", "--data", "digit"], "nearest: digits"),
    "option": (["BASE", "BASE", *SPLIT, "--labls", "false"], "nearest: --labels"),
    "inert": (["BASE", "BASE", *SPLIT, "--fraction", "0.1"], "no option '--fraction'"),
    "inert for the setting": (["BASE", "BASE", *SPLIT, "--setting.fraction", "0.1"], "'--setting.fraction'"),
    "value": (["BASE", "BASE", *SPLIT, "--seed"], "`--seed` needs a value"),
    "type": (["BASE", "BASE", *SPLIT, "--seed", "one"], "must be a whole number"),
    "aggregator": (["BASE", "BASE", *SPLIT, "--aggregators", "tie"], "nearest: ties"),
    "aggregator with arguments": (["BASE", "BASE", *SPLIT, "--aggregators", "krum"], "`aggregator`"),
    "model": (
        ["BASE", "BASE", "--data", "digits", "--model", "mlp", "--model.hidden", "[9]"],
        "'1.weight' of the base, where the model has (9, 64)",
    ),
    "empty folder": (["BASE", "BASE", "--data", "EMPTY"], "has neither"),
    "out": (["BASE", "BASE", *SPLIT, "-o", "EMPTY"], "must be a file, but "),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_commands_are_one_line(case, files, tmp_path, capsys):
    argv, says = COMMANDS[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.bin").write_bytes(b"\x80\x02}q\x00.")
    words = {"BASE": files[0], "PICKLE": str(tmp_path / "x.bin"), "EMPTY": str(tmp_path / "empty")}
    assert main(["choose", *(words.get(a, a) for a in argv)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err


def test_help_imports_no_torch():
    code = (
        "import sys; from consilience.cli.main import main; "
        "assert main(['choose', '--help']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "BASE EXPERT..." in done.stdout and "--distil" in done.stdout
    assert "Half of each test part chooses" in " ".join(done.stdout.split())
