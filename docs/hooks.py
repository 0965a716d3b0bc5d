"""Pages of the site that are made from the code: the catalogue, the reference, the benchmarks' tables.

MkDocs calls `on_files` and `on_nav`-time hooks by name; see mkdocs.yml.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("corrections", "step_aggregator", "exchange_aggregator", "aggregator", "consolidator", "mapper")
"""The fields of a Method that hold its parts."""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the files of the site."""
    from mkdocs.structure.files import File

    pages = {"catalogue.md": catalogue(), "benchmarks.md": benchmarks(), **reference()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def catalogue() -> str:
    """Every method: what it does, its formula and paper, its arguments with defaults, and where it runs."""
    import consilience as cs

    cells = json.loads((ROOT / "tests" / "pinned" / "methods.json").read_text(encoding="utf-8"))
    lines = [
        "# Every method",
        "",
        "Made from the code. Formulas stand as in the docstrings of the parts.",
        "",
    ]
    for name in sorted(cs.methods.__all__):
        function = getattr(cs.methods, name)
        doc = inspect.getdoc(function) or ""
        lines += [f"## `{name}`", "", doc.split("\n\n")[0].replace("\n", " "), ""]
        lines += ["```python", f"cs.methods.{name}{inspect.signature(function)}", "```", ""]
        lines += arguments(doc)
        paper = re.search(r"^Paper: (.+?)(?:\n\n|\Z)", doc, re.M | re.S)
        if paper:
            lines += ["**Paper.** " + " ".join(paper.group(1).split()), ""]
        for part in parts(function):
            lines += formula(part)
        row = cells.get(name, {})
        runs = [setting for setting, cell in row.items() if cell == "runs"]
        if row:
            lines += [f"**Runs in** {', '.join(runs) or 'no setting without an argument'}.", ""]
    return "\n".join(lines)


def arguments(doc: str) -> list[str]:
    """The Args section of a docstring as a list."""
    _, _, rest = doc.partition("Args:\n")
    found: list[str] = []
    for line in rest.splitlines():
        if re.match(r"    \w+: ", line):
            name, text = line.strip().split(": ", 1)
            found.append(f"- `{name}`: {text}")
        elif line.startswith("        ") and found:
            found[-1] += " " + line.strip()
        elif line.strip():
            break
    return [*found, ""] if found else []


def parts(function: Any) -> list[Any]:
    """The parts that a catalogue method is made of; none where it needs an argument."""
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if needed:
        return []
    method, found = function(), []
    for field in PARTS:
        value = getattr(method, field)
        found += list(value) if isinstance(value, tuple) else [value] if value is not None else []
    return found


def formula(part: Any) -> list[str]:
    """The docstring of a part's class, and its hyperparameters."""
    kind = type(part)
    doc = inspect.cleandoc(vars(kind).get("__doc__") or "")
    text = doc.split(">>>")[0].strip()
    values = ", ".join(
        f"{f.name}={getattr(part, f.name)!r}" for f in dataclasses.fields(part) if f.name != "unlabelled"
    )
    title = f"Part `{kind.__name__}({values})`"
    body = [f"    {line}" if line else "" for line in text.splitlines()]
    return [f'!!! note "{title}"', "", *body, ""]


def benchmarks() -> str:
    """All tables of benchmarks/results, with the day on which each was made."""
    lines = [
        "# Benchmarks",
        "",
        "Each table is written by a script of the same name in `benchmarks/`, with its date, machine and commit.",
        "",
    ]
    for path in sorted(RESULTS.glob("*.md")):
        text = re.sub(r"^#", "##", path.read_text(encoding="utf-8"), flags=re.M)
        lines += [text if text.startswith("##") else f"## {path.stem}\n\n{text}", ""]
    return "\n".join(lines)


def reference() -> dict[str, str]:
    """One page per room with the documentation of its public names."""
    import consilience as cs

    pages = {}
    rooms = [name for name in cs.__all__ if inspect.ismodule(getattr(cs, name))]
    own = [name for name in cs.__all__ if name not in rooms]
    pages["reference/consilience.md"] = page("consilience", [target(getattr(cs, n), n) for n in own])
    for room in rooms:
        module = importlib.import_module(f"consilience.{room}")
        names = [n for n in sorted(dir(module)) if not n.startswith("_")]
        objects = [getattr(module, n) for n in names]
        public = [o for o in objects if inspect.isfunction(o) or inspect.isclass(o)]
        here = [target(o, o.__name__) for o in public if o.__module__.startswith(f"consilience.{room}")]
        pages[f"reference/{room}.md"] = page(f"consilience.{room}", here)
    return pages


def target(thing: Any, name: str) -> str:
    """The dotted path of an object for mkdocstrings."""
    return f"{thing.__module__}.{getattr(thing, '__name__', name)}" if hasattr(thing, "__module__") else name


def page(title: str, targets: list[str]) -> str:
    """One reference page."""
    return "\n".join([f"# `{title}`", "", *(f"::: {t}\n" for t in dict.fromkeys(targets))])
