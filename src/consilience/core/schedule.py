"""Schedules: which agent trains on which source when, and which agents exchange messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.augment import Views, same_views
from consilience.core.errors import ConsilienceError, unknown
from consilience.core.leaks import check_splits
from consilience.core.losses import KINDS, NONE, Loss, fits, loss_of
from consilience.core.names import checked_name
from consilience.core.source import Examples, Label, LabelFrame, Source, Target, Tensors, same_inputs
from consilience.core.tree import Input, Tree, signature, types
from consilience.core.warning import warn


@dataclass(frozen=True)
class Train:
    """A phase in which agents train, each on all of its sources in every step, and none sees another.

    An agent fails where its parameters are not finite or its data cannot be read. With `least`, a failed
    agent sends nothing until it trains or receives again, as long as at least `least` others finish.
    Otherwise the run stops, and can be resumed.
    """

    who: Mapping[str, tuple[str, ...]]
    """The sources of each agent."""
    fractions: Mapping[str, float] = field(default_factory=dict)
    """The fraction of its steps that an agent takes, where it does not take all of them: a straggler."""
    least: int | None = None
    """How many agents must finish for the run to go on without the others."""


@dataclass(frozen=True)
class Exchange:
    """A phase in which receivers get messages. All messages are made before any agent receives."""

    who: Mapping[str, tuple[str, ...]]
    """The senders of each receiver."""
    by_size: bool = True
    """Whether messages are weighted by their number of examples, else equally."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """What all agents that may send to a receiver weigh together, also those that do not send now.

    Numbers of examples with `by_size`, else the number of agents. Missing: those that send are all."""


@dataclass(frozen=True)
class Evaluate:
    """A phase in which the evaluated agent is judged on the test data of every source."""

    name: str
    clients: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further agents to judge by their own parameters, and the sources on whose test data."""


Phase = Train | Exchange | Evaluate


def labels_of(state: Any) -> tuple[Label, ...]:
    """Return what a state dict of `Result.params` says of its output columns; () for any other."""
    return tuple(getattr(state, "labels", ()))


