"""Soft sharing: a penalty that ties the networks of tasks, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from consilience.core.contexts import Context, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.model import Model
from consilience.core.optimiser import SGD
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.params import Layout
    from consilience.core.schedule import ScheduleFacts
    from consilience.core.training import Training

FORMS = ("l2", "trace_norm", "low_rank")
SMALL = 1e-6
"""Eigenvalues of a Gramian below this share of the largest count as zero."""


@dataclass(frozen=True)
class SoftSharing(Correction):
    """A network per task, tied by strength * sum over entries of R(M), M [T, n] the entry of each task.

    - "l2": R = 1/2 sum_t |m_t - mean m|^2 = 1 / (2 T) sum_{t < s} |m_t - m_s|^2 (Duong et al. 2015,
      doi:10.3115/v1/P15-2139; Evgeniou & Pontil 2004).
    - "trace_norm": R = |M|_*, the sum of singular values (Yang & Hospedales 2017, arXiv:1606.04038).
    - "low_rank": R = 1/2 sum_{i > rank} sigma_i^2, half the squared distance to the nearest M of that rank.

    The gradients are m_t - mean m, (M M^T)^(-1/2) M (with the pseudoinverse), and M without its `rank` first
    singular directions; they cost a T x T eigenvalue problem per entry. Tied are entries of different tasks
    that have one name but for the task and one shape; heads are not. Of networks of earlier tasks, or of
    other clients, the penalty draws the present ones towards them: an entry moves only where a loss reaches
    it. With strength 0 the networks are independent; under SGD lr x strength must be at most 1 for "l2" and
    "low_rank", where one step would take a network onto the others.

    Raises ConsilienceError for other forms, and for numbers out of range.
    """

    strength: float = 0.1
    form: Literal["l2", "trace_norm", "low_rank"] = "l2"
    rank: int = 1

    neutral: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    def __post_init__(self) -> None:
        non_negative(type(self).__name__, strength=self.strength)
        if self.form not in FORMS:
            raise ConsilienceError(f"`form` must be one of {', '.join(FORMS)}, got {self.form!r}.")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConsilienceError(f"`rank` must be a whole number from 1, got {self.rank!r}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        from consilience.models.networks import Networks

        if not facts.trains:
            return NO_TRAINING
        if facts.parts < 2 and not facts.shared_history:
            return (
                "it ties networks of several tasks, and agents train one task here and know no other; use "
                "multitask, continual or federated"
            )
        if facts.model is None:
            return None
        if not isinstance(facts.model, Networks) or facts.model.depth == len(facts.model.layers):
            return (
                "it ties networks of tasks, and the model has none; use models.multi_head(trunk, outputs, "
                "shared=0), or more shared layers"
            )
        return None

    def default_model(self, inputs: tuple[int, ...], outputs: int) -> Model | None:
        from consilience.models import fitting, multi_head

        return multi_head(fitting(inputs, outputs), outputs, shared=0)

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        steep = training.lr * self.strength
        if self.form != "trace_norm" and steep > 1 and isinstance(training.inner(), SGD):
            raise Refusal(
                f"lr x strength must be at most 1, where one step takes networks onto one another, got "
                f"{steep:.3g}; use a strength of at most {1 / training.lr:.3g}, or models.multi_head(trunk, "
                "outputs), whose tasks share the trunk."
            )
        return ctx.flat, None

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        assert ctx.model is not None
        total = step.theta.new_zeros(())
        for spans in twins(ctx.model, step.layout):
            rows = torch.stack([step.theta[span] for span in spans])
            total = total + self._size(rows)
        return self.strength * total

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float]:
        assert ctx.model is not None
        gradient = torch.zeros_like(step.theta)
        for spans in twins(ctx.model, step.layout):
            rows = torch.stack([step.theta[span] for span in spans])
            for span, own in zip(spans, self._slope(rows), strict=True):
                gradient[span] = own
        return gradient, self.strength

    def _size(self, rows: Tensor) -> Tensor:
        """Return R(M) for M [T, n]."""
        if self.form == "l2":
            squared: Tensor = 0.5 * (rows - rows.mean(0)).square().sum()
            return squared
        values: Tensor = torch.linalg.svdvals(rows)
        return values.sum() if self.form == "trace_norm" else 0.5 * values[self.rank :].square().sum()

    def _slope(self, rows: Tensor) -> Tensor:
        """Return the gradient of R at M [T, n]."""
        if self.form == "l2":
            return rows - rows.mean(0)
        # Of the small Gramian, in double precision: it has the squares of the singular values.
        values, vectors = torch.linalg.eigh((rows @ rows.T).double())
        if self.form == "trace_norm":
            kept = values > SMALL * values[-1]
            factors = torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
        else:
            # Ascending: the largest, which stay, are last.
            factors = torch.ones_like(values)
            factors[max(0, len(values) - self.rank) :] = 0.0
        slope: Tensor = ((vectors * factors) @ vectors.T).to(rows) @ rows
        return slope


def twins(model: Model, layout: Layout) -> list[list[slice]]:
    """Return where the entries of tasks lie that have one name but for the task, and one shape."""
    groups: dict[tuple[str, tuple[int, ...]], list[slice]] = {}
    for name, shape, start in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        task = model.task_of(name)
        # Outputs of different tasks mean different things.
        if task is not None and not name.startswith(("heads.", "hidden.", "stitch.")):
            groups.setdefault((name.replace(f".{task}.", ".", 1), shape), []).append(
                slice(start, start + prod(shape))
            )
    return [spans for spans in groups.values() if len(spans) > 1]
