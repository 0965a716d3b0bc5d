"""Banks in files: what agents told, whole or not at all, checked by content, and given to any agent on the same backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consilience.consolidators.bank import refuse_strangers
from consilience.core.contexts import Routing
from consilience.core.errors import ConsilienceError
from consilience.core.message import Bank, Item, Message, Module, decode, encode, join, text_hash
from consilience.core.names import pair
from consilience.core.params import save, unpack
from consilience.core.schedule import Schedule
from consilience.core.source import LabelFrame, Source, Tensors
from consilience.mappers.mixture import Anchored
from consilience.version import __version__

if TYPE_CHECKING:
    from consilience.core.method import Method
    from consilience.core.model import Model
    from consilience.core.training import Training
    from consilience.loop.agent import Agent

FORMAT = 1
"""Of the file; a later one is refused."""


def _bank(agent_or_bank: Agent | Mapping[tuple[str, str], Message]) -> Bank:
    found = (
        agent_or_bank
        if isinstance(agent_or_bank, Mapping)
        else getattr(getattr(agent_or_bank, "state", None), "bank", None)
    )
    if found is None or any(not isinstance(m, Message) for m in found.values()):
        raise ConsilienceError(
            f"a bank should be an agent's, or messages by (sender, source). Found a {type(agent_or_bank).__name__}."
        )
    return dict(sorted(found.items()))


def bank_hash(agent_or_bank: Agent | Mapping[tuple[str, str], Message]) -> str:
    """A hash of (sender, source, version, content) of all that a bank holds: equal banks, however they came about, have equal hashes.

    >>> bank_hash({}) == bank_hash(dict())
    True
    """
    held = [(m.sender, m.source, m.version, m.digest) for m in _bank(agent_or_bank).values()]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:32]


def told_bytes(agent_or_bank: Agent | Mapping[tuple[str, str], Message]) -> dict[tuple[str, str], int]:
    """Bytes of each message of a bank as it is serialised, by (sender, source): what telling of that task costs."""
    return {k: len(m.to_bytes()) for k, m in _bank(agent_or_bank).items()}


def save_bank(agent_or_bank: Agent | Mapping[tuple[str, str], Message], path: str | Path) -> Path:
    """Write a bank as one safetensors file, whole or not at all: every message with its version and the hash of its content.

    Equal banks give equal bytes.

    Args:
        agent_or_bank: an agent (`Result.agent`), or what `load_bank` gave.
        path: of the file.

    Raises ConsilienceError where it cannot be written.
    """
    items: dict[str, Item] = {}
    told = []
    for m in _bank(agent_or_bank).values():
        items |= {json.dumps([m.sender, m.source, name]): item for name, item in m.items.items()}
        told.append(m.facts() | {"names": list(m.items)})
    tensors, facts = encode(items)
    text = json.dumps(
        {"format": FORMAT, "consilience": __version__, "messages": told, "items": facts}
    )
    save(path, tensors, {"bank": f"{text_hash(text)} {text}"})  # one entry: several have no order
    return Path(path)


def load_bank(path: str | Path) -> Bank:
    """The bank that `save_bank` wrote: {(sender, source): message}.

    Every message is hashed again. The hashes say that a file is whole, not who wrote it.

    Raises ConsilienceError, with the name of the file, where it cannot be read, is cut short, is no bank, is of a later format,
    or holds other content than its senders hashed.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise ConsilienceError(f"a bank should be a readable file. Found {e.strerror} at {path}.") from e
    tensors, meta = unpack(data, str(path))
    told, _, text = meta.get("bank", "").partition(" ")
    try:
        facts = json.loads(text)
        form = int(facts["format"])
    except (ValueError, KeyError, TypeError) as e:
        raise ConsilienceError(
            f"a bank should be a file of `save_bank`. Found safetensors without its facts in {path}."
        ) from e
    if form > FORMAT:
        raise ConsilienceError(
            f"a bank should have a format up to {FORMAT}. Found {form} in {path}, by consilience {facts.get('consilience')}."
        )
    if told != text_hash(text):
        raise ConsilienceError(
            f"a bank should be as it was written. Found other facts than were hashed in {path}."
        )
    items: dict[str, Any] = decode(tensors, facts["items"])
    found = []
    for f in facts["messages"]:
        own = {name: items[json.dumps([f["sender"], f["source"], name])] for name in f.pop("names")}
        digest = f.pop("digest")
        m = Message(items=own, **f)
        if m.digest != digest:
            raise ConsilienceError(
                f"a message should have the content that its sender hashed. Found another for {m.source!r} of {m.sender!r} in {path}."
            )
        found.append(m)
    return join({}, found)


