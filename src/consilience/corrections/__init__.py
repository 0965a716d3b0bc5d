"""Corrections: how what is known bends the training on one source. Concrete classes, by file; catalogue entries are in `methods`."""
