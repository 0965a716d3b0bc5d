"""Mixtures of experts judged on data: search for coefficients, Pareto front over sources, greedy soups."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from consilience.core.aggregator import Aggregator
from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError, kind_of, suggests, unknown
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.merging._bench import Bench
from consilience.merging._figures import Mark, scatter

Objective = Literal["mean", "worst", "entropy", "agreement"]
OBJECTIVES = ("mean", "worst", "entropy", "agreement")
OPTIMISERS = ("nelder-mead", "differential_evolution")
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SCALES = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)
"""Coefficients of merges to try, as far as they are at most the number of experts."""
PLAIN_SUM = "sum"
"""The name of the plain mixture base + sum_i lambda_i tau_i, among those of aggregators."""


@dataclass(frozen=True)
class Mixture:
    """A mixture that was tried: its coefficients, its scores by source, and the objective (higher is better).

    `aggregator` "sum" is base + sum_i c_i tau_i, with one coefficient per expert; any other is
    base + c (merged - base), with one. `likelihood` (mean log p of the right class, or of the ensemble's)
    breaks ties.
    """

    aggregator: str
    coefficients: tuple[float, ...]
    scores: Mapping[str, float]
    score: float
    likelihood: float = 0.0

    @property
    def merit(self) -> tuple[float, float]:
        """What mixtures are ordered by."""
        return self.score, self.likelihood

    @property
    def name(self) -> str:
        """The aggregator and its coefficients, only one if they are equal."""
        equal = len(set(self.coefficients)) == 1
        shown = self.coefficients[:1] if equal else self.coefficients
        return f"{self.aggregator} {', '.join(f'{value:.4g}' for value in shown)}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; an infinite likelihood is None, since JSON has no infinity."""
        return {
            "aggregator": self.aggregator,
            "coefficients": [*self.coefficients],
            "scores": dict(self.scores),
            "score": self.score,
            "likelihood": self.likelihood if math.isfinite(self.likelihood) else None,
        }


@dataclass(frozen=True, eq=False)
class Exploration:
    """The result of a search over mixtures: all that were tried, in order, and the best.

    `scores` of a mixture are accuracies (objectives "mean", "worst") on the validation parts, or 1 - entropy,
    or agreement. `reference` has the accuracy of the best single expert on each source, by which the
    objective normalises accuracies.
    """

    objective: str
    sources: tuple[str, ...]
    experts: tuple[str, ...]
    mixtures: tuple[Mixture, ...]
    best: Mixture
    reference: Mapping[str, float] = field(default_factory=dict)
    make: Callable[[Mixture], Params] = field(default=lambda _: {}, repr=False)

    def pareto(self) -> tuple[Mixture, ...]:
        """Return the mixtures that no other dominates; of equal ones the first.

        A mixture dominates another if it is at least as good on every source, and better on one.
        """
        rows = [[mixture.scores[source] for source in self.sources] for mixture in self.mixtures]
        points = torch.tensor(rows, dtype=torch.float64)
        kept = []
        for i, point in enumerate(points):
            dominated = ((points >= point).all(1) & (points > point).any(1)).any()
            if not dominated and not (points[:i] == point).all(1).any():
                kept.append(self.mixtures[i])
        return tuple(kept)

    def params(self, mixture: Mixture | None = None) -> Params:
        """Return the merged state dict of a mixture; None: of the best."""
        return self.make(mixture or self.best)

    def table(self, most: int | None = 20) -> str:
        """Write the best mixtures in one line each; `*` marks the Pareto front over sources."""
        from consilience.core.names import clean
        from consilience.report._text import Column, grid, number, short

        # By identity, since two mixtures with equal scores are equal.
        front = {id(mixture) for mixture in self.pareto()}
        order = sorted(
            self.mixtures, key=lambda mixture: (mixture is self.best, *mixture.merit), reverse=True
        )
        shown = order[:most]
        columns = [
            Column("mixture", [clean(mixture.name) for mixture in shown], False),
            Column(self.objective, [number(mixture.score, True) for mixture in shown]),
        ]
        for source in self.sources:
            scores = [number(mixture.scores[source], True) for mixture in shown]
            columns.append(Column(short(source, 14), scores))
        columns.append(Column("front", ["*" if id(mixture) in front else "" for mixture in shown], False))
        more = f"\n... of {len(self.mixtures)} mixtures" if len(shown) < len(self.mixtures) else ""
        return grid(columns) + more

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain values."""
        return {
            "objective": self.objective,
            "sources": list(self.sources),
            "experts": list(self.experts),
            "reference": dict(self.reference),
            "mixtures": [mixture.to_json() for mixture in self.mixtures],
            "best": self.best.to_json(),
            "pareto": [mixture.to_json() for mixture in self.pareto()],
        }

    def write(self, path: str | Path) -> Path:
        """Write a scatter of all mixtures as SVG: two sources, or, of more, the worst against the mean."""
        two = len(self.sources) == 2
        names = (self.sources[0], self.sources[1]) if two else ("mean over sources", "worst source")
        front = {id(mixture) for mixture in self.pareto()}
        marks = []
        for mixture in self.mixtures:
            scores = [mixture.scores[source] for source in self.sources]
            x, y = scores if two else (math.fsum(scores) / len(scores), min(scores))
            marks.append(
                Mark(x, y, mixture.aggregator, mixture.name, id(mixture) in front, mixture is self.best)
            )

        from consilience.report._figure import standing

        # The label is for readers who cannot see the figure.
        label = f"Scatter: {len(marks)} mixtures, {names[1]} against {names[0]}; best {self.best.name}."
        return standing([(f"{len(marks)} mixtures", scatter(names, marks, label))]).save(path)


@suggests
def explore(
    model: Any,
    base: Any,
    experts: Any,
    sources: Sequence[Source],
    *,
    aggregators: Mapping[str, Aggregator] | None = None,
    each: bool = False,
    objective: Objective = "mean",
    grid: Sequence[float] = GRID,
    scales: Sequence[float] | None = None,
    optimiser: Literal["nelder-mead", "differential_evolution"] | None = "nelder-mead",
    budget: int = 40,
    seed: int = 0,
    scenario: str | None = None,
) -> Exploration:
    """Search mixtures base + sum_i lambda_i tau_i on validation parts: a grid, then an optimiser.

    A mixture costs one forward pass per data set and is judged once. The objective is mean_s or min_s a_s /
    r_s, where a_s is the accuracy on source s and r_s that of the best single expert. Without labels it is 1
    - the mean entropy of the answers over log C (Yang et al. 2024), or the fraction of examples where the
    answer is that of the experts' ensemble. With one coefficient per expert the entropy is often least at a
    single expert that is certain on all data: prefer agreement there.

    Args:
        model: a Model or a torch module with the entries of the checkpoints.
        base: what the experts were trained from: a state dict, a module or a path.
        experts: the same, in a sequence or by name.
        sources: to judge on, with validation parts that no expert has seen. The right head is used if the
            model has heads of tasks.
        aggregators: by name; base + c (merged - base) is searched for each, too.
        each: search one coefficient per expert, not one for all.
        objective: "mean" or "worst" normalised accuracy; without labels "entropy" or "agreement".
        grid: coefficients that are tried first, each for all experts.
        scales: coefficients c that are tried for aggregators; None: from 1/4 to the number of experts.
        optimiser: what continues from the best of the grid, within [0, 1.5 x its highest] (without labels,
            its highest); None: nothing.
        budget: number of mixtures that the optimiser may try for the sum and for each aggregator.
        seed: of aggregators and the optimiser.
        scenario: "task" gives the model the source's task, "class" and "domain" do not; None fits the model.

    Raises:
        ConsilienceError: no base, checkpoints without the model's entries or with different frozen ones,
            numbers out of range, sources without validation part.

    Ilharco et al. 2023, arXiv:2212.04089 (coefficients); Yang et al. 2024, arXiv:2310.02575 (entropy).

    >>> import torch.nn as nn
    >>> from consilience import data
    >>> x = torch.arange(40.0)[:, None] / 40
    >>> source = data.arrays(x, (x[:, 0] > 0.5).long())
    >>> expert = {"weight": torch.tensor([[0.0], [2.0]]), "bias": torch.tensor([1.0, 0.0])}
    >>> base = {name: 0 * tensor for name, tensor in expert.items()}
    >>> found = explore(nn.Linear(1, 2), base, [expert], [source])
    >>> found.best.scores["data"], len(found.mixtures) <= 51
    (1.0, True)
    """
    # The bench refuses bad checkpoints and data before the options are looked at.
    bench = Bench(model, base, experts, sources, scenario)
    options = SearchOptions(
        aggregators=aggregators or {},
        each=each,
        objective=objective,
        grid=grid,
        scales=scales,
        optimiser=optimiser,
        budget=budget,
        seed=seed,
    )
    return search(bench, options)


# The search.


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search; `explore` says what each means."""

    aggregators: Mapping[str, Aggregator] = field(default_factory=dict)
    each: bool = False
    objective: str = "mean"
    grid: Sequence[float] = GRID
    scales: Sequence[float] | None = None
    optimiser: str | None = "nelder-mead"
    budget: int = 40
    seed: int = 0
    plain: bool = True
    """Whether the sum is searched, not only the aggregators."""

    def check(self) -> None:
        """Refuse unknown names and numbers out of range."""
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        if self.optimiser is not None and self.optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.optimiser, OPTIMISERS)
        whole_number(0, budget=self.budget)
        lists = {"grid": self.grid} | ({} if self.scales is None else {"scales": self.scales})
        for option, values in lists.items():
            if not len(values) or not all(
                isinstance(value, int | float) and math.isfinite(value) for value in values
            ):
                raise ConsilienceError(
                    f"`{option}` must be finite numbers, at least one, got {kind_of(values)}."
                )
        for name, aggregator in self.aggregators.items():
            if name == PLAIN_SUM or not isinstance(aggregator, Aggregator):
                raise ConsilienceError(
                    "`aggregators` must be made by consilience.aggregators, "
                    f"under names other than {PLAIN_SUM!r}, "
                    f"got {name!r}: {kind_of(aggregator)}."
                )


