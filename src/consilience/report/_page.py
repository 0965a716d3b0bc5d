"""The report: one HTML page with everything in it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from consilience.core.metrics import lost, mean
from consilience.core.names import clean
from consilience.report._style import SCRIPT, STYLE
from consilience.report._svg import Axis, Point, bars_chart, esc, heat_map, lines_chart, scatter
from consilience.report._text import (
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
    tsv,
)

if TYPE_CHECKING:
    from consilience.loop.result import Result

# The page asks the network for nothing, and the browser enforces it.
POLICY = "default-src 'none';style-src 'unsafe-inline';script-src 'unsafe-inline';img-src data:"
FOOTER = (
    "Scores are on each source&#8217;s test data, and in their mean every source or client counts the same, "
    "however many examples it has. ± is one standard deviation over repeats; "
    "curves and costs along a run are of the first repeat. "
    "MACs count forward and backward; bytes are as sent."
)
COSTS = {"macs": ("MACs", "MACs"), "bytes": ("bytes", "bytes sent")}
"""Costs that scores are drawn against: their unit, and what they are called."""

Place = tuple[str, tuple[str, ...]]


def page(results: Sequence[Result], title: str | None = None) -> str:
    """Write the HTML text of a report."""
    # Each metric of a run is shown as a result of its own.
    runs, results = len(results), by_metric(results)
    tables = f"{copy('Markdown', markdown(results))}{copy('Tab-separated', tsv(columns(results).columns))}"
    labels = names(results)
    if not title:
        only = f"{clean(results[0].method)}, {clean(results[0].setting)}"
        title = only if runs == 1 else "Comparison of methods"

    # One section per setting and its sources, then every result in detail; of many only the first is open.
    places = list(dict.fromkeys(place(result) for result in results))
    body = [group(at, places, results, labels) for at in places]
    body.append(f'<h2 id="results">{"Each result" if len(results) > 1 else "In detail"}</h2>')
    for i, result in enumerate(results):
        opened = len(results) <= 4 or i == 0
        body.append(detail(result, labels[i], i, opened, colour_range(results, result)))
    body.append(f"<h2>Tables to copy</h2><div class=grid>{tables}</div>")

    settings = {result.setting for result in results}
    data = dict.fromkeys(result.data for result in results)
    lead = [counted(runs, "result"), counted(len(settings), "setting"), *map(clean, data)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{esc(title)}</title><style>{STYLE}</style></head><body>'
        f"<header><p class=brand>Consilience</p><h1>{esc(title)}</h1>"
        f"<p class=lead>{' <i>/</i> '.join(map(esc, lead))}</p></header>"
        f"<main>{''.join(body)}</main><footer>{FOOTER}</footer><script>{SCRIPT}</script></body></html>\n"
    )


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


# Pieces of HTML.


def figure(title: str, svg: str, note: str = "", wide: bool = False) -> str:
    """Write a chart with its title."""
    small = f"<small>{esc(note)}</small>" if note else ""
    caption = f"<figcaption>{esc(title)}{small}</figcaption>"
    return f'<figure class="card{" wide" if wide else ""}">{caption}<div class=scroll>{svg}</div></figure>'


def copy(title: str, text: str) -> str:
    """Write a text with a button that copies it."""
    return (
        f'<div class="card copy"><h4>{esc(title)}<button type="button">Copy</button></h4>'
        f'<textarea readonly rows="8" spellcheck="false" wrap="off" aria-label="{esc(title)}">\n'
        f"{escape(text)}</textarea></div>"
    )


def chips(facts: Iterable[tuple[str, str]]) -> str:
    """Write names and values in a row."""
    shown = "".join(f"<span><b>{esc(name)}</b> {esc(value)}</span>" for name, value in facts)
    return f"<p class=chips>{shown}</p>"


# The section of one setting.


def group(at: Place, places: Sequence[Place], results: Sequence[Result], labels: Sequence[str]) -> str:
    """Write the table and the charts of the results in one place."""
    setting, sources = at
    heading = clean(setting)
    if sum(other[0] == setting for other in places) > 1:
        heading = f"{heading}: {clean(sources[0])} to {clean(sources[-1])}"

    own = [i for i, result in enumerate(results) if place(result) == at]
    compared = [results[i] for i in own]
    named = [labels[i] for i in own]
    agreed, found = columns(compared)
    agreed.pop("setting", None)
    charts = [*stage_charts(heading, compared, named), *cost_charts(heading, compared, named)]
    shown = f"<div class=grid>{chr(10).join(charts)}</div>" if charts else ""
    return (
        f"<section><h2>{esc(heading)}</h2>{chips(agreed.items())}"
        f"<div class=card>{results_table(compared, found, own)}</div>{shown}</section>"
    )


def results_table(results: Sequence[Result], found: Sequence[Column], ids: Sequence[int]) -> str:
    """Write a table of results; `ids` are the numbers of their details."""
    head = "".join(
        f'<th scope="col"{" class=r" if column.right else ""}>{esc(column.name)}</th>' for column in found
    )
    rows = []
    for i, result in enumerate(results):
        cells = []
        for column in found:
            text = esc(column.cells[i])
            if column.name == "method":
                cells.append(f'<th scope="row"><a href="#r{ids[i]}">{text}</a></th>')
            elif column.scores:
                cells.append(score_cell(result, results, text))
            else:
                shown = text if text != "-" else "<i>-</i>"
                cells.append(f"<td{' class=r' if column.right else ''}>{shown}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


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
        series = [(labels[i], mean(results[i].matrix, 1).tolist()) for i in own]
        shown = f"{counted(len(series), 'result')} over {counted(len(stages), 'stage')}"
        label = f"Line chart: mean {metric} of {shown} in {setting}."

        # Colours are as in the charts of costs, where all results of the metric are.
        same = [i for i, result in enumerate(results) if result.metric == metric]
        colours = [same.index(i) for i in own]
        svg = lines_chart(label, ["start", *stages], series, axis_of(metric), colours=colours)
        charts.append(figure(f"{metric}{unit_of(metric)} over stages", svg, "Mean over sources and repeats"))
    return charts


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
            charts.append(figure(title, svg, "Marks: results; thin lines: along the run"))
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

    # A heat map that is not wide stands left of all other charts.
    if not wide:
        charts = [charts[0], f"<div class=stack>{''.join(charts[1:])}</div>"]
    return (
        f'<details class=result id="r{i}"{" open" if opened else ""}><summary><h3>{esc(name)}</h3>'
        f"<span>{esc(result.setting)}, {esc(result.data)}</span><strong>{esc(score(result))}{unit}</strong>"
        f"</summary>{facts}<dl class=tiles>{tiles(result)}</dl>"
        f'<div class=grid>{"".join(charts)}</div><div class="grid texts">{texts(result)}</div></details>'
    )


def tiles(result: Result) -> str:
    """Write the figures of a result, each in a tile."""
    percent = in_percent(result.metric)
    shown = [
        (result.metric, score(result), "%" if percent else ""),
        ("forgetting", number(result.figure("forgetting"), percent), ""),
        ("backward transfer", number(result.figure("backward_transfer"), percent), ""),
    ]
    forward = result.figure("forward_transfer")
    if forward is not None:
        shown.append(("forward transfer", number(forward, percent), ""))
    retained = result.figure("normalised")
    if retained is not None:
        shown.append(("retained per source", number(retained, True), "%"))
    if result.mapper is not None:
        shown.append(("mapper", number(result.mapper_accuracy, True), "%"))
    shown += [
        ("MACs", human(result.costs.get("macs")), ""),
        ("sent", human(result.costs.get("bytes"), "B"), ""),
        ("time", duration(result.costs.get("seconds")), ""),
    ]

    # A unit is smaller than its number.
    return "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(text)}{f'<i> {unit}</i>' if unit else ''}</dd></div>"
        for name, text, unit in shown
    )


def texts(result: Result) -> str:
    """Write the configuration, the versions and the matrix of a result."""
    cards = []
    if result.config:
        text = escape(configuration(result.config))
        cards.append(f"<div class=card><h4>Configuration</h4><pre>{text}</pre></div>")
    if result.versions:
        lines = result.versions.items()
        facts = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in lines)
        cards.append(f"<div class=card><h4>Versions</h4><dl class=facts>{facts}</dl></div>")
    cards.append(copy("Matrix, tab-separated", tsv(matrix_columns(result))))
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
        learning_chart(result, name),
    ]
    return [chart for chart in charts if chart], wide


def stages_chart(result: Result, name: str, extent: str) -> str:
    """Draw the score of each source over stages, and their mean."""
    axis = axis_of(result.metric)
    stages = ["start", *result.stages]
    # A source where the metric is undefined leaves a gap of its own, and none in the mean.
    means = mean(result.matrices, 2)
    average = mean(means, 0).tolist()
    std = means.std(0, ddof=1).tolist() if result.repeats > 1 else [0.0] * len(stages)
    series = [(clean(source), result.matrix[:, j].tolist()) for j, source in enumerate(result.sources)]

    course = f"from {axis.say(average[0])} to {axis.say(average[-1])} over {extent}"
    label = f"Line chart: mean {result.metric} of {name} goes {course}."
    svg = lines_chart(label, stages, series, axis, average, std)
    band = ", band: one standard deviation" if result.repeats > 1 else ""
    title = f"{result.metric}{unit_of(result.metric)} over stages"
    return figure(title, svg, f"Thin: sources; bold: their mean{band}")


def forgetting_chart(result: Result, name: str) -> str:
    """Draw the forgetting of each source; "" where it is not defined."""
    lost = forgotten(result)
    if not lost:
        return ""
    percent = in_percent(result.metric)
    shown, note = lost, "Best score before the end, minus the last"
    if len(lost) > 20:
        # The 20 largest changes, in the order of the sources.
        sizes = [0.0 if math.isnan(value) else abs(value) for _, value in lost]
        largest = sorted(range(len(lost)), key=lambda j: -sizes[j])[:20]
        shown = [lost[j] for j in sorted(largest)]
        note = f"The {len(shown)} sources that change most, of {len(lost)}"

    label = f"Bar chart: forgetting of {name} by source; mean {number(result.figure('forgetting'), percent)}."
    sources, values = [source for source, _ in shown], [value for _, value in shown]
    svg = bars_chart(label, sources, values, lambda value: number(value, percent))
    return figure(f"forgetting{unit_of(result.metric)} of each source", svg, note)


def forgotten(result: Result) -> list[tuple[str, float]]:
    """Return the forgetting of each source learned before the last stage, mean over repeats; [] if undefined.

    max_{0 < i < T} R[i, j] - R[T, j], with R [stages + 1, sources] and T the last stage. NaN is left out.
    """
    last = len(result.stages)
    if any(at is None for at in result.learned_at) or result.figure("forgetting") is None:
        return []
    past = [j for j, at in enumerate(result.learned_at) if at is not None and 0 < at < last]
    if not past:
        return []
    good = -result.matrices if result.direction is False else result.matrices
    values = [float(mean([lost(matrix[:, j]) for matrix in good])) for j in past]
    return [(result.sources[j], v) for j, v in zip(past, values, strict=True) if math.isfinite(v)]


def learning_chart(result: Result, name: str) -> str:
    """Draw scores within the tasks; "" where none were measured."""
    moments = result.learning_curve
    if not moments:
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
