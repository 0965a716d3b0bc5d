"""Methods known from ex-model continual learning: what to do with experts that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from consilience.core.method import Method
    from consilience.core.synthetic import Maker


def _ensemble(name: str, mapper: Any) -> Method:
    from consilience.consolidators.bank import Experts
    from consilience.core.method import Method

    return Method(name, consolidator=Experts(), mapper=mapper)


def oracle_ensemble() -> Method:
    """All experts are kept, and the true task says which one answers: an upper bound.

    Paper: Carta et al. 2023.
    """
    from consilience.mappers import oracle

    return _ensemble("oracle_ensemble", oracle())


def average_ensemble() -> Method:
    """All experts are kept, and their class probabilities averaged.

    Paper: Carta et al. 2023.
    """
    from consilience.mappers import average

    return _ensemble("average_ensemble", average())


def entropy_ensemble() -> Method:
    """All experts are kept, and the most certain one answers.

    Paper: Carta et al. 2023.
    """
    from consilience.mappers import min_entropy

    return _ensemble("entropy_ensemble", min_entropy())


def parameter_average() -> Method:
    """The running mean of the parameters of all experts received so far.

    Paper: Carta et al. 2023.
    """
    from consilience.core.method import Method
    from consilience.core.optimiser import Averaging
    from consilience.core.weight_space import WeightSpace

    return Method("parameter_average", consolidator=WeightSpace(None, Averaging()))


def exmodel_distillation(
    maker: Maker,
    size: int = 5000,
    steps: int = 1000,
    lr: float = 0.001,
    weight_ce: float = 1.0,
    normalise: Literal["mean", "standard", "samples"] | None = "mean",
    targets: Literal["document", "both"] = "document",
    augment: Any = None,
) -> Method:
    """Distil the experts, of any architecture, one by one into one model, on samples made of them alone.

    Paper: Carta et al. 2023.

    Args:
        maker: who makes the samples: one of `consilience.memory`, such as `auxiliary(data)`.
        size: the samples in the memory, for all experts so far; expert i gets floor(size / i).
        steps: gradient steps per exchange.
        lr: their learning rate.
        weight_ce: the weight of the cross-entropy next to the squared error of the logits.
        normalise: what is taken off the logits of teachers: per sample their mean, also their scale
            ("standard"), or also mean and scale of each class over the samples ("samples"); or nothing.
        targets: the units of the teacher that knows a sample's class (the paper's Eq. 9), or those of both.
        augment: random views of the samples in training, as of a source.
    """
    from consilience.consolidators import exmodel
    from consilience.core.method import Method

    return Method(
        "exmodel_distillation",
        consolidator=exmodel(maker, size, steps, lr, weight_ce, normalise, targets, augment),
    )


def dac(
    maker: Maker,
    size: int = 5000,
    steps: int = 1000,
    lr: float = 0.001,
    weight_latents: float = 1.0,
    normalise: Literal["mean", "standard", "samples"] | None = "mean",
    augment: Any = None,
) -> Method:
    """Data-agnostic consolidation: distil an expert and the former model by outputs and projected latents.

    Both teach all samples, whatever they show: other data, or crops of one image. With labels of tasks every
    sample is asked under all tasks so far, as in the paper; without, there is one output for all classes.

    Paper: Carta et al. 2023 (projected latent distillation).

    Args:
        maker: who makes the samples: one of `consilience.memory`, such as `auxiliary(data, "random")`.
        size: the samples in the memory, for all experts so far; expert i gets floor(size / i).
        steps: gradient steps per exchange.
        lr: their learning rate.
        weight_latents: the weight of the squared distance of latents next to that of outputs.
        normalise: what is taken off the logits of teachers: per sample their mean, also their scale
            ("standard"), or also mean and scale of each class over the samples ("samples"); or nothing.
        augment: random views of the samples in training, as of a source; heavy ones make few images many.
    """
    from consilience.consolidators.ex_model import ExModelDistillation
    from consilience.core.method import Method

    consolidator = ExModelDistillation(
        maker=maker,
        size=size,
        steps=steps,
        lr=lr,
        # Samples may show anything, so that the classes that they stand for mean little.
        weight_ce=0.0,
        weight_latents=weight_latents,
        normalise=normalise,
        targets="both",
        augment=augment,
    )
    return Method("dac", consolidator=consolidator)


def deep_model_consolidation(
    data: Any, size: int = 5000, steps: int = 1000, lr: float = 0.001, augment: Any = None
) -> Method:
    """Deep Model Consolidation: regress logits to those of the former model and of an expert, both centred.

    The double distillation loss (1/C) sum_j (f_j(x) - t_j)^2, t the logits of both teachers, each minus its
    mean, on unlabelled auxiliary data; the factor 1/C is in `lr`. The student goes on from the former model.

    Paper: Zhang et al. 2020.

    Args:
        data: unlabelled inputs [M, ...]: a tensor, an array, several by name, or a source.
        size: how many of them are used, at random.
        steps: gradient steps per exchange.
        lr: their learning rate.
        augment: random views of the inputs in training, as of a source.
    """
    from consilience.consolidators.ex_model import ExModelDistillation
    from consilience.core.method import Method
    from consilience.memory import auxiliary

    consolidator = ExModelDistillation(
        # Samples stand for no class: both teachers answer all of them.
        maker=auxiliary(data, "random"),
        size=size,
        steps=steps,
        lr=lr,
        weight_ce=0.0,
        targets="both",
        augment=augment,
    )
    return Method("deep_model_consolidation", consolidator=consolidator)


def batch_model_consolidation(
    sources: Sequence[Any],
    strength: float = 1.0,
    size: int = 5000,
    steps: int = 1000,
    lr: float = 0.001,
    weight_ce: float = 1.0,
    weight_latents: float = 1.0,
    augment: Any = None,
) -> Method:
    """Batch Model Consolidation: experts keep the features of their base, and teach theirs on replayed data.

    Experts train in parallel from one base, whose features a stability loss holds. All that arrive at once
    are consolidated in one batch, on real examples of their data: CE and the distance to the features of the
    expert that knows the class. Former data is taught by the former model in the place of stored features.

    Paper: Fostiropoulos et al. 2023.

    Args:
        sources: those that the experts are trained on, one for each task, whose examples are replayed.
        strength: of the stability loss in the experts' training; 0 is plain training.
        size: the samples in the memory, for all experts so far.
        steps: gradient steps per exchange.
        lr: their learning rate.
        weight_ce: the weight of the cross-entropy in consolidation.
        weight_latents: the weight of the squared distance to the features of the experts.
        augment: random views of the samples in consolidation, as of a source.
    """
    from consilience.consolidators.ex_model import ExModelDistillation
    from consilience.core.method import Method
    from consilience.corrections.distillation import Stability
    from consilience.memory import real

    consolidator = ExModelDistillation(
        maker=real(sources),
        size=size,
        steps=steps,
        lr=lr,
        # The paper's consolidation has labels and features, and no logits.
        weight_ce=weight_ce,
        weight_logits=0.0,
        weight_latents=weight_latents,
        # The student and its experts are one network, so that latents are compared as they are.
        project=not weight_latents,
        augment=augment,
    )
    return Method("batch_model_consolidation", (Stability(strength),), consolidator=consolidator)
