"""Numbers as people read them, and tables of results as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from consilience.core.errors import ConsilienceError
from consilience.core.names import clean

if TYPE_CHECKING:
    from consilience.loop.result import Result

PERCENT = ("accuracy", "auroc", "balanced_accuracy", "f1", "iou", "top_k")
"""Metrics that are written in percent, whatever their arguments."""
TRAITS = ("setting", "data", "model", "metric", "repeats")
"""Fields that describe a result, next to its method."""
COST_COLUMNS = ("MACs", "bytes", "time")
"""Columns of a comparison that are costs."""


def number(value: float | None, percent: bool = False, digits: int | None = None) -> str:
    """Write a score: in percent with one digit, or plain with three; "-" for None.

    >>> number(0.9731, percent=True), number(0.9731), number(None), number(float("nan"))
    ('97.3', '0.973', '-', 'nan')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(float(value))
    if percent:
        text = f"{100 * value:.{1 if digits is None else digits}f}"
    else:
        text = f"{value:.{3 if digits is None else digits}f}" if abs(value) < 1e5 else f"{value:.3g}"

    # A small negative number rounds to "-0.0", which would look like a loss.
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def human(value: float | None, unit: str = "") -> str:
    """Write an amount with three digits and a prefix.

    >>> human(1234567), human(999_999, "B"), human(12, "B"), human(None)
    ('1.23 M', '1.00 MB', '12 B', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    # 999.5 rounds to 1000, which has the next prefix.
    for power, prefix in enumerate(("", "k", "M", "G", "T", "P", "E")):
        scaled = value / 1000**power
        if abs(scaled) < 999.5 or prefix == "E":
            break

    # 9.996 rounds to 10.0, so the digits are those of the rounded number.
    digits = max(0, 2 - int(math.log10(max(1.0, abs(scaled) * 1.0005))))
    if not power and value == int(value):
        digits = 0
    return f"{scaled:.{digits}f} {prefix}{unit}".strip()


def duration(seconds: float | None) -> str:
    """Write a time in seconds, minutes or hours.

    >>> duration(3.21), duration(75), duration(3725), duration(None)
    ('3.2 s', '1 min 15 s', '1 h 02 min', '-')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    # 59.95 s rounds to 60.0 s, which is a minute.
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def in_percent(metric: str) -> bool:
    """Whether scores of a metric are written in percent.

    >>> in_percent("top_k(k=3)"), in_percent("mse")
    (True, False)
    """
    return metric.partition("(")[0] in PERCENT


def titled(result: Result) -> str:
    """Write the metric of a result as a heading: with its unit, and its direction where less is better."""
    notes = ["%"] * in_percent(result.metric) + ["(less is better)"] * (result.direction is False)
    return " ".join([clean(result.metric), *notes])


def by_metric(results: Sequence[Result]) -> list[Result]:
    """Return one result per metric, those of a run one after another."""
    return [single for result in results for single in result.by_metric()]


def score(result: Result) -> str:
    """Write the mean score and, where there are repeats, the standard deviation."""
    percent = in_percent(result.metric)
    text = number(result.score, percent)
    return f"{text} ± {number(result.score_std, percent)}" if result.repeats > 1 else text


def figured(result: Result, name: str) -> str:
    """Write a number of a result that has the unit of its scores, with its deviation over repeats."""
    percent, spread = in_percent(result.metric), result.deviation(name)
    text = number(result.figure(name), percent)
    return text if spread is None else f"{text} ± {number(spread, percent)}"


