"""Mixtures of experts judged on data: coefficients searched, the Pareto front over sources, greedy soups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator
from consilience.core.errors import ConsilienceError, Refusal, kind_of, unknown
from consilience.core.model import Model
from consilience.core.params import Layout, Params, finite
from consilience.core.source import Examples, LabelFrame, Source
from consilience.merging._diagnose import draw, named

CHUNK = 1024
Part = Literal["validation", "test"]
Objective = Literal["mean", "worst", "entropy", "agreement"]
OBJECTIVES = ("mean", "worst", "entropy", "agreement")
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SUM = "sum"
"""What the plain mixture base + sum_i lambda_i tau_i is called among aggregators."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of a source: probabilities p [N, C] over `width` columns that it may choose from, and the targets y [N].

    A row that is not finite is wrong, agrees with none, and is as unsure as can be.
    """

    p: Tensor
    y: Tensor
    width: int

    @cached_property
    def finite(self) -> Tensor:
        """Whether all probabilities of an example are finite [N]."""
        return self.p.isfinite().all(1)

    @property
    def correct(self) -> Tensor:
        """Whether the likeliest class is the right one [N]."""
        return ((self.p.argmax(1) == self.y) & self.finite).double()

    def chance(self, y: Tensor) -> Tensor:
        """The probabilities of classes y [N], 0 where they are not finite."""
        return self.p.gather(1, y[:, None])[:, 0].double().where(self.finite, 0.0)

    @property
    def entropy(self) -> Tensor:
        """-sum p log p over the log of the number of classes to choose from [N]."""
        p = self.p.double()
        return (-(p * p.clamp_min(1e-300).log()).sum(1) / math.log(max(self.width, 2))).where(
            self.finite, 1.0
        )

    def agreement(self, other: Answers) -> Tensor:
        """Whether the likeliest class is the same as another's [N]."""
        return ((self.p.argmax(1) == other.p.argmax(1)) & self.finite & other.finite).double()


def mean(answers: Sequence[Answers]) -> Answers:
    """The ensemble: the mean of the probabilities."""
    return Answers(torch.stack([a.p for a in answers]).mean(0), answers[0].y, max(a.width for a in answers))


