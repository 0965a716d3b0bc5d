"""`cs.diagnose`: conflicts and affinities against closed forms and loops, groups and fronts against brute
force, transfer of planted tasks, the page, interruption, and refusals."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import consilience as cs
from consilience import diagnosis
from consilience.cli.main import main
from consilience.core.errors import Interrupted
from consilience.diagnosis import _bench, _groups
from consilience.diagnosis._found import Conflicts
from consilience.diagnosis._front import hypervolume, non_dominated, share_of_box
from consilience.diagnosis._groups import association, associations, best_groups, groups_by_level
from consilience.diagnosis._probe import Probe, Probing

FULL = cs.Training(epochs=4, lr=0.05, batch_size=64, precision="fp64")
"""One step per epoch for the sources below."""


def regression(name: str, w: torch.Tensor, seed: int = 0, count: int = 40, noise: float = 0.0) -> cs.Source:
    """y = x . w + noise; sources of one seed have the same inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, len(w), generator=generator, dtype=torch.float64)
    y = x @ w.double() + noise * torch.randn(count, generator=generator, dtype=torch.float64)
    return cs.data.arrays(x, y[:, None], test=(x, y[:, None]), kind="value", name=name, validation=0)


def line(weight: list[float]) -> nn.Module:
    module = nn.Linear(len(weight), 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([weight]))
    return module


def readings(
    sources: list[cs.Source], model: Any, probe: Probe, training: cs.Training = FULL, **more: Any
) -> Any:
    schedule = cs.settings.multitask(sources, **more)
    result = cs.run(schedule, cs.methods.finetune(), model, training, engine=Probing(probe))
    return probe.readings[0], result


# Gradients and affinities.


def test_opposed_regressions_conflict_at_every_step():
    """At w = 0 the gradients of y and -y are opposite, and a step for one harms the other."""
    w = torch.tensor([1.0, -2.0, 0.5])
    sources = [regression("up", w), regression("down", -w)]
    found, _ = readings(sources, line([0.0, 0, 0]), Probe(4, 40), scenario="domain")
    x, y = sources[0].train.whole()
    moved = 2 * FULL.lr / len(x) * x.T @ y
    harm = 1 - float((x @ moved + y).square().mean() / y.square().mean())
    help_ = 1 - float((x @ moved - y).square().mean() / y.square().mean())
    assert len(found) == 4 and harm < 0 < help_
    for reading in found:
        np.testing.assert_allclose(reading.cosines[-1], [[1, -1], [-1, 1]], atol=1e-12)
        np.testing.assert_allclose(reading.affinities, [[help_, harm], [harm, help_]], rtol=1e-9)
    conflicts = Conflicts(("up", "down"), (1, 2, 3, 4), ("x", "all"), np.array([[r.cosines for r in found]]))
    assert (conflicts.ratio() == 1).all() and np.allclose(conflicts.cosine(), -1)
    assert [alert.tasks for alert in conflicts.alerts()] == [("up", "down")] * 2


def test_affinities_are_those_of_a_loop():
    """Three regressions from a start of their own; the loop restates the paper."""
    targets = [torch.tensor(w) for w in ([1.0, 0, 0], [0.8, 0.3, 0], [-1, 0, 2.0])]
    sources = [regression(name, w) for name, w in zip("abc", targets, strict=True)]
    found, result = readings(sources, line([0.1, -0.2, 0.3]), Probe(4, 40), scenario="domain")

    theta = torch.tensor([0.1, -0.2, 0.3]).double()
    data = [(x, y[:, 0]) for x, y in (source.train.whole() for source in sources)]

    def loss(i: int, at: torch.Tensor) -> torch.Tensor:
        x, y = data[i]
        return (x @ at - y).square().mean()

    def gradient(i: int, at: torch.Tensor) -> torch.Tensor:
        x, y = data[i]
        return 2 / len(x) * x.T @ (x @ at - y)

    for step, reading in enumerate(found, 1):
        theta = theta - FULL.lr * torch.stack([gradient(i, theta) for i in range(3)]).mean(0)
        assert reading.step == step
        grads = [gradient(i, theta) for i in range(3)]
        for i, j in itertools.product(range(3), repeat=2):
            ahead = 1 - loss(j, theta - FULL.lr * grads[i]) / loss(j, theta)
            cosine = torch.cosine_similarity(grads[i], grads[j], dim=0)
            assert reading.affinities[i][j] == pytest.approx(float(ahead), rel=1e-8)
            assert reading.cosines[-1][i][j] == pytest.approx(float(cosine), rel=1e-8)
    torch.testing.assert_close(next(iter(result.params.values()))[0], theta)


