"""Methods known from multi-task learning: gradients that are reconciled, and losses that are balanced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from consilience.core.correction import Correction
    from consilience.core.method import Method


# Aggregators of the gradients of a step.


def pcgrad(level: Literal["parameters", "features"] = "parameters") -> Method:
    """Project away from each objective's gradient what opposes another's, then average.

    Paper: Yu et al. 2020.

    Args:
        level: "features" weighs tasks by their gradients with respect to the features that they share, at one
            backward pass in all; tasks need the same inputs (`data.tasks`).
    """
    return _reconciled("pcgrad", level)


def mgda(level: Literal["parameters", "features"] = "parameters") -> Method:
    """Step along the shortest vector in the convex hull of the objectives' gradients.

    Paper: Sener & Koltun 2018.

    Args:
        level: "parameters" or "features", as in `pcgrad`.
    """
    return _reconciled("mgda", level)


def cagrad(c: float = 0.5, level: Literal["parameters", "features"] = "parameters") -> Method:
    """Within `c` of the mean gradient's length around it, help most the objective that gains least.

    Paper: Liu et al. 2021.

    Args:
        c: how far from the mean, in [0, 1); 0 is the mean.
        level: "parameters" or "features", as in `pcgrad`.
    """
    return _reconciled("cagrad", level, c=c)


def gradvac(beta: float = 0.01, level: Literal["parameters", "features"] = "parameters") -> Method:
    """Turn each objective's gradient towards those that it agrees with less than it used to.

    Paper: Wang et al. 2021.

    Args:
        beta: how quickly the average of earlier cosines follows the present ones.
        level: "parameters" or "features", as in `pcgrad`.
    """
    return _reconciled("gradvac", level, beta=beta)


def imtl_g(level: Literal["parameters", "features"] = "parameters") -> Method:
    """Step so that the projections on all objectives' gradients are equally long. Needs torchjd.

    Paper: Liu et al. 2021.

    Args:
        level: "parameters" or "features", as in `pcgrad`.
    """
    return _reconciled("imtl_g", level)


def nash_mtl(level: Literal["parameters", "features"] = "parameters") -> Method:
    """Step by the Nash bargain of the objectives: all gain the same share.

    Paper: Navon et al. 2022.

    Args:
        level: "parameters" or "features", as in `pcgrad`.
    """
    return _reconciled("nash_mtl", level)


def fairgrad(alpha: float = 1.0, level: Literal["parameters", "features"] = "parameters") -> Method:
    """Step by an alpha-fair bargain of the objectives.

    Paper: Ban & Ji 2024.

    Args:
        alpha: from the mean (0) by the Nash bargain (1) to the objective that gains least (infinity).
        level: "parameters" or "features", as in `pcgrad`.
    """
    return _reconciled("fairgrad", level, alpha=alpha)


def aligned_mtl(level: Literal["parameters", "features"] = "parameters") -> Method:
    """Bring the matrix of gradients to condition 1, then average. Needs torchjd.

    Paper: Senushkin et al. 2023.

    Args:
        level: "parameters" or "features", as in `pcgrad`.
    """
    return _reconciled("aligned_mtl", level)


def upgrad(level: Literal["parameters", "features"] = "parameters") -> Method:
    """Project each gradient on the directions that no other opposes, then average. Needs torchjd.

    Paper: Quinton & Rey 2024.

    Args:
        level: "parameters" or "features", as in `pcgrad`.
    """
    return _reconciled("upgrad", level)


def sdmgrad(towards_mean: float = 0.3, level: Literal["parameters", "features"] = "parameters") -> Method:
    """Step along the shortest vector in the hull of the gradients, each moved towards their mean.

    Paper: Xiao, Ban & Ji 2023.

    Args:
        towards_mean: the paper's lambda; 0 is MGDA.
        level: "parameters" or "features", as in `pcgrad`.
    """
    return _reconciled("sdmgrad", level, towards_mean=towards_mean)


def rlw() -> Method:
    """Weigh the objectives at random in each step.

    Paper: Lin et al. 2022.
    """
    return _reconciled("rlw", "parameters")


def _reconciled(name: str, level: Literal["parameters", "features"], **arguments: Any) -> Method:
    from consilience import aggregators
    from consilience.core.errors import ConsilienceError
    from consilience.core.method import Method

    if level not in ("parameters", "features"):
        raise ConsilienceError(f"`level` must be 'parameters' or 'features', got {level!r}.")
    step = getattr(aggregators, name)(**arguments)
    return Method(name, step_aggregator=step, step_level=None if level == "parameters" else level)


def conflicts(points: int = 10, layers: bool = False) -> Method:
    """Note how the gradients of tasks agree (`Result.visits`); training stays as it is.

    Paper: Yu et al. 2020.

    Args:
        points: in how many parts a visit is cut.
        layers: whether to say it by layer too.
    """
    from consilience.core.method import Method
    from consilience.corrections.conflicts import Conflicts

    return Method("conflicts", (Conflicts(points, layers),))


# Networks of tasks.


def soft_sharing(
    strength: float = 0.1, form: Literal["l2", "trace_norm", "low_rank"] = "l2", rank: int = 1
) -> Method:
    """Train a network per task, and penalise how far the networks are from one another.

    Paper: Duong et al. 2015.

    Args:
        strength: 0 are independent networks; at most 1 / lr under SGD, where networks become one.
        form: the squared distance to the mean of the networks, the trace norm of their stacked entries (Yang
            & Hospedales 2017), or the squared distance to the nearest stack of rank `rank`.
        rank: for "low_rank".
    """
    from consilience.core.method import Method
    from consilience.corrections.soft_sharing import SoftSharing

    return Method("soft_sharing", (SoftSharing(strength, form, rank),))


# Weights of the losses of a step.


def task_weights(weights: Mapping[str, float] | Literal["size"] = "size") -> Method:
    """Weigh the loss of each task by fixed numbers, or by its amount of data.

    Paper: the common baseline (in Kendall, Gal & Cipolla 2018, who search for such weights).

    Args:
        weights: numbers by the name of the source, 1 for those that it leaves out, scaled to a mean of 1; or
            "size", so that each training example counts alike.
    """
    from consilience.corrections.balancing import TaskWeights

    given = weights if isinstance(weights, str) else tuple(sorted(weights.items()))
    return _balanced("task_weights", TaskWeights(given))


def uncertainty(form: Literal["by kind", "regression", "classification"] = "by kind") -> Method:
    """Learn the noise of each task next to the model, and weigh its loss by 1 / noise^2.

    Paper: Kendall, Gal & Cipolla 2018.

    Args:
        form: of the likelihood; "by kind" takes that of regression for values only.
    """
    from consilience.corrections.balancing import Uncertainty

    return _balanced("uncertainty", Uncertainty(form))


def dwa(temperature: float = 2.0) -> Method:
    """Weigh each task by how slowly its loss fell over the last two epochs.

    Paper: Liu, Johns & Davison 2019.

    Args:
        temperature: of the softmax; large ones give equal weights.
    """
    from consilience.corrections.balancing import DWA

    return _balanced("dwa", DWA(temperature))


def gradnorm(alpha: float = 1.5, lr: float = 0.025) -> Method:
    """Learn weights that bring the tasks' gradient norms together, larger for tasks that train slowly.

    Paper: Chen et al. 2018.

    Args:
        alpha: how much slow tasks are favoured; 0 makes all norms equal.
        lr: of the weights.
    """
    from consilience.corrections.balancing import GradNorm

    return _balanced("gradnorm", GradNorm(alpha, lr))


def famo(lr: float = 0.025, decay: float = 0.01) -> Method:
    """Learn weights with which all losses fall at the same rate, at the cost of one backward pass.

    Paper: Liu, Feng, Stone & Liu 2023.

    Args:
        lr: of the weights.
        decay: draws the weights back to equal ones.
    """
    from consilience.corrections.balancing import FAMO

    return _balanced("famo", FAMO(lr, decay))


def worst_task() -> Method:
    """Train in each step the task with the largest loss (min-max).

    Paper: Mehta et al. 2012, minimax multi-task learning.
    """
    from consilience.corrections.balancing import WorstTask

    return _balanced("worst_task", WorstTask())


def scale_invariant() -> Method:
    """Add the logarithms of the losses, so that their units do not matter.

    Paper: Navon et al. 2022, who compare with it as SI.
    """
    from consilience.corrections.balancing import ScaleInvariant

    return _balanced("scale_invariant", ScaleInvariant())


def deep_supervision(weight: float = 1.0) -> Method:
    """Train the earlier answers of a model too, such as those of PAD-Net and MTI-Net.

    Paper: Xu, Ouyang, Wang & Sebe 2018.

    Args:
        weight: of the loss of each earlier answer.
    """
    from consilience.corrections.supervision import DeepSupervision

    return _balanced("deep_supervision", DeepSupervision(weight))


def _balanced(name: str, correction: Correction) -> Method:
    from consilience.core.method import Method

    return Method(name, (correction,))
