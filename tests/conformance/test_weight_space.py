"""What is received: aggregators keep their contract inside WeightSpace, strangers are refused, the bank's
join
is a join."""

from __future__ import annotations

from collections.abc import Mapping

import kit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import consilience as cs
from consilience import testing
from consilience.core.message import Bank, Message, Module, Private, Statistics, Weights, join
from consilience.core.params import content_hash, key
from consilience.core.state import State
from consilience.core.weight_space import WeightSpace
from consilience.loop.agent import Agent
from consilience.loop.ledger import Ledger

MODEL = testing.plain_model()
BASE, _ = MODEL.init(key(0, "init"))
ORIGIN = content_hash(BASE)
NAMES = [n for n in kit.AGGREGATORS if n != "Slerp"]
"""All but that which takes two rows only."""
DELTA = [n for n in NAMES if kit.make(n).needs_base]
ROWS = 4

TRIMS = {
    "Ties": "keeps the largest entries of each row",
    "Breadcrumbs": "keeps the largest entries of each row but the very largest",
    "Dare": "keeps entries by chance: equal in expectation",
}
"""Aggregators whose transform of one row is not the identity, and how."""


def near(seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """Parameters near the base."""
    return {n: p + scale * torch.randn(p.shape, generator=key(seed, n)) for n, p in BASE.items()}


def arriving(
    params: Mapping[str, Tensor], sender: str, version: int = 1, learned: bool = True, **facts: str
) -> Message:
    items = {"model": Weights({f"params/{n}": p for n, p in params.items()})}
    return Message(
        sender, "", version, 10, facts.get("origin", ORIGIN), facts.get("base", ORIGIN), items, learned
    )


def receiving(aggregator: object = None) -> Agent:
    method = cs.Method("receiver", consolidator=WeightSpace(aggregator))  # type: ignore[arg-type]
    return Agent(
        "me",
        MODEL,
        method,
        testing.SETTINGS["merging"](),
        testing.TRAINING,
        0,
        State(BASE, {}, BASE, ORIGIN),
        Ledger(),
    )


def away(agent: Agent, params: Mapping[str, Tensor]) -> float:
    return testing.params_differ(agent.state.params, params)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_size", [True, False])
def test_equal_models_give_that_model(name: str, by_size: bool) -> None:
    """As rows: m equal ones give their own transform, here of the delta; the receiver ends on it."""
    agent, model = receiving(kit.make(name)), near(1)
    agent.receive([arriving(model, f"sender-{i}") for i in range(ROWS)], by_size)
    if name in TRIMS:
        alone = receiving(kit.make(name))
        alone.receive([arriving(model, "sender-0")], by_size)
        moved = {n: agent.state.params[n] - BASE[n] for n in BASE}
        assert any(m.abs().max() > 1e-3 for m in moved.values())
        assert name == "Dare" or away(agent, alone.state.params) < 1e-6
        assert name == "Dare" or all(
            ((m == 0) | ((m + BASE[n] - model[n]).abs() < 1e-6)).all() for n, m in moved.items()
        )
    else:
        assert away(agent, model) < 1e-6
    assert agent.state.base is agent.state.params and not agent.state.trained


@pytest.mark.parametrize("name", ["Mean", None])
def test_one_model_is_taken_to_the_bit(name: str | None) -> None:
    agent, model = receiving(kit.make(name) if name else None), near(2)
    agent.receive([arriving(model, "sender")])
    assert away(agent, model) == 0


@pytest.mark.parametrize("name", NAMES)
def test_order_of_messages_does_not_matter(name: str) -> None:
    agents = receiving(kit.make(name)), receiving(kit.make(name))
    messages = [arriving(near(i), f"sender-{i}") for i in range(ROWS)]
    agents[0].receive(messages)
    agents[1].receive(messages[::-1])
    assert away(agents[0], agents[1].state.params) == 0


@pytest.mark.parametrize("name", NAMES)
def test_hearing_the_base_stays_there(name: str) -> None:
    agent = receiving(kit.make(name))
    agent.receive([arriving(BASE, f"sender-{i}") for i in range(ROWS)])
    assert away(agent, BASE) < 1e-6


@pytest.mark.parametrize("name", [*NAMES, None])
def test_common_ground_is_adopted(name: str | None) -> None:
    """A server that has not learned since tells its clients: no aggregator, no outer step."""
    agent, model = receiving(kit.make(name) if name else None), near(3)
    agent.receive([arriving(model, "server", learned=False, base=content_hash(model))])
    assert away(agent, model) == 0


@pytest.mark.parametrize("name", NAMES)
def test_strangers_are_refused(name: str) -> None:
    """Alone a stranger changes nothing; the friends of the same exchange are taken as without it."""
    agent, alone, before = (
        receiving(kit.make(name)),
        receiving(kit.make(name)),
        testing.bits(receiving().state),
    )
    stranger = arriving(near(2), "stranger", origin="feed" * 8)
    friends = [arriving(near(i), f"friend-{i}") for i in range(ROWS)]
    with pytest.raises(cs.ConsilienceError, match="the same parameters: 'stranger' sent origin 'feed"):
        agent.receive([stranger])
    assert testing.bits(agent.state) == before
    with pytest.raises(cs.ConsilienceError, match="messages were refused, and the others were received"):
        agent.receive([stranger, *friends])
    alone.receive(friends)
    assert testing.bits(agent.state) == testing.bits(alone.state)


@pytest.mark.parametrize("name", NAMES)
def test_deltas_need_the_same_base(name: str) -> None:
    agent = receiving(kit.make(name))
    messages = [
        arriving(near(i), f"sender-{i}", base="cafe" * 8 if i == 2 else ORIGIN) for i in range(ROWS + 1)
    ]
    if name in DELTA:
        with pytest.raises(
            cs.ConsilienceError,
            match="receiver's own parameters, and the message of 'sender-2' started from others",
        ):
            agent.receive(messages)
        others = receiving(kit.make(name))
        others.receive([m for m in messages if m.sender != "sender-2"])
        assert away(agent, others.state.params) == 0
    else:
        agent.receive(messages)
        assert away(agent, BASE) > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused_or_left_out_by_the_senders_name(name: str, bad: float) -> None:
    agent, ill = receiving(kit.make(name)), near(2)
    ill["1.weight"] = ill["1.weight"].clone()
    ill["1.weight"][3, 4] = bad
    if kit.make(name).robust:
        other, messages = receiving(kit.make(name)), [arriving(near(i), f"sender-{i}") for i in range(ROWS)]
        with pytest.warns(UserWarning, match="parameters of 'ill' have NaN or infinity"):
            agent.receive([*messages, arriving(ill, "ill")])
        other.receive(messages)
        assert away(agent, other.state.params) == 0 < away(agent, BASE)
        ill_alone = receiving(kit.make(name))
        with pytest.raises(cs.ConsilienceError, match=r"got NaN or infinity in '1.weight' of 'ill'"):
            ill_alone.receive([arriving(ill, "ill")])
        return
    messages, well = [arriving(near(i), f"sender-{i}") for i in range(ROWS)], receiving(kit.make(name))
    with pytest.raises(
        cs.ConsilienceError, match=r"must be finite, got NaN or infinity in '1.weight' of 'ill'"
    ):
        agent.receive([*messages, arriving(ill, "ill")])
    well.receive(messages)
    assert away(agent, well.state.params) == 0 and ("ill|" not in agent.state.received)


def test_other_shapes_are_refused_by_the_senders_name() -> None:
    wrong = near(1) | {"1.bias": torch.zeros(3)}
    with pytest.raises(cs.ConsilienceError, match=r"receiver's shapes, got \(3,\) for '1.bias' of 'wrong'"):
        receiving().receive([arriving(wrong, "wrong")])


def test_a_version_has_one_content() -> None:
    one, other = arriving(near(1), "sender"), arriving(near(2), "sender")
    agent = receiving()
    agent.receive([one])
    agent.receive([one])
    with pytest.raises(cs.ConsilienceError, match="one content, got another for '' of 'sender'"):
        agent.receive([other])
    for both in ([one, other], [other, one]):
        with pytest.raises(cs.ConsilienceError, match="one content, got another for '' of 'sender'"):
            receiving().receive(both)


def test_repeats_and_old_versions_change_nothing() -> None:
    once, often = receiving(kit.make("Mean")), receiving(kit.make("Mean"))
    messages = [arriving(near(i), f"sender-{i}", version=2) for i in range(ROWS)]
    once.receive(messages)
    often.receive([*messages, *messages, arriving(near(9), "sender-0", version=1)])
    assert away(once, often.state.params) == 0
    often.receive([arriving(near(9), "sender-0", version=1), *messages])
    assert away(once, often.state.params) == 0


# the bank

KINDS = (Statistics, Module)


def message(sender: str, source: str, version: int) -> Message:
    """A message whose content depends on these three alone."""
    kind = KINDS[len(sender + source) % 2]
    item = kind({"x": torch.rand(3, generator=key(sender, source, version))}, {"note": source})
    return Message(sender, source, version, version + 1, ORIGIN, ORIGIN, {"c": item})


messages = st.lists(
    st.builds(message, st.sampled_from(["a", "b", "cc"]), st.sampled_from(["x", "yy"]), st.integers(0, 3)),
    max_size=8,
)


def content(bank: Bank) -> object:
    """Keys in their order, facts, and bits."""
    return [(k, m.facts(), testing.bits({n: i.tensors for n, i in m.items.items()})) for k, m in bank.items()]


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(messages, messages, messages)
def test_join_is_a_join(a: list[Message], b: list[Message], c: list[Message]) -> None:
    one = join({}, a)
    assert content(join(one, a)) == content(one) == content(join(one, list(one.values())))
    assert content(join(one, b)) == content(join(join({}, b), a))
    other = join({}, [*join({}, b).values(), *c])
    assert (
        content(join(join(one, b), c))
        == content(join(one, other.values()))
        == content(join({}, [*c, *a, *b]))
    )
    for m in one.values():
        assert m.version == max(n.version for n in a if n.key == m.key)


@settings(deadline=None, max_examples=30, derandomize=True, database=None)
@given(messages, st.randoms(use_true_random=False))
def test_agents_banks_do_not_depend_on_the_road(sent: list[Message], r: object) -> None:
    """All at once, or one by one in another order with repeats: the same bank and receipts, through bytes."""
    at_once, one_by_one = receiving(), receiving()
    at_once.receive(sent)
    mixed = sent * 2
    r.shuffle(mixed)  # type: ignore[attr-defined]
    for m in mixed:
        one_by_one.receive([Message.from_bytes(m.to_bytes())])
    assert content(at_once.state.bank) == content(one_by_one.state.bank)
    assert dict(at_once.state.received) == dict(one_by_one.state.received)


def test_join_refuses_two_contents_of_a_version() -> None:
    one = message("a", "x", 1)
    other = Message("a", "x", 1, 2, ORIGIN, ORIGIN, {"c": Statistics({"x": torch.ones(3)})})
    for bank, news in ((join({}, [one]), [other]), ({}, [one, other]), (join({}, [other]), [one])):
        with pytest.raises(cs.ConsilienceError, match="one content, got another for 'x' of 'a', version 1"):
            join(bank, news)
    assert content(join({}, [one, message("a", "x", 1)])) == content(join({}, [one]))
    with pytest.raises(TypeError):
        items = {"c": Private({"x": torch.ones(3)})}
        Message("a", "x", 1, 2, ORIGIN, ORIGIN, items)
