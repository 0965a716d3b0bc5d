"""Text as sources: tokenizers of any kind, and targets per text, per word or the next token."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from consilience.core.checks import fraction, whole_number
from consilience.core.errors import ConsilienceError, kind_of, unknown
from consilience.core.losses import NONE
from consilience.core.message import text_hash
from consilience.core.source import Source, Tensors
from consilience.core.tree import Tree
from consilience.core.warning import warn
from consilience.data._reading import as_name, read
from consilience.data._sources import Options, source_of
from consilience.data._sources import targets as checked_targets
from consilience.data._tables import numbered

PAD, UNKNOWN = "<pad>", "<unknown>"
"""The first two tokens of a vocabulary."""

UNITS: Mapping[str, Literal["words", "chars"]] = {"words": "words", "chars": "chars"}
"""What a vocabulary may be of."""

PADS = ("[PAD]", "<pad>", "<|padding|>", "<PAD>")
ENDS = ("</s>", "<|endoftext|>", "[EOS]", "<eos>", "<|end_of_text|>")
"""How tokenizers call their tokens for padding, and for the end of a text."""

UNLIMITED = 1_000_000
"""Tokenizers of transformers without a limit say that texts may have more tokens than this."""

FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Vocabulary:
    """Words or characters as token ids: 0 is padding and 1 an unknown token.

    A word is a run of letters and digits, or one other sign. Make one with `Vocabulary.of` and give it to
    every source of a schedule, so that an id means the same token in all of them.

    >>> words = Vocabulary.of(["a cat, a dog", "a mouse"], size=4)
    >>> words.tokens, words("a mouse, a cat")
    (('<pad>', '<unknown>', 'a', ','), [2, 1, 3, 2, 1])
    """

    tokens: tuple[str, ...]
    unit: Literal["words", "chars"] = "words"
    lower: bool = False
    """Whether capital letters are read as small ones."""

    @classmethod
    def of(
        cls,
        texts: Iterable[str | Sequence[str]],
        unit: Literal["words", "chars"] = "words",
        size: int | None = None,
        lower: bool = False,
    ) -> Vocabulary:
        """Return the vocabulary of some texts: their most frequent tokens first, equal ones by name.

        Args:
            texts: texts, or lists of words.
            unit: "words" or "chars".
            size: tokens at most, with the two of padding and unknown ones; None: all.
            lower: read capital letters as small ones.

        >>> Vocabulary.of(["abba"], "chars").tokens
        ('<pad>', '<unknown>', 'a', 'b')
        """
        if unit not in UNITS:
            raise ConsilienceError(f"`unit` must be 'words' or 'chars', got {unit!r}.")
        if size is not None:
            whole_number(3, size=size)
        empty = cls((PAD, UNKNOWN), unit, lower)
        counts = Counter(piece for text in texts for piece in empty.pieces(text))
        # Words in a list of words may be called like ours.
        ranked = sorted(counts.keys() - {PAD, UNKNOWN}, key=lambda token: (-counts[token], token))
        return cls((PAD, UNKNOWN, *ranked[: None if size is None else size - 2]), unit, lower)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return 0

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens) if i > 1}

    def pieces(self, text: str | Sequence[str]) -> list[str]:
        """Return the tokens of a text; a list of words stays as it is, or becomes its characters."""
        if self.lower:
            text = text.lower() if isinstance(text, str) else [word.lower() for word in text]
        if self.unit == "chars":
            return list(text if isinstance(text, str) else "".join(text))
        return re.findall(r"\w+|[^\w\s]", text) if isinstance(text, str) else list(text)

    def __call__(self, text: str | Sequence[str]) -> list[int]:
        """Return the ids of a text, or of a list of words."""
        return [self._ids.get(piece, 1) for piece in self.pieces(text)]

    def __repr__(self) -> str:
        return f"Vocabulary of {len(self)} {self.unit}"


@dataclass(frozen=True)
class Tokening:
    """How texts become inputs and targets; see `consilience.data.text`."""

    tokenizer: Any = "words"
    targets: str = "text"
    max_length: int | None = None
    block: int = 128
    stride: int | None = None
    mask: bool = True
    vocabulary: int | None = None

    def checked(self) -> Tokening:
        """Refuse options that are none."""
        if self.targets not in ("text", "next", "tags"):
            raise ConsilienceError(f"`targets` must be 'text', 'next' or 'tags', got {self.targets!r}.")
        for name in ("max_length", "stride", "vocabulary"):
            if getattr(self, name) is not None:
                whole_number(1, **{name: getattr(self, name)})
        whole_number(1, block=self.block)
        # Some tokens would never be a target.
        if self.stride is not None and self.stride > self.block:
            raise ConsilienceError(f"`stride` must be at most `block`, got {self.stride} and {self.block}.")
        # What another kind of targets would ignore is a mistake.
        if self.targets == "next" and self.max_length is not None:
            raise ConsilienceError("windows of the next token have the length `block`, got `max_length`.")
        if self.targets != "next" and self.stride is not None:
            raise ConsilienceError(f"`stride` is for targets='next', got targets={self.targets!r}.")
        return self


# Tokenizers.


class Pieces(NamedTuple):
    """The tokens of one text."""

    ids: list[int]
    words: list[int | None]
    """For a list of words: the word that each token belongs to; None: none, as for special tokens."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of any library, as `from_text` uses it. This one is a function text -> ids."""

    given: Any
    limit: int | None = None
    cut: bool = True
    """Whether long texts are cut as the tokenizer says; windows of the next token need all of them."""

    @property
    def fill(self) -> int:
        """The id of padding."""
        return int(getattr(self.given, "pad_id", 0))

    @property
    def hash(self) -> str:
        """The hash of a vocabulary of ours; "" of other tokenizers, which are chosen for all texts alike."""
        given = self.given
        return (
            text_hash(json.dumps([given.unit, given.lower, *given.tokens]))
            if isinstance(given, Vocabulary)
            else ""
        )

    @property
    def names(self) -> Sequence[str] | None:
        """The tokens of all ids, where the tokenizer lists them."""
        return self.given.tokens if isinstance(self.given, Vocabulary) else None

    def of_texts(self, texts: Sequence[str]) -> list[Pieces]:
        """Return the tokens of texts."""
        return [Pieces(ids_of(self.given(text))[: self.limit], []) for text in texts]

    def of_words(self, texts: Sequence[Sequence[str]]) -> list[Pieces]:
        """Return the tokens of lists of words, each word by itself."""
        found = []
        for words in texts:
            # A vocabulary knows words as they were split.
            each = [
                ids_of(self.given([word] if isinstance(self.given, Vocabulary) else word)) for word in words
            ]
            ids = [token for own in each for token in own]
            owners: list[int | None] = [i for i, own in enumerate(each) for _ in own]
            found.append(Pieces(ids[: self.limit], owners[: self.limit]))
        return found


