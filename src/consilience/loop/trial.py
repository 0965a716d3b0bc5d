"""The loop: one walk of a schedule; learn, hear, evaluate. One page for every setting."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Weights, join
from consilience.core.method import Method
from consilience.core.metrics import Metric, client_drift
from consilience.core.model import Model
from consilience.core.params import Layout, content_hash, key
from consilience.core.schedule import Exchange, Expert, Phase, Schedule, ScheduleFacts, Train
from consilience.core.state import State, decode_state, encode_state
from consilience.core.training import Training
from consilience.loop.agent import Agent, Job
from consilience.loop.engine import EngineEvents, Paused, Visit
from consilience.loop.folder import plain
from consilience.loop.ledger import Ledger

CHUNK = {True: 512, False: 4096}
"""How many test samples are judged at once on a CPU, and elsewhere (what is fastest)."""


@dataclass
class TrainRequest:
    """What a walk wants an engine to do before it goes on."""

    visits: list[Visit]
    events: EngineEvents
    paused: Paused | None = None


@dataclass(eq=False)
class Trial:
    """One walk of a schedule, for one seed, resumable at any step."""

    schedule: Schedule
    method: Method
    model: Model
    training: Training
    measure: Metric
    facts: ScheduleFacts
    seed: int
    repeat: int
    write: Callable[[Mapping[str, Any]], None]
    """Writes a line of the log."""
    tick: Callable[[Trial, Job | None], None]
    """Told after every step, phase, or group of agents: it may save, and raise Interrupted."""
    save: Callable[[Trial], None]
    judge_clients: bool = False
    result: dict[str, Any] | None = None
    """What it found, once it has ended."""
    _resumed: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None
    _wire: WeakValueDictionary[object, Message] = field(default_factory=WeakValueDictionary)
    _sizes: WeakKeyDictionary[Message, int] = field(default_factory=WeakKeyDictionary)

    def __post_init__(self) -> None:
        self.ledger = Ledger()
        self.agents: dict[str, Agent] = {}
        self.phase, self.learned = 0, 0
        self.rows: list[list[float]] = []
        self.mapped: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.learning: list[dict[str, Any]] = []
        self.stages: list[str] = []
        self.failed: dict[str, str] = {}
        self.client_drift: list[dict[str, Any]] = []
        self.local: list[dict[str, Any]] = []
        self.personal: dict[str, float | None] = {}
        self.received: dict[str, list[float]] = {}
        self.job: Job | None = None
        self.begun = False

    def steps(self) -> Iterator[TrainRequest]:
        """The main loop: phases in order; whoever learns, learns; whoever hears, absorbs; then the evaluated agent is judged.

        Learning is asked for: who walks it lets an engine do it and then goes on.
        """
        self.ledger = Ledger()  # time counts from here
        self._begin()
        paused = self._restore()
        self.begun = True
        if not self.rows:
            self._evaluate("start")
            self.save(self)
        resting = (
            {}
            if self.judge_clients
            else release_plan(list(self.schedule.plan(self.seed)), self.schedule.evaluated)
        )
        for i, phase in enumerate(self.schedule.plan(self.seed)):
            if i < self.phase:
                continue
            if isinstance(phase, Train):
                yield from self._learn(phase, paused)
                paused = None
            elif isinstance(phase, Exchange):
                self._hear(phase)
                for name in resting.get(i, ()):
                    if name not in self.failed:
                        self._agent(name).release()
            else:
                for name, own in phase.clients.items():
                    self.personal[name] = self._own(self._row(self._agent(name)), own)[0]
                self._evaluate(phase.name)
            self.phase, self.learned = i + 1, 0
            self._done(None)
        self.result = {
            "rows": self.rows,
            "stages": self.stages[1:],
            "costs": self.ledger.costs(),
            "curve": self.curve,
            "learning": self.learning,
            "mapper": self.mapped if self.mapped else None,
            "client_drift": self.client_drift,
            "local": self.local,
            "personal": self.personal,
        }
        self.save(self)

    @property
    def agent(self) -> Agent:
        """The agent that is judged."""
        return self._agent(self.schedule.evaluated)

    def forget(self) -> None:
        """Let go of what only a walk that goes on needs: of the first repeat the judged agent stays."""
        self.agents = {self.agent.name: self.agent} if self.repeat == 0 else {}

    def _done(self, job: Job | None) -> None:
        self.job = job
        self.tick(self, job)

    def _learn(self, phase: Train, paused: Paused | None) -> Iterator[TrainRequest]:
        done = self.learned
        who = list(phase.who.items())[done:]
        before = {name: self._agent(name).state for name, _ in who} if phase.least is not None else {}
        if not done:
            self.failed = {name: why for name, why in self.failed.items() if name not in phase.who}
        if self.judge_clients and not self.received:
            known: dict[str, list[float]] = {}
            self.received = {name: self._row(self._agent(name), known) for name in phase.who}

        def fail(agent: Agent, why: Exception) -> None:
            if phase.least is None:
                why.add_note(f"while {agent.name!r} learned {', '.join(phase.who[agent.name])}")
                raise why
            self.failed[agent.name] = f"{type(why).__name__}: {why}"
            self.write({"event": "failed", "agent": agent.name, "why": self.failed[agent.name]})
            warnings.warn(f"{agent.name!r} failed and is left out: {why}", stacklevel=2)

        def finished(agent: Agent) -> None:
            self.learned, self.job = self.learned + 1, None

        def note(text: str) -> None:
            self.write({"event": "engine", "note": text})

        visits = [Visit(self._agent(name), sources, phase.fractions.get(name, 1.0)) for name, sources in who]
        yield TrainRequest(visits, EngineEvents(self._done, finished, fail, note), paused)
        out = [name for name in phase.who if name in self.failed]
        if phase.least is not None and len(phase.who) - len(out) < phase.least:
            for name, state in before.items():
                self._agent(name).state = state
            whys = "; ".join(f"{name!r}: {self.failed[name]}" for name in out)
            self.failed = {name: why for name, why in self.failed.items() if name not in before}
            self.learned, self.job, self.received = done, None, {}
            self.save(self)
            raise ConsilienceError(
                f"a round should have at least {phase.least} agents that finish. Found {len(phase.who) - len(out)}: {whys}."
            )

        for name, row in self.received.items():
            if name in self.failed:
                continue
            own, others = self._own(row, phase.who[name])
            own_after, others_after = self._own(self._row(self._agent(name)), phase.who[name])
            self.local.append(
                {
                    "stage": len(self.rows),
                    "agent": name,
                    "own_before": own,
                    "own_after": own_after,
                    "others_before": others,
                    "others_after": others_after,
                }
            )
            self.personal[name] = own_after
        self.received = {}

    def _own(self, row: Sequence[float | None], names: Sequence[str]) -> tuple[float | None, float | None]:
        """The means of a row over the test data of these sources, and over all others'; None where there is none."""
        tests = {id(self.schedule.source(n).test) for n in names}
        parted = self.schedule.judged is not self.schedule.sources
        own = [id(s.test) in tests if parted else s.name in names for s in self.schedule.judged]
        other = [id(s.test) not in tests for s in self.schedule.judged]
        means = []
        for chosen in (own, other):
            kept = [v for v, here in zip(row, chosen, strict=True) if here and v is not None and v == v]
            means.append(float(np.mean(kept)) if kept else None)
        return means[0], means[1]

    def _apart(self, agent: Agent, before: State, messages: Sequence[Message]) -> None:
        """How far those that learned from this agent's own parameters went, against the step that it made of them."""
        base = agent._hash("base", before.base)
        heard = [m for m in messages if m.trained and m.base == base]
        told = [m.items["model"].group("params") for m in heard if isinstance(m.items.get("model"), Weights)]
        if len(told) < 2:
            return
        names = [
            n for n, p in before.params.items() if p.is_floating_point() and self.model.task_of(n) is None
        ]
        layout = Layout.of(
            {n: before.params[n] for n in names if not self.model.frozen(n) and all(n in t for t in told)}
        )
        rows = torch.stack([layout.flatten(t) for t in told])
        found = client_drift(layout.flatten(before.base), layout.flatten(agent.state.params), rows)
        self.client_drift.append(
            {"stage": len(self.rows), "agent": agent.name, "clients": len(told), **plain(found)}
        )

    def _hear(self, phase: Exchange) -> None:
        told: dict[str, list[Message]] = {}
        for listener, speakers in phase.who.items():
            told[listener] = []
            receipts = self._agent(listener).receipts()
            for speaker in speakers:
                if speaker in self.failed:
                    continue
                size = len(json.dumps(receipts))
                messages = self._agent(speaker).send(receipts)
                if speaker != listener:
                    self.ledger.transfer(listener, speaker, size)
                    messages = [self._send(m, speaker, listener) for m in messages]
                receipts |= {
                    f"{m.sender}|{m.source}": m.version for m in messages if m.source
                }  # relays need not say it again
                told[listener] += messages
        for listener, messages in told.items():
            agent = self._agent(listener)
            if phase.who[listener] and all(s in self.failed for s in phase.who[listener]):
                agent.state = agent.state.change(size=0)  # what it has is nothing that it heard
                continue
            before = agent.state
            agent.receive(messages, phase.by_size)
            if self.judge_clients:
                self._apart(agent, before, messages)
        for listener in told:
            self.failed.pop(listener, None)

    def _row(self, agent: Agent, known: dict[str, list[float]] | None = None) -> list[float]:
        """The scores of an agent on everything that is judged; those of equal parameters are known."""
        if known is None or self.method.mapper is not None or agent.choices() or agent._seen():
            return self._scores(agent)[0]
        what = content_hash({**agent.state.params, **agent.state.buffers})
        if what not in known:
            known[what] = self._scores(agent)[0]
        return known[what]

    def _send(self, m: Message, speaker: str, listener: str) -> Message:
        """A message as it arrives, from its bytes; what several hear, or relay, is the same object for all."""
        at = (m.key, m.version, m.digest, m.base, m.trained)
        arrived = self._wire.get(at)
        if arrived is None:
            data = m.to_bytes()
            arrived = self._wire[at] = Message.from_bytes(data, check=False)  # made here, a moment ago
            self._sizes[arrived] = len(data)
        self.ledger.transfer(speaker, listener, self._sizes[arrived])
        return arrived

    @torch.no_grad()
    def _scores(self, agent: Agent) -> tuple[list[float], list[float]]:
        """The scores of an agent on everything that is judged, and those of its mapper."""
        mapper = self.method.mapper
        told = self.schedule.labelled or (mapper is not None and mapper.needs_label)
        cache: dict[tuple[int, str | None], tuple[float, float]] = {}
        row, hits = [], []
        taught = {o.task for o in self.schedule.sources}
        for s in self.schedule.judged:
            task = s.task if told else None
            at = (id(s.test), task if told or mapper is None else s.task)
            if at not in cache:
                ps, ys, right, n = [], [], 0.0, 0
                for x, y in s.test.chunks(CHUNK[agent.device.type == "cpu"]):
                    p, weights, keys = agent._predict(x, task)
                    ps.append(p.cpu())
                    ys.append(y.cpu())
                    if weights is not None and s.task in taught:
                        tasks = [self.schedule.source(source).task for _, source in keys]
                        right += float(sum(weights[:, i].sum() for i, t in enumerate(tasks) if t == s.task))
                        n += len(x)
                cache[at] = (self.measure(torch.cat(ps), torch.cat(ys)), right / n if n else float("nan"))
            row.append(cache[at][0])
            hits.append(cache[at][1])
        return row, hits

    def _evaluate(self, stage: str) -> None:
        row, hits = self._scores(self._agent(self.schedule.evaluated))
        mapper = self.method.mapper
        self.rows.append(row)
        self.stages.append(stage)
        if len(self.rows) > 1 and mapper is not None:
            now = len(self.rows) - 1
            reached = [at and at[0] <= now for at in self.facts.learned_at.values()]
            known = [h for h, there in zip(hits, reached, strict=True) if there and h == h]
            self.mapped.append(float(np.mean(known)) if known else float("nan"))
        costs = {
            "macs": self.ledger.total("macs"),
            "bytes": self.ledger.total("sent"),
            "seconds": round(self.ledger.clock(), 3),
        }
        lost = [s.name for s, v in zip(self.schedule.judged, row, strict=True) if v != v]
        if lost and len(self.rows) == 1:
            warnings.warn(
                f"the metric is undefined on {', '.join(lost[:3])}{' ..' * (len(lost) > 3)}, which the mean leaves out",
                stacklevel=2,
            )
        score = float(np.nanmean(row)) if len(lost) < len(row) else float("nan")
        self.curve.append({"score": score, **costs})
        self.write(
            {
                "event": "stage",
                "repeat": self.repeat,
                "stage": len(self.rows) - 1,
                "name": stage,
                "score": score,
                "scores": row,
                "steps": self.ledger.steps,
                **costs,
            }
        )

    @torch.no_grad()
    def look(self, job: Job) -> None:
        """A point of the learning curve: the metric on what is being learned, by the parameters of this step."""
        for s in job.sources:
            task = s.task if self._agent(job.agent).aware else None
            pairs = [
                (job.answer(x, task).cpu(), y)
                for x, y in s.test.chunks(CHUNK[job.layout.device.type == "cpu"])
            ]
            score = self.measure(torch.cat([p for p, _ in pairs]), torch.cat([y for _, y in pairs]))
            at = {
                "agent": job.agent,
                "source": s.name,
                "epoch": job.epoch,
                "step": job.index,
                "steps": self.ledger.steps,
            }
            self.learning.append({**at, "score": score})

    def _begin(self) -> None:
        """The parameters that everybody begins with."""
        generator = key(self.seed, "init")
        params, buffers = self.model.init(generator)
        if self.schedule.base is not None:
            lacking = sorted(params.keys() - self.schedule.base.keys())
            if lacking:
                raise ConsilienceError(
                    f"`base` should have the model's entries. Found none called {lacking[0]!r}."
                )
            given = {
                n: torch.as_tensor(self.schedule.base[n])
                for n in (*params, *buffers)
                if n in self.schedule.base
            }
            params = {n: given[n] for n in params}
            for n, own in buffers.items():
                b = given.get(n, own)  # where it stands in a state_dict
                if b.shape != own.shape:
                    raise ConsilienceError(
                        f"`base` should have the model's shapes. Found {tuple(b.shape)} for {n!r}, here {tuple(own.shape)}."
                    )
                buffers = {
                    **buffers,
                    n: b if b.is_floating_point() and own.is_floating_point() else b.to(own.dtype),
                }
        dtype, device = self.training.dtype, torch.device(self.training.device)

        def cast(t: Tensor) -> Tensor:
            return t.detach().to(device, dtype if t.is_floating_point() else t.dtype)

        params, buffers = {n: cast(p) for n, p in params.items()}, {n: cast(b) for n, b in buffers.items()}
        origin = (
            content_hash(params) if not self.schedule.experts or self.schedule.base is not None else "given"
        )
        self.initial = State(params, buffers, params, origin)

    def _agent(self, name: str) -> Agent:
        if name not in self.agents:
            agent = Agent(
                name,
                self.model,
                self.method,
                self.schedule,
                self.training,
                self.seed,
                self.initial,
                self.ledger,
                self.facts.revisited,
            )
            if name in self.schedule.experts:
                give(agent, self.schedule.experts[name])
            self.agents[name] = agent
        return self.agents[name]

    # checkpoints

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a checkpoint keeps of it: tensors, and facts that JSON can hold."""
        tensors: dict[str, Tensor] = {}
        agents: dict[str, Any] = {}
        for name, agent in self.agents.items():
            held, agents[name] = encode_state(agent.state)
            tensors |= {f"agent|{name}|{k}": t for k, t in held.items()}
        self.ledger.clock()
        job = None
        if self.job is not None:
            held, job = self.job.save()
            tensors |= {f"job|{k}": t for k, t in held.items()}
        facts = {f: getattr(self, f) for f in KEPT} | {
            "agents": agents,
            "job": job,
            "ledger": {
                "by_agent": self.ledger.by_agent,
                "seconds": self.ledger.seconds,
                "steps": self.ledger.steps,
            },
        }
        return tensors, facts

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on, once it is walked, from what `kept` gave."""
        self._resumed, self.begun = (tensors, facts), True
        for f in KEPT:
            setattr(self, f, facts[f])
        if self.result is not None and facts["agents"]:
            self._begin()
            self._restore()

    def _restore(self) -> Paused | None:
        if self._resumed is None:
            return None
        tensors, facts = self._resumed
        self._resumed = None
        self.ledger.by_agent = facts["ledger"]["by_agent"]
        self.ledger.seconds, self.ledger.steps = facts["ledger"]["seconds"], facts["ledger"]["steps"]
        for name, known in facts["agents"].items():
            start = f"agent|{name}|"
            own = {
                k[len(start) :]: t.to(self.training.device) for k, t in tensors.items() if k.startswith(start)
            }
            self._agent(name).state = decode_state(own, known)
        job = {k[len("job|") :]: t for k, t in tensors.items() if k.startswith("job|")}
        return (job, facts["job"]) if facts["job"] is not None else None


