"""Trim, elect signs, merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from consilience.aggregators._select import Selection
from consilience.core.aggregator import Blockwise, widened
from consilience.core.errors import ConsilienceError
from consilience.core.shares import exact_share


@dataclass(frozen=True)
class Ties(Blockwise):
    """TIES: trim each row, elect a sign per entry, and average the values of that sign.

    Trim keeps the ceil(density n) largest magnitudes of each row over the whole vector (of equal ones, those
    of lowest index); the elected sign s has the larger sum of w_i |trimmed_i|; the result is (sum_i w_i)
    sum_A w_i trimmed_i / sum_A w_i over the rows A whose sign is s.

    Rows [m, n], weights [m] >= 0 -> [n]. Where no sign wins the result is 0. At weights 1/m it is the mean
    over those that agree; the paper's lambda is `arithmetic`'s coefficient. Its one-row transform is the
    trim. Exact and out of core. Raises ConsilienceError for a density outside (0, 1]. Yadav et al. 2023,
    arXiv:2306.01708.

    >>> Ties(0.5)(torch.tensor([[4.0, 1.0, -3.0, 0.5], [2.0, 1.0, 6.0, 0.5]])).tolist()
    [3.0, 0.0, 6.0, 0.0]
    """

    density: float = 0.2

    takes_negative_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConsilienceError(f"`density` must be in (0, 1], got {self.density}.")

    def kept(self, size: int) -> int:
        """Count the entries that a row of `size` keeps: ceil(density * size)."""
        return math.ceil(exact_share(self.density, size))

    def init(self, rows: int, size: int, generator: torch.Generator | None) -> Selection:
        return Selection.begin(rows, size, self.kept(size), self.block)

    def scan(self, rows: Tensor, offset: int, statistics: Any) -> Selection:
        return statistics.scan(widened(rows), offset)  # type: ignore[no-any-return]

    def settle(self, statistics: Any) -> Selection:
        return statistics.settle()  # type: ignore[no-any-return]

    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        wide, total = widened(rows), float(weights.sum())
        shares = [weight / total for weight in weights.tolist()] if total else [0.0] * len(wide)
        size, dtype = wide.shape[1], np.float64 if wide.dtype == torch.float64 else np.float32

        # Equal weights cancel in the average, so that bytes can count the rows of each sign.
        equal = len(set(shares)) == 1 and len(wide) < 256
        mass, counts = np.zeros((2, size), dtype), np.zeros((2, size), np.uint8 if equal else dtype)
        part: npt.NDArray[Any] = np.empty(size, dtype)
        there = np.empty(size, bool)

        # mass[0] sums the positive values and mass[1] the negative ones. Both buffers serve all rows.
        for i, (row, share) in enumerate(zip(wide, shares, strict=True)):
            kept = statistics.trim(row, i, offset).cpu().numpy()
            for sign, (clip, has) in enumerate(((np.maximum, np.greater), (np.minimum, np.less))):
                clip(kept, 0, out=part)
                has(kept, 0, out=there)
                if equal:
                    counts[sign] += there.view(np.uint8)
                else:
                    part *= dtype(share)
                    counts[sign] += there * dtype(share)
                mass[sign] += part

        wins = np.greater(mass[0], -mass[1], out=there)
        loses = mass[0] < -mass[1]
        # Where no sign wins both factors are 0; `tiny` keeps 0 / 0 from being NaN.
        merged = (mass[0] * wins + mass[1] * loses) * dtype(total)
        merged /= np.maximum(counts[0] * wins + counts[1] * loses, np.finfo(dtype).tiny)
        return torch.from_numpy(merged).to(rows.device, rows.dtype)
