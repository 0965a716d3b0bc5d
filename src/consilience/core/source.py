"""Sources: data of one place, task or time, to train on, to choose by, and to be evaluated on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.names import checked_name

GATHERED = 1 << 20
"""Bytes of examples that are gathered at once."""

Label = tuple[str, str]
"""(label space, class name): two data sets share a class only where their label space says so."""

Through = Callable[[Tensor], Tensor]
"""A function of a batch of inputs, or of a batch of targets."""


class Examples(ABC):
    """Samples with their targets, in memory or streamed."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches (x [B, ...], y [B]) whose indices `plan` lists, in its order."""

    @abstractmethod
    def select(self, index: Tensor) -> Examples:
        """Return the examples at these indices."""

    @abstractmethod
    def map(self, x: Through | None = None, y: Through | None = None) -> Examples:
        """Return the same examples, with functions applied to batches of inputs and of targets."""

    @abstractmethod
    def targets(self) -> Tensor:
        """Return all targets [N]."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """Return the examples on a device, with floating-point inputs in `dtype`."""
        # Integer inputs, such as tokens, keep their type.
        return self.map(
            x=lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), y=lambda y: y.to(device)
        )

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return all examples as two tensors."""
        if len(self) == 0:
            raise ConsilienceError("a part of a source that is read must have examples, got none.")
        return next(iter(self.batches([torch.arange(len(self))])))

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all examples in order, `size` at a time."""
        return self.batches(list(torch.arange(len(self)).split(size)))


@dataclass(frozen=True, eq=False)
class Tensors(Examples):
    """Examples that fit in memory, as tensors on their device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if not len(plan):
            return
        # One gather serves several small batches: a call costs more than the copy of a few samples.
        bytes_per_batch = max(1, self.x[:1].nbytes * max(map(len, plan)))
        at_once = max(1, GATHERED // bytes_per_batch)
        for first in range(0, len(plan), at_once):
            group = list(plan[first : first + at_once])
            index = (torch.cat(group) if len(group) > 1 else group[0]).to(self.x.device)
            sizes = [len(batch) for batch in group]
            yield from zip(
                self.x.index_select(0, index).split(sizes),
                self.y.index_select(0, index).split(sizes),
                strict=True,
            )

    def select(self, index: Tensor) -> Tensors:
        return Tensors(self.x[index], self.y[index])

    def map(self, x: Through | None = None, y: Through | None = None) -> Tensors:
        return Tensors(x(self.x) if x else self.x, y(self.y) if y else self.y)

    def targets(self) -> Tensor:
        return self.y

    def whole(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x.split(size), self.y.split(size), strict=True)


@dataclass(frozen=True, eq=False)
class Stream(Examples):
    """Examples too many for memory: a map-style dataset of (x, y).

    It is read through a DataLoader of `workers` processes. The order is planned outside, so that a stream
    shuffles and resumes exactly as tensors do.
    """

    dataset: Any
    y: Tensor
    index: Tensor
    workers: int = 0
    x_through: tuple[Through, ...] = ()
    y_through: tuple[Through, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        order = [self.index[batch].tolist() for batch in plan if len(batch)]
        # A generator of its own, because a DataLoader would draw from torch's global one.
        loader = DataLoader(
            self.dataset, batch_sampler=order, num_workers=self.workers, generator=torch.Generator()
        )
        for inputs, targets in loader:
            x, y = inputs, torch.as_tensor(targets)
            for function in self.x_through:
                x = function(x)
            for function in self.y_through:
                y = function(y)
            yield x, y

    def select(self, index: Tensor) -> Stream:
        return replace(self, y=self.y[index], index=self.index[index])

    def map(self, x: Through | None = None, y: Through | None = None) -> Stream:
        return replace(
            self,
            y=y(self.y) if y else self.y,
            x_through=(*self.x_through, x) if x else self.x_through,
            y_through=(*self.y_through, y) if y else self.y_through,
        )

    def targets(self) -> Tensor:
        return self.y


@dataclass(frozen=True, eq=False)
class Source:
    """Data of one place, task or time.

    Raises ConsilienceError without training examples, and for a name or task that is empty or in angle
    brackets.
    """

    name: str
    train: Examples
    validation: Examples
    """To choose thresholds and hyperparameters by."""
    test: Examples
    """Read by evaluation only."""
    labels: tuple[Label, ...]
    """What target i means: `labels[i]`."""
    classes: tuple[int, ...]
    """The targets that occur in this source."""
    task: str | None = None
    """The task label that a learner may be given."""
    kind: Literal["class", "value"] = "class"
    """Of the targets: "class" (integers [N]) or "value" (floats [N, outputs])."""
    feature_space: str = ""
    """The hash of the backbone whose features the inputs are (`data.embed`); "" for inputs of any model."""

    def __post_init__(self) -> None:
        # Our own keys live in the same dictionaries as these names.
        checked_name(self.name, "source")
        if self.task is not None:
            checked_name(self.task, "task")
        if len(self.train) == 0:
            raise ConsilienceError(f"a source must have training examples, got none in {self.name!r}.")

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} + {len(self.validation)} + {len(self.test)}"
        classes = f"{len(self.classes)} of {len(self.labels)} labels"
        return f"Source({self.name!r}, {sizes} examples, {classes}, task={self.task!r})"

    def map(self, x: Through | None = None, y: Through | None = None, **changes: Any) -> Source:
        """Return the same source with functions applied to its examples, and other fields changed."""
        if x is None and y is None:
            return replace(self, **changes)
        mapped: dict[str, Any] = {
            part: getattr(self, part).map(x, y) for part in ("train", "validation", "test")
        }
        # Changed inputs are no longer the features of that backbone.
        if x is not None:
            mapped["feature_space"] = ""
        return replace(self, **{**mapped, **changes})

    @staticmethod
    def union(name: str, sources: Sequence[Source]) -> Source:
        """Return one source with the training examples of several, which must share their labels."""
        if any(source.labels != sources[0].labels for source in sources):
            raise ConsilienceError("sources to unite must share their labels, got different ones.")
        pairs = [source.train.whole() for source in sources]
        train = Tensors(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        classes = tuple(sorted({column for source in sources for column in source.classes}))
        # The rest, such as the test data, is the last source's.
        return replace(sources[-1], name=name, train=train, classes=classes)


@dataclass(frozen=True)
class LabelFrame:
    """What every output column means, for all agents of a schedule, in whatever order classes arrive."""

    labels: tuple[Label, ...]
    """The label of each column."""
    tasks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The columns of each task."""
    kind: Literal["class", "value"] = "class"
    """Of the targets."""

    def columns(self, labels: Sequence[Label]) -> Tensor:
        """Return the columns [k] of those labels in this frame."""
        where = {label: column for column, label in enumerate(self.labels)}
        missing = [label for label in labels if label not in where]
        if missing:
            raise ConsilienceError(
                f"classes must be declared in the schedule's sources, got {missing[0]} that none has."
            )
        return torch.tensor([where[label] for label in labels], dtype=torch.long)
