"""The batched engine learns what the serial one learns, for clients of any sizes, or it says why not."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

import consilience as cs
from consilience.core.batch import Batch
from consilience.core.correction import Correction
from consilience.core.errors import Interrupted
from consilience.core.optimiser import SGD
from consilience.core.params import key
from consilience.core.source import Source, Tensors
from consilience.engines import batched
from consilience.engines._graph import NATIVE, VIEWS
from consilience.engines._merge import Ragged, Slots, Unbatchable, fill, merge

D, C = 6, 3
LABELS = tuple(("toy", str(c)) for c in range(C))


def client(i: int, n: int, shape: tuple[int, ...] = (D,)) -> Source:
    g = key("engines", i)
    x = torch.randn(n + 12, *shape, generator=g)
    y = (x.flatten(1)[:, :C] + 0.3 * torch.randn(n + 12, C, generator=g)).argmax(1)
    return Source(
        f"c{i}",
        Tensors(x[:n], y[:n]),
        Tensors(x[n : n + 2], y[n : n + 2]),
        Tensors(x[n:], y[n:]),
        LABELS,
        tuple(range(C)),
    )


SIZES = (23, 40, 7, 16, 31)
CLIENTS = [client(i, n) for i, n in enumerate(SIZES)]


def mlp() -> cs.models.Model:
    return cs.models.mlp(D, (8,), C)


def go(engine, method, sources=CLIENTS, model=None, rounds=2, precision="fp64", training=None, **arguments):
    notes = []
    training = training or cs.Training(epochs=2, batch_size=8, lr=0.1, precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = cs.run(
            cs.settings.federated(sources, rounds=rounds, **arguments),
            method,
            model or mlp(),
            training,
            engine=engine,
            progress=lambda line: notes.append(line["note"]) if line["event"] == "engine" else None,
        )
    return result, notes


def gap(a, b):
    assert a.params.keys() == b.params.keys()
    return max(float((a.params[n].double() - b.params[n].double()).abs().max()) for n in a.params)


METHODS = {
    "fedavg": lambda m: m.fedavg(),
    "fedprox": lambda m: m.fedprox(0.3),
    "outer momentum": lambda m: m.fedavg(outer_momentum=0.9),
    "ewc": lambda m: m.ewc(),
    "si": lambda m: m.si(),
    "lwf": lambda m: m.lwf(),
    "ewc and fedprox": lambda m: m.ewc() + m.fedprox(),
}


def crossed(names, optimisers, every):
    """All pairs; those that `make test` runs have the first optimiser, or a name of `every`."""
    return [
        pytest.param(name, o, marks=[] if o == optimisers[0] or name in every else pytest.mark.slow)
        for name in names
        for o in optimisers
    ]


@pytest.mark.parametrize(
    ("name", "optimiser"), crossed(METHODS, ["sgd", "momentum", "adam"], ["ewc and fedprox"])
)
def test_equal_after_twenty_rounds_of_unequal_clients(name, optimiser):
    more = {"momentum": 0.9, "weight_decay": 0.01} if optimiser == "momentum" else {"optimiser": optimiser}
    t = cs.Training(epochs=2, batch_size=8, lr=0.02, precision="fp64", **more)
    method = METHODS[name](cs.methods)
    engine = batched()
    a, _ = go("serial", method, training=t, rounds=20, clients_per_round=3)
    b, notes = go(engine, method, training=t, rounds=20, clients_per_round=3)
    assert gap(a, b) < 1e-12
    assert notes == ["batched: 3 agents a step, 83 numbers each"]
    assert (
        a.costs["macs"] == b.costs["macs"]
        and a.costs["steps"] == b.costs["steps"]
        and a.costs["bytes"] == b.costs["bytes"]
    )


class Later(Correction):
    """A user's penalty that grows with the time of the visit, in parts that no short fraction is equal to."""

    def penalty_gradient(self, step, ctx):
        (epoch, index), (epochs, steps) = step.clock, step.horizon
        return step.theta - step.start, 0.1 * (epoch * steps + index) / (epochs * steps) + epoch / 3

    def penalty(self, step, ctx):
        vector, factor = self.penalty_gradient(step, ctx)
        return factor * torch.dot(vector, vector) / 2


