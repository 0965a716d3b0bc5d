"""Balancing: how much the loss of each task counts in a step. The weights of m tasks sum to m."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.names import escaped

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts
    from consilience.core.training import Training

TINY = 1e-12
"""Added to losses that are divided by, or whose logarithm is taken."""


def own_parts(step: StepView) -> list[int]:
    """Return the indices of the parts that are tasks of the visit; those of corrections follow them."""
    return [i for i, part in enumerate(step.parts) if not part.drawn_by]


class Balancing(Correction):
    """A correction that multiplies the loss of each task of a step: L = sum_i w_i L_i / m."""

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if facts.parts < 2:
            return "it weighs the tasks of a step against each other, and a step has one here; use multitask"
        return None

    reads_losses: ClassVar[bool] = False
    """Whether the weights of a step depend on its own losses, which a micro-batch does not know."""

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        if self.reads_losses and training.accumulates:
            raise Refusal(
                f"{self.name} weighs tasks by the losses of a whole batch, and `accumulate` cuts it into "
                f"parts; use a larger `batch_size`, or dwa, gradnorm or uncertainty."
            )
        return ctx.flat, None

    def weights(self, step: StepView, ctx: Context) -> Tensor:
        """Return the weights [m] of the tasks in this step, without gradient. Default: those of the trace."""
        return ctx.trace["weights"]

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        weights = self.weights(step, ctx)
        return losses | {i: losses[i] * weights[i] for i in own_parts(step)}


@dataclass(frozen=True)
class TaskWeights(Balancing):
    """Fixed weights: w_i = m a_i / sum_j a_j, a_i given by the name of the source, or its examples.

    `weights` maps names of sources to numbers > 0; a source that it does not name has 1. "size" is the
    number of its training examples, so that every example counts alike. Equal ones are plain training.
    Raises ConsilienceError for weights that are not positive, and for names of no source.
    """

    given: tuple[tuple[str, float], ...] | Literal["size"] = "size"

    def __post_init__(self) -> None:
        if isinstance(self.given, str):
            if self.given != "size":
                raise ConsilienceError(
                    f'`weights` must be "size" or numbers by the name of a source, got {self.given!r}.'
                )
        elif not all(0 < weight < float("inf") for _, weight in self.given):
            raise ConsilienceError(f"`weights` must be positive and finite, got {dict(self.given)}.")

    def begin(self, start: Beginning) -> Begun:
        """Return the private weights [m]."""
        names = [source.name for source in start.sources]
        if self.given == "size":
            amounts = [float(len(source.train)) for source in start.sources]
        else:
            unknown = [name for name, _ in self.given if name not in names]
            if unknown:
                raise ConsilienceError(
                    f"`weights` must be of {', '.join(names)}, got {', '.join(map(repr, unknown))}."
                )
            amounts = [dict(self.given).get(name, 1.0) for name in names]
        share = torch.tensor(amounts, dtype=torch.float64)
        return Begun(start.params, {"weights": len(names) * share / share.sum()})

    def weights(self, step: StepView, ctx: Context) -> Tensor:
        return ctx.private["weights"].to(step.theta)


@dataclass(frozen=True)
class Uncertainty(Balancing):
    """Uncertainty weighting: L = sum_i (a_i e^(-s_i) L_i + s_i / 2) / m with learned s_i = log sigma_i^2.

    a_i is 1/2 for values (a Gaussian's likelihood) and 1 for classes and labels; `form` takes one of the two
    for all. The entries `uncertainty/SOURCE` start at 0 and train with the rest, at the learning rate of
    the run; e^(s_i / 2) is the noise that the model finds in task i. Kendall, Gal & Cipolla 2018,
    arXiv:1705.07115.
    """

    form: Literal["by kind", "regression", "classification"] = "by kind"

    def __post_init__(self) -> None:
        forms = ("by kind", "regression", "classification")
        if self.form not in forms:
            raise ConsilienceError(f"`form` must be one of {', '.join(forms)}, got {self.form!r}.")

    def begin(self, start: Beginning) -> Begun:
        """Add the entries of sources that have none."""
        like = next(p for p in start.params.values() if p.is_floating_point())
        fresh = {entry(source.name): like.new_zeros(()) for source in start.sources}
        return Begun({**fresh, **start.params})

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        changed = dict(losses)
        for i in own_parts(step):
            values = step.targets[i].kind == "value" if self.form == "by kind" else self.form == "regression"
            spread = step.entries[entry(step.parts[i].source)]
            changed[i] = (0.5 if values else 1.0) * (-spread).exp() * losses[i] + spread / 2
        return changed


def entry(source: str) -> str:
    """Return the name of the entry that holds a source's log variance."""
    return f"uncertainty/{escaped(source, '/')}"


@dataclass(frozen=True)
class DWA(Balancing):
    """Dynamic weight average: w_i = m softmax_i(r_i / T) with r_i = L_i(e - 1) / L_i(e - 2) over epochs e.

    L_i(e) is the mean training loss of task i in epoch e. The first two epochs have weights 1, and equal
    rates give equal weights. A visit needs three epochs to act, or several visits to the same tasks. Liu,
    Johns & Davison 2019, arXiv:1803.10704.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConsilienceError(f"`temperature` must be positive and finite, got {self.temperature!r}.")

    def trace_init(self, ctx: Context) -> dict[str, Tensor]:
        """Return weights [m], the sum and count of this epoch's losses [m], and the means before it [m]."""
        zeros = ctx.theta.new_zeros(len(ctx.parts))
        names = ("sum", "seen", "last", "before")
        return {
            "weights": zeros + 1,
            **{name: zeros.clone() for name in names},
            "epochs": zeros.new_zeros(()),
        }

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        trace = dict(ctx.trace)
        count = len(trace["weights"])
        losses = step.losses()[:count]
        # A step without targets of a task says nothing of it.
        trace["sum"] = trace["sum"] + torch.where(losses.isnan(), 0, losses)
        trace["seen"] = trace["seen"] + ~losses.isnan()
        (_, index), (_, steps) = step.clock, step.horizon
        if index != steps - 1:
            return trace

        # At the end of an epoch.
        mean = torch.where(trace["seen"] > 0, trace["sum"] / trace["seen"].clamp_min(1), trace["last"])
        trace["before"], trace["last"] = trace["last"], mean
        trace["sum"] = trace["seen"] = torch.zeros_like(trace["sum"])
        trace["epochs"] = trace["epochs"] + 1
        rates = trace["last"] / (trace["before"] + TINY)
        known = trace["epochs"] >= 2
        trace["weights"] = torch.where(known, count * (rates / self.temperature).softmax(0), 1.0)
        return trace


@dataclass(frozen=True)
class GradNorm(Balancing):
    """GradNorm: weights w that bring w_i |g_i| to mean_j(w_j |g_j|) r_i^alpha.

    r_i = l_i / mean_j l_j with l_i = L_i / L_i(first step), the inverse rate of training. After each step w
    moves against the gradient of sum_i |w_i |g_i| - target_i| with the targets held fixed, and is scaled to
    sum to m. |g_i| is taken over all entries that the tasks share; the paper takes the last shared layer.
    Each task has a backward pass of its own. Chen et al. 2018, arXiv:1711.02257.
    """

    alpha: float = 1.5
    lr: float = 0.025

    needs_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < float("inf") and 0 < self.lr < float("inf")):
            raise ConsilienceError(f"`alpha` must be >= 0 and `lr` positive, got {self.alpha} and {self.lr}.")

    def trace_init(self, ctx: Context) -> dict[str, Tensor]:
        """Return weights [m] and the losses of the first step [m], 0 before it."""
        ones = ctx.theta.new_ones(len(ctx.parts))
        return {"weights": ones, "first": torch.zeros_like(ones)}

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        # A step that is left out for its numbers ("fp16") says nothing.
        if step.norms is None:
            return ctx.trace
        weights, losses = ctx.trace["weights"], step.losses()[: len(ctx.trace["weights"])]
        # Nor does a step without targets of a task say anything of it.
        there = ~losses.isnan()
        losses = torch.where(there, losses, 0)
        first = torch.where(ctx.trace["first"] == 0, losses, ctx.trace["first"])
        norms = torch.where(there, step.norms[: len(weights)], 0)
        rates = losses / (first + TINY)
        target = norms.sum() / there.sum() * (rates / (rates.sum() / there.sum() + TINY)) ** self.alpha

        # Weights stay positive: at 0 a task would be lost, since its weighted gradient says no more.
        moved = weights - self.lr * (norms - target).sign() * norms / weights
        moved = torch.where(there, moved.clamp_min(1e-3), weights)
        return {"weights": len(moved) * moved / moved.sum(), "first": first}


