"""Inputs: one tensor, or a tree of named tensors with one first dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from consilience.core.errors import ConsilienceError, kind_of


@dataclass(frozen=True, eq=False)
class Tree:
    """Samples of several parts, such as `input_ids` and `attention_mask`, each [B, ...].

    It answers like a tensor what the loop asks of inputs. Parts whose names are numbers came as a tuple. A
    ragged part was padded along its second dimension to the longest sample; `trim` cuts it to what a batch
    needs.

    >>> x = Tree({"ids": torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]])}, {"ids": 0}, torch.tensor([2, 1]))
    >>> x.trim().parts["ids"].tolist(), x[1:].trim().parts["ids"].tolist()
    ([[5, 6], [7, 0]], [[7]])
    """

    parts: Mapping[str, Tensor]
    ragged: Mapping[str, float] = field(default_factory=dict)
    """The parts that are padded, and with which number."""
    lengths: Tensor | None = None
    """How many places of the ragged parts each sample has [B]; None without ragged parts."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Tree:
        """Return the tree with a function applied to every part, and to the lengths."""
        parts = {name: function(part) for name, part in self.parts.items()}
        return Tree(parts, self.ragged, None if self.lengths is None else function(self.lengths))

    # What a tensor answers too.

    def __len__(self) -> int:
        return len(self._first)

    @property
    def _first(self) -> Tensor:
        return next(iter(self.parts.values()))

    @property
    def shape(self) -> tuple[Any, ...]:
        """The number of samples, and the name and shape of each part."""
        return (len(self), *((name, *part.shape[1:]) for name, part in self.parts.items()))

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first part with fractions, else of the first part."""
        floating = (part.dtype for part in self.parts.values() if part.is_floating_point())
        return next(floating, self._first.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def is_floating_point(self) -> bool:
        """Whether some part has fractions."""
        return any(part.is_floating_point() for part in self.parts.values())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tree:
        """Return the tree on a device, its fractions in `dtype`."""
        return self.map(lambda part: part.to(device, dtype if part.is_floating_point() else None))

    def cpu(self) -> Tree:
        """Return the tree in main memory."""
        return self.map(Tensor.cpu)

    def clone(self) -> Tree:
        """Return a copy."""
        return self.map(Tensor.clone)

    def __getitem__(self, index: Any) -> Tree:
        return self.map(lambda part: part[index])

    def index_select(self, dim: int, index: Tensor) -> Tree:
        """Return the samples at these indices; `dim` is 0."""
        return self.map(lambda part: part.index_select(dim, index))

    def split(self, size: int | list[int]) -> list[Tree]:
        """Return the tree in pieces of these numbers of samples."""
        pieces = {name: part.split(size) for name, part in self.parts.items()}
        lengths = (
            [None] * len(next(iter(pieces.values()))) if self.lengths is None else self.lengths.split(size)
        )
        return [
            Tree(dict(zip(pieces, parts, strict=True)), self.ragged, own)
            for *parts, own in zip(*pieces.values(), lengths, strict=True)
        ]

    # What only trees have.

    def trim(self) -> Tree:
        """Cut ragged parts to the longest of these samples."""
        if self.lengths is None:
            return self
        longest = max(1, int(self.lengths.max()))
        # At least one place is left: most modules fail on none.
        parts = {name: p[:, :longest] if name in self.ragged else p for name, p in self.parts.items()}
        return replace(self, parts=parts)

    def padded(self, length: int) -> Tree:
        """Return the tree with its ragged parts padded to so many places."""
        parts = {
            name: pad(part, length, self.ragged[name]) if name in self.ragged else part
            for name, part in self.parts.items()
        }
        return replace(self, parts=parts)

    @property
    def places(self) -> int | None:
        """How many places the ragged parts have, with padding; None without ragged parts."""
        return next((self.parts[name].shape[1] for name in self.ragged), None)

    def there(self) -> Tensor | None:
        """Return which places of the ragged parts are no padding [B, T]; None without ragged parts."""
        if self.lengths is None or self.places is None:
            return None
        return torch.arange(self.places, device=self.device) < self.lengths[:, None]

    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return what a module is called with: parts of a tuple by place, the others by name."""
        by_place = tuple(part for name, part in self.parts.items() if name.isdigit())
        return by_place, {name: part for name, part in self.parts.items() if not name.isdigit()}


