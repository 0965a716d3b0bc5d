"""How sources are made from arrays, datasets, folders and files."""

from __future__ import annotations

import io
import lzma
import os
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.params import key
from consilience.core.source import Examples, Label, Source, Stream, Tensors
from consilience.data._shares import draw

Kind = Literal["class", "value"]


# ---------------------------------------------------------------------------------------------------- checks


def tensor(value: Any, what: str) -> Tensor:
    """A tensor from a tensor, an array or nested lists of numbers."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise ConsilienceError(f"{what} should be real numbers. Found dtype {value.dtype}.")
        return value.detach()
    try:
        array = np.asarray(value)
    except ValueError as e:
        raise ConsilienceError(
            f"{what} should be an array with rows of equal length. Found: {str(e).splitlines()[0]}"
        ) from e
    if array.dtype.kind not in "biuf":
        raise ConsilienceError(f"{what} should be real numbers. Found dtype {array.dtype}.")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    native = np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, dtype=native, requirements=["C", "W"]))


def unit(x: Tensor) -> Tensor:
    """Inputs as models take them: images in bytes / 255, other fractions as float32, other whole numbers as they are."""
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div_(255)
    return x.to(torch.float32) if x.is_floating_point() or x.dtype == torch.bool else x.long()


def inputs(value: Any, what: str) -> Tensor:
    """Checked inputs [N, ...]."""
    x = tensor(value, what)
    if x.dim() < 2:
        raise ConsilienceError(
            f"{what} should have a dimension of examples and at least one more. Found shape {tuple(x.shape)}."
        )
    if x.numel() == 0:
        raise ConsilienceError(f"{what} should not be empty. Found shape {tuple(x.shape)}.")
    x = unit(x)
    _finite(x, what)
    return x


def targets(value: Any, kind: Kind, what: str) -> Tensor:
    """Checked targets: class numbers [N], or values [N, outputs]."""
    y = tensor(value, what)
    if kind == "value":
        if y.dim() not in (1, 2):
            raise ConsilienceError(
                f"{what} should have shape [N] or [N, outputs] for values. Found shape {tuple(y.shape)}."
            )
        y = y.to(torch.float32)
        _finite(y, what)
        return y[:, None] if y.dim() == 1 else y
    if y.dim() != 1:
        raise ConsilienceError(f"{what} should have shape [N] for classes. Found shape {tuple(y.shape)}.")
    if y.is_floating_point():
        raise ConsilienceError(
            f'{what} should be class numbers of an integer type (or `kind="value"`). Found dtype {y.dtype}.'
        )
    return y.long()


def _finite(t: Tensor, what: str) -> None:
    if t.is_floating_point() and not torch.isfinite(t).all():
        first = int(
            (~torch.isfinite(t)).flatten(1 if t.dim() > 1 else 0).reshape(len(t), -1).any(1).nonzero()[0]
        )
        raise ConsilienceError(f"{what} should be finite. Found NaN or infinity in example {first}.")


def _fraction(name: str, value: object, zero: bool = False) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (0 < value < 1 or (zero and value == 0))
    ):
        raise ConsilienceError(
            f"`{name}` should be a fraction in {'[0' if zero else '(0'}, 1). Found `{name} = {value!r}`."
        )
    return float(value)


def _pair(x: Any, y: Any, kind: Kind, of: str) -> Tensors:
    pair = Tensors(inputs(x, f"`{of}x`"), targets(y, kind, f"`{of}y`"))
    if len(pair.x) != len(pair.y):
        raise ConsilienceError(
            f"`{of}x` and `{of}y` should be equally long. Found {len(pair.x)} and {len(pair.y)}."
        )
    return pair


def _labels(
    train: Tensor, test: Tensor, classes: Sequence[str] | None, space: str, kind: Kind
) -> tuple[tuple[Label, ...], tuple[int, ...]]:
    """What every target means, and which there are."""
    if classes is not None and (isinstance(classes, str) or len(set(classes)) != len(classes)):
        raise ConsilienceError(f"`classes` should be a list of different names. Found {classes!r}.")
    if kind == "value":
        if train.shape[1:] != test.shape[1:]:
            raise ConsilienceError(
                f"test targets should be like the training ones. Found {test.shape[1]} and {train.shape[1]} outputs."
            )
        k = train.shape[1]
        names = classes if classes is not None else ["value"] if k == 1 else [f"value{i}" for i in range(k)]
        if len(names) != k:
            raise ConsilienceError(
                f"`classes` should name every output. Found {len(names)} names and {k} outputs."
            )
        return tuple((space, str(n)) for n in names), tuple(range(k))
    found = torch.cat([train, test]).unique()
    low, high = int(found[0]), int(found[-1])
    if low < 0:
        raise ConsilienceError(f"class numbers should be 0 or more. Found {low}.")
    if classes is None:
        if high >= 1_000_000:
            raise ConsilienceError(f"class numbers should count up from 0. Found {high}.")
        return tuple((space, str(i)) for i in range(high + 1)), tuple(found.tolist())
    if high >= len(classes):
        raise ConsilienceError(
            f"class numbers should be in 0..{len(classes) - 1}, one for each of `classes`. Found {high}."
        )
    return tuple((space, str(n)) for n in classes), tuple(range(len(classes)))


def _source(
    train: Examples,
    test: Examples | float,
    classes: Sequence[str] | None,
    name: str,
    kind: Kind,
    space: str | None,
    validation: float | Examples,
    seed: int,
) -> Source:
    """A source from examples, with the splits that are still to be made."""
    if not isinstance(test, Examples):
        y = train.targets()
        drawn, rest = draw(y, round(test * len(y)), key(seed, name, "test"), kind == "class", spare=1)
        if not len(drawn) or not len(rest):
            raise ConsilienceError(
                f"`test` should leave examples on both sides. Found `test = {test}` of {len(y)} examples."
            )
        train, test = train.select(rest), train.select(drawn)
    if not isinstance(validation, Examples):
        y = train.targets()
        drawn, rest = draw(
            y, round(validation * len(y)), key(seed, name, "validation"), kind == "class", spare=1
        )
        train, validation = train.select(rest), train.select(drawn)
    seen = torch.cat([train.targets(), validation.targets()])
    labels, known = _labels(seen, test.targets(), classes, name if space is None else space, kind)
    return Source(name, train, validation, test, labels, known, kind=kind)


def _kind(kind: object) -> None:
    if kind not in ("class", "value"):
        raise ConsilienceError(f'`kind` should be "class" or "value". Found `kind = {kind!r}`.')


# ---------------------------------------------------------------------------------------------------- tables


def table(name: str, seed: int, image: bool = False) -> Source:
    """One of scikit-learn's tables."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    x = torch.tensor(data.data, dtype=torch.float32)
    if name == "digits":
        x = x.view(-1, 1, 8, 8) / 16 if image else x / 16
        return from_arrays(
            x, data.target, 0.2, [str(c) for c in data.target_names], name, "class", None, 0.1, seed
        )
    if name == "diabetes":
        source = from_arrays(x, data.target, 0.2, None, name, "value", None, 0.1, seed)
        return source.map(x=_standard(source.train.whole()[0]), y=_standard(source.train.targets()))
    source = from_arrays(
        x, data.target, 0.2, [str(c) for c in data.target_names], name, "class", None, 0.1, seed
    )
    return source.map(x=_standard(source.train.whole()[0]))


