"""Methods known from model merging, and `aggregate`, which puts an aggregator wherever a setting combines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from consilience.core.aggregator import Aggregator
    from consilience.core.method import Method


def aggregate(aggregator: Aggregator) -> Method:
    """Use this aggregator wherever the setting combines: gradients of tasks, or received parameters.

    Paper: one type for five jobs (Quinton & Rey 2024 for gradients).

    Args:
        aggregator: one of `consilience.aggregators`.
    """
    from consilience.core.aggregator import Aggregator as Kind
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.method import Method

    if not isinstance(aggregator, Kind):
        raise ConsilienceError(
            "`aggregator` must be made by consilience.aggregators, such as ties(), "
            f"got {kind_of(aggregator)}."
        )
    return Method(type(aggregator).__name__.lower(), aggregator=aggregator)


def average() -> Method:
    """The mean of the received models.

    Paper: Wortsman et al. 2022 (model soups).
    """
    from consilience.aggregators import mean
    from consilience.core.method import Method

    return Method("average", exchange_aggregator=mean())


def task_arithmetic(coefficient: float = 1.0) -> Method:
    """The base plus a coefficient times the mean of the task vectors (a received model minus the base).

    Paper: Ilharco et al. 2023; its lambda for a sum over m experts is coefficient / m.

    Args:
        coefficient: 1 gives the mean of the models, 0 the base.
    """
    from consilience.aggregators import arithmetic
    from consilience.core.method import Method

    return Method("task_arithmetic", exchange_aggregator=arithmetic(coefficient))


def ties(density: float = 0.2) -> Method:
    """Trim the task vectors, elect signs, average those that agree.

    Paper: Yadav et al. 2023.

    Args:
        density: the share of entries of each task vector that is kept, in (0, 1].
    """
    from consilience.aggregators import ties as aggregator
    from consilience.core.method import Method

    return Method("ties", exchange_aggregator=aggregator(density))


def talos(
    density: float = 0.1,
    rounds: int = 4,
    score: Literal["logit", "likelihood"] = "logit",
    samples: int | None = None,
    reached: bool = False,
) -> Method:
    """Sparse fine-tuning for merging: train only the entries that the base's answers depend on least.

    It changes training only; compose it with an aggregator, as in `talos() + ties()`. Other experts that
    merge well: `fedprox(mu)` keeps them near the base; `models.linearised` makes their functions add;
    undertrained ones stop early, by `Training(epochs=1)` or `settings.merging(fraction=...)`.

    Paper: Iurada, Ciccone & Tommasi 2025.

    Args:
        density: the share of shared entries that is trained, in (0, 1]; 1 is plain training.
        rounds: in how many rounds the others are taken out, a power of `density` in each.
        score: the squared gradient of the logit of a class drawn from the model (their code), or of its
            likelihood (their paper).
        samples: how many examples the scores are taken on; None is all.
        reached: leave out entries that no answer depends on (of inputs that are always 0, say); they cannot
            be trained either.
    """
    from consilience.core.method import Method
    from consilience.corrections.sensitivity import TaLoS

    return Method("talos", (TaLoS(density, rounds, score, samples, reached),))


def fisher_merging(
    labels: Literal["model", "all", "data", "batches"] = "model",
    samples: int | None = None,
    prior: float = 0.0,
) -> Method:
    """Average the received models, each entry weighted by its sender's diagonal Fisher information.

    Paper: Matena & Raffel 2022.

    Args:
        labels: whose labels the Fisher takes (see `ewc`).
        samples: how many examples the Fisher is estimated on; None is all.
        prior: the weight of the receiver's own parameters, the base, in the units of the Fisher.
    """
    from consilience.consolidators.merging import FisherSpace
    from consilience.core.method import Method
    from consilience.corrections.inputs import Information

    return Method("fisher_merging", (Information(labels, samples),), consolidator=FisherSpace(prior=prior))


def regmean(alpha: float = 0.9, ridge: float = 1e-6, largest: int = 2048) -> Method:
    """Merge linear layers and convolutions so that outputs stay nearest to every expert's; average the rest.

    Nearest in least squares, each expert on its own inputs.

    Agents send the second moments of their layers' inputs: d^2 numbers for a layer with d inputs.

    Paper: Jin et al. 2023.

    Args:
        alpha: factor of the off-diagonals of the second moments, in [0, 1].
        ridge: how firmly the experts' mean is held where inputs are missing, as a share of the mean diagonal;
            0 takes the pseudo-inverse.
        largest: layers whose units have more inputs are averaged.
    """
    from consilience.consolidators.merging import RegMean
    from consilience.core.method import Method
    from consilience.corrections.inputs import InputMoments

    return Method("regmean", (InputMoments(largest),), consolidator=RegMean(alpha=alpha, ridge=ridge))


def running_average(coefficient: float = 1.0, of: Literal["mean", "sum"] = "mean") -> Method:
    """Continual merging: experts arrive one by one and only their average, or task arithmetic on it, is kept.

    `parameter_average` counts all experts of one exchange as one; here every expert counts, and buffers are
    averaged too.

    Paper: Wortsman et al. 2022; Ilharco et al. 2023 (other coefficients, and sums).

    Args:
        coefficient: 1 gives the mean of the models; others need what the experts started from.
        of: "mean" is `task_arithmetic(coefficient)` of all experts so far; "sum" adds coefficient x (expert
            - base)
            for each.
    """
    from consilience.consolidators.arrivals import RunningArithmetic
    from consilience.core.method import Method

    return Method("running_average", consolidator=RunningArithmetic(coefficient=coefficient, of=of))


def opcm(threshold: float = 0.5) -> Method:
    """OPCM, continual merging: add of each task vector the part that is orthogonal to the earlier ones.

    Paper: Tang et al. 2025.

    Args:
        threshold: the share of the present singular values that new experts leave unchanged, in [0, 1].
    """
    from consilience.consolidators.arrivals import OPCM
    from consilience.core.method import Method

    return Method("opcm", consolidator=OPCM(threshold=threshold))
