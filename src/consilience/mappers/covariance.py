"""The Mahalanobis mapper: class means and one covariance of all tasks.

The covariance comes from sums, from low-rank factors, or from shared images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from consilience.core.contexts import Context, Learned
from consilience.core.errors import ConsilienceError
from consilience.core.message import Item, Module, Samples, Statistics
from consilience.core.outliers import Clip
from consilience.core.tree import Input, one_tensor
from consilience.core.warning import warn
from consilience.mappers._screen import Screen
from consilience.mappers.mixture import (
    Anchored,
    Anchors,
    Screened,
    grouped,
    impossible,
    means,
    misshapen,
    sums,
)

RESIDUALS = 64
"""How many validation examples' features an anchor keeps."""


class Scatter(NamedTuple):
    """A sum [d, d] of squares about class means, of how many examples, and how large its rounding may be."""

    total: Tensor
    examples: float
    noise: float


def triangle(square: Tensor) -> Tensor:
    """Return the upper triangle [d (d + 1) / 2] of a symmetric matrix [d, d], row by row.

    >>> triangle(torch.tensor([[1.0, 2.0], [2.0, 3.0]])).tolist()
    [1.0, 2.0, 3.0]
    """
    return square[tuple(torch.triu_indices(*square.shape, device=square.device))]


def symmetric(packed: Tensor, d: int) -> Tensor:
    """Return the matrix [d, d] with this `triangle`."""
    square = packed.new_zeros(d, d)
    square[tuple(torch.triu_indices(d, d, device=packed.device))] = packed
    return square.add_(square.triu(1).T)


