"""Search for hyperparameters on validation data: grids, random draws, and Optuna's samplers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import torch

from consilience import models
from consilience.api import Given, Result, engine_of, is_module, run
from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError, kind_of, suggests, unknown
from consilience.core.method import Method
from consilience.core.metrics import Metric
from consilience.core.names import clean
from consilience.core.params import key
from consilience.core.schedule import Schedule
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.loop.engine import Engine
from consilience.loop.folder import Log
from consilience.metrics import choice
from consilience.metrics.choice import Choice

TRIES = 20
"""How many candidates are tried where the space has ranges and there is no budget."""

Values = dict[str, Any]
Space = Mapping[str, Sequence[Any] | tuple[float, float]]
Made = Method | tuple[Method, Training]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One setting of the hyperparameters, and how it did on validation data."""

    name: str
    values: Values
    score: float
    """NaN where the run failed."""
    result: Result | None = field(default=None, repr=False)
    """None where the run failed."""
    error: str = ""
    """Why it failed."""


@dataclass(frozen=True, eq=False)
class Search:
    """What a search found. `best` is by the validation score; no test example was read."""

    metric: str
    higher: bool
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate with the best score; the first of equal ones."""
        able = [candidate for candidate in self.candidates if not math.isnan(candidate.score)]
        return (max if self.higher else min)(able, key=lambda candidate: candidate.score)

    def table(self) -> str:
        """Return all candidates, best first, one on a line."""
        sign = -1 if self.higher else 1
        ranked = sorted(
            self.candidates,
            key=lambda candidate: (math.isnan(candidate.score), sign * candidate.score),
        )
        width = max(len("candidate"), *(len(candidate.name) for candidate in ranked))
        lines = [
            f"{candidate.name:{width}}  {candidate.error or f'{candidate.score:.4f}'}" for candidate in ranked
        ]
        return "\n".join([f"{'candidate':{width}}  validation {self.metric}", *lines])


@partial(suggests, training=Training)
def search(
    schedule: Schedule,
    make: Callable[..., Made],
    space: Space,
    *,
    budget: int | None = None,
    on: str = "validation",
    sampler: Literal["grid", "random", "optuna"] | None = None,
    model: Given = None,
    training: Training | None = None,
    repeats: int = 1,
    seed: int = 0,
    metric: Choice = None,
    engine: str | Engine = "serial",
    out: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[Candidate], None] | None = None,
) -> Search:
    """Search for the hyperparameters with the best score on validation data; test data are never read.

    Args:
        schedule, model, training, repeats, seed, metric, engine: as in `run`.
        make: called with one value for each name of the space; returns a method, or a method and a Training.
        space: by name, a list of values, or a pair (low, high): of whole numbers, which are drawn from low to
            high, or of floats, whose logarithm is uniform (the value, where low <= 0).
        budget: how many candidates to try; None tries a whole grid, and 20 otherwise.
        on: the part that candidates are judged on: "validation".
        sampler: "grid" (in order), "random", or "optuna" (tree-structured Parzen estimator; needs
            consilience[search]). None: a grid of lists where the budget covers it, else random.
        out: a folder with a run's folder for each candidate; None writes nothing.
        resume: continue the search in `out`: finished candidates are read, the others go on.
        progress: called with every candidate that has been judged.

    A candidate whose run fails (it diverges, or is refused) has the score NaN, and says why.

    Raises ConsilienceError for an empty space, for sources without validation data, for a metric without a
    direction, and where all candidates fail.

    >>> import consilience as cs
    >>> schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 5))
    >>> found = cs.search(schedule, cs.methods.er, {"size": [10, 200]}, training=cs.Training(epochs=1))
    >>> found.best.values
    {'size': 200}
    """
    check_space(space, make)
    if on != "validation":
        raise ConsilienceError(
            f"`on` must be 'validation', got {on!r}: what is chosen on test data is not tested by them."
        )
    if budget is not None:
        whole_number(budget=budget)
    judged, found = on_validation(schedule), list[Candidate]()
    chosen, runner = metric_of(judged, metric), engine_of(engine)
    given = models.wrap(model) if is_module(model) else model  # type: ignore[arg-type]

    # A sampler that learns reads the scores of the candidates before it proposes the next.
    for values in proposals(space, budget, sampler, seed, found):
        name = ", ".join(f"{key}={shown(value)}" for key, value in values.items())
        # A sampler may propose the same values again.
        again = sum(candidate.values == values for candidate in found)
        name += f" ({again + 1})" if again else ""
        at = Path(out) / name if out is not None else None
        begun = resume and at is not None and Log(at).begun
        try:
            made = make(**values)
            method, trained = made if isinstance(made, tuple) else (made, training)
            result = run(
                judged,
                method,
                given,
                trained,
                repeats=repeats,
                seed=seed,
                metric=metric,
                engine=runner,
                out=at,
                resume=begun,
                # The caller sees whole candidates.
                progress=False,
            )
            found.append(Candidate(name, values, result.score, result))
        except ConsilienceError as error:
            found.append(Candidate(name, values, math.nan, None, str(error)))
        if progress is not None:
            progress(found[-1])

    done = [candidate.result for candidate in found if candidate.result is not None]
    if not done:
        raise ConsilienceError(f"all candidates failed, the first with: {found[0].error}")
    return Search(chosen.name, bool(chosen.higher), tuple(found))


def metric_of(schedule: Schedule, metric: Choice) -> Metric:
    """Return the metric that ranks candidates.

    Raises ConsilienceError where sources have different ones, and for one without a direction.
    """
    found = choice.metrics_of(metric, [*schedule.judged, *schedule.sources], schedule.frame)
    first = {metrics[0].name: metrics[0] for metrics in found.values()}
    if len(first) > 1 or None in [chosen.higher for chosen in first.values()]:
        raise ConsilienceError(
            "a search needs a metric with a direction, the same for all sources, got "
            f"{', '.join(first)}; give a `metric`."
        )
    return next(iter(first.values()))


# The space.


def check_space(space: Space, make: Callable[..., Made]) -> None:
    """Refuse a space without names, values or room, and names that `make` does not take."""
    if not isinstance(space, Mapping) or not space:
        raise ConsilienceError(f"`space` must be a mapping of names to values, got {kind_of(space)}.")
    for name, values in space.items():
        if not isinstance(values, list | tuple) or not values:
            raise ConsilienceError(
                f"`space` must have a list of values or a pair (low, high) for {name!r}, "
                f"got {kind_of(values)}."
            )
        if isinstance(values, tuple) and not is_range(values):
            raise ConsilienceError(
                f"a tuple in `space` must be a pair of numbers, low < high, got {values!r} for {name!r}; "
                "write other values as a list."
            )
    takes = signature(make)
    try:
        takes.bind(**dict.fromkeys(space))
    except TypeError as error:
        raise ConsilienceError(f"`make` must take the names of `space`, got {takes}: {error}.") from error


def is_range(values: tuple[Any, ...]) -> bool:
    """Whether values are a pair of numbers, low < high."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return len(values) == 2 and numbers and values[0] < values[1]