@dataclass(frozen=True, eq=False)
class Expert:
    """A trained model that is given to a run, with its source (for its classes and test data)."""

    name: str
    params: Mapping[str, Any]
    source: Source
    buffers: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[Label, ...] = ()
    """What each of its output columns means. Default: what `Result.params` says, or the source's labels."""
    model: Any = None
    """A model of its own, of any architecture: one of consilience.models, or a torch module; None: the run's.

    Its outputs stay in its own columns. Only methods that ask experts for answers take it."""

    def __post_init__(self) -> None:
        checked_name(self.name, "expert")
        # The class is frozen, so that experts can be shared.
        object.__setattr__(self, "labels", self.labels or labels_of(self.params) or self.source.labels)

    def columns(self, framed: Source, frame: LabelFrame) -> list[int | None]:
        """Return the column of each of its labels in a schedule's frame, where its source is `framed`."""
        where: dict[Label, int] = frame.column_of
        # Columns by position, as in scenario "domain", follow from the classes of the source.
        own = [self.source.labels[target] for target in self.source.classes]
        where |= dict(zip(own, framed.classes, strict=True))
        return [where.get(label) for label in self.labels]

    def outputs_of(self, framed: Source, frame: LabelFrame) -> tuple[int, ...]:
        """Return which output of its own model says each class of its source, which is `framed`.

        Raises ConsilienceError for a class without an output.
        """
        columns = self.columns(framed, frame)
        lacking = [column for column in framed.classes if column not in columns]
        if lacking:
            raise ConsilienceError(
                f"an expert must have an output for each class of its source, got none for "
                f"{frame.labels[lacking[0]]} in {self.name!r}; say what its outputs mean with `labels=`."
            )
        return tuple(columns.index(column) for column in framed.classes)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A setting: data, agents, and the order of phases. It knows nothing about methods.

    Raises ConsilienceError without sources, and where two have the same name.
    """

    setting: str
    """The name of the setting, for reports."""
    sources: tuple[Source, ...]
    """All sources that agents train on."""
    frame: LabelFrame
    """What the output columns mean."""
    plan: Callable[[int], Iterable[Phase]]
    """Yields the phases for a seed."""
    evaluated: str
    """The agent that is judged."""
    scenario: str = "class"
    """How targets become columns: "class", "task" or "domain", as `build` explains."""
    experts: Mapping[str, Expert] = field(default_factory=dict)
    """Given models, by the agent that starts from them."""
    base: Mapping[str, Any] | None = None
    """The parameters from which the given models were trained, where they are known."""
    judged: tuple[Source, ...] = ()
    """What the evaluated agent is judged on. Default: the sources. Parts of a stream share one `test`."""
    boundaries: bool = True
    """Whether learners may know where a source ends. If not, a stream is seen once."""
    augments: Mapping[str, Views] = field(default_factory=dict)
    """The augmentations of training samples, by source: also of sources that only buffers know."""

    def __post_init__(self) -> None:
        # Receipts, memories and visits are kept by the names of sources.
        names = [source.name for source in self.sources]
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        if twice:
            raise ConsilienceError(f"sources must have names of their own, got {', '.join(twice)} twice.")
        if not names:
            raise ConsilienceError("a schedule must have sources, got none.")
        checked_name(self.evaluated, "agent")
        self._check_vocabularies()
        # The class is frozen, so that a schedule can be run twice.
        object.__setattr__(self, "judged", self.judged or self.sources)
        own = {source.name: source.augment for source in self.sources if source.augment is not None}
        others = {name: views for name, views in self.augments.items() if name not in names}
        object.__setattr__(self, "augments", others | own)
        object.__setattr__(self, "_by_name", {source.name: source for source in self.sources})

    def _check_vocabularies(self) -> None:
        """Refuse texts of several vocabularies: an id would mean another token in each of them."""
        first: dict[str, str] = {}
        for source in (*self.sources, *self.judged):
            if source.vocabulary:
                first.setdefault(source.vocabulary, source.name)
        if len(first) > 1:
            one, other, *_ = first.values()
            raise ConsilienceError(
                f"texts of one schedule must share their vocabulary, got other tokens in {one!r} and "
                f"{other!r}; make one with data.Vocabulary.of(texts), and give it to all as `tokenizer`."
            )

    @property
    def labelled(self) -> bool:
        """Whether agents are given task labels in training and evaluation."""
        return self.scenario == "task"

    def source(self, name: str) -> Source:
        """Return the source of that name."""
        return self._by_name[name]  # type: ignore[attr-defined, no-any-return]

    def survey(self, seed: int = 0) -> ScheduleFacts:
        """Return the facts of this schedule, from its phases alone, without training."""
        return survey(self, seed)


@dataclass(frozen=True)
class SenderFacts:
    """What a receiver may know of an agent before it sends: how its model answers, nothing of its data."""

    model: Any
    """A model of its own; None: that of the run."""
    classes: tuple[int, ...]
    """The column of each class that it was trained for."""
    outputs: tuple[int, ...]
    """Which output of its model says each of them."""
    task: str | None
    """Its task, which its model is given; None: it has several."""
    columns: tuple[int, ...]
    """All columns of its tasks."""


@dataclass(frozen=True)
class ScheduleFacts:
    """What a method can know about a schedule before it runs."""

    setting: str
    """The name of the setting."""
    labelled: bool
    """Whether agents are given task labels in training and evaluation."""
    parts: int
    """The largest number of sources in one step."""
    trains: bool
    """Whether any agent trains."""
    exchanges: bool
    """Whether any agent receives messages."""
    receives_others: bool
    """Whether any agent receives what another agent was trained on."""
    shared_history: bool
    """Whether an agent trains after it trained on other sources, or received from agents that did."""
    own_history: bool
    """Whether an agent trains after it trained on other sources itself."""
    repeats: bool
    """Whether an agent trains after it trained or received."""
    common_base: bool
    """Whether agents receive only parameters that were trained from their own `State.base`."""
    learned_at: Mapping[str, tuple[int, ...]]
    """For each judged source, the stages in which new training on it reaches the evaluated agent."""
    stages: int
    """The number of evaluations."""
    kind: str = "class"
    """Of the targets: "class", "value" or "labels"; "mixed" if tasks differ."""
    kinds: frozenset[str] = frozenset({"class"})
    """All kinds of targets."""
    mixed: bool = False
    """Whether tasks differ in their kind of targets, their loss or their outputs."""
    places: bool = False
    """Whether some samples have a target for each of several places, such as tokens or pixels."""
    inputs: frozenset[object] = frozenset()
    """The shapes of samples, as `tree.signature` gives them."""
    trees: bool = False
    """Whether some inputs have several parts."""
    types: frozenset[object] = frozenset()
    """The types of samples, as `tree.types` gives them."""
    senders: Mapping[str, SenderFacts] = field(default_factory=dict)
    """The agents whose newly trained parameters others receive."""
    most_received: int = 0
    """The largest number of newly trained agents whose messages one agent receives at once."""
    most_combined: int = 0
    """The largest number of different parameters that one agent receives at once."""
    star: bool = True
    """Whether agents that train receive from one that never does, and only it combines what they trained."""
    revisited: frozenset[str] = frozenset()
    """Sources that some agent trains on more than once."""
    rounds: int = 0
    """The largest number of times that one agent receives trained parameters before training goes on."""
    alike: bool = True
    """Whether the tasks of each step have equal inputs, and one augmentation of them or none."""
    most_sources: int = 0
    """The largest number of sources that one agent trains on."""
    classes: int = 0
    """The largest number of classes that one agent trains on."""
    boundaries: bool = True
    """Whether agents may know where a source ends."""
    aware: bool = False
    """Whether agents know tasks in training: by labels, or with a mapper (the method fills this in)."""
    overlap: bool = False
    """Whether tasks share output columns."""
    totals: bool = True
    """Whether all agents that may send to a receiver of trained parameters are known: the same always send,
    or there is one such receiver, the evaluated agent, and exchanges have `totals`."""
    model: Any = None
    """The model of the run (the loop fills this in)."""


def survey(schedule: Schedule, seed: int) -> ScheduleFacts:
    """Return the facts of a schedule, from a symbolic run of its phases."""
    run = _SymbolicRun(schedule)
    for phase in schedule.plan(seed):
        if isinstance(phase, Train):
            run.train(phase)
        elif isinstance(phase, Exchange):
            run.exchange(phase)
        else:
            run.stage += 1
    return run.facts()


@dataclass(eq=False)
class _SymbolicAgent:
    """An agent without numbers: parameters are tokens, and equal tokens stand for equal parameters."""

    params: object = "init"
    base: object = "init"
    """The parameters after its last exchange."""
    knowledge: int = 0
    """The visits, its own and received ones, that its parameters came from: a bit for each."""
    own: set[str] = field(default_factory=set)
    """The sources that it trained on."""
    active: bool = False
    """Whether it trained or received."""


class _Sent(NamedTuple):
    """What a symbolic agent sends."""

    params: object
    base: object
    knowledge: int

    @property
    def trained(self) -> bool:
        """Whether the sender trained since it last received."""
        return self.params != self.base


@dataclass(eq=False)
class Counts:
    """What a symbolic run has counted so far; most of it becomes `ScheduleFacts`."""

    parts: int = 0
    """The largest number of sources in one step."""
    trains: bool = False
    """Whether any agent trained."""
    exchanges: bool = False
    """Whether any agent received messages."""
    receives_others: bool = False
    """Whether any agent received what another agent was trained on."""
    shared_history: bool = False
    """Whether an agent trained after it trained on other sources, or received from agents that did."""
    own_history: bool = False
    """Whether an agent trained after it trained on other sources itself."""
    repeats: bool = False
    """Whether an agent trained after it trained or received."""
    common_base: bool = True
    """Whether agents received only parameters that were trained from their own base."""
    most_received: int = 0
    """The largest number of newly trained agents whose messages one agent received at once."""
    most_combined: int = 0
    """The largest number of different parameters that one agent received at once."""
    star: bool = True
    """Whether agents that train receive from one that never does, and only it combines what they trained."""
    revisited: set[str] = field(default_factory=set)
    """Sources that some agent trained on more than once."""
    rounds: int = 0
    """The largest number of times that one agent had received trained parameters when training went on."""
    received: dict[str, int] = field(default_factory=dict)
    """How often each agent received newly trained parameters."""
    totals: bool = True
    """Whether all agents that may send to each receiver of trained parameters are known."""
    alike: bool = True
    """Whether the sources of each step have equal inputs."""
    events: int = 0
    """The number of visits; the parameters after a visit are named by it."""


class _SymbolicRun:
    """A run of a schedule in which agents train in name only.

    Every visit to a source is one bit, so that what an agent knows is one integer, and thousands of agents
    that receive the same cost one "or" each.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.stage = 1
        self.agents: dict[str, _SymbolicAgent] = {}
        # The source of each visit, by bit.
        self.visited: list[str] = []
        # The visits to each source, and the newest of them that reached the evaluated agent.
        self.visits_of: dict[str, int] = {}
        self.newest: dict[str, int] = {}
        self.learned_at: dict[str, list[int]] = {source.name: [] for source in schedule.judged}
        self.judged_by = _judged_by(schedule)
        # The agents whose newly trained parameters each agent received first.
        self.groups: dict[str, frozenset[str]] = {}
        # The agents that sent newly trained parameters to others, in their order.
        self.senders: dict[str, None] = {}
        self.counts = Counts()
        self.compared: dict[tuple[str, ...], bool] = {}

        for name, expert in schedule.experts.items():
            agent = self.agent(name)
            # Without their base, nothing says that two given models started from the same parameters.
            agent.params = ("expert", name)
            agent.base = "init" if schedule.base is not None else ("unknown", name)
            agent.knowledge = self.visit([expert.source.name])

    def agent(self, name: str) -> _SymbolicAgent:
        """Return the agent of that name, or a new one that has done nothing yet."""
        if name not in self.agents:
            self.agents[checked_name(name, "agent")] = _SymbolicAgent()
        return self.agents[name]

    def visit(self, sources: Iterable[str]) -> int:
        """Return new bits, one for a visit to each of the sources."""
        bits = 0
        for source in sources:
            bit = 1 << len(self.visited)
            self.visited.append(source)
            self.visits_of[source] = self.visits_of.get(source, 0) | bit
            bits |= bit
        return bits

    def learn(self, name: str, knowledge: int) -> None:
        """Add visits to what an agent knows, and note in which stage they reach the evaluated agent."""
        agent = self.agent(name)
        fresh = knowledge & ~agent.knowledge
        agent.knowledge |= knowledge
        # From the lowest bit to the highest: the order in which the visits took place.
        while fresh and name == self.schedule.evaluated:
            visit = (fresh & -fresh).bit_length() - 1
            fresh &= fresh - 1
            self.note(visit)

    def note(self, visit: int) -> None:
        """Note that a visit reached the evaluated agent, unless a later one to its source did before."""
        source = self.visited[visit]
        if visit <= self.newest.get(source, -1):
            return
        self.newest[source] = visit
        # Several parts of a stream count once in a stage.
        once = self.schedule.judged is not self.schedule.sources
        for column in self.judged_by[source]:
            if not once or self.stage not in self.learned_at[column]:
                self.learned_at[column].append(self.stage)

    def train(self, phase: Train) -> None:
        """Let agents train."""
        counts = self.counts
        counts.trains = True
        counts.rounds = max(counts.received.values(), default=0)

        for name, sources in phase.who.items():
            agent = self.agent(name)
            # Knowledge of the very sources that are trained on now is no history that could be forgotten.
            of_these = 0
            for source in sources:
                of_these |= self.visits_of.get(source, 0)

            counts.parts = max(counts.parts, len(sources))
            counts.alike = counts.alike and self.are_alike(sources)
            counts.revisited |= agent.own.intersection(sources)
            counts.shared_history |= bool(agent.knowledge & ~of_these)
            counts.own_history |= bool(agent.own.difference(sources))
            counts.repeats |= agent.active

            agent.active = True
            agent.own.update(sources)
            self.learn(name, self.visit(sources))
            # Every visit ends at parameters that nobody else has.
            counts.events += 1
            agent.params = counts.events

    def are_alike(self, names: tuple[str, ...]) -> bool:
        """Whether sources that are trained on together have equal inputs."""
        # Rounds train on the same sources again.
        if len(names) > 1 and names not in self.compared:
            first, *others = map(self.schedule.source, names)
            self.compared[names] = all(
                same_inputs(first.train, other.train) and same_views(first.augment, other.augment)
                for other in others
            )
        return self.compared.get(names, True)

    def exchange(self, phase: Exchange) -> None:
        """Let agents receive from others."""
        counts = self.counts
        counts.exchanges = True
        senders = {sender for group in phase.who.values() for sender in group}
        sent: dict[str, _Sent] = {}
        for name in senders:
            agent = self.agent(name)
            sent[name] = _Sent(agent.params, agent.base, agent.knowledge)

        # All look at the messages before anyone receives, because a receiver may be a sender too.
        for name, group in phase.who.items():
            base = self.agent(name).base
            trained = [sender for sender in group if sent[sender].trained]
            news = [sent[sender] for sender in trained]
            self.senders |= dict.fromkeys(sender for sender in trained if sender != name)
            if trained and self.groups.setdefault(name, frozenset(trained)) != frozenset(trained):
                counts.totals &= name == self.schedule.evaluated and name in phase.totals
            counts.most_received = max(counts.most_received, len(news))
            counts.most_combined = max(counts.most_combined, len({sent[sender].params for sender in group}))
            counts.received[name] = counts.received.get(name, 0) + bool(news)
            combines = len(trained) == len(group) and not self.agent(name).own
            counts.star &= combines or (not trained and len(group) == 1)
            counts.receives_others |= any(sender != name and sent[sender].knowledge for sender in group)
            counts.common_base &= all(message.base == base for message in news)

        for name, group in phase.who.items():
            agent = self.agent(name)
            for sender in group:
                self.learn(name, sent[sender].knowledge)
                agent.active = True
            mixed = frozenset((sender, sent[sender].params) for sender in group)
            # One message is adopted as it is. Of several, the hash is a token that stays small.
            agent.base = agent.params = sent[group[0]].params if len(mixed) == 1 else hash(mixed)

    def sender(self, name: str) -> SenderFacts:
        """Return what others may know of an agent that sends."""
        schedule, expert = self.schedule, self.schedule.experts.get(name)
        names = sorted({*self.agent(name).own, *([expert.source.name] if expert is not None else ())})
        sources = [schedule.source(source) for source in names]

        classes = tuple(dict.fromkeys(column for source in sources for column in source.classes))
        columns = (column for source in sources for column in schedule.frame.widened(source).classes)
        tasks = {source.task for source in sources}
        model, outputs = None, classes
        # Experts with the model of the run are put into the columns of the frame.
        if expert is not None and expert.model is not None:
            model, outputs = expert.model, expert.outputs_of(sources[0], schedule.frame)
        return SenderFacts(
            model=model,
            classes=classes,
            outputs=outputs,
            task=tasks.pop() if len(tasks) == 1 else None,
            columns=tuple(dict.fromkeys(columns)),
        )

    def facts(self) -> ScheduleFacts:
        """Return what the run showed."""
        schedule, counts = self.schedule, self.counts
        # Tasks overlap where two of them own one column.
        columns = [column for own in schedule.frame.tasks.values() for column in own]
        samples = _samples(schedule.sources)
        trained_on = [agent.own for agent in self.agents.values()]
        classes = [{column for name in own for column in schedule.source(name).classes} for own in trained_on]

        return ScheduleFacts(
            setting=schedule.setting,
            labelled=schedule.labelled,
            parts=counts.parts,
            trains=counts.trains,
            exchanges=counts.exchanges,
            receives_others=counts.receives_others,
            shared_history=counts.shared_history,
            own_history=counts.own_history,
            repeats=counts.repeats,
            common_base=counts.common_base,
            learned_at={name: tuple(stages) for name, stages in self.learned_at.items()},
            stages=self.stage - 1,
            kind=schedule.frame.kind,
            kinds=frozenset(target.kind for target in schedule.frame.targets.values()),
            mixed=len(schedule.frame.targets) > 1,
            places=any(source.places > 0 for source in schedule.sources),
            inputs=frozenset(signature(x) for x in samples),
            trees=any(isinstance(x, Tree) for x in samples),
            types=frozenset(types(x) for x in samples),
            senders={name: self.sender(name) for name in self.senders},
            most_received=counts.most_received,
            most_combined=counts.most_combined,
            star=counts.star,
            revisited=frozenset(counts.revisited),
            rounds=counts.rounds,
            totals=counts.totals,
            alike=counts.alike,
            most_sources=max(map(len, trained_on), default=0),
            classes=max(map(len, classes), default=0),
            boundaries=schedule.boundaries,
            aware=schedule.labelled,
            overlap=len(columns) > len(set(columns)),
        )


