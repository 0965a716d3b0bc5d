"""Federated methods against restatements in plain torch, over rounds with partial participation, and the
identities that they must satisfy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import consilience as cs
from consilience.consolidators.dynamic import Drift, Dynamic
from consilience.consolidators.normalised import Normalised
from consilience.core.contexts import Begun, Context
from consilience.core.correction import Correction
from consilience.core.names import PAST, SUM
from consilience.core.optimiser import SGD, Adagrad, Adam, Torch, Yogi
from consilience.core.params import same
from consilience.core.schedule import Evaluate, Exchange, Train, build
from consilience.core.source import Source, Target, Tensors
from consilience.core.state import decode_state, encode_state
from consilience.corrections.client_drift import GHBM, FedCM, FedDyn, LocalSteps, Scaffold
from consilience.corrections.outputs import WSM
from consilience.data.samplers import InOrder, Sampler
from consilience.loop.agents import Agents
from restate import (
    BATCH,
    EPOCHS,
    LR,
    A,
    B,
    C,
    E,
    batches,
    entries,
    final,
    fit,
    mlp,
    near,
    plain,
    sgd,
    source,
    stopped,
    training,
)

SGD0 = {"momentum": 0.0}
FAR = [A, B, E, source("f", 19, seed=6), source("g", 28, seed=7)]


def clients(n=3, size=None, **more):
    return [source(f"c{i}", size or 10 + 7 * i, seed=10 + i, **more) for i in range(n)]


def federated(s, rounds, k=None, order="cyclic"):
    return cs.settings.federated(s, rounds, k, order, scenario="domain")


def steps_of(s, epochs=EPOCHS, batch=BATCH):
    return epochs * -(-len(s.train) // batch)


def simulate(s, rounds, k, push, end=None, loss=None, pull=0.0, momentum=0.0, lr=LR):
    """Rounds by hand: `push(i, r, theta)` is added to every gradient of client i; `end(theta, {i: (share,
    params)})` is the server."""
    theta, visits, turn = entries(plain()), [0] * len(s), 0
    for r in range(rounds):
        chosen = sorted((turn + j) % len(s) for j in range(k))
        turn += k
        ends = {}
        for i in chosen:
            extra, net = push(i, r, theta), plain(params=theta)

            def bent(net, x, y, *_, i=i, extra=extra, start=theta):
                value = loss(i, net(x), y) if loss else F.cross_entropy(net(x), y)
                for n, p in net.named_parameters():
                    value = value + (extra[n] * p).sum() + pull / 2 * ((p - start[n]) ** 2).sum()
                return value

            fit(net, s[i], bent, visits[i], sgd(net, lr, momentum))
            visits[i] += 1
            ends[i] = (len(s[i].train), entries(net))
        total = sum(n for n, _ in ends.values())
        ends = {i: (n / total, p) for i, (n, p) in ends.items()}
        theta = end(theta, ends) if end else mean(ends)
    return theta


def mean(ends):
    first = next(iter(ends.values()))[1]
    return {n: sum(w * p[n] for w, p in ends.values()) for n in first}


def zeros():
    return {n: torch.zeros_like(p) for n, p in entries(plain()).items()}


# control variates and dynamic regularisation


@pytest.mark.parametrize("names", [(), ("the sum", "the past", "c2", "c3")], ids=["plain", "reserved"])
@pytest.mark.parametrize("n", [None, 4])
def test_scaffold_restated(n, names):
    """Also for sources that are called like keys of 0.1, in which a client "the sum" was taken for a
    server."""
    s, local = clients(4), {}
    s = [replace(client, name=name) for client, name in zip(s, names, strict=True)] if names else s

    def c():
        return {k: sum(v[k] for v in local.values()) / (n or max(1, len(local))) for k in zeros()}

    def push(i, r, theta):
        own = local.get(i, zeros())
        return {k: v - own[k] for k, v in c().items()} if local else zeros()

    def end(theta, ends):
        before, now = dict(local), c()
        for i, (_, p) in ends.items():
            own = before.get(i, zeros())
            local[i] = {k: own[k] - now[k] + (theta[k] - p[k]) / (steps_of(s[i]) * LR) for k in theta}
        return mean(ends)

    expected = simulate(s, 5, 3, push, end)
    near(final(federated(s, 5, 3), cs.methods.scaffold(n), **SGD0), expected, 1e-11)
    assert not same(final(federated(s, 5, 3), cs.methods.finetune(), **SGD0), expected)


def test_scaffold_with_all_clients_alike_is_fedavg():
    """Equal data, full batches: every c_i is c."""
    s = [replace(A, name=f"twin{i}") for i in range(3)]
    more = {**SGD0, "batch_size": 100}
    near(
        final(federated(s, 4), cs.methods.scaffold(), **more),
        final(federated(s, 4), cs.methods.finetune(), **more),
        1e-12,
    )


def test_scaffold_tells_the_sum_once_and_counts_clients():
    agent = cs.run(federated(clients(3), 4, 2), cs.methods.scaffold(), mlp(), training(**SGD0)).agent
    told = agent.state.memory["Scaffold"]
    assert float(told[""].tensors["count"]) == 3 and "gain" not in told[""].meta
    (message,) = [m for m in agent.send({}) if m.source == ""]
    assert set(message.items) == {"model", "Scaffold"}
    assert not [m for m in agent.send({}) if m.source], "the sum is told, and no client's own"
    with pytest.raises(
        cs.ConsilienceError, match="`clients` must be at least 3, as many as were received from, got 2"
    ):
        final(federated(clients(3), 3), cs.methods.scaffold(2), **SGD0)


def test_what_was_gained_in_two_learns_is_told_together():
    """An agent that trains twice before anybody receives from it."""
    s = clients(2)
    phases = [
        Exchange({"a": ("server",), "b": ("server",)}),
        Train({"a": ("c0",), "b": ("c1",)}),
        Train({"a": ("c0",)}),
    ]
    phases += [
        Exchange({"server": ("a", "b")}),
        Exchange({"a": ("server",)}),
        Train({"a": ("c0",)}),
        Exchange({"server": ("a",)}),
        Evaluate("end"),
    ]
    schedule = build("custom", s, "domain", lambda seed: iter(phases), "server")
    agent = cs.run(schedule, cs.methods.scaffold(), mlp(), training(**SGD0)).agent
    theta = entries(plain())
    net = plain(params=theta)
    fit(net, s[0], None, 0, sgd(net, LR, 0.0))
    middle = entries(net)
    fit(net, s[0], None, 1, sgd(net, LR, 0.0))
    first = {n: (middle[n] - p) / (steps_of(s[0]) * LR) for n, p in entries(net).items()}
    other = plain(params=theta)
    fit(other, s[1], None, 0, sgd(other, LR, 0.0))
    c1 = {n: (theta[n] - p) / (steps_of(s[1]) * LR) for n, p in entries(other).items()}
    ends = {0: (10 / 27, entries(net)), 1: (17 / 27, entries(other))}
    server = mean(ends)
    shift = {n: (first[n] + c1[n]) / 2 - first[n] for n in first}
    net = plain(params=server)
    fit(
        net,
        s[0],
        lambda net, x, y, *_: (
            F.cross_entropy(net(x), y) + sum((shift[n] * p).sum() for n, p in net.named_parameters())
        ),
        2,
        sgd(net, LR, 0.0),
    )
    near(agent.state.params, entries(net), 1e-11)
    c0 = {n: (server[n] - p) / (steps_of(s[0]) * LR) - shift[n] for n, p in entries(net).items()}
    near(agent.state.memory["Scaffold"][""].group("c"), {n: c0[n] + c1[n] for n in c0}, 1e-10)
    assert float(agent.state.memory["Scaffold"][""].tensors["count"]) == 2


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_feddyn_restated(alpha):
    s, h, server = clients(3), {}, {"h": zeros()}

    def push(i, r, theta):
        return {n: -v for n, v in h.get(i, zeros()).items()}

    def end(theta, ends):
        for i, (_, p) in ends.items():
            h[i] = {n: h.get(i, zeros())[n] - alpha * (p[n] - theta[n]) for n in theta}
        # Weights are shares of the received clients; among all they are less.
        average, part = mean(ends), sum(len(s[i].train) for i in ends) / sum(len(c.train) for c in s)
        server["h"] = {n: server["h"][n] - alpha * part * (average[n] - theta[n]) for n in theta}
        return {n: average[n] - server["h"][n] / alpha for n in theta}

    expected = simulate(s, 4, 2, push, end, pull=alpha)
    near(final(federated(s, 4, 2), cs.methods.feddyn(alpha), **SGD0), expected, 1e-10)


def test_feddyn_without_alpha_is_fedavg_and_its_h_stays():
    s = clients(3)
    assert same(final(federated(s, 3), cs.methods.feddyn(0.0)), final(federated(s, 3), cs.methods.fedavg()))
    assert not FedDyn.shared_items
    first = [final(federated(s, 1), m) for m in (cs.Method("dyn", (FedDyn(0.3),)), cs.methods.fedprox(0.3))]
    assert same(*first), "the first visit is FedProx"


# normalised averaging


def nova(theta, ends, steps):
    effective = sum(w * steps[i] for i, (w, _) in ends.items())
    return {
        n: theta[n] - effective * sum(w * (theta[n] - p[n]) / steps[i] for i, (w, p) in ends.items())
        for n in theta
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_restated(momentum):
    s = clients(3)

    def worth(k):
        far, v = 0.0, 0.0
        for _ in range(k):
            v = momentum * v + 1
            far += v
        return far

    steps = {i: worth(steps_of(c)) for i, c in enumerate(s)}
    expected = simulate(
        s, 4, 2, lambda *_: zeros(), lambda theta, ends: nova(theta, ends, steps), momentum=momentum
    )
    near(final(federated(s, 4, 2), cs.methods.fednova(), momentum=momentum), expected, 1e-11)
    assert len(set(steps.values())) > 1


def test_fednova_counts_the_steps_of_stragglers():
    s = clients(3, 16)
    work, steps = {"c1": 0.5}, {0: 4, 1: 2, 2: 4}
    phases = []
    for _ in range(2):
        who = {f"c{i}": ("server",) for i in range(3)}
        phases += [
            Exchange(who),
            Train({f"c{i}": (f"c{i}",) for i in range(3)}, work),
            Exchange({"server": tuple(who)}),
            Evaluate("round"),
        ]
    schedule = build("custom", s, "domain", lambda seed: iter(phases), "server")
    theta, server = entries(plain()), None
    for r in range(2):
        ends = {}
        for i in range(3):
            net = plain(params=theta)
            fit(net, s[i], None, r, sgd(net, LR, 0.0), epochs=EPOCHS * steps[i] // 4)
            ends[i] = (1 / 3, entries(net))
        theta = server = nova(theta, ends, steps)
    near(final(schedule, cs.methods.fednova(), **SGD0), server, 1e-11)


def test_fednova_with_equal_steps_is_fedavg():
    s = clients(3, 20)
    assert same(final(federated(s, 3), cs.methods.fednova()), final(federated(s, 3), cs.methods.fedavg()))


def test_fednova_needs_to_know_the_steps():
    method = cs.Method("nova", consolidator=Normalised())
    with pytest.raises(
        cs.ConsilienceError,
        match="need their number of steps, got none from 'client-0'",
    ):
        final(federated(clients(3), 1), method)
    nesterov = SGD(0.9, nesterov=True)
    direction, state, far = torch.zeros(1), nesterov.init(torch.zeros(1)), 0.0
    for _ in range(5):
        direction, state = nesterov.update(torch.ones(1), state, torch.zeros(1))
        far += float(direction)
    item = LocalSteps().summarise(_learned(5, nesterov), Context())
    assert abs(float(item.tensors["steps"]) - far) < 1e-5
    assert float(LocalSteps().summarise(_learned(5, Adam()), Context()).tensors["steps"]) == 5


def _learned(steps, inner):
    class Some:
        share = 1.0
        training = cs.Training(optimiser=inner)

    some = Some()
    some.steps = steps
    return some


# steps that are taken: stragglers, and samplers that plan epochs of other lengths


@pytest.mark.parametrize("engine", ["serial", "batched"])
@pytest.mark.parametrize("method", [cs.methods.fednova(), cs.methods.scaffold()], ids=lambda m: m.name)
def test_a_straggler_counts_the_steps_that_it_takes(method, engine):
    """Fractions that end inside an epoch: 1 step of 4, and 4 of 6."""
    s, work = [source(f"c{i}", 16 + 8 * i, seed=10 + i) for i in range(3)], {"c0": 0.3, "c1": 0.6}
    taken = {0: 1, 1: 4, 2: 8}
    who = {f"c{i}": ("server",) for i in range(3)}
    one = [
        Exchange(who),
        Train({n: (n,) for n in who}, work),
        Exchange({"server": tuple(who)}),
        Evaluate("r"),
    ]
    schedule = build("custom", s, "domain", lambda seed: iter(one + one + one), "server")

    theta, c = entries(plain()), {i: zeros() for i in range(3)}
    for r in range(3):
        ends, shift = {}, {n: sum(own[n] for own in c.values()) / 3 for n in theta}
        for i in range(3):
            net = plain(params=theta)
            for _, _, x, y in islice(batches(s[i], r), taken[i]):
                grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
                for (n, p), grad in zip(net.named_parameters(), grads, strict=True):
                    extra = shift[n] - c[i][n] if method.name == "scaffold" and r else 0.0
                    p.data -= LR * (grad + extra)
            ends[i] = (len(s[i].train) / 72, entries(net))
        for i, (_, end) in ends.items():
            c[i] = {n: c[i][n] - shift[n] + (theta[n] - end[n]) / (taken[i] * LR) for n in theta}
        theta = nova(theta, ends, taken) if method.name == "fednova" else mean(ends)

    run = cs.run(schedule, method, mlp(), training(**SGD0), engine=engine)
    near(run.agent.state.params, theta, 1e-11)


@dataclass(frozen=True)
class Growing(Sampler):
    """One batch in the first epoch, two in the second, and so on."""

    def plan(self, targets, batch_size, epoch, generator):
        return list(torch.arange(len(targets)).split(batch_size))[: epoch + 1]


@pytest.mark.parametrize("fraction", [1.0, 0.4])
@pytest.mark.parametrize("engine", ["serial", "batched"])
def test_epochs_of_other_lengths_are_counted(engine, fraction, tmp_path):
    """1 + 2 + 3 steps, or round(.4 x 6) = 2 of them. Twins have c_i = c, which is their mean gradient."""
    steps = {1.0: 6, 0.4: 2}[fraction]
    twins, who = [replace(A, name=f"t{i}") for i in range(2)], {"t0": ("server",), "t1": ("server",)}
    phases = [Exchange(who), Train({n: (n,) for n in who}, dict.fromkeys(who, fraction))]
    phases = [*phases, Exchange({"server": tuple(who)})] * 2 + [Evaluate("end")]
    schedule = build("custom", twins, "domain", lambda seed: iter(phases), "server")

    def go(**out):
        more = training(**SGD0, epochs=3, sampler=Growing())
        run = cs.run(schedule, cs.methods.scaffold(), mlp(), more, engine=engine, **out)
        return run.agent.state.memory["Scaffold"][SUM].group("c")

    net, (x, y) = plain(), A.train.whole()
    for _ in range(2):
        start = entries(net)
        for i in [i for epoch in range(3) for i in range(epoch + 1)][:steps]:
            loss = F.cross_entropy(net(x[8 * i : 8 * i + 8]), y[8 * i : 8 * i + 8])
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            for p, gradient in zip(net.parameters(), gradients, strict=True):
                p.data -= LR * gradient
    near(go(), {n: 2 * (start[n] - p) / (steps * LR) for n, p in entries(net).items()}, 1e-11)

    if engine == "serial" and fraction == 1:
        stopped(go, tmp_path, 16)
        assert same(go(out=tmp_path, resume=True), go())


# clients that are not received, and least squares in float64, whose optimum is known

SIZES = (12, 30, 18, 40)


def squares():
    """Clients with f_i = mean of (x theta - y)^2."""
    g, made = torch.Generator().manual_seed(5), []
    for i, n in enumerate(SIZES):
        x = torch.randn(n, 3, generator=g, dtype=torch.float64)
        y = x @ torch.randn(3, 1, generator=g, dtype=torch.float64)
        t = Tensors(x, y + 0.1 * torch.randn(n, 1, generator=g, dtype=torch.float64))
        made.append(Source(f"c{i}", t, t, t, (("space", "0"),), (0,), None, "value"))
    return made


def optimum(weights):
    """theta with sum_i w_i grad f_i = 0."""
    parts = [(w / len(s.train), *s.train.whole()) for w, s in zip(weights, squares(), strict=True)]
    second = sum(w * x.T @ x for w, x, _ in parts)
    return torch.linalg.solve(second, sum(w * x.T @ y for w, x, y in parts)).ravel()


def least_squares(schedule, method, engine="serial", **more):
    torch.manual_seed(0)
    given = {"epochs": 3, "batch_size": 100, "lr": 0.2, "sampler": InOrder(), **SGD0, **more}
    net = torch.nn.Linear(3, 1, bias=False)
    return cs.run(schedule, method, net, training(**given), engine=engine).params["weight"].ravel()


@pytest.fixture
def agents(monkeypatch):
    """The agents of the last run, by name."""
    kept, make = {}, Agents.__missing__

    def made(all_agents, name):
        kept[name] = make(all_agents, name)
        return kept[name]

    monkeypatch.setattr(Agents, "__missing__", made)
    return kept


FLAWS = {
    "dropouts": {"dropouts": 0.4},
    "partial": {"participation": 0.75},
    "stragglers": {"stragglers": 0.5},
    "all": {"participation": 0.75, "dropouts": 0.3, "stragglers": 0.4},
}


@pytest.mark.parametrize("engine", ["serial", "batched"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_the_server_holds_the_sum_of_what_clients_hold(flaw, engine, agents):
    """SCAFFOLD: sum_i c_i. FedDyn: u = sum_i w_i h_i / alpha, weighed as the mean is."""
    for method in (cs.methods.scaffold(4), cs.methods.feddyn(0.5)):
        for by_size in (True, False) if method.name == "feddyn" else (True,):
            schedule = cs.settings.federated(squares(), 6, by_size=by_size, evaluate_every=6, **FLAWS[flaw])
            least_squares(schedule, method, engine)
            name, kind = ("Scaffold", "c") if method.name == "scaffold" else ("FedDyn", "h")
            # Whoever dropped out of the last round puts its items back when it receives again.
            states = [agents[f"client-{i}"].state for i in range(4)]
            kept = [{**state.memory, **state.unsent}[name] for state in states]
            held = {i: items.get(f"c{i}") for i, items in enumerate(kept)}
            own = {i: item.group(kind)["weight"].ravel() for i, item in held.items() if item}
            server = agents["server"].state
            if kind == "c":
                total, expected = server.memory["Scaffold"][SUM].group("c")["weight"], sum(own.values())
            else:
                w = [n / 100 for n in SIZES] if by_size else [0.25] * 4
                total, expected = server.outer["drift"], sum(w[i] * h for i, h in own.items()) / 0.5
            assert len(own) == 4 and float((total.ravel() - expected).abs().max()) < 1e-12
            assert float(expected.abs().max()) > 1e-2


@pytest.mark.parametrize("engine", ["serial", "batched"])
@pytest.mark.parametrize("method", [cs.methods.scaffold(4), cs.methods.feddyn(1.0)], ids=lambda m: m.name)
def test_the_optimum_is_found_whatever_fails(method, engine):
    """SCAFFOLD ends at the optimum of the unweighted mean of losses, FedDyn at that which it averages by."""
    unweighted = optimum([1] * 4)
    weighted = unweighted if method.name == "scaffold" else optimum(SIZES)
    assert float((unweighted - optimum(SIZES)).norm()) > 0.15
    schedule = cs.settings.federated(squares(), 60, evaluate_every=60, **FLAWS["all"])
    assert float((least_squares(schedule, method, engine) - weighted).norm()) < 1e-3
    if method.name == "feddyn" and engine == "serial":
        equal = cs.settings.federated(squares(), 60, by_size=False, evaluate_every=60, **FLAWS["all"])
        assert float((least_squares(equal, method, engine) - unweighted).norm()) < 1e-3


def three_rounds(second, senders, totals=None):
    """All train in rounds 1 and 3, `second` in round 2; the server receives from `senders`."""
    names = [f"c{i}" for i in range(4)]
    phases = []
    for there, received in ((names, names), (second, senders), (names, names)):
        phases += [Exchange(dict.fromkeys(there, ("server",))), Train({n: (n,) for n in there})]
        phases += [Exchange({"server": tuple(received)}, True, totals or {})]
    return build("custom", squares(), "domain", lambda seed: iter([*phases, Evaluate("end")]), "server")


@pytest.mark.parametrize("engine", ["serial", "batched"])
@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fednova", "local_ghbm", "fedhbm", "ghbm", "fedcm"])
def test_a_client_that_is_not_received_has_not_taken_part(name, engine):
    """To the bit. Batches are full and in order, so that the number of a visit changes nothing."""
    method, some, every = getattr(cs.methods, name)(), ["c0", "c2", "c3"], ["c0", "c1", "c2", "c3"]
    dropped, absent = three_rounds(every, some, {"server": 100}), three_rounds(some, some, {"server": 100})
    found = least_squares(dropped, method, engine)
    assert torch.equal(found, least_squares(absent, method, engine))
    assert not torch.equal(found, least_squares(three_rounds(every, every), method, engine))


def test_what_is_put_back_survives_a_checkpoint(tmp_path):
    schedule = cs.settings.federated(squares(), 4, dropouts=0.5)
    for name in ("scaffold", "feddyn"):

        def go(name=name, **out):
            torch.manual_seed(0)
            net, more = torch.nn.Linear(3, 1, bias=False), training(**SGD0, sampler=InOrder())
            return cs.run(schedule, getattr(cs.methods, name)(), net, more, **out).params

        stopped(go, tmp_path / name, 53)
        assert same(go(out=tmp_path / name, resume=True), go())


def test_feddyn_is_refused_where_nobody_knows_who_may_send():
    every, some = ["c0", "c1", "c2", "c3"], ["c0", "c2", "c3"]
    with pytest.raises(cs.Refusal, match=r"the schedule must say what they weigh \(Exchange.totals\)"):
        least_squares(three_rounds(every, some), cs.methods.feddyn())
    with pytest.raises(cs.Refusal, match="they must send to one server"):
        edges = cs.settings.hierarchical(squares(), 2, 4, dropouts=0.5)
        least_squares(edges, cs.methods.feddyn())
    least_squares(cs.settings.hierarchical(squares(), 2, 2), cs.methods.feddyn())
    robust = replace(cs.methods.feddyn(), exchange_aggregator=cs.aggregators.median())
    with pytest.raises(cs.Refusal, match="Median leaves out some of what is received"):
        least_squares(cs.settings.federated(squares(), 2), robust)


# momentum


def history(tau, s, beta, alpha=1.0):
    past = [entries(plain())]

    def push(i, r, theta):
        if len(past) <= tau:
            return zeros()
        now, then = past[-1], past[-1 - tau]
        return {n: beta / (LR * tau * steps_of(s[i])) * (then[n] - now[n]) for n in theta}

    def end(theta, ends):
        past.append(mean(ends))
        return past[-1]

    return push, end


@pytest.mark.parametrize("tau", [1, 2, 3])
def test_ghbm_restated(tau):
    s = clients(3)
    expected = simulate(s, 6, 2, *history(tau, s, 0.8))
    near(final(federated(s, 6, 2), cs.methods.ghbm(0.8, tau), **SGD0), expected, 1e-11)


@pytest.mark.parametrize("tau", [1, 3])
def test_ghbm_is_the_heavy_ball_form_over_rounds(tau):
    """One client, one full step a round: theta^t = theta^(t-1) - lr g + beta / tau (theta^(t-1) -
    theta^(t-tau-1))."""
    x, y = A.train.whole()
    past = [entries(plain())]
    for _ in range(8):
        net = plain(params=past[-1])
        F.cross_entropy(net(x), y).backward()
        back = past[-1 - tau] if len(past) > tau else past[-1]
        past.append(
            {
                n: past[-1][n] - LR * p.grad + 0.7 / tau * (past[-1][n] - back[n])
                for n, p in net.named_parameters()
            }
        )
    whole = {**SGD0, "epochs": 1, "batch_size": 100}
    found = final(federated([A], 8), cs.methods.ghbm(0.7, tau), **whole)
    near(found, past[-1], 1e-14)
    if tau == 1:
        net = plain()
        optimiser = sgd(net, LR, 0.7)
        for _ in range(8):
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimiser.step()
        near(found, entries(net), 1e-14)


def test_no_momentum_before_round_tau_plus_one():
    s = clients(3)
    for rounds in (1, 2, 3):
        with pytest.raises(cs.Refusal, match="no momentum; use finetune|before round tau . 1 = 4"):
            final(federated(s, rounds), cs.methods.ghbm(0.9, 3), **SGD0)
    assert not same(
        final(federated(s, 4), cs.methods.ghbm(0.9, 3), **SGD0),
        final(federated(s, 4), cs.methods.finetune(), **SGD0),
    )
    long = cs.run(federated(s, 4), cs.methods.ghbm(0.9, 3), mlp(), training(**SGD0))
    short = cs.run(federated(s, 3), cs.methods.finetune(), mlp(), training(**SGD0))
    assert (long.matrices[0, :4] == short.matrices[0]).all()
    assert len(long.agent.state.memory["GHBM"][PAST].tensors) == 4 * len(long.params)


@pytest.mark.parametrize("name", ["ghbm", "local_ghbm", "fedhbm"])
def test_beta_0_is_fedavg_to_the_bit(name):
    s = clients(3)
    assert same(
        final(federated(s, 4, 2), getattr(cs.methods, name)(0.0)),
        final(federated(s, 4, 2), cs.methods.fedavg()),
    )


def test_fedcm_restated_and_is_ghbm():
    s, alpha = clients(3), 0.3
    past = [entries(plain())]

    def push(i, r, theta):
        if len(past) < 2:
            return zeros()
        return {n: (1 - alpha) * (past[-2][n] - past[-1][n]) / (LR * steps_of(s[i])) for n in theta}

    def end(theta, ends):
        past.append(mean(ends))
        return past[-1]

    expected = simulate(s, 5, 2, push, end, loss=lambda i, out, y: alpha * F.cross_entropy(out, y))
    found = final(federated(s, 5, 2), cs.methods.fedcm(alpha), **SGD0)
    near(found, expected, 1e-11)
    near(found, final(federated(s, 5, 2), cs.methods.ghbm(1 - alpha, 1), **SGD0, lr=alpha * LR), 1e-12)
    assert same(final(federated(s, 3), cs.methods.fedcm(1.0)), final(federated(s, 3), cs.methods.finetune()))


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2)])
def test_clients_in_turn_make_local_ghbm_ghbm(n, k):
    s = clients(n)
    near(
        final(federated(s, 3 * n // k, k), cs.methods.local_ghbm(0.8), **SGD0),
        final(federated(s, 3 * n // k, k), cs.methods.ghbm(0.8, n // k), **SGD0),
        1e-12,
    )


@pytest.mark.parametrize("name", ["local_ghbm", "fedhbm"])
def test_local_momentum_restated(name):
    """Two of three in turn: one or two rounds between a client's participations."""
    s, own, gaps = clients(3), {}, set()

    def push(i, r, theta):
        if i not in own:
            return zeros()
        last, start, finish = own[i]
        gaps.add(r - last)
        anchor = start if name == "local_ghbm" else finish
        return {n: 0.8 / (LR * (r - last) * steps_of(s[i])) * (anchor[n] - theta[n]) for n in theta}

    rounds = iter(range(6))

    def end(theta, ends):
        r = next(rounds)
        own.update({i: (r, theta, p) for i, (_, p) in ends.items()})
        return mean(ends)

    expected = simulate(s, 6, 2, push, end)
    near(final(federated(s, 6, 2), getattr(cs.methods, name)(0.8), **SGD0), expected, 1e-11)
    assert gaps == {1, 2}


