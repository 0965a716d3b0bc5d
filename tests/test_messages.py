"""Hostile and damaged content: each message is taken whole or refused whole, by its sender's name."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import consilience as cs
from consilience import report, testing
from consilience.core.message import Message, Module, Statistics, Weights, check_numbers, text_hash
from consilience.core.names import SUM
from consilience.core.params import SEAL, content_hash, pack, sealed, unpack
from consilience.core.state import decode_state, encode_state
from consilience.loop.agent import Agent
from consilience.loop.folder import Log
from consilience.loop.ledger import Ledger
from consilience.loop.session import saved_agents

MAPPERS = ("nearest_mean", "gaussian_mixture", "mahalanobis", "expert_gate")
TRAINING = cs.Training(epochs=1, batch_size=64)


@pytest.fixture(scope="module")
def parts() -> list[cs.Source]:
    return cs.data.split_classes(cs.data.digits(), 5)


@pytest.fixture(scope="module")
def model() -> Any:
    return cs.models.multi_head(cs.models.random_features(64, 32), 10)


@pytest.fixture(scope="module")
def runs(parts, model) -> dict[str, Any]:
    """An agent with a bank of five tasks, for each mapper."""
    schedule = cs.settings.skill([parts[:3], parts[3:]])
    made = {}
    for name in MAPPERS:
        method = cs.methods.skill(name, head="ridge", components=2)
        made[name] = (schedule, method, cs.run(schedule, method, model, TRAINING).agent.state.bank)
    return made


def newcomer(run: Any, model: Any) -> Agent:
    schedule, method, _ = run
    return cs.skill.newcomer(schedule, method, model, TRAINING)


def sent(message: Message, **changes: Any) -> Message:
    """The message with other fields, as it arrives: its hashes are right."""
    return Message.from_bytes(replace(message, **{"digest": "", **changes}).to_bytes())


def with_item(message: Message, name: str, **tensors: Tensor | None) -> Message:
    """The message of the next version with other tensors in one item; None takes one out."""
    item = message.items[name]
    held = {**item.tensors, **tensors}
    changed = replace(item, tensors={n: t for n, t in held.items() if t is not None})
    return sent(message, version=message.version + 1, items={**message.items, name: changed})


def score(agent: Agent, parts: list[cs.Source]) -> list[float]:
    found = []
    for part in parts:
        x, y = part.test.whole()
        found.append(float((agent.predict(x).argmax(1) == y).double().mean()))
    return found


# One bad message among good ones.


@pytest.mark.parametrize("mapper", MAPPERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, "none"])
def test_one_bad_anchor_costs_nobody_anything(runs, model, parts, mapper, bad):
    """The rest of the bank is taken to the bit, before and after; predictions stay those without it."""
    run, name = runs[mapper], type(runs[mapper][1].mapper).__name__
    bank = run[2]
    first, *rest = bank.values()
    anchor = first.items[name]
    if bad == "none":
        ill = with_item(first, name, **dict.fromkeys(anchor.tensors))
    else:
        # 1e30 is finite, but its square is not, in float32.
        entry = {"gaussian_mixture": "mean", "expert_gate": "encoder.weight"}.get(mapper, "first")
        ill_tensor = anchor.tensors[entry].clone()
        ill_tensor.view(-1)[0] = bad
        ill = with_item(first, name, **{entry: ill_tensor})

    honest, hit, early = (newcomer(run, model) for _ in range(3))
    cs.skill.give(honest, bank)
    cs.skill.give(hit, bank)
    before = testing.bits(hit.state)
    if not (mapper == "expert_gate" and bad == 1e30):  # its sigmoids saturate, and it loses every input
        with pytest.raises(cs.ConsilienceError, match=f"1 of 1 messages were refused: .*{parts[0].name}"):
            cs.skill.give(hit, {ill.key: ill})
        assert testing.bits(hit.state) == before
        with pytest.raises(cs.ConsilienceError, match="1 of 5 messages were refused, and the others were"):
            cs.skill.give(early, {ill.key: ill, **{m.key: m for m in rest}})
        assert list(early.state.bank) == [m.key for m in rest]
        assert score(early, parts)[1:] == pytest.approx(score(honest, parts)[1:], abs=0.15)
    assert score(hit, parts) == score(honest, parts)


MISSHAPEN: list[tuple[str, str, Callable[[Tensor], Tensor | None]]] = [
    ("nearest_mean", "first", lambda t: t[:1]),  # one feature would broadcast
    ("nearest_mean", "count", lambda t: -t),
    ("nearest_mean", "count", lambda t: t * 0),
    ("mahalanobis", "second", lambda t: t[:-1]),
    ("mahalanobis", "second", lambda t: -t),
    ("gaussian_mixture", "variance", lambda t: t * 0),
    ("gaussian_mixture", "variance", lambda t: t[:, :1]),
    ("gaussian_mixture", "weight", lambda t: t[:-1]),
    ("expert_gate", "deviation", lambda t: t * 0),
    ("expert_gate", "decoder.bias", lambda t: None),
]


@pytest.mark.parametrize(("mapper", "entry", "change"), MISSHAPEN)
def test_anchors_that_no_mapper_makes_are_refused(runs, model, mapper, entry, change):
    run = runs[mapper]
    first, name = next(iter(run[2].values())), type(run[1].mapper).__name__
    ill = with_item(first, name, **{entry: change(first.items[name].tensors[entry])})
    agent = newcomer(run, model)
    with pytest.raises(cs.ConsilienceError, match="anchor"):
        cs.skill.give(agent, {ill.key: ill})
    assert not agent.state.bank and not agent.state.received


@pytest.mark.parametrize(
    "change",
    [
        {"labels": "no"},
        {"classes": [99]},
        {"classes": "all"},
        {"task": 3},
        {"backbone": None},
        {"form": "new"},
        {"labels": [["digits", "0"]]},
    ],
)
def test_modules_with_other_facts_are_refused(runs, model, change):
    run = runs["nearest_mean"]
    first = next(iter(run[2].values()))
    module = first.items["model"]
    ill = sent(first, items={**first.items, "model": Module(module.tensors, {**module.meta, **change})})
    agent = newcomer(run, model)
    with pytest.raises(cs.ConsilienceError, match="of 'agent-0'"):
        cs.skill.give(agent, {ill.key: ill})
    assert not agent.state.bank


def test_modules_that_the_model_cannot_run_are_refused(runs, model):
    run = runs["nearest_mean"]
    first = next(iter(run[2].values()))
    name = next(n for n in first.items["model"].tensors if n.endswith("weight"))
    weight = first.items["model"].tensors[name]
    for other in (weight[:, :5], weight.double(), weight * 0 + 3e38, None):
        ill = with_item(first, "model", **{name: other})
        agent = newcomer(run, model)
        with pytest.raises(cs.ConsilienceError, match="1 of 1 messages were refused"):
            cs.skill.give(agent, {ill.key: ill})
        assert not agent.state.bank


def test_a_squatted_version_costs_that_message_alone(runs, model, parts):
    """A stranger takes a version first; the honest bank is received but for that, and then it is undone."""
    run = runs["mahalanobis"]
    first, agent = next(iter(run[2].values())), newcomer(run, model)
    forged = sent(
        first, items={n: replace(i, tensors=dict(i.tensors)) for n, i in first.items.items()}, size=7
    )
    module = first.items["model"]
    turned = {n: -t if t.is_floating_point() else t for n, t in module.tensors.items()}
    forged = sent(first, items={**first.items, "model": Module(turned, module.meta)})
    cs.skill.give(agent, {forged.key: forged})
    with pytest.raises(cs.ConsilienceError, match="1 of 5 .*others were received: a version must have"):
        cs.skill.give(agent, run[2])
    assert len(agent.state.bank) == 5
    agent.forget("agent-0", first.source)
    cs.skill.give(agent, run[2])
    assert cs.skill.bank_hash(agent) == cs.skill.bank_hash(run[2])


def test_a_forged_version_is_undone_without_the_senders_tasks(runs, model, parts):
    run = runs["mahalanobis"]
    first = next(iter(run[2].values()))
    honest, agent = newcomer(run, model), newcomer(run, model)
    cs.skill.give(honest, run[2])
    cs.skill.give(agent, run[2])
    module = first.items["model"]
    turned = {n: -t if t.is_floating_point() else t for n, t in module.tensors.items()}
    forged = sent(first, version=2**62, items={**first.items, "model": Module(turned, module.meta)})
    cs.skill.give(agent, {forged.key: forged})
    assert score(agent, parts)[0] < score(honest, parts)[0] - 0.2

    agent.forget(*forged.key)
    assert len(agent.state.bank) == 4
    cs.skill.give(agent, {forged.key: forged})  # a relay that still has it
    assert len(agent.state.bank) == 4
    cs.skill.give(agent, {first.key: first})  # far older than the forged one
    assert score(agent, parts) == score(honest, parts)
    for wrong in (("agent-9", None), ("agent-0", "digits/8")):
        with pytest.raises(cs.ConsilienceError, match="must be one of"):
            agent.forget(*wrong)
    # A checkpoint keeps it.
    tensors, facts = encode_state(agent.state)
    back = decode_state(tensors, json.loads(json.dumps(facts)), agent.state.frozen)
    assert back.undone == (f"agent-0|{first.source}|{forged.digest}",)


def test_one_of_many_statistics_is_undone_exactly(parts):
    """Solved sums: after a bad sum is taken out the head is that of the others, to the bit."""
    schedule = cs.settings.federated(parts, 1)
    trial = cs.run(schedule, cs.methods.fed3r(), cs.models.linear(64, 10), TRAINING)
    server = trial.agent
    bank = list(server.state.bank.values())
    fresh = [_bare(server) for _ in range(2)]
    wrong = with_item(bank[0], "Moments", first=-bank[0].items["Moments"].tensors["first"])
    fresh[0].receive([wrong, *bank[1:]])
    fresh[1].receive(bank[1:])
    name = next(iter(server.state.params))
    assert not torch.equal(fresh[0].state.params[name], fresh[1].state.params[name])
    fresh[0].forget(*wrong.key)
    assert torch.equal(fresh[0].state.params[name], fresh[1].state.params[name])
    fresh[0].receive(bank[:1])
    assert torch.allclose(fresh[0].state.params[name], server.state.params[name])


def _bare(agent: Agent) -> Agent:
    """An agent of the same run that has received nothing."""
    state = agent.state.change(bank={}, received={}, memory={}, visits={}, version=0)
    return Agent(
        "other", agent.model, agent.method, agent.schedule, agent.training, agent.seed, state, Ledger()
    )


def test_sums_that_cannot_be_solved_are_refused_by_their_sender(parts):
    server = cs.run(
        cs.settings.federated(parts, 1), cs.methods.fed3r(), cs.models.linear(64, 10), TRAINING
    ).agent
    good, other, *_ = server.state.bank.values()
    width = len(good.items["Moments"].tensors["second"])
    for change in (
        {"second": -1e6 * torch.eye(width, dtype=torch.float64)},  # not positive definite
        {"second": torch.eye(3, dtype=torch.float64)},
        {"first": None},
        {"second": torch.full((width, width), float("nan"), dtype=torch.float64)},
        {"second": torch.full((width, width), 1e300, dtype=torch.float64)},
    ):
        agent, alone = _bare(server), _bare(server)
        with pytest.raises(cs.ConsilienceError, match=rf"1 of 2 .*received: .*{good.sender}"):
            agent.receive([with_item(good, "Moments", **change), other])
        alone.receive([other])
        assert testing.bits(agent.state) == testing.bits(alone.state)


# Weights and buffers.


class WithBatchNorm(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 10))


@pytest.fixture(scope="module")
def server() -> Agent:
    """The server of a round of three clients with batch norm."""
    schedule = cs.settings.federated(cs.data.iid(cs.data.digits(), 3), 1)
    return cs.run(schedule, cs.methods.fedavg(), cs.models.wrap(WithBatchNorm()), TRAINING).agent


def weights_of(agent: Agent, sender: str, **changes: Tensor) -> Message:
    held = {f"params/{n}": p for n, p in agent.state.params.items()}
    held |= {f"buffers/{n}": b for n, b in agent.state.buffers.items()}
    item = Weights({**held, **changes})
    return Message(sender, "", 1, 10, agent.state.origin, "", {"model": item}, True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("entry", ["buffers/1.running_var", "params/0.weight"])
def test_what_is_not_finite_is_refused_and_the_round_goes_on(server, entry, bad):
    agent, alone = _bare(server), _bare(server)
    good = [
        weights_of(server, f"client-{i}", **{"params/2.bias": torch.full((10,), float(i))}) for i in range(3)
    ]
    tensor = good[0].items["model"].tensors[entry].clone()
    tensor.view(-1)[3] = bad
    with pytest.raises(
        cs.ConsilienceError, match=f"1 of 4 .*NaN or infinity in '{entry.partition('/')[2]}' of "
    ):
        agent.receive([*good, weights_of(server, "ill", **{entry: tensor})])
    alone.receive(good)
    assert testing.bits(agent.state) == testing.bits(alone.state)
    assert torch.allclose(agent.state.params["2.bias"], torch.ones(10))


def test_entries_of_another_kind_are_refused(server):
    for change in (
        {"buffers/1.running_mean": torch.zeros(3)},
        {"params/0.weight": torch.zeros(8, 64, dtype=torch.float64)},
        {"params/0.weight": torch.zeros(8, 64, dtype=torch.long)},
        {"params/0.bias": torch.zeros(9)},
    ):
        with pytest.raises(cs.ConsilienceError, match="of 'ill'"):
            _bare(server).receive([weights_of(server, "ill", **change)])


def test_constants_of_the_model_may_be_infinite():
    """A mask of -inf, which some attention layers keep, is the receiver's own too."""

    class Masked(WithBatchNorm):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    schedule = cs.settings.federated(cs.data.iid(cs.data.digits(), 2), 1)
    result = cs.run(schedule, cs.methods.fedavg(), cs.models.wrap(Masked()), TRAINING)
    assert bool((result.agent.state.buffers["mask"] == -torch.inf).all())