def give(agent: Agent, bank: Mapping[tuple[str, str], Message]) -> None:
    """Let an agent absorb a bank, as if it had heard every message: what it has already is left out, newer versions take an older one's place.

    Raises ConsilienceError for a module of another backbone, messages from other first parameters, classes that the agent's
    schedule does not declare, another content under a version that it has, or a module without the anchor (with `reject` above 0:
    and its validation scores) that the agent's mapper reads. Then nothing of the bank is absorbed.

    >>> import consilience as cs
    >>> digits, model = cs.data.split_classes(cs.data.digits(), 5), cs.models.multi_head(cs.models.random_features(64, 64), 10)
    >>> method, schedule = cs.methods.skill("nearest_mean", head="ridge"), cs.settings.skill(digits)
    >>> teacher, student = cs.run(schedule, method, model).agent, newcomer(schedule, method, model)
    >>> give(student, teacher.state.bank)
    >>> bank_hash(student) == bank_hash(teacher)
    True
    """
    messages = list(_bank(bank).values())
    refuse_strangers(agent.model, agent.state.params, messages)
    _refuse_lost(agent, messages)
    for m in messages:
        module = m.items.get("model")
        if isinstance(module, Module) and module.labels != agent.frame.labels:
            agent.frame.columns(module.labels)
    agent.receive(messages, by_size=False)


def _refuse_lost(agent: Agent, messages: Sequence[Message]) -> None:
    """Refuse modules that the agent's mapper could route nothing to, and anchors that it could not judge by."""
    mapper = agent.method.mapper
    if not isinstance(mapper, Anchored):
        return
    for m in messages:
        anchor = m.items.get(mapper.name)
        if anchor is None and isinstance(m.items.get("model"), Module):
            raise ConsilienceError(
                "a module to be routed to should come with the anchor that this agent's mapper reads, that of "
                f"`{mapper.name}`. Found {', '.join(m.items)} in {m.source!r} of {m.sender!r}."
            )
        if anchor is not None and mapper.rejects and "validation" not in anchor.tensors:
            raise ConsilienceError(
                "with `reject` above 0 every anchor should be made with it. Found one without validation scores, "
                f"of {m.source!r} of {m.sender!r}."
            )


