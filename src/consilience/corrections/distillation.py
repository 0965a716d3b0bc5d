"""Distillation: the model as it was teaches the model as it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.contexts import Context, Learned, Memory, Row, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Statistics
from consilience.core.model import Model
from consilience.core.source import Source
from consilience.corrections.anatomy import anatomy, spread
from consilience.corrections.baselines import by_source
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


class Seen(NamedTuple):
    """The columns of one kind of targets that were trained under one task label (None: without labels)."""

    task: str | None
    classes: list[int]
    kind: str = "class"


def soft_targets(student: Tensor, teacher: Tensor, temperature: float, batch: Batch | None = None) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)) of outputs [B, C, *places].

    It is the mean over samples and their places. Samples that only pad a batch do not count, nor do places
    without a target. Hinton et al. 2015.

    >>> float(soft_targets(torch.ones(2, 3), torch.ones(2, 3), 2.0))
    0.0
    """
    target = (teacher / temperature).log_softmax(1)
    output = (student / temperature).log_softmax(1)
    # `batchmean` would count the rows that pad a batch.
    if output.dim() > 2 or (batch is not None and batch.w is not None):
        divergence = F.kl_div(output, target, reduction="none", log_target=True)
        each = divergence.sum(1)
        return temperature**2 * (each.mean() if batch is None else batch.mean(each))
    return temperature**2 * F.kl_div(output, target, reduction="batchmean", log_target=True)


def soft_labels(student: Tensor, teacher: Tensor, temperature: float, batch: Batch) -> Tensor:
    """Return T^2 KL between the Bernoulli distributions of labels, from outputs [B, L, *places].

    It is the mean over labels, samples and their places; places without a target do not count.
    """
    target = (teacher / temperature).sigmoid()
    # KL = cross-entropy - entropy, both of logits: no logarithm of a probability of 0.
    cross = F.binary_cross_entropy_with_logits(student / temperature, target, reduction="none")
    own = F.binary_cross_entropy_with_logits(teacher / temperature, target, reduction="none")
    return temperature**2 * batch.mean((cross - own).mean(1))


@dataclass(frozen=True)
class LwF(Correction):
    """Learning without forgetting: on this source's inputs, keep the outputs for the classes trained before.

    strength x T^2 KL(teacher || student) over the classes seen, or with `match="logits"` strength x MSE of
    their logits. The teacher is the model at the start of this visit. With task labels each earlier task has
    its own softmax; without, all seen classes share one (over the seen columns only). Each of several labels
    has a Bernoulli distribution of its own, and values have their MSE. All are means over places. The item of
    a source is the list of its classes, so the first source is plain training. Li & Hoiem 2016.
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
            raise ConsilienceError(f"`temperature` must be positive and finite, got {self.temperature}.")
        if self.match not in ("probabilities", "logits"):
            raise ConsilienceError(f"`match` must be probabilities or logits, got {self.match!r}.")

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> list[Seen] | None:
        """Return the columns seen, by kind, and by task where the model is given tasks; None without any."""
        names = {source.name for source in sources}
        groups: dict[tuple[str | None, str], set[int]] = {}
        for (_, source), item in by_source(memory):
            if source not in names:
                # Classes have no softmax with values or labels.
                key = item.meta["task"], item.meta["kind"]
                groups.setdefault(key, set()).update(item.meta["classes"])
        return [Seen(task, sorted(classes), kind) for (task, kind), classes in groups.items()] or None

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        losses: list[Tensor] = []
        own = [i for i, part in enumerate(step.parts) if not part.drawn_by]
        for i in own:
            part = step.parts[i]
            for task, classes, kind in ctx.recalled:
                columns = torch.tensor(classes, device=part.y.device)
                # The teacher knows nothing about the other columns.
                teacher = step.before(part.x, task).index_select(1, columns)
                student = step.answer(i, task).index_select(1, columns)
                losses.append(self._distance(student, teacher, part, kind))

        # One row for all tasks, so that an aggregator of objectives weighs the old ones as a whole.
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return [Row(total, self.strength / len(own))]

    def _distance(self, student: Tensor, teacher: Tensor, part: Batch, kind: str) -> Tensor:
        """Return how far outputs [B, k, *places] are from the teacher's, on average over places."""
        if kind == "value" or self.match == "logits":
            return part.mean((student - teacher).square().mean(1))
        if kind == "labels":
            return soft_labels(student, teacher, self.temperature, part)
        return soft_targets(student, teacher, self.temperature, part)

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        source = learned.source
        return Statistics({}, {"task": learned.task, "classes": list(source.classes), "kind": source.kind})


