"""Sources: data of one place, task or time, to train on, to choose by, and to be evaluated on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.augment import Origins, States, Views, as_views, isolated, sample_seeds, seed_all
from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.losses import DEFAULTS, NONE, Loss, Losses, present
from consilience.core.names import checked_name
from consilience.core.params import same
from consilience.core.tree import Input, Tree, as_input, cast_to, concat, named, pad, tensors_of, unnamed

GATHERED = 1 << 20
"""Bytes of examples that are gathered at once."""
SAMPLED = 256
"""How many of the examples that are not in memory identify them, at least."""

Label = tuple[str, str]
"""(label space, class name): two data sets share a class only where their label space says so."""

Through = Callable[[Any], Any]
"""A function of a batch of inputs, or of a batch of targets."""

Kind = Literal["class", "value", "labels"]
"""Of targets: class numbers [N, *places], values [N, k, *places], or several labels [N, L, *places]."""


class Examples(ABC):
    """Samples with their targets, in memory or streamed."""

    draws: ClassVar[bool] = False
    """Whether reading a sample may draw random numbers."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Input, Tensor]]:
        """Yield the batches (x [B, ...], y [B, ...]) whose indices `plan` lists, in its order.

        Ragged inputs are padded to the longest of each batch, and their places of targets are too. What is
        random inside a dataset is the same at every call.
        """

    def views(
        self, plan: Sequence[Tensor], augment: Views | None, seeds: Sequence[Tensor]
    ) -> Iterator[tuple[Input, Tensor]]:
        """Yield random views of the batches of `plan`, by the seeds [B] of each batch, for training."""
        for index, own, (x, y) in zip(plan, seeds, self.batches(plan), strict=True):
            yield (x, y) if augment is None else augment.of(index)(x, y, own)

    @abstractmethod
    def select(self, index: Tensor) -> Examples:
        """Return the examples at these indices."""

    @abstractmethod
    def map(self, x: Through | None = None, y: Through | None = None) -> Examples:
        """Return the same examples, with functions applied to batches of inputs and of targets."""

    @abstractmethod
    def targets(self) -> Tensor:
        """Return all targets [N]."""

    def lengths(self) -> Tensor | None:
        """Return how many places each example has [N]; None where inputs are not ragged."""
        return None

    def content(self) -> dict[str, Tensor]:
        """Return tensors that identify the examples: all targets, and an even sample of inputs."""
        some = torch.arange(0, len(self), max(1, len(self) // SAMPLED))
        return {"y": self.targets()} | (named("x", self.select(some).whole()[0]) if len(some) else {})

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """Return the examples on a device, with fractions among inputs and targets in `dtype`."""
        return self.map(x=lambda x: cast_to(x, device, dtype), y=lambda y: cast_to(y, device, dtype))

    def first(self, count: int = 1) -> tuple[Input, Tensor]:
        """Return the inputs and targets of the first examples: `count` of them, or all if there are fewer."""
        return self.select(torch.arange(min(count, len(self)))).whole()

    def whole(self) -> tuple[Input, Tensor]:
        """Return all inputs and all targets."""
        if len(self) == 0:
            raise ConsilienceError("a part of a source that is read must have examples, got none.")
        return next(iter(self.batches([torch.arange(len(self))])))

    def chunks(self, size: int) -> Iterator[tuple[Input, Tensor]]:
        """Yield all examples in order, `size` at a time."""
        return self.batches(list(torch.arange(len(self)).split(size)))


@dataclass(frozen=True, eq=False)
class Tensors(Examples):
    """Examples that fit in memory, as tensors on their device."""

    x: Input
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Input, Tensor]]:
        if not len(plan):
            return
        # One gather serves several small batches: a call costs more than the copy of a few samples.
        bytes_per_batch = max(1, self.x[:1].nbytes * max(map(len, plan)))
        at_once = max(1, GATHERED // bytes_per_batch)
        for first in range(0, len(plan), at_once):
            group = list(plan[first : first + at_once])
            index = (torch.cat(group) if len(group) > 1 else group[0]).to(self.x.device)
            sizes = [len(batch) for batch in group]
            inputs, targets = self.x.index_select(0, index), self.y.index_select(0, index)
            pairs = zip(inputs.split(sizes), targets.split(sizes), strict=True)
            yield from pairs if isinstance(inputs, Tensor) else (trimmed(x, y) for x, y in pairs)

    def select(self, index: Tensor) -> Tensors:
        return Tensors(self.x[index], self.y[index])

    def map(self, x: Through | None = None, y: Through | None = None) -> Tensors:
        return Tensors(x(self.x) if x else self.x, y(self.y) if y else self.y)

    def targets(self) -> Tensor:
        return self.y

    def content(self) -> dict[str, Tensor]:
        return {"y": self.y} | named("x", self.x)

    def lengths(self) -> Tensor | None:
        return None if isinstance(self.x, Tensor) else self.x.lengths

    def whole(self) -> tuple[Input, Tensor]:
        return self.x, self.y

    def chunks(self, size: int) -> Iterator[tuple[Input, Tensor]]:
        pairs = zip(self.x.split(size), self.y.split(size), strict=True)
        yield from pairs if isinstance(self.x, Tensor) else (trimmed(x, y) for x, y in pairs)


def same_inputs(one: Examples, other: Examples) -> bool:
    """Whether two sets of examples have equal inputs, in one order. Only those in memory are compared."""
    if not (isinstance(one, Tensors) and isinstance(other, Tensors)):
        return False
    return one.x is other.x or same(named("x", one.x), named("x", other.x))


def trimmed(x: Input, y: Tensor) -> tuple[Input, Tensor]:
    """Cut the padding that a batch does not need, of ragged inputs and of targets [B, T] at their places."""
    if isinstance(x, Tensor) or x.lengths is None:
        return x, y
    # Targets have places of their own, such as a tag for each token, or one class for all.
    short = x.trim()
    return short, y[..., : short.places] if at_places(x, y) else y


def at_places(x: Tree, y: Tensor) -> bool:
    """Whether there is a target at every place of ragged inputs."""
    # Labels [B, L] are no places, even where there are as many labels as places.
    return y.dim() > (2 if y.is_floating_point() else 1) and y.shape[-1] == x.places


def joined_rows(tables: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return tables of samples, each of named tensors [n, ...], one under another.

    "x" are inputs as `tree.named` names their tensors, and "y" are targets; both may be ragged.
    """
    # Inputs and targets may need padding; all else has one shape.
    joined = named("x", concat([unnamed("x", table) for table in tables]))
    joined["y"] = joined_targets([table["y"] for table in tables])
    others = [name for name in tables[0] if name not in ("x", "y") and not name.startswith("x/")]
    return joined | {name: joined_targets([table[name] for table in tables]) for name in others}


def joined_targets(targets: Sequence[Tensor]) -> Tensor:
    """Return targets [B, ...] one after another; places are padded to the longest, without targets.

    >>> joined_targets([torch.tensor([[1, 2]]), torch.tensor([[3]])]).tolist()
    [[1, 2], [3, -100]]
    """
    if targets[0].dim() < 2 or len({y.shape[-1] for y in targets}) == 1:
        return torch.cat(list(targets))

    longest = max(y.shape[-1] for y in targets)
    fill = float("nan") if targets[0].is_floating_point() else NONE
    # Places are the last dimension: values and labels have their outputs before them.
    flat = [pad(y.flatten(0, -2), longest, fill).view(*y.shape[:-1], longest) for y in targets]
    return torch.cat(flat)


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
    place: tuple[torch.device, torch.dtype] | None = None
    """The device, and the type of fractions, that batches are moved to at the end."""

    draws: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device, dtype: torch.dtype) -> Stream:
        return replace(self, y=cast_to(self.y, device, dtype), place=(device, dtype))

    def batches(self, plan: Sequence[Tensor]) -> Iterator[tuple[Input, Tensor]]:
        # A dataset that draws random numbers gives one fixed view of a sample here.
        return self._read(plan, [sample_seeds(torch.Generator(), self.index[batch]) for batch in plan])

    def views(
        self, plan: Sequence[Tensor], augment: Views | None, seeds: Sequence[Tensor]
    ) -> Iterator[tuple[Input, Tensor]]:
        return self._read(plan, seeds, augment)

    def _read(
        self, plan: Sequence[Tensor], seeds: Sequence[Tensor], augment: Views | None = None
    ) -> Iterator[tuple[Input, Tensor]]:
        from torch.utils.data import DataLoader

        # Without an augmentation to come after them, functions run in this process.
        x_before = () if augment is None else self.x_through
        y_before = self.y_through if augment is not None and augment.joint else ()
        reader = Reader(self.dataset, x_before, y_before, augment)
        pairs = [(self.index[batch], own) for batch, own in zip(plan, seeds, strict=True) if len(batch)]
        loader: Any = DataLoader(
            cast(Any, reader),
            batch_sampler=[list(zip(index.tolist(), own.tolist(), strict=True)) for index, own in pairs],
            num_workers=self.workers,
            collate_fn=as_it_is,
            # A generator of its own, because a DataLoader would draw from torch's global one.
            generator=torch.Generator(),
        )
        for x, y in unwrapped(loader):
            x = through(x, self.x_through[len(x_before) :])
            y = through(y, self.y_through[len(y_before) :])
            if self.place is not None:
                device, dtype = self.place
                x, y = cast_to(x, device, dtype), cast_to(y, device, dtype)
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

    def content(self) -> dict[str, Tensor]:
        # To read all would cost an epoch. Files whose sizes are the same are taken to be the same.
        sizes = file_sizes(self.dataset, self.index)
        known = {} if sizes is None else {"sizes": sizes}
        return super().content() | {"index": self.index} | known

    def lengths(self) -> Tensor | None:
        # Only some datasets know, such as those that `data.stream` wraps.
        known = self.dataset.lengths() if hasattr(self.dataset, "lengths") else None
        return None if known is None else known[self.index]


def unwrapped(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield what a DataLoader reads; errors of its processes come without their trace."""
    try:
        yield from loader
    except ConsilienceError as error:
        raise ConsilienceError(str(error).strip().splitlines()[-1].removeprefix(WRAPPED)) from error


WRAPPED = f"{ConsilienceError.__module__}.{ConsilienceError.__qualname__}: "
"""How the last line of a trace begins."""


@dataclass
class Reader:
    """What a DataLoader reads, in its processes or in ours: batches of samples, by (index, seed)."""

    dataset: Any
    x_through: tuple[Through, ...] = ()
    y_through: tuple[Through, ...] = ()
    augment: Views | None = None
    draws: bool = False
    """Whether the dataset was seen to draw from the global random states."""

    def __getitems__(self, keyed: Sequence[tuple[int, int]]) -> tuple[Input, Tensor]:
        from torch.utils.data import default_collate

        # A dataset may know how its samples become a batch.
        collate = getattr(self.dataset, "collate", None) or default_collate
        inputs, targets = collate(self._samples(keyed))
        x, y = as_input(inputs), torch.as_tensor(targets)
        if self.augment is None:
            return x, y
        x, y = through(x, self.x_through), through(y, self.y_through)
        return self.augment(x, y, torch.tensor([seed for _, seed in keyed]))

    def _samples(self, keyed: Sequence[tuple[int, int]]) -> list[Any]:
        """Return samples; those of a dataset that draws random numbers are seeded one by one."""
        if not self.draws:
            before = States.now()
            found = [self.dataset[i] for i, _ in keyed]
            if before.unchanged():
                return found
            # Read again: seeding every sample of datasets that never draw would cost more than some reads.
            before.restore()
            self.draws = True

        found = []
        with isolated():
            for i, seed in keyed:
                seed_all(seed)
                found.append(self.dataset[i])
        return found


def as_it_is(batch: Any) -> Any:
    """Return a batch that is collated already."""
    return batch


def through(value: Any, functions: Sequence[Through]) -> Any:
    """Return a value after some functions, one after another."""
    for function in functions:
        value = function(value)
    return value


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
    kind: Kind = "class"
    """Of the targets: "class" (integers, -100: none), "value", or "labels" (0 or 1 each; NaN: none)."""
    loss: Any = None
    """By name, or a Loss: what its task is trained by. None: that of the run, or of the kind."""
    metric: Any = None
    """By name, or a Metric: what its task is judged by. None: that of the run, or of the kind."""
    target: str = ""
    """The key of its Target in `LabelFrame.targets`; schedules set it."""
    feature_space: str = ""
    """The hash of the backbone whose features the inputs are (`data.embed`); "" for inputs of any model."""
    vocabulary: str = ""
    """The hash of the vocabulary whose ids the inputs are (`data.text`); "" where nothing says."""
    augment: Any = None
    """A random function of training samples, see `consilience.data.augment`; None: they stay as they are.

    Training and rehearsal see views of it. Everything else reads the samples themselves.
    """
    origins: Origins | None = None
    """Of a pool that a correction made: the source of each training example, whose augmentation it gets."""

    def __post_init__(self) -> None:
        # Our own keys live in the same dictionaries as these names.
        checked_name(self.name, "source")
        if self.task is not None:
            checked_name(self.task, "task")
        if len(self.train) == 0:
            raise ConsilienceError(f"a source must have training examples, got none in {self.name!r}.")
        try:
            # The class is frozen, so that sources can be shared.
            object.__setattr__(self, "augment", as_views(self.augment))
        except ConsilienceError as error:
            raise ConsilienceError(f"in {self.name!r}: {error}") from None

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
        # Changed inputs are no longer the features of that backbone, or ids of those tokens.
        if x is not None:
            mapped |= {"feature_space": "", "vocabulary": ""}
        return replace(self, **{**mapped, **changes})

    def select(self, index: Tensor) -> Source:
        """Return the same source with the training examples at these indices."""
        origins = self.origins
        if origins is not None:
            origins = origins._replace(number=origins.number[index.to(origins.number.device)])
        return replace(self, train=self.train.select(index), origins=origins)

    def labelled(self, size: int) -> Iterator[tuple[Input, Tensor, Tensor]]:
        """Yield inputs, targets and numbers of the training examples that have a target, in chunks."""
        seen = 0
        for x, y in self.train.chunks(size):
            # A value counts only where all of its outputs are there.
            there = present(y).all(1) if self.kind == "value" else present(y)
            rows, seen = torch.arange(seen, seen + len(y)), seen + len(y)
            if not bool(there.all()):
                x, y, rows = x[there], y[there], rows[there.cpu()]
            yield x, y, rows

    @property
    def places(self) -> int:
        """The number of dimensions of places, such as 1 for tokens and 2 for pixels; 0: one target each."""
        return self.train.targets().dim() - (1 if self.kind == "class" else 2)

    @staticmethod
    def union(name: str, sources: Sequence[Source]) -> Source:
        """Return one source with the training examples of several, which must share their labels."""
        if any(source.labels != sources[0].labels for source in sources):
            raise ConsilienceError("sources to unite must share their labels, got different ones.")
        if any(source.augment is not sources[0].augment for source in sources):
            raise ConsilienceError("sources to unite must share their augmentation, got different ones.")
        pairs = [source.train.whole() for source in sources]
        train = Tensors(concat([x for x, _ in pairs]), joined_targets([y for _, y in pairs]))
        classes = tuple(sorted({column for source in sources for column in source.classes}))
        # The rest, such as the test data, is the last source's.
        return replace(sources[-1], name=name, train=train, classes=classes)


@dataclass(frozen=True)
class Target:
    """What the targets of a task are, and what it is trained by."""

    kind: Kind
    loss: Loss
    columns: tuple[int, ...] | None = None
    """The output columns that it answers with; None: all, or the first ones of values and labels."""
    complete: bool = True
    """Whether no training target is missing."""

    def own(self, out: Tensor, y: Tensor) -> Tensor:
        """Return the outputs that the targets are compared with: of classes all, else the task's own."""
        # Classes compete with one another, so all their columns are needed.
        if self.kind == "class":
            return out
        # A model may have more outputs than there are targets.
        if self.columns is None:
            return out[:, : y.shape[1]]
        # A view where it is possible: to gather columns, and to scatter their gradients, costs more.
        first, last = self.columns[0], self.columns[-1]
        if self.columns == tuple(range(first, last + 1)):
            return out[:, first : last + 1]
        return out[:, list(self.columns)]

    def losses(self, out: Tensor, y: Tensor) -> Losses:
        """Return the loss of each sample of outputs [B, C, *places]."""
        return self.loss(self.own(out, y), y, self.complete)

    def mean(self, out: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss of a batch: the mean over the targets that are there, by weights [B]."""
        # One fused call where it is possible: it is the loss of almost every step.
        if weights is None and self.complete and self.loss == PLAIN:
            return F.cross_entropy(out, y)
        return self.losses(out, y).mean(weights)

    def count(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return what the mean over a batch divides by: the sum over its targets of how much each counts."""
        there = self.loss.there(y)
        factors = self.loss.weight(torch.where(there, y, 0))
        counts = there.double() if factors is None else there * factors.double()
        each = counts if y.dim() == 1 else counts.flatten(1).sum(1)
        return each.sum() if weights is None else (each * weights).sum()


PLAIN = DEFAULTS["class"]
"""The loss of most tasks."""


@dataclass(frozen=True)
class LabelFrame:
    """What every output column means, for all agents of a schedule, in whatever order classes arrive."""

    labels: tuple[Label, ...]
    """The label of each column."""
    tasks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The columns of each task."""
    targets: Mapping[str, Target] = field(default_factory=lambda: {"": Target("class", PLAIN)})
    """What the targets are: under "" if all tasks are alike, else by task."""

    @property
    def kind(self) -> str:
        """The kind of all targets: "class", "value" or "labels"; "mixed" if they differ."""
        kinds = {target.kind for target in self.targets.values()}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def widened(self, source: Source) -> Source:
        """Return a source with all classes of its task, as later sources may have others than this one."""
        columns = self.tasks.get(source.task, ()) if source.task is not None else ()
        return source if set(columns) <= set(source.classes) else replace(source, classes=columns)

    def within(self, target: Target, task: str | None) -> tuple[int, ...] | None:
        """Return the columns that classes compete in: the task's own if it is known; None: all."""
        if target.kind != "class":
            return None
        return self.tasks.get(task, target.columns) if task is not None else target.columns

    def answer(
        self,
        out: Tensor,
        task: str | None = None,
        columns: Sequence[int] | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Return predictions from outputs [B, C, *places]: probabilities of classes and labels, or values.

        Classes compete in `columns`, by default those of the task, if it is given. Columns of other kinds of
        targets have answers of their own. A model may have more outputs than the `width` of the frame.
        """
        out = out[:, : len(self.labels) if width is None else width]
        if len(self.targets) == 1:
            (target,) = self.targets.values()
            among = None if target.kind != "class" else columns or self.within(target, task)
            return target.loss.answer(masked(out, among))

        # Each column is answered by the targets that it belongs to; columns of other tasks are 0.
        known = self.targets.get(task) if task is not None else None
        result = torch.zeros_like(out)
        for target in [known] if known is not None else self.targets.values():
            own = list(self.within(target, task) or target.columns or range(len(self.labels)))
            # Models with heads have -inf where there is no head yet: no column of the task is answered.
            unanswered = torch.isneginf(out[:, own]).all(1, keepdim=True)
            result[:, own] = target.loss.answer(torch.where(unanswered, 0, out[:, own]))
        return result

    def unused(self) -> list[Label]:
        """Return the labels that no task has."""
        used = {column for columns in self.tasks.values() for column in columns}
        return [label for column, label in enumerate(self.labels) if column not in used]

    def names(self, answer: Tensor, task: str | None = None) -> list[Any]:
        """Return what answers [B, C, *places] say by name: the likeliest class, or all labels from 0.5 on.

        None stands for an answer of zeros (unknown). A name that several label spaces have comes with its
        space. Raises ConsilienceError for values, and for several kinds of targets without a task.
        """
        known = self.targets.get(task) if task is not None else None
        chosen = list(self.targets.values()) if known is None else [known]
        kinds = {target.kind for target in chosen}
        if len(kinds) > 1 or "value" in kinds:
            raise ConsilienceError(
                f"predictions by name need classes or labels, got {', '.join(sorted(kinds))}; "
                f"{'give a `task`' if len(kinds) > 1 else 'values are numbers'}."
            )
        twice = Counter(name for _, name in self.labels)
        words = [f"{space}: {name}" if twice[name] > 1 else name for space, name in self.labels]

        # Classes come last, after the places, so that lists of lists have the form of the targets.
        rows = answer.movedim(1, -1)
        if kinds == {"class"}:
            among = self.within(chosen[0], task)
            best = masked(answer, among).argmax(1)
            found: list[Any] = _named(torch.where((rows != 0).any(-1), best, NONE).tolist(), words)
            return found
        columns = chosen[0].columns or range(len(words))
        held: list[Any] = _holding(rows.tolist(), [(column, words[column]) for column in columns])
        return held

    @property
    def column_of(self) -> dict[Label, int]:
        """The column of each label."""
        return {label: column for column, label in enumerate(self.labels)}

    def columns(self, labels: Sequence[Label]) -> Tensor:
        """Return the columns [k] of those labels in this frame."""
        where = self.column_of
        missing = [label for label in labels if label not in where]
        if missing:
            raise ConsilienceError(
                f"classes must be declared in the schedule's sources, got {missing[0]} that none has."
            )
        return torch.tensor([where[label] for label in labels], dtype=torch.long)


def file_sizes(dataset: Any, index: Tensor) -> Tensor | None:
    """Return what a dataset says of the sizes of its files at these indices [n]; None where it has none."""
    of = getattr(dataset, "file_sizes", None)
    found: Tensor | None = of(index) if callable(of) else None
    return found


def _named(numbers: Any, words: Sequence[str]) -> Any:
    """Return lists of class numbers as lists of words; None for no class."""
    if isinstance(numbers, list):
        return [_named(number, words) for number in numbers]
    return None if numbers == NONE else words[numbers]


def _holding(chances: Any, named: Sequence[tuple[int, str]]) -> Any:
    """Return for each list of probabilities the names of those that are 0.5 or more."""
    if isinstance(chances[0], list):
        return [_holding(own, named) for own in chances]
    return [word for column, word in named if chances[column] >= 0.5]


def masked(out: Tensor, columns: Sequence[int] | None, fill: float = -torch.inf) -> Tensor:
    """Return outputs [B, C, *places] with `fill` outside some columns; None or none: as they are."""
    if not columns:
        return out
    keep = torch.zeros(out.shape[1], dtype=torch.bool, device=out.device)
    keep[list(columns)] = True
    return out.masked_fill(~keep.view(-1, *[1] * (out.dim() - 2)), fill)


def inputs_of(given: Any, name: str) -> Input:
    """Return the inputs [N, ...] of a source, of examples, of a tensor or array, or of several by name.

    `name` is that of the argument, for errors.
    """
    if isinstance(given, Source):
        given = given.train
    if isinstance(given, Examples):
        return given.whole()[0]
    if isinstance(given, Tree | Mapping | tuple):
        return as_input(given, f"`{name}`")
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ConsilienceError(f"`{name}` must be inputs [N, ...] or a source, got {kind_of(given)}.") from e


def checked_inputs(given: object, name: str) -> Input:
    """Return inputs [N, ...], at least one and finite; refuse others by the argument's name."""
    if isinstance(given, Tree | Tensor):
        parts = tensors_of(given).values()
        shaped = isinstance(given, Tree) or given.dim() > 1
        if shaped and len(given) and all(bool(part.isfinite().all()) for part in parts):
            return given
    got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else kind_of(given)
    raise ConsilienceError(f"`{name}` must be finite inputs [N, ...], at least one, got {got}.")