def factors(scatter: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U [min(rank, d), d] and a diagonal [d] with scatter ~ U^T U + diag: the largest eigenvalues."""
    # `eigh` reads one triangle only, and sums in floats are not symmetric to the last bit.
    values, vectors = torch.linalg.eigh((scatter + scatter.T) / 2)
    values, vectors = values.clamp_min(0)[-rank:], vectors[:, -rank:]
    factor = (vectors * values.sqrt()).T
    rest = scatter.diagonal() - factor.square().sum(0)
    # Smaller rests are rounding, which may be negative.
    return factor, rest.where(rest > 1e-12 * scatter.diagonal(), 0.0)


def spread(bank: Sequence[Item], clip: float = 0.0) -> tuple[Tensor, float]:
    """Return the covariance S [d, d] within the classes of all anchors, and its noise.

    With `clip` an anchor's scatter counts only so far as its variance, the trace per example, is at most
    `clip` times the median one, so that one anchor cannot make S its own.

    The noise is the largest eigenvalue that may come of rounding alone. S = 1/N sum of scatters about the
    class means: of sums, second - sum_c n_c mu_c mu_c^T; of factors, U^T U + diag(rest); of shared examples,
    that of their features. N counts the examples that those are of.
    """
    if clip:
        bank = _limited(bank, clip)
    width = len(bank[0].tensors["first"])
    total = torch.zeros(width, width, dtype=torch.float64)
    count, noise = 0.0, 0.0
    for kind, add in (("second", _add_sums), ("factor", _add_factors), ("residual", _add_residuals)):
        items = [item for item in bank if kind in item.tensors]
        if items:
            total, count, noise = add(items, Scatter(total, count, noise))
    count = max(count, 1.0)
    return (total + total.T) / (2 * count), noise / count


def _limited(bank: Sequence[Item], clip: float) -> list[Item]:
    """Return the anchors with no scatter of more than `clip` times the median variance."""
    variances = torch.tensor([_variance(item) for item in bank], dtype=torch.float64)
    limit = clip * float(variances.median())
    shares = (limit / variances.clamp_min(limit or 1.0)).tolist()
    return [item if share == 1 else _shrunk(item, share) for item, share in zip(bank, shares, strict=True)]


def _variance(item: Item) -> float:
    """Return the trace of an anchor's scatter, per example."""
    tensors, count = item.tensors, max(float(item.tensors["count"].sum()), 1.0)
    if "residual" in tensors:
        return float(tensors["residual"].square().sum()) / len(tensors["residual"])
    if "factor" in tensors:
        return float(tensors["factor"].double().square().sum() + tensors["rest"].double().sum()) / count
    return float(_scatter_of_sums(item).trace()) / count


def _scatter_of_sums(item: Item) -> Tensor:
    counts = item.tensors["count"]
    centres = means(item) * counts[counts > 0].sqrt()[:, None]
    return symmetric(item.tensors["second"], centres.shape[1]) - centres.T @ centres


def _shrunk(item: Item, share: float) -> Item:
    """Return an anchor whose scatter is this share of what it was; its means are the same."""
    tensors = dict(item.tensors)
    if "residual" in tensors:
        tensors["residual"] = tensors["residual"] * share**0.5
    elif "factor" in tensors:
        tensors |= {"factor": tensors["factor"] * share**0.5, "rest": tensors["rest"] * share}
    else:
        tensors["second"] = tensors["second"] - triangle(_scatter_of_sums(item)) * (1 - share)
    return replace(item, tensors=tensors)


def _add_sums(items: Sequence[Item], scatter: Scatter) -> Scatter:
    """Add the scatters of anchors with second moments."""
    total, count, noise = scatter
    width = len(total)
    packed = torch.zeros_like(items[0].tensors["second"])
    for item in items:
        packed += item.tensors["second"]
    total += symmetric(packed, width)

    # A direction in which nothing varies is left with the rounding of the second moments.
    noise += width * torch.finfo(torch.float64).eps * float(total.trace())
    scaled = []
    for item in items:
        counts = item.tensors["count"]
        scaled.append(means(item) * counts[counts > 0].sqrt()[:, None])
    centres = torch.cat(scaled)
    total -= centres.T @ centres
    return Scatter(total, count + sum(float(item.tensors["count"].sum()) for item in items), noise)


def _add_factors(items: Sequence[Item], scatter: Scatter) -> Scatter:
    """Add the scatters of anchors with low-rank factors, which are in float32."""
    total, count, noise = scatter
    stacked = torch.cat([item.tensors["factor"] for item in items]).double()
    total += stacked.T @ stacked
    for item in items:
        total.diagonal().add_(item.tensors["rest"])
        count += float(item.tensors["count"].sum())
    return Scatter(total, count, noise + 4 * torch.finfo(torch.float32).eps * float(total.trace()))


def _add_residuals(items: Sequence[Item], scatter: Scatter) -> Scatter:
    """Add the scatters of anchors with examples: their features less the class means."""
    total, count, noise = scatter
    residual = torch.cat([item.tensors["residual"] for item in items])
    total += residual.T @ residual
    rounding = len(total) * torch.finfo(torch.float64).eps * float(residual.square().sum())
    return Scatter(total, count + len(residual), noise + rounding)


def whitening(bank: Sequence[Item], ridge: float, clip: float = 0.0) -> Tensor:
    """Return W [d, r] with W W^T = (S + ridge tr(S)/d I)^-1, S the covariance within classes.

    With `ridge` = 0 it is the pseudo-inverse. `clip` is that of `spread`.
    """
    covariance, noise = spread(bank, clip)
    width, eye = len(covariance), torch.eye(len(covariance), dtype=torch.float64)
    lift = ridge * float(covariance.trace()) / width
    if lift > 0:
        lower, failed = torch.linalg.cholesky_ex(covariance + lift * eye)
        if not failed:
            inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
            return inverse.T.contiguous()

    # Without a ridge, or where it is lost in rounding, directions without variance are left out.
    values, vectors = torch.linalg.eigh(covariance)
    if ridge:
        values = values.clamp_min(0) + lift
    there = values > (0 if ridge else noise)
    return vectors[:, there] * values[there].rsqrt() if bool(there.any()) else eye


class Distances(Screened):
    """-min_c ||(x - mu_c) W||^2 over the classes of each expert."""

    def __init__(self, items: Sequence[Item], bank: Sequence[Item], ridge: float, clip: float = 0.0) -> None:
        points = [means(item) for item in items]
        self.group, every = grouped(points), torch.cat(points)
        self.centre, self.white = every.mean(0).float(), whitening(bank, ridge, clip)
        # About their centre the points are small, and so is the rounding of distances.
        self.points = (every - self.centre) @ self.white
        self.screen = Screen.of(self.points @ self.white.T, -0.5 * self.points.square().sum(1), self.group)

        # Scores of validation examples change with W, so they are computed here from the features.
        self.own: list[Tensor | None] = []
        for k, item in enumerate(items):
            held = item.tensors.get("validation")
            if held is None:
                self.own.append(None)
            else:
                self.own.append(self._near(held.double())[:, self.group == k].amax(1).sort().values)

    def _near(self, psi: Tensor) -> Tensor:
        white = (psi.double() - self.centre) @ self.white
        return -torch.cdist(white, self.points, compute_mode="donot_use_mm_for_euclid_dist").square()

    def scores(self, psi: Tensor) -> Tensor:
        near = self._near(psi)
        return torch.stack([near[:, self.group == k].amax(1) for k in range(len(self.own))], 1)

    def columns(self, x: Tensor) -> Tensor:
        return (x - self.centre).float()

    def exact(self, psi: Tensor, rows: Tensor, j: Tensor) -> Tensor:
        # Each place is whitened once, however many anchors are left for it.
        distinct, where = rows.unique(return_inverse=True)
        white = (psi[distinct].double() - self.centre) @ self.white
        return -(white[where] - self.points[j]).square().sum(1)


@dataclass(frozen=True)
class Mahalanobis(Anchored):
    """score = -min_c (psi - mu_c)^T S^-1 (psi - mu_c) over the classes of the source.

    S = 1/N sum_c sum_{i: y_i = c} (psi_i - mu_c)(psi_i - mu_c)^T is tied: over all classes of all anchors in
    the bank, each anchor's classes being its own. S + `ridge` x (mean variance) I is inverted; with `ridge` =
    0 it is the pseudo-inverse, which leaves out directions without variance, and any invertible linear map of
    the features changes nothing. It is LDA with equal priors, its classes grouped by source. Anchors have
    class sums and counts, and S from

    - all second moments, their upper triangle: those of the same classes add, S is exact, and no example
      leaves its agent (the default);
    - `rank` = r: of each source's scatter within classes the r largest eigenfactors, and the diagonal of the
      rest: exact from its rank on;
    - `images` = m: m images of each class, as bytes where they are k/255, whose features the receiver
      computes (once per anchor): what the paper does, with m = 5. N counts those images. A class with fewer
      gives what it has, and a warning says so. Fewer images than features leave S singular: the ridge, or the
      pseudo-inverse, as above.

    With `reject` > 0 an anchor also has the features of at most 64 validation examples: they are sent,
    because S changes as anchors arrive, and their scores with it. An input is unknown where its score by the
    best task is below that task's own `reject` quantile of them. Lee et al. 2018; Ge et al. 2023 (SKILL).
    """

    ridge: float = 0.1
    on: Literal["features", "inputs"] = "features"
    images: int = 0
    rank: int = 0
    reject: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ridge < float("inf"):
            raise ConsilienceError(f"`ridge` must be at least 0 and finite, got {self.ridge}.")
        for name in ("images", "rank"):
            if getattr(self, name) < 0:
                raise ConsilienceError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.images and self.rank:
            raise ConsilienceError(
                "`images` or `rank` must be 0, since S is made of one of them, "
                f"got {self.images} and {self.rank}."
            )

    def misfit(self, anchor: Item) -> str | None:
        sizes: dict[str, int] = {}
        form = {"first": "dC", "count": "C"} | ({"validation": "Vd"} if self.rejects else {})
        if (reason := misshapen(anchor, form, sizes)) is not None:
            return reason
        if (reason := impossible(anchor.tensors["count"], means(anchor))) is not None:
            return reason
        if "y" in anchor.tensors:
            return self._bad_images(anchor, sizes)

        # Of sums or of factors, whatever this agent makes itself.
        if "factor" in anchor.tensors:
            if (reason := misshapen(anchor, {"factor": "rd", "rest": "d"}, sizes)) is not None:
                return reason
            positive = torch.cat([anchor.tensors[name].double() for name in ("count", "rest")])
            return impossible(positive, anchor.tensors["factor"])
        second = anchor.tensors.get("second")
        if second is None or second.dim() != 1 or len(second) != sizes["d"] * (sizes["d"] + 1) // 2:
            got = "none" if second is None else tuple(second.shape)
            return f"`second` of an anchor must be the triangle of [{sizes['d']}, {sizes['d']}], got {got}"
        within, noise = spread([anchor])
        if float(within.trace()) < -noise:
            return f"the variance of an anchor must be positive, got {float(within.trace()):g}"
        return None

    @staticmethod
    def _bad_images(anchor: Item, sizes: dict[str, int]) -> str | None:
        """Return why the images of an anchor cannot be placed, or None."""
        images = anchor.tensors.get("bytes", anchor.tensors.get("x"))
        y = anchor.tensors["y"]
        if images is None or images.dim() < 2 or y.dim() != 1 or len(images) != len(y) or not len(y):
            return "an anchor of images must have one class per image, got others"
        if y.is_floating_point() or not 0 <= int(y.min()) <= int(y.max()) < sizes["C"]:
            return f"images of an anchor must be of its {sizes['C']} classes, got others"
        return None

    def width(self, anchor: Item) -> int:
        return len(anchor.tensors["first"])

    def summarise(self, learned: Learned, ctx: Context) -> Statistics | Module | Samples:
        found = sums(learned, self.limited(learned), second=not self.images)
        count = found["count"]
        tensors = {"first": found["first"], "count": count}
        if self.images:
            tensors |= self._drawn(learned)
        elif self.rank:
            # Second moments are about 0; factors are of the scatter about the class means.
            centres = means(Statistics(tensors)) * count[count > 0].sqrt()[:, None]
            factor, rest = factors(found["second"] - centres.T @ centres, self.rank)
            tensors |= {"factor": factor.float(), "rest": rest.float()}
        else:
            tensors["second"] = triangle(found["second"])
        if self.rejects:
            held = self.held(learned)
            drawn = torch.randperm(len(held), generator=learned.generator)[:RESIDUALS]
            tensors["validation"] = held[drawn].float()

        # Examples are sent as Samples; of the others only sums add, and factors do not.
        if self.images or self.rejects:
            return Samples(tensors)
        return Module(tensors) if self.rank else Statistics(tensors)

    def _drawn(self, learned: Learned) -> dict[str, Tensor]:
        """Draw `images` examples of each class without replacement.

        Returns x [M, ...] (`bytes`, 255 x, where those are whole numbers), and y [M], places in
        `source.classes`.
        """
        source = learned.source
        y = source.train.targets().cpu()
        order = torch.randperm(len(y), generator=learned.generator)
        if self.clip:
            # Images are sent as they are, so that those beyond the limit are not drawn.
            psi = self.psi(learned)
            there = torch.cat([psi(part) for part, _ in source.train.chunks(1024)])
            order = order[~Clip.of(there, self.clip).beyond(there)[order]]
        own = [order[y[order] == c][: self.images] for c in source.classes]
        few = sum(len(index) < self.images for index in own)
        if few:
            warn(
                f"{few} classes of {source.name!r} have fewer than `images = {self.images}` examples; "
                "they give all that they have"
            )
        x = one_tensor(source.train.select(torch.cat(own)).whole()[0], "an anchor of images")
        which = torch.arange(len(own)).repeat_interleave(torch.tensor([len(index) for index in own]))
        if not x.is_floating_point():
            return {"x": x.cpu(), "y": which.int()}

        # Images come from bytes, which are a quarter of the floats.
        x = x.cpu().float()
        levels = (x * 255).round().clamp(0, 255)
        exact = torch.equal(levels / 255, x)
        return {"bytes" if exact else "x": levels.byte() if exact else x, "y": which.int()}

    def settle(self, item: Item, place: Callable[[Input], Tensor]) -> Item:
        """Return the anchor on the CPU; the features of shared images are computed here, once."""
        item = super().settle(item, place)
        if "y" not in item.tensors:
            return item
        tensors = dict(item.tensors)
        y = tensors.pop("y").long()
        x = tensors.pop("bytes").float() / 255 if "bytes" in tensors else tensors.pop("x")
        psi = torch.cat([place(part).double().cpu() for part in x.split(256)])
        # A class without examples has no mean; the clamp only avoids dividing by 0.
        mu = tensors["first"].T / tensors["count"].clamp_min(1)[:, None]
        return replace(item, tensors={**tensors, "residual": psi - mu[y]})

    def ready(self, items: tuple[Item, ...], every: tuple[Item, ...]) -> Anchors:
        return Distances(items, every, self.ridge, self.clip)
