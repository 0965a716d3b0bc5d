"""Which inputs and targets a part of a method takes: said by class attributes, and checked before a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from consilience.core.losses import KINDS

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

WORDS = {"class": "classes", "value": "values", "labels": "labels"}
"""What targets of each kind are called in errors."""


class Takes:
    """What corrections, consolidators, policies and samplers say of the data that they take. Default: all."""

    kinds: ClassVar[tuple[str, ...]] = KINDS
    """The kinds of targets that it works with."""

    takes_places: ClassVar[bool] = True
    """Whether a sample may have a target for each of several places, such as tokens or pixels."""

    takes_mixed: ClassVar[bool] = True
    """Whether tasks may differ in their kind of targets, their loss or their outputs."""

    takes_trees: ClassVar[bool] = True
    """Whether inputs may have several parts."""

    instead: ClassVar[str] = "use finetune, ewc, lwf or er"
    """What to use where it does not fit."""

    def unfit(self, facts: ScheduleFacts) -> str | None:
        """Return why it does not take the inputs or targets of a schedule, and what to use; or None."""
        name, reason = type(self).__name__, None
        # From what a reader sees first in the data to what is seen last.
        others = [kind for kind in KINDS if kind in facts.kinds and kind not in self.kinds]
        if others:
            wanted = " or ".join(WORDS[kind] for kind in self.kinds)
            reason = f"{name} needs targets that are {wanted}, and here some are {WORDS[others[0]]}"
        elif facts.mixed and not self.takes_mixed:
            reason = (
                f"{name} needs tasks of one kind, with one loss and the same outputs, and here they differ"
            )
        elif facts.places and not self.takes_places:
            reason = f"{name} needs one target per sample, and here each of its places has one"
        elif facts.trees and not self.takes_trees:
            reason = f"{name} needs inputs that are one tensor, and here they have several parts"
        return reason and f"{reason}; {self.instead}"
