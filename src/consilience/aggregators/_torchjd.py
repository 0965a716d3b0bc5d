"""torchjd's aggregators."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Linear, stacked, widened
from consilience.core.errors import ConsilienceError, Refusal, unknown


@dataclass(frozen=True)
class TorchJD(Aggregator):
    """One of torchjd's aggregators A, by class name: (sum_i w_i) A(rows) / k with k = A(m rows of 1).

    k is 1 for those that average and m for those that sum, so that m equal rows give (sum w) g (FairGrad,
    whose step does not grow with g's length: (sum w) A(g)).

    Rows [m, n], weights [m] >= 0 -> [n]. If A takes a `pref_vector` that is not given, it gets w_i / sum w;
    otherwise only the sum of the weights is used. Lists of numbers among the arguments become vectors. The
    random state is forked and seeded from the generator (0 if none is given). Raises ConsilienceError for
    unknown names and arguments, for missing packages, and for matrices that A refuses; Refusal for
    aggregators that keep a state. Quinton and Rey 2024, arXiv:2406.16232.

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
        made = run(matrix)
        unit = self._checked_unit(run(torch.ones_like(matrix[:, :1]))[0])
        return (made * (total / unit)).to(given.dtype)

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
            from torchjd import Stateful
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
            stateless = [name for name, kind in concrete.items() if not issubclass(kind, Stateful)]
            raise unknown("torchjd", self.name, stateless)
        if issubclass(concrete[self.name], Stateful):
            raise Refusal(
                f"torchjd's {self.name!r} keeps a state between calls, but aggregators are pure; use another."
            )
        return concrete[self.name]

    def _build(self, kind: Any, preference: dict[str, Any], like: Tensor | None = None) -> Any:
        like = torch.zeros(0) if like is None else like
        given = {
            name: like.new_tensor(value) if isinstance(value, (list, tuple)) else value
            for name, value in self.arguments
        }
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
        made = run(gram.detach())
        unit = self._checked_unit(run(torch.ones_like(gram)).sum())
        return made * (total / unit)


def of_name(name: str, arguments: dict[str, Any]) -> TorchJD:
    """Build torchjd's aggregator of that name, as `TorchJDLinear` if possible."""
    made = TorchJD(name, tuple(sorted(arguments.items())))
    # Imported after `made`, whose error says how to install torchjd.
    from torchjd.aggregation import GramianWeightedAggregator

    if issubclass(made.kind(), GramianWeightedAggregator):
        return TorchJDLinear(made.name, made.arguments)
    return made
