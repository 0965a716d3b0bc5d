"""Runs: a schedule walked with a method, for several seeds; several methods side by side; checkpoints; results."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, Interrupted, Refusal, kind_of, unknown
from consilience.core.method import Method
from consilience.core.metrics import METRICS, Metric
from consilience.core.model import Model
from consilience.core.params import content_hash, keep_memory, key, write_json
from consilience.core.schedule import Schedule
from consilience.core.training import Training
from consilience.loop.agent import Job
from consilience.loop.engine import Engine, EngineEvents
from consilience.loop.folder import Log, Progress, interruptible, plain
from consilience.loop.result import Result
from consilience.loop.trial import TrainRequest, Trial


def run(
    schedule: Schedule,
    method: Method | Sequence[Method],
    model: Model | None = None,
    training: Training | None = None,
    *,
    repeats: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    engine: str | Engine = "serial",
    metric: str | Metric | None = None,
    checkpoint_seconds: float = 60.0,
    checkpoint_steps: int | None = None,
    curve_steps: int | None = None,
    judge_clients: bool = False,
    progress: Progress | None = None,
    config: Mapping[str, Any] | None = None,
) -> Result:
    """Run a schedule with a method, `repeats` times with seeds seed, seed + 1, ..; evaluate before training and after every stage.

    Args:
        schedule: who learns which source when, and who hears whom (`consilience.settings`).
        method: one, or several that compose (`consilience.methods`).
        model: any Model; None takes one that fits the data.
        training: how a source is trained on.
        repeats: seeds, for a mean and a standard deviation.
        seed: the first seed; everything random is keyed by it.
        out: a folder for config.yaml, result.json, log.jsonl and checkpoints; None keeps nothing.
        resume: go on from the folder's last checkpoint; the end is bit-identical to a run never interrupted.
        engine: who runs the steps: "serial", "batched" (many clients in one program), "ray" (many processes or machines), "auto"
            (batched where that is faster), or one of `consilience.engines`. What is learned is the same, to rounding.
        metric: "accuracy", "auroc", "r2", or a function of (predictions, targets); None fits the kind of target.
        checkpoint_seconds: the time between checkpoints, also inside a task.
        checkpoint_steps: the steps between checkpoints, in addition.
        curve_steps: the steps between points of the learning curve inside a task: the metric on the test data of the source
            that is being learned (`Result.learning_curve`); None draws none.
        judge_clients: also judge whoever learns by its own parameters before and after each learn (`Result.local`), and how far those
            that are heard together went apart (`Result.client_drift`); it costs two evaluations a learn.
        progress: called with every line of the log.
        config: what config.yaml should hold; None describes the arguments.

    Raises ConsilienceError (Refusal for a method that could not act) before any work is lost.
    """
    if (
        resume
        and isinstance(out, str | Path | None)
        and (out is None or not (Path(out) / "checkpoint" / "index.json").exists())
    ):
        raise ConsilienceError(f"`resume` needs a folder with a checkpoint. Found none in {out}.")
    session = begin(
        schedule,
        method,
        model,
        training,
        engine_of(engine),
        repeats=repeats,
        seed=seed,
        out=out,
        resume=resume,
        metric=metric,
        checkpoint_seconds=checkpoint_seconds,
        checkpoint_steps=checkpoint_steps,
        curve_steps=curve_steps,
        judge_clients=judge_clients,
        progress=progress,
        config=config,
    )
    drive([session], session.engine)
    return session.end()


def sweep(
    schedule: Schedule,
    methods: Mapping[str, Method] | Sequence[Method],
    model: Model | None = None,
    training: Training | None = None,
    *,
    repeats: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    engine: str | Engine = "auto",
    metric: str | Metric | None = None,
    checkpoint_seconds: float = 60.0,
    judge_clients: bool = False,
    progress: Progress | None = None,
) -> dict[str, Result]:
    """Run several methods, or one with several strengths, on one schedule, side by side: what `run` gives for each, by name.

    The "batched" engine stacks what learns alike across methods and seeds: ten strengths cost much less than ten runs. Every
    method is checked before any work is done.

    Args:
        schedule, model, training, repeats, seed, engine, metric, checkpoint_seconds, judge_clients, progress: as in `run`.
        methods: by name, or a sequence, whose members are then called by their names.
        out: a folder with a run's folder for each name; None keeps nothing.
        resume: go on with the runs in `out` from their last checkpoints, and begin those that have none.

    Raises ConsilienceError as `run` does, naming the method; for two methods of one name.

    >>> import consilience as cs
    >>> sources = cs.data.split_classes(cs.data.digits(), 5)
    >>> methods = {f"strength {s:g}": cs.methods.ewc(s) for s in (1, 10)}
    >>> results = cs.sweep(cs.settings.continual(sources, "task"), methods, training=cs.Training(epochs=1), repeats=2)
    >>> list(results), results["strength 1"].matrices.shape
    (['strength 1', 'strength 10'], (2, 6, 5))
    """
    if isinstance(methods, Method) or not methods:
        raise ConsilienceError(
            f"`methods` should be several methods, in a mapping or a sequence. Found {kind_of(methods)}."
        )
    if not isinstance(methods, Mapping):
        twice = [n for n, k in Counter(m.name for m in methods).items() if k > 1]
        if twice:
            raise ConsilienceError(
                f"methods should have different names; give a mapping. Found {twice[0]!r} twice."
            )
        methods = {m.name: m for m in methods}
    runner = engine_of(engine)
    made: dict[str, Model] = {}
    sessions: dict[str, Session] = {}
    for name, method in methods.items():
        at = Path(out) / name if out is not None else None
        again = resume and at is not None and (at / "log.jsonl").exists()
        own = model
        if own is None:
            found = default_model(schedule, Method.of(method))
            own = made.setdefault(repr(found), found)
        try:
            sessions[name] = begin(
                schedule,
                method,
                own,
                training,
                runner,
                repeats=repeats,
                seed=seed,
                out=at,
                resume=again,
                metric=metric,
                checkpoint_seconds=checkpoint_seconds,
                judge_clients=judge_clients,
                progress=progress,
            )
        except ConsilienceError as e:
            e.add_note(f"in {name!r} of a sweep")
            raise
    drive(list(sessions.values()), runner)
    return {name: session.end() for name, session in sessions.items()}


def begin(
    schedule: Schedule,
    method: Method | Sequence[Method],
    model: Model | None,
    training: Training | None,
    engine: Engine,
    *,
    repeats: int,
    seed: int,
    out: str | Path | None,
    resume: bool,
    metric: str | Metric | None,
    checkpoint_seconds: float,
    judge_clients: bool,
    progress: Progress | None,
    checkpoint_steps: int | None = None,
    curve_steps: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Session:
    """Check all arguments of a run, and open its folder."""
    model = checked(schedule, model, training)
    training = training or Training()
    if not isinstance(repeats, int) or repeats < 1:
        raise ConsilienceError(f"`repeats` should be at least 1. Found `repeats = {repeats}`.")
    if not isinstance(seed, int) or not (out is None or isinstance(out, str | Path)):
        raise ConsilienceError(
            f"`seed` should be a whole number and `out` a path. Found {seed!r} and {out!r}."
        )
    if not checkpoint_seconds > 0:
        raise ConsilienceError(
            f"`checkpoint_seconds` should be positive. Found `checkpoint_seconds = {checkpoint_seconds}`."
        )
    if checkpoint_steps is not None and checkpoint_steps < 1:
        raise ConsilienceError(
            f"`checkpoint_steps` should be at least 1. Found `checkpoint_steps = {checkpoint_steps}`."
        )
    if curve_steps is not None and curve_steps < 1:
        raise ConsilienceError(f"`curve_steps` should be at least 1. Found `curve_steps = {curve_steps}`.")
    chosen = Method.of(method)  # type: ignore[arg-type]
    model = model or default_model(schedule, chosen)
    facts = replace(schedule.survey(seed), model=model)
    name = chosen.name
    chosen = chosen.resolve(facts)
    training = replace(training, **chosen.fixed)
    taught = {s.task for s in schedule.sources}
    strange = [s.name for s in schedule.judged if s.task not in taught]
    if chosen.mapper is not None and chosen.mapper.needs_label and strange:
        raise Refusal(
            f"{chosen.name} is told the task of what it is judged on. Found test data of several tasks in {strange[0]!r}."
        )
    if not schedule.boundaries and training.epochs > 1:
        raise ConsilienceError(
            f"a stream without ends is seen once: `epochs` should be 1. Found `epochs = {training.epochs}`."
        )
    if training.device != "cpu" and not torch.cuda.is_available():
        raise ConsilienceError(f"`device` should be there. Found {training.device!r} and no CUDA.")
    aware = schedule.labelled or chosen.mapper is not None
    shapes: set[tuple[int, ...]] = set()
    for s in schedule.sources:
        x = s.train.select(torch.arange(min(2, len(s.train)))).whole()[0]
        if tuple(x.shape[1:]) not in shapes:
            shapes.add(tuple(x.shape[1:]))
            model.check(schedule.frame, x, aware)
    here = model.feature_space if any(s.feature_space for s in schedule.sources) else ""
    for s in schedule.sources:
        if s.feature_space and here and s.feature_space != here:
            raise ConsilienceError(
                f"kept features should be of the model's own backbone {here[:8]}. Found those of {s.feature_space[:8]} in {s.name!r}; the two "
                f"differ in weights, image size, mean, std or structure. The model is {model!r:.200}."
            )
    if isinstance(metric, str) and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    fits = ("r2",) if schedule.frame.kind == "value" else ("accuracy", "auroc")
    if isinstance(metric, str) and metric not in fits:
        raise ConsilienceError(
            f"`metric` should fit targets of kind {schedule.frame.kind!r}: {' or '.join(fits)}. Found {metric!r}."
        )
    label = (
        metric
        if isinstance(metric, str)
        else getattr(metric, "__name__", "accuracy" if schedule.frame.kind == "class" else "r2")
    )
    measure: Metric = METRICS[label] if not callable(metric) else metric
    log = Log(Path(out) if out is not None else None, progress)
    described = config or describe(schedule, name, model, training, seed, repeats)
    session = Session(log, engine, label, name, described, checkpoint_seconds, checkpoint_steps, curve_steps)
    for r in range(repeats):
        session.trials.append(
            Trial(
                schedule,
                chosen,
                model,
                training,
                measure,
                facts,
                seed + r,
                r,
                log.write,
                session.tick,
                session.save,
                judge_clients,
            )
        )
    if out is not None:
        session.fingerprint = fingerprint(schedule, chosen, model, training, seed, repeats, label)
        if resume:
            session.load()
        log.open(described, resume)
        if resume:
            session.restored()
        log.write({"event": "begin", "versions": versions(engine)})
    return session


@dataclass(eq=False)
class Session:
    """A run that is under way: its walks, one a seed, its folder, and when it saves."""

    log: Log
    engine: Engine
    metric: str
    method: str
    config: Mapping[str, Any]
    seconds: float
    every: int | None
    inside: int | None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    stop: list[int] = field(default_factory=list)
    ran: int = 0
    """Steps that this process ran."""
    _saved: float = field(default_factory=time.monotonic)

    def tick(self, trial: Trial, job: Job | None) -> None:
        """After every step (or without a job after phases and groups of agents): save when it is time, and stop when asked to."""
        self.ran += job is not None
        if job is not None and self.inside is not None and trial.ledger.steps % self.inside == 0:
            trial.look(job)
        steps = self.every is not None and job is not None and trial.ledger.steps % self.every == 0
        if self.stop or steps or (self.log.out is not None and time.monotonic() - self._saved > self.seconds):
            self.save(trial)
            if self.stop:
                where = (
                    f"go on with `resume=True` (--resume --out {self.log.out})"
                    if self.log.out
                    else "nothing was kept: no `out` was given"
                )
                raise Interrupted(f"interrupted; {where}.")

    def save(self, trial: Trial) -> None:
        """Keep all walks in a checkpoint; the log says where this one is."""
        self._saved = time.monotonic()
        if self.log.out is None:
            return
        tensors: dict[str, Tensor] = {}
        trials: dict[str, Any] = {}
        for w in self.trials:
            if w.begun:
                held, trials[str(w.repeat)] = w.kept()
                tensors |= {f"{w.repeat}|{k}": t for k, t in held.items()}
        self.log.checkpoint(tensors, {"fingerprint": dict(self.fingerprint), "trials": trials})
        line = {
            "event": "checkpoint",
            "repeat": trial.repeat,
            "phase": trial.phase,
            "steps": trial.ledger.steps,
            "ran": self.ran,
        }
        job = trial.job
        if job is not None:
            line |= {
                "source": job.name,
                "agent": job.agent,
                "epoch": job.epoch,
                "step": job.index,
                "of": job.step.horizon[1],
            }
        self.log.write(line)

    def load(self) -> None:
        """Read the folder's last checkpoint, if there is one."""
        found = self.log.last()
        if found is None:
            return
        tensors, facts = found
        theirs, ours = facts["fingerprint"], json.loads(json.dumps(self.fingerprint))
        for k in ours:
            before, now, what = theirs.get(k), ours[k], k
            if isinstance(now, dict) and isinstance(before, dict) and before != now:
                field_name = next(f for f in now if before.get(f) != now[f])
                what, before, now = f"{k}.{field_name}", before.get(field_name), now[field_name]
            if before != now:
                raise ConsilienceError(
                    f"a run resumes with the configuration it began with. Found another `{what}`: {before} before, {now} now."
                )
        for w in self.trials:
            if str(w.repeat) in facts["trials"]:
                start = f"{w.repeat}|"
                own = {k[len(start) :]: t for k, t in tensors.items() if k.startswith(start)}
                w.resume(own, facts["trials"][str(w.repeat)])

    def restored(self) -> None:
        """Say in the log where a resumed run goes on."""
        begun = [w for w in self.trials if w.begun]
        self.log.rewind({w.repeat: len(w.rows) for w in begun})
        now = next((w for w in begun if w.result is None), (begun or self.trials)[-1])
        self.log.write(
            {"event": "resume", "repeat": now.repeat, "stage": len(now.rows), "steps": now.ledger.steps}
        )

    def end(self) -> Result:
        """What all walks found; result.json."""
        w, done = self.trials[0], [trial.result for trial in self.trials if trial.result is not None]
        mean = {
            k: sum(d["costs"][k] for d in done) / len(done) for k in ("macs", "bytes", "steps", "seconds")
        }
        costs = {
            **{k: int(v) for k, v in mean.items() if k != "seconds"},
            "seconds": round(mean["seconds"], 3),
        }
        result = Result(
            setting=w.schedule.setting,
            data="+".join(dict.fromkeys(s.name.split("/")[0] for s in w.schedule.sources)),
            method=self.method,
            model=type(w.model).__name__ if not hasattr(w.model, "name") else str(w.model.name),
            metric=self.metric,
            seed=w.seed,
            sources=tuple(s.name for s in w.schedule.judged),
            stages=tuple(done[0]["stages"]),
            learned_at=tuple((v or (0,))[0] if len(v) < 2 else None for v in w.facts.learned_at.values()),
            matrices=np.array([d["rows"] for d in done], dtype=float),
            costs={**costs, "by_agent": done[0]["costs"]["by_agent"]},
            mapper=None if done[0]["mapper"] is None else np.array([d["mapper"] for d in done], dtype=float),
            curve=done[0]["curve"],
            learning_curve=done[0]["learning"],
            client_drift=done[0].get("client_drift", ()),
            local=done[0].get("local", ()),
            personal=_personal(done),
            config=self.config,
            versions=versions(self.engine),
            agent=w.agent,
        )
        if self.log.out is not None:
            write_json(self.log.out / "result.json", plain(result.to_json()))
            self.log.write({"event": "end", "score": result.score, "ran": self.ran})
        return result


