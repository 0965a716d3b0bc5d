"""Charts as inline SVG: heat map, lines, bars, scatter.

Colours are CSS classes, so that a chart fits both colour schemes.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from consilience.core.names import clean

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


# Dashes, so that of two lines that lie on each other both are seen.
DASHES = ("", "8 4", "2 3.5", "11 3 2 3", "5 2.5")
LABEL = 30
"""Names with more characters than this are numbered in a chart, with a key below it."""


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


def keyed(names: Sequence[str], most: int = LABEL) -> tuple[list[str], str]:
    """Return names as they fit a chart, and a key to those that do not: numbers, so that none is cut.

    >>> keyed(["a", "b"]), keyed(["a long one", "b"], 5)
    ((['a', 'b'], ''), (['1', '2'], '1: a long one; 2: b'))
    """
    found = [clean(name) for name in names]
    if all(len(name) <= most for name in found):
        return found, ""
    numbers = [str(i) for i in range(1, len(found) + 1)]
    # A long key says less than the table, which has all names.
    key = "; ".join(f"{number}: {name}" for number, name in zip(numbers, found, strict=True))
    return numbers, key if len(key) <= 1500 else ""


def paragraph(text: str, top: float, kind: str = "m", left: float = 12) -> tuple[list[str], float]:
    """Draw a text in as many lines as it needs; also return their height."""
    lines = textwrap.wrap(text, int((WIDTH - left - 8) / (0.62 * SIZE)))
    return [word(left, top + 16 * i, line, kind) for i, line in enumerate(lines)], 16.0 * len(lines)


def path(points: Sequence[tuple[float, float]], kind: str, title: str = "", dash: str = "") -> str:
    """Draw a line through points, with gaps where one is not finite."""
    # M lifts the pen, L draws; after a gap the line begins again.
    drawn, pen = "", "M"
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            drawn, pen = f"{drawn}{pen}{xy(x)} {xy(y)}", "L"
        else:
            pen = "M"
    tooltip = f"<title>{esc(title)}</title>" if title else ""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="{kind}" d="{drawn}"{dashed}>{tooltip}</path>' if drawn else ""


def hover(x: float, y: float, title: str) -> str:
    """Make an invisible disc that says a value where the pointer is."""
    return f'<circle class="h" cx="{xy(x)}" cy="{xy(y)}" r="6"><title>{esc(title)}</title></circle>'


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
    body: list[str] = []
    across, down = 12.0, top
    for mark, name in entries:
        # A name that is longer than a line is continued on the next ones.
        lines = textwrap.wrap(clean(name), 56) or [""]
        if across > 12 and across + 26 + width(max(lines, key=len)) > WIDTH - 4:
            across, down = 12.0, down + 20
        at = f"translate({xy(across + 9)} {xy(down - 4)})"
        body.append(f'<g transform="{at}">{mark}<title>{esc(name)}</title></g>')
        body += [word(across + 24, down + 15 * i, line) for i, line in enumerate(lines)]
        if len(lines) > 1:
            across, down = 12.0, down + 15 * (len(lines) - 1) + 20
        else:
            across += 42 + width(lines[0])
    return body, down - top + 20 if entries else 0


# Lines.


@dataclass(frozen=True)
class LineOptions:
    """How lines are drawn: the number of each one's colour; its standard deviation [stages] as a band; and a
    level that none can be expected to pass, with its name."""

    colours: Sequence[int] = ()
    spreads: Sequence[Sequence[float]] = ()
    bound: tuple[str, float] | None = None


def lines_chart(
    label: str,
    stages: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    axis: Axis,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    options: LineOptions = LineOptions(),
) -> str:
    """Draw a line per series, and a bold one for their mean with a band of one standard deviation.

    Lines have dashes of their own, so that those that coincide are seen both, and their names at the right
    end where these fit; those that are equal have one name together.

    Args:
        label: what the chart shows, for readers who cannot see it.
        stages: names of the places on the horizontal axis.
        series: the name and the values [stages] of each line.
        axis: how values are written.
        mean: the bold line [stages]; () draws none.
        std: the standard deviation of the mean over repeats [stages].
        options: colours, bands and a bound; the default has colours from 0.
    """
    few, bound = len(series) <= 8, options.bound
    colours = options.colours or range(len(series))
    edges = [edge for m, s in zip(mean, std, strict=True) for edge in (m - s, m + s)]
    edges += [
        edge
        for (_, own), spread in zip(series, options.spreads, strict=False)
        for m, s in zip(own, spread, strict=True)
        for edge in (m - s, m + s)
    ]
    values = [value for _, own in series for value in own] + ([bound[1]] if bound else [])
    plot = Plot((0, max(1, len(stages) - 1)), bounds([*values, *mean, *edges], axis.percent))

    # More than eight lines are grey: nobody can distinguish nine colours.
    ends = [End(name, own, f"c{colour % 8}") for colour, (name, own) in zip(colours, series, strict=True)]
    ends = merged_ends([*(ends if few else []), *([End("mean", mean, "ink")] if mean else [])])
    direct = bool(ends) and max(width(end.name) for end in ends) <= 150
    if direct:
        plot.right = WIDTH - 22 - max(width(end.name) for end in ends)
    plot.grid_y(axis.tick)
    key = mark_stages(plot, stages)
    plot.axis()

    for (_, own), colour, spread in zip(series, colours, options.spreads, strict=False):
        plot.body.append(band(plot, own, spread, f"bs c{colour % 8}"))
    if bound:
        level = plot.at_y(bound[1])
        title = f"{bound[0]}: {axis.say(bound[1])}"
        plot.body.append(path([(plot.left, level), (plot.right, level)], "bound", title, "1.5 4"))
        plot.body.append(word(plot.left + 4, level - 5, title, "m"))
    for number, (colour, (name, own)) in enumerate(zip(colours, series, strict=True)):
        kind = f"l s{colour % 8}" if few else "l sx"
        draw_line(plot, (name, own), kind if mean else f"{kind} strong", number if few else 0, stages, axis)
    draw_mean(plot, stages, mean, std, axis.say)
    if direct:
        draw_ends(plot, ends)

    # Names at the ends of lines need no legend.
    entries = [] if direct and few else line_legend(series, colours, bool(mean), few)
    lines, high = paragraph(key, plot.height + 36) if key else ([], 0.0)
    body, tall = legend(entries, plot.height + 46 + high)
    total = plot.height + 32 + high + (tall or 4)
    return canvas(WIDTH, total, label, [*plot.body, *lines, *body])


class End(NamedTuple):
    """The name at the end of a line, the line's values, and the class of its colour."""

    name: str
    values: Sequence[float]
    kind: str


