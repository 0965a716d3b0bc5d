"""The command `consilience merge`: checkpoints of any size into one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from consilience.cli.build import aggregator_of
from consilience.cli.catalogue import resolve
from consilience.cli.options import (
    DTYPES,
    Order,
    Part,
    as_text,
    check_options,
    help_of,
    load_yaml,
    parse,
    read,
    refuse_renamed,
    take_choice,
)
from consilience.core.errors import ConsilienceError, unknown
from consilience.merging._allowed import ALLOWED

if TYPE_CHECKING:
    from consilience.core.aggregator import Aggregator

OUT_DTYPES = (*DTYPES, "float16")
LISTS = (list[float] | None, list[str] | None)
SWITCHES = {
    "dry-run": "print the plan, and write nothing",
    "diagnose": "print how the experts' changes agree: cosines, conflicts of signs, norms; "
    "with --out, a .json or .svg file of them",
    "trust": "import code that --config names by dotted paths",
}


@dataclass(frozen=True)
class MergeOptions:
    """Options of the merge.

    Args:
        out: a new .safetensors file, or a new folder, which also gets the base's configuration and tokenizer,
            and merge.json.
        config: a YAML file with options (base, experts, aggregator: {ties: {density: 0.2}}, ...); options on
            the command line override it.
        weights: one per expert, such as [0.7, 0.3]; 1/m by default.
        per: model (all entries are one vector) or tensor (every entry by itself).
        scales: factors of the change by pattern of names; the first match counts, as in {"layers.0.*": 0.5}.
        keep: patterns of entries that are not merged but kept per expert (heads), in kept/.
        importances: one file of weights >= 0 (Fisher information) per expert, for the aggregator fisher.
        dtype: of the arithmetic: float32, or float64 where an entry has it.
        out_dtype: of the result; the base's by default.
        shard: largest size of a file, such as 5GB; by default as the base's files.
        memory: size of the buffers next to the result, such as 512MB.
        threads: of the arithmetic.
        seed: of aggregators that draw.
    """

    out: str | None = None
    config: str | None = None
    weights: list[float] | None = None
    per: str = "model"
    scales: dict[str, float] | None = None
    keep: list[str] | None = None
    importances: list[str] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    shard: str | None = None
    memory: str = "512MB"
    threads: int | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `consilience.merge`."""
        return {
            "weights": self.weights,
            "per": self.per,
            "scales": self.scales,
            "keep": self.keep or (),
            "importances": self.importances,
            "dtype": dtype_of("dtype", self.dtype),
            "out_dtype": dtype_of("out_dtype", self.out_dtype),
            "shard": size_of("shard", self.shard) if self.shard else None,
            "memory": size_of("memory", self.memory),
            "threads": self.threads,
            "seed": self.seed,
        }


class Request(NamedTuple):
    """What a merge was asked for, as text: on the command line and in the YAML file."""

    base: str | None
    experts: list[str]
    aggregator: str
    options: dict[str, str | None]
    switches: set[str]
    allow: list[str]
    helping: bool


class Stored(NamedTuple):
    """What a YAML file has for a merge."""

    base: str | None
    experts: list[str]
    aggregator: str | None
    allow: list[str]
    options: dict[str, str | None]


def merge(argv: Sequence[str]) -> int:
    """Merge checkpoints, or print the plan or a diagnosis of them."""
    request = requested(argv)
    call = resolve("aggregator", request.aggregator)
    parts = [
        Part("aggregator", "aggregator", request.aggregator, call),
        Part("", "", "merge", MergeOptions),
    ]
    order = checked(request, parts)
    if order is None:
        return 0
    options = MergeOptions(**order.options(parts[1]))
    arguments = {**options.arguments(), "allow": request.allow}

    from consilience.merging._files import opened

    base = None if request.base in ("none", "null") else opened(request.base)
    if "diagnose" in request.switches:
        return diagnose(base, request.experts, options.out)

    # An aggregator can work on another one, such as dare then ties.
    chosen = order.options(parts[0])
    if isinstance(chosen.get("then"), str):
        chosen["then"] = aggregator_of(chosen["then"])
    aggregator: Aggregator = call(**chosen)
    if "dry-run" in request.switches:
        return plan(base, request.experts, aggregator, options, arguments)
    return write(base, request.experts, aggregator, options.out, arguments)


# Reading what was asked for.


