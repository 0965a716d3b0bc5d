"""A run's folder: config.yaml, log.jsonl, checkpoint/ and result.json. Every file is hashed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.form import Any_, Or, misfit
from consilience.core.params import (
    cannot_write,
    is_sealed,
    json_bytes,
    pack,
    sealed,
    unpack,
    write_bytes,
    write_json,
)
from consilience.core.warning import warn
from consilience.loop.lock import FolderLock
from consilience.version import __version__

FORMAT = 4
"""The format of checkpoints. 0.1 wrote no number; 3 had a hash of the tensors only."""

Progress = Callable[[Mapping[str, Any]], None]
"""Called with every line of the log."""

REMEDY = "start again in another folder"

# The form of what a checkpoint keeps, so that one that somebody changed is refused before it is used.

_NUMBERS, _ROWS, _RECORDS = Any_(Or(float)), [[Or(float)]], [Any_(None)]

JUDGED: dict[str, Any] = {
    "rows": _ROWS,
    "further": Any_(_ROWS),
    "stages": [str],
    "client_drift": _RECORDS,
    "curve": _RECORDS,
    "learning": _RECORDS,
    "local": _RECORDS,
    "visits": _RECORDS,
    "personal": _NUMBERS,
    "confusion": Or([[int]]),
}
"""What was measured, also as a trial's result has it."""

PAGE = dict.fromkeys(("macs", "sent", "received", "receiving"), float)
COSTS: dict[str, Any] = {"seconds": float, "steps": int, "by_agent": Any_(PAGE)}
"""What a ledger has."""

FACTS: dict[str, Any] = {
    **dict.fromkeys(("phase", "finished", "trained"), int),
    "failed": Any_(str),
    "result": Or(
        {
            **JUDGED,
            "mapper": Or([Or(float)]),
            "costs": {**COSTS, "macs": float, "bytes": float},
            "stopped": Or({"stage": int, "why": str, "returned": int, "score": Or(float)}),
        }
    ),
    "judge": {**JUDGED, "mapped": [Or(float)], "before": Any_([Or(float)])},
    "trend": [Or(float)],
    "best": Or(Any_(None)),
    "ledger": {**COSTS, "measured?": Any_(list)},
    "agents": Any_({"frozen": str}),
    "frozen": [str],
    "job": Or(
        {**dict.fromkeys(("epoch", "index"), int), "since?": int, "best/epoch?": int, "best/index?": int}
    ),
}
"""What a trial keeps."""

