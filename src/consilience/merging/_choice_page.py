"""The page of a choice: the verdict, the table of candidates, and charts of scores and costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from consilience.core.names import clean
from consilience.report._page import axis_of
from consilience.report._pieces import document, figure, sheet
from consilience.report._svg import Point, bars_chart, esc, heat_map, scatter
from consilience.report._text import human, number

if TYPE_CHECKING:
    from consilience.merging._choose import Candidate, Choice

FOOTER = (
    "Candidates are selected on the validation parts and reported on the test parts. A forward pass is one "
    "call of a model per example. Figures are saved as SVG or PNG, tables as CSV; values appear under the "
    "pointer."
)


def page(choice: Choice, title: str | None = None) -> str:
    """Write the HTML text of the page of a choice."""
    title = title or "Which model to use"
    ranked = choice.ranked()
    score = "accuracy" if choice.labels else "agreement with the ensemble"
    flags = "".join(f'<p class="flag">{esc(flag)}</p>' for flag in choice.flags)
    notes = "".join(f"<p><i>{esc(note)}</i></p>" for note in choice.notes)
    verdict = f'<div class="card verdict"><h4>Verdict</h4><p>{esc(choice.verdict)}</p>{flags}{notes}</div>'

    table = sheet("Candidates, best by validation first", choice.columns(), wide=True)
    charts = [bars(ranked, score), costs(ranked, score)]
    if len(choice.sources) > 1:
        charts.append(by_source(choice, ranked, score))
    body = f"{verdict}<div class=grid>{table}{''.join(charts)}</div>"
    counts = [f"{len(ranked)} candidates", f"{len(choice.sources)} sources"]
    return document(title, [*counts, *map(clean, choice.sources[:6])], body, FOOTER)


def bars(ranked: Sequence[Candidate], score: str) -> str:
    """Draw the score of each candidate on the test parts."""
    axis = axis_of("accuracy")
    names, values = [candidate.name for candidate in ranked], [candidate.mean for candidate in ranked]
    svg = bars_chart(
        f"Bar chart: {score} of {len(names)} candidates.", names, values, axis.say, (), ("at", "at")
    )
    return figure(f"{score} (%) on the test parts", svg, "Mean over sources; best by validation first")


def costs(ranked: Sequence[Candidate], score: str) -> str:
    """Draw the score of each candidate against the parameters that it stores."""
    axis = axis_of("accuracy")
    points = [Point(each.name, float(each.parameters), each.mean, 0.0, ()) for each in ranked]
    label = f"Scatter: {score} of {len(points)} candidates against parameters."
    return figure(f"{score} (%) against parameters", scatter(label, "parameters", points, axis, human))


def by_source(choice: Choice, ranked: Sequence[Candidate], score: str) -> str:
    """Draw the score of each candidate on each source."""
    axis = axis_of("accuracy")
    values = [[candidate.test[source] for source in choice.sources] for candidate in ranked]
    svg, wide = heat_map(
        f"Heat map: {score} of {len(ranked)} candidates on {len(choice.sources)} sources.",
        [candidate.name for candidate in ranked],
        choice.sources,
        values,
        (0.0, 1.0),
        axis.say,
        lambda value: number(value, True, 0),
    )
    return figure(f"{score} (%) on each source", svg, "Test parts", wide)
