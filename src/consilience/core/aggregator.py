"""Aggregators: one type for five jobs. Rows of gradients, of client updates, of task vectors, into one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError


class Aggregator(ABC):
    """rows [m, n], weights [m] -> [n]. Frozen dataclasses of hyperparameters; pure; seeded by an explicit generator.

    Contract: m equal rows g give (sum of weights) x T(g), T being the aggregator's own one-row transform (the identity
    for most; TIES trims). The result does not depend on the order of the rows, to the bit.
    Default weights are 1/m.
    """

    takes_negative_weights: ClassVar[bool] = True
    takes_entry_weights: ClassVar[bool] = False
    """Whether weights may be [m, n], one an entry."""

    fewest_rows: ClassVar[int] = 1
    needs_base: ClassVar[bool] = True
    """Whether rows are deltas from a common base; only averages, whose coefficients sum to 1, need none."""

    robust: ClassVar[bool] = False
    """Whether it withstands bad rows: of what is heard, messages that are not finite are then left out, with a warning."""

    @abstractmethod
    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """The result [n] for checked rows [m, n] (a tensor, or m vectors) in a canonical order and weights [m]."""

    @final
    def __call__(
        self,
        rows: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        names: Sequence[str] | None = None,
    ) -> Tensor:
        """Check the rows, put them in a canonical order, combine them.

        Raises ConsilienceError for rows of different sizes, non-finite rows (named by `names`), weights of another
        number, negative ones where the aggregator wants none, or fewer rows than it needs.
        """
        rows, w, _ = self.admit(rows, weights, names)
        return self.combine(rows, w, generator)

    @final
    def admit(
        self,
        rows: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[float] | None,
        names: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor, list[int]]:
        """The door: checked rows [m, n] and weights [m] in a canonical order, and that order."""
        own = type(self).__name__
        if not isinstance(rows, Tensor):
            if len({r.shape for r in rows}) > 1:
                raise ConsilienceError(
                    f"rows for {own} should have one size. Found {sorted({tuple(r.shape) for r in rows})}."
                )
            if not rows:
                raise ConsilienceError(f"{own} should be given rows. Found none.")
            rows = torch.stack(list(rows))
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ConsilienceError(
                f"rows for {own} should be floats [m, n]. Found {rows.dtype} {tuple(rows.shape)}."
            )
        m = len(rows)
        if m < self.fewest_rows:
            raise ConsilienceError(f"{own} should be given at least {self.fewest_rows} rows. Found {m}.")
        named = list(names) if names is not None else [f"row {i}" for i in range(m)]
        bad = [named[i] for i, ok in enumerate(torch.isfinite(rows).all(1).tolist()) if not ok]
        if bad:
            raise ConsilienceError(f"rows should be finite. Found NaN or infinity in {', '.join(bad)}.")
        if weights is None:
            w = torch.full((m,), 1 / m, dtype=rows.dtype, device=rows.device)
        else:
            w = torch.as_tensor(weights, dtype=rows.dtype, device=rows.device)
        if w.shape != (m,) and not (self.takes_entry_weights and w.shape == rows.shape):
            raise ConsilienceError(f"weights for {own} should be [{m}], one a row. Found {tuple(w.shape)}.")
        if not torch.isfinite(w).all() or (not self.takes_negative_weights and (w < 0).any()):
            rule = "finite" if self.takes_negative_weights else "finite and not negative"
            raise ConsilienceError(
                f"weights for {own} should be {rule}. Found {w.tolist() if w.dim() == 1 else 'others'}."
            )
        order = canonical(rows, w)
        return (rows, w, order) if order == list(range(m)) else (rows[order], w[order], order)


class Linear(Aggregator):
    """An aggregator whose result is a weighted sum of its rows: only coefficients are computed, from an m x m Gramian.

    Over parameters p_i with a common base the result is sum c_i p_i + (1 - sum c) base, so no delta is ever made.
    """

    needs_gram: ClassVar[bool] = True

    @abstractmethod
    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        """Coefficients [m] from the Gramian [m, m] (empty where `needs_gram` is False) and weights [m]."""

    def coefficients(self, rows: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        """Coefficients [m] for rows [m, n]."""
        if not self.needs_gram:
            return self.weigh(rows.new_zeros(0, 0), weights, generator)
        wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        gram = wide @ wide.T
        if not torch.isfinite(gram).all():
            raise ConsilienceError(
                f"rows for {type(self).__name__} should have finite inner products. Found an overflow."
            )
        return self.weigh(gram, weights.to(wide.dtype), generator).to(rows.dtype)

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        stacked = rows if isinstance(rows, Tensor) else torch.stack(list(rows))
        return weighted(stacked, self.coefficients(stacked, weights, generator))


@dataclass(frozen=True)
class Known:
    """What passes over the rows found out: `done` says that no further one is needed.

    `columns` says how many columns at the head of each block the next pass wants, None for all (a sample costs little).
    """

    done: bool = True
    columns: int | None = None


class Blockwise(Aggregator):
    """An aggregator that works out of core: `scan` reads the rows block by block until it is done, then `apply` makes each block.

    The result does not depend on the size of the blocks; a file's tensors and rows in memory go through the same code.
    """

    block: ClassVar[int] = 1 << 16
    """Columns at once: so few that all rows of a block stay in a processor's cache."""

    def init(self, rows: int, size: int, generator: torch.Generator | None) -> Any:
        """What is known of `rows` rows of `size` columns before they are read: a `Known`."""
        return Known()

    def scan(self, rows: Tensor, offset: int, statistics: Any) -> Any:
        """Fold the block rows [m, b], whose first column is `offset`, into the statistics of this pass. Blocks come in order."""
        return statistics

    def settle(self, statistics: Any) -> Any:
        """The statistics at the end of a pass."""
        return statistics

    @abstractmethod
    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        """The result [b] of a block [m, b] from the finished statistics; weights are [m], or [m, b] where each entry has its own."""

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        stacked = rows if isinstance(rows, Tensor) else torch.stack(list(rows))
        m, n = stacked.shape
        known = self.init(m, n, generator)
        while not known.done:
            for o in range(0, n, self.block):
                known = self.scan(stacked[:, o : o + min(self.block, known.columns or self.block)], o, known)
            known = self.settle(known)
        made = torch.empty_like(stacked[0])
        for o in range(0, n, self.block):
            part = slice(o, o + self.block)
            made[part] = self.apply(
                stacked[:, part], weights if weights.dim() == 1 else weights[:, part], o, known
            )
        return made


