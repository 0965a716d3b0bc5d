"""Baselines of continual learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.method import Method


def finetune() -> Method:
    """Plain training on whatever comes; what is heard is averaged.

    Paper: the lower bound of continual learning; FedAvg where clients are averaged.
    """
    from consilience.core.method import Method

    return Method("finetune")


def joint() -> Method:
    """Training on all sources seen so far as one pool: the upper bound.

    Paper: Caruana 1997.
    """
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import Cumulative

    return Method("joint", (Cumulative(),))
