"""Read the rooms of the package and their imports from the code; draw them as docs/rooms.svg.

`python docs/rooms.py` writes the picture. tests/conformance/test_imports.py checks with the functions below that every
import, also inside a function, leads down, that no files import each other in a circle, and that the picture is current.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "consilience"
PICTURE = ROOT / "docs" / "rooms.svg"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("version", "lazy"),
    ("core",),
    ("loop",),
    ("memory", "models", "data", "aggregators"),
    ("corrections", "consolidators", "mappers"),
    ("settings", "methods", "engines"),
    ("report",),
    ("api",),
    ("merging", "skill"),
    ("testing", "demo"),
    ("cli",),
)
"""The rooms from the ground up. A room imports from lower floors only."""

DOOR = {"testing", "demo", "cli"}
"""Rooms that may use the package as a user does, by `import consilience`."""


def room_of(path: Path) -> str:
    """The room of a file: its folder in the package, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def typing_only(tree: ast.Module) -> set[ast.AST]:
    """All nodes under `if TYPE_CHECKING:`, which never run."""
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(imported module of the package, line) of a file, inside functions too, but not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = typing_only(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "consilience":
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module.split(".")[0] != "consilience":
                assert not node.level, f"{path}:{node.lineno}: imports are absolute"
                continue
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (inner if inner in known else module), node.lineno


def edges() -> list[tuple[str, str, str]]:
    """(importing module, imported module, place) over the whole package; the package's own door is left out."""
    known = modules()
    found = []
    for name, path in known.items():
        if path.parent == PACKAGE and path.name == "__init__.py":
            continue
        for target, line in imports(path, known):
            found.append((name, target, f"{path.relative_to(ROOT)}:{line}"))
    return found


def floor_of(room: str) -> int:
    """The floor of a room, from 0."""
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def rising() -> list[str]:
    """Imports that do not lead down, one line each."""
    known, found = modules(), []
    for name, target, place in edges():
        here = room_of(known[name])
        if target == "consilience":
            if here not in DOOR:
                found.append(f"{place}: {here} uses the door of the package")
            continue
        there = room_of(known[target])
        if here != there and floor_of(there) >= floor_of(here):
            found.append(f"{place}: {here} imports {there}")
    return found


def circles() -> list[list[str]]:
    """Groups of modules that import each other in a circle (strongly connected, by Tarjan's algorithm)."""
    after: dict[str, set[str]] = {}
    for name, target, _ in edges():
        if target != name:
            after.setdefault(name, set()).add(target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(after.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(after):
        if name not in index:
            visit(name)
    return found


def picture() -> str:
    """The rooms by floor, with a line for every import from one room to another, as SVG."""
    known = modules()
    lines: dict[str, int] = {}
    for path in known.values():
        lines[room_of(path)] = lines.get(room_of(path), 0) + len(
            path.read_text(encoding="utf-8").splitlines()
        )
    pairs = {
        (room_of(known[name]), room_of(known[target]))
        for name, target, _ in edges()
        if target != "consilience" and room_of(known[name]) != room_of(known[target])
    }

    # Places: one row per floor, the ground floor at the bottom.
    width, height, step = 860, 34, 76
    place: dict[str, tuple[float, float]] = {}
    for i, rooms in enumerate(FLOORS):
        shown = [room for room in rooms if room in lines]
        for j, room in enumerate(shown):
            place[room] = (width * (j + 0.5) / len(shown), step * (len(FLOORS) - 1 - i) + 30)

    parts = []
    for here, there in sorted(pairs):
        (x1, y1), (x2, y2) = place[here], place[there]
        parts.append(f'<path d="M{x1:.0f} {y1 + height / 2:.0f}L{x2:.0f} {y2 - height / 2:.0f}"/>')
    for room, (x, y) in place.items():
        box = f'<rect x="{x - 55:.0f}" y="{y - height / 2:.0f}" width="110" height="{height}" rx="5"/>'
        title = f'<text x="{x:.0f}" y="{y:.0f}">{room}</text>'
        size = f'<text class="size" x="{x:.0f}" y="{y + 12:.0f}">{lines[room]:,} lines</text>'
        parts.append(box + title + size)

    style = (
        "path{stroke:#7a8aa0;stroke-width:1;opacity:.55;fill:none}rect{fill:#eef2f8;stroke:#5b6b84}"
        "text{font:12px sans-serif;text-anchor:middle;fill:#1d2733}.size{font-size:9px;fill:#5b6b84}"
    )
    view = f"0 0 {width} {step * len(FLOORS) - 10}"
    header = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" role="img" aria-label="Rooms and their imports">'
    return "\n".join([header, f"<style>{style}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