def trait(result: Result, name: str) -> str:
    """Write one field that describes a result."""
    return clean(getattr(result, name))


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, one cell per row, and whether it is aligned on the right."""

    name: str
    cells: list[str]
    right: bool = True
    scores: bool = False
    """Whether it has the score of each result."""


class Comparison(NamedTuple):
    """What all results have in common, and the columns for the rest."""

    agreed: dict[str, str]
    columns: list[Column]


def columns(results: Sequence[Result]) -> Comparison:
    """Compare results: what they have in common, and one column per thing that differs.

    >>> agreed, found = columns([example(), example("er")])
    >>> agreed["setting"], [column.name for column in found][:3]
    ('continual', ['method', 'accuracy %', 'forgetting'])
    """
    if not results:
        raise ConsilienceError("a table needs at least one result.")
    # What is equal for all stands above the table, once.
    agreed, found = {}, [Column("method", [clean(result.method) for result in results], False)]
    for name in TRAITS:
        cells = [trait(result, name) for result in results]
        if len(set(cells)) == 1:
            agreed[name] = cells[0]
        else:
            found.append(Column(name, cells, name == "repeats"))

    # The unit stands in the heading if it is the same for all, else in each cell.
    percent = [in_percent(result.metric) for result in results]
    same = "metric" in agreed
    title = titled(results[0]) if same else "score"
    units = ["" if same or not flag else " %" for flag in percent]
    scores = [score(result) + unit for result, unit in zip(results, units, strict=True)]
    found.append(Column(title, scores, scores=True))
    for name in ("forgetting", "backward_transfer", "forward_transfer"):
        cells = [figured(result, name) for result in results]
        # Forward transfer means something in few settings.
        if name != "forward_transfer" or set(cells) != {"-"}:
            found.append(Column(name.replace("_", " "), cells))

    # What is learned at several stages, as in rounds, is forgotten too: after whichever stage it was best.
    if any(result.figure("forgetting") is None or result.local for result in results):
        found.append(
            Column("global forgetting", [figured(result, "global_forgetting") for result in results])
        )
    if any(result.local or result.personal for result in results):
        found += client_columns(results, percent)
    if any(result.mapper is not None for result in results):
        found.append(Column("mapper %", [number(result.mapper_accuracy, True) for result in results]))
    found.append(Column("MACs", [human(result.costs.get("macs")) for result in results]))
    found.append(Column("bytes", [human(result.costs.get("bytes"), "B") for result in results]))
    found.append(Column("time", [duration(result.costs.get("seconds")) for result in results]))
    return Comparison(agreed, [column for column in found if column.scores or set(column.cells) != {"-"}])


def numbers(values: Sequence[float | None], percent: Sequence[bool]) -> list[str]:
    """Write the cells of a column of scores."""
    return [number(value, flag) for value, flag in zip(values, percent, strict=True)]


def client_columns(results: Sequence[Result], percent: Sequence[bool]) -> list[Column]:
    """Make the columns for runs in which clients were judged."""
    # The mean over clients, each on its own test data.
    personal = [
        sum(result.personal.values()) / len(result.personal) if result.personal else None
        for result in results
    ]
    shown: dict[str, list[float | None]] = {
        "worst tenth": [result.figure("worst") for result in results],
        "spread": [result.spread for result in results],
        "local forgetting": [result.figure("local_forgetting") for result in results],
        "personal": personal,
    }
    return [Column(name, numbers(values, percent)) for name, values in shown.items()]


def heading(agreed: dict[str, str]) -> str:
    """Write what all results have in common on one line."""
    parts = []
    for name, value in agreed.items():
        plural = "s" * (value != "1")
        parts.append(f"{value} repeat{plural}" if name == "repeats" else f"{name} {value}")
    return ", ".join(parts)


def rows_of(found: Sequence[Column]) -> list[tuple[str, ...]]:
    """Return the rows below the heading."""
    return list(zip(*(column.cells for column in found), strict=True))


def grid(found: Sequence[Column]) -> str:
    """Write columns as aligned lines.

    >>> print(grid([Column("name", ["a", "bc"], False), Column("n", ["1", "10"])]))
    name   n
    ----  --
    a      1
    bc    10
    """
    widths = [max(map(len, [column.name, *column.cells])) for column in found]
    rows = [[column.name for column in found], ["-" * width for width in widths], *rows_of(found)]
    lines = []
    for row in rows:
        cells = zip(row, widths, found, strict=True)
        aligned = (text.rjust(width) if column.right else text.ljust(width) for text, width, column in cells)
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def short(text: object, length: int) -> str:
    """Cut a name in the middle, because both its kind and its number are at the ends.

    >>> short("permuted-mnist/17", 10)
    'permu…t/17'
    """
    text = clean(text)
    keep = length - 1
    return text if len(text) <= length else f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}"


def matrix_columns(
    result: Result, most_columns: int | None = None, most_rows: int | None = None
) -> list[Column]:
    """Make columns of the matrix of a result: stages down, sources across.

    More than `most_columns` or `most_rows` are cut in the middle.
    """
    percent, matrix = in_percent(result.metric), result.matrix
    rows = kept(len(matrix), most_rows)
    stages = ["(start)", *map(clean, result.stages)]
    if most_rows is not None:
        stages = [short(stage, 20) for stage in stages]
    sources = [clean(name) if most_columns is None else short(name, 14) for name in result.sources]

    found = [Column("stage", ["..." if row is None else stages[row] for row in rows], False)]
    for column in kept(len(result.sources), most_columns):
        if column is None:
            found.append(Column("...", ["..."] * len(rows)))
            continue
        cells = ["..." if row is None else number(float(matrix[row, column]), percent) for row in rows]
        found.append(Column(sources[column], cells))
    return found


def kept(count: int, most: int | None) -> list[int | None]:
    """List the places of a long row that are shown, with None for those left out.

    >>> kept(9, 5)
    [0, 1, None, 7, 8]
    """
    if most is None or count <= most:
        return list(range(count))
    return [*range(most - most // 2 - 1), None, *range(count - most // 2, count)]


def table(results: Sequence[Result]) -> str:
    """Write results as plain text, one row for each of their metrics; for a single result also the matrices.

    >>> print(table([example()]))
    setting continual, data digits, model MLP, metric accuracy, 2 repeats
    method  accuracy %  forgetting  backward transfer  forward transfer    MACs    bytes   time
    ------  ----------  ----------  -----------------  ----------------  ------  -------  -----
    ewc     75.0 ± 7.1  40.0 ± 0.0        -40.0 ± 0.0        10.0 ± 0.0  1.20 M  3.40 kB  2.5 s
    <BLANKLINE>
    accuracy % after each stage (rows), on each source (columns)
    stage    digits/0  digits/1
    -------  --------  --------
    (start)       0.0      20.0
    first       100.0      30.0
    second       60.0      90.0
    """
    shown = by_metric(results)
    agreed, found = columns(shown)
    text = "\n".join(filter(None, [heading(agreed), grid(found)]))
    if len(results) > 1:
        return text

    # A terminal has room for a dozen columns.
    for result in shown:
        title = f"{titled(result)} after each stage (rows), on each source (columns)"
        text += f"\n\n{title}\n{grid(matrix_columns(result, 12, 20))}"
    return text


def markdown(results: Sequence[Result]) -> str:
    """Write results as a Markdown table, one row for each of their metrics.

    >>> print(markdown([example()]).splitlines()[-1])
    | ewc | 75.0 ± 7.1 | 40.0 ± 0.0 | -40.0 ± 0.0 | 10.0 ± 0.0 | 1.20 M | 3.40 kB | 2.5 s |
    """
    agreed, found = columns(by_metric(results))
    rows = [
        [column.name for column in found],
        ["--:" if column.right else ":--" for column in found],
        *rows_of(found),
    ]
    lines = ["| " + " | ".join(map(safe, row)) + " |" for row in rows]
    return "\n".join([safe(heading(agreed)), "", *lines] if agreed else lines)


def safe(text: str) -> str:
    """Escape what has a meaning in a cell of Markdown."""
    # The backslash comes first: later ones are those that escape.
    for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("&", "&amp;"), ("<", "&lt;")):
        text = text.replace(plain, escaped)
    return text


def cell(text: str) -> str:
    """Write a cell for a spreadsheet, which would compute a name that begins as a formula does.

    >>> cell("=1+1"), cell("-2*3"), cell("-25.0")
    ("'=1+1", "'-2*3", '-25.0')
    """
    is_safe = text[:1] not in tuple("=+-@") or _NUMBER.fullmatch(text)
    return text if is_safe else f"'{text}"


_NUMBER = re.compile(r"-?(\d[\d.]*(e[+-]?\d+)?)?( ± [\d.]+)?( ?%)?")


def example(method: str = "ewc") -> Result:
    """Make a small result for the examples in these docstrings."""
    import numpy as np

    from consilience.loop.result import Result

    mean = np.array([[0.0, 0.2], [1.0, 0.3], [0.6, 0.9]])
    # The last score differs between the repeats, so that the deviation is not 0.
    change = 0.1 * (mean == 0.9)
    return Result(
        setting="continual",
        data="digits",
        method=method,
        model="MLP",
        metric="accuracy",
        seed=0,
        sources=("digits/0", "digits/1"),
        stages=("first", "second"),
        learned_at=(1, 2),
        matrices=np.stack([mean + change, mean - change]),
        costs={"macs": 1_200_000, "bytes": 3_400, "seconds": 2.5},
    )
