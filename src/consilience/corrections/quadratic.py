"""Quadratic penalties, at one price for any number of sources: EWC, SI, MAS, L2 and the proximal term."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from consilience.core.contexts import Context, Learned, Memory, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Statistics
from consilience.core.optimiser import SGD
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.corrections.fisher import check_labels, check_samples, fisher, refuse_all, sensitivity

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


def non_negative(owner: str, **values: float) -> None:
    """Raise ConsilienceError for hyperparameters that are negative or not finite."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ConsilienceError(f"`{name}` of {owner} must be >= 0 and finite, got {value}.")


@dataclass(frozen=True)
class Quadratic(Correction):
    """(strength / 2) sum_k (theta - theta_k)^T diag(P_k) (theta - theta_k), up to a constant.

    The statistics of sources add, precision P = sum P_k and shift s = sum P_k theta_k, so a step costs the
    same for any number of sources. A source that is visited again leaves out its own summary. Under SGD the
    precision is capped at 1 / (lr x strength), with a warning: one step takes such an entry back to its
    centre, and with more precision it would overshoot and diverge. Subclasses define the precision.
    """

    strength: float = 1.0

    flat: ClassVar[tuple[str, ...]] = ("precision", "shift")
    neutral: ClassVar[dict[str, float]] = {"strength": 0.0}
    needs_history: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative(type(self).__name__, strength=self.strength)

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        precision, shift = ctx.flat["precision"], ctx.flat["shift"]
        return self.strength * (
            0.5 * torch.dot(precision * step.theta, step.theta) - torch.dot(shift, step.theta)
        )

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float]:
        # In place on the new product: a step of a large model should allocate one vector.
        return torch.mul(ctx.flat["precision"], step.theta).sub_(ctx.flat["shift"]), self.strength

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """Cap the precision at 1 / (lr x strength) for SGD, around the same centre; lr is that of each entry.

        A larger precision would overshoot, and above 2 / (lr x strength) training diverges.
        """
        if "precision" not in ctx.flat or not isinstance(training.inner(), SGD):
            return ctx.flat, None
        precision, rates = ctx.flat["precision"], None
        if training.rates:
            assert ctx.layout is not None
            rates = training.factors(ctx.layout)
        steep = precision if rates is None else precision * rates

        # Schedules only lower the rate, so that the first step is the longest.
        most = 1 / (training.lr * self.strength)
        over = int((steep > most).sum())
        if not over:
            return ctx.flat, None

        # One factor on precision and shift keeps the centre, shift / precision, where it is.
        factor = torch.where(steep > most, most / steep.clamp_min(most), 1.0)
        return {"precision": precision * factor, "shift": ctx.flat["shift"] * factor}, (
            f"lr x strength x precision is up to {float(steep.max()) / most:.3g}, and above 2 training "
            f"diverges; {over} of {len(precision)} entries are capped at 1"
        )

    @staticmethod
    def statistics(precision: Params, params: Params) -> Statistics:
        """Return the precision and the shift of one source."""
        tensors = {f"precision/{name}": p for name, p in precision.items()}
        return Statistics(tensors | {f"shift/{name}": p * params[name] for name, p in precision.items()})


@dataclass(frozen=True)
class EWC(Quadratic):
    """Elastic weight consolidation: the precision is the diagonal Fisher information, exact, per sample.

    F = (1/N) sum_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2]; `labels="model"` samples y from the model's
    own prediction (one draw per sample), "all" takes the expectation over all classes, "data" uses the true
    labels (the empirical Fisher). "batches" is what several libraries compute instead: the mean over batches
    of 32 of the square of the batch's mean gradient at the true labels, which is not the Fisher and about 32
    times smaller. `samples` bounds the number of examples (None: all). Kirkpatrick et al. 2017; penalties of
    several sources add (Huszár 2018).
    """

    strength: float = 10.0
    labels: Literal["model", "all", "data", "batches"] = "model"
    samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self.labels)
        check_samples(self.samples)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return refuse_all(self.labels, facts.places)

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        return self.statistics(fisher(learned, self.labels, self.samples), learned.trainable)


@dataclass(frozen=True)
class Running(Quadratic):
    """(strength / 2) (theta - theta_0)^T diag(sum_k P_k) (theta - theta_0): precisions add around one centre.

    theta_0 is where this visit begins: the end of the latest source in a stream, the received parameters for
    a client.
    """

    flat: ClassVar[tuple[str, ...]] = ("precision",)

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        if "precision" in ctx.flat and ctx.start is not None:
            # With this shift the minimum of the penalty is where the visit begins.
            ctx = replace(ctx, flat={**ctx.flat, "shift": ctx.flat["precision"] * ctx.start})
        return super().prepare_step(ctx, training)

    @staticmethod
    def precision(values: Params, **meta: Any) -> Statistics:
        """Return the precision of one source."""
        return Statistics({f"precision/{name}": p for name, p in values.items()}, meta)


