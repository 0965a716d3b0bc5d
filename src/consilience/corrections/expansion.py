"""Expansion: networks that grow with their tasks. DEN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from consilience.core.batch import mean_loss
from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Private
from consilience.core.model import Model
from consilience.core.params import Layout, Params
from consilience.core.source import Source
from consilience.corrections.anatomy import anatomy, not_alone, spread, without_tasks
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

HEAD, RETRAIN, EXPAND, DRIFT, SETTLE, PHASES = range(6)


@dataclass(frozen=True)
class Chain:
    """Linear layers one after another: hidden ones and the head, with what stages (sources, in order) added to them.

    A stage has `den/<stage>/into/<layer>` [units, inputs up to it], `den/<stage>/from/<layer>` [units before it, units] (edges
    of its units to older ones of the next layer), `den/<stage>/bias/<layer>`; and a head of its own, as `into` and `bias`.
    A whole layer is [[W, from_1, ..], [into_1, ..], ..]: what a stage saw is the leading block of what a later one sees.
    """

    layers: tuple[str, ...]
    biases: Mapping[str, str]
    head: str
    widths: Mapping[str, int]

    @staticmethod
    def of(model: Model) -> Chain:
        a = anatomy(model)
        assert a.head is not None
        biases = {**a.biases, **({a.head[0]: a.head[1]} if a.head[1] else {})}
        return Chain(a.layers, biases, a.head[0], {n: a.shapes[n][0] for n in (*a.layers, a.head[0])})

    def whole(
        self, p: Mapping[str, Tensor], layer: str, stages: Sequence[str]
    ) -> tuple[Tensor, Tensor | None]:
        """The weight [all units, all inputs] and the bias of a hidden layer with these stages; of the head: the last stage's."""
        at = self.biases.get(layer)
        if layer == self.head:
            own = f"den/{stages[-1]}" if stages else ""
            names = (f"{own}/into/{layer}", f"{own}/bias/{layer}") if stages else (layer, str(at))
            return p[names[0]], p[names[1]] if at else None
        w, b = p[layer], p[at] if at else None
        for s in stages:
            if f"den/{s}/into/{layer}" in p:
                w = torch.cat([w, p[f"den/{s}/from/{layer}"]], 1) if layer != self.layers[0] else w
                w = torch.cat([w, p[f"den/{s}/into/{layer}"]], 0)
                b = torch.cat([b, p[f"den/{s}/bias/{layer}"]]) if b is not None else None
        return w, b

    def apart(self, w: Tensor, b: Tensor, layer: str, stages: Sequence[str], units: int) -> dict[str, Tensor]:
        """The entries of a whole layer: what undoes `whole`."""
        found = {}
        if layer == self.head:
            own = f"den/{stages[-1]}" if stages else ""
            found[f"{own}/into/{layer}" if stages else layer] = w
            if layer in self.biases:
                found[f"{own}/bias/{layer}" if stages else self.biases[layer]] = b
            return found
        for s in reversed(stages if units else ()):
            found[f"den/{s}/into/{layer}"], w = w[-units:], w[:-units]
            if layer != self.layers[0]:
                found[f"den/{s}/from/{layer}"], w = w[:, -units:], w[:, :-units]
            if layer in self.biases:
                found[f"den/{s}/bias/{layer}"], b = b[-units:], b[:-units]
        found[layer] = w
        if layer in self.biases:
            found[self.biases[layer]] = b
        return found


def entry(layout: Layout, flat: Tensor, name: str) -> Tensor:
    """One entry of a flat vector [n], in its shape."""
    return flat[layout.span(name)].view(layout.shapes[layout.names.index(name)])


def unchained(model: Model) -> str | None:
    """Why units cannot be added to the trainable layers of a model, or None."""
    a = anatomy(model)
    if a.head is None:
        return "it gives each task a head of its own over units that it adds, and the model has no shared one (multi_head has none); use mlp"
    if a.others:
        return f"units are added to linear layers, and norms such as {a.others[0]!r} count theirs; use a model without norms, such as mlp"
    if a.order[len(a.order) - len(a.layers) :] != a.layers:
        return "units are added to layers up to the head, and here a frozen layer stands between them; freeze the first ones alone"
    for i, n in enumerate((*a.layers, a.head[0])):
        shape = a.shapes[n]
        if len(shape) != 2 or (i and shape[1] != a.shapes[a.layers[i - 1]][0]):
            return f"units are added to linear layers in a chain. Found {n!r} of shape {shape}; use mlp, or freeze what is before the linear layers"
    return None


