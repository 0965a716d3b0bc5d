"""Benchmarks that are folders of images with an order of their own: CORe50 and CLEAR."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.params import key
from consilience.core.source import Examples, Source
from consilience.data._scenarios import Unit, batches, chosen
from consilience.data._shares import draw
from consilience.data._sources import SUFFIXES, _folders, _fraction, dimensions, pictures
from consilience.data._splits import _whole


def _like(train: Examples, test: Examples) -> None:
    a, b = (tuple(next(e.chunks(1))[0].shape[1:]) for e in (train, test))
    if a != b:
        raise ConsilienceError(
            f"test images should have the size of training images, or pass `size`. Found {b} and {a}."
        )


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise ConsilienceError(
            f"`path` should be a folder of images. Found {'a file' if path.exists() else 'none'} at {path}."
        )
    return path


def _images(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def _lines(file: Path) -> list[tuple[str, int]]:
    """The lines of a file list: a path and a number."""
    found = []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConsilienceError(
            f"a file list should be readable. Found {file}: {getattr(e, 'strerror', None) or 'no text'}."
        ) from e
    for i, line in enumerate(text.splitlines(), 1):
        name, _, number = line.strip().rpartition(" ")
        if line.strip():
            if not name or not number.isdigit():
                raise ConsilienceError(
                    f"lines of a file list should be a path and a number. Found {line!r} in line {i} of {file}."
                )
            found.append((name, int(number)))
    if not found:
        raise ConsilienceError(f"a file list should name images. Found none in {file}.")
    return found


# ---------------------------------------------------------------------------------------------------- CORe50


CATEGORIES = (
    "plug_adapter",
    "mobile_phone",
    "scissor",
    "light_bulb",
    "can",
    "glass",
    "ball",
    "marker",
    "cup",
    "remote_control",
)
HELD = (3, 7, 10)
"""The sessions to test on."""
TAUGHT = tuple(s for s in range(1, 12) if s not in HELD)
SCENARIOS = {
    "ni": ("NI_inc", 8),
    "nc": ("NC_inc", 9),
    "nic": ("NIC_inc", 79),
    "nicv2_79": ("NIC_v2_79", 79),
    "nicv2_196": ("NIC_v2_196", 196),
    "nicv2_391": ("NIC_v2_391", 391),
}
"""The folder of the published file lists, and the number of training batches."""


def core50(
    path: str | Path,
    scenario: str,
    object_level: bool,
    run: int,
    size: int | tuple[int, int] | None,
    grey: bool,
    in_memory: bool,
    workers: int,
    validation: float,
    name: str,
    space: str | None,
) -> list[Source]:
    """See `consilience.data.core50`."""
    path = _folder(path)
    if scenario not in SCENARIOS:
        raise unknown("scenario", str(scenario), SCENARIOS)
    _whole(0, run=run)
    both, share = dimensions(size, workers), _fraction("validation", validation, zero=True)
    root = next(
        (p for p in (path, *(path / f"core50_{n}x{n}" for n in (128, 32, 350))) if (p / "s1").is_dir()), None
    )
    if root is None:
        raise ConsilienceError(
            f"CORe50 should have the sessions s1 .. s11, in core50_128x128 or there. Found no s1 in {path}."
        )
    missing = [f"s{s}" for s in range(1, 12) if not (root / f"s{s}").is_dir()]
    if missing:
        raise ConsilienceError(
            f"CORe50 should have the sessions s1 .. s11. Found no {', '.join(missing)} in {root}."
        )
    lists = _lists(path if path != root else path.parent, scenario, object_level, run)
    if lists is None:
        train, test, index = _by_rule(root, scenario, run)
    else:
        *taught, test = [[_image(name, file) for name, _ in _lines(file)] for file in lists]
        train = [image for batch in taught for image in batch]
        index = list(torch.arange(len(train)).split([len(batch) for batch in taught]))
    names = [f"{c}{i}" for c in CATEGORIES for i in range(1, 6)] if object_level else list(CATEGORIES)

    def read(images: list[tuple[int, int, str]]) -> Examples:
        y = torch.tensor([(o - 1) // (1 if object_level else 5) for _, o, _ in images])
        return pictures(
            [root / f"s{s}" / f"o{o}" / file for s, o, file in images], y, both, grey, in_memory, workers
        )

    examples, held = read(train), read(test)
    _like(examples, held)
    labels = tuple((name if space is None else space, n) for n in names)
    whole = Source(name, examples, examples, held, labels, tuple(range(len(names))))
    parts = []
    for i, own in enumerate(index):
        y = examples.targets()[own]
        drawn, rest = draw(
            y, round(share * len(own)), key(run, name, scenario, i, "validation"), stratified=True, spare=1
        )
        parts.append((own[rest], own[drawn]))
    width = len(str(len(index) - 1))
    return batches(
        whole,
        [f"{name}/{scenario}-{i:0{width}d}" for i in range(len(index))],
        [t for t, _ in parts],
        [v for _, v in parts],
    )


def _lists(path: Path, scenario: str, object_level: bool, run: int) -> list[Path] | None:
    """The published file lists of one run, the test's last; None where there are none."""
    folder, count = SCENARIOS[scenario]
    levels = ("",) if object_level else ("_cat", "")
    roots = (path, *(path / n for n in ("batches_filelists", "filelists", "batches_filelists_NICv2")))
    found = next((p for level in levels for r in roots if (p := r / f"{folder}{level}").is_dir()), None)
    if found is None:
        return None
    where = next((p for p in (found / f"run{run}", found / f"Run{run}") if p.is_dir()), None)
    if where is None:
        there = sorted((p.name for p in _folders(found)), key=lambda n: (len(n), n))
        raise ConsilienceError(
            f"`run` should be one that has file lists. Found `run = {run}`, and {there} in {found}."
        )
    train = {
        int(f.name.split("_")[2]): f
        for f in where.glob("train_batch_*_filelist.txt")
        if f.name.split("_")[2].isdigit()
    }
    if sorted(train) != list(range(count)):
        raise ConsilienceError(
            f"{folder} should have file lists of train batches 0 .. {count - 1}. Found {len(train)} in {where}."
        )
    return [*(train[i] for i in range(count)), where / "test_filelist.txt"]


