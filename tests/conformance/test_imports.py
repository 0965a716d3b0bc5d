"""Imports run one way, and catalogues import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys

import kit
import pytest

import consilience

SOURCE = kit.ROOT / "src" / "consilience"
ROOMS = sorted(p.name for p in SOURCE.iterdir() if (p / "__init__.py").exists())
CONCEPTS = {"corrections", "aggregators", "consolidators", "mappers", "models", "data", "memory"}
MAY = {"core": {"core"}, **{room: {"core", room} for room in CONCEPTS}}
"""What a room may import at module level; others stand on top and may import all."""

TOP = {"engines", "merging", "report", "network", "serve", "skill", "cli", "demo"}
"""What stands on top: nothing below imports it at module level."""

CATALOGUES = consilience._ROOMS


def typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def loaded(body: list[ast.stmt]) -> set[str]:
    """The names that a module imports when it is loaded; not in functions, not for types alone."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or typing_only(node):
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= (
                {f"{node.module}.{a.name}" for a in node.names}
                if node.module == "consilience"
                else {node.module or ""}
            )
        else:
            for part in ("body", "orelse", "finalbody", "handlers"):
                for inner in getattr(node, part, []):
                    found |= loaded(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])
    return found


def imports(module: ast.Module) -> set[str]:
    """The consilience rooms among them."""
    names = [n.split(".") for n in loaded(module.body)]
    return {n[1] if len(n) > 1 else "" for n in names if n[0] == "consilience"}


MODULES = sorted(str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    room = module.split("/")[0].removesuffix(".py")
    found = imports(ast.parse((SOURCE / module).read_text(encoding="utf-8")))
    if room in MAY:
        assert found <= MAY[room], f"{room} may import {sorted(MAY[room])}"
    elif room in ("methods", "settings", "__init__"):
        assert not found & TOP


def test_every_room_has_its_place() -> None:
    assert set(ROOMS) <= MAY.keys() | TOP | {"methods", "settings"}


def test_the_check_sees() -> None:
    code = "if True:\n    from consilience.report import x\ndef f():\n    import consilience.cli\nfrom consilience import methods"
    assert imports(ast.parse(code)) == {"report", "methods"}


def test_catalogues_import_no_torch() -> None:
    """Not even when every signature is read."""
    code = (
        "import sys, inspect, consilience\n"
        f"for room in {CATALOGUES!r}:\n"
        "    for name, f in vars(getattr(consilience, room)).items():\n"
        "        inspect.isfunction(f) and inspect.signature(f)\n"
        "        assert not {'torch', 'sklearn', 'scipy'} & sys.modules.keys(), room\n"
        "consilience.Training(), consilience.ConsilienceError, dir(consilience)\n"
        "assert not {'torch', 'sklearn', 'scipy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