def _taken_apart(x: Tree) -> tuple[list[Tensor], tuple[tuple[str, ...], tuple[tuple[str, float], ...]]]:
    lengths = [] if x.lengths is None else [x.lengths]
    return [*x.parts.values(), *lengths], (tuple(x.parts), tuple(x.ragged.items()))


def _put_together(
    values: Iterable[Any], facts: tuple[tuple[str, ...], tuple[tuple[str, float], ...]]
) -> Tree:
    (names, ragged), tensors = facts, list(values)
    # The lengths come last, where there are any.
    lengths = tensors[len(names)] if len(tensors) > len(names) else None
    return Tree(dict(zip(names, tensors, strict=False)), dict(ragged), lengths)


# Programs of engines take trees apart, and put them together again.
register_pytree_node(Tree, _taken_apart, _put_together, serialized_type_name="consilience.core.tree.Tree")

Input: TypeAlias = Tensor | Tree
"""The inputs of a batch [B, ...]."""

Numbers = TypeVar("Numbers", bound=Tensor | Tree)


def cast_to(x: Numbers, device: torch.device | str, dtype: torch.dtype) -> Numbers:
    """Return inputs, or any tensor, on a device, fractions in `dtype`.

    Whole numbers, such as tokens, keep their type.

    >>> [cast_to(x, "cpu", torch.float64).dtype for x in (torch.zeros(1), torch.zeros(1, dtype=torch.int32))]
    [torch.float64, torch.int32]
    """
    return cast(Numbers, x.to(device, dtype if x.is_floating_point() else None))


def tensors_of(x: Input) -> Mapping[str, Tensor]:
    """Return the tensors of inputs by the name of their part; "" for inputs that are one tensor."""
    return {"": x} if isinstance(x, Tensor) else x.parts


def one_tensor(x: Input, whose: str) -> Tensor:
    """Return inputs that must be one tensor. Raises ConsilienceError for a tree, naming `whose` they are."""
    if isinstance(x, Tensor):
        return x
    parts = ", ".join(x.parts)
    raise ConsilienceError(f"{whose} needs inputs that are one tensor, got the parts {parts}.")


def pad(values: Tensor, length: int, fill: float) -> Tensor:
    """Pad a tensor [B, T, ...] along its second dimension to [B, length, ...].

    >>> pad(torch.ones(1, 2), 3, 0).tolist()
    [[1.0, 1.0, 0.0]]
    """
    missing = length - values.shape[1]
    if missing <= 0:
        return values
    return torch.cat([values, values.new_full((len(values), missing, *values.shape[2:]), fill)], 1)


def pad_all(rows: Sequence[Tensor]) -> Tensor:
    """Return sequences [T_i, ...] as one tensor [B, T, ...], padded with 0, in a type that holds them all.

    >>> pad_all([torch.tensor([1, 2]), torch.tensor([0.5])]).tolist()
    [[1.0, 2.0], [0.5, 0.0]]
    """
    # The library takes the type of the first sequence, and would cut off the fractions of others.
    dtype = reduce(torch.promote_types, {row.dtype for row in rows})
    return torch.nn.utils.rnn.pad_sequence([row.to(dtype) for row in rows], batch_first=True)


def concat(inputs: Sequence[Input]) -> Input:
    """Return inputs of one kind one after another; ragged parts are padded to the longest.

    Raises ConsilienceError where inputs have other parts, or parts of other shapes.

    >>> concat([torch.zeros(1, 2), torch.ones(2, 2)]).shape
    torch.Size([3, 2])
    """
    first = inputs[0]
    kinds = dict.fromkeys([signature(x) for x in inputs])
    if len(kinds) > 1:
        one, other, *_ = kinds
        raise ConsilienceError(f"inputs to join must be alike, got {one} and {other}.")
    if isinstance(first, Tensor):
        return torch.cat([x for x in inputs if isinstance(x, Tensor)])

    # Buffers and batches of other sources may have been padded to other lengths.
    trees = [x for x in inputs if isinstance(x, Tree)]
    longest = max(x.places or 0 for x in trees)
    trees = [x.padded(longest) for x in trees]
    lengths = (
        None if first.lengths is None else torch.cat([x.lengths for x in trees if x.lengths is not None])
    )
    parts = {name: torch.cat([x.parts[name] for x in trees]) for name in first.parts}
    return Tree(parts, first.ragged, lengths)


