"""The anatomy of a model: layers, biases, head; and why a model or a schedule does not suit isolation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from consilience.core.correction import NO_TRAINING
from consilience.core.errors import ConsilienceError
from consilience.core.model import Model
from consilience.core.params import Layout, Params
from consilience.core.source import Source

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


class Head(NamedTuple):
    """The names of the weight and of the bias (or None) of the linear layer whose rows are the outputs."""

    weight: str
    bias: str | None

    @property
    def entries(self) -> tuple[str, ...]:
        """The weight, and the bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Anatomy:
    """The entries that all tasks share, in the model's order, by what they are."""

    order: tuple[str, ...]
    """All weights of two or more dimensions, frozen ones too, without the head."""
    layers: tuple[str, ...]
    """The trainable ones among `order`."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shapes of all weights, the head's too."""
    biases: Mapping[str, str]
    """The bias of each weight that has one."""
    head: Head | None
    """None where tasks have heads of their own."""
    others: tuple[str, ...]
    """Other trainable entries, such as those of norms."""

    @property
    def weights(self) -> tuple[str, ...]:
        """The trainable weights that are not the head, then the head's weight."""
        return self.layers if self.head is None else (*self.layers, self.head.weight)

    def previous(self, name: str) -> str | None:
        """Return the weight before `name` (or before the head), or None."""
        at = self.order.index(name) if name in self.order else len(self.order)
        return self.order[at - 1] if at else None

    def bias_of(self, name: str) -> str | None:
        """Return the bias of a weight or of the head, or None."""
        return self.head.bias if self.head and name == self.head.weight else self.biases.get(name)


@lru_cache(maxsize=16)
def anatomy(model: Model) -> Anatomy:
    """Sort the entries that a model begins with by what they are."""
    # Any seed will do, because only names and shapes are read.
    params, _ = model.init(torch.Generator().manual_seed(0))
    shared = {n: p for n, p in params.items() if model.task_of(n) is None and p.is_floating_point()}
    weights = [name for name, p in shared.items() if p.ndim >= 2]

    # A bias has the name of its weight, and one number per unit.
    biases = {}
    for name in weights:
        bias = f"{name.removesuffix('weight')}bias"
        if name.endswith("weight") and bias in shared and shared[bias].shape == shared[name].shape[:1]:
            biases[name] = bias

    head = shared_head(model, params, weights, biases)
    order = [name for name in weights if head is None or name != head.weight]
    layers = [name for name in order if not model.frozen(name)]
    sorted_out = {*weights, *biases.values(), *(head.entries if head else ())}
    others = tuple(name for name in shared if name not in sorted_out and not model.frozen(name))
    shapes = {name: tuple(shared[name].shape) for name in weights}
    return Anatomy(tuple(order), tuple(layers), shapes, biases, head, others)


def shared_head(model: Model, params: Params, weights: list[str], biases: Mapping[str, str]) -> Head | None:
    """Return the head that all tasks share, or None."""
    try:
        head = Head(*model.head(params, None))
    except ConsilienceError:
        return None
    if params[head.weight].shape[0] == model.outputs:
        return head

    # A user took the features from an earlier layer: then the head is the last layer with so many rows.
    last = [name for name in weights if params[name].shape[0] == model.outputs]
    return Head(last[-1], biases.get(last[-1])) if last else None


def without_tasks(facts: ScheduleFacts) -> str | None:
    """Return why a correction that treats every task in its own way cannot act, or None."""
    if not facts.trains:
        return NO_TRAINING
    if not facts.aware:
        return (
            "it needs to know the task, and there is neither a label nor a mapper; "
            "use scenario='task', or compose it with a mapper"
        )
    if facts.model is not None:
        if not anatomy(facts.model).layers:
            return "the model has no trainable layer that tasks share; use one such as mlp or conv"
        if facts.model.moves_buffers:
            return "running statistics (batch norm) move with every task; use a model with group norm or none"
    return None


def not_alone(facts: ScheduleFacts) -> str | None:
    """Return why a correction that keeps entries of old tasks as they are cannot act, or None."""
    if facts.parts > 1:
        return "tasks are given their entries one after another, and here a step has several; use continual"
    if facts.receives_others:
        return (
            "what is received moves the entries that it keeps; use continual, or supsup, whose masks are sent"
        )
    return None


def rows_in_common(facts: ScheduleFacts) -> str | None:
    """Return why tasks cannot have rows of their own in the model's head, or None."""
    model: Model | None = facts.model
    head = anatomy(model).head if model is not None and facts.overlap else None
    # A frozen head has nothing to divide: tasks differ in what they feed to it.
    if model is None or head is None or model.frozen(head.weight):
        return None
    return (
        "its tasks have classes in common and one head, whose rows would stay with the first task and never "
        "train for later ones; use models.multi_head (the default, where no model is given)"
    )


def with_heads(inputs: tuple[int, ...], outputs: int) -> Model:
    """Return the usual net for inputs [B, *inputs], with one head per task."""
    # Rooms of parts do not import one another when they are loaded.
    from consilience.models import fitting, multi_head

    return multi_head(fitting(inputs, outputs), outputs)


def rows_with_units(model: Model) -> str | None:
    """Return why units cannot be gated by the rows of their layers, or None.

    The rows suffice where a_i relu(w_i x + b_i) = relu(a_i w_i x + a_i b_i) with a_i >= 0.
    """
    parts = anatomy(model)
    if parts.others:
        return (
            f"it gates units by the rows of their layers, which norms undo, such as {parts.others[0]!r}; "
            "use a model without norms"
        )
    for name in (*parts.order, *([parts.head.weight] if parts.head else [])):
        before = parts.previous(name)

        # A flattened map gives each of its units several inputs of the next layer.
        if before and parts.shapes[name][1] % parts.shapes[before][0]:
            return (
                f"it gates units of layers in a chain, and the inputs of {name!r} are not the units of "
                f"{before!r}; use mlp or conv"
            )
    return None


def spread(layout: Layout, factors: Mapping[str, Tensor]) -> Tensor:
    """Return factors [n] in a layout; 1 for the entries that are not named."""
    ones = {
        name: torch.ones(shape, dtype=layout.dtype, device=layout.device)
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }
    return layout.flatten({**ones, **factors})


def own_entries(
    model: Model, params: Params, sources: tuple[Source, ...], taken: frozenset[int]
) -> dict[str, Tensor]:
    """Return factors by entry that isolate the heads.

    In a shared head: 1 for the rows of these sources that no other task took, 0 for the others. 0 for the
    heads of other tasks. Entries that are not named may train.
    """
    factors: dict[str, Tensor] = {}
    head, keys = anatomy(model).head, {model.head_key(source) for source in sources}
    free = sorted({label for source in sources for label in source.classes} - taken)
    for name in head.entries if head else ():
        factors[name] = torch.zeros_like(params[name])
        factors[name][free] = 1

    # Weight decay and momentum would move heads that no loss reaches.
    for name, p in params.items():
        task = model.task_of(name)
        if task is not None and task not in keys:
            factors[name] = torch.zeros_like(p)
    return factors