@pytest.mark.parametrize("name", ["ghbm", "fedhbm", "a clock"])
def test_quotients_of_steps_are_made_in_double_precision(name):
    """Steps per epoch are 3 and 5 here: a third in float32 is off by 1e-8, and so is what it scales."""
    method = {"ghbm": cs.methods.ghbm(), "fedhbm": cs.methods.fedhbm(), "a clock": cs.Method("c", (Later(),))}
    t = cs.Training(epochs=3, batch_size=8, lr=0.05, precision="fp64")
    a, _ = go("serial", method[name], CLIENTS[:2], training=t, rounds=3)
    b, notes = go("batched", method[name], CLIENTS[:2], training=t, rounds=3)
    assert notes[0].startswith("batched: 2")
    assert gap(a, b) < 1e-13


@pytest.mark.parametrize("name", METHODS)
def test_equal_in_single_precision(name):
    rounds = 1 if name in ("fedavg", "fedprox", "outer momentum") else 2  # in the first nothing is known
    a, _ = go("serial", METHODS[name](cs.methods), rounds=rounds, precision="fp32")
    b, _ = go("batched", METHODS[name](cs.methods), rounds=rounds, precision="fp32")
    assert gap(a, b) < 1e-5


def conv(norm):
    return cs.models.wrap(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            norm(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, C),
        )
    )


def test_convolutions_with_group_norm():
    sources = [client(i, n, (1, 8, 8)) for i, n in enumerate((9, 16, 20))]
    model = conv(lambda: nn.GroupNorm(2, 4))
    a, _ = go("serial", cs.methods.fedavg(), sources, model)
    b, notes = go("batched", cs.methods.fedavg(), sources, model)
    assert gap(a, b) < 1e-12 and notes[0].startswith("batched: 3")


def test_batch_norm_with_equal_full_batches_and_not_with_others():
    full = [client(i, 16, (1, 8, 8)) for i in range(3)]
    model = conv(lambda: nn.BatchNorm2d(4))
    a, _ = go("serial", cs.methods.fedavg(), full, model)
    b, notes = go("batched", cs.methods.fedavg(), full, model)
    assert gap(a, b) < 1e-11 and notes == [
        f"batched: 3 agents a step, {sum(p.numel() for p in b.agent.state.params.values())} numbers each"
    ]
    for n, t in a.agent.state.buffers.items():
        assert torch.allclose(t, b.agent.state.buffers[n], atol=1e-12)
    odd = [client(i, n, (1, 8, 8)) for i, n in enumerate((16, 12))]
    a, _ = go("serial", cs.methods.fedavg(), odd, model)
    b, notes = go("batched", cs.methods.fedavg(), odd, model)
    assert gap(a, b) == 0 and any("outputs depend on the other samples of a batch" in n for n in notes)


def test_what_cannot_be_stacked_says_why():
    dropout = cs.models.wrap(lambda: nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.2), nn.Linear(8, C)))
    a, _ = go("serial", cs.methods.fedavg(), model=dropout)
    b, notes = go("batched", cs.methods.fedavg(), model=dropout)
    assert gap(a, b) == 0 and notes == ["one after another: the model draws random numbers in its forward"]


def test_rehearsal_is_drawn_outside_and_stacked():
    streams = [[client(2 * i, 24), client(2 * i + 1, 20)] for i in range(3)]
    schedule = cs.settings.federated_continual(streams, rounds=2)
    t = cs.Training(epochs=2, batch_size=8, lr=0.1, precision="fp64")
    for method in (cs.methods.er(50), cs.methods.derpp(50), cs.methods.er_ace(50)):
        a = cs.run(schedule, method, mlp(), t)
        b = cs.run(schedule, method, mlp(), t, engine="batched")
        assert gap(a, b) < 1e-12


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_any_chunk_gives_the_same(chunk):
    a, _ = go("serial", cs.methods.fedprox())
    b, _ = go(batched(chunk=chunk), cs.methods.fedprox())
    assert gap(a, b) < 1e-12
    with pytest.raises(cs.ConsilienceError, match="`chunk` must be at least 1, got 0"):
        batched(chunk=0)


