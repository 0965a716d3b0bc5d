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


def er_ace(size: int = 500, batch_size: int = 32) -> Method:
    """Experience replay in which new examples compete only with the classes of their own batch.

    Paper: Caccia et al. 2022.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each step.
    """
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import ERACE

    return Method("er_ace", (ERACE(size, batch_size),))


def der(size: int = 500, batch_size: int = 32, alpha: float = 0.5) -> Method:
    """Dark experience replay: keep the stored logits of old examples.

    Paper: Buzzega et al. 2020.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each step.
        alpha: of the squared distance to the stored logits.
    """
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import DER

    return Method("der", (DER(size, batch_size, alpha),))


def derpp(size: int = 500, batch_size: int = 32, alpha: float = 0.5, beta: float = 0.5) -> Method:
    """DER++: keep the stored logits of old examples, and replay their labels.

    Paper: Buzzega et al. 2020.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each of the two terms.
        alpha: of the squared distance to the stored logits.
        beta: of the cross-entropy on replayed labels.
    """
    from consilience.core.method import Method
    from consilience.corrections.rehearsal import DER

    return Method("derpp", (DER(size, batch_size, alpha, beta),))


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


def agem(size: int = 500, batch_size: int = 32) -> Method:
    """Averaged GEM: a step that does not raise the loss on a batch from the buffer.

    Paper: Chaudhry et al. 2019.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each step.
    """
    from consilience.aggregators import agem as cone
    from consilience.core.method import Method
    from consilience.corrections.projection import AverageConstraint

    return Method("agem", (AverageConstraint(size, batch_size),), step_aggregator=cone())


def online_ewc(
    strength: float = 10.0, gamma: float = 0.9, labels: Literal["model", "all", "data"] = "model", samples: int | None = None
) -> Method:
    """Online EWC: one running Fisher that decays, around the latest parameters.

    Paper: Schwarz et al. 2018.

    Args:
        strength: of the penalty; 0 is plain training.
        gamma: decay of older Fishers at each later learn.
        labels: whose labels the Fisher takes (see `ewc`).
        samples: how many examples the Fisher is estimated on; None is all.
    """
    from consilience.core.method import Method
    from consilience.corrections.quadratic import OnlineEWC

    return Method("online_ewc", (OnlineEWC(strength, labels, samples, gamma),))


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


def packnet(keep: float = 0.5, retrain: float = 0.5) -> Method:
    """PackNet: each task keeps its largest weights, retrains and freezes them; the others are free for later tasks.

    Paper: Mallya & Lazebnik 2018.

    Args:
        keep: the share of each layer's free weights that a task keeps.
        retrain: the share of the epochs after pruning.
    """
    from consilience.core.method import Method
    from consilience.corrections.isolation import PackNet

    return Method("packnet", (PackNet(keep, retrain),))


def hat(sparsity: float = 0.1, s_max: float = 400.0, hard: bool = True) -> Method:
    """Hard attention to the task: each task learns which units it uses, and these keep their weights.

    Paper: Serrà et al. 2018.

    Args:
        sparsity: of the regulariser that leaves units to later tasks.
        s_max: the steepest sigmoid, at the last batch of an epoch.
        hard: masks of earlier and predicted tasks are 0 or 1, so that their outputs do not change; else they drift.
    """
    from consilience.core.method import Method
    from consilience.corrections.isolation import HAT

    return Method("hat", (HAT(sparsity, s_max, hard),))


def supsup(keep: float = 0.5) -> Method:
    """Supermasks in superposition: fixed random weights, and a learned mask for each task, which can be exchanged.

    Paper: Wortsman et al. 2020.

    Args:
        keep: the share of each layer's weights that a task uses.
    """
    from consilience.core.method import Method
    from consilience.corrections.contexts import SupSup

    return Method("supsup", (SupSup(keep),), personal=("supsup/*",))


def psp(flips: float = 0.5) -> Method:
    """Parameter superposition: each task multiplies the inputs of every layer by its own random signs.

    Paper: Cheung et al. 2019.

    Args:
        flips: the share of signs that are -1; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.contexts import PSP

    return Method("psp", (PSP(flips),))


def xdg(fraction: float = 0.8) -> Method:
    """Context-dependent gating: for each task a random part of the hidden units is silent.

    Paper: Masse, Grant & Freedman 2018.

    Args:
        fraction: of the units of each hidden layer that are silent; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.contexts import XdG

    return Method("xdg", (XdG(fraction),))
