"""Consolidators: how what was heard enters an agent: weights combined, statistics solved, experts banked.

Signatures import no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from consilience.consolidators.arrivals import OPCM, RunningArithmetic
    from consilience.consolidators.bank import Experts
    from consilience.consolidators.distillation import Distillation
    from consilience.consolidators.merging import FisherSpace, RegMean
    from consilience.consolidators.normalised import Normalised
    from consilience.consolidators.statistics import ClosedForm
    from consilience.core.weight_space import WeightSpace


def weight_space(aggregator: Any = None, outer: Any = None, lr: float = 1.0) -> WeightSpace:
    """Combine heard parameters by an aggregator, then take a step of an outer optimiser.

    Args:
        aggregator: of parameters (None: the weighted mean).
        outer: outer optimiser (None: SGD, which with lr 1 takes the aggregate as it is).
        lr: outer learning rate.
    """
    from consilience.core.weight_space import WeightSpace

    return WeightSpace(aggregator, outer, lr)


def normalised_space(aggregator: Any = None, outer: Any = None, lr: float = 1.0) -> Normalised:
    """As `weight_space`, with each agent's change divided by how many steps it took, and multiplied by their mean: FedNova.

    Args:
        aggregator: of parameters (None: the weighted mean).
        outer: outer optimiser (None: SGD, which with lr 1 takes the aggregate as it is).
        lr: outer learning rate.
    """
    from consilience.consolidators.normalised import Normalised

    return Normalised(aggregator, outer, lr)


def fisher_space(outer: Any = None, lr: float = 1.0, prior: float = 0.0) -> FisherSpace:
    """Combine heard parameters by the Fisher information that comes with them, entry by entry.

    Args:
        outer: outer optimiser (None: SGD, which with lr 1 takes the aggregate as it is).
        lr: outer learning rate.
        prior: the weight of the hearer's own parameters, in the units of the Fisher information.
    """
    from consilience.consolidators.merging import FisherSpace

    return FisherSpace(None, outer, lr, prior)


def regression_space(outer: Any = None, lr: float = 1.0, alpha: float = 0.9, ridge: float = 1e-6) -> RegMean:
    """Combine heard layers by least squares on the second moments of their inputs: RegMean.

    Args:
        outer: outer optimiser (None: SGD, which with lr 1 takes the aggregate as it is).
        lr: outer learning rate.
        alpha: factor of the off-diagonals of the moments, in [0, 1].
        ridge: how firmly the experts' mean is held where inputs are missing, as a share of the mean diagonal; 0: pseudo-inverse.
    """
    from consilience.consolidators.merging import RegMean

    return RegMean(None, outer, lr, alpha, ridge)


def running_arithmetic(coefficient: float = 1.0, of: Literal["mean", "sum"] = "mean") -> RunningArithmetic:
    """Merge experts one by one, by their running mean, or task arithmetic on it, or on the sum of their task vectors.

    Args:
        coefficient: of the mean (or sum) of the task vectors; 1 gives the mean of the models.
        of: mean or sum.
    """
    from consilience.consolidators.arrivals import RunningArithmetic

    return RunningArithmetic(coefficient=coefficient, of=of)


def orthogonal_projection(threshold: float = 0.5) -> OPCM:
    """Merge experts one by one, of each what stands across the directions that are there: OPCM.

    Args:
        threshold: the share of the singular values of what is there that no new expert changes together, in [0, 1].
    """
    from consilience.consolidators.arrivals import OPCM

    return OPCM(threshold=threshold)


def closed_form(
    strength: float = 0.01, average: bool = False, normalise: bool = False, temperature: float = 1.0
) -> ClosedForm:
    """Solve a ridge head from the sum of everybody's statistics.

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
    """Average what is heard, then teach the average the mean answer of those that were heard, on inputs without labels.

    Args:
        unlabelled: inputs [N, ...] that the hearer has: a tensor, an array, or a source, whose labels are not read.
        steps: gradient steps at each absorption; 0 is the average.
        lr: learning rate of these steps.
        batch_size: inputs a step.
        temperature: divides logits.
        of: whether logits are averaged, or probabilities.
        optimiser: of these steps.
    """
    from consilience.consolidators.distillation import Distillation, inputs

    return Distillation(
        unlabelled=inputs(unlabelled),
        steps=steps,
        rate=lr,
        batch_size=batch_size,
        temperature=temperature,
        of=of,
        optimiser=optimiser,
    )


def experts() -> Experts:
    """Keep every trained model or module that was heard of, as an expert of its own."""
    from consilience.consolidators.bank import Experts

    return Experts()
