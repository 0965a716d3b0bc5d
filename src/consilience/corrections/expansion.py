"""Expansion: networks that grow with their tasks. DEN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Private
from consilience.core.model import Model
from consilience.core.names import owned_by
from consilience.core.params import Layout, Params
from consilience.core.source import Source
from consilience.core.tree import cast_to, one_tensor
from consilience.corrections.anatomy import anatomy, not_alone, spread, without_tasks
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

HEAD, RETRAIN, EXPAND, DRIFT, TUNE, PHASES = range(6)
"""The phases of DEN in their order, and how many there are."""


class Dense(NamedTuple):
    """A linear layer: its weight [units, inputs], and its bias [units] if it has one."""

    weight: Tensor
    bias: Tensor | None

    def select(self, units: Tensor | None, inputs: Tensor | None) -> Dense:
        """Keep the units and inputs where these are not 0; None keeps all."""
        weight, bias = self
        if inputs is not None:
            weight = weight.index_select(1, inputs.to(weight.device).nonzero()[:, 0])
        if units is not None:
            index = units.to(weight.device).nonzero()[:, 0]
            weight = weight.index_select(0, index)
            bias = bias.index_select(0, index) if bias is not None else None
        return Dense(weight, bias)


# A dataclass, so that verbs read it by name on every engine.
@dataclass(frozen=True, eq=False)
class Split:
    """The units of a layer that a stage split (mask [units]), with their old rows and old biases."""

    units: Tensor
    rows: Tensor
    biases: Tensor

    def restore(self, layer: Dense) -> Dense:
        """Give the split units their old rows. An earlier stage sees only the leading units and inputs."""
        weight, bias = layer
        units, rows, biases = (t.to(weight.device) for t in (self.units, self.rows, self.biases))
        index = units[: len(weight)].nonzero()[:, 0]
        weight = weight.index_copy(0, index, rows[: len(index), : weight.shape[1]].to(weight))
        if bias is not None:
            bias = bias.index_copy(0, index, biases[: len(index)].to(weight))
        return Dense(weight, bias)


def added(stage: str, kind: str, layer: str) -> str:
    """Return the name of an entry that a stage added to a layer; `kind` is "into", "from" or "bias"."""
    return f"den/{stage}/{kind}/{layer}"


def is_edge(name: str) -> bool:
    """Whether an entry holds weights that a stage added."""
    return name.startswith("den/") and name.rsplit("/", 2)[1] in ("into", "from")


@dataclass(frozen=True)
class Chain:
    """Linear layers one after another, hidden ones and the head, with the units that stages added to them.

    A stage is a source, in the order of training. It adds `den/<stage>/into/<layer>` [units, inputs so far],
    `den/<stage>/from/<layer>` [units so far, units] (edges from its units of the layer below to older
    units), and `den/<stage>/bias/<layer>`; and a head of its own, as `into` and `bias`. The layer as a whole
    is [[W, from_1, ..], [into_1, ..], ..], so the layer of a stage is the leading block of later ones.
    """

    layers: tuple[str, ...]
    biases: Mapping[str, str]
    head: str
    widths: Mapping[str, int]

    @staticmethod
    def of(model: Model) -> Chain:
        """Return the chain of a model that passes `unchained`."""
        parts = anatomy(model)
        assert parts.head is not None
        head, head_bias = parts.head
        biases = {**parts.biases, **({head: head_bias} if head_bias else {})}
        return Chain(parts.layers, biases, head, {n: parts.shapes[n][0] for n in (*parts.layers, head)})

    def has(self, name: str) -> bool:
        """Whether an entry of a model with stages belongs to the chain."""
        return name.startswith("den/") or name in self.widths or name in self.biases.values()

    def head_entries(self, stages: Sequence[str]) -> tuple[str, str | None]:
        """Return the names of weight and bias of the last stage's head; without stages: of the model's."""
        bias = self.biases.get(self.head)
        if not stages:
            return self.head, bias
        return added(stages[-1], "into", self.head), added(stages[-1], "bias", self.head) if bias else None

    def join(self, params: Mapping[str, Tensor], layer: str, stages: Sequence[str]) -> Dense:
        """Put a layer together with what these stages added; for the head: take that of the last stage."""
        if layer == self.head:
            weight_name, bias_name = self.head_entries(stages)
            return Dense(params[weight_name], params[bias_name] if bias_name else None)

        bias_name = self.biases.get(layer)
        weight, bias = params[layer], params[bias_name] if bias_name else None
        for stage in stages:
            # With `units` = 0 a stage has a head and nothing else.
            into = added(stage, "into", layer)
            if into not in params:
                continue

            # The first layer reads the inputs, which do not grow.
            if layer != self.layers[0]:
                weight = torch.cat([weight, params[added(stage, "from", layer)]], 1)
            weight = torch.cat([weight, params[into]], 0)
            bias = torch.cat([bias, params[added(stage, "bias", layer)]]) if bias is not None else None
        return Dense(weight, bias)

    def separate(
        self, weight: Tensor, bias: Tensor, layer: str, stages: Sequence[str], units: int
    ) -> dict[str, Tensor]:
        """Cut a layer [all units, all inputs] into its entries, where each stage added `units`: undo `join`.

        `bias` [all units] is ignored where the layer has none.
        """
        entries: dict[str, Tensor] = {}
        if layer == self.head:
            weight_name, bias_name = self.head_entries(stages)
            return {weight_name: weight, **({bias_name: bias} if bias_name else {})}

        # The last stage lies outermost.
        for stage in reversed(stages if units else ()):
            entries[added(stage, "into", layer)], weight = weight[-units:], weight[:-units]
            if layer != self.layers[0]:
                entries[added(stage, "from", layer)], weight = weight[:, -units:], weight[:, :-units]
            if layer in self.biases:
                entries[added(stage, "bias", layer)], bias = bias[-units:], bias[:-units]

        entries[layer] = weight
        if layer in self.biases:
            entries[self.biases[layer]] = bias
        return entries


def entry(layout: Layout, flat: Tensor, name: str) -> Tensor:
    """Return one entry of a flat vector [n], in its shape."""
    return flat[layout.span(name)].view(layout.shapes[layout.names.index(name)])


def shapes_of(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layout by name."""
    return dict(zip(layout.names, layout.shapes, strict=True))


