"""Names on the command line: the functions of the catalogues, and dotted paths to functions of users.

Nothing here imports torch: signatures and docstrings are read, and no function is called.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from consilience.cli.defaults import FITTING
from consilience.core.errors import ConsilienceError, unknown

ROOMS = {
    "setting": "settings",
    "data": "data",
    "split": "data",
    "method": "methods",
    "methods": "methods",
    "model": "models",
    "student": "models",
    "test": "data",
    "auxiliary": "data",
    "aggregator": "aggregators",
    "policy": "memory",
    "maker": "memory",
    "mapper": "mappers",
    "metric": "metrics",
    "loss": "losses",
}
"""The room of each kind of choice."""

HIDDEN = {
    "arrays",
    "auxiliary",
    "embed",
    "head2toe",
    "leave_one_out",
    "macs",
    "moments",
    "new_instances",
    "new_instances_and_classes",
    "own",
    "ple",
    "real",
    "sharing",
    "stream",
    "wrap",
}
"""Functions of a catalogue that need objects as arguments, not text."""


NAMES_CODE = (*ROOMS, "aggregators", "then")
"""Options, by the last word of their name, whose values may be dotted paths."""

TYPED: ContextVar[frozenset[str] | None] = ContextVar("TYPED", default=frozenset())
"""The dotted paths that the user typed, which may be imported; None: all, also those in files (`--trust`)."""


def typed_paths(given: Mapping[str, str | None]) -> frozenset[str] | None:
    """Return the dotted paths among the options of a command line; None where it has `--trust`.

    >>> sorted(typed_paths({"method": "ewc+mine.Penalty", "out": "runs/os.system", "metric": "own.f1(0.5)"}))
    ['mine.Penalty', 'own.f1']
    """
    if given.get("trust") == "true":
        return None
    texts = [text or "" for key, text in given.items() if key.rpartition(".")[2] in NAMES_CODE]
    return frozenset(path for text in texts for path in re.findall(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+", text))


def catalogue(choice: str) -> dict[str, Callable[..., Any]]:
    """List the functions that a choice can name.

    >>> sorted(catalogue("policy"))
    ['class_balanced', 'growing', 'herding', 'reservoir', 'ring']
    """
    module = importlib.import_module(f"consilience.{ROOMS[choice]}")
    names = getattr(module, "__all__", FITTING)
    found = {name: getattr(module, name) for name in names if name not in HIDDEN}

    # One room has both data and splits; a split takes sources first.
    if ROOMS[choice] == "data":
        splits = {name for name, call in found.items() if first_argument(call) in ("source", "sources")}
        found = {
            name.removeprefix("split_"): call
            for name, call in found.items()
            if (name in splits) == (choice == "split")
        }
    # So does the room of policies and makers, which says which are which.
    if choice in ("policy", "maker"):
        found = {name: call for name, call in found.items() if (name in module.MAKERS) == (choice == "maker")}
    return {name: call for name, call in found.items() if inspect.isfunction(call)}


def first_argument(call: Callable[..., Any]) -> str:
    """Name the first parameter of a function; "" for none."""
    return next(iter(inspect.signature(call).parameters), "")


def resolve(choice: str, name: str) -> Callable[..., Any]:
    """Find a function of the catalogue by its name, or one of the user by its dotted path.

    Raises ConsilienceError for a path that the user did not type: a file would choose the code that runs.
    """
    known = catalogue(choice)
    if name in known:
        return known[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise unknown(choice, name, known)
    typed = TYPED.get()
    # A path that begins with a dot is refused below: nothing is imported for it.
    if typed is not None and name not in typed and module_name.strip("."):
        raise ConsilienceError(
            f"`{choice}: {name}` in a file names code, which would run as you; "
            "add --trust if you know who wrote the file."
        )

    # The console script does not search the working directory, where modules of users are.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise ConsilienceError(
            f"`{choice}` must be a name of the catalogue or a dotted path, got {name!r}: {error}."
        ) from error

    call: Callable[..., Any] | None = getattr(module, attribute, None)
    if call is None or not callable(call):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(choice, name, [f"{module_name}.{key}" for key in public])
    return call


def nearest(name: str, known: Iterable[str], sign: str = "--") -> str:
    """Say which known names are nearest, for the end of a message.

    >>> nearest("repeat", ["repeats", "seed"])
    'nearest: --repeats'
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not near:
        # The last word may be right where the prefix is wrong, as in --strength for --method.strength.
        by_tail = {key.rpartition(".")[2]: key for key in known}
        tails = difflib.get_close_matches(name.rpartition(".")[2], list(by_tail), n=1, cutoff=0.5)
        near = [by_tail[tail] for tail in tails]
    return f"nearest: {', '.join(sign + key for key in near)}" if near else "--help lists them"
