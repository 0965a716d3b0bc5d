"""The state of an agent: everything that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from consilience.core.message import Bank, Item, Message, Module, Private, decode, encode
from consilience.core.params import Params


@dataclass(frozen=True, eq=False)
class State:
    """An agent's parameters, what it heard, and what it keeps to itself.

    `base` is what its parameters were when it last absorbed: deltas are made against it. `bank` holds the newest
    message by (sender, source); whole weights are not banked: `absorbed` keeps their receipts (version, digest). `memory`
    holds private items by (correction, source); `visits` counts the learns of each source;
    `learned` says whether it learned since it last absorbed.
    """

    params: Params
    buffers: Params
    base: Params
    origin: str
    outer: Mapping[str, Tensor] = field(default_factory=dict)
    bank: Bank = field(default_factory=dict)
    received: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    memory: Mapping[str, Mapping[str, Item]] = field(default_factory=dict)
    visits: Mapping[str, int] = field(default_factory=dict)
    version: int = 0
    size: int = 0
    trained: bool = False
    forgotten: tuple[str, ...] = ()
    """Senders that were taken out of the bank, and are not heard again."""

    @property
    def experts(self) -> dict[tuple[str, str], Module]:
        """The modules of the bank, by (sender, source)."""
        return {k: m.items["model"] for k, m in self.bank.items() if isinstance(m.items.get("model"), Module)}  # type: ignore[misc]

    def change(self, **fields: Any) -> State:
        return replace(self, **fields)


def encode_state(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flat tensors and JSON facts of a state; `decode_state` undoes it."""
    items: dict[str, Item] = {
        name: Private(getattr(state, name)) for name in ("params", "buffers", "base", "outer")
    }
    for m in state.bank.values():
        items |= {f"bank|{m.sender}|{m.source}|{k}": v for k, v in m.items.items()}
    for c, kept in state.memory.items():
        items |= {f"memory|{c}|{s}": v for s, v in kept.items()}
    tensors, facts = encode(items)
    return tensors, {
        "items": facts,
        "bank": [m.facts() | {"names": list(m.items)} for m in state.bank.values()],
        "received": dict(state.received),
        "memory": {c: list(kept) for c, kept in state.memory.items()},
        "visits": dict(state.visits),
        "forgotten": list(state.forgotten),
        **{k: getattr(state, k) for k in ("origin", "version", "size", "trained")},
    }


def decode_state(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> State:
    """The state from what `encode_state` made."""
    items: dict[str, Any] = decode(tensors, facts["items"])
    bank: Bank = {}
    for f in facts["bank"]:
        own = {k: items[f"bank|{f['sender']}|{f['source']}|{k}"] for k in f["names"]}
        bank[(f["sender"], f["source"])] = Message(items=own, **{k: v for k, v in f.items() if k != "names"})
    return State(
        **{name: dict(items[name].tensors) for name in ("params", "buffers", "base", "outer")},
        bank=bank,
        memory={c: {s: items[f"memory|{c}|{s}"] for s in kept} for c, kept in facts["memory"].items()},
        received={k: (int(v), str(d)) for k, (v, d) in facts["received"].items()},
        visits=facts["visits"],
        origin=facts["origin"],
        version=facts["version"],
        size=facts["size"],
        trained=facts["trained"],
        forgotten=tuple(facts.get("forgotten", ())),
    )
