"""Baselines: all data seen so far, as one pool; and learning from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory
from consilience.core.correction import Correction
from consilience.core.message import Private
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Source, Tensors

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


THROWN = "what is heard of others would be thrown away at the next learn; "


def pool(sources: tuple[Source, ...], past: Mapping[str, Private]) -> tuple[Source, ...]:
    """The given sources with what was kept of past ones: one pool; with task labels each is a part, the new ones first."""
    where = sources[0].train.targets().device
    old = [
        replace(
            sources[0],
            name=name,
            task=item.meta["task"],
            train=Tensors(item.tensors["x"].to(where), item.tensors["y"].to(where)),
            classes=tuple(item.meta["classes"]),
        )
        for name, item in past.items()
        if len(item.tensors["y"])
    ]
    if sources[0].task is not None:
        return (*sources, *old)
    everything = (*old, *sources)
    return (Source.union("+".join(s.name for s in everything), everything),)


def others(memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private]:
    """The private items of all other sources, by source."""
    now = {s.name for s in sources}
    return {source: item for (_, source), item in sorted(memory.items()) if source not in now}  # type: ignore[misc]


def facts_of(learned: Learned) -> dict[str, object]:
    """What an item says of its source: the task that the model was given, the source's own, its classes, when it was learned."""
    s = learned.source
    return {"task": learned.task, "label": s.task, "classes": list(s.classes), "order": learned.order}


def reset(
    model: Model,
    params: Params,
    sources: tuple[Source, ...],
    past: Mapping[str, Private],
    generator: torch.Generator,
) -> Params:
    """New parameters in place of those that are trained, heads and columns of past tasks too: the model's own draw (a given module
    begins as it was given), grown in the order in which tasks came."""
    fresh, buffers = model.init(generator)
    items = sorted(past.items(), key=lambda kv: (kv[1].meta["order"], kv[0]))
    before = [
        replace(sources[0], name=n, task=i.meta["label"], classes=tuple(i.meta["classes"])) for n, i in items
    ]
    for s in (*before, *sources):
        fresh, buffers = model.grow(fresh, buffers, s, generator)
    return {n: fresh[n].to(p) if n in fresh and not model.frozen(n) else p for n, p in params.items()}


@dataclass(frozen=True)
class Cumulative(Correction):
    """Every learn is on all sources seen so far by this agent, as one pool.

    With task labels each task is a part of the step, the new ones first. Keeps all data. With `scratch` every learn but the
    first begins from new parameters: joint training, the upper bound that other methods are measured against.
    """

    scratch: bool = False

    shared_items: ClassVar[bool] = False

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if self.scratch and facts.receives_others:
            return THROWN + "use cumulative"
        if facts.own_history or facts.parts > 1:
            return None
        return "no agent has the data of more than one source; put the sources in settings.multitask"

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private]:
        return others(memory, sources)

    def gather(
        self, sources: tuple[Source, ...], known: dict[str, Private], generator: torch.Generator
    ) -> tuple[Source, ...]:
        return pool(sources, known)

    def begin(self, start: Beginning) -> Begun:
        model, params, sources, known, generator = (
            start.model,
            start.params,
            start.sources,
            start.recalled,
            start.generator,
        )
        return Begun(reset(model, params, sources, known, generator) if self.scratch and known else params)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        x, y = learned.source.train.whole()
        return Private({"x": x, "y": y}, facts_of(learned))


@dataclass(frozen=True)
class FromScratch(Correction):
    """Every learn of a source after an agent's first begins from new parameters: nothing is transferred.

    The heads of other tasks begin anew too. Running statistics of batch norm go on, which training overwrites.
    """

    shared_items: ClassVar[bool] = False
    needs_history: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return THROWN + "use finetune" if facts.receives_others else None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private] | None:
        """What else was learned before, or None."""
        return others(memory, sources) or None

    def begin(self, start: Beginning) -> Begun:
        model, params, sources, known, generator = (
            start.model,
            start.params,
            start.sources,
            start.recalled,
            start.generator,
        )
        return Begun(reset(model, params, sources, known, generator) if known else params)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """That it was learned."""
        return Private({}, facts_of(learned))
