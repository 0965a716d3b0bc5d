"""Merge what the steps of several agents read into the arguments of one stacked step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from consilience.core.batch import Batch, first_alike
from consilience.core.message import Item
from consilience.core.model import Model
from consilience.core.source import Examples, Source


class Unbatchable(Exception):
    """Why jobs cannot be stacked; they run one after another instead."""


class Ragged:
    """Marks a value that differs between agents and cannot be stacked: a step that reads it is refused."""

    # A part of a value that no step reads may differ, so the refusal waits until it is read.
    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Unbatchable("something that a step reads differs between agents")

    __getattr__ = __getitem__ = __iter__ = __bool__ = __len__ = __call__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __eq__ = __lt__ = __gt__ = _refuse


@dataclass(frozen=True)
class Slot:
    """The position of a tensor among the arguments of a program."""

    index: int


@dataclass
class Slots:
    """The tensor arguments of a program: stacked on dimension 0 (`dims` 0), or common to all (None)."""

    tensors: list[Tensor] = field(default_factory=list)
    dims: list[int | None] = field(default_factory=list)

    def add(self, tensors: Sequence[Tensor]) -> Slot:
        """Add one argument for the tensors of all agents: one tensor if they are equal, else their stack."""
        first = tensors[0]
        if all(tensor is first or torch.equal(tensor, first) for tensor in tensors[1:]):
            return self.put(first, None)
        return self.put(torch.stack(list(tensors)), 0)

    def put(self, tensor: Tensor, dim: int | None) -> Slot:
        """Add a tensor as it is."""
        self.tensors.append(tensor)
        self.dims.append(dim)
        return Slot(len(self.tensors) - 1)


def merge(values: Sequence[Any], slots: Slots) -> Any:
    """Merge one value per agent into one value.

    Tensors of one shape become slots, numbers that differ are stacked, equal values stay, the rest is Ragged.

    >>> slots = Slots()
    >>> merge([{"a": torch.ones(2), "b": 1}, {"a": torch.zeros(2), "b": 1}], slots), slots.tensors[0].tolist()
    ({'a': Slot(index=0), 'b': 1}, [[1.0, 1.0], [0.0, 0.0]])
    """
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        return Ragged()

    if isinstance(first, Tensor):
        return slots.add(values) if all(stackable(value, first) for value in values) else Ragged()
    if isinstance(first, float) and any(value != first for value in values):
        # In double precision, as Python's numbers are: a step rounds them where they meet its tensors.
        return slots.put(torch.tensor(values, dtype=torch.float64), 0)

    # Data and models are too large to compare, so only the very same object counts as equal.
    if isinstance(first, Source | Examples | Model):
        return first if all(value is first for value in values) else Ragged()

    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            return Ragged()
        return {name: merge([value[name] for value in values], slots) for name in first}
    if isinstance(first, list | tuple):
        if any(len(value) != len(first) for value in values):
            return Ragged()
        merged = [merge(list(entries), slots) for entries in zip(*values, strict=True)]
        return like(first, merged)

    # The facts of an item, such as a round's number, change with every visit. Most steps read only tensors.
    if isinstance(first, Item):
        tensors = merge([value.tensors for value in values], slots)
        return rebuilt(first, {"tensors": tensors, "meta": Ragged()})
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [entry.name for entry in dataclasses.fields(first)]
        return rebuilt(
            first, {name: merge([getattr(value, name) for value in values], slots) for name in names}
        )
    return first if all(value is first or value == first for value in values) else Ragged()


def stackable(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape, type and device."""
    return tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.device == other.device


def rebuilt(value: Any, fields: Mapping[str, Any]) -> Any:
    """Copy a dataclass with other fields, without its checks."""
    # A slot in the place of a number would not pass the checks of `__post_init__`, which `replace` calls.
    other = copy.copy(value)
    for name, entry in fields.items():
        object.__setattr__(other, name, entry)
    return other


def fill(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Replace the slots of a merged value with tensors."""
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {name: fill(entry, tensors) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return like(value, [fill(entry, tensors) for entry in value])
    if has_fields(value) and not isinstance(value, Ragged):
        names = [entry.name for entry in dataclasses.fields(value)]
        return rebuilt(value, {name: fill(getattr(value, name), tensors) for name in names})
    return value


def fill_parts(parts: Sequence[Batch], tensors: Sequence[Any]) -> list[Batch]:
    """Replace the slots of the batches of a step; inputs that several of them share stay one object."""
    filled: list[Batch] = fill(list(parts), tensors)
    for i, first in enumerate(first_alike(parts)):
        filled[i] = rebuilt(filled[i], {"x": filled[first].x})
    return filled


def like(value: list[Any] | tuple[Any, ...], entries: list[Any]) -> Any:
    """Put other entries into a list, tuple or NamedTuple of the same type: verbs may read them by name."""
    if isinstance(value, list):
        return entries
    return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)


def shape_of(value: Any) -> object:
    """Describe a merged value without its tensors' numbers: values with one description share a program."""
    if isinstance(value, Ragged):
        return "ragged"
    if isinstance(value, dict):
        return tuple((name, shape_of(entry)) for name, entry in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(shape_of, value))
    if isinstance(value, Slot | float | int | str | bool | None):
        return repr(value)
    if has_fields(value):
        return (type(value), *[shape_of(getattr(value, entry.name)) for entry in dataclasses.fields(value)])
    return (type(value), id(value))


def has_fields(value: Any) -> bool:
    """Whether a value is a dataclass whose fields are merged one by one; sources and examples are not."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type | Source | Examples)