def signature(x: Input) -> tuple[Any, ...]:
    """Return what inputs that can be joined have in common: the shapes of samples, by part.

    The padded length of a ragged part is "*".

    >>> signature(torch.zeros(5, 3)), signature(Tree({"ids": torch.zeros(5, 3)}, {"ids": 0}, torch.ones(5)))
    ((3,), (('ids', '*'),))
    """
    if isinstance(x, Tensor):
        return tuple(x.shape[1:])
    return tuple(
        (name, *(("*", *part.shape[2:]) if name in x.ragged else part.shape[1:]))
        for name, part in x.parts.items()
    )


def types(x: Input) -> tuple[torch.dtype, ...]:
    """Return the types of all parts."""
    return tuple(part.dtype for part in tensors_of(x).values())


# Trees among the tensors of an item: their parts are tensors of their own, whose names begin alike.


def named(name: str, x: Input) -> dict[str, Tensor]:
    """Return inputs as named tensors [B, ...], all of which can be indexed; `unnamed` reverses it.

    >>> list(named("x", Tree({"ids": torch.zeros(1, 2)}, {"ids": 0}, torch.ones(1))))
    ['x/0=0/ids', 'x/=']
    """
    if isinstance(x, Tensor):
        return {name: x}
    found = {}
    for number, (part, tensor) in enumerate(x.parts.items()):
        # The place is in the name, because files sort tensors, and the fill, because every tensor of an
        # item has one row per sample.
        fill = f"={x.ragged[part]:g}" if part in x.ragged else ""
        found[f"{name}/{number}{fill}/{part}"] = tensor
    return found if x.lengths is None else {**found, f"{name}/=": x.lengths}


def unnamed(name: str, tensors: Mapping[str, Tensor]) -> Input:
    """Return the inputs that `named` made tensors of, whatever the order of the tensors.

    >>> x = Tree({"b": torch.zeros(1), "a": torch.ones(1)})
    >>> list(unnamed("x", dict(reversed(named("x", x).items()))).parts)
    ['b', 'a']
    """
    if name in tensors:
        return tensors[name]
    found: dict[int, tuple[str, Tensor]] = {}
    ragged: dict[str, float] = {}
    lengths = tensors.get(f"{name}/=")
    for key, tensor in tensors.items():
        if not key.startswith(f"{name}/") or key == f"{name}/=":
            continue
        place, _, part = key.removeprefix(f"{name}/").partition("/")
        number, marked, fill = place.partition("=")
        if marked:
            ragged[part] = float(fill)
        found[int(number)] = (part, tensor)
    return Tree(dict(found[number] for number in sorted(found)), ragged, lengths)


# From what users have.


def as_input(value: Any, what: str = "`x`") -> Input:
    """Make inputs from an array, a tensor, sequences of unequal length, a mapping or a tuple of these.

    Sequences of unequal length are padded with 0. `what` names the value in errors.

    Raises ConsilienceError for parts without values, of unequal numbers of samples, and for text.

    >>> as_input({"ids": [[1, 2], [3, 4]], "mask": [[1, 1], [1, 0]]}).shape
    (2, ('ids', 2), ('mask', 2))
    >>> as_input([[1, 2, 3], [4]]).trim().parts["0"].tolist()
    [[1, 2, 3], [4, 0, 0]]
    """
    if isinstance(value, Tree):
        return value
    # A named tuple names its parts; a plain one is given to the module by place.
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, tuple):
        value = {str(i): part for i, part in enumerate(value)}
    if not isinstance(value, Mapping):
        ragged = _ragged(value)
        if ragged is None:
            return as_tensor(value, what)
        return Tree({"0": _stacked(ragged, what)}, {"0": 0.0}, _lengths(ragged))

    parts: dict[str, Tensor] = {}
    padded: dict[str, Tensor] = {}
    # In one order, so that the dictionaries of two sources are alike whatever theirs was.
    for name, part in sorted(value.items(), key=lambda item: _place(str(item[0]))):
        if isinstance(part, Mapping):
            raise ConsilienceError(
                f"parts of {what} must be tensors, got a mapping for {name!r}; name its parts."
            )
        ragged = _ragged(part)
        if ragged is not None:
            padded[str(name)] = _lengths(ragged)
        parts[str(name)] = (
            as_tensor(part, part_of(what, name)) if ragged is None else _stacked(ragged, part_of(what, name))
        )
    return checked(Tree(parts, dict.fromkeys(padded, 0.0), next(iter(padded.values()), None)), padded, what)


