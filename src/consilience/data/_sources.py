"""How sources are made from arrays, datasets, folders and files."""

from __future__ import annotations

import io
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from consilience.core.checks import fraction, whole_number
from consilience.core.errors import ConsilienceError, kind_of, unknown
from consilience.core.losses import KINDS, NONE, loss_of, present
from consilience.core.params import key
from consilience.core.source import Examples, Kind, Label, Source, Stream, Tensors, at_places
from consilience.core.tree import (
    Input,
    Tree,
    as_input,
    as_tensor,
    one_tensor,
    part_of,
    signature,
    tensors_of,
    types,
    unit,
)
from consilience.core.warning import warn
from consilience.data._samples import (
    Pairs,
    channels_first,
    found_ragged,
    item_of,
    label_key,
    named_inputs,
    pair_of,
    same_target,
    spread,
)
from consilience.data._shares import draw


@dataclass(frozen=True)
class Options:
    """What every source has besides its examples; see `consilience.data.arrays`."""

    name: str
    test: Any = 0.2
    classes: Sequence[str] | None = None
    kind: Kind = "class"
    space: str | None = None
    validation: float = 0.1
    seed: int = 0
    loss: Any = None
    metric: Any = None
    augment: Any = None

    @property
    def label_space(self) -> str:
        """The label space: by default the name of the source."""
        return self.name if self.space is None else self.space

    def checked_kind(self) -> None:
        """Refuse kinds of targets that are not known."""
        if self.kind not in KINDS:
            raise ConsilienceError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        loss_of(self.loss, self.kind)


# Checks.


def inputs(value: Any, what: str) -> Input:
    """Check inputs, and return them as a tensor or tree [N, ...]."""
    if _is_text(value):
        raise ConsilienceError(f"{what} must be numbers, got text; `data.text` makes tokens of it.")
    x = as_input(value, what)
    if isinstance(x, Tensor):
        return _part(x, what)
    parts = {name: _part(part, part_of(what, name), 1) for name, part in x.parts.items()}
    return replace(x, parts=parts)


def _part(x: Tensor, what: str, least: int = 2) -> Tensor:
    """Check one tensor of inputs."""
    if x.dim() < least:
        raise ConsilienceError(
            f"{what} must have a dimension of examples and at least one more, got shape {tuple(x.shape)}."
        )
    if x.numel() == 0:
        raise ConsilienceError(f"{what} must not be empty, got shape {tuple(x.shape)}.")
    # Bytes are pixels where they form images [N, H, W] or [N, C, H, W]; elsewhere they may be tokens.
    x = unit(x, x.dim() > 2)
    _finite(x, what)
    return x


def targets(value: Any, kind: Kind, what: str) -> Tensor:
    """Check targets: class numbers [N, *places], values [N, k, *places], or labels [N, L, *places].

    Values and labels [N] get one output. What is missing is -100 among classes and NaN elsewhere.
    """
    if _is_text(value):
        first = np.asarray(value).flat[0]
        raise ConsilienceError(
            f"{what} must be numbers, got text such as {str(first)!r}; number the classes and name them with "
            "`classes`, or read a table with `data.table`."
        )
    if kind == "class":
        return _class_numbers(value, what)

    y = as_tensor(value, what)
    # A run in a shorter type converts values once, when it begins; labels are 0 or 1.
    y = y if y.dtype == torch.float64 and kind == "value" else y.to(torch.float32)
    if bool(torch.isinf(y).any()):
        raise ConsilienceError(
            f"{what} must be finite, got infinity in example {int(torch.isinf(y).nonzero()[0, 0])}."
        )
    y = y[:, None] if y.dim() == 1 else y
    if kind == "labels":
        y = y.masked_fill(y == NONE, torch.nan)
        wrong = ~(torch.isnan(y) | (y == 0) | (y == 1))
        if bool(wrong.any()):
            at = wrong.nonzero()[0]
            raise ConsilienceError(
                f"{what} must be 0 or 1 for each label (NaN: unknown), got {float(y[tuple(at)]):g} "
                f"in example {int(at[0])}."
            )
    return y


def _class_numbers(value: Any, what: str) -> Tensor:
    """Check class numbers [N, *places]; sequences of unequal length are padded with -100."""
    found = as_input(value, what)
    if isinstance(found, Tree):
        assert found.lengths is not None
        y = found.parts["0"]
        beyond = torch.arange(y.shape[1]) >= found.lengths[:, None]
        found = y.long().masked_fill(beyond, NONE) if not y.is_floating_point() else y
    # 1.0 may be a class read from a table or a value; rounding would hide the mistake.
    if found.is_floating_point():
        raise ConsilienceError(
            f'{what} must be class numbers of an integer type (or `kind="value"`), got dtype '
            f"{found.dtype}{_zeros_and_ones(found)}."
        )
    if found.dim() == 2 and found.shape[1] == 1:
        raise ConsilienceError(
            f"{what} must be class numbers [N] or [N, *places], got shape {tuple(found.shape)}; "
            "drop its last dimension."
        )
    return found.long()


