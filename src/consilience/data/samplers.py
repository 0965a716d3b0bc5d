"""Samplers: which examples a step sees, as index batches of one epoch; a part of `Training`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.losses import NONE
from consilience.core.sampler import Sampler, Scored, Shuffle
from consilience.data._curricula import Curriculum as Curriculum
from consilience.data._curricula import SelfPaced as SelfPaced
from consilience.data._shares import apportion

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

__all__ = ["Balanced", "ByLength", "Curriculum", "InOrder", "Mixed", "Sampler", "SelfPaced", "Shuffle"]


@dataclass(frozen=True)
class InOrder(Sampler):
    """Every example once per epoch, in the order of the source.

    >>> [batch.tolist() for batch in InOrder().plan(torch.zeros(5), 2, 0, torch.Generator())]
    [[0, 1], [2, 3], [4]]
    """

    def plan(self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator) -> list[Tensor]:
        return list(torch.arange(len(targets)).split(batch_size))


@dataclass(frozen=True)
class Balanced(Sampler):
    """Class c has the share p_c = n_c^(1/T) / sum_k n_k^(1/T) of the examples of an epoch.

    An epoch has as many examples as the source. T = 1 is each example once (`Shuffle`), T = infinity gives
    all classes equal shares. Shares are met exactly, not in expectation. Within a class, every example comes
    once before any comes again.

    Args:
        temperature: T > 0.

    Raises:
        ConsilienceError: the temperature is not positive, or targets are not classes.

    >>> targets = torch.tensor([0] * 9 + [1] * 3)
    >>> plan = Balanced().plan(targets, 4, 0, torch.Generator().manual_seed(0))
    >>> targets[torch.cat(plan)].bincount().tolist()
    [6, 6]
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)
    takes_places: ClassVar[bool] = False

    temperature: float = float("inf")

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConsilienceError(f"`temperature` must be > 0, got {self.temperature!r}.")

    def plan(self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator) -> list[Tensor]:
        targets = targets.cpu()
        if targets.dim() != 1 or targets.is_floating_point():
            raise ConsilienceError(
                f"Balanced needs classes as targets, got {targets.dtype} of shape {tuple(targets.shape)}."
            )
        # Examples without a class would count as one more.
        classes, counts = targets[targets != NONE].unique(return_counts=True)

        # In logarithms, because n^(1/T) overflows for small T.
        log_n = counts.double().log() / self.temperature
        quotas = apportion((log_n - log_n.max()).exp(), len(targets)).tolist()
        chosen = []
        for label, quota in zip(classes, quotas, strict=True):
            of_class = (targets == label).nonzero().flatten()
            # Whole passes over the class, the last one cut short.
            times = -(-quota // len(of_class))
            orders = [of_class[torch.randperm(len(of_class), generator=generator)] for _ in range(times)]
            chosen.append(torch.cat(orders)[:quota] if orders else of_class[:0])

        together = torch.cat(chosen)
        return list(together[torch.randperm(len(together), generator=generator)].split(batch_size))


@dataclass(frozen=True)
class ByLength(Sampler):
    """Every example once per epoch, in batches of sequences of similar length, so that little is padded.

    Examples are shuffled and cut into pools of `pool` batches; each pool is sorted by length and cut into
    batches, and the batches of all pools are shuffled. One pool of all examples pads least; a pool of one
    batch is a plain shuffle, and so is everything where inputs have one length.

    Args:
        pool: batches that are sorted together.

    >>> lengths = torch.tensor([1, 9, 1, 9, 1, 9])
    >>> plan = ByLength().plan(torch.zeros(6), 3, 0, torch.Generator().manual_seed(0), lengths)
    >>> sorted(sorted(batch.tolist()) for batch in plan)
    [[0, 2, 4], [1, 3, 5]]
    """

    pool: int = 50

    needs_lengths: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number(pool=self.pool)

    def plan(
        self,
        targets: Tensor,
        batch_size: int,
        epoch: int,
        generator: torch.Generator,
        lengths: Tensor | None = None,
    ) -> list[Tensor]:
        order = torch.randperm(len(targets), generator=generator)
        if lengths is None:
            return list(order.split(batch_size))
        lengths = lengths.cpu()

        batches: list[Tensor] = []
        for own in order.split(self.pool * batch_size):
            # Stable, so that the shuffle decides among sequences of one length.
            batches += own[lengths[own].argsort(stable=True)].split(batch_size)
        # Without this, every pool would go from short to long.
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass(frozen=True)
class Mixed(Sampler):
    """Task t has the share p_t = n_t^(1/T) / sum_s n_s^(1/T) of every step over several tasks.

    T = 1 is proportional to the tasks' numbers n_t of training examples, T = infinity equal; 2 to 5 often
    works well. The temperature moves from `temperature` in the first epoch to `final` in the last, linearly
    in 1/T, over all visits: from infinity to 1 it anneals from equal shares to proportional ones.

    A step has m batches' worth of examples for m tasks, of which a task has its share (at least one example,
    two with batch norm), and its objective has the weight p_t. An epoch has as many examples as all tasks
    together: at T = 1 each comes once (a task with fewer examples than the epoch has steps comes again).
    Within a task every example comes once before any comes again.

    Args:
        temperature: T > 0 in the first epoch.
        final: T in the last epoch; None: `temperature`.
        within: the order of the examples of a task; None shuffles.

    >>> [round(share, 3) for share in Mixed(2.0).shares([100, 400], 0.0)]
    [0.333, 0.667]
    >>> [round(share, 3) for share in Mixed(float("inf"), final=1.0).shares([100, 400], 1.0)]
    [0.2, 0.8]
    """

    temperature: float = 1.0
    final: float | None = None
    within: Any = field(default=None)

    def __post_init__(self) -> None:
        for name in ("temperature", "final"):
            value = getattr(self, name)
            if not (name == "final" and value is None) and not value > 0:
                raise ConsilienceError(f"`{name}` must be > 0, got {value!r}.")
        if isinstance(self.within, Mixed | Scored):
            raise ConsilienceError(
                f"`within` must order the examples of one task by itself, got {type(self.within).__name__}."
            )

    def unfit(self, facts: ScheduleFacts) -> str | None:
        if facts.parts < 2:
            return "Mixed gives the tasks of a step their shares, and a step has one here; use multitask"
        return super().unfit(facts)

    def shares(self, sizes: Sequence[int], done: float) -> list[float]:
        # Linear in 1/T, where infinity is 0.
        first = 1 / self.temperature
        last = first if self.final is None else 1 / self.final
        # In logarithms, because n^(1/T) overflows for small T.
        logs = torch.tensor(sizes, dtype=torch.float64).log() * (first + (last - first) * done)
        shares: list[float] = logs.softmax(0).tolist()
        return shares

    @property
    def needs_lengths(self) -> bool:  # type: ignore[override]
        """Whether the order within a task needs the lengths of sequences."""
        return bool(getattr(self.within, "needs_lengths", False))

    def plan(
        self, targets: Tensor, batch_size: int, epoch: int, generator: torch.Generator, **more: Any
    ) -> list[Tensor]:
        found: list[Tensor] = (self.within or Shuffle()).plan(targets, batch_size, epoch, generator, **more)
        return found
