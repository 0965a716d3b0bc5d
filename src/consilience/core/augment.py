"""Augmentations: random changes of training samples, whose random numbers depend on a key alone."""

from __future__ import annotations

import inspect
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.params import all_finite
from consilience.core.tree import Input, Tree, tensors_of

# Random numbers by sample. A generator for each sample would cost more than most augmentations.

STEP = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)
"""The constants of SplitMix64 (Steele, Lea & Flood 2014), as signed integers."""


def scattered(z: Tensor) -> Tensor:
    """Return the SplitMix64 hash of whole numbers, in int64; it changes `z`."""
    # Shifts of torch keep the sign, so that the bits that they bring in are cleared.
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= FIRST
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= SECOND
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def sample_seeds(generator: torch.Generator, index: Tensor, turn: Tensor | int = 0) -> Tensor:
    """Return a seed [B] >= 0 for each sample, from a key, the sample's index and how often it came before.

    >>> seeds = sample_seeds(torch.Generator().manual_seed(0), torch.tensor([4, 9, 4]))
    >>> bool(seeds[0] == seeds[2]), bool(seeds[0] == seeds[1])
    (True, False)
    >>> sample_seeds(torch.Generator(), torch.tensor([4]), 9).shape
    torch.Size([1])
    """
    z = scattered(index.cpu() * STEP + generator.initial_seed())
    # As a tensor it wraps around, where Python's whole numbers would not fit.
    return scattered(z + torch.as_tensor(turn) * STEP) & ((1 << 63) - 1)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Draw `count` uniform numbers in [0, 1) for each sample: [B, count], from its seed alone.

    >>> seeds = torch.tensor([3, 5])
    >>> bool((uniform(seeds, 4)[1] == uniform(seeds[1:], 4)[0]).all())
    True
    """
    z = scattered(seeds[:, None] + torch.arange(1, count + 1) * STEP)
    # 24 bits are what float32 holds.
    return ((z >> 40) & ((1 << 24) - 1)).float().mul_(2.0**-24)


def normal(seeds: Tensor, count: int) -> Tensor:
    """Draw `count` standard normal numbers for each sample: [B, count], from its seed alone.

    >>> seeds = torch.tensor([3, 5])
    >>> bool((normal(seeds, 4)[1] == normal(seeds[1:], 4)[0]).all())
    True
    """
    generator, found = torch.Generator(), torch.empty(len(seeds), count)
    # Faster than to transform uniform numbers, where there are many.
    for row, seed in zip(found, seeds.tolist(), strict=True):
        torch.randn(count, generator=generator.manual_seed(seed), out=row)
    return found


# The random state of torch, Python and numpy, which the functions of others draw from.


class States(NamedTuple):
    """The global random states."""

    torch: Tensor
    python: Any
    numpy: Any

    @staticmethod
    def now() -> States:
        """Return the present ones."""
        return States(torch.default_generator.get_state(), random.getstate(), np.random.get_state())

    def restore(self) -> None:
        """Make them the present ones again."""
        torch.default_generator.set_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def unchanged(self) -> bool:
        """Whether nothing was drawn since."""
        now = States.now()
        same = torch.equal(self.torch, now.torch) and self.python == now.python
        return same and all(np.array_equal(a, b) for a, b in zip(self.numpy, now.numpy, strict=True))


@contextmanager
def isolated(device: torch.device | None = None) -> Iterator[None]:
    """Leave the global random states as they were found."""
    before = States.now()
    on_gpu = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
    try:
        yield
    finally:
        before.restore()
        if on_gpu is not None and device is not None:
            torch.cuda.set_rng_state(on_gpu, device)


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed the global random states."""
    # `torch.manual_seed` also queues a call for CUDA with a stack trace: sixty times as slow.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


# Augmentations.


class Views(ABC):
    """Random views of samples: what `augment=` is made into."""

    joint: bool
    """Whether targets are changed too."""

    @abstractmethod
    def __call__(self, x: Input, y: Tensor, seeds: Tensor) -> tuple[Input, Tensor]:
        """Return a view of samples x [B, ...] with targets y [B, ...]; `seeds` [B] decide which.

        Raises ConsilienceError where the shape or type of a sample changes, or a number is not finite.
        """

    def of(self, index: Tensor) -> Views:
        """Return what applies to the samples at these indices of the source."""
        return self