def unchained(model: Model) -> str | None:
    """Return why units cannot be added to the trainable layers of a model, or None."""
    parts = anatomy(model)
    if parts.head is None:
        return (
            "it gives each task a head of its own over units that it adds, and the model has no shared one "
            "(multi_head has none); use mlp"
        )
    if parts.others:
        return (
            f"units are added to linear layers, and norms such as {parts.others[0]!r} have a fixed number of "
            "them; use a model without norms, such as mlp"
        )
    if parts.order[len(parts.order) - len(parts.layers) :] != parts.layers:
        return (
            "units are added to layers up to the head, and here a frozen layer stands between them; "
            "freeze the first ones alone"
        )

    # Each layer must read exactly the units of the one before.
    units: int | None = None
    for name in (*parts.layers, parts.head[0]):
        shape = parts.shapes[name]
        if len(shape) != 2 or units not in (None, shape[1]):
            return (
                f"units are added to linear layers in a chain, got {name!r} of shape {shape}; "
                "use mlp, or freeze what is before the linear layers"
            )
        units = shape[0]
    return None


def unwidened(model: Model, inputs: Tensor) -> str | None:
    """Return why a model cannot run with one more unit in each layer, or None.

    Nothing leads away from these units, so the outputs for `inputs` [B, ...] must stay the same.
    """
    chain = Chain.of(model)
    params, buffers = model.init(torch.Generator().manual_seed(0))
    wide, dtype = dict(params), params[chain.head].dtype
    for depth, layer in enumerate((*chain.layers, chain.head)):
        weight = params[layer]
        if depth:
            weight = torch.cat([weight, weight.new_zeros(len(weight), 1)], 1)
        wide[layer] = torch.cat([weight, weight[:1]]) if layer != chain.head else weight
        if layer in chain.biases and layer != chain.head:
            bias = params[chain.biases[layer]]
            wide[chain.biases[layer]] = torch.cat([bias, bias[:1]])

    # The model runs arbitrary code, so only a trial shows whether its layers follow one another.
    inputs = cast_to(inputs, inputs.device, dtype)
    with torch.no_grad():
        plain = model(params, buffers, inputs, None, False)[0]
        try:
            widened = model(wide, buffers, inputs, None, False)[0]
            if torch.allclose(widened, plain, rtol=1e-3, atol=1e-4):
                return None
            return "its outputs change with a unit that leads nowhere"
        except (RuntimeError, ValueError, IndexError) as error:
            return str(error).splitlines()[0]


