"""From what users give as `metric` to the metrics of each source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from consilience import metrics
from consilience.core.errors import ConsilienceError, kind_of, unknown
from consilience.core.metrics import Metric
from consilience.core.source import LabelFrame, Source
from consilience.metrics._others import Own, TorchMetric

One: TypeAlias = str | Metric | Callable[..., Any]
"""A name, a Metric, or a function of (predictions, targets); or an object of torchmetrics."""

Choice: TypeAlias = One | Sequence[One] | Mapping[str, One | Sequence[One]] | None
"""What `run` takes: one, several, or those of each task or kind of targets; None fits the targets."""

FITTING = {"class": "accuracy", "value": "r2", "labels": "auroc"}
"""The metric of each kind of targets, where none is chosen."""


def as_metric(value: object) -> Metric:
    """Return the metric that a name, a function or an object means.

    >>> as_metric("f1"), as_metric(max).name
    (F1(average='macro', threshold=0.5), 'max')
    >>> as_metric("acuracy")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `metric` must be one of the catalogue's, got 'acuracy';
    nearest: accuracy, auroc, balanced_accuracy.
    """
    if isinstance(value, Metric):
        return value
    if isinstance(value, str):
        named = [name for name in metrics.__all__ if name != "own"]
        if value not in named:
            raise unknown("metric", value, named)
        return getattr(metrics, value)()  # type: ignore[no-any-return]
    # A class is callable too, but what it makes is no score.
    if not isinstance(value, type):
        # A function of the catalogue makes a metric, with the arguments that it has by default. By identity,
        # because to compare an object of torchmetrics makes another metric.
        if any(value is getattr(metrics, name) for name in metrics.__all__ if name != "own"):
            return value()  # type: ignore[no-any-return,operator]
        if all(hasattr(value, verb) for verb in ("update", "compute", "reset")):
            return TorchMetric(value)
        if callable(value):
            # torchmetrics' functions and objects of users may say which direction is better.
            directions = [getattr(value, name, None) for name in ("higher", "higher_is_better")]
            return Own(value, next((found for found in directions if isinstance(found, bool)), None))
    raise ConsilienceError(
        "`metric` must be a name, one of consilience.metrics, a function of (predictions, targets), an "
        f"object of torchmetrics, or a list of these, got {kind_of(value)}."
    )


def several(choice: object) -> tuple[Metric, ...]:
    """Return the metrics of a choice for one kind of targets, in its order."""
    # A text is a sequence too, so only lists and tuples are several.
    values = choice if isinstance(choice, list | tuple) else [choice]
    if not values:
        raise ConsilienceError(
            "`metric` must have at least one metric, got an empty list; None fits the targets."
        )
    found = tuple(map(as_metric, values))
    twice = [name for name, count in Counter(metric.name for metric in found).items() if count > 1]
    if twice:
        raise ConsilienceError(
            f"metrics must have different names, got {twice[0]!r} twice; use metrics.own(f, higher, name)."
        )
    return found


def metrics_of(choice: Choice, sources: Sequence[Source], frame: LabelFrame) -> dict[str, tuple[Metric, ...]]:
    """Return the metrics of each source by its name; its first is what matrices have.

    A source's own metric comes first. Of several, those count that fit its kind of targets. Raises
    ConsilienceError for what is no metric, or fits the targets of no source.
    """
    by_place = choice if isinstance(choice, Mapping) else {}
    places = {place for source in sources for place in (source.task, source.kind) if place}
    for place in by_place:
        if place not in places:
            raise unknown("metric", str(place), places, "the tasks and the kinds of targets")
    chosen = {place: several(value) for place, value in by_place.items()}
    common = () if choice is None or by_place else several(choice)

    found: dict[str, tuple[Metric, ...]] = {}
    for source in sources:
        # A choice for the task is nearer than one for the kind.
        asked = chosen.get(source.task or "", chosen.get(source.kind, common))
        mine = () if source.metric is None else (as_metric(source.metric),)

        # A source's own metric must fit; of several others one is enough.
        fits = [metric for metric in (*mine, *asked) if source.kind in metric.kinds]
        for metric in mine or asked[:1]:
            if metric not in fits and (mine or not fits):
                raise misfit(metric, source)
        by_name: dict[str, Metric] = {}
        for metric in fits or [as_metric(FITTING[source.kind])]:
            by_name.setdefault(metric.name, metric.of(frame.targets[source.target]))
        found[source.name] = tuple(by_name.values())

    # A metric that fits nothing would be left out silently.
    used = {metric.name for some in found.values() for metric in some}
    for metric in (*common, *(metric for some in chosen.values() for metric in some)):
        if metric.name not in used:
            raise misfit(metric, sources[0])
    return found


def misfit(metric: Metric, source: Source) -> ConsilienceError:
    """Return the error for a metric of another kind than a source's targets."""
    fitting = [name for name in metrics.__all__ if name != "own" and source.kind in as_metric(name).kinds]
    return ConsilienceError(
        f"`metric` must be for targets of kind {source.kind!r}, as those of {source.name!r} are, got "
        f"{metric.name!r}; use {', '.join(fitting[:-1])} or {fitting[-1]}."
    )
