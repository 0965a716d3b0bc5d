"""Keeping experts: every trained or received module stays as it is, and a mapper routes between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from consilience.core.consolidator import Consolidator
from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.message import Message, Module, Shared
from consilience.core.model import Model
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source
from consilience.core.state import State


def check_meta(module: Module, whose: str) -> None:
    """Refuse a module whose facts are not those of `Experts.export`."""
    meta = module.meta
    labels, classes, task = meta.get("labels"), meta.get("classes"), meta.get("task")
    named = isinstance(labels, Sequence) and all(
        isinstance(label, Sequence) and len(label) == 2 and all(isinstance(part, str) for part in label)
        for label in labels
    )
    if not named or not labels:
        raise ConsilienceError(f"a module must say its labels, got {kind_of(labels)} in {whose}.")
    # Each class is the place of a label.
    counted = isinstance(classes, Sequence) and all(
        isinstance(c, int) and 0 <= c < len(labels) for c in classes
    )
    if not isinstance(classes, Sequence) or not counted or len(set(classes)) < len(classes):
        raise ConsilienceError(
            f"the classes of a module must be places among its {len(labels)} labels, got {kind_of(classes)} "
            f"in {whose}."
        )
    if not isinstance(task, str | None) or not isinstance(meta.get("backbone"), str):
        raise ConsilienceError(f"a module must say its task and backbone, got {kind_of(task)} in {whose}.")


@dataclass(frozen=True)
class Experts(Consolidator):
    """Experts by (sender, source): the agent predicts with its bank; its own parameters do not change.

    A module holds the entries that are not frozen and belong to its task or to none: a head on a frozen
    backbone, or a complete model. A module of another frozen backbone is refused by its hash, one of another
    kind of model by its entries.
    """

    def export(
        self, model: Model, state: State, sources: Sequence[Source], personal: Sequence[str]
    ) -> dict[str, Shared]:
        result: dict[str, Shared] = {}
        for source in sources:
            # Entries without a task serve all tasks, so that a module cannot do without them.
            own = (None, model.head_key(source))
            entries = {
                f"entries/{n}": p
                for n, p in state.frozen.without(state.params).items()
                if model.task_of(n) in own
            }
            buffers = {
                f"buffers/{n}": b
                for n, b in state.frozen.without(state.buffers).items()
                if model.task_of(n) in own
            }
            meta = {
                "labels": [list(label) for label in source.labels],
                "classes": list(source.classes),
                "task": source.task,
                "backbone": state.frozen.hash,
                "form": model.form,
            }
            result[source.name] = Module({**entries, **buffers}, meta)
        return result

    def check_message(self, model: Model, state: State, message: Message) -> None:
        """Refuse what is no module, is of another frozen backbone, or would be run in another form."""
        item, whose = message.items.get("model"), message.whose
        if item is None:
            return
        if not isinstance(item, Module):
            raise ConsilienceError(f"experts must come as modules, got {type(item).__name__} in {whose}.")
        check_meta(item, whose)
        backbone, here = item.meta["backbone"], state.frozen.hash
        if backbone and backbone != here:
            raise ConsilienceError(
                f"a module must belong to this agent's backbone {here[:8]}, got {backbone[:8]} in {whose}."
            )
        form = item.meta.get("form", "")
        if form != model.form:
            raise ConsilienceError(
                f"a module must be run as it was trained, here with {model.form or 'rows as they are'}, got "
                f"{form or 'rows as they are'} in {whose}."
            )
        # Entries that this model would ignore could change what the sender's model computes.
        strange = [n for n in item.group("entries") if not model.reads(n)]
        if strange:
            raise ConsilienceError(
                f"a module must have entries that this model runs, got {strange[0]!r} in {whose}."
            )

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        return state

    def forget(self, model: Model, state: State) -> State:
        """Return the state as it is: experts are read from the bank."""
        return state

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.exchanges:
            return "no agent receives from another here, so that there are no experts to choose from"
        model: Model | None = facts.model
        if model is not None and model.reads_others:
            return (
                "a module has the entries of one task, and networks of this model read those of other tasks; "
                "use models.multi_head or models.mmoe"
            )
        # A model that grows gets its heads with the sources, after this check.
        if model is None or type(model).grow is not Model.grow:
            return None
        if all(model.frozen(n) for n in model.init(torch.Generator().manual_seed(0))[0]):
            return "all entries of the model are frozen: modules would be empty; put models.multi_head on it"
        return None
