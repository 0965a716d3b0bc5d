"""Charts as inline SVG: heat map, lines, bars, scatter.

Colours are CSS classes, so that a chart fits both colour schemes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from consilience.core.names import clean
from consilience.report._text import short

LEVELS = 16
"""Shades of a heat map."""
SIZE = 12.0
"""The size of the text, in the units of the view box."""
WIDTH = 480
"""The width of a chart, in the units of the view box."""

# Eight colours and five marks repeat at different times, so that forty results can be distinguished.
MARKS = (
    '<circle class="p c{}" r="5.5"/>',
    '<rect class="p c{}" x="-5" y="-5" width="10" height="10"/>',
    '<path class="p c{}" d="M0 -6.5L6.2 5L-6.2 5Z"/>',
    '<path class="p c{}" d="M0 -7L6.5 0L0 7L-6.5 0Z"/>',
    '<path class="p c{}" d="M0 6.5L6.2 -5L-6.2 -5Z"/>',
)


def esc(text: object) -> str:
    """Make text safe in HTML, also between quotes."""
    return escape(clean(text), quote=True)


def xy(value: float) -> str:
    """Write a coordinate with at most one digit.

    >>> xy(3.0), xy(3.14), xy(-0.01)
    ('3', '3.1', '0')
    """
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def width(text: str) -> float:
    """Estimate the width of a text."""
    return 0.62 * SIZE * len(text)


# Shapes.


def canvas(w: float, h: float, label: str, body: Sequence[str], least: float = 0) -> str:
    """Make an SVG of a given view box; it shrinks with the page, but not below `least` pixels."""
    style = f"max-width:{xy(w * 1.2)}px" + (f";min-width:{xy(least)}px" if least else "")
    head = f'<svg viewBox="0 0 {xy(w)} {xy(h)}" role="img" aria-label="{esc(label)}" style="{style}">'
    return f"{head}{''.join(body)}</svg>"


def word(x: float, y: float, text: object, kind: str = "", anchor: str = "start", turn: float = 0) -> str:
    """Draw a text; `anchor` is start, middle or end."""
    named = f' class="{kind}"' if kind else ""
    anchored = f' text-anchor="{anchor}"' if anchor != "start" else ""
    turned = f' transform="rotate({xy(turn)} {xy(x)} {xy(y)})"' if turn else ""
    return f'<text x="{xy(x)}" y="{xy(y)}"{named}{anchored}{turned}>{esc(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Draw a straight line."""
    return f'<path class="{kind}" d="M{xy(x1)} {xy(y1)}L{xy(x2)} {xy(y2)}"/>'


def box(x: float, y: float, w: float, h: float, kind: str = "") -> str:
    """Draw a rectangle with slightly round corners."""
    named = f' class="{kind}"' if kind else ""
    return f'<rect{named} x="{xy(x)}" y="{xy(y)}" width="{xy(w)}" height="{xy(h)}" rx="2"/>'


def path(points: Sequence[tuple[float, float]], kind: str, title: str = "") -> str:
    """Draw a line through points, with gaps where one is not finite."""
    # M lifts the pen, L draws; after a gap the line begins again.
    drawn, pen = "", "M"
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            drawn, pen = f"{drawn}{pen}{xy(x)} {xy(y)}", "L"
        else:
            pen = "M"
    tooltip = f"<title>{esc(title)}</title>" if title else ""
    return f'<path class="{kind}" d="{drawn}">{tooltip}</path>' if drawn else ""


# Axes.


@dataclass(frozen=True)
class Axis:
    """How the values of a vertical axis are written."""

    percent: bool
    say: Callable[[float], str]
    """A value with its unit, in a title."""
    tick: Callable[[float, float], str]
    """A value next to its mark, given the step between marks."""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """List round numbers between two.

    >>> ticks(0, 0.97), ticks(0.813, 0.904)
    ([0.0, 0.2, 0.4, 0.6, 0.8], [0.82, 0.84, 0.86, 0.88, 0.9])
    """
    extent = high - low
    if not (math.isfinite(extent) and extent > 0):
        return [low]
    unit = 10.0 ** math.floor(math.log10(extent / most))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if extent / (unit * factor) <= most)

    # The small term keeps a bound that is a round number itself, in spite of rounding.
    first = math.ceil(low / step - 1e-9)
    count = int((high - first * step) / step + 1e-9) + 1
    return [round((first + i) * step, 12) + 0.0 for i in range(count)]


