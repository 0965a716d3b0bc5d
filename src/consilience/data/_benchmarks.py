"""Benchmarks that are folders of images with a published order: CORe50 and CLEAR."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.core.checks import fraction, whole_number
from consilience.core.errors import ConsilienceError, unknown
from consilience.core.params import key
from consilience.core.source import Examples, Label, Source
from consilience.data._scenarios import Unit, batches, examples_of
from consilience.data._shares import draw
from consilience.data._sources import (
    Options,
    Reading,
    image_folder,
    is_image,
    pictures,
    same_size,
    subfolders,
)


def _images(path: Path) -> list[Path]:
    """Return the images in a folder, sorted."""
    return sorted(file for file in path.iterdir() if is_image(file))


def _lines(file: Path) -> list[tuple[str, int]]:
    """Return the lines of a file list: a path and a number each."""
    # Reasons such as "permission denied" go into our own error, with the path.
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConsilienceError(f"cannot read the file list {file}: {reason}.") from error

    lines = []
    for i, line in enumerate(text.splitlines(), 1):
        # From the right: paths may have spaces.
        name, _, number = line.strip().rpartition(" ")
        if line.strip():
            if not name or not number.isdigit():
                raise ConsilienceError(
                    f"lines of a file list must be a path and a number, got {line!r} in line {i} of {file}."
                )
            lines.append((name, int(number)))
    if not lines:
        raise ConsilienceError(f"a file list must name images, got none in {file}.")
    return lines


def _labels(options: Options, names: Sequence[str]) -> tuple[Label, ...]:
    """Return the labels of these classes."""
    return tuple((options.label_space, name) for name in names)


# CORe50. Its test is the same for all scenarios; only the order and grouping of training images differ.


# In the order of the objects: o1 .. o5 are plug adapters.
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

# Sessions and objects are numbered from 1, as in the names of their folders.
SESSIONS = range(1, 12)
OBJECTS = range(1, 51)
"""Five of each category, in the order of the categories."""
TEST_SESSIONS = (3, 7, 10)
TRAIN_SESSIONS = tuple(session for session in SESSIONS if session not in TEST_SESSIONS)


class FileLists(NamedTuple):
    """The published file lists of a scenario."""

    folder: str
    batches: int


SCENARIOS = {
    "ni": FileLists("NI_inc", 8),
    "nc": FileLists("NC_inc", 9),
    "nic": FileLists("NIC_inc", 79),
    "nicv2_79": FileLists("NIC_v2_79", 79),
    "nicv2_196": FileLists("NIC_v2_196", 196),
    "nicv2_391": FileLists("NIC_v2_391", 391),
}


class Image(NamedTuple):
    """One image of CORe50."""

    session: int
    object: int
    file: str


class Batches(NamedTuple):
    """The images of a scenario, and the indices of the training images of each batch."""

    train: list[Image]
    test: list[Image]
    batches: list[Tensor]


def core50(
    path: str | Path, scenario: str, object_level: bool, run: int, reading: Reading, options: Options
) -> list[Source]:
    """See `consilience.data.core50`."""
    path = image_folder(path)
    if scenario not in SCENARIOS:
        raise unknown("scenario", str(scenario), SCENARIOS)
    whole_number(0, run=run)
    reading = reading.checked()
    share = fraction("validation", options.validation, zero=True)
    root = _sessions_folder(path)
    files = _published_lists(path if path != root else path.parent, scenario, object_level, run)
    images = _by_rule(root, scenario, run) if files is None else _by_lists(files)
    names = [f"{name}{i}" for name in CATEGORIES for i in range(1, 6)] if object_level else list(CATEGORIES)

    def read(frames: list[Image]) -> Examples:
        objects_per_class = 1 if object_level else 5
        y = torch.tensor([(frame.object - 1) // objects_per_class for frame in frames])
        paths = [root / f"s{frame.session}" / f"o{frame.object}" / frame.file for frame in frames]
        return pictures(paths, y, reading)

    train, test = read(images.train), read(images.test)
    same_size(train, test)

    # Each batch is split by a draw of its own, and then both parts are taken from the same examples.
    name = options.name
    kept, held = [], []
    for i, own in enumerate(images.batches):
        generator = key(run, name, scenario, i, "validation")
        drawn, rest = draw(train.targets()[own], round(share * len(own)), generator, stratified=True, spare=1)
        kept.append(own[rest])
        held.append(own[drawn])

    # Validation examples are chosen by index from the training images, hence `train` twice.
    together = Source(name, train, train, test, _labels(options, names), tuple(range(len(names))))
    width = len(str(len(images.batches) - 1))
    return batches(
        together, [f"{name}/{scenario}-{i:0{width}d}" for i in range(len(images.batches))], kept, held
    )


def _sessions_folder(path: Path) -> Path:
    """Return the folder with the sessions s1 .. s11: this one, or one in it."""
    candidates = (path, *(path / f"core50_{side}x{side}" for side in (128, 32, 350)))
    root = next((folder for folder in candidates if (folder / "s1").is_dir()), None)
    if root is None:
        raise ConsilienceError(
            f"CORe50 must have the sessions s1 .. s11, in core50_128x128 or directly, got no s1 in {path}."
        )
    missing = [f"s{session}" for session in SESSIONS if not (root / f"s{session}").is_dir()]
    if missing:
        raise ConsilienceError(
            f"CORe50 must have the sessions s1 .. s11, got no {', '.join(missing)} in {root}."
        )
    return root


def _published_lists(path: Path, scenario: str, object_level: bool, run: int) -> list[Path] | None:
    """Return the published file lists of one run, the test's last; None if there are none."""
    folder, count = SCENARIOS[scenario]
    # Lists for categories have the same batches, with other numbers; those for objects serve as well.
    levels = ("",) if object_level else ("_cat", "")
    archives = ("batches_filelists", "filelists", "batches_filelists_NICv2")
    roots = (path, *(path / name for name in archives))
    candidates = (root / f"{folder}{level}" for level in levels for root in roots)
    found = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if found is None:
        return None

    # The archives differ in the case of the name.
    run_folder = next((p for p in (found / f"run{run}", found / f"Run{run}") if p.is_dir()), None)
    if run_folder is None:
        runs = sorted((p.name for p in subfolders(found)), key=lambda name: (len(name), name))
        raise ConsilienceError(f"`run` must be one that has file lists, got {run}; {found} has {runs}.")

    # By number, because names sort "10" before "2" where zeros are missing.
    train = {
        int(file.name.split("_")[2]): file
        for file in run_folder.glob("train_batch_*_filelist.txt")
        if file.name.split("_")[2].isdigit()
    }
    if sorted(train) != list(range(count)):
        raise ConsilienceError(
            f"{folder} must have file lists of train batches 0 .. {count - 1}, "
            f"got {len(train)} in {run_folder}."
        )
    return [*(train[i] for i in range(count)), run_folder / "test_filelist.txt"]


