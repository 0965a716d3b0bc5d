"""Parameters: a dictionary of tensors, its flat form, content hash and files; and keyed randomness."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from consilience.core.errors import ConsilienceError

Params = dict[str, Tensor]


def key(*parts: object) -> torch.Generator:
    """Return a generator that depends on its key alone: (seed, source, visit, epoch, step, purpose).

    Keys have no agent, engine or order in them, so that none of these changes what is drawn.

    >>> a, b = key(0, "digits", "shuffle"), key(0, "digits", "shuffle")
    >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    # One bit less, because a seed must fit in a signed integer.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def changes(tensor: Tensor) -> int:
    """Return a number that torch raises with every change in place; -1 for a tensor of inference mode."""
    return -1 if tensor.is_inference() else tensor._version


_DIGESTS = WeakTensorKeyDictionary()


def _digest(tensor: Tensor) -> bytes:
    """Return a hash of a tensor's bytes, computed once for as long as the tensor does not change."""
    version = changes(tensor)
    found = _DIGESTS.get(tensor)
    if found is not None and found[0] == version >= 0:
        return found[1]  # type: ignore[no-any-return]
    flat = tensor.detach().cpu().contiguous().view(-1)
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().data if tensor.numel() else b"").digest()
    _DIGESTS[tensor] = (version, digest)
    return digest


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, types, shapes and bytes. The order of the names does not matter."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode() + _digest(tensor))
    return total.hexdigest()[:32]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two dictionaries hold the same names and bit-equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


_ALIASES = WeakTensorKeyDictionary()
_PLACED = WeakTensorKeyDictionary()

FULL = (torch.float32, torch.float64)
"""The types of numbers to compute with; shorter ones, such as bfloat16, store frozen entries."""


def alias(tensor: Tensor) -> Tensor:
    """Return a tensor without its gradient, in the same memory: the same object whenever it is asked for.

    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> alias(p) is alias(p), alias(p).data_ptr() == p.data_ptr(), alias(p).requires_grad
    (True, True, False)
    """
    # Parameters of other classes carry more than numbers, such as the scales of a quantised layer.
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return tensor
    found = _ALIASES.get(tensor)
    # An assignment to `data` gives a parameter other memory.
    if found is None or found.data_ptr() != tensor.data_ptr():
        found = _ALIASES[tensor] = tensor.detach()
    return found  # type: ignore[no-any-return]


def placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a frozen tensor on a device: itself, or one copy that all who ask for it share.

    Full-precision numbers are cast to `dtype`; others, such as bfloat16 and int8, keep their type.
    """
    place = (device, dtype if tensor.dtype in FULL else tensor.dtype)
    reference = _PLACED.get(tensor, {}).get(place)
    found = reference() if reference is not None else None
    if found is None:
        found = tensor.to(*place)
        # Weak on both sides: a copy lives as long as a state holds it.
        if found is not tensor:
            _PLACED.setdefault(tensor, {})[place] = weakref.ref(found)
    return found


def computing(params: Mapping[str, Tensor]) -> Tensor:
    """Return an entry in a type to compute with, for `Tensor.to`; float32 zeros where all are shorter.

    >>> computing({"a": torch.zeros(1, dtype=torch.bfloat16)}).dtype
    torch.float32
    """
    full = next((tensor for tensor in params.values() if tensor.dtype in FULL), None)
    if full is not None:
        return full
    device = next((tensor.device for tensor in params.values()), None)
    return torch.zeros(0, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Layout:
    """Where each entry lies in one flat vector [n]. Entries are sorted by name.

    >>> layout = Layout.of({"w": torch.zeros(2, 3), "b": torch.ones(2)})
    >>> layout.size, layout.flatten({"b": torch.ones(2)}).tolist()
    (8, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(
        params: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Layout:
        """Return the layout of these entries, by default with the type and device of the first."""
        names = tuple(sorted(params))
        shapes = tuple(tuple(params[name].shape) for name in names)
        offsets, end = [], 0
        for shape in shapes:
            offsets.append(end)
            end += prod(shape)

        first = params[names[0]] if names else torch.zeros(0)
        place = torch.device(device) if device else first.device
        return Layout(names, shapes, tuple(offsets), dtype or first.dtype, place)

    @property
    def size(self) -> int:
        """The length n of the vector."""
        return self.offsets[-1] + prod(self.shapes[-1]) if self.names else 0

    def span(self, name: str) -> slice:
        """Return the slice of the vector that holds `name`."""
        index = self.names.index(name)
        return slice(self.offsets[index], self.offsets[index] + prod(self.shapes[index]))

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return one vector [n]. Entries that `params` lacks are zero."""
        if not self.names:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = params.get(name)
            if tensor is None:
                tensor = torch.zeros(shape, dtype=self.dtype, device=self.device)
            parts.append(tensor.detach().to(self.device, self.dtype).reshape(-1))
        return torch.cat(parts)

    def split(self, flat: Tensor) -> Params:
        """Return views of `flat` [n], by name, in their shapes."""
        return {
            name: flat[offset : offset + prod(shape)].view(shape)
            for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True)
        }


def finite(tensors: Mapping[str, Tensor], whose: str) -> None:
    """Refuse NaN and infinity, with the name of the entry and of `whose` it is."""
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ConsilienceError(f"parameters must be finite, got NaN or infinity in {name!r} of {whose}.")


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; whole numbers never are.

    >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([torch.nan]))
    (True, False)
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # Numbers of 8 bits can neither be added nor tested.
    tensor = tensor.float() if tensor.dtype.itemsize < 2 else tensor
    # The sum costs less memory. It can overflow where all terms are finite, so the terms decide.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def fits_float32(tensor: Tensor) -> bool:
    """Whether all numbers are finite, also as float32; tensors without floating-point numbers are.

    >>> fits_float32(torch.tensor([1e39], dtype=torch.float64)), fits_float32(torch.tensor([-3e38]))
    (False, True)
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    # Short types, such as float8, have no minimum.
    low, high = (tensor if tensor.dtype in FULL else tensor.float()).aminmax()
    # NaN is in both, and is not below anything.
    return bool(torch.maximum(high, -low) <= torch.finfo(torch.float32).max)


@cache
def keep_memory() -> None:
    """Let the C library keep memory that is freed.

    glibc returns blocks up to the largest one freed so far only in bulk. Memory that is fresh from the system
    costs a page fault for each 4 KiB, several times what a step costs. So one large block is freed once.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


# Files and bytes.


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, also where power fails."""
    path = Path(path)
    # A name next to it: only on one disk is a rename one step.
    temporary = path.with_name(path.name + ".part")
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        # A signal that ends the process must leave nothing behind either.
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def cannot_write(path: Path, error: OSError) -> ConsilienceError:
    """Return the error for a file that could not be written."""
    return ConsilienceError(f"cannot write {path}: {error.strerror or error}.")


def make_folder(path: Path) -> None:
    """Make a folder with its parents, so that they are there after a power failure."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Write the names in a folder to disk: without it a file that was just renamed may be lost."""
    # Windows cannot open a folder, and some network file systems cannot sync one.
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """Write JSON, indented, completely or not at all."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: object, indent: int | None = 1) -> bytes:
    """Return JSON as it is written to files."""
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


SEAL = "sha256"
"""The key under which a JSON file has the hash of its other content."""


def sealed(content: Mapping[str, object]) -> dict[str, object]:
    """Return the content of a JSON file with a hash of itself.

    >>> is_sealed(sealed({"a": 1})), is_sealed({**sealed({"a": 1}), "a": 2}), is_sealed({"a": 1})
    (True, False, False)
    """
    return {**content, SEAL: _seal(content)}


def is_sealed(content: Mapping[str, object]) -> bool:
    """Whether the content of a JSON file is what its hash says."""
    return content.get(SEAL) == _seal({name: value for name, value in content.items() if name != SEAL})


def _seal(content: Mapping[str, object]) -> str:
    # In the order of the file, which JSON keeps, and in which numbers as keys are texts already.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def save(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, completely or not at all."""
    write_bytes(Path(path), pack(tensors, meta))


def pack(tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> bytes:
    """Return safetensors bytes of a dictionary of tensors with text metadata."""
    from safetensors.torch import save as to_bytes

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors refuses tensors that share memory or are a part of a larger one, such as views of theta.
    seen: set[int] = set()
    for name, tensor in ready.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            ready[name] = tensor.clone()
        seen.add(ready[name].untyped_storage().data_ptr())
    return to_bytes(ready, dict(meta) if meta else None)


def unpack(data: bytes, what: str = "message") -> tuple[Params, dict[str, str]]:
    """Return the tensors and the metadata of safetensors bytes; `what` names them in errors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = dict(sorted(load(data).items()))
        # The library returns no metadata from bytes: it is in the header, a JSON text after its length.
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
    # Besides its own error, the library has others for types that torch lacks and for shapes.
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise ConsilienceError(
            f"{what} must be complete safetensors data, got {len(data)} bytes that do not parse: {error}."
        ) from error
    return tensors, header.get("__metadata__") or {}


def load(path: str | Path) -> tuple[Params, dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConsilienceError(f"cannot read {path}: {error.strerror}.") from error
    return unpack(data, str(path))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the shell patterns.

    >>> matches("head.weight", ["head.*"]), matches("body.weight", ["head.*"])
    (True, False)
    """
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, pattern) for pattern in patterns)
