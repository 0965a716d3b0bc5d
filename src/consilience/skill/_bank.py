"""Banks of messages in files, and agents that receive them.

A bank holds messages by (sender, source). A file has all of a bank or is refused, and any agent on the same
backbone can receive it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consilience.core.contexts import Routing
from consilience.core.errors import UNREADABLE, ConsilienceError, kind_of, reading
from consilience.core.message import Bank, Item, Message, Module, decode, encode, join, text_hash
from consilience.core.names import checked_name, pair
from consilience.core.params import Params, save, unpack
from consilience.core.schedule import Schedule
from consilience.core.source import LabelFrame, Source, Tensors
from consilience.core.tree import Input, cast_to
from consilience.mappers.mixture import Anchored
from consilience.version import __version__

if TYPE_CHECKING:
    from consilience.core.method import Method
    from consilience.core.model import Model
    from consilience.core.training import Training
    from consilience.loop.agent import Agent

FORMAT = 1
"""The format of the file; later ones are refused."""


def messages_of(agent_or_bank: Agent | Mapping[tuple[str, str], Message]) -> Bank:
    """Return the messages of an agent or a bank, sorted by (sender, source)."""
    bank: Mapping[tuple[str, str], Message] | None
    if isinstance(agent_or_bank, Mapping):
        bank = agent_or_bank
    else:
        # Anything may be given here by mistake, so its attributes are not relied on.
        bank = getattr(getattr(agent_or_bank, "state", None), "bank", None)
    if bank is None or any(not isinstance(message, Message) for message in bank.values()):
        raise ConsilienceError(
            "a bank must be an agent with one, or messages by (sender, source), "
            f"got a {type(agent_or_bank).__name__}."
        )
    return dict(sorted(bank.items()))


def bank_hash(agent_or_bank: Agent | Mapping[tuple[str, str], Message]) -> str:
    """Return a hash of (sender, source, version, content) of all messages.

    Equal banks have equal hashes, whatever the order in which their messages arrived.

    >>> bank_hash({}) == bank_hash(dict())
    True
    """
    messages = messages_of(agent_or_bank).values()
    # The digest has the content, so its tensors are not read again.
    held = [(message.sender, message.source, message.version, message.digest) for message in messages]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:32]


def message_bytes(agent_or_bank: Agent | Mapping[tuple[str, str], Message]) -> dict[tuple[str, str], int]:
    """Return the serialised size of each message in bytes, by (sender, source)."""
    return {key: len(message.to_bytes()) for key, message in messages_of(agent_or_bank).items()}


# Files.


def save_bank(agent_or_bank: Agent | Mapping[tuple[str, str], Message], path: str | Path) -> Path:
    """Write a bank as one safetensors file: every message with its version and the hash of its content.

    Equal banks give equal bytes. The file is replaced at once: a write that fails leaves the old one.

    Args:
        agent_or_bank: an agent (`Result.agent`), or a bank, such as `load_bank` returns.
        path: of the file.

    Raises ConsilienceError if the file cannot be written.
    """
    items: dict[str, Item] = {}
    messages = []
    for message in messages_of(agent_or_bank).values():
        items |= {
            item_key(message.sender, message.source, name): item for name, item in message.items.items()
        }
        messages.append(message.facts() | {"names": list(message.items)})

    tensors, facts = encode(items)
    text = json.dumps({"format": FORMAT, "consilience": __version__, "messages": messages, "items": facts})
    # One entry of metadata, since the order of several is not fixed in the file.
    save(path, tensors, {"bank": f"{text_hash(text)} {text}"})
    return Path(path)


def load_bank(path: str | Path) -> Bank:
    """Read a bank that `save_bank` wrote: {(sender, source): message}.

    Every message is hashed again. The hashes show that a file is complete, not who wrote it.

    Raises ConsilienceError, with the name of the file, if it cannot be read, is incomplete, is not a bank,
    has a later format, or has other content than its senders hashed.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConsilienceError(f"cannot read the bank {path}: {error.strerror}.") from error
    tensors, metadata = unpack(data, str(path))
    facts = read_facts(metadata.get("bank", ""), path)

    with reading(f"{path} must be a bank as `save_bank` writes it", "write it again"):
        return join({}, read_messages(tensors, facts, path))


