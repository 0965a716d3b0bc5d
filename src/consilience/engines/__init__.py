"""Engines: who runs the steps of a learn. They never show to a method."""
