"""Sparse fine-tuning by sensitivity: TaLoS trains the entries alone that the base's answers depend on least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Item, Private
from consilience.core.model import Model
from consilience.core.params import Layout, Params, same
from consilience.core.source import Source
from consilience.corrections.anatomy import anatomy, spread
from consilience.corrections.fisher import fisher

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts
    from consilience.core.training import Training

FADED = 0.1
"""What entries that are out already are multiplied by while the others are scored."""


@dataclass(frozen=True)
class TaLoS(Correction):
    """TaLoS: train the `density` of the shared entries that are least sensitive, and hold all others where they are.

    score = sum over x of (d logit_y / d theta)^2 ("logit", as the authors' code has it) or (d log p(y|x) / d theta)^2
    ("likelihood", the Fisher of their paper), y drawn from the model among the source's classes (for values the outputs' own
    squares). In round r = 0 .. `rounds` - 1 the ceil(density^((r+1)/rounds) n) of lowest score among those left stay, of equal
    ones those of lowest index over the whole vector; entries that are out count FADED of their value in later scores. Of a head
    that tasks share, rows of classes that the source lacks are held, and not among the n; with `reached` so are all entries that
    no answer depends on (a score of exactly 0: inputs that are always 0, units that are off), which get no gradient either.

    The mask is drawn where a source is first learned, from the parameters that this learn begins with, and kept for its
    later visits; it is private. Gradients are masked before anything else reads them, such as an optimiser that clips; held
    entries do not move by momentum or decay either: their task vector is exactly 0. Heads of tasks are trained whole.
    Refuses models with batch norm, whose statistics move. Iurada, Ciccone & Tommasi 2025.
    """

    density: float = 0.1
    rounds: int = 4
    score: Literal["logit", "likelihood"] = "logit"
    samples: int | None = None
    reached: bool = False

    shared_items: ClassVar[bool] = False
    neutral: ClassVar[Mapping[str, Any]] = {"density": 1.0}

    def __post_init__(self) -> None:
        if (
            isinstance(self.density, bool)
            or not isinstance(self.density, (int, float))
            or not 0 < self.density <= 1
        ):
            raise ConsilienceError(
                f"`density` should be a number in (0, 1]. Found `density = {self.density!r}`."
            )
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise ConsilienceError(
                f"`rounds` should be a whole number >= 1. Found `rounds = {self.rounds!r}`."
            )
        if self.score not in ("logit", "likelihood"):
            raise ConsilienceError(f"`score` should be logit or likelihood. Found `score = {self.score!r}`.")
        n = self.samples
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise ConsilienceError(
                f"`samples` should be a whole number >= 1, or None for all. Found `samples = {n!r}`."
            )

    def kept(self, size: int, round: int | None = None) -> int:
        """How many of `size` entries stay after a round (None: the last).

        >>> [TaLoS().kept(10000, r) for r in range(4)]
        [5624, 3163, 1779, 1000]
        """
        fraction = self.density if round is None else self.density ** ((round + 1) / self.rounds)
        return min(size, math.ceil(fraction * size))

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if facts.model is None:
            return None
        if not _shared(facts.model, facts.model.init(torch.Generator().manual_seed(0))[0]):
            return "the model has no trainable entry that tasks share; use one such as mlp or conv"
        return None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Item | None:
        """The mask that was drawn when these sources were first learned; None where they were not, or with different ones."""
        mine = {name: i for (_, name), i in memory.items()}
        items = [mine[s.name] for s in sources if s.name in mine]
        return (
            items[0]
            if len(items) == len(sources) and all(same(i.tensors, items[0].tensors) for i in items)
            else None
        )

    def begin(self, start: Beginning) -> Begun:
        """Private: 1 for the entries that are trained, 0 for those that are held, by entry; the share of the former whose score is 0."""
        params, known = start.params, start.recalled
        keep, idle = (known.group("keep"), 0.0) if known is not None else self.draw(start)
        own = {f"keep/{n}": k.to(params[n].device, params[n].dtype) for n, k in keep.items()}
        return Begun(params, {**own, "idle": torch.tensor(idle)})

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        idle = float(ctx.private["idle"])
        why = (
            f"{100 * idle:.0f} % of the entries that it trains reach no answer (inputs that are always 0, units that are off); "
            "use `reached=True`, or a larger `density`"
        )
        return ctx.flat, why if idle > 0.5 else None

    def draw(self, start: Beginning) -> tuple[Params, float]:
        """Which entries are trained (bool), by entry, on these sources' training data; and the share of them whose score is 0.
        Running statistics of batch norm are those that this learn begins with."""
        model, params, sources = start.model, start.params, start.sources
        own, none = model.init(torch.Generator().manual_seed(0))
        grown = own
        for s in sources:
            grown, none = model.grow(grown, none, s, torch.Generator().manual_seed(0))
        names = _shared(model, own)
        layout = Layout.of({n: params[n] for n in names})
        held = {n: p for n, p in params.items() if n not in names and n in grown}
        buffers = {
            n: b.to(layout.device, layout.dtype if b.is_floating_point() else b.dtype)
            for n, b in start.buffers.items()
        }
        keep = torch.ones(layout.size, dtype=torch.bool, device=layout.device)
        theta = layout.flatten(params)
        total, reached = torch.zeros_like(theta), layout.flatten(_reached(model, own, sources)) > 0
        for r in range(self.rounds):
            seen = {**held, **layout.split(torch.where(keep, theta, FADED * theta))}
            total.zero_()
            for s in sources:
                on_device = replace(s, train=s.train.to(layout.device, layout.dtype))
                learned = Learned(model, seen, buffers, {}, on_device, s.task, layout, start.generator)
                labels = "all" if s.kind == "value" else "model"
                many = len(s.train) if self.samples is None else min(self.samples, len(s.train))
                total += layout.flatten(fisher(learned, labels, self.samples, of=self.score)) * many
            if not bool(torch.isfinite(total).all()):
                raise ConsilienceError(
                    f"scores should be finite. Found some that are not on {sources[0].name!r}."
                )
            if self.reached and r == 0:
                reached &= total > 0
            chosen = total.masked_fill(~(keep & reached), torch.inf).argsort(stable=True)[
                : self.kept(int(reached.sum()), r)
            ]
            keep = torch.zeros_like(keep).index_fill(0, chosen, True)
        return layout.split(keep), float((total[keep] == 0).sum()) / max(1, len(chosen))

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        return spread(step.layout, _kept(ctx))

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """The mask, a byte an entry."""
        return Private({f"keep/{n}": k > 0 for n, k in _kept(ctx).items()})


def _kept(ctx: Context) -> dict[str, Tensor]:
    """The mask of this learn, by entry."""
    return {n.removeprefix("keep/"): k for n, k in ctx.private.items() if n.startswith("keep/")}


def _shared(model: Model, params: Params) -> set[str]:
    """The trainable entries that tasks share."""
    return {
        n
        for n, p in params.items()
        if p.is_floating_point() and not model.frozen(n) and model.task_of(n) is None
    }


def _reached(model: Model, params: Params, sources: tuple[Source, ...]) -> Params:
    """1 for the entries that count, 0 for the rows of a shared head for classes that no source has."""
    from consilience.models.tangent import Tangent

    found = {n: torch.ones_like(p) for n, p in params.items()}
    for n in anatomy(model.model if isinstance(model, Tangent) else model).head or ():
        if n is not None and all(s.kind == "class" for s in sources):
            rows = torch.zeros_like(params[n])
            rows[[c for s in sources for c in s.classes]] = 1
            found[n] = rows
    return found
