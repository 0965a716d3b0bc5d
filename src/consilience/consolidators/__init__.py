"""Consolidators: how what was heard enters an agent: weights combined, statistics solved, experts banked.

Signatures import no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.consolidators.bank import Experts
    from consilience.consolidators.normalised import Normalised
    from consilience.consolidators.statistics import ClosedForm
    from consilience.consolidators.weights import WeightSpace


def weight_space(aggregator: Any = None, outer: Any = None, lr: float = 1.0) -> WeightSpace:
    """Combine heard parameters by an aggregator, then take a step of an outer optimiser.

    Args:
        aggregator: of parameters (None: the weighted mean).
        outer: outer optimiser (None: SGD, which with lr 1 takes the aggregate as it is).
        lr: outer learning rate.
    """
    from consilience.consolidators.weights import WeightSpace

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


def closed_form(strength: float = 0.01, average: bool = False, normalise: bool = False) -> ClosedForm:
    """Solve a ridge head from the sum of everybody's statistics.

    Args:
        strength: lambda of the ridge.
        average: whether the objective is the mean loss, so that lambda counts as lambda x samples.
        normalise: divide each class's column by its norm, as Fed3R does; it changes the argmax.
    """
    from consilience.consolidators.statistics import ClosedForm

    return ClosedForm(strength, average, normalise)


def experts() -> Experts:
    """Keep every trained model or module that was heard of, as an expert of its own."""
    from consilience.consolidators.bank import Experts

    return Experts()
