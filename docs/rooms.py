"""Read the rooms of the package and their imports from the code; draw them as docs/rooms.svg.

`python docs/rooms.py` writes the picture. tests/conformance/test_imports.py uses the functions below. It
checks that every import leads down, also inside a function, that no files import each other in a circle, and
that the picture is current.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "consilience"
PICTURE = ROOT / "docs" / "rooms.svg"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("version", "lazy"),
    ("core",),
    ("metrics", "losses", "trackers"),
    ("loop",),
    ("memory", "models", "data", "aggregators"),
    ("corrections", "consolidators", "mappers"),
    ("settings", "methods", "engines"),
    ("report", "progress"),
    ("api",),
    ("merging", "skill", "tuning"),
    ("diagnosis", "experts"),
    ("testing", "demo"),
    ("cli",),
)
"""The rooms from the ground up. A room imports from lower floors only."""

HELPERS = ("version", "lazy")
"""Rooms that the picture leaves out: nearly all others import them."""

WHAT = {
    "core": "what a method is made of",
    "metrics": "what is measured",
    "losses": "what is minimised",
    "trackers": "where numbers go",
    "progress": "bars and lines",
    "loop": "what runs",
    "memory": "buffer policies, synthetic memory",
    "models": "models, heads",
    "data": "sources",
    "aggregators": "how rows combine",
    "corrections": "how training changes",
    "consolidators": "how senders combine",
    "mappers": "which expert answers",
    "settings": "schedules",
    "methods": "the catalogue",
    "engines": "serial, batched, ray",
    "report": "tables, figures",
    "api": "run, sweep",
    "merging": "checkpoints",
    "skill": "banks of modules",
    "tuning": "hyperparameters",
    "diagnosis": "tasks that conflict",
    "experts": "files with cards",
    "testing": "checks for methods",
    "demo": "all settings, once",
    "cli": "the command line",
}
"""What each room of the picture is for, in a few words."""

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
    """(importing module, imported module, place) over the whole package, without the package's own door."""
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


def room_imports() -> set[tuple[str, str]]:
    """(importing room, imported room) over the whole package."""
    known = modules()
    pairs = {
        (room_of(known[name]), room_of(known[target]))
        for name, target, _ in edges()
        if target != "consilience"
    }
    return {(here, there) for here, there in pairs if here != there}


