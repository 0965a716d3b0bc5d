"""Data: functions that return a Source, and splits of one Source into several. Signatures import no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from consilience import lazy
from consilience.core.errors import suggest_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from consilience.core.model import Model
    from consilience.core.source import Source
    from consilience.data import augment as augment
    from consilience.data import features as features
    from consilience.data import samplers as samplers
    from consilience.data._cells import cell_boxes as cell_boxes
    from consilience.data._cells import cell_targets as cell_targets
    from consilience.data._ids import ids as ids
    from consilience.data._tokens import Vocabulary as Vocabulary
else:
    # These are not in `__all__`, because the command line offers what is there as data or as a split.
    __getattr__, __dir__ = lazy.attach(__name__)

Kind = Literal["class", "value", "labels"]

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
    "table",
    "tasks",
    "text",
    "wine",
]

# Sources. Functions import what they need when they are called: the command line reads the signatures of
# all of them before it runs one, and importing torch takes seconds.


def digits(image: bool = False, seed: int = 0) -> Source:
    """Load scikit-learn's 1797 handwritten digits: x [N, 64] in [0, 1], 10 classes.

    A stratified fifth of them is the test.

    Args:
        image: x is [N, 1, 8, 8].
        seed: the seed of the test and validation splits.

    >>> source = digits()
    >>> len(source.train), len(source.validation), len(source.test), source.labels[3]
    (1294, 144, 359, ('digits', '3'))
    """
    from consilience.data._sources import table

    return table("digits", seed, image)


def breast_cancer(seed: int = 0) -> Source:
    """Load scikit-learn's 569 tumours: x [N, 30] standardised by the training statistics, 2 classes.

    >>> breast_cancer().labels
    (('breast_cancer', 'malignant'), ('breast_cancer', 'benign'))
    """
    from consilience.data._sources import table

    return table("breast_cancer", seed)


def wine(seed: int = 0) -> Source:
    """Load scikit-learn's 178 wines: x [N, 13] standardised by the training statistics, 3 classes.

    >>> wine().train.whole()[0].shape
    torch.Size([128, 13])
    """
    from consilience.data._sources import table

    return table("wine", seed)


def diabetes(seed: int = 0) -> Source:
    """Load scikit-learn's 442 patients, a regression: x [N, 10] and y [N, 1].

    Both are standardised by the training statistics.

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
    loss: Any = None,
    metric: Any = None,
    augment: Any = None,
) -> Source:
    """Make a source from numpy arrays or torch tensors.

    Args:
        x: inputs [N, ...], or a dict or tuple of them: parts with one first dimension, with which the module
            is called by name or by place. Sequences of unequal length are padded to the longest of each
            batch. uint8 images [N, H, W] or [N, C, H, W] are divided by 255; other integers stay whole
            numbers (token ids). A map-style dataset with `y=None` is a `stream`.
        y: class numbers [N, *places], where -100 is no target; values [N] or [N, k, *places], or labels [N,
            L, *places] of 0 and 1, where NaN is no target. Places are tokens or pixels; nothing is shifted,
            so that the target of a token is for the output at that token.
        test: (x, y) to test on, or the fraction of the examples to test on, a stratified draw.
        classes: the names of targets 0, 1, ... (of the outputs, for values); the source has all of them.
            None: those found, named by number. Declare them for clients that may lack some.
        name: the name of the source.
        kind: "class", "value", or "labels", of which several may hold at once.
        space: the label space; sources share classes only within the same space. None: `name`.
        validation: the fraction of the training examples that is set apart to choose hyperparameters by.
        seed: the seed of the splits.
        loss: what its task is trained by: a name, one of `consilience.losses`, or a function (outputs,
            targets) -> the loss of each target. None: that of the run (`Training.loss`), or of the kind.
        metric: what its task is judged by. None: that of the run, or of the kind.
        augment: a random function of a training sample, several in a list, or a mapping of them by part; see
            `consilience.data.augment`. Validation and test are not augmented.

    Raises:
        ConsilienceError: different lengths, no examples, NaN or infinity, targets that are not among the
            classes or not whole, wrong dimensions, test examples of another shape.

    >>> import numpy as np
    >>> x, y = np.eye(20, dtype="float32"), np.arange(20) % 2
    >>> source = arrays(x, y, classes=["even", "odd"], name="parity")
    >>> len(source.train), len(source.validation), len(source.test), source.labels[1]
    (14, 2, 4, ('parity', 'odd'))
    """
    from consilience.data._sources import Options, from_arrays

    options = Options(name, test, classes, kind, space, validation, seed, loss, metric, augment)
    return from_arrays(x, y, options)


