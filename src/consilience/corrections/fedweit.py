"""FedWeIt: each task masks shared parameters, and adds its own entries and those that others sent."""

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
from consilience.core.names import RECEIVED, escaped, unescaped
from consilience.core.optimiser import SGD
from consilience.core.params import Layout, Params
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
    """Return the trainable entries that all tasks share, in the model's order."""
    params, _ = model.init(torch.Generator().manual_seed(0))
    return tuple(
        name
        for name, p in params.items()
        if p.is_floating_point() and model.task_of(name) is None and not model.frozen(name)
    )


def slot(task: str | None) -> str:
    """Return a task's name as it stands in entries, before a colon: one name, one slot."""
    return escaped(str(task), ":")


def compose(base: Tensor, mask: Tensor, own: Tensor) -> Tensor:
    """Return B * sigma + A, one factor sigma for each unit (the first dimension).

    >>> compose(torch.ones(2, 2), torch.tensor([0.0, 1.0]), torch.ones(2, 2)).tolist()
    [[1.0, 1.0], [2.0, 2.0]]
    """
    return base * mask.reshape(mask.shape + (1,) * (base.ndim - mask.ndim)) + own


@dataclass(frozen=True, eq=False)
class Recalled:
    """What an agent has of all tasks, its own and others'."""

    sent: Mapping[Key, Item]
    """What every agent sent of its tasks, this one too."""
    agent: str | None
    """This agent's name; None before it received anything."""
    before: Mapping[str, Tensor]
    """B as this agent left it before it last received."""
    began: Mapping[str, Tensor]
    """A of its tasks when the sources of this visit began, by entry; empty where they begin now."""
    current: tuple[str, ...]
    """The tasks of this visit; none in predict."""

    def own(self, key: Key, name: str) -> Tensor:
        """Return the pruned A_j of an entry, as it was sent."""
        item = self.sent[key]
        values: Tensor = item.tensors[f"own/{name}"]
        kept = unpack(item.tensors[f"kept/{name}"], item.meta["shapes"][name])
        return torch.zeros_like(kept, dtype=values.dtype).masked_scatter(kept > 0, values)

    def others(self) -> list[Key]:
        """Return the tasks of other agents."""
        return [key for key in self.sent if self.agent is not None and key[0] != self.agent]


