"""The Ray engine: visits of agents are tasks, on one machine or many."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pickle
import signal
import socket
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import pack
from consilience.core.schedule import Schedule
from consilience.core.source import Source
from consilience.core.state import Frozen, State, decode_state, encode_state
from consilience.core.warning import users_frame, warn
from consilience.engines._ray_task import Answer, Task, aligned, dumped, raw, settings, train, versions
from consilience.loop.agent import ONCE, Agent
from consilience.loop.engine import Engine, EngineEvents, Paused, Visit

SMALL = 4096
"""Bytes up to which tensors that several agents need are sent to each of them."""
TOKENS = (2, 52)
"""The first version of Ray that can ask for a token."""
CONNECTING = 10.0
"""Seconds in which a cluster's address must answer."""
PATIENCE = 0.1
"""Seconds after which the driver looks whether it was interrupted."""


class Pool:
    """The tensors of one round, each content once: one object, or the same type, shape, device and bytes."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._objects: dict[int, int] = {}
        self._alike: dict[Hashable, list[int]] = {}

    def place(self, tensor: Tensor) -> int:
        """Find the number of a tensor's content; new content is added."""
        place = self._objects.get(id(tensor))
        if place is not None:
            return place

        # A sample of the bytes tells most contents apart; only where it is equal are all bytes compared.
        own = _bytes(tensor)
        sample = own[:: max(1, len(own) // 64)][:64].cpu().numpy().tobytes()
        alike = self._alike.setdefault((tensor.dtype, tuple(tensor.shape), tensor.device, sample), [])
        place = next((other for other in alike if torch.equal(own, _bytes(self.tensors[other]))), None)
        if place is None:
            place = len(self.tensors)
            self.tensors.append(tensor)
            alike.append(place)
            # Only tensors that the pool holds are known by identity: the id of a freed tensor may be reused.
            self._objects[id(tensor)] = place
        return place


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Bundle(NamedTuple):
    """The tensors that one agent needs: references to shared ones, and its own by their place in the pool."""

    shared: list[Any]
    own: list[int]


@dataclass
class Session:
    """A Ray in use, and what it holds of the run."""

    ray: Any
    ours: bool
    """Whether it was started here."""
    function: Any
    window: int
    """How many tasks are submitted at once."""
    configuration: Any = None
    """Reference to the configuration of the run."""
    made_of: tuple[Any, ...] = ()
    """The objects and settings that the configuration was made of."""
    sources: dict[str, Any] = field(default_factory=dict)
    """References to sources, by name."""
    held: dict[tuple[int, ...], tuple[Frozen, Any]] = field(default_factory=dict)
    """What is frozen, and the reference to it, by the identities of its tensors."""
    registry: dict[Any, Any] = field(default_factory=dict)
    """Warnings that were shown."""

    def config(self, agent: Agent) -> Any:
        """Put the configuration of a run into the object store, once per run."""
        # Compared by identity, since to compare models and data is slow; settings are compared by value.
        made_of = (agent.schedule, agent.method, agent.model, agent.training, agent.revisited)
        now = settings()
        same = len(self.made_of) == len(made_of) + 1 and all(
            new is old for new, old in zip(made_of, self.made_of, strict=False)
        )
        if same and self.made_of[-1] == now:
            return self.configuration

        training = replace(agent.training, device=device_on_worker(agent.training.device))
        # What only the driver asks of a schedule stays here; sources are sent to those who train on them.
        kept = ("sources", "plan", "judged", "experts", "base")
        names = [entry.name for entry in fields(Schedule) if entry.name not in kept]
        parts = {
            "model": agent.model,
            "method": agent.method,
            "training": training,
            "revisited": agent.revisited,
            "settings": now,
            "schedule": {name: getattr(agent.schedule, name) for name in names},
        }
        # A module that was given holds what is frozen too, which workers have from elsewhere.
        data = dumped(parts, "the model, the method or the training", agent.state.frozen)
        self.configuration = self.ray.put(pickle.dumps((versions(), data)))
        self.sources, self.made_of = {}, (*made_of, now)
        return self.configuration

    def frozen(self, frozen: Frozen) -> Any:
        """Put what is frozen into the object store, once per run; return None where nothing is."""
        if not frozen.hash:
            return None
        # Seeds that begin from one module have other dictionaries of the same tensors.
        place = tuple(map(id, frozen.tensors))
        if place not in self.held:
            self.held[place] = (frozen, self.ray.put(raw(frozen)))
        return self.held[place][1]

    def source(self, source: Source) -> Any:
        """Put a source without its test data into the object store, once per run."""
        if source.name not in self.sources:
            none = source.train.select(torch.arange(0))
            data = dumped(replace(source, test=none), f"the source {source.name!r}")
            self.sources[source.name] = self.ray.put(data)
        return self.sources[source.name]

    def bundles(self, pool: Pool, needs: Sequence[Mapping[str, int]]) -> list[Bundle]:
        """Divide tensors into those of several agents, which the store holds once, and those of one agent."""
        users: dict[int, list[int]] = {}
        for agent, need in enumerate(needs):
            for place in dict.fromkeys(need.values()):
                users.setdefault(place, []).append(agent)

        # Tensors with the same users become one object, since each object costs a worker one request.
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, agents in users.items():
            groups.setdefault(tuple(agents), []).append(place)
        bundles = [Bundle([], []) for _ in needs]
        for group, places in groups.items():
            if len(group) > 1 and sum(pool.tensors[place].nbytes for place in places) > SMALL:
                ref = self.ray.put(pack({str(place): pool.tensors[place] for place in places}))
                for agent in group:
                    bundles[agent].shared.append(ref)
            else:
                for agent in group:
                    bundles[agent].own.extend(places)
        return bundles

    def show(self, answer: Answer, agent: Agent) -> None:
        """Show the warnings and the log records of a worker."""
        frame, _ = users_frame()
        for text, category in answer.warned:
            # A correction warns once per run, but each worker is new to it.
            correction = text.partition(" on ")[0] if text.endswith(ONCE) else ""
            if correction in agent.ledger.warned:
                continue
            agent.ledger.warned |= {correction} - {""}
            place = frame.f_code.co_filename, frame.f_lineno
            warnings.warn_explicit(text, category, *place, registry=self.registry)

        for record in answer.records:
            logging.getLogger(record.name).handle(record)


def device_on_worker(device: str) -> str:
    """Return the name that a device has on a worker: Ray shows each only its own GPU, as the first one."""
    return "cuda:0" if device.startswith("cuda") else device


class Round:
    """The tasks of some visits: their states, encoded and without repeated tensors."""

    def __init__(self, session: Session, visits: Sequence[Visit], paused: Paused | None) -> None:
        first = visits[0].agent
        self.session, self.visits, self.paused = session, visits, paused
        self.config = session.config(first)
        self.measured = session.ray.put(dict(first.ledger.measured))
        self.pool = Pool()
        self.places: list[dict[str, int]] = []
        self.facts: list[Any] = []
        self.given: list[dict[int, Tensor]] = []
        """The tensors of each agent by their numbers, from which its new state is put together."""

        for agent in (visit.agent for visit in visits):
            tensors, facts = encode_state(agent.state)
            places = {name: self.pool.place(tensor) for name, tensor in tensors.items()}
            self.places.append(places)
            self.facts.append(facts)
            # Of equal tensors the first is kept, as the agent has it.
            self.given.append({places[name]: tensor for name, tensor in reversed(tensors.items())})
        self.bundles = session.bundles(self.pool, self.places)

        # What is frozen in seeds that have ended would never be freed.
        self.frozen = [session.frozen(visit.agent.state.frozen) for visit in visits]
        session.held = {place: held for place, held in session.held.items() if held[1] in self.frozen}

    def submit(self, index: int) -> Any:
        """Submit the task of one visit; return the reference to its answer."""
        visit, bundle, paused = self.visits[index], self.bundles[index], self.paused
        agent, session = visit.agent, self.session
        task = Task(
            agent=agent.name,
            sources=visit.sources,
            fraction=visit.fraction,
            place=visit.place,
            seed=agent.seed,
            config=self.config,
            facts=json.dumps(self.facts[index]),
            places=tuple(self.places[index].items()),
            own=pack({str(place): self.pool.tensors[place] for place in bundle.own}),
            shared=tuple(bundle.shared),
            frozen=self.frozen[index],
            device=device_on_worker(agent.training.device),
            paused=(pack(paused[0]), paused[1]) if paused is not None and index == 0 else None,
        )
        sources = [session.source(agent.schedule.source(name)) for name in dict.fromkeys(visit.sources)]
        function = session.function.options(name=f"train:{agent.name}")
        return function.remote(task, self.measured, *sources)


@dataclass
class Ray(Engine):
    """Run the visits of agents as tasks of Ray: on one machine, or on a cluster at `address`.

    The configuration of a run is sent to each worker once, a source's data to those who train on it, and
    tensors that several agents have in common (a server's parameters) into the object store once per round.
    Answers are taken in the order of the visits, so a checkpoint between two agents is one that the serial
    engine could have written. `cpus`, `gpus` and `retries` are Ray's `num_cpus`, `num_gpus` and
    `max_retries` of a task: what a dead worker did is done again, what an agent raises is not.

    Raises ConsilienceError where Ray is not installed or does not answer, and where workers lack the code.
    """

    workers: int | None = None
    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    retries: int = 3
    _session: Session | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        workers, gpus, retries = self.workers, self.gpus, self.retries
        # Ray would refuse these too, but only when the run has begun.
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            raise ConsilienceError(f"`workers` must be a whole number >= 1, got {workers!r}.")
        if not self.cpus > 0:
            raise ConsilienceError(f"`cpus` must be positive, got {self.cpus}.")
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise ConsilienceError(f"`gpus` must be a fraction of one or a whole number, got {gpus}.")
        if not isinstance(retries, int) or retries < 0:
            raise ConsilienceError(f"`retries` must be a whole number >= 0, got {retries!r}.")

    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        """Train the agents as tasks; `events` gets finished ones in the order of the visits."""
        if not visits:
            return
        session = self._session or self.open(events)
        device = visits[0].agent.training.device
        if device != "cpu" and not self.gpus:
            raise ConsilienceError(
                f"`gpus` must be above 0 for device={device!r}, got 0: Ray decides which GPU a worker sees."
            )

        # Tasks are submitted as others end, and answers are kept until it is their turn.
        tasks = Round(session, visits, paused)
        running: dict[Any, int] = {}
        ready: dict[int, Any] = {}
        sent = done = 0
        try:
            while done < len(visits):
                while sent < len(visits) and len(running) < session.window:
                    running[tasks.submit(sent)] = sent
                    sent += 1
                found = self._wait(session, running)
                ready |= {running.pop(ref): ref for ref in found}

                while done in ready:
                    self._finish(session, visits[done].agent, tasks.given[done], ready.pop(done), events)
                    tasks.given[done] = {}
                    done += 1
                    events.tick(None)
                # Before a saved job is done there is no tick: a checkpoint taken then would lose it.
                if not found and (paused is None or done):
                    events.tick(None)
        finally:
            for ref in running:
                # Forced, with its process: an import that stops half-way spoils a process for later tasks.
                with suppress(Exception):
                    session.ray.cancel(ref, force=True)

    def _wait(self, session: Session, running: Mapping[Any, int]) -> list[Any]:
        """Wait for an answer, but not longer than an interruption may take to be seen."""
        if not running:
            return []
        found, _ = session.ray.wait(list(running), num_returns=1, timeout=PATIENCE)
        return list(found)

    def _finish(
        self, session: Session, agent: Agent, given: Mapping[int, Tensor], ref: Any, events: EngineEvents
    ) -> None:
        """Give an agent the state of its answer, or report what stopped it."""
        try:
            answer = self._answer(session, agent, ref)
            for what, amount in answer.costs.items():
                agent.ledger.add(agent.name, what, amount)
            agent.ledger.measured.update(answer.measured)
            agent.ledger.steps += answer.steps
            agent.ledger.visit = answer.visit
            session.show(answer, agent)

            if answer.state is None:
                assert answer.error is not None
                raise pickle.loads(answer.error)
            frozen = agent.state.frozen
            new = aligned(answer.state.new, agent.training.device)
            tensors = {
                name: given[place] if place >= 0 else new[str(-1 - place)]
                for name, place in answer.state.places
            }
            agent.state = kept(agent.state, decode_state(tensors, json.loads(answer.state.facts), frozen))
        except Exception as error:
            events.fail(agent, error)
        events.done(agent)

    def _answer(self, session: Session, agent: Agent, ref: Any) -> Answer:
        """Fetch an answer; raises ConsilienceError where the worker died or could not run its task."""
        errors = session.ray.exceptions
        try:
            answer: Answer = session.ray.get(ref)
        except errors.RayTaskError as error:
            raise ConsilienceError(
                f"a Ray worker could not run the task of {agent.name!r}: {error.cause or error}."
            ) from error
        except errors.RayError as error:
            times = "once" if not self.retries else f"{self.retries + 1} times"
            raise ConsilienceError(
                f"the Ray worker of {agent.name!r} died {times}: {type(error).__name__}; give it more memory "
                "(`cpus` higher: fewer workers at once) or more `retries`."
            ) from error
        return answer

    def open(self, events: EngineEvents) -> Session:
        """Use the Ray that runs in this process, or start one."""
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        ray = imported(address)
        threads, ours = torch.get_num_threads(), not ray.is_initialized()
        if ours:
            self._start(ray, address)
        local = ours and address == "local"
        there = ray.cluster_resources()
        self._check_resources(ray, there, local)

        room = there.get("CPU", 0) / self.cpus
        if self.gpus:
            room = min(room, there.get("GPU", 0) / self.gpus)
        room = max(1, int(room))
        if threads > max(1, self.cpus) and room > 1:
            warn(
                f"each worker computes with {threads} threads, as this process does, on `cpus={self.cpus}`; "
                "OMP_NUM_THREADS=1 (or torch.set_num_threads(1)) is faster where many agents train at once."
            )

        # `max_calls` of 0 keeps a worker, with what it fetched and imported, for the next task.
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": self.retries, "max_calls": 0}
        # Twice as many tasks as run at once, so that a worker finds its next task waiting.
        window = 2 * room if self.workers is None or local else min(self.workers, 2 * room)
        self._session = Session(ray, ours, ray.remote(**options)(train), window)
        where = address if ours else "already running"
        events.note(
            f"Ray ({where}): room for {room} agents at once, {self.cpus} CPUs and {self.gpus} GPUs each."
        )
        return self._session

    def _start(self, ray: Any, address: str) -> None:
        """Start a Ray here, or connect to the one at an address."""
        reachable(address)
        size = {}
        if address == "local":
            affinity = getattr(os, "sched_getaffinity", None)
            here = len(affinity(0)) if affinity else os.cpu_count() or 1
            workers = self.workers or max(1, int(here / self.cpus))
            size = {"num_cpus": max(1, ceil(workers * self.cpus)), "include_dashboard": False}

        with signals_kept():
            try:
                ray.init(address=address, logging_level=logging.ERROR, **size)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConsilienceError(
                    f"`address` must be that of a Ray that answers (and takes this machine's token, if it "
                    f"asks for one), got {address!r}: {error}."
                ) from error

    def _check_resources(self, ray: Any, there: Mapping[str, float], local: bool) -> None:
        """Warn where no worker has the resources of one agent yet; raise where none ever will."""
        cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
        if self.gpus <= gpus and self.cpus <= cpus:
            return
        lacking = f"Ray has {cpus:g} CPUs and {gpus:g} GPUs"
        if local:
            ray.shutdown()
            raise ConsilienceError(
                f"one agent needs `cpus={self.cpus}` and `gpus={self.gpus}`, but {lacking}; ask for fewer."
            )
        warn(f"agents wait until Ray has {self.cpus} CPUs and {self.gpus} GPUs for one; now {lacking}.")

    def close(self) -> None:
        """Forget the run, and stop a Ray that was started here."""
        session, self._session = self._session, None
        if session is not None and session.ours:
            with signals_kept():
                session.ray.shutdown()


def imported(address: str) -> Any:
    """Import Ray with what a run asks of it: no statistics sent, a token, and one machine kept to itself."""
    defaults = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    if address == "local":
        # Ray's switch of Windows and macOS, which it reads when it is imported: ports on the loopback only.
        defaults["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConsilienceError("the engine 'ray' needs Ray: pip install 'consilience[ray]'.") from error
    found = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if found < TOKENS:
        raise ConsilienceError(
            f"the engine 'ray' needs Ray {TOKENS[0]}.{TOKENS[1]} or newer, got {ray.__version__}: whoever "
            "reaches an older one can run code on it, because it asks for no token."
        )
    return ray


def reachable(address: str) -> None:
    """Refuse an address of the form host:port where nothing answers; Ray would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECTING).close()
    except (OSError, OverflowError) as error:
        raise ConsilienceError(
            f"`address` must be that of a Ray that answers, got {address!r}: {error}."
        ) from error


def kept(old: State, new: State) -> State:
    """Put parts of the old state that did not change into the new one, so that their hashes stay cached."""

    def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
        return first.keys() == second.keys() and all(first[name] is second[name] for name in first)

    # Hashes are cached by the identity of an object, so each new one would be hashed again.
    names = ("params", "buffers", "base", "outer")
    parts = {name: getattr(old, name) for name in names if same(getattr(old, name), getattr(new, name))}
    bank = {
        key: old.bank[key] if key in old.bank and old.bank[key].facts() == message.facts() else message
        for key, message in new.bank.items()
    }
    return new.change(bank=bank, **parts)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Give signals their handlers back, since Ray takes SIGTERM; hide Ray's warnings about its own future."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for number, handler in handlers.items():
            with suppress(ValueError):
                signal.signal(number, handler)
