"""Deep supervision: earlier answers of a model have losses of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from consilience.core.contexts import Context, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True)
class DeepSupervision(Correction):
    """L_t = l(o_t) + weight sum_s l(o_t^s): the loss of a task also for its earlier answers o_t^s.

    The model gives them behind its answers (`Model.earlier`), as `models.pad_net`, `models.mti_net` and
    `models.joint` do. Without it they are trained only as far as the answers depend on them. Xu, Ouyang, Wang
    & Sebe 2018 (PAD-Net), arXiv:1805.04409; Vandenhende, Georgoulis & Van Gool 2020 (MTI-Net),
    arXiv:2001.06902.
    """

    weight: float = 1.0

    neutral: ClassVar[Mapping[str, Any]] = {"weight": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ConsilienceError(f"`weight` must be >= 0 and finite, got {self.weight!r}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if facts.model is not None and not facts.model.earlier:
            return (
                "the model has no earlier answers; use models.pad_net or models.mti_net, or "
                "models.joint(module, widths, earlier=...)"
            )
        return None

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        assert ctx.model is not None
        earlier = ctx.model.earlier
        columns = ctx.model.outputs // (1 + earlier)
        # In the loss of the task itself, so that its weight and its row in an aggregator cover all answers.
        changed = dict(losses)
        for i, (part, target) in enumerate(zip(step.parts, step.targets, strict=True)):
            for stage in range(1, earlier + 1):
                out = step.raw[i][:, stage * columns : (stage + 1) * columns]
                changed[i] = changed[i] + self.weight * target.losses(out, part.y).values
        return changed
