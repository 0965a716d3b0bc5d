"""Streams of sources whose boundaries are not clean: shared examples, new instances, new instances and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from consilience.core.errors import ConsilienceError
from consilience.core.params import key
from consilience.core.source import Examples, Source, Stream, Tensors
from consilience.data._shares import draw
from consilience.data._splits import _of_classes, _whole

Unit = tuple[Sequence[int] | None, Sequence[int] | None]
"""(groups, classes) whose examples come together; None is all of them."""


# ---------------------------------------------------------------------------------------------------- one of many


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Examples as a map-style dataset, one by one as they are seen through their functions."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        e = self.examples
        if not isinstance(e, Stream):
            x, y = e.select(torch.tensor([i])).whole()
            return x[0], y[0]
        x, y = e.dataset[int(e.index[i])]
        for f in e.x_through:
            x = f(x[None])[0]
        return x, e.y[i]


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several, one part after another; streams stay streams."""
    kept = [p for p in parts if len(p)] or [parts[0]]
    if len(kept) == 1:
        return kept[0]
    tensors = [p for p in kept if isinstance(p, Tensors)]
    if len(tensors) == len(kept):
        return Tensors(torch.cat([t.x for t in tensors]), torch.cat([t.y for t in tensors]))
    streams = [p for p in kept if isinstance(p, Stream)]
    y = torch.cat([p.targets() for p in kept])
    first = streams[0]
    if len(streams) == len(kept) and all(
        s.dataset is first.dataset and (s.x_through, s.y_through) == (first.x_through, first.y_through)
        for s in streams
    ):
        return replace(first, y=y, index=torch.cat([s.index for s in streams]))
    rows: ConcatDataset[tuple[Tensor, Tensor]] = ConcatDataset([Rows(p) for p in kept])
    return Stream(rows, y, torch.arange(len(y)), max(s.workers for s in streams))


# ---------------------------------------------------------------------------------------------------- blurry


def blurry(sources: Sequence[Source], share: float, to: str, seed: int) -> list[Source]:
    """See `consilience.data.blurry`."""
    sources = list(sources)
    n = len(sources)
    if n < 2 or not all(isinstance(s, Source) for s in sources):
        raise ConsilienceError(
            f"blurry should have a list of two or more sources. Found {n} {_kinds(sources)}."
        )
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise ConsilienceError(f"`share` should be a fraction in [0, 1). Found `share = {share!r}`.")
    if to not in ("all", "neighbours"):
        raise ConsilienceError(f'`to` should be "all" or "neighbours". Found `to = {to!r}`.')
    if any((s.labels, s.kind) != (sources[0].labels, sources[0].kind) for s in sources):
        raise ConsilienceError(
            "sources that exchange examples should share their labels. Found different ones."
        )
    if share == 0:
        return sources
    mixed = [_mixed(sources, part, share, to, seed) for part in ("train", "validation")]
    found = []
    for s, train, validation in zip(sources, *mixed, strict=True):
        there = (
            torch.cat([train.targets(), validation.targets()]).unique().tolist() if s.kind == "class" else []
        )
        classes = (*s.classes, *(c for c in there if c not in s.classes))
        found.append(replace(s, train=train, validation=validation, classes=classes))
    return found


def _kinds(sources: Sequence[Any]) -> str:
    return " and ".join(sorted({type(s).__name__ for s in sources})) or "sources"


def _mixed(sources: Sequence[Source], part: str, share: float, to: str, seed: int) -> list[Examples]:
    """One part of every source after the exchange: what stayed in its order, what arrived at random places among it."""
    n = len(sources)
    stayed: list[Examples] = []
    arrived: list[list[Examples]] = [[] for _ in sources]
    for i, s in enumerate(sources):
        own: Examples = getattr(s, part)
        heirs = (
            [(i + d) % n for d in range(1, n)] if to == "all" else [j for j in (i - 1, i + 1) if 0 <= j < n]
        )
        quota = round(share * len(own) * (1 if to == "all" else len(heirs) / 2))
        by_class = s.kind == "class" and len(own) > 0
        given, kept = draw(own.targets(), quota, key(seed, s.name, "blurry", part), by_class, spare=1)
        stayed.append(own.select(kept))
        turn = given[torch.randperm(len(given), generator=key(seed, s.name, "blurry", part, "deal"))]
        for j, index in zip(heirs, turn.tensor_split(len(heirs)), strict=True):
            arrived[j].append(own.select(index.sort().values))
    found = []
    for s, own, new in zip(sources, stayed, arrived, strict=True):
        both = joined([own, *new])
        place = torch.randperm(len(both), generator=key(seed, s.name, "blurry", part, "place")) < len(own)
        order = torch.empty(len(both), dtype=torch.long)
        order[place] = torch.arange(len(own))
        order[~place] = torch.arange(len(own), len(both))
        found.append(both.select(order))
    return found


