"""`cs.diagnose`: plan the runs, train them, and put together what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from consilience import models as catalogue
from consilience.api import Given, by_name, is_module, model_for
from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError, Refusal, kind_of, suggests, unknown
from consilience.core.method import Method
from consilience.core.metrics import Metric, mean
from consilience.core.model import Model
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.data.samplers import Mixed
from consilience.diagnosis._bench import Bench, Spec, Trained, kept_runs, options_of
from consilience.diagnosis._found import (
    Added,
    Affinities,
    Capacity,
    Conflicts,
    Diagnosis,
    Front,
    Grouping,
    Outcome,
    Transfer,
)
from consilience.diagnosis._front import non_dominated, share_of_box
from consilience.diagnosis._groups import (
    WEAK,
    associations,
    best_groups,
    groups_by_level,
    groups_by_name,
)
from consilience.diagnosis._probe import Probe
from consilience.loop.engine import Engine
from consilience.loop.folder import Progress
from consilience.methods import finetune, gradnorm, pcgrad, task_weights, uncertainty
from consilience.metrics.choice import Choice
from consilience.models.heads import MultiHead
from consilience.models.module import ModuleModel
from consilience.models.networks import Networks
from consilience.progress import draws, watched
from consilience.report._significance import Difference, paired

PARTS = {
    "transfer": "each task alone, and all together",
    "conflicts": "cosines of the tasks' gradients over training, by layer",
    "affinities": "what a step for one task does to the losses of all",
    "groups": "tasks that go together, by affinity, gradients, targets, domain and difficulty",
    "incremental": "tasks added one by one",
    "depth": "other sharing depths",
    "capacity": "a wider model",
    "soft": "soft sharing",
    "balance": "methods that balance losses or gradients",
    "front": "mixtures of tasks, and those that no other beats",
}
"""The parts of a diagnosis, in the order in which a budget is spent."""
TOGETHER = "together"
"""The name of the run on all tasks."""
EQUAL = "equal weights"
"""What that run is called among mixtures."""

Mixture = Method | tuple[Method, Training]


@dataclass(frozen=True)
class Tries:
    """What is tried besides plain training together, each by name."""

    methods: Mapping[str, Method]
    depths: Mapping[str, Given]
    wider: Mapping[str, Given]
    soft: Mapping[str, Given | Method]
    mixtures: Mapping[str, Mixture]
    domains: Mapping[str, str] | None
    usual: frozenset[str] = frozenset()
    """The parts whose models are not given: those that do not fit are left out."""


@dataclass(eq=False)
class Plan:
    """The runs of each part, checked; and why parts or single runs are left out."""

    runs: dict[str, list[Spec]] = field(default_factory=dict)
    extra: dict[str, int] = field(default_factory=dict)
    """How many further runs a part may come to, where that depends on what is found."""
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all runs, each once."""
        return list(dict.fromkeys(spec.name for own in self.runs.values() for spec in own))

    @property
    def most(self) -> int:
        """The most runs that there will be."""
        return len(self.names) + sum(self.extra.values())

    def said(self, repeats: int) -> str:
        """Say beforehand how many runs there will be, and what is left out."""
        seeds = f"{repeats} seed{'s' * (repeats != 1)}"
        each, seen = [], set[str]()
        for part, own in self.runs.items():
            fresh = {spec.name for spec in own} - seen
            count = len(fresh) + self.extra.get(part, 0)
            # Parts that only look at runs of others cost none.
            each += [f"{part} {count}"] if count else []
            seen |= fresh
        text = f"diagnose: at most {self.most} runs with {seeds} each ({', '.join(each)})"
        left = [f"skipped {part}: {why}" for part, why in self.skipped.items()]
        return "\n".join([text, *left])


