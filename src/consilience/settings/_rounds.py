"""Who takes part in a round, and which way what is learned goes. Everything is drawn by the seed, the round and the purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from consilience.core.errors import ConsilienceError
from consilience.core.params import key
from consilience.core.schedule import Exchange, Phase, Train

Pairs = list[tuple[int, ...]]
"""The neighbours of each agent."""


@dataclass(frozen=True)
class Turn:
    """One round: who learns, the stragglers' fractions of their steps, and who is heard."""

    chosen: tuple[int, ...]
    fractions: Mapping[int, float]
    heard: tuple[int, ...]


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
        n, k, p = self.clients, self.clients_per_round, self.fraction
        if self.order not in ("uniform", "cyclic", "weighted"):
            raise ConsilienceError(
                f"`order` should be uniform, cyclic or weighted. Found `order = {self.order!r}`."
            )
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n):
            raise ConsilienceError(f"`clients_per_round` should be from 1 to {n}. Found {k}.")
        if p is not None and not (_number(p) and 0 < p <= 1):
            raise ConsilienceError(f"`participation` should be in (0, 1]. Found `participation = {p!r}`.")
        if k is not None and p is not None:
            raise ConsilienceError(f"give `clients_per_round` or `participation`. Found both: {k} and {p}.")
        for name, low_end in (("stragglers", True), ("dropouts", False)):
            value = getattr(self, name)
            if not (_number(value) and value >= 0 and (value <= 1 if low_end else value < 1)):
                rule = "[0, 1]" if low_end else "[0, 1)"
                raise ConsilienceError(f"`{name}` should be in {rule}. Found `{name} = {value!r}`.")
        if self.weights is not None:
            if self.order != "weighted":
                raise ConsilienceError(
                    f"`weights` are for `order='weighted'`. Found them with `order = {self.order!r}`."
                )
            good = len(self.weights) == n and all(_number(w) and 0 <= w < math.inf for w in self.weights)
            if not good or not any(self.weights):
                raise ConsilienceError(
                    f"`weights` should be {n} finite numbers >= 0, one a client and not all 0. Found {list(self.weights)[:8]}."
                )
        most = self.asked(n)
        m = self.min_clients
        if m is not None and (isinstance(m, bool) or not isinstance(m, int) or not 1 <= m <= most):
            raise ConsilienceError(
                f"`min_clients` should be from 1 to {most}, the clients of a round. Found `min_clients = {m!r}`."
            )
        trace = self.available
        if trace is None or callable(trace):
            return
        if not isinstance(trace, Mapping | Sequence) or isinstance(trace, str) or not len(trace):
            raise ConsilienceError(
                "`available` should be a list of lists of clients, a mapping from rounds to them, or a function of (round, seed). "
                f"Found {trace!r}."
            )
        for own in trace.values() if isinstance(trace, Mapping) else trace:
            self._known(own)

    def _known(self, own: Any) -> frozenset[int]:
        try:
            found = frozenset(int(i) for i in own if int(i) == i)
        except (TypeError, ValueError):
            found = frozenset({-1})
        if (
            isinstance(own, str)
            or any(not 0 <= i < self.clients for i in found)
            or len(found) != len(set(own))
        ):
            raise ConsilienceError(
                f"clients in `available` should be numbers from 0 to {self.clients - 1}. Found {own!r}."
            )
        return found

    def asked(self, able: int) -> int:
        """How many of `able` clients are asked for."""
        if self.fraction is not None:
            return max(1, math.floor(self.fraction * able + 0.5))
        return min(self.clients_per_round or able, able)

    def there(self, n: int, seed: int, able: Sequence[int]) -> list[int]:
        """Who of `able` is there in round n."""
        trace = self.available
        if trace is None:
            return list(able)
        if callable(trace):
            now = self._known(trace(n, seed))
        elif isinstance(trace, Mapping):
            now = self._known(trace.get(n, ()))
        else:
            now = self._known(trace[n % len(trace)])
        return [i for i in able if i in now]

    def turns(
        self, seed: int, plan: Sequence[tuple[int, int, Sequence[int]]], sizes: Sequence[Sequence[int]]
    ) -> Iterator[Turn]:
        """A turn for each (source of the stream, round of it, clients that have one); none are chosen where too few are there.

        Raises ConsilienceError before the first where no round has clients.
        """
        least = self.min_clients or 1
        if self.available is not None:
            most = max(len(self.there(n, seed, able)) for n, (_, _, able) in enumerate(plan))
            if most < least:
                raise ConsilienceError(
                    f"some round should have at least {least} clients that are there. Found {most} at most in {len(plan)} rounds."
                )
        turn = 0
        chosen: list[int]
        for n, (t, r, able) in enumerate(plan):
            now = self.there(n, seed, able)
            k = self.asked(len(able))
            if self.order == "weighted":
                weights = [float(self.weights[i] if self.weights is not None else sizes[i][t]) for i in now]
                now = [i for i, w in zip(now, weights, strict=True) if w > 0]
                weights = [w for w in weights if w > 0]
            if self.order == "cyclic" and k < len(able):
                present, ring, at = set(now), turn % len(able), 0
                chosen = []
                while len(chosen) < k and at < len(able):
                    chosen += [i] if (i := able[(ring + at) % len(able)]) in present else []
                    at += 1
                turn += at if chosen else 0
                chosen = sorted(chosen)
            else:
                turn += k
                if k >= len(now):
                    chosen = now
                elif self.order == "weighted":
                    drawn = torch.multinomial(
                        torch.tensor(weights, dtype=torch.float64), k, generator=key(seed, t, r, "clients")
                    )
                    chosen = sorted(now[i] for i in drawn.tolist())
                else:
                    chosen = sorted(
                        now[i]
                        for i in torch.randperm(len(now), generator=key(seed, t, r, "clients"))[:k].tolist()
                    )
            if len(chosen) < least:
                chosen = []
            generator = key(seed, t, r, "stragglers")
            slow = _some(chosen, self.stragglers, generator)
            work = dict(
                zip(
                    slow,
                    torch.rand(len(slow), generator=generator, dtype=torch.float64).tolist(),
                    strict=True,
                )
            )
            gone = _some(chosen, self.dropouts, key(seed, t, r, "dropouts"))
            yield Turn(tuple(chosen), work, tuple(i for i in chosen if i not in gone))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _some(chosen: Sequence[int], fraction: float, generator: torch.Generator) -> list[int]:
    """That fraction of the chosen, rounded up or down at random, so that it holds in the mean."""
    if not fraction or not chosen:
        return []
    count = math.floor(
        fraction * len(chosen) + float(torch.rand((), generator=generator, dtype=torch.float64))
    )
    return sorted(
        chosen[i]
        for i in torch.randperm(len(chosen), generator=generator)[: min(count, len(chosen))].tolist()
    )


