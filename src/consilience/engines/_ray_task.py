"""Tasks of the Ray engine: what one visit of an agent is sent to a worker as, and what comes back.

States are sent as safetensors bytes and JSON; Ray pickles code and configuration. A task is a pure function
of its arguments, so a task whose worker died is run again.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import pickle
import platform
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging.handlers import QueueHandler
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import pack, unpack
from consilience.core.schedule import Schedule
from consilience.core.state import Frozen, State, decode_state, encode_state
from consilience.core.training import Place
from consilience.loop.agent import Agent
from consilience.loop.ledger import Cost, Ledger

T = TypeVar("T")


# Messages


@dataclass(frozen=True)
class Task:
    """One visit of an agent.

    Its state is `facts` (JSON) and `places`: the number of each tensor among those in `shared` and `own`.
    """

    agent: str
    sources: tuple[str, ...]
    fraction: float
    place: Place
    seed: int
    config: Any
    """Reference to the configuration of the run."""
    facts: str
    places: tuple[tuple[str, int], ...]
    own: bytes
    """Tensors that only this agent needs."""
    shared: tuple[Any, ...]
    """References to tensors that several agents need."""
    frozen: Any = None
    """Reference to what is frozen; None where nothing is."""
    device: str = "cpu"
    paused: tuple[bytes, Mapping[str, float]] | None = None


class Encoded(NamedTuple):
    """A new state: `places` numbers its tensors, >= 0 for one of the task's, -1 - i for tensor i of `new`."""

    facts: str
    places: tuple[tuple[str, int], ...]
    new: bytes


@dataclass(frozen=True)
class Answer:
    """The worker's answer: the new state or the error, the costs, and what was warned and logged."""

    state: Encoded | None
    error: bytes | None
    costs: Mapping[str, float]
    """What its page of the ledger got."""
    measured: Mapping[Hashable, Cost]
    """The kinds of work that were measured."""
    steps: int
    visit: dict[str, Any] | None
    """What the log says of it."""
    warned: tuple[tuple[str, type[Warning]], ...]
    records: tuple[logging.LogRecord, ...]


def aligned(data: bytes, device: str) -> dict[str, Tensor]:
    """Read tensors from safetensors bytes onto a device, aligned as torch aligns new ones."""
    tensors, _ = unpack(data, "a state")
    # The bits of a matrix product may depend on the alignment of its operands.
    return {
        name: (tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()).to(device)
        for name, tensor in tensors.items()
    }


# Pickling


def versions() -> dict[str, str]:
    """Return the versions that a worker must share with the driver to compute the same bits."""
    from consilience.version import __version__

    return {"consilience": __version__, "torch": torch.__version__, "Python": platform.python_version()}


def cloudpickle() -> Any:
    """Return the module with which Ray pickles code."""
    return importlib.import_module("ray.cloudpickle")


def loaded(data: bytes, frozen: Frozen | None = None) -> Any:
    """Load what `dumped` pickled; raises ConsilienceError where its code cannot be imported."""
    held = frozen.tensors if frozen is not None else []

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: Any) -> Tensor:
            index, kind, trained = place
            return kind(held[index], trained) if kind is torch.nn.Parameter else held[index]

    try:
        return Unpickler(io.BytesIO(data)).load()
    except (ImportError, AttributeError) as error:
        raise ConsilienceError(
            f"the code of a run must be importable on Ray's workers, but one lacks it: {error}."
        ) from error


def dumped(value: Any, what: str, frozen: Frozen | None = None) -> bytes:
    """Pickle a value, lambdas and classes of a notebook included, and views without the tensors they view.

    Tensors in the memory of frozen ones are left out: `loaded` is given these again.
    """
    held = frozen.tensors if frozen is not None else []
    places = {(t.data_ptr(), t.shape, t.dtype): i for i, t in enumerate(held) if t.device.type == "cpu"}

    class Pickler(cloudpickle().CloudPickler):  # type: ignore[misc]
        def persistent_id(self, value: Any) -> Any:
            if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
                return None
            place = places.get((value.data_ptr(), value.shape, value.dtype)) if value.numel() else None
            return None if place is None else (place, type(value), value.requires_grad)

        def reducer_override(self, value: Any) -> Any:
            # Only plain tensors on the CPU: others have their own ways to be pickled.
            plain = type(value) is Tensor and value.device.type == "cpu" and value.layout is torch.strided
            if not plain or value.requires_grad:
                return super().reducer_override(value)
            if value.untyped_storage().nbytes() > value.nbytes:
                return value.clone(memory_format=torch.contiguous_format).__reduce_ex__(2)
            return NotImplemented

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump(value)
    except Exception as error:
        raise ConsilienceError(f"Ray needs everything pickled, but {what} cannot be: {error}.") from error
    return buffer.getvalue()


def portable(error: Exception) -> bytes:
    """Pickle an exception with its traceback as a note; where that fails, an error with the same text."""
    error.add_note("in a Ray worker: " + "".join(traceback.format_exception(error)))
    with suppress(Exception):
        data: bytes = cloudpickle().dumps(error)
        # Some exceptions can be pickled, but not loaded: their constructor wants other arguments.
        pickle.loads(data)
        return data
    return pickle.dumps(ConsilienceError(f"{type(error).__name__}: {error}"))


# How a process computes


