"""Settings: functions that return a Schedule.

A schedule says which agent trains on which source when, and which agents exchange what they learned.
Signatures import no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from consilience import lazy
from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from consilience.core.schedule import Expert, Phase, Schedule
    from consilience.core.source import Source
    from consilience.settings._rounds import Federation, Participation

    Available = Sequence[Sequence[int]] | Mapping[int, Sequence[int]] | Callable[[int, int], Sequence[int]]

Scenario = Literal["task", "domain", "class"]
Order = Literal["uniform", "cyclic", "weighted"]


# One agent.


def multitask(sources: Sequence[Source], scenario: Scenario = "class", rounds: int = 1) -> Schedule:
    """Train one agent on all tasks in each step.

    Args:
        sources: the tasks.
        scenario: what targets and task labels are (see `continual`).
        rounds: how often it runs through all epochs, with an evaluation after each time.
    """
    from consilience.core.checks import whole_number
    from consilience.core.schedule import Evaluate, Exchange, Train, build

    names = tuple(source.name for source in _checked_sources(sources))
    whole_number(rounds=rounds)

    def plan(seed: int) -> Iterable[Phase]:
        for number in range(rounds):
            yield Train({"agent": names})

            # To itself: what a method does after an exchange is then the same in all settings.
            yield Exchange({"agent": ("agent",)})
            yield Evaluate(f"round {number + 1}")

    return build("multitask", sources, scenario, plan, "agent")


def continual(sources: Sequence[Source], scenario: Scenario = "class", base: Any = None) -> Schedule:
    """Train one agent on one source after another, and evaluate it on all sources after each.

    Args:
        sources: in the order of training.
        scenario: "task": the task label is given in training and at evaluation; "class": targets are the
            classes of all sources together, without label; "domain": targets are 0..k-1 in every source
            (as they are where all have the same classes), without label. Every label that a source declares
            has a column, also one that does not occur; `Result.labels` lists them.
        base: parameters to begin with, such as those of another run; None draws them.
    """
    from consilience.core.schedule import Evaluate, Exchange, Train, build

    sources = _checked_sources(sources)

    def plan(seed: int) -> Iterable[Phase]:
        for source in sources:
            yield Train({"agent": (source.name,)})
            yield Exchange({"agent": ("agent",)})
            yield Evaluate(source.name)

    # Sources with one test would all have the same score, so that test is judged once.
    judged = _common_test(sources, scenario)
    return build("continual", sources, scenario, plan, "agent", judged, base=_entries(base))


def online(
    sources: Sequence[Source], chunk: int = 320, scenario: Scenario = "class", seed: int = 0
) -> Schedule:
    """Train one agent on a stream of examples that is seen once, without boundaries between sources.

    Sources arrive one after another in chunks of `chunk` examples. The agent trains on a chunk for one epoch,
    in batches of the training's size; then a buffer may store the chunk, and the next one arrives. The agent
    is evaluated where a source ends, but does not know that it does: methods that need boundaries refuse.

    Args:
        sources: in the order of arrival; `data.blurry` mixes them at their boundaries.
        chunk: examples that arrive together; the last chunk of a source may have fewer.
        scenario: what targets and task labels are (see `continual`); with "task", labels are given with every
            chunk, and reveal the boundaries.
        seed: the seed of the order of a source's examples.
    """
    from dataclasses import replace

    import torch

    from consilience.core.checks import whole_number
    from consilience.core.errors import ConsilienceError
    from consilience.core.params import key
    from consilience.core.schedule import Evaluate, Exchange, Train, build

    # Chunks have other names than their source, and keep its task: labels stay those of the source.
    whole_number(chunk=chunk)
    sources = [replace(source, task=source.task or source.name) for source in _checked_sources(sources)]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConsilienceError(f"sources must have names of their own, got {names}.")

    chunks: dict[str, list[Source]] = {}
    for source in sources:
        order = torch.randperm(len(source.train), generator=key(seed, source.name, "online"))
        cuts = order.split(chunk)
        chunks[source.name] = [
            replace(source, name=name, train=source.train.select(index))
            for name, index in zip(_numbered(f"{source.name}/", len(cuts)), cuts, strict=True)
        ]

    def plan(seed: int) -> Iterable[Phase]:
        for source in sources:
            for part in chunks[source.name]:
                yield Train({"agent": (part.name,)})
                yield Exchange({"agent": ("agent",)})
            yield Evaluate(source.name)

    every = [part for own in chunks.values() for part in own]
    judged = _common_test(sources, scenario) or sources
    return build("online", every, scenario, plan, "agent", judged, boundaries=False)


def _common_test(sources: Sequence[Source], scenario: str) -> list[Source]:
    """Return one source to evaluate all, if they have one test and no task labels; otherwise none."""
    from dataclasses import replace

    first = sources[0]
    if len(sources) < 2 or scenario == "task" or any(source.test is not first.test for source in sources):
        return []

    # In scenario "domain" a target means another class in each source, unless their classes are the same.
    if scenario == "domain" and any(source.classes != first.classes for source in sources):
        return []
    classes = tuple(sorted({label for source in sources for label in source.classes}))
    return [replace(first, name=f"{first.name.partition('/')[0]}/test", task=None, classes=classes)]


# Federations. Options stay flat here, because each is one on the command line. Inside, two objects have them:
# who takes part in a round, and how rounds run.


def federated(
    sources: Sequence[Source],
    rounds: int = 20,
    clients_per_round: int | None = None,
    order: Order = "uniform",
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
    """Train clients with one source each and a server: the clients of a round receive, train, and send.

    The clients of a round depend on the seed and the round alone.

    Args:
        sources: one per client.
        rounds: number of rounds.
        clients_per_round: how many train in a round; None is all.
        order: "uniform" samples clients by the seed, "cyclic" takes them in turn, "weighted" samples them one
            after another, each in proportion to `weights` among those that are left.
        scenario: what targets and task labels are (see `continual`).
        participation: the fraction of the clients that train in a round, in (0, 1], instead of their number;
            at least one client trains.
        weights: weights of the clients, for "weighted"; None takes their numbers of training examples.
            Sampling by size and averaging by size count a large client twice; `by_size=False` avoids it.
        available: which clients (numbers from 0) are available in which round (from 0): a list of lists that
            is repeated, a mapping (rounds that it lacks have no clients), or a function (round, seed) ->
            clients. If fewer are available than `clients_per_round`, these train. If there is none, or fewer
            than `min_clients`, the round is skipped.
        stragglers: the fraction of a round's clients that take only a part of their steps, drawn uniformly
            from 0 to 1 (one step at least).
        dropouts: the fraction of a round's clients that train but do not send. If no client sends, the server
            stays as it is.
        min_clients: if a client fails, the round goes on without it as long as so many clients finish; with
            fewer, the run stops and can be resumed. None: all must finish.
        by_size: weigh clients by their numbers of examples; otherwise equally, as robust aggregators always
            do.
        evaluate_every: rounds between evaluations; the last round has one too.
        personalise: after the last round every client receives from the server and trains once more, without
            sending. The last evaluation judges each client's own parameters on its own source
            (`Result.personal`).
        base: parameters to begin with, such as those of another run; None draws them.

    Raises:
        ConsilienceError: a number out of its range; no round in which enough clients are available.
    """
    from consilience.settings._rounds import Federation, Participation

    streams = [[source] for source in _checked_sources(sources)]
    drawing = Participation(
        len(streams),
        clients_per_round,
        participation,
        order,
        weights,
        available,
        stragglers,
        dropouts,
        min_clients,
    )
    federation = Federation(rounds, by_size, evaluate_every, personalise)
    return _federation("federated", streams, scenario, drawing, federation, base)


def federated_continual(
    streams: Sequence[Sequence[Source]],
    rounds: int = 5,
    clients_per_round: int | None = None,
    order: Order = "uniform",
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
    """Train clients with a stream of sources each: some rounds with the server per position in the streams.

    Args:
        streams: the sources of each client, in order.
        rounds: rounds for each position in the streams.
        clients_per_round: how many train in a round; None is all that have a source left.
        order: "uniform" samples clients by the seed, "cyclic" takes them in turn, "weighted" as in
            `federated`.
        scenario: what targets and task labels are (see `continual`).
        participation, weights, available, stragglers, dropouts, min_clients, by_size, evaluate_every: as in
            `federated`; rounds count over the whole run, and a fraction is of the clients that have a source
            left.
        personalise: as in `federated`, each client on its last source.
        base: parameters to begin with, such as those of another run; None draws them.
    """
    from consilience.settings._rounds import Federation, Participation

    checked = [_checked_sources(own) for own in streams]
    drawing = Participation(
        len(checked),
        clients_per_round,
        participation,
        order,
        weights,
        available,
        stragglers,
        dropouts,
        min_clients,
    )
    federation = Federation(rounds, by_size, evaluate_every, personalise)
    return _federation("federated_continual", checked, scenario, drawing, federation, base)


def hierarchical(
    sources: Sequence[Source],
    edges: int | Sequence[Sequence[int]] = 2,
    rounds: int = 20,
    edge_rounds: int = 1,
    clients_per_round: int | None = None,
    order: Order = "uniform",
    scenario: Scenario = "class",
    participation: float | None = None,
    stragglers: float = 0.0,
    dropouts: float = 0.0,
    min_clients: int | None = None,
    by_size: bool = True,
    evaluate_every: int = 1,
    personalise: bool = False,
) -> Schedule:
    """Train clients below edge servers below a server.

    In every round parameters go down, clients train, and send up again. An edge server is to its clients what
    the server is in `federated`: aggregators and outer steps act there. The server averages the edges, each
    weighted by the examples of the clients that sent to it. So with plain averages and one edge round it has
    the average over all clients (Liu et al. 2020, Client-Edge-Cloud Hierarchical Federated Learning).

    Args:
        sources: one per client.
        edges: how many edge servers, each with neighbouring clients; or the clients (numbers from 0) of each.
        rounds: number of rounds.
        edge_rounds: how often in a round clients train and send to their edge before the edge sends to the
            server.
        clients_per_round, order, participation, stragglers, dropouts, min_clients, by_size, evaluate_every,
        personalise:
            as in `federated`, over all clients together.
        scenario: what targets and task labels are (see `continual`).
    """
    from consilience.settings._rounds import Federation, Participation, edges_of

    streams = [[source] for source in _checked_sources(sources)]
    drawing = Participation(
        len(streams),
        clients_per_round,
        participation,
        order,
        stragglers=stragglers,
        dropouts=dropouts,
        min_clients=min_clients,
    )
    # Participation is drawn over all clients together, whatever their edges.
    edge_of = edges_of(edges, len(streams))
    federation = Federation(rounds, by_size, evaluate_every, personalise, edge_of, edge_rounds)
    return _federation("hierarchical", streams, scenario, drawing, federation)


def _federation(
    setting: str,
    streams: list[list[Source]],
    scenario: str,
    participation: Participation,
    federation: Federation,
    base: Any = None,
) -> Schedule:
    """Return the schedule of clients with streams and a server."""
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import Evaluate, Exchange, Train, build
    from consilience.settings._rounds import PlannedRound

    if not streams or not all(streams):
        raise ConsilienceError("every client must have a source, got one without.")
    clients = _numbered("client-", len(streams))
    sizes = [[len(source.train) for source in own] for own in streams]
    least = participation.min_clients

    def plan(seed: int) -> Iterable[Phase]:
        positions = range(max(map(len, streams)))
        # Streams may differ in length: clients without a source left do not take part.
        able = [[i for i, own in enumerate(streams) if position < len(own)] for position in positions]
        planned = [
            PlannedRound(position, number, able[position])
            for position in positions
            for number in range(federation.rounds)
        ]
        # Once per position: there may be thousands of clients, and as many rounds.
        totals = [
            federation.totals({i: sizes[i][position] for i in able[position]}) for position in positions
        ]
        drawn_rounds = participation.rounds(seed, planned, sizes)
        for count, (at, drawn) in enumerate(zip(planned, drawn_rounds, strict=True), 1):
            sources = {i: streams[i][at.position].name for i in drawn.clients}
            yield from federation.phases(drawn, clients, sources, totals[at.position], least)

            # Personal training comes once, before the last evaluation.
            last = count == len(planned)
            personal: dict[str, tuple[str, ...]] = {}
            if federation.personalise and last:
                personal = {name: (own[-1].name,) for name, own in zip(clients, streams, strict=True)}
                yield Exchange(dict.fromkeys(clients, ("server",)))
                yield Train(personal, least=least)
            if last or count % federation.evaluate_every == 0:
                yield Evaluate(f"round {count}", personal)

    every = [source for own in streams for source in own]
    return build(setting, every, scenario, plan, "server", base=_entries(base))


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
    """Train agents without a server: in each round all train, then each averages with its neighbours.

    A message carries the number of examples in its average, so that on a graph in which all agents have as
    many neighbours they converge to the average weighted by examples. On other graphs, agents with more
    neighbours weigh more. On the complete graph every agent has the average after one mixing, as a server
    would. Methods that combine deltas from a common base refuse all graphs but the complete one.

    Args:
        sources: one per agent.
        rounds: number of rounds.
        graph: "complete": all exchange with all; "ring": each with the one before and the one after;
            "regular": a graph drawn for every mixing, in which each has `degree` neighbours (the nearest on a
            circle in random order); or the edges, as pairs of agents (numbers from 0).
        degree: for "regular".
        mixings: exchanges in each round.
        scenario: what targets and task labels are (see `continual`).
        by_size: weigh messages by their numbers of examples; otherwise equally.
        evaluated: the agent that is evaluated; there is no server, and the first agent stands for all.
        evaluate_every: rounds between evaluations; the last round has one too.
        min_clients: as in `federated`; an agent that failed still receives from the others.
    """
    from consilience.core.checks import whole_number
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import Evaluate, Exchange, Train, build
    from consilience.settings._rounds import check_min_clients, neighbours

    sources = _checked_sources(sources)
    count = len(sources)
    whole_number(rounds=rounds, mixings=mixings, evaluate_every=evaluate_every)
    neighbours_in = neighbours(graph, count, degree)
    if isinstance(evaluated, bool) or not isinstance(evaluated, int) or not 0 <= evaluated < count:
        raise ConsilienceError(f"`evaluated` must be from 0 to {count - 1}, got {evaluated!r}.")
    check_min_clients(min_clients, count)
    # Called clients as in `federated`: the two settings are compared agent by agent.
    agents = _numbered("client-", count)

    def plan(seed: int) -> Iterable[Phase]:
        training = {agent: (source.name,) for agent, source in zip(agents, sources, strict=True)}
        for number in range(rounds):
            yield Train(training, least=min_clients)
            # All at once: an agent sends what it had before it received.
            for mixing in range(mixings):
                near = neighbours_in(seed, number, mixing)
                senders = {agents[i]: (agents[i], *(agents[j] for j in near[i])) for i in range(count)}
                yield Exchange(senders, by_size)
            if (number + 1) % evaluate_every == 0 or number + 1 == rounds:
                yield Evaluate(f"round {number + 1}")

    return build("gossip", sources, scenario, plan, agents[evaluated])


# Trained models.


def merging(
    sources: Sequence[Source] = (),
    experts: Sequence[Expert] = (),
    base: Any = None,
    scenario: Scenario = "class",
    fraction: float = 1.0,
) -> Schedule:
    """Merge trained models once: one merger receives all of them, equally weighted.

    Agents train on a source each, from one base; or experts are given.

    Args:
        sources: one per agent; or
        experts: trained models, instead of sources.
        base: parameters that the experts started from; needed by aggregators that combine deltas.
        scenario: what targets and task labels are (see `continual`).
        fraction: the fraction of its steps that every agent takes; experts that were stopped early merge
            better (Horoi et al. 2025). Given experts take no steps.
    """
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import Evaluate, Exchange, Train, build
    from consilience.core.schedule import Expert as ExpertClass

    # `merging(experts)` is accepted too.
    if sources and isinstance(sources[0], ExpertClass):
        experts, sources = sources, ()  # type: ignore[assignment]
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ConsilienceError(f"`fraction` must be a number in (0, 1], got {fraction!r}.")
    if experts and fraction != 1:
        raise ConsilienceError(
            f"`fraction` has no effect on experts that are given, got {fraction}; leave it out."
        )

    resolved = _resolved_experts(sources, experts)
    fractions = {} if fraction == 1 else dict.fromkeys(resolved.names, fraction)

    def plan(seed: int) -> Iterable[Phase]:
        if not resolved.given:
            yield Train(resolved.training(), fractions)
        # Experts may have seen any number of examples; papers on merging weigh them equally.
        yield Exchange({"merger": tuple(resolved.names)}, by_size=False)
        yield Evaluate("merged")

    return build(
        "merging", resolved.sources, scenario, plan, "merger", experts=resolved.given, base=_entries(base)
    )


def exmodel(
    experts: Sequence[Expert] = (),
    sources: Sequence[Source] = (),
    base: Any = None,
    scenario: Scenario = "class",
    visits: int = 1,
) -> Schedule:
    """Send one learner one trained expert at a time, and no data.

    Args:
        experts: trained models in the order in which they are received; or
        sources: data that experts are first trained on, from one base.
        base: parameters that the experts started from.
        scenario: what targets and task labels are (see `continual`).
        visits: how often each expert trains on its source, for the epochs of the training, and is sent
            after that. Given experts take no steps.
    """
    from consilience.core.checks import whole_number
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import Evaluate, Exchange, Train, build
    from consilience.core.schedule import Expert as ExpertClass

    # `exmodel(sources)` is accepted too.
    if experts and not isinstance(experts[0], ExpertClass):
        experts, sources = (), experts
    whole_number(visits=visits)
    if experts and visits != 1:
        raise ConsilienceError(
            f"`visits` has no effect on experts that are given, got {visits}; leave it out."
        )
    resolved = _resolved_experts(sources, experts)

    def plan(seed: int) -> Iterable[Phase]:
        for visit in range(1, visits + 1):
            if not resolved.given:
                yield Train(resolved.training())
            for name, source in zip(resolved.names, resolved.sources, strict=True):
                yield Exchange({"learner": (name,)}, by_size=False)
                yield Evaluate(source.name if visits == 1 else f"{source.name}, visit {visit}")

    return build(
        "exmodel", resolved.sources, scenario, plan, "learner", experts=resolved.given, base=_entries(base)
    )


class _Experts(NamedTuple):
    """The experts of a schedule: given, or agents to train."""

    names: list[str]
    sources: list[Source]
    given: dict[str, Expert]

    def training(self) -> dict[str, tuple[str, ...]]:
        """Return the source that each expert trains on."""
        return {name: (source.name,) for name, source in zip(self.names, self.sources, strict=True)}


def _resolved_experts(sources: Sequence[Source], experts: Sequence[Expert]) -> _Experts:
    """Return the experts of a schedule, from sources to train on or from trained models."""
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.schedule import Expert
    from consilience.core.source import Source

    if bool(sources) == bool(experts):
        raise ConsilienceError(
            f"got {'both' if sources else 'neither'}; give either sources to train experts on, or experts."
        )
    if not experts:
        checked = _checked_sources(sources)
        return _Experts(_numbered("expert-", len(checked)), checked, {})

    for expert in experts:
        if not isinstance(expert, Expert) or not isinstance(expert.source, Source):
            raise ConsilienceError(f"an expert must be Expert(name, params, source), got {kind_of(expert)}.")
    # The names of experts are names of agents, each with a state of its own.
    given = {expert.name: _with_model(expert) for expert in experts}
    if len(given) != len(experts):
        raise ConsilienceError("experts must have names of their own, got one name twice.")
    return _Experts(list(given), [expert.source for expert in experts], given)


def _with_model(expert: Expert) -> Expert:
    """Return an expert whose own model, if it has one, is a Model with an output for each label."""
    from dataclasses import replace

    from consilience import models
    from consilience.core.errors import ConsilienceError
    from consilience.core.model import Model

    if expert.model is None:
        return expert
    try:
        model = expert.model if isinstance(expert.model, Model) else models.wrap(expert.model)
    except ConsilienceError as error:
        raise ConsilienceError(f"the model of the expert {expert.name!r} cannot be used: {error}") from error

    # A model with as many outputs as its source has classes answers with these, in their order.
    source, labels = expert.source, expert.labels
    own = tuple(source.labels[target] for target in source.classes)
    if labels == source.labels and len(own) == model.outputs < len(labels):
        labels = own
    if len(labels) > model.outputs:
        raise ConsilienceError(
            f"an expert's labels must be as many as its model's outputs, got {len(labels)} and "
            f"{model.outputs} in {expert.name!r}; say what its outputs mean with `labels=`."
        )
    return replace(expert, model=model, labels=labels)


# Agents that share what they learned.


def skill(
    streams: Sequence[Any] | Mapping[str, Any],
    share: Literal["task", "end"] = "task",
    graph: Literal["mesh", "ring"] | Sequence[tuple[int | str, int | str]] = "mesh",
    scenario: Scenario = "class",
    joins: Mapping[int | str, int] | None = None,
    fails: Mapping[int | str, int] | None = None,
    evaluated: int | str | None = None,
) -> Schedule:
    """Train agents on separate streams in parallel; they share over any graph, without a server.

    When they share, every agent receives from itself and its neighbours, all at once. This is repeated as
    often as the news of any agent takes to reach all others (the diameter of the graph of the agents that are
    present). Messages are relayed unchanged, and all banks are equal afterwards. Stages count from 1, as in
    their names ("task 1"); an agent trains on one source of its stream in each.

    Args:
        streams: for each agent its sources in order (or one source); or {name of the agent: its sources},
            which allows to join the banks of separate runs. Without names, agents are called agent-0 and so
            on. Other arguments refer to an agent by its name, or by its number from 0.
        share: after every task, or once at the end.
        graph: "mesh": all exchange with all; "ring": each with the one before and the one after; or the
            edges, as pairs of agents, which must connect all.
        scenario: what targets and task labels are (see `continual`).
        joins: {agent: the stage in which it joins}: its stream begins then. If the others have shared before,
            it first receives from its neighbours all that was shared.
        fails: {agent: the stage from which it is absent}: it no longer trains, sends or receives. What it
            sent stays with the others. What it learned and did not send is lost, and so are the sources that
            were left in its stream: nobody knows them, and they are evaluated all the same. If the graph
            falls apart, each part knows only what its own agents learned since.
        evaluated: the agent that is evaluated, present at the end; None takes the first such agent.

    Raises:
        ConsilienceError: agents that do not exist, agents without sources, graphs that do not connect all,
            sources or tasks with one name.

    >>> from consilience.data import digits, split_classes
    >>> first, second = split_classes(digits(), 2)
    >>> schedule = skill({"ana": first, "ben": second}, graph=[("ana", "ben")], evaluated="ben")
    >>> next(iter(schedule.plan(0))).who
    {'ana': ('digits/0-1-2-3-4',), 'ben': ('digits/5-6-7-8-9',)}
    """
    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import build
    from consilience.core.source import Source
    from consilience.settings._agents import agent_names, check_task_names, lifetimes, position

    names = agent_names(streams) if isinstance(streams, Mapping) else None
    given = list(streams.values()) if isinstance(streams, Mapping) else streams
    checked = [[own] if isinstance(own, Source) else _checked_sources(own) for own in given]
    if not checked or not all(checked):
        raise ConsilienceError("every agent must have a source, got one without.")
    if share not in ("task", "end"):
        raise ConsilienceError(f"`share` must be task or end, got {share!r}.")

    agents = names or _numbered("agent-", len(checked))
    every = [source for own in checked for source in own]
    check_task_names(every)
    alive = lifetimes(agents, checked, graph, joins, fails, share)
    last = alive.present(alive.stages)
    if not last:
        raise ConsilienceError("some agent must be present at the end, got `fails` for all of them.")

    judge = position("evaluated", evaluated, agents)

    # True would pass as agent 1.
    if judge is not None and (isinstance(judge, bool) or judge not in last):
        present = [agents[i] for i in last] if names else last
        raise ConsilienceError(
            f"`evaluated` must be an agent that is present at the end, one of {present}, got {evaluated!r}."
        )
    evaluated_agent = agents[last[0] if judge is None else judge]
    return build("skill", every, scenario, lambda seed: alive.phases(), evaluated_agent)


# Schedules from schedules.


def leave_one_out(
    sources: Sequence[Source], setting: Callable[[list[Source]], Schedule]
) -> dict[str, Schedule]:
    """Make, for each source, the schedule of a setting without it, evaluated on it alone.

    This measures how well the others serve a source that they never saw. A class that only this source has
    counts as never recognised (in scenario "domain" targets are 0..k-1, whatever they mean).

    Args:
        sources: one per client.
        setting: makes a schedule of sources, such as `settings.federated`, or a function that calls it with
            more arguments.

    Returns:
        {name of the source that is left out: schedule}.
    """
    from dataclasses import replace

    from consilience.core.errors import ConsilienceError
    from consilience.core.schedule import reframe

    sources = _checked_sources(sources)
    if len(sources) < 2:
        raise ConsilienceError(f"leave_one_out needs two sources or more, got {len(sources)}.")
    schedules = {}
    for left_out in sources:
        schedule = setting([source for source in sources if source is not left_out])
        count = len(schedule.sources)
        framed, frame = reframe([*schedule.sources, left_out], schedule.scenario)

        # The frame has the columns of all classes, but only the tasks that are trained on.
        tasks = {source.task for source in framed[:count]}
        frame = replace(frame, tasks={task: own for task, own in frame.tasks.items() if task in tasks})
        schedules[left_out.name] = replace(
            schedule, sources=framed[:count], judged=framed[count:], frame=frame
        )
    return schedules


# Helpers.


def _numbered(prefix: str, count: int) -> list[str]:
    """Return names with numbers of equal width, so that they sort as the numbers do."""
    width = len(str(count - 1))
    return [f"{prefix}{i:0{width}d}" for i in range(count)]


def _checked_sources(sources: Any) -> list[Source]:
    """Check sources, and return them as a list."""
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.source import Source

    if isinstance(sources, Source) or not isinstance(sources, list | tuple):
        raise ConsilienceError(
            f"sources must come in a list, as the splits of consilience.data return, got {kind_of(sources)}."
        )
    for source in sources:
        if not isinstance(source, Source):
            raise ConsilienceError(
                f"a source must be made by consilience.data, such as arrays(x, y), got {kind_of(source)}."
            )
    return list(sources)


def _entries(base: Any) -> Any:
    """Return a base as a dictionary of tensors, from one or from a torch module."""
    if base is None or isinstance(base, dict):
        return base
    return {name: tensor.detach() for name, tensor in (*base.named_parameters(), *base.named_buffers())}


if not TYPE_CHECKING:
    __getattr__ = lazy.suggest(__name__)
    suggest_arguments(__name__)
