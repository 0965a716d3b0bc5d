"""ONNX files as programs: the operators of common networks, in torch, with gradients.

The package `onnx` reads the file. Operators are those of a list, each a function of torch, so that no code of
a file runs; another one is refused by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.errors import ConsilienceError, reading
from consilience.experts._graph import Program, Ref, Step, trimmed_output, used
from consilience.merging._files import inside

DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""Types by the numbers that ONNX has for them."""

# The operators. Inputs come by place, None for one that is left out; attributes by their ONNX names.


def _numbers(given: Tensor | Sequence[int] | None) -> list[int]:
    """Return sizes or axes as whole numbers; they are inputs in new versions, and attributes in old ones."""
    return [] if given is None else [int(value) for value in given]


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    /,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    # A fully connected layer is one, with the weight transposed.
    out = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return out if c is None else out + beta * c


class Window(NamedTuple):
    """How a convolution or a pooling moves over places: attributes under their ONNX names."""

    kernel_shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    group: int = 1
    ceil_mode: int = 0
    count_include_pad: int = 0
    storage_order: int = 0

    def over(self, kernel: Sequence[int]) -> Window:
        """Return it with all numbers that it leaves out, for a kernel of this size."""
        ones = (1,) * len(kernel)
        return self._replace(
            kernel_shape=tuple(kernel),
            strides=self.strides or ones,
            dilations=self.dilations or ones,
        )

    def padding(self, x: Tensor) -> list[tuple[int, int]]:
        """Return how much is added before and after each place of x [B, C, *places]."""
        if self.auto_pad in ("NOTSET", "VALID", ""):
            half = len(self.kernel_shape)
            pads = self.pads if self.pads and self.auto_pad != "VALID" else (0,) * 2 * half
            return list(zip(pads[:half], pads[half:], strict=True))

        # SAME: the output has ceil(size / stride) places.
        found = []
        sizes = zip(x.shape[2:], self.kernel_shape, self.strides, self.dilations, strict=True)
        for size, kernel, stride, dilation in sizes:
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
        return found


def _even(padding: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return what is added on both sides of each place; None where the sides differ."""
    alike = all(before == after for before, after in padding)
    return [before for before, _ in padding] if alike else None


def _flat(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Return paddings as torch has them: the last place first."""
    return [value for pair in reversed(padding) for value in pair]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, /, *, window: Window) -> Tensor:
    window = window.over(weight.shape[2:])
    padding = window.padding(x)
    call: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(padding) - 1]
    # Most networks pad both sides alike, which needs no copy.
    around = _even(padding)
    if around is None:
        x, around = F.pad(x, _flat(padding)), [0] * len(padding)
    return call(x, weight, bias, window.strides, around, window.dilations, window.group)


def _max_pool(x: Tensor, /, *, window: Window) -> Tensor:
    window = window.over(window.kernel_shape)
    padding, kernel = window.padding(x), window.kernel_shape
    call: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    around = _even(padding)
    # torch pads by at most half of a window.
    if around is None or any(2 * added > size for added, size in zip(around, kernel, strict=True)):
        x, around = F.pad(x, _flat(padding), value=-torch.inf), [0] * len(kernel)
    return call(x, kernel, window.strides, around, window.dilations, bool(window.ceil_mode))


def _average_pool(x: Tensor, /, *, window: Window) -> Tensor:
    window = window.over(window.kernel_shape)
    padding, kernel, ceil = window.padding(x), window.kernel_shape, bool(window.ceil_mode)
    if any(value != 1 for value in window.dilations):
        raise ValueError("AveragePool with dilations is not supported")
    call: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    around = _even(padding)
    if around is not None:
        return call(x, kernel, window.strides, around, ceil, bool(window.count_include_pad))

    # Uneven padding: the mean over a window, by which part of its places counts.
    counted = float(bool(window.count_include_pad))
    ones = F.pad(torch.ones_like(x[:1, :1]), _flat(padding), value=counted)
    total = call(F.pad(x, _flat(padding)), kernel, window.strides, 0, ceil)
    return total / call(ones, kernel, window.strides, 0, ceil)


def _global_average(x: Tensor, /) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


def _global_max(x: Tensor, /) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


def _batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, /, *, epsilon: float = 1e-5, **_: Any
) -> Tensor:
    # The momentum of training is of no use here.
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, /, *, epsilon: float = 1e-5) -> Tensor:
    # Group norm is exported as one, between two reshapes.
    return F.instance_norm(x, None, None, scale, bias, eps=epsilon)


def _layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    /,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    # All axes from this one on are normalised together.
    shape = list(x.shape[axis % x.dim() :])
    return F.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)


