"""Federations: who takes part, who sends to which agent, what is measured of clients, and what goes wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

import consilience as cs
from consilience.core.correction import Correction
from consilience.core.message import Message, Weights
from consilience.core.metrics import global_forgetting
from consilience.core.params import same
from consilience.core.schedule import Evaluate, Exchange, Train
from consilience.core.source import Tensors
from consilience.loop.agent import Agent
from consilience.loop.agents import Agents
from consilience.loop.result import Result
from restate import A, B, E, batches, entries, fit, mlp, near, plain, source, training

FEDAVG = cs.methods.fedavg()
MANY = [source(f"s{i}", 4 + i, seed=i) for i in range(12)]
FOUR = [A, B, E, source("d", 17, seed=4)]


def refused(match, make, *args, **more):
    with pytest.raises(cs.ConsilienceError) as error:
        schedule = make(*args, **more)
        list(schedule.plan(0))
    assert match in str(error.value), str(error.value)


def turns(schedule, seed=0):
    """(who trains, their fractions, who sends to the server) of each round: what lies between two stages."""
    found, now = [], [(), {}, ()]
    for p in schedule.plan(seed):
        if isinstance(p, Train):
            now[:2] = [
                tuple(int(c.rpartition("-")[2]) for c in p.who),
                {int(c.rpartition("-")[2]): w for c, w in p.fractions.items()},
            ]
        elif isinstance(p, Exchange) and "server" in p.who:
            now[2] = tuple(int(c.rpartition("-")[2]) for c in p.who["server"])
        elif isinstance(p, Evaluate):
            found.append(tuple(now))
            now = [(), {}, ()]
    return found


def server(sources, rounds=1, learn=None, start=None, weights=None):
    """Plain federated averaging of everybody; the n-th visit draws as a run does."""
    now = start or entries(plain())
    for r in range(rounds):
        nets = [entries((learn or fit)(plain(params=now), s, visit=r)) for s in sources]
        now = mean(nets, weights or [len(s.train) for s in sources])
    return now


def mean(rows, weights):
    total = sum(weights)
    return {n: sum(w / total * r[n] for r, w in zip(rows, weights, strict=True)) for n in rows[0]}


def go(schedule, method=FEDAVG, **more):
    return cs.run(schedule, method, mlp(), training(), **more)


# Who takes part.


@settings(max_examples=25, deadline=None)
@given(
    fraction=st.floats(0.01, 1),
    order=st.sampled_from(["uniform", "cyclic", "weighted"]),
    slow=st.floats(0, 1),
    out=st.floats(0, 0.95),
    seed=st.integers(0, 9),
)
def test_a_round_has_its_share_and_nobody_twice(fraction, order, slow, out, seed):
    made = cs.settings.federated(MANY, 6, order=order, participation=fraction, stragglers=slow, dropouts=out)
    found = turns(made, seed)
    assert found == turns(made, seed)
    k = max(1, int(fraction * 12 + 0.5))
    for who, work, senders in found:
        assert len(set(who)) == len(who) == k
        assert set(senders) <= set(who) >= set(work)
        assert abs(len(work) - slow * k) < 1 and abs(k - len(senders) - out * k) < 1
        assert all(0 <= w < 1 for w in work.values())


def test_plans_differ_by_seed_alone():
    made = cs.settings.federated(MANY, 9, participation=0.4, stragglers=0.5, dropouts=0.5)
    assert turns(made, 0) == turns(made, 0) != turns(made, 1)


def fits(counts, shares):
    """A chi-squared test that fails once in 10,000."""
    counts, expected = np.array(counts), sum(counts) * np.array(shares)
    return ((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, len(counts) - 1)


def test_shares_hold_over_many_rounds():
    found = turns(cs.settings.federated(MANY, 3000, participation=1 / 12, stragglers=0.3, dropouts=0.2), 3)
    counts = [sum(who == (i,) for who, _, _ in found) for i in range(12)]
    assert fits(counts, [1 / 12] * 12)
    for share, some in (
        (0.3, sum(bool(work) for _, work, _ in found)),
        (0.2, sum(not senders for _, _, senders in found)),
    ):
        assert fits([some, 3000 - some], [share, 1 - share])
    fractions = [w for _, work, _ in found for w in work.values()]
    assert fits(np.histogram(fractions, 10, (0, 1))[0], [0.1] * 10)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.5, 0.5]])
def test_weighted_draws_are_one_after_another_in_proportion(weights):
    made = cs.settings.federated(FOUR, 3000, 2, "weighted", weights=weights)
    found = turns(made)
    w = np.array(weights or [len(s.train) for s in FOUR], dtype=float)
    share = {}
    for i, j in permutations(range(4), 2):  # without replacement: the second among those that are left
        pair = tuple(sorted((i, j)))
        share[pair] = share.get(pair, 0) + w[i] / w.sum() * w[j] / (w.sum() - w[i])
    assert fits([sum(who == pair for who, _, _ in found) for pair in share], list(share.values()))
    never = turns(cs.settings.federated(FOUR, 50, 3, "weighted", weights=[1, 0, 2, 0]))
    assert {who for who, _, _ in never} == {(0, 2)}


def test_traces_say_who_is_there():
    there = [[0, 1, 2, 3, 4], [7], [], [9, 8]]
    found = turns(cs.settings.federated(MANY, 8, 3, available=there))
    for n, (who, _, senders) in enumerate(found):
        assert set(who) <= set(there[n % 4]) and len(who) == min(3, len(there[n % 4])) and senders == who
    mapped = turns(cs.settings.federated(MANY, 4, available={0: [1], 3: (2, 5)}))
    assert [who for who, _, _ in mapped] == [(1,), (), (), (2, 5)]
    drawn = turns(cs.settings.federated(MANY, 4, available=lambda n, seed: [n, seed]), 7)
    assert [who for who, _, _ in drawn] == [(0, 7), (1, 7), (2, 7), (3, 7)]
    fewest = turns(cs.settings.federated(MANY, 4, available=there, min_clients=2))
    assert [len(who) for who, _, _ in fewest] == [5, 0, 0, 2]
    cyclic = turns(cs.settings.federated(MANY[:6], 3, 2, "cyclic", available=[[0, 2, 3], range(6), range(6)]))
    assert [who for who, _, _ in cyclic] == [(0, 2), (3, 4), (0, 5)]


def test_a_round_without_clients_leaves_all_as_it_is():
    result = go(cs.settings.federated(FOUR, 3, available={1: [0]}))
    assert np.array_equal(result.matrix[0], result.matrix[1])
    assert np.array_equal(result.matrix[2], result.matrix[3]) and not np.array_equal(
        result.matrix[1], result.matrix[2]
    )
    near(result.params, entries(fit(plain(), A)))


def test_streams_take_part_while_they_have_a_source():
    streams = [[A, B], [E], [FOUR[3]]]
    made = cs.settings.federated_continual(streams, 2, participation=0.5, evaluate_every=3)
    assert [p.name for p in made.plan(0) if isinstance(p, Evaluate)] == ["round 3", "round 4"]
    learns = [p.who for p in made.plan(0) if isinstance(p, Train)]
    assert [len(w) for w in learns] == [2, 2, 1, 1] and learns[2:] == [{"client-0": ("b",)}] * 2


def test_evaluations_come_as_often_as_asked():
    every, some = (go(cs.settings.federated(FOUR, 5, 2, evaluate_every=n)) for n in (1, 2))
    assert some.stages == ("round 2", "round 4", "round 5")
    assert np.array_equal(some.matrix, every.matrix[[0, 2, 4, 5]]) and same(every.params, some.params)


def test_stragglers_do_their_part_alone():
    made = cs.settings.federated(FOUR, 1, stragglers=1.0)
    (_, work, _), steps = turns(made)[0], {}

    def learn(net, s, visit):
        total = 2 * -(-len(s.train) // 8)
        steps[s.name] = max(1, round(work[FOUR.index(s)] * total))
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _, (_, _, x, y) in zip(range(steps[s.name]), batches(s, visit), strict=False):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()
        return net

    near(go(made).params, server(FOUR, learn=learn))
    assert (
        len(set(work.values())) == 4
        and sum(steps.values()) < 2 * sum(-(-len(s.train) // 8) for s in FOUR) - 4
    )


def test_who_dropped_out_begins_again_from_the_server():
    """Trained, but not sent: the server stays as it is, and the client goes on from it, not from its own."""
    who = {"client-0": ("server",)}
    plan = [
        Exchange(who),
        Train({"client-0": ("a",)}),
        Evaluate("dropped"),
        Exchange(who),
        Train({"client-0": ("a",)}),
        Exchange({"server": ("client-0",)}),
        Evaluate("received"),
    ]
    made = cs.core.schedule.build("federated", [A], "domain", lambda seed: iter(plan), "server")
    result = go(made)
    near(result.params, entries(fit(plain(), A, visit=1)))
    assert np.array_equal(result.matrix[0], result.matrix[1])
    drawn = cs.settings.federated([A], 6, dropouts=0.5)
    senders = [bool(h) for _, _, h in turns(drawn)]
    assert 0 < sum(senders) < 6
    now = entries(plain())
    for visit, there in enumerate(senders):
        now = entries(fit(plain(params=now), A, visit=visit)) if there else now
    near(go(drawn).params, now)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"participation": 0}, "`participation` must be in (0, 1], got 0."),
        ({"participation": 1.2}, "`participation` must be in (0, 1], got 1.2."),
        ({"participation": float("nan")}, "`participation` must be in (0, 1]"),
        (
            {"participation": 0.5, "clients_per_round": 2},
            "got both `clients_per_round=2` and `participation=0.5`; give one of them.",
        ),
        ({"clients_per_round": 0}, "`clients_per_round` must be from 1 to 4, got 0."),
        ({"order": "random"}, "`order` must be uniform, cyclic or weighted, got 'random'."),
        (
            {"weights": [1, 1, 1, 1]},
            "`weights` need `order='weighted'`, got 'uniform'.",
        ),
        (
            {"order": "weighted", "weights": [1, -1, 1, 1]},
            "`weights` must be 4 finite numbers >= 0, one per client and not all 0, got [1, -1, 1, 1].",
        ),
        ({"order": "weighted", "weights": [0, 0, 0, 0]}, "not all 0, got [0, 0, 0, 0]."),
        ({"order": "weighted", "weights": [1]}, "`weights` must be 4 finite numbers >= 0"),
        ({"stragglers": -0.1}, "`stragglers` must be in [0, 1], got -0.1."),
        ({"dropouts": 1.0}, "`dropouts` must be in [0, 1), got 1.0."),
        (
            {"min_clients": 0},
            "`min_clients` must be from 1 to 4, the clients of a round, got 0.",
        ),
        ({"min_clients": 3, "participation": 0.5}, "`min_clients` must be from 1 to 2"),
        (
            {"evaluate_every": 0},
            "`evaluate_every` must be a whole number >= 1, got 0.",
        ),
        ({"available": [[0, 4]]}, "clients in `available` must be numbers from 0 to 3, got [0, 4]."),
        ({"available": {2: ["a"]}}, "clients in `available` must be numbers from 0 to 3, got ['a']."),
        (
            {"available": lambda n, seed: [9]},
            "clients in `available` must be numbers from 0 to 3, got [9].",
        ),
        (
            {"available": 3},
            "`available` must be a list of lists of clients, a mapping from rounds to them, or a function",
        ),
        (
            {"available": [[]]},
            "no round has at least 1 available clients: the most in 20 rounds, by `available`, is 0.",
        ),
        (
            {"available": {99: [1]}},
            "no round has at least 1 available clients: the most in 20 rounds, by `available`, is 0.",
        ),
        ({"available": lambda n, seed: []}, "no round has at least 1 available clients: "),
        (
            {"available": [[1]], "min_clients": 2},
            "no round has at least 2 available clients: the most in 20 rounds, by `available`, is 1.",
        ),
    ],
)
def test_bad_participation_is_refused(more, match):
    refused(match, cs.settings.federated, FOUR, **more)


def test_no_client_in_any_round_stops_before_the_run(tmp_path):
    with pytest.raises(cs.ConsilienceError, match="no round has at least 1 available clients"):
        go(cs.settings.federated(FOUR, 2, available=lambda n, seed: []), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_clients_are_refused():
    refused("sources must have names of their own, got a twice.", cs.settings.federated, [A, B, A])
    refused("sources must have names of their own, got a twice.", cs.settings.gossip, [A, A])
    refused("every client must have a source, got one without.", cs.settings.federated_continual, [[A], []])
    with pytest.raises(
        cs.ConsilienceError, match=r"a source must have training examples, got none in 'empty'"
    ):
        source("empty", 0)


def test_other_names_or_shapes_are_refused():
    agent = Agent
    schedule = cs.settings.federated([A], 1)
    state = cs.core.state.State(*[entries(plain()) if i != 1 else {} for i in range(3)], "given")
    receiver = agent("server", mlp(), FEDAVG, schedule, training(), 0, state, cs.loop.ledger.Ledger())

    def message(params):
        return Message(
            "odd", "", 1, 3, "given", "", {"model": Weights({f"params/{n}": p for n, p in params.items()})}
        )

    good = entries(plain())
    with pytest.raises(
        cs.ConsilienceError,
        match=r"must have the receiver's names, got 'module.1.weight' of 'odd', here '1.weight'",
    ):
        receiver.receive([message({f"module.{n}": p for n, p in good.items()})])
    with pytest.raises(
        cs.ConsilienceError, match=r"must have the receiver's shapes, got \(2, 2\) for '1.weight' of 'odd'"
    ):
        receiver.receive([message({**good, "1.weight": torch.zeros(2, 2)})])
    receiver.receive([message(good)])


# Who receives from which senders.


@pytest.mark.parametrize("by_size", [True, False])
def test_everybody_receives_from_all_as_a_server_would(by_size):
    served = go(cs.settings.federated(FOUR, 3, by_size=by_size))
    weights = [len(s.train) if by_size else 1 for s in FOUR]
    near(served.params, server(FOUR, 3, weights=weights), 1e-11)
    for evaluated in (0, 2):
        alone = go(cs.settings.gossip(FOUR, 3, by_size=by_size, evaluated=evaluated))
        near(alone.params, served.params)
        assert alone.agent.name == f"client-{evaluated}"
        np.testing.assert_allclose(alone.matrix, served.matrix)
    edges = [(i, j) for i in range(4) for j in range(i)]
    near(go(cs.settings.gossip(FOUR, 3, edges, by_size=by_size)).params, served.params)
    near(go(cs.settings.gossip(FOUR, 3, "regular", 3, by_size=by_size)).params, served.params)


@pytest.mark.parametrize("edges", [1, 2, 4, [[3, 0], [1], [2]]])
def test_edges_below_a_server_average_as_one_server(edges):
    made = cs.settings.hierarchical(FOUR, edges, 3)
    near(go(made).params, go(cs.settings.federated(FOUR, 3)).params)
    same_sizes = [source(n, 20, seed=i) for i, n in enumerate("wxyz")]
    equal = go(cs.settings.hierarchical(same_sizes, 2, 2, by_size=False))
    near(equal.params, go(cs.settings.federated(same_sizes, 2, by_size=False)).params)


def test_edge_rounds_and_dropouts_are_what_they_say():
    result = go(cs.settings.hierarchical(FOUR, 2, 1, edge_rounds=2))
    halves = [server(own, 2) for own in (FOUR[:2], FOUR[2:])]
    near(result.params, mean(halves, [len(A.train) + len(B.train), len(E.train) + len(FOUR[3].train)]))
    made = cs.settings.hierarchical(MANY, 3, 30, participation=0.3, dropouts=0.5)
    for p in made.plan(0):
        if isinstance(p, Exchange) and "server" in p.who:
            assert all(p.who.values())
        assert not (isinstance(p, Exchange) and any(not s for s in p.who.values()))


def test_a_ring_mixes_neighbours():
    nets = [entries(fit(plain(), s)) for s in FOUR]
    sizes = [len(s.train) for s in FOUR]
    for i in (0, 3):
        near_by = [(i - 1) % 4, i, (i + 1) % 4]
        expected = mean([nets[j] for j in near_by], [sizes[j] for j in near_by])
        near(go(cs.settings.gossip(FOUR, 1, "ring", evaluated=i)).params, expected)
    line = go(cs.settings.gossip(FOUR, 1, [(0, 1), (1, 2), (2, 3)], by_size=False))
    near(line.params, mean(nets[:2], [1, 1]))


@pytest.mark.parametrize("graph", ["ring", "regular"])
def test_agents_come_to_agree_on_the_average(graph, monkeypatch):
    """Exchanges without training: all agree to 1e-6, on the average by examples if the graph is regular."""
    agents, make = {}, Agents.__missing__
    monkeypatch.setattr(Agents, "__missing__", lambda made, name: agents.setdefault(name, make(made, name)))
    six = MANY[:6]
    go(cs.settings.gossip(six, 1, graph, 2, mixings=60))
    expected = mean([entries(fit(plain(), s)) for s in six], [len(s.train) for s in six])
    assert len(agents) == 6
    for a in agents.values():
        near(a.state.params, expected, 1e-6)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 12), degree=st.integers(1, 11), seed=st.integers(0, 5))
def test_regular_graphs_are_regular(n, degree, seed):
    from consilience.settings._rounds import neighbours

    if degree >= n or degree * n % 2:
        refused("`degree` must be from 1 to", cs.settings.gossip, MANY[:n], graph="regular", degree=degree)
        return
    draw = neighbours("regular", n, degree)
    near_by = draw(seed, 0, 0)
    assert near_by == draw(seed, 0, 0)
    assert all(len(set(own)) == degree and i not in own for i, own in enumerate(near_by))
    assert all(i in near_by[j] for i, own in enumerate(near_by) for j in own)
    if n > 6 and degree == 2:
        assert len({tuple(draw(seed, r, m)) for r in range(2) for m in range(2)}) > 1


@pytest.mark.parametrize(
    ("make", "args", "more", "match"),
    [
        (
            "gossip",
            (FOUR,),
            {"graph": "star"},
            "`graph` must be complete, ring, regular or a list of pairs",
        ),
        (
            "gossip",
            (FOUR,),
            {"graph": [(0, 1), (2, 3)]},
            "`graph` must connect all agents, got one without a path from agent 0 to agent 2.",
        ),
        (
            "gossip",
            (FOUR,),
            {"graph": [(0, 0)]},
            "an edge of `graph` must be two different agents from 0 to 3, got (0, 0).",
        ),
        ("gossip", (FOUR,), {"graph": [(0, 7)]}, "two different agents from 0 to 3, got (0, 7)."),
        ("gossip", ([A],), {}, "gossip needs two agents or more, got 1."),
        ("gossip", (FOUR,), {"evaluated": 4}, "`evaluated` must be from 0 to 3, got 4."),
        ("gossip", (FOUR,), {"mixings": 0}, "`mixings` must be a whole number >= 1, got 0."),
        ("gossip", (FOUR,), {"min_clients": 5}, "`min_clients` must be from 1 to 4"),
        ("hierarchical", (FOUR, 5), {}, "`edges` must be from 1 to the 4 clients, got 5."),
        (
            "hierarchical",
            (FOUR, [[0, 1], [1, 2, 3]]),
            {},
            "lists that have each client from 0 to 3 once, got",
        ),
        ("hierarchical", (FOUR, [[0, 1, 2, 3], []]), {}, "lists that have each client from 0 to 3 once, got"),
        ("hierarchical", (FOUR,), {"edge_rounds": 0}, "`edge_rounds` must be a whole number >= 1, got 0."),
    ],
)
def test_bad_graphs_are_refused(make, args, more, match):
    refused(match, getattr(cs.settings, make), *args, **more)


def test_deltas_need_a_common_base():
    median = cs.methods.finetune() + cs.methods.aggregate(cs.aggregators.median())
    with pytest.raises(cs.ConsilienceError, match="combines deltas from the receiver's own parameters"):
        go(cs.settings.gossip(FOUR, 2, "ring"), median)
    near(go(cs.settings.gossip(FOUR, 2), median).params, go(cs.settings.federated(FOUR, 2), median).params)


# What is measured.


def score(params, s):
    x, y = s.test.whole()
    return float((plain(params=params)(x).argmax(1) == y).double().mean())


def test_drift_and_local_scores_are_what_they_say(tmp_path):
    made = cs.settings.federated(FOUR, 2)
    result, without = go(made, judge_clients=True, out=tmp_path / "run"), go(made)
    assert same(result.params, without.params) and np.array_equal(result.matrix, without.matrix)
    assert not without.client_drift and not without.local and without.personal is None

    now, drift, local = entries(plain()), [], []
    flat = lambda p: torch.cat([p[n].flatten() for n in sorted(p)])  # noqa: E731
    for r in range(2):
        nets = [entries(fit(plain(params=now), s, visit=r)) for s in FOUR]
        new = mean(nets, [len(s.train) for s in FOUR])
        steps, step = [flat(p) - flat(now) for p in nets], flat(new) - flat(now)
        far = [float(d.norm()) for d in steps]
        cosine = float(np.mean([float(d @ step / d.norm() / step.norm()) for d in steps]))
        drift.append(
            {
                "stage": r + 1,
                "agent": "server",
                "clients": 4,
                "distance": np.mean(far),
                "distance_max": max(far),
                "cosine": cosine,
            }
        )
        for i, (s, p) in enumerate(zip(FOUR, nets, strict=True)):
            others = [o for o in FOUR if o is not s]
            local.append(
                {
                    "stage": r + 1,
                    "agent": f"client-{i}",
                    "own_before": score(now, s),
                    "own_after": score(p, s),
                    "others_before": np.mean([score(now, o) for o in others]),
                    "others_after": np.mean([score(p, o) for o in others]),
                }
            )
        now = new
    for mine, theirs in ((drift, result.client_drift), (local, result.local)):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-12)
    assert result.personal == {d["agent"]: d["own_after"] for d in result.local[-4:]}
    assert result.local_forgetting == pytest.approx(
        np.mean([d["others_before"] - d["others_after"] for d in local])
    )

    back = cs.report.load(tmp_path / "run")
    assert (list(back.client_drift), list(back.local), back.personal) == (
        list(result.client_drift),
        list(result.local),
        result.personal,
    )
    text = result.table()
    assert all(
        n in text for n in ("worst tenth", "spread", "local forgetting", "global forgetting", "personal")
    )
    assert "worst tenth" not in without.table()
    old = {k: v for k, v in without.to_json().items() if k not in ("client_drift", "local", "personal")}
    assert Result.from_json(json.loads(json.dumps(old))).personal is None


def test_drift_is_of_those_that_began_where_the_receiver_did():
    found = {
        g: {d["stage"] for d in go(cs.settings.gossip(FOUR, 2, g), judge_clients=True).client_drift}
        for g in ("ring", "complete")
    }
    assert found == {"ring": {1}, "complete": {1, 2}}  # after the first round of a ring all begin elsewhere


def test_others_are_none_where_all_share_a_test():
    parts = cs.data.iid(source("whole", 40), 3)
    result = go(cs.settings.federated(parts, 1), judge_clients=True)
    assert {d["others_before"] for d in result.local} == {None} and result.local_forgetting is None


def test_fairness_and_forgetting_of_a_matrix():
    m = np.array([[1.0, 0, 0, 0], [0.9, 0.2, 0.5, 0.4], [0.7, 0.6, 0.5, 0.1], [0.8, 0.4, 0.5, 0.3]])
    common = {
        "setting": "federated",
        "data": "d",
        "method": "m",
        "model": "x",
        "metric": "accuracy",
        "seed": 0,
    }
    result = Result(
        **common,
        sources=tuple("abcd"),
        stages=tuple("123"),
        learned_at=(None,) * 4,
        matrices=m[None],
        costs={},
    )
    assert result.worst() == result.worst(0.25) == pytest.approx(0.3)
    assert (
        result.worst(0.5) == pytest.approx(0.35)
        and result.worst(0.51) == pytest.approx(0.4)
        and result.worst(1) == 0.5
    )
    assert result.spread == pytest.approx(np.std([0.8, 0.4, 0.5, 0.3]))
    assert result.forgetting is None and result.global_forgetting == pytest.approx((0.1 + 0.2 + 0 + 0.1) / 4)
    assert global_forgetting(m[:2]) is None
    with pytest.raises(cs.ConsilienceError, match=r"`fraction` must be in \(0, 1\], got 0"):
        result.worst(0)
    once = go(cs.settings.continual([A, B, E], "domain"), cs.methods.finetune())
    assert once.forgetting is not None and once.global_forgetting is not None


def test_personal_scores_after_a_last_visit():
    result = go(cs.settings.federated(FOUR, 2, clients_per_round=2, personalise=True))
    plain_one = go(cs.settings.federated(FOUR, 2, clients_per_round=2))
    assert same(result.params, plain_one.params) and np.array_equal(result.matrix, plain_one.matrix)
    seen = [who for who, _, _ in turns(cs.settings.federated(FOUR, 2, clients_per_round=2))]
    visits = [sum(i in who for who in seen) for i in range(4)]
    start = dict(result.params)
    expected = [
        score(entries(fit(plain(params=start), s, visit=v)), s) for s, v in zip(FOUR, visits, strict=True)
    ]
    assert result.personal == {f"client-{i}": pytest.approx(v) for i, v in enumerate(expected)}
    assert plain_one.personal is None


def test_personal_heads_judge_clients():
    """A client is judged with the head that never left it."""
    heads = cs.Method("heads", personal=("3.*",))
    result = go(cs.settings.federated([A, B], 2, personalise=True), heads)
    now, own = entries(plain()), {}
    for r in range(3):
        nets = []
        for i, s in enumerate((A, B)):
            mine = {**now, **own.get(i, {})}
            nets.append(entries(fit(plain(params=mine), s, visit=r)))
            own[i] = {n: p for n, p in nets[-1].items() if n.startswith("3.")}
        if r < 2:
            now = {**now, **{n: p for n, p in mean(nets, [30, 21]).items() if not n.startswith("3.")}}
    near(result.params, now)
    assert result.personal == {f"client-{i}": pytest.approx(score(nets[i], s)) for i, s in enumerate((A, B))}


def test_clients_are_resumed_to_the_same_lists(tmp_path):
    made = cs.settings.federated(FOUR, 3, clients_per_round=3, personalise=True)
    whole = go(made, judge_clients=True, out=tmp_path / "whole")

    def progress(line):
        if line.get("event") == "checkpoint" and line["steps"] == 19:  # inside the third visit of the round
            raise KeyboardInterrupt

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        go(made, judge_clients=True, out=out, checkpoint_steps=19, progress=progress)
    again = go(made, judge_clients=True, out=out, resume=True)
    assert same(whole.params, again.params)
    assert list(again.client_drift) == list(whole.client_drift) and list(again.local) == list(whole.local)
    assert again.personal == whole.personal and len(whole.local) == 9 + 4


# What goes wrong.


class Flaky(Tensors):
    """Examples on a disk that may be gone."""

    gone: ClassVar[bool] = False

    def map(self, x=None, y=None):
        t = super().map(x, y)
        return Flaky(t.x, t.y)

    def batches(self, plan):
        for i, index in enumerate(plan):
            if Flaky.gone and i:
                raise OSError("the disk is gone")
            yield self.x[index], self.y[index]


@pytest.fixture
def flaky(monkeypatch):
    """Four sources, the second of which fails after its first step while `Flaky.gone`."""
    monkeypatch.setattr(Flaky, "gone", True)
    b = cs.core.source.replace(B, train=Flaky(*B.train.whole()))
    return [A, b, E, FOUR[3]]


def failures(out):
    return [
        line
        for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if line["event"] == "failed"
    ]


def test_a_round_goes_on_without_a_client_that_fails(flaky, tmp_path):
    made = cs.settings.federated(flaky, 2, min_clients=3)
    with pytest.warns(UserWarning, match="'client-1' failed and is left out: the disk is gone"):
        result = go(made, out=tmp_path / "run")
    near(result.params, server([A, E, FOUR[3]], 2))
    found = failures(tmp_path / "run")
    assert [(f["agent"], f["why"]) for f in found] == [("client-1", "OSError: the disk is gone")] * 2


def test_a_client_that_diverges_is_left_out(tmp_path):
    wild = source("wild", 24, seed=8)
    wild = wild.map(x=lambda x: x * 1e200)
    with pytest.warns(
        UserWarning,
        match="'client-1' failed and is left out: training diverged: the training loss of 'wild' is NaN",
    ):
        result = go(cs.settings.federated([A, wild, E], 2, min_clients=1), out=tmp_path / "run")
    near(result.params, server([A, E], 2))
    assert "in 'client-1' on 'wild'" in failures(tmp_path / "run")[0]["why"]
    with pytest.raises(cs.ConsilienceError, match="training diverged: .*'client-1' on 'wild'.*a lower `lr`"):
        go(cs.settings.federated([A, wild, E], 2))


@pytest.mark.parametrize("least", [None, 4])
def test_too_few_stop_the_run_which_goes_on_once_mended(flaky, least, tmp_path):
    made = cs.settings.federated(flaky, 2, min_clients=least)
    if least is None:
        with pytest.raises(OSError, match="the disk is gone") as error:
            go(made, out=tmp_path / "run")
        assert error.value.__notes__ == ["while 'client-1' trained on b"]
    else:
        match = "at least 4 agents must finish a round, and 3 did: 'client-1': OSError: the disk is gone."
        with pytest.raises(cs.ConsilienceError, match=match), pytest.warns(UserWarning, match="left out"):
            go(made, out=tmp_path / "run", judge_clients=True)
        assert failures(tmp_path / "run")[0]["agent"] == "client-1"
    Flaky.gone = False
    again = go(made, out=tmp_path / "run", resume=True, judge_clients=least is not None)
    never = go(cs.settings.federated(FOUR, 2, min_clients=least), judge_clients=least is not None)
    assert same(again.params, never.params) and np.array_equal(again.matrix, never.matrix)
    assert list(again.local) == list(never.local) and list(again.client_drift) == list(never.client_drift)


def test_who_dropped_out_and_who_failed_leave_the_server(flaky, monkeypatch):
    """Nobody sends in the first round: in the second the server sends what it had."""
    down, up = {f"client-{i}": ("server",) for i in (0, 1)}, Exchange({"server": ("client-1",)})
    learn = Train({"client-0": ("a",), "client-1": ("b",)}, least=1)
    plan = [
        Exchange(down),
        learn,
        up,
        Evaluate("lost"),
        Exchange(down),
        learn,
        Exchange({"server": ("client-0",)}),
        Evaluate("received"),
    ]
    made = cs.core.schedule.build("federated", flaky[:2], "domain", lambda seed: iter(plan), "server")
    with pytest.warns(UserWarning, match="left out"):
        result = go(made)
    assert np.array_equal(result.matrix[0], result.matrix[1])
    near(result.params, entries(fit(plain(), A, visit=1)))


def test_an_edge_whose_clients_all_failed_weighs_nothing(flaky):
    for by_size in (True, False):
        with pytest.warns(UserWarning, match="left out"):
            result = go(cs.settings.hierarchical(flaky, [[0, 2, 3], [1]], 2, min_clients=2, by_size=by_size))
        three = [A, E, FOUR[3]]
        near(result.params, server(three, 2, weights=None if by_size else [1, 1, 1]))


def test_an_agent_that_failed_receives_from_its_neighbours(flaky):
    with pytest.warns(UserWarning, match="left out"):
        result = go(cs.settings.gossip(flaky, 1, mixings=2, min_clients=2, evaluated=1))
    near(result.params, server([A, E, FOUR[3]]), 1e-12)


def test_an_agent_that_failed_sends_what_it_received(flaky):
    """On a ring: 1 fails and receives from 0 and 2; then 0 from 3, 0 and 1, each with the sizes it mixed."""
    with pytest.warns(UserWarning, match="left out"):
        result = go(cs.settings.gossip(flaky, 1, "ring", mixings=2, min_clients=2))
    nets = {i: entries(fit(plain(), FOUR[i])) for i in (0, 2, 3)}
    once = {0: (3, 0), 1: (0, 2), 3: (2, 3, 0)}
    sizes = {i: [len(FOUR[j].train) for j in own] for i, own in once.items()}
    mixed = {i: mean([nets[j] for j in own], sizes[i]) for i, own in once.items()}
    near(result.params, mean([mixed[i] for i in (3, 0, 1)], [sum(sizes[i]) for i in (3, 0, 1)]))


def test_who_failed_is_known_after_a_cut(flaky, tmp_path):
    made = cs.settings.federated(flaky, 2, min_clients=2)

    def progress(line):
        # Round 2, inside the visit after the failing one.
        if line["event"] == "checkpoint" and line["steps"] == 34:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="left out"), pytest.raises(KeyboardInterrupt):
        go(made, out=tmp_path / "cut", checkpoint_steps=34, progress=progress)
    near(go(made, out=tmp_path / "cut", resume=True).params, server([A, E, FOUR[3]], 2))


def test_all_of_it_together_repeats_and_ends(tmp_path):
    made = cs.settings.federated(
        MANY,
        6,
        order="weighted",
        participation=0.5,
        available=[range(8), range(4, 12)],
        stragglers=0.4,
        dropouts=0.3,
        min_clients=2,
        evaluate_every=4,
        personalise=True,
    )
    one, two = (go(made, judge_clients=True, repeats=2) for _ in range(2))
    assert (
        same(one.params, two.params)
        and np.array_equal(one.matrices, two.matrices)
        and one.personal == two.personal
    )
    assert one.stages == ("round 4", "round 6") and len(one.personal) == 12
    assert not np.array_equal(one.matrices[0], one.matrices[1])


def test_the_command_line_takes_it(tmp_path, capsys):
    from consilience.cli.main import main

    argv = "run --setting federated --setting.rounds 2 --split.clients 4 --setting.participation 0.5 "
    argv += "--setting.personalise true --judge_clients"
    assert main([*argv.split(), "--out", str(tmp_path / "run")]) == 0
    assert "worst tenth" in capsys.readouterr().out
    assert len(cs.report.load(tmp_path / "run").personal) == 4
    assert main(["run", "--setting", "federated", "--setting.participation", "1.5"]) != 0
    assert "`participation` must be in (0, 1], got 1.5." in capsys.readouterr().err


@pytest.mark.parametrize("work", ["0.5", None, True, float("nan"), 0, 1.5, [0.5]])
def test_work_in_merging_is_a_fraction(work):
    refused(
        f"`fraction` must be a number in (0, 1], got {work!r}.",
        cs.settings.merging,
        [A, B],
        fraction=work,
    )


def test_work_where_experts_are_given_is_refused():
    experts = [cs.Expert(s.name, entries(plain()), s) for s in (A, B)]
    for those in (dict(experts=experts), dict(sources=experts)):
        refused(
            "`fraction` has no effect on experts that are given, got 0.1; leave it out.",
            cs.settings.merging,
            **those,
            fraction=0.1,
        )
        assert cs.settings.merging(**those, fraction=1)


@dataclass(frozen=True)
class Again(Correction):
    """Acts where it sees a source again."""

    needs_revisits: ClassVar[bool] = True


def test_what_acts_at_revisits_alone_needs_some():
    method = cs.Method("again", (Again(),))
    method.resolve(cs.settings.federated(FOUR, 2).survey())
    for once in (cs.settings.federated(FOUR, 1), cs.settings.continual(FOUR), cs.settings.merging(FOUR)):
        with pytest.raises(
            cs.Refusal, match="again: Again would do nothing .*trains on a source again, and here none"
        ):
            method.resolve(once.survey())