def merged_ends(ends: Sequence[End]) -> list[End]:
    """Give lines that have equal values one name together."""
    found: dict[tuple[str, ...], End] = {}
    for end in ends:
        at = tuple(f"{value:.6g}" for value in end.values)
        known = found.get(at)
        found[at] = end if known is None else End(f"{known.name} = {end.name}", known.values, "ink")
    return list(found.values())


def draw_ends(plot: Plot, ends: Sequence[End]) -> None:
    """Write names at the right ends of lines, apart from each other."""
    placed = []
    for end in ends:
        last = next((value for value in reversed(end.values) if math.isfinite(value)), math.nan)
        if math.isfinite(last):
            placed.append((plot.at_y(last), end))
    placed.sort(key=lambda each: each[0])

    # From the top down, each at least a line below the one before; then back up from the bottom.
    downs = [at for at, _ in placed]
    for i in range(1, len(downs)):
        downs[i] = max(downs[i], downs[i - 1] + 14)
    if downs and downs[-1] > plot.height + 4:
        downs[-1] = plot.height + 4
        for i in reversed(range(len(downs) - 1)):
            downs[i] = min(downs[i], downs[i + 1] - 14)
    for down, (at, end) in zip(downs, placed, strict=True):
        if abs(down - at) > 5:
            plot.body.append(line(plot.right + 2, at, plot.right + 10, down, "a"))
        plot.body.append(word(plot.right + 12, down + 4, end.name, f"end {end.kind}"))


def draw_line(
    plot: Plot,
    series: tuple[str, Sequence[float]],
    kind: str,
    number: int,
    stages: Sequence[str],
    axis: Axis,
) -> None:
    """Draw one line with its dashes; of few points, each has a dot; each says its value to the pointer."""
    name, own = series
    last = next((value for value in reversed(own) if math.isfinite(value)), math.nan)
    points = [(plot.at_x(i), plot.at_y(value)) for i, value in enumerate(own)]
    plot.body.append(path(points, kind, f"{name}: {axis.say(last)} at the end", DASHES[number % len(DASHES)]))
    finite = [(i, value) for i, value in enumerate(own) if math.isfinite(value)]
    if len(stages) > 60:
        return
    for i, value in finite:
        x, y = points[i]
        # A point between gaps is no line, so that it needs a mark.
        alone = all(not 0 <= j < len(own) or not math.isfinite(own[j]) for j in (i - 1, i + 1))
        if alone:
            plot.body.append(f'<circle class="pt {kind}" cx="{xy(x)}" cy="{xy(y)}" r="2.6"/>')
        plot.body.append(hover(x, y, f"{name}, {clean(stages[i])}: {axis.say(value)}"))


