"""Shares: whole numbers in proportion, and stratified draws."""

from __future__ import annotations

import torch
from torch import Tensor


def apportion(weights: Tensor, total: int) -> Tensor:
    """Whole numbers [m] in proportion to `weights` [m] that add up to `total` (largest remainder).

    >>> apportion(torch.tensor([1.0, 1.0, 2.0]), 10).tolist()
    [3, 2, 5]
    """
    exact = weights.double() / weights.double().sum() * total
    parts = (exact + 1e-9).floor()
    left = total - int(parts.sum())
    parts[(exact - parts).argsort(descending=True, stable=True)[:left]] += 1
    return parts.long()


def draw(
    targets: Tensor, total: int, generator: torch.Generator, stratified: bool, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """About `total` indices drawn and the others, both ascending; `stratified` keeps the shares of the classes and leaves
    at least `spare` examples of each.

    >>> drawn, rest = draw(torch.tensor([0, 0, 0, 0, 1, 1]), 3, torch.Generator().manual_seed(0), stratified=True)
    >>> (drawn < 4).sum().item(), len(rest)
    (2, 3)
    """
    order = torch.randperm(len(targets), generator=generator)
    if stratified:
        _, of, counts = targets.cpu().unique(return_inverse=True, return_counts=True)
        quota = apportion(counts, total).minimum((counts - spare).clamp(min=0))
        order = order[of[order].argsort(stable=True)]
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[of[order]]
        chosen = order[rank < quota[of[order]]]
    else:
        chosen = order[:total]
    taken = torch.zeros(len(targets), dtype=torch.bool)
    taken[chosen] = True
    return taken.nonzero().flatten(), (~taken).nonzero().flatten()
