"""Baselines of continual learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.method import Method


def finetune() -> Method:
    """Plain training on each source; received parameters are averaged.

    Paper: the lower bound of continual learning; FedAvg where clients are averaged.
    """
    from consilience.core.method import Method

    return Method("finetune")


def cumulative() -> Method:
    """Training goes on, at each source on all data seen so far as one pool.

    Paper: Maltoni & Lomonaco 2019.
    """
    from consilience.core.method import Method
    from consilience.corrections.baselines import Cumulative

    return Method("cumulative", (Cumulative(),))


def joint() -> Method:
    """At each source new parameters are trained on all data seen so far as one pool: the upper bound.

    Paper: Caruana 1997.
    """
    from consilience.core.method import Method
    from consilience.corrections.baselines import Cumulative

    return Method("joint", (Cumulative(scratch=True),))


def from_scratch() -> Method:
    """Every source is learned alone, from new parameters: what it reaches without any transfer.

    Paper: the reference of forward transfer (Lopez-Paz & Ranzato 2017).
    """
    from consilience.core.method import Method
    from consilience.corrections.baselines import FromScratch

    return Method("from_scratch", (FromScratch(),))
