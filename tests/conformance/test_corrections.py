"""Corrections: at their neutral value they are plain training; they compose in pairs; what is private
stays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import kit
import pytest
import torch
from torch import nn

import consilience as cs
from consilience import testing
from consilience.core.contexts import Context, Learned
from consilience.core.correction import Correction, Mapper, overrides
from consilience.core.message import Message, Module, Private, Samples, Statistics, Weights
from consilience.core.source import Source, Tensors
from consilience.core.state import encode_state
from consilience.corrections.distillation import LwF
from consilience.loop.agent import Agent
from consilience.loop.result import Result

ALL = {
    n: c
    for n, c in {**kit.CORRECTIONS, **kit.MAPPERS}.items()
    if n not in {**kit.OWN_MODEL, **kit.WANT_OTHERS, **kit.WANT_TOGETHER}
}

NO_NEUTRAL = {
    "Cumulative": "it trains on other data; there is no strength to set to zero",
    "FromScratch": "it begins anew; there is no strength to set to zero",
    "GDumb": "it trains on its buffer alone",
    "ICaRL": "its loss is another",
    "DEN": "its phases train parts of the network in turn",
    "FedWeIt": "even without penalties a task has entries of its own",
    "HAT": "even with all units attended to it would multiply them by a sigmoid",
    **dict.fromkeys(
        ("Information", "InputMoments"), "it only summarises, and so is plain training always: checked below"
    ),
    "SolvedHead": "it says where a head begins; there is no strength to set to zero",
    "StreamHead": "it says where a visit begins; there is no strength to set to zero",
    "LocalSteps": "it only summarises, and so is plain training always: checked below",
    "Moments": "it only summarises, and so is plain training always: checked below",
    "PackNet": "to keep all weights is to freeze them after the first task",
    "Scaffold": "its control variates have no strength to set to zero",
    "SupSup": "it trains no weight at all",
    "WSM": "its loss is another wherever classes are not equally many",
    "Average": "a mapper only routes between experts",
    "ExpertGate": "a mapper only routes between experts",
    "GaussianMixture": "a mapper only routes between experts",
    "Mahalanobis": "a mapper only routes between experts",
    "MinEntropy": "a mapper only routes between experts",
    "NearestMean": "a mapper only routes between experts",
    "Oracle": "a mapper only routes between experts",
    "Superposition": "a mapper only routes between experts",
}
"""Corrections without a neutral value, and why."""

ONLY_SUMMARISE = {
    **dict.fromkeys(("Information", "InputMoments"), "it tells what a consolidator merges by"),
    "LocalSteps": "it counts steps for a consolidator",
    "Moments": "it collects sums of features for a closed-form head and does not bend training",
}
"""Corrections that leave training as it is, to the bit: a pair with one is the other alone."""

KEEP_NOTHING = {
    "PSP": "its keys are drawn by the names of tasks and layers",
    "XdG": "its gates are drawn by the names of tasks and layers",
    **dict.fromkeys(("FedCM", "GHBM"), "it keeps what was absorbed, after the end of a source"),
    "SolvedHead": "it writes a head from what is learned now",
    "WSM": "it counts the classes of what is learned now",
    "Proximal": "it knows where this learn began, and nothing of earlier sources",
    "Stability": "it knows where this learn began, and nothing of earlier sources",
    "Average": "it reads the experts' own answers",
    "MinEntropy": "it reads the experts' own answers",
    "Oracle": "it is told the task",
}
"""Corrections that keep no items, and why."""

SATISFIED = {
    (
        "AverageConstraint",
        "ERACE",
    ): "replay lowers the loss that the constraint watches, so that it is never violated here",
    (
        "AverageConstraint",
        "GenerativeReplay",
    ): "replay lowers the loss that the constraint watches, so that it is never violated here",
    ("FromScratch", "GDumb"): "what begins anew begins anew",
    **dict.fromkeys(
        (("SolvedHead", "GDumb"), ("SolvedHead", "FromScratch")),
        "what begins anew begins after the head was written",
    ),
    **dict.fromkeys(
        itertools.permutations(("StreamHead", "GDumb"), 2), "one says where the other begins, or undoes it"
    ),
    **dict.fromkeys(
        itertools.permutations(("StreamHead", "FromScratch"), 2), "each begins again, and the last one counts"
    ),
    **dict.fromkeys(
        itertools.permutations(("StreamHead", "SolvedHead"), 2), "each writes the head, and the last counts"
    ),
    ("WSM", "ICaRL"): "that puts its own loss in the place of this one, which comes first",
    ("FedWeIt", "SupSup"): "of what it adds only the sign is left, where SupSup's constants come after it",
}
"""Pairs of which the first adds nothing on top of the second (on this problem), and why."""

APART = {
    frozenset(("DEN", "ICaRL")): "needs features of one size",
    **dict.fromkeys(
        map(frozenset, itertools.combinations(("Cumulative", "GDumb", "ICaRL"), 2)),
        "only one part may choose what",
    ),
}
"""Pairs that cannot be, and what the refusal says."""

PROTECTED = {
    "HAT": ("AverageConstraint", "EWC", "EpisodicConstraints", "LwF", "MAS", "OnlineEWC"),
    "PackNet": ("AverageConstraint", "EWC", "EpisodicConstraints", "LwF", "MAS", "OnlineEWC"),
    "SupSup": (
        *(
            "AverageConstraint",
            "DER",
            "EWC",
            "EpisodicConstraints",
            "GHBM",
            "L2SP",
            "LocalGHBM",
            "LwF",
            "MAS",
            "OnlineEWC",
            "SI",
        ),
        "Scaffold",
        "TaLoS",
    ),
    "XdG": ("EpisodicConstraints",),
    **dict.fromkeys(
        ("ExpertGate", "GaussianMixture", "Mahalanobis", "NearestMean"), ("LessForgetting", "Stability")
    ),
}
"""What adds nothing on top of which isolation: what earlier tasks depend on does not move, and so needs no
protection; anchors stand on frozen features (with
XdG, whose active units overlap little, no constraint is violated here)."""


IN_ORDER = {
    frozenset(("HAT", "SupSup")): "of what is attended to only the sign is left, or its sign is attended to",
    **dict.fromkeys(
        map(frozenset, (("ERACE", "ICaRL"), ("WSM", "ICaRL"))),
        "each puts its own loss in the place of another",
    ),
    **dict.fromkeys(
        (frozenset(("FedWeIt", n)) for n in ("HAT", "PSP", "PackNet", "SupSup", "XdG")),
        "the other's masks, gates or keys are on what it made, or on what it makes it of",
    ),
    **dict.fromkeys(
        (frozenset(("FedWeIt", n)) for n in ("FromScratch", "GDumb")),
        "what a task adds begins at a third of the old or the new",
    ),
    **dict.fromkeys(
        map(frozenset, (("FromScratch", "GDumb"), ("FromScratch", "PackNet"), ("GDumb", "PackNet"))),
        "new parameters in the place of what the other begins with, or the other way about",
    ),
    **dict.fromkeys(
        (frozenset(("TaLoS", n)) for n in ("FromScratch", "GDumb", "PackNet")),
        "its scores are those of what the other begins with",
    ),
    **dict.fromkeys(
        (frozenset(("SolvedHead", n)) for n in ("FedWeIt", "FromScratch", "GDumb", "PackNet", "TaLoS")),
        "the head that it writes is what the other begins with, or the other way about",
    ),
    **dict.fromkeys(
        (
            frozenset(("StreamHead", n))
            for n in ("FedWeIt", "FromScratch", "GDumb", "PackNet", "SolvedHead", "TaLoS")
        ),
        "where it begins is what the other begins with, or the other way about",
    ),
}
"""Pairs of which the order matters, and why."""


def adds_nothing(other: str, one: str) -> bool:
    """Protection on top of isolation; where tasks have a label, a mapper (it only routes where they have
    none); and class weights where tasks
    are separated, as a mapper does: the two classes of each are equally many, and others are left out by
    either."""
    apart = one in kit.WANT_TASKS or one in kit.MAPPERS
    weighted = (other == "WSM" and apart) or (one == "WSM" and other in kit.MAPPERS)
    return other in PROTECTED.get(one, ()) or (one in kit.WANT_TASKS and other in kit.MAPPERS) or weighted


def alone(name: str, **arguments: Any) -> cs.Method:
    thing = kit.make(name, **arguments)
    return cs.Method(name, mapper=thing) if isinstance(thing, Mapper) else kit.method_of(name, thing)


@cache
def learned(*names: str, setting: str = "", next_to: str = "") -> Result:
    """Three sources one after another, on the model for these corrections (and one next to them), with these
    in
    this order."""
    method = [alone(n) for n in names] or cs.methods.finetune()
    return testing.quiet(
        testing.SETTINGS[setting or kit.stream_for(*names)](),
        method,
        kit.model_for(*names, *filter(None, [next_to])),
    )


def gap(a: Result, b: Result) -> float:
    """The largest difference in the entries that both have: some corrections add their own."""
    common = a.params.keys() & b.params.keys()
    return testing.params_differ({n: a.params[n] for n in common}, {n: b.params[n] for n in common})


# neutral values


def neutrals() -> Iterator[Any]:
    for name in ALL:
        for setting in ("continual (class)", "continual (task)", "federated", "federated_continual"):
            yield pytest.param(name, setting, id=f"{name}-{setting}")


@cache
def finetuned(setting: str) -> Result:
    return testing.quiet(testing.SETTINGS[setting](), cs.methods.finetune(), testing.plain_model())


@pytest.mark.parametrize(("name", "setting"), list(neutrals()))
def test_neutral_is_plain_training(name: str, setting: str) -> None:
    values = dict(ALL[name].neutral)
    assert bool(values) != (name in NO_NEUTRAL), "declare `neutral`, or name it in NO_NEUTRAL with the reason"
    if not values and name not in ONLY_SUMMARISE:
        return
    result, plain = (
        testing.quiet(testing.SETTINGS[setting](), alone(name, **values), testing.plain_model()),
        finetuned(setting),
    )
    assert testing.bits(dict(sorted(result.params.items()))) == testing.bits(
        dict(sorted(plain.params.items()))
    )
    assert (result.matrices == plain.matrices).all()
    if values:
        assert result.costs["macs"] == plain.costs["macs"] and result.costs["bytes"] == plain.costs["bytes"]


def test_exceptions_exist() -> None:
    for names in (NO_NEUTRAL, ONLY_SUMMARISE, KEEP_NOTHING, kit.WANT_VIEWS):
        assert set(names) <= ALL.keys()


# pairs


def pairs() -> list[tuple[str, str]]:
    every = [n for n in ALL if n not in kit.WANT_VIEWS]
    return [
        (a, b) for a, b in itertools.permutations(every, 2) if not (a in kit.MAPPERS and b in kit.MAPPERS)
    ]


@pytest.mark.parametrize("name", [n for n in ALL if n not in kit.WANT_VIEWS])
def test_differs_from_plain_training(name: str) -> None:
    """Alone, each bends training, or only summarises."""
    away = gap(learned(name), learned(setting=kit.stream_for(name), next_to=name))
    assert away == 0 if name in ONLY_SUMMARISE else away > 1e-6


def sampled() -> list[Any]:
    """Every pair once. A quarter is run by `make test`: each correction with a quarter of the others, and all
    pairs of which something else is expected. The others are slow."""
    place = {name: i for i, name in enumerate(ALL)}
    known = {*APART, *IN_ORDER, *map(frozenset, SATISFIED)}
    return [
        pytest.param(a, b, marks=[] if chosen or frozenset((a, b)) in known else pytest.mark.slow)
        for a, b in pairs()
        if a < b
        for chosen in [(place[a] + place[b]) % 4 == 0]
    ]


@pytest.mark.parametrize(("a", "b"), sampled())
def test_pairs_compose(a: str, b: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orders run, differ from either alone, have something in memory after the first source, and agree
    up to rounding: corrections add to a step, and none reads what another did."""
    setting = kit.stream_for(a, b)
    if frozenset((a, b)) in APART:
        with pytest.raises(cs.Refusal, match=APART[frozenset((a, b))]):
            testing.quiet(testing.SETTINGS[setting](), [alone(a), alone(b)], kit.model_for(a, b))
        return

    orders = [composed(monkeypatch, *order) for order in ((a, b), (b, a))]
    for (both, kept), (first, second) in zip(orders, ((a, b), (b, a)), strict=True):
        for one, other in ((first, second), (second, first)):
            away = gap(both, learned(one, setting=setting, next_to=other))
            if (other, one) in SATISFIED:
                continue
            nothing = other in ONLY_SUMMARISE or adds_nothing(other, one)
            assert away <= 1e-6 * (other not in ONLY_SUMMARISE) if nothing else away > 1e-6, (
                f"{other} on top of {one}: {away}"
            )
            assert bool(kept[one]) != (one in KEEP_NOTHING), f"after the first source {one} keeps {kept[one]}"
        assert torch.isfinite(torch.tensor(both.matrices)).all()

    if frozenset((a, b)) not in IN_ORDER:
        assert testing.params_differ(orders[0][0].params, orders[1][0].params) < 1e-5


