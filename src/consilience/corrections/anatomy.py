"""Which entries of a model are layers, biases, its head; and why a model or a schedule does not suit isolation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.core.correction import NO_TRAINING
from consilience.core.errors import ConsilienceError
from consilience.core.model import Model
from consilience.core.params import Layout, Params
from consilience.core.source import Source

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True)
class Anatomy:
    """The shared weights of a model, in its own order, with their shapes, biases and what else is shared.

    `layers` are the trainable weights of two or more dimensions that are not the head; `head` is the linear layer (weight, bias)
    whose rows are the outputs, where all tasks share one; `order` are all shared weights, frozen ones too, without the head.
    """

    order: tuple[str, ...]
    layers: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    biases: Mapping[str, str]
    head: tuple[str, str | None] | None
    others: tuple[str, ...]
    """Trainable shared entries that are neither: norms."""

    def previous(self, name: str) -> str | None:
        """The weight before `name` (or before the head), or None."""
        at = self.order.index(name) if name in self.order else len(self.order)
        return self.order[at - 1] if at else None


@lru_cache(maxsize=16)
def anatomy(model: Model) -> Anatomy:
    """What a model is made of, from the entries that it begins with."""
    params, _ = model.init(torch.Generator().manual_seed(0))
    shared = {n: p for n, p in params.items() if model.task_of(n) is None and p.is_floating_point()}
    weights = [n for n, p in shared.items() if p.ndim >= 2]
    biases = {}
    for n in weights:
        b = f"{n.removesuffix('weight')}bias"
        if n.endswith("weight") and b in shared and shared[b].shape == shared[n].shape[:1]:
            biases[n] = b
    head: tuple[str, str | None] | None = None
    try:
        head = model.head(params, None)
    except ConsilienceError:
        pass
    else:
        if (
            shared[head[0]].shape[0] != model.outputs
        ):  # features were asked for elsewhere: the last layer of so many rows
            last = [n for n in weights if shared[n].shape[0] == model.outputs]
            head = (last[-1], biases.get(last[-1])) if last else None
    order = [n for n in weights if head is None or n != head[0]]
    layers = [n for n in order if not model.frozen(n)]
    known = {*weights, *biases.values(), *(n for n in head or () if n)}
    others = tuple(n for n in shared if n not in known and not model.frozen(n))
    return Anatomy(
        tuple(order), tuple(layers), {n: tuple(shared[n].shape) for n in weights}, biases, head, others
    )


def without_tasks(facts: ScheduleFacts) -> str | None:
    """Why a correction that treats every task in its own way cannot act, or None."""
    if not facts.trains:
        return NO_TRAINING
    if not facts.aware:
        return "it needs to know the task, and there is neither a label nor a mapper; use scenario='task', or compose it with a mapper"
    if facts.model is not None:
        if not anatomy(facts.model).layers:
            return "the model has no trainable layer that tasks share; use one such as mlp or conv"
        if facts.model.has_batch_norm:
            return "statistics of batch norm move with every task; use a model with group norm or none"
    return None


def not_alone(facts: ScheduleFacts) -> str | None:
    """Why a correction that keeps entries of old tasks as they are cannot act, or None."""
    if facts.parts > 1:
        return "tasks are given their entries one after another, and here a step has several; use continual"
    if facts.receives_others:
        return "what is heard moves the entries that it keeps; use continual, or supsup, whose masks travel"
    return None


def rows_with_units(model: Model) -> str | None:
    """Why units cannot be gated by the rows of their layers, or None: a_i relu(w_i x + b_i) = relu(a_i w_i x + a_i b_i), a_i >= 0."""
    a = anatomy(model)
    if a.others:
        return f"it gates units by the rows of their layers, which norms undo, such as {a.others[0]!r}; use a model without norms"
    for n in (*a.order, *(a.head or ())[:1]):
        before = a.previous(str(n))
        if before and a.shapes[str(n)][1] % a.shapes[before][0]:
            return f"it gates units of layers in a chain. Found {str(n)!r}, whose inputs are not those of {before!r}; use mlp or conv"
    return None


def spread(layout: Layout, factors: Mapping[str, Tensor]) -> Tensor:
    """Factors [n] in a layout; 1 for the entries that are not named."""
    ones = {
        n: torch.ones(s, dtype=layout.dtype, device=layout.device)
        for n, s in zip(layout.names, layout.shapes, strict=True)
    }
    return layout.flatten({**ones, **factors})


def own_entries(
    model: Model, params: Params, sources: tuple[Source, ...], taken: frozenset[int]
) -> dict[str, Tensor]:
    """Factors by entry: 1 for the rows of the shared head that no earlier task took and these sources have, 0 for its others;
    0 for the heads of other tasks."""
    factors: dict[str, Tensor] = {}
    a, keys = anatomy(model), {model.head_key(s) for s in sources}
    free = sorted({c for s in sources for c in s.classes} - taken)
    for n in a.head or ():
        if n is not None:
            factors[n] = torch.zeros_like(params[n])
            factors[n][free] = 1
    for n, p in params.items():
        task = model.task_of(n)
        if task is not None and task not in keys:
            factors[n] = torch.zeros_like(p)
    return factors
