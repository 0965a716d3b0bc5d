"""Results to read: a text table, a Markdown table, and one HTML file that opens offline.

>>> from consilience import report
>>> sorted(report.__all__)
['load', 'markdown', 'plot', 'table', 'write']
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from consilience.core.errors import UNREADABLE, ConsilienceError, suggest_arguments
from consilience.report._text import markdown, table

if TYPE_CHECKING:
    from consilience.loop.result import Result
    from consilience.report._figure import Figure

__all__ = ["load", "markdown", "plot", "table", "write"]


def write(results: Sequence[Result], path: str | Path, title: str | None = None) -> Path:
    """Write one self-contained HTML file about one or many results.

    It opens offline, in a light and a dark scheme, and can be printed.

    >>> import tempfile
    >>> from consilience.report._text import example
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write([example()], Path(folder) / "report.html").read_text()[:15]
    '<!doctype html>'
    """
    from consilience.core.params import write_bytes
    from consilience.report._page import page

    # Names of sources may have characters that no encoding has, such as halves of surrogate pairs.
    path = Path(path)
    write_bytes(path, page(results, title).encode("utf-8", "replace"))
    return path


def plot(results: Sequence[Result], kind: str = "seen") -> Figure:
    """Draw one chart of results that have one metric: SVG, shown in notebooks, with `save(path)`.

    Kinds: "seen", the mean over the sources seen so far after each stage; "sources", each source over stages
    (one result); "costs", the score against MACs; "balance", stability against plasticity.

    Raises ConsilienceError for another kind, for several metrics, and for what a result does not have.

    >>> from consilience.report._text import example
    >>> plot([example()]).svg[:4]
    '<svg'
    """
    from consilience.report._figure import plot as draw

    return draw(results, kind)


def load(folder: str | Path) -> Result:
    """Read the result of a run from its folder (`result.json`).

    >>> load("/nowhere")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: /nowhere has no result.json; a run writes it when it ends.
    """
    import json

    from consilience.core.form import misfit
    from consilience.loop.result import Result, renamed
    from consilience.report._form import RESULT

    path = Path(folder) / "result.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConsilienceError(f"{folder} has no result.json; a run writes it when it ends.") from error
    except OSError as error:
        raise ConsilienceError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConsilienceError(f"a result must be complete JSON, got {error} at {path}.") from error
    if not isinstance(found, dict):
        raise ConsilienceError(f"a result must be a JSON object, got a {type(found).__name__} at {path}.")

    # A file edited by hand may have the right keys and wrong values.
    try:
        if (reason := misfit(renamed(found), RESULT)) is not None:
            raise ConsilienceError(f"{reason}; run again to write it.")
        result = Result.from_json(found)
    except UNREADABLE as error:
        raise ConsilienceError(f"{str(error).rstrip('.')}, at {path}.") from error
    check_shapes(result, path)
    return result


def check_shapes(result: Result, path: Path) -> None:
    """Refuse matrices that do not fit the stages and sources."""
    rows, columns = len(result.stages) + 1, len(result.sources)
    shape = result.matrices.shape
    fits = len(shape) == 3 and shape[0] > 0 and shape[1:] == (rows, columns)
    if not fits or len(result.learned_at) != columns:
        got = " x ".join(map(str, shape))
        raise ConsilienceError(
            f"the matrices of a result must be repeats x {rows} x {columns} (stages + 1, sources), "
            f"got {got} at {path}."
        )

    classes = len(result.labels)
    # A reader indexes by stages, sources and repeats.
    further = [*result.metrics.values(), *([] if result.mapper is None else [result.mapper])]
    shapes = [shape] * len(result.metrics) + [(shape[0], rows - 1)]
    stages = [*(s for s in result.learned_at if s is not None), *(s["returned"] for s in result.stopped)]
    if any(found.shape != wanted for found, wanted in zip(further, shapes, strict=False)) or (
        len(result.stopped) not in (0, shape[0])
        or len(result.sizes) not in (0, columns)
        or (result.confusion is not None and result.confusion.shape != (classes, classes + 1))
        or len(result.measured_by) not in (0, columns)
        or not all(0 <= stage < rows for stage in stages)
    ):
        raise ConsilienceError(
            f"the parts of a result must be of its {shape[0]} repeats, {rows - 1} stages and {columns} "
            f"sources, got others at {path}."
        )


suggest_arguments(__name__)
