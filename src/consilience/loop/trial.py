"""The main loop, in every setting: the phases of a schedule in order, for one seed.

Train: agents visit their sources; loop/agent.py prepares and finishes a visit, an engine runs its steps.
Exchange: messages of senders reach receivers. Evaluate: loop/judge.py scores the evaluated agent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from consilience.core.errors import ConsilienceError, reading
from consilience.core.message import Message
from consilience.core.names import WHOLE, pair, unpair
from consilience.core.schedule import Evaluate, Exchange, Phase, Train
from consilience.core.state import Frozen, State, decode_state, encode_state
from consilience.core.stopping import Trend
from consilience.core.training import Place
from consilience.core.warning import warn
from consilience.loop.agent import Agent
from consilience.loop.agents import Agents, Setup, Wire, release_plan
from consilience.loop.engine import EngineEvents, Paused, Visit
from consilience.loop.folder import REMEDY
from consilience.loop.job import Job
from consilience.loop.judge import Judge
from consilience.loop.ledger import Ledger


@dataclass
class TrainRequest:
    """Visits that an engine must run before the trial goes on."""

    visits: list[Visit]
    events: EngineEvents
    paused: Paused | None = None
    """The saved job of the first visit, if it was interrupted."""


JOB = "<job>"
"""The owner of the present job's tensors in a checkpoint, next to the names of agents."""
BEST = "<best>"
"""The owner of the best state of the evaluated agent."""


KEPT = "a checkpoint must hold what this run kept"
"""What is wrong with one that `reading` refuses."""