def drive(sessions: Sequence[Session], engine: Engine) -> None:
    """Walk what has not ended: side by side where the engine can stack what is asked of it, else one after another."""
    keep_memory()
    trials = [w for session in sessions for w in session.trials if w.result is None]
    try:
        with interruptible() as stop:
            for session in sessions:
                session.stop = stop
            groups = [trials] if engine.stacks else [[w] for w in trials]
            for group in groups:
                running = [w.steps() for w in group]
                while running:
                    asked = [(steps, next(steps, None)) for steps in running]
                    running = [steps for steps, ask in asked if ask is not None]
                    asks = [ask for _, ask in asked if ask is not None]
                    for ask in asks:
                        if ask.paused is not None or len(asks) == 1:
                            engine.train(ask.visits, ask.events, ask.paused)
                    together = [ask for ask in asks if ask.paused is None]
                    if len(asks) > 1 and together:
                        engine.train([w for ask in together for w in ask.visits], joined(together))
                for w in group if group is not groups[-1] else ():
                    w.forget()
    finally:
        engine.close()


def joined(asks: Sequence[TrainRequest]) -> EngineEvents:
    """One watch for the work of several walks."""
    own = {id(agent): ask.events for ask in asks for agent, _, _ in ask.visits}

    def tick(_: Job | None) -> None:
        for ask in asks:
            ask.events.tick(None)

    def note(text: str) -> None:
        for ask in asks:
            ask.events.note(text)

    return EngineEvents(
        tick,
        lambda agent: own[id(agent)].done(agent),
        lambda agent, why: own[id(agent)].fail(agent, why),
        note,
    )


