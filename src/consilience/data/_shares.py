"""Shares: whole numbers in proportion, and stratified draws."""

from __future__ import annotations

import torch
from torch import Tensor


def apportion(weights: Tensor, total: int) -> Tensor:
    """Split `total` into whole numbers [m] in proportion to `weights` [m] (method of the largest remainder).

    >>> apportion(torch.tensor([1.0, 1.0, 2.0]), 10).tolist()
    [3, 2, 5]
    """
    exact = weights.double() / weights.double().sum() * total

    # Rounding errors must not turn an exact 3 into 2.999... and then into 2.
    parts = (exact + 1e-9).floor()
    left = total - int(parts.sum())
    parts[(exact - parts).argsort(descending=True, stable=True)[:left]] += 1
    return parts.long()


def draw(
    targets: Tensor, total: int, generator: torch.Generator, stratified: bool, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw about `total` indices without replacement.

    Args:
        targets: [N], the classes for a stratified draw.
        total: how many indices to draw.
        generator: the source of randomness.
        stratified: keep the proportions of the classes, and leave at least `spare` examples of each.
        spare: examples of each class that are never drawn.

    Returns:
        The indices that were drawn, and all others; both ascending.

    >>> targets, generator = torch.tensor([0, 0, 0, 0, 1, 1]), torch.Generator().manual_seed(0)
    >>> drawn, rest = draw(targets, 3, generator, stratified=True)
    >>> (drawn < 4).sum().item(), len(rest)
    (2, 3)
    """
    order = torch.randperm(len(targets), generator=generator)
    if stratified:
        _, class_of, counts = targets.cpu().unique(return_inverse=True, return_counts=True)
        quota = apportion(counts, total).minimum((counts - spare).clamp(min=0))

        # Sorted by class, the random order stays random inside each class; an example's rank counts from 0
        # there, so that the first `quota` of each class are drawn.
        order = order[class_of[order].argsort(stable=True)]
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[class_of[order]]
        chosen = order[rank < quota[class_of[order]]]
    else:
        chosen = order[:total]

    # Through a mask, so that both parts are ascending: examples keep their order.
    taken = torch.zeros(len(targets), dtype=torch.bool)
    taken[chosen] = True
    return taken.nonzero().flatten(), (~taken).nonzero().flatten()
