"""Continual learning by rehearsal: old examples are seen again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.buffer import Policy
    from consilience.core.method import Method


def er(size: int = 500, batch_size: int = 32, policy: Policy | None = None) -> Method:
    """Experience replay: old examples from a reservoir, as one more part of each step.

    Paper: Chaudhry et al. 2019.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each step.
        policy: which examples are kept, of `consilience.memory`; None is a reservoir.
    """
    from consilience.core.buffer import Reservoir
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import ER

    return Method("er", (ER(size, batch_size, policy or Reservoir()),))


def er_ace(size: int = 500, batch_size: int = 32, policy: Policy | None = None) -> Method:
    """Experience replay in which new examples compete only with the classes of their own batch.

    Paper: Caccia et al. 2022.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each step.
        policy: which examples are kept, of `consilience.memory`; None is a reservoir.
    """
    from consilience.core.buffer import Reservoir
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import ERACE

    return Method("er_ace", (ERACE(size, batch_size, policy or Reservoir()),))


def der(size: int = 500, batch_size: int = 32, alpha: float = 0.5, policy: Policy | None = None) -> Method:
    """Dark experience replay: keep the stored logits of old examples.

    Paper: Buzzega et al. 2020.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each step.
        alpha: of the squared distance to the stored logits.
        policy: which examples are kept, of `consilience.memory`; None is a reservoir.
    """
    from consilience.core.buffer import Reservoir
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import DER

    return Method("der", (DER(size, batch_size, policy or Reservoir(), alpha=alpha),))


def derpp(size: int = 500, batch_size: int = 32, alpha: float = 0.5, beta: float = 0.5, policy: Policy | None = None) -> Method:
    """DER++: keep the stored logits of old examples, and replay their labels.

    Paper: Buzzega et al. 2020.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each of the two terms.
        alpha: of the squared distance to the stored logits.
        beta: of the cross-entropy on replayed labels.
        policy: which examples are kept, of `consilience.memory`; None is a reservoir.
    """
    from consilience.core.buffer import Reservoir
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import DER

    return Method("derpp", (DER(size, batch_size, policy or Reservoir(), alpha=alpha, beta=beta),))


def gem(size: int = 256, batch_size: int | None = None, margin: float = 0.5) -> Method:
    """Gradient episodic memory: a step that raises no earlier source's loss, by the dual quadratic program.

    Paper: Lopez-Paz & Ranzato 2017.

    Args:
        size: remembered examples of each source; 0 is plain training.
        batch_size: how many of them each step sees; None is all.
        margin: by which the dual variables are raised.
    """
    from consilience.aggregators import gem as cone
    from consilience.core.method import Method
    from consilience.corrections.projection import EpisodicConstraints

    return Method("gem", (EpisodicConstraints(size, batch_size),), step_aggregator=cone(margin))


def agem(size: int = 500, batch_size: int = 32, policy: Policy | None = None) -> Method:
    """Averaged GEM: a step that does not raise the loss on a batch from the buffer.

    Paper: Chaudhry et al. 2019.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each step.
        policy: which examples are kept, of `consilience.memory`; None is a reservoir.
    """
    from consilience.aggregators import agem as cone
    from consilience.core.buffer import Reservoir
    from consilience.core.method import Method
    from consilience.corrections.projection import AverageConstraint

    return Method("agem", (AverageConstraint(size, batch_size, policy or Reservoir()),), step_aggregator=cone())


def icarl(size: int = 500) -> Method:
    """iCaRL: herded exemplars, distillation, and the nearest mean of exemplars as classifier.

    Paper: Rebuffi et al. 2017.

    Args:
        size: exemplars, over all classes.
    """
    from consilience.core.method import Method
    from consilience.corrections.exemplars import ICaRL

    return Method("icarl", (ICaRL(size),))


def gdumb(size: int = 500) -> Method:
    """GDumb: a class-balanced buffer, and new parameters trained on it alone at each learn.

    Paper: Prabhu, Torr & Dokania 2020.

    Args:
        size: examples in the buffer, over all classes.
    """
    from consilience.core.method import Method
    from consilience.corrections.exemplars import GDumb

    return Method("gdumb", (GDumb(size),))