def _personal(done: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The mean over repeats of each client's last score."""
    told = [(name, v) for d in done for name, v in d.get("personal", {}).items() if v is not None]
    names = sorted({name for name, _ in told})
    return {name: float(np.mean([v for n, v in told if n == name])) for name in names} or None


def engine_of(engine: str | Engine) -> Engine:
    """An engine by its name, or as it is given."""
    from consilience import engines

    if isinstance(engine, Engine):
        return engine
    if engine not in engines.NAMES:
        raise unknown("engine", engine, engines.NAMES)
    return getattr(engines, engine)()  # type: ignore[no-any-return]


def checked(schedule: Any, model: Any, training: Any) -> Model | None:
    """Arguments of the right kinds; a torch module, or a function that makes one, is wrapped."""
    if not isinstance(schedule, Schedule):
        raise ConsilienceError(
            f"`schedule` should be made by consilience.settings. Found {kind_of(schedule)}."
        )
    if training is not None and not isinstance(training, Training):
        raise ConsilienceError(f"`training` should be a consilience.Training. Found {kind_of(training)}.")
    if model is None or isinstance(model, Model):
        return model
    if isinstance(model, torch.nn.Module) or callable(model):
        from consilience import models

        return models.wrap(model)
    raise ConsilienceError(
        f"`model` should be one of consilience.models, or a torch module. Found {kind_of(model)}."
    )


def default_model(schedule: Schedule, method: Method) -> Model:
    """A model that fits the data: a perceptron for vectors, a small conv net for images (columns of such for progressive networks),
    heads on frozen random features for anchors."""
    from consilience import models
    from consilience.corrections.isolation import Columns
    from consilience.mappers.mixture import Anchored

    x, _ = schedule.sources[0].train.select(torch.arange(1)).whole()
    outputs, shape = len(schedule.frame.labels), tuple(x.shape[1:])
    if isinstance(method.mapper, Anchored) and method.mapper.on == "features":
        size = int(np.prod(shape))
        return models.multi_head(models.random_features(size, max(512, 2 * size)), outputs)
    columns = any(isinstance(c, Columns) for c in method.corrections)
    if len(shape) == 3 and shape[1] == shape[2] and shape[1] >= 8:
        return (models.progressive_conv if columns else models.conv)(
            outputs, channels=shape[0], size=shape[1]
        )
    return (models.progressive if columns else models.mlp)(int(np.prod(shape)), (128,), outputs)


def versions(engine: Engine | None = None) -> dict[str, Any]:
    """What bit-identity rests on: versions, threads, engine, machine."""
    from consilience import __version__

    return {
        "consilience": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "engine": type(engine).__name__.lower() if engine is not None else "",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpus": os.cpu_count() or 0,
    }


def describe(
    schedule: Schedule, method: str, model: Model, training: Training, seed: int, repeats: int
) -> dict[str, Any]:
    """The arguments of a run, as config.yaml holds them."""
    plain = {
        k: v if isinstance(v, (int, float, str, bool, type(None))) else repr(v)
        for k, v in asdict(training).items()
    }
    return {
        "setting": schedule.setting,
        "scenario": schedule.scenario,
        "sources": [s.name for s in schedule.sources],
        "method": method,
        "model": repr(model),
        "training": plain,
        "seed": seed,
        "repeats": repeats,
    }


def fingerprint(
    schedule: Schedule, method: Method, model: Model, training: Training, seed: int, repeats: int, metric: str
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    data: dict[str, Tensor] = {}
    for s in schedule.sources:
        some = torch.arange(0, len(s.train), max(1, len(s.train) // 64))
        x, _ = s.train.select(some).whole()
        data |= {f"{s.name}/x": x, f"{s.name}/y": s.train.targets()}
    params, buffers = model.init(key(seed, "init"))
    shape = (
        {} if type(model).__repr__ is object.__repr__ else {repr(model): torch.zeros(0)}
    )  # of what the model will grow
    plan = [repr(p) for p in schedule.plan(seed)][:1000]
    parts = {f: repr(getattr(method, f)) for f in method.__dataclass_fields__ if is_dataclass(method)}
    return {
        "setting": schedule.setting,
        "scenario": schedule.scenario,
        "data": content_hash(data),
        "schedule": content_hash({"\n".join(plan): torch.zeros(0)}),
        "method": parts,
        "model": content_hash({**params, **buffers, **shape}),
        "training": {k: repr(v) for k, v in vars(training).items()},
        "seed": seed,
        "repeats": repeats,
        "metric": metric,
        "threads": torch.get_num_threads(),
    }
