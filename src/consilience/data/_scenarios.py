"""Streams of tasks without clean boundaries: shared examples, new instances, new instances and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from consilience.core.checks import source_of_classes, whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.losses import NONE
from consilience.core.params import key
from consilience.core.source import Examples, Source, Stream, Tensors, joined_targets
from consilience.core.tree import concat
from consilience.data._shares import draw


class Unit(NamedTuple):
    """Examples that arrive together: those of these groups and these classes; None is all of them."""

    groups: Sequence[int] | None
    classes: Sequence[int] | None


class Groups(NamedTuple):
    """The group of each training and of each validation example."""

    train: Tensor
    validation: Tensor


# Several sets of examples as one.


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Examples as a map-style dataset, with their functions applied to one example at a time."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        examples = self.examples
        if not isinstance(examples, Stream):
            x, y = examples.select(torch.tensor([i])).whole()
            return x[0], y[0]

        # Functions of a stream take batches.
        x, y = examples.dataset[int(examples.index[i])]
        for function in examples.x_through:
            x = function(x[None])[0]
        return x, examples.y[i]


def joined(parts: Sequence[Examples]) -> Examples:
    """Concatenate sets of examples; streams stay streams."""
    # Empty parts may be of another kind than the rest. If all are empty, one of them is the answer.
    kept = [part for part in parts if len(part)] or [parts[0]]
    if len(kept) == 1:
        return kept[0]
    tensors = [part for part in kept if isinstance(part, Tensors)]
    if len(tensors) == len(kept):
        return Tensors(concat([part.x for part in tensors]), joined_targets([part.y for part in tensors]))

    # Parts of one dataset are joined by their indices, so that nothing wraps the dataset.
    streams = [part for part in kept if isinstance(part, Stream)]
    targets = torch.cat([part.targets() for part in kept])
    first = streams[0]
    if len(streams) == len(kept) and all(
        stream.dataset is first.dataset
        and (stream.x_through, stream.y_through) == (first.x_through, first.y_through)
        for stream in streams
    ):
        return replace(first, y=targets, index=torch.cat([stream.index for stream in streams]))

    # Different datasets, or tensors among streams: each example is read by its own part.
    rows: ConcatDataset[tuple[Tensor, Tensor]] = ConcatDataset([Rows(part) for part in kept])
    workers = max(stream.workers for stream in streams)
    return Stream(rows, targets, torch.arange(len(targets)), workers)


# Blurry boundaries.


def blurry(sources: Sequence[Source], share: float, to: str, seed: int) -> list[Source]:
    """See `consilience.data.blurry`."""
    sources = list(sources)
    if len(sources) < 2 or not all(isinstance(source, Source) for source in sources):
        kinds = " and ".join(sorted({type(source).__name__ for source in sources})) or "sources"
        raise ConsilienceError(f"blurry needs a list of two or more sources, got {len(sources)} {kinds}.")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise ConsilienceError(f"`share` must be a fraction in [0, 1), got {share!r}.")
    if to not in ("all", "neighbours"):
        raise ConsilienceError(f'`to` must be "all" or "neighbours", got {to!r}.')
    first = sources[0]
    alike = (first.labels, first.kind, first.places)
    if any((source.labels, source.kind, source.places) != alike for source in sources):
        raise ConsilienceError(
            "sources that exchange examples must have the same labels, got different ones."
        )

    # Unchanged sources, not copies, so that `share=0` is bit-identical to no blurring.
    if share == 0:
        return sources
    mixed = [_mixed(sources, part, share, to, seed) for part in ("train", "validation")]
    blurred = []
    for source, train, validation in zip(sources, *mixed, strict=True):
        present = []
        if source.kind == "class":
            present = _present(train, validation)
        # Its own classes stay first and in their order.
        classes = (*source.classes, *(label for label in present if label not in source.classes))
        blurred.append(replace(source, train=train, validation=validation, classes=classes))
    return blurred


def _present(*parts: Examples) -> list[int]:
    """Return the classes that occur in some of these examples."""
    found = torch.cat([part.targets().flatten() for part in parts]).unique()
    classes: list[int] = found[found != NONE].tolist()
    return classes


def _mixed(sources: Sequence[Source], part: str, share: float, to: str, seed: int) -> list[Examples]:
    """Return one part of every source after the exchange.

    The examples that stayed keep their order; those that arrived are put at random places among them.
    """
    count = len(sources)
    stayed: list[Examples] = []
    arrived: list[list[Examples]] = [[] for _ in sources]
    for i, source in enumerate(sources):
        own: Examples = getattr(source, part)
        if to == "all":
            receivers = [(i + step) % count for step in range(1, count)]
        else:
            receivers = [j for j in (i - 1, i + 1) if 0 <= j < count]

        # With one neighbour only, half as many leave, so that sources of equal size stay equal.
        quota = round(share * len(own) * (1 if to == "all" else len(receivers) / 2))
        # Samples with several targets have no class of their own to be drawn by.
        by_class = source.kind == "class" and not source.places and len(own) > 0
        leaving, kept = draw(own.targets(), quota, key(seed, source.name, "blurry", part), by_class, spare=1)
        stayed.append(own.select(kept))

        # Shuffled, because `draw` returns ascending indices, and early examples would all go to one source.
        shuffled = torch.randperm(len(leaving), generator=key(seed, source.name, "blurry", part, "deal"))
        for j, index in zip(receivers, leaving[shuffled].tensor_split(len(receivers)), strict=True):
            arrived[j].append(own.select(index.sort().values))

    mixed = []
    for source, own, new in zip(sources, stayed, arrived, strict=True):
        both = joined([own, *new])
        generator = key(seed, source.name, "blurry", part, "place")
        place = torch.randperm(len(both), generator=generator) < len(own)
        order = torch.empty(len(both), dtype=torch.long)
        order[place] = torch.arange(len(own))
        order[~place] = torch.arange(len(own), len(both))
        mixed.append(both.select(order))
    return mixed


# New instances, and new instances and classes.


def examples_of(units: Sequence[Unit], groups: Tensor, classes: Tensor) -> list[Tensor]:
    """Return the indices of each unit's examples, ascending; `groups` and `classes` [N] are per example."""
    found = []
    for unit in units:
        keep = torch.ones(len(groups), dtype=torch.bool)
        for values, wanted in ((groups, unit.groups), (classes, unit.classes)):
            if wanted is not None:
                keep &= torch.isin(values, torch.tensor(list(wanted)))
        found.append(keep.nonzero().flatten())
    return found