def test_local_momentum_tells_a_counter_alone():
    told = cs.run(federated(clients(3), 4, 2), cs.methods.local_ghbm(), mlp(), training(**SGD0)).agent.send(
        {}
    )
    assert [(m.source, m.items["LocalGHBM"].meta, dict(m.items["LocalGHBM"].tensors)) for m in told] == [
        ("", {"round": 4}, {})
    ]


@pytest.mark.parametrize(
    ("method", "share"),
    [(cs.methods.ghbm(0.9, 2), 0.45), (cs.methods.fedcm(0.25), 0.75), (cs.methods.local_ghbm(0.6), 0.6)],
)
def test_without_gradients_exactly_the_share_of_the_difference_is_added(method, share):
    visits = [0]

    @dataclass(frozen=True)
    class Dead(Correction):
        """Takes the gradients away in the fourth round: each of two agents trains once per round."""

        def begin(self, start):
            visits[0] += 1
            return Begun(start.params)

        def losses(self, losses, step, ctx):
            return {i: v * (0.0 if visits[0] > 6 else 1.0) for i, v in losses.items()}

    def plan(seed):
        for r in range(4):
            yield Exchange({"a": ("server",), "b": ("server",)})
            yield Train({"a": ("c0",), "b": ("c1",)})
            yield Exchange({"server": ("a", "b")})
            yield Evaluate(f"round {r + 1}")

    def end(rounds):
        visits[0] = 0
        return final(
            build("custom", clients(2), "domain", lambda seed: list(plan(seed))[: 4 * rounds], "server"),
            [method, cs.Method("dead", (Dead(),))],
            **SGD0,
        )

    tau = 2 if method.name == "ghbm" else 1
    past = (
        {r: end(r) for r in (3 - tau, 3, 4)}
        if tau == 1
        else {r: end(r) for r in (3, 4)} | {1: _plain_round(clients(2))}
    )
    near(past[4], {n: p + share * (p - past[3 - tau][n]) for n, p in past[3].items()}, 1e-13)