def test_cosines_by_layer_are_those_of_autograd():
    """Two digit tasks with heads of their own: the trunk's layers count, the heads do not."""
    tasks = cs.data.split_classes(cs.data.digits(), 5)[:2]
    model = cs.models.multi_head(cs.models.mlp(64, (8, 6)), outputs=10)
    training = cs.Training(epochs=1, lr=0.1, batch_size=500, precision="fp64")
    probe = Probe(1, 500)
    (reading,), result = readings(tasks, model, probe, training, scenario="task")
    assert probe.layers == ("trunk.1", "trunk.3", "all")

    params = {
        name: tensor.clone().requires_grad_()
        for name, tensor in result.params.items()
        if "columns" not in name
    }
    grads = []
    for source in tasks:
        x, y = source.train.whole()
        hidden = x.flatten(1).double()
        for layer in ("trunk.1", "trunk.3"):
            hidden = torch.relu(hidden @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
        # Digits 2 and 3 are outputs 0 and 1 of the second head.
        (head,) = [name[:-7] for name in params if name.endswith(f"{source.name[-3:]}.weight")]
        out = hidden @ params[f"{head}.weight"].T + params[f"{head}.bias"]
        loss = nn.functional.cross_entropy(out, y - y.min())
        names = [f"{layer}.{part}" for layer in ("trunk.1", "trunk.3") for part in ("weight", "bias")]
        grads.append([g.flatten() for g in torch.autograd.grad(loss, [params[name] for name in names])])
    for number, span in enumerate((slice(0, 2), slice(2, 4), slice(0, 4))):
        one, other = (torch.cat(own[span]) for own in grads)
        expected = float(torch.cosine_similarity(one, other, dim=0))
        assert reading.cosines[number][0][1] == pytest.approx(expected, rel=1e-6)


def test_rows_of_a_common_head_that_one_task_reads_are_not_compared():
    tasks = cs.data.split_classes(cs.data.digits(), 5)[:2]
    for scenario, layers in (("task", ("1", "all")), ("class", ("1", "3", "all"))):
        probe = Probe(1)
        readings(tasks, cs.models.mlp(64, (8,), 10), probe, cs.Training(epochs=1), scenario=scenario)
        assert probe.layers == layers


def test_gradients_are_those_of_eval_mode():
    w = torch.tensor([1.0, -2.0, 0.5])
    sources = [regression("a", w), regression("b", w.roll(1), seed=1)]
    training = cs.Training(epochs=1, lr=0.05, batch_size=64, precision="fp64")
    module = nn.Sequential(nn.Dropout(0.5), line([0.1, 0.2, 0.3]))
    (reading,), result = readings(sources, module, Probe(1, 40), training, scenario="domain")
    theta = result.params["1.weight"][0]
    errors = [(x, x @ theta - y[:, 0]) for x, y in (source.train.whole() for source in sources)]
    cosine = torch.cosine_similarity(*[x.T @ error for x, error in errors], dim=0)
    assert reading.losses == pytest.approx([float(error.square().mean()) for _, error in errors])
    assert reading.cosines[-1][0][1] == pytest.approx(float(cosine))


def test_a_probe_changes_no_bit():
    tasks = cs.data.split_classes(cs.data.digits(), 5)[:2]
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10)
    )
    training = cs.Training(epochs=2, optimiser="adam", lr=0.01)
    looked = readings(tasks, module, Probe(5), training, scenario="task")[1]
    plain = cs.run(cs.settings.multitask(tasks, "task"), cs.methods.finetune(), module, training)
    assert all(torch.equal(tensor, plain.params[name]) for name, tensor in looked.params.items())


# Groups.


def partitions(items: list[int]) -> Any:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_the_best_of_all_partitions(seed):
    affinity = np.random.default_rng(seed).normal(size=(6, 6))

    def gained(groups: Any) -> float:
        """The mean affinity of the others of its group to each task, summed over tasks."""
        others = [[(i, j) for i in group if i != j] for group in groups for j in group]
        return float(sum(np.mean([affinity[pair] for pair in pairs]) for pairs in others if pairs))

    found = best_groups(range(6), affinity.tolist())  # type: ignore[arg-type]
    assert gained(found) == pytest.approx(max(map(gained, partitions(list(range(6))))))
    assert sorted(task for group in found for task in group) == list(range(6))