def requested(argv: Sequence[str]) -> Request:
    """Read the command line, and the YAML file under it."""
    switches = switches_with_help()
    given, words = read(argv, ("help", *spellings(switches)))
    helping = given.pop("help", None) is not None
    config = given.get("config")
    stored = read_stored(Path(config)) if config else Stored(None, [], None, [], {})

    # Switches of the command line can turn off those of the file.
    on = {dashed(key): value for key, value in (*stored.options.items(), *given.items())}
    turned_on = {switch for switch in switches if on.get(switch) == "true"}
    of_file, of_words = (
        {key: value for key, value in layer.items() if dashed(key) not in switches}
        for layer in (stored.options, given)
    )

    # Options of the file for an aggregator that the command line replaces are dropped.
    aggregator = take_choice(of_words, "aggregator", stored.aggregator or "mean", helping)
    if stored.aggregator is not None and aggregator != stored.aggregator:
        of_file = {key: value for key, value in of_file.items() if not key.startswith("aggregator.")}

    allowed = [name for name in ALLOWED if allow_switch(name) in turned_on or name in stored.allow]
    return Request(
        base=words[0] if words else stored.base,
        experts=words[1:] or stored.experts,
        aggregator=aggregator,
        options={**of_file, **of_words},
        switches=turned_on,
        # Names of the file that are no allowances are passed on, and refused with the plan.
        allow=allowed + [name for name in stored.allow if name not in allowed],
        helping=helping,
    )


def allow_switch(name: str) -> str:
    """Return the switch that allows something."""
    return f"allow-{dashed(name)}"


def switches_with_help() -> dict[str, str]:
    """Return all switches, and what they do."""
    return {**SWITCHES, **{allow_switch(name): why for name, why in ALLOWED.items()}}


def spellings(switches: Mapping[str, str]) -> set[str]:
    """Return all spellings of switches: dashes and underscores are the same."""
    # --allow-non_finite, as the argument of the library is spelled.
    mixed = {f"allow-{name}" for name in ALLOWED}
    return {*switches, *(switch.replace("-", "_") for switch in switches), *mixed}


def dashed(key: str) -> str:
    """Write a key with dashes.

    >>> dashed("dry_run")
    'dry-run'
    """
    return key.replace("_", "-")


def read_stored(path: Path) -> Stored:
    """Read a YAML file; options are text, as on the command line."""
    config = load_yaml(path)
    # `base: null` says that there is none; without that line, the command line must name one.
    base: str | None = None
    if "base" in config:
        base = "none" if config["base"] is None else str(config["base"])

    # Options for the aggregator have its prefix, as on the command line.
    aggregator, arguments = (
        aggregator_in(config.get("aggregator"), path) if "aggregator" in config else (None, {})
    )
    options: dict[str, str | None] = {f"aggregator.{key}": as_text(value) for key, value in arguments.items()}
    for key, value in config.items():
        if key not in ("base", "experts", "aggregator", "allow") and value is not None:
            options[str(key)] = as_text(value)
    experts, allow = (list_in(config, key, path) for key in ("experts", "allow"))
    return Stored(base, experts, aggregator, allow, options)


def aggregator_in(value: Any, path: Path) -> tuple[str, dict[str, Any]]:
    """Read an aggregator in YAML: its name, or a mapping of its name to its options."""
    name, arguments = value, None
    if isinstance(value, dict) and len(value) == 1:
        ((name, arguments),) = value.items()
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        raise ConsilienceError(
            f"`aggregator` must be a name, or one with a mapping of its options, got {value!r} in {path}."
        )
    return name, arguments or {}


def list_in(config: Mapping[Any, Any], key: str, path: Path) -> list[str]:
    """Read a list of text in YAML; one text is a list of one."""
    if key not in config:
        return []
    value = config[key]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConsilienceError(f"`{key}` must be a list of text, got {value!r} in {path}.")
    return value


# Checking and parsing it.