def test_no_client_may_see_another():
    """Which clients are stacked together changes nothing for any of them."""
    t = cs.Training(epochs=1, batch_size=8, lr=0.1, precision="fp64")
    alone = cs.run(cs.settings.federated(CLIENTS[:1], rounds=1), cs.methods.fedavg(), mlp(), t)
    seen = {}

    class Spy(type(batched())):
        def train(self, visits, events, paused=None):
            super().train(visits, events, paused)
            seen.update({agent.name: agent.state.params for agent, *_ in visits})

    cs.run(cs.settings.federated(CLIENTS, rounds=1), cs.methods.fedavg(), mlp(), t, engine=Spy())
    assert max(float((seen["client-0"][n] - p).abs().max()) for n, p in alone.params.items()) < 1e-13


class Bad(Tensors):
    """Examples that cannot be read."""

    def map(self, x=None, y=None):
        made = super().map(x, y)
        return Bad(made.x, made.y)

    def batches(self, plan):
        raise OSError("the disk is gone")


@pytest.mark.parametrize("engine", ["serial", "batched"])
def test_a_client_that_fails_is_left_out_or_stops_the_run(engine):
    bad = replace(CLIENTS[1], train=Bad(CLIENTS[1].train.x, CLIENTS[1].train.y))
    sources = [CLIENTS[0], bad, CLIENTS[2], CLIENTS[3]]
    schedule = cs.settings.federated(sources, rounds=2)
    t = cs.Training(epochs=1, batch_size=8, lr=0.1, precision="fp64")
    with pytest.raises(OSError, match="the disk is gone"):
        cs.run(schedule, cs.methods.fedavg(), mlp(), t, engine=engine)

    def plan(seed, least):
        from consilience.core.schedule import Train

        for phase in schedule.plan(seed):
            yield replace(phase, least=least) if isinstance(phase, Train) else phase

    lines = []
    with pytest.warns(UserWarning, match=r"'client-1' failed and is left out: the disk is gone"):
        r = cs.run(
            replace(schedule, plan=lambda seed: plan(seed, 3)),
            cs.methods.fedavg(),
            mlp(),
            t,
            engine=engine,
            progress=lines.append,
        )
    assert [(line["agent"], line["why"]) for line in lines if line["event"] == "failed"] == [
        ("client-1", "OSError: the disk is gone")
    ] * 2
    without = cs.run(
        cs.settings.federated([CLIENTS[0], CLIENTS[2], CLIENTS[3]], rounds=2), cs.methods.fedavg(), mlp(), t
    )
    assert gap(r, without) < 1e-12
    with (
        warnings.catch_warnings(),
        pytest.raises(
            cs.ConsilienceError, match="at least 4 agents must finish a round, and 3 did: 'client-1': OSError"
        ),
    ):
        warnings.simplefilter("ignore")
        cs.run(
            replace(schedule, plan=lambda seed: plan(seed, 4)), cs.methods.fedavg(), mlp(), t, engine=engine
        )


def test_a_client_that_diverges_is_named():
    wild = replace(CLIENTS[2], train=Tensors(CLIENTS[2].train.x * 1e30, CLIENTS[2].train.y))
    with pytest.raises(cs.ConsilienceError, match="'client-1' on 'c2'"):
        go("batched", cs.methods.fedavg(), [CLIENTS[0], wild], precision="fp32")


