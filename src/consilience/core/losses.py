"""Losses: what a task's outputs are trained by, and how they are answered with.

A loss is the mean over targets that are there: of classes all but -100, of values and labels all but NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of, unknown

KINDS = ("class", "value", "labels")
"""The kinds of targets: class numbers, numbers, and any of several labels (0 or 1 each)."""

NONE = -100
"""The target of a sample, or a place, that has no class; values and labels have NaN."""


def present(y: Tensor) -> Tensor:
    """Return which targets are there, in the shape of y.

    >>> present(torch.tensor([2, -100])).tolist(), present(torch.tensor([[0.5], [torch.nan]])).tolist()
    ([True, False], [[True], [False]])
    """
    return ~torch.isnan(y) if y.is_floating_point() else y != NONE


class Losses(NamedTuple):
    """The loss of each sample [B], and how much each counts [B]; None: all alike."""

    values: Tensor
    counts: Tensor | None = None

    def mean(self, weights: Tensor | None = None) -> Tensor:
        """Return sum w c v / sum w c, for weights w [B] of the samples; 0 where nothing counts."""
        if self.counts is None and weights is None:
            return self.values.mean()
        if self.counts is None:
            assert weights is not None
            return (self.values * weights).sum() / weights.sum()
        share = self.counts if weights is None else self.counts * weights
        # A batch may have no target at all; its loss is then 0, without a gradient.
        return (self.values * share).sum() / share.sum().clamp_min(torch.finfo(share.dtype).tiny)


@dataclass(frozen=True)
class Loss(ABC):
    """The loss of one task. Subclasses are frozen dataclasses of hyperparameters.

    For outputs o [B, C, *places] and targets y, the loss of a sample is the mean of `elements` over its
    targets that are there, weighted by `weight`.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    """The kinds of targets that it fits."""

    @abstractmethod
    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each target, in the shape of y. Targets that are not there may have any loss."""

    def weight(self, y: Tensor) -> Tensor | None:
        """Return how much each target counts, in the shape of y; None: all alike."""
        return None

    def there(self, y: Tensor) -> Tensor:
        """Return which targets are there, in the shape of y."""
        return present(y)

    def answer(self, out: Tensor) -> Tensor:
        """Return predictions from outputs [B, C, *places]: probabilities of classes or labels, or values."""
        return out

    def outputs(self, answer: Tensor) -> Tensor:
        """Return outputs that `answer` gives these predictions for: its inverse, to judge predictions by."""
        return answer

    def fitted(self, names: Sequence[str], width: int, columns: Sequence[int]) -> Self:
        """Return the loss for a task with these output names, in these of `width` columns."""
        return self

    def __call__(self, out: Tensor, y: Tensor, complete: bool = False) -> Losses:
        """Return the losses of samples. `complete` says that no target is missing."""
        # Values are kept in float32, and some losses of torch take one type only.
        if y.is_floating_point() and y.dtype != out.dtype:
            y = y.to(out.dtype)
        # Without missing targets there is nothing to mask and to count: this is the case of most steps.
        if complete and self.weight(y) is None:
            each = self.elements(out, y)
            return Losses(each if y.dim() == 1 else each.flatten(1).mean(1))

        there = self.there(y)
        # A missing class is filled with one that is not masked out: the gradient of an infinite loss is not
        # a number, and zero times that is not one either.
        fill: Tensor | int = 0
        if not y.is_floating_point() and len(out):
            fill = out[0].reshape(out.shape[1], -1)[:, 0].argmax()
        filled = torch.where(there, y, fill)
        each, weight = self.elements(out, filled), self.weight(filled)
        share = there.to(each.dtype) if weight is None else there * weight.to(each.dtype)
        # The loss of one that is missing may still be infinite: a mask may differ between samples.
        each = torch.where(there, each, 0)
        if y.dim() == 1:
            return Losses(each, share)

        # The mean of a sample and its count give the mean over all places of a batch, as torch computes it.
        counts = share.flatten(1).sum(1)
        values = (each * share).flatten(1).sum(1) / counts.clamp_min(torch.finfo(each.dtype).tiny)
        return Losses(values, counts)


def _check_weights(weights: Mapping[str, float] | tuple[float, ...] | None) -> None:
    """Refuse weights that are not numbers >= 0 by name."""
    if weights is None or isinstance(weights, tuple):
        return
    if not isinstance(weights, Mapping):
        raise ConsilienceError(f"`weights` of a loss must be factors by name, got {kind_of(weights)}.")
    for name, factor in weights.items():
        if isinstance(factor, str | bool) or not 0 <= factor < float("inf"):
            raise ConsilienceError(
                f"`weights` of a loss must be >= 0 and finite, got {factor!r} for {name!r}."
            )


def _by_column(
    weights: Mapping[str, float] | tuple[float, ...] | None,
    names: Sequence[str],
    width: int,
    columns: Sequence[int],
) -> tuple[float, ...] | None:
    """Return weights by name as one per column; those of other columns are 1."""
    if weights is None or isinstance(weights, tuple):
        return weights
    for name in weights:
        if name not in names:
            raise unknown("name of a weight", name, names, "the names of the task's outputs")
    found = [1.0] * width
    for name, column in zip(names, columns, strict=True):
        found[column] = float(weights.get(name, 1.0))
    return tuple(found)


def _weights_at(weights: Mapping[str, float] | tuple[float, ...] | None, y: Tensor) -> Tensor | None:
    """Return the weight of each target, from one weight per column."""
    if weights is None:
        return None
    assert isinstance(weights, tuple), "a loss with weights by name must be fitted to a task"
    return torch.tensor(weights, device=y.device)[y]


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """-log softmax(o)_y, of classes.

    `weights` are factors by class name (others: 1); the mean divides by their sum, as torch does. With
    `smoothing` s it is (1 - s) (-log p_y) + s mean_c (-log p_c), over the classes that the task has. With
    both, a weight is that of all the loss of its targets, where torch weighs each class of the second mean.

    >>> CrossEntropy()(torch.zeros(1, 4), torch.tensor([2])).values.exp()
    tensor([4.])
    """

    weights: Mapping[str, float] | tuple[float, ...] | None = None
    smoothing: float = 0.0

    kinds: ClassVar[tuple[str, ...]] = ("class",)

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ConsilienceError(f"`smoothing` must be in [0, 1), got {self.smoothing}.")
        _check_weights(self.weights)

    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        if not self.smoothing:
            return F.cross_entropy(out, y, reduction="none")
        log = out.log_softmax(1)
        own = log.gather(1, y.unsqueeze(1)).squeeze(1)
        # Columns of other tasks are -inf, and take no part in the mean.
        there = torch.isfinite(out)
        mean = torch.where(there, log, 0).sum(1) / there.sum(1)
        return -(1 - self.smoothing) * own - self.smoothing * mean

    def weight(self, y: Tensor) -> Tensor | None:
        return _weights_at(self.weights, y)

    def answer(self, out: Tensor) -> Tensor:
        return out.softmax(1)

    def outputs(self, answer: Tensor) -> Tensor:
        return answer.log()

    def fitted(self, names: Sequence[str], width: int, columns: Sequence[int]) -> Self:
        return replace(self, weights=_by_column(self.weights, names, width, columns))

    def __hash__(self) -> int:
        return hash((type(self), self.smoothing))


@dataclass(frozen=True)
class Focal(CrossEntropy):
    """(1 - p_y)^gamma (-log p_y), of classes: examples that are answered well count less. Lin et al. 2017.

    >>> Focal(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0])).values  # .5^2 log 2
    tensor([0.1733])
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < float("inf"):
            raise ConsilienceError(f"`gamma` must be >= 0 and finite, got {self.gamma}.")

    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        # 1 - p as -(e^-loss - 1): exact where p is nearly 1.
        own = F.cross_entropy(out, y, reduction="none")
        return (-torch.expm1(-own)) ** self.gamma * super().elements(out, y)

    __hash__ = CrossEntropy.__hash__