def _samples(sources: Sequence[Source]) -> list[Input]:
    """Return inputs of every source; those of one stream are read once."""
    found: dict[object, Input] = {}
    for source in sources:
        examples = source.train
        if isinstance(examples, Tensors):
            found[source.name] = examples.x
            continue

        # Thousands of clients may share a data set, and to read a sample may take long.
        at = id(getattr(examples, "dataset", examples))
        if at not in found:
            found[at] = examples.first()[0]
    return list(found.values())


def _judged_by(schedule: Schedule) -> dict[str, list[str]]:
    """Return, for each source, the judged sources whose test data shows what was learned of it."""
    if schedule.judged is schedule.sources:
        return {source.name: [source.name] for source in schedule.sources}

    def shows(judged: Source, source: Source) -> bool:
        return judged.test is source.test and (not schedule.labelled or judged.task == source.task)

    return {
        source.name: [judged.name for judged in schedule.judged if shows(judged, source)]
        for source in schedule.sources
    }


def build(
    setting: str,
    sources: Sequence[Source],
    scenario: str,
    plan: Callable[[int], Iterable[Phase]],
    evaluated: str,
    judged: Sequence[Source] = (),
    **more: Any,
) -> Schedule:
    """Make a schedule over sources, judged on them or on `judged`, with all targets mapped to one frame.

    The scenario says how. "class": targets are the classes of all sources together, without task labels.
    "task": the same, with the task label given in training and evaluation. "domain": targets are 0..k-1 in
    every source, or as they are where all have the same classes, without task labels.
    `more` are further fields of `Schedule`.
    """
    framed, frame = reframe([*sources, *judged], scenario)
    check_splits(framed)
    count = len(sources)
    tasks = {str(source.task) for source in framed[:count]}
    # Tasks that are only judged have no columns, because nobody trains on them.
    frame = replace(frame, tasks={task: columns for task, columns in frame.tasks.items() if task in tasks})
    return Schedule(setting, framed[:count], frame, plan, evaluated, scenario, judged=framed[count:], **more)


