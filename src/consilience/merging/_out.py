"""Where a merged model goes: tensors in memory, one file, or a folder of shards with its index; files whole or not at all."""

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
from consilience.core.params import save, write_json
from consilience.merging._files import ADAPTER, DTYPES, INDEX, PICKLES, Files, _json, finite
from consilience.merging._plan import Plan

KINDS = {t: n for n, t in DTYPES.items()}


def fitted(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values in a dtype; refused where they are too large for it."""
    made = values.to(dtype)
    if (
        dtype != values.dtype
        and dtype.is_floating_point
        and torch.finfo(dtype).max < torch.finfo(values.dtype).max
        and not finite(made)
    ):
        raise ConsilienceError(
            f"merged parameters should fit in {dtype} (--out_dtype). Found larger ones in {name!r}."
        )
    return made


class Tensors:
    """A state dict in memory."""

    def __init__(self, plan: Plan, dtypes: Mapping[str, torch.dtype]) -> None:
        like = plan.like
        self.made = {
            n: torch.empty(like.shapes[n], dtype=dtypes[n]) for n in like.shapes if n not in like.aliases
        }
        self.made |= {n: self.made[a] for n, a in like.aliases.items()}

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put the flattened tensor's elements from `start` on."""
        self.made[name].view(-1)[start : start + len(values)] = fitted(values, self.made[name].dtype, name)

    def close(self, recipe: Mapping[str, object]) -> None:
        """Nothing is left to do."""

    def undo(self) -> None:
        """Nothing is left behind."""


class Shards:
    """Files of safetensors beside their place until `close` puts them there: `x.safetensors`, or a folder like the base's with its configuration and tokenizer."""

    def __init__(self, plan: Plan, dtypes: Mapping[str, torch.dtype], out: Path, shard: int | None) -> None:
        self.plan, self.out, like = plan, out, plan.like
        self.single = out.suffix == ".safetensors"
        if self.single and (any(plan.kept.values()) or shard is not None):
            what = "experts' own entries (`keep`)" if any(plan.kept.values()) else "several files (`shard`)"
            raise ConsilienceError(f"`out` should be a folder, which has room for {what}. Found {out}.")
        names = list(like.shapes)
        sizes = {n: like.size(n) * dtypes[n].itemsize for n in names}
        of_file = _layout(names, sizes, like if isinstance(like, Files) else None, self.single, shard)
        free = shutil.disk_usage(_existing(out)).free
        if (wanted := sum(sizes.values())) > free:
            raise ConsilienceError(
                f"there should be room for {wanted:,} bytes. Found {free:,} free at {out.parent}."
            )
        self.index = of_file if len(set(of_file.values())) > 1 else None
        self.total = sum(sizes.values())
        self._at: dict[str, tuple[int, int]] = {}
        self._handles: dict[str, int] = {}
        self._ends: dict[int, int] = {}
        self._dtypes = dict(dtypes)
        self.parents = [p for p in out.absolute().parents if not p.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=f"{out.name}.part-", dir=out.parent))
        try:
            self.temporary.chmod(0o755)
            for file in dict.fromkeys(of_file.values()):
                self._begin(file, [n for n in names if of_file[n] == file], sizes)
        except BaseException:
            self.undo()
            raise

    def _begin(self, file: str, names: Sequence[str], sizes: Mapping[str, int]) -> None:
        like = self.plan.like
        names = sorted(
            names, key=lambda n: (-self._dtypes[n].itemsize, n)
        )  # aligned, as the format's own writer does
        head: dict[str, object] = {
            "__metadata__": {"format": "pt", **(like.metadata if isinstance(like, Files) else {})}
        }
        end = 0
        for n in names:
            head[n] = {
                "dtype": KINDS[self._dtypes[n]],
                "shape": list(like.shapes[n]),
                "data_offsets": [end, end + sizes[n]],
            }
            end += sizes[n]
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle = self._handles[file] = os.open(
            self.temporary / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644
        )
        os.write(handle, len(text).to_bytes(8, "little") + text)
        self._ends[handle] = 8 + len(text) + end
        at = 8 + len(text)
        for n in names:
            self._at[n] = (handle, at)
            at += sizes[n]

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put the flattened tensor's elements from `start` on."""
        if not len(values):
            return
        handle, at = self._at[name]
        values = fitted(values, self._dtypes[name], name).contiguous()
        view = values.view(torch.uint8).numpy().data
        at += start * values.element_size()
        while len(view):
            done = os.pwrite(handle, view, at)
            view, at = view[done:], at + done

    def close(self, recipe: Mapping[str, object]) -> None:
        """Aliases, the index, what lies beside the base; then all of it at its place."""
        like = self.plan.like
        for n, first in like.aliases.items():
            size = like.size(first)
            for start in range(0, size, 1 << 20):
                self.write(n, start, self._back(first, start, min(size, start + (1 << 20))))
        for handle in self._handles.values():
            os.ftruncate(handle, self._ends[handle])
            os.fsync(handle)
            os.close(handle)
        self._handles = {}
        if not self.single:
            if self.index:
                write_json(
                    self.temporary / INDEX, {"metadata": {"total_size": self.total}, "weight_map": self.index}
                )
            if isinstance(like, Files) and like.path.is_dir():
                for path in sorted(like.path.iterdir()):
                    if (
                        path.is_file()
                        and path.suffix not in (*PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf")
                        and path.name not in (INDEX, ADAPTER)
                    ):
                        shutil.copyfile(path, self.temporary / path.name)
                self._retype()
            for stem, expert in zip(
                _stems([e.name for e in self.plan.experts]), self.plan.experts, strict=True
            ):
                if own := self.plan.kept.get(expert.name):
                    save(self.temporary / "kept" / f"{stem}.safetensors", {n: expert.whole(n) for n in own})
            write_json(self.temporary / "merge.json", dict(recipe))
        self._place()

    def _place(self) -> None:
        """What was made goes where it belongs, unless something came there in the meantime."""
        if self.out.exists():
            raise ConsilienceError(
                f"`out` should be new. Found something that came to {self.out} during the merge."
            )
        if self.single:
            os.rename(self.temporary / "model.safetensors", self.out)
            self.temporary.rmdir()
        else:
            os.rename(self.temporary, self.out)

    def _retype(self) -> None:
        """config.json says what dtype the weights have, where that is another one now."""
        path = self.temporary / "config.json"
        kinds = {t for n, t in self._dtypes.items() if t.is_floating_point}
        config = _json(path) if path.is_file() else {}
        told = [k for k in ("torch_dtype", "dtype") if isinstance(config.get(k), str)]
        if (
            told
            and len(kinds) == 1
            and kinds != {t for t in self.plan.like.dtypes.values() if t.is_floating_point}
        ):
            write_json(path, {**config, **dict.fromkeys(told, str(kinds.pop()).removeprefix("torch."))})

    def _back(self, name: str, start: int, stop: int) -> Tensor:
        handle, at = self._at[name]
        values = torch.empty(stop - start, dtype=self._dtypes[name])
        os.preadv(handle, [values.view(torch.uint8).numpy().data], at + start * values.element_size())
        return values

    def undo(self) -> None:
        """Leave nothing behind."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}
        shutil.rmtree(self.temporary, ignore_errors=True)
        for parent in self.parents:
            with suppress(OSError):
                parent.rmdir()


def _stems(names: Sequence[str]) -> list[str]:
    """What experts' files are called: by their own names, numbered where these are alike."""
    from consilience.merging._diagnose import _stem

    found: list[str] = []
    for name in map(_stem, names):
        found.append(
            next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(names) + 2))) if n not in found)
        )
    return found


def _layout(
    names: Sequence[str], sizes: Mapping[str, int], like: Files | None, single: bool, shard: int | None
) -> dict[str, str]:
    """Which file has which tensor: as the base's files have them, or shards of at most `shard` bytes."""
    if shard is not None and shard < 1:
        raise ConsilienceError(f"`shard` should be a number of bytes. Found `shard = {shard}`.")
    if single or (shard is None and (like is None or like.index is None)):
        return dict.fromkeys(names, "model.safetensors")
    if shard is None and like is not None and like.index is not None:
        return {n: like.where[n].name for n in names}
    assert shard is not None
    groups: list[list[str]] = [[]]
    room = shard
    for n in names:
        if groups[-1] and sizes[n] > room:
            groups.append([])
            room = shard
        groups[-1].append(n)
        room -= sizes[n]
    if len(groups) == 1:
        return dict.fromkeys(names, "model.safetensors")
    return {
        n: f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        for i, group in enumerate(groups, 1)
        for n in group
    }


def _existing(path: Path) -> Path:
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path
