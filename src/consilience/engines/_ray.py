"""The Ray engine: agents that learn are tasks, on one machine or many.

What a task is given and gives back is a state, as safetensors bytes and JSON; Ray pickles code and configuration. A task is a pure
function of what it is given, so that one whose worker died is run again.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import pickle
import platform
import signal
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from logging.handlers import QueueHandler
from math import ceil
from typing import Any, TypeVar

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import pack, unpack
from consilience.core.schedule import Schedule
from consilience.core.source import Source
from consilience.core.state import State, decode_state, encode_state
from consilience.loop.agent import ONCE, Agent
from consilience.loop.engine import Engine, EngineEvents, Paused, Visit
from consilience.loop.ledger import Ledger

T = TypeVar("T")

SMALL = 4096
"""Bytes up to which what several agents share travels with each of them."""

PATIENCE = 0.1
"""Seconds after which the driver looks whether it was interrupted."""


# what both sides use


class Pool:
    """The tensors of one round, each content once: the same object, or the same type, shape, device and bytes."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._objects: dict[int, int] = {}
        self._alike: dict[Hashable, list[int]] = {}

    def place(self, t: Tensor) -> int:
        """Where a tensor's content stands."""
        at = self._objects.get(id(t))
        if at is not None:
            return at
        own = _bytes(t)
        some = own[:: max(1, len(own) // 64)][:64].cpu().numpy().tobytes()
        alike = self._alike.setdefault((t.dtype, tuple(t.shape), t.device, some), [])
        at = next((i for i in alike if torch.equal(own, _bytes(self.tensors[i]))), None)
        if at is None:
            at = len(self.tensors)
            self.tensors.append(t)
            alike.append(at)
            self._objects[id(t)] = at  # held, so that its id stays its own
        return at


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


def opened(data: bytes, device: str) -> dict[str, Tensor]:
    """The tensors of safetensors bytes on a device, aligned as torch aligns them: what a product is to the bit may rest on it."""
    tensors, _ = unpack(data, "a state")
    return {k: (t if t.data_ptr() % 64 == 0 else t.clone()).to(device) for k, t in tensors.items()}


class Tally(Ledger):
    """A ledger that counts how often each kind of work was done."""

    def __init__(self, known: Mapping[Hashable, int]) -> None:
        super().__init__(measured=dict(known))
        self.times: dict[Hashable, int] = {}

    def charge_work(self, agent: str, kind: Hashable, do: Callable[[], T]) -> T:
        result = super().charge_work(agent, kind, do)
        self.times[kind] = self.times.get(kind, 0) + 1
        return result


@dataclass(frozen=True)
class Task:
    """What an agent is told to learn: its state is `facts` (JSON) and the tensors at `places` of the shared `blobs` and its `own` bytes."""

    agent: str
    names: tuple[str, ...]
    part: float
    seed: int
    config: tuple[Any]
    facts: str
    places: tuple[tuple[str, int], ...]
    own: bytes
    blobs: tuple[Any, ...]
    paused: tuple[bytes, Mapping[str, int]] | None = None


@dataclass(frozen=True)
class Answer:
    """What came of it: the state, as `facts` (JSON) and tensors at `places`: of the task's (>= 0), or new ones (-1 - i); and what it cost."""

    facts: str | None
    places: tuple[tuple[str, int], ...]
    new: bytes
    times: Mapping[Hashable, int]
    known: Mapping[Hashable, int]
    steps: int
    warned: tuple[tuple[str, type[Warning], str, int], ...]
    lines: tuple[logging.LogRecord, ...]
    why: bytes | None = None


def versions() -> dict[str, str]:
    """What must be the same in a worker for its bits to be."""
    from consilience import __version__

    return {"consilience": __version__, "torch": torch.__version__, "Python": platform.python_version()}


def cloudpickle() -> Any:
    """What Ray pickles code with."""
    return importlib.import_module("ray.cloudpickle")


def loaded(data: bytes) -> Any:
    """What `dumped` pickled; ConsilienceError where its code is not here."""
    try:
        return cloudpickle().loads(data)
    except (ImportError, AttributeError) as e:
        raise ConsilienceError(
            f"what a run is made of should be importable on Ray's workers. Found one that lacks it: {e}."
        ) from e


def dumped(value: Any, what: str) -> bytes:
    """Pickled with what cloudpickle adds (lambdas, classes of a notebook); a tensor that views a larger one takes no more than its own."""

    class Pickler(cloudpickle().CloudPickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if (
                type(obj) is Tensor
                and obj.device.type == "cpu"
                and obj.layout is torch.strided
                and not obj.requires_grad
            ):
                if obj.untyped_storage().nbytes() > obj.nbytes:
                    return obj.clone(memory_format=torch.contiguous_format).__reduce_ex__(2)
                return NotImplemented
            return super().reducer_override(obj)

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump(value)
    except Exception as e:
        raise ConsilienceError(
            f"what Ray's workers are given should be picklable. Found that {what} is not: {e}."
        ) from e
    return buffer.getvalue()


# in a worker

_held: dict[str, Any] = {}
"""What this process fetched for the task before, by object: a configuration, and tensors that several agents share."""


def fetch(ref: Any, make: Callable[[Any], T]) -> T:
    """An object of the store, made ready once in this process."""
    at = ref.hex()
    if at not in _held:
        import ray

        _held[at] = make(ray.get(ref))
    return _held[at]  # type: ignore[no-any-return]


def configured(data: bytes) -> dict[str, Any]:
    """The configuration of a run, where this worker can have it."""
    theirs, inner = pickle.loads(data)
    for k, v in versions().items():
        if theirs.get(k) != v:
            raise ConsilienceError(
                f"Ray's workers should have the versions of who drives them. Found {k} {v} there and {theirs.get(k)} here."
            )
    return loaded(inner)  # type: ignore[no-any-return]


def like(settings: Mapping[str, Any]) -> None:
    """Compute as the driver does."""
    if torch.get_num_threads() != settings["threads"]:
        torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(settings["dtype"])
    torch.set_float32_matmul_precision(settings["matmul"])
    torch.use_deterministic_algorithms(settings["deterministic"])
    logging.getLogger().setLevel(settings["level"])


def settings() -> dict[str, Any]:
    """How this process computes."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "level": logging.getLogger().level,
    }


class Lines(QueueHandler):
    """Keeps log records, made ready to travel."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.records: list[logging.LogRecord] = []

    def enqueue(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def overheard() -> Iterator[tuple[list[warnings.WarningMessage], list[logging.LogRecord]]]:
    """The warnings and the log lines of what is done inside."""
    lines, root = Lines(), logging.getLogger()
    root.addHandler(lines)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield warned, lines.records
    finally:
        root.removeHandler(lines)


def train(task: Task, known: Mapping[Hashable, int], *sources: bytes) -> Answer:
    """Let an agent learn: what a worker runs."""
    wanted = {ref.hex() for ref in (*task.config, *task.blobs)}
    for at in _held.keys() - wanted:
        del _held[at]
    tally = Tally(known)
    facts: str | None = None
    places: list[tuple[str, int]] = []
    new: dict[int, Tensor] = {}
    why: bytes | None = None
    with overheard() as (warned, lines):
        try:
            config = fetch(task.config[0], configured)
            like(config["settings"])
            given, device = [loaded(s) for s in sources], config["training"].device
            tensors = dict(opened(task.own, device))
            for ref in task.blobs:
                tensors |= fetch(ref, lambda data: opened(data, device))
            state = decode_state({name: tensors[str(i)] for name, i in task.places}, json.loads(task.facts))
            schedule = Schedule(sources=tuple(given), plan=_nothing, **config["schedule"])
            agent = Agent(
                task.agent,
                config["model"],
                config["method"],
                schedule,
                config["training"],
                task.seed,
                state,
                tally,
                config["revisited"],
            )
            job = agent.prepare(task.names, task.part)
            if task.paused is not None:
                job.load(opened(task.paused[0], device), task.paused[1])
            for _ in job.run(tally):
                pass
            agent.finish(job)
            held, made = encode_state(agent.state)
            came = {id(t): int(i) for i, t in tensors.items()}
            fresh: dict[int, int] = {}
            for name, t in held.items():
                if id(t) in came:
                    places.append((name, came[id(t)]))
                else:
                    at_new = fresh.setdefault(id(t), len(fresh))
                    new[at_new] = t
                    places.append((name, -1 - at_new))
            facts = json.dumps(made)
        except Exception as e:
            why, facts = told(e), None
    found = tuple((str(w.message), w.category, w.filename, w.lineno) for w in warned)
    packed = pack({str(i): t for i, t in new.items()}) if facts is not None else b""
    costs = {k: tally.measured[k] for k in tally.times}
    return Answer(facts, tuple(places), packed, tally.times, costs, tally.steps, found, tuple(lines), why)


def _nothing(seed: int) -> Sequence[Any]:
    return ()


def told(why: Exception) -> bytes:
    """An exception that can travel, with the traceback of its worker."""
    why.add_note("in a Ray worker: " + "".join(traceback.format_exception(why)))
    with suppress(Exception):
        data: bytes = cloudpickle().dumps(why)
        pickle.loads(data)
        return data
    return pickle.dumps(ConsilienceError(f"{type(why).__name__}: {why}"))


# in the driver


@dataclass
class Session:
    """A Ray in use: what it holds of the run."""

    ray: Any
    ours: bool
    function: Any
    window: int
    held: dict[str, Any] = field(default_factory=dict)
    """Sources in the object store, by name."""
    of: tuple[Any, ...] = ()
    """What the held objects were made of."""
    registry: dict[Any, Any] = field(default_factory=dict)
    """Warnings that were shown."""

    def config(self, agent: Agent) -> Any:
        """The configuration of a run in the object store: put there once."""
        of = (agent.schedule, agent.method, agent.model, agent.training, agent.revisited)
        now = settings()
        if (
            len(self.of) != len(of) + 1
            or any(a is not b for a, b in zip(of, self.of, strict=False))
            or self.of[-1] != now
        ):
            device = agent.training.device
            parts = {
                "model": agent.model,
                "method": agent.method,
                "training": replace(agent.training, device="cuda:0")
                if device.startswith("cuda")
                else agent.training,
                "revisited": agent.revisited,
                "settings": now,
                "schedule": {
                    f.name: getattr(agent.schedule, f.name)
                    for f in fields(Schedule)
                    if f.name not in ("sources", "plan", "judged", "experts", "base")
                },
            }
            inner = dumped(parts, "the model, the method or the training")
            self.held = {"": self.ray.put(pickle.dumps((versions(), inner)))}
            self.of = (*of, now)
        return self.held[""]

    def source(self, source: Source) -> Any:
        """A source in the object store, without its test data: put there once."""
        at = f"source|{source.name}"
        if at not in self.held:
            some = source.train.select(torch.arange(0))
            self.held[at] = self.ray.put(dumped(replace(source, test=some), f"the source {source.name!r}"))
        return self.held[at]

    def blobs(
        self, pool: Pool, needs: Sequence[Mapping[str, int]]
    ) -> tuple[list[list[Any]], list[list[int]]]:
        """For each agent, what it shares with others, put into the object store once, and what is sent to it alone."""
        users: dict[int, list[int]] = {}
        for k, need in enumerate(needs):
            for i in dict.fromkeys(need.values()):
                users.setdefault(i, []).append(k)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, ks in users.items():
            groups.setdefault(tuple(ks), []).append(i)
        shared: list[list[Any]] = [[] for _ in needs]
        own: list[list[int]] = [[] for _ in needs]
        for who, members in groups.items():
            if len(who) > 1 and sum(pool.tensors[i].nbytes for i in members) > SMALL:
                ref = self.ray.put(pack({str(i): pool.tensors[i] for i in members}))
                for k in who:
                    shared[k].append(ref)
            else:
                for k in who:
                    own[k] += members
        return shared, own

    def hear(self, answer: Answer, agent: Agent) -> None:
        """Show what a worker said."""
        for text, category, filename, line in answer.warned:
            prepare_step = text.partition(" on ")[0] if text.endswith(ONCE) else ""
            if prepare_step in agent.ledger.warned:  # another worker said it
                continue
            agent.ledger.warned |= {prepare_step} - {""}
            warnings.warn_explicit(text, category, filename, line, registry=self.registry)
        for record in answer.lines:
            logging.getLogger(record.name).handle(record)


@dataclass
class Ray(Engine):
    """Agents that learn as tasks of Ray: on one machine, or on a cluster at `address`.

    The configuration of a run goes to each worker once, a source's data to who trains on it, tensors that several agents have in
    common (what all heard of a server) into the object store once a round. Results are taken in the order of the visits, so that a
    checkpoint between two agents is one that the serial engine could have written. `cpus`, `gpus` and `retries` are Ray's
    `num_cpus`, `num_gpus` and `max_retries` of a task: what a dead worker did is done again, what an agent raises is not.

    Raises ConsilienceError where Ray is not installed or does not answer, and where workers cannot have what a run is made of.
    """

    workers: int | None = None
    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    retries: int = 3
    _session: Session | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.workers is not None and (not isinstance(self.workers, int) or self.workers < 1):
            raise ConsilienceError(
                f"`workers` should be a whole number >= 1. Found `workers = {self.workers!r}`."
            )
        if not self.cpus > 0:
            raise ConsilienceError(f"`cpus` should be positive. Found `cpus = {self.cpus}`.")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ConsilienceError(
                f"`gpus` should be a fraction of one or a whole number. Found `gpus = {self.gpus}`."
            )
        if not isinstance(self.retries, int) or self.retries < 0:
            raise ConsilienceError(
                f"`retries` should be a whole number >= 0. Found `retries = {self.retries!r}`."
            )

    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        """Let the agents learn as tasks; finished ones are told to `events` in the order of the visits."""
        if not visits:
            return
        session = self._session or self._open(events)
        first = visits[0][0]
        if first.training.device != "cpu" and not self.gpus:
            raise ConsilienceError(
                f"Ray gives a worker its GPU: `gpus` should be above 0 for the device {first.training.device!r}. Found `gpus = 0`."
            )
        ray, config = session.ray, session.config(first)
        known = ray.put(dict(first.ledger.measured))
        pool, needs, facts = Pool(), [], []
        given: list[dict[int, Tensor]] = []
        for agent, _, _ in visits:
            tensors, fact = encode_state(agent.state)
            needs.append({name: pool.place(t) for name, t in tensors.items()})
            given.append({needs[-1][name]: t for name, t in reversed(tensors.items())})
            facts.append(fact)
        shared, own = session.blobs(pool, needs)

        def send(k: int) -> Any:
            agent, names, part = visits[k]
            task = Task(
                agent.name,
                names,
                part,
                agent.seed,
                (config,),
                json.dumps(facts[k]),
                tuple(needs[k].items()),
                pack({str(i): pool.tensors[i] for i in own[k]}),
                tuple(shared[k]),
                (pack(paused[0]), paused[1]) if paused is not None and k == 0 else None,
            )
            sources = [session.source(agent.schedule.source(n)) for n in dict.fromkeys(names)]
            return session.function.options(name=f"learn:{agent.name}").remote(task, known, *sources)

        running: dict[Any, int] = {}
        ready: dict[int, Any] = {}
        sent = done = 0
        try:
            while done < len(visits):
                while sent < len(visits) and len(running) < session.window:
                    running[send(sent)] = sent
                    sent += 1
                found, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE) if running else ([], [])
                for ref in found:
                    ready[running.pop(ref)] = ref
                while done in ready:
                    agent = visits[done][0]
                    try:
                        self._take(session, agent, given[done], ready.pop(done))
                    except Exception as e:
                        events.fail(agent, e)
                    given[done] = {}
                    done += 1
                    events.done(agent)
                    events.tick(None)
                if not found and (
                    paused is None or done
                ):  # a saved job stays what was saved until it is done
                    events.tick(None)
        finally:
            for ref in running:
                with suppress(Exception):
                    ray.cancel(ref, force=True)  # with its process: an import stopped half-way spoils one

    def _take(self, session: Session, agent: Agent, given: Mapping[int, Tensor], ref: Any) -> None:
        """Make an answer the agent's own; raises what stopped it."""
        try:
            answer: Answer = session.ray.get(ref)
        except session.ray.exceptions.RayTaskError as e:
            raise ConsilienceError(
                f"a Ray worker should run its task. Found {agent.name!r} failing: {e.cause or e}."
            ) from e
        except session.ray.exceptions.RayError as e:
            times = "once" if not self.retries else f"{self.retries + 1} times"
            raise ConsilienceError(
                f"a Ray worker should live. Found that of {agent.name!r} dead, {times}: {type(e).__name__}."
            ) from e
        ledger = agent.ledger
        for kind, n in answer.times.items():
            ledger.add(agent.name, "macs", n * ledger.measured.setdefault(kind, answer.known[kind]))
        ledger.steps += answer.steps
        session.hear(answer, agent)
        if answer.why is not None:
            raise pickle.loads(answer.why)
        assert answer.facts is not None
        new = opened(answer.new, agent.training.device)
        tensors = {name: given[i] if i >= 0 else new[str(-1 - i)] for name, i in answer.places}
        agent.state = kept(agent.state, decode_state(tensors, json.loads(answer.facts)))

    def _open(self, events: EngineEvents) -> Session:
        """Ray as it runs, or one that is started here."""
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as e:
            raise ConsilienceError("the engine 'ray' needs Ray: pip install 'consilience[ray]'.") from e
        threads, ours = torch.get_num_threads(), not ray.is_initialized()
        where, address = "the one that runs", self.address or os.environ.get("RAY_ADDRESS") or "local"
        if ours:
            where = address
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            with as_before():
                if address == "local":
                    here = (
                        len(os.sched_getaffinity(0))
                        if hasattr(os, "sched_getaffinity")
                        else os.cpu_count() or 1
                    )
                    some = self.workers or max(1, int(here / self.cpus))
                    size = {"num_cpus": max(1, ceil(some * self.cpus)), "include_dashboard": False}
                else:
                    size = {}
                try:
                    ray.init(address=address, logging_level=logging.ERROR, **size)
                except (ConnectionError, ValueError, RuntimeError) as e:
                    raise ConsilienceError(
                        f"`address` should be of a Ray that answers (and takes this machine's token, if it asks for one). Found {address!r}: {e}."
                    ) from e
        there = ray.cluster_resources()
        if self.gpus > there.get("GPU", 0) or self.cpus > there.get("CPU", 0):
            lacking = f"Found {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
            if ours and address == "local":
                ray.shutdown()
                raise ConsilienceError(
                    f"an agent's `cpus = {self.cpus}` and `gpus = {self.gpus}` should be there. {lacking}."
                )
            warnings.warn(
                f"agents wait until Ray has {self.cpus} CPUs and {self.gpus} GPUs for one. {lacking}.",
                stacklevel=2,
            )
        room = there.get("CPU", 0) / self.cpus
        room = max(1, int(min(room, there.get("GPU", 0) / self.gpus) if self.gpus else room))
        if threads > max(1, self.cpus) and room > 1:
            warnings.warn(
                f"each worker computes with {threads} threads, as this process does, on `cpus = {self.cpus}`; "
                "OMP_NUM_THREADS=1 (or torch.set_num_threads(1)) is faster where many learn at once.",
                stacklevel=2,
            )
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": self.retries, "max_calls": 0}
        function = ray.remote(**options)(train)
        window = (
            2 * room if self.workers is None or (ours and address == "local") else min(self.workers, 2 * room)
        )
        self._session = Session(ray, ours, function, window)
        events.note(
            f"Ray ({where}): room for {room} agents at once, {self.cpus} CPUs and {self.gpus} GPUs each."
        )
        return self._session

    def close(self) -> None:
        """Forget the run; stop the Ray that was started here."""
        session, self._session = self._session, None
        if session is not None and session.ours:
            with as_before():
                session.ray.shutdown()


def kept(old: State, new: State) -> State:
    """The new state with the old one's own parts where they did not change, so that what is known of them (hashes) stays known."""

    def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)

    parts = {
        n: getattr(old, n)
        for n in ("params", "buffers", "base", "outer")
        if same(getattr(old, n), getattr(new, n))
    }
    bank = {
        k: old.bank[k] if k in old.bank and old.bank[k].facts() == m.facts() else m
        for k, m in new.bank.items()
    }
    return new.change(bank=bank, **parts)


@contextmanager
def as_before() -> Iterator[None]:
    """Give signals back their handlers (Ray takes SIGTERM), and keep Ray's advice on its own future to itself."""
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for n, handler in old.items():
            with suppress(ValueError):
                signal.signal(n, handler)