def tasks(
    x: Any,
    targets: Mapping[str, Any],
    kinds: Mapping[str, Kind] | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    test: float = 0.2,
    validation: float = 0.1,
    name: str = "data",
    seed: int = 0,
) -> list[Source]:
    """Make one source per task from inputs that several tasks share, with one split for all of them.

    A sample may have targets for some tasks only: -100 among classes, NaN among values and labels.

    Args:
        x: inputs [N, ...], as `arrays` takes them.
        targets: by task, as `arrays` takes them: classes, values or labels.
        kinds: "class", "value" or "labels" by task; those that are left out are classes.
        classes: the names of the classes, values or labels by task; None: numbers.
        test: the fraction of the samples to test on.
        validation: the fraction of the rest to choose hyperparameters by.
        name: the sources are called NAME/TASK.
        seed: the seed of the split.

    Raises ConsilienceError as `arrays` does, and for kinds and classes of tasks that are not in `targets`.

    >>> import numpy as np
    >>> x, even, size = np.eye(20, dtype="float32"), np.arange(20) % 2, np.arange(20.0)
    >>> size[::2] = np.nan
    >>> [(s.name, s.kind) for s in tasks(x, {"even": even, "size": size}, {"size": "value"}, name="n")]
    [('n/even', 'class'), ('n/size', 'value')]
    """
    from consilience.data._sources import Options, from_tasks

    return from_tasks(
        x, targets, kinds or {}, classes or {}, Options(name, test, None, "class", None, validation, seed)
    )


def table(
    rows: Any,
    target: str | Sequence[str],
    test: Any = 0.2,
    group: str | None = None,
    ignore: Sequence[str] = (),
    categories: Any = None,
    missing: Any = "refuse",
    standardise: Literal["inputs", "all", "none"] = "inputs",
    classes: Sequence[str] | None = None,
    name: str | None = None,
    kind: Kind | None = None,
    space: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
    loss: Any = None,
    metric: Any = None,
    augment: Any = None,
) -> Any:
    """Make a source from a table of named columns: x [N, d], numbers standardised and categories one-hot.

    A number becomes (x - mean) / deviation, by the training rows alone; a constant column becomes 0. A column
    of text becomes one input of 0 or 1 per category, in order of their names. Inputs keep the order of the
    columns. Text stays text: a category "NA" is a category, and only an empty cell is missing. Among numbers,
    words such as NA and null are missing too.

    Args:
        rows: a .csv, .tsv, .jsonl or .parquet file (the last needs pyarrow), a DataFrame, a
            datasets.Dataset, or a mapping from names to columns.
        target: the column of the targets, or several.
        test: another such table, or the fraction of the rows to test on. A test table must have the columns
            and the categories of the training data.
        group: a column that names the client or domain of each row: one source per group, in order, with
            common labels, categories and statistics. The statistics are added from those of each group
            (count, sum, sum of squared differences from the common mean), as clients would send them.
        ignore: columns to leave out, such as numbers of rows.
        categories: columns whose numbers are categories, such as postcodes; or a mapping from such columns,
            or columns of text, to all their categories.
        missing: "refuse": an error names the column and the row; "mean": missing inputs get the mean of the
            training rows (categories: their shares); "drop": leave out rows with a missing input, in the test
            too; or a number (categories: none). But for "refuse", a row needs only one target.
        standardise: "inputs": as above; "all": values of targets too; "none".
        classes: the labels in order; None: all labels, sorted. For several targets, their names.
        name: the name of the source, and of its groups `<name>/<group>`; None: the file's.
        kind: "class", "value" or "labels". None: text is "class", several columns of 0 and 1 are "labels",
            and other numbers are "value", where they cannot be meant as classes.
        space, validation, seed, loss, metric, augment: as in `arrays`.

    Returns:
        A source, or with `group` a list of them.

    Raises:
        ConsilienceError: no such file or column, no rows, columns without names or with equal ones, text
            among numbers, a missing value, a column or category that only the test has not or has.

    >>> rows = {"age": [20, 30, 40, 50, 60], "smokes": ["no", "yes"] * 2 + ["no"], "ill": list("nynyn")}
    >>> source = table(rows, "ill", test=rows, validation=0)
    >>> source.train.whole()[0][:2]
    tensor([[-1.2649,  1.0000,  0.0000],
            [-0.6325,  0.0000,  1.0000]], dtype=torch.float64)
    >>> source.labels
    (('table', 'n'), ('table', 'y'))
    """
    from pathlib import Path

    from consilience.data._sources import Options
    from consilience.data._tables import Roles, from_table, names_of

    called = name or (Path(rows).stem if isinstance(rows, str | Path) else "table")
    targets, left_out = names_of("target", target), names_of("ignore", ignore)
    roles = Roles(targets, group, left_out, categories, missing, standardise)
    options = Options(called, test, classes, "class", space, validation, seed, loss, metric, augment)
    return from_table(rows, roles, kind, options)


