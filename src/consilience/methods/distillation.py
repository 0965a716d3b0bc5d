"""Methods in which the receiver distils what others answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def distil(
    unlabelled: Any,
    steps: int = 2000,
    lr: float = 0.003,
    batch_size: int = 64,
    temperature: float = 2.0,
    of: Literal["probabilities", "logits"] = "probabilities",
    features: float = 0.0,
    calibrate: Literal["scale"] | None = None,
    temperatures: Mapping[str, float] | None = None,
    augment: Any = None,
    lr_schedule: Literal["constant", "cosine"] = "cosine",
    optimiser: Literal["adam", "sgd"] = "adam",
) -> Method:
    """Distil teachers of any architecture, over different classes, into one student, on unlabelled inputs.

    Paper: Hinton et al. 2015.

    Args:
        unlabelled: inputs [N, ...]: a tensor, an array, or a source (its labels are not read).
        steps: gradient steps of the student; long schedules pay.
        lr: their learning rate.
        batch_size: inputs per step.
        temperature: divides the logits of teachers and student, for probabilities.
        of: "probabilities" (KL divergence), or "logits" (squared error).
        features: weight of the squared error of features, which a linear projector learns to compare.
        calibrate: "scale" divides the logits of each teacher so that all have one scale.
        temperatures: by which the logits of each named teacher are divided.
        augment: random views of inputs, the same for teachers and student, as `augment` of a source.
        lr_schedule: the learning rate over the steps.
        optimiser: of these steps.
    """
    # The consolidator has the same names, so that one description is of both.
    from consilience.consolidators import teacher_distillation
    from consilience.core.method import Method

    return Method(
        "distil",
        consolidator=teacher_distillation(
            unlabelled=unlabelled,
            steps=steps,
            lr=lr,
            batch_size=batch_size,
            temperature=temperature,
            of=of,
            features=features,
            calibrate=calibrate,
            temperatures=temperatures,
            augment=augment,
            lr_schedule=lr_schedule,
            optimiser=optimiser,
        ),
    )
