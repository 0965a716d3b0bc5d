"""Merging by statistics: what agents send about their data weighs each of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Statistics
from consilience.core.params import Layout, Params
from consilience.core.schedule import ScheduleFacts
from consilience.core.state import State
from consilience.core.weight_space import Received, WeightSpace


class Summary(NamedTuple):
    """The statistics of one source of a sender, and its number of examples."""

    examples: int
    item: Statistics


@dataclass(frozen=True)
class _ByStatistics(WeightSpace):
    """A weight space in which statistics of the senders' data weigh their parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregator is not None:
            raise ConsilienceError(
                f"`aggregator` of {type(self).__name__} must be None, because statistics weigh the "
                f"parameters, got {type(self.aggregator).__name__}."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return "it merges by statistics of data, and here only trained models are given; use average"
        if facts.most_received < 2:
            return (
                "it weighs the parameters of several agents, and one is received at a time; use "
                "parameter_average, or finetune for the last"
            )
        return super().refuse(facts)

    @staticmethod
    def _summaries(
        rows: Sequence[Received], fresh: Sequence[Message], state: State, keys: Sequence[str], method: str
    ) -> list[list[Summary]]:
        """Find each sender's statistics under the first of `keys` that it uses: new ones, else the bank's."""
        found = []
        for row in rows:
            # A sender that trained on nothing new sends no statistics: those in the bank still describe its
            # parameters.
            candidates = (
                [
                    Summary(m.size, item)
                    for m in messages
                    if m.sender == row.sender and isinstance(item := m.items.get(key), Statistics)
                ]
                for messages in (fresh, list(state.bank.values()))
                for key in keys
            )
            own = next((summaries for summaries in candidates if summaries), None)
            if own is None:
                raise ConsilienceError(
                    f"received parameters need statistics, got none from {row.sender!r}; all senders must "
                    f"use {method}."
                )
            found.append(own)
        return found


@dataclass(frozen=True)
class FisherSpace(_ByStatistics):
    """theta = (sum_i w_i F_i theta_i + prior theta_base) / (sum_i w_i F_i + prior), by entry.

    Then comes the outer step of `WeightSpace`. F_i is the diagonal Fisher information sent by the correction
    `Information`, or the precision of EWC, online EWC or MAS: the mean over the sender's sources, by their
    examples; w_i is its share of the examples, or 1/m. So the merge is the optimum of sum_i w_i (theta -
    theta_i)^T diag(F_i) (theta - theta_i), in float64. Where all F_i and the prior are 0, and for entries
    without F, it is the average; so it is for a task's own entries and buffers. Raises ConsilienceError for a
    sender without a precision. Matena & Raffel 2022.
    """

    prior: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prior < float("inf"):
            raise ConsilienceError(f"`prior` must be finite and not negative, got {self.prior}.")

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        """Whether there is a prior, which stands at the receiver's own parameters."""
        return self.prior > 0

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if self.prior and facts.exchanges and not facts.common_base:
            return (
                "its prior stands at the receiver's own parameters, but here the senders start from others; "
                "use prior = 0"
            )
        return super().refuse(facts)

    def _merge_by_statistics(
        self, names: list[str], rows: list[Received], state: State, fresh: Sequence[Message]
    ) -> Params:
        from consilience.aggregators._fisher import Fisher

        if not names:
            return {}
        # Also of a single row, so that a sender without statistics is found alone.
        keys = ("Information", "EWC", "OnlineEWC", "MAS")
        summaries = self._summaries(rows, fresh, state, keys, "fisher_merging")
        if len(rows) == 1 and not self.prior:
            return {}
        here = [n for n in names if all(f"precision/{n}" in s.item.tensors for own in summaries for s in own)]

        # In float64: Fisher information spans many orders of magnitude.
        first = rows[0].params
        layout = Layout.of({n: first[n] for n in here}, torch.float64)
        theta = torch.stack([layout.flatten(row.params) for row in rows])
        shares = torch.tensor([row.weight for row in rows], dtype=torch.float64, device=layout.device)
        shares /= shares.sum()
        fishers = torch.stack([self._mean_precision(own, layout) for own in summaries])

        # Entries without any information keep the origin: the receiver's own, or else the average.
        origin = layout.flatten(state.base) if self.prior else shares @ theta
        change = Fisher(self.prior)(
            theta - origin, shares[:, None] * fishers, names=[row.sender for row in rows]
        )
        return {n: p.to(first[n].dtype) for n, p in layout.split(origin + change).items()}

    @staticmethod
    def _mean_precision(own: list[Summary], layout: Layout) -> Tensor:
        """Average the precisions of one sender's sources by their examples: [n]."""
        sizes = [s.examples for s in own] if any(s.examples for s in own) else [1] * len(own)
        parts = [
            layout.flatten(s.item.group("precision")) * (size / sum(sizes))
            for size, s in zip(sizes, own, strict=True)
        ]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class RegMean(_ByStatistics):
    """W = (sum_i w_i G'_i)^-1 sum_i w_i G'_i W_i for linear layers and convolutions; others are averaged.

    W [d, C] stands for a layer's weight (of each group), G_i = X_i^T X_i / N_i [d, d] is the second moment of
    its inputs, sent by the correction `InputMoments`, and G'_i = alpha G_i + (1 - alpha) diag(G_i); w_i is
    the share of the examples, or 1/m. So the outputs are nearest, in least squares, to those of each expert
    on its own inputs (alpha = 1). `ridge`, times the mean of the diagonal of the sum, holds W at the experts'
    mean where there are no inputs; with 0 the pseudo-inverse does. In float64. Raises ConsilienceError for a
    sender without moments. Jin et al. 2023 (alpha .9).
    """

    alpha: float = 0.9
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConsilienceError(f"`alpha` must be in [0, 1], got {self.alpha}.")
        if not 0 <= self.ridge < float("inf"):
            raise ConsilienceError(f"`ridge` must be finite and not negative, got {self.ridge}.")

    def _merge_by_statistics(
        self, names: list[str], rows: list[Received], state: State, fresh: Sequence[Message]
    ) -> Params:
        if not names:
            return {}
        # Also of a single row, so that a sender without statistics is found alone.
        summaries = self._summaries(rows, fresh, state, ("InputMoments",), "regmean")
        if len(rows) == 1:
            return {}
        total = sum(row.weight for row in rows)
        made: Params = {}
        for n in names:
            first = rows[0].params[n]
            moments = [s.item.tensors.get(f"second/{n}") for own in summaries for s in own]
            if any(moment is None or moment.shape[-1] != first.shape[1:].numel() for moment in moments):
                continue

            grams, weights = [], []
            for row, own in zip(rows, summaries, strict=True):
                second = torch.stack([s.item.tensors[f"second/{n}"] for s in own]).sum(0)
                examples = max(1.0, float(sum(s.item.tensors["count"] for s in own)))
                grams.append(second * (row.weight / total / examples))
                weights.append(row.params[n].double().reshape(len(second), -1, second.shape[-1]))

            # Differences to the mean are solved for, so that the ridge draws towards the mean and not towards
            # 0.
            parts = [weight * (row.weight / total) for weight, row in zip(weights, rows, strict=True)]
            mean = torch.stack(parts).sum(0)
            solved = mean + self._solve(grams, [weight - mean for weight in weights])
            made[n] = solved.reshape(first.shape).to(first.dtype)
        return made

    def _solve(self, grams: list[Tensor], weights: list[Tensor]) -> Tensor:
        """Minimise sum_i ||X_i (W - W_i)||^2 over W [g, C, d], given W_i and G_i = X_i^T X_i [g, d, d]."""
        diagonals = [torch.diag_embed(gram.diagonal(dim1=1, dim2=2)) for gram in grams]
        scaled = [
            self.alpha * gram + (1 - self.alpha) * diagonal
            for gram, diagonal in zip(grams, diagonals, strict=True)
        ]
        total = torch.stack(scaled).sum(0)
        target = torch.stack([weight @ gram for weight, gram in zip(weights, scaled, strict=True)]).sum(0)

        # A ridge is a share of the mean diagonal: without any input it is 0, and the sum is singular.
        size = total.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        if not self.ridge or bool((size == 0).any()):
            inverse: Tensor = torch.linalg.pinv(total, hermitian=True)
            return torch.bmm(target, inverse)
        eye = torch.eye(total.shape[-1], dtype=total.dtype, device=total.device)
        solved: Tensor = torch.linalg.solve(total + self.ridge * size * eye, target.transpose(1, 2))
        return solved.transpose(1, 2)
