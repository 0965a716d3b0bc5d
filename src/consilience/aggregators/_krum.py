"""Rows chosen by their distances to the others: Krum, multi-Krum, Bulyan."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Blockwise, Known, Linear
from consilience.core.errors import ConsilienceError

BLOCK = 1 << 20


def squares(rows: Tensor) -> Tensor:
    """||g_i - g_j||^2 [m, m] in float64, from the differences themselves: near rows keep their distance beside huge ones.

    What is too far for float64 is infinite, never NaN.
    """
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in rows.split(BLOCK, 1):
        wide = block.double()
        total += torch.stack([(wide - row).square().sum(1) for row in wide])
    return total


def scores(square: Tensor, byzantine: int) -> Tensor:
    """Krum's scores [k]: the sum of the k - byzantine - 2 (at least one, where there is another) smallest squares to other rows."""
    k = len(square)
    near = min(max(k - byzantine - 2, 1), k - 1)
    own = torch.eye(k, dtype=torch.bool, device=square.device)
    return square.masked_fill(own, -1.0).sort(1).values[:, 1 : near + 1].sum(1)


def nearest(square: Tensor, byzantine: int, keep: int) -> list[int]:
    """The `keep` rows of the smallest scores; of equal ones the first."""
    return scores(square, byzantine).argsort(stable=True)[:keep].tolist()


@dataclass(frozen=True)
class _Tolerant(Aggregator):
    """Tolerates `byzantine` rows that may be anything."""

    takes_negative_weights: ClassVar[bool] = False
    robust: ClassVar[bool] = True
    rows_each: ClassVar[int] = 2

    byzantine: int

    def __post_init__(self) -> None:
        if not isinstance(self.byzantine, int) or self.byzantine < 0:
            raise ConsilienceError(
                f"`byzantine` should be a whole number >= 0. Found `byzantine = {self.byzantine!r}`."
            )

    @property
    def fewest_rows(self) -> int:  # type: ignore[override]
        """2 byzantine + 3; of Bulyan 4 byzantine + 3."""
        return self.rows_each * self.byzantine + 3


@dataclass(frozen=True)
class _Chosen(_Tolerant, Linear):
    """The mean of chosen rows times the sum of weights. Of the weights only the sum is used: a liar may claim any size."""

    @abstractmethod
    def choose(self, square: Tensor) -> list[int]:
        """Which rows, from their squared distances [m, m]."""

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        g = gram.double()
        return self._coefficients((g.diagonal()[:, None] + g.diagonal() - 2 * g).clamp(min=0), weights)

    def coefficients(self, rows: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        return self._coefficients(squares(rows), weights)

    def _coefficients(self, square: Tensor, weights: Tensor) -> Tensor:
        chosen = self.choose(square)
        c = torch.zeros_like(weights)
        c[chosen] = weights.sum() / len(chosen)
        return c


@dataclass(frozen=True)
class Krum(_Chosen):
    """(sum w) g_k, with k = argmin_i sum of ||g_i - g_j||^2 over the m - byzantine - 2 rows nearest to g_i.

    Rows [m, n], weights [m] >= 0, of which only the sum is used -> [n]. Up to `byzantine` rows may be anything. Raises
    ConsilienceError for fewer than 2 byzantine + 3 rows. Blanchard et al. 2017, arXiv:1703.02757.

    >>> Krum(1)(torch.tensor([[1.0], [2.0], [2.5], [4.0], [900.0]])).tolist()
    [2.0]
    """

    def choose(self, square: Tensor) -> list[int]:
        return nearest(square, self.byzantine, 1)


@dataclass(frozen=True)
class MultiKrum(_Chosen):
    """(sum w) times the mean of the `keep` rows of the smallest Krum scores (None: m - byzantine).

    Rows [m, n], weights [m] >= 0, of which only the sum is used -> [n]. Raises ConsilienceError for fewer than
    2 byzantine + 3 rows, or than `keep`. Blanchard et al. 2017, arXiv:1703.02757.

    >>> MultiKrum(1, 2)(torch.tensor([[1.0], [2.0], [2.5], [4.0], [900.0]])).tolist()
    [2.25]
    """

    keep: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise ConsilienceError(
                f"`keep` should be a whole number >= 1, or None. Found `keep = {self.keep!r}`."
            )

    @property
    def fewest_rows(self) -> int:  # type: ignore[override]
        """2 byzantine + 3, and `keep`."""
        return max(super().fewest_rows, self.keep or 0)

    def choose(self, square: Tensor) -> list[int]:
        return nearest(square, self.byzantine, self.keep or len(square) - self.byzantine)


@dataclass(frozen=True)
class _Distances(Known):
    """What Bulyan scans: the squared distances [m, m]."""

    square: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


@dataclass(frozen=True)
class Bulyan(_Tolerant, Blockwise):
    """(sum w) times, in every coordinate, the mean of the m - 4 byzantine values nearest to the median of m - 2 byzantine rows.

    These rows are chosen one after another by Krum among those that are left. Rows [m, n], weights [m] >= 0, of which only the
    sum is used -> [n]. Raises ConsilienceError for fewer than 4 byzantine + 3 rows. El Mhamdi, Guerraoui & Rouault 2018, arXiv:1802.07927.

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
        """The m - 2 byzantine rows that repeated Krum takes."""
        left, taken = list(range(len(square))), []
        for _ in range(len(square) - 2 * self.byzantine):
            taken.append(left.pop(nearest(square[left][:, left], self.byzantine, 1)[0]))
        return sorted(taken)

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        values = rows[self.chosen(statistics.square)].double().sort(0).values
        k = len(values)
        middle = values[(k - 1) // 2] / 2 + values[k // 2] / 2
        near = (values - middle).abs().argsort(dim=0, stable=True)[: k - 2 * self.byzantine]
        kept = values.gather(0, near).sort(0).values
        total = torch.zeros_like(middle)
        for x in kept:  # one after another: the same bits for any block
            total = total + x / len(kept)
        return (total * weights.double().sum()).to(rows.dtype)