class Cone(Aggregator):
    """An aggregator that also honours constraints: a direction that no constraint row opposes (GEM, A-GEM)."""

    @abstractmethod
    def project(self, direction: Tensor, constraints: Tensor) -> Tensor:
        """The direction [n] moved so that constraints [k, n] @ direction >= 0."""


def weighted(rows: Tensor, coefficients: Tensor) -> Tensor:
    """sum_i c_i row_i [n]; one row with coefficient 1 is taken as it is.

    Products are rounded before they are added, so that opposite rows cancel on every processor (a fused c @ rows leaves 1e-8 on some).
    """
    if len(rows) == 1 and float(coefficients[0]) == 1.0:
        return rows[0].clone()
    total = rows[0] * coefficients[0]
    for row, c in zip(rows[1:], coefficients[1:], strict=True):
        total += row * c
    return total


def canonical(rows: Tensor, weights: Tensor) -> list[int]:
    """An order of the rows that depends on their content alone: by their first elements, then by all their bytes."""
    if len(rows) == 1:
        return [0]
    heads = rows[:, :4].tolist()
    w = weights.tolist()
    keys = [(*heads[i], *(() if weights.dim() > 1 else (w[i],))) for i in range(len(rows))]
    if len(set(keys)) == len(keys):
        return sorted(range(len(rows)), key=keys.__getitem__)

    def content(t: Tensor) -> bytes:
        return t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()

    bytes_of = [
        (keys[i], content(rows[i]), content(weights[i]) if weights.dim() > 1 else b"")
        for i in range(len(rows))
    ]
    return sorted(range(len(rows)), key=bytes_of.__getitem__)
