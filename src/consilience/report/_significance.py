"""Whether methods differ by more than their seeds do: paired t-tests against the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from consilience.loop.result import Result


class Difference(NamedTuple):
    """How far a result is behind the best, by the same seeds: the mean, its 95 % interval, and p by Holm.

    The interval is the mean +- `half`; both `half` and p are NaN where they are not defined.
    """

    behind: float
    half: float
    p: float
    seeds: int


def differences(results: Sequence[Result]) -> dict[int, Difference]:
    """Return, for each result that can be compared with the best, by how much it is behind, and p.

    A paired t-test over seeds: d_r = best_r - other_r, t = mean(d) / (std(d) / sqrt(n)), n - 1 degrees of
    freedom; half the 95 % interval is t_.975 std(d) / sqrt(n). p is corrected by Holm for the number of
    comparisons. One seed shows no spread, so nothing is said of it; nor of differences that are all equal
    (p is NaN).
    """
    best = best_of(results)
    if best is None:
        return {}
    top = results[best]
    scores, found = np.array(top.scores), {}
    for i, other in enumerate(results):
        # Only equal seeds are pairs: they have the same data, order and start.
        same = (other.seed, other.repeats, other.data, other.metric) == (
            top.seed,
            top.repeats,
            top.data,
            top.metric,
        )
        if i == best or not same or top.repeats < 2:
            continue
        d = scores - np.array(other.scores)
        difference = paired(-d if top.direction is False else d)
        if difference.seeds > 1:
            found[i] = difference
    return holm(found)


def paired(differences: Sequence[float] | np.ndarray) -> Difference:
    """Return the mean of differences by seed, its interval, and p of a t-test, without Holm's correction.

    Seeds where the difference is not finite are left out.

    >>> difference = paired([0.1, 0.2, 0.3])
    >>> f"{difference.behind:.2f} +- {difference.half:.2f}, p {difference.p:.3f}"
    '0.20 +- 0.25, p 0.074'
    >>> paired([0.5])
    Difference(behind=0.5, half=nan, p=nan, seeds=1)
    """
    d = np.array(differences, dtype=float)
    d = d[np.isfinite(d)]
    if len(d) < 2:
        return Difference(float(d.mean()) if len(d) else math.nan, math.nan, math.nan, len(d))
    from scipy import stats

    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    half = float(stats.t.ppf(0.975, len(d) - 1)) * error
    p = 2 * float(stats.t.sf(abs(d.mean()) / error, len(d) - 1)) if error > 0 else math.nan
    return Difference(float(d.mean()), half, p, len(d))


def best_of(results: Sequence[Result]) -> int | None:
    """Return the place of the best result; None where their metrics differ or have no direction."""
    if len({result.metric for result in results}) > 1 or results[0].direction is None:
        return None
    sign = -1 if results[0].direction is False else 1
    finite = [i for i, result in enumerate(results) if math.isfinite(result.score)]
    return max(finite, key=lambda i: sign * results[i].score, default=None)


def holm(found: dict[int, Difference]) -> dict[int, Difference]:
    """Correct p for several comparisons: the k-th smallest of m is times m - k + 1, and never falls."""
    order = sorted((i for i in found if math.isfinite(found[i].p)), key=lambda i: found[i].p)
    corrected, least = dict(found), 0.0
    for k, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - k) * found[i].p))
        corrected[i] = found[i]._replace(p=least)
    return corrected