@partial(suggests, training=Training)
def diagnose(
    sources: Sequence[Source],
    model: Given = None,
    training: Training | None = None,
    *,
    methods: Mapping[str, Method] | Sequence[Method] | None = None,
    depths: Mapping[str, Given] | None = None,
    wider: Given | Mapping[str, Given] = None,
    soft: Mapping[str, Given | Method] | None = None,
    mixtures: Mapping[str, Mixture] | None = None,
    domains: Mapping[str, str] | None = None,
    parts: Sequence[str] | None = None,
    budget: int | None = None,
    scenario: Literal["task", "domain", "class"] = "task",
    on: Literal["validation", "test"] = "validation",
    repeats: int = 3,
    seed: int = 0,
    metric: Choice = None,
    engine: str | Engine = "serial",
    probes: int = 10,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | bool | None = None,
    dry_run: bool = False,
) -> Diagnosis:
    """Find out which tasks help or harm each other when they are trained together, why, and what to do.

    It follows the seven steps of debugging negative transfer: baselines, tasks added one by one, conflicts of
    gradients, sharing depth, capacity, soft sharing, balance. All runs have the outputs of all tasks and the
    same seeds, so that they begin alike, and differences are by paired seeds.

    Args:
        sources: the tasks, at least two; of any kinds and sizes.
        model: what is trained, as in `run`; None takes one that fits the data.
        training: how, as in `run`.
        methods: tried against plain training together, by name or in a sequence; None: uncertainty, gradnorm
            and pcgrad.
        depths: models that share fewer or more layers, by name; None: up to four depths of the trunk, with a
            head per task (of a `models.multi_head`: nothing shared).
        wider: a model with wider layers, or one by name; None: twice the width, where `model` is None.
        soft: models or methods that share softly, by name; None: cross-stitch networks of the trunk.
        mixtures: methods, or pairs of a method and a Training, by name, whose Pareto front is drawn, with
            equal weights; None: by amount of data, each task by 4 times as much as the others, and, for tasks
            of different sizes, sampling at temperatures 1 and 5 (`data.samplers.Mixed`).
        domains: the domain of each task, by name; tasks of one domain are a group.
        parts: which parts to do, of `consilience.diagnosis.PARTS`; None: all.
        budget: the most runs (of all seeds each); parts that go beyond are skipped, and named.
        scenario: what targets and task labels are, as in `settings.multitask`.
        on: the data that runs are judged on. What is chosen on test data is not tested by them.
        repeats: the number of seeds; one shows no intervals.
        seed: the first seed.
        metric: as in `run`; it must have a direction.
        engine: what runs the steps, but of training alone and together, which is looked at.
        probes: how often gradients are measured in training together.
        out: a folder for finished runs, report.html and diagnosis.json; None writes nothing.
        resume: go on with the diagnosis in `out`; finished runs are read.
        progress: True draws a bar, or prints a line per run; None draws a bar where it can; False is quiet. A
            function is called with a line per run, and first with the plan.
        dry_run: train nothing: the diagnosis has `skipped` only, and the plan is printed.

    Raises ConsilienceError for fewer than two tasks, for names of no task or part, for sources without
    validation data, for a metric without a direction, and for what `run` refuses, all before any training.

    >>> import consilience as cs
    >>> tasks = cs.data.split_classes(cs.data.digits(), 5)[:2]
    >>> found = cs.diagnose(
    ...     tasks, training=cs.Training(epochs=1), parts=["conflicts"], repeats=1, on="test", probes=2
    ... )
    >>> found.conflicts.tasks, found.conflicts.layers[-1]
    (('digits/0-1', 'digits/2-3'), 'all')
    """
    judged = judged_sources(sources, on)
    chosen = chosen_parts(parts)
    whole_number(probes=probes)
    if budget is not None:
        whole_number(budget=budget)
    # Names are checked first: they cost nothing, and are mistyped most often.
    names = [source.name for source in judged]
    check_names("domains", domains, names)
    if domains is not None and set(names) - set(domains):
        raise ConsilienceError(
            f"`domains` must name all tasks, got none for {min(set(names) - set(domains))!r}."
        )

    # All is checked before the first run, also what comes last.
    folder = None if out is None else Path(out)
    options, runner = options_of(repeats, seed, metric, engine)
    probe = Probe(probes, looks_ahead=bool({"affinities", "groups"} & set(chosen)))
    bench = Bench(judged, scenario, options, runner, probe, folder=folder, kept=kept_runs(folder, resume))
    metrics = bench.metrics()

    given = {"depth": depths, "soft": soft, "capacity": wider}
    usual = model_for(bench.schedule(names), finetune(), model)
    tries = Tries(
        default_methods() if methods is None else by_name(methods),
        default_depths(usual) if depths is None else depths,
        widths(bench, usual if model is None else None, wider),
        default_soft(usual) if soft is None else soft,
        default_mixtures(judged, training) if mixtures is None else mixtures,
        domains,
        frozenset(part for part, value in given.items() if value is None),
    )
    plan = planned(
        bench, Spec(TOGETHER, tuple(names), finetune(), wrapped(model), training), tries, chosen, budget
    )
    study = Study(bench, plan, tries, metrics)
    if dry_run:
        print(plan.said(repeats))
        return study.found(on)

    # One bar for all runs, since nobody needs one for each.
    with watched(progress, lambda: plan.most, 1, ["diagnose"]) as lines:
        bench.report = lines["diagnose"]
        if callable(progress):
            progress({"event": "plan", "runs": plan.most, "text": plan.said(repeats)})
        elif progress or (progress is None and draws()):
            print(plan.said(repeats), flush=True)
        study.train()

    # Runs were written as they ended; these files need all of them.
    found = study.found(on)
    if folder is not None:
        from consilience.core.params import write_json

        write_json(folder / "diagnosis.json", found.to_json())
        found.report(folder / "report.html")
    return found


