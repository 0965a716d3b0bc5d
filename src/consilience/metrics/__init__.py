"""The catalogue of metrics: how predictions are measured against targets, in sums that add up over chunks.

`cs.run(metric=...)` takes their names, what these functions return, an object of torchmetrics, or a list of
these. Nothing here imports torch before it is called.

>>> import torch
>>> from consilience import metrics
>>> p, y = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]), torch.tensor([2, 0])
>>> metrics.accuracy()(p, y), metrics.top_k(2)(p, y), metrics.top_k(2).name
(0.5, 1.0, 'top_k(k=2)')
"""

# The classes lie in files with a leading underscore, and functions import inside, as the aggregators' do: a
# submodule must not replace a function of its name, and the command line lists all names without torch.

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from consilience import lazy
from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from consilience.core.metrics import Metric as Metric
    from consilience.metrics._counted import F1 as F1
    from consilience.metrics._counted import Accuracy as Accuracy
    from consilience.metrics._counted import BalancedAccuracy as BalancedAccuracy
    from consilience.metrics._counted import IoU as IoU
    from consilience.metrics._counted import TopK as TopK
    from consilience.metrics._errors import MAE as MAE
    from consilience.metrics._errors import MSE as MSE
    from consilience.metrics._errors import R2 as R2
    from consilience.metrics._errors import MeanAngle as MeanAngle
    from consilience.metrics._likelihood import EvaluationLoss as EvaluationLoss
    from consilience.metrics._likelihood import Perplexity as Perplexity
    from consilience.metrics._others import Own as Own
    from consilience.metrics._others import TorchMetric as TorchMetric
    from consilience.metrics._ranked import AUROC as AUROC
else:
    __getattr__, __dir__ = lazy.attach(__name__)

__all__ = [
    "accuracy",
    "auroc",
    "balanced_accuracy",
    "f1",
    "iou",
    "loss",
    "mae",
    "mean_angle",
    "mse",
    "own",
    "perplexity",
    "r2",
    "top_k",
]


def accuracy() -> Accuracy:
    """Return the fraction of targets whose likeliest class is right. Targets: classes."""
    from consilience.metrics._counted import Accuracy

    return Accuracy()


def balanced_accuracy() -> BalancedAccuracy:
    """Return the mean over classes that occur of the fraction that is right (recall). Targets: classes."""
    from consilience.metrics._counted import BalancedAccuracy

    return BalancedAccuracy()


def top_k(k: int = 5) -> TopK:
    """Return the fraction of targets whose class is among the `k` likeliest. Targets: classes."""
    from consilience.metrics._counted import TopK

    return TopK(k)


def f1(average: str = "macro", threshold: float = 0.5) -> F1:
    """Return 2 TP / (2 TP + FP + FN), the mean over classes or of all counts. Targets: classes or labels.

    Args:
        average: "macro" is the mean over classes (labels) that occur or are predicted; "micro" counts all
            together.
        threshold: labels with a greater probability are predicted; of classes the likeliest is.
    """
    from consilience.metrics._counted import F1

    return F1(average, threshold)


def iou(threshold: float = 0.5) -> IoU:
    """Return the mean over classes of TP / (TP + FP + FN) (intersection over union). Targets: as of `f1`.

    Args:
        threshold: labels with a greater probability are predicted; of classes the likeliest is.
    """
    from consilience.metrics._counted import IoU

    return IoU(threshold)


def auroc() -> AUROC:
    """Return the area under the ROC curve; keeps all scores. Targets: classes or labels."""
    from consilience.metrics._ranked import AUROC

    return AUROC()


def mse() -> MSE:
    """Return the mean squared error. Targets: values; less is better."""
    from consilience.metrics._errors import MSE

    return MSE()


def mae() -> MAE:
    """Return the mean absolute error. Targets: values; less is better."""
    from consilience.metrics._errors import MAE

    return MAE()


def mean_angle() -> MeanAngle:
    """Return the mean angle between vectors, in degrees. Targets: values; less is better."""
    from consilience.metrics._errors import MeanAngle

    return MeanAngle()


def r2() -> R2:
    """Return the coefficient of determination, 1 - sum (y - p)^2 / sum (y - mean y)^2. Targets: values."""
    from consilience.metrics._errors import R2

    return R2()


def perplexity() -> Perplexity:
    """Return exp of the mean of -log p(y) over targets. Targets: classes; less is better."""
    from consilience.metrics._likelihood import Perplexity

    return Perplexity()


def loss() -> EvaluationLoss:
    """Return the mean loss over targets, with the loss that is trained. Less is better."""
    from consilience.metrics._likelihood import EvaluationLoss

    return EvaluationLoss()


def own(function: Callable[..., Any], higher: bool, name: str = "") -> Own:
    """Use a function of (predictions, targets) that gives a number; it keeps all predictions.

    Args:
        function: of p [N, C, *places] and y, on the CPU; it may return a float, or an array or tensor of one
            number.
        higher: whether more is better.
        name: in tables; "" is the name of the function.

    >>> import torch
    >>> def error_rate(p, y):
    ...     return (p.argmax(1) != y).double().mean()
    >>> metric = own(error_rate, higher=False)
    >>> metric.name, metric(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([1, 1]))
    ('error_rate', 0.5)
    """
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.metrics._others import Own

    # Without a direction a run would give no forgetting, so it is asked for here.
    if not isinstance(higher, bool):
        raise ConsilienceError(f"`higher` must be True or False, got {kind_of(higher)}.")
    return Own(function, higher, name)


suggest_arguments(__name__)
