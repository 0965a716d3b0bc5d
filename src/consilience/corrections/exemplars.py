"""Exemplars: stored examples are trained on together with new ones, or alone. iCaRL and GDumb."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.buffer import Policy
from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import NO_TRAINING
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Private
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.tree import unnamed
from consilience.corrections.baselines import THROWN, others, pool, reset
from consilience.corrections.rehearsal import Buffer, kept, select

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True, eq=False)
class Exemplars:
    """The exemplars of other sources; in predict also unit means [C, d], and which classes have one [C]."""

    past: Mapping[str, Private]
    means: Tensor | None
    seen: Tensor | None


@dataclass(frozen=True)
class ICaRL(Buffer):
    """iCaRL: train on new data and exemplars, distil the old classes, predict by the nearest mean.

    L = mean over samples of sum over classes seen of BCE(h_c(x), q_c): q_c is the old model's sigmoid h_c(x)
    for classes of earlier sources, 1[y = c] for those of this one. Exemplars are chosen by herding; all
    classes share `size`. The prediction is argmin_c || psi(x) / |psi(x)| - mu_c ||, mu_c the unit mean of
    the class's exemplars under the features at the end of the last source: as outputs mu_c . psi(x), which
    order the classes alike. An agent without exemplars (a server) predicts with its head. Rebuffi et al.
    2017.
    """

    size: int = 500

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    instead: ClassVar[str] = "use er"
    needs_boundaries: ClassVar[bool] = True

    @property
    def policy(self) -> Policy:  # type: ignore[override]
        """Herding."""
        # Rooms of parts do not import one another when they are loaded.
        from consilience.memory.policies import Herding

        return Herding()

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if facts.model is not None and not has_linear_head(facts.model):
            return (
                "it needs one linear head on the features, and this model has none; "
                "use a model such as mlp or conv"
            )
        return super().refuse(facts)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Exemplars:
        """Return the exemplars of other sources, and the means that the last source left."""
        last = next((item for item in memory.values() if "means" in item.tensors), None)
        means, seen = (last.tensors["means"], last.tensors["seen"]) if last else (None, None)
        return Exemplars(others(memory, sources), means, seen)

    def gather(
        self, sources: tuple[Source, ...], recalled: Exemplars, generator: torch.Generator
    ) -> tuple[Source, ...]:
        return pool(sources, recalled.past)

    def begin(self, start: Beginning) -> Begun:
        """Return the parameters unchanged. Private: which classes [C] are old, and which are seen."""
        old, new = (torch.zeros(start.model.outputs, dtype=torch.bool) for _ in range(2))
        old[[label for item in start.recalled.past.values() for label in item.meta["classes"]]] = True
        new[[label for source in start.sources for label in source.classes]] = True
        return Begun(start.params, {"old": old & ~new, "seen": new | old})

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        """Replace the losses of the pool by the sums of binary cross-entropies."""
        changed = dict(losses)
        for i, part in enumerate(step.parts):
            # Parts that another correction drew keep their own loss.
            if part.drawn_by:
                continue
            old, seen = (ctx.private[name].to(part.y.device) for name in ("old", "seen"))
            target = F.one_hot(part.y.clamp_min(0), len(old)).to(step.raw[i])
            if bool(ctx.recalled.past):
                target = torch.where(old, step.before(part.x, part.task).sigmoid(), target)
            each = F.binary_cross_entropy_with_logits(step.raw[i], target, reduction="none")
            changed[i] = torch.where(seen, each, 0).sum(1)
        return changed

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return the parameters; in predict with the means of the exemplars as the head."""
        if ctx.private or ctx.recalled.means is None:
            return params
        assert ctx.model is not None
        weight, bias = ctx.model.head(params, None)
        seen = {**params, weight: ctx.recalled.means.to(params[weight])}

        # Classes without exemplars must not win with a product of 0.
        if bias is not None:
            offsets = torch.where(ctx.recalled.seen.to(params[bias].device), 0.0, -1e9)
            seen[bias] = offsets.to(params[bias])
        return seen

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Keep the exemplars within the budget; the last source's item has the means of all of them."""
        # The means are those of the features now, so older ones are dropped.
        bare = {
            source: replace(item, tensors=kept(item.tensors, ("x", "y", "key")))
            for source, item in memory.items()
        }
        stay = dict(super().trim(bare, learned))
        if (means := self._means(stay, learned)) is not None:
            last = stay[learned.source.name]
            stay[learned.source.name] = replace(last, tensors={**last.tensors, **means})
        return stay

    @staticmethod
    def _means(items: Mapping[str, Private], learned: Learned) -> dict[str, Tensor] | None:
        """Return unit means [C, d] of unit features per class, and which have one [C]; None if none has."""
        total: Tensor | None = None
        model, count = learned.model, torch.zeros(learned.model.outputs, dtype=torch.float64)
        for item in items.values():
            x, y = unnamed("x", item.tensors), item.tensors["y"].cpu()
            if not len(y):
                continue
            with torch.no_grad():
                features = model.features(learned.params, learned.buffers, x, item.meta["task"])
            psi, hot = features.double().cpu(), F.one_hot(y, model.outputs).double()
            if total is not None and psi.shape[1] != total.shape[1]:
                raise Refusal(
                    "ICaRL needs features of one size for all tasks, "
                    f"got {total.shape[1]} and {psi.shape[1]}; compose it with nothing that widens the model."
                )
            added = hot.T @ (psi / psi.norm(dim=1, keepdim=True).clamp_min(1e-12))
            total, count = added if total is None else total + added, count + hot.sum(0)

        # A sum has the direction of the mean, so nothing is divided by the count.
        if total is None:
            return None
        means = total / total.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return {"means": means, "seen": count > 0}