def test_interrupted_between_stacks_and_resumed(tmp_path):
    whole, _ = go(batched(chunk=2), cs.methods.fedavg(outer_momentum=0.5), rounds=3)
    ticks = []

    class Stopping(type(batched())):
        def train(self, visits, events, paused=None):
            def tick(job):
                events.tick(job)
                ticks.append(job)
                if len(ticks) == 4:
                    raise Interrupted("stop")

            super().train(visits, replace(events, tick=tick), paused)

    t = cs.Training(epochs=2, batch_size=8, lr=0.1, precision="fp64")
    schedule = cs.settings.federated(CLIENTS, rounds=3)
    with pytest.raises(Interrupted):
        cs.run(
            schedule,
            cs.methods.fedavg(outer_momentum=0.5),
            mlp(),
            t,
            engine=Stopping(chunk=2),
            out=tmp_path / "r",
            checkpoint_seconds=1e-9,
        )
    again = cs.run(
        schedule,
        cs.methods.fedavg(outer_momentum=0.5),
        mlp(),
        t,
        engine=batched(chunk=2),
        out=tmp_path / "r",
        resume=True,
    )
    assert gap(whole, again) == 0 and (whole.matrices == again.matrices).all()


@pytest.mark.slow
def test_compiled_programs_learn_the_same():
    for optimiser in ("sgd", "adam"):
        t = cs.Training(epochs=2, batch_size=8, lr=0.02, precision="fp64", optimiser=optimiser)
        a, _ = go("serial", cs.methods.fedprox(), CLIENTS[:2], training=t)
        b, notes = go(batched(compiled=True), cs.methods.fedprox(), CLIENTS[:2], training=t)
        assert gap(a, b) < 1e-12 and not any("not compiled" in n for n in notes)


def test_numbers_that_differ_are_stacked_and_what_else_differs_refuses():
    from consilience.corrections.quadratic import Proximal

    slots = Slots()
    c = merge([Proximal(0.1), Proximal(0.3)], slots)
    assert slots.dims == [0] and slots.tensors[0].tolist() == [0.1, 0.3]
    assert float(fill(c, [torch.tensor(0.3)]).mu) == pytest.approx(0.3)
    ragged = merge([[1, 2], [1]], Slots())
    assert isinstance(ragged, Ragged)
    for use in (
        lambda: ragged[0],
        lambda: list(ragged),
        lambda: ragged + 1,
        lambda: bool(ragged),
        lambda: ragged.x,
    ):
        with pytest.raises(Unbatchable, match="differs between agents"):
            use()


def test_auto_stacks_small_models_once_they_take_many_steps_and_leaves_one_agent_alone():
    a, notes = go("auto", cs.methods.fedavg(), rounds=20)
    assert [n[:13] for n in notes] == [
        "one after ano",
        "batched: 5 ag",
    ] and "until 400 steps of a kind" in notes[0]
    b, _ = go("serial", cs.methods.fedavg(), rounds=20)
    assert gap(a, b) < 1e-12
    _, notes = go("auto", cs.methods.fedavg())
    assert len(notes) == 1 and "until 400 steps" in notes[0]
    one = cs.run(cs.settings.continual(CLIENTS[:2]), cs.methods.ewc(), mlp(), engine="auto")
    plain = cs.run(cs.settings.continual(CLIENTS[:2]), cs.methods.ewc(), mlp())
    assert gap(one, plain) == 0
    with pytest.raises(
        cs.ConsilienceError, match="`engine` must be one of serial, batched, ray, auto, got 'bached'"
    ):
        go("bached", cs.methods.fedavg())


