"""A federated method with state at each client: stay near your own last model.

Run it with `python examples/client_state.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import consilience as cs


@dataclass(frozen=True)
class OwnAnchor(cs.Correction):
    """Stay near where this client's last visit of the source ended: (mu / 2) ||theta - theta_own||^2."""

    mu: float = 0.1
    neutral: ClassVar[dict[str, float]] = {"mu": 0.0}
    shared_items: ClassVar[bool] = False  # what `summarise` returns is Private: it never leaves the client
    needs_revisits: ClassVar[bool] = True  # inactive until `recall` finds an earlier visit of the same source
    flat: ClassVar[tuple[str, ...]] = ("end",)

    def summarise(self, learned: cs.Learned, ctx: cs.Context) -> cs.Private:
        """The parameters at the end of this visit, kept by source."""
        return cs.Private({f"end/{name}": p for name, p in learned.trainable.items()})

    def recall(self, memory: cs.Memory, sources: tuple[cs.Source, ...]) -> cs.Private | None:
        """What this client kept of the same source, or None at the first visit."""
        return next((item for (_, source), item in memory.items() if source == sources[0].name), None)

    def penalty(self, step: cs.StepView, ctx: cs.Context) -> Tensor:
        """A scalar of `step.theta` [n]; `flat` made one vector [n] of what was recalled."""
        return 0.5 * self.mu * (step.theta - ctx.flat["end"]).square().sum()


def own_anchor(mu: float = 0.1) -> cs.Method:
    """FedAvg whose clients stay near their own last models.

    Args:
        mu: strength of the anchor; 0 is FedAvg.
    """
    return cs.Method("own_anchor", (OwnAnchor(mu),))


if __name__ == "__main__":
    print(cs.testing.check(own_anchor()))
    clients = cs.data.dirichlet(cs.data.digits(), 10, alpha=0.1)
    for method in (cs.methods.fedavg(), own_anchor(0.1)):
        schedule = cs.settings.federated(clients, rounds=10)
        print(f"{method.name:10} {cs.run(schedule, method).score:.3f}")
