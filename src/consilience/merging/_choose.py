"""Whether combining experts pays, and how: one model, a merge, an ensemble, routing or distillation, judged on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from consilience.core.aggregator import Aggregator
from consilience.core.errors import ConsilienceError, Refusal, unknown
from consilience.core.message import Message, Weights
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.state import State
from consilience.merging._explore import Answers, Bench, Part, search, soup

RULE = (
    "the best combination and the best single model by the validation parts are compared on the test parts: combining pays where the "
    "mean over sources is higher by more than its standard error, paired over examples"
)
SILENT = (
    "no labels were read: scores are the agreement with the ensemble of experts, then confidence (1 - entropy over log C); they cannot "
    "tell whether answers are right, nor whether combining pays"
)
SINGLE, ONE = ("base", "expert"), ("base", "expert", "merge", "distilled")
"""Kinds that combine nothing, and kinds that are one model."""


@dataclass(frozen=True)
class Candidate:
    """A way to answer: its kind (base, expert, merge, ensemble, routing, distilled), scores, and what it costs.

    `validation` is what was selected by, `test` the score by source on the test parts and `mean` its mean: accuracy, or without
    labels agreement with the ensemble. `passes` are forward passes for each example, `parameters` what is stored, entries that
    several models have alike once.
    """

    name: str
    kind: str
    detail: str
    validation: float
    test: Mapping[str, float]
    mean: float
    confidence: float
    agreement: float
    passes: int
    parameters: int


@dataclass(frozen=True, eq=False)
class Choice:
    """What `choose` found: all candidates, which to `use`, and whether combining `pays` (None without labels).

    `gain` +- `error` is what `combination` has on the test parts over `single`, the best of each by validation; `cheaper` costs fewer
    passes or parameters than `use`, and is within one paired standard error of it on the validation parts.
    """

    labels: bool
    sources: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    use: str
    cheaper: str | None
    single: str
    combination: str
    gain: float | None
    error: float | None
    pays: bool | None
    advice: str
    make: Callable[[str], Params] = field(default=lambda _: {}, repr=False)

    def __getitem__(self, name: str) -> Candidate:
        for c in self.candidates:
            if c.name == name:
                return c
        raise unknown("candidate", name, [c.name for c in self.candidates])

    def params(self, name: str | None = None) -> Params:
        """The state dict of a candidate that is one model; None: of the one to use."""
        name = name or self.use
        if self[name].kind not in ONE:
            raise ConsilienceError(
                f"parameters are those of one model. Found {self[name].kind} {name!r}, which keeps all experts."
            )
        return self.make(name)

    def table(self) -> str:
        """The candidates, best first, and what to do."""
        from consilience.report._text import Column, clean, grid, human, number, short

        shown = sorted(self.candidates, key=lambda c: (-c.validation, c.passes, c.parameters))
        what = "accuracy" if self.labels else "agreement"
        columns = [
            Column("candidate", [clean(c.name) for c in shown], False),
            Column("kind", [c.kind for c in shown], False),
            Column("validation %", [number(c.validation, True) for c in shown]),
            Column(f"test {what} %", [number(c.mean, True) for c in shown]),
        ]
        if 1 < len(self.sources) <= 8:
            columns += [Column(short(s, 14), [number(c.test[s], True) for c in shown]) for s in self.sources]
        elif len(self.sources) > 8:
            columns.append(Column("worst source", [number(min(c.test.values()), True) for c in shown]))
        if not self.labels:
            columns.append(Column("confidence %", [number(c.confidence, True) for c in shown]))
        columns += [
            Column("passes", [str(c.passes) for c in shown]),
            Column("parameters", [human(c.parameters) for c in shown]),
            Column("", [short(c.detail, 60) for c in shown], False),
        ]
        return f"{grid(columns)}\n\n{self.advice}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "labels": self.labels,
            "sources": list(self.sources),
            "use": self.use,
            "cheaper": self.cheaper,
            "single": self.single,
            "combination": self.combination,
            "gain": self.gain,
            "error": self.error if self.error is not None and math.isfinite(self.error) else None,
            "pays": self.pays,
            "rule": RULE if self.labels else SILENT,
            "advice": self.advice,
            "candidates": [{**vars(c), "test": dict(c.test)} for c in self.candidates],
        }


@dataclass(frozen=True, eq=False)
class _Made:
    """A candidate before it is judged."""

    kind: str
    detail: str
    answer: Callable[[Part], list[Answers]]
    passes: int
    models: tuple[Params, ...]


def choose(
    model: Any,
    base: Any,
    experts: Any,
    sources: Sequence[Source],
    aggregators: Mapping[str, Aggregator] | None = None,
    labels: bool = True,
    distil: Any = None,
    *,
    scenario: str | None = None,
    budget: int = 40,
    seed: int = 0,
) -> Choice:
    """Judge base, experts, merges, their ensemble, routing and distillation on held-out data, and say which to use.

    Selected on the validation parts, reported on the test parts. With d_si = 1[combination right] - 1[single right] on example i of
    source s, combining pays where mean_s mean_i d_si > sqrt(sum_s var_i(d_si) / n_s) / S (d summed first over sources that share their
    examples); what to use is decided by the same rule on the validation parts. Without labels no target is read, coefficients are
    searched, and one model is chosen, by the agreement with the ensemble of experts, equal ones by the entropy of the answers (on its
    own it prefers what is confident and wrong).

    Args:
        model: what the checkpoints are parameters of: a Model or a torch module.
        base: what the experts started from: a state dict, a module or a path.
        experts: the same, in a sequence or by name.
        sources: what to choose on; no expert may have seen their validation and test parts, or one that memorised them is chosen.
        aggregators: by name, in place of ties, dare and, for two experts, slerp; the strength of each is searched. Average, task
            arithmetic with one coefficient and with one an expert, and the greedy soup are always there.
        labels: whether the targets may be read.
        distil: unlabelled inputs (a tensor, an array, a source; True: the sources' training inputs), or a `Distillation`, to teach the
            average what all experts answer together; None does not.
        scenario: "task" tells the source's task, which picks the expert too; "class" and "domain" do not; None: fits the model.
        budget: mixtures that an optimiser may try for each kind of merge, after a grid.
        seed: of whatever is random.

    Raises:
        ConsilienceError: as `explore`.
        Refusal: sources of values; distillation of a model with heads of tasks.

    Wortsman et al. 2022, arXiv:2203.05482; Ilharco et al. 2023, arXiv:2212.04089; Lin et al. 2020, arXiv:2006.07242 (distillation).

    >>> import torch.nn as nn
    >>> from consilience import data
    >>> x = torch.arange(400.0)[:, None] / 400
    >>> source = data.arrays(x, (x[:, 0] > 0.5).long())
    >>> def at(v):
    ...     return {"weight": torch.tensor([[0.0], [2.0]]), "bias": torch.tensor([2 * v, 0.0])}
    >>> found = choose(nn.Linear(1, 2), at(-9.0), {"low": at(0.3), "high": at(0.7)}, [source])
    >>> found.pays, found["average"].mean > found["low"].mean
    (True, True)
    """
    bench = Bench(model, base, experts, sources, scenario)
    made = _candidates(bench, aggregators, labels, distil, budget, seed)
    return _judge(bench, made, labels)


def _candidates(
    bench: Bench,
    aggregators: Mapping[str, Aggregator] | None,
    labels: bool,
    distil: Any,
    budget: int,
    seed: int,
) -> dict[str, _Made]:
    names, m = list(bench.experts), len(bench.experts)
    made: dict[str, _Made] = {}

    def put(name: str, candidate: _Made) -> None:
        while name in made:
            name = f"{candidate.kind} {name}"
        made[name] = candidate

    def one(name: str, kind: str, entries: Params, detail: str = "") -> None:
        put(name, _Made(kind, detail, lambda part: bench.answers(entries, part), 1, (entries,)))

    one("base", "base", bench.base)
    for n in names:
        one(n, "expert", bench.experts[n])
    objective = "mean" if labels else "agreement"
    found = search(bench, objective=objective, budget=budget, seed=seed)
    one("average", "merge", bench.mixture([1 / m] * m))
    c = found.best.coefficients
    one("task arithmetic", "merge", bench.mixture(c), f"coefficient {c[0]:.4g}")
    if m > 1:
        c = search(
            bench, each=True, objective=objective, budget=budget * min(m, 4), seed=seed
        ).best.coefficients
        one(
            "task arithmetic, each",
            "merge",
            bench.mixture(c),
            f"coefficients {', '.join(f'{v:.3g}' for v in c)}",
        )
        best = soup(bench, objective).best
        members = [n for n, v in zip(names, best.coefficients, strict=True) if v]
        one("greedy soup", "merge", bench.mixture(best.coefficients), f"of {', '.join(members)}")
        for n, a in (_usual(m) if aggregators is None else aggregators).items():
            best = search(
                bench,
                aggregators={n: a},
                objective=objective,
                budget=budget,
                seed=seed,
                plain=False,
                scales=(1.0, *_scales(n, m)),
            ).best
            one(n, "merge", bench.along(n, best.coefficients[0]), f"x {best.coefficients[0]:.4g}")
        every = tuple(bench.experts.values())
        put("ensemble", _Made("ensemble", "mean of probabilities", bench.ensemble, m, every))
        put(
            "routing by entropy",
            _Made("routing", "the most certain expert", lambda part: routed(bench, part), m, every),
        )
        if bench.labelled and len(bench.sources) > 1:
            picks = _picks(bench, labels)
            told = ", ".join(f"{s.name}: {n}" for s, n in zip(bench.sources, picks, strict=True))
            used = tuple(bench.experts[n] for n in dict.fromkeys(picks))
            put("routing by task", _Made("routing", told, lambda part: _told(bench, picks, part), 1, used))
    if distil is not None and distil is not False:
        one("distillation", "distilled", distilled(bench, distil, seed), "the ensemble taught to the average")
    return made


def _usual(m: int) -> dict[str, Aggregator]:
    from consilience import aggregators

    found: dict[str, Aggregator] = {"ties": aggregators.ties(), "dare": aggregators.dare()}
    slerp = getattr(aggregators, "slerp", None)
    return {**found, "slerp": slerp()} if slerp is not None and m == 2 else found


def _scales(name: str, m: int) -> tuple[float, ...]:
    """Strengths to try; a point on the arc between two models has none."""
    return (
        () if name == "slerp" else tuple(s for s in (0.25, 0.5, 0.75, 1.5, 2, 3, 4, 6, 8) if s <= max(2, m))
    )


def routed(bench: Bench, part: Part) -> list[Answers]:
    """For each example what the expert says whose answer has the least normalised entropy; what is not finite comes last."""
    out = []
    for answers in zip(*(bench.alone(n, part) for n in bench.experts), strict=True):
        best = torch.stack([a.entropy.where(a.finite, torch.inf) for a in answers]).argmin(0)
        p = torch.stack([a.p for a in answers])[best, torch.arange(len(best))]
        out.append(Answers(p, answers[0].y, max(a.width for a in answers)))
    return out


def _picks(bench: Bench, labels: bool) -> list[str]:
    """The expert for each source: the best on its validation part (of equal ones the surest of the right classes), or without labels
    the most certain."""

    def merit(name: str, j: int) -> tuple[float, float]:
        a = bench.alone(name, "validation")[j]
        return (
            (float(a.correct.mean()), float(a.chance(a.y).mean()))
            if labels
            else (-float(a.entropy.mean()), 0.0)
        )

    return [max(bench.experts, key=lambda n: merit(n, j)) for j in range(len(bench.sources))]


def _told(bench: Bench, picks: Sequence[str], part: Part) -> list[Answers]:
    return [bench.alone(n, part)[j] for j, n in enumerate(picks)]


def distilled(bench: Bench, distil: Any, seed: int) -> Params:
    """The average of the experts, taught what they answer together on unlabelled inputs."""
    from consilience.consolidators.distillation import Distillation, inputs
    from consilience.core.params import key

    if distil is True:
        distil = torch.cat([s.train.whole()[0] for s in bench.sources])
    consolidator = distil if isinstance(distil, Distillation) else Distillation(unlabelled=inputs(distil))
    if bench.model.uses_task:
        raise Refusal(
            "models with heads of several tasks have no outputs in common to distil; leave `distil` out."
        )
    params, buffers = bench.params(bench.base), bench.buffers(bench.base)
    state = State(params=params, buffers=buffers, base=params, origin="")

    def told(entries: Params) -> Weights:
        return Weights({f"{'params' if n in params else 'buffers'}/{n}": t for n, t in entries.items()})

    heard = [Message(n, "", 1, 1, "", "", {"model": told(e)}) for n, e in bench.experts.items()]
    new = consolidator.receive(bench.model, state, heard, False, key(seed, "choose", "distil"))
    still = {n: t for n, t in params.items() if bench.model.frozen(n)}  # a mean may round them
    return {**new.params, **new.buffers, **still}


def stored(models: Sequence[Params]) -> int:
    """How many parameters several models store, entries that are alike in some once.

    >>> stored([{"w": torch.ones(3), "b": torch.zeros(2)}, {"w": torch.ones(3), "b": torch.ones(2)}])
    7
    """
    total = 0
    for n in {n for entries in models for n in entries}:
        kept: list[torch.Tensor] = []
        for t in (entries[n] for entries in models if n in entries):
            if not any(torch.equal(t, k) for k in kept):
                kept.append(t)
        total += sum(t.numel() for t in kept if t.is_floating_point())
    return total


def paired(
    a: Sequence[Answers], b: Sequence[Answers], keys: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """The mean over sources of how much more often a is right than b, and its standard error.

    Sources whose `keys` are the same have the same examples (None: none have), so that what they add up to varies by example. The error
    is infinite where a source has one example; a variance of 0 about a mean that is not 0 counts as 1 / n, for no sample is certain.

    >>> y = torch.tensor([0, 0, 0, 0])
    >>> right, half = Answers(torch.tensor([[1.0, 0.0]]).repeat(4, 1), y, 2), Answers(torch.eye(2).repeat(2, 1), y, 2)
    >>> paired([right], [half]) == (0.5, (1 / 3 / 4) ** 0.5)
    True
    """
    groups: dict[Hashable, list[torch.Tensor]] = {}
    for u, v, k in zip(a, b, range(len(a)) if keys is None else keys, strict=True):
        groups.setdefault(k, []).append(u.correct - v.correct)
    gain = math.fsum(float(d.mean()) for rows in groups.values() for d in rows) / len(a)
    return gain, math.sqrt(math.fsum(_variance(rows) for rows in groups.values())) / len(a)


def _variance(rows: Sequence[torch.Tensor]) -> float:
    """The variance of the sum of the means of rows [n] over the same examples."""
    d, n = torch.stack(list(rows)).sum(0), len(rows[0])
    if n < 2:
        return math.inf
    return (float(d.var()) or (len(rows) ** 2 / n if d.any() else 0.0)) / n


def _judge(bench: Bench, made: Mapping[str, _Made], labels: bool) -> Choice:
    """The candidates judged, and the advice."""
    held: dict[str, list[Answers]] = {}
    kept: dict[str, list[Answers]] = {}
    candidates: dict[str, Candidate] = {}
    objective = "mean" if labels else "agreement"
    same = {part: [id(getattr(s, part)) for s in bench.sources] for part in ("validation", "test")}

    def average(scores: Mapping[str, float]) -> float:
        return math.fsum(scores.values()) / len(scores)

    for n, c in made.items():
        held[n], test = c.answer("validation"), c.answer("test")
        found = bench.scores(test, objective, "test")
        candidates[n] = Candidate(
            n,
            c.kind,
            c.detail,
            average(bench.scores(held[n], objective, "validation")),
            found,
            average(found),
            average(bench.scores(test, "entropy", "test")),
            average(bench.scores(test, "agreement", "test")),
            c.passes,
            stored(c.models),
        )
        kept[n] = test
    sure = {n: average(bench.scores(held[n], "entropy", "validation")) for n in made}

    def best(names: Sequence[str]) -> str:
        """By score, without labels then by confidence; then the cheaper, then the first."""
        return max(
            names,
            key=lambda n: (
                candidates[n].validation,
                0.0 if labels else sure[n],
                -candidates[n].passes,
                -candidates[n].parameters,
            ),
        )

    def points(v: float) -> str:
        return f"{100 * v:.1f}"

    singles = [n for n, c in made.items() if c.kind in SINGLE]
    combined = [n for n, c in made.items() if c.kind not in SINGLE and (labels or c.kind in ONE)]
    single, combination = best(singles), best(combined)

    def entries(name: str) -> Params:
        return bench.checkpoint(made[name].models[0])

    sources = tuple(s.name for s in bench.sources)
    if not labels:
        use = best([single, combination])
        u = candidates[use]
        advice = (
            f"use: {use} (agreement {points(u.mean)} %, confidence {points(u.confidence)} % on the test parts): of what is one model, it "
            f"answers most as the ensemble of experts does.\ncombining: {SILENT}."
        )
        return Choice(
            False,
            sources,
            tuple(candidates.values()),
            use,
            None,
            single,
            combination,
            None,
            None,
            None,
            advice,
            entries,
        )
    gain, error = paired(held[combination], held[single], same["validation"])
    use = combination if gain > error else single
    u = candidates[use]
    near = []
    for n, x in candidates.items():
        less, unsure = paired(held[use], held[n], same["validation"])
        if (
            (x.passes, x.parameters) < (u.passes, u.parameters)
            and x.passes <= u.passes
            and x.parameters <= u.parameters
            and less <= unsure < math.inf
        ):
            near.append(n)
    cheaper = (
        min(near, key=lambda n: (candidates[n].passes, candidates[n].parameters, -candidates[n].validation))
        if near
        else None
    )
    gain, error = paired(kept[combination], kept[single], same["test"])
    pays = gain > error
    said = (use == combination) == pays
    advice = (
        f"use: {use} ({points(u.mean)} % on the test parts; {u.passes} forward pass{'es' * (u.passes > 1)} an example, "
        f"{u.parameters:,} parameters).\n"
    )
    if cheaper is not None:
        other = candidates[cheaper]
        advice += (
            f"cheaper: {cheaper} is within one standard error of it on the validation parts ({points(other.mean)} % on the test parts; "
            f"{other.passes} pass{'es' * (other.passes > 1)}, {other.parameters:,} parameters).\n"
        )
    advice += (
        f"combining {'pays' if pays else 'does not pay'}: {combination} has {'+' * (gain >= 0)}{points(gain)} +- {points(error)} points over "
        f"{single}, the best single model{'' if said else '; the validation parts said otherwise'}.\nrule: {RULE}."
    )
    return Choice(
        True,
        sources,
        tuple(candidates.values()),
        use,
        cheaper,
        single,
        combination,
        gain,
        error,
        pays,
        advice,
        entries,
    )
