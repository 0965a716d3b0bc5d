"""Methods known from model merging, and `aggregate`, which puts an aggregator wherever a setting combines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.aggregator import Aggregator
    from consilience.core.method import Method


def aggregate(aggregator: Aggregator) -> Method:
    """Combine by this aggregator whatever the setting combines: gradients of tasks in a step, or parameters that are heard.

    Paper: one type for five jobs (Quinton & Rey 2024 for gradients).

    Args:
        aggregator: one of `consilience.aggregators`.
    """
    from consilience.core.aggregator import Aggregator as Kind
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.method import Method

    if not isinstance(aggregator, Kind):
        raise ConsilienceError(
            f"`aggregator` should be made by consilience.aggregators, such as ties(). Found {kind_of(aggregator)}."
        )
    return Method(type(aggregator).__name__.lower(), aggregator=aggregator)


def average() -> Method:
    """The mean of what is heard.

    Paper: Wortsman et al. 2022 (model soups).
    """
    from consilience.aggregators import mean
    from consilience.core.method import Method

    return Method("average", hear_aggregator=mean())


def task_arithmetic(coefficient: float = 1.0) -> Method:
    """The base plus a coefficient times the mean of the task vectors (what is heard minus the base).

    Paper: Ilharco et al. 2023; its lambda for a sum over m experts is coefficient / m.

    Args:
        coefficient: 1 gives the mean of the models, 0 the base.
    """
    from consilience.aggregators import arithmetic
    from consilience.core.method import Method

    return Method("task_arithmetic", hear_aggregator=arithmetic(coefficient))


def ties(density: float = 0.2) -> Method:
    """Trim the task vectors, elect signs, average those that agree.

    Paper: Yadav et al. 2023.

    Args:
        density: the share of entries of each task vector that is kept, in (0, 1].
    """
    from consilience.aggregators import ties as aggregator
    from consilience.core.method import Method

    return Method("ties", hear_aggregator=aggregator(density))