# ---------------------------------------------------------------------------------------------------- new instances


def chosen(groups: Tensor, classes: Tensor, units: Sequence[Unit]) -> list[Tensor]:
    """For each unit the examples (their indices, ascending) of its groups and classes."""
    found = []
    for own_groups, own_classes in units:
        keep = torch.ones(len(groups), dtype=torch.bool)
        for of, own in ((groups, own_groups), (classes, own_classes)):
            if own is not None:
                keep &= torch.isin(of, torch.tensor(list(own)))
        found.append(keep.nonzero().flatten())
    return found


def batches(
    source: Source, names: Sequence[str], train: Sequence[Tensor], validation: Sequence[Tensor]
) -> list[Source]:
    """A source's training examples in parts, each a task; all have the very same `test`, and the classes they really have."""
    found = []
    for name, index, held in zip(names, train, validation, strict=True):
        own, kept = source.train.select(index), source.validation.select(held)
        classes = source.classes
        if source.kind == "class":
            there = torch.cat([own.targets(), kept.targets()]).unique().tolist()
            classes = tuple(c for c in source.classes if c in there)
        found.append(replace(source, name=name, task=name, train=own, validation=kept, classes=classes))
    return found


def _groups(source: Source, groups: Any) -> tuple[Tensor, Tensor]:
    """The groups of the training and of the validation examples."""
    n, m = len(source.train), len(source.validation)
    of = torch.as_tensor(groups)
    if of.dim() != 1 or of.is_floating_point() or of.is_complex() or len(of) != n + m:
        raise ConsilienceError(
            f"`groups` should be whole numbers, one for each of {n} training and then each of {m} validation examples. "
            f"Found {of.dtype} of shape {tuple(of.shape)}."
        )
    of = of.long().cpu()
    return of[:n], of[n:]


def _cut(
    source: Source, groups: tuple[Tensor, Tensor], units: Sequence[Unit], names: Sequence[str]
) -> list[Source]:
    """The batches of these units."""
    parts = [
        chosen(of, e.targets().cpu(), units)
        for of, e in zip(groups, (source.train, source.validation), strict=True)
    ]
    return batches(source, names, *parts)


def _turn(
    values: Sequence[int], order: Sequence[int] | None, seed: int | None, where: tuple[str, str]
) -> list[int]:
    """Values in a given order, in one drawn, or as they are."""
    name, what = where
    if order is not None and seed is not None:
        raise ConsilienceError(
            f"{what} should be in a given `order` or in one drawn with `seed`. Found both."
        )
    if order is not None:
        if sorted(order) != sorted(values):
            raise ConsilienceError(f"`order` should list every one of the {what} once. Found {list(order)}.")
        return list(order)
    return (
        [values[i] for i in torch.randperm(len(values), generator=key(seed, name, what))]
        if seed is not None
        else list(values)
    )


def new_instances(source: Source, groups: Any, order: Sequence[int] | None, seed: int | None) -> list[Source]:
    """See `consilience.data.new_instances`."""
    of = _groups(source, groups)
    turn = _turn(of[0].unique().tolist(), order, seed, (source.name, "groups"))
    return _cut(source, of, [((g,), None) for g in turn], [f"{source.name}/group-{g}" for g in turn])


def new_instances_and_classes(
    source: Source, groups: Any, first: int | None, each: int, seed: int
) -> list[Source]:
    """See `consilience.data.new_instances_and_classes`."""
    _of_classes(source, "new_instances_and_classes")
    _whole(each=each)
    first = each if first is None else first
    _whole(first=first)
    of = _groups(source, groups)
    begin, rest = source.classes[:first], source.classes[first:]
    opening, *later = of[0].unique().tolist()
    again = [begin[i : i + each] for i in range(0, len(begin), each)]
    new = [rest[i : i + each] for i in range(0, len(rest), each)]
    units: list[Unit] = [((g,), c) for g in later for c in again] + [
        ((g,), c) for g in (opening, *later) for c in new
    ]
    y = source.train.targets().cpu()
    units = [u for u, index in zip(units, chosen(of[0], y, units), strict=True) if len(index)]
    turn = torch.randperm(len(units), generator=key(seed, source.name, "instances and classes")).tolist()
    units = [((opening,), begin), *(units[i] for i in turn)]
    width = len(str(len(units) - 1))
    return _cut(source, of, units, [f"{source.name}/batch-{i:0{width}d}" for i in range(len(units))])
