"""Normalised averaging: how far each agent went counts, and not how many steps it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Weights
from consilience.core.model import Model
from consilience.core.schedule import ScheduleFacts
from consilience.core.state import State
from consilience.core.weight_space import WeightSpace


@dataclass(frozen=True)
class Normalised(WeightSpace):
    """FedNova: theta <- base - tau_eff sum_i p_i (base - theta_i) / tau_i, tau_eff = sum_i p_i tau_i, then the outer step.

    tau_i is how many steps agent i took, as the correction `LocalSteps` tells; p_i its share of the examples. So the coefficients of the average are
    p_i tau_eff / tau_i, with any aggregator: each theta_i is first put at base + (tau_eff / tau_i) (theta_i - base), as it is where all tau
    are equal. Raises ConsilienceError for what was learned in an unknown number of steps. Wang et al. 2020, arXiv:2007.07481.
    """

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        return True

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.trains:
            return "it normalises by the steps that agents took, and here only trained models are given; use average"
        if facts.exchanges and not facts.common_base:
            return "it normalises steps from the hearer's own parameters, but here what is heard starts from others; use average"
        return super().refuse(facts)

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        learned = [m for m in fresh if m.trained and isinstance(m.items.get("model"), Weights)]
        told = {m.sender: m.items["LocalSteps"].tensors for m in learned if "LocalSteps" in m.items}
        steps = {sender: float(t["steps"]) for sender, t in told.items()}
        for m in learned:
            if not steps.get(m.sender):
                raise ConsilienceError(
                    f"what is heard should come with its number of steps, as fednova tells. Found none of {m.sender!r}."
                )
        sizes = {m.sender: float(max(m.size, 1)) if by_size else 1.0 for m in learned}
        effective = sum(sizes[s] * steps[s] for s in sizes) / sum(sizes.values()) if sizes else 0.0
        if len(set(steps.values())) == 1:
            effective = next(iter(steps.values()))
        heard = [
            self._scaled(model, m, state, effective / steps[m.sender]) if m in learned else m for m in fresh
        ]
        return super().receive(model, state, heard, by_size, generator)

    @staticmethod
    def _scaled(model: Model, m: Message, state: State, factor: float) -> Message:
        """The message with its parameters at base + factor (theta - base)."""
        if factor == 1:
            return m
        tensors = dict(m.items["model"].tensors)
        for k, p in tensors.items():
            base = state.base.get(k.removeprefix("params/"))
            name = k.removeprefix("params/")
            if (
                k.startswith("params/")
                and base is not None
                and model.task_of(name) is None
                and p.is_floating_point()
                and p.shape == base.shape
            ):
                tensors[k] = torch.lerp(base.to(p), p, factor)
        return replace(m, items={**m.items, "model": Weights(tensors)})