@pytest.mark.parametrize("count", [6, _groups.EXACT + 3])
def test_planted_groups_are_found(count):
    names = [f"t{i}" for i in range(count)]
    affinity = [[1.0 if i % 3 == j % 3 else -0.5 for j in range(count)] for i in range(count)]
    assert set(best_groups(names, affinity)) == {tuple(names[k::3]) for k in range(3)}


def test_groups_by_level_begin_where_it_doubles():
    assert groups_by_level({"a": 0.1, "b": 0.19, "c": 0.5, "d": 0.9}) == (("a", "b"), ("c", "d"))


def test_associations_are_correlations_and_cramers_v():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    b = a + torch.randn(400, 1, generator=generator, dtype=torch.float64)
    r = float(torch.corrcoef(torch.stack([a[:, 0], b[:, 0]]))[0, 1])
    assert association(a, b) ** 2 == pytest.approx(r**2 - 1 / 399)

    one = torch.randint(3, (400,), generator=generator)
    other = torch.where(
        torch.rand(400, generator=generator) < 0.5, one, torch.randint(3, (400,), generator=generator)
    )
    table = torch.zeros(3, 3, dtype=torch.float64)
    table.index_put_((one, other), torch.ones(400, dtype=torch.float64), accumulate=True)
    expected = torch.outer(table.sum(1), table.sum(0)) / 400
    v2 = float(((table - expected).square() / expected).sum()) / (400 * 2)
    hot = [nn.functional.one_hot(labels).double() for labels in (one, other)]
    assert association(*hot) ** 2 == pytest.approx(v2 - 2 / 399)


def test_targets_are_compared_on_equal_inputs_only():
    w = torch.tensor([1.0, 0, 0])
    related = associations([regression("a", w), regression("b", -w), regression("c", w.roll(1))])
    assert related[0][1] > 0.95 and related[0][2] < 0.4  # type: ignore[operator]
    other_inputs = associations([regression("a", w), regression("b", w, seed=1)])
    assert isinstance(other_inputs, str) and "different inputs" in other_inputs


# Fronts.


@pytest.mark.parametrize(("seed", "count"), [(0, 2), (1, 3), (2, 4)])
def test_front_and_hypervolume_against_brute_force(seed, count):
    points = np.random.default_rng(seed).integers(1, 6, size=(9, count))
    free = [not any((other >= point).all() and (other > point).any() for other in points) for point in points]
    assert non_dominated(points.tolist()) == free

    # Whole numbers: the volume is the number of unit cells below some point.
    cells = itertools.product(range(5), repeat=count)
    inside = sum(
        any(all(c < p for c, p in zip(cell, point, strict=True)) for point in points) for cell in cells
    )
    assert hypervolume(points.tolist(), [0] * count) == inside
    kept = points[free].tolist()
    assert hypervolume(kept, [0] * count) == inside, "dominated points add nothing"


def test_share_of_box_counts_the_ends():
    assert share_of_box([(0, 1), (1, 0)]) == pytest.approx((2 * 0.11 - 0.01) / 1.21)
    assert share_of_box([(1, 1), (1, 1)]) == 1


# The diagnosis as a whole.

PLANTED = cs.Training(epochs=30, lr=0.05, batch_size=12)


def planted() -> list[cs.Source]:
    """Two noisy tasks with one answer and few examples, and one with the opposite answer."""
    w = torch.ones(8) / 2
    found = []
    for number, (name, sign) in enumerate((("one", 1), ("twin", 1), ("foe <b>", -1))):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(312, 8, generator=generator)
        y = (sign * x @ w + 1.5 * torch.randn(312, generator=generator))[:, None]
        test = (x[12:], sign * x[12:] @ w[:, None])
        found.append(cs.data.arrays(x[:12], y[:12], test=test, kind="value", name=name, validation=0))
    return found


@pytest.fixture(scope="module")
def planted_diagnosis() -> diagnosis.Diagnosis:
    return cs.diagnose(
        planted(),
        cs.models.linear(8, 1),
        PLANTED,
        scenario="domain",
        on="test",
        depths={"own width": cs.models.mlp(8, (4,), 1)},
        wider={"twice": cs.models.mlp(8, (8,), 1)},
        soft={"by weights": cs.methods.task_weights({"one": 2.0})},
        domains={"one": "friends", "twin": "friends", "foe <b>": "foes"},
        probes=4,
    )


