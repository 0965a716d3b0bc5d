"""Distillation: the model as it was teaches the model as it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.contexts import Context, Learned, Memory, Row, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Statistics
from consilience.core.source import Source
from consilience.corrections.anatomy import anatomy, spread
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


def soft_targets(student: Tensor, teacher: Tensor, temperature: float, batch: Batch | None = None) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the samples of the batch that count. Hinton et al. 2015.

    >>> float(soft_targets(torch.ones(2, 3), torch.ones(2, 3), 2.0))
    0.0
    """
    t = (teacher / temperature).log_softmax(1)
    s = (student / temperature).log_softmax(1)
    if batch is not None and batch.w is not None:
        return temperature**2 * batch.mean(F.kl_div(s, t, reduction="none", log_target=True).sum(1))
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class LwF(Correction):
    """Learning without forgetting: on this source's own inputs, keep the outputs on the classes learned before.

    strength x T^2 KL(teacher || student) over the classes seen, or `match="logits"`: strength x MSE of their logits. The
    teacher is the model at the start of this learn. With task labels each earlier task has its own softmax; without, all
    seen classes share one (over the seen columns only). It leaves which classes it saw, so the first source is plain training. Li & Hoiem 2016.
    """

    strength: float = 1.0
    temperature: float = 2.0
    match: Literal["probabilities", "logits"] = "probabilities"

    neutral: ClassVar[dict[str, float]] = {"strength": 0.0}
    needs_history: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative("LwF", strength=self.strength)
        if not 0 < self.temperature < float("inf"):
            raise ConsilienceError(
                f"`temperature` should be positive and finite. Found `temperature = {self.temperature}`."
            )
        if self.match not in ("probabilities", "logits"):
            raise ConsilienceError(
                f"`match` should be probabilities or logits. Found `match = {self.match!r}`."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.kind == "value" and self.match == "probabilities":
            return 'values have no class probabilities to keep; use `match="logits"`'
        return None

    def recall(
        self, memory: Memory, sources: tuple[Source, ...]
    ) -> list[tuple[str | None, list[int]]] | None:
        """(task, classes) of what was seen: one group for each task where the model is told tasks, else one for all."""
        now = {s.name for s in sources}
        groups: dict[str | None, set[int]] = {}
        for (_, source), item in sorted(memory.items(), key=lambda kv: (kv[0][1], kv[0][0])):
            if source not in now:
                groups.setdefault(item.meta["task"], set()).update(item.meta["classes"])
        return [(task, sorted(classes)) for task, classes in groups.items()] or None

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        total: Tensor | None = None
        new = [i for i, p in enumerate(step.parts) if not p.drawn_by]
        for i in new:
            part = step.parts[i]
            x = part.x
            for task, classes in ctx.recalled:
                columns = torch.tensor(classes, device=x.device)
                teacher = step.before(x, task).index_select(1, columns)
                student = step.answer(i, task).index_select(1, columns)
                if self.match == "probabilities":
                    loss = soft_targets(student, teacher, self.temperature, part)
                else:
                    loss = part.mean((student - teacher).square().mean(1))
                total = loss if total is None else total + loss
        assert total is not None
        return [Row(total, self.strength / len(new))]

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        return Statistics({}, {"task": learned.task, "classes": list(learned.source.classes)})


@dataclass(frozen=True)
class LessForgetting(Correction):
    """Less-forgetting learning: on this source's own inputs, keep the features and the head's rows of the classes learned before.

    strength x (1/2) mean over samples of || psi_old(x) - psi(x) ||^2, psi the input of the head, psi_old at the start of this
    learn. With `freeze_head` the rows of a shared head for classes of earlier sources do not move, so that the features keep their
    meaning (rows of new classes do, and so do heads of new tasks). The first source is plain training. Jung et al. 2016.
    """

    strength: float = 0.1
    freeze_head: bool = True

    neutral: ClassVar[dict[str, float]] = {"strength": 0.0}
    needs_history: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative("LessForgetting", strength=self.strength)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        grows = (
            facts.model is None or not facts.model.init(torch.Generator().manual_seed(0))[0]
        )  # its layers come with the tasks
        if not grows and not (anatomy(facts.model).layers or anatomy(facts.model).others):
            return "the features are frozen, so that nothing can forget them; use lwf"
        return None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> list[int] | None:
        """The classes of earlier sources, or None where there is none."""
        now = {s.name for s in sources}
        past = [item for (_, source), item in sorted(memory.items()) if source not in now]
        return sorted({c for item in past for c in item.meta["classes"]}) if past else None

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        new = [i for i, p in enumerate(step.parts) if not p.drawn_by]
        total = torch.stack(
            [
                0.5 * p.mean((step.features_before(p.x, p.task) - step.features(i)).square().sum(1))
                for i, p in enumerate(step.parts)
                if not p.drawn_by
            ]
        ).sum()
        return [Row(total, self.strength / len(new))]

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        """0 for the rows of a shared head that earlier sources made."""
        assert ctx.model is not None
        shapes = dict(zip(step.layout.names, step.layout.shapes, strict=True))
        head = [n for n in anatomy(ctx.model).head or () if n in shapes] if self.freeze_head else []
        rows = torch.tensor(ctx.recalled, device=step.theta.device)
        return spread(step.layout, {n: step.theta.new_ones(shapes[n]).index_fill(0, rows, 0) for n in head})

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        return Statistics({}, {"classes": list(learned.source.classes)})