KEPT = (
    "phase",
    "learned",
    "rows",
    "mapped",
    "curve",
    "learning",
    "stages",
    "failed",
    "client_drift",
    "local",
    "personal",
    "received",
    "result",
)
"""What a checkpoint keeps of a walk beside agents, the job that is under way, and the ledger."""


def release_plan(phases: Sequence[Phase], evaluated: str) -> dict[int, tuple[str, ...]]:
    """After which phases which agents rest: those that were heard, and whose next act, if any, is to hear one who heard them and
    never learns itself (a server), so that what it tells is all they had, and adopted."""
    learners = {name for phase in phases if isinstance(phase, Train) for name in phase.who}
    found: dict[int, tuple[str, ...]] = {}
    then: dict[str, str | None] = {evaluated: None}  # whom an agent hears next, before it does anything else
    for i in reversed(range(len(phases))):
        phase = phases[i]
        if isinstance(phase, Exchange):
            heard_by: dict[str, set[str]] = {}
            for listener, speakers in phase.who.items():
                for s in speakers:
                    heard_by.setdefault(s, set()).add(listener)
            idle = [s for s in heard_by if s not in phase.who]
            found[i] = tuple(
                s for s in idle if then.get(s, next(iter(heard_by[s]))) in heard_by[s] - learners
            )
            then |= dict.fromkeys(idle)
            then |= {n: speakers[0] if len(speakers) == 1 else None for n, speakers in phase.who.items()}
        else:
            then |= dict.fromkeys(phase.who if isinstance(phase, Train) else (evaluated, *phase.clients))
    return found