# Arguments.


def judged_sources(sources: Sequence[Source], on: str) -> list[Source]:
    """Return the tasks with what they are judged on as test data; refuse what is no task."""
    if isinstance(sources, Source) or not isinstance(sources, Sequence):
        raise ConsilienceError(f"`sources` must be a sequence of tasks, got {kind_of(sources)}.")
    given = list(sources)
    for source in given:
        if not isinstance(source, Source):
            raise ConsilienceError(f"`sources` must be sources of consilience.data, got {kind_of(source)}.")
    if len(given) < 2:
        raise ConsilienceError(
            f"a diagnosis needs at least two tasks, got {len(given)}; split a source, as "
            "cs.data.split_classes does."
        )
    # Scores, runs and groups are by name.
    names = [source.name for source in given]
    if len(set(names)) < len(names):
        raise ConsilienceError(
            f"tasks must have names of their own, got {max(names, key=names.count)!r} twice."
        )

    if on == "test":
        return given
    if on != "validation":
        raise ConsilienceError(f"`on` must be 'validation' or 'test', got {on!r}.")
    empty = [source.name for source in given if not len(source.validation)]
    if empty:
        raise ConsilienceError(
            f"a diagnosis is judged on validation data, and {empty[0]!r} has none; give `validation=0.1` to "
            "its source, or on='test'."
        )
    return [replace(source, test=source.validation) for source in given]


def chosen_parts(parts: Sequence[str] | None) -> list[str]:
    """Return the parts in their order. Raises ConsilienceError for a name of none."""
    if parts is None:
        return list(PARTS)
    if isinstance(parts, str) or not parts:
        raise ConsilienceError(f"`parts` must be a list of {', '.join(PARTS)}, got {kind_of(parts)}.")
    for part in parts:
        if part not in PARTS:
            raise unknown("parts", str(part), PARTS, "the parts of a diagnosis")
    return [part for part in PARTS if part in parts]


def check_names(argument: str, given: Mapping[str, Any] | None, names: Sequence[str]) -> None:
    """Refuse a mapping with names of no task."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise ConsilienceError(f"`{argument}` must be a mapping by task, got {kind_of(given)}.")
    for name in given:
        if name not in names:
            raise unknown(argument, str(name), names, "the tasks")


def wrapped(model: Given) -> Given:
    """Return a model of one's own around a torch module, once for all runs."""
    return catalogue.wrap(model) if is_module(model) else model  # type: ignore[arg-type]


def default_methods() -> dict[str, Method]:
    """Return the methods that the seven steps name."""
    return {method.name: method for method in (uncertainty(), gradnorm(), pcgrad())}


