"""Errors: each says what is wrong, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What code may raise on content that it was not written for; ConsilienceError is a ValueError."""


class ConsilienceError(ValueError):
    """Bad input or a bad combination. The message is one line: the rule, what was found, what to do."""


class Refusal(ConsilienceError):
    """A method would have no effect or be wrong in this setting. The message says what to use instead."""


class Interrupted(Exception):
    """The run was stopped by the user after its state was saved. The message says how to go on."""


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Read content from elsewhere: whatever it raises becomes a ConsilienceError about `what` it must be.

    >>> with reading("a page must be numbers", "write it again"):  # doctest: +ELLIPSIS
    ...     sum({"a": 1})
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: a page must be numbers, got a TypeError (...); write it again.
    """
    try:
        yield
    except ConsilienceError:
        raise
    except UNREADABLE as error:
        first = str(error).partition("\n")[0]
        got = f"a {type(error).__name__} ({first:.200})"
        raise ConsilienceError(f"{what}, got {got}; {remedy}.") from error


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
