"""Mappers by superposition: all views of the parameters at once, and which makes the answer more certain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from consilience.core.contexts import Memory, Routing
from consilience.core.correction import Mapper
from consilience.core.schedule import ScheduleFacts
from consilience.core.tree import one_tensor


def entropy(out: Tensor) -> Tensor:
    """Return -sum p log p [B] of the softmax of outputs [B, C]; a column of -inf counts as 0."""
    log = out.log_softmax(1)
    return -(log.exp() * log.masked_fill(log == -torch.inf, 0)).sum(1)


@dataclass(frozen=True)
class Superposition(Mapper):
    """The expert whose weight most lowers the entropy of the superposed model.

    It is argmin_k dH/d alpha_k at alpha_k = 1/K. H(alpha) is the entropy of softmax f(sum_k alpha_k theta_k,
    x), theta_k the parameters as the task of expert k sees them (masks, keys, gates of any correction with a
    `view`); parameters that all tasks see alike stay as they are. It is over all output columns that some
    expert was trained for. With `halving` the half of the experts (rounded down) with the lowest slopes goes
    on with equal alpha until one is left, log2 K gradients; else one gradient decides. With `together` all
    samples of a batch are taken to be of one task, as in the paper, and H is their mean; else each sample is
    on its own, and most are misrouted. Test data is judged source by source; give `predict` inputs of one
    task at a time. The paper's other objective G needs outputs that are trained to be of no class, and
    training on a task's own columns has none. Wortsman et al. 2020.
    """

    halving: bool = True
    together: bool = True

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    takes_trees: ClassVar[bool] = False
    instead: ClassVar[str] = "use the average mapper"
    superposes: ClassVar[bool] = True

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.overlap and facts.model is not None and facts.model.uses_task:
            return (
                "heads of several tasks for the same classes have no superposition; "
                "use a model with one shared head, such as mlp"
            )
        return None

    def slopes(self, routing: Routing, alpha: Tensor) -> Tensor:
        """Return dH/d alpha: [K] for alpha [K] with `together`; else [B, K], for alpha [K] or [B, K]."""
        assert routing.superposed is not None
        outputs = routing.superposed()
        if self.together:
            shared: Tensor = torch.func.grad(lambda a: entropy(outputs(routing.x, a)).mean())(alpha)
            return shared

        # Chunks of 64 samples, because each sample has its own parameters.
        one = torch.func.grad(lambda a, x: entropy(outputs(x[None], a)).sum())
        dims = (0 if alpha.ndim == 2 else None, 0)
        each: Tensor = torch.func.vmap(one, dims, chunk_size=64)(
            alpha, one_tensor(routing.x, "one in superposition")
        )
        return each

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        experts = kept = len(routing.experts)
        dtype = routing.x.dtype if routing.x.is_floating_point() else torch.get_default_dtype()
        # Integer inputs, such as tokens, have no type for a gradient.
        alpha = torch.full((experts,), 1 / experts, dtype=dtype, device=routing.x.device)
        while kept > 1:
            # Experts that are out have weight 0 and must not come back.
            slopes = self.slopes(routing, alpha).masked_fill(alpha == 0, torch.inf)
            kept = kept // 2 if self.halving else 1
            best = slopes.argsort(dim=-1, stable=True)[..., :kept]
            alpha = torch.zeros_like(slopes).scatter(-1, best, 1 / kept)
        return alpha.expand(len(routing.x), experts) if alpha.ndim == 1 else alpha