def test_a_model_of_another_kind_is_refused(runs, model, server):
    """A module would answer in the place of averaged weights; weights are no expert."""
    first = next(iter(runs["nearest_mean"][2].values()))
    module = replace(first, origin=server.state.origin, digest="")
    agent = _bare(server)
    with pytest.raises(cs.ConsilienceError, match="must come as Weights .* got Module"):
        agent.receive([module])
    assert not agent.state.bank
    expert = newcomer(runs["nearest_mean"], model)
    weights = replace(first, items={"model": Weights({"params/x": torch.zeros(1)})}, digest="")
    with pytest.raises(cs.ConsilienceError, match="experts must come as modules, got Weights"):
        expert.receive([weights])


def test_statistics_of_other_shapes_are_refused():
    """A precision of one number would broadcast over the whole penalty."""
    parts = cs.data.split_classes(cs.data.digits(), 2)
    agent = cs.run(
        cs.settings.continual(parts), cs.methods.ewc(1.0), cs.models.linear(64, 10), TRAINING
    ).agent
    first = next(iter(agent.state.bank.values()))
    name = next(n for n in first.items["EWC"].tensors if n.startswith("precision/"))
    fresh = _bare(agent)
    with pytest.raises(cs.ConsilienceError, match="statistics must have the shapes of the receiver's"):
        fresh.receive([with_item(first, "EWC", **{name: torch.ones(1)})])
    assert not fresh.state.bank