INDEX = {
    "file": str,
    "tensors": str,
    "config": str,
    "log": {"bytes": int, "sha256": str},
    "facts": {"fingerprint": Any_(None), "trials": Any_(FACTS)},
}
"""The form of a checkpoint's index."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds: tensors, and facts of JSON."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    written: int
    """Bytes of the log when it was saved."""
    file: bytes
    """The index that it was read from."""


class Damaged(ConsilienceError):
    """A file of a run is not what was written."""


@dataclass
class Log:
    """A run's folder, or None to keep nothing. A file is written completely or not at all.

    The last two checkpoints are kept. Each has a file of tensors and an index with its facts, the hash of the
    tensors, of config.yaml and of the log so far, and its own.
    """

    out: Path | None
    progress: Progress | None = None
    _lock: FolderLock | None = field(default=None, init=False, repr=False)
    _written: int = field(default=0, init=False)
    """Bytes of the log."""
    _hash: Any = field(default_factory=hashlib.sha256, init=False, repr=False)
    """The hash of the log so far."""
    _newest: bytes | None = field(default=None, init=False, repr=False)
    """The index of the newest checkpoint."""

    @property
    def folder(self) -> Path:
        """The folder of a run that has one."""
        assert self.out is not None
        return self.out

    @property
    def config(self) -> Path:
        """The file with the arguments of the run."""
        return self.folder / "config.yaml"

    @property
    def path(self) -> Path:
        """The file with the lines of the log."""
        return self.folder / "log.jsonl"

    # The folder

    @property
    def has_run(self) -> bool:
        """Whether a run has left something to keep here: one that was killed before that begins again."""
        kept = [self.folder / "result.json", self.index, self.previous]
        # Without its index a checkpoint is lost, and the log is all that says what was done.
        return any(path.exists() for path in kept) or any(
            line["event"] == "checkpoint" for _, line in self.lines()
        )

    @property
    def begun(self) -> bool:
        """Whether a run has begun here, even if it was killed before its first checkpoint."""
        return self.config.exists() or self.path.exists() or self.has_run

    def lock(self, resume: bool) -> None:
        """Lock the folder for this run. Refuses one in use, and one that has a run, unless it is resumed."""
        # Looked at twice: nothing is written into the folder of another run, nor one that has just ended.
        self._check_new(resume)
        self._lock = FolderLock(self.folder)
        self._check_new(resume)

    def _check_new(self, resume: bool) -> None:
        if not resume and self.has_run:
            raise ConsilienceError(
                f"`out` must be a new folder, and {self.folder} has a run; resume it "
                "(`resume=True`, --resume), or choose another folder."
            )

    def release(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.release()

    def start(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, and start the log."""
        # Imported here, because a run without a folder needs no YAML.
        import yaml

        write_bytes(self.config, yaml.safe_dump(dict(config), sort_keys=False).encode())
        write_bytes(self.path, b"")

    # The log

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log, and report it to `progress`."""
        if self.out is not None:
            # Opened for every line, so that a killed run has all lines but the last.
            data = (json.dumps(plain(dict(line))) + "\n").encode()
            try:
                with open(self.path, "ab") as file:
                    file.write(data)
            except OSError as error:
                raise cannot_write(self.path, error) from error
            self._hash.update(data)
            self._written += len(data)
        if self.progress is not None:
            self.progress(line)

    def lines(self, start: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the text and content of every line from a byte on. A line that was cut short is left out."""
        # A process that was killed may have left half a line, and a fault of the disk anything.
        data = self.path.read_bytes() if self.path.exists() else b""
        for text in data[start:].decode(errors="replace").splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and "event" in line:
                    yield text, line

    def rewind(self, found: Checkpoint) -> None:
        """Drop the log's lines of what will be done again: those after the checkpoint."""
        try:
            with open(self.path, "r+b") as file:
                self._hash = hashlib.sha256(file.read(found.written))
                file.truncate(found.written)
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._written, self._newest = found.written, found.file

    # Checkpoints

    @property
    def index(self) -> Path:
        """The file that names the checkpoint's tensors, and holds its facts."""
        return self.folder / "checkpoint" / "index.json"

    @property
    def previous(self) -> Path:
        """The index of the checkpoint before."""
        return self.folder / "checkpoint" / "previous.json"

    def checkpoint(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint; the one before is kept, and older ones are deleted."""
        # A new file each time: the ones before must stay readable until an index names this one.
        folder, data = self.index.parent, pack(tensors)
        name = f"state-{time.time_ns():x}.safetensors"
        write_bytes(folder / name, data)
        # Buffers hold examples, which concern nobody but their owner; some disks have no owners.
        with suppress(OSError):
            folder.chmod(0o700)

        about = {"format": FORMAT, "consilience": __version__, "file": name}
        about |= {"tensors": hashlib.sha256(data).hexdigest(), "config": _digest(self.config)}
        before = self._newest
        if before is not None:
            write_bytes(self.previous, before)
        # The index is the checkpoint: until it is replaced, the one before is in force.
        self._write_index({**about, "facts": plain(facts)})

        kept = {name} if before is None else {name, json.loads(before)["file"]}
        for old in folder.glob("state-*.safetensors*"):
            if old.name not in kept:
                old.unlink(missing_ok=True)

    def end(self, result: Mapping[str, Any], line: Mapping[str, Any]) -> None:
        """Write result.json and the last line of the log."""
        write_json(self.folder / "result.json", sealed(plain(result)))
        self.write(line)
        # The index has the hash of the complete log now.
        assert self._newest is not None
        self._write_index(json.loads(self._newest))

    def _write_index(self, content: Mapping[str, Any]) -> None:
        """Write the index, with the log as it is now."""
        # The disk must have the lines before anything says that they are there.
        try:
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        own = {key: value for key, value in content.items() if key not in ("log", "sha256")}
        log = {"bytes": self._written, "sha256": self._hash.hexdigest()}
        # Compact: every agent has facts in it, and Python's indented writer is thirty times slower.
        data = json_bytes(sealed({**own, "log": log}), indent=None)
        write_bytes(self.index, data)
        self._newest = data

    def last(self, complete: bool = False) -> Checkpoint | None:
        """Return the newest checkpoint that is not damaged, or None where there is none.

        With `complete`, config.yaml and the log must be those that it was saved with. Raises ConsilienceError
        where all are damaged, or of another format.
        """
        problems: list[Damaged] = []
        for path in (self.index, self.previous):
            if not path.exists():
                continue
            try:
                found = self._read(path)
                if complete:
                    self._check_files(json.loads(found.file))
            except Damaged as error:
                problems.append(error)
                continue
            if problems:
                why = str(problems[0]).removesuffix(f"; {REMEDY}.")
                warn(f"{why}; the checkpoint before it is used")
            return found

        if problems:
            raise problems[0]
        if complete and self.has_run:
            raise Damaged(f"{self.folder} has a run, but its checkpoint is missing; {REMEDY}.")
        return None

    def _read(self, path: Path) -> Checkpoint:
        """Read the checkpoint of an index."""
        try:
            data = path.read_bytes()
            index = json.loads(data)
            self._check_format(index)
            if not is_sealed(index):
                raise Damaged(f"the checkpoint at {path} is damaged: its hash is another; {REMEDY}.")
            if (reason := misfit(index, INDEX, "the index")) is not None:
                raise Damaged(f"the checkpoint at {path} cannot be read: {reason}; {REMEDY}.")
            # A name with folders would read any file.
            state = path.parent / Path(index["file"]).name
            held, facts, written = state.read_bytes(), index["facts"], index["log"]["bytes"]
        except ConsilienceError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise Damaged(
                f"the checkpoint at {path} is damaged or its file is missing ({e}); {REMEDY}."
            ) from e
        if hashlib.sha256(held).hexdigest() != index["tensors"]:
            raise Damaged(
                f"the checkpoint at {state} is damaged: its content is not what its index says; {REMEDY}."
            )
        return Checkpoint(unpack(held, str(state))[0], facts, written, data)

    def _check_files(self, index: Mapping[str, Any]) -> None:
        """Refuse another config.yaml, or another log, than the checkpoint was saved with."""
        for path, digest, size in (
            (self.config, index["config"], None),
            (self.path, index["log"]["sha256"], index["log"]["bytes"]),
        ):
            # A log is never shorter than it was; `rewind` would fill it up with zeros.
            whole = size is None or (path.exists() and 0 <= size <= path.stat().st_size)
            if not whole or _digest(path, size) != digest:
                what = "edited, damaged or missing" if size is None else "damaged or missing"
                raise Damaged(f"{path} is {what}: its content is not what the run wrote; {REMEDY}.")

    def _check_format(self, index: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of a version that keeps other facts."""
        found = index.get("format", 1)
        if found == FORMAT:
            return

        # 0.1 wrote its version into the log only.
        begun = (line.get("versions", {}) for _, line in self.lines() if line["event"] == "begin")
        writer = index.get("consilience") or next((v.get("consilience") for v in begun), None) or "0.1"
        raise ConsilienceError(
            f"the checkpoint in {self.folder} is of format {found}, written by consilience {writer}, and "
            f"consilience {__version__} resumes format {FORMAT}; resume it with consilience {writer}, "
            f"or {REMEDY}."
        )

    # What a folder says about itself

    def check(self) -> tuple[str, list[str]]:
        """Return what state the folder is in, and what is wrong with its files."""
        problems: list[str] = []
        newest: Checkpoint | None = None
        for path in (self.index, self.previous):
            if not path.exists():
                continue
            try:
                found = self._read(path)
                newest = newest or found
                self._check_files(json.loads(found.file))
            except ConsilienceError as error:
                problems.append(str(error).removesuffix(f"; {REMEDY}.").removesuffix("."))
        finished = (self.folder / "result.json").exists()
        problems += self._check_result() if finished else []
        problems += [f"{path} was left by a killed process" for path in self.folder.rglob("*.part")]

        if newest is None and not problems:
            state = "no checkpoint"
            return (f"{state}; it begins again" if self.begun and not self.has_run else state), problems
        if newest is None:
            return "no checkpoint to continue from", problems
        return ("finished" if finished else "can be resumed"), list(dict.fromkeys(problems))

    def _check_result(self) -> list[str]:
        path = self.folder / "result.json"
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            return [f"{path} cannot be read ({error})"]
        whole = isinstance(content, dict) and is_sealed(content)
        return [] if whole else [f"{path} is damaged: its hash is another"]


def _digest(path: Path, size: int | None = None) -> str:
    """Return the hash of a file, or of its first bytes; of nothing where there is no file."""
    found = hashlib.sha256()
    with suppress(OSError), open(path, "rb") as file:
        found.update(file.read() if size is None else file.read(size))
    return found.hexdigest()


def plain(value: Any) -> Any:
    """Return a value for JSON: tuples become lists, numbers of numpy and torch plain ones, NaN None.

    >>> plain({"a": (1, np.float32(0.5)), "b": float("-inf")})
    {'a': [1, 0.5], 'b': None}
    """
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    # JSON has no infinity either.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