def read_messages(tensors: Params, facts: Mapping[str, Any], path: str | Path) -> list[Message]:
    """Return the messages of a bank's tensors and facts, whose content is hashed again."""
    items: dict[str, Any] = decode(tensors, facts["items"])
    messages = []
    for fields in facts["messages"]:
        sender, source = fields["sender"], fields["source"]
        # Without a digest a message computes it from its items.
        own = {name: items.pop(item_key(sender, source, name)) for name in fields.pop("names")}
        digest = fields.pop("digest")
        message = Message(items=own, **fields)
        if message.digest != digest:
            raise ConsilienceError(
                "a message must have the content that its sender hashed, got another for "
                f"{message.whose} in {path}."
            )
        messages.append(message)
    if items:
        raise ConsilienceError(f"items of a bank must be in a message, got {len(items)} in none in {path}.")
    return messages


def item_key(sender: str, source: str, name: str) -> str:
    """Return the key of an item in a file."""
    # JSON keeps any text apart, where a separator could be part of a name.
    return json.dumps([sender, source, name])


def read_facts(entry: str, path: str | Path) -> dict[str, Any]:
    """Read the metadata of a bank's file: its hash, then JSON. Refuse later formats and altered text."""
    digest, _, text = entry.partition(" ")
    try:
        facts: dict[str, Any] = json.loads(text)
        format_ = int(facts["format"])
    except UNREADABLE as error:
        raise ConsilienceError(
            f"a bank must be a file of `save_bank`, got safetensors without its metadata in {path}."
        ) from error

    # A later format may be hashed in another way, so the format is checked first.
    if format_ > FORMAT:
        raise ConsilienceError(
            f"a bank must have a format up to {FORMAT}, got {format_} in {path}, written by consilience "
            f"{facts.get('consilience')}; install that version."
        )
    if digest != text_hash(text):
        raise ConsilienceError(f"a bank must be as it was written, got altered metadata in {path}.")
    return facts


# Agents that receive a bank.


def give(agent: Agent, bank: Mapping[tuple[str, str], Message]) -> None:
    """Let an agent receive a bank, as if every message had been sent to it.

    Messages that it has already are skipped; newer versions replace older ones.

    Raises ConsilienceError, after the other messages were received, for a module of another backbone,
    messages from other initial parameters, classes that the agent's schedule does not declare, other content
    under a version that it has, numbers that are not finite, or a module without the anchor (with `reject`
    above 0: and its validation scores) that the agent's mapper reads.

    >>> import consilience as cs
    >>> digits = cs.data.split_classes(cs.data.digits(), 5)
    >>> model = cs.models.multi_head(cs.models.random_features(64, 64), 10)
    >>> method, schedule = cs.methods.skill("nearest_mean", head="ridge"), cs.settings.skill(digits)
    >>> teacher, student = cs.run(schedule, method, model).agent, newcomer(schedule, method, model)
    >>> give(student, teacher.state.bank)
    >>> bank_hash(student) == bank_hash(teacher)
    True
    """
    agent.receive(list(messages_of(bank).values()), by_size=False)


