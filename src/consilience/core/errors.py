"""Errors: each says what is wrong, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConsilienceError(ValueError):
    """Bad input or a bad combination. The message is one line: the rule, what was found, what to do."""


class Refusal(ConsilienceError):
    """A method would have no effect or be wrong in this setting. The message says what to use instead."""


class Interrupted(Exception):
    """The run was stopped by the user after its state was saved. The message says how to go on."""


def kind_of(value: object) -> str:
    """Describe a value for a message: the value if it is short, else its type.

    >>> kind_of(3), kind_of([1] * 99)
    ('3', 'a list')
    """
    text = repr(value)
    # An address in memory tells a user nothing.
    short = len(text) <= 30 and "\n" not in text and " at 0x" not in text
    return text if short else f"a {type(value).__name__}"


def unknown(kind: str, name: str, known: Iterable[str], of: str = "the catalogue's") -> ConsilienceError:
    """Return the error for a name that is not in a catalogue, with the nearest names.

    >>> print(unknown("method", "ewcc", ["ewc", "er"]))
    `method` must be one of the catalogue's, got 'ewcc'; nearest: ewc.
    """
    names = sorted(known)
    # Where nothing is near, a user is helped by all names.
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
    return ConsilienceError(f"`{kind}` must be one of {of}, got {name!r}; nearest: {', '.join(near)}.")
