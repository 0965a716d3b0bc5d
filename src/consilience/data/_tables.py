"""Tables as sources: numbers are standardised, texts are one-hot, and labels are classes by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from consilience.core.checks import fraction
from consilience.core.errors import ConsilienceError, unknown
from consilience.core.losses import NONE
from consilience.core.source import Examples, Kind, Source, Tensors
from consilience.data._reading import Column, Table, as_name, cell_of, number_of, read
from consilience.data._sources import Options, source_of

FEW = 20
"""Whole numbers with at most so many different values may be classes or values: a user must say which."""

CATEGORIES = 1000
"""Categories that one column may have."""

NO_DEVIATION = 1e-12
"""A standard deviation of less than this part of the mean is rounding: the column is constant."""


# What columns mean.


def names_of(argument: str, given: Any) -> tuple[str, ...]:
    """Return the names of columns, from one name or several."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConsilienceError(f"`{argument}` must be the name of a column, or several, got {given!r}.")
    return tuple(names)


@dataclass(frozen=True)
class Roles:
    """What the columns of a table are for; see `consilience.data.table`."""

    targets: tuple[str, ...]
    group: str | None = None
    ignore: tuple[str, ...] = ()
    categories: Any = None
    missing: Any = "refuse"
    standardise: str = "inputs"

    def checked(self) -> Roles:
        """Refuse options that are none."""
        # A word in the place of a number would be taken for a policy.
        number = isinstance(self.missing, int | float) and not isinstance(self.missing, bool)
        if self.missing not in ("refuse", "mean", "drop") and not (number and math.isfinite(self.missing)):
            raise ConsilienceError(
                f"`missing` must be 'refuse', 'mean', 'drop' or a number, got {self.missing!r}."
            )
        if self.standardise not in ("inputs", "all", "none"):
            raise ConsilienceError(
                f"`standardise` must be 'inputs', 'all' or 'none', got {self.standardise!r}."
            )
        return self

    @property
    def declared(self) -> dict[str, Sequence[Any] | None]:
        """The columns that are categories, each with those that were declared."""
        if isinstance(self.categories, Mapping):
            return dict(self.categories)
        return dict.fromkeys(names_of("categories", self.categories or ()))

    def inputs(self, table: Table) -> list[str]:
        """Return the names of the input columns, after a check of all names."""
        groups = [] if self.group is None else names_of("group", (self.group,))
        if not self.targets:
            raise ConsilienceError("`target` must be the name of a column, or several, got none.")
        # A name that is none of the columns would leave a column in, or a target out.
        named = {"target": self.targets, "group": groups, "ignore": self.ignore, "categories": self.declared}
        for argument, names in named.items():
            for name in names:
                if name not in table.columns:
                    raise unknown(argument, name, table.columns, "the columns")

        inputs = [name for name in table.columns if name not in (*self.targets, *groups, *self.ignore)]
        if not inputs:
            raise ConsilienceError(f"{table.what} must have a column besides the targets, got none.")
        if "" in inputs:
            raise ConsilienceError(
                f"every column of {table.what} must have a name, got none for column "
                f"{list(table.columns).index('') + 1}; an index may be left out with ignore=['']."
            )
        return inputs


