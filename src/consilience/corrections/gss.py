"""Gradient-based sample selection: a buffer of examples whose gradients point in different directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.buffer import Policy, Reservoir
from consilience.core.contexts import Context, Learned, Memory
from consilience.core.errors import ConsilienceError
from consilience.core.message import Private
from consilience.core.params import Params
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source, joined_rows
from consilience.core.tree import Input, named, unnamed
from consilience.corrections.baselines import augmented, others
from consilience.corrections.gradients import per_sample
from consilience.corrections.rehearsal import ER

CHUNK = 16_000_000
"""About how many numbers of gradients are in memory at once."""


@dataclass(frozen=True, eq=False)
class Held:
    """The buffer: the groups that `ER` draws from, and the items of the other sources."""

    groups: Any
    items: Sequence[Private]


def directions(
    learned: Learned,
    x: Input,
    y: Tensor,
    task: str | None = None,
    classes: Sequence[int] = (),
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the unit gradients [B, n] of the samples' losses at the trained parameters.

    `names` are the entries [n numbers] to differentiate; None: all trainable ones. If a task is given,
    losses are over its classes. A sample with targets at places has the mean over them. A gradient of
    zero, as of a sample without a target, stays zero.
    """
    names = learned.layout.names if names is None else names
    params = {name: learned.params[name].detach() for name in names}
    fixed = {name: p for name, p in learned.params.items() if name not in params}
    # With a task label the loss is that of training: over the columns of the task.
    keep: Tensor | None = None
    if task is not None and learned.source.kind == "class":
        keep = torch.zeros(learned.model.outputs, dtype=torch.bool, device=x.device)
        keep[list(classes)] = True

    def loss(params: Params, one_x: Input, one_y: Tensor) -> Tensor:
        out = learned.model({**fixed, **params}, learned.buffers, one_x, task, False)[0]
        if keep is not None:
            out = out.masked_fill(~keep.view(-1, *[1] * (out.dim() - 2)), -torch.inf)
        loss: Tensor = learned.target.losses(out, one_y).values[0]
        return loss

    # A gradient per sample has the size of the model, so that a whole source would not fit into memory.
    size = max(1, CHUNK // max(1, sum(p.numel() for p in params.values())))
    units = []
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        grads = per_sample(learned.model, loss, params, xs, ys)
        units.append(F.normalize(torch.cat([grads[name].flatten(1) for name in names], 1), dim=1))
    return torch.cat(units)


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores arriving examples by their gradients' cosines with those of buffered ones."""

    learned: Learned
    names: Sequence[str]
    """The entries whose gradients are compared."""
    sources: Sequence[Mapping[str, Any]]
    """"task" and "classes" of each source in the buffer; the last is the source whose examples arrive."""

    def classes(self, task: str | None) -> list[int]:
        """Return the classes of a task, over all its sources."""
        return sorted({label for of in self.sources if of["task"] == task for label in of["classes"]})

    def score(self, x: Input, y: Tensor, near: Mapping[str, Tensor]) -> Tensor:
        """Return c [B] = 1 + the largest cosine with the buffered examples `near`, in float64."""
        task = self.learned.task
        new = directions(self.learned, x, y, task, self.classes(task), self.names)
        closest = new.new_full((len(x),), -1.0)

        # Examples of one task go through the model together, since it may treat tasks differently.
        tasks = [source["task"] for source in self.sources]
        for task in dict.fromkeys(tasks):
            of_task = torch.tensor([other == task for other in tasks], device=y.device)[near["source"]]
            if of_task.any():
                old_x, old_y = unnamed("x", near)[of_task], near["y"][of_task]
                old = directions(self.learned, old_x, old_y, task, self.classes(task), self.names)
                closest = torch.maximum(closest, (new @ old.T).amax(1))
        return (closest.double() + 1).clamp(1e-12, 2)


@dataclass(frozen=True)
class GSS(ER):
    """Experience replay from a buffer that is filled greedily by the diversity of gradients (GSS-Greedy).

    The score of an arriving example is c = 1 + max cos(g, G_j) over the loss gradients G of `subset` random
    examples of the buffer (c = 1 if it is empty). While there is room it enters. Then, if c < 1, an example
    i of the buffer is chosen with probability C_i / sum C, and replaced with probability C_i / (C_i + c);
    scores stay as they were on entering.

    Examples arrive in a seeded order after training on their source, with the gradients of the model at that
    time, `arrivals` at a time: a batch is scored against the buffer before the batch, so its examples do not
    affect one another, and those that enter a full buffer take different places; `arrivals=1` is the paper's
    algorithm. `layers="head"` takes the gradients of the linear head alone. If a visit has several sources,
    each fills its own buffer, and the lowest scores stay. Private. Aljundi et al. 2019.
    """

    takes_mixed: ClassVar[bool] = False
    instead: ClassVar[str] = "use er"

    subset: int = 10
    arrivals: int = 10
    layers: Literal["all", "head"] = "all"
    policy: Policy = field(init=False, default_factory=Reservoir)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("subset", "arrivals"):
            if getattr(self, name) < 1:
                raise ConsilienceError(f"`{name}` of the buffer must be >= 1, got {getattr(self, name)}.")
        if self.layers not in ("all", "head"):
            raise ConsilienceError(f"`layers` must be 'all' or 'head', got {self.layers!r}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if len(facts.inputs) > 1:
            return "its buffer compares inputs of one shape, and here they differ; use er"
        return super().refuse(facts)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        """Return the groups of `ER` with the items that they came from, or None."""
        groups = super().recall(memory, sources)
        return None if groups is None else Held(groups, list(others(memory, sources).values()))

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Draw as `ER` does, from the same groups."""
        return super().sample(replace(ctx, recalled=ctx.recalled.groups), sources, generator)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """Return this source's examples in the buffer, and the keys of those they replaced (for `trim`)."""
        items = [] if ctx.recalled is None else list(ctx.recalled.items)
        device, of = learned.layout.device, learned.source
        meta = {"task": learned.task, "classes": list(of.classes), "target": of.target, **augmented(of)}
        sources = [*[item.meta for item in items], meta]
        scorer = Scorer(learned, self._names(learned, [source["task"] for source in sources]), sources)

        # The buffer is one table; "source" [n] is the number of the item that an example is from.
        numbered = [
            {**item.tensors, "source": torch.full((len(item.tensors["y"]),), number)}
            for number, item in enumerate(items)
        ]
        on_device = [{k: t.to(device) for k, t in item.items()} for item in numbered]
        held = joined_rows(on_device) if items else {}
        old = held["key"] if held else torch.zeros(0, dtype=torch.float64, device=device)
        for x, y, keys in self._arrive(learned, max(0, self.size - len(old))):
            source = torch.full((len(x),), len(items), device=device)
            arrived = {**named("x", x), "y": y, "key": keys.to(device), "source": source}
            held = self._take(held, arrived, scorer)

        # Keys and scores stay on the CPU, where `trim` compares them between sources.
        own = held["source"] == len(items)
        tensors = {k: t[own] for k, t in held.items() if k != "source"}
        gone = old[~torch.isin(old, held["key"])]
        tensors |= {"key": tensors["key"].cpu(), "score": tensors["score"].cpu(), "gone": gone.cpu()}
        return Private(tensors, meta)

    def _take(self, held: dict[str, Tensor], arrived: dict[str, Tensor], scorer: Scorer) -> dict[str, Tensor]:
        """Return the buffer after a batch arrived."""
        x, device, generator = unnamed("x", arrived), arrived["y"].device, scorer.learned.generator
        count = len(held["key"]) if held else 0
        score = torch.ones(len(x), dtype=torch.float64, device=device)
        if count:
            some = torch.randperm(count, generator=generator)[: self.subset].to(device)
            near = {k: t.index_select(0, some) for k, t in held.items() if k not in ("key", "score")}
            score = scorer.score(x, arrived["y"], near)

        arrived = {**arrived, "score": score}
        if count < self.size:
            return joined_rows([held, arrived]) if held else arrived

        # Drawn without replacement, so that no two of the batch take one place.
        place = torch.multinomial(held["score"].cpu(), len(x), generator=generator).to(device)
        chance = torch.rand(len(x), generator=generator, dtype=torch.float64).to(device)
        theirs = held["score"][place]
        enter = (score < 1) & (chance < theirs / (theirs + score))
        # Joined first, so that ragged inputs have one length.
        both = joined_rows([held, arrived])
        return {k: t[:count].index_copy(0, place[enter], t[count:][enter]) for k, t in both.items()}

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Drop replaced examples, and keep the lowest scores if the memory is still too large."""
        numbers = ("key", "score", "gone")
        memory = {
            source: replace(
                item,
                tensors={k: t.cpu() if k in numbers else t for k, t in item.tensors.items()},
            )
            for source, item in memory.items()
        }
        gone = torch.cat([item.tensors["gone"] for item in memory.values() if "gone" in item.tensors])
        stay = {source: ~torch.isin(item.tensors["key"], gone) for source, item in memory.items()}

        # Several sources of one visit did not know of each other's examples.
        if sum(int(kept.sum()) for kept in stay.values()) > self.size:
            scores = torch.cat(
                [item.tensors["score"].masked_fill(~stay[s], torch.inf) for s, item in memory.items()]
            )
            order = scores.argsort(stable=True)[: self.size]
            lowest = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, order, True)
            sizes = [len(kept) for kept in stay.values()]
            stay = dict(zip(stay, lowest.split(sizes), strict=True))

        trimmed = {}
        for source, item in memory.items():
            tensors = {k: t[stay[source].to(t.device)] for k, t in item.tensors.items() if k != "gone"}
            trimmed[source] = replace(item, tensors=tensors)
        return trimmed

    def _arrive(self, learned: Learned, room: int) -> Iterator[tuple[Input, Tensor, Tensor]]:
        """Yield (x, y, key) of the batches, in a seeded order; the buffer becomes full at the end of one."""
        # The first batches fill the buffer exactly, because a batch either finds room or replaces others.
        total = len(learned.source.train)
        keys = torch.rand(total, generator=learned.generator, dtype=torch.float64)
        order, size = torch.randperm(total, generator=learned.generator), min(self.arrivals, self.size)
        plan = [part for half in (order[:room], order[room:]) for part in half.split(size) if len(part)]
        for (x, y), index in zip(learned.source.train.batches(plan), plan, strict=True):
            yield x, y, keys[index]

    def _names(self, learned: Learned, tasks: Sequence[str | None]) -> tuple[str, ...]:
        """Return the entries whose gradients are compared."""
        if self.layers == "all":
            return learned.layout.names
        heads = {n for task in tasks for n in learned.model.head(learned.params, task) if n is not None}
        return tuple(name for name in learned.layout.names if name in heads)