def text(
    texts: Any,
    y: Any = None,
    tokenizer: Any = "words",
    targets: Literal["text", "next", "tags"] = "text",
    test: Any = 0.2,
    max_length: int | None = None,
    block: int = 128,
    stride: int | None = None,
    mask: bool = True,
    vocabulary: int | None = None,
    column: str = "text",
    classes: Sequence[str] | None = None,
    name: str = "text",
    kind: Kind = "class",
    space: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
    loss: Any = None,
    metric: Any = None,
    augment: Any = None,
) -> Source:
    """Make a source from texts: token ids as `input_ids` and `attention_mask` [N, T], padded by the batch.

    The module is called with both by name. An empty text is one token of padding that counts.

    Args:
        texts: a list of texts; for tags, of lists of words; for the next token, also one text. Or a .csv,
            .tsv, .jsonl or .parquet file with the texts in `column` and the labels in the column `y`; for the
            next token, also a .txt file.
        y: a label for each text, by name or number (or values, or 0 and 1 for each of several labels); or a
            list of tags for each text, one per word.
        tokenizer: "words" or "chars": a vocabulary of the training texts. A `data.Vocabulary`, which the
            sources of one schedule must share; a tokenizer of tokenizers or of transformers; or any function
            text -> ids, whose attribute `pad_id` is the id of padding. Without one for padding, the token for
            the end of a text is used, or 0.
        targets: "text": y [N]; "tags": y [N, T], the first token of each word has its tag; "next": y [N, T],
            the next token at every place. Places without a target are -100.
        test: (texts, y), such a file, or the fraction of the texts to test on, a stratified draw; for the
            next token, texts, or the fraction. One text is cut: its end is the test.
        max_length: tokens of a text at most; None: what the tokenizer says, or no limit.
        block: tokens of a window, for the next token.
        stride: tokens from one window to the next; None: `block`. Below it, windows overlap: what an earlier
            window had as targets is only context.
        mask: whether inputs have an attention mask; without, a module is called with the ids alone.
        vocabulary: how many ids the model takes, from 0 on: others are refused, and "words" and "chars" keep
            their most frequent tokens.
        column: the column of the texts in a file.
        classes, name, kind, space, validation, seed, loss, metric, augment: as in `arrays`. Labels and tags
            by name are classes in the order of their names, if `classes` does not say another.

    Raises:
        ConsilienceError: something that is no text (named by number), words and tags of unequal number, ids
            that the model does not have, a tokenizer that fails, and as in `arrays`.

    >>> source = text(["a cat", "a dog sat", "", "a cat"], ["c", "d", "d", "c"], test=0.25, validation=0)
    >>> x, y = source.train.whole()
    >>> x.trim().parts["attention_mask"].sum(1).tolist(), source.labels
    ([3, 1, 2], (('text', 'c'), ('text', 'd')))
    >>> windows = text("abcdefgh" * 9, tokenizer="chars", targets="next", block=4).train
    >>> [part.tolist() for part in (windows.x.parts["input_ids"][0], windows.y[0])]
    [[2, 3, 4, 5], [3, 4, 5, 6]]
    """
    from consilience.data._sources import Options
    from consilience.data._tokens import Tokening, from_text

    tokening = Tokening(tokenizer, targets, max_length, block, stride, mask, vocabulary)
    options = Options(name, test, classes, kind, space, validation, seed, loss, metric, augment)
    return from_text(texts, y, column, tokening, options)


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
    loss: Any = None,
    metric: Any = None,
    augment: Any = None,
) -> Source:
    """Make a source from a map-style dataset that does not fit in memory.

    Examples are read when they are needed. Targets are read once: from the column of a datasets.Dataset, or
    from the attribute `targets` or `labels` of the dataset, if they are those of a spread of samples; else
    example by example. Sequences of unequal length [T] or [T, d] are padded with 0 to the longest of each
    batch.

    Args:
        dataset: has `len(dataset)` and `dataset[i]`, which is a pair (x, y), or a mapping with the target as
            "labels" or "label" (a datasets.Dataset). x is a tensor, an array, an image, or a mapping or tuple
            of parts, with which the module is called by name or by place.
        test: another such dataset, or the fraction of this one to test on, a stratified draw.
        classes, name, kind, space, validation, seed, loss, metric, augment: as in `arrays`. A table of the
            library datasets may name its classes itself. A dataset that is random itself is random in
            validation and test too, though it gives the same each time.
        workers: processes that read and augment; 0 does so in this one. Results do not depend on it.

    Raises:
        ConsilienceError: no map-style dataset, items of another form, examples that cannot be read or are not
            alike (named by number), and as in `arrays`.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> source = stream(TensorDataset(torch.rand(20, 3), torch.arange(20) % 2))
    >>> len(source.train), next(source.train.chunks(4))[0].shape
    (14, torch.Size([4, 3]))
    """
    from consilience.data._sources import Options, from_dataset

    options = Options(name, test, classes, kind, space, validation, seed, loss, metric, augment)
    return from_dataset(dataset, workers, options)


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
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    augment: Any = None,
) -> Source:
    """Make a source from a folder of images with one subfolder per class: x [N, 3, H, W] in [0, 1].

    The subfolders may also be in `train/` and `test/`, and optionally `val/`, `valid/` or `validation/`.
    Files are read when they are needed. Needs pillow (`consilience[vision]`).

    Args:
        path: the folder.
        size: height and width (one number: both) to resize images to; None: all must have one size.
        grey: one channel, x [N, 1, H, W].
        in_memory: read all images at once.
        workers: processes that read; 0 reads in this one.
        test: the fraction of the training examples to test on, if there is no `test/`.
        name: the name of the source; None: the folder's.
        space, validation, seed: as in `arrays`.
        unreadable: "refuse": an error names the first image that cannot be read, when it is read; "skip": all
            images are read once at the start, and those that cannot be read are left out, with a warning that
            counts them.
        mean, std: x becomes (x - mean) / std; one number, or one per channel, as in `(0.485, 0.456, 0.406)`
            and `(0.229, 0.224, 0.225)` for models trained on ImageNet.
        augment: as in `arrays`.

    >>> folder("no/such/place")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `path` must be a folder of images, got nothing at no/such/place.
    """
    from pathlib import Path

    from consilience.data._sources import Options, Reading, from_folder

    # Resolved, because "." has no name.
    called = name or Path(path).resolve().name
    options = Options(called, test, None, "class", space, validation, seed, augment=augment)
    return from_folder(path, Reading(size, grey, in_memory, workers, unreadable, mean, std), options)


