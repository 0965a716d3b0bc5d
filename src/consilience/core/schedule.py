"""Schedules: only who learns which source when, and who hears whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from consilience.core.errors import ConsilienceError
from consilience.core.source import Examples, LabelFrame, Source


@dataclass(frozen=True)
class Train:
    """These agents learn these sources, each all of its own in every step; the agents do not see each other.

    An agent that fails (its parameters are not finite, its data cannot be read) is not heard until it learns or hears again, where
    at least `least` others finish; else, or without `least`, the run stops, and can be resumed.
    """

    who: Mapping[str, tuple[str, ...]]
    fractions: Mapping[str, float] = field(default_factory=dict)
    """The fraction of its steps that an agent does, where it is not all of them: a straggler."""
    least: int | None = None


@dataclass(frozen=True)
class Exchange:
    """These listeners hear these speakers, all at once: everybody speaks before anybody absorbs."""

    who: Mapping[str, tuple[str, ...]]
    by_size: bool = True
    """Whether messages weigh by their number of examples, else equally."""


@dataclass(frozen=True)
class Evaluate:
    """The evaluated agent is judged on every source's test data."""

    name: str
    clients: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Agents that are judged too, by their own parameters, on the test data of these sources."""


Phase = Train | Exchange | Evaluate


@dataclass(frozen=True, eq=False)
class Expert:
    """A trained model that is given, not learned here: parameters, buffers and the source (for its classes and its test data) it was trained for."""

    name: str
    params: Mapping[str, Any]
    source: Source
    buffers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Schedule:
    """`plan(seed)` yields the phases. `evaluated` is the agent that is judged; `labelled` whether it is told the task."""

    setting: str
    sources: tuple[Source, ...]
    frame: LabelFrame
    plan: Callable[[int], Iterable[Phase]]
    evaluated: str
    scenario: str = "class"
    experts: Mapping[str, Expert] = field(default_factory=dict)
    base: Mapping[str, Any] | None = None
    judged: tuple[Source, ...] = ()
    """What the evaluated agent is judged on: by default the sources. Parts of a stream share the `test` of what they are parts of."""
    boundaries: bool = True
    """Whether learners may know where a source ends; without, a stream is seen once."""

    def __post_init__(self) -> None:
        names = [s.name for s in self.sources]
        twice = sorted(n for n, times in Counter(names).items() if times > 1)
        if twice:
            raise ConsilienceError(f"sources should have names of their own. Found {', '.join(twice)} twice.")
        if not names:
            raise ConsilienceError("a schedule should have sources. Found none.")
        object.__setattr__(self, "judged", self.judged or self.sources)
        object.__setattr__(self, "_by_name", {s.name: s for s in self.sources})

    @property
    def labelled(self) -> bool:
        return self.scenario == "task"

    def source(self, name: str) -> Source:
        """The source of that name."""
        return self._by_name[name]  # type: ignore[attr-defined, no-any-return]

    def survey(self, seed: int = 0) -> ScheduleFacts:
        """What the phases show when they are walked without any training."""
        return survey(self, seed)


@dataclass(frozen=True)
class ScheduleFacts:
    """What a method can know of a schedule before it runs."""

    setting: str
    labelled: bool
    parts: int
    """The most sources in one step."""
    trains: bool
    """Whether anybody learns."""
    exchanges: bool
    """Whether anybody hears."""
    receives_others: bool
    """Whether anybody absorbs what another agent learned."""
    shared_history: bool
    """Whether a learn comes after another source was learned or heard of, through items that travel."""
    own_history: bool
    """Whether an agent learns a source after another of its own."""
    repeats: bool
    """Whether an agent learns again after it learned or heard."""
    common_base: bool
    """Whether all that is heard at once started from the listener's own parameters."""
    learned_at: Mapping[str, tuple[int, ...]]
    """The stages in which something newly learned of each source reaches the evaluated agent."""
    stages: int
    kind: str = "class"
    """Of the targets: "class" or "value"."""
    most_received: int = 0
    """The most agents that learned and are heard at once."""
    revisited: frozenset[str] = frozenset()
    """Sources that some agent learns more than once."""
    rounds: int = 0
    """How often some agent absorbs what was newly learned before somebody learns again."""
    most_sources: int = 0
    """The most sources that one agent learns."""
    classes: int = 0
    """The most classes that one agent learns."""
    boundaries: bool = True
    """Whether agents may know where a source ends."""
    aware: bool = False
    """Whether agents are given the task of what they learn: a scenario with labels, or a mapper (put in by the method)."""
    overlap: bool = False
    """Whether tasks have output columns in common."""
    model: Any = None