def composed(monkeypatch: pytest.MonkeyPatch, a: str, b: str) -> tuple[Result, dict[str, int]]:
    """Two corrections in this order, and how much each has in memory after the first source."""
    kept: list[dict[str, int]] = []
    finish = Agent.finish

    def after(agent: Agent, job: Any) -> None:
        finish(agent, job)
        here = {c.name: agent.memory(c) for c in agent.method.active}
        kept.append(
            {
                c: sum(t.numel() or 1 for i in items.values() for t in [*i.tensors.values()]) or len(items)
                for c, items in here.items()
            }
        )

    with monkeypatch.context() as patch:
        patch.setattr(Agent, "finish", after)
        schedule = testing.SETTINGS[kit.stream_for(a, b)]()
        both = testing.quiet(schedule, [alone(a), alone(b)], kit.model_for(a, b))
    return both, kept[0]


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(kit.MAPPERS, 2)))
def test_two_mappers_are_refused(a: str, b: str) -> None:
    with pytest.raises(cs.ConsilienceError, match="two values of `mapper`"):
        alone(a) + alone(b)


@pytest.mark.parametrize("name", list(kit.CORRECTIONS))
def test_twice_the_same_is_refused(name: str) -> None:
    with pytest.raises(cs.ConsilienceError, match="each correction once"):
        alone(name) + alone(name)


