"""Corrections of what the loss sees of the outputs: the re-weighted softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, StepView
from consilience.core.correction import NO_TRAINING, Correction

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True)
class WSM(Correction):
    """Re-weighted softmax: the cross-entropy of the logits plus log p, p being the shares of the classes in what is learned.

    loss(z, y) = -log(p_y e^(z_y) / sum_c p_c e^(z_c)), z [B, C], with p from the label counts of the sources of this learn together; equal
    counts of all classes are plain training. A class that they lack has p = 0: no gradient reaches its logit. Samples of such a
    class (gathered, or replayed by another correction) and all other parts keep the plain loss. Prediction is left as it is.
    Legate, Caccia & Belilovsky 2023.
    """

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        return "values have no classes to weight; use finetune" if facts.kind == "value" else None

    def begin(self, start: Beginning) -> Begun:
        """log p [C], -inf for classes that these sources lack."""
        model, params, sources = start.model, start.params, start.sources
        counts = (
            torch.stack([torch.bincount(s.train.targets(), minlength=model.outputs) for s in sources])
            .sum(0)
            .double()
        )
        return Begun(params, {"log_p": (counts / counts.sum()).log()})

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        log_p = ctx.private["log_p"].to(step.theta)
        there = log_p > -torch.inf
        bent = dict(losses)
        for i, (z, part) in enumerate(zip(step.outputs, step.parts, strict=True)):
            if not part.drawn_by:
                prior = torch.where(there[part.y][:, None], log_p, 0.0)
                bent[i] = F.cross_entropy(z + prior, part.y, reduction="none")
        return bent
