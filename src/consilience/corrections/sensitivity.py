"""Sparse fine-tuning by sensitivity: TaLoS trains the entries that the base's answers depend on least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Item, Private
from consilience.core.model import Model
from consilience.core.params import Layout, Params, same
from consilience.core.shares import exact_share
from consilience.core.source import LabelFrame, Source
from consilience.core.tree import cast_to
from consilience.corrections.anatomy import anatomy, spread
from consilience.corrections.fisher import fisher

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts
    from consilience.core.training import Training

FADED = 0.1
"""The factor on entries that are already out while the others are scored."""


class Drawn(NamedTuple):
    """A mask by entry (bool, true where it is trained), and the share of trained entries whose score is 0."""

    keep: Params
    idle: float


@dataclass(frozen=True)
class TaLoS(Correction):
    """TaLoS: train the `density` of the shared entries that are least sensitive, and freeze all others.

    score = sum over x of (d logit_y / d theta)^2 ("logit", as in the authors' code) or (d log p(y|x) / d
    theta)^2 ("likelihood", the Fisher of their paper), y drawn from the model among the source's classes. For
    values it is the sum of the outputs' own squares, at places by a draw from N(output, 1). In round r = 0 ..
    `rounds` - 1 the ceil(density^((r+1)/rounds) n) of lowest score among those left stay, of equal ones those
    of lowest index over the whole vector; entries that are out count FADED of their value in later scores. Of
    a head that tasks share, rows of classes that the source lacks are frozen, and not among the n; with
    `reached` so are all entries that no answer depends on (a score of exactly 0: inputs that are always 0,
    units that are off), which get no gradient either.

    The mask is drawn where a source is first trained, from the parameters that this visit begins with, and
    kept for later visits; it is private. Gradients are masked before anything else reads them, such as an
    optimiser that clips; frozen entries do not move by momentum or decay either: their task vector is exactly
    0. Heads of tasks are trained in full. Refuses models with batch norm, whose statistics move. Iurada,
    Ciccone & Tommasi 2025.
    """

    density: float = 0.1
    rounds: int = 4
    score: Literal["logit", "likelihood"] = "logit"
    samples: int | None = None
    reached: bool = False

    shared_items: ClassVar[bool] = False
    neutral: ClassVar[Mapping[str, Any]] = {"density": 1.0}

    def __post_init__(self) -> None:
        # A word or a boolean, as YAML may give, would fail late or count as 1.
        number = isinstance(self.density, (int, float)) and not isinstance(self.density, bool)
        if not number or not 0 < self.density <= 1:
            raise ConsilienceError(f"`density` must be a number in (0, 1], got {self.density!r}.")
        if not _is_count(self.rounds):
            raise ConsilienceError(f"`rounds` must be a whole number >= 1, got {self.rounds!r}.")
        if self.score not in ("logit", "likelihood"):
            raise ConsilienceError(f"`score` must be logit or likelihood, got {self.score!r}.")
        if self.samples is not None and not _is_count(self.samples):
            raise ConsilienceError(
                f"`samples` must be a whole number >= 1, or None for all, got {self.samples!r}."
            )

    def kept(self, size: int, round: int | None = None) -> int:
        """Return how many of `size` entries stay after a round (None: the last).

        >>> [TaLoS().kept(10000, r) for r in range(4)]
        [5624, 3163, 1779, 1000]
        """
        fraction = self.density if round is None else self.density ** ((round + 1) / self.rounds)
        return math.ceil(exact_share(fraction, size))

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if self.score == "logit" and (facts.places or "labels" in facts.kinds):
            return "a sample must have one class, whose logit it scores; use score='likelihood'"
        if facts.model is None:
            return None
        if not _shared(facts.model, facts.model.init(torch.Generator().manual_seed(0))[0]):
            return "the model has no trainable entry that tasks share; use one such as mlp or conv"
        return None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Item | None:
        """Return the mask drawn when these sources were first trained, if all of them have the same one."""
        by_name = {name: item for (_, name), item in memory.items()}
        items = [by_name[s.name] for s in sources if s.name in by_name]
        if len(items) < len(sources) or not all(same(item.tensors, items[0].tensors) for item in items):
            return None
        return items[0]

    def begin(self, start: Beginning) -> Begun:
        """Return the private mask by entry, 1 where trained, and `idle`, the trained share with score 0."""
        params, recalled = start.params, start.recalled
        drawn = self.draw(start) if recalled is None else Drawn(recalled.group("keep"), 0.0)
        mask = {
            f"keep/{name}": k.to(params[name].device, params[name].dtype) for name, k in drawn.keep.items()
        }
        return Begun(params, {**mask, "idle": torch.tensor(drawn.idle)})

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """Warn where most of the trained entries reach no answer."""
        idle = float(ctx.private["idle"])
        if idle <= 0.5:
            return ctx.flat, None
        return ctx.flat, (
            f"{100 * idle:.0f} % of the entries that it trains reach no answer (inputs that are always 0, "
            "units that are off); use `reached=True`, or a larger `density`"
        )

    def draw(self, start: Beginning) -> Drawn:
        """Choose the entries to train on these sources' training data.

        Running statistics of batch norm are those that this visit begins with.
        """
        model, params, sources = start.model, start.params, start.sources
        # Only names and shapes of entries are used, so that any seed does.
        base, buffers = model.init(torch.Generator().manual_seed(0))
        grown = base
        for source in sources:
            grown, buffers = model.grow(grown, buffers, source, torch.Generator().manual_seed(0))
        names = _shared(model, base)
        layout = Layout.of({name: params[name] for name in names})
        # Entries of other corrections, which the model does not have, take no part in its answers.
        frozen = {name: p for name, p in params.items() if name not in names and name in grown}

        theta = layout.flatten(params)
        keep = torch.ones(layout.size, dtype=torch.bool, device=layout.device)
        reached = layout.flatten(_reached(model, base, sources)) > 0
        for r in range(self.rounds):
            seen = {**frozen, **layout.split(torch.where(keep, theta, FADED * theta))}
            total = self._scores(start, layout, seen)
            if self.reached and r == 0:
                reached &= total > 0
            lowest = total.masked_fill(~(keep & reached), torch.inf).argsort(stable=True)
            # A stable sort takes equal scores by index, on every device.
            chosen = lowest[: self.kept(int(reached.sum()), r)]
            keep = torch.zeros_like(keep).index_fill(0, chosen, True)
        return Drawn(layout.split(keep), float((total[keep] == 0).sum()) / max(1, len(chosen)))

    def _scores(self, start: Beginning, layout: Layout, params: Params) -> Tensor:
        """Return the scores [n] of the entries in the layout, summed over the sources' training examples."""
        buffers = {name: cast_to(b, layout.device, layout.dtype) for name, b in start.buffers.items()}
        total = torch.zeros_like(layout.flatten(start.params))
        for source in start.sources:
            near = replace(source, train=source.train.to(layout.device, layout.dtype))
            learned = Learned(
                model=start.model,
                params=params,
                buffers=buffers,
                start={},
                source=near,
                task=source.task,
                layout=layout,
                generator=start.generator,
                frame=_alone(start.frame, source),
            )
            labels = "all" if source.kind == "value" and not source.places else "model"
            count = len(source.train) if self.samples is None else min(self.samples, len(source.train))
            # `fisher` averages; sums weigh the sources of a visit by their examples.
            total += layout.flatten(fisher(learned, labels, self.samples, of=self.score)) * count
        if not bool(torch.isfinite(total).all()):
            raise ConsilienceError(
                f"scores must be finite, got some that are not on {start.sources[0].name!r}; "
                "begin from other parameters."
            )
        return total

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        return spread(step.layout, _kept(ctx))

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """Return the mask, one byte per entry."""
        return Private({f"keep/{name}": k > 0 for name, k in _kept(ctx).items()})


