"""Numbers as people read them, and tables of results as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from consilience.core.errors import ConsilienceError

if TYPE_CHECKING:
    from consilience.loop.result import Result

PERCENT = ("accuracy", "auroc")
FACTS = ("setting", "data", "model", "metric", "repeats")


def clean(text: object) -> str:
    r"""A name on one line, without control characters.

    >>> clean("two\nlines \x1b[31m")
    'two lines [31m'
    """
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())


def number(value: float | None, percent: bool = False, digits: int | None = None) -> str:
    """A score: in percent with one digit, or plain with three; "-" for None.

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
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def human(value: float | None, unit: str = "") -> str:
    """An amount with three digits and a prefix.

    >>> human(1234567), human(999_999, "B"), human(12, "B"), human(None)
    ('1.23 M', '1.00 MB', '12 B', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    for power, prefix in enumerate(("", "k", "M", "G", "T", "P", "E")):
        scaled = value / 1000**power
        if abs(scaled) < 999.5 or prefix == "E":
            break
    digits = (
        0
        if not power and value == int(value)
        else max(0, 2 - int(math.log10(max(1.0, abs(scaled) * 1.0005))))
    )
    return f"{scaled:.{digits}f} {prefix}{unit}".strip()


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours.

    >>> duration(3.21), duration(75), duration(3725), duration(None)
    ('3.2 s', '1 min 15 s', '1 h 02 min', '-')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    return (
        f"{whole // 60} min {whole % 60:02d} s"
        if whole < 3600
        else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def score(result: Result) -> str:
    """Mean and, where there are repeats, standard deviation."""
    percent = result.metric in PERCENT
    text = number(result.score, percent)
    return f"{text} ± {number(result.score_std, percent)}" if result.repeats > 1 else text


def fact(result: Result, name: str) -> str:
    return clean(getattr(result, name))


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, a cell for each result, and whether it is of numbers."""

    name: str
    cells: list[str]
    right: bool = True


def columns(results: Sequence[Result]) -> tuple[dict[str, str], list[Column]]:
    """What all results agree on, and the columns for the rest.

    >>> agreed, found = columns([example(), example("er")])
    >>> agreed["setting"], [c.name for c in found][:3]
    ('continual', ['method', 'accuracy %', 'forgetting'])
    """
    if not results:
        raise ConsilienceError("a table should have at least one result. Found none.")
    agreed, out = {}, [Column("method", [clean(r.method) for r in results], False)]
    for name in FACTS:
        cells = [fact(r, name) for r in results]
        if len(set(cells)) == 1:
            agreed[name] = cells[0]
        else:
            out.append(Column(name, cells, name == "repeats"))
    percent = [r.metric in PERCENT for r in results]
    heading = f"{agreed['metric']}{' %' if percent[0] else ''}" if "metric" in agreed else "score"
    unit = ["" if "metric" in agreed or not p else " %" for p in percent]
    out.append(Column(heading, [score(r) + u for r, u in zip(results, unit, strict=True)]))
    for name in ("forgetting", "backward_transfer", "forward_transfer"):
        out.append(
            Column(
                name.replace("_", " "),
                [number(getattr(r, name), p) for r, p in zip(results, percent, strict=True)],
            )
        )
    if any(r.local or r.personal for r in results):
        shown: dict[str, list[float | None]] = {
            "worst tenth": [r.worst() for r in results],
            "spread": [r.spread for r in results],
            "local forgetting": [r.local_forgetting for r in results],
            "global forgetting": [r.global_forgetting for r in results],
            "personal": [sum(r.personal.values()) / len(r.personal) if r.personal else None for r in results],
        }
        out += [
            Column(n, [number(v, p) for v, p in zip(values, percent, strict=True)])
            for n, values in shown.items()
        ]
    if any(r.mapper is not None for r in results):
        out.append(Column("mapper %", [number(r.mapper_accuracy, True) for r in results]))
    out.append(Column("MACs", [human(r.costs.get("macs")) for r in results]))
    out.append(Column("bytes", [human(r.costs.get("bytes"), "B") for r in results]))
    out.append(Column("time", [duration(r.costs.get("seconds")) for r in results]))
    return agreed, out


def heading(agreed: dict[str, str]) -> str:
    """What all results agree on, on one line."""
    parts = [f"{n} {v}" if n != "repeats" else f"{v} repeat{'s' * (v != '1')}" for n, v in agreed.items()]
    return ", ".join(parts)


