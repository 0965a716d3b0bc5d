"""Mappers: which expert answers for an input. Signatures import no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from consilience import lazy
from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.mappers.autoencoder import ExpertGate as ExpertGate
    from consilience.mappers.confidence import Average as Average
    from consilience.mappers.confidence import MinEntropy as MinEntropy
    from consilience.mappers.confidence import Oracle as Oracle
    from consilience.mappers.covariance import Mahalanobis as Mahalanobis
    from consilience.mappers.mixture import Anchored as Anchored
    from consilience.mappers.mixture import GaussianMixture as GaussianMixture
    from consilience.mappers.mixture import NearestMean as NearestMean
    from consilience.mappers.superposed import Superposition as Superposition
else:
    __getattr__, __dir__ = lazy.attach(__name__)

__all__ = [
    "auroc",
    "average",
    "expert_gate",
    "gaussian_mixture",
    "mahalanobis",
    "min_entropy",
    "nearest_mean",
    "oracle",
    "superposition",
]

# Classes are imported in functions, since torch takes seconds to load and the command line reads signatures.


def oracle() -> Oracle:
    """Take the expert of the true task, which is given at evaluation: an upper bound."""
    from consilience.mappers.confidence import Oracle

    return Oracle()


def average() -> Average:
    """Give every expert the same weight."""
    from consilience.mappers.confidence import Average

    return Average()


def min_entropy(unknown: float = 1.0) -> MinEntropy:
    """Choose the expert that is most certain of its answer.

    Args:
        unknown: an input whose least entropy, over the log of the classes, is above this belongs to no
            expert; at 1 every input belongs to one.
    """
    from consilience.mappers.confidence import MinEntropy

    return MinEntropy(unknown)


def nearest_mean(
    on: Literal["features", "inputs"] = "features", reject: float = 0.0, clip: float = 0.0
) -> NearestMean:
    """Choose the expert whose nearest class mean is nearest.

    Args:
        on: distances are between features of a frozen backbone, or between inputs, for any model.
        reject: fraction of a task's validation examples to reject (sets the threshold). Inputs that score
            below their task's threshold are called unknown. 0: every input belongs to a task.
        clip: largest distance of an example from its source's median, in median distances, so that outliers
            change little; 0: no limit.
    """
    from consilience.mappers.mixture import NearestMean

    return NearestMean(on, reject, clip)


def gaussian_mixture(
    components: int = 25,
    prior: Literal["size", "uniform"] = "uniform",
    on: Literal["features", "inputs"] = "features",
    fit: Literal["torch", "sklearn"] = "torch",
    reject: float = 0.0,
    clip: float = 0.0,
) -> GaussianMixture:
    """Choose the expert of the likeliest component among the mixtures of all sources.

    Args:
        components: diagonal Gaussians per source; one per 20 examples where there are fewer.
        prior: "uniform" (mixtures are pooled), or "size" (they weigh by their source's examples).
        on: mixtures are of features of a frozen backbone, or of inputs, for any model.
        fit: "torch" (our own expectation maximisation, on the device of the data), or "sklearn"
            (scikit-learn's).
        reject: fraction of a task's validation examples to reject (sets the threshold). Inputs that score
            below their task's threshold are called unknown. 0: every input belongs to a task.
        clip: largest distance of an example from its source's median, in median distances, so that outliers
            change little; 0: no limit.
    """
    from consilience.mappers.mixture import GaussianMixture

    return GaussianMixture(components, prior, on=on, fit=fit, reject=reject, clip=clip)


def mahalanobis(
    ridge: float = 0.1,
    on: Literal["features", "inputs"] = "features",
    images: int = 0,
    rank: int = 0,
    reject: float = 0.0,
    clip: float = 0.0,
) -> Mahalanobis:
    """Choose the expert of the nearest class mean by one covariance of all sources: LDA on what they share.

    Args:
        ridge: added to the covariance, as a share of the mean variance; 0 takes the pseudo-inverse.
        on: sums are of features of a frozen backbone, or of inputs, for any model.
        images: images per class that are shared for the covariance (the paper: 5); 0 shares sums instead.
        rank: how many factors of a source's scatter are shared, with the diagonal of the rest; 0 shares all
            of it.
        reject: fraction of a task's validation examples to reject (sets the threshold). Inputs that score
            below their task's threshold are called unknown. 0: every input belongs to a task.
        clip: largest distance of an example from its source's median, in median distances, and largest
            variance of a source in median ones, so that outliers change little; 0: no limit.
    """
    from consilience.mappers.covariance import Mahalanobis

    return Mahalanobis(ridge, on, images, rank, reject, clip)


def expert_gate(
    code: float = 0.5,
    epochs: int = 10,
    lr: float = 0.01,
    temperature: float = 2.0,
    soft: bool = False,
    on: Literal["features", "inputs"] = "inputs",
    reject: float = 0.0,
    clip: float = 0.0,
) -> ExpertGate:
    """Choose the expert whose autoencoder reconstructs the input best. Aljundi et al. 2017.

    Args:
        code: hidden units of an autoencoder, as a share of its inputs.
        epochs: of training an autoencoder.
        lr: learning rate of its Adam.
        temperature: of the gate, a softmax of the errors.
        soft: average the experts by their gates, instead of taking the largest.
        on: what is reconstructed: inputs, or features of a frozen backbone.
        reject: fraction of a task's validation examples to reject (sets the threshold). Inputs that score
            below their task's threshold are called unknown. 0: every input belongs to a task.
        clip: largest distance of an example from its source's median, in median distances, so that outliers
            change little; 0: no limit.
    """
    from consilience.mappers.autoencoder import ExpertGate

    return ExpertGate(code, epochs, lr, temperature, soft, on, reject, clip)


def superposition(halving: bool = True, together: bool = True) -> Superposition:
    """Choose the expert whose weight in the superposition of all tasks' parameters most lowers the entropy.

    Parameters differ by task through masks, keys or gates. Wortsman et al. 2020.

    Args:
        halving: halve the experts until one is left, instead of deciding by one gradient.
        together: a batch is of one task, as the paper assumes, so `predict` inputs of one task at a time. If
            not, each sample is on its own, and most are misrouted (five tasks of digits: .45, not .79).
    """
    from consilience.mappers.superposed import Superposition

    return Superposition(halving, together)


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Return the area under the ROC curve of familiarity: P(known > unknown) + P(equal) / 2.

    Args:
        known: the familiarity [N] of inputs of known tasks.
        unknown: that [M] of others.

    >>> import torch
    >>> auroc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.0, 1.0]))
    0.9166666666666666
    """
    from consilience.mappers.mixture import separation

    return separation(known, unknown)


suggest_arguments(__name__)
