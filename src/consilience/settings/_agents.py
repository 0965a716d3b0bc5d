"""Agents without a server that train on streams of their own, and exchange over a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.schedule import Evaluate, Exchange, Phase, Train
from consilience.core.source import Source
from consilience.settings._rounds import Neighbours, neighbours


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """Agents with their streams, and the stages in which each of them is present.

    Stages count from 1. An agent is present from the stage in `joins`, and before the one in `fails` (None:
    to the end). `share` is "task" or "end", as in `consilience.settings.skill`.
    """

    agents: Sequence[str]
    streams: Sequence[Sequence[Source]]
    near: Neighbours
    joins: Sequence[int]
    fails: Sequence[int | None]
    stages: int
    share: str

    def present(self, stage: int) -> list[int]:
        """Return the agents that are present in a stage."""
        return [
            i
            for i, (join, fail) in enumerate(zip(self.joins, self.fails, strict=True))
            if join <= stage and (fail is None or stage < fail)
        ]

    def phases(self) -> Iterator[Phase]:
        """Yield the phases of all stages: new agents catch up, all train, then share and are evaluated."""
        shared = False
        for stage in range(1, self.stages + 1):
            present = self.present(stage)
            new = [i for i in present if self.joins[i] == stage]
            if shared and new:
                yield from self._catch_up(new, present)

            training = self._training(stage, present)
            if training:
                yield Train(training)

            # Without training and without new agents there is nothing new to share.
            shares = training or new if self.share == "task" else stage == self.stages
            if shares:
                shared = True
                yield from self._spread(present)
            yield Evaluate(f"task {stage}")

    def _training(self, stage: int, present: Sequence[int]) -> dict[str, tuple[str, ...]]:
        """Return the source of each agent whose stream is not over."""
        positions = {i: stage - self.joins[i] for i in present}
        return {
            self.agents[i]: (self.streams[i][position].name,)
            for i, position in positions.items()
            if position < len(self.streams[i])
        }

    def _catch_up(self, new: Sequence[int], present: Sequence[int]) -> Iterator[Phase]:
        """Send the agents that join what was shared before.

        From each part of the graph they receive it through one neighbour, which may itself have joined and
        received it just before.
        """
        old = [i for i in present if i not in new]
        # Messages are relayed, so that an agent far from the old ones needs several exchanges.
        distance = self._distances(set(old), present)

        # Agents of one part have shared everything with each other, so one of them stands for all.
        part = {i: min(self._distances({i}, old)) for i in old}
        for step in range(1, max(distance.values(), default=0) + 1):
            senders: dict[str, tuple[str, ...]] = {}
            for i in (i for i in new if distance.get(i) == step):
                nearer = [j for j in self.near[i] if distance.get(j) == step - 1]

                # Reversed, so that the first neighbour of each part is kept.
                one = {part.get(j, j): j for j in reversed(nearer)}
                senders[self.agents[i]] = tuple(self.agents[j] for j in sorted(one.values()))
            yield Exchange(senders, by_size=False)

    def _spread(self, present: Sequence[int]) -> Iterator[Phase]:
        """Exchange between all neighbours, as often as the news of any agent takes to reach all others."""
        receives = {i: sorted({i, *self.near[i]} & set(present)) for i in present}
        exchange = Exchange(
            {self.agents[i]: tuple(self.agents[j] for j in own) for i, own in receives.items()}, by_size=False
        )
        diameter = max((max(self._distances({i}, present).values()) for i in present), default=0)
        for _ in range(max(1, diameter)):
            yield exchange

    def _distances(self, start: set[int], among: Sequence[int]) -> dict[int, int]:
        """Count the exchanges until news of `start` reaches each agent that it can reach."""
        distance, front, allowed = dict.fromkeys(start, 0), set(start), set(among)
        while front and len(distance) < len(allowed):
            front = {j for i in front for j in self.near[i] if j in allowed} - distance.keys()
            distance |= dict.fromkeys(front, max(distance.values(), default=0) + 1)
        return distance


def lifetimes(
    agents: Sequence[str],
    streams: Sequence[Sequence[Source]],
    graph: Any,
    joins: Any,
    fails: Any,
    share: str,
) -> Lifetimes:
    """Return the lifetimes of agents, with all arguments of `consilience.settings.skill` checked."""
    count = len(agents)
    near = _graph(graph, agents)
    given = _stages("joins", joins, agents)
    first = [given.get(i, 1) for i in range(count)]
    if min(first) > 1:
        raise ConsilienceError(
            f"some agent must be present from the first stage, got `joins={dict(joins)}` for all {count}."
        )

    stages = max(join + len(stream) - 1 for join, stream in zip(first, streams, strict=True))
    # The last stage follows from streams and joins alone: an agent that fails does not shorten the run.
    gone = _stages("fails", fails, agents)
    for i, stage in gone.items():
        if not first[i] < stage <= stages:
            raise ConsilienceError(
                "an agent must fail in a stage after the one in which it joins, "
                f"from {first[i] + 1} to {stages}, got `fails={{{i}: {stage}}}`."
            )
    return Lifetimes(agents, streams, near, first, [gone.get(i) for i in range(count)], stages, share)


def _graph(graph: Any, agents: Sequence[str]) -> Neighbours:
    """Return the neighbours of each agent."""
    if isinstance(graph, str):
        if graph not in ("mesh", "ring"):
            raise ConsilienceError(f"`graph` must be mesh, ring or a list of pairs of agents, got {graph!r}.")
        graph = "complete" if graph == "mesh" else "ring"
    if len(agents) > 1:
        return neighbours(_numbered(graph, agents), len(agents), 2)(0, 0, 0)

    # One agent alone is allowed, and has nobody to share with.
    if not isinstance(graph, str) and list(graph):
        raise ConsilienceError(f"`graph` must have no edges for one agent alone, got {next(iter(graph))!r}.")
    return [()]


def _numbered(graph: Any, agents: Sequence[str]) -> Any:
    """Replace the names of agents in edges by numbers; leave anything that is no edge as it is."""
    if isinstance(graph, str) or not isinstance(graph, Iterable):
        return graph

    def numbers(edge: Any) -> Any:
        if isinstance(edge, str) or not isinstance(edge, Sequence):
            return edge
        return tuple(position("graph", agent, agents) for agent in edge)

    return [numbers(edge) for edge in graph]


def agent_names(streams: Mapping[Any, Any]) -> list[str]:
    """Check the names of the agents, and return them."""
    for name in streams:
        if not isinstance(name, str) or not name or "|" in name:
            raise ConsilienceError(f"an agent's name must be text without '|', and not empty, got {name!r}.")
    return list(streams)


def position(what: str, agent: Any, agents: Sequence[str]) -> Any:
    """Return the number of an agent that is given by its name; leave anything else as it is."""
    if not isinstance(agent, str):
        return agent
    if agent in agents:
        return agents.index(agent)

    # Configurations and the command line give numbers as text. An agent of that name was found above.
    if agent.strip().lstrip("+-").replace(".", "", 1).isdigit():
        return agent
    raise unknown(what, agent, agents, "the agents")


def _stages(name: str, given: Any, agents: Sequence[str]) -> dict[int, int]:
    """Return {agent: stage}, checked; numbers may be given as text."""
    count = len(agents)
    pairs = [(position(name, i, agents), at) for i, at in given.items()] if isinstance(given, Mapping) else []
    try:
        stages = {int(i): int(at) for i, at in pairs}

        # 1.5 must not become 1, nor may an agent be given both by name and by number.
        whole = all(float(i) in stages and float(at) == stages[int(i)] for i, at in pairs)
        in_range = all(0 <= i < count and at >= 1 for i, at in stages.items())
        valid = whole and in_range and len(stages) == len(pairs)
    except (TypeError, ValueError):
        valid = False
    if not valid or (given is not None and not isinstance(given, Mapping)):
        raise ConsilienceError(
            f"`{name}` must map agents from 0 to {count - 1} to a stage from 1 on, got {given!r}."
        )
    return stages


def check_task_names(sources: Sequence[Source]) -> None:
    """Refuse two tasks with one name.

    Sources of one task are parts of it only if their classes have a label space in common. Names that differ
    in dots and underscores alone clash too: the entries of their heads would have the same names.
    """
    first: dict[str, tuple[str, set[str]]] = {}
    for source in sources:
        task = source.task or source.name
        spaces = {source.labels[label][0] for label in source.classes}
        name, seen = first.setdefault(task.replace(".", "_"), (task, spaces))
        if name != task or (spaces and not seen & spaces):
            also = f" and {name!r}" if name != task else ""
            raise ConsilienceError(
                f"tasks must have names of their own, got {task!r}{also} "
                f"for {', '.join(sorted(seen)) or 'values'}, and again in {source.name!r}."
            )
        seen |= spaces
