"""Shares of a count, without the rounding of floats."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache


def exact_share(share: float, size: int) -> Fraction:
    """Return share x size without rounding, of the number that was written: .07 is 7 / 100.

    A float stands for the simplest fraction that rounds to it, if its denominator is at most a million, else
    for its shortest decimals.

    >>> 0.07 * 100, exact_share(0.07, 100), exact_share(1 / 3, 3)
    (7.000000000000001, Fraction(7, 1), Fraction(1, 1))
    """
    return _written(float(share)) * size


@lru_cache(1024)
def _written(share: float) -> Fraction:
    simple = Fraction(share).limit_denominator(10**6)
    return simple if float(simple) == share else Fraction(repr(share))
