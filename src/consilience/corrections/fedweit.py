"""FedWeIt: shared parameters that each task masks, and adds to by entries of its own and by those that others told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import Correction
from consilience.core.message import Item, Message, Module, Private
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.training import Training
from consilience.corrections.anatomy import spread, without_tasks
from consilience.corrections.quadratic import non_negative
from consilience.corrections.superposition import pack, unpack

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts
    from consilience.core.state import State

Key = tuple[str, str]
"""(sender, source)."""


@lru_cache(maxsize=16)
def shared(model: Model) -> tuple[str, ...]:
    """The trainable entries that all tasks share, in the model's order."""
    params, _ = model.init(torch.Generator().manual_seed(0))
    return tuple(
        n
        for n, p in params.items()
        if p.is_floating_point() and model.task_of(n) is None and not model.frozen(n)
    )


def slot(task: str | None) -> str:
    """A task's name as it stands in entries, before a colon."""
    return str(task).replace(":", "_")


def compose(base: Tensor, mask: Tensor, own: Tensor) -> Tensor:
    """B * sigma + A, one factor sigma for each unit (the first dimension).

    >>> compose(torch.ones(2, 2), torch.tensor([0.0, 1.0]), torch.ones(2, 2)).tolist()
    [[1.0, 1.0], [2.0, 2.0]]
    """
    return base * mask.reshape(mask.shape + (1,) * (base.ndim - mask.ndim)) + own


@dataclass(frozen=True, eq=False)
class Known:
    """What was told of each task, by (sender, source), this agent's own name (None before it heard anybody) and what its
    parameters were when it last heard, and the tasks of this learn (none in predict)."""

    told: Mapping[Key, Item]
    ctx: str | None
    before: Mapping[str, Tensor]
    now: tuple[str, ...]

    def own(self, key: Key, entry: str) -> Tensor:
        """The pruned A_j of an entry that was told."""
        item = self.told[key]
        values: Tensor = item.tensors[f"own/{entry}"]
        kept = unpack(item.tensors[f"kept/{entry}"], item.meta["shapes"][entry])
        return torch.zeros_like(kept, dtype=values.dtype).masked_scatter(kept > 0, values)

    def others(self) -> list[Key]:
        """What others told."""
        return [k for k in self.told if self.ctx is not None and k[0] != self.ctx]