def has_features(model: Model) -> bool:
    """Whether a model knows what its features are."""
    try:
        getattr(model, "width", None)
    except ConsilienceError:
        return False
    return True


def nothing_to_keep(facts: ScheduleFacts, instead: str) -> str | None:
    """Return why no features are there that training would move, and what to do; None if there are."""
    if not facts.trains:
        return NO_TRAINING
    # Progressive networks have no parameters before their first task: their layers come with the tasks.
    if facts.model is None or not facts.model.init(torch.Generator().manual_seed(0))[0]:
        return None
    if not has_features(facts.model):
        return f"the model has no linear head whose inputs are features to keep; {instead}"
    parts = anatomy(facts.model)
    if not (parts.layers or parts.others):
        return f"the features are frozen, so that nothing can forget them; {instead}"
    return None


@dataclass(frozen=True)
class Stability(Correction):
    """The stability loss of Batch Model Consolidation: an expert's features stay near those of its base.

    strength x mean over samples and units of (psi_start(x) - psi(x))^2 on this source's own inputs, psi the
    input of the head, psi_start at the start of this visit. It acts from the first source on, whose start is
    the base that all experts have in common. Fostiropoulos, Zhu & Itti 2023, arXiv:2305.16484.
    """

    strength: float = 1.0

    neutral: ClassVar[dict[str, float]] = {"strength": 0.0}
    needs_boundaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative("Stability", strength=self.strength)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return nothing_to_keep(facts, "train without it")

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        distances = [
            part.mean((step.features_before(part.x, part.task) - step.features(i)).square().mean(1))
            for i, part in enumerate(step.parts)
            if not part.drawn_by
        ]
        # A mean over parts, so that the strength means the same for any number of sources.
        return [Row(torch.stack(distances).sum(), self.strength / len(distances))]


@dataclass(frozen=True)
class LessForgetting(Correction):
    """Less-forgetting learning: on this source's own inputs, keep the features; keep old rows of the head.

    The penalty is strength x (1/2) mean over samples of || psi_old(x) - psi(x) ||^2, psi the input of the
    head, psi_old at the start of this visit. With `freeze_head` the rows of a shared head for classes of
    earlier sources do not move, so that the features keep their meaning (rows of new classes do, and so do
    heads of new tasks). The first source is plain training. Jung et al. 2016.
    """

    strength: float = 0.1
    freeze_head: bool = True

    neutral: ClassVar[dict[str, float]] = {"strength": 0.0}
    needs_history: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative("LessForgetting", strength=self.strength)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return nothing_to_keep(facts, "use lwf")

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> list[int] | None:
        """Return the classes of earlier sources, or None where there are no earlier sources."""
        names = {source.name for source in sources}
        past = [item for (_, source), item in sorted(memory.items()) if source not in names]
        return sorted({c for item in past for c in item.meta["classes"]}) if past else None

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        distances = [
            0.5 * part.mean((step.features_before(part.x, part.task) - step.features(i)).square().sum(1))
            for i, part in enumerate(step.parts)
            if not part.drawn_by
        ]
        # A mean over parts, so that the strength means the same for any number of sources.
        return [Row(torch.stack(distances).sum(), self.strength / len(distances))]

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        """Return 0 for the rows of a shared head for classes of earlier sources."""
        assert ctx.model is not None
        shapes = dict(zip(step.layout.names, step.layout.shapes, strict=True))
        # Heads of tasks are not in the anatomy, whose head is the shared one.
        head = anatomy(ctx.model).head if self.freeze_head else None
        frozen = torch.tensor(ctx.recalled, device=step.theta.device)
        rows = {
            name: step.theta.new_ones(shapes[name]).index_fill(0, frozen, 0)
            for name in (head.entries if head else ())
            if name in shapes
        }
        return spread(step.layout, rows)

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        return Statistics({}, {"classes": list(learned.source.classes)})
