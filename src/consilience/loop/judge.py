"""What a trial measures: scores per stage, learning curves, client drift, and clients' own scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from consilience.core.message import Message, Weights
from consilience.core.metrics import Running, client_drift, mean
from consilience.core.params import Layout, Params, content_hash, matches
from consilience.core.schedule import Evaluate, Train
from consilience.core.source import Examples, Source, masked
from consilience.core.state import State
from consilience.core.warning import warn
from consilience.loop.agent import Agent
from consilience.loop.agents import Agents, Setup
from consilience.loop.folder import plain
from consilience.loop.job import Job
from consilience.loop.ledger import Ledger

CHUNK = {"cpu": 512, "cuda": 4096}
"""How many test examples are evaluated at once, by the type of device: what is fastest there."""

MOST_CLASSES = 100
"""Up to how many classes the answers to each are counted."""

KEPT = (
    "rows",
    "further",
    "stages",
    "mapped",
    "curve",
    "learning",
    "client_drift",
    "local",
    "visits",
    "personal",
    "before",
    "confusion",
)
"""The fields of a Judge that a checkpoint keeps."""


class Score(NamedTuple):
    """One source's scores by metric, and the fraction of examples that the mapper gave to their own task."""

    values: Mapping[str, float]
    """The first is in the matrix."""
    mapped: float

    @property
    def first(self) -> float:
        """The score in the matrix."""
        return next(iter(self.values.values()))