def _standard(t: Tensor) -> Any:
    mean, std = t.double().mean(0), t.double().std(0)
    std[std == 0] = 1
    return lambda v: ((v.double() - mean) / std).to(v.dtype)


# ---------------------------------------------------------------------------------------------------- arrays


def from_arrays(
    x: Any,
    y: Any,
    test: Any,
    classes: Sequence[str] | None,
    name: str,
    kind: Kind,
    space: str | None,
    validation: float,
    seed: int,
) -> Source:
    """See `consilience.data.arrays`."""
    _kind(kind)
    if y is None:
        if isinstance(x, (Tensor, np.ndarray, list, tuple)):
            raise ConsilienceError("arrays should come with targets `y`. Found none.")
        return from_dataset(x, test, classes, 0, name, kind, space, validation, seed)
    share = _fraction("validation", validation, zero=True)
    train = _pair(x, y, kind, "")
    if isinstance(test, (tuple, list)):
        if len(test) != 2:
            raise ConsilienceError(f"`test` should be (x, y) or a fraction. Found {len(test)} parts.")
        held = _pair(test[0], test[1], kind, "test ")
        if held.x.shape[1:] != train.x.shape[1:]:
            found = f"{tuple(held.x.shape[1:])} and {tuple(train.x.shape[1:])}"
            raise ConsilienceError(
                f"test examples should have the shape of training examples. Found {found}."
            )
        if held.x.dtype != train.x.dtype:
            raise ConsilienceError(
                f"test inputs should be of the type of training inputs. Found {held.x.dtype} and {train.x.dtype}."
            )
        return _source(train, held, classes, name, kind, space, share, seed)
    return _source(train, _fraction("test", test), classes, name, kind, space, share, seed)