def test_transfer_of_planted_tasks_has_their_sign(planted_diagnosis):
    found = planted_diagnosis
    kinds = {row.task: row.kind for row in found.transfer}
    assert kinds["foe <b>"] == "negative"
    _, twin, foe = found.incremental
    assert twin.gain.behind - twin.gain.half > 0 > foe.gain.behind + foe.gain.half
    assert set(foe.gains) == {"one", "twin"}
    groups = {grouping.by: grouping for grouping in found.groupings}
    expected = (("one", "twin"), ("foe <b>",))
    assert groups["affinity"].groups == groups["gradients"].groups == groups["domain"].groups == expected
    assert groups["affinity"].outcome.better
    assert {alert.tasks for alert in found.conflicts.alerts()} == {
        ("one", "foe <b>"),
        ("twin", "foe <b>"),
    }
    steps = found.steps
    assert "foe <b> harms" in " ".join(steps[1].found) and "Train foe <b> apart" in steps[1].do


def test_scores_are_those_of_runs(planted_diagnosis):
    """Together is `run`, alone is `run` on a schedule of one, and gains are paired by seed."""
    sources = planted()
    schedule = cs.settings.multitask(sources, "domain")
    joint = cs.run(schedule, cs.methods.finetune(), cs.models.linear(8, 1), PLANTED, repeats=3)
    single = cs.run(
        cs.settings.multitask(sources[:1], "domain"),
        cs.methods.finetune(),
        cs.models.linear(8, 1),
        PLANTED,
        repeats=3,
    )
    row = planted_diagnosis.transfer[0]
    together, alone = joint.matrices[:, -1, 0], single.matrices[:, -1, 0]
    assert (row.together, row.alone) == pytest.approx((together.mean(), alone.mean()))
    d = together - alone
    assert row.gain.behind == pytest.approx(d.mean())
    assert row.gain.half == pytest.approx(4.302653 * d.std(ddof=1) / 3**0.5, rel=1e-5)


def test_front_has_equal_weights_and_each_task(planted_diagnosis):
    front = planted_diagnosis.front
    names = [mixture.name for mixture in front.mixtures]
    assert names[:2] == ["equal weights", "by amount of data"] and "4 x foe <b>" in names
    assert list(front.free) == non_dominated([mixture.scores for mixture in front.mixtures])
    assert np.isclose(front.mixtures[0].together.behind, 0)
    assert 0 < front.hypervolume <= 1


def test_the_page_has_the_seven_steps_and_escapes_names(planted_diagnosis, tmp_path):
    text = planted_diagnosis.report(tmp_path / "report.html").read_text()
    titles = (
        "Establish baselines",
        "Add tasks incrementally",
        "Check gradient conflicts",
        "Vary sharing depth",
        "Scale up capacity",
        "Use soft sharing",
        "Apply loss balancing",
    )
    places = [text.index(f"<h2>{number}. {title}</h2>") for number, title in enumerate(titles, 1)]
    assert places == sorted(places) and [step.title for step in planted_diagnosis.steps] == list(titles)
    assert text.count("What to do") >= 8
    assert "foe <b>" not in text and "foe &lt;b&gt;" in text
    assert "http://" not in text and "https://" not in text
    assert all(step.done for step in planted_diagnosis.steps)


def test_a_diagnosis_shows_itself(planted_diagnosis):
    text = repr(planted_diagnosis)
    assert text.splitlines()[0].startswith("Diagnosis of 3 tasks (one, twin, foe <b>)")
    assert "groups by affinity: one + twin | foe <b>" in text and len(text.splitlines()) < 15
    assert "foe <b>" not in planted_diagnosis._repr_html_()
    content = json.loads(json.dumps(planted_diagnosis.to_json(), allow_nan=False))
    assert content["conflicts"]["matrix"][0][2] < 0 and len(content["steps"]) == 7


def test_transfer_is_a_table_of_pandas(planted_diagnosis):
    pytest.importorskip("pandas")
    table = planted_diagnosis.to_pandas()
    assert list(table.task) == ["one", "twin", "foe <b>"] and table.transfer[2] == "negative"


