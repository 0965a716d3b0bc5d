"""Continual learning by rehearsal: old examples are seen again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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


def derpp(
    size: int = 500, batch_size: int = 32, alpha: float = 0.5, beta: float = 0.5, policy: Policy | None = None
) -> Method:
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

    return Method(
        "agem", (AverageConstraint(size, batch_size, policy or Reservoir()),), step_aggregator=cone()
    )


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
    """GDumb: a class-balanced buffer, and new parameters trained on it alone at each visit.

    Paper: Prabhu, Torr & Dokania 2020.

    Args:
        size: examples in the buffer, over all classes.
    """
    from consilience.core.method import Method
    from consilience.corrections.exemplars import GDumb

    return Method("gdumb", (GDumb(size),))


def gss(
    size: int = 500,
    batch_size: int = 32,
    subset: int = 10,
    arrivals: int = 10,
    layers: Literal["all", "head"] = "all",
) -> Method:
    """GSS: experience replay from a buffer of examples whose gradients differ (greedy selection).

    Paper: Aljundi et al. 2019.

    Args:
        size: examples in the buffer, over all sources; 0 is plain training.
        batch_size: examples drawn for each step.
        subset: random examples of the buffer that an arriving one is compared with.
        arrivals: examples judged at once, against the same buffer; 1 is the paper's algorithm.
        layers: whose gradients are compared: "all", or the "head" alone, which is cheaper.
    """
    from consilience.core.method import Method
    from consilience.corrections.gss import GSS

    return Method(
        "gss", (GSS(size=size, batch_size=batch_size, subset=subset, arrivals=arrivals, layers=layers),)
    )


def generative_replay(
    batch_size: int = 32,
    hidden: int = 256,
    latent: int = 32,
    epochs: int = 20,
    lr: float = 1e-3,
    beta: float = 1.0,
    temperature: float = 2.0,
    labels: Literal["soft", "hard"] = "soft",
    importance: Literal["sources", "equal"] = "sources",
    likelihood: Literal["auto", "bernoulli", "gaussian"] = "auto",
) -> Method:
    """Deep generative replay: inputs made by a variational autoencoder, with the old model's answers.

    Paper: Shin et al. 2017.

    Args:
        batch_size: inputs generated for each step, and new ones of each step of the generator; 0 is plain
            training.
        hidden: width of the generator's hidden layers.
        latent: dimensions of its code.
        epochs: of its training on each source.
        lr: of its training (Adam).
        beta: of the divergence of its code from the prior.
        temperature: of soft labels.
        labels: the former model's probabilities ("soft"), or its first choice ("hard").
        importance: the weight of the new source: 1 / (number of sources seen) ("sources"), or 1/2 ("equal").
        likelihood: of the inputs; "auto" is Bernoulli where those of the first source lie in [0, 1], else
            Gaussian.
    """
    from consilience.core.method import Method
    from consilience.corrections.generative import GenerativeReplay

    return Method(
        "generative_replay",
        (
            GenerativeReplay(
                batch_size, hidden, latent, epochs, lr, beta, temperature, labels, importance, likelihood
            ),
        ),
    )
