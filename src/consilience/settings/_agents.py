"""Agents without a server that learn streams of their own: who is there when, whom each hears, and how often news must be relayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.schedule import Evaluate, Exchange, Phase, Train
from consilience.core.source import Source
from consilience.settings._rounds import Pairs, neighbours


@dataclass(frozen=True, eq=False)
class Lives:
    """Agents with their streams, the stage in which each joins, and the one in which it fails (None: it lives to the end)."""

    agents: Sequence[str]
    streams: Sequence[Sequence[Source]]
    near: Pairs
    joins: Sequence[int]
    fails: Sequence[int | None]
    stages: int
    share: str

    def there(self, stage: int) -> list[int]:
        """Who is there in a stage."""
        return [
            i
            for i, (j, f) in enumerate(zip(self.joins, self.fails, strict=True))
            if j <= stage and (f is None or stage < f)
        ]

    def plan(self) -> Iterator[Phase]:
        """The phases."""
        told = False
        for stage in range(1, self.stages + 1):
            here = self.there(stage)
            new = [i for i in here if self.joins[i] == stage]
            if told and new:
                yield from self._welcome(new, here)
            own = {i: stage - self.joins[i] for i in here}
            learn = {
                self.agents[i]: (self.streams[i][t].name,) for i, t in own.items() if t < len(self.streams[i])
            }
            if learn:
                yield Train(learn)
            if (learn or new) if self.share == "task" else stage == self.stages:
                told = True
                for _ in range(max([1, *(max(self._far({i}, here).values()) for i in here)])):
                    yield self._everybody(here)
            yield Evaluate(f"task {stage}")

    def _welcome(self, new: Sequence[int], here: Sequence[int]) -> Iterator[Phase]:
        """Who comes hears what was told before: of each part of the graph from one neighbour, or from others that came and heard."""
        old = [i for i in here if i not in new]
        far = self._far(set(old), here)
        part = {i: min(self._far({i}, old)) for i in old}
        for turn in range(1, max(far.values(), default=0) + 1):
            now: dict[str, tuple[str, ...]] = {}
            for i in (i for i in new if far.get(i) == turn):
                nearer = [j for j in self.near[i] if far.get(j) == turn - 1]
                one = {part.get(j, j): j for j in reversed(nearer)}
                now[self.agents[i]] = tuple(self.agents[j] for j in sorted(one.values()))
            yield Exchange(now, by_size=False)

    def _everybody(self, here: Sequence[int]) -> Exchange:
        heard = {i: sorted({i, *self.near[i]} & set(here)) for i in here}
        return Exchange(
            {self.agents[i]: tuple(self.agents[j] for j in own) for i, own in heard.items()}, by_size=False
        )

    def _far(self, start: set[int], here: Sequence[int]) -> dict[int, int]:
        """How many times news of `start` is passed on until each that it can reach has it."""
        far, front, among = dict.fromkeys(start, 0), set(start), set(here)
        while front and len(far) < len(among):
            front = {j for i in front for j in self.near[i] if j in among} - far.keys()
            far |= dict.fromkeys(front, max(far.values(), default=0) + 1)
        return far


def lives(
    agents: Sequence[str], streams: Sequence[Sequence[Source]], graph: Any, joins: Any, fails: Any, share: str
) -> Lives:
    """Who is there when, all arguments checked."""
    n = len(agents)
    if isinstance(graph, str):
        if graph not in ("mesh", "ring"):
            raise ConsilienceError(
                f"`graph` should be mesh, ring or a list of pairs of agents. Found `graph = {graph!r}`."
            )
        graph = "complete" if graph == "mesh" else "ring"
    if n == 1 and not isinstance(graph, str) and list(graph):
        raise ConsilienceError(
            f"`graph` should have no edges where one agent is alone. Found {next(iter(graph))!r}."
        )
    near: Pairs = neighbours(_edges(graph, agents), n, 2)(0, 0, 0) if n > 1 else [()]
    start = _stages("joins", joins, agents)
    first = [start.get(i, 1) for i in range(n)]
    if min(first) > 1:
        raise ConsilienceError(
            f"some agent should be there from the first stage. Found `joins = {dict(joins)}` for all {n}."
        )
    stages = max(j + len(s) - 1 for j, s in zip(first, streams, strict=True))
    gone = _stages("fails", fails, agents)
    for i, at in gone.items():
        if not first[i] < at <= stages:
            raise ConsilienceError(
                f"an agent should fail in a stage after the one in which it joins, from {first[i] + 1} to {stages}. "
                f"Found `fails = {{{i}: {at}}}`."
            )
    return Lives(agents, streams, near, first, [gone.get(i) for i in range(n)], stages, share)


def named(streams: Mapping[Any, Any]) -> list[str]:
    """The agents' names, checked."""
    for name in streams:
        if not isinstance(name, str) or not name or "|" in name:
            raise ConsilienceError(
                f"an agent's name should be text without '|', and not empty. Found {name!r}."
            )
    return list(streams)


def position(what: str, agent: Any, agents: Sequence[str]) -> Any:
    """The number of an agent that is given by its name; anything else as it is."""
    if not isinstance(agent, str):
        return agent
    if agent in agents:
        return agents.index(agent)
    if agent.strip().lstrip("+-").replace(".", "", 1).isdigit():  # a number, as text
        return agent
    raise unknown(what, agent, agents, "the agents")


def _edges(graph: Any, agents: Sequence[str]) -> Any:
    """The edges with names of agents put into numbers; what are no edges as it is."""
    if isinstance(graph, str) or not isinstance(graph, Iterable):
        return graph

    def numbered(e: Any) -> Any:
        if isinstance(e, str) or not isinstance(e, Sequence):
            return e
        return tuple(position("graph", a, agents) for a in e)

    return [numbered(e) for e in graph]


def _stages(name: str, given: Any, agents: Sequence[str]) -> dict[int, int]:
    """{agent: stage}, checked; numbers may come as text, as they do from configurations."""
    n = len(agents)
    held = [(position(name, i, agents), at) for i, at in given.items()] if isinstance(given, Mapping) else []
    try:
        found = {int(i): int(at) for i, at in held}
        whole = all(float(i) in found and float(at) == found[int(i)] for i, at in held)
        good = whole and all(0 <= i < n and at >= 1 for i, at in found.items()) and len(found) == len(held)
    except (TypeError, ValueError):
        good = False
    if not good or (given is not None and not isinstance(given, Mapping)):
        raise ConsilienceError(
            f"`{name}` should say for agents from 0 to {n - 1} a stage from 1 on. Found `{name} = {given!r}`."
        )
    return found


def apart(sources: Sequence[Source]) -> None:
    """Refuse two tasks of one name: sources of one task whose classes are of different spaces, so that they are not parts of one;
    and names that differ in dots and underscores alone, which are the same in the entries of heads."""
    first: dict[str, tuple[str, set[str]]] = {}
    for s in sources:
        task = s.task or s.name
        spaces = {s.labels[c][0] for c in s.classes}
        name, seen = first.setdefault(task.replace(".", "_"), (task, spaces))
        if name != task or (spaces and not seen & spaces):
            also = f" and {name!r}" if name != task else ""
            raise ConsilienceError(
                f"tasks should have names of their own. Found {task!r}{also} for {', '.join(sorted(seen)) or 'values'}, and again in {s.name!r}."
            )
        seen |= spaces
