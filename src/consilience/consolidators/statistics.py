"""Solving statistics: one ridge head from everybody's sums, whatever the split, order or schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.core.consolidator import Consolidator
from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Shared, Statistics
from consilience.core.model import Model
from consilience.core.schedule import Facts
from consilience.core.source import Source
from consilience.core.state import State


def solve(a: Tensor, b: Tensor, strength: float, samples: float = 1.0, average: bool = False, normalise: bool = False) -> Tensor:
    """W = (A + lambda I)^-1 b [d + 1, C], float64, from A = sum psi psi^T and b = sum psi e_y^T with a ones column as bias.

    With `average` the objective is the mean loss, whose closed form needs lambda x samples. With `normalise` each column
    (with its bias) is divided by its norm without the bias (zero counts as 1e-6), as Fed3R does.

    >>> solve(torch.eye(2).double(), torch.ones(2, 1).double(), 1.0).flatten().round(decimals=6).tolist()
    [0.5, 0.5]
    """
    ridge = strength * (samples if average else 1.0)
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    w = torch.cholesky_solve(b, torch.linalg.cholesky(a + ridge * eye))
    if normalise:
        norm = w[:-1].norm(dim=0)
        w = w / torch.where(norm == 0, torch.full_like(norm, 1e-6), norm)
    return w


@dataclass(frozen=True)
class ClosedForm(Consolidator):
    """The head that minimises sum ||W^T psi(x) - e_y||^2 + lambda ||W||^2 over all sources heard of: W = (A + lambda I)^-1 b.

    psi are the model's features, with a ones column; lambda enters once. It reads the Statistics of `corrections.Moments`
    and writes the model's linear head. Fanì et al. 2024 (Fed3R); Wang et al. 2022 (SCROLL).
    """

    strength: float = 0.01
    average: bool = False
    normalise: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.strength < float("inf"):
            raise ConsilienceError(f"`strength` should be positive and finite. Found `strength = {self.strength}`.")

    def export(self, model: Model, state: State, sources: Sequence[Source], personal: Sequence[str]) -> dict[str, Shared]:
        return {}

    def refuse(self, facts: Facts) -> str | None:
        if not facts.hears:
            return "statistics are solved when they are heard, and nobody hears here"
        if not facts.learns:
            return "it needs sums over data, and here only trained models are given"
        if facts.model is not None:
            try:
                facts.model.head(facts.model.init(torch.Generator().manual_seed(0))[0], None)
            except ConsilienceError:
                return (
                    "it solves one linear head that all sources share, and this model has none; use models.mlp or models.linear"
                )
        return None

    def absorb(self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator) -> State:
        total = add_up(m.items["Moments"] for m in state.bank.values() if "Moments" in m.items)
        if total is None:
            return state
        w = solve(
            total.tensors["second"],
            total.tensors["first"],
            self.strength,
            float(total.tensors["count"].sum()),
            self.average,
            self.normalise,
        )
        weight, bias = model.head(state.params, None)
        params = dict(state.params)
        old = params[weight]
        head = torch.zeros_like(old, dtype=torch.float64)
        head[: w.shape[1]] = w[:-1].T
        params[weight] = head.to(old.dtype)
        if bias is not None:
            offset = torch.zeros(len(old), dtype=torch.float64)
            offset[: w.shape[1]] = w[-1]
            params[bias] = offset.to(old.dtype)
        return state.change(params=params)


def add_up(items: Iterable[Shared]) -> Statistics | None:
    """The sum of statistics, None where there are none."""
    total: Statistics | None = None
    for item in items:
        if isinstance(item, Statistics):
            total = item if total is None else total + item
    return total