@dataclass(frozen=True)
class OfTransformers(Tokenizer):
    """A tokenizer of transformers, with its special tokens."""

    @property
    def fill(self) -> int:
        for name in ("pad_token_id", "eos_token_id"):
            if isinstance(getattr(self.given, name, None), int):
                return int(getattr(self.given, name))
        return 0

    @property
    def names(self) -> Sequence[str]:
        listed = self.given.convert_ids_to_tokens(list(range(len(self.given))))
        return [f"<{i}>" if token is None else str(token) for i, token in enumerate(listed)]

    def _encoded(self, texts: Sequence[Any], **options: Any) -> Any:
        longest = getattr(self.given, "model_max_length", None)
        limit = self.limit
        # A model fails on more places than it has embeddings for.
        if limit is None and self.cut and isinstance(longest, int) and longest < UNLIMITED:
            limit = longest
        return self.given(
            list(texts),
            truncation=limit is not None,
            max_length=limit,
            padding=False,
            # It would warn of texts that are cut into windows later.
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            **options,
        )

    def of_texts(self, texts: Sequence[str]) -> list[Pieces]:
        return [Pieces(ids_of(ids), []) for ids in self._encoded(texts)["input_ids"]]

    def of_words(self, texts: Sequence[Sequence[str]]) -> list[Pieces]:
        # Only the fast ones say which word a token is of.
        if not getattr(self.given, "is_fast", False):
            alone = Tokenizer(
                lambda word: self.given(word, add_special_tokens=False)["input_ids"], self.limit
            )
            return alone.of_words(texts)
        encoded = self._encoded([list(words) for words in texts], is_split_into_words=True)
        return [Pieces(ids_of(ids), encoded.word_ids(i)) for i, ids in enumerate(encoded["input_ids"])]