@dataclass(frozen=True)
class Inputs:
    """How columns become inputs [N, d]: numbers as they are, and categories as one column each."""

    names: tuple[str, ...]
    """The columns, in the order of the training data."""
    categories: Mapping[str, tuple[str, ...]]
    """The categories of each column of text."""

    @property
    def numeric(self) -> Tensor:
        """Which of the inputs [d] are numbers."""
        return torch.tensor([name not in self.categories for name in self.columns])

    @property
    def columns(self) -> list[str]:
        """The column that each of the inputs [d] is made of."""
        return [name for name in self.names for _ in self.categories.get(name, ("",))]

    def of(self, table: Table) -> Tensor:
        """Return the inputs [N, d] in float64, NaN where a value is missing."""
        blocks = [self._block(table, name) for name in self.names]
        return torch.from_numpy(np.concatenate(blocks, 1))

    def _block(self, table: Table, name: str) -> np.ndarray:
        """Return the inputs [N, k] that one column becomes."""
        values = table.columns[name]
        if name not in self.categories:
            return values[:, None]

        # A category is 1 in its own input and 0 in the others; a missing one is unknown in all of them.
        places = {category: i for i, category in enumerate(self.categories[name])}
        block = np.zeros((len(values), len(places)))
        for row, value in enumerate(values.tolist()):
            if value is None:
                block[row] = np.nan
            elif value not in places:
                raise ConsilienceError(
                    f"column {name!r} must have one of its {len(places)} known categories, got {value!r} in "
                    f"{table.where(row)}; declare it in categories={{{name!r}: [...]}}."
                )
            else:
                block[row, places[value]] = 1
        return block


def inputs_of(table: Table, roles: Roles) -> Inputs:
    """Find the categories of the text columns of a table."""
    # Of all rows, also of those that a fraction sets apart for the test: a rare category may be there alone.
    names = roles.inputs(table)
    found = {}
    for name in names:
        values = table.columns[name]
        if values.dtype != object:
            continue
        declared = roles.declared.get(name)
        if declared is not None:
            found[name] = tuple(dict.fromkeys(as_name(cell_of(value)) for value in declared))
            continue

        own = ordered({value for value in values.tolist() if value is not None})
        # Names, dates and free text differ in almost every row: they are no categories.
        if len(own) > CATEGORIES or (len(own) > 50 and len(own) > len(table) / 2):
            raise ConsilienceError(
                f"column {name!r} must have few categories, got {len(own)} different texts in {len(table)} "
                f"rows, such as {own[0]!r}; leave it out with ignore=[{name!r}], or make tokens of it with "
                "`data.text`."
            )
        found[name] = tuple(own)
    return Inputs(tuple(names), found)


def ordered(names: Iterable[str]) -> list[str]:
    """Return names sorted: as numbers if all are, else as text.

    >>> ordered({"10", "9"}), ordered({"b", "10", "9"})
    (['9', '10'], ['10', '9', 'b'])
    """
    values = {name: number_of(name) for name in names}
    if all(value is not None and value == value for value in values.values()):
        return sorted(values, key=lambda name: (values[name], name))
    return sorted(values)


def numbered(
    names: Sequence[str | None], classes: Sequence[Any] | None, where: Callable[[int], str]
) -> tuple[Tensor, list[str]]:
    """Return the class numbers [N] of names, and the classes: those declared, or all names in order.

    None is no target (-100). Raises ConsilienceError for a name that is not declared; `where` says where it
    is.

    >>> numbered(["no", "yes", None], None, str)
    (tensor([   0,    1, -100]), ['no', 'yes'])
    """
    if classes is None:
        known = ordered({name for name in names if name is not None})
    else:
        known = [as_name(cell_of(name)) for name in classes]
    # By name: the order of the rows decides nothing.
    numbers = {name: i for i, name in enumerate(known)}
    for row, name in enumerate(names):
        if name is not None and name not in numbers:
            listed = ", ".join(known[:9]) + (", ..." if len(known) > 9 else "")
            raise ConsilienceError(
                f"labels must be among the classes {listed}, got {name!r} in {where(row)}."
            )
    return torch.tensor([NONE if name is None else numbers[name] for name in names]), known


# Sources.