def default_mixtures(sources: Sequence[Source], training: Training | None) -> dict[str, Mixture]:
    """Return weights of tasks, by amount of data and for each by 4 times the others, and temperatures."""
    found: dict[str, Mixture] = {"by amount of data": task_weights("size")}
    found |= {f"4 x {source.name}": task_weights({source.name: 4.0}) for source in sources}
    # Tasks of one size have equal shares at every temperature.
    if len({len(source.train) for source in sources}) > 1:
        for temperature in (1.0, 5.0):
            sampled = replace(training or Training(), sampler=Mixed(temperature))
            found[f"sampling at T = {temperature:g}"] = (finetune(), sampled)
    return found


class Headed(NamedTuple):
    """A trunk, and the heads per task that stand on it."""

    trunk: ModuleModel
    outputs: int
    hidden: tuple[int, ...] = ()
    norm: Literal["inf"] | None = None

    def shared(self, depth: int) -> Networks:
        """Return the model whose first layers are common."""
        return catalogue.multi_head(self.trunk, self.outputs, self.norm, self.hidden, shared=depth)


def headed(model: Model) -> Headed | None:
    """Return the trunk of a model; None where it has no trunk with layers."""
    if isinstance(model, MultiHead):
        return Headed(model.trunk, model.outputs, model.hidden, model.norm)
    if not isinstance(model, ModuleModel):
        return None
    # A linear model is a head and nothing else.
    try:
        return Headed(model, model.outputs) if model.body().entries else None
    except ConsilienceError:
        return None


def default_depths(model: Model) -> dict[str, Given]:
    """Return models of which the first 0, .., L layers of the trunk are common, four at most."""
    given = headed(model)
    if given is None:
        return {}
    try:
        count = len(given.shared(0).layers)
    except ConsilienceError:
        # Layers that share entries cannot be cut apart.
        return {}
    # A model with heads is itself the one with all layers.
    whole = {count} if isinstance(model, MultiHead) else set()
    depths = sorted({round(count * k / 3) for k in range(4)} - whole)
    return {f"{depth} of {count} layers shared": given.shared(depth) for depth in depths}


def default_soft(model: Model) -> dict[str, Given | Method]:
    """Return cross-stitch networks of the trunk."""
    given = headed(model)
    if given is None:
        return {}
    try:
        made = catalogue.cross_stitch(given.trunk, given.outputs, hidden=given.hidden)
    except ConsilienceError:
        return {}
    return {"cross-stitch": made}


def widths(bench: Bench, usual: Model | None, wider: Given | Mapping[str, Given]) -> Mapping[str, Given]:
    """Return the wider model by its name; `usual` is the default model, which has one of twice its width."""
    if isinstance(wider, Mapping):
        if len(wider) != 1:
            raise ConsilienceError(f"`wider` must be one model, or one by its name, got {len(wider)}.")
        return wider
    if wider is not None:
        return {"wider": wider}
    if usual is None:
        return {}

    # As `models.fitting` makes it, with twice as many units.
    x, _ = bench.sources[0].train.first()
    shape = tuple(x.shape[1:])
    doubled = (
        catalogue.conv(usual.outputs, shape[0], shape[1], 64)
        if repr(usual).startswith("conv")
        else catalogue.mlp(math.prod(shape), (256,), usual.outputs)
    )
    return {repr(doubled): doubled}


# The plan.


