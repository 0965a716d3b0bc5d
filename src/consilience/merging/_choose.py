"""Whether combining experts pays, and how: merge, ensemble, routing or distillation, on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from consilience import aggregators as catalogue
from consilience.consolidators.distillation import Distillation
from consilience.core.aggregator import Aggregator
from consilience.core.errors import ConsilienceError, Refusal, suggests, unknown
from consilience.core.message import Message, Weights
from consilience.core.params import Params, key
from consilience.core.source import Source, inputs_of
from consilience.core.state import State
from consilience.core.tree import concat
from consilience.merging._bench import Answers, Bench, Part
from consilience.merging._explore import Mixture, SearchOptions, search, soup
from consilience.merging._router import fitted, sent

if TYPE_CHECKING:
    from consilience.report._text import Column

RULE = (
    "the best combination and the best single model by the validation parts are compared on these, and again "
    "on the test parts: combining pays where on both the mean over sources is higher by more than its "
    "standard error, paired over examples"
)
SILENT = (
    "no labels were read: scores are the agreement with the ensemble of experts, then confidence "
    "(1 - entropy over log C); they cannot tell whether answers are right, nor whether combining pays"
)
UNSURE = f"combining: {SILENT}."
SINGLE, ONE, BOUND = ("base", "expert"), ("base", "expert", "merge", "distilled"), "bound"
"""Kinds that combine nothing, kinds that are one model, and what knows more than an input: no choice."""
STRENGTHS = (0.25, 0.5, 0.75, 1.5, 2, 3, 4, 6, 8)
"""Scales of merges to try besides 1, as far as they are at most the number of experts."""


@dataclass(frozen=True)
class Candidate:
    """A way to answer: its kind (base, expert, merge, ensemble, routing, distilled, bound), scores, and cost.

    `validation` is the score that selects. `test` has the scores by source on the test parts, and `mean` is
    their mean: accuracy, or without labels agreement with the ensemble. `passes` are forward passes per
    example, `parameters` the number stored; entries that are equal in several models count once.
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
    """The result of `choose`: candidates, which to `use`, and whether combining `pays` (None without labels).

    `verdict` says in one sentence what to use. `gain` +- `error` is the advantage of `combination` over
    `single` on the test parts, the best of each by validation. `cheaper` costs fewer passes or parameters
    than `use`, and is within one paired standard error of it on the validation parts. `flags` has a sentence
    for each expert that is poor on its own source.
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
    verdict: str
    notes: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    make: Callable[[str], Params] = field(default=lambda _: {}, repr=False)

    @property
    def advice(self) -> str:
        """The verdict, the flags, and what else there is to know, a line for each."""
        return "\n".join([self.verdict, *(f"flag: {flag}" for flag in self.flags), *self.notes])

    def __getitem__(self, name: str) -> Candidate:
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise unknown("candidate", name, [candidate.name for candidate in self.candidates])

    def params(self, name: str | None = None) -> Params:
        """Return the state dict of a candidate that is one model; None: of the one to use."""
        name = name or self.use
        if self[name].kind not in ONE:
            raise ConsilienceError(
                f"`name` must be a candidate that is one model, got the {self[name].kind} {name!r}, which "
                "keeps all experts."
            )
        return self.make(name)

    def table(self) -> str:
        """Write the candidates, best first, and the advice."""
        from consilience.report._text import grid, short

        # A terminal has no room for long notes.
        columns = self.columns()
        columns[-1] = replace(columns[-1], cells=[short(note, 60) for note in columns[-1].cells])
        return f"{grid(columns)}\n\n{self.advice}"

    def ranked(self) -> list[Candidate]:
        """Return the candidates, best by validation first, the cheaper of equal ones."""
        return sorted(
            self.candidates,
            key=lambda candidate: (-candidate.validation, candidate.passes, candidate.parameters),
        )

    def columns(self) -> list[Column]:
        """Return the table of candidates, best first, in columns."""
        from consilience.core.names import clean
        from consilience.report._text import Column, human, number, short

        shown = self.ranked()

        def column(head: str, say: Callable[[Candidate], str], right: bool = True) -> Column:
            return Column(head, [say(candidate) for candidate in shown], right)

        score = "accuracy" if self.labels else "agreement"
        columns = [
            column("candidate", lambda candidate: clean(candidate.name), False),
            column("kind", lambda candidate: candidate.kind, False),
            column("validation %", lambda candidate: number(candidate.validation, True)),
            column(f"test {score} %", lambda candidate: number(candidate.mean, True)),
        ]
        # More columns than these do not fit a line.
        if 1 < len(self.sources) <= 8:
            for source in self.sources:
                scores = [number(candidate.test[source], True) for candidate in shown]
                columns.append(Column(short(source, 14), scores))
        elif len(self.sources) > 8:
            worst = column("worst source", lambda candidate: number(min(candidate.test.values()), True))
            columns.append(worst)
        if not self.labels:
            columns.append(column("confidence %", lambda candidate: number(candidate.confidence, True)))
        columns += [
            column("passes", lambda candidate: str(candidate.passes)),
            column("parameters", lambda candidate: human(candidate.parameters)),
            column("note", lambda candidate: clean(candidate.detail), False),
        ]
        return columns

    def report(self, path: str | Path, title: str | None = None) -> Path:
        """Write one HTML file that opens offline: the verdict, the table, and charts."""
        from consilience.core.params import write_bytes
        from consilience.merging._choice_page import page

        path = Path(path)
        write_bytes(path, page(self, title).encode("utf-8", "replace"))
        return path

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain values."""
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
            "verdict": self.verdict,
            "flags": list(self.flags),
            "notes": list(self.notes),
            "candidates": [
                {**vars(candidate), "test": dict(candidate.test)} for candidate in self.candidates
            ],
        }


