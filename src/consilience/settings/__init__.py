"""Settings: functions that return a Schedule: who learns which source when, and who hears whom. Signatures import no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from consilience.core.schedule import Expert, Phase, Schedule
    from consilience.core.source import Source

    Available = Sequence[Sequence[int]] | Mapping[int, Sequence[int]] | Callable[[int, int], Sequence[int]]

Scenario = Literal["task", "domain", "class"]


def multitask(sources: Sequence[Source], scenario: Scenario = "class", rounds: int = 1) -> Schedule:
    """One agent learns all tasks in each step, then hears itself.

    Args:
        sources: the tasks.
        scenario: what targets and task labels are (see `continual`).
        rounds: how often it goes through all epochs, with an evaluation after each.
    """
    from consilience.core.schedule import Evaluate, Exchange, Train, build

    names = tuple(s.name for s in _sources(sources))
    _at_least(1, rounds=rounds)

    def plan(seed: int) -> Iterable[Phase]:
        for r in range(rounds):
            yield Train({"agent": names})
            yield Exchange({"agent": ("agent",)})
            yield Evaluate(f"round {r + 1}")

    return build("multitask", sources, scenario, plan, "agent")


def continual(sources: Sequence[Source], scenario: Scenario = "class", base: Any = None) -> Schedule:
    """One agent learns one source after another, and hears itself after each.

    Args:
        sources: in the order of learning.
        scenario: "task": the task label is given in training and at evaluation; "class": targets are the classes of all
            sources together, no label; "domain": targets are 0..k-1 in every source, no label.
        base: parameters to begin with, such as another run's; None draws them.
    """
    from consilience.core.schedule import Evaluate, Exchange, Train, build

    sources = _sources(sources)

    def plan(seed: int) -> Iterable[Phase]:
        for s in sources:
            yield Train({"agent": (s.name,)})
            yield Exchange({"agent": ("agent",)})
            yield Evaluate(s.name)

    return build(
        "continual", sources, scenario, plan, "agent", _common_test(sources, scenario), base=_entries(base)
    )


def online(
    sources: Sequence[Source], chunk: int = 320, scenario: Scenario = "class", seed: int = 0
) -> Schedule:
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
    from consilience.core.schedule import Evaluate, Exchange, Train, build

    _at_least(1, chunk=chunk)
    sources = [replace(s, task=s.task or s.name) for s in _sources(sources)]
    if len({s.name for s in sources}) < len(sources):
        from consilience.core.errors import ConsilienceError

        raise ConsilienceError(f"sources should have names of their own. Found {[s.name for s in sources]}.")
    chunks: dict[str, list[Source]] = {}
    for s in sources:
        cuts = torch.randperm(len(s.train), generator=key(seed, s.name, "online")).split(chunk)
        width = len(str(len(cuts) - 1))
        chunks[s.name] = [
            replace(s, name=f"{s.name}/{i:0{width}d}", train=s.train.select(c)) for i, c in enumerate(cuts)
        ]

    def plan(seed: int) -> Iterable[Phase]:
        for s in sources:
            for c in chunks[s.name]:
                yield Train({"agent": (c.name,)})
                yield Exchange({"agent": ("agent",)})
            yield Evaluate(s.name)

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
    order: Literal["uniform", "cyclic", "weighted"] = "uniform",
    scenario: Scenario = "class",
    participation: float | None = None,
    weights: Sequence[float] | None = None,
    available: Available | None = None,
    stragglers: float = 0.0,
    dropouts: float = 0.0,
    min_clients: int | None = None,
    by_size: bool = True,
    evaluate_every: int = 1,
    personalise: bool = False,
    base: Any = None,
) -> Schedule:
    """Clients, a source each, learn every round from what the server tells; the server hears them.

    Who takes part is drawn by the seed and the round alone.

    Args:
        sources: one a client.
        rounds: number of rounds.
        clients_per_round: how many learn in a round; None is all.
        order: "uniform" samples clients by the seed, "cyclic" takes them in turn, "weighted" samples them one after another, each
            in proportion to `weights` among those that are left.
        scenario: what targets and task labels are (see `continual`).
        participation: the fraction of the clients that learn in a round, in (0, 1], instead of their number; at least one does.
        weights: of the clients, for "weighted"; None takes their numbers of training examples. Sampling by size and averaging
            by size count a large client twice: `by_size=False` undoes it.
        available: which clients (numbers from 0) are there in which round (from 0): a list of lists that begins again after its
            end, a mapping (a round that it lacks has none), or a function (round, seed) -> clients. Where fewer are there than
            asked for, those learn; where none is, or fewer than `min_clients`, the round is skipped.
        stragglers: the fraction of a round's clients that do only a part of their steps, drawn uniformly from 0 to 1 (one step at least).
        dropouts: the fraction of a round's clients that learn but are not heard; where nobody is, the server stays as it is.
        min_clients: a round goes on without clients that fail where so many finish, else the run stops and can be resumed.
            None: all should.
        by_size: whether clients weigh by their numbers of examples, else equally.
        evaluate_every: rounds between evaluations; the last round has one too.
        personalise: after the last round every client hears the server and learns once more, unheard; the last stage judges
            each client's own parameters on its own source (`Result.personal`).
        base: parameters to begin with, such as another run's; None draws them.

    Raises:
        ConsilienceError: a number out of its range; no round in which enough clients are there.
    """
    return _federated(
        "federated",
        [[s] for s in _sources(sources)],
        rounds,
        scenario,
        by_size,
        evaluate_every,
        personalise,
        clients_per_round=clients_per_round,
        order=order,
        fraction=participation,
        weights=weights,
        available=available,
        stragglers=stragglers,
        dropouts=dropouts,
        min_clients=min_clients,
        base=base,
    )


def federated_continual(
    streams: Sequence[Sequence[Source]],
    rounds: int = 5,
    clients_per_round: int | None = None,
    order: Literal["uniform", "cyclic", "weighted"] = "uniform",
    scenario: Scenario = "class",
    participation: float | None = None,
    weights: Sequence[float] | None = None,
    available: Available | None = None,
    stragglers: float = 0.0,
    dropouts: float = 0.0,
    min_clients: int | None = None,
    by_size: bool = True,
    evaluate_every: int = 1,
    personalise: bool = False,
    base: Any = None,
) -> Schedule:
    """Clients learn streams of sources of their own: for each source of the streams, some rounds with the server.

    Args:
        streams: for each client its sources, in order.
        rounds: rounds for each source of the streams.
        clients_per_round: how many learn in a round; None is all that have a source left.
        order: "uniform" samples clients by the seed, "cyclic" takes them in turn, "weighted" as in `federated`.
        scenario: what targets and task labels are (see `continual`).
        participation, weights, available, stragglers, dropouts, min_clients, by_size, evaluate_every: as in `federated`; rounds
            count over the whole run, and a fraction is of the clients that have a source left.
        personalise: as in `federated`, each client on its last source.
        base: parameters to begin with, such as another run's; None draws them.
    """
    return _federated(
        "federated_continual",
        [_sources(s) for s in streams],
        rounds,
        scenario,
        by_size,
        evaluate_every,
        personalise,
        clients_per_round=clients_per_round,
        order=order,
        fraction=participation,
        weights=weights,
        available=available,
        stragglers=stragglers,
        dropouts=dropouts,
        min_clients=min_clients,
        base=base,
    )


def hierarchical(
    sources: Sequence[Source],
    edges: int | Sequence[Sequence[int]] = 2,
    rounds: int = 20,
    edge_rounds: int = 1,
    clients_per_round: int | None = None,
    order: Literal["uniform", "cyclic", "weighted"] = "uniform",
    scenario: Scenario = "class",
    participation: float | None = None,
    stragglers: float = 0.0,
    dropouts: float = 0.0,
    min_clients: int | None = None,
    by_size: bool = True,
    evaluate_every: int = 1,
    personalise: bool = False,
) -> Schedule:
    """Clients below edge servers below a server: each round goes down, is learned, and goes up again.

    An edge server is to its clients what the server is in `federated`: aggregators and outer steps act there. The server averages
    the edges, each weighted by the examples of the clients that it heard; so with plain averages and one edge round it has the
    average over all clients (Liu et al. 2020, Client-Edge-Cloud Hierarchical Federated Learning).

    Args:
        sources: one a client.
        edges: how many edge servers, each with neighbouring clients; or the clients (numbers from 0) of each.
        rounds: number of rounds.
        edge_rounds: how often in a round clients learn and their edge hears them before the server does.
        clients_per_round, order, participation, stragglers, dropouts, min_clients, by_size, evaluate_every, personalise: as in
            `federated`, over all clients together.
        scenario: what targets and task labels are (see `continual`).
    """
    from consilience.settings._rounds import edges_of

    sources = _sources(sources)
    _at_least(1, edge_rounds=edge_rounds)
    return _federated(
        "hierarchical",
        [[s] for s in sources],
        rounds,
        scenario,
        by_size,
        evaluate_every,
        personalise,
        edges_of(edges, len(sources)),
        edge_rounds,
        clients_per_round=clients_per_round,
        order=order,
        fraction=participation,
        stragglers=stragglers,
        dropouts=dropouts,
        min_clients=min_clients,
    )


def gossip(
    sources: Sequence[Source],
    rounds: int = 20,
    graph: Literal["complete", "ring", "regular"] | Sequence[tuple[int, int]] = "complete",
    degree: int = 2,
    mixings: int = 1,
    scenario: Scenario = "class",
    by_size: bool = True,
    evaluated: int = 0,
    evaluate_every: int = 1,
    min_clients: int | None = None,
) -> Schedule:
    """Agents without a server: in each round all learn, then each hears itself and its neighbours, all at once.

    Sizes are told with what was mixed and add up, so that on a graph in which all have as many neighbours agents come to agree on
    the average weighted by examples; on others those with more neighbours weigh more. On the complete graph every agent has
    the average at once, as a server would have it. Methods that combine deltas from a common base refuse other graphs.

    Args:
        sources: one an agent.
        rounds: number of rounds.
        graph: "complete": all hear all; "ring": each hears the one before and the one after; "regular": a graph drawn for
            every mixing, in which each hears `degree` others (beside its nearest on a circle in random order); or the edges, as
            pairs of agents (numbers from 0).
        degree: for "regular".
        mixings: how often they hear each other in a round.
        scenario: what targets and task labels are (see `continual`).
        by_size: whether what is heard weighs by its number of examples, else equally.
        evaluated: the agent that is judged; there is no server, and the first stands for all.
        evaluate_every: rounds between evaluations; the last round has one too.
        min_clients: as in `federated`; an agent that failed hears the others all the same.
    """
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import Evaluate, Exchange, Train, build
    from consilience.settings._rounds import neighbours

    sources = _sources(sources)
    n = len(sources)
    _at_least(1, rounds=rounds, mixings=mixings, evaluate_every=evaluate_every)
    near = neighbours(graph, n, degree)
    if isinstance(evaluated, bool) or not isinstance(evaluated, int) or not 0 <= evaluated < n:
        raise ConsilienceError(f"`evaluated` should be from 0 to {n - 1}. Found `evaluated = {evaluated!r}`.")
    if min_clients is not None and not 1 <= min_clients <= n:
        raise ConsilienceError(
            f"`min_clients` should be from 1 to {n}, the clients of a round. Found `min_clients = {min_clients!r}`."
        )
    agents = _names("client", n)

    def plan(seed: int) -> Iterable[Phase]:
        for r in range(rounds):
            yield Train({a: (s.name,) for a, s in zip(agents, sources, strict=True)}, least=min_clients)
            for m in range(mixings):
                heard = near(seed, r, m)
                yield Exchange(
                    {a: (a, *(agents[j] for j in heard[i])) for i, a in enumerate(agents)}, by_size
                )
            if (r + 1) % evaluate_every == 0 or r + 1 == rounds:
                yield Evaluate(f"round {r + 1}")

    return build("gossip", sources, scenario, plan, agents[evaluated])


def _federated(
    setting: str,
    streams: list[list[Source]],
    rounds: int,
    scenario: str,
    by_size: bool,
    evaluate_every: int,
    personalise: bool,
    edge_of: Mapping[int, str] | None = None,
    edge_rounds: int = 1,
    base: Any = None,
    **who: Any,
) -> Schedule:
    """Clients and a server, whichever way they hear each other; `who` are the fields of `Participation`."""
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import Evaluate, Exchange, Train, build
    from consilience.settings import _rounds

    _at_least(1, rounds=rounds, evaluate_every=evaluate_every)
    if not streams or any(not s for s in streams):
        raise ConsilienceError("every client should have a source. Found one without.")
    part = _rounds.Participation(len(streams), **who)
    clients = _names("client", len(streams))
    sizes = [[len(s.train) for s in own] for own in streams]
    times = max(map(len, streams))

    def plan(seed: int) -> Iterable[Phase]:
        able = [[i for i, own in enumerate(streams) if t < len(own)] for t in range(times)]
        when = [(t, r, able[t]) for t in range(times) for r in range(rounds)]
        for n, turn in enumerate(part.turns(seed, when, sizes), 1):
            now = {i: streams[i][when[n - 1][0]].name for i in turn.chosen}
            yield from _rounds.rounds(
                turn, clients, now, part.min_clients, by_size, edge_of or {}, edge_rounds
            )
            own: dict[str, tuple[str, ...]] = {}
            if personalise and n == len(when):
                own = {c: (s[-1].name,) for c, s in zip(clients, streams, strict=True)}
                yield Exchange(dict.fromkeys(clients, ("server",)))
                yield Train(own, least=part.min_clients)
            if n % evaluate_every == 0 or n == len(when):
                yield Evaluate(f"round {n}", own)

    return build(setting, [s for own in streams for s in own], scenario, plan, "server", base=_entries(base))


def _names(kind: str, n: int) -> list[str]:
    width = len(str(n - 1))
    return [f"{kind}-{i:0{width}d}" for i in range(n)]


def merging(
    sources: Sequence[Source] = (),
    experts: Sequence[Expert] = (),
    base: Any = None,
    scenario: Scenario = "class",
    fraction: float = 1.0,
) -> Schedule:
    """Agents learn a source each from one base (or the experts are given); one merger hears all of them once, equally weighted.

    Args:
        sources: one an agent; or
        experts: trained models, instead of sources.
        base: parameters that the experts started from; needed by aggregators that combine deltas.
        scenario: what targets and task labels are (see `continual`).
        fraction: the fraction of its steps that every agent takes; experts that were stopped early merge better (Horoi et al. 2025). Experts
            that are given take none.
    """
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import Evaluate, Exchange, Train, build
    from consilience.core.schedule import Expert as Given

    if sources and isinstance(sources[0], Given):
        experts, sources = sources, ()  # type: ignore[assignment]
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ConsilienceError(f"`fraction` should be a number in (0, 1]. Found `fraction = {fraction!r}`.")
    if experts and fraction != 1:
        raise ConsilienceError(
            f"`fraction` should be left out where experts are given: nobody trains. Found `fraction = {fraction}`."
        )
    sources, given, names = _experts(sources, experts)

    def plan(seed: int) -> Iterable[Phase]:
        if not given:
            yield Train(
                {n: (s.name,) for n, s in zip(names, sources, strict=True)},
                {} if fraction == 1 else dict.fromkeys(names, fraction),
            )
        yield Exchange({"merger": tuple(names)}, by_size=False)
        yield Evaluate("merged")

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
    from consilience.core.schedule import Evaluate, Exchange, Train, build
    from consilience.core.schedule import Expert as Given

    if experts and not isinstance(experts[0], Given):
        experts, sources = (), experts
    sources, given, names = _experts(sources, experts)

    def plan(seed: int) -> Iterable[Phase]:
        if not given:
            yield Train({n: (s.name,) for n, s in zip(names, sources, strict=True)})
        for n, s in zip(names, sources, strict=True):
            yield Exchange({"learner": (n,)}, by_size=False)
            yield Evaluate(s.name)

    return build("exmodel", sources, scenario, plan, "learner", experts=given, base=_entries(base))


def skill(
    streams: Sequence[Any] | Mapping[str, Any],
    share: Literal["task", "end"] = "task",
    graph: Literal["mesh", "ring"] | Sequence[tuple[int | str, int | str]] = "mesh",
    scenario: Scenario = "class",
    joins: Mapping[int | str, int] | None = None,
    fails: Mapping[int | str, int] | None = None,
    evaluated: int | str | None = None,
) -> Schedule:
    """Agents learn streams of their own side by side, and tell what they learned over any graph, without a server.

    When they share, everybody hears itself and its neighbours, all at once, as many times as it takes the news of any agent to
    reach all others (the diameter of the graph among those that are there): messages are relayed as they are, and all banks end
    equal. Stages are counted from 1, as their names are ("task 1"): an agent learns one source of its stream in each.

    Args:
        streams: for each agent its sources in order (or one source); or {name of the agent: its sources}, which lets banks of
            runs that know nothing of each other be joined. Without names agents are called agent-0 and so on. Arguments name an
            agent by its name, or by its number from 0.
        share: after every task, or once at the end.
        graph: "mesh": all hear all; "ring": each hears the one before and the one after; or the edges, as pairs of agents,
            which connect all.
        scenario: what targets and task labels are (see `continual`).
        joins: {agent: the stage in which it comes}: its stream begins then; where the others have shared before, it first hears
            from its neighbours all that was told.
        fails: {agent: the stage from which it is gone}: it learns, tells and hears no more. What it told stays with the others;
            what it learned and had not told is lost, as are the sources that it would have learned: nobody knows them, and they
            are judged all the same. Where the graph falls apart, each part knows what its own agents learned since.
        evaluated: the agent that is judged, which must live to the end; None takes the first that does.

    Raises ConsilienceError for agents that are not there, agents without sources, graphs that do not connect all, and sources
    or tasks that share a name.

    >>> from consilience.data import digits, split_classes
    >>> first, second = split_classes(digits(), 2)
    >>> schedule = skill({"ana": first, "ben": second}, graph=[("ana", "ben")], evaluated="ben")
    >>> next(iter(schedule.plan(0))).who
    {'ana': ('digits/0-1-2-3-4',), 'ben': ('digits/5-6-7-8-9',)}
    """
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import build
    from consilience.core.source import Source as Data
    from consilience.settings._agents import apart, lives, named, position

    names = named(streams) if isinstance(streams, Mapping) else None
    every_stream = list(streams.values()) if isinstance(streams, Mapping) else streams
    own = [[s] if isinstance(s, Data) else _sources(s) for s in every_stream]
    if not own or any(not s for s in own):
        raise ConsilienceError("every agent should have a source. Found one without.")
    if share not in ("task", "end"):
        raise ConsilienceError(f"`share` should be task or end. Found `share = {share!r}`.")
    agents = names or _names("agent", len(own))
    every = [s for stream in own for s in stream]
    apart(every)
    alive = lives(agents, own, graph, joins, fails, share)
    last = alive.there(alive.stages)
    judge = position("evaluated", evaluated, agents)
    if not last or (judge is not None and (isinstance(judge, bool) or judge not in last)):
        found = "that all fail" if not last else f"`evaluated = {evaluated!r}`"
        there = [agents[i] for i in last] if names else last
        raise ConsilienceError(
            f"the evaluated agent should be there at the end{f', one of {there}' if last else ''}. Found {found}."
        )
    return build(
        "skill", every, scenario, lambda seed: alive.plan(), agents[last[0] if judge is None else judge]
    )


def leave_one_out(
    sources: Sequence[Source], setting: Callable[[list[Source]], Schedule]
) -> dict[str, Schedule]:
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
            raise ConsilienceError(
                f"a source should be made by consilience.data, such as arrays(x, y). Found {kind_of(s)}."
            )
    return list(sources)


def _experts(
    sources: Sequence[Source], experts: Sequence[Expert]
) -> tuple[list[Source], dict[str, Expert], list[str]]:
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.schedule import Expert
    from consilience.core.source import Source

    if bool(sources) == bool(experts):
        raise ConsilienceError(
            "give either sources to train experts on, or experts. Found "
            + ("both." if sources else "neither.")
        )
    if experts:
        for e in experts:
            if not isinstance(e, Expert) or not isinstance(e.source, Source):
                raise ConsilienceError(
                    f"an expert should be Expert(name, params, source). Found {kind_of(e)}."
                )
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
    return {n: p.detach() for n, p in (*base.named_parameters(), *base.named_buffers())}