def test_agents_free_what_they_will_receive_again(monkeypatch, tmp_path):
    """Agents free what the server will send them; results, bytes and resumed runs do not change by it."""
    agents = {}

    class Spy(type(batched())):
        def train(self, visits, events, paused=None):
            agents.update({agent.name: agent for agent, *_ in visits})
            super().train(visits, events, paused)

    def run(method, engine="serial", **more):
        t = cs.Training(epochs=1, batch_size=8, lr=0.1, precision="fp64")
        schedule = cs.settings.federated(CLIENTS, 4, 2, "cyclic", evaluate_every=2)
        return cs.run(schedule, method, mlp(), t, engine=engine, **more)

    for method in (cs.methods.fedavg(outer_momentum=0.5), cs.methods.personal("head") + cs.methods.fedprox()):
        light = run(method, Spy())
        held = {name: set(agent.state.params) for name, agent in agents.items()}
        own = {"3.weight", "3.bias"} if "personal" in method.name else set()
        assert len(held) == 5 and all(names == own for names in held.values()), held
        assert all(agent.state.visits for agent in agents.values())
        out = tmp_path / method.name
        with pytest.raises(KeyboardInterrupt):

            def stop(line):
                if line["event"] == "stage" and line["stage"] == 1:
                    raise KeyboardInterrupt

            run(method, out=out, checkpoint_steps=4, progress=stop)
        again = run(method, out=out, resume=True)
        monkeypatch.setattr("consilience.loop.trial.release_plan", lambda phases, evaluated: {})
        whole = run(method, "batched")
        monkeypatch.undo()
        assert gap(light, whole) == 0 and light.costs["bytes"] == whole.costs["bytes"]
        assert gap(again, whole) < 1e-12 and again.costs["bytes"] == whole.costs["bytes"]
    run(cs.methods.ghbm(0.5, 1), Spy())
    assert all(agent.state.params for agent in agents.values()), (
        "`after_receive` may read what was there before"
    )


def test_who_frees_its_parameters_and_who_does_not():
    from consilience.core.schedule import Evaluate, Exchange, Train
    from consilience.loop.agents import release_plan

    down, learn, up = (
        Exchange({"a": ("s",), "b": ("s",)}),
        Train({"a": ("x",), "b": ("y",)}),
        Exchange({"s": ("a", "b")}),
    )
    assert release_plan([down, learn, up, Evaluate("1"), down, learn, up, Evaluate("2")], "s") == {
        0: (),
        2: ("a", "b"),
        4: (),
        6: ("a", "b"),
    }
    assert release_plan([down, learn, up, Evaluate("1")], "a")[2] == ("b",), "who is judged keeps what it has"
    assert release_plan([learn, up, Evaluate("1"), learn, up], "s")[1] == (), (
        "an agent that trains on without receiving keeps what it has"
    )
    own = Exchange({"s": ("a",), "a": ("s",)})
    assert (
        release_plan([Train({"s": ("x",), "a": ("y",)}), Exchange({"s": ("a",)}), own, Evaluate("1")], "s")[1]
        == ()
    ), "s learns too"


# the programs


def programs(method, training=None, **arguments):
    engine = batched()
    go(engine, method, training=training, rounds=3, **arguments)
    return list(engine.cache.programs.values())


def arguments(program):
    """Random ones of the shapes and types that a program takes."""
    g, args = torch.Generator().manual_seed(1), []
    for n in program.graph.graph.nodes:
        if n.op == "placeholder":
            meta = n.meta["tensor_meta"]
            drawn = torch.rand(meta.shape, generator=g, dtype=torch.float64)
            args.append(
                drawn.to(meta.dtype)
                if meta.dtype.is_floating_point
                else (C * drawn).to(meta.dtype).clamp_min(1)
            )
    return args


@pytest.mark.parametrize(
    ("name", "optimiser"),
    crossed(
        [*METHODS, "ghbm", "scaffold", "fedcm", "feddyn"],
        ["sgd", "momentum", "decay", "nesterov", "adam"],
        ["scaffold"],
    ),
)
def test_a_simplified_program_is_the_traced_one(name, optimiser):
    more = {
        "momentum": {"momentum": 0.9, "weight_decay": 0.01},
        "decay": {"weight_decay": 0.1},
        "nesterov": {"optimiser": SGD(0.9, nesterov=True)},
    }.get(optimiser, {"optimiser": optimiser})
    method = METHODS[name](cs.methods) if name in METHODS else getattr(cs.methods, name)()
    made = programs(method, cs.Training(epochs=2, batch_size=8, lr=0.02, precision="fp64", **more))
    assert made
    for program in made:
        args = arguments(program)
        wanted = program.whole(*[t.clone() for t in args])
        found = program.graph(*args)
        assert len(wanted) == len(found) == program.states
        for a, b in zip(wanted, found, strict=True):
            assert torch.allclose(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "ghbm", "scaffold", "ewc"])