# ---------------------------------------------------------------------------------------------------- datasets


class Pairs:
    """A map-style dataset as the stream reads it: inputs as tensors, targets as they were collected."""

    def __init__(self, dataset: Any, y: Tensor):
        self.dataset, self.y = dataset, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        item = self.dataset[i]
        x = item[0] if isinstance(item, (tuple, list)) else item
        return unit(channels_first(np.asarray(x)) if hasattr(x, "getbands") else tensor(x, "`x`")), self.y[i]


def channels_first(image: np.ndarray) -> Tensor:
    """[H, W] or [H, W, C] -> [C, H, W]."""
    image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.array(image, order="C"))


def collect(dataset: Any, kind: Kind) -> Tensor:
    """The targets of a dataset: its attribute, if it agrees with the first example, or read one by one."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConsilienceError(
            f"a dataset should be map-style, with len(d) and d[i]. Found {type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise ConsilienceError("a dataset should not be empty. Found 0 examples.")
    first = dataset[0]
    if not isinstance(first, (tuple, list)) or len(first) < 2:
        raise ConsilienceError(f"a dataset should give pairs (x, y). Found {type(first).__name__}.")
    if getattr(dataset, "target_transform", None) is None:
        for name in ("targets", "labels"):
            found = getattr(dataset, name, None)
            if found is not None and not callable(found) and len(found) == len(dataset):
                y = targets(found, kind, f"`{name}` of the dataset")
                if torch.equal(y[:1], targets([_plain(first[1])], kind, "`y` of the dataset")):
                    return y
    return targets([_plain(dataset[i][1]) for i in range(len(dataset))], kind, "`y` of the dataset")


def _plain(y: Any) -> Any:
    return y.tolist() if hasattr(y, "tolist") else y


def _streamed(dataset: Any, y: Tensor, workers: int) -> Stream:
    return Stream(Pairs(dataset, y), y, torch.arange(len(y)), workers)


def from_dataset(
    dataset: Any,
    test: Any,
    classes: Sequence[str] | None,
    workers: int,
    name: str,
    kind: Kind,
    space: str | None,
    validation: float,
    seed: int,
) -> Source:
    """See `consilience.data.stream`."""
    _kind(kind)
    _workers(workers)
    share = _fraction("validation", validation, zero=True)
    train = _streamed(dataset, collect(dataset, kind), workers)
    held = (
        _fraction("test", test)
        if isinstance(test, (int, float))
        else _streamed(test, collect(test, kind), workers)
    )
    if isinstance(held, Stream):
        a, b = train.dataset[0][0].shape, held.dataset[0][0].shape
        if a != b:
            raise ConsilienceError(
                f"test examples should have the shape of training examples. Found {tuple(b)} and {tuple(a)}."
            )
    return _source(train, held, classes, name, kind, space, share, seed)


def _workers(workers: object) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ConsilienceError(f"`workers` should be a whole number >= 0. Found `workers = {workers!r}`.")


# ---------------------------------------------------------------------------------------------------- images


SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def pillow() -> Any:
    """PIL's Image module, or which extra to install."""
    try:
        from PIL import Image
    except ImportError as e:
        raise ConsilienceError(
            "reading images should have pillow: pip install 'consilience[vision]'. Found none."
        ) from e
    return Image


