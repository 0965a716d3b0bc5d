"""Agents that share modules over any graph, come late and fail; banks in files; what sharing costs."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import consilience as cs
from consilience.core.contexts import Routing
from consilience.core.message import Message, Module, join
from consilience.core.params import load, pack
from consilience.core.schedule import Evaluate, Exchange, Schedule, Train
from consilience.core.source import Tensors
from consilience.core.state import Frozen
from consilience.loop.agent import Agent
from consilience.loop.checks import RunOptions
from consilience.loop.ledger import Ledger
from consilience.loop.run import begin, drive
from consilience.loop.trial import Trial
from consilience.skill import Speedup

TRAINING = cs.Training(epochs=1, batch_size=32, lr=0.1)
METHOD = cs.methods.skill("nearest_mean")
PATH = [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.fixture(scope="module")
def parts() -> list[cs.Source]:
    return cs.data.split_classes(cs.data.digits().map(), 5)


@pytest.fixture(scope="module")
def model() -> Any:
    return cs.models.multi_head(cs.models.random_features(64, 48), 10)


def walked(schedule: Schedule, model: Any, method: cs.Method = METHOD) -> Trial:
    """A run with all its agents, which `run` lets go of."""
    session = begin(schedule, method, model, TRAINING, cs.engines.serial(), RunOptions())
    session.trials[0].free_agents = lambda: None  # type: ignore[method-assign]
    drive([session], session.engine)
    return session.trials[0]


def hashes(trial: Trial) -> dict[str, str]:
    return {name: cs.skill.bank_hash(agent) for name, agent in sorted(trial.agents.items())}


# what is learned stays


@pytest.mark.parametrize("kind", ["heads", "biases"])
def test_a_tasks_answers_stay_the_same_bits_as_tasks_are_added(parts, kind):
    """With labels given, or a mapper that is never wrong: every agent, after every stage."""
    trunk = cs.models.random_features(64, 48)
    body = cs.models.mlp(64, (24, 16), 10)
    made = (
        cs.models.multi_head(trunk, 10)
        if kind == "heads"
        else cs.models.beneficial_biases(cs.models.frozen(body), 10)
    )
    x, answers = parts[0].test.whole()[0], []
    trial = walked(cs.settings.skill([parts[:1]], "task"), made)
    first = trial.agents["agent-0"].predict(x, parts[0].name)
    for k in range(2, 6):
        agent = walked(cs.settings.skill([parts[:k]], "task"), made).agents["agent-0"]
        columns = agent.frame.columns(trial.agents["agent-0"].frame.labels)
        answers.append(agent.predict(x, parts[0].name)[:, columns])
    assert all(torch.equal(a, first) for a in answers) and float(first.max()) > 0.5
    result = cs.run(cs.settings.skill([parts], "task"), cs.methods.skill("oracle"), made, TRAINING)
    for j in range(5):
        assert len({*result.matrix[j + 1 :, j].tolist()}) == 1, (
            "accuracy on a task is one number from its stage on"
        )


def test_a_task_of_one_class_and_tasks_that_share_none(parts, model):
    """A head of one class answers it always; the mapper tells it from the others."""
    one = cs.data.split_classes(cs.data.digits().map(), 10)[:3]
    for mapper in ("gaussian_mixture", "mahalanobis", "nearest_mean"):
        r = cs.run(cs.settings.skill([[s] for s in one], "end"), cs.methods.skill(mapper), model, TRAINING)
        assert r.score == pytest.approx(r.mapper_accuracy) and r.score > 0.85
        assert {m.classes for m in r.agent.state.experts.values()} == {(0,), (1,), (2,)}


# graphs


def reach(schedule: Schedule, seed: int = 0) -> dict[str, set[str]]:
    """What each agent knows in the end, restated: sets that are passed on, all at once."""
    known: dict[str, set[str]] = {}
    for phase in schedule.plan(seed):
        if isinstance(phase, Train):
            for a, names in phase.who.items():
                known.setdefault(a, set()).update(names)
        elif isinstance(phase, Exchange):
            before = {a: set(s) for a, s in known.items()}
            for a, speakers in phase.who.items():
                known[a] = set().union(*(before.get(s, set()) for s in speakers)) | before.get(a, set())
    return known


def diameter(n: int, edges: Sequence[tuple[int, int]]) -> int:
    """By Floyd and Warshall."""
    d = [
        [0 if i == j else 1 if (i, j) in edges or (j, i) in edges else 10**6 for j in range(n)]
        for i in range(n)
    ]
    for k in range(n):
        d = [[min(d[i][j], d[i][k] + d[k][j]) for j in range(n)] for i in range(n)]
    return max(map(max, d))


def test_any_graph_is_passed_over_as_often_as_its_diameter(parts):
    """Random trees with more edges: all know all after so many exchanges, and one fewer would not do."""
    draw = random.Random(0)
    tiny = [s.map(name=f"s{i}", task=f"s{i}") for i, s in enumerate([*parts, *parts, *parts[:2]])]
    for n in (2, 3, 5, 8, 12):
        edges = [(draw.randrange(i), i) for i in range(1, n)]
        edges += [e for _ in range(n // 3) if (e := tuple(sorted(draw.sample(range(n), 2)))) not in edges]
        schedule = cs.settings.skill(tiny[:n], graph=edges)
        hears = [p for p in schedule.plan(0) if isinstance(p, Exchange)]
        assert len(hears) == diameter(n, edges)
        assert all(len(known) == n for known in reach(schedule).values())
        fewer = replace(schedule, plan=lambda seed, s=schedule: list(s.plan(seed))[:-2])
        assert len(hears) == 1 or any(len(known) < n for known in reach(fewer).values())
    for n in (2, 3, 4, 7):
        mesh, ring = (cs.settings.skill(tiny[:n], graph=g) for g in ("mesh", "ring"))
        assert sum(isinstance(p, Exchange) for p in mesh.plan(0)) == 1
        assert sum(isinstance(p, Exchange) for p in ring.plan(0)) == n // 2
        assert all(len(known) == n for s in (mesh, ring) for known in reach(s).values())
    alone = cs.settings.skill([tiny[:2]])
    assert [type(p) for p in alone.plan(0)] == [Train, Exchange, Evaluate, Train, Exchange, Evaluate]


def test_all_banks_are_one_whatever_the_way(parts, model):
    """Every agent of every run has one bank, to the hash, whatever the order of tasks, graph and time."""
    streams = [parts[:2], parts[2:4], parts[4:]]
    turned = [parts[:2][::-1], parts[2:4][::-1], parts[4:]]
    ways = [
        cs.settings.skill(streams),
        cs.settings.skill(streams, "end"),
        cs.settings.skill(turned, graph="ring"),
        cs.settings.skill(turned, "end", [(0, 1), (1, 2)], evaluated=2),
        cs.settings.skill(streams, graph=[(0, 1), (1, 2)], joins={2: 2}),
        cs.settings.skill(streams, graph=[(0, 1), (1, 2)], joins={0: 3, 2: 2}, evaluated=1),
    ]
    found = [hashes(walked(s, model)) for s in ways]
    assert [sorted(f) for f in found] == [["agent-0", "agent-1", "agent-2"]] * len(ways)
    assert len({h for f in found for h in f.values()}) == 1
    other = hashes(walked(cs.settings.skill(streams[:2]), model))
    assert not set(other.values()) & set(found[0].values())


def test_hearing_again_in_any_order_changes_nothing(parts, model):
    trial = walked(cs.settings.skill([parts[:2], parts[2:4], parts[4:]], share="end", graph="ring"), model)
    agent = trial.agents["agent-0"]
    before, messages = cs.skill.bank_hash(agent), list(agent.state.bank.values())
    new = cs.skill.newcomer(trial.setup.schedule, METHOD, model, TRAINING)
    assert cs.skill.bank_hash(new) == cs.skill.bank_hash({}) != before
    draw = random.Random(1)
    for _ in range(3):
        some = draw.choices(messages, k=4)
        agent.receive(some)
        new.receive(some)
    for m in draw.sample(messages, len(messages)):
        new.receive([m, m])
    assert cs.skill.bank_hash(agent) == cs.skill.bank_hash(new) == before
    x = parts[0].test.whole()[0]
    assert torch.equal(agent.predict(x), new.predict(x))


def test_relays_pass_on_the_very_bytes(parts, model):
    """At the other end of a path a message has the bytes that its sender made."""
    trial = walked(cs.settings.skill(parts, graph=PATH), model)
    assert len({tuple(a.state.bank) for a in trial.agents.values()}) == 1
    for sender, source in trial.agents["agent-4"].state.bank:
        own = trial.agents[sender].state.bank[sender, source].to_bytes()
        for agent in trial.agents.values():
            assert agent.state.bank[sender, source].to_bytes() == own


def test_ring_of_odd_size_sends_every_module_once_to_each(parts, model):
    """No link carries a module that the receiver has; on a ring, as on the mesh, all receive each once."""
    sizes = {}
    for graph in ("mesh", "ring"):
        trial = walked(cs.settings.skill(parts, graph=graph), model)
        told = sum(len(m.to_bytes()) for m in trial.agents["agent-0"].state.bank.values())
        receipts = sum(page["received"] for page in trial.ledger.by_agent.values()) - 4 * told
        sizes[graph] = receipts
        assert 0 < receipts < 0.05 * told * 4
    assert sizes["ring"] != sizes["mesh"]


# who comes late, who fails


def test_a_late_joiner_hears_what_was_told_before_it_learns(parts, model):
    streams = [parts[:2], parts[2:4], parts[4:]]
    schedule = cs.settings.skill(streams, graph=[(0, 1), (1, 2)], joins={2: 2})
    phases = list(schedule.plan(0))
    assert isinstance(phases[3], Exchange) and dict(phases[3].who) == {"agent-2": ("agent-1",)}
    assert isinstance(phases[4], Train) and phases[4].who["agent-2"] == (parts[4].name,)
    known = reach(replace(schedule, plan=lambda seed: phases[:4]))
    assert known["agent-2"] == {parts[0].name, parts[2].name}
    late = cs.run(replace(schedule, evaluated="agent-2"), METHOD, model, TRAINING)
    first = cs.run(schedule, METHOD, model, TRAINING)
    assert cs.skill.bank_hash(late.agent) == cs.skill.bank_hash(first.agent)
    assert (late.matrix[-1] == first.matrix[-1]).all()
    assert late.agent.ledger.by_agent["agent-2"]["received"] > 0


def test_those_who_come_together_hear_in_turns_and_once(parts):
    """Two newcomers in a row: the nearer one receives first. In a mesh one neighbour sends; of two parts, one
    each."""
    schedule = cs.settings.skill(parts, graph=PATH, joins={3: 2, 4: 2})
    hears = [dict(p.who) for p in schedule.plan(0) if isinstance(p, Exchange)]
    assert hears[2:4] == [{"agent-3": ("agent-2",)}, {"agent-4": ("agent-3",)}]
    mesh = cs.settings.skill([parts[:2], *parts[2:]], joins={3: 2})
    hears = [dict(p.who) for p in mesh.plan(0) if isinstance(p, Exchange)]
    assert hears[1] == {"agent-3": ("agent-0",)}
    between = cs.settings.skill([parts[:2], parts[2], parts[3:]], graph=[(0, 1), (1, 2)], joins={1: 2})
    hears = [dict(p.who) for p in between.plan(0) if isinstance(p, Exchange)]
    assert hears[0] == {"agent-0": ("agent-0",), "agent-2": ("agent-2",)}
    assert hears[1] == {"agent-1": ("agent-0", "agent-2")}
    assert all(len(known) == 5 for known in reach(between).values())


def test_what_a_failed_agent_told_stays(parts, model):
    """Agent 0 sends its first task and fails before its second: others keep the first."""
    streams = [parts[:2], parts[2:4], parts[4:]]
    whole = walked(cs.settings.skill(streams), model)
    schedule = cs.settings.skill(streams, fails={0: 2})
    assert schedule.evaluated == "agent-1"
    trial = walked(schedule, model)
    assert len({cs.skill.bank_hash(trial.agents[a]) for a in ("agent-1", "agent-2")}) == 1
    bank = trial.agents["agent-1"].state.bank
    assert set(bank) == set(whole.agents["agent-1"].state.bank) - {("agent-0", parts[1].name)}
    kept = ("agent-0", parts[0].name)
    assert bank[kept].to_bytes() == whole.agents["agent-0"].state.bank[kept].to_bytes()
    assert trial.setup.facts.learned_at[parts[1].name] == ()
    scores = dict(zip((s.name for s in schedule.sources), trial.judge.rows[-1], strict=True))
    assert scores[parts[1].name] == 0 < min(v for n, v in scores.items() if n != parts[1].name)
    later = [p for p in list(schedule.plan(0))[3:] if not isinstance(p, Evaluate)]
    assert later and not any("agent-0" in [*p.who, *(s for ss in p.who.values() for s in ss)] for p in later)


def test_what_a_failed_agent_had_not_told_is_lost(parts, model):
    streams = [parts[:2], parts[2:4], parts[4:]]
    schedule = cs.settings.skill(streams, "end", fails={0: 2})
    trial = walked(schedule, model)
    assert {sender for sender, _ in trial.agents["agent-1"].state.bank} == {"agent-1", "agent-2"}
    assert trial.setup.facts.learned_at[parts[0].name] == trial.setup.facts.learned_at[parts[1].name] == ()
    assert (("agent-0", parts[0].name)) in trial.agents["agent-0"].state.bank


def test_a_graph_that_falls_apart_leaves_parts_that_know_their_own(parts):
    streams = [parts[:2], parts[2:3], parts[3:]]
    schedule = cs.settings.skill(streams, graph=[(0, 1), (1, 2)], fails={1: 2})
    known = reach(schedule)
    names = [s.name for s in parts]
    assert known["agent-0"] == set(names) - {names[4]} and known["agent-2"] == set(names) - {names[1]}
    assert schedule.survey().learned_at[names[4]] == ()


def test_what_cannot_be_is_refused(parts):
    streams = [parts[:2], parts[2:4], parts[4:]]
    for more, rule in [
        ({"share": "never"}, "`share` must be task or end"),
        ({"graph": "star"}, "`graph` must be mesh, ring or a list"),
        (
            {"graph": [(0, 1)]},
            "`graph` must connect all agents, got one without a path from agent 0 to agent 2",
        ),
        ({"graph": [(0, 1), (1, 3)]}, "an edge of `graph` must be two different agents from 0 to 2"),
        ({"joins": {0: 2, 1: 2, 2: 2}}, "some agent must be present from the first stage"),
        ({"joins": {3: 1}}, "`joins` must map agents from 0 to 2 to a stage from 1 on"),
        ({"joins": {0: 1.5}}, "`joins` must map"),
        ({"joins": [1]}, "`joins` must map"),
        ({"fails": {0: 1}}, "must fail in a stage after the one in which it joins, from 2 to 2"),
        ({"fails": {0: 9}}, "must fail in a stage after"),
        ({"fails": {0: 2, 1: 2, 2: 2}}, "must be present at the end, got `fails` for all"),
        (
            {"fails": {0: 2}, "evaluated": 0},
            r"present at the end, one of \[1, 2\], got 0",
        ),
        ({"evaluated": 3}, "must be an agent that is present at the end"),
        ({"evaluated": True}, "must be an agent that is present at the end"),
    ]:
        with pytest.raises(cs.ConsilienceError, match=rule):
            cs.settings.skill(streams, **more)
    with pytest.raises(cs.ConsilienceError, match="no edges for one agent alone"):
        cs.settings.skill(parts[:1], graph=[(0, 1)])


def test_names_of_sources_and_tasks_are_their_own(parts):
    with pytest.raises(
        cs.ConsilienceError, match=f"sources must have names of their own, got {parts[0].name} twice"
    ):
        cs.settings.skill([parts[0], parts[0]])
    other = cs.data.split_classes(cs.data.wine(), 3)[0]
    with pytest.raises(
        cs.ConsilienceError,
        match="tasks must have names of their own, got 'one' for digits, and again in 'wine/",
    ):
        cs.settings.skill([replace(parts[0], task="one"), replace(other, task="one")])
    with pytest.raises(
        cs.ConsilienceError, match="tasks must have names of their own, got 'v1_0' and 'v1.0'"
    ):
        cs.settings.skill(
            [replace(parts[0], task="v1.0"), replace(parts[1], task="v1_0")]
        )  # one name in a head's entries
    two = cs.data.iid(parts[0], 2)  # one task of which two agents have a part is no clash
    assert {s.task for s in cs.settings.skill(two).sources} == {parts[0].name}


def test_agents_have_names(parts):
    """By name or by number, the plan is that of numbered agents with other names."""
    names, own = ["ben", "ana", "0"], [parts[:2], parts[2:4], parts[4:]]
    streams = dict(zip(names, own, strict=True))
    edges, called = [(0, 1), (1, 2)], [("ben", "ana"), (1, "0")]
    plain = cs.settings.skill(own, graph=edges, joins={2: 2}, fails={0: 2}, evaluated=1)
    mine = cs.settings.skill(streams, graph=called, joins={"0": 2}, fails={"ben": 2}, evaluated="ana")
    numbered = cs.settings.skill(streams, graph=edges, joins={2: 2}, fails={0: 2})
    other = dict(zip(("agent-0", "agent-1", "agent-2"), names, strict=True))

    def renamed(phase: Any) -> Any:
        if isinstance(phase, Train):
            return replace(phase, who={other[a]: s for a, s in phase.who.items()})
        if isinstance(phase, Exchange):
            return replace(phase, who={other[a]: tuple(other[s] for s in ss) for a, ss in phase.who.items()})
        return phase

    assert [renamed(p) for p in plain.plan(0)] == list(mine.plan(0)) == list(numbered.plan(0))
    assert mine.evaluated == numbered.evaluated == "ana"
    assert cs.settings.skill(own, graph=[("agent-0", 1), (1, 2)], evaluated="agent-2").evaluated == "agent-2"
    assert cs.settings.skill({"ana": parts[0]}).sources[0].name == parts[0].name
    for given, more, rule in [
        ({"": own[0]}, {}, "an agent's name must be text without '|', and not empty, got ''"),
        ({"a|b": own[0]}, {}, r"must be text without '\|', and not empty, got 'a\|b'"),
        ({3: own[0]}, {}, "must be text without .* got 3"),
        ({}, {}, "every agent must have a source"),
        ({"ana": []}, {}, "every agent must have a source"),
        (
            streams,
            {"graph": [("ana", "bem"), (1, 2)]},
            "`graph` must be one of the agents, got 'bem'; nearest: ben",
        ),
        (streams, {"joins": {"bem": 2}}, "`joins` must be one of the agents, got 'bem'; nearest: ben"),
        (streams, {"fails": {"bem": 2}}, "`fails` must be one of the agents, got 'bem'"),
        (streams, {"fails": {"ben": 2, 0: 2}}, "`fails` must map agents from 0 to 2"),
        (streams, {"evaluated": "bem"}, "`evaluated` must be one of the agents, got 'bem'"),
        (
            streams,
            {"fails": {"ben": 2}, "evaluated": "ben"},
            r"one of \['ana', '0'\], got 'ben'",
        ),
        (own, {"joins": {"ben": 2}}, "`joins` must be one of the agents, got 'ben'"),
    ]:
        with pytest.raises(cs.ConsilienceError, match=rule):
            cs.settings.skill(given, **more)


def test_banks_of_two_runs_join(parts, model):
    """Separate runs share a source: with names of agents their banks join, without they clash."""
    method, other = (
        cs.methods.skill("mahalanobis", head="ridge"),
        cs.methods.skill("mahalanobis", head="logistic"),
    )

    def banks(one: str | None, two: str | None) -> list[Any]:
        found = []
        for name, own, by in ((one, parts[:2], method), (two, parts[1:3], other)):
            found.append(
                cs.run(cs.settings.skill({name: own} if name else [own]), by, model).agent.state.bank
            )
        return found

    a, b = banks(None, None)
    with pytest.raises(
        cs.ConsilienceError, match=f"a version must have one content, got another for '{parts[1].name}'"
    ):
        join(a, b.values())
    a, b = banks("ana", "ben")
    both = join(a, b.values())
    assert list(both) == [
        ("ana", parts[0].name),
        ("ana", parts[1].name),
        ("ben", parts[1].name),
        ("ben", parts[2].name),
    ]
    agent = cs.skill.newcomer(both, method, model, like=parts[0].test.whole()[0])
    assert agent.frame.labels == parts[0].labels
    assert list(agent.frame.tasks) == [s.name for s in parts[:3]]
    assert cs.skill.bank_hash(agent) == cs.skill.bank_hash(both)
    right = [agent.predict(x).argmax(1) == y for x, y in (s.test.whole() for s in parts[:3])]
    assert float(torch.cat(right).double().mean()) > 0.85
    x, each = parts[1].test.whole()[0], []
    for bank in (a, b):
        alone = cs.skill.newcomer(bank, method, model, like=x)
        each.append(
            alone.predict(x, parts[1].name)[:, alone.frame.columns([("digits", "2"), ("digits", "3")])]
        )
    assert torch.allclose(
        agent.predict(x, parts[1].name)[:, 2:4], (each[0] + each[1]) / 2
    ) and not torch.equal(*each)


def test_the_command_line_takes_graphs_joins_and_fails(tmp_path):
    from consilience.cli.build import schedule_of
    from consilience.cli.options import understand

    split = ["--split", "iid+classes", "--split.iid.clients", "3", "--split.classes.n", "5"]
    given = [
        "--setting.graph=[[0, 1], [1, 2]]",
        "--setting.joins={2: 2}",
        "--setting.fails={0: 5}",
        "--setting.share",
        "task",
    ]
    schedule = schedule_of(understand("run", ["--setting", "skill", *split, *given]))
    file = tmp_path / "config.yaml"
    file.write_text(
        "setting:\n  skill:\n    graph: [[0, 1], [1, 2]]\n    joins: {2: 2}\n    fails: {0: 5}\n"
        "split: {iid: {clients: 3}, classes: {n: 5}}\n"
    )
    told = schedule_of(understand("run", ["--config", str(file)]))
    assert schedule.evaluated == told.evaluated == "agent-1"
    assert list(schedule.plan(0)) == list(told.plan(0))
    by_name = [
        "--setting.graph=[[agent-0, agent-1], [1, 2]]",
        "--setting.joins={agent-2: 2}",
        "--setting.fails={agent-0: 5}",
    ]
    named = schedule_of(understand("run", ["--setting", "skill", *split, *by_name]))
    assert list(named.plan(0)) == list(schedule.plan(0))
    learns = [p.who for p in schedule.plan(0) if isinstance(p, Train)]
    assert "agent-2" not in learns[0] and "agent-2" in learns[1] and "agent-0" not in learns[4]


# banks in files


@pytest.fixture(scope="module")
def shared(parts, model) -> Agent:
    return walked(cs.settings.skill([parts[:2], parts[2:4], parts[4:]]), model).agents["agent-0"]


def test_a_bank_comes_back_from_its_file(shared, parts, model, tmp_path):
    path = cs.skill.save_bank(shared, tmp_path / "bank.safetensors")
    bank = cs.skill.load_bank(path)
    assert bank.keys() == shared.state.bank.keys()
    assert [m.to_bytes() for m in bank.values()] == [m.to_bytes() for m in shared.state.bank.values()]
    assert cs.skill.bank_hash(bank) == cs.skill.bank_hash(shared)
    again = cs.skill.save_bank(bank, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    assert load(path)[0].keys()  # plain safetensors, which others can read
    assert not list(tmp_path.glob("*.part"))

    new = cs.skill.newcomer(shared.schedule, METHOD, model, TRAINING)
    assert not new.state.bank and new.name == "newcomer"
    for _ in range(2):  # again changes nothing
        cs.skill.give(new, bank)
        assert cs.skill.bank_hash(new) == cs.skill.bank_hash(shared)
    x = torch.cat([s.test.whole()[0] for s in parts])
    assert torch.equal(new.predict(x), shared.predict(x))
    empty = cs.skill.load_bank(cs.skill.save_bank({}, tmp_path / "empty.safetensors"))
    assert empty == {}


def test_a_hash_of_a_bank_tells_versions(shared):
    """Also where the content is the same."""
    first = next(iter(shared.state.bank.values()))
    newer = replace(first, version=first.version + 1)
    assert newer.digest == first.digest and cs.skill.bank_hash({newer.key: newer}) != cs.skill.bank_hash(
        {first.key: first}
    )


MADE = {
    "gaussian_mixture": (cs.methods.skill("gaussian_mixture", 2), "heads"),
    "mahalanobis, reject": (cs.methods.skill("mahalanobis", reject=0.05), "heads"),
    "min_entropy, biases": (cs.methods.skill("min_entropy"), "biases"),
    "expert_gate, drawn": (cs.methods.skill("expert_gate", reuse="name"), "drawn"),
}


@pytest.mark.parametrize("kind", list(MADE))
def test_an_agent_is_made_of_a_file(parts, model, tmp_path, kind):
    """Without data it answers, bit for bit, as the agent whose bank it was; with a task, too."""
    method, base = MADE[kind]
    trunk = cs.models.mlp(64, (24, 16), 10)
    net = {
        "heads": model,
        "biases": cs.models.beneficial_biases(cs.models.frozen(trunk), 10),
        "drawn": cs.models.multi_head(cs.models.frozen(trunk), 10),
    }[base]
    teacher = cs.run(
        cs.settings.skill([[parts[4], parts[1]], parts[2:4], parts[:1]]), method, net, TRAINING, seed=3
    ).agent
    path, x = cs.skill.save_bank(teacher, tmp_path / "bank"), torch.cat([s.test.whole()[0] for s in parts])
    agent = cs.skill.newcomer(cs.skill.load_bank(path), method, net, TRAINING, 3, "new", like=x)
    columns = agent.frame.columns(teacher.frame.labels)
    assert (
        agent.name == "new"
        and cs.skill.bank_hash(agent) == cs.skill.bank_hash(teacher)
        and not agent.state.visits
    )
    assert torch.equal(agent.predict(x)[:, columns], teacher.predict(x)) and teacher.predict(x).any()
    assert agent.frame.tasks.keys() == teacher.frame.tasks.keys() == {s.name for s in parts}
    for s in parts:
        assert torch.equal(agent.predict(x, s.name)[:, columns], teacher.predict(x, s.name))
    with pytest.raises(cs.ConsilienceError, match="`task` must be one of"):
        agent.predict(x, "typo")
    few = dict(list(cs.skill.load_bank(path).items())[1:4])  # not all of whose classes are answered
    some = cs.skill.newcomer(few, method, net, TRAINING, 3, like=x[:0])
    known = cs.skill.newcomer(teacher.schedule, method, net, TRAINING, 3)
    cs.skill.give(known, few)
    assert set(some.frame.labels) == set(teacher.frame.labels) and len(some.frame.tasks) == 3
    assert torch.equal(some.predict(x)[:, some.frame.columns(teacher.frame.labels)], known.predict(x))
    if base == "drawn":
        with pytest.raises(cs.ConsilienceError, match="a module must belong to this agent's backbone"):
            cs.skill.newcomer(teacher.state.bank, method, net, TRAINING, like=x)


def pictures(seed: int, n: int = 24) -> cs.Source:
    """A task of two classes of images, one dark and one light."""
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) / 2
    x[1::2] += 0.1 * (seed + 1)
    t, y = Tensors(x, torch.arange(n) % 2), tuple((f"task{seed}", c) for c in ("dark", "light"))
    return cs.Source(
        f"task{seed}",
        t.select(torch.arange(n - 8)),
        t.select(torch.arange(n - 8, n - 4)),
        t.select(torch.arange(n - 4, n)),
        y,
        (0, 1),
        f"task{seed}",
    )


def body(seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            torch.nn.Conv2d(3, 6, 3),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        ]
        return torch.nn.Sequential(*layers, torch.nn.Linear(6, 2))


def convolutional(seed: int = 0) -> Any:
    return cs.models.backbone(body(seed))


def test_another_process_answers_with_images_and_features(tmp_path):
    """With the file, the backbone and nothing else."""
    import subprocess

    torch.save(body(), tmp_path / "body")
    model = cs.models.multi_head(convolutional(), 4)
    images = [pictures(0), pictures(1)]
    kept = cs.data.embed(images, model)
    teacher = cs.run(cs.settings.skill([kept]), cs.methods.skill("nearest_mean", head="ridge"), model).agent
    cs.skill.save_bank(teacher, tmp_path / "bank")
    given = [images[0].test.whole()[0], kept[1].test.whole()[0]]
    torch.save(
        (given, [[teacher.predict(x), teacher.predict(x, "task1")] for x in given]), tmp_path / "answers"
    )
    code = """if True:
        import sys, torch, consilience as cs
        from pathlib import Path
        at = Path(sys.argv[1])
        model = cs.models.multi_head(cs.models.backbone(torch.load(at / "body", weights_only=False)), 4)
        given, answers = torch.load(at / "answers")
        for x, want in zip(given, answers):
            method = cs.methods.skill("nearest_mean", head="ridge")
            agent = cs.skill.newcomer(cs.skill.load_bank(at / "bank"), method, model, like=x)
            assert agent.frame.labels[3] == ("task1", "light")
            assert torch.equal(agent.predict(x), want[0])
            assert torch.equal(agent.predict(x, task="task1"), want[1])
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_what_no_agent_can_be_made_of(shared, model, parts):
    x, bank = parts[0].test.whole()[0], shared.state.bank
    bare = {
        k: replace(m, items={n: i for n, i in m.items.items() if n != "model"}, digest="")
        for k, m in bank.items()
    }
    for given, more, rule in [
        (bank, {}, r"with a bank, `like` must be inputs \[B, ...\], got None"),
        (bank, {"like": torch.tensor(1.0)}, "`like` must be inputs"),
        ({}, {"like": x}, "must have modules to make an agent from, got none in 0 messages"),
        (bare, {"like": x}, "must have modules to make an agent from, got none in 5 messages"),
        ({"a": 1}, {"like": x}, "a bank must be an agent with one, or messages"),
        (shared.schedule, {"like": x}, "`like` must be left out with a schedule"),
        (None, {}, "`schedule` must be made by consilience.settings, got None"),
        (bank, {"like": x[:, :9]}, "samples must fit the model's input"),
    ]:
        with pytest.raises(cs.ConsilienceError, match=rule):
            cs.skill.newcomer(given, METHOD, model, TRAINING, **more)
    narrow = cs.models.multi_head(model.trunk, 9)
    with pytest.raises(cs.ConsilienceError, match="an output for each of the 10 classes, got 9"):
        cs.skill.newcomer(bank, METHOD, narrow, TRAINING, like=x)