@pytest.mark.parametrize("mapper", MAPPERS)
def test_numbers_of_8_bits_are_refused(runs, model, mapper):
    """They can neither be added nor joined, so that one anchor would end the routing of all tasks."""
    message = next(iter(runs[mapper][2].values()))
    name = next(name for name in message.items if name != "model")
    entry = next(iter(message.items[name].tensors))
    short = message.items[name].tensors[entry].to(torch.float8_e5m2)
    agent = newcomer(runs[mapper], model)
    with pytest.raises(cs.ConsilienceError, match=r"16 bits or more, got torch.float8_e5m2 for"):
        agent.receive([with_item(message, name, **{entry: short})])
    with pytest.raises(cs.ConsilienceError, match=f"16 bits or more.*{message.sender}"):
        check_numbers(Statistics({"F": torch.ones(2).to(torch.float8_e4m3fn)}), {}, message.whose)


def test_keys_of_ours_are_no_names_of_senders(server):
    """A control variate under the key of the receiver's own sum would take its place."""
    good = weights_of(server, "client-0")
    for change in ({"source": SUM}, {"sender": ""}, {"sender": "<sum>"}, {"version": -1}, {"size": 1.5}):
        with pytest.raises(cs.ConsilienceError, match="must"):
            sent(good, **change)


