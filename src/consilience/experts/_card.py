"""Cards: what a file of an expert says of itself, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from consilience.core.errors import ConsilienceError, reading
from consilience.core.names import checked_name
from consilience.core.source import Label
from consilience.version import __version__

KEY = "consilience.card"
"""Where the metadata of a safetensors file has the card."""
SUFFIX = ".card.json"
"""What is added to the name of a file for a card next to it."""
FORMAT = 1
MOST_BYTES = 1 << 20
"""The largest card that is read from a file next to an expert's."""


class Origin(NamedTuple):
    """One model that an expert was made from."""

    name: str
    content: str = ""
    """The hash of its entries."""
    data: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Card:
    """What an expert is, in words and numbers: enough to use its file without knowing its author.

    Raises ConsilienceError for facts that contradict each other.

    >>> card = Card("cats", "mlp(4, (8,), 2)", (("pets", "cat"), ("pets", "dog")), shape=(4,))
    >>> Card.of_json(card.to_json(), "here") == card, card.knows
    (True, (('pets', 'cat'), ('pets', 'dog')))
    """

    name: str
    model: str
    """The architecture: a call of `consilience.models`, "timm:NAME", "transformers:CLASS", "module:function"
    (code, imported only where it is trusted), or "file" for formats that have their own."""
    labels: tuple[Label, ...]
    """What each output means: (label space, class name)."""
    classes: tuple[int, ...] = ()
    """The outputs of the classes that it was trained on; (): all."""
    task: str | None = None
    shape: tuple[int, ...] | None = None
    """The shape of one sample; None for inputs of several parts, or ragged ones."""
    dtype: str = "float32"
    """The type of a sample's numbers."""
    mean: tuple[float, ...] = ()
    """What is subtracted from each channel before the model sees a sample; one number is for all; (): 0."""
    std: tuple[float, ...] = ()
    """What each channel is divided by then."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of an architecture that is no call of ours."""
    data: str = ""
    """The name of its training data."""
    licence: str = ""
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """Scores in [0, 1], by what they were measured on."""
    made_from: tuple[Origin, ...] = ()
    """The experts that it was merged or distilled from."""
    content: str = ""
    """The hash of its entries, which finds damage."""
    version: str = __version__
    """The version of this library that wrote it."""

    def __post_init__(self) -> None:
        checked_name(self.name, "expert")
        # Two outputs of one label would both be it.
        count = len(self.labels)
        if not count or len(set(self.labels)) < count:
            raise ConsilienceError(
                f"a card must have a label of its own for each output, got {count} in {self.name!r}."
            )
        # The class is frozen, so that cards can be shared.
        object.__setattr__(self, "classes", tuple(self.classes) or tuple(range(count)))
        outside = [column for column in self.classes if not 0 <= column < count]
        if outside or len(set(self.classes)) < len(self.classes):
            raise ConsilienceError(
                f"`classes` of {self.name!r} must be different outputs below {count}, got {self.classes}."
            )
        if bool(self.mean) != bool(self.std) or any(not 0 < value < float("inf") for value in self.std):
            raise ConsilienceError(
                f"`mean` and positive `std` of {self.name!r} must be given together, got {self.mean} and "
                f"{self.std}."
            )
        # A percentage would be read as a hundred times the score.
        wrong = {name: score for name, score in self.accuracy.items() if not 0 <= score <= 1}
        if wrong:
            raise ConsilienceError(f"`accuracy` of {self.name!r} must be in [0, 1], got {wrong}.")

    @property
    def knows(self) -> tuple[Label, ...]:
        """The labels of the classes that it was trained on."""
        return tuple(self.labels[column] for column in self.classes)

    def to_json(self) -> dict[str, Any]:
        """Return the card as plain values."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain["made_from"] = [origin._asdict() for origin in self.made_from]
        plain |= {"arguments": dict(self.arguments), "accuracy": dict(self.accuracy)}
        return {"format": FORMAT, **plain}

    @classmethod
    def of_json(cls, found: Any, where: str) -> Card:
        """Return the card of plain values; `where` names them in errors."""
        with reading(f"the card of {where} must be one of consilience's", "write it with experts.save"):
            if found.get("format") != FORMAT:
                raise ConsilienceError(
                    f"the card of {where} must have the format {FORMAT}, got {found.get('format')!r}; it was "
                    "written by another version."
                )
            known = {entry.name for entry in fields(cls)}
            # What is not read would be lost when the card is written again.
            unknown = sorted(found.keys() - known - {"format"})
            if unknown:
                raise ConsilienceError(f"the card of {where} has no field {unknown[0]!r}.")

            # JSON has lists where a card has tuples.
            given = {key: value for key, value in found.items() if key in known}
            given["labels"] = tuple((str(space), str(name)) for space, name in given["labels"])
            for key in ("classes", "shape"):
                if given.get(key) is not None:
                    given[key] = tuple(int(value) for value in given[key])
            for key in ("mean", "std"):
                given[key] = tuple(float(value) for value in given.get(key, ()))
            given["made_from"] = tuple(Origin(**origin) for origin in given.get("made_from", ()))
            for key in ("name", "model", "dtype", "data", "licence", "content", "version"):
                given[key] = str(given.get(key, ""))
            return cls(**{key: value for key, value in given.items() if value != "" or key == "name"})


def card_beside(path: Path) -> Card | None:
    """Return the card in the file next to an expert's, or None."""
    # The suffix of the file stays in the name: one model may be there in two formats.
    place = path.with_name(path.name + SUFFIX)
    if not place.is_file():
        return None
    if place.stat().st_size > MOST_BYTES:
        raise ConsilienceError(f"a card must have at most {MOST_BYTES} bytes, got more at {place}.")
    try:
        return Card.of_json(json.loads(place.read_bytes()), str(place))
    except json.JSONDecodeError as error:
        raise ConsilienceError(f"the card {place} must be JSON: {error}.") from error


def header_of(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, without its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ConsilienceError(f"{path} is no valid file of safetensors: {error}.") from error


def card_of(path: str | os.PathLike[str]) -> Card | None:
    """Return the card of an expert's file, in its metadata or in a file next to it; None without one."""
    place = Path(path)
    if place.suffix == ".safetensors" and place.is_file():
        text = header_of(place).get(KEY)
        if text is not None:
            with reading(f"the card of {place} must be JSON", "write it with experts.save"):
                return Card.of_json(json.loads(text), str(place))
    return card_beside(place)