@pytest.mark.parametrize(
    "mapper",
    [
        {},
        {"mapper": "gaussian_mixture"},
        {"mapper": "mahalanobis"},
        {"mapper": "mahalanobis", "rank": 3},
        {"mapper": "mahalanobis", "images": 2},
    ],
)
def test_what_could_not_be_routed_to_is_not_given(shared, parts, model, mapper):
    """Modules without the receiver's anchor, and anchors without scores; what else is in the bank stays."""
    kind = {"mapper": "nearest_mean", **mapper}
    method = cs.methods.skill(**kind, head="ridge")
    other = cs.methods.skill("gaussian_mixture" if kind["mapper"] != "gaussian_mixture" else "expert_gate", 2)
    agent, schedule = cs.run(cs.settings.skill([parts[:2]]), method, model).agent, shared.schedule
    name = type(other.mapper).__name__
    said = (
        f"anchor that this agent's mapper reads, that of `{name}`, got {type(method.mapper).__name__}, "
        "model in 'digits/0-1' of 'agent-0'"
    )
    for hearer, rule in (
        (other, said),
        (
            cs.methods.skill(**kind, reject=0.05),
            "with `reject` above 0 every anchor must be made with it, got one without validation scores "
            "in 'digits/0-1'",
        ),
    ):
        new = cs.skill.newcomer(schedule, hearer, model, TRAINING)
        with pytest.raises(cs.ConsilienceError, match=rule):
            cs.skill.give(new, agent.state.bank)
        assert not new.state.bank
    last = list(agent.state.bank.values())[1]
    bare = replace(last, items={"model": last.items["model"]}, digest="")
    new = cs.skill.newcomer(schedule, method, model, TRAINING)
    with pytest.raises(cs.ConsilienceError, match=f"got model in '{parts[1].name}'"):
        cs.skill.give(new, {**agent.state.bank, bare.key: bare})
    assert [source for _, source in new.state.bank] == [parts[0].name]
    for hears in (method, cs.methods.skill("oracle"), cs.methods.skill("min_entropy")):
        cs.skill.give(new := cs.skill.newcomer(schedule, hears, model, TRAINING), agent.state.bank)
        assert len(new.state.bank) == 2 and new.predict(parts[0].test.whole()[0], parts[0].name).any()
    judging = cs.methods.skill(**kind, head="ridge", reject=0.05)
    sure = cs.run(cs.settings.skill([parts[:2]]), judging, model).agent
    cs.skill.give(new := cs.skill.newcomer(schedule, judging, model, TRAINING), sure.state.bank)
    assert new.predict(parts[0].test.whole()[0]).any()