@dataclass(frozen=True, eq=False, repr=False)
class Augment(Views):
    """One random function of a sample or of a batch; see `consilience.data.augment`."""

    function: Callable[..., Any]
    batch: bool = False
    """Whether it takes a batch [B, ...] at once."""
    joint: bool = False
    """Whether it takes and returns inputs and targets."""
    part: str | None = None
    """The part of a tree that it takes and returns; None: all inputs."""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConsilienceError(f"`augment` must be a function, got {kind_of(self.function)}.")

    def __repr__(self) -> str:
        # Without addresses, which differ between processes.
        name = getattr(self.function, "__name__", "") or re.sub(r" at 0x\w+", "", repr(self.function))
        marks = [mark for mark in ("batch", "joint") if getattr(self, mark)]
        marks += [] if self.part is None else [f"part={self.part!r}"]
        return f"{name} ({', '.join(marks)})" if marks else name

    @cached_property
    def takes(self) -> list[str]:
        """Which of our own arguments the function takes: "generator", and of a batch "seeds"."""
        offered = ("generator", "seeds") if self.batch else ("generator",)
        try:
            arguments = inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            # Functions written in C may not say what they take.
            return []
        return [name for name in offered if name in arguments]

    def __call__(self, x: Input, y: Tensor, seeds: Tensor) -> tuple[Input, Tensor]:
        # A function that takes one of our arguments draws from that, which costs less than the global states.
        if self.takes:
            new, new_y = self._applied(x, y, seeds)
        else:
            with isolated(x.device):
                new, new_y = self._applied(x, y, seeds)
        for name, part in tensors_of(new).items():
            if not all_finite(part):
                where = f" in {name!r}" if name else ""
                raise ConsilienceError(
                    f"an augmentation must be finite, got NaN or infinity{where} of {self!r}."
                )
        return new, new_y

    def _applied(self, x: Input, y: Tensor, seeds: Tensor) -> tuple[Input, Tensor]:
        if self.batch:
            # Keyed by the first sample, because the function draws for all of them together.
            return self._once(x, y, int(seeds[0]), seeds)

        pairs = [
            self._once(sample_of(x, i), y[i] if self.joint else y, seed, seeds)
            for i, seed in enumerate(seeds.tolist())
        ]
        views = [view for view, _ in pairs]
        new_y = torch.stack([target.to(y.device) for _, target in pairs]) if self.joint else y
        if isinstance(x, Tensor):
            return torch.stack([view.to(x.device) for view in views if isinstance(view, Tensor)]), new_y

        # Written into copies, which have the padding.
        new = x.clone()
        for i, view in enumerate(views):
            for name, part in tensors_of(sample_of(new, i)).items():
                part.copy_(tensors_of(view)[name])
        return new, new_y

    def _once(self, x: Input, y: Tensor, seed: int, seeds: Tensor) -> tuple[Input, Tensor]:
        """Call the function with one sample or batch, and check what it returns."""
        options: dict[str, Any] = {}
        if not self.takes:
            seed_all(seed, x.device)
        elif "seeds" in self.takes:
            options["seeds"] = seeds
        if "generator" in self.takes:
            options["generator"] = torch.Generator().manual_seed(seed)

        given = x if self.part is None else self._part(x)
        found = self.function(given, y, **options) if self.joint else self.function(given, **options)
        if not self.joint:
            return self._joined(x, given, found), y
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise ConsilienceError(
                f"a joint augmentation must return (x, y), got {kind_of(found)} of {self!r}."
            )
        return self._joined(x, given, found[0]), self._like(found[1], y, "the target")

    def _part(self, x: Input) -> Tensor:
        """Return the part of a tree that the function is for."""
        parts = {} if isinstance(x, Tensor) else x.parts
        if self.part is None or self.part not in parts:
            there = f"parts {', '.join(parts)}" if parts else "one tensor"
            raise ConsilienceError(f"augmented inputs must have a part {self.part!r}, got {there}.")
        return parts[self.part]

    def _joined(self, x: Input, given: Input, found: Any) -> Input:
        """Return inputs with what the function made of them."""
        if isinstance(given, Tensor):
            new = self._like(found, given, "a sample" if self.part is None else f"the part {self.part!r}")
            return new if isinstance(x, Tensor) else replace(x, parts={**x.parts, str(self.part): new})

        parts = found.parts if isinstance(found, Tree) else found
        if not isinstance(parts, Mapping) or parts.keys() != given.parts.keys():
            got = ", ".join(parts) if isinstance(parts, Mapping) else kind_of(found)
            raise ConsilienceError(
                f"an augmentation must return the parts {', '.join(given.parts)}, got {got} of {self!r}."
            )
        checked = {
            name: self._like(parts[name], part, f"the part {name!r}") for name, part in given.parts.items()
        }
        return replace(given, parts=checked)

    def _like(self, found: Any, given: Tensor, what: str) -> Tensor:
        """Return a tensor if it has the shape and type of the given one."""
        if isinstance(found, Tensor) and found.shape == given.shape and found.dtype == given.dtype:
            return found
        got = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else kind_of(found)
        raise ConsilienceError(
            f"an augmentation must keep the shape and type of {what}, {tuple(given.shape)} of {given.dtype}, "
            f"got {got} of {self!r}."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Views):
    """Several augmentations, one after another."""

    steps: Sequence[Views]
    alike: bool = False
    """Whether all draw the same numbers for a sample, so that parts of it are changed alike."""

    @property
    def joint(self) -> bool:  # type: ignore[override]
        """Whether one of them changes targets."""
        return any(step.joint for step in self.steps)

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self.steps))}]"

    def __call__(self, x: Input, y: Tensor, seeds: Tensor) -> tuple[Input, Tensor]:
        for number, step in enumerate(self.steps):
            x, y = step(x, y, seeds)
            # Each step has numbers of its own.
            if not self.alike:
                seeds = scattered(seeds + number) & ((1 << 63) - 1)
        return x, y


