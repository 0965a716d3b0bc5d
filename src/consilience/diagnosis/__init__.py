"""Diagnosis of multi-task learning: which tasks help or harm each other, why, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilience import lazy

if TYPE_CHECKING:
    from consilience.diagnosis._diagnose import PARTS as PARTS
    from consilience.diagnosis._diagnose import diagnose as diagnose
    from consilience.diagnosis._found import Diagnosis as Diagnosis
else:
    __getattr__, __dir__ = lazy.attach(__name__)
