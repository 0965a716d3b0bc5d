"""Pages of the site that are made from the code: the catalogue, the reference, the benchmarks' tables.

MkDocs calls `on_config`, `on_files` and `on_page_markdown` by name; see mkdocs.yml. All other functions need
only the package, so that tests can run them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PINNED = ROOT / "tests" / "pinned" / "methods.json"

try:
    from griffe import Extension
except ImportError:  # tests run the functions below without MkDocs
    Extension = object

PARTS = {
    "corrections": "Correction",
    "step_aggregator": "Aggregator of a step's objectives",
    "exchange_aggregator": "Aggregator of received parameters",
    "aggregator": "Aggregator",
    "consolidator": "Consolidator",
    "mapper": "Mapper",
}
"""The fields of a Method that hold its parts, and what a part is there."""

EXAMPLES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "aggregate": ("cs.aggregators.mean()", lambda cs: cs.aggregators.mean()),
    "distil": ("unlabelled", lambda cs: importlib.import_module("torch").zeros(1, 1)),
    "batch_model_consolidation": ("sources", lambda cs: cs.data.split_classes(cs.data.digits(), 2)),
    "dac": (
        "cs.memory.auxiliary(data)",
        lambda cs: cs.memory.auxiliary(importlib.import_module("torch").zeros(1, 1)),
    ),
    "deep_model_consolidation": ("data", lambda cs: importlib.import_module("torch").zeros(1, 1)),
    "exmodel_distillation": (
        "cs.memory.auxiliary(data)",
        lambda cs: cs.memory.auxiliary(importlib.import_module("torch").zeros(1, 1)),
    ),
    "feddf": ("unlabelled", lambda cs: importlib.import_module("torch").zeros(1, 1)),
    "infer": ("cs.mappers.oracle()", lambda cs: cs.mappers.oracle()),
}
"""An argument for each method of the catalogue that has no default for it: as text, and how it is made."""

BY_MODULE = ("core", "loop")
"""Rooms without a public door of their own: their pages go through their modules."""

DOORLESS = ("api", "cli", "demo", "diagnosis", "lazy", "progress", "tuning", "version")
"""Rooms without a page: `consilience` offers what api, diagnosis and tuning have; others are commands."""


# What MkDocs calls.


def on_config(config: Any) -> Any:
    """Fill the generated parts of the navigation."""
    sections = {"Reference": reference_nav(), "Benchmarks": benchmarks_nav()}
    config.nav = [{title: sections.get(title, page) for title, page in entry.items()} for entry in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the figures of the benchmarks, to the files of the site."""
    from mkdocs.structure.files import File

    pages = {"catalogue.md": catalogue(), **benchmarks(), **reference()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for figure in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"benchmarks/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files outside docs/ into links to the site's pages or to the repository."""
    return outside_links(markdown)


class Docstrings(Extension):  # type: ignore[misc]
    """An extension of griffe, which reads the code: it prepares docstrings for Markdown."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = literal(fenced(obj.docstring.value))


# Text for Markdown.


def literal(text: str) -> str:
    r"""Escape what Markdown would take for links, quotations or emphasis; code stays as it is.

    >>> print(literal("x [B, d] (float), `a[0][1]`"))
    x [B, d\] (float), `a[0][1]`
    """
    pieces = re.split(r"(```.*?```|`[^`]*`)", text, flags=re.S)
    for i in range(0, len(pieces), 2):  # between the pieces of code
        piece = re.sub(r"\](?=\s*[\[(:])", r"\\]", pieces[i])
        # A line may begin with a comparison, and a formula may have a name with an underscore at its end.
        piece = re.sub(r"^( *)>", r"\1\\>", piece, flags=re.M)
        pieces[i] = re.sub(r"(?<!\w)_(?=\w)", r"\\_", piece)
    return "".join(pieces)


def fenced(text: str) -> str:
    """Put a fence around examples (>>> ..), which Markdown would take for quotations.

    An example ends before an empty line.
    """
    lines, inside = [], False
    for line in text.splitlines():
        if not inside and line.startswith(">>>"):
            lines.append("```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


def outside_links(markdown: str) -> str:
    """Replace links such as ../benchmarks/results/skill.md, which are right in the repository only.

    >>> outside_links("[a](../benchmarks/results/skill.md), [b](merging.md)")
    '[a](benchmarks/skill.md), [b](merging.md)'
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]
    text = re.sub(r"\]\(\.\./benchmarks/results/(\w+\.md)\)", r"](benchmarks/\1)", markdown)
    folders = "benchmarks|examples|src|tests"
    return re.sub(rf"\]\(\.\./((?:{folders})/[^)]*)\)", rf"]({repository}/blob/main/\1)", text)