@dataclass(frozen=True, eq=False, repr=False)
class Mixed(Views):
    """The augmentations of several sources, for samples that come from all of them."""

    each: Sequence[Views | None]
    number: Tensor
    """Which of them is a sample's own [N]."""

    @property
    def joint(self) -> bool:  # type: ignore[override]
        """Whether one of them changes targets."""
        return any(views is not None and views.joint for views in self.each)

    def of(self, index: Tensor) -> Views:
        return replace(self, number=self.number[index.to(self.number.device)])

    def __call__(self, x: Input, y: Tensor, seeds: Tensor) -> tuple[Input, Tensor]:
        found: dict[str, Tensor] = {name: part.clone() for name, part in tensors_of(x).items()}
        new_y = y.clone() if self.joint else y
        # Sources often share an augmentation, whose samples then go together.
        for views in {id(views): views for views in self.each if views is not None}.values():
            mine = torch.tensor([other is views for other in self.each])[self.number.cpu()].nonzero()[:, 0]
            if not len(mine):
                continue
            at = mine.to(x.device)
            part, part_y = views(x.index_select(0, at), y.index_select(0, at), seeds[mine])
            for name, values in tensors_of(part).items():
                found[name][at] = values
            if views.joint:
                new_y[at] = part_y
        return (found[""] if isinstance(x, Tensor) else replace(x, parts=found)), new_y


class Origins(NamedTuple):
    """Where the samples of a pool come from."""

    names: tuple[str, ...]
    """Sources."""
    number: Tensor
    """Which of them is a sample's own [N]."""


def views_of(augments: Mapping[str, Views], source: str, origins: Origins | None) -> Views | None:
    """Return the augmentation of samples of a source, or of several; None if they have none.

    `augments` are those of a schedule, by source: nothing that an agent keeps has functions in it.
    """
    if origins is None:
        return augments.get(source)
    each = [augments.get(name) for name in origins.names]
    if all(views is each[0] for views in each):
        return each[0]
    return Mixed(each, origins.number)


def same_views(one: Views | None, other: Views | None) -> bool:
    """Whether two augmentations make equal inputs of equal ones; those that change targets too do not.

    >>> same_views(as_views([torch.relu]), as_views([torch.relu]))
    True
    """
    if one is None or other is None:
        return one is other
    if one.joint or other.joint or type(one) is not type(other):
        return False
    if isinstance(one, Augment) and isinstance(other, Augment):
        return (one.function, one.batch, one.part) == (other.function, other.batch, other.part)
    if isinstance(one, Chain) and isinstance(other, Chain):
        pairs = zip(one.steps, other.steps, strict=False)
        alike = one.alike == other.alike and len(one.steps) == len(other.steps)
        return alike and all(same_views(*pair) for pair in pairs)
    return one is other


def as_views(value: Any) -> Views | None:
    """Return the augmentation that a user gives: a function, several in a list, or by part; None: none.

    >>> as_views([torch.relu, torch.abs]), as_views({"image": torch.relu})
    ([relu, abs], [relu (part='image')])
    """
    if value is None or isinstance(value, Views):
        return value
    if isinstance(value, Mapping | list | tuple) and not value:
        raise ConsilienceError(f"`augment` must have a function, got {value!r}; None is for no augmentation.")
    if isinstance(value, Mapping):
        # Alike, so that an image and its depths are cropped at the same place.
        return Chain([for_part(as_views(own), str(name)) for name, own in value.items()], alike=True)
    if isinstance(value, list | tuple):
        return Chain([views for views in map(as_views, value) if views is not None])
    return Augment(value)


def for_part(views: Views | None, part: str) -> Views:
    """Return an augmentation that is applied to a part of a tree alone."""
    if isinstance(views, Augment):
        return replace(views, part=part)
    if isinstance(views, Chain):
        return replace(views, steps=[for_part(step, part) for step in views.steps])
    raise ConsilienceError(f"`augment` must have a function for the part {part!r}, got None.")


def sample_of(x: Input, i: int) -> Input:
    """Return sample `i` of inputs; its ragged parts have no padding."""
    if isinstance(x, Tensor):
        return x[i]
    sample = x[i]
    if x.lengths is None:
        return sample
    # How much padding there is depends on the batch, and a view must not.
    length = int(x.lengths[i])
    parts = {name: part[:length] if name in x.ragged else part for name, part in sample.parts.items()}
    return replace(sample, parts=parts)
