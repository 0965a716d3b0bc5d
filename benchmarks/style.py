"""Print the table of STYLE.md for the tree as it is: one row per aim, then the figures of each room.

    python benchmarks/style.py                      the whole tree
    python benchmarks/style.py --paths core loop    two rooms of src/consilience; any file or folder works
    python benchmarks/style.py --list               every offender of every row, as file:line: what

It exits with 1 if an aim is missed. `tests/test_style.py` asserts the same rows.

How it counts. The rules reproduce the figures that STYLE.md gives for version 0.1 (commit 35aeb81):

- Shares of lines are of non-blank lines, docstrings included. In 0.1, 15.1 % of `src` exceed 100
  characters.
- Comments: lines of `src` that hold only a comment. Comments for tools (`# type:`, `# noqa`, `# fmt:`,
  `# mypy:`, `# pragma:`, `# ruff:`) and empty ones do not count. 0.1 has 0.2 %.
- One-letter names: of all names that code binds, every occurrence: targets of assignments, `for`,
  comprehensions, `with`, `:=`, `except` and `case`, annotated fields, and arguments of lambdas. `_` is
  ignored. Arguments of `def` are left out, because with them 0.1 has 24 %. By this rule it has 35.1 %;
  STYLE.md's 36 % counts `_` as well.
- Bodies: from the first statement after the docstring to the last line; nested functions are counted again.
  In 0.1, 49 % of those over 20 lines have neither a blank line nor a whole-line comment.
- Arguments: all but `self` and `cls`; `*args` and `**kwargs` are one each. 0.1 has at most 17, and 34
  functions over 8. A name in EXCEPTIONS is excused only at the top level of a module and if its docstring
  names every argument.
- Private names: `from consilience.x import _name`, where `_name` is not a module, and `value._name`, where
  the value is not `self`, `cls` or `super()` and another file of the package defines `_name`, but this one
  does not. Two classes of one file that read each other's private names are therefore not seen, nor are
  private names of other libraries, nor names looked up by a string.
- Retired identifiers: names, attributes, arguments, keywords and strings given to calls, in `src`,
  `examples` and the code of the documentation. There are three lists, because many retired words are good
  English: NAMES anywhere, MEMBERS only as attributes and in bodies of classes, PAIRS only on a receiver of
  that name.
- Retired prose: comments, docstrings, and strings of three words or more (errors, refusals, reports) in
  `src`, and the text of the documentation. The changelog and the table of renamed names are exempt.

With `--paths`, every row is measured on exactly the files found there.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import itertools
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/consilience")
CODE = ("src", "tests", "benchmarks", "examples")
EXEMPT_PAGES = ("renamed.md", "CHANGELOG.md")

# The aims of STYLE.md that are numbers.
WIDTH = 110
COMMENT_SHARE = 0.04
ONE_LETTER_SHARE = 0.15
BODY_LINES = 20
ARGUMENTS = 8

EXCEPTIONS = {
    "run": "the entry point: users type its options as keywords",
    "sweep": "as `run`, for many methods and settings",
    "search": "as `run`, over a space of hyperparameters",
    "diagnose": "as `run`, for what is tried on several tasks",
    "merge": "the entry point for checkpoints, and the options of `consilience merge`",
    "choose": "the entry point that picks experts, and the options of `consilience choose`",
    "explore": "the entry point that searches mixtures",
    "federated": "a setting of the catalogue, and its options on the command line",
    "federated_continual": "a setting of the catalogue, as `federated`",
    "hierarchical": "a setting of the catalogue, as `federated`",
    "gossip": "a setting of the catalogue, as `federated`",
    "generative_replay": "a method of the catalogue: hyperparameters of the method and of its generator",
    "distil": "a method of the catalogue, and the entry point that makes one model of several",
    "teacher_distillation": "as `distil`",
    "train": "the entry point that trains a stream of experts",
    "skill": "a method of the catalogue: options of its mapper and of its head",
    "inversion": "a maker of synthetic memory of the catalogue: hyperparameters of the paper",
    "generator": "a maker of synthetic memory of the catalogue, as `inversion`",
    "impression": "a maker of synthetic memory of the catalogue, as `inversion`",
    "head2toe": "a model of the catalogue: hyperparameters of the paper",
    "arrays": "a data source of the catalogue",
    "stream": "a data source of the catalogue",
    "folder": "a data source of the catalogue",
    "table": "a data source of the catalogue",
    "text": "a data source of the catalogue",
    "core50": "a data source of the catalogue: the variants of the benchmark",
    "clear": "a data source of the catalogue: the variants of the benchmark",
}
"""Public functions that keep more than eight arguments, and why."""

# The lists are regular expressions without spaces, so that no string of this file reads as retired prose.
NAMES = re.compile(
    "Hear|Learn|Stage|Me|Facts|Walk|Ask|Watch|Frame|Work"
    "|me|caution|pulls?|says_pull|how_to_absorb|hear_aggregator|hears|hears_others|heard|told"
    "|listeners?|speakers?|hearers?|absorb|absorbed|absorbing"
    "|recalls_shared|recalls_own|most_heard|most_learned|widens|constrains|travels|rests"
)
"""Retired wherever they are identifiers."""

MEMBERS = re.compile("tell|rest|still|learns|recalls|ends|owner")
"""Retired as attributes, methods and fields; allowed as local names."""

THEIRS = re.compile(r"study\.tell")
"""Methods of other libraries, by their receiver."""

PAIRS = re.compile(
    r"(me|start|beginning|ledger)\.known|me\.span|ledger\.(work|sent)|(state|message|m)\.learned"
    r"|(job|phase|ask|turn)\.work|schedule\.(walk|facts)|engine\.learn|(result|metrics)\.drift"
)
"""Retired as an attribute of a receiver with that name, in lower case."""

EXCHANGE = "use send, sent, receive, received, sender or receiver"
ERROR = "write: `x` must be ..., got ..."
PROSE = {
    r"(?i)\b(told|heard|hears?|hearers?|listeners?|speakers?)\b": EXCHANGE,
    r"(?i)\b(whom|anew|shall|wherefore|thereof)\b": "archaic",
    r"(?i)\bbeside\b": "use besides, next to or with",
    r"(?i)\b(a|the|this|one|each|every|per|very|later|earlier|next|last|its)\s+learn\b": "use visit",
    r"(?i)\blet\s+go\s+of\b": "use free or release",
    r"(?i)\bwhat\s+is\s+known\b": "name the thing",
    r"(?i)\bshould\s+be\s+there\b": "use must exist",
    r"\bshould\s+(be|have)\b[^\n]*\bFound\b|(^|[.;:]\s)Found\b": ERROR,
}
"""Retired phrases, and what to write."""

# Comments that are settings of tools and explain nothing.
TOOL_COMMENT = re.compile(r"#!|#\s*(type:|noqa|fmt:|mypy:|pragma:|ruff:|$)")
SUPPRESSION = re.compile(r"#.*(fmt:\s*(skip|off)|noqa:.*\bE501|noqa\s*$)")
# Not ours: methods of NamedTuple, and registries of torch.nn.Module that have no public form.
FOREIGN = frozenset({"_replace", "_asdict", "_fields", "_make", "_parameters", "_buffers", "_modules"})
# Functions that take the name of an attribute as a string.
BY_STRING = frozenset({"overrides", "getattr", "hasattr", "setattr"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Offender(NamedTuple):
    """One place to change."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


