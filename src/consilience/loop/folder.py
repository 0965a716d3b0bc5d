"""A run's folder: what is written when, whole or not at all; and how a run is interrupted."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import load, pack, write_bytes, write_json

Progress = Callable[[Mapping[str, Any]], None]


@dataclass
class Log:
    """A run's folder: config.yaml, log.jsonl, checkpoint/, result.json, each written whole or not at all."""

    out: Path | None
    progress: Progress | None = None

    def open(self, config: Mapping[str, Any], resume: bool) -> None:
        import yaml

        assert self.out is not None
        if not resume and any((self.out / f).exists() for f in ("result.json", "log.jsonl", "checkpoint")):
            raise ConsilienceError(
                f"`out` should be a new folder, or be resumed (`resume=True`, --resume). Found a run in {self.out}."
            )
        write_bytes(self.out / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
        if not resume:
            write_bytes(self.out / "log.jsonl", b"")

    def write(self, line: Mapping[str, Any]) -> None:
        if self.out is not None:
            try:
                with open(self.out / "log.jsonl", "a") as f:
                    f.write(json.dumps(plain(dict(line))) + "\n")
            except OSError as e:
                raise ConsilienceError(
                    f"a result should be writable. Found {e.strerror or e} at {self.out / 'log.jsonl'}."
                ) from e
        if self.progress is not None:
            self.progress(line)

    def checkpoint(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        assert self.out is not None
        folder = self.out / "checkpoint"
        data = pack(tensors)
        name = f"state-{time.time_ns():x}.safetensors"
        write_bytes(folder / name, data)
        write_json(
            folder / "index.json",
            {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "facts": plain(facts)},
        )
        for old in folder.glob("state-*.safetensors*"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def last(self) -> tuple[dict[str, Tensor], Any] | None:
        assert self.out is not None
        index = self.out / "checkpoint" / "index.json"
        if not index.exists():
            return None
        try:
            found = json.loads(index.read_bytes())
            data = (index.parent / found["file"]).read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ConsilienceError(
                f"a checkpoint should be whole. Found {index} cut short or its file missing: {e}; begin anew in another folder."
            ) from e
        if hashlib.sha256(data).hexdigest() != found["sha256"]:
            raise ConsilienceError(
                f"a checkpoint should be whole. Found {found['file']} with other content than its index says; begin anew in another folder."
            )
        return load(index.parent / found["file"])[0], found["facts"]

    def rewind(self, rows: Mapping[int, int]) -> None:
        """Drop log lines of what will be done again: the stages of each repeat from those rows on."""
        assert self.out is not None
        path = self.out / "log.jsonl"
        kept = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            again = line["event"] == "stage" and line["stage"] >= rows.get(line["repeat"], 0)
            if not again and line["event"] != "end":
                kept.append(text)
        write_bytes(path, "".join(t + "\n" for t in kept).encode())


def plain(value: Any) -> Any:
    """NaN as None, for JSON."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM puts its number in; a second one stops at once. Only in the main thread."""
    stop: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    old: dict[int, Any] = {}
    with suppress(ValueError):
        old = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for n, h in old.items():
            signal.signal(n, h)
