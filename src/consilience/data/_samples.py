"""Samples of map-style datasets: how an item becomes inputs and a target, and items become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core.augment import isolated
from consilience.core.errors import ConsilienceError
from consilience.core.losses import present
from consilience.core.source import file_sizes
from consilience.core.tree import Input, Tree, as_tensor, pad_all, part_of, unit

LABELS = ("labels", "label", "label_ids")
"""The keys of the target in an item that is a mapping, as libraries for text name it."""

ALONE = ""
"""The name of inputs that are one tensor."""

SPREAD = 18
"""Samples that are read at first, to see whether stored targets are those of the items."""


def channels_first(image: np.ndarray) -> Tensor:
    """Convert an image [H, W] or [H, W, C] to [C, H, W]."""
    image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.array(image, order="C"))


# Items.


def item_of(dataset: Any, i: int) -> Any:
    """Return an item of a dataset; an error names the one that cannot be read."""
    try:
        return dataset[i]
    except ConsilienceError:
        raise
    # Whatever a dataset of a user raises, the number of the item is what helps.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise ConsilienceError(
            f"examples of a dataset must be readable, got {type(error).__name__} in example {i}: {reason}"
        ) from error


def pair_of(item: Any) -> tuple[Any, Any]:
    """Return the inputs and the target of an item: a pair, or a mapping that has the target too."""
    if isinstance(item, Mapping):
        key = label_key(item)
        return {name: part for name, part in item.items() if name != key}, item[key]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    # A third value may be a target, or more inputs: a guess would train on the wrong one.
    found = f"{len(item)} values" if isinstance(item, tuple | list) else f"a {type(item).__name__}"
    raise ConsilienceError(
        f"a dataset must give pairs (x, y), or mappings with the target as 'labels', got {found}; several "
        "inputs are a pair ((x1, x2), y)."
    )


def label_key(item: Mapping[str, Any]) -> str:
    """Return the key of the target in an item."""
    for key in LABELS:
        if key in item:
            return key
    raise ConsilienceError(
        "a dataset of mappings must have the target as 'labels' or 'label', "
        f"got {', '.join(map(str, item))}; rename the column."
    )


def parts_of(x: Any) -> dict[str, Tensor]:
    """Return the inputs of an item as named tensors; those that are one tensor have the name `ALONE`."""
    # Images of pillow are known by a method, so that pillow is not imported.
    if hasattr(x, "getbands"):
        return {ALONE: channels_first(np.asarray(x))}
    if isinstance(x, tuple):
        x = x._asdict() if hasattr(x, "_asdict") else {str(i): part for i, part in enumerate(x)}
    if not isinstance(x, Mapping):
        return {ALONE: _tensor(x, "`x`", False)}

    # An encoding of one text that was asked for tensors has a batch dimension too many.
    alone = hasattr(x, "encodings")
    return {str(name): _tensor(part, part_of("`x`", name), alone) for name, part in x.items()}


def named_inputs(item: Any, i: int) -> dict[str, Tensor]:
    """Return the inputs of item i as named tensors; what is wrong with them is said with its number."""
    # Files of images come alone: their targets are known.
    x = pair_of(item)[0] if isinstance(item, tuple | list | Mapping) else item
    try:
        return parts_of(x)
    except ConsilienceError as error:
        raise ConsilienceError(f"in example {i}: {error}") from error


def _tensor(value: Any, what: str, one_row: bool) -> Tensor:
    """Return one part of the inputs of an item."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
        raise ConsilienceError(
            f"{what} must be numbers, got text; `data.text` makes tokens of it, or remove the column."
        )
    if value is None:
        raise ConsilienceError(f"{what} must be numbers, got None; remove the column.")
    tensor = as_tensor(value, what)
    if one_row and tensor.dim() == 2 and len(tensor) == 1:
        tensor = tensor[0]
    return tensor


def spread(count: int) -> list[int]:
    """Return a few indices: the first, the last and some between them.

    >>> spread(3), spread(100)[:3], spread(100)[-1]
    ([0, 1, 2], [0, 6, 12], 99)
    """
    return sorted({round(i * (count - 1) / (SPREAD - 1)) for i in range(SPREAD)})


def same_target(stored: Tensor, read: Tensor) -> bool:
    """Whether a stored target is that of an item; padded places of the stored one do not count."""
    if stored.dim() != read.dim() or stored.shape[:-1] != read.shape[:-1]:
        return False
    if stored.dim() and stored.shape[-1] > read.shape[-1]:
        if bool(present(stored[..., read.shape[-1] :]).any()):
            return False
        stored = stored[..., : read.shape[-1]]
    return stored.shape == read.shape and torch.allclose(stored.double(), read.double(), equal_nan=True)


# Datasets.