@dataclass(eq=False)
class Trial:
    """One seed's pass through a schedule. It can be saved after every step, and resumed."""

    setup: Setup
    seed: int
    repeat: int
    write: Callable[[Mapping[str, Any]], None]
    """Writes a line of the log."""
    tick: Callable[[Trial, Job | None], None]
    """Called after every step (with its job), phase and group of agents; it may raise Interrupted."""
    save: Callable[[Trial], None]
    phase: int = 0
    """Phases that are done."""
    finished: int = 0
    """Agents of the present Train phase that are done."""
    trained: int = 0
    """Steps of all visits that were finished."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why agents failed: they send nothing until they train or receive again."""
    job: Job | None = None
    """The job that is under way."""
    trend: Trend = field(default_factory=Trend)
    """The validation scores so far, at stages."""
    best: State | None = None
    """The state of the evaluated agent at the best stage."""
    begun: bool = False
    result: dict[str, Any] | None = None
    """What it found, once it has ended."""
    _resumed: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger()
        self.agents = Agents(self.setup, self.seed, self.ledger)
        self.wire = Wire(self.ledger)
        self.judge = Judge(self.setup, self.agents, self.ledger, self.repeat, self.write)

    @property
    def agent(self) -> Agent:
        """The agent that is evaluated."""
        return self.agents[self.setup.schedule.evaluated]

    def steps(self) -> Iterator[TrainRequest]:
        """Run the main loop: yield what is to be trained, and go on when an engine has done it."""
        schedule = self.setup.schedule
        self.ledger.start_clock()
        with reading(KEPT, REMEDY):
            paused = self._restore()
        self.begun = True

        # Row 0 of every matrix is before any training.
        if not self.judge.rows:
            self._note_joined()
            self.judge.evaluate("start")
            self.save(self)

        # Clients that are judged by their own parameters must keep them.
        phases = list(schedule.plan(self.seed))
        places = places_of(phases)
        released = {} if self.setup.judge_clients else release_plan(phases, schedule.evaluated)
        for i, phase in enumerate(phases):
            if i < self.phase:  # done before the interruption
                continue
            if self.stopped:
                break
            if isinstance(phase, Train):
                yield from self.train(phase, places[i], paused)
                paused = None
            elif isinstance(phase, Exchange):
                self.exchange(phase)
                self.release(released.get(i, ()))
            else:
                self.judge.judge_clients(phase)
                self.judge.evaluate(phase.name)
                self._check()

            # Counted before the tick, which may save: a resumed trial must not repeat the phase.
            self.phase, self.finished = i + 1, 0
            self._tick(None)

        # Saved once more, so that a run of several seeds resumes after this one.
        stopped = self._end()
        self.result = self.judge.result() | {"costs": self.ledger.costs(), "stopped": stopped}
        self.save(self)

    def _note_joined(self) -> None:
        """Say in the log which sources have a last batch that `Job.plan` joins to the one before it."""
        setup = self.setup
        if not setup.facts.trains or not setup.model.has_batch_norm:
            return
        # A sampler may also leave that batch out.
        if getattr(setup.training.sampler, "drop_last", False):
            return
        sizes = [(s, setup.training.samples_of(s.name)) for s in setup.schedule.sources]
        joined = [s.name for s, size in sizes if len(s.train) > size and len(s.train) % size == 1]
        if joined:
            note = (
                "the last batch of an epoch has one sample, and is joined to the one before it (batch norm)"
            )
            self.write({"event": "batches", "note": note, "sources": joined})

    # Early stopping

    @property
    def stopped(self) -> bool:
        """Whether the run has ended before its schedule."""
        rule = self.setup.stopping
        return rule is not None and self.trend.since >= rule.patience

    def _check(self) -> None:
        """Score the evaluated agent on validation data, and keep its state if it is the best so far."""
        rule = self.setup.stopping
        if rule is None:
            return
        stage, score = len(self.judge.rows) - 1, self.judge.validation()

        # All sources have one metric here, of which less may be better.
        metrics = next(iter(self.setup.metrics.values()))
        score = score if metrics[0].higher else -score
        self.trend = self.trend.after(score, stage, rule.least)

        # States are immutable, so that keeping one needs no copy.
        if rule.best and self.trend.at == stage:
            self.best = self.agent.state
        line = {"event": "validation", "repeat": self.repeat, "stage": stage, "score": score}
        self.write({**line, "best": self.trend.at, "since": self.trend.since})

    def _end(self) -> dict[str, Any] | None:
        """Give the evaluated agent its best state; return when and why training ended, or None."""
        rule = self.setup.stopping
        if rule is None:
            return None
        last, why = len(self.judge.rows) - 1, "the schedule ended"
        if self.stopped:
            why = f"no better validation score in {rule.patience} stages"
        if self.best is not None:
            self.agent.state = self.best
        returned = last if self.best is None else self.trend.at
        return {"stage": last, "why": why, "returned": returned, "score": self.trend.best}

    def _tick(self, job: Job | None) -> None:
        self.job = job
        self.tick(self, job)

    # Train

    def train(
        self, phase: Train, places: Mapping[str, Place], paused: Paused | None
    ) -> Iterator[TrainRequest]:
        """Let agents train on their sources, but for those that were done before an interruption."""
        done = self.finished
        todo = list(phase.who.items())[done:]

        # States are immutable, so that keeping one needs no copy.
        before = {name: self.agents[name].state for name, _ in todo} if phase.least is not None else {}

        # An agent that trains again may recover from its failure.
        if not done:
            self.failed = {name: why for name, why in self.failed.items() if name not in phase.who}

        self.judge.before_visits(phase)
        fractions = phase.fractions
        visits = [
            Visit(self.agents[name], names, fractions.get(name, 1.0), places[name]) for name, names in todo
        ]
        yield TrainRequest(visits, self._events(phase), paused)

        failed = {name: self.failed[name] for name in phase.who if name in self.failed}
        if phase.least is not None and len(phase.who) - len(failed) < phase.least:
            # The phase is undone, so that a resumed run trains these agents again.
            for name, state in before.items():
                self.agents[name].state = state
            self.failed = {name: why for name, why in self.failed.items() if name not in before}
            self.finished, self.job, self.judge.before = done, None, {}
            self.save(self)
            reasons = "; ".join(f"{name!r}: {why}" for name, why in failed.items())
            raise ConsilienceError(
                f"at least {phase.least} agents must finish a round, and {len(phase.who) - len(failed)} did: "
                f"{reasons}."
            )
        self.judge.after_visits(phase, self.failed)

    def _events(self, phase: Train) -> EngineEvents:
        """Return what an engine calls while it trains the agents of a phase."""

        def done(agent: Agent) -> None:
            self.finished, self.job = self.finished + 1, None
            # Of one that failed, the log says why.
            found, self.ledger.visit = self.ledger.visit, None
            if found is not None:
                self.trained += found["steps"]
                if "figures" in found:
                    self.judge.add_visit(agent.name, found)
                line = {"event": "visit", "repeat": self.repeat, "agent": agent.name, "trained": self.trained}
                self.write({**line, **found})

        def fail(agent: Agent, why: Exception) -> None:
            # Without a minimum, a failure stops the run; it resumes when the cause is mended.
            if phase.least is None:
                why.add_note(f"while {agent.name!r} trained on {', '.join(phase.who[agent.name])}")
                raise why
            self.failed[agent.name] = f"{type(why).__name__}: {why}"
            self.write({"event": "failed", "agent": agent.name, "why": self.failed[agent.name]})
            warn(f"{agent.name!r} failed and is left out: {why}")

        def note(text: str) -> None:
            self.write({"event": "engine", "note": text})

        return EngineEvents(self._tick, done, fail, note)

    # Exchange

    def exchange(self, phase: Exchange) -> None:
        """Pass messages from senders to receivers. All are sent before any is received."""
        # Send before receiving: no agent gets what another receives in this exchange.
        sent = {name: self._sent(name, senders) for name, senders in phase.who.items()}
        for name, messages in sent.items():
            agent, senders = self.agents[name], phase.who[name]
            if senders and all(sender in self.failed for sender in senders):
                # Nothing that it holds was sent by anybody, so it weighs nothing.
                agent.state = agent.state.change(size=0)
                continue

            before = agent.state
            agent.receive(messages, phase.by_size, phase.totals.get(name))
            if self.setup.judge_clients:
                self.judge.measure_drift(agent, before, messages)
        for name in sent:
            self.failed.pop(name, None)

    def _sent(self, receiver: str, senders: tuple[str, ...]) -> list[Message]:
        """Return the messages that a receiver lacks, from these senders in turn."""
        receipts, found = self.agents[receiver].receipts(), []
        for sender in senders:
            if sender in self.failed:
                continue
            asked = receipts | self.agents[receiver].weights_receipt(sender)
            request = len(json.dumps(asked))
            messages = self.agents[sender].send(asked)

            # The request travels too, and counts; what an agent keeps for itself does not.
            if sender != receiver:
                self.ledger.transfer(receiver, sender, request)
                messages = [self.wire.carry(message, sender, receiver) for message in messages]

            # The next senders need not relay what this one sent.
            receipts |= {pair(m.sender, m.source): m.version for m in messages if m.source != WHOLE}
            found += messages
        return found

    def release(self, names: tuple[str, ...]) -> None:
        """Free the parameters of agents that will receive them again."""
        for name in names:
            if name not in self.failed:
                self.agents[name].release()

    def free_agents(self) -> None:
        """Free the agents of a trial that has ended, but for those of the first repeat that a result has."""
        kept = {self.agent.name: self.agent, **self.own_models()} if self.repeat == 0 else {}
        self.agents.clear()
        self.agents.update(kept)

    def own_models(self) -> dict[str, Agent]:
        """Return the agents that have models of their own, once the trial has ended, by name."""
        *_, last = self.setup.schedule.plan(self.seed)
        clients = last.clients if isinstance(last, Evaluate) and not self.stopped else {}
        return self.judge.own_models(clients)

    # Checkpoints

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that a checkpoint keeps: tensors, and facts that JSON can hold."""
        tensors: dict[str, Tensor] = {}
        agents: dict[str, Any] = {}

        # Names may contain any character, so keys are escaped pairs.
        for name, agent in self.agents.items():
            held, agents[name] = encode_state(agent.state)
            tensors |= {pair(name, key): tensor for key, tensor in held.items()}

        best = None
        if self.best is not None:
            held, best = encode_state(self.best)
            tensors |= {pair(BEST, key): tensor for key, tensor in held.items()}
        job = None
        if self.job is not None:
            held, job = self.job.save()
            tensors |= {pair(JOB, key): tensor for key, tensor in held.items()}
        frozen = self.agents.initial.frozen
        facts = {
            "phase": self.phase,
            "finished": self.finished,
            "trained": self.trained,
            "failed": self.failed,
            "result": self.result,
            "judge": self.judge.kept(),
            "trend": list(self.trend),
            "best": best,
            "ledger": self.ledger.kept(),
            "agents": agents,
            "frozen": [*frozen.params, *frozen.buffers],
            "job": job,
        }
        return tensors, facts

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue, when its loop starts, from what `kept` gave."""
        with reading(KEPT, REMEDY):
            counts = [facts[name] for name in ("phase", "finished", "trained")]
            rows, width = facts["judge"]["rows"], len(self.setup.schedule.judged)
            if min(counts) < 0 or any(len(row) != width for row in rows):
                raise ValueError("other counts or rows")
            if len(facts["judge"]["stages"]) != len(rows):
                raise ValueError("other stages than rows")

            self._resumed, self.begun = (tensors, facts), True
            for name in ("phase", "finished", "trained", "failed", "result"):
                setattr(self, name, facts[name])
            self.judge.resume(facts["judge"])
            self.trend = Trend(*facts["trend"])

            # The loop of a trial that has ended does not start again, but its agent is asked for.
            if self.result is not None and facts["agents"]:
                self._restore()

    def _restore(self) -> Paused | None:
        """Give the agents and the ledger their saved states; return the saved job, if one was under way."""
        if self._resumed is None:
            return None
        (tensors, facts), self._resumed = self._resumed, None
        self.ledger.resume(facts["ledger"])

        device, initial = self.setup.training.device, self.agents.initial
        frozen = initial.frozen
        for name, state in agent_states(tensors, facts, device, frozen, self.agents.initial_of).items():
            self.agents[name].state = state
        if facts["best"] is not None:
            own = {key: t.to(self.setup.training.device) for key, t in by_owner(tensors)[BEST].items()}
            self.best = decode_state(own, facts["best"], frozen, initial)
        if facts["job"] is None:
            return None
        return by_owner(tensors)[JOB], facts["job"]


