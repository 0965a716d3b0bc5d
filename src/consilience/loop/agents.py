"""The agents of a trial: their first parameters, how messages pass, and when agents may be released."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, join
from consilience.core.method import Method
from consilience.core.metrics import Metric
from consilience.core.model import Model, in_columns
from consilience.core.params import FULL, Params, alias, content_hash, key, placed
from consilience.core.schedule import Exchange, Expert, Phase, Schedule, ScheduleFacts, Train, labels_of
from consilience.core.source import Source
from consilience.core.state import Frozen, State
from consilience.core.stopping import Stopping
from consilience.core.training import Training
from consilience.core.tree import cast_to
from consilience.loop.agent import Agent
from consilience.loop.ledger import Ledger


@dataclass(frozen=True, eq=False)
class Setup:
    """What all seeds of a run have in common, checked."""

    schedule: Schedule
    method: Method
    """Resolved for this schedule."""
    model: Model
    training: Training
    metrics: Mapping[str, tuple[Metric, ...]]
    """Those of each source, by its name; the first is in the matrices."""
    facts: ScheduleFacts
    judge_clients: bool = False
    stopping: Stopping | None = None
    """Ends a run early."""


class Agents(dict[str, Agent]):
    """The agents of a trial by name; each is made when it is first asked for."""

    def __init__(self, setup: Setup, seed: int, ledger: Ledger) -> None:
        super().__init__()
        self.setup, self.seed, self.ledger = setup, seed, ledger

    @cached_property
    def initial(self) -> State:
        """The state that every agent starts from."""
        return initial_state(self.setup, self.seed)

    def __missing__(self, name: str) -> Agent:
        setup, expert = self.setup, self.setup.schedule.experts.get(name)
        agent = Agent(
            name=name,
            model=setup.model if expert is None or expert.model is None else expert.model,
            method=setup.method,
            schedule=setup.schedule,
            training=setup.training,
            seed=self.seed,
            state=self.initial_of(name),
            ledger=self.ledger,
            revisited=setup.facts.revisited,
        )
        if expert is not None:
            give(agent, expert)
        self[name] = agent
        return agent

    def initial_of(self, name: str) -> State:
        """Return the state that an agent starts from: one for all but experts with a model of their own."""
        expert = self.setup.schedule.experts.get(name)
        if expert is None or expert.model is None:
            # States are immutable, so that all agents may start from one.
            return self.initial
        return own_state(self.setup, self.seed, expert.model, self.initial.origin)


class Wire:
    """Messages pass as bytes, which the ledger counts.

    A message that many agents receive, or relay, is one object in memory.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

        # Weak: a message that no agent holds any more is freed.
        self._arrived: WeakValueDictionary[object, Message] = WeakValueDictionary()
        self._sizes: WeakKeyDictionary[Message, int] = WeakKeyDictionary()

    def carry(self, message: Message, sender: str, receiver: str) -> Message:
        """Return the message as the receiver reads it from its bytes."""
        content = (message.key, message.version, message.digest, message.base, message.trained)
        arrived = self._arrived.get(content)
        if arrived is None:
            data = message.to_bytes()
            arrived = Message.from_bytes(data, check=False)  # hashed in this process a moment ago
            self._arrived[content], self._sizes[arrived] = arrived, len(data)
        self.ledger.transfer(sender, receiver, self._sizes[arrived])
        return arrived


def initial_state(setup: Setup, seed: int) -> State:
    """Return the parameters that all agents start from: drawn by the seed, or the schedule's `base`."""
    schedule, model = setup.schedule, setup.model
    params, buffers = model.init(key(seed, "init"))
    if schedule.base is not None:
        params, buffers = from_base(model, schedule.base, params, buffers)
        where = schedule.frame.column_of
        columns = [where.get(label) for label in labels_of(schedule.base)]
        # Classes of the base that are not in the schedule may lie anywhere: their outputs are trained again.
        if any(column is not None for column in columns):
            sample = schedule.sources[0]
            params, buffers = in_columns(model, (params, buffers), columns, 0, sample, "`base`")

    params, buffers = cast_entries(setup.training, model, params, buffers)
    frozen = Frozen(
        {name: p for name, p in params.items() if model.frozen(name)},
        {name: b for name, b in buffers.items() if model.derived(name)},
    )

    # Experts without a base come from parameters that nobody here has, so all say that they were given.
    given = schedule.experts and schedule.base is None
    return State(params, buffers, params, "given" if given else content_hash(params), frozen=frozen)