def test_a_module_is_offered(parts, model, tmp_path):
    """A task of old classes where the task is given: it, and readers of its file, answer; others refuse."""
    schedule = cs.settings.skill([parts[:2], parts[2:]])
    wide = cs.models.multi_head(cs.models.random_features(64, 256), 10)
    agent = cs.run(schedule, cs.methods.skill("oracle", head="ridge"), wide).agent
    wanted = [("digits", "9"), ("digits", "0")]
    both, before = cs.skill.combine(agent.state.experts, wanted, "mixed"), dict(agent.state.bank)
    bank = cs.skill.offer(agent, both)
    (m,) = bank.values()
    assert (
        list(bank) == [("agent-0", "mixed")]
        and m.version == 1
        and m.origin == agent.state.origin
        and m.items == {"model": both}
    )
    assert agent.state.bank == before, "nothing is changed by offering"
    cs.skill.give(agent, bank)
    assert agent.state.bank == {**before, **bank}
    x, y = (torch.cat(t) for t in zip(*(s.test.whole() for s in (parts[0], parts[4])), strict=True))
    known = (y == 0) | (y == 9)
    p = agent.predict(x[known], task="mixed")
    assert float((p.argmax(1) == y[known]).double().mean()) > 0.95 and not p[:, 1:9].any()
    path = cs.skill.save_bank(agent, tmp_path / "bank")
    new = cs.skill.newcomer(cs.skill.load_bank(path), cs.methods.skill("oracle"), wide, like=x)
    assert torch.equal(
        new.predict(x, "mixed")[:, new.frame.columns(agent.frame.labels)], agent.predict(x, "mixed")
    )
    (m,) = cs.skill.offer(agent, cs.skill.combine(agent.state.experts, wanted[::-1], "mixed")).values()
    assert m.version == 2
    cs.skill.give(agent, {m.key: m})
    assert agent.state.bank[m.key] is m and [m.version for m in cs.skill.offer(agent, both).values()] == [3]
    assert list(cs.skill.offer(new, both, "my own")) == [("newcomer", "my own")]
    anchored = cs.run(schedule, cs.methods.skill("mahalanobis", head="ridge"), wide).agent
    with pytest.raises(cs.ConsilienceError, match="that of `Mahalanobis`, got model in 'mixed' of 'agent-0'"):
        cs.skill.give(anchored, cs.skill.offer(anchored, both))
    for given, rule in [
        ((both, ""), "a name that is not empty and without '|', got ''"),
        ((both, "a|b"), "a name that is not empty and without '|', got 'a|b'"),
        ((Module({}, {"task": None}),), "a name that is not empty and without '|', got None"),
        ((both, parts[0].name), f"must be new, got '{parts[0].name}', a source that the agent trained on"),
        ((before,), "must be a module, such as `combine` makes, got a dict"),
    ]:
        with pytest.raises(cs.ConsilienceError, match=re.escape(rule)):
            cs.skill.offer(agent, *given)