# How much is kept of one sender.


def test_bytes_of_a_sender_are_bounded(runs, model):
    """Of a sender that fills the memory what fits is kept; others have their own room."""
    run = runs["nearest_mean"]
    messages = list(run[2].values())
    one, other = messages[0], next(m for m in messages if m.sender == "agent-1")
    agent = newcomer(run, model)
    agent.room = 3 * one.kept_bytes
    many = [sent(one, source=f"s{i}") for i in range(9)]
    with pytest.raises(cs.ConsilienceError, match="no room for more of this sender"):
        agent.receive([*many, other], by_size=False)
    held = [m for m in agent.state.bank.values() if m.sender == one.sender]
    assert len(held) == 2 and other.key in agent.state.bank
    assert sum(m.kept_bytes for m in held) <= agent.room
    # A newer version takes the place of the older one, whatever the room.
    agent.receive([sent(held[0], version=9)], by_size=False)
    assert agent.state.bank[held[0].key].version == 9
    agent.forget(*held[1].key)
    agent.receive([sent(one, source="another")], by_size=False)
    assert sum(m.sender == one.sender for m in agent.state.bank.values()) == 2


def test_receipts_count_too(server):
    """Weights are kept nowhere, but their receipts are."""
    agent = _bare(server)
    agent.room = 1000
    with pytest.raises(cs.ConsilienceError, match="no room"):
        agent.receive([replace(weights_of(server, "a"), source=f"s{i}") for i in range(20)])
    assert 0 < len(agent.state.received) < 10