def survey(schedule: Schedule, seed: int) -> ScheduleFacts:
    """The facts of a schedule, from a symbolic run of its phases: parameters are names, knowledge is (source -> last learn)."""
    base: dict[str, object] = {}
    current: dict[str, object] = {}
    known: dict[
        str, int
    ] = {}  # a bit for each learn of a source: what agents know is a number, and many hear it at once
    bits: list[str] = []
    of: dict[str, int] = {}
    latest: dict[str, int] = {}
    own: dict[str, set[str]] = {}
    active: set[str] = set()
    parts, learns, hears, others, shared, private, repeats, common = (
        0,
        False,
        False,
        False,
        False,
        False,
        False,
        True,
    )
    revisited: set[str] = set()
    most = rounds = 0
    received: dict[str, int] = {}
    learned: dict[str, list[int]] = {s.name: [] for s in schedule.judged}
    parted = schedule.judged is not schedule.sources
    judges = {
        s.name: [
            j.name
            for j in schedule.judged
            if j.test is s.test and (not schedule.labelled or j.task == s.task)
        ]
        if parted
        else [s.name]
        for s in schedule.sources
    }
    stage, event = 1, 0

    def learn(sources: Iterable[str]) -> int:
        total = 0
        for s in sources:
            bit = 1 << len(bits)
            bits.append(s)
            of[s] = of.get(s, 0) | bit
            total |= bit
        return total

    def reach(agent: str, news: int) -> None:
        fresh = news & ~known.get(agent, 0)
        known[agent] = known.get(agent, 0) | news
        while fresh and agent == schedule.evaluated:
            at = (fresh & -fresh).bit_length() - 1
            fresh &= fresh - 1
            source = bits[at]
            if at > latest.get(source, -1):
                latest[source] = at
                for column in judges[source]:
                    if not parted or stage not in learned[column]:
                        learned[column].append(stage)

    for name, expert in schedule.experts.items():
        current[name] = ("expert", name)
        base[name] = "init" if schedule.base is not None else ("unknown", name)
        known[name] = learn([expert.source.name])
    for phase in schedule.plan(seed):
        if isinstance(phase, Train):
            learns = True
            rounds = max(received.values(), default=0)
            for agent, names in phase.who.items():
                event += 1
                parts = max(parts, len(names))
                revisited |= {n for n in names if n in own.get(agent, set())}
                own_bits = 0
                for n in names:
                    own_bits |= of.get(n, 0)
                shared |= bool(known.get(agent, 0) & ~own_bits)
                private |= bool(own.get(agent, set()) - set(names))
                repeats |= agent in active
                active.add(agent)
                own.setdefault(agent, set()).update(names)
                reach(agent, learn(names))
                current[agent] = event
        elif isinstance(phase, Exchange):
            hears = True
            closed_form = {s for ss in phase.who.values() for s in ss}
            told = {s: (current.get(s, "init"), base.get(s, "init"), known.get(s, 0)) for s in closed_form}
            for listener, speakers in phase.who.items():
                news = sum(told[s][0] != told[s][1] for s in speakers)
                most = max(most, news)
                received[listener] = received.get(listener, 0) + bool(news)
                others |= any(s != listener and told[s][2] for s in speakers)
                common &= all(
                    told[s][1] == base.get(listener, "init") for s in speakers if told[s][0] != told[s][1]
                )
            for listener, speakers in phase.who.items():
                for s in speakers:
                    reach(listener, told[s][2])
                    active.add(listener)
                mixed = frozenset((s, told[s][0]) for s in speakers)
                base[listener] = current[listener] = told[speakers[0]][0] if len(mixed) == 1 else hash(mixed)
        else:
            stage += 1
    columns = [c for own in schedule.frame.tasks.values() for c in own]
    return ScheduleFacts(
        setting=schedule.setting,
        labelled=schedule.labelled,
        parts=parts,
        trains=learns,
        exchanges=hears,
        receives_others=others,
        shared_history=shared,
        own_history=private,
        repeats=repeats,
        common_base=common,
        learned_at={k: tuple(v) for k, v in learned.items()},
        stages=stage - 1,
        kind=schedule.frame.kind,
        boundaries=schedule.boundaries,
        classes=max(
            (len({c for n in names for c in schedule.source(n).classes}) for names in own.values()), default=0
        ),
        revisited=frozenset(revisited),
        most_received=most,
        most_sources=max(map(len, own.values()), default=0),
        rounds=rounds,
        aware=schedule.labelled,
        overlap=len(columns) > len(set(columns)),
    )