@suggests
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
    progress: Callable[[str], object] | None = None,
) -> Choice:
    """Judge base, experts, merges, ensemble, routing and distillation on held-out data, and say which to use.

    Candidates are selected on the validation parts and reported on the test parts. With
    d_si = 1[combination right] - 1[single right] on example i of source s, the best combination is better
    than the best single model if mean_s mean_i d_si > sqrt(sum_s var_i(d_si) / n_s) / S (d summed first over
    sources that share their examples). Combining pays, and the combination is to be used, if that holds on
    the validation parts and again on the test parts. Without labels no target is read: coefficients and one
    model are chosen by the agreement with the ensemble of experts, then by the entropy of the answers, which
    alone would prefer what is confident and wrong.

    With several sources there are two more rows. Each model on its own source (that of its name, else the one
    it is best on) is a bound, where the source of an input is not given. A learned router is logistic
    regression of the source on the base's features of training inputs: it needs no targets.

    Args:
        model: a Model or a torch module with the entries of the checkpoints.
        base: what the experts were trained from: a state dict, a module (also wrapped), or a path, of
            safetensors or of a torch file with nothing but tensors (.pth, .pt, .bin, .ckpt).
        experts: the same, in a sequence or by name.
        sources: to choose on. No expert may have seen their validation and test parts, or one that memorised
            them is chosen.
        aggregators: by name, instead of ties, dare and, for two experts, slerp; the scale of each is
            searched. Average, task arithmetic with one coefficient and with one per expert, and the greedy
            soup are always judged.
        labels: whether the targets may be read.
        distil: unlabelled inputs (a tensor, an array, a source; True: the sources' training inputs), or a
            `Distillation`, to train the average on the mean answer of all experts; None does not.
        scenario: "task" gives the source's task, which also selects the expert; "class" and "domain" do not;
            None fits the model.
        budget: number of mixtures that an optimiser may try for each kind of merge, after a grid.
        seed: of all random draws.
        progress: called with a line before each search and each candidate that is judged.

    Raises:
        ConsilienceError: as `explore`.
        Refusal: sources of values; distillation of a model with heads of tasks.

    Wortsman et al. 2022, arXiv:2203.05482; Ilharco et al. 2023, arXiv:2212.04089; Lin et al. 2020,
    arXiv:2006.07242 (distillation).

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
    # The order is that of ties: of equal candidates the first is chosen.
    say = progress or (lambda _: None)
    bench = Bench(model, base, experts, sources, scenario)
    proposed = Proposals(bench, say)
    proposed.add_single()
    proposed.add_merges(aggregators, SearchOptions(objective=objective_of(labels), budget=budget, seed=seed))
    if len(bench.experts) > 1:
        proposed.add_combined(labels, seed)
    if distil is not None and distil is not False:
        say("distillation: training")
        made = distilled(bench, distil, seed)
        proposed.add_model("distillation", "distilled", made, "the ensemble taught to the average")
    return judge(bench, proposed, labels)


def objective_of(labels: bool) -> str:
    """Return the objective of searches and scores."""
    return "mean" if labels else "agreement"


# What is judged.


@dataclass(frozen=True, eq=False)
class Proposal:
    """A candidate before it is judged: its answers by part, and the models that it keeps."""

    kind: str
    detail: str
    answer: Callable[[Part], list[Answers]]
    passes: int
    models: tuple[Params, ...]


class Proposals:
    """The candidates of a bench by name, in the order in which they are added."""

    def __init__(self, bench: Bench, say: Callable[[str], object]) -> None:
        self.bench, self.say = bench, say
        self.found: dict[str, Proposal] = {}

    def add(self, name: str, proposal: Proposal) -> None:
        """Add a candidate; its kind goes before a name that is taken."""
        while name in self.found:
            name = f"{proposal.kind} {name}"
        self.found[name] = proposal

    def add_model(self, name: str, kind: str, entries: Params, detail: str = "") -> None:
        """Add a candidate that is one model."""
        bench = self.bench
        self.add(name, Proposal(kind, detail, lambda part: bench.answers(entries, part), 1, (entries,)))

    def add_mixture(self, name: str, coefficients: Sequence[float], detail: str = "") -> None:
        """Add a mixture of the base and the experts."""
        self.add_model(name, "merge", self.bench.mixture(coefficients), detail)

    def add_single(self) -> None:
        """Add the base and the experts."""
        self.add_model("base", "base", self.bench.base)
        for name, expert in self.bench.experts.items():
            self.add_model(name, "expert", expert)

    def add_merges(self, aggregators: Mapping[str, Aggregator] | None, options: SearchOptions) -> None:
        """Add the average, task arithmetic, the greedy soup, and merges by aggregators at the best scale."""
        names, count = list(self.bench.experts), len(self.bench.experts)
        self.say("task arithmetic: searching one coefficient")
        best = self._best(options)
        self.add_mixture("average", [1 / count] * count)
        self.add_mixture("task arithmetic", best.coefficients, f"coefficient {best.coefficients[0]:.4g}")
        # All further ways to merge one expert are task arithmetic.
        if count == 1:
            return

        # More dimensions need more evaluations.
        self.say("task arithmetic: searching a coefficient per expert")
        coefficients = self._best(options, each=True, budget=options.budget * min(count, 4)).coefficients
        shown = ", ".join(f"{value:.3g}" for value in coefficients)
        self.add_mixture("task arithmetic, each", coefficients, f"coefficients {shown}")
        coefficients = soup(self.bench, options.objective).best.coefficients
        members = [name for name, value in zip(names, coefficients, strict=True) if value]
        self.add_mixture("greedy soup", coefficients, f"of {', '.join(members)}")

        # Each aggregator is searched alone, so that its scale is the best one and not that of another.
        for name, aggregator in (usual(count) if aggregators is None else aggregators).items():
            self.say(f"{name}: searching its scale")
            scales = (1.0, *scales_of(name, count))
            best = self._best(options, aggregators={name: aggregator}, plain=False, scales=scales)
            scale = best.coefficients[0]
            self.add_model(name, "merge", self.bench.along(name, scale), f"x {scale:.4g}")

    def _best(self, options: SearchOptions, **changes: Any) -> Mixture:
        return search(self.bench, replace(options, **changes)).best

    def add_combined(self, labels: bool, seed: int) -> None:
        """Add the ensemble, and routing to one expert by entropy, by task and by a learned router."""
        bench = self.bench
        every, count = tuple(bench.experts.values()), len(bench.experts)
        self.add("ensemble", Proposal("ensemble", "mean of probabilities", bench.ensemble, count, every))
        by_entropy = Proposal(
            "routing", "the most certain expert", lambda part: routed(bench, part), count, every
        )
        self.add("routing by entropy", by_entropy)

        # With one source, there is nothing to route by: the best expert is the one for it.
        if len(bench.sources) == 1:
            return
        picks = expert_by_source(bench, labels)
        own = picks if bench.labelled else own_experts(bench, picks)
        self._add_picked("routing by task" if bench.labelled else "each on its own source", own)
        if all(len(source.train) for source in bench.sources):
            self.say("learned router: fitting")
            router = fitted(bench, seed)
            used = tuple(bench.experts[name] for name in dict.fromkeys(picks))
            by_router = Proposal(
                "routing",
                f"logistic on the base's {router.what}",
                lambda part: sent(bench, router, picks, part),
                2,
                (bench.base, *used, {"router.weight": router.weight, "router.bias": router.bias}),
            )
            self.add("learned router", by_router)

    def _add_picked(self, name: str, picks: Sequence[str]) -> None:
        """Add the answers of one expert per source: routing by task, or a bound where no task is given."""
        bench = self.bench
        pairs = zip(bench.sources, picks, strict=True)
        used = tuple(bench.experts[name] for name in dict.fromkeys(picks))
        detail = ", ".join(f"{source.name}: {name}" for source, name in pairs)
        kind = "routing" if bench.labelled else BOUND
        self.add(name, Proposal(kind, detail, lambda part: answers_of(bench, picks, part), 1, used))


def usual(count: int) -> dict[str, Aggregator]:
    """Return the aggregators that are tried for a number of experts."""
    found: dict[str, Aggregator] = {"ties": catalogue.ties(), "dare": catalogue.dare()}
    # slerp is an arc between two points.
    return {**found, "slerp": catalogue.slerp()} if count == 2 else found


def scales_of(name: str, count: int) -> tuple[float, ...]:
    """Return the scales to try besides 1; a point on the arc between two models has none."""
    return () if name == "slerp" else tuple(scale for scale in STRENGTHS if scale <= max(2, count))


def routed(bench: Bench, part: Part) -> list[Answers]:
    """Return for each example the answer of the expert with the least normalised entropy."""
    found = []
    for answers in zip(*(bench.alone(name, part) for name in bench.experts), strict=True):
        # Answers that are not finite come last, after those with entropy 1.
        entropies = [answer.entropy.where(answer.finite, torch.inf) for answer in answers]
        best = torch.stack(entropies).argmin(0)
        p = torch.stack([answer.p for answer in answers])[best, torch.arange(len(best))]
        found.append(Answers(p, answers[0].y, max(answer.width for answer in answers)))
    return found


def expert_by_source(bench: Bench, labels: bool) -> list[str]:
    """Return the best expert for each source on its validation part.

    With labels it is that with the highest accuracy, then with the highest mean probability of the right
    class; without labels that with the least entropy.
    """

    def merit(name: str, source: int) -> tuple[float, float]:
        answers = bench.alone(name, "validation")[source]
        if labels:
            return float(answers.correct.mean()), float(answers.chance(answers.y).mean())
        return -float(answers.entropy.mean()), 0.0

    return [max(bench.experts, key=lambda name: merit(name, source)) for source in range(len(bench.sources))]


def own_experts(bench: Bench, picks: Sequence[str]) -> list[str]:
    """Return the expert of each source: by its name if all sources have one, else that which was picked."""
    names = [source.name for source in bench.sources]
    return names if all(name in bench.experts for name in names) else list(picks)


def answers_of(bench: Bench, picks: Sequence[str], part: Part) -> list[Answers]:
    """Return for each source the answers of the expert that was picked for it."""
    return [bench.alone(name, part)[source] for source, name in enumerate(picks)]


def distilled(bench: Bench, distil: Any, seed: int) -> Params:
    """Train the average of the experts on their mean answer on unlabelled inputs."""
    if distil is True:
        distil = concat([source.train.whole()[0] for source in bench.sources])
    consolidator = distil
    if not isinstance(distil, Distillation):
        consolidator = Distillation(unlabelled=inputs_of(distil, "unlabelled"))
    if bench.model.uses_task:
        raise Refusal(
            "models with heads of several tasks have no outputs in common to distil; leave `distil` out."
        )

    params, buffers = bench.params(bench.base), bench.buffers(bench.base)
    state = State(params=params, buffers=buffers, base=params, origin="")
    messages = [
        Message(name, "", 1, 1, "", "", {"model": weights_of(expert, params)})
        for name, expert in bench.experts.items()
    ]
    new = consolidator.receive(bench.model, state, messages, False, key(seed, "choose", "distil"))
    # The mean of equal numbers may round, but frozen entries stay.
    frozen = {name: tensor for name, tensor in params.items() if bench.model.frozen(name)}
    return {**new.params, **new.buffers, **frozen}


def weights_of(entries: Params, params: Params) -> Weights:
    """Return entries as an item of a message; `params` has the names of parameters, others are buffers."""
    named = {f"{'params' if name in params else 'buffers'}/{name}": value for name, value in entries.items()}
    return Weights(named)


def stored(models: Sequence[Params]) -> int:
    """Count the parameters that several models store; entries that are equal in some count once.

    >>> stored([{"w": torch.ones(3), "b": torch.zeros(2)}, {"w": torch.ones(3), "b": torch.ones(2)}])
    7
    """
    # Experts often share a frozen trunk or an unchanged entry.
    total = 0
    for name in {name for entries in models for name in entries}:
        kept: list[torch.Tensor] = []
        for tensor in (entries[name] for entries in models if name in entries):
            if not any(torch.equal(tensor, other) for other in kept):
                kept.append(tensor)
        total += sum(tensor.numel() for tensor in kept if tensor.is_floating_point())
    return total


# The rule.


class Gain(NamedTuple):
    """The mean advantage of one candidate over another, and its standard error."""

    mean: float
    error: float


def paired(a: Sequence[Answers], b: Sequence[Answers], keys: Sequence[Hashable] | None = None) -> Gain:
    """Return the mean over sources of how much more often a is right than b, and its standard error.

    Sources with equal keys share their examples; with `keys=None` none do. The sum of such sources varies by
    example. The error is infinite if a source has one example. A variance of 0 about a mean other than 0
    counts as 1 / n, since no sample is certain.

    >>> y = torch.tensor([0, 0, 0, 0])
    >>> right = Answers(torch.tensor([[1.0, 0.0]]).repeat(4, 1), y, 2)
    >>> half = Answers(torch.eye(2).repeat(2, 1), y, 2)
    >>> paired([right], [half]) == (0.5, (1 / 3 / 4) ** 0.5)
    True
    """
    groups: dict[Hashable, list[torch.Tensor]] = {}
    for ours, theirs, group in zip(a, b, range(len(a)) if keys is None else keys, strict=True):
        groups.setdefault(group, []).append(ours.correct - theirs.correct)
    # fsum rounds once, so the order of sources does not matter.
    gain = math.fsum(float(rows.mean()) for group in groups.values() for rows in group) / len(a)
    return Gain(gain, math.sqrt(math.fsum(variance(rows) for rows in groups.values())) / len(a))


def variance(rows: Sequence[torch.Tensor]) -> float:
    """Return the variance of the sum of the means of rows [n] over the same examples."""
    difference, n = torch.stack(list(rows)).sum(0), len(rows[0])
    if n < 2:
        return math.inf
    return (float(difference.var()) or (len(rows) ** 2 / n if difference.any() else 0.0)) / n


# Judging.


class Judged(NamedTuple):
    """A candidate with its answers, and its confidence on the validation parts."""

    candidate: Candidate
    validation: list[Answers]
    test: list[Answers]
    confidence: float


def average(scores: Mapping[str, float]) -> float:
    """Return the mean over sources."""
    return math.fsum(scores.values()) / len(scores)


def judge(bench: Bench, proposals: Proposals, labels: bool) -> Choice:
    """Judge the candidates, and choose."""
    proposed, judged = proposals.found, {}
    for i, (name, proposal) in enumerate(proposed.items(), 1):
        proposals.say(f"judging {i}/{len(proposed)}: {name}")
        judged[name] = judge_one(bench, name, proposal, labels)

    def best(names: Sequence[str]) -> str:
        """Return the best by score, without labels then by confidence; then the cheaper, then the first."""

        def merit(name: str) -> tuple[float, float, int, int]:
            candidate, confidence = judged[name].candidate, judged[name].confidence
            sure = 0.0 if labels else confidence
            return candidate.validation, sure, -candidate.passes, -candidate.parameters

        return max(names, key=merit)

    def checkpoint(name: str) -> Params:
        return bench.checkpoints.restored(proposed[name].models[0])

    # Without labels an ensemble agrees with itself, so only single models are compared.
    single = best([name for name, proposal in proposed.items() if proposal.kind in SINGLE])
    combination = best(
        [
            name
            for name, proposal in proposed.items()
            if proposal.kind not in (*SINGLE, BOUND) and (labels or proposal.kind in ONE)
        ]
    )
    if labels:
        decision = decide(bench, judged, single, combination)
    else:
        use = best([single, combination])
        decision = Decision(use, None, None, None, verdict_without_labels(judged[use].candidate), (UNSURE,))

    gain = decision.gain
    return Choice(
        labels=labels,
        sources=tuple(source.name for source in bench.sources),
        candidates=tuple(each.candidate for each in judged.values()),
        use=decision.use,
        cheaper=decision.cheaper,
        single=single,
        combination=combination,
        gain=None if gain is None else gain.mean,
        error=None if gain is None else gain.error,
        pays=decision.pays,
        verdict=decision.verdict,
        notes=decision.notes,
        flags=tuple(flagged(bench, judged)) if labels else (),
        make=checkpoint,
    )


def judge_one(bench: Bench, name: str, proposal: Proposal, labels: bool) -> Judged:
    """Judge one candidate on the validation and test parts."""
    objective = objective_of(labels)
    # The answers on both parts are kept: the rule pairs those of two candidates by example.
    validation, test = proposal.answer("validation"), proposal.answer("test")
    by_source = bench.scores(test, objective, "test")
    candidate = Candidate(
        name,
        proposal.kind,
        proposal.detail,
        average(bench.scores(validation, objective, "validation")),
        by_source,
        average(by_source),
        average(bench.scores(test, "entropy", "test")),
        average(bench.scores(test, "agreement", "test")),
        proposal.passes,
        stored(proposal.models),
    )
    confidence = average(bench.scores(validation, "entropy", "validation"))
    return Judged(candidate, validation, test, confidence)


class Decision(NamedTuple):
    """What to use, what is cheaper, whether combining pays, and all of it in words."""

    use: str
    cheaper: str | None
    gain: Gain | None
    pays: bool | None
    verdict: str
    notes: tuple[str, ...]


def decide(bench: Bench, judged: Mapping[str, Judged], single: str, combination: str) -> Decision:
    """Decide by the rule: the best combination is used if it is better on both parts."""
    # Sources are taken together by the identity of their examples, part by part.
    validation_keys, test_keys = (
        [id(getattr(source, part)) for source in bench.sources] for part in ("validation", "test")
    )
    better = paired(judged[combination].validation, judged[single].validation, validation_keys)
    gain = paired(judged[combination].test, judged[single].test, test_keys)
    chosen, confirmed = better.mean > better.error, gain.mean > gain.error
    pays = chosen and confirmed
    use = combination if pays else single

    # One sentence, and what it is about is what the table shows.
    cost, difference = cost_of(judged[use].candidate), f"{signed(gain.mean)} +- {points(gain.error)} points"
    if pays:
        why = f"combining pays: it has {difference} over {single}, the best single model, on the test parts"
    elif chosen:
        why = (
            f"combining does not pay: {combination}, better on the validation parts, has {difference} on the "
            "test parts"
        )
    else:
        why = (
            f"combining does not pay: {combination}, the best combination, has {difference} on the test parts"
        )
        # A gain that only the test parts show may be luck, or the validation parts may be too small.
        why += " but no more than its error on the validation parts" * confirmed
    verdict = f"use {use} ({cost}), because {why}."

    notes = []
    cheaper = cheaper_than(use, judged, validation_keys)
    if cheaper is not None:
        notes.append(
            f"cheaper: {cheaper} is within one standard error of it on the validation parts "
            f"({cost_of(judged[cheaper].candidate)})."
        )
    bound = [each.candidate for each in judged.values() if each.candidate.kind == BOUND]
    if bound and bound[0].mean > judged[use].candidate.mean:
        notes.append(
            f"bound: with the source of each input given, {bound[0].name} has {points(bound[0].mean)} % on "
            "the test parts."
        )
    return Decision(use, cheaper, gain, pays, verdict, (*notes, f"rule: {RULE}."))


def cost_of(candidate: Candidate) -> str:
    """Write the score on the test parts and the cost of a candidate."""
    passes = f"{candidate.passes} forward pass{'es' * (candidate.passes > 1)} per example"
    return f"{points(candidate.mean)} % on the test parts, {passes}, {candidate.parameters:,} parameters"


def flagged(bench: Bench, judged: Mapping[str, Judged]) -> list[str]:
    """Return a sentence for each expert that is poor on its own source, by the validation parts.

    Its own source has its name, or is the one on which it is best. Poor is: not better than the most frequent
    class by more than the standard error, worse than the base or than another expert by more than it, or
    much better with its classes in another order.
    """
    names = [source.name for source in bench.sources]
    found = []
    for name in bench.experts:
        alone = bench.alone(name, "validation")
        scores = [float(answers.correct.mean()) for answers in alone]
        at = names.index(name) if name in names else scores.index(max(scores))
        own = alone[at]

        # The first reason is the one to look at; others follow from it.
        reason = poor(own)
        rivals = {"the base": judged["base"].validation[at]}
        rivals |= {other: bench.alone(other, "validation")[at] for other in bench.experts if other != name}
        for rival, answers in rivals.items():
            behind = paired([answers], [own])
            if not reason and behind.mean > behind.error:
                reason = f"{rival} has {points(float(answers.correct.mean()))} % there"
        if reason:
            found.append(
                f"the expert {name} is poor on its own source {names[at]}: {points(scores[at])} %; {reason}."
            )
    return found


def poor(own: Answers) -> str:
    """Return why answers are poor whatever others answer, or ""."""
    from scipy.optimize import linear_sum_assignment

    right, seen = float(own.correct.mean()), own.y.unique()
    counts = torch.zeros(int(own.y.max()) + 1, own.p.shape[1])
    counts.index_put_((own.y, own.p.argmax(1)), torch.ones(len(own.y)), accumulate=True)

    # Experts whose columns mean other classes are right as soon as the columns are permuted.
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    permuted = float(counts[rows, columns].sum()) / len(own.y)
    if permuted > right + max(0.3, 1 / len(seen)):
        return (
            f"with its classes in another order it would have {points(permuted)} %: check what its output "
            "columns mean (`labels`), and whether it was trained on part of the classes"
        )
    frequent = float(counts.sum(1).max()) / len(own.y)
    if len(seen) > 1 and right <= frequent + math.sqrt(frequent * (1 - frequent) / len(own.y)):
        return (
            f"the most frequent class alone has {points(frequent)} %: check that its inputs are prepared as "
            "in its training, and that it belongs to this base"
        )
    return ""


def cheaper_than(use: str, judged: Mapping[str, Judged], keys: Sequence[Hashable]) -> str | None:
    """Return the cheapest candidate that costs less and is within one standard error, if there is one."""
    chosen = judged[use].candidate
    near = []
    for other in judged.values():
        candidate = other.candidate
        less = (
            candidate.passes <= chosen.passes
            and candidate.parameters <= chosen.parameters
            and (candidate.passes, candidate.parameters) != (chosen.passes, chosen.parameters)
        )
        behind = paired(judged[use].validation, other.validation, keys)
        # An infinite error, from a single example, says nothing.
        if candidate.kind != BOUND and less and behind.mean <= behind.error < math.inf:
            near.append(candidate)
    if not near:
        return None
    return min(near, key=lambda other: (other.passes, other.parameters, -other.validation)).name


def verdict_without_labels(chosen: Candidate) -> str:
    """Write what to use, for a choice without labels."""
    return (
        f"use {chosen.name} (agreement {points(chosen.mean)} %, confidence {points(chosen.confidence)} % on "
        "the test parts), because of the candidates that are one model it answers most as the ensemble of "
        "experts does."
    )


def points(value: float) -> str:
    """Write a fraction as percent with one digit."""
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    """Write a difference in points with its sign."""
    return f"{'+' * (value >= 0)}{points(value)}"