@dataclass(frozen=True)
class BCE(Loss):
    """-y log sigmoid(o) - (1 - y) log(1 - sigmoid(o)), of labels: each is a question of its own.

    `weights` are factors of the labels that are there (y = 1), by name; others: 1.

    >>> BCE()(torch.zeros(1, 2), torch.tensor([[1.0, float("nan")]])).values
    tensor([0.6931])
    """

    weights: Mapping[str, float] | tuple[float, ...] | None = None

    kinds: ClassVar[tuple[str, ...]] = ("labels",)

    def __post_init__(self) -> None:
        _check_weights(self.weights)

    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        factors = None
        if self.weights is not None:
            factors = torch.tensor(self.weights, dtype=out.dtype, device=out.device)
            factors = factors.view(-1, *[1] * (out.dim() - 2))
        return F.binary_cross_entropy_with_logits(out, y, reduction="none", pos_weight=factors)

    def answer(self, out: Tensor) -> Tensor:
        return out.sigmoid()

    def outputs(self, answer: Tensor) -> Tensor:
        return answer.logit()

    def fitted(self, names: Sequence[str], width: int, columns: Sequence[int]) -> Self:
        # Outputs are cut to the task's own columns, so that one weight per label is enough.
        return replace(self, weights=_by_column(self.weights, names, len(names), range(len(names))))

    def __hash__(self) -> int:
        return hash(type(self))


