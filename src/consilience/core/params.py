"""Parameters: a dictionary of tensors, its flat form, its content hash, its files; and keyed randomness."""

from __future__ import annotations

import hashlib
import json
import os
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
    """A generator that depends on its key alone: (seed, source, visit, epoch, step, purpose), never on agent, engine or order.

    >>> a, b = key(0, "digits", "shuffle"), key(0, "digits", "shuffle")
    >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


_DIGESTS = WeakTensorKeyDictionary()


def _digest(t: Tensor) -> bytes:
    """A hash of a tensor's bytes, made once as long as nobody changes it."""
    version = -1 if t.is_inference() else t._version
    found = _DIGESTS.get(t)
    if found is not None and found[0] == version >= 0:
        return found[1]  # type: ignore[no-any-return]
    flat = t.detach().cpu().contiguous().view(-1)
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().data if t.numel() else b"").digest()
    _DIGESTS[t] = (version, digest)
    return digest


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and bytes: equal content has an equal hash, whatever the order of the names."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode() + _digest(t))
    return h.hexdigest()[:32]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two dictionaries hold the same names and bit-equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@dataclass(frozen=True)
class Layout:
    """Where each entry lies in one flat vector.

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
        names = tuple(sorted(params))
        shapes = tuple(tuple(params[n].shape) for n in names)
        offsets, at = [], 0
        for shape in shapes:
            offsets.append(at)
            at += prod(shape)
        first = params[names[0]] if names else torch.zeros(0)
        return Layout(
            names,
            shapes,
            tuple(offsets),
            dtype or first.dtype,
            torch.device(device) if device else first.device,
        )

    @property
    def size(self) -> int:
        return self.offsets[-1] + prod(self.shapes[-1]) if self.names else 0

    def span(self, name: str) -> slice:
        """The slice of the flat vector that holds `name`."""
        i = self.names.index(name)
        return slice(self.offsets[i], self.offsets[i] + prod(self.shapes[i]))

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """One vector [n]; entries that `params` lacks are zero."""
        if not self.names:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            t = params.get(name)
            if t is None:
                t = torch.zeros(shape, dtype=self.dtype, device=self.device)
            parts.append(t.detach().to(self.device, self.dtype).reshape(-1))
        return torch.cat(parts)

    def split(self, flat: Tensor) -> Params:
        """Views of `flat` [n], by name, in their shapes."""
        return {
            n: flat[o : o + prod(s)].view(s)
            for n, s, o in zip(self.names, self.shapes, self.offsets, strict=True)
        }


def finite(tensors: Mapping[str, Tensor], whose: str) -> None:
    """Refuse NaN and infinity by name, before any work is lost."""
    for name, t in tensors.items():
        if t.is_floating_point() and not (
            torch.isfinite(t.sum()) or torch.isfinite(t).all()
        ):  # a finite sum has finite terms
            raise ConsilienceError(
                f"parameters should be finite. Found NaN or infinity in {name!r} of {whose}."
            )


@cache
def keep_memory() -> None:
    """Let the C library keep what is freed: glibc gives blocks up to the largest one freed so far back to the system only in
    bulk, and memory that is fresh from the system costs a page fault for each 4 KiB, several times what a step costs."""
    torch.empty(31 << 20, dtype=torch.uint8)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink()
        raise ConsilienceError(f"a result should be writable. Found {e.strerror or e} at {path}.") from e


def write_json(path: Path, value: object) -> None:
    """Write JSON, indented, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def save(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    write_bytes(Path(path), pack(tensors, meta))


def pack(tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> bytes:
    """safetensors bytes of a dictionary of tensors with text metadata."""
    from safetensors.torch import save as to_bytes

    ready = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    seen: set[int] = set()
    for k, t in ready.items():
        if t.untyped_storage().data_ptr() in seen or t.untyped_storage().nbytes() != t.nbytes:
            ready[k] = t.clone()
        seen.add(ready[k].untyped_storage().data_ptr())
    return to_bytes(ready, dict(meta) if meta else None)


def unpack(data: bytes, what: str = "message") -> tuple[Params, dict[str, str]]:
    """The tensors and the metadata of safetensors bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = dict(sorted(load(data).items()))
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
    except (SafetensorError, ValueError) as e:
        raise ConsilienceError(
            f"{what} should be whole safetensors data. Found {len(data)} bytes that do not parse: {e}."
        ) from e
    return tensors, header.get("__metadata__", {})


def load(path: str | Path) -> tuple[Params, dict[str, str]]:
    """Read a safetensors file with its metadata."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise ConsilienceError(
            f"a checkpoint should be a readable file. Found {e.strerror} at {path}."
        ) from e
    return unpack(data, str(path))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the shell patterns.

    >>> matches("head.weight", ["head.*"]), matches("body.weight", ["head.*"])
    (True, False)
    """
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, p) for p in patterns)
