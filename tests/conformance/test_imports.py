"""Imports lead down, inside functions too; catalogues import no torch; the picture of the rooms is made from
the code."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import kit
import pytest

import consilience

_spec = importlib.util.spec_from_file_location("rooms", kit.ROOT / "docs" / "rooms.py")
assert _spec is not None and _spec.loader is not None
rooms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rooms)


def test_every_room_has_a_floor() -> None:
    found = {rooms.room_of(path) for path in rooms.modules().values()} - {"__init__"}
    assert found == {room for floor in rooms.FLOORS for room in floor}


def test_imports_lead_down() -> None:
    assert not rooms.rising(), "\n".join(rooms.rising())


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert rooms.circles() == []


def test_the_picture_is_current() -> None:
    assert rooms.PICTURE.read_text(encoding="utf-8") == rooms.picture(), "run `python docs/rooms.py`"


CODE = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from consilience.report import Result
def inner():
    import consilience.cli.main
    from consilience import methods
class Deep:
    def verb(self):
        if True:
            from consilience.loop import agent
"""


def test_the_reader_of_imports_sees_into_functions(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(CODE)
    known = rooms.modules()
    found = {name for name, _ in rooms.imports(file, known)}
    assert found == {"consilience.cli.main", "consilience.methods", "consilience.loop.agent"}
    assert "consilience.report" not in found, "imports for types alone do not run"
    assert ast.parse(CODE)


CATALOGUES = (
    "aggregators",
    "consolidators",
    "corrections",
    "data",
    "engines",
    "experts",
    "mappers",
    "memory",
    "merging",
    "metrics",
)
CATALOGUES += ("methods", "models", "report", "settings", "skill")


def test_catalogues_import_no_torch() -> None:
    """Not even when every signature is read."""
    code = (
        "import sys, inspect, consilience\n"
        "assert not {'torch', 'sklearn', 'scipy', 'numpy'} & sys.modules.keys()\n"
        f"for room in {CATALOGUES!r}:\n"
        "    for name, f in vars(getattr(consilience, room)).items():\n"
        "        inspect.isfunction(f) and inspect.signature(f)\n"
        "        assert not {'torch', 'sklearn', 'scipy'} & sys.modules.keys(), room\n"
        "consilience.Training(), consilience.ConsilienceError, dir(consilience)\n"
        "assert not {'torch', 'sklearn', 'scipy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", consilience.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(consilience, name) is not None