@dataclass(frozen=True)
class FedWeIt(Correction):
    """Federated weighted inter-client transfer: theta_t = B * sigmoid(m_t) + A_t + sum_j alpha_tj A_j.

    B are the shared parameters, m_t is a mask with one value per unit, A_t are the task's own entries, and
    A_j those of others' earlier tasks, weighed by one alpha_tj per layer. Minimised is

        loss + sparsity (|sigmoid(m_t)|_1 + sum_{i <= t} |A_i|_1)
             + drift sum_{i < t} |(B - B') * sigmoid(m_i) + A_i - A_i'|^2,

    where B' and A_i' are the values at this agent when its previous task ended: A_i of earlier tasks move on
    so that B may. All trainable entries that tasks share are composed in this way (the paper's weights, and
    here also biases, norms and a shared head). A task begins at A = B / 3 with the B received last, alpha =
    0, and m = log 2, where theta = B. m, A and alpha are personal entries `fedweit/...` (a pattern of the
    method); B is averaged, never B * sigmoid(m). After a task is trained, an agent sends its mask, A without
    entries |A| <= `prune`, and alpha; it also predicts with the pruned A (in training nothing is pruned).
    The A_j of a task are chosen when it begins.

    An agent predicts a task that it trained by its own entries, and any other by those that were sent (the
    mean if several agents trained a task of that name). So does a server, with its B; but the A_i that it
    received are as they were after task i, while at their owners they follow B. Under SGD `drift` is capped
    at 1 / (2 lr (1 + earlier tasks)), with a warning: beyond twice that it diverges. The paper trains with
    Adam at lr 3.3e-4. Yoon, Jeong, Lee, Yang & Hwang 2021.
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
        """Return the name of a personal entry of kind "mask", "own" or "alpha"."""
        return f"fedweit/{kind}/{slot(task)}:{name}"

    @staticmethod
    def alpha(task: str | None, key: Key) -> str:
        """Return the name of a task's weights alpha [entries] for what others sent under a key."""
        return FedWeIt.entry("alpha", task, "/".join(key))

    @staticmethod
    def earlier(names: Iterable[str], ctx: Context) -> list[str]:
        """Return the tasks with entries of their own among these names that are not trained in this visit."""
        assert ctx.model is not None
        # Every task has the mask of the first entry, so that its name is found there once.
        start, end = "fedweit/mask/", f":{shared(ctx.model)[0]}"
        slots = [n[len(start) : -len(end)] for n in names if n.startswith(start) and n.endswith(end)]
        now = {slot(task) for task in ctx.recalled.current}
        return [unescaped(found, ":") for found in slots if found not in now]

    @staticmethod
    def used(params: Params, task: str | None, recalled: Recalled) -> list[Key]:
        """Return the tasks of others that a task of this agent weighs: those that it has an alpha for."""
        return [key for key in recalled.others() if FedWeIt.alpha(task, key) in params]

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Recalled:
        """Return the items sent of all tasks, and those that `after_receive` kept."""
        agent, kept = next(
            ((sender, item) for (sender, source), item in memory.items() if source == RECEIVED),
            (None, Private({}, {"newest": []})),
        )
        # Where it began is kept of the newest source alone: an older one that comes again begins now.
        names, current = {s.name for s in sources}, dict.fromkeys(str(s.task) for s in sources)
        return Recalled(
            sent={key: item for key, item in sorted(memory.items()) if key[1] != RECEIVED},
            agent=agent,
            before=kept.group("before"),
            began=kept.group("began") if names <= set(kept.meta["newest"]) else {},
            current=tuple(current),
        )

    def begin(self, start: Beginning) -> Begun:
        """Add m, A and alpha of a new task, and B as it was when the previous one ended.

        Private: `<task>:<entry>`, the A_j [K, ...] that a task of this visit weighs.
        """
        recalled: Recalled = start.recalled
        names, params = shared(start.model), dict(start.params)
        private: dict[str, Tensor] = {}
        for task in recalled.current:
            if self.entry("mask", task, names[0]) not in start.params:
                params |= self._new(task, names, start)
            if used := self.used(params, task, recalled):
                private |= {
                    f"{slot(task)}:{n}": torch.stack([recalled.own(k, n).to(start.params[n]) for k in used])
                    for n in names
                }
        return Begun(params, private)

    def _new(self, task: str, names: Sequence[str], start: Beginning) -> dict[str, Tensor]:
        """Create the entries of a new task."""
        params, recalled = start.params, start.recalled
        # sigmoid(log 2) = 2/3, so that with A = B / 3 the task begins at theta = B.
        entries: dict[str, Tensor] = {}
        for name in names:
            p = params[name]
            entries[f"fedweit/before:{name}"] = recalled.before.get(name, p).to(p).clone()
            entries[self.entry("mask", task, name)] = p.new_full(p.shape[:1], 2).log()
            entries[self.entry("own", task, name)] = p / 3
        for key in recalled.others():
            entries[self.alpha(task, key)] = params[names[0]].new_zeros(len(names))
        return entries

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """Return the tensors for the drift of earlier tasks, over all shared entries in the layout's order.

        `drift`: its strength; `mask` [tasks, n]: sigmoid(m_i), which does not train; `before` [n]: B'; `own`
        [tasks, n]: A_i'.
        """
        assert ctx.layout is not None and ctx.start is not None
        earlier = self.earlier(ctx.layout.names, ctx)
        if not earlier or not self.drift:
            return {}, None

        strength, warning = self._capped(training, ctx.layout, len(earlier))
        values, names = ctx.layout.split(ctx.start), self._in_order(ctx)
        masks = [torch.cat([self._wide(values, task, name).view(-1) for name in names]) for task in earlier]

        # In a later round of a source its task has begun already, and the A_i have moved since.
        began = {name: value.to(ctx.start) for name, value in ctx.recalled.began.items()}
        return {
            "drift": ctx.start.new_tensor(strength),
            "mask": torch.stack(masks),
            "before": torch.cat([values[f"fedweit/before:{name}"].view(-1) for name in names]),
            "own": self._owns({**values, **began}, earlier, names),
        }, warning

    def _capped(self, training: Training, layout: Layout, earlier: int) -> tuple[float, str | None]:
        """Return the strength of the drift, and a warning if it is less than `drift`."""
        rates = training.factors(layout)
        lr = training.lr * (1 if rates is None else float(rates.max().clamp_min(1)))

        # Each earlier task adds to the curvature in B; other optimisers scale it away.
        most = 1 / (2 * lr * (1 + earlier))
        if not isinstance(training.inner(), SGD) or self.drift <= most:
            return self.drift, None
        return most, (
            f"a drift of {self.drift} may diverge under SGD at this lr, and is capped at {most:.3g}; "
            "the paper uses Adam"
        )

    def _wide(self, values: Params, task: str, name: str) -> Tensor:
        """Return sigmoid(m) of an entry, in the entry's shape."""
        mask, like = values[self.entry("mask", task, name)].sigmoid(), values[name]
        return compose(torch.ones_like(like), mask, like.new_zeros(()))

    def _owns(self, values: Params, tasks: Sequence[str], names: Sequence[str]) -> Tensor:
        """Return A of these tasks [tasks, n]."""
        rows = [[values[self.entry("own", task, name)].view(-1) for name in names] for task in tasks]
        return torch.stack([torch.cat(row) for row in rows])

    @staticmethod
    def _in_order(ctx: Context) -> list[str]:
        """Return the shared entries in the order of the layout: by name."""
        assert ctx.model is not None
        return sorted(shared(ctx.model))

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return theta of a task: by this agent's entries, else by those sent; B if there is neither."""
        assert ctx.model is not None
        recalled, names = ctx.recalled, shared(ctx.model)
        if self.entry("mask", task, names[0]) in params:
            return {**params, **self._own_theta(params, task, ctx)}

        views = [
            self._sent_theta(params, key, recalled, names)
            for key, item in recalled.sent.items()
            if item.meta["task"] == task
        ]
        if not views:
            return params
        return {**params, **{name: torch.stack([view[name] for view in views]).mean(0) for name in names}}

    def _own_theta(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return theta of a task by this agent's entries; A is pruned in predict alone."""
        assert ctx.model is not None
        recalled, names, training = ctx.recalled, shared(ctx.model), ctx.layout is not None
        used, theta = self.used(params, task, recalled), {}
        alpha = torch.stack([params[self.alpha(task, key)] for key in used]) if used else None
        for at, name in enumerate(names):
            own = params[self.entry("own", task, name)]
            own = own if training else own * (own.abs() > self.prune)
            value = compose(params[name], params[self.entry("mask", task, name)].sigmoid(), own)

            # `begin` unpacked the A_j for the tasks of this visit.
            if alpha is not None:
                others = ctx.private.get(f"{slot(task)}:{name}")
                if others is None:
                    others = torch.stack([recalled.own(key, name).to(value) for key in used])
                value = value + torch.tensordot(alpha[:, at], others, 1)
            theta[name] = value

        # Entries that no loss reaches do not move. The loss reads these times 0, so the penalty moves them.
        earlier = self.earlier(params, ctx) if training and self.drift else []
        if earlier:
            reached = [params[self.entry("own", t, n)].reshape(-1)[0] for t in earlier for n in names]
            theta[names[0]] = theta[names[0]] + 0 * torch.stack(reached).sum()
        return theta

    def _sent_theta(self, params: Params, key: Key, recalled: Recalled, names: Sequence[str]) -> Params:
        """Return theta of a task by the entries sent of it, over this agent's B."""
        item, theta = recalled.sent[key], {}
        for at, name in enumerate(names):
            p = params[name]
            value = compose(p, item.tensors[f"mask/{name}"].to(p), recalled.own(key, name).to(p))

            # What the sender weighed may not have reached this agent.
            for alpha, (sender, source) in zip(item.tensors["alpha"], item.meta["from"], strict=True):
                if (sender, source) in recalled.sent:
                    value = value + alpha[at].to(value) * recalled.own((sender, source), name).to(value)
            theta[name] = value
        return theta

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        """Return the sparsity of this visit's tasks, and sparsity and drift of earlier ones."""
        values, names = step.layout.split(step.theta), self._in_order(ctx)
        total = step.theta.new_zeros(())
        for task in ctx.recalled.current:
            for name in names:
                mask, own = values[self.entry("mask", task, name)], values[self.entry("own", task, name)]
                total = total + self.sparsity * (mask.sigmoid().sum() + own.abs().sum())
        if "drift" not in ctx.flat:
            return total

        base = torch.cat([values[name].view(-1) for name in names]) - ctx.flat["before"]
        own = self._owns(values, self.earlier(step.layout.names, ctx), names)
        away = base * ctx.flat["mask"] + own - ctx.flat["own"]
        return total + self.sparsity * own.abs().sum() + ctx.flat["drift"] * away.square().sum()

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        """Return 0 for m and alpha of earlier tasks, and without `drift` for their A."""
        # Without drift nothing would hold their A, and decay would move them.
        held = ("mask", "alpha") if self.drift else ("mask", "alpha", "own")
        current = tuple(self.entry(kind, task, "") for kind in held for task in ctx.recalled.current)
        every = tuple(f"fedweit/{kind}/" for kind in held)
        shapes = dict(zip(step.layout.names, step.layout.shapes, strict=True))
        frozen = [name for name in shapes if name.startswith(every) and not name.startswith(current)]
        return spread(step.layout, {name: step.theta.new_zeros(shapes[name]) for name in frozen})

    def summarise(self, learned: Learned, ctx: Context) -> Module:
        """Return the task as it is sent: the mask, the pruned A, alpha, and whose A_j that weighs."""
        assert ctx.model is not None
        names, params, task = shared(ctx.model), learned.params, learned.task
        # Only the entries that are not pruned are sent, and one bit per entry.
        tensors: dict[str, Tensor] = {}
        for name in names:
            own = params[self.entry("own", task, name)]
            kept = own.abs() > self.prune
            tensors |= {
                f"mask/{name}": params[self.entry("mask", task, name)].sigmoid(),
                f"own/{name}": own[kept],
                f"kept/{name}": pack(kept),
            }

        used = self.used(params, task, ctx.recalled)
        alpha = [params[self.alpha(task, key)] for key in used]
        tensors["alpha"] = torch.stack(alpha) if alpha else params[names[0]].new_zeros(0, len(names))
        shapes = {name: list(params[name].shape) for name in names}
        return Module(tensors, {"task": task, "from": [list(key) for key in used], "shapes": shapes})

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Item], fresh: Sequence[Message]
    ) -> Mapping[str, Item]:
        """Keep B as this agent left it, and A of its tasks as they were when its newest sources began.

        The item is private, so that whose memory it is in is this agent.
        """
        last = memory.get(RECEIVED, Private({}, {"newest": [], "visited": []}))
        newest, began = last.meta["newest"], last.group("began")

        # An agent receives between visits, so what is new began at the parameters of the last exchange.
        if new := [source for source in before.visits if source not in last.meta["visited"]]:
            newest = new
            began = {name: p for name, p in before.base.items() if name.startswith("fedweit/own/")}

        # A server has no tasks, and what it averages is nobody's B.
        has_tasks = any(name.startswith("fedweit/") for name in before.params)
        now = before.frozen.without(before.params)
        left = {n: p for n, p in now.items() if has_tasks and not n.startswith("fedweit/")}
        tensors = {f"before/{n}": p for n, p in left.items()} | {f"began/{n}": p for n, p in began.items()}
        return {**memory, RECEIVED: Private(tensors, {"newest": newest, "visited": list(before.visits)})}
