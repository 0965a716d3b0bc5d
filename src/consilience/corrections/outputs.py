"""Corrections of what the loss sees of the outputs: the re-weighted softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.losses import NONE

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True)
class WSM(Correction):
    """Re-weighted softmax: the cross-entropy of the logits plus log p, p the class shares of the data.

    loss(z, y) = -log(p_y e^(z_y) / sum_c p_c e^(z_c)), z [B, C], with p from the label counts of the sources
    of this visit together; equal counts of all classes are plain training. A class that they lack has p = 0:
    no gradient reaches its logit. Samples of such a class (gathered, or replayed by another correction) and
    all other parts keep the plain loss. Prediction is unchanged. Legate, Caccia & Belilovsky 2023.
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return None if facts.trains else NO_TRAINING

    def begin(self, start: Beginning) -> Begun:
        """Return the private log p [C], -inf for classes that these sources lack."""
        # The sources of a visit are trained together, so that their counts add.
        size = start.model.outputs
        targets = [source.train.targets() for source in start.sources]
        counts = [torch.bincount(y[y != NONE], minlength=size) for y in targets]
        total = torch.stack(counts).sum(0).double()
        return Begun(start.params, {"log_p": (total / total.sum()).log()})

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        log_p = ctx.private["log_p"].to(step.theta)
        there = log_p > -torch.inf
        changed = dict(losses)
        for i, (logits, part) in enumerate(zip(step.outputs, step.parts, strict=True)):
            if not part.drawn_by:
                # With p = 0 for its own class a sample's loss would be infinite; it keeps the plain one.
                prior = torch.where(there[part.y.clamp_min(0)][:, None], log_p, 0.0)
                changed[i] = step.targets[i].losses(logits + prior, part.y).values
        return changed