@dataclass(frozen=True)
class FAMO(Balancing):
    """FAMO: gradient of sum_i c_i log L_i, with c = softmax(xi) so that all losses fall at the same rate.

    w_i is proportional to c_i / L_i, and sum_i w_i = m. After each step xi moves by Adam against J(c)^T d,
    where d_i = log L_i(before) - log L_i(now), J is the Jacobian of the softmax, and `decay` draws xi to 0.
    The losses of two steps in turn are compared, which are of two batches: the paper evaluates one batch
    twice, at the cost of a forward pass. Liu, Feng, Stone & Liu 2023, arXiv:2306.03792.
    """

    lr: float = 0.025
    decay: float = 0.01

    reads_losses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.lr < float("inf") and 0 <= self.decay < float("inf")):
            raise ConsilienceError(f"`lr` must be positive and `decay` >= 0, got {self.lr} and {self.decay}.")

    def trace_init(self, ctx: Context) -> dict[str, Tensor]:
        """Return xi [m], Adam's two moments of it [m], the last log losses and their count [m], and steps."""
        zeros = ctx.theta.new_zeros(len(ctx.parts))
        names = ("xi", "mean", "square", "last", "seen")
        return {**{name: zeros.clone() for name in names}, "steps": zeros.new_zeros(())}

    def weights(self, step: StepView, ctx: Context) -> Tensor:
        count = len(ctx.trace["xi"])
        losses = step.losses()[:count]
        each = torch.where(losses.isnan(), 0, ctx.trace["xi"].softmax(0) / (losses + TINY))
        return count * each / each.sum()

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        trace = ctx.trace
        losses = step.losses()[: len(trace["xi"])]
        there = ~losses.isnan()
        logs = torch.where(there, (losses + TINY).log(), trace["last"])
        share = trace["xi"].softmax(0)
        fell = torch.where((trace["seen"] > 0) & there, trace["last"] - logs, 0.0)
        slope = share * (fell - (share * fell).sum()) + self.decay * trace["xi"]

        steps = trace["steps"] + 1
        mean = torch.lerp(trace["mean"], slope, 0.1)
        square = torch.lerp(trace["square"], slope.square(), 0.001)
        size = (square / (1 - 0.999**steps)).sqrt() + 1e-8
        moved = trace["xi"] - self.lr * mean / (1 - 0.9**steps) / size
        held = {"last": logs, "seen": trace["seen"] + there, "steps": steps}
        return {"xi": moved, "mean": mean, "square": square, **held}


@dataclass(frozen=True)
class WorstTask(Balancing):
    """Min-max: each step trains the task with the largest loss alone, min_theta max_i L_i; w_i = m or 0.

    Losses must have one scale: compare it with `ScaleInvariant`, which needs none. Ties go to the first.
    """

    reads_losses: ClassVar[bool] = True

    def weights(self, step: StepView, ctx: Context) -> Tensor:
        losses = step.losses()[: len(own_parts(step))].nan_to_num(nan=-torch.inf, posinf=torch.inf)
        worst = torch.nn.functional.one_hot(losses.argmax(), len(losses))
        return worst.to(losses) * len(losses)


@dataclass(frozen=True)
class ScaleInvariant(Balancing):
    """Scale-invariant losses: L = sum_i log L_i / m, whose gradient is that of L_i / L_i.

    The weights 1 / L_i do not sum to m: that a loss is measured in other units changes nothing, but losses
    that are all small make large steps.
    """

    reads_losses: ClassVar[bool] = True

    def weights(self, step: StepView, ctx: Context) -> Tensor:
        losses = step.losses()[: len(own_parts(step))]
        return torch.where(losses.isnan(), 0, 1 / (losses + TINY))
