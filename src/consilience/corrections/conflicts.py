"""Statistics of conflicts: how the gradients of the tasks of a step agree, over training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.checks import whole_number
from consilience.core.contexts import Context, StepView
from consilience.core.correction import NO_TRAINING, Correction

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

ALL = "all"
"""The group of all shared entries."""


@dataclass(frozen=True)
class Conflicts(Correction):
    """Note how the gradients g_i of tasks agree: cos(g_i, g_j) over entries that the tasks share.

    Training stays as it is. The Gramian of the step's aggregator is read where it computes one; otherwise
    each task has a backward pass of its own. `Result.visits` has for each visit, under "Conflicts": the mean
    cosine and the fraction of negative ones ("cosine", "negative") over all pairs of tasks and steps; the
    same by pair ("pairs") and over training ("points", equal parts of the visit); and with `layers` by the
    part of the model that entries belong to. A pair counts in steps in which both have a gradient that is not
    zero. Yu et al. 2020 (PCGrad), arXiv:2001.06782.

    Args:
        points: in how many parts the visit is cut.
        layers: whether to say it by layer too.

    >>> import consilience as cs
    >>> tasks = cs.data.split_classes(cs.data.digits(), 5)
    >>> method = cs.methods.pcgrad() + cs.methods.conflicts()
    >>> result = cs.run(cs.settings.multitask(tasks), method, training=cs.Training(epochs=1))
    >>> sorted(result.visits[0]["Conflicts"])
    ['cosine', 'layers', 'negative', 'pairs', 'points']
    """

    points: int = 10
    layers: bool = False

    needs_norms: ClassVar[bool] = True
    shared_items: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole_number(points=self.points)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if facts.parts < 2:
            return "it compares the gradients of the tasks of a step, and a step has one here; use multitask"
        return None

    def trace_init(self, ctx: Context) -> dict[str, Tensor]:
        """Return sums of cosines, and counts of pairs and of negative ones [points, groups, m, m]."""
        assert ctx.layout is not None
        groups, tasks = len(self._groups(ctx)), len(ctx.parts)
        zeros = ctx.theta.new_zeros(self.points, groups, tasks, tasks, dtype=torch.float64)
        return {name: zeros.clone() for name in ("cosine", "negative", "count")}

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        # A step that is left out for its numbers says nothing.
        if not step.grams:
            return ctx.trace
        count = ctx.trace["cosine"].shape[-1]
        # Over all shared entries, and over those of each layer.
        each = {name: products[:count, :count].double() for name, products in step.grams.items()}
        groups = [list(each), *list(self._groups(ctx).values())[1:]]
        gram = torch.stack([torch.stack([each[name] for name in names]).sum(0) for names in groups])
        norms = gram.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        sizes = norms.unsqueeze(2) * norms.unsqueeze(1)
        # A gradient of zero has no direction, and so no cosine.
        there = sizes > 0
        cosine = torch.where(there, gram / torch.where(there, sizes, 1), 0)

        # The present part of the visit; each visit begins again.
        (epoch, index), (epochs, per_epoch) = step.clock, step.horizon
        done, total = epoch * per_epoch + index, epochs * per_epoch
        at = torch.as_tensor(done * self.points // max(total, 1)).clamp_max(self.points - 1)
        now = F.one_hot(at.long(), self.points).to(gram).view(-1, 1, 1, 1)
        kept = {name: old if done else torch.zeros_like(old) for name, old in ctx.trace.items()}
        found = {"cosine": cosine, "negative": (cosine < 0).to(gram), "count": there.to(gram)}
        return {name: kept[name] + now * value for name, value in found.items()}

    def figures(self, ctx: Context) -> dict[str, Any]:
        assert ctx.layout is not None
        sums = {name: value.cpu() for name, value in ctx.trace.items()}
        tasks = len(ctx.parts)
        # Each pair once, and no task with itself.
        pairs = torch.triu_indices(tasks, tasks, 1)

        def said(*at: Any) -> dict[str, float | None]:
            """Return the mean cosine and the fraction of negative ones of some of the sums."""
            cosine, negative, count = (
                float(sums[name][:, :, pairs[0], pairs[1]][at].sum())
                for name in ("cosine", "negative", "count")
            )
            if not count:
                return {"cosine": None, "negative": None}
            return {"cosine": cosine / count, "negative": negative / count}

        every = slice(None)
        names = [f"{ctx.parts[i]} | {ctx.parts[j]}" for i, j in pairs.T.tolist()]
        layers = list(self._groups(ctx))[1:]
        return {
            **said(every, 0),
            "pairs": {name: said(every, 0, number) for number, name in enumerate(names)},
            "points": [said(number, 0) for number in range(self.points)],
            "layers": {name: said(every, number) for number, name in enumerate(layers, 1)},
        }

    def _groups(self, ctx: Context) -> dict[str, list[str]]:
        """Return the shared entries of each layer, after an empty list for all."""
        assert ctx.layout is not None
        found: dict[str, list[str]] = {ALL: []}
        for name in ctx.layout.names if self.layers else ():
            if ctx.model is None or ctx.model.shared(name):
                found.setdefault(name.rpartition(".")[0] or name, []).append(name)
        return found
