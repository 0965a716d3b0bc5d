"""Reading tables: files, frames and mappings as named columns of numbers or of text."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from consilience.core.errors import ConsilienceError, kind_of

Column = np.ndarray
"""Numbers, float64 [N] with NaN for missing ones, or texts, objects [N] with None for missing ones."""

MISSING = frozenset({"na", "n/a", "#n/a", "<na>", "nan", "null", "none"})
"""Words, in any case, that stand for a missing number in a file of text; an empty cell always does."""

AT_ONCE = 50_000
"""Lines of a file whose cells are held as text at once."""


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of one length."""

    columns: Mapping[str, Column]
    what: str
    """What the table is called in errors."""
    lines: np.ndarray | None = None
    """The line of each row in its file; None: rows have no lines, and count from 0."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of classes, of columns that hold their numbers."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def where(self, row: int) -> str:
        """Say where a row is, for errors."""
        return f"row {row} of {self.what}" if self.lines is None else f"line {self.lines[row]} of {self.what}"

    def rows(self, index: np.ndarray) -> Table:
        """Return the table with the rows at these indices."""
        columns = {name: values[index] for name, values in self.columns.items()}
        return replace(self, columns=columns, lines=None if self.lines is None else self.lines[index])


def read(rows: Any, what: str, texts: Collection[str] = ()) -> Table:
    """Read a table: a file, a DataFrame, a datasets.Dataset, or a mapping from names to columns.

    Args:
        rows: the table.
        what: what it is called in errors, such as "`rows`".
        texts: columns that hold text, even where it looks like numbers.

    Raises:
        ConsilienceError: no such file, no rows, columns without a name or with the same name, a column of
            text and numbers, cells that are neither.
    """
    if isinstance(rows, str | Path):
        table = _read_file(Path(rows), what, texts)
    else:
        names, column = _columns_of(rows, what)
        _check_names(names, what)
        table = Table({}, what, classes=_class_names(rows))
        columns = {name: _from_objects(column(name), name, table, name in texts) for name in names}
        table = replace(table, columns=columns)

    counts = {name: len(values) for name, values in table.columns.items()}
    if len(set(counts.values())) > 1:
        raise ConsilienceError(f"columns of {what} must be equally long, got {counts}.")
    if not counts or not len(table):
        raise ConsilienceError(f"{what} must have rows, got none.")
    return table


def _columns_of(rows: Any, what: str) -> tuple[list[Any], Callable[[Any], Any]]:
    """Return the names of the columns of an object, and the function that gets one."""
    if isinstance(rows, Mapping):
        splits = [str(name) for name, part in rows.items() if hasattr(part, "column_names")]
        if splits:
            raise ConsilienceError(
                f"{what} must be one table, got the splits {', '.join(splits)}; "
                f"pass one, such as dataset[{splits[0]!r}]."
            )
        return list(rows), rows.__getitem__

    # A datasets.Dataset and a table of pyarrow have `column_names`, frames of pandas and polars `columns`.
    names = getattr(rows, "column_names", None)
    if names is None:
        names = getattr(rows, "columns", None)
    if names is None or not hasattr(rows, "__getitem__"):
        raise ConsilienceError(
            f"{what} must be a file, a DataFrame, a datasets.Dataset or a mapping from names to columns, "
            f"got {kind_of(rows)}."
        )
    # Without its format, a Dataset gives plain numbers instead of tensors.
    plain = rows.with_format(None) if hasattr(rows, "with_format") else rows
    return list(names), plain.__getitem__


def _class_names(rows: Any) -> dict[str, Sequence[str]]:
    """Return the names that the columns of a datasets.Dataset declare for class numbers."""
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping):
        return {}
    return {name: list(own.names) for name, own in features.items() if getattr(own, "names", None)}


def _check_names(names: Sequence[Any], what: str) -> None:
    """Refuse columns without a name, and columns of one name."""
    # Programs that read such a file rename the second column, or lose the first.
    seen = set()
    for name in names:
        if name in seen:
            raise ConsilienceError(f"columns of {what} must have different names, got {name!r} twice.")
        seen.add(name)
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None:
        raise ConsilienceError(f"names of columns of {what} must be text, got {odd!r}; rename the column.")


def _from_objects(values: Any, name: str, table: Table, as_text: bool) -> Column:
    """Return a column of `table` from an array or from a sequence of numbers and texts."""
    known = table.classes.get(name)
    if hasattr(values, "__array__"):
        values = np.asarray(values)
        if values.ndim != 1:
            raise ConsilienceError(
                f"column {name!r} of {table.what} must have one value per row, got shape {values.shape}."
            )
        # Without a look at each value: frames may have millions of rows.
        if values.dtype.kind in "biuf" and not as_text and known is None:
            return _no_infinity(values.astype(np.float64), name, table)

    # Arrow has lists of its own.
    listed = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
    cells: list[float | str | None] = []
    for row, value in enumerate(listed):
        cell = cell_of(value)
        if cell is NotImplemented:
            raise ConsilienceError(
                f"column {name!r} must hold numbers or text, got {kind_of(value)} in {table.where(row)}; "
                "make numbers or text of it, or leave it out with `ignore`."
            )
        # datasets writes -1 for a label that is not known.
        if known is not None and isinstance(cell, float):
            cell = known[int(cell)] if 0 <= cell < len(known) else None
        cells.append(cell)
    return _column(cells, name, table, as_text or known is not None)


def cell_of(value: Any) -> Any:
    """Return a value as a number, as a text or as None if it is missing; NotImplemented for anything else."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    # A truth is 0 or 1 among inputs, and has a name of its own among labels.
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Real) or type(value).__name__ == "Decimal":
        number = float(value)
        return None if math.isnan(number) else number
    return NotImplemented


