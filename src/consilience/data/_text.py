"""How sources are made from text: windows of characters, and the next one."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.source import Source, Tensors
from consilience.data._sources import _fraction
from consilience.data._splits import _whole

FILE = "shakespeare_roles.json.xz"


def shakespeare(
    roles: int | Sequence[str] | None,
    window: int,
    stride: int,
    limit: int | None,
    validation: float,
    path: str | Path | None,
) -> list[Source]:
    """See `consilience.data.shakespeare`."""
    _whole(window=window, stride=stride, **({} if limit is None else {"limit": limit}))
    share = _fraction("validation", validation, zero=True)
    texts = read(path)
    if isinstance(roles, int):
        _whole(roles=roles)
        if roles > len(texts):
            raise ConsilienceError(
                f"`roles` should be at most the {len(texts)} there are. Found `roles = {roles}`."
            )
        roles = list(texts)[:roles]
    chosen = list(texts) if roles is None else list(roles)
    for r in chosen:
        if r not in texts:
            raise unknown("roles", r, texts)
    characters = sorted({c for t in texts.values() for part in t.values() for c in part})
    table = {c: i for i, c in enumerate(characters)}
    labels = tuple(("shakespeare", c) for c in characters)
    found = []
    for r in chosen:
        train = encode(texts[r]["train"], table)
        cut = len(train) - round(share * len(train))
        parts = {"train": train[:cut], "validation": train[cut:], "test": encode(texts[r]["test"], table)}
        for part, text in parts.items():
            if len(text) <= window and (part != "validation" or len(text)):
                raise ConsilienceError(
                    f"`window` should be shorter than every text. Found `window = {window}` and {len(text)} characters ({part}) of {r!r}."
                )
        made = {part: windows(text, window, stride) for part, text in parts.items()}
        if limit is not None:
            made["train"] = Tensors(made["train"].x[:limit], made["train"].y[:limit])
        found.append(
            Source(
                f"shakespeare/{r}",
                made["train"],
                made["validation"],
                made["test"],
                labels,
                tuple(range(len(labels))),
                "shakespeare",
            )
        )
    return found


def read(path: str | Path | None) -> dict[str, dict[str, str]]:
    """{role: {"train": text, "test": text}}."""
    if path is None:
        where = os.environ.get("CONSILIENCE_DATA")
        if not where:
            raise ConsilienceError(
                f"{FILE} should lie in the folder that CONSILIENCE_DATA names. Found that it is not set."
            )
        path = Path(where) / FILE
    if not Path(path).is_file():
        raise ConsilienceError(f"`path` should be a readable .json.xz file. Found none at {path}.")
    try:
        with lzma.open(path) as file:
            texts = json.loads(file.read())
    except (OSError, EOFError, ValueError, lzma.LZMAError) as e:
        raise ConsilienceError(f"a .json.xz file should be whole. Found {path}: {e}") from e
    whole = (
        isinstance(texts, dict)
        and texts
        and all(
            isinstance(t, dict)
            and t.keys() == {"train", "test"}
            and all(isinstance(p, str) for p in t.values())
            for t in texts.values()
        )
    )
    if not whole:
        raise ConsilienceError(
            f'a file of roles should be {{role: {{"train": text, "test": text}}}}. Found another form in {path}.'
        )
    return texts  # type: ignore[no-any-return]


def encode(text: str, table: dict[str, int]) -> Tensor:
    """The numbers of the characters [L]."""
    return torch.from_numpy(np.array([table[c] for c in text], dtype=np.int64))


def windows(text: Tensor, window: int, stride: int) -> Tensors:
    """Windows x [N, T] of a text [L] and the characters y [N] after them; x is a view, so that no character is copied."""
    if len(text) <= window:
        return Tensors(text.new_zeros(0, window), text.new_zeros(0))
    pieces = text.unfold(0, window + 1, stride)
    return Tensors(pieces[:, :-1], pieces[:, -1].clone())