def picture(file: Any, what: str, mode: str | None, size: tuple[int, int] | None = None) -> Tensor:
    """One image as bytes [C, H, W]; `mode` None keeps grey as it is and makes all else RGB."""
    image_module = pillow()
    try:
        with image_module.open(file) as image:
            image = image.convert(mode or ("L" if image.mode == "L" else "RGB"))
            if size and image.size != size[::-1]:
                image = image.resize(size[::-1], image_module.Resampling.BILINEAR)
            return channels_first(np.asarray(image))
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as e:
        reason = (
            str(e).splitlines()[0]
            if str(e) and "cannot identify" not in str(e)
            else "no image that pillow knows"
        )
        raise ConsilienceError(f"an image should be readable. Found {what}: {reason}.") from e


class Images:
    """The image files of a folder, read when they are asked for."""

    def __init__(self, paths: list[Path], mode: str, size: tuple[int, int] | None):
        self.paths, self.mode, self.size = paths, mode, size
        self.first: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        x = picture(self.paths[i], str(self.paths[i]), self.mode, self.size)
        if self.first is None:
            self.first = (
                x.shape if i == 0 else picture(self.paths[0], str(self.paths[0]), self.mode, self.size).shape
            )
        if x.shape != self.first:
            a, b = ("x".join(map(str, s[1:])) for s in (self.first, x.shape))
            raise ConsilienceError(
                f"images should have one size, or pass `size`. Found {a} in {self.paths[0]} and {b} in {self.paths[i]}."
            )
        return x


def dimensions(size: int | tuple[int, int] | None, workers: int) -> tuple[int, int] | None:
    """Checked height and width to read images at; the checks of whatever reads images stand here."""
    _workers(workers)
    pillow()
    both = (size, size) if isinstance(size, int) else size
    if both is not None and (len(both) != 2 or any(not isinstance(v, int) or v < 1 for v in both)):
        raise ConsilienceError(f"`size` should be one or two whole numbers >= 1. Found `size = {size!r}`.")
    return both


def pictures(
    files: list[Path],
    y: Tensor,
    size: tuple[int, int] | None,
    grey: bool,
    in_memory: bool,
    workers: int,
    skip: bool = False,
) -> Tensors | Stream:
    """Image files with their classes, read at once or when they are needed; `skip` leaves out those that cannot be read."""
    if skip:
        files, y = _readable(files, y)
    images = Images(files, "L" if grey else "RGB", size)
    if in_memory:
        return Tensors(unit(torch.stack([images[i] for i in range(len(images))])), y)
    return _streamed(images, y, workers)


def _readable(files: list[Path], y: Tensor) -> tuple[list[Path], Tensor]:
    """The files that can be read, with their classes; a warning names others."""
    bad: dict[int, Path] = {}
    for i, path in enumerate(files):
        try:
            picture(path, str(path), None)
        except ConsilienceError:
            bad[i] = path
    if not bad:
        return files, y
    if len(bad) == len(files):
        raise ConsilienceError(
            f"images should be readable. Found none of {len(files)} that is, the first {files[0]}."
        )
    names = ", ".join(str(p) for p in list(bad.values())[:3])
    others = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    warnings.warn(
        f"{len(bad)} of {len(files)} images cannot be read and are left out: {names}{others}", stacklevel=5
    )
    keep = torch.tensor([i for i in range(len(files)) if i not in bad])
    return [files[i] for i in keep.tolist()], y[keep]