def planned(bench: Bench, together: Spec, tries: Tries, chosen: Sequence[str], budget: int | None) -> Plan:
    """Return the checked runs of all chosen parts, within a budget.

    Raises ConsilienceError where even the first part is beyond it, and for what a run refuses; a method that
    refuses is left out.
    """
    plan, every = Plan(), bench.tasks
    base = [bench.check(together)]
    # All parts but those that look at one run compare with each task alone.
    if set(chosen) - {"conflicts", "affinities"}:
        base += [bench.check(replace(together, name=f"alone: {task}", tasks=(task,))) for task in every]
        chosen = ["transfer", *(part for part in chosen if part != "transfer")]
    if budget is not None and len(base) > budget:
        raise ConsilienceError(
            f"`budget` must cover training together{' and each task alone' * (len(base) > 1)}, {len(base)} "
            f"runs, got {budget}; choose `parts`, such as ['conflicts', 'affinities'], which need one."
        )

    # Cheap parts come first, so that a budget is spent on what says most.
    for part in chosen:
        own, extra, why = part_runs(bench, together, tries, part)
        own = base if part in ("transfer", "conflicts", "affinities") else own
        if why:
            plan.skipped[part] = why
            continue
        fresh = [spec.name for spec in own if spec.name not in plan.names]
        count = plan.most + len(fresh) + extra
        if budget is not None and count > budget:
            plan.skipped[part] = f"its {len(fresh) + extra} runs go beyond the budget of {budget}"
            continue

        # A method may refuse such tasks; all else that does not fit is an error.
        accepted = []
        for spec in own:
            try:
                accepted.append(spec if spec.name in bench.marks else bench.check(spec))
            except ConsilienceError as error:
                if not isinstance(error, Refusal) and part not in tries.usual:
                    raise
                plan.skipped[spec.name] = str(error).rstrip(".")
        if own and not accepted:
            plan.skipped[part] = "all of its runs are refused"
            continue
        plan.runs[part] = accepted
        if extra:
            plan.extra[part] = extra
    return plan


def part_runs(bench: Bench, together: Spec, tries: Tries, part: str) -> tuple[list[Spec], int, str]:
    """Return the runs of a part, how many more it may come to, and why it is skipped ("": it is not)."""
    every = bench.tasks
    if part == "incremental":
        firsts = [every[:count] for count in range(2, len(every))]
        return [replace(together, name=f"first {len(first)}", tasks=first) for first in firsts], 0, ""
    if part == "groups":
        # Of two tasks all groupings are trained anyway.
        return [], len(every) // 2 if len(every) > 2 else 0, ""

    # What is tried, and what a user can give where there is nothing to try.
    named: Mapping[str, Any] = {
        "depth": tries.depths,
        "capacity": tries.wider,
        "soft": tries.soft,
        "balance": tries.methods,
        "front": tries.mixtures,
    }.get(part, {})
    needs = {
        "depth": "give `depths`, models that share fewer or more layers, by name",
        "capacity": "give `wider`, the same model with wider layers",
        "soft": "give `soft`, models or methods that share softly, by name",
        "balance": "`methods` is empty",
        "front": "`mixtures` is empty",
    }
    if part in needs and not named:
        return [], 0, needs[part]
    return [tried_spec(together, part, name, value) for name, value in named.items()], 0, ""


def tried_spec(together: Spec, part: str, name: str, value: Any) -> Spec:
    """Return the run on all tasks with one thing changed: its method, its training or its model."""
    changed = replace(together, name=f"{part}: {name}")
    # Methods and models are distinguished by their type, so that both can be tried for soft sharing.
    if isinstance(value, Method):
        return replace(changed, method=value)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Method):
        return replace(changed, method=value[0], training=value[1])
    return replace(changed, model=wrapped(value))


# What the runs show.


