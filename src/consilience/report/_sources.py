"""What a result says of each source, or site, and of each class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from consilience.core.metrics import lost, mean
from consilience.core.names import clean
from consilience.report._pieces import figure, sheet
from consilience.report._svg import Axis, bars_chart, heat_map
from consilience.report._text import Column, in_percent, number

if TYPE_CHECKING:
    from consilience.loop.result import Result

MOST = 24
"""Bars in one chart; of more sources or classes the lowest are shown, and all are in the table."""
PLAIN = ("at", "at")
"""The class of bars that are neither losses nor gains."""


def final_scores(result: Result) -> tuple[list[float], list[float]]:
    """Return the final score of each source, and its standard deviation over repeats (0 for one)."""
    rows = np.stack([matrix[-1] for matrix in result.final])
    std = rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])
    return mean(rows, 0).tolist(), np.nan_to_num(std).tolist()


def forgotten(result: Result) -> dict[int, float]:
    """Return the forgetting of sources by their place, mean over repeats; {} if undefined.

    max_{0 < i < T} R[i, j] - R[T, j], with R [stages + 1, sources] and T the last stage: over the sources
    that were learned before it, or, where some are learned at several stages, over all. NaN is left out.
    """
    last = len(result.stages)
    past = [j for j, at in enumerate(result.learned_at) if at is None or 0 < at < last]
    several = any(at is None for at in result.learned_at)
    if not past or result.figure("global_forgetting" if several else "forgetting") is None:
        return {}
    good = -result.matrices if result.direction is False else result.matrices
    values = [float(mean([lost(matrix[:, j]) for matrix in good])) for j in past]
    return {j: value for j, value in zip(past, values, strict=True) if math.isfinite(value)}


def source_sheet(result: Result, name: str) -> str:
    """Write a table of all sources: their sizes, when they were learned, scores, and what was forgotten."""
    percent, matrix = in_percent(result.metric), result.matrix
    final, std = final_scores(result)
    values = forgotten(result)
    scores = [number(value, percent) for value in final]
    if result.repeats > 1:
        scores = [f"{text} ± {number(value, percent)}" for text, value in zip(scores, std, strict=True)]

    stages = [
        "several" if at is None else result.stages[at - 1] if 0 < at <= len(result.stages) else "-"
        for at in result.learned_at
    ]
    found = [
        Column("source", [clean(source) for source in result.sources], False),
        *(
            Column(head, [f"{size[k]:,}" for size in result.sizes] or ["-"] * len(result.sources))
            for k, head in enumerate(("training examples", "test examples"))
        ),
        Column("trained at", [clean(stage) for stage in stages], False),
        Column("before", [number(float(value), percent) for value in matrix[0]]),
        Column("final", scores),
        Column("forgetting", [number(values.get(j), percent) for j in range(len(result.sources))]),
    ]
    kept = [column for column in found if set(column.cells) != {"-"}]
    return sheet(f"Sources, {name}", kept, wide=True)


def source_charts(result: Result, name: str, axis: Axis) -> list[str]:
    """Draw the final score and the size of each source, and what clients have by their own parameters."""
    unit = " (%)" if axis.percent else ""
    final, std = final_scores(result)
    charts = []
    shown = lowest(result, final)
    names = [result.sources[j] for j in shown]
    if len(result.sources) > 1 and not alike(result):
        note = "Whiskers: one standard deviation" if result.repeats > 1 else ""
        if len(shown) < len(final):
            note = f"The {len(shown)} sources with the worst scores, of {len(final)}. {note}"
        label = f"Bar chart: final {result.metric} of {name} by source."
        values, spreads = [final[j] for j in shown], [std[j] for j in shown]
        svg = bars_chart(label, names, values, axis.say, spreads, PLAIN)
        charts.append(figure(f"final {result.metric}{unit} of each source", svg, note))
    if len({size for size, _ in result.sizes}) > 1:
        label = f"Bar chart: training examples of each source of {name}."
        sizes = [float(result.sizes[j][0]) for j in shown]
        svg = bars_chart(label, names, sizes, count, (), PLAIN)
        charts.append(figure("training examples of each source", svg))

    if result.personal:
        clients = [client for client, value in result.personal.items() if value is not None][:MOST]
        values = [float(result.personal[client]) for client in clients]
        label = f"Bar chart: {result.metric} of each client of {name} by its own parameters."
        if clients:
            svg = bars_chart(label, clients, values, axis.say, (), PLAIN)
            note = "Each client's own parameters on its own test data"
            charts.append(figure(f"{result.metric}{unit} of each client", svg, note))
    return charts


def alike(result: Result) -> bool:
    """Whether several sources have the same scores, as with one test for all: charts would repeat them."""
    every = result.matrices
    return len(result.sources) > 1 and all(
        np.array_equal(every[..., 0], every[..., j]) for j in range(len(result.sources))
    )


def lowest(result: Result, final: list[float]) -> list[int]:
    """Return the places of the sources that a chart shows: all, or those with the worst scores."""
    sign = -1 if result.direction is False else 1
    worst = sorted(range(len(final)), key=lambda j: sign * final[j] if math.isfinite(final[j]) else -math.inf)
    return sorted(worst[:MOST])


def count(value: float) -> str:
    """Write a number of examples."""
    return f"{value:,.0f}"


def sharing_sheet(result: Result, name: str) -> str:
    """Write a table of how each task mixes experts or networks, with the entropy of its gates."""
    rows = [(task, place, own) for task, places in result.sharing.items() for place, own in places.items()]
    # Next to the entropy of even weights, so that a closed gate shows.
    entropies = [
        "-" if own["entropy"] is None else f"{own['entropy']:.3f} of {math.log(len(own['parts'])):.3f}"
        for _, _, own in rows
    ]
    weights = [
        ", ".join(f"{part} {weight:.3f}" for part, weight in zip(own["parts"], own["weights"], strict=True))
        for _, _, own in rows
    ]
    found = [
        Column("task", [task for task, _, _ in rows], False),
        Column("place", [place for _, place, _ in rows], False),
        Column("entropy", entropies, True),
        Column("mean weights", weights, False),
    ]
    note = "Means over training data at the end of the first repeat; entropies of gates in nats"
    return sheet(f"what each task shares, {name}", found, note=note, wide=True)


def class_charts(result: Result, name: str) -> list[str]:
    """Draw which classes are taken for which, and how many of each are right; [] without counts."""
    counts = result.confusion
    if counts is None or not counts.sum():
        return []
    # A class without test examples has no row, and one that no example is taken for has no column.
    spaces = {space for space, _ in result.labels}
    labels = [clean(label if len(spaces) == 1 else f"{space}: {label}") for space, label in result.labels]
    rows = [i for i in range(len(labels)) if counts[i].sum()]
    columns = [j for j in range(len(labels)) if counts[:, j].sum() or j in rows]
    answers = [labels[j] for j in columns]
    if counts[:, -1].sum():
        columns, answers = [*columns, len(labels)], [*answers, "no class"]

    shares = counts[np.ix_(rows, columns)] / counts[rows].sum(1, keepdims=True)
    right = [float(counts[i, i] / counts[i].sum()) for i in rows]
    say = lambda value: f"{number(value, True)} %"  # noqa: E731
    heat, wide = heat_map(
        f"Heat map: answers of {name} by class; {number(float(np.mean(right)), True)} % right on average.",
        [labels[i] for i in rows],
        answers,
        shares.tolist(),
        (0.0, 1.0),
        say,
        lambda value: number(value, True, 0) if value else "",
    )
    charts = [figure("answers (%) by class", heat, "Rows: true classes; columns: answers, at the end", wide)]

    # The classes that are most often wrong are what one looks for.
    order = sorted(range(len(rows)), key=lambda i: right[i])[:MOST]
    shown = sorted(order)
    some = f"The {len(shown)} lowest of {len(rows)}" if len(shown) < len(rows) else ""
    label = f"Bar chart: accuracy of {name} by class."
    svg = bars_chart(label, [labels[rows[i]] for i in shown], [right[i] for i in shown], say, (), PLAIN)
    charts.append(figure("accuracy (%) of each class", svg, some))
    charts.append(class_sheet(counts, rows, labels, right, name))
    return charts


def class_sheet(counts: np.ndarray, rows: list[int], labels: list[str], right: list[float], name: str) -> str:
    """Write a table of classes: how many examples, how many are right, and what they are taken for."""
    others = counts[rows].copy()
    others[range(len(rows)), rows] = 0
    taken = [
        (labels[j] if j < len(labels) else "no class") if row[j] else "-"
        for row in others
        for j in [int(row.argmax())]
    ]
    return sheet(
        f"Classes, {name}",
        [
            Column("class", [labels[i] for i in rows], False),
            Column("test examples", [f"{int(counts[i].sum()):,}" for i in rows]),
            Column("right %", [number(value, True) for value in right]),
            Column("most often taken for", taken, False),
        ],
    )
