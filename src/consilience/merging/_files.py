"""Named tensors in memory, in files of safetensors, or behind LoRA adapters, read piece by piece."""

from __future__ import annotations

import json
import os
import pickle
import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from consilience.core.errors import UNREADABLE, ConsilienceError, kind_of
from consilience.core.model import Model
from consilience.core.params import same

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
# Dtypes that numpy has too, so that a file is read straight into an array of it.
NATIVE = {"F32": "f", "F64": "d"}
Array = npt.NDArray[Any]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TORCH = (".bin", ".pt", ".pth", ".ckpt")
"""Files that torch.save writes; `loaded` reads their tensors, and nothing else of them."""
NESTS = ("state_dict", "model_state_dict", "model")
"""Where trainers put the state dict in what they save."""
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PIECE = 1 << 20
"""Elements read at once by `Entries.pieces`."""


class Entries(ABC):
    """Named tensors that are read piece by piece: `shapes` and `dtypes` by name, and `name` for errors."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    aliases: Mapping[str, str] = MappingProxyType({})
    """Further names of tensors that have several (tied weights), each with the first name."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read elements start:stop of the flattened tensor, in its dtype; they must not be changed."""

    def into(self, name: str, start: int, out: Array) -> None:
        """Fill `out` [b] with the elements from `start` on, in the dtype of `out`."""
        torch.from_numpy(out).copy_(self.read(name, start, start + len(out)))

    def size(self, name: str) -> int:
        """Count the elements of a tensor."""
        return torch.Size(self.shapes[name]).numel()

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield elements start:stop of the flattened tensor in small pieces, each with its first index."""
        stop = self.size(name) if stop is None else stop
        for at in range(start, stop, PIECE):
            yield at, self.read(name, at, min(stop, at + PIECE))

    def whole(self, name: str) -> Tensor:
        """Read a tensor in its shape and dtype."""
        return self.read(name, 0, self.size(name)).reshape(self.shapes[name])


class Memory(Entries):
    """A state dict, given or of a module."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        for n, t in tensors.items():
            if not isinstance(n, str) or not isinstance(t, Tensor):
                raise ConsilienceError(
                    f"a state dict must hold tensors by name, got {kind_of(t)} for {n!r} in {name}."
                )
        self.name = name
        self._tensors = {n: t.detach() for n, t in tensors.items()}
        self.shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        self.dtypes = {n: t.dtype for n, t in tensors.items()}

        # Tied weights share their memory. Empty tensors all lie at address 0, and are not tied.
        first: dict[tuple[Any, ...], str] = {}
        aliases: dict[str, str] = {}
        for n, t in self._tensors.items():
            if t.numel():
                known = first.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device), n)
                if known != n:
                    aliases[n] = known
        self.aliases = aliases
        # After the ties were found, since a copy has memory of its own.
        self._tensors = {n: t.contiguous() for n, t in self._tensors.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].view(-1)[start:stop].cpu()


class Place(NamedTuple):
    """Where a tensor lies: open file, offset of its first byte, numpy's code of its dtype ("" if none)."""

    handle: int
    offset: int
    code: str


