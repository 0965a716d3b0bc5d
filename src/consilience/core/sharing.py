"""How a model mixes what tasks share, measured on data: gates of experts, units between networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from consilience.core.model import Model, Sharing
from consilience.core.params import Params, computing
from consilience.core.source import Source
from consilience.core.tree import cast_to
from consilience.core.warning import warn

MOST = 10_000
"""How many examples of a source are read at most: an even sample of them."""
CHUNK = 256
"""Examples per forward pass."""
UNUSED = 1e-3
"""The mean weight below which an expert is not used."""

Patterns = dict[str, dict[str, dict[str, Any]]]
"""{task: {place: {"parts", "weights", "entropy"}}}, in numbers that JSON holds."""


@torch.no_grad()
def patterns(model: Model, params: Params, buffers: Params, sources: Sequence[Source]) -> Patterns:
    """Return the mean weights and entropies of each task, over the training data of its sources."""
    # Most models mix nothing, and then no data are read.
    if type(model).sharing is Model.sharing:
        return {}
    sums: dict[str, dict[str, list[Any]]] = {}
    like = computing(params)
    for source in sources:
        task, train = source.task or source.name, source.train
        step = -(-len(train) // MOST)
        for x, _ in train.batches(list(torch.arange(0, len(train), step).split(CHUNK))):
            found = model.sharing(params, buffers, cast_to(x, like.device, like.dtype), task)
            for place, own in found.items():
                _add(sums.setdefault(task, {}), place, own)
    return {task: {place: _means(*total) for place, total in own.items()} for task, own in sums.items()}


def _add(sums: dict[str, list[Any]], place: str, own: Sharing) -> None:
    """Add the weights of some samples to the sums of a place."""
    weights = own.weights.double()
    entropy = -torch.xlogy(weights, weights).sum() if own.probabilities else None
    if place not in sums:
        sums[place] = [own.parts, 0, torch.zeros(len(own.parts), dtype=torch.float64), entropy]
        entropy = None
    sums[place][1] += len(weights)
    sums[place][2] += weights.sum(0).cpu()
    if entropy is not None:
        sums[place][3] += entropy


def _means(parts: Sequence[str], count: int, total: Tensor, entropy: Tensor | None) -> dict[str, Any]:
    """Return the means over the samples of a place."""
    return {
        "parts": list(parts),
        "weights": (total / count).tolist(),
        "entropy": None if entropy is None else float(entropy) / count,
    }


def unused(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return the experts whose mean weight is below 1e-3 for every task and gate that may use them.

    >>> gate = {"parts": ["expert 0.0", "expert 0.1"], "weights": [0.9995, 0.0005], "entropy": 0.0}
    >>> unused({"a": {"layer 0": gate}})
    ['expert 0.1']
    """
    most: dict[str, float] = {}
    for places in found.values():
        for own in places.values():
            # Other weights, such as those of cross-stitches, may be small or negative and still matter.
            if own["entropy"] is not None:
                for part, weight in zip(own["parts"], own["weights"], strict=True):
                    most[part] = max(most.get(part, 0.0), weight)
    return [part for part, weight in most.items() if weight < UNUSED]


def warn_of_unused(found: Patterns) -> None:
    """Warn of experts that no task uses any more."""
    dead = unused(found)
    if dead:
        warn(
            f"{', '.join(dead)} died: the mean gate is below {UNUSED:g} for all tasks on the training data; "
            "use fewer experts, or a lower `lr`, so that gates stay open longer"
        )
