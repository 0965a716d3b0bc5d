"""Named tensors wherever they lie (in memory, in files of safetensors, behind LoRA adapters), read piece by piece."""

from __future__ import annotations

import json
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from consilience.core.errors import ConsilienceError, kind_of

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NATIVE = {"F32": "f", "F64": "d"}
Array = npt.NDArray[Any]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PIECE = 1 << 20
"""Elements that are read at once where a tensor is gone through."""


class Entries(ABC):
    """Named tensors that are read piece by piece: `shapes` and `dtypes` by name, and `name`, for errors."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    aliases: Mapping[str, str] = MappingProxyType({})
    """Names of a tensor that goes by another name too (tied weights), and that name."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of the flattened tensor, in its own dtype; not to be written to."""

    def into(self, name: str, start: int, out: Array) -> None:
        """Fill `out` [b] with the elements from `start` on, in its dtype."""
        torch.from_numpy(out).copy_(self.read(name, start, start + len(out)))

    def size(self, name: str) -> int:
        """How many elements a tensor has."""
        return torch.Size(self.shapes[name]).numel()

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Elements start:stop of the flattened tensor, one after another in pieces that fit in memory, each with where it begins."""
        stop = self.size(name) if stop is None else stop
        for at in range(start, stop, PIECE):
            yield at, self.read(name, at, min(stop, at + PIECE))

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape and dtype."""
        return self.read(name, 0, self.size(name)).reshape(self.shapes[name])


class Memory(Entries):
    """A state dict, or a module's."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        for n, t in tensors.items():
            if not isinstance(n, str) or not isinstance(t, Tensor):
                raise ConsilienceError(
                    f"a state dict should have tensors by name. Found {kind_of(t)} for {n!r} in {name}."
                )
        self.name = name
        self._tensors = {n: t.detach() for n, t in tensors.items()}
        self.shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        self.dtypes = {n: t.dtype for n, t in tensors.items()}
        first: dict[tuple[Any, ...], str] = {}
        aliases: dict[str, str] = {}
        for n, t in self._tensors.items():
            if (
                t.numel()
                and (known := first.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device), n))
                != n
            ):
                aliases[n] = known
        self.aliases = aliases
        self._tensors = {n: t.contiguous() for n, t in self._tensors.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].view(-1)[start:stop].cpu()


class Files(Entries):
    """One file of safetensors, or a folder with one, or with several and an index as on the Hugging Face hub.

    Raises ConsilienceError for what is not one: a pickle, a truncated file, a header that lies.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.files, self.index = _files(self.path)
        self.shapes, self.dtypes = {}, {}
        self.where: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}
        self._at: dict[str, tuple[int, int, str]] = {}
        handles: list[int] = []
        self._close = weakref.finalize(self, _close, handles)
        for file in self.files:
            handle = os.open(file, os.O_RDONLY)
            handles.append(handle)
            self._head(file, handle)
        for n, f in (self.index or {}).items():
            if self.where.get(n) != self.path / f:
                raise ConsilienceError(
                    f"an index should say which file has a tensor. Found {n!r} not in {f} at {self.path / INDEX}."
                )

    def _head(self, file: Path, handle: int) -> None:
        size = os.fstat(handle).st_size
        start = os.pread(handle, 8, 0)
        length = int.from_bytes(start, "little")
        pickled = start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
        if len(start) < 8 or length > min(size - 8, 100_000_000):
            if pickled:
                raise ConsilienceError(
                    f"weights should be safetensors; a pickle can run code and is not read. Found one at {file}."
                )
            raise ConsilienceError(
                f"a file of safetensors should hold its whole header. Found {size} bytes at {file}."
            )
        try:
            head = json.loads(os.pread(handle, length, 8))
            self.metadata |= head.pop("__metadata__", {})
            facts = {
                n: (str(f["dtype"]), _numbers(f["shape"]), *_pair(f["data_offsets"])) for n, f in head.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            if pickled:
                raise ConsilienceError(
                    f"weights should be safetensors; a pickle can run code and is not read. Found one at {file}."
                ) from e
            raise ConsilienceError(
                f"a file of safetensors should begin with a JSON header. Found none at {file}."
            ) from e
        for n, (kind, shape, begin, end) in facts.items():
            if kind not in DTYPES:
                raise ConsilienceError(
                    f"a tensor should have one of the dtypes {', '.join(DTYPES)}. Found {kind} for {n!r} at {file}."
                )
            if n in self.shapes:
                raise ConsilienceError(
                    f"a tensor should lie in one file. Found {n!r} twice, at {file} again."
                )
            wanted = torch.Size(shape).numel() * DTYPES[kind].itemsize
            if not 0 <= begin <= end or end - begin != wanted:
                raise ConsilienceError(
                    f"the header should give {n!r} {wanted} bytes. Found {end - begin} at {file}."
                )
            if 8 + length + end > size:
                raise ConsilienceError(
                    f"a file should be whole: its header promises {8 + length + max(f[3] for f in facts.values())} bytes. Found {size} "
                    f"at {file} (cut in {n!r})."
                )
            self.shapes[n], self.dtypes[n] = shape, DTYPES[kind]
            self.where[n], self._at[n] = file, (handle, 8 + length + begin, NATIVE.get(kind, ""))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, dtype=self.dtypes[name])
        if len(out):
            self._fill(name, start, out.view(torch.uint8).numpy(), out.element_size())
        return out

    def into(self, name: str, start: int, out: Array) -> None:
        handle, begin, char = self._at[name]
        if char != out.dtype.char:
            super().into(name, start, out)
        elif os.preadv(handle, (out,), begin + start * out.itemsize) != out.nbytes:  # type: ignore[arg-type]
            self._fill(name, start, out, out.itemsize)

    def _fill(self, name: str, start: int, out: Array, width: int) -> None:
        handle, begin, _ = self._at[name]
        at, done = begin + start * width, 0
        while done < out.nbytes:
            got = os.preadv(handle, [out.view(np.uint8)[done:].data], at + done)
            if not got:
                raise ConsilienceError(
                    f"a file should stay as it is while it is read. Found an end in {name!r} at {self.where[name]}."
                )
            done += got