def checked(x: Tree, lengths: Mapping[str, Tensor], what: str) -> Tree:
    """Return a tree whose parts fit together. Raises ConsilienceError for one whose parts do not."""
    if not x.parts:
        raise ConsilienceError(f"{what} must have parts, got none.")
    counts = {name: len(part) if part.dim() else 0 for name, part in x.parts.items()}
    if len(set(counts.values())) > 1:
        raise ConsilienceError(f"all parts of {what} must have as many samples, got {counts}.")
    for name, own in lengths.items():
        if x.lengths is not None and not torch.equal(own, x.lengths):
            at = int((own != x.lengths).nonzero()[0])
            raise ConsilienceError(
                f"sequences of one sample must be equally long in all parts of {what}, "
                f"got {int(own[at])} places in {name!r} of sample {at}, and {int(x.lengths[at])} in another."
            )
    return x


def part_of(what: str, name: object) -> str:
    """Return what a part of inputs is called in errors.

    >>> part_of("`x`", "ids")
    "`x['ids']`"
    """
    return f"`{what.strip('`')}[{str(name)!r}]`"


def as_tensor(value: Any, what: str) -> Tensor:
    """Make a tensor from a tensor, an array or nested lists of numbers; `what` names it in errors."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise ConsilienceError(f"{what} must be real numbers, got dtype {value.dtype}.")
        return value.detach()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ConsilienceError(
            f"{what} must be an array with rows of equal length, got: {str(error).splitlines()[0]}"
        ) from error
    if array.dtype.kind not in "biuf":
        if array.dtype.kind in "US":
            raise ConsilienceError(
                f"{what} must be numbers, got text; give what a tokenizer makes of it, or read it with "
                "data.text or data.table."
            )
        kind = f"dtype {array.dtype}" if isinstance(value, np.ndarray | list | tuple) else kind_of(value)
        raise ConsilienceError(f"{what} must be real numbers, got {kind}.")

    # Torch has few unsigned types, no other byte order than the machine's, and no floats above 64 bits.
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    native = np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, dtype=native, requirements=["C", "W"]))


def unit(x: Tensor, image: bool) -> Tensor:
    """Convert inputs to the types that models take.

    Images in bytes are divided by 255. float64 stays, for a run that computes in it; other fractions become
    float32, other whole numbers int64.
    """
    if x.dtype == torch.uint8 and image:
        return x.to(torch.float32).div_(255)
    if x.dtype == torch.float64:
        return x
    return x.to(torch.float32) if x.is_floating_point() or x.dtype == torch.bool else x.long()


def ready(value: Any) -> Input:
    """Make inputs of a batch from what a user has, in the types that models take."""

    def converted(part: Tensor) -> Tensor:
        # Fractions get the type of the training where they are used.
        return part if part.is_floating_point() else unit(part, part.dim() > 2)

    x = as_input(value)
    if isinstance(x, Tensor):
        return converted(x)
    return replace(x, parts={name: converted(part) for name, part in x.parts.items()})


def _place(name: str) -> tuple[int, str]:
    """Return what parts are sorted by: names, then numbers by their value."""
    return len(name) if name.isdigit() else 0, name


def _ragged(value: Any) -> list[Any] | None:
    """Return sequences of unequal length as a list; None for anything else."""
    # numpy keeps rows of unequal length as objects.
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = list(value)
    # Tensors without a dimension have `__len__`, and refuse to be asked.
    if not isinstance(value, list) or not all(
        hasattr(row, "__len__") and not isinstance(row, str) and getattr(row, "shape", None) != ()
        for row in value
    ):
        return None
    return value if len({len(row) for row in value}) > 1 else None


def _lengths(rows: Sequence[Any]) -> Tensor:
    return torch.tensor([len(row) for row in rows])


def _stacked(rows: Sequence[Any], what: str) -> Tensor:
    """Return sequences [T_i, ...] as one tensor [B, T, ...], padded with 0."""
    tensors = [as_tensor(row, f"sample {i} of {what}") for i, row in enumerate(rows)]
    filled = next((tensor for tensor in tensors if len(tensor)), tensors[0])
    for i, tensor in enumerate(tensors):
        if len(tensor) and tensor.shape[1:] != filled.shape[1:]:
            raise ConsilienceError(
                f"sequences of {what} must differ in their length alone, got elements of shapes "
                f"{tuple(filled.shape[1:])} and, in sample {i}, {tuple(tensor.shape[1:])}."
            )
    # An empty sequence has no type of its own: numpy calls it float64.
    return pad_all([tensor if len(tensor) else filled[:0] for tensor in tensors])
