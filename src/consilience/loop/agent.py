"""Agents: they prepare a visit, finish it, send messages, receive them, and predict.

All that an agent knows is its `State`, which is immutable: each of these methods puts another in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from consilience.core.augment import same_views, views_of
from consilience.core.contexts import Beginning, Context, Learned, Memory
from consilience.core.correction import Correction, overrides
from consilience.core.errors import UNREADABLE, Refusal, unknown
from consilience.core.message import Bank, Item, Message, Private, Shared, Weights, join
from consilience.core.method import Method
from consilience.core.model import Model
from consilience.core.names import AGGREGATOR, OF_WEIGHTS, SAMPLER, WHOLE, joined, pair, trace_key, unpair
from consilience.core.params import Layout, Params, content_hash, finite, key, matches, placed
from consilience.core.scaling import LossScale
from consilience.core.schedule import Schedule
from consilience.core.source import Examples, Source, Tensors, same_inputs
from consilience.core.state import State, undone_key
from consilience.core.training import Place, Training
from consilience.core.tree import Input, cast_to
from consilience.core.viewed import Viewed
from consilience.core.warning import warn
from consilience.loop.admission import (
    FULL,
    RECEIPT_BYTES,
    ROOM,
    Refused,
    check_content,
    check_facts,
    reason_of,
    refusal_of,
)
from consilience.loop.divergence import check_statistics, check_visit
from consilience.loop.job import Job, Part, by_number, numbered
from consilience.loop.ledger import RECEIVE, Ledger, outline
from consilience.loop.predict import Choice, Predictor, memory_of
from consilience.loop.step import Carry, Step, acts

ONCE = "(later visits do not repeat this warning)"
"""The end of a correction's warning, which is given once per run."""

# The purpose of the random numbers of `receive`. Another word would draw others than version 0.1.
RECEIVE_KEY = "absorb"

Corrections = list[tuple[Correction, Context]]


