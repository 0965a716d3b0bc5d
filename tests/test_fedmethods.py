"""FedWeIt, ensemble distillation, statistics with random features, clients that leave, and what clients
keep, against restatements."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience.consolidators.distillation import Distillation
from consilience.consolidators.statistics import ClosedForm, solve, update
from consilience.core.contexts import Begun
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Message, Weights
from consilience.core.method import Method
from consilience.core.params import content_hash, key, same
from consilience.core.source import Source, Tensors
from consilience.core.state import State, decode_state, encode_state
from consilience.corrections.fedweit import FedWeIt
from consilience.data.features import Backbone
from consilience.data.samplers import Balanced
from consilience.loop.agent import Agent
from consilience.loop.ledger import Ledger
from restate import A, B, C, D, E, batches, entries, final, fit, mlp, near, plain, source, training

FC = cs.settings.federated_continual


def streams():
    """Two clients, two tasks each, sizes that differ."""
    return [
        [source("a", 24, (0, 1), 1, task="a"), source("b", 19, (2, 3), 2, task="b")],
        [source("c", 30, (2, 3), 3, task="c"), source("d", 17, (0, 1), 4, task="d")],
    ]


def judged_as(schedule, agent):
    return replace(schedule, evaluated=agent)


def agents(schedule, method, names, model=None, **more):
    """The agents of these names at the end of a run."""
    return [cs.run(judged_as(schedule, n), method, model or mlp(), training(**more)).agent for n in names]


# FedWeIt


@dataclass(frozen=True)
class Plain(FedWeIt):
    """With sigmoid(m) = 1, A = alpha = 0, all of them frozen."""

    def begin(self, start):
        new, private, _ = super().begin(start)
        fill = {"mask": 40.0, "own": 0.0}
        opened = {
            n: p.fill_(fill.get(n.split("/")[1], 0.0)) if "fedweit/" in n else p for n, p in new.items()
        }
        return Begun(opened, private)

    def mask(self, step, ctx):
        held = torch.ones_like(step.theta)
        for n in step.layout.names:
            if n.startswith("fedweit/"):
                held[step.layout.span(n)] = 0
        return held


def test_fedweit_with_all_masks_open_and_nothing_of_its_own_is_fedavg():
    schedule = FC(streams(), 2, scenario="task")
    method = Method("plain", (Plain(0.0, 0.0, 0.0),), personal=("fedweit/*",))
    ours = final(schedule, method)
    near(ours, final(schedule, cs.methods.fedavg()))
    assert not any(n.startswith("fedweit/") for n in ours), "the server has no entries of clients"


def masked(out, classes):
    keep = torch.zeros(C, dtype=torch.bool)
    keep[list(classes)] = True
    return out.masked_fill(~keep, -torch.inf)


def mlp_of(p, x):
    return F.relu(x @ p["1.weight"].T + p["1.bias"]) @ p["3.weight"].T + p["3.bias"]


def wide(m, like):
    return torch.sigmoid(m).view(-1, *[1] * (like.ndim - 1))


def fedweit_by_hand(streams, rounds, sparsity, drift, prune, lr):
    """Server parameters, clients' own entries, and what they sent, by the paper's equations."""
    names = ("1.weight", "1.bias", "3.weight", "3.bias")
    server = {n: p.double() for n, p in mlp().init(key(0, "init"))[0].items()}
    own = [{} for _ in streams]
    local = [{} for _ in streams]
    told = {}
    for t in range(2):
        began = [None] * len(streams)
        for r in range(rounds):
            heard = dict(told)
            for k, stream in enumerate(streams):
                s, base = stream[t], {n: p.clone() for n, p in server.items()}
                if r == 0:
                    keys = sorted(q for q in heard if q[0] != k)
                    own[k][s.name] = {
                        "m": {n: torch.full((len(base[n]),), 2.0).double().log() for n in names},
                        "A": {n: base[n] / 3 for n in names},
                        "alpha": torch.zeros(len(keys), len(names)).double(),
                        "keys": keys,
                    }
                    began[k] = (
                        {n: b.clone() for n, b in (local[k] or base).items()},
                        {i: {n: a.clone() for n, a in o["A"].items()} for i, o in own[k].items()},
                    )
                b0, a0 = began[k]
                now = own[k][s.name]
                leaves = [
                    *base.values(),
                    *now["m"].values(),
                    now["alpha"],
                    *[a for o in own[k].values() for a in o["A"].values()],
                ]
                for leaf in leaves:
                    leaf.requires_grad_()
                optimiser = torch.optim.Adam(leaves, lr=lr)
                for _, _, x, y in batches(s, r):
                    theta = {}
                    for i, n in enumerate(names):
                        theta[n] = base[n] * wide(now["m"][n], base[n]) + now["A"][n]
                        for a, q in zip(now["alpha"], now["keys"], strict=True):
                            theta[n] = theta[n] + a[i] * heard[q]["A"][n]
                    loss = F.cross_entropy(masked(mlp_of(theta, x), s.classes), y)
                    loss = loss + sparsity * sum(torch.sigmoid(now["m"][n]).sum() for n in names)
                    for other, o in own[k].items():
                        for n in (
                            names if drift or other == s.name else ()
                        ):  # without drift what is earlier stands still
                            loss = loss + sparsity * o["A"][n].abs().sum()
                            if other != s.name:
                                moved = (
                                    (base[n] - b0[n]) * wide(o["m"][n].detach(), base[n])
                                    + o["A"][n]
                                    - a0[other][n]
                                )
                                loss = loss + drift * moved.square().sum()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                for leaf in leaves:
                    leaf.requires_grad_(False)
                local[k] = base
                told[k, s.name] = {
                    "m": {n: m.clone() for n, m in now["m"].items()},
                    "A": {n: a * (a.abs() > prune) for n, a in now["A"].items()},
                    "alpha": now["alpha"].clone(),
                    "keys": now["keys"],
                    "classes": s.classes,
                }
            sizes = [len(stream[t].train) for stream in streams]
            server = {n: sum(b[n] * z for b, z in zip(local, sizes, strict=True)) / sum(sizes) for n in names}
    return names, server, own, local, told


@pytest.mark.parametrize("drift", [3.0, 0.0])
def test_fedweit_is_the_papers_objective(drift):
    given = streams()
    sparsity, prune, lr = 0.01, 0.05, 0.01
    names, server, own, local, told = fedweit_by_hand(given, 2, sparsity, drift, prune, lr)
    method = cs.methods.fedweit(sparsity, drift, prune)
    schedule = FC(given, 2, scenario="task")
    said, *clients = agents(
        schedule, method, ("server", "client-0", "client-1"), optimiser="adam", momentum=0.0, lr=lr
    )
    near(said.state.params, server, 1e-10)
    for k, client in enumerate(clients):
        params = client.state.params
        near({n: params[n] for n in names}, local[k], 1e-10)
        for task, o in own[k].items():
            for kind, values in (("mask", o["m"]), ("own", o["A"])):
                near({n: params[FedWeIt.entry(kind, task, n)] for n in names}, values, 1e-10)
            for i, (sender, s) in enumerate(o["keys"]):
                at = FedWeIt.entry("alpha", task, f"client-{sender}/{s}")
                near({"alpha": params[at]}, {"alpha": o["alpha"][i]}, 1e-10)
        assert len(own[k][given[k][1].name]["keys"]) == 1 and own[k][given[k][1].name]["alpha"].any()
    assert len(clients[0].state.params) == len(names) * 6 + 1, "nothing of others, and one alpha"

    # the answers: a client by its own entries, the server by what was sent, both pruned
    x = given[0][0].train.whole()[0]
    for (k, task), item in told.items():
        theirs = {}
        for i, n in enumerate(names):
            theirs[n] = server[n] * wide(item["m"][n], server[n]) + item["A"][n]
            for a, q in zip(item["alpha"], item["keys"], strict=True):
                theirs[n] = theirs[n] + a[i] * told[q]["A"][n]
        near(
            {"p": said.predict(x, task)}, {"p": masked(mlp_of(theirs, x), item["classes"]).softmax(1)}, 1e-10
        )
        o, mine = own[k][task], {}
        for i, n in enumerate(names):
            mine[n] = local[k][n] * wide(o["m"][n], server[n]) + o["A"][n] * (o["A"][n].abs() > prune)
            for a, q in zip(o["alpha"], o["keys"], strict=True):
                mine[n] = mine[n] + a[i] * told[q]["A"][n]
        near(
            {"p": clients[k].predict(x, task)},
            {"p": masked(mlp_of(mine, x), item["classes"]).softmax(1)},
            1e-10,
        )
    others = {n: local[0][n] * wide(told[1, "c"]["m"][n], server[n]) + told[1, "c"]["A"][n] for n in names}
    near({"p": clients[0].predict(x, "c")}, {"p": masked(mlp_of(others, x), (2, 3)).softmax(1)}, 1e-10)
    kept = torch.cat([(a["A"][n] != 0).view(-1) for a in told.values() for n in names])
    assert kept.any() and not kept.all(), "the threshold prunes some"


def test_fedweit_tells_what_is_not_pruned_and_no_whole_mask():
    schedule = FC(streams(), 1, scenario="task")
    sizes = []
    for prune in (0.0, 0.2):
        agent = cs.run(schedule, cs.methods.fedweit(prune=prune), mlp(), training()).agent
        items = [m.items["FedWeIt"] for m in agent.state.bank.values()]
        sizes.append(sum(len(i.tensors["own/1.weight"]) for i in items))
        assert all(i.tensors["kept/1.weight"].dtype == torch.uint8 for i in items)
        assert agent.state.experts == {}
    assert sizes[1] < sizes[0]


def test_fedweit_begins_where_the_server_is():
    agent = agents(FC(streams(), 1, scenario="task"), cs.methods.fedweit(), ["client-0"], epochs=0)[0]
    seen = agent.state.params
    for n in ("1.weight", "3.bias"):
        m, a = seen[FedWeIt.entry("mask", "b", n)], seen[FedWeIt.entry("own", "b", n)]
        near({n: seen[n] * wide(m, seen[n]) + a}, {n: seen[n]})
        assert torch.equal(a, seen[n] / 3)


def test_fedweit_keeps_its_tasks_apart_and_refuses():
    """Names of tasks may hold slashes and one may begin with another; sgd is capped with a warning; no task,
    no method."""
    given = [
        [
            source("t", 20, (0, 1), 1, task="t"),
            source("t/x", 20, (2, 3), 2, task="t/x"),
            source("y", 20, (0, 1), 5, task="t"),
        ]
    ]
    with pytest.warns(UserWarning, match="capped"):
        agent = agents(FC(given, 1, scenario="task"), cs.methods.fedweit(), ["client-0"])[0]
    tasks = {n.split(":")[0] for n in agent.state.params if n.startswith("fedweit/own")}
    assert tasks == {"fedweit/own/t", "fedweit/own/t/x"}
    with pytest.raises(Refusal, match="it needs to know the task"):
        cs.run(FC(streams(), 1), cs.methods.fedweit(), mlp(), training())
    with pytest.raises(ConsilienceError, match="`drift` of FedWeIt must be >= 0"):
        cs.methods.fedweit(drift=-1.0)


def test_fedweit_under_rehearsal_holds_what_is_earlier(monkeypatch):
    """Rehearsed, an earlier task moves the shared parameters and its own, and neither its mask nor its
    alphas."""
    given = [source("t/x", 20, (2, 3), 2, task="t/x"), source("t", 20, (0, 1), 1, task="t")]
    finish, ends = Agent.finish, []
    monkeypatch.setattr(
        Agent, "finish", lambda agent, job: (finish(agent, job), ends.append(agent.state.params))[0]
    )
    method = [cs.methods.fedweit(drift=1.0), cs.methods.er(20)]
    cs.run(cs.settings.continual(given, "task"), method, mlp(), training(lr=0.02))
    one, both = ends
    for n in ("1.weight", "3.bias"):
        assert torch.equal(one[FedWeIt.entry("mask", "t/x", n)], both[FedWeIt.entry("mask", "t/x", n)])
        assert not torch.equal(one[FedWeIt.entry("own", "t/x", n)], both[FedWeIt.entry("own", "t/x", n)])


def test_fedweit_resumes_to_the_bit(tmp_path):
    schedule = judged_as(FC(streams(), 2, scenario="task"), "client-1")
    whole = cs.run(schedule, cs.methods.fedweit(), mlp(), training(optimiser="adam", momentum=0.0))

    def stop(line):
        if line["event"] == "checkpoint" and line["steps"] >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cs.run(
            schedule,
            cs.methods.fedweit(),
            mlp(),
            training(optimiser="adam", momentum=0.0),
            out=tmp_path,
            checkpoint_steps=1,
            progress=stop,
        )
    again = cs.run(
        schedule,
        cs.methods.fedweit(),
        mlp(),
        training(optimiser="adam", momentum=0.0),
        out=tmp_path,
        resume=True,
    )
    assert same(again.params, whole.params) and (again.matrices == whole.matrices).all()


@pytest.mark.parametrize("name", ["heard", "received", "the past"])
def test_fedweit_takes_a_source_of_any_name(name):
    """What the correction keeps is under a key that no source can have: the source's module stays in
    sight."""

    def answers(first):
        # Full batches: their order is drawn by the source's name, and a sum does not depend on it.
        given = streams()
        given[0][0] = replace(given[0][0], name=first)
        schedule = judged_as(FC(given, 2, scenario="task"), "client-0")
        options = {"batch_size": 64, "optimiser": "adam", "momentum": 0.0, "lr": 0.01}
        result = cs.run(schedule, cs.methods.fedweit(0.01, 3.0, 0.05), mlp(), training(**options))
        recalled = FedWeIt().recall(result.agent.memory(FedWeIt()), ())
        assert ("client-0", first) in recalled.sent and recalled.agent == "client-0"

        # Task d of client 1 weighs what client 0 sent of its first source.
        assert recalled.sent["client-1", "d"].meta["from"][0] == ["client-0", first]
        x = given[0][0].train.whole()[0]
        return {task: result.agent.predict(x, task) for task in ("a", "b", "c", "d")}

    near(answers(name), answers("x"), 1e-10)


# distillation into the average


def hearer(consolidator, params):
    method = Method("hearer", consolidator=consolidator)
    schedule = cs.settings.federated([A, B], 1, scenario="domain")
    state = State(params, {}, params, content_hash(params))
    return Agent("server", mlp(), method, schedule, training(), 0, state, Ledger())


def told(params, sender, size, origin, learned=True):
    item = Weights({f"params/{n}": p for n, p in params.items()})
    return Message(sender, "", 1, size, origin, origin, {"model": item}, learned)


def start():
    return {n: p.double() for n, p in mlp().init(key(0, "init"))[0].items()}


def moved(seed, scale=0.3):
    return {n: p + scale * torch.randn(p.shape, generator=key(seed, n)).double() for n, p in start().items()}


U = torch.randn(40, D, generator=key("unlabelled")).double()


@pytest.mark.parametrize("of", ["logits", "probabilities"])
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_feddf_is_restated_over_one_round(of, optimiser):
    base, t, lr = start(), 2.0, 0.05
    c = cs.consolidators.ensemble_distillation(U, 12, lr, 16, t, of, optimiser)
    agent = hearer(c, base)
    clients, sizes = [moved(i) for i in range(3)], [10, 30, 20]
    agent.receive(
        [
            told(p, f"client-{i}", z, content_hash(base))
            for i, (p, z) in enumerate(zip(clients, sizes, strict=True))
        ]
    )

    student = {n: sum(p[n] * z for p, z in zip(clients, sizes, strict=True)) / 60 for n in base}
    with torch.no_grad():
        outs = torch.stack([mlp_of(p, U) / t for p in clients])
        target = outs.mean(0).softmax(1) if of == "logits" else outs.softmax(2).mean(0)
    leaves = {n: p.clone().requires_grad_() for n, p in student.items()}
    steps = (torch.optim.Adam if optimiser == "adam" else torch.optim.SGD)(leaves.values(), lr=lr)
    generator, order = key(0, "server", 0, "absorb"), torch.zeros(0, dtype=torch.long)
    for _ in range(12):
        if not len(order):
            order = torch.randperm(len(U), generator=generator)
        i, order = order[:16], order[16:]
        log = (mlp_of(leaves, U[i]) / t).log_softmax(1)
        loss = t * t * F.kl_div(log, target[i], reduction="batchmean")
        steps.zero_grad()
        loss.backward()
        steps.step()
    near(agent.state.params, {n: p.detach() for n, p in leaves.items()}, 1e-10)
    assert max(float((agent.state.params[n] - student[n]).abs().max()) for n in base) > 1e-3
    assert same(agent.state.base, agent.state.params)


def test_feddf_of_identical_clients_is_their_average():
    base, model = start(), moved(1)
    for optimiser, of in (("adam", "logits"), ("sgd", "logits"), ("adam", "probabilities")):
        for dtype in (torch.float64, torch.float32):
            first, same_for_all = ({n: p.to(dtype) for n, p in q.items()} for q in (base, model))
            agent = hearer(
                cs.consolidators.ensemble_distillation(U, 50, 0.01, optimiser=optimiser, of=of), first
            )
            agent.receive([told(same_for_all, f"client-{i}", 10 + i, content_hash(first)) for i in range(4)])
            near(agent.state.params, same_for_all, 2e-7 if dtype is torch.float32 else 1e-12)


def test_feddf_without_steps_is_fedavg_and_common_ground_is_adopted():
    s = [A, B, E]
    schedule = cs.settings.federated(s, 2, scenario="domain")
    assert same(final(schedule, cs.methods.feddf(U, steps=0)), final(schedule, cs.methods.fedavg()))
    assert not same(final(schedule, cs.methods.feddf(U, steps=3)), final(schedule, cs.methods.fedavg()))
    base, model = start(), moved(2)
    agent = hearer(cs.consolidators.ensemble_distillation(U), base)
    agent.receive([told(model, "server", 10, content_hash(base), learned=False)])
    assert same(agent.state.params, model)
    agent = hearer(cs.consolidators.ensemble_distillation(U), base)
    agent.receive([told(moved(i), f"edge-{i}", 10, content_hash(base), learned=False) for i in range(2)])
    near(agent.state.params, {n: (moved(0)[n] + moved(1)[n]) / 2 for n in base})


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_module_in_double_precision_takes_unlabelled_inputs(precision):
    """Inputs were tried in float32, and a module of float64 was said not to fit their shape."""
    schedule = cs.settings.federated([A, B], 1, scenario="domain")
    found = [
        final(schedule, cs.methods.feddf(U, steps=3), model=net, precision=precision)
        for net in (nn.Linear(D, C).double(), nn.Linear(D, C))
    ]
    wanted = torch.float64 if precision == "fp64" else torch.float32
    assert all(ends["weight"].dtype == wanted for ends in found)


def test_a_backbone_in_double_precision_gives_features():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh()).double(), torch.randn(5, D)
    trunk = cs.models.frozen(cs.models.wrap(net, 4, headless=True))
    assert torch.equal(Backbone.of(trunk, torch.device("cpu"))(x), net(x.double()).detach())


def test_feddf_refusals():
    schedule = cs.settings.federated([A, B], 1, scenario="domain")
    assert Distillation(unlabelled=U) == Distillation(unlabelled=U.clone()) != Distillation(unlabelled=U + 1)
    with pytest.raises(ConsilienceError, match="`unlabelled` must be finite inputs"):
        cs.methods.feddf(U / 0)
    with pytest.raises(ConsilienceError, match="`unlabelled` must be finite inputs"):
        cs.methods.feddf(20)
    with pytest.raises(ConsilienceError, match=r"`steps` must be a whole number >= 0, got -1"):
        cs.methods.feddf(U, steps=-1)
    with pytest.raises(Refusal, match=r"`unlabelled` must fit the model's input, got inputs \(7,\)"):
        cs.run(schedule, cs.methods.feddf(torch.zeros(3, 7)), mlp(), training())
    with pytest.raises(Refusal, match="one is received at a time"):
        cs.run(cs.settings.continual([A, B], "domain"), cs.methods.feddf(A), mlp(), training())
    with pytest.raises(Refusal, match="use one with a shared head"):
        cs.run(schedule, cs.methods.feddf(A), cs.models.multi_head(mlp(), C), training())
    assert (
        Method("", exchange_aggregator=cs.aggregators.median()) + cs.methods.feddf(U)
    ).receiver() == Distillation(cs.aggregators.median(), unlabelled=U)


# statistics


def head_of(params, weight="3.weight", bias="3.bias"):
    return torch.cat([params[weight].T, params[bias][None]])


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def ridge(psi, y, strength):
    psi = torch.cat([psi, torch.ones(len(psi), 1).double()], 1)
    w = torch.linalg.solve(
        psi.T @ psi + strength * torch.eye(psi.shape[1]).double(), psi.T @ F.one_hot(y, C).double()
    )
    return w, psi


def together(sources):
    return (torch.cat(t) for t in zip(*(s.train.whole() for s in sources), strict=True))


def test_fourier_features_are_the_kernel_and_the_same_for_everybody():
    model = cs.models.fourier_features(mlp(), 20000, 1.5, seed=3)
    x = torch.randn(5, D, generator=key("x"))
    params, buffers = model.init(torch.Generator().manual_seed(1))
    psi = model.features(params, buffers, x)
    body = F.relu(x @ params["body.1.weight"].T + params["body.1.bias"])
    again = (2 / 20000) ** 0.5 * (body @ params["fourier.weight"].T + params["fourier.bias"]).cos()
    assert torch.allclose(psi, again, atol=1e-6)
    kernel = (-torch.cdist(body, body).square() / (2 * 1.5**2)).exp()
    assert float((psi @ psi.T - kernel).abs().max()) < 4 / 20000**0.5
    other = model.init(torch.Generator().manual_seed(2))[0]
    assert torch.equal(params["fourier.weight"], other["fourier.weight"])
    assert not torch.equal(params["body.1.weight"], other["body.1.weight"]) and model.backbone(
        params
    ) == model.backbone(other)
    given = cs.models.fourier_features(cs.models.wrap(plain(), frozen=("*",)), 8)
    frozen = [n for n in given.init(torch.Generator())[0] if given.frozen(n)]
    assert frozen == ["body.1.weight", "body.1.bias", "fourier.weight", "fourier.bias"]
    assert same(*(given.init(torch.Generator().manual_seed(4))[0] for _ in range(2)))
    with pytest.raises(ConsilienceError, match="`sigma` must be positive"):
        cs.models.fourier_features(mlp(), 8, sigma=0.0)


def test_fed3r_with_random_features_is_the_centralised_solution():
    s = [source(f"s{i}", 20 + 5 * i, seed=20 + i) for i in range(4)]
    model = cs.models.fourier_features(mlp(), 32, 2.0)
    params = {n: p.double() for n, p in model.init(key(0, "init"))[0].items()}
    x, y = together(s)
    w, _ = ridge(model.features(params, {}, x), y, 0.01)
    order = torch.randperm(len(y), generator=key(1))
    resplit = [
        s[0].map(name=f"p{i}", train=Tensors(x[j], y[j]), task=None) for i, j in enumerate(order.split(9))
    ]
    for schedule in (
        cs.settings.federated(s, 2, scenario="domain"),
        cs.settings.federated(resplit, 12, 3, "cyclic", scenario="domain"),
        cs.settings.continual(s[::-1], "domain"),
        FC([s[:2], s[2:]], 1, scenario="domain"),
    ):
        got = final(schedule, cs.methods.fed3r(), model)
        assert relative(head_of(got, "head.weight", "head.bias"), w) < 1e-10, schedule.setting
        assert all(torch.equal(got[n], params[n]) for n in params if not n.startswith("head"))


def test_temperature_divides_the_head_and_leaves_the_argmax():
    schedule, x = cs.settings.federated([A, B], 1, scenario="domain"), E.train.whole()[0]
    cold, warm = (cs.run(schedule, cs.methods.fed3r(temperature=t), mlp(), training()) for t in (0.1, 1.0))
    near({"w": head_of(cold.params)}, {"w": head_of(warm.params) / 0.1}, 1e-12)
    assert torch.equal(cold.predict(x).argmax(1), warm.predict(x).argmax(1))
    assert cold.predict(x).max(1).values.mean() > warm.predict(x).max(1).values.mean()
    with pytest.raises(ConsilienceError, match="`temperature` must be positive"):
        cs.methods.fed3r(temperature=0.0)


def test_streaming_updates_are_the_batch_solution_and_go_back():
    g = key("stream")
    psi = torch.randn(60, 7, generator=g).double()
    hot = F.one_hot(torch.randint(C, (60,), generator=g), C).double()
    strength = 0.5
    inverse, moment = torch.eye(7).double() / strength, torch.zeros(7, C).double()
    cuts = [1, 1, 5, 20, 3, 30]
    states = [(inverse, moment)]
    for f, h in zip(psi.split(cuts), hot.split(cuts), strict=True):
        states.append(update(*states[-1], f, h))
    got = states[-1][0] @ states[-1][1]
    assert relative(got, solve(psi.T @ psi, psi.T @ hot, strength)) < 1e-10
    for row in range(60):  # rank one
        inverse, moment = update(inverse, moment, psi[row : row + 1], hot[row : row + 1])
    assert relative(inverse @ moment, got) < 1e-10
    back = update(*states[-1], psi[-30:], hot[-30:], remove=True)
    assert relative(back[0], states[-2][0]) < 1e-10 and relative(back[1], states[-2][1]) < 1e-10
    with pytest.raises(ConsilienceError, match="must have been added before"):
        update(*states[1], 100 * psi[40:], hot[40:], remove=True)


def test_data_given_twice_is_half_the_strength():
    once = cs.settings.federated([A, B], 1, scenario="domain")
    again = [s.map(name=f"{s.name} again", task=None) for s in (A, B)]
    twice = cs.settings.federated([A, B, *again], 1, scenario="domain")
    a, b = head_of(final(twice, cs.methods.fed3r(0.02))), head_of(final(once, cs.methods.fed3r(0.01)))
    assert relative(a, b) < 1e-10


# begin from a result


def test_base_is_where_a_run_begins():
    first = cs.run(cs.settings.federated([A, B], 1, scenario="domain"), cs.methods.fed3r(), mlp(), training())
    kinds = (
        lambda base: cs.settings.federated([A, B], 2, scenario="domain", base=base),
        lambda base: FC([[A], [B]], 2, scenario="domain", base=base),
        lambda base: cs.settings.continual([A, B], "domain", base=base),
    )
    for make in kinds:
        r = cs.run(make(first.params), cs.methods.finetune(), mlp(), training(epochs=0))
        assert same(r.params, first.params)
        moved = cs.run(make(first.params), cs.methods.finetune(), mlp(), training())
        assert not same(moved.params, final(make(None), cs.methods.finetune()))
    net = plain(params=first.params)
    fit(net, A)
    fit(net, B)
    near(final(kinds[2](first.params), cs.methods.finetune()), entries(net))
    with pytest.raises(ConsilienceError, match=r"`base` must have all entries of the model"):
        cs.run(kinds[0]({"1.weight": torch.zeros(5, D)}), cs.methods.fedavg(), mlp(), training())


def digits_clients(n=20):
    return cs.data.dirichlet(cs.data.digits(), n, 0.1, seed=1)


def solved_head(given, params):
    """The ridge head [d + 1, C] of sources on the features of these parameters, over the temperature .1."""
    x, y = together(given)
    return ridge(mlp().features(params, {}, x), y, 0.01)[0] / 0.1


def begun(head):
    """The first parameters of a run with a head."""
    params = {n: p.double() for n, p in mlp().init(key(0, "init"))[0].items()}
    return {**params, "3.weight": head[:-1].T, "3.bias": head[-1]}


def test_fedavg_after_fed3r_trains_from_the_head_of_all_sums_and_late_sums_are_added_to_it():
    first = {n: p.double() for n, p in mlp().init(key(0, "init"))[0].items()}
    early, every = (solved_head(given, first) for given in ([A, B], [A, B, E]))
    method = cs.methods.fed3r(then=cs.methods.fedavg(), lr=None)

    # Two rounds of all clients: the sums, and then plain FedAvg from the second visit on.
    after = []
    for s in (A, B, E):
        after.append(net := plain(params=begun(every)))
        fit(net, s, visit=1)
    sizes = torch.tensor([len(s.train) for s in (A, B, E)], dtype=torch.float64)
    average = {
        n: sum(w * entries(net)[n] for w, net in zip(sizes / sizes.sum(), after, strict=True)) for n in first
    }
    near(final(cs.settings.federated([A, B, E], 2, scenario="domain"), method), average, 1e-10)

    # The third client comes when the first trains, which alone counts in the average.
    net = plain(params=begun(early))
    fit(net, A, visit=1)
    expected = entries(net)
    moved = every - early
    expected = {
        **expected,
        "3.weight": expected["3.weight"] + moved[:-1].T,
        "3.bias": expected["3.bias"] + moved[-1],
    }
    late = cs.settings.federated([A, B, E], 2, 2, "cyclic", scenario="domain")
    assert [list(p.who) for p in late.plan(0) if isinstance(p, cs.core.schedule.Train)] == [
        ["client-0", "client-1"],
        ["client-0", "client-2"],
    ]
    near(final(late, method), expected, 1e-10)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_training_after_fed3r_keeps_its_lead_at_the_default_rate(alpha):
    """In the place of a second run at the default rate, whose first round destroys the head (.30 to .50)."""
    clients = cs.data.dirichlet(cs.data.digits(), 10, alpha=alpha)
    schedule = cs.settings.federated(clients, 5)
    scores = cs.run(schedule, cs.methods.fed3r(then=cs.methods.fedavg())).matrix[1:].mean(1)
    assert scores[0] > 0.95 and scores.min() > scores[0] - 0.02

    destroyed = cs.run(schedule, cs.methods.fed3r(then=cs.methods.fedavg(), lr=None)).matrix[2].mean()
    assert destroyed < 0.8


@pytest.mark.parametrize("then", ["fedadam", "fedyogi", "fedadagrad"])
def test_an_adaptive_server_that_would_destroy_the_solved_head_is_warned_of(then):
    schedule = cs.settings.federated(cs.data.dirichlet(cs.data.digits(), 10, alpha=0.5), 5)
    server = getattr(cs.methods, then)
    with pytest.warns(UserWarning, match=rf"{then} moves entries by up to 0.1 .* `{then}\(lr=0.003\)`"):
        quick = cs.methods.fed3r(then=server())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slow = cs.methods.fed3r(then=server(lr=0.003))
    quick, slow = (cs.run(schedule, m, training=cs.Training(epochs=1)).score for m in (quick, slow))
    assert slow > 0.93 > 0.8 > quick


@pytest.mark.parametrize("then", ["scaffold", "fedprox", "feddyn", "fednova", "ewc", "wsm"])
def test_other_methods_go_on_from_fed3r_too(then):
    clients = cs.data.dirichlet(cs.data.digits(), 6, alpha=0.5)
    schedule = cs.settings.federated(clients, 3)
    method = cs.methods.fed3r(then=getattr(cs.methods, then)())
    plainly = cs.methods.fed3r(then=cs.methods.fedavg())
    runs = [cs.run(schedule, m, training=cs.Training(epochs=1)) for m in (method, plainly)]
    assert runs[0].score > 0.93
    # It acts: the parameters are not those of FedAvg, and the clients did train.
    assert not same(runs[0].params, runs[1].params)


def test_what_could_not_follow_fed3r_is_refused_by_name():
    clients = [A, B, E]
    method = cs.methods.fed3r(then=cs.methods.fedavg())
    for schedule in (
        cs.settings.hierarchical(clients, 2, 3, scenario="domain"),
        cs.settings.gossip(clients, 3, scenario="domain"),
    ):
        with pytest.raises(Refusal, match="one head, which a server solves for all; use settings.federated"):
            cs.run(schedule, method, mlp(), training())
    with pytest.raises(Refusal, match="no source is trained on again after its sums were sent"):
        cs.run(cs.settings.federated(clients, 1, scenario="domain"), method, mlp(), training())
    with pytest.raises(ConsilienceError, match="`method` must be a Method"):
        cs.methods.fed3r(then=cs.methods.fedavg)
    with pytest.raises(ConsilienceError, match="`then` must be a consolidator or None, got a Method"):
        ClosedForm(then=cs.methods.fedavg())
    own = cs.methods.fed3r(then=cs.methods.personal())
    with pytest.raises(Refusal, match="here each keeps its own; leave `personal` out"):
        cs.run(cs.settings.federated(clients, 2, scenario="domain"), own, mlp(), training())


def test_scroll_trains_on_its_buffer_from_the_head_of_all_data():
    """A buffer that holds everything: the plain loop over the pool, from the first parameters."""
    first = {n: p.double() for n, p in mlp().init(key(0, "init"))[0].items()}
    method = cs.methods.scroll(1000, lr=None)
    net = plain(params=begun(solved_head([A, B], first)))
    pool = Source.union("+".join([A.name, B.name]), [A, B])
    fit(net, pool, visit=1)
    schedule = cs.settings.continual([A, B], "domain")
    near(final(schedule, method), entries(net), 1e-10)

    # Without steps: the head of all data, whatever the order and the cuts.
    x, y = together([A, B])
    thirds = [A.map(name=f"p{i}", train=Tensors(x[i::3], y[i::3]), task=None) for i in range(3)]
    for given in ([B, A], thirds):
        schedule = cs.settings.continual(given, "domain")
        near(final(schedule, method, epochs=0), begun(solved_head([A, B], first)), 1e-9)


def test_scroll_keeps_the_head_of_a_stream_at_the_default_rate():
    digits = cs.data.digits()
    streams = [cs.data.split_classes(digits, 5), cs.data.split_classes(digits, 5)[::-1]]
    for stream in streams:
        schedule = cs.settings.continual(stream)
        head, tuned = (cs.run(schedule, m).score for m in (cs.methods.fed3r(), cs.methods.scroll(200)))
        assert head > 0.95 and tuned > head - 0.02
    assert cs.run(schedule, cs.methods.scroll(200, lr=None)).score < 0.9, "the default of Training"


def test_scroll_refuses_what_would_mix_sums_of_several_features():
    norm = cs.models.wrap(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, C)), outputs=C
    )
    schedule = cs.settings.continual([A, B], "domain")
    with pytest.raises(Refusal, match="steps move the model's buffers"):
        cs.run(schedule, cs.methods.scroll(), norm, training())
    with pytest.raises(Refusal, match="use fed3r, which sums over all agents"):
        cs.run(cs.settings.federated([A, B], 2, scenario="domain"), cs.methods.scroll(), mlp(), training())


def test_fedavg_from_fed3r_is_better_after_a_round_than_from_random():
    clients = digits_clients()
    model, training = cs.models.mlp(64, (64,), 10), cs.Training(epochs=2, batch_size=16, lr=0.05)
    first = cs.run(
        cs.settings.federated(clients, 2, 10, "cyclic"), cs.methods.fed3r(temperature=0.1), model, training
    )
    scores = []
    for base in (None, first.params):
        schedule = cs.settings.federated(clients, 2, 5, base=base)
        scores.append(cs.run(schedule, cs.methods.fedavg(), model, training).matrix.mean(1))
    cold, warm = scores
    assert warm[0] > 0.85 and cold[0] < 0.3, "before any round"
    assert warm[1] > cold[1] + 0.1, (cold, warm)


def test_scroll_has_no_spread_over_schedules_and_balanced_tuning_goes_on_from_it():
    digits = cs.data.digits()
    model = cs.models.frozen(cs.models.mlp(64, (64,), 10), ("1.*",))
    tasks = cs.data.split_classes(digits, 5)
    train = cs.Training(epochs=1, batch_size=32, lr=0.01, precision="fp64", sampler=Balanced())
    schedules = [
        cs.settings.continual(tasks),
        cs.settings.continual(tasks[::-1]),
        cs.settings.continual(cs.data.split_classes(digits, 10)),
        cs.settings.federated(cs.data.dirichlet(digits, 5, 0.1), 1),
        cs.settings.continual([digits]),
    ]
    heads = [cs.run(s, cs.methods.fed3r(temperature=0.1), model, train) for s in schedules]
    for other in heads[1:]:
        assert relative(head_of(other.params), head_of(heads[0].params)) < 1e-9, other.setting
    x, y = digits.test.whole()
    before = float((heads[0].predict(x).argmax(1) == y).double().mean())
    schedule = cs.settings.continual([digits], base=heads[0].params)
    after = cs.run(schedule, cs.methods.finetune(), model, train).score
    assert before > 0.85 and after > before - 0.01


# clients that leave


def statistics_run(sources, **more):
    """The server at the end, after these clients sent."""
    return cs.run(
        cs.settings.federated(sources, 1, scenario="domain", **more), cs.methods.fed3r(), mlp(), training()
    ).agent


def test_forgetting_a_client_is_never_having_heard_it_to_the_bit():
    s = [A, B, E]
    agent = statistics_run(s)
    before = head_of(agent.state.params)
    agent.forget("client-2")
    assert same(agent.state.params, statistics_run(s[:2]).state.params)
    assert {m.sender for m in agent.state.bank.values()} == {"client-0", "client-1"}
    assert relative(head_of(agent.state.params), before) > 1e-3
    agent.forget("client-0")
    agent.forget("client-1")
    assert not head_of(agent.state.params).any()
    with pytest.raises(ConsilienceError, match="`sender` must be one of the catalogue's, got 'client-9'"):
        agent.forget("client-9")


def test_what_is_forgotten_does_not_come_back_by_relaying():
    s = [A, B, E]
    agent, relay = statistics_run(s), statistics_run(s)
    agent.forget("client-1")
    left = dict(agent.state.params)
    assert any(m.sender == "client-1" for m in relay.send({}))
    agent.receive(relay.send({}))
    assert same(agent.state.params, left)
    newer = [replace(m, version=9, digest="") for m in relay.send({}) if m.sender == "client-1"]
    agent.receive(newer)
    assert same(agent.state.params, left) and all(m.sender != "client-1" for m in agent.state.bank.values())
    tensors, facts = encode_state(agent.state)
    agent.state = decode_state(tensors, facts)
    assert agent.state.forgotten == ("client-1",)
    agent.receive(newer)
    assert same(agent.state.params, left)


def test_weights_cannot_be_forgotten_and_experts_can():
    schedule = cs.settings.federated([A, B], 1, scenario="domain")
    agent = cs.run(schedule, cs.methods.fedavg(), mlp(), training()).agent
    params = agent.state.params
    with pytest.raises(
        Refusal, match="averaged weights of one sender cannot be removed; train again without"
    ):
        agent.forget("client-0")
    assert agent.state.params is params and agent.state.forgotten == ()
    agent = cs.run(
        cs.settings.merging([A, B, E], scenario="domain"), cs.methods.average_ensemble(), mlp(), training()
    ).agent
    agent.forget("expert-2")
    alone = cs.run(
        cs.settings.merging([A, B], scenario="domain"), cs.methods.average_ensemble(), mlp(), training()
    ).agent
    x = A.train.whole()[0]
    assert torch.equal(agent.predict(x), alone.predict(x))


def test_leave_one_out_is_judged_on_the_one_left_out():
    s = [source(n, 40, seed=i) for i, n in enumerate("abc")]
    found = cs.settings.leave_one_out(s, lambda rest: cs.settings.federated(rest, 1, scenario="domain"))
    assert list(found) == ["a", "b", "c"]
    for name, schedule in found.items():
        rest = [one for one in s if one.name != name]
        assert [o.name for o in schedule.sources] == [o.name for o in rest] and [
            j.name for j in schedule.judged
        ] == [name]
        r = cs.run(schedule, cs.methods.fed3r(), mlp(), training())
        assert same(r.params, statistics_run(rest).state.params)
        x, y = next(o for o in s if o.name == name).test.whole()
        assert r.sources == (name,) and r.score == float((r.predict(x).argmax(1) == y).double().mean())
    left = cs.settings.leave_one_out(
        [source("a", 20, (0, 1), 1), source("b", 20, (2, 3), 2)], cs.settings.federated
    )["b"]
    assert cs.run(left, cs.methods.fed3r(), mlp(), training()).score == 0, "classes that nobody taught"
    with pytest.raises(ConsilienceError, match="two sources or more"):
        cs.settings.leave_one_out([A], cs.settings.federated)


# label sets of one's own, and entries of one's own


def site_clients():
    """One client has the classes 0 and 1, the other 1 to 9."""
    digits = cs.data.digits()
    own = []
    for name, classes in (("few", (0, 1)), ("many", tuple(range(1, 10)))):
        parts = {}
        for p in ("train", "validation", "test"):
            examples = getattr(digits, p)
            y = examples.targets()
            keep = torch.isin(y, torch.tensor(classes)).nonzero().flatten()
            parts[p] = examples.select(keep)
        own.append(replace(digits, name=name, classes=classes, **parts))
    return own


@pytest.mark.parametrize("method", ["fedavg", "fed3r", "personal"])
def test_clients_with_label_sets_of_their_own(method):
    clients, model = site_clients(), cs.models.mlp(64, (64,), 10)
    train = cs.Training(epochs=3, batch_size=16, lr=0.1)
    schedule = cs.settings.federated(clients, {"fedavg": 8}.get(method, 2))
    assert schedule.frame.labels == cs.data.digits().labels
    r = cs.run(schedule, getattr(cs.methods, method)(), model, train)
    for i, s in enumerate(clients):
        x, y = s.test.whole()
        answer = r.predict(x, agent=f"client-{i}" if method == "personal" else None)
        assert r.matrix[-1][i] == pytest.approx(float((answer.argmax(1) == y).double().mean()))
    if method == "personal":
        for i, name in enumerate(("client-0", "client-1")):
            own = cs.run(judged_as(schedule, name), cs.methods.personal(), model, train)
            assert own.matrix[-1][i] > 0.85 and not torch.equal(own.params["3.weight"], r.params["3.weight"])
        assert torch.equal(r.params["3.weight"], model.init(key(0, "init"))[0]["3.weight"])
    else:
        assert r.matrix[-1].min() > (0.85 if method == "fed3r" else 0.5)


def test_personal_entries_stay_and_all_else_is_averaged():
    s, base = [A, B], start()
    schedule = cs.settings.federated(s, 2, scenario="domain")
    server, *clients = agents(schedule, cs.methods.personal(), ("server", "client-0", "client-1"))
    body = {n: p for n, p in base.items() if n.startswith("1.")}
    heads = [{n: p for n, p in base.items() if n.startswith("3.")} for _ in s]
    locals_ = []
    for r in range(2):
        locals_ = [entries(fit(plain(params={**body, **heads[k]}), one, visit=r)) for k, one in enumerate(s)]
        heads = [{n: p for n, p in local.items() if n.startswith("3.")} for local in locals_]
        sizes = [len(one.train) for one in s]
        body = {
            n: sum(local[n] * z for local, z in zip(locals_, sizes, strict=True)) / sum(sizes) for n in body
        }
    near({n: server.state.params[n] for n in body}, body)
    for client, local in zip(clients, locals_, strict=True):
        near(client.state.params, local)


def test_personal_patterns():
    schedule = cs.settings.federated([A, B], 1, scenario="domain")
    multi = cs.models.multi_head(mlp(), C)
    tasks = cs.settings.federated(
        [source("a", 20, (0, 1), 1), source("b", 20, (2, 3), 2)], 1, scenario="task"
    )
    server = cs.run(tasks, cs.methods.personal(), multi, training()).agent
    assert not any(n.startswith("heads.") for n in server.state.params)

    def module():
        return nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, C))

    norm = cs.run(schedule, cs.methods.personal("1.*"), cs.models.wrap(module), training()).agent
    first, buffers = cs.models.wrap(module).init(key(0, "init"))
    assert torch.equal(norm.state.params["1.weight"], first["1.weight"].double())
    assert torch.equal(norm.state.buffers["1.running_mean"], buffers["1.running_mean"].double())
    assert not torch.equal(norm.state.params["0.weight"], first["0.weight"].double())
    with pytest.raises(Refusal, match=r"personal entries must be the model's, got 'nothing\*'"):
        cs.run(schedule, cs.methods.personal("nothing*"), mlp(), training())
    with pytest.raises(Refusal, match="no agent receives from another here; use finetune"):
        cs.run(cs.settings.continual([A, B], "domain"), cs.methods.personal(), mlp(), training())
    with pytest.raises(ConsilienceError, match="`patterns` must be names of entries"):
        cs.methods.personal(())


def test_tuning_after_training_is_a_run_that_begins_from_it():
    clients = digits_clients(5)
    model, train = cs.models.mlp(64, (64,), 10), cs.Training(epochs=2, batch_size=16, lr=0.05)
    first = cs.run(cs.settings.federated(clients, 2), cs.methods.fedavg(), model, train)
    own = [
        cs.run(cs.settings.continual([c], base=first.params), cs.methods.finetune(), model, train)
        for c in clients
    ]
    assert all(o.matrix[0][0] == pytest.approx(first.matrix[-1][i]) for i, o in enumerate(own))