@dataclass(eq=False)
class Judge:
    """All that one trial measures; the fields are what a result is made of."""

    setup: Setup
    agents: Agents
    ledger: Ledger
    repeat: int
    write: Callable[[Mapping[str, Any]], None]
    """Writes a line of the log."""
    rows: list[list[float]] = field(default_factory=list)
    """The scores of every source before training and after each stage, by the first metric of each."""
    further: dict[str, list[list[float]]] = field(default_factory=dict)
    """By each other metric, or by all where the sources' first ones differ; NaN where it is not used."""
    stages: list[str] = field(default_factory=list)
    mapped: list[float] = field(default_factory=list)
    """Mapper accuracy after each stage."""
    curve: list[dict[str, float]] = field(default_factory=list)
    learning: list[dict[str, Any]] = field(default_factory=list)
    client_drift: list[dict[str, Any]] = field(default_factory=list)
    local: list[dict[str, Any]] = field(default_factory=list)
    visits: list[dict[str, Any]] = field(default_factory=list)
    """What corrections say of each visit."""
    personal: dict[str, float | None] = field(default_factory=dict)
    clients: tuple[str, ...] = ()
    """The agents that the present Evaluate phase judges by their own parameters."""
    before: dict[str, list[float]] = field(default_factory=dict)
    """The scores of the agents of a Train phase before it, until it has ended."""
    confusion: list[list[int]] | None = None
    """Test examples by class and answer [C, C + 1], the last for no class, at the last evaluation."""

    def kept(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {name: getattr(self, name) for name in KEPT}

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Continue from what `kept` gave."""
        for name in KEPT:
            setattr(self, name, facts[name])

    def result(self) -> dict[str, Any]:
        """Return what the trial found, without costs."""
        names = ("rows", "further", "client_drift", "visits", "personal", "confusion")
        stages, mapper = self.stages[1:], self.mapped or None
        found = {name: getattr(self, name) for name in names} | {"stages": stages, "mapper": mapper}
        # Undefined scores are None, as they are in files: a resumed run has its first ones from there.
        return found | {name: plain(getattr(self, name)) for name in ("curve", "learning", "local")}

    # The evaluated agent.

    def evaluate(self, stage: str) -> None:
        """Score the evaluated agent on every source's test data: one more row of the matrix.

        With personal entries, the agent that trained on a source answers for it: no server has its head.
        """
        counts = self._no_counts()
        scores = self.scores(None, counts)
        row = [score.first for score in scores]
        self.rows.append(row)
        self.confusion = None if counts is None else counts.tolist()
        further = {name: [score.values.get(name, math.nan) for score in scores] for name in self.names}
        for name, values in further.items():
            self.further.setdefault(name, []).append(values)
        self.stages.append(stage)
        if len(self.rows) > 1 and self.setup.method.mapper is not None:
            self.mapped.append(self._mapper_accuracy(scores))

        # Some metrics need several classes, which a small test set may lack.
        undefined = [
            source.name
            for source, value in zip(self.setup.schedule.judged, row, strict=True)
            if np.isnan(value)
        ]
        if undefined and len(self.rows) == 1:
            names = ", ".join(undefined[:3]) + " .." * (len(undefined) > 3)
            warn(f"the metric is undefined on {names}; the mean over sources leaves them out")

        # Scores by different metrics have no mean.
        score = math.nan if self.mixed else float(mean(row))
        scored: dict[str, Any] = {"score": score}
        if further:
            scored["metrics"] = {name: float(mean(values)) for name, values in further.items()}

        # The score is drawn over costs, so each stage has the costs so far.
        costs = {
            "macs": self.ledger.total("macs"),
            "bytes": self.ledger.total("sent"),
            "seconds": round(self.ledger.clock(), 3),
        }
        self.curve.append({**scored, **costs})
        line = {"event": "stage", "repeat": self.repeat, "stage": len(self.rows) - 1, "name": stage}
        self.write({**line, **scored, "scores": row, "steps": self.ledger.steps, **costs})

    def validation(self) -> float:
        """Return the mean score of the evaluated agent on the validation data of all sources."""
        agent, owners = self.agents[self.setup.schedule.evaluated], self.owners()
        scores = [
            self.score(owners.get(source.name, agent), source.validation, source)
            for source in self.setup.schedule.sources
        ]
        return float(mean([score.first for score in scores]))

    def _mapper_accuracy(self, scores: Sequence[Score]) -> float:
        """Return the mean mapper accuracy over the sources that were trained on by now."""
        stage, learned_at = len(self.rows) - 1, self.setup.facts.learned_at.values()
        by_now = [
            score.mapped
            for score, stages in zip(scores, learned_at, strict=True)
            if stages and stages[0] <= stage and not np.isnan(score.mapped)
        ]
        return float(np.mean(by_now)) if by_now else float("nan")

    @cached_property
    def mixed(self) -> bool:
        """Whether the first metric of some judged source is another than that of others."""
        return len({self.first_metric(source.name) for source in self.setup.schedule.judged}) > 1

    @cached_property
    def names(self) -> list[str]:
        """The names of the metrics of `further`."""
        judged = [self.setup.metrics[source.name] for source in self.setup.schedule.judged]
        # The first metric of all is in `rows` already.
        ranked = [metrics[0] for metrics in judged] if self.mixed else []
        ranked += [metric for metrics in judged for metric in metrics[1:]]
        return list(dict.fromkeys(metric.name for metric in ranked))

    def first_metric(self, source: str) -> str:
        """Return the name of the metric by which a source is scored in the matrix."""
        return self.setup.metrics[source][0].name

    def own_models(self, clients: Collection[str]) -> dict[str, Agent]:
        """Return the agents that have models of their own, by name: those that no server sends all of it.

        With personal entries, a client answers with these over the server's parameters, but for `clients`,
        which have trained since they received.
        """
        server, personal = self.agents[self.setup.schedule.evaluated], self.setup.method.personal
        found: dict[str, Agent] = {}
        for name, agent in self.agents.items():
            # An agent that trains itself is no server, but a peer.
            if personal and name not in clients and agent is not server and not server.state.visits:
                found[name] = replace(agent, state=over(server.state, agent.state, personal))
            elif agent.state.base:
                found[name] = agent
        return found

    def owners(self) -> dict[str, Agent]:
        """Return, for a method with personal entries, the only agent that trained on each source."""
        if not self.setup.method.personal or not self.setup.facts.receives_others:
            return {}
        found: dict[str, list[Agent]] = {}
        for agent in self.own_models(self.clients).values():
            for source in agent.state.visits:
                found.setdefault(source, []).append(agent)
        return {source: agents[0] for source, agents in found.items() if len(agents) == 1}

    def scores(self, agent: Agent | None, counts: Tensor | None = None) -> list[Score]:
        """Return the scores of an agent on everything that is judged; None: as `evaluate` says.

        To `counts` [C, C + 1] the answers are added, by class and answer.
        """
        owners = self.owners() if agent is None else {}
        agent = agent or self.agents[self.setup.schedule.evaluated]
        # Parts of a stream have the same test data: they are judged once.
        found: dict[tuple[object, ...], Score] = {}
        scores = []
        for source in self.setup.schedule.judged:
            task = source.task if self._labelled or self.setup.method.mapper is not None else None
            names = [metric.name for metric in self.setup.metrics[source.name]]
            answering = owners.get(source.name, agent)
            at = (answering.name, id(source.test), task, source.target, *names)
            if at not in found:
                found[at] = self.score(answering, source.test, source, counts)
            scores.append(found[at])
        return scores

    @property
    def _labelled(self) -> bool:
        """Whether the agent is given the task of test data."""
        mapper = self.setup.method.mapper
        return self.setup.schedule.labelled or (mapper is not None and mapper.needs_label)

    @torch.no_grad()
    def score(self, agent: Agent, examples: Examples, source: Source, counts: Tensor | None = None) -> Score:
        """Return the scores of an agent on examples of a source, such as its test data, chunk by chunk."""
        schedule = self.setup.schedule
        is_trained = source.task in {other.task for other in schedule.sources}
        measured = [metric.running() for metric in self.setup.metrics[source.name]]
        right, count = 0.0, 0
        for x, y in examples.chunks(chunk(agent.device)):
            prediction = agent.predictor(x, source.task if self._labelled else None)
            answer = self._own_answer(prediction.probabilities, y, source)
            for metric in measured:
                metric.update(answer, y)
            if counts is not None:
                counts += confusion_of(prediction.probabilities, y).to(counts.device)

            # Routing is right or wrong only where some expert is of the true task.
            if prediction.weights is not None and is_trained:
                tasks = [schedule.source(name).task for _, name in prediction.keys]
                own = [i for i, other in enumerate(tasks) if other == source.task]
                right += float(sum(prediction.weights[:, i].sum() for i in own))
                count += len(x)
        return Score(values_of(measured), right / count if count else math.nan)

    def _no_counts(self) -> Tensor | None:
        """Return counts of zero by class and answer; None where targets are no classes, or of too many."""
        schedule = self.setup.schedule
        frame, classes = schedule.frame, len(schedule.frame.labels)
        counted = frame.kind == "class" and len(frame.targets) == 1 and classes <= MOST_CLASSES
        if not counted or any(source.places for source in schedule.judged):
            return None
        return torch.zeros(classes, classes + 1, dtype=torch.long, device=self.setup.training.device)

    def _own_answer(self, answer: Tensor, y: Tensor, source: Source) -> Tensor:
        """Return the part of an answer [B, C, *places] that a source's targets are compared with."""
        frame = self.setup.schedule.frame
        target = frame.targets[source.target]
        if target.kind != "class" or len(frame.targets) == 1:
            return target.own(answer, y)
        # A value next to the probabilities of classes is no class.
        return masked(answer, target.columns, fill=0)

    @torch.no_grad()
    def score_job(self, job: Job, examples: Examples, source: Source) -> Score:
        """Return the scores of a visit's parameters at this step on examples of one of its sources."""
        # The parameters are the job's: the agent still has those before the visit.
        task = source.task if self.agents[job.agent].aware else None
        measured = [metric.running() for metric in self.setup.metrics[source.name]]
        for x, y in examples.chunks(chunk(job.layout.device)):
            answer = self._own_answer(job.answer(x, task), y, source)
            for metric in measured:
                metric.update(answer, y)
        return Score(values_of(measured), math.nan)

    def add_curve_point(self, job: Job) -> None:
        """Score the sources of a visit with the parameters of this step: a point of the learning curve."""
        for source in job.sources:
            score = self.score_job(job, source.test, source)
            place = {"agent": job.agent, "source": source.name, "epoch": job.epoch, "step": job.index}
            point = {**place, "steps": self.ledger.steps, "score": score.first}
            self.learning.append({**point, "metrics": dict(score.values)} if self.names else point)

    def add_visit(self, agent: str, line: Mapping[str, Any]) -> None:
        """Keep what corrections say of a visit."""
        place = {"stage": len(self.rows), "agent": agent, "sources": line["sources"]}
        self.visits.append({**place, **line["figures"]})

    # Clients, by their own parameters (`judge_clients`).

    def before_visits(self, phase: Train) -> None:
        """Score the agents of a Train phase before they train."""
        # A resumed phase has the scores from before the interruption.
        if self.setup.judge_clients and not self.before:
            known: dict[str, list[float]] = {}
            self.before = {name: self.row(self.agents[name], known) for name in phase.who}

    def after_visits(self, phase: Train, failed: Mapping[str, str]) -> None:
        """Score them again: what training changed on their own test data and on all others'."""
        for name, row in self.before.items():
            # A failed agent has no parameters after its visit.
            if name in failed:
                continue
            own, others = self.own_and_others(row, phase.who[name])
            own_after, others_after = self.own_and_others(self.row(self.agents[name]), phase.who[name])
            change = {
                "own_before": own,
                "own_after": own_after,
                "others_before": others,
                "others_after": others_after,
            }
            self.local.append({"stage": len(self.rows), "agent": name, **change})
            self.personal[name] = own_after
        self.before = {}

    def judge_clients(self, phase: Evaluate) -> None:
        """Score the clients of an Evaluate phase on their own test data."""
        self.clients = tuple(phase.clients)
        for name, sources in phase.clients.items():
            self.personal[name] = self.own_and_others(self.row(self.agents[name]), sources)[0]

    def row(self, agent: Agent, known: dict[str, list[float]] | None = None) -> list[float]:
        """Return the scores of an agent on everything that is judged.

        `known` caches rows by the hash of the parameters, where these alone decide what the agent answers.
        """
        # After an exchange many clients have equal parameters, and scoring is slow.
        has_more = self.setup.method.mapper is not None or agent.choices() or agent.predictor.views
        if known is None or has_more:
            return [score.first for score in self.scores(agent)]
        content = content_hash({**agent.state.params, **agent.state.buffers})
        if content not in known:
            known[content] = [score.first for score in self.scores(agent)]
        return known[content]

    def own_and_others(
        self, row: Sequence[float | None], names: Sequence[str]
    ) -> tuple[float | None, float | None]:
        """Return the means of a row over the test data of these sources, and over all others'."""
        schedule = self.setup.schedule
        tests = {id(schedule.source(name).test) for name in names}

        # Parts of a stream share the test data of what they are parts of, other sources have names.
        own_tests = schedule.judged is not schedule.sources
        own = [id(s.test) in tests if own_tests else s.name in names for s in schedule.judged]
        others = [id(s.test) not in tests for s in schedule.judged]

        def mean_of(chosen: Sequence[bool]) -> float | None:
            # A resumed trial has None where JSON cannot hold a NaN.
            kept = [v for v, take in zip(row, chosen, strict=True) if take and v is not None and v == v]
            names = {
                self.first_metric(s.name) for s, take in zip(schedule.judged, chosen, strict=True) if take
            }
            return float(np.mean(kept)) if kept and len(names) == 1 else None

        return mean_of(own), mean_of(others)

    def measure_drift(self, agent: Agent, before: State, messages: Sequence[Message]) -> None:
        """Measure how far clients went that started from this agent's parameters, against its own step."""
        base = agent.common_hash(before.base)
        items = [m.items.get("model") for m in messages if m.trained and m.base == base]
        clients = [item.group("params") for item in items if isinstance(item, Weights)]

        # One client cannot drift apart from others.
        if len(clients) < 2:
            return

        # Heads of single tasks and frozen entries say nothing about drift.
        model = self.setup.model
        common: dict[str, Tensor] = {
            name: p
            for name, p in before.params.items()
            if p.is_floating_point()
            and model.task_of(name) is None
            and not model.frozen(name)
            and all(name in client for client in clients)
        }
        layout = Layout.of(common)
        rows = torch.stack([layout.flatten(client) for client in clients])
        found = client_drift(layout.flatten(before.base), layout.flatten(agent.state.params), rows)
        place = {"stage": len(self.rows), "agent": agent.name, "clients": len(clients)}
        self.client_drift.append({**place, **plain(found)})


def over(server: State, client: State, personal: Sequence[str]) -> State:
    """Return a client's state with the server's parameters and buffers under its personal entries."""

    def combined(common: Params, own: Params) -> Params:
        # Heads of its task may be the client's alone.
        kept = {name: t for name, t in own.items() if name not in common or matches(name, personal)}
        return {**common, **kept}

    params = combined(server.params, client.params)
    return client.change(params=params, buffers=combined(server.buffers, client.buffers), base=params)


def confusion_of(p: Tensor, y: Tensor) -> Tensor:
    """Return how many examples of each class [C] have each answer [C + 1]; the last is no class.

    Probabilities p [B, C] of zero, or that are not finite, are no answer; examples without target are left
    out.

    >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.0, 0.0]])
    >>> confusion_of(p, torch.tensor([0, 0, 1, 1])).tolist()
    [[1, 1, 0], [1, 0, 1]]
    """
    classes = p.shape[1]
    y = y.to(p.device)
    top, answer = p.max(1)
    answer = answer.where(top > 0, classes)  # a comparison with NaN is false
    kept = (y >= 0).long()
    counts = torch.zeros(classes * (classes + 1), dtype=torch.long, device=p.device)
    return counts.index_add_(0, y.clamp_min(0) * (classes + 1) + answer, kept).view(classes, classes + 1)


def values_of(measured: Sequence[Running]) -> dict[str, float]:
    """Return the values of metrics by their names."""
    return {running.metric.name: running.value() for running in measured}


def chunk(device: torch.device) -> int:
    """Return how many test examples are evaluated at once on a device."""
    return CHUNK["cpu" if device.type == "cpu" else "cuda"]
