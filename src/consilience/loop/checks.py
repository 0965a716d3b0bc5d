"""What is checked before a run, so that no work is lost; and the facts that describe and identify a run."""

from __future__ import annotations

import os
import platform
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from consilience.core.augment import isolated
from consilience.core.correction import overrides
from consilience.core.errors import ConsilienceError, Refusal, kind_of, unknown
from consilience.core.method import Method
from consilience.core.metrics import Metric
from consilience.core.model import MISFITS, Model, misfit
from consilience.core.outliers import outliers
from consilience.core.params import Params, computing, key
from consilience.core.sampler import Sampler, Scored
from consilience.core.schedule import Evaluate, Schedule, Train, with_targets
from consilience.core.source import Examples, Source, Tensors, trimmed
from consilience.core.stopping import Stopping
from consilience.core.takes import Takes
from consilience.core.training import Training
from consilience.core.tree import cast_to, signature, tensors_of, types
from consilience.core.warning import warn
from consilience.loop.agents import Setup
from consilience.loop.engine import Engine
from consilience.loop.folder import Log, Progress
from consilience.loop.probe import check_augments
from consilience.loop.step import HALF
from consilience.metrics import choice
from consilience.version import __version__


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out: everything but what is learned by which method.

    Args:
        repeats: the number of seeds.
        seed: the first seed.
        out: the folder to write; None writes nothing.
        resume: whether to continue from the folder's checkpoint.
        metric: one or several metrics, or those of each task or kind of targets; None fits the targets.
        checkpoint_seconds: the time between checkpoints.
        checkpoint_steps: the steps between further checkpoints; None: none.
        curve_steps: the steps between points of the learning curve; None: no curve.
        stopping: ends a run where the validation score no longer improves over its stages.
        judge_clients: whether to score all agents that train by their own parameters, around each visit.
        progress: called with every line of the log.
        trackers: what is given the numbers of the log as scalars, as `trackers.of` returns them.
        config: the content of config.yaml; None describes the arguments.
        name: what the run is called in tables; None takes the method's name.
    """

    repeats: int = 1
    seed: int = 0
    out: str | Path | None = None
    resume: bool = False
    metric: choice.Choice = None
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int | None = None
    curve_steps: int | None = None
    judge_clients: bool = False
    stopping: Stopping | None = None
    progress: Progress | None = None
    trackers: Sequence[Any] = ()
    config: Mapping[str, Any] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.out, str | Path | None):
            raise ConsilienceError(f"`out` must be a path or None, got {kind_of(self.out)}.")
        if not isinstance(self.seed, int):
            raise ConsilienceError(f"`seed` must be an integer, got {kind_of(self.seed)}.")
        if not isinstance(self.repeats, int) or self.repeats < 1:
            raise ConsilienceError(f"`repeats` must be an integer >= 1, got {kind_of(self.repeats)}.")
        if not self.checkpoint_seconds > 0:
            raise ConsilienceError(f"`checkpoint_seconds` must be positive, got {self.checkpoint_seconds}.")
        for name in ("checkpoint_steps", "curve_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 1:
                raise ConsilienceError(f"`{name}` must be >= 1 or None, got {steps}.")

    def check_resume(self) -> None:
        """Refuse to resume where no run has begun."""
        if self.resume and (self.out is None or not Log(Path(self.out)).begun):
            raise ConsilienceError(f"`resume` needs the folder of a run, and {self.out} has none.")


def check_arguments(schedule: object, training: object = None) -> None:
    """Refuse arguments of other kinds, such as swapped ones."""
    if not isinstance(schedule, Schedule):
        raise ConsilienceError(f"`schedule` must be made by consilience.settings, got {kind_of(schedule)}.")
    if training is not None and not isinstance(training, Training):
        raise ConsilienceError(f"`training` must be a consilience.Training, got {kind_of(training)}.")


def check_all(
    schedule: Schedule, method: Method, model: Model, training: Training, options: RunOptions
) -> Setup:
    """Resolve the method for the schedule, and check that everything fits.

    Raises ConsilienceError, or Refusal for a method that could not act.
    """
    if training.loss is not None:
        schedule = with_loss(schedule, training.loss)
    # Parts of a method may refuse a model, so it is among the facts.
    facts, given = replace(schedule.survey(options.seed), model=model), method
    method = given.resolve(facts)

    # A method may set fields of the training itself, such as `epochs=1`.
    training = replace(training, **method.fixed)
    _check_tasks(schedule, method)
    if facts.trains:
        _check_trainable(schedule, method, model)
    if not schedule.boundaries and training.epochs > 1:
        raise ConsilienceError(
            f"a stream without boundaries is seen once, so `epochs` must be 1, got {training.epochs}."
        )
    if training.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConsilienceError(
            f"device={training.device!r} was requested, but CUDA is not available; use device='cpu'."
        )

    if method.step_level is not None:
        _check_level(method, training)
    if isinstance(training.accumulate, Mapping):
        names = [source.name for source in schedule.sources]
        for name in training.accumulate:
            if name not in names:
                raise unknown("source of `accumulate`", name, names, "those of the schedule")
    _check_precision(training)
    schedule = in_precision(schedule, training.dtype)
    # A sampler of a user may be any object with a `plan`.
    if isinstance(training.sampler, Takes) and (unfit := training.sampler.unfit(facts)):
        raise Refusal(f"the sampler cannot be used here: {unfit}.")
    if isinstance(training.sampler, Sampler) and facts.trains:
        phases = [phase for phase in schedule.plan(options.seed) if isinstance(phase, Train)]
        visits = Counter(visit for phase in phases for visit in phase.who.items())
        pools = any(overrides(part, "gather") for part in method.active)
        training.sampler.check(schedule.sources, training.epochs * max(visits.values()), pools)

    _check_experts(schedule, options.seed)
    known = model.tried
    _check_inputs(schedule, method, model)
    # They may refuse it also for what only a trial shows.
    if model.tried != known:
        method = given.resolve(facts)
    if facts.trains and facts.parts == 1:
        _check_single_samples(schedule, model, training, options.seed)
    for source in schedule.sources if facts.trains else ():
        if (warning := outliers(source)) is not None:
            warn(warning)
    check_augments(schedule)
    metrics = choice.metrics_of(options.metric, [*schedule.judged, *schedule.sources], schedule.frame)
    for name in sorted(
        {metric.name for some in metrics.values() for metric in some if metric.higher is None}
    ):
        warn(
            f"the metric {name!r} has no direction, so forgetting and transfer will not be given; use "
            "`metric=cs.metrics.own(f, higher=True)`, or False where less is better"
        )
    views = [part.name for part in method.all_corrections if overrides(part, "view")]
    if training.compile and views:
        warn(f"`compile` has no effect with {views[0]}, which changes the parameters that the model sees")
    elif training.compile and method.step_level is not None:
        warn("`compile` has no effect at the feature level, which cuts the forward pass at the features")
    setup = Setup(schedule, method, model, training, metrics, facts, options.judge_clients, options.stopping)
    check_stopping(setup)
    return setup


def _check_level(method: Method, training: Training) -> None:
    """Refuse to train in a way in which the gradients by features of a step are not there together."""
    if training.accumulates:
        raise Refusal(
            f"{method.name}: the feature level weighs the objectives of a whole batch before it is "
            "differentiated, and `accumulate` cuts it into parts; use a larger `batch_size`, or "
            'level="parameters".'
        )
    if isinstance(training.sampler, Scored):
        raise Refusal(
            f"{method.name}: the feature level needs one batch of inputs for all tasks of a step, and "
            f"{type(training.sampler).__name__} chooses by the scores of each task; use another sampler, or "
            'level="parameters".'
        )


def check_stopping(setup: Setup) -> None:
    """Refuse to stop early where it would leave out what is still to come, or has nothing to go by."""
    inside, stopping = setup.training.stopping, setup.stopping
    if inside is None and stopping is None:
        return
    for source in setup.schedule.sources:
        if not len(source.validation):
            raise ConsilienceError(
                f"`stopping` needs validation data, and {source.name!r} has none; give a `validation` share."
            )

    if inside is not None:
        ends = [correction.name for correction in setup.method.active if correction.needs_last_step]
        if ends:
            raise Refusal(
                f"{ends[0]} acts at set steps of a visit, so visits need all of them; no `stopping`."
            )
    if stopping is not None:
        check_stages(setup, stopping)


def check_stages(setup: Setup, stopping: Stopping) -> None:
    """Refuse to stop a run whose later stages have other data, or whose stages have no common score."""
    facts, hint = setup.facts, "Training(stopping=...) stops visits"
    if stopping.every is not None:
        raise ConsilienceError(
            "`every` of `stopping` has no effect on a run, which is checked at its stages, got "
            f"{stopping.every}; leave it out."
        )
    if facts.most_sources > facts.parts:
        raise ConsilienceError(
            "`stopping` of a run would leave out sources that agents train on later (up to "
            f"{facts.most_sources} in turn here); {hint}."
        )
    if facts.stages < 2:
        raise ConsilienceError(f"`stopping` of a run needs two stages or more, got {facts.stages}; {hint}.")

    # A mean over sources needs one metric, and a best stage needs a direction.
    first = {metrics[0].name: metrics[0] for metrics in setup.metrics.values()}
    if len(first) > 1 or None in [metric.higher for metric in first.values()]:
        raise ConsilienceError(
            "`stopping` of a run needs one metric with a direction for all sources, got "
            f"{', '.join(first)}; give a `metric`."
        )


def with_loss(schedule: Schedule, loss: Any) -> Schedule:
    """Return the schedule with a loss of the run, for tasks without one of their own."""
    own_judged = schedule.judged is not schedule.sources
    every = (*schedule.sources, *schedule.judged) if own_judged else schedule.sources
    sources, frame = with_targets(every, schedule.frame, loss)
    count = len(schedule.sources)
    return replace(schedule, sources=sources[:count], judged=sources[count:], frame=frame)


def in_precision(schedule: Schedule, dtype: torch.dtype) -> Schedule:
    """Return the schedule with float64 examples in memory in the type of the training, converted once.

    Examples that several sources share, such as one common test set, stay shared.
    """
    if dtype == torch.float64:
        return schedule
    # With the old examples, so that no other object gets the number of one of them.
    made: dict[int, tuple[Examples, Examples]] = {}

    def converted(examples: Examples, name: str) -> Examples:
        if not isinstance(examples, Tensors):
            return examples
        held = (*tensors_of(examples.x).values(), examples.y)
        long = [tensor for tensor in held if tensor.dtype == torch.float64]
        if not long:
            return examples
        if any(bool((tensor.abs() > torch.finfo(dtype).max).any()) for tensor in long):
            raise ConsilienceError(
                f"numbers of {name!r} must fit float32, got one beyond 3.4e38; scale them, or train with "
                "precision='fp64'."
            )
        if id(examples) not in made:
            made[id(examples)] = examples, examples.to(examples.y.device, dtype)
        return made[id(examples)][1]

    def each(source: Source) -> Source:
        parts = (source.train, source.validation, source.test)
        train, validation, test = (converted(part, source.name) for part in parts)
        return replace(source, train=train, validation=validation, test=test)

    sources = tuple(map(each, schedule.sources))
    judged = sources if schedule.judged is schedule.sources else tuple(map(each, schedule.judged))
    return replace(schedule, sources=sources, judged=judged)


def _check_precision(training: Training) -> None:
    """Refuse half precision where torch has no autocast of it."""
    half, kind = HALF.get(training.precision), torch.device(training.device).type
    if half is None:
        return
    try:
        # torch only warns where it does not support a type, and computes in float32.
        with warnings.catch_warnings(), torch.autocast(kind, dtype=half):
            warnings.simplefilter("error")
            one = torch.ones(1, 1, device=training.device)
            works = (one @ one).dtype == half
    except (RuntimeError, UserWarning):
        works = False
    if not works:
        raise ConsilienceError(
            f"precision={training.precision!r} was requested, but torch {torch.__version__} has no autocast "
            f"of it on {kind!r}; use precision='fp32' or 'bf16'."
        )


def _check_tasks(schedule: Schedule, method: Method) -> None:
    """Refuse a mapper that is given the true task where test data are of tasks that nobody trains on."""
    trained = {source.task for source in schedule.sources}
    others = [source.name for source in schedule.judged if source.task not in trained]
    if method.mapper is not None and method.mapper.needs_label and others:
        raise Refusal(
            f"{method.name} is given the true task of test data, and {others[0]!r} has test data of several "
            "tasks; use another mapper."
        )


def _check_trainable(schedule: Schedule, method: Method, model: Model) -> None:
    """Refuse to train a model whose entries are all frozen."""

    def trained(params: Params) -> bool:
        return any(p.is_floating_point() and not model.frozen(name) for name, p in params.items())

    # Statistics of frozen features are learned without steps, and `begin` may add entries.
    verbs = ("begin", "summarise")
    if any(overrides(part, verb) for part in method.all_corrections for verb in verbs):
        return
    params, buffers = model.init(key("trainable"))
    if params and not trained(params):
        params, _ = model.grow(params, buffers, schedule.sources[0], key("trainable"))
        if not trained(params):
            raise Refusal(
                f"nothing of the model can be trained: all {len(params)} entries are frozen "
                "(requires_grad=False, or by patterns); leave a head trainable."
            )


def _check_inputs(schedule: Schedule, method: Method, model: Model) -> None:
    """Refuse inputs that the model cannot take, and kept features of another backbone."""
    aware = schedule.labelled or method.mapper is not None
    shapes: set[object] = set()
    for source in schedule.sources:
        # Two examples of each shape are enough to try the model.
        x, y = trimmed(*source.train.first(2))
        kind = (signature(x), types(x), source.places)
        if kind not in shapes:
            shapes.add(kind)
            model.check(schedule.frame, x, aware, tuple(y.shape[y.dim() - source.places :]))

    # The hash of a backbone costs time, so it is asked for only where features were kept.
    own = model.feature_space if any(source.feature_space for source in schedule.sources) else ""
    for source in schedule.sources:
        if source.feature_space and own and source.feature_space != own:
            raise ConsilienceError(
                f"the features of {source.name!r} were made by backbone {source.feature_space[:8]}, and the "
                f"model's is {own[:8]}; the two differ in weights, image size, mean, std or structure. "
                f"The model is {model!r:.200}."
            )


def _check_experts(schedule: Schedule, seed: int) -> None:
    """Refuse experts with models of their own that do more than send, or that do not take the inputs."""
    own = {name: expert for name, expert in schedule.experts.items() if expert.model is not None}
    # Their outputs are in their own columns, which no target and no prediction of the schedule is in.
    active = {schedule.evaluated}
    for phase in schedule.plan(seed) if own else ():
        active |= set(phase.clients if isinstance(phase, Evaluate) else phase.who)
    for name, expert in own.items():
        if name in active:
            raise ConsilienceError(
                f"an expert with a model of its own only sends, and {name!r} trains, receives or is judged; "
                "leave out its `model`, or take it out of these phases."
            )
        if not isinstance(expert.model, Model):
            raise ConsilienceError(
                f"the model of an expert must be one of consilience.models, got {kind_of(expert.model)} in "
                f"{name!r}; wrap it with models.wrap."
            )
        params, buffers = expert.model.init(key("trial"))
        x = trimmed(*expert.source.train.first(2))[0]
        try:
            with torch.no_grad(), isolated():
                expert.model(params, buffers, cast_to(x, x.device, computing(params).dtype), None, False)
        except MISFITS as error:
            raise ConsilienceError(f"the expert {name!r}: {misfit(x, error)}") from error


def _check_single_samples(schedule: Schedule, model: Model, training: Training, seed: int) -> None:
    """Refuse batches of one sample where a model cannot be trained on one, as with batch norm."""
    short = [s for s in schedule.sources if len(s.train) == 1 or training.samples_of(s.name) == 1]
    if not short or not model.has_batch_norm:
        return
    # A client that fails may be left out.
    if any(isinstance(phase, Train) and phase.least is not None for phase in schedule.plan(seed)):
        return

    params, buffers = model.init(key("single"))
    x = short[0].train.first()[0]
    try:
        with torch.no_grad(), isolated():
            model(params, buffers, cast_to(x, x.device, computing(params).dtype), None, True)
    except MISFITS as error:
        cause = (
            f"{short[0].name!r} has one training example" if len(short[0].train) == 1 else "`batch_size` is 1"
        )
        raise ConsilienceError(
            f"batch norm needs two samples per step, and {cause} ({str(error).splitlines()[0]}); use larger "
            "batches, or a model with group norm."
        ) from error


def names_of(metrics: Sequence[Metric]) -> str:
    """Name several metrics in one text."""
    return ", ".join(metric.name for metric in metrics)


def versions(engine: Engine | None = None) -> dict[str, Any]:
    """Return what bit-identity depends on: versions, threads, engine, machine."""
    return {
        "consilience": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "engine": type(engine).__name__.lower() if engine is not None else "",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpus": os.cpu_count() or 0,
    }