def from_table(rows: Any, roles: Roles, kind: Kind | None, options: Options) -> Source | list[Source]:
    """See `consilience.data.table`."""
    roles = roles.checked()
    validation = fraction("validation", options.validation, zero=True)
    given = options.test
    share = fraction("test", given) if isinstance(given, int | float) else None

    # Text stays text where it names something: a label "01" is not the number 1.
    texts = {*roles.declared, *([] if roles.group is None else [roles.group])}
    alone = len(roles.targets) == 1
    if kind == "class" or (kind is None and alone and options.classes is not None):
        texts |= set(roles.targets)
    table = read(rows, "`rows`", texts)
    encoding = inputs_of(table, roles)
    kind = kind or _kind_of(table, roles, options)
    held = None if share is not None else _test_table(given, table, roles)
    options = replace(options, kind=kind)
    options.checked_kind()

    # What is missing is refused or left out before anything is counted.
    tables = [_complete(part, roles, encoding) for part in (table, held) if part is not None]
    targets, classes = _targets(tables, roles, options)
    options = replace(options, classes=classes)
    pairs = [Tensors(encoding.of(part), y) for part, y in zip(tables, targets, strict=True)]
    if roles.group is None:
        made = [source_of(pairs[0], pairs[1] if held is not None else share or 0.0, validation, options)]
    else:
        made = _by_group(tables, pairs, share, validation, replace(options, space=options.label_space), roles)
    made = standardised(made, encoding, roles)
    return made[0] if roles.group is None else made


def _kind_of(table: Table, roles: Roles, options: Options) -> Kind:
    """Return the kind of the targets by what their columns hold."""
    columns = [table.columns[name] for name in roles.targets]
    if any(column.dtype == object for column in columns):
        if len(columns) > 1:
            raise ConsilienceError(
                f"several target columns must be numbers, got text in {_first_text(table, roles)!r}; "
                "give one column of labels, or one source per target."
            )
        return "class"

    values = np.unique(np.concatenate([column[~np.isnan(column)] for column in columns]))
    if len(columns) > 1:
        return "labels" if np.isin(values, (0, 1)).all() else "value"
    # 0 and 1 may be two classes or two values; a wrong guess would train with another loss, silently.
    if len(values) <= FEW and (values == values.round()).all():
        raise ConsilienceError(
            f"the kind of whole numbers must be given, got {len(values)} different ones in the target "
            f'{roles.targets[0]!r}; say kind="class" or kind="value".'
        )
    return "value"


def _first_text(table: Table, roles: Roles) -> str:
    return next(name for name in roles.targets if table.columns[name].dtype == object)


def _test_table(test: Any, table: Table, roles: Roles) -> Table:
    """Read test data, which must have the columns of the training data."""
    # What is text in the training data is text here, even if all of it looks like numbers.
    texts = [name for name, column in table.columns.items() if column.dtype == object]
    held = read(test, "`test`", texts)
    wanted = [*roles.inputs(table), *roles.targets]
    for name in wanted:
        if name not in held.columns:
            raise ConsilienceError(
                f"test data must have the columns of the training data, got none called {name!r} in "
                f"{held.what}."
            )
        # A column of text among numbers would become categories of its own.
        column = held.columns[name]
        if column.dtype == object and table.columns[name].dtype != object:
            row = next(row for row, value in enumerate(column.tolist()) if value is not None)
            raise ConsilienceError(
                f"column {name!r} must be numbers as in the training data, got {column[row]!r} in "
                f"{held.where(row)}."
            )
    return held


def _complete(table: Table, roles: Roles, encoding: Inputs) -> Table:
    """Return a table without the rows that `missing` leaves out; refuse what is missing where it must."""
    gone = {name: _missing(table.columns[name]) for name in encoding.names}
    targets = {name: _missing(table.columns[name]) for name in roles.targets}
    groups = np.full(len(table), "") if roles.group is None else table.columns.get(roles.group)
    if groups is not None and _missing(groups).any():
        raise ConsilienceError(
            f"every row must have a group, got none for column {roles.group!r} in "
            f"{table.where(int(_missing(groups).argmax()))}."
        )
    for name, missing in (gone | targets).items() if roles.missing == "refuse" else ():
        if missing.any():
            raise ConsilienceError(
                f"every value must be there, got none for column {name!r} in "
                f"{table.where(int(missing.argmax()))}; complete it, or choose missing='mean', 'drop' or a "
                "number."
            )

    # A row without any target teaches nothing; some of several may be missing.
    left_out = np.all(list(targets.values()), 0)
    if roles.missing == "drop":
        left_out |= np.any(list(gone.values()), 0)
    if groups is None:
        groups = np.full(len(table), "")
    lost = set(groups) - set(groups[~left_out])
    if lost:
        whose = f" of group {min(lost)!r}" if roles.group is not None and lost != {""} else ""
        raise ConsilienceError(f"some row of {table.what} must be complete, got none{whose}.")
    return table.rows(np.flatnonzero(~left_out)) if left_out.any() else table


