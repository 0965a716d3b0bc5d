"""The catalogue of aggregators: rows [m, n] of gradients, client updates or task vectors become one [n].

Nothing here imports torch before it is called.
"""

# The classes lie in files with a leading underscore, since a submodule named like its function would replace
# the function in this package at the first call. Functions import inside, so that the command line can list
# them without torch.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from consilience import lazy
from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from consilience.aggregators._arithmetic import Arithmetic as Arithmetic
    from consilience.aggregators._breadcrumbs import Breadcrumbs as Breadcrumbs
    from consilience.aggregators._cone import AGEM as AGEM
    from consilience.aggregators._cone import GEM as GEM
    from consilience.aggregators._consensus import Consensus as Consensus
    from consilience.aggregators._dare import Dare as Dare
    from consilience.aggregators._fisher import Fisher as Fisher
    from consilience.aggregators._geometric import GeometricMedian as GeometricMedian
    from consilience.aggregators._krum import Bulyan as Bulyan
    from consilience.aggregators._krum import Krum as Krum
    from consilience.aggregators._krum import MultiKrum as MultiKrum
    from consilience.aggregators._mean import Mean as Mean
    from consilience.aggregators._mgda import MGDA as MGDA
    from consilience.aggregators._pcgrad import PCGrad as PCGrad
    from consilience.aggregators._robust import Median as Median
    from consilience.aggregators._robust import TrimmedMean as TrimmedMean
    from consilience.aggregators._slerp import Slerp as Slerp
    from consilience.aggregators._stock import ModelStock as ModelStock
    from consilience.aggregators._ties import Ties as Ties
    from consilience.aggregators._torchjd import TorchJD as TorchJD
    from consilience.aggregators._torchjd import TorchJDLinear as TorchJDLinear
    from consilience.core.aggregator import Aggregator
else:
    __getattr__, __dir__ = lazy.attach(__name__)

__all__ = [
    "agem",
    "arithmetic",
    "breadcrumbs",
    "bulyan",
    "consensus",
    "dare",
    "fisher",
    "gem",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "mgda",
    "model_stock",
    "multi_krum",
    "pcgrad",
    "slerp",
    "ties",
    "torchjd",
    "trimmed_mean",
]


def mean() -> Mean:
    """Average rows by their weights: sum_i w_i g_i."""
    from consilience.aggregators._mean import Mean

    return Mean()


def gem(margin: float = 0.5) -> GEM:
    """Take the direction nearest to the mean that no constraint row opposes (GEM)."""
    from consilience.aggregators._cone import GEM

    return GEM(margin)


def agem() -> AGEM:
    """Take the direction nearest to the mean that the mean constraint row does not oppose (A-GEM)."""
    from consilience.aggregators._cone import AGEM

    return AGEM()


def arithmetic(coefficient: float = 1.0) -> Arithmetic:
    """Add task vectors: coefficient * sum_i w_i tau_i (the papers' lambda is coefficient / m by default)."""
    from consilience.aggregators._arithmetic import Arithmetic

    return Arithmetic(coefficient)


def ties(density: float = 0.2) -> Ties:
    """Trim rows to their `density` largest magnitudes, elect signs, average the values that agree (TIES)."""
    from consilience.aggregators._ties import Ties

    return Ties(density)


def pcgrad() -> PCGrad:
    """Project every gradient off those that it conflicts with, then take the weighted mean (PCGrad)."""
    from consilience.aggregators._pcgrad import PCGrad

    return PCGrad()


def mgda() -> MGDA:
    """Find the shortest vector in the convex hull of the rows (MGDA)."""
    from consilience.aggregators._mgda import MGDA

    return MGDA()


def dare(density: float = 0.1, then: Aggregator | None = None) -> Dare:
    """Keep entries with probability `density`, rescale, then average, or apply `then` (DARE)."""
    from consilience.aggregators._dare import Dare

    return Dare(density, then)


def breadcrumbs(density: float = 0.15, gamma: float = 0.006) -> Breadcrumbs:
    """Drop each row's `gamma` largest magnitudes, keep the next `density`, then average (breadcrumbs)."""
    from consilience.aggregators._breadcrumbs import Breadcrumbs

    return Breadcrumbs(density, gamma)


def consensus(strength: float = 0.2, agree: int = 2) -> Consensus:
    """Average entries that matter to at least `agree` tasks; `strength` is the TALL masks' lambda."""
    from consilience.aggregators._consensus import Consensus

    return Consensus(strength, agree)


def model_stock() -> ModelStock:
    """Move the mean towards the base, by more if the angles between the rows are larger (model stock)."""
    from consilience.aggregators._stock import ModelStock

    return ModelStock()


def slerp() -> Slerp:
    """Interpolate two rows on a sphere, at the fraction w_2 / (w_1 + w_2) of the arc between them (SLERP)."""
    from consilience.aggregators._slerp import Slerp

    return Slerp()


def fisher(prior: float = 0.0) -> Fisher:
    """Average with one weight per entry, normalised by entry; `prior` is the base's weight (Fisher)."""
    from consilience.aggregators._fisher import Fisher

    return Fisher(prior)


def median() -> Median:
    """Take the weighted median of every coordinate."""
    from consilience.aggregators._robust import Median

    return Median()


def trimmed_mean(trim: float = 0.1) -> TrimmedMean:
    """Take the mean of every coordinate without the fraction `trim` of the weight at either end."""
    from consilience.aggregators._robust import TrimmedMean

    return TrimmedMean(trim)


def krum(byzantine: int) -> Krum:
    """Take the row nearest to its neighbours; `byzantine` of 2 byzantine + 3 rows may be anything (Krum)."""
    from consilience.aggregators._krum import Krum

    return Krum(byzantine)


def multi_krum(byzantine: int, keep: int | None = None) -> MultiKrum:
    """Average the `keep` rows nearest to their neighbours (None: all but `byzantine`) (multi-Krum)."""
    from consilience.aggregators._krum import MultiKrum

    return MultiKrum(byzantine, keep)


def bulyan(byzantine: int) -> Bulyan:
    """Average, per coordinate, Krum's rows nearest to their median; needs 4 byzantine + 3 rows (Bulyan)."""
    from consilience.aggregators._krum import Bulyan

    return Bulyan(byzantine)


def geometric_median(smoothing: float = 1e-6, iterations: int = 1000) -> GeometricMedian:
    """Find the point with the least weighted sum of distances to the rows (geometric median)."""
    from consilience.aggregators._geometric import GeometricMedian

    return GeometricMedian(smoothing, iterations)


def torchjd(name: str, **arguments: Any) -> TorchJD:
    """Use one of torchjd's aggregators by class name, such as "UPGrad" or "CAGrad", with its arguments."""
    from consilience.aggregators._torchjd import of_name

    return of_name(name, arguments)


suggest_arguments(__name__)