class Adapter(Entries):
    """A base with a LoRA adapter on it, as peft keeps it: W + scale B A, made where it is read and nowhere else.

    scale is alpha / r (alpha / sqrt(r) with `use_rslora`), by `rank_pattern` and `alpha_pattern` where there are such; entries that the adapter
    has whole (`modules_to_save`, biases) take the base's place. Raises ConsilienceError for DoRA and other kinds. Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, folder: str | Path, base: Entries) -> None:
        folder = Path(folder)
        self.name, self.base = str(folder), base
        self.shapes, self.dtypes, self.aliases = dict(base.shapes), dict(base.dtypes), base.aliases
        self.config = _json(folder / ADAPTER)
        kind = self.config.get("peft_type", "LORA")
        if kind != "LORA" or self.config.get("use_dora"):
            raise ConsilienceError(
                f"an adapter should be LoRA. Found {'DoRA' if kind == 'LORA' else kind} at {folder}."
            )
        if not (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_model.bin").is_file():
            raise ConsilienceError(
                f"weights should be safetensors; a pickle can run code and is not read. Found adapter_model.bin at {folder}."
            )
        own = Files(folder / "adapter_model.safetensors")
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._whole: dict[str, Tensor] = {}
        found: dict[str, dict[str, Tensor]] = {}
        for n in own.shapes:
            plain = (
                n.removeprefix("base_model.model.")
                .replace(".modules_to_save.default", "")
                .replace(".modules_to_save", "")
            )
            plain = plain.replace(".default.", ".").removesuffix(".default").replace(".base_layer.", ".")
            tensor = own.whole(n)
            layer, _, leaf = plain.partition(".lora_")
            if leaf:
                found.setdefault(layer, {})[leaf.removesuffix(".weight")] = tensor
            elif plain in base.shapes and tuple(tensor.shape) == base.shapes[plain]:
                self._whole[plain] = tensor.contiguous()
                self.dtypes[plain] = tensor.dtype
            else:
                raise ConsilienceError(
                    f"an adapter's tensors should belong to the base {base.name}. Found {n!r} {list(tensor.shape)} at {folder}."
                )
        for layer, parts in found.items():
            self._pairs[f"{layer}.weight"] = self._product(layer, parts, folder)

    @property
    def changed(self) -> set[str]:
        """The entries that it changes."""
        return {*self._pairs, *self._whole}

    def _product(self, layer: str, parts: dict[str, Tensor], folder: Path) -> tuple[Tensor, Tensor]:
        """Two factors whose product is the layer's change, scaled, in float32."""
        n = f"{layer}.weight"
        if n not in self.base.shapes:
            raise ConsilienceError(
                f"an adapter's layers should be the base's ({self.base.name}). Found {layer!r} at {folder}."
            )
        if parts.keys() == {"embedding_A", "embedding_B"}:
            a, b, turned = parts["embedding_A"], parts["embedding_B"], True
        elif parts.keys() == {"A", "B"}:
            a, b, turned = parts["A"], parts["B"], bool(self.config.get("fan_in_fan_out"))
        else:
            raise ConsilienceError(
                f"a layer of LoRA should have A and B. Found {sorted(parts)} for {layer!r} at {folder}."
            )
        a, b = a.float().flatten(1), b.float().flatten(1)
        rank = len(a)
        alpha = float(
            _by_pattern(self.config.get("alpha_pattern"), layer, self.config.get("lora_alpha", rank))
        )
        scale = alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank
        left, right = (a.T * scale, b.T) if turned else (b * scale, a)
        shape = self.base.shapes[n]
        if (
            len(left) != shape[0]
            or right.shape[1] != torch.Size(shape[1:]).numel()
            or left.shape[1] != len(right)
        ):
            raise ConsilienceError(
                f"A and B of {layer!r} should make {shape}. Found {tuple(b.shape)} and {tuple(a.shape)} at {folder}."
            )
        return left.contiguous(), right.contiguous()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._whole:
            return self._whole[name].reshape(-1)[start:stop]
        found = self.base.read(name, start, stop)
        if name not in self._pairs:
            return found
        left, right = self._pairs[name]
        wide = right.shape[1]
        first, last = start // wide, -(-stop // wide)
        change = (left[first:last] @ right).reshape(-1)[start - first * wide : stop - first * wide]
        return found.to(torch.promote_types(found.dtype, torch.float32)) + change


