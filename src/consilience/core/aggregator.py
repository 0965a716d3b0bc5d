"""Aggregators: one type for five jobs. Rows of gradients, client updates or task vectors become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError


class Aggregator(ABC):
    """rows [m, n], weights [m] -> [n]. A frozen dataclass of hyperparameters; pure; seeded by a generator.

    Contract: m equal rows g give (sum of weights) x T(g), T being the aggregator's own one-row transform (the
    identity for most; TIES trims). The result does not depend on the order of the rows, to the bit. Default
    weights are 1/m.
    """

    takes_negative_weights: ClassVar[bool] = True
    takes_entry_weights: ClassVar[bool] = False
    """Whether weights may be [m, n], one per entry."""

    fewest_rows: ClassVar[int] = 1
    most_rows: ClassVar[int | None] = None
    """The largest number of rows that it combines; None: any."""

    needs_base: ClassVar[bool] = True
    """Whether rows are deltas from a common base. Averages need none, because their coefficients sum to 1."""

    robust: ClassVar[bool] = False
    """Whether it tolerates bad rows. Messages that are not finite are then left out, with a warning."""

    @abstractmethod
    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Combine checked rows [m, n] (a tensor, or m vectors) in canonical order, weights [m] -> [n]."""

    @final
    def __call__(
        self,
        rows: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        names: Sequence[str] | None = None,
    ) -> Tensor:
        """Check the rows, put them in canonical order, combine them.

        Raises ConsilienceError for rows of different sizes, rows that are not finite (named by `names`), a
        wrong number of weights, negative weights where the aggregator takes none, or fewer rows than it
        needs.
        """
        rows, checked, _ = self.admit(rows, weights, names)
        return self.combine(rows, checked, generator)

    @final
    def admit(
        self,
        rows: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[float] | None,
        names: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Check rows and weights; return rows [m, n] and weights [m] in canonical order, and that order."""
        rows = self._checked_rows(rows, names)
        checked = self._checked_weights(weights, rows)

        # Rows that are already in order are not copied.
        order = canonical_rows(rows, checked)
        if order == list(range(len(rows))):
            return rows, checked, order
        return rows[order], checked[order], order

    def _checked_rows(self, rows: Tensor | Sequence[Tensor], names: Sequence[str] | None) -> Tensor:
        own = type(self).__name__
        if not isinstance(rows, Tensor):
            shapes = sorted({tuple(row.shape) for row in rows})
            if len(shapes) > 1:
                raise ConsilienceError(f"rows of {own} must have one size, got {shapes}.")
            if not shapes:
                raise ConsilienceError(f"{own} needs rows, got none.")
            rows = stacked(rows)

        if rows.dim() != 2 or not rows.is_floating_point():
            raise ConsilienceError(
                f"rows of {own} must be floats [m, n], got {rows.dtype} {tuple(rows.shape)}."
            )
        # After the shape, which says what counts as a row.
        self.check_count(len(rows))

        named = list(names) if names is not None else [f"row {i}" for i in range(len(rows))]
        # Sums cost a tenth of a test of all numbers, which decides only where a sum is not finite.
        maybe = [i for i, ok in enumerate(torch.isfinite(rows.sum(1)).tolist()) if not ok]
        bad = [named[i] for i in maybe if not torch.isfinite(rows[i]).all()]
        if bad:
            raise ConsilienceError(f"rows must be finite, got NaN or infinity in {', '.join(bad)}.")
        return rows

    @final
    def check_count(self, count: int, what: str = "rows") -> None:
        """Raise ConsilienceError for fewer or more rows than it combines."""
        most = self.most_rows
        if count < self.fewest_rows or (most is not None and count > most):
            needed = f"at least {self.fewest_rows}" if most is None else str(most)
            if most is not None and most > self.fewest_rows:
                needed = f"{self.fewest_rows} to {most}"
            raise ConsilienceError(f"{type(self).__name__} needs {needed} {what}, got {count}.")

    def _checked_weights(self, weights: Tensor | Sequence[float] | None, rows: Tensor) -> Tensor:
        own, rows_given = type(self).__name__, len(rows)
        # 1/m, so that the default of every aggregator is a mean and not a sum.
        if weights is None:
            return torch.full((rows_given,), 1 / rows_given, dtype=rows.dtype, device=rows.device)

        checked = torch.as_tensor(weights, dtype=rows.dtype, device=rows.device)
        if checked.shape != (rows_given,) and not (self.takes_entry_weights and checked.shape == rows.shape):
            raise ConsilienceError(
                f"weights of {own} must be [{rows_given}], one per row, got {tuple(checked.shape)}."
            )
        if not torch.isfinite(checked).all() or (not self.takes_negative_weights and (checked < 0).any()):
            rule = "finite" if self.takes_negative_weights else "finite and not negative"
            got = checked.tolist() if checked.dim() == 1 else "others"
            raise ConsilienceError(f"weights of {own} must be {rule}, got {got}.")
        return checked


class Linear(Aggregator):
    """An aggregator whose result is a weighted sum of its rows, with coefficients from an m x m Gramian.

    Over parameters with a common base the result is `Affine`, so that no delta is made.
    """

    needs_gram: ClassVar[bool] = True

    @abstractmethod
    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        """Compute coefficients [m] from the Gramian [m, m] (empty without `needs_gram`) and weights [m]."""

    def coefficients(self, rows: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        """Compute coefficients [m] for rows [m, n]."""
        gram = self.gram(rows)
        return self.weigh(gram, weights.to(gram.dtype), generator).to(rows.dtype)

    def gram(self, rows: Tensor) -> Tensor:
        """Return the inner products [m, m] of rows [m, n]; empty without `needs_gram`."""
        if not self.needs_gram:
            return rows.new_zeros(0, 0)
        return self.checked_gram(inner_products(rows).sum(0), rows)

    @final
    def checked_gram(self, gram: Tensor, rows: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Return the Gramian of rows. Raises ConsilienceError if it is not finite, and for too few rows."""
        self.check_count(len(gram))
        if not torch.isfinite(gram).all():
            # Rows that are not finite are named; others have products that are too large.
            self._checked_rows(rows, names)
            raise ConsilienceError(
                f"rows of {type(self).__name__} must have finite inner products, got an overflow."
            )
        return gram

    @final
    def solve(
        self, gram: Tensor, weights: Sequence[float], rows: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Compute coefficients [m] in the order of the rows [m, n], whose Gramian [m, m] is checked.

        It is solved in a canonical order of the rows, of which it reads only as much as decides it.
        """
        checked = self._checked_weights(weights, rows)
        order = torch.tensor(canonical_rows(rows, checked), device=gram.device)
        solved = self.weigh(gram[order][:, order], checked[order].to(gram.dtype), generator)
        return torch.empty_like(solved).index_copy_(0, order, solved).to(rows.dtype)

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        matrix = stacked(rows)
        return weighted(matrix, self.coefficients(matrix, weights, generator))


@dataclass(frozen=True)
class ScanState:
    """What the passes over the rows have found so far; `done` says that no further pass is needed.

    `columns` is the number of columns at the head of each block that the next pass reads (a sample is cheap);
    None reads all.
    """

    done: bool = True
    columns: int | None = None


class Stateful(Aggregator):
    """An aggregator that remembers something of its rows, such as how two of them agreed so far.

    Its state is a tensor per quantity, with a first axis over the rows, which are known again by their names.
    Without a state it is a pure function, as other aggregators are, which starts afresh at each call.
    """

    @abstractmethod
    def init(self, rows: int) -> dict[str, Tensor]:
        """Return the state before the first call: [rows, ...] each."""

    @abstractmethod
    def move(
        self, rows: Tensor, weights: Tensor, state: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Combine rows [m, n] by weights [m] and the state, and return the result [n] and the next state."""

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        return self.move(stacked(rows), weights, self.init(len(rows)), generator)[0]

    @final
    def advance(
        self,
        rows: Tensor,
        weights: Sequence[float],
        names: Sequence[str],
        state: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Combine rows [m, n] in the order of their names, and return the result [n] with the next state.

        Raises ConsilienceError for rows that are not those of the state, and as a call does.
        """
        order, held = self.known(names, state)
        ordered = self._checked_rows(rows[order], [names[i] for i in order])
        return self.move(
            ordered, self._checked_weights([weights[i] for i in order], ordered), held, generator
        )

    @final
    def known(self, names: Sequence[str], state: Mapping[str, Tensor]) -> tuple[list[int], dict[str, Tensor]]:
        """Return the order of rows by their names, and their state, which may be empty at first.

        Raises ConsilienceError for rows that are not those of the state.
        """
        if len(set(names)) < len(names):
            raise ConsilienceError(
                f"{type(self).__name__} must know its rows by their names, got {', '.join(sorted(names))}."
            )
        held = dict(state) or self.init(len(names))
        if any(len(tensor) != len(names) for tensor in held.values()):
            raise ConsilienceError(
                f"{type(self).__name__} remembers {len(next(iter(held.values())))} rows, and cannot go on "
                f"with the {len(names)} of {', '.join(sorted(names))}; use an aggregator without a state."
            )
        return sorted(range(len(names)), key=names.__getitem__), held


class StatefulLinear(Stateful, Linear):
    """A stateful aggregator whose coefficients need the Gramian of its rows alone."""

    @abstractmethod
    def move_weights(
        self, gram: Tensor, weights: Tensor, state: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute coefficients [m] from the Gramian [m, m], weights [m] and the state, and its next one."""

    @final
    def advance_weights(
        self,
        gram: Tensor,
        weights: Sequence[float],
        names: Sequence[str],
        state: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Do as `advance` with a checked Gramian [m, m], and return coefficients [m] with the next state."""
        order, held = self.known(names, state)
        index = torch.tensor(order, device=gram.device)
        checked = self._checked_weights(weights, gram)[index]
        solved, moved = self.move_weights(gram[index][:, index], checked, held, generator)
        return torch.empty_like(solved).index_copy_(0, index, solved), moved

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.move_weights(gram, weights, self.init(len(weights)), generator)[0]

    def move(
        self, rows: Tensor, weights: Tensor, state: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gram = self.gram(rows)
        coefficients, moved = self.move_weights(gram, weights.to(gram.dtype), state, generator)
        return weighted(rows, coefficients.to(rows.dtype)), moved


class Blockwise(Aggregator):
    """An aggregator that works out of core: `scan` reads blocks of rows until done, `apply` makes each block.

    The result does not depend on the size of the blocks; tensors of a file and rows in memory use the same
    code.
    """

    # So few that all rows of a block stay in the processor's cache.
    block: ClassVar[int] = 1 << 16
    """Columns per block."""

    def init(self, rows: int, size: int, generator: torch.Generator | None) -> Any:
        """Return the `ScanState` of `rows` rows of `size` columns before any is read."""
        return ScanState()

    def scan(self, rows: Tensor, offset: int, statistics: Any) -> Any:
        """Add a block [m, b] from column `offset` on to the state of this pass. Blocks come in order."""
        return statistics

    def settle(self, statistics: Any) -> Any:
        """Return the state at the end of a pass."""
        return statistics

    @abstractmethod
    def apply(self, rows: Tensor, weights: Tensor, offset: int, statistics: Any) -> Tensor:
        """Combine a block [m, b] into [b] by the finished state; weights are [m], or [m, b] if per entry."""

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        matrix = stacked(rows)
        count, size = matrix.shape
        state = self.init(count, size, generator)
        while not state.done:
            for start in range(0, size, self.block):
                stop = start + min(self.block, state.columns or self.block)
                state = self.scan(matrix[:, start:stop], start, state)
            state = self.settle(state)

        # Weights per entry are cut into the same blocks as the rows.
        made = torch.empty_like(matrix[0])
        for start in range(0, size, self.block):
            part = slice(start, start + self.block)
            made[part] = self.apply(
                matrix[:, part], weights if weights.dim() == 1 else weights[:, part], start, state
            )
        return made


class Cone(Aggregator):
    """An aggregator that also honours constraints: a direction that no constraint row opposes (GEM, A-GEM).

    The objectives' own direction is their weighted mean.
    """

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        return weighted(stacked(rows), weights)

    @abstractmethod
    def project(self, direction: Tensor, constraints: Tensor) -> Tensor:
        """Move the direction [n] so that constraints [k, n] @ direction >= 0."""


# Sums of rows. Two rounding rules, since their users need different things: `weighted` must cancel opposite
# rows, `Affine` must be fast over parameters that do not fit in memory.


def weighted(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Compute sum_i c_i row_i [n]; one row with coefficient 1 is taken as it is.

    Products are rounded before they are added, so that opposite rows cancel on every processor (a fused c @
    rows leaves 1e-8 on some). Differentiable, and reads no value back if there is more than one row.
    """
    if len(rows) == 1 and float(coefficients[0]) == 1.0:
        return rows[0].clone()
    total = rows[0] * coefficients[0]
    for row, coefficient in zip(rows[1:], coefficients[1:], strict=True):
        total += row * coefficient
    return total


ROUNDING = 1e-6
"""Coefficients whose sum differs from 1 by less count as summing to 1."""


@dataclass(frozen=True)
class Affine:
    """sum_i c_i theta_i + (1 - sum_i c_i) base: a linear aggregator's result on parameters themselves.

    Rounding rule. One row with c = 1, or the base if all c are 0, is taken as it is, to the bit (`copied`).
    Otherwise the terms are added in the order of the rows, the base last. Each product is added as
    `torch.add` does with `alpha`: in one rounding where the processor has a fused instruction. Two flags
    change the rule:

    factored: equal coefficients c multiply the sum of the rows once, c sum_i theta_i. It is faster.
    by_changes: base + sum_i c_i (theta_i - base). Large coefficients that cancel lose fewer digits.
    """

    coefficients: tuple[float, ...]
    base_share: float
    """The coefficient of the base, 1 - sum_i c_i; 0 if that is only rounding error."""
    factored: bool = False
    by_changes: bool = False

    def __post_init__(self) -> None:
        # Averages then need no base at all, and neither read nor add it.
        if abs(self.base_share) < ROUNDING:
            object.__setattr__(self, "base_share", 0.0)

    @property
    def copied(self) -> Literal["row", "base"] | None:
        """Which model is the result as it is: the only row, the base, or None."""
        if not any(self.coefficients):
            return "base"
        return "row" if self.coefficients == (1.0,) and not self.base_share else None

    def add(self, rows: Iterable[Tensor], base: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Add up rows [b] and the base [b] into [b], in `out` if given; a base of coefficient 0 may be None.

        Rows may share a buffer, because each is used before the next is taken; `by_changes` overwrites it.
        The first row may be `out` itself, unless it is taken `by_changes`.
        """
        terms = zip(rows, self.coefficients, strict=True)

        # The base comes last: it is large compared with the changes, and would swallow their digits.
        if self.by_changes:
            assert base is not None
            total = torch.zeros_like(base) if out is None else out.zero_()
            for row, coefficient in terms:
                total.add_(row.sub_(base), alpha=coefficient)
            return total.add_(base)

        first, coefficient = next(terms)
        total = torch.empty_like(first) if out is None else out
        if self.factored:
            total.copy_(first)
            for row, _ in terms:
                total.add_(row)
            total.mul_(coefficient)
        else:
            torch.mul(first, coefficient, out=total)
            for row, coefficient in terms:
                total.add_(row, alpha=coefficient)
        return total.add_(base, alpha=self.base_share) if self.base_share and base is not None else total


def canonical(heads: Sequence[tuple[float, ...]], pieces: Iterable[Callable[[int], bytes]] = ()) -> list[int]:
    """Order rows by their content alone, so that a sum over them has the same bits however they arrive.

    `heads` holds a few numbers per row (its first entries, its weight), which nearly always differ. Rows of
    equal heads are ordered by their bytes: each of `pieces` gives those of a part of row i. Pieces are read
    only while rows are tied.

    >>> canonical([(2.0,), (1.0,), (1.0,)], [lambda i: b"cba"[i : i + 1]])
    [2, 1, 0]
    """
    # Groups of tied rows, in order; they only split further.
    groups = _split(range(len(heads)), heads.__getitem__)
    if len(groups) < len(heads):
        for content in pieces:
            groups = [part for group in groups for part in _split(group, content)]
            if len(groups) == len(heads):
                break
    return [i for group in groups for i in group]


def _split(group: Sequence[int], content: Callable[[int], Any]) -> list[Sequence[int]]:
    """Divide a group of tied rows by a further part of their content, in its order."""
    if len(group) == 1:
        return [group]
    found: dict[Any, list[int]] = {}
    for i in group:
        found.setdefault(content(i), []).append(i)
    return [found[value] for value in sorted(found)]


def canonical_rows(rows: Tensor, weights: Tensor) -> list[int]:
    """Order rows [m, n] in memory by their content, and by their weights [m] or [m, n]."""
    if len(rows) == 1:
        return [0]
    heads = [tuple(head) for head in rows[:, :4].tolist()]
    # Weights per entry are as long as the rows: they count only where rows are equal.
    if weights.dim() > 1:
        return canonical(heads, [lambda i: _bytes(rows[i]), lambda i: _bytes(weights[i])])
    heads = [(*head, weight) for head, weight in zip(heads, weights.tolist(), strict=True)]
    return canonical(heads, [lambda i: _bytes(rows[i])])


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


# Inner products.

COLUMNS = 1 << 14
"""Columns whose inner products a processor takes at once: those of all rows then stay in its cache."""


def inner_products(rows: Tensor, spans: Sequence[slice] = (slice(None),)) -> Tensor:
    """Return the inner products [spans, m, m] of rows [m, n] over each of some spans of columns.

    Products of narrow dtypes overflow early, and their sums lose most digits: they are taken in float32.

    >>> inner_products(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [slice(0, 1), slice(1, 2)]).tolist()
    [[[1.0, 3.0], [3.0, 9.0]], [[4.0, 8.0], [8.0, 16.0]]]
    """
    found = []
    for span in spans:
        part = rows[:, span]
        wide = [
            widened(block) for block in (part.split(COLUMNS, 1) if part.device.type == "cpu" else (part,))
        ]
        each = [block @ block.T for block in wide]
        # Many blocks are added in double precision, as one long product would not be.
        found.append(each[0] if len(each) == 1 else torch.stack(each).double().sum(0).to(each[0].dtype))
    if not found:
        return widened(rows.new_zeros(0, len(rows), len(rows)))
    grams = torch.stack(found)
    # Some processors add up the two halves of a product in different orders.
    return (grams + grams.mT) / 2


# Shapes and dtypes of rows.


def stacked(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """Return rows as one matrix [m, n]."""
    return rows if isinstance(rows, Tensor) else torch.stack(list(rows))


def widened(rows: Tensor) -> Tensor:
    """Return rows in a dtype of full arithmetic: float32 or float64 as they are, narrower ones as float32."""
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
