"""What `consilience merge` and `merge(allow=...)` refuse unless it is allowed."""

from __future__ import annotations

# A module of its own, which imports nothing: `consilience merge --help` reads it without torch.
ALLOWED = {
    "missing": "an entry that an expert lacks counts as unchanged from the base",
    "extra": "entries that the base lacks are left out",
    "vocabulary": "of entries whose first sizes differ, the rows that all models have are merged; further "
    "rows of the base stay, those of experts are left out",
    "non_finite": "entries with NaN or infinity in any model are taken from the base",
    "other_base": "experts may be far from the base, as if trained from another one",
    "configuration": "configurations of the experts may differ from the base's in fields that change the "
    "meaning of parameters",
}
"""What may be allowed, and what then happens; without it such models are refused."""