def search(bench: Bench, options: SearchOptions) -> Exploration:
    """Search mixtures on a bench, as `explore` does."""
    options.check()
    if not options.plain and not options.aggregators:
        raise ConsilienceError("a search needs the sum or aggregators, got neither.")
    state = Search(bench, options)
    if options.plain:
        state.search_sum()
    for name, aggregator in options.aggregators.items():
        state.search_merge(name, aggregator)
    return state.result()


class Search:
    """A search in progress: every mixture that was tried, judged once."""

    def __init__(self, bench: Bench, options: SearchOptions) -> None:
        self.bench, self.options = bench, options
        self.size = len(bench.experts)
        self.tried: dict[tuple[str, tuple[float, ...]], Mixture] = {}

        # Without labels there is no accuracy to compare with.
        self.reference: dict[str, float] = {}
        if options.objective in ("mean", "worst"):
            alone = [
                bench.scores(bench.alone(name, "validation"), "accuracy", "validation")
                for name in bench.experts
            ]
            self.reference = {
                source.name: max(scores[source.name] for scores in alone) for source in bench.sources
            }

    def search_sum(self) -> None:
        """Search base + sum_i lambda_i tau_i."""
        options = self.options
        first = [self.judge(PLAIN_SUM, [value] * self.size) for value in options.grid]
        # The single experts are corners of the space that the optimiser searches.
        if options.each:
            first += [
                self.judge(PLAIN_SUM, [float(i == j) for j in range(self.size)]) for i in range(self.size)
            ]
        if options.optimiser and options.budget:
            self.refine(first, max(1.0, *options.grid), self.size if options.each else 1)

    def search_merge(self, name: str, aggregator: Aggregator) -> None:
        """Search base + c (merged - base) for what an aggregator merges."""
        options = self.options
        scales = options.scales
        if scales is None:
            scales = tuple(scale for scale in SCALES if scale <= max(2, self.size))
        self.bench.add(name, aggregator, options.seed)
        first = [self.judge(name, [scale]) for scale in scales]

        # A single scale is what the caller wants, not a place to start.
        if options.optimiser and options.budget and len(scales) > 1:
            self.refine(first, max(1.0, *scales), 1)

    def judge(self, name: str, coefficients: Iterable[float]) -> Mixture:
        """Return a mixture with its scores; it is judged if it was not tried yet."""
        # A mixture costs a pass over the data, so none is judged twice.
        key = (name, rounded(coefficients))
        if key not in self.tried:
            bench, objective = self.bench, self.options.objective
            answers = bench.answers(self.mixed(*key), "validation")
            scores = bench.scores(answers, objective, "validation")
            # Where no expert has an answer right, the accuracy counts as it is.
            values = [
                value / (self.reference[source] or 1.0) if self.reference else value
                for source, value in scores.items()
            ]
            score = min(values) if objective == "worst" else math.fsum(values) / len(values)
            likelihood = bench.likelihood(answers, objective, "validation")
            self.tried[key] = Mixture(*key, scores, score, likelihood)
        return self.tried[key]

    def mixed(self, name: str, coefficients: tuple[float, ...]) -> Params:
        """Return the entries of a mixture."""
        if name == PLAIN_SUM:
            return self.bench.mixture(coefficients)
        return self.bench.along(name, coefficients[0])

    def refine(self, first: Sequence[Mixture], high: float, dimensions: int) -> None:
        """Let the optimiser continue from the best of the first mixtures.

        With one dimension all experts have the same coefficient. The bounds go to half beyond the grid's
        highest, `high`; without labels to `high`, since longer steps make answers more certain, not better.
        """
        best = max(first, key=lambda mixture: mixture.merit)
        name, count = best.aggregator, len(best.coefficients)
        limit = len(self.tried) + self.options.budget
        start = list(best.coefficients[:dimensions])

        def loss(point: Any) -> float:
            # Four digits, so that an optimiser's last tiny steps are not new mixtures.
            values = [round(float(value), 4) for value in point]
            coefficients = values if dimensions == count else [values[0]] * count
            if (name, rounded(coefficients)) not in self.tried and len(self.tried) >= limit:
                raise Spent
            score, likelihood = self.judge(name, coefficients).merit
            # The likelihood leads over plateaus of the accuracy; its weight keeps it below one example.
            return -score - 1e-3 * max(likelihood, -100.0)

        low = min(0.0, *best.coefficients)
        top = max((1.5 if self.reference else 1.0) * high, *start)
        minimise(loss, start, (low, top), self.options)

    def make(self, mixture: Mixture) -> Params:
        """Return the checkpoint of a mixture."""
        return self.bench.checkpoints.restored(self.mixed(mixture.aggregator, mixture.coefficients))

    def result(self) -> Exploration:
        """Return what was found."""
        mixtures = tuple(self.tried.values())
        return Exploration(
            self.options.objective,
            tuple(source.name for source in self.bench.sources),
            tuple(self.bench.experts),
            mixtures,
            max(mixtures, key=lambda mixture: mixture.merit),
            self.reference,
            self.make,
        )


