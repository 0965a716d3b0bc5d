"""Normalised averaging: changes count per local step, so that more steps do not weigh more."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Weights
from consilience.core.model import Model
from consilience.core.schedule import ScheduleFacts
from consilience.core.state import State
from consilience.core.weight_space import WeightSpace, message_weights, with_weights


@dataclass(frozen=True)
class Normalised(WeightSpace):
    """FedNova: theta <- base - tau_eff sum_i p_i (base - theta_i) / tau_i with tau_eff = sum_i p_i tau_i.

    Then comes the outer step. tau_i is the number of steps that agent i took, sent by the correction
    `LocalSteps`; p_i its share of the examples. So the coefficients of the average are p_i tau_eff / tau_i.
    Any aggregator works: each theta_i is first moved to base + (tau_eff / tau_i) (theta_i - base), and stays
    as it is if all tau are equal. With a robust one tau_eff is the median of tau, which one sender's claim
    does not move. Raises ConsilienceError for trained parameters without a positive number of steps.
    Wang et al. 2020, arXiv:2007.07481.
    """

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        return True

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return "it normalises by local steps, and here only trained models are given; use average"
        if facts.exchanges and not facts.common_base:
            return (
                "it normalises changes of the receiver's own parameters, but here the senders start from "
                "others; use average"
            )
        return super().refuse(facts)

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        trained = [m for m in with_weights(fresh) if m.trained]
        steps = {
            m.sender: float(m.items["LocalSteps"].tensors["steps"])
            for m in trained
            if "LocalSteps" in m.items
        }
        for message in trained:
            if not 0 < steps.get(message.sender, 0) < math.inf:
                got = steps.get(message.sender) or "none"
                raise ConsilienceError(
                    f"received parameters need their number of steps, got {got} from {message.sender!r}; all "
                    "senders must use fednova."
                )

        if not trained:
            return super().receive(model, state, fresh, by_size, generator)
        if len(set(steps.values())) == 1:
            # Exactly their common number, so that factors are 1 and parameters stay as they are.
            effective = next(iter(steps.values()))
        elif self.robust:
            effective = statistics.median(steps.values())
        else:
            weights = message_weights(trained, by_size)
            own = [weight * steps[m.sender] for weight, m in zip(weights, trained, strict=True)]
            effective = sum(own) / sum(weights)
        scaled = [
            self._scaled(model, m, state, effective / steps[m.sender]) if m in trained else m for m in fresh
        ]
        return super().receive(model, state, scaled, by_size, generator)

    @staticmethod
    def _scaled(model: Model, message: Message, state: State, factor: float) -> Message:
        """Move the parameters of a message to base + factor (theta - base)."""
        # To the bit: lerp would round even at a factor of 1.
        if factor == 1:
            return message
        tensors = dict(message.items["model"].tensors)
        for key, values in tensors.items():
            name = key.removeprefix("params/")
            base = state.base.get(name)
            # Entries of one task, and those that the receiver lacks or refuses later, have no base to start
            # from.
            if (
                key.startswith("params/")
                and base is not None
                and model.task_of(name) is None
                and values.is_floating_point()
                and values.shape == base.shape
            ):
                tensors[key] = torch.lerp(base.to(values), values, factor)
        return replace(message, items={**message.items, "model": Weights(tensors)})
