"""Messages: what one agent sends to another. A closed family of items; only bytes pass between agents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of, reading
from consilience.core.names import WHOLE, checked_name
from consilience.core.params import Params, content_hash, fits_float32, pack, unpack
from consilience.core.source import Label

_NOTHING = torch.zeros(0)

LARGEST = 10**300
"""The largest version and size: in gossip, sizes double every round, and weights are floats."""


@dataclass(frozen=True, eq=False)
class Item:
    """Named tensors with facts about them that JSON can hold."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix/`, by the rest of their names."""
        cut = len(prefix) + 1
        return {name[cut:]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix + "/")}


class Shared(Item):
    """An item that may leave its agent. The family is closed: Weights, Statistics, Module, Samples."""


class Weights(Shared):
    """Parameters and buffers of a model: `params/...` and `buffers/...`. The receiver computes deltas."""


class Statistics(Shared):
    """Tensors that add: the statistics of two sources together are their sum. A missing one counts as 0."""

    def __add__(self, other: Statistics) -> Statistics:
        tensors = dict(self.tensors)
        for name, tensor in other.tensors.items():
            tensors[name] = tensors[name] + tensor.to(tensors[name].device) if name in tensors else tensor
        return Statistics(tensors, {**self.meta, **other.meta})


class Module(Shared):
    """An expert: `entries/...` over a common base, and `buffers/...`.

    `meta` holds its labels, classes and task, and the hash of the frozen backbone that it needs.
    """

    @property
    def labels(self) -> tuple[Label, ...]:
        """The meaning of its output columns."""
        return tuple((space, name) for space, name in self.meta["labels"])

    @property
    def classes(self) -> tuple[int, ...]:
        """The output columns that it was trained for."""
        return tuple(self.meta["classes"])

    @property
    def task(self) -> str | None:
        """The task that the model is given to run it."""
        return self.meta["task"]  # type: ignore[no-any-return]


class Samples(Shared):
    """Examples that an agent agrees to share."""


class Private(Item):
    """What never leaves its agent: buffers, masks, histories. No message accepts it."""


KINDS: dict[str, type[Item]] = {
    kind.__name__: kind for kind in (Weights, Statistics, Module, Samples, Private)
}


