"""Errors: each says what is wrong, what was found, and what to do."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TypeVar

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


class Absent(ConsilienceError, AttributeError):
    """A property that this object does not have, for a reason that the message gives; `hasattr` is False."""


class Diverged(ConsilienceError):
    """Training left the finite numbers. The message says where, and what to try."""


class Interrupted(Exception):
    """The run was stopped by the user after its state was saved. The message says how to go on."""


F = TypeVar("F", bound=Callable[..., object])


def suggests(call: F, **held: type) -> F:
    """Make a function name the nearest argument where it is called with one that it does not have.

    `held` are classes by the argument that takes an object of them, whose arguments may be meant.

    >>> @suggests
    ... def train(optimiser="sgd"): ...
    >>> train(optimizer="adam")
    Traceback (most recent call last):
    consilience.core.errors.ConsilienceError: `train` has no argument `optimizer`; nearest: optimiser.
    """
    # From the code object, because a signature costs time, and a catalogue has many functions.
    code = call.__code__
    known = [name for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if name != "self"]

    @functools.wraps(call)
    def checked(*args: object, **given: object) -> object:
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                for argument, kind in held.items():
                    inner = difflib.get_close_matches(
                        name, inspect.signature(kind).parameters, n=1, cutoff=0.8
                    )
                    near = [f"{argument}={kind.__name__}({inner[0]}=...)"] if inner else near
                near = near or known
                owner = call.__qualname__.removesuffix(".__init__")
                hint = f"nearest: {', '.join(near)}" if near else "it has none"
                raise ConsilienceError(f"`{owner}` has no argument `{name}`; {hint}.")
        return call(*args, **given)

    return checked  # type: ignore[return-value]


def suggest_arguments(package: str) -> None:
    """Let every function of a catalogue name the nearest argument, as `suggests` does."""
    for name, call in list(vars(sys.modules[package]).items()):
        own = isinstance(call, FunctionType) and call.__module__.startswith(package)
        # Some take any arguments, which they hand on.
        if own and not name.startswith("_") and not call.__code__.co_flags & inspect.CO_VARKEYWORDS:
            checked = suggests(call)
            # In the module that defines it too, so that it can be pickled by its name.
            for module in (package, call.__module__):
                setattr(sys.modules[module], name, checked)


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
