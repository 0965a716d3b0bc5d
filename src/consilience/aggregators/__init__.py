"""The catalogue of aggregators: rows of gradients, of client updates or of task vectors [m, n] into one [n].

Nothing here imports torch before it is called. The classes lie in files with a leading underscore, since a submodule
named like its function would replace it in this package at the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.aggregators._arithmetic import Arithmetic
    from consilience.aggregators._breadcrumbs import Breadcrumbs
    from consilience.aggregators._cone import AGEM, GEM
    from consilience.aggregators._consensus import Consensus
    from consilience.aggregators._dare import Dare
    from consilience.aggregators._fisher import Fisher
    from consilience.aggregators._geometric import GeometricMedian
    from consilience.aggregators._krum import Bulyan, Krum, MultiKrum
    from consilience.aggregators._mean import Mean
    from consilience.aggregators._mgda import MGDA
    from consilience.aggregators._pcgrad import PCGrad
    from consilience.aggregators._robust import Median, TrimmedMean
    from consilience.aggregators._slerp import Slerp
    from consilience.aggregators._stock import ModelStock
    from consilience.aggregators._ties import Ties
    from consilience.aggregators._torchjd import TorchJD
    from consilience.core.aggregator import Aggregator

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
    """The weighted mean: sum_i w_i g_i."""
    from consilience.aggregators._mean import Mean

    return Mean()


def gem(margin: float = 0.5) -> GEM:
    """GEM's cone: the nearest direction to the mean that no constraint row opposes."""
    from consilience.aggregators._cone import GEM

    return GEM(margin)


def agem() -> AGEM:
    """A-GEM's half-space: the nearest direction to the mean that the mean constraint row does not oppose."""
    from consilience.aggregators._cone import AGEM

    return AGEM()


def arithmetic(coefficient: float = 1.0) -> Arithmetic:
    """Task arithmetic: coefficient * sum_i w_i tau_i (the papers' lambda is coefficient / m at the default weights)."""
    from consilience.aggregators._arithmetic import Arithmetic

    return Arithmetic(coefficient)


def ties(density: float = 0.2) -> Ties:
    """TIES: trim every row to its `density` largest magnitudes, elect signs, average those that agree."""
    from consilience.aggregators._ties import Ties

    return Ties(density)


def pcgrad() -> PCGrad:
    """PCGrad: project every gradient off those that it conflicts with, then take the weighted mean."""
    from consilience.aggregators._pcgrad import PCGrad

    return PCGrad()


def mgda() -> MGDA:
    """MGDA: the shortest vector in the convex hull of the rows."""
    from consilience.aggregators._mgda import MGDA

    return MGDA()


def dare(density: float = 0.1, then: Aggregator | None = None) -> Dare:
    """DARE: keep every entry with probability `density`, rescaled by 1 / `density`; then the weighted mean, or `then`: ties(1.0)."""
    from consilience.aggregators._dare import Dare

    return Dare(density, then)


def breadcrumbs(density: float = 0.15, gamma: float = 0.006) -> Breadcrumbs:
    """Model breadcrumbs: of every row without its `gamma` largest magnitudes the next `density`; then the weighted mean."""
    from consilience.aggregators._breadcrumbs import Breadcrumbs

    return Breadcrumbs(density, gamma)


def consensus(strength: float = 0.2, agree: int = 2) -> Consensus:
    """Consensus merging: the weighted mean of the entries that matter to at least `agree` tasks; `strength` is the masks' lambda."""
    from consilience.aggregators._consensus import Consensus

    return Consensus(strength, agree)


def model_stock() -> ModelStock:
    """Model stock: the mean, drawn towards the base the more, the larger the angles between the rows are."""
    from consilience.aggregators._stock import ModelStock

    return ModelStock()


def slerp() -> Slerp:
    """Spherical interpolation of two rows, at the fraction w_2 / (w_1 + w_2) of the arc between them."""
    from consilience.aggregators._slerp import Slerp

    return Slerp()


def fisher(prior: float = 0.0) -> Fisher:
    """Fisher-weighted averaging: weights for every entry, normalised entry by entry; `prior` is the weight of the base."""
    from consilience.aggregators._fisher import Fisher

    return Fisher(prior)


def median() -> Median:
    """The weighted median of every coordinate."""
    from consilience.aggregators._robust import Median

    return Median()


def trimmed_mean(trim: float = 0.1) -> TrimmedMean:
    """The weighted mean of every coordinate without the fraction `trim` of the weight at either end."""
    from consilience.aggregators._robust import TrimmedMean

    return TrimmedMean(trim)


def krum(byzantine: int) -> Krum:
    """Krum: the row nearest to its neighbours, when up to `byzantine` of at least 2 byzantine + 3 rows may be anything."""
    from consilience.aggregators._krum import Krum

    return Krum(byzantine)


def multi_krum(byzantine: int, keep: int | None = None) -> MultiKrum:
    """Multi-Krum: the mean of the `keep` rows nearest to their neighbours (None: all but `byzantine`)."""
    from consilience.aggregators._krum import MultiKrum

    return MultiKrum(byzantine, keep)


def bulyan(byzantine: int) -> Bulyan:
    """Bulyan: of rows chosen by Krum, in every coordinate the mean of those nearest to the median; needs 4 byzantine + 3 rows."""
    from consilience.aggregators._krum import Bulyan

    return Bulyan(byzantine)


def geometric_median(smoothing: float = 1e-6, iterations: int = 1000) -> GeometricMedian:
    """The weighted geometric median: the point of the least sum of distances to the rows."""
    from consilience.aggregators._geometric import GeometricMedian

    return GeometricMedian(smoothing, iterations)


def torchjd(name: str, **arguments: Any) -> TorchJD:
    """One of torchjd's aggregators by its class name, such as "UPGrad" or "CAGrad", with its arguments."""
    from consilience.aggregators._torchjd import of_name

    return of_name(name, arguments)