def _column(cells: list[Any], name: str, table: Table, as_text: bool) -> Column:
    """Return a column from cells that are numbers, texts or None; a column of both is refused."""
    if as_text:
        return np.array([None if cell is None else as_name(cell) for cell in cells], dtype=object)
    text = next((row for row, cell in enumerate(cells) if isinstance(cell, str)), None)
    if text is None:
        numbers = np.array([np.nan if cell is None else float(cell) for cell in cells], dtype=np.float64)
        return _no_infinity(numbers, name, table)

    number = next((row for row, cell in enumerate(cells) if isinstance(cell, float | bool)), None)
    if number is not None:
        raise mixed(name, (cells[text], table.where(text)), (cells[number], table.where(number)))
    return np.array(cells, dtype=object)


def as_name(value: Any) -> str:
    """Return a number or text as the name of a class, a category or a group.

    >>> as_name(3.0), as_name(0.5), as_name(True), as_name("x")
    ('3', '0.5', 'True', 'x')
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def mixed(name: str, text: tuple[str, str], number: tuple[float, str]) -> ConsilienceError:
    """Return the error for a column that holds a text and a number; each comes with its place."""
    return ConsilienceError(
        f"column {name!r} must be all numbers or all text, got {text[0]!r} in {text[1]} and "
        f"{as_name(number[0])} in {number[1]}; correct it, or name the column in `categories`."
    )


def _no_infinity(numbers: Column, name: str, table: Table) -> Column:
    """Refuse infinite numbers."""
    if np.isinf(numbers).any():
        where = table.where(int(np.isinf(numbers).argmax()))
        raise ConsilienceError(f"column {name!r} must be finite, got infinity in {where}.")
    return numbers


# Files.


def _read_file(path: Path, what: str, texts: Collection[str]) -> Table:
    """Read a table from a file, by its suffix."""
    if not path.is_file():
        raise ConsilienceError(f"{what} must be a readable file, got none at {path}.")
    # By the suffix: what a wrong guess of the format gives looks like data.
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return replace(read(_parquet(path), str(path), texts), what=str(path))
    if suffix not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        raise ConsilienceError(
            f"{what} must be a .csv, .tsv, .jsonl or .parquet file, got {path.name}; save it as .csv."
        )
    try:
        # Spreadsheets begin a file with a mark, which would be part of the first name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            return (_read_csv if suffix in (".csv", ".tsv") else _read_lines)(file, path, texts)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConsilienceError(f"cannot read {path}: {error}.") from error


def _parquet(path: Path) -> Any:
    """Return a parquet file as a table of pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConsilienceError(
            "reading parquet needs pyarrow, which is not installed: pip install pyarrow."
        ) from error
    try:
        return parquet.read_table(path)
    except (OSError, ArrowException) as error:
        raise ConsilienceError(f"cannot read {path} as .parquet: {str(error).splitlines()[0]}") from error


def _read_csv(file: Any, path: Path, texts: Collection[str]) -> Table:
    """Read a file of comma-separated values; semicolons, tabs and bars separate too."""
    header = file.readline()
    file.seek(0)
    # The separator that makes most columns of the header; commas win ties.
    separator = max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    reader = csv.reader(file, delimiter=separator, strict=True)
    names = [name.strip() for name in next(reader, [])]
    if not any(names):
        raise ConsilienceError(f"{path} must have a line of column names, got an empty file.")
    _check_names(names, str(path))

    # Many lines at once: the text of all cells of a large file would need ten times its memory.
    parts: list[list[Column]] = [[] for _ in names]
    lines: list[int] = []
    for rows, numbers in _batches(reader, len(names), path):
        lines += numbers
        for name, column, cells in zip(names, parts, zip(*rows, strict=True), strict=True):
            column.append(_texts(cells) if name in texts else _from_texts(cells))
    if not lines:
        raise ConsilienceError(f"{path} must have rows, got none below the column names.")

    table = Table({}, str(path), np.array(lines))
    columns = {
        name: np.concatenate(column) if name in texts else _joined(name, column, table)
        for name, column in zip(names, parts, strict=True)
    }
    return replace(table, columns=columns)