def stiff(model: Model, x: Tensor) -> str | None:
    """Why a model cannot be run with one more unit in each layer, or gives other outputs then, though nothing leads away from it; or None."""
    chain = Chain.of(model)
    params, buffers = model.init(torch.Generator().manual_seed(0))
    wide, of = dict(params), params[chain.head].dtype
    for i, n in enumerate((*chain.layers, chain.head)):
        w = torch.cat([params[n], params[n].new_zeros(len(params[n]), 1)], 1) if i else params[n]
        wide[n] = torch.cat([w, w[:1]]) if n != chain.head else w
        if n in chain.biases and n != chain.head:
            b = params[chain.biases[n]]
            wide[chain.biases[n]] = torch.cat([b, b[:1]])
    x = x.to(of) if x.is_floating_point() else x
    with torch.no_grad():
        out = model(params, buffers, x, None, False)[0]
        try:
            if torch.allclose(model(wide, buffers, x, None, False)[0], out, rtol=1e-3, atol=1e-4):
                return None
            return "its outputs change with a unit that leads nowhere"
        except (RuntimeError, ValueError, IndexError) as e:
            return str(e).splitlines()[0]


@dataclass(frozen=True, eq=False)
class Grown:
    """What DEN knows: the stages (sources learned, in order), the stage of each task, which units of a stage are alive and which
    were split in it (mask, old rows, old biases), by layer; what was pruned last, by entry; the (task, source) of this learn."""

    stages: tuple[str, ...]
    tasks: Mapping[str, int]
    live: Mapping[str, Mapping[str, Tensor]]
    splits: tuple[Mapping[str, tuple[Tensor, Tensor, Tensor]], ...]
    keep: Mapping[str, Tensor]
    now: tuple[str, str] | None


