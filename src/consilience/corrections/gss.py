"""Gradient-based sample selection: a buffer of examples whose gradients point in different directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.batch import Batch, sample_losses
from consilience.core.buffer import Policy, Reservoir
from consilience.core.contexts import Context, Learned, Memory
from consilience.core.errors import ConsilienceError
from consilience.core.message import Private
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.corrections.baselines import others
from consilience.corrections.rehearsal import ER


@dataclass(frozen=True, eq=False)
class Held:
    """What is known of the buffer: what `ER` draws from, and the items of the other sources."""

    groups: Any
    items: Sequence[Private]


def directions(
    learned: Learned,
    x: Tensor,
    y: Tensor,
    task: str | None = None,
    classes: Sequence[int] = (),
    names: Sequence[str] | None = None,
) -> Tensor:
    """The unit gradients [B, n] of the samples' losses at the learned parameters, by vmap; where a task is given, over its classes.

    `names` are the entries [n numbers] to differentiate; None: all trainable ones. A gradient of zero stays zero.
    """
    names = learned.layout.names if names is None else names
    params = {n: learned.params[n].detach() for n in names}
    fixed = {n: p for n, p in learned.params.items() if n not in params}
    keep: Tensor | None = None
    if task is not None and learned.source.kind == "class":
        keep = torch.zeros(learned.model.outputs, dtype=torch.bool, device=x.device)
        keep[list(classes)] = True

    def loss(params: Params, xi: Tensor, yi: Tensor) -> Tensor:
        out = learned.model({**fixed, **params}, learned.buffers, xi[None], task, False)[0]
        return sample_losses(
            out if keep is None else out.masked_fill(~keep, -torch.inf), yi[None], learned.source.kind
        )[0]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    size = max(1, 16_000_000 // max(1, sum(p.numel() for p in params.values())))
    found = []
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        grads = each(params, xs, ys)
        found.append(F.normalize(torch.cat([grads[n].flatten(1) for n in names], 1), dim=1))
    return torch.cat(found)


@dataclass(frozen=True)
class GSS(ER):
    """Experience replay from a buffer that is filled greedily by the diversity of gradients (GSS-Greedy).

    The score of an arriving example is c = 1 + max cos(g, G_j) over the loss gradients G of `subset` random examples of the
    buffer (c = 1 where it is empty). While there is room it enters. Then, if c < 1, an example i of the buffer is chosen with
    probability C_i / sum C, and replaced with probability C_i / (C_i + c); scores stay as they were on entering.

    Examples arrive in a seeded order after training on their source, gradients being those of the model then, `arrivals` at a time: a
    batch is scored against the buffer as the batch found it, so that its examples do not see each other, and those that
    enter a full buffer take different places; `arrivals=1` is the paper's algorithm. `layers="head"` takes the gradients of
    the linear head alone. Where one learn has several sources each fills its own, and the lowest scores stay. Private.
    Aljundi et al. 2019.
    """

    subset: int = 10
    arrivals: int = 10
    layers: Literal["all", "head"] = "all"
    policy: Policy = field(init=False, default_factory=Reservoir)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("subset", "arrivals"):
            if getattr(self, name) < 1:
                raise ConsilienceError(
                    f"`{name}` of the buffer should be >= 1. Found `{name} = {getattr(self, name)}`."
                )
        if self.layers not in ("all", "head"):
            raise ConsilienceError(f"`layers` should be all or head. Found `layers = {self.layers!r}`.")

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        groups = super().recall(memory, sources)
        if groups is None:
            return None
        return Held(groups, list(others(memory, sources).values()))

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """As `ER`, from the same groups."""
        return super().sample(replace(ctx, recalled=ctx.recalled.groups), sources, generator)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """This source's examples in the buffer, and the keys of the earlier ones that they drove out (`trim` takes those away)."""
        items = [] if ctx.recalled is None else list(ctx.recalled.items)
        device, new = learned.layout.device, len(items)
        tasks = [*[i.meta["task"] for i in items], learned.task]
        classes: dict[str | None, set[int]] = {}
        for task, own in zip(
            tasks, [*[i.meta["classes"] for i in items], learned.source.classes], strict=True
        ):
            classes.setdefault(task, set()).update(own)
        owned = [{**i.tensors, "owner": torch.full((len(i.tensors["y"]),), n)} for n, i in enumerate(items)]
        held = {k: torch.cat([o[k].to(device) for o in owned]) for k in owned[0]} if owned else {}
        old = held["key"] if held else torch.zeros(0, dtype=torch.float64, device=device)
        names = self._names(learned, tasks)

        def score(x: Tensor, y: Tensor, near: Mapping[str, Tensor]) -> Tensor:
            mine = directions(learned, x, y, learned.task, sorted(classes[learned.task]), names)
            closest = mine.new_full((len(x),), -1.0)
            for task in dict.fromkeys(tasks):  # inputs go through the model by task
                there = torch.tensor([t == task for t in tasks], device=device)[near["owner"]]
                if there.any():
                    theirs = directions(
                        learned, near["x"][there], near["y"][there], task, sorted(classes[task]), names
                    )
                    closest = torch.maximum(closest, (mine @ theirs.T).amax(1))
            return (closest.double() + 1).clamp(1e-12, 2)

        for x, y, keys in self._arrive(learned, max(0, self.size - len(old))):
            count, generator = len(held["key"]) if held else 0, learned.generator
            c = torch.ones(len(x), dtype=torch.float64, device=device)
            if count:
                at = torch.randperm(count, generator=generator)[: self.subset].to(device)
                c = score(x, y, {k: held[k].index_select(0, at) for k in ("x", "y", "owner")})
            come = {
                "x": x,
                "y": y,
                "key": keys.to(device),
                "score": c,
                "owner": torch.full((len(x),), new, device=device),
            }
            if count < self.size:
                held = {k: torch.cat([held[k], t]) for k, t in come.items()} if held else come
                continue
            place = torch.multinomial(held["score"].cpu(), len(x), generator=generator).to(device)
            chance = torch.rand(len(x), generator=generator, dtype=torch.float64).to(device)
            theirs = held["score"][place]
            enter = (c < 1) & (chance < theirs / (theirs + c))
            held = {k: t.index_copy(0, place[enter], come[k][enter]) for k, t in held.items()}
        mine = held["owner"] == new
        kept = {k: held[k][mine] for k in ("x", "y", "key", "score")}
        gone = old[~torch.isin(old, held["key"])]
        meta = {"task": learned.task, "classes": list(learned.source.classes)}
        return Private(
            {**kept, "key": kept["key"].cpu(), "score": kept["score"].cpu(), "gone": gone.cpu()}, meta
        )

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Without the examples that were driven out."""
        memory = {
            s: replace(i, tensors={k: t if k in ("x", "y") else t.cpu() for k, t in i.tensors.items()})
            for s, i in memory.items()
        }
        gone = torch.cat([i.tensors["gone"] for i in memory.values() if "gone" in i.tensors])
        stay = {s: ~torch.isin(i.tensors["key"], gone) for s, i in memory.items()}
        if sum(int(k.sum()) for k in stay.values()) > self.size:
            scores = torch.cat(
                [i.tensors["score"].masked_fill(~stay[s], torch.inf) for s, i in memory.items()]
            )
            lowest = torch.zeros(len(scores), dtype=torch.bool).index_fill(
                0, scores.argsort(stable=True)[: self.size], True
            )
            stay = dict(zip(stay, lowest.split([len(k) for k in stay.values()]), strict=True))
        return {
            s: replace(i, tensors={k: t[stay[s].to(t.device)] for k, t in i.tensors.items() if k != "gone"})
            for s, i in memory.items()
        }

    def _arrive(self, learned: Learned, room: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, y, key) of the batches, in a seeded order; the buffer gets full at the end of one."""
        n = len(learned.source.train)
        keys = torch.rand(n, generator=learned.generator, dtype=torch.float64)
        order, size = torch.randperm(n, generator=learned.generator), min(self.arrivals, self.size)
        plan = [part for half in (order[:room], order[room:]) for part in half.split(size) if len(part)]
        for (x, y), index in zip(learned.source.train.batches(plan), plan, strict=True):
            yield x, y, keys[index]

    def _names(self, learned: Learned, tasks: Sequence[str | None]) -> tuple[str, ...]:
        """The entries whose gradients are compared."""
        if self.layers == "all":
            return learned.layout.names
        heads = {n for task in tasks for n in learned.model.head(learned.params, task) if n is not None}
        return tuple(n for n in learned.layout.names if n in heads)
