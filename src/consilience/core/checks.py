"""Checks of arguments that many functions share: each refuses with the rule and the value it got."""

from __future__ import annotations

import math
from numbers import Integral

from consilience.core.errors import ConsilienceError
from consilience.core.source import Source
from consilience.core.takes import WORDS


def whole_number(low: int = 1, **values: object) -> None:
    """Refuse values that are not whole numbers of at least `low`; keywords are the names of the arguments."""
    for name, value in values.items():
        # True is an int to Python, but never a count; numbers of NumPy are counts too.
        if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
            raise ConsilienceError(f"`{name}` must be a whole number >= {low}, got {value!r}.")


def positive(**values: float) -> None:
    """Refuse values that are not positive and finite; keywords are the names of the arguments."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConsilienceError(f"`{name}` must be positive and finite, got {value!r}.")


def fraction(name: str, value: object, zero: bool = False) -> float:
    """The value as a float in (0, 1), or in [0, 1) with `zero`; `name` is that of the argument."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (0 < value < 1 or (zero and value == 0))
    ):
        raise ConsilienceError(f"`{name}` must be a fraction in {'[0' if zero else '(0'}, 1), got {value!r}.")
    return float(value)


def source_of_classes(source: Source, what: str) -> None:
    """Refuse a source without one class per sample; `what` is the function that needs them."""
    if source.kind != "class":
        raise ConsilienceError(
            f"{what} needs a source of classes, got {source.name!r}, which has {WORDS[source.kind]}."
        )
    if source.places:
        raise ConsilienceError(
            f"{what} needs one class per sample, got {source.name!r}, which has a target for each place."
        )