@dataclass(frozen=True)
class OfTokenizers(Tokenizer):
    """A tokenizer of the library tokenizers, with its special tokens."""

    @property
    def fill(self) -> int:
        if self.given.padding is not None:
            return int(self.given.padding["pad_id"])
        known = (self.given.token_to_id(token) for token in (*PADS, *ENDS))
        return next((int(token) for token in known if token is not None), 0)

    @property
    def names(self) -> Sequence[str]:
        size = 1 + max(self.given.get_vocab().values())
        return [self.given.id_to_token(i) or f"<{i}>" for i in range(size)]

    @contextmanager
    def _unpadded(self) -> Iterator[None]:
        """Encode without padding, and to the limit; then the tokenizer is again as it was."""
        padding, truncation = self.given.padding, self.given.truncation
        try:
            self.given.no_padding()
            if not self.cut:
                self.given.no_truncation()
            if self.limit is not None:
                self.given.enable_truncation(self.limit)
            yield
        finally:
            # A user may go on with the same object.
            if padding is not None:
                self.given.enable_padding(**padding)
            if truncation is None:
                self.given.no_truncation()
            else:
                self.given.enable_truncation(**truncation)

    def of_texts(self, texts: Sequence[str]) -> list[Pieces]:
        with self._unpadded():
            return [Pieces(list(own.ids), []) for own in self.given.encode_batch(list(texts))]

    def of_words(self, texts: Sequence[Sequence[str]]) -> list[Pieces]:
        with self._unpadded():
            found = self.given.encode_batch([list(words) for words in texts], is_pretokenized=True)
            return [Pieces(list(own.ids), list(own.word_ids)) for own in found]


def ids_of(encoded: Any) -> list[int]:
    """Return token ids from what a tokenizer gives: a list, an array, or an encoding of one text.

    >>> ids_of([1, 2]), ids_of({"input_ids": [[1, 2]]}), ids_of(torch.tensor([3]))
    ([1, 2], [1, 2], [3])
    """
    if isinstance(encoded, Mapping) and "input_ids" in encoded:
        encoded = encoded["input_ids"]
    encoded = getattr(encoded, "ids", encoded)
    if hasattr(encoded, "tolist"):
        encoded = encoded.tolist()
    if isinstance(encoded, list) and len(encoded) == 1 and isinstance(encoded[0], list):
        encoded = encoded[0]
    if not isinstance(encoded, list | tuple) or not all(isinstance(token, int) for token in encoded):
        raise ConsilienceError(f"a tokenizer must give token ids (whole numbers), got {kind_of(encoded)}.")
    return list(encoded)


def tokenizer_of(tokening: Tokening, train: Sequence[Any]) -> Tokenizer:
    """Return the tokenizer that was asked for; a vocabulary of ours is that of the training texts."""
    given, limit, cut = tokening.tokenizer, tokening.max_length, tokening.targets != "next"
    if isinstance(given, str):
        if given in UNITS:
            return Tokenizer(Vocabulary.of(train, UNITS[given], tokening.vocabulary), limit)
        near = unknown("tokenizer", given, ["words", "chars"], "'words', 'chars' or an object")
        raise ConsilienceError(
            f"{near} A tokenizer of transformers is AutoTokenizer.from_pretrained({given!r})."
        )
    if hasattr(given, "encode_batch") and hasattr(given, "token_to_id"):
        return OfTokenizers(given, limit, cut)
    if callable(given) and hasattr(given, "convert_ids_to_tokens"):
        return OfTransformers(given, limit, cut)
    if callable(given):
        return Tokenizer(given, limit)
    raise ConsilienceError(
        "`tokenizer` must be 'words', 'chars', a Vocabulary, a tokenizer of tokenizers or transformers, or a "
        f"function text -> ids, got {kind_of(given)}."
    )


