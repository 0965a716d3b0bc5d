"""Baselines: training on one pool of all data seen so far, and training from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from consilience.core.augment import Origins
from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory
from consilience.core.correction import Correction
from consilience.core.message import Item, Private
from consilience.core.params import Params
from consilience.core.source import Source, Tensors
from consilience.core.tree import named, signature, unnamed

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


THROWN = "what was received from others would be lost at the next visit; "


def by_source(memory: Memory) -> list[tuple[tuple[str, str], Item]]:
    """Return the items of a memory in the order of (source, sender).

    Sums of items follow it, so that they do not depend on the order in which messages arrived.
    """
    return sorted(memory.items(), key=lambda entry: (entry[0][1], entry[0][0]))


def pool(sources: tuple[Source, ...], past: Mapping[str, Private]) -> tuple[Source, ...]:
    """Join the given sources with the kept examples of past ones.

    With task labels each source is a part of its own, the new ones first; without, all are one source, but
    inputs of another shape, and targets of another kind or loss, are in a source of their own.
    """
    # Kept examples may lie on another device than the new ones.
    where = sources[0].train.targets().device
    old = [
        replace(
            sources[0],
            name=name,
            task=item.meta["task"],
            train=Tensors(unnamed("x", item.tensors).to(where), item.tensors["y"].to(where)),
            classes=tuple(item.meta["classes"]),
            kind=item.meta["kind"],
            target=item.meta["target"],
            augment=None,
        )
        for name, item in past.items()
        if len(item.tensors["y"])
    ]
    if sources[0].task is not None:
        return (*sources, *old)

    # The groups of the new sources come first.
    groups: dict[object, list[Source]] = {_alike(source): [] for source in sources}
    for source in (*old, *sources):
        # Augmentations are found by the source that each example came from.
        groups.setdefault(_alike(source), []).append(replace(source, augment=None))
    return tuple(_pooled(group) for group in groups.values())


def _pooled(group: Sequence[Source]) -> Source:
    """Return sources as one, with the origin of each example."""
    sizes = torch.tensor([len(source.train) for source in group])
    names = tuple(source.name for source in group)
    origins = Origins(names, torch.repeat_interleave(torch.arange(len(names)), sizes))
    return replace(Source.union("+".join(names), group), origins=origins)


def _alike(source: Source) -> object:
    """Return what sources must have in common to be one."""
    train = source.train
    x = train.x if isinstance(train, Tensors) else train.first()[0]
    return source.target, source.places, signature(x)


def others(memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private]:
    """Return the private items of all other sources, by source."""
    names = {source.name for source in sources}
    found: dict[str, Any] = {source: item for (_, source), item in sorted(memory.items())}
    return {source: item for source, item in found.items() if source not in names}


def facts_of(learned: Learned) -> dict[str, object]:
    """Return the facts of a source that its item keeps.

    They are the task that the model was given, the source's own task, its classes, its kind of targets, what
    these are (by the key in `LabelFrame.targets`), and the visit's number; and whether it is augmented.
    """
    source = learned.source
    return {
        "task": learned.task,
        "label": source.task,
        "classes": list(source.classes),
        "kind": source.kind,
        "target": source.target,
        "order": learned.order,
        **augmented(source),
    }


def augmented(source: Source) -> dict[str, object]:
    """Return the fact that samples of a source are augmented where they are trained on, if they are."""
    return {} if source.augment is None else {"augmented": True}


def reset(start: Beginning) -> Params:
    """Replace all trainable parameters by new ones, heads and columns of past tasks included.

    The new ones are the model's own draw (a given module begins as it was given), and they grow in the order
    in which tasks came. `start.recalled` has the items of past sources.
    """
    model, sources, past = start.model, start.sources, start.recalled
    fresh, buffers = model.init(start.generator)
    # Heads draw from one generator, so they must grow in the order of a run that had all tasks.
    visits = sorted(past.items(), key=lambda visit: (visit[1].meta["order"], visit[0]))
    before = [
        replace(sources[0], name=name, task=item.meta["label"], classes=tuple(item.meta["classes"]))
        for name, item in visits
    ]
    for source in (*before, *sources):
        whole = source if start.frame is None else start.frame.widened(source)
        fresh, buffers = model.grow(fresh, buffers, whole, start.generator)
    return {
        name: fresh[name].to(p) if name in fresh and not model.frozen(name) else p
        for name, p in start.params.items()
    }


@dataclass(frozen=True)
class Cumulative(Correction):
    """Train on all sources that this agent has seen so far, as one pool.

    With task labels each task is a part of the step, the new ones first. Keeps all data. With `scratch` every
    visit but the first begins from new parameters: joint training, the upper bound for other methods.
    """

    scratch: bool = False

    shared_items: ClassVar[bool] = False

    def refuse(self, facts: ScheduleFacts) -> str | None:
        # New parameters would replace the received ones before anything read them.
        if self.scratch and facts.receives_others:
            return THROWN + "use cumulative"
        if facts.own_history or facts.parts > 1:
            return None
        return "no agent has the data of more than one source; put the sources in settings.multitask"

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private]:
        return others(memory, sources)

    def gather(
        self, sources: tuple[Source, ...], recalled: dict[str, Private], generator: torch.Generator
    ) -> tuple[Source, ...]:
        return pool(sources, recalled)

    def begin(self, start: Beginning) -> Begun:
        if not self.scratch or not start.recalled:
            return Begun(start.params)
        return Begun(reset(start))

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        x, y = learned.source.train.whole()
        return Private({**named("x", x), "y": y}, facts_of(learned))


@dataclass(frozen=True)
class FromScratch(Correction):
    """Begin every visit of an agent but its first from new parameters, so that nothing is transferred.

    The heads of other tasks begin again too. Running statistics of batch norm continue, since training
    overwrites them.
    """

    shared_items: ClassVar[bool] = False
    needs_history: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return THROWN + "use finetune" if facts.receives_others else None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private] | None:
        """Return the items of sources that were trained before, or None."""
        return others(memory, sources) or None

    def begin(self, start: Beginning) -> Begun:
        if not start.recalled:
            return Begun(start.params)
        return Begun(reset(start))

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        # No tensor is needed: that there is an item says that the source was trained.
        return Private({}, facts_of(learned))