def _zeros_and_ones(y: Tensor) -> str:
    """Return what to do with fractions [N, K] that are all 0 or 1; "" for others."""
    if y.dim() != 2 or not bool(((y == 0) | (y == 1)).all()):
        return ""
    return '; of one-hot rows give y.argmax(1), of several labels at once kind="labels"'


def _is_text(value: Any) -> bool:
    """Whether a value is text, or a sequence of texts."""
    if isinstance(value, str):
        return True
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "US" or (value.dtype == object and _is_text(value.flat[0]))
    return isinstance(value, list | tuple) and len(value) > 0 and _is_text(value[0])


def _finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity, and name the first example that has one."""
    if values.is_floating_point() and not torch.isfinite(values).all():
        bad = (~torch.isfinite(values)).flatten(1 if values.dim() > 1 else 0).reshape(len(values), -1).any(1)
        raise ConsilienceError(
            f"{what} must be finite, got NaN or infinity in example {int(bad.nonzero()[0])}."
        )


def _pair(x: Any, y: Any, kind: Kind, prefix: str) -> Tensors:
    """Check inputs and targets, and pair them; `prefix` comes before their names in errors."""
    pair = Tensors(inputs(x, f"`{prefix}x`"), targets(y, kind, f"`{prefix}y`"))
    # Torch would index both all the same, and pair examples with the wrong targets.
    if len(pair.x) != len(pair.y):
        raise ConsilienceError(
            f"`{prefix}x` and `{prefix}y` must be equally long, got {len(pair.x)} and {len(pair.y)}."
        )
    if kind == "class" and is_one_hot(pair.y) and pair.y.shape[1] not in sizes(pair.x):
        raise one_hot(f"`{prefix}y`", pair.y)
    _check_padding(pair, prefix)
    return pair


def _check_padding(pair: Tensors, prefix: str) -> None:
    """Refuse targets at places that a sequence does not have: they would be trained on."""
    x, y = pair.x, pair.y
    if isinstance(x, Tensor) or x.lengths is None or not at_places(x, y):
        return
    there = present(y).any(1) if y.is_floating_point() else present(y)
    # Other dimensions of places come before that of the sequence.
    while there.dim() > 2:
        there = there.any(1)
    wrong = there & (torch.arange(y.shape[-1]) >= x.lengths[:, None])
    if bool(wrong.any()):
        sample, place = wrong.nonzero()[0].tolist()
        none = "NaN" if y.is_floating_point() else NONE
        raise ConsilienceError(
            f"`{prefix}y` must be {none} beyond the end of a sequence, got a target at place {place} of "
            f"sample {sample}, which has {int(x.lengths[sample])} places."
        )


def one_hot(what: str, y: Tensor) -> ConsilienceError:
    """Return the error for targets that are one-hot rows."""
    return ConsilienceError(
        f"{what} must be class numbers, got one-hot rows [N, {y.shape[1]}]; give y.argmax(1), "
        'or kind="labels" where several labels may hold at once.'
    )


def is_one_hot(y: Tensor) -> bool:
    """Whether targets [N, K] have a single 1 in each row, and 0 elsewhere."""
    if y.dim() != 2 or y.shape[1] < 2:
        return False
    return bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())


def sizes(x: Input) -> set[int]:
    """Return the sizes of all dimensions of samples."""
    return {size for part in tensors_of(x).values() for size in part.shape[1:]}


class Labels(NamedTuple):
    """What every target means, and the targets that a source has."""

    labels: tuple[Label, ...]
    classes: tuple[int, ...]


def _labels(train: Tensor, test: Tensor, options: Options) -> Labels:
    """Return the labels of a source with these training and test targets."""
    classes = options.classes
    if classes is not None and (isinstance(classes, str) or len(set(classes)) != len(classes)):
        raise ConsilienceError(f"`classes` must be a list of different names, got {classes!r}.")
    if options.kind != "class":
        return _output_labels(train, test, options)

    used = torch.cat([train.flatten(), test.flatten()]).unique()
    used = used[present(used)]
    if not len(used):
        raise ConsilienceError(f"some target must be there, got -100 for all examples of {options.name!r}.")
    low, high = int(used[0]), int(used[-1])
    space = options.label_space
    if low < 0:
        raise ConsilienceError(f"class numbers must be 0 or more (-100: no target), got {low}.")
    if classes is None:
        # A label is made for every number up to the highest: ids of users as classes would take all memory.
        if high >= 1_000_000:
            raise ConsilienceError(f"class numbers must count up from 0, got {high}.")
        return Labels(tuple((space, str(i)) for i in range(high + 1)), tuple(used.tolist()))

    if high >= len(classes):
        raise ConsilienceError(
            f"class numbers must be in 0..{len(classes) - 1}, one for each of `classes`, got {high}."
        )
    return Labels(tuple((space, str(name)) for name in classes), tuple(range(len(classes))))


def _output_labels(train: Tensor, test: Tensor, options: Options) -> Labels:
    """Return the labels of a source of values or labels: one per output."""
    if train.shape[1:] != test.shape[1:]:
        raise ConsilienceError(
            "test targets must have as many outputs as training targets, "
            f"got {test.shape[1]} and {train.shape[1]}."
        )
    outputs = train.shape[1]
    names = options.classes
    if names is None:
        word = "value" if options.kind == "value" else "label"
        names = [word] if outputs == 1 else [f"{word}{i}" for i in range(outputs)]
    if len(names) != outputs:
        raise ConsilienceError(
            f"`classes` must name every output, got {len(names)} names for {outputs} outputs."
        )
    return Labels(tuple((options.label_space, str(name)) for name in names), tuple(range(outputs)))


def source_of(
    train: Examples, test: Examples | float, validation: Examples | float, options: Options
) -> Source:
    """Make a source from examples; where `test` or `validation` is a fraction, it is split off `train`."""
    name, seed = options.name, options.seed
    # Samples with several targets have no class of their own to be drawn by.
    by_class = options.kind == "class" and train.targets().dim() == 1
    # The test is split off first, so that it does not depend on `validation`.
    if not isinstance(test, Examples):
        of_train = train.targets()
        quota = round(test * len(of_train))
        drawn, rest = draw(of_train, quota, key(seed, name, "test"), by_class, spare=1)
        if not len(drawn) or not len(rest):
            raise ConsilienceError(
                "`test` must leave examples on both sides, "
                f"got {test} of {len(of_train)} examples of {name!r}."
            )
        train, test = train.select(rest), train.select(drawn)

    if not isinstance(validation, Examples):
        of_train = train.targets()
        quota = round(validation * len(of_train))
        drawn, rest = draw(of_train, quota, key(seed, name, "validation"), by_class, spare=1)
        train, validation = train.select(rest), train.select(drawn)

    # Classes that only the test has get a label too: every example of it counts in the score.
    seen = torch.cat([train.targets(), validation.targets()])
    labels, classes = _labels(seen, test.targets(), options)
    return Source(
        name,
        train,
        validation,
        test,
        labels,
        classes,
        kind=options.kind,
        loss=options.loss,
        metric=options.metric,
        augment=options.augment,
    )


# Tables.


def table(name: str, seed: int, image: bool = False) -> Source:
    """Load one of scikit-learn's tables."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    x = torch.tensor(data.data, dtype=torch.float32)
    if name == "diabetes":
        source = from_arrays(x, data.target, Options(name, kind="value", seed=seed))
        inputs = one_tensor(source.train.whole()[0], "a table")
        return source.map(x=_standard(inputs), y=_standard(source.train.targets()))

    # Digits are pixels from 0 to 16 on one scale; columns of the other tables have scales of their own.
    options = Options(name, classes=[str(label) for label in data.target_names], seed=seed)
    if name == "digits":
        return from_arrays(x.view(-1, 1, 8, 8) / 16 if image else x / 16, data.target, options)
    source = from_arrays(x, data.target, options)
    return source.map(x=_standard(one_tensor(source.train.whole()[0], "a table")))


