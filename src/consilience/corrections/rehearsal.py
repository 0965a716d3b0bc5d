"""Rehearsal: examples of earlier sources are seen again. Buffers never leave their agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.correction import Correction, Learned, Me, Memory, Row, StepView
from consilience.core.errors import ConsilienceError
from consilience.core.message import Private
from consilience.core.schedule import Facts
from consilience.core.source import Source, Tensors
from consilience.core.step import sample_losses
from consilience.corrections.quadratic import non_negative

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
class ERACE(ER):
    """ER with asymmetric cross-entropy: new examples compete only with the classes of their own batch, the buffer's with all.

    L = (CE over the batch's classes + CE on the buffer) / 2. Caccia et al. 2022.
    """

    def refuse(self, facts: Facts) -> str | None:
        return "values have no classes that compete; use er" if facts.kind == "value" else None

    def losses(self, losses: dict[int, Tensor], step: StepView, me: Me) -> dict[int, Tensor]:
        bent = dict(losses)
        for i, p in enumerate(step.parts):
            if not p.owner:
                there = torch.zeros(step.outputs[i].shape[1], dtype=torch.bool, device=p.y.device)
                there = there.index_fill(0, p.y, True)
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

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative(type(self).__name__, alpha=self.alpha, beta=self.beta)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Bufs | None:
        groups = super().recall(memory, sources)
        if groups is None:
            return None
        logits = {item.meta["task"]: [] for item in memory.values()}  # type: ignore[var-annotated]
        now = {s.name for s in sources}
        for (_, source), item in sorted(memory.items()):
            if source not in now and len(item.tensors["y"]):
                logits[item.meta["task"]].append(item.tensors["logits"])
        return [(name, task, x, y, torch.cat(logits[task])) for name, task, x, y in groups]  # type: ignore[misc]

    def sample(self, me: Me, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """A part of weight 0 with its logits, and for DER++ another of weight beta."""
        counts = torch.tensor([len(g[3]) for g in me.known], dtype=torch.float64)
        parts = []
        for weight in (0.0, self.beta) if self.beta else (0.0,):
            g = 0 if len(counts) == 1 else int(torch.multinomial(counts, 1, generator=generator))
            name, task, x, y, z = me.known[g]
            index = torch.randint(len(y), (self.batch_size,), generator=generator).to(x.device)
            extra = {} if weight else {"logits": z.index_select(0, index)}
            parts.append(Batch(x.index_select(0, index), y.index_select(0, index), task, extra=extra, source=name, weight=weight))
        return parts

    def rows(self, step: StepView, me: Me) -> list[Row]:
        found = []
        for i, p in enumerate(step.parts):
            if p.owner == self.name and "logits" in p.extra:
                z, h = p.extra["logits"], step.raw[i]
                both = torch.isfinite(z) & torch.isfinite(h)
                gap = torch.where(both, h, 0) - torch.where(both, z, 0)
                found.append(Row(gap.square().sum() / both.sum().clamp_min(1), self.alpha))
        return found

    def summarise(self, learned: Learned, me: Me) -> Private:
        plain = super().summarise(learned, me)
        with torch.no_grad():
            z = [
                learned.model(learned.params, learned.buffers, x, learned.task, False)[0] for x in plain.tensors["x"].split(1024)
            ]
        return Private({**plain.tensors, "logits": torch.cat(z)}, plain.meta)


@dataclass(frozen=True)
class Cumulative(Correction):
    """Joint training: every learn is on all sources seen so far by this agent, as one pool.

    With task labels each task is a part of the step, the new ones first. Keeps all data; the upper bound that other
    methods are measured against.
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
        if sources[0].task is not None:
            return (*sources, *past)
        everything = (*past, *sources)
        return (Source.union("+".join(s.name for s in everything), everything),)

    def summarise(self, learned: Learned, me: Me) -> Private:
        x, y = learned.source.train.whole()
        return Private({"x": x, "y": y}, {"task": learned.task, "classes": list(learned.source.classes)})
