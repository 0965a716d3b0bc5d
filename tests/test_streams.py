"""Streams of any item: pairs, mappings, tuples, sequences; targets that do not tell the truth."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import consilience as cs
from consilience import data
from consilience.core.errors import ConsilienceError
from consilience.core.source import Tensors, trimmed
from consilience.core.tree import Tree
from consilience.data.samplers import ByLength, Shuffle

IDS = np.random.default_rng(0).integers(1, 50, (60, 12))
Y = np.arange(60) % 2
LENGTHS = [3 + i % 5 for i in range(60)]


class Rows(torch.utils.data.Dataset):
    """A dataset of what a function gives for each index; it counts its reads."""

    def __init__(self, item: Any, count: int = 60, **attributes: Any):
        self.item, self.count, self.reads = item, count, 0
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        return self.item(i)


class Classifier(nn.Module):
    """A module as transformers has them: called by name, and its logits are in an object."""

    class Output(UserDict):
        @property
        def logits(self) -> torch.Tensor:
            return self["logits"]

    def __init__(self, outputs: int = 2):
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 8), nn.Linear(8, outputs)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        total = (self.embedding(input_ids) * mask[..., None]).sum(1)
        return self.Output(logits=self.head(total / mask.sum(1, keepdim=True).clamp_min(1)))


def refused(rule: str, *args: Any, call: Any = data.stream, **kwargs: Any) -> None:
    with pytest.raises(ConsilienceError) as error:
        call(*args, **kwargs)
    assert rule in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def score(source: Any, net: nn.Module) -> float:
    training = cs.Training(epochs=1, batch_size=8)
    result = cs.run(cs.settings.continual([source]), cs.methods.finetune(), net, training)
    assert result.score is not None
    return result.score


def row(i: int) -> dict[str, Any]:
    return {"input_ids": IDS[i], "attention_mask": np.ones_like(IDS[i])}


# Forms of items.


def by_key(item: Any) -> Any:
    return lambda i: {**row(i), item: int(Y[i])}


@pytest.mark.parametrize(
    "item",
    [
        lambda i: (row(i), int(Y[i])),
        lambda i: (UserDict(row(i)), torch.tensor(Y[i])),
        by_key("label"),
        by_key("labels"),
        lambda i: UserDict(by_key("label_ids")(i)),
        lambda i: {**{name: part.tolist() for name, part in row(i).items()}, "label": int(Y[i])},
    ],
)
def test_items_with_several_parts(item):
    source = data.stream(Rows(item), name="rows")
    expected = data.arrays({"input_ids": IDS, "attention_mask": np.ones_like(IDS)}, Y, name="rows")
    for part in ("train", "validation", "test"):
        x, y = getattr(source, part).whole()
        other, targets = getattr(expected, part).whole()
        assert isinstance(x, Tree)
        assert list(x.parts) == ["input_ids", "attention_mask"]
        assert torch.equal(y, targets)
        assert all(torch.equal(x.parts[name], other.parts[name]) for name in x.parts)
    assert score(source, Classifier()) >= 0


def test_tuples_are_given_by_place():
    source = data.stream(Rows(lambda i: ((IDS[i], IDS[i, :2]), int(Y[i]))))
    x, _ = next(source.train.chunks(4))
    assert {name: tuple(part.shape) for name, part in x.parts.items()} == {"0": (4, 12), "1": (4, 2)}
    # Three values might be (x1, x2, y) or (x, y, more).
    refused("got 3 values; several inputs are a pair ((x1, x2), y).", Rows(lambda i: (IDS[i], IDS[i], 0)))


def test_sequences_are_padded_to_the_longest_of_a_batch():
    source = data.stream(Rows(lambda i: (torch.tensor(IDS[i, : LENGTHS[i]]), int(Y[i]))), validation=0)
    index = source.train.index
    batches = source.train.batches([torch.tensor([0, 1]), torch.tensor([2, 3, 4])])
    for (x, y), chosen in zip(batches, ([0, 1], [2, 3, 4]), strict=True):
        lengths = [LENGTHS[int(index[i])] for i in chosen]
        assert x.lengths.tolist() == lengths
        assert x.parts["0"].shape == (len(chosen), max(lengths))
        for k, i in enumerate(chosen):
            expected = [*IDS[int(index[i]), : lengths[k]], *[0] * (max(lengths) - lengths[k])]
            assert x.parts["0"][k].tolist() == expected
        assert y.tolist() == [int(Y[int(index[i])]) for i in chosen]

    # A batch of equal lengths is padded as others are, so that batches can be joined.
    same = [k for k in range(len(source.train)) if LENGTHS[int(index[k])] == 4][:2]
    x, _ = next(iter(source.train.batches([torch.tensor(same)])))
    assert x.lengths.tolist() == [4, 4]
    assert x.ragged == {"0": 0.0}


def test_sequences_of_vectors_and_targets_at_places():
    def item(i: int) -> Any:
        return torch.full((LENGTHS[i], 3), float(i)), [j % 2 for j in range(LENGTHS[i])]

    source = data.stream(Rows(item), validation=0)
    x, y = next(iter(source.train.batches([torch.tensor([0, 1, 2])])))
    lengths = [LENGTHS[int(source.train.index[i])] for i in range(3)]
    assert x.parts["0"].shape == (3, max(lengths), 3)
    assert y.shape == (3, max(lengths))
    for k, length in enumerate(lengths):
        assert y[k].tolist() == [j % 2 for j in range(length)] + [-100] * (max(lengths) - length)


def test_a_stream_equals_arrays_for_sequences():
    rows = {"input_ids": [IDS[i, : LENGTHS[i]].tolist() for i in range(60)]}
    tensors = data.arrays(rows, Y, name="same")
    stream = data.stream(
        Rows(lambda i: ({"input_ids": rows["input_ids"][i]}, int(Y[i]))), name="same", workers=1
    )
    plan = ByLength().plan(
        tensors.train.targets(), 8, 0, torch.Generator().manual_seed(0), tensors.train.lengths()
    )
    assert stream.train.lengths().tolist() == tensors.train.lengths().tolist()
    for (a, ya), (b, yb) in zip(tensors.train.batches(plan), stream.train.batches(plan), strict=True):
        assert torch.equal(a.parts["input_ids"], b.parts["input_ids"])
        assert torch.equal(a.lengths, b.lengths)
        assert torch.equal(ya, yb)


def test_several_labels_are_no_places():
    # As many labels as places: padding of the inputs is cut, labels stay.
    x = Tree({"ids": torch.tensor([[1, 2, 0], [3, 0, 0]])}, {"ids": 0}, torch.tensor([2, 1]))
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    assert trimmed(x, labels)[1].shape == (2, 3)
    assert trimmed(x, labels.long())[1].shape == (2, 2)
    assert trimmed(x, labels[:, None])[1].shape == (2, 1, 2)
    assert next(iter(Tensors(x, labels).batches([torch.tensor([0, 1])])))[1].shape == (2, 3)
    source = data.stream(
        Rows(lambda i: (IDS[i, : 3 + i % 2], [1, 0, 1, 0])), kind="labels", test=0.5, validation=0
    )
    assert next(source.train.chunks(2))[1].shape == (2, 4)


def test_an_encoding_of_one_text_has_no_batch():
    class Encoding(UserDict):
        encodings = None

    item = {name: torch.tensor(part)[None] for name, part in row(3).items()}
    x, _ = next(data.stream(Rows(lambda i: (Encoding(item), int(Y[i])))).train.chunks(4))
    assert x.parts["input_ids"].shape == (4, 12)


def test_bytes_of_text_are_numbers():
    source = data.stream(Rows(lambda i: (IDS[i].astype("uint8"), int(Y[i]))))
    assert source.train.whole()[0].dtype == torch.int64
    assert score(source, nn.Sequential(nn.Embedding(256, 4), nn.Flatten(), nn.Linear(48, 2))) >= 0
    assert data.arrays(IDS.astype("uint8"), Y).train.whole()[0].max() > 1


# Targets.


def test_targets_that_are_those_of_another_split():
    x = torch.rand(60, 2)
    for wrong in (
        Y[::-1].copy(),  # another order
        np.where(np.arange(60) == 59, 1 - Y, Y),  # the last one
        np.where(np.arange(60) == 31, 1 - Y, Y),  # one in the middle of the spread
        Y.astype(str),  # names
        np.eye(2)[Y],  # of another form
    ):
        dataset = Rows(lambda i: (x[i], int(Y[i])), targets=wrong)
        source = data.stream(dataset, validation=0)
        assert dataset.reads == 60
        inputs, targets = source.train.whole()
        for k, i in enumerate(source.train.index.tolist()):
            assert torch.equal(inputs[k], x[i])
            assert int(targets[k]) == Y[i]
    true = Rows(lambda i: (x[i], int(Y[i])), labels=list(map(torch.tensor, Y)))
    data.stream(true)
    assert true.reads == 18


def test_forms_of_targets_that_are_refused():
    refused(
        "`y` of the dataset must be numbers, got text such as 'good'; number the classes and name them with "
        "`classes`",
        Rows(lambda i: (IDS[i], ["good", "bad"][Y[i]])),
    )
    one_hot = np.eye(2, dtype=int)
    refused("got one-hot rows [N, 2]; give y.argmax(1), or kind=", Rows(lambda i: (IDS[i], one_hot[Y[i]])))
    refused("`y` must be class numbers, got one-hot rows [N, 2]", IDS, one_hot[Y], call=data.arrays)
    refused("`y` must be numbers, got text such as", IDS, ["good", "bad"] * 30, call=data.arrays)
    refused(
        "a dataset of mappings must have the target as 'labels' or 'label', got input_ids, attention_mask",
        Rows(row),
    )


# Items that are refused.


def test_text_is_no_input():
    refused(
        "in example 0: `x['text']` must be numbers, got text; `data.text` makes tokens of it, or remove the "
        "column.",
        Rows(lambda i: {"text": "good", "label": 0}),
    )
    refused("in example 0: `x` must be numbers, got text", Rows(lambda i: ("good", 0)))
    refused("in example 0: `x['a']` must be numbers, got None", Rows(lambda i: ({"a": None}, 0)))


def test_examples_that_are_not_alike_are_named():
    def at(odd: int, item: Any, usual: Any = None) -> Rows:
        plain = torch.zeros(3, 4, 5) if usual is None else usual
        return Rows(lambda i: (item if i == odd else plain, int(Y[i])))

    size = "must have one size in all examples, got 3x4x5 in example 0 and 3x4x6 in example"
    # 59 is in the spread that is read at first; 30 is found when it is read.
    refused(f"`x` {size} 59; resize images", at(59, torch.zeros(3, 4, 6)))
    later = data.stream(at(30, torch.zeros(3, 4, 6)), validation=0, test=0.1)
    refused(f"{size} 30", call=lambda: (later.train.whole(), later.test.whole()))
    grey = torch.zeros(4, 5, dtype=torch.uint8)
    refused("got 4x5 in example 0 and 3x5 in example 59", at(59, grey[:3], grey))
    refused("`x` must be of one type", at(59, torch.zeros(3, 4, 5, dtype=torch.int64)))
    refused(
        "must have the same parts, got one tensor in example 0 and a in example 59",
        at(59, {"a": torch.ones(2)}),
    )
    unequal = {"a": torch.zeros(3), "b": torch.zeros(4)}
    mixed = data.stream(at(59, unequal, {"a": torch.zeros(2), "b": torch.zeros(2)}), test=0.5)
    refused(
        "sequences of one example must be equally long in all parts, got",
        call=lambda: (mixed.train.whole(), mixed.validation.whole(), mixed.test.whole()),
    )


def unreadable(i: int) -> Any:
    if i == 30:
        raise OSError("truncated file")
    return torch.ones(2), int(Y[i])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_example_is_named(workers):
    dataset = Rows(unreadable, targets=Y)
    source = data.stream(dataset, workers=workers, validation=0, test=0.1, seed=1)
    rule = "examples of a dataset must be readable, got OSError in example 30: truncated file"
    refused(rule, call=lambda: (source.train.whole(), source.test.whole()))
    refused(rule, Rows(unreadable))
    refused("got OSError in example 0", Rows(lambda i: unreadable(30)))


def test_splits_and_others_that_are_no_dataset():
    refused(
        "a dataset must be one split, got the splits train, test", {"train": Rows(row), "test": Rows(row)}
    )
    refused("a dataset must be map-style", iter([1]))
    one, two = (Rows(lambda i, k=k: (torch.zeros(k), int(Y[i]))) for k in (2, 3))
    refused("test examples must have the shape of training examples, got (3,) and (2,).", one, test=two)
    refused(
        "`test` must be a fraction in (0, 1), got 2.", Rows(lambda i: (torch.zeros(2), int(Y[i]))), test=2
    )


def test_a_test_of_one_length_fits_sequences():
    train = Rows(lambda i: (IDS[i, : LENGTHS[i]], int(Y[i])))
    test = Rows(lambda i: (IDS[i, :4], int(Y[i])))
    source = data.stream(train, test=test)
    assert next(source.test.chunks(3))[0].lengths.tolist() == [4, 4, 4]
    assert data.stream(test, test=train).train.lengths() is not None


# Samplers.


def test_batches_by_length():
    lengths = torch.tensor(LENGTHS * 10)
    y = torch.zeros(600)

    def plan(sampler: Any, epoch: int = 0) -> list[torch.Tensor]:
        return sampler.plan(y, 20, epoch, torch.Generator().manual_seed(epoch), lengths)

    made = plan(ByLength())
    assert sorted(torch.cat(made).tolist()) == list(range(600))
    assert [len(batch) for batch in made] == [20] * 30
    # One pool holds all: no batch has more than two lengths, and batches are not in order of length.
    assert all(len(lengths[batch].unique()) <= 2 for batch in made)
    longest = [int(lengths[batch].max()) for batch in made]
    assert longest != sorted(longest)
    again = plan(ByLength())
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    assert not torch.equal(torch.cat(made), torch.cat(plan(ByLength(), 1)))

    def padded(batches: list[torch.Tensor]) -> int:
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    shuffled = Shuffle().plan(y, 20, 0, torch.Generator().manual_seed(0))
    assert padded(made) <= padded(plan(ByLength(pool=5))) < padded(shuffled)
    assert padded(made) < 1.03 * int(lengths.sum())
    # Without sequences it is a shuffle.
    plain = ByLength().plan(y, 20, 0, torch.Generator().manual_seed(0), None)
    assert all(torch.equal(a, b) for a, b in zip(plain, shuffled, strict=True))
    refused("`pool` must be a whole number >= 1, got 0.", call=lambda: ByLength(0))


def test_a_run_gives_lengths_to_samplers_that_ask():
    seen: list[Any] = []

    class Watching(ByLength):
        def plan(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
            seen.append(kwargs["lengths"])
            return super().plan(*args, **kwargs)

    class Old(cs.Sampler):
        def plan(self, targets: Any, batch_size: int, epoch: int, generator: Any) -> list[torch.Tensor]:
            seen.append(len(targets))
            return list(torch.arange(len(targets)).split(batch_size))

    rows = {"input_ids": [IDS[i, : LENGTHS[i]].tolist() for i in range(60)]}
    for source in (
        data.arrays(rows, Y),
        data.stream(Rows(lambda i: ({"input_ids": rows["input_ids"][i]}, int(Y[i])))),
    ):
        for sampler, expected in ((Watching(), source.train.lengths().tolist()), (Old(), len(source.train))):
            seen.clear()
            training = cs.Training(epochs=1, batch_size=8, sampler=sampler)
            cs.run(cs.settings.continual([source]), cs.methods.finetune(), Classifier(), training)
            (first, *_) = seen
            assert (first if isinstance(first, int) else first.tolist()) == expected


# Libraries for text.


def test_a_dataset_of_datasets():
    datasets = pytest.importorskip("datasets", reason="datasets is missing")
    names = ["well", "ill"]
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int64")), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"input_ids": [IDS[i, : LENGTHS[i]].tolist() for i in range(60)], "label": Y.tolist()}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    for made in (
        data.stream(dataset),
        data.arrays(dataset),
        data.stream(dataset.with_format("torch")),
        data.stream(dataset, test=dataset.select(range(10))),
    ):
        assert [name for _, name in made.labels] == names
        x, y = next(made.train.chunks(5))
        index = made.train.index[:5].tolist()
        assert x.lengths.tolist() == [LENGTHS[i] for i in index]
        assert y.tolist() == [int(Y[i]) for i in index]
    refused("a dataset must be one split, got the splits train", datasets.DatasetDict({"train": dataset}))
    texts = datasets.Dataset.from_dict({"text": ["good"] * 9, "label": [0] * 9})
    refused("`x['text']` must be numbers, got text; `data.text` makes tokens of it", texts)


def test_what_a_user_of_transformers_tries_first():
    transformers = pytest.importorskip("transformers", reason="transformers is missing")
    config = transformers.BertConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=2,
    )
    net = transformers.BertForSequenceClassification(config)
    encoding = transformers.BatchEncoding({"input_ids": IDS, "attention_mask": np.ones_like(IDS)})
    sequences = [IDS[i, : LENGTHS[i]].tolist() for i in range(60)]
    masks = [[1] * length for length in LENGTHS]
    for source in (
        data.arrays(encoding, Y),
        data.arrays(dict(encoding), Y),
        data.arrays((IDS, np.ones_like(IDS)), Y),
        data.arrays(IDS, Y),
        data.arrays(IDS.astype("uint8"), Y),
        data.arrays({"input_ids": sequences, "attention_mask": masks}, Y),
        data.stream(Rows(lambda i: (row(i), int(Y[i])))),
        data.stream(Rows(lambda i: (transformers.BatchEncoding(row(i)), int(Y[i])))),
        data.stream(Rows(lambda i: {**row(i), "labels": int(Y[i])})),
        data.stream(Rows(lambda i: (torch.tensor(sequences[i]), int(Y[i])))),
    ):
        assert 0 <= score(source, net) <= 1


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": IDS, "attention_mask": np.ones_like(IDS)},
        (IDS, np.ones_like(IDS)),
        IDS,
        IDS.astype("uint8"),
        [IDS[i, : LENGTHS[i]].tolist() for i in range(60)],
    ],
    ids=["dict", "tuple", "array", "bytes", "ragged"],
)
def test_the_same_without_transformers(inputs):
    assert 0 <= score(data.arrays(inputs, Y), Classifier()) <= 1


# Folders.


def test_images_of_a_folder_are_normalised(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow is missing")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for in_memory in (False, True):
        plain = data.folder(tmp_path, in_memory=in_memory)
        made = data.folder(tmp_path, in_memory=in_memory, mean=mean, std=std)
        for part in ("train", "validation", "test"):
            x = getattr(plain, part).whole()[0]
            expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
            assert torch.allclose(getattr(made, part).whole()[0], expected, atol=1e-6)
        one = data.folder(tmp_path, in_memory=in_memory, grey=True, mean=0.5, std=0.25)
        assert torch.allclose(
            one.test.whole()[0],
            (data.folder(tmp_path, in_memory=in_memory, grey=True).test.whole()[0] - 0.5) * 4,
        )
    for options, rule in (
        ({"std": 0}, "`std` must be one positive number, or one for each of 3 channels, got 0."),
        ({"std": (1, -1, 1)}, "`std` must be one positive number"),
        ({"mean": (0.5, 0.5)}, "`mean` must be one number, or one for each of 3 channels, got (0.5, 0.5)."),
        ({"mean": "imagenet"}, "`mean` must be one number"),
        ({"mean": (0.1, 0.2, 0.3), "grey": True}, "for each of 1 channels"),
    ):
        refused(rule, tmp_path, call=data.folder, **options)
