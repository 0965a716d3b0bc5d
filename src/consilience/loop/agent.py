"""Agents: the only mutable class. prepare(sources) -> Job; finish(job); tell() -> messages; absorb(messages); predict(x, task)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.contexts import Beginning, Context, Learned, Memory, Routing
from consilience.core.correction import Correction, overrides
from consilience.core.errors import ConsilienceError, Refusal, unknown
from consilience.core.message import Item, Message, Private, Shared, Weights, join
from consilience.core.method import Method
from consilience.core.model import Model
from consilience.core.params import Layout, Params, content_hash, finite, key, matches
from consilience.core.sampler import Shuffle
from consilience.core.schedule import Schedule
from consilience.core.source import Examples, LabelFrame, Source
from consilience.core.state import State
from consilience.core.training import Training
from consilience.core.viewed import Viewed, superposition
from consilience.loop.ledger import Ledger
from consilience.loop.step import Carry, Step, acts

ONCE = "(later learns are not mentioned)"
"""The end of a caution, which is said once a run."""


@dataclass(eq=False)
class Job:
    """One learn made into tensors: what an engine runs, stops in the middle, and goes on with."""

    agent: str
    sources: tuple[Source, ...]
    """What it was asked to learn."""
    parts: tuple[tuple[Source, Examples, str | None], ...]
    """What it trains on: source, examples on the device, task."""
    visits: tuple[int, ...]
    corrections: tuple[tuple[Correction, Context], ...]
    layout: Layout
    fixed: Params
    start: Tensor
    step: Step
    seed: int
    training: Training
    kind: tuple[object, ...]
    """What makes its steps alike in cost."""
    fraction: float = 1.0
    """The fraction of its steps that it does."""
    epoch: int = 0
    index: int = 0
    begun: tuple[tuple[object, ...], ...] = ()
    """What `begin` did, put on the agent's account when the learn is finished: a resumed one begins again."""

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return self.epoch * self.step.horizon[1] + self.index

    @property
    def carry(self) -> Carry:
        return self.step.carry

    @property
    def moment(self) -> tuple[int, int, int, int]:
        """(epoch, step in the epoch, epochs, steps an epoch)."""
        return (self.epoch, self.index, *self.step.horizon)

    @property
    def name(self) -> str:
        return "+".join(s.name for s in self.sources)

    def plan(self, epoch: int) -> list[list[Tensor]]:
        """The index batches of an epoch, for each part; shorter parts begin again with a new order."""
        sampler = self.training.sampler or Shuffle()

        def once(part: int, turn: int) -> list[Tensor]:
            source, examples, _ = self.parts[part]
            generator = key(self.seed, source.name, self.visits[part], epoch, turn, "shuffle")
            plan = sampler.plan(examples.targets(), self.training.batch_size, epoch, generator)
            if not plan:
                raise ConsilienceError(
                    f"a sampler should plan at least one batch. Found none of {type(sampler).__name__}."
                )
            return plan

        plans = [once(part, 0) for part in range(len(self.parts))]
        most = max(map(len, plans))
        for part, plan in enumerate(plans):
            turn = 1
            while len(plan) < most:
                plan += once(part, turn)
                turn += 1
            del plan[most:]
        self.step.horizon = (self.training.epochs, most)
        return plans

    def draw(self) -> Iterator[tuple[list[Batch], tuple[int, int]]]:
        """The parts of every step that is left, with its clock; who takes a step raises `index`."""
        drawn = self.step.by_verb["sample"]
        while self.epoch < self.training.epochs:
            plans = self.left(self.epoch, self.index)
            if not plans[0] and self.index < self.step.horizon[1]:  # its share is done
                return
            streams = [
                examples.batches(plan) for (_, examples, _), plan in zip(self.parts, plans, strict=True)
            ]
            for batches in zip(*streams, strict=True):
                parts = [
                    Batch(x, y, task, source=source.name)
                    for (x, y), (source, _, task) in zip(batches, self.parts, strict=True)
                ]
                clock = (self.epoch, self.index)
                for c, ctx in drawn:
                    more = c.sample(
                        ctx,
                        self.sources,
                        key(self.seed, self.sources[0].name, self.visits[0], *clock, c.name),
                    )
                    parts += [replace(b, drawn_by=c.name) for b in more]
                yield parts, clock
            self.epoch, self.index = self.epoch + 1, 0

    def left(self, epoch: int, index: int) -> list[list[Tensor]]:
        """The index batches of each part that are left of an epoch from a step on."""
        plans = [plan[index:] for plan in self.plan(epoch)]
        if self.fraction == 1:
            return plans
        most = self.step.horizon[1]
        limit = max(1, round(self.fraction * self.training.epochs * most)) - (epoch * most + index)
        return [plan[: max(0, limit)] for plan in plans]

    def cost(self, parts: Sequence[Batch]) -> tuple[object, ...]:
        """What makes steps alike in cost."""
        return (*self.kind, *[(tuple(p.x.shape), p.task) for p in parts])

    def run(self, ledger: Ledger) -> Iterator[None]:
        """Run the steps that are left, yielding after each; `epoch` and `index` say what is done."""
        if not self.layout.size:
            return
        first, visit, draws = self.sources[0].name, self.visits[0], self.step.model.draws
        for parts, clock in self.draw():
            generator = key(self.seed, first, visit, *clock, "aggregate") if self.step.aggregator else None
            with self._drawing(first, visit, clock) if draws else nullcontext():
                ledger.charge_work(self.agent, self.cost(parts), partial(self.step, parts, clock, generator))
            ledger.steps += 1
            self.index += 1
            yield

    @contextmanager
    def _drawing(self, source: str, visit: int, clock: tuple[int, int]) -> Iterator[None]:
        """torch's own random state keyed by the step, for models that draw in their forward."""
        device = self.layout.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(key(self.seed, source, visit, *clock, "forward").initial_seed())
            yield

    def answer(self, x: Tensor, task: str | None) -> Tensor:
        """Class probabilities (or values) [B, C] by the parameters of this step, in eval mode."""
        step = self.step
        out = step.now(
            x.to(self.layout.device, self.layout.dtype if x.is_floating_point() else x.dtype), task
        )
        return probabilities(out, step.frame, step.frame.tasks.get(task or ""), len(step.frame.labels))

    def save(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What a checkpoint inside a learn keeps; all else is made again by `prepare`."""
        tensors = {"theta": self.carry.theta}
        tensors |= {f"buffers/{k}": t for k, t in self.carry.buffers.items()}
        tensors |= {f"optimiser/{k}": t for k, t in self.carry.optimiser.items()}
        for c, ctx in self.corrections:
            tensors |= {f"trace/{c.name}/{k}": t for k, t in ctx.trace.items()}
        return {k: t.clone() for k, t in tensors.items()}, {"epoch": self.epoch, "index": self.index}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, int]) -> None:
        """Go on from what `save` kept."""
        self.carry.theta.copy_(tensors["theta"])
        for k, t in self.carry.buffers.items():
            t.copy_(tensors[f"buffers/{k}"])
        for k in self.carry.optimiser:
            self.carry.optimiser[k] = tensors[f"optimiser/{k}"].to(self.layout.device)
        for c, ctx in self.corrections:
            ctx.trace = {k: tensors[f"trace/{c.name}/{k}"].to(self.layout.device) for k in ctx.trace}
        self.epoch, self.index = facts["epoch"], facts["index"]


def shape_of(examples: Examples) -> tuple[int, ...]:
    """The shape of an input, where they are in memory."""
    x = getattr(examples, "x", None)
    return tuple(x.shape[1:]) if isinstance(x, Tensor) else ()


def without_weights(m: Message) -> Message | None:
    """What a bank keeps of a message: all but whole weights; None where nothing is left."""
    if not any(isinstance(i, Weights) for i in m.items.values()):
        return m
    items = {k: i for k, i in m.items.items() if not isinstance(i, Weights)}
    return replace(m, items=items) if items else None


def probabilities(out: Tensor, frame: LabelFrame, columns: Sequence[int] | None, width: int) -> Tensor:
    """Class probabilities [B, width] over the given columns (None: all), or values, from outputs [B, C >= width]."""
    out = out[:, :width]  # a model may have more outputs than there are classes
    if frame.kind == "value":
        return out
    if columns:
        keep = torch.zeros(out.shape[1], dtype=torch.bool, device=out.device)
        keep[list(columns)] = True
        out = out.masked_fill(~keep, -torch.inf)
    return out.softmax(1)


class Agent:
    """Learns sources, tells what it learned, absorbs what others tell, predicts. Never asks which setting it is in."""

    def __init__(
        self,
        name: str,
        model: Model,
        method: Method,
        schedule: Schedule,
        training: Training,
        seed: int,
        state: State,
        ledger: Ledger,
        revisited: frozenset[str] = frozenset(),
    ) -> None:
        self.name, self.model, self.method, self.schedule = name, model, method, schedule
        self.training, self.seed, self.state = training, seed, state
        self.consolidator, self.ledger, self.revisited = method.receiver(), ledger, revisited
        self.device = torch.device(training.device)
        self.frame = schedule.frame
        self.aware = schedule.labelled or method.mapper is not None
        self._hashes: dict[str, tuple[Params, str]] = {}
        self._said: tuple[State, list[Message]] | None = None
        self._views: tuple[State, list[tuple[Correction, Context]]] | None = None

    # learn

    def memory(self, c: Correction) -> Memory:
        """The items of a correction: shared ones from the bank, private ones under this agent's name."""
        items: dict[tuple[str, str], Item] = {
            k: m.items[c.name] for k, m in self.state.bank.items() if c.name in m.items
        }
        items |= {(self.name, s): item for s, item in self.state.memory.get(c.name, {}).items()}
        return items

    def _told(self) -> dict[str, Shared]:
        """What corrections tell with this agent's own parameters."""
        found: dict[str, Shared] = {}
        for c in self.method.active:
            item = self.state.memory.get(c.name, {}).get("")
            if isinstance(item, Shared):
                if not c.shared_items:
                    raise TypeError(
                        f"items of {c.name} stay with their agent: they should be Private. Found {type(item).__name__}."
                    )
                found[c.name] = item
        return found

    def prepare(self, names: Sequence[str], fraction: float = 1.0) -> Job:
        """Recall what is known, grow the model, begin the corrections: a job of tensors that does this fraction of its steps."""
        sources = tuple(self.schedule.source(n) for n in names)
        state, model, t, dtype = self.state, self.model, self.training, self.training.dtype
        params, buffers = dict(state.params), dict(state.buffers)
        for s in sources:
            params, buffers = model.grow(params, buffers, s, key(self.seed, s.name, "grow"))
        contexts: list[tuple[Correction, Context]] = []

        def drawn(c: Correction) -> torch.Generator:
            return key(self.seed, given[0].name, state.visits.get(given[0].name, 0), c.name, "begin")

        given = sources
        sources = given if self.aware else tuple(replace(s, task=None) for s in given)
        for c in self.method.active:
            ctx = Context(recalled=c.recall(self.memory(c), given), model=model)
            sources = c.gather(sources, ctx.recalled, drawn(c)) if overrides(c, "gather") else sources
            contexts.append((c, ctx))
        begun: list[tuple[object, ...]] = []
        still: set[str] = set()
        for c, ctx in contexts:
            if overrides(c, "begin"):
                own = (model, params, buffers, given, ctx.recalled, drawn(c))
                beginning = Beginning(
                    *own, self.predict, state.experts, frozenset(params) - frozenset(state.params)
                )
                kind = (
                    "begin",
                    c.name,
                    ctx.recalled is None,
                    len(params),
                    *[(len(s.train), len(s.classes), shape_of(s.train)) for s in given],
                )
                params, ctx.private, held = self.ledger.measure(kind, lambda c=c, b=beginning: c.begin(b))  # type: ignore[misc]
                still |= set(held)
                begun.append(kind)
        trainable = {
            n: p
            for n, p in params.items()
            if n not in still and not model.frozen(n) and p.is_floating_point()
        }
        fixed = {n: p.to(self.device) for n, p in params.items() if n not in trainable}
        layout = Layout.of(trainable, dtype, self.device)
        theta = layout.flatten(trainable)
        start = theta.clone()
        for c, ctx in contexts:
            ctx.layout, ctx.start = layout, start
            if c.flat and ctx.recalled is not None:
                ctx.flat = {g: layout.flatten(ctx.recalled.group(g)) for g in c.flat}
            ctx.flat, warning = c.prepare_step(ctx, t)
            if warning and c.name not in self.ledger.warned:
                self.ledger.warned.add(c.name)
                warnings.warn(f"{c.name} on {given[0].name!r}: {warning} {ONCE}", stacklevel=2)
        carry = Carry(
            theta, {n: b.to(self.device).clone() for n, b in buffers.items()}, t.inner().init(theta)
        )
        parts = tuple((s, s.train.to(self.device, dtype), s.task if self.aware else None) for s in sources)
        horizon = (t.epochs, max(-(-len(e) // t.batch_size) for _, e, _ in parts))
        step = Step(
            model, self.frame, t, self.method.step_aggregator, contexts, layout, fixed, carry, start, horizon
        )
        for c, ctx in contexts:
            traced = state.memory.get(f"{c.name}.trace", {}).get("+".join(s.name for s in given))
            if traced is not None and all(t.shape == traced.tensors[k].shape for k, t in ctx.trace.items()):
                ctx.trace = {k: t.to(self.device) for k, t in traced.tensors.items()}
        cost = ("step", *[c.name for c, ctx in contexts if acts(c, ctx)], layout.size)
        asked = {s.name for s in given}  # what a correction gathered is another pool at each learn
        total = sum(state.visits.values())
        visits = tuple(state.visits.get(s.name, 0) if s.name in asked else total for s in sources)
        return Job(
            self.name,
            given,
            parts,
            visits,
            tuple(contexts),
            layout,
            fixed,
            start,
            step,
            self.seed,
            t,
            cost,
            fraction,
            begun=tuple(begun),
        )

    def finish(self, job: Job) -> None:
        """Summarise what a job learned and keep it."""
        state = self.state
        for kind in job.begun:
            self.ledger.charge(self.name, kind)
        end = {n: p.clone() for n, p in job.layout.split(job.carry.theta).items()}
        finite(
            end, f"{self.name!r} after {job.name!r} (a lower lr or strength helps where training diverges)"
        )
        params = {**job.fixed, **end}
        buffers = {n: b.clone() for n, b in job.carry.buffers.items()}
        start = job.layout.split(job.start)
        visits = {**state.visits, **{s.name: state.visits.get(s.name, 0) + 1 for s in job.sources}}
        shared: dict[str, dict[str, Shared]] = {s.name: {} for s in job.sources}
        memory = {c: dict(kept) for c, kept in state.memory.items()}
        model = Viewed.of(self.model, job.step.by_verb["view"])
        for c, ctx in job.corrections:
            if ctx.trace and all(s.name in self.revisited for s in job.sources):
                memory.setdefault(f"{c.name}.trace", {})[job.name] = Private(ctx.trace)
            if not overrides(c, "summarise"):
                continue
            for s in job.sources:
                generator = key(self.seed, s.name, visits[s.name] - 1, c.name, "summarise")
                task = s.task if self.aware else None
                on_device = replace(s, train=s.train.to(self.device, job.layout.dtype))
                learned = Learned(
                    model,
                    params,
                    buffers,
                    start,
                    on_device,
                    task,
                    job.layout,
                    generator,
                    1 / len(job.sources),
                    sum(state.visits.values()),
                    job.steps,
                    self.training,
                )
                item = self.ledger.charge_work(
                    self.name,
                    ("summarise", c.name, len(s.train), len(s.classes), job.layout.size, shape_of(s.train)),
                    lambda c=c, n=learned, ctx=ctx: c.summarise(n, ctx),  # type: ignore[misc]
                )
                if isinstance(item, Private):
                    memory.setdefault(c.name, {})[s.name] = item
                elif item is not None:
                    if not c.shared_items:
                        raise TypeError(
                            f"items of {c.name} stay with their agent: they should be Private. Found {type(item).__name__}."
                        )
                    shared[s.name][c.name] = item
            if overrides(c, "trim") and c.name in memory:
                generator = key(self.seed, job.sources[0].name, visits[job.sources[0].name], c.name, "trim")
                memory[c.name] = dict(c.trim(memory[c.name], replace(learned, generator=generator)))
        self.state = state.change(
            params=params,
            buffers=buffers,
            memory=memory,
            visits=visits,
            version=state.version + 1,
            trained=True,
            size=sum(len(s.train) for s in job.sources),
        )
        modules = self.consolidator.export(self.model, self.state, job.sources, self.method.personal)
        news = []
        for s in job.sources:
            if s.name in modules:
                shared[s.name]["model"] = modules[s.name]
            if shared[s.name]:
                message = self._message(s.name, visits[s.name], len(s.train), shared[s.name])
                told = state.bank.get(message.key)
                if told is None or told.digest != message.digest:
                    news.append(message)
        self.state = self.state.change(bank=join(self.state.bank, news))

    # absorb

    def _hash(self, which: str, params: Params) -> str:
        """The hash of the parameters that all agents have in common."""
        held = self._hashes.get(which)
        if held is None or held[0] is not params:
            common = {
                n: p
                for n, p in params.items()
                if self.model.task_of(n) is None and not matches(n, self.method.personal)
            }
            held = self._hashes[which] = (params, content_hash(common))
        return held[1]

    def _message(self, source: str, version: int, size: int, items: Mapping[str, Shared]) -> Message:
        base = self._hash("base", self.state.base)
        return Message(self.name, source, version, size, self.state.origin, base, items, self.state.trained)

    def release(self) -> None:
        """Let go of what it told and will hear again, so that a simulation holds only the agents that are at work."""
        if not any(overrides(c, "after_receive") for c in self.method.active):
            self.state = self.consolidator.release(self.state, self.method.personal)
        self._said, self._views, self._hashes = None, None, {}

    def receipts(self) -> dict[str, int]:
        """What this agent has already: the version of every (sender, source); no whole of another once it has learned and gone on."""
        moved = self.state.trained
        return {k: v for k, (v, _) in self.state.received.items() if not (moved and k.endswith("|"))}

    def send(self, receipts: Mapping[str, int]) -> list[Message]:
        """Messages that the listener lacks: the agent's own whole, and what its bank holds, relayed as it is."""
        return [m for m in self._says() if m.version > receipts.get(f"{m.sender}|{m.source}", -1)]

    def _says(self) -> list[Message]:
        """All that it could tell, made once for a state."""
        if self._said is not None and self._said[0] is self.state:
            return self._said[1]
        whole = self.consolidator.export(self.model, self.state, (), self.method.personal)
        items: dict[str, dict[str, Shared]] = {s: {"model": item} for s, item in whole.items()}
        if told := self._told():
            items[""] = {**items.get("", {}), **told}
        messages = [self._message(s, self.state.version, self.state.size, own) for s, own in items.items()]
        messages += [m for m in self.state.bank.values() if m.items and m.source]
        self._said = (self.state, messages)
        return messages

    def receive(self, messages: Sequence[Message], by_size: bool = True) -> None:
        """Join the messages into the bank, and consolidate those that are fresh."""
        state = self.state
        fresh: dict[tuple[str, str], Message] = {}
        had = self.receipts()
        for m in sorted(
            (m for m in messages if m.sender not in state.forgotten), key=lambda m: (m.key, m.version)
        ):
            if m.origin != state.origin:
                raise ConsilienceError(
                    f"a message should come from the same first parameters. Found origin {m.origin[:8]} from {m.sender!r}, "
                    f"here {state.origin[:8]}."
                )
            version, digest = state.received.get(f"{m.sender}|{m.source}", (-1, ""))
            twin = fresh.get(m.key)
            if (m.version == version and m.digest != digest) or (
                twin and twin.version == m.version and twin.digest != m.digest
            ):
                raise ConsilienceError(
                    f"a version should have one content. Found another for {m.source!r} of {m.sender!r}, version {m.version}."
                )
            if m.version > had.get(f"{m.sender}|{m.source}", -1):
                fresh[m.key] = m
        heard = list(fresh.values())
        bank = join(state.bank, [m for m in map(without_weights, heard) if m is not None])
        if self.consolidator.needs_base:
            for m in heard:
                if (
                    m.trained
                    and isinstance(m.items.get("model"), Weights)
                    and m.base != self._hash("base", state.base)
                ):
                    raise ConsilienceError(
                        f"deltas should start from the hearer's own parameters. Found another base in the message of {m.sender!r}."
                    )
        generator = key(self.seed, self.name, state.version, "absorb")
        work = (
            "absorb",
            len(heard),
            sum(t.numel() for m in heard for i in m.items.values() for t in i.tensors.values()),
        )
        new = self.ledger.charge_work(
            self.name,
            work,
            lambda: self.consolidator.receive(self.model, state.change(bank=bank), heard, by_size, generator),
        )
        memory = {c: dict(kept) for c, kept in new.memory.items()}
        for c in self.method.active:
            if overrides(c, "after_receive"):
                memory[c.name] = dict(c.after_receive(state, new, memory.get(c.name, {}), heard))
        receipts = {f"{m.sender}|{m.source}": (m.version, m.digest) for m in heard}
        self.state = new.change(
            base=new.params,
            memory=memory,
            received={**state.received, **receipts},
            version=state.version + 1,
            trained=False,
        )

    def forget(self, sender: str) -> None:
        """Take out what a sender told, as if it had never been heard; it is not heard again, not from others either.

        Statistics that are solved, and experts that stand on their own, are exactly what they would be without it; other agents
        forget for themselves. Raises Refusal where it entered weights, or what this agent learned afterwards.
        """
        state = self.state
        known = {m.sender for m in state.bank.values()} | {k.rpartition("|")[0] for k in state.received}
        if sender not in known:
            raise unknown("sender", sender, known)
        entered = [
            c.name
            for c in self.method.corrections
            if c.active and c.shared_items and (c.needs_history or overrides(c, "recall"))
        ]
        if entered and state.visits and sender != self.name:
            raise Refusal(
                f"what {entered[0]} recalled while this agent learned cannot be taken out again; train again without that sender."
            )
        bank = {k: m for k, m in state.bank.items() if m.sender != sender}
        new = self.consolidator.forget(self.model, state.change(bank=bank))
        self.state = new.change(
            base=new.params, version=state.version + 1, forgotten=(*state.forgotten, sender)
        )

    # predict

    def choices(
        self,
    ) -> list[tuple[tuple[str, str], Params, Params, str | None, tuple[int, ...] | None, Tensor | None]]:
        """The experts: (key, entries, buffers, task, own columns, where its columns stand in the frame)."""
        found = []
        for k, m in self.state.experts.items():
            where = None if m.labels == self.frame.labels else self.frame.columns(m.labels)
            found.append((k, m.group("entries"), m.group("buffers"), m.task, m.classes or None, where))
        if not found and self.method.mapper is not None:
            keys = dict.fromkeys(
                [*((self.name, name) for name in self.state.visits), *(k for k in self.state.bank if k[1])]
            )
            if not keys:  # heads that were heard with the parameters, and nothing else of their sources
                heads = {self.model.task_of(n) for n in self.state.params}
                keys = dict.fromkeys(
                    (self.name, s.name) for s in self.schedule.sources if self.model.head_key(s) in heads
                )
            for k in keys:
                s = self.schedule.source(k[1])
                found.append((k, {}, {}, s.task, s.classes, None))
        return found

    def outputs(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, psi: Tensor | None = None
    ) -> Tensor:
        """The outputs [B, C] in eval mode, through the corrections' views, before softmax; psi [B, d] are the features where known."""
        seen = self._seen()
        if psi is not None and not seen:
            short = self.model.from_features(params, buffers, psi, task)
            if short is not None:
                return short
        for c, ctx in seen:
            params = c.view(params, task, ctx)
        return self.model(params, buffers, x, task, False)[0]

    def _seen(self) -> list[tuple[Correction, Context]]:
        """The corrections through which the model is seen in predict, recalled once for a state."""
        if self._views is None or self._views[0] is not self.state:
            seen = [c for c in self.method.active if overrides(c, "view")]
            self._views = (
                self.state,
                [(c, Context(recalled=c.recall(self.memory(c), ()), model=self.model)) for c in seen],
            )
        return self._views[1]

    def superposed(self, params: Params, buffers: Params) -> Callable[[Tensor, Tensor], Tensor]:
        """(x, alpha) -> the outputs [B, C] of sum_k alpha_k view_k(params) over `choices`, as `Routing` says."""
        choices, seen, views, classes = self.choices(), self._seen(), [], len(self.frame.labels)
        columns = {c for *_, own, where in choices for c in (own or range(classes))}
        if any(where is not None for *_, where in choices):
            raise ConsilienceError(
                "experts to superpose should have the same labels. Found some of another frame."
            )
        hidden = torch.tensor([c not in columns for c in range(classes)], device=self.device)
        for _, entries, own_buffers, task, _, _ in choices:
            view = {**params, **entries}
            for c, ctx in seen:
                view = c.view(view, task, ctx)
            views.append(view)
            buffers = {**own_buffers, **buffers}
        whole = superposition(views)

        def outputs(x: Tensor, alpha: Tensor) -> Tensor:
            out = self.model(whole(alpha), buffers, x, None, False)[0]
            return out[:, :classes].masked_fill(hidden, -torch.inf)

        return outputs

    def _probabilities(
        self,
        params: Params,
        buffers: Params,
        x: Tensor,
        task: str | None,
        columns: Sequence[int] | None,
        width: int,
        psi: Tensor | None = None,
    ) -> Tensor:
        return probabilities(self.outputs(params, buffers, x, task, psi), self.frame, columns, width)

    @torch.no_grad()
    def predict(self, x: Tensor, task: str | None = None) -> Tensor:
        """Class probabilities (or values) [B, classes of the frame]: sum over experts of route weight x softmax(expert); a row of
        zeros where the mapper says that no expert knows the input. Raises ConsilienceError for a `task` that nobody has."""
        return self._predict(x, task)[0]

    @torch.no_grad()
    def route(self, x: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
        """The mapper's weights [B, experts] and the experts' keys."""
        _, weights, keys = self._predict(x, None, only_route=True)
        if weights is None:
            raise ConsilienceError(f"routing needs a mapper and experts. Found none in {self.name!r}.")
        return weights, keys

    def _predict(
        self, x: Tensor, task: str | None, only_route: bool = False
    ) -> tuple[Tensor, Tensor | None, list[tuple[str, str]]]:
        x = x.to(self.device, self.training.dtype if x.is_floating_point() else x.dtype)
        state, classes = self.state, len(self.frame.labels)
        params = {n: p.to(self.device) for n, p in state.params.items()}
        buffers = {n: b.to(self.device) for n, b in state.buffers.items()}
        choices = self.choices()
        if (
            task is not None and task not in self.frame.tasks
        ):  # but of a module that it heard, or a test that nobody teaches
            known = {
                *self.frame.tasks,
                *(t for *_, t, _, _ in choices if t),
                *(s.task for s in self.schedule.judged if s.task),
            }
            if task not in known:
                raise unknown("task", task, known, "the schedule's tasks")
        if not choices:
            columns = self.frame.tasks.get(task) if task is not None else None
            return self._probabilities(params, buffers, x, task, columns, classes), None, []
        if task is not None and any(t == task for *_, t, _, _ in choices):
            choices = [c for c in choices if c[3] == task]
        keys = [c[0] for c in choices]
        cache: dict[int, Tensor] = {}
        psi: list[Tensor] = []

        def features(other: Tensor | None = None) -> Tensor:
            if other is not None:
                other = other.to(
                    self.device, self.training.dtype if other.is_floating_point() else other.dtype
                )
                return self.model.features(params, buffers, other)
            if not psi:
                psi.append(self.model.features(params, buffers, x))
            return psi[0]

        def expert(i: int, rows: Tensor | None) -> Tensor:
            _, entries, own, its, columns, where = choices[i]
            entries, own = ({n: t.to(self.device) for n, t in held.items()} for held in (entries, own))
            part = x if rows is None else x[rows]
            width = classes if where is None else len(where)
            common = psi and all(
                self.model.task_of(n) is not None for n in (*entries, *own)
            )  # it stands on the features that all have
            seen = (psi[0] if rows is None else psi[0][rows]) if common else None
            probabilities = self._probabilities(
                {**params, **entries}, {**buffers, **own}, part, its, columns, width, seen
            )
            if where is None:
                return probabilities
            aligned = probabilities.new_zeros(len(part), classes)
            return aligned.index_add_(1, where.to(aligned.device), probabilities)

        def every() -> list[Tensor]:
            for i in range(len(choices)):
                if i not in cache:
                    cache[i] = expert(i, None)
            return [
                cache[i][:, list(c[4])] if c[4] and c[5] is None else cache[i] for i, c in enumerate(choices)
            ]

        mapper = self.method.mapper
        if mapper is None or task is not None or (len(choices) == 1 and not mapper.rejects):
            weights = torch.full(
                (len(x), len(choices)), 1 / len(choices), device=self.device, dtype=self.training.dtype
            )
        else:
            routing = Routing(x, features, every, keys, lambda: self.superposed(params, buffers))
            weights = mapper.route(routing, self.memory(mapper)).to(self.training.dtype)
        if only_route:
            return weights, weights, keys
        result = torch.zeros(len(x), classes, device=self.device, dtype=self.training.dtype)
        for i in range(len(choices)):
            rows = weights[:, i] > 0
            if bool(rows.all()):
                result += weights[:, i : i + 1] * (cache[i] if i in cache else expert(i, None))
            elif bool(rows.any()):
                index = rows.nonzero()[:, 0]
                part = cache[i][index] if i in cache else expert(i, index)
                result.index_add_(0, index, weights[index, i : i + 1] * part)
        return result, weights, keys
