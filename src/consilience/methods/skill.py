"""Methods known from shared-knowledge lifelong learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from consilience.core.correction import Mapper
    from consilience.core.method import Method


def skill(
    mapper: Literal["gaussian_mixture", "nearest_mean", "mahalanobis"] = "gaussian_mixture",
    components: int = 25,
    prior: Literal["size", "uniform"] = "uniform",
) -> Method:
    """Heads on a frozen backbone are learned apart, shared in a bank, and an anchor of each task routes inputs to them.

    Paper: Ge et al. 2023.

    Args:
        mapper: how anchors are made: a mixture of Gaussians, class means, or class means with one covariance.
        components: Gaussians a task.
        prior: whether a task's components weigh by its examples.
    """
    from consilience import mappers
    from consilience.consolidators.bank import Experts
    from consilience.core.errors import unknown
    from consilience.core.method import Method

    made: dict[str, Callable[[], Mapper]] = {
        "gaussian_mixture": lambda: mappers.gaussian_mixture(components, prior),
        "nearest_mean": mappers.nearest_mean,
        "mahalanobis": mappers.mahalanobis,
    }
    if mapper not in made:
        raise unknown("mapper", mapper, made)
    return Method("skill", consolidator=Experts(), mapper=made[mapper]())