def bounds(values: Sequence[float], percent: bool) -> tuple[float, float]:
    """Find a range a little wider than the finite values; percentages stay in [0, 1]."""
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    pad = max(0.06 * (high - low), 0.02 if percent else 1e-3 * max(1.0, abs(high)))
    if percent and low >= 0 and high <= 1:
        return max(low - pad, 0.0), min(high + pad, 1.0)
    return low - pad, high + pad


@dataclass
class Plot:
    """The area of a chart with its scales and grid, in a view box of width WIDTH."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    zero: bool = False
    """On a log axis: leave room for zero on the left."""
    height: float = 230
    left: float = 46
    right: float = 464
    top: float = 14
    body: list[str] = field(default_factory=list)

    def at_x(self, value: float) -> float:
        """Return the place of a value on the horizontal axis; NaN where it has none."""
        left = self.left + (34 if self.zero else 14 if self.log else 0)
        if not self.log:
            return left + (value - self.x[0]) / (self.x[1] - self.x[0] or 1) * (self.right - left)

        # Zero has no logarithm: it gets a place of its own.
        if value <= 0:
            return self.left + 12 if self.zero else math.nan
        low, high = math.log10(self.x[0]), math.log10(self.x[1])
        return left + (math.log10(value) - low) / (high - low or 1) * (self.right - left - 10)

    def at_y(self, value: float) -> float:
        """Return the place of a value on the vertical axis."""
        share = (value - self.y[0]) / (self.y[1] - self.y[0] or 1)
        return self.height - share * (self.height - self.top)

    def grid_y(self, tick: Callable[[float, float], str]) -> None:
        """Draw horizontal lines; `tick` writes a value, given the step between them."""
        values = ticks(*self.y)
        step = values[1] - values[0] if len(values) > 1 else 1.0
        for value in values:
            down = self.at_y(value)
            self.body += [line(self.left, down, self.right, down, "g")]
            self.body += [word(self.left - 7, down + 4, tick(value, step), "m", "end")]

    def mark_x(self, at: float, text: str) -> None:
        """Draw a mark of the horizontal axis, with a text that stays within the chart."""
        # The first and the last text would be cut off.
        half = width(text) / 2
        centre = min(max(at, half), WIDTH - half)
        self.body += [line(at, self.height, at, self.height + 4, "a")]
        self.body += [word(centre, self.height + 18, text, "m", "middle")]

    def axis(self) -> None:
        """Draw the horizontal axis."""
        self.body += [line(self.left, self.height, self.right, self.height, "a")]


def legend(entries: Sequence[tuple[str, str]], top: float) -> tuple[list[str], float]:
    """Draw marks with their names, in as many lines as they need; also return the height of these lines."""
    body = []
    across, down = 12.0, top
    for mark, name in entries:
        text = short(name, 34)
        if across > 12 and across + 26 + width(text) > WIDTH - 4:
            across, down = 12.0, down + 20
        at = f"translate({xy(across + 9)} {xy(down - 4)})"
        shown = f'<g transform="{at}">{mark}<title>{esc(name)}</title></g>'
        body.append(shown + word(across + 24, down, text))
        across += 42 + width(text)
    return body, down - top + 20 if entries else 0


# Lines.


def lines_chart(
    label: str,
    stages: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    axis: Axis,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    colours: Sequence[int] = (),
) -> str:
    """Draw a thin line per series, and a bold one for their mean with a band of one standard deviation.

    Args:
        label: what the chart shows, for readers who cannot see it.
        stages: names of the places on the horizontal axis.
        series: the name and the values [stages] of each line.
        axis: how values are written.
        mean: the bold line [stages]; () draws none.
        std: the standard deviation of the mean over repeats [stages].
        colours: the number of each line's colour; () counts from 0.
    """
    edges = [edge for m, s in zip(mean, std, strict=True) for edge in (m - s, m + s)]
    values = [value for _, own in series for value in own]
    plot = Plot((0, max(1, len(stages) - 1)), bounds([*values, *mean, *edges], axis.percent))
    plot.grid_y(axis.tick)
    mark_stages(plot, stages)
    plot.axis()

    # More than eight lines are grey: nobody can distinguish nine colours.
    colours = colours or range(len(series))
    few = len(series) <= 8
    for colour, (name, own) in zip(colours, series, strict=True):
        kind = f"l s{colour % 8}" if few else "l sx"
        last = next((value for value in reversed(own) if math.isfinite(value)), math.nan)
        points = [(plot.at_x(i), plot.at_y(value)) for i, value in enumerate(own)]
        title = f"{name}: {axis.say(last)} at the end"
        plot.body.append(path(points, kind if mean else f"{kind} strong", title))
    draw_mean(plot, stages, mean, std, axis.say)

    stroke = '<path class="{}" d="M-8 0L8 0"/>'
    entries = [(stroke.format("l mean"), "mean")] if mean else []
    if not few:
        entries.append((stroke.format("l sx"), f"each of the {len(series)} sources"))
    elif len(series) > 1 or not mean:
        named = zip(colours, series, strict=True)
        entries += [(stroke.format(f"l s{colour % 8}"), name) for colour, (name, _) in named]
    body, tall = legend(entries, plot.height + 46)
    return canvas(WIDTH, plot.height + 32 + tall, label, [*plot.body, *body])


def mark_stages(plot: Plot, stages: Sequence[str]) -> None:
    """Mark stages on the horizontal axis: by name where there is room, else by number; of many only some."""
    names = [short(stage, 14) for stage in stages]
    room = (plot.right - plot.left) / max(1, len(stages) - 1)
    if max(map(width, names)) + 8 > room:
        names = [str(i) for i in range(len(stages))]

    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, len(stages))
    every = next(step for step in steps if step * room > width(names[-1]) + 10)
    for i in range(0, len(stages), every):
        plot.mark_x(plot.at_x(i), names[i])


def draw_mean(
    plot: Plot,
    stages: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    say: Callable[[float], str],
) -> None:
    """Draw a mean as a bold line with dots, over a band of one standard deviation."""
    finite = [i for i, m in enumerate(mean) if math.isfinite(m) and math.isfinite(std[i])]
    if any(std[i] > 0 for i in finite):
        low, high = plot.y
        edge = [(plot.at_x(i), plot.at_y(min(mean[i] + std[i], high))) for i in finite]
        edge += [(plot.at_x(i), plot.at_y(max(mean[i] - std[i], low))) for i in reversed(finite)]
        plot.body.append(path(edge, "band", "one standard deviation over repeats"))

    # Dots have titles; on a long line they would cover it.
    for i, m in enumerate(mean):
        if len(mean) <= 12 and math.isfinite(m):
            title = f"{clean(stages[i])}: {say(m)}"
            plot.body.append(
                f'<circle class="dot" cx="{xy(plot.at_x(i))}" cy="{xy(plot.at_y(m))}" r="3.4">'
                f"<title>{esc(title)}</title></circle>"
            )
    points = [(plot.at_x(i), plot.at_y(m)) for i, m in enumerate(mean)]
    plot.body.append(path(points, "l mean", "mean over sources"))


# Bars.


def bars_chart(label: str, names: Sequence[str], values: Sequence[float], say: Callable[[float], str]) -> str:
    """Draw a horizontal bar per name, from zero."""
    left = 14 + max(width(short(name, 18)) for name in names)
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    start, end = left + (46 if low < 0 else 4), WIDTH - 50
    scale = (end - start) / (high - low or 1)
    zero = start - low * scale
    tall = 24 if len(names) <= 12 else 19

    body = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        down = 6 + i * tall
        named = word(left - 8, down + tall / 2 + 4, short(name, 18), "", "end")
        body.append(f"<g><title>{esc(name)}: {esc(say(value))}</title>{named}")
        if math.isfinite(value):
            begin, length = (zero, value * scale) if value >= 0 else (zero + value * scale, -value * scale)
            kind = "bar lost" if value >= 0 else "bar won"
            body.append(box(begin, down + 4, max(length, 0.5), tall - 8, kind))

        # The value stands outside its bar, on the side where the bar ends.
        tip, anchor = (zero + value * scale - 6, "end") if value < 0 else (zero + value * scale + 6, "start")
        at = tip if math.isfinite(value) else zero + 6
        body.append(word(at, down + tall / 2 + 4, say(value), "n", anchor) + "</g>")
    height = 12 + len(names) * tall
    return canvas(WIDTH, height, label, [line(zero, 4, zero, height - 4, "a"), *body])


# Scatter.


@dataclass(frozen=True)
class Point:
    """A result in a scatter: its cost and score, and the scores along its run."""

    name: str
    cost: float
    score: float
    std: float
    curve: Sequence[tuple[float, float]]

    @property
    def finite(self) -> bool:
        """Whether it has a place in the chart."""
        return math.isfinite(self.cost) and math.isfinite(self.score)


def scatter(label: str, unit: str, points: Sequence[Point], axis: Axis, cost: Callable[[float], str]) -> str:
    """Draw a mark per result, and a thin line for the scores along its run.

    The horizontal axis is logarithmic where costs differ widely; `cost` writes a cost.
    """
    shown = [(i, point) for i, point in enumerate(points) if point.finite]
    plot = scatter_plot([point for _, point in shown], axis.percent)
    plot.grid_y(axis.tick)
    mark_costs(plot, cost)
    plot.axis()
    middle, title = (plot.left + plot.right) / 2, unit + (", log scale" if plot.log else "")
    plot.body.append(word(middle, plot.height + 37, title, "m", "middle"))

    # All trails lie below all marks.
    for i, point in shown:
        trail = [(plot.at_x(spent), plot.at_y(score)) for spent, score in point.curve]
        plot.body.append(path(trail, f"trail s{i % 8}", f"{point.name}, along the first run"))
    for i, point in shown:
        across, down = plot.at_x(point.cost), plot.at_y(point.score)
        if point.std > 0:
            top, bottom = plot.at_y(point.score - point.std), plot.at_y(point.score + point.std)
            plot.body.append(line(across, top, across, bottom, f"err s{i % 8}"))
        title = f"{point.name}: {axis.say(point.score)} at {cost(point.cost)} {unit}"
        mark = f"{MARKS[i % 5].format(i % 8)}<title>{esc(title)}</title>"
        plot.body.append(f'<g transform="translate({xy(across)} {xy(down)})">{mark}</g>')

    entries = [(MARKS[i % 5].format(i % 8), point.name) for i, point in enumerate(points)]
    body, tall = legend(entries, plot.height + 64)
    return canvas(WIDTH, plot.height + 48 + tall, label, [*plot.body, *body])


def scatter_plot(points: Sequence[Point], percent: bool) -> Plot:
    """Make the area of a scatter, with scales that fit the points and their curves."""
    positive = [point.cost for point in points if point.cost > 0]
    log = bool(positive) and max(positive) / min(positive) > 20
    along = [
        (spent, score)
        for point in points
        for spent, score in point.curve
        if math.isfinite(spent) and math.isfinite(score) and (spent > 0 or not log)
    ]
    costs = [*positive, *(spent for spent, _ in along)]
    heights = [edge for point in points for edge in (point.score - point.std, point.score + point.std)]
    heights += [score for _, score in along]

    # A linear axis begins at zero: it compares costs.
    extent = (min(costs), max(costs)) if log else (0.0, 1.04 * max([*costs, 1e-12]))
    zero = log and any(point.cost <= 0 for point in points)
    return Plot(extent, bounds(heights, percent), log, zero)


def mark_costs(plot: Plot, cost: Callable[[float], str]) -> None:
    """Mark round costs on the horizontal axis."""
    if plot.zero:
        plot.mark_x(plot.at_x(0), "0")
    marks = ticks(*plot.x, 5)
    if plot.log:
        low = math.ceil(math.log10(plot.x[0]) - 1e-9)
        high = math.floor(math.log10(plot.x[1]) + 1e-9)
        every = max(1, math.ceil((high - low) / 5))
        marks = [10.0**power for power in range(low, high + 1, every)]

    for mark in marks:
        text = cost(mark)
        # 1.00 M is 1 M on an axis.
        plot.mark_x(plot.at_x(mark), re.sub(r"\.?0+(?= |$)", "", text) if "." in text else text)


# Heat map.


class Cells(NamedTuple):
    """Where the cells of a heat map are, and how large."""

    left: float
    top: float
    width: float
    height: float
    gap: float
    columns: list[str]
    """Names above the columns."""
    turned: bool
    """Whether these names are turned, because they are wider than a column."""
    readable: bool
    """Whether cells have room for their values."""
    wide: bool
    """Whether the map needs the width of the page."""

    def corner(self, row: int, column: int) -> tuple[float, float]:
        """Return the top left corner of a cell."""
        return self.left + column * self.width, self.top + row * self.height


def heat_map(
    label: str,
    rows: Sequence[str],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    colours: tuple[float, float],
    say: Callable[[float], str],
    brief: Callable[[float], str],
    marked: Sequence[int | None] = (),
) -> tuple[str, bool]:
    """Draw one cell per row and column, with its value where there is room; also return whether it is wide.

    Args:
        label: what the map shows, for readers who cannot see it.
        rows: names of the rows.
        names: names of the columns.
        values: the values [rows, columns].
        colours: the values of the faintest and the strongest colour.
        say: writes a value in a title.
        brief: writes a value in its cell.
        marked: the row to outline in each column, or None; () outlines none.
    """
    cells = cells_of(rows, names)
    body = [*axis_names(cells, rows), *shades(cells, rows, names, values, colours, say, brief)]

    # An outline in a smaller cell would hide its colour.
    outlines = min(cells.width, cells.height) >= 4
    if outlines:
        body += [
            box(x + 0.5, y + 0.5, cells.width - cells.gap - 1, cells.height - cells.gap - 1, "learn")
            for column, row in enumerate(marked)
            if row is not None and 0 <= row < len(rows)
            for x, y in [cells.corner(row, column)]
        ]

    down = cells.top + len(rows) * cells.height + 16
    right = cells.left + LEVELS * 9
    for level in range(LEVELS):
        across = xy(cells.left + level * 9)
        body.append(f'<rect class="q{level}" x="{across}" y="{xy(down)}" width="9.3" height="9"/>')
    body.append(word(cells.left, down + 23, say(colours[0]), "m"))
    body.append(word(right, down + 23, say(colours[1]), "m", "end"))
    if outlines and any(row is not None for row in marked):
        body.append(
            box(right + 22, down - 1, 14, 11, "learn") + word(right + 42, down + 9, "trained here", "m")
        )

    last = width(cells.columns[-1]) * 0.72 - cells.width / 2 if cells.turned else 0.0
    total = max(float(WIDTH), cells.left + len(names) * cells.width + max(12.0, last, 0.0))
    return canvas(total, down + 30, label, body, total * 0.8 if cells.wide else 0), cells.wide


def cells_of(rows: Sequence[str], names: Sequence[str]) -> Cells:
    """Choose the size of the cells of a heat map, by their number."""
    readable = len(names) <= 24 and len(rows) <= 42
    wide = len(names) > 10 or len(rows) > 42
    left = 14 + max(width(short(row, 18)) for row in rows)
    if not readable:
        across = max(1.5, min(24.0, (2 * WIDTH - left) / len(names)))
        down = max(1.5, min(18.0, 560 / len(rows)))
    else:
        across, down = (37.0, 24.0) if wide else (min(64.0, (WIDTH - 12 - left) / len(names)), 28.0)

    columns = [short(name, 16) for name in names]
    longest = max(map(width, columns))
    turned = longest + 6 > across
    # A text that is turned by 46 degrees is 0.72 of its length high.
    top = (12 + longest * 0.72) if turned else 26.0
    gap = 1.0 if min(across, down) >= 8 else 0.0
    return Cells(left, top, across, down, gap, columns, turned, readable, wide)


def axis_names(cells: Cells, rows: Sequence[str]) -> list[str]:
    """Write the names of columns and rows, as many as have room."""
    body = []
    for column in range(0, len(cells.columns), max(1, math.ceil((20 if cells.turned else 15) / cells.width))):
        middle = cells.left + (column + 0.5) * cells.width
        name = cells.columns[column]
        if cells.turned:
            body.append(word(middle + 2, cells.top - 7, name, turn=-46))
        else:
            body.append(word(middle, cells.top - 9, name, anchor="middle"))

    for row in range(0, len(rows), max(1, math.ceil(15 / cells.height))):
        down = cells.top + (row + 0.5) * cells.height + 4
        body.append(word(cells.left - 8, down, short(rows[row], 18), anchor="end"))
    return body


def shades(
    cells: Cells,
    rows: Sequence[str],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    colours: tuple[float, float],
    say: Callable[[float], str],
    brief: Callable[[float], str],
) -> list[str]:
    """Draw the cells: with their values where these are readable, else as one path per shade."""
    body: list[str] = []
    by_shade: dict[str, list[str]] = {}
    across, down = cells.width - cells.gap, cells.height - cells.gap
    for row, name in enumerate(rows):
        for column, value in enumerate(values[row]):
            shade = shade_of(value, colours)
            x, y = cells.corner(row, column)
            if not cells.readable:
                outline = f"M{x:.2f} {y:.2f}h{across:.2f}v{down:.2f}h-{across:.2f}z"
                by_shade.setdefault(shade, []).append(outline)
                continue

            title = f"{clean(name)}, {clean(names[column])}: {say(value)}"
            text = brief(value) if math.isfinite(value) else "nan"
            written = word(x + across / 2, y + cells.height / 2 + 3.6, text, "v", "middle")
            square = box(x, y, across, down)
            body.append(f'<g class="{shade}"><title>{esc(title)}</title>{square}{written}</g>')

    for shade, outlines in sorted(by_shade.items()):
        body.append(f'<path class="{shade}" d="{"".join(outlines)}"/>')
    return body


def shade_of(value: float, colours: tuple[float, float]) -> str:
    """Return the CSS class of a value's shade."""
    if not math.isfinite(value):
        return "qn"
    low, high = colours
    level = int((value - low) / ((high - low) or 1) * LEVELS)
    return f"q{min(LEVELS - 1, max(0, level))}"
