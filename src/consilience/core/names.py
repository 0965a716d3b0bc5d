"""Names: what users may call a source, an agent or a task, and the library's own keys next to them.

Names of users and keys of ours meet in the same dictionaries (an agent's memory, receipts, a checkpoint). A
key of ours is empty or stands in angle brackets, and `checked_name` refuses such names, so neither can hide
the other.

>>> checked_name("the sum", "source")
'the sum'
>>> pair("a|b", "c") == pair("a", "b|c")
False
>>> unpair(pair("a|b", "50%"))
('a|b', '50%')
"""

from __future__ import annotations

from collections.abc import Iterable

from consilience.core.errors import ConsilienceError

WHOLE = ""
"""The source of a message that is about its sender, not about one source."""

OF_WEIGHTS = "|"
"""How `pair(sender, WHOLE)` ends, and no other pair: bars in names are escaped."""

SUM = "<sum>"
"""A running sum over all that was received, in the memory of a correction."""

PAST = "<past>"
"""What earlier rounds left, in the memory of a correction."""

RECEIVED = "<received>"
"""What the last exchange brought, in the memory of a correction."""


AGGREGATOR = "<aggregator>"
"""The aggregator of a step, among those that keep traces."""

SAMPLER = "<sampler>"
"""The sampler, among them."""


def trace_key(correction: str) -> str:
    """Return the key of a correction's traces in `State.memory`, next to its summaries."""
    return f"<trace of {correction}>"


def checked_name(name: str, kind: str) -> str:
    """Return a name of a `kind` ("source", "agent"). Raises ConsilienceError where it has a form of ours."""
    # Angle brackets rather than a list of names, so that a later version can keep further keys.
    if not name or (name.startswith("<") and name.endswith(">")):
        raise ConsilienceError(
            f"names of {kind}s must not be empty or stand in angle brackets, got {name!r}; "
            "choose another name."
        )
    return name


def pair(sender: str, source: str) -> str:
    """Return one key for (sender, source). Bars in names are escaped, so that two pairs never share a key."""
    return f"{escaped(sender, '|')}|{escaped(source, '|')}"


def unpair(key: str) -> tuple[str, str]:
    """Return the (sender, source) whose key `pair` made."""
    sender, _, source = key.partition("|")
    return unescaped(sender, "|"), unescaped(source, "|")


def joined(names: Iterable[str]) -> str:
    """Return one key for several names, in their order: "a+b" is another key than that of "a" and "b".

    >>> joined(["a+b"]) == joined(["a", "b"]), joined(["a", "b"])
    (False, 'a+b')
    """
    return "+".join(escaped(name, "+") for name in names)


def owned_by(entry: str, prefix: str, owner: str, parts: int = 1) -> bool:
    """Whether an entry `prefix/<owner>/...`, with `parts` more parts, belongs to an owner.

    The name of an owner may hold slashes; the other parts may not.

    >>> owned_by("hat/a/b/1.weight", "hat", "a"), owned_by("hat/a/b/1.weight", "hat", "a/b")
    (False, True)
    """
    start, *rest = entry.rsplit("/", parts)
    return len(rest) == parts and start == f"{prefix}/{owner}"


def clean(text: object) -> str:
    r"""Write a name on one line, without control characters.

    >>> clean("two\nlines \x1b[31m")
    'two lines [31m'
    """
    return "".join(letter for letter in " ".join(str(text).split()) if letter.isprintable())


# The percent sign goes first when escaping and last when reading, or an escape would be escaped again.
def escaped(name: str, mark: str) -> str:
    """Return a name without a mark that has a meaning where the name is put; `unescaped` reads it back.

    >>> escaped("a:b", ":"), unescaped(escaped("a:b%3A", ":"), ":")
    ('a%3Ab', 'a:b%3A')
    """
    return name.replace("%", "%25").replace(mark, f"%{ord(mark):02X}")


def unescaped(name: str, mark: str) -> str:
    """Return the name that `escaped` wrote."""
    return name.replace(f"%{ord(mark):02X}", mark).replace("%25", "%")
