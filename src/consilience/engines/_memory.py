"""Memory of the batched engine: how many agents fit, and one buffer for the inputs of the steps to come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from consilience.loop.engine import Visit

SHARE = 0.4
"""Fraction of the free memory that stacked agents may take."""
COPIES = 8
"""Copies of its parameters that one agent is assumed to need: state, gradient, activations.

Twice as many with an optimiser that is given as an object, which may keep more than one state.
"""
WINDOW = 1 << 24
"""Bytes of inputs that are gathered at once for the steps to come."""


def most_agents(visits: Sequence[Visit]) -> int:
    """Return the largest number of agents whose state and activations fit in memory as one stack."""
    if not visits:
        return 1
    # Agents of one run have the same model, so the first stands for all.
    agent = visits[0].agent
    training = agent.training
    numbers = sum(tensor.numel() for tensor in agent.state.params.values())
    copies = COPIES if isinstance(training.optimiser, str) else 2 * COPIES
    each = copies * numbers * training.dtype.itemsize
    return max(1, int(SHARE * free_bytes(agent.device)) // max(1, each))


def free_bytes(device: torch.device) -> int:
    """Return the free memory in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Systems without these figures are given 2 GiB.
    return 1 << 31


class Buffer:
    """One buffer that is used again and again: fresh memory is slow, because the system clears each page."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def view(self, shape: tuple[int, ...], like: Tensor, zeros: bool) -> Tensor:
        """Lend memory of this shape, with the type and device of `like`; set to 0 if `zeros`."""
        # It only grows: windows of several sizes take turns in it.
        memory, size = self.memory, prod(shape)
        if (
            memory is None
            or (memory.dtype, memory.device) != (like.dtype, like.device)
            or memory.numel() < size
        ):
            memory = self.memory = like.new_empty(size)
        lent = memory[:size].view(shape)
        return lent.zero_() if zeros else lent