def settings() -> dict[str, Any]:
    """Return the settings of this process that decide the bits of a result."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "level": logging.getLogger().level,
    }


def adopt(settings: Mapping[str, Any]) -> None:
    """Compute as the process with these settings does."""
    # A sum is split among threads, so their number decides how it is rounded.
    if torch.get_num_threads() != settings["threads"]:
        torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(settings["dtype"])
    torch.set_float32_matmul_precision(settings["matmul"])
    torch.use_deterministic_algorithms(settings["deterministic"])
    logging.getLogger().setLevel(settings["level"])


# In a worker


class Records(QueueHandler):
    """Keeps log records, prepared for pickling."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.records: list[logging.LogRecord] = []

    def enqueue(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def recorded() -> Iterator[tuple[list[warnings.WarningMessage], list[logging.LogRecord]]]:
    """Record the warnings and the log records of what is done inside."""
    handler, root = Records(), logging.getLogger()
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield warned, handler.records
    finally:
        root.removeHandler(handler)


_held: dict[str, Any] = {}
"""Objects of the store that this process fetched for its last task: a configuration, and shared tensors."""


def fetch(ref: Any, read: Callable[[Any], T]) -> T:
    """Fetch an object of the store, and read it once per process."""
    key = ref.hex()
    if key not in _held:
        import ray

        _held[key] = read(ray.get(ref))
    return _held[key]  # type: ignore[no-any-return]


def raw(frozen: Frozen) -> list[tuple[str, str, torch.dtype, tuple[int, ...], Any]]:
    """Return what is frozen as bytes in arrays, which Ray keeps once for all workers of a machine."""
    held = {"params": frozen.params, "buffers": frozen.buffers}
    return [
        (kind, name, tensor.dtype, tuple(tensor.shape), _flat(tensor).numpy())
        for kind, tensors in held.items()
        for name, tensor in tensors.items()
    ]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def thawed(parts: Sequence[Any], device: str) -> Frozen:
    """Return what `raw` was made of, on a device; on the CPU over Ray's own memory."""
    held: dict[str, dict[str, Tensor]] = {"params": {}, "buffers": {}}
    with warnings.catch_warnings():
        # The arrays are read-only, and nobody writes what is frozen.
        warnings.simplefilter("ignore", UserWarning)
        for kind, name, dtype, shape, array in parts:
            tensor = torch.from_numpy(array)
            tensor = tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()
            held[kind][name] = tensor.view(dtype).view(shape).to(device)
    return Frozen(held["params"], held["buffers"])


def configured(data: bytes, frozen: Frozen) -> dict[str, Any]:
    """Read the configuration of a run; raises ConsilienceError where the versions differ."""
    theirs, config = pickle.loads(data)
    for name, version in versions().items():
        if theirs.get(name) != version:
            raise ConsilienceError(
                f"Ray's workers must have the driver's versions, got {name} {version} on a worker and "
                f"{theirs.get(name)} on the driver."
            )
    return loaded(config, frozen)  # type: ignore[no-any-return]


def train(task: Task, measured: Mapping[Hashable, Cost], *sources: bytes) -> Answer:
    """Run one visit: what a worker does."""
    # What the last task needed and this one does not is of an earlier round, and would never be freed.
    wanted = {ref.hex() for ref in (task.config, task.frozen, *task.shared) if ref is not None}
    for key in _held.keys() - wanted:
        del _held[key]

    ledger = Ledger(measured=dict(measured))
    state: Encoded | None = None
    error: bytes | None = None
    with recorded() as (warned, records):
        try:
            state = visit(task, ledger, sources)
        except Exception as why:
            error = portable(why)
    return Answer(
        state,
        error,
        ledger.by_agent.get(task.agent, {}),
        {kind: cost for kind, cost in ledger.measured.items() if measured.get(kind) != cost},
        ledger.steps,
        ledger.visit,
        tuple((str(each.message), each.category) for each in warned),
        tuple(records),
    )


def visit(task: Task, ledger: Ledger, sources: Sequence[bytes]) -> Encoded:
    """Rebuild the agent of a task, train it on its sources, and encode its new state."""
    frozen = Frozen() if task.frozen is None else fetch(task.frozen, lambda parts: thawed(parts, task.device))
    config = fetch(task.config, lambda data: configured(data, frozen))
    adopt(config["settings"])
    device = config["training"].device
    given = tuple(loaded(source) for source in sources)
    tensors = aligned(task.own, device)
    for ref in task.shared:
        tensors |= fetch(ref, lambda data: aligned(data, device))

    places = {name: tensors[str(place)] for name, place in task.places}
    agent = Agent(
        name=task.agent,
        model=config["model"],
        method=config["method"],
        schedule=Schedule(sources=given, plan=_no_phases, **config["schedule"]),
        training=config["training"],
        seed=task.seed,
        state=decode_state(places, json.loads(task.facts), frozen),
        ledger=ledger,
        revisited=config["revisited"],
    )

    # From here on a worker does what the serial engine does, so the bits are the same.
    job = agent.prepare(task.sources, task.fraction, task.place)
    if task.paused is not None:
        job.load(aligned(task.paused[0], device), task.paused[1])
    for _ in job.run(ledger):
        pass
    agent.finish(job)
    return encoded(agent.state, tensors)


def encoded(state: State, given: Mapping[str, Tensor]) -> Encoded:
    """Encode a state; tensors that the task gave are not sent back."""
    # By identity: a part of the state that a visit does not change is the very tensor that was sent.
    tensors, facts = encode_state(state)
    known = {id(tensor): int(place) for place, tensor in given.items()}
    new: dict[int, int] = {}
    held: dict[str, Tensor] = {}
    places = []
    for name, tensor in tensors.items():
        place = known.get(id(tensor))
        if place is None:
            index = new.setdefault(id(tensor), len(new))
            held[str(index)] = tensor
            place = -1 - index
        places.append((name, place))
    return Encoded(json.dumps(facts), tuple(places), pack(held))


def _no_phases(seed: int) -> Sequence[Any]:
    """Return the plan of a worker's schedule, which is empty: the driver has the phases."""
    return ()
