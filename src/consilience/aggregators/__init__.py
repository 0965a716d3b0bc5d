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
    from consilience.aggregators._cagrad import CAGrad as CAGrad
    from consilience.aggregators._cone import AGEM as AGEM
    from consilience.aggregators._cone import GEM as GEM
    from consilience.aggregators._consensus import Consensus as Consensus
    from consilience.aggregators._dare import Dare as Dare
    from consilience.aggregators._fair import FairGrad as FairGrad
    from consilience.aggregators._fisher import Fisher as Fisher
    from consilience.aggregators._geometric import GeometricMedian as GeometricMedian
    from consilience.aggregators._krum import Bulyan as Bulyan
    from consilience.aggregators._krum import Krum as Krum
    from consilience.aggregators._krum import MultiKrum as MultiKrum
    from consilience.aggregators._mean import Mean as Mean
    from consilience.aggregators._mgda import MGDA as MGDA
    from consilience.aggregators._mgda import SDMGrad as SDMGrad
    from consilience.aggregators._pcgrad import PCGrad as PCGrad
    from consilience.aggregators._random import RandomWeights as RandomWeights
    from consilience.aggregators._robust import Median as Median
    from consilience.aggregators._robust import TrimmedMean as TrimmedMean
    from consilience.aggregators._slerp import Slerp as Slerp
    from consilience.aggregators._stock import ModelStock as ModelStock
    from consilience.aggregators._ties import Ties as Ties
    from consilience.aggregators._torchjd import TorchJD as TorchJD
    from consilience.aggregators._torchjd import TorchJDLinear as TorchJDLinear
    from consilience.aggregators._torchjd import TorchJDStateful as TorchJDStateful
    from consilience.aggregators._vaccine import GradVac as GradVac
    from consilience.core.aggregator import Aggregator
else:
    __getattr__, __dir__ = lazy.attach(__name__)

__all__ = [
    "agem",
    "aligned_mtl",
    "arithmetic",
    "breadcrumbs",
    "bulyan",
    "cagrad",
    "consensus",
    "dare",
    "fairgrad",
    "fisher",
    "gem",
    "geometric_median",
    "gradvac",
    "imtl_g",
    "krum",
    "mean",
    "median",
    "mgda",
    "model_stock",
    "multi_krum",
    "nash_mtl",
    "pcgrad",
    "rlw",
    "sdmgrad",
    "slerp",
    "ties",
    "torchjd",
    "trimmed_mean",
    "upgrad",
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


def cagrad(c: float = 0.5) -> CAGrad:
    """Within `c` of the mean's length around it, help most the row that gains least (CAGrad)."""
    from consilience.aggregators._cagrad import CAGrad

    return CAGrad(c)


def gradvac(beta: float = 0.01) -> GradVac:
    """Turn each gradient towards those it agrees with less than on average so far (GradVac)."""
    from consilience.aggregators._vaccine import GradVac

    return GradVac(beta)


def fairgrad(alpha: float = 1.0) -> FairGrad:
    """Share gains fairly: from the mean (0) by the Nash bargain (1) to max-min fairness (FairGrad)."""
    from consilience.aggregators._fair import FairGrad

    return FairGrad(alpha)


def nash_mtl() -> FairGrad:
    """Let all rows gain the same share, by the Nash bargain (Nash-MTL)."""
    return fairgrad(1.0)


def sdmgrad(towards_mean: float = 0.3) -> SDMGrad:
    """Find the shortest vector in the convex hull of the rows, each moved towards the mean (SDMGrad)."""
    from consilience.aggregators._mgda import SDMGrad

    return SDMGrad(towards_mean)


def rlw() -> RandomWeights:
    """Weigh rows at random in each step, by the softmax of normal numbers (RLW)."""
    from consilience.aggregators._random import RandomWeights

    return RandomWeights()


def imtl_g() -> TorchJD:
    """Take the combination whose projections on all rows are equally long (IMTL-G), by torchjd."""
    return torchjd("IMTLG")


def aligned_mtl() -> TorchJD:
    """Bring the matrix of rows to condition 1, then average (Aligned-MTL), by torchjd."""
    return torchjd("AlignedMTL")


def upgrad() -> TorchJD:
    """Project each row on the directions that no row opposes, then average (UPGrad), by torchjd."""
    return torchjd("UPGrad")


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
    """Use one of torchjd's aggregators by class name, such as "UPGrad" or "ExcessMTL", with its arguments."""
    from consilience.aggregators._torchjd import of_name

    return of_name(name, arguments)


suggest_arguments(__name__)
