"""Methods known from ex-model continual learning: what to do with experts that are given."""

from __future__ import annotations

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
    normalise: Literal["mean", "standard"] | None = "mean",
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
        normalise: what is taken off the logits of teachers, per sample: their mean, also their scale, or
            nothing.
        targets: the units of the teacher that knows a sample's class (the paper's Eq. 9), or those of both.
        augment: random views of the samples in training, as of a source.
    """
    from consilience.consolidators import exmodel
    from consilience.core.method import Method

    return Method(
        "exmodel_distillation",
        consolidator=exmodel(maker, size, steps, lr, weight_ce, normalise, targets, augment),
    )
