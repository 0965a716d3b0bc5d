"""Where a merged model is written: tensors in memory, one file, or a folder of shards with its index."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.params import all_finite, save, sync_folder, write_json
from consilience.core.warning import warn
from consilience.merging._files import ADAPTER, DTYPES, INDEX, PIECE, Files, inside, read_json, stem
from consilience.merging._plan import Plan

CODES = {dtype: code for code, dtype in DTYPES.items()}
COMPANIONS = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".vocab", ".md")
"""Files next to weights that a merged folder gets too: configuration and tokenizer, and no code."""
LEGAL = ("license", "notice")
OWN = (ADAPTER, "merge.json", "trainer_state.json")
"""Files of that kind that are about the base's own weights, as indices are."""


def fitted(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert values to a dtype; refuse values that are too large for it."""
    made = values.to(dtype)
    if dtype == values.dtype or not dtype.is_floating_point:
        return made

    # Only a narrower range can make finite values infinite.
    narrower = torch.finfo(dtype).max < torch.finfo(values.dtype).max
    if narrower and not all_finite(made):
        raise ConsilienceError(
            f"merged parameters must fit in {dtype} (--out_dtype), got larger ones in {name!r}."
        )
    return made


class Tensors:
    """A merged model in memory, as a state dict."""

    def __init__(self, plan: Plan, dtypes: Mapping[str, torch.dtype]) -> None:
        like = plan.like
        self.made = {
            name: torch.empty(like.shapes[name], dtype=dtypes[name])
            for name in like.shapes
            if name not in like.aliases
        }
        # Tied weights stay one tensor.
        self.made |= {name: self.made[first] for name, first in like.aliases.items()}

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write the flattened tensor's elements from `start` on."""
        self.made[name].view(-1)[start : start + len(values)] = fitted(values, self.made[name].dtype, name)

    def close(self, recipe: Mapping[str, object]) -> None:
        """Do nothing: the tensors are complete."""

    def undo(self) -> None:
        """Do nothing: the tensors are freed with this object."""


class Shards:
    """Files of safetensors in a temporary folder, until `close` moves them to their place.

    They are written completely or not at all. The result is one file `x.safetensors`, or a folder like the
    base's with its configuration and tokenizer.
    """

    def __init__(self, plan: Plan, dtypes: Mapping[str, torch.dtype], out: Path, shard: int | None) -> None:
        self.plan, self.out, like = plan, out, plan.like
        self.single = out.suffix == ".safetensors"
        if self.single and (any(plan.kept.values()) or shard is not None):
            what = "experts' own entries (`keep`)" if any(plan.kept.values()) else "several files (`shard`)"
            raise ConsilienceError(f"`out` must be a folder to hold {what}, got {out}.")

        names = list(like.shapes)
        sizes = {name: like.size(name) * dtypes[name].itemsize for name in names}
        of_file = _layout(names, sizes, like if isinstance(like, Files) else None, self.single, shard)
        # Refused now, and not after an hour of merging.
        free = shutil.disk_usage(_existing(out)).free
        if (needed := sum(sizes.values())) > free:
            raise ConsilienceError(
                f"the merged model needs {needed:,} bytes, got {free:,} free at {out.parent}."
            )

        self.index = of_file if len(set(of_file.values())) > 1 else None
        self.total = sum(sizes.values())
        self._places: dict[str, tuple[int, int]] = {}
        self._handles: dict[str, int] = {}
        self._ends: dict[int, int] = {}
        self._dtypes = dict(dtypes)

        # In the same folder as the result, since only a move within a file system is atomic.
        self.new_parents = [parent for parent in out.absolute().parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=f"{out.name}.part-", dir=out.parent))
        try:
            self.temporary.chmod(0o755)
            for file in dict.fromkeys(of_file.values()):
                self._begin(file, [name for name in names if of_file[name] == file], sizes)
        except BaseException:
            self.undo()
            raise

    def _begin(self, file: str, names: Sequence[str], sizes: Mapping[str, int]) -> None:
        """Create a file with its header, and note where each tensor goes."""
        like = self.plan.like
        # Wide dtypes first, so that all tensors are aligned, as the format's own writer does.
        names = sorted(names, key=lambda name: (-self._dtypes[name].itemsize, name))
        head: dict[str, object] = {
            "__metadata__": {"format": "pt", **(like.metadata if isinstance(like, Files) else {})}
        }
        end = 0
        for name in names:
            head[name] = {
                "dtype": CODES[self._dtypes[name]],
                "shape": list(like.shapes[name]),
                "data_offsets": [end, end + sizes[name]],
            }
            end += sizes[name]

        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        handle = self._handles[file] = os.open(self.temporary / file, flags, 0o644)
        os.write(handle, len(text).to_bytes(8, "little") + text)
        self._ends[handle] = 8 + len(text) + end
        at = 8 + len(text)
        for name in names:
            self._places[name] = (handle, at)
            at += sizes[name]

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write the flattened tensor's elements from `start` on."""
        if not len(values):
            return
        handle, at = self._places[name]
        values = fitted(values, self._dtypes[name], name).contiguous()
        view = values.view(torch.uint8).numpy().data
        at += start * values.element_size()
        while len(view):
            done = os.pwrite(handle, view, at)
            view, at = view[done:], at + done

    def close(self, recipe: Mapping[str, object]) -> None:
        """Write aliases and, in a folder, the files next to the weights; then move all to its place."""
        like = self.plan.like
        for name, first in like.aliases.items():
            size = like.size(first)
            for start in range(0, size, PIECE):
                self.write(name, start, self._read_back(first, start, min(size, start + PIECE)))

        # Tensors without elements at the end of a file were never written: set the file's full length.
        for handle in self._handles.values():
            os.ftruncate(handle, self._ends[handle])
            os.fsync(handle)
            os.close(handle)
        self._handles = {}

        if not self.single:
            self._write_companions()
            write_json(self.temporary / "merge.json", dict(recipe))
        self._move()

    def _write_companions(self) -> None:
        """Write the index, the base's configuration and tokenizer, and the experts' own entries."""
        if self.index:
            index = {"metadata": {"total_size": self.total}, "weight_map": self.index}
            write_json(self.temporary / INDEX, index)

        # A folder that the Hugging Face libraries load as they load the base.
        like = self.plan.like
        if isinstance(like, Files) and like.path.is_dir():
            for path in sorted(like.path.iterdir()):
                if _is_companion(path):
                    shutil.copyfile(path, self.temporary / path.name)
            self._correct_config()

        files = _unique([stem(expert.name) for expert in self.plan.experts])
        for file, expert in zip(files, self.plan.experts, strict=True):
            if own := self.plan.kept.get(expert.name):
                entries = {name: expert.whole(name) for name in own}
                save(self.temporary / "kept" / f"{file}.safetensors", entries)

    def _move(self) -> None:
        """Move the finished files to their place, unless something was created there in the meantime."""
        if self.out.exists():
            raise ConsilienceError(f"`out` must be new, but {self.out} was created during the merge.")
        sync_folder(self.temporary)
        if self.single:
            os.rename(self.temporary / "model.safetensors", self.out)
            self.temporary.rmdir()
        else:
            os.rename(self.temporary, self.out)
        sync_folder(self.out.parent)

    def _correct_config(self) -> None:
        """Correct the dtype in config.json, and take local paths out of the configuration."""
        for name in ("config.json", "tokenizer_config.json"):
            path = self.temporary / name
            if path.is_file():
                written = read_json(path)
                facts = without_paths(written) | (self._dtype_now(written) if name == "config.json" else {})
                if facts != written:
                    write_json(path, facts)

        config = self.temporary / "config.json"
        if config.is_file() and "auto_map" in read_json(config):
            warn(
                "the base has code of its own (`auto_map` in config.json), which is not copied; "
                "copy it from the base if you trust it."
            )

    def _dtype_now(self, config: Mapping[str, object]) -> dict[str, str]:
        """Return the dtype of config.json, by its field, if the weights have another one now."""
        fields = [key for key in ("torch_dtype", "dtype") if isinstance(config.get(key), str)]
        # Weights of several dtypes have no single name: the field then stays as it is.
        before = {dtype for dtype in self.plan.like.dtypes.values() if dtype.is_floating_point}
        now = {dtype for dtype in self._dtypes.values() if dtype.is_floating_point}
        changed = len(now) == 1 and now != before
        return dict.fromkeys(fields, str(now.pop()).removeprefix("torch.")) if changed else {}

    def _read_back(self, name: str, start: int, stop: int) -> Tensor:
        """Read elements that were written."""
        handle, at = self._places[name]
        values = torch.empty(stop - start, dtype=self._dtypes[name])
        os.preadv(handle, [values.view(torch.uint8).numpy().data], at + start * values.element_size())
        return values

    def undo(self) -> None:
        """Delete the temporary files, and folders that were created for the result."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}
        shutil.rmtree(self.temporary, ignore_errors=True)
        for parent in self.new_parents:
            with suppress(OSError):
                parent.rmdir()


def without_paths(facts: Mapping[str, object]) -> dict[str, object]:
    """Return facts of a model with the last part of a local path in the place of the path.

    >>> without_paths({"_name_or_path": "/home/ann/run7", "hidden_size": 3})
    {'_name_or_path': 'run7', 'hidden_size': 3}
    """
    # The folder that a model was trained in concerns nobody else.
    named = {name: Path(str(facts[name])) for name in ("_name_or_path", "name_or_path") if name in facts}
    return {**facts, **{name: path.name for name, path in named.items() if path.is_absolute()}}


def _is_companion(path: Path) -> bool:
    """Whether a file next to a base's weights belongs next to the merged ones, too."""
    about = path.name in OWN or path.name.endswith(".index.json") or path.name.startswith(".")
    return not about and (path.suffix in COMPANIONS or path.stem.lower() in LEGAL) and inside(path)


