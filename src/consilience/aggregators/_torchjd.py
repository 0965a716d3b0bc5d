"""torchjd's aggregators."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Linear
from consilience.core.errors import ConsilienceError, Refusal, unknown


@dataclass(frozen=True)
class TorchJD(Aggregator):
    """One of torchjd's aggregators A, by class name: (sum_i w_i) A(rows) / k, where k = A(m rows of 1) is 1 for those that
    average and m for those that sum, so that m equal rows give (sum w) g (FairGrad, whose step does not grow with
    g's length: (sum w) A(g)).

    Rows [m, n], weights [m] >= 0 -> [n]. Where A takes a `pref_vector` that is not given, it gets w_i / sum w; otherwise
    only the sum of the weights is used. Lists of numbers among the arguments become vectors. The random state is forked
    and seeded from the generator (0 where none is given). Raises ConsilienceError for unknown names and arguments, for what
    is not installed, and for matrices that A refuses; Refusal for aggregators that keep a state.
    Quinton and Rey 2024, arXiv:2406.16232.

    >>> TorchJD("IMTLG")(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [0.5, 0.5]
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    takes_negative_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._build(self._known(), {})

    def combine(
        self, rows: Sequence[Tensor] | Tensor, weights: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        stacked = (rows if isinstance(rows, Tensor) else torch.stack(list(rows))).detach()
        dtype = stacked.dtype
        if dtype not in (torch.float32, torch.float64):
            stacked, weights = stacked.float(), weights.float()
        total = weights.sum()
        if total == 0 or not stacked.shape[1]:
            return torch.zeros_like(stacked[0], dtype=dtype)
        run = self._runner(weights, generator)
        return (run(stacked) * (total / self._unit(run(torch.ones_like(stacked[:, :1]))[0]))).to(dtype)

    def _unit(self, unit: Tensor) -> Tensor:
        """What A makes of rows of 1, checked."""
        if not (unit > 0 and torch.isfinite(unit)):
            raise ConsilienceError(
                f"torchjd's {self.name} should keep the direction of equal rows. Found the factor {float(unit)}."
            )
        return unit

    def _runner(
        self, weights: Tensor, generator: torch.Generator | None, of: Callable[[Any], Any] = lambda a: a
    ) -> Callable[[Tensor], Tensor]:
        """A, or the part `of` A, as a function of a matrix."""
        kind = self._known()
        own = inspect.signature(kind).parameters
        wish = (
            {"pref_vector": weights / weights.sum()}
            if "pref_vector" in own.keys() - dict(self.arguments).keys()
            else {}
        )
        seed = (
            0
            if generator is None
            else int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        )
        return lambda matrix: self._run(kind, wish, matrix, seed, of)

    def _run(
        self, kind: Any, wish: dict[str, Any], rows: Tensor, seed: int, of: Callable[[Any], Any]
    ) -> Tensor:
        aggregator = of(self._build(kind, wish, rows))
        with torch.random.fork_rng([rows.device] if rows.is_cuda else []), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            if rows.is_cuda:
                with torch.cuda.device(rows.device):
                    torch.cuda.manual_seed(seed)
            try:
                result: Tensor = aggregator(rows)
                return result
            except ValueError as e:
                raise ConsilienceError(
                    f"rows should suit torchjd's {self.name}. Found {tuple(rows.shape)}: {e}"
                ) from e

    def _known(self) -> Any:
        """The class, or an error that says what to do."""
        try:
            import torchjd.aggregation as there
            from torchjd import Stateful
        except ImportError as e:
            raise ConsilienceError(
                f"torchjd should be installed for {self.name!r}: pip install 'consilience[torchjd]'. Found: {e}."
            ) from e
        kinds = {
            n: k
            for n in there.__all__
            if isinstance(k := getattr(there, n), type) and issubclass(k, there.Aggregator)
        }
        concrete = {n: k for n, k in kinds.items() if k.__module__ != there.Aggregator.__module__}
        if self.name not in concrete:
            raise unknown(
                "torchjd", self.name, [n for n, k in concrete.items() if not issubclass(k, Stateful)]
            )
        if issubclass(concrete[self.name], Stateful):
            raise Refusal(
                f"torchjd's aggregators should keep no state between calls. Found {self.name!r}, which does."
            )
        return concrete[self.name]

    def _build(self, kind: Any, wish: dict[str, Any], like: Tensor | None = None) -> Any:
        like = torch.zeros(0) if like is None else like
        given = {k: like.new_tensor(v) if isinstance(v, (list, tuple)) else v for k, v in self.arguments}
        try:
            return kind(**given, **wish)
        except ImportError as e:
            raise ConsilienceError(f"what torchjd's {self.name} needs should be installed. Found: {e}") from e
        except (TypeError, ValueError) as e:
            raise ConsilienceError(
                f"arguments of torchjd's {self.name} should be {inspect.signature(kind)}. Found: {e}"
            ) from e


@dataclass(frozen=True)
class TorchJDLinear(TorchJD, Linear):
    """One of torchjd's aggregators whose weights depend on the Gramian alone (most of them): as `TorchJD`, and its coefficients
    (sum w) a(G) / sum a(1), with a its weighting and 1 the Gramian of rows of 1, are found without the rows.

    Rows [m, n], weights [m] >= 0 -> [n]; Gramian [m, m] -> coefficients [m]. Raises what `TorchJD` raises.

    >>> TorchJDLinear("IMTLG").weigh(torch.eye(2), torch.tensor([0.5, 0.5]), None).tolist()
    [0.5, 0.5]
    """

    def weigh(self, gram: Tensor, weights: Tensor, generator: torch.Generator | None) -> Tensor:
        total = weights.sum()
        if total == 0:
            return torch.zeros_like(weights)
        run = self._runner(weights, generator, operator.attrgetter("gramian_weighting"))
        return run(gram.detach()) * (total / self._unit(run(torch.ones_like(gram)).sum()))


def of_name(name: str, arguments: dict[str, Any]) -> TorchJD:
    """torchjd's aggregator of that name: a `TorchJDLinear` where the Gramian says all."""
    one = TorchJD(name, tuple(sorted(arguments.items())))
    from torchjd.aggregation import GramianWeightedAggregator

    return (
        TorchJDLinear(one.name, one.arguments) if issubclass(one._known(), GramianWeightedAggregator) else one
    )
