"""Policies by class: ring, class-balanced, herding, growing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.buffer import Policy, Reservoir, equal_shares, ranks
from consilience.core.contexts import Learned
from consilience.core.losses import NONE


class ByClass(Policy):
    """A policy that counts the examples of each class; examples without a class are not kept."""

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False


@dataclass(frozen=True)
class ClassBalanced(ByClass, Reservoir):
    """A reservoir per class; the classes seen share the buffer equally, except those with fewer examples.

    Chrysakis & Moens 2020; the greedy balanced sampler of Prabhu et al. 2020 keeps as many.
    """

    def keep(self, keys: Tensor, y: Tensor, size: int) -> Tensor:
        return equal_shares(keys, y, size)


@dataclass(frozen=True)
class Ring(ByClass):
    """A queue per class: its last examples stay, and the classes seen share the buffer equally.

    Lopez-Paz & Ranzato 2017; Chaudhry et al. 2019.
    """

    def keys(self, learned: Learned, size: int) -> Tensor:
        # The number of the visit, plus the place within it: the latest are the smallest.
        count = len(learned.source.train)
        return -(learned.order + torch.arange(count, dtype=torch.float64) / count)

    def keep(self, keys: Tensor, y: Tensor, size: int) -> Tensor:
        return equal_shares(keys, y, size)


@dataclass(frozen=True)
class Herding(ByClass):
    """Exemplars in the order in which their mean best approaches the class mean; classes share equally.

    p_k = argmin_x || mu - (psi(x) + sum_{j<k} psi(p_j)) / k ||, psi the features at the end of the source, of
    unit norm. A key is the rank k, so that a smaller share keeps the first ones. Welling 2009; Rebuffi et al.
    2017 (iCaRL).
    """

    needs_boundaries: ClassVar[bool] = True

    def keys(self, learned: Learned, size: int) -> Tensor:
        psi, y = unit_features(learned)
        keys = torch.full((len(y),), torch.inf, dtype=torch.float64)
        # The most of one class that a buffer with these classes alone would hold.
        level = torch.arange(1, size + 1)
        present = y[y != NONE]
        most = 1 + int((torch.minimum(present.bincount()[:, None], level).sum(0) < size).sum())
        for c in present.unique().tolist():
            own = (y == c).nonzero()[:, 0]
            keys[own] = herd(psi[own], most)
        return keys

    def keep(self, keys: Tensor, y: Tensor, size: int) -> Tensor:
        return equal_shares(keys, y, size) & torch.isfinite(keys)


@dataclass(frozen=True)
class Growing(ByClass, Reservoir):
    """A uniform sample of `size` examples of each class.

    Ten of each is the replay of Ge et al. 2023 (SKILL's baseline).
    """

    grows: ClassVar[bool] = True

    def keep(self, keys: Tensor, y: Tensor, size: int) -> Tensor:
        return (ranks(keys, y) < size) & (y.cpu() != NONE)


def unit_features(learned: Learned, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Return the features [N, d] of unit norm of a source's training examples, and their targets [N].

    Both are on the CPU; features are in float64.
    """
    found, targets = [], []
    for x, y in learned.source.train.chunks(chunk):
        with torch.no_grad():
            psi = learned.model.features(learned.params, learned.buffers, x, learned.task).double().cpu()
        # Features that are all 0 have no direction and stay 0.
        found.append(psi / psi.norm(dim=1, keepdim=True).clamp_min(1e-12))
        targets.append(y.cpu())
    return torch.cat(found), torch.cat(targets)


def herd(psi: Tensor, size: int) -> Tensor:
    """Return the rank [N] of each vector of psi [N, d] in herding order, infinity beyond the first `size`.

    >>> herd(torch.tensor([[0.0], [1.0], [5.0]]), 2).tolist()
    [inf, 0.0, 1.0]
    """
    mean, total = psi.mean(0), torch.zeros_like(psi[0])
    rank = torch.full((len(psi),), torch.inf, dtype=torch.float64)
    squares = psi.square().sum(1)
    for k in range(min(size, len(psi))):
        # ||mu (k + 1) - total - psi||^2 without the term that is the same for all.
        gap = squares - 2 * psi @ ((k + 1) * mean - total)
        best = int(gap.masked_fill(torch.isfinite(rank), torch.inf).argmin())
        rank[best] = k
        total = total + psi[best]
    return rank