def give(agent: Agent, expert: Expert) -> None:
    """Make an agent the owner of a trained expert."""
    state = agent.state
    told = {**expert.params, **expert.buffers}  # a state_dict holds both
    params: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for n, p in {**state.params, **state.buffers}.items():
        if n not in told:
            raise ConsilienceError(
                f"an expert should have the model's entries. Found none called {n!r} in {expert.name!r}."
            )
        t = torch.as_tensor(told[n]).detach().to(p.device, p.dtype)
        if t.shape != p.shape:
            raise ConsilienceError(
                f"an expert should have the model's shapes. Found {tuple(t.shape)} for {n!r} of {expert.name!r}, here {tuple(p.shape)}."
            )
        (params if n in state.params else buffers)[n] = t
    for n in told.keys() - params.keys() - buffers.keys():
        if agent.model.task_of(n) is None:
            raise ConsilienceError(
                f"an expert should have no entries but the model's. Found {n!r} in {expert.name!r}."
            )
        (params if n in expert.params else buffers)[n] = torch.as_tensor(told[n]).detach()
    source = agent.schedule.source(expert.source.name)
    for n, b in agent.model.grow(state.params, state.buffers, source, key(0, "given"))[1].items():
        if not n.endswith(".columns") or n not in buffers or set(b.tolist()) == set(buffers[n].tolist()):
            continue
        if b.shape != buffers[n].shape:
            raise ConsilienceError(
                f"an expert's head should have the {len(b)} classes of its source. Found {len(buffers[n])} in {expert.name!r}."
            )
        buffers[n] = b  # it was trained among other classes: its columns are those of this schedule
    agent.state = state.change(
        params=params, buffers=buffers, version=1, size=1, trained=True, visits={source.name: 1}
    )
    items = agent.consolidator.export(agent.model, agent.state, (source,), agent.method.personal)
    agent.state = agent.state.change(
        bank=join({}, [agent._message(s, 1, 1, {"model": i}) for s, i in items.items()])
    )
