"""Heads that are solved for: a task's linear head is written from all features of its training data, before any step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.contexts import Beginning, Begun
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source

ABSENT = -1e9
"""The logit of a class that has no prototype."""


@dataclass(frozen=True)
class SolvedHead(Correction):
    """Writes the head of what is learned from the features psi [N, d] of its training data; steps, where there are any, go on from it.

    "ridge": W = (A + ridge tr(A)/d I)^-1 b over the classes of all that is learned together, A = sum (psi - m)(psi - m)^T, b = sum (psi - m)(e_y - p)^T, with
    the means m of features and p of targets, so that the bias p - W^T m is not shrunk.
    "prototype": logits -||psi - mu_c||^2 / (2 s^2) up to what all classes share, w_c = mu_c / s^2 and b_c = -||mu_c||^2 / (2 s^2), mu_c the
    mean of class c and s^2 the mean squared distance to them over d: nearest mean, as a linear head.
    "logistic": argmin of the mean cross entropy of softmax W^T psi + b, plus ridge v / 2 ||W||^2, v = tr(A) / (N d); convex, by L-BFGS
    in float64. Steps from it on are linear probing, then fine-tuning (Kumar et al. 2022).

    `ridge` None is 0.1 for "ridge" and 0.01 for "logistic".

    >>> SolvedHead("logistic").strength
    0.01
    """

    kind: Literal["ridge", "prototype", "logistic"] = "ridge"
    ridge: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("ridge", "prototype", "logistic"):
            raise ConsilienceError(
                f"`kind` should be ridge, prototype or logistic. Found `kind = {self.kind!r}`."
            )
        if not 0 < self.strength < float("inf"):
            raise ConsilienceError(f"`ridge` should be positive and finite. Found `ridge = {self.ridge}`.")

    @property
    def strength(self) -> float:
        """`ridge`, or its usual value."""
        return self.ridge if self.ridge is not None else 0.01 if self.kind == "logistic" else 0.1

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if facts.kind == "value" and self.kind != "ridge":
            return "values have no classes; use kind='ridge'"
        if facts.revisited:
            return "a head that was trained or averaged would be written anew at each visit; use a setting that learns each source once"
        if getattr(facts.model, "norm", None) is not None:
            return "rows that are divided by their norm lose the scale that the closed form gives them; use norm=None"
        return None

    def begin(self, start: Beginning) -> Begun:
        model, new = start.model, dict(start.params)
        together: dict[tuple[str, str | None], list[Source]] = {}
        for s in start.sources:
            together.setdefault(
                model.head(start.params, model.head_key(s) if model.uses_task else None), []
            ).append(s)
        for (weight, bias), sources in together.items():
            if bias is None:
                raise Refusal(f"a head in closed form has a bias. Found none beside {weight!r}.")
            columns = start.buffers.get(
                f"{weight.rpartition('.')[0]}.columns", torch.arange(len(new[weight]))
            )
            where = {int(c): row for row, c in enumerate(columns.tolist())}
            classes = sorted({c for s in sources for c in s.classes})
            w, b = self.head(start, sources, classes)
            for n, t in ((weight, w.T), (bias, b)):
                new[n] = new[n].clone()
                new[n][[where[c] for c in classes]] = t.to(new[n])
        return Begun(new)

    def head(
        self, start: Beginning, sources: Sequence[Source], classes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """W [d, classes] and b [classes] of all data of these sources, in float64."""
        like: Any = next(p for p in start.params.values() if p.is_floating_point())
        psis, hots = [], []
        for s in sources:
            for x, y in s.train.chunks(1024):
                with torch.no_grad():
                    x = x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
                    psis.append(start.model.features(start.params, start.buffers, x, s.task).double())
                hots.append(
                    y.double()
                    if s.kind == "value"
                    else F.one_hot(y, len(s.labels))[:, list(classes)].double()
                )
        psi, hot = torch.cat(psis), torch.cat(hots).to(psis[0].device)
        n, d = psi.shape
        if self.kind == "prototype":
            count = hot.sum(0)
            mu = hot.T @ psi / count.clamp_min(1)[:, None]
            spread = (psi - hot @ mu).square().sum() / (n * d)
            w = mu.T / torch.where(spread > 0, spread, torch.ones_like(spread))
            return w, torch.where(count > 0, -(w * mu.T).sum(0) / 2, ABSENT)
        m, p = psi.mean(0), hot.mean(0)
        centred, target = psi - m, hot - p
        if self.kind == "logistic":
            w, b = self.logistic(centred, hot)
            return w, b - m @ w
        if d > n:  # the same solution from the n x n side
            gram = centred @ centred.T
            gram.diagonal().add_(self.strength * float(gram.trace()) / d or 1.0)
            w = centred.T @ torch.linalg.solve(gram, target)
        else:
            a = centred.T @ centred
            a.diagonal().add_(self.strength * float(a.trace()) / d or 1.0)
            w = torch.linalg.solve(a, centred.T @ target)
        return w, p - m @ w

    def logistic(self, centred: Tensor, hot: Tensor) -> tuple[Tensor, Tensor]:
        """W [d, classes] and b [classes] for centred features [N, d]: W = V W' for the min(N, d) directions V [d, r] in which these vary."""
        penalty_gradient = self.strength * float(centred.square().mean()) / 2
        u, sizes, v = torch.linalg.svd(centred, full_matrices=False)
        there = sizes > sizes[:1] * 1e-10
        z, v = u[:, there] * sizes[there], v[there]
        w = z.new_zeros(z.shape[1] + 1, hot.shape[1]).requires_grad_()
        solver = torch.optim.LBFGS(
            [w],
            max_iter=500,
            history_size=20,
            tolerance_grad=1e-6,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def loss() -> float:
            solver.zero_grad()
            with torch.enable_grad():
                out = F.cross_entropy(z @ w[:-1] + w[-1], hot) + penalty_gradient * w[:-1].square().sum()
            out.backward()
            return float(out.detach())

        solver.step(loss)
        return v.T @ w[:-1].detach(), w[-1].detach()