@dataclass(frozen=True)
class MSE(Loss):
    """(o - y)^2, of values.

    >>> MSE()(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, float("nan")]])).values
    tensor([4.])
    """

    kinds: ClassVar[tuple[str, ...]] = ("value",)

    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        return (out - y).square()


@dataclass(frozen=True)
class L1(Loss):
    """|o - y|, of values."""

    kinds: ClassVar[tuple[str, ...]] = ("value",)

    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        return (out - y).abs()


@dataclass(frozen=True)
class Huber(Loss):
    """(o - y)^2 / 2 up to |o - y| = delta, and delta (|o - y| - delta / 2) beyond, of values. Huber 1964.

    >>> Huber(1.0)(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2)).values  # (.125 + 2.5) / 2
    tensor([1.3125])
    """

    delta: float = 1.0

    kinds: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        if not 0 < self.delta < float("inf"):
            raise ConsilienceError(f"`delta` must be positive and finite, got {self.delta}.")

    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(out, y, reduction="none", delta=self.delta)


@dataclass(frozen=True)
class Poisson(Loss):
    """exp(o) - y o, of counts: outputs are logarithms of rates, and predictions are rates exp(o).

    >>> Poisson()(torch.zeros(1, 1), torch.tensor([[3.0]])).values
    tensor([1.])
    """

    kinds: ClassVar[tuple[str, ...]] = ("value",)

    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        return out.exp() - y * out

    def answer(self, out: Tensor) -> Tensor:
        return out.exp()

    def outputs(self, answer: Tensor) -> Tensor:
        return answer.log()


@dataclass(frozen=True)
class Cosine(Loss):
    """1 - cos(o, y) of vectors o and y [B, k, *places], of values: directions, such as surface normals.

    Predictions have length 1. A vector of length 0, or with a component that is missing, is no target.

    >>> Cosine()(torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 0.0]])).values
    tensor([1.])
    """

    kinds: ClassVar[tuple[str, ...]] = ("value",)

    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        # The same for all components, so that their mean is the loss of the vector.
        return (1 - F.cosine_similarity(out, y, dim=1)).unsqueeze(1).expand_as(y)

    def there(self, y: Tensor) -> Tensor:
        return directed(y).unsqueeze(1).expand_as(y)

    def answer(self, out: Tensor) -> Tensor:
        return F.normalize(out, dim=1)

    def fitted(self, names: Sequence[str], width: int, columns: Sequence[int]) -> Self:
        # A number alone has only a sign.
        if len(names) < 2:
            raise ConsilienceError(
                f"the cosine loss needs vectors of two components or more, got {', '.join(names)} alone."
            )
        return self


