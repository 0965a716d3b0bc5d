"""Sources: where data lies. A source has examples to learn, to choose by and to be judged on, and names for its classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError

GATHERED = 1 << 20
"""Bytes of examples that are gathered at once."""

Label = tuple[str, str]
"""(label space, class name): two data sets share a class only where their label space says so."""


class Examples(ABC):
    """Samples with their targets, in memory or streamed."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches (x [B, ...], y [B]) whose indices `plan` lists, in its order."""

    @abstractmethod
    def select(self, index: Tensor) -> Examples:
        """The examples at these indices."""

    @abstractmethod
    def map(
        self, x: Callable[[Tensor], Tensor] | None = None, y: Callable[[Tensor], Tensor] | None = None
    ) -> Examples:
        """The same examples seen through functions of a batch of inputs and of a batch of targets."""

    @abstractmethod
    def targets(self) -> Tensor:
        """All targets [N]."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """The examples on a device, inputs that are floating-point in `dtype`."""
        return self.map(
            x=lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), y=lambda t: t.to(device)
        )

    def whole(self) -> tuple[Tensor, Tensor]:
        """All examples as two tensors."""
        if len(self) == 0:
            raise ConsilienceError("a part of a source that is read should have examples. Found none.")
        return next(iter(self.batches([torch.arange(len(self))])))

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All examples in order, `size` at a time."""
        return self.batches(list(torch.arange(len(self)).split(size)))


@dataclass(frozen=True, eq=False)
class Tensors(Examples):
    """Examples that fit in memory: indexed as tensors on their device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if not len(plan):
            return
        each = max(1, self.x[:1].nbytes * max(map(len, plan)))
        many = max(1, GATHERED // each)  # one gather for several small batches
        for at in range(0, len(plan), many):
            some = list(plan[at : at + many])
            index = (torch.cat(some) if len(some) > 1 else some[0]).to(self.x.device)
            sizes = [len(i) for i in some]
            yield from zip(
                self.x.index_select(0, index).split(sizes),
                self.y.index_select(0, index).split(sizes),
                strict=True,
            )

    def select(self, index: Tensor) -> Tensors:
        return Tensors(self.x[index], self.y[index])

    def map(
        self, x: Callable[[Tensor], Tensor] | None = None, y: Callable[[Tensor], Tensor] | None = None
    ) -> Tensors:
        return Tensors(x(self.x) if x else self.x, y(self.y) if y else self.y)

    def targets(self) -> Tensor:
        return self.y

    def whole(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x.split(size), self.y.split(size), strict=True)


@dataclass(frozen=True, eq=False)
class Stream(Examples):
    """Examples too many for memory: a map-style dataset of (x, y), read through a DataLoader of `workers` processes.

    The order is planned outside, so that a stream shuffles and resumes exactly as tensors do.
    """

    dataset: Any
    y: Tensor
    index: Tensor
    workers: int = 0
    x_through: tuple[Callable[[Tensor], Tensor], ...] = ()
    y_through: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        order = [self.index[i].tolist() for i in plan if len(i)]
        loader = DataLoader(
            self.dataset, batch_sampler=order, num_workers=self.workers, generator=torch.Generator()
        )
        for x, y in loader:
            y = torch.as_tensor(y)
            for f in self.x_through:
                x = f(x)
            for f in self.y_through:
                y = f(y)
            yield x, y

    def select(self, index: Tensor) -> Stream:
        return replace(self, y=self.y[index], index=self.index[index])

    def map(
        self, x: Callable[[Tensor], Tensor] | None = None, y: Callable[[Tensor], Tensor] | None = None
    ) -> Stream:
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
    """One place, task or time where data is: what to learn, what to choose by, what to be judged on.

    `labels[i]` names what target i means; `classes` are the targets that this source has. `task` is the label that a
    learner may be given. `kind` is "class" (targets are integers [N]) or "value" (targets are floats [N, outputs]).
    Nothing but evaluation reads `test`.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    labels: tuple[Label, ...]
    classes: tuple[int, ...]
    task: str | None = None
    kind: Literal["class", "value"] = "class"
    feature_space: str = ""
    """The hash of the backbone whose features the inputs are (`data.embed`); "": they are inputs of any model."""

    def __post_init__(self) -> None:
        if len(self.train) == 0:
            raise ConsilienceError(f"a source should have training examples. Found none in {self.name!r}.")

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} + {len(self.validation)} + {len(self.test)}"
        return f"Source({self.name!r}, {sizes} examples, {len(self.classes)} of {len(self.labels)} labels, task={self.task!r})"

    def map(
        self,
        x: Callable[[Tensor], Tensor] | None = None,
        y: Callable[[Tensor], Tensor] | None = None,
        **changes: Any,
    ) -> Source:
        """The same source with its examples seen through functions, and other fields changed."""
        if x is None and y is None:
            return replace(self, **changes)
        through: dict[str, Any] = {
            part: getattr(self, part).map(x, y) for part in ("train", "validation", "test")
        }
        if x is not None:
            through["feature_space"] = ""
        return replace(self, **{**through, **changes})

    @staticmethod
    def union(name: str, sources: Sequence[Source]) -> Source:
        """One source with the training examples of several, which must share their labels."""
        if any(s.labels != sources[0].labels for s in sources):
            raise ConsilienceError("sources to unite should share their labels. Found different ones.")
        pairs = [s.train.whole() for s in sources]
        train = Tensors(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        classes = tuple(sorted({c for s in sources for c in s.classes}))
        return replace(sources[-1], name=name, train=train, classes=classes)


@dataclass(frozen=True)
class LabelFrame:
    """What every output column means, for all agents of a schedule: class order is state, not order of arrival."""

    labels: tuple[Label, ...]
    tasks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kind: Literal["class", "value"] = "class"

    def columns(self, labels: Sequence[Label]) -> Tensor:
        """The columns [k] of this frame where those labels stand."""
        where = {label: i for i, label in enumerate(self.labels)}
        missing = [label for label in labels if label not in where]
        if missing:
            raise ConsilienceError(
                f"classes should be declared in the schedule's sources. Found {missing[0]} that none has."
            )
        return torch.tensor([where[label] for label in labels], dtype=torch.long)
