"""The Mahalanobis mapper: class means and one covariance of all tasks, from sums, from low-rank factors, or from shared
images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from consilience.core.contexts import Context, Learned
from consilience.core.errors import ConsilienceError
from consilience.core.message import Item, Module, Samples, Statistics
from consilience.mappers._screen import Screen
from consilience.mappers.mixture import Anchored, Anchors, Screened, grouped, means, sums

RESIDUALS = 64
"""How many validation examples' features an anchor keeps."""


def triangle(square: Tensor) -> Tensor:
    """The upper triangle [d (d + 1) / 2] of a symmetric matrix [d, d], row by row.

    >>> triangle(torch.tensor([[1.0, 2.0], [2.0, 3.0]])).tolist()
    [1.0, 2.0, 3.0]
    """
    return square[tuple(torch.triu_indices(*square.shape, device=square.device))]


def symmetric(packed: Tensor, d: int) -> Tensor:
    """The matrix [d, d] whose `triangle` it is."""
    square = packed.new_zeros(d, d)
    square[tuple(torch.triu_indices(d, d, device=packed.device))] = packed
    return square.add_(square.triu(1).T)


def factors(scatter: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [min(rank, d), d] and the diagonal [d] of what it leaves: scatter ~ U^T U + diag(rest), by the largest eigenvalues."""
    values, vectors = torch.linalg.eigh((scatter + scatter.T) / 2)
    values, vectors = values.clamp_min(0)[-rank:], vectors[:, -rank:]
    u = (vectors * values.sqrt()).T
    rest = scatter.diagonal() - u.square().sum(0)
    return u, rest.where(rest > 1e-12 * scatter.diagonal(), 0.0)


def spread(known: Sequence[Item]) -> tuple[Tensor, float]:
    """The covariance S [d, d] within the classes of all anchors, and how large an eigenvalue may be by rounding alone.

    S = 1/N sum of scatters about the class means: of sums, second - sum_c n_c mu_c mu_c^T; of factors, U^T U + diag(rest); of
    shared examples, that of their features. N counts the examples that those are of.
    """
    d = len(known[0].tensors["first"])
    total, n, noise = torch.zeros(d, d, dtype=torch.float64), 0.0, 0.0
    sums = [i for i in known if "second" in i.tensors]
    if sums:
        packed = torch.zeros_like(sums[0].tensors["second"])
        for i in sums:
            packed += i.tensors["second"]
        total += symmetric(packed, d)
        # what is left of a direction in which nothing varies is the rounding of the second moments
        noise += d * torch.finfo(torch.float64).eps * float(total.trace())
        own = torch.cat([means(i) * i.tensors["count"][i.tensors["count"] > 0].sqrt()[:, None] for i in sums])
        total -= own.T @ own
        n += sum(float(i.tensors["count"].sum()) for i in sums)
    low = [i for i in known if "factor" in i.tensors]
    if low:
        u = torch.cat([i.tensors["factor"] for i in low]).double()
        total += u.T @ u
        for i in low:
            total.diagonal().add_(i.tensors["rest"])
            n += float(i.tensors["count"].sum())
        noise += 4 * torch.finfo(torch.float32).eps * float(total.trace())
    seen = [i.tensors["residual"] for i in known if "residual" in i.tensors]
    if seen:
        r = torch.cat(seen)
        total += r.T @ r
        n += len(r)
        noise += d * torch.finfo(torch.float64).eps * float(r.square().sum())
    n = max(n, 1.0)
    return (total + total.T) / (2 * n), noise / n


def whitening(known: Sequence[Item], ridge: float) -> Tensor:
    """W [d, r] with W W^T = (S + ridge tr(S)/d I)^-1, the pseudo-inverse where `ridge` = 0; S the covariance within classes."""
    s, noise = spread(known)
    d, eye = len(s), torch.eye(len(s), dtype=torch.float64)
    lift = ridge * float(s.trace()) / d
    if lift > 0:
        lower, bad = torch.linalg.cholesky_ex(s + lift * eye)
        if not bad:
            inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
            return inverse.T.contiguous()
    values, vectors = torch.linalg.eigh(s)
    if ridge:
        values = values.clamp_min(0) + lift
    there = values > (0 if ridge else noise)
    return vectors[:, there] * values[there].rsqrt() if bool(there.any()) else eye


class Distances(Screened):
    """-min_c ||(x - mu_c) W||^2 over the classes of each expert."""

    def __init__(self, items: Sequence[Item], known: Sequence[Item], ridge: float) -> None:
        points = [means(i) for i in items]
        self.group, every = grouped(points), torch.cat(points)
        self.centre, self.white = every.mean(0).float(), whitening(known, ridge)
        self.points = (every - self.centre) @ self.white
        self.screen = Screen.of(self.points @ self.white.T, -0.5 * self.points.square().sum(1), self.group)
        self.own: list[Tensor | None] = []
        for k, i in enumerate(items):
            held = i.tensors.get("validation")
            self.own.append(
                None if held is None else self._near(held.double())[:, self.group == k].amax(1).sort().values
            )

    def _near(self, psi: Tensor) -> Tensor:
        white = (psi.double() - self.centre) @ self.white
        return -torch.cdist(white, self.points, compute_mode="donot_use_mm_for_euclid_dist").square()

    def scores(self, psi: Tensor) -> Tensor:
        near = self._near(psi)
        return torch.stack([near[:, self.group == k].amax(1) for k in range(len(self.own))], 1)

    def columns(self, x: Tensor) -> Tensor:
        return (x - self.centre).float()

    def exact(self, psi: Tensor, rows: Tensor, j: Tensor) -> Tensor:
        one, where = rows.unique(return_inverse=True)
        white = (psi[one].double() - self.centre) @ self.white
        return -(white[where] - self.points[j]).square().sum(1)


@dataclass(frozen=True)
class Mahalanobis(Anchored):
    """score = -min_c (psi - mu_c)^T S^-1 (psi - mu_c) over the classes of the source, S = 1/N sum_c sum_{i: y_i = c} (psi_i -
    mu_c)(psi_i - mu_c)^T.

    S is tied: over all classes of all anchors that are known, each anchor's classes being its own. S + `ridge` x (mean variance)
    I is inverted; with `ridge` = 0 it is the pseudo-inverse, which leaves out directions without variance, and any invertible
    linear map of the features changes nothing. It is LDA with equal priors, its classes grouped by source. Anchors have class
    sums and counts, and S from

    - all second moments, their upper triangle: those of the same classes add, S is exact, and no example leaves its agent (the default);
    - `rank` = r: of each source's scatter within classes the r largest eigenfactors, and the diagonal of the rest: exact from
      its rank on;
    - `images` = m: m images of each class, as bytes where they are k/255, which the hearer passes through its features (once an
      anchor): what the paper does, with m = 5. N counts those images. A class with fewer gives what it has, and a warning says
      so. Fewer images than features leave S singular: the ridge, or the pseudo-inverse, as above.

    With `reject` > 0 an anchor has the features of at most 64 validation examples besides: they travel, because S changes as
    anchors arrive, and with it their scores. An input is unknown where its score by the best task is below that task's own
    `reject` quantile of them. Lee et al. 2018; Ge et al. 2023 (SKILL).
    """

    ridge: float = 0.1
    on: Literal["features", "inputs"] = "features"
    images: int = 0
    rank: int = 0
    reject: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ridge < float("inf"):
            raise ConsilienceError(f"`ridge` should be at least 0 and finite. Found `ridge = {self.ridge}`.")
        for name in ("images", "rank"):
            if getattr(self, name) < 0:
                raise ConsilienceError(
                    f"`{name}` should be at least 0. Found `{name} = {getattr(self, name)}`."
                )
        if self.images and self.rank:
            raise ConsilienceError(
                f"`images` or `rank` should be 0: S is made of one of them. Found `images = {self.images}`, `rank = {self.rank}`."
            )

    def summarise(self, learned: Learned, ctx: Context) -> Statistics | Module | Samples:
        found = sums(learned, self.psi(learned), second=not self.images)
        tensors = {"first": found["first"], "count": found["count"]}
        if self.images:
            tensors |= self._drawn(learned)
        elif self.rank:
            own = means(Statistics(tensors)) * found["count"][found["count"] > 0].sqrt()[:, None]
            u, rest = factors(found["second"] - own.T @ own, self.rank)
            tensors |= {"factor": u.float(), "rest": rest.float()}
        else:
            tensors["second"] = triangle(found["second"])
        if self.rejects:
            held = self.held(learned)
            tensors["validation"] = held[
                torch.randperm(len(held), generator=learned.generator)[:RESIDUALS]
            ].float()
        kind = Samples if self.images or self.rejects else Module if self.rank else Statistics
        return kind(tensors)

    def _drawn(self, learned: Learned) -> dict[str, Tensor]:
        """`images` examples of each class, drawn without replacement: x [M, ...] (`bytes`, 255 x, where that is whole), and y
        [M], which of the source's classes."""
        source = learned.source
        y = source.train.targets().cpu()
        order = torch.randperm(len(y), generator=learned.generator)
        own = [order[y[order] == c][: self.images] for c in source.classes]
        few = sum(len(i) < self.images for i in own)
        if few:
            warnings.warn(
                f"{few} classes of {source.name!r} have fewer than `images = {self.images}` examples and give what they have",
                stacklevel=2,
            )
        x, _ = source.train.select(torch.cat(own)).whole()
        x = x.cpu().float() if x.is_floating_point() else x.cpu()
        levels = (x * 255).round().clamp(0, 255) if x.is_floating_point() else x
        exact = x.is_floating_point() and torch.equal(levels / 255, x)
        which = torch.arange(len(own)).repeat_interleave(torch.tensor([len(i) for i in own]))
        return {"bytes" if exact else "x": levels.byte() if exact else x, "y": which.int()}

    def settle(self, item: Item, place: Callable[[Tensor], Tensor]) -> Item:
        """On the CPU; shared images pass the features here, once."""
        item = super().settle(item, place)
        if "y" not in item.tensors:
            return item
        tensors = dict(item.tensors)
        y = tensors.pop("y").long()
        x = tensors.pop("bytes").float() / 255 if "bytes" in tensors else tensors.pop("x")
        psi = torch.cat([place(part).double().cpu() for part in x.split(256)])
        mu = tensors["first"].T / tensors["count"].clamp_min(1)[:, None]
        return replace(item, tensors={**tensors, "residual": psi - mu[y]})

    def ready(self, items: tuple[Item, ...], known: tuple[Item, ...]) -> Anchors:
        return Distances(items, known, self.ridge)