def rounded(coefficients: Iterable[float]) -> tuple[float, ...]:
    """Round coefficients to nine digits, so that equal mixtures have equal keys.

    >>> rounded([0.1 + 0.2, -0.0])
    (0.3, 0.0)
    """
    # Adding 0.0 turns -0.0 into 0.0.
    return tuple(round(float(value), 9) + 0.0 for value in coefficients)


# Optimisers.


class Spent(Exception):
    """The budget of evaluations is spent."""


Loss = Callable[[Any], float]


def minimise(loss: Loss, start: Sequence[float], bounds: tuple[float, float], options: SearchOptions) -> None:
    """Let an optimiser call `loss` within a box until it converges or the budget is spent.

    The calls are the result: `loss` keeps what it was called with.
    """
    optimise = differential_evolution if options.optimiser == "differential_evolution" else nelder_mead
    try:
        optimise(loss, start, bounds, options)
    except Spent:
        return


def nelder_mead(
    loss: Loss, start: Sequence[float], bounds: tuple[float, float], options: SearchOptions
) -> None:
    """Minimise by the simplex method."""
    import numpy as np
    from scipy.optimize import minimize

    low, high = bounds
    # One corner moves all coefficients together, the others one each and less: good mixtures lie on a ridge,
    # which experts out of balance leave steeply.
    steps = (0.15 * (high - low), 0.05 * (high - low))
    wide, narrow = (step * (1 if start[0] + step <= high else -1) for step in steps)
    corners = [
        list(start),
        [value + wide for value in start],
        *([value + narrow * (i == j) for j, value in enumerate(start)] for i in range(len(start) - 1)),
    ]
    minimize(
        loss,
        start,
        method="Nelder-Mead",
        bounds=[bounds] * len(start),
        options={
            "initial_simplex": np.array(corners),
            "xatol": 1e-3,
            "fatol": 1e-6,
            "maxfev": 20 * options.budget,
        },
    )


