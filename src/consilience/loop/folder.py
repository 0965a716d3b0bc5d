"""A run's folder: config.yaml, log.jsonl, checkpoint/ and result.json; and how a run is interrupted."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import load, pack, write_bytes, write_json
from consilience.version import __version__

FORMAT = 3
"""The format of checkpoints. 0.1 wrote no number; 3 keeps a hash in the place of frozen entries."""

Progress = Callable[[Mapping[str, Any]], None]
"""Called with every line of the log."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds: tensors, and facts of JSON."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass
class Log:
    """A run's folder, or None to keep nothing. A file is written completely or not at all."""

    out: Path | None
    progress: Progress | None = None

    @property
    def folder(self) -> Path:
        """The folder of a run that has one."""
        assert self.out is not None
        return self.out

    def open(self, config: Mapping[str, Any], resume: bool) -> None:
        """Write config.yaml, and start the log. Refuses the folder of another run, unless that is resumed."""
        # Imported here, because a run without a folder needs no YAML.
        import yaml

        files = ("result.json", "log.jsonl", "checkpoint")
        if not resume and any((self.folder / file).exists() for file in files):
            raise ConsilienceError(
                f"`out` must be a new folder, and {self.folder} has a run; resume it "
                "(`resume=True`, --resume), or choose another folder."
            )
        text = yaml.safe_dump(dict(config), sort_keys=False)
        write_bytes(self.folder / "config.yaml", text.encode())
        if not resume:
            write_bytes(self.folder / "log.jsonl", b"")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log, and report it to `progress`."""
        if self.out is not None:
            # Opened for every line, so that a killed run has all lines but the last.
            path = self.out / "log.jsonl"
            try:
                with open(path, "a") as file:
                    file.write(json.dumps(plain(dict(line))) + "\n")
            except OSError as e:
                raise ConsilienceError(f"cannot write {path}: {e.strerror or e}.") from e
        if self.progress is not None:
            self.progress(line)

    def lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the text and content of every line of the log. A line that was cut short is left out."""
        path = self.folder / "log.jsonl"

        # A process that was killed may have left half a line.
        for text in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):
                yield text, json.loads(text)

    def rewind(self, rows: Mapping[int, int]) -> None:
        """Drop the log's lines of stages that will be done again: those of each repeat from this row on."""
        kept = []
        for text, line in self.lines():
            again = line["event"] == "stage" and line["stage"] >= rows.get(line["repeat"], 0)
            if not again and line["event"] != "end":
                kept.append(text + "\n")
        write_bytes(self.folder / "log.jsonl", "".join(kept).encode())

    # Checkpoints

    @property
    def index(self) -> Path:
        """The file that names the checkpoint's tensors, and holds its facts."""
        return self.folder / "checkpoint" / "index.json"

    def checkpoint(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint, then delete the one before."""
        # A new file each time: the one before must stay readable until the index names this one.
        folder, data = self.index.parent, pack(tensors)
        name = f"state-{time.time_ns():x}.safetensors"
        write_bytes(folder / name, data)

        # The index is the checkpoint: until it is replaced, the one before is in force.
        about = {"format": FORMAT, "consilience": __version__, "file": name}
        digest = hashlib.sha256(data).hexdigest()
        write_json(self.index, {**about, "sha256": digest, "facts": plain(facts)})
        for old in folder.glob("state-*.safetensors*"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def last(self) -> Checkpoint | None:
        """Return the folder's checkpoint, or None. Refuses one that is damaged, or of another format."""
        if not self.index.exists():
            return None
        remedy = "start again in another folder"
        try:
            index = json.loads(self.index.read_bytes())
            self._check_format(index)
            path = self.index.parent / index["file"]
            data = path.read_bytes()
        except ConsilienceError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConsilienceError(
                f"the checkpoint at {self.index} is damaged or its file is missing ({e}); {remedy}."
            ) from e
        if hashlib.sha256(data).hexdigest() != index["sha256"]:
            raise ConsilienceError(
                f"the checkpoint at {path} is damaged: its content is not what its index says; {remedy}."
            )
        return Checkpoint(load(path)[0], index["facts"])

    def _check_format(self, index: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of a version that keeps other facts."""
        found = index.get("format", 1)
        if found == FORMAT:
            return

        # 0.1 wrote its version into the log only.
        begun = (line.get("versions", {}) for _, line in self.lines() if line.get("event") == "begin")
        writer = index.get("consilience") or next((v.get("consilience") for v in begun), None) or "0.1"
        raise ConsilienceError(
            f"the checkpoint in {self.folder} is of format {found}, written by consilience {writer}, and "
            f"consilience {__version__} resumes format {FORMAT}; resume it with consilience {writer}, "
            "or start again in another folder."
        )


def plain(value: Any) -> Any:
    """Return a value for JSON: tuples become lists, and NaN becomes None."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that receives the number of SIGINT or SIGTERM; a second signal stops at once.

    Python handles signals in its main thread only; elsewhere the list stays empty.
    """
    stop: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    # A second signal must stop a run that hangs.
    old: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