def from_folder(
    path: str | Path,
    size: int | tuple[int, int] | None,
    grey: bool,
    in_memory: bool,
    workers: int,
    test: float,
    name: str | None,
    space: str | None,
    validation: float,
    seed: int,
    unreadable: str = "refuse",
) -> Source:
    """See `consilience.data.folder`."""
    if unreadable not in ("refuse", "skip"):
        raise ConsilienceError(
            f"`unreadable` should be 'refuse' or 'skip'. Found `unreadable = {unreadable!r}`."
        )
    path = Path(path)
    if not path.is_dir():
        raise ConsilienceError(
            f"`path` should be a folder of images. Found {'a file' if path.exists() else 'none'} at {path}."
        )
    both = dimensions(size, workers)
    parts = {p.name: p for p in _folders(path)}
    root = parts.get("train", path)
    held = parts.get("test") if "train" in parts else None
    chosen = (
        next((parts[v] for v in ("val", "valid", "validation") if v in parts), None)
        if "train" in parts
        else None
    )
    classes = [p.name for p in _folders(root)]
    if not classes:
        raise ConsilienceError(
            f"a folder of images should have a subfolder for each class. Found none in {root}."
        )

    def read(where: Path) -> Examples:
        files, y = _files(where, classes)
        return pictures(files, y, both, grey, in_memory, workers, unreadable == "skip")

    train, test_part = read(root), read(held) if held else _fraction("test", test)
    if isinstance(test_part, Examples):
        a, b = (tuple(next(e.chunks(1))[0].shape[1:]) for e in (train, test_part))
        if a != b:
            raise ConsilienceError(
                f"test images should have the size of training images, or pass `size`. Found {b} and {a}."
            )
    share = read(chosen) if chosen else _fraction("validation", validation, zero=True)
    return _source(train, test_part, classes, name or path.resolve().name, "class", space, share, seed)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(path: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    """The image files below a folder, class by class."""
    files: list[Path] = []
    y: list[int] = []
    for sub in _folders(path):
        if sub.name not in classes:
            raise ConsilienceError(f"class folders should be those of train. Found {sub.name!r} in {path}.")
        own = sorted(f for f in sub.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        if not own:
            raise ConsilienceError(f"a class folder should have images. Found none in {sub}.")
        files += own
        y += [classes.index(sub.name)] * len(own)
    if not files:
        raise ConsilienceError(
            f"a folder of images should have a subfolder for each class. Found none in {path}."
        )
    return files, torch.tensor(y)


# ---------------------------------------------------------------------------------------------------- npz


BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def find(name: str | Path) -> Path:
    """The file that a path or a name in the data folder means."""
    path = Path(name)
    if path.suffix == ".npz" or len(path.parts) > 1 or not str(name):
        if not path.is_file():
            raise ConsilienceError(f"`name` should be a readable .npz file. Found none at {path}.")
        return path
    where = os.environ.get("CONSILIENCE_DATA")
    if not where:
        raise ConsilienceError(
            f"a name should be found in the folder that CONSILIENCE_DATA names. Found {str(name)!r}, and it is not set."
        )
    if not Path(where).is_dir():
        raise ConsilienceError(f"CONSILIENCE_DATA should name a folder. Found none at {where}.")
    known = {p.stem: p for p in Path(where).glob("*.npz")}
    if not known:
        raise ConsilienceError(
            f"CONSILIENCE_DATA should name a folder with .npz files. Found none in {where}."
        )
    if str(name) not in known:
        raise unknown("name", str(name), known)
    return known[str(name)]


def from_npz(
    name: str | Path,
    flat: bool,
    limit: int | None,
    images: str,
    space: str | None,
    validation: float,
    seed: int,
) -> Source:
    """See `consilience.data.npz`."""
    path = find(name)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConsilienceError(f"`limit` should be a whole number >= 1. Found `limit = {limit!r}`.")
    share = _fraction("validation", validation, zero=True)
    wanted = {f"{part}_{k}" for part in ("train", "test") for k in (images, "labels", "jpeg", "offsets")} | {
        "class_names"
    }
    try:
        with np.load(path, allow_pickle=False) as file:
            held = set(file.files)
            data = {k: file[k] for k in sorted(wanted & held)}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, NotImplementedError, *BROKEN) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConsilienceError(f"an .npz file should be whole. Found {path}: {reason}") from e
    coded = images == "images" and "train_jpeg" in data
    needed = [
        f"{p}_{k}"
        for p in ("train", "test")
        for k in (("jpeg", "offsets", "labels") if coded else (images, "labels"))
    ]
    missing = [k for k in needed if k not in data]
    if missing:
        raise ConsilienceError(
            f"an .npz file should have {', '.join(needed)}. Found no {missing[0]} in {path}, but {', '.join(sorted(held))}."
        )
    names = [str(c) for c in data["class_names"]] if "class_names" in data else None
    pairs = {}
    for part in ("train", "test"):
        y = targets(data[f"{part}_labels"], "class", f"{part}_labels of {path}")
        count = len(data[f"{part}_offsets"]) - 1 if coded else len(data[f"{part}_{images}"])
        if len(y) != count:
            raise ConsilienceError(
                f"images and labels should be equally many. Found {count} and {len(y)} ({part}) in {path}."
            )
        chosen = torch.arange(len(y))
        if part == "train" and limit is not None and limit < len(y):
            chosen, _ = draw(y, limit, key(seed, path.stem, "limit"), stratified=True)
        if coded:
            x = _decode(data[f"{part}_jpeg"], data[f"{part}_offsets"], chosen.tolist(), f"{part} image", path)
        else:
            x = _channels(data[f"{part}_{images}"][chosen.numpy()], path)
        pairs[part] = (x.flatten(1) if flat else x, y[chosen])
    x, y = pairs["train"]
    if names is None:
        high = int(torch.cat([y, pairs["test"][1]]).max())
        names = [str(i) for i in range(high + 1)]
    return from_arrays(x, y, pairs["test"], names, path.stem, "class", space, share, seed)


def _channels(x: np.ndarray, path: Path) -> Tensor:
    """[N, H, W] or [N, H, W, C] -> [N, C, H, W]; rows [N, n] stay."""
    t = tensor(x, f"images of {path}")
    if t.dim() == 3:
        return t[:, None]
    return t.permute(0, 3, 1, 2).contiguous() if t.dim() == 4 and t.shape[-1] in (1, 3, 4) else t


def _decode(jpeg: np.ndarray, offsets: np.ndarray, chosen: list[int], what: str, path: Path) -> Tensor:
    """The chosen images of JPEG files laid end to end, as bytes [N, C, H, W]."""
    o = np.asarray(offsets)
    if (
        o.dtype.kind not in "iu"
        or o.ndim != 1
        or o[0] != 0
        or o[-1] != len(jpeg)
        or (np.diff(o.astype(np.int64)) <= 0).any()
    ):
        raise ConsilienceError(
            f"JPEG offsets should rise from 0 to the {len(jpeg)} bytes there are. Found others in {path}."
        )
    found = [
        picture(io.BytesIO(jpeg[o[i] : o[i + 1]].tobytes()), f"{what} {i} of {path}", None) for i in chosen
    ]
    other = next((i for i, x in zip(chosen, found, strict=True) if x.shape != found[0].shape), None)
    if other is not None:
        raise ConsilienceError(f"images should have one size. Found another in {what} {other} of {path}.")
    return torch.stack(found)
