"""The report: one HTML page with everything in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from consilience.report._style import SCRIPT, STYLE
from consilience.report._svg import Point, bars_chart, esc, heat_map, lines_chart, scatter
from consilience.report._text import (
    FACTS,
    PERCENT,
    clean,
    columns,
    duration,
    fact,
    human,
    markdown,
    matrix_columns,
    number,
    score,
    tsv,
)

if TYPE_CHECKING:
    import numpy as np

    from consilience.loop.result import Result


POLICY = "default-src 'none';style-src 'unsafe-inline';script-src 'unsafe-inline';img-src data:"
"""The page asks the network for nothing, and the browser holds it to that."""


def page(results: Sequence[Result], title: str | None = None) -> str:
    """The HTML text of a report."""
    columns(results)
    labels = names(results)
    places = list(dict.fromkeys(place(r) for r in results))
    settings = list(dict.fromkeys(r.setting for r in results))
    title = title or (
        f"{clean(results[0].method)}, {clean(results[0].setting)}"
        if len(results) == 1
        else "Comparison of methods"
    )
    few = len(results) <= 4
    body = []
    for at in places:
        own = [i for i, r in enumerate(results) if place(r) == at]
        setting, sources = at
        alone = sum(other[0] == setting for other in places) == 1
        heading = (
            clean(setting) if alone else f"{clean(setting)}: {clean(sources[0])} to {clean(sources[-1])}"
        )
        body.append(group(heading, [results[i] for i in own], [labels[i] for i in own], own))
    body.append(
        '<h2 id="results">Each result</h2>' if len(results) > 1 else '<h2 id="results">In detail</h2>'
    )
    body += [
        detail(r, labels[i], i, few or not i, low_high(results, r.metric)) for i, r in enumerate(results)
    ]
    body.append(
        f"<h2>Tables to copy</h2><div class=grid>{copy('Markdown', markdown(results))}"
        f"{copy('Tab-separated', tsv(columns(results)[1]))}</div>"
    )
    lead = [
        counted(len(results), "result"),
        counted(len(settings), "setting"),
        *(clean(d) for d in dict.fromkeys(r.data for r in results)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{esc(title)}</title><style>{STYLE}</style></head><body>'
        f"<header><p class=brand>Consilience</p><h1>{esc(title)}</h1>"
        f"<p class=lead>{' <i>/</i> '.join(map(esc, lead))}</p></header>"
        f"<main>{''.join(body)}</main><footer>Scores are on each source&#8217;s test data. "
        "± is one standard deviation over repeats; "
        "curves and costs along a run are of the first repeat. MACs count forward and backward; bytes are as sent.</footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def place(r: Result) -> tuple[str, tuple[str, ...]]:
    """What results must share to be compared: the setting and the sources."""
    return r.setting, r.sources


def counted(n: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "setting"), counted(2, "result")
    ('1 setting', '2 results')
    """
    return f"{n} {what}{'s' * (n != 1)}"


def names(results: Sequence[Result]) -> list[str]:
    """A name for each result: its method, with what else tells it from the others.

    >>> from consilience.report._text import example
    >>> names([example(), example("er"), example()])
    ['ewc', 'er', 'ewc (2)']
    """
    differ = [
        n
        for n in FACTS
        if n != "setting"
        and len({(place(r), fact(r, n)) for r in results}) > len({place(r) for r in results})
    ]
    out: list[str] = []
    seen: dict[tuple[object, str], int] = {}
    for r in results:
        twice = sum(o.method == r.method and place(o) == place(r) for o in results) > 1
        extra = (
            [fact(r, n) if n != "repeats" else counted(r.repeats, "repeat") for n in differ] if twice else []
        )
        name = ", ".join([clean(r.method) or "(no name)", *extra])
        seen[place(r), name] = seen.get((place(r), name), 0) + 1
        out.append(name if seen[place(r), name] == 1 else f"{name} ({seen[place(r), name]})")
    return out