def has_linear_head(model: Model) -> bool:
    """Whether a model has one linear head for all tasks, whose rows are the outputs."""
    params = model.init(torch.Generator().manual_seed(0))[0]
    try:
        return params[model.head(params, None)[0]].shape[:1] == (model.outputs,)
    except ConsilienceError:
        return False


@dataclass(frozen=True)
class GDumb(Buffer):
    """GDumb: keep a class-balanced buffer, and train on it alone, from new parameters at every visit.

    An epoch goes over the buffer as often as it fits into the source, so a visit costs what plain training
    costs. Without `scratch` another correction says where a visit begins. Prabhu, Torr & Dokania 2020.
    """

    size: int = 500
    scratch: bool = True

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    instead: ClassVar[str] = "use er"

    @property
    def policy(self) -> Policy:  # type: ignore[override]
        """Class-balanced."""
        from consilience.memory.policies import ClassBalanced

        return ClassBalanced()

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.receives_others:
            return THROWN + "use er"
        if not facts.trains:
            return NO_TRAINING
        return super().refuse(facts)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private]:
        """Return the buffered examples of other sources."""
        return others(memory, sources)

    @staticmethod
    def drawn(sources: tuple[Source, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the keys of the new examples, by source."""
        return {s.name: torch.rand(len(s.train), generator=generator, dtype=torch.float64) for s in sources}

    def gather(
        self, sources: tuple[Source, ...], recalled: dict[str, Private], generator: torch.Generator
    ) -> tuple[Source, ...]:
        """Return the buffer as after this visit, repeated to the length of the longest source."""
        new = self.drawn(sources, generator)
        keys = [*new.values(), *(item.tensors["key"] for item in recalled.values())]
        targets = [
            *(source.train.targets() for source in sources),
            *(item.tensors["y"] for item in recalled.values()),
        ]
        stay = self.policy.keep(
            torch.cat([k.cpu() for k in keys]), torch.cat([y.cpu() for y in targets]), self.size
        ).split([*map(len, keys)])
        of_new, of_past = stay[: len(sources)], stay[len(sources) :]

        # A source needs an example to train on: if the buffer has none of it, that with the least key.
        indices = [
            own.nonzero()[:, 0] if bool(own.any()) else new[source.name].argmin()[None]
            for own, source in zip(of_new, sources, strict=True)
        ]
        chosen = tuple(source.select(index) for source, index in zip(sources, indices, strict=True))
        past = {name: select(item, own) for (name, item), own in zip(recalled.items(), of_past, strict=True)}

        # Buffers are small, and an epoch has as many steps as for plain training.
        longest = max(len(source.train) for source in sources)
        repeated = []
        for part in pool(chosen, past):
            length = max(longest, len(part.train))
            repeated.append(part.select(torch.arange(length) % len(part.train)))
        return tuple(repeated)

    def begin(self, start: Beginning) -> Begun:
        """Draw new parameters after an agent's first visit. Private: the keys of the new examples."""
        # The generator draws as that of `gather` did, so these are the keys by which it chose.
        keys = self.drawn(start.sources, start.generator)
        if not start.recalled or not self.scratch:
            return Begun(start.params, keys)
        fresh = reset(start)
        return Begun(fresh, keys)

    def keys(self, learned: Learned, ctx: Context) -> Tensor:
        return ctx.private[learned.source.name]
