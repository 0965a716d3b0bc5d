"""Every method by real runs: pure verbs, seeded, and a state that round-trips through safetensors."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kit
import numpy as np
import pytest
import torch

import consilience as cs
from consilience.core.correction import Correction, Mapper, overrides
from consilience.core.message import Message
from consilience.core.params import pack, unpack
from consilience.core.state import State, decode_state, encode_state
from consilience.loop.agent import Agent

ROWS = pytest.mark.parametrize("row", list(kit.ROWS))
VERBS = (
    "gather",
    "begin",
    "recall",
    "prepare_step",
    "sample",
    "view",
    "losses",
    "rows",
    "penalty",
    "penalty_gradient",
    "mask",
    "trace_init",
    "trace",
    "summarise",
    "after_receive",
    "trim",
    "route",
)
SPEAK = ("federated_continual", "skill", "exmodel", "merging")


def where(row: str, *wanted: str) -> str:
    """The first of these settings in which a method runs."""
    cells = kit.read("methods")[row]
    return next(s for s in (*wanted, *kit.SETTINGS) if cells[s] == "runs")


def watched(function: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    """The same function, with an assertion that it leaves its arguments as they are. Generators may move on."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = kit.bits([*args, kwargs])
        result = function(*args, **kwargs)
        assert kit.bits([*args, kwargs]) == before, f"{name} changed its arguments"
        calls.append(name)
        return result

    return call


def method_with(name: str) -> tuple[cs.Method, Any]:
    """A method of this correction or mapper alone, and a model that it can work with."""
    thing = kit.make(name)
    if name in kit.WANT_VIEWS:
        return cs.methods.xdg() + cs.Method(name, mapper=thing), kit.plain()
    if isinstance(thing, Mapper):
        return cs.Method(name, mapper=thing), kit.frozen_trunk()
    if name == "HeadReuse":  # it reads modules of a bank
        return cs.Method(name, (thing,), consolidator=cs.methods.skill().consolidator), kit.heads()
    return kit.method_of(name, thing), kit.OWN_MODEL[name](
        kit.CLASSES
    ) if name in kit.OWN_MODEL else kit.plain()


@pytest.mark.parametrize("name", [*kit.CORRECTIONS, *kit.MAPPERS])
def test_verbs_are_pure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb that a correction overrides is called in some run, and changes none of its arguments."""
    kind, calls = kit.EVERY[name], []
    own = [
        v
        for v in VERBS
        if (v == "route" and issubclass(kind, Mapper)) or (v != "route" and overrides(kit.make(name), v))
    ]
    for verb in own:
        monkeypatch.setattr(kind, verb, watched(getattr(kind, verb), verb, calls))
    method, model = method_with(name)
    everywhere = (
        "continual (class)",
        "continual (task)",
        *(("federated_continual",) if name not in kit.THROW_AWAY else ()),
    )
    if name in kit.WANT_OTHERS:
        everywhere = ("federated", "federated_continual")
    for setting in ("continual (task)",) if name in kit.WANT_TASKS else everywhere:
        result = kit.quiet(kit.SETTINGS[setting](), method, model)
        result.predict(kit.sources()[0].test.whole()[0])  # without the task
    if name == "ER":
        kit.quiet(kit.SETTINGS["continual (class)"](), cs.Method(name, (kit.make(name, size=20),)), model)
    if (
        "penalty_gradient" in own
    ):  # a step takes it in the place of `penalty`; test_a_pull_is_the_gradient_of_its_penalty calls both
        own.remove("penalty")
    assert set(own) <= set(calls), f"never called: {sorted(set(own) - set(calls))}"


def test_every_verb_is_watched() -> None:
    verbs = {n for n, f in vars(Correction).items() if callable(f) and not n.startswith("_")} | {"route"}
    assert verbs - {"refuse"} == set(VERBS)


@ROWS
def test_agents_replace_their_state(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of a run changes a state that stood before it, nor what is heard."""
    calls: set[str] = set()

    def watch(verb: str) -> None:
        whole = getattr(Agent, verb)

        def call(agent: Agent, *args: Any) -> Any:
            state, heard = agent.state, list(args[0]) if verb == "receive" else []
            before, told = kit.bits(state), kit.bits(heard)
            result = whole(agent, *args)
            assert kit.bits(state) == before, f"{verb} changed the state"
            assert kit.bits(heard) == told, f"{verb} changed what it heard"
            calls.add(verb)
            return result

        monkeypatch.setattr(Agent, verb, call)

    for verb in ("prepare", "finish", "send", "receive", "_predict"):
        watch(verb)
    for setting in {where(row, "continual (class)", "multitask"), where(row, *SPEAK)}:
        schedule = kit.SETTINGS[setting]()
        test = [kit.bits([s.train, s.test]) for s in schedule.sources]
        kit.quiet(schedule, kit.ROWS[row](), kit.model_of(row, setting))
        assert [kit.bits([s.train, s.test]) for s in schedule.sources] == test, "the data changed"
    assert calls == {"prepare", "finish", "send", "receive", "_predict"}