class Bench:
    """A model, what was learned from one base, and the data that mixtures of it are judged on.

    Only entries that base and experts share are mixed; of a task's own entries (its head) those are kept that some expert learned,
    and averaged where several did. Floating-point buffers, which must stay variances, are averaged, others stay the base's.
    Everything is held in memory, in float32 (float64 where the checkpoints are). `averages`: weights add up to 1, so that any base
    will do; without one it is the first expert, but for what belongs to tasks.
    """

    def __init__(
        self,
        model: Any,
        base: Any,
        experts: Any,
        sources: Sequence[Source],
        scenario: str | None = None,
        averages: bool = False,
    ) -> None:
        self.model = _model(model)
        given = named(experts)
        if base is None and not averages:
            raise ConsilienceError(
                "`base` should be what the experts started from: a state dict, a module or a path. Found none."
            )
        self.sources, self.frame, self.labelled = framed(self.model, sources, scenario)
        read = {n: entries(e, base) for n, e in given.items()}
        first = next(iter(read))
        if base is None:
            origin = {n: t for n, t in read[first].items() if self.model.task_of(n) is None}
            self._alike(read)
        else:
            origin = entries(base)
        every = {**({} if base is None else {"the base": origin}), **{repr(n): e for n, e in read.items()}}
        params, buffers = self.model.init(torch.Generator().manual_seed(0))
        self._buffers, known = set(buffers), {**params, **buffers}
        faults, self._twins = [], {}
        for whose, own in every.items():
            faults += [f"no {n!r} in {whose}" for n in known if n not in own]
            faults += [
                f"{tuple(own[n].shape)} for {n!r} of {whose}, where the model has {tuple(t.shape)}"
                for n, t in known.items()
                if n in own and own[n].shape != t.shape
            ]
            for n in own.keys() - known.keys():
                if self.model.task_of(n) is None:
                    twin = next(
                        (
                            k
                            for k in known
                            if k in own and own[k].shape == own[n].shape and own[k].equal(own[n])
                        ),
                        None,
                    )
                    faults += [] if twin else [f"{n!r} in {whose}, which the model has not"]
                    self._twins[n] = twin or n
        if faults:
            hint = _spaces(sources) if (scenario or "class") == "class" and not self.model.uses_task else ""
            raise ConsilienceError(
                f"checkpoints should have the model's entries. Found {'; '.join(faults)}{hint}."
            )
        for whose, own in every.items():
            finite(own, whose)
        start = "the base" if base is not None else repr(first)
        still = [n for n in params if self.model.frozen(n)]
        faults = [
            f"another {n!r} in {whose} than in {start}"
            for whose, own in every.items()
            for n in still
            if not own[n].to(origin[n].dtype).equal(origin[n])
            and not origin[n].to(own[n].dtype).equal(own[n])
        ]
        if faults:
            raise ConsilienceError(
                f"experts should have the base's frozen entries. Found {'; '.join(faults)}."
            )
        self._dtypes = {n: t.dtype for own in (*read.values(), origin) for n, t in own.items()}
        dtype = torch.float64 if torch.float64 in {t.dtype for t in origin.values()} else torch.float32

        def ready(own: Params) -> Params:
            return {
                n: t.to(dtype) if t.is_floating_point() else t for n, t in own.items() if n not in self._twins
            }

        self.dtype, self.base, self.experts = dtype, ready(origin), {n: ready(e) for n, e in read.items()}
        free = [n for n, t in params.items() if t.is_floating_point() and not self.model.frozen(n)]
        self.mixed = Layout.of({n: self.base[n] for n in free}, dtype)
        self._origin = self.mixed.flatten(self.base)
        self._rows = torch.stack([self.mixed.flatten(e) for e in self.experts.values()])
        self._directions: dict[str, Tensor] = {}
        self._ensembles: dict[str, list[Answers]] = {}
        self._alone: dict[tuple[str, str], list[Answers]] = {}

    def _alike(self, read: Mapping[str, Params]) -> None:
        """Refuses entries of a task that differ between experts: without a base none can say whose were learned."""
        owner: dict[str, str] = {}
        for whose, own in read.items():
            for n, t in own.items():
                task = self.model.task_of(n)
                if task is not None and not t.equal(read[owner.setdefault(n, whose)][n]):
                    raise ConsilienceError(
                        f"without a base one expert should carry a task's own entries, or all alike; give `base`. Found {n!r} of task "
                        f"{task!r} in {owner[n]!r} and another in {whose!r}."
                    )

    def params(self, made: Params) -> Params:
        """What of a mixture's entries the model takes as parameters."""
        return {n: t for n, t in made.items() if n not in self._buffers and t.is_floating_point()}

    def buffers(self, made: Params) -> Params:
        """The rest."""
        return {n: t for n, t in made.items() if n in self._buffers or not t.is_floating_point()}

    # mixtures

    def mixture(self, coefficients: Sequence[float]) -> Params:
        """base + sum_i c_i tau_i; all 0 give the base, a single 1 that expert, to the bit (but for the heads of other tasks)."""
        c = [float(v) for v in coefficients]
        used = [i for i, v in enumerate(c) if v]
        if not used or (len(used) == 1 and c[used[0]] == 1):
            flat = self._rows[used[0]] if used else self._origin
        else:
            flat = torch.tensor(c, dtype=self.dtype) @ self._rows + (1 - math.fsum(c)) * self._origin
        up = [max(v, 0.0) for v in c]
        scale = max(1.0, math.fsum(up))
        return self._whole(self.mixed.split(flat), [v / scale for v in up])

    def along(self, name: str, coefficient: float) -> Params:
        """base + c (merged - base), for what an aggregator that was `added` merged."""
        d = self._directions[name]
        flat = d if coefficient == 1 else self._origin + coefficient * (d - self._origin)
        return self._whole(self.mixed.split(flat), [1 / len(self.experts)] * len(self.experts))

    def add(self, name: str, aggregator: Aggregator, seed: int) -> None:
        """Merge by an aggregator at its default weights."""
        from consilience.merging import merge

        def own(e: Params) -> Params:
            return {n: e[n] for n in self.mixed.names}

        found = merge(own(self.base), {n: own(e) for n, e in self.experts.items()}, aggregator, seed=seed)
        self._directions[name] = self.mixed.flatten(found)

    def _whole(self, mixed: Params, share: Sequence[float]) -> Params:
        """The entries of a model: the mixed ones, the tasks' own, and buffers weighted by shares that add up to at most 1."""
        made = {**self.base, **mixed}
        every = {n for e in self.experts.values() for n in e} | self.base.keys()
        for n in every:
            if self.model.task_of(n) is not None:
                have = [e[n] for e in self.experts.values() if n in e]
                moved = [t for t in have if n not in self.base or not torch.equal(t, self.base[n])]
                if moved:
                    fits = moved[0].is_floating_point() and all(t.shape == moved[0].shape for t in moved)
                    differ = not all(torch.equal(t, moved[0]) for t in moved)
                    made[n] = torch.stack(moved).mean(0) if fits and differ else moved[0]
            elif n in self._buffers and self.base[n].is_floating_point():
                have = [e[n] for e in self.experts.values()]
                if 1.0 in share:
                    made[n] = have[list(share).index(1.0)]
                elif any(share):
                    made[n] = self.base[n] * (1 - math.fsum(share))
                    for t, s in zip(have, share, strict=True):
                        made[n] = made[n] + s * t
        return made

    def checkpoint(self, made: Params) -> Params:
        """Entries as the base's checkpoint has them: its types, and both names of tied weights."""
        found = {n: t.to(self._dtypes[n]).clone() for n, t in made.items()}
        return {**found, **{twin: found[n].clone() for twin, n in self._twins.items()}}

    # judging

    def answers(self, made: Params, part: Part) -> list[Answers]:
        """What a model says of each source: one forward pass a data set; sources that share their examples are asked once."""
        params, buffers = self.params(made), self.buffers(made)
        return self.ask(lambda x, task: self.model(params, buffers, x, task, False)[0], part)

    @torch.no_grad()
    def ask(self, forward: Callable[[Tensor, str | None], Tensor], part: Part) -> list[Answers]:
        """What (x, task) -> outputs says of each source."""
        from consilience.loop.predict import probabilities

        found: dict[tuple[int, str | None], Answers] = {}
        out = []
        for s in self.sources:
            examples: Examples = getattr(s, part)
            task = s.task if self.labelled else None
            at = (id(examples), task)
            if at not in found:
                columns, ps, ys, width = self.frame.tasks[str(s.task)] if self.labelled else None, [], [], 2
                for x, y in examples.chunks(CHUNK):
                    outputs = forward(x.to(self.dtype) if x.is_floating_point() else x, task)
                    width = max(
                        width,
                        int(torch.isfinite(outputs[:, list(columns)] if columns else outputs).any(0).sum()),
                    )
                    ps.append(probabilities(outputs, self.frame, columns, len(self.frame.labels)))
                    ys.append(y)
                found[at] = Answers(
                    torch.cat(ps), torch.cat(ys), min(width, len(columns or self.frame.labels))
                )
            out.append(found[at])
        return out

    def alone(self, name: str, part: Part) -> list[Answers]:
        """What one expert says, as it is; asked once."""
        if (name, part) not in self._alone:
            self._alone[name, part] = self.answers(self.experts[name], part)
        return self._alone[name, part]

    def ensemble(self, part: Part) -> list[Answers]:
        """The mean of the experts' probabilities."""
        if part not in self._ensembles:
            self._ensembles[part] = [
                mean(a) for a in zip(*(self.alone(n, part) for n in self.experts), strict=True)
            ]
        return self._ensembles[part]

    def scores(self, answers: Sequence[Answers], objective: str, part: Part) -> dict[str, float]:
        """By source: accuracy; or without labels 1 - normalised entropy, or agreement with the ensemble of experts."""
        if objective == "entropy":
            found = [1 - a.entropy for a in answers]
        elif objective == "agreement":
            found = [a.agreement(e) for a, e in zip(answers, self.ensemble(part), strict=True)]
        else:
            found = [a.correct for a in answers]
        return {s.name: float(v.mean()) for s, v in zip(self.sources, found, strict=True)}

    def likelihood(self, answers: Sequence[Answers], objective: str, part: Part) -> float:
        """What breaks ties of scores, and leads an optimiser over their plateaus: the mean over sources of the mean log p of the right
        class, of the ensemble's, or for the entropy, which has no plateaus, 0; -inf where some answer is not finite."""
        if objective == "entropy":
            return 0.0
        if not all(a.finite.all() for a in answers):
            return -math.inf
        right = (
            [e.p.argmax(1) for e in self.ensemble(part)]
            if objective == "agreement"
            else [a.y for a in answers]
        )
        found = [a.chance(y).clamp_min(1e-12).log().mean() for a, y in zip(answers, right, strict=True)]
        return float(torch.stack(found).mean())


