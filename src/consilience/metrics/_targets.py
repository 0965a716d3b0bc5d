"""Predictions and targets as rows: places are examples, and those without a target are left out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from consilience.core.losses import NONE


class Pairs(NamedTuple):
    """Predictions [M, C] and targets, one row per target."""

    p: Tensor
    y: Tensor


def rows(values: Tensor) -> Tensor:
    """Return values [N, C, *places] as [N x places, C]."""
    return values if values.dim() == 2 else values.movedim(1, -1).flatten(0, -2)


def of_classes(p: Tensor, y: Tensor) -> Pairs:
    """Return probabilities [M, C] and classes [M] of all targets that are there."""
    p, y = rows(p), y.flatten()
    there = y != NONE

    # Most data have all targets, and a copy of the probabilities costs time.
    return Pairs(p, y) if bool(there.all()) else Pairs(p[there], y[there])


def of_values(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return predictions, targets (0 where there is none) in float64, and which are there; each [M, k]."""
    # A model may have more outputs than there are values.
    answers, targets = rows(p[:, : y.shape[1]]).double(), rows(y).double()
    there = ~targets.isnan()
    return answers.masked_fill(~there, 0.0), targets.masked_fill(~there, 0.0), there
