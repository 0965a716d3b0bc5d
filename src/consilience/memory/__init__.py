"""Memory: which examples a buffer keeps (`policy` of er, derpp, ...), and makers of synthetic ones.

Makers stand for the data of an expert that is given as a model alone; `memory.priors` are for those that
optimise samples. Signatures import no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from consilience import lazy
from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.core.buffer import Reservoir as Reservoir
    from consilience.memory import priors as priors
    from consilience.memory._generator import Generator as Generator
    from consilience.memory._inversion import Impression as Impression
    from consilience.memory._inversion import Inversion as Inversion
    from consilience.memory._moments import Moments as Moments
    from consilience.memory._pieces import pieces as pieces
    from consilience.memory._priors import Prior as Prior
    from consilience.memory._priors import Seen as Seen
    from consilience.memory._strokes import strokes as strokes
    from consilience.memory.policies import ClassBalanced as ClassBalanced
    from consilience.memory.policies import Growing as Growing
    from consilience.memory.policies import Herding as Herding
    from consilience.memory.policies import Ring as Ring
    from consilience.memory.synthetic import Auxiliary as Auxiliary
    from consilience.memory.synthetic import Real as Real
else:
    __getattr__, __dir__ = lazy.attach(__name__)

MAKERS = ("auxiliary", "generator", "impression", "inversion", "moments", "real")
"""The functions of this catalogue that return makers; the others return policies of buffers."""

__all__ = [
    "auxiliary",
    "class_balanced",
    "generator",
    "growing",
    "herding",
    "impression",
    "inversion",
    "moments",
    "real",
    "reservoir",
    "ring",
]

# Classes are imported in functions, since torch takes seconds to load and the command line reads signatures.
# Makers are in files with a leading underscore: a submodule would replace the function of its name.


def reservoir() -> Reservoir:
    """Keep a uniform sample of everything seen."""
    from consilience.core.buffer import Reservoir

    return Reservoir()


def ring() -> Ring:
    """Keep the last examples of each class."""
    from consilience.memory.policies import Ring

    return Ring()


def class_balanced() -> ClassBalanced:
    """Keep a uniform sample of each class, as many of each."""
    from consilience.memory.policies import ClassBalanced

    return ClassBalanced()


def herding() -> Herding:
    """Keep the examples of each class whose mean feature is nearest to the class's."""
    from consilience.memory.policies import Herding

    return Herding()


def growing() -> Growing:
    """Keep `size` examples of each class: the buffer grows with the number of classes."""
    from consilience.memory.policies import Growing

    return Growing()


# Makers of synthetic memory. The classes say more of their arguments.


def inversion(
    priors: Sequence[Prior] | None = None,
    steps: int = 500,
    lr: float = 0.1,
    temperature: float = 2.0,
    clip: float = 3.0,
    start: Tensor | None = None,
    until: float | None = None,
    batch: int = 1024,
    bf16: bool = False,
) -> Inversion:
    """Make samples of each class by gradients on the inputs of an expert: model inversion.

    `priors` are of `memory.priors` (None: L2, and blur for images). Adam takes `steps` steps of `lr` on the
    cross-entropy at a `temperature`, with inputs in +-`clip`, from noise or from the images [N, ...] of
    `start`; a sample stays as it is at the probability `until`. `batch` bounds the memory; `bf16` computes
    the expert in bfloat16. Carta et al. 2022 (Ex-Model).
    """
    from consilience.memory._inversion import Inversion

    return Inversion(priors, steps, lr, temperature, clip, batch, bf16, start, until=until)


def impression(
    beta: float = 1.0,
    priors: Sequence[Prior] | None = None,
    steps: int = 500,
    lr: float = 0.1,
    temperature: float = 2.0,
    clip: float = 3.0,
    start: Tensor | None = None,
    scaling: Literal["minmax", "shift"] = "minmax",
    floor: float = 0.01,
    balanced: bool = True,
    batch: int = 1024,
    bf16: bool = False,
) -> Impression:
    """Make samples for soft targets, drawn as the rows of an expert's classifier are alike: data impression.

    `beta` is the concentration of the Dirichlet distributions, of cosines that `scaling` made positive and
    that are at least `floor`. With `balanced` each class has as many samples as were asked for. `priors`,
    `steps`, `lr`, `temperature`, `clip`, `start`, `batch` and `bf16` are as for `inversion`. Nayak et al.
    2019; Carta et al. 2022 (Ex-Model).
    """
    from consilience.memory._inversion import Impression

    made = (priors, steps, lr, temperature, clip, batch, bf16, start)
    return Impression(*made, beta=beta, scaling=scaling, floor=floor, balanced=balanced)


def generator(
    priors: Sequence[Prior] | None = None,
    steps: int = 200,
    adapt: int = 40,
    beta: float | None = 1.0,
    lr: float = 0.005,
    temperature: float = 2.0,
    clip: float = 3.0,
    latent: int = 64,
    width: int = 16,
    batch: int = 256,
    bf16: bool = False,
) -> Generator:
    """Make images of each class with a small network, trained against an expert: data-free distillation.

    The network has `latent` inputs and `width` maps; the first `batch` takes `steps` steps of Adam at `lr`,
    and each later one `adapt`, from where the last one ended. Targets are soft, as those of `impression`, or
    with `beta` None classes. `priors`, `temperature`, `clip` and `bf16` are as for `inversion`. Fang et al.
    2021 (CMI), 2022 (Fast-DFKD), without contrast and meta learning.
    """
    from consilience.memory._generator import Generator

    made = (priors, steps, lr, temperature, clip, batch, bf16)
    return Generator(*made, adapt=adapt, beta=beta, latent=latent, width=width)


def moments(mean: Any, std: Any, low: Any = None, high: Any = None, pool: int = 10) -> Moments:
    """Draw samples of a table from the mean and the standard deviation of each column, clipped to a range.

    Each stands for the class that the expert gives it; of `pool` times as many, those are taken that fill the
    classes. `mean`, `std`, `low` and `high` are numbers [d], of inputs as the expert takes them.
    """
    import torch

    from consilience.memory._moments import Moments

    given = [None if part is None else torch.as_tensor(part).float() for part in (mean, std, low, high)]
    return Moments(given[0], given[1], given[2], given[3], pool)


def auxiliary(data: Any, choose: Literal["confident", "random"] = "confident") -> Auxiliary:
    """Take samples of other data, each for the class that the expert gives it.

    Args:
        data: inputs [M, ...]: a tensor, an array, several by name, or a source, whose labels are not read.
        choose: the samples of which the expert is most certain, or random ones, as many of each class.
    """
    from consilience.core.source import inputs_of
    from consilience.memory.synthetic import Auxiliary

    return Auxiliary(inputs_of(data, "data"), choose)


def real(sources: Sequence[Any]) -> Real:
    """Take the training examples of the experts' own sources (Replay ED): an upper bound.

    Args:
        sources: those that the experts were trained on, one for each task.
    """
    from consilience.memory.synthetic import Real

    return Real(tuple(sources) if isinstance(sources, Sequence) else sources)


suggest_arguments(__name__)
