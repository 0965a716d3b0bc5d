"""Rehearsal: examples of earlier sources are seen again. Buffers never leave their agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.batch import Batch, sample_losses
from consilience.core.buffer import Policy, Reservoir
from consilience.core.contexts import Context, Learned, Memory, Row, StepView
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.message import Private
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source
from consilience.corrections.baselines import facts_of, others
from consilience.corrections.quadratic import non_negative

Bufs = list[tuple[Any, ...]]


class Buffer(Correction):
    """A private buffer of `size` examples of what was learned, those that its policy keeps."""

    size: int
    policy: Policy

    shared_items: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConsilienceError(f"`size` of the buffer should be >= 0. Found `size = {self.size}`.")
        if not isinstance(self.policy, Policy):
            raise ConsilienceError(
                f"`policy` should be made by consilience.memory, such as ring(). Found {kind_of(self.policy)}."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.kind == "value" and type(self.policy) is not Reservoir:
            return "values have no classes that share a buffer; use policy=memory.reservoir()"
        if facts.kind == "class" and not self.policy.grows and self.size < facts.classes:
            return f"a buffer of {self.size} has no place for each of the {facts.classes} classes that an agent learns; use a larger `size`"
        if self.policy.needs_boundaries and not facts.boundaries:
            return f"{type(self.policy).__name__} chooses at the end of a source, and this stream has no ends; use policy=memory.reservoir()"
        return None

    def keys(self, learned: Learned, ctx: Context) -> Tensor:
        """A key [N] for each example of a source, float64."""
        return self.policy.keys(learned, self.size)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        train, keys = learned.source.train, self.keys(learned, ctx)
        kept = self.policy.keep(keys, train.targets(), self.size).nonzero()[:, 0]
        x, y = train.select(kept).whole()
        found = {"x": x.clone(), "y": y.clone(), "key": keys[kept]}
        return Private(found, {**facts_of(learned), "seen": len(train)})

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """What the policy keeps of all sources together."""
        items = list(memory.values())
        keys, y = (torch.cat([i.tensors[k].cpu() for i in items]) for k in ("key", "y"))
        kept = self.policy.keep(keys, y, self.size).split([len(i.tensors["key"]) for i in items])
        return {
            s: i if bool(k.all()) else select(i, k) for (s, i), k in zip(memory.items(), kept, strict=True)
        }


def select(item: Private, kept: Tensor) -> Private:
    """The examples of an item where `kept` [n] is true."""
    return replace(item, tensors={k: t[kept.to(t.device)] for k, t in item.tensors.items()})


@dataclass(frozen=True)
class ER(Buffer):
    """Experience replay: a buffer of `size` examples of earlier sources; each step draws `batch_size` of them as one more part.

    The step's objectives weigh the same: (L_new + L_buffer) / 2. `policy` says which examples are kept (`consilience.memory`):
    by default a reservoir over everything seen. The buffer is private. Chaudhry et al. 2019.
    """

    size: int = 500
    batch_size: int = 32
    policy: Policy = field(default_factory=Reservoir)

    neutral: ClassVar[dict[str, int]] = {"size": 0}
    needs_history: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("x", "y")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ConsilienceError(
                f"`batch_size` of the buffer should be >= 1. Found `batch_size = {self.batch_size}`."
            )

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Bufs | None:
        """(source, task, x, y, ..) of every other source, those of one task together: the tensors that `keeps` names."""
        by_task: dict[str | None, dict[str, Private]] = {}
        for source, item in others(memory, sources).items():
            if len(item.tensors["y"]):
                by_task.setdefault(item.meta["task"], {})[source] = item
        groups: Bufs = [
            ("+".join(items), task, *[torch.cat([i.tensors[k] for i in items.values()]) for k in self.keeps])
            for task, items in by_task.items()
        ]
        return groups or None

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """One part; with task labels, of a task drawn in proportion to its place in the buffer."""
        counts = torch.tensor([len(y) for *_, y in ctx.recalled], dtype=torch.float64)
        g = 0 if len(counts) == 1 else int(torch.multinomial(counts, 1, generator=generator))
        name, task, x, y = ctx.recalled[g]
        index = torch.randint(len(y), (self.batch_size,), generator=generator).to(x.device)
        return [Batch(x.index_select(0, index), y.index_select(0, index), task, source=name)]


@dataclass(frozen=True)
class ERACE(ER):
    """ER with asymmetric cross-entropy: new examples compete only with the classes of their own batch, the buffer's with all.

    L = (CE over the batch's classes + CE on the buffer) / 2. The buffer's batch is as if the source were in the buffer already:
    each of its examples is one of the source's with probability n_source / n_seen, which is what holds the new classes
    against the old ones. Caccia et al. 2022.
    """

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return (
            "values have no classes that compete; use er" if facts.kind == "value" else super().refuse(facts)
        )

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        """The groups of `ER`, and how many examples were seen."""
        groups = super().recall(memory, sources)
        return groups and (groups, sum(item.meta["seen"] for item in others(memory, sources).values()))

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """One part, of the buffer and of the source itself; with task labels of whichever has more of the drawn examples, since a
        part has one task."""
        groups, seen = ctx.recalled
        own = sources[int(torch.randint(len(sources), (1,), generator=generator))]
        new = sum(len(s.train) for s in sources)
        fresh = int((torch.rand(self.batch_size, generator=generator) < new / (new + seen)).sum())
        (old,) = super().sample(replace(ctx, recalled=groups), sources, generator)
        index = torch.randint(len(own.train), (self.batch_size,), generator=generator)
        x, y = own.train.select(index).whole()
        x, y = x.to(old.x), y.to(old.y)
        if old.task is not None:
            return (
                [replace(old, x=x, y=y, task=own.task, source=own.name)]
                if fresh * 2 > self.batch_size
                else [old]
            )
        return [
            replace(old, x=torch.cat([x[:fresh], old.x[fresh:]]), y=torch.cat([y[:fresh], old.y[fresh:]]))
        ]

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        bent = dict(losses)
        for i, p in enumerate(step.parts):
            if not p.drawn_by:
                count = torch.ones_like(p.y) if p.w is None else p.w.to(p.y.dtype)
                there = (
                    torch.zeros(step.outputs[i].shape[1], dtype=p.y.dtype, device=p.y.device).scatter_add(
                        0, p.y, count
                    )
                    > 0
                )
                bent[i] = sample_losses(step.outputs[i].masked_fill(~there, -torch.inf), p.y, "class")
        return bent


@dataclass(frozen=True)
class DER(ER):
    """Dark experience replay: alpha x MSE to the logits that the model had when an example was stored; with beta, DER++.

    L = L_new + alpha ||h(x') - z'||^2 / C + beta CE(x'', y''), x' and x'' two draws from the reservoir. Logits are stored at
    the end of a source; outputs that a head did not have then are left out. Buzzega et al. 2020.
    """

    alpha: float = 0.5
    beta: float = 0.0

    keeps: ClassVar[tuple[str, ...]] = ("x", "y", "logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative(type(self).__name__, alpha=self.alpha, beta=self.beta)

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """A part of weight 0 with its logits, and for DER++ another of weight beta."""
        counts = torch.tensor([len(g[3]) for g in ctx.recalled], dtype=torch.float64)
        parts = []
        for weight in (0.0, self.beta) if self.beta else (0.0,):
            g = 0 if len(counts) == 1 else int(torch.multinomial(counts, 1, generator=generator))
            name, task, x, y, z = ctx.recalled[g]
            index = torch.randint(len(y), (self.batch_size,), generator=generator).to(x.device)
            extra = {} if weight else {"logits": z.index_select(0, index)}
            parts.append(
                Batch(
                    x.index_select(0, index),
                    y.index_select(0, index),
                    task,
                    extra=extra,
                    source=name,
                    weight=weight,
                )
            )
        return parts

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        found = []
        for i, p in enumerate(step.parts):
            if p.drawn_by == self.name and "logits" in p.extra:
                z, h = p.extra["logits"], step.raw[i]
                both = torch.isfinite(z) & torch.isfinite(h)
                gap = torch.where(both, h, 0) - torch.where(both, z, 0)
                found.append(Row(gap.square().sum() / both.sum().clamp_min(1), self.alpha))
        return found

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        plain = super().summarise(learned, ctx)
        with torch.no_grad():
            z = [
                learned.model(learned.params, learned.buffers, x, learned.task, False)[0]
                for x in plain.tensors["x"].split(1024)
            ]
        return Private({**plain.tensors, "logits": torch.cat(z)}, plain.meta)
