"""Single charts of results, for notebooks and papers: SVG that stands alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.names import clean
from consilience.report._page import axis_of, unit_of
from consilience.report._style import STYLE
from consilience.report._svg import Point, lines_chart, scatter
from consilience.report._text import human, number

if TYPE_CHECKING:
    from consilience.loop.result import Result

KINDS = ("seen", "sources", "costs", "balance")


@dataclass(frozen=True)
class Figure:
    """A chart as SVG text; notebooks show it."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write the SVG file, completely or not at all."""
        from consilience.core.params import write_bytes

        if Path(path).suffix != ".svg":
            raise ConsilienceError(f"`path` must end in .svg, got {path}.")
        write_bytes(Path(path), self.svg.encode("utf-8", "replace"))
        return Path(path)


def plot(results: Sequence[Result], kind: str = "seen") -> Figure:
    """Draw one chart, as `report.plot` says."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if not results or len({result.metric for result in results}) > 1:
        got = ", ".join(sorted({result.metric for result in results})) or "none"
        raise ConsilienceError(
            f"a chart needs results of one metric, got {got}; use `result.of_metric(name)`."
        )
    if kind in ("seen", "sources"):
        return standing(over_stages(results, kind))
    return standing(costs(results) if kind == "costs" else balance(results))


def over_stages(results: Sequence[Result], kind: str) -> str:
    """Draw scores over stages: of the seen sources of each result, or of all sources of one."""
    first = results[0]
    stages = ["start", *map(clean, first.stages)]
    if any(result.stages != first.stages for result in results):
        raise ConsilienceError("a chart over stages needs results of the same stages.")
    metric = f"{first.metric}{unit_of(first.metric)}"
    if kind == "seen":
        series = [(clean(result.method), [math.nan, *result.seen]) for result in results]
        return lines_chart(f"{metric} on the sources seen so far", stages, series, axis_of(first.metric))
    if len(results) > 1:
        raise ConsilienceError(f"a chart of sources needs one result, got {len(results)}.")
    series = [(clean(source), first.matrix[:, j].tolist()) for j, source in enumerate(first.sources)]
    return lines_chart(f"{metric} of each source", stages, series, axis_of(first.metric))


def costs(results: Sequence[Result]) -> str:
    """Draw the scores of results, and along their runs, against MACs."""
    points = [
        Point(
            clean(result.method),
            float(result.costs["macs"]),
            result.score,
            result.score_std,
            [(point["macs"], point["score"]) for point in result.curve],
        )
        for result in results
    ]
    return scatter("Score against MACs.", "MACs", points, axis_of(results[0].metric), human)


def balance(results: Sequence[Result]) -> str:
    """Draw how well results know earlier sources in the end against how well they learned each."""
    points = []
    for result in results:
        if result.plasticity is None or result.stability is None:
            raise ConsilienceError(
                f"stability and plasticity need sources that are learned at one stage each, and "
                f"{result.method!r} has others."
            )
        points.append(Point(clean(result.method), result.plasticity, result.stability, 0.0, ()))
    metric = results[0].metric
    unit = f"plasticity: {metric} when learned"
    return scatter(
        f"Stability against plasticity by {metric}.",
        unit,
        points,
        axis_of(metric),
        lambda value: number(value, axis_of(metric).percent),
    )


def standing(svg: str) -> Figure:
    """Return a chart that needs no page around it."""
    head, mark, rest = svg.partition(">")
    return Figure(f'{head} xmlns="http://www.w3.org/2000/svg"{mark}<style>{STYLE}</style>{rest}')