# Fuzzing: what arrives is a valid message, bank, checkpoint or result, or one ConsilienceError. The hashes of
# the mutated content are right, so that they hide nothing. `CONSILIENCE_MUTANTS=100000` tries as many in all,
# in some minutes.

SCALE = int(os.environ.get("CONSILIENCE_MUTANTS", 2000)) / 2000
"""By how much more are tried than the numbers below."""

ODD: list[Any] = [None, -1, 0, 1.5, True, 2**70, 10**400, 1e308, float("nan"), "", "x" * 300, "a|b", "<sum>"]
ODD += ["\ud800", [], {}, [[[]]], {"a": 1}, [None], "params", "digits/0-1", "NaN"]


SHORT = [torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int8, torch.bool]


def mutated_json(value: Any, draw: random.Random) -> Any:
    """JSON with one part replaced, left out, doubled, or under another name."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        result, how = dict(value), draw.random()
        if how < 0.15:
            del result[name]
        elif how < 0.25:
            result[draw.choice(["x", "", "<sum>", name + "/"])] = result.pop(name)
        else:
            result[name] = mutated_json(value[name], draw)
        return result
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        how = draw.random()
        if how < 0.2:
            return [*value[:place], *value[place + 1 :]]
        if how < 0.3:
            return [*value, value[place]]
        return [*value[:place], mutated_json(value[place], draw), *value[place + 1 :]]
    return draw.choice(ODD)


def mutated_tensors(tensors: Mapping[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """Tensors of which one has other numbers, another shape or type, another name, or is gone."""
    result = dict(tensors)
    name = draw.choice(list(result))
    tensor = result[name]
    number = draw.choice([float("nan"), float("inf"), 1e38, -1e30, 0.0, -1.0, 1e300, 2.0**40])

    def spoilt() -> Tensor:
        wide = tensor.double().clone()
        if wide.numel():
            wide.view(-1)[draw.randrange(wide.numel())] = number
        return wide if draw.random() < 0.3 else wide.to(tensor.dtype)

    changes: list[Callable[[], Tensor | None]] = [
        spoilt,
        spoilt,
        lambda: None,
        lambda: tensor.flatten(),
        lambda: tensor[:1] if tensor.dim() else tensor[None],
        lambda: tensor[:0] if tensor.dim() else tensor[None, None],
        lambda: tensor.T.contiguous() if tensor.dim() == 2 else torch.stack([tensor] * 2),
        # Numbers of 8 bits have no negation.
        lambda: (-tensor.float()).to(tensor.dtype) if tensor.is_floating_point() else tensor.long() + 1,
        lambda: torch.zeros_like(tensor),
        lambda: tensor.to(
            draw.choice([torch.float16, torch.bfloat16, torch.int8, torch.float8_e5m2, torch.bool])
        ),
        lambda: tensor.to(torch.complex64),
    ]
    changed = draw.choice(changes)()
    if changed is None or draw.random() < 0.1:
        del result[name]
    if changed is not None:
        other = draw.choice(["", "x", "0/", "9/x", name + "/x", name.replace("0", "1")])
        result[name if draw.random() < 0.8 else other] = changed
    return result


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes of which some are other, more or fewer."""
    place, how = draw.randrange(len(data)), draw.random()
    if how < 0.3:
        return data[:place]
    if how < 0.4:
        return data + data[:place]
    # Most of the meaning is at the start.
    place = draw.randrange(min(len(data), 3000)) if how < 0.8 else place
    return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]


