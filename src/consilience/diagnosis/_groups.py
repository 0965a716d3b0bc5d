"""Which tasks to train together: groups from how each task acts on the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.losses import NONE
from consilience.core.params import content_hash
from consilience.core.source import Source

Groups = tuple[tuple[str, ...], ...]
"""Names of tasks, each in one group."""
Matrix = Sequence[Sequence[float]]

EXACT = 12
"""The most tasks for which all groupings are compared; of more, groups are joined greedily."""
WEAK = 0.1
"""An association between targets that counts as none (Cohen's small effect)."""
TIE = 1e-12
"""Totals that differ by less are equal, and the larger groups win."""


def best_groups(tasks: Sequence[str], affinity: Matrix) -> Groups:
    """Return the groups of tasks with the largest total affinity.

    A group T counts sum_{j in T} mean_{i in T, i != j} A[i][j], A[i][j] being how much i helps j, and a task
    by itself 0. So tasks that harm each other part. Up to 12 tasks the answer is exact, by a recursion over
    subsets; of more, the two groups that gain most are joined until all would lose. Fifty et al. 2021.

    >>> best_groups("abc", [[0, 2, -1], [1, 0, -1], [-1, -1, 0]])
    (('a', 'b'), ('c',))
    """
    clean = [[value if math.isfinite(value) else 0.0 for value in row] for row in affinity]
    chosen = _exact(clean) if len(tasks) <= EXACT else _greedy(clean)
    return tuple(tuple(tasks[i] for i in group) for group in sorted(chosen))


def total(group: Sequence[int], affinity: Matrix) -> float:
    """Return the sum over a group's tasks of the mean affinity of the others to it; 0 for one task."""
    if len(group) < 2:
        return 0.0
    entries = (affinity[i][j] for i in group for j in group if i != j)
    return sum(entries) / (len(group) - 1)


def _exact(affinity: Matrix) -> list[list[int]]:
    """Return the best grouping: best(S) = max of total(T) + best(S - T) over T in S with S's first task."""
    count = len(affinity)
    members = [[i for i in range(count) if mask >> i & 1] for mask in range(1 << count)]
    totals = [total(group, affinity) for group in members]
    best = [0.0] * (1 << count)
    first = [0] * (1 << count)
    for mask in range(1, 1 << count):
        lowest, value = mask & -mask, -math.inf
        # Subsets fall from the largest, so that larger groups win ties.
        rest = others = mask ^ lowest
        while True:
            group = others | lowest
            found = totals[group] + best[mask ^ group]
            if found > value + TIE:
                value, first[mask] = found, group
            if not others:
                break
            others = (others - 1) & rest
        best[mask] = value

    # Back from the set of all tasks.
    groups, left = [], (1 << count) - 1
    while left:
        groups.append(members[first[left]])
        left ^= first[left]
    return groups


def _greedy(affinity: Matrix) -> list[list[int]]:
    """Join the two groups whose union gains most, until all unions lose."""
    groups = [[i] for i in range(len(affinity))]
    # Each time all pairs, because a union changes the means of its tasks.
    while len(groups) > 1:
        gains = {
            (a, b): total(groups[a] + groups[b], affinity)
            - total(groups[a], affinity)
            - total(groups[b], affinity)
            for a in range(len(groups))
            for b in range(a + 1, len(groups))
        }
        (one, other), gain = max(gains.items(), key=lambda entry: entry[1])
        if gain < -TIE:
            break
        groups[one] = sorted(groups[one] + groups.pop(other))
    return groups


def groups_by_name(tasks: Sequence[str], names: Mapping[str, str]) -> Groups:
    """Return the groups of tasks that have one name, such as that of their domain.

    >>> groups_by_name("abc", {"a": "text", "b": "image", "c": "text"})
    (('a', 'c'), ('b',))
    """
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(names[task], []).append(task)
    return tuple(map(tuple, found.values()))


def groups_by_level(levels: Mapping[str, float], factor: float = 2.0) -> Groups:
    """Return groups of similar level: a new one begins where the level rises by more than `factor`.

    >>> groups_by_level({"a": 0.1, "b": 0.9, "c": 0.15})
    (('a', 'c'), ('b',))
    """
    # A factor and not a distance, since losses that are left span orders of magnitude.
    ranked = sorted(levels, key=lambda task: levels[task])
    groups = [[ranked[0]]]
    for before, task in pairwise(ranked):
        if levels[task] > factor * levels[before]:
            groups.append([])
        groups[-1].append(task)
    return tuple(map(tuple, groups))


def associations(sources: Sequence[Source]) -> list[list[float]] | str:
    """Return how targets of tasks go together on their common inputs [m][m]; or why that cannot be said.

    It is the root of the mean squared canonical correlation of one-hot classes or values: |r| for two values,
    Cramer's V for two classes. What chance alone would give is taken off.
    """
    inputs = set()
    for source in sources:
        # Samples that are read from disk are not compared with each other.
        content = {name: t for name, t in source.train.content().items() if name.startswith("x")}
        if not content or source.train.draws or source.places:
            return "targets are compared where all tasks are on the same inputs in memory, one target each"
        inputs.add(content_hash(content))
    if len(inputs) > 1:
        return "the tasks have different inputs, so that their targets cannot be compared"

    # All pairs, since a whole matrix costs as many products.
    columns = [one_hot(source) for source in sources]
    found = [[1.0] * len(sources) for _ in sources]
    for i, mine in enumerate(columns):
        for j in range(i):
            found[i][j] = found[j][i] = association(mine, columns[j])
    return found


def one_hot(source: Source) -> Tensor:
    """Return targets as columns [N, k], NaN where there is none."""
    y = source.train.targets().cpu()
    if source.kind != "class":
        return y.double().flatten(1)
    # Classes count from the first that occurs, since tasks may have any numbers.
    there = y != NONE
    _, numbers = torch.where(there, y, y.max()).unique(return_inverse=True)
    return torch.where(there[:, None], F.one_hot(numbers).double(), torch.nan)


def association(mine: Tensor, other: Tensor) -> float:
    """Return the association of two sets of columns [N, k] and [N, l], in [0, 1].

    sqrt(max(0, |U^T V|^2 / r - c)) with orthonormal bases U and V of the centred columns, r the lower of
    their ranks, and c = (higher rank) / (N - 1), its mean under independence.

    >>> x = torch.arange(9.0, dtype=torch.float64)[:, None]
    >>> round(association(x, -2 * x) ** 2, 3)
    0.875
    """
    # Examples that lack one of the targets say nothing about both.
    there = torch.isfinite(mine).all(1) & torch.isfinite(other).all(1)
    bases = [_basis(columns[there]) for columns in (mine, other)]
    ranks = [basis.shape[1] for basis in bases]
    if not min(ranks):
        return 0.0
    square = float((bases[0].T @ bases[1]).square().sum()) / min(ranks)
    return math.sqrt(max(0.0, square - max(ranks) / (int(there.sum()) - 1)))


def _basis(columns: Tensor) -> Tensor:
    """Return an orthonormal basis [N, r] of the centred columns."""
    if len(columns) < 2:
        return columns[:, :0]
    left, sizes, _ = torch.linalg.svd(columns - columns.mean(0), full_matrices=False)
    found: Tensor = left[:, sizes > 1e-9 * max(1.0, float(sizes.max()))]
    return found