@dataclass(frozen=True)
class SI(Running):
    """Synaptic intelligence: the precision is each parameter's share of the fall of the loss, along the path.

    Omega = max(0, sum_k w_k / ((theta_end - theta_start)^2 + xi)), w_k = sum over the steps of source k of
    -g . d theta, with g the gradient of the task's own loss, over all its visits; the penalty is
    strength x Omega (theta - theta_0)^2 around the end of the latest source. Zenke et al. 2017.
    """

    strength: float = 1.0
    xi: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.xi < float("inf"):
            raise ConsilienceError(f"`xi` must be positive and finite, got {self.xi}.")

    def trace_init(self, ctx: Context) -> dict[str, Tensor]:
        return {"path": torch.zeros_like(ctx.theta), "start": ctx.theta.clone()}

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        return {**ctx.trace, "path": torch.addcmul(ctx.trace["path"], grad, delta, value=-1)}

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        end = learned.trainable
        path, start = learned.layout.split(ctx.trace["path"]), learned.layout.split(ctx.trace["start"])
        moved = {name: end[name] - start[name] for name in end}
        # The penalty of the paper has no factor 1/2, hence twice its importance.
        return self.precision(
            {name: 2 * learned.share * path[name] / (moved[name].square() + self.xi) for name in end}
        )

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Statistics | None:
        """Return the sum over all other sources, at least 0."""
        total = super().recall(memory, sources)
        return total and Statistics({name: p.clamp(min=0) for name, p in total.tensors.items()})


@dataclass(frozen=True)
class Proximal(Correction):
    """FedProx's term (mu / 2) ||theta - theta_start||^2: the gradient gains mu (theta - theta_start).

    theta_start are the parameters at the start of this visit: the server's in the federated setting, those
    after the last source in the continual one. The first step of a visit is the same for any mu. Li et al.
    2020.
    """

    mu: float = 0.1

    neutral: ClassVar[dict[str, float]] = {"mu": 0.0}

    def __post_init__(self) -> None:
        non_negative("Proximal", mu=self.mu)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return None if facts.trains else NO_TRAINING

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        moved = step.theta - step.start
        return 0.5 * self.mu * torch.dot(moved, moved)

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float]:
        return (step.theta - step.start).mul_(self.mu), 1.0


@dataclass(frozen=True)
class OnlineEWC(Running, EWC):
    """Online EWC: one running precision that decays, F <- gamma F + F_k, around the latest parameters.

    (strength / 2) sum_k gamma^(age of k) F_k (theta - theta_0)^2, theta_0 where this visit begins. Each visit
    comes one after the latest that its agent has received, or made: ages count visits in a stream, and rounds
    in a federation. gamma = 1 keeps all precisions and moves only their centre. Schwarz et al. 2018; Chaudhry
    et al. 2018 (EWC++).
    """

    # Repeated, because `Running` comes before `EWC` in the order of bases and would give 1.
    strength: float = 10.0
    gamma: float = 0.9

    needs_boundaries: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise ConsilienceError(f"`gamma` must be in [0, 1], got {self.gamma}.")

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        # Not this agent's count of visits alone: clients would all be at their first, whatever the round.
        order = learned.order if ctx.recalled is None else max(learned.order, 1 + ctx.recalled.meta["latest"])
        return self.precision(fisher(learned, self.labels, self.samples), order=order)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Statistics | None:
        """Return the sum of the decayed precisions of all other sources."""
        names = {source.name for source in sources}
        past = [(sender, source) for sender, source in memory if source not in names]
        if not past:
            return None

        # From the oldest visit on: the order of a sum of floats is part of its value.
        order = {key: memory[key].meta["order"] for key in past}
        # Equal ages occur where senders differ; names decide then.
        past.sort(key=lambda key: (order[key], key[1], key[0]))
        latest = order[past[-1]]
        precision: Params = {}
        for key in past:
            for name, p in memory[key].group("precision").items():
                decayed = p * self.gamma ** (latest - order[key])
                precision[name] = (
                    precision[name] + decayed.to(precision[name].device) if name in precision else decayed
                )
        return self.precision(precision, latest=max(item.meta["order"] for item in memory.values()))


@dataclass(frozen=True)
class MAS(Running):
    """Memory aware synapses: the precision is how much the outputs react, per sample.

    The penalty is strength x sum_k Omega_k (theta - theta_0)^2, Omega_k = (1/N) sum_x |d ||f(x)||^2 / d
    theta| at the end of source k, around the end of the latest one. Aljundi et al. 2018.
    """

    strength: float = 1.0
    samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self.samples)

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        omega = sensitivity(learned, self.samples)
        # As for `SI`: the penalty of the paper has no factor 1/2.
        return self.precision({name: 2 * o for name, o in omega.items()})


@dataclass(frozen=True)
class L2SP(Quadratic):
    """L2 towards the end of every earlier source: the penalty is (strength / 2) sum_k ||theta - theta_k||^2.

    The precision is 1 for all entries. Li, Grandvalet & Davoine 2018.
    """

    strength: float = 0.01

    def summarise(self, learned: Learned, ctx: Context) -> Statistics:
        ones = {name: torch.ones_like(p) for name, p in learned.trainable.items()}
        return self.statistics(ones, learned.trainable)
