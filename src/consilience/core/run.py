"""The loop: walk a schedule; learn, hear, evaluate. One page for every setting."""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from consilience.core.agent import Agent, Job
from consilience.core.engine import Engine, Watch
from consilience.core.errors import ConsilienceError, Interrupted, Refusal, kind_of, unknown
from consilience.core.folder import Log, Progress, interruptible, plain
from consilience.core.ledger import Ledger
from consilience.core.message import Message, Weights
from consilience.core.method import Method
from consilience.core.metrics import METRICS, Metric, drift
from consilience.core.model import Model
from consilience.core.params import Layout, content_hash, keep_memory, key, write_json
from consilience.core.result import Result
from consilience.core.schedule import Expert, Facts, Hear, Learn, Phase, Schedule
from consilience.core.state import State, decode_state, encode_state
from consilience.core.training import Training

CHUNK = {True: 512, False: 4096}
"""How many test samples are judged at once on a CPU, and elsewhere (what is fastest)."""


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
    clients: bool = False,
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
        clients: also judge whoever learns by its own parameters before and after each learn (`Result.local`), and how far those
            that are heard together went apart (`Result.drift`); it costs two evaluations a learn.
        progress: called with every line of the log.
        config: what config.yaml should hold; None describes the arguments.

    Raises ConsilienceError (Refusal for a method that could not act) before any work is lost.
    """
    model = checked(schedule, model, training)
    training = training or Training()
    if not isinstance(repeats, int) or repeats < 1:
        raise ConsilienceError(f"`repeats` should be at least 1. Found `repeats = {repeats}`.")
    if not isinstance(seed, int) or not (out is None or isinstance(out, str | Path)):
        raise ConsilienceError(f"`seed` should be a whole number and `out` a path. Found {seed!r} and {out!r}.")
    if not checkpoint_seconds > 0:
        raise ConsilienceError(f"`checkpoint_seconds` should be positive. Found `checkpoint_seconds = {checkpoint_seconds}`.")
    if checkpoint_steps is not None and checkpoint_steps < 1:
        raise ConsilienceError(f"`checkpoint_steps` should be at least 1. Found `checkpoint_steps = {checkpoint_steps}`.")
    if curve_steps is not None and curve_steps < 1:
        raise ConsilienceError(f"`curve_steps` should be at least 1. Found `curve_steps = {curve_steps}`.")
    if resume and (out is None or not (Path(out) / "checkpoint" / "index.json").exists()):
        raise ConsilienceError(f"`resume` needs a folder with a checkpoint. Found none in {out}.")
    runner = engine_of(engine)
    chosen = Method.of(method)  # type: ignore[arg-type]
    model = model or default_model(schedule, chosen)
    facts = replace(schedule.facts(seed), model=model)
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
        raise ConsilienceError(f"a stream without ends is seen once: `epochs` should be 1. Found `epochs = {training.epochs}`.")
    if training.device != "cpu" and not torch.cuda.is_available():
        raise ConsilienceError(f"`device` should be there. Found {training.device!r} and no CUDA.")
    aware = schedule.labelled or chosen.mapper is not None
    shapes: set[tuple[int, ...]] = set()
    for s in schedule.sources:
        x = s.train.select(torch.arange(min(2, len(s.train)))).whole()[0]
        if tuple(x.shape[1:]) not in shapes:
            shapes.add(tuple(x.shape[1:]))
            model.check(schedule.frame, x, aware)
    if isinstance(metric, str) and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    fits = ("r2",) if schedule.frame.kind == "value" else ("accuracy", "auroc")
    if isinstance(metric, str) and metric not in fits:
        raise ConsilienceError(
            f"`metric` should fit targets of kind {schedule.frame.kind!r}: {' or '.join(fits)}. Found {metric!r}."
        )
    label = (
        metric if isinstance(metric, str) else getattr(metric, "__name__", "accuracy" if schedule.frame.kind == "class" else "r2")
    )
    measure: Metric = METRICS[label] if not callable(metric) else metric
    keep_memory()
    log = Log(Path(out) if out is not None else None, progress)
    described = config or describe(schedule, name, model, training, seed, repeats)
    walk = Walk(
        schedule, chosen, model, training, measure, facts, log, runner, checkpoint_seconds, checkpoint_steps, curve_steps, clients
    )
    walk.fingerprint = fingerprint(schedule, chosen, model, training, seed, repeats, label) if out is not None else {}
    if out is not None:
        if resume:
            walk.load()
        log.open(described, resume)
        walk.restored()
        log.write({"event": "begin", "versions": versions(runner)})
    try:
        with interruptible() as stop:
            walk.stop = stop
            for r in range(repeats):
                if len(walk.finished) <= r:
                    walk.one(seed + r)
    finally:
        runner.close()
    done = walk.finished
    mean = {k: sum(d["costs"][k] for d in done) / len(done) for k in ("macs", "bytes", "steps", "seconds")}
    costs = {**{k: int(v) for k, v in mean.items() if k != "seconds"}, "seconds": round(mean["seconds"], 3)}
    result = Result(
        setting=schedule.setting, data="+".join(dict.fromkeys(s.name.split("/")[0] for s in schedule.sources)), method=name,
        model=type(model).__name__ if not hasattr(model, "name") else str(model.name), metric=label, seed=seed,
        sources=tuple(s.name for s in schedule.judged), stages=tuple(done[0]["stages"]),
        learned_at=tuple(v[0] if len(v) == 1 else None for v in facts.learned_at.values()),
        matrices=np.array([d["rows"] for d in done], dtype=float),
        costs={**costs, "by_agent": done[0]["costs"]["by_agent"]},
        mapper=None if done[0]["mapper"] is None else np.array([d["mapper"] for d in done], dtype=float),
        curve=done[0]["curve"], learning_curve=done[0]["learning"], drift=done[0].get("drift", ()), local=done[0].get("local", ()),
        personal=_personal(done), config=described, versions=versions(runner), agent=walk.first,
    )  # fmt: skip
    if out is not None:
        write_json(Path(out) / "result.json", plain(result.to_json()))
        log.write({"event": "end", "score": result.score, "ran": walk.ran})
    return result


def _personal(done: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The mean over repeats of each client's last score."""
    told = [(name, v) for d in done for name, v in d.get("personal", {}).items() if v is not None]
    names = sorted({name for name, _ in told})
    return {name: float(np.mean([v for n, v in told if n == name])) for name in names} or None


