"""The README's examples run, and give what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=["ten lines", "one list"])
def test_the_readme_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "er" in out or "median" in out


def test_the_examples_run(capsys):
    for script in sorted((ROOT / "examples").glob("*.py")):
        runpy.run_path(str(script), run_name="__main__")
    assert "continual" in capsys.readouterr().out


def test_the_commands_of_the_readme_are_accepted(tmp_path):
    commands = re.findall(r"^consilience (run|compare) (.*)$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == 2
    for name, rest in commands:
        arguments = rest.replace("runs/", f"{tmp_path}/").split()
        done = subprocess.run(
            [sys.executable, "-m", "consilience.cli", name, *arguments, "--training.epochs", "1"],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_links_of_the_docs_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