def line_legend(
    series: Sequence[tuple[str, Sequence[float]]], colours: Sequence[int], has_mean: bool, few: bool
) -> list[tuple[str, str]]:
    """Return the entries of a legend of lines."""
    stroke = '<path class="{}" d="M-9 0L9 0"{}/>'
    entries = [(stroke.format("l mean", ""), "mean")] if has_mean else []
    if not few:
        return [*entries, (stroke.format("l sx", ""), f"each of the {len(series)} lines")]
    if len(series) > 1 or not has_mean:
        for number, (colour, (name, _)) in enumerate(zip(colours, series, strict=True)):
            dash = DASHES[number % len(DASHES)]
            dashed = f' stroke-dasharray="{dash}"' if dash else ""
            entries.append((stroke.format(f"l s{colour % 8} strong", dashed), name))
    return entries


def mark_stages(plot: Plot, stages: Sequence[str]) -> str:
    """Mark stages on the horizontal axis: by name where all fit, else by number; return the key."""
    names, key = [clean(stage) for stage in stages], ""
    room = (plot.right - plot.left) / max(1, len(stages) - 1)
    if max(map(width, names)) + 10 > room:
        # Names that end with their number, such as rounds, need no key.
        counted = {name.removesuffix(f" {i}") for i, name in enumerate(names) if i}
        if len(counted) == 1 < len(names) - 1 and not counted & {*names}:
            key = f"0: {names[0]}; then {counted.pop()} by number"
        elif len(names) <= 16:
            key = "; ".join(f"{i}: {name}" for i, name in enumerate(names))
        names = [str(i) for i in range(len(stages))]

    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, len(stages))
    every = next(step for step in steps if step * room > width(names[-1]) + 10)
    for i in range(0, len(stages), every):
        plot.mark_x(plot.at_x(i), names[i])
    return key


def band(plot: Plot, mean: Sequence[float], std: Sequence[float], kind: str) -> str:
    """Draw a band of one standard deviation about a line; "" where there is none."""
    finite = [i for i, m in enumerate(mean) if math.isfinite(m) and math.isfinite(std[i])]
    if not any(std[i] > 0 for i in finite):
        return ""
    low, high = plot.y
    edge = [(plot.at_x(i), plot.at_y(min(mean[i] + std[i], high))) for i in finite]
    edge += [(plot.at_x(i), plot.at_y(max(mean[i] - std[i], low))) for i in reversed(finite)]
    return path(edge, kind, "one standard deviation over repeats")


def draw_mean(
    plot: Plot,
    stages: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    say: Callable[[float], str],
) -> None:
    """Draw a mean as a bold line with dots, over a band of one standard deviation."""
    plot.body.append(band(plot, mean, std, "band"))

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


def bars_chart(
    label: str,
    names: Sequence[str],
    values: Sequence[float],
    say: Callable[[float], str],
    std: Sequence[float] = (),
    kinds: tuple[str, str] = ("lost", "won"),
) -> str:
    """Draw a horizontal bar per name, from zero, and a whisker of one standard deviation where `std` has one.

    `kinds` are the classes of bars of values from 0 on, and below.
    """
    shown, key = keyed(names)
    left = 14 + max(map(width, shown))
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    start, end = left + (46 if low < 0 else 4), WIDTH - 12 - max(width(say(value)) for value in values)
    scale = (end - start) / (high - low or 1)
    zero = start - low * scale
    tall = 24 if len(names) <= 12 else 19

    body = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        down = 6 + i * tall
        named = word(left - 8, down + tall / 2 + 4, shown[i], "", "end")
        body.append(f"<g><title>{esc(name)}: {esc(say(value))}</title>{named}")
        if math.isfinite(value):
            begin, length = (zero, value * scale) if value >= 0 else (zero + value * scale, -value * scale)
            kind = f"bar {kinds[value < 0]}"
            body.append(box(begin, down + 4, max(length, 0.5), tall - 8, kind))
            if std and std[i] > 0:
                reach = std[i] * scale
                first, last = max(left, begin + length - reach), min(end, begin + length + reach)
                body.append(line(first, down + tall / 2, last, down + tall / 2, "whisker"))

        # The value stands outside its bar, on the side where the bar ends.
        tip, anchor = (zero + value * scale - 6, "end") if value < 0 else (zero + value * scale + 6, "start")
        at = tip if math.isfinite(value) else zero + 6
        body.append(word(at, down + tall / 2 + 4, say(value), "n", anchor) + "</g>")
    height = 12 + len(names) * tall
    lines, high_key = paragraph(key, height + 14)
    body = [line(zero, 4, zero, height - 4, "a"), *body, *lines]
    return canvas(WIDTH, height + high_key + (6 if key else 0), label, body)


