"""Leaks: sources of the same inputs that were split differently, so that some train on tests of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.source import Examples, Source, Tensors
from consilience.core.tree import Input, named

PLACES = 64
"""How many numbers of each input are read to find sources that may have the same ones."""

PARTS = ("train", "validation", "test")


def check_splits(sources: Sequence[Source]) -> None:
    """Refuse sources that have the same inputs, all of them, but not the same ones as test.

    Inputs are compared in memory; streams are not read. Of sources of one size and shape `PLACES` numbers of
    each input are read, and all only where these agree.
    """
    alike: dict[object, list[Source]] = {}
    for source in sources:
        if all(isinstance(getattr(source, part), Tensors) for part in PARTS):
            alike.setdefault(_size(source), []).append(source)

    for group in alike.values():
        # Targets of a schedule's sources are made again, and their inputs are not.
        if len({id(_inputs(source.test)) for source in group}) < 2:
            continue
        same: dict[object, list[Source]] = {}
        for source in group:
            same.setdefault(_fingerprint(source), []).append(source)
        for first, *others in same.values():
            for other in others:
                if _leaks(first, other):
                    raise ConsilienceError(
                        f"sources of the same inputs must have the same test examples, and of {first.name!r} "
                        f"and {other.name!r} one trains on tests of the other; split once: make all tasks by "
                        "data.tasks(x, {task: targets}), or give every source the same `test`."
                    )


def _inputs(examples: Examples) -> Input:
    """Return inputs that are in memory."""
    assert isinstance(examples, Tensors)
    return examples.x


def _size(source: Source) -> object:
    """Return what sources of the same inputs agree in, at no cost."""
    tensors = named("x", _inputs(source.train))
    shapes = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in tensors.items())
    return shapes, sum(len(getattr(source, part)) for part in PARTS)


def _fingerprint(source: Source) -> int:
    """Return a number that is equal for the same inputs in any order."""
    return sum(int(_codes(getattr(source, part), PLACES).sum()) for part in PARTS) % 2**64


def _leaks(one: Source, other: Source) -> bool:
    """Whether two sources have the same inputs, all of them, and one trains on tests of the other."""
    # A few places tell most tests apart, or say that there is nothing to look for.
    if _inputs(one.test) is _inputs(other.test) or _equal(
        _codes(one.test, PLACES), _codes(other.test, PLACES)
    ):
        return False
    codes = [{part: _codes(getattr(source, part)) for part in PARTS} for source in (one, other)]
    if not _equal(*(torch.cat([own[part] for part in PARTS]) for own in codes)):
        return False

    # Examples that a source has more than once may be in its own training too, which is its own affair.
    for own, others in (codes, codes[::-1]):
        apart = own["test"][~torch.isin(own["test"], own["train"])]
        if bool(torch.isin(apart, others["train"]).any()):
            return True
    return False


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two lists have the same members, in any order."""
    return torch.equal(one.sort().values, other.sort().values)


def _codes(examples: Examples, places: int | None = None) -> Tensor:
    """Return a whole number for each input [N], equal for equal ones; of some `places` of it, or of all."""
    if not len(examples):
        return torch.zeros(0, dtype=torch.long)
    total = torch.zeros(len(examples), dtype=torch.long)
    for name, tensor in named("x", _inputs(examples)).items():
        flat = tensor.detach().cpu().reshape(len(tensor), -1)
        generator = torch.Generator().manual_seed(len(name))
        if places is not None and flat.shape[1] > places:
            flat = flat[:, torch.randperm(flat.shape[1], generator=generator)[:places]]

        # Products of bits with odd numbers, modulo 2^64: a sum of whole numbers has no order.
        factors = torch.randint(2**40, (flat.shape[1],), generator=generator) * 2 + 1
        for rows, codes in zip(flat.split(4096), total.split(4096), strict=True):
            codes += (_bits(rows) * factors).sum(1)
    return total


def _bits(rows: Tensor) -> Tensor:
    """Return the bits of numbers as whole numbers."""
    if not rows.is_floating_point():
        return rows.long()
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    return rows.contiguous().view(kind).long()