class Row(NamedTuple):
    """One line of the table."""

    name: str
    value: str
    aim: str
    met: bool
    offenders: list[Offender]


@dataclass(frozen=True, eq=False)
class Source:
    """A file of Python. What the rows read of it is computed once, when first used; lines count from 1."""

    path: Path
    text: str

    @functools.cached_property
    def lines(self) -> list[str]:
        """The lines without their ends."""
        return self.text.splitlines()

    @functools.cached_property
    def filled(self) -> int:
        """The number of non-blank lines."""
        return sum(bool(line.strip()) for line in self.lines)

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        try:
            return ast.parse(self.text)
        except SyntaxError as error:
            raise SystemExit(f"{self.path}:{error.lineno}: cannot parse: {error.msg}.") from error

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the syntax tree."""
        return list(ast.walk(self.tree))

    @functools.cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, nested ones too."""
        every = [node for node in self.nodes if isinstance(node, Function)]
        return sorted(every, key=lambda node: node.lineno)

    @functools.cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        """Comments and the ends of lines without code."""
        # Tokens, not a search in the text: a string may hold a "#" or an empty line.
        read = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return [token for token in read if token.type in (tokenize.COMMENT, tokenize.NL)]

    @functools.cached_property
    def comments(self) -> dict[int, str]:
        """The comment of each line that has one."""
        return {token.start[0]: token.string for token in self.tokens if token.type == tokenize.COMMENT}

    @functools.cached_property
    def whole_comments(self) -> frozenset[int]:
        """Lines that hold only a comment for people."""
        alone = (line for line, text in self.comments.items() if self.lines[line - 1].lstrip() == text)
        return frozenset(line for line in alone if not TOOL_COMMENT.match(self.comments[line]))

    @functools.cached_property
    def paragraphs(self) -> frozenset[int]:
        """Lines that separate paragraphs of code: blank ones and whole-line comments."""
        blank = (token.start[0] for token in self.tokens if not token.line.strip())
        return self.whole_comments.union(blank)


