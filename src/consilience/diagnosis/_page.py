"""The page of a diagnosis: seven steps, each with its tables, its charts, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from consilience.core.metrics import mean
from consilience.core.names import clean
from consilience.diagnosis._steps import Step, outcome_columns, signed, spread, transfer_columns
from consilience.report._page import axis_of, counted
from consilience.report._pieces import chips, document, figure, sheet
from consilience.report._svg import Axis, bars_chart, change_chart, esc, heat_map, lines_chart
from consilience.report._text import Column, in_percent, number

if TYPE_CHECKING:
    from consilience.diagnosis._found import Diagnosis, Outcome

FOOTER = (
    "Better is better by the metric of a task, whichever its direction. Intervals are of 95 %, by paired "
    "t-tests over seeds: they say what other seeds would change, not what other data would. Relative changes "
    "are means over tasks of the change divided by the score. Gradients are those of the plain losses, on "
    "training examples, in eval mode. Figures are saved as SVG or PNG, tables as CSV; values appear under "
    "the pointer."
)
COSINE = Axis(False, lambda value: f"{value:.3f}", lambda value, step: f"{value:.2g}")


def page(diagnosis: Diagnosis, title: str | None = None) -> str:
    """Write the HTML text of the page of a diagnosis."""
    makers = {1: transfer, 2: grouped, 3: conflicts, 4: depths, 5: capacity, 6: soft, 7: balance}
    steps = diagnosis.steps
    body = [summary(diagnosis, steps)]
    for step in steps:
        cards = makers[step.number](diagnosis)
        body.append(section(step, cards))
    # What is missing is named, so that nobody takes it for something that was found harmless.
    if diagnosis.skipped:
        columns = [
            Column("part", list(diagnosis.skipped), False),
            Column("why", [f"{why[0].upper()}{why[1:]}" for why in diagnosis.skipped.values()], False),
        ]
        body.append(f"<h2>What was skipped</h2><div class=grid>{sheet('Skipped parts', columns)}</div>")

    seeds = counted(diagnosis.repeats, "seed")
    lead = [counted(len(diagnosis.tasks), "task"), seeds, *map(clean, diagnosis.tasks[:6])]
    return document(title or "Diagnosis of multi-task learning", lead, "".join(body), FOOTER)


def summary(diagnosis: Diagnosis, steps: Sequence[Step]) -> str:
    """Write what to do at the top, with links to the steps."""
    facts = [
        ("model", diagnosis.model),
        ("scenario", diagnosis.scenario),
        ("judged on", f"{diagnosis.on} data"),
        ("runs", f"{len(diagnosis.runs)} with {counted(diagnosis.repeats, 'seed')} each"),
        ("seconds", f"{sum(diagnosis.runs.values()):.0f}"),
    ]
    items = "".join(
        f'<p><a href="#step{step.number}">{step.number}. {esc(step.title)}</a>: {esc(step.do)}</p>'
        for step in steps
        if step.done
    )
    return f'{chips(facts)}<div class="card verdict"><h4>What to do</h4>{items}</div>'


def section(step: Step, cards: Sequence[str]) -> str:
    """Write one step: its title, what was found, what to do, and its charts."""
    found = "".join(
        f"<p{' class=flag' if text.startswith('Alert') else ''}>{esc(text)}</p>" for text in step.found
    )
    verdict = f'<div class="card verdict"><h4>What to do</h4><p>{esc(step.do)}</p>{found}</div>'
    grid = f"<div class=grid>{''.join(cards)}</div>" if cards else ""
    return (
        f'<section id="step{step.number}"><h2>{step.number}. {esc(step.title)}</h2>{verdict}{grid}</section>'
    )


def transfer(diagnosis: Diagnosis) -> list[str]:
    """Draw each task alone and together."""
    if not diagnosis.transfer:
        return []
    cards = [sheet("Each task alone and together", transfer_columns(diagnosis), wide=True)]
    # Tasks of one metric share an axis.
    for metric in dict.fromkeys(diagnosis.metrics):
        rows = [row for row in diagnosis.transfer if row.metric == metric]
        names, axis = [row.task for row in rows], axis_of(metric)
        label = f"Change chart: {metric} of {counted(len(rows), 'task')} alone and together."
        svg = change_chart(label, names, [row.alone for row in rows], [row.together for row in rows], axis)
        unit = " (%)" if in_percent(metric) else ""
        cards.append(figure(f"{metric}{unit} from alone to together", svg, "Ring: alone; dot: together"))
    return cards


def grouped(diagnosis: Diagnosis) -> list[str]:
    """Draw tasks added one by one, affinities, and groups."""
    cards = []
    if diagnosis.incremental:
        cards.append(added_sheet(diagnosis))
    if diagnosis.affinities is not None:
        values = diagnosis.affinities.matrix().tolist()
        cards.append(
            square(
                "Affinity of tasks",
                "affinities",
                diagnosis.tasks,
                values,
                "Row: the task whose gradient is followed; column: by how much of its loss the task gains",
            )
        )

    # By text: a picture of groups says no more than their names.
    if diagnosis.groupings:
        columns = [
            Column("by", [grouping.by for grouping in diagnosis.groupings], False),
            Column(
                "groups",
                [
                    " | ".join(" + ".join(map(clean, group)) for group in each.groups)
                    for each in diagnosis.groupings
                ],
                False,
            ),
        ]
        cards.append(sheet("Groups of tasks", columns))
    return cards


def added_sheet(diagnosis: Diagnosis) -> str:
    """Write the scores of all tasks as tasks are added."""
    columns = [Column("tasks", [f"+ {clean(added.task)}" for added in diagnosis.incremental], False)]
    gains = [added.gain for added in diagnosis.incremental]
    cells = ["-" if gain is None else f"{spread(gain, True)} %" for gain in gains]
    columns.append(Column("tasks before gain", cells))
    for j, (task, metric) in enumerate(zip(diagnosis.tasks, diagnosis.metrics, strict=True)):
        percent = in_percent(metric)
        scores = [
            number(added.scores[j], percent) if j < len(added.scores) else "-"
            for added in diagnosis.incremental
        ]
        columns.append(Column(clean(task), scores))
    note = "Scores of each task with all tasks up to that row; gains are against the row above"
    return sheet("Tasks added one by one", columns, note=note, wide=True)


def square(title: str, what: str, tasks: Sequence[str], values: list[list[float]], note: str) -> str:
    """Draw a matrix of tasks by tasks."""
    # Colours begin at 0, so that negative values stand out.
    finite = [value for row in values for value in row if math.isfinite(value)] or [0.0]
    svg, wide = heat_map(
        f"Heat map: {what} of {counted(len(tasks), 'task')}.",
        tasks,
        tasks,
        values,
        (min(0.0, *finite), max(finite)) if len(finite) > 1 else (0.0, 1.0),
        lambda value: f"{value:.3g}",
        lambda value: f"{value:.2g}",
    )
    return figure(title, svg, note, wide)


def conflicts(diagnosis: Diagnosis) -> list[str]:
    """Draw conflicts and cosines over training, by layer, and the cosines of pairs."""
    own = diagnosis.conflicts
    if own is None or not math.isfinite(float(mean(own.cosine()[:, -1]))):
        return []

    # Layers share both charts, so that they can be compared place by place.
    stages = [str(step) for step in own.steps]
    layers = list(enumerate(own.layers))
    extent = f"{counted(len(layers), 'layer')} at {counted(len(stages), 'place')}"
    ratio, cosine = own.ratio(), own.cosine()
    ratios = lines_chart(
        f"Line chart: conflict ratio over {extent}.",
        stages,
        [(clean(layer), ratio[:, i].tolist()) for i, layer in layers],
        axis_of("accuracy"),
    )
    cosines = lines_chart(
        f"Line chart: mean cosine over {extent}.",
        stages,
        [(clean(layer), cosine[:, i].tolist()) for i, layer in layers],
        COSINE,
    )

    cards = [
        figure("Pairs of tasks that conflict (%)", ratios, "Over steps, by layer; mean over seeds"),
        figure("Mean cosine of the gradients of pairs", cosines, "Over steps, by layer; mean over seeds"),
        square(
            "Cosine of tasks",
            "cosines",
            diagnosis.tasks,
            own.matrix().tolist(),
            "Mean over training and seeds",
        ),
    ]
    alerts = own.alerts()
    if alerts:
        columns = [
            Column("tasks", [" and ".join(map(clean, alert.tasks)) for alert in alerts], False),
            Column("layer", [clean(alert.layer) for alert in alerts], False),
            Column("median cosine", [f"{alert.cosine:.3f}" for alert in alerts]),
        ]
        cards.append(sheet("Pairs below -0.1 in more than half of the measurements", columns))
    return cards


def outcomes_of(outcomes: Sequence[Outcome], diagnosis: Diagnosis, first: str, title: str) -> list[str]:
    """Write the table of runs on all tasks, and draw what they gain."""
    # A bar for the mean of tasks, and the table for each of them.
    if not outcomes:
        return []
    svg = bars_chart(
        f"Bar chart: mean relative gain of {len(outcomes)} runs against training together.",
        [outcome.name for outcome in outcomes],
        [outcome.together.behind for outcome in outcomes],
        lambda value: signed(value, True),
        kinds=("won", "lost"),
    )
    table = sheet(title, outcome_columns(outcomes, diagnosis, first), wide=True)
    return [
        table,
        figure("Gain against plain training together (%)", svg, "Mean over tasks, relative to their scores"),
    ]


def depths(diagnosis: Diagnosis) -> list[str]:
    """Draw the models of other sharing depths."""
    return outcomes_of(diagnosis.depth, diagnosis, "model", "Sharing depths, trained together")


def capacity(diagnosis: Diagnosis) -> list[str]:
    """Write what a wider model gains."""
    own = diagnosis.capacity
    return (
        []
        if own is None
        else outcomes_of([own.outcome], diagnosis, "model", "A wider model, trained together")
    )


def soft(diagnosis: Diagnosis) -> list[str]:
    """Draw soft sharing."""
    return outcomes_of(diagnosis.soft, diagnosis, "soft sharing", "Soft sharing, trained together")


def balance(diagnosis: Diagnosis) -> list[str]:
    """Draw methods that balance, and the front of mixtures."""
    cards = outcomes_of(diagnosis.balance, diagnosis, "method", "Methods, trained together")
    front = diagnosis.front
    if front is None:
        return cards
    columns = outcome_columns(front.mixtures, diagnosis, "mixture")
    columns.insert(1, Column("Pareto front", ["yes" if free else "no" for free in front.free], False))
    share = f"the front dominates {number(front.hypervolume, True)} % of the box of all"
    return [
        *cards,
        sheet("Mixtures of tasks", columns, note=f"Judged by the mean over seeds; {share}", wide=True),
        trade(diagnosis),
    ]


def trade(diagnosis: Diagnosis) -> str:
    """Draw the mixtures by the two tasks whose scores vary most, with the front marked."""
    from consilience.merging._figures import Mark, scatter

    front = diagnosis.front
    assert front is not None
    columns = list(zip(*(mixture.scores for mixture in front.mixtures), strict=True))
    ranges = [max(column) - min(column) for column in columns]
    # Of many tasks, two can be drawn: those for which the mixture matters most.
    across, up = sorted(sorted(range(len(ranges)), key=lambda j: -ranges[j])[:2])
    best = max(range(len(front.mixtures)), key=lambda i: front.mixtures[i].together.behind)
    marks = [
        Mark(mixture.scores[across], mixture.scores[up], mixture.name, mixture.name, free, i == best)
        for i, (mixture, free) in enumerate(zip(front.mixtures, front.free, strict=True))
    ]
    names = (clean(diagnosis.tasks[across]), clean(diagnosis.tasks[up]))
    percent = in_percent(diagnosis.metrics[across]) and in_percent(diagnosis.metrics[up])
    label = f"Scatter: {counted(len(marks), 'mixture')} by the scores of {names[0]} and {names[1]}."
    note = "The two tasks whose scores vary most" if len(columns) > 2 else "Mean over seeds"
    return figure("Mixtures by the scores of two tasks", scatter(names, marks, label, percent), note)
