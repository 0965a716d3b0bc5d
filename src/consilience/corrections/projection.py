"""Projection: losses on remembered examples are constraints of the step, not objectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from consilience.core.batch import Batch, mean_loss
from consilience.core.contexts import Context, Learned, Memory, Row, StepView
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Private
from consilience.core.source import Source
from consilience.corrections.baselines import others
from consilience.corrections.rehearsal import ER


def constraints(step: StepView, owner: str) -> list[Row]:
    """The loss of each part that a correction drew, as a constraint."""
    kind = "value" if step.parts[0].y.is_floating_point() else "class"
    own = [i for i, p in enumerate(step.parts) if p.drawn_by == owner]
    return [Row(mean_loss(step.outputs[i], step.parts[i], kind), kind="constraint") for i in own]


@dataclass(frozen=True)
class EpisodicConstraints(Correction):
    """One constraint row for each earlier source: the loss on its `size` remembered examples must not rise (GEM).

    Needs a cone as step aggregator. Each step sees `batch_size` of a source's examples (None: all of them). Private.
    Lopez-Paz & Ranzato 2017.
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
            raise ConsilienceError(
                f"`size` of each source's memory should be >= 0. Found `size = {self.size}`."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ConsilienceError(f"`batch_size` should be >= 1. Found `batch_size = {self.batch_size}`.")

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> list[tuple[str, Any]] | None:
        """(source, item) of every other source."""
        return list(others(memory, sources).items()) or None

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """A part of weight 0 for each earlier source: it is forwarded, and `rows` makes its constraint."""
        parts = []
        for source, item in ctx.recalled:
            x, y = item.tensors["x"], item.tensors["y"]
            if self.batch_size is not None and self.batch_size < len(y):
                index = torch.randperm(len(y), generator=generator)[: self.batch_size].to(x.device)
                x, y = x.index_select(0, index), y.index_select(0, index)
            parts.append(Batch(x, y, item.meta["task"], source=source, weight=0.0))
        return parts

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        return constraints(step, self.name)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        examples = learned.source.train
        keep = torch.randperm(len(examples), generator=learned.generator)[: self.size]
        x, y = examples.select(keep).whole()
        return Private({"x": x.clone(), "y": y.clone()}, {"task": learned.task})


@dataclass(frozen=True)
class AverageConstraint(ER):
    """One constraint row: the loss on a batch drawn from a reservoir over all earlier sources must not rise (A-GEM).

    Needs a cone as step aggregator. Chaudhry et al. 2019.
    """

    adds_constraints: ClassVar[bool] = True

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """One part of weight 0: it is forwarded, and `rows` makes its constraint."""
        return [replace(b, weight=0.0) for b in super().sample(ctx, sources, generator)]

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        return constraints(step, self.name)