def test_steps_make_no_copy_of_all_parameters(name):
    """Penalties are added in place: only an update yields as many numbers as the largest entry has."""
    method = METHODS[name](cs.methods) if name in METHODS else getattr(cs.methods, name)()
    model = cs.models.mlp(D, (64,), C)
    for program in programs(
        method, cs.Training(epochs=2, batch_size=8, lr=0.02, precision="fp64"), model=model
    ):
        ShapeProp(program.graph).propagate(*arguments(program))
        for n in program.graph.graph.nodes:
            if n.op in ("call_function", "call_method") and n.meta["tensor_meta"].shape[-2:] == (64, D):
                views = {*VIEWS, *[NATIVE.get(v) for v in VIEWS]}
                assert n.target in views or str(n.target).endswith("_"), n.target


def test_an_engine_that_is_used_again_takes_other_training():
    engine, model = batched(), mlp()
    for more in (
        {},
        {"weight_decay": 0.5},
        {"momentum": 0.9},
        {"optimiser": SGD(0.9, nesterov=True)},
        {"lr": 0.01},
    ):
        t = cs.Training(**{"epochs": 1, "batch_size": 8, "lr": 0.1, "precision": "fp64", **more})
        for method in (cs.methods.fedavg(), cs.methods.fedprox(0.3), cs.methods.fedprox(3.0)):
            a, _ = go("serial", method, model=model, training=t)
            b, _ = go(engine, method, model=model, training=t)
            assert gap(a, b) < 1e-12


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


def test_named_tuples_stay_named():
    """Verbs may read what they recall by attribute, stacked or not."""
    slots = Slots()
    merged = merge([Pair(torch.zeros(2), 3), Pair(torch.ones(2), 3)], slots)
    filled = fill(merged, [torch.full((2,), 7.0)])
    assert isinstance(filled, Pair) and filled.first.tolist() == [7.0, 7.0] and filled.second == 3


class Sometimes(Correction):
    """Four more examples of the source; in every second step of a visit for the head of the first task."""

    def __init__(self):
        self.steps = Counter()

    def sample(self, ctx, sources, generator):
        self.steps[sources[0].name] += 1
        task = sources[0].task if self.steps[sources[0].name] % 2 else "t0"
        return [Batch(sources[0].train.x[:4].double(), sources[0].train.y[:4], task, source=task)]


@pytest.mark.parametrize("optimiser", ["adam", "momentum"])
def test_a_head_that_some_steps_leave_out_counts_its_own_steps(optimiser):
    """Stacked agents share one count of Adam's steps, but for entries that a step left out."""
    more = {"momentum": 0.9} if optimiser == "momentum" else {"optimiser": optimiser}
    t = cs.Training(epochs=2, batch_size=8, lr=0.02, precision="fp64", **more)
    streams = [
        [replace(client(10 * k + i, 24), name=f"t{k}/c{i}", task=f"t{k}") for k in range(2)] for i in (0, 1)
    ]
    schedule = cs.settings.federated_continual(streams, rounds=1, scenario="task")
    found, notes = [], []
    for engine in ("serial", "batched"):
        method, model = cs.Method("some", (Sometimes(),)), cs.models.multi_head(mlp(), C)
        found.append(cs.run(schedule, method, model, t, engine=engine, progress=notes.append))
    said = [line["note"] for line in notes if line["event"] == "engine"]
    assert said == [f"batched: 2 agents a step, {size} numbers each" for size in (83, 110)]
    assert gap(*found) < 1e-13
    assert found[0].costs["macs"] == found[1].costs["macs"]