def _image(name: str, file: Path) -> tuple[int, int, str]:
    """Session, object and file name. What the image shows is the object's number: the labels of some lists are renumbered."""
    found = re.fullmatch(r"s(\d+)/o(\d+)/([^/]+)", name)
    if not found or not 1 <= int(found[1]) <= 11 or not 1 <= int(found[2]) <= 50:
        raise ConsilienceError(
            f"images of CORe50 should be named as s1/o1/C_01_01_000.png. Found {name!r} in {file}."
        )
    return int(found[1]), int(found[2]), found[3]


def _by_rule(
    root: Path, scenario: str, run: int
) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, str]], list[Tensor]]:
    """Training and test images, and the batches of NI and NC as they are published, in an order that `run` draws."""
    if scenario not in ("ni", "nc"):
        folder, count = SCENARIOS[scenario]
        raise ConsilienceError(
            f"the {count} batches of {scenario} are drawn, so they should be given as the file lists that CORe50 publishes "
            f"({folder}/run{run}/train_batch_00_filelist.txt and so on, beside the images). Found none in {root.parent}."
        )
    found: dict[int, list[tuple[int, int, str]]] = {}
    for s in range(1, 12):
        for o in range(1, 51):
            here = root / f"s{s}" / f"o{o}"
            files = _images(here) if here.is_dir() else []
            if not files:
                raise ConsilienceError(
                    f"CORe50 should have images of the objects o1 .. o50 in every session. Found none in {here}."
                )
            found.setdefault(s, []).extend((s, o, f.name) for f in files)
    train = [image for s in TAUGHT for image in found[s]]
    units: list[Unit]
    if scenario == "ni":
        units, first = [((s,), None) for s in TAUGHT], 0
    else:
        # the first objects of all categories, then the next ones of five categories in turn
        later = [[5 * c + i for c in range(5 * half, 5 * half + 5)] for i in range(2, 6) for half in (0, 1)]
        units, first = [(None, own) for own in ([5 * c + 1 for c in range(10)], *later)], 1
    turn = torch.randperm(len(units) - first, generator=key(run, "core50", scenario))
    units = [*units[:first], *(units[first + i] for i in turn.tolist())]
    index = chosen(torch.tensor([s for s, _, _ in train]), torch.tensor([o for _, o, _ in train]), units)
    return train, [image for s in HELD for image in found[s]], index


# ---------------------------------------------------------------------------------------------------- CLEAR