def _standard(values: Tensor) -> Any:
    """Return a function that standardises each column by the statistics of these values."""
    mean, std = values.double().mean(0), values.double().std(0)
    # A constant column becomes 0, not NaN.
    std[std == 0] = 1
    return lambda batch: ((batch.double() - mean) / std).to(batch.dtype)


# Arrays.


def from_arrays(x: Any, y: Any, options: Options) -> Source:
    """See `consilience.data.arrays`."""
    options.checked_kind()
    if y is None:
        if isinstance(x, Tensor | np.ndarray | list | tuple):
            raise ConsilienceError("arrays need targets `y`, got none.")
        return from_dataset(x, 0, options)

    validation = fraction("validation", options.validation, zero=True)
    train = _pair(x, y, options.kind, "")
    test = options.test
    # A pair stands for given examples, anything else must be a fraction.
    if not isinstance(test, tuple | list):
        return source_of(train, fraction("test", test), validation, options)

    if len(test) != 2:
        raise ConsilienceError(f"`test` must be (x, y) or a fraction, got {len(test)} parts.")
    held = _pair(test[0], test[1], options.kind, "test ")
    train, held = _alike(train, held), _alike(held, train)
    if signature(held.x) != signature(train.x):
        raise ConsilienceError(
            "test examples must have the shape of training examples, "
            f"got {tuple(held.x.shape[1:])} and {tuple(train.x.shape[1:])}."
        )
    if types(held.x) != types(train.x):
        raise ConsilienceError(
            f"test inputs must be of the type of training inputs, got {held.x.dtype} and {train.x.dtype}."
        )
    return source_of(train, held, validation, options)


