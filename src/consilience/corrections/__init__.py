"""Corrections: how earlier knowledge changes training on a source; `methods` has the catalogue."""