def digest_of(tensors: Mapping[str, Tensor], items: Any) -> str:
    return content_hash(tensors) + content_hash({json.dumps(items): torch.zeros(0)})[:8]


def mutated_message(message: Message, draw: random.Random) -> bytes:
    data = message.to_bytes()
    if draw.random() < 0.2:
        return mutated_bytes(data, draw)
    tensors, meta = unpack(data)
    facts = json.loads(meta["message"].partition(" ")[2])
    for _ in range(draw.choice([1, 1, 2])):
        if draw.random() < 0.5:
            tensors = mutated_tensors(tensors, draw)
        else:
            facts = mutated_json(facts, draw)
    if isinstance(facts, dict) and "digest" in facts and draw.random() < 0.9:
        facts["digest"] = digest_of(tensors, facts.get("items"))
    text = json.dumps(facts) if draw.random() < 0.98 else "[" * 100_000
    return pack(tensors, {"message": f"{text_hash(text)} {text}"})


def usable(agent: Agent, x: Tensor) -> None:
    """What an agent holds it can use: it predicts, is kept, and is read again."""
    assert not agent.predict(x).isnan().any()
    tensors, facts = encode_state(agent.state)
    data = pack(tensors, {"facts": json.dumps(facts)})
    back, meta = unpack(data)
    decode_state(back, json.loads(meta["facts"]), agent.state.frozen)


@pytest.mark.parametrize("mapper", MAPPERS)
def test_mutated_messages(runs, model, parts, mapper):
    """200 per mapper: each is taken, and then of use, or refused, and then without effect."""
    draw, run = random.Random(mapper), runs[mapper]
    agent, x = newcomer(run, model), parts[0].test.whole()[0][:3]
    messages, taken = list(run[2].values()), 0
    cs.skill.give(agent, {m.key: m for m in messages[1:]})
    before = agent.state
    for _ in range(count := round(200 * SCALE)):
        agent.state = before
        data = mutated_message(messages[0], draw)
        try:
            agent.receive([Message.from_bytes(data)], by_size=False)
        except cs.ConsilienceError:
            assert agent.state is before
        else:
            taken += 1
            usable(agent, x)
    assert 0.02 * count < taken < 0.75 * count


def test_mutated_banks(runs, model, parts, tmp_path):
    """400 files: each is a bank, of which the good messages are taken, or refused as a whole."""
    draw, run, path = random.Random(0), runs["nearest_mean"], tmp_path / "bank.safetensors"
    agent, x, taken = newcomer(run, model), parts[0].test.whole()[0][:3], 0
    original = cs.skill.save_bank(dict(list(run[2].items())[:2]), path).read_bytes()
    before = agent.state
    for _ in range(count := round(400 * SCALE)):
        data = original
        if draw.random() < 0.2:
            data = mutated_bytes(data, draw)
        else:
            tensors, meta = unpack(data)
            facts = json.loads(meta["bank"].partition(" ")[2])
            if draw.random() < 0.3:
                tensors = mutated_tensors(tensors, draw)
            else:
                facts = mutated_json(facts, draw)
            text = json.dumps(facts)
            data = pack(tensors, {"bank": f"{text_hash(text)} {text}"})
        path.write_bytes(data)
        agent.state = before
        try:
            bank = cs.skill.load_bank(path)
        except cs.ConsilienceError:
            continue
        taken += 1
        try:
            cs.skill.give(agent, bank)
        except cs.ConsilienceError:
            assert len(agent.state.bank) < 2
        usable(agent, x)
    assert 0.02 * count < taken < 0.75 * count