def grid(found: Sequence[Column]) -> str:
    """Columns as aligned lines.

    >>> print(grid([Column("name", ["a", "bc"], False), Column("n", ["1", "10"])]))
    name   n
    ----  --
    a      1
    bc    10
    """
    widths = [max(map(len, [c.name, *c.cells])) for c in found]
    rows = [
        [c.name for c in found],
        ["-" * w for w in widths],
        *map(list, zip(*(c.cells for c in found), strict=True)),
    ]
    lines = (
        "  ".join(t.rjust(w) if c.right else t.ljust(w) for t, w, c in zip(r, widths, found, strict=True))
        for r in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def short(text: object, length: int) -> str:
    """A name cut in the middle, so that both what it is and which one stay.

    >>> short("permuted-mnist/17", 10)
    'permu…t/17'
    """
    text = clean(text)
    keep = length - 1
    return text if len(text) <= length else f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}"


def matrix_columns(
    result: Result, most_columns: int | None = None, most_rows: int | None = None
) -> list[Column]:
    """The matrix of a result as columns: stages down, sources across; what is too much is cut in the middle."""
    percent, m = result.metric in PERCENT, result.matrix
    names = ["(start)", *map(clean, result.stages)]

    def kept(n: int, most: int | None) -> list[int | None]:
        if most is None or n <= most:
            return list(range(n))
        return [*range(most - most // 2 - 1), None, *range(n - most // 2, n)]

    rows = kept(len(m), most_rows)
    out = [
        Column(
            "stage",
            ["..." if i is None else names[i] if most_rows is None else short(names[i], 20) for i in rows],
            False,
        )
    ]
    for j in kept(len(result.sources), most_columns):
        name = (
            "..."
            if j is None
            else clean(result.sources[j])
            if most_columns is None
            else short(result.sources[j], 14)
        )
        out.append(
            Column(name, ["..." if i is None or j is None else number(float(m[i, j]), percent) for i in rows])
        )
    return out


def table(results: Sequence[Result]) -> str:
    """Results as plain text, one row each; for a single one also its matrix.

    >>> print(table([example()]))
    setting continual, data digits, model MLP, metric accuracy, 2 repeats
    method  accuracy %  forgetting  backward transfer  forward transfer    MACs    bytes   time
    ------  ----------  ----------  -----------------  ----------------  ------  -------  -----
    ewc     75.0 ± 7.1        40.0              -40.0              10.0  1.20 M  3.40 kB  2.5 s
    <BLANKLINE>
    accuracy % after each stage (rows), on each source (columns)
    stage    digits/0  digits/1
    -------  --------  --------
    (start)       0.0      20.0
    first       100.0      30.0
    second       60.0      90.0
    """
    agreed, found = columns(results)
    text = "\n".join(filter(None, [heading(agreed), grid(found)]))
    if len(results) == 1:
        r = results[0]
        unit = " %" if r.metric in PERCENT else ""
        text += f"\n\n{clean(r.metric)}{unit} after each stage (rows), on each source (columns)\n{grid(matrix_columns(r, 12, 20))}"
    return text


def markdown(results: Sequence[Result]) -> str:
    """Results as a Markdown table.

    >>> print(markdown([example()]).splitlines()[-1])
    | ewc | 75.0 ± 7.1 | 40.0 | -40.0 | 10.0 | 1.20 M | 3.40 kB | 2.5 s |
    """
    agreed, found = columns(results)

    def safe(text: str) -> str:
        for a, b in (("\\", "\\\\"), ("|", "\\|"), ("&", "&amp;"), ("<", "&lt;")):
            text = text.replace(a, b)
        return text

    rows = [
        [c.name for c in found],
        ["--:" if c.right else ":--" for c in found],
        *zip(*(c.cells for c in found), strict=True),
    ]
    lines = ["| " + " | ".join(map(safe, r)) + " |" for r in rows]
    return "\n".join([safe(heading(agreed)), "", *lines] if agreed else lines)


def tsv(found: Sequence[Column]) -> str:
    """Columns as tab-separated lines, for a spreadsheet."""
    return "\n".join(
        "\t".join(r) for r in [[c.name for c in found], *zip(*(c.cells for c in found), strict=True)]
    )


def example(method: str = "ewc") -> Result:
    """A small result, for the examples of this room."""
    import numpy as np

    from consilience.loop.result import Result

    m = np.array([[0.0, 0.2], [1.0, 0.3], [0.6, 0.9]])
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
        matrices=np.stack([m + 0.1 * (m == 0.9), m - 0.1 * (m == 0.9)]),
        costs={"macs": 1_200_000, "bytes": 3_400, "seconds": 2.5},
    )