def _missing(column: Column) -> np.ndarray:
    """Return where a column [N] has no value."""
    texts = column.dtype != np.float64
    flags = [value is None for value in column.tolist()] if texts else np.isnan(column)
    return np.array(flags, dtype=bool)


def _targets(tables: Sequence[Table], roles: Roles, options: Options) -> tuple[list[Tensor], Sequence[Any]]:
    """Return the targets of each table, and the names of classes or outputs."""
    if options.kind != "class":
        texts = [name for name in roles.targets if tables[0].columns[name].dtype == object]
        if texts:
            raise ConsilienceError(
                f"targets of kind {options.kind!r} must be numbers, got text in column {texts[0]!r}."
            )
        found = [torch.tensor(np.stack([t.columns[name] for name in roles.targets], 1)) for t in tables]
        for table, y in zip(tables, found, strict=True):
            _zero_or_one(table, y, roles, options)
        # Labels are 0 or 1, for which float32 is enough.
        found = found if options.kind == "value" else [y.to(torch.float32) for y in found]
        return found, options.classes or roles.targets

    if len(roles.targets) > 1:
        raise ConsilienceError(f"classes must be one target column, got {', '.join(roles.targets)}.")
    name = roles.targets[0]
    declared = options.classes
    if isinstance(declared, str) or (declared is not None and len(set(declared)) != len(declared)):
        raise ConsilienceError(f"`classes` must be a list of different names, got {declared!r}.")
    names = [table.columns[name].tolist() for table in tables]
    counts = np.cumsum([0, *map(len, names)])

    # All tables together, so that the classes of the test have a number too.
    def where(row: int) -> str:
        part = int(np.searchsorted(counts, row, "right")) - 1
        return tables[part].where(row - int(counts[part]))

    classes = declared if declared is not None else tables[0].classes.get(name)
    y, known = numbered([label for part in names for label in part], classes, where)
    return list(y.split([len(part) for part in names])), known


def _zero_or_one(table: Table, y: Tensor, roles: Roles, options: Options) -> None:
    """Refuse labels that are neither 0 nor 1."""
    wrong = ~(torch.isnan(y) | (y == 0) | (y == 1))
    if options.kind == "labels" and wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ConsilienceError(
            f"labels must be 0 or 1, got {float(y[row, column]):g} for column {roles.targets[column]!r} in "
            f"{table.where(row)}."
        )


def _by_group(
    tables: Sequence[Table],
    pairs: Sequence[Tensors],
    share: float | None,
    validation: float,
    options: Options,
    roles: Roles,
) -> list[Source]:
    """Return one source per group, all with the same labels."""
    assert roles.group is not None
    train = tables[0].columns[roles.group]
    names = ordered(set(train.tolist()))
    held = tables[1].columns.get(roles.group) if len(tables) > 1 else None
    if held is not None:
        only = set(held.tolist()) ^ set(names)
        if only:
            raise ConsilienceError(
                f"test data must have the groups of the training data, got {min(only)!r} in one of them only."
            )

    made = []
    for name in names:
        own = pairs[0].select(_rows_of(train, name))
        test: Examples | float = share or 0.0
        # A test without groups is common to all.
        if share is None:
            test = pairs[1] if held is None else pairs[1].select(_rows_of(held, name))
        made.append(source_of(own, test, validation, replace(options, name=f"{options.name}/{name}")))
    return made


def _rows_of(column: Column, name: str) -> Tensor:
    """Return the rows of one group."""
    return torch.from_numpy(np.flatnonzero(column == name))


# Statistics.