def _alike(pair: Tensors, other: Tensors) -> Tensors:
    """Return examples whose parts are ragged where those of others are: equal lengths may be chance."""
    x, like = pair.x, other.x
    if isinstance(like, Tensor) or not like.ragged or (isinstance(x, Tree) and x.ragged):
        return pair
    # One list of sequences is a tensor where they are equally long, and a tree where they are not.
    parts = {"0": x} if isinstance(x, Tensor) else x.parts
    lengths = {parts[name].shape[1] for name in like.ragged if name in parts and parts[name].dim() > 1}
    if parts.keys() != like.parts.keys() or len(lengths) != 1:
        return pair
    return replace(pair, x=Tree(parts, like.ragged, torch.full((len(x),), lengths.pop())))


def from_tasks(
    x: Any,
    targets: Mapping[str, Any],
    kinds: Mapping[str, Kind],
    classes: Mapping[str, Any],
    options: Options,
) -> list[Source]:
    """See `consilience.data.tasks`."""
    if not isinstance(targets, Mapping) or not targets:
        raise ConsilienceError(f"`targets` must be targets by task, got {kind_of(targets)}.")
    for what, named in (("kinds", kinds), ("classes", classes)):
        for task in named:
            if task not in targets:
                raise unknown(f"task of `{what}`", task, targets, "the tasks of `targets`")

    # Checked as pairs, with the same words as those of `arrays`.
    made = {
        task: replace(options, kind=kinds.get(task, "class"), classes=classes.get(task)) for task in targets
    }
    given, pairs = inputs(x, "`x`"), {}
    for task, own in made.items():
        own.checked_kind()
        try:
            pairs[task] = _pair(given, targets[task], own.kind, "")
        except ConsilienceError as error:
            raise ConsilienceError(f"in task {task!r}: {error}") from None

    # One split for all tasks: samples of one test are in no training set.
    share = fraction("validation", options.validation, zero=True)
    held, rest = draw(
        torch.zeros(len(given)),
        round(fraction("test", options.test) * len(given)),
        key(options.seed, options.name, "test"),
        stratified=False,
    )
    kept, train = draw(
        torch.zeros(len(rest)),
        round(share * len(rest)),
        key(options.seed, options.name, "validation"),
        stratified=False,
    )
    parts = {"train": rest[train], "validation": rest[kept], "test": held}
    if not len(held) or not len(parts["train"]):
        raise ConsilienceError(
            f"`test` must leave examples on both sides, got {options.test} of {len(given)} examples."
        )

    # The tasks hold the very same inputs, once in memory.
    shared = {part: given[index] for part, index in parts.items()}
    sources = []
    for task, own in made.items():
        name = f"{options.name}/{task}"
        examples: dict[str, Any] = {
            part: Tensors(shared[part], pairs[task].y[index]) for part, index in parts.items()
        }
        labels, columns = _labels(pairs[task].y, examples["test"].y, replace(own, name=name))
        sources.append(Source(name, **examples, labels=labels, classes=columns, task=task, kind=own.kind))
    return sources


# Datasets.


def check_dataset(dataset: Any) -> None:
    """Refuse what is no map-style dataset with examples."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConsilienceError(
            f"a dataset must be map-style, with len(dataset) and dataset[i], got {type(dataset).__name__}"
            f"{'; give its `dataset`' if hasattr(dataset, 'dataset') else '; put its samples into a list'}."
        )
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset))
        raise ConsilienceError(f"a dataset must be one split, got the splits {splits}; pass one of them.")
    if len(dataset) == 0:
        raise ConsilienceError("a dataset must not be empty, got 0 examples.")


def collect(dataset: Any, some: Mapping[int, Any], kind: Kind) -> Tensor:
    """Read the targets of a dataset: those it stores if they are those of `some` items, or one by one."""
    read = targets([_plain(pair_of(item)[1]) for item in some.values()], kind, "`y` of the dataset")
    for name, stored in _stored(dataset, some):
        try:
            y = targets(_plain(stored), kind, f"`{name}` of the dataset")
        except ConsilienceError:
            continue
        # Some datasets keep the targets of all splits, or those before a transform.
        rows = zip(some, read, strict=True)
        if len(y) == len(dataset) and all(same_target(y[i], target) for i, target in rows):
            return y

    # One after another, because the inputs of all may not fit in memory.
    every = (pair_of(some[i] if i in some else item_of(dataset, i))[1] for i in range(len(dataset)))
    return targets([_plain(target) for target in every], kind, "`y` of the dataset")


def _stored(dataset: Any, some: Mapping[int, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what may be the targets of all examples, with its name."""
    first = next(iter(some.values()))
    # A datasets.Dataset reads a column much faster than its rows.
    if isinstance(first, Mapping) and label_key(first) in getattr(dataset, "column_names", ()):
        yield label_key(first), list(dataset[label_key(first)])
    # An attribute holds targets before any transform.
    if getattr(dataset, "target_transform", None) is not None:
        return
    for name in ("targets", "labels"):
        stored = getattr(dataset, name, None)
        if stored is not None and not callable(stored) and hasattr(stored, "__len__"):
            yield name, stored


