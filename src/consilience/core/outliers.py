"""Outliers: examples far beyond the others of their source, such as a sentinel for a missing value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import fits_float32
from consilience.core.tree import tensors_of

if TYPE_CHECKING:
    from consilience.core.source import Source

FAR = 100.0
"""An example is far out if its largest number is this many times the median one of its source."""


def far_out(x: Tensor) -> Tensor:
    """Return the places of the examples of x [N, ...] that are far out, or not finite.

    >>> x = torch.ones(9, 2)
    >>> x[3, 1] = -1000
    >>> far_out(x).tolist()
    [3]
    """
    if not x.is_floating_point() or not x.numel():
        return torch.zeros(0, dtype=torch.long)
    low, high = x.flatten(1).aminmax(dim=1)
    largest = torch.maximum(high, -low)
    # Most examples of sparse inputs may be zero.
    there = largest[largest.isfinite() & (largest > 0)]
    usual = there.median() if len(there) else torch.tensor(torch.inf)
    return (~(largest <= FAR * usual) & ~(largest == 0)).nonzero()[:, 0].cpu()


def outliers(source: Source) -> str | None:
    """Return a warning that names the training examples of a source that are far out, or None.

    Only examples in memory are read.
    """
    held = getattr(source.train, "x", None)
    parts = {} if held is None else tensors_of(held)
    for x in parts.values():
        found = far_out(x)
        if not len(found):
            continue
        first = int(found[0])
        largest = float(x[first].flatten().abs().max())
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return (
            f"training example {first}{more} of {source.name!r} has numbers up to {largest:.3g}, over "
            f"{FAR:g} times the largest of the median example; if it is a fault or a sentinel, take it "
            "out, or limit it by `clip=` of mappers and solved heads"
        )
    return None


def check_features(psi: Tensor, rows: Sequence[int] | Tensor, whose: str) -> None:
    """Refuse features psi [B, d] of the examples `rows` [B] whose squared length no float32 holds."""
    square = psi.detach().flatten(1).double().square().sum(1)
    if fits_float32(square):
        return
    ill = ~(square <= torch.finfo(torch.float32).max)
    example = int(rows[int(ill.nonzero()[0, 0])])
    raise ConsilienceError(
        f"features must have finite squares, got {float(psi[ill][0].abs().max()):.3g} for training example "
        f"{example} of {whose!r}; take it out, or limit it by `clip=`."
    )


@dataclass(frozen=True, eq=False)
class Clip:
    """Move examples that lie far from the centre of their source to a largest distance: psi -> centre + r.

    r = (psi - centre) min(1, limit / ||psi - centre||): the centre is the median of each feature, the limit
    is `times` the median distance to it. Examples within the limit stay as they are, to the bit.

    >>> psi = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1000.0]])
    >>> Clip.of(psi, 3.0)(psi)[:, 0].tolist()
    [0.0, 1.0, 2.0, 3.0, 5.0]
    """

    centre: Tensor
    limit: float

    @staticmethod
    def of(psi: Tensor, times: float) -> Clip:
        """Return the clip of a source with these features [N, d]."""
        # The median of all others, where some are not numbers.
        centre = psi.double().nanmedian(0).values
        return Clip(centre, times * float((psi.double() - centre).norm(dim=1).nanmedian()))

    def __call__(self, psi: Tensor) -> Tensor:
        """Return psi [B, d] with a distance of at most the limit, in its type."""
        off = psi.double() - self.centre.to(psi.device)
        length = off.norm(dim=1, keepdim=True)
        moved = self.centre.to(psi.device) + off * (self.limit / length.clamp_min(self.limit or 1.0))
        clipped: Tensor = torch.where(length > self.limit, moved.to(psi.dtype), psi)
        return clipped

    def beyond(self, psi: Tensor) -> Tensor:
        """Return which examples [B] are moved."""
        far: Tensor = (psi.double() - self.centre.to(psi.device)).norm(dim=1) > self.limit
        return far


def checked_clip(times: float) -> None:
    """Refuse a `clip` that is negative or not a number."""
    if not 0 <= times < float("inf"):
        raise ConsilienceError(f"`clip` must be 0 (none) or positive and finite, got {times}.")
