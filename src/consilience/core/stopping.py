"""Early stopping: training ends where validation no longer improves, with the best parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class Stopping:
    """Stop after `patience` checks in a row without a better score on validation data; keep the best.

    As `Training(stopping=...)` it acts in each visit, on the validation loss of its sources, checked after
    each epoch and at the end. As `run(..., stopping=...)` it acts on the stages of a run, such as the rounds
    of a federation, by the metric of the run on the validation data of all sources.

    Args:
        patience: checks without improvement after which training stops.
        least: how much better a score must be to count as an improvement.
        best: whether to end with the parameters of the best check, else those of the last.
        every: steps between the checks of a visit, in place of epochs.
    """

    patience: int = 5
    least: float = 0.0
    best: bool = True
    every: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("patience", self.patience), ("every", 1 if self.every is None else self.every)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConsilienceError(f"`{name}` of `stopping` must be a whole number >= 1, got {value!r}.")
        number = isinstance(self.least, int | float) and not isinstance(self.least, bool)
        if not number or not 0 <= self.least < math.inf:
            raise ConsilienceError(f"`least` of `stopping` must be >= 0 and finite, got {self.least!r}.")
        if not isinstance(self.best, bool):
            raise ConsilienceError(f"`best` of `stopping` must be true or false, got {self.best!r}.")

    @staticmethod
    def of(value: object) -> Stopping | None:
        """Return the stopping that a number (its patience), a mapping of its fields, or None stands for.

        >>> Stopping.of(3), Stopping.of({"patience": 2, "best": False})
        (Stopping(patience=3, least=0.0, best=True, every=None), \
Stopping(patience=2, least=0.0, best=False, every=None))
        """
        if value is None or isinstance(value, Stopping):
            return value

        # What files and the command line hold.
        if isinstance(value, Mapping):
            unknown = [name for name in value if name not in Stopping.__dataclass_fields__]
            if unknown:
                known = ", ".join(Stopping.__dataclass_fields__)
                raise ConsilienceError(f"`stopping` has no {unknown[0]!r}; it takes {known}.")
            return Stopping(**value)
        if isinstance(value, int) and not isinstance(value, bool):
            return Stopping(value)
        raise ConsilienceError(f"`stopping` must be a number of checks or a Stopping, got {value!r}.")


class Trend(NamedTuple):
    """The scores so far: the best (higher is better), at which check it was, and how many came after it."""

    best: float | None = None
    at: int = 0
    since: int = 0

    def after(self, score: float, at: int, least: float) -> Trend:
        """Return the trend after a check with this score; one that is no number is no improvement.

        >>> Trend(0.5, 1, 0).after(0.75, 2, 0.0), Trend(0.5, 1, 0).after(0.5, 2, 0.0)
        (Trend(best=0.75, at=2, since=0), Trend(best=0.5, at=1, since=1))
        """
        # Without any score yet, every number is an improvement.
        better = not math.isnan(score) and (self.best is None or score > self.best + least)
        return Trend(score, at, 0) if better else self._replace(since=self.since + 1)