def own_state(setup: Setup, seed: int, model: Model, origin: str) -> State:
    """Return the first state of an expert that has this model, of its own."""
    params, buffers = cast_entries(setup.training, model, *model.init(key(seed, "init")))
    # Nobody else holds its frozen entries: they are sent and kept like all others.
    return State(params, buffers, params, origin)


def cast_entries(training: Training, model: Model, params: Params, buffers: Params) -> tuple[Params, Params]:
    """Cast parameters and buffers once, so that all that agents send and compare is of one type."""
    dtype, device = training.dtype, torch.device(training.device)

    def cast(tensor: Tensor, frozen: bool) -> Tensor:
        if frozen:
            return placed(tensor, device, dtype)
        return cast_to(tensor.detach(), device, dtype)

    params = {name: cast(p, model.frozen(name)) for name, p in params.items()}
    return params, {name: cast(b, model.derived(name)) for name, b in buffers.items()}


def from_base(
    model: Model, base: Mapping[str, Any], params: Params, buffers: Params
) -> tuple[Params, Params]:
    """Return the model's entries as a state_dict `base` has them.

    It may leave out buffers, and frozen entries that no seed changes.
    """
    base = model.entries_of(base)
    lacking = sorted(params.keys() - base.keys())
    if lacking:
        # Frozen entries that are drawn by a seed are not those that the base was trained with.
        other = model.init(key("another seed"))[0]
        lacking = [n for n in lacking if not (model.frozen(n) and torch.equal(params[n], other[n]))]
    if lacking:
        raise ConsilienceError(f"`base` must have all entries of the model, got none called {lacking[0]!r}.")

    given = {name: torch.as_tensor(base[name]) for name in (*params, *buffers) if name in base}
    own_buffers: Params = {}
    for name, own in buffers.items():
        buffer = given.get(name, own)
        if buffer.shape != own.shape:
            raise ConsilienceError(
                f"`base` must have the shapes of the model, got {tuple(buffer.shape)} for {name!r}, "
                f"whose shape is {tuple(own.shape)}."
            )
        both_float = buffer.is_floating_point() and own.is_floating_point()
        own_buffers[name] = buffer if both_float else buffer.to(own.dtype)
        if model.derived(name):
            own_buffers[name] = _held(own, buffer)

    own_params = {name: given.get(name, own) for name, own in params.items()}
    for name, own in params.items():
        if name in given and model.frozen(name):
            if own.is_floating_point() != given[name].is_floating_point():
                raise ConsilienceError(
                    f"`base` must have the types of the model's frozen entries, got {given[name].dtype} for "
                    f"{name!r}, which is {own.dtype}."
                )
            own_params[name] = _held(own, given[name])
    return own_params, own_buffers


def _held(own: Tensor, given: Tensor) -> Tensor:
    """Return a frozen tensor as it is given, or the model's own tensor if they are equal.

    Numbers of full precision stay as given; others, such as bfloat16, are of the model's type.
    """
    exact = own.dtype in FULL and given.dtype in FULL
    cast = given.to(own.device, given.dtype if exact else own.dtype)
    return own if cast.dtype == own.dtype and torch.equal(cast, own) else alias(cast)


def give(agent: Agent, expert: Expert) -> None:
    """Make an agent the owner of a trained expert, as if it had trained on the expert's source."""
    alone = expert.model is not None
    # The heads of a model of its own are in its own columns, which are those of its source.
    source = expert.source if alone else agent.schedule.source(expert.source.name)
    params, buffers = expert_entries(agent, expert, source)
    if not alone:
        params, buffers = _in_frame(agent, expert, (params, buffers), source)

    # A head must answer with the classes of its source, and does in their order where nothing says otherwise.
    grown = agent.model.grow(agent.state.params, agent.state.buffers, source, key(0, "given"))[1]
    buffers = {**{name: b for name, b in grown.items() if name not in agent.state.buffers}, **buffers}
    for name in grown.keys() - agent.state.buffers.keys():
        own, theirs = grown[name].tolist(), buffers[name].tolist()
        if name.endswith(".columns") and set(own) != set(theirs):
            raise ConsilienceError(
                f"the head of an expert must have the {len(own)} classes of its source, "
                f"got {len(theirs)} in {expert.name!r}{' that are others' * (len(own) == len(theirs))}."
            )

    agent.state = agent.state.change(
        params=params, buffers=buffers, version=1, size=1, trained=True, visits={source.name: 1}
    )
    items = agent.consolidator.export(agent.model, agent.state, (source,), agent.method.personal)
    messages = [agent.message(name, 1, 1, {"model": item}) for name, item in items.items()]
    agent.state = agent.state.change(bank=join({}, messages))


