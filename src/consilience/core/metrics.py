"""Metrics of predictions, and of a matrix R[i, j]: the score on source j after stage i (row 0: untrained)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from consilience.core.shares import exact_share
from consilience.core.source import Target

Sums = dict[str, Tensor]
"""What a metric knows of some chunks of examples."""


def in_one(chunks: Sequence[Tensor]) -> Tensor:
    """Concatenate chunks [N, ..., *places], padded to the most places: with -100 (whole numbers) or NaN.

    >>> in_one([torch.tensor([[1, 2]]), torch.tensor([[3]])]).tolist()
    [[1, 2], [3, -100]]
    """
    most = [max(sizes) for sizes in zip(*(chunk.shape[1:] for chunk in chunks), strict=True)]
    found = []
    for chunk in chunks:
        more = [(0, size - have) for size, have in zip(most, chunk.shape[1:], strict=True)]
        fill = torch.nan if chunk.is_floating_point() else -100
        # The last dimension comes first.
        flat = [number for pair in reversed(more) for number in pair]
        found.append(torch.nn.functional.pad(chunk, flat, value=fill) if any(flat) else chunk)
    return torch.cat(found)


@dataclass(frozen=True)
class Metric(ABC):
    """A measure of predictions against targets. Its sums add up over chunks of examples.

    Predictions p are [N, C, *places]: class probabilities, probabilities of each label, or values. Targets y
    are classes [N, *places] with -100 for none, values [N, k, *places] with NaN for none, or labels 0 and 1
    [N, L, *places] with NaN for none. A class of one's own is a frozen dataclass with `sums` and `value`.

    >>> class Errors(Metric):
    ...     def sums(self, p, y):
    ...         return {"wrong": (p.argmax(1) != y).sum(), "count": torch.tensor(len(y))}
    ...     def value(self, sums):
    ...         return float(sums["wrong"] / sums["count"])
    ...     @property
    ...     def higher(self):
    ...         return False
    >>> Errors()(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([1, 1]))
    0.5
    """

    called: ClassVar[str] = ""
    """Its name with default arguments; "" for the name of the class."""
    kinds: ClassVar[tuple[str, ...]] = ("class", "value", "labels")
    """The kinds of targets that it fits."""
    keeps: ClassVar[bool] = False
    """Whether it keeps all predictions until the end: its sums are then concatenated instead of added."""

    @property
    def name(self) -> str:
        """The name in tables and results: with all arguments that are no defaults, as in "top_k(k=3)"."""
        # Two of one class with other arguments must differ in their names.
        given = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        changed = ", ".join(f"{name}={value}" for name, value, default in given if value != default)
        called = self.called or type(self).__name__
        return f"{called}({changed})" if changed else called

    @property
    def higher(self) -> bool | None:
        """Whether more is better; None where that is unknown."""
        return True

    @abstractmethod
    def sums(self, p: Tensor, y: Tensor) -> Sums:
        """Return the sums over one chunk of examples, in float64 or whole numbers."""

    @abstractmethod
    def value(self, sums: Sums) -> float:
        """Return the metric of sums; NaN where it is undefined."""

    def add(self, *parts: Sums) -> Sums:
        """Return the sums over several chunks."""
        # Kept predictions have an order, which chunks follow.
        if self.keeps:
            return {name: in_one([part[name] for part in parts]) for name in parts[0]}
        total = parts[0]
        for part in parts[1:]:
            total = {name: total[name] + part[name] for name in total}
        return total

    def of(self, target: Target) -> Metric:
        """Return the metric of one task, where it depends on what the task is trained by."""
        return self

    def running(self) -> Running:
        """Begin to measure chunk by chunk."""
        return Running(self)

    def __call__(self, p: Tensor, y: Tensor) -> float:
        """Return the metric of one chunk."""
        return self.value(self.sums(p, y))


class Running:
    """A metric of the chunks that came so far."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.parts: list[Sums] = []

    def update(self, p: Tensor, y: Tensor) -> None:
        """Count one chunk: predictions p and targets y, on any devices."""
        self.parts.append(self.metric.sums(p, y.to(p.device)))

        # Kept predictions are concatenated once, at the end; sums need no more memory than one of them.
        if not self.metric.keeps:
            self.parts = [self.metric.add(*self.parts)]

    def value(self) -> float:
        """Return the metric; NaN before any chunk, and where it is infinite."""
        if not self.parts:
            return math.nan

        # JSON has no infinity, and a mean with one says nothing.
        value = float(self.metric.value(self.metric.add(*self.parts)))
        return value if math.isfinite(value) else math.nan


def client_drift(base: Tensor, new: Tensor, sent: Tensor) -> dict[str, float]:
    """Measure how far clients moved from their base, and in how far in one direction.

    From parameters [n] and those that m clients sent [m, n]: distance = mean_i ||theta_i - base||,
    distance_max is the largest of them, and cosine = mean_i cos(theta_i - base, new - base) over clients that
    moved; NaN where nothing did.

    >>> client_drift(torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    {'distance': 2.0, 'distance_max': 2.0, 'cosine': 0.7071067811865475}
    """
    steps, step = (sent - base).double(), (new - base).double()
    # A client that did not move has no direction.
    far = steps.norm(dim=1)
    cosines = (steps @ step)[far > 0] / (far[far > 0] * step.norm())
    cosine = float(cosines.mean()) if len(cosines) and step.norm() > 0 else float("nan")
    return {"distance": float(far.mean()), "distance_max": float(far.max()), "cosine": cosine}