def _by_lists(files: Sequence[Path]) -> Batches:
    """Return the batches of these file lists; the last list is the test's."""
    *taught, test = [[_image(name, file) for name, _ in _lines(file)] for file in files]
    train = [frame for batch in taught for frame in batch]
    index = torch.arange(len(train)).split([len(batch) for batch in taught])
    return Batches(train, test, list(index))


def _image(name: str, file: Path) -> Image:
    """Return the image of a line of a file list.

    Its object is taken from the path: the numbers in some lists are renumbered.
    """
    match = re.fullmatch(r"s(\d+)/o(\d+)/([^/]+)", name)
    # Checked here, or a list of another benchmark would fail much later, when the first image is read.
    if not match or int(match[1]) not in SESSIONS or int(match[2]) not in OBJECTS:
        raise ConsilienceError(
            f"images of CORe50 must be named as s1/o1/C_01_01_000.png, got {name!r} in {file}."
        )
    return Image(int(match[1]), int(match[2]), match[3])


def _by_rule(root: Path, scenario: str, run: int) -> Batches:
    """Make the batches of NI or NC by the published rule, in an order drawn from `run`."""
    # The batches of NIC were drawn at random by the authors: no rule gives them again.
    if scenario not in ("ni", "nc"):
        folder, count = SCENARIOS[scenario]
        raise ConsilienceError(
            f"the {count} batches of {scenario} are random, and need the file lists that CORe50 publishes "
            f"({folder}/run{run}/train_batch_00_filelist.txt and so on, next to the images), "
            f"got none in {root.parent}."
        )

    frames: dict[int, list[Image]] = {}
    for session in SESSIONS:
        for number in OBJECTS:
            folder_of_object = root / f"s{session}" / f"o{number}"
            files = _images(folder_of_object) if folder_of_object.is_dir() else []
            if not files:
                raise ConsilienceError(
                    "CORe50 must have images of the objects o1 .. o50 in every session, "
                    f"got none in {folder_of_object}."
                )
            frames.setdefault(session, []).extend(Image(session, number, file.name) for file in files)
    train = [frame for session in TRAIN_SESSIONS for frame in frames[session]]
    test = [frame for session in TEST_SESSIONS for frame in frames[session]]

    if scenario == "ni":
        units, first = [Unit((session,), None) for session in TRAIN_SESSIONS], 0
    else:
        # The first objects of all categories, then the next object of five categories in turn.
        later = [[5 * c + i for c in range(5 * half, 5 * half + 5)] for i in range(2, 6) for half in (0, 1)]
        units, first = [Unit(None, own) for own in ([5 * c + 1 for c in range(10)], *later)], 1

    # The first batch of NC is the same in every run.
    drawn = torch.randperm(len(units) - first, generator=key(run, "core50", scenario))
    units = [*units[:first], *(units[first + i] for i in drawn.tolist())]
    sessions = torch.tensor([frame.session for frame in train])
    objects = torch.tensor([frame.object for frame in train])
    return Batches(train, test, examples_of(units, sessions, objects))


