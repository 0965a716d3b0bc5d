"""Methods in which the receiver distils what others answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from consilience.core.method import Method


def feddf(
    unlabelled: Any,
    steps: int = 100,
    lr: float = 0.001,
    batch_size: int = 32,
    temperature: float = 1.0,
    of: Literal["logits", "probabilities"] = "logits",
    optimiser: Literal["adam", "sgd"] = "adam",
) -> Method:
    """Average the received models, then distil their mean answer into the average, on unlabelled inputs.

    Paper: Lin et al. 2020.

    Args:
        unlabelled: inputs [N, ...] of the server: a tensor, an array, or a source (its labels are not read).
        steps: gradient steps per round; 0 is fedavg.
        lr: their learning rate.
        batch_size: inputs per step.
        temperature: divides logits.
        of: whether logits are averaged, or probabilities.
        optimiser: of these steps.
    """
    from consilience.consolidators import ensemble_distillation
    from consilience.core.method import Method

    return Method(
        "feddf",
        consolidator=ensemble_distillation(unlabelled, steps, lr, batch_size, temperature, of, optimiser),
    )