def test_order_does_not_matter_where_all_data_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """With task labels what is gathered stands as parts: what others recall, and which part is new, is the
    same in any order."""
    new: list[str] = []
    rows = LwF.rows
    monkeypatch.setattr(
        LwF, "rows", lambda self, step, ctx: new.append(step.parts[0].source) or rows(self, step, ctx)
    )
    for other in ("EWC", "LwF"):
        schedule = testing.SETTINGS["continual (task)"]()
        one, two = (
            testing.quiet(schedule, [alone(n) for n in pair], testing.plain_model())
            for pair in (("Cumulative", other), (other, "Cumulative"))
        )
        plain = testing.quiet(schedule, alone("Cumulative"), testing.plain_model())
        assert (
            testing.params_differ(one.params, two.params)
            < 1e-5
            < testing.params_differ(one.params, plain.params)
        )
    assert set(new) == {"tiny/1", "tiny/2"}, "LwF distils on the new source's inputs"


def test_joint_training_of_tasks_with_labels_keeps_their_columns() -> None:
    schedule = cs.settings.multitask(testing.sources(), "task")
    joint, plain = (
        testing.quiet(schedule, m, testing.plain_model()) for m in (cs.methods.joint(), cs.methods.finetune())
    )
    assert testing.params_differ(joint.params, plain.params) == 0


