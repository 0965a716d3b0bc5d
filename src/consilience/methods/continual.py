"""Methods known from continual learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from consilience.core.method import Method


def finetune() -> Method:
    """Plain training on whatever comes; what is heard is averaged.

    Paper: the lower bound of continual learning; FedAvg where clients are averaged.
    """
    from consilience.core.method import Method

    return Method("finetune")


def joint() -> Method:
    """Training on all sources seen so far as one pool: the upper bound.

    Paper: Caruana 1997.
    """
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import Cumulative

    return Method("joint", (Cumulative(),))


def ewc(strength: float = 10.0, labels: Literal["model", "all", "data"] = "model", samples: int | None = None) -> Method:
    """Elastic weight consolidation: stay near old parameters where the Fisher information is high.

    Paper: Kirkpatrick et al. 2017.

    Args:
        strength: of the penalty (strength / 2) sum F (theta - theta_old)^2; 0 is plain training.
        labels: whose labels the Fisher takes: drawn from the model, all classes in expectation, or the data's.
        samples: how many examples the Fisher is estimated on; None is all.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import EWC

    return Method("ewc", (EWC(strength, labels, samples),))


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


def lwf(strength: float = 1.0, temperature: float = 2.0, match: Literal["probabilities", "logits"] = "probabilities") -> Method:
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


def er(size: int = 500, batch_size: int = 32) -> Method:
    """Experience replay: old examples from a reservoir, as one more part of each step.

    Paper: Chaudhry et al. 2019.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each step.
    """
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import ER

    return Method("er", (ER(size, batch_size),))