class Pairs:
    """A map-style dataset as a stream reads it: inputs as tensors, targets as they were collected."""

    ragged: frozenset[str] = frozenset()
    """The parts whose samples are known to differ in length."""

    first: dict[str, Tensor] | None = None
    """The inputs of example 0, once it was read."""

    known: Tensor | None = None
    """The lengths of all sequences [N], once they were read."""

    def __init__(self, dataset: Any, y: Tensor):
        self.dataset, self.y = dataset, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        parts = {name: unit(part, part.dim() > 1) for name, part in self.parts(i).items()}
        return parts[ALONE] if list(parts) == [ALONE] else parts, self.y[i]

    def parts(self, i: int) -> dict[str, Tensor]:
        """Return the inputs of an example, which must be like those of the first one."""
        # The first example counts, whichever is read first: the order decides nothing. It is read apart, or a
        # dataset that draws random numbers would draw others for example i.
        if self.first is None:
            with isolated():
                self.first = named_inputs(item_of(self.dataset, 0), 0)
        return self.alike(named_inputs(item_of(self.dataset, i), i), i)

    def alike(self, parts: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        """Check that the inputs of an example are like those of the first one."""
        assert self.first is not None
        if list(parts) != list(self.first):
            names = [", ".join(filter(None, own)) or "one tensor" for own in (self.first, parts)]
            raise ConsilienceError(
                f"examples must have the same parts, got {names[0]} in example 0 and {names[1]} in "
                f"example {i}."
            )
        return {name: self._alike(name, part, i) for name, part in parts.items()}

    def _alike(self, name: str, part: Tensor, i: int) -> Tensor:
        """Check that a part is like that of the first example; only sequences may differ in length."""
        assert self.first is not None
        first = self.first[name]
        # An empty list has no type of its own.
        part = part.to(first.dtype) if not part.numel() or not first.numel() else part
        types = [unit(each[:0] if each.dim() else each, each.dim() > 1).dtype for each in (first, part)]
        if types[0] != types[1]:
            raise ConsilienceError(
                f"{_called(name)} must be of one type in all examples, got {types[0]} in example 0 and "
                f"{types[1]} in example {i}."
            )
        if part.shape == first.shape:
            return part

        # Sequences are numbers [T] or vectors [T, d]; bytes [H, W] are images.
        pixels = part.dim() == 2 and part.dtype == torch.uint8
        alike = part.dim() == first.dim() and part.shape[1:] == first.shape[1:]
        if not alike or pixels or part.dim() not in (1, 2):
            sizes = ["x".join(map(str, shape)) for shape in (first.shape, part.shape)]
            raise ConsilienceError(
                f"{_called(name)} must have one size in all examples, got {sizes[0]} in example 0 and "
                f"{sizes[1]} in example {i}; resize images in the dataset; sequences are [T] or [T, d]."
            )
        return part

    def collate(self, batch: Sequence[tuple[Any, Tensor]]) -> tuple[Input, Tensor]:
        """Return samples as one batch; sequences are padded to the longest of the batch."""
        samples = [x if isinstance(x, dict) else {ALONE: x} for x, _ in batch]
        y = torch.stack([target for _, target in batch])
        ragged = {
            name for name in samples[0] if len({x[name].shape for x in samples}) > 1 or name in self.ragged
        }
        if not ragged and list(samples[0]) == [ALONE]:
            return torch.stack([x[ALONE] for x in samples]), y

        # A module is called with a sequence that is alone by place, as `as_input` does.
        parts = {
            name or "0": pad_all([x[name] for x in samples])
            if name in ragged
            else torch.stack([x[name] for x in samples])
            for name in samples[0]
        }
        lengths = self._lengths(samples, ragged) if ragged else None
        x = Tree(parts, {name or "0": 0.0 for name in ragged}, lengths)
        return x, cut(y, x.places)

    def _lengths(self, samples: Sequence[dict[str, Tensor]], ragged: set[str]) -> Tensor:
        """Return the lengths of the sequences of each sample, which must agree."""
        for sample in samples:
            sizes = {name: len(sample[name]) for name in ragged}
            if len(set(sizes.values())) > 1:
                raise ConsilienceError(
                    f"sequences of one example must be equally long in all parts, got {sizes}; "
                    "pad the others in the dataset."
                )
        name = min(ragged)
        return torch.tensor([len(sample[name]) for sample in samples])

    def lengths(self) -> Tensor | None:
        """Return the lengths of all sequences [N]; None where nothing is ragged. Reads all, once."""
        if not self.ragged:
            return None
        if self.known is None:
            name = min(self.ragged)
            self.known = torch.tensor([len(self.parts(i)[name]) for i in range(len(self))])
        return self.known

    def file_sizes(self, index: Tensor) -> Tensor | None:
        """Return the sizes in bytes of the files of these examples; None where the dataset says none."""
        return file_sizes(self.dataset, index)


def _called(name: str) -> str:
    """Return what a part is called in errors."""
    return part_of("`x`", name) if name else "`x`"


def cut(y: Tensor, places: int | None) -> Tensor:
    """Return targets without padded places that the inputs of a batch do not have."""
    # Values and labels have their outputs before their places.
    if places is None or y.dim() < (3 if y.is_floating_point() else 2) or y.shape[-1] <= places:
        return y
    return y if bool(present(y[..., places:]).any()) else y[..., :places]


def found_ragged(samples: Sequence[dict[str, Tensor]]) -> frozenset[str]:
    """Return the parts whose samples differ in length."""
    return frozenset(name for name in samples[0] if len({x[name].shape for x in samples if name in x}) > 1)
