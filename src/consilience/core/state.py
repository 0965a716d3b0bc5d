"""The state of an agent: everything that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, reading
from consilience.core.message import LARGEST, Bank, Item, Message, Module, Private, decode, encode
from consilience.core.names import pair
from consilience.core.params import Params, content_hash, finite

_TENSORS = ("params", "buffers", "base", "outer")
_FACTS = ("origin", "version", "size", "trained")


@dataclass(frozen=True, eq=False)
class Frozen:
    """What never changes in a run: the frozen entries and derived buffers of the first parameters.

    All agents hold the same tensors. They are in no message and no checkpoint; `hash` stands for them there.

    >>> import torch
    >>> frozen = Frozen({"w": torch.ones(1)})
    >>> list(frozen.without({"w": torch.ones(1), "head": torch.ones(1)}))
    ['head']
    """

    params: Params = field(default_factory=dict)
    buffers: Params = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """The content hash; "" of nothing. Without derived buffers it is that of `Model.backbone`."""
        held = {**self.params, **self.buffers}
        return content_hash(held) if held else ""

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held: parameters, then buffers."""
        return [*self.params.values(), *self.buffers.values()]

    def __contains__(self, name: str) -> bool:
        return name in self.params or name in self.buffers

    def without(self, tensors: Mapping[str, Tensor]) -> Params:
        """Return the tensors that may change: those whose names are not held here."""
        return {name: tensor for name, tensor in tensors.items() if name not in self}


@dataclass(frozen=True, eq=False)
class State:
    """An agent's parameters, what it received, and what it keeps. Immutable: `change` makes a new one."""

    params: Params
    """All parameters, with the frozen ones."""
    buffers: Params
    """All buffers, with the derived ones."""
    base: Params
    """The parameters after the last exchange. Deltas are computed against them."""
    origin: str
    """The hash of the first parameters, which all agents of a run have in common."""
    outer: Mapping[str, Tensor] = field(default_factory=dict)
    """The state of the consolidator's outer optimiser."""
    bank: Bank = field(default_factory=dict)
    """The newest message by (sender, source), without `Weights`."""
    received: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Receipts: (version, digest) of the newest message, by `names.pair(sender, source)`."""
    memory: Mapping[str, Mapping[str, Item]] = field(default_factory=dict)
    """Items that the agent's own corrections keep: {correction: {source: item}}."""
    visits: Mapping[str, int] = field(default_factory=dict)
    """How often it trained on each source."""
    version: int = 0
    """Rises with every visit and every exchange."""
    size: int = 0
    """The number of training examples that the parameters stand for when they are sent."""
    trained: bool = False
    """Whether it trained since the last exchange."""
    forgotten: tuple[str, ...] = ()
    """Senders that were removed from the bank. Their messages are no longer accepted."""
    undone: tuple[str, ...] = ()
    """Single messages that were removed, by `undone_key`. Their content is not accepted again."""
    unsent: Mapping[str, Mapping[str, Item]] = field(default_factory=dict)
    """Of corrections that need delivery: their items in `memory` before visits that nobody received yet."""
    frozen: Frozen = field(default_factory=Frozen)
    """What all agents hold together: the same tensors as in `params`, `buffers` and `base`."""

    @property
    def experts(self) -> dict[tuple[str, str], Module]:
        """The modules of the bank, by (sender, source)."""
        found = {}
        for key, message in self.bank.items():
            item = message.items.get("model")
            if isinstance(item, Module):
                found[key] = item
        return found

    def change(self, **fields: Any) -> State:
        """Return a state with other values in these fields."""
        return replace(self, **fields)


