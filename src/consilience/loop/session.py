"""A session: the trials of one run, its folder, its checkpoints, and its result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from consilience.core.errors import ConsilienceError, Interrupted
from consilience.core.sharing import Patterns, patterns, warn_of_unused
from consilience.core.source import Source
from consilience.core.state import Frozen, State
from consilience.loop.agents import Setup
from consilience.loop.checks import RunOptions, versions
from consilience.loop.describe import describe
from consilience.loop.divergence import check_visit
from consilience.loop.engine import Engine
from consilience.loop.fingerprint import fingerprint
from consilience.loop.folder import Checkpoint, Log
from consilience.loop.job import Job
from consilience.loop.result import Result
from consilience.loop.trial import Trial, agent_states
from consilience.trackers import Run, Tracking


@dataclass(eq=False)
class Session:
    """One run: a trial per seed. It decides when to save, and when to stop."""

    setup: Setup
    method: str
    """The method's name, before it was resolved."""
    engine: Engine
    options: RunOptions
    stop: list[int] = field(default_factory=list)
    """The signals that were received: if any, the run stops after this step."""
    ran: int = 0
    """Steps that this process ran."""
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        options = self.options
        self.config: Mapping[str, Any] = options.config or describe(self.setup, self.method, options)
        out, schedule = None if options.out is None else Path(options.out), self.setup.schedule
        self.tracking = Tracking(
            trackers=options.trackers,
            run=Run(options.name or self.method, self.config, out),
            sources=[source.name for source in schedule.judged],
            evaluated=schedule.evaluated,
            seeds=range(options.seed, options.seed + options.repeats),
            shared=options.name or "",
        )
        self.log = Log(out, self._show)
        self.fingerprint: dict[str, Any] = {}
        self.trials = [
            Trial(self.setup, options.seed + repeat, repeat, self.log.write, self.tick, self.save)
            for repeat in range(options.repeats)
        ]

    def _show(self, line: Mapping[str, Any]) -> None:
        """Show a line of the log to whoever asked for it."""
        self.tracking(line)
        if self.options.progress is not None:
            self.options.progress(line)

    def open(self) -> None:
        """Open the trackers and the folder, if there is one: start it, or continue from its checkpoint."""
        if self.log.out is None:
            self.tracking.open()
            return
        resume = self.options.resume
        self.log.lock(resume)
        try:
            # Loaded before anything is written: a refused resume leaves the folder as it was.
            self.fingerprint = fingerprint(self.setup, self.options)
            found = self.log.last(complete=True) if resume else None
            self._open_trackers(found)
            if found is None:
                self.log.start(self.config)
            else:
                self._load(found)
                self.log.rewind(found)
                self._log_place()
            line = {"event": "begin", "versions": versions(self.engine)}
            self.log.write(line | ({"trackers": self.tracking.names} if self.tracking.names else {}))
        except BaseException:
            self.close()
            raise

    def _open_trackers(self, found: Checkpoint | None) -> None:
        """Open the trackers. They have got what the log says after the checkpoint, which is done again."""
        if not self.tracking.trackers:
            return
        begun = [line.get("trackers", ()) for _, line in self.log.lines() if line["event"] == "begin"]
        start = 0 if found is None else found.written
        self.tracking.open(begun[-1] if begun else (), [line for _, line in self.log.lines(start)])

    def close(self) -> None:
        """Close the trackers, and let other processes use the folder."""
        self.tracking.close()
        self.log.release()

    def tick(self, trial: Trial, job: Job | None) -> None:
        """Save if due, and stop if asked: after every step, and (without a job) after phases."""
        options, steps = self.options, trial.ledger.steps
        self.ran += job is not None
        if job is not None and options.curve_steps is not None and steps % options.curve_steps == 0:
            trial.judge.add_curve_point(job)

        # Steps and seconds are counted over all trials, which may run side by side.
        every = options.checkpoint_steps
        due = every is not None and job is not None and steps % every == 0
        late = self.log.out is not None and time.monotonic() - self._saved > options.checkpoint_seconds
        if not (self.stop or due or late):
            return

        # The last good state is not overwritten by one that nobody can use.
        if job is not None:
            check_visit(job)
        self.save(trial)
        if self.stop:
            resume = f"continue with `resume=True` (--resume --out {self.log.out})"
            raise Interrupted(
                f"interrupted; {resume if self.log.out else 'nothing was saved, without `out`'}."
            )

    def save(self, trial: Trial) -> None:
        """Save all trials in a checkpoint. The log says where this one is."""
        self._saved = time.monotonic()
        if self.log.out is None:
            return

        # One checkpoint for all seeds. It replaces the last one only when it is complete.
        tensors: dict[str, Tensor] = {}
        trials: dict[str, Any] = {}
        for other in self.trials:
            if other.begun:
                held, trials[str(other.repeat)] = other.kept()
                tensors |= {f"{other.repeat}|{name}": tensor for name, tensor in held.items()}
        self.log.checkpoint(tensors, {"fingerprint": self.fingerprint, "trials": trials})

        line: dict[str, Any] = {"event": "checkpoint", "repeat": trial.repeat, "phase": trial.phase}
        line |= {"steps": trial.ledger.steps, "ran": self.ran}
        if trial.job is not None:
            epoch, step, _, per_epoch = trial.job.moment
            line |= {"source": trial.job.name, "agent": trial.job.agent}
            line |= {"epoch": epoch, "step": step, "of": per_epoch}
        self.log.write(line)

    def _load(self, found: Checkpoint) -> None:
        """Give the trials what the folder's checkpoint holds of them."""
        # JSON makes lists of tuples, on both sides.
        self._check_fingerprint(found.facts["fingerprint"], json.loads(json.dumps(self.fingerprint)))
        for trial in self.trials:
            if str(trial.repeat) in found.facts["trials"]:
                own = of_repeat(found.tensors, trial.repeat)
                trial.resume(own, found.facts["trials"][str(trial.repeat)])

    def _check_fingerprint(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        """Refuse to resume a run of other arguments, and name the first that differs."""
        for name, now in ours.items():
            before = theirs.get(name)
            if isinstance(now, dict) and isinstance(before, dict) and before != now:
                differs = next(entry for entry in now if before.get(entry) != now[entry])
                name, before, now = f"{name}.{differs}", before.get(differs), now[differs]
            if before != now:
                raise ConsilienceError(
                    f"a run resumes with the configuration it began with, and `{name}` was {before} "
                    f"and is {now} now; use the first, or another folder."
                )

    def _log_place(self) -> None:
        """Log where the run continues."""
        begun = [trial for trial in self.trials if trial.begun]
        # The first that has not ended says where the run continues.
        now = next((trial for trial in begun if trial.result is None), (begun or self.trials)[-1])
        place = {"repeat": now.repeat, "stage": len(now.judge.rows), "steps": now.ledger.steps}
        self.log.write({"event": "resume", **place})

    def end(self) -> Result:
        """Return the result of all trials; written as result.json."""
        first, setup = self.trials[0], self.setup
        done = [trial.result for trial in self.trials if trial.result is not None]
        model, learned_at = setup.model, setup.facts.learned_at.values()

        # Lists of records are those of the first repeat: others may have other stages.
        mapper = None
        if done[0]["mapper"] is not None:
            mapper = padded([found["mapper"] for found in done])

        # Repeats may stop at stages of their own, all of one schedule.
        stages: list[str] = max((found["stages"] for found in done), key=len)
        stopped = tuple(found["stopped"] for found in done if found["stopped"])

        # The first metric of each source is the one of its column in the matrices.
        chosen = [setup.metrics[source.name] for source in setup.schedule.judged]
        firsts = tuple(metrics[0].name for metrics in chosen)
        further = {name: padded([found["further"][name] for found in done]) for name in done[0]["further"]}

        result = Result(
            setting=setup.schedule.setting,
            data="+".join(dict.fromkeys(source.name.split("/")[0] for source in setup.schedule.sources)),
            method=self.options.name or self.method,
            model=str(getattr(model, "name", type(model).__name__)),
            metric=" + ".join(dict.fromkeys(firsts)),
            seed=first.seed,
            sources=tuple(source.name for source in setup.schedule.judged),
            stages=tuple(stages),
            learned_at=tuple((at or (0,))[0] if len(at) < 2 else None for at in learned_at),
            matrices=padded([found["rows"] for found in done]),
            stopped=stopped,
            costs=mean_costs(done),
            metrics=further,
            higher={metric.name: metric.higher for metrics in chosen for metric in metrics},
            measured_by=firsts if len({*firsts}) > 1 else (),
            mapper=mapper,
            curve=done[0]["curve"],
            learning_curve=done[0]["learning"],
            client_drift=done[0]["client_drift"],
            local=done[0]["local"],
            visits=done[0]["visits"],
            personal=mean_personal(done),
            config=self.config,
            versions=versions(self.engine),
            foreseen=foreseen(setup),
            labels=setup.schedule.frame.labels,
            sizes=tuple((len(source.train), len(source.test)) for source in setup.schedule.judged),
            confusion=confusion_of(done, stopped),
            sharing=sharing_of(first),
            agent=first.agent,
            agents=first.own_models(),
        )
        if self.log.out is not None:
            line = {"event": "end", "score": result.figure("score"), "ran": self.ran}
            self.log.end(result.to_json(), line)
        return result


def foreseen(setup: Setup) -> tuple[bool, ...]:
    """Return for each judged source whether all its outputs were trained before the stage that learns it."""
    schedule, stages = setup.schedule, setup.facts.learned_at
    # What a base was trained on is unknown.
    if schedule.base is not None:
        return ()
    heads = schedule.labelled and setup.model.uses_task

    def outputs(source: Source) -> set[object]:
        # A head of each task has columns of its own.
        return {(column, source.task if heads else None) for column in source.classes}

    # When each output is first trained, so that many sources are not compared in pairs.
    first: dict[object, int] = {}
    for source in schedule.judged:
        if stages[source.name]:
            at = min(stages[source.name])
            first |= {output: min(at, first.get(output, at)) for output in outputs(source)}

    found = []
    for source in schedule.judged:
        at = min(stages[source.name], default=0)
        found.append(all(output in first and first[output] < at for output in outputs(source)))
    return tuple(found)


def sharing_of(trial: Trial) -> Patterns:
    """Return how the tasks of the evaluated agent mix what they share; warn of experts that none uses."""
    agent = trial.agent
    found = patterns(agent.model, agent.state.params, agent.state.buffers, agent.schedule.sources)
    warn_of_unused(found)
    return found


def padded(rows: Sequence[Sequence[Any]]) -> np.ndarray:
    """Return lists as one array; those of repeats that stopped early are filled up with NaN.

    >>> padded([[[1.0], [2.0]], [[3.0]]]).tolist()
    [[[1.0], [2.0]], [[3.0], [nan]]]
    """
    found = [np.array(each, dtype=float) for each in rows]
    longest = max(map(len, found))
    fill = [(longest - len(each), *each.shape[1:]) for each in found]
    return np.stack(
        [np.concatenate([each, np.full(more, np.nan)]) for each, more in zip(found, fill, strict=True)]
    )


def confusion_of(
    done: Sequence[Mapping[str, Any]], stopped: Sequence[Mapping[str, Any]]
) -> np.ndarray | None:
    """Return the counts by class and answer at the last stage, summed over trials."""
    # A trial that returns an earlier stage has counts of another one.
    if any(found["confusion"] is None for found in done) or any(
        stop["returned"] != stop["stage"] for stop in stopped
    ):
        return None
    return np.asarray(np.sum([found["confusion"] for found in done], axis=0), dtype=np.int64)


def mean_costs(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of costs over trials, and the costs by agent of the first."""
    costs = [found["costs"] for found in done]
    mean = {name: sum(c[name] for c in costs) / len(costs) for name in ("macs", "bytes", "steps", "seconds")}

    # Seconds may be fractions; the others are counts.
    whole = {name: int(value) for name, value in mean.items() if name != "seconds"}
    return {**whole, "seconds": round(mean["seconds"], 3), "by_agent": costs[0]["by_agent"]}


def mean_personal(done: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Return the mean over trials of each client's last score; None without any."""
    scores: dict[str, list[float]] = {}
    for found in done:
        for name, score in found["personal"].items():
            if score is not None:
                scores.setdefault(name, []).append(score)
    return {name: float(np.mean(scores[name])) for name in sorted(scores)} or None


def of_repeat(tensors: Mapping[str, Tensor], repeat: int) -> dict[str, Tensor]:
    """Return the tensors of one trial of a checkpoint."""
    prefix = f"{repeat}|"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def saved_agents(out: str | Path, read: Callable[[str], Tensor] | None = None) -> dict[str, State]:
    """Return the states of agents (first seed) in a run's folder; none without a checkpoint.

    A folder has no frozen entries: `read` returns those of the base by name (KeyError: it has none). Raises
    ConsilienceError where they are not those of the run.
    """
    found = Log(Path(out)).last()
    if found is None or "0" not in found.facts["trials"]:
        return {}
    facts = found.facts["trials"]["0"]

    frozen: dict[str, Tensor] = {}
    for name in facts["frozen"]:
        try:
            if read is None:
                raise KeyError(name)
            frozen[name] = read(name)
        except KeyError as error:
            raise ConsilienceError(
                f"{out} has only what was trained, and its frozen entries must come from the base, got no "
                f"{name!r} there; save `Result.params` of the run as a file, and give that."
            ) from error
    return agent_states(of_repeat(found.tensors, 0), facts, frozen=Frozen(frozen))
