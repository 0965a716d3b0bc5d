"""Counts the operations of a step, with the formulas of torch.utils.flop_counter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """Adds up the FLOPs of what runs inside it, in `total`.

    The numbers are those of torch's FlopCounterMode. That one looks each operation up several times, and also
    keeps counts by module, which takes longer than a small step; ragged inputs have a new shape, to be
    measured, in almost every step.

    >>> with Flops() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> counter.total  # 2 x 3 x 4 products, as many sums
    48
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _RULES:
            _RULES[func] = _rule(func)
        formula, composite = _RULES[func]

        # Operations that torch makes of others arrive whole in inference mode: what they are made of counts.
        if composite:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


Rule = tuple[Callable[..., int] | None, bool]
"""The formula of an operation, if it has one, and whether it is made of others."""

_RULES: dict[Any, Rule] = {}
"""By operation, each looked up once."""


def _rule(func: Any) -> Rule:
    formula = flop_registry.get(getattr(func, "_overloadpacket", func))
    if formula is not None or not isinstance(func, torch._ops.OpOverload):
        return formula, False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return None, bool(func.has_kernel_for_dispatch_key(key))
