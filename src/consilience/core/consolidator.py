"""Consolidators: how received messages enter an agent's state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from consilience.core.errors import Refusal
from consilience.core.message import Message, Shared
from consilience.core.source import Source
from consilience.core.state import State
from consilience.core.takes import Takes

if TYPE_CHECKING:
    from consilience.core.model import Model
    from consilience.core.schedule import ScheduleFacts


class Consolidator(Takes, ABC):
    """(state, fresh messages) -> state, without side effects. Subclasses are frozen dataclasses.

    Fresh messages are those with a newer version than this agent had, sorted by (sender, source).
    """

    instead: ClassVar[str] = "use fedavg"
    needs_base: ClassVar[bool] = False
    """Whether senders must have started from the receiver's own `base`, so that deltas can be computed."""
    asks: ClassVar[bool] = False
    """Whether it only asks senders for answers, so that they may have models of any kind."""

    @abstractmethod
    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        """Return the state after an exchange.

        `by_size` weights messages by their number of examples, else equally. The bank of `state` has the
        fresh messages already.
        """

    @abstractmethod
    def export(
        self, model: Model, state: State, sources: Sequence[Source], personal: Sequence[str]
    ) -> dict[str, Shared]:
        """Return the "model" items that the agent sends, by source.

        With `sources`, after a visit: the experts for them, by name, or nothing. Without, at an exchange: the
        agent's own parameters under `names.WHOLE`, or nothing. Entries that match `personal` stay.
        """

    def check_message(self, model: Model, state: State, message: Message) -> None:
        """Refuse, by ConsilienceError, a message that it could not consolidate, whatever comes with it.

        Called once for each message before `receive`. Used by `WeightSpace` and `Experts`.
        """
        return None

    def among(self, total: float | None) -> Consolidator:
        """Return it for an exchange in which all agents that may send weigh `total` together.

        The weights are numbers of examples or 1 each, as `by_size` says; None: those that send are all.
        FedDyn's server counts those that do not. Default: itself.
        """
        return self

    def informed(self, facts: ScheduleFacts) -> Consolidator:
        """Return it for a schedule with these facts, of which it may keep what it needs to receive.

        Ex-model distillation keeps which classes each sender knows. Default: itself.
        """
        return self

    def forget(self, model: Model, state: State) -> State:
        """Return the state as if the messages that were taken out of its bank had never come.

        Raises Refusal where that is impossible.
        """
        # Most combinations cannot be undone, so those that can must say how.
        raise Refusal(
            f"what {type(self).__name__} combined cannot be taken out again; train again without that sender."
        )

    def release(self, state: State, personal: Sequence[str]) -> State:
        """Return the part of the state to keep in memory until the next exchange.

        It is called only where the agent has sent everything and receives it again before it is used.
        Default: all.
        """
        return state

    def refuse(self, facts: ScheduleFacts) -> str | None:
        """Return why it cannot work in such a schedule and what to do instead, or None."""
        return None