def test_the_teacher_is_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and batch-norm statistics of the start of the learn, at every step."""
    answers: list[list[torch.Tensor]] = []
    prepare, rows = Agent.prepare, LwF.rows
    probe = testing.sources()[0].test.whole()[0]

    def begin(agent: Agent, *what: Any) -> Any:
        out, _ = agent.model(agent.state.params, agent.state.buffers, probe, None, False)
        answers.append([out.detach()])
        return prepare(agent, *what)

    def look(self: LwF, step: Any, ctx: Context) -> Any:
        answers[-1].append(step.before(probe, None))
        return rows(self, step, ctx)

    monkeypatch.setattr(Agent, "prepare", begin)
    monkeypatch.setattr(LwF, "rows", look)

    def module() -> nn.Module:
        return nn.Sequential(
            nn.Linear(testing.INPUTS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, testing.CLASSES)
        )

    testing.quiet(
        testing.SETTINGS["continual (class)"](), alone("LwF"), cs.models.wrap(module, outputs=testing.CLASSES)
    )
    assert len(answers[1]) > 4
    for first, *later in answers[1:]:
        assert all(torch.equal(first, a) for a in later)


# what is private

WITHOUT_DATA = {
    "FedDyn": "it keeps a vector of the size of the parameters",
    "GenerativeReplay": "it keeps the weights of a generator: that they stay is checked by name",
    "TaLoS": "it keeps which entries are trained",
}
"""Private items in which no sample's bytes can be found, and why."""

