"""Names of a package that load when they are first used, so that importing it stays quick.

A package declares them once, for type checkers and for this module alike, by imports with an alias:

    if TYPE_CHECKING:
        from consilience.corrections.quadratic import EWC as EWC

    else:
        __getattr__, __dir__ = lazy.attach(__name__)
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType


def attach(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package with names under `if TYPE_CHECKING:`."""

    def getattr_(name: str) -> object:
        origin = "" if name.startswith("__") else declared(package).get(name, "")
        if not origin:
            raise absent(package, name)

        # A name of the package itself is a submodule.
        if origin == package:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(origin), name)

    return getattr_, lambda: listed(package)


def suggest(package: str) -> Callable[[str], object]:
    """Return a `__getattr__` for a catalogue whose names are all there: it names the nearest ones."""

    def getattr_(name: str) -> object:
        raise absent(package, name)

    return getattr_


def absent(package: str, name: str) -> AttributeError:
    """Return the error for a name that a package does not have, with the nearest ones."""
    near = difflib.get_close_matches(name, listed(package), n=3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return AttributeError(f"module {package!r} has no attribute {name!r}{hint}")


@functools.cache
def declared(package: str) -> Mapping[str, str]:
    """Return the modules of the names that a package imports as themselves under `if TYPE_CHECKING:`."""
    tree = ast.parse(Path(str(sys.modules[package].__file__)).read_text(encoding="utf-8"))
    guards = [node for node in tree.body if isinstance(node, ast.If) and is_type_checking(node.test)]
    imports = [node for guard in guards for node in guard.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.name: node.module or ""
        for node in imports
        for alias in node.names
        if alias.asname == alias.name
    }


def is_type_checking(test: ast.expr) -> bool:
    """Whether a condition is `TYPE_CHECKING`."""
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def listed(package: str) -> list[str]:
    """Return the public names of a package: `__all__`, its functions, and names that load later."""
    module = sys.modules[package]
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == package and not name.startswith("_")
    ]

    # Not by getattr, which would ask the package's own `__getattr__`.
    return sorted({*vars(module).get("__all__", ()), *own, *declared(package)})
