"""Methods known from multi-task learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.method import Method


def pcgrad() -> Method:
    """Project away from each objective's gradient what opposes another's, then average.

    Paper: Yu et al. 2020.
    """
    from consilience.aggregators import pcgrad as aggregator
    from consilience.core.method import Method

    return Method("pcgrad", step_aggregator=aggregator())
