"""Rounds of a federation: which clients take part, and which agents send to which.

Everything random is drawn by the seed, the round and the purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.params import key
from consilience.core.schedule import Exchange, Phase, Train
from consilience.core.shares import exact_share

Neighbours = list[tuple[int, ...]]
"""The neighbours of each agent."""


class PlannedRound(NamedTuple):
    """A round before its clients are drawn."""

    position: int
    """Which source of its stream a client trains on."""
    number: int
    """The round on these sources, from 0."""
    able: Sequence[int]
    """The clients that have a source at this position."""


class Round(NamedTuple):
    """A round with its clients."""

    clients: tuple[int, ...]
    """Those that train; none if too few are available."""
    fractions: Mapping[int, float]
    """The fraction of its steps that a straggler takes."""
    senders: tuple[int, ...]
    """The clients that do not drop out before they send."""


@dataclass(frozen=True)
class Participation:
    """Draws the clients of each round; see `consilience.settings.federated` for the fields."""

    clients: int
    clients_per_round: int | None = None
    fraction: float | None = None
    order: str = "uniform"
    weights: Sequence[float] | None = None
    available: Any = None
    stragglers: float = 0.0
    dropouts: float = 0.0
    min_clients: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ("uniform", "cyclic", "weighted"):
            raise ConsilienceError(f"`order` must be uniform, cyclic or weighted, got {self.order!r}.")
        self._check_amount()
        self._check_failures()
        self._check_weights()
        # Streams may end, so this is the most that a round can have.
        check_min_clients(self.min_clients, self.wanted(self.clients))
        self._check_available()

    def _check_amount(self) -> None:
        """Refuse a number or a fraction of clients out of its range, and both together."""
        number, fraction = self.clients_per_round, self.fraction
        if number is not None and not (_is_whole(number) and 1 <= number <= self.clients):
            raise ConsilienceError(f"`clients_per_round` must be from 1 to {self.clients}, got {number}.")
        if fraction is not None and not (_is_number(fraction) and 0 < fraction <= 1):
            raise ConsilienceError(f"`participation` must be in (0, 1], got {fraction!r}.")
        if number is not None and fraction is not None:
            raise ConsilienceError(
                f"got both `clients_per_round={number}` and `participation={fraction}`; give one of them."
            )

    def _check_failures(self) -> None:
        """Refuse fractions of stragglers and dropouts out of their ranges."""
        if not (_is_number(self.stragglers) and 0 <= self.stragglers <= 1):
            raise ConsilienceError(f"`stragglers` must be in [0, 1], got {self.stragglers!r}.")

        # If all clients dropped out in every round, nothing would ever be trained.
        if not (_is_number(self.dropouts) and 0 <= self.dropouts < 1):
            raise ConsilienceError(f"`dropouts` must be in [0, 1), got {self.dropouts!r}.")

    def _check_weights(self) -> None:
        """Refuse weights that are not used, and weights that no draw can have."""
        weights = self.weights
        if weights is None:
            return
        if self.order != "weighted":
            raise ConsilienceError(f"`weights` need `order='weighted'`, got {self.order!r}.")
        valid = len(weights) == self.clients and all(_is_number(w) and w >= 0 for w in weights)
        if not valid or not any(weights):
            raise ConsilienceError(
                f"`weights` must be {self.clients} finite numbers >= 0, one per client and not all 0, "
                f"got {list(weights)[:8]}."
            )

    def _check_available(self) -> None:
        """Refuse malformed traces of availability; those of a function are checked round by round."""
        trace = self.available
        if trace is None or callable(trace):
            return
        if not isinstance(trace, Mapping | Sequence) or isinstance(trace, str) or not len(trace):
            raise ConsilienceError(
                "`available` must be a list of lists of clients, a mapping from rounds to them, "
                f"or a function of (round, seed), got {trace!r}."
            )
        for clients in trace.values() if isinstance(trace, Mapping) else trace:
            self._numbers(clients)

    def _numbers(self, clients: Any) -> frozenset[int]:
        """Check the clients of one round of `available`, and return them."""
        try:
            numbers = frozenset(int(i) for i in clients if int(i) == i)
        except (TypeError, ValueError):
            # No client has this number, so that the check below refuses.
            numbers = frozenset({-1})
        in_range = all(0 <= i < self.clients for i in numbers)
        if isinstance(clients, str) or not in_range or len(numbers) != len(set(clients)):
            raise ConsilienceError(
                f"clients in `available` must be numbers from 0 to {self.clients - 1}, got {clients!r}."
            )
        return numbers

    def wanted(self, able: int) -> int:
        """Return how many of `able` clients a round asks for."""
        if self.fraction is not None:
            # Not `round`, which rounds halves to even: 0.5 of 5 clients would be 2.
            return max(1, math.floor(exact_share(self.fraction, able) + 0.5))
        return min(self.clients_per_round or able, able)

    def present(self, number: int, seed: int, able: Sequence[int]) -> list[int]:
        """Return the clients of `able` available in a round; rounds are numbered over the whole run."""
        trace = self.available
        if trace is None:
            return list(able)
        if callable(trace):
            now = self._numbers(trace(number, seed))
        elif isinstance(trace, Mapping):
            now = self._numbers(trace.get(number, ()))
        else:
            now = self._numbers(trace[number % len(trace)])
        return [i for i in able if i in now]

    def rounds(
        self, seed: int, plan: Sequence[PlannedRound], sizes: Sequence[Sequence[int]]
    ) -> Iterator[Round]:
        """Draw the clients of every planned round.

        Args:
            seed: the seed of the draws.
            plan: the rounds.
            sizes: the number of training examples of each client's sources.

        Raises:
            ConsilienceError: no round has enough clients; raised before the first round.
        """
        self._check_presence(seed, plan)
        place = 0
        for number, planned in enumerate(plan):
            able, present = planned.able, self.present(number, seed, planned.able)
            wanted = self.wanted(len(able))
            if self.order == "cyclic" and wanted < len(able):
                chosen, passed = _next_on_circle(able, set(present), place, wanted)
                place += passed
            else:
                chosen = self._draw(seed, planned, present, wanted, sizes)
                place += wanted

            # A round with fewer clients than `min_clients` is skipped.
            if len(chosen) < (self.min_clients or 1):
                chosen = []
            yield self._with_failures(seed, planned, chosen)

    def _check_presence(self, seed: int, plan: Sequence[PlannedRound]) -> None:
        """Refuse a run in which every round would be skipped."""
        if self.available is None:
            return
        least = self.min_clients or 1
        most = max(len(self.present(number, seed, planned.able)) for number, planned in enumerate(plan))
        if most < least:
            raise ConsilienceError(
                f"no round has at least {least} available clients: "
                f"the most in {len(plan)} rounds, by `available`, is {most}."
            )

    def _draw(
        self,
        seed: int,
        planned: PlannedRound,
        present: list[int],
        wanted: int,
        sizes: Sequence[Sequence[int]],
    ) -> list[int]:
        """Draw `wanted` of the clients that are present, or take all if these are fewer."""
        weights: list[float] = []
        if self.order == "weighted":
            if self.weights is not None:
                weight_of = {i: float(self.weights[i]) for i in present}
            else:
                weight_of = {i: float(sizes[i][planned.position]) for i in present}

            # Clients of weight 0 are never drawn, even if too few others are left.
            present = [i for i in present if weight_of[i] > 0]
            weights = [weight_of[i] for i in present]

        # Nothing is drawn, so that a run with all clients does not depend on the seed here.
        if wanted >= len(present):
            return present

        generator = key(seed, planned.position, planned.number, "clients")
        if self.order == "weighted":
            drawn = torch.multinomial(torch.tensor(weights, dtype=torch.float64), wanted, generator=generator)
        else:
            drawn = torch.randperm(len(present), generator=generator)[:wanted]
        return sorted(present[i] for i in drawn.tolist())

    def _with_failures(self, seed: int, planned: PlannedRound, chosen: list[int]) -> Round:
        """Return the round of these clients, with stragglers and dropouts drawn among them."""
        # Stragglers and their fractions come from one generator, in this order.
        generator = key(seed, planned.position, planned.number, "stragglers")
        slow = _some(chosen, self.stragglers, generator)
        fractions = torch.rand(len(slow), generator=generator, dtype=torch.float64).tolist()

        # A key of its own: the share of stragglers does not change who drops out.
        generator = key(seed, planned.position, planned.number, "dropouts")
        lost = _some(chosen, self.dropouts, generator)
        senders = tuple(i for i in chosen if i not in lost)
        return Round(tuple(chosen), dict(zip(slow, fractions, strict=True)), senders)


def check_min_clients(value: Any, most: int) -> None:
    """Refuse a `min_clients` that no round of `most` clients can reach."""
    if value is not None and not (_is_whole(value) and 1 <= value <= most):
        raise ConsilienceError(
            f"`min_clients` must be from 1 to {most}, the clients of a round, got {value!r}."
        )


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _next_on_circle(able: Sequence[int], present: set[int], start: int, wanted: int) -> tuple[list[int], int]:
    """Return the next present clients in turn, and how many places on the circle were passed."""
    chosen: list[int] = []
    passed = 0
    while len(chosen) < wanted and passed < len(able):
        client = able[(start + passed) % len(able)]
        if client in present:
            chosen.append(client)
        passed += 1

    # A round without clients is skipped, and the next one begins at the same place.
    return sorted(chosen), passed if chosen else 0


def _some(chosen: Sequence[int], fraction: float, generator: torch.Generator) -> list[int]:
    """Draw a fraction of the clients.

    Their number is rounded up or down at random, so that the fraction holds on average over rounds.
    """
    if not fraction or not chosen:
        return []
    rounding = float(torch.rand((), generator=generator, dtype=torch.float64))
    count = min(math.floor(fraction * len(chosen) + rounding), len(chosen))
    return sorted(chosen[i] for i in torch.randperm(len(chosen), generator=generator)[:count].tolist())


@dataclass(frozen=True)
class Federation:
    """How the rounds of clients and a server run; see `consilience.settings.federated` for the fields."""

    rounds: int
    by_size: bool = True
    evaluate_every: int = 1
    personalise: bool = False
    edge_of: Mapping[int, str] = field(default_factory=dict)
    """The edge server of each client; empty if clients send to the server directly."""
    edge_rounds: int = 1

    def __post_init__(self) -> None:
        whole_number(rounds=self.rounds, evaluate_every=self.evaluate_every, edge_rounds=self.edge_rounds)

    def totals(self, sizes: Mapping[int, int]) -> dict[str, float]:
        """Return what all clients (or edges) of each hub weigh, for clients of these numbers of examples."""
        found: dict[str, float] = {}
        for client, size in sizes.items():
            hub = self.edge_of.get(client, "server")
            found[hub] = found.get(hub, 0) + (size if self.by_size else 1)
        if self.edge_of:
            found["server"] = sum(found.values()) if self.by_size else len(found)
        return found

    def phases(
        self,
        drawn: Round,
        clients: Sequence[str],
        sources: Mapping[int, str],
        totals: Mapping[str, float],
        least: int | None,
    ) -> Iterator[Phase]:
        """Yield the phases of one round: parameters go down to its clients, these train, and send up again.

        Args:
            drawn: the round.
            clients: the names of all clients.
            sources: the name of the source that each client trains on.
            totals: what all clients that may take part weigh, as `totals` returns it.
            least: clients that must finish, or the run stops.
        """
        if not drawn.clients:
            return
        hub_of = {clients[i]: self.edge_of.get(i, "server") for i in drawn.clients}
        edges = sorted(set(hub_of.values()) - {"server"})
        if edges:
            yield Exchange({edge: ("server",) for edge in edges})

        senders = {
            hub: tuple(clients[i] for i in drawn.senders if hub_of[clients[i]] == hub)
            for hub in edges or ["server"]
        }

        # A hub whose clients all dropped out receives nothing, and the server receives nothing from it: old
        # parameters would pull the average back.
        senders = {hub: own for hub, own in senders.items() if own}
        for _ in range(self.edge_rounds):
            yield Exchange({client: (hub,) for client, hub in hub_of.items()})
            yield Train(
                {clients[i]: (sources[i],) for i in drawn.clients},
                {clients[i]: fraction for i, fraction in drawn.fractions.items()},
                least,
            )
            if senders:
                yield Exchange(senders, self.by_size, totals)
        if edges and senders:
            yield Exchange({"server": tuple(senders)}, self.by_size, totals)


def edges_of(edges: Any, clients: int) -> dict[int, str]:
    """Return the edge server of each client, from a number of edges or from the clients of each."""
    if isinstance(edges, int) and not isinstance(edges, bool):
        if not 1 <= edges <= clients:
            raise ConsilienceError(f"`edges` must be from 1 to the {clients} clients, got {edges}.")
        # Sizes differ by at most one.
        groups = [
            list(range(clients))[i * clients // edges : (i + 1) * clients // edges] for i in range(edges)
        ]
    else:
        given = isinstance(edges, Sequence) and not isinstance(edges, str)
        groups = [list(own) for own in edges] if given else []
        if sorted(i for own in groups for i in own) != list(range(clients)) or not all(groups):
            raise ConsilienceError(
                f"`edges` must be a number, or lists that have each client from 0 to {clients - 1} once, "
                f"got {edges!r}."
            )
    width = len(str(len(groups) - 1))
    return {i: f"edge-{number:0{width}d}" for number, own in enumerate(groups) for i in own}


def neighbours(graph: Any, agents: int, degree: int) -> Callable[[int, int, int], Neighbours]:
    """Return a function (seed, round, mixing) -> the neighbours of each agent."""
    if agents < 2:
        raise ConsilienceError(f"gossip needs two agents or more, got {agents}.")
    if graph == "regular":
        if not (_is_whole(degree) and 1 <= degree < agents) or degree * agents % 2:
            raise ConsilienceError(
                f"`degree` must be from 1 to {agents - 1}, with `degree` x {agents} agents even, "
                f"got {degree!r}."
            )
        return lambda seed, number, mixing: _circulant(
            torch.randperm(agents, generator=key(seed, number, mixing, "graph")).tolist(), degree
        )

    # All other graphs are the same in every round.
    fixed = _fixed_graph(graph, agents)
    return lambda seed, number, mixing: fixed


def _fixed_graph(graph: Any, agents: int) -> Neighbours:
    """Return the neighbours of each agent in a graph that is not drawn."""
    if graph == "complete":
        return [tuple(j for j in range(agents) if j != i) for i in range(agents)]
    if graph == "ring":
        return _circulant(range(agents), 2)
    if isinstance(graph, str) or not isinstance(graph, Iterable):
        raise ConsilienceError(
            f"`graph` must be complete, ring, regular or a list of pairs of agents, got {graph!r}."
        )

    near: list[set[int]] = [set() for _ in range(agents)]
    for pair in graph:
        one, other = _edge(pair, agents)
        near[one].add(other)
        near[other].add(one)

    lost = set(range(agents)) - _reachable(near)
    if lost:
        raise ConsilienceError(
            f"`graph` must connect all agents, got one without a path from agent 0 to agent {min(lost)}."
        )
    return [tuple(sorted(own)) for own in near]


def _edge(pair: Any, agents: int) -> tuple[int, int]:
    """Check an edge, and return its two agents."""
    ends = tuple(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else ()
    numbers = all(isinstance(end, int) and 0 <= end < agents for end in ends)
    if len(ends) != 2 or ends[0] == ends[1] or not numbers:
        raise ConsilienceError(
            f"an edge of `graph` must be two different agents from 0 to {agents - 1}, got {pair!r}."
        )
    return ends[0], ends[1]


def _reachable(near: Sequence[set[int]]) -> set[int]:
    """Return the agents with a path to agent 0."""
    reached, front = {0}, {0}
    while front:
        front = {j for i in front for j in near[i]} - reached
        reached |= front
    return reached


def _circulant(order: Sequence[int], degree: int) -> Neighbours:
    """Connect agents to their nearest on a circle in this order; with an odd degree to their opposite too."""
    count = len(order)
    near: list[set[int]] = [set() for _ in range(count)]
    steps = [*range(1, degree // 2 + 1), *([count // 2] if degree % 2 else [])]
    for place, agent in enumerate(order):
        near[agent] |= {order[(place + step) % count] for step in steps}
        near[agent] |= {order[(place - step) % count] for step in steps}

    # With two agents, the one before and the one after are the same.
    return [tuple(sorted(own - {i})) for i, own in enumerate(near)]