@dataclass(frozen=True)
class FedWeIt(Correction):
    """theta_t = B * sigmoid(m_t) + A_t + sum_j alpha_tj A_j: shared parameters B, a mask m_t with one value a unit, what is the
    task's own A_t, and the A_j of others' earlier tasks weighed by alpha_tj, one a layer.

    Loss + sparsity (|sigmoid(m_t)|_1 + sum_{i <= t} |A_i|_1) + drift sum_{i < t} |(B - B') * sigmoid(m_i) + A_i - A_i'|^2, where '
    is what they were at this agent when the task before ended: A_i of earlier tasks move on so that B may. Every trainable entry that tasks share is so
    made (the paper's weights, and here biases, norms and a shared head too); a task begins at A = B / 3 with the B just heard,
    alpha = 0, and m = log 2, at which theta = B. m, A and alpha are personal entries `fedweit/...` (pattern of the method);
    B is averaged, never B * sigmoid(m). Told of a task, once it was learned: the mask, A without its |A| <= `prune`, and alpha;
    the last two are also how this agent predicts (in training nothing is pruned). Which A_j count is settled when a task begins.

    An agent answers a task that it learned by its own entries and any other by what was told of it (the mean, if several agents
    learned a task of that name): so does a server, with its B, but the told A_i are as they were when task i was learned, while
    their owners let them follow B. Under SGD the drift is capped at 1 / (2 lr (1 + earlier tasks)), with a warning: beyond twice
    that it diverges; the paper trains with Adam at lr 3.3e-4. Yoon, Jeong, Lee, Yang & Hwang 2021.
    """

    sparsity: float = 0.001
    drift: float = 100.0
    prune: float = 0.001

    def __post_init__(self) -> None:
        non_negative("FedWeIt", sparsity=self.sparsity, drift=self.drift, prune=self.prune)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return without_tasks(facts)

    @staticmethod
    def entry(kind: str, task: str | None, name: str) -> str:
        """The name of a personal entry: kind "mask", "own" or "alpha"; `name` an entry of the model, or "sender/source"."""
        return f"fedweit/{kind}/{slot(task)}:{name}"

    @staticmethod
    def earlier(names: Iterable[str], ctx: Context) -> list[str]:
        """The tasks with entries of their own that are not learned now."""
        assert ctx.model is not None
        start, end = "fedweit/mask/", f":{shared(ctx.model)[0]}"
        found = [n[len(start) : -len(end)] for n in names if n.startswith(start) and n.endswith(end)]
        return [t for t in found if t not in map(slot, ctx.recalled.now)]

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Known:
        own = next(
            ((sender, item) for (sender, _), item in memory.items() if isinstance(item, Private)), None
        )
        told = {k: item for k, item in sorted(memory.items()) if not isinstance(item, Private)}
        return Known(
            told,
            own and own[0],
            own[1].tensors if own else {},
            tuple(dict.fromkeys(str(s.task) for s in sources)),
        )

    def begin(self, start: Beginning) -> Begun:
        """m, A and alpha of a new task, and what B was when the last one ended. Private: for each task of this learn the A_j of
        others [K, ...], by entry."""
        model, params, known = start.model, start.params, start.recalled
        names, new = shared(model), dict(params)
        private: dict[str, Tensor] = {}
        for task in known.now:
            if self.entry("mask", task, names[0]) not in params:
                for n in names:
                    new[f"fedweit/before:{n}"] = known.before.get(n, params[n]).to(params[n]).clone()
                    new[self.entry("mask", task, n)] = params[n].new_full(params[n].shape[:1], 2).log()
                    new[self.entry("own", task, n)] = params[n] / 3
                for k in known.others():
                    new[self.entry("alpha", task, "/".join(k))] = params[names[0]].new_zeros(len(names))
            if used := self.used(new, task, known):
                private |= {
                    f"{slot(task)}:{n}": torch.stack([known.own(k, n).to(params[n]) for k in used])
                    for n in names
                }
        return Begun(new, private)

    def used(self, params: Params, task: str | None, known: Known) -> list[Key]:
        """What others told that a task of this agent's own weighs."""
        return [k for k in known.others() if self.entry("alpha", task, "/".join(k)) in params]

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """For the drift of earlier tasks: its strength, under SGD at most 1 / (2 lr (1 + earlier tasks)), and sigmoid(m_i) [tasks, n] of
        all shared entries in the layout's order."""
        from consilience.core.optimiser import SGD

        assert ctx.layout is not None and ctx.start is not None
        layout, earlier, warning = ctx.layout, self.earlier(ctx.layout.names, ctx), None
        if not earlier or not self.drift:
            return {}, None
        rates = training.factors(layout)
        lr = training.lr * (1 if rates is None else float(rates.max().clamp_min(1)))
        strength, most = self.drift, 1 / (2 * lr * (1 + len(earlier)))
        if isinstance(training.inner(), SGD) and strength > most:
            strength = most
            warning = f"a drift of {self.drift} may diverge under SGD at this lr, and is capped at {most:.3g}; the paper uses Adam"
        at, names = layout.split(ctx.start), self._in_order(ctx)
        masks = [[at[self.entry("mask", t, n)].sigmoid() for n in names] for t in earlier]
        wide = [
            [
                compose(torch.ones_like(at[n]), m, at[n].new_zeros(())).view(-1)
                for n, m in zip(names, ms, strict=True)
            ]
            for ms in masks
        ]
        return {
            "drift": ctx.start.new_tensor(strength),
            "mask": torch.stack([torch.cat(w) for w in wide]),
        }, warning

    @staticmethod
    def _in_order(ctx: Context) -> list[str]:
        """The shared entries as the layout has them."""
        assert ctx.model is not None
        return sorted(shared(ctx.model))

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """theta of a task: from this agent's own entries, else from what was told; B where there are neither."""
        assert ctx.model is not None
        known, names, learning = ctx.recalled, shared(ctx.model), ctx.layout is not None
        if self.entry("mask", task, names[0]) not in params:
            of_task = [k for k, item in known.told.items() if item.meta["task"] == task]
            views = [self._told(params, k, known, names) for k in of_task]
            return (
                {**params, **{n: torch.stack([v[n] for v in views]).mean(0) for n in names}}
                if views
                else params
            )
        seen, used = {}, self.used(params, task, known)
        alpha = torch.stack([params[self.entry("alpha", task, "/".join(k))] for k in used]) if used else None
        for at, n in enumerate(names):
            a = params[self.entry("own", task, n)]
            if not learning:
                a = a * (a.abs() > self.prune)
            theta = compose(params[n], params[self.entry("mask", task, n)].sigmoid(), a)
            if alpha is not None:
                others = ctx.private.get(f"{slot(task)}:{n}")
                others = torch.stack([known.own(k, n).to(theta) for k in used]) if others is None else others
                theta = theta + torch.tensordot(alpha[:, at], others, 1)
            seen[n] = theta
        if (
            learning and self.drift
        ):  # what no loss reaches does not move: these are reached, by 0, so that the penalty can move them
            reached = [
                params[self.entry("own", t, n)].reshape(-1)[0]
                for t in self.earlier(params, ctx)
                for n in names
            ]
            if reached:
                seen[names[0]] = seen[names[0]] + 0 * torch.stack(reached).sum()
        return {**params, **seen}

    def _told(self, params: Params, key: Key, known: Known, names: Sequence[str]) -> Params:
        item, seen = known.told[key], {}
        for at, n in enumerate(names):
            theta = compose(
                params[n], item.tensors[f"mask/{n}"].to(params[n]), known.own(key, n).to(params[n])
            )
            for alpha, (sender, source) in zip(item.tensors["alpha"], item.meta["from"], strict=True):
                if (sender, source) in known.told:
                    theta = theta + alpha[at].to(theta) * known.own((sender, source), n).to(theta)
            seen[n] = theta
        return seen

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        now, names = step.layout.split(step.theta), self._in_order(ctx)
        total = step.theta.new_zeros(())
        for t in ctx.recalled.now:
            for n in names:
                mask, own = now[self.entry("mask", t, n)].sigmoid(), now[self.entry("own", t, n)]
                total = total + self.sparsity * (mask.sum() + own.abs().sum())
        if "drift" not in ctx.flat:
            return total
        old, earlier = step.layout.split(ctx.trace["start"]), self.earlier(step.layout.names, ctx)

        def own_of(values: Params) -> Tensor:
            return torch.stack(
                [torch.cat([values[self.entry("own", t, n)].view(-1) for n in names]) for t in earlier]
            )

        base = torch.cat([(now[n] - old[f"fedweit/before:{n}"]).view(-1) for n in names])
        own = own_of(now)
        away = base * ctx.flat["mask"] + own - own_of(old)
        return total + self.sparsity * own.abs().sum() + ctx.flat["drift"] * away.square().sum()

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        """0 for m and alpha of earlier tasks, and for their A where nothing holds them to where they were."""
        held = ("mask", "alpha") if self.drift else ("mask", "alpha", "own")
        mine = [self.entry(kind, t, "") for kind in held for t in ctx.recalled.now]
        others = [f"fedweit/{kind}/" for kind in held]
        shapes = dict(zip(step.layout.names, step.layout.shapes, strict=True))
        still = [n for n in shapes if n.startswith(tuple(others)) and not n.startswith(tuple(mine))]
        return spread(step.layout, {n: step.theta.new_zeros(shapes[n]) for n in still})

    def trace_init(self, theta: Tensor) -> dict[str, Tensor]:
        """Where this task began, whichever round this is."""
        return {"start": theta.clone()}

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        return ctx.trace

    def summarise(self, learned: Learned, ctx: Context) -> Module:
        assert ctx.model is not None
        names, p, task = shared(ctx.model), learned.params, learned.task
        tensors: dict[str, Tensor] = {}
        for n in names:
            own = p[self.entry("own", task, n)]
            kept = own.abs() > self.prune
            tensors |= {
                f"mask/{n}": p[self.entry("mask", task, n)].sigmoid(),
                f"own/{n}": own[kept],
                f"kept/{n}": pack(kept),
            }
        used = self.used(p, task, ctx.recalled)
        alpha = [p[self.entry("alpha", task, "/".join(k))] for k in used]
        tensors["alpha"] = torch.stack(alpha) if alpha else p[names[0]].new_zeros(0, len(names))
        return Module(
            tensors,
            {"task": task, "from": [list(k) for k in used], "shapes": {n: list(p[n].shape) for n in names}},
        )

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Item], fresh: Sequence[Message]
    ) -> Mapping[str, Item]:
        """With a private item of its parameters as they were, under which an agent finds its own name among those that told."""
        old = before.params
        own = any(n.startswith("fedweit/") for n in old)
        mine = {n: p for n, p in old.items() if not n.startswith("fedweit/")} if own else {}
        return {**memory, "heard": Private(mine)}