def _batches(reader: Any, width: int, path: Path) -> Iterator[tuple[list[list[str]], list[int]]]:
    """Yield rows of cells and their lines, many at a time; a row of another width is refused."""
    cells: list[list[str]] = []
    lines: list[int] = []
    for row in reader:
        # Empty lines are no rows, as in other readers.
        if not row:
            continue
        # Python's reader would pair cells with the wrong columns.
        if len(row) != width:
            raise ConsilienceError(
                f"every row of {path} must have {width} cells, got {len(row)} in line {reader.line_num}."
            )
        cells.append([cell.strip() for cell in row])
        lines.append(reader.line_num)
        if len(cells) == AT_ONCE:
            yield cells, lines
            cells, lines = [], []
    if cells:
        yield cells, lines


def number_of(text: str) -> float | None:
    """Return the number that a text is, or None; NaN for an empty text or a word for missing numbers.

    >>> number_of("1e3"), number_of("1_000"), number_of("n/a"), number_of("abc")
    (1000.0, None, nan, None)
    """
    # Python reads underscores, other programs do not.
    if not text or text.lower() in MISSING:
        return math.nan
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _texts(cells: Sequence[str]) -> Column:
    """Return texts as a column; only an empty cell is missing."""
    # One object per different text, because categories repeat.
    seen: dict[str, str] = {}
    return np.array([seen.setdefault(cell, cell) if cell else None for cell in cells], dtype=object)


def _from_texts(cells: Sequence[str]) -> Column:
    """Return a part of a column: numbers if all cells are numbers or missing, and some number is there."""
    numbers: Sequence[float | None]
    try:
        # Most columns of numbers have nothing else; this is five times as fast.
        numbers = [math.nan if not cell else float(cell) for cell in cells]
    except ValueError:
        numbers = [None]
    if None in numbers or "_" in "".join(cells):
        numbers = [number_of(cell) for cell in cells]
    if None in numbers:
        return _texts(cells)
    found = np.array(numbers, dtype=np.float64)
    # Words such as NA may be missing numbers or categories: the other parts of the column say which.
    return _texts(cells) if np.isnan(found).all() else found


def _joined(name: str, parts: Sequence[Column], table: Table) -> Column:
    """Return a column from its parts, all of numbers or all of texts."""
    cells = [cell for part in parts if part.dtype == object for cell in part.tolist() if cell is not None]
    # Neither a number nor a word for a missing one.
    text = next((cell for cell in cells if number_of(cell) is None), None)
    if text is None:
        numbers = [np.full(len(part), np.nan) if part.dtype == object else part for part in parts]
        return _no_infinity(np.concatenate(numbers), name, table)

    column = np.concatenate([part.astype(object) for part in parts])
    for row, cell in enumerate(column.tolist()):
        value = number_of(cell) if isinstance(cell, str) else cell
        if value is not None and not math.isnan(value):
            raise mixed(name, (text, table.where(column.tolist().index(text))), (value, table.where(row)))
    # A comma would make a category of every number.
    if all(number_of(cell.replace(",", ".", 1)) is not None for cell in cells):
        raise ConsilienceError(
            f"numbers must have a decimal point, got {text!r} in column {name!r} of {table.what}; "
            "write points, or name the column in `categories`."
        )
    return column


def _read_lines(file: Iterable[str], path: Path, texts: Collection[str]) -> Table:
    """Read a file with one JSON object per line."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ConsilienceError(f"every line of {path} must be JSON, got line {line}: {error}.") from error
        if not isinstance(row, dict):
            raise ConsilienceError(
                f'every line of {path} must be an object such as {{"age": 3}}, got {kind_of(row)} in '
                f"line {line}."
            )
        rows.append(row)
        lines.append(line)
    if not rows:
        raise ConsilienceError(f"{path} must have rows, got an empty file.")

    # Lines may leave out what is missing.
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table({}, str(path), np.array(lines))
    columns = {
        name: _from_objects([row.get(name) for row in rows], name, table, name in texts) for name in names
    }
    return replace(table, columns=columns)
