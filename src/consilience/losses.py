"""The catalogue of losses: what a task is trained by, for `Training(loss=...)` and `data.arrays(loss=...)`.

A loss is the mean over the targets that are there: of classes all but -100, of values and labels all but NaN.
Both take the names of these functions too, or a function (outputs, targets) -> the loss of each target.
Nothing here imports torch before it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from consilience import lazy
from consilience.core.errors import suggest_arguments

# The classes, for those who make a loss of their own, load when they are asked for.
if TYPE_CHECKING:
    from torch import Tensor

    from consilience.core.losses import BCE as BCE
    from consilience.core.losses import L1 as L1
    from consilience.core.losses import MSE as MSE
    from consilience.core.losses import Cosine as Cosine
    from consilience.core.losses import CrossEntropy as CrossEntropy
    from consilience.core.losses import Focal as Focal
    from consilience.core.losses import Huber as Huber
    from consilience.core.losses import Loss as Loss
    from consilience.core.losses import Own as Own
    from consilience.core.losses import Poisson as Poisson
else:
    __getattr__, __dir__ = lazy.attach(__name__)

__all__ = ["bce", "cosine", "cross_entropy", "focal", "huber", "l1", "mse", "own", "poisson"]


def cross_entropy(weights: Mapping[str, float] | None = None, smoothing: float = 0.0) -> CrossEntropy:
    """Return -log softmax(o)_y, of classes: the default.

    Args:
        weights: factors by class name, others 1; the mean divides by their sum, as torch does.
        smoothing: s of (1 - s) (-log p_y) + s mean_c (-log p_c), over the classes of the task.

    >>> import torch
    >>> cross_entropy()(torch.zeros(1, 4), torch.tensor([2])).values.exp()
    tensor([4.])
    """
    from consilience.core.losses import CrossEntropy

    return CrossEntropy(weights, smoothing)


def focal(gamma: float = 2.0, weights: Mapping[str, float] | None = None) -> Focal:
    """Return (1 - p_y)^gamma (-log p_y), of classes. Lin et al. 2017.

    >>> import torch
    >>> focal()(torch.zeros(1, 2), torch.tensor([0])).values
    tensor([0.1733])
    """
    from consilience.core.losses import Focal

    return Focal(weights, gamma=gamma)


def bce(weights: Mapping[str, float] | None = None) -> BCE:
    """Return the binary cross-entropy of each of several labels: the default of labels.

    Args:
        weights: factors of the labels that are there, by name; others 1.
    """
    from consilience.core.losses import BCE

    return BCE(weights)


def mse() -> MSE:
    """Return (o - y)^2, of values: the default of values."""
    from consilience.core.losses import MSE

    return MSE()


def l1() -> L1:
    """Return |o - y|, of values."""
    from consilience.core.losses import L1

    return L1()


def huber(delta: float = 1.0) -> Huber:
    """Return (o - y)^2 / 2 up to |o - y| = delta, delta (|o - y| - delta / 2) beyond, of values.

    Huber 1964.
    """
    from consilience.core.losses import Huber

    return Huber(delta)


def poisson() -> Poisson:
    """Return exp(o) - y o, of counts as values: outputs are logarithms of rates, predictions are rates."""
    from consilience.core.losses import Poisson

    return Poisson()


def cosine() -> Cosine:
    """Return 1 - cos(o, y) of vectors as values, such as surface normals: predictions have length 1."""
    from consilience.core.losses import Cosine

    return Cosine()


def own(function: Callable[[Tensor, Tensor], Tensor], like: Loss) -> Own:
    """Return a loss of one's own: function(outputs [B, C, *places], targets) -> the loss of each target.

    Args:
        function: returns the loss of each target, in the shape of the targets.
        like: a loss whose kind of targets, and whose predictions, it has.

    >>> import torch
    >>> cubed = own(lambda out, y: (out - y).abs() ** 3, like=mse())
    >>> cubed(torch.zeros(1, 1), torch.tensor([[2.0]])).values
    tensor([8.])
    """
    from consilience.core.losses import Own

    return Own(function, like)


suggest_arguments(__name__)
