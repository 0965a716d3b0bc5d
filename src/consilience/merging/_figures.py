"""Figures of merging: charts of the report, written as SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mark(NamedTuple):
    """A point of a scatter; whether it is on the Pareto front, and whether it is the best."""

    x: float
    y: float
    series: str
    title: str
    front: bool
    best: bool


def scatter(names: tuple[str, str], marks: Sequence[Mark], label: str, percent: bool = True) -> str:
    """Draw marks by two scores, with rings around those on the front; `names` are of x and y."""
    from consilience.report._svg import MARKS, Plot, bounds, canvas, esc, legend, ticks, word, xy
    from consilience.report._text import number

    x, y = ([mark.x for mark in marks], [mark.y for mark in marks])
    plot = Plot(bounds(x, percent), bounds(y, percent), height=300)
    unit, scale = (" (%)", 100) if percent else ("", 1)
    plot.grid_y(lambda value, step: f"{scale * value:.3g}")
    for at in ticks(*plot.x):
        plot.mark_x(plot.at_x(at), f"{scale * at:.3g}")
    plot.axis()
    middle = (plot.left + plot.right) / 2
    plot.body.append(word(middle, plot.height + 37, f"{names[0]}{unit}", "m", "middle"))
    plot.body.append(word(plot.left, 10, f"{names[1]}{unit}", "m"))

    # The best and the front are drawn last, on top of the others.
    series = list(dict.fromkeys(mark.series for mark in marks))
    shapes = {name: MARKS[i % 5].format(i % 8) for i, name in enumerate(series)}
    for mark in sorted(marks, key=lambda mark: (mark.best, mark.front)):
        radius = 9 if mark.best else 7
        ring = f'<circle class="learn" r="{radius}"/>' if mark.front or mark.best else ""
        at_both = f"{number(mark.x, percent)}, {number(mark.y, percent)}"
        title = f"{mark.title}: {at_both}{', best' if mark.best else ''}"
        place = f"translate({xy(plot.at_x(mark.x))} {xy(plot.at_y(mark.y))})"
        shape = shapes[mark.series]
        plot.body.append(f'<g transform="{place}">{ring}{shape}<title>{esc(title)}</title></g>')

    entries = [(shape, name) for name, shape in shapes.items()]
    ring = '<circle class="learn" r="7"/>'
    body, height = legend([*entries, (ring, "Pareto front")], plot.height + 64)
    return canvas(480, plot.height + 48 + height, label, [*plot.body, *body])
