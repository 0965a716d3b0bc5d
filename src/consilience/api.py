"""What users type: `run`, `sweep`, and `Result`. It knows the engines, models and reports by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from html import escape
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from consilience import engines, models
from consilience.core.errors import ConsilienceError, kind_of, suggests
from consilience.core.method import Method
from consilience.core.model import Model
from consilience.core.schedule import Schedule
from consilience.core.stopping import Stopping
from consilience.core.training import Training
from consilience.core.tree import Tree
from consilience.loop import result as loop_result
from consilience.loop.checks import RunOptions, check_arguments
from consilience.loop.engine import Engine
from consilience.loop.folder import Log, Progress
from consilience.loop.run import begin, drive
from consilience.loop.session import Session
from consilience.metrics.choice import Choice
from consilience.progress import watched
from consilience.trackers import of as trackers_of

if TYPE_CHECKING:
    from consilience.report._figure import Figure

Given = Model | torch.nn.Module | Callable[[], torch.nn.Module] | None
"""A model as users give it; None takes one that fits the data."""


class Result(loop_result.Result):
    """What a run found: the scores before training and after each stage, costs, and the trained agent.

    `matrices` [repeats, stages + 1, sources] has the metric on each source's test data; `score` is the mean
    of the last rows. `table()` and `report(path)` show it.

    >>> import consilience as cs
    >>> sources = cs.data.split_classes(cs.data.digits(), 5)
    >>> schedule = cs.settings.continual(sources[:2])
    >>> result = cs.run(schedule, cs.methods.finetune(), training=cs.Training(epochs=1))
    >>> result.matrix.shape, result.stages
    ((3, 2), ('digits/0-1', 'digits/2-3'))
    """

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """Read the result of a run from its folder (`result.json`); it has no agent.

        Raises ConsilienceError if the file is missing, cannot be read, or is no complete result.
        """
        from consilience.report import load

        return cls(**vars(load(folder)))

    def table(self) -> str:
        """Return the result as a text table."""
        # Reports are loaded when one is drawn: most runs draw none.
        from consilience.report import table

        return table([self])

    def plot(self, kind: str = "seen") -> Figure:
        """Draw one chart (`report.plot`): "seen", "sources", "costs" or "balance"; `save(path)` writes it."""
        from consilience.report import plot

        return plot([self], kind)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.table())}</pre>"

    def report(self, path: str | Path) -> Path:
        """Write the result as one HTML file that opens offline."""
        from consilience.report import write

        return write([self], path)


@partial(suggests, training=Training)
def run(
    schedule: Schedule,
    method: Method | Sequence[Method],
    model: Given = None,
    training: Training | None = None,
    *,
    repeats: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    engine: str | Engine = "serial",
    metric: Choice = None,
    checkpoint_seconds: float = 60.0,
    checkpoint_steps: int | None = None,
    curve_steps: int | None = None,
    judge_clients: bool = False,
    stopping: Stopping | Mapping[str, Any] | int | None = None,
    progress: Progress | bool | None = None,
    trackers: Sequence[Any] = (),
    config: Mapping[str, Any] | None = None,
) -> Result:
    """Run a schedule with a method; evaluate before training and after every stage.

    It runs `repeats` times, with seeds seed, seed + 1, ..; equal arguments give equal bits.

    Args:
        schedule: which agent trains on which source when, and sends to which others (`consilience.settings`).
        method: one, or several that compose (`consilience.methods`).
        model: a Model, a torch module, or a function that makes one; None takes one that fits the data.
        training: how a source is trained on.
        repeats: the number of seeds, for a mean and a standard deviation.
        seed: the first seed; everything random is keyed by it.
        out: a folder for config.yaml, result.json, log.jsonl and the last two checkpoints, locked while a
            process uses it; None writes nothing.
        resume: continue from the folder's last checkpoint (from the start, if there is none yet); the end is
            bit-identical to an uninterrupted run.
        engine: what runs the steps: "serial", "batched" (many clients in one program), "ray" (many processes
            or machines), "auto" (batched where that is faster), or one of `consilience.engines`. The results
            are the same, to rounding.
        metric: a name of `consilience.metrics`, what one of its functions returns, a function of
            (predictions, targets), or an object of torchmetrics; a list of these, whose first is in the
            matrices (`Result.of_metric` has the others); or a mapping of tasks or kinds of targets to them.
            None fits the targets. A source's own `metric` comes first.
        checkpoint_seconds: the time between checkpoints, also inside a visit.
        checkpoint_steps: the steps between checkpoints, in addition.
        curve_steps: the steps between points of the learning curve inside a visit: the metric on the test
            data of the source that is trained on (`Result.learning_curve`); None draws none.
        judge_clients: also score agents that train by their own parameters, before and after each visit
            (`Result.local`), and measure how far senders drifted apart (`Result.client_drift`); it costs two
            evaluations per visit.
        stopping: ends the run where the metric on the sources' validation data no longer improves over its
            stages, such as rounds, and returns the parameters of the best one (`Result.stopped`): a
            `Stopping`, or the number of stages to wait. None: all stages are run.
        progress: True draws a bar in a terminal or a notebook and prints lines elsewhere; None draws a bar
            where it can; False is quiet. A function is called with every line of the log instead.
        trackers: where the numbers of the log go while it runs: "csv", "tensorboard", "wandb", "mlflow", one
            of `consilience.trackers`, an object with `log(scalars, step)`, or a function of the two.
        config: the content of config.yaml; None describes the arguments.

    Raises ConsilienceError (Refusal for a method that could not act) before any work is lost.

    >>> import consilience as cs
    >>> sources = cs.data.split_classes(cs.data.digits(), 5)
    >>> result = cs.run(cs.settings.continual(sources), cs.methods.er(100), training=cs.Training(epochs=1))
    >>> result.matrix.shape, result.stages[:2]
    ((6, 5), ('digits/0-1', 'digits/2-3'))
    """
    options = RunOptions(
        repeats=repeats,
        seed=seed,
        out=out,
        resume=resume,
        metric=metric,
        checkpoint_seconds=checkpoint_seconds,
        checkpoint_steps=checkpoint_steps,
        curve_steps=curve_steps,
        judge_clients=judge_clients,
        stopping=Stopping.of(stopping),
        trackers=trackers_of(trackers),
        config=config,
    )
    options.check_resume()

    # A method may refuse the model, so that is chosen before the checks.
    chosen = model_for(schedule, method, model)
    label = Method.of(method).name  # type: ignore[arg-type]
    with watched(progress, lambda: schedule.survey(seed).stages, repeats, [label]) as lines:
        options = replace(options, progress=lines[label])
        with closing(begin(schedule, method, chosen, training, engine_of(engine), options)) as session:
            drive([session], session.engine)
            return result_of(session)


@partial(suggests, training=Training)
def sweep(
    schedule: Schedule,
    methods: Mapping[str, Method] | Sequence[Method],
    model: Given | Mapping[str, Given] = None,
    training: Training | Mapping[str, Training] | None = None,
    *,
    repeats: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    engine: str | Engine = "auto",
    metric: Choice = None,
    checkpoint_seconds: float = 60.0,
    judge_clients: bool = False,
    stopping: Stopping | Mapping[str, Any] | int | None = None,
    progress: Progress | bool | None = None,
    trackers: Sequence[Any] = (),
) -> dict[str, Result]:
    """Run several methods, models or trainings on one schedule side by side: all combinations of them.

    It returns what `run` would for each, by name, and tables have these names. The "batched" engine stacks
    visits that are alike across methods and seeds: ten strengths cost much less than ten runs. All are
    checked before any work.

    Args:
        schedule, repeats, seed, engine: as in `run`.
        metric, checkpoint_seconds, judge_clients, stopping, progress, trackers: as in `run`.
        methods: by name, or a sequence, whose members are then called by their names.
        model, training: as in `run`, or several by name; runs are then called "method, model, training".
        out: a folder with a run's folder for each name; None writes nothing.
        resume: continue the runs in `out` from their last checkpoints, and begin those that have none.

    Raises ConsilienceError as `run` does, naming the run; for two methods of one name.

    >>> import consilience as cs
    >>> sources = cs.data.split_classes(cs.data.digits(), 5)
    >>> methods = {f"strength {s:g}": cs.methods.ewc(s) for s in (1, 10)}
    >>> schedule, training = cs.settings.continual(sources, "task"), cs.Training(epochs=1)
    >>> results = cs.sweep(schedule, methods, training=training, repeats=2)
    >>> list(results), results["strength 1"].matrices.shape
    (['strength 1', 'strength 10'], (2, 6, 5))
    >>> rates = {f"lr {lr:g}": cs.Training(epochs=1, lr=lr) for lr in (0.1, 0.01)}
    >>> [result.method for result in cs.sweep(schedule, [cs.methods.finetune()], training=rates).values()]
    ['finetune, lr 0.1', 'finetune, lr 0.01']
    """
    runner, given_trackers = engine_of(engine), trackers_of(trackers)
    made: dict[str, Model] = {}
    sessions: dict[str, Session] = {}
    runs = variants(methods, model, training)
    with ExitStack() as held:
        names = [name for name, *_ in runs]
        lines = held.enter_context(watched(progress, lambda: schedule.survey(seed).stages, repeats, names))
        for name, method, given, trained in runs:
            at = Path(out) / name if out is not None else None
            options = RunOptions(
                repeats=repeats,
                seed=seed,
                out=at,
                resume=resume and at is not None and Log(at).begun,
                metric=metric,
                checkpoint_seconds=checkpoint_seconds,
                judge_clients=judge_clients,
                stopping=Stopping.of(stopping),
                progress=lines[name],
                trackers=given_trackers,
                name=name,
            )

            # Visits are stacked only if they have the very same model.
            chosen = model_for(schedule, method, given)
            chosen = made.setdefault(repr(chosen), chosen) if given is None else chosen
            try:
                session = begin(schedule, method, chosen, trained, runner, options)
            except ConsilienceError as e:
                e.add_note(f"in {name!r} of a sweep")
                raise
            sessions[name] = held.enter_context(closing(session))
        drive(list(sessions.values()), runner)
        return {name: result_of(session) for name, session in sessions.items()}


class Variant(NamedTuple):
    """One run of a sweep."""

    name: str
    method: Method
    model: Given
    training: Training | None


def variants(methods: Any, model: Any, training: Any) -> list[Variant]:
    """Return all combinations of methods, models and trainings; those given alone are in no name."""
    choices: list[Mapping[str, Any]] = [by_name(methods)]
    for argument, value in (("model", model), ("training", training)):
        if isinstance(value, Mapping) and not value:
            raise ConsilienceError(f"`{argument}` of a sweep must name at least one, got an empty mapping.")
        choices.append(value if isinstance(value, Mapping) else {"": value})

    # A model that several runs share is wrapped once, so that their visits can be stacked.
    choices[1] = {
        name: models.wrap(given) if is_module(given) else given for name, given in choices[1].items()
    }
    found = []
    for combined in product(*(choice.items() for choice in choices)):
        name = ", ".join(name for name, _ in combined if name)
        found.append(Variant(name, *(value for _, value in combined)))
    return found


def is_module(model: object) -> bool:
    """Whether a model must be wrapped: a torch module, or a function that makes one."""
    return isinstance(model, torch.nn.Module) or (callable(model) and not isinstance(model, Model))


def by_name(methods: Mapping[str, Method] | Sequence[Method]) -> Mapping[str, Method]:
    """Return several methods by name. Raises ConsilienceError for one method, none, or two of one name."""
    if isinstance(methods, Method) or not methods:
        raise ConsilienceError(
            f"`methods` must be a mapping or a sequence of methods, got {kind_of(methods)}."
        )
    if isinstance(methods, Mapping):
        return methods
    twice = [name for name, count in Counter(method.name for method in methods).items() if count > 1]
    if twice:
        raise ConsilienceError(f"methods must have different names, got {twice[0]!r} twice; give a mapping.")
    return {method.name: method for method in methods}


def engine_of(engine: str | Engine) -> Engine:
    """Return the engine of a name, or the given one."""
    if isinstance(engine, Engine):
        return engine
    return engines.by_name(engine)


def model_for(schedule: Schedule, method: Method | Sequence[Method], model: object) -> Model:
    """Return the model of a run: as it is given, around a torch module, or one that fits the data."""
    check_arguments(schedule)
    if model is None:
        return default_model(schedule, Method.of(method))  # type: ignore[arg-type]
    if isinstance(model, Model):
        return model
    if is_module(model):
        return models.wrap(model)  # type: ignore[arg-type]
    raise ConsilienceError(
        f"`model` must be one of consilience.models, or a torch module, got {kind_of(model)}."
    )


def default_model(schedule: Schedule, method: Method) -> Model:
    """Make a model that fits the data: what a part asks for, else a conv net or a perceptron."""
    inputs, _ = schedule.sources[0].train.first()
    if isinstance(inputs, Tree):
        raise ConsilienceError(
            f"no default model takes inputs of several parts ({', '.join(inputs.parts)}); give a `model`."
        )
    x = inputs
    shape, outputs = tuple(x.shape[1:]), len(schedule.frame.labels)
    for part in reversed(method.all_corrections):  # a mapper's wish comes first
        model = part.default_model(shape, outputs)
        if model is not None:
            return model
    return models.fitting(shape, outputs)


def result_of(session: Session) -> Result:
    """Return the result of a session that has ended."""
    # The loop's result draws nothing; this one has `table` and `report`.
    return Result(**vars(session.end()))