@dataclass
class Walk:
    """One walk of a schedule for each seed, resumable at any step."""

    schedule: Schedule
    method: Method
    model: Model
    training: Training
    measure: Metric
    facts: Facts
    log: Log
    engine: Engine
    seconds: float
    every: int | None
    inside: int | None = None
    clients: bool = False
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    finished: list[dict[str, Any]] = field(default_factory=list)
    first: Agent | None = None
    stop: list[int] = field(default_factory=list)
    ran: int = 0
    """Steps that this process ran."""
    _resumed: dict[str, Any] | None = None
    _wire: WeakValueDictionary[object, Message] = field(default_factory=WeakValueDictionary)
    _sizes: WeakKeyDictionary[Message, int] = field(default_factory=WeakKeyDictionary)
    _saved: float = field(default_factory=time.monotonic)

    def one(self, seed: int) -> None:
        """The main loop: phases in order; whoever learns, learns; whoever hears, absorbs; then the evaluated agent is judged."""
        self.ledger = Ledger()
        self.agents: dict[str, Agent] = {}
        self.seed, self.phase, self.learned = seed, 0, 0
        self.rows: list[list[float]] = []
        self.mapped: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.learning: list[dict[str, Any]] = []
        self.stages: list[str] = []
        self.failed: dict[str, str] = {}
        self.drift: list[dict[str, Any]] = []
        self.local: list[dict[str, Any]] = []
        self.personal: dict[str, float | None] = {}
        self.received: dict[str, list[float]] = {}
        self.job: Job | None = None
        self._begin()
        paused = self._restore()
        if not self.rows:
            self._evaluate("start")
            self._save()
        resting = {} if self.clients else rests(list(self.schedule.plan(seed)), self.schedule.evaluated)
        for i, phase in enumerate(self.schedule.plan(seed)):
            if i < self.phase:
                continue
            if isinstance(phase, Learn):
                self._learn(phase, paused)
                paused = None
            elif isinstance(phase, Hear):
                self._hear(phase)
                for name in resting.get(i, ()):
                    if name not in self.failed:
                        self._agent(name).rest()
            else:
                for name, own in phase.clients.items():
                    self.personal[name] = self._own(self._row(self._agent(name)), own)[0]
                self._evaluate(phase.name)
            self.phase, self.learned = i + 1, 0
            self._tick(None)
        stages = self.stages[1:]
        self.finished.append({
            "rows": self.rows, "stages": stages, "costs": self.ledger.costs(), "curve": self.curve, "learning": self.learning,
            "mapper": self.mapped if self.mapped else None, "drift": self.drift, "local": self.local, "personal": self.personal,
        })  # fmt: skip
        self.first = self.first or self._agent(self.schedule.evaluated)
        self._save()

    def _learn(self, phase: Learn, paused: tuple[Mapping[str, Tensor], Mapping[str, int]] | None) -> None:
        done = self.learned
        who = list(phase.who.items())[done:]
        before = {name: self._agent(name).state for name, _ in who} if phase.least is not None else {}
        if not done:
            self.failed = {name: why for name, why in self.failed.items() if name not in phase.who}
        if self.clients and not self.received:
            known: dict[str, list[float]] = {}
            self.received = {name: self._row(self._agent(name), known) for name in phase.who}

        def fail(agent: Agent, why: Exception) -> None:
            if phase.least is None:
                why.add_note(f"while {agent.name!r} learned {', '.join(phase.who[agent.name])}")
                raise why
            self.failed[agent.name] = f"{type(why).__name__}: {why}"
            self.log.write({"event": "failed", "agent": agent.name, "why": self.failed[agent.name]})
            warnings.warn(f"{agent.name!r} failed and is left out: {why}", stacklevel=2)

        def finished(agent: Agent) -> None:
            self.learned, self.job = self.learned + 1, None

        def note(text: str) -> None:
            self.log.write({"event": "engine", "note": text})

        work = [(self._agent(name), sources, phase.work.get(name, 1.0)) for name, sources in who]
        self.engine.learn(work, Watch(self._tick, finished, fail, note), paused)
        out = [name for name in phase.who if name in self.failed]
        if phase.least is not None and len(phase.who) - len(out) < phase.least:
            for name, state in before.items():
                self._agent(name).state = state
            whys = "; ".join(f"{name!r}: {self.failed[name]}" for name in out)
            self.failed = {name: why for name, why in self.failed.items() if name not in before}
            self.learned, self.job, self.received = done, None, {}
            self._save()
            raise ConsilienceError(
                f"a round should have at least {phase.least} agents that finish. Found {len(phase.who) - len(out)}: {whys}."
            )

        for name, row in self.received.items():
            if name in self.failed:
                continue
            own, others = self._own(row, phase.who[name])
            own_after, others_after = self._own(self._row(self._agent(name)), phase.who[name])
            self.local.append({"stage": len(self.rows), "agent": name, "own_before": own, "own_after": own_after,
                               "others_before": others, "others_after": others_after})  # fmt: skip
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
        heard = [m for m in messages if m.learned and m.base == base]
        told = [m.items["model"].group("params") for m in heard if isinstance(m.items.get("model"), Weights)]
        if len(told) < 2:
            return
        names = [n for n, p in before.params.items() if p.is_floating_point() and self.model.task_of(n) is None]
        layout = Layout.of({n: before.params[n] for n in names if not self.model.frozen(n) and all(n in t for t in told)})
        rows = torch.stack([layout.flatten(t) for t in told])
        found = drift(layout.flatten(before.base), layout.flatten(agent.state.params), rows)
        self.drift.append({"stage": len(self.rows), "agent": agent.name, "clients": len(told), **plain(found)})

    def _hear(self, phase: Hear) -> None:
        told: dict[str, list[Message]] = {}
        for listener, speakers in phase.who.items():
            told[listener] = []
            receipts = self._agent(listener).receipts()
            size = len(json.dumps(receipts))
            for speaker in speakers:
                if speaker in self.failed:
                    continue
                messages = self._agent(speaker).tell(receipts)
                if speaker != listener:
                    self.ledger.sent(listener, speaker, size)
                    messages = [self._send(m, speaker, listener) for m in messages]
                told[listener] += messages
        for listener, messages in told.items():
            agent = self._agent(listener)
            if phase.who[listener] and all(s in self.failed for s in phase.who[listener]):
                agent.state = agent.state.change(size=0)  # what it has is nothing that it heard
                continue
            before = agent.state
            agent.absorb(messages, phase.by_size)
            if self.clients:
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
        at = (m.key, m.version, m.digest, m.base, m.learned)
        arrived = self._wire.get(at)
        if arrived is None:
            data = m.to_bytes()
            arrived = self._wire[at] = Message.from_bytes(data, check=False)  # made here, a moment ago
            self._sizes[arrived] = len(data)
        self.ledger.sent(speaker, listener, self._sizes[arrived])
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
        costs = {"macs": self.ledger.total("macs"), "bytes": self.ledger.total("sent"), "seconds": round(self.ledger.clock(), 3)}
        lost = [s.name for s, v in zip(self.schedule.judged, row, strict=True) if v != v]
        if lost and len(self.rows) == 1:
            warnings.warn(
                f"the metric is undefined on {', '.join(lost[:3])}{' ..' * (len(lost) > 3)}, which the mean leaves out",
                stacklevel=2,
            )
        score = float(np.nanmean(row)) if len(lost) < len(row) else float("nan")
        self.curve.append({"score": score, **costs})
        self.log.write({"event": "stage", "repeat": len(self.finished), "stage": len(self.rows) - 1, "name": stage, "score": score,
                        "scores": row, "steps": self.ledger.steps, **costs})  # fmt: skip

    @torch.no_grad()
    def _look(self, job: Job) -> None:
        """A point of the learning curve: the metric on what is being learned, by the parameters of this step."""
        for s in job.sources:
            task = s.task if self._agent(job.agent).aware else None
            pairs = [(job.answer(x, task).cpu(), y) for x, y in s.test.chunks(CHUNK[job.layout.device.type == "cpu"])]
            score = self.measure(torch.cat([p for p, _ in pairs]), torch.cat([y for _, y in pairs]))
            at = {"agent": job.agent, "source": s.name, "epoch": job.epoch, "step": job.index, "steps": self.ledger.steps}
            self.learning.append({**at, "score": score})

    def _begin(self) -> None:
        """The parameters that everybody begins with."""
        generator = key(self.seed, "init")
        params, buffers = self.model.init(generator)
        if self.schedule.base is not None:
            lacking = sorted(params.keys() - self.schedule.base.keys())
            if lacking:
                raise ConsilienceError(f"`base` should have the model's entries. Found none called {lacking[0]!r}.")
            params = {n: torch.as_tensor(self.schedule.base[n]) for n in params}
        dtype, device = self.training.dtype, torch.device(self.training.device)

        def cast(t: Tensor) -> Tensor:
            return t.detach().to(device, dtype if t.is_floating_point() else t.dtype)

        params, buffers = {n: cast(p) for n, p in params.items()}, {n: cast(b) for n, b in buffers.items()}
        origin = content_hash(params) if not self.schedule.experts or self.schedule.base is not None else "given"
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

    def _tick(self, job: Job | None) -> None:
        self.job = job
        self.ran += job is not None
        if job is not None and self.inside is not None and self.ledger.steps % self.inside == 0:
            self._look(job)
        steps = self.every is not None and job is not None and self.ledger.steps % self.every == 0
        if self.stop or steps or (self.log.out is not None and time.monotonic() - self._saved > self.seconds):
            self._save()
            if self.stop:
                where = (
                    f"go on with `resume=True` (--resume --out {self.log.out})"
                    if self.log.out
                    else "nothing was kept: no `out` was given"
                )
                raise Interrupted(f"interrupted; {where}.")

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self.log.out is None:
            return
        tensors: dict[str, Tensor] = {}
        agents = dict(self.agents) if len(self.rows) else {}
        first = {"first": self.first} if self.first is not None else {}
        facts: dict[str, Any] = {"agents": {}, "fingerprint": dict(self.fingerprint), "finished": self.finished}
        for group, members in (("agent", agents), ("first", first)):
            for name, agent in members.items():
                held, f = encode_state(agent.state)
                tensors |= {f"{group}|{name}|{k}": t for k, t in held.items()}
                facts["agents"][f"{group}|{name}"] = f
        self.ledger.clock()
        facts["walk"] = {
            "phase": self.phase, "learned": self.learned, "rows": self.rows, "mapped": self.mapped, "curve": self.curve,
            "learning": self.learning, "stages": self.stages, "seed": self.seed, "job": None, "failed": self.failed,
            "drift": self.drift, "local": self.local, "personal": self.personal, "received": self.received,
            "ledger": {"by_agent": self.ledger.by_agent, "seconds": self.ledger.seconds, "steps": self.ledger.steps},
        }  # fmt: skip
        if self.job is not None:
            held, f2 = self.job.save()
            tensors |= {f"job|{k}": t for k, t in held.items()}
            facts["walk"]["job"] = f2
        self.log.checkpoint(tensors, facts)
        line = {
            "event": "checkpoint",
            "repeat": len(self.finished),
            "phase": self.phase,
            "steps": self.ledger.steps,
            "ran": self.ran,
        }
        if self.job is not None:
            line |= {
                "source": self.job.name,
                "agent": self.job.agent,
                "epoch": self.job.epoch,
                "step": self.job.index,
                "of": self.job.step.span[1],
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
        self.finished = facts["finished"]
        self._resumed = {"tensors": tensors, **facts}
        if "first|first" in facts["agents"]:
            self.ledger, self.agents, self.seed = Ledger(), {}, facts["walk"]["seed"]
            self._begin()
            self.first = self._agent(self.schedule.evaluated)
            self.first.state = self._state("first|first")

    def restored(self) -> None:
        """Say in the log where a resumed run goes on."""
        if self._resumed is not None:
            walk = self._resumed["walk"]
            self.log.rewind(len(self.finished), len(walk["rows"]), walk["ledger"]["steps"])

    def _state(self, name: str) -> State:
        assert self._resumed is not None
        cut = len(name) + 1
        own = {k[cut:]: t.to(self.training.device) for k, t in self._resumed["tensors"].items() if k.startswith(name + "|")}
        return decode_state(own, self._resumed["agents"][name])

    def _restore(self) -> tuple[Mapping[str, Tensor], Mapping[str, int]] | None:
        r = self._resumed
        if r is None or r["walk"]["seed"] != self.seed:
            return None
        walk = r["walk"]
        self.phase, self.learned = walk["phase"], walk["learned"]
        self.rows, self.mapped, self.curve, self.stages = walk["rows"], walk["mapped"], walk["curve"], walk["stages"]
        self.learning, self.failed = walk["learning"], walk["failed"]
        self.drift, self.local, self.personal, self.received = (walk[k] for k in ("drift", "local", "personal", "received"))
        self.ledger.by_agent = walk["ledger"]["by_agent"]
        self.ledger.seconds, self.ledger.steps = walk["ledger"]["seconds"], walk["ledger"]["steps"]
        for name in r["agents"]:
            if name.startswith("agent|"):
                self._agent(name[len("agent|") :]).state = self._state(name)
        job = walk["job"]
        tensors = {k[len("job|") :]: t for k, t in r["tensors"].items() if k.startswith("job|")}
        self._resumed = None
        return (tensors, job) if job is not None else None


def rests(phases: Sequence[Phase], evaluated: str) -> dict[int, tuple[str, ...]]:
    """After which phases which agents rest: those that were heard, and whose next act, if any, is to hear one who heard them and
    never learns itself (a server), so that what it tells is all they had, and adopted."""
    learners = {name for phase in phases if isinstance(phase, Learn) for name in phase.who}
    found: dict[int, tuple[str, ...]] = {}
    then: dict[str, str | None] = {evaluated: None}  # whom an agent hears next, before it does anything else
    for i in reversed(range(len(phases))):
        phase = phases[i]
        if isinstance(phase, Hear):
            heard_by: dict[str, set[str]] = {}
            for listener, speakers in phase.who.items():
                for s in speakers:
                    heard_by.setdefault(s, set()).add(listener)
            idle = [s for s in heard_by if s not in phase.who]
            found[i] = tuple(s for s in idle if then.get(s, next(iter(heard_by[s]))) in heard_by[s] - learners)
            then |= dict.fromkeys(idle)
            then |= {n: speakers[0] if len(speakers) == 1 else None for n, speakers in phase.who.items()}
        else:
            then |= dict.fromkeys(phase.who if isinstance(phase, Learn) else (evaluated, *phase.clients))
    return found


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
        raise ConsilienceError(f"`schedule` should be made by consilience.settings. Found {kind_of(schedule)}.")
    if training is not None and not isinstance(training, Training):
        raise ConsilienceError(f"`training` should be a consilience.Training. Found {kind_of(training)}.")
    if model is None or isinstance(model, Model):
        return model
    if isinstance(model, torch.nn.Module) or callable(model):
        from consilience import models

        return models.wrap(model)
    raise ConsilienceError(f"`model` should be one of consilience.models, or a torch module. Found {kind_of(model)}.")


def give(agent: Agent, expert: Expert) -> None:
    """Make an agent the owner of a trained expert."""
    state = agent.state
    told = {**expert.params, **expert.buffers}  # a state_dict holds both
    params: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for n, p in {**state.params, **state.buffers}.items():
        if n not in told:
            raise ConsilienceError(f"an expert should have the model's entries. Found none called {n!r} in {expert.name!r}.")
        t = torch.as_tensor(told[n]).detach().to(p.device, p.dtype)
        if t.shape != p.shape:
            raise ConsilienceError(
                f"an expert should have the model's shapes. Found {tuple(t.shape)} for {n!r} of {expert.name!r}, here {tuple(p.shape)}."
            )
        (params if n in state.params else buffers)[n] = t
    for n in told.keys() - params.keys() - buffers.keys():
        if agent.model.task_of(n) is None:
            raise ConsilienceError(f"an expert should have no entries but the model's. Found {n!r} in {expert.name!r}.")
        (params if n in expert.params else buffers)[n] = torch.as_tensor(told[n]).detach()
    source = agent.schedule.source(expert.source.name)
    agent.state = state.change(params=params, buffers=buffers, version=1, size=1, learned=True, visits={source.name: 1})
    items = agent.consolidator.export(agent.model, agent.state, (source,), agent.method.personal)
    from consilience.core.message import join

    agent.state = agent.state.change(bank=join({}, [agent._message(s, 1, 1, {"model": i}) for s, i in items.items()]))


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
        return (models.progressive_conv if columns else models.conv)(outputs, channels=shape[0], size=shape[1])
    return (models.progressive if columns else models.mlp)(int(np.prod(shape)), (128,), outputs)


def versions(engine: Engine | None = None) -> dict[str, Any]:
    """What bit-identity rests on: versions, threads, engine, machine."""
    from consilience import __version__

    return {
        "consilience": __version__, "torch": torch.__version__, "python": platform.python_version(), "engine": type(engine).__name__.lower() if engine is not None else "",
        "threads": torch.get_num_threads(), "machine": platform.machine(), "cpus": os.cpu_count() or 0,
    }  # fmt: skip


def describe(schedule: Schedule, method: str, model: Model, training: Training, seed: int, repeats: int) -> dict[str, Any]:
    """The arguments of a run, as config.yaml holds them."""
    plain = {k: v if isinstance(v, (int, float, str, bool, type(None))) else repr(v) for k, v in asdict(training).items()}
    return {
        "setting": schedule.setting, "scenario": schedule.scenario, "sources": [s.name for s in schedule.sources], "method": method,
        "model": repr(model), "training": plain, "seed": seed, "repeats": repeats,
    }  # fmt: skip


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
    shape = {} if type(model).__repr__ is object.__repr__ else {repr(model): torch.zeros(0)}  # of what the model will grow
    plan = [repr(p) for p in schedule.plan(seed)][:1000]
    parts = {f: repr(getattr(method, f)) for f in method.__dataclass_fields__ if is_dataclass(method)}
    return {
        "setting": schedule.setting, "scenario": schedule.scenario, "data": content_hash(data), "schedule": content_hash({"\n".join(plan): torch.zeros(0)}),
        "method": parts, "model": content_hash({**params, **buffers, **shape}), "training": {k: repr(v) for k, v in vars(training).items()}, "seed": seed, "repeats": repeats,
        "metric": metric, "threads": torch.get_num_threads(),
    }  # fmt: skip
