"""The command `consilience demo`: every setting on handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilience.cli.options import own_options
from consilience.core.errors import ConsilienceError


@dataclass(frozen=True)
class DemoOptions:
    """Options of the demonstration.

    Args:
        out: the folder for report.html and the results.
    """

    out: str = "demo"


def demo(argv: Sequence[str]) -> int:
    """Run every setting, and write one report."""
    options, words = own_options("demo", argv, DemoOptions)
    if options is None:
        return 0
    if words:
        raise ConsilienceError(f"`consilience demo` takes options only, got {words[0]!r}.")

    # The module needs torch, which --help must not import.
    from consilience.demo import demo as show

    show(options.out)
    return 0
