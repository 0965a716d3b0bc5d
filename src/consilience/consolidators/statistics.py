"""Solving statistics: one ridge head from the sums of all agents, whatever the split, order or schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilience.core.checks import positive
from consilience.core.consolidator import Consolidator
from consilience.core.errors import ConsilienceError, Refusal, kind_of
from consilience.core.message import Message, Shared, Statistics
from consilience.core.model import Model, without_shared_head
from consilience.core.params import matches
from consilience.core.ridge import solve
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source
from consilience.core.state import State


def update(
    inverse: Tensor, moment: Tensor, psi: Tensor, hot: Tensor, remove: bool = False
) -> tuple[Tensor, Tensor]:
    """Update P = (A + lambda I)^-1 [d, d] and b [d, C] by examples psi [B, d] with one-hot targets [B, C].

    With `remove` the examples are taken out again. Woodbury: P -+ P psi^T (I +- psi P psi^T)^-1 psi P, at a
    cost of B d^2 in the place of d^3; W = P b. It begins at P = I / lambda, b = 0; a ones column in psi is
    the bias. In float64: errors of a long stream add up, those of sums do not.

    Raises:
        ConsilienceError: examples to remove that were not added before.

    >>> p, b = torch.eye(2).double() / 0.5, torch.zeros(2, 1).double()
    >>> p, b = update(p, b, torch.tensor([[1.0, 1.0]]).double(), torch.ones(1, 1).double())
    >>> (p @ b).flatten().round(decimals=6).tolist()
    [0.4, 0.4]
    """
    sign = -1.0 if remove else 1.0
    ahead = psi @ inverse
    small = torch.eye(len(psi), dtype=psi.dtype, device=psi.device) + sign * (ahead @ psi.T)
    factor, failed = torch.linalg.cholesky_ex(small)
    if failed:
        raise ConsilienceError("examples to remove must have been added before, got some that were not.")
    inverse = inverse - sign * (ahead.T @ torch.cholesky_solve(ahead, factor))
    # Rounding makes the inverse slightly asymmetric, which would grow over a long stream.
    return (inverse + inverse.T) / 2, moment + sign * (psi.T @ hot)


@dataclass(frozen=True)
class ClosedForm(Consolidator):
    """The head W = (A + lambda I)^-1 b that minimises sum ||W^T psi(x) - e_y||^2 + lambda ||W||^2.

    The sum is over all received sources. psi are the model's features, with a ones column; lambda enters
    once. It reads the Statistics of `corrections.Moments` and writes the model's linear head, divided by
    `temperature`. The argmax stays the same; a sharper softmax suits training that continues from it. Fanì et
    al. 2024 (Fed3R); Wang et al. 2022 (SCROLL).

    With `then` the parameters are combined by that consolidator, and where statistics arrive the head gains
    the difference that they make: W(all) - W(those before), from zero at the first. What was trained since
    stays on top of it. It needs `Moments(gathers=True)`, whose senders train only after their first visit.
    """

    strength: float = 0.01
    average: bool = False
    normalise: bool = False
    temperature: float = 1.0
    then: Consolidator | None = None

    def __post_init__(self) -> None:
        positive(strength=self.strength, temperature=self.temperature)
        if not isinstance(self.then, Consolidator | None):
            raise ConsilienceError(f"`then` must be a consolidator or None, got {kind_of(self.then)}.")

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        """Whether `then` needs a base."""
        return self.then is not None and self.then.needs_base

    def export(
        self, model: Model, state: State, sources: Sequence[Source], personal: Sequence[str]
    ) -> dict[str, Shared]:
        if self.then is None:
            return {}
        if any(name is not None and matches(name, personal) for name in model.head(state.params, None)):
            raise Refusal(
                "the head is solved for all clients, and here each keeps its own; leave `personal` out."
            )
        return self.then.export(model, state, sources, personal)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if not facts.exchanges:
            return "statistics are solved when they are received, and no agent receives any here"
        if not facts.trains:
            return "it needs sums over data, and here only trained models are given"
        if facts.model is not None and (why := without_shared_head(facts.model)):
            return why
        if self.then is None:
            return None
        # Heads that were solved from different sums do not average to one solved from all.
        if not facts.star:
            return "training goes on from one head, which a server solves for all; use settings.federated"
        return self.then.unfit(facts) or self.then.refuse(facts)

    def among(self, total: float | None) -> Consolidator:
        return self if self.then is None else replace(self, then=self.then.among(total))

    def release(self, state: State, personal: Sequence[str]) -> State:
        return state if self.then is None else self.then.release(state, personal)

    def check_message(self, model: Model, state: State, message: Message) -> None:
        if self.then is not None:
            self.then.check_message(model, state, message)

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        head = self._solved(state.bank.values())
        if self.then is None:
            return state if head is None else self._moved(model, state, None, head)

        # Clients have sums in the bank, and a server has not: what it sends has its head already.
        clients = {m.sender for m in state.bank.values() if "Moments" in m.items}
        sent = [m for m in fresh if m.trained or m.sender not in clients]
        after = self.then.receive(model, state, sent, by_size, generator) if sent else state
        keys = {m.key for m in fresh if "Moments" in m.items}
        if head is None or not keys or any(not m.trained for m in sent):
            return after
        before = self._solved(m for key, m in state.bank.items() if key not in keys)
        return self._moved(model, after, before, head)

    def forget(self, model: Model, state: State) -> State:
        """Solve again from the remaining sums, as if the others had not been received; zero without any."""
        if self.then is not None:
            return self.then.forget(model, state)
        # The bank no longer holds the forgotten sums; sums cannot be subtracted to the bit.
        head = self._solved(state.bank.values())
        return self._moved(
            model, state, None, torch.zeros(1, 0, dtype=torch.float64) if head is None else head
        )

    def _solved(self, messages: Iterable[Message]) -> Tensor | None:
        """Return the head [d + 1, C] of the sums of these messages, over `temperature`; None without any."""
        total = add_up(m.items["Moments"] for m in messages if "Moments" in m.items)
        if total is None:
            return None
        # From the sums of the complete bank each time: the result does not depend on the order of messages.
        head = solve(
            total.tensors["second"],
            total.tensors["first"],
            self.strength,
            float(total.tensors["count"].sum()),
            self.average,
            self.normalise,
        )
        return head / self.temperature

    @staticmethod
    def _moved(model: Model, state: State, before: Tensor | None, solved: Tensor) -> State:
        """Move the state's head by solved - before [d + 1, C]; without `before` put the solved one there.

        Classes that a solved head lacks are zero.
        """
        weight, bias = model.head(state.params, None)
        params = dict(state.params)
        for name in filter(None, (weight, bias)):
            old = params[name]
            new = torch.zeros_like(old, dtype=torch.float64) if before is None else old.double()
            for sign, head in ((-1, before), (1, solved)):
                # Without any statistics the solution has neither classes nor features.
                if head is not None and head.shape[1]:
                    rows = head[:-1].T if name == weight else head[-1]
                    new[: head.shape[1]] += sign * rows.to(new)
            params[name] = new.to(old.dtype)
        return state.change(params=params)


def add_up(items: Iterable[Shared]) -> Statistics | None:
    """Add up statistics; None if there are none."""
    total: Statistics | None = None
    for item in items:
        if isinstance(item, Statistics):
            total = item if total is None else total + item
    return total