def _plain(y: Any) -> Any:
    """Return a target, or a list of them, as numbers."""
    if isinstance(y, list) and y and isinstance(y[0], Tensor):
        return [each.tolist() for each in y]
    return y.tolist() if hasattr(y, "tolist") else y


def _class_names(dataset: Any, some: Mapping[int, Any]) -> Sequence[str] | None:
    """Return the names that a datasets.Dataset declares for its classes."""
    features, first = getattr(dataset, "features", None), next(iter(some.values()))
    if not isinstance(features, Mapping) or not isinstance(first, Mapping):
        return None
    column = features.get(label_key(first))
    # Tags are a list of classes, which has its names inside.
    names = getattr(column, "names", None) or getattr(getattr(column, "feature", None), "names", None)
    return None if names is None else list(names)


def _streamed(dataset: Any, kind: Kind, workers: int) -> tuple[Stream, Sequence[str] | None]:
    """Return a dataset as a stream, and the names of its classes where it declares them."""
    check_dataset(dataset)
    some = {i: item_of(dataset, i) for i in spread(len(dataset))}
    names = _class_names(dataset, some) if kind == "class" else None
    y = collect(dataset, some, kind)

    pairs = Pairs(dataset, y)
    samples = [named_inputs(item, i) for i, item in some.items()]
    pairs.first = samples[0]
    pairs.ragged = found_ragged([pairs.alike(sample, i) for sample, i in zip(samples, some, strict=True)])
    if (
        kind == "class"
        and is_one_hot(y)
        and all(y.shape[1] not in part.shape for part in samples[0].values())
    ):
        raise one_hot("`y` of the dataset", y)
    return stream_of(pairs, workers), names


def stream_of(pairs: Pairs, workers: int) -> Stream:
    """Return a dataset with known targets as a stream."""
    return Stream(pairs, pairs.y, torch.arange(len(pairs)), workers)


def from_dataset(dataset: Any, workers: int, options: Options) -> Source:
    """See `consilience.data.stream`."""
    options.checked_kind()
    whole_number(0, workers=workers)
    validation = fraction("validation", options.validation, zero=True)
    share = fraction("test", options.test) if isinstance(options.test, int | float) else None
    train, names = _streamed(dataset, options.kind, workers)
    if options.classes is None and names is not None:
        options = replace(options, classes=names)
    if share is not None:
        return source_of(train, share, validation, options)

    test, _ = _streamed(options.test, options.kind, workers)
    # Sequences may be of one length in one of them by chance.
    ragged = train.dataset.ragged | test.dataset.ragged
    train.dataset.ragged = test.dataset.ragged = ragged
    first = [part.dataset.collate([part.dataset[0]])[0] for part in (train, test)]
    if signature(first[0]) != signature(first[1]):
        raise ConsilienceError(
            "test examples must have the shape of training examples, "
            f"got {tuple(first[1].shape[1:])} and {tuple(first[0].shape[1:])}."
        )
    return source_of(train, test, validation, options)


# Images.


SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Reading:
    """How image files are read; see `consilience.data.folder`."""

    size: int | tuple[int, int] | None = None
    grey: bool = False
    in_memory: bool = False
    workers: int = 0
    unreadable: str = "refuse"
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0

    def checked(self) -> Reading:
        """Check the options, and return them with height and width as `size`."""
        if self.unreadable not in ("refuse", "skip"):
            raise ConsilienceError(f"`unreadable` must be 'refuse' or 'skip', got {self.unreadable!r}.")
        whole_number(0, workers=self.workers)
        pillow()
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        if size is not None and (
            len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size)
        ):
            raise ConsilienceError(f"`size` must be one or two whole numbers >= 1, got {self.size!r}.")
        channels = 1 if self.grey else 3
        for name, given in (("mean", self.mean), ("std", self.std)):
            numbers = np.atleast_1d(np.asarray(given, dtype=object)).tolist()
            right = all(isinstance(x, int | float) and np.isfinite(x) for x in numbers)
            if not right or len(numbers) not in (1, channels) or (name == "std" and min(numbers) <= 0):
                raise ConsilienceError(
                    f"`{name}` must be one{' positive' if name == 'std' else ''} number, or one for each of "
                    f"{channels} channels, got {given!r}."
                )
        return replace(self, size=size)

    @property
    def normalised(self) -> Normalised | None:
        """What images in [0, 1] go through; None if they stay as they are."""
        mean, std = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in (self.mean, self.std))
        return None if bool((mean == 0).all() and (std == 1).all()) else Normalised(mean, std)