def npz(
    name: str | Path,
    flat: bool = False,
    limit: int | None = None,
    images: str = "images",
    space: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
    augment: Any = None,
) -> Source:
    """Make a source from an .npz file of images: x [N, C, H, W] in [0, 1].

    Its keys are train_images, train_labels, test_images and test_labels; class_names is optional. Images are
    uint8 [N, H, W] or [N, H, W, C], or JPEG files end to end (train_jpeg, train_offsets; needs pillow).

    Args:
        name: a file, or the name of one in the folder that the environment variable CONSILIENCE_DATA names.
        flat: x is [N, C*H*W].
        limit: training examples (with validation) at most, a stratified draw; None is all.
        images: which images, if the file has several kinds (`images28` for small omniglot).
        space, validation, seed, augment: as in `arrays`.

    >>> npz("no/such.npz")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `name` must be a readable .npz file, got none at no/such.npz.
    """
    from consilience.data._sources import from_npz

    return from_npz(name, flat, limit, images, space, validation, seed, augment)


def shakespeare(
    roles: int | Sequence[str] | None = None,
    window: int = 80,
    stride: int = 10,
    limit: int | None = None,
    validation: float = 0.1,
    path: str | Path | None = None,
) -> list[Source]:
    """Load Tiny Shakespeare by speaking role, 100 natural clients: predict the next character.

    Inputs are x [N, T] (whole numbers), targets y [N]. The classes are the characters of all roles, in the
    order of their codes, for every choice of roles. The test of a role is the last 20% of its text, its
    validation the last tenth of the rest; no window crosses a cut. Models: `models.char_lstm`,
    `models.char_transformer`.

    Paper: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017 (the task).

    Args:
        roles: how many (the first in the file), or their names; None is all.
        window: characters in an input, T.
        stride: characters from one window to the next; 1 predicts every character of the text.
        limit: training windows per role at most, the first ones; None is all.
        validation: the fraction of the training text, at its end, that is set apart to choose hyperparameters
            by.
        path: the file, {role: {"train": text, "test": text}} as xz-compressed JSON; None:
            shakespeare_roles.json.xz in the folder that the environment variable CONSILIENCE_DATA names.

    Raises:
        ConsilienceError: no such file or role, a file of another form, text shorter than a window.

    >>> shakespeare(path="no/such.xz")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `path` must be a readable .json.xz file, got none at no/such.xz.
    """
    from consilience.data import _text

    return _text.shakespeare(roles, window, stride, limit, validation, path)