def _clip(
    x: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    /,
    *,
    min: float | None = None,
    max: float | None = None,
) -> Tensor:
    low = torch.tensor(min, dtype=x.dtype, device=x.device) if min is not None else low
    high = torch.tensor(max, dtype=x.dtype, device=x.device) if max is not None else high
    # Limits were attributes before version 11, and either may be missing.
    return x if low is None and high is None else x.clamp(low, high)


def _leaky_relu(x: Tensor, /, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def _elu(x: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def _hard_sigmoid(x: Tensor, /, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _gelu(x: Tensor, /, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _prelu(x: Tensor, slope: Tensor, /) -> Tensor:
    # torch's own broadcasts slopes in another way.
    return torch.where(x < 0, slope * x, x)


def _softmax(x: Tensor, /, *, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def _log_softmax(x: Tensor, /, *, axis: int = -1) -> Tensor:
    return x.log_softmax(axis)


def _old_softmax(x: Tensor, /, *, axis: int = 1) -> Tensor:
    return x.flatten(axis).softmax(-1).reshape(x.shape)


def _old_log_softmax(x: Tensor, /, *, axis: int = 1) -> Tensor:
    return x.flatten(axis).log_softmax(-1).reshape(x.shape)


def _flatten(x: Tensor, /, *, axis: int = 1) -> Tensor:
    # Always two axes, whatever there were.
    rows = torch.Size(x.shape[:axis]).numel()
    return x.reshape(rows, -1)


def _reshape(x: Tensor, shape: Tensor, /, *, allowzero: int = 0) -> Tensor:
    sizes = _numbers(shape)
    kept = [x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(sizes)]
    return torch.reshape(x, tuple(kept))


def _transpose(x: Tensor, /, *, perm: Sequence[int] = ()) -> Tensor:
    return x.permute(list(perm) or list(reversed(range(x.dim()))))


def _concat(*tensors: Tensor, axis: int) -> Tensor:
    return torch.cat(tensors, axis)


def _squeeze(x: Tensor, given: Tensor | None = None, /, *, axes: Sequence[int] = ()) -> Tensor:
    # Without axes all of size 1 go, that of a batch of one too.
    where = _numbers(given) or _numbers(axes)
    return x.squeeze(where) if where else x.squeeze()


def _unsqueeze(x: Tensor, given: Tensor | None = None, /, *, axes: Sequence[int] = ()) -> Tensor:
    where = _numbers(given) or _numbers(axes)
    # Axes count in the result.
    rank = x.dim() + len(where)
    for axis in sorted(axis % rank for axis in where):
        x = x.unsqueeze(axis)
    return x


def _slice(
    x: Tensor,
    first: Tensor | None = None,
    last: Tensor | None = None,
    where: Tensor | None = None,
    by: Tensor | None = None,
    /,
    *,
    starts: Sequence[int] = (),
    ends: Sequence[int] = (),
    axes: Sequence[int] = (),
) -> Tensor:
    begin, end = _numbers(first) or _numbers(starts), _numbers(last) or _numbers(ends)
    at = _numbers(where) or _numbers(axes) or list(range(len(begin)))
    steps = _numbers(by) or [1] * len(begin)
    for axis, low, high, step in zip(at, begin, end, steps, strict=True):
        # torch takes no negative steps, which read from the end.
        kept = range(x.shape[axis])[slice(low, high, step)]
        x = x.index_select(axis, torch.tensor(kept, dtype=torch.long, device=x.device))
    return x


def _gather(x: Tensor, index: Tensor, /, *, axis: int = 0) -> Tensor:
    # An index of any shape takes the place of the axis; negative ones count from the end.
    axis %= x.dim()
    flat = index.flatten().long()
    found = x.index_select(axis, torch.where(flat < 0, flat + x.shape[axis], flat))
    return torch.reshape(found, (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _shape(x: Tensor, /, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end])


def _cast(x: Tensor, /, *, to: int, saturate: int = 1) -> Tensor:
    return x.to(DTYPES[to])


def _constant_of_shape(shape: Tensor, /, *, value: Tensor | None = None) -> Tensor:
    # The value is a tensor of one number, of any type.
    fill = torch.zeros(1) if value is None else value
    return fill.expand(_numbers(shape)).clone()


def _identity(x: Tensor, *more: Tensor | None, ratio: float = 0.5, seed: int = 0) -> Tensor:
    # Dropout is one in inference.
    return x


def _pad(
    x: Tensor,
    around: Tensor | None = None,
    fill: Tensor | None = None,
    /,
    *,
    mode: str = "constant",
    pads: Sequence[int] = (),
    value: float = 0.0,
) -> Tensor:
    # All that is added before comes first, then all that is added after.
    sizes = _numbers(around) or _numbers(pads)
    pairs = list(zip(sizes[: x.dim()], sizes[x.dim() :], strict=True))
    if mode == "constant":
        return F.pad(x, _flat(pairs), value=value if fill is None else fill.item())
    # torch pads places alone in these modes.
    if any(pair != (0, 0) for pair in pairs[:2]):
        raise ValueError(f"Pad of samples or channels with mode {mode} is not supported")
    return F.pad(x, _flat(pairs[2:]), mode="replicate" if mode == "edge" else mode)


def _reduced(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the operator that reduces axes by a function of torch."""

    def reduce(
        x: Tensor,
        given: Tensor | None = None,
        /,
        *,
        axes: Sequence[int] = (),
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        # No axes are all axes, unless the file says that they are none.
        where = _numbers(given) or _numbers(axes)
        if not where and noop_with_empty_axes:
            return x
        return call(x, where or list(range(x.dim())), bool(keepdims))

    return reduce


def _range(first: Tensor, last: Tensor, step: Tensor, /) -> Tensor:
    return torch.arange(first.item(), last.item(), step.item(), dtype=first.dtype)


def _expand(x: Tensor, shape: Tensor, /) -> Tensor:
    # Both sides may be the larger one.
    return x.expand(torch.broadcast_shapes(x.shape, _numbers(shape)))


def _tile(x: Tensor, times: Tensor, /) -> Tensor:
    return x.repeat(_numbers(times))


def _split(
    x: Tensor,
    given: Tensor | None = None,
    /,
    *,
    axis: int = 0,
    split: Sequence[int] = (),
    num_outputs: int | None = None,
) -> tuple[Tensor, ...]:
    sizes = _numbers(given) or _numbers(split)
    if sizes:
        return tuple(torch.split(x, sizes, axis))
    if num_outputs is None:
        raise ValueError("Split must say its sizes")
    return tuple(torch.split(x, -(-x.shape[axis] // num_outputs), axis))


def _div(a: Tensor, b: Tensor, /) -> Tensor:
    # Whole numbers are divided as in C.
    whole = not (a.is_floating_point() or b.is_floating_point())
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


def _sum(*tensors: Tensor) -> Tensor:
    return sum(tensors[1:], tensors[0])


def _where(condition: Tensor, a: Tensor, b: Tensor, /) -> Tensor:
    return torch.where(condition, a, b)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Div": _div,
    "Dropout": _identity,
    "Elu": _elu,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": F.hardswish,
    "Identity": _identity,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "LogSoftmax": _log_softmax,
    "MatMul": torch.matmul,
    "MaxPool": _max_pool,
    "Mish": F.mish,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": torch.pow,
    "Range": _range,
    "Reciprocal": torch.reciprocal,
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceSum": _reduced(torch.sum),
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": F.softplus,
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Sum": _sum,
    "Tanh": torch.tanh,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
"""Operators by their ONNX names."""

WINDOWED = ("AveragePool", "Conv", "MaxPool")
"""Operators whose attributes are a `Window`."""

OLD = {"Softmax": _old_softmax, "LogSoftmax": _old_log_softmax}
"""What these meant before version 13: all axes from one on are one."""

ENDS = (_softmax, _log_softmax, _old_softmax, _old_log_softmax)


def program_of(path: Path, name: str) -> Program:
    """Read the program of an ONNX file.

    Raises ConsilienceError, with the expert's name, where the package `onnx` is missing, for an operator that
    is not in the list, for weights outside of the file's folder, and for a damaged file.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConsilienceError(
            f"expert {name!r} is an ONNX file, which needs the package onnx; pip install consilience[onnx]."
        ) from error
    with reading(f"the file of expert {name!r} must be an ONNX model", "export it again"):
        # The parser has errors of its own, which are no ValueError.
        try:
            model = onnx.load(str(path), load_external_data=False)
        except Exception as error:
            raise ConsilienceError(
                f"the file of expert {name!r} must be an ONNX model, got {type(error).__name__} at {path}."
            ) from error
        return _Reader(onnx, model.graph, path, name, _opset(model)).program()


def _opset(model: Any) -> int:
    """Return the version of the operators that a model has."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


class _Reader:
    """What reads one graph."""

    def __init__(self, onnx: Any, graph: Any, path: Path, name: str, version: int) -> None:
        self.onnx, self.graph, self.path, self.name, self.version = onnx, graph, path, name, version
        self.tensors: dict[str, Tensor] = {}

    def refused(self, what: str, remedy: str) -> ConsilienceError:
        """Return the error for a model that is not read."""
        return ConsilienceError(f"the ONNX file of expert {self.name!r} {what}; {remedy}.")

    def program(self) -> Program:
        """Read everything."""
        for weight in self.graph.initializer:
            self.tensors[weight.name] = self.array(weight)
        if len(self.graph.sparse_initializer):
            raise self.refused("must have dense weights, got sparse ones", "export dense weights")
        steps = [step for node in self.graph.node if (step := self.step(node)) is not None]

        outputs = [out.name for out in self.graph.output]
        if len(outputs) != 1:
            raise self.refused(
                f"must have one output, got {len(outputs)}: {', '.join(outputs)}",
                "export a model that returns its logits alone",
            )
        output = trimmed_output(steps, outputs[0], lambda step: step.call in ENDS)
        # Old files list weights among their inputs.
        inputs = [given for given in self.graph.input if given.name not in self.tensors]
        if not inputs:
            raise self.refused("must have an input, got none", "export a model that takes inputs")
        kind = inputs[0].type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.shape.dim]
        closed = len(inputs) == 1 and len(sizes) > 1 and all(size > 0 for size in sizes[1:])

        # Statistics of batch norm have no gradients.
        norms = [node for node in self.graph.node if node.op_type == "BatchNormalization"]
        fixed = {weight for node in norms for weight in node.input[3:]}
        entries = {weight: weight for weight in self.tensors.keys() - fixed}
        needed = used(steps, output)
        return Program(
            needed,
            tuple(given.name for given in inputs),
            output,
            self.tensors,
            entries,
            tuple(sizes[1:]) if closed else None,
            DTYPES[kind.elem_type],
            sizes[0] or None if sizes else None,
        )

    def array(self, tensor: Any) -> Tensor:
        """Read the numbers of a tensor."""
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            (location,) = (entry.value for entry in tensor.external_data if entry.key == "location")
            # A file may name any path; only a file next to it belongs to it.
            if Path(location).name != location or not inside(self.path.parent / location):
                raise self.refused(
                    f"must have its weights in its own folder, got {location!r}", "put that file next to it"
                )
            self.onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
        return torch.from_numpy(self.onnx.numpy_helper.to_array(tensor).copy())

    def step(self, node: Any) -> Step | None:
        """Return a node as a step; None for a constant, which becomes a tensor."""
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        given: dict[str, Any] = {entry.name: self.attribute(entry) for entry in node.attribute}
        if kind == "Constant":
            (value,) = given.values()
            self.tensors[node.output[0]] = torch.as_tensor(value)
            return None
        if kind == "BatchNormalization" and given.pop("training_mode", 0):
            raise self.refused(
                "must be exported in eval mode, got batch norm in training mode", "export again"
            )

        call = OLD.get(kind) if self.version < 13 else None
        call = call or OPERATORS.get(kind)
        # Names of outputs that nobody reads may be left out.
        outputs = list(node.output)
        while outputs and not outputs[-1]:
            outputs.pop()
        several = kind == "Split" or len(outputs) == 1 or kind == "Dropout"
        unread = [] if call is None else self.unread(kind, call, given)
        if call is None or not several or unread:
            extra = f" with {', '.join(unread)}" if unread else ""
            raise self.refused(
                f"must have operators of the list in consilience.experts, got {kind}{extra}",
                "export the model without it, or save the model with its card",
            )
        if kind in WINDOWED:
            given = {"window": Window(**given)}
        args = tuple(Ref(value) if value else None for value in node.input)
        return Step(call, args, given, tuple(outputs if kind != "Dropout" else outputs[:1]))

    def unread(self, kind: str, call: Callable[..., Any], given: Mapping[str, Any]) -> list[str]:
        """Return the attributes that an operator would not read."""
        if kind in WINDOWED:
            return [key for key in given if key not in Window._fields]
        try:
            known = inspect.signature(call).parameters
        # Functions of torch have no signature, and those in the list no attributes.
        except (TypeError, ValueError):
            return list(given)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            return []
        return [key for key in given if key not in known]

    def attribute(self, entry: Any) -> Any:
        """Return the value of an attribute."""
        value = self.onnx.helper.get_attribute_value(entry)
        if isinstance(value, self.onnx.TensorProto):
            return self.array(value)
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, int | float):
            return value
        found = list(value) if hasattr(value, "__iter__") else None
        if found is None or not all(isinstance(part, int | float) for part in found):
            raise self.refused(
                f"must have plain attributes, got {entry.name!r}", "export the model without it"
            )
        return tuple(found)