@dataclass(frozen=True, eq=False)
class Normalised:
    """(x - mean) / std of images [N, C, H, W], with one number per channel [C, 1, 1]."""

    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the images, normalised."""
        return (x - self.mean.to(x)) / self.std.to(x)


def pillow() -> Any:
    """Return PIL's Image module; an error says how to install it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConsilienceError(
            "reading images needs pillow, which is not installed: pip install 'consilience[vision]'."
        ) from error
    return Image


def picture(file: Any, what: str, mode: str | None, size: tuple[int, int] | None = None) -> Tensor:
    """Read one image as bytes [C, H, W]; `mode` None keeps grey as it is and makes all else RGB."""
    image_module = pillow()
    try:
        with image_module.open(file) as image:
            image = image.convert(mode or ("L" if image.mode == "L" else "RGB"))
            if size and image.size != size[::-1]:
                image = image.resize(size[::-1], image_module.Resampling.BILINEAR)
            return channels_first(np.asarray(image))
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        # Pillow's own text for an unknown format names an object in memory.
        reason = str(error).splitlines()[0] if str(error) else ""
        if not reason or "cannot identify" in str(error):
            reason = "no image that pillow knows"
        raise ConsilienceError(f"cannot read the image {what}: {reason}.") from error


class Images:
    """The image files of a folder, read when they are asked for."""

    def __init__(self, paths: list[Path], mode: str, size: tuple[int, int] | None):
        self.paths, self.mode, self.size = paths, mode, size
        self.first: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        # The size of the first file counts, whichever is read first: the order decides nothing.
        image = self._read(i)
        if self.first is None:
            self.first = image.shape if i == 0 else self._read(0).shape
        if image.shape != self.first:
            sizes = ["x".join(map(str, shape[1:])) for shape in (self.first, image.shape)]
            raise ConsilienceError(
                f"images must have one size, got {sizes[0]} in {self.paths[0]} "
                f"and {sizes[1]} in {self.paths[i]}; pass `size` to resize them."
            )
        return image

    def file_sizes(self, index: Tensor) -> Tensor:
        """Return the sizes in bytes [n] of the files at these indices [n]."""
        return torch.tensor([self.paths[i].stat().st_size for i in index.tolist()])

    def _read(self, i: int) -> Tensor:
        """Read one image as bytes [C, H, W]."""
        return picture(self.paths[i], str(self.paths[i]), self.mode, self.size)


def pictures(files: list[Path], y: Tensor, reading: Reading) -> Tensors | Stream:
    """Read image files with classes [N], at once or when needed; `reading` must be checked."""
    if reading.unreadable == "skip":
        files, y = _readable(files, y)
    size = None if reading.size is None or isinstance(reading.size, int) else reading.size
    images = Images(files, "L" if reading.grey else "RGB", size)
    if reading.in_memory:
        return Tensors(unit(torch.stack([images[i] for i in range(len(images))]), True), y)
    return stream_of(Pairs(images, y), reading.workers)


def _readable(files: list[Path], y: Tensor) -> tuple[list[Path], Tensor]:
    """Return the readable files with their classes; a warning names the others."""
    bad: dict[int, Path] = {}
    # Decoded completely: a truncated file has a valid header.
    for i, path in enumerate(files):
        try:
            picture(path, str(path), None)
        except ConsilienceError:
            bad[i] = path
    if not bad:
        return files, y
    if len(bad) == len(files):
        raise ConsilienceError(f"cannot read any of {len(files)} images; the first is {files[0]}.")

    names = ", ".join(str(path) for path in list(bad.values())[:3])
    others = f" and {len(bad) - 3} more" if len(bad) > 3 else ""

    warn(f"{len(bad)} of {len(files)} images cannot be read and are left out: {names}{others}")
    keep = torch.tensor([i for i in range(len(files)) if i not in bad])
    return [files[i] for i in keep.tolist()], y[keep]