def say(percent: bool) -> Callable[[float], str]:
    """A score with its unit."""
    return lambda v: number(v, percent) + (" %" if percent and math.isfinite(v) else "")


def tick(percent: bool) -> Callable[[float, float], str]:
    """A score on an axis, with the digits that the step between marks needs."""

    def text(v: float, step: float) -> str:
        shown = step * (100 if percent else 1)
        digits = (
            0
            if shown >= 1 and abs(shown - round(shown)) < 1e-9
            else max(1, math.ceil(-math.log10(shown) - 1e-9))
        )
        return number(v, percent, digits)

    return text


def low_high(results: Sequence[Result], metric: str) -> tuple[float, float]:
    """The range of a heat map's colours, equal for all results of one metric."""
    if metric in PERCENT:
        return 0.0, 1.0
    finite = [
        v for r in results if r.metric == metric for v in r.matrix.ravel().tolist() if math.isfinite(v)
    ] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    return (
        (min(0.0, max(low, -1.0)), 1.0)
        if metric == "r2" and high <= 1
        else (low, high if high > low else low + 1)
    )


def figure(title: str, svg: str, note: str = "", wide: bool = False) -> str:
    """A chart with its title."""
    small = f"<small>{esc(note)}</small>" if note else ""
    caption = f"<figcaption>{esc(title)}{small}</figcaption>"
    return f'<figure class="card{" wide" if wide else ""}">{caption}<div class=scroll>{svg}</div></figure>'


def copy(title: str, text: str) -> str:
    """A text with a button that copies it."""
    return (
        f'<div class="card copy"><figcaption>{esc(title)}<button type="button">Copy</button></figcaption>'
        f'<textarea readonly rows="8" spellcheck="false" wrap="off" aria-label="{esc(title)}">\n{escape(text)}</textarea></div>'
    ).replace("figcaption>", "h4>")