def test_tasks_of_several_kinds_and_sizes():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    sources = [
        cs.data.arrays(x, (x[:, 0] > 0).long(), name="side", validation=0.2),
        cs.data.arrays(x[:30], x[:30, :1], kind="value", name="size", validation=0.2),
    ]
    model = cs.models.multi_head(cs.models.mlp(4, (8,)), outputs=3)
    parts = ["groups", "incremental", "capacity", "front"]
    found = cs.diagnose(sources, model, cs.Training(epochs=1), repeats=2, probes=1, parts=parts)
    assert found.metrics == ("accuracy", "r2")
    assert {grouping.by for grouping in found.groupings} == {"affinity", "gradients", "difficulty"}
    assert set(found.skipped) == {"capacity", "groups by targets", "groups by domain"}
    assert len(found.front.mixtures) == 6 and np.isfinite(found.front.mixtures[1].scores).all()
    row, added = found.transfer[0], found.incremental[1]
    assert added.gains["side"].behind == pytest.approx(row.together - row.alone)


def test_the_example_runs(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["diagnosis.py"])
    found = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "diagnosis.py"))["found"]
    assert {grouping.by for grouping in found.groupings} == {"affinity", "gradients", "targets", "difficulty"}
    (related,) = [grouping.groups for grouping in found.groupings if grouping.by == "targets"]
    assert related == (("digits/even", "digits/large"), ("digits/noise",))
    assert "7. Apply loss balancing" in capsys.readouterr().out


# Budget, folder and interruption.

QUICK = cs.Training(epochs=1)


def two() -> list[cs.Source]:
    return cs.data.split_classes(cs.data.digits(), 5)[:2]


def test_parts_that_go_beyond_the_budget_are_skipped_by_name(capsys):
    lines: list[Any] = []
    found = cs.diagnose(
        two(),
        training=QUICK,
        parts=["transfer", "balance", "capacity"],
        budget=4,
        repeats=1,
        progress=lines.append,
    )
    assert set(found.runs) == {
        "together",
        "alone: digits/0-1",
        "alone: digits/2-3",
        "capacity: mlp(64, (256,), 10)",
    }
    assert found.skipped == {"balance": "its 3 runs go beyond the budget of 4"} and not found.balance
    plan, *rest = lines
    assert plan["event"] == "plan" and plan["runs"] == 4 and "transfer 3, capacity 1" in plan["text"]
    assert [line["stage"] for line in rest] == [1, 2, 3, 4]
    dry = cs.diagnose(two(), training=QUICK, dry_run=True)
    assert not dry.runs and "at most 13 runs with 3 seeds each" in capsys.readouterr().out


def test_sharing_depths_and_soft_sharing_are_made_of_the_trunk():
    model = cs.models.mlp(64, (8, 6), 10)
    found = cs.diagnose(two(), model, QUICK, parts=["depth", "soft"], repeats=1)
    assert [each.name for each in found.depth] == [f"{k} of 2 layers shared" for k in range(3)]
    assert [each.name for each in found.soft] == ["cross-stitch"]
    w = torch.tensor([1.0, 0, 0])
    sources = [regression("a", w), regression("b", -w)]
    refused = cs.diagnose(
        sources, cs.models.mlp(3, (4,), 1), QUICK, parts=["depth"], repeats=1, on="test", scenario="domain"
    )
    assert not refused.depth and refused.skipped["depth"] == "all of its runs are refused"


def test_one_seed_shows_no_intervals():
    found = cs.diagnose(two(), training=QUICK, parts=["transfer"], repeats=1)
    assert {row.kind for row in found.transfer} == {"one seed"} and "three seeds" in found.steps[0].do


def test_an_interrupted_diagnosis_goes_on(tmp_path, monkeypatch):
    arguments: dict[str, Any] = {
        "training": QUICK,
        "parts": ["transfer", "affinities"],
        "repeats": 2,
        "probes": 2,
    }
    whole = cs.diagnose(two(), **arguments)
    trained, run = [], _bench.run

    def stopped(*args: Any, **more: Any) -> Any:
        trained.append(1)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return run(*args, **more)

    monkeypatch.setattr(_bench, "run", stopped)
    out = tmp_path / "found"
    with pytest.raises(Interrupted, match="resume=True"):
        cs.diagnose(two(), **arguments, out=out)
    again = cs.diagnose(two(), **arguments, out=out, resume=True)
    assert len(trained) == 4, "two runs were read"
    assert [row[1:5] for row in map(astuple, again.transfer)] == [
        row[1:5] for row in map(astuple, whole.transfer)
    ]
    np.testing.assert_array_equal(again.affinities.values, whole.affinities.values)
    assert (out / "report.html").exists() and json.loads((out / "diagnosis.json").read_text())["repeats"] == 2

    with pytest.raises(cs.ConsilienceError, match="has a diagnosis"):
        cs.diagnose(two(), **arguments, out=out)
    with pytest.raises(cs.ConsilienceError, match="'together' in .* has others"):
        cs.diagnose(two(), **{**arguments, "training": cs.Training(epochs=2)}, out=out, resume=True)
    text = (out / "runs.json").read_text()
    (out / "runs.json").write_text(text.replace('"seconds": ', '"seconds": 1'))
    with pytest.raises(cs.ConsilienceError, match="damaged or edited"):
        cs.diagnose(two(), **arguments, out=out, resume=True)


