"""Charts as inline SVG: heat map, lines, bars, scatter. Colours are CSS classes, so that both colour schemes fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from consilience.report._text import clean, short

LEVELS = 16
SIZE = 12.0
"""The size of the text, in the units of the view box."""


def esc(text: object) -> str:
    """Text that is safe in HTML, also between quotes."""
    return escape(clean(text), quote=True)


def xy(v: float) -> str:
    """A coordinate with at most one digit.

    >>> xy(3.0), xy(3.14), xy(-0.01)
    ('3', '3.1', '0')
    """
    return f"{round(v, 1) + 0.0:.1f}".removesuffix(".0")


def width(text: str) -> float:
    """About how wide a text is."""
    return 0.62 * SIZE * len(text)


def canvas(w: float, h: float, label: str, body: Sequence[str], least: float = 0) -> str:
    """An SVG of a given view box; it shrinks with the page, but not below `least` pixels."""
    style = f"max-width:{xy(w * 1.2)}px" + (f";min-width:{xy(least)}px" if least else "")
    return f'<svg viewBox="0 0 {xy(w)} {xy(h)}" role="img" aria-label="{esc(label)}" style="{style}">{"".join(body)}</svg>'


def word(x: float, y: float, text: object, kind: str = "", anchor: str = "start", turn: float = 0) -> str:
    """A text; `anchor` is start, middle or end."""
    at = f' text-anchor="{anchor}"' if anchor != "start" else ""
    turned = f' transform="rotate({xy(turn)} {xy(x)} {xy(y)})"' if turn else ""
    return f'<text x="{xy(x)}" y="{xy(y)}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}{at}{turned}>{esc(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{xy(x1)} {xy(y1)}L{xy(x2)} {xy(y2)}"/>'


def box(x: float, y: float, w: float, h: float, kind: str = "") -> str:
    """A rectangle with slightly round corners."""
    named = f' class="{kind}"' if kind else ""
    return f'<rect{named} x="{xy(x)}" y="{xy(y)}" width="{xy(w)}" height="{xy(h)}" rx="2"/>'


def path(points: Sequence[tuple[float, float]], kind: str, title: str = "") -> str:
    """A line through points, with gaps where one is not finite."""
    d, pen = "", "M"
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            d, pen = f"{d}{pen}{xy(x)} {xy(y)}", "L"
        else:
            pen = "M"
    return (
        f'<path class="{kind}" d="{d}">{f"<title>{esc(title)}</title>" if title else ""}</path>' if d else ""
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that lie between two.

    >>> ticks(0, 0.97), ticks(0.813, 0.904)
    ([0.0, 0.2, 0.4, 0.6, 0.8], [0.82, 0.84, 0.86, 0.88, 0.9])
    """
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    unit = 10.0 ** math.floor(math.log10(span / most))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if span / (unit * k) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) + 0.0 for i in range(int((high - first * step) / step + 1e-9) + 1)]


def bounds(values: Sequence[float], percent: bool) -> tuple[float, float]:
    """A range a little wider than the finite values; percentages stay in [0, 1]."""
    found = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    pad = max(0.06 * (high - low), 0.02 if percent else 1e-3 * max(1.0, abs(high)))
    low, high = low - pad, high + pad
    return (max(low, 0.0), min(high, 1.0)) if percent and min(found) >= 0 and max(found) <= 1 else (low, high)


@dataclass
class Plot:
    """The area of a chart with its scales and grid, in a view box 480 wide."""

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

    def at_x(self, v: float) -> float:
        left = self.left + (34 if self.zero else 14 if self.log else 0)
        if self.log:
            if v <= 0:
                return self.left + 12 if self.zero else math.nan
            a, b = math.log10(self.x[0]), math.log10(self.x[1])
            return left + (math.log10(v) - a) / (b - a or 1) * (self.right - left - 10)
        return left + (v - self.x[0]) / (self.x[1] - self.x[0] or 1) * (self.right - left)

    def at_y(self, v: float) -> float:
        return self.height - (v - self.y[0]) / (self.y[1] - self.y[0] or 1) * (self.height - self.top)

    def grid_y(self, say: Callable[[float, float], str]) -> None:
        """Horizontal lines; `say` gets a value and the step between them."""
        values = ticks(*self.y)
        step = values[1] - values[0] if len(values) > 1 else 1.0
        for v in values:
            self.body += [line(self.left, self.at_y(v), self.right, self.at_y(v), "g")]
            self.body += [word(self.left - 7, self.at_y(v) + 4, say(v, step), "m", "end")]

    def mark_x(self, at: float, text: str) -> None:
        half = width(text) / 2
        self.body += [line(at, self.height, at, self.height + 4, "a")]
        self.body += [word(min(max(at, half), 480 - half), self.height + 18, text, "m", "middle")]

    def axis(self) -> None:
        self.body += [line(self.left, self.height, self.right, self.height, "a")]


