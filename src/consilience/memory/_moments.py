"""Samples drawn from a description of data: means, standard deviations and ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from consilience.core.augment import normal
from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.model import MISFITS, misfit
from consilience.core.params import all_finite, content_hash
from consilience.core.synthetic import Maker, Wanted, answers, balanced
from consilience.core.teacher import Teacher
from consilience.memory._inversion import check_counts, seeds_of

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True)
class Moments(Maker):
    """Samples x ~ N(mean, diag std^2), clipped to [low, high], each for the class y = argmax f(x).

    Mean, std, low and high are [*shape], one number for each of a sample's. `pool` times as many are drawn as
    were asked for, and those are taken that fill the classes; what a class lacks is taken from the others. It
    needs no gradients, so that the expert may be anything; for tables, where clipped noise is far from data.
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    takes_trees: ClassVar[bool] = False

    mean: Tensor | None = field(default=None, compare=False, repr=False)
    std: Tensor | None = field(default=None, compare=False, repr=False)
    low: Tensor | None = field(default=None, compare=False, repr=False)
    high: Tensor | None = field(default=None, compare=False, repr=False)
    pool: int = 10
    content: str = field(default="", init=False)
    """The hash of the description."""

    def __post_init__(self) -> None:
        whole_number(pool=self.pool)
        given = {name: getattr(self, name) for name in ("mean", "std", "low", "high")}
        for name, value in given.items():
            if value is None and name in ("low", "high"):
                continue
            if not isinstance(value, Tensor) or not value.dim() or not all_finite(value):
                raise ConsilienceError(f"`{name}` must be finite numbers [*shape], got {kind_of(value)}.")
            if value.shape != given["mean"].shape:
                raise ConsilienceError(
                    f"`{name}` must have the shape of `mean`, {tuple(given['mean'].shape)}, got "
                    f"{tuple(value.shape)}."
                )

        if bool((given["std"] < 0).any()):
            raise ConsilienceError(f"`std` must be >= 0, got {float(given['std'].min())}.")
        if self.low is not None and self.high is not None and bool((self.low > self.high).any()):
            raise ConsilienceError("`low` must be <= `high`, got a larger one.")
        # Two makers are equal, and a run may be resumed, if their descriptions have one hash.
        held = {name: value for name, value in given.items() if value is not None}
        object.__setattr__(self, "content", content_hash(held))

    def refuse(self, facts: ScheduleFacts, size: int) -> str | None:
        assert self.mean is not None
        shape = tuple(self.mean.shape)
        others = [other for other in facts.inputs if other != shape]
        return f"the description is of samples {shape}, and here some are {others[0]}" if others else None

    def make(self, teacher: Teacher, wanted: Wanted, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        check_counts(teacher, wanted)
        assert self.mean is not None and self.std is not None
        # On the CPU, as all that is random here.
        count = self.pool * wanted.total
        noise = normal(seeds_of(count, generator), self.mean.numel()).view(count, *self.mean.shape)
        x = self.mean.cpu() + self.std.cpu() * noise
        x = x if self.low is None else x.maximum(self.low.cpu())
        x = x if self.high is None else x.minimum(self.high.cpu())
        x = x.to(wanted.device, wanted.dtype)
        try:
            y = torch.tensor(teacher.classes)[answers(teacher, x).argmax(1).cpu()]
        except MISFITS as error:
            raise ConsilienceError(f"{misfit(x, error)} (the expert {teacher.name!r})") from error

        # The first of each class: all were drawn alike.
        index = balanced(torch.arange(count, dtype=torch.float64), y, wanted.counts).to(x.device)
        return x[index], y.to(x.device)[index]