def checked(request: Request, parts: Sequence[Part]) -> Order | None:
    """Check and parse the options; None where help was asked for and printed."""
    known = {key: parameter for part in parts for key, parameter in part.options().items()}
    given = {option_of(key, known): value for key, value in request.options.items()}
    refuse_renamed("merge", given, known)
    check_options("merge", given, [*known, "aggregator", *switches_with_help()], request.helping)
    if request.helping:
        print_help(parts, request.aggregator)
        return None

    if request.base is None or not request.experts:
        got = request.base or "neither"
        raise ConsilienceError(f"`consilience merge` needs a base (or none) and experts, got {got}.")
    # Lists may be written with commas only, which jsonargparse does not read.
    texts = {
        key: as_list(value) if known[key].annotation in LISTS else value
        for key, value in given.items()
        if value is not None
    }
    return Order(tuple(parts), parse(parts, known, texts))


def print_help(parts: Sequence[Part], aggregator: str) -> None:
    """Print the options of the merge and of the aggregator, and the switches."""
    options = {key: parameter for part in parts for key, parameter in part.options().items()}
    parser = help_of("merge", parts, options, {"aggregator": aggregator})
    group = parser.add_argument_group("switches, and what is refused unless it is allowed")
    for switch, text in switches_with_help().items():
        group.add_argument(f"--{switch}", action="store_true", help=text)
    parser.print_help()


def option_of(key: str, known: Mapping[str, Any]) -> str:
    """Find the option that a key means: dashes are underscores, and the hub calls `shard` max-shard-size."""
    if dashed(key) == "max-shard-size":
        return "shard"
    return key if key in known else key.replace("-", "_")


def as_list(text: str) -> str:
    """Write a list as JSON has it.

    >>> as_list("0.7,0.3"), as_list("heads.*")
    ('[0.7, 0.3]', '["heads.*"]')
    """
    if text.strip().startswith("["):
        return text
    words = [word.strip() for word in text.split(",")]
    return json.dumps([float(word) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", word) else word for word in words])


def size_of(name: str, text: str) -> int:
    """Read a number of bytes.

    >>> size_of("memory", "1KB")
    1024
    """
    # 1 KB is 1024 bytes, as for memory.
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?\s*", text.upper())
    if match is None:
        raise ConsilienceError(f"`--{name}` must be bytes, such as 512MB, got {text!r}.")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def dtype_of(name: str, text: str | None) -> Any:
    """Find the torch dtype of a name."""
    if text is None:
        return None
    if text not in OUT_DTYPES:
        raise unknown(name, text, OUT_DTYPES)
    import torch

    return getattr(torch, text)


# Doing it.


def plan(
    base: Any,
    experts: Sequence[str],
    aggregator: Aggregator,
    options: MergeOptions,
    arguments: Mapping[str, Any],
) -> int:
    """Print what a merge would do."""
    from consilience.merging._plan import MergeSettings
    from consilience.merging._stream import prepare

    print(prepare(base, experts, aggregator, options.out, MergeSettings(**arguments)).plan.table())
    print(f"combine  {aggregator!r}, per {options.per}")
    print(f"write    {options.out or 'nothing: no --out was given'}")
    return 0


def write(
    base: Any, experts: Sequence[str], aggregator: Aggregator, out: str | None, arguments: Mapping[str, Any]
) -> int:
    """Merge checkpoints into a new file or folder."""
    from consilience.merging import _stream

    # Only a merge that writes needs a place to write to; a plan and a diagnosis do not.
    if not out:
        raise ConsilienceError("`--out` must be a new file or folder.")
    began = time.perf_counter()
    with progress_bar() as progress:
        made = _stream.merge(base, experts, aggregator, out, progress=progress, **arguments)

    files = [made] if made.is_file() else made.rglob("*.safetensors")
    size = sum(path.stat().st_size for path in files)
    seconds = time.perf_counter() - began
    print(f"merged {len(experts)} experts into {made} ({size:,} bytes, {seconds:.1f} s)")
    return 0


def diagnose(base: Any, experts: Sequence[str], out: str | None) -> int:
    """Print how the experts' changes agree, and write it to a .svg or JSON file."""
    from consilience.core.params import write_json
    from consilience.merging._diagnose import diagnose

    if base is None:
        raise ConsilienceError("a diagnosis compares changes, so it needs a base, got none.")
    found = diagnose(base, list(experts))
    print(found.table())
    if out and out.endswith(".svg"):
        print(f"wrote {found.write(out)}")
    elif out:
        write_json(Path(out), found.to_json())
        print(f"wrote {out}")
    return 0


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Give a callback that draws a bar of the bytes that were read; None where stderr is no terminal."""
    from rich import progress
    from rich.console import Console

    # stdout has the result, which may go to a file.
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("merge", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
