"""The catalogue of priors: what an inversion minimises besides the teacher's loss (`priors=` of a maker).

>>> import consilience as cs
>>> cs.memory.inversion(priors=[l2(), blur(0.1), augmented(flip=True)]).priors[1]
Blur(strength=0.1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from consilience.memory._priors import (
        L2,
        Augmented,
        BatchNormStatistics,
        Blur,
        Disagreement,
        TotalVariation,
    )

__all__ = ["augmented", "batch_norm", "blur", "disagreement", "l2", "total_variation"]

# Classes are imported in functions, since torch takes seconds to load.


def l2(strength: float = 1e-4) -> L2:
    """Penalise the squared norm of each sample: strength x ||x||^2."""
    from consilience.memory._priors import L2

    return L2(strength)


def blur(strength: float = 0.01) -> Blur:
    """Penalise what a 3 x 3 Gaussian blur takes away from an image: strength x ||x - blur(x)||^2."""
    from consilience.memory._priors import Blur

    return Blur(strength)


def total_variation(strength: float = 1e-3, power: Literal[1, 2] = 1) -> TotalVariation:
    """Penalise differences of neighbouring pixels: strength x sum |difference|^power."""
    from consilience.memory._priors import TotalVariation

    return TotalVariation(strength, power)


def batch_norm(strength: float = 1.0, of: Literal["std", "variance"] = "std") -> BatchNormStatistics:
    """Pull the statistics of a batch, at every batch norm of the teacher, to the running ones.

    Yin et al. 2020 (DeepInversion).
    """
    from consilience.memory._priors import BatchNormStatistics

    return BatchNormStatistics(strength, of)


def augmented(shift: float = 0.1, angle: float = 10.0, flip: bool = False) -> Augmented:
    """Show the teacher each image moved, turned and mirrored at random, in another way at every step.

    `shift` is a part of each side, `angle` is in degrees.
    """
    from consilience.memory._priors import Augmented

    return Augmented(shift, angle, flip)


def disagreement(strength: float = 1.0) -> Disagreement:
    """Prefer samples on which teacher and student disagree: strength x (1 - JS).

    Yin et al. 2020 (Adaptive DeepInversion).
    """
    from consilience.memory._priors import Disagreement

    return Disagreement(strength)


suggest_arguments(__name__)