def offer(agent: Agent, module: Module, name: str | None = None) -> Bank:
    """Make a bank of one module, such as `combine` returns, as a message of this agent.

    `give` and `save_bank` take it. It has no anchor, so agents with a mapper of anchors refuse it: it is for
    agents that receive the task with each input.

    Args:
        agent: the sender; it is not changed.
        module: on the agent's backbone.
        name: of the source of the message; None takes the module's task. A message that the agent already has
            under this name becomes an older version.

    Raises ConsilienceError for a value that is not a module, for a name that is empty or has a "|", or for
    the name of a source that the agent trained on.

    >>> import consilience as cs
    >>> digits = cs.data.split_classes(cs.data.digits(), 5)
    >>> model = cs.models.multi_head(cs.models.random_features(64, 64), 10)
    >>> agent = cs.run(cs.settings.skill([digits]), cs.methods.skill("oracle", head="ridge"), model).agent
    >>> both = cs.skill.combine(agent.state.experts, [("digits", "0"), ("digits", "9")], "ends")
    >>> bank = offer(agent, both)
    >>> give(agent, bank)
    >>> list(bank), [message.version for message in offer(agent, both).values()]
    ([('agent-0', 'ends')], [2])
    """
    if type(module) is not Module:
        raise ConsilienceError(f"`module` must be a module, such as `combine` makes, got {kind_of(module)}.")
    source = module.meta.get("task") if name is None else name
    if not isinstance(source, str) or not source or "|" in source:
        raise ConsilienceError(
            f"a module must have a name that is not empty and without '|', got {source!r}; give `name`."
        )
    if source in agent.state.visits:
        raise ConsilienceError(
            f"the name of a module must be new, got {source!r}, a source that the agent trained on; "
            "give another `name`."
        )
    checked_name(source, "module")

    # Receivers skip versions that are not new, so it must exceed all that this agent has used.
    held = agent.state.bank.get((agent.name, source))
    received, _ = agent.state.received.get(pair(agent.name, source), (0, ""))
    version = max(received, held.version if held is not None else 0) + 1
    message = agent.message(source, version, 0, {"model": module})
    return {message.key: message}


def newcomer(
    schedule: Schedule | Mapping[tuple[str, str], Message],
    method: Method,
    model: Model | None = None,
    training: Training | None = None,
    seed: int = 0,
    name: str = "newcomer",
    *,
    like: Tensor | None = None,
) -> Agent:
    """Make an agent that has not trained, from a schedule or from a bank, which it then receives.

    From a bank it needs no data: its classes and tasks are those of the modules. It predicts as the agent
    does that the bank is from.

    Args:
        schedule: as in `run`; or a bank of modules, such as `load_bank` returns.
        method, model, training: as in `run`.
        seed: draws the initial parameters. With a bank it must be the seed of the bank's run if the model
            draws its trunk (`models.backbone` and `models.random_features` do not), and `training` must have
            the run's precision.
        name: of the agent.
        like: inputs [B, ...] like those that it will predict for, images or features; with a bank only, which
            has none.

    Raises ConsilienceError for a bank without modules or without `like`, and as `give` does.

    >>> import consilience as cs
    >>> digits = cs.data.split_classes(cs.data.digits(), 5)
    >>> model = cs.models.multi_head(cs.models.random_features(64, 64), 10)
    >>> method, x = cs.methods.skill("nearest_mean", head="ridge"), digits[3].test.whole()[0]
    >>> teacher = cs.run(cs.settings.skill(digits), method, model).agent
    >>> student = newcomer(teacher.state.bank, method, model, like=x)
    >>> bool((student.predict(x) == teacher.predict(x)).all())
    True
    """
    from consilience.api import model_for
    from consilience.engines._serial import Serial
    from consilience.loop.checks import RunOptions
    from consilience.loop.run import begin

    bank: Bank = {}
    if isinstance(schedule, Mapping):
        bank = messages_of(schedule)
        planned = schedule_of(bank, like)
    elif like is not None:
        raise ConsilienceError("`like` must be left out with a schedule, which has inputs, got both.")
    else:
        planned = schedule

    # A run that has only begun has agents with initial parameters.
    chosen = model_for(planned, method, model)
    session = begin(planned, method, chosen, training, Serial(), RunOptions(seed=seed))
    agent = session.trials[0].agents[name]
    if bank:
        give(agent, bank)
    return agent