def test_a_task_that_nobody_has_is_named(shared, parts):
    with pytest.raises(
        cs.ConsilienceError,
        match=f"`task` must be one of .* got 'digits/0-2'; nearest: .*{parts[0].name}",
    ):
        shared.predict(parts[0].test.whole()[0], task="digits/0-2")
    with pytest.raises(cs.ConsilienceError, match="`task` must be one of the schedule's tasks, got 'typo'"):
        shared.predict(parts[0].test.whole()[0], task="typo")


def test_familiarity_is_that_of_the_mapper(parts, model):
    method = cs.methods.skill("mahalanobis", head="ridge", reject=0.05)
    agent = cs.run(cs.settings.skill([parts[:3]]), method, model).agent
    x = torch.cat([s.test.whole()[0] for s in parts])
    psi = model.features(agent.state.params, agent.state.buffers, x)
    own = method.mapper.familiarity(
        Routing(x, lambda other=None: psi, list, list(agent.state.experts)), agent.memory(method.mapper)
    )
    found = cs.skill.familiarity(agent, x)
    assert torch.equal(found, own) and found.shape == (len(x),)
    known = sum(len(s.test) for s in parts[:3])
    assert cs.mappers.auroc(found[:known], found[known:]) > 0.7
    for bad, rule in (
        ("min_entropy", "needs a mapper with anchors, got MinEntropy"),
        ("mahalanobis", "`reject` must be above 0"),
    ):
        other = cs.run(cs.settings.skill([parts[:3]]), cs.methods.skill(bad, head="ridge"), model).agent
        with pytest.raises(cs.ConsilienceError, match=rule):
            cs.skill.familiarity(other, x)


