"""Rows chosen by their distances to the others: Krum, multi-Krum, Bulyan."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Blockwise, Linear, ScanState
from consilience.core.errors import ConsilienceError

BLOCK = 1 << 20
"""Columns whose differences are held at once."""


def squares(rows: Tensor) -> Tensor:
    """Compute ||g_i - g_j||^2 [m, m] in float64 from the differences themselves.

    A Gramian would lose the distance of near rows to the rounding error of huge ones. A distance too large
    for float64 is infinite, never NaN.
    """
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in rows.split(BLOCK, 1):
        wide = block.double()
        total += torch.stack([(wide - row).square().sum(1) for row in wide])
    return total


def squares_of_gram(gram: Tensor) -> Tensor:
    """Compute ||g_i - g_j||^2 [m, m] from inner products [m, m]."""
    return (gram.diagonal()[:, None] + gram.diagonal() - 2 * gram).clamp(min=0)


def scores(square: Tensor, byzantine: int) -> Tensor:
    """Compute Krum's scores [k]: the sum of the k - byzantine - 2 smallest squared distances to other rows.

    At least one distance counts, if there is another row.
    """
    count = len(square)
    near = min(max(count - byzantine - 2, 1), count - 1)
    # -1 sorts a row's distance to itself first, where it is skipped.
    own = torch.eye(count, dtype=torch.bool, device=square.device)
    return square.masked_fill(own, -1.0).sort(1).values[:, 1 : near + 1].sum(1)


def nearest(square: Tensor, byzantine: int, keep: int) -> list[int]:
    """Return the `keep` rows of the smallest scores; of equal ones the first."""
    return scores(square, byzantine).argsort(stable=True)[:keep].tolist()


@dataclass(frozen=True)
class _Tolerant(Aggregator):
    """An aggregator that tolerates `byzantine` rows with any content."""

    takes_negative_weights: ClassVar[bool] = False
    robust: ClassVar[bool] = True
    rows_each: ClassVar[int] = 2

    byzantine: int

    def __post_init__(self) -> None:
        if not isinstance(self.byzantine, int) or self.byzantine < 0:
            raise ConsilienceError(f"`byzantine` must be a whole number >= 0, got {self.byzantine!r}.")

    @property
    def fewest_rows(self) -> int:  # type: ignore[override]
        """2 byzantine + 3; for Bulyan 4 byzantine + 3."""
        return self.rows_each * self.byzantine + 3


@dataclass(frozen=True)
class _Chosen(_Tolerant, Linear):
    """The mean of chosen rows times the sum of weights.

    Only the sum of the weights is used, because a Byzantine sender may claim any number of examples.
    """

    @abstractmethod
    def choose(self, square: Tensor) -> list[int]:
        """Choose rows by their squared distances [m, m]."""

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        return self._coefficients(squares_of_gram(gram.double()), weights)

    def coefficients(self, rows: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        return self._coefficients(squares(rows), weights)

    def _coefficients(self, square: Tensor, weights: Tensor) -> Tensor:
        chosen = self.choose(square)
        coefficients = torch.zeros_like(weights)
        coefficients[chosen] = weights.sum() / len(chosen)
        return coefficients


@dataclass(frozen=True)
class Krum(_Chosen):
    """(sum w) g_k, with k = argmin_i sum of ||g_i - g_j||^2 over the m - byzantine - 2 rows nearest to g_i.

    Rows [m, n], weights [m] >= 0, of which only the sum is used -> [n]. Up to `byzantine` rows may be
    anything. Raises ConsilienceError for fewer than 2 byzantine + 3 rows. Blanchard et al. 2017,
    arXiv:1703.02757.

    >>> Krum(1)(torch.tensor([[1.0], [2.0], [2.5], [4.0], [900.0]])).tolist()
    [2.0]
    """

    def choose(self, square: Tensor) -> list[int]:
        return nearest(square, self.byzantine, 1)


@dataclass(frozen=True)
class MultiKrum(_Chosen):
    """(sum w) times the mean of the `keep` rows of the smallest Krum scores (None: m - byzantine).

    Rows [m, n], weights [m] >= 0, of which only the sum is used -> [n]. Raises ConsilienceError for fewer
    than 2 byzantine + 3 rows, or than `keep`. Blanchard et al. 2017, arXiv:1703.02757.

    >>> MultiKrum(1, 2)(torch.tensor([[1.0], [2.0], [2.5], [4.0], [900.0]])).tolist()
    [2.25]
    """

    keep: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # None depends on the number of rows, which is not known before they come.
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise ConsilienceError(f"`keep` must be a whole number >= 1, or None, got {self.keep!r}.")

    @property
    def fewest_rows(self) -> int:  # type: ignore[override]
        """2 byzantine + 3, and at least `keep`."""
        return max(super().fewest_rows, self.keep or 0)

    def choose(self, square: Tensor) -> list[int]:
        return nearest(square, self.byzantine, self.keep or len(square) - self.byzantine)


@dataclass(frozen=True)
class _Distances(ScanState):
    """The squared distances [m, m] of the columns read so far."""

    square: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


@dataclass(frozen=True)
class Bulyan(_Tolerant, Blockwise):
    """(sum w) times, per coordinate, a mean of the values of trusted rows that are nearest to their median.

    It takes m - 4 byzantine values of m - 2 byzantine rows. Krum chooses these rows one after another, each
    among those that are left. Rows [m, n], weights [m] >= 0, of which only the sum is used -> [n]. Raises
    ConsilienceError for fewer than 4 byzantine + 3 rows. El Mhamdi, Guerraoui & Rouault 2018,
    arXiv:1802.07927.

    >>> Bulyan(1)(torch.tensor([[1.0], [2.0], [2.0], [2.5], [3.0], [4.0], [900.0]])).tolist()
    [2.1666667461395264]
    """

    rows_each: ClassVar[int] = 4

    def init(self, rows: int, size: int, generator: torch.Generator | None) -> _Distances:
        return _Distances(False, square=torch.zeros(rows, rows, dtype=torch.float64))

    def scan(self, rows: Tensor, offset: int, statistics: _Distances) -> _Distances:
        return replace(statistics, square=statistics.square.to(rows.device) + squares(rows))

    def settle(self, statistics: _Distances) -> _Distances:
        return replace(statistics, done=True)

    def chosen(self, square: Tensor) -> list[int]:
        """Choose m - 2 byzantine rows by repeated Krum."""
        # Scores change when a row is taken, so that one sort would not do.
        left, taken = list(range(len(square))), []
        for _ in range(len(square) - 2 * self.byzantine):
            taken.append(left.pop(nearest(square[left][:, left], self.byzantine, 1)[0]))
        return sorted(taken)

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        values = rows[self.chosen(statistics.square)].double().sort(0).values
        count = len(values)
        middle = values[(count - 1) // 2] / 2 + values[count // 2] / 2
        near = (values - middle).abs().argsort(dim=0, stable=True)[: count - 2 * self.byzantine]
        kept = values.gather(0, near).sort(0).values

        # Added one after another: the order of a reduction, and so its bits, depends on the block size.
        total = torch.zeros_like(middle)
        for value in kept:
            total = total + value / len(kept)
        return (total * weights.double().sum()).to(rows.dtype)