def reframe(sources: Sequence[Source], scenario: str) -> tuple[tuple[Source, ...], LabelFrame]:
    """Return the sources with targets mapped to one frame, and the frame; `build` explains scenarios."""
    if scenario not in ("task", "domain", "class"):
        raise ConsilienceError(f"`scenario` must be task, domain or class, got {scenario!r}.")
    if not sources:
        raise ConsilienceError("a schedule must have sources, got none.")

    _check_unframed(sources)
    # Classes come first; values and several labels have columns of their own after them, because a softmax
    # over a value would mean nothing.
    labels: tuple[Label, ...] = ()
    found: dict[int, Source] = {}
    mapped: _Mapped = {}
    for kind in KINDS:
        group = [(i, source) for i, source in enumerate(sources) if source.kind == kind]
        if not group:
            continue
        if kind != "class" and scenario != "task":
            group = _same_outputs(group)
        own = _labels([source for _, source in group], scenario)
        for i, source in group:
            table = _table(source, own, scenario, len(labels))
            parts = _mapped_parts(source, table, mapped) if kind == "class" else {}
            classes = tuple(int(table[target]) for target in source.classes)
            found[i] = replace(source, **parts, classes=classes, task=source.task or source.name)
        labels += own

    framed = tuple(replace(found[i], labels=labels) for i in range(len(sources)))
    # Sources of one task may have different classes; the task has all of them.
    tasks: dict[str, tuple[int, ...]] = {}
    for source in framed:
        task = str(source.task)
        tasks[task] = tuple(dict.fromkeys((*tasks.get(task, ()), *source.classes)))
    return with_targets(framed, LabelFrame(labels, tasks), None)