def differential_evolution(
    loss: Loss, start: Sequence[float], bounds: tuple[float, float], options: SearchOptions
) -> None:
    """Minimise by differential evolution, from a population with `start` in it."""
    import numpy as np
    from scipy import optimize

    evolve = optimize.differential_evolution
    population = max(5, min(15, options.budget // 4))
    first = np.random.default_rng(options.seed).uniform(*bounds, (population, len(start)))
    first[0] = start
    # The argument for the seed has another name in older versions of scipy.
    seed = "rng" if "rng" in inspect.signature(evolve).parameters else "seed"
    evolve(
        loss,
        [bounds] * len(start),
        init=first,
        maxiter=max(1, 20 * options.budget),
        polish=False,
        tol=0,
        atol=1e-9,
        **{seed: options.seed},
    )


# Soups.


@suggests
def greedy_soup(
    model: Any, experts: Any, sources: Sequence[Source], *, base: Any = None, scenario: str | None = None
) -> Exploration:
    """Average the best experts: add each, in order of accuracy, if the average does not get worse.

    Experts are sorted by mean validation accuracy. The best mixture has coefficient 1/k for each of its k
    members. Only the validation parts of the sources are read. `base` shows which entries of tasks (heads)
    were trained; without it each must be in one expert only, or equal in all.

    Raises ConsilienceError as `explore` does. Wortsman et al. 2022, arXiv:2203.05482 (recipe 1).

    >>> import torch.nn as nn
    >>> from consilience import data
    >>> x = torch.arange(40.0)[:, None] / 40
    >>> source = data.arrays(x, (x[:, 0] > 0.5).long())
    >>> good = {"weight": torch.tensor([[0.0], [2.0]]), "bias": torch.tensor([1.0, 0.0])}
    >>> bad = {name: -tensor for name, tensor in good.items()}
    >>> greedy_soup(nn.Linear(1, 2), {"good": good, "bad": bad}, [source]).best.coefficients
    (1.0, 0.0)
    """
    return soup(Bench(model, base, experts, sources, scenario, averages=True))


def soup(bench: Bench, objective: str = "mean") -> Exploration:
    """Make a greedy soup on a bench, without labels by another score than accuracy."""
    names = list(bench.experts)
    tried = []

    def judge(members: Sequence[str]) -> Mixture:
        coefficients = tuple(1 / len(members) if name in members else 0.0 for name in names)
        answers = bench.answers(bench.mixture(coefficients), "validation")
        scores = bench.scores(answers, objective, "validation")
        tried.append(Mixture(PLAIN_SUM, coefficients, scores, math.fsum(scores.values()) / len(scores)))
        return tried[-1]

    singles = sorted(((judge([name]), name) for name in names), key=lambda pair: -pair[0].score)
    (best, first), *others = singles
    members = [first]
    for _, name in others:
        more = judge([*members, name])
        # Equal averages count, as in the paper: more members, less variance.
        if more.score >= best.score:
            best, members = more, [*members, name]

    return Exploration(
        objective,
        tuple(source.name for source in bench.sources),
        tuple(names),
        tuple(tried),
        best,
        make=lambda mixture: bench.checkpoints.restored(bench.mixture(mixture.coefficients)),
    )
