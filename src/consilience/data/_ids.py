"""Numbers of names, for embedding tables."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError


def ids(columns: Sequence[Iterable[Any]], rows: Sequence[int]) -> Tensor:
    """Return numbers [N, columns] for embedding tables, of names such as those of users and items.

    A name has the number 1 + hash % (rows - 1), the same in every table, process and client, so that names
    that come later need no table of their own; some share a row. None, NaN and "" are missing: 0.

    Args:
        columns: the names of each column [N].
        rows: how many rows the embedding table of each column has, at least 2.

    Raises ConsilienceError for columns of different lengths.

    >>> found = ids([["ann", "bob", None], ["tea", "tea", "rum"]], [1000, 1000])
    >>> found.shape, int(found[2, 0]), bool(found[0, 1] == found[1, 1])
    (torch.Size([3, 2]), 0, True)
    """
    if len(columns) != len(rows):
        raise ConsilienceError(f"`rows` must be one number per column, got {len(rows)} of {len(columns)}.")
    found = []
    # A hash instead of a list of names: clients need not agree on one, and a name that is new has a row.
    for names, count in zip(columns, rows, strict=True):
        whole_number(2, rows=count)
        found.append([0 if _missing(name) else 1 + zlib.crc32(_text(name)) % (count - 1) for name in names])
    if len({len(own) for own in found}) > 1:
        raise ConsilienceError(f"columns must be equally long, got {', '.join(str(len(o)) for o in found)}.")
    return torch.tensor(found).T.contiguous()


def _missing(name: Any) -> bool:
    # NaN is what readers of tables put where a cell is empty, and differs from itself.
    return name is None or name == "" or name != name


def _text(name: Any) -> bytes:
    # A column of whole numbers with a gap is read as fractions.
    whole = isinstance(name, float) and name.is_integer()
    return str(int(name) if whole else name).encode()
