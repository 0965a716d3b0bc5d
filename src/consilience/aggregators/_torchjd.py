"""torchjd's aggregators."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Linear, Stateful, stacked, widened
from consilience.core.errors import ConsilienceError, unknown

SCALED = ("CAGrad", "DualProj", "UPGrad")
"""Those that take rows below a fixed length for zero: UPGrad of short gradients would be their mean."""


@dataclass(frozen=True)
class TorchJD(Aggregator):
    """One of torchjd's aggregators A, by class name: (sum_i w_i) A(rows) / k with k = A(m rows of 1).

    k is 1 for those that average and m for those that sum, so that m equal rows give (sum w) g (FairGrad,
    whose step does not grow with g's length: (sum w) A(g)).

    Rows [m, n], weights [m] >= 0 -> [n]. If A takes a `pref_vector` that is not given, it gets w_i / sum w;
    otherwise only the sum of the weights is used. Lists of numbers among the arguments become vectors. The
    random state is forked and seeded from the generator (0 if none is given). Raises ConsilienceError for
    unknown names and arguments, for missing packages, and for matrices that A refuses. Those that keep a
    state are of `TorchJDStateful`. Quinton and Rey 2024, arXiv:2406.16232.

    >>> TorchJD("IMTLG")(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [0.5, 0.5]
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    takes_negative_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # Built once and dropped, so that wrong arguments are refused before any work.
        self._build(self.kind(), {})

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        given = stacked(rows).detach()
        matrix = widened(given)
        weights = weights.to(matrix.dtype)
        total = weights.sum()
        if total == 0 or not matrix.shape[1]:
            return torch.zeros_like(given[0])
        run = self._runner(weights, generator)
        scale = self._scale(matrix.square().sum(1))
        made = run(matrix / scale) * scale
        unit = self._checked_unit(run(torch.ones_like(matrix[:, :1]))[0])
        return (made * (total / unit)).to(given.dtype)

    def _scale(self, squares: Tensor) -> float:
        """Return by what rows of these squared lengths [m] are divided."""
        largest = float(squares.max()) if self.name in SCALED else 1.0
        if not 0 < largest < math.inf:
            return 1.0
        # A power of two, by which numbers are divided without rounding.
        return 2.0 ** round(math.log2(largest) / 2)

    def _checked_unit(self, unit: Tensor) -> Tensor:
        """Check the result of A for rows of 1, by which its results are divided."""
        if not (unit > 0 and torch.isfinite(unit)):
            raise ConsilienceError(
                f"torchjd's {self.name} must keep the direction of equal rows, got the factor {float(unit)}."
            )
        return unit

    def _runner(
        self, weights: Tensor, generator: torch.Generator | None, of: Callable[[Any], Any] = lambda a: a
    ) -> Callable[[Tensor], Tensor]:
        """Return A, or the part `of` A, as a function of a matrix."""
        kind = self.kind()
        open_arguments = inspect.signature(kind).parameters.keys() - dict(self.arguments).keys()
        preference = {"pref_vector": weights / weights.sum()} if "pref_vector" in open_arguments else {}

        # One seed for all calls, so that rows and rows of 1 meet the same draws.
        seed = 0
        if generator is not None:
            seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        return lambda matrix: self._run(kind, preference, matrix, seed, of)

    def _run(
        self, kind: Any, preference: dict[str, Any], rows: Tensor, seed: int, of: Callable[[Any], Any]
    ) -> Tensor:
        aggregator = of(self._build(kind, preference, rows))
        # torchjd draws from the global generators, whose state must stay the caller's.
        with torch.random.fork_rng([rows.device] if rows.is_cuda else []), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            if rows.is_cuda:
                with torch.cuda.device(rows.device):
                    torch.cuda.manual_seed(seed)
            # torchjd says by a ValueError which matrices an aggregator takes.
            try:
                result: Tensor = aggregator(rows)
                return result
            except ValueError as error:
                raise ConsilienceError(
                    f"torchjd's {self.name} refuses rows of shape {tuple(rows.shape)}: {error}"
                ) from error

    def kind(self) -> Any:
        """Return torchjd's class, or raise an error that says what to do."""
        try:
            import torchjd.aggregation as there
        except ImportError as error:
            raise ConsilienceError(
                f"{self.name!r} needs torchjd ({error}): pip install 'consilience[torchjd]'."
            ) from error

        # The abstract classes share a module; those of other modules can be built.
        exported = {name: getattr(there, name) for name in there.__all__}
        concrete = {
            name: kind
            for name, kind in exported.items()
            if isinstance(kind, type)
            and issubclass(kind, there.Aggregator)
            and kind.__module__ != there.Aggregator.__module__
        }
        if self.name not in concrete:
            raise unknown("torchjd", self.name, list(concrete))
        return concrete[self.name]

    def _build(self, kind: Any, preference: dict[str, Any], like: Tensor | None = None) -> Any:
        like = torch.zeros(1, 0) if like is None else like
        given = {
            name: like.new_tensor(value) if isinstance(value, (list, tuple)) else value
            for name, value in self.arguments
        }
        if "n_tasks" in inspect.signature(kind).parameters:
            given = {"n_tasks": len(like), **given}
        try:
            return kind(**given, **preference)
        except ImportError as error:
            raise ConsilienceError(
                f"torchjd's {self.name} needs a package that is not installed: {error}"
            ) from error
        except (TypeError, ValueError) as error:
            raise ConsilienceError(
                f"arguments of torchjd's {self.name} must be {inspect.signature(kind)}: {error}"
            ) from error


@dataclass(frozen=True)
class TorchJDLinear(TorchJD, Linear):
    """One of torchjd's aggregators whose weights depend on the Gramian alone, as those of most do.

    It is `TorchJD`, and gives its coefficients without the rows: (sum w) a(G) / sum a(1), with a its
    weighting and 1 the Gramian of rows of 1. Rows [m, n], weights [m] >= 0 -> [n]; Gramian [m, m] ->
    coefficients [m]. Raises what `TorchJD` raises.

    >>> TorchJDLinear("IMTLG").weigh(torch.eye(2), torch.tensor([0.5, 0.5]), None).tolist()
    [0.5, 0.5]
    """

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        total = weights.sum()
        if total == 0:
            return torch.zeros_like(weights)
        run = self._runner(weights, generator, operator.attrgetter("gramian_weighting"))
        made = run(gram.detach() / self._scale(gram.detach().diagonal()) ** 2)
        unit = self._checked_unit(run(torch.ones_like(gram)).sum())
        return made * (total / unit)


@dataclass(frozen=True)
class TorchJDStateful(TorchJD, Stateful):
    """One of torchjd's aggregators that keep a state: ExcessMTL, GradVac, NashMTL and those to come.

    It is `TorchJD` with the buffers and counts of theirs as its state, which is kept in checkpoints; that of
    ExcessMTL is as large as all rows. `n_tasks` is known from the rows. NashMTL cuts its result to the length
    `max_norm`, 1 if it is not given, so that its step does not grow with g's length; 0 does not cut. Rows
    [m, n], weights [m] >= 0 -> [n]. Raises what `TorchJD` raises.

    >>> TorchJDStateful("GradVac")(torch.tensor([[1.0, 0.0], [-1.0, 1.0]])).tolist()
    [0.25, 0.75]
    """

    def init(self, rows: int) -> dict[str, Tensor]:
        # Theirs makes it at the first call, when it knows how long rows are.
        return {}

    def move(
        self, rows: Tensor, weights: Tensor, state: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        matrix, held = widened(rows.detach()), dict(state)

        def stateful(aggregator: Any) -> Any:
            def run(given: Tensor) -> Tensor:
                if state:
                    # A first call gives the state its form, of which the values are then replaced.
                    with torch.random.fork_rng([given.device] if given.is_cuda else []):
                        aggregator(given)
                    remember(aggregator, state)
                result: Tensor = aggregator(given)
                held.clear()
                held.update(remembered(aggregator, len(given)))
                return result

            return run

        total = weights.to(matrix.dtype).sum()
        made = self._runner(weights, generator, stateful)(matrix)
        unit = self._checked_unit(self._runner(weights, generator)(torch.ones_like(matrix[:, :1]))[0])
        return (made * (total / unit)).to(rows.dtype), held


def remembered(aggregator: Any, rows: int) -> dict[str, Tensor]:
    """Return the buffers, arrays and numbers of torchjd's aggregator [rows, ...]; each row has the number."""
    found = {}
    for path, module in aggregator.named_modules():
        values = {**vars(module), **module._buffers}
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[f"{path}.{name}"] = torch.full((rows,), float(value), dtype=torch.float64)
            elif isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) == rows:
                found[f"{path}.{name}"] = torch.as_tensor(value).clone()
    return found


def remember(aggregator: Any, state: dict[str, Tensor]) -> None:
    """Write what `remembered` returned into torchjd's aggregator that was called once."""
    for path, module in aggregator.named_modules():
        values = {**vars(module), **module._buffers}
        for name, value in values.items():
            held = state.get(f"{path}.{name}")
            if held is None:
                if name in module._buffers:
                    setattr(module, name, None)
            elif isinstance(value, (int, float)):
                setattr(module, name, type(value)(held[0]))
            elif isinstance(value, np.ndarray):
                setattr(module, name, held.cpu().numpy().astype(value.dtype))
            else:
                setattr(module, name, held if value is None else held.to(value))


def of_name(name: str, arguments: dict[str, Any]) -> TorchJD:
    """Build torchjd's aggregator of that name, as `TorchJDStateful` or `TorchJDLinear` if it is one."""
    made = TorchJD(name, tuple(sorted(arguments.items())))
    # Imported after `made`, whose error says how to install torchjd.
    from torchjd import Stateful as Remembers
    from torchjd.aggregation import GramianWeightedAggregator

    if issubclass(made.kind(), Remembers):
        return TorchJDStateful(made.name, made.arguments)
    if issubclass(made.kind(), GramianWeightedAggregator):
        return TorchJDLinear(made.name, made.arguments)
    return made