# what is refused before anything is learned


def test_kept_features_know_their_backbone():
    images, model = [pictures(0), pictures(1)], cs.models.multi_head(convolutional(), 4)
    kept = cs.data.embed(images, model)
    assert (
        {s.feature_space for s in kept} == {model.feature_space}
        and model.feature_space
        and not images[0].feature_space
    )
    method = cs.methods.skill("nearest_mean", head="ridge")
    assert len(cs.run(cs.settings.skill(kept), method, model).agent.state.experts) == 2
    other = cs.models.multi_head(convolutional(1), 4)
    rule = (
        f"the features of 'task0' were made by backbone {model.feature_space[:8]}, "
        f"and the model's is {other.feature_space[:8]}"
    )
    with pytest.raises(cs.ConsilienceError, match=rule):
        cs.run(cs.settings.skill(kept), method, other)
    scaled = [s.map(x=lambda x: x * 2) for s in kept]
    assert {s.feature_space for s in scaled} == {""} and kept[0].map(y=lambda y: y).feature_space == kept[
        0
    ].map(name="b").feature_space == model.feature_space
    cs.run(cs.settings.skill(scaled), method, other)


def test_a_model_without_anything_to_learn_is_refused(parts):
    rule = "all entries of the model are frozen: .*; put models.multi_head on it"
    trunk = cs.models.random_features(64, 48)
    for method in (cs.methods.skill("nearest_mean"), cs.methods.skill("oracle", head="ridge")):
        with pytest.raises(cs.Refusal, match=rule):
            cs.run(cs.settings.skill([parts[:2]]), method, trunk)
    with pytest.raises(cs.Refusal, match=rule):
        cs.run(cs.settings.skill([[pictures(0), pictures(1)]]), METHOD, convolutional())
    cs.run(cs.settings.skill([parts[:2]]), METHOD, cs.models.multi_head(trunk, 10), TRAINING)
    whole = cs.models.mlp(64, (16,), 10)
    for partly in (whole, cs.models.frozen(whole, ("1.*",))):  # ensembles of whole models, learned or given
        cs.run(cs.settings.merging(parts[:2]), cs.methods.average_ensemble(), partly, TRAINING)
    expert = cs.Expert("e", whole.init(torch.Generator())[0], parts[0])
    cs.run(cs.settings.exmodel([expert]), cs.methods.average_ensemble(), whole)
    with pytest.raises(cs.Refusal, match=rule):
        cs.run(cs.settings.exmodel([expert]), cs.methods.average_ensemble(), cs.models.frozen(whole))


