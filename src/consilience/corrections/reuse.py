"""Reuse: the head of a new task begins with the rows of similar classes that were learned before, by anybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.message import Module
from consilience.core.source import Label, Source

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

Rows = dict[Label, tuple[Tensor, Tensor]]
"""The weight [d] and the bias [] of each class."""

CHUNK = 256


@dataclass(frozen=True)
class HeadReuse(Correction):
    """The rows of a new head begin as those of the most similar old class: w_c = w_o, b_c = b_o, as they are; the others at random.

    "name": o is the class whose name is the most alike (`skill.similarities`), if it is so at least to `threshold` (None: 0.9).
    "features": the agent predicts up to `shots` training images of the class, through its mapper and the heads it has; o is the
    class that most of them fall to, if at least the share `threshold` does (None: 0.5). Old classes are those of the modules in
    the bank (the consolidator `Experts`), own and heard. Of equal ones the first by (sender, source) is taken, of equally many answers
    the first by its column. A head that was trained goes on as it is.

    Args:
        by: "name" or "features".
        threshold: in (0, 1]; None takes what is said above.
        shots: images of a class, drawn by the seed.
        encoder: for names, as `skill.similarities` takes it.

    Refuses models without a head for each task, and names where classes have none (scenario "domain" over tasks of different classes), and heads without modules of them in a bank.

    Paper: Ge et al. 2023, section 7.2; by features its future work.

    >>> HeadReuse("features", shots=5)
    HeadReuse(by='features', threshold=None, shots=5, encoder=None)
    """

    needs_history: ClassVar[bool] = True

    by: Literal["name", "features"] = "name"
    threshold: float | None = None
    shots: int = 10
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.by not in ("name", "features"):
            raise ConsilienceError(f"`by` should be name or features. Found `by = {self.by!r}`.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ConsilienceError(f"`threshold` should be in (0, 1]. Found `threshold = {self.threshold}`.")
        if isinstance(self.shots, bool) or not isinstance(self.shots, int) or self.shots < 1:
            raise ConsilienceError(f"`shots` should be at least 1. Found `shots = {self.shots!r}`.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        """It needs heads of tasks."""
        from consilience.models.heads import MultiHead

        if facts.model is not None and not isinstance(facts.model, MultiHead):
            return "it sets the rows of a new task's own head, and the model has none; use models.multi_head"
        return None

    def begin(self, start: Beginning) -> Begun:
        """The parameters with rows of new heads set."""
        before = sorted(n for n in start.params if n.startswith("heads.") and n not in start.grown)
        if before and not start.experts:
            raise Refusal(
                f"rows are reused from modules of a bank (methods.skill). Found heads, such as {before[0]!r}, and no module."
            )
        old: Rows = {}
        for _, m in sorted(start.experts.items()):
            for label, row in rows_of(m).items():
                old.setdefault(label, row)
        params = dict(start.params)
        for s in start.sources:
            weight, bias, columns = _head(start, s)
            if weight not in start.grown:  # it was trained
                continue
            chosen = self.matches(start, s, list(old))
            w, b = params[weight].clone(), params[bias].clone()
            for i, label in enumerate(s.labels[c] for c in columns):
                if label in chosen and old[chosen[label]][0].shape == w[i].shape:
                    w[i], b[i] = (t.to(w) for t in old[chosen[label]])
            params |= {weight: w, bias: b}
        return Begun(params)

    def matches(self, start: Beginning, source: Source, old: list[Label]) -> dict[Label, Label]:
        """The old class of each class of a source that has one."""
        if not old:
            return {}
        new = [source.labels[c] for c in source.classes]
        if self.by == "name":
            return self._by_name(new, old)
        return self._by_features(start, source, set(old))

    def _by_name(self, new: list[Label], old: list[Label]) -> dict[Label, Label]:
        from consilience.skill import similarities

        if any(space == "domain" for space, _ in new):
            raise Refusal(
                "rows are reused by the names of classes. Found columns without, in scenario 'domain'; use by='features'."
            )
        alike = similarities([name for _, name in new], [name for _, name in old], self.encoder)
        limit = 0.9 if self.threshold is None else self.threshold
        best = [(float(row.max()), int((row >= row.max()).nonzero()[0])) for row in alike]
        return {label: old[at] for label, (most, at) in zip(new, best, strict=True) if most >= limit - 1e-6}

    def _by_features(self, start: Beginning, source: Source, old: set[Label]) -> dict[Label, Label]:
        if start.predict is None:
            return {}
        targets, limit, found = (
            source.train.targets().cpu(),
            0.5 if self.threshold is None else self.threshold,
            {},
        )
        index = []
        for c in source.classes:
            own = (targets == c).nonzero()[:, 0]
            index.append(own[torch.randperm(len(own), generator=start.generator)[: self.shots]])
        images = source.train.select(torch.cat(index))
        p = torch.cat([start.predict(x).cpu() for x, _ in images.chunks(CHUNK)])
        p = p * torch.tensor([label in old for label in source.labels])
        for c, own in zip(source.classes, p.split([len(i) for i in index]), strict=True):
            answered = own[own.sum(1) > 0].argmax(1)
            votes = torch.bincount(answered, minlength=p.shape[1])
            if len(own) and int(votes.max()) >= limit * len(own) - 1e-9:
                found[source.labels[c]] = source.labels[int((votes == votes.max()).nonzero()[0])]
        return found


def rows_of(m: Module) -> Rows:
    """The row of each class of a module's head; none where it has no head of its own."""
    entries, buffers, found = m.group("entries"), m.group("buffers"), {}
    for name, columns in buffers.items():
        at = name.removesuffix(".columns")
        if at != name and f"{at}.weight" in entries and f"{at}.bias" in entries:
            for i, c in enumerate(columns.tolist()):
                found[m.labels[c]] = (entries[f"{at}.weight"][i], entries[f"{at}.bias"][i])
    return found


def _head(start: Beginning, source: Source) -> tuple[str, str, list[int]]:
    """The entries of a source's head, and which outputs its rows are."""
    key = start.model.head_key(source)
    for name, columns in start.buffers.items():
        at = name.removesuffix(".columns")
        if at != name and f"{at}.weight" in start.params and start.model.task_of(f"{at}.weight") == key:
            return f"{at}.weight", f"{at}.bias", columns.tolist()
    raise Refusal(
        f"rows are reused between heads of tasks. Found no head for {source.name!r}; use models.multi_head."
    )