def same_size(train: Examples, test: Examples) -> None:
    """Refuse test images of another size than the training images."""
    shapes = [tuple(next(examples.chunks(1))[0].shape[1:]) for examples in (test, train)]
    if shapes[0] != shapes[1]:
        raise ConsilienceError(
            f"test images must have the size of training images, got {shapes[0]} and {shapes[1]}; "
            "pass `size` to resize them."
        )


def image_folder(path: str | Path) -> Path:
    """Return the path; refuse it if it is not a folder."""
    path = Path(path)
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing"
        raise ConsilienceError(f"`path` must be a folder of images, got {got} at {path}.")
    return path


def from_folder(path: str | Path, reading: Reading, options: Options) -> Source:
    """See `consilience.data.folder`."""
    path = image_folder(path)
    reading = reading.checked()
    folders = {folder.name: folder for folder in subfolders(path)}
    root = folders.get("train", path)

    # "test" and "val" may be names of classes, unless there is "train" next to them.
    parts = folders if "train" in folders else {}
    test_folder = parts.get("test")
    validation_folder = next((parts[name] for name in ("val", "valid", "validation") if name in parts), None)
    classes = [folder.name for folder in subfolders(root)]
    if not classes:
        raise ConsilienceError(
            f"a folder of images must have a subfolder for each class, got none in {root}."
        )

    def read(folder: Path) -> Examples:
        return pictures(*_class_files(folder, classes), reading)

    train = read(root)
    test = read(test_folder) if test_folder else fraction("test", options.test)
    if isinstance(test, Examples):
        same_size(train, test)
    if validation_folder:
        validation: Examples | float = read(validation_folder)
    else:
        validation = fraction("validation", options.validation, zero=True)
    return source_of(train, test, validation, replace(options, classes=classes)).map(x=reading.normalised)


def subfolders(path: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones."""
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _class_files(path: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    """Return the image files below a folder, class by class, and their classes."""
    files: list[Path] = []
    y: list[int] = []
    for folder in subfolders(path):
        if folder.name not in classes:
            raise ConsilienceError(f"class folders must be those of train, got {folder.name!r} in {path}.")
        own = sorted(file for file in folder.rglob("*") if is_image(file))
        if not own:
            raise ConsilienceError(f"a class folder must have images, got none in {folder}.")
        files += own
        y += [classes.index(folder.name)] * len(own)
    if not files:
        raise ConsilienceError(
            f"a folder of images must have a subfolder for each class, got none in {path}."
        )
    return files, torch.tensor(y)


# Files of arrays.


BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What reading a damaged .npz file raises, besides Python's own errors."""


def find(name: str | Path) -> Path:
    """Find the file for a path, or for a name in the folder of data."""
    path = Path(name)
    # "mnist" is a name; "mnist.npz" and "data/mnist" are paths.
    if path.suffix == ".npz" or len(path.parts) > 1 or not str(name):
        if not path.is_file():
            raise ConsilienceError(f"`name` must be a readable .npz file, got none at {path}.")
        return path

    folder = os.environ.get("CONSILIENCE_DATA")
    if not folder:
        raise ConsilienceError(
            f"no folder to find {str(name)!r} in: CONSILIENCE_DATA is not set; set it, or give a path."
        )
    if not Path(folder).is_dir():
        raise ConsilienceError(f"CONSILIENCE_DATA must name a folder, got {folder}.")
    known = {file.stem: file for file in Path(folder).glob("*.npz")}
    if not known:
        raise ConsilienceError(f"CONSILIENCE_DATA must name a folder with .npz files, got none in {folder}.")
    if str(name) not in known:
        raise unknown("name", str(name), known)
    return known[str(name)]


class Archive(NamedTuple):
    """The arrays of an .npz file that make a source."""

    path: Path
    arrays: dict[str, np.ndarray]
    images: str
    """Which of the file's images are read."""
    coded: bool
    """Whether images are JPEG files, end to end."""

    def targets(self, part: str) -> Tensor:
        """Return the classes [N] of one part."""
        y = targets(self.arrays[f"{part}_labels"], "class", f"{part}_labels of {self.path}")
        if self.coded:
            count = len(self.arrays[f"{part}_offsets"]) - 1
        else:
            count = len(self.arrays[f"{part}_{self.images}"])
        if len(y) != count:
            raise ConsilienceError(
                f"images and labels must be equally many, got {count} and {len(y)} ({part}) in {self.path}."
            )
        return y

    def inputs(self, part: str, chosen: Tensor) -> Tensor:
        """Return the images [N, C, H, W] of one part at these indices."""
        if not self.coded:
            return _channels(self.arrays[f"{part}_{self.images}"][chosen.numpy()], self.path)
        jpeg, offsets = self.arrays[f"{part}_jpeg"], self.arrays[f"{part}_offsets"]
        return _decode(jpeg, offsets, chosen.tolist(), f"{part} image", self.path)


def from_npz(
    name: str | Path,
    flat: bool,
    limit: int | None,
    images: str,
    space: str | None,
    validation: float,
    seed: int,
    augment: Any = None,
) -> Source:
    """See `consilience.data.npz`."""
    path = find(name)
    if limit is not None:
        whole_number(limit=limit)
    # Before the file is read, which may take seconds.
    fraction("validation", validation, zero=True)
    archive = _archive(path, images)
    pairs = {}
    for part in ("train", "test"):
        y = archive.targets(part)
        chosen = torch.arange(len(y))
        if part == "train" and limit is not None and limit < len(y):
            chosen, _ = draw(y, limit, key(seed, path.stem, "limit"), stratified=True)
        x = archive.inputs(part, chosen)
        pairs[part] = (x.flatten(1) if flat else x, y[chosen])

    x, y = pairs["train"]
    # Declared, so that the source has every class, also those of which a small `limit` takes no example.
    if "class_names" in archive.arrays:
        classes = [str(label) for label in archive.arrays["class_names"]]
    else:
        classes = [str(i) for i in range(int(torch.cat([y, pairs["test"][1]]).max()) + 1)]
    options = Options(path.stem, pairs["test"], classes, space=space, validation=validation, seed=seed)
    return from_arrays(x, y, replace(options, augment=augment))


def _archive(path: Path, images: str) -> Archive:
    """Read the arrays of an .npz file that are needed."""
    parts = ("train", "test")
    wanted = {f"{part}_{field}" for part in parts for field in (images, "labels", "jpeg", "offsets")}
    try:
        _check_archive(path)
        # A pickle in the file could run code.
        with np.load(path, allow_pickle=False) as file:
            held = set(file.files)
            arrays = {name: file[name] for name in sorted((wanted | {"class_names"}) & held)}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, RuntimeError, *BROKEN) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConsilienceError(f"cannot read {path} as .npz: {reason}") from error

    coded = images == "images" and "train_jpeg" in arrays
    fields = ("jpeg", "offsets", "labels") if coded else (images, "labels")
    needed = [f"{part}_{field}" for part in parts for field in fields]
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ConsilienceError(
            f"an .npz file must have {', '.join(needed)}, "
            f"got no {missing[0]} in {path}, but {', '.join(sorted(held))}."
        )
    return Archive(path, arrays, images, coded)