def test_targets_of_another_frame_are_no_columns_of_a_head(parts):
    """Head2Toe of a source as it was split, not as the schedule framed it."""
    theirs = parts[0].map(labels=tuple(("theirs", name) for _, name in parts[0].labels))
    _, framed = cs.settings.skill([theirs, parts[1]], scenario="task").sources
    model = cs.models.multi_head(cs.models.frozen(cs.models.mlp(64, (12,), 10)), 20)
    params, buffers = model.grow(*model.init(torch.Generator().manual_seed(0)), framed, torch.Generator())
    cs.models.head2toe(model, params, buffers, framed, keep=0.5, epochs=1)
    with pytest.raises(cs.ConsilienceError, match="targets must be output columns"):
        cs.models.head2toe(model, params, buffers, replace(parts[1], task=framed.task), keep=0.5, epochs=1)


def test_words_of_the_method_are_named():
    with pytest.raises(cs.ConsilienceError, match="`reuse` must be one of .* got 'names'; nearest: name"):
        cs.methods.skill(reuse="names")  # type: ignore[arg-type]


def test_banks_of_files_join_and_the_newest_stays(shared, model, tmp_path):
    messages = list(shared.state.bank.values())
    some = {m.key: m for m in messages[:3]}
    rest = {m.key: m for m in messages[2:]}
    new = cs.skill.newcomer(shared.schedule, METHOD, model, TRAINING)
    for held in (some, rest):
        cs.skill.give(new, cs.skill.load_bank(cs.skill.save_bank(held, tmp_path / "part.safetensors")))
    assert cs.skill.bank_hash(new) == cs.skill.bank_hash(shared)
    first = messages[0]
    module = first.items["model"]
    better = Module(
        {k: t + 1 if t.is_floating_point() else t for k, t in module.tensors.items()}, module.meta
    )
    newer = Message(
        **{**first.facts(), "version": first.version + 1, "digest": ""},
        items={**first.items, "model": better},
    )
    cs.skill.give(new, {newer.key: newer})
    assert new.state.bank[first.key].version == first.version + 1
    cs.skill.give(new, {first.key: first})  # the older one changes nothing
    assert cs.skill.bank_hash(new) == cs.skill.bank_hash(join(shared.state.bank, [newer]))
    twin = replace(newer, items={**newer.items, "model": module}, digest="")
    with pytest.raises(cs.ConsilienceError, match="a version must have one content"):
        cs.skill.give(new, {twin.key: twin})