class Tree(NamedTuple):
    """The files that the rows are measured on: all code, the package, code whose names matter, and pages."""

    code: list[Source]
    src: list[Source]
    named: list[Source]
    pages: list[Path]


def load(paths: Sequence[str] = ()) -> Tree:
    """Find the files of the whole tree, or only those in `paths`: rooms of the package, folders or files."""
    if paths:
        places = [place(name) for name in paths]
        # A file that two of the paths contain is measured once.
        files = [read(path) for path in dict.fromkeys(path for top in places for path in found(top, ".py"))]
        return Tree(files, files, files, [path for top in places for path in found(top, ".md")])

    by_folder = {folder: [read(path) for path in found(ROOT / folder, ".py")] for folder in CODE}
    pages = [
        path for path in (*found(ROOT / "docs", ".md"), ROOT / "README.md") if path.name not in EXEMPT_PAGES
    ]
    return Tree(
        code=[file for files in by_folder.values() for file in files],
        src=by_folder["src"],
        named=by_folder["src"] + by_folder["examples"],
        pages=pages,
    )


def place(name: str) -> Path:
    """The file or folder that a word of `--paths` means."""
    room = ROOT / PACKAGE / name
    for candidate in (room, room.with_suffix(".py"), ROOT / name, Path(name)):
        if candidate.exists():
            return candidate.resolve()
    raise SystemExit(f"`--paths` must name files, folders or rooms of {PACKAGE}, got {name!r}.")


def found(top: Path, suffix: str) -> list[Path]:
    """The files with that suffix in a folder, or the file itself."""
    if top.is_file():
        return [top] if top.suffix == suffix else []
    return sorted(top.rglob(f"*{suffix}"))


def read(path: Path) -> Source:
    """A file of Python."""
    return Source(shown(path), path.read_text())