def _check_unframed(sources: Sequence[Source]) -> None:
    """Refuse sources of another schedule with several kinds of targets: their columns would be doubled."""
    whose: dict[tuple[Label, ...], Source] = {}
    for source in sources:
        first = whose.setdefault(source.labels, source)
        if first.kind != source.kind and not set(first.classes) & set(source.classes):
            raise ConsilienceError(
                f"sources must not come from another schedule, where {first.name!r} and {source.name!r} have "
                "columns side by side; give the sources that it was made from."
            )


def with_targets(
    sources: Sequence[Source], frame: LabelFrame, loss: Any
) -> tuple[tuple[Source, ...], LabelFrame]:
    """Return sources and frame with what the targets of each task are.

    `loss` is that of sources without one: a Loss or its name, or several by task or kind; None: that of the
    kind. Raises ConsilienceError for a loss that does not fit, or that no task has, and for a task of two
    kinds.
    """
    # A source's own loss wins over that of its task, which wins over that of its kind.
    chosen = _Chosen(loss)
    found: dict[str, Target] = {}
    for source in sources:
        target = chosen.target(source, frame)
        task = str(source.task)
        other = found.setdefault(task, target)
        if (other.kind, other.loss) != (target.kind, target.loss):
            raise ConsilienceError(
                f"a task must have targets of one kind and one loss, got {other.kind} with {other.loss} and "
                f"{target.kind} with {target.loss} for {task!r}; give each its own `task`."
            )
        found[task] = replace(other, complete=other.complete and target.complete)
    chosen.check_used(sources)

    # Where all tasks are alike, examples of several may be in one batch.
    whole = {target.columns if target.kind != "class" else None: target for target in found.values()}
    alike = {(target.kind, target.loss) for target in found.values()}
    if len(alike) == 1 and len(whole) == 1:
        ((columns, target),) = whole.items()
        leading = columns is None or columns == tuple(range(len(columns)))
        complete = all(target.complete for target in found.values())
        only = replace(target, columns=None if leading else columns, complete=complete)
        return tuple(replace(s, target="") for s in sources), replace(frame, targets={"": only})

    # Without task labels, classes compete with the classes of all tasks, but not with values.
    classes = tuple(
        dict.fromkeys(c for task, t in found.items() if t.kind == "class" for c in frame.tasks[task])
    )
    targets = {
        task: replace(target, columns=classes) if target.kind == "class" else target
        for task, target in found.items()
    }
    return tuple(replace(s, target=str(s.task)) for s in sources), replace(frame, targets=targets)


