"""Features of images by a frozen backbone, kept on disk, so that an image passes the backbone once."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.model import Forward, Model
from consilience.core.params import all_finite, computing, content_hash
from consilience.core.source import Examples, Source, Tensors
from consilience.core.tree import Input, Tree, cast_to, concat
from consilience.core.warning import warn

ROWS = 1 << 13
"""Images in one file at most."""

HASH = 16
"""Bytes of an image's hash."""

DAY = 86400
"""Seconds."""

Progress = Callable[[int, int], None]
"""progress(images done, images in all)."""


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
        raise ConsilienceError(f"`batch` must be at least 1, got {batch}.")
    if not sources or not all(isinstance(source, Source) for source in sources):
        raise ConsilienceError(f"`sources` must be sources, got {kind_of(sources)}.")
    for source in sources:
        if source.augment is not None:
            raise ConsilienceError(
                f"features are kept of each image once, so images cannot be augmented, got "
                f"{source.augment!r} in {source.name!r}; embed source.map(augment=None)."
            )
    # The backbone's hash names the folder: another backbone never finds these features.
    backbone = Backbone.of(model, torch.device(device))
    store = None if cache is None else Store(Path(cache) / backbone.name, backbone.width)

    # By identity, so that parts that several sources share pass once and stay shared.
    parts = {id(part): part for source in sources for part in (source.train, source.validation, source.test)}
    total, done = sum(map(len, parts.values())), 0
    made = {}
    for identity, part in parts.items():

        def report(count: int, before: int = done) -> None:
            if progress is not None:
                progress(before + count, total)

        made[identity] = _features(part, backbone, batch, store, report)
        done += len(part)

    return [
        replace(
            source,
            train=made[id(source.train)],
            validation=made[id(source.validation)],
            test=made[id(source.test)],
            feature_space=backbone.name,
        )
        for source in sources
    ]


@dataclass(eq=False)
class Backbone:
    """A frozen trunk x [B, ...] -> [B, width]; `name` is the hash of all that its features depend on."""

    trunk: Model
    name: str
    width: int
    device: torch.device
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    bound: Forward | None = None

    @classmethod
    def of(cls, model: Model, device: torch.device) -> Backbone:
        """Return the backbone of a model; refuse one that is not frozen, or that differs between seeds."""
        trunk: Any = getattr(model, "trunk", model)
        if not getattr(trunk, "headless", False) or not isinstance(trunk, Model):
            raise ConsilienceError(
                f"`model` must be a backbone without a head, or heads on one, got {model!r:.60}."
            )
        params, buffers = trunk.init(torch.Generator().manual_seed(0))
        if not all(trunk.frozen(name) for name in params):
            raise ConsilienceError(
                "features can be kept of a frozen backbone only, got one that is not frozen; "
                "see models.frozen."
            )
        name = trunk.feature_space
        if not name:
            raise ConsilienceError(
                "features can be kept of one backbone only, got one that each seed draws again; "
                "see models.backbone."
            )
        return cls(trunk, name, int(trunk.outputs), device, params, buffers)

    def __call__(self, x: Input) -> Tensor:
        """Compute the features [B, width] of a batch, and check them."""
        x = cast_to(x, self.device, computing(self.params).dtype)
        # Where all features are kept already, the backbone is never bound.
        if self.bound is None:
            params = {name: value.to(self.device) for name, value in self.params.items()}
            buffers = {name: value.to(self.device) for name, value in self.buffers.items()}
            # It refuses a trunk whose head was guessed, and is a layer inside.
            find_head = getattr(self.trunk, "find_head", None)
            if find_head is not None:
                find_head(params, buffers, x)
            self.bound = self.trunk.bind(params, buffers, False)[0]

        psi: Tensor = self.bound(x, None)
        if psi.ndim != 2 or psi.shape[1] != self.width:
            raise ConsilienceError(
                f"a backbone must give features [B, {self.width}], got shape {tuple(psi.shape)}."
            )

        if not all_finite(psi):
            raise ConsilienceError("features must be finite, got NaN or infinity.")
        return psi