def encode_state(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flatten a state into tensors and facts for JSON; `decode_state` reverses it.

    Of what is frozen only the hash is kept. An entry of the base that is the present one is kept once.
    """
    params, buffers, base = map(state.frozen.without, (state.params, state.buffers, state.base))
    # By value: whether they are one object depends on where the state came from, and its bits must not.
    present = sorted(name for name, tensor in base.items() if _equal(params.get(name), tensor))
    base = {name: tensor for name, tensor in base.items() if name not in present}

    # All tensors become items of one dictionary, so that `encode` names each tensor once.
    parts = {"params": params, "buffers": buffers, "base": base, "outer": state.outer}
    items: dict[str, Item] = {name: Private(tensors) for name, tensors in parts.items()}
    for message in state.bank.values():
        items |= {_bank_key(*message.key, name): item for name, item in message.items.items()}
    for correction, kept in state.memory.items():
        items |= {_memory_key(correction, source): item for source, item in kept.items()}
    for correction, kept in state.unsent.items():
        items |= {_unsent_key(correction, source): item for source, item in kept.items()}

    tensors, facts = encode(items)
    return tensors, {
        "items": facts,
        "frozen": state.frozen.hash,
        # The base of an agent that was released is empty, also of frozen entries.
        "present": present if state.base else None,
        "bank": [
            message.facts() | {"names": list(message.items), "content": content_of(message)}
            for message in state.bank.values()
        ],
        "received": dict(state.received),
        "memory": {correction: list(kept) for correction, kept in state.memory.items()},
        "unsent": {correction: list(kept) for correction, kept in state.unsent.items()},
        "visits": dict(state.visits),
        "forgotten": list(state.forgotten),
        "undone": list(state.undone),
        **{name: getattr(state, name) for name in _FACTS},
    }


def _equal(tensor: Tensor | None, other: Tensor) -> bool:
    """Whether a tensor has the type, shape and bits of another."""
    if tensor is other or tensor is None:
        return tensor is other
    alike = tensor.dtype == other.dtype and tensor.device == other.device
    return alike and torch.equal(tensor, other)


def decode_state(
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    frozen: Frozen | None = None,
    like: State | None = None,
) -> State:
    """Return the state that `encode_state` flattened, over what is frozen.

    Raises ConsilienceError where the state was kept over other frozen entries, or cannot be read; with
    `like`, also where it is not one of that state's model, or its messages are not as they were received.
    """
    with reading("a state must be as it was kept", "start again, or from another checkpoint"):
        state = _decoded(tensors, facts, frozen or Frozen())
        if like is not None:
            _check_like(state, like)
            for message, entry in zip(state.bank.values(), facts["bank"], strict=True):
                if content_of(message) != entry["content"]:
                    raise ConsilienceError(
                        f"a message must be as it was received, got another {message.whose}."
                    )
        return state


def _check_like(state: State, like: State) -> None:
    """Refuse a state of another run than `like`, one that is damaged, and one that is not finite."""
    if state.origin != like.origin:
        raise ConsilienceError(f"a state must be of the run {like.origin[:8]}, got {state.origin[:8]!r}.")
    for kind in ("params", "buffers", "base"):
        held, known = getattr(state, kind), getattr(like, kind)
        # An agent that was released has what it does not send.
        missing = known.keys() - held.keys() if state.base else set()
        other = [
            name
            for name in known.keys() & held.keys()
            if held[name].shape != known[name].shape or held[name].dtype != known[name].dtype
        ]
        if missing or other:
            name = min([*missing, *other])
            raise ConsilienceError(
                f"a state must have the entries of its model, got none or another {name!r} in its {kind}; "
                "start again, or from another checkpoint."
            )
    finite(state.params, "a state that was kept")
    finite(state.base, "a state that was kept")


def content_of(message: Message) -> str:
    """Return the hash of what a bank keeps of a message; its digest is that of all that was received."""
    return replace(message, digest="").digest


def _decoded(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], frozen: Frozen) -> State:
    counts = [facts["version"], facts["size"], *facts["visits"].values()]
    whole = all(type(count) is int and 0 <= count <= LARGEST for count in counts)
    if not whole or type(facts["trained"]) is not bool or not isinstance(facts["origin"], str):
        raise ConsilienceError(
            "a state must have whole numbers as version, size and visits, got others; start again, or from "
            "another checkpoint."
        )
    if facts["frozen"] != frozen.hash:
        raise ConsilienceError(
            f"a state must be read with the frozen entries that it was kept with ({facts['frozen'][:8]}), "
            f"got {frozen.hash[:8] or 'none'}; use the same model and base."
        )
    items: dict[str, Any] = decode(tensors, facts["items"])
    bank: Bank = {}
    for entry in facts["bank"]:
        key = (entry["sender"], entry["source"])
        content = {name: items[_bank_key(*key, name)] for name in entry["names"]}
        bank[key] = Message(
            items=content, **{name: fact for name, fact in entry.items() if name not in ("names", "content")}
        )

    memory = {
        correction: {source: items[_memory_key(correction, source)] for source in kept}
        for correction, kept in facts["memory"].items()
    }
    unsent = {
        correction: {source: items[_unsent_key(correction, source)] for source in kept}
        for correction, kept in facts.get("unsent", {}).items()
    }
    plain: dict[str, Any] = {name: dict(items[name].tensors) for name in _TENSORS}
    if facts["present"] is not None:
        plain["base"] |= frozen.params | {name: plain["params"][name] for name in facts["present"]}
    plain["params"] |= frozen.params
    plain["buffers"] |= frozen.buffers
    plain |= {name: facts[name] for name in _FACTS}
    return State(
        **plain,
        frozen=frozen,
        bank=bank,
        memory=memory,
        # JSON made lists of the tuples.
        received={key: (int(version), str(digest)) for key, (version, digest) in facts["received"].items()},
        visits=facts["visits"],
        forgotten=tuple(facts.get("forgotten", ())),
        undone=tuple(facts.get("undone", ())),
        unsent=unsent,
    )


def undone_key(sender: str, source: str, digest: str) -> str:
    """Return what `State.undone` holds of a message: whose it is, and the hash of its content."""
    return f"{pair(sender, source)}|{digest}"


# Escaped pairs: names of users may contain bars, and two items must never share a key.
def _bank_key(sender: str, source: str, item: str) -> str:
    return f"bank|{pair(sender, source)}|{item}"


def _memory_key(correction: str, source: str) -> str:
    return f"memory|{pair(correction, source)}"


def _unsent_key(correction: str, source: str) -> str:
    return f"unsent|{pair(correction, source)}"