def test_mutated_checkpoints(runs, model, parts):
    """400 states of an agent: each is read as one of this model, or refused."""
    draw, run = random.Random(1), runs["nearest_mean"]
    agent, x, taken = newcomer(run, model), parts[0].test.whole()[0][:3], 0
    cs.skill.give(agent, run[2])
    agent.forget("agent-1")
    first, whole = agent.state, encode_state(agent.state)
    for _ in range(count := round(400 * SCALE)):
        tensors, facts = dict(whole[0]), json.loads(json.dumps(whole[1]))
        if draw.random() < 0.4:
            tensors = mutated_tensors(tensors, draw)
        else:
            facts = mutated_json(facts, draw)
        try:
            agent.state = decode_state(tensors, facts, first.frozen, like=first)
        except cs.ConsilienceError:
            continue
        taken += 1
        usable(agent, x)
    assert 0.02 * count < taken < 0.75 * count


def test_mutated_results(parts, tmp_path):
    """320 result.json: each can be shown in a table and a page, or is refused with the name of its file."""
    draw, taken = random.Random(2), 0
    schedule = cs.settings.federated_continual([parts[:2], parts[2:]], 2)
    cs.run(schedule, cs.methods.fedavg(), cs.models.linear(64, 10), TRAINING, out=tmp_path, repeats=2)
    path = tmp_path / "result.json"
    original = path.read_bytes()
    for _ in range(count := round(320 * SCALE)):
        if draw.random() < 0.2:
            path.write_bytes(mutated_bytes(original, draw))
        else:
            changed = mutated_json(json.loads(original), draw)
            # Whoever changes a result on purpose repairs its hash.
            if isinstance(changed, dict):
                changed = sealed({name: value for name, value in changed.items() if name != SEAL})
            path.write_text(json.dumps(changed))
        try:
            result = report.load(tmp_path)
        except cs.ConsilienceError:
            continue
        taken += 1
        assert report.table([result])
        # A page takes longer than all else.
        if not taken % 8:
            report.write([result], tmp_path / "report.html")
    assert 0.02 * count < taken < 0.75 * count


