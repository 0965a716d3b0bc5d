"""What consolidators have in common that only ask received models for answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from consilience.core.consolidator import Consolidator
from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Shared, Weights, check_numbers
from consilience.core.model import Model
from consilience.core.schedule import ScheduleFacts, SenderFacts
from consilience.core.source import Source
from consilience.core.state import State
from consilience.core.teacher import Teacher
from consilience.core.weight_space import WeightSpace

WEIGHTS = WeightSpace()
"""How whole models are sent, freed, and adopted from a server that broadcasts."""


@dataclass(frozen=True)
class Asking(Consolidator):
    """A consolidator that asks received models, of any architecture, and never combines their parameters."""

    asks: ClassVar[bool] = True
    facts: ScheduleFacts | None = field(default=None, repr=False, compare=False, kw_only=True)
    """Those of the schedule, as `informed` keeps them."""

    def informed(self, facts: ScheduleFacts) -> Self:
        return replace(self, facts=facts)

    def export(
        self, model: Model, state: State, sources: Sequence[Source], personal: Sequence[str]
    ) -> dict[str, Shared]:
        return WEIGHTS.export(model, state, sources, personal)

    def release(self, state: State, personal: Sequence[str]) -> State:
        return WEIGHTS.release(state, personal)

    def check_message(self, model: Model, state: State, message: Message) -> None:
        """Refuse what is no model, or not the one that the schedule says its sender has."""
        item, whose = message.items.get("model"), message.whose
        # What a server broadcasts is adopted.
        if not isinstance(item, Weights) or not message.trained:
            WEIGHTS.check_message(model, state, message)
            return

        # A sender without a model of its own has the receiver's.
        own = self.sender(message.sender).model
        params, buffers = (own or model).init(torch.Generator().manual_seed(0))
        check_numbers(item, buffers, whose)
        backbone = item.meta.get("backbone", "")
        if own is None and backbone != state.frozen.hash:
            raise ConsilienceError(
                "an expert must belong to the receiver's frozen entries "
                f"{state.frozen.hash[:8] or '(none)'}, got {backbone[:8] or '(none)'} in {whose}."
            )
        for group, wanted in (("params", params), ("buffers", buffers)):
            sent = item.group(group)
            for name, like in wanted.items():
                if name not in sent and own is None and name in state.frozen:
                    continue
                if name not in sent or sent[name].shape != like.shape:
                    got = tuple(sent[name].shape) if name in sent else "none"
                    raise ConsilienceError(
                        f"an expert must have all entries of its model, {name!r} {tuple(like.shape)} too, "
                        f"got {got} in {whose}."
                    )

    def sender(self, name: str) -> SenderFacts:
        """Return what the schedule says of a sender."""
        known = self.facts.senders if self.facts is not None else {}
        if name not in known:
            raise ConsilienceError(
                f"which classes an expert knows must be in the schedule, and nothing is of {name!r}; use it "
                "in a run of a schedule with this expert."
            )
        return known[name]

    def teacher(self, model: Model, state: State, message: Message, device: torch.device) -> Teacher:
        """Return a received model as a teacher."""
        sender, item = self.sender(message.sender), message.items["model"]
        # Frozen entries of the run's model are in no message.
        frozen = state.frozen if sender.model is None else None
        params = {**(frozen.params if frozen else {}), **item.group("params")}
        buffers = {**(frozen.buffers if frozen else {}), **item.group("buffers")}
        return Teacher(
            name=message.sender,
            model=sender.model or model,
            params={name: p.to(device) for name, p in params.items()},
            buffers={name: b.to(device) for name, b in buffers.items()},
            classes=sender.classes,
            outputs=sender.outputs,
            task=sender.task,
        )


def is_trained(model: Model, name: str, entry: Tensor) -> bool:
    """Whether an entry of the receiver is trained."""
    return entry.is_floating_point() and not model.frozen(name)
