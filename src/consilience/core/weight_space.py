"""Combining in weight space: average, arithmetic, TIES and every other aggregator, with an outer optimiser."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.core.aggregator import Aggregator, Linear, canonical
from consilience.core.consolidator import Consolidator
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Message, Shared, Weights
from consilience.core.model import Model
from consilience.core.optimiser import SGD, Optimiser
from consilience.core.params import Layout, Params, finite, matches
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source
from consilience.core.state import State


@dataclass(frozen=True)
class WeightSpace(Consolidator):
    """theta <- base + U(base - A(theta_1, .., theta_m)): aggregate A over the parameters heard, outer step U from what the
    hearer's own parameters were when it last absorbed.

    A of the linear kind gives coefficients c, and the aggregate is sum c_i theta_i + (1 - sum c) base, so that one
    unchanged row is taken as it is, to the bit; other kinds combine deltas theta_i - base. Entries that only some carry
    are combined among those, and a task's own, which have no common base, are averaged; floating-point buffers are
    averaged, others keep the hearer's value. The outer SGD(1) without momentum takes the aggregate as it is. Where no
    speaker learned since it absorbed (a server tells its clients), what is heard is common ground: averaged, with no
    outer step; one message is adopted to the bit.
    """

    aggregator: Aggregator | None = None
    outer: Optimiser | None = None
    lr: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ConsilienceError(f"`lr` of the outer optimiser should be positive. Found `lr = {self.lr}`.")

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        """Averages with coefficients that sum to 1 need none."""
        return self.aggregator is not None and self.aggregator.needs_base

    def forget(self, model: Model, state: State) -> State:
        raise Refusal("weights cannot be taken out again; train again without that sender.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if self.needs_base and facts.exchanges and not facts.common_base:
            return (
                f"{type(self.aggregator).__name__} combines deltas from the hearer's own parameters, but here what is heard "
                "starts from others; use an average, or the merging setting with `base`"
            )
        return None

    def export(
        self, model: Model, state: State, sources: Sequence[Source], personal: Sequence[str]
    ) -> dict[str, Shared]:
        if sources:
            return {}
        tensors = {f"params/{n}": p for n, p in state.params.items() if not matches(n, personal)}
        return {
            "": Weights(
                {
                    **tensors,
                    **{f"buffers/{n}": b for n, b in state.buffers.items() if not matches(n, personal)},
                }
            )
        }

    def release(self, state: State, personal: Sequence[str]) -> State:
        """The entries that it told come back with what it hears."""
        own = (
            {n: p for n, p in held.items() if matches(n, personal)} for held in (state.params, state.buffers)
        )
        return state.change(params=next(own), buffers=next(own), base={})

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        heard = [(m, m.items["model"]) for m in fresh if isinstance(m.items.get("model"), Weights)]
        if self.aggregator is not None and self.aggregator.robust:
            heard = without_broken(heard)
        if not heard:
            return state
        sizes = [
            float(m.size) if by_size else float(m.size > 0) for m, _ in heard
        ]  # 0: it stands for nothing that was learned
        sizes = sizes if any(sizes) else [1.0] * len(sizes)
        rows = [(m.sender, w.group("params"), size) for (m, w), size in zip(heard, sizes, strict=True)]
        for sender, params, _ in rows:
            finite(params, repr(sender))
            for n, p in params.items():
                if n in state.params and p.shape != state.params[n].shape:
                    raise ConsilienceError(
                        f"heard parameters should have the hearer's shapes. Found {tuple(p.shape)} for {n!r} of {sender!r}, "
                        f"here {tuple(state.params[n].shape)}."
                    )
            if params and state.base and not params.keys() & state.params.keys():
                raise ConsilienceError(
                    f"heard parameters should have the hearer's names. Found {next(iter(params))!r} of {sender!r}, "
                    f"here {next(iter(state.params))!r}."
                )
        merged: Params = {}
        groups: dict[tuple[int, ...], list[str]] = {}
        for n in sorted({n for _, params, _ in rows for n in params}):
            groups.setdefault(tuple(i for i, (_, params, _) in enumerate(rows) if n in params), []).append(n)
        for carriers, names in groups.items():
            among = [rows[i] for i in carriers]
            frozen = [n for n in names if model.frozen(n) or not among[0][1][n].is_floating_point()]
            for n in frozen:
                merged[n] = state.params.get(n, among[0][1][n])
            names = [n for n in names if n not in frozen]
            aggregator = self.aggregator if any(m.trained for m, _ in heard) else None
            own = [
                n for n in names if model.task_of(n) is not None
            ]  # a task's own entries have no base: averaged
            common = [n for n in names if n not in own]
            if any(m.trained for m, _ in heard):
                merged |= self._by_told(common, among, state, fresh)
            for some, a in (([n for n in common if n not in merged], aggregator), (own, None)):
                if some and len(among) == 1 and a is None:
                    merged |= {n: among[0][1][n] for n in some}
                elif some:
                    merged |= self._combine(a, some, among, state.base, generator)
        if not any(m.trained for m, _ in heard):
            params, outer = {**state.params, **merged}, dict(state.outer)
        else:
            params, outer = self._step(model, {**state.params, **merged}, state, merged)
        buffers = dict(state.buffers)
        groups_of = [(w.group("buffers"), size) for (_, w), size in zip(heard, sizes, strict=True)]
        for n in sorted({n for b, _ in groups_of for n in b}):
            having = [(b[n], s) for b, s in groups_of if n in b]
            if len(having) == 1:
                buffers[n] = having[0][0]
            elif having[0][0].is_floating_point():
                total = sum(s for _, s in having)
                buffers[n] = torch.stack([b * (s / total) for b, s in having]).sum(0)
            else:
                buffers.setdefault(n, having[0][0])
        size = int(sum(m.size for m, _ in heard))
        return state.change(params=params, buffers=buffers, outer=outer, size=size)

    def _by_told(
        self, names: list[str], rows: list[tuple[str, Params, float]], state: State, fresh: Sequence[Message]
    ) -> Params:
        """The entries in common that are combined by what else was told, from (sender, parameters, weight); here none."""
        return {}

    def _combine(
        self,
        a: Aggregator | None,
        names: list[str],
        rows: list[tuple[str, Params, float]],
        base: Params,
        generator: torch.Generator,
    ) -> Params:
        layout = Layout.of({n: rows[0][1][n] for n in names})
        total = sum(s for _, _, s in rows)
        weights = torch.tensor([s / total for _, _, s in rows], dtype=layout.dtype)
        heard = [params for _, params, _ in rows]
        if a is None or (isinstance(a, Linear) and not a.needs_gram):
            order = ranked(heard, layout, weights)
            weights = weights[order]
            c = weights if a is None else a.weigh(weights.new_zeros(0, 0), weights, generator)
            return affine([heard[i] for i in order], c, base, layout)
        whole = torch.stack([layout.flatten(params) for params in heard])
        origin = layout.flatten(base)
        deltas, w, order = a.admit(whole - origin, weights, [sender for sender, _, _ in rows])
        if isinstance(a, Linear):
            return affine([heard[i] for i in order], a.coefficients(deltas, w, generator), base, layout)
        return layout.split(origin + a.combine(deltas, w, generator))

    def _step(
        self, model: Model, target: Params, state: State, merged: Params
    ) -> tuple[Params, dict[str, Tensor]]:
        outer = self.outer or SGD()
        if outer.is_identity(self.lr):
            return target, {}
        common = {
            n: p
            for n, p in merged.items()
            if n in state.base and model.task_of(n) is None and p.is_floating_point()
        }
        layout = Layout.of(common)
        theta, aggregate = layout.flatten(state.base), layout.flatten(common)
        held = dict(state.outer) or outer.init(theta)
        direction, held = outer.update(theta - aggregate, held, theta)
        return {**target, **layout.split(theta - self.lr * direction)}, held


def without_broken(heard: list[tuple[Message, Shared]]) -> list[tuple[Message, Shared]]:
    """Those that are finite, with a warning by the names of the others; all of them where none is, to be refused."""
    broken = {
        m.sender
        for m, w in heard
        if m.trained and not all(bool(torch.isfinite(t).all()) for t in w.tensors.values())
    }
    if not broken or all(m.sender in broken for m, _ in heard):
        return heard
    warnings.warn(
        f"NaN or infinity in what {', '.join(map(repr, sorted(broken)))} told: left out", stacklevel=2
    )
    return [(m, w) for m, w in heard if m.sender not in broken]


def ranked(rows: Sequence[Params], layout: Layout, weights: Tensor) -> list[int]:
    """An order of rows that depends on their content alone: by a few numbers of their first entries, else by all of them."""
    heads = [torch.cat([p[n].detach().reshape(-1)[:4] for n in layout.names[:4]]).tolist() for p in rows]
    keys = [(*head, w) for head, w in zip(heads, weights.tolist(), strict=True)]
    if len(set(keys)) == len(keys):
        return sorted(range(len(keys)), key=keys.__getitem__)
    return canonical(torch.stack([layout.flatten(p) for p in rows]), weights)


def affine(rows: Sequence[Params], coefficients: Tensor, base: Params, layout: Layout) -> Params:
    """sum_i c_i row_i + (1 - sum c) base, by entry; a single row with c = 1 is taken as it is, and c = 0 gives the base."""
    c = [float(x) for x in coefficients]
    rest = 1 - float(coefficients.double().sum())

    def of(params: Params, n: str, shape: tuple[int, ...]) -> Tensor:
        t = params.get(n)
        return (
            torch.zeros(shape, dtype=layout.dtype)
            if t is None
            else t.detach().to(layout.device, layout.dtype)
        )

    made: Params = {}
    for n, shape in zip(layout.names, layout.shapes, strict=True):
        if not any(c) or (len(c) == 1 and c[0] == 1):
            made[n] = of(rows[0] if any(c) else base, n, shape).clone()
            continue
        total = of(rows[0], n, shape) * c[0]
        for row, x in zip(rows[1:], c[1:], strict=True):
            total.add_(of(row, n, shape), alpha=x)
        made[n] = total if abs(rest) < 1e-6 else total.add_(of(base, n, shape), alpha=rest)
    return made