def shown(path: Path) -> Path:
    """A path relative to the repository, if it is in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


# Rows of STYLE.md's table.


def lines(tree: Tree) -> Row:
    """Lines that are too long."""
    bad = [
        Offender(file.path, number, f"{len(line)} characters")
        for file in tree.code
        for number, line in enumerate(file.lines, 1)
        if len(line) > WIDTH
    ]
    share = len(bad) / max(1, sum(file.filled for file in tree.code))
    return Row(f"lines over {WIDTH} characters", f"{len(bad)} ({share:.1%})", "0", not bad, bad)


def comments(tree: Tree) -> Row:
    """Whole-line comments; the offenders are the files below the aim, largest first."""
    filled = sum(file.filled for file in tree.src)
    share = sum(len(file.whole_comments) for file in tree.src) / max(1, filled)

    low = [file for file in tree.src if len(file.whole_comments) < COMMENT_SHARE * file.filled]
    low.sort(key=lambda file: -file.filled)
    bad = [Offender(file.path, 1, f"{len(file.whole_comments)} in {file.filled} lines") for file in low]

    # Without any line the aim holds: `--paths` may name documentation only.
    met = share >= COMMENT_SHARE or not filled
    return Row(
        "whole-line comments, of non-blank lines", f"{share:.1%}", f"{COMMENT_SHARE:.0%} or more", met, bad
    )


def one_letter_names(tree: Tree) -> Row:
    """Bindings of names of one letter."""
    stored = [Offender(file.path, line, name) for file in tree.src for line, name in bindings(file)]
    bad = [offender for offender in stored if len(offender.what) == 1]
    share = len(bad) / max(1, len(stored))
    aim = f"at most {ONE_LETTER_SHARE:.0%}"
    return Row("one-letter names, of all stored names", f"{share:.1%}", aim, share <= ONE_LETTER_SHARE, bad)


@functools.cache
def bindings(file: Source) -> list[tuple[int, str]]:
    """Line and name of every binding that the row counts."""
    bound = []
    for node in file.nodes:
        match node:
            case ast.Name(ctx=ast.Store(), id=name):
                bound.append((node.lineno, name))
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
            ):
                bound.append((node.lineno, name))
            case ast.Lambda():
                bound += [(argument.lineno, argument.arg) for argument in arguments_of(node)]

    # `_` says that a value is not used; it is the right name for that.
    return sorted((line, name) for line, name in bound if name != "_")


def bodies(tree: Tree) -> Row:
    """Long bodies without a paragraph."""
    long, bad = 0, []
    for file in tree.src:
        for function in file.functions:
            has_docstring = ast.get_docstring(function, clean=False) is not None
            statements = function.body[1:] if has_docstring else function.body
            if not statements:
                continue

            # A body is measured in lines, as a reader sees it, not in statements.
            extent = range(statements[0].lineno, (statements[-1].end_lineno or 0) + 1)
            long += len(extent) > BODY_LINES
            if len(extent) > BODY_LINES and file.paragraphs.isdisjoint(extent):
                bad.append(Offender(file.path, function.lineno, f"{function.name}, {len(extent)} lines"))

    value = f"{len(bad)} of {long} ({len(bad) / max(1, long):.0%})"
    return Row(f"bodies over {BODY_LINES} lines without a blank line or a comment", value, "0", not bad, bad)


def arguments(tree: Tree) -> Row:
    """Functions with too many arguments."""
    most, excused, bad = 0, 0, []
    for file in tree.src:
        for function in file.functions:
            count = len(arguments_of(function))
            if count > ARGUMENTS and is_exception(file, function):
                excused = max(excused, count)
                continue

            most = max(most, count)
            if count > ARGUMENTS:
                bad.append(Offender(file.path, function.lineno, f"{function.name} takes {count}"))

    value = f"{most} ({len(bad)} over {ARGUMENTS})" if bad else f"{most}"
    value += f"; named entry points: {excused}" if excused else ""
    return Row("arguments in one function, most", value, f"{ARGUMENTS}", not bad, bad)


def arguments_of(function: Function | ast.Lambda) -> list[ast.arg]:
    """The arguments of a function without `self` and `cls`."""
    spec = function.args
    every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    return [argument for argument in every if argument and argument.arg not in ("self", "cls")]


def is_exception(file: Source, function: Function) -> bool:
    """Whether it is a named entry point: at the top level of its module, with every argument documented."""
    if function.name not in EXCEPTIONS or function not in file.tree.body:
        return False

    # An overload has no docstring; the implementation that follows it is judged.
    if any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in function.decorator_list):
        return True
    text = ast.get_docstring(function) or ""
    return all(re.search(rf"\b{argument.arg}\b", text) for argument in arguments_of(function))


def unused_exceptions(tree: Tree) -> list[str]:
    """Names in EXCEPTIONS that no function needs."""
    long = [(file, function) for file in tree.src for function in file.functions]
    long = [(file, function) for file, function in long if len(arguments_of(function)) > ARGUMENTS]
    return sorted(
        EXCEPTIONS.keys() - {function.name for file, function in long if is_exception(file, function)}
    )


def private_names(tree: Tree) -> Row:
    """Private names of other modules of the package."""
    files = [*tree.src, *package()]
    known = frozenset(name for file in files for name in private_definitions(file))
    bad = [Offender(file.path, *place) for file in tree.src for place in private_accesses(file, known)]
    return Row("private names of another module", f"{len(bad)}", "0", not bad, bad)


@functools.cache
def package() -> list[Source]:
    """The files of the package, whichever files are measured."""
    return [read(path) for path in found(ROOT / PACKAGE, ".py")]


@functools.cache
def private_definitions(file: Source) -> frozenset[str]:
    """Private functions, methods, fields and variables of a file."""
    # A search in the text is enough here, and does not parse the whole package for one room.
    pattern = r"(?m)(?:\bdef |\bclass |\bself\.|\bcls\.|^\s*)(_[^\W_]\w*)\s*(?:[(:]|=[^=])"
    return frozenset(re.findall(pattern, file.text)) - FOREIGN


@functools.cache
def private_accesses(file: Source, known: frozenset[str]) -> list[tuple[int, str]]:
    """Line and text of imports and attributes that reach private names which only other files define."""
    elsewhere = known - private_definitions(file)
    reached = []
    for node in file.nodes:
        if isinstance(node, ast.Attribute) and node.attr in elsewhere and not is_own(node):
            reached.append((node.lineno, ast.unparse(node)))

        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            folder = ROOT / "src" / str(node.module).replace(".", "/")
            private = [alias.name for alias in node.names if re.match("_[^_]", alias.name)]

            # A private module may be imported as a whole; the test of imports says by which rooms.
            names = [name for name in private if not is_module(folder / name)]
            reached += [(node.lineno, f"from {node.module} import {name}") for name in names]
    return sorted(reached)


def is_module(path: Path) -> bool:
    """Whether this path without a suffix is a module or a package."""
    return path.with_suffix(".py").exists() or path.is_dir()


def is_own(node: ast.Attribute) -> bool:
    """Whether an attribute is read or set on `self`, `cls`, `super()` or `type(self)`."""
    value = node.value.func if isinstance(node.value, ast.Call) else node.value
    return isinstance(value, ast.Name) and value.id in ("self", "cls", "super", "type")


def suppressions(tree: Tree) -> Row:
    """Comments that switch the formatter or the limit on width off."""
    # Reading tokens is slow, and most files do not have the words at all.
    candidates = [file for file in tree.code if "fmt:" in file.text or "noqa" in file.text]
    bad = [
        Offender(file.path, line, text)
        for file in candidates
        for line, text in file.comments.items()
        if SUPPRESSION.search(text)
    ]
    return Row("`fmt: skip` and `noqa: E501`", f"{len(bad)}", "0", not bad, bad)


# Rows of retired words.


def retired_identifiers(tree: Tree) -> Row:
    """Identifiers of version 0.1."""
    bad = [Offender(file.path, *place) for file in tree.named for place in retired_in_code(file)]
    bad += [Offender(shown(page), *place) for page in tree.pages for place in retired_in_page(page)]
    return Row("retired identifiers", f"{len(bad)}", "0", not bad, bad)


@functools.cache
def retired_in_code(file: Source) -> list[tuple[int, str]]:
    """Line and name of every retired identifier, in the order of lines."""
    return sorted({place for node in file.nodes for place in retired_at(node)})


def retired_at(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of the retired identifiers that one node of a syntax tree introduces."""
    match node:
        case ast.Attribute(attr=name):
            receiver = last_name(node.value)
            pair = f"{receiver}.{name}"
            retired = NAMES.fullmatch(name) or MEMBERS.fullmatch(name) or PAIRS.fullmatch(pair.lower())
            if retired and not THEIRS.fullmatch(pair):
                yield node.lineno, pair.lstrip(".")

        case ast.Call():
            for value in node.args:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    by_string = last_name(node.func) in BY_STRING and MEMBERS.fullmatch(value.value)
                    if NAMES.fullmatch(value.value) or by_string:
                        yield value.lineno, repr(value.value)

        case ast.ClassDef():
            yield from (entry for entry in class_members(node) if MEMBERS.fullmatch(entry[1]))

    # A node has a name under at most two of these: `import name as asname`.
    for field in ("id", "arg", "name", "asname"):
        identifier = getattr(node, field, None)
        if isinstance(identifier, str) and NAMES.fullmatch(identifier):
            yield getattr(node, "lineno", 1), identifier


