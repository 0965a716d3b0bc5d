"""The version of the package. It imports nothing, so that every room may read it."""

from __future__ import annotations

__version__ = "0.2.0"