def pieces_of(tokenizer: Tokenizer, texts: Sequence[Any], tokening: Tokening) -> list[Pieces]:
    """Return the tokens of all texts, checked."""
    words = tokening.targets == "tags"
    try:
        found = tokenizer.of_words(texts) if words else tokenizer.of_texts(texts)
    except ConsilienceError:
        raise
    # Whatever a tokenizer of a user raises, it is one sentence here.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise ConsilienceError(
            f"the tokenizer must take {'lists of words' if words else 'texts'}, got {type(error).__name__}: "
            f"{reason}."
        ) from error

    size = tokening.vocabulary
    # What is beyond can be no row of an embedding, nor a number of a tensor.
    most = size or 1 << 31
    for i, own in enumerate(found):
        wrong = next((id_ for id_ in own.ids if not 0 <= id_ < most), None)
        if wrong is not None:
            names = tokenizer.names
            token = f" ({names[wrong]!r})" if names is not None and 0 <= wrong < len(names) else ""
            rule = "be 0 or more" if wrong < 0 else f"be below {most}"
            rule += ", the size of the model's vocabulary" if size is not None else ""
            raise ConsilienceError(f"token ids must {rule}, got {wrong}{token} in text {i}.")
    return found


# Texts and their targets.


def from_text(texts: Any, y: Any, column: str, tokening: Tokening, options: Options) -> Source:
    """See `consilience.data.text`."""
    tokening = tokening.checked()
    options.checked_kind()
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):
        raise ConsilienceError(
            f"`texts` must be a list of texts or a file, got a {type(texts).__name__}; "
            'give its columns, such as rows["text"] and rows["label"].'
        )
    if tokening.targets != "text" and options.kind != "class":
        raise ConsilienceError(f"targets={tokening.targets!r} are classes, got kind={options.kind!r}.")
    fraction("validation", options.validation, zero=True)
    share = options.test if isinstance(options.test, int | float) else None
    if share is not None:
        fraction("test", share)

    given = _given(texts, y, column, tokening, options.kind)
    held = None if share is not None else _held(options.test, y, column, tokening, options.kind)
    if tokening.targets == "next" and len(given.texts) == 1:
        # One text has no examples to draw: the last part of it is the test.
        every, parts = _cut(given.texts[0], held.texts if held else float(options.test), options.validation)
        y_all, known = None, None
    else:
        y_all, known = _numbered(given, held, tokening, options)
        parts = _parts(given, held, y_all, options)
        every = [*given.texts, *(held.texts if held else ())]
    tokenizer = tokenizer_of(tokening, [every[i] for i in parts[0].tolist()])
    examples, owners = _examples(pieces_of(tokenizer, every, tokening), y_all, tokenizer.fill, tokening)

    if tokening.targets == "next":
        known = options.classes or _tokens(tokenizer.names, tokening.vocabulary)
    train, validation, test = (
        examples.select(torch.isin(owners, part).nonzero().flatten()) for part in parts
    )
    if not len(train) or not len(test):
        raise ConsilienceError("some text must have two tokens or more, to train and to test on, got none.")
    made = source_of(train, test, validation, replace(options, classes=known))
    return made.map(vocabulary=tokenizer.hash)


def _tokens(names: Sequence[str] | None, count: int | None) -> Sequence[str] | None:
    """Return the names of all tokens of a model, which may have more than its tokenizer."""
    if count is None:
        return names
    return [*(names or ())[:count], *(f"<{i}>" for i in range(len(names or ()), count))]


class Given(NamedTuple):
    """Texts and what belongs to them."""

    texts: list[Any]
    """Texts, or lists of words."""
    y: Any


def _given(texts: Any, y: Any, column: str, tokening: Tokening, kind: str, what: str = "texts") -> Given:
    """Return texts and targets, from a file or as they are, checked."""
    texts, y = _from_file(texts, y, column, kind, what)
    wanted = tokening.targets != "next"
    if (y is None) == wanted:
        rule = "need `y`, got none" if wanted else "are the texts themselves, got `y` too"
        raise ConsilienceError(f"targets={tokening.targets!r} {rule}.")
    if isinstance(texts, str):
        if wanted:
            raise ConsilienceError(f"`{what}` must be a list of texts, got one text.")
        texts = [texts]

    texts = list(texts)
    if not texts:
        raise ConsilienceError(f"`{what}` must not be empty, got none.")
    if wanted and len(y) != len(texts):
        raise ConsilienceError(f"`{what}` and `y` must be equally long, got {len(texts)} and {len(y)}.")
    for i, text in enumerate(texts):
        _check_text(text, f"text {i} of `{what}`", tokening.targets == "tags")
    return Given(texts, y)