def last_name(node: ast.AST) -> str:
    """The last identifier of an expression: `ledger` of `self.ledger`, `agent` of `self.agent(name)`."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return str(getattr(node, "attr", None) or getattr(node, "id", ""))


def class_members(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    """Line and name of the methods and fields in the body of a class."""
    for entry in node.body:
        if isinstance(entry, Function):
            yield entry.lineno, entry.name
        elif isinstance(entry, ast.Assign | ast.AnnAssign):
            targets = entry.targets if isinstance(entry, ast.Assign) else [entry.target]
            yield from ((entry.lineno, target.id) for target in targets if isinstance(target, ast.Name))


def retired_in_page(page: Path) -> Iterator[tuple[int, str]]:
    """Line and name of retired identifiers in the fenced blocks and the inline code of a page."""
    for number, line, fenced in page_lines(page):
        code = line.split("# ")[0] if fenced else " ".join(re.findall(r"`([^`]+)`", line))

        # Snippets with ".." do not parse, so words are matched. MEMBERS would match good English here.
        for word in re.findall(r"[A-Za-z_](?:[\w.]*\w)?", code):
            parts = word.split(".")
            pairs = (f"{left}.{right}".lower() for left, right in itertools.pairwise(parts))
            if any(map(NAMES.fullmatch, parts)) or any(map(PAIRS.fullmatch, pairs)):
                yield number, word


def page_lines(page: Path) -> Iterator[tuple[int, str, bool]]:
    """Number and text of each line of a page, and whether it is in a fenced block."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        else:
            yield number, line, fenced