class _Chosen:
    """The losses of a run: one for all tasks, or several by task or kind."""

    def __init__(self, loss: Any) -> None:
        self.by_name: Mapping[str, Any] = loss if isinstance(loss, Mapping) else {}
        self.default = None if isinstance(loss, Mapping) else loss
        self.used: set[str] = set()
        self.unfit: list[str] = []
        """The kinds of sources that the one for all tasks does not fit."""

    def target(self, source: Source, frame: LabelFrame) -> Target:
        """Return what the targets of a source are."""
        chosen = source.loss
        for name in (str(source.task), source.kind):
            if name in self.by_name:
                self.used.add(name)
                chosen = self.by_name[name] if chosen is None else chosen
        if not fits(self.default, source.kind):
            self.unfit.append(source.kind)
        elif chosen is None:
            chosen = self.default

        columns = source.classes
        names = [source.labels[column][1] for column in columns]
        loss = loss_of(chosen, source.kind).fitted(names, len(source.labels), columns)
        return Target(source.kind, loss, columns, _complete(source, loss))

    def check_used(self, sources: Sequence[Source]) -> None:
        """Refuse losses that no task has: by a name of none, or of another kind than all of them."""
        if self.unfit and len(self.unfit) == len(sources):
            loss_of(self.default, self.unfit[0])
        there = dict.fromkeys(place for s in sources for place in (s.task, s.kind) if place)
        for name in self.by_name:
            if name not in self.used:
                raise unknown("loss", name, there, "the tasks or kinds of the schedule")