def schedule_of(bank: Bank, like: Tensor | None) -> Schedule:
    """Make a schedule with the labels and tasks of a bank's modules, and one example of zeros per source."""
    from consilience import settings

    items = {key: message.items.get("model") for key, message in bank.items()}
    modules = {key: item for key, item in items.items() if isinstance(item, Module)}
    if not modules:
        raise ConsilienceError(
            f"a bank must have modules to make an agent from, got none in {len(bank)} messages."
        )
    if not isinstance(like, Tensor) or like.ndim < 1:
        raise ConsilienceError(f"with a bank, `like` must be inputs [B, ...], got {kind_of(like)}.")

    labels = tuple(dict.fromkeys(label for module in modules.values() for label in module.labels))
    frame = LabelFrame(labels)
    zeros = torch.zeros(1, *like.shape[1:], dtype=like.dtype)
    empty = Tensors(zeros[:0], torch.zeros(0, dtype=torch.long))
    sources: list[Source] = []
    # Two senders may have used one name, but a schedule's sources need different ones.
    for (sender, source), module in modules.items():
        twice = any(other.name == source for other in sources)
        name = f"{source} of {sender}" if twice else source
        classes = tuple(frame.columns(module.labels)[list(module.classes)].tolist())
        train = Tensors(zeros, torch.tensor(classes[:1]))
        sources.append(Source(name, train, empty, empty, labels, classes, module.task))

    schedule = settings.skill([sources])
    if schedule.frame.labels == labels:
        return schedule

    # Classes that no module of the bank answers were left out; modules name them, so they are put back.
    column = {c: labels.index(label) for c, label in enumerate(schedule.frame.labels)}
    tasks = {task: tuple(column[c] for c in columns) for task, columns in schedule.frame.tasks.items()}
    return replace(schedule, sources=tuple(sources), judged=(), frame=replace(frame, tasks=tasks))


def familiarity(agent: Agent, x: Input) -> Tensor:
    """Score how familiar inputs x [B, ...] are to an agent [B], comparably between tasks.

    (s - median) / (median - lower quartile), where s is the score by the best task's anchor, and the
    quantiles are those of that task's validation examples. 0 is as familiar as the median example, -1 as the
    lower quartile. `mappers.auroc` of known and unknown inputs measures how well it separates them.

    Raises ConsilienceError for a mapper without anchors, or with `reject` = 0, whose anchors have no scores
    to compare with.

    >>> import consilience as cs
    >>> digits = cs.data.split_classes(cs.data.digits(), 2)
    >>> model = cs.models.multi_head(cs.models.random_features(64, 512), 10)
    >>> method = cs.methods.skill("nearest_mean", head="ridge", reject=0.05)
    >>> agent = cs.run(cs.settings.skill(digits[:1]), method, model).agent
    >>> known, unknown = (familiarity(agent, source.test.whole()[0]) for source in digits)
    >>> cs.mappers.auroc(known, unknown) > 0.7
    True
    """
    mapper = agent.method.mapper
    if not isinstance(mapper, Anchored):
        raise ConsilienceError(f"`familiarity` needs a mapper with anchors, got {type(mapper).__name__}.")
    # The agent computes in the precision it was trained in.
    x = cast_to(x, agent.device, agent.training.dtype)
    params, buffers = (
        {name: tensor.to(agent.device) for name, tensor in held.items()}
        for held in (agent.state.params, agent.state.buffers)
    )

    def features(other: Tensor | None = None) -> Tensor:
        return agent.model.features(params, buffers, x if other is None else other)

    # Familiarity is read from features; the outputs of experts are not needed, so their list is empty.
    with torch.no_grad():
        routing = Routing(x, features, list, [key for key, *_ in agent.choices()])
        return mapper.familiarity(routing, agent.memory(mapper))