class Header(NamedTuple):
    """One tensor in the header of a file of safetensors; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Files(Entries):
    """One file of safetensors, a folder with one, or a folder with several and an index (Hugging Face hub).

    Raises ConsilienceError for anything else: a pickle, a truncated file, a header that contradicts its file.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self.name = str(path)
        self.files, self.index = _files(self.path)
        self.shapes, self.dtypes = {}, {}
        self.where: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, Place] = {}

        # Handles stay open for all reads of a merge; they are closed with the object, also after an error
        # here.
        handles: list[int] = []
        self._close = weakref.finalize(self, _close, handles)
        for file in self.files:
            handle = os.open(file, os.O_RDONLY)
            handles.append(handle)
            length, facts = self._read_header(file, handle)
            self._add(file, handle, 8 + length, facts)
            # The format's own reader has the last word on a header: what others refuse is not merged.
            try:
                safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ConsilienceError(f"{file} is no valid file of safetensors: {error}.") from error

        for n, file_name in (self.index or {}).items():
            if self.where.get(n) != self.path / file_name:
                raise ConsilienceError(
                    f"the index {self.path / INDEX} is wrong: {n!r} is not in {file_name}."
                )

    def _read_header(self, file: Path, handle: int) -> tuple[int, dict[str, Header]]:
        """Read the length of the header, and its entries; keep its metadata."""
        size = os.fstat(handle).st_size
        start = os.pread(handle, 8, 0)
        length = int.from_bytes(start, "little")

        # Some writers name their pickles .safetensors: that deserves a better error than a broken header.
        pickled = start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
        if len(start) < 8 or length > min(size - 8, 100_000_000):
            if pickled:
                raise pickle_refused(file)
            raise ConsilienceError(f"{file} ends within its safetensors header, after {size} bytes.")
        try:
            head = json.loads(os.pread(handle, length, 8))
            self.metadata |= head.pop("__metadata__", {})
            facts = {
                n: Header(str(fact["dtype"]), _numbers(fact["shape"]), *_pair(fact["data_offsets"]))
                for n, fact in head.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if pickled:
                raise pickle_refused(file) from error
            raise ConsilienceError(f"{file} has no JSON header of safetensors.") from error
        return length, facts

    def _add(self, file: Path, handle: int, data: int, facts: Mapping[str, Header]) -> None:
        """Check the tensors of a file, whose data begin at byte `data`, and note their places."""
        size = os.fstat(handle).st_size
        for n, fact in facts.items():
            # It would be printed, into a terminal that obeys control characters.
            if not n.isprintable():
                raise ConsilienceError(f"names of tensors must be printable, got {n!r} in {file}.")
            if fact.dtype not in DTYPES:
                raise ConsilienceError(
                    f"the dtype of {n!r} in {file} must be one of {', '.join(DTYPES)}, got {fact.dtype}."
                )
            if n in self.shapes:
                raise ConsilienceError(
                    f"{n!r} must lie in one file, got it in {self.where[n]} and in {file}."
                )

            wanted = torch.Size(fact.shape).numel() * DTYPES[fact.dtype].itemsize
            if not 0 <= fact.begin <= fact.end or fact.end - fact.begin != wanted:
                raise ConsilienceError(
                    f"the header of {file} must give {n!r} {wanted} bytes, got {fact.end - fact.begin}."
                )
            if data + fact.end > size:
                promised = data + max(other.end for other in facts.values())
                raise ConsilienceError(
                    f"{file} is truncated: its header promises {promised} bytes, got {size} (cut in {n!r})."
                )
            self.shapes[n], self.dtypes[n], self.where[n] = fact.shape, DTYPES[fact.dtype], file
            self._places[n] = Place(handle, data + fact.begin, NATIVE.get(fact.dtype, ""))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        # As bytes, since numpy lacks bfloat16 and the 8-bit floats.
        out = torch.empty(stop - start, dtype=self.dtypes[name])
        if len(out):
            self._fill(name, start, out.view(torch.uint8).numpy(), out.element_size())
        return out

    def into(self, name: str, start: int, out: Array) -> None:
        handle, offset, code = self._places[name]
        if code != out.dtype.char:
            super().into(name, start, out)
        # One call nearly always reads all; a short read is finished in `_fill`.
        elif os.preadv(handle, (out,), offset + start * out.itemsize) != out.nbytes:  # type: ignore[arg-type]
            self._fill(name, start, out, out.itemsize)

    def _fill(self, name: str, start: int, out: Array, width: int) -> None:
        """Fill `out` with elements of `width` bytes from `start` on, in as many reads as that needs."""
        place = self._places[name]
        at, done = place.offset + start * width, 0
        while done < out.nbytes:
            got = os.preadv(place.handle, [out.view(np.uint8)[done:].data], at + done)
            if not got:
                raise ConsilienceError(
                    f"{self.where[name]} was cut in {name!r} while it was read; do not change files during a "
                    "merge."
                )
            done += got


class Adapter(Entries):
    """A base with a LoRA adapter in peft's format: W + scale B A, computed only for elements that are read.

    scale is alpha / r (alpha / sqrt(r) with `use_rslora`), by `rank_pattern` and `alpha_pattern` if given.
    Complete tensors of the adapter (`modules_to_save`, biases) take the base's place. Raises ConsilienceError
    for DoRA and other kinds. Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, folder: str | Path, base: Entries) -> None:
        folder = Path(folder)
        self.name, self.base = str(folder), base
        self.shapes, self.dtypes, self.aliases = dict(base.shapes), dict(base.dtypes), base.aliases
        self.config = read_json(folder / ADAPTER)
        kind = self.config.get("peft_type", "LORA")
        if kind != "LORA" or self.config.get("use_dora"):
            raise ConsilienceError(
                f"an adapter must be LoRA, got {'DoRA' if kind == 'LORA' else kind} at {folder}."
            )
        weights = folder / "adapter_model.safetensors"
        if not inside(weights) and (folder / "adapter_model.bin").is_file():
            raise pickle_refused(folder / "adapter_model.bin")
        own = Files(weights)

        # Adapters are small: their tensors stay in memory, and only products are computed piece by piece.
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._complete: dict[str, Tensor] = {}
        by_layer: dict[str, dict[str, Tensor]] = {}
        for n in own.shapes:
            plain, tensor = _name_in_base(n), own.whole(n)
            layer, _, leaf = plain.partition(".lora_")
            if leaf:
                by_layer.setdefault(layer, {})[leaf.removesuffix(".weight")] = tensor
            elif plain in base.shapes and tuple(tensor.shape) == base.shapes[plain]:
                self._complete[plain] = tensor.contiguous()
                self.dtypes[plain] = tensor.dtype
            else:
                raise ConsilienceError(
                    f"the adapter {folder} must fit the base {base.name}, got {n!r} {list(tensor.shape)}, "
                    "which has no entry there."
                )
        for layer, parts in by_layer.items():
            self._pairs[f"{layer}.weight"] = self._factors(layer, parts, folder)

    @property
    def changed(self) -> set[str]:
        """The entries that the adapter changes."""
        return {*self._pairs, *self._complete}

    def _factors(self, layer: str, parts: dict[str, Tensor], folder: Path) -> tuple[Tensor, Tensor]:
        """Return two factors whose product is the layer's change, scaled, in float32."""
        name = f"{layer}.weight"
        if name not in self.base.shapes:
            raise ConsilienceError(
                f"the adapter {folder} must fit the base {self.base.name}, which has no layer {layer!r}."
            )

        # Embeddings are looked up by row, and some layers (GPT-2's) store their weight transposed: then A
        # comes first.
        if parts.keys() == {"embedding_A", "embedding_B"}:
            down, up, transposed = parts["embedding_A"], parts["embedding_B"], True
        elif parts.keys() == {"A", "B"}:
            down, up, transposed = parts["A"], parts["B"], bool(self.config.get("fan_in_fan_out"))
        else:
            raise ConsilienceError(
                f"layer {layer!r} of the adapter {folder} must have A and B, got {sorted(parts)}."
            )
        down, up = down.float().flatten(1), up.float().flatten(1)

        rank = len(down)
        default = self.config.get("lora_alpha", rank)
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), layer, default))
        scale = alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank
        left, right = (down.T * scale, up.T) if transposed else (up * scale, down)

        shape = self.base.shapes[name]
        made = (len(left), right.shape[1])
        if made != (shape[0], torch.Size(shape[1:]).numel()) or left.shape[1] != len(right):
            raise ConsilienceError(
                f"A and B of {layer!r} must make {shape}, got {tuple(up.shape)} and {tuple(down.shape)} at "
                f"{folder}."
            )
        return left.contiguous(), right.contiguous()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._complete:
            return self._complete[name].reshape(-1)[start:stop]
        found = self.base.read(name, start, stop)
        if name not in self._pairs:
            return found

        # Only the rows of the product that the elements lie in.
        left, right = self._pairs[name]
        columns = right.shape[1]
        first, last = start // columns, -(-stop // columns)
        change = (left[first:last] @ right).reshape(-1)[start - first * columns : stop - first * columns]
        return found.to(torch.promote_types(found.dtype, torch.float32)) + change


