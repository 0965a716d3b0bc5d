"""Methods known from federated learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from consilience.core.method import Method


def fedavg(outer: Literal["sgd", "adam", "averaging"] = "sgd", outer_lr: float = 1.0, outer_momentum: float = 0.0) -> Method:
    """Average what is heard by the number of examples, then take an outer step.

    Paper: McMahan et al. 2017; Reddi et al. 2021 for outer optimisers (FedAvgM with momentum, FedAdam without bias correction).

    Args:
        outer: outer optimiser.
        outer_lr: its learning rate; 1 with plain sgd takes the average as it is.
        outer_momentum: of sgd.
    """
    from consilience.aggregators import mean
    from consilience.consolidators.weights import WeightSpace
    from consilience.core.errors import ConsilienceError
    from consilience.core.method import Method
    from consilience.core.optimiser import SGD, Adam, Averaging

    if outer not in ("sgd", "adam", "averaging"):
        raise ConsilienceError(f"`outer` should be sgd, adam or averaging. Found `outer = {outer!r}`.")
    optimiser = {"sgd": SGD(outer_momentum), "adam": Adam(0.9, 0.99, 1e-3, corrected=False), "averaging": Averaging()}[outer]
    return Method("fedavg", hear_aggregator=mean(), consolidator=WeightSpace(None, optimiser, outer_lr))


def fedprox(mu: float = 0.1) -> Method:
    """Stay near the parameters that this learn began with.

    Paper: Li et al. 2020.

    Args:
        mu: of the term (mu / 2) ||theta - theta_start||^2; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import Proximal

    return Method("fedprox", (Proximal(mu),))


def fed3r(strength: float = 0.01, average: bool = False, normalise: bool = False, temperature: float = 1.0) -> Method:
    """A ridge head in closed form from everybody's sums of features: exact for any split, order and schedule.

    On `models.fourier_features(model)` it is Fed3R with random features. It is where any other run may begin: with
    `first = run(schedule, fed3r(temperature=0.1))`, `run(federated(clients, base=first.params), fedavg())` goes on from it; and
    SCROLL's second part is `run(continual([kept], base=first.params), finetune(), training=Training(sampler=Balanced()))` on
    the examples that may be kept.

    Paper: Fanì et al. 2024; Wang et al. 2022 (SCROLL).

    Args:
        strength: lambda of the ridge, entered once.
        average: whether the objective is the mean loss (lambda then counts as lambda x samples).
        normalise: divide each class's column by its norm; it changes the argmax.
        temperature: divides the head, which leaves the argmax; .1 suits a softmax that is trained on.
    """
    from consilience.consolidators.statistics import ClosedForm
    from consilience.core.method import Method
    from consilience.corrections.moments import Moments

    return Method("fed3r", (Moments(),), consolidator=ClosedForm(strength, average, normalise, temperature), fixed={"epochs": 0})
