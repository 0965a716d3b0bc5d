"""Settings: functions that return a Schedule: who learns which source when, and who hears whom. Signatures import no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from consilience.core.schedule import Expert, Phase, Schedule
    from consilience.core.source import Source

Scenario = Literal["task", "domain", "class"]


def multitask(sources: Sequence[Source], scenario: Scenario = "class", rounds: int = 1) -> Schedule:
    """One agent learns all tasks in each step, then hears itself.

    Args:
        sources: the tasks.
        scenario: what targets and task labels are (see `continual`).
        rounds: how often it goes through all epochs, with an evaluation after each.
    """
    from consilience.core.schedule import Hear, Learn, Stage, build

    names = tuple(s.name for s in _sources(sources))
    _at_least(1, rounds=rounds)

    def plan(seed: int) -> Iterable[Phase]:
        for r in range(rounds):
            yield Learn({"agent": names})
            yield Hear({"agent": ("agent",)})
            yield Stage(f"round {r + 1}")

    return build("multitask", sources, scenario, plan, "agent")


def continual(sources: Sequence[Source], scenario: Scenario = "class", base: Any = None) -> Schedule:
    """One agent learns one source after another, and hears itself after each.

    Args:
        sources: in the order of learning.
        scenario: "task": the task label is given in training and at evaluation; "class": targets are the classes of all
            sources together, no label; "domain": targets are 0..k-1 in every source, no label.
        base: parameters to begin with, such as another run's; None draws them.
    """
    from consilience.core.schedule import Hear, Learn, Stage, build

    sources = _sources(sources)

    def plan(seed: int) -> Iterable[Phase]:
        for s in sources:
            yield Learn({"agent": (s.name,)})
            yield Hear({"agent": ("agent",)})
            yield Stage(s.name)

    return build("continual", sources, scenario, plan, "agent", _common_test(sources, scenario), base=_entries(base))


def online(sources: Sequence[Source], chunk: int = 320, scenario: Scenario = "class", seed: int = 0) -> Schedule:
    """One agent learns a stream that is seen once and does not say where a source ends; it is judged where they do.

    Sources arrive one after another in chunks of `chunk` examples: the agent learns a chunk (in batches of the training's
    size, for one epoch), hears itself, and goes on; a buffer takes in a chunk once it was learned. Methods that must know where a source ends refuse.

    Args:
        sources: in the order of arrival; `data.blurry` mixes them at their boundaries.
        chunk: examples that arrive together; the last of a source may be fewer.
        scenario: what targets and task labels are (see `continual`); with "task" the labels do tell where a source ends, and are
            given with every chunk.
        seed: of the order of a source's examples.
    """
    from dataclasses import replace

    import torch

    from consilience.core.params import key
    from consilience.core.schedule import Hear, Learn, Stage, build

    _at_least(1, chunk=chunk)
    sources = [replace(s, task=s.task or s.name) for s in _sources(sources)]
    if len({s.name for s in sources}) < len(sources):
        from consilience.core.errors import ConsilienceError

        raise ConsilienceError(f"sources should have names of their own. Found {[s.name for s in sources]}.")
    chunks: dict[str, list[Source]] = {}
    for s in sources:
        cuts = torch.randperm(len(s.train), generator=key(seed, s.name, "online")).split(chunk)
        width = len(str(len(cuts) - 1))
        chunks[s.name] = [replace(s, name=f"{s.name}/{i:0{width}d}", train=s.train.select(c)) for i, c in enumerate(cuts)]

    def plan(seed: int) -> Iterable[Phase]:
        for s in sources:
            for c in chunks[s.name]:
                yield Learn({"agent": (c.name,)})
                yield Hear({"agent": ("agent",)})
            yield Stage(s.name)

    every = [c for own in chunks.values() for c in own]
    judged = _common_test(sources, scenario) or sources
    return build("online", every, scenario, plan, "agent", judged, boundaries=False)


def _common_test(sources: Sequence[Source], scenario: str) -> list[Source]:
    """Where all sources are judged on the same test data and no task is told: one source that stands for it; else none."""
    from dataclasses import replace

    first = sources[0]
    if len(sources) < 2 or scenario == "task" or any(s.test is not first.test for s in sources):
        return []
    if scenario == "domain" and any(s.classes != first.classes for s in sources):
        return []
    classes = tuple(sorted({c for s in sources for c in s.classes}))
    return [replace(first, name=f"{first.name.partition('/')[0]}/test", task=None, classes=classes)]


def federated(
    sources: Sequence[Source],
    rounds: int = 20,
    clients_per_round: int | None = None,
    order: Literal["uniform", "cyclic"] = "uniform",
    scenario: Scenario = "class",
    base: Any = None,
) -> Schedule:
    """Clients, a source each, learn every round from what the server tells; the server hears them.

    Args:
        sources: one a client.
        rounds: number of rounds.
        clients_per_round: how many learn in a round; None is all.
        order: "uniform" samples clients by the seed, "cyclic" takes them in turn.
        scenario: what targets and task labels are (see `continual`).
        base: parameters to begin with, such as another run's; None draws them.
    """
    _at_least(1, rounds=rounds)
    streams = [[s] for s in _sources(sources)]
    return federated_continual(streams, rounds, clients_per_round, order, scenario, base, _setting="federated")


def federated_continual(
    streams: Sequence[Sequence[Source]],
    rounds: int = 5,
    clients_per_round: int | None = None,
    order: Literal["uniform", "cyclic"] = "uniform",
    scenario: Scenario = "class",
    base: Any = None,
    _setting: str = "federated_continual",
) -> Schedule:
    """Clients learn streams of sources of their own: for each source of the streams, some rounds with the server.

    Args:
        streams: for each client its sources, in order.
        rounds: rounds for each source of the streams.
        clients_per_round: how many learn in a round; None is all that have a source left.
        order: "uniform" samples clients by the seed, "cyclic" takes them in turn.
        scenario: what targets and task labels are (see `continual`).
        base: parameters to begin with, such as another run's; None draws them.
    """
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import Hear, Learn, Stage, build

    _at_least(1, rounds=rounds)
    if order not in ("uniform", "cyclic"):
        raise ConsilienceError(f"`order` should be uniform or cyclic. Found `order = {order!r}`.")
    streams = [_sources(s) for s in streams]
    if not streams or any(not s for s in streams):
        raise ConsilienceError("every client should have a source. Found one without.")
    if clients_per_round is not None and not 1 <= clients_per_round <= len(streams):
        raise ConsilienceError(f"`clients_per_round` should be from 1 to {len(streams)}. Found {clients_per_round}.")
    width = len(str(len(streams) - 1))
    clients = [f"client-{i:0{width}d}" for i in range(len(streams))]

    def plan(seed: int) -> Iterable[Phase]:
        import torch

        from consilience.core.params import key

        turn = 0
        for t in range(max(len(s) for s in streams)):
            able = [i for i, s in enumerate(streams) if t < len(s)]
            for r in range(rounds):
                k = min(clients_per_round or len(able), len(able))
                if k == len(able):
                    chosen = able
                elif order == "cyclic":
                    chosen = sorted(able[(turn + j) % len(able)] for j in range(k))
                else:
                    chosen = sorted(able[i] for i in torch.randperm(len(able), generator=key(seed, t, r, "clients"))[:k].tolist())
                turn += k
                yield Hear({clients[i]: ("server",) for i in chosen})
                yield Learn({clients[i]: (streams[i][t].name,) for i in chosen})
                yield Hear({"server": tuple(clients[i] for i in chosen)})
                yield Stage(f"round {t * rounds + r + 1}")

    return build(_setting, [s for stream in streams for s in stream], scenario, plan, "server", base=_entries(base))


def merging(
    sources: Sequence[Source] = (),
    experts: Sequence[Expert] = (),
    base: Any = None,
    scenario: Scenario = "class",
) -> Schedule:
    """Agents learn a source each from one base (or the experts are given); one merger hears all of them once, equally weighted.

    Args:
        sources: one an agent; or
        experts: trained models, instead of sources.
        base: parameters that the experts started from; needed by aggregators that combine deltas.
        scenario: what targets and task labels are (see `continual`).
    """
    from consilience.core.schedule import Expert as Given
    from consilience.core.schedule import Hear, Learn, Stage, build

    if sources and isinstance(sources[0], Given):
        experts, sources = sources, ()  # type: ignore[assignment]
    sources, given, names = _experts(sources, experts)

    def plan(seed: int) -> Iterable[Phase]:
        if not given:
            yield Learn({n: (s.name,) for n, s in zip(names, sources, strict=True)})
        yield Hear({"merger": tuple(names)}, by_size=False)
        yield Stage("merged")

    return build("merging", sources, scenario, plan, "merger", experts=given, base=_entries(base))


def exmodel(
    experts: Sequence[Expert] = (),
    sources: Sequence[Source] = (),
    base: Any = None,
    scenario: Scenario = "class",
) -> Schedule:
    """One learner hears one trained expert at a time; nobody gives it data.

    Args:
        experts: trained models in the order of hearing; or
        sources: data that experts are first trained on, from one base.
        base: parameters that the experts started from.
        scenario: what targets and task labels are (see `continual`).
    """
    from consilience.core.schedule import Expert as Given
    from consilience.core.schedule import Hear, Learn, Stage, build

    if experts and not isinstance(experts[0], Given):
        experts, sources = (), experts
    sources, given, names = _experts(sources, experts)

    def plan(seed: int) -> Iterable[Phase]:
        if not given:
            yield Learn({n: (s.name,) for n, s in zip(names, sources, strict=True)})
        for n, s in zip(names, sources, strict=True):
            yield Hear({"learner": (n,)}, by_size=False)
            yield Stage(s.name)

    return build("exmodel", sources, scenario, plan, "learner", experts=given, base=_entries(base))


def skill(
    streams: Sequence[Any],
    share: Literal["task", "end"] = "task",
    graph: Literal["mesh", "ring"] = "mesh",
    scenario: Scenario = "class",
) -> Schedule:
    """Agents learn streams of their own side by side, and tell what they learned over any graph, without a server.

    Args:
        streams: for each agent its sources in order (or one source).
        share: after every task, or once at the end.
        graph: "mesh": everybody hears everybody; "ring": each hears its neighbour and relays, as many times as there are agents.
        scenario: what targets and task labels are (see `continual`).
    """
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import Hear, Learn, Stage, build
    from consilience.core.source import Source as Data

    own = [[s] if isinstance(s, Data) else _sources(s) for s in streams]
    if not own or any(not s for s in own):
        raise ConsilienceError("every agent should have a source. Found one without.")
    if share not in ("task", "end") or graph not in ("mesh", "ring"):
        raise ConsilienceError(f"`share` should be task or end, `graph` mesh or ring. Found {share!r} and {graph!r}.")
    width = len(str(len(own) - 1))
    agents = [f"agent-{i:0{width}d}" for i in range(len(own))]
    stages = max(len(s) for s in own)

    def plan(seed: int) -> Iterable[Phase]:
        for t in range(stages):
            yield Learn({a: (s[t].name,) for a, s in zip(agents, own, strict=True) if t < len(s)})
            if share == "task" or t == stages - 1:
                if graph == "mesh":
                    yield Hear({a: tuple(agents) for a in agents}, by_size=False)
                else:
                    for _ in agents[1:]:
                        yield Hear({a: (agents[i - 1], a) for i, a in enumerate(agents)}, by_size=False)
            yield Stage(f"task {t + 1}")

    return build("skill", [s for stream in own for s in stream], scenario, plan, agents[0])


def leave_one_out(sources: Sequence[Source], setting: Callable[[list[Source]], Schedule]) -> dict[str, Schedule]:
    """For each source the schedule of a setting without it, judged on it alone: how well the others serve one that they never saw.

    A class that only the one left out has counts as never recognised (in scenario "domain" targets are 0..k-1, whatever they mean).

    Args:
        sources: one a client.
        setting: makes a schedule of sources, such as `settings.federated`, or a function that calls it with more arguments.

    Returns:
        {name of the source left out: schedule}.
    """
    from dataclasses import replace

    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import reframe

    sources = _sources(sources)
    if len(sources) < 2:
        raise ConsilienceError(f"to leave one out there should be two sources or more. Found {len(sources)}.")
    found = {}
    for out in sources:
        schedule = setting([s for s in sources if s is not out])
        n = len(schedule.sources)
        framed, frame = reframe([*schedule.sources, out], schedule.scenario)
        tasks = {s.task for s in framed[:n]}
        frame = replace(frame, tasks={t: c for t, c in frame.tasks.items() if t in tasks})
        found[out.name] = replace(schedule, sources=framed[:n], judged=framed[n:], frame=frame)
    return found


def _at_least(low: int, **values: int) -> None:
    from consilience.core.errors import ConsilienceError

    for name, v in values.items():
        if not isinstance(v, int) or v < low:
            raise ConsilienceError(f"`{name}` should be a whole number >= {low}. Found `{name} = {v!r}`.")


def _sources(sources: Any) -> list[Source]:
    """A list of sources."""
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.source import Source as Data

    if isinstance(sources, Data) or not isinstance(sources, list | tuple):
        raise ConsilienceError(
            f"sources should come in a list, as the splits of consilience.data give them. Found {kind_of(sources)}."
        )
    for s in sources:
        if not isinstance(s, Data):
            raise ConsilienceError(f"a source should be made by consilience.data, such as arrays(x, y). Found {kind_of(s)}.")
    return list(sources)


def _experts(sources: Sequence[Source], experts: Sequence[Expert]) -> tuple[list[Source], dict[str, Expert], list[str]]:
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.schedule import Expert
    from consilience.core.source import Source

    if bool(sources) == bool(experts):
        raise ConsilienceError(
            "give either sources to train experts on, or experts. Found " + ("both." if sources else "neither.")
        )
    if experts:
        for e in experts:
            if not isinstance(e, Expert) or not isinstance(e.source, Source):
                raise ConsilienceError(f"an expert should be Expert(name, params, source). Found {kind_of(e)}.")
        given = {e.name: e for e in experts}
        if len(given) != len(experts):
            raise ConsilienceError("experts should have names of their own. Found one twice.")
        return [e.source for e in experts], given, list(given)
    width = len(str(len(sources) - 1))
    sources = _sources(sources)
    return sources, {}, [f"expert-{i:0{width}d}" for i in range(len(sources))]


def _entries(base: Any) -> Any:
    """A base as a dictionary of tensors: given as one, or as a module."""
    if base is None or isinstance(base, dict):
        return base
    return {n: p.detach() for n, p in base.named_parameters()}