def _plain_round(s):
    return final(federated(s, 1), cs.methods.finetune(), **SGD0)


def test_momentum_inside_warns():
    for method in (cs.methods.ghbm(0.5, 1), cs.methods.scaffold()):
        with pytest.warns(
            UserWarning, match="momentum 0.9 multiplies what it adds to each gradient, up to 10 times"
        ):
            final(federated(clients(2), 2), method)
        with pytest.warns(UserWarning, match="Adam scales gradients; train with sgd"):
            final(federated(clients(2), 2), method, optimiser="adam", lr=0.001)


# all of them

TRAVEL = [
    cs.methods.ghbm(0.8, 2),
    cs.methods.ghbm(0.8, 1),
    cs.methods.fedcm(0.4),
    cs.methods.scaffold(),
    cs.methods.wsm(),
]


@pytest.mark.parametrize("method", TRAVEL, ids=lambda m: m.name)
def test_one_client_a_round_without_revisits_is_continual_learning(method):
    one = federated(FAR, len(FAR), 1)
    alone = final(cs.settings.continual(FAR, "domain"), method, **SGD0)
    assert same(final(one, method, **SGD0), alone)
    assert method.name == "wsm" or not same(alone, final(one, cs.methods.finetune(), **SGD0))


EVERY = [
    "fedadagrad",
    "fedadam",
    "fedavgm",
    "fedcm",
    "feddyn",
    "fedhbm",
    "fednova",
    "fedyogi",
    "ghbm",
    "local_ghbm",
    "scaffold",
    "wsm",
]


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_clients_changes_nothing(name):
    s, method = clients(4), getattr(cs.methods, name)()
    ends = [final(federated(o, 4), method, **SGD0, lr=0.01) for o in (s, [s[2], s[0], s[3], s[1]])]
    near(*ends, 1e-8 if name in ("fedadagrad", "fedadam", "fedyogi") else 1e-11)
    assert not same(ends[0], final(federated(s, 4), cs.methods.finetune(), **SGD0, lr=0.01))


