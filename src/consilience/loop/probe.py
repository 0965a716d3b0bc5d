"""Augmentations are tried before a run, on two samples of each source, so that no work is lost."""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.core.augment import sample_seeds
from consilience.core.errors import ConsilienceError
from consilience.core.losses import NONE
from consilience.core.params import key, same
from consilience.core.schedule import Schedule
from consilience.core.source import Source
from consilience.core.tree import Input, named, signature, types


def check_augments(schedule: Schedule) -> None:
    """Refuse augmentations that do not work on two samples of their source, or that nothing can seed."""
    tried: set[object] = set()
    for source in schedule.sources:
        views = source.augment
        if views is None:
            continue
        x, y = source.train.first(2)
        # Hundreds of clients may share one augmentation.
        kind = (views, signature(x), types(x))
        if kind in tried:
            continue

        tried.add(kind)
        seeds = sample_seeds(key(0, source.name, "augment"), torch.arange(len(y)))
        try:
            first, again = (views(x.clone(), y.clone(), seeds) for _ in range(2))
        except ConsilienceError as error:
            raise ConsilienceError(f"in {source.name!r}: {error}") from None
        except Exception as error:
            raise ConsilienceError(
                f"the augmentation {views!r} fails on samples of {source.name!r}, {signature(x)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        check_views(source, first, again)


def check_views(source: Source, first: tuple[Input, Tensor], again: tuple[Input, Tensor]) -> None:
    """Refuse two views by the same seeds that differ, and targets that are no classes of the source."""
    both = [{**named("x", x), "y": y.nan_to_num()} for x, y in (first, again)]
    if not same(*both):
        raise ConsilienceError(
            f"an augmentation must be the same for the same random state, and {source.augment!r} of "
            f"{source.name!r} is not; draw from an argument `generator`, or from the random state of torch, "
            "Python or numpy."
        )
    y = first[1]
    if source.kind == "class" and bool(((y != NONE) & ((y < 0) | (y >= len(source.labels)))).any()):
        raise ConsilienceError(
            f"an augmentation must return class numbers of its source, or {NONE} for no target, "
            f"got {y.unique().tolist()} of {source.augment!r} in {source.name!r}."
        )
