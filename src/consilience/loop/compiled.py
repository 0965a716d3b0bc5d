"""Forward passes compiled by torch.compile, or as they are where that fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from consilience.core.model import ForwardEach
from consilience.core.tree import Input
from consilience.core.warning import warn


class Compiled:
    """A bound model whose forward and backward passes are compiled, the same to rounding.

    Visits share what was compiled, as their models differ in tensors only. Inputs of another size or for
    other tasks compile once more. Where torch cannot compile it warns, and the forward pass runs as it is.
    """

    def __init__(self, forward: ForwardEach) -> None:
        self.forward = forward
        # With torch's own random numbers, dropout is that of the forward pass as it is.
        self.fast: ForwardEach | None = torch.compile(forward, options={"fallback_random": True})
        self.seen: set[object] = set()

    def __call__(self, x: Input, tasks: tuple[str | None, ...]) -> list[Tensor]:
        # The ledger measures a step in a mode in which torch would skip this code for good.
        if self.fast is not None and is_in_torch_dispatch_mode():
            return self.forward(x, tasks)

        kind = (tasks, x.shape)
        if self.fast is None or kind in self.seen:
            return (self.fast or self.forward)(x, tasks)

        # All tasks share the limit of recompilations, after which torch would say nothing and not compile.
        limits: dict[str, Any] = {"recompile_limit": 4096, "accumulated_recompile_limit": 4096}
        self.seen.add(kind)
        try:
            with torch._dynamo.config.patch(**limits):
                return self.fast(x, tasks)
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            warn(f"the model is not compiled: {type(error).__name__}: {line}; its forward pass runs as it is")
            self.fast = None
            return self.forward(x, tasks)
