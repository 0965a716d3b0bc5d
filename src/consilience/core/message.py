"""Messages: what one agent tells another. A closed family of items; only bytes pass between agents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import content_hash, pack, unpack
from consilience.core.source import Label

_NOTHING = torch.zeros(0)


@dataclass(frozen=True, eq=False)
class Item:
    """Named tensors with JSON-able facts about them."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix/`, without it."""
        cut = len(prefix) + 1
        return {k[cut:]: t for k, t in self.tensors.items() if k.startswith(prefix + "/")}


class Shared(Item):
    """An item that may leave its agent. The family is closed: Weights, Statistics, Module, Samples."""


class Weights(Shared):
    """Parameters and buffers of a model: `params/...` and `buffers/...`; the hearer makes deltas."""


class Statistics(Shared):
    """Tensors that add: those of two sources together are their sum (a missing one counts as zero)."""

    def __add__(self, other: Statistics) -> Statistics:
        tensors = dict(self.tensors)
        for k, t in other.tensors.items():
            tensors[k] = tensors[k] + t.to(tensors[k].device) if k in tensors else t
        return Statistics(tensors, {**self.meta, **other.meta})


class Module(Shared):
    """An expert: `entries/...` over a common base, `buffers/...`, and in `meta` its labels, classes, task, and the hash of its frozen backbone."""

    @property
    def labels(self) -> tuple[Label, ...]:
        return tuple((space, name) for space, name in self.meta["labels"])

    @property
    def classes(self) -> tuple[int, ...]:
        """Which of its output columns it was trained for."""
        return tuple(self.meta["classes"])

    @property
    def task(self) -> str | None:
        return self.meta["task"]  # type: ignore[no-any-return]


class Samples(Shared):
    """Examples that an agent agrees to share."""


class Private(Item):
    """What never leaves its agent: buffers, masks, histories. No message accepts it."""


KINDS: dict[str, type[Item]] = {k.__name__: k for k in (Weights, Statistics, Module, Samples, Private)}


def encode(items: Mapping[str, Item]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flat tensors and JSON facts of named items; `decode` undoes it."""
    tensors = {f"{i}/{k}": t for i, item in enumerate(items.values()) for k, t in item.tensors.items()}
    facts = {name: {"kind": type(item).__name__, "meta": dict(item.meta)} for name, item in items.items()}
    return tensors, facts


def decode(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Item]:
    """Named items from what `encode` made."""
    items: dict[str, Item] = {}
    for i, (name, fact) in enumerate(facts.items()):
        cut = len(str(i)) + 1
        own = {k[cut:]: t for k, t in tensors.items() if k.startswith(f"{i}/")}
        items[name] = KINDS[fact["kind"]](own, fact["meta"])
    return items


@dataclass(frozen=True, eq=False)
class Message:
    """What `sender` tells of one source: a version, the number of examples, the hash of the parameters it started from, and items.

    Items are keyed by the correction that made them, or "model". Raises TypeError for an item that is not Shared.
    """

    sender: str
    source: str
    version: int
    size: int
    origin: str
    base: str
    items: Mapping[str, Shared]
    trained: bool = True
    """Whether the sender learned since it last absorbed; else what it tells is common ground, to be adopted as it is."""
    digest: str = ""
    """Hash of the items, made by the sender."""

    def __post_init__(self) -> None:
        for name, item in self.items.items():
            if type(item) not in (Weights, Statistics, Module, Samples):
                raise TypeError(
                    f"a message carries Weights, Statistics, Module or Samples. Found {type(item).__name__} for {name!r}."
                )
        if not self.digest:
            tensors, facts = encode(self.items)
            object.__setattr__(
                self, "digest", content_hash(tensors) + content_hash({json.dumps(facts): _NOTHING})[:8]
            )

    @property
    def key(self) -> tuple[str, str]:
        return self.sender, self.source

    def facts(self) -> dict[str, Any]:
        """All but the items, as JSON."""
        return {
            k: getattr(self, k)
            for k in ("sender", "source", "version", "size", "origin", "base", "trained", "digest")
        }

    def to_bytes(self) -> bytes:
        """The message as safetensors bytes."""
        tensors, facts = encode(self.items)
        text = json.dumps({**self.facts(), "items": facts})
        return pack(tensors, {"message": f"{text_hash(text)} {text}"})  # one entry: several have no order

    @staticmethod
    def from_bytes(data: bytes, check: bool = True) -> Message:
        """The message from its bytes; ConsilienceError where they are cut short, not a message, or (`check`) of other facts or
        content than its sender hashed. Hashes say that it is whole, not who sent it."""
        tensors, meta = unpack(data)
        try:
            hashed, _, text = meta["message"].partition(" ")
            facts = json.loads(text)
            told = facts.pop("digest")
            items: Any = decode(tensors, facts.pop("items"))
            message = Message(items=items, digest="" if check else told, **facts)
        except (KeyError, ValueError, TypeError) as e:
            raise ConsilienceError(
                f"a message should carry its facts. Found safetensors without them, or other ones: {e}."
            ) from e
        if check and hashed != text_hash(text):
            raise ConsilienceError("a message should have the facts that its sender hashed. Found others.")
        if message.digest != told:
            raise ConsilienceError(
                f"a message should have the content that its sender hashed. Found another from {message.sender!r}."
            )
        return message


def text_hash(text: str) -> str:
    """The hash that stands before facts that are stored or sent, so that a spoilt one is found."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


Bank = dict[tuple[str, str], Message]
"""(sender, source) -> the newest message."""


def join(bank: Mapping[tuple[str, str], Message], messages: Iterable[Message]) -> Bank:
    """The bank with those messages: the newest version by (sender, source). Idempotent, commutative and associative.

    Raises ConsilienceError where an equal version has other content.
    """
    result = dict(bank)
    for m in messages:
        old = result.get(m.key)
        if old is not None and old.version == m.version and old.digest != m.digest:
            raise ConsilienceError(
                f"a version should have one content. Found another for {m.source!r} of {m.sender!r}, version {m.version}."
            )
        if old is None or m.version > old.version:
            result[m.key] = m
    return dict(sorted(result.items()))