def retired_prose(tree: Tree) -> Row:
    """Retired words and phrases."""
    bad = [Offender(file.path, *place) for file in tree.src for place in retired_in_texts(file)]
    for page in tree.pages:
        # Code is emptied and every line is kept, so that phrases are found across the ends of lines.
        kept = {
            number: re.sub(r"`[^`]*`", "``", line) for number, line, fenced in page_lines(page) if not fenced
        }
        text = "\n".join(kept.get(number, "") for number in range(1, max(kept, default=0) + 1))
        bad += [Offender(shown(page), *place) for place in retired_in_text(1, text)]
    return Row("retired words and phrases in prose", f"{len(bad)}", "0", not bad, bad)


@functools.cache
def retired_in_texts(file: Source) -> list[tuple[int, str]]:
    """Line and phrase of retired prose in the comments and strings of a file, in the order of lines."""
    return sorted(place for line, text in texts(file) for place in retired_in_text(line, text))


def retired_in_text(start: int, text: str) -> Iterator[tuple[int, str]]:
    """Line and phrase of retired prose in a text that begins at line `start`."""
    for pattern, advice in PROSE.items():
        for match in re.finditer(pattern, text):
            phrase = " ".join(match[0].split())
            yield start + text.count("\n", 0, match.start()), f"{phrase[:60]!r}: {advice}"


def texts(file: Source) -> Iterator[tuple[int, str]]:
    """First line and text of every comment and every string of at least three words."""
    yield from file.comments.items()
    pieces = {id(part) for node in file.nodes if isinstance(node, ast.JoinedStr) for part in node.values}

    # A sentence with values in it is one text: its pieces are read together, not one by one.
    for node in file.nodes:
        if isinstance(node, ast.JoinedStr):
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        elif isinstance(node, ast.Constant) and id(node) not in pieces:
            text = node.value if isinstance(node.value, str) else ""
        else:
            continue

        # One or two words are keys and names, which the row of identifiers checks.
        if len(text.split()) >= 3:
            yield getattr(node, "lineno", 1), text


# The tables, and the command.

ROWS: dict[str, Callable[[Tree], Row]] = {
    "long lines": lines,
    "comments": comments,
    "one letter": one_letter_names,
    "bare bodies": bodies,
    "arguments": arguments,
    "private": private_names,
    "skips": suppressions,
    "identifiers": retired_identifiers,
    "prose": retired_prose,
}
"""What is measured, by its heading in the table of rooms."""


def measure(tree: Tree) -> list[Row]:
    """All rows for these files."""
    return [row(tree) for row in ROWS.values()]


def rooms(tree: Tree) -> dict[str, Tree]:
    """The files of the package by room; a module next to the rooms is a room of one file."""
    by_room: dict[str, list[Source]] = {}
    for file in tree.src:
        if file.path.is_relative_to(PACKAGE):
            by_room.setdefault(file.path.relative_to(PACKAGE).parts[0], []).append(file)
    return {name: Tree(files, files, files, []) for name, files in sorted(by_room.items())}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown with aligned columns."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; return 1 if an aim is missed."""
    parser = argparse.ArgumentParser(description="Print the table of STYLE.md for the tree as it is.")
    parser.add_argument(
        "--paths", nargs="+", default=[], metavar="DIR", help="measure these rooms or folders only"
    )
    parser.add_argument("--list", action="store_true", help="list every offender of every row")
    options = parser.parse_args(argv)

    tree = load(options.paths)
    results = measure(tree)
    print(table(["", "now", "aim", "met"], ([*row[:3], "yes" if row.met else "NO"] for row in results)))

    by_room = rooms(tree)
    if by_room:
        # The named entry points would widen the column; the first table has them.
        figures = {name: [row.value.split(";")[0] for row in measure(part)] for name, part in by_room.items()}
        print("\n" + table(["room", *ROWS], ([name, *values] for name, values in figures.items())))

    if options.list:
        for row in results:
            print("\n".join([f"\n{row.name}: {len(row.offenders)}", *map(str, row.offenders)]))
    return 0 if all(row.met for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