def change_chart(
    label: str, names: Sequence[str], before: Sequence[float], after: Sequence[float], axis: Axis
) -> str:
    """Draw a line per name from a ring (the start) to a dot (the end), for runs of one stage."""
    shown, key = keyed(names)
    left = 14 + max(map(width, shown))
    tall = 26 if len(names) <= 12 else 19
    plot = Plot(bounds([*before, *after], axis.percent), (0, 1), left=left + 6, right=WIDTH - 62)
    height = 12 + len(names) * tall
    for value in (at := ticks(*plot.x, 4)):
        x, step = plot.at_x(value), at[1] - at[0] if len(at) > 1 else 1.0
        plot.body += [line(x, 6, x, height, "g"), word(x, height + 16, axis.tick(value, step), "m", "middle")]

    for i, (name, first, last) in enumerate(zip(names, before, after, strict=True)):
        down = 8 + (i + 0.5) * tall
        title = f"{clean(name)}: from {axis.say(first)} to {axis.say(last)}"
        x, y = plot.at_x(first), plot.at_x(last)
        marks = path([(x, down), (y, down)], "l s0 strong")
        marks += f'<circle class="ring" cx="{xy(x)}" cy="{xy(down)}" r="4.5"/>' if math.isfinite(x) else ""
        marks += f'<circle class="p c0" cx="{xy(y)}" cy="{xy(down)}" r="5.5"/>' if math.isfinite(y) else ""
        named = word(left - 4, down + 4, shown[i], "", "end")
        right = max(value for value in (x, y, left) if math.isfinite(value))
        said = word(right + 10, down + 4, axis.say(last), "n")
        plot.body.append(f"<g><title>{esc(title)}</title>{named}{marks}{said}</g>")

    lines, high = paragraph(key, height + 36)
    ring = '<circle class="ring" r="4.5"/>', "start"
    body, tall_legend = legend([ring, ('<circle class="p c0" r="5.5"/>', "end")], height + 42 + high)
    return canvas(WIDTH, height + 28 + high + tall_legend, label, [*plot.body, *lines, *body])


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
    # Two points are the start and the end, which say nothing of the way.
    for i, point in shown:
        if len(point.curve) < 3:
            continue
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
    shown, key = keyed(rows)
    body = [*axis_names(cells, shown), *shades(cells, rows, names, values, colours, say, brief)]

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

    keys = [f"{what} {text}" for what, text in (("rows", key), ("columns", keyed(names)[1])) if text]
    lines, high = paragraph(". ".join(keys), down + 44)
    last = width(cells.columns[-1]) * 0.72 - cells.width / 2 if cells.turned else 0.0
    total = max(float(WIDTH), cells.left + len(names) * cells.width + max(12.0, last, 0.0))
    svg = canvas(total, down + 30 + high, label, [*body, *lines], total * 0.8 if cells.wide else 0)
    return svg, cells.wide


def cells_of(rows: Sequence[str], names: Sequence[str]) -> Cells:
    """Choose the size of the cells of a heat map, by their number."""
    readable = len(names) <= 24 and len(rows) <= 42
    wide = len(names) > 10 or len(rows) > 42
    left = 14 + max(map(width, keyed(rows)[0]))
    if not readable:
        across = max(1.5, min(24.0, (2 * WIDTH - left) / len(names)))
        down = max(1.5, min(18.0, 560 / len(rows)))
    else:
        across, down = (37.0, 24.0) if wide else (min(64.0, (WIDTH - 12 - left) / len(names)), 28.0)

    columns, _ = keyed(names)
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
        body.append(word(cells.left - 8, down, rows[row], anchor="end"))
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

    # A title for each of many thousand cells would be larger than all else: the page's script looks it up.
    if not cells.readable:
        texts = [[brief(value) if math.isfinite(value) else "nan" for value in row] for row in values]
        facts = json.dumps({"rows": [*map(clean, rows)], "names": [*map(clean, names)], "values": texts})
        x, y = cells.corner(0, 0)
        area = f'x="{xy(x)}" y="{xy(y)}" width="{len(names) * cells.width:.2f}"'
        body.append(
            f'<rect class="h" {area} height="{len(rows) * cells.height:.2f}" data-cells="{esc(facts)}">'
            "<title></title></rect>"
        )
    return body


def shade_of(value: float, colours: tuple[float, float]) -> str:
    """Return the CSS class of a value's shade."""
    if not math.isfinite(value):
        return "qn"
    low, high = colours
    level = int((value - low) / ((high - low) or 1) * LEVELS)
    return f"q{min(LEVELS - 1, max(0, level))}"
