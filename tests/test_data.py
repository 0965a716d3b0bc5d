"""Sources, splits and samplers: exact partitions, seeds, errors, files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from consilience import data, settings
from consilience.core.errors import ConsilienceError
from consilience.core.source import Source, Stream, Tensors
from consilience.data.samplers import Balanced, InOrder, Sampler, Shuffle

PARTS = ("train", "validation", "test")


def numbered(n: int = 120, classes: int = 6, streamed: bool = False, seed: int = 0) -> Source:
    """Examples whose first input is their number, so that a partition can be read off."""
    x = torch.stack([torch.arange(n).float(), torch.rand(n, generator=torch.Generator().manual_seed(1))], 1)
    y = torch.arange(n) % classes
    if streamed:
        return data.stream(TensorDataset(x, y), name="numbered", seed=seed)
    return data.arrays(x, y, name="numbered", seed=seed)


def ids(source: Source, part: str) -> list[int]:
    examples = getattr(source, part)
    return [] if len(examples) == 0 else examples.whole()[0][:, 0].long().tolist()


def refused(rule: str, f, *args, **kwargs) -> None:
    with pytest.raises(ConsilienceError) as e:
        f(*args, **kwargs)
    assert rule in str(e.value), str(e.value)
    assert "\n" not in str(e.value)


def need(name: str) -> None:
    where = Path(os.environ.get("CONSILIENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (where / name).is_file():
        pytest.skip(f"{name} is not in {where} (CONSILIENCE_DATA)")
    os.environ.setdefault("CONSILIENCE_DATA", str(where))


# Sources.


def test_catalogue_imports_no_torch():
    code = (
        "import sys, inspect, consilience.data as d\n"
        "[inspect.signature(getattr(d, n)) for n in d.__all__]\n"
        "print([m for m in ('torch', 'numpy', 'sklearn', 'PIL') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes"])
def test_tables(name):
    source, again, other = getattr(data, name)(), getattr(data, name)(), getattr(data, name)(seed=1)
    sizes = [len(getattr(source, p)) for p in PARTS]
    assert sizes[2] == round(0.2 * sum(sizes))
    assert sizes[1] == round(0.1 * (sizes[0] + sizes[1]))
    for part in PARTS:
        assert torch.equal(getattr(source, part).whole()[0], getattr(again, part).whole()[0])
    assert not torch.equal(source.train.whole()[0], other.train.whole()[0])
    x, y = source.train.whole()
    assert x.dtype == torch.float32
    if name == "digits":
        assert x.shape[1:] == (64,)
        assert x.min() >= 0
        assert x.max() == 1
        assert len(source.labels) == 10
        assert torch.equal(data.digits(image=True).train.whole()[0].flatten(1), x)
    else:
        assert torch.allclose(x.mean(0), torch.zeros(x.shape[1]), atol=1e-5)
        assert torch.allclose(x.std(0), torch.ones(x.shape[1]), atol=1e-5)
    if name == "diabetes":
        assert source.kind == "value"
        assert y.shape[1:] == (1,)
        assert abs(float(y.std()) - 1) < 1e-5
    else:
        shares = torch.stack(
            [getattr(source, p).targets().bincount().double() / len(getattr(source, p)) for p in PARTS]
        )
        assert (shares - shares[0]).abs().max() < 0.05


@pytest.mark.parametrize("streamed", [False, True])
def test_splits_of_arrays_are_a_partition(streamed):
    source = numbered(streamed=streamed)
    assert sorted(ids(source, "train") + ids(source, "validation") + ids(source, "test")) == list(range(120))
    assert source.test.targets().bincount().tolist() == [4] * 6
    assert ids(source, "test") == ids(numbered(), "test") != ids(numbered(seed=1), "test")


def test_arrays_types():
    y = np.arange(10) % 2
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4), dtype=np.uint8)
    source = data.arrays(images, y, test=(images, y), validation=0)
    assert torch.equal(source.train.whole()[0], torch.from_numpy(images).float() / 255)
    assert len(source.validation) == 0
    assert source.labels == (("data", "0"), ("data", "1"))
    tokens = data.arrays(images.astype(np.int32), y)
    assert tokens.train.whole()[0].dtype == torch.int64
    assert data.arrays(images / np.float32(2), y).train.whole()[0].dtype == torch.float32
    assert data.arrays(images / 2.0, y).train.whole()[0].dtype == torch.float64
    assert data.arrays((images / 2.0).astype(np.float16), y).train.whole()[0].dtype == torch.float32
    assert data.arrays(images.astype(">f4"), y.astype(">i2"), space="s").labels[0] == ("s", "0")
    frozen = images.astype(np.float32)
    frozen.setflags(write=False)
    data.arrays(frozen, y)
    found, declared = data.arrays(images, y * 3), data.arrays(images, y, classes=["a", "b", "c"])
    assert found.classes == (0, 3)
    assert len(found.labels) == 4
    assert declared.classes == (0, 1, 2)
    values = data.arrays(images, np.linspace(0, 1, 10), kind="value")
    assert values.train.targets().shape[1:] == (1,)
    assert values.labels == (("data", "value"),)
    assert len(data.arrays(images, np.zeros((10, 2)), kind="value").labels) == 2

    # What a loop over a dataset collects: scalars of torch and of numpy in a list.
    for scalar in (torch.tensor, np.array, np.int64):
        part = data.arrays(images, [scalar(int(label)) for label in y], test=(images, y), validation=0).train
        assert part.targets().tolist() == y.tolist()


X, Y = np.zeros((10, 3), dtype=np.float32), np.arange(10) % 2
NAN = X.copy()
NAN[4, 1] = np.nan


@pytest.mark.parametrize(
    ("rule", "args", "kwargs"),
    [
        ("`x` and `y` must be equally long, got 10 and 9.", (X, Y[:9]), {}),
        ("`x` must not be empty, got shape (0, 3).", (X[:0], Y[:0]), {}),
        ("`x` must be finite, got NaN or infinity in example 4.", (NAN, Y), {}),
        (
            "`y` must be finite, got infinity in example 9.",
            (X, [0.0] * 9 + [math.inf]),
            {"kind": "value"},
        ),
        ("`test x` must be finite", (X, Y), {"test": (NAN, Y)}),
        (
            "class numbers must be in 0..1, one for each of `classes`, got 2.",
            (X, Y * 2),
            {"classes": ["a", "b"]},
        ),
        ("class numbers must be 0 or more (-100: no target), got -1.", (X, Y - 1), {}),
        ("class numbers must count up from 0, got 2000000.", (X, Y * 2000000), {}),
        ("`y` must be class numbers of an integer type", (X, Y + 0.5), {}),
        ("`y` must be numbers, got text such as '0'; number the classes", (X, Y.astype(str)), {}),
        ("`y` must be class numbers, got one-hot rows [N, 2]", (X, np.eye(2, dtype=int)[Y]), {}),
        (
            "`y` must be class numbers [N] or [N, *places], got shape (10, 1); drop its last dimension.",
            (X, Y[:, None]),
            {},
        ),
        (
            "`y` must be 0 or 1 for each label (NaN: unknown), got 2 in example 0.",
            (X, Y * 0 + 2),
            {"kind": "labels"},
        ),
        ("some target must be there, got -100 for all examples", (X, Y * 0 - 100), {}),
        (
            "`x` must have a dimension of examples and at least one more, got shape (10,).",
            (X[:, 0], Y),
            {},
        ),
        ("`x['a']` must be an array with rows of equal length", ({"a": [[[1], [2, 3]]] * 2}, [0, 1]), {}),
        ("all parts of `x` must have as many samples, got {'a': 10, 'b': 9}", ({"a": X, "b": X[1:]}, Y), {}),
        ("`x` must be numbers, got text; `data.text`", (["good", "bad"] * 5, Y), {}),
        (
            "sequences of one sample must be equally long in all parts",
            ({"a": [[1], [2, 3]], "b": [[1, 2], [3]]}, [0, 1]),
            {},
        ),
        ("`x` must be real numbers", (torch.zeros(10, 3, dtype=torch.complex64), Y), {}),
        (
            "test examples must have the shape of training examples, got (2,) and (3,).",
            (X, Y),
            {"test": (X[:, :2], Y)},
        ),
        ("test inputs must be of the type of training inputs", (X, Y), {"test": (X.astype(int), Y)}),
        (
            "test targets must have as many outputs as training targets, got 2 and 1.",
            (X, Y),
            {"kind": "value", "test": (X, np.zeros((10, 2)))},
        ),
        ("`test` must be (x, y) or a fraction, got 1 parts.", (X, Y), {"test": (X,)}),
        ("`test` must be a fraction in (0, 1), got 1.5.", (X, Y), {"test": 1.5}),
        ("`test` must leave examples on both sides", (X[:2], Y[:2]), {}),
        ("`validation` must be a fraction in [0, 1), got 1.", (X, Y), {"validation": 1}),
        ("`classes` must be a list of different names, got ['a', 'a'].", (X, Y), {"classes": ["a", "a"]}),
        (
            "`classes` must name every output, got 2 names for 1 outputs.",
            (X, Y),
            {"kind": "value", "classes": ["a", "b"]},
        ),
        ("`kind` must be one of class, value, labels, got 'klass'.", (X, Y), {"kind": "klass"}),
        ("arrays need targets `y`, got none.", (X,), {}),
    ],
)
def test_arrays_refuses(rule, args, kwargs):
    refused(rule, data.arrays, *args, **kwargs)


class Map:
    """A map-style dataset that counts how often it is read."""

    def __init__(self, x, y, **attributes):
        self.x, self.y, self.reads = x, y, 0
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i):
        self.reads += 1
        return self.x[i], int(self.y[i])


def test_stream_equals_tensors():
    images = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8)
    y = torch.arange(60) % 3
    tensors, stream = data.arrays(images, y, name="d"), data.stream(TensorDataset(images, y), name="d")
    assert isinstance(tensors.train, Tensors)
    assert isinstance(stream.train, Stream)
    assert tensors.labels == stream.labels
    assert tensors.classes == stream.classes
    for s, t in zip(_all_splits(stream), _all_splits(tensors), strict=True):
        assert s.name == t.name
        assert s.classes == t.classes
        assert s.task == t.task
        for part in PARTS:
            a, b = getattr(s, part), getattr(t, part)
            assert torch.equal(a.targets(), b.targets())
            if len(b):
                plan = Shuffle().plan(b.targets(), 7, 0, torch.Generator().manual_seed(3))
                for (xa, ya), (xb, yb) in zip(a.batches(plan), b.batches(plan), strict=True):
                    assert torch.equal(ya, yb)
                    assert xa.dtype == xb.dtype
                    assert torch.allclose(xa, xb, atol=1e-6)


def _all_splits(source: Source) -> list[Source]:
    two = data.split_classes(source, 2)
    return [
        source,
        *two,
        *data.permute(source, 2),
        *data.rotate(source, [0, 30, 90]),
        *data.dirichlet(two[0], 2, 1.0),
        *data.iid(source, 3, local_test=True),
        *data.quantity_skew(source, 2),
        *data.shards(source, 2),
        *data.rotate(data.permute(source, 2)[1], [45.0]),
    ]


def test_stream_takes_targets_once():
    x, y = torch.rand(30, 2), torch.arange(30) % 2
    by_attribute = Map(x, y, targets=y.tolist())
    data.stream(by_attribute)
    assert by_attribute.reads == 18, "a spread of samples, not all"
    read, transformed, wrong = (
        Map(x, y),
        Map(x, y, labels=1 - y, target_transform=abs),
        Map(x, y, targets=1 - y),
    )
    for d in (read, transformed, wrong):
        source = data.stream(d, validation=0)
        assert d.reads >= 30
        assert torch.equal(source.train.whole()[1], source.train.targets())
    assert len(data.arrays(Map(x, y)).train) == len(data.stream(Map(x, y)).train)


def test_stream_with_workers_and_images():
    image = pytest.importorskip("PIL.Image", reason="pillow is missing")
    pictures = [image.fromarray(np.full((4, 5), i, dtype=np.uint8)) for i in range(12)]
    source = data.stream(Map(pictures, torch.arange(12) % 2), workers=1, validation=0)
    x, y = source.train.whole()
    assert x.shape == (10, 1, 4, 5)
    assert torch.equal((x[:, 0, 0, 0] * 255).round().long() % 2, y)


def test_stream_refuses():
    y = torch.arange(10) % 2
    refused("a dataset must be map-style", data.stream, iter([1]))
    refused("a dataset must not be empty", data.stream, Map([], []))
    refused("a dataset must give pairs (x, y)", data.stream, TensorDataset(torch.zeros(10, 2)))
    refused("`workers` must be a whole number >= 0, got -1.", data.stream, Map(X, y), workers=-1)
    refused(
        "test examples must have the shape",
        data.stream,
        Map(torch.rand(10, 2), y),
        Map(torch.rand(10, 3), y),
    )
    refused(
        "must be class numbers of an integer type",
        data.stream,
        TensorDataset(torch.rand(10, 2), torch.rand(10)),
    )


# Files.


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow is missing")
    rng = np.random.default_rng(0)

    def make(where: str, name: str, number: int, size: int = 6) -> Path:
        folder = tmp_path / where / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(number):
            image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        return tmp_path / where

    return make


@pytest.mark.parametrize("in_memory", [False, True])
def test_folder_of_classes(pictures, in_memory):
    pictures("all", "cat", 10)
    path = pictures("all", "dog", 5)
    (path / "cat" / "notes.txt").write_text("not an image")
    source = data.folder(path, in_memory=in_memory)
    assert source.labels == (("all", "cat"), ("all", "dog"))
    assert source.test.targets().tolist() == [0, 0, 1]
    assert isinstance(source.train, Tensors if in_memory else Stream)
    x, _ = source.train.whole()
    assert x.shape[1:] == (3, 6, 6)
    assert x.dtype == torch.float32
    assert x.max() <= 1
    assert torch.equal(x, data.folder(path, in_memory=not in_memory).train.whole()[0])
    assert data.folder(path, size=(3, 4), grey=True, in_memory=in_memory, name="n").test.whole()[0].shape == (
        3,
        1,
        3,
        4,
    )


def test_folder_with_splits(pictures):
    for part, n in (("train", 10), ("val", 2), ("test", 3)):
        for name in ("a", "b"):
            path = pictures(f"set/{part}", name, n).parent
    source = data.folder(path)
    assert [len(getattr(source, p)) for p in PARTS] == [20, 4, 6]
    pictures("set/test", "c", 1)
    refused("class folders must be those of train, got 'c'", data.folder, path)


def test_classes_of_a_folder_without_images_keep_their_columns(pictures):
    """Those that a split lacks, and those of which no image can be read."""
    for name in "abc":
        path = pictures("set/train", name, 10).parent
    pictures("set/val", "b", 2)
    pictures("set/test", "a", 2)
    pictures("set/test", "c", 3)
    labels = tuple(("set", name) for name in "abc")
    source = data.folder(path)
    assert source.labels == labels and source.classes == (0, 1, 2)
    assert source.test.targets().tolist() == [0, 0, 2, 2, 2]
    assert source.validation.targets().tolist() == [1, 1]

    for file in (path / "train" / "b").iterdir():
        file.write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="10 of"):
        source = data.folder(path, unreadable="skip")
    assert source.labels == labels
    assert set(source.train.targets().tolist()) == {0, 2}
    assert source.validation.targets().tolist() == [1, 1]


def test_folder_refuses(pictures, tmp_path, monkeypatch):
    refused("must have a subfolder for each class", data.folder, tmp_path)
    path = pictures("x", "a", 5)
    (path / "b").mkdir()
    refused("a class folder must have images", data.folder, path)
    pictures("x", "b", 5, size=7)
    refused("images must have one size, got 6x6 in", data.folder, path, in_memory=True)
    refused("images must have one size", data.folder(path).train.whole)
    refused("`size` must be one or two whole numbers", data.folder, path, size=0)
    refused("`path` must be a folder of images, got a file", data.folder, path / "a" / "0.png")
    whole = (path / "a" / "1.png").read_bytes()
    for bad in (b"", b"hello", whole[: len(whole) // 2]):
        (path / "a" / "1.png").write_bytes(bad)
        refused(
            f"cannot read the image {path / 'a' / '1.png'}",
            data.folder,
            path,
            size=6,
            in_memory=True,
        )
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused("pip install 'consilience[vision]'", data.folder, path)


def write(path: Path, n: int = 30, **changes) -> Path:
    rng = np.random.default_rng(0)
    held = {}
    for part, k in (("train", n), ("test", 10)):
        held[f"{part}_images"] = rng.integers(0, 256, (k, 5, 4), dtype=np.uint8)
        held[f"{part}_labels"] = (np.arange(k) % 3).astype(np.uint8)
    held |= changes
    np.savez_compressed(path, **{k: v for k, v in held.items() if v is not None})
    return path


def test_npz_file(tmp_path):
    path = write(tmp_path / "small.npz", class_names=np.array(["a", "b", "c"]))
    source = data.npz(path)
    assert source.name == "small"
    assert source.labels[2] == ("small", "c")
    assert [len(getattr(source, p)) for p in PARTS] == [27, 3, 10]
    assert source.test.whole()[0].shape == (10, 1, 5, 4)
    assert data.npz(path, flat=True).test.whole()[0].shape == (10, 20)
    few = data.npz(path, limit=9, validation=0)
    assert few.train.targets().bincount().tolist() == [3, 3, 3]
    assert len(few.test) == 10
    assert torch.equal(few.train.whole()[0], data.npz(path, limit=9, validation=0).train.whole()[0])
    colour = write(
        tmp_path / "colour.npz",
        train_images=np.zeros((30, 5, 4, 3), np.uint8),
        test_images=np.zeros((10, 5, 4, 3), np.uint8),
    )
    assert data.npz(colour).test.whole()[0].shape == (10, 3, 5, 4)


def test_npz_refuses(tmp_path, monkeypatch):
    path = write(tmp_path / "mnist.npz")
    refused("`limit` must be a whole number >= 1", data.npz, path, limit=0)
    refused("got no train_images28 in", data.npz, path, images="images28")
    refused("must have train_images, train_labels", data.npz, write(tmp_path / "part.npz", test_labels=None))
    refused(
        "equally many, got 30 and 3 (train)",
        data.npz,
        write(tmp_path / "odd.npz", train_labels=np.zeros(3, int)),
    )
    refused(
        "class numbers must be in 0..0", data.npz, write(tmp_path / "out.npz", class_names=np.array(["a"]))
    )
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, train_images=np.array([{}], dtype=object))
    refused(f"cannot read {pickled} as .npz: ", data.npz, pickled)
    whole = path.read_bytes()
    cut = tmp_path / "cut.npz"
    for bad in (b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:200] + bytes(300) + whole[500:]):
        cut.write_bytes(bad)
        refused(f"cannot read {cut} as .npz: ", data.npz, cut)
    packed = tmp_path / "packed.npz"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    assert torch.equal(data.npz(packed).test.whole()[0], data.npz(path).test.whole()[0])
    rng = np.random.default_rng(0)
    for file in (path, packed):
        whole = file.read_bytes()
        for at in rng.integers(0, len(whole), 60).tolist():
            cut.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            try:
                data.npz(cut)
            except ConsilienceError:
                refused(str(cut), data.npz, cut)
    monkeypatch.delenv("CONSILIENCE_DATA", raising=False)
    refused("no folder to find 'mnist' in: CONSILIENCE_DATA is not set", data.npz, "mnist")
    monkeypatch.setenv("CONSILIENCE_DATA", str(tmp_path))
    assert data.npz("mnist").name == "mnist"
    refused("got 'mnits'; nearest: mnist", data.npz, "mnits")
    monkeypatch.setenv("CONSILIENCE_DATA", str(tmp_path / "no"))
    refused(f"CONSILIENCE_DATA must name a folder, got {tmp_path / 'no'}.", data.npz, "mnist")
    (tmp_path / "no").mkdir()
    refused("CONSILIENCE_DATA must name a folder with .npz files", data.npz, "mnist")


def test_npz_of_jpegs_refuses(tmp_path):
    pytest.importorskip("PIL.Image", reason="pillow is missing")
    jpeg, labels = np.arange(20, dtype=np.uint8), np.zeros(2, np.uint8)

    def make(offsets):
        coded = {
            f"{p}_{k}": v
            for p in ("train", "test")
            for k, v in (("jpeg", jpeg), ("offsets", np.array(offsets)), ("labels", labels))
        }
        np.savez(tmp_path / "j.npz", **coded)
        return tmp_path / "j.npz"

    refused("JPEG offsets must rise from 0 to 20, the number of bytes", data.npz, make([0, 5, 30]))
    refused("JPEG offsets must rise", data.npz, make([0, 20, 20]))
    refused("cannot read the image train image 0 of", data.npz, make([0, 5, 20]))


def test_npz_mnist():
    need("mnist.npz")
    source = data.npz("mnist", limit=500)
    assert [len(getattr(source, p)) for p in PARTS] == [450, 50, 10000]
    assert source.train.whole()[0].shape[1:] == (1, 28, 28)
    assert source.train.whole()[0].max() == 1
    assert len(source.labels) == 10
    assert source.labels[3] == ("mnist", "3")


def test_npz_cifar10_jpeg():
    need("cifar10_jpeg.npz")
    pytest.importorskip("PIL.Image", reason="pillow is missing")
    source = data.npz("cifar10_jpeg", limit=200)
    assert [len(getattr(source, p)) for p in PARTS] == [180, 20, 10000]
    assert source.test.whole()[0].shape == (10000, 3, 32, 32)
    assert source.labels[0] == ("cifar10_jpeg", "airplane")


def test_npz_omniglot():
    need("omniglot_small.npz")
    source = data.npz("omniglot_small", images="images28")
    assert source.train.whole()[0].shape[1:] == (1, 28, 28)
    assert len(source.labels) == 242
    assert data.split_classes(source, 8)[0].name.startswith("omniglot_small/Balinese/character01-to-")


# Splits.


CLIENTS = {
    "dirichlet": lambda s, n, **k: data.dirichlet(s, n, 0.5, **k),
    "iid": data.iid,
    "quantity": data.quantity_skew,
    "shards": data.shards,
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("split", CLIENTS)
def test_clients_are_a_partition(split, streamed):
    source = numbered(streamed=streamed)
    parts = CLIENTS[split](source, 5)
    assert [s.name for s in parts] == [f"numbered/client-{i}" for i in range(5)]
    for part in ("train", "validation"):
        assert sorted(i for s in parts for i in ids(s, part)) == sorted(ids(source, part))
    assert all(s.test is source.test and s.classes == source.classes and s.task == "numbered" for s in parts)
    local = CLIENTS[split](source, 5, local_test=True)
    assert sorted(i for s in local for i in ids(s, "test")) == sorted(ids(source, "test"))
    again, other = CLIENTS[split](source, 5), CLIENTS[split](source, 5, seed=1)
    assert (
        [ids(s, "train") for s in parts]
        == [ids(s, "train") for s in again]
        == [ids(s, "train") for s in local]
    )
    assert [ids(s, "train") for s in parts] != [ids(s, "train") for s in other]


def test_splits_leave_the_global_generator_alone():
    source = data.digits(image=True)
    before = torch.get_rng_state()
    _all_splits(source)
    assert torch.equal(before, torch.get_rng_state())


def test_dirichlet_limits():
    source = data.digits()
    whole = source.train.targets().bincount()
    for s in data.dirichlet(source, 4, 1e7):
        assert (s.train.targets().bincount() - whole / 4).abs().max() <= 1
    skewed = data.dirichlet(source, 4, 1e-3)
    assert sum(len(s.train.targets().unique()) for s in skewed) <= 12
    for s in skewed:
        assert len(s.train) >= 2
        assert set(s.validation.targets().tolist()) <= set(s.train.targets().tolist())
    sizes = torch.tensor([len(s.train) for s in data.quantity_skew(source, 5, power=1.0)])
    assert sizes.sum() == len(source.train)
    assert (sizes - len(source.train) / torch.arange(1, 6) / 2.28333).abs().max() <= 1


def test_dirichlet_shares_are_dirichlet():
    from consilience.core.params import key
    from consilience.data._splits import dirichlet_shares

    for alpha in (0.05, 1.0, 5.0):
        p = dirichlet_shares(20000, 4, alpha, key(0, alpha))
        assert torch.allclose(p.mean(0), torch.full((4,), 0.25, dtype=p.dtype), atol=0.01)
        assert torch.allclose(
            p.var(0), torch.full((4,), 0.25 * 0.75 / (4 * alpha + 1), dtype=p.dtype), rtol=0.05
        )
    assert torch.isfinite(dirichlet_shares(100, 4, 1e-5, key(0))).all()


def test_shards_have_few_classes():
    parts = data.shards(numbered(600, 6), 6, 1)
    assert all(len(s.train.targets().unique()) <= 2 for s in parts)


@pytest.mark.parametrize("streamed", [False, True])
def test_split_classes(streamed):
    source = numbered(streamed=streamed)
    parts = data.split_classes(source, 4)
    assert [s.classes for s in parts] == [(0, 1), (2, 3), (4,), (5,)]
    assert (
        [s.name for s in parts]
        == ["numbered/0-1", "numbered/2-3", "numbered/4", "numbered/5"]
        == [s.task for s in parts]
    )
    for part in PARTS:
        assert sorted(i for s in parts for i in ids(s, part)) == sorted(ids(source, part))
        assert all(set(getattr(s, part).targets().tolist()) == set(s.classes) for s in parts)
    assert [s.classes for s in data.split_classes(source, 3, order=[5, "4", 3, 2, 1, 0])] == [
        (5, 4),
        (3, 2),
        (1, 0),
    ]
    drawn = [s.classes for s in data.split_classes(source, 3, seed=1)]
    assert drawn == [s.classes for s in data.split_classes(source, 3, seed=1)]
    assert sorted(sum(drawn, ())) == list(range(6))
    assert drawn != [s.classes for s in data.split_classes(source, 3, seed=2)]
    assert data.split_classes(source, 1)[0].name == "numbered/0-to-5"


def test_permute():
    source = data.digits(image=True)
    first, second, _ = data.permute(source, 3)
    assert first.train is source.train
    assert first.labels == source.labels
    for part in PARTS:
        a, b = getattr(source, part).whole()[0], getattr(second, part).whole()[0]
        assert a.shape == b.shape
        assert not torch.equal(a, b)
        assert torch.equal(a.flatten(1).sort(1).values, b.flatten(1).sort(1).values)
    marks = torch.arange(64.0).expand(20, 64)
    marked = data.permute(data.arrays(marks, torch.arange(20) % 2, name="digits"), 2)[1]
    order = marked.train.whole()[0][0].long()
    assert torch.equal(source.test.whole()[0].flatten(1)[:, order], second.test.whole()[0].flatten(1))
    assert torch.equal(second.test.whole()[0], data.permute(source, 2)[1].test.whole()[0])
    assert not torch.equal(second.test.whole()[0], data.permute(source, 2, seed=1)[1].test.whole()[0])


def test_rotate():
    source = data.digits(image=True)
    x = source.test.whole()[0]
    turned = data.rotate(source, 4)
    assert [s.name for s in turned] == [f"digits/rotated-{a}" for a in (0, 90, 180, 270)]
    assert turned[0].test is source.test
    for k, s in enumerate(turned):
        assert torch.equal(s.test.whole()[0], torch.rot90(x, k, (2, 3)))
    near = data.rotate(source, [90 + 1e-4])[0].test.whole()[0]
    assert torch.allclose(near, torch.rot90(x, 1, (2, 3)), atol=1e-3)
    flat = data.rotate(data.digits(), [30.0], side=8)[0].test.whole()[0]
    assert torch.equal(flat, data.rotate(source, [30.0])[0].test.whole()[0].flatten(1))
    wide = torch.zeros(4, 1, 5, 9)
    wide[:, :, 2, 6] = 1
    tall = data.rotate(data.arrays(wide, torch.arange(4) % 2, test=0.5, validation=0), [90.0])[
        0
    ].train.whole()[0]
    assert torch.allclose(tall[0, 0, 0, 4], torch.tensor(1.0), atol=1e-4)
    assert abs(float(tall[0].sum()) - 1) < 1e-3


def test_streams_and_nesting():
    tasks = data.split_classes(data.digits(), 5)
    assert data.streams(tasks, 2) == [[tasks[0], tasks[2], tasks[4]], [tasks[1], tasks[3]]]
    nested = data.iid(tasks[1], 2)
    assert nested[1].name == "digits/2-3/client-1"
    assert nested[1].task == "digits/2-3"
    assert nested[1].classes == (2, 3)


@pytest.mark.parametrize(
    ("rule", "f"),
    [
        ("`n` must be a whole number >= 1, got 0.", lambda s: data.split_classes(s, 0)),
        (
            "`n` must be at most the number of classes, 6, got 7.",
            lambda s: data.split_classes(s, 7),
        ),
        ("got both `order` and `seed`", lambda s: data.split_classes(s, 2, order=range(6), seed=0)),
        (
            "`order` must list every class of 'numbered' once, got [0, 1].",
            lambda s: data.split_classes(s, 2, order=[0, 1]),
        ),
        ("`order` must list every class", lambda s: data.split_classes(s, 2, order=["x", 1, 2, 3, 4, 5])),
        ("split_classes needs a source of classes", lambda s: data.split_classes(data.diabetes(), 2)),
        ("`n` must be a whole number >= 1, got 1.5.", lambda s: data.permute(s, 1.5)),
        ("rotate needs images [N, C, H, W]", lambda s: data.rotate(s, 2)),
        ("`side` must be that of flat square images", lambda s: data.rotate(s, 2, side=3)),
        ("`angles` must be a number of sources or finite degrees", lambda s: data.rotate(s, [math.nan])),
        ("`angles` must be a whole number >= 1", lambda s: data.rotate(s, 0)),
        (
            "rotate needs images of fractions, got torch.int64.",
            lambda s: data.rotate(s.map(x=lambda x: x.long()), [1], side=1),
        ),
        ("`angles` must be different", lambda s: data.rotate(s, [1, 1])),
        ("`alpha` must be positive and finite, got 0.", lambda s: data.dirichlet(s, 2, 0)),
        ("`clients` must be a whole number >= 1", lambda s: data.dirichlet(s, -1, 1.0)),
        (
            "clients x `least` must not outnumber the training examples of 'numbered', got 100 for 86.",
            lambda s: data.dirichlet(s, 50, 1.0),
        ),
        (
            "raise `alpha` or take fewer clients.",
            lambda s: data.dirichlet(s, 8, 0.01, least=10),
        ),
        ("dirichlet needs a source of classes", lambda s: data.dirichlet(data.diabetes(), 2, 1.0)),
        (
            "clients must not outnumber the training examples of 'numbered', got 87 for 86.",
            lambda s: data.iid(s, 87),
        ),
        ("`power` must be positive and finite", lambda s: data.quantity_skew(s, 2, power=-1.0)),
        (
            "got 0 for the smallest with `power=3.0` and 20 clients; lower `power`",
            lambda s: data.quantity_skew(s, 20, power=3.0),
        ),
        (
            "shards must not outnumber the training examples of 'numbered', got 100 for 86.",
            lambda s: data.shards(s, 50),
        ),
        ("`shards_per_client` must be a whole number >= 1", lambda s: data.shards(s, 5, 0)),
        ("every client must have a source, got 2 clients and 1 sources.", lambda s: data.streams([s], 2)),
    ],
)
def test_splits_refuse(rule, f):
    refused(rule, f, numbered())


# Samplers.


@pytest.mark.parametrize(
    "sampler", [Shuffle(), Shuffle(drop_last=True), InOrder(), Balanced(), Balanced(1.0), Balanced(3.0)]
)
def test_samplers_are_keyed(sampler: Sampler):
    y = torch.tensor([0] * 25 + [1] * 5 + [2] * 3)

    def plan(seed: int) -> list[list[int]]:
        return [b.tolist() for b in sampler.plan(y, 8, 0, torch.Generator().manual_seed(seed))]

    assert plan(0) == plan(0)
    assert isinstance(sampler, InOrder) == (plan(0) == plan(1))
    assert all(len(b) == 8 for b in plan(0)[:-1])
    flat = [i for b in plan(0) for i in b]
    assert len(flat) == (32 if sampler == Shuffle(drop_last=True) else 33)
    if not isinstance(sampler, Balanced) or sampler.temperature == 1:
        assert len(set(flat)) == len(flat)


def test_balanced_shares():
    y = torch.tensor([0] * 80 + [1] * 20)

    def counts(t: float) -> Tensor:
        return torch.cat(Balanced(t).plan(y, 8, 0, torch.Generator().manual_seed(0)))

    assert y[counts(1.0)].bincount().tolist() == [80, 20]
    assert y[counts(math.inf)].bincount().tolist() == [50, 50]
    assert y[counts(2.0)].bincount().tolist() == [67, 33]
    seen = counts(math.inf).bincount(minlength=100)
    assert set(seen[80:].tolist()) == {2, 3}
    assert set(seen[:80].tolist()) == {0, 1}
    refused("`temperature` must be > 0, got 0.", Balanced, 0)
    refused("Balanced needs classes as targets", Balanced().plan, torch.rand(4, 1), 2, 0, torch.Generator())


def test_samplers_load_when_first_used():
    code = (
        "import sys, consilience as cs\n"
        "lazy = 'torch' not in sys.modules and 'samplers' in dir(cs.data)\n"
        "print(lazy, cs.data.samplers.Balanced().temperature, 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert out.stdout.strip() == "True inf True"
    with pytest.raises(AttributeError, match="has no attribute 'sampler'"):
        _ = data.sampler


# Splits of the same inputs


def same_inputs(kind: str, n: int = 40):
    """The inputs of two tasks, in memory, of one tensor or of ragged parts."""
    g = torch.Generator().manual_seed(0)
    if kind == "images":
        return torch.rand(n, 3, 8, 8, generator=g)
    return [torch.randint(0, 50, (3 + i % 4,), generator=g) for i in range(n)]


@pytest.mark.parametrize("kind", ["images", "ids"])
def test_sources_of_the_same_inputs_have_one_split_or_are_refused(kind):
    """Each `arrays` is split by its name and classes, so that one task would train on tests of another."""
    x, y = same_inputs(kind), torch.arange(40) % 4
    targets = {"four": y, "two": y % 2}
    apart = [data.arrays(x, own, test=0.25, name=name) for name, own in targets.items()]
    with pytest.raises(
        ConsilienceError, match="'four' and 'two' one trains on tests of the other; split once"
    ):
        settings.continual(apart, "task")
    # In another order, and with the same classes, it is the same fault.
    back = x.flip(0) if kind == "images" else x[::-1]
    turned = [apart[0], data.arrays(back, y.flip(0), test=0.25, name="turned")]
    with pytest.raises(ConsilienceError, match="must have the same test examples"):
        settings.multitask(turned, "task")

    settings.continual(data.tasks(x, targets, test=0.25), "task")
    held = (x[:10], y[:10])
    settings.continual([data.arrays(x[10:], y[10:], test=held, name=n) for n in targets], "task")


def test_other_inputs_may_have_any_split():
    source = data.digits()
    settings.continual(data.permute(source, 3), "domain")
    settings.continual([source.map(name=name) for name in ("a", "b")], "domain")
    settings.federated(data.iid(source, 4), rounds=1)
    # Of a few texts that come often, every split has all in its own training.
    few = [data.arrays(torch.arange(40)[:, None] % 5, torch.arange(40) % 5, name=name) for name in "ab"]
    settings.continual(few, "domain")
    # One input of forty differs: these may be two sites with some examples in common.
    x, y = same_inputs("images"), torch.arange(40) % 4
    other = x.clone()
    other[3] += 1
    settings.continual([data.arrays(x, y, name="a"), data.arrays(other, y, name="b")])