def legend(entries: Sequence[tuple[str, str]], top: float) -> tuple[list[str], float]:
    """Marks with their names, in as many lines as they need; returns the height they take too."""
    body, x, y = [], 12.0, top
    for mark, name in entries:
        text = short(name, 34)
        if x > 12 and x + 26 + width(text) > 476:
            x, y = 12.0, y + 20
        body.append(
            f'<g transform="translate({xy(x + 9)} {xy(y - 4)})">{mark}<title>{esc(name)}</title></g>{word(x + 24, y, text)}'
        )
        x += 42 + width(text)
    return body, y - top + 20 if entries else 0


def lines_chart(
    label: str,
    stages: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    mean: Sequence[float],
    std: Sequence[float],
    percent: bool,
    say: Callable[[float], str],
    tick: Callable[[float, float], str],
    colours: Sequence[int] = (),
) -> str:
    """Thin lines for each source and a bold one for their mean (none: []), with a band of one standard deviation over repeats."""
    band = [v for m, s in zip(mean, std, strict=True) for v in (m - s, m + s)]
    plot = Plot(
        (0, max(1, len(stages) - 1)), bounds([*(v for _, s in series for v in s), *mean, *band], percent)
    )
    plot.grid_y(tick)
    names = [short(s, 14) for s in stages]
    room = (plot.right - plot.left) / max(1, len(stages) - 1)
    if max(map(width, names)) + 8 > room:
        names = [str(i) for i in range(len(stages))]
    every = next(
        k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, len(stages)) if k * room > width(names[-1]) + 10
    )
    for i in range(0, len(stages), every):
        plot.mark_x(plot.at_x(i), names[i])
    plot.axis()
    colours = colours or range(len(series))
    for j, (name, values) in zip(colours, series, strict=True):
        kind = f"l s{j % 8}" if len(series) <= 8 else "l sx"
        last = next((v for v in reversed(values) if math.isfinite(v)), math.nan)
        kind += "" if mean else " strong"
        plot.body.append(
            path(
                [(plot.at_x(i), plot.at_y(v)) for i, v in enumerate(values)],
                kind,
                f"{name}: {say(last)} at the end",
            )
        )
    spread = [
        (i, m, s)
        for i, (m, s) in enumerate(zip(mean, std, strict=True))
        if math.isfinite(m) and math.isfinite(s)
    ]
    if any(s > 0 for _, _, s in spread):
        low, high = plot.y
        edge = [(plot.at_x(i), plot.at_y(min(m + s, high))) for i, m, s in spread]
        edge += [(plot.at_x(i), plot.at_y(max(m - s, low))) for i, m, s in reversed(spread)]
        plot.body.append(path(edge, "band", "one standard deviation over repeats"))
    for i, m in enumerate(mean):
        if len(mean) <= 12 and math.isfinite(m):
            title = f"{clean(stages[i])}: {say(m)}"
            plot.body.append(
                f'<circle class="dot" cx="{xy(plot.at_x(i))}" cy="{xy(plot.at_y(m))}" r="3.4">'
                f"<title>{esc(title)}</title></circle>"
            )
    plot.body.append(
        path([(plot.at_x(i), plot.at_y(m)) for i, m in enumerate(mean)], "l mean", "mean over sources")
    )
    stroke = '<path class="{}" d="M-8 0L8 0"/>'
    entries = [(stroke.format("l mean"), "mean")] if mean else []
    if len(series) <= 8:
        entries += (
            [(stroke.format(f"l s{j % 8}"), name) for j, (name, _) in zip(colours, series, strict=True)]
            if len(series) > 1 or not mean
            else []
        )
    else:
        entries += [(stroke.format("l sx"), f"each of the {len(series)} sources")]
    body, tall = legend(entries, plot.height + 46)
    return canvas(480, plot.height + 32 + tall, label, [*plot.body, *body])