# Benchmarks. Their options stay flat, because each is one on the command line.


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
    """Load CORe50, 50 objects filmed in 11 sessions: one source per training batch, all with one test.

    The test is sessions 3, 7 and 10. Batches are exactly those of the published file lists
    (batches_filelists.zip, batches_filelists_NICv2.zip) if these are next to the images. Without them NI (8
    sessions) and NC (10 objects, then 8 times 5) are built by the published rule, in an order drawn from
    `run`, which is none of the ten published orders; NIC is refused. Needs pillow (`consilience[vision]`).

    Paper: Lomonaco & Maltoni, "CORe50: a New Dataset and Benchmark for Continuous Object Recognition", CoRL
    2017; NICv2: Lomonaco, Maltoni & Pellegrini, "Fine-Grained Continual Learning", 2019.

    Args:
        path: the folder with core50_128x128/ (or _32x32, _350x350), or with the sessions s1 .. s11,
            s1/o1/*.png.
        scenario: "ni": new instances, one session per batch; "nc": new classes; "nic": both, in 79 batches;
            "nicv2_79", "nicv2_196", "nicv2_391": both, in smaller batches.
        object_level: 50 classes, the objects; otherwise the 10 categories. Classes come from the folders o1
            .. o50, because the numbers in the lists of NC are renumbered in every run.
        run: which of the published runs (orders), 0 to 9.
        size, grey, in_memory, workers: as in `folder`.
        validation: the fraction of each batch that is set apart to choose hyperparameters by; the paper has
            none.
        name: the prefix of the sources' names, `core50/ni-0` and so on.
        space: as in `arrays`.

    Raises:
        ConsilienceError: no such session, object, run or scenario; no file lists for NIC; a malformed list.

    >>> core50("no/such/place")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `path` must be a folder of images, got nothing at no/such/place.
    """
    from consilience.data import _benchmarks
    from consilience.data._sources import Options, Reading

    reading = Reading(size, grey, in_memory, workers)
    # CORe50 has a test of its own, and `run` stands for the seed.
    options = Options(name, space=space, validation=validation)
    return _benchmarks.core50(path, scenario, object_level, run, reading, options)


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
    """Load CLEAR-10 or CLEAR-100, photographs of 2004 to 2014: one source per bucket of time (10), in order.

    All buckets have the same classes. The folder has labeled_images/<bucket>/<class>/*.jpg, in train/ (or
    train_image_only/) and test/ as in the released archives, or directly, as in the first release. Bucket 0
    has no labels and is left out. Needs pillow (`consilience[vision]`).

    Paper: Lin et al., "The CLEAR Benchmark: Continual LEArning on Real-World Imagery", NeurIPS 2021 (datasets
    and benchmarks).

    Args:
        path: the folder. Classes are in the order of class_names.txt if there is one.
        protocol: "iid": a bucket is tested on images of its own time; "streaming": train on all of a bucket
            and test on all of the next, so that the last bucket is only tested on.
        split: which of the published splits (training_folder/testset_ratio_0.3/split_0 .. 4) to use if there
            are any.
        test: the fraction of a bucket to test on, if there is neither test/ nor a published split.
        size, grey, in_memory, workers: as in `folder`; the images differ in size.
        validation: the fraction of each bucket's training images that is set apart to choose hyperparameters
            by; the paper has none.
        name: the prefix of the sources' names, `<name>/bucket-1` and so on; None: the folder's name.
        space, seed: as in `arrays`.

    Raises:
        ConsilienceError: no buckets, other classes or buckets in test than in train, a list that contradicts
            the folders.

    >>> clear("no/such/place")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `path` must be a folder of images, got nothing at no/such/place.
    """
    from pathlib import Path

    from consilience.data import _benchmarks
    from consilience.data._sources import Options, Reading

    reading = Reading(size, grey, in_memory, workers)
    options = Options(name or Path(path).resolve().name, test, None, "class", space, validation, seed)
    return _benchmarks.clear(path, protocol, split, reading, options)


# Features.


