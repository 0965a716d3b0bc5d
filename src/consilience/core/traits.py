"""What a model does in a forward pass that its structure does not show: it is tried on two samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.core.augment import States, isolated, seed_all
from consilience.core.errors import ConsilienceError
from consilience.core.params import Params, same
from consilience.core.tree import Input, tensors_of

Pass = Callable[[Input], tuple[Tensor, Params]]
"""Inputs -> (outputs, new buffers)."""


class Traits(NamedTuple):
    """What forward passes in one mode have shown."""

    draws: bool = False
    """Random numbers are drawn from the global states."""
    mixes: bool = False
    """The outputs of a sample depend on the others of its batch."""
    moves: bool = False
    """Buffers change."""
    repeats: bool = True
    """Two passes with equal inputs, buffers and random states have equal outputs."""

    def __or__(self, other: Traits) -> Traits:
        """Return what either has shown."""
        return Traits(
            self.draws or other.draws,
            self.mixes or other.mixes,
            self.moves or other.moves,
            self.repeats and other.repeats,
        )


@torch.no_grad()
def traits_of(forward: Pass, buffers: Mapping[str, Tensor], x: Input) -> Traits:
    """Return the traits that two passes show, or a third where the first two differ.

    They share their first sample, whose outputs are compared. One sample `x` [1, ...] is enough.

    Raises ConsilienceError for a buffer that changes its shape or type, and what `forward` raises.
    """
    both, others = _pairs(x)
    with isolated():
        seed_all(0)
        before = States.now()
        out, new = forward(both)
        draws = not before.unchanged()
        _check_shapes(buffers, new)

        mixes, repeats = False, True
        if others is not None:
            seed_all(0)
            mixes = not _close(out[:1], forward(others)[0][:1])
        if mixes:
            seed_all(0)
            repeats = _close(out, forward(both)[0])
    return Traits(draws, mixes, not same(dict(buffers), {name: new[name] for name in buffers}), repeats)


def _pairs(x: Input) -> tuple[Input, Input | None]:
    """Return two batches of two samples, of which the first is the same; None for want of another second."""
    index = torch.tensor([0, min(1, len(x) - 1)])
    both, first = x[index], x[torch.tensor([0, 0])]
    if not _equal(both, first):
        return both, first
    others = (
        _changed(first)
        if isinstance(first, Tensor)
        else replace(first, parts={name: _changed(part) for name, part in first.parts.items()})
    )
    return first, None if _equal(others, first) else others


def _changed(part: Tensor) -> Tensor:
    """Return a part [2, ...] with another second sample."""
    # Zero is a token of any vocabulary.
    second = part[1:] + 1 if part.is_floating_point() else torch.zeros_like(part[1:])
    return torch.cat([part[:1], second])


def _equal(a: Input, b: Input) -> bool:
    """Whether two inputs are equal."""
    return same(tensors_of(a), tensors_of(b))


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether outputs are equal up to rounding, which may depend on a batch."""
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6, equal_nan=True)


def _check_shapes(buffers: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Refuse buffers that do not keep their shape and type."""
    for name, old in buffers.items():
        if new[name].shape != old.shape or new[name].dtype != old.dtype:
            raise ConsilienceError(
                f"a buffer must keep its shape and type in training, and {name!r} goes from "
                f"{tuple(old.shape)} {old.dtype} to {tuple(new[name].shape)} {new[name].dtype}; give it its "
                "last shape from the start."
            )
