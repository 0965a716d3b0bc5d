"""Names of users are harmless: none hides what the library keeps next to it, and reserved forms are
refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import consilience as cs
from consilience.core import names
from consilience.core.message import Message, Private, Statistics
from consilience.core.names import joined
from consilience.core.sampler import Sampler
from consilience.core.schedule import Evaluate, Exchange, Expert, Schedule, Train, build
from consilience.core.source import Source
from consilience.core.state import State, decode_state, encode_state

sys.path.insert(0, str(Path(__file__).parents[1]))
from restate import mlp, source, training

ORDINARY = ("a", "h", "m", "p", "s")
SPECIAL = ("a|b", "heard", "model", "the past", "the sum")
"""In the same order as the ordinary names, because sums go by the order of names."""

RESERVED = ("", "<sum>", "<any text>")


@dataclass(frozen=True)
class InOrder(Sampler):
    """The examples as they come. Shuffles are keyed by the names of sources, and would differ."""

    def plan(self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator) -> list[Tensor]:
        return list(torch.arange(len(targets)).split(batch_size))


def schedule(labels: tuple[str, ...], scenario: str) -> Schedule:
    """Three clients with two tasks, two and one, which are named by `labels`; tasks too."""
    classes = ((0, 1), (2, 3), (2, 3), (0, 1), (1, 2))
    made = [
        source(name, 16 + 3 * number, own, number, task=name)
        for number, (name, own) in enumerate(zip(labels, classes, strict=True))
    ]
    # A name that could hide something comes first: what a client keeps of its last task it never recalls.
    streams = [[made[1], made[0]], [made[3], made[2]], [made[4]]]
    return cs.settings.federated_continual(streams, rounds=3, scenario=scenario)


@pytest.mark.parametrize(
    ("method", "scenario"), [("fedweit", "task"), ("scaffold", "class"), ("ghbm", "class"), ("si", "class")]
)
def test_names_of_sources_are_harmless(method: str, scenario: str) -> None:
    one, other = (
        cs.run(
            schedule(labels, scenario),
            getattr(cs.methods, method)(),
            mlp(),
            training(momentum=0.0, sampler=InOrder()),
            judge_clients=True,
        )
        for labels in (ORDINARY, SPECIAL)
    )
    assert (one.matrix == other.matrix).all()
    assert list(one.params) == list(other.params)
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)
    assert one.local == other.local and one.client_drift == other.client_drift


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_names_are_refused_where_they_are_given(name: str) -> None:
    good = source("good")

    def refused(kind: str) -> object:
        text = rf"names of {kind}s must not be empty or stand in angle brackets, got '{name}'"
        return pytest.raises(cs.ConsilienceError, match=text)

    with refused("source"):
        replace(good, name=name)
    with refused("task"):
        replace(good, task=name)
    with refused("expert"):
        Expert(name, {}, good)
    with refused("agent"):
        build("custom", [good], "class", lambda seed: iter(()), name)
    plans = ([Train({name: ("good",)})], [Exchange({"agent": (name,)})], [Exchange({name: ("agent",)})])
    for plan in plans:
        with refused("agent"):
            cs.run(
                build(
                    "custom", [good], "class", lambda seed, plan=plan: iter([*plan, Evaluate("end")]), "agent"
                ),
                cs.methods.finetune(),
                mlp(),
            )


def test_names_that_only_begin_or_end_with_a_bracket_are_allowed() -> None:
    assert [source(name).name for name in ("<a", "b>", "a < b > c")] == ["<a", "b>", "a < b > c"]
    assert isinstance(source("x").map(task=None), Source)


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_pairs_have_keys_of_their_own(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert names.unpair(names.pair(*one)) == one
    assert (names.pair(*one) == names.pair(*other)) == (one == other)


def test_a_state_keeps_items_apart_whose_names_have_bars() -> None:
    """("a|b", "c") and ("a", "b|c") came under one key in checkpoints of 0.1."""

    def message(sender: str, about: str, value: float) -> Message:
        items = {"EWC": Statistics({"x": torch.tensor([value])})}
        return Message(sender, about, 1, 3, "origin", "base", items)

    sent = [message("a|b", "c", 1.0), message("a", "b|c", 2.0)]
    memory = {"EWC": {"b|c": Private({"x": torch.tensor([3.0])}), "c": Private({"x": torch.tensor([4.0])})}}
    state = State({}, {}, {}, "origin", bank={m.key: m for m in sent}, memory=memory)
    again = decode_state(*encode_state(state))
    assert {key: float(m.items["EWC"].tensors["x"]) for key, m in again.bank.items()} == {
        ("a|b", "c"): 1.0,
        ("a", "b|c"): 2.0,
    }
    assert [float(item.tensors["x"]) for item in again.memory["EWC"].values()] == [3.0, 4.0]


@pytest.mark.parametrize("method", ["hat", "supsup", "den", "packnet", "fedweit"])
def test_names_of_tasks_that_contain_others_are_harmless(method: str) -> None:
    """Entries of a task begin with its name: "a" must not take those of "a/b", nor "a_b" those of "a:b"."""
    results = []
    for labels in (("x1", "x2", "x3", "x4"), ("a/b", "a", "a:b", "a_b")):
        tasks = [
            source(name, 24, own, number, task=name)
            for number, (name, own) in enumerate(zip(labels, ((0, 1), (2, 3), (0, 1), (2, 3)), strict=True))
        ]
        made = cs.settings.continual(tasks, "task")
        plain = training(sampler=InOrder())
        # These two divide a head, so that tasks with classes in common need one each.
        model = cs.models.multi_head(mlp(), 4) if method in ("hat", "packnet") else mlp()
        results.append(cs.run(made, getattr(cs.methods, method)(), model, plain))
    one, other = results
    if method == "fedweit":  # the others, and heads, draw by the names of tasks
        assert np.array_equal(one.matrices, other.matrices)
    if method in ("hat", "supsup", "packnet"):  # what a task answers never changes once it was trained
        for task in range(4):
            assert len(set(other.matrix[task + 1 :, task])) == 1
    shapes = [sorted(tuple(p.shape) for p in r.params.values()) for r in results]
    assert shapes[0] == shapes[1]


def test_traces_of_one_source_and_of_two_together_are_apart() -> None:
    assert joined(["a+b"]) != joined(["a", "b"]) == "a+b"
    assert joined(["a%2Bb"]) != joined(["a+b"])
