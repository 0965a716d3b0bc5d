"""Consolidators: how messages enter an agent: weights are combined, statistics solved, experts banked.

Signatures import no torch.
"""

# Functions import inside, so that the command line can list them without torch.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from consilience import lazy
from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from consilience.consolidators.arrivals import OPCM as OPCM
    from consilience.consolidators.arrivals import RunningArithmetic as RunningArithmetic
    from consilience.consolidators.bank import Experts as Experts
    from consilience.consolidators.distillation import Distillation as Distillation
    from consilience.consolidators.dynamic import Dynamic as Dynamic
    from consilience.consolidators.ex_model import ExModelDistillation as ExModelDistillation
    from consilience.consolidators.merging import FisherSpace as FisherSpace
    from consilience.consolidators.merging import RegMean as RegMean
    from consilience.consolidators.normalised import Normalised as Normalised
    from consilience.consolidators.statistics import ClosedForm as ClosedForm
    from consilience.consolidators.teachers import TeacherDistillation as TeacherDistillation
    from consilience.core.synthetic import Maker
    from consilience.core.weight_space import WeightSpace as WeightSpace
else:
    __getattr__, __dir__ = lazy.attach(__name__)


def weight_space(aggregator: Any = None, outer: Any = None, lr: float = 1.0) -> WeightSpace:
    """Combine received parameters by an aggregator, then take a step of an outer optimiser.

    Args:
        aggregator: of parameters (None: the weighted mean).
        outer: outer optimiser (None: SGD, which with lr 1 takes the aggregate as it is).
        lr: outer learning rate.
    """
    from consilience.core.weight_space import WeightSpace

    return WeightSpace(aggregator, outer, lr)


def normalised_space(aggregator: Any = None, outer: Any = None, lr: float = 1.0) -> Normalised:
    """Combine changes per local step: divide each by its sender's steps, multiply by their mean (FedNova).

    Args:
        aggregator: of parameters (None: the weighted mean).
        outer: outer optimiser (None: SGD, which with lr 1 takes the aggregate as it is).
        lr: outer learning rate.
    """
    from consilience.consolidators.normalised import Normalised

    return Normalised(aggregator, outer, lr)


def dynamic_space(aggregator: Any = None) -> Dynamic:
    """Take the mean of received parameters minus the sum of what clients moved by so far (FedDyn).

    Args:
        aggregator: of parameters (None: the weighted mean).
    """
    from consilience.consolidators.dynamic import Dynamic

    return Dynamic(aggregator)


def fisher_space(outer: Any = None, lr: float = 1.0, prior: float = 0.0) -> FisherSpace:
    """Combine received parameters by the Fisher information that comes with them, entry by entry.

    Args:
        outer: outer optimiser (None: SGD, which with lr 1 takes the aggregate as it is).
        lr: outer learning rate.
        prior: the weight of the receiver's own parameters, in the units of the Fisher information.
    """
    from consilience.consolidators.merging import FisherSpace

    return FisherSpace(None, outer, lr, prior)


def regression_space(outer: Any = None, lr: float = 1.0, alpha: float = 0.9, ridge: float = 1e-6) -> RegMean:
    """Combine received layers by least squares on the second moments of their inputs (RegMean).

    Args:
        outer: outer optimiser (None: SGD, which with lr 1 takes the aggregate as it is).
        lr: outer learning rate.
        alpha: factor of the off-diagonals of the moments, in [0, 1].
        ridge: how strongly to hold the experts' mean where inputs are missing, as a share of the mean
            diagonal;
            0: pseudo-inverse.
    """
    from consilience.consolidators.merging import RegMean

    return RegMean(None, outer, lr, alpha, ridge)


def running_arithmetic(coefficient: float = 1.0, of: Literal["mean", "sum"] = "mean") -> RunningArithmetic:
    """Merge experts one by one by a running mean, or by task arithmetic on it or on the sum of changes.

    Args:
        coefficient: factor of the mean (or sum) of the task vectors; 1 gives the mean of the models.
        of: mean or sum.
    """
    from consilience.consolidators.arrivals import RunningArithmetic

    return RunningArithmetic(coefficient=coefficient, of=of)


def orthogonal_projection(threshold: float = 0.5) -> OPCM:
    """Merge experts one by one, each projected off the directions of those merged before (OPCM).

    Args:
        threshold: share of the merged singular values whose block no new expert changes, in [0, 1].
    """
    from consilience.consolidators.arrivals import OPCM

    return OPCM(threshold=threshold)