def _alone(frame: LabelFrame | None, source: Source) -> LabelFrame | None:
    """Return the frame with the source's own classes as those of its task."""
    return frame and replace(frame, tasks={str(source.task): source.classes})


def _is_count(value: object) -> bool:
    """Whether it is a whole number >= 1; True is none, though Python calls it an int."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _kept(ctx: Context) -> Params:
    """Return the mask of this visit, by entry."""
    return {name.removeprefix("keep/"): k for name, k in ctx.private.items() if name.startswith("keep/")}


def _shared(model: Model, params: Params) -> set[str]:
    """Return the trainable entries that tasks share."""
    return {
        name
        for name, p in params.items()
        if p.is_floating_point() and not model.frozen(name) and model.task_of(name) is None
    }


def _reached(model: Model, params: Params, sources: tuple[Source, ...]) -> Params:
    """Return 1 for the entries that count, 0 for the rows of a shared head for classes that no source has."""
    # Imported here because a room of concepts does not load another one.
    from consilience.models.tangent import Tangent

    # A tangent model has the head of the model that it linearises.
    head = anatomy(model.model if isinstance(model, Tangent) else model).head
    found = {name: torch.ones_like(p) for name, p in params.items()}
    if head is None or any(s.kind != "class" for s in sources):
        return found

    classes = [c for s in sources for c in s.classes]
    for name in head.entries:
        found[name] = torch.zeros_like(params[name])
        found[name][classes] = 1
    return found