def _from_file(texts: Any, y: Any, column: str, kind: str, what: str) -> tuple[Any, Any]:
    """Read texts and targets from the columns of a file, or one text from a .txt file."""
    suffix = Path(texts).suffix.lower() if isinstance(texts, str | Path) and len(str(texts)) < 500 else ""
    # A text that ends with ".csv" and names no file is a text.
    if suffix == ".txt" and (isinstance(texts, Path) or Path(texts).is_file()):
        try:
            return Path(texts).read_text(encoding="utf-8"), y
        except (OSError, UnicodeDecodeError) as error:
            raise ConsilienceError(f"cannot read {texts}: {error}.") from error
    if suffix not in FILES or not (y is None or isinstance(y, str)):
        return texts, y

    # A label "01" is not the number 1.
    table = read(Path(texts), f"`{what}`", [column, *([y] if y is not None and kind == "class" else [])])
    for argument, name in (("column", column), ("y", y)):
        if name is not None and name not in table.columns:
            raise unknown(argument, name, table.columns, "the columns")
    # An empty cell is an empty text, but a label must be there.
    found = ["" if text is None else text for text in table.columns[column].tolist()]
    if y is None:
        return found, None
    labels = table.columns[y].tolist()
    for row, label in enumerate(labels):
        if label is None or label != label:
            raise ConsilienceError(
                f"every text must have a label, got none for column {y!r} in {table.where(row)}."
            )
    return found, labels


def _check_text(text: Any, where: str, split: bool) -> None:
    """Refuse what is no text, or no list of words."""
    if split:
        if isinstance(text, str) or not all(isinstance(word, str) for word in text):
            raise ConsilienceError(f"{where} must be a list of words, got {kind_of(text)}; split it.")
    elif not isinstance(text, str):
        raise ConsilienceError(
            f"{where} must be text, got {kind_of(text)}; join pairs and lists, and leave out what is missing."
        )


def _held(test: Any, y: Any, column: str, tokening: Tokening, kind: str) -> Given:
    """Return the texts to test on."""
    if tokening.targets == "next":
        return _given(test, None, column, tokening, kind, "test")
    if isinstance(test, str | Path) and isinstance(y, str):
        return _given(test, y, column, tokening, kind, "test")
    if not isinstance(test, tuple | list) or len(test) != 2:
        raise ConsilienceError(f"`test` must be (texts, y) or a fraction, got {kind_of(test)}.")
    return _given(test[0], test[1], column, tokening, kind, "test")


def _numbered(
    given: Given, held: Given | None, tokening: Tokening, options: Options
) -> tuple[Any, Sequence[Any] | None]:
    """Return the targets of all texts as numbers, and the names of the classes."""
    if tokening.targets == "next":
        return None, None
    every = [
        own
        for part in (given, held)
        if part
        for own in (part.y.tolist() if hasattr(part.y, "tolist") else part.y)
    ]
    if tokening.targets == "text":
        if options.kind != "class":
            return checked_targets(every, options.kind, "`y`"), options.classes
        return _class_targets(every, options, lambda row: f"text {row}")

    words = [*given.texts, *(held.texts if held else ())]
    for i, (own, tags) in enumerate(zip(words, every, strict=True)):
        if isinstance(tags, str) or len(own) != len(tags):
            got = repr(tags) if isinstance(tags, str) else f"{len(tags)} tags"
            raise ConsilienceError(f"every word must have a tag, got {len(own)} words and {got} in text {i}.")
    # Which text a tag is of, for an error.
    owners = [i for i, tags in enumerate(every) for _ in tags]
    flat = [tag for tags in every for tag in tags]
    y, known = _class_targets(flat, options, lambda row: f"text {owners[row]}")
    return [own.tolist() for own in y.split([len(tags) for tags in every])], known


def _class_targets(
    labels: Sequence[Any], options: Options, where: Callable[[int], str]
) -> tuple[Tensor, Sequence[Any] | None]:
    """Return names, or numbers, as class numbers [N], and the names of the classes; None is no target."""
    if any(isinstance(label, str) for label in labels):
        return numbered([_label(label) for label in labels], options.classes, where)
    # Numbers are checked as those of arrays are.
    numbers = [NONE if label is None else label for label in labels]
    return checked_targets(numbers, "class", "`y`"), options.classes


def _label(label: Any) -> str | None:
    """Return a label as the name of a class; None where there is none."""
    return None if label is None or (isinstance(label, int) and label == NONE) else as_name(label)


