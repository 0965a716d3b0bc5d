"""Rehearsal: examples of earlier sources are trained on again. Buffers never leave their agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from consilience.core.augment import Origins
from consilience.core.batch import Batch
from consilience.core.buffer import Policy, Reservoir
from consilience.core.contexts import Context, Learned, Memory, Row, StepView
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.losses import NONE
from consilience.core.message import Private
from consilience.core.names import PAST
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source, joined_rows, trimmed
from consilience.core.tree import concat, named, signature, unnamed
from consilience.corrections.baselines import facts_of, others
from consilience.corrections.quadratic import non_negative


class Group(NamedTuple):
    """Buffered examples of one task: the names of their sources, the task, and their tensors "x", "y", ..."""

    sources: str
    task: str | None
    tensors: Mapping[str, Tensor]
    target: str = ""
    """What their targets are, if that differs between tasks."""
    names: tuple[str, ...] = ()
    """Of samples that are augmented, the sources that "from" [n] numbers."""

    def batch(self, weight: float | None = None) -> Batch:
        """Return the examples as a part of a step, without padding that they do not need."""
        x, y = trimmed(unnamed("x", self.tensors), self.tensors["y"])
        origins = Origins(self.names, self.tensors["from"]) if self.names else None
        return Batch(x, y, self.task, source=self.sources, weight=weight, target=self.target, origins=origins)


class Replayed(NamedTuple):
    """What `ERACE` recalls: the groups of `ER`, and how many examples were seen so far."""

    groups: list[Group]
    seen: int


class Buffer(Correction):
    """A private buffer of `size` training examples; its policy chooses them."""

    size: int
    policy: Policy

    shared_items: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConsilienceError(f"`size` of the buffer must be >= 0, got {self.size}.")
        if not isinstance(self.policy, Policy):
            raise ConsilienceError(
                f"`policy` must be made by consilience.memory, such as ring(), got {kind_of(self.policy)}."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if reason := self.policy.unfit(facts):
            return reason
        if facts.kind == "class" and not facts.places and not self.policy.grows and self.size < facts.classes:
            return (
                f"a buffer of {self.size} has no place for each of the {facts.classes} classes that an agent "
                "trains on; use a larger `size`"
            )
        if self.policy.needs_boundaries and not facts.boundaries:
            return (
                f"{type(self.policy).__name__} chooses at the end of a source, and this stream has no ends; "
                "use policy=memory.reservoir()"
            )
        return None

    def keys(self, learned: Learned, ctx: Context) -> Tensor:
        """Return a key [N] for each example of a source, float64; the smallest are kept."""
        return self.policy.keys(learned, self.size)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        train, keys = learned.source.train, self.keys(learned, ctx)
        # Examples that the whole buffer could never keep are not even stored.
        kept = self.policy.keep(keys, train.targets(), self.size).nonzero()[:, 0]
        x, y = train.select(kept).whole()
        tensors = {**named("x", x.clone()), "y": y.clone(), "key": keys[kept]}
        return Private(tensors, {**facts_of(learned), "seen": len(train)})

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Keep the examples that the policy chooses among those of all sources together.

        A source without any example left is dropped, unless it is the last one.
        """
        items = list(memory.values())
        # Keys never change, so a stream's buffer does not depend on how it was cut into sources.
        keys, y = torch.cat([item.tensors["key"].cpu() for item in items]), classes_of(items)
        kept = self.policy.keep(keys, y, self.size)

        # Most items keep all of their examples: of these no tensor is touched, however many there are.
        stay: dict[str, Any] = {}
        before, end = [0, *kept.cumsum(0).tolist()], 0
        for source, item in memory.items():
            start, end = end, end + len(item.tensors["key"])
            left = before[end] - before[start]
            if left or source == learned.source.name:
                stay[source] = item if left == end - start else select(item, kept[start:end])
        return stay


def classes_of(items: Sequence[Private]) -> Tensor:
    """Return the targets [M] of the examples of items; -100 for those that are not one class."""
    # Only policies by class read them, and these refuse all other targets.
    targets = [item.tensors["y"].cpu() for item in items]
    return torch.cat([y if y.dim() == 1 else torch.full((len(y),), NONE) for y in targets])