def _complete(source: Source, loss: Loss) -> bool:
    """Whether no training target of a source is missing. Raises ConsilienceError where all are."""
    there = loss.there(source.train.targets())
    if not bool(there.any()):
        raise ConsilienceError(
            f"a source must have training targets, and all of {source.name!r} are missing."
        )
    # An augmentation may take targets away, such as pixels outside of an image that was turned.
    changed = source.augment is not None and source.augment.joint
    return not changed and bool(there.all())


def _same_outputs(group: Sequence[tuple[int, Source]]) -> list[tuple[int, Source]]:
    """Return values and labels of sources without a task of their own under one label if they have one name.

    Two sites that both measure "value" mean the same by it; two tasks do not.
    """
    first: dict[tuple[str, ...], tuple[Label, ...]] = {}
    found = []
    for i, source in group:
        names = tuple(name for _, name in source.labels)
        shared = source.labels if source.task is not None else first.setdefault(names, source.labels)
        found.append((i, replace(source, labels=shared)))
    return found


def _labels(sources: Sequence[Source], scenario: str) -> tuple[Label, ...]:
    """Return the labels of the columns of sources of one kind."""
    if sources[0].kind == "class":
        return _domain_labels(sources) if scenario == "domain" else _class_labels(sources, scenario)
    if scenario != "domain":
        return tuple(dict.fromkeys(label for source in sources for label in source.labels))
    # By position: the widest source names the columns of all.
    widest = max(sources, key=lambda source: len(source.labels))
    return widest.labels


