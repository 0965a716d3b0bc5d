"""Data: functions that return a Source, and splits of one Source into several. Signatures import no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from consilience.core.model import Model
    from consilience.core.source import Source

Kind = Literal["class", "value"]

__all__ = [
    "arrays",
    "blurry",
    "breast_cancer",
    "clear",
    "core50",
    "diabetes",
    "digits",
    "dirichlet",
    "embed",
    "folder",
    "iid",
    "label_sets",
    "natural",
    "new_instances",
    "new_instances_and_classes",
    "npz",
    "permute",
    "quantity_skew",
    "rotate",
    "shakespeare",
    "shards",
    "split_classes",
    "stream",
    "streams",
    "wine",
]


# ---------------------------------------------------------------------------------------------------- sources


def digits(image: bool = False, seed: int = 0) -> Source:
    """scikit-learn's 1797 handwritten digits: x [N, 64] in [0, 1], 10 classes; a fifth of them, stratified, is the test.

    Args:
        image: x is [N, 1, 8, 8].
        seed: of the test and validation splits.

    >>> source = digits()
    >>> len(source.train), len(source.validation), len(source.test), source.labels[3]
    (1294, 144, 359, ('digits', '3'))
    """
    from consilience.data._sources import table

    return table("digits", seed, image)


def breast_cancer(seed: int = 0) -> Source:
    """scikit-learn's 569 tumours: x [N, 30] standardised by the training statistics, 2 classes.

    >>> breast_cancer().labels
    (('breast_cancer', 'malignant'), ('breast_cancer', 'benign'))
    """
    from consilience.data._sources import table

    return table("breast_cancer", seed)


def wine(seed: int = 0) -> Source:
    """scikit-learn's 178 wines: x [N, 13] standardised by the training statistics, 3 classes.

    >>> wine().train.whole()[0].shape
    torch.Size([128, 13])
    """
    from consilience.data._sources import table

    return table("wine", seed)


def diabetes(seed: int = 0) -> Source:
    """scikit-learn's 442 patients, a regression: x [N, 10] and y [N, 1] standardised by the training statistics.

    >>> source = diabetes()
    >>> source.kind, source.train.targets().shape
    ('value', torch.Size([319, 1]))
    """
    from consilience.data._sources import table

    return table("diabetes", seed)


def arrays(
    x: Any,
    y: Any = None,
    test: Any = 0.2,
    classes: Sequence[str] | None = None,
    name: str = "data",
    kind: Kind = "class",
    space: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> Source:
    """A source from numpy arrays or torch tensors.

    Args:
        x: inputs [N, ...]. uint8 is read as images and divided by 255; other integers stay whole numbers (token ids).
            A map-style dataset with `y=None` is a `stream`.
        y: class numbers [N], or values [N] or [N, outputs].
        test: (x, y) to test on, or the fraction of the examples that is set apart, stratified.
        classes: the names of targets 0, 1, ... (of the outputs, for values); all of them are this source's classes. None:
            those found, named by number. Declare them for clients that may lack some.
        name: of the source.
        kind: "class" or "value".
        space: the label space; sources share classes only where it is the same. None is `name`.
        validation: the fraction of the training examples that is set apart to choose by.
        seed: of the splits.

    Raises:
        ConsilienceError: lengths differ, nothing there, NaN or infinity, targets outside the classes or not whole, wrong
            dimensions, test examples of another shape.

    >>> import numpy as np
    >>> source = arrays(np.eye(20, dtype="float32"), np.arange(20) % 2, classes=["even", "odd"], name="parity")
    >>> len(source.train), len(source.validation), len(source.test), source.labels[1]
    (14, 2, 4, ('parity', 'odd'))
    """
    from consilience.data._sources import from_arrays

    return from_arrays(x, y, test, classes, name, kind, space, validation, seed)


def stream(
    dataset: Any,
    test: Any = 0.2,
    classes: Sequence[str] | None = None,
    workers: int = 0,
    name: str = "stream",
    kind: Kind = "class",
    space: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> Source:
    """A source from a map-style dataset of (x, y) that is too large for memory; every example is read when it is needed.

    Targets are taken once, from the attribute `targets` or `labels` where the dataset has one, else by reading it all.

    Args:
        dataset: has `len(dataset)` and `dataset[i] -> (x, y)`; x is a tensor, an array or an image.
        test: another such dataset, or the fraction of this one that is set apart, stratified.
        classes, name, kind, space, validation, seed: as in `arrays`.
        workers: processes that read; 0 reads in this one.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> source = stream(TensorDataset(torch.rand(20, 3), torch.arange(20) % 2))
    >>> len(source.train), next(source.train.chunks(4))[0].shape
    (14, torch.Size([4, 3]))
    """
    from consilience.data._sources import from_dataset

    return from_dataset(dataset, test, classes, workers, name, kind, space, validation, seed)


def folder(
    path: str | Path,
    size: int | tuple[int, int] | None = None,
    grey: bool = False,
    in_memory: bool = False,
    workers: int = 0,
    test: float = 0.2,
    name: str | None = None,
    space: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
    unreadable: Literal["refuse", "skip"] = "refuse",
) -> Source:
    """A source from a folder of images with one subfolder for each class: x [N, 3, H, W] in [0, 1].

    The subfolders may also lie in `train/` and `test/`, and optionally `val/`, `valid/` or `validation/`. Files are read
    when needed; needs pillow (`consilience[vision]`).

    Args:
        path: of the folder.
        size: height and width (one number: both) that images are resized to; None: they must all be alike.
        grey: one channel, x [N, 1, H, W].
        in_memory: read all at once.
        workers: processes that read; 0 reads in this one.
        test: the fraction of the training examples that is set apart where there is no `test/`.
        name: of the source; None: the folder's.
        space, validation, seed: as in `arrays`.
        unreadable: "refuse": an error names the first image that cannot be read, when it is read; "skip": all are read once at the
            start, and those that cannot be are left out, with a warning that says how many and names the first.

    >>> folder("no/such/place")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `path` should be a folder of images. Found none at no/such/place.
    """
    from consilience.data._sources import from_folder

    return from_folder(path, size, grey, in_memory, workers, test, name, space, validation, seed, unreadable)


def npz(
    name: str | Path,
    flat: bool = False,
    limit: int | None = None,
    images: str = "images",
    space: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> Source:
    """A source from an .npz file with keys train_images, train_labels, test_images, test_labels: x [N, C, H, W] in [0, 1].

    Images are uint8 [N, H, W] or [N, H, W, C], or JPEG files end to end (train_jpeg, train_offsets; needs pillow). Class
    names are in class_names where the file has them.

    Args:
        name: a file, or the name of one in the folder that the environment variable CONSILIENCE_DATA names.
        flat: x is [N, C*H*W].
        limit: how many training examples (with validation) to take, a stratified draw; None is all.
        images: which images, where the file has several kinds (`images28` for small omniglot).
        space, validation, seed: as in `arrays`.

    >>> npz("/tmp/no_such.npz")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `name` should be a readable .npz file. Found none at /tmp/no_such.npz.
    """
    from consilience.data._sources import from_npz

    return from_npz(name, flat, limit, images, space, validation, seed)


def shakespeare(
    roles: int | Sequence[str] | None = None,
    window: int = 80,
    stride: int = 10,
    limit: int | None = None,
    validation: float = 0.1,
    path: str | Path | None = None,
) -> list[Source]:
    """Tiny Shakespeare by speaking role, 100 clients by nature: from `window` characters x [T] (whole numbers), y is the next one.

    The classes are the characters of all roles, in the order of their codes, whichever roles are taken. Each role is tested on the
    last 20% of its text and chooses by the last tenth of the rest; no window crosses a cut. Models: `models.char_lstm`,
    `models.char_transformer`.

    Paper: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017 (the task).

    Args:
        roles: how many (the first in the file), or their names; None is all.
        window: characters that are seen, T.
        stride: characters from one window to the next; 1 predicts every character of the text.
        limit: training windows of each role at most, the first; None is all.
        validation: the fraction of the training text, at its end, that is set apart to choose by.
        path: of the file, {role: {"train": text, "test": text}} as xz-compressed JSON; None: shakespeare_roles.json.xz in the
            folder that the environment variable CONSILIENCE_DATA names.

    Raises:
        ConsilienceError: no such file or role, a file of another form, text shorter than a window.

    >>> shakespeare(path="/tmp/no_such.json.xz")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `path` should be a readable .json.xz file. Found none at /tmp/no_such.json.xz.
    """
    from consilience.data import _text

    return _text.shakespeare(roles, window, stride, limit, validation, path)


# ---------------------------------------------------------------------------------------------------- benchmarks


def core50(
    path: str | Path,
    scenario: Literal["ni", "nc", "nic", "nicv2_79", "nicv2_196", "nicv2_391"] = "ni",
    object_level: bool = True,
    run: int = 0,
    size: int | tuple[int, int] | None = None,
    grey: bool = False,
    in_memory: bool = False,
    workers: int = 0,
    validation: float = 0.0,
    name: str = "core50",
    space: str | None = None,
) -> list[Source]:
    """CORe50, 50 objects filmed in 11 sessions: a source for each training batch; all have the very same `test`, sessions 3, 7, 10.

    Batches are exactly those of the published file lists (batches_filelists.zip, batches_filelists_NICv2.zip) where these lie
    beside the images. Without them NI (8 sessions) and NC (10 objects, then 8 times 5) are built by the published rule, in an
    order drawn from `run`, which is none of the ten published ones; NIC is refused. Needs pillow (`consilience[vision]`).

    Paper: Lomonaco & Maltoni, "CORe50: a New Dataset and Benchmark for Continuous Object Recognition", CoRL 2017; NICv2:
    Lomonaco, Maltoni & Pellegrini, "Fine-Grained Continual Learning", 2019.

    Args:
        path: of the folder that holds core50_128x128/ (or _32x32, _350x350) or the sessions s1 .. s11 themselves, s1/o1/*.png.
        scenario: "ni": new instances, a session each; "nc": new classes; "nic": both, in 79 batches; "nicv2_79", "nicv2_196",
            "nicv2_391": both, finer.
        object_level: 50 classes, the objects; else the 10 categories. Taken from the folder o1 .. o50: the numbers in the lists
            of NC are renumbered in every run.
        run: which of the published runs (orders), 0 to 9.
        size, grey, in_memory, workers: as in `folder`.
        validation: the fraction of each batch that is set apart to choose by; the publication has none.
        name: of the sources, `core50/ni-0` and so on.
        space: as in `arrays`.

    Raises:
        ConsilienceError: no such session, object, run or scenario; no file lists for NIC; a list that is not one.

    >>> core50("no/such/place")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `path` should be a folder of images. Found none at no/such/place.
    """
    from consilience.data import _benchmarks

    return _benchmarks.core50(
        path, scenario, object_level, run, size, grey, in_memory, workers, validation, name, space
    )


def clear(
    path: str | Path,
    protocol: Literal["iid", "streaming"] = "iid",
    split: int = 0,
    test: float = 0.3,
    size: int | tuple[int, int] | None = 224,
    grey: bool = False,
    in_memory: bool = False,
    workers: int = 0,
    validation: float = 0.0,
    name: str | None = None,
    space: str | None = None,
    seed: int = 0,
) -> list[Source]:
    """CLEAR-10 or CLEAR-100, photographs of 2004 to 2014 in ten buckets of time: a source for each, in order, the same classes in all.

    The folder holds labeled_images/<bucket>/<class>/*.jpg, in train/ (or train_image_only/) and test/ as in the released archives,
    or once, as in the first release. Bucket 0 has no labels and is left out. Needs pillow (`consilience[vision]`).

    Paper: Lin et al., "The CLEAR Benchmark: Continual LEArning on Real-World Imagery", NeurIPS 2021 (datasets and benchmarks).

    Args:
        path: of the folder. Classes are in the order of class_names.txt where there is one.
        protocol: "iid": a bucket is tested on images of its own time; "streaming": all of a bucket is learned and all of the next
            is its test, so that the last bucket is only tested on.
        split: which of the published splits (training_folder/testset_ratio_0.3/split_0 .. 4) is used where they are there.
        test: the fraction of a bucket that is set apart where there is neither test/ nor a published split.
        size, grey, in_memory, workers: as in `folder`; the images differ in size.
        validation: the fraction of each bucket's training images that is set apart to choose by; the publication has none.
        name: of the sources, `<name>/bucket-1` and so on; None: the folder's.
        space, seed: as in `arrays`.

    Raises:
        ConsilienceError: no buckets, other classes or buckets in test than in train, a list that contradicts the folders.

    >>> clear("no/such/place")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `path` should be a folder of images. Found none at no/such/place.
    """
    from consilience.data import _benchmarks

    return _benchmarks.clear(
        path, protocol, split, test, size, grey, in_memory, workers, validation, name, space, seed
    )


# ---------------------------------------------------------------------------------------------------- features


def embed(
    sources: Source | Sequence[Source],
    model: Model,
    cache: str | Path | None = None,
    batch: int = 64,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The sources with the features psi [N, d] of a frozen backbone in the place of their images; all else is the same.

    Every image passes the backbone once; parts that several sources share stay shared. `models.backbone` takes its own features as they
    are, so that the very model goes on with them. Streams are read in chunks. With `cache`, features are kept in the folder
    <cache>/<hash of the backbone>, as safetensors files of at most 8192 images, by the hash of each image (type, shape, bytes, as
    its source gives it): in another source, order or split they are found again, and read as they lie on disk. What was made stays there
    when a run is interrupted; of a process that is killed, all but the last 8192 images. A file that is cut short or not ours is named in a warning and made anew; one whose features are not
    those that were written is refused when the first of them are used.

    Args:
        sources: one, or several.
        model: `models.backbone`, another frozen model without head, or heads on one (`models.multi_head`).
        cache: a folder; None keeps nothing.
        batch: images that pass the backbone together.
        device: where the backbone is evaluated; features come back to the CPU.
        progress: told images done and in all.

    Returns:
        A source for a source, a list for several.

    Raises:
        ConsilienceError: the backbone is not frozen, or another one for each seed; features that are not finite; an image that cannot be
            read (named); a folder that cannot be written; kept features that were changed on disk (the file is named).

    >>> from consilience import models
    >>> psi = embed(digits(image=True), models.backbone(models.conv(10, 1, 8, 4)))
    >>> psi.train.whole()[0].shape, psi.labels == digits().labels
    (torch.Size([1294, 32]), True)
    """
    from consilience.core.source import Source
    from consilience.data import _embed

    several = [sources] if isinstance(sources, Source) else list(sources)
    found = _embed.embed(several, model, cache, batch, device, progress)
    return found[0] if isinstance(sources, Source) else found


# ---------------------------------------------------------------------------------------------------- splits


def split_classes(
    source: Source, n: int, order: Sequence[int | str] | None = None, seed: int | None = None
) -> list[Source]:
    """n sources with the classes of one dealt in order, each a task of its own; sizes differ by at most one class.

    Args:
        source: of classes.
        n: how many parts, at most one for each class.
        order: the classes, by number or by name; None: as declared.
        seed: of a random order instead.

    >>> [s.name for s in split_classes(digits(), 5)]
    ['digits/0-1', 'digits/2-3', 'digits/4-5', 'digits/6-7', 'digits/8-9']
    """
    from consilience.data import _splits

    return _splits.split_classes(source, n, order, seed)


def new_instances(
    source: Source, groups: Any, order: Sequence[int] | None = None, seed: int | None = None
) -> list[Source]:
    """A source, a task, for each group of instances (a session, an object, a writer): known classes in new conditions (NI).

    All have the very same `test`, the source's own, and those classes that their training examples have.

    Paper: Lomonaco & Maltoni, "CORe50: a New Dataset and Benchmark for Continuous Object Recognition", CoRL 2017.

    Args:
        source: whose training examples come in groups; make it with `validation=0` to keep their order.
        groups: a whole number for each training example, and after them for each validation example [N + M].
        order: the groups; None: by number.
        seed: of a random order instead.

    >>> source = arrays([[float(i)] for i in range(8)], [0, 1] * 4, test=([[0.0]], [0]), validation=0, name="films")
    >>> [(s.name, s.train.whole()[0].flatten().tolist()) for s in new_instances(source, [0, 0, 0, 0, 1, 1, 1, 1])]
    [('films/group-0', [0.0, 1.0, 2.0, 3.0]), ('films/group-1', [4.0, 5.0, 6.0, 7.0])]
    """
    from consilience.data import _scenarios

    return _scenarios.new_instances(source, groups, order, seed)


def new_instances_and_classes(
    source: Source, groups: Any, first: int | None = None, each: int = 1, seed: int = 0
) -> list[Source]:
    """Sources that bring known classes in new conditions or new classes, in random order (NIC); new classes alone: `split_classes`.

    The first has the first `first` classes in the first group of instances; each further one has `each` classes in one group.
    So CORe50's 50 objects in 8 sessions, with `first=10`, come in 79, 196 or 391 batches for `each` 5, 2 or 1. All have the very
    same `test`, the source's own, and those classes that their training examples have.

    Paper: Lomonaco & Maltoni, "CORe50: a New Dataset and Benchmark for Continuous Object Recognition", CoRL 2017.

    Args:
        source: of classes, whose training examples come in groups; make it with `validation=0` to keep their order.
        groups: as in `new_instances`.
        first: classes in the first source; None: `each`.
        each: classes in each further one.
        seed: of the order.

    >>> source = arrays([[float(i)] for i in range(8)], [0, 1] * 4, test=([[0.0]], [0]), validation=0, name="films")
    >>> [(s.classes, len(s.train)) for s in new_instances_and_classes(source, [0, 0, 0, 0, 1, 1, 1, 1])]
    [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]
    """
    from consilience.data import _scenarios

    return _scenarios.new_instances_and_classes(source, groups, first, each, seed)


def blurry(
    sources: Sequence[Source], share: float = 0.1, to: Literal["all", "neighbours"] = "all", seed: int = 0
) -> list[Source]:
    """The sources with blurry boundaries: of each one's training and validation examples a share is found in the others.

    Every example is in exactly one source, drawn with equal shares of its classes, and at least one of each class stays.
    Sources of equal size stay so. `test`, name and task stay; `classes` are its own and those that arrived. blurry-M is
    `share=M/100` (blurry boundaries: Aljundi et al. 2019).

    Paper: Bang et al., "Rainbow Memory: Continual Learning with a Memory of Diverse Samples", CVPR 2021.

    Args:
        sources: two or more, with the same labels.
        share: that leaves each source, in [0, 1); 0 gives the sources as they are.
        to: "all": dealt evenly to all others; "neighbours": half to the one before and half to the one after (so the first and
            the last give half as much), which makes changes gradual.
        seed: of the draws.

    >>> [(s.name, len(s.train), s.classes) for s in blurry(split_classes(wine(), 3))][0]
    ('wine/class_0', 42, (0, 1, 2))
    """
    from consilience.data import _scenarios

    return _scenarios.blurry(sources, share, to, seed)


def permute(source: Source, n: int, seed: int = 0) -> list[Source]:
    """n sources, each a task with its own fixed permutation of all entries of an input; the first is the identity.

    Every source is a copy of the data (a `stream` is not).

    >>> [s.name for s in permute(digits(), 2)]
    ['digits/permuted-0', 'digits/permuted-1']
    """
    from consilience.data import _splits

    return _splits.permute(source, n, seed)


def rotate(source: Source, angles: int | Sequence[float], side: int | None = None) -> list[Source]:
    """One source, a task, for each angle: images turned counter-clockwise about their centre, zeros outside.

    Bilinear (`grid_sample`), but exact for quarter turns of square images.

    Args:
        source: of images [N, C, H, W].
        angles: in degrees; a whole number n means 0, 360/n, 2*360/n, ...
        side: flat inputs [N, C*side*side] are taken as square images of this side.

    >>> [s.name for s in rotate(digits(), [0, 45, 90], side=8)]
    ['digits/rotated-0', 'digits/rotated-45', 'digits/rotated-90']
    """
    from consilience.data import _splits

    return _splits.rotate(source, angles, side)


def dirichlet(
    source: Source, clients: int, alpha: float, seed: int = 0, local_test: bool = False, least: int = 2
) -> list[Source]:
    """Clients that differ in their classes: for each class c, p_c ~ Dirichlet(alpha 1_K) is the share of each of K clients.

    This is the label skew of Yurochkin et al. 2019 and Li et al. 2022 (NIID-Bench), so sizes differ as well. The whole draw is
    repeated, up to 100 times, until every client has `least` training examples. Training and validation examples are dealt by
    the same shares, each to exactly one client; all clients keep all classes in their frame, and the source's task.

    Args:
        source: of classes.
        clients: how many.
        alpha: towards 0 every class has one owner; towards infinity all shares are 1/K.
        seed: of the draws.
        local_test: deal the test examples by the same shares; else all clients have the very same `test`.
        least: training examples that every client has.

    >>> sum(len(s.train) for s in dirichlet(digits(), 10, alpha=0.5)) == len(digits().train)
    True
    """
    from consilience.data import _splits

    return _splits.dirichlet(source, clients, alpha, seed, local_test, least)


def iid(source: Source, n: int, seed: int = 0, local_test: bool = False) -> list[Source]:
    """n clients with random shares of equal size (see `dirichlet` for what they share).

    >>> [(s.name, len(s.train)) for s in iid(wine(), 3)]
    [('wine/client-0', 43), ('wine/client-1', 43), ('wine/client-2', 42)]
    """
    from consilience.data import _splits

    return _splits.iid(source, n, seed, local_test)


def quantity_skew(
    source: Source,
    n: int,
    power: float = 1.5,
    seed: int = 0,
    local_test: bool = False,
    least: int = 2,
    sigma: float | None = None,
    alpha: float | None = None,
) -> list[Source]:
    """n clients with random shares of unequal sizes: client i has a share in proportion to (i + 1)^-power, or to a random draw.

    Args:
        source: of any kind.
        n: how many clients.
        power: of the power law.
        seed: of the draws.
        local_test: deal the test examples by the same shares; else all clients have the very same `test`.
        least: training examples that every client has; random sizes are drawn again, up to 100 times, until they do.
        sigma: sizes in proportion to exp(sigma z), z ~ N(0, 1) (log-normal), instead of the power law.
        alpha: sizes in proportion to a draw from Dirichlet(alpha 1_n), instead of the power law (NIID-Bench, Li et al. 2022).

    >>> [len(s.train) for s in quantity_skew(wine(), 3, power=1.0)]
    [70, 35, 23]
    """
    from consilience.data import _splits

    return _splits.quantity_skew(source, n, power, seed, local_test, least, sigma, alpha)


def label_sets(
    source: Source,
    clients: int = 5,
    classes: int | Sequence[Sequence[int | str]] = 2,
    seed: int = 0,
    local_test: bool = False,
) -> list[Source]:
    """Clients with a few classes each: the examples of a class are dealt evenly to those who have it (NIID-Bench, Li et al. 2022).

    Each client's `classes` are its own set, so that sites with label sets of their own are this too. Classes are dealt so that each
    has as many owners as another, or one more.

    Args:
        source: of classes.
        clients: how many.
        classes: how many classes each client has; or each client's classes, by number or by name (those of no client are left out).
        seed: of the draws.
        local_test: deal the test examples likewise; else all clients have the very same `test`.

    >>> [s.classes for s in label_sets(wine(), 3, [["class_0"], ["class_1", "class_2"], [2]])]
    [(0,), (1, 2), (2,)]
    """
    from consilience.data import _splits

    return _splits.label_sets(source, clients, classes, seed, local_test)


def natural(source: Source, users: Any, test_users: Any = None, least: int = 1) -> list[Source]:
    """A client for each user, by a column that says whose an example is; clients keep the source's classes and task.

    Args:
        source: whose training examples come with users; make it with `validation=0` and a `test` of its own to keep their order.
        users: a name or number for each training example, and after them for each validation example [N + M].
        test_users: the same for each test example, so that each client has a test of its own; None: all have the very same `test`.
        least: training examples that a user should have; who has fewer is left out.

    >>> source = arrays([[float(i)] for i in range(6)], [0, 1] * 3, test=([[0.0], [1.0]], [0, 1]), validation=0, name="notes")
    >>> [(s.name, len(s.train)) for s in natural(source, ["ann", "bob", "ann", "bob", "ann", "ann"])]
    [('notes/ann', 4), ('notes/bob', 2)]
    """
    from consilience.data import _splits

    return _splits.natural(source, users, test_users, least)


def shards(
    source: Source, clients: int, shards_per_client: int = 2, seed: int = 0, local_test: bool = False
) -> list[Source]:
    """Clients with few classes: examples sorted by class are cut into equal shards, dealt at random (McMahan et al. 2017).

    >>> max(len(s.train.targets().unique()) for s in shards(digits(), 5))
    5
    """
    from consilience.data import _splits

    return _splits.shards(source, clients, shards_per_client, seed, local_test)


def streams(sources: Sequence[Source], clients: int) -> list[list[Source]]:
    """The sources dealt round robin: client i meets sources i, i + clients, i + 2 clients, ... one after another.

    >>> [[s.name for s in own] for own in streams(split_classes(digits(), 5), 2)]
    [['digits/0-1', 'digits/4-5', 'digits/8-9'], ['digits/2-3', 'digits/6-7']]
    """
    from consilience.data import _splits

    return _splits.streams(sources, clients)