def group(setting: str, results: Sequence[Result], labels: Sequence[str], ids: Sequence[int]) -> str:
    """The table of one setting, and what its results cost."""
    agreed, found = columns(results)
    agreed.pop("setting", None)
    chips = "".join(f"<span><b>{esc(n)}</b> {esc(v)}</span>" for n, v in agreed.items())
    head = "".join(f'<th scope="col"{" class=r" if c.right else ""}>{esc(c.name)}</th>' for c in found)
    peers: dict[tuple[str, str], list[float]] = {}
    for r in results:
        peers.setdefault((r.data, r.metric), []).append(r.score)
    rows = []
    for k, r in enumerate(results):
        cells = []
        for c in found:
            text = esc(c.cells[k])
            if c.name == "method":
                cells.append(f'<th scope="row"><a href="#r{ids[k]}">{text}</a></th>')
            elif c is found[score_at(found)]:
                rivals = peers[r.data, r.metric]
                best = (
                    " best"
                    if len(rivals) > 1 and r.score == max(filter(math.isfinite, rivals), default=None)
                    else ""
                )
                share = (
                    f' style="--v:{100 * min(1.0, max(0.0, r.score)):.1f}%"'
                    if r.metric in PERCENT and math.isfinite(r.score)
                    else ""
                )
                cells.append(f'<td class="r score{best}"{share}>{text}</td>')
            else:
                cells.append(f"<td{' class=r' if c.right else ''}>{text if text != '-' else '<i>-</i>'}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    table = (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    charts = []
    for (metric, _), own_stages in stages_of(results).items():
        if 2 <= len(own_stages) <= 8:
            percent = metric in PERCENT
            same = [k for k, r in enumerate(results) if r.metric == metric]
            series = [(labels[k], results[k].matrix.mean(1).tolist()) for k in own_stages]
            stages = ["start", *results[own_stages[0]].stages]
            many = f"{counted(len(series), 'result')} over {counted(len(stages) - 1, 'stage')}"
            label = f"Line chart: mean {metric} of {many} in {setting}."
            svg = lines_chart(
                label,
                stages,
                series,
                [],
                [],
                percent,
                say(percent),
                tick(percent),
                [same.index(k) for k in own_stages],
            )
            charts.append(
                figure(f"{metric}{' (%)' * percent} over stages", svg, "Mean over sources and repeats")
            )
    for metric in dict.fromkeys(r.metric for r in results):
        own = [(r, n) for r, n in zip(results, labels, strict=True) if r.metric == metric]
        for what, unit, words in (("macs", "MACs", "MACs"), ("bytes", "bytes", "bytes sent")):
            points = [
                Point(
                    n,
                    float(r.costs.get(what) or 0),
                    r.score,
                    r.score_std,
                    [(float(c.get(what, math.nan)), value(c.get("score"))) for c in r.curve],
                )
                for r, n in own
            ]
            if not any(p.x > 0 and math.isfinite(p.y) for p in points):
                continue
            percent = metric in PERCENT
            top = max((p for p in points if math.isfinite(p.y)), key=lambda p: p.y)
            label = f"Scatter: {metric} against {words} in {setting}; best {top.name}, {say(percent)(top.y)} at {human(top.x)}."
            svg = scatter(label, words, points, percent, say(percent), human, tick(percent))
            charts.append(
                figure(
                    f"{metric}{' (%)' * percent} against {unit}",
                    svg,
                    "Marks: results; thin lines: along the run",
                )
            )
    return (
        f"<section><h2>{esc(setting)}</h2><p class=chips>{chips}</p><div class=card>{table}</div>"
        f"{f'<div class=grid>{chr(10).join(charts)}</div>' if charts else ''}</section>"
    )


def stages_of(results: Sequence[Result]) -> dict[tuple[str, tuple[str, ...]], list[int]]:
    """Which results share their metric and stages, so that they can lie in one chart."""
    out: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for k, r in enumerate(results):
        out.setdefault((r.metric, r.stages), []).append(k)
    return out


def score_at(found: Sequence[object]) -> int:
    """Where the column of scores is: the one before forgetting."""
    return [getattr(c, "name", "") for c in found].index("forgetting") - 1


def value(v: object) -> float:
    """A number, or NaN."""
    return float(v) if isinstance(v, int | float) else math.nan


def forgotten(result: Result) -> tuple[list[str], np.ndarray] | None:
    """Forgetting of each source learned before the last stage, mean over repeats; None where it is not defined."""
    last = len(result.stages)
    if any(at is None for at in result.learned_at):
        return None
    past = [j for j, at in enumerate(result.learned_at) if at is not None and 0 < at < last]
    if not past:
        return None
    m: np.ndarray = result.matrices[:, :, past]
    return [result.sources[j] for j in past], (m[:, 1:last].max(1) - m[:, last]).mean(0)


def detail(r: Result, name: str, i: int, opened: bool, span: tuple[float, float]) -> str:
    """Everything about one result."""
    import numpy as np

    percent = r.metric in PERCENT
    speak = say(percent)
    many = len(r.sources) > 10
    brief = (
        (lambda v: number(v, True, 1 if not many and v < 0.9995 else 0))
        if percent
        else (lambda v: number(v, digits=2))
    )
    tiles = [
        (r.metric, score(r), "%" if percent else ""),
        ("forgetting", number(r.forgetting, percent), ""),
        ("backward transfer", number(r.backward_transfer, percent), ""),
        ("forward transfer", number(r.forward_transfer, percent), ""),
        *([("left of each source", number(r.normalised, True), "%")] if r.normalised is not None else []),
        *([("mapper", number(r.mapper_accuracy, True), "%")] if r.mapper is not None else []),
        ("MACs", human(r.costs.get("macs")), ""),
        ("sent", human(r.costs.get("bytes"), "B"), ""),
        ("time", duration(r.costs.get("seconds")), ""),
    ]
    stages = ["start", *r.stages]
    m = r.matrix
    per = r.matrices.mean(2)
    mean = per.mean(0).tolist()
    std = per.std(0, ddof=1).tolist() if r.repeats > 1 else [0.0] * len(stages)
    series = [(clean(s), m[:, j].tolist()) for j, s in enumerate(r.sources)]
    span_words = f"{counted(len(r.stages), 'stage')} on {counted(len(r.sources), 'source')}"
    label = f"Heat map: {r.metric} of {name} over {span_words}; at the end {speak(r.score)}."
    heat, wide = heat_map(label, stages, r.sources, m.tolist(), *span, speak, brief, r.learned_at)
    label = f"Line chart: mean {r.metric} of {name} goes from {speak(mean[0])} to {speak(mean[-1])} over {span_words}."
    unit = " (%)" if percent else ""
    charts = [
        figure(f"{r.metric}{unit} on each source", heat, "Rows: after each stage; columns: sources", wide),
        figure(
            f"{r.metric}{unit} over stages",
            lines_chart(label, stages, series, mean, std, percent, speak, tick(percent)),
            "Thin: sources; bold: their mean" + (", band: one standard deviation" if r.repeats > 1 else ""),
        ),
    ]
    lost = forgotten(r)
    if lost is not None:
        sources, values = lost
        order = list(range(len(sources)))
        if len(order) > 20:
            order = sorted(sorted(order, key=lambda j: -abs(np.nan_to_num(values[j])))[:20])
        label = f"Bar chart: forgetting of {name} by source; mean {number(r.forgetting, percent)}."
        note = (
            f"The {len(order)} sources that change most, of {len(sources)}"
            if len(order) < len(sources)
            else "Best score before the end, minus the last"
        )
        chosen = [float(values[j]) for j in order]
        charts.append(
            figure(
                f"forgetting{unit} of each source",
                bars_chart(label, [sources[j] for j in order], chosen, lambda v: number(v, percent)),
                note,
            )
        )
    if r.learning_curve:
        points = r.learning_curve
        inside = [
            (clean(s), [value(p["score"]) if p["source"] == s else math.nan for p in points])
            for s in dict.fromkeys(str(p["source"]) for p in points)
        ]
        label = f"Line chart: {r.metric} of {name} on what it learns, at {len(points)} moments of training."
        steps = [human(p["steps"]) for p in points]
        lines = lines_chart(label, steps, inside, [], [], percent, speak, tick(percent))
        charts.append(
            figure(
                f"{r.metric}{unit} inside the tasks",
                lines,
                "On the source being learned, over steps; first repeat",
            )
        )
    if not wide:
        charts = [charts[0], f"<div class=stack>{''.join(charts[1:])}</div>"]
    facts = "".join(f"<span><b>{esc(n)}</b> {esc(fact(r, n))}</span>" for n in (*FACTS, "seed"))
    shown = "".join(
        f"<div><dt>{esc(k)}</dt><dd>{esc(v)}{f'<i> {u}</i>' if u else ''}</dd></div>" for k, v, u in tiles
    )
    versions = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in r.versions.items())
    texts = (
        [f"<div class=card><h4>Configuration</h4><pre>{escape(configuration(r.config))}</pre></div>"]
        if r.config
        else []
    )
    texts += [f"<div class=card><h4>Versions</h4><dl class=facts>{versions}</dl></div>"] if r.versions else []
    texts.append(copy("Matrix, tab-separated", tsv(matrix_columns(r))))
    return (
        f'<details class=result id="r{i}"{" open" if opened else ""}><summary><h3>{esc(name)}</h3>'
        f"<span>{esc(r.setting)}, {esc(r.data)}</span><strong>{esc(score(r))}{'<i> %</i>' if percent else ''}</strong></summary>"
        f"<p class=chips>{facts}</p><dl class=tiles>{shown}</dl>"
        f'<div class=grid>{"".join(charts)}</div><div class="grid texts">{"".join(texts)}</div></details>'
    )


def configuration(config: Mapping[str, object]) -> str:
    """A configuration as YAML.

    >>> print(configuration({"method": "ewc", "training": {"epochs": 1}}))
    method: ewc
    training:
      epochs: 1
    """
    import yaml

    plain = json.loads(json.dumps(dict(config), default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).rstrip()