def drawn(values: Any, generator: torch.Generator) -> Any:
    """Draw one value: of a list, or between low and high."""
    if isinstance(values, list):
        return values[int(torch.randint(len(values), (), generator=generator))]
    low, high = values
    if isinstance(low, int) and isinstance(high, int):
        return int(torch.randint(low, high + 1, (), generator=generator))
    place = float(torch.rand((), dtype=torch.float64, generator=generator))
    return low + place * (high - low) if low <= 0 else low * (high / low) ** place


def shown(value: Any) -> str:
    """Write a value in the name of a candidate, which may be the name of a folder."""
    return clean(getattr(value, "__name__", value)).replace("/", "|")


# What is tried.


def proposals(
    space: Space, budget: int | None, sampler: str | None, seed: int, found: Sequence[Candidate]
) -> Iterator[Values]:
    """Yield the values of each candidate; `found` has those before it, judged."""
    ranges = [name for name, values in space.items() if isinstance(values, tuple)]
    size = math.prod(len(values) for values in space.values())
    covered = not ranges and (budget is None or budget >= size)
    chosen = sampler or ("grid" if covered else "random")
    if chosen == "grid":
        if ranges:
            raise ConsilienceError(f"a grid must have lists, got a range for {ranges[0]!r}.")
        grid = (dict(zip(space, values, strict=True)) for values in product(*space.values()))
        yield from islice(grid, budget)
    elif chosen == "random":
        generator = key(seed, "search")
        for _ in range(budget or TRIES):
            yield {name: drawn(values, generator) for name, values in space.items()}
    elif chosen == "optuna":
        yield from by_optuna(space, budget or TRIES, seed, found)
    else:
        raise unknown("sampler", chosen, ("grid", "random", "optuna"))


def by_optuna(space: Space, budget: int, seed: int, found: Sequence[Candidate]) -> Iterator[Values]:
    """Yield what a tree-structured Parzen estimator proposes. Bergstra et al. 2011."""
    try:
        import optuna
    except ImportError as error:
        raise ConsilienceError("the sampler 'optuna' needs it: pip install 'consilience[search]'.") from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(budget):
        trial = study.ask()
        values = {}
        for name, options in space.items():
            if isinstance(options, list):
                # Categories are numbers, since a value may be any object.
                values[name] = options[trial.suggest_categorical(name, list(range(len(options))))]
            elif all(isinstance(end, int) for end in options):
                values[name] = trial.suggest_int(name, *options)
            else:
                values[name] = trial.suggest_float(name, *options, log=options[0] > 0)
        yield values

        # It minimises; the direction is known with the first result.
        last = found[-1]
        if last.result is None or not math.isfinite(last.score):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, -last.score if last.result.direction else last.score)


def on_validation(schedule: Schedule) -> Schedule:
    """Return a schedule whose sources have their validation data in the place of their test data."""
    empty = [source.name for source in (*schedule.sources, *schedule.judged) if not len(source.validation)]
    if empty:
        raise ConsilienceError(
            f"a search needs validation data, and {empty[0]!r} has none; give `validation=0.1` to its source."
        )

    # Sources that share their data go on sharing: they are judged once.
    made: dict[int, Source] = {}
    for source in (*schedule.sources, *schedule.judged):
        made.setdefault(id(source), replace(source, test=source.validation))
    return replace(
        schedule,
        sources=tuple(made[id(source)] for source in schedule.sources),
        judged=tuple(made[id(source)] for source in schedule.judged),
    )
