"""Combining in weight space: average, TIES and every other aggregator, with an outer optimiser."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.core.aggregator import Affine, Aggregator, Linear, canonical, canonical_rows
from consilience.core.consolidator import Consolidator
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Message, Shared, Weights, check_numbers
from consilience.core.model import Model
from consilience.core.names import WHOLE
from consilience.core.optimiser import SGD, Optimiser
from consilience.core.params import Layout, Params, finite, matches
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source
from consilience.core.state import State
from consilience.core.warning import warn


class Received(NamedTuple):
    """One sender's parameters and buffers, and their weight in the average."""

    sender: str
    params: Params
    buffers: Params
    weight: float


@dataclass(frozen=True)
class WeightSpace(Consolidator):
    """theta <- base + U(base - A(theta_1, .., theta_m)): aggregate A of received parameters, outer step U.

    `base` is what the receiver's own parameters were when it last received. A linear A gives coefficients c,
    and the aggregate is sum c_i theta_i + (1 - sum c) base, so that one unchanged row is taken as it is, to
    the bit; other kinds combine deltas theta_i - base. Entries that only some messages carry are combined
    among those. Entries of one task have no common base and are averaged; floating-point buffers are
    averaged, others keep the receiver's value.

    A robust aggregator also combines entries of one task and each floating-point buffer, and it takes no
    sender's word: all weigh the same whatever size they claim, also those that say that they trained on
    nothing. What is sent on then stands for sizes up to the median of the claimed ones.

    The outer SGD(1) without momentum takes the aggregate as it is. If no sender trained since it last
    received (a server that broadcasts), the parameters are averaged without an outer step; one message is
    adopted to the bit.
    """

    aggregator: Aggregator | None = None
    outer: Optimiser | None = None
    lr: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ConsilienceError(f"`lr` of the outer optimiser must be positive and finite, got {self.lr}.")
        if self.lr != 1 and "lr" in dict(getattr(self.outer, "arguments", ())):
            raise ConsilienceError(
                f"`lr` of the outer optimiser must be given once, got {self.lr} and {self.outer!r}."
            )

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        """Whether the aggregator needs a base; averages, whose coefficients sum to 1, need none."""
        return self.aggregator is not None and self.aggregator.needs_base

    @property
    def robust(self) -> bool:
        """Whether the aggregator bounds what one sender can do, and takes no sender's word."""
        return self.aggregator is not None and self.aggregator.robust

    def combines(self, facts: ScheduleFacts) -> bool:
        """Whether it makes parameters of several models into those of one."""
        return facts.most_combined > 1

    def forget(self, model: Model, state: State) -> State:
        raise Refusal("averaged weights of one sender cannot be removed; train again without that sender.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if self.needs_base and facts.exchanges and not facts.common_base:
            return (
                f"{type(self.aggregator).__name__} combines deltas from the receiver's own parameters, but "
                "here the senders start from others; use an average, or the merging setting with `base`"
            )
        return None

    def export(
        self, model: Model, state: State, sources: Sequence[Source], personal: Sequence[str]
    ) -> dict[str, Shared]:
        if sources:
            return {}
        moving = {
            "params": state.frozen.without(state.params),
            "buffers": state.frozen.without(state.buffers),
        }
        tensors = {
            f"{kind}/{name}": tensor
            for kind, held in moving.items()
            for name, tensor in held.items()
            if not matches(name, personal)
        }
        # Whoever receives them puts them over its own frozen entries, which must be the same.
        return {WHOLE: Weights(tensors, {"backbone": state.frozen.hash} if state.frozen.hash else {})}

    def release(self, state: State, personal: Sequence[str]) -> State:
        """Keep personal and frozen entries; those that were sent come back with the next message."""

        def kept(name: str) -> bool:
            return name in state.frozen or matches(name, personal)

        params = {name: p for name, p in state.params.items() if kept(name)}
        buffers = {name: b for name, b in state.buffers.items() if kept(name)}
        return state.change(params=params, buffers=buffers, base={})

    def check_message(self, model: Model, state: State, message: Message) -> None:
        item = message.items.get("model")
        if item is not None and not isinstance(item, Weights):
            raise ConsilienceError(
                f"a model must come as Weights where models are combined, got {type(item).__name__}."
            )
        # Robust aggregators go on without weights that are not finite.
        if item is not None and not self.robust:
            check_numbers(item, state.buffers, repr(message.sender))
        if item is not None:
            row = Received(message.sender, item.group("params"), item.group("buffers"), 1.0)
            _check_fits(model, row, item.meta.get("backbone", ""), state)
            _check_types(row, state)

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        messages = with_weights(fresh)
        # If no sender trained, there is no change to step along: average the rows.
        trained = any(m.trained for m in messages)
        guard = self.aggregator if trained and self.robust else None
        if guard is not None:
            messages = without_broken(messages)
        if not messages:
            return state

        weights = [1.0] * len(messages) if guard is not None else message_weights(messages, by_size)
        rows = []
        for m, weight in zip(messages, weights, strict=True):
            item = m.items["model"]
            row = Received(m.sender, item.group("params"), item.group("buffers"), weight)
            finite(row.params, repr(row.sender))
            _check_fits(model, row, item.meta.get("backbone", ""), state)
            rows.append(row)

        merged: Params = {}
        for names, among in _by_carriers(rows):
            merged |= self._merge_entries(model, state, names, among, fresh if trained else None, generator)
        params, outer = {**state.params, **merged}, dict(state.outer)
        if trained:
            params, outer = self._step(model, params, state, merged)

        buffers = _merge_buffers(guard, rows, state.buffers)
        size = sum(m.size for m in messages) if guard is None else capped([m.size for m in messages])
        return state.change(params=params, buffers=buffers, outer=outer, size=size)

    def _merge_entries(
        self,
        model: Model,
        state: State,
        names: list[str],
        rows: list[Received],
        trained: Sequence[Message] | None,
        generator: torch.Generator,
    ) -> Params:
        """Merge entries that all `rows` carry; `trained` holds the messages, or None if no sender trained."""
        first = rows[0].params
        frozen = [name for name in names if model.frozen(name) or not first[name].is_floating_point()]
        merged = {name: state.params.get(name, first[name]) for name in frozen}

        # A task's own entries have no base, and so no deltas to aggregate: average them. Robust aggregators
        # give the same from any origin.
        of_one_task = [name for name in names if name not in frozen and model.task_of(name) is not None]
        common = [name for name in names if name not in frozen and name not in of_one_task]
        if trained is not None:
            merged |= self._merge_by_statistics(common, rows, state, trained)
        left = [name for name in common if name not in merged]
        aggregator = self.aggregator if trained is not None else None
        guard = aggregator if aggregator is not None and aggregator.robust and len(rows) > 1 else None

        for group, how in ((left, aggregator), (of_one_task, guard)):
            if group and len(rows) == 1 and how is None:
                merged |= {name: first[name] for name in group}
            elif group:
                _check_enough(how, rows, group[0])
                merged |= self._combine(how, group, rows, state.base, generator)
        return merged

    def _merge_by_statistics(
        self, names: list[str], rows: list[Received], state: State, fresh: Sequence[Message]
    ) -> Params:
        """Merge common entries by statistics that came with them; here none. Others go to the aggregator."""
        return {}

    def _combine(
        self,
        aggregator: Aggregator | None,
        names: list[str],
        rows: list[Received],
        base: Params,
        generator: torch.Generator,
    ) -> Params:
        """Combine entries that all rows carry.

        They are combined by coefficients if those suffice, else by flat deltas from the base.
        """
        layout = Layout.of({name: rows[0].params[name] for name in names})
        total = sum(row.weight for row in rows)
        weights = torch.tensor([row.weight / total for row in rows], dtype=layout.dtype)
        params = [row.params for row in rows]

        # In canonical order the sum has the same bits however messages arrive. Coefficients that need no
        # Gramian are applied entry by entry: no flat copy of any model is made.
        if aggregator is None or (isinstance(aggregator, Linear) and not aggregator.needs_gram):
            order = rank(params, layout, weights)
            weights = weights[order]
            if aggregator is not None:
                weights = aggregator.weigh(weights.new_zeros(0, 0), weights, generator)
            return affine([params[i] for i in order], weights, base, layout)

        origin = layout.flatten(base)
        flat = torch.stack([layout.flatten(p) for p in params])
        deltas, weights, order = aggregator.admit(flat - origin, weights, [row.sender for row in rows])
        if isinstance(aggregator, Linear):
            coefficients = aggregator.coefficients(deltas, weights, generator)
            return affine([params[i] for i in order], coefficients, base, layout)
        return layout.split(origin + aggregator.combine(deltas, weights, generator))

    def _step(
        self, model: Model, target: Params, state: State, merged: Params
    ) -> tuple[Params, dict[str, Tensor]]:
        """Step from the base towards the merged entries; return parameters and state of the optimiser."""
        outer = self.outer or SGD()
        if outer.is_identity(self.lr):
            return target, {}
        common = {
            name: p
            for name, p in merged.items()
            if name in state.base and model.task_of(name) is None and p.is_floating_point()
        }

        layout = Layout.of(common)
        theta, aggregate = layout.flatten(state.base), layout.flatten(common)
        # base - aggregate is the pseudo-gradient of server optimisers (FedOpt).
        held = dict(state.outer) or outer.init(theta)
        direction, held = outer.update(theta - aggregate, held, theta)
        return {**target, **layout.split(theta - self.lr * direction)}, held


def factor_pair(names: Iterable[str]) -> tuple[str, str] | None:
    """Return two entries whose product is what a model uses (LoRA), by peft's names; None without any.

    >>> factor_pair(["q.weight", "q.lora_A.default.weight", "q.lora_B.default.weight"])
    ('q.lora_A.default.weight', 'q.lora_B.default.weight')
    """
    known = set(names)
    pairs = ((name, _FACTOR.sub(r"\1lora_\2B\3", name)) for name in sorted(known) if _FACTOR.search(name))
    return next((pair for pair in pairs if pair[1] in known), None)


_FACTOR = re.compile(r"(^|\.)lora_(embedding_)?A(\.|$)")


def with_weights(messages: Iterable[Message]) -> list[Message]:
    """Select the messages that carry parameters."""
    return [m for m in messages if isinstance(m.items.get("model"), Weights)]


def message_weights(messages: Sequence[Message], by_size: bool) -> list[float]:
    """Weight messages by their examples, or equally; those without examples weigh 0, unless all do."""
    # Size 0 means that the sender trained on nothing, so that its parameters hold nothing new.
    sizes = [float(m.size) if by_size else float(m.size > 0) for m in messages]
    return sizes if any(sizes) else [1.0] * len(sizes)


def capped(sizes: Sequence[int]) -> int:
    """Add up claimed sizes, none of which counts for more than the (lower) median.

    >>> capped([10, 20, 30, 10**12])
    70
    """
    most = sorted(sizes)[(len(sizes) - 1) // 2]
    return sum(min(size, most) for size in sizes)


def without_broken(messages: list[Message]) -> list[Message]:
    """Leave out messages that are not finite, with a warning; keep all if none is finite, to be refused."""
    # Also of senders that claim to have trained on nothing.
    broken = {
        m.sender
        for m in messages
        if not all(bool(torch.isfinite(t).all()) for t in m.items["model"].tensors.values())
    }
    # If all are broken, leaving them out would silently keep the old parameters.
    if not broken or all(m.sender in broken for m in messages):
        return messages
    names = ", ".join(map(repr, sorted(broken)))
    warn(f"parameters of {names} have NaN or infinity; they are left out")
    return [m for m in messages if m.sender not in broken]


def _check_fits(model: Model, row: Received, backbone: str, state: State) -> None:
    """Refuse parameters of another model than the receiver's."""
    if backbone != state.frozen.hash:
        raise ConsilienceError(
            f"received parameters must belong to the receiver's frozen entries {_short(state.frozen.hash)}, "
            f"got {_short(backbone)} from {row.sender!r}; use one model and one base for all agents."
        )
    for name, p in row.params.items():
        if name in state.params and p.shape != state.params[name].shape:
            raise ConsilienceError(
                f"received parameters must have the receiver's shapes, got {tuple(p.shape)} for {name!r} of "
                f"{row.sender!r}, here {tuple(state.params[name].shape)}."
            )

    # New entries may be heads of other tasks, but a model without any common entry is another model.
    common = {name for name in row.params if model.task_of(name) is None}
    if common and state.base and not common & state.params.keys():
        raise ConsilienceError(
            f"received parameters must have the receiver's names, got {next(iter(row.params))!r} of "
            f"{row.sender!r}, here {next(iter(state.params))!r}."
        )


def _check_types(row: Received, state: State) -> None:
    """Refuse entries of another type, and buffers of another shape, than the receiver's."""
    for held, own in ((row.params, state.params), (row.buffers, state.buffers)):
        for name, tensor in held.items():
            here = own.get(name, tensor)
            if tensor.dtype != here.dtype or tensor.shape != here.shape:
                raise ConsilienceError(
                    f"received entries must be of the receiver's kind, got {tensor.dtype} "
                    f"{tuple(tensor.shape)} for {name!r} of {row.sender!r}, here {here.dtype} "
                    f"{tuple(here.shape)}."
                )


def _short(backbone: str) -> str:
    return backbone[:8] or "(none)"


def _by_carriers(rows: Sequence[Received]) -> Iterator[tuple[list[str], list[Received]]]:
    """Yield groups of entries, sorted, with the rows that carry them."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in sorted({name for row in rows for name in row.params}):
        carriers = tuple(i for i, row in enumerate(rows) if name in row.params)
        groups.setdefault(carriers, []).append(name)
    for carriers, names in groups.items():
        yield names, [rows[i] for i in carriers]


def _check_enough(aggregator: Aggregator | None, rows: Sequence[Received], name: str) -> None:
    """Refuse fewer rows of an entry than a robust aggregator needs to tolerate bad ones."""
    # A refusal, because no message is at fault.
    if aggregator is not None and aggregator.robust and len(rows) < aggregator.fewest_rows:
        raise Refusal(
            f"{type(aggregator).__name__} needs at least {aggregator.fewest_rows} rows, got {len(rows)} "
            f"of {name!r}; use aggregators.median(), which takes any number."
        )


def _merge_buffers(guard: Aggregator | None, rows: Sequence[Received], own: Params) -> Params:
    """Average floating-point buffers among those who have them; others keep the receiver's value.

    A robust aggregator `guard` combines each of them instead: one sender would spoil an average.
    """
    buffers = dict(own)
    for name in sorted({name for row in rows for name in row.buffers}):
        carriers = [row for row in rows if name in row.buffers]
        having = [(row.buffers[name], row.weight) for row in carriers]
        first = having[0][0]
        if len(having) == 1:
            buffers[name] = first
        elif guard is not None and first.is_floating_point() and first.numel():
            # Each by itself: distances over all would be those of the buffer of the largest numbers.
            _check_enough(guard, carriers, name)
            flat = [buffer.reshape(-1) for buffer, _ in having]
            buffers[name] = guard(flat, names=[row.sender for row in carriers]).reshape(first.shape)
        # Counters are integers, whose average means nothing.
        elif first.is_floating_point():
            total = sum(weight for _, weight in having)
            buffers[name] = torch.stack([b * (weight / total) for b, weight in having]).sum(0)
        else:
            buffers.setdefault(name, first)
    return buffers


def rank(rows: Sequence[Params], layout: Layout, weights: Tensor) -> list[int]:
    """Order rows by their content alone (`canonical`); flat copies are made only if a few numbers tie."""
    few = [torch.cat([p[name].detach().reshape(-1)[:4] for name in layout.names[:4]]).tolist() for p in rows]
    heads = [(*head, weight) for head, weight in zip(few, weights.tolist(), strict=True)]
    if len(set(heads)) == len(heads):
        return canonical(heads)
    return canonical_rows(torch.stack([layout.flatten(p) for p in rows]), weights)


def affine(rows: Sequence[Params], coefficients: Tensor, base: Params, layout: Layout) -> Params:
    """Compute sum_i c_i row_i + (1 - sum c) base, entry by entry, as `Affine` does."""
    terms = Affine(tuple(coefficients.tolist()), 1 - float(coefficients.double().sum()))

    def entry(params: Params, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in params:
            return torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        return params[name].detach().to(layout.device, layout.dtype)

    made: Params = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if terms.copied:
            made[name] = entry(rows[0] if terms.copied == "row" else base, name, shape).clone()
        else:
            origin = entry(base, name, shape) if terms.base_share else None
            made[name] = terms.add((entry(row, name, shape) for row in rows), origin)
    return made