def direct(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs that do not follow from others: without a -> c where there are a -> b and a way from b to c.

    >>> sorted(direct({("a", "b"), ("b", "c"), ("a", "c")}))
    [('a', 'b'), ('b', 'c')]
    """
    after: dict[str, set[str]] = {}
    for here, there in pairs:
        after.setdefault(here, set()).add(there)

    def below(room: str) -> set[str]:
        return {end for there in after.get(room, ()) for end in {there} | below(there)}

    return {(a, c) for a, c in pairs if not any(c in below(b) for b in after[a] - {c})}


class Grid:
    """Places of rooms and of the bends of lines: every floor is a row, from the top one down.

    A line that crosses floors has a bend on each, between the rooms, so that it crosses no box. The order
    within a row is improved by turns: each place moves towards the mean of its neighbours on the row above,
    then below.
    """

    def __init__(self, floors: Sequence[Sequence[str]], lines: Iterable[tuple[str, str]]) -> None:
        self.rows: list[list[str]] = [list(rooms) for rooms in reversed(floors)]
        self.level = {room: i for i, row in enumerate(self.rows) for room in row}
        self.ways: list[list[str]] = []
        for here, there in sorted(lines):
            way = [here]
            for i in range(self.level[here] + 1, self.level[there]):
                # Lines to one room share their bends, as branches of one stem.
                bend = f">{there}@{i}"
                if bend not in self.rows[i]:
                    self.rows[i].append(bend)
                way.append(bend)
            self.ways.append([*way, there])

        # Dictionaries keep their order, so that sums over neighbours, and the picture, are always the same.
        self.near: dict[str, dict[str, None]] = {}
        for way in self.ways:
            for above, below in pairwise(way):
                self.near.setdefault(above, {})[below] = None
                self.near.setdefault(below, {})[above] = None
        self.order()

    def order(self) -> None:
        """Sort each row by the means of its neighbours, and keep the order with the fewest crossings."""
        best, least = [list(row) for row in self.rows], self.crossings()
        for turn in range(40):
            down = turn % 2 == 0
            for i in range(len(self.rows)) if down else reversed(range(len(self.rows))):
                other = i - 1 if down else i + 1
                if not 0 <= other < len(self.rows):
                    continue
                place = {name: j / len(self.rows[other]) for j, name in enumerate(self.rows[other])}
                own = {name: j / len(self.rows[i]) for j, name in enumerate(self.rows[i])}
                means = {}
                for name in self.rows[i]:
                    found = [place[near] for near in self.near.get(name, ()) if near in place]
                    means[name] = sum(found) / len(found) if found else own[name]
                self.rows[i].sort(key=lambda name, means=means: (means[name], name))
            if (now := self.crossings()) < least:
                best, least = [list(row) for row in self.rows], now
        self.rows = best

    def crossings(self) -> int:
        """How often lines between neighbouring rows cross."""
        count = 0
        for upper, lower in pairwise(self.rows):
            below = {name: j for j, name in enumerate(lower)}
            ends = [sorted(below[n] for n in self.near.get(name, ()) if n in below) for name in upper]
            for i, left in enumerate(ends):
                count += sum(a > b for right in ends[i + 1 :] for a in left for b in right)
        return count

    def places(self, box: float, gap: float, step: float) -> tuple[dict[str, tuple[float, float]], float]:
        """(x, y) of every name, and the width of the picture."""
        size = {name: gap if name.startswith(">") else box + gap for row in self.rows for name in row}
        width = max(sum(size[name] for name in row) for row in self.rows)
        x: dict[str, float] = {}
        for row in self.rows:
            left = (width - sum(size[name] for name in row)) / 2
            for name in row:
                x[name] = left + size[name] / 2
                left += size[name]

        # Every name moves towards the mean of its neighbours, as far as those of its row leave room.
        for _ in range(200):
            for row in self.rows:
                for j, name in enumerate(row):
                    near = [x[other] for other in self.near.get(name, ())]
                    low, high = size[name] / 2, width - size[name] / 2
                    if j:
                        low = x[row[j - 1]] + (size[row[j - 1]] + size[name]) / 2
                    if j + 1 < len(row):
                        high = x[row[j + 1]] - (size[row[j + 1]] + size[name]) / 2
                    goal = sum(near) / len(near) if near else x[name]
                    x[name] = min(max(x[name] + 0.3 * (goal - x[name]), low), high)
        return {name: (x[name], step * i) for i, row in enumerate(self.rows) for name in row}, width


STYLE = """
path{stroke:#7a8aa0;stroke-width:1.3;fill:none}
rect{fill:#eef2f8;stroke:#5b6b84}
.ground rect{fill:#dfe9df;stroke:#5a7a5a}
text{font:600 13px sans-serif;text-anchor:middle;fill:#1d2733}
.what{font:10.5px sans-serif;fill:#46566e}
"""


def picture() -> str:
    """The rooms by floor as SVG. A line leads from a room down to one that it imports, unless implied."""
    box, height, step, edge = 142, 40, 88, 10
    pairs = room_imports()
    shown = {room for pair in pairs for room in pair} - set(HELPERS)
    floors = [[room for room in rooms if room in shown] for rooms in FLOORS]
    drawn = {(a, b) for a, b in direct(pairs) if a in shown and b in shown}
    grid = Grid([rooms for rooms in floors if rooms], drawn)
    place, width = grid.places(box, 16, step)

    parts = []
    for way in grid.ways:
        points = [place[name] for name in way]
        (x, y), rest = points[0], points[1:]
        text = f"M{x:.0f} {y + height / 2:.0f}"
        for i, (x2, y2) in enumerate(rest):
            # Between rows a line is a curve that starts and ends upright; next to boxes it is straight.
            start = y + height / 2
            end = y2 - height / 2
            middle = (start + end) / 2
            text += f"C{x:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {end:.0f}"
            if i + 1 < len(rest):
                text += f"V{y2 + height / 2:.0f}"
            x, y = x2, y2
        parts.append(f'<path d="{text}"><title>{way[0]} imports {way[-1]}</title></path>')

    for room in sorted(shown):
        x, y = place[room]
        below = ", ".join(sorted(b for a, b in pairs if a == room and b in shown)) or "no other room"
        kind = ' class="ground"' if room in ("core", "loop") else ""
        parts += [
            f"<g{kind}><title>{room} imports {below}</title>",
            f'<rect x="{x - box / 2:.0f}" y="{y - height / 2:.0f}" width="{box}" height="{height}" rx="6"/>',
            f'<text x="{x:.0f}" y="{y - 2:.0f}">{room}</text>',
            f'<text class="what" x="{x:.0f}" y="{y + 13:.0f}">{WHAT[room]}</text></g>',
        ]

    rows = len([rooms for rooms in floors if rooms])
    view = f"{-edge} {-height / 2 - edge:.0f} {width + 2 * edge:.0f} {step * (rows - 1) + height + 2 * edge}"
    label = "Rooms and their imports"
    header = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" role="img" aria-label="{label}">'
    return "\n".join([header, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
