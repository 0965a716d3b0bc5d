"""What tasks have in common: names that mean the same, answers that are right under another name, tasks made of old classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.message import Module
from consilience.core.source import Label, LabelFrame
from consilience.corrections.similarity import Encoder, Rows, rows_of, similarities


@dataclass(frozen=True, eq=False)
class Equivalences:
    """Which classes of different tasks mean the same; a metric for `run`: a prediction is right if its class means what the true one does.

    `same` [C, C] is symmetric with a true diagonal; `found` are the pairs (i, j, similarity) with i < j.
    """

    labels: tuple[Label, ...]
    same: Tensor
    found: tuple[tuple[int, int, float], ...]
    __name__ = "corrected_accuracy"

    def __call__(self, p: Tensor, y: Tensor) -> float:
        """The share of predictions [N, C] whose class is the right one [N] or equivalent to it; a row of zeros answers nothing."""
        answered = p.sum(1) > 0
        return float((self.same[p.argmax(1), y] & answered).double().mean())

    def pairs(self) -> list[tuple[Label, Label, float]]:
        """The equivalent classes, the most alike first."""
        order = sorted(self.found, key=lambda f: (-f[2], f[:2]))
        return [(self.labels[i], self.labels[j], s) for i, j, s in order]


def equivalences(
    labels: LabelFrame | Sequence[Label], threshold: float = 0.9, encoder: Encoder = None
) -> Equivalences:
    """The classes of different tasks whose names are at least `threshold` alike: i ~ j iff task_i != task_j and s_ij >= threshold.

    The relation is between pairs, as in the paper: what is alike to a third class is not united through it. Two classes of one
    task never are the same. As `metric` of `run` it corrects answers: a bike of one data set that is taken for a bicycle of another counts as right.

    Args:
        labels: a schedule's `frame`, which says the tasks, or the labels in the order of the output columns, whose spaces
            then stand for tasks.
        threshold: in (0, 1].
        encoder: as for `similarities`.

    Paper: Ge et al. 2023, section 7.1.

    >>> found = equivalences([("a", "bike"), ("a", "bikes"), ("b", "Bike"), ("b", "van")], 0.8)
    >>> found.pairs()
    [(('a', 'bike'), ('b', 'Bike'), 1.0)]
    >>> p = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    >>> found(p, torch.tensor([0, 0]))
    0.5
    """
    if not 0 < threshold <= 1:
        raise ConsilienceError(f"`threshold` should be in (0, 1]. Found `threshold = {threshold}`.")
    names = (
        labels.labels
        if isinstance(labels, LabelFrame)
        else tuple((str(space), str(name)) for space, name in labels)
    )
    if not names:
        raise ConsilienceError("equivalences should have labels. Found none.")
    tasks: list[set[str]] = [set() for _ in names]
    if isinstance(labels, LabelFrame):
        for task, columns in labels.tasks.items():
            for c in columns:
                tasks[c].add(task)
    else:
        tasks = [{space} for space, _ in names]
    words = [name for _, name in names]
    alike = similarities(words, words, encoder)
    same = torch.eye(len(names), dtype=torch.bool)
    found = []
    for i, j in (alike >= threshold - 1e-6).triu(1).nonzero().tolist():
        if not tasks[i] & tasks[j]:
            same[i, j] = same[j, i] = True
            found.append((i, j, float(alike[i, j])))
    return Equivalences(tuple(names), same, tuple(found))


def combine(modules: Mapping[Any, Module] | Iterable[Module], labels: Sequence[Label], name: str) -> Module:
    """A module for a new task whose classes are a union of old ones: w'_c = w_c / ||w_c||_inf, with their biases, one below the other.

    Heads that were trained through that division (`multi_head(norm="inf")`) keep each class's logit; of others the scale is lost.
    Of classes that several modules have, the first module's is taken. To go on training with another task's rows, as they are, use
    the correction `HeadReuse`.

    Args:
        modules: heads on one frozen backbone, such as `agent.state.experts`.
        labels: (label space, class name) of each class of the new task, in its order.
        name: of the new task.

    Returns:
        A Module that answers `labels`: what `Message` takes as its item "model".

    Raises ConsilienceError for a class that no module has, for modules with more entries than a head, or of different backbones.

    Paper: Ge et al. 2023, section 7.2.

    >>> def head(task, *classes):
    ...     at = f"heads.{task}"
    ...     held = {f"entries/{at}.weight": torch.tensor([[2.0, -4.0]] * len(classes)), f"entries/{at}.bias": torch.ones(len(classes))}
    ...     held[f"buffers/{at}.columns"] = torch.arange(len(classes))
    ...     return Module(held, {"labels": [[task, c] for c in classes], "classes": [*range(len(classes))], "task": task, "backbone": ""})
    >>> both = combine([head("pets", "cat", "dog"), head("cars", "van")], [("pets", "dog"), ("cars", "van")], "mixed")
    >>> both.tensors["entries/heads.mixed.weight"], both.task
    (tensor([[ 0.5000, -1.0000],
        [ 0.5000, -1.0000]]), 'mixed')

    It has no anchor: an agent that is told the task answers with it, and one that routes by anchors refuses it.

    >>> import consilience as cs
    >>> digits = cs.data.split_classes(cs.data.digits(), 5)
    >>> model = cs.models.multi_head(cs.models.random_features(64, 256), 10)
    >>> agent = cs.run(cs.settings.skill([digits]), cs.methods.skill("oracle", head="ridge"), model).agent
    >>> both = combine(agent.state.experts, [("digits", "9"), ("digits", "0")], "mixed")
    >>> cs.skill.give(agent, cs.skill.offer(agent, both))
    >>> x, y = digits[0].test.whole()
    >>> bool((agent.predict(x[y == 0], task="mixed").argmax(1) == 0).float().mean() > 0.9)
    True
    """
    given = list(modules.values()) if isinstance(modules, Mapping) else list(modules)
    wanted = [(str(space), str(c)) for space, c in labels]
    if not given or not wanted or len(set(wanted)) < len(wanted):
        raise ConsilienceError(
            f"a new task should be made of modules and of different classes. Found {len(given)} modules and {wanted[:4]}."
        )
    backbones = {m.meta["backbone"] for m in given}
    if len(backbones) > 1:
        raise ConsilienceError(
            f"modules to combine should stand on one backbone. Found {', '.join(sorted(b[:8] for b in backbones))}."
        )
    forms = {m.meta.get("form", "") for m in given}
    if len(forms) > 1:
        raise ConsilienceError(
            f"modules to combine should be of one form. Found {', '.join(f or 'rows as they are' for f in sorted(forms))}."
        )
    rows: Rows = {}
    for m in given:
        for label, row in head_rows(m).items():
            rows.setdefault(label, row)
    missing = next((label for label in wanted if label not in rows), None)
    if missing is not None:
        raise ConsilienceError(
            f"classes of the new task should be old ones. Found {missing}, which no module has."
        )
    weight = torch.stack([rows[label][0] for label in wanted])
    norm = weight.abs().amax(1, keepdim=True)
    at, n = f"heads.{name.replace('.', '_')}", len(wanted)
    tensors = {
        f"entries/{at}.weight": weight / torch.where(norm > 0, norm, torch.ones_like(norm)),
        f"entries/{at}.bias": torch.stack([rows[label][1] for label in wanted]),
        f"buffers/{at}.columns": torch.arange(n),
    }
    meta = {
        "labels": [list(label) for label in wanted],
        "classes": list(range(n)),
        "task": name,
        "backbone": backbones.pop(),
        "form": forms.pop(),
    }
    return Module(tensors, meta)


def head_rows(m: Module) -> Rows:
    """The weight [d] and the bias [] of each class of a module that is one head."""
    rows, entries = rows_of(m), m.group("entries")
    if not rows or len(entries) > 2:
        found = sorted(n for n in entries if not n.startswith("heads."))[:2]
        raise ConsilienceError(
            f"modules to combine should be a head and no more. Found {found or 'no head'} in that of {m.task!r}."
        )
    return rows