@pytest.mark.parametrize(
    "method",
    [cs.methods.scaffold(), cs.methods.ghbm(), cs.methods.fedcm(), cs.methods.local_ghbm()],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("setting", ["multitask", "merging"])
def test_refused_where_nobody_learns_after_hearing(method, setting):
    with pytest.raises(cs.Refusal, match="would do nothing or do wrong here"):
        final(getattr(cs.settings, setting)([A, B]), method)


def test_fedhbm_needs_others_and_composes():
    with pytest.raises(cs.Refusal, match="an agent that receives only from itself begins where it ended"):
        final(cs.settings.continual(FAR, "domain"), cs.methods.fedhbm())
    s = clients(3)
    both = final(federated(s, 3), [cs.methods.fedhbm(0.8), cs.methods.fedprox(1.0)], **SGD0)
    for one in (cs.methods.fedhbm(0.8), cs.methods.fedprox(1.0)):
        assert not same(both, final(federated(s, 3), one, **SGD0))


def test_local_momentum_is_refused_where_nobody_learns_twice():
    with pytest.raises(cs.Refusal, match="no agent trains twice, so none has momentum of its own; use ghbm"):
        final(federated(FAR, 5, 1), cs.methods.fedhbm())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GHBM(-1.0), "`beta` of GHBM must be >= 0 and finite, got -1.0."),
        (lambda: GHBM(0.9, 0), "`tau` must be a whole number >= 1, got 0."),
        (lambda: FedCM(0.0), "`alpha` must be in (0, 1], got 0.0."),
        (lambda: FedDyn(-0.1), "`alpha` of FedDyn must be >= 0 and finite, got -0.1."),
        (lambda: Scaffold(0), "`clients` must be a whole number >= 1 or None, got 0."),
        (lambda: Dynamic(None, SGD(0.9)), "`outer` of Dynamic must be None and `lr` 1, because its step"),
        (lambda: Drift(0.0), "`share` of Drift must be in (0, 1], got 0.0."),
        (lambda: Yogi(1.0), "`beta1` must be in [0, 1), got 1.0."),
        (lambda: Adagrad(0.0), "`tau` must be positive and finite, got 0.0."),
        (
            lambda: Torch("LBFGS"),
            "an optimiser must step by a gradient alone, got 'LBFGS', which needs a closure.",
        ),
        (lambda: Torch("Nothing"), "an optimiser must be a class of torch.optim by its name, got 'Nothing'."),
        (
            lambda: Torch("Adam", (("beta", 1),)),
            "torch.optim.Adam must take a vector and its arguments {'beta': 1}, got: ",
        ),
        (
            lambda: cs.methods.fedavg("lbfg"),
            "`outer` must be one of sgd, adam, adagrad, yogi, averaging or a class of torch.optim",
        ),
    ],
)
def test_hyperparameters_are_checked(make, message):
    with pytest.raises(cs.ConsilienceError) as error:
        make()
    assert message in str(error.value)


