"""Archives of torch.export (.pt2) as programs: the graph in JSON and the raw weights, and nothing else.

`torch.export.load` is not used. It unpickles an archive's sample inputs by `torch.load(weights_only=False)`
where `weights_only=True` fails, and weights and constants that the archive marks so. It evaluates texts of
the archive with sympy, and finds operators of any name in torch. Here no pickle of an archive is read, sizes
are what the inputs have, and operators are those of a list.
"""

from __future__ import annotations

import json
import operator
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, reading
from consilience.experts._graph import Program, Ref, Step, read_by, trimmed_output, used

_ATEN = """
    _adaptive_avg_pool2d _log_softmax _native_batch_norm_legit_no_training _softmax _to_copy _unsafe_view abs
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d add addmm alias amax amin any all arange
    avg_pool1d avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bitwise_or bmm cat chunk clamp clamp_max
    clamp_min clone constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    convolution cos cumsum detach div dropout einsum elu embedding eq erf exp expand expm1 flatten
    flip floor full full_like gather ge gelu glu group_norm gt hardsigmoid hardswish hardtanh index
    index_select layer_norm le leaky_relu lift_fresh_copy linear linalg_vector_norm log log1p log_softmax
    logical_and logical_not logical_or lt masked_fill matmul max max_pool1d max_pool2d
    max_pool2d_with_indices maximum mean min minimum mish mm movedim mul mv narrow native_batch_norm
    native_group_norm native_layer_norm ne neg new_ones new_zeros numel ones ones_like pad permute pow prelu
    reciprocal relu relu6 remainder repeat repeat_interleave reshape rms_norm roll rsqrt rsub
    scaled_dot_product_attention select selu sigmoid sign silu sin slice softmax softplus split
    split_with_sizes sqrt squeeze stack std sub sum sym_numel sym_size t tanh to transpose tril triu unbind
    unflatten unsqueeze upsample_bilinear2d upsample_nearest2d var view view_as where zeros zeros_like
"""
ATEN = frozenset(_ATEN.split())
"""Operators that read nothing but their arguments, and draw nothing."""

_FRESH = """
    _native_batch_norm_legit_no_training adaptive_avg_pool2d add addmm avg_pool2d batch_norm bmm cat conv1d
    conv2d conv3d convolution div group_norm layer_norm lift_fresh_copy linear matmul max_pool2d mm mul relu
    rsub sub sym_size
"""
FRESH = frozenset(_FRESH.split())
"""Operators whose results share no memory with their arguments."""

NUMBERS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "eq", "ne", "ge", "le")
} | {"gt": operator.gt, "lt": operator.lt}
"""Arithmetic of sizes."""

CHECKS = ("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")
"""Operators that only check sizes, which fail by themselves where they do not fit."""

ENDS = ("softmax", "_softmax", "log_softmax", "_log_softmax")

DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""Types by the numbers that the format has for them."""

MEMORY = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
PLAIN = ("as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools")


def program_of(path: Path, name: str) -> Program:
    """Read the program of an archive.

    Raises ConsilienceError, with the expert's name, for one that needs pickles or code, has operators that
    are not in the list, was exported in training mode, or is damaged.
    """
    with reading(f"the file of expert {name!r} must be an archive of torch.export", "export it again"):
        try:
            with zipfile.ZipFile(path) as archive:
                return _Archive(archive, name).program()
        except zipfile.BadZipFile as error:
            raise ConsilienceError(f"{path} is no archive of torch.export: {error}.") from error


class _Archive:
    """An open archive."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self.archive, self.name = archive, name
        files = archive.namelist()
        models = [file for file in files if "/models/" in file and file.endswith(".json")]
        if len(models) != 1:
            compiled = any("/aotinductor/" in file for file in files)
            got = "compiled code" if compiled else f"{len(models)} models"
            raise self.refused(f"must hold one exported program, got {got}", "save it with torch.export.save")
        # What torch writes is stored as it is, so that a file unpacks to no more than its size.
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise self.refused("must not be compressed, got a compressed file", "use torch.export.save")
        self.root, _, model = models[0].partition("/models/")
        self.model = model.removesuffix(".json")
        if f"{self.root}/byteorder" in files and archive.read(f"{self.root}/byteorder") != b"little":
            raise self.refused("must be little-endian, got another byte order", "export it elsewhere")

    def refused(self, what: str, remedy: str) -> ConsilienceError:
        """Return the error for an archive that is not read."""
        return ConsilienceError(f"the archive of expert {self.name!r} {what}; {remedy}.")

    def json(self, place: str) -> Any:
        """Read a JSON file of the archive."""
        return json.loads(self.archive.read(f"{self.root}/{place}"))

    def program(self) -> Program:
        """Read everything."""
        described = self.json(f"models/{self.model}.json")["graph_module"]
        graph, signature = described["graph"], described["signature"]
        stored = self.stored("weights") | self.stored("constants")

        # What the inputs of the graph are: weights, by their names in a state dict, or what a user gives.
        tensors: dict[str, Tensor] = {}
        entries: dict[str, str] = {}
        inputs: list[str] = []
        for spec in signature["input_specs"]:
            ((kind, value),) = spec.items()
            if kind == "user_input" and "as_tensor" in value["arg"]:
                inputs.append(value["arg"]["as_tensor"]["name"])
            elif kind in ("parameter", "buffer", "tensor_constant"):
                place, stem = value["arg"]["name"], value[f"{kind}_name"]
                tensors[place] = stored[stem]
                if kind == "parameter":
                    entries[place] = stem
            else:
                raise self.refused(
                    f"must take tensors, got an input of kind {kind}",
                    "export a module whose inputs are tensors",
                )

        given = [step for node in graph["nodes"] if (step := self.step(node)) is not None]
        steps, renamed = self.out_of_place(given)
        output = self.output(signature["output_specs"])
        output = renamed.get(output, output)
        output = trimmed_output(steps, output, lambda step: _operator(step) in ENDS)
        shape, dtype, batch = self.sample(graph["tensor_values"], inputs)
        needed = used(steps, output)
        return Program(needed, tuple(inputs), output, tensors, entries, shape, dtype, batch)

    def output(self, specs: Any) -> str:
        """Return the name of the one output."""
        # Others are changes of buffers, such as running statistics.
        outs = [spec["user_output"]["arg"] for spec in specs if "user_output" in spec]
        if len(outs) != len(specs):
            raise self.refused(
                "must change no buffer, got one that does: it was exported in training mode",
                "export model.eval()",
            )
        if len(outs) != 1 or "as_tensor" not in outs[0]:
            raise self.refused(
                f"must have one tensor as its output, got {len(outs)} outputs",
                "export a module that returns its logits alone",
            )
        return str(outs[0]["as_tensor"]["name"])

    def sample(
        self, values: Mapping[str, Any], inputs: list[str]
    ) -> tuple[tuple[int, ...] | None, torch.dtype, int | None]:
        """Return the shape and type of a sample, and the number of samples if it is fixed."""
        if not inputs:
            raise self.refused("must have an input, got none", "export a module that takes inputs")
        # Sizes that are texts are open: only whole numbers are read.
        fact = values[inputs[0]]
        sizes = [size.get("as_int") for size in fact["sizes"]]
        open_shape = len(inputs) > 1 or any(size is None for size in sizes[1:]) or not sizes
        shape = None if open_shape else tuple(int(size) for size in sizes[1:])
        batch = sizes[0] if sizes else None
        return shape, DTYPES[fact["dtype"]], None if batch is None else int(batch)

    def stored(self, what: str) -> dict[str, Tensor]:
        """Read the tensors of one folder, by name."""
        found = {}
        for stem, fact in self.json(f"data/{what}/{self.model}_{what}_config.json")["config"].items():
            meta = fact["tensor_meta"]
            if fact["use_pickle"] or meta is None:
                raise self.refused(
                    f"must need no pickle, got one for {stem!r}: a pickle can run code and is not read",
                    "export plain tensors",
                )
            data = self.archive.read(f"{self.root}/data/{what}/{fact['path_name']}")
            dtype = DTYPES[meta["dtype"]]
            flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)
            sizes, strides = ([int(size["as_int"]) for size in meta[key]] for key in ("sizes", "strides"))
            offset = int(meta["storage_offset"]["as_int"])
            # torch refuses what lies outside of the data.
            found[stem] = flat.as_strided(sizes, strides, offset).clone(memory_format=torch.contiguous_format)
        return found

    def step(self, node: Mapping[str, Any]) -> Step | None:
        """Return a node as a step; None for one that only checks."""
        target = str(node["target"])
        if target.removeprefix("torch.ops.aten.").partition(".")[0] in CHECKS:
            return None
        # All arguments of ATen's operators have names.
        kwargs = {given["name"]: self.argument(given["arg"]) for given in node["inputs"]}
        outputs: list[str] = []
        for out in node["outputs"]:
            (value,) = out.values()
            named = value if isinstance(value, list) else [value]
            outputs += [str(entry.get("name", entry.get("as_name", ""))) if entry else "" for entry in named]

        # Arithmetic of sizes takes its operands by place.
        if target.startswith("_operator.") and target.removeprefix("_operator.") in NUMBERS:
            call = NUMBERS[target.removeprefix("_operator.")]
            return Step(call, tuple(kwargs.values()), {}, tuple(outputs))
        operation, _, overload = target.removeprefix("torch.ops.aten.").partition(".")
        if not target.startswith("torch.ops.aten.") or operation.removesuffix("_") not in ATEN:
            raise self.refused(
                f"must have operators of the list in consilience.experts, got {target!r}",
                "export a model without it, or save the model with its card",
            )
        if kwargs.get("train") is True or kwargs.get("training") is True:
            raise self.refused(
                f"must be exported in eval mode, got {target!r} in training mode", "export model.eval()"
            )
        return Step(getattr(getattr(torch.ops.aten, operation), overload), (), kwargs, tuple(outputs))

    def out_of_place(self, steps: list[Step]) -> tuple[list[Step], dict[str, str]]:
        """Return the steps with operators that change nothing in place, and the newest names of values.

        That is the same only where no other name shares the memory of what is changed.
        """
        found: list[Step] = []
        renamed: dict[str, str] = {}
        owned: set[str] = set()
        for step in steps:
            # What read the old name reads the new one from here on.
            kwargs = {name: _renamed(value, renamed) for name, value in step.kwargs.items()}
            args = tuple(_renamed(value, renamed) for value in step.args)
            call, operation = step.call, _operator(step)
            if operation.endswith("_"):
                (changed, *_) = (value.name for value in kwargs.values() if isinstance(value, Ref))
                if changed not in owned:
                    raise self.refused(
                        f"must not change memory that has several names, got {operation!r}",
                        "save program.run_decompositions()",
                    )
                packet = getattr(torch.ops.aten, operation.removesuffix("_"))
                call = getattr(packet, call.__name__.partition(".")[2])
                renamed |= {old: step.outputs[0] for old, new in renamed.items() if new == changed}
                renamed[changed] = step.outputs[0]

            # A view keeps the memory of its argument alive under another name.
            if operation.removesuffix("_") in FRESH or operation.endswith("_"):
                owned |= set(step.outputs)
            else:
                owned -= read_by(Step(call, args, kwargs, ()))
            found.append(Step(call, args, kwargs, step.outputs))
        return found, renamed

    def argument(self, given: Mapping[str, Any]) -> Any:
        """Return an argument of a node."""
        ((kind, value),) = given.items()
        if kind == "as_none":
            return None
        if kind in PLAIN:
            return value
        if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
            return _named(value)
        if kind in ("as_tensors", "as_sym_ints", "as_sym_floats"):
            return [_named(entry) for entry in value]
        if kind == "as_optional_tensors":
            return [_named(entry["as_tensor"]) if "as_tensor" in entry else None for entry in value]
        if kind == "as_optional_tensor":
            return _named(value["as_tensor"]) if "as_tensor" in value else None
        if kind == "as_scalar_type":
            return DTYPES[value]
        if kind == "as_memory_format":
            return MEMORY[value]
        # Tensors are where the inputs are, whatever the device of the export.
        if kind in ("as_device", "as_layout"):
            return None
        raise self.refused(f"must have plain arguments, got one of kind {kind}", "export another model")


def _named(value: Mapping[str, Any]) -> Any:
    """Return what a value of a graph is: a name, or a number."""
    name = value.get("name", value.get("as_name"))
    if name is not None:
        return Ref(str(name))
    return next(number for key, number in value.items() if key in ("as_int", "as_float", "as_bool"))


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Return an argument that refers to the newest names."""
    if isinstance(value, Ref):
        return Ref(names.get(value.name, value.name))
    return [_renamed(inner, names) for inner in value] if isinstance(value, list) else value


def _operator(step: Step) -> str:
    """Return the name of an operator of ATen; "" for anything else."""
    packet = getattr(step.call, "overloadpacket", None)
    return "" if packet is None else str(packet).removeprefix("aten.")
