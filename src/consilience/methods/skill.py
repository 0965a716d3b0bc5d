"""Methods known from shared-knowledge lifelong learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from consilience.core.method import Method


def skill(
    mapper: Literal["gaussian_mixture", "nearest_mean"] = "gaussian_mixture",
    components: int = 25,
    prior: Literal["size", "uniform"] = "uniform",
) -> Method:
    """Heads on a frozen backbone are learned apart, shared in a bank, and an anchor of each task routes inputs to them.

    Paper: Ge et al. 2023.

    Args:
        mapper: how anchors are made: a mixture of Gaussians or class means.
        components: Gaussians a task.
        prior: whether a task's components weigh by its examples.
    """
    from consilience import mappers
    from consilience.consolidators.bank import Experts
    from consilience.core.errors import unknown
    from consilience.core.method import Method

    if mapper not in ("gaussian_mixture", "nearest_mean"):
        raise unknown("mapper", mapper, ["gaussian_mixture", "nearest_mean"])
    chosen = mappers.gaussian_mixture(components, prior) if mapper == "gaussian_mixture" else mappers.nearest_mean()
    return Method("skill", consolidator=Experts(), mapper=chosen)