def offer(agent: Agent, module: Module, name: str | None = None) -> Bank:
    """A bank of one module, such as `combine` makes, as a message of this agent: for `give` and `save_bank`.

    It has no anchor, so that agents with a mapper of anchors refuse it: it is for agents that are told the task.

    Args:
        agent: whose message it is; it is not changed.
        module: on the agent's backbone.
        name: of the source under which the module stands; None takes the module's task. What the agent has under it already is
            an older version.

    Raises ConsilienceError for what is no module, for a name that is empty or has a "|", or that of a source which the agent
    learned.

    >>> import consilience as cs
    >>> digits, model = cs.data.split_classes(cs.data.digits(), 5), cs.models.multi_head(cs.models.random_features(64, 64), 10)
    >>> agent = cs.run(cs.settings.skill([digits]), cs.methods.skill("oracle", head="ridge"), model).agent
    >>> both = cs.skill.combine(agent.state.experts, [("digits", "0"), ("digits", "9")], "ends")
    >>> bank = offer(agent, both)
    >>> give(agent, bank)
    >>> list(bank), [m.version for m in offer(agent, both).values()]
    ([('agent-0', 'ends')], [2])
    """
    if type(module) is not Module:
        raise ConsilienceError(
            f"what is offered should be a module, such as `combine` makes. Found a {type(module).__name__}."
        )
    source = module.meta.get("task") if name is None else name
    if not isinstance(source, str) or not source or "|" in source:
        raise ConsilienceError(f"a module should be offered under a name, without '|'. Found {source!r}.")
    if source in agent.state.visits:
        raise ConsilienceError(
            f"a module should be offered under a name of its own. Found {source!r}, which the agent learned."
        )
    held, (version, _) = (
        agent.state.bank.get((agent.name, source)),
        agent.state.received.get(pair(agent.name, source), (0, "")),
    )
    version = max(version, held.version if held is not None else 0) + 1
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
    """An agent that has learned nothing: in a schedule's frame, to be given a bank; or in the frame of a bank, which it is given.

    From a bank it needs no data: its classes and tasks are those of the modules. What it answers is what the agent answers whose
    bank it was.

    Args:
        schedule: as in `run`; or a bank of modules, such as `load_bank` gives.
        method, model, training: as in `run`.
        seed: draws the first parameters. With a bank it must be the one of the run that the bank is of, where the model draws its
            trunk (`models.backbone` and `models.random_features` draw none); so must the precision of `training`.
        name: of the agent.
        like: inputs [B, ...] such as it will be given, images or features; with a bank alone, which has none.

    Raises ConsilienceError for a bank without modules or without `like`, and as `give` does.

    >>> import consilience as cs
    >>> digits, model = cs.data.split_classes(cs.data.digits(), 5), cs.models.multi_head(cs.models.random_features(64, 64), 10)
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
        bank = _bank(schedule)
        framed = _framed(bank, like)
    elif like is not None:
        raise ConsilienceError(
            "`like` should be left out where a schedule is given, which has inputs. Found both."
        )
    else:
        framed = schedule
    chosen = model_for(framed, method, model)
    session = begin(framed, method, chosen, training, Serial(), RunOptions(seed=seed))
    agent = session.trials[0].agents[name]
    if bank:
        give(agent, bank)
    return agent


def _framed(bank: Bank, like: Tensor | None) -> Schedule:
    """A schedule in the frame of a bank's modules: their sources in the bank's order, with an example of zeros each."""
    from consilience import settings

    modules = {k: m for k, message in bank.items() if isinstance(m := message.items.get("model"), Module)}
    if not modules:
        raise ConsilienceError(
            f"a bank in whose frame an agent stands should have modules. Found none in {len(bank)} messages."
        )
    if not isinstance(like, Tensor) or like.ndim < 1:
        raise ConsilienceError(f"with a bank, `like` should be inputs [B, ...]. Found `like = {like!r:.60}`.")
    labels = tuple(dict.fromkeys(label for m in modules.values() for label in m.labels))
    frame = LabelFrame(labels)
    zeros = torch.zeros(1, *like.shape[1:], dtype=like.dtype)
    sources: list[Source] = []
    for (sender, source), m in modules.items():
        twice = any(s.name == source for s in sources)
        classes = tuple(frame.columns(m.labels)[list(m.classes)].tolist())
        nothing = Tensors(zeros[:0], torch.zeros(0, dtype=torch.long))
        train = Tensors(zeros, torch.tensor(classes[:1]))
        sources.append(
            Source(
                f"{source} of {sender}" if twice else source, train, nothing, nothing, labels, classes, m.task
            )
        )
    schedule = settings.skill([sources])
    if (
        schedule.frame.labels != labels
    ):  # it leaves out classes that none of these modules answers, and modules name them
        back = {c: labels.index(label) for c, label in enumerate(schedule.frame.labels)}
        tasks = {t: tuple(back[c] for c in columns) for t, columns in schedule.frame.tasks.items()}
        schedule = replace(schedule, sources=tuple(sources), judged=(), frame=replace(frame, tasks=tasks))
    return schedule


def familiarity(agent: Agent, x: Tensor) -> Tensor:
    """How known inputs x [B, ...] are to an agent [B], comparable between tasks: (s - median) / (median - lower quartile), s the
    score by the best task's anchor and the others those of that task's validation examples.

    0 is as one of its own, -1 as one that three quarters of them excel. `mappers.auroc` of known and unknown inputs says how well
    it tells them apart.

    Raises ConsilienceError for a mapper without anchors, or with `reject` = 0, whose anchors have no scores to compare with.

    >>> import consilience as cs
    >>> digits = cs.data.split_classes(cs.data.digits(), 2)
    >>> model = cs.models.multi_head(cs.models.random_features(64, 512), 10)
    >>> method = cs.methods.skill("nearest_mean", head="ridge", reject=0.05)
    >>> agent = cs.run(cs.settings.skill(digits[:1]), method, model).agent
    >>> known, unknown = (familiarity(agent, s.test.whole()[0]) for s in digits)
    >>> cs.mappers.auroc(known, unknown) > 0.7
    True
    """
    mapper = agent.method.mapper
    if not isinstance(mapper, Anchored):
        raise ConsilienceError(f"familiarity needs a mapper with anchors. Found {type(mapper).__name__}.")
    x = x.to(agent.device, agent.training.dtype if x.is_floating_point() else x.dtype)
    params, buffers = (
        {n: t.to(agent.device) for n, t in held.items()} for held in (agent.state.params, agent.state.buffers)
    )

    def features(other: Tensor | None = None) -> Tensor:
        return agent.model.features(params, buffers, x if other is None else other)

    with torch.no_grad():
        routing = Routing(x, features, list, [k for k, *_ in agent.choices()])
        return mapper.familiarity(routing, agent.memory(mapper))