def _unique(names: Sequence[str]) -> list[str]:
    """Number names that occurred before."""
    found: list[str] = []
    for name in names:
        candidates = (name, *(f"{name}-{i}" for i in range(2, len(names) + 2)))
        found.append(next(candidate for candidate in candidates if candidate not in found))
    return found


def _layout(
    names: Sequence[str], sizes: Mapping[str, int], like: Files | None, single: bool, shard: int | None
) -> dict[str, str]:
    """Choose the file of each tensor: as in the base's files, or shards of at most `shard` bytes."""
    if shard is not None and shard < 1:
        raise ConsilienceError(f"`shard` must be a number of bytes >= 1, got {shard}.")
    if single or (shard is None and (like is None or like.index is None)):
        return dict.fromkeys(names, "model.safetensors")
    if shard is None and like is not None and like.index is not None:
        return {name: like.where[name].name for name in names}

    # A tensor larger than a shard gets a file of its own.
    assert shard is not None
    groups: list[list[str]] = [[]]
    room = shard
    for name in names:
        if groups[-1] and sizes[name] > room:
            groups.append([])
            room = shard
        groups[-1].append(name)
        room -= sizes[name]

    if len(groups) == 1:
        return dict.fromkeys(names, "model.safetensors")
    return {
        name: f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        for i, group in enumerate(groups, 1)
        for name in group
    }


def _existing(path: Path) -> Path:
    """Return the nearest parent folder that exists."""
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path