@ROWS
def test_consolidators_are_pure(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same state, messages and generator give the same bits, and stay as they are."""
    calls = 0
    method = kit.ROWS[row]()
    setting = where(row, *SPEAK)
    resolved = method.resolve(kit.SETTINGS[setting]().survey())
    kind = type(resolved.receiver())
    receive = kind.receive

    def call(
        self: Any, model: Any, state: State, fresh: Any, by_size: bool, generator: torch.Generator
    ) -> State:
        nonlocal calls
        again = torch.Generator()
        again.set_state(generator.get_state())
        before = kit.bits(state), kit.bits(list(fresh))
        first = receive(self, model, state, fresh, by_size, generator)
        assert (kit.bits(state), kit.bits(list(fresh))) == before, "absorb changed its arguments"
        assert kit.bits(first) == kit.bits(receive(self, model, state, fresh, by_size, again)), (
            "absorb is not repeatable"
        )
        calls += bool(fresh)
        return first

    monkeypatch.setattr(kind, "receive", call)
    kit.quiet(kit.SETTINGS[setting](), method, kit.model_of(row, setting))
    assert calls


def test_every_consolidator_is_in_a_method() -> None:
    """So that the checks by runs reach all of them."""
    used = {type(m().receiver()).__name__ for m in kit.ROWS.values()}
    assert used >= kit.CONSOLIDATORS.keys()


@ROWS
def test_seeded(row: str) -> None:
    """The same seed gives the same bits, whatever the global random state, which no run moves; another seed other bits."""
    for setting in {where(row, "continual (class)", "multitask"), where(row, *SPEAK)}:
        first = kit.cell(row, setting)
        torch.manual_seed(12345)
        np.random.seed(12345)
        random.seed(12345)
        before = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
        again = kit.quiet(kit.SETTINGS[setting](), kit.ROWS[row](), kit.model_of(row, setting))
        assert torch.equal(before[0], torch.get_rng_state()), "the global random state of torch moved"
        assert repr(before[1]) == repr(np.random.get_state(legacy=False)), (
            "the global random state of numpy moved"
        )
        assert before[2] == random.getstate(), "the global random state of Python moved"
        assert kit.state_bits(kit.state_of(first)) == kit.state_bits(kit.state_of(again))
        assert np.array_equal(first.matrices, again.matrices)
        other = kit.cell(row, setting, seed=1)
        assert kit.state_bits(kit.state_of(other))[0] != kit.state_bits(kit.state_of(first))[0]


@ROWS
def test_state_round_trips(row: str) -> None:
    """Through safetensors and JSON, bit for bit, in every setting where the method runs."""
    for setting, cell in kit.read("methods")[row].items():
        if cell != "runs":
            continue
        state = kit.state_of(kit.cell(row, setting))
        tensors, facts = encode_state(state)
        data = pack(tensors, {"facts": json.dumps(facts)})
        back, meta = unpack(data)
        other = decode_state(back, json.loads(meta["facts"]))
        assert kit.state_bits(other) == kit.state_bits(state)
        assert [m.key for m in other.bank.values()] == [m.key for m in state.bank.values()]
        assert {c: list(k) for c, k in other.memory.items()} == {c: list(k) for c, k in state.memory.items()}
        assert list(other.visits.items()) == list(state.visits.items()) and other.received == dict(
            state.received
        )
        assert {k: type(m) for k, m in other.experts.items()} == {
            k: type(m) for k, m in state.experts.items()
        }
    for cut in (0, 4, 8, 40, len(data) // 2, len(data) - 1):
        with pytest.raises(cs.ConsilienceError, match="should be whole"):
            unpack(data[:cut])


@ROWS
def test_messages_round_trip(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is told is the same after its bytes; bytes cut short are refused."""
    told: list[tuple[Message, bytes]] = []
    to_bytes = Message.to_bytes

    def keep(message: Message) -> bytes:
        data = to_bytes(message)
        told.append((copy.copy(message), data))
        return data

    monkeypatch.setattr(Message, "to_bytes", keep)
    setting = where(row, *SPEAK)
    kit.quiet(kit.SETTINGS[setting](), kit.ROWS[row](), kit.model_of(row, setting))
    assert told or row in SILENT, "nothing was told"
    for message, data in told:
        other = Message.from_bytes(data)
        assert other.facts() == message.facts()
        assert {n: type(i) for n, i in other.items.items()} == {n: type(i) for n, i in message.items.items()}
        for n, item in message.items.items():
            assert kit.bits(dict(sorted(other.items[n].tensors.items()))) == kit.bits(
                dict(sorted(item.tensors.items()))
            )
            assert json.dumps(other.items[n].meta) == json.dumps(dict(item.meta))
        assert other.digest == Message(**{**vars(other), "digest": ""}).digest, (
            "the digest is not that of the content"
        )
    for _, data in told[:1]:
        for cut in (0, 4, 8, 40, len(data) // 2, len(data) - 1):
            with pytest.raises(cs.ConsilienceError, match="should be whole"):
                Message.from_bytes(data[:cut])


@ROWS
def test_interrupted_and_resumed_to_the_same_bits(row: str, tmp_path: Path) -> None:
    """Stopped inside an epoch of a later learn, each method ends with the state of a run that was never stopped."""
    setting = where(
        row, "continual (task)", "continual (class)", "federated_continual", "merging", "multitask"
    )

    def go(out: Path, **more: Any) -> cs.Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule, model = kit.SETTINGS[setting](), kit.model_of(row, setting)
            return cs.run(
                schedule,
                kit.ROWS[row](),
                model=model,
                training=kit.TRAINING,
                out=out,
                checkpoint_steps=1,
                **more,
            )

    lines: list[dict[str, Any]] = []
    whole = go(tmp_path / "whole", progress=lines.append)
    stops = [
        i["steps"] for i in lines if i["event"] == "checkpoint" and 0 < i.get("step", 0) < i.get("of", 0)
    ]
    if not stops:
        assert whole.costs["steps"] == 0, "no checkpoint inside an epoch"
        return

    def stop(line: dict[str, Any]) -> None:
        if line["event"] == "checkpoint" and line["steps"] == stops[3 * len(stops) // 4] and "step" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", progress=stop)
    again = go(tmp_path / "cut", resume=True)
    assert kit.state_bits(kit.state_of(again)) == kit.state_bits(kit.state_of(whole))
    assert (again.matrices == whole.matrices).all() and again.costs["steps"] == whole.costs["steps"]


SILENT = {
    **dict.fromkeys(
        ("from_scratch", "gdumb", "joint"), "throws away what is heard, and refuses where others are"
    ),
    "fedweit": "wants task labels, here in continual alone; what it tells is checked in tests/test_fedmethods.py",
    "pcgrad": "runs in multitask alone, where nobody hears another agent",
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
        "wants task labels, here in continual alone; masks that travel are checked in tests/test_isolation.py",
    ),
}
"""Methods that no agent here tells of, and why."""
