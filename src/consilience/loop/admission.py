"""What an agent checks in a message before it takes it whole, or refuses it whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from consilience.core.correction import Mapper
from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Module, Weights, check_numbers
from consilience.core.params import fits_float32, key
from consilience.loop.predict import Predictor

if TYPE_CHECKING:
    from consilience.loop.agent import Agent

ROOM = 4 << 30
"""The bytes that an agent keeps of one sender, unless its models need more."""

RECEIPT_BYTES = 128
"""About what a receipt takes, besides its names."""

FULL = "there is no room for more of this sender's messages; raise `room` of the agent, or forget some."
"""The reason to refuse a message beyond `Agent.room`."""


class Refused(NamedTuple):
    """A message that was refused, and why."""

    message: Message
    reason: str


def reason_of(error: Exception) -> str:
    """Return why something was refused, in one line."""
    if isinstance(error, ConsilienceError):
        return str(error)
    first = str(error).partition("\n")[0]
    return f"it cannot be read here ({type(error).__name__}: {first:.200})."


def refusal_of(refused: Sequence[Refused], total: int) -> ConsilienceError:
    """Return the error that names all refused messages of an exchange of `total`."""
    shown = []
    for message, reason in refused[:5]:
        named = repr(message.sender) in reason
        shown.append(reason if named else f"{message.whose}: {reason}")
    if len(refused) > len(shown):
        shown.append(f"And {len(refused) - len(shown)} more.")
    others = ", and the others were received" if len(refused) < total else ""
    return ConsilienceError(f"{len(refused)} of {total} messages were refused{others}: {' '.join(shown)}")


def check_facts(agent: Agent, message: Message, one: bool) -> None:
    """Refuse a message from other parameters, or of a version that has several contents (not `one`)."""
    if message.origin != agent.state.origin:
        raise ConsilienceError(
            f"agents that exchange must start from the same parameters: {message.sender!r} sent origin "
            f"{message.origin[:8]!r}, and {agent.name!r} has {agent.state.origin[:8]}."
        )
    # Two contents under one version mean a broken sender, which averaging would hide.
    if not one:
        raise ConsilienceError(
            f"a version must have one content, got another for {message.source!r} of {message.sender!r}, "
            f"version {message.version}."
        )
    # Deltas are made by the receiver, from its own parameters.
    is_weights = isinstance(message.items.get("model"), Weights)
    if (
        agent.consolidator.needs_base
        and message.trained
        and is_weights
        and message.base != agent.common_hash(agent.state.base)
    ):
        raise ConsilienceError(
            f"deltas must start from the receiver's own parameters, and the message of {message.sender!r} "
            "started from others; exchange before training."
        )


def check_content(agent: Agent, message: Message) -> None:
    """Refuse a message whose items this agent could not use, now or in a later visit or prediction."""
    # Agents of a trial have one ledger, model and method, so that a broadcast is checked once.
    if message in agent.ledger.admitted:
        return
    for item in message.items.values():
        # Weights are the consolidator's: robust aggregators go on without those that are not finite.
        if not isinstance(item, Weights):
            check_numbers(item, agent.state.buffers, message.whose)

    for correction in agent.method.all_corrections:
        reason = correction.refuse_message(message, agent.state.params)
        if reason is not None:
            raise ConsilienceError(f"{reason} in {message.whose}.")
        # What a visit would find in a bank of this message alone.
        own = message.items.get(correction.name)
        if own is not None and not isinstance(correction, Mapper):
            correction.recall({message.key: own}, ())
    check_heads(agent, message)
    check_answer(agent, message)
    agent.ledger.admitted.add(message)


def check_heads(agent: Agent, message: Message) -> None:
    """Refuse heads that the agent does not have yet, in other shapes than it would grow them."""
    model, state, item = agent.model, agent.state, message.items.get("model")
    # Heads of a model that is only asked are its own.
    if not isinstance(item, Weights) or not state.base or agent.consolidator.asks:
        return
    sent = {**item.group("params"), **item.group("buffers")}
    new = {model.task_of(name) for name in sent.keys() - state.params.keys() - state.buffers.keys()}
    for source in agent.schedule.sources:
        if model.head_key(source) not in new - {None}:
            continue
        whole = agent.frame.widened(source)
        grown = model.grow(state.params, state.buffers, whole, key(agent.seed, source.name, "grow"))
        for name, tensor in {**grown[0], **grown[1]}.items():
            if name in sent and sent[name].shape != tensor.shape:
                raise ConsilienceError(
                    f"heads must have the shapes of their task, here {tuple(tensor.shape)}, got "
                    f"{tuple(sent[name].shape)} for {name!r} of {message.sender!r}."
                )


def check_answer(agent: Agent, message: Message) -> None:
    """Refuse a module that this agent's model cannot run, and an anchor that its mapper cannot route by."""
    module, mapper = message.items.get("model"), agent.method.mapper
    anchored = mapper is not None and mapper.name in message.items
    # An agent that was released has no parameters until it has received them.
    if not (isinstance(module, Module) or anchored) or not agent.state.base:
        return

    # One example is enough; of the module's task, where the schedule has it.
    sources = agent.schedule.sources
    task = module.meta.get("task") if isinstance(module, Module) else None
    source = next(
        (source for source in sources if source.task is not None and source.task == task), sources[0]
    )
    x = source.train.first()[0]
    predictor = Predictor(
        agent.name,
        agent.model,
        agent.method,
        agent.schedule,
        agent.training,
        agent.state.change(bank={message.key: message}),
    )
    for made in predictor.alone(x, message.key):
        if not fits_float32(made):
            raise ConsilienceError(f"answers and routes must be finite, got others from {message.whose}.")