def clear(
    path: str | Path,
    protocol: str,
    split: int,
    test: float,
    size: int | tuple[int, int] | None,
    grey: bool,
    in_memory: bool,
    workers: int,
    validation: float,
    name: str | None,
    space: str | None,
    seed: int,
) -> list[Source]:
    """See `consilience.data.clear`."""
    path = _folder(path)
    if protocol not in ("iid", "streaming"):
        raise unknown("protocol", str(protocol), ("iid", "streaming"))
    _whole(0, split=split)
    both, share = dimensions(size, workers), _fraction("validation", validation, zero=True)
    fraction = _fraction("test", test)
    name = name or path.resolve().name
    halves = [
        next((p for n in names if (p := path / n).is_dir()), path)
        for names in (("train", "train_image_only"), ("test",))
    ]
    if halves[0] == path or halves[1] == path:
        if halves[0] != halves[1]:
            raise ConsilienceError(
                f"CLEAR should have both train/ and test/, or neither. Found one in {path}."
            )
        halves = [path]
    classes = _names(halves[0])
    of: list[dict[int, list[Path]]] = [_buckets(half, classes) for half in halves]
    if len({tuple(b) for b in of}) > 1:
        raise ConsilienceError(
            f"test/ should have the buckets of train/. Found {list(of[1])} and {list(of[0])} in {path}."
        )
    files: list[Path] = []
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    given = path / "training_folder" / "testset_ratio_0.3" / f"split_{split}"
    listed = protocol == "iid" and len(halves) == 1 and given.parent.is_dir()
    where = {c: i for i, c in enumerate(classes)}
    for bucket in of[0]:
        start = len(files)
        if listed:
            two = [_listed(path, given / str(bucket) / f"{part}.txt", classes) for part in ("train", "test")]
        else:
            two = [b[bucket] for b in of]
        files += [f for part in two for f in part]
        index = torch.arange(start, len(files))
        y = torch.tensor([where[f.parent.name] for f in files[start:]])
        if len(two) == 2:
            parts[bucket] = (index[: len(two[0])], index[len(two[0]) :])
        else:
            drawn, rest = draw(
                y, round(fraction * len(y)), key(seed, name, "test", bucket), stratified=True, spare=1
            )
            parts[bucket] = (index[rest], index[drawn])
    everything = pictures(
        files, torch.tensor([where[f.parent.name] for f in files]), both, grey, in_memory, workers
    )
    if protocol == "streaming":
        if len(parts) < 2:
            raise ConsilienceError(
                f"streaming should have two buckets or more, one to test on. Found {len(parts)} in {path}."
            )
        parts = {b: (torch.cat(two).sort().values,) * 2 for b, two in parts.items()}
    tests = {b: everything.select(held) for b, (_, held) in parts.items()}
    after = (
        dict(zip(tests, list(tests)[1:], strict=False)) if protocol == "streaming" else {b: b for b in tests}
    )
    labels = tuple((name if space is None else space, c) for c in classes)
    found = []
    for bucket, held_in in after.items():
        train = tests[bucket] if protocol == "streaming" else everything.select(parts[bucket][0])
        y = train.targets()
        drawn, rest = draw(
            y, round(share * len(y)), key(seed, name, "validation", bucket), stratified=True, spare=1
        )
        chosen_out = train.select(drawn)
        train = train.select(rest) if len(drawn) else train
        own = f"{name}/bucket-{bucket}"
        found.append(
            Source(own, train, chosen_out, tests[held_in], labels, tuple(range(len(classes))), task=own)
        )
    return found


def _names(root: Path) -> list[str]:
    """The classes in the order of class_names.txt, or those of the folders."""
    file = root / "class_names.txt"
    if file.is_file():
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    images = root / "labeled_images"
    found = sorted(
        {c.name for b in (_folders(images) if images.is_dir() else []) if b.name != "0" for c in _folders(b)}
    )
    if not found:
        raise ConsilienceError(f"CLEAR should have labeled_images/<bucket>/<class>/. Found none in {root}.")
    return found


def _buckets(root: Path, classes: Sequence[str]) -> dict[int, list[Path]]:
    """The images of every bucket but 0, which has no labels, class by class."""
    where = root / "labeled_images"
    numbers = (
        sorted(int(p.name) for p in _folders(where) if p.name.isdigit() and p.name != "0")
        if where.is_dir()
        else []
    )
    if not numbers:
        raise ConsilienceError(
            f"CLEAR should have labeled_images/<bucket>/<class>/. Found no bucket in {root}."
        )
    found = {}
    for b in numbers:
        here = where / str(b)
        other = [c.name for c in _folders(here) if c.name not in classes]
        if other:
            raise ConsilienceError(
                f"class folders should be those of class_names.txt or of all buckets. Found {other[0]!r} in {here}."
            )
        found[b] = [f for c in classes if (here / c).is_dir() for f in _images(here / c)]
        if not found[b]:
            raise ConsilienceError(f"a bucket should have images. Found none in {here}.")
    return found


def _listed(path: Path, file: Path, classes: Sequence[str]) -> list[Path]:
    """The images of a file list, whose numbers must be those of their class folders."""
    found = []
    for name, number in _lines(file):
        image = path / name
        if number >= len(classes) or image.parent.name != classes[number]:
            raise ConsilienceError(
                f"the number of an image should be that of its class. Found {name} {number} in {file}."
            )
        found.append(image)
    return found
