"""Exemplars: what is kept is trained on together with what is new. iCaRL and GDumb."""

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
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.corrections.baselines import THROWN, others, pool, reset
from consilience.corrections.rehearsal import Buffer, select

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True, eq=False)
class Exemplified:
    """What iCaRL knows: the exemplars of other sources, and the unit mean [C, d] of each class seen (in predict)."""

    past: Mapping[str, Private]
    means: Tensor | None
    seen: Tensor | None


@dataclass(frozen=True)
class ICaRL(Buffer):
    """iCaRL: train on new data and exemplars together, keep the old classes' answers, predict by the nearest mean of exemplars.

    L = mean over samples of sum over classes seen of BCE(h_c(x), q_c): q_c is the old model's sigmoid h_c(x) for the classes
    of earlier sources, 1[y = c] for those of this one. Exemplars are chosen by herding; all classes share `size`. Predicted is
    argmin_c || psi(x) / |psi(x)| - mu_c ||, mu_c the unit mean of the class's exemplars under the features at the end of
    the last source: as outputs mu_c . psi(x), which order the classes alike. An agent without exemplars (a server) predicts with its head.
    Rebuffi et al. 2017.
    """

    size: int = 500

    needs_boundaries: ClassVar[bool] = True

    @property
    def policy(self) -> Policy:  # type: ignore[override]
        """Herding."""
        from consilience.memory.policies import Herding

        return Herding()

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.kind == "value":
            return "values have no classes with a mean; use er"
        if not facts.trains:
            return NO_TRAINING
        if facts.model is not None:
            params = facts.model.init(torch.Generator().manual_seed(0))[0]
            try:
                shape = params[facts.model.head(params, None)[0]].shape
            except ConsilienceError:
                shape = torch.Size()
            if shape[:1] != (facts.model.outputs,):
                return "it needs one linear head on the features, and this model has none; use a model such as mlp or conv"
        return super().refuse(facts)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Exemplified:
        last = next((i for i in memory.values() if "means" in i.tensors), None)
        means, seen = (last.tensors["means"], last.tensors["seen"]) if last else (None, None)
        return Exemplified(others(memory, sources), means, seen)

    def gather(
        self, sources: tuple[Source, ...], known: Exemplified, generator: torch.Generator
    ) -> tuple[Source, ...]:
        return pool(sources, known.past)

    def begin(self, start: Beginning) -> Begun:
        """Private: which classes [C] are old, which are seen."""
        model, params, sources, known = start.model, start.params, start.sources, start.recalled
        old, seen = torch.zeros(model.outputs, dtype=torch.bool), torch.zeros(model.outputs, dtype=torch.bool)
        old[[c for i in known.past.values() for c in i.meta["classes"]]] = True
        seen[[c for s in sources for c in s.classes]] = True
        return Begun(params, {"old": old & ~seen, "seen": seen | old})

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        bent = dict(losses)
        for i, p in enumerate(step.parts):
            if not p.drawn_by:
                old, seen = (ctx.private[k].to(p.y.device) for k in ("old", "seen"))
                target = F.one_hot(p.y, len(old)).to(step.raw[i])
                if bool(ctx.recalled.past):
                    target = torch.where(old, step.before(p.x, p.task).sigmoid(), target)
                each = F.binary_cross_entropy_with_logits(step.raw[i], target, reduction="none")
                bent[i] = torch.where(seen, each, 0).sum(1)
        return bent

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """In predict the head is the means of the exemplars."""
        if ctx.private or ctx.recalled.means is None:
            return params
        assert ctx.model is not None
        weight, bias = ctx.model.head(params, None)
        new = {**params, weight: ctx.recalled.means.to(params[weight])}
        if bias is not None:
            new[bias] = torch.where(ctx.recalled.seen.to(params[bias].device), 0.0, -1e9).to(params[bias])
        return new

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """The exemplars within the budget; with the last source the means of all."""
        kept = dict(
            super().trim(
                {
                    s: replace(i, tensors={k: i.tensors[k] for k in ("x", "y", "key")})
                    for s, i in memory.items()
                },
                learned,
            )
        )
        total: Tensor | None = None
        count = torch.zeros(learned.model.outputs, dtype=torch.float64)
        for item in kept.values():
            if not len(item.tensors["y"]):
                continue
            with torch.no_grad():
                psi = (
                    learned.model.features(
                        learned.params, learned.buffers, item.tensors["x"], item.meta["task"]
                    )
                    .double()
                    .cpu()
                )
            hot = F.one_hot(item.tensors["y"].cpu(), learned.model.outputs).double()
            if total is not None and psi.shape[1] != total.shape[1]:
                raise Refusal(
                    f"ICaRL needs features of one size for all tasks. Found {total.shape[1]} and {psi.shape[1]}; "
                    "compose it with nothing that widens the model."
                )
            found = hot.T @ (psi / psi.norm(dim=1, keepdim=True).clamp_min(1e-12))
            total, count = found if total is None else total + found, count + hot.sum(0)
        if total is not None:  # a sum has the mean's direction
            means = total / total.norm(dim=1, keepdim=True).clamp_min(1e-12)
            last = kept[learned.source.name]
            kept[learned.source.name] = replace(
                last, tensors={**last.tensors, "means": means, "seen": count > 0}
            )
        return kept


@dataclass(frozen=True)
class GDumb(Buffer):
    """GDumb: keep a buffer with as many examples of each class, and train on nothing else, from new parameters at each learn.

    An epoch goes over the buffer as often as it fits into the source, so that a learn costs what plain training costs.
    Prabhu, Torr & Dokania 2020.
    """

    size: int = 500

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
        if facts.kind == "value":
            return "values have no classes to balance; use er"
        return super().refuse(facts)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private]:
        return others(memory, sources)

    @staticmethod
    def drawn(sources: tuple[Source, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """The keys of the new examples, by source."""
        return {s.name: torch.rand(len(s.train), generator=generator, dtype=torch.float64) for s in sources}

    def gather(
        self, sources: tuple[Source, ...], known: dict[str, Private], generator: torch.Generator
    ) -> tuple[Source, ...]:
        new = self.drawn(sources, generator)
        keys = [*new.values(), *(i.tensors["key"] for i in known.values())]
        y = [*(s.train.targets() for s in sources), *(i.tensors["y"] for i in known.values())]
        kept = self.policy.keep(
            torch.cat([k.cpu() for k in keys]), torch.cat([t.cpu() for t in y]), self.size
        ).split([*map(len, keys)])
        past = {
            name: select(item, k) for (name, item), k in zip(known.items(), kept[len(sources) :], strict=True)
        }
        at = [k.nonzero()[:, 0] for k in kept[: len(sources)]]
        at = [
            i if len(i) else new[s.name].argmin()[None] for i, s in zip(at, sources, strict=True)
        ]  # one at least
        chosen = tuple(replace(s, train=s.train.select(i)) for s, i in zip(sources, at, strict=True))
        longest = max(len(s.train) for s in sources)
        return tuple(
            replace(p, train=p.train.select(torch.arange(max(longest, len(p.train))) % len(p.train)))
            for p in pool(chosen, past)
        )

    def begin(self, start: Beginning) -> Begun:
        """New parameters after an agent's first learn."""
        model, params, sources, known, generator = (
            start.model,
            start.params,
            start.sources,
            start.recalled,
            start.generator,
        )
        keys = self.drawn(sources, generator)  # as those of `gather`
        return Begun((reset(model, params, sources, known, generator) if known else params), keys)

    def keys(self, learned: Learned, ctx: Context) -> Tensor:
        return ctx.private[learned.source.name]
