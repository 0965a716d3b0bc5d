"""Pareto fronts: points that no other beats in every task, and the volume that they dominate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[Sequence[float]]
"""[points][tasks], more is better."""


def non_dominated(points: Points) -> list[bool]:
    """Return for each point whether no other is as good in all tasks and better in one.

    >>> non_dominated([(1, 3), (2, 2), (1, 2), (2, 2)])
    [True, True, False, True]
    """

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [not any(dominates(other, point) for other in points) for point in points]


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """Return the volume of all that lies between the reference and some point.

    Points that are not above the reference in every task add nothing. By slices along the last task: each has
    the volume, one dimension lower, of the points that reach it. Zitzler & Thiele 1999.

    >>> hypervolume([(1, 3), (2, 2), (3, 1)], (0, 0))
    6.0
    """
    above = [point for point in points if all(a > b for a, b in zip(point, reference, strict=True))]
    if not above:
        return 0.0
    # In one dimension the best point has it all.
    if len(reference) == 1:
        return float(max(point[0] for point in above) - reference[0])

    volume = 0.0
    levels = sorted({point[-1] for point in above}, reverse=True)
    for level, below in pairwise([*levels, reference[-1]]):
        reach = [tuple(point[:-1]) for point in above if point[-1] >= level]
        # Points that others dominate add nothing, and would be sliced again and again.
        kept = [point for point, free in zip(reach, non_dominated(reach), strict=True) if free]
        volume += (level - below) * hypervolume(sorted(set(kept)), reference[:-1])
    return volume


def share_of_box(points: Points) -> float:
    """Return the hypervolume as a fraction of the box that the points span, in [0, 1].

    The box reaches from a tenth of each task's range below its worst value to its best, so that the ends of
    the front count too. A task in which all points are equal is left out.

    >>> share_of_box([(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
    1.0
    """
    columns = [column for column in zip(*points, strict=True) if max(column) > min(column)]
    if not columns:
        return 1.0
    # Tasks have scores of different sizes, so each is scaled by its own range.
    scaled = [[(value - min(column)) / (max(column) - min(column)) for value in column] for column in columns]
    return hypervolume(list(zip(*scaled, strict=True)), [-0.1] * len(columns)) / 1.1 ** len(columns)
