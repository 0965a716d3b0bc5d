"""Warnings: each points at the line of the user that led to it."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

INSIDE = ("consilience", "torch", "contextlib", "functools")
"""Packages whose frames are not the user's: torch may run a module of ours, whose frames lie further in."""


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user that led here, however many calls lie between."""
    warnings.warn(text, category, stacklevel=users_frame(2)[1])


def users_frame(above: int = 1) -> tuple[FrameType, int]:
    """Return the nearest frame of the user, from `above` frames up, and its level as seen from the caller.

    Where there is none, as in a worker, it is the outermost frame.
    """
    # Python 3.12 has `skip_file_prefixes`; names are better, because `__init__` of a dataclass has no file.
    frame, level = sys._getframe(above), above
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    return frame, level