def bars_chart(label: str, names: Sequence[str], values: Sequence[float], say: Callable[[float], str]) -> str:
    """A horizontal bar for each name, from zero."""
    left = 14 + max(width(short(n, 18)) for n in names)
    finite = [v for v in values if math.isfinite(v)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    start, end = left + (46 if low < 0 else 4), 480 - 50
    scale = (end - start) / (high - low or 1)
    tall = 24 if len(names) <= 12 else 19
    body = []
    zero = start - low * scale
    for i, (name, v) in enumerate(zip(names, values, strict=True)):
        y = 6 + i * tall
        body.append(
            f"<g><title>{esc(name)}: {esc(say(v))}</title>{word(left - 8, y + tall / 2 + 4, short(name, 18), '', 'end')}"
        )
        if math.isfinite(v):
            x, w = (zero, v * scale) if v >= 0 else (zero + v * scale, -v * scale)
            kind = "bar lost" if v >= 0 else "bar won"
            body.append(box(x, y + 4, max(w, 0.5), tall - 8, kind))
        at, anchor = (zero + v * scale + 6, "start") if not v < 0 else (zero + v * scale - 6, "end")
        body.append(
            word(at if math.isfinite(v) else zero + 6, y + tall / 2 + 4, say(v), "n", anchor) + "</g>"
        )
    height = 12 + len(names) * tall
    return canvas(480, height, label, [line(zero, 4, zero, height - 4, "a"), *body])


MARKS = (
    '<circle class="p c{}" r="5.5"/>',
    '<rect class="p c{}" x="-5" y="-5" width="10" height="10"/>',
    '<path class="p c{}" d="M0 -6.5L6.2 5L-6.2 5Z"/>',
    '<path class="p c{}" d="M0 -7L6.5 0L0 7L-6.5 0Z"/>',
    '<path class="p c{}" d="M0 6.5L6.2 -5L-6.2 -5Z"/>',
)


@dataclass(frozen=True)
class Point:
    """A result in a scatter: its cost and score, and the scores along its run."""

    name: str
    x: float
    y: float
    std: float
    curve: Sequence[tuple[float, float]]


def scatter(
    label: str,
    unit: str,
    points: Sequence[Point],
    percent: bool,
    say: Callable[[float], str],
    cost: Callable[[float], str],
    tick: Callable[[float, float], str],
) -> str:
    """A mark for each result, and a thin line for the scores along its run; the axis is logarithmic where costs differ widely."""
    shown = [(i, p) for i, p in enumerate(points) if math.isfinite(p.x) and math.isfinite(p.y)]
    some = [p.x for _, p in shown if p.x > 0]
    log = bool(some) and max(some) / min(some) > 20
    along = [
        (x, y)
        for _, p in shown
        for x, y in p.curve
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log)
    ]
    costs = [*some, *(x for x, _ in along)]
    heights = [v for _, p in shown for v in (p.y - p.std, p.y + p.std)] + [y for _, y in along]
    span = (min(costs), max(costs)) if log else (0.0, 1.04 * max([*costs, 1e-12]))
    plot = Plot(span, bounds(heights, percent), log, log and any(p.x <= 0 for _, p in shown))
    plot.grid_y(tick)
    if plot.zero:
        plot.mark_x(plot.at_x(0), "0")
    if log:
        a, b = math.ceil(math.log10(span[0]) - 1e-9), math.floor(math.log10(span[1]) + 1e-9)
        marks = [10.0**k for k in range(a, b + 1, max(1, math.ceil((b - a) / 5)))]
    else:
        marks = ticks(*span, 5)
    for v in marks:
        plot.mark_x(plot.at_x(v), re.sub(r"\.?0+(?= |$)", "", cost(v)) if "." in cost(v) else cost(v))
    plot.axis()
    plot.body.append(
        word(
            (plot.left + plot.right) / 2,
            plot.height + 37,
            unit + (", log scale" if log else ""),
            "m",
            "middle",
        )
    )
    for i, p in shown:
        trail = [(plot.at_x(x), plot.at_y(y)) for x, y in p.curve]
        plot.body.append(path(trail, f"trail s{i % 8}", f"{p.name}, along the first run"))
    for i, p in shown:
        x, y = plot.at_x(p.x), plot.at_y(p.y)
        if p.std > 0:
            plot.body.append(line(x, plot.at_y(p.y - p.std), x, plot.at_y(p.y + p.std), f"err s{i % 8}"))
        title = f"{p.name}: {say(p.y)} at {cost(p.x)} {unit}"
        plot.body.append(
            f'<g transform="translate({xy(x)} {xy(y)})">{MARKS[i % 5].format(i % 8)}<title>{esc(title)}</title></g>'
        )
    body, tall = legend(
        [(MARKS[i % 5].format(i % 8), p.name) for i, p in enumerate(points)], plot.height + 64
    )
    return canvas(480, plot.height + 48 + tall, label, [*plot.body, *body])


