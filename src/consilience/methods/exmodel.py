"""Methods known from ex-model continual learning: what to do with experts that are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.core.method import Method


def _ensemble(name: str, mapper: Any) -> Method:
    from consilience.consolidators.bank import Experts
    from consilience.core.method import Method

    return Method(name, consolidator=Experts(), mapper=mapper)


def oracle_ensemble() -> Method:
    """All experts are kept, and the true task says which one answers: an upper bound.

    Paper: Carta et al. 2023.
    """
    from consilience.mappers import oracle

    return _ensemble("oracle_ensemble", oracle())


def average_ensemble() -> Method:
    """All experts are kept, and their class probabilities averaged.

    Paper: Carta et al. 2023.
    """
    from consilience.mappers import average

    return _ensemble("average_ensemble", average())


def entropy_ensemble() -> Method:
    """All experts are kept, and the most certain one answers.

    Paper: Carta et al. 2023.
    """
    from consilience.mappers import min_entropy

    return _ensemble("entropy_ensemble", min_entropy())


def parameter_average() -> Method:
    """The running mean of the parameters of all experts received so far.

    Paper: Carta et al. 2023.
    """
    from consilience.core.method import Method
    from consilience.core.optimiser import Averaging
    from consilience.core.weight_space import WeightSpace

    return Method("parameter_average", consolidator=WeightSpace(None, Averaging()))