# The catalogue.


def catalogue() -> str:
    """Every method: its purpose, paper, arguments with defaults, parts with formulas, and where it runs."""
    import consilience as cs

    cells = json.loads(PINNED.read_text(encoding="utf-8"))
    lines = [
        "# Every method",
        "",
        "This page is made from the code. Formulas are those of the parts' docstrings, with the default "
        "values. [Methods and settings](methods.md) says why a method refuses a setting.",
        "",
    ]
    for name in sorted(cs.methods.__all__):
        lines += entry(name, getattr(cs.methods, name), cells)
    return "\n".join(lines)


def entry(name: str, function: Any, cells: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The lines of one method of the catalogue."""
    doc = inspect.getdoc(function) or ""
    text, _, _ = doc.partition("\nArgs:\n")
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if p.strip()]
    lines = [f"## {name}", ""]
    for paragraph in paragraphs:
        paper = paragraph.removeprefix("Paper: ")
        lines += [paragraph if paper == paragraph else f"**Paper:** {paper}", ""]
    lines += ["```python", f"cs.methods.{call(name, function)}", "```", ""]
    lines += arguments(function, doc)

    made, given = example(name, function)
    if given:
        lines += [f"Parts, with `{given}`:", ""]
    for kind, part in parts(made):
        lines += formula(kind, part)
    if not parts(made):
        lines += ["It has no parts: plain training.", ""]
    return lines + settings(name, cells)


def defaults(function: Any) -> dict[str, str]:
    """The default of every argument as text, "" where there is none."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: "" if p.default is p.empty else written(p.default) for p in parameters}


def written(value: Any) -> str:
    """A default as a reader would type it."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def call(name: str, function: Any) -> str:
    """The call of a method with its defaults, on several lines where it is long."""
    given = [f"{key}={value}" if value else key for key, value in defaults(function).items()]
    short = f"{name}({', '.join(given)})"
    return short if len(short) < 75 else f"{name}(\n" + "".join(f"    {item},\n" for item in given) + ")"


def arguments(function: Any, doc: str) -> list[str]:
    """The arguments as a table: name, default, meaning (from the Args section of the docstring)."""
    _, _, section = doc.partition("Args:\n")
    meaning: dict[str, str] = {}
    for line in section.splitlines():
        start = re.match(r"    ([\w, ]+): (.*)", line)
        if start and not line.startswith("     "):
            names, text = start.groups()
            meaning |= dict.fromkeys(names.split(", "), text)
        elif line.startswith("        ") and meaning:
            meaning[list(meaning)[-1]] += " " + line.strip()
        elif line.strip():
            break

    known = defaults(function)
    if not known:
        return []
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    for key, value in known.items():
        default = f"`{value}`" if value else "required"
        lines.append(f"| `{key}` | {default} | {cell(meaning.get(key, ''))} |")
    return [*lines, ""]


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")


def example(name: str, function: Any) -> tuple[Any, str]:
    """A method of the catalogue with its defaults, and the argument that it had to be given ("": none)."""
    import consilience as cs

    if name not in EXAMPLES:
        return function(), ""
    text, make = EXAMPLES[name]
    return function(make(cs)), text


def parts(method: Any) -> list[tuple[str, Any]]:
    """The parts of a method, each with what it is there."""
    found = []
    for field, kind in PARTS.items():
        value = getattr(method, field)
        several = value if isinstance(value, tuple) else () if value is None else (value,)
        found += [(kind, part) for part in several]
    return found


def formula(kind: str, part: Any) -> list[str]:
    """What a part is, its hyperparameters, and the docstring of its class."""
    doc = inspect.cleandoc(vars(type(part)).get("__doc__") or "")
    text = doc.split(">>>")[0].strip()
    fields = [f for f in dataclasses.fields(part) if f.repr and f.name != "unlabelled"]
    values = ", ".join(f"{f.name}={getattr(part, f.name)!r}" for f in fields)
    title = f"{kind} {type(part).__name__}({values})".replace('"', "'")
    body = [f"    {line}".rstrip() for line in literal(text).splitlines()]
    return [f'!!! note "{title}"', "", *body, ""]


def settings(name: str, cells: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Where a method runs by the pinned table, for each of its variants there."""
    rows = {key: row for key, row in cells.items() if name in re.split(r"\(.*?\)|\+", key)}
    own = {key: row for key, row in rows.items() if key.split("(")[0] == name}
    lines = []
    for key, row in (own or rows).items():
        runs = [setting for setting, found in row.items() if found == "runs"]
        title = "Runs in" if key == name else f"Runs in, as `{key}`"
        lines += [f"**{title}:** {', '.join(runs) or 'no setting of the table'}.", ""]
    return lines


# The benchmarks.


def tables() -> dict[str, tuple[str, str]]:
    """(first paragraph, text without its title) of every table in benchmarks/results, by name."""
    found = {}
    for path in sorted(RESULTS.glob("*.md")):
        text = re.sub(r"\A# .*\n+", "", path.read_text(encoding="utf-8")).replace("] [", "\\] [")
        found[path.stem] = (" ".join(text.split("\n\n")[0].split()), text)
    return found


def benchmarks() -> dict[str, str]:
    """One page per table, and a page that lists them."""
    pages = {f"benchmarks/{name}.md": f"# {title(name)}\n\n{text}" for name, (_, text) in tables().items()}
    lines = [
        "# Benchmarks",
        "",
        "Each page is written by a script in `benchmarks/`, with its date, machine and commit.",
        "",
        "| table | about |",
        "|---|---|",
        *(
            f"| [{title(name)}](benchmarks/{name}.md) | {cell(first)} |"
            for name, (first, _) in tables().items()
        ),
        "",
    ]
    return {"benchmarks.md": "\n".join(lines), **pages}


def benchmarks_nav() -> list[Any]:
    """The pages of the benchmarks in the navigation."""
    return [
        {"Overview": "benchmarks.md"},
        *({title(name): f"benchmarks/{name}.md"} for name in tables()),
    ]


def title(name: str) -> str:
    """A file's name as a title."""
    return name.replace("_", ", ").capitalize()


# The reference.


def reference() -> dict[str, str]:
    """One page for the names of `consilience` itself, and one per room with its public names."""
    import consilience as cs

    rooms = public_rooms()
    own = [name for name in cs.__all__ if name not in rooms]
    links = [f"| [`consilience.{room}`]({room}.md) | {first_sentence(room)} |" for room in rooms]
    pages = {
        "reference/consilience.md": "\n".join(
            [
                "# `consilience`",
                "",
                "Import it as `cs`. These names are at the top; the rooms below have the others.",
                "",
                "| room | what is in it |",
                "|---|---|",
                *links,
                "",
                *(directive(f"consilience.{name}") for name in own),
            ]
        )
    }
    for room in rooms:
        names = [f"consilience.{room}.{name}" for name in public_names(room)]
        pages[f"reference/{room}.md"] = "\n".join(
            [f"# `consilience.{room}`", "", first_sentence(room), "", *map(directive, names)]
        )
    for room in BY_MODULE:
        pages[f"reference/{room}.md"] = "\n".join(
            [
                f"# `consilience.{room}`",
                "",
                first_sentence(room),
                "",
                "Names that are also at the top of the package are documented there.",
                "",
                *(directive(name, own) for name in modules(room)),
            ]
        )
    return pages


def reference_nav() -> list[Any]:
    """The pages of the reference in the navigation."""
    rooms = [*public_rooms(), *BY_MODULE]
    return [
        {"consilience": "reference/consilience.md"},
        *({room: f"reference/{room}.md"} for room in rooms),
    ]


def public_rooms() -> list[str]:
    """The modules among the public names of the package."""
    import consilience as cs

    return [name for name in cs.__all__ if inspect.ismodule(getattr(cs, name))]


def all_rooms() -> list[str]:
    """Every room that the reference must have a page for, from the list that the picture is drawn by."""
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    assert spec is not None and spec.loader is not None
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    return [room for floor in rooms.FLOORS for room in floor if room not in DOORLESS]


def public_names(room: str) -> list[str]:
    """The public functions and classes of a room: those that it lists, or else those that it defines."""
    module = importlib.import_module(f"consilience.{room}")
    listed = {*(dir(module) if "__dir__" in vars(module) else ()), *vars(module).get("__all__", ())}
    names = listed or {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    }
    objects = {name: getattr(module, name) for name in sorted(names)}
    return [name for name, value in objects.items() if inspect.isfunction(value) or inspect.isclass(value)]


def first_sentence(room: str) -> str:
    """The first line of a room's docstring."""
    return (importlib.import_module(f"consilience.{room}").__doc__ or "").strip().split("\n")[0]


def modules(room: str) -> list[str]:
    """The dotted names of a room's public modules."""
    folder = ROOT / "src" / "consilience" / room
    return [f"consilience.{room}.{path.stem}" for path in sorted(folder.glob("[!_]*.py"))]


def directive(target: str, left_out: list[str] | None = None) -> str:
    """What mkdocstrings replaces by the documentation of a name; of a module without some of its names."""
    if left_out is None:
        return f"::: {target}\n"
    filters = json.dumps(["!^_[^_]", *(f"!^{name}$" for name in left_out)])
    return f"::: {target}\n    options:\n      filters: {filters}\n"