def _features(
    examples: Examples, backbone: Backbone, batch: int, store: Store | None, report: Callable[[int], None]
) -> Tensors:
    """Return the features [N, d] of a part of a source; compute only those that the store lacks."""
    count = len(examples)
    if count == 0:
        return Tensors(torch.zeros(0, backbone.width), examples.targets())
    with torch.no_grad():
        if store is not None:
            hashes = _fill(store, examples, backbone, batch, report)
            return Tensors(store.get(hashes), examples.targets())

        features, done = torch.empty(count, backbone.width), 0
        for x, _ in examples.chunks(batch):
            features[done : done + len(x)] = backbone(x)
            done += len(x)
            report(done)
        return Tensors(features, examples.targets())


def _fill(
    store: Store, examples: Examples, backbone: Backbone, batch: int, report: Callable[[int], None]
) -> list[bytes]:
    """Add the features that the store lacks; return the hashes of all inputs in order."""
    hashes: list[bytes] = []
    waiting: list[Input] = []
    try:
        for x, _ in examples.chunks(batch):
            own = input_hashes(x)
            hashes += own
            waiting += [x[i : i + 1] for i, image in enumerate(own) if store.wants(image)]

            # The backbone is given full batches, however few images of a chunk are new.
            while len(waiting) >= batch:
                store.add(backbone(concat(waiting[:batch])))
                del waiting[:batch]
            report(len(hashes))
        if waiting:
            store.add(backbone(concat(waiting)))
    finally:
        # What was computed is kept, also where the rest failed.
        store.close()
    return hashes


def input_hashes(x: Input) -> list[bytes]:
    """Hash each sample of a batch [B, ...] by the types, the shapes and the bytes of its parts.

    Padding of ragged parts is left out: it differs between batches.
    """
    if isinstance(x, Tensor):
        return _hashes(f"{x.dtype}|{tuple(x.shape[1:])}|", x)
    if x.lengths is None:
        header = "".join(f"{name}|{part.dtype}|{tuple(part.shape[1:])}|" for name, part in x.parts.items())
        rows = [part.detach().cpu().reshape(len(x), -1).view(torch.uint8) for part in x.parts.values()]
        return _hashes(header, torch.cat(rows, 1))

    # Each sample has a length of its own, so that it is hashed alone.
    found = []
    for i in range(len(x)):
        alone = x[i : i + 1].trim()
        found += input_hashes(Tree(alone.parts))
    return found


def _hashes(header: str, x: Tensor) -> list[bytes]:
    """Hash the rows of a tensor, each after a header."""
    # Bytes alone do not say whether they are 3 x 4 or 4 x 3 pixels, or floats or integers.
    start = hashlib.blake2b(header.encode(), digest_size=HASH)
    rows = x.detach().cpu().contiguous().view(len(x), -1).view(torch.uint8).numpy()
    hashes = []
    for row in rows:
        digest = start.copy()
        digest.update(row)
        hashes.append(digest.digest())
    return hashes


class Place(NamedTuple):
    """Where the features of an image are: a file and a row."""

    file: int
    row: int


class Unchecked(NamedTuple):
    """A file whose features were not compared with their digest yet."""

    path: Path
    digest: str


