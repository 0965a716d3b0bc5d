"""Blurry boundaries, new instances and classes, CORe50 and CLEAR from folders laid out as published."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

import consilience as cs
from consilience import data, methods, models, settings
from consilience.core.errors import ConsilienceError
from consilience.core.schedule import reframe
from consilience.core.source import Examples, Source, Stream, Tensors
from consilience.data._scenarios import joined

PARTS = ("train", "validation", "test")


def numbered(n: int = 120, classes: int = 6, streamed: bool = False, validation: float = 0.1) -> Source:
    """Examples whose first input is their number and whose class is that number modulo the classes."""
    x = torch.stack([torch.arange(n).float(), torch.zeros(n)], 1)
    y = torch.arange(n) % classes
    make = data.stream if streamed else lambda d, **k: data.arrays(*d.tensors, **k)
    return make(
        TensorDataset(x, y), name="numbered", classes=[str(i) for i in range(classes)], validation=validation
    )


def ids(examples: Examples) -> list[int]:
    return [] if len(examples) == 0 else examples.whole()[0][:, 0].long().tolist()


def refused(rule: str, f, *args, **kwargs) -> None:
    with pytest.raises(ConsilienceError) as e:
        f(*args, **kwargs)
    assert rule in str(e.value), str(e.value)
    assert "\n" not in str(e.value)


def quick(sources, size: int, **kwargs):
    """A short continual run."""
    training = cs.Training(epochs=1, batch_size=16, lr=0.1)
    return cs.run(
        settings.continual(sources, "class"),
        methods.finetune(),
        models.mlp(size, (8,), len(sources[0].labels)),
        training,
        **kwargs,
    )


# Blurry.


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    n=st.integers(30, 150),
    parts=st.integers(2, 6),
    share=st.floats(0, 0.99),
    to=st.sampled_from(["all", "neighbours"]),
    streamed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blurry_is_a_partition(n, parts, share, to, streamed, seed):
    whole = numbered(n, streamed=streamed)
    sources = data.split_classes(whole, parts)
    mixed = data.blurry(sources, share, to, seed)
    assert [(s.name, s.task) for s in mixed] == [(s.name, s.task) for s in sources]
    assert all(a.test is b.test for a, b in zip(mixed, sources, strict=True))
    for part in ("train", "validation"):
        assert sorted(i for s in mixed for i in ids(getattr(s, part))) == sorted(ids(getattr(whole, part)))
        given_away = Counter()
        for i, (s, old) in enumerate(zip(mixed, sources, strict=True)):
            own, new = getattr(old, part), getattr(s, part)
            assert isinstance(new, Stream if streamed else Tensors)
            kept = [k for k in ids(new) if k in ids(own)]
            assert (
                [k % 6 for k in ids(new)]
                == new.targets().tolist()
                == ([] if not len(new) else new.whole()[1].tolist())
            )
            assert kept == sorted(kept, key=ids(own).index)
            heirs = len(sources) - 1 if to == "all" else (i > 0) + (i < parts - 1)
            quota = round(share * len(own) * (1 if to == "all" else heirs / 2))
            classes = own.targets().unique(return_counts=True)[1]
            assert len(own) - len(kept) == min(quota, len(own) - len(kept)) and len(kept) >= len(classes)
            if (
                share * int(classes.min() if len(classes) else 0)
                < int(classes.min() if len(classes) else 0) - 1
            ):
                assert len(own) - len(kept) == quota  # no class was at its last example
            got = Counter(
                j for j, o in enumerate(sources) for k in ids(new) if k in ids(getattr(o, part)) and j != i
            )
            if to == "neighbours":
                assert all(abs(j - i) == 1 for j in got)
            given_away[i] = len(own) - len(kept)
            for j, count in got.items():
                sent = Counter(
                    m
                    for m, o in enumerate(mixed)
                    for k in ids(getattr(o, part))
                    if k in ids(getattr(sources[j], part)) and m != j
                )
                assert count == sent[i] and max(sent.values()) - min(sent.values()) <= 1
    for s, old in zip(mixed, sources, strict=True):
        there = set(s.train.targets().tolist()) | set(s.validation.targets().tolist())
        assert set(s.classes) == there | set(old.classes) and s.classes[: len(old.classes)] == old.classes
    if share == 0:
        assert all(a is b for a, b in zip(mixed, sources, strict=True))


def test_blurry_counts_exactly():
    """Three sources of 100, two classes each: 30 leave each, 15 to each other one, equally many per class."""
    x = torch.arange(300).float()[:, None]
    whole = data.arrays(x, torch.arange(300) % 6, test=(x[:6], torch.arange(6)), validation=0)
    sources = data.split_classes(whole, 3)
    mixed = data.blurry(sources, 0.3)
    for i, s in enumerate(mixed):
        counts = s.train.targets().bincount(minlength=6).view(3, 2).sum(1)
        assert counts.tolist() == [70 if j == i else 15 for j in range(3)]
        assert s.train.targets().bincount(minlength=6)[2 * i : 2 * i + 2].tolist() == [35, 35]
        assert len(s.classes) == 6 and s.classes[:2] == sources[i].classes
        assert ids(s.train) != sorted(
            ids(s.train), key=lambda k: (k % 6 // 2 != i, k % 6 // 2, k)
        )  # what arrives is spread
    near = data.blurry(sources, 0.3, to="neighbours")
    assert [s.train.targets().bincount(minlength=6).view(3, 2).sum(1).tolist() for s in near] == [
        [85, 15, 0],
        [15, 70, 15],
        [0, 15, 85],
    ]
    odd = data.blurry(data.split_classes(whole, 6), 0.14)  # 7 of 50 leave, to five others: sizes still stay
    assert [len(s.train) for s in odd] == [50] * 6
    again, other = data.blurry(sources, 0.3), data.blurry(sources, 0.3, seed=1)
    assert [ids(s.train) for s in again] == [ids(s.train) for s in mixed] != [ids(s.train) for s in other]


def test_blurry_of_values_and_of_different_streams():
    values = data.iid(data.diabetes(), 2)
    mixed = data.blurry(values, 0.2)
    assert [len(s.train) for s in mixed] == [len(s.train) for s in values] and mixed[0].classes == values[
        0
    ].classes
    x, y = torch.rand(40, 1, 4, 4), torch.arange(40) % 2
    tensors = data.arrays(x, y, name="d")
    both = [data.rotate(s, [0, 30.0]) for s in (tensors, data.stream(TensorDataset(x, y), name="d"))]
    for a, b in zip(*(data.blurry(s, 0.5) for s in both), strict=True):
        assert isinstance(b.train, Stream) and a.classes == (0, 1)
        assert torch.equal(a.train.targets(), b.train.targets())
        plan = [torch.tensor([3, 1, 20]), torch.tensor([0])]
        for (xa, ya), (xb, yb) in zip(
            a.train.batches(plan), b.train.map(y=lambda v: v + 1).batches(plan), strict=True
        ):
            assert torch.allclose(xa, xb, atol=1e-6) and torch.equal(ya + 1, yb)
    mix = joined([both[0][0].train, both[1][1].train])
    assert isinstance(mix, Stream) and torch.allclose(
        mix.whole()[0][-1], both[0][1].train.whole()[0][-1], atol=1e-6
    )


def test_blurry_refuses():
    sources = data.split_classes(numbered(), 2)
    refused("`share` must be a fraction in [0, 1), got 1.", data.blurry, sources, 1)
    refused('`to` must be "all" or "neighbours", got \'some\'.', data.blurry, sources, 0.1, "some")
    refused("blurry needs a list of two or more sources, got 1 Source", data.blurry, sources[:1])
    refused("blurry needs a list of two or more sources, got 2 list", data.blurry, [sources, sources])
    refused("must have the same labels, got different ones", data.blurry, [sources[0], data.wine()])


def test_blurry_runs_and_loses_less():
    """With a share of the others in every source, plain fine-tuning forgets less."""
    sources = data.split_classes(data.digits(), 5)
    training = cs.Training(epochs=5, lr=0.1)

    def final(s):
        run = cs.run(settings.continual(s, "class"), methods.finetune(), models.mlp(64, (32,)), training)
        return float(np.mean(run.matrix[-1]))

    assert final(data.blurry(sources, 0.3)) > final(sources) + 0.2


# New instances.


def filmed(streamed: bool = False, classes: int = 10, groups: int = 4, each: int = 2, validation: int = 0):
    """Every class in every group, `each` examples; input: (number, group)."""
    table = [(c, g) for g in range(groups) for c in range(classes) for _ in range(each)]
    y, of = (torch.tensor(v) for v in zip(*table, strict=True))
    x = torch.stack([torch.arange(len(y)).float(), of.float()], 1)
    test = (torch.zeros(classes, 2), torch.arange(classes))
    if streamed:
        source = data.stream(TensorDataset(x, y), TensorDataset(*test), name="films", validation=0)
    else:
        source = data.arrays(x, y, test, name="films", validation=0)
    return source, of


@pytest.mark.parametrize("streamed", [False, True])
def test_new_instances(streamed):
    source, of = filmed(streamed)
    parts = data.new_instances(source, of.numpy())
    assert [s.name for s in parts] == [f"films/group-{g}" for g in range(4)] == [s.task for s in parts]
    for g, s in enumerate(parts):
        assert s.test is source.test and s.classes == source.classes
        assert ids(s.train) == (of == g).nonzero().flatten().tolist()
    assert [s.name[-1] for s in data.new_instances(source, of, order=[3, 1, 0, 2])] == list("3102")
    drawn = [s.name for s in data.new_instances(source, of, seed=1)]
    assert sorted(drawn) == sorted(s.name for s in parts) and drawn == [
        s.name for s in data.new_instances(source, of, seed=1)
    ]
    few = data.new_instances(source, [int(i > 3) for i in range(len(of))])
    assert [s.classes for s in few] == [(0, 1), tuple(range(10))]


def test_groups_of_validation_examples_come_after():
    source = numbered(60, validation=0.2)
    of = torch.tensor([i // 30 for i in ids(source.train) + ids(source.validation)])
    for g, s in enumerate(data.new_instances(source, of)):
        assert all(i // 30 == g for i in ids(s.train) + ids(s.validation)) and len(s.validation)


@pytest.mark.parametrize(("each", "count"), [(5, 79), (2, 196), (1, 391)])
def test_new_instances_and_classes_counts_as_core50(each, count):
    source, of = filmed(classes=50, groups=8, each=1)
    parts = data.new_instances_and_classes(source, of, first=10, each=each)
    assert len(parts) == count and all(s.test is source.test for s in parts)
    assert sorted(i for s in parts for i in ids(s.train)) == list(range(400))
    assert parts[0].classes == tuple(range(10)) and set(parts[0].train.whole()[0][:, 1].tolist()) == {0.0}
    for s in parts[1:]:
        assert len(s.classes) == len(s.train) == each and len(s.train.whole()[0][:, 1].unique()) == 1
    order = [s.classes for s in parts]
    assert order != [
        s.classes for s in data.new_instances_and_classes(source, of, first=10, each=each, seed=1)
    ]
    assert order == [s.classes for s in data.new_instances_and_classes(source, of, first=10, each=each)]


def test_new_instances_refuse():
    source, of = filmed()
    refused(
        "one for each of 80 training and then each of 0 validation examples, got",
        data.new_instances,
        source,
        of[:-1],
    )
    refused("`groups` must be whole numbers", data.new_instances, source, of.double())
    refused(
        "`order` must list every one of the groups once, got [0, 1].",
        data.new_instances,
        source,
        of,
        order=[0, 1],
    )
    refused("got both `order` and `seed`", data.new_instances, source, of, order=[0, 1, 2, 3], seed=0)
    refused("needs a source of classes", data.new_instances_and_classes, data.diabetes(), of)
    refused("`each` must be a whole number >= 1", data.new_instances_and_classes, source, of, each=0)


def test_a_test_may_hold_classes_that_its_source_does_not_teach():
    """One test for all: it is framed once, by all classes, so its scores are those of the plain test."""
    source, of = filmed()
    parts = data.new_instances_and_classes(source, of, each=3)
    framed, frame = reframe(parts, "class")
    assert all(s.test is source.test for s in framed) and len(frame.labels) == 10
    half, _ = reframe(data.split_classes(source, 2)[1:], "class")
    assert half[0].test.targets().tolist() == [5, 6, 7, 8, 9]
    # Nobody teaches 0, 1 and 2: they keep their columns, and no answer of a trained model is one of them.
    known = [s for s in parts if 0 not in s.classes]
    framed, frame = reframe(known, "class")
    assert frame.labels == source.labels and len({id(s.test) for s in framed}) == 1
    assert framed[0].test.targets().tolist() == [*range(10)]
    result = quick(parts, 2)
    assert np.allclose(result.matrix, result.matrix[:, :1])  # the same test, the same score


# CORe50.

FRAMES = 2
TAUGHT = (1, 2, 4, 5, 6, 8, 9, 11)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """core50_128x128 with two frames of 2x2 pixels of every object in every session; a pixel says which."""
    image = pytest.importorskip("PIL.Image", reason="pillow is missing")
    root = tmp_path_factory.mktemp("core50")
    for s in range(1, 12):
        for o in range(1, 51):
            here = root / "core50_128x128" / f"s{s}" / f"o{o}"
            here.mkdir(parents=True)
            for f in range(FRAMES):
                pixels = np.empty((2, 2, 3), np.uint8)
                pixels[:] = (s, o, f)
                image.fromarray(pixels).save(here / f"C_{s:02d}_{o:02d}_{f:03d}.png")
    return root


def seen(examples: Examples) -> list[tuple[int, int, int]]:
    """(session, object, frame) of every image, read back from its pixels."""
    return [tuple(v) for v in (examples.whole()[0][:, :, 0, 0] * 255).round().long().tolist()]


def frames(sessions, objects) -> list[tuple[int, int, int]]:
    return [(s, o, f) for s in sessions for o in objects for f in range(FRAMES)]


def lists(root: Path, where: str, batches: list[list[tuple[int, int, int]]], number=lambda o: o - 1) -> None:
    """File lists as published: one line an image, s1/o1/C_01_01_000.png 0."""
    folder = root / where
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in [
        *((f"train_batch_{i:02d}", b) for i, b in enumerate(batches)),
        ("test", frames((3, 7, 10), range(1, 51))),
    ]:
        lines = "".join(f"s{s}/o{o}/C_{s:02d}_{o:02d}_{f:03d}.png {number(o)}\n" for s, o, f in own)
        (folder / f"{name}_filelist.txt").write_text(lines)


@pytest.fixture
def linked(films, tmp_path) -> Path:
    """The same films in a folder that may be given lists."""
    (tmp_path / "core50_128x128").symlink_to(films / "core50_128x128")
    return tmp_path


def shared(sources: list[Source]) -> None:
    assert all(
        s.test is sources[0].test and s.labels == sources[0].labels and s.task == s.name for s in sources
    )
    assert seen(sources[0].test) == frames((3, 7, 10), range(1, 51))
    for s in sources:
        assert s.classes == tuple(sorted(set(s.train.targets().tolist())))


@pytest.mark.parametrize("in_memory", [False, True])
def test_core50_ni_by_rule(films, in_memory):
    sources = data.core50(films, in_memory=in_memory)
    shared(sources)
    assert [s.name for s in sources] == [f"core50/ni-{i}" for i in range(8)]
    met = [seen(s.train)[0][0] for s in sources]
    assert sorted(met) == sorted(TAUGHT)
    for session, s in zip(met, sources, strict=True):
        assert isinstance(s.train, Tensors if in_memory else Stream) and len(s.validation) == 0
        assert seen(s.train) == frames([session], range(1, 51))
        assert s.train.targets().tolist() == [o - 1 for _, o, _ in seen(s.train)]
    assert met != [seen(s.train)[0][0] for s in data.core50(films / "core50_128x128", run=1)]
    assert sources[0].labels[0] == ("core50", "plug_adapter1") and sources[0].labels[49] == (
        "core50",
        "remote_control5",
    )


def test_core50_nc_by_rule(films):
    sources = data.core50(films, "nc")
    shared(sources)
    objects = [sorted({o for _, o, _ in seen(s.train)}) for s in sources]
    assert objects[0] == [1, 6, 11, 16, 21, 26, 31, 36, 41, 46]
    published = [
        [2, 7, 12, 17, 22],
        [27, 32, 37, 42, 47],
        [3, 8, 13, 18, 23],
        [28, 33, 38, 43, 48],
        [4, 9, 14, 19, 24],
        [29, 34, 39, 44, 49],
        [5, 10, 15, 20, 25],
        [30, 35, 40, 45, 50],
    ]
    assert sorted(objects[1:]) == sorted(published) != objects[1:]
    for own, s in zip(objects, sources, strict=True):
        assert sorted(seen(s.train)) == sorted(frames(TAUGHT, own))
        assert s.classes == tuple(o - 1 for o in own)


def test_core50_by_category_with_validation(films):
    sources = data.core50(
        films, "nc", object_level=False, validation=0.25, name="films", space="things", size=(1, 3), grey=True
    )
    assert sources[0].classes == tuple(range(10)) and len(sources[1].classes) == 5
    assert sources[0].labels[2] == ("things", "scissor") and sources[0].name == "films/nc-0"
    assert sources[0].train.whole()[0].shape[1:] == (1, 1, 3)
    assert [(len(s.train), len(s.validation)) for s in sources] == [(120, 40)] + [(60, 20)] * 8


def nic(seed: int) -> list[list[tuple[int, int, int]]]:
    """79 batches: ten objects in session 1, then every five objects of a session, in some order."""
    first = [5 * c + 1 for c in range(10)]
    rest = [o for o in range(1, 51) if o not in first]
    units = [([s], first[i : i + 5]) for s in TAUGHT[1:] for i in (0, 5)]
    units += [([s], rest[i : i + 5]) for s in TAUGHT for i in range(0, 40, 5)]
    turn = np.random.default_rng(seed).permutation(len(units))
    return [frames([1], first), *(frames(*units[i]) for i in turn)]


def test_core50_from_file_lists(linked):
    renumber = np.random.default_rng(0).permutation(50).tolist()
    published = {run: nic(run) for run in (0, 1)}
    for run, batches in published.items():
        lists(linked, f"batches_filelists/NIC_inc/run{run}", batches)
        lists(
            linked,
            f"batches_filelists/NC_inc/run{run}",
            [frames(TAUGHT, range(5 * i + 1, 5 * i + 6)) for i in range(9)],
            number=lambda o: renumber[o - 1],
        )
    lists(linked, "NIC_v2_79_cat/run0", published[1], number=lambda o: (o - 1) // 5)
    for run, batches in published.items():
        sources = data.core50(linked, "nic", run=run)
        shared(sources)
        assert len(sources) == 79 and sources[7].name == "core50/nic-07"
        assert [seen(s.train) for s in sources] == batches
    sources = data.core50(linked / "core50_128x128", "nc")  # the lists are next to the folder of images
    assert [sorted({o for _, o, _ in seen(s.train)})[0] for s in sources] == [5 * i + 1 for i in range(9)]
    assert all(
        s.train.targets().tolist() == [o - 1 for _, o, _ in seen(s.train)] for s in sources
    )  # whatever their numbers
    sources = data.core50(linked, "nicv2_79", object_level=False)
    assert [seen(s.train) for s in sources] == published[1]
    assert all(s.train.targets().tolist() == [(o - 1) // 5 for _, o, _ in seen(s.train)] for s in sources)
    refused(
        f"got 2; {linked / 'batches_filelists' / 'NIC_inc'} has ['run0', 'run1'].",
        data.core50,
        linked,
        "nic",
        run=2,
    )


def test_core50_refuses(films, linked, tmp_path):
    refused("'nci'", data.core50, films, "nci")
    refused("`run` must be a whole number >= 0, got -1.", data.core50, films, run=-1)
    refused("`path` must be a folder of images, got nothing at", data.core50, films / "no")
    refused("`validation` must be a fraction in [0, 1)", data.core50, films, validation=1.0)
    for scenario in ("nic", "nicv2_391"):
        refused("need the file lists that CORe50 publishes", data.core50, films, scenario)
    refused("got no s1 in", data.core50, films / "core50_128x128" / "s1")
    some = tmp_path / "some"
    for s in (1, 2, 4):
        (some / f"s{s}").mkdir(parents=True)
    refused("got no s3, s5, s6, s7, s8, s9, s10, s11 in", data.core50, some)
    for s in range(1, 12):
        (some / f"s{s}").mkdir(exist_ok=True)
    refused(f"got none in {some / 's1' / 'o1'}.", data.core50, some)
    where = "batches_filelists/NI_inc/run0"
    good = [frames([s], range(1, 51)) for s in TAUGHT]
    lists(linked, where, good[:7])
    refused("NI_inc must have file lists of train batches 0 .. 7, got 7 in", data.core50, linked)
    lists(linked, where, good)
    file = linked / where / "train_batch_03_filelist.txt"
    for text, rule in (
        (
            "s1/o51/C_01_51_000.png 0\n",
            "must be named as s1/o1/C_01_01_000.png, got 's1/o51/C_01_51_000.png'",
        ),
        (
            "s1/o1/C_01_01_000.png\n",
            "lines of a file list must be a path and a number, got 's1/o1/C_01_01_000.png' in line 1",
        ),
        ("\n", "a file list must name images"),
    ):
        file.write_text(text)
        refused(rule, data.core50, linked)
    file.write_text("s1/o1/C_01_01_777.png 0\n")
    missing = linked / "core50_128x128" / "s1" / "o1" / "C_01_01_777.png"
    refused(f"cannot read the image {missing}: ", data.core50(linked)[3].train.whole)
    (linked / where / "test_filelist.txt").unlink()
    refused(f"cannot read the file list {linked / where / 'test_filelist.txt'}: ", data.core50, linked)


def test_core50_unreadable_image(films, tmp_path):
    import shutil

    shutil.copytree(films / "core50_128x128", tmp_path / "core50_128x128")
    bad = tmp_path / "core50_128x128" / "s4" / "o7" / "C_04_07_001.png"
    bad.write_bytes(b"no image")
    sources = data.core50(tmp_path)
    refused(f"cannot read the image {bad}: ", lambda: [s.train.whole() for s in sources])
    refused(f"cannot read the image {bad}: ", data.core50, tmp_path, in_memory=True)


def test_core50_runs(films):
    for scenario in ("ni", "nc"):
        result = quick(data.core50(films, scenario, object_level=False, in_memory=True), 12)
        assert result.matrix.shape[0] == len(result.matrix) and np.isfinite(result.matrix).all()
        assert np.allclose(result.matrix, result.matrix[:, :1])
    streamed = data.blurry(data.core50(films, object_level=False)[:2], 0.5)
    assert {s for s, _, _ in seen(streamed[0].train)} == {s for s, _, _ in seen(streamed[1].train)}
    assert np.isfinite(quick(streamed, 12).matrix).all()


# CLEAR.

NAMES = ["bus", "camera", "BACKGROUND"]


def photographs(
    root: Path, buckets=range(4), each: int = 10, start: int = 0, names=NAMES, text: bool = True
) -> None:
    """labeled_images/<bucket>/<class>/<number>.jpg whose grey says which bucket and class."""
    image = pytest.importorskip("PIL.Image", reason="pillow is missing")
    root.mkdir(parents=True, exist_ok=True)
    if text:
        (root / "class_names.txt").write_text("\n".join(names))
    for b in buckets:
        for i, c in enumerate(names):
            here = root / "labeled_images" / str(b) / c
            here.mkdir(parents=True, exist_ok=True)
            for k in range(start, start + each):
                pixels = np.full((3 + k % 2, 4, 3), 20 * b + 5 * i, np.uint8)
                image.fromarray(pixels).save(here / f"{k}.jpg", quality=100)


def files(examples: Examples) -> list[str]:
    """The files of a stream: bucket/class/number."""
    paths = [examples.dataset.dataset.paths[i] for i in examples.index.tolist()]
    return ["/".join(p.with_suffix("").parts[-3:]) for p in paths]


def every(bucket: int, numbers) -> list[str]:
    return [f"{bucket}/{c}/{k}" for c in NAMES for k in numbers]


def right(sources: list[Source]) -> None:
    for s in sources:
        assert s.labels == tuple(("clear", c) for c in NAMES) and s.classes == (0, 1, 2) and s.task == s.name
        for part in PARTS:
            examples = getattr(s, part)
            assert [NAMES.index(f.split("/")[1]) for f in files(examples)] == examples.targets().tolist()
        x, y = s.train.whole()
        bucket = int(s.name.rpartition("-")[2])
        assert x.shape[1:] == (3, 2, 2) and torch.allclose(
            x[:, 0, 0, 0], (20 * bucket + 5 * y) / 255, atol=0.008
        )


@pytest.mark.parametrize("train", ["train", "train_image_only"])
def test_clear_as_released(tmp_path, train):
    photographs(tmp_path / "clear" / train, range(4), 4)
    photographs(tmp_path / "clear" / "test", range(1, 4), 2, start=100)
    sources = data.clear(tmp_path / "clear", size=2)
    right(sources)
    assert [s.name for s in sources] == ["clear/bucket-1", "clear/bucket-2", "clear/bucket-3"]
    for b, s in enumerate(sources, 1):
        assert (
            files(s.train) == every(b, range(4))
            and files(s.test) == every(b, (100, 101))
            and not len(s.validation)
        )
    ahead = data.clear(tmp_path / "clear", "streaming", size=2)
    right(ahead)
    assert [s.name for s in ahead] == ["clear/bucket-1", "clear/bucket-2"]
    assert all(a.test is b.train for a, b in pairwise(ahead))
    for b, s in enumerate(ahead, 1):
        assert sorted(files(s.train)) == sorted(every(b, (0, 1, 2, 3, 100, 101)))
        assert sorted(files(s.test)) == sorted(every(b + 1, (0, 1, 2, 3, 100, 101)))


def test_clear_once_and_with_the_published_splits(tmp_path):
    path = tmp_path / "clear"
    photographs(path, range(1, 11))
    sources = data.clear(path, size=2, validation=0.2)
    right(sources)
    assert [s.name for s in sources] == [f"clear/bucket-{b}" for b in range(1, 11)]
    for b, s in enumerate(sources, 1):
        assert [len(getattr(s, p)) for p in PARTS] == [17, 4, 9]
        assert sorted(f for p in PARTS for f in files(getattr(s, p))) == sorted(every(b, range(10)))
        assert s.test.targets().bincount().tolist() == [3, 3, 3]
    assert files(sources[0].test) != files(data.clear(path, size=2, seed=1)[0].test)
    for split in (0, 1):
        for b in range(1, 11):
            here = path / "training_folder" / "testset_ratio_0.3" / f"split_{split}" / str(b)
            here.mkdir(parents=True)
            for part, numbers in (("train", range(split, split + 7)), ("test", range(9))):
                lines = [f"labeled_images/{f}.jpg {NAMES.index(f.split('/')[1])}" for f in every(b, numbers)]
                (here / f"{part}.txt").write_text("\n".join(lines))
    for split in (0, 1):
        sources = data.clear(path, split=split, size=2)
        right(sources)
        for b, s in enumerate(sources, 1):
            assert files(s.train) == every(b, range(split, split + 7)) and files(s.test) == every(b, range(9))
    ahead = data.clear(path, "streaming", size=2)
    assert len(ahead) == 9 and sorted(files(ahead[0].train)) == sorted(every(1, range(10)))
    refused("cannot read the file list", data.clear, path, split=4, size=2)
    file = path / "training_folder" / "testset_ratio_0.3" / "split_0" / "3" / "test.txt"
    file.write_text("labeled_images/3/bus/0.jpg 1")
    refused("must be that of its class, got labeled_images/3/bus/0.jpg 1 in", data.clear, path, size=2)


def test_clear_without_class_names_and_in_memory(tmp_path):
    photographs(tmp_path / "clear", range(3), text=False)
    sources = data.clear(tmp_path / "clear", size=2, in_memory=True, grey=True, name="time", space="things")
    assert [n for _, n in sources[0].labels] == sorted(NAMES) and sources[0].labels[0][0] == "things"
    assert isinstance(sources[0].train, Tensors) and sources[0].train.whole()[0].shape[1:] == (1, 2, 2)
    assert [s.name for s in sources] == ["time/bucket-1", "time/bucket-2"]
    result = cs.run(
        settings.continual(sources, "domain"),
        methods.finetune(),
        models.mlp(4, (8,), 3),
        cs.Training(epochs=1, batch_size=8),
    )
    assert result.matrix.shape == (3, 2) and np.isfinite(result.matrix).all()
    streamed = data.clear(tmp_path / "clear", "streaming", size=2)
    assert len(streamed) == 1


def test_clear_refuses(tmp_path):
    path = tmp_path / "clear"
    path.mkdir()
    refused("CLEAR must have labeled_images/<bucket>/<class>/, got none", data.clear, path)
    photographs(path / "train", range(1, 3), 3)
    refused("CLEAR must have both train/ and test/, or neither, got one", data.clear, path)
    photographs(path / "test", range(1, 2), 3)
    refused("test/ must have the buckets of train/, got [1] and [1, 2]", data.clear, path)
    photographs(path / "test", range(1, 3), 3)
    refused("'stream'", data.clear, path, "stream")
    refused("images must have one size, got", data.clear(path, size=None)[0].train.whole)
    bad = path / "train" / "labeled_images" / "2" / "camera" / "1.jpg"
    bad.write_bytes(b"no image")
    refused(f"cannot read the image {bad}: ", data.clear(path)[1].train.whole)
    photographs(path / "test", range(1, 3), 1, names=["dog"], text=False)
    refused(
        "class folders must be those of class_names.txt or of all buckets, got 'dog' in", data.clear, path
    )
    photographs(tmp_path / "one", range(2), 3)
    refused(
        "streaming needs two buckets or more, the last to test on, got 1",
        data.clear,
        tmp_path / "one",
        "streaming",
    )
    assert re.search("one/bucket-1", data.clear(tmp_path / "one", size=2)[0].name)