# CLEAR. Its releases differ in where test images are.


class Bucket(NamedTuple):
    """Indices of the training and the test images of a bucket of time."""

    train: Tensor
    test: Tensor


class Photographs(NamedTuple):
    """All images of CLEAR, and which of them are whose."""

    classes: list[str]
    files: list[Path]
    buckets: dict[int, Bucket]


def clear(path: str | Path, protocol: str, split: int, reading: Reading, options: Options) -> list[Source]:
    """See `consilience.data.clear`."""
    path = image_folder(path)
    if protocol not in ("iid", "streaming"):
        raise unknown("protocol", str(protocol), ("iid", "streaming"))
    whole_number(0, split=split)
    reading = reading.checked()
    share = fraction("validation", options.validation, zero=True)
    fraction("test", options.test)

    found = _photographs(path, split if protocol == "iid" else None, options)
    y = _classes_of(found.files, found.classes)
    everything = pictures(found.files, y, reading)
    if protocol == "iid":
        trains: dict[int, Examples] = {
            bucket: everything.select(own.train) for bucket, own in found.buckets.items()
        }
        tests: dict[int, Examples] = {
            bucket: everything.select(own.test) for bucket, own in found.buckets.items()
        }
    else:
        trains, tests = _streaming(everything, found.buckets, path)

    name = options.name
    labels = _labels(options, found.classes)
    sources = []
    for bucket, test in tests.items():
        train = trains[bucket]
        generator = key(options.seed, name, "validation", bucket)
        drawn, rest = draw(train.targets(), round(share * len(train)), generator, stratified=True, spare=1)

        # In streaming, a bucket without validation examples stays the same object as the test before it.
        validation = train.select(drawn)
        kept = train.select(rest) if len(drawn) else train
        own_name = f"{name}/bucket-{bucket}"
        classes = tuple(range(len(labels)))
        sources.append(Source(own_name, kept, validation, test, labels, classes, task=own_name))
    return sources


def _streaming(
    everything: Examples, buckets: dict[int, Bucket], path: Path
) -> tuple[dict[int, Examples], dict[int, Examples]]:
    """Return the training and the test examples of each bucket: all of it, and all of the next."""
    if len(buckets) < 2:
        raise ConsilienceError(
            f"streaming needs two buckets or more, the last to test on, got {len(buckets)} in {path}."
        )
    wholes = {
        bucket: everything.select(torch.cat([own.train, own.test]).sort().values)
        for bucket, own in buckets.items()
    }
    # The same object as test and, one bucket later, as training examples: `embed` computes its features once.
    following = list(wholes)[1:]
    return wholes, {bucket: wholes[after] for bucket, after in zip(wholes, following, strict=False)}


