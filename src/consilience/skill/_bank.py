"""Banks in files: what agents told, whole or not at all, checked by content, and given to any agent on the same backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import consilience
from consilience.consolidators.bank import refuse_strangers
from consilience.core.correction import Routing
from consilience.core.errors import ConsilienceError
from consilience.core.message import Bank, Item, Message, Module, decode, encode, join
from consilience.core.params import save, unpack

if TYPE_CHECKING:
    from consilience.core.agent import Agent
    from consilience.core.method import Method
    from consilience.core.model import Model
    from consilience.core.schedule import Schedule
    from consilience.core.training import Training

FORMAT = 1
"""Of the file; a later one is refused."""


def _bank(agent_or_bank: Agent | Mapping[tuple[str, str], Message]) -> Bank:
    found = agent_or_bank if isinstance(agent_or_bank, Mapping) else getattr(getattr(agent_or_bank, "state", None), "bank", None)
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
    text = json.dumps({"format": FORMAT, "consilience": consilience.__version__, "messages": told, "items": facts})
    save(path, tensors, {"bank": f"{_text_hash(text)} {text}"})  # one entry: several have no order
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
        raise ConsilienceError(f"a bank should be a file of `save_bank`. Found safetensors without its facts in {path}.") from e
    if form > FORMAT:
        raise ConsilienceError(
            f"a bank should have a format up to {FORMAT}. Found {form} in {path}, by consilience {facts.get('consilience')}."
        )
    if told != _text_hash(text):
        raise ConsilienceError(f"a bank should be as it was written. Found other facts than were hashed in {path}.")
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
    schedule does not declare, or another content under a version that it has.
    """
    messages = list(_bank(bank).values())
    refuse_strangers(agent.model, agent.state.params, messages)
    for m in messages:
        module = m.items.get("model")
        if isinstance(module, Module) and module.labels != agent.frame.labels:
            agent.frame.columns(module.labels)
    agent.absorb(messages, by_size=False)


def newcomer(
    schedule: Schedule,
    method: Method,
    model: Model | None = None,
    training: Training | None = None,
    seed: int = 0,
    name: str = "newcomer",
) -> Agent:
    """An agent that has learned and heard nothing, in a schedule's frame: to be given a bank and to predict.

    Args:
        schedule, method, model, training, seed: as in `run`; the seed draws the first parameters, where they are drawn.
        name: of the agent.
    """
    from consilience.core import run

    session = run.begin(
        schedule, method, model, training, run.engine_of("serial"), repeats=1, seed=seed, out=None, resume=False, metric=None,
        checkpoint_seconds=60.0, clients=False, progress=None,
    )  # fmt: skip
    (walk,) = session.walks
    walk._begin()
    return walk._agent(name)


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
    from consilience.mappers.mixture import Anchored

    mapper = agent.method.mapper
    if not isinstance(mapper, Anchored):
        raise ConsilienceError(f"familiarity needs a mapper with anchors. Found {type(mapper).__name__}.")
    x = x.to(agent.device, agent.training.dtype if x.is_floating_point() else x.dtype)
    params, buffers = ({n: t.to(agent.device) for n, t in held.items()} for held in (agent.state.params, agent.state.buffers))

    def features(other: Tensor | None = None) -> Tensor:
        return agent.model.features(params, buffers, x if other is None else other)

    with torch.no_grad():
        routing = Routing(x, features, list, [k for k, *_ in agent.choices()])
        return mapper.familiarity(routing, agent.memory(mapper))


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
