"""Features of images by a frozen backbone, kept on disk: an image passes the backbone once."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.model import Forward, Model
from consilience.core.params import content_hash
from consilience.core.source import Examples, Source, Tensors

ROWS = 1 << 13
"""Images of one file at most."""

HASH = 16
"""Bytes of an image's hash."""

Progress = Callable[[int, int], None]


def embed(
    sources: Sequence[Source],
    model: Model,
    cache: str | Path | None,
    batch: int,
    device: str,
    progress: Progress | None,
) -> list[Source]:
    """See `consilience.data.embed`."""
    if batch < 1:
        raise ConsilienceError(f"`batch` should be at least 1. Found `batch = {batch}`.")
    if not sources or not all(isinstance(s, Source) for s in sources):
        raise ConsilienceError(f"`sources` should be sources. Found {kind_of(sources)}.")
    forward, width, name = _bound(model, device)
    store = None if cache is None else Store(Path(cache) / name, width)
    parts = {id(e): e for s in sources for e in (s.train, s.validation, s.test)}
    whole, done, made = sum(len(e) for e in parts.values()), 0, {}
    for key, e in parts.items():

        def told(n: int, before: int = done) -> None:
            if progress is not None:
                progress(before + n, whole)

        made[key] = _part(e, forward, width, batch, torch.device(device), store, told)
        done += len(e)
    return [
        replace(
            s,
            train=made[id(s.train)],
            validation=made[id(s.validation)],
            test=made[id(s.test)],
            feature_space=name,
        )
        for s in sources
    ]


def _bound(model: Model, device: str) -> tuple[Forward, int, str]:
    """The trunk x [B, ..] -> [B, d], d, and the hash of all that it depends on."""
    trunk: Any = getattr(model, "trunk", model)
    if not getattr(trunk, "headless", False) or not isinstance(trunk, Model):
        raise ConsilienceError(
            f"`model` should be a backbone without a head, or heads on one. Found {model!r:.60}."
        )
    params, buffers = trunk.init(torch.Generator().manual_seed(0))
    if not all(trunk.frozen(n) for n in params):
        raise ConsilienceError(
            "features to keep should be of a backbone that is frozen. Found one that is not; see models.frozen."
        )
    name = trunk.feature_space
    if not name:
        raise ConsilienceError(
            "features to keep should be of one backbone. Found one that each seed draws anew; see models.backbone."
        )
    where = torch.device(device)
    bound: list[Forward] = []

    def forward(x: Tensor, task: str | None) -> Tensor:
        if not bound:  # where all is kept already, nothing is bound
            own, held = ({n: t.to(where) for n, t in tensors.items()} for tensors in (params, buffers))
            bound.append(trunk.bind(own, held, False)[0])
        out: Tensor = bound[0](x, task)
        return out

    return forward, int(trunk.outputs), name


def _part(
    examples: Examples,
    forward: Forward,
    width: int,
    batch: int,
    device: torch.device,
    store: Store | None,
    told: Callable[[int], None],
) -> Tensors:
    """The features [N, d] of a part of a source, from the store where they are there."""
    n = len(examples)
    if n == 0:
        return Tensors(torch.zeros(0, width), examples.targets())

    def through(x: Tensor) -> Tensor:
        psi = forward(x.to(device, torch.float32 if x.is_floating_point() else x.dtype), None)
        if psi.ndim != 2 or psi.shape[1] != width:
            raise ConsilienceError(f"a backbone should give features [B, {width}]. Found {tuple(psi.shape)}.")
        if not (torch.isfinite(psi.sum()) or torch.isfinite(psi).all()):
            raise ConsilienceError("features should be finite. Found NaN or infinity.")
        return psi

    if store is None:
        out, at = torch.empty(n, width), 0
        with torch.no_grad():
            for x, _ in examples.chunks(batch):
                out[at : at + len(x)] = through(x)
                at += len(x)
                told(at)
        return Tensors(out, examples.targets())
    hashes: list[bytes] = []
    waiting: list[Tensor] = []
    try:
        with torch.no_grad():
            for x, _ in examples.chunks(batch):
                own = hash_of(x)
                hashes += own
                waiting += [x[i] for i, h in enumerate(own) if store.wants(h)]
                while len(waiting) >= batch:
                    store.add(through(torch.stack(waiting[:batch])))
                    del waiting[:batch]
                told(len(hashes))
            if waiting:
                store.add(through(torch.stack(waiting)))
    finally:  # what was made is kept, also where the rest failed
        store.close()
    return Tensors(store.get(hashes), examples.targets())


def hash_of(x: Tensor) -> list[bytes]:
    """A hash of each image of a batch [B, ..]: its type, its shape, its bytes."""
    first = hashlib.blake2b(f"{x.dtype}|{tuple(x.shape[1:])}|".encode(), digest_size=HASH)
    rows = x.detach().cpu().contiguous().view(len(x), -1).view(torch.uint8).numpy()
    found = []
    for row in rows:
        h = first.copy()
        h.update(row)
        found.append(h.digest())
    return found