# the re-weighted softmax


def skewed():
    return [source("u", 30, (0, 1), 21), source("v", 23, (1, 2, 3), 22), source("w", 24, (0, 2), 23)]


def test_wsm_restated():
    s = skewed()
    p = [torch.bincount(c.train.y, minlength=C).double() / len(c.train) for c in s]

    def loss(i, out, y):
        return -((p[i] * out.exp())[range(len(y)), y] / (p[i] * out.exp()).sum(1)).log().mean()

    near(
        final(cs.settings.federated(s, 3, 2, "cyclic"), cs.methods.wsm(), **SGD0),
        simulate(s, 3, 2, lambda *_: zeros(), loss=loss),
        1e-11,
    )


def bent(s, z, y):
    """What WSM makes of the losses of logits z, and their gradient."""
    from types import SimpleNamespace as Some

    z = z.clone().requires_grad_()
    _, private, _ = WSM().begin(Some(model=Some(outputs=z.shape[1]), params={}, sources=(s,)))
    part = Some(y=y, drawn_by="")
    targets = [Target("class", cs.losses.cross_entropy())]
    see = Some(outputs=[z], parts=[part], theta=z.detach(), targets=targets)
    losses = WSM().losses({0: F.cross_entropy(z, y, reduction="none")}, see, Context(private=private))[0]
    return losses, torch.autograd.grad(losses.mean(), z)[0], private["log_p"]