@dataclass(frozen=True, eq=False)
class Growth:
    """The stages of a network so far, and the task and source of this visit (None in predict)."""

    stages: tuple[str, ...]
    """The sources trained so far, in their order."""
    tasks: Mapping[str, int]
    """The stage of each task."""
    live: Mapping[str, Mapping[str, Tensor]]
    """Which units that a stage added are alive, by layer."""
    splits: tuple[Mapping[str, Split], ...]
    """The units that were split in each stage, by layer."""
    keep: Mapping[str, Tensor]
    """False for weights that were pruned in the last stage, by entry."""
    task: str | None = None
    source: str | None = None

    def growing(self, last: int | None = None) -> tuple[str, ...]:
        """Return the stages that added entries, up to number `last`: not the first, but the current one."""
        every = self.stages if self.source is None else (*self.stages, self.source)
        return every[1 : None if last is None else last + 1]


class Marks(NamedTuple):
    """0 or 1 for every unit [units] of a layer: whether it is old and reached, old and split, added, live."""

    reached: Tensor
    split: Tensor
    added: Tensor
    live: Tensor


@dataclass(frozen=True)
class DEN(Correction):
    """Dynamically expandable network: retrain what a task needs, add units, split units that drift.

    The first visit trains everything with l1. Any other task has its own head, and five equal phases:

    1. head: min L + l1 |W_t|, the rest frozen; then weights within `eps` of 0 are pruned. S are the units
       that non-zero weights connect to this head, layer by layer.
    2. retrain: W_S alone, min L + l2/2 |W_S|^2.
    3. expand: if the mean loss in the last epoch of retraining is above `threshold`, each hidden layer gets
       `units` units and all edges to and from them. These train alone, min L + l1 |W_N| + `group` sum_i
       |w_i|; then units with |w_i| <= eps are dropped, and weights within eps of 0 are pruned. Otherwise
       retraining goes on.
    4. drift: W_S and what was added, min L + anchor/2 |W_S - W_old|^2. Then units of S with |w_i - w_i,old|
       > `drift` (incoming weights and bias) are split: earlier tasks keep the old row, stored privately;
       this task and later ones have only the new row. (The authors' network has both, and trains all of W in
       this phase, not W_S.)
    5. tune: copies, added units and the head train on; other old units are frozen.

    Task t uses what existed at its stage, and rows that were split later as they were before. So nothing
    that is added changes an old task, and each later task moves each of its units by at most `drift` (0: old
    outputs stay bit-identical; infinite: no split). l1 and `group` are smooth within eps (w^2 / 2 eps),
    because they are minimised by gradients, without proximal steps. `units`, `l2`, `anchor`, `threshold` and
    `drift` are those of the authors' code, whose l1 and group (1e-5, 1e-3) are thresholds per step. Needs
    linear layers in a chain, after any frozen part. Private. Yoon, Yang, Lee & Hwang 2018.
    """

    units: int = 10
    threshold: float = 0.01
    drift: float = 0.05
    l1: float = 0.001
    l2: float = 0.0001
    group: float = 0.01
    anchor: float = 0.5
    eps: float = 0.001

    takes_trees: ClassVar[bool] = False
    instead: ClassVar[str] = "use finetune, or hat"
    shared_items: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = True
    needs_last_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative("DEN", l1=self.l1, l2=self.l2, group=self.group, anchor=self.anchor)
        if isinstance(self.units, bool) or not isinstance(self.units, int) or self.units < 0:
            raise ConsilienceError(f"`units` must be an integer >= 0, got {self.units!r}.")

        # Both may be infinite, and NaN fails every comparison.
        for name in ("threshold", "drift"):
            if not getattr(self, name) >= 0:
                raise ConsilienceError(f"`{name}` must be >= 0 (infinite: never), got {getattr(self, name)}.")
        if not 0 < self.eps < float("inf"):
            raise ConsilienceError(f"`eps` must be positive and finite, got {self.eps}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        why = without_tasks(facts) or not_alone(facts)
        if why is None and facts.revisited:
            why = "each source is one stage, and here one comes again; use hat, or give each source once"
        return why or (unchained(facts.model) if facts.model is not None else None)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Growth:
        """Return the stages of this agent, from the first to the last."""
        items = sorted(
            ((source, item) for (_, source), item in memory.items()), key=lambda p: p[1].meta["order"]
        )
        splits = []
        for _, item in items:
            rows, biases = item.group("old"), item.group("old bias")
            splits.append({n: Split(u, rows[n], biases[n]) for n, u in item.group("split").items()})
        return Growth(
            tuple(source for source, _ in items),
            {item.meta["task"]: stage for stage, (_, item) in enumerate(items)},
            {source: item.group("live") for source, item in items},
            tuple(splits),
            items[-1][1].group("keep") if items else {},
            str(sources[0].task) if sources else None,
            sources[0].name if sources else None,
        )

    def begin(self, start: Beginning) -> Begun:
        """Set pruned weights to 0 and add the entries of a new stage.

        Private: `rows` [outputs], 1 for the outputs of this source.
        """
        growth: Growth = start.recalled
        chain, params, source = Chain.of(start.model), dict(start.params), start.sources[0]
        if not growth.stages:
            inputs, _ = source.train.first(2)
            if why := unwidened(start.model, one_tensor(inputs, "DEN")):
                raise Refusal(f"DEN widens the layers of a model, and this one cannot: {why}; use mlp.")

        for name, keep in growth.keep.items():
            params[name] = start.params[name] * keep.to(start.params[name])
        if growth.stages:
            params |= self._new_units(chain, params, growth, start.generator)
            params |= self._new_head(chain, params, growth)

        # A source of values has no classes: it has every output.
        rows = torch.zeros(chain.widths[chain.head])
        rows[list(source.classes) or slice(None)] = 1
        return Begun(params, {"rows": rows.to(start.params[chain.head])})

    def _new_units(
        self, chain: Chain, params: Params, growth: Growth, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw a stage's hidden entries: incoming edges uniform in +-1 / sqrt(inputs), outgoing ones 0."""
        stage, earlier, like = growth.growing()[-1], self.units * (len(growth.stages) - 1), params[chain.head]
        entries: dict[str, Tensor] = {}
        for depth, layer in enumerate(chain.layers if self.units else ()):
            inputs = params[layer].shape[1] + (earlier + self.units if depth else 0)
            drawn = 2 * torch.rand(self.units, inputs + 1, generator=generator) - 1
            entries[added(stage, "into", layer)] = (drawn[:, 1:] * inputs**-0.5).to(like)
            if layer in chain.biases:
                entries[added(stage, "bias", layer)] = (drawn[:, 0] * inputs**-0.5).to(like)

            # Outgoing edges begin at 0, so that added units change nothing until they train.
            if depth:
                entries[added(stage, "from", layer)] = like.new_zeros(
                    chain.widths[layer] + earlier, self.units
                )
        return entries

    def _new_head(self, chain: Chain, params: Params, growth: Growth) -> dict[str, Tensor]:
        """Return a stage's head: a copy of the model's, with weights 0 from all added units."""
        (weight_name, bias_name), weight = chain.head_entries(growth.growing()), params[chain.head]
        wider = weight.new_zeros(len(weight), self.units * len(growth.stages))
        entries = {weight_name: torch.cat([weight, wider], 1)}
        if bias_name is not None:
            entries[bias_name] = params[chain.biases[chain.head]].clone()
        return entries

    # What a task sees.

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return the layers at a task's stage: without dropped units, with rows as before later splits."""
        assert ctx.model is not None
        growth: Growth = ctx.recalled
        current = growth.task is not None and task == growth.task
        if not current and task not in growth.tasks:
            return params

        number = len(growth.stages) if current else growth.tasks[str(task)]
        chain, stages = Chain.of(ctx.model), growth.growing(number)
        params = self._pruned(params, chain, ctx)
        seen, inputs = dict(params), None
        for name in (*chain.layers, chain.head):
            layer = chain.join(params, name, stages)

            # From the newest stage to the oldest, because the first split after a task's stage has its rows.
            for splits in reversed(growth.splits[number + 1 :]):
                if name in splits:
                    layer = splits[name].restore(layer)

            units = self._live(chain, name, ctx, stages) if name != chain.head else None
            if stages and self.units:
                layer = layer.select(units, inputs)
            inputs, seen[name] = units, layer.weight
            if layer.bias is not None:
                seen[chain.biases[name]] = layer.bias
        return seen

    def _pruned(self, params: Params, chain: Chain, ctx: Context) -> Params:
        """Return the parameters with pruned weights at 0; in a visit also those pruned so far."""
        growth: Growth = ctx.recalled
        keep = growth.keep
        if growth.source is not None:
            # `begin` has set what earlier stages pruned to 0, and no gradient moves it from there.
            assert ctx.layout is not None
            stage = growth.source
            own = [name for name in params if owned_by(name, "den", stage, 2) and is_edge(name)]
            prunable = own if growth.stages else list(chain.widths)
            keep = {name: entry(ctx.layout, ctx.trace["keep"], name) for name in prunable}
        return {**params, **{name: params[name] * kept.to(params[name]) for name, kept in keep.items()}}

    def _live(self, chain: Chain, layer: str, ctx: Context, stages: Sequence[str]) -> Tensor:
        """Return 1 for the units of a hidden layer that exist [all units], 0 for those that were dropped."""
        growth: Growth = ctx.recalled
        live = [torch.ones(chain.widths[layer], device=ctx.layout.device if ctx.layout else None)]
        for stage in stages if self.units else ():
            if stage == growth.source:
                assert ctx.layout is not None
                alive = entry(ctx.layout, ctx.trace["mark"], added(stage, "into", layer))[:, 0] > 0
            else:
                alive = growth.live[stage][layer]
            live.append(alive.to(live[0]))
        return torch.cat(live)

    # The phases.

    @staticmethod
    def phase(clock: tuple[int, int], horizon: tuple[int, int], after: int = 0) -> int:
        """Return the phase of a step: 5 i // n for step i of n; with `after` that of so many steps later."""
        steps = horizon[0] * horizon[1]
        return PHASES * (clock[0] * horizon[1] + clock[1] + after) // steps if steps else 0

    def _marks(self, chain: Chain, layer: str | None, mark: Params, ctx: Context) -> Marks:
        """Return the marks on a layer's units; layer None are the inputs, which are all reached and live."""
        stages, layout = ctx.recalled.growing(), ctx.layout
        assert layout is not None
        if layer is None:
            ones = torch.ones(mark[chain.layers[0]].shape[1], dtype=layout.dtype, device=layout.device)
            return Marks(ones, ones * 0, ones * 0, ones)

        # A row of `mark` has one value: 0, 1 (unit reached, or a new one alive) or 2 (unit split).
        values = chain.join(mark, layer, stages).weight[:, 0]
        new = torch.zeros_like(values)
        if self.units and stages:
            new[-self.units :] = 1
        old = self._live(chain, layer, ctx, stages[:-1]).to(values)
        live = torch.cat([old, values[len(old) :].clamp_max(1)])
        reached, split = values.clamp_max(1) * (1 - new), (values - 1).clamp_min(0) * (1 - new)
        return Marks(reached, split, values * new, live)

    def _expands(self, trace: Mapping[str, Tensor]) -> Tensor:
        """Return 1 where the mean loss after retraining is above the threshold, else 0."""
        total, count = trace["loss"]
        above: Tensor = (total / count.clamp_min(1) > self.threshold).to(total) * float(self.units > 0)
        return above

    def _trained_head(self, ctx: Context) -> Tensor:
        """Return 1 for the entries [n] that train in the first phase: a stage's own head, from old units.

        In the first visit: all entries but the rows of other outputs.
        """
        assert ctx.model is not None and ctx.layout is not None
        chain, stages, layout = Chain.of(ctx.model), ctx.recalled.growing(), ctx.layout
        rows, shapes = ctx.private["rows"].to(layout.device, layout.dtype), shapes_of(layout)
        if not stages:
            inputs = rows.new_ones(shapes[chain.head][1])
            return spread(layout, chain.separate(torch.outer(rows, inputs), rows, chain.head, (), 0))

        # The units of this stage are not alive before it expands.
        live = self._live(chain, chain.layers[-1], ctx, stages[:-1]).to(rows)
        inputs = torch.cat([live, rows.new_zeros(self.units)])
        held = {name: rows.new_zeros(shape) for name, shape in shapes.items() if chain.has(name)}
        return spread(layout, held | chain.separate(torch.outer(rows, inputs), rows, chain.head, stages, 0))

    def _trained(self, phase: int, ctx: Context) -> Tensor:
        """Return 1 for the entries [n] that train in a phase after the first."""
        layout, trace = ctx.layout, ctx.trace
        assert layout is not None and ctx.model is not None
        chain, stages, mark = Chain.of(ctx.model), ctx.recalled.growing(), layout.split(trace["mark"])
        rows = ctx.private["rows"].to(layout.device, layout.dtype)
        factors = {name: torch.zeros_like(value) for name, value in mark.items() if chain.has(name)}

        below = self._marks(chain, None, mark, ctx)
        for layer in (*chain.layers, chain.head):
            # Old units train edges from reached units, new ones all, `receiving` ones those from new units.
            if layer == chain.head:
                new, old, receiving = rows * 0, rows, rows
            else:
                marks = self._marks(chain, layer, mark, ctx)
                old = marks.split if phase == TUNE else marks.reached
                new, receiving = marks.added, marks.reached

            # While added units train alone, nothing old does.
            if phase == EXPAND:
                old = old * (1 - self._expands(trace))
            edges = torch.outer(old, below.reached) + torch.outer(new, below.live)
            edges = edges + torch.outer(receiving, below.added)
            factors |= chain.separate(edges, old + new, layer, stages, self.units)
            if layer != chain.head:
                below = marks

        trained: Tensor = spread(layout, factors) * trace["keep"]
        return trained

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        first = not ctx.recalled.stages or self.phase(step.clock, step.horizon) == HEAD
        return self._trained_head(ctx) if first else ctx.trace["train"]

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        """Return the regulariser of the phase, over the entries that train in it."""
        assert ctx.model is not None
        phase, growth, chain = self.phase(step.clock, step.horizon), ctx.recalled, Chain.of(ctx.model)
        factors = step.layout.split(self.mask(step, ctx))
        if phase >= DRIFT and growth.stages:
            return self._anchored(step, factors, chain, growth)

        weights = {
            name: value * factors[name]
            for name, value in step.layout.split(step.theta).items()
            if name in chain.widths or is_edge(name)
        }
        zero = step.theta.new_zeros(())
        sparse = self.l1 * sum((self._smooth(w).sum() for w in weights.values()), start=zero)
        if phase == HEAD or not growth.stages:
            return sparse
        small = self.l2 / 2 * sum((w.square().sum() for w in weights.values()), start=zero)
        if phase == RETRAIN:
            return small

        # Whether the network expands is a tensor, since the step must not branch on one.
        into = [added(growth.source, "into", layer) for layer in chain.layers]
        norms = (self._smooth(row_norms(weights[name])).sum() for name in into if name in weights)
        grouped = sparse + self.group * sum(norms, start=zero)
        return torch.where(self._expands(ctx.trace) > 0, grouped, small)

    def _anchored(self, step: StepView, factors: Params, chain: Chain, growth: Growth) -> Tensor:
        """Return anchor/2 |W - W_old|^2 over the old entries that train."""
        moved, stage = step.layout.split((step.theta - step.start).square()), str(growth.source)
        old = (
            (value * factors[name]).sum()
            for name, value in moved.items()
            if chain.has(name) and not owned_by(name, "den", stage, 2)
        )
        return self.anchor / 2 * sum(old, start=step.theta.new_zeros(()))

    def _smooth(self, values: Tensor) -> Tensor:
        """Return |values|, with a parabola in place of the kink within eps of 0."""
        size = values.abs()
        return torch.where(size < self.eps, values.square() / (2 * self.eps) + self.eps / 2, size)

    def trace_init(self, ctx: Context) -> dict[str, Tensor]:
        """Return the trace at the start, before any phase has decided anything.

        `train` [n] is 1 for entries that train, `keep` [n] for those that are not pruned. A row of `mark`
        [n] has 1 where its unit is reached or alive, 2 where it is split. `loss` [2] is the sum of losses
        and their count.
        """
        ones, zeros = torch.ones_like(ctx.theta), torch.zeros_like(ctx.theta)
        return {"train": ones, "keep": ones.clone(), "mark": zeros, "loss": ctx.theta.new_zeros(2)}

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        now, then = self.phase(step.clock, step.horizon), self.phase(step.clock, step.horizon, 1)
        epoch_later = self.phase(step.clock, step.horizon, step.horizon[1])
        trace = dict(ctx.trace)

        # Losses count in the last epoch of retraining.
        if ctx.recalled.stages and now == RETRAIN and epoch_later > now:
            part, out = step.parts[0], step.outputs[0].detach()
            loss = step.targets[0].mean(out, part.y, part.w)
            trace["loss"] = trace["loss"] + torch.stack([loss, torch.ones_like(loss)])

        # With few steps several phases end in one.
        for phase in range(now, then):
            trace = self._close(phase, step.theta + delta, step.start, replace(ctx, trace=trace))
        return trace

    def _close(self, phase: int, theta: Tensor, start: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Return the trace after a phase, with the decisions at its end."""
        layout, trace = ctx.layout, ctx.trace
        assert layout is not None
        values = layout.split(theta)
        keep, mark = (layout.split(trace[name].clone()) for name in ("keep", "mark"))
        if not ctx.recalled.stages:
            if phase == TUNE:
                self._prune_first(values, keep, ctx)
            return {**trace, "keep": layout.flatten(keep)}

        # Each step writes into the copies `keep` and `mark`.
        if phase == HEAD:
            self._prune_head(values, keep, ctx)
            self._mark_reached(values, keep, mark, ctx)
        elif phase == RETRAIN and self.units:
            self._expand(mark, ctx)
        elif phase == EXPAND and self.units:
            self._drop_units(values, keep, mark, ctx)
        elif phase == DRIFT:
            self._mark_split(values, layout.split(start), mark, ctx)

        trace = {**trace, "keep": layout.flatten(keep), "mark": layout.flatten(mark)}
        if phase == TUNE:
            return trace
        return {**trace, "train": self._trained(phase + 1, replace(ctx, trace=trace))}

    def _zero(self, values: Tensor) -> Tensor:
        """Return 1 for weights within eps of 0."""
        return (values.abs() <= self.eps).to(values)

    def _prune_first(self, values: Params, keep: Params, ctx: Context) -> None:
        """Prune small weights of the first task; other outputs' rows of the head did not train and stay."""
        assert ctx.model is not None
        chain = Chain.of(ctx.model)
        for layer in (*chain.layers, chain.head):
            own = ctx.private["rows"].to(values[layer])[:, None] if layer == chain.head else 1
            keep[layer].mul_(1 - own * self._zero(values[layer]))

    def _prune_head(self, values: Params, keep: Params, ctx: Context) -> None:
        """Prune small weights of the task's own head."""
        assert ctx.model is not None and ctx.layout is not None
        name, _ = Chain.of(ctx.model).head_entries(ctx.recalled.growing())
        trained = entry(ctx.layout, self._trained_head(ctx), name)
        keep[name].mul_(1 - trained * self._zero(values[name]))

    def _mark_reached(self, values: Params, keep: Params, mark: Params, ctx: Context) -> None:
        """Mark the units that non-zero weights connect to the task's outputs, from the head down."""
        assert ctx.model is not None and ctx.layout is not None
        chain, stages = Chain.of(ctx.model), ctx.recalled.growing()
        name, _ = chain.head_entries(stages)
        trained = entry(ctx.layout, self._trained_head(ctx), name)
        reached = (values[name] * keep[name] * trained != 0).any(0).to(trained)

        for layer in reversed(chain.layers):
            weight = chain.join(values, layer, stages).weight
            # The layer above reads units of this stage too, which are not alive yet.
            live = self._live(chain, layer, ctx, stages[:-1])
            reached = reached[: len(live)] * live.to(reached)
            every = torch.cat([reached, reached.new_zeros(len(weight) - len(live))])
            rows = chain.separate(every[:, None].expand(weight.shape), every, layer, stages, self.units)
            for part, value in rows.items():
                mark[part].copy_(value)
            reached = ((weight != 0) * every[:, None]).any(0).to(reached)

    def _expand(self, mark: Params, ctx: Context) -> None:
        """Mark all units of this stage as alive if the loss is above the threshold."""
        assert ctx.model is not None
        for layer in Chain.of(ctx.model).layers:
            mark[added(ctx.recalled.source, "into", layer)].fill_(1).mul_(self._expands(ctx.trace))

    def _drop_units(self, values: Params, keep: Params, mark: Params, ctx: Context) -> None:
        """Drop added units with small incoming weights, and prune small weights to and from the others."""
        assert ctx.model is not None and ctx.layout is not None
        source, trained = ctx.recalled.source, ctx.layout.split(ctx.trace["train"])
        for layer in Chain.of(ctx.model).layers:
            name = added(source, "into", layer)
            norms = (values[name] * trained[name]).norm(dim=1)
            mark[name].mul_((norms > self.eps).to(norms)[:, None])

        for name, kept in keep.items():
            if owned_by(name, "den", source, 2) and is_edge(name):
                kept.mul_(1 - self._expands(ctx.trace) * trained[name] * self._zero(values[name]))

    def _mark_split(self, values: Params, began: Params, mark: Params, ctx: Context) -> None:
        """Mark reached units of earlier stages whose incoming weights and bias moved by more than `drift`."""
        assert ctx.model is not None
        chain, earlier = Chain.of(ctx.model), ctx.recalled.growing()[:-1]
        for layer in chain.layers:
            new, old = chain.join(values, layer, earlier), chain.join(began, layer, earlier)
            moved = (new.weight - old.weight).square().sum(1)
            if new.bias is not None and old.bias is not None:
                moved = moved + (new.bias - old.bias).square()
            split = (moved.sqrt() > self.drift).to(moved)

            # Adding 1 makes a reached unit's mark 2; one that is not reached has 0 and cannot have trained.
            rows = chain.separate(split[:, None].expand(new.weight.shape), split, layer, earlier, self.units)
            for part, value in rows.items():
                mark[part].add_(value * (mark[part] > 0))

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """Return the weights that this stage pruned, its live units, and the old rows of units it split."""
        assert ctx.model is not None
        growth: Growth = ctx.recalled
        chain, earlier = Chain.of(ctx.model), growth.growing()[:-1]
        mark, keep = (learned.layout.split(ctx.trace[name]) for name in ("mark", "keep"))
        tensors = {f"keep/{name}": kept > 0 for name, kept in keep.items() if not bool((kept > 0).all())}

        for layer in chain.layers if growth.stages else ():
            if self.units:
                tensors[f"live/{layer}"] = mark[added(str(growth.source), "into", layer)][:, 0] > 0
            split = chain.join(mark, layer, earlier).weight[:, 0] > 1
            if bool(split.any()):
                # A layer without biases keeps an unused column, so that every item has the same parts.
                weight, bias = chain.join(learned.start, layer, earlier)
                tensors |= {
                    f"split/{layer}": split,
                    f"old/{layer}": weight[split],
                    f"old bias/{layer}": (weight[:, 0] if bias is None else bias)[split],
                }
        return Private(tensors, {"task": str(learned.task), "order": learned.order})


def row_norms(weight: Tensor) -> Tensor:
    """Return the norms of the rows; the gradient at 0 is 0."""
    # The derivative of the root at 0 is infinite, and times 0 it would be NaN.
    square = weight.square().sum(1)
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)