def embed(
    sources: Source | Sequence[Source],
    model: Model,
    cache: str | Path | None = None,
    batch: int = 64,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Replace images by the features psi [N, d] of a frozen backbone; all else in the sources stays the same.

    Every image passes the backbone once; parts that several sources share stay shared. `models.backbone`
    accepts its own features as inputs, so the same model can be trained on them. Streams are read in chunks.

    With `cache`, features are kept in the folder <cache>/<hash of the backbone>, in safetensors files of at
    most 8192 images, by the hash of each image (type, shape, bytes). They are found again for the same image
    in another source, order or split, and memory-mapped. An interrupted run keeps what it computed; a killed
    process loses at most the last 8192 images. A file that is incomplete or not ours is named in a warning,
    and its features are computed again. A file with changed features is refused at their first use.

    Args:
        sources: one source, or several.
        model: `models.backbone`, another frozen model without head, or heads on one (`models.multi_head`).
        cache: a folder; None keeps nothing.
        batch: images that pass the backbone together.
        device: where the backbone is evaluated; features are on the CPU.
        progress: called with the number of images done and of all images.

    Returns:
        A source for a source, a list for several.

    Raises:
        ConsilienceError: the backbone is not frozen, or a different one for each seed; sources with an
            augmentation; features that are not finite; an image that cannot be read; a folder that cannot be
            written; features that were changed on disk.

    >>> from consilience import models
    >>> psi = embed(digits(image=True), models.backbone(models.conv(10, 1, 8, 4)))
    >>> psi.train.whole()[0].shape, psi.labels == digits().labels
    (torch.Size([1294, 32]), True)
    """
    from consilience.core.source import Source
    from consilience.data.features import embed

    # All at once, so that parts that several sources share pass the backbone once.
    several = [sources] if isinstance(sources, Source) else list(sources)
    embedded = embed(several, model, cache, batch, device, progress)
    return embedded[0] if isinstance(sources, Source) else embedded


# Splits into tasks. Every part is a task of its own, named after what sets it apart.


def split_classes(
    source: Source, n: int, order: Sequence[int | str] | None = None, seed: int | None = None
) -> list[Source]:
    """Split a source into n tasks by its classes; their numbers of classes differ by at most one.

    Args:
        source: a source of classes.
        n: how many tasks, at most one per class.
        order: the classes, by number or by name; None: as declared.
        seed: draw the order instead.

    >>> [part.name for part in split_classes(digits(), 5)]
    ['digits/0-1', 'digits/2-3', 'digits/4-5', 'digits/6-7', 'digits/8-9']
    """
    from consilience.data import _splits

    return _splits.split_classes(source, n, order, seed)


def new_instances(
    source: Source, groups: Any, order: Sequence[int] | None = None, seed: int | None = None
) -> list[Source]:
    """Split a source into tasks by groups of instances (sessions, objects, writers): new instances, NI.

    Each task shows known classes in new conditions. All tasks have the source's `test`, and as classes those
    of their own training examples.

    Paper: Lomonaco & Maltoni, "CORe50: a New Dataset and Benchmark for Continuous Object Recognition", CoRL
    2017.

    Args:
        source: its training examples come in groups; make it with `validation=0` to keep their order.
        groups: a whole number for each training example, and then for each validation example [N + M].
        order: the groups; None: by number.
        seed: draw the order instead.

    >>> x, y = [[float(i)] for i in range(8)], [0, 1] * 4
    >>> source = arrays(x, y, test=([[0.0]], [0]), validation=0, name="films")
    >>> parts = new_instances(source, [0, 0, 0, 0, 1, 1, 1, 1])
    >>> [(part.name, part.train.whole()[0].flatten().tolist()) for part in parts]
    [('films/group-0', [0.0, 1.0, 2.0, 3.0]), ('films/group-1', [4.0, 5.0, 6.0, 7.0])]
    """
    from consilience.data import _scenarios

    return _scenarios.new_instances(source, groups, order, seed)


def new_instances_and_classes(
    source: Source, groups: Any, first: int | None = None, each: int = 1, seed: int = 0
) -> list[Source]:
    """Split a source into tasks of new instances (known classes in new conditions) or of new classes: NIC.

    Their order is random.

    The first task has the first `first` classes in the first group of instances; every other task has `each`
    classes in one group. So CORe50's 50 objects in 8 sessions, with `first=10`, come in 79, 196 or 391
    batches for `each` 5, 2 or 1. All tasks have the source's `test`, and as classes those of their own
    training examples. For new classes alone use `split_classes`.

    Paper: Lomonaco & Maltoni, "CORe50: a New Dataset and Benchmark for Continuous Object Recognition", CoRL
    2017.

    Args:
        source: a source of classes; its training examples come in groups; make it with `validation=0` to keep
            their order.
        groups: as in `new_instances`.
        first: classes in the first task; None: `each`.
        each: classes in every other task.
        seed: the seed of the order.

    >>> x, y = [[float(i)] for i in range(8)], [0, 1] * 4
    >>> source = arrays(x, y, test=([[0.0]], [0]), validation=0, name="films")
    >>> parts = new_instances_and_classes(source, [0, 0, 0, 0, 1, 1, 1, 1])
    >>> [(part.classes, len(part.train)) for part in parts]
    [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]
    """
    from consilience.data import _scenarios

    return _scenarios.new_instances_and_classes(source, groups, first, each, seed)


def blurry(
    sources: Sequence[Source], share: float = 0.1, to: Literal["all", "neighbours"] = "all", seed: int = 0
) -> list[Source]:
    """Blur the boundaries between sources: a share of the examples of each source moves to the others.

    This applies to training and validation examples. Every example is in exactly one source. Those that leave
    are drawn with equal shares of the classes, and at least one example of each class stays. Sources of equal
    size stay equal. `test`, name and task stay; `classes` are those of the source and of the examples that
    arrived. blurry-M is `share=M/100` (blurry boundaries: Aljundi et al. 2019).

    Paper: Bang et al., "Rainbow Memory: Continual Learning with a Memory of Diverse Samples", CVPR 2021.

    Args:
        sources: two or more, with the same labels.
        share: the share of examples that leaves each source, in [0, 1); 0 returns the sources unchanged.
        to: "all": evenly to all other sources; "neighbours": half to the one before and half to the one after
            (so the first and the last give half as much), which makes changes gradual.
        seed: the seed of the draws.

    >>> [(part.name, len(part.train), part.classes) for part in blurry(split_classes(wine(), 3))][0]
    ('wine/class_0', 42, (0, 1, 2))
    """
    from consilience.data import _scenarios

    return _scenarios.blurry(sources, share, to, seed)


def permute(source: Source, n: int, seed: int = 0) -> list[Source]:
    """Make n tasks, each with its own fixed permutation of all entries of an input.

    The first is the identity. Every task has a copy of the data (except of a `stream`).

    >>> [part.name for part in permute(digits(), 2)]
    ['digits/permuted-0', 'digits/permuted-1']
    """
    from consilience.data import _splits

    return _splits.permute(source, n, seed)


def rotate(source: Source, angles: int | Sequence[float], side: int | None = None) -> list[Source]:
    """Make one task per angle: images turned counter-clockwise about their centre, with zeros outside.

    Interpolation is bilinear (`grid_sample`); quarter turns of square images are exact.

    Args:
        source: a source of images [N, C, H, W].
        angles: in degrees; a whole number n means 0, 360/n, 2*360/n, ...
        side: take flat inputs [N, C*side*side] as square images of this side.

    >>> [part.name for part in rotate(digits(), [0, 45, 90], side=8)]
    ['digits/rotated-0', 'digits/rotated-45', 'digits/rotated-90']
    """
    from consilience.data import _splits

    return _splits.rotate(source, angles, side)


# Partitions into clients. All take (source, clients, what shapes the shares), and `seed`, `local_test` and
# `least` as keywords only, because a number in the place of another one would go unnoticed.


def dirichlet(
    source: Source, clients: int, alpha: float, *, seed: int = 0, local_test: bool = False, least: int = 2
) -> list[Source]:
    """Deal a source to clients that differ in their classes (label skew).

    For each class c the shares of the K clients are p_c ~ Dirichlet(alpha 1_K) (Yurochkin et al. 2019;
    NIID-Bench, Li et al. 2022), so sizes differ as well. The draw is repeated, up to 100 times, until every
    client has `least` training examples. Training and validation examples are dealt by the same shares, each
    to exactly one client. All clients have all classes of the source, and its task.

    Args:
        source: a source of classes.
        clients: how many.
        alpha: towards 0 every class belongs to one client; towards infinity all shares are 1/K.
        seed: the seed of the draws.
        local_test: deal the test examples by the same shares; otherwise all clients have the source's `test`.
        least: training examples that every client has.

    >>> sum(len(part.train) for part in dirichlet(digits(), 10, alpha=0.5)) == len(digits().train)
    True
    """
    from consilience.data import _splits

    return _splits.dirichlet(source, clients, alpha, _splits.Dealing(seed, local_test, least))


def iid(source: Source, clients: int, *, seed: int = 0, local_test: bool = False) -> list[Source]:
    """Deal a source to clients at random, in shares of equal size.

    Args:
        source: a source of any kind.
        clients: how many.
        seed: the seed of the draws.
        local_test: deal the test examples too; otherwise all clients have the source's `test`.

    >>> [(part.name, len(part.train)) for part in iid(wine(), 3)]
    [('wine/client-0', 43), ('wine/client-1', 43), ('wine/client-2', 42)]
    """
    from consilience.data import _splits

    # Without `least`: shares of equal size have enough examples, or no draw has.
    return _splits.iid(source, clients, _splits.Dealing(seed, local_test))


def quantity_skew(
    source: Source,
    clients: int,
    power: float = 1.5,
    sigma: float | None = None,
    alpha: float | None = None,
    *,
    seed: int = 0,
    local_test: bool = False,
    least: int = 2,
) -> list[Source]:
    """Deal a source to clients at random, in shares of unequal sizes (quantity skew).

    Args:
        source: a source of any kind.
        clients: how many.
        power: sizes in proportion to (i + 1)^-power for client i (a power law).
        sigma: sizes in proportion to exp(sigma z), z ~ N(0, 1) (log-normal), instead of the power law.
        alpha: sizes in proportion to a draw from Dirichlet(alpha 1), instead of the power law (NIID-Bench, Li
            et al. 2022).
        seed: the seed of the draws.
        local_test: deal the test examples by the same shares; otherwise all clients have the source's `test`.
        least: training examples that every client has; random sizes are drawn again, up to 100 times, until
            they do.

    >>> [len(part.train) for part in quantity_skew(wine(), 3, power=1.0)]
    [70, 35, 23]
    """
    from consilience.data import _splits

    dealing = _splits.Dealing(seed, local_test, least)
    return _splits.quantity_skew(source, clients, _splits.Sizes(power, sigma, alpha), dealing)


def label_sets(
    source: Source,
    clients: int = 5,
    classes: int | Sequence[Sequence[int | str]] = 2,
    *,
    seed: int = 0,
    local_test: bool = False,
) -> list[Source]:
    """Deal a source to clients with a few classes each.

    The examples of a class are dealt evenly to the clients that have it. The `classes` of a client are its
    own set; so this also makes sites with different label sets. Every class belongs to as many clients as any
    other, or to one more (NIID-Bench, Li et al. 2022).

    Args:
        source: a source of classes.
        clients: how many.
        classes: how many classes each client has; or the classes of each client, by number or by name
            (classes of no client are left out).
        seed: the seed of the draws.
        local_test: deal the test examples in the same way; otherwise all clients have the source's `test`.

    >>> [part.classes for part in label_sets(wine(), 3, [["class_0"], ["class_1", "class_2"], [2]])]
    [(0,), (1, 2), (2,)]
    """
    from consilience.data import _splits

    return _splits.label_sets(source, clients, classes, _splits.Dealing(seed, local_test))


def natural(source: Source, users: Any, test_users: Any = None, *, least: int = 1) -> list[Source]:
    """Make one client per user, from a column that names the user of each example.

    Nothing is drawn. Clients have all classes of the source, and its task.

    Args:
        source: make it with `validation=0` and a `test` of its own to keep the order of the examples.
        users: a name or number for each training example, and then for each validation example [N + M].
        test_users: the same for each test example, so that each client has its own test; None: all clients
            have the source's `test`.
        least: training examples that a user must have; users with fewer are left out.

    >>> x, y, test = [[float(i)] for i in range(6)], [0, 1] * 3, ([[0.0], [1.0]], [0, 1])
    >>> source = arrays(x, y, test=test, validation=0, name="notes")
    >>> parts = natural(source, ["ann", "bob", "ann", "bob", "ann", "ann"])
    >>> [(part.name, len(part.train)) for part in parts]
    [('notes/ann', 4), ('notes/bob', 2)]
    """
    from consilience.data import _splits

    return _splits.natural(source, users, test_users, least)


def shards(
    source: Source, clients: int, shards_per_client: int = 2, *, seed: int = 0, local_test: bool = False
) -> list[Source]:
    """Deal a source to clients in shards, so that every client has few classes.

    Examples are sorted by class, cut into equal shards, and these are dealt at random (McMahan et al. 2017).

    Args:
        source: a source of classes.
        clients: how many.
        shards_per_client: shards of each client.
        seed: the seed of the draws.
        local_test: deal the test examples in the same way; otherwise all clients have the source's `test`.

    >>> max(len(part.train.targets().unique()) for part in shards(digits(), 5))
    5
    """
    from consilience.data import _splits

    return _splits.shards(source, clients, shards_per_client, _splits.Dealing(seed, local_test))


def streams(sources: Sequence[Source], clients: int) -> list[list[Source]]:
    """Deal sources to clients in turn: client i meets sources i, i + clients, i + 2 clients, ...

    >>> [[source.name for source in own] for own in streams(split_classes(digits(), 5), 2)]
    [['digits/0-1', 'digits/4-5', 'digits/8-9'], ['digits/2-3', 'digits/6-7']]
    """
    from consilience.data import _splits

    return _splits.streams(sources, clients)


suggest_arguments(__name__)