def directed(y: Tensor) -> Tensor:
    """Return which vectors [B, k, *places] have a direction: all components are there, and not all are 0.

    >>> directed(torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, torch.nan]])).tolist()
    [True, False, False]
    """
    return present(y).all(1) & (y != 0).any(1)


@dataclass(frozen=True)
class Own(Loss):
    """A function (outputs [B, C, *places], targets) -> the loss of each target, in the shape of the targets.

    `like` is the loss whose kind of targets and answers it has.

    >>> loss = Own(lambda out, y: (out - y).abs() ** 3, like=MSE())
    >>> loss(torch.zeros(1, 1), torch.tensor([[2.0]])).values
    tensor([8.])
    """

    function: Callable[[Tensor, Tensor], Tensor]
    like: Loss

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the loss that it is like."""
        return self.like.kinds

    def elements(self, out: Tensor, y: Tensor) -> Tensor:
        each = self.function(out, y)
        if each.shape != y.shape:
            raise ConsilienceError(
                f"a loss must have the shape of the targets, got {tuple(each.shape)} for {tuple(y.shape)}; "
                "return the loss of each target, not their mean."
            )
        return each

    def there(self, y: Tensor) -> Tensor:
        return self.like.there(y)

    def answer(self, out: Tensor) -> Tensor:
        return self.like.answer(out)

    def outputs(self, answer: Tensor) -> Tensor:
        return self.like.outputs(answer)


LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "focal": Focal,
    "bce": BCE,
    "mse": MSE,
    "l1": L1,
    "huber": Huber,
    "poisson": Poisson,
    "cosine": Cosine,
}
CATALOGUE = "consilience.losses"
"""Where the functions that make these losses are."""

DEFAULTS: dict[str, Loss] = {"class": CrossEntropy(), "value": MSE(), "labels": BCE()}
"""The loss of each kind of targets where none is chosen."""


def loss_of(loss: object, kind: str) -> Loss:
    """Return a loss by name, a function as `Own`, or the default of a kind of targets.

    Raises ConsilienceError for one that does not fit the kind.

    >>> loss_of("huber", "value"), loss_of(None, "class") == CrossEntropy()
    (Huber(delta=1.0), True)
    """
    if loss is None:
        return DEFAULTS[kind]
    # A name from a configuration, a function of the catalogue (which makes a loss), or one of the user's.
    if getattr(loss, "__module__", "") == CATALOGUE and getattr(loss, "__name__", "") in LOSSES:
        loss = str(loss.__name__)  # type: ignore[attr-defined]
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise unknown("loss", loss, LOSSES)
        loss = LOSSES[loss]()
    elif callable(loss) and not isinstance(loss, Loss | type):
        loss = Own(loss, DEFAULTS[kind])
    if not isinstance(loss, Loss):
        raise ConsilienceError(f"`loss` must be one of consilience.losses, got {kind_of(loss)}.")
    if kind not in loss.kinds:
        fits = [name for name, made in LOSSES.items() if kind in made.kinds]
        raise ConsilienceError(
            f"the loss of targets of kind {kind!r} must be {', '.join(fits)} or a function, "
            f"got {type(loss).__name__}."
        )
    return loss


def fits(loss: object, kind: str) -> bool:
    """Whether a loss, or the loss of that name, fits targets of a kind; functions fit all."""
    if isinstance(loss, str):
        return loss not in LOSSES or kind in LOSSES[loss].kinds
    return kind in loss.kinds if isinstance(loss, Loss) else True