def opened(what: Any, base: Entries | None = None, name: str | None = None) -> Entries:
    """Open a state dict, a module, a path of safetensors, or (with `base`) a path of a LoRA adapter.

    Raises ConsilienceError for anything else, with file and tensor.
    """
    # Opened models pass, so that a caller may open one and use it several times.
    if isinstance(what, Entries):
        return what
    if isinstance(what, nn.Module):
        return Memory(what.state_dict(keep_vars=True), name or type(what).__name__)
    if isinstance(what, Mapping):
        return Memory(what, name or "a state dict")
    if isinstance(what, str | Path):
        if inside(Path(what) / ADAPTER):
            if base is None:
                raise ConsilienceError(f"the adapter {what} needs its base, got none; give `base`.")
            return Adapter(what, base)
        return Files(what)
    raise ConsilienceError(f"a model must be a path, a state dict or a module, got {kind_of(what)}.")


def loaded(what: Any) -> Any:
    """Return the state dict of a file of torch.save or of a wrapped module; anything else as it is.

    Files are read with `weights_only`, which runs no code. Raises ConsilienceError, with the file, for one
    that has anything but tensors by name.
    """
    if isinstance(what, Model):
        (params, buffers), other = (what.init(torch.Generator().manual_seed(seed)) for seed in (0, 1))
        if not same(params, other[0]):
            raise ConsilienceError(
                "a model must have weights to be a checkpoint, got one that draws them by a seed; give its "
                "state dict, or wrap a trained module (models.wrap)."
            )
        return what.state_dict(params, buffers)

    path = Path(what) if isinstance(what, str | Path) else None
    if path is None or path.suffix not in TORCH or not path.is_file():
        return what
    rule = f"{path} must be a state dict of torch.save, with nothing but tensors by name"
    remedy = "save model.state_dict(), or better safetensors (other objects in a pickle can run code)"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, *UNREADABLE) as error:
        raise ConsilienceError(f"{rule}, got {type(error).__name__}; {remedy}.") from error

    for nest in NESTS:
        if isinstance(found, Mapping) and isinstance(found.get(nest), Mapping):
            found = found[nest]
    if not isinstance(found, Mapping) or not found:
        raise ConsilienceError(f"{rule}, got {kind_of(found)}; {remedy}.")
    other_kind = next((n for n, t in found.items() if not isinstance(t, Tensor)), None)
    if other_kind is not None:
        raise ConsilienceError(f"{rule}, got {kind_of(found[other_kind])} for {other_kind!r}; {remedy}.")
    return found


