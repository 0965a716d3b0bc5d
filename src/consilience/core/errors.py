"""Errors: each states the rule and what was found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConsilienceError(ValueError):
    """Bad input or a bad combination; the message is one line: the rule, then what was found."""


class Refusal(ConsilienceError):
    """A method that would be silently inert or wrong in this setting; the message says what to do instead."""


class Interrupted(Exception):
    """The run was stopped by the user after its state was saved; the message says how to go on."""


def kind_of(value: object) -> str:
    """What was found, for a message: a short value, or the name of its type.

    >>> kind_of(3), kind_of([1] * 99)
    ('3', 'a list')
    """
    text = repr(value)
    return (
        text if len(text) <= 30 and "\n" not in text and " at 0x" not in text else f"a {type(value).__name__}"
    )


def unknown(kind: str, name: str, known: Iterable[str], of: str = "the catalogue's") -> ConsilienceError:
    """The error for a name that is not in a catalogue, with the nearest names.

    >>> print(unknown("method", "ewcc", ["ewc", "er"]))
    `method` should be one of the catalogue's. Found 'ewcc'; nearest: ewc.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
    return ConsilienceError(f"`{kind}` should be one of {of}. Found {name!r}; nearest: {', '.join(near)}.")