def astuple(row: Any) -> tuple[Any, ...]:
    return tuple(vars(row).values())


def test_methods_that_refuse_are_skipped_by_name():
    found = cs.diagnose(
        two(), training=QUICK, parts=["balance"], methods=[cs.methods.ewc(), cs.methods.dwa()], repeats=1
    )
    assert [outcome.name for outcome in found.balance] == ["dwa"]
    assert "balance: ewc" in found.skipped


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "one task": ({"sources": 1}, "at least two tasks, got 1"),
    "a source": ({"sources": 0}, "must be a sequence of tasks"),
    "same names": ({"sources": "twice"}, "names of their own"),
    "part": ({"parts": ["transfers"]}, "nearest: transfer"),
    "no part": ({"parts": []}, "`parts` must be a list"),
    "domain": ({"domains": {"digits/0-2": "x"}}, "nearest: digits/0-1"),
    "domains": ({"domains": {"digits/0-1": "x"}}, "got none for 'digits/2-3'"),
    "budget": ({"budget": 2}, "`budget` must cover training together and each task alone, 3 runs, got 2"),
    "on": ({"on": "train"}, "`on` must be 'validation' or 'test'"),
    "probes": ({"probes": 0}, "`probes` must be a whole number >= 1"),
    "argument": ({"method": None}, "nearest: methods"),
    "scenario": ({"scenario": "tasks"}, "`scenario` must be"),
    "metric": ({"metric": lambda p, y: 0.0}, "transfer needs a metric with a direction"),
    "mixture of no task": ({"mixtures": {"x": cs.methods.task_weights({"no": 2.0})}}, "no"),
    "resume": ({"resume": True}, "needs the folder of a diagnosis"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    given, says = REFUSALS[case]
    tasks = two()
    kinds: dict[Any, Any] = {1: tasks[:1], 0: tasks[0], "twice": [tasks[0]] * 2}
    sources = kinds.get(given.get("sources"), tasks)
    more = {name: value for name, value in given.items() if name != "sources"}
    with pytest.raises(cs.ConsilienceError, match=says):
        cs.diagnose(sources, training=QUICK, repeats=1, **more)


def test_tasks_without_validation_data_are_refused():
    w = torch.tensor([1.0, 0, 0])
    with pytest.raises(cs.ConsilienceError, match="'a' has none; give `validation=0.1`"):
        cs.diagnose([regression("a", w), regression("b", w)])


# The command line.


def test_the_command_runs_and_resumes(tmp_path, capsys):
    out = tmp_path / "found"
    argv = [
        "diagnose",
        "--training.epochs",
        "1",
        "--repeats",
        "1",
        "--parts",
        "transfer,conflicts",
    ]
    assert main([*argv, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert (
        "diagnose: at most 6 runs with 1 seed each (transfer 6)" in text and "1. Establish baselines" in text
    )
    assert (out / "report.html").exists() and (out / "config.yaml").exists()
    assert main(["diagnose", "--resume", "--out", str(out)]) == 0
    assert "digits/8-9" in capsys.readouterr().out
    assert main([*argv, "--out", str(out)]) == 2
    assert "must be a new folder" in capsys.readouterr().err
    assert main(["diagnose", "--setting", "continual"]) == 2
    assert "of the setting multitask, got 'continual'" in capsys.readouterr().err
    assert main(["diagnose", "--budget", "12", "--dry_run", "--split.n", "2"]) == 0
    assert "at most" in capsys.readouterr().out
    assert main(["diagnose", "--setting.rounds", "2"]) == 2
    assert "no option '--setting.rounds'" in capsys.readouterr().err