def encode(items: Mapping[str, Item]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flatten named items into tensors and facts for JSON; `decode` reverses it."""
    # Tensors are named by the number of their item, because a name of an item may contain a slash.
    tensors = {
        f"{number}/{name}": tensor
        for number, item in enumerate(items.values())
        for name, tensor in item.tensors.items()
    }
    facts = {name: {"kind": type(item).__name__, "meta": dict(item.meta)} for name, item in items.items()}
    return tensors, facts


def decode(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Item]:
    """Return the named items that `encode` flattened.

    Raises ConsilienceError for facts of another form, and for tensors that are in no item.
    """
    if not isinstance(facts, Mapping):
        raise ConsilienceError(f"items must be facts by name, got {kind_of(facts)}.")
    flat = Item(tensors)
    items: dict[str, Item] = {}
    for number, (name, fact) in enumerate(facts.items()):
        kind = fact.get("kind") if isinstance(fact, Mapping) else None
        if not isinstance(kind, str) or kind not in KINDS or not isinstance(fact.get("meta"), Mapping):
            raise ConsilienceError(
                f"an item must have a kind ({', '.join(KINDS)}) and a meta, got {kind_of(fact)} for {name!r}."
            )
        items[name] = KINDS[kind](flat.group(str(number)), fact["meta"])

    # A tensor that no item has is in no hash either.
    left = len(tensors) - sum(len(item.tensors) for item in items.values())
    if left:
        raise ConsilienceError(f"tensors must belong to an item, got {left} that belong to none.")
    return items


@dataclass(frozen=True, eq=False)
class Message:
    """What `sender` sends about one source, or about itself.

    Raises TypeError for an item that is not Shared, and ConsilienceError for facts that no agent sends.
    """

    sender: str
    source: str
    """The name of the source, or `names.WHOLE` for the sender's own parameters."""
    version: int
    """Rises with each change of the content; a receiver keeps the newest."""
    size: int
    """The number of training examples that it stands for."""
    origin: str
    """The hash of the first parameters, which all agents of a run have in common."""
    base: str
    """The hash of the parameters that the sender started from: those after its last exchange."""
    items: Mapping[str, Shared]
    """The content, by the name of the correction that made it, or "model"."""
    trained: bool = True
    """Whether the sender trained since it last received. If not, its parameters are adopted as they are."""
    digest: str = ""
    """The hash of the items, computed by the sender."""

    def __post_init__(self) -> None:
        self._check_facts()
        for name, item in self.items.items():
            # The exact type: a subclass might carry more than the family allows.
            if type(item) not in (Weights, Statistics, Module, Samples):
                raise TypeError(
                    "a message carries Weights, Statistics, Module or Samples, "
                    f"got {type(item).__name__} for {name!r}."
                )
        # A digest that is given is the sender's; `from_bytes` compares it.
        if not self.digest:
            tensors, facts = encode(self.items)
            digest = content_hash(tensors) + content_hash({json.dumps(facts): _NOTHING})[:8]
            object.__setattr__(self, "digest", digest)

    def _check_facts(self) -> None:
        """Refuse facts of other types, and names that are keys of ours."""
        for name in ("sender", "source", "origin", "base", "digest"):
            if not isinstance(getattr(self, name), str):
                raise ConsilienceError(f"`{name}` must be a text, got {kind_of(getattr(self, name))}.")
        for name in ("version", "size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
                raise ConsilienceError(
                    f"`{name}` must be a whole number from 0 to 1e300, got {kind_of(value)}."
                )
        if not isinstance(self.trained, bool):
            raise ConsilienceError(f"`trained` must be true or false, got {kind_of(self.trained)}.")
        # Sizes weigh averages, and nobody trains on nothing.
        if self.trained and not self.size:
            raise ConsilienceError(
                f"`size` must be at least 1 where a sender trained, got 0 of {self.whose}."
            )

        # What an agent keeps under a key of ours, such as a running sum, is never sent.
        checked_name(self.sender, "sender")
        if self.source != WHOLE:
            checked_name(self.source, "source")

    @property
    def key(self) -> tuple[str, str]:
        """(sender, source)."""
        return self.sender, self.source

    @property
    def whose(self) -> str:
        """What it is about and who sent it, for errors."""
        about = f"{self.source!r:.80}" if self.source != WHOLE else "the model"
        return f"{about} of {self.sender!r:.80}"

    @cached_property
    def kept_bytes(self) -> int:
        """How much memory it takes in a bank, which keeps no weights, in bytes."""
        kept = [item for item in self.items.values() if not isinstance(item, Weights)]
        text = json.dumps([self.facts(), *(dict(item.meta) for item in kept)]) if kept else ""
        sizes = [len(name) + tensor.nbytes for item in kept for name, tensor in item.tensors.items()]
        return len(text) + sum(sizes)

    def facts(self) -> dict[str, Any]:
        """Return all fields but the items, for JSON."""
        return {
            name: getattr(self, name)
            for name in ("sender", "source", "version", "size", "origin", "base", "trained", "digest")
        }

    def to_bytes(self) -> bytes:
        """Return the message as safetensors bytes."""
        tensors, facts = encode(self.items)
        text = json.dumps({**self.facts(), "items": facts})
        # One entry of metadata, because safetensors does not keep the order of several.
        return pack(tensors, {"message": f"{text_hash(text)} {text}"})

    @staticmethod
    def from_bytes(data: bytes, check: bool = True) -> Message:
        """Read a message from its bytes.

        Raises ConsilienceError where the bytes are cut short or are not a message, and with `check` where
        facts or content differ from what the sender hashed. The hashes find damage; they do not prove who the
        sender is.
        """
        tensors, meta = unpack(data)
        with reading("a message must carry its facts", "send it again"):
            hashed, _, text = meta["message"].partition(" ")
            facts = json.loads(text)
            digest = facts.pop("digest")
            items: Any = decode(tensors, facts.pop("items"))
            message = Message(items=items, digest="" if check else digest, **facts)

        # Facts first: with wrong facts the content may have other names, and a misleading hash.
        if check and hashed != text_hash(text):
            raise ConsilienceError(
                "a message must have the facts that its sender hashed, got others; send it again."
            )
        if message.digest != digest:
            raise ConsilienceError(
                "a message must have the content that its sender hashed, "
                f"got another from {message.sender!r}; send it again."
            )
        return message


def text_hash(text: str) -> str:
    """Return the hash that is stored before facts, so that damage is found."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_numbers(item: Item, buffers: Params, whose: str) -> None:
    """Refuse NaN, infinity and numbers that no float32 holds, but in buffers that this agent has too.

    Numbers of 8 bits are refused too: they can neither be added nor joined with others.
    """
    for name, tensor in item.tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise ConsilienceError(
                f"parameters and statistics must have numbers of 16 bits or more, got {tensor.dtype} for "
                f"{name!r} of {whose}."
            )
        if fits_float32(tensor):
            continue
        # Some models keep constants such as a mask of -inf.
        own = buffers.get(name.removeprefix("buffers/"))
        if own is None or not torch.equal(own.cpu(), tensor.cpu()):
            entry = name.removeprefix("params/").removeprefix("buffers/")
            raise ConsilienceError(
                f"parameters and statistics must be finite, got NaN or infinity in {entry!r} of {whose}, or "
                "numbers above 3.4e38."
            )


Bank = dict[tuple[str, str], Message]
"""(sender, source) -> the newest message."""


def join(bank: Mapping[tuple[str, str], Message], messages: Iterable[Message]) -> Bank:
    """Return the bank with those messages: the newest version by (sender, source).

    Idempotent, commutative and associative. Raises ConsilienceError where an equal version has other content.
    """
    result = dict(bank)
    for message in messages:
        old = result.get(message.key)
        if old is not None and old.version == message.version and old.digest != message.digest:
            raise ConsilienceError(
                f"a version must have one content, got another for {message.source!r} of {message.sender!r}, "
                f"version {message.version}; give every sender a name of its own."
            )
        if old is None or message.version > old.version:
            result[message.key] = message
    # Sorted, so that sums over a bank do not depend on the order of arrival.
    return dict(sorted(result.items()))
