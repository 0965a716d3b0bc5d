"""Sums of features: the statistics behind ridge heads, nearest means, LDA and Mahalanobis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory
from consilience.core.correction import Correction
from consilience.core.message import Message, Statistics
from consilience.core.outliers import Clip, checked_clip
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.tree import Input

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True)
class Moments(Correction):
    """Send A = sum psi psi^T [d+1, d+1], b = sum psi e_y^T [d+1, C] and n_c [C], in float64.

    psi are the features and a one. The sums add over sources, batches and clients; subtracting a client's
    sums removes it exactly. They can leak rare samples: they are not private. Samples without a target
    are left out. With `clip` features farther from the median of their source than `clip` times the median
    distance are moved to that distance.

    With `gathers` the first visit to a source only sends its sums: nothing is trained. Later visits train,
    and send none, as the features have moved.
    """

    clip: float = 0.0
    gathers: bool = False

    kinds: ClassVar[tuple[str, ...]] = ("class", "value")
    takes_places: ClassVar[bool] = False
    takes_mixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checked_clip(self.clip)

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if self.gathers and not facts.revisited:
            return (
                "no source is trained on again after its sums were sent, so that nothing would follow; use "
                "several rounds, or fed3r alone"
            )
        return None

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> bool | None:
        """Return True where the sums of all these sources were sent, and are enough; else None."""
        known = {source for _, source in memory}
        return True if self.gathers and all(source.name in known for source in sources) else None

    def begin(self, start: Beginning) -> Begun:
        waits = self.gathers and not start.recalled
        return Begun(start.params, frozen=tuple(start.params) if waits else ())

    def summarise(self, learned: Learned, ctx: Context) -> Statistics | None:
        if self.gathers and ctx.recalled:
            return None

        def features_of(x: Input) -> Tensor:
            return learned.model.features(learned.params, learned.buffers, x, learned.task).double()

        clip = None
        if self.clip:
            with torch.no_grad():
                every = [features_of(x) for x, _ in learned.source.train.chunks(1024)]
            clip = Clip.of(torch.cat(every), self.clip)

        def psi(x: Input) -> Tensor:
            features = features_of(x)
            features = features if clip is None else clip(features)
            # The one makes the bias a row of the ridge solution.
            return torch.cat([features, features.new_ones(len(features), 1)], 1)

        return Statistics(learned.sums(psi))

    def refuse_message(self, message: Message, params: Params) -> str | None:
        """Return why sums do not belong to each other, or None."""
        item = message.items.get(self.name)
        if item is None:
            return None
        missing = [name for name in ("second", "first", "count") if name not in item.tensors]
        if missing:
            return f"sums must have `second`, `first` and `count`, got no `{missing[0]}`"
        first, second = item.tensors["first"], item.tensors["second"]
        if first.dim() != 2 or second.shape != (len(first), len(first)):
            return (
                "sums must be of [d + 1, d + 1] and [d + 1, C], got "
                f"{tuple(second.shape)} and {tuple(first.shape)}"
            )
        return None