def mutated_folder(folder: Path, draw: random.Random) -> None:
    """Change the log or the index of a run's only checkpoint; mostly with hashes that are right."""
    index_path, log_path = folder / "checkpoint" / "index.json", folder / "log.jsonl"
    index: Any = json.loads(index_path.read_bytes())
    how = draw.random()
    if how < 0.2:
        path = index_path if how < 0.1 else log_path
        path.write_bytes(mutated_bytes(path.read_bytes(), draw))
        return

    if how < 0.35:
        lines = log_path.read_text().splitlines()
        place = draw.randrange(len(lines))
        lines[place] = json.dumps(mutated_json(json.loads(lines[place]), draw))
        data = ("\n".join(lines) + "\n").encode()
        log_path.write_bytes(data)
        index["log"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    elif how < 0.85:
        index["facts"]["trials"] = mutated_json(index["facts"]["trials"], draw)
    else:
        index = mutated_json(index, draw)
    if isinstance(index, dict):
        index = sealed({name: value for name, value in index.items() if name != SEAL})
    index_path.write_text(json.dumps(index))


def test_mutated_run_folders(parts, tmp_path):
    """80 folders of interrupted runs: each is checked, its models are read, and it is resumed, or refused."""
    draw, taken, out = random.Random(3), 0, tmp_path / "run"
    few = [
        replace(s, train=s.train.select(torch.arange(40)), test=s.test.select(torch.arange(9)))
        for s in parts[:2]
    ]
    run = partial(
        cs.run,
        cs.settings.federated(few, 2),
        cs.methods.fedavg(),
        cs.models.linear(64, 10),
        TRAINING,
        out=out,
    )

    def stop(line: Mapping[str, Any]) -> None:
        if line["event"] == "stage" and line["stage"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out=out, checkpoint_steps=1, progress=stop)
    # The one before it would be used in place of a damaged one.
    (out / "checkpoint" / "previous.json").unlink()
    whole = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for _ in range(count := round(80 * SCALE)):
        shutil.rmtree(out)
        for path, data in whole.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        mutated_folder(out, draw)
        Log(out).check()
        try:
            saved_agents(out)
            result = run(out=out, resume=True)
        except cs.ConsilienceError:
            continue
        taken += 1
        assert result.agent.predict(few[0].test.whole()[0]).isfinite().all()
    assert 0.02 * count < taken < 0.75 * count


def interrupted_run(parts: Any, out: Path) -> tuple[Any, Path]:
    """A run that was stopped inside a visit, as arguments of `run`, and the index of its only checkpoint."""
    arguments = (cs.settings.federated(parts[:2], 2), cs.methods.fedavg(), cs.models.linear(64, 10), TRAINING)

    def stop(line: Mapping[str, Any]) -> None:
        if line["event"] == "stage" and line["stage"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cs.run(*arguments, out=out, checkpoint_steps=1, progress=stop)
    (out / "checkpoint" / "previous.json").unlink()
    return arguments, out / "checkpoint" / "index.json"


def reseal(path: Path, index: Mapping[str, Any]) -> None:
    """Write an index with a hash that is right."""
    path.write_text(json.dumps(sealed({name: value for name, value in index.items() if name != SEAL})))


@pytest.mark.parametrize("change", [{"epoch": 2**70}, {"epoch": -1}, {"index": -1}])
def test_a_visit_that_stands_where_none_can_is_refused(parts, tmp_path, change):
    """With all hashes right; the steps of 2**70 epochs would be planned for ever."""
    arguments, path = interrupted_run(parts, tmp_path)
    index = json.loads(path.read_bytes())
    index["facts"]["trials"]["0"]["job"] |= change
    reseal(path, index)
    with pytest.raises(cs.ConsilienceError, match="must hold this visit as it was"):
        cs.run(*arguments, out=tmp_path, resume=True)


def test_a_state_that_lacks_one_of_its_facts_is_refused(parts, tmp_path):
    """Each fact of an agent in turn, where its models are read and where the run is resumed."""
    arguments, path = interrupted_run(parts, tmp_path)
    whole = path.read_bytes()
    facts = json.loads(whole)["facts"]["trials"]["0"]["agents"]["client-0"]
    # These three are no facts of folders that were written before there was anything to forget.
    wanted = facts.keys() - {"forgotten", "undone", "unsent"}
    assert "frozen" in wanted and len(wanted) > 8
    for name in sorted(wanted):
        index = json.loads(whole)
        del index["facts"]["trials"]["0"]["agents"]["client-0"][name]
        reseal(path, index)
        with pytest.raises(cs.ConsilienceError):
            saved_agents(tmp_path)
        with pytest.raises(cs.ConsilienceError):
            cs.run(*arguments, out=tmp_path, resume=True)


@pytest.mark.parametrize("more", [1, 2**40, 2**70, -(10**6)])
def test_a_log_that_an_index_says_is_longer_is_refused(parts, tmp_path, more):
    """With all hashes right; a resumed run would fill it up with zeros."""
    arguments = (cs.settings.federated(parts[:2], 1), cs.methods.fedavg(), cs.models.linear(64, 10), TRAINING)
    cs.run(*arguments, out=tmp_path)
    path, log = tmp_path / "checkpoint" / "index.json", tmp_path / "log.jsonl"
    (tmp_path / "checkpoint" / "previous.json").unlink()
    index, size = json.loads(path.read_bytes()), log.stat().st_size
    index["log"]["bytes"] = size + more
    path.write_text(json.dumps(sealed({name: value for name, value in index.items() if name != SEAL})))
    with pytest.raises(cs.ConsilienceError, match="log.jsonl is damaged or missing"):
        cs.run(*arguments, out=tmp_path, resume=True)
    assert log.stat().st_size == size