@dataclass(eq=False)
class Agent:
    """One learner: it trains on sources, sends what it learned, receives from others, and predicts.

    It never asks which setting it is in: the schedule calls these methods in the order that makes one.
    """

    name: str
    model: Model
    method: Method
    schedule: Schedule
    training: Training
    seed: int
    state: State
    ledger: Ledger
    """Where its costs are counted."""
    revisited: frozenset[str] = frozenset()
    """Sources that some agent trains on again: their traces are kept for the next visit."""
    room: int | None = None
    """The most bytes to keep of one sender; None: 4 GiB, or 16 models per source where that is more."""
    _common: tuple[Params, str] | None = field(default=None, init=False)
    """The last parameters that `common_hash` was asked about, and their hash."""
    _outbox: tuple[State, list[Message]] | None = field(default=None, init=False)
    _predictor: Predictor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.consolidator = self.method.receiver()
        self.device = torch.device(self.training.device)
        self.frame = self.schedule.frame

        # Agents with a mapper know in training which task is theirs, with or without labels.
        self.aware = self.schedule.labelled or self.method.mapper is not None

    # Train: `prepare` makes a job, an engine runs its steps, `finish` keeps what it learned.

    def prepare(self, names: Sequence[str], fraction: float = 1.0, place: Place | None = None) -> Job:
        """Make a job of a visit to these sources; `fraction` of its steps are run.

        `place` says where the visit lies in the run, for learning rates that change over visits.

        Recall what is needed, grow the model, begin the corrections, and build the step.
        """
        given = tuple(self.schedule.source(name) for name in names)
        params, buffers = self._grown(given)
        corrections, sources = self._recalled(given)
        params, frozen, begun = self._begun(corrections, given, params, buffers)

        # What is trained becomes one flat vector; everything else stays as it is.
        trainable = {
            name: p
            for name, p in params.items()
            if name not in frozen and not self.model.frozen(name) and p.is_floating_point()
        }
        # Frozen entries that a model grew may be of another type than those that it began with.
        here = (self.device, self.training.dtype)
        fixed = {name: placed(p, *here) for name, p in params.items() if name not in trainable}
        layout = Layout.of(trainable, self.training.dtype, self.device)
        theta = layout.flatten(trainable)
        start = theta.clone()
        self._lay_out(corrections, layout, start, given[0].name, place or Place())
        for _, ctx in corrections:
            ctx.parts = tuple(source.name for source in sources)
            ctx.sizes = tuple(len(source.train) for source in sources)

        # Steps update buffers in place, so those of the state are copied, but for derived ones.
        own_buffers = {
            name: buffer if name in self.state.frozen else placed(buffer, *here).clone()
            for name, buffer in buffers.items()
        }
        carry = Carry(theta, own_buffers, self.training.inner().init(theta))
        if self.training.precision == "fp16":
            carry.scaling = LossScale().init(self.device)
        carry.aggregator = self._remembered(given, AGGREGATOR)
        parts = self._parts(sources)
        step = Step(
            model=self.model,
            frame=self.frame,
            training=self.training,
            aggregator=self.method.step_aggregator,
            level=self.method.step_level,
            corrections=corrections,
            layout=layout,
            fixed=fixed,
            carry=carry,
            start=start,
            horizon=self._horizon(parts),
            place=place or Place(),
        )
        self._resume_traces(corrections, given)

        return Job(
            agent=self.name,
            sources=given,
            parts=parts,
            visits=self._visits(given, sources),
            corrections=tuple(corrections),
            layout=layout,
            fixed=fixed,
            start=start,
            step=step,
            seed=self.seed,
            training=self.training,
            kind=self._kind(corrections, layout),
            augments=self.schedule.augments,
            fraction=fraction,
            begun=begun,
            # A pool that was gathered has other examples at each visit.
            sampled=by_number(self._remembered(given, SAMPLER) if same(given, sources) else {}, len(parts)),
        )

    def _grown(self, given: Sequence[Source]) -> tuple[Params, Params]:
        """Return parameters and buffers with the entries that new sources need, such as heads."""
        params, buffers = dict(self.state.params), dict(self.state.buffers)
        for source in given:
            # Keyed by the source alone: every agent grows the same head.
            generator = key(self.seed, source.name, "grow")
            # A head never gets new classes, so that it is made for all sources of its task.
            params, buffers = self.model.grow(params, buffers, self.frame.widened(source), generator)
        return params, buffers

    def _recalled(self, given: tuple[Source, ...]) -> tuple[Corrections, tuple[Source, ...]]:
        """Return the active corrections with what they recall, and the sources to train on."""
        corrections: Corrections = []

        # Without labels or a mapper, the model is not given the task.
        sources = given if self.aware else tuple(replace(source, task=None) for source in given)
        for correction in self.method.active:
            recalled = correction.recall(self.memory(correction), given)
            if overrides(correction, "gather"):
                sources = correction.gather(sources, recalled, self._generator(correction, given))
            corrections.append((correction, Context(recalled=recalled, model=self.model)))
        return corrections, sources

    def _generator(self, correction: Correction, given: Sequence[Source]) -> torch.Generator:
        """Return what `gather` and `begin` of a correction draw from: the same stream for both."""
        first = given[0].name
        return key(self.seed, first, self.state.visits.get(first, 0), correction.name, "begin")

    def _begun(
        self, corrections: Corrections, given: tuple[Source, ...], params: Params, buffers: Params
    ) -> tuple[Params, set[str], int]:
        """Return the parameters after every `begin`, the entries that it froze, and its MACs."""
        frozen: set[str] = set()
        begun = 0
        for correction, ctx in corrections:
            if not overrides(correction, "begin"):
                continue

            beginning = Beginning(
                model=self.model,
                params=params,
                buffers=buffers,
                sources=given,
                recalled=ctx.recalled,
                generator=self._generator(correction, given),
                predict=self.predict,
                experts=self.state.experts,
                grown=frozenset(params) - frozenset(self.state.params),
                frame=self.frame,
            )

            kind = ("begin", correction.name, outline(params, ctx.recalled, given, self.state.experts))
            (params, ctx.private, held), macs = self.ledger.measure(
                kind, partial(correction.begin, beginning)
            )
            frozen |= set(held)
            begun += macs
        return params, frozen, begun

    def _lay_out(
        self, corrections: Corrections, layout: Layout, start: Tensor, first: str, place: Place
    ) -> None:
        """Give the contexts the layout of the step, and flatten what `Correction.flat` names."""
        training = self.training.at(place)
        for correction, ctx in corrections:
            ctx.layout, ctx.start = layout, start
            if correction.flat and ctx.recalled is not None:
                ctx.flat = {group: layout.flatten(ctx.recalled.group(group)) for group in correction.flat}

            # One warning per run: a visit of a hundred would repeat it a hundred times.
            ctx.flat, warning = correction.prepare_step(ctx, training)
            if warning and correction.name not in self.ledger.warned:
                self.ledger.warned.add(correction.name)
                warn(f"{correction.name} on {first!r}: {warning} {ONCE}")

    def _parts(self, sources: Sequence[Source]) -> tuple[Part, ...]:
        """Return the sources to train on with their examples on the device, and the task given to the model.

        Inputs that several tasks share are there once, and the tasks draw the same of them.
        """
        parts: list[Part] = []
        for source in sources:
            views = views_of(self.schedule.augments, source.name, source.origins)
            like = next(
                (
                    i
                    for i, part in enumerate(parts)
                    if part.like is None
                    and self.training.samples_of(source.name) == self.training.samples_of(part.source.name)
                    and same_views(views, part.augment)
                    and same_inputs(source.train, part.source.train)
                ),
                None,
            )

            # The first of them has the inputs on the device, for all.
            if like is None:
                examples = source.train.to(self.device, self.training.dtype)
            else:
                y = cast_to(source.train.targets(), self.device, self.training.dtype)
                examples = Tensors(parts[like].examples.whole()[0], y)
            parts.append(Part(source, examples, source.task if self.aware else None, views, like))
        return tuple(parts)

    def _horizon(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Return (epochs, steps per epoch) of a visit."""
        # A sampler may plan another number of steps, which `Job.plan` then takes.
        counts = [-(-len(part.examples) // self.training.samples_of(part.source.name)) for part in parts]
        return self.training.epochs, max(counts)

    def _visits(self, given: Sequence[Source], sources: Sequence[Source]) -> tuple[int, ...]:
        """Return how often each part was visited before; a pool that was gathered is new at every visit."""
        names, visits = {source.name for source in given}, self.state.visits
        total = sum(visits.values())
        return tuple(visits.get(s.name, 0) if s.name in names else total for s in sources)

    def _resume_traces(self, corrections: Corrections, given: Sequence[Source]) -> None:
        """Continue the traces of an earlier visit to these sources, unless the model has grown since."""
        visit = joined(source.name for source in given)
        for correction, ctx in corrections:
            kept = self.state.memory.get(trace_key(correction.name), {}).get(visit)
            if kept is not None and all(t.shape == kept.tensors[name].shape for name, t in ctx.trace.items()):
                ctx.trace = {name: tensor.to(self.device) for name, tensor in kept.tensors.items()}

    def _remembered(self, given: Sequence[Source], part: str) -> dict[str, Tensor]:
        """Return what AGGREGATOR or SAMPLER remembers of an earlier visit to these sources; {} if nothing."""
        kept = self.state.memory.get(trace_key(part), {}).get(joined(source.name for source in given))
        return {name: tensor.to(self.device) for name, tensor in kept.tensors.items()} if kept else {}

    def _kind(self, corrections: Corrections, layout: Layout) -> tuple[object, ...] | None:
        """Return what the steps of a visit have in common that decides their costs; None: they differ."""
        acting = [(correction, ctx) for correction, ctx in corrections if acts(correction, ctx)]
        # A view that leaves out units has other shapes after each decision.
        if any(correction.changes_shapes for correction, _ in acting):
            return None

        # What a step costs depends on what it reads: buffers fill, and earlier tasks add up.
        read = outline(layout, [(ctx.recalled, ctx.private, ctx.flat) for _, ctx in corrections])
        return ("step", *[correction.name for correction, _ in acting], read)

    def finish(self, job: Job) -> None:
        """Keep what a job learned: parameters, summaries of corrections, and messages for the bank."""
        self.ledger.add(self.name, "macs", job.begun)

        # Diverged parameters must not reach the agents that would receive them.
        check_visit(job)
        end = {name: p.clone() for name, p in job.layout.split(job.carry.theta).items()}

        state, names = self.state, [source.name for source in job.sources]
        params = {**job.fixed, **end}
        buffers = {name: buffer.clone() for name, buffer in state.frozen.without(job.carry.buffers).items()}
        buffers |= state.frozen.buffers
        memory, shared = self._summarised(job, params, buffers)

        # Several visits may come before anybody receives: what was there before the first is kept.
        delivered = [correction.name for correction, _ in job.corrections if correction.needs_delivery]
        self.state = state.change(
            params=params,
            buffers=buffers,
            memory=memory,
            unsent=state.unsent or {name: state.memory.get(name, {}) for name in delivered},
            visits={**state.visits, **{name: state.visits.get(name, 0) + 1 for name in names}},
            version=state.version + 1,
            # Where a correction froze all entries, the parameters hold nothing of the source.
            trained=bool(job.layout.size) or state.trained,
            size=sum(len(source.train) for source in job.sources) if job.layout.size else 0,
        )
        self._bank(job, shared)
        if job.steps:
            said = job.figures.log(job.steps, job.last_rate) | job.chosen()
            self.ledger.visit = {"sources": names, **said}
            figures = {c.name: c.figures(ctx) for c, ctx in job.corrections if overrides(c, "figures")}
            self.ledger.visit |= {"figures": figures} if figures else {}

    def _summarised(
        self, job: Job, params: Params, buffers: Params
    ) -> tuple[dict[str, dict[str, Item]], dict[str, dict[str, Shared]]]:
        """Return the private memory after this visit, and the items to share, by source."""
        memory = {name: dict(kept) for name, kept in self.state.memory.items()}
        shared: dict[str, dict[str, Shared]] = {source.name: {} for source in job.sources}

        # Traces of sources that do not come again would only take memory.
        if all(source.name in self.revisited for source in job.sources):
            visit = joined(source.name for source in job.sources)
            traces = {correction.name: ctx.trace for correction, ctx in job.corrections}
            own = same(job.sources, [part.source for part in job.parts])
            states = {AGGREGATOR: job.carry.aggregator, SAMPLER: numbered(job.sampled) if own else {}}
            for name, trace in {**traces, **states}.items():
                if trace:
                    memory.setdefault(trace_key(name), {})[visit] = Private(trace)

        for correction, ctx in job.corrections:
            name = correction.name
            if not overrides(correction, "summarise"):
                continue

            for source in job.sources:
                learned = self._learned(job, source, params, buffers, correction)
                kind = job.kind and ("summarise", name, outline(source), *job.kind)
                summarise = partial(correction.summarise, learned, ctx)
                item = self.ledger.charge_work(self.name, kind, summarise)
                check_statistics(job, name, item)
                if isinstance(item, Private):
                    memory.setdefault(name, {})[source.name] = item
                elif item is not None:
                    shared[source.name][name] = sharable(correction, item)

            # Trimming sees the last source, with a stream of random numbers of its own.
            if overrides(correction, "trim") and name in memory:
                first = job.sources[0].name
                generator = key(self.seed, first, self.state.visits.get(first, 0) + 1, name, "trim")
                trim = partial(correction.trim, memory[name], replace(learned, generator=generator))
                tensors = chain.from_iterable([item.tensors.values() for item in memory[name].values()])
                kept = sum(map(torch.numel, tensors))
                kind = job.kind and ("trim", name, len(memory[name]), kept, *job.kind)
                memory[name] = dict(self.ledger.charge_work(self.name, kind, trim))
        return memory, shared

    def _learned(
        self, job: Job, source: Source, params: Params, buffers: Params, correction: Correction
    ) -> Learned:
        """Return what `summarise` of a correction may read about a source."""
        visit = self.state.visits.get(source.name, 0)
        return Learned(
            model=Viewed.of(self.model, job.step.by_verb["view"]),
            params=params,
            buffers=buffers,
            start=job.layout.split(job.start),
            source=replace(source, train=source.train.to(self.device, job.layout.dtype)),
            task=source.task if self.aware else None,
            layout=job.layout,
            generator=key(self.seed, source.name, visit, correction.name, "summarise"),
            share=1 / len(job.sources),
            order=sum(self.state.visits.values()),
            steps=job.steps,
            training=self.training.at(job.step.place),
            frame=self.frame,
        )

    def _bank(self, job: Job, shared: Mapping[str, dict[str, Shared]]) -> None:
        """Put a message per source into the bank: summaries, and a module if the consolidator makes one."""
        modules = self.consolidator.export(self.model, self.state, job.sources, self.method.personal)
        news = []
        for source in job.sources:
            items = shared[source.name]
            if source.name in modules:
                items["model"] = modules[source.name]
            if not items:
                continue

            # A message with the same content would only be a new version of nothing new.
            visit = self.state.visits[source.name]
            message = self.message(source.name, visit, len(source.train), items)
            old = self.state.bank.get(message.key)
            if old is None or old.digest != message.digest:
                news.append(message)
        self.state = self.state.change(bank=join(self.state.bank, news))

    # Exchange: `send` and `receive` messages; `forget` a sender.

    def memory(self, correction: Correction) -> Memory:
        """Return the items of a correction: shared ones of the bank, private ones under this agent."""
        return memory_of(self.name, self.state, correction)

    def common_hash(self, params: Params) -> str:
        """Return the hash of those entries that all agents have: neither of one task, nor personal.

        Frozen ones count, so that it also says which model the others belong to.
        """
        # Compared by identity, because hashing all parameters is what costs time here.
        if self._common is None or self._common[0] is not params:
            common = {
                name: p
                for name, p in params.items()
                if self.model.task_of(name) is None and not matches(name, self.method.personal)
            }
            self._common = (params, content_hash(common))
        return self._common[1]

    def message(self, source: str, version: int, size: int, items: Mapping[str, Shared]) -> Message:
        """Return a message of this agent about a source."""
        base, state = self.common_hash(self.state.base), self.state
        return Message(self.name, source, version, size, state.origin, base, items, state.trained)

    def receipts(self) -> dict[str, int]:
        """Return the version held of each `pair(sender, source)`, without those of weights.

        Only a sender itself sends its weights, so that they are named to it alone, by `weights_receipt`.
        """
        received = self.state.received
        return {at: version for at, (version, _) in received.items() if not at.endswith(OF_WEIGHTS)}

    def weights_receipt(self, sender: str) -> dict[str, int]:
        """Return the version held of a sender's weights, by `pair(sender, WHOLE)`; nothing without any."""
        version = self._held_version(pair(sender, WHOLE))
        return {pair(sender, WHOLE): version} if version >= 0 else {}

    def _held_version(self, at: str) -> int:
        """Return the version held of a `pair(sender, source)`; -1 without any.

        Weights that were received are no longer there once this agent has trained on.
        """
        version, _ = self.state.received.get(at, (-1, ""))
        return -1 if self.state.trained and at.endswith(OF_WEIGHTS) else version

    def send(self, receipts: Mapping[str, int]) -> list[Message]:
        """Return the messages that a receiver with these receipts lacks; the bank's are relayed unchanged."""
        messages = self._messages()
        # What was trained is now with somebody else, so that it counts.
        if self.state.unsent:
            self.state = self.state.change(unsent={})
            self._outbox = (self.state, messages)
        return [m for m in messages if m.version > receipts.get(pair(m.sender, m.source), -1)]

    def _messages(self) -> list[Message]:
        """Return all messages of this state; made once, since many agents may ask."""
        if self._outbox is not None and self._outbox[0] is self.state:
            return self._outbox[1]

        exported = self.consolidator.export(self.model, self.state, (), self.method.personal)
        items: dict[str, dict[str, Shared]] = {source: {"model": item} for source, item in exported.items()}
        if about_all := self._about_all():
            items[WHOLE] = {**items.get(WHOLE, {}), **about_all}
        version, size = self.state.version, self.state.size
        messages = [self.message(source, version, size, own) for source, own in items.items()]
        messages += [m for m in self.state.bank.values() if m.items and m.source != WHOLE]
        self._outbox = (self.state, messages)
        return messages

    def _about_all(self) -> dict[str, Shared]:
        """Return what corrections send together with this agent's own parameters."""
        kept = [(c, self.state.memory.get(c.name, {}).get(WHOLE)) for c in self.method.active]
        return {c.name: sharable(c, item) for c, item in kept if isinstance(item, Shared)}

    def receive(self, messages: Sequence[Message], by_size: bool = True, total: float | None = None) -> None:
        """Join the messages into the bank, and consolidate those that are new here.

        `by_size` weights them by their numbers of examples; `total` is what all agents that may send weigh,
        as `Exchange.totals` has it. Each message is taken whole or refused whole, and one that is refused
        changes nothing. Raises ConsilienceError, after the others were taken, with the sender of each that
        was refused and the reason.
        """
        fresh, refused = self._fresh(messages)
        taken = None
        if fresh or not refused:
            try:
                taken = self._received(fresh, by_size, total)
            except (Refusal, torch.OutOfMemoryError):
                raise
            except UNREADABLE:
                # What fails without any message is no fault of theirs.
                self._received([], by_size, total)
                # Backwards, so that statistics about a sender's sources come before its weights, which may
                # need them.
                kept, spoilt = self._sifted([], fresh[::-1], by_size, total)
                fresh, refused = kept[::-1], [*refused, *spoilt]
                taken = self._received(fresh, by_size, total) if fresh else None
        if taken is not None:
            self.state = taken
        if refused:
            raise refusal_of(refused, len(messages))

    def _received(self, fresh: list[Message], by_size: bool, total: float | None) -> State:
        """Return the state after these messages."""
        before = self.state
        bank = join(before.bank, [kept for kept in map(without_weights, fresh) if kept is not None])
        after = self._consolidated(bank, fresh, by_size, total)
        # Sums of what is finite may overflow, and so may what is solved from them.
        old = [before.params, *(item.tensors for m in fresh for item in m.items.values())]
        same = {id(tensor) for tensors in old for tensor in tensors.values()}
        made = {name: p for name, p in after.params.items() if id(p) not in same}
        finite(made, f"{self.name!r} after it received")

        # Corrections may keep what the exchange changed, for the visits that follow. What nobody received of
        # earlier visits is lost with the parameters of these visits.
        memory = {name: dict(kept) for name, kept in {**after.memory, **before.unsent}.items()}
        for correction in self.method.active:
            if overrides(correction, "after_receive"):
                earlier = memory.get(correction.name, {})
                update = partial(correction.after_receive, before, after, earlier, fresh)
                kind = (RECEIVE, correction.name, outline(earlier), len(fresh))
                memory[correction.name] = dict(self.ledger.charge_work(self.name, kind, update))
        receipts = {pair(m.sender, m.source): (m.version, m.digest) for m in fresh}
        return after.change(
            base=after.params,
            memory=memory,
            received={**before.received, **receipts},
            unsent={},
            version=before.version + 1,
            trained=False,
        )

    def _sifted(
        self, kept: list[Message], messages: list[Message], by_size: bool, total: float | None
    ) -> tuple[list[Message], list[Refused]]:
        """Add those messages to `kept` that can be received with it; return it, and what is refused."""
        try:
            self._received([*kept, *messages], by_size, total)
        except UNREADABLE as error:
            if len(messages) == 1:
                return kept, [Refused(messages[0], reason_of(error))]
            # Halves, so that a few bad messages among many cost a few tries.
            middle = len(messages) // 2
            kept, first = self._sifted(kept, messages[:middle], by_size, total)
            kept, second = self._sifted(kept, messages[middle:], by_size, total)
            return kept, first + second
        return [*kept, *messages], []

    def _fresh(self, messages: Sequence[Message]) -> tuple[list[Message], list[Refused]]:
        """Return the messages of newer versions than the receipts say, sorted by key, and those refused."""
        state = self.state
        refused: list[Refused] = []
        fresh: dict[tuple[str, str], Message] = {}

        wanted = [
            m
            for m in messages
            if m.sender not in state.forgotten and undone_key(*m.key, m.digest) not in state.undone
        ]
        sent: dict[tuple[tuple[str, str], int], set[str]] = {}
        for m in wanted:
            sent.setdefault((m.key, m.version), set()).add(m.digest)

        # Sorted, so that the result does not depend on the order in which messages arrive.
        for m in sorted(wanted, key=lambda m: (m.key, m.version)):
            at = pair(m.sender, m.source)
            version, digest = state.received.get(at, (-1, ""))
            one = m.digest == digest if m.version == version else len(sent[m.key, m.version]) == 1
            try:
                new = m.version > self._held_version(at)
                if new:
                    self.consolidator.check_message(self.model, state, m)
                check_facts(self, m, one)
                if new:
                    check_content(self, m)
                    fresh[m.key] = m
            except UNREADABLE as error:
                refused.append(Refused(m, reason_of(error)))

        full = self._beyond_room(fresh.values())
        return [m for m in fresh.values() if m not in full], [*refused, *(Refused(m, FULL) for m in full)]

    def _beyond_room(self, fresh: Collection[Message]) -> list[Message]:
        """Return the messages for which there is no room any more among those of their sender."""
        # A model of each source, with statistics about it, is what an honest sender may need.
        own = sum(t.nbytes for held in (self.state.params, self.state.buffers) for t in held.values())
        room = max(ROOM, 16 * own * len(self.schedule.sources)) if self.room is None else self.room

        # A server has the receipts of thousands: while all together have room, each has.
        names = [*self.state.received, *[pair(*m.key) for m in fresh]]
        kept = sum([m.kept_bytes for m in (*self.state.bank.values(), *fresh)])
        if kept + sum(map(len, names)) + RECEIPT_BYTES * len(names) <= room:
            return []

        used: dict[str, int] = {}
        for m in self.state.bank.values():
            used[m.sender] = used.get(m.sender, 0) + m.kept_bytes
        for at in self.state.received:
            sender, _ = unpair(at)
            used[sender] = used.get(sender, 0) + len(at) + RECEIPT_BYTES

        full = []
        for m in fresh:
            old = self.state.bank.get(m.key)
            more = m.kept_bytes - (old.kept_bytes if old is not None else 0)
            if pair(m.sender, m.source) not in self.state.received:
                more += len(pair(m.sender, m.source)) + RECEIPT_BYTES
            if m.sender != self.name and used.get(m.sender, 0) + more > room:
                full.append(m)
            else:
                used[m.sender] = used.get(m.sender, 0) + more
        return full

    def _consolidated(self, bank: Bank, fresh: list[Message], by_size: bool, total: float | None) -> State:
        """Return the state after the consolidator received the messages."""
        state, consolidator = self.state.change(bank=bank), self.consolidator.among(total)
        generator = key(self.seed, self.name, state.version, RECEIVE_KEY)
        numbers = sum(t.numel() for m in fresh for item in m.items.values() for t in item.tensors.values())
        return self.ledger.charge_work(
            self.name,
            (RECEIVE, len(fresh), sum(m.trained for m in fresh), numbers, len(bank), outline(state.outer)),
            lambda: consolidator.receive(self.model, state, fresh, by_size, generator),
        )

    def release(self) -> None:
        """Free parameters that will be received again: a simulation keeps only active agents in memory."""
        # `after_receive` compares with the parameters before, so then they must stay.
        if not any(overrides(correction, "after_receive") for correction in self.method.active):
            self.state = self.consolidator.release(self.state, self.method.personal)
        self._common, self._outbox, self._predictor = None, None, None

    def forget(self, sender: str, source: str | None = None) -> None:
        """Take out all that a sender sent, or what it sent about one source, as if it had never come.

        Of a forgotten sender all later messages are ignored. Of a source only the content that is taken out
        is: another version is received, also an older one, so that a bad or forged message is undone.

        Solved statistics and experts are then exactly what they would be without those messages. Other agents
        forget for themselves. Raises Refusal if the messages entered weights, or training after them.
        """
        state = self.state
        known = {*state.bank, *map(unpair, state.received)}
        if sender not in {name for name, _ in known}:
            raise unknown("sender", sender, {name for name, _ in known})
        if source is not None and (sender, source) not in known:
            raise unknown("source", source, {about for name, about in known if name == sender})

        # Weights depend on what was recalled while they were trained, and nothing can undo that.
        entered = [
            c.name
            for c in self.method.corrections
            if c.active and c.shared_items and (c.needs_history or overrides(c, "recall"))
        ]
        if entered and state.visits and sender != self.name:
            raise Refusal(
                f"{entered[0]} used the items of {sender!r} in training, and weights cannot be untrained; "
                "train again without that sender."
            )

        gone = {at for at in known if at[0] == sender and source in (None, at[1])}
        bank = {at: m for at, m in state.bank.items() if at not in gone}
        new = self.consolidator.forget(self.model, state.change(bank=bank))
        # Without its receipt the source's next version is new here, whatever its number.
        received = {at: receipt for at, receipt in state.received.items() if unpair(at) not in gone}
        undone = [undone_key(*at, state.received[pair(*at)][1]) for at in gone if pair(*at) in state.received]
        undone += [undone_key(*at, state.bank[at].digest) for at in gone if at in state.bank]
        self.state = new.change(
            base=new.params,
            version=state.version + 1,
            received=state.received if source is None else received,
            forgotten=(*state.forgotten, sender) if source is None else state.forgotten,
            undone=state.undone if source is None else tuple(sorted({*state.undone, *undone})),
        )

    # Predict, as loop/predict.py does it for the present state.

    @property
    def predictor(self) -> Predictor:
        """How this agent answers in its present state."""
        # What is recalled for prediction depends on the state alone, so it is kept with it.
        if self._predictor is None or self._predictor.state is not self.state:
            self._predictor = Predictor(
                self.name, self.model, self.method, self.schedule, self.training, self.state
            )
        return self._predictor

    def predict(self, x: Input, task: str | None = None) -> Tensor:
        """Predict class probabilities (or values) [B, C]: the experts' ones, summed by their weights.

        A row of zeros means that the mapper knows no expert for the input. Raises ConsilienceError for a
        `task` that is neither in the schedule nor any expert's.
        """
        return self.predictor(x, task).probabilities

    def route(self, x: Input) -> tuple[Tensor, list[tuple[str, str]]]:
        """Return the mapper's weights [B, experts] and the experts' keys (sender, source)."""
        return self.predictor.route(x)

    def choices(self) -> list[Choice]:
        """Return the experts that it answers with."""
        return self.predictor.choices()

    def outputs(
        self, params: Params, buffers: Params, x: Input, task: str | None, psi: Tensor | None = None
    ) -> Tensor:
        """Return outputs [B, C] in eval mode, before softmax; psi [B, d] are features of x, if known."""
        return self.predictor.outputs(params, buffers, x, task, psi)

    def superposed(self, params: Params, buffers: Params) -> Callable[[Input, Tensor], Tensor]:
        """Return (x, alpha) -> outputs [B, C] of sum_k alpha_k view_k(params), k over `choices`."""
        return self.predictor.superposed(params, buffers)


def sharable(correction: Correction, item: Item) -> Shared:
    """Return an item that is to be shared. Raises TypeError if it must stay with the agent."""
    if not correction.shared_items or not isinstance(item, Shared):
        raise TypeError(
            f"items of {correction.name} stay with their agent and must be Private, "
            f"got {type(item).__name__}."
        )
    return item


def same(given: Sequence[Source], others: Sequence[Source]) -> bool:
    """Whether two lists name the same sources."""
    return [source.name for source in given] == [source.name for source in others]


def input_shape(examples: Examples) -> tuple[object, ...] | None:
    """Return the shape of one input; None where the examples are not in memory."""
    return tuple(examples.x.shape[1:]) if isinstance(examples, Tensors) else None


def without_weights(message: Message) -> Message | None:
    """Return what a bank keeps of a message: everything but weights; None if nothing is left."""
    # Weights are consolidated at once; a bank of all clients' models would fill the memory.
    if not any(isinstance(item, Weights) for item in message.items.values()):
        return message
    items = {name: item for name, item in message.items.items() if not isinstance(item, Weights)}
    return replace(message, items=items) if items else None