def test_a_spoilt_file_is_refused_by_name(shared, tmp_path):
    path = cs.skill.save_bank(shared, tmp_path / "bank.safetensors")
    data = path.read_bytes()
    spoilt = tmp_path / "spoilt.safetensors"
    for n in (0, 7, 100, len(data) // 2, len(data) - 1):  # cut short anywhere
        spoilt.write_bytes(data[:n])
        with pytest.raises(cs.ConsilienceError, match="spoilt.safetensors must be complete safetensors data"):
            cs.skill.load_bank(spoilt)
    header = 8 + int.from_bytes(data[:8], "little")
    for at in (header, (header + len(data)) // 2, len(data) - 1):  # one bit of content
        spoilt.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(
            cs.ConsilienceError, match="content that its sender hashed.*in .*spoilt.safetensors"
        ):
            cs.skill.load_bank(spoilt)
    spoilt.write_bytes(data.replace(b'\\"version\\": 1', b'\\"version\\": 2', 1))
    with pytest.raises(cs.ConsilienceError, match="got altered metadata in .*spoilt"):
        cs.skill.load_bank(spoilt)
    tensors, meta = load(path)
    told, _, facts = meta["bank"].partition(" ")
    spoilt.write_bytes(pack(tensors, {"bank": f"{told} {json.dumps({**json.loads(facts), 'format': 9})}"}))
    with pytest.raises(cs.ConsilienceError, match="a format up to 1, got 9"):
        cs.skill.load_bank(spoilt)
    spoilt.write_bytes(pack(tensors))
    with pytest.raises(cs.ConsilienceError, match="a bank must be a file of `save_bank`"):
        cs.skill.load_bank(spoilt)
    with pytest.raises(cs.ConsilienceError, match="cannot read the bank .*none.safetensors: No such file"):
        cs.skill.load_bank(tmp_path / "none.safetensors")
    with pytest.raises(cs.ConsilienceError, match="a bank must be an agent with one"):
        cs.skill.save_bank([1], spoilt)  # type: ignore[arg-type]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(cs.ConsilienceError, match="cannot write .*bank.safetensors"):
        cs.skill.save_bank(shared, blocked / "bank.safetensors")


def test_a_bank_that_the_hearers_model_would_run_otherwise_is_refused(parts, tmp_path):
    """One backbone: biases in a model without, of other layers, heads over their norm are refused; plain
    heads fit a model with biases."""
    body = cs.models.frozen(cs.models.mlp(64, (24, 16), 10))
    made = {
        "heads": cs.models.multi_head(body, 10),
        "normed": cs.models.multi_head(body, 10, norm="inf"),
        "biases": cs.models.beneficial_biases(body, 10),
        "half": cs.models.beneficial_biases(body, 10, last=0.5),
    }
    schedule = cs.settings.skill([parts[:1]])
    for name, model in made.items():
        cs.skill.save_bank(cs.run(schedule, METHOD, model, TRAINING).agent, tmp_path / name)

    def hears(name: str, model: str) -> Any:
        cs.skill.give(
            agent := cs.skill.newcomer(schedule, METHOD, made[model], TRAINING),
            cs.skill.load_bank(tmp_path / name),
        )
        return agent

    for name, model, said in (
        ("biases", "heads", "entries that this model runs, got 'biases."),
        ("biases", "half", "entries that this model runs, got"),
        ("normed", "heads", "here with rows as they are, got rows over"),
        ("heads", "normed", "rows over their inf norm, got rows as"),
    ):
        with pytest.raises(cs.ConsilienceError, match=said):
            hears(name, model)
    x = parts[0].test.whole()[0]
    assert torch.allclose(hears("heads", "biases").predict(x), hears("heads", "heads").predict(x))
    assert torch.allclose(hears("half", "biases").predict(x), hears("half", "half").predict(x)), (
        "layers without biases are the backbone's"
    )


def test_a_bank_of_another_backbone_is_refused(shared, parts, tmp_path):
    """Through the file: other frozen features, one entry of which differs by a hair, are another backbone."""
    path = cs.skill.save_bank(shared, tmp_path / "bank.safetensors")
    other = cs.models.multi_head(cs.models.random_features(64, 48, seed=2), 10)
    new = cs.skill.newcomer(shared.schedule, METHOD, other, TRAINING)
    with pytest.raises(
        cs.ConsilienceError,
        match="a module must belong to this agent's backbone .* got .* in 'digits/0-1' of 'agent-0'",
    ):
        cs.skill.give(new, cs.skill.load_bank(path))
    assert not new.state.bank
    same = cs.skill.newcomer(shared.schedule, METHOD, shared.model, TRAINING)
    name = next(n for n in same.state.params if shared.model.frozen(n))
    hair = same.state.params[name].clone()
    hair.view(-1)[0] += 1e-6
    others = Frozen({**same.state.frozen.params, name: hair}, same.state.frozen.buffers)
    same.state = same.state.change(params={**same.state.params, name: hair}, frozen=others)
    with pytest.raises(cs.ConsilienceError, match="a module must belong to this agent's backbone"):
        cs.skill.give(same, cs.skill.load_bank(path))
    # Labels of another space, as of digits that somebody else collected.
    theirs = [part.map(labels=tuple(("theirs", name) for _, name in part.labels)) for part in parts[:2]]
    few = cs.skill.newcomer(cs.settings.skill([theirs]), METHOD, shared.model, TRAINING)
    with pytest.raises(cs.ConsilienceError, match="classes must be declared"):
        cs.skill.give(few, cs.skill.load_bank(path))
    assert not few.state.bank


# costs


def test_the_papers_figures():
    """Ge et al. 2023: 813.8 KB per task, and the efficiency for the 51 agents that its caption names."""
    head, mixture = cs.skill.task_bytes(49.34, 2048), cs.skill.task_bytes(0, 2048, components=25)
    assert head == pytest.approx(404e3, rel=1e-3) and mixture == 409600
    assert head + mixture == pytest.approx(813.8e3, rel=1e-4)
    one, told, n = 1.73e16, 813.8e3, 51
    assert one / 102 == pytest.approx(
        1.69e14, rel=5e-3
    )  # the paper's teachers: it divides by the tasks, not by its 51 agents
    for received, student, efficiency in ((8.22e7, 0.0, 0.9998), (6.72e9, 5e9, 0.9806)):
        s = Speedup((one / n,) * n, (received,) * n, (student,) * n)
        assert round(s.efficiency(), 4) == round(s.efficiency(students=True), 4) == efficiency
        assert s.efficiency(students=True) == pytest.approx(
            s.makespan_efficiency
        )  # balanced: no agent is slower than another
    (s,) = cs.skill.speedups([one / 102] * 102, [told] * 102, [51])
    assert s.communication == pytest.approx(100 * told) and s.teacher == pytest.approx(one / 51)
    assert round(s.efficiency(), 4) == 0.9998 == round(s.makespan_efficiency, 4)
    assert cs.skill.task_bytes(10, 8, images=5, image=100, biases=3) == 4 * (80 + 3) + 5000


def test_a_speedup_is_what_its_agents_do():
    s = Speedup((6e9, 2e9), (1e6, 3e6), (5e8, 0.0), alpha=100.0)
    assert s.alone == 8e9 and s.teacher == 4e9 and s.communication == 2e6 and s.student == 2.5e8
    assert s.total == 4e9 + 2e8 + 2.5e8
    assert (
        s.efficiency(students=True) == 4e9 / s.total and s.efficiency() == s.efficiency(False) == 4e9 / 4.2e9
    )
    assert (
        s.makespan == 6e9 + 1e8 + 5e8
        and s.speedup == 8e9 / s.makespan
        and s.makespan_efficiency == s.speedup / 2
    )
    for bad in [((), (), ()), ((1.0,), (), (0.0,)), ((1.0,), (-1.0,), (0.0,)), ((math.nan,), (0.0,), (0.0,))]:
        with pytest.raises(cs.ConsilienceError, match="costs must be finite numbers >= 0"):
            Speedup(*bad)
    with pytest.raises(cs.ConsilienceError, match="needs teachers with MACs"):
        Speedup((0.0,), (1.0,), (0.0,))


def test_the_ledger_says_who_did_what(parts, model):
    """Work is that of a run alone, bytes those of the messages; a balanced mesh has one efficiency by both
    definitions."""
    schedule = cs.settings.skill([parts[:2], parts[2:4]])
    trial = walked(schedule, model)
    s = cs.skill.speedup(trial.result["costs"])
    alone = cs.run(cs.settings.skill([parts[:4]]), METHOD, model, TRAINING)
    assert s.agents == 2 and s.alone == pytest.approx(alone.costs["macs"], rel=1e-9) and not sum(s.students)
    bank = trial.agents["agent-0"].state.bank
    told = cs.skill.message_bytes(bank)
    assert told == {k: len(m.to_bytes()) for k, m in bank.items()}
    heard = sum(size for (sender, _), size in told.items() if sender == "agent-1")
    assert heard < s.received[0] < heard + 1000  # and receipts
    assert s.efficiency() == pytest.approx(s.teacher / (s.teacher + 1000 * sum(s.received) / 2))
    slowest = max(t + 1000 * b for t, b in zip(s.teachers, s.received, strict=True))
    assert s.makespan_efficiency == pytest.approx(s.alone / slowest / 2)
    more = cs.skill.speedup(trial.result["costs"], 0.0, cs.skill.covariance_macs(48, images=20, macs=10))
    assert (
        more.students == (20 * (10 + 48**2) + 48**3 / 3,) * 2
        and more.total == more.teacher + more.students[0]
    )
    assert cs.skill.speedup(alone).efficiency() == cs.skill.speedup(alone).speedup == 1.0
    for nothing in ({}, {"by_agent": {}}, {"macs": 3}):
        with pytest.raises(cs.ConsilienceError, match="a page of macs and bytes for each agent"):
            cs.skill.speedup(nothing)


def test_absorbing_is_a_part_of_an_agents_work():
    """Students' work is what was multiplied in absorbing; totals stay what they were."""
    ledger, a = Ledger(), torch.ones(4, 4)
    for _ in range(2):
        ledger.charge_work("x", ("step", 1), lambda: a @ a)
        ledger.charge_work("x", ("receive", 1, 16), lambda: a @ a @ a)
    page = ledger.costs()["by_agent"]["x"]
    assert page == {"macs": 2 * 64 + 2 * 128, "sent": 0, "received": 0, "receiving": 2 * 128}
    assert ledger.total("macs") == page["macs"]
    pages = {"x": page, "y": {"macs": 1, "sent": 0, "received": 2}}  # a page of before has none
    s = cs.skill.speedup(pages)
    assert s.teachers == (128.0, 1.0) and s.students == (256.0, 0.0)
    more = cs.skill.speedup(
        pages, teacher=cs.models.macs(torch.nn.Linear(4, 4), (4,))
    )  # the passes of kept features
    assert more.teachers == (144.0, 17.0) and more.students == s.students and more.alone == s.alone + 32
    assert cs.skill.speedup(pages, teacher={"y": 9.0}).teachers == (128.0, 10.0)
    assert cs.skill.speedup(pages, teacher={}) == s
    with pytest.raises(
        cs.ConsilienceError,
        match="`teacher` must be one of the agents with a page, got 'z'; nearest: x, y",
    ):
        cs.skill.speedup(pages, teacher={"x": 1.0, "z": 1.0})


def test_dealing_tasks():
    draw = random.Random(3)
    for n in (1, 2, 3, 5):
        work = [draw.random() ** 3 for _ in range(11)]
        for order in ("given", "longest"):
            shares = cs.skill.deal(work, n, order)
            assert sorted(t for own in shares for t in own) == list(range(11)) and all(shares)
        assert cs.skill.deal(work, n)[0] == list(range(0, 11, n))
        load = max(sum(work[t] for t in own) for own in cs.skill.deal(work, n, "longest"))
        least = max(max(work), sum(work) / n)
        assert least <= load + 1e-12 and load <= (4 / 3 - 1 / (3 * n)) * best(work, n) + 1e-12
    with pytest.raises(cs.ConsilienceError, match="`agents` must be a whole number from 1 to the 2 tasks"):
        cs.skill.deal([1, 2], 3)
    with pytest.raises(cs.ConsilienceError, match="`order` must be 'given' or 'longest'"):
        cs.skill.deal([1, 2], 1, "shortest")  # type: ignore[arg-type]


def best(work: Sequence[float], n: int) -> float:
    """The least makespan there is, by trying all partial loads."""
    loads = {(0.0,) * n}
    for w in sorted(work, reverse=True):
        loads = {tuple(sorted((*now[:i], now[i] + w, *now[i + 1 :]))) for now in loads for i in range(n)}
    return min(max(now) for now in loads)


def test_speedups_against_the_number_of_agents():
    work, told = [8e9, 1e9, 2e9, 1e9], [1e5, 2e5, 3e5, 4e5]
    given, longest, even = (
        cs.skill.speedups(work, told, alpha=1000.0, order=o) for o in ("given", "longest", "balanced")
    )
    assert [s.agents for s in given] == [1, 2, 3, 4]
    assert given[0].speedup == given[0].efficiency() == even[0].speedup == 1.0
    two = given[1]  # agent 0 has tasks 0 and 2, agent 1 tasks 1 and 3
    assert two.teachers == (10e9, 2e9) and two.received == pytest.approx((6e5, 4e5))
    assert two.makespan == pytest.approx(10e9 + 6e8)
    assert all(a.speedup <= b.speedup + 1e-9 for a, b in zip(longest, even, strict=True))
    assert all(a.alone == b.alone == c.alone == 12e9 for a, b, c in zip(given, longest, even, strict=True))
    assert longest[1].teachers == (8e9, 4e9) and longest[1].speedup > two.speedup
    assert all(
        s.efficiency() == pytest.approx(e.efficiency()) for s, e in zip(given, even, strict=True)
    )  # the paper's sees no sizes
    assert longest[3].speedup < 12 / 8 < even[3].speedup  # one task is the bound
    taken = cs.skill.speedups(work, told, [2], 0.0, receiving=1e8)[0]
    assert taken.students == pytest.approx((2e8, 2e8)) and taken.makespan == pytest.approx(10.2e9)
    with pytest.raises(cs.ConsilienceError, match="costs must be one of each kind per task"):
        cs.skill.speedups(work, told[:2])


def test_the_table_of_costs():
    rows = {"a": Speedup((1e9, 3e9), (1e5, 1e5), (0, 0)), "b": Speedup((4e9,), (0,), (0,))}
    studious = replace(rows["a"], students=(1e9, 1e9))
    cell = cs.skill.table({"c": studious}).splitlines()[2].split("|")[7].strip()
    assert (
        cell == f"{studious.efficiency():.4f}" == "0.9524" != f"{studious.efficiency(students=True):.4f}"
    ), "the paper's definition"
    lines = cs.skill.table(rows, {"b": 0.5}, "b").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert len({len(c) for c in cells}) == 1 and len(lines) == 4
    assert cells[1] == ["a", "2", "2.00e+09", "1.00e+05", "0", "2.10e+09", "0.9524", "0.6452", "0.53x", "-"]
    assert cells[2][-2:] == ["1.00x", "50.0 %"]
    assert "score" not in cs.skill.table(rows)
    for bad in ({"rows": {}}, {"rows": rows, "reference": "c"}):
        with pytest.raises(cs.ConsilienceError, match="`reference` must be one of the rows"):
            cs.skill.table(**bad)


def test_the_room_imports_no_torch():
    import subprocess

    code = "import sys, consilience\nconsilience.skill.__all__\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="bank_hash"):
        cs.skill.bank_hasj  # noqa: B018
    assert all(callable(getattr(cs.skill, n)) for n in cs.skill.__all__)
    assert dir(cs.skill) == sorted(cs.skill.__all__) and "offer" in dir(cs.skill)
    assert Path(cs.skill.__file__).parent.name == "skill"


def test_no_flipped_bit_of_a_message_is_taken(shared):
    """Neither in what its sender sent nor in who it says that it is from."""
    message = next(iter(shared.state.bank.values()))
    data = message.to_bytes()
    assert Message.from_bytes(data).facts() == message.facts()
    rng = random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    for bit in [rng.randrange(64, 8 * header) for _ in range(300)] + [
        rng.randrange(8 * header, 8 * len(data)) for _ in range(30)
    ]:
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        with pytest.raises(cs.ConsilienceError):
            Message.from_bytes(bytes(spoilt))