def kept(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return those tensors of a buffered item; inputs of several parts have a tensor for each."""
    return {name: tensor for name, tensor in tensors.items() if name.partition("/")[0] in names}


def select(item: Private, kept: Tensor) -> Private:
    """Return the examples of an item where `kept` [n] is true."""
    return replace(item, tensors={k: t[kept.to(t.device)] for k, t in item.tensors.items()})


@dataclass(frozen=True)
class ER(Buffer):
    """Experience replay: each step has one more part, `batch_size` examples from a buffer of earlier sources.

    The objectives of a step weigh the same: (L_new + L_buffer) / 2. `policy` chooses the examples to keep
    (`consilience.memory`), by default a reservoir over everything seen. The buffer is private. Chaudhry et
    al. 2019.
    """

    size: int = 500
    batch_size: int = 32
    policy: Policy = field(default_factory=Reservoir)

    neutral: ClassVar[dict[str, int]] = {"size": 0}
    needs_history: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("x", "y")
    """The tensors of an item that a step needs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ConsilienceError(f"`batch_size` of the buffer must be >= 1, got {self.batch_size}.")

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        """Return a Group per task of the examples of all other sources, or None where there are none.

        Inputs of other shapes, and targets of other kinds, are in groups of their own.
        """
        # A part of a step has one task, so its examples must come from one group.
        by_task: dict[object, dict[str, Private]] = {}
        for source, item in others(memory, sources).items():
            if len(y := item.tensors["y"]):
                # Ragged places may differ: they are the last dimension.
                alike = signature(unnamed("x", item.tensors)), y.dtype, y.dim(), y.shape[1:-1]
                by_task.setdefault((item.meta["task"], item.meta["target"], alike), {})[source] = item

        groups = []
        for items in by_task.values():
            # All of a group have the same tensors. A buffer may hold one example of each of many sources.
            own = list(kept(next(iter(items.values())).tensors, self.keeps))
            table = joined_rows([{name: item.tensors[name] for name in own} for item in items.values()])
            names: tuple[str, ...] = ()
            # Which source an example is from matters only where views of it are drawn.
            if any([item.meta.get("augmented") for item in items.values()]):
                names, y = tuple(items), table["y"]
                counts = torch.tensor([len(item.tensors["y"]) for item in items.values()], device=y.device)
                table["from"] = torch.arange(len(names), device=y.device).repeat_interleave(counts)
            meta = next(iter(items.values())).meta
            groups.append(Group("+".join(items), meta["task"], table, meta["target"], names))
        return groups or None

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Return one part; with task labels, of a task drawn in proportion to its examples in the buffer."""
        return [self.draw(ctx.recalled, generator).batch()]

    def draw(self, groups: list[Group], generator: torch.Generator) -> Group:
        """Draw a group in proportion to its size, and then `batch_size` of its examples with replacement."""
        sizes = [len(group.tensors["y"]) for group in groups]
        counts = torch.tensor(sizes, dtype=torch.float64)
        # With a single group nothing is drawn: the generator goes on as it was.
        at = 0 if len(groups) == 1 else int(torch.multinomial(counts, 1, generator=generator))
        index = torch.randint(sizes[at], (self.batch_size,), generator=generator)
        index = index.to(groups[at].tensors["y"].device)
        tensors = {k: t.index_select(0, index) for k, t in groups[at].tensors.items()}
        return groups[at]._replace(tensors=tensors)


@dataclass(frozen=True)
class ERACE(ER):
    """ER with asymmetric cross-entropy: new examples compete only with the classes of their own batch.

    Buffered examples compete with all: L = (CE over the batch's classes + CE on the buffer) / 2. The buffer's
    batch is drawn as if the source were in the buffer already: each of its examples is one of the source's
    with probability n_source / n_seen, which is the only pressure of the new classes on the old ones. Caccia
    et al. 2022.
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    instead: ClassVar[str] = "use er"

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        """Return what `ER` recalls, with the number of examples seen."""
        items = {at: item for at, item in memory.items() if at[1] != PAST}
        groups = super().recall(items, sources)
        if not groups:
            return None

        # Counts are kept apart, since a source without any example left has no item.
        (counts,) = (item.meta for at, item in memory.items() if at[1] == PAST)
        return Replayed(groups, sum(counts.values()) - sum(counts.get(s.name, 0) for s in sources))

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Keep the examples that the policy chooses, and how many were seen of each source."""
        items = {source: item for source, item in memory.items() if source != PAST}
        seen = {source: item.meta["seen"] for source, item in items.items()}
        past = memory[PAST].meta if PAST in memory else {}
        return {**super().trim(items, learned), PAST: Private({}, {**past, **seen})}

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Return one part, of the buffer and of the source itself.

        A part has one task, one kind of loss and inputs of one shape: where the two differ in these, it is of
        whichever has more of the drawn examples.
        """
        groups, seen = ctx.recalled
        own = sources[int(torch.randint(len(sources), (1,), generator=generator))]
        new = sum(len(s.train) for s in sources)
        # One draw per example of the batch: how many of them are the source's own.
        fresh = int((torch.rand(self.batch_size, generator=generator) < new / (new + seen)).sum())
        (old,) = super().sample(replace(ctx, recalled=groups), sources, generator)

        index = torch.randint(len(own.train), (self.batch_size,), generator=generator)
        x, y = own.train.select(index).whole()
        x, y = x.to(old.x.device, old.x.dtype), y.to(old.y)
        if old.task is not None or own.target != old.target or signature(x) != signature(old.x):
            new_part = replace(old, x=x, y=y, task=own.task, source=own.name, target=own.target, origins=None)
            return [new_part if fresh * 2 > self.batch_size else old]
        x, y = concat([x[:fresh], old.x[fresh:]]), torch.cat([y[:fresh], old.y[fresh:]])
        return [replace(old, x=x, y=y, origins=self._origins(own, old, fresh))]

    def _origins(self, own: Source, old: Batch, fresh: int) -> Origins | None:
        """Return where samples are from of which the first `fresh` are the source's own."""
        if own.augment is None and old.origins is None:
            return None
        names, number = old.origins or Origins((old.source,), torch.zeros(len(old.y), dtype=torch.long))
        number = number.clone()
        number[:fresh] = len(names)
        return Origins((*names, own.name), number)

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        changed = dict(losses)
        for i, part in enumerate(step.parts):
            if part.drawn_by:
                continue
            # Counting by scatter needs no `unique`, whose shape would depend on the data; padding and samples
            # without a class count 0.
            out, y = step.outputs[i], part.y
            count = (y != NONE).to(y.dtype) if part.w is None else part.w.to(y.dtype) * (y != NONE)
            there = torch.zeros(out.shape[1], dtype=y.dtype, device=y.device)
            there = there.scatter_add(0, y.clamp_min(0), count) > 0
            changed[i] = step.targets[i].losses(out.masked_fill(~there, -torch.inf), y).values
        return changed


@dataclass(frozen=True)
class DER(ER):
    """Dark experience replay: alpha x MSE to the logits that the model had when an example was stored.

    With beta it is DER++: L = L_new + alpha ||h(x') - z'||^2 / C + beta CE(x'', y''), x' and x'' two draws
    from the reservoir. Logits are stored at the end of a source; outputs that a head did not have then are
    left out. Buzzega et al. 2020.
    """

    alpha: float = 0.5
    beta: float = 0.0

    keeps: ClassVar[tuple[str, ...]] = ("x", "y", "logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative(type(self).__name__, alpha=self.alpha, beta=self.beta)

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Return a part of weight 0 with its logits, and for DER++ another of weight beta."""
        parts = []
        # The part of weight 0 is only forwarded: `rows` makes its objective.
        for weight in (0.0, self.beta) if self.beta else (0.0,):
            drawn = self.draw(ctx.recalled, generator)
            part = drawn.batch(weight)
            if not weight:
                logits = drawn.tensors["logits"]
                # Trimmed as the targets are, where they have places.
                part = replace(
                    part, extra={"logits": logits[..., : part.y.shape[-1]] if logits.dim() > 2 else logits}
                )
            parts.append(part)
        return parts

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        found = []
        for i, part in enumerate(step.parts):
            if part.drawn_by != self.name or "logits" not in part.extra:
                continue
            stored, now = part.extra["logits"], step.raw[i]
            # Columns of classes that a head lacks are -inf, whose difference would be NaN.
            both = torch.isfinite(stored) & torch.isfinite(now)
            if now.dim() > 2:
                both = both & (part.there(now[:, 0]) > 0).unsqueeze(1)
            gap = torch.where(both, now, 0) - torch.where(both, stored, 0)
            found.append(Row(gap.square().sum() / both.sum().clamp_min(1), self.alpha, part=i))
        return found

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        plain = super().summarise(learned, ctx)
        with torch.no_grad():
            # In chunks, as a forward pass of the whole buffer may not fit in memory.
            logits = [
                learned.model(learned.params, learned.buffers, x, learned.task, False)[0]
                for x in unnamed("x", plain.tensors).split(1024)
            ]
        return Private({**plain.tensors, "logits": torch.cat(logits)}, plain.meta)
