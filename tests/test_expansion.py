"""DEN, phase by phase, and PSP's complex and rotation keys."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F

import consilience as cs
from consilience.core.contexts import Context
from consilience.core.params import key, same
from consilience.core.source import Source, Tensors
from consilience.corrections.expansion import DEN, Chain
from consilience.corrections.superposition import PSP, rotation_key
from consilience.loop.agent import Agent
from restate import acting, stopped

D, C = 6, 6
HEAVY = {"momentum": 0.9, "weight_decay": 0.01}
ACTIVE = {"l1": 0.06, "group": 1.9, "drift": 0.02, "anchor": 0.2, "eps": 0.05, "units": 3, "threshold": 0.3}
"""Values at which every phase does something on the tiny problem."""


def source(i, n=40, classes=None):
    g = torch.Generator().manual_seed(100 + i)
    own = classes or (2 * i, 2 * i + 1)
    x = torch.randn(n, D, generator=g, dtype=torch.float64)
    t = Tensors(x, torch.tensor(own)[torch.randint(len(own), (n,), generator=g)])
    return Source(f"s/{i}", t, t, t, tuple(("space", str(c)) for c in range(C)), own)


SOURCES = [source(0), source(1, 33), source(2, 37)]


def mlp():
    return cs.models.mlp(D, (12, 10), C)


def training(**more):
    given = {"epochs": 5, "batch_size": 8, "lr": 0.1, "precision": "fp64", **HEAVY, **more}
    return cs.Training(**acting(given))


def go(method, model=None, sources=SOURCES, **more):
    return cs.run(cs.settings.continual(sources, "task"), method, model or mlp(), training(**more))


def den(**arguments):
    return cs.Method("den", (DEN(**{**ACTIVE, **arguments}),))


def start(model):
    return {n: p.double() for n, p in model.init(key(0, "init"))[0].items()}


def items(r):
    return [r.agent.state.memory["DEN"][s.name] for s in SOURCES]


def seen(r, task):
    c, agent = r.agent.method.corrections[0], r.agent
    return c.view(
        dict(agent.state.params), task, Context(recalled=c.recall(agent.memory(c), ()), model=agent.model)
    )


# the restatement of DEN: three dense layers that really grow, one task after another


class Restated:
    """`w`, `b`: the layers as the newest task sees them, only living units; `old`: those of earlier tasks,
    whose rows follow until split."""

    def __init__(self, c, model):
        p = start(model)
        self.c, self.w, self.b = c, [p[f"{n}.weight"] for n in (1, 3, 5)], [p[f"{n}.bias"] for n in (1, 3, 5)]
        self.base = [self.w[2], self.b[2]]
        self.columns = [
            list(range(D)),
            list(range(12)),
            list(range(10)),
        ]  # of what is alive among all columns ever drawn
        self.full, self.old, self.log = [D, 12, 10], [], []

    def learn(self, s, epochs=5, size=8, lr=0.1):
        c, first, u = self.c, not self.old, self.c.units
        p = {f"w{i}": self.w[i] for i in range(3)} | {f"b{i}": self.b[i] for i in range(3)}
        if not first:
            p |= {
                "w2": torch.cat([self.base[0], torch.zeros(C, len(self.columns[2]) - 10 + u)], 1),
                "b2": self.base[1],
            }
            g = key(0, s.name, 0, "DEN", "begin")
            for i in range(2):
                inputs = self.full[i] + (u if i else 0)
                draw = (2 * torch.rand(u, inputs + 1, generator=g) - 1).mul(inputs**-0.5).double()
                p[f"in{i}"], p[f"inb{i}"] = draw[:, [1 + j for j in self.columns[i]]], draw[:, 0]
                if i:
                    p["in1"], p["out1"] = (
                        torch.cat([p["in1"], draw[:, -u:]], 1),
                        torch.zeros(len(self.w[1]), u).double(),
                    )
        p = {n: t.double() for n, t in p.items()}
        began, keep = dict(p), {n: torch.ones_like(t) for n, t in p.items()}
        alive = [torch.zeros(u, dtype=torch.bool)] * 2
        rows, known = torch.zeros(C, dtype=torch.bool), [len(self.w[0]), len(self.w[1])]
        rows[list(s.classes)] = True
        reached = split = None
        losses, expanded, events = [], False, {}

        def layers(p):
            p = {n: t * keep[n] for n, t in p.items()}
            if first:
                return [p["w0"], p["w1"], p["w2"]], [p["b0"], p["b1"], p["b2"]]
            here = [torch.cat([torch.ones(known[i], dtype=torch.bool), alive[i]]) for i in range(2)]
            w0, w1 = torch.cat([p["w0"], p["in0"]]), torch.cat([torch.cat([p["w1"], p["out1"]], 1), p["in1"]])
            b0, b1 = torch.cat([p["b0"], p["inb0"]]), torch.cat([p["b1"], p["inb1"]])
            return [w0[here[0]], w1[here[1]][:, here[0]], p["w2"][:, here[1]]], [
                b0[here[0]],
                b1[here[1]],
                p["b2"],
            ]

        def forward(p, x):
            w, b = layers(p)
            for i in range(2):
                x = torch.relu(F.linear(x, w[i], b[i]))
            return F.linear(x, w[2], b[2])

        def free(phase):
            f = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in p.items()}
            if first:
                f = {n: ~t for n, t in f.items()}
                f["w2"], f["b2"] = rows[:, None].expand(p["w2"].shape), rows
                return f
            if phase == 0:
                f["w2"][rows, : known[1]], f["b2"] = True, rows
                return f
            before = torch.ones(D, dtype=torch.bool)
            idle = phase == 2 and expanded  # only what is new trains
            for i in range(2):
                old = [None, reached, None if expanded else reached, reached, split][phase]
                if not idle:
                    f[f"w{i}"], f[f"b{i}"] = old[i][:, None] & before[None], old[i].clone()
                if phase > 1:
                    f[f"in{i}"], f[f"inb{i}"] = (
                        alive[i][:, None].expand(p[f"in{i}"].shape).clone(),
                        alive[i].clone(),
                    )
                    if i:
                        f["in1"][:, known[0] :] &= alive[0]
                        f["out1"] = reached[1][:, None] & alive[0][None]
                before = reached[i]
            if not idle:
                f["w2"][:, : known[1]], f["b2"] = rows[:, None] & before[None], rows
            if phase > 1:
                f["w2"][:, known[1] :] = rows[:, None] & alive[1][None]
            return {n: m & (keep[n] > 0) for n, m in f.items()}

        def smooth(x):
            return torch.where(x.abs() < c.eps, x * x / (2 * c.eps) + c.eps / 2, x.abs())

        def added(leaves, phase, f):
            w = {n: t * f[n] for n, t in leaves.items() if n[0] in "wo" or n in ("in0", "in1")}
            if first or phase == 0:
                return c.l1 * sum(smooth(t).sum() for t in w.values())
            if phase == 1 or (phase == 2 and not expanded):
                return c.l2 / 2 * sum((t**2).sum() for t in w.values())
            if phase == 2:
                norms = [(w[n] ** 2).sum(1).add(1e-300).sqrt() for n in ("in0", "in1")]
                return c.l1 * sum(smooth(t).sum() for t in w.values()) + c.group * sum(
                    smooth(n).sum() for n in norms
                )
            return (
                c.anchor
                / 2
                * sum((((leaves[n] - began[n]) * f[n]) ** 2).sum() for n in ("w0", "b0", "w1", "b1"))
            )

        velocity = {n: torch.zeros_like(t) for n, t in p.items()}
        steps = -(-len(s.train.y) // size)
        total, i = epochs * steps, 0
        for epoch in range(epochs):
            for index in torch.randperm(
                len(s.train.y), generator=key(0, s.name, 0, epoch, 0, "shuffle")
            ).split(size):
                phase, then = 5 * i // total, 5 * (i + 1) // total
                f = free(phase)
                leaves = {n: t.clone().requires_grad_() for n, t in p.items()}
                out = forward(leaves, s.train.x[index])[:, list(s.classes)]
                loss = F.cross_entropy(out, s.train.y[index] - s.classes[0])
                grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                more = torch.autograd.grad(added(leaves, phase, f), list(leaves.values()), allow_unused=True)
                losses.append((phase, float(loss.detach())))
                for (n, t), g, h in zip(list(p.items()), grads, more, strict=True):
                    g = torch.zeros_like(t) if g is None else g * f[n]
                    velocity[n] = 0.9 * velocity[n] + (g + (0 if h is None else h) + 0.01 * t)
                    p[n] = torch.where(f[n], t - lr * velocity[n], t)
                i += 1
                if then == phase:
                    continue
                if first:
                    if then == 5:
                        for n in ("w0", "w1"):
                            keep[n] = (p[n].abs() > c.eps).double()
                        keep["w2"][rows] = (p["w2"][rows].abs() > c.eps).double()
                elif phase == 0:
                    keep["w2"][rows, : known[1]] = (p["w2"][rows, : known[1]].abs() > c.eps).double()
                    two = torch.tensor(
                        [any(keep["w2"][k, j] > 0 for k in s.classes) for j in range(known[1])]
                    )
                    one = torch.tensor(
                        [any(two[k] and p["w1"][k, j] != 0 for k in range(known[1])) for j in range(known[0])]
                    )
                    reached = [one, two]
                elif phase == 1:
                    last = [v for q, v in losses if q == 1][-steps:]
                    expanded = sum(last) / len(last) > c.threshold
                    alive = [torch.full((u,), expanded)] * 2
                elif phase == 2 and expanded:
                    alive = [(p[f"in{j}"] * f[f"in{j}"]).norm(dim=1) > c.eps for j in range(2)]
                    for n in ("in0", "in1", "out1", "w2"):
                        keep[n] = torch.where(f[n] & (p[n].abs() <= c.eps), 0.0, keep[n])
                elif phase == 3:
                    split = []
                    for j in range(2):
                        moved = ((p[f"w{j}"] - began[f"w{j}"]) ** 2).sum(1) + (
                            p[f"b{j}"] - began[f"b{j}"]
                        ) ** 2
                        split.append((moved.sqrt() > c.drift) & reached[j])
        if not first:
            events = {"reached": reached, "split": split, "expanded": expanded, "alive": alive}
        w, b = layers(p)
        for net in self.old:
            for j in range(2):
                n, m = net["w"][j].shape
                net["follows"][j] &= ~split[j][:n]
                net["w"][j] = torch.where(net["follows"][j][:, None], w[j][:n, :m], net["w"][j])
                net["b"][j] = torch.where(net["follows"][j], b[j][:n], net["b"][j])
        if not first:
            for j in range(2):
                self.columns[j + 1] += [self.full[j + 1] + k for k in range(u) if alive[j][k]]
                self.full[j + 1] += u
        else:
            self.base = [w[2], b[2]]
        self.w, self.b = [w[0], w[1], w[2]], [b[0], b[1], b[2]]
        follows = [torch.ones(len(w[j]), dtype=torch.bool) for j in range(2)]
        self.old.append({"w": list(w), "b": list(b), "follows": follows})
        self.log.append(events)


@pytest.mark.parametrize("values", [{}, {"threshold": float("inf")}, {"drift": 0.0, "group": 0.1}])
def test_den_is_its_restatement(values):
    c = den(**values).corrections[0]
    restated = Restated(c, mlp())
    for s in SOURCES:
        restated.learn(s)
    r = go(den(**values))
    for s, net in zip(SOURCES, restated.old, strict=True):
        p = seen(r, s.name)
        for n, w, b in zip((1, 3, 5), net["w"], net["b"], strict=True):
            assert p[f"{n}.weight"].shape == w.shape, (s.name, n)
            assert float((p[f"{n}.weight"] - w).abs().max()) < 1e-9, (s.name, n)
            assert float((p[f"{n}.bias"] - b).abs().max()) < 1e-9, (s.name, n)
    events = restated.log[1:]
    if not values:  # otherwise the comparison would see little
        assert any(e["expanded"] for e in events), "no expansion"
        assert any(0 < int(x.sum()) < len(x) for e in events for x in e["reached"]), "all or none is reached"
        assert any(
            0 < int(x.sum()) < int(y.sum())
            for e in events
            for x, y in zip(e["split"], e["reached"], strict=True)
        ), "splits"
        assert any(0 < int(a.sum()) < len(a) for e in events for a in e["alive"]), "all or none is dropped"


# what the paper promises


def watched(monkeypatch, method, look, **more):
    """A run during which `look(agent, job)` sees each finished learn."""
    finish = Agent.finish

    def after(agent, job):
        finish(agent, job)
        look(agent, job)

    monkeypatch.setattr(Agent, "finish", after)
    r = go(method, **more)
    monkeypatch.undo()
    return r


def test_below_the_threshold_nothing_expands():
    high, none = go(den(threshold=float("inf"))), go(den(units=0))
    own = {n for n in none.params if "5.weight" not in n}
    assert own <= high.params.keys() and same(
        {n: high.params[n] for n in own}, {n: none.params[n] for n in own}
    )
    assert (high.matrices == none.matrices).all()
    for s in SOURCES:
        assert same(
            seen(high, s.name),
            {n: p for n, p in seen(none, s.name).items() if n in seen(high, s.name)}
            | {n: p for n, p in seen(high, s.name).items() if n.startswith("den/")},
        )
        assert seen(high, s.name)["5.weight"].shape == (C, 10)
    for item in items(high)[1:]:
        assert not any(bool(t.any()) for t in item.group("live").values())


def test_expansion_adds_at_most_units():
    for group, most in ((0.0, 3), (1.9, 3), (50.0, 0)):
        r = go(den(threshold=0.0, group=group, eps=0.05 if group < 50 else 5.0))
        for t, s in enumerate(SOURCES):
            widths = [len(seen(r, s.name)[f"{n}.weight"]) for n in (1, 3)]
            assert 12 <= widths[0] <= 12 + most * t and 10 <= widths[1] <= 10 + most * t
            if not group:
                assert widths == [12 + 3 * t, 10 + 3 * t]
        assert {n: p.shape for n, p in r.params.items() if not n.startswith("den/")} == {
            n: p.shape for n, p in start(mlp()).items()
        }


def test_what_is_not_reached_and_old_heads_stay_to_the_bit(monkeypatch):
    unreached = []

    def look(agent, job):
        ctx = job.corrections[0][1]
        if not ctx.recalled.stages:
            return
        was, now, mark = (job.layout.split(v) for v in (job.start, job.carry.theta, ctx.trace["mark"]))
        chain, inputs = Chain.of(agent.model), torch.ones(D, dtype=torch.bool)
        for n in chain.layers:
            rows = mark[n][:, 0] > 0
            still = ~(rows[:, None] & inputs[None])
            assert torch.equal(was[n][still], now[n][still]) and not torch.equal(was[n], now[n])
            assert torch.equal(was[chain.biases[n]][~rows], now[chain.biases[n]][~rows])
            unreached.append(int((~rows).sum()))
            inputs = rows
        past = [n for n in was if "5." in n and ctx.recalled.source not in n]
        assert len(past) >= 2 and all(torch.equal(was[n], now[n]) for n in past)

    watched(monkeypatch, den(), look)
    assert sum(unreached) > 0, "everything was reached: this test would see nothing"


def test_split_units_are_as_before_for_old_tasks_and_others_moved_little(monkeypatch):
    before, split, moved = {}, [], []

    def look(agent, job):
        c = job.corrections[0][0]
        ctx = Context(recalled=c.recall(agent.memory(c), ()), model=agent.model)
        item = agent.state.memory["DEN"][job.name]
        for task in before:
            now = c.view(dict(agent.state.params), task, ctx)
            for n in ("1", "3"):
                row = lambda p, n=n: torch.cat([p[f"{n}.weight"], p[f"{n}.bias"][:, None]], 1)  # noqa: E731
                gap = (row(now) - row(before[task])).norm(dim=1)
                assert float(gap.max()) <= c.drift + 1e-12
                if f"split/{n}.weight" in item.tensors:
                    rows = item.tensors[f"split/{n}.weight"][: len(gap)]
                    assert float(gap[rows].sum()) == 0
                    split.append(int(rows.sum()))
                moved.append(int((gap > 0).sum()))
            assert torch.equal(now["5.weight"], before[task]["5.weight"])
        before.update({s: c.view(dict(agent.state.params), s, ctx) for s in agent.state.visits})

    watched(monkeypatch, den(group=0.1), look)
    assert sum(split) > 0 and sum(moved) > 0
    before.clear()
    r = watched(monkeypatch, den(drift=float("inf")), lambda *_: None)
    assert not any(n.startswith("split/") for i in items(r) for n in i.tensors)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_without_drift_old_answers_stay_to_the_bit(optimiser, monkeypatch):
    told = {}

    def look(agent, job):
        agent.outputs(agent.state.params, agent.state.buffers, SOURCES[0].test.x, "unknown")
        for s in SOURCES:
            if s.name in agent.state.visits:
                out = agent.outputs(agent.state.params, agent.state.buffers, s.test.x, s.name)
                assert torch.equal(told.setdefault(s.name, out), out)

    watched(
        monkeypatch,
        den(drift=0.0, group=0.1),
        look,
        optimiser=optimiser,
        lr=0.1 if optimiser == "sgd" else 0.02,
    )
    assert len(told) == 3


def test_old_tasks_do_not_read_entries_of_later_ones():
    agent = go(den(threshold=0.0, group=0.1)).agent
    for t, s in enumerate(SOURCES):
        later = {n for u in SOURCES[t + 1 :] for n in agent.state.params if n.startswith(f"den/{u.name}/")}
        noisy = {n: p + 7.0 if n in later else p for n, p in agent.state.params.items()}
        out, other = (agent.outputs(p, {}, s.test.x, s.name) for p in (agent.state.params, noisy))
        assert torch.equal(out, other) and (later or t == 2)
    own = {n: p + 7.0 if n.startswith("den/s/1/") else p for n, p in agent.state.params.items()}
    assert not torch.equal(
        agent.outputs(own, {}, SOURCES[1].test.x, "s/1"),
        agent.outputs(agent.state.params, {}, SOURCES[1].test.x, "s/1"),
    )


def test_short_learns_pass_all_phases():
    for epochs, batch in ((0, 8), (1, 40), (2, 20), (3, 20)):
        r = go(den(threshold=0.0), epochs=epochs, batch_size=batch)
        assert torch.isfinite(torch.tensor(r.matrices)).all()


def test_tasks_may_share_classes_and_a_frozen_trunk_may_come_first():
    r = go(
        den(threshold=0.0, group=0.1, l1=0.001, eps=0.001),
        sources=[source(i, classes=(0, 1)) for i in range(3)],
    )
    heads = [seen(r, s.name)["5.weight"][:2] for s in SOURCES]
    assert not torch.equal(heads[1][:, :10], heads[2][:, :10])

    def module():
        return torch.nn.Sequential(
            torch.nn.Linear(D, 8),
            torch.nn.ReLU(),
            torch.nn.Linear(8, 9),
            torch.nn.ReLU(),
            torch.nn.Linear(9, C, bias=False),
        )

    r = go(den(threshold=0.0, group=0.1), cs.models.wrap(module, frozen=("0.*",)))
    assert seen(r, "s/2")["2.weight"].shape == (15, 8) and seen(r, "s/2")["4.weight"].shape == (C, 15)


def test_den_learns_digits_in_five_tasks():
    parts = cs.data.split_classes(cs.data.digits(), 5)
    fit = cs.Training(epochs=8, lr=0.05, momentum=0.9)
    r = cs.run(cs.settings.continual(parts, "task"), cs.methods.den(), cs.models.mlp(64, (64,), 10), fit)
    assert r.score > 0.93, r.matrix


def test_den_forgets_less_where_tasks_share_classes():
    parts = cs.data.permute(cs.data.digits(), 2)
    fit = cs.Training(epochs=5, lr=0.05, momentum=0.9)
    found = [
        cs.run(cs.settings.continual(parts, "task"), m, cs.models.mlp(64, (64, 32), 10), fit)
        for m in (cs.methods.den(), cs.methods.den(drift=0.0), cs.methods.finetune())
    ]
    assert min(found[0].score, found[1].score) > max(0.75, found[2].score + 0.1), [r.score for r in found]
    after = found[1].matrix[1:]
    assert all((after[j:, j] == after[j, j]).all() for j in range(2)), "nothing is forgotten"


@cache
def whole():
    return go(den())


@pytest.mark.parametrize("at", [3, 27, 31, 36, 41, 46])
def test_resumes_in_every_phase_to_the_same_bits(at, tmp_path):
    """The second learn has steps 25 to 49, five a phase."""

    def run(**more):
        return cs.run(cs.settings.continual(SOURCES, "task"), den(), mlp(), training(), **more)

    stopped(run, tmp_path / "run", at, at)
    again = run(out=tmp_path / "run", resume=True)
    assert same(whole().params, again.params) and (whole().matrices == again.matrices).all()
    for a, b in zip(items(whole()), items(again), strict=True):
        assert same(a.tensors, b.tensors)


def test_den_composes_in_either_order():
    for other in (cs.methods.psp(), cs.methods.ewc(0.01), cs.methods.xdg(0.3)):
        one, two = (
            go(m, sources=SOURCES[:2], epochs=2)
            for m in (den(threshold=0.0) + other, other + den(threshold=0.0))
        )
        assert max(float((one.params[n] - two.params[n]).abs().max()) for n in one.params) < 1e-9


def test_den_refuses():
    for method, model, sources, scenario, why in (
        (den(), mlp(), SOURCES, "class", "neither a label nor a mapper; use scenario='task'"),
        (den(), cs.models.linear(D, C), SOURCES, "task", "no trainable layer that tasks share"),
        (
            den(),
            cs.models.multi_head(cs.models.mlp(D, (12, 10), 4), C),
            SOURCES,
            "task",
            "a head of its own.*multi_head has none.*use mlp",
        ),
        (
            den(),
            cs.models.conv(C, 1, 8, 4),
            SOURCES,
            "task",
            "linear layers in a chain, got '0.weight' of shape",
        ),
        (den(), cs.models.resnet(20, C, 1, width=2), SOURCES, "task", "use a model without norms"),
    ):
        with pytest.raises(cs.Refusal, match=why):
            cs.run(cs.settings.continual(sources, scenario), method, model, training())

    class Residual(torch.nn.Module):
        def __init__(self, over):
            super().__init__()
            self.one, self.two, self.head, self.over = (
                torch.nn.Linear(D, 8),
                torch.nn.Linear(8, 8),
                torch.nn.Linear(8, C),
                over,
            )

        def forward(self, x):
            x = self.one(x)
            return self.head(x.softmax(1) if self.over else x[:, :8] + self.two(x))

    for over, why in ((False, "size of tensor"), (True, "outputs change with a unit that leads nowhere")):
        with pytest.raises(cs.Refusal, match=f"this one cannot: .*{why}.*; use mlp"):
            go(den(), cs.models.wrap(lambda over=over: Residual(over)))
    with pytest.raises(cs.Refusal, match="what is received moves"):
        cs.run(cs.settings.federated_continual([SOURCES[:2], SOURCES[2:]], 1, scenario="task"), den(), mlp())
    with pytest.raises(cs.Refusal, match="a step has several"):
        cs.run(cs.settings.multitask(SOURCES, "task"), den(), mlp())
    for name, value in (
        ("threshold", float("nan")),
        ("drift", -1.0),
        ("units", 1.5),
        ("eps", 0.0),
        ("group", -1.0),
        ("l1", float("inf")),
    ):
        with pytest.raises(cs.ConsilienceError, match=f"`{name}`.* must be.*, got {value}"):
            DEN(**{name: value})


# PSP's keys


@pytest.mark.parametrize("keys", ["complex", "rotation"])
@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_keys_are_orthogonal(keys, width):
    c = rotation_key("a", "layer", width, keys)
    assert torch.allclose(c @ c.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.equal(c, rotation_key("a", "layer", width, keys)) and (
        width < 2 or not torch.equal(c, rotation_key("b", "layer", width, keys))
    )


def test_complex_keys_are_phases_of_pairs():
    c, x = rotation_key("a", "layer", 7, "complex"), torch.randn(5, 7, generator=key(1), dtype=torch.float64)
    z = torch.view_as_complex((x @ c)[:, :6].reshape(5, 3, 2).contiguous())
    turned = z / torch.view_as_complex(x[:, :6].reshape(5, 3, 2).contiguous())
    assert torch.allclose(turned.abs(), torch.ones(5, 3).double()) and torch.allclose(
        turned, turned[:1].expand(5, 3)
    )
    assert abs(float(c[6, 6])) == 1 and float(c[6, :6].abs().sum()) == 0
    phases = torch.tensor(
        [float(torch.atan2(*rotation_key(str(t), "l", 2, "complex")[0].flip(0))) for t in range(400)]
    )
    assert float(phases.cos().mean().abs()) < 0.1 > float(phases.sin().mean().abs())


def test_rotations_are_uniform():
    """The trace of a uniform orthogonal matrix has mean 0 and variance 1, its entries variance 1 / n; QR
    alone is biased."""
    many = torch.stack([rotation_key(str(t), "haar", 4, "rotation") for t in range(600)])
    trace = many.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(float(trace.mean())) < 0.15 and float(trace.var()) == pytest.approx(1, abs=0.2)
    assert torch.allclose(many.square().mean(0), torch.full((4, 4), 0.25).double(), atol=0.05)
    assert 0.4 < float((torch.linalg.det(many) > 0).double().mean()) < 0.6


@pytest.mark.parametrize("keys", ["binary", "complex", "rotation"])
def test_keys_turn_inputs_and_channels(keys):
    psp, g = PSP(keys=keys), key(2)
    for shape in ((5, 6), (4, 6, 3, 3)):
        w, x = (
            torch.randn(s, generator=g, dtype=torch.float64) for s in (shape, (2, 6, *[5] * (len(shape) - 2)))
        )
        eye = torch.eye(6, dtype=torch.float64)
        c = psp.seen(eye, "a", "n").T  # 1 C^T
        turned = torch.einsum("bi...,ij->bj...", x, c)
        out = F.linear if w.ndim == 2 else F.conv2d
        assert torch.allclose(out(x, psp.seen(w, "a", "n")), out(turned, w), atol=1e-12)
        assert torch.allclose(torch.einsum("oi...,ij->oj...", psp.seen(w, "a", "n"), c), w, atol=1e-12), (
            "its own key retrieves"
        )


@pytest.mark.parametrize("keys", ["binary", "complex", "rotation"])
def test_another_key_retrieves_noise(keys):
    """W stored under key a, read under key b: mean 0, and variance sum x^2 w^2, |z|^2 |w|^2 / 2 by pairs,
    |x|^2 |w|^2 / n."""
    psp, g, n, many = PSP(keys=keys), key(3), 8, 1500
    w, x = (
        torch.randn(1, n, generator=g, dtype=torch.float64),
        torch.randn(n, generator=g, dtype=torch.float64),
    )
    eye = torch.eye(n, dtype=torch.float64)
    stored = w @ psp.seen(eye, "a", "n").T  # W C_a, which key a sees as w
    assert torch.allclose(psp.seen(stored, "a", "n"), w)
    found = torch.stack([(psp.seen(stored, f"b{t}", "n") @ x)[0] for t in range(many)])
    pairs = lambda v: v.view(-1, 2).square().sum(1)  # noqa: E731
    expected = {
        "binary": (x * w[0]).square().sum(),
        "complex": (pairs(x) * pairs(w[0])).sum() / 2,
        "rotation": x.square().sum() * w.square().sum() / n,
    }[keys]
    assert abs(float(found.mean())) < 4 * float((expected / many).sqrt())
    assert float(found.var()) == pytest.approx(float(expected), rel=0.15)


@pytest.mark.parametrize("keys", ["complex", "rotation"])
def test_psp_with_other_keys_is_its_restatement(keys):
    params = start(mlp())
    velocity = {}
    names = ("1.weight", "3.weight", "5.weight")
    for s in SOURCES[:2]:
        velocity = {n: torch.zeros_like(p) for n, p in params.items()}
        for epoch in range(2):
            for i in torch.randperm(len(s.train.y), generator=key(0, s.name, 0, epoch, 0, "shuffle")).split(
                8
            ):
                leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
                h = s.train.x[i]
                for n in names:
                    h = F.linear(
                        h @ rotation_key(s.name, n, h.shape[1], keys),
                        leaves[n],
                        leaves[n.replace("weight", "bias")],
                    )
                    h = torch.relu(h) if n != "5.weight" else h
                loss = F.cross_entropy(h[:, list(s.classes)], s.train.y[i] - s.classes[0])
                for n, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                    velocity[n] = 0.9 * velocity[n] + g + 0.01 * params[n]
                    params[n] = params[n] - 0.1 * velocity[n]
    r = go(cs.methods.psp(keys=keys), sources=SOURCES[:2], epochs=2)
    assert max(float((r.params[n] - params[n]).abs().max()) for n in params) < 1e-11


def test_no_key_is_plain_training_with_any_keys():
    plain = go(cs.methods.finetune(), epochs=1)
    for keys in ("binary", "complex", "rotation"):
        assert same(go(cs.methods.psp(0.0, keys), epochs=1).params, plain.params)
        psp, params = PSP(0.0, keys), start(mlp())
        assert not psp.active and same(psp.view(params, "a", Context(model=mlp())), params)
    with pytest.raises(
        cs.ConsilienceError,
        match="`flips` must be 0.5, or 0 .*keys='rotation', got 0.3; other values need keys='binary'",
    ):
        PSP(0.3, "rotation")
    with pytest.raises(cs.ConsilienceError, match="`keys` must be binary, complex or rotation, got 'real'"):
        cs.methods.psp(keys="real")


@pytest.mark.parametrize("keys", ["complex", "rotation"])
@pytest.mark.parametrize("image", [False, True])
def test_psp_with_other_keys_learns(keys, image):
    parts = cs.data.split_classes(cs.data.digits(image), 5)
    model = cs.models.conv(10, 1, 8, 16) if image else cs.models.mlp(64, (128,), 10)
    r = cs.run(
        cs.settings.continual(parts, "task"),
        cs.methods.psp(keys=keys),
        model,
        cs.Training(epochs=6, momentum=0.9),
    )
    assert r.score > 0.9


def test_psp_with_rotations_resumes(tmp_path):
    def run(**more):
        return cs.run(
            cs.settings.continual(SOURCES, "task"), cs.methods.psp(keys="rotation"), mlp(), training(), **more
        )

    stopped(run, tmp_path / "run", 30)
    assert same(run().params, run(out=tmp_path / "run", resume=True).params)
