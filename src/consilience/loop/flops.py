"""Counts the operations of a step: the formulas of torch.utils.flop_counter, and those that it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """Adds up the FLOPs of what runs inside it, in `total`.

    The numbers are those of torch's FlopCounterMode, and `OWN` counts what that takes for nothing. Torch's
    looks each operation up several times, which takes longer than a small step; and it keeps counts by
    module with hooks, under which a parameter that passes through a module has no gradient.

    >>> with Flops() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> counter.total  # 2 x 3 x 4 products, as many sums
    48
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch wraps what follows in a guard that takes as long as the operation.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is None:
            rule = _RULES[func] = _rule(func)
        formula, composite = rule

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
    packet = getattr(func, "_overloadpacket", func)
    formula = OWN.get(packet) or _of_shapes(flop_registry.get(packet))
    if formula is not None or not isinstance(func, torch._ops.OpOverload):
        return formula, False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return None, bool(func.has_kernel_for_dispatch_key(key))


def _of_shapes(formula: Callable[..., int] | None) -> Callable[..., int] | None:
    """Return one of torch's formulas without its search for tensors in all arguments, which is slow."""
    inner = getattr(formula, "__wrapped__", None)
    if inner is None:
        return formula

    def count(*args: Any, out_val: Any, **kwargs: Any) -> int:
        named = {name: _shape(value) for name, value in kwargs.items()}
        total: int = inner(*map(_shape, args), out_shape=_shape(out_val), **named)
        return total

    return count


def _shape(value: Any) -> Any:
    """Return the shape of a tensor, or of each of several; any other value as it is."""
    if isinstance(value, Tensor):
        return value.shape
    return [_shape(entry) for entry in value] if isinstance(value, tuple) else value


# Kernels of whole layers, in which torch sees no matrix products.


def _lstm(x: Tensor, input_weight: Tensor, hidden_weight: Tensor, *_: Any, **__: Any) -> int:
    """Count an LSTM layer of oneDNN: every vector of x [T, B, d] meets both matrices."""
    return _rnn(x, (input_weight, hidden_weight))


def _rnn(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    """Count the layers of an LSTM, GRU or RNN of cuDNN; x is [T, B, d], or [all steps, d] if it is packed."""
    matrices = sum(weight.numel() for weight in weights if weight.dim() == 2)
    return 2 * (x.numel() // x.shape[-1]) * matrices


def _self_attention(before_mask: int, x: Tensor, *args: Any, **_: Any) -> int:
    """Count a layer of self-attention in eval mode: every vector of x [B, T, d] meets all its matrices.

    To this come the scores, and the sums of values by them. Masks come after `before_mask` arguments.
    """
    weights = (a for a in args[:before_mask] if isinstance(a, Tensor) and a.dim() == 2)
    matrices, lengths = sum(weight.numel() for weight in weights), _lengths(x)
    return 2 * (matrices * sum(lengths) + 2 * x.size(-1) * sum(length**2 for length in lengths))


def _lengths(x: Tensor) -> list[int]:
    """Return the lengths of the sequences of x [B, T, d]."""
    if x.is_nested:
        return [len(sequence) for sequence in x.unbind()]
    return [x.shape[1]] * x.shape[0]


def _twice(formula: Callable[..., int]) -> Callable[..., int]:
    """Return the formula of a backward pass: the gradients of the inputs and of the weights."""
    return lambda *args, **kwargs: 2 * formula(*args, **kwargs)


aten = torch.ops.aten
OWN: dict[Any, Callable[..., int]] = {
    aten.mkldnn_rnn_layer: _lstm,
    aten.mkldnn_rnn_layer_backward: _twice(_lstm),
    aten._cudnn_rnn: _rnn,
    aten._cudnn_rnn_backward: _twice(_rnn),
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_efficient_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_efficient_attention_backward
    ],
    aten._native_multi_head_attention: partial(_self_attention, 8),
    aten._transformer_encoder_layer_fwd: partial(_self_attention, 17),
}
"""Formulas that torch lacks, by operation."""