def build(
    setting: str,
    sources: Sequence[Source],
    scenario: str,
    plan: Callable[[int], Iterable[Phase]],
    evaluated: str,
    judged: Sequence[Source] = (),
    **more: Any,
) -> Schedule:
    """A schedule over sources, judged on them or on others, brought into one frame as the scenario says.

    "class": targets are classes of all sources together, no task label. "task": the same, and the task label is given in
    training and at evaluation. "domain": targets are 0..k-1 in every source, no task label.
    """
    framed, frame = reframe([*sources, *judged], scenario)
    n = len(sources)
    tasks = {str(s.task) for s in framed[:n]}
    frame = replace(frame, tasks={t: c for t, c in frame.tasks.items() if t in tasks})
    return Schedule(setting, framed[:n], frame, plan, evaluated, scenario, judged=framed[n:], **more)


def reframe(sources: Sequence[Source], scenario: str) -> tuple[tuple[Source, ...], LabelFrame]:
    """The sources with targets mapped into one frame."""
    import torch

    if scenario not in ("task", "domain", "class"):
        raise ConsilienceError(f"`scenario` should be task, domain or class. Found {scenario!r}.")
    if len({s.kind for s in sources}) > 1:
        raise ConsilienceError(
            "sources of one schedule should be all of classes or all of values. Found both."
        )
    if not sources:
        raise ConsilienceError("a schedule should have sources. Found none.")
    kind = sources[0].kind
    if kind == "value":
        framed = tuple(s.map(task=s.task or s.name) for s in sources)
        return framed, LabelFrame(sources[0].labels, {str(s.task): s.classes for s in framed}, kind)
    if scenario == "domain":
        most = max(len(s.classes) for s in sources)
        same = all(s.labels == sources[0].labels and s.classes == sources[0].classes for s in sources)
        names = (
            [sources[0].labels[c] for c in sources[0].classes]
            if same
            else [("domain", str(i)) for i in range(most)]
        )
        labels = tuple(names)
    else:
        labels = tuple(dict.fromkeys(label for s in sources for label in s.labels))
        used = {s.labels[c] for s in sources for c in s.classes}
        labels = tuple(label for label in labels if label in used)
    where = {label: i for i, label in enumerate(labels)}
    framed_list = []
    mapped: dict[tuple[int, tuple[int, ...]], Examples] = {}
    for s in sources:
        table = torch.full((len(s.labels),), -1, dtype=torch.long)
        if scenario == "domain":
            table[list(s.classes)] = torch.arange(len(s.classes))
        else:  # a test may hold classes that this source does not teach, but others do
            table = torch.tensor([where.get(label, -1) for label in s.labels])
        parts = {part: getattr(s, part) for part in ("train", "validation", "test")}
        if not torch.equal(table, torch.arange(len(table))):
            for part, examples in parts.items():
                at = (id(examples), tuple(table.tolist()))
                if at not in mapped:
                    mapped[at] = examples.map(y=lambda y, table=table: table.to(y.device)[y])
                parts[part] = mapped[at]
        classes = tuple(int(table[c]) for c in s.classes)
        framed_list.append(replace(s, **parts, labels=labels, classes=classes, task=s.task or s.name))
    tasks: dict[str, tuple[int, ...]] = {}
    for s in framed_list:
        tasks[str(s.task)] = tuple(dict.fromkeys((*tasks.get(str(s.task), ()), *s.classes)))
    return tuple(framed_list), LabelFrame(labels, tasks, kind)
