"""Results to read: a text table, a Markdown table, one HTML file that opens offline, and results read from folders.

>>> from consilience import report
>>> sorted(report.__all__)
['load', 'markdown', 'table', 'write']
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from consilience.core.errors import ConsilienceError
from consilience.report._text import markdown, table

if TYPE_CHECKING:
    from consilience.loop.result import Result

__all__ = ["load", "markdown", "table", "write"]


def write(results: Sequence[Result], path: str | Path, title: str | None = None) -> Path:
    """Write one self-contained HTML file about one or many results; it opens offline, in light and dark, and prints.

    >>> import tempfile
    >>> from consilience.report._text import example
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write([example()], Path(folder) / "report.html").read_text()[:15]
    '<!doctype html>'
    """
    from consilience.core.params import write_bytes
    from consilience.report._page import page

    path = Path(path)
    write_bytes(path, page(results, title).encode("utf-8", "replace"))
    return path


def load(folder: str | Path) -> Result:
    """Read the result of a run's folder (`result.json`).

    >>> load("/nowhere")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: a run's folder should hold result.json. Found none in /nowhere.
    """
    import json

    from consilience.loop.result import Result

    path = Path(folder) / "result.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise ConsilienceError(f"a run's folder should hold result.json. Found none in {folder}.") from e
    except OSError as e:
        raise ConsilienceError(f"a result should be readable. Found {e.strerror or e} at {path}.") from e
    except ValueError as e:
        raise ConsilienceError(f"a result should be whole JSON. Found {e} at {path}.") from e
    if not isinstance(found, dict):
        raise ConsilienceError(f"a result should be a JSON object. Found a {type(found).__name__} at {path}.")
    try:
        result = Result.from_json(found)
    except (ConsilienceError, TypeError, ValueError) as e:
        raise ConsilienceError(f"{str(e).rstrip('.')}, at {path}.") from e
    shape = (len(result.stages) + 1, len(result.sources))
    if (
        result.matrices.ndim != 3
        or not result.repeats
        or result.matrices.shape[1:] != shape
        or len(result.learned_at) != shape[1]
    ):
        raise ConsilienceError(
            f"a result's matrices should be repeats x {shape[0]} x {shape[1]} (stages + 1, sources). "
            f"Found {' x '.join(map(str, result.matrices.shape))} at {path}."
        )
    return result