def test_wsm_of_equal_counts_is_cross_entropy():
    from consilience.core.source import Tensors

    equal = replace(A, train=Tensors(A.train.x[:20], torch.arange(20) % C))
    near(
        final(cs.settings.continual([equal]), cs.methods.wsm()),
        final(cs.settings.continual([equal]), cs.methods.finetune()),
        1e-13,
    )


def test_wsm_leaves_absent_classes_alone():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, C, generator=g, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 0, 1])
    losses, grad, log_p = bent(skewed()[0], z, y)
    assert (grad[:, 2:] == 0).all() and (log_p[2:] == -torch.inf).all() and torch.isfinite(losses).all()
    assert torch.isfinite(grad).all() and (grad[:, :2] != 0).all()
    weighted = (z + log_p).log_softmax(1)
    assert torch.allclose(losses, F.cross_entropy(weighted, y, reduction="none"), atol=1e-14), (
        "its log-probabilities through it again"
    )
    start, end = entries(plain()), final(cs.settings.federated(skewed(), 1, 1, "cyclic"), cs.methods.wsm())
    for n in ("3.bias", "3.weight"):
        assert torch.equal(end[n][2:], start[n][2:]) and (end[n][:2] != start[n][:2]).all()


def test_wsm_leaves_samples_of_absent_classes_as_they_are():
    z = torch.randn(4, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([0, 3, 2, 1])
    losses, grad, _ = bent(skewed()[0], z, y)
    plainly = F.cross_entropy(z, y, reduction="none")
    assert (
        torch.equal(losses[1:3], plainly[1:3])
        and (losses[[0, 3]] != plainly[[0, 3]]).all()
        and torch.isfinite(grad).all()
    )
    for other in (cs.methods.er(20), cs.methods.cumulative(), cs.methods.lwf(), cs.methods.ewc()):
        found = final(cs.settings.continual(skewed(), "task"), [cs.methods.wsm(), other], **SGD0)
        assert all(torch.isfinite(p).all() for p in found.values())


# outer optimisers


@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi", "fedadam", "fedavgm"])
def test_outer_optimisers_restated(name):
    m, v = zeros(), zeros()

    def end(theta, ends):
        average, new = mean(ends), {}
        for n in theta:
            d = average[n] - theta[n]
            if name == "fedavgm":
                m[n] = 0.9 * m[n] + d
                new[n] = theta[n] + m[n]
                continue
            m[n] = d if name == "fedadagrad" else 0.9 * m[n] + 0.1 * d
            v[n] = {
                "fedadagrad": v[n] + d**2,
                "fedadam": 0.99 * v[n] + 0.01 * d**2,
                "fedyogi": v[n] - 0.01 * d**2 * torch.sign(v[n] - d**2),
            }[name]
            new[n] = theta[n] + 0.1 * m[n] / (v[n].sqrt() + 1e-3)
        return new

    s = clients(3)
    near(
        final(federated(s, 4, 2), getattr(cs.methods, name)(), **SGD0),
        simulate(s, 4, 2, lambda *_: zeros(), end),
        1e-11,
    )


OURS = {
    "SGD": (SGD(0.9, 0.1), {"momentum": 0.9, "weight_decay": 0.1}),
    "Adam": (Adam(0.8, 0.95, 1e-4, 0.1), {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    "AdamW": (Adam(0.8, 0.95, 1e-4, 0.1, True), {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    "Adagrad": (Adagrad(1e-2), {"eps": 1e-2}),
}
THEIRS = [
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


def walk(optimiser, lr, steps=6):
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(7, generator=g, dtype=torch.float64)
    state = optimiser.init(theta)
    names = set(state)
    for _ in range(steps):
        before = {k: t.clone() for k, t in state.items()}
        grad = torch.randn(7, generator=g, dtype=torch.float64)
        direction, new = optimiser.update(grad, state, theta)
        assert set(new) == names and all(torch.equal(before[k], t) for k, t in state.items()), (
            "update is pure"
        )
        theta, state = theta - lr * direction, new
    return theta


def torch_walk(name, lr, steps=6, **arguments):
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(7, generator=g, dtype=torch.float64))
    optimiser = getattr(torch.optim, name)([p], lr=lr, **arguments)
    for _ in range(steps):
        p.grad = torch.randn(7, generator=g, dtype=torch.float64)
        optimiser.step()
    return p.detach()


@pytest.mark.parametrize("name", OURS)
def test_ours_are_torchs(name):
    ours, arguments = OURS[name]
    assert torch.allclose(walk(ours, 0.1), torch_walk(name, 0.1, **arguments), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", THEIRS)
def test_any_of_torchs_serves(name):
    assert torch.allclose(walk(Torch(name), 1.0), torch_walk(name, 1.0), rtol=0, atol=1e-13)
    assert torch.allclose(walk(Torch(name, (("lr", 0.01),)), 1.0), torch_walk(name, 0.01), rtol=0, atol=1e-13)


def test_one_of_torchs_outside_and_inside():
    s = clients(3)
    theta = torch.nn.ParameterDict(
        {n.replace(".", "-"): torch.nn.Parameter(p.clone()) for n, p in entries(plain()).items()}
    )
    optimiser = torch.optim.NAdam(theta.values(), lr=1.0)

    def end(start, ends):
        average = mean(ends)
        for n, p in start.items():
            theta[n.replace(".", "-")].grad = p - average[n]
        optimiser.step()
        return {n: theta[n.replace(".", "-")].detach().clone() for n in start}

    expected = simulate(s, 3, 2, lambda *_: zeros(), end)
    agent = cs.run(federated(s, 3, 2), cs.methods.fedavg("NAdam"), mlp(), training(**SGD0)).agent
    near(agent.state.params, expected, 1e-11)
    back = decode_state(*encode_state(agent.state))
    assert same(back.outer, agent.state.outer) and {"exp_avg", "step", "mu_product"} <= back.outer.keys()
    net = plain()
    fit(net, A, optimiser=torch.optim.RAdam(net.parameters(), lr=LR))
    near(
        final(cs.settings.continual([A], "domain"), cs.methods.finetune(), optimiser=Torch("RAdam")),
        entries(net),
        1e-11,
    )


@pytest.mark.parametrize("name", ["Muon", "SparseAdam"])
def test_what_does_not_work_on_a_vector_is_refused(name):
    if hasattr(torch.optim, name):
        with pytest.raises(cs.ConsilienceError, match=f"torch.optim.{name} must take a vector"):
            Torch(name)


@pytest.mark.parametrize(
    ("more", "says"),
    [({"lr_schedule": "linear"}, "decreases"), ({"rates": {"*.bias": 2.0}}, "gives some another")],
)
@pytest.mark.parametrize("method", ["scaffold", "fedcm", "ghbm"])
def test_methods_that_count_on_one_learning_rate_say_so(method, more, says):
    parts = cs.data.iid(cs.data.digits(), 2)
    with pytest.warns(UserWarning, match=says):
        cs.run(
            cs.settings.federated(parts, 2),
            getattr(cs.methods, method)(),
            cs.models.linear(64),
            cs.Training(epochs=1, **more),
        )
