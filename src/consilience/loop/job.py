"""Jobs: one agent's visit to its sources as tensors. An engine runs it, and may stop it at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.augment import Views, isolated, sample_seeds, seed_all, views_of
from consilience.core.batch import Batch, first_alike
from consilience.core.buffer import ranks
from consilience.core.contexts import Context
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError, reading
from consilience.core.params import Layout, Params, key
from consilience.core.sampler import EpochView, Scored, Shuffle
from consilience.core.source import Examples, Source
from consilience.core.stopping import Stopping, Trend
from consilience.core.training import Training
from consilience.core.tree import Input, cast_to
from consilience.loop.divergence import check_step, explain, warn_of_growth
from consilience.loop.figures import Figures, is_looked_at
from consilience.loop.folder import REMEDY
from consilience.loop.ledger import Ledger
from consilience.loop.step import Carry, Step

CHUNK = 512
"""How many validation examples are evaluated at once."""


class Part(NamedTuple):
    """What one part of every step is drawn from."""

    source: Source
    examples: Examples
    """On the device."""
    task: str | None
    """The task label that the model is given."""
    augment: Views | None = None
    """What training samples go through."""
    like: int | None = None
    """The number of the first part that has the same inputs; None: no part before it has."""

    @property
    def random(self) -> bool:
        """Whether a sample is not the same each time."""
        return self.augment is not None or self.examples.draws


def weighed(own: list[Batch], added: list[Batch], shares: Sequence[float] | None) -> list[Batch]:
    """Return the parts of a step with their weights; shares [own] say how its own ones divide theirs."""
    # Equal shares are the weights that parts have without any.
    if shares is None or len(set(shares)) == 1:
        return own + added
    # What corrections draw weighs as it does without shares: as one more task.
    count = len(own) + sum(part.weight is None for part in added)
    parts = [replace(part, weight=share * len(own) / count) for part, share in zip(own, shares, strict=True)]
    return parts + [replace(part, weight=1 / count) if part.weight is None else part for part in added]


@dataclass(eq=False)
class Job:
    """One visit of an agent to its sources, made by `Agent.prepare`."""

    agent: str
    sources: tuple[Source, ...]
    """The sources that the schedule names."""
    parts: tuple[Part, ...]
    """What the visit trains on: these sources, or others that a correction made from them."""
    visits: tuple[int, ...]
    """How often the agent visited the source of each part before."""
    corrections: tuple[tuple[Correction, Context], ...]
    layout: Layout
    fixed: Params
    """Entries that this visit does not train."""
    start: Tensor
    """The trainable parameters [n] before the first step."""
    step: Step
    seed: int
    training: Training
    kind: tuple[object, ...] | None
    """With the shapes of a step's parts, the key under which the ledger keeps the cost of a step; None: the
    costs of steps differ."""
    augments: Mapping[str, Views] = field(default_factory=dict)
    """The augmentations of all sources, for samples that corrections kept of them."""
    fraction: float = 1.0
    """The fraction of the visit's steps to run: below 1 for a straggler."""
    epoch: int = 0
    index: int = 0
    """Steps done in this epoch."""
    trend: Trend = field(default_factory=Trend)
    """The validation scores so far, at numbers of steps."""
    best: tuple[dict[str, Tensor], dict[str, int]] | None = None
    """What `save` gave at the best of them."""
    first: float | None = field(default=None, init=False)
    """The first training loss that `check_step` saw."""
    peak: float | None = field(default=None, init=False)
    """The highest of those."""
    figures: Figures = field(default_factory=Figures, init=False)
    """What the log says of the steps."""
    begun: int = 0
    """The MACs of `Correction.begin`. They are charged at the end, since a resumed job begins again."""
    counts: list[int] = field(default_factory=lambda: [0])
    """The steps before each epoch that was planned so far, and after the last of them."""
    sampled: list[dict[str, Tensor]] = field(default_factory=list)
    """What a sampler that keeps a state remembers of each part; empty dictionaries at first."""
    seen: list[list[int]] = field(default_factory=list)
    """How many examples of each part every epoch so far chose from, with such a sampler."""

    @property
    def steps(self) -> int:
        """Steps done in all epochs."""
        return self._steps_before(self.epoch) + self.index

    def _steps_before(self, epoch: int) -> int:
        """Return the steps of all epochs before this one."""
        # A sampler may plan more steps in one epoch than in another; a resumed job plans them again, but for
        # samplers that keep a state: their counts are kept too.
        while len(self.counts) <= epoch:
            self.counts.append(self.counts[-1] + len(self._plans(len(self.counts) - 1)[0]))
        return self.counts[epoch]

    @property
    def scored(self) -> Scored | None:
        """The sampler, if it keeps a state."""
        sampler = self.training.sampler
        return sampler if isinstance(sampler, Scored) else None

    @property
    def carry(self) -> Carry:
        """The parameters, buffers and optimiser state after the last step."""
        return self.step.carry

    @property
    def moment(self) -> tuple[int, int, int, int]:
        """(epoch, step in the epoch, epochs, steps per epoch)."""
        return (self.epoch, self.index, *self.step.horizon)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.rate_at((self.epoch, self.index), self.step.horizon)

    def rate_at(self, clock: tuple[int, int], horizon: tuple[int, int]) -> float:
        """Return the learning rate at a clock (epoch, step) of a horizon (epochs, steps per epoch)."""
        return self.training.rate(clock, horizon, self.step.place)

    @property
    def last_rate(self) -> float:
        """The learning rate of the last step that was taken."""
        epochs, per_epoch = self.step.horizon
        # A visit that is whole stands at the start of an epoch that never comes.
        clock = (self.epoch, self.index - 1) if self.index else (self.epoch - 1, per_epoch - 1)
        return self.rate_at(clock, (epochs, per_epoch))

    @property
    def name(self) -> str:
        """The names of the sources."""
        return "+".join(source.name for source in self.sources)

    def run(self, ledger: Ledger) -> Iterator[None]:
        """Run the steps that are left, and yield after each; `epoch` and `index` count them."""
        # A head that is solved in closed form leaves nothing to train.
        if not self.layout.size:
            return

        first, visit, draws = self.sources[0].name, self.visits[0], self.step.model.draws
        rule: Stopping | None = self.training.stopping
        since = time.perf_counter()
        for parts, clock in () if self.stopped else self.draw(ledger):
            # Keyed by the step, an aggregator draws the same numbers on every engine.
            generator = key(self.seed, first, visit, *clock, "aggregate") if self.step.aggregator else None
            self.step.measures = is_looked_at(self.steps + 1)
            with self._random_forward(clock) if draws else nullcontext():
                take = partial(self.step, parts, clock, generator)
                try:
                    ledger.charge_work(self.agent, self.cost(parts), take)
                except ConsilienceError as error:
                    # An aggregator refuses rows that are not finite, and knows no losses.
                    explain(self, error)
                    raise
            ledger.steps += 1
            self.index += 1
            self.figures.add(self.step)
            check_step(self)
            if rule is not None and self._is_due(rule):
                self._check(rule, ledger)

            # What is done between two steps, such as to save, takes no time of theirs.
            self.figures.seconds += time.perf_counter() - since
            yield
            since = time.perf_counter()
            if rule is not None and self.stopped:
                break

        warn_of_growth(self, ledger.warned)
        if rule is not None:
            self._end(rule, ledger)

    @property
    def counts_loss(self) -> bool:
        """Whether an infinite loss is a fault: with a loss scale, it makes the step be left out."""
        return self.step.scaling is None

    # Early stopping

    @property
    def stopped(self) -> bool:
        """Whether the visit has ended early."""
        rule: Stopping | None = self.training.stopping
        return rule is not None and self.trend.since >= rule.patience

    def _is_due(self, rule: Stopping) -> bool:
        """Whether the validation loss is measured after this step."""
        return self.index == self.step.horizon[1] if rule.every is None else self.steps % rule.every == 0

    def _check(self, rule: Stopping, ledger: Ledger) -> None:
        """Measure the validation loss, and keep the state of the visit if it is the best so far."""
        # It costs a forward pass, which the ledger counts as training.
        sizes = tuple(len(part.source.validation) for part in self.parts)
        kind = self.kind and ("validate", *self.kind, *sizes)
        loss = ledger.charge_work(self.agent, kind, self.validation_loss)
        self.trend = self.trend.after(-loss, self.steps, rule.least)
        if rule.best and self.trend.at == self.steps:
            self.best = self._state(), {"epoch": self.epoch, "index": self.index}

    def _end(self, rule: Stopping, ledger: Ledger) -> None:
        """Go back to the best state of the visit."""
        # A straggler ends between two checks.
        if self.steps and not self._is_due(rule):
            self._check(rule, ledger)
        if self.best is not None:
            self._restore(*self.best)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean over sources of the loss on their validation data, in eval mode."""
        # The loss of training, so that what is stopped by is what is trained by.
        step, losses = self.step, []
        for source, _, task, *_ in self.parts:
            total = count = 0.0
            for x, y in source.validation.to(self.layout.device, self.layout.dtype).chunks(CHUNK):
                part = Batch(x, y, task, target=source.target)
                target = step.target(part)
                share = float(target.count(y))
                # A chunk may have no target at all.
                if share:
                    out = step.masked(step.now(x, task), part)
                    total, count = total + share * float(target.mean(out, y)), count + share
            losses.append(total / count if count else math.nan)
        return sum(losses) / len(losses)

    def draw(self, ledger: Ledger) -> Iterator[tuple[list[Batch], tuple[int, int]]]:
        """Yield the batches and the clock (epoch, step) of every step left. The caller raises `index`.

        What corrections compute to draw is charged to the ledger.
        """
        while self.epoch < self.training.epochs:
            if self.scored is not None:
                # What a straggler does not reach needs no scores.
                if self.epoch and self.fraction * self.training.epochs <= self.epoch:
                    return
                self._advance(self.scored, ledger)
            plans, shares = self.left(self.epoch, self.index), self.shares(self.epoch)

            # The examples of all parts are read side by side, one batch of each per step.
            streams, weights = self._views(plans), self._weights()
            marks = self.step.reads_index or any(each is not None for each in weights)
            for step, batches in enumerate(zip(*streams, strict=True)):
                own: list[Batch] = []
                for (x, y), (source, _, task, _, like) in zip(batches, self.parts, strict=True):
                    # The very same inputs, by which a step knows that they are forwarded once.
                    x = own[like].x if x is None and like is not None else x
                    own.append(Batch(x, y, task, source=source.name, target=source.target))
                if marks:
                    own = self._marked(own, [plan[step] for plan in plans], weights)
                clock = (self.epoch, self.index)
                yield weighed(own, self._sampled(clock, ledger), shares), clock

            # The fraction of a straggler may end inside an epoch, which then is not done.
            if self.index < self.step.horizon[1]:
                return
            self.epoch, self.index = self.epoch + 1, 0

    def _advance(self, sampler: Scored, ledger: Ledger) -> None:
        """Move the state of a sampler on to this epoch, unless a resumed job has done so."""
        if len(self.seen) > self.epoch:
            return
        numbers = range(len(self.parts))
        views = [self._epoch_view(number, ledger) for number in numbers]
        self.sampled = [sampler.advance(self.sampled[number], views[number]) for number in numbers]
        passes = [torch.cat(self._pass(number, self.epoch, 0)) for number in numbers]
        self.seen.append([len(chosen.unique()) for chosen in passes])

    def _epoch_view(self, number: int, ledger: Ledger) -> EpochView:
        """Return what a sampler sees of one part before this epoch."""
        (source, examples, task, *_), place, kind = self.parts[number], self.step.place, self.kind

        @torch.no_grad()
        def over(score: Callable[[Input, Tensor], Tensor]) -> Tensor:
            return torch.cat([score(x, y).double().cpu() for x, y in examples.chunks(CHUNK)])

        def by_output(score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            def of_chunk(x: Input, y: Tensor) -> Tensor:
                part = Batch(x, y, task, target=source.target)
                return score(self.step.masked(self.step.now(x, task), part), y)

            own = kind and ("score", number, *kind, len(examples))
            return ledger.charge_work(self.agent, own, partial(over, of_chunk))

        def by_input(score: Callable[[Input], Tensor]) -> Tensor:
            return ledger.charge_work(self.agent, None, partial(over, lambda x, y: score(x)))

        return EpochView(
            source=source.name,
            examples=examples,
            target=self.step.target(Batch(torch.zeros(0), torch.zeros(0), task, target=source.target)),
            epoch=place.visit * self.training.epochs + self.epoch,
            epochs=place.visits * self.training.epochs,
            by_output=by_output,
            by_input=by_input,
            generator=key(self.seed, source.name, "difficulty"),
        )

    def _weights(self) -> list[Tensor | None]:
        """Return the weights of the examples of each part [N] in this epoch, where the sampler has some."""
        sampler = self.scored
        return [None if sampler is None else sampler.weights(state) for state in self.sampled]

    def _marked(self, own: list[Batch], indices: list[Tensor], weights: list[Tensor | None]) -> list[Batch]:
        """Return the batches of a step with the indices and the weights of their samples, where needed."""
        device, dtype = self.layout.device, self.layout.dtype
        found = []
        for part, index, each in zip(own, indices, weights, strict=True):
            w = part.w if each is None else each[index].to(device, dtype)
            found.append(replace(part, index=index.to(device) if self.step.reads_index else None, w=w))
        return found

    def _views(self, plans: list[list[Tensor]]) -> list[Iterator[tuple[Any, Tensor]]]:
        """Return the batches of all parts, which these plans list from step `index` on.

        Of parts that draw the same examples of the same inputs, the first has the inputs, others have None.
        """
        streams: list[Iterator[tuple[Any, Tensor]]] = []
        # Numbers depend on the sample and how often it came in this epoch, not on steps or batches.
        plan = self.plan(self.epoch) if any(part.random for part in self.parts) else plans
        for number, (part, own) in enumerate(zip(self.parts, plans, strict=True)):
            if part.like is not None and same_plan(own, plans[part.like]):
                streams.append(without_inputs(part.examples, own))
            elif part.random:
                streams.append(part.examples.views(own, part.augment, self._seeds(number, plan[number], own)))
            else:
                streams.append(part.examples.batches(own))
        return streams

    def _seeds(self, number: int, whole: list[Tensor], plan: list[Tensor]) -> list[Tensor]:
        """Return the seeds of the samples of a part's batches, of which a whole epoch has more."""
        index = torch.cat(whole)
        generator = key(self.seed, *self._drawn_by(number), self.epoch, "augment")
        seeds = sample_seeds(generator, index, ranks(torch.arange(len(index)), index))
        each = seeds.split([len(batch) for batch in whole])
        return list(each[self.index : self.index + len(plan)])

    def _drawn_by(self, number: int) -> tuple[str, int]:
        """Return the source and the visit by which the examples of a part are drawn."""
        # Tasks of the same inputs see the same examples in each step.
        first = self.parts[number].like
        first = number if first is None else first
        return self.parts[first].source.name, self.visits[first]

    def _sampled(self, clock: tuple[int, int], ledger: Ledger) -> list[Batch]:
        """Return the batches that corrections add to a step, such as rehearsal."""
        added: list[Batch] = []
        for correction, ctx in self.step.by_verb["sample"]:
            generator = key(self.seed, self.sources[0].name, self.visits[0], *clock, correction.name)
            sample = partial(correction.sample, ctx, self.sources, generator)
            kind = self.kind and ("sample", correction.name, *self.kind)
            batches = ledger.charge_work(self.agent, kind, sample)
            if self.augments:
                purposes = [(*clock, correction.name, number) for number in range(len(batches))]
                batches = [self._view(*pair) for pair in zip(batches, purposes, strict=True)]

            # Marked, because a constraint's samples are forwarded apart from others.
            added += [replace(batch, drawn_by=correction.name) for batch in batches]
        return added

    def _view(self, batch: Batch, purpose: tuple[object, ...]) -> Batch:
        """Return a view of stored samples: a buffer keeps them as they are, and each step has other views."""
        views = views_of(self.augments, batch.source, batch.origins)
        if views is None:
            return replace(batch, origins=None)
        generator = key(self.seed, self.sources[0].name, self.visits[0], *purpose, "augment")

        # Cloned, because a function may write into what it is given, and this may be the buffer itself.
        seeds = sample_seeds(generator, torch.arange(len(batch.y)))
        x, y = views(batch.x.clone(), batch.y.clone(), seeds)
        return replace(batch, x=x, y=y, origins=None)

    def plan(self, epoch: int) -> list[list[Tensor]]:
        """Return the index batches of an epoch, per part, and set the horizon of its steps."""
        plans = self._plans(epoch)
        if len(self.counts) == epoch + 1:
            self.counts.append(self.counts[-1] + len(plans[0]))
        # A sampler may plan more or fewer steps than the number of examples says.
        self.step.horizon = (self.training.epochs, len(plans[0]))
        return plans

    def _plans(self, epoch: int) -> list[list[Tensor]]:
        """Return the index batches of an epoch, per part; a shorter part starts over in a new order."""
        shares = self.shares(epoch)
        if shares is not None:
            return self._mixed(epoch, shares)
        plans = [self._pass(part, epoch, 0) for part in range(len(self.parts))]
        longest = max(map(len, plans))
        for part, plan in enumerate(plans):
            turn = 1
            while len(plan) < longest:
                plan += self._pass(part, epoch, turn)
                turn += 1
            del plan[longest:]
        return plans

    def shares(self, epoch: int) -> Sequence[float] | None:
        """Return the share of each part in the steps of an epoch; None where all have the same batches."""
        sampler, place = self.training.sampler, self.step.place
        if len(self.parts) < 2 or not hasattr(sampler, "shares"):
            return None
        epochs = self.training.epochs
        done = (place.visit * epochs + epoch) / max(1, place.visits * epochs - 1)
        found: Sequence[float] | None = sampler.shares(
            [len(part.examples) for part in self.parts], min(1.0, done)
        )
        return found

    def _mixed(self, epoch: int, shares: Sequence[float]) -> list[list[Tensor]]:
        """Return the index batches of an epoch in which the parts of a step have shares of it."""
        total = sum(len(part.examples) for part in self.parts)
        steps = -(-total // sum(self.training.samples_of(part.source.name) for part in self.parts))
        # Each part is there in every step, or else aggregators and balances would lose it.
        least = steps * (2 if self.step.model.has_batch_norm else 1)
        plans = []
        for part, share in enumerate(shares):
            # Rounded alone, so that tasks of the same inputs draw the same of them.
            quota, order, turn = max(least, round(share * total)), torch.zeros(0, dtype=torch.long), 0
            while len(order) < quota:
                order = torch.cat([order, *self._pass(part, epoch, turn)])
                turn += 1
            plans.append(list(order[:quota].tensor_split(steps)))
        return plans

    def _pass(self, part: int, epoch: int, turn: int) -> list[Tensor]:
        """Return the index batches of one pass over one part."""
        examples = self.parts[part].examples
        sampler = self.training.sampler or Shuffle()
        generator = key(self.seed, *self._drawn_by(part), epoch, turn, "shuffle")
        # Only for those that ask: samplers of users take four arguments.
        more: dict[str, Any] = {}
        if getattr(sampler, "needs_lengths", False):
            more["lengths"] = examples.lengths()
        if self.scored is not None:
            more["state"] = self.sampled[part]
        size = self.training.samples_of(self.parts[part].source.name)
        plan: list[Tensor] = sampler.plan(examples.targets(), size, epoch, generator, **more)
        if not plan:
            raise ConsilienceError(
                f"a sampler must plan at least one batch, got none from {type(sampler).__name__}."
            )

        # One sample has no variance, and batch norm refuses it.
        if len(plan) > 1 and len(plan[-1]) == 1 and self.step.model.has_batch_norm:
            plan = [*plan[:-2], torch.cat(plan[-2:])]
        return plan

    def left(self, epoch: int, index: int) -> list[list[Tensor]]:
        """Return the index batches of an epoch from step `index` on, per part."""
        plans = [plan[index:] for plan in self.plan(epoch)]
        if self.fraction == 1:
            return plans

        # How many steps later epochs have may depend on what is learned in this one.
        if self.scored is not None:
            due = min(1.0, self.fraction * self.training.epochs - epoch)
            most = max(int(epoch == 0), round(due * self.step.horizon[1]))
            return [plan[: max(0, most - index)] for plan in plans]

        # A straggler stops early in the visit; it does not do less of every epoch.
        allowed = max(1, round(self.fraction * self._steps_before(self.training.epochs)))
        limit = max(0, allowed - self._steps_before(epoch) - index)
        return [plan[:limit] for plan in plans]

    def cost(self, parts: Sequence[Batch]) -> tuple[object, ...] | None:
        """Return the key under which the ledger keeps the cost of a step with these parts, if it has one."""
        firsts = zip(parts, first_alike(parts), strict=True)
        shapes = [(tuple(part.x.shape), part.task, first) for part, first in firsts]
        return self.kind and (*self.kind, *shapes)

    @contextmanager
    def _random_forward(self, clock: tuple[int, int]) -> Iterator[None]:
        """Key the global random states by the step, for models that draw in their forward (dropout)."""
        device = self.layout.device
        with isolated(device):
            generator = key(self.seed, self.sources[0].name, self.visits[0], *clock, "forward")
            seed_all(generator.initial_seed(), device)
            yield

    def answer(self, x: Input, task: str | None) -> Tensor:
        """Return class probabilities (or values) [B, C] with the parameters of this step, in eval mode."""
        frame = self.step.frame
        x = cast_to(x, self.layout.device, self.layout.dtype)
        return frame.answer(self.step.now(x, task), task)

    def save(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the tensors and counts that a checkpoint keeps; `Agent.prepare` makes the rest again."""
        tensors: dict[str, Tensor] = self._state()
        counts: dict[str, float] = {"epoch": self.epoch, "index": self.index}
        counts |= {f"figures/{name}": value for name, value in self.figures.kept().items()}
        if self.trend.best is not None:
            tensors["trend"] = torch.tensor(self.trend, dtype=torch.float64)
        else:
            counts["since"] = self.trend.since
        if self.best is not None:
            held, place = self.best
            tensors |= {f"best/{name}": tensor for name, tensor in held.items()}
            counts |= {f"best/{name}": count for name, count in place.items()}
        return tensors, counts

    def _state(self) -> dict[str, Tensor]:
        """Return copies of all tensors that steps change."""
        tensors = {"theta": self.carry.theta}
        tensors |= {f"buffers/{name}": buffer for name, buffer in self.moving_buffers()}
        tensors |= {f"optimiser/{name}": tensor for name, tensor in self.carry.optimiser.items()}
        tensors |= {f"scaling/{name}": tensor for name, tensor in self.carry.scaling.items()}
        tensors |= {f"aggregator/{name}": tensor for name, tensor in self.carry.aggregator.items()}
        for correction, ctx in self.corrections:
            tensors |= {f"trace/{correction.name}/{name}": tensor for name, tensor in ctx.trace.items()}
        if self.scored is not None:
            seen = torch.tensor(self.seen, dtype=torch.long).view(-1, len(self.parts))
            tensors |= {"sampler/counts": torch.tensor(self.counts), "sampler/seen": seen}
            tensors |= {f"sampler/{name}": tensor for name, tensor in numbered(self.sampled).items()}

        # Cloned, because the next step changes these tensors in place.
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def load(self, tensors: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Continue from what `save` gave."""
        with reading("a checkpoint must hold this visit as it was", REMEDY):
            if not all(isinstance(count, int | float | None) for count in counts.values()):
                raise TypeError("a count that is no number")
            self._restore(tensors, counts)
            self.figures.resume({name.removeprefix("figures/"): value for name, value in counts.items()})

            # A visit may have been checked before it was saved, and even have ended.
            self.trend = Trend(since=int(counts.get("since", 0)))
            if "trend" in tensors:
                best, at, since = tensors["trend"].tolist()
                self.trend = Trend(best, int(at), int(since))
            held = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("best/")}
            if held:
                self.best = (
                    held,
                    self._clock({name[5:]: counts[name] for name in counts if name[:5] == "best/"}),
                )

    def _restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Put tensors that `_state` gave, and the clock, in the place of the present ones."""
        device = self.layout.device

        # In place, because the step's leaves and the bound model share this memory.
        self.carry.theta.copy_(tensors["theta"])
        for name, buffer in self.moving_buffers():
            buffer.copy_(tensors[f"buffers/{name}"])

        def kept(prefix: str) -> dict[str, Tensor]:
            held = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            return {name.removeprefix(prefix): tensor.to(device) for name, tensor in held.items()}

        # By what was kept: entries that were left out of a step have counts of their own.
        self.carry.optimiser, self.carry.aggregator = kept("optimiser/"), kept("aggregator/")
        if self.scored is not None:
            held = kept("sampler/")
            self.counts, self.seen = held.pop("counts").tolist(), held.pop("seen").tolist()
            self.sampled = by_number(held, len(self.parts))
        for name in self.carry.scaling:
            self.carry.scaling[name] = tensors[f"scaling/{name}"].to(device)
        for correction, ctx in self.corrections:
            prefix = f"trace/{correction.name}"
            ctx.trace = {name: tensors[f"{prefix}/{name}"].to(device) for name in ctx.trace}
        self.epoch, self.index = self._clock(counts).values()

    def _clock(self, counts: Mapping[str, float]) -> dict[str, int]:
        """Return epoch and step of a visit that was kept; raise ValueError for those that no visit has."""
        clock = {name: int(counts[name]) for name in ("epoch", "index")}
        # The steps of all epochs before it are planned again, so that a wrong number would take for ever.
        if not 0 <= clock["epoch"] <= self.training.epochs or clock["index"] < 0:
            raise ValueError(f"a place in the visit that is none: {clock}")
        return clock

    def moving_buffers(self) -> list[tuple[str, Tensor]]:
        """Return the buffers that steps may update: all but derived ones."""
        held = self.carry.buffers.items()
        return [(name, buffer) for name, buffer in held if not self.step.model.derived(name)]

    def chosen(self) -> dict[str, Any]:
        """Return what the log says of a sampler that keeps a state: `examples` per epoch, and the `pace`.

        Each is by source; the pace is the share of its examples that the last epoch chose from.
        """
        if self.scored is None or not self.seen:
            return {}
        names, sizes = [part.source.name for part in self.parts], [len(part.examples) for part in self.parts]
        counts = dict(zip(names, zip(*self.seen, strict=True), strict=True))
        last = {name: own[-1] / size for (name, own), size in zip(counts.items(), sizes, strict=True)}
        return {"examples": {name: list(own) for name, own in counts.items()}, "pace": last}


def same_plan(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two parts draw the same examples in all steps; a sampler may go by their targets."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def without_inputs(examples: Examples, plan: Sequence[Tensor]) -> Iterator[tuple[None, Tensor]]:
    """Yield the targets of the batches of `plan`, with None for the inputs."""
    y = examples.targets()
    if examples.lengths() is None:
        return ((None, y.index_select(0, index.to(y.device))) for index in plan)
    # Targets at the places of ragged inputs are cut as these are.
    return ((None, own) for _, own in examples.batches(plan))


def numbered(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of several states by the number of the state and their names."""
    return {f"{i}/{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}


def by_number(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Return the states whose tensors `numbered` named, on the CPU.

    >>> by_number(numbered([{"a": torch.ones(1)}, {}]), 2)
    [{'a': tensor([1.])}, {}]
    """
    states: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for place, tensor in tensors.items():
        number, _, name = place.partition("/")
        states[int(number)][name] = tensor.cpu()
    return states
