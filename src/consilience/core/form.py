"""The form of content that was read as JSON: damaged or changed files are refused where they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from consilience.core.errors import kind_of

LARGEST = 1e300
"""Larger numbers overflow when they are added up."""


class Or(NamedTuple):
    """A value of this form, or None."""

    form: Any


class Any_(NamedTuple):
    """A mapping from any names to values of this form."""

    form: Any


def misfit(value: Any, form: Any, where: str = "the result") -> str | None:
    """Return why a value of JSON does not have a form, or None.

    A form is a type (float: any number), a list of one form, a mapping from keys to forms, `Or`, `Any_`, or
    None for anything. A key that ends in "?" may be missing; keys that a form does not name may be there.

    >>> misfit({"a": [1, 2]}, {"a": [int], "b?": str}), misfit({"a": [1, "x"]}, {"a": [int]})
    (None, "`a[1]` must be a number, got 'x'")
    """
    if form is None or (isinstance(form, Or) and value is None):
        return None
    if isinstance(form, Or):
        return misfit(value, form.form, where)
    if isinstance(form, type):
        return None if _is_a(value, form) else f"`{where}` must be {_named(form)}, got {kind_of(value)}"

    parts: list[tuple[Any, Any, str]] = []
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"`{where}` must be a list, got {kind_of(value)}"
        parts = [(entry, form[0], f"{where}[{i}]") for i, entry in enumerate(value)]
    elif not isinstance(value, Mapping):
        return f"`{where}` must be an object, got {kind_of(value)}"
    elif isinstance(form, Any_):
        parts = [(entry, form.form, f"{where}.{name:.40}") for name, entry in value.items()]
    else:
        for name, inner in form.items():
            bare = name.removesuffix("?")
            if bare in value:
                parts.append((value[bare], inner, bare if where == "the result" else f"{where}.{bare}"))
            elif bare == name:
                return f"{where} must have `{name}`, got none"
    return next((found for part in parts if (found := misfit(*part)) is not None), None)


def _is_a(value: Any, form: type) -> bool:
    if form is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (value != value or abs(value) < LARGEST)
    if form is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    return isinstance(value, form)


def _named(form: type) -> str:
    words = {float: "a number", int: "a number", str: "a text", bool: "true or false", list: "a list"}
    return words[form]