def opened(what: Any, base: Entries | None = None, name: str | None = None) -> Entries:
    """What reads a state dict, a module, a path of safetensors, or (with `base`) of a LoRA adapter.

    Raises ConsilienceError for anything else, by file and tensor.
    """
    if isinstance(what, Entries):
        return what
    if isinstance(what, nn.Module):
        return Memory(what.state_dict(keep_vars=True), name or type(what).__name__)
    if isinstance(what, Mapping):
        return Memory(what, name or "a state dict")
    if isinstance(what, str | Path):
        if (Path(what) / ADAPTER).is_file():
            if base is None:
                raise ConsilienceError(f"an adapter should come with its base. Found {what} alone.")
            return Adapter(what, base)
        return Files(what)
    raise ConsilienceError(f"a model should be a path, a state dict or a module. Found {kind_of(what)}.")


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of weights at a path, and the index's map where there is one."""
    if path.suffix in PICKLES:
        raise ConsilienceError(
            f"weights should be safetensors; a pickle can run code and is not read. Found {path}."
        )
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise ConsilienceError(
            f"a model should be a file or a folder of safetensors. Found nothing at {path}."
        )
    if (path / INDEX).is_file():
        try:
            index = {n: str(f) for n, f in json.loads((path / INDEX).read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConsilienceError(
                f"an index should be JSON with a `weight_map`. Found none at {path / INDEX}."
            ) from e
        names = sorted(set(index.values()))
        if absent := [n for n in names if not (path / n).is_file()]:
            raise ConsilienceError(
                f"a folder should hold all files of its index. Found no {', '.join(absent)} at {path}."
            )
        return [path / n for n in names], index
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"], None
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickled and not found:
        raise ConsilienceError(
            f"weights should be safetensors; a pickle can run code and is not read. Found {pickled[0]} at {path}."
        )
    said = f"{len(found)} files and no {INDEX}" if found else "none"
    raise ConsilienceError(
        f"a folder should hold model.safetensors, or several files and their index. Found {said} at {path}."
    )


def _numbers(values: Any) -> tuple[int, ...]:
    """Whole numbers >= 0; else a ValueError."""
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(values)
    return tuple(values)


def _pair(values: Any) -> tuple[int, int]:
    begin, end = _numbers(values)
    return begin, end


def _json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as e:
        raise ConsilienceError(f"a configuration should be JSON. Found {e} at {path}.") from e
    if not isinstance(found, dict):
        raise ConsilienceError(
            f"a configuration should be a JSON object. Found a {type(found).__name__} at {path}."
        )
    return found


def finite(t: Tensor) -> bool:
    """Whether all numbers are finite, also in a dtype of 8 bits."""
    return bool(torch.isfinite(t.float() if t.dtype.itemsize < 2 else t).all())


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The value whose pattern is the end of a layer's name, as peft has it."""
    import re

    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _close(handles: list[int]) -> None:
    for h in handles:
        os.close(h)