def _in_frame(
    agent: Agent, expert: Expert, entries: tuple[Params, Params], source: Source
) -> tuple[Params, Params]:
    """Return an expert's entries with its outputs in the columns of the schedule's frame."""
    base, frame = agent.schedule.base, agent.frame
    columns, whose = expert.columns(source, frame), f"the expert {expert.name!r}"
    moved = in_columns(agent.model, entries, columns, len(frame.labels), source, whose)
    # Task vectors would be the differences of rows of different classes.
    if moved[0] is not entries[0] and base is not None and not labels_of(base):
        raise ConsilienceError(
            f"experts must have the columns of their `base`, and {expert.name!r} has other labels than the "
            "schedule; give the base as `Result.params`, which says what its columns mean, or leave it out."
        )
    return moved


def expert_entries(agent: Agent, expert: Expert, source: Source) -> tuple[Params, Params]:
    """Return an expert's parameters and buffers, in the agent's types, with entries of its own task."""
    state = agent.state
    theirs = agent.model.entries_of({**expert.params, **expert.buffers})  # a state_dict holds both
    params: Params = {}
    buffers: Params = {}
    for name, own in {**state.params, **state.buffers}.items():
        held = params if name in state.params else buffers
        if name not in theirs:
            # What is frozen is the same in all experts, so that it may be left out.
            if not (agent.model.frozen(name) or agent.model.derived(name)):
                raise ConsilienceError(
                    "an expert must have all entries of the model, "
                    f"and {expert.name!r} has none called {name!r}."
                )
            held[name] = own
            continue

        entry = torch.as_tensor(theirs[name]).detach().to(own.device, own.dtype)
        if entry.shape != own.shape:
            raise ConsilienceError(
                f"an expert must have the shapes of the model, got {tuple(entry.shape)} for {name!r} "
                f"of {expert.name!r}, where the model has {tuple(own.shape)}."
            )
        if name in state.frozen and not torch.equal(entry, own):
            raise ConsilienceError(
                f"an expert must have the model's frozen entries, and {expert.name!r} has another {name!r}; "
                "give the experts' `base`, or a model with these entries."
            )
        held[name] = own if name in state.frozen else entry

    # Heads of its task are the expert's own: the model has none before it grows them.
    grown = agent.model.grow(state.params, state.buffers, source, key(0, "given"))
    for name in theirs.keys() - params.keys() - buffers.keys():
        if agent.model.task_of(name) is None:
            raise ConsilienceError(
                f"an expert must have no entries but the model's, and {expert.name!r} has {name!r}."
            )
        held = buffers if name in grown[1] or name in expert.buffers else params
        held[name] = torch.as_tensor(theirs[name]).detach()
    return params, buffers


def release_plan(phases: Sequence[Phase], evaluated: str) -> dict[int, tuple[str, ...]]:
    """Return which agents may be released after which phase (by its index).

    An agent that has just sent may be, if a server received from it (an agent that never trains itself), and
    if the next thing that it does, if anything, is to receive from that server: all it had comes back to it.
    """
    trainers = {name for phase in phases if isinstance(phase, Train) for name in phase.who}
    found: dict[int, tuple[str, ...]] = {}

    # Going backwards, the only sender that an agent receives from next; None if it needs its parameters
    # before that. Agents that do nothing more are not in it.
    next_sender: dict[str, str | None] = {evaluated: None}
    for i in reversed(range(len(phases))):
        phase = phases[i]
        if not isinstance(phase, Exchange):
            active = phase.who if isinstance(phase, Train) else (evaluated, *phase.clients)
            next_sender |= dict.fromkeys(active)
            continue

        # Agents that receive in the same exchange need their parameters for it.
        receivers: dict[str, list[str]] = {}
        for receiver, senders in phase.who.items():
            for sender in senders:
                receivers.setdefault(sender, []).append(receiver)
        idle = [sender for sender in receivers if sender not in phase.who]
        servers = {sender: set(receivers[sender]) - trainers for sender in idle}
        found[i] = tuple(
            sender for sender in idle if next_sender.get(sender, receivers[sender][0]) in servers[sender]
        )

        # Sending needs parameters; and only a single message replaces all of them.
        next_sender |= dict.fromkeys(idle)
        for receiver, senders in phase.who.items():
            next_sender[receiver] = senders[0] if len(senders) == 1 else None
    return found
