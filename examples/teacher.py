"""A teacher of your own: the model as it was before this visit teaches its logits on the new inputs.

Run it with `python examples/teacher.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import consilience as cs


@dataclass(frozen=True)
class OldLogits(cs.Correction):
    """Keep the old answers: strength x mean over samples and classes of (z - z_old)^2, z being logits."""

    strength: float = 0.1
    neutral: ClassVar[dict[str, float]] = {"strength": 0.0}
    needs_history: ClassVar[bool] = True  # before the first visit there is nothing to keep

    def summarise(self, learned: cs.Learned, ctx: cs.Context) -> cs.Statistics:
        """An empty item says that this source was seen; the default `recall` finds it at the next visit."""
        return cs.Statistics({})

    def rows(self, step: cs.StepView, ctx: cs.Context) -> list[cs.Row]:
        """One further objective per part of the step that no correction drew."""
        found = []
        for part, logits in zip(step.parts, step.raw, strict=True):
            if not part.drawn_by:
                old = step.before(part.x, part.task)  # [B, C], without gradient
                found.append(cs.Row(part.mean((logits - old).square().mean(1)), self.strength))
        return found


def old_logits(strength: float = 0.1) -> cs.Method:
    """Distil from the model as it was before the visit.

    Args:
        strength: of the distillation; 0 is plain training.
    """
    return cs.Method("old_logits", (OldLogits(strength),))


if __name__ == "__main__":
    print(cs.testing.check(old_logits()))
    tasks = cs.data.split_classes(cs.data.digits(), 5)
    for method in (cs.methods.finetune(), old_logits(0.3)):
        result = cs.run(cs.settings.continual(tasks, "task"), method, training=cs.Training(epochs=3))
        print(f"{method.name:10} {result.score:.3f}, forgetting {result.forgetting:.3f}")
