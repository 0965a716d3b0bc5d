"""Classes of different tasks that mean the same, and tasks that are made of old classes."""

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
    """Which classes of different tasks mean the same; also a metric for `run`.

    As a metric it counts a prediction as right if its class means the same as the true one. `same` [C, C] is
    symmetric with a true diagonal; `found` has the pairs (i, j, similarity) with i < j.
    """

    labels: tuple[Label, ...]
    same: Tensor
    found: tuple[tuple[int, int, float], ...]
    __name__ = "corrected_accuracy"
    higher = True

    def __call__(self, p: Tensor, y: Tensor) -> float:
        """Return the fraction of predictions p [N, C] whose class is y [N] or equivalent to it.

        A row of zeros is no answer, and counts as wrong.
        """
        answered = p.sum(1) > 0
        return float((self.same[p.argmax(1), y] & answered).double().mean())

    def pairs(self) -> list[tuple[Label, Label, float]]:
        """Return the equivalent classes with their similarity, the most similar first."""
        order = sorted(self.found, key=lambda found: (-found[2], found[:2]))
        return [(self.labels[i], self.labels[j], similarity) for i, j, similarity in order]


def equivalences(
    labels: LabelFrame | Sequence[Label], threshold: float = 0.9, encoder: Encoder = None
) -> Equivalences:
    """Find classes of different tasks with similar names: i ~ j iff task_i != task_j and s_ij >= threshold.

    The relation is between pairs, as in the paper: two classes that are similar to a third are not united.
    Two classes of one task are never the same. As `metric` of `run` it corrects answers: "bike" of one data
    set, predicted for a "bicycle" of another, counts as right.

    Args:
        labels: a schedule's `frame`, which has the tasks; or the labels in the order of the output columns,
            and then each label space is a task.
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
        raise ConsilienceError(f"`threshold` must be in (0, 1], got {threshold}.")
    known = labels.labels if isinstance(labels, LabelFrame) else labels
    columns = tuple((str(space), str(name)) for space, name in known)
    if not columns:
        raise ConsilienceError("`labels` must have at least one label, got none.")
    tasks = tasks_by_column(labels, columns)

    names = [name for _, name in columns]
    similarity = similarities(names, names, encoder)
    same = torch.eye(len(columns), dtype=torch.bool)
    found = []
    # The similarities are float32, and a threshold of 0.9 is not one of its numbers.
    for i, j in (similarity >= threshold - 1e-6).triu(1).nonzero().tolist():
        if not tasks[i] & tasks[j]:
            same[i, j] = same[j, i] = True
            found.append((i, j, float(similarity[i, j])))
    return Equivalences(columns, same, tuple(found))


def tasks_by_column(labels: LabelFrame | Sequence[Label], columns: Sequence[Label]) -> list[set[str]]:
    """Return the tasks that each output column belongs to."""
    if not isinstance(labels, LabelFrame):
        return [{space} for space, _ in columns]

    # A column belongs to several tasks if they share its class.
    tasks: list[set[str]] = [set() for _ in columns]
    for task, task_columns in labels.tasks.items():
        for column in task_columns:
            tasks[column].add(task)
    return tasks


def combine(modules: Mapping[Any, Module] | Iterable[Module], labels: Sequence[Label], name: str) -> Module:
    """Make a module for a new task of old classes: their rows w_c / ||w_c||_inf, and their biases.

    Heads that were trained with that division (`multi_head(norm="inf")`) keep the logit of each class; others
    lose its scale. If several modules have a class, the first is taken. To continue training from the rows of
    another task, use the correction `HeadReuse`.

    Args:
        modules: heads on one frozen backbone, such as `agent.state.experts`.
        labels: (label space, class name) of each class of the new task, in its order.
        name: of the new task.

    Returns:
        A Module that answers `labels`; `Message` takes it as its item "model".

    Raises ConsilienceError for a class that no module has, for modules with more entries than a head, or with
    different backbones.

    Paper: Ge et al. 2023, section 7.2.

    >>> def head(task, *classes):
    ...     at, count = f"heads.{task}", len(classes)
    ...     held = {f"entries/{at}.weight": torch.tensor([[2.0, -4.0]] * count)}
    ...     held |= {f"entries/{at}.bias": torch.ones(count), f"buffers/{at}.columns": torch.arange(count)}
    ...     labels = [[task, name] for name in classes]
    ...     return Module(held, {"labels": labels, "classes": [*range(count)], "task": task, "backbone": ""})
    >>> pets, cars = head("pets", "cat", "dog"), head("cars", "van")
    >>> both = combine([pets, cars], [("pets", "dog"), ("cars", "van")], "mix")
    >>> both.tensors["entries/heads.mix.weight"], both.task
    (tensor([[ 0.5000, -1.0000],
        [ 0.5000, -1.0000]]), 'mix')

    It has no anchor: an agent that receives the task with each input uses it, and one that routes by anchors
    refuses it.

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
    # Labels come from users, who may write a class as a number.
    wanted = [(str(space), str(name)) for space, name in labels]
    if not given or not wanted or len(set(wanted)) < len(wanted):
        raise ConsilienceError(
            "a new task must be made of at least one module and of different classes, got "
            f"{len(given)} modules and {wanted[:4]}."
        )
    backbone, form = common_base(given)

    # Of several rows for one class the first is kept.
    rows: Rows = {}
    for module in given:
        for label, row in head_rows(module).items():
            rows.setdefault(label, row)
    missing = next((label for label in wanted if label not in rows), None)
    if missing is not None:
        raise ConsilienceError(
            f"classes of the new task must be those of modules, got {missing}, which no module has."
        )

    weight = torch.stack([rows[label].weight for label in wanted])
    norm = weight.abs().amax(1, keepdim=True)
    # Names of entries have dots between modules, so a task's name may have none.
    head, count = f"heads.{name.replace('.', '_')}", len(wanted)
    tensors = {
        f"entries/{head}.weight": weight / torch.where(norm > 0, norm, torch.ones_like(norm)),
        f"entries/{head}.bias": torch.stack([rows[label].bias for label in wanted]),
        f"buffers/{head}.columns": torch.arange(count),
    }
    facts = {
        "labels": [list(label) for label in wanted],
        "classes": list(range(count)),
        "task": name,
        "backbone": backbone,
        "form": form,
    }
    return Module(tensors, facts)


def common_base(modules: Sequence[Module]) -> tuple[str, str]:
    """Return the backbone and the form of modules; refuse modules that differ in one of them."""
    backbones = {module.meta["backbone"] for module in modules}
    if len(backbones) > 1:
        got = ", ".join(sorted(backbone[:8] for backbone in backbones))
        raise ConsilienceError(f"modules to combine must have one backbone, got {got}.")
    forms = {module.meta.get("form", "") for module in modules}
    if len(forms) > 1:
        # A module without a form has rows that are used as they are.
        got = ", ".join(form or "rows as they are" for form in sorted(forms))
        raise ConsilienceError(f"modules to combine must have one form, got {got}.")
    return backbones.pop(), forms.pop()


def head_rows(module: Module) -> Rows:
    """Return the weight [d] and the bias [] of each class of a module that is one head."""
    # Adapters and biases would be lost, and the head with them would answer otherwise.
    rows, entries = rows_of(module), module.group("entries")
    if not rows or len(entries) > 2:
        others = sorted(name for name in entries if not name.startswith("heads."))[:2]
        raise ConsilienceError(
            f"modules to combine must have a head and nothing else, got {others or 'no head'} in that of "
            f"{module.task!r}."
        )
    return rows