def _photographs(path: Path, split: int | None, options: Options) -> Photographs:
    """Find the images of CLEAR in a folder; `split` is a published split, or None to ignore these."""
    halves = _halves(path)
    classes = _class_names(halves[0])
    by_half = [_buckets(half, classes) for half in halves]
    if len({tuple(buckets) for buckets in by_half}) > 1:
        raise ConsilienceError(
            f"test/ must have the buckets of train/, got {list(by_half[1])} and {list(by_half[0])} in {path}."
        )

    # The first release has no test/, but lists of training and test images for each of five splits.
    lists = path / "training_folder" / "testset_ratio_0.3" / f"split_{split}"
    listed = split is not None and len(halves) == 1 and lists.parent.is_dir()
    files: list[Path] = []
    parts: dict[int, Bucket] = {}
    for bucket in by_half[0]:
        if listed:
            groups = [
                _listed(path, lists / str(bucket) / f"{part}.txt", classes) for part in ("train", "test")
            ]
        else:
            groups = [buckets[bucket] for buckets in by_half]

        start = len(files)
        files += [file for group in groups for file in group]
        index = torch.arange(start, len(files))
        if len(groups) == 2:
            parts[bucket] = Bucket(index[: len(groups[0])], index[len(groups[0]) :])
        else:
            y = _classes_of(files[start:], classes)
            generator = key(options.seed, options.name, "test", bucket)
            drawn, rest = draw(y, round(options.test * len(y)), generator, stratified=True, spare=1)
            parts[bucket] = Bucket(index[rest], index[drawn])
    return Photographs(classes, files, parts)


def _classes_of(files: Sequence[Path], classes: Sequence[str]) -> Tensor:
    """Return the classes [N] of images, by the names of their folders."""
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[file.parent.name] for file in files])


def _halves(path: Path) -> list[Path]:
    """Return the folders of training and of test images, or one folder of both."""
    train = next((path / name for name in ("train", "train_image_only") if (path / name).is_dir()), None)
    test = path / "test" if (path / "test").is_dir() else None
    if (train is None) != (test is None):
        raise ConsilienceError(f"CLEAR must have both train/ and test/, or neither, got one in {path}.")
    return [path] if train is None or test is None else [train, test]


def _class_names(root: Path) -> list[str]:
    """Return the classes in the order of class_names.txt, or those of the folders."""
    file = root / "class_names.txt"
    if file.is_file():
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    images = root / "labeled_images"
    # Bucket 0 is unlabelled: its subfolders are no classes.
    buckets = [folder for folder in subfolders(images) if folder.name != "0"] if images.is_dir() else []
    names = sorted({folder.name for bucket in buckets for folder in subfolders(bucket)})
    if not names:
        raise ConsilienceError(f"CLEAR must have labeled_images/<bucket>/<class>/, got none in {root}.")
    return names


def _buckets(root: Path, classes: Sequence[str]) -> dict[int, list[Path]]:
    """Return the images of every bucket but 0, which has no labels, class by class."""
    images = root / "labeled_images"
    folders = subfolders(images) if images.is_dir() else []
    numbers = sorted(int(folder.name) for folder in folders if folder.name.isdigit() and folder.name != "0")
    if not numbers:
        raise ConsilienceError(f"CLEAR must have labeled_images/<bucket>/<class>/, got no bucket in {root}.")

    buckets = {}
    for number in numbers:
        bucket = images / str(number)
        # A class that is in one bucket only would make the tasks differ in their classes.
        other = [folder.name for folder in subfolders(bucket) if folder.name not in classes]
        if other:
            raise ConsilienceError(
                "class folders must be those of class_names.txt or of all buckets, "
                f"got {other[0]!r} in {bucket}."
            )
        buckets[number] = [
            file for name in classes if (bucket / name).is_dir() for file in _images(bucket / name)
        ]
        if not buckets[number]:
            raise ConsilienceError(f"a bucket must have images, got none in {bucket}.")
    return buckets


def _listed(path: Path, file: Path, classes: Sequence[str]) -> list[Path]:
    """Return the images of a file list; their numbers must be those of their class folders."""
    images = []
    for name, number in _lines(file):
        # A list for another set of classes may name existing files, with other numbers.
        image = path / name
        if number >= len(classes) or image.parent.name != classes[number]:
            raise ConsilienceError(
                f"the number of an image must be that of its class, got {name} {number} in {file}."
            )
        images.append(image)
    return images
