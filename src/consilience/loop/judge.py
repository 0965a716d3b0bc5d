"""What a trial measures: scores per stage, learning curves, client drift, and clients' own scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from consilience.core.message import Message, Weights
from consilience.core.metrics import client_drift
from consilience.core.params import Layout, content_hash
from consilience.core.schedule import Evaluate, Train
from consilience.core.source import Source
from consilience.core.state import State
from consilience.loop.agent import Agent
from consilience.loop.agents import Agents, Setup
from consilience.loop.folder import plain
from consilience.loop.job import Job
from consilience.loop.ledger import Ledger

CHUNK = {"cpu": 512, "cuda": 4096}
"""How many test examples are evaluated at once, by the type of device: what is fastest there."""

KEPT = ("rows", "stages", "mapped", "curve", "learning", "client_drift", "local", "personal", "before")
"""The fields of a Judge that a checkpoint keeps."""


class Score(NamedTuple):
    """One source's score, and the fraction of its test examples that the mapper gave to their own task."""

    metric: float
    mapped: float


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
    """The scores of every source before training and after each stage."""
    stages: list[str] = field(default_factory=list)
    mapped: list[float] = field(default_factory=list)
    """Mapper accuracy after each stage."""
    curve: list[dict[str, float]] = field(default_factory=list)
    learning: list[dict[str, Any]] = field(default_factory=list)
    client_drift: list[dict[str, Any]] = field(default_factory=list)
    local: list[dict[str, Any]] = field(default_factory=list)
    personal: dict[str, float | None] = field(default_factory=dict)
    before: dict[str, list[float]] = field(default_factory=dict)
    """The scores of the agents of a Train phase before it, until it has ended."""

    def kept(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {name: getattr(self, name) for name in KEPT}

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Continue from what `kept` gave."""
        for name in KEPT:
            setattr(self, name, facts[name])

    def result(self) -> dict[str, Any]:
        """Return what the trial found, without costs."""
        names = ("rows", "curve", "learning", "client_drift", "local", "personal")
        stages, mapper = self.stages[1:], self.mapped or None
        return {name: getattr(self, name) for name in names} | {"stages": stages, "mapper": mapper}

    # The evaluated agent.

    def evaluate(self, stage: str) -> None:
        """Score the evaluated agent on every source's test data: one more row of the matrix."""
        scores = self.scores(self.agents[self.setup.schedule.evaluated])
        row = [score.metric for score in scores]
        self.rows.append(row)
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
            warnings.warn(
                f"the metric is undefined on {names}; the mean over sources leaves them out", stacklevel=2
            )

        mean = float(np.nanmean(row)) if len(undefined) < len(row) else float("nan")

        # The score is drawn over costs, so each stage has the costs so far.
        costs = {
            "macs": self.ledger.total("macs"),
            "bytes": self.ledger.total("sent"),
            "seconds": round(self.ledger.clock(), 3),
        }
        self.curve.append({"score": mean, **costs})
        line = {"event": "stage", "repeat": self.repeat, "stage": len(self.rows) - 1, "name": stage}
        self.write({**line, "score": mean, "scores": row, "steps": self.ledger.steps, **costs})

    def _mapper_accuracy(self, scores: Sequence[Score]) -> float:
        """Return the mean mapper accuracy over the sources that were trained on by now."""
        stage, learned_at = len(self.rows) - 1, self.setup.facts.learned_at.values()
        by_now = [
            score.mapped
            for score, stages in zip(scores, learned_at, strict=True)
            if stages and stages[0] <= stage and not np.isnan(score.mapped)
        ]
        return float(np.mean(by_now)) if by_now else float("nan")

    @torch.no_grad()
    def scores(self, agent: Agent) -> list[Score]:
        """Return the scores of an agent on everything that is judged."""
        schedule, mapper = self.setup.schedule, self.setup.method.mapper
        labelled = schedule.labelled or (mapper is not None and mapper.needs_label)

        # Parts of a stream have the same test data: they are judged once.
        found: dict[tuple[int, str | None], Score] = {}
        scores = []
        for source in schedule.judged:
            at = (id(source.test), source.task if labelled or mapper is not None else None)
            if at not in found:
                found[at] = self._score(agent, source, source.task if labelled else None)
            scores.append(found[at])
        return scores

    def _score(self, agent: Agent, source: Source, task: str | None) -> Score:
        """Return the score of an agent on one source's test data; `task` is the label that it is given."""
        schedule = self.setup.schedule
        is_trained = source.task in {other.task for other in schedule.sources}
        answers, targets, right, count = [], [], 0.0, 0
        for x, y in source.test.chunks(chunk(agent.device)):
            prediction = agent.predictor(x, task)
            answers.append(prediction.probabilities.cpu())
            targets.append(y.cpu())

            # Routing is right or wrong only where some expert is of the true task.
            if prediction.weights is not None and is_trained:
                tasks = [schedule.source(name).task for _, name in prediction.keys]
                own = [i for i, other in enumerate(tasks) if other == source.task]
                right += float(sum(prediction.weights[:, i].sum() for i in own))
                count += len(x)

        metric = self.setup.metric(torch.cat(answers), torch.cat(targets))
        return Score(metric, right / count if count else float("nan"))

    @torch.no_grad()
    def add_curve_point(self, job: Job) -> None:
        """Score the sources of a visit with the parameters of this step: a point of the learning curve."""
        for source in job.sources:
            # The parameters are the job's: the agent still has those before the visit.
            task = source.task if self.agents[job.agent].aware else None
            chunks = source.test.chunks(chunk(job.layout.device))
            pairs = [(job.answer(x, task).cpu(), y) for x, y in chunks]
            score = self.setup.metric(torch.cat([p for p, _ in pairs]), torch.cat([y for _, y in pairs]))
            place = {"agent": job.agent, "source": source.name, "epoch": job.epoch, "step": job.index}
            self.learning.append({**place, "steps": self.ledger.steps, "score": score})

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
        for name, sources in phase.clients.items():
            self.personal[name] = self.own_and_others(self.row(self.agents[name]), sources)[0]

    def row(self, agent: Agent, known: dict[str, list[float]] | None = None) -> list[float]:
        """Return the scores of an agent on everything that is judged.

        `known` caches rows by the hash of the parameters, where these alone decide what the agent answers.
        """
        # After an exchange many clients have equal parameters, and scoring is slow.
        has_more = self.setup.method.mapper is not None or agent.choices() or agent.predictor.views
        if known is None or has_more:
            return [score.metric for score in self.scores(agent)]
        content = content_hash({**agent.state.params, **agent.state.buffers})
        if content not in known:
            known[content] = [score.metric for score in self.scores(agent)]
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

        def mean(chosen: Sequence[bool]) -> float | None:
            # A resumed trial has None where JSON cannot hold a NaN.
            kept = [v for v, take in zip(row, chosen, strict=True) if take and v is not None and v == v]
            return float(np.mean(kept)) if kept else None

        return mean(own), mean(others)

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


def chunk(device: torch.device) -> int:
    """Return how many test examples are evaluated at once on a device."""
    return CHUNK["cpu" if device.type == "cpu" else "cuda"]
