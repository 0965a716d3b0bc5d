"""Similarity of class names, by a sentence encoder or by their spelling; and the rows of heads by class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.errors import ConsilienceError
from consilience.core.message import Module
from consilience.core.source import Label

Encoder = str | Callable[[list[str]], Any] | None
"""A folder or name of a sentence-transformers model, a function from names to vectors [n, d], or none."""


class ClassRow(NamedTuple):
    """The weight [d] and the bias [] of one class in a linear head."""

    weight: Tensor
    bias: Tensor


Rows = dict[Label, ClassRow]
"""The row of each class."""


def rows_of(module: Module) -> Rows:
    """Return the row of each class of a module's head; none where it has no head of its own."""
    entries, rows = module.group("entries"), {}
    for name, columns in module.group("buffers").items():
        head = name.removesuffix(".columns")
        if head == name or f"{head}.weight" not in entries or f"{head}.bias" not in entries:
            continue
        for i, column in enumerate(columns.tolist()):
            row = ClassRow(entries[f"{head}.weight"][i], entries[f"{head}.bias"][i])
            rows[module.labels[column]] = row
    return rows


def similarities(names_a: Sequence[str], names_b: Sequence[str], encoder: Encoder = None) -> Tensor:
    """Return how alike names are: S [A, B] in [-1, 1], the cosine of their vectors, and 1 for equal names.

    s_ij = <e(a_i), e(b_j)> / (||e(a_i)|| ||e(b_j)||). With an encoder e(a) is a sentence embedding. Without,
    it counts the name's words in lower case (cut at all but letters and digits, and where an upper-case
    letter follows a lower-case one) and the three-letter pieces of each word between its ends, as "bike" has
    _bi, bik, ike, ke_: that finds spellings, plurals and compounds, not synonyms. Words weigh as pieces do.

    Args:
        names_a, names_b: class names.
        encoder: a folder or the name of a sentence-transformers model, of which only local files are used
            (`pip install consilience[text]`), a function from a list of names to vectors, or None.

    Raises ConsilienceError if the encoder cannot be loaded, or does not return one vector per name.

    Paper: Ge et al. 2023, section 7.1 (CLIP's text encoder there, thresholds of .90 and .95; with
    all-MiniLM-L6-v2 "bike" and "bicycle" have .92, "dog" and "puppy" .80).

    >>> s = similarities(["mountain bike", "Digit 3"], ["bikes", "digit_3", "van"])
    >>> [[round(v, 2) for v in row] for row in s.tolist()]
    [[0.33, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if not names_a or not names_b:
        return torch.zeros(len(names_a), len(names_b))

    # Each name is encoded once, whichever list it is in.
    distinct = list(dict.fromkeys([*names_a, *names_b]))
    place = {name: i for i, name in enumerate(distinct)}
    index_a, index_b = (torch.tensor([place[name] for name in names]) for names in (names_a, names_b))
    if encoder is None:
        counts = _counted(distinct)
        cosines = torch.from_numpy((counts[index_a.numpy()] @ counts[index_b.numpy()].T).toarray())
    else:
        unit = F.normalize(_embedded(distinct, encoder).double(), dim=1)
        cosines = unit[index_a] @ unit[index_b].T
    return cosines.clamp(-1, 1).float().masked_fill(index_a[:, None] == index_b, 1.0)


def _pieces(name: str) -> Counter[str]:
    """Count the words of a name and their pieces; the name itself where it has no letter or digit."""
    # The underscores mark both ends of a word, so that endings differ from middles.
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    pieces = [f"_{word}_"[i : i + 3] for word in words for i in range(len(word))]
    return Counter([*words, *pieces] or [name])


def _counted(names: Sequence[str]) -> Any:
    """Return the counts of pieces, a sparse matrix with rows of unit length."""
    # scipy is slow to import, and only this function needs it.
    from scipy.sparse import csr_matrix

    counts = [_pieces(name) for name in names]
    column = {piece: i for i, piece in enumerate(dict.fromkeys(piece for count in counts for piece in count))}
    values, rows, columns = [], [], []
    for i, count in enumerate(counts):
        norm = sum(times * times for times in count.values()) ** 0.5
        for piece, times in count.items():
            values.append(times / norm)
            rows.append(i)
            columns.append(column[piece])
    return csr_matrix((values, (rows, columns)), shape=(len(names), len(column)))


@lru_cache(maxsize=2)
def _loaded(name: str) -> Any:
    """Load a sentence-transformers model from local files."""
    if os.sep in name and not os.path.isdir(name):
        raise ConsilienceError(
            f"`encoder` must be a folder of a sentence-transformers model, and there is none at {name}."
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConsilienceError(
            f"an encoder by name needs sentence-transformers, got: {error}; pip install consilience[text]."
        ) from error

    # The library raises many kinds of errors for a model that is missing, broken, or in another format.
    try:
        return SentenceTransformer(name, device="cpu", local_files_only=True)
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConsilienceError(
            f"`encoder` must be a sentence-transformers model in local files, got {name!r}: {line}"
        ) from error


def _embedded(names: list[str], encoder: Any) -> Tensor:
    """Return the vectors [n, d] that an encoder gives the names."""
    if callable(encoder):
        vectors = torch.as_tensor(encoder(names))
    else:
        with torch.inference_mode():
            vectors = _loaded(str(encoder)).encode(names, convert_to_tensor=True, show_progress_bar=False)
        # A copy, since tensors made in inference mode cannot be used elsewhere.
        vectors = vectors.clone().cpu()
    if vectors.ndim != 2 or len(vectors) != len(names) or not torch.isfinite(vectors).all():
        raise ConsilienceError(
            "`encoder` must give one finite vector per name, "
            f"got {tuple(vectors.shape)} for {len(names)} names."
        )
    return vectors
