"""Projection: losses on remembered examples are constraints of the step, not objectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from consilience.core.batch import Batch
from consilience.core.contexts import Context, Learned, Memory, Row, StepView
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Private
from consilience.core.source import Source, trimmed
from consilience.core.tree import named, unnamed
from consilience.corrections.baselines import others
from consilience.corrections.rehearsal import ER


def constraints(step: StepView, drawn_by: str) -> list[Row]:
    """Return the loss of each part that a correction drew, as a constraint."""
    return [
        Row(target.mean(out, part.y, part.w), kind="constraint", part=i)
        for i, (target, out, part) in enumerate(zip(step.targets, step.outputs, step.parts, strict=True))
        if part.drawn_by == drawn_by
    ]


@dataclass(frozen=True)
class EpisodicConstraints(Correction):
    """GEM: the loss on the remembered examples of each earlier source must not rise.

    There is one constraint row per source, and `size` examples of each source are kept, private. Needs a cone
    as step aggregator. Each step uses `batch_size` of a source's examples (None: all). Lopez-Paz & Ranzato
    2017.
    """

    size: int = 256
    batch_size: int | None = None

    shared_items: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = True
    neutral: ClassVar[dict[str, int]] = {"size": 0}
    needs_history: ClassVar[bool] = True
    adds_constraints: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConsilienceError(f"`size` of each source's memory must be >= 0, got {self.size}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConsilienceError(f"`batch_size` must be >= 1, or None for all, got {self.batch_size}.")

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private] | None:
        """Return the items of all other sources, by source, or None where there are none."""
        return others(memory, sources) or None

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Return a part of weight 0 per earlier source: it is forwarded, and `rows` makes its constraint."""
        parts = []
        for source, item in ctx.recalled.items():
            x, y = unnamed("x", item.tensors), item.tensors["y"]
            if self.batch_size is not None and self.batch_size < len(y):
                index = torch.randperm(len(y), generator=generator)[: self.batch_size].to(x.device)
                x, y = x.index_select(0, index), y.index_select(0, index)
            x, y = trimmed(x, y)
            target = item.meta["target"]
            parts.append(Batch(x, y, item.meta["task"], source=source, weight=0.0, target=target))
        return parts

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        return constraints(step, self.name)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        examples = learned.source.train
        kept = torch.randperm(len(examples), generator=learned.generator)[: self.size]
        x, y = examples.select(kept).whole()
        # Copies, so that the item does not hold all examples of the source in memory.
        return Private(
            {**named("x", x.clone()), "y": y.clone()}, {"task": learned.task, "target": learned.source.target}
        )


@dataclass(frozen=True)
class AverageConstraint(ER):
    """A-GEM: the loss on a batch of earlier examples must not rise, one constraint row.

    The batch is drawn from a reservoir over all earlier sources. Needs a cone as step aggregator.
    Chaudhry et al. 2019.
    """

    adds_constraints: ClassVar[bool] = True

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Return the part of `ER` with weight 0: it is forwarded, and `rows` makes its constraint."""
        return [replace(part, weight=0.0) for part in super().sample(ctx, sources, generator)]

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        # As an objective the same loss would be experience replay.
        return constraints(step, self.name)