ROOM, RATIO = 1 << 30, 200
"""Bytes that any archive may unpack to, and how many times its own size larger ones may."""


def _check_archive(path: Path) -> None:
    """Refuse an archive whose arrays would take memory that its size does not justify, before it is read."""
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in (member for member in archive.infolist() if member.filename.endswith(".npy")):
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    read = np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            # The array is made from its header, before a byte of it is read.
            claimed = math.prod(shape) * dtype.itemsize
            if claimed > member.file_size and not dtype.hasobject:
                raise ValueError(f"{member.filename} claims {claimed:,} bytes of {member.file_size:,}")
            total += member.file_size

    if total > max(ROOM, RATIO * path.stat().st_size):
        raise ValueError(f"it would unpack to {total:,} bytes, more than {RATIO} times its size")


def _channels(x: np.ndarray, path: Path) -> Tensor:
    """Convert images [N, H, W] or [N, H, W, C] to [N, C, H, W]; rows [N, n] stay."""
    images = unit(as_tensor(x, f"images of {path}"), True)
    if images.dim() == 3:
        return images[:, None]
    if images.dim() == 4 and images.shape[-1] in (1, 3, 4):
        return images.permute(0, 3, 1, 2).contiguous()
    return images


def _decode(jpeg: np.ndarray, offsets: np.ndarray, chosen: list[int], what: str, path: Path) -> Tensor:
    """Decode the chosen images of JPEG files laid end to end, to bytes [N, C, H, W]."""
    # Slices beyond the end would give shorter files without any error.
    cuts = np.asarray(offsets)
    if (
        cuts.dtype.kind not in "iu"
        or cuts.ndim != 1
        or cuts[0] != 0
        or cuts[-1] != len(jpeg)
        or (np.diff(cuts.astype(np.int64)) <= 0).any()
    ):
        raise ConsilienceError(
            f"JPEG offsets must rise from 0 to {len(jpeg)}, the number of bytes, got others in {path}."
        )
    images = [
        picture(io.BytesIO(jpeg[cuts[i] : cuts[i + 1]].tobytes()), f"{what} {i} of {path}", None)
        for i in chosen
    ]
    for i, image in zip(chosen, images, strict=True):
        if image.shape != images[0].shape:
            raise ConsilienceError(f"images must have one size, got another in {what} {i} of {path}.")
    return torch.stack(images)