def mean(values: np.ndarray | Sequence[float], axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Return the mean without the NaN among the values, over axes or all; NaN where nothing is left.

    >>> mean(np.array([[1.0, np.nan], [3.0, np.nan]]), 0)
    array([ 2., nan])
    """
    array = np.asarray(values, dtype=float)
    missing = np.isnan(array)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of nothing
        total = np.where(missing, 0.0, array).sum(axis)
        return np.asarray(np.true_divide(total, (~missing).sum(axis)))


def summary(
    matrix: np.ndarray, learned_at: Sequence[int | None], higher: bool = True
) -> Mapping[str, float | None]:
    """Return score, forgetting, transfer, stability and plasticity of R [stages + 1, sources].

    Source j is learned at stage l_j = learned_at[j] only; None: at several. T is the last stage. Where less
    is better (not `higher`), max is min, and differences have the other sign: a loss of skill is positive.

    - score = mean_j R[T, j];
    - backward_transfer = mean (R[T, j] - R[l_j, j]), over sources learned before the last stage;
    - forgetting = mean (max_{0 < i < T} R[i, j] - R[T, j]), over the same;
    - forward_transfer = mean (R[l_j - 1, j] - R[0, j]), over sources learned after the first stage;
    - normalised = mean R[T, j] / R[l_j, j], over all sources that are learned; None where less is better;
    - stability = mean R[T, j], over sources learned before the last stage;
    - plasticity = mean R[l_j, j], over all sources that are learned.

    Each mean leaves out the sources where it is NaN. All but the score are None where a source is learned
    more than once, or where there is nothing to average.

    >>> r = np.array([[0.0, 0.2], [1.0, 0.3], [0.6, 0.9]])
    >>> {k: round(v, 3) for k, v in summary(r, [1, 2]).items()}
    {'score': 0.75, 'forgetting': 0.4, 'backward_transfer': -0.4, 'forward_transfer': 0.1, 'normalised': 0.8,
    'stability': 0.6, 'plasticity': 0.95}
    """
    last = len(matrix) - 1
    found: dict[str, float | None] = {"score": float(mean(matrix[last]))}

    # With a source that is learned twice, no stage is "before" or "after" it.
    once = all(stage is not None for stage in learned_at)
    learned = [stage or 0 for stage in learned_at]
    before_last = [j for j, stage in enumerate(learned) if 0 < stage < last] if once else []
    after_first = [j for j, stage in enumerate(learned) if stage > 1] if once else []
    scored = [j for j, stage in enumerate(learned) if stage > 0 and matrix[stage, j] > 0] if once else []

    # From here on more is better.
    good = matrix if higher else -matrix
    changes = {
        "forgetting": [lost(good[:, j]) for j in before_last],
        "backward_transfer": [float(good[last, j] - good[learned[j], j]) for j in before_last],
        "forward_transfer": [float(good[learned[j] - 1, j] - good[0, j]) for j in after_first],
        "normalised": [float(matrix[last, j] / matrix[learned[j], j]) for j in scored] if higher else [],
        "stability": [float(matrix[last, j]) for j in before_last],
        "plasticity": [float(matrix[learned[j], j]) for j, stage in enumerate(learned) if stage and once],
    }
    for name, values in changes.items():
        kept = [value for value in values if value == value]
        found[name] = float(np.mean(kept)) if kept else None
    return found


def lost(scores: np.ndarray) -> float:
    """Return max_{0 < i < T} s_i - s_T of the scores [T + 1] of one source; NaN where it is undefined.

    >>> lost(np.array([0.0, 0.5, np.nan, 0.25]))
    0.25
    """
    # The first score is from before training, and the last is what is compared.
    past = scores[1:-1][~np.isnan(scores[1:-1])]
    return float(past.max() - scores[-1]) if len(past) else math.nan


def global_forgetting(matrix: np.ndarray, higher: bool = True) -> float | None:
    """Return mean_j (max_{0 < i < T} R[i, j] - R[T, j]) over all sources; None with one stage.

    Unlike `summary`, it counts sources that are learned several times. Where less is better (not `higher`),
    it is mean_j (R[T, j] - min_{0 < i < T} R[i, j]).

    >>> global_forgetting(np.array([[0.0, 0.0], [0.5, 1.0], [1.0, 0.75]]))
    -0.125
    """
    values = [lost(scores if higher else -scores) for scores in matrix.T]
    kept = [value for value in values if math.isfinite(value)]
    return float(np.mean(kept)) if kept else None


def worst(scores: np.ndarray, fraction: float, higher: bool = True) -> float:
    """Return the mean over the worst `fraction` of the scores [n], at least one. NaN ones are left out.

    >>> worst(np.array([0.9, 0.1, 0.5, 0.3]), 0.5)
    0.2
    """
    kept = np.sort(scores[np.isfinite(scores)])
    if not len(kept):
        return float("nan")
    count = max(1, math.ceil(exact_share(fraction, len(kept))))
    return float((kept[:count] if higher else kept[-count:]).mean())
