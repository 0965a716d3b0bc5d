"""Figures of merging: charts of the report, written as SVG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from consilience.core.errors import ConsilienceError


def draw(path: str | Path, charts: Sequence[tuple[str, str]]) -> Path:
    """Write charts, (title, SVG) each, below each other as one SVG file that needs no other file."""
    from consilience.core.params import write_bytes
    from consilience.report._style import STYLE
    from consilience.report._svg import SIZE, esc

    path = Path(path)
    if path.suffix.lower() != ".svg":
        raise ConsilienceError(f"a figure must be written to a .svg file, got {path}.")

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
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {top:.0f}" '
        f'width="{width * 1.2:.0f}">'
        f"<style><![CDATA[{style}svg{{font-family:system-ui,sans-serif}}]]></style>"
        f'<rect width="100%" height="100%" style="fill:var(--card)"/>{"".join(body)}</svg>\n'
    )
    write_bytes(path, text.encode("utf-8", "replace"))
    return path


class Mark(NamedTuple):
    """A point of a scatter, in fractions; whether it is on the Pareto front, and whether it is the best."""

    x: float
    y: float
    series: str
    title: str
    front: bool
    best: bool


def scatter(names: tuple[str, str], marks: Sequence[Mark], label: str) -> str:
    """Draw marks by two scores in percent, with rings around those on the front; `names` are of x and y."""
    from consilience.report._svg import MARKS, Plot, bounds, canvas, esc, legend, ticks, word, xy
    from consilience.report._text import number

    x, y = ([mark.x for mark in marks], [mark.y for mark in marks])
    plot = Plot(bounds(x, True), bounds(y, True), height=300)
    plot.grid_y(lambda value, step: number(value, True, 0 if step >= 0.01 else 1))
    for at in ticks(*plot.x):
        plot.mark_x(plot.at_x(at), f"{100 * at:.3g}")
    plot.axis()
    middle = (plot.left + plot.right) / 2
    plot.body.append(word(middle, plot.height + 37, f"{names[0]} (%)", "m", "middle"))
    plot.body.append(word(plot.left, 10, f"{names[1]} (%)", "m"))

    # The best and the front are drawn last, on top of the others.
    series = list(dict.fromkeys(mark.series for mark in marks))
    shapes = {name: MARKS[i % 5].format(i % 8) for i, name in enumerate(series)}
    for mark in sorted(marks, key=lambda mark: (mark.best, mark.front)):
        radius = 9 if mark.best else 7
        ring = f'<circle class="learn" r="{radius}"/>' if mark.front or mark.best else ""
        title = f"{mark.title}: {number(mark.x, True)}, {number(mark.y, True)}{', best' if mark.best else ''}"
        place = f"translate({xy(plot.at_x(mark.x))} {xy(plot.at_y(mark.y))})"
        shape = shapes[mark.series]
        plot.body.append(f'<g transform="{place}">{ring}{shape}<title>{esc(title)}</title></g>')

    entries = [(shape, name) for name, shape in shapes.items()]
    ring = '<circle class="learn" r="7"/>'
    body, height = legend([*entries, (ring, "Pareto front")], plot.height + 64)
    return canvas(480, plot.height + 48 + height, label, [*plot.body, *body])