def closed_form(
    strength: float = 0.01, average: bool = False, normalise: bool = False, temperature: float = 1.0
) -> ClosedForm:
    """Solve a ridge head from the sum of all agents' statistics.

    Args:
        strength: lambda of the ridge.
        average: whether the objective is the mean loss, so that lambda counts as lambda x samples.
        normalise: divide each class's column by its norm, as Fed3R does; it changes the argmax.
        temperature: divides the head, which leaves the argmax and makes the softmax sharper.
    """
    from consilience.consolidators.statistics import ClosedForm

    return ClosedForm(strength, average, normalise, temperature)


def ensemble_distillation(
    unlabelled: Any,
    steps: int = 100,
    lr: float = 0.001,
    batch_size: int = 32,
    temperature: float = 1.0,
    of: Literal["logits", "probabilities"] = "logits",
    optimiser: Literal["adam", "sgd"] = "adam",
) -> Distillation:
    """Average the received models, then train the average on their mean outputs for `unlabelled` (FedDF).

    Args:
        unlabelled: inputs [N, ...] of the receiver: a tensor, an array, or a source, whose labels are not
            read.
        steps: gradient steps per exchange; 0 is the average.
        lr: learning rate of these steps.
        batch_size: inputs per step.
        temperature: divides logits.
        of: whether logits or probabilities are averaged.
        optimiser: adam or sgd, for these steps.
    """
    from consilience.consolidators.distillation import Distillation
    from consilience.core.source import inputs_of

    return Distillation(
        unlabelled=inputs_of(unlabelled, "unlabelled"),
        steps=steps,
        rate=lr,
        batch_size=batch_size,
        temperature=temperature,
        of=of,
        optimiser=optimiser,
    )


def exmodel(
    maker: Maker,
    size: int = 5000,
    steps: int = 1000,
    lr: float = 0.001,
    weight_ce: float = 1.0,
    normalise: Literal["mean", "standard", "samples"] | None = "mean",
    targets: Literal["document", "both"] = "document",
    augment: Any = None,
) -> ExModelDistillation:
    """Distil received experts, one by one, into one model, on samples that a maker makes of them.

    The class has the size of batches and the optimiser too.

    Args:
        maker: who makes the samples, one of `consilience.memory`, such as `auxiliary(data)`.
        size: the samples in the memory, for all experts so far.
        steps: gradient steps per exchange.
        lr: learning rate of these steps.
        weight_ce: weight of the cross-entropy next to the squared error of the logits.
        normalise: what is taken off the logits of teachers: per sample their mean, also their scale
            ("standard"), or also mean and scale of each class over the samples ("samples"); or nothing.
        targets: the units of the teacher that knows a sample's class (the paper's Eq. 9), or those of both.
        augment: random views of the samples in training, as of a source.
    """
    from consilience.consolidators.ex_model import ExModelDistillation

    return ExModelDistillation(
        maker=maker,
        size=size,
        steps=steps,
        lr=lr,
        weight_ce=weight_ce,
        normalise=normalise,
        targets=targets,
        augment=augment,
    )


def teacher_distillation(
    unlabelled: Any,
    steps: int = 2000,
    lr: float = 0.003,
    batch_size: int = 64,
    temperature: float = 2.0,
    of: Literal["probabilities", "logits"] = "probabilities",
    features: float = 0.0,
    calibrate: Literal["scale"] | None = None,
    temperatures: Mapping[str, float] | None = None,
    augment: Any = None,
    lr_schedule: Literal["constant", "cosine"] = "cosine",
    optimiser: Literal["adam", "sgd"] = "adam",
) -> TeacherDistillation:
    """Distil the mean answer of received models, of any architecture, into the receiver's own.

    Args:
        unlabelled, steps, lr, batch_size, temperature, of, features: as of `methods.distil`.
        calibrate, temperatures, augment, lr_schedule, optimiser: as of `methods.distil`.
    """
    from consilience.consolidators.teachers import TeacherDistillation
    from consilience.core.source import inputs_of

    return TeacherDistillation(
        unlabelled=inputs_of(unlabelled, "unlabelled"),
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        temperature=temperature,
        of=of,
        features=features,
        calibrate=calibrate,
        temperatures=temperatures,
        augment=augment,
        lr_schedule=lr_schedule,
        optimiser=optimiser,
    )


def experts() -> Experts:
    """Keep every received model or module as an expert of its own."""
    from consilience.consolidators.bank import Experts

    return Experts()


suggest_arguments(__name__)
