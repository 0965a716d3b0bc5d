"""Sources from text: windows of characters as inputs, the next character as target."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core.checks import fraction, whole_number
from consilience.core.errors import ConsilienceError, unknown
from consilience.core.source import Source, Tensors

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
    whole_number(window=window, stride=stride, **({} if limit is None else {"limit": limit}))
    share = fraction("validation", validation, zero=True)
    texts = read(path)
    chosen = _chosen_roles(roles, texts)

    # Of all roles, so that models and frames are the same for any choice of them.
    characters = sorted({char for role in texts.values() for text in role.values() for char in text})
    numbers = {char: i for i, char in enumerate(characters)}
    labels = tuple(("shakespeare", char) for char in characters)

    sources = []
    for role in chosen:
        train = encode(texts[role]["train"], numbers)
        cut = len(train) - round(share * len(train))
        parts = {
            "train": train[:cut],
            "validation": train[cut:],
            "test": encode(texts[role]["test"], numbers),
        }
        for part, text in parts.items():
            # An empty validation text is what `validation=0` asks for.
            if len(text) <= window and (part != "validation" or len(text)):
                raise ConsilienceError(
                    f"`window` must be shorter than every text, got {window} "
                    f"for {len(text)} characters ({part}) of {role!r}."
                )
        made = {part: windows(text, window, stride) for part, text in parts.items()}
        if limit is not None:
            made["train"] = Tensors(made["train"].x[:limit], made["train"].y[:limit])

        classes = tuple(range(len(labels)))
        examples = made["train"], made["validation"], made["test"]
        sources.append(Source(f"shakespeare/{role}", *examples, labels, classes, "shakespeare"))
    return sources


def _chosen_roles(roles: int | Sequence[str] | None, texts: dict[str, dict[str, str]]) -> list[str]:
    """Return the names of the roles to take."""
    if isinstance(roles, int):
        whole_number(roles=roles)
        if roles > len(texts):
            raise ConsilienceError(
                f"`roles` must be at most {len(texts)}, the roles of the file, got {roles}."
            )
        return list(texts)[:roles]
    chosen = list(texts) if roles is None else list(roles)
    for role in chosen:
        if role not in texts:
            raise unknown("roles", role, texts)
    return chosen


def read(path: str | Path | None) -> dict[str, dict[str, str]]:
    """Read the texts of a file: {role: {"train": text, "test": text}}."""
    if path is None:
        folder = os.environ.get("CONSILIENCE_DATA")
        if not folder:
            raise ConsilienceError(
                f"no folder to find {FILE} in: CONSILIENCE_DATA is not set; set it, or give `path`."
            )
        path = Path(folder) / FILE
    if not Path(path).is_file():
        raise ConsilienceError(f"`path` must be a readable .json.xz file, got none at {path}.")

    # Damaged files raise different errors, depending on where the damage is.
    try:
        with lzma.open(path) as file:
            texts = json.loads(file.read())
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ConsilienceError(f"cannot read {path} as .json.xz: {error}") from error
    if not isinstance(texts, dict) or not texts or not all(map(_is_role, texts.values())):
        raise ConsilienceError(
            f'a file of roles must be {{role: {{"train": text, "test": text}}}}, got another form in {path}.'
        )
    return texts


def _is_role(value: Any) -> bool:
    """Whether a value is {"train": text, "test": text}."""
    return (
        isinstance(value, dict)
        and value.keys() == {"train", "test"}
        and all(isinstance(text, str) for text in value.values())
    )


def encode(text: str, numbers: dict[str, int]) -> Tensor:
    """Return the numbers [L] of the characters of a text."""
    return torch.from_numpy(np.array([numbers[char] for char in text], dtype=np.int64))


def windows(text: Tensor, window: int, stride: int) -> Tensors:
    """Return windows x [N, T] of an encoded text [L], and the characters y [N] that follow them."""
    if len(text) <= window:
        return Tensors(text.new_zeros(0, window), text.new_zeros(0))

    # x stays a view of the text: with stride 1, copies would take T times the memory.
    pieces = text.unfold(0, window + 1, stride)
    return Tensors(pieces[:, :-1], pieces[:, -1].clone())
