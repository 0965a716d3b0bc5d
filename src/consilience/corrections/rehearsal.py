"""Rehearsal: examples of earlier sources are seen again. Buffers never leave their agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.correction import Correction, Learned, Me, Memory
from consilience.core.errors import ConsilienceError
from consilience.core.message import Private
from consilience.core.source import Source, Tensors

Bufs = list[tuple[str, str | None, Tensor, Tensor]]


@dataclass(frozen=True)
class ER(Correction):
    """Experience replay: a buffer of `size` examples of earlier sources; each step draws `batch_size` of them as one more part.

    The step's objectives weigh the same: (L_new + L_buffer) / 2. The buffer is a reservoir over everything seen: each
    example draws a uniform key and the `size` smallest stay, so that each is kept with probability size / seen. It is
    private. Chaudhry et al. 2019; Vitter 1985.
    """

    size: int = 500
    batch_size: int = 32

    travels: ClassVar[bool] = False
    neutral: ClassVar[dict[str, int]] = {"size": 0}
    recalls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConsilienceError(f"`size` of the buffer should be >= 0. Found `size = {self.size}`.")
        if self.batch_size < 1:
            raise ConsilienceError(f"`batch_size` of the buffer should be >= 1. Found `batch_size = {self.batch_size}`.")

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Bufs | None:
        """(source, task, x, y) of every other source, those of one task together."""
        now = {s.name for s in sources}
        by_task: dict[str | None, list[tuple[str, Private]]] = {}
        for (_, source), item in sorted(memory.items()):
            if source not in now and len(item.tensors["y"]):
                by_task.setdefault(item.meta["task"], []).append((source, item))  # type: ignore[arg-type]
        groups: Bufs = [
            (
                "+".join(s for s, _ in items),
                task,
                torch.cat([i.tensors["x"] for _, i in items]),
                torch.cat([i.tensors["y"] for _, i in items]),
            )
            for task, items in by_task.items()
        ]
        return groups or None

    def sample(self, me: Me, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """One part; with task labels, of a task drawn in proportion to its place in the buffer."""
        counts = torch.tensor([len(y) for *_, y in me.known], dtype=torch.float64)
        g = 0 if len(counts) == 1 else int(torch.multinomial(counts, 1, generator=generator))
        name, task, x, y = me.known[g]
        index = torch.randint(len(y), (self.batch_size,), generator=generator).to(x.device)
        return [Batch(x.index_select(0, index), y.index_select(0, index), task, source=name)]

    def summarise(self, learned: Learned, me: Me) -> Private:
        n = len(learned.source.train)
        keys = torch.rand(n, generator=learned.generator, dtype=torch.float64)
        keep = keys.argsort()[: self.size]
        x, y = learned.source.train.select(keep).whole()
        return Private({"x": x.clone(), "y": y.clone(), "key": keys[keep]}, {"task": learned.task})

    def trim(self, memory: Mapping[str, Any], generator: torch.Generator) -> Mapping[str, Any]:
        """The `size` smallest keys over all sources: a reservoir."""
        keys = torch.cat([item.tensors["key"] for item in memory.values()])
        if len(keys) <= self.size:
            return memory
        bound = keys.kthvalue(self.size).values
        trimmed = {}
        for s, item in memory.items():
            keep = item.tensors["key"] <= bound
            trimmed[s] = replace(item, tensors={k: t[keep.to(t.device)] for k, t in item.tensors.items()})
        return trimmed


@dataclass(frozen=True)
class Cumulative(Correction):
    """Joint training: every learn is on all sources seen so far by this agent, as one pool.

    With task labels, and where one learn has several sources, each is a part of the step, the new ones first. Keeps all data; the upper bound that other methods are measured against.
    """

    travels: ClassVar[bool] = False

    def refuse(self, facts: Any) -> str | None:
        if facts.recalls_own or facts.parts > 1:
            return None
        return "no agent has the data of more than one source; put the sources in settings.multitask"

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private]:
        now = {s.name for s in sources}
        return {source: item for (_, source), item in sorted(memory.items()) if source not in now}  # type: ignore[misc]

    def gather(self, sources: tuple[Source, ...], known: dict[str, Private]) -> tuple[Source, ...]:
        past = [
            replace(
                sources[0],
                name=name,
                task=item.meta["task"],
                train=Tensors(item.tensors["x"], item.tensors["y"]),
                classes=tuple(item.meta["classes"]),
            )
            for name, item in known.items()
        ]
        if not past or any(i.meta["apart"] for i in known.values()):
            return (*sources, *past)
        everything = (*past, *sources)
        return (Source.union("+".join(s.name for s in everything), everything),)

    def summarise(self, learned: Learned, me: Me) -> Private:
        x, y = learned.source.train.whole()
        meta = {"task": learned.source.task, "classes": list(learned.source.classes), "apart": learned.task is not None}
        return Private({"x": x, "y": y}, meta)
