"""Text: tokens, alignments and windows by hand, tokenizers of other libraries, and every refusal."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import consilience as cs
from consilience import data
from consilience.core.errors import ConsilienceError
from consilience.core.tree import Tree
from consilience.data import Vocabulary
from consilience.data._tokens import ids_of

TEXTS = ["a cat sat", "the dog", "a dog, a cat", "the end", "cat"] * 8
LABELS = ["cat", "dog", "dog", "none", "cat"] * 8


def refused(rule: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ConsilienceError) as error:
        data.text(*args, **kwargs)
    assert rule in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def whole(source: Any, part: str = "train") -> tuple[Tree, Tensor]:
    return getattr(source, part).whole()


def rows(x: Tree, name: str = "input_ids") -> list[list[int]]:
    """The tokens of each sample without padding."""
    return [row[:length].tolist() for row, length in zip(x.parts[name], x.lengths, strict=True)]


# Vocabularies.


def test_a_vocabulary_counts():
    made = Vocabulary.of(["b a b", "c, a b"])
    assert made.tokens == ("<pad>", "<unknown>", "b", "a", ",", "c")
    assert made("c b z a!") == [5, 2, 1, 3, 1]
    assert made("") == []
    assert (len(made), made.pad_id) == (6, 0)
    assert Vocabulary.of(["b a b", "c, a b"], size=4).tokens == ("<pad>", "<unknown>", "b", "a")
    assert Vocabulary.of(["Ab aB"], lower=True)("AB") == [2]
    assert Vocabulary.of(["Ab aB"])("AB") == [1]
    assert Vocabulary.of(["été d'été"]).tokens[2] == "été"
    chars = Vocabulary.of(["ba b"], "chars")
    assert chars.tokens == ("<pad>", "<unknown>", "b", " ", "a")
    assert chars("ab?") == [4, 2, 1]
    # Words that were split stay as they are, also those that are called as ours.
    split = Vocabulary.of([["don't", "<pad>", "x"]])
    assert split.tokens == ("<pad>", "<unknown>", "don't", "x")
    assert split(["don't", "<pad>"]) == [2, 1]
    for arguments in ({"unit": "letters"}, {"size": 2}):
        with pytest.raises(ConsilienceError):
            Vocabulary.of(["a"], **arguments)


def test_words_of_the_training_texts():
    texts, test = ["b a b", "a", "c b b"], ["a z", ""]
    source = data.text(texts, ["x", "y", "x"], test=(test, ["y", "x"]), validation=0)
    x, y = whole(source)
    # b four times, a twice, c once: 2, 3, 4.
    assert x.parts["input_ids"].tolist() == [[2, 3, 2], [3, 0, 0], [4, 2, 2]]
    assert x.parts["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert y.tolist() == [0, 1, 0]
    held, _ = whole(source, "test")
    # An unknown word, and an empty text that is one token of padding that counts.
    assert rows(held) == [[3, 1], [0]]
    assert held.trim().parts["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert source.labels == (("text", "x"), ("text", "y"))

    few = data.text(texts, [0, 1, 0], test=(test, [1, 0]), validation=0, vocabulary=4)
    assert int(whole(few)[0].parts["input_ids"].max()) == 3
    # The words of the validation and the test are no training texts.
    words = [f"w{i}" for i in range(50)]
    drawn = data.text(words, [0, 1] * 25, validation=0.2)
    known = [
        bool((ids > 1).all())
        for part in ("train", "validation", "test")
        for ids in [whole(drawn, part)[0].parts["input_ids"]]
    ]  # one word per text
    assert known == [True, False, False]


def test_splits_are_those_of_arrays():
    numbers = np.array([0, 1, 1, 2, 0] * 8)
    arrays = data.arrays(np.arange(40.0)[:, None], numbers, name="same", seed=3)
    source = data.text([f"{i}" for i in range(40)], LABELS, lambda text: [int(text)], name="same", seed=3)
    for part in ("train", "validation", "test"):
        own, other = whole(source, part), getattr(arrays, part).whole()
        assert own[0].parts["input_ids"].flatten().tolist() == other[0].flatten().tolist()
        assert torch.equal(own[1], other[1])
    assert source.labels == (("same", "cat"), ("same", "dog"), ("same", "none"))


def test_labels_values_and_several_labels():
    declared = data.text(TEXTS, LABELS, classes=["none", "dog", "cat"], space="s")
    assert declared.labels == (("s", "none"), ("s", "dog"), ("s", "cat"))
    numbers = data.text(TEXTS, [0, 1, 1, 2, 0] * 8)
    assert len(numbers.labels) == 3
    values = data.text(TEXTS, np.linspace(0, 1, 40), kind="value")
    assert whole(values)[1].shape[1:] == (1,)
    several = data.text(TEXTS, [[1, 0, 1]] * 40, kind="labels", classes=["a", "b", "c"], max_length=3)
    assert whole(several)[1].shape[1:] == (3,)
    # As many labels as tokens: padding is cut, labels are not.
    x, y = next(iter(several.train.batches([torch.tensor([0, 1])])))
    assert y.shape == (2, 3)
    assert x.places <= 3


def test_texts_are_cut():
    source = data.text(TEXTS, LABELS, max_length=2, validation=0)
    assert max(map(len, rows(whole(source)[0]))) == 2
    assert data.text(TEXTS, LABELS, mask=False).train.x.ragged == {"0": 0}


# The next token.


def ids(text: str) -> list[int]:
    return [ord(char) - 96 for char in text]


def windows(text: str, **options: Any) -> list[tuple[list[int], list[int]]]:
    source = data.text([text], None, ids, "next", test=[text], validation=0, **options)
    x, y = whole(source)
    return [(row, target[: len(row)].tolist()) for row, target in zip(rows(x), y, strict=True)]


def test_windows_by_hand():
    assert windows("abcdefgh", block=3) == [
        ([1, 2, 3], [2, 3, 4]),
        ([4, 5, 6], [5, 6, 7]),
        ([7], [8]),
    ]
    # A window begins 2 later; its first target was one before.
    assert windows("abcdefgh", block=3, stride=2) == [
        ([1, 2, 3], [2, 3, 4]),
        ([3, 4, 5], [-100, 5, 6]),
        ([5, 6, 7], [-100, 7, 8]),
    ]
    assert windows("ab", block=3) == [([1], [2])]
    assert windows("abcd", block=3, stride=1) == [([1, 2, 3], [2, 3, 4])]


@pytest.mark.parametrize("length", range(2, 20))
@pytest.mark.parametrize(("block", "stride"), [(4, 4), (4, 3), (4, 1), (5, 2), (1, 1)])
def test_every_token_is_a_target_once(length, block, stride):
    text = "abcdefghijklmnopqrstuvwxyz"[:length]
    found = windows(text, block=block, stride=stride)
    assert [target for _, targets in found for target in targets if target != -100] == ids(text)[1:]
    for row, targets in found:
        assert all(target in (-100, token + 1) for token, target in zip(row, targets, strict=True))


def test_padded_places_have_no_target():
    source = data.text(["abcde", "ab"], None, ids, "next", test=["abc"], validation=0, block=8)
    x, y = whole(source)
    assert y.tolist() == [[2, 3, 4, 5], [2, -100, -100, -100]]
    assert x.parts["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    # The padding of a batch is that of its longest.
    _, short = next(iter(source.train.batches([torch.tensor([1])])))
    assert short.tolist() == [[2]]


def test_one_text_is_cut_by_position():
    text = "".join(chr(97 + i % 26) for i in range(200))
    source = data.text(text, tokenizer="chars", targets="next", block=10)
    # 40 characters to test on, a tenth of the other 160 to choose by.
    counts = [sum(map(len, rows(whole(source, part)[0]))) for part in ("train", "validation", "test")]
    assert counts == [143, 15, 39]
    assert len(source.labels) == 28
    assert source.labels[0] == ("text", "<pad>")
    assert data.text(text, tokenizer="chars", targets="next", test=["abc"]).test.targets().shape[0] == 1
    more = data.text(text, tokenizer=ids, targets="next", vocabulary=30)
    assert [name for _, name in more.labels] == [f"<{i}>" for i in range(30)]


# Tags.


def test_tags_by_hand():
    words = [["Ann", "saw", "Bob"], ["No", "one"], ["Go"]]
    tags = [["B", "O", "B"], ["O", "O"], ["O"]]
    source = data.text(words, tags, lambda word: ids(word.lower()), "tags", test=(words, tags), validation=0)
    x, y = whole(source)
    # Each letter is a token: the first of a word has its tag.
    assert rows(x) == [ids("annsawbob"), ids("noone"), ids("go")]
    none = [-100, -100]
    assert y.tolist() == [
        [0, *none, 1, *none, 0, *none],
        [1, -100, 1, *none, -100, -100, -100, -100],
        [1, *[-100] * 8],
    ]
    assert source.labels == (("text", "B"), ("text", "O"))
    cut = data.text(words, tags, lambda word: ids(word.lower()), "tags", test=0.4, max_length=4, validation=0)
    assert whole(cut)[1].shape[1] <= 4

    default = data.text(words, tags, targets="tags", test=(words, tags), validation=0, classes=["O", "B"])
    assert whole(default)[1].tolist() == [[1, 0, 1], [0, 0, -100], [0, -100, -100]]
    assert len(rows(whole(default)[0])[0]) == 3
    numbers = data.text(words, [[0, 1, -100], [1, 1], [1]], targets="tags", test=0.4, validation=0)
    assert set(torch.cat([p.targets().flatten() for p in (numbers.train, numbers.test)]).tolist()) == {
        0,
        1,
        -100,
    }


@pytest.mark.parametrize(
    ("targets", "y"),
    [
        ("tags", [[0, None]] * 9),
        ("tags", [[0, -100]] * 9),
        ("tags", [torch.tensor([0, -100])] * 9),
        ("tags", torch.tensor([[0, -100]] * 9)),
        ("tags", [["a", None]] * 9),
        ("text", [0, None] * 9),
        ("text", [torch.tensor(0), torch.tensor(-100)] * 9),
        ("text", ["a", None] * 9),
    ],
)
def test_targets_of_texts_may_be_missing_in_every_form(targets, y):
    texts = [["a", "b"]] * 9 if targets == "tags" else ["a", "b"] * 9
    source = data.text(texts, y, targets=targets, test=0.3, validation=0)
    every = torch.cat([part.targets().flatten() for part in (source.train, source.test)])
    assert (every == 0).sum() == (every == -100).sum() == 9 and len(source.labels) == 1


def test_a_word_without_a_token_is_counted():
    def letters(word: str) -> list[int]:
        return ids(word) if word.isalpha() else []

    words, tags = [["a", "!", "b"], [], ["a", "b"]] * 3, [["x", "y", "z"], [], ["x", "z"]] * 3
    with pytest.warns(
        UserWarning, match="6 words have no token, and their tags are left out; the first is in "
    ):
        source = data.text(words, tags, letters, "tags", test=(words, tags), validation=0)
    assert whole(source)[1][:3].tolist() == [[0, 2], [-100, -100], [0, 2]]


# Tokenizers of others.


def word_level() -> Any:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is missing")
    pieces = {
        "[PAD]": 3,
        "[UNK]": 0,
        "[CLS]": 1,
        "[SEP]": 2,
        "un": 4,
        "##done": 5,
        "do": 6,
        "it": 7,
        "##s": 8,
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


def fast() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is missing")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_level(), pad_token="[PAD]", unk_token="[UNK]", model_max_length=5
    )


@pytest.mark.parametrize("make", [word_level, fast])
def test_subwords_by_hand(make):
    tokenizer = make()
    texts = ["undone its", "", "do it"]
    source = data.text(texts, [0, 1, 0], tokenizer, test=(texts, [0, 1, 0]), validation=0, max_length=6)
    x, _ = whole(source)
    assert rows(x) == [[1, 4, 5, 7, 8, 2], [1, 2], [1, 6, 7, 2]]
    assert x.parts["input_ids"][1].tolist() == [1, 2, 3, 3, 3, 3]
    assert x.parts["attention_mask"].sum(1).tolist() == [6, 2, 4]
    assert x.ragged == {"input_ids": 3, "attention_mask": 0}
    # The end of a text stays when it is cut.
    short = data.text(texts, [0, 1, 0], tokenizer, test=(texts, [0, 1, 0]), validation=0, max_length=4)
    assert rows(whole(short)[0]) == [[1, 4, 5, 2], [1, 2], [1, 6, 7, 2]]

    words, tags = [["undone", "its"], ["do", "it"]], [["V", "P"], ["V", "P"]]
    tagged = data.text(words, tags, tokenizer, "tags", test=(words, tags), validation=0, max_length=6)
    # P is 0 and V is 1; special tokens and later pieces have none.
    assert whole(tagged)[1].tolist() == [[-100, 1, -100, 0, -100, -100], [-100, 1, 0, -100, -100, -100]]

    nexts = data.text(["undone its"], None, tokenizer, "next", test=["do it"], validation=0, block=3)
    assert rows(whole(nexts)[0]) == [[1, 4, 5], [7, 8]]
    assert whole(nexts)[1].tolist() == [[4, 5, 7], [8, 2, -100]]
    assert nexts.labels[4] == ("text", "un")


def test_the_limit_of_a_tokenizer():
    x, _ = whole(data.text(["undone its"] * 3, [0, 1, 0], fast(), test=0.3, validation=0))
    assert rows(x)[0] == [1, 4, 5, 7, 2]
    own = word_level()
    own.enable_truncation(4)
    own.enable_padding(pad_id=9, pad_token="[PAD]", length=8)
    x, _ = whole(data.text(["undone its", "do"] * 2, [0, 1] * 2, own, test=0.5, validation=0))
    assert sorted(rows(x)) == [[1, 4, 5, 2], [1, 6, 2]]
    assert x.ragged["input_ids"] == 9
    nexts = data.text(["undone its"] * 2, None, own, "next", test=0.5, validation=0)
    assert rows(whole(nexts)[0]) == [[1, 4, 5, 7, 8]]
    # It is again as it was.
    assert own.truncation["max_length"] == 4
    assert own.padding["length"] == 8
    assert len(own.encode("do").ids) == 8


def test_a_tokenizer_without_padding():
    transformers = pytest.importorskip("transformers", reason="transformers is missing")
    end = transformers.PreTrainedTokenizerFast(tokenizer_object=word_level(), eos_token="[SEP]")
    texts = ["undone its", "do"]
    x, _ = whole(data.text(texts, [0, 1], end, test=(texts, [0, 1]), validation=0))
    assert x.parts["input_ids"][1].tolist() == [1, 6, 2, 2, 2, 2]
    assert x.parts["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0]
    none = transformers.PreTrainedTokenizerFast(tokenizer_object=word_level())
    x, _ = whole(data.text(texts, [0, 1], none, test=(texts, [0, 1]), validation=0))
    assert x.ragged["input_ids"] == 0

    def ours(text: str) -> Tensor:
        return torch.tensor(ids(text))

    ours.pad_id = 26
    assert whole(data.text(["ab", "c"] * 3, [0, 1] * 3, ours))[0].ragged["input_ids"] == 26


def test_what_a_tokenizer_may_give():
    assert ids_of([3, 4]) == ids_of((3, 4)) == ids_of(np.array([3, 4])) == ids_of(torch.tensor([[3, 4]]))
    assert ids_of({"input_ids": torch.tensor([[3, 4]])}) == [3, 4]
    encoded = word_level().encode("do it", add_special_tokens=False)
    assert ids_of(encoded) == [6, 7]
    for wrong in ("ab", 3, [[1], [2]], [0.5]):
        with pytest.raises(ConsilienceError, match="a tokenizer must give token ids"):
            ids_of(wrong)


# Files.


def test_texts_of_a_file(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text('text,label,stars\n"good, really",01,4.5\nbad,1,1\n"",01,3\nfine,1,4\n')
    source = data.text(path, "label", test=str(path), validation=0)
    assert source.labels == (("text", "01"), ("text", "1"))
    assert whole(source)[1].tolist() == [0, 1, 0, 1]
    assert rows(whole(source)[0])[2] == [0]
    values = data.text(path, "stars", test=path, validation=0, kind="value")
    assert whole(values)[1].flatten().tolist() == [4.5, 1, 3, 4]
    refused("`column` must be one of the columns, got 'body'", path, "label", column="body")
    refused("`y` must be one of the columns, got 'lable'; nearest: label", path, "lable")
    hole = tmp_path / "hole.csv"
    hole.write_text("text,label\ngood,1\nbad,\n")
    refused(f"every text must have a label, got none for column 'label' in line 3 of {hole}", hole, "label")
    story = tmp_path / "story.txt"
    story.write_text("once upon a time " * 20)
    assert len(data.text(story, targets="next", block=5).train) > 5
    refused("`texts` must be a readable file, got none at no/such.csv", "no/such.csv", "label")
    refused("cannot read", tmp_path / "none.txt", targets="next")


# Refusals.


@pytest.mark.parametrize(
    ("rule", "args", "options"),
    [
        ("`texts` must be a list of texts, got one text.", ("good", [1]), {}),
        ("`texts` must not be empty, got none.", ([], []), {}),
        ("`texts` and `y` must be equally long, got 40 and 39.", (TEXTS, LABELS[1:]), {}),
        ("text 1 of `texts` must be text, got None; join pairs", (["a", None], [0, 1]), {}),
        ("text 0 of `texts` must be text, got ('a', 'b'); join pairs", ([("a", "b")], [0]), {}),
        ("text 0 of `test` must be text, got 3", (TEXTS, LABELS), {"test": ([3], ["cat"])}),
        ("targets='text' need `y`, got none.", (TEXTS,), {}),
        ("targets='next' are the texts themselves, got `y` too.", (TEXTS, LABELS), {"targets": "next"}),
        ("targets='next' are classes, got kind='value'.", (TEXTS,), {"targets": "next", "kind": "value"}),
        ("`targets` must be 'text', 'next' or 'tags', got 'mask'.", (TEXTS, LABELS), {"targets": "mask"}),
        ("`test` must be (texts, y) or a fraction, got", (TEXTS, LABELS), {"test": TEXTS}),
        ("`test` must be a fraction in (0, 1), got 2.", (TEXTS, LABELS), {"test": 2}),
        (
            "`stride` must be at most `block`, got 9 and 8.",
            (TEXTS,),
            {"targets": "next", "block": 8, "stride": 9},
        ),
        ("`stride` is for targets='next'", (TEXTS, LABELS), {"stride": 9}),
        ("have the length `block`, got `max_length`.", (TEXTS,), {"targets": "next", "max_length": 9}),
        ("`max_length` must be a whole number >= 1, got 0.", (TEXTS, LABELS), {"max_length": 0}),
        (
            "labels must be among the classes cat, dog, got 'none' in text 3.",
            (TEXTS, LABELS),
            {"classes": ["cat", "dog"]},
        ),
        ("AutoTokenizer.from_pretrained('bert-base')", (TEXTS, LABELS, "bert-base"), {}),
        ("`tokenizer` must be 'words', 'chars', a Vocabulary", (TEXTS, LABELS, 3), {}),
        ("the tokenizer must take texts, got ZeroDivisionError", (TEXTS, LABELS, lambda text: 1 / 0), {}),
        ("a tokenizer must give token ids (whole numbers), got 'A CAT SAT'", (TEXTS, LABELS, str.upper), {}),
        ("token ids must be 0 or more, got -64 in text 0", (["a b"] * 9, [0] * 9, ids), {}),
        ("token ids must be below 2147483648, got 1000", (TEXTS, LABELS, lambda _: [10**20]), {}),
        (
            "token ids must be below 20, the size of the model's vocabulary, got 20 in text 0",
            (["cat"] * 9, [0] * 9, ids),
            {"vocabulary": 20},
        ),
        ("must be a list of words, got 'a cat sat'; split it.", (TEXTS, LABELS), {"targets": "tags"}),
        (
            "every word must have a tag, got 2 words and 1 tags in text 1.",
            ([["a"], ["a", "b"]], [["x"], ["x"]]),
            {"targets": "tags"},
        ),
        (
            "every word must have a tag, got 2 words and 'xy' in text 0.",
            ([["a", "b"]], ["xy"]),
            {"targets": "tags"},
        ),
        (
            "labels must be among the classes O, got 'B' in text 1.",
            ([["a"], ["b"]], [["O"], ["B"]]),
            {"targets": "tags", "classes": ["O"]},
        ),
        ("class numbers of an integer type", ([["a", "b"]] * 9, [[0, 0.7]] * 9), {"targets": "tags"}),
        ("class numbers of an integer type", (["a", "b"] * 9, [0, 0.7] * 9), {}),
        ("some text must have two tokens or more", (["a"] * 9, None, ids), {"targets": "next"}),
        ("`validation` must be a fraction in [0, 1), got 1.", (TEXTS, LABELS), {"validation": 1}),
    ],
)
def test_texts_that_are_refused(rule, args, options):
    refused(rule, *args, **options)


def test_texts_of_one_schedule_share_their_vocabulary():
    texts, labels = ["cat dog", "dog"] * 9, ["a", "b"] * 9
    one = data.text(texts, labels, name="one", space="s")
    other = data.text(["yak", "zebra yak"] * 9, labels, name="other", space="s")
    for schedule in (cs.settings.continual, cs.settings.federated, cs.settings.multitask):
        with pytest.raises(
            ConsilienceError, match="must share their vocabulary, got other tokens in 'one' a"
        ):
            schedule([one, other])

    # The same tokens in the same order are one vocabulary, and parts of a source keep it.
    alike = data.text(texts, labels, name="alike", space="s")
    cs.settings.continual([one, alike], "domain")
    cs.settings.federated(data.iid(one, 2))
    both = Vocabulary.of([*texts, "yak zebra"])
    named = [data.text(texts, labels, both, name=name, space="s") for name in "ab"]
    cs.settings.continual(named, "domain")
    ids = [source.map(x=lambda x: x, name=source.name) for source in (one, other)]
    cs.settings.continual(ids, "domain")


def test_a_token_that_the_model_does_not_have_is_named():
    vocabulary = Vocabulary.of(["b a b c", "c b"])
    assert vocabulary.tokens[4] == "a"
    refused(
        "token ids must be below 4, the size of the model's vocabulary, got 4 ('a') in text 2.",
        ["b", "c b", "b a", "a"],
        [0, 1, 0, 1],
        vocabulary,
        vocabulary=4,
    )


# In the settings.


class Reader(nn.Module):
    """Logits [B, C] or [B, T, C] as transformers has them, from tokens and a mask."""

    def __init__(self, outputs: int, places: bool, width: int = 16, vocabulary: int = 2000):
        super().__init__()
        self.places = places
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        h = self.embedding(input_ids)
        if not self.places:
            h = (h * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return {"logits": self.head(h)}


SETTINGS = {
    "federated": (lambda parts: cs.settings.federated(parts, rounds=2), cs.methods.fedavg),
    "continual": (lambda parts: cs.settings.continual(parts, "domain"), cs.methods.finetune),
    "multitask": (cs.settings.multitask, cs.methods.finetune),
    "merging": (cs.settings.merging, lambda: cs.methods.aggregate(cs.aggregators.Mean())),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("targets", ["text", "tags", "next"])
def test_texts_in_the_settings(setting, targets):
    words = Vocabulary.of(TEXTS)
    parts = []
    for i in range(2):
        options = {"tokenizer": words, "targets": targets, "name": f"site-{i}", "space": "s", "seed": i}
        if targets == "text":
            parts.append(data.text(TEXTS, LABELS, **options))
        elif targets == "tags":
            split = [text.split() for text in TEXTS]
            tags = [["ant" if word in ("a", "the") else "other" for word in own] for own in split]
            parts.append(data.text(split, tags, **options))
        else:
            parts.append(data.text(TEXTS, block=4, **options))
    make, method = SETTINGS[setting]
    net = Reader(len(parts[0].labels), targets != "text", vocabulary=len(words))
    training = cs.Training(
        epochs=15, batch_size=8, lr=0.05, optimiser="adam", sampler=data.samplers.ByLength(2)
    )
    result = cs.run(make(parts), method(), net, training)
    # Tags follow from words, labels almost; the next word often is one of two.
    assert result.score > {"text": 0.85, "tags": 0.95, "next": 0.45}[targets]


def test_tags_of_real_text():
    where = Path(os.environ.get("CONSILIENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (where / "ewt_pos_ner.json.xz").is_file():
        pytest.skip(f"ewt_pos_ner.json.xz is not in {where} (CONSILIENCE_DATA)")
    with lzma.open(where / "ewt_pos_ner.json.xz") as file:
        sentences = json.load(file)["sentences"]

    def of(genre: str, part: str) -> tuple[list[list[str]], list[list[str]]]:
        own = [each for each in sentences if each["genre"] == genre and each["part"] == part]
        return [each["tokens"] for each in own], [each["upos"] for each in own]

    genres = ("reviews", "answers")
    train = {genre: of(genre, "train") for genre in genres}
    words = Vocabulary.of([text for texts, _ in train.values() for text in texts])
    tags = sorted({tag for _, own in train.values() for each in own for tag in each})
    parts = [
        data.text(
            *train[genre],
            words,
            "tags",
            test=of(genre, "test"),
            classes=tags,
            name=genre,
            space="pos",
        )
        for genre in genres
    ]
    net = Reader(len(tags), True, vocabulary=len(words))
    training = cs.Training(epochs=8, lr=0.02, optimiser="adam", sampler=data.samplers.ByLength())
    result = cs.run(cs.settings.multitask(parts), cs.methods.finetune(), net, training)
    # The most frequent tag of each word is right for 0.81, with all five genres to count in.
    assert result.score > 0.7


def test_texts_on_the_command_line(tmp_path):
    labels = "\n".join(
        f"{'good' if i % 2 else 'bad'} film {i % 7},{'pos' if i % 2 else 'neg'}" for i in range(60)
    )
    (tmp_path / "reviews.csv").write_text(f"text,label\n{labels}\n")
    (tmp_path / "readers.py").write_text(
        "from torch import nn\n\n\n"
        "class Bag(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 2)\n\n"
        "    def forward(self, input_ids, attention_mask):\n"
        "        return self.head((self.embed(input_ids) * attention_mask[..., None]).sum(1))\n"
    )
    data_options = "--data text --data.texts reviews.csv --data.y label --data.vocabulary 50 --split none"
    training = "--setting continual --method finetune --model readers.Bag --training.lr 0.5"
    done = subprocess.run(
        [sys.executable, "-m", "consilience.cli", "run", *data_options.split(), *training.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "100.0" in done.stdout