class Store:
    """Features by image, in files of `features` [n, d] and `images` [n, 16], the hashes of the images.

    Files are memory-mapped. A file is named by its images, and complete or absent; any other file is named in
    a warning and not read. Features are compared with the digest in their file when the first of them are
    used, and refused if they differ.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self.files: list[Tensor] = []
        self.unchecked: dict[int, Unchecked] = {}
        self.places: dict[bytes, Place] = {}

        # Images that wait for their features, in order, and the features that are not written yet.
        self.pending: list[bytes] = []
        self.expected: set[bytes] = set()
        self.rows: list[Tensor] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise ConsilienceError(
                f"`cache` must be a folder that can be written: {error.strerror} at {folder}."
            ) from error
        for path in paths:
            if path.suffix == ".safetensors":
                self._open(path)
            elif path.suffix == ".part":
                _remove_if_abandoned(path)

    def wants(self, image: bytes) -> bool:
        """Whether an image is new; its features must then be added, in the order of these calls."""
        if image in self.places:
            self._check(self.places[image].file)
            return False
        if image in self.expected:
            return False
        self.expected.add(image)
        self.pending.append(image)
        return True

    def add(self, features: Tensor) -> None:
        """Add the features of the next pending images."""
        left = features.detach().cpu().to(torch.float32)
        while len(left):
            room = ROWS - sum(map(len, self.rows))
            self.rows.append(left[:room])
            left = left[room:]
            if len(self.rows[-1]) == room:
                self.close()

    def close(self) -> None:
        """Write the features that were added as a file."""
        if not self.rows:
            return
        features = torch.cat(self.rows)
        images, self.pending = self.pending[: len(features)], self.pending[len(features) :]
        self.rows = []
        raw = b"".join(images)
        path = self.folder / f"{_digest(raw)}.safetensors"
        hashes = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).reshape(-1, HASH).copy())
        metadata = {"digest": content_hash({"features": features})}
        _write(path, {"features": features, "images": hashes}, metadata)
        self.expected.difference_update(images)

        # From now on they are read from the map, not held in memory.
        self._open(path)

    def get(self, images: Sequence[bytes]) -> Tensor:
        """Return the features [N, d] of these images; a view of a file where they are consecutive there."""
        places = np.array([self.places[image] for image in images])
        for file in np.unique(places[:, 0]):
            self._check(int(file))
        first = self.places[images[0]]
        consecutive = np.arange(first.row, first.row + len(places))
        if (places[:, 0] == first.file).all() and (places[:, 1] == consecutive).all():
            return self.files[first.file][first.row : first.row + len(places)]

        # Images from several files are copied, file by file.
        features = torch.empty(len(places), self.width)
        for file in np.unique(places[:, 0]):
            own = np.flatnonzero(places[:, 0] == file)
            features[torch.from_numpy(own)] = self.files[file][torch.from_numpy(places[own, 1])]
        return features

    def _open(self, path: Path) -> None:
        """Map a file; warn and leave it out if it is not complete or not ours."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                features, images = file.get_tensor("features"), file.get_tensor("images")
                digest = (file.metadata() or {}).get("digest")
            count = len(images)
            if (
                features.shape != (count, self.width)
                or features.dtype != torch.float32
                or images.shape != (count, HASH)
            ):
                raise ValueError(f"features {tuple(features.shape)} of images {tuple(images.shape)}")
            raw = images.numpy().tobytes()
            if path.stem != _digest(raw):
                raise ValueError("other images than its name says")
            if digest is None:
                raise ValueError("no digest of its features")
        except (SafetensorError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            warn(f"{path} is not read ({reason}): no complete file of kept features")
            return

        # An image may be in two files, if two processes computed it; the first one counts.
        number = len(self.files)
        self.files.append(features)
        self.unchecked[number] = Unchecked(path, digest)
        for i in range(count):
            self.places.setdefault(raw[i * HASH : (i + 1) * HASH], Place(number, i))

    def _check(self, number: int) -> None:
        """Refuse a file whose features were changed; each file is read once for it."""
        if number not in self.unchecked:
            return
        path, digest = self.unchecked[number]
        if content_hash({"features": self.files[number]}) != digest:
            raise ConsilienceError(f"kept features were changed on disk in {path}; delete that file.")
        del self.unchecked[number]


def _digest(raw: bytes) -> str:
    """Return the name of a file: a hash of the hashes of its images."""
    return hashlib.blake2b(raw, digest_size=HASH).hexdigest()


def _remove_if_abandoned(path: Path) -> None:
    """Remove a half-written file older than a day whose process is gone."""
    pid = path.name.split(".")[-2]

    # Errors: the process is alive and another user's, or the folder cannot be written.
    with suppress(OSError, OverflowError):
        # On other systems than POSIX, signal 0 ends the process instead of looking for it.
        if os.name != "posix" or not pid.isdecimal() or time.time() - path.stat().st_mtime < DAY:
            return
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            path.unlink()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file completely or not at all, also where several processes write the same file.

    `core.params.save` does not allow for several processes.
    """
    from safetensors.torch import save_file

    # The process id keeps writers apart; replacing a file is atomic.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata)
        # On disk before it has its name, or a crash of the machine could leave an empty file.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, Exception):
            raise
        raise ConsilienceError(f"`cache` must be a folder that can be written: {error} at {path}.") from error
