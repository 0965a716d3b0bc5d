"""Merging by statistics: what agents tell of their data says how much each parameter of theirs counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Statistics
from consilience.core.params import Layout, Params
from consilience.core.schedule import ScheduleFacts
from consilience.core.state import State
from consilience.core.weight_space import WeightSpace

Rows = list[tuple[str, Params, float]]
"""(sender, parameters, weight) of those that are heard."""


@dataclass(frozen=True)
class _ByStatistics(WeightSpace):
    """A weight space in which what agents tell of their data weighs their parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregator is not None:
            raise ConsilienceError(
                f"`aggregator` of {type(self).__name__} should be None: statistics weigh. Found {type(self.aggregator).__name__}."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return "it merges by statistics of data, and here only trained models are given; use average"
        if facts.most_received < 2:
            return "it weighs what several agents learned, and one is heard at a time; use parameter_average, or finetune for the last"
        return super().refuse(facts)

    @staticmethod
    def _told(
        rows: Rows, fresh: Sequence[Message], state: State, keys: Sequence[str], by: str
    ) -> list[list[tuple[int, Statistics]]]:
        """Of each sender the statistics under the first of these keys, with their numbers of examples: of what it learned now, else before."""
        found = []
        for sender, *_ in rows:
            of = [
                [
                    (m.size, item)
                    for m in held
                    if m.sender == sender and isinstance(item := m.items.get(key), Statistics)
                ]
                for held in (fresh, list(state.bank.values()))
                for key in keys
            ]
            own = next((o for o in of if o), None)
            if own is None:
                raise ConsilienceError(
                    f"what is heard should come with statistics, as {by} tells. Found none of {sender!r}."
                )
            found.append(own)
        return found


@dataclass(frozen=True)
class FisherSpace(_ByStatistics):
    """theta = (sum_i w_i F_i theta_i + prior theta_base) / (sum_i w_i F_i + prior), by entry; then the outer step of `WeightSpace`.

    F_i is the diagonal Fisher information that the correction `Information` tells, or the precision of EWC, online EWC or MAS: the
    mean over the sender's sources, by their examples; w_i is its share of the examples, or 1/m. So the merge is the
    optimum of sum_i w_i (theta - theta_i)^T diag(F_i) (theta - theta_i), in float64. Where all F_i and the prior are 0, and for
    entries of which none is told, it is the average; so it is for a task's own entries and buffers. Raises ConsilienceError for
    a sender that tells no precision. Matena & Raffel 2022.
    """

    prior: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prior < float("inf"):
            raise ConsilienceError(f"`prior` should be >= 0 and finite. Found `prior = {self.prior}`.")

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        """The prior stands at the hearer's own parameters."""
        return self.prior > 0

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if self.prior and facts.exchanges and not facts.common_base:
            return "its prior stands at the hearer's own parameters, but here what is heard starts from others; use prior = 0"
        return super().refuse(facts)

    def _by_told(self, names: list[str], rows: Rows, state: State, fresh: Sequence[Message]) -> Params:
        from consilience.aggregators._fisher import Fisher

        if not names or (len(rows) == 1 and not self.prior):
            return {}
        told = self._told(rows, fresh, state, ("Information", "EWC", "OnlineEWC", "MAS"), "fisher_merging")
        here = [n for n in names if all(f"precision/{n}" in item.tensors for own in told for _, item in own)]
        layout = Layout.of({n: rows[0][1][n] for n in here}, torch.float64)
        theta = torch.stack([layout.flatten(params) for _, params, _ in rows])
        shares = torch.tensor([w for *_, w in rows], dtype=torch.float64, device=layout.device)
        shares /= shares.sum()
        fishers = []
        for own in told:
            sizes = [s for s, _ in own] if any(s for s, _ in own) else [1] * len(own)
            parts = [
                layout.flatten(item.group("precision")) * (s / sum(sizes))
                for s, (_, item) in zip(sizes, own, strict=True)
            ]
            fishers.append(torch.stack(parts).sum(0))
        origin = layout.flatten(state.base) if self.prior else shares @ theta
        merged = origin + Fisher(self.prior)(
            theta - origin, shares[:, None] * torch.stack(fishers), names=[s for s, *_ in rows]
        )
        return {n: p.to(rows[0][1][n].dtype) for n, p in layout.split(merged).items()}


@dataclass(frozen=True)
class RegMean(_ByStatistics):
    """W = (sum_i w_i G'_i)^-1 sum_i w_i G'_i W_i for linear layers and convolutions; all other entries are averaged.

    W [d, C] stands for a layer's weight (of each group), G_i = X_i^T X_i / N_i [d, d] is what the correction `InputMoments` tells of its
    inputs, and G'_i = alpha G_i + (1 - alpha) diag(G_i); w_i is the share of the examples, or 1/m. So the outputs are nearest, in
    least squares, to those of each expert on its own inputs (alpha = 1). `ridge`, times the mean of the diagonal of the sum, holds W at
    the experts' mean where there are no inputs; with 0 the pseudo-inverse does. In float64. Raises ConsilienceError for a
    sender that tells no moments. Jin et al. 2023 (alpha .9).
    """

    alpha: float = 0.9
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConsilienceError(f"`alpha` should be in [0, 1]. Found `alpha = {self.alpha}`.")
        if not 0 <= self.ridge < float("inf"):
            raise ConsilienceError(f"`ridge` should be >= 0 and finite. Found `ridge = {self.ridge}`.")

    def _by_told(self, names: list[str], rows: Rows, state: State, fresh: Sequence[Message]) -> Params:
        if not names or len(rows) == 1:
            return {}
        told = self._told(rows, fresh, state, ("InputMoments",), "regmean")
        total = sum(w for *_, w in rows)
        made: Params = {}
        for n in names:
            shape = rows[0][1][n].shape
            found = [item.tensors.get(f"second/{n}") for own in told for _, item in own]
            if any(g is None or g.shape[-1] != shape[1:].numel() for g in found):
                continue
            grams, weights = [], []
            for (_, params, w), own in zip(rows, told, strict=True):
                second = torch.stack([item.tensors[f"second/{n}"] for _, item in own]).sum(0)
                grams.append(
                    second * (w / total / max(1.0, float(sum(item.tensors["count"] for _, item in own))))
                )
                weights.append(params[n].double().reshape(len(second), -1, second.shape[-1]))
            mean = torch.stack([x * (w / total) for x, (*_, w) in zip(weights, rows, strict=True)]).sum(0)
            made[n] = (
                (mean + self._solve(grams, [x - mean for x in weights]))
                .reshape(shape)
                .to(rows[0][1][n].dtype)
            )
        return made

    def _solve(self, grams: list[Tensor], weights: list[Tensor]) -> Tensor:
        """The W [g, C, d] that minimises sum_i ||X_i (W - W_i)||^2 for W_i [g, C, d] and G_i = X_i^T X_i [g, d, d]."""
        scaled = [
            self.alpha * g + (1 - self.alpha) * torch.diag_embed(g.diagonal(dim1=1, dim2=2)) for g in grams
        ]
        whole = torch.stack(scaled).sum(0)
        wanted = torch.stack([w @ g for w, g in zip(weights, scaled, strict=True)]).sum(0)
        size = whole.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        if not self.ridge or bool((size == 0).any()):
            inverse: Tensor = torch.linalg.pinv(whole, hermitian=True)
            return torch.bmm(wanted, inverse)
        whole = whole + self.ridge * size * torch.eye(whole.shape[-1], dtype=whole.dtype, device=whole.device)
        solved: Tensor = torch.linalg.solve(whole, wanted.transpose(1, 2))
        return solved.transpose(1, 2)
