"""Figures for notebooks and papers: charts as SVG that stands alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.names import clean
from consilience.report._page import axis_of, names, point_of, unit_of
from consilience.report._style import STYLE
from consilience.report._svg import SIZE, Point, esc, lines_chart, scatter
from consilience.report._text import human, number

if TYPE_CHECKING:
    from consilience.loop.result import Result


@dataclass(frozen=True)
class Figure:
    """Charts as SVG text; notebooks show it."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write the SVG file, completely or not at all."""
        from consilience.core.params import write_bytes

        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise ConsilienceError(f"a figure must be written to a .svg file, got {path}.")
        write_bytes(path, self.svg.encode("utf-8", "replace"))
        return path


def standing(charts: Sequence[tuple[str, str]]) -> Figure:
    """Put charts, (title, SVG) each, below each other in one figure that needs no page around it."""
    body, width, top = [], 0.0, 12.0
    for title, svg in charts:
        # A chart becomes a group, since browsers scale an SVG in an SVG by rules of their own.
        found = re.fullmatch(
            r'<svg viewBox="0 0 (\S+) (\S+)" role="img" aria-label="([^"]*)"[^>]*>(.*)</svg>', svg, re.S
        )
        assert found is not None, "charts come from report._svg.canvas"
        chart_width, chart_height, label, content = found.groups()
        place = f"translate(0 {top + 24:.0f})"
        body.append(f'<text x="12" y="{top + SIZE:.0f}" class="n">{esc(title)}</text>')
        body.append(f'<g transform="{place}" role="img" aria-label="{label}">{content}</g>')
        width, top = max(width, float(chart_width)), top + 40 + float(chart_height)

    # The style is CDATA, which its end must not occur in.
    style = STYLE.replace("]]>", "")
    return Figure(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {top:.0f}" '
        f'width="{width * 1.2:.0f}">'
        f"<style><![CDATA[{style}svg{{font-family:system-ui,sans-serif}}]]></style>"
        f'<rect width="100%" height="100%" style="fill:var(--card)"/>{"".join(body)}</svg>\n'
    )


def plot(results: Sequence[Result], kind: str = "seen") -> Figure:
    """Draw one chart, as `report.plot` says."""
    charts = {"seen": seen, "sources": sources, "costs": costs, "balance": balance}
    if kind not in charts:
        raise unknown("kind", kind, charts)
    if not results or len({result.metric for result in results}) > 1:
        got = ", ".join(sorted({result.metric for result in results})) or "none"
        raise ConsilienceError(
            f"a chart needs results of one metric, got {got}; use `result.of_metric(name)`."
        )
    return standing([charts[kind](results)])


def seen(results: Sequence[Result]) -> tuple[str, str]:
    """Draw the scores over the sources that each result has seen so far, after each stage."""
    series = [(name, [math.nan, *result.seen]) for name, result in zip(names(results), results, strict=True)]
    return over_stages(results, series, "the mean over the sources seen so far")


def sources(results: Sequence[Result]) -> tuple[str, str]:
    """Draw the scores of each source of one result."""
    if len(results) > 1:
        raise ConsilienceError(f"a chart of sources needs one result, got {len(results)}.")
    (one,) = results
    series = [(clean(source), one.matrix[:, j].tolist()) for j, source in enumerate(one.sources)]
    return over_stages(results, series, f"each source, {clean(one.method)}")


def over_stages(
    results: Sequence[Result], series: Sequence[tuple[str, Sequence[float]]], of: str
) -> tuple[str, str]:
    """Draw lines over the stages that all results have."""
    first = results[0]
    if any(result.stages != first.stages for result in results):
        raise ConsilienceError("a chart over stages needs results of the same stages.")
    title = f"{first.metric}{unit_of(first.metric)} over stages: {of}"
    return title, lines_chart(title, ["start", *map(clean, first.stages)], series, axis_of(first.metric))


def costs(results: Sequence[Result]) -> tuple[str, str]:
    """Draw the scores of results, and along their runs, against MACs."""
    metric = results[0].metric
    points = [point_of(name, result, "macs") for name, result in zip(names(results), results, strict=True)]
    title = f"{metric}{unit_of(metric)} against MACs"
    return title, scatter(title, "MACs", points, axis_of(metric), human)


def balance(results: Sequence[Result]) -> tuple[str, str]:
    """Draw how well results know earlier sources in the end against how well they learned each."""
    metric, points = results[0].metric, []
    for name, result in zip(names(results), results, strict=True):
        if result.plasticity is None or result.stability is None:
            raise ConsilienceError(
                f"stability and plasticity need sources that are learned at one stage each, and "
                f"{result.method!r} has others."
            )
        points.append(Point(name, result.plasticity, result.stability, 0.0, ()))
    axis, unit = axis_of(metric), unit_of(metric)
    title = f"stability: {metric}{unit} on earlier sources in the end"
    across = f"plasticity: {metric}{unit} on each source when it was learned"
    return title, scatter(title, across, points, axis, lambda value: number(value, axis.percent))