def _table(source: Source, labels: Sequence[Label], scenario: str, first: int) -> Tensor:
    """Return the column [targets] of each target of a source; `first` is that of the first label."""
    table = torch.full((len(source.labels),), -1, dtype=torch.long)
    # By position, unless the columns are the source's own labels.
    if scenario == "domain" and source.labels != labels:
        table[list(source.classes)] = torch.arange(len(source.classes))
    else:
        # A test may contain classes that this source does not train, but others do.
        column_of = {label: column for column, label in enumerate(labels)}
        table = torch.tensor([column_of.get(label, -1) for label in source.labels])
    return torch.where(table < 0, table, table + first)


def _domain_labels(sources: Sequence[Source]) -> tuple[Label, ...]:
    """Return all labels where sources have the same ones and the same classes, else numbers 0..k-1."""
    first = sources[0]
    if all(source.labels == first.labels and source.classes == first.classes for source in sources):
        return first.labels
    return tuple(("domain", str(number)) for number in range(max(len(source.classes) for source in sources)))


def _class_labels(sources: Sequence[Source], scenario: str) -> tuple[Label, ...]:
    """Return all labels that sources declare, in the order in which they name them.

    Labels that do not occur are kept: without their columns, a net of the user's own would be misread.
    """
    labels = tuple(dict.fromkeys(label for source in sources for label in source.labels))
    # With task labels, equal names of different tasks never compete.
    if scenario == "class":
        _warn_of_equal_names(labels)
    return labels


def _warn_of_equal_names(labels: Sequence[Label]) -> None:
    """Warn where several label spaces have a class of one name: these are different classes."""
    spaces: dict[str, list[str]] = {}
    for space, name in labels:
        spaces.setdefault(name, []).append(space)
    equal = {name: own for name, own in spaces.items() if len(own) > 1}
    if equal:
        name, own = next(iter(equal.items()))
        shown = ", ".join(map(repr, own[:3])) + ", .." * (len(own) > 3)
        warn(
            f"classes of one name in different label spaces are different classes, and {name!r} is in "
            f"{len(own)} spaces ({shown}), so that there are {len(labels)} classes; where they mean the "
            "same, give their sources one `space`, else names of their own"
        )


_Mapped = dict[tuple[int, tuple[int, ...]], Examples]
"""Examples that were mapped already, by their identity and table: parts of a stream keep sharing one test."""


def _mapped_parts(source: Source, table: Tensor, mapped: _Mapped) -> dict[str, Any]:
    """Return train, validation and test with target t replaced by table[t]."""
    # Targets that stay as they are keep the very examples, and so the memory they are in.
    parts: dict[str, Any] = {name: getattr(source, name) for name in ("train", "validation", "test")}
    if torch.equal(table, torch.arange(len(table))):
        return parts
    for name, examples in parts.items():
        at = (id(examples), tuple(table.tolist()))
        if at not in mapped:
            # Not a closure, which could not be sent to the workers of a stream.
            mapped[at] = examples.map(y=partial(_columns, table))
        parts[name] = mapped[at]
    return parts


def _columns(table: Tensor, y: Tensor) -> Tensor:
    """Return the columns of targets, by a table; what has no target keeps none."""
    return torch.where(y == NONE, y, table.to(y.device)[y.clamp_min(0)])
