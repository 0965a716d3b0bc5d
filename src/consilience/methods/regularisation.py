"""Continual learning by regularisation: stay near old parameters, or near old answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from consilience.core.method import Method


def ewc(
    strength: float = 10.0,
    labels: Literal["model", "all", "data", "batches"] = "model",
    samples: int | None = None,
) -> Method:
    """Elastic weight consolidation: stay near old parameters where the Fisher information is high.

    Paper: Kirkpatrick et al. 2017.

    Args:
        strength: of the penalty (strength / 2) sum F (theta - theta_old)^2; 0 is plain training.
        labels: whose labels the Fisher takes: drawn from the model, all classes in expectation, or the
            data's;
            "batches" squares the mean gradients of batches instead, as several libraries do.
        samples: how many examples the Fisher is estimated on; None is all.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import EWC

    return Method("ewc", (EWC(strength, labels, samples),))


def online_ewc(
    strength: float = 10.0,
    gamma: float = 0.9,
    labels: Literal["model", "all", "data", "batches"] = "model",
    samples: int | None = None,
) -> Method:
    """Online EWC: one running Fisher that decays, around the latest parameters.

    Paper: Schwarz et al. 2018.

    Args:
        strength: of the penalty; 0 is plain training.
        gamma: decay of older Fishers at each later visit.
        labels: whose labels the Fisher takes (see `ewc`).
        samples: how many examples the Fisher is estimated on; None is all.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import OnlineEWC

    return Method("online_ewc", (OnlineEWC(strength, labels, samples, gamma),))


def si(strength: float = 1.0, xi: float = 0.1) -> Method:
    """Synaptic intelligence: stay near old parameters where the path of training lowered the loss.

    Paper: Zenke et al. 2017.

    Args:
        strength: of the penalty; 0 is plain training.
        xi: damping of the squared distance moved.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import SI

    return Method("si", (SI(strength, xi),))


def mas(strength: float = 1.0, samples: int | None = None) -> Method:
    """Memory aware synapses: stay near old parameters where the outputs react to them.

    Paper: Aljundi et al. 2018.

    Args:
        strength: of the penalty; 0 is plain training.
        samples: how many examples the importance is estimated on; None is all.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import MAS

    return Method("mas", (MAS(strength, samples),))


def l2sp(strength: float = 0.01) -> Method:
    """L2-SP: stay near the parameters at the end of every earlier source, all entries alike.

    Paper: Li, Grandvalet & Davoine 2018.

    Args:
        strength: of the penalty; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import L2SP

    return Method("l2sp", (L2SP(strength),))


def lwf(
    strength: float = 1.0,
    temperature: float = 2.0,
    match: Literal["probabilities", "logits"] = "probabilities",
) -> Method:
    """Learning without forgetting: keep the old model's answers on the new inputs.

    Paper: Li & Hoiem 2016.

    Args:
        strength: of the distillation; 0 is plain training.
        temperature: of the softmax.
        match: probabilities (KL times T^2) or logits (mean squared error).
    """
    from consilience.core.method import Method
    from consilience.corrections.distillation import LwF

    return Method("lwf", (LwF(strength, temperature, match),))


def less_forgetting(strength: float = 0.1, freeze_head: bool = True) -> Method:
    """Less-forgetting learning: keep the old model's features on the new inputs.

    Paper: Jung et al. 2016.

    Args:
        strength: of the squared distance of the features; 0 is plain training.
        freeze_head: the rows of a shared head for classes of earlier sources do not move.
    """
    from consilience.core.method import Method
    from consilience.corrections.distillation import LessForgetting

    return Method("less_forgetting", (LessForgetting(strength, freeze_head),))