def batches(
    source: Source, names: Sequence[str], train: Sequence[Tensor], validation: Sequence[Tensor]
) -> list[Source]:
    """Split a source by indices into tasks.

    All have the same `test`, and as classes those that their training and validation examples have.
    """
    parts = []
    for name, train_index, validation_index in zip(names, train, validation, strict=True):
        own, held = source.train.select(train_index), source.validation.select(validation_index)
        classes = source.classes
        if source.kind == "class":
            present = _present(own, held)
            classes = tuple(label for label in source.classes if label in present)
        parts.append(replace(source, name=name, task=name, train=own, validation=held, classes=classes))
    return parts


def _checked_groups(source: Source, groups: Any) -> Groups:
    """Return the groups of the training and of the validation examples, from one list of all."""
    train, validation = len(source.train), len(source.validation)
    every = torch.as_tensor(groups)
    if (
        every.dim() != 1
        or every.is_floating_point()
        or every.is_complex()
        or len(every) != train + validation
    ):
        raise ConsilienceError(
            f"`groups` must be whole numbers, one for each of {train} training "
            f"and then each of {validation} validation examples, "
            f"got {every.dtype} of shape {tuple(every.shape)}."
        )
    # They are compared with targets, which are on the CPU.
    every = every.long().cpu()
    return Groups(every[:train], every[train:])


def _split_by_units(
    source: Source, groups: Groups, units: Sequence[Unit], names: Sequence[str]
) -> list[Source]:
    """Make one task per unit."""
    train = examples_of(units, groups.train, source.train.targets().cpu())
    validation = examples_of(units, groups.validation, source.validation.targets().cpu())
    return batches(source, names, train, validation)


def new_instances(source: Source, groups: Any, order: Sequence[int] | None, seed: int | None) -> list[Source]:
    """See `consilience.data.new_instances`."""
    checked = _checked_groups(source, groups)
    numbers = checked.train.unique().tolist()
    if order is not None and seed is not None:
        raise ConsilienceError("got both `order` and `seed`; give the order of groups, or draw it.")
    if order is not None:
        if sorted(order) != sorted(numbers):
            raise ConsilienceError(f"`order` must list every one of the groups once, got {list(order)}.")
        numbers = list(order)
    elif seed is not None:
        drawn = torch.randperm(len(numbers), generator=key(seed, source.name, "groups"))
        numbers = [numbers[i] for i in drawn]

    units = [Unit((number,), None) for number in numbers]
    return _split_by_units(source, checked, units, [f"{source.name}/group-{number}" for number in numbers])


def new_instances_and_classes(
    source: Source, groups: Any, first: int | None, each: int, seed: int
) -> list[Source]:
    """See `consilience.data.new_instances_and_classes`."""
    source_of_classes(source, "new_instances_and_classes")
    whole_number(each=each)
    first = each if first is None else first
    whole_number(first=first)
    checked = _checked_groups(source, groups)
    opening, *later = checked.train.unique().tolist()

    # The first classes come in the later groups again, all others are new in every group.
    first_classes, others = source.classes[:first], source.classes[first:]
    again = [first_classes[i : i + each] for i in range(0, len(first_classes), each)]
    new = [others[i : i + each] for i in range(0, len(others), each)]
    units = [Unit((group,), classes) for group in later for classes in again]
    units += [Unit((group,), classes) for group in (opening, *later) for classes in new]

    # Not every class needs to be in every group.
    found = examples_of(units, checked.train, source.train.targets().cpu())
    units = [unit for unit, index in zip(units, found, strict=True) if len(index)]

    drawn = torch.randperm(len(units), generator=key(seed, source.name, "instances and classes")).tolist()
    units = [Unit((opening,), first_classes), *(units[i] for i in drawn)]
    width = len(str(len(units) - 1))
    names = [f"{source.name}/batch-{i:0{width}d}" for i in range(len(units))]
    return _split_by_units(source, checked, units, names)
