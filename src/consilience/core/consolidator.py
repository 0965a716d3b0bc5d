"""Consolidators: how what was heard enters an agent's state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from consilience.core.errors import Refusal
from consilience.core.message import Message, Shared
from consilience.core.source import Source
from consilience.core.state import State

if TYPE_CHECKING:
    from consilience.core.model import Model
    from consilience.core.schedule import ScheduleFacts


class Consolidator(ABC):
    """(state, fresh messages) -> state, pure; fresh are those whose version rose since this agent last absorbed, sorted by (sender, source)."""

    needs_base: ClassVar[bool] = False
    """Whether what is heard must have started from the hearer's own `base`."""

    @abstractmethod
    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        """The state after hearing; `by_size` weights messages by their number of examples, else equally."""

    @abstractmethod
    def export(
        self, model: Model, state: State, sources: Sequence[Source], personal: Sequence[str]
    ) -> dict[str, Shared]:
        """What an agent tells of itself: {source name, or "" for the whole: the "model" item}."""

    def forget(self, model: Model, state: State) -> State:
        """The state after messages were taken out of its bank, as if they had never been heard; Refusal where that cannot be."""
        raise Refusal(
            f"what {type(self).__name__} combined cannot be taken out again; train again without that sender."
        )

    def release(self, state: State, personal: Sequence[str]) -> State:
        """What an agent must keep until it hears again, from one whom it told all it has: by default everything."""
        return state

    def refuse(self, facts: ScheduleFacts) -> str | None:
        """Why it cannot work in such a schedule and what to do instead, or None."""
        return None