def rounds(
    turn: Turn,
    clients: Sequence[str],
    sources: Mapping[int, str],
    least: int | None,
    by_size: bool,
    edge_of: Mapping[int, str],
    edge_rounds: int,
) -> Iterator[Phase]:
    """The phases of one round: down from the server (through the edges where there are), learn, and up again."""
    if not turn.chosen:
        return
    hubs = {clients[i]: edge_of.get(i, "server") for i in turn.chosen}
    edges = sorted(set(hubs.values()) - {"server"})
    if edges:
        yield Exchange({e: ("server",) for e in edges})
    up = {h: tuple(clients[i] for i in turn.heard if hubs[clients[i]] == h) for h in edges or ["server"]}
    up = {h: own for h, own in up.items() if own}
    for _ in range(edge_rounds):
        yield Exchange({c: (h,) for c, h in hubs.items()})
        yield Train(
            {clients[i]: (sources[i],) for i in turn.chosen},
            {clients[i]: w for i, w in turn.fractions.items()},
            least,
        )
        if up:
            yield Exchange(up, by_size)
    if edges and up:
        yield Exchange({"server": tuple(up)}, by_size)


def edges_of(edges: Any, clients: int) -> dict[int, str]:
    """The edge server of each client, from a number of edges or from the clients of each."""
    if isinstance(edges, int) and not isinstance(edges, bool):
        if not 1 <= edges <= clients:
            raise ConsilienceError(
                f"`edges` should be from 1 to the {clients} clients. Found `edges = {edges}`."
            )
        groups = [
            list(range(clients))[i * clients // edges : (i + 1) * clients // edges] for i in range(edges)
        ]
    else:
        groups = (
            [list(own) for own in edges] if isinstance(edges, Sequence) and not isinstance(edges, str) else []
        )
        if sorted(i for own in groups for i in own) != list(range(clients)) or not all(groups):
            raise ConsilienceError(
                f"`edges` should be a number, or lists that have each client from 0 to {clients - 1} once. Found {edges!r}."
            )
    width = len(str(len(groups) - 1))
    return {i: f"edge-{e:0{width}d}" for e, own in enumerate(groups) for i in own}


def neighbours(graph: Any, n: int, degree: int) -> Callable[[int, int, int], Pairs]:
    """(seed, round, mixing) -> the neighbours of each of n agents."""
    everybody: list[tuple[int, ...]] = [tuple(j for j in range(n) if j != i) for i in range(n)]
    if n < 2:
        raise ConsilienceError(f"agents that gossip should be two or more. Found {n}.")
    if graph == "complete":
        return lambda seed, r, m: everybody
    if graph == "ring":
        return lambda seed, r, m: _circulant(list(range(n)), 2)
    if graph == "regular":
        if isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree < n or degree * n % 2:
            raise ConsilienceError(
                f"`degree` should be from 1 to {n - 1}, with `degree` x {n} agents even. Found `degree = {degree!r}`."
            )
        return lambda seed, r, m: _circulant(
            torch.randperm(n, generator=key(seed, r, m, "graph")).tolist(), degree
        )
    if isinstance(graph, str) or not isinstance(graph, Iterable):
        raise ConsilienceError(
            f"`graph` should be complete, ring, regular or a list of pairs of agents. Found `graph = {graph!r}`."
        )
    near: list[set[int]] = [set() for _ in range(n)]
    for pair in graph:
        ends = tuple(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else ()
        if (
            len(ends) != 2
            or ends[0] == ends[1]
            or any(not isinstance(e, int) or not 0 <= e < n for e in ends)
        ):
            raise ConsilienceError(
                f"an edge of `graph` should be two different agents from 0 to {n - 1}. Found {pair!r}."
            )
        near[ends[0]].add(ends[1])
        near[ends[1]].add(ends[0])
    reached, front = {0}, [0]
    while front:
        front = sorted({j for i in front for j in near[i]} - reached)
        reached |= set(front)
    if len(reached) < n:
        lost = next(i for i in range(n) if i not in reached)
        raise ConsilienceError(
            f"`graph` should connect all agents. Found no way from agent 0 to agent {lost}."
        )
    fixed = [tuple(sorted(own)) for own in near]
    return lambda seed, r, m: fixed


def _circulant(order: Sequence[int], degree: int) -> Pairs:
    """Every agent beside its nearest on a circle in this order, and opposite to one where the degree is odd."""
    n = len(order)
    near: list[set[int]] = [set() for _ in range(n)]
    steps = [*range(1, degree // 2 + 1), *([n // 2] if degree % 2 else [])]
    for at, i in enumerate(order):
        near[i] |= {order[(at + s) % n] for s in steps} | {order[(at - s) % n] for s in steps}
    return [tuple(sorted(own - {i})) for i, own in enumerate(near)]