def _model(model: Any) -> Model:
    if isinstance(model, torch.nn.Module):
        from consilience.models import wrap

        return wrap(model)
    if not isinstance(model, Model):
        raise ConsilienceError(f"`model` should be a model or a torch module. Found {kind_of(model)}.")
    return model


def _spaces(sources: Sequence[Source]) -> str:
    """A hint, where classes of sources cannot be the same because their label spaces differ."""
    spaces = sorted({space for s in sources for space, _ in s.labels})
    if len(spaces) < 2:
        return ""
    return (
        f"; the sources have {len(spaces)} label spaces ({', '.join(spaces)}), whose classes are all different: one `space` for all (on the "
        "command line `--data.space NAME`) makes classes of one name one class"
    )


def entries(what: Any, base: Any = None) -> Params:
    """All entries of a checkpoint in memory: of a state dict, a module or a path; of an adapter with its base."""
    from consilience.merging._files import opened

    found = opened(what, None if base is None else opened(base))
    return {n: found.whole(n) for n in found.shapes}


def framed(
    model: Model, sources: Sequence[Source], scenario: str | None
) -> tuple[tuple[Source, ...], LabelFrame, bool]:
    """Sources in one frame that fits the model, and whether it is told tasks.

    Sources that share their labels, all of which the model has outputs for, stay as they are; others are put together as a
    schedule of this scenario does. None: "task" for a model with heads of tasks, else "class".
    """
    from consilience.core.schedule import reframe

    if (
        isinstance(sources, Source)
        or not isinstance(sources, Sequence)
        or not all(isinstance(s, Source) for s in sources)
    ):
        raise ConsilienceError(f"sources should come in a list. Found {kind_of(sources)}.")
    twice = sorted({s.name for s in sources if sum(o.name == s.name for o in sources) > 1})
    if twice:
        raise ConsilienceError(f"sources should have names of their own. Found {', '.join(twice)} twice.")
    scenario = scenario or ("task" if model.uses_task else "class")
    found, frame = reframe(sources, scenario)
    if any(s.kind == "value" for s in sources):
        raise Refusal("mixtures are judged by classes. Found sources whose targets are values.")
    if (
        scenario != "domain"
        and all(s.labels == sources[0].labels for s in sources)
        and model.outputs >= len(sources[0].labels)
    ):
        found = tuple(replace(s, task=s.task or s.name) for s in sources)
        tasks: dict[str, tuple[int, ...]] = {}
        for s in found:
            tasks[str(s.task)] = tuple(dict.fromkeys((*tasks.get(str(s.task), ()), *s.classes)))
        frame = LabelFrame(sources[0].labels, tasks)
    for part in ("validation", "test"):
        empty = [s.name for s in found if not len(getattr(s, part))]
        if empty:
            raise ConsilienceError(f"sources should have {part} examples. Found none in {', '.join(empty)}.")
    samples = {x.shape: x for s in found for x in (s.validation.select(torch.arange(1)).whole()[0],)}
    for x in samples.values():
        try:
            model.check(frame, x, scenario == "task")
        except ConsilienceError as e:
            hint = _spaces(sources) if scenario == "class" and model.outputs < len(frame.labels) else ""
            if not hint:
                raise
            raise type(e)(f"{str(e).removesuffix('.')}{hint}.") from e
    return found, frame, scenario == "task"