def heat_map(
    label: str,
    rows: Sequence[str],
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    low: float,
    high: float,
    say: Callable[[float], str],
    brief: Callable[[float], str],
    marked: Sequence[int | None],
) -> tuple[str, bool]:
    """A cell for each row and column, with its value where it is readable; whether the map is a wide one is returned too.

    `marked` holds for each column the row to outline.
    """
    n, m = len(names), len(rows)
    told = n <= 24 and m <= 42
    left = 14 + max(width(short(r, 18)) for r in rows)
    wide = n > 10 or m > 42
    if told:
        w, h = (37.0, 24.0) if wide else (min(64.0, (468 - left) / n), 28.0)
    else:
        w = max(1.5, min(24.0, (960 - left) / n))
        h = max(1.5, min(18.0, 560 / m))
    columns = [short(c, 16) for c in names]
    turned = max(map(width, columns)) + 6 > w
    top = (12 + max(map(width, columns)) * 0.72) if turned else 26.0
    turn_room = max(width(columns[-1]) * 0.72 - w / 2, 0.0) if turned else 0.0
    total = max(480.0, left + n * w + max(12.0, turn_room))

    def level(v: float) -> int:
        return min(LEVELS - 1, max(0, int((v - low) / ((high - low) or 1) * LEVELS)))

    body: list[str] = []
    every_column = max(1, math.ceil((20 if turned else 15) / w))
    for j in range(0, n, every_column):
        x = left + (j + 0.5) * w
        body.append(
            word(x + 2, top - 7, columns[j], turn=-46)
            if turned
            else word(x, top - 9, columns[j], anchor="middle")
        )
    every_row = max(1, math.ceil(15 / h))
    for i in range(0, m, every_row):
        body.append(word(left - 8, top + (i + 0.5) * h + 4, short(rows[i], 18), anchor="end"))
    gap = 1.0 if min(w, h) >= 8 else 0.0
    drawn: dict[str, list[str]] = {}
    for i in range(m):
        for j in range(n):
            v = values[i][j]
            q = f"q{level(v)}" if math.isfinite(v) else "qn"
            x, y = left + j * w, top + i * h
            if told:
                title = f"{clean(rows[i])}, {clean(names[j])}: {say(v)}"
                body.append(
                    f'<g class="{q}"><title>{esc(title)}</title>{box(x, y, w - gap, h - gap)}'
                    f"{word(x + (w - gap) / 2, y + h / 2 + 3.6, brief(v) if math.isfinite(v) else 'nan', 'v', 'middle')}</g>"
                )
            else:
                drawn.setdefault(q, []).append(
                    f"M{x:.2f} {y:.2f}h{w - gap:.2f}v{h - gap:.2f}h-{w - gap:.2f}z"
                )
    for q, cells in sorted(drawn.items()):
        body.append(f'<path class="{q}" d="{"".join(cells)}"/>')
    for j, at in enumerate(marked):
        if at is not None and 0 <= at < m and min(w, h) >= 4:
            x, y = left + j * w, top + at * h
            body.append(box(x + 0.5, y + 0.5, w - gap - 1, h - gap - 1, "learn"))
    y = top + m * h + 16
    for k in range(LEVELS):
        body.append(f'<rect class="q{k}" x="{xy(left + k * 9)}" y="{xy(y)}" width="9.3" height="9"/>')
    body.append(word(left, y + 23, say(low), "m"))
    body.append(word(left + LEVELS * 9, y + 23, say(high), "m", "end"))
    if any(a is not None for a in marked) and min(w, h) >= 4:
        x = left + LEVELS * 9 + 22
        body.append(box(x, y - 1, 14, 11, "learn") + word(x + 20, y + 9, "learned here", "m"))
    return canvas(total, y + 30, label, body, total * 0.8 if wide else 0), wide
