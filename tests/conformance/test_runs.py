"""Every method by real runs: pure verbs, seeded, and a state that round-trips through safetensors."""

from __future__ import annotations

from typing import Any

import kit
import pytest

import consilience as cs
from consilience import testing
from consilience.core.correction import Correction, Mapper

ROWS = pytest.mark.parametrize("row", list(kit.ROWS))
SPEAK = testing.EXCHANGING


def where(row: str, *wanted: str) -> str:
    """The first of these settings in which a method runs."""
    cells = kit.read("methods")[row]
    return next(s for s in (*wanted, *testing.SETTINGS) if cells[s] == "runs")


def method_with(name: str) -> tuple[cs.Method, Any]:
    """A method of this correction or mapper alone, and a model that it can work with."""
    thing = kit.make(name)
    if name in kit.WANT_VIEWS:
        return cs.methods.xdg() + cs.Method(name, mapper=thing), testing.plain_model()
    if isinstance(thing, Mapper):
        return cs.Method(name, mapper=thing), kit.frozen_trunk()
    if name == "HeadReuse":  # it reads modules of a bank
        return cs.Method(name, (thing,), consolidator=cs.methods.skill().consolidator), kit.heads()
    return kit.method_of(name, thing), kit.OWN_MODEL[name](
        testing.CLASSES
    ) if name in kit.OWN_MODEL else testing.plain_model()


@pytest.mark.parametrize("name", [*kit.CORRECTIONS, *kit.MAPPERS])
def test_verbs_are_pure(name: str) -> None:
    """Every verb that a correction overrides is called in some run, and changes none of its arguments."""
    thing = kit.make(name)
    method, model = method_with(name)
    if name in kit.WANT_TASKS:
        everywhere: tuple[str, ...] = ("continual (task)",)
    elif name in kit.WANT_TOGETHER:
        everywhere = ("multitask",)
    elif name in kit.WANT_OTHERS:
        everywhere = ("federated", "federated_continual")
    else:
        others = () if name in kit.THROW_AWAY else ("federated_continual",)
        everywhere = ("continual (class)", "continual (task)", *others)

    def run() -> None:
        for setting in everywhere:
            result = testing.quiet(testing.SETTINGS[setting](), method, model)
            result.predict(testing.sources()[0].test.whole()[0])  # without the task
        if name == "ER":  # a full buffer lets examples go
            small = cs.Method(name, (kit.make(name, size=20),))
            testing.quiet(testing.SETTINGS["continual (class)"](), small, model)

    called = testing.check_pure_verbs(thing, run)
    own = set(testing.own_verbs(thing))
    if (
        "penalty_gradient" in own
    ):  # a step takes it in the place of `penalty`; their agreement is a test of its own
        own.remove("penalty")
    assert own <= called, f"never called: {sorted(own - called)}"


def test_every_verb_is_watched() -> None:
    verbs = {n for n, f in vars(Correction).items() if callable(f) and not n.startswith("_")}
    assert verbs - {"refuse", "default_model"} == set(testing.VERBS)


def settings_of(row: str) -> set[str]:
    """Two settings for a method: one that goes through sources, one in which agents exchange."""
    return {where(row, "continual (class)", "multitask"), where(row, *SPEAK)}


@ROWS
def test_agents_replace_their_state(row: str) -> None:
    """No step of a run changes a state that stood before it, the messages that it receives, or the data."""
    called: set[str] = set()
    for setting in settings_of(row):
        schedule = testing.SETTINGS[setting]()
        data = testing.bits([[s.train, s.test] for s in schedule.sources])

        def run(schedule=schedule, setting=setting) -> None:
            result = testing.quiet(schedule, kit.ROWS[row](), kit.model_of(row, setting))
            result.predict(testing.sources()[0].test.whole()[0])

        called |= testing.check_pure_agents(run)
        assert testing.bits([[s.train, s.test] for s in schedule.sources]) == data, "the data changed"
    assert called == set(testing.AGENT_VERBS)


@ROWS
def test_consolidators_are_pure(row: str) -> None:
    """The same state, messages and generator give the same bits, and stay as they are."""
    method, setting = kit.ROWS[row](), where(row, *SPEAK)
    receiver = method.resolve(testing.SETTINGS[setting]().survey()).receiver()
    assert testing.check_pure_consolidator(
        receiver, lambda: testing.quiet(testing.SETTINGS[setting](), method, kit.model_of(row, setting))
    )


def test_every_consolidator_is_in_a_method() -> None:
    """So that the checks by runs reach all of them."""
    used = {type(m().receiver()).__name__ for m in kit.ROWS.values()}
    assert used >= kit.CONSOLIDATORS.keys()


@ROWS
def test_seeded(row: str) -> None:
    """The same seed gives the same bits, whatever the global random state, which no run moves; another seed
    other bits."""
    for setting in settings_of(row):

        def run(seed, setting=setting):
            schedule, model = testing.SETTINGS[setting](), kit.model_of(row, setting)
            return testing.quiet(schedule, kit.ROWS[row](), model, seed=seed)

        testing.check_seeded(run)


@ROWS
def test_state_round_trips(row: str) -> None:
    """Through safetensors and JSON, bit for bit, in every setting where the method runs."""
    for setting, cell in kit.read("methods")[row].items():
        if cell == "runs":
            testing.check_state_round_trip(testing.state_of(kit.cell(row, setting)))


@ROWS
def test_messages_round_trip(row: str) -> None:
    """Everything that is sent is the same after its bytes; bytes cut short are refused."""
    setting = where(row, *SPEAK)
    schedule, model = testing.SETTINGS[setting](), kit.model_of(row, setting)
    sent = testing.check_messages_round_trip(lambda: testing.quiet(schedule, kit.ROWS[row](), model))
    assert sent or row in SILENT, "nothing was sent"


@ROWS
def test_interrupted_and_resumed_to_the_same_bits(row: str) -> None:
    """Stopped inside an epoch of a later visit, each method ends with the state of a run that was never
    stopped."""
    setting = where(
        row, "continual (task)", "continual (class)", "federated_continual", "merging", "multitask"
    )
    testing.check_resumes(
        lambda **more: testing.quiet(
            testing.SETTINGS[setting](), kit.ROWS[row](), kit.model_of(row, setting), **more
        )
    )


SILENT = {
    **dict.fromkeys(
        ("from_scratch", "gdumb", "joint"), "throws away what is heard, and refuses where others are"
    ),
    "fedweit": "wants task labels, here in continual alone; what it sends is checked in test_fedmethods.py",
    **dict.fromkeys(("conflicts", "pcgrad", *kit.TOGETHER), "runs in multitask alone, where nobody sends"),
    "scroll": "runs where nobody hears another agent",
    **dict.fromkeys(
        (
            "den",
            "hat",
            "packnet",
            "pnn",
            "psp",
            "supsup",
            "xdg",
            "hat+infer(expert_gate)",
            "packnet+infer(mahalanobis)",
        ),
        "wants task labels, here in continual alone; shared masks are checked in test_isolation.py",
    ),
}
"""Methods that no agent here tells of, and why."""