def stem(path: str | Path) -> str:
    """Name a checkpoint by its file, or by its folder if the file has a standard name.

    >>> stem("a/digits.safetensors"), stem("digits/model.safetensors")
    ('digits', 'digits')
    """
    place = Path(path)
    name = place.name.removesuffix(".safetensors")
    return place.parent.name if name in ("model", "adapter_model") and place.parent.name else name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConsilienceError(f"{path} must be JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConsilienceError(f"{path} must hold a JSON object, got a {type(found).__name__}.")
    return found


def pickle_refused(path: Path) -> ConsilienceError:
    """Return the error for weights in a pickle, which can run code when it is read."""
    return ConsilienceError(
        f"weights must be safetensors, got a pickle at {path}: a pickle can run code and is not read."
    )


def inside(path: Path) -> bool:
    """Whether a path is a file that lies in its folder; raise ConsilienceError for a link out of it.

    A folder of the Hugging Face cache, snapshots/REVISION, links to the files in blobs next to snapshots.
    """
    if not path.is_file():
        return False
    folder, real = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not real.is_relative_to(folder) and real.parent != blobs:
        raise ConsilienceError(
            f"{path} links to a file outside its folder, {real}; put a copy in its place if it belongs there."
        )
    return True


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Find the files of weights at a path, and the index's map if there is one."""
    if path.suffix in PICKLES:
        raise pickle_refused(path)
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise ConsilienceError(f"a model must be a file or a folder of safetensors, got nothing at {path}.")

    if inside(path / INDEX):
        index = _index(path / INDEX)
        names = sorted(set(index.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ConsilienceError(f"the index of {path} must name files in the folder, got {outside[0]!r}.")
        if absent := [name for name in names if not inside(path / name)]:
            raise ConsilienceError(f"{path} lacks {', '.join(absent)}, which its index names.")
        return [path / name for name in names], index
    if inside(path / "model.safetensors"):
        return [path / "model.safetensors"], None

    # Without an index several files might be shards of one model, or several models.
    found = sorted(file for file in path.glob("*.safetensors") if inside(file))
    if len(found) == 1:
        return found, None
    pickled = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if pickled and not found:
        raise pickle_refused(pickled[0])
    got = f"{len(found)} files and no {INDEX}" if found else "none"
    raise ConsilienceError(
        f"{path} must hold model.safetensors, or several files and their index, got {got}."
    )


def _index(path: Path) -> dict[str, str]:
    """Read the file name of each tensor."""
    try:
        return {n: str(file) for n, file in json.loads(path.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConsilienceError(f"the index {path} must be JSON with a `weight_map`.") from error


def _name_in_base(name: str) -> str:
    """Strip from the name of an adapter's tensor what peft adds to the base's name."""
    plain = name.removeprefix("base_model.model.")
    plain = plain.replace(".modules_to_save.default", "").replace(".modules_to_save", "")
    return plain.replace(".default.", ".").removesuffix(".default").replace(".base_layer.", ".")


def _numbers(values: Any) -> tuple[int, ...]:
    """Return whole numbers >= 0 as a tuple; raise ValueError for anything else."""
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(values)
    return tuple(values)


def _pair(values: Any) -> tuple[int, int]:
    begin, end = _numbers(values)
    return begin, end


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """Return the value whose pattern matches the end of a layer's name, as peft does.

    Raises ConsilienceError for a pattern that may take for ever on a long name.
    """
    # The first pattern that fits counts, in the order of the file.
    for pattern, value in (patterns or {}).items():
        # Time is exponential only where a repeated group repeats, and a power of the number of repeats.
        if re.search(r"\)[*+{]|\\\d|\(\?", pattern) or len(re.findall(r"[*+{]", pattern)) > 2:
            raise ConsilienceError(
                f"a pattern of an adapter must have at most two repeats and no repeated group, got {pattern}."
            )
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", layer)
        except re.error as error:
            raise ConsilienceError(f"{pattern!r} is no pattern of an adapter: {error}.") from error
        if fits:
            return value
    return default


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)
