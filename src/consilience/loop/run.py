"""Runs: check the arguments, open the folder, and let an engine drive the trials."""

from __future__ import annotations

from collections.abc import Sequence

from consilience.core.method import Method
from consilience.core.model import Model
from consilience.core.params import keep_memory
from consilience.core.schedule import Schedule
from consilience.core.signals import interruptible
from consilience.core.training import Training
from consilience.loop.agent import Agent
from consilience.loop.checks import RunOptions, check_all, check_arguments
from consilience.loop.engine import Engine, EngineEvents
from consilience.loop.job import Job
from consilience.loop.session import Session
from consilience.loop.trial import TrainRequest, Trial


def begin(
    schedule: Schedule,
    method: Method | Sequence[Method],
    model: Model,
    training: Training | None,
    engine: Engine,
    options: RunOptions,
) -> Session:
    """Check all arguments of a run, and open its folder: a session for `drive`, until `Session.close`.

    Raises ConsilienceError, or Refusal for a method that could not act in this schedule.
    """
    check_arguments(schedule, training)
    composed = Method.of(method)  # type: ignore[arg-type]
    setup = check_all(schedule, composed, model, training or Training(), options)
    session = Session(setup, composed.name, engine, options)
    session.open()
    return session


def drive(sessions: Sequence[Session], engine: Engine) -> None:
    """Run all trials that have not ended, side by side if the engine stacks visits."""
    # Memory that a step frees is used by the next, instead of given back to the system.
    keep_memory()
    trials = [trial for session in sessions for trial in session.trials if trial.result is None]
    groups = [trials] if engine.stacks else [[trial] for trial in trials]
    try:
        with interruptible() as stop:
            for session in sessions:
                session.stop = stop
            for group in groups:
                _drive_together(group, engine)
                if group is not groups[-1]:  # the last agents may be asked for
                    for trial in group:
                        trial.free_agents()
    finally:
        engine.close()


def _drive_together(trials: Sequence[Trial], engine: Engine) -> None:
    """Advance trials to their next visits, let the engine run these, and so on until all have ended."""
    running = [trial.steps() for trial in trials]
    while running:
        asked = [(steps, next(steps, None)) for steps in running]
        running = [steps for steps, request in asked if request is not None]
        requests = [request for _, request in asked if request is not None]

        # A saved job continues alone; it was saved by one trial.
        for request in requests:
            if request.paused is not None or len(requests) == 1:
                engine.train(request.visits, request.events, request.paused)
        together = [request for request in requests if request.paused is None]
        if len(requests) > 1 and together:
            engine.train([visit for request in together for visit in request.visits], joined(together))


def joined(requests: Sequence[TrainRequest]) -> EngineEvents:
    """Return the events of several trials whose visits are run together."""
    # Agents of different trials may have the same name, so identity distinguishes them.
    own = {id(visit.agent): request.events for request in requests for visit in request.visits}

    def tick(_: Job | None) -> None:
        for request in requests:
            request.events.tick(None)

    def done(agent: Agent) -> None:
        own[id(agent)].done(agent)

    def fail(agent: Agent, why: Exception) -> None:
        own[id(agent)].fail(agent, why)

    def note(text: str) -> None:
        for request in requests:
            request.events.note(text)

    return EngineEvents(tick, done, fail, note)