MARK = 0.123456789


def marked() -> list[Source]:
    """The tiny sources, each sample with a constant in four places; its bytes can be looked for."""

    def mark(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full((len(x), 4), MARK), x[:, 4:]], 1)

    made = []
    for s in testing.sources():
        parts = {p: Tensors(mark(getattr(s, p).x), getattr(s, p).y) for p in ("train", "validation", "test")}
        made.append(replace(s, **parts))
    return made


@pytest.mark.parametrize("name", [n for n in ALL if not ALL[n].shared_items])
@pytest.mark.parametrize("setting", ["federated_continual", "skill"])
def test_private_items_never_enter_bytes(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in {**kit.WANT_TASKS, **kit.THROW_AWAY, **kit.WANT_TOGETHER}:
        with pytest.raises(cs.Refusal):  # masks that are private mean nothing where others are received
            testing.quiet(testing.SETTINGS[setting](), alone(name), testing.plain_model())
        return
    sent: list[bytes] = []
    kept: list[bool] = []
    trace = torch.full((4,), MARK).numpy().tobytes()
    to_bytes, finish = Message.to_bytes, Agent.finish

    def listen(message: Message) -> bytes:
        sent.append(to_bytes(message))
        return sent[-1]

    def look(agent: Agent, job: Any) -> None:
        finish(agent, job)
        held = encode_state(agent.state)[0].values()
        kept.append(any(trace in t.contiguous().numpy().tobytes() for t in held if t.numel()))
        assert all(type(i) is Private for items in agent.state.memory.values() for i in items.values())

    monkeypatch.setattr(Message, "to_bytes", listen)
    monkeypatch.setattr(Agent, "finish", look)
    s = marked()
    schedule = (
        cs.settings.skill([s[:2], s[2:]])
        if setting == "skill"
        else cs.settings.federated_continual([s[:2], s[2:]], 2)
    )
    testing.quiet(schedule, [alone(name), cs.methods.ewc()], testing.plain_model())
    assert kept and all(kept) != (name in WITHOUT_DATA), (
        "the constant is not even in the buffer: this test would see nothing"
    )
    assert len(sent) > 4 and not any(trace in data for data in sent)
    facts = [data[8 : 8 + int.from_bytes(data[:8], "little")].decode() for data in sent]
    assert not any(f'"{name}' in f or f'\\"{name}' in f for f in facts)


def test_only_the_closed_family_fits_in_a_message() -> None:
    tensors = {"x": torch.ones(2)}
    for kind in (Weights, Statistics, Samples, Module):
        Message("a", "b", 1, 1, "o", "b", {"c": kind(tensors)})

    class Mine(Statistics):
        pass

    for item in (Private(tensors), Mine(tensors), tensors, torch.ones(2)):
        with pytest.raises(TypeError, match="a message carries Weights, Statistics, Module or Samples"):
            Message("a", "b", 1, 1, "o", "b", {"c": item})  # type: ignore[dict-item]


def test_a_shared_item_of_what_does_not_travel_is_refused() -> None:
    @dataclass(frozen=True)
    class Leak(Correction):
        shared_items: ClassVar[bool] = False

        def summarise(self, learned: Learned, ctx: Context) -> Statistics:
            return Statistics({"x": learned.source.train.whole()[0]})

    with pytest.raises(TypeError, match="must be Private"):
        testing.quiet(
            testing.SETTINGS["continual (class)"](), cs.Method("leak", (Leak(),)), testing.plain_model()
        )


def test_a_pull_is_the_gradient_of_its_penalty():
    """Of every correction of the catalogue that says it in closed form."""
    g = torch.Generator().manual_seed(0)
    drawn = lambda: torch.randn(7, generator=g, dtype=torch.float64)  # noqa: E731
    found = {n: c for n in kit.CORRECTIONS if overrides(c := kit.make(n), "penalty_gradient")}
    # It asks the model which entries are of tasks: checked in tests/test_sharing.py.
    del found["SoftSharing"]
    assert len(found) >= 12
    for c in found.values():
        ctx = Context(flat={k: drawn() for k in ("precision", "shift", "push", "h")})
        step = SimpleNamespace(theta=drawn(), start=drawn(), horizon=(3, 5))
        before = {k: t.clone() for k, t in {**ctx.flat, "theta": step.theta, "start": step.start}.items()}
        vector, factor = c.penalty_gradient(step, ctx)
        wanted_of = vector * factor
        leaf = step.theta.clone().requires_grad_()
        step.theta = leaf
        wanted = torch.autograd.grad(c.penalty(step, ctx), leaf)[0]
        assert torch.allclose(wanted_of, wanted, atol=1e-13), c.name
        after = {**ctx.flat, "theta": step.theta, "start": step.start}
        assert all(torch.equal(before[k], after[k]) for k in before), "nothing was changed"


@pytest.mark.parametrize("engine", ["serial", "batched"])
def test_another_penalty_is_not_pulled_by_the_old_one(engine):
    """A subclass that changes `penalty` alone gets the gradient of its own."""
    from consilience.corrections.quadratic import Proximal

    class Twice(Proximal):
        def penalty(self, step, ctx):
            return 2 * super().penalty(step, ctx)

    def end(correction):
        schedule, method = cs.settings.federated(testing.sources(), 2), cs.Method("m", (correction,))
        return cs.run(schedule, method, kit.model_for(), testing.TRAINING, engine=engine)

    twice, once, double = (end(c) for c in (Twice(0.3), Proximal(0.3), Proximal(0.6)))
    assert all(torch.allclose(twice.params[n], double.params[n], atol=1e-6) for n in double.params)
    assert not all(torch.allclose(twice.params[n], once.params[n], atol=1e-6) for n in once.params)