class Sums(NamedTuple):
    """What clients would send so that all columns [d] are standardised alike: numbers that add up."""

    counts: Tensor
    """How many values are there."""
    total: Tensor
    """Their sum, or the sum of their squared differences from the common mean."""


def sums(x: Tensor, centre: Tensor | None = None) -> Sums:
    """Return counts and sums of the columns of x [N, d]; with a centre [d], sums of squared differences.

    >>> sums(torch.tensor([[1.0], [3.0], [torch.nan]])).total
    tensor([4.], dtype=torch.float64)
    """
    there = ~torch.isnan(x)
    values = x.double() if centre is None else (x.double() - centre).square()
    return Sums(there.sum(0), values.masked_fill(~there, 0).sum(0))


def moments(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [d] of columns that several clients hold, from their sums.

    In two rounds: sums give the common mean, and sums of squared differences from it the deviation. Plain
    sums of squares would lose all digits of a column whose mean is far larger than its deviation. The
    deviation of a constant column, and of one with a single value, is 0.

    >>> moments([torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    (tensor([3.], dtype=torch.float64), tensor([2.6458], dtype=torch.float64))
    """
    firsts = [sums(part) for part in parts]
    count = torch.stack([first.counts for first in firsts]).sum(0)
    mean = torch.stack([first.total for first in firsts]).sum(0) / count
    squares = torch.stack([sums(part, mean).total for part in parts]).sum(0)
    deviation = (squares / (count - 1).clamp_min(1)).sqrt()
    return mean, deviation.masked_fill(deviation <= NO_DEVIATION * mean.abs(), 0)


def standardised(sources: Sequence[Source], encoding: Inputs, roles: Roles) -> list[Source]:
    """Fill and standardise inputs [N, d] by the training rows of all sources together."""
    trains = [source.train.whole() for source in sources]
    inputs = [x for x, _ in trains if isinstance(x, Tensor)]
    mean, deviation = moments(inputs)
    # Squares of huge values overflow, and all of the column would become 0.
    huge = deviation.nan_to_num(0, posinf=torch.inf).isinf()
    if bool(huge.any()):
        name = encoding.columns[int(huge.nonzero()[0])]
        raise ConsilienceError(f"values of a column must be below 1e150, got larger ones in {name!r}.")
    if bool(mean.isnan().any()) and roles.missing == "mean":
        name = encoding.columns[int(mean.isnan().nonzero()[0])]
        raise ConsilienceError(
            f"a column must have a value in some training row, got none in {name!r}; "
            f"leave it out with ignore=[{name!r}]."
        )

    mean, numeric = mean.nan_to_num(0), encoding.numeric
    fill = mean if roles.missing == "mean" else mean.new_zeros(())
    if not isinstance(roles.missing, str):
        # A number stands for a number; a missing category is none of the categories.
        fill = torch.where(numeric, float(roles.missing), 0.0).double()
    shift, scale = _affine(mean, deviation, numeric & (roles.standardise != "none"))
    through = Scaled(fill, shift, scale)
    if roles.standardise != "all" or sources[0].kind != "value":
        return [source.map(x=through) for source in sources]

    of_y = moments([y for _, y in trains])
    of_targets = Scaled(None, *_affine(*of_y, torch.ones_like(of_y[0], dtype=torch.bool)))
    return [source.map(x=through, y=of_targets) for source in sources]


def _affine(mean: Tensor, deviation: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shift and the factor of each column [d]: 0 and 1 for those that are not chosen."""
    # The factor of a constant column is 0, so that it becomes 0 and nothing that test data have there counts.
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)
    return torch.where(chosen, mean, 0.0), torch.where(chosen, scale, 1.0)


@dataclass(frozen=True, eq=False)
class Scaled:
    """(x - shift) * scale for each column [d], in float64; what is missing is filled first."""

    fill: Tensor | None
    shift: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values [N, d]."""
        wide = x.double()
        if self.fill is not None:
            wide = torch.where(wide.isnan(), self.fill, wide)
        return (wide - self.shift) * self.scale
