"""YAML from files that may come from elsewhere: bounded, and without what hides something from a reader."""

from __future__ import annotations

from typing import Any

import yaml

MOST_BYTES = 1 << 20
"""The largest configuration, in bytes."""
DEEPEST = 20
"""How deep mappings and lists may be nested."""


class NotBounded(yaml.constructor.ConstructorError):
    """YAML that is right, and is refused."""


class Bounded(yaml.SafeLoader):
    """The safe loader of PyYAML, which refuses aliases, keys that come twice, and deep nesting."""

    depth = 0

    def _refused(self, problem: str) -> yaml.YAMLError:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        return NotBounded(None, None, problem, event.start_mark)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, with which a short text becomes gigabytes, and recursion."""
        if self.check_event(yaml.AliasEvent):
            raise self._refused("an alias; write its value")
        self.depth += 1
        if self.depth > DEEPEST:
            raise self._refused(f"more than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse keys that come twice: the first one would be silently without effect."""
        seen = set()
        # Keys that are lists or mappings are refused by the loader.
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen:
                raise NotBounded(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_bounded(text: str) -> Any:
    """Read YAML; raise yaml.YAMLError or ValueError for what is not bounded, or no YAML.

    >>> read_bounded("method: {ewc: {strength: 100}}")
    {'method': {'ewc': {'strength': 100}}}
    >>> read_bounded("a: &x [1]\\nb: *x")
    Traceback (most recent call last):
    consilience.cli.bounded.NotBounded: an alias; write its value
      in "<unicode string>", line 2, column 4:
        b: *x
           ^
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    # The loader is a subclass of the safe one: it makes text, numbers, lists and mappings only.
    return yaml.load(text, Loader=Bounded)


def unbounded(text: str) -> str:
    """Return why a text is YAML that is not bounded; "" if it is, or is no YAML.

    >>> unbounded("[&a [1], *a]"), unbounded("heads.*: {")
    ('an alias; write its value', '')
    """
    try:
        read_bounded(text)
    except NotBounded as error:
        return str(error.problem)
    except (yaml.YAMLError, ValueError):
        return ""
    return ""
