"""Reuse: a new task's head begins with the rows of similar classes that any agent trained before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch

from consilience.core.contexts import Beginning, Begun
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.shares import exact_share
from consilience.core.source import Label, Source
from consilience.corrections.similarity import Rows, rows_of, similarities

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

CHUNK = 256
"""How many images are predicted at once."""


class Head(NamedTuple):
    """The names of a head's entries, and the output column of each of its rows."""

    weight: str
    bias: str
    columns: list[int]


@dataclass(frozen=True)
class HeadReuse(Correction):
    """The rows of a new head begin as those of the most similar old class: w_c = w_o, b_c = b_o.

    The rows are taken without change; classes without a similar one begin at random.

    - "name": o is the class with the most similar name (`skill.similarities`), if it is at least `threshold`
      (None: 0.9).
    - "features": the agent predicts up to `shots` training images of the class, through its mapper and the
      heads it has; o is the class that most of them fall to, if at least the share `threshold` does (None:
      0.5).

    Old classes are those of the modules in the bank (the consolidator `Experts`), own and received. Of equal
    ones the first by (sender, source) is taken, of equally many answers the first by its column. A head that
    was trained before is not changed.

    Args:
        by: "name" or "features".
        threshold: in (0, 1]; None is the default of `by` above.
        shots: images per class, drawn by the seed.
        encoder: for names, as `skill.similarities` takes it.

    Refuses models without a head for each task, names where classes have none (scenario "domain" over tasks
    of different classes), and heads without modules of them in a bank.

    Paper: Ge et al. 2023, section 7.2; by features its future work.

    >>> HeadReuse("features", shots=5)
    HeadReuse(by='features', threshold=None, shots=5, encoder=None)
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False
    needs_history: ClassVar[bool] = True

    by: Literal["name", "features"] = "name"
    threshold: float | None = None
    shots: int = 10
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.by not in ("name", "features"):
            raise ConsilienceError(f"`by` must be name or features, got {self.by!r}.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ConsilienceError(f"`threshold` must be in (0, 1], got {self.threshold}.")
        if isinstance(self.shots, bool) or not isinstance(self.shots, int) or self.shots < 1:
            raise ConsilienceError(f"`shots` must be a whole number >= 1, got {self.shots!r}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        """Refuse models that have no heads of tasks."""
        from consilience.models.heads import MultiHead

        if facts.model is not None and not isinstance(facts.model, MultiHead):
            return "it sets the rows of a new task's own head, and the model has none; use models.multi_head"
        return None

    def begin(self, start: Beginning) -> Begun:
        """Return the parameters with rows of new heads set."""
        before = sorted(n for n in start.params if n.startswith("heads.") and n not in start.grown)
        if before and not start.experts:
            raise Refusal(
                "rows are reused from modules of a bank, and there are heads "
                f"(such as {before[0]!r}) but no module; use methods.skill."
            )
        old: Rows = {}
        # Sorted, so that it does not matter who sent first; the first of equal labels stays.
        for _, module in sorted(start.experts.items()):
            for label, row in rows_of(module).items():
                old.setdefault(label, row)

        params = dict(start.params)
        for source in start.sources:
            head = _head(start, source)
            # A head that did not grow now was trained before.
            if head.weight not in start.grown:
                continue
            chosen = self.matches(start, source, list(old))
            weight, bias = params[head.weight].clone(), params[head.bias].clone()
            for i, label in enumerate(source.labels[c] for c in head.columns):
                # Experts on another backbone may have features of another size.
                if label in chosen and old[chosen[label]].weight.shape == weight[i].shape:
                    weight[i], bias[i] = (t.to(weight) for t in old[chosen[label]])
            params |= {head.weight: weight, head.bias: bias}
        return Begun(params)

    def matches(self, start: Beginning, source: Source, old: list[Label]) -> dict[Label, Label]:
        """Return the old class of each class of a source that has one."""
        if not old:
            return {}
        if self.by == "features":
            return self._by_features(start, source, set(old))
        return self._by_name([source.labels[c] for c in source.classes], old)

    def _by_name(self, new: list[Label], old: list[Label]) -> dict[Label, Label]:
        """Match classes by the similarity of their names."""
        if any(space == "domain" for space, _ in new):
            raise Refusal(
                "rows are reused by the names of classes, and columns of scenario 'domain' have no names; "
                "use by='features'."
            )
        alike = similarities([name for _, name in new], [name for _, name in old], self.encoder)
        threshold = 0.9 if self.threshold is None else self.threshold
        chosen = {}
        for label, row in zip(new, alike, strict=True):
            first = int((row >= row.max()).nonzero()[0])
            # Similarities are in float32: one of exactly the threshold may be a little below.
            if float(row.max()) >= threshold - 1e-6:
                chosen[label] = old[first]
        return chosen

    def _by_features(self, start: Beginning, source: Source, old: set[Label]) -> dict[Label, Label]:
        """Match each class with the old class that most of its images are predicted as."""
        if start.predict is None:
            return {}
        targets = source.train.targets().cpu()
        index = []
        for c in source.classes:
            own = (targets == c).nonzero()[:, 0]
            # A few images are enough for a majority.
            index.append(own[torch.randperm(len(own), generator=start.generator)[: self.shots]])
        images = source.train.select(torch.cat(index))

        # Only old classes may be chosen; an image for which none has any probability answers nothing.
        p = torch.cat([start.predict(x).cpu() for x, _ in images.chunks(CHUNK)])
        p = p * torch.tensor([label in old for label in source.labels])
        threshold = 0.5 if self.threshold is None else self.threshold
        chosen = {}
        for c, answers in zip(source.classes, p.split([len(i) for i in index]), strict=True):
            votes = torch.bincount(answers[answers.sum(1) > 0].argmax(1), minlength=p.shape[1])
            if len(answers) and int(votes.max()) >= exact_share(threshold, len(answers)):
                first = int((votes == votes.max()).nonzero()[0])
                chosen[source.labels[c]] = source.labels[first]
        return chosen


def _head(start: Beginning, source: Source) -> Head:
    """Return the head of a source's task."""
    key = start.model.head_key(source)
    for name, columns in start.buffers.items():
        head = name.removesuffix(".columns")
        weight = f"{head}.weight"
        if head != name and weight in start.params and start.model.task_of(weight) == key:
            return Head(weight, f"{head}.bias", columns.tolist())
    raise Refusal(
        f"rows are reused between heads of tasks, and {source.name!r} has no head; use models.multi_head."
    )
