"""Heads in closed form: a linear head is computed from the features of its training data, before any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.checks import positive
from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory
from consilience.core.correction import NO_TRAINING, Correction
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Private
from consilience.core.model import without_shared_head
from consilience.core.names import WHOLE, pair
from consilience.core.outliers import Clip, check_features, checked_clip
from consilience.core.params import computing
from consilience.core.ridge import solve
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source
from consilience.core.tree import cast_to
from consilience.corrections.baselines import THROWN, others

ABSENT = -1e9
"""The logit of a class that has no prototype."""


@dataclass(frozen=True)
class SolvedHead(Correction):
    """Compute the head of a visit in closed form, from the features psi [N, d] of its training data.

    Steps, if there are any, go on from it.

    - "ridge": W = (A + ridge tr(A)/d I)^-1 b over the classes of all sources of the visit, A = sum (psi -
      m)(psi - m)^T, b = sum (psi - m)(e_y - p)^T, with the means m of features and p of targets, so that the
      bias p - W^T m is not shrunk.
    - "prototype": logits -||psi - mu_c||^2 / (2 s^2) up to what all classes share, w_c = mu_c / s^2 and b_c =
      -||mu_c||^2 / (2 s^2), mu_c the mean of class c and s^2 the mean squared distance to them over d:
      nearest mean, as a linear head.
    - "logistic": argmin of the mean cross entropy of softmax W^T psi + b, plus ridge v / 2 ||W||^2, v = tr(A)
      / (N d); convex, by L-BFGS in float64. Steps from it on are linear probing, then fine-tuning (Kumar et
      al. 2022).

    `ridge` None is 0.1 for "ridge" and 0.01 for "logistic". With `clip` features farther from the median of
    their source than `clip` times the median distance are moved to that distance, so that a few outliers
    change the head little.

    >>> SolvedHead("logistic").strength
    0.01
    """

    kinds: ClassVar[tuple[str, ...]] = ("class", "value")
    takes_places: ClassVar[bool] = False
    takes_mixed: ClassVar[bool] = False

    kind: Literal["ridge", "prototype", "logistic"] = "ridge"
    ridge: float | None = None
    clip: float = 0.0

    def __post_init__(self) -> None:
        checked_clip(self.clip)
        if self.kind not in ("ridge", "prototype", "logistic"):
            raise ConsilienceError(f"`kind` must be ridge, prototype or logistic, got {self.kind!r}.")
        if not 0 < self.strength < float("inf"):
            raise ConsilienceError(f"`ridge` must be positive and finite, got {self.ridge}.")

    @property
    def strength(self) -> float:
        """`ridge`, or its usual value."""
        if self.ridge is not None:
            return self.ridge
        return 0.01 if self.kind == "logistic" else 0.1

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if "value" in facts.kinds and self.kind != "ridge":
            return "values have no classes; use kind='ridge'"
        if facts.revisited:
            return (
                "a head that was trained or averaged would be overwritten at each visit; "
                "use a setting that visits each source once"
            )
        if getattr(facts.model, "norm", None) is not None:
            return (
                "rows that are divided by their norm lose the scale that the closed form gives them; "
                "use norm=None"
            )
        return None

    def begin(self, start: Beginning) -> Begun:
        """Return the parameters with the heads of these sources solved, sources of one head together."""
        model, params = start.model, dict(start.params)
        by_head: dict[tuple[str, str | None], list[Source]] = {}
        for source in start.sources:
            head = model.head(start.params, model.head_key(source) if model.uses_task else None)
            by_head.setdefault(head, []).append(source)

        for (weight, bias), sources in by_head.items():
            if bias is None:
                raise Refusal(f"a head in closed form needs a bias, and {weight!r} has none; add one.")
            # A task's head has rows for its own classes only, and a buffer says which.
            prefix = weight.rpartition(".")[0]
            columns = start.buffers.get(f"{prefix}.columns", torch.arange(len(params[weight])))
            row_of = {int(column): row for row, column in enumerate(columns.tolist())}
            classes = sorted({c for source in sources for c in source.classes})
            rows = [row_of[c] for c in classes]
            solved_weight, solved_bias = self.head(start, sources, classes)
            # Clones, since verbs are pure: the given parameters must not change.
            for name, solved in ((weight, solved_weight.T), (bias, solved_bias)):
                params[name] = params[name].clone()
                params[name][rows] = solved.to(params[name])
        return Begun(params)

    def head(
        self, start: Beginning, sources: Sequence[Source], classes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return W [d, classes] and b [classes] from all data of these sources, in float64."""
        psi, targets = features_and_targets(start, sources, classes, self.clip)
        if self.kind == "prototype":
            return prototypes(psi, targets)

        mean, prior = psi.mean(0), targets.mean(0)
        centred = psi - mean
        if self.kind == "logistic":
            weight, bias = self.logistic(centred, targets)
            return weight, bias - mean @ weight
        weight = self.regression(centred, targets - prior)
        return weight, prior - mean @ weight

    def regression(self, centred: Tensor, targets: Tensor) -> Tensor:
        """Return W [d, classes] of ridge regression on centred features [N, d] and targets [N, classes]."""
        count, width = centred.shape
        # The solution is the same from either Gram matrix; the smaller one is cheaper.
        wide = width > count
        gram = centred @ centred.T if wide else centred.T @ centred
        gram.diagonal().add_(self.strength * float(gram.trace()) / width or 1.0)
        solved: Tensor = torch.linalg.solve(gram, targets if wide else centred.T @ targets)
        return centred.T @ solved if wide else solved

    def logistic(self, centred: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return W [d, classes] and b [classes] of logistic regression on centred features [N, d].

        W = V W', V [d, r] the min(N, d) directions in which the features vary.
        """
        penalty = self.strength * float(centred.square().mean()) / 2
        left, sizes, right = torch.linalg.svd(centred, full_matrices=False)
        # Directions without variance would only slow the search, whose optimum has no weight on them.
        there = sizes > sizes[:1] * 1e-10
        reduced, directions = left[:, there] * sizes[there], right[there]

        # The last row of w is the bias.
        w = reduced.new_zeros(reduced.shape[1] + 1, targets.shape[1]).requires_grad_()
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
                out = F.cross_entropy(reduced @ w[:-1] + w[-1], targets) + penalty * w[:-1].square().sum()
            out.backward()
            return float(out.detach())

        solver.step(loss)
        return directions.T @ w[:-1].detach(), w[-1].detach()


@dataclass(frozen=True)
class StreamHead(Correction):
    """Begin each visit at the agent's first parameters, with a ridge head from all data so far.

    W = (A + lambda I)^-1 b / temperature, with the sums A and b of `ClosedForm` over all sources that the
    agent visited, this one included. All features are those of the first parameters, so that W depends
    neither on the order of sources nor on how data was cut into them. Steps go on from it; those of a visit
    are forgotten at the next. Wang et al. 2022 (SCROLL).
    """

    strength: float = 0.01
    temperature: float = 0.1

    kinds: ClassVar[tuple[str, ...]] = ("class", "value")
    takes_places: ClassVar[bool] = False
    takes_mixed: ClassVar[bool] = False
    shared_items: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(strength=self.strength, temperature=self.temperature)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return NO_TRAINING
        if facts.receives_others:
            return THROWN + "use fed3r, which sums over all agents"
        model = facts.model
        if model is not None and (why := without_shared_head(model)):
            return why
        if model is not None and model.moves_buffers:
            return (
                "steps move the model's buffers, such as those of batch norm, so that sums of features would "
                "not belong together; freeze the body (models.frozen), or use a model without them"
            )
        return None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Private] | None:
        """Return the sums of all other sources, and the first parameters; None at the first visit."""
        return others(memory, sources) or None

    def begin(self, start: Beginning) -> Begun:
        """Return the first parameters with the head solved. Private: this visit's sums of each source."""
        past = dict(start.recalled or {})
        first = past.pop(WHOLE, None)
        params = {**start.params, **(first.group("first") if first is not None else {})}
        begun = replace(start, params=params)

        sums = {}
        for source in start.sources:
            psi, targets = features_and_targets(begun, [source], range(len(source.labels)))
            # The one makes the bias a row of the solution.
            psi = torch.cat([psi, psi.new_ones(len(psi), 1)], 1)
            sums[source.name] = Private({"second": psi.T @ psi, "first": psi.T @ targets})

        # By name, so that the sum does not depend on the order of the sources.
        items = [item.tensors for _, item in sorted({**past, **sums}.items())]
        a, b = (sum(item[name] for item in items) for name in ("second", "first"))
        solved = solve(a, b, self.strength) / self.temperature

        weight, bias = start.model.head(params, None)
        for name, rows in ((weight, solved[:-1].T), (bias, solved[-1])):
            if name is not None:
                params[name] = torch.zeros_like(params[name])
                params[name][: solved.shape[1]] = rows.to(params[name])
        own = {pair(name, key): t for name, item in sums.items() for key, t in item.tensors.items()}
        return Begun(params, own)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        name = learned.source.name
        return Private({key: ctx.private[pair(name, key)] for key in ("second", "first")})

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Keep the parameters that the first visit began at; their head is solved again at each."""
        if WHOLE in memory:
            return memory
        first = {f"first/{name}": p.clone() for name, p in learned.start.items()}
        return {**memory, WHOLE: Private(first)}


def features_and_targets(
    start: Beginning, sources: Sequence[Source], classes: Sequence[int], clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return psi [N, d] and the targets [N, classes] (one-hot) of all data of the sources, in float64.

    Samples without a target are left out; `clip` is that of `SolvedHead`.
    """
    like: Any = computing(start.params)
    psi, targets = [], []
    for source in sources:
        own, rows = [], []
        for x, y, numbers in source.labelled(1024):
            rows.append(numbers)
            with torch.no_grad():
                x = cast_to(x, like.device, like.dtype)
                own.append(start.model.features(start.params, start.buffers, x, source.task).double())
            if source.kind != "value":
                y = F.one_hot(y, len(source.labels))[:, list(classes)]
            targets.append(y.double())

        features = torch.cat(own)
        psi.append(Clip.of(features, clip)(features) if clip else features)
        check_features(psi[-1], torch.cat(rows), source.name)
    return torch.cat(psi), torch.cat(targets).to(psi[0].device)


def prototypes(psi: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return W [d, classes] and b [classes] of the nearest class mean, as a linear head."""
    count = targets.sum(0)
    mu = targets.T @ psi / count.clamp_min(1)[:, None]
    variance = (psi - targets @ mu).square().sum() / psi.numel()
    # Features that are equal within every class leave no scale; any will do.
    weight = mu.T / torch.where(variance > 0, variance, torch.ones_like(variance))
    return weight, torch.where(count > 0, -(weight * mu.T).sum(0) / 2, ABSENT)
