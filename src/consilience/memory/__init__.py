"""Memory: which examples a buffer keeps (`policy` of er, derpp, ...). Signatures import no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilience import lazy
from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from consilience.core.buffer import Reservoir as Reservoir
    from consilience.memory.policies import ClassBalanced as ClassBalanced
    from consilience.memory.policies import Growing as Growing
    from consilience.memory.policies import Herding as Herding
    from consilience.memory.policies import Ring as Ring
else:
    __getattr__, __dir__ = lazy.attach(__name__)

__all__ = ["class_balanced", "growing", "herding", "reservoir", "ring"]

# Classes are imported in functions, since torch takes seconds to load and the command line reads signatures.


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


suggest_arguments(__name__)