@dataclass(frozen=True)
class Mixture:
    """A mixture that was tried: its coefficients, its scores by source, and the objective (higher is better).

    `likelihood` (mean log p of the right class, or of the ensemble's) breaks ties. `aggregator` "sum" is base + sum_i c_i tau_i, with one coefficient an expert; any other is base + c (merged - base), with one.
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
        """The aggregator and its coefficients, one where they are all alike."""
        c = self.coefficients[:1] if len(set(self.coefficients)) == 1 else self.coefficients
        return f"{self.aggregator} {', '.join(f'{v:.4g}' for v in c)}"


@dataclass(frozen=True, eq=False)
class Exploration:
    """What a search over mixtures found: all that were tried, in order, and the best.

    `scores` of a mixture are accuracies (objectives "mean", "worst") on the validation parts, or 1 - entropy, or agreement;
    `reference` is the accuracy of the best single expert on each source, by which accuracies are normalised in the objective.
    """

    objective: str
    sources: tuple[str, ...]
    experts: tuple[str, ...]
    mixtures: tuple[Mixture, ...]
    best: Mixture
    reference: Mapping[str, float] = field(default_factory=dict)
    make: Callable[[Mixture], Params] = field(default=lambda _: {}, repr=False)

    def pareto(self) -> tuple[Mixture, ...]:
        """The mixtures that no other dominates: is at least as good on every source, and better on one. Equal ones count once."""
        points = torch.tensor(
            [[m.scores[s] for s in self.sources] for m in self.mixtures], dtype=torch.float64
        )
        kept = []
        for i, p in enumerate(points):
            dominated = ((points >= p).all(1) & (points > p).any(1)).any()
            if not dominated and not (points[:i] == p).all(1).any():
                kept.append(self.mixtures[i])
        return tuple(kept)

    def params(self, mixture: Mixture | None = None) -> Params:
        """The merged state dict of a mixture; None: of the best."""
        return self.make(mixture or self.best)

    def table(self, most: int | None = 20) -> str:
        """The best mixtures, a line each; `*` marks the Pareto front over sources."""
        from consilience.report._text import Column, clean, grid, number, short

        front = {id(m) for m in self.pareto()}
        shown = sorted(self.mixtures, key=lambda m: (m is self.best, *m.merit), reverse=True)[:most]
        columns = [
            Column("mixture", [clean(m.name) for m in shown], False),
            Column(self.objective, [number(m.score, True) for m in shown]),
            *(Column(short(s, 14), [number(m.scores[s], True) for m in shown]) for s in self.sources),
            Column("front", ["*" if id(m) in front else "" for m in shown], False),
        ]
        more = f"\n... of {len(self.mixtures)} mixtures" if len(shown) < len(self.mixtures) else ""
        return grid(columns) + more

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""

        def one(m: Mixture) -> dict[str, Any]:
            return {
                "aggregator": m.aggregator,
                "coefficients": [*m.coefficients],
                "scores": dict(m.scores),
                "score": m.score,
                "likelihood": m.likelihood if math.isfinite(m.likelihood) else None,
            }

        return {
            "objective": self.objective,
            "sources": list(self.sources),
            "experts": list(self.experts),
            "reference": dict(self.reference),
            "mixtures": [one(m) for m in self.mixtures],
            "best": one(self.best),
            "pareto": [one(m) for m in self.pareto()],
        }

    def write(self, path: str | Path) -> Path:
        """Write a scatter of all mixtures as SVG: one source against the other, or, of more, the worst against the mean."""
        from consilience.report._svg import MARKS, Plot, bounds, canvas, esc, legend, ticks, word, xy
        from consilience.report._text import number

        two = len(self.sources) == 2
        names = self.sources if two else ("mean over sources", "worst source")
        front = {id(m) for m in self.pareto()}
        kinds = list(dict.fromkeys(m.aggregator for m in self.mixtures))
        points = []
        for m in self.mixtures:
            v = [m.scores[s] for s in self.sources]
            points.append((v[0], v[1]) if two else (math.fsum(v) / len(v), min(v)))
        plot = Plot(bounds([x for x, _ in points], True), bounds([y for _, y in points], True), height=300)
        plot.grid_y(lambda v, step: number(v, True, 0 if step >= 0.01 else 1))
        for at in ticks(*plot.x):
            plot.mark_x(plot.at_x(at), f"{100 * at:.3g}")
        plot.axis()
        plot.body.append(
            word((plot.left + plot.right) / 2, plot.height + 37, f"{names[0]} (%)", "m", "middle")
        )
        plot.body.append(word(plot.left, 10, f"{names[1]} (%)", "m"))
        order = sorted(
            zip(self.mixtures, points, strict=True),
            key=lambda pair: (pair[0] is self.best, id(pair[0]) in front),
        )
        for m, (x, y) in order:
            k, ringed = kinds.index(m.aggregator), id(m) in front
            ring = (
                f'<circle class="learn" r="{9 if m is self.best else 7}"/>'
                if ringed or m is self.best
                else ""
            )
            title = f"{m.name}: {number(x, True)}, {number(y, True)}{', best' if m is self.best else ''}"
            mark = MARKS[k % 5].format(k % 8)
            plot.body.append(
                f'<g transform="translate({xy(plot.at_x(x))} {xy(plot.at_y(y))})">{ring}{mark}<title>{esc(title)}</title></g>'
            )
        marks = [(MARKS[k % 5].format(k % 8), n) for k, n in enumerate(kinds)]
        ringed_mark = '<circle class="learn" r="7"/>'
        body, tall = legend([*marks, (ringed_mark, "Pareto front")], plot.height + 64)
        label = f"Scatter: {len(points)} mixtures, {names[1]} against {names[0]}; best {self.best.name}."
        return draw(
            path,
            [(f"{len(points)} mixtures", canvas(480, plot.height + 48 + tall, label, [*plot.body, *body]))],
        )


class _Spent(Exception):
    """The budget of evaluations is spent."""


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
    """Search mixtures base + sum_i lambda_i tau_i on the validation parts of sources: a grid, then an optimiser from its best.

    A mixture costs one forward pass a data set and is judged once. An accuracy a_s is normalised by that of the best single expert
    on the source: the objective is mean_s or min_s a_s / r_s; without labels 1 - the mean entropy of the answers over log C
    (Yang et al. 2024), or the share of examples where the answer is that of the experts' ensemble. The entropy of mixtures with one
    coefficient an expert is often least at a single expert, sure of all data: prefer agreement there.

    Args:
        model: what the checkpoints are parameters of: a Model or a torch module.
        base: what the experts started from: a state dict, a module or a path.
        experts: the same, in a sequence or by name.
        sources: what to judge on, with validation parts that no expert has seen; the right head is used where the model has heads
            of tasks.
        aggregators: by name; base + c (merged - base) is searched for each, too.
        each: one coefficient an expert is searched, not one for all.
        objective: "mean" or "worst" normalised accuracy; without labels "entropy" or "agreement".
        grid: coefficients for all experts together that are tried first.
        scales: coefficients c that are tried for aggregators; None: from 1/4 to the number of experts.
        optimiser: what goes on from the grid's best, within [0, 1.5 x its highest] (without labels, its highest); None: nothing.
        budget: how many mixtures the optimiser may try for each of the sum and the aggregators.
        seed: of aggregators and the optimiser.
        scenario: "task" tells the model the source's task, "class" and "domain" do not; None: fits the model.

    Raises:
        ConsilienceError: no base, checkpoints that do not have the model's entries or differ in frozen ones, numbers out of range,
            sources without validation part.

    Ilharco et al. 2023, arXiv:2212.04089 (coefficients); Yang et al. 2024, arXiv:2310.02575 (entropy).

    >>> import torch.nn as nn
    >>> from consilience import data
    >>> x = torch.arange(40.0)[:, None] / 40
    >>> source = data.arrays(x, (x[:, 0] > 0.5).long())
    >>> expert = {"weight": torch.tensor([[0.0], [2.0]]), "bias": torch.tensor([1.0, 0.0])}
    >>> found = explore(nn.Linear(1, 2), {n: 0 * t for n, t in expert.items()}, [expert], [source])
    >>> found.best.scores["data"], len(found.mixtures) <= 51
    (1.0, True)
    """
    bench = Bench(model, base, experts, sources, scenario)
    return search(
        bench,
        aggregators=aggregators,
        each=each,
        objective=objective,
        grid=grid,
        scales=scales,
        optimiser=optimiser,
        budget=budget,
        seed=seed,
    )


def search(
    bench: Bench,
    *,
    aggregators: Mapping[str, Aggregator] | None = None,
    each: bool = False,
    objective: str = "mean",
    grid: Sequence[float] = GRID,
    scales: Sequence[float] | None = None,
    optimiser: str | None = "nelder-mead",
    budget: int = 40,
    seed: int = 0,
    plain: bool = True,
) -> Exploration:
    """`explore` on a bench; `plain`: the sum is searched, not the aggregators alone."""
    m, names = len(bench.experts), tuple(s.name for s in bench.sources)
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if optimiser not in (None, "nelder-mead", "differential_evolution"):
        raise unknown("optimiser", optimiser, ("nelder-mead", "differential_evolution"))
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise ConsilienceError(f"`budget` should be a whole number >= 0. Found `budget = {budget!r}`.")
    scales = (
        tuple(s for s in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8) if s <= max(2, m))
        if scales is None
        else scales
    )
    for name, values in (("grid", grid), ("scales", scales)):
        if not len(values) or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise ConsilienceError(
                f"`{name}` should be finite numbers, at least one. Found {kind_of(values)}."
            )
    for n, a in (aggregators or {}).items():
        if n == SUM or not isinstance(a, Aggregator):
            raise ConsilienceError(
                f"`aggregators` should be made by consilience.aggregators, under names other than {SUM!r}. Found {n!r}: {kind_of(a)}."
            )
    reference = {}
    if objective in ("mean", "worst"):
        own = [bench.scores(bench.alone(n, "validation"), "accuracy", "validation") for n in bench.experts]
        reference = {s: max(o[s] for o in own) for s in names}
    tried: dict[tuple[str, tuple[float, ...]], Mixture] = {}

    def made(m: Mixture) -> Params:
        entry = (
            bench.mixture(m.coefficients)
            if m.aggregator == SUM
            else bench.along(m.aggregator, m.coefficients[0])
        )
        return bench.checkpoint(entry)

    def at(name: str, coefficients: Iterable[float]) -> Mixture:
        c = tuple(round(float(v), 9) + 0.0 for v in coefficients)
        if (name, c) not in tried:
            entry = bench.mixture(c) if name == SUM else bench.along(name, c[0])
            answers = bench.answers(entry, "validation")
            scores = bench.scores(answers, objective, "validation")
            values = [v / (reference[s] or 1.0) if reference else v for s, v in scores.items()]
            score = min(values) if objective == "worst" else math.fsum(values) / len(values)
            tried[name, c] = Mixture(
                name, c, scores, score, bench.likelihood(answers, objective, "validation")
            )
        return tried[name, c]

    def refine(name: str, first: Sequence[Mixture], high: float, size: int) -> None:
        """From the best of the first, in `size` dimensions (1: the same for all experts), up to half beyond what the grid had; without labels,
        where longer steps make answers surer and not better, not beyond it."""
        best = max(first, key=lambda x: x.merit)
        whole = m if name == SUM else 1
        limit, low = len(tried) + budget, min(0.0, *best.coefficients)
        start = list(best.coefficients[:size])

        def loss(v: Any) -> float:
            c = [round(float(x), 4) for x in v] if size == whole else [round(float(v[0]), 4)] * whole
            if (name, tuple(x + 0.0 for x in c)) not in tried and len(tried) >= limit:
                raise _Spent
            score, likelihood = at(name, c).merit
            return -score - 1e-3 * max(likelihood, -100.0)

        minimise(
            loss, start, (low, max((1.5 if reference else 1.0) * high, *start)), optimiser or "", budget, seed
        )

    if plain:
        first = [at(SUM, [v] * m) for v in grid]
        if each:
            first += [at(SUM, [float(i == j) for j in range(m)]) for i in range(m)]
        if optimiser and budget:
            refine(SUM, first, max(1.0, *grid), m if each else 1)
    for n, a in (aggregators or {}).items():
        bench.add(n, a, seed)
        first = [at(n, [v]) for v in scales]
        if optimiser and budget and len(scales) > 1:
            refine(n, first, max(1.0, *scales), 1)
    found = tuple(tried.values())
    if not found:
        raise ConsilienceError("there should be something to search. Found neither the sum nor aggregators.")
    return Exploration(
        objective, names, tuple(bench.experts), found, max(found, key=lambda x: x.merit), reference, made
    )


def minimise(
    loss: Callable[[Any], float],
    start: Sequence[float],
    span: tuple[float, float],
    optimiser: str,
    budget: int,
    seed: int,
) -> None:
    """Let an optimiser call `loss` within a box until it is content or the budget is spent; the calls are the result."""
    import numpy as np
    from scipy.optimize import differential_evolution, minimize

    n, (low, high) = len(start), span
    try:
        if optimiser == "differential_evolution":
            first = np.random.default_rng(seed).uniform(low, high, (max(5, min(15, budget // 4)), n))
            first[0] = start
            differential_evolution(
                loss,
                [span] * n,
                init=first,
                maxiter=max(1, 20 * budget),
                polish=False,
                tol=0,
                atol=1e-9,
                **_seeded(differential_evolution, seed),
            )
        else:
            # one corner moves all together, the others one each and less: experts out of balance are a steep way off a ridge
            wide, narrow = (
                (f * (high - low) * (1 if start[0] + f * (high - low) <= high else -1)) for f in (0.15, 0.05)
            )
            corners = [
                [v + wide for v in start],
                *([v + narrow * (i == j) for j, v in enumerate(start)] for i in range(n - 1)),
            ]
            minimize(
                loss,
                start,
                method="Nelder-Mead",
                bounds=[span] * n,
                options={
                    "initial_simplex": np.array([list(start), *corners]),
                    "xatol": 1e-3,
                    "fatol": 1e-6,
                    "maxfev": 20 * budget,
                },
            )
    except _Spent:
        return


def _seeded(call: Any, seed: int) -> dict[str, int]:
    """The seed under the name that this version of scipy has for it."""
    import inspect

    return {"rng" if "rng" in inspect.signature(call).parameters else "seed": seed}


def greedy_soup(
    model: Any, experts: Any, sources: Sequence[Source], *, base: Any = None, scenario: str | None = None
) -> Exploration:
    """Average the best experts: sorted by validation accuracy, each is added if the mean accuracy of the average does not fall.

    The best mixture has coefficient 1/k for each of its k members; no data but the validation parts of the sources is read. `base`
    tells which entries of tasks (heads) were learned; without it each should be one expert's alone, or the same in all.
    Raises ConsilienceError as `explore` does. Wortsman et al. 2022, arXiv:2203.05482 (recipe 1).

    >>> import torch.nn as nn
    >>> from consilience import data
    >>> x = torch.arange(40.0)[:, None] / 40
    >>> source = data.arrays(x, (x[:, 0] > 0.5).long())
    >>> good = {"weight": torch.tensor([[0.0], [2.0]]), "bias": torch.tensor([1.0, 0.0])}
    >>> greedy_soup(nn.Linear(1, 2), {"good": good, "bad": {n: -t for n, t in good.items()}}, [source]).best.coefficients
    (1.0, 0.0)
    """
    return soup(Bench(model, base, experts, sources, scenario, averages=True))


def soup(bench: Bench, objective: str = "mean") -> Exploration:
    """`greedy_soup` on a bench; without labels by another score than accuracy."""
    names, sources = list(bench.experts), tuple(s.name for s in bench.sources)
    tried = []

    def at(members: Sequence[str]) -> Mixture:
        c = tuple(1 / len(members) if n in members else 0.0 for n in names)
        scores = bench.scores(bench.answers(bench.mixture(c), "validation"), objective, "validation")
        tried.append(Mixture(SUM, c, scores, math.fsum(scores.values()) / len(scores)))
        return tried[-1]

    singles = sorted(((at([n]), n) for n in names), key=lambda pair: -pair[0].score)
    best, members = singles[0][0], [singles[0][1]]
    for _, n in singles[1:]:
        more = at([*members, n])
        if more.score >= best.score:
            best, members = more, [*members, n]
    return Exploration(
        objective,
        sources,
        tuple(names),
        tuple(tried),
        best,
        {},
        lambda m: bench.checkpoint(bench.mixture(m.coefficients)),
    )