class Store:
    """Features by image: files of `features` [n, d] and `images` [n, 16], the hashes of these; read as they lie on disk.

    A file is named by its images, and there whole or not at all; one that is neither is named in a warning and not read. Its features
    are compared with the digest that stands in it when the first of them are used; others than were written are an error.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self.files: list[Tensor] = []
        self.unread: dict[int, tuple[Path, str]] = {}
        self.where: dict[bytes, tuple[int, int]] = {}
        self.pending: list[bytes] = []
        self.rows: list[Tensor] = []
        self.known: set[bytes] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = sorted(folder.iterdir())
        except OSError as e:
            raise ConsilienceError(
                f"`cache` should be a folder that can be written. Found {e.strerror} at {folder}."
            ) from e
        for path in found:
            if path.suffix == ".safetensors":
                self._open(path)
            elif path.suffix == ".part":
                _tidy(path)

    def wants(self, image: bytes) -> bool:
        """Whether an image is new; it is then to be added, in this order."""
        if image in self.where:
            self._check(self.where[image][0])
            return False
        if image in self.known:
            return False
        self.known.add(image)
        self.pending.append(image)
        return True

    def add(self, features: Tensor) -> None:
        """Features of the first of those that are to be added."""
        rest = features.detach().cpu().to(torch.float32)
        while len(rest):
            room = ROWS - sum(map(len, self.rows))
            self.rows.append(rest[:room])
            rest = rest[room:]
            if len(self.rows[-1]) == room:
                self.close()

    def close(self) -> None:
        """Write what was added as a file."""
        if not self.rows:
            return
        features = torch.cat(self.rows)
        images, self.pending = self.pending[: len(features)], self.pending[len(features) :]
        self.rows = []
        path = self.folder / f"{hashlib.blake2b(b''.join(images), digest_size=HASH).hexdigest()}.safetensors"
        table = torch.from_numpy(np.frombuffer(b"".join(images), dtype=np.uint8).reshape(-1, HASH).copy())
        _write(
            path, {"features": features, "images": table}, {"digest": content_hash({"features": features})}
        )
        self.known.difference_update(images)
        self._open(path)

    def get(self, images: Sequence[bytes]) -> Tensor:
        """Their features [N, d]: where they lie one after another in a file, as they lie there."""
        at = np.array([self.where[h] for h in images])
        for f in np.unique(at[:, 0]):
            self._check(int(f))
        first, row = self.where[images[0]]
        if (at[:, 0] == first).all() and (at[:, 1] == np.arange(row, row + len(at))).all():
            return self.files[first][row : row + len(at)]
        out = torch.empty(len(at), self.width)
        for f in np.unique(at[:, 0]):
            mine = np.flatnonzero(at[:, 0] == f)
            out[torch.from_numpy(mine)] = self.files[f][torch.from_numpy(at[mine, 1])]
        return out

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                features, images = file.get_tensor("features"), file.get_tensor("images")
                digest = (file.metadata() or {}).get("digest")
            n = len(images)
            if (
                features.shape != (n, self.width)
                or features.dtype != torch.float32
                or images.shape != (n, HASH)
            ):
                raise ValueError(f"{tuple(features.shape)} features of {tuple(images.shape)}")
            raw = images.numpy().tobytes()
            if path.stem != hashlib.blake2b(raw, digest_size=HASH).hexdigest():
                raise ValueError("other images than its name says")
            if digest is None:
                raise ValueError("no digest of its features")
        except (SafetensorError, ValueError, OSError) as e:
            reason = str(e).splitlines()[0]
            warnings.warn(
                f"a file of kept features should be whole and ours: {path} is not read ({reason})",
                stacklevel=6,
            )
            return
        number = len(self.files)
        self.files.append(features)
        self.unread[number] = (path, digest)
        for i in range(n):
            self.where.setdefault(raw[i * HASH : (i + 1) * HASH], (number, i))

    def _check(self, number: int) -> None:
        """Refuse a file with other features than were written; each is read for it once."""
        path, digest = self.unread.pop(number, (None, ""))
        if path is not None and content_hash({"features": self.files[number]}) != digest:
            self.unread[number] = (path, digest)
            raise ConsilienceError(
                f"kept features should be as they were written. Found others in {path}; delete that file."
            )


def _tidy(path: Path) -> None:
    """Remove what a process left of a file that it was writing, if that process is gone and the rest is older than a day."""
    pid = path.name.split(".")[-2]
    with suppress(OSError, OverflowError):  # the process lives and is another's, or this folder is
        if os.name != "posix" or not pid.isdecimal() or time.time() - path.stat().st_mtime < 86400:
            return  # elsewhere than on POSIX signal 0 is not a question
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            path.unlink()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file whole or not at all, also where several processes write it at once, which `core.params.save` does not allow for."""
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except Exception as e:
        with suppress(OSError):
            temporary.unlink()
        raise ConsilienceError(f"`cache` should be a folder that can be written. Found {e} at {path}.") from e