@dataclass(eq=False)
class Study:
    """Trains the runs of a plan, and says what they show."""

    bench: Bench
    plan: Plan
    tries: Tries
    metrics: Sequence[Metric]
    groupings: list[Grouping] = field(default_factory=list)

    def train(self) -> None:
        """Train all runs; those of groups last, since they depend on what is found."""
        # Runs that several parts need are trained once.
        for own in self.plan.runs.values():
            for spec in own:
                self.bench.train(spec)
        if "groups" in self.plan.runs:
            self.groupings = self._groupings()

    def found(self, on: str) -> Diagnosis:
        """Return what the runs show."""
        bench, plan, options = self.bench, self.plan, self.bench.options
        finished = bench.finished

        # Whichever part was chosen, training together is its first run.
        together = (
            plan.runs.get("transfer") or plan.runs.get("conflicts") or plan.runs.get("affinities") or []
        )
        diagnosis = Diagnosis(
            tasks=bench.tasks,
            metrics=tuple(metric.name for metric in self.metrics),
            higher=tuple(bool(metric.higher) for metric in self.metrics),
            on=on,
            scenario=bench.scenario,
            model=repr(together[0].model) if together else "",
            repeats=options.repeats,
            seed=options.seed,
            runs={name: run.seconds for name, run in finished.items()},
            skipped=dict(plan.skipped),
        )
        if not finished:
            return diagnosis
        return replace(
            diagnosis,
            transfer=self._transfer() if "transfer" in plan.runs else (),
            conflicts=self._conflicts() if "conflicts" in plan.runs else None,
            affinities=self._affinities() if "affinities" in plan.runs else None,
            groupings=tuple(self.groupings),
            incremental=self._incremental() if "incremental" in plan.runs else (),
            depth=self._outcomes("depth"),
            capacity=self._capacity(),
            soft=self._outcomes("soft"),
            balance=self._outcomes("balance"),
            front=self._front(),
        )

    # Scores, by seed.

    def scores(self, name: str) -> np.ndarray:
        """Return the scores of a run [seeds, tasks]."""
        return self.bench.finished[name].scores

    @property
    def signs(self) -> np.ndarray:
        """1 for tasks where more is better, else -1 [tasks]."""
        return np.array([1.0 if metric.higher else -1.0 for metric in self.metrics])

    @property
    def alone(self) -> np.ndarray:
        """The scores of each task trained alone [seeds, tasks]."""
        return np.stack(
            [self.scores(f"alone: {task}")[:, j] for j, task in enumerate(self.bench.tasks)], axis=1
        )

    def gains(self, scores: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return how much better scores are than others, relative to the others' size [seeds, tasks]."""
        # Nothing is relative to a score of 0.
        with np.errstate(divide="ignore", invalid="ignore"):
            found = self.signs * (scores - others) / np.abs(others)
        return np.where(np.isfinite(found), found, np.nan)

    def outcome(self, name: str, scores: np.ndarray) -> Outcome:
        """Return a run on all tasks as it is shown."""
        return Outcome(
            name,
            tuple(mean(scores, 0).tolist()),
            paired(mean(self.gains(scores, self.alone), 1)),
            paired(mean(self.gains(scores, self.scores(TOGETHER)), 1)),
        )

    # Parts.

    def _transfer(self) -> tuple[Transfer, ...]:
        """Return each task alone and together."""
        # Here in the units of the metric: each task has its own row.
        alone, together = self.alone, self.scores(TOGETHER)
        return tuple(
            Transfer(
                task,
                self.metrics[j].name,
                float(mean(alone[:, j])),
                float(mean(together[:, j])),
                paired(self.signs[j] * (together[:, j] - alone[:, j])),
            )
            for j, task in enumerate(self.bench.tasks)
        )

    def _conflicts(self) -> Conflicts:
        """Return the cosines of training together."""
        trained = self.bench.finished[TOGETHER]
        by_seed = list(trained.readings.values())
        # A visit that stopped early has fewer places; those that all seeds reached are compared.
        count = min(map(len, by_seed))
        cosines = np.array([[reading.cosines for reading in own[:count]] for own in by_seed])
        steps = tuple(reading.step for reading in by_seed[0][:count])
        return Conflicts(self.bench.tasks, steps, trained.layers, cosines)

    def _affinities(self) -> Affinities:
        """Return the affinities of training together."""
        by_seed = list(self.bench.finished[TOGETHER].readings.values())
        count = min(map(len, by_seed))
        values = np.array([[reading.affinities for reading in own[:count]] for own in by_seed])
        return Affinities(self.bench.tasks, values)

    def _groupings(self) -> list[Grouping]:
        """Return groups by all criteria; train those by affinity, where they are not all together."""
        tasks, skipped = self.bench.tasks, self.plan.skipped
        best = best_groups(tasks, self._affinities().matrix().tolist())
        found = [
            Grouping("affinity", best, self._grouped(best)),
            Grouping("gradients", best_groups(tasks, self._conflicts().matrix().tolist())),
        ]

        # Criteria that cost no runs.
        related = associations(self.bench.sources)
        if isinstance(related, str):
            skipped["groups by targets"] = related
        else:
            found.append(
                Grouping("targets", best_groups(tasks, [[v - WEAK for v in row] for row in related]))
            )
        if self.tries.domains is None:
            skipped["groups by domain"] = "give `domains`, a name for each task"
        else:
            found.append(Grouping("domain", groups_by_name(tasks, self.tries.domains)))

        # The loss that is left has no unit, so that tasks of other losses can be compared.
        left = {task: float(mean(list(self._alone(task).left.values()) or [math.nan])) for task in tasks}
        if all(math.isfinite(value) for value in left.values()):
            found.append(Grouping("difficulty", groups_by_level(left)))
        else:
            skipped["groups by difficulty"] = "a task has no loss before training"
        return found

    def _alone(self, task: str) -> Trained:
        """Return the run of one task."""
        return self.bench.finished[f"alone: {task}"]

    def _grouped(self, groups: Sequence[Sequence[str]]) -> Outcome | None:
        """Train each group of several tasks, and return the scores of all; None where they are one group."""
        tasks, together = self.bench.tasks, self.plan.runs["transfer"][0]
        if len(groups) == 1:
            return None
        # A task by itself is trained already.
        scores = self.alone.copy()
        for group in groups:
            if len(group) > 1:
                spec = replace(together, name=f"group: {' + '.join(group)}", tasks=tuple(group))
                own = self.bench.train(self.bench.check(spec)).scores
                scores = np.where(np.isin(tasks, list(group)), own, scores)
        return self.outcome("groups by affinity", scores)

    def _incremental(self) -> tuple[Added, ...]:
        """Return the tasks in their order, with what each does to those before it."""
        tasks = self.bench.tasks
        names = [f"alone: {tasks[0]}", *(f"first {count}" for count in range(2, len(tasks))), TOGETHER]
        # The first is alone, the last is with all, and both are trained already.
        found = []
        for count, name in enumerate(names, 1):
            scores = self.scores(name)
            gains: dict[str, Difference] = {}
            gain = None
            if count > 1:
                before = self.scores(names[count - 2])
                changes = self.signs * (scores - before)
                gains = {task: paired(changes[:, j]) for j, task in enumerate(tasks[: count - 1])}
                # Against the score alone, so that all rows have one scale.
                relative = self.gains(scores, self.alone) - self.gains(before, self.alone)
                gain = paired(mean(relative[:, : count - 1], 1))
            shown = tuple(mean(scores[:, :count], 0).tolist())
            found.append(Added(tasks[count - 1], shown, gains, gain))
        return tuple(found)

    def _outcomes(self, part: str) -> tuple[Outcome, ...]:
        """Return the runs of a part that are on all tasks."""
        return tuple(
            self.outcome(spec.name.removeprefix(f"{part}: "), self.scores(spec.name))
            for spec in self.plan.runs.get(part, ())
        )

    def _capacity(self) -> Capacity | None:
        """Return what a wider model gains, and how much of the loss by transfer it makes good."""
        outcomes = self._outcomes("capacity")
        if not outcomes:
            return None
        (outcome,) = outcomes
        wide, narrow = self.scores(f"capacity: {outcome.name}"), self.scores(TOGETHER)
        gained = self.signs * (wide - narrow)
        # Only tasks that lost by sharing can say whether capacity was the reason.
        lost = mean(self.signs * (self.alone - narrow), 0)
        closed = mean(gained, 0)[lost > 0] / lost[lost > 0]
        gains = {task: paired(gained[:, j]) for j, task in enumerate(self.bench.tasks)}
        return Capacity(outcome.name, gains, float(mean(closed)) if len(closed) else math.nan, outcome)

    def _front(self) -> Front | None:
        """Return the mixtures, and which of them no other beats."""
        if "front" not in self.plan.runs:
            return None
        # Training together has equal weights.
        mixtures = (self.outcome(EQUAL, self.scores(TOGETHER)), *self._outcomes("front"))
        # More must be better in all of them.
        points = [tuple((self.signs * np.array(mixture.scores)).tolist()) for mixture in mixtures]
        return Front(mixtures, tuple(non_dominated(points)), share_of_box(points))