@dataclass(frozen=True)
class DEN(Correction):
    """Dynamically expandable network: a task retrains what it needs, adds units where that does not do, and splits what drifts.

    The first learn trains all with l1. Any other has a head of its own and five phases of equal length in steps:
    head: min L + l1 |W_t|, the rest frozen; its weights within `eps` of 0 are 0 from then on. S are the units that non-zero
    weights lead to from it, layer by layer. retrain: W_S alone, min L + l2/2 |W_S|^2. expand: where the mean loss of the
    last epoch of retraining is above `threshold`, `units` units in each hidden layer and all edges to and from them, alone:
    min L + l1 |W_N| + `group` sum_i |w_i|; units with |w_i| <= eps are dropped, weights within eps are 0. Elsewhere retraining
    goes on. drift: W_S and what was added, min L + anchor/2 |W_S - W_old|^2. Then units of S with |w_i - w_i,old| > `drift`
    (incoming weights and bias) are split: earlier tasks keep the old row, kept privately; this and later ones have the new one
    alone (the authors' network has both, and they train all of W in drift, not W_S).
    settle: copies, added units and the head train on; other old units stand still.

    Task t uses what was there at its stage and rows split later as they were before, so that nothing added changes an old
    task, and each later task moves each of its units by at most `drift` (0: old answers stay, to the bit; infinite: no split).
    l1 and `group` are smooth within eps (w^2 / 2 eps), so that weights settle there: gradients, no proximal steps. `units`, `l2`,
    `anchor`, `threshold` and `drift` are those of the authors' code, whose l1 and group (1e-5, 1e-3) are thresholds of each step.
    Linear layers in a chain, after any frozen part. Private. Yoon, Yang, Lee & Hwang 2018.
    """

    units: int = 10
    threshold: float = 0.01
    drift: float = 0.05
    l1: float = 0.001
    l2: float = 0.0001
    group: float = 0.01
    anchor: float = 0.5
    eps: float = 0.001

    shared_items: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative("DEN", l1=self.l1, l2=self.l2, group=self.group, anchor=self.anchor)
        if isinstance(self.units, bool) or not isinstance(self.units, int) or self.units < 0:
            raise ConsilienceError(f"`units` should be a whole number >= 0. Found `units = {self.units!r}`.")
        for name in ("threshold", "drift"):
            if not getattr(self, name) >= 0:
                raise ConsilienceError(
                    f"`{name}` should be >= 0 (infinite: never). Found `{name} = {getattr(self, name)}`."
                )
        if not 0 < self.eps < float("inf"):
            raise ConsilienceError(f"`eps` should be positive and finite. Found `eps = {self.eps}`.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        why = without_tasks(facts) or not_alone(facts)
        if why is None and facts.revisited:
            why = (
                "a source is one stage of growth, and here one comes again; use hat, or give each source once"
            )
        return why or (unchained(facts.model) if facts.model is not None else None)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Grown:
        found = sorted(memory.items(), key=lambda kv: kv[1].meta["order"])
        tasks = {item.meta["task"]: i for i, (_, item) in enumerate(found)}
        splits = []
        for _, item in found:
            old, bias = item.group("old"), item.group("old bias")
            splits.append({n: (m, old[n], bias[n]) for n, m in item.group("split").items()})
        live = {source: item.group("live") for (_, source), item in found}
        keep = found[-1][1].group("keep") if found else {}
        now = (str(sources[0].task), sources[0].name) if sources else None
        return Grown(tuple(s for (_, s), _ in found), tasks, live, tuple(splits), keep, now)

    def begin(self, start: Beginning) -> Begun:
        """What was pruned at 0; a stage's entries, incoming edges uniform in +-1 / sqrt(inputs) and outgoing ones 0, its head that
        of the model. Private: the rows of its own outputs, by entry of the head."""
        model, params, sources, known, generator = (
            start.model,
            start.params,
            start.sources,
            start.recalled,
            start.generator,
        )
        chain, new, s = Chain.of(model), dict(params), sources[0]
        if not known.stages and (
            why := stiff(model, next(s.train.batches([torch.arange(min(2, len(s.train)))]))[0])
        ):
            raise Refusal(f"DEN widens the layers of a model, and this one cannot: {why}; use mlp.")
        for n, k in known.keep.items():
            new[n] = params[n] * k.to(params[n])
        rows = torch.zeros(chain.widths[chain.head])
        rows[list(s.classes) or slice(None)] = 1
        if known.stages:
            before, like = self.units * (len(known.stages) - 1), new[chain.head]
            for i, n in enumerate(chain.layers if self.units else ()):
                inputs = params[n].shape[1] + (before + self.units if i else 0)
                draw = 2 * torch.rand(self.units, inputs + 1, generator=generator) - 1
                new[f"den/{s.name}/into/{n}"] = (draw[:, 1:] * inputs**-0.5).to(like)
                if n in chain.biases:
                    new[f"den/{s.name}/bias/{n}"] = (draw[:, 0] * inputs**-0.5).to(like)
                if i:
                    new[f"den/{s.name}/from/{n}"] = like.new_zeros(chain.widths[n] + before, self.units)
            new[f"den/{s.name}/into/{chain.head}"] = torch.cat(
                [like, like.new_zeros(len(like), before + self.units)], 1
            )
            if chain.head in chain.biases:
                new[f"den/{s.name}/bias/{chain.head}"] = params[chain.biases[chain.head]].clone()
        return Begun(new, {"rows": rows.to(params[chain.head])})

    # what a task sees

    @staticmethod
    def _stages(known: Grown, at: int | None = None) -> tuple[str, ...]:
        """The stages with entries of their own up to a task's, or to this learn's."""
        return (*known.stages, *(known.now[1:] if known.now else ()))[1 : None if at is None else at + 1]

    def _live(self, chain: Chain, layer: str | None, ctx: Context, stages: Sequence[str]) -> Tensor | None:
        """1 for the units of a layer that are there [all units]; None before the first layer: its inputs are always there."""
        if layer is None:
            return None
        assert ctx.model is not None
        known: Grown = ctx.recalled
        found = [torch.ones(chain.widths[layer], device=ctx.layout.device if ctx.layout else None)]
        for s in stages if self.units else ():
            if known.now and s == known.now[1]:
                assert ctx.layout is not None
                alive = entry(ctx.layout, ctx.trace["mark"], f"den/{s}/into/{layer}")[:, 0] > 0
            else:
                alive = known.live[s][layer]
            found.append(alive.to(found[0]))
        return torch.cat(found)

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """The layers of the task's stage: dropped units left out, rows that were split later as they were."""
        assert ctx.model is not None
        known: Grown = ctx.recalled
        mine = known.now is not None and task == known.now[0]
        if not mine and task not in known.tasks:
            return params
        at = len(known.stages) if mine else known.tasks[str(task)]
        chain, stages = Chain.of(ctx.model), self._stages(known, at)
        keep: Mapping[str, Tensor] = known.keep
        if known.now:
            assert ctx.layout is not None
            own = f"den/{known.now[1]}/"
            may = (
                [n for n in params if n.startswith(own) and self._edges(n)] if known.stages else chain.widths
            )
            keep = {n: entry(ctx.layout, ctx.trace["keep"], n) for n in may}
        p = {**params, **{n: params[n] * k.to(params[n]) for n, k in keep.items()}}
        before: Tensor | None = None
        new = dict(p)
        for layer in (*chain.layers, chain.head):
            w, b = chain.whole(p, layer, stages)
            for splits in reversed(known.splits[at + 1 :]):
                if layer in splits:
                    split, rows, biases = (t.to(w.device) for t in splits[layer])
                    index = split[: len(w)].nonzero()[:, 0]
                    w = w.index_copy(0, index, rows[: len(index), : w.shape[1]].to(w))
                    b = b.index_copy(0, index, biases[: len(index)].to(w)) if b is not None else None
            here = self._live(chain, layer, ctx, stages) if layer != chain.head else None
            if stages and self.units:
                w = w if before is None else w.index_select(1, before.to(w.device).nonzero()[:, 0])
                if here is not None:
                    index = here.to(w.device).nonzero()[:, 0]
                    w, b = w.index_select(0, index), b.index_select(0, index) if b is not None else None
            before, new[layer] = here, w
            if b is not None:
                new[chain.biases[layer]] = b
        return new

    # the phases

    @staticmethod
    def phase(clock: tuple[int, int], horizon: tuple[int, int], after: int = 0) -> int:
        """The phase of a step: 5 i // n for the i-th of n; with `after` = 1 that of the next one."""
        return (
            PHASES * (clock[0] * horizon[1] + clock[1] + after) // (horizon[0] * horizon[1])
            if horizon[0] * horizon[1]
            else 0
        )

    def _marks(
        self, chain: Chain, layer: str | None, mark: Params, ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(reached, split, new, live) [all units] of a layer, 0 or 1; the inputs before the first layer are reached and live."""
        stages, layout = self._stages(ctx.recalled), ctx.layout
        assert layout is not None
        if layer is None:
            ones = torch.ones(mark[chain.layers[0]].shape[1], dtype=layout.dtype, device=layout.device)
            return ones, ones * 0, ones * 0, ones
        m = chain.whole(mark, layer, stages)[0][:, 0]
        own = torch.zeros_like(m)
        if self.units and stages:
            own[-self.units :] = 1
        live = self._live(chain, layer, ctx, stages[:-1])
        assert live is not None
        live = torch.cat([live.to(m), m[len(live) :].clamp_max(1)])
        return m.clamp_max(1) * (1 - own), (m - 1).clamp_min(0) * (1 - own), m * own, live

    def _trained(self, phase: int, ctx: Context) -> Tensor:
        """1 for the entries [n] that train in a phase after the first."""
        layout, known, trace = ctx.layout, ctx.recalled, ctx.trace
        assert layout is not None and ctx.model is not None
        chain, stages, mark = Chain.of(ctx.model), self._stages(known), layout.split(trace["mark"])
        rows = ctx.private["rows"].to(layout.device, layout.dtype)
        found = {n: torch.zeros_like(m) for n, m in mark.items() if self._mine(n, chain)}
        before: str | None = None
        for layer in (*chain.layers, chain.head):
            r, _, n, a = self._marks(chain, before, mark, ctx)
            if layer == chain.head:
                new, old, added = rows * 0, rows, rows
            else:
                reached, split, new, _ = self._marks(chain, layer, mark, ctx)
                old, added = split if phase == SETTLE else reached, reached
            if phase == EXPAND:
                old = old * (1 - self._expands(trace))
            w = torch.outer(old, r) + torch.outer(new, a) + torch.outer(added, n)
            found |= chain.apart(w, old + new, layer, stages, self.units)
            before = layer
        trained: Tensor = spread(layout, found) * trace["keep"]
        return trained

    def _expands(self, trace: Mapping[str, Tensor]) -> Tensor:
        """1 where the loss after retraining is above the threshold."""
        total, count = trace["loss"]
        above: Tensor = (total / count.clamp_min(1) > self.threshold).to(total) * float(self.units > 0)
        return above

    def _head(self, ctx: Context) -> Tensor:
        """1 for the entries [n] that train in the first phase: all but other outputs' rows in the first learn, else a stage's own head."""
        assert ctx.model is not None and ctx.layout is not None
        chain, stages, layout = Chain.of(ctx.model), self._stages(ctx.recalled), ctx.layout
        rows = ctx.private["rows"].to(layout.device, layout.dtype)
        if not stages:
            inputs = rows.new_ones(dict(zip(layout.names, layout.shapes, strict=True))[chain.head][1])
            return spread(layout, chain.apart(torch.outer(rows, inputs), rows, chain.head, (), 0))
        live = self._live(chain, chain.layers[-1], ctx, stages[:-1])
        assert live is not None
        live = torch.cat([live.to(rows), rows.new_zeros(self.units)])
        found = {
            n: rows.new_zeros(s)
            for n, s in zip(layout.names, layout.shapes, strict=True)
            if self._mine(n, chain)
        }
        return spread(layout, found | chain.apart(torch.outer(rows, live), rows, chain.head, stages, 0))

    @staticmethod
    def _mine(name: str, chain: Chain) -> bool:
        return name.startswith("den/") or name in chain.widths or name in chain.biases.values()

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        first = not ctx.recalled.stages or self.phase(step.clock, step.horizon) == HEAD
        return self._head(ctx) if first else ctx.trace["train"]

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        assert ctx.model is not None
        phase, known, chain = self.phase(step.clock, step.horizon), ctx.recalled, Chain.of(ctx.model)
        factor = step.layout.split(self.mask(step, ctx))
        own = f"den/{known.now[1]}/"
        if phase >= DRIFT and known.stages:
            moved = (step.theta - step.start).square()
            old = {n: m * factor[n] for n, m in step.layout.split(moved).items() if self._mine(n, chain)}
            return (
                self.anchor
                / 2
                * sum(
                    (m.sum() for n, m in old.items() if not n.startswith(own)), start=step.theta.new_zeros(())
                )
            )
        w = {
            n: t * factor[n]
            for n, t in step.layout.split(step.theta).items()
            if n in chain.widths or self._edges(n)
        }
        absolute = self.l1 * sum((self._smooth(t).sum() for t in w.values()), start=step.theta.new_zeros(()))
        if phase == HEAD or not known.stages:
            return absolute
        square = self.l2 / 2 * sum((t.square().sum() for t in w.values()), start=step.theta.new_zeros(()))
        if phase == RETRAIN:
            return square
        grouped = [w[f"{own}into/{n}"] for n in chain.layers if f"{own}into/{n}" in w]
        norms = sum((self._smooth(self._norm(t)).sum() for t in grouped), start=step.theta.new_zeros(()))
        return torch.where(self._expands(ctx.trace) > 0, absolute + self.group * norms, square)

    @staticmethod
    def _edges(name: str) -> bool:
        return name.startswith("den/") and ("/into/" in name or "/from/" in name)

    def _smooth(self, x: Tensor) -> Tensor:
        """|x|, but a parabola within eps of 0."""
        return torch.where(x.abs() < self.eps, x.square() / (2 * self.eps) + self.eps / 2, x.abs())

    @staticmethod
    def _norm(w: Tensor) -> Tensor:
        """The norms of the rows; the gradient at 0 is 0."""
        square = w.square().sum(1)
        return torch.where(square > 0, square, 1).sqrt() * (square > 0)

    def trace_init(self, theta: Tensor) -> dict[str, Tensor]:
        """`train` and `keep` [n]: what trains, what is not pruned; `mark` [n]: rows of units, 1 reached or alive, 2 split; `loss`: sum, count."""
        ones, zeros = torch.ones_like(theta), torch.zeros_like(theta)
        return {"train": ones, "keep": ones.clone(), "mark": zeros, "loss": theta.new_zeros(2)}

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        now, then = self.phase(step.clock, step.horizon), self.phase(step.clock, step.horizon, 1)
        trace = dict(ctx.trace)
        if (
            ctx.recalled.stages
            and now == RETRAIN
            and self.phase(step.clock, step.horizon, step.horizon[1]) > now
        ):
            part, out = step.parts[0], step.outputs[0].detach()
            loss = mean_loss(out, part, "value" if part.y.is_floating_point() else "class")
            trace["loss"] = trace["loss"] + torch.stack([loss, torch.ones_like(loss)])
        for phase in range(now, then):
            trace = self._close(phase, step.theta + delta, step.start, trace, ctx)
        return trace

    def _close(
        self, phase: int, theta: Tensor, start: Tensor, trace: dict[str, Tensor], ctx: Context
    ) -> dict[str, Tensor]:
        """What the end of a phase decides."""
        layout, known = ctx.layout, ctx.recalled
        assert layout is not None and ctx.model is not None
        chain, stages, values = Chain.of(ctx.model), self._stages(known), layout.split(theta)
        keep, mark = layout.split(trace["keep"].clone()), layout.split(trace["mark"].clone())
        if not known.stages:
            if phase == SETTLE:
                for n in (*chain.layers, chain.head):
                    of = ctx.private["rows"].to(theta)[:, None] if n == chain.head else 1
                    keep[n].mul_(1 - of * (values[n].abs() <= self.eps).to(theta))
            return {**trace, "keep": layout.flatten(keep)}
        own = f"den/{known.now[1]}/"
        if phase == HEAD:
            name = f"{own}into/{chain.head}"
            trained = layout.split(self._head(ctx))[name]
            keep[name].mul_(1 - trained * (values[name].abs() <= self.eps).to(theta))
            above = (values[name] * keep[name] * trained != 0).any(0).to(theta)
            for layer in reversed(chain.layers):
                w, _ = chain.whole(values, layer, stages)
                live = self._live(chain, layer, ctx, stages[:-1])
                assert live is not None
                above = above[: len(live)] * live.to(theta)
                full = torch.cat([above, above.new_zeros(len(w) - len(live))])
                for n, m in chain.apart(
                    full[:, None].expand(w.shape), full, layer, stages, self.units
                ).items():
                    mark[n].copy_(m)
                above = ((w != 0) * full[:, None]).any(0).to(theta)
        if phase == RETRAIN and self.units:
            for layer in chain.layers:
                mark[f"{own}into/{layer}"].fill_(1).mul_(self._expands(trace))
        if phase == EXPAND and self.units:
            train = layout.split(trace["train"])
            for layer in chain.layers:
                name = f"{own}into/{layer}"
                mark[name].mul_(((values[name] * train[name]).norm(dim=1) > self.eps).to(theta)[:, None])
            for n, k in keep.items():
                if n.startswith(own) and self._edges(n):
                    k.mul_(1 - self._expands(trace) * train[n] * (values[n].abs() <= self.eps).to(theta))
        if phase == DRIFT:
            began = layout.split(start)
            for layer in chain.layers:
                w, b = chain.whole(values, layer, stages[:-1])
                v, c = chain.whole(began, layer, stages[:-1])
                moved = (w - v).square().sum(1)
                if b is not None and c is not None:
                    moved = moved + (b - c).square()
                split = (moved.sqrt() > self.drift).to(theta)
                for n, m in chain.apart(
                    split[:, None].expand(w.shape), split, layer, stages[:-1], self.units
                ).items():
                    mark[n].add_(m * (mark[n] > 0))
        trace = {**trace, "keep": layout.flatten(keep), "mark": layout.flatten(mark)}
        return (
            {**trace, "train": self._trained(phase + 1, replace(ctx, trace=trace))}
            if phase < SETTLE
            else trace
        )

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        assert ctx.model is not None
        chain, stages, known = Chain.of(ctx.model), self._stages(ctx.recalled), ctx.recalled
        mark, keep = learned.layout.split(ctx.trace["mark"]), learned.layout.split(ctx.trace["keep"])
        found = {f"keep/{n}": k > 0 for n, k in keep.items() if not bool((k > 0).all())}
        for layer in chain.layers if known.stages else ():
            if self.units:
                found[f"live/{layer}"] = mark[f"den/{known.now[1]}/into/{layer}"][:, 0] > 0
            split = chain.whole(mark, layer, stages[:-1])[0][:, 0] > 1
            if bool(split.any()):
                w, b = chain.whole(learned.start, layer, stages[:-1])
                found |= {
                    f"split/{layer}": split,
                    f"old/{layer}": w[split],
                    f"old bias/{layer}": (w[:, 0] if b is None else b)[split],
                }
        return Private(found, {"task": str(learned.task), "order": learned.order})
