"""The report: one HTML page with everything in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from consilience.core.metrics import mean
from consilience.core.names import clean
from consilience.report._pieces import chips, copy, document, figure, sheet
from consilience.report._significance import best_of, differences
from consilience.report._sources import (
    alike,
    class_charts,
    forgotten,
    sharing_sheet,
    source_charts,
    source_sheet,
)
from consilience.report._svg import (
    Axis,
    LineOptions,
    Point,
    bars_chart,
    change_chart,
    esc,
    heat_map,
    lines_chart,
    scatter,
)
from consilience.report._text import (
    COST_COLUMNS,
    TRAITS,
    Column,
    by_metric,
    columns,
    duration,
    human,
    in_percent,
    markdown,
    matrix_columns,
    number,
    score,
    titled,
    trait,
)

if TYPE_CHECKING:
    from consilience.loop.result import Result

FOOTER = (
    "Scores are on each source&#8217;s test data, and in their mean every source or client counts the same, "
    "however many examples it has. ± is one standard deviation over repeats; "
    "curves and costs along a run are of the first repeat. "
    "MACs count forward and backward; bytes are as sent. "
    "Figures are saved as SVG or PNG, tables as CSV; values appear under the pointer."
)
COSTS = {"macs": ("MACs", "MACs"), "bytes": ("bytes", "bytes sent")}
"""Costs that scores are drawn against: their unit, and what they are called."""
BOUND = "joint"
"""The method that has all data at every stage: an upper bound for those that have not."""

Place = tuple[str, tuple[str, ...]]


def page(results: Sequence[Result], title: str | None = None) -> str:
    """Write the HTML text of a report."""
    # Each metric of a run is shown as a result of its own.
    runs, results = len(results), by_metric(results)
    tables = copy("Markdown", markdown(results))
    labels = names(results)
    if not title:
        only = f"{clean(results[0].method)}, {clean(results[0].setting)}"
        title = only if runs == 1 else "Comparison of methods"

    # One section per setting and its sources, then every result in detail; of many only the first is open.
    places = sorted(
        dict.fromkeys(place(result) for result in results),
        key=lambda at: [result.setting for result in results].index(at[0]),
    )
    body = [contents(places, results, labels), *(group(at, places, results, labels) for at in places)]
    body.append(f'<h2 id="results">{"Each result" if len(results) > 1 else "In detail"}</h2>')
    for i, result in enumerate(results):
        opened = len(results) <= 4 or i == 0
        body.append(detail(result, labels[i], i, opened, colour_range(results, result)))
    body.append(f'<h2 id="copy">Table to copy</h2><div class=grid>{tables}</div>')

    settings = {result.setting for result in results}
    data = dict.fromkeys(result.data for result in results)
    lead = [counted(runs, "result"), counted(len(settings), "setting"), *map(clean, data)]
    return document(title, lead, "".join(body), FOOTER)


def contents(places: Sequence[Place], results: Sequence[Result], labels: Sequence[str]) -> str:
    """Write the list of contents: every section, with the results that it compares."""
    items = []
    for number_of, at in enumerate(places):
        links = " ".join(
            f'<a href="#r{i}">{esc(labels[i])}</a>' for i, result in enumerate(results) if place(result) == at
        )
        heading = esc(heading_of(at, places))
        items.append(f'<li><a href="#g{number_of}">{heading}</a><span>{links}</span></li>')
    return f'<nav aria-label="Contents"><h2>Contents</h2><ol>{"".join(items)}</ol></nav>'


def heading_of(at: Place, places: Sequence[Place]) -> str:
    """Name a section: by its setting, and by its sources where a setting has several."""
    setting, sources = at
    if sum(other[0] == setting for other in places) < 2:
        return clean(setting)
    return f"{clean(setting)}: {clean(sources[0])} to {clean(sources[-1])}"


# Names and units.


def place(result: Result) -> Place:
    """Return what results must have in common to be compared: the setting and the sources."""
    return result.setting, result.sources


def counted(count: int, what: str) -> str:
    """Write a number of things.

    >>> counted(1, "setting"), counted(2, "result")
    ('1 setting', '2 results')
    """
    return f"{count} {what}{'s' * (count != 1)}"


def names(results: Sequence[Result]) -> list[str]:
    """Name each result: by its method, and by what distinguishes it from others of that method.

    >>> from consilience.report._text import example
    >>> names([example(), example("er"), example()])
    ['ewc', 'er', 'ewc (2)']
    """
    # Traits that differ within a place; those that differ between places are in the headings.
    places = {place(result) for result in results}
    differ = [
        name
        for name in TRAITS
        if name != "setting"
        and len({(place(result), trait(result, name)) for result in results}) > len(places)
    ]

    found: list[str] = []
    seen: dict[tuple[Place, str], int] = {}
    for result in results:
        parts = [clean(result.method) or "(no name)"]
        at = place(result)
        if sum(other.method == result.method and place(other) == at for other in results) > 1:
            repeats = counted(result.repeats, "repeat")
            parts += [repeats if name == "repeats" else trait(result, name) for name in differ]
        name = ", ".join(parts)
        seen[at, name] = seen.get((at, name), 0) + 1
        found.append(name if seen[at, name] == 1 else f"{name} ({seen[at, name]})")
    return found


def axis_of(metric: str) -> Axis:
    """Return how scores of a metric are written."""
    percent = in_percent(metric)

    def say(value: float) -> str:
        return number(value, percent) + (" %" if percent and math.isfinite(value) else "")

    def tick(value: float, step: float) -> str:
        shown = step * (100 if percent else 1)
        # As many digits as the step needs.
        integral = shown >= 1 and abs(shown - round(shown)) < 1e-9
        digits = 0 if integral else max(1, math.ceil(-math.log10(shown) - 1e-9))
        return number(value, percent, digits)

    return Axis(percent, say, tick)


def unit_of(metric: str) -> str:
    """Return the unit of a metric, for a heading."""
    return " (%)" if in_percent(metric) else ""


def colour_range(results: Sequence[Result], shown: Result) -> tuple[float, float]:
    """Return the values of the faintest and the strongest colour, equal for all results of one metric."""
    metric = shown.metric
    if in_percent(metric):
        return 0.0, 1.0
    matrices = [result.matrix.ravel().tolist() for result in results if result.metric == metric]
    finite = [value for values in matrices for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)

    # A far negative r2 would leave all others the strongest colour.
    if metric == "r2" and high <= 1:
        return min(0.0, max(low, -1.0)), 1.0
    # The best is the strongest.
    high = high if high > low else low + 1
    return (high, low) if shown.direction is False else (low, high)


def finite_or_nan(value: object) -> float:
    """Return a number as a float, and anything else as NaN."""
    return float(value) if isinstance(value, int | float) else math.nan


# The section of one setting.


def group(at: Place, places: Sequence[Place], results: Sequence[Result], labels: Sequence[str]) -> str:
    """Write the tables and the charts of the results in one place."""
    heading = heading_of(at, places)
    own = [i for i, result in enumerate(results) if place(result) == at]
    compared = [results[i] for i in own]
    named = [labels[i] for i in own]
    agreed, found = columns(compared)
    agreed.pop("setting", None)

    # Scores and costs in tables of their own: side by side they are wider than a screen.
    costs = [column for column in found if column.name in COST_COLUMNS]
    idle = [column for column in costs if set(column.cells) <= {"0", "0 B"}]
    scores = [column for column in found if column not in costs]
    special = {(i, "method"): method_cell(named[i], own[i]) for i in range(len(own))}
    cells = {
        (i, column.name): score_cell(result, compared, esc(column.cells[i]))
        for i, result in enumerate(compared)
        for column in scores
        if column.scores
    }
    tables = [sheet(f"Scores, {heading}", scores, {**special, **cells}, wide=True)]
    charts = [
        *stage_charts(heading, compared, named),
        *cost_charts(heading, compared, named),
        *([significance(compared, named)] if len(compared) > 1 else []),
    ]
    spent = [column for column in costs if column not in idle]
    if spent:
        charts.append(sheet(f"Costs, {heading}", [found[0], *spent], special))
    shown = "".join(filter(None, [*tables, *charts]))
    return (
        f'<section id="g{list(places).index(at)}"><h2>{esc(heading)}</h2>{chips(agreed.items())}'
        f"<div class=grid>{shown}</div></section>"
    )


def method_cell(name: str, i: int) -> str:
    """Write the name of a result as a link to its details."""
    return f'<th scope="row"><a href="#r{i}">{esc(name)}</a></th>'


def significance(results: Sequence[Result], labels: Sequence[str]) -> str:
    """Write how far each result is behind the best, and whether seeds explain it; "" without a best."""
    best = best_of(results)
    if best is None:
        return ""
    top = esc(labels[best])
    if all(result.repeats < 2 for result in results):
        # One seed shows no spread.
        text = f"Highest is {top}. With one seed per result nothing can be said about chance; use repeats=3."
        return f'<div class="card"><h4>Is the difference more than chance?</h4><p>{text}</p></div>'

    found, percent = differences(results), in_percent(results[best].metric)
    rows = [(labels[i], difference) for i, difference in found.items()]
    if not rows:
        return ""
    cells = [
        [name for name, _ in rows],
        [f"{number(each.behind, percent)} ± {number(each.half, percent)}" for _, each in rows],
        ["-" if math.isnan(each.p) else "< 0.001" if each.p < 0.001 else f"{each.p:.3f}" for _, each in rows],
        [str(each.seeds) for _, each in rows],
        ["yes" if each.p < 0.05 else "no" for _, each in rows],
    ]
    heads = ("method", "behind the best, 95 %", "p", "seeds", "significant")
    shown = [Column(head, column, i > 0) for i, (head, column) in enumerate(zip(heads, cells, strict=True))]
    note = (
        f"Against {labels[best]}: paired t-test over seeds, p by Holm for "
        f"{counted(len(rows), 'comparison')}; significant below 0.05"
    )
    return sheet("Is the difference more than chance?", shown, note=note)


def score_cell(result: Result, results: Sequence[Result], text: str) -> str:
    """Write a score, bold if it is the best of those on the same data, with a bar if it is a percentage."""
    rivals = [other.score for other in results if (other.data, other.metric) == (result.data, result.metric)]
    best_of = min if result.direction is False else max
    top = best_of(filter(math.isfinite, rivals), default=None)
    # Without a direction, none is the best.
    known = len(rivals) > 1 and result.direction is not None
    best = " best" if known and result.score == top else ""
    bar = ""
    if in_percent(result.metric) and math.isfinite(result.score):
        bar = f' style="--v:{100 * min(1.0, max(0.0, result.score)):.1f}%"'
    return f'<td class="r score{best}"{bar}>{text}</td>'


def stage_charts(setting: str, results: Sequence[Result], labels: Sequence[str]) -> list[str]:
    """Draw scores over stages, one chart per metric and stages."""
    charts = []
    for (metric, stages), own in stages_of(results).items():
        # One line says nothing about others, and more than eight cannot be distinguished.
        if not 2 <= len(own) <= 8:
            continue
        shown = f"{counted(len(own), 'result')} over {counted(len(stages), 'stage')}"
        label = f"Line chart: mean {metric} of {shown} in {setting}."
        axis, title = axis_of(metric), f"{metric}{unit_of(metric)} over stages"
        series = [(labels[i], mean(results[i].matrix, 1).tolist()) for i in own]
        if len(stages) == 1:
            before, after = ([values[at] for _, values in series] for at in (0, 1))
            label = f"Change chart: mean {metric} of {shown} in {setting}."
            svg = change_chart(label, [name for name, _ in series], before, after, axis)
            charts.append(figure(f"{metric}{unit_of(metric)} from start to end", svg, "Mean over sources"))
            continue

        # Colours are as in the charts of costs, where all results of the metric are.
        same = [i for i, result in enumerate(results) if result.metric == metric]
        spreads = [spread_of(results[i]) for i in own]
        options = LineOptions([same.index(i) for i in own], spreads, upper_bound(results, metric))
        svg = lines_chart(label, ["start", *stages], series, axis, options=options)
        band = "; bands: one standard deviation" if any(max(spread) > 0 for spread in spreads) else ""
        charts.append(figure(title, svg, f"Mean over sources and repeats{band}"))
    return charts


def spread_of(result: Result) -> list[float]:
    """Return the standard deviation over repeats of the mean over sources, before and after each stage."""
    means = mean(result.matrices, 2)
    if result.repeats < 2:
        return [0.0] * len(means[0])
    return [float(value) for value in means.std(0, ddof=1)]


def upper_bound(results: Sequence[Result], metric: str) -> tuple[str, float] | None:
    """Return the final score of the method that has all data at every stage, if it is among the results."""
    for result in results:
        if result.metric == metric and BOUND in (result.method, result.config.get("method")):
            return f"upper bound ({BOUND}, at the end)", result.score
    return None


def stages_of(results: Sequence[Result]) -> dict[Place, list[int]]:
    """Group results by metric and stages, because only such can be in one chart."""
    found: dict[Place, list[int]] = {}
    for i, result in enumerate(results):
        found.setdefault((result.metric, result.stages), []).append(i)
    return found


def cost_charts(setting: str, results: Sequence[Result], labels: Sequence[str]) -> list[str]:
    """Draw scores against costs, one chart per metric and kind of cost."""
    charts = []
    for metric in dict.fromkeys(result.metric for result in results):
        own = [
            (name, result) for name, result in zip(labels, results, strict=True) if result.metric == metric
        ]
        axis = axis_of(metric)
        for key, (unit, called) in COSTS.items():
            points = [point_of(name, result, key) for name, result in own]
            scored = [point for point in points if math.isfinite(point.score)]
            if not any(point.cost > 0 for point in scored):
                continue

            direction = own[0][1].direction
            top = (min if direction is False else max)(scored, key=lambda point: point.score)
            called_top = "highest" if direction is None else "best"
            best = f"{called_top} {top.name}, {axis.say(top.score)} at {human(top.cost)}"
            label = f"Scatter: {metric} against {called} in {setting}; {best}."
            svg = scatter(label, called, points, axis, human)
            title = f"{metric}{unit_of(metric)} against {unit}"
            along = "; thin lines: along the run" if any(len(point.curve) > 2 for point in points) else ""
            charts.append(figure(title, svg, f"Marks: results{along}"))
    return charts


def point_of(name: str, result: Result, cost: str) -> Point:
    """Place a result by its score and a cost."""
    curve = [(float(entry.get(cost, math.nan)), finite_or_nan(entry.get("score"))) for entry in result.curve]
    return Point(name, float(result.costs.get(cost) or 0), result.score, result.score_std, curve)


# The details of one result.


def detail(result: Result, name: str, i: int, opened: bool, colours: tuple[float, float]) -> str:
    """Write everything about one result, the i-th."""
    facts = chips((trait_name, trait(result, trait_name)) for trait_name in (*TRAITS, "seed"))
    unit = "<i> %</i>" if in_percent(result.metric) else ""
    charts, wide = charts_of(result, name, colours)

    # Charts of unequal height stand in two stacks, next to each other; one that is wide above them.
    above = charts[:1] if wide else []
    charts = [*above, *stacked(charts[len(above) :])]
    return (
        f'<details class=result id="r{i}"{" open" if opened else ""}><summary><h3>{esc(name)}</h3>'
        f"<span>{esc(result.setting)}, {esc(result.data)}</span><strong>{esc(score(result))}{unit}</strong>"
        f"</summary>{facts}<dl class=tiles>{tiles(result)}</dl>"
        f'<div class=grid>{"".join(charts)}</div><div class="grid">{texts(result, name)}</div></details>'
    )


def stacked(charts: Sequence[str]) -> list[str]:
    """Put charts into two stacks of about the same height, in their order."""
    stacks: tuple[list[str], list[str]] = ([], [])
    heights = [0.0, 0.0]
    for chart in charts:
        box = re.search(r'viewBox="0 0 (\S+) (\S+)"', chart)
        # A table has no view box, but rows.
        tall = 480 * float(box[2]) / float(box[1]) if box else min(440.0, 36.0 * chart.count("<tr>"))
        lower = heights.index(min(heights))
        stacks[lower].append(chart)
        heights[lower] += tall + 70
    return [f"<div class=stack>{''.join(stack)}</div>" for stack in stacks if stack]


def tiles(result: Result) -> str:
    """Write the figures of a result, each in a tile; those that it does not have are left out."""
    percent = in_percent(result.metric)
    shown = [(result.metric, score(result), "%" if percent else "")]
    said = ["forgetting", "global_forgetting", "backward_transfer", "forward_transfer"]
    if result.figure("forgetting") is not None:
        said.remove("global_forgetting")
    shown += [(name.replace("_", " "), number(result.figure(name), percent), "") for name in said]
    shown += [
        ("retained per source", number(result.figure("normalised"), True), "%"),
        ("mapper", number(result.mapper_accuracy, True), "%"),
        ("MACs", human(result.costs.get("macs")), ""),
        ("sent", human(result.costs.get("bytes"), "B"), ""),
        ("time", duration(result.costs.get("seconds")), ""),
    ]

    # A unit is smaller than its number.
    return "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(text)}{f'<i> {unit}</i>' if unit else ''}</dd></div>"
        for name, text, unit in shown
        if text not in ("-", "0", "0 B")
    )


def texts(result: Result, name: str) -> str:
    """Write the sources, the matrix, the configuration and the versions of a result."""
    unit = unit_of(result.metric)
    cards = [source_sheet(result, name)]
    cards.append(sheet(f"{result.metric}{unit} after each stage, {name}", matrix_columns(result), wide=True))
    if result.sharing:
        cards.append(sharing_sheet(result, name))
    if result.config:
        text = escape(configuration(result.config))
        cards.append(f'<div class="card wide"><h4>Configuration</h4><pre>{text}</pre></div>')
    if result.versions:
        lines = result.versions.items()
        facts = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in lines)
        cards.append(f"<div class=card><h4>Versions</h4><dl class=facts>{facts}</dl></div>")
    return "".join(cards)


def charts_of(result: Result, name: str, colours: tuple[float, float]) -> tuple[list[str], bool]:
    """Draw all charts of a result, the heat map first; also return whether it is wide."""
    axis = axis_of(result.metric)
    stages = ["start", *result.stages]
    extent = f"{counted(len(result.stages), 'stage')} on {counted(len(result.sources), 'source')}"
    label = f"Heat map: {result.metric} of {name} over {extent}; at the end {axis.say(result.score)}."

    def brief(value: float) -> str:
        if not axis.percent:
            return number(value, digits=2)
        # 100.0 is wider than a cell.
        return number(value, True, 1 if len(result.sources) <= 10 and value < 0.9995 else 0)

    matrix = result.matrix.tolist()
    heat, wide = heat_map(label, stages, result.sources, matrix, colours, axis.say, brief, result.learned_at)
    title = f"{titled(result)} on each source"
    charts = [
        figure(title, heat, "Rows: after each stage; columns: sources", wide),
        stages_chart(result, name, extent),
        forgetting_chart(result, name),
        *source_charts(result, name, axis),
        learning_chart(result, name),
        *class_charts(result, name),
    ]
    return [chart for chart in charts if chart], wide


def stages_chart(result: Result, name: str, extent: str) -> str:
    """Draw the score of each source over stages, and their mean."""
    axis = axis_of(result.metric)
    stages = ["start", *result.stages]
    # A source where the metric is undefined leaves a gap of its own, and none in the mean.
    means = mean(result.matrices, 2)
    average = mean(means, 0).tolist()
    std = spread_of(result)
    series = [(clean(source), result.matrix[:, j].tolist()) for j, source in enumerate(result.sources)]

    if len(stages) == 2:
        # Lines of two points would say that all came between them.
        label = f"Change chart: {result.metric} of {name} on {counted(len(result.sources), 'source')}."
        before, after = result.matrix[0].tolist(), result.matrix[1].tolist()
        shown = [source for source, _ in series]
        if len(shown) > 24:
            shown, before, after = ["mean"], average[:1], average[1:]
        svg = change_chart(label, shown, before, after, axis)
        return figure(f"{result.metric}{unit_of(result.metric)} from start to end", svg)

    course = f"from {axis.say(average[0])} to {axis.say(average[-1])} over {extent}"
    label = f"Line chart: mean {result.metric} of {name} goes {course}."
    svg = lines_chart(label, stages, series, axis, average, std)
    band = ", band: one standard deviation" if result.repeats > 1 else ""
    title = f"{result.metric}{unit_of(result.metric)} over stages"
    return figure(title, svg, f"Thin: sources; bold: their mean{band}")


def forgetting_chart(result: Result, name: str) -> str:
    """Draw the forgetting of each source; "" where it is not defined."""
    lost = [(result.sources[j], value) for j, value in forgotten(result).items()]
    if not lost or alike(result):
        return ""
    percent = in_percent(result.metric)
    shown, note = lost, "Best score after any earlier stage, minus the last"
    if len(lost) > 20:
        # The 20 largest changes, in the order of the sources.
        sizes = [0.0 if math.isnan(value) else abs(value) for _, value in lost]
        largest = sorted(range(len(lost)), key=lambda j: -sizes[j])[:20]
        shown = [lost[j] for j in sorted(largest)]
        note = f"The {len(shown)} sources that change most, of {len(lost)}"

    average = number(float(mean([value for _, value in lost])), percent)
    label = f"Bar chart: forgetting of {name} by source; mean {average}."
    sources, values = [source for source, _ in shown], [value for _, value in shown]
    svg = bars_chart(label, sources, values, lambda value: number(value, percent))
    return figure(f"forgetting{unit_of(result.metric)} of each source", svg, note)


def learning_chart(result: Result, name: str) -> str:
    """Draw scores within the tasks; "" where none were measured."""
    moments = result.learning_curve
    if len(moments) < 3:
        return ""
    # Each source has a line of its own, with gaps while others are trained on.
    series = [
        (
            clean(source),
            [finite_or_nan(point["score"]) if point["source"] == source else math.nan for point in moments],
        )
        for source in dict.fromkeys(str(point["source"]) for point in moments)
    ]
    steps = [human(point["steps"]) for point in moments]
    label = f"Line chart: {result.metric} of {name} on the source in training, at {len(moments)} steps."
    svg = lines_chart(label, steps, series, axis_of(result.metric))
    title = f"{result.metric}{unit_of(result.metric)} inside the tasks"
    return figure(title, svg, "On the source in training, over steps; first repeat")


def configuration(config: Mapping[str, object]) -> str:
    """Write a configuration as YAML.

    >>> print(configuration({"method": "ewc", "training": {"epochs": 1}}))
    method: ewc
    training:
      epochs: 1
    """
    import yaml

    plain = json.loads(json.dumps(dict(config), default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).rstrip()