def places_of(phases: Sequence[Phase]) -> list[dict[str, Place]]:
    """Return where the visits of each Train phase lie in the run, by agent; {} for other phases.

    >>> a, b = places_of([Train({"a": ("x",)}), Train({"a": ("x",), "b": ("y",)})])
    >>> b["a"], b["b"]
    (Place(visit=1, visits=2, round=1, rounds=2), Place(visit=0, visits=1, round=1, rounds=2))
    """
    visits = [list(phase.who.items()) if isinstance(phase, Train) else [] for phase in phases]
    totals = Counter(visit for phase in visits for visit in phase)
    done: Counter[tuple[str, tuple[str, ...]]] = Counter()

    # Agents that are sampled later have fewer visits than there are rounds, so both are counted.
    rounds, index, found = sum(isinstance(phase, Train) for phase in phases), 0, []
    for phase in visits:
        found.append({visit[0]: Place(done[visit], totals[visit], index, rounds) for visit in phase})
        done.update(phase)
        index += bool(phase)
    return found


def agent_states(
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    device: str = "cpu",
    frozen: Frozen | None = None,
    like: Callable[[str], State] | None = None,
) -> dict[str, State]:
    """Return the states of the agents that `Trial.kept` kept, on a device, over what is frozen there.

    With `like`, which gives the first state of an agent, each must be one of its model.
    """
    owned, states = by_owner(tensors), {}
    for name, held in facts["agents"].items():
        own = {key: tensor.to(device) for key, tensor in owned.get(name, {}).items()}
        first = None if like is None else like(name)
        # An expert with a model of its own shares no frozen entries with others.
        alone = first is None and not held["frozen"]
        states[name] = decode_state(own, held, None if alone else first.frozen if first else frozen, first)
    return states


def by_owner(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each agent, and of the job, from the names that `Trial.kept` gives them."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, name = unpair(key)
        found.setdefault(owner, {})[name] = tensor
    return found
