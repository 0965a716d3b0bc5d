"""The tree meets the aims of STYLE.md, as `benchmarks/style.py` measures them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "style.py"


def imported() -> ModuleType:
    spec = importlib.util.spec_from_file_location("consilience_style", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


style = imported()


@functools.cache
def tree() -> Any:
    return style.load()


def assert_met(row: Any) -> None:
    first = "\n".join(map(str, row.offenders[:20]))
    more = f"\n... and {len(row.offenders) - 20} more" if len(row.offenders) > 20 else ""
    assert row.met, (
        f"{row.name}: {row.value}, but the aim is {row.aim}.\n{first}{more}\n"
        "`python benchmarks/style.py --list` lists all; `--paths ROOM` restricts it to a room."
    )


@pytest.mark.parametrize("measure", style.ROWS.values(), ids=lambda measure: measure.__name__)
def test_the_tree_meets_the_aim(measure):
    assert_met(measure(tree()))


@pytest.mark.parametrize("measure", style.ROWS.values(), ids=lambda measure: measure.__name__)
def test_the_script_meets_its_own_aims(measure):
    assert_met(measure(style.load([str(SCRIPT)])))


def test_every_exception_is_needed():
    unused = style.unused_exceptions(tree())
    assert not unused, f"remove from EXCEPTIONS in benchmarks/style.py: {', '.join(unused)}"


def offenders(folder: Path, text: str, measure: Any) -> list[str]:
    file = folder / "example.py"
    file.write_text(text)
    return [offender.what for offender in measure(style.load([str(file)])).offenders]


def test_names_are_counted_by_binding(tmp_path):
    text = "a = b = long = 1\nfor i in (j for j in [_ for _ in ()]): pass\nf = lambda x: x\ndef g(y): pass\n"
    assert offenders(tmp_path, text, style.one_letter_names) == ["a", "b", "i", "j", "f", "x"]


def test_retired_words_are_found(tmp_path):
    text = 'class Rule:\n    ends = True\n\nends = overrides(rule, "pull")\nself.ledger.work(ends)\n'
    assert offenders(tmp_path, text, style.retired_identifiers) == ["ends", "'pull'", "ledger.work"]


def test_retired_phrases_are_found_across_the_values_of_an_error(tmp_path):
    text = 'raise ValueError(f"`x` should be {one}. Found {x}.")  # what it told\nknown = "a found word"\n'
    words = [what.split(":")[0] for what in offenders(tmp_path, text, style.retired_prose)]
    assert words == ["'should be {}. Found'", "'told'"]


def test_private_names_of_other_files_are_found(tmp_path):
    (tmp_path / "theirs.py").write_text("class Theirs:\n    def _hidden(self):\n        self._kept = 1\n")
    (tmp_path / "mine.py").write_text(
        "from consilience.core.params import _secret\n\n\n"
        "class Mine:\n    def __init__(self, other, tensor):\n"
        "        self._here = other._here + other._kept + tensor._of_torch\n        other._hidden()\n"
    )
    found = [offender.what for offender in style.private_names(style.load([str(tmp_path)])).offenders]
    assert found == ["from consilience.core.params import _secret", "other._kept", "other._hidden"]