def _parts(given: Given, held: Given | None, y: Any, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers of the texts to train on, to choose by and to test on."""
    count = len(given.texts)
    numbers = torch.arange(count + (len(held.texts) if held else 0))
    # One target per text is drawn by class; others are drawn by text.
    drawn = y if isinstance(y, Tensor) else torch.zeros(len(numbers), 1)
    kind = options.kind if isinstance(y, Tensor) else "value"
    some = Tensors(numbers[:, None], drawn)
    test = some.select(numbers[count:]) if held else float(options.test)
    split = source_of(
        some.select(numbers[:count]),
        test,
        options.validation,
        replace(options, kind=kind, classes=None, loss=None, metric=None, augment=None),
    )
    train, validation, tests = (
        part.whole()[0][:, 0] if len(part) else numbers[:0]
        for part in (split.train, split.validation, split.test)
    )
    assert isinstance(train, Tensor) and isinstance(validation, Tensor) and isinstance(tests, Tensor)
    return train, validation, tests


def _cut(
    text: str, test: Sequence[str] | float, validation: float
) -> tuple[list[str], tuple[Tensor, Tensor, Tensor]]:
    """Cut one text into what comes first, to train on, then to choose by, and last to test on."""
    end = len(text) - (round(test * len(text)) if isinstance(test, float) else 0)
    middle = end - round(validation * end)
    every = [text[:middle], text[middle:end], *([text[end:]] if isinstance(test, float) else test)]
    numbers = torch.arange(len(every))
    return every, (numbers[:1], numbers[1:2], numbers[2:])


def _examples(pieces: Sequence[Pieces], y: Any, fill: int, tokening: Tokening) -> tuple[Tensors, Tensor]:
    """Return the examples that texts become, and the text of each."""
    if tokening.targets == "next":
        return _windows(pieces, fill, tokening)
    # Modules fail on a sequence without any place.
    ids = [own.ids or [fill] for own in pieces]
    owners = torch.arange(len(ids))
    x = _inputs(ids, fill, tokening.mask)
    if tokening.targets == "text":
        return Tensors(x, y), owners

    tags = []
    lost: list[int] = []
    for i, (own, of_words) in enumerate(zip(pieces, y, strict=True)):
        tags.append(aligned(own.words, of_words) or [NONE])
        # A tokenizer may drop a word of control characters; cut ones are another matter.
        seen = {word for word in own.words if word is not None}
        lost += [i for word in range(max(seen, default=len(of_words) - 1)) if word not in seen]
    if lost:
        warn(f"{len(lost)} words have no token, and their tags are left out; the first is in text {lost[0]}")
    return Tensors(x, _padded(tags, NONE)), owners


def aligned(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Return the tag of each token: that of its word for the first token of a word, else -100.

    >>> aligned([None, 0, 1, 1, None], [7, 8])
    [-100, 7, 8, -100, -100]
    """
    before = [None, *words][:-1]
    return [
        NONE if word is None or word == last else tags[word] for word, last in zip(words, before, strict=True)
    ]


def _windows(pieces: Sequence[Pieces], fill: int, tokening: Tokening) -> tuple[Tensors, Tensor]:
    """Return windows of each text, with the next token of every place; each token is a target once."""
    block = tokening.block
    stride = block if tokening.stride is None else tokening.stride
    inputs, nexts, owners = [], [], []
    for i, own in enumerate(pieces):
        last = len(own.ids) - 1
        for start in range(0, max(0, last), stride):
            # What an earlier window has as targets is only context in this one.
            seen = 0 if start == 0 else block - stride
            if start and start + seen >= last:
                break
            end = min(start + block, last)
            inputs.append(own.ids[start:end])
            nexts.append([NONE] * seen + own.ids[start + seen + 1 : end + 1])
            owners.append(i)
    if not inputs:
        raise ConsilienceError("some text must have two tokens or more, got none.")
    return Tensors(_inputs(inputs, fill, tokening.mask), _padded(nexts, NONE)), torch.tensor(owners)


def _inputs(ids: Sequence[Sequence[int]], fill: int, mask: bool) -> Tree:
    """Return token ids as inputs; without a mask, a module is called with the ids alone."""
    lengths = torch.tensor([len(own) for own in ids])
    tokens = _padded(ids, fill)
    if not mask:
        return Tree({"0": tokens}, {"0": fill}, lengths)
    there = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return Tree(
        {"input_ids": tokens, "attention_mask": there}, {"input_ids": fill, "attention_mask": 0}, lengths
    )


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return lists of numbers as one tensor [N, T]."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, fill)
