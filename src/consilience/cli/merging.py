"""The command `consilience merge`: checkpoints of any size into one."""

from __future__ import annotations

import ast
import inspect
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.cli.main import (
    Order,
    Part,
    _nearest,
    _parse,
    _parser,
    model_of,
    parts_of,
    read,
    read_yaml,
    resolve,
    schedule_of,
)
from consilience.core.errors import ConsilienceError, unknown

if TYPE_CHECKING:
    from consilience.core.aggregator import Aggregator
    from consilience.core.source import Source

DTYPES = ("float64", "float32", "float16", "bfloat16")


def options(
    out: str | None = None,
    config: str | None = None,
    weights: list[float] | None = None,
    per: str = "model",
    scales: dict[str, float] | None = None,
    keep: list[str] | None = None,
    importances: list[str] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    shard: str | None = None,
    memory: str = "512MB",
    threads: int | None = None,
    seed: int = 0,
) -> None:
    """Options of a merge as a whole.

    Args:
        out: a new file (.safetensors), or a new folder, which also gets the base's configuration and tokenizer, and merge.json.
        config: a YAML file that says the same as options do (base, experts, aggregator: {ties: {density: 0.2}}, ...); options go before it.
        weights: one an expert, such as [0.7, 0.3]; 1/m by default.
        per: model (all entries are one vector) or tensor (every entry by itself).
        scales: factors of the change by pattern of names, the first that fits, such as {"layers.0.*": 0.5}.
        keep: patterns of entries that stay every expert's own (heads), in kept/.
        importances: files of weights >= 0 (Fisher information), one an expert, for the aggregator fisher.
        dtype: of the arithmetic: float32, or float64 where an entry has it.
        out_dtype: of what is written; the base's by default.
        shard: bytes that a file holds at most, such as 5GB; as the base's files by default.
        memory: bytes that may be held beside the result, such as 512MB.
        threads: of the arithmetic.
        seed: of aggregators that draw.
    """


def merge(argv: Sequence[str]) -> int:
    """Merge checkpoints of any size: consilience merge BASE EXPERT... --aggregator ties --aggregator.density 0.2 -o OUT."""
    from consilience.merging._plan import ALLOWED

    switches = {**SWITCHES, **{f"allow-{a.replace('_', '-')}": why for a, why in ALLOWED.items()}}
    found, words = read(
        argv, ("help", *switches, *(s.replace("-", "_") for s in switches), *(f"allow-{a}" for a in ALLOWED))
    )
    helping = found.pop("help", None) is not None
    stored = _stored(str(found["config"])) if found.get("config") else {}
    said = {**{_dashed(k): v for k, v in stored.items()}, **{_dashed(k): v for k, v in found.items()}}
    on = {s for s in switches if said.get(s) == "true"}
    stored, found = ({k: v for k, v in x.items() if _dashed(k) not in switches} for x in (stored, found))
    allow = [a for a in ALLOWED if f"allow-{a.replace('_', '-')}" in on or a in stored.get("allow", [])]
    allow += [a for a in stored.pop("allow", []) if a not in allow]
    base, paths = stored.pop("base", None), stored.pop("experts", [])
    if words:
        base, paths = words[0], words[1:] or paths
    usual = stored.pop("aggregator.", None)
    name = found.pop("aggregator", None) or usual or "mean"
    if usual is not None and name != usual:  # options of another one
        stored = {k: v for k, v in stored.items() if not k.startswith("aggregator.")}
    call = resolve("aggregator", name)
    parts = [Part("aggregator", "aggregator", name, call), Part("", "", "merge", options)]
    known = {k: p for part in parts for k, p in part.options().items()}
    given = {_key(k, known): v for layer in (stored, found) for k, v in layer.items()}
    for k, v in given.items():
        if k not in known:
            near = _nearest(k, [*known, "aggregator", *switches])
            raise ConsilienceError(
                f"an option should be one of `consilience merge`'s. Found '--{k}'; {near}."
            )
        if v is None and not helping:
            raise ConsilienceError(f"`--{k}` should have a value. Found none.")
    if helping:
        parser = _parser("merge", parts, known, {"aggregator": name})
        parser.usage = "consilience merge BASE EXPERT... [--aggregator NAME] -o OUT [options]"
        flags = parser.add_argument_group("switches, and what is refused unless it is allowed")
        for switch, why in switches.items():
            flags.add_argument(f"--{switch}", action="store_true", help=why)
        parser.print_help()
        return 0
    if base is None or not paths:
        raise ConsilienceError(
            f"`consilience merge` should have a base (or none) and experts. Found {', '.join(words) or 'neither'}."
        )
    text = {k: _listed(v) if known[k].annotation in LISTS else v for k, v in given.items() if v is not None}
    order = Order(tuple(parts), _parse("merge", parts, known, text), {})
    chosen = {
        k: aggregator_of(v) if k == "then" and isinstance(v, str) else v
        for k, v in order.options(parts[0]).items()
    }
    values = order.options(parts[1])
    import torch

    from consilience.merging import _stream
    from consilience.merging._files import opened

    start = None if base in ("none", "null") else opened(base)
    for key in ("dtype", "out_dtype"):
        if values[key] is not None and values[key] not in DTYPES:
            raise unknown(key, values[key], DTYPES)
    if "diagnose" in on:
        return _diagnose(start, paths, values["out"])
    aggregator: Aggregator = call(**chosen)
    arguments = {
        "weights": values["weights"],
        "per": values["per"],
        "scales": values["scales"],
        "keep": values["keep"] or (),
        "allow": allow,
        "importances": values["importances"],
        "dtype": getattr(torch, values["dtype"]) if values["dtype"] else None,
        "out_dtype": getattr(torch, values["out_dtype"]) if values["out_dtype"] else None,
        "shard": _bytes(values["shard"], "shard") if values["shard"] else None,
        "memory": _bytes(values["memory"], "memory"),
        "threads": values["threads"],
        "seed": values["seed"],
    }
    if "dry-run" in on:
        print(_stream.checked(start, paths, aggregator, values["out"], **arguments)[0].table())
        print(f"combine  {aggregator!r}, per {values['per']}")
        print(f"write    {values['out'] or 'nothing: no --out was given'}")
        return 0
    if not values["out"]:
        raise ConsilienceError("`--out` should be a new file or folder. Found none.")
    began = time.perf_counter()
    with _bar() as send:
        made = _stream.merge(start, paths, aggregator, values["out"], progress=send, **arguments)
    size = (
        made.stat().st_size if made.is_file() else sum(p.stat().st_size for p in made.rglob("*.safetensors"))
    )
    print(f"merged {len(paths)} experts into {made} ({size:,} bytes, {time.perf_counter() - began:.1f} s)")
    return 0


def choosing(
    aggregators: str | None = None,
    labels: bool = True,
    distil: bool = False,
    budget: int = 40,
    seed: int = 0,
    out: str | None = None,
) -> None:
    """Options of a choice as a whole.

    Args:
        aggregators: merges to try, as in ties,dare; none tries ties, dare and, for two experts, slerp.
        labels: whether targets may be read; else answers are compared with those of the ensemble of experts.
        distil: also teach the average what all experts answer together, on the training inputs.
        budget: mixtures that an optimiser may try for each kind of merge, after a grid.
        seed: of whatever is random, also of which test examples choose ("validation") and which report ("test").
        out: a file of JSON for what was found.
    """


def sources_in(folder: str) -> Callable[..., list[Source]]:
    """A function that reads the sources that lie in a folder."""

    def sources(
        flat: bool = False,
        limit: int | None = None,
        size: int | None = None,
        grey: bool = False,
        space: str | None = None,
    ) -> list[Source]:
        """The sources that lie in a folder: its .npz files, or its subfolders, each with a subfolder of images for each class.

        Args:
            flat: inputs are vectors (.npz).
            limit: how many training examples of each to take (.npz); none is all.
            size: height and width that images are resized to (folders).
            grey: one channel (folders).
            space: a label space that all share: classes of one name are one class; none is one each.
        """
        from consilience import data

        here = sorted(p.resolve() for p in Path(folder).iterdir() if not p.name.startswith("."))
        files, folders = [p for p in here if p.suffix == ".npz"], [p for p in here if p.is_dir()]
        if not files and not folders:
            raise ConsilienceError(
                f"`--data` should hold an .npz file or a folder for each source. Found neither in {folder}."
            )
        if files:
            return [data.npz(p, flat=flat, limit=limit, space=space) for p in files]
        return [data.folder(p, size=size, grey=grey, space=space) for p in folders]

    return sources


def checkpoint_of(word: str, base: Any = None) -> Any:
    """A checkpoint to read: a path (of an adapter, with its base), or the state dict of the agent whose run's folder it is."""
    from consilience.loop.folder import Log
    from consilience.merging._files import opened

    path = Path(word)
    if not (path / "checkpoint" / "index.json").exists():
        opened(
            path, None if base is None else opened(base)
        )  # what is no checkpoint is refused before any work
        return path
    tensors = (Log(path).last() or ({}, None))[0]
    agents = sorted({k.split("|")[2] for k in tensors if k.startswith("0|agent|")})
    if len(agents) != 1:
        raise ConsilienceError(
            f"a run's folder should hold one agent's weights. Found {', '.join(agents) or 'none'} in {word}."
        )
    heads = [f"0|agent|{agents[0]}|{i}/" for i in (0, 1)]  # its parameters, its buffers
    return {k[len(h) :]: t for h in heads for k, t in tensors.items() if k.startswith(h)}


def halved(sources: Sequence[Source], seed: int) -> list[Source]:
    """Sources whose test part is dealt into two halves, `validation` and `test`, for models that may have seen all other images."""
    from dataclasses import replace

    import torch

    from consilience.core.params import key

    if few := [s.name for s in sources if len(s.test) < 2]:
        raise ConsilienceError(
            f"sources should have test examples, half to choose by and half to report on: at least 2. Found fewer in {', '.join(few)}."
        )
    halves = {}
    for s in sources:
        if id(s.test) not in halves:  # sources that share their examples still do
            order = torch.randperm(len(s.test), generator=key(seed, "choose", "halves"))
            halves[id(s.test)] = [s.test.select(i.sort().values) for i in order.tensor_split(2)]
    return [replace(s, validation=halves[id(s.test)][0], test=halves[id(s.test)][1]) for s in sources]


def choose(argv: Sequence[str]) -> int:
    """Say whether combining trained models pays, and how: consilience choose BASE EXPERT... --data DIR --model mlp [-o FILE].

    Chosen on one half of each source's test part, reported on the other: the experts may have learned from everything else.
    """
    found, words = read(argv)
    helping = found.pop("help", None) is not None
    names = {
        c: found.pop(c, None) or d
        for c, d in (("data", "digits" if helping else ""), ("split", "none"), ("model", "auto"))
    }
    if not names["data"]:
        raise ConsilienceError(
            "`--data` should be a folder of sources, or a name of the catalogue. Found none."
        )
    if Path(names["data"]).is_dir():
        parts = [Part("data", "data", Path(names["data"]).name, sources_in(names["data"]))]
    else:
        parts = parts_of("data", names["data"])
    merging = Part(
        "setting",
        "",
        "merging",
        resolve("setting", "merging"),
        ("sources", "experts", "base", "work"),
        "sources",
    )
    parts = [
        *parts,
        *(p for c in ("split", "model") for p in parts_of(c, names[c])),
        merging,
        Part("", "", "choosing", choosing),
    ]
    options = {k: p for part in parts for k, p in part.options().items()}
    for k, v in found.items():
        if k not in options:
            near = _nearest(k, [*options, *names])
            raise ConsilienceError(
                f"an option should be one of `consilience choose`'s. Found '--{k}'; {near}."
            )
        if v is None and not helping:
            raise ConsilienceError(f"`--{k}` should have a value. Found none.")
    if helping:
        parser = _parser("choose", parts, options, names)
        parser.usage = "consilience choose BASE EXPERT... --data DIR [options]"
        parser.description += (
            " Half of each test part chooses, the other half reports: experts may have seen all else."
        )
        parser.print_help()
        return 0
    for k, p in options.items():
        if p.default is p.empty and k not in found:
            raise ConsilienceError(f"`--{k}` should be given. Found nothing.")
    order = Order(
        tuple(parts),
        _parse("choose", parts, options, {k: v for k, v in found.items() if v is not None}),
        names,
    )
    if len(words) < 2:
        raise ConsilienceError(
            f"`consilience choose` should have a base and experts. Found {', '.join(words) or 'neither'}."
        )
    if order.values["out"] and Path(order.values["out"]).is_dir():
        raise ConsilienceError(f"`--out` should be a file. Found a folder at {order.values['out']}.")
    tried = None if order.values["aggregators"] is None else aggregators_of(order.values["aggregators"])
    from consilience.merging._diagnose import named

    base = checkpoint_of(words[0])
    experts = [checkpoint_of(w, base) for w in words[1:]]
    given = dict(zip(named(words[1:]), experts, strict=True))
    schedule = schedule_of(order)
    from consilience.core.params import write_json
    from consilience.loop.run import default_model
    from consilience.merging._choose import choose as judge
    from consilience.methods import average

    model = model_of(order, schedule) or default_model(schedule, average())
    rest = {k: order.values[k] for k in ("labels", "distil", "scenario", "budget", "seed")}
    made = judge(model, base, given, halved(schedule.sources, rest["seed"]), tried, **rest)
    print(made.table())
    if order.values["out"]:
        write_json(Path(order.values["out"]), made.to_json())
        print(f"wrote {order.values['out']}")
    return 0


SWITCHES = {
    "dry-run": "print the plan, and write nothing",
    "diagnose": "print how the experts' changes agree: cosines, conflicts of signs, norms; with --out, a file .json or .svg of them",
}


def aggregators_of(text: str) -> dict[str, Aggregator]:
    """The aggregators of `ties(0.3),dare`, by these names."""
    return {n: aggregator_of(n) for n in (x.strip() for x in re.split(r",(?![^()]*\))", text))}


def aggregator_of(text: str) -> Aggregator:
    """An aggregator of the catalogue, of `ties` or `ties(1.0)`.

    >>> aggregator_of("ties(density=0.5)")
    Ties(density=0.5)
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        name, arguments = (node.func, node) if isinstance(node, ast.Call) else (node, None)
        args = [ast.literal_eval(a) for a in arguments.args] if arguments else []
        named = {k.arg: ast.literal_eval(k.value) for k in arguments.keywords if k.arg} if arguments else {}
    except (SyntaxError, ValueError) as e:
        raise ConsilienceError(
            f"an aggregator should be a name, or a name with its arguments. Found {text!r}."
        ) from e
    call = resolve("aggregator", ast.unparse(name))
    try:
        inspect.signature(call).bind(*args, **named)
    except TypeError as e:
        wanted = inspect.signature(call).replace(return_annotation=inspect.Signature.empty)
        raise ConsilienceError(
            f"`aggregators` should have their arguments: {ast.unparse(name)}{wanted}. Found {text!r}: {e}."
        ) from e
    made: Aggregator = call(*args, **named)
    return made


LISTS = (list[float] | None, list[str] | None)


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _key(key: str, known: Mapping[str, inspect.Parameter]) -> str:
    """An option's name: dashes are underscores; max-shard-size is what the hub calls `shard`."""
    key = {"max-shard-size": "shard", "max_shard_size": "shard"}.get(key, key)
    return key if key in known else key.replace("-", "_")


def _listed(text: str) -> str:
    """A list as JSON has it, of `[0.7, 0.3]` or `0.7,0.3`."""
    if text.strip().startswith("["):
        return text
    words = [w.strip() for w in text.split(",")]
    return json.dumps([float(w) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", w) else w for w in words])


def _bytes(text: str, name: str) -> int:
    """Bytes, of `512MB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?\s*", text.upper())
    if match is None:
        raise ConsilienceError(f"`--{name}` should be bytes, such as 512MB. Found {text!r}.")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def _stored(path: str) -> dict[str, Any]:
    """What a YAML file says: strings as options have them, but for base, experts and allow; `aggregator.` is its name."""
    read_yaml(Path(path))  # refuses what is no mapping
    import yaml

    found: dict[str, Any] = {}
    for key, value in (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).items():
        if key == "aggregator":
            name, arguments = (
                next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, None)
            )
            if not isinstance(name, str) or not isinstance(arguments, dict | None):
                raise ConsilienceError(
                    f"`aggregator` should be a name, or one with a mapping of its options. Found {value!r} in {path}."
                )
            found["aggregator."] = name
            found |= {
                f"aggregator.{k}": v if isinstance(v, str) else json.dumps(v)
                for k, v in (arguments or {}).items()
            }
        elif key in ("experts", "allow"):
            value = (
                list(value.values())
                if isinstance(value, dict)
                else [value]
                if isinstance(value, str)
                else value
            )
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise ConsilienceError(f"`{key}` should be a list of text. Found {value!r} in {path}.")
            found[key] = value
        elif key == "base":
            found[key] = "none" if value is None else str(value)
        elif value is not None:
            found[str(key)] = value if isinstance(value, str) else json.dumps(value)
    return found


class _bar:
    """A progress bar in bytes, on a terminal's stderr."""

    def __enter__(self) -> Callable[[int, int], None] | None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(stderr=True)
        self.bar = None
        if not console.is_terminal:
            return None
        self.bar = Progress(
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        task = self.bar.add_task("merge", total=None)
        self.bar.start()
        bar = self.bar
        return lambda done, whole: bar.update(task, completed=done, total=whole)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def _diagnose(base: Any, experts: Sequence[str], out: str | None) -> int:
    from consilience.core.params import write_json
    from consilience.merging._diagnose import diagnose

    if base is None:
        raise ConsilienceError("a diagnosis compares changes, so there should be a base. Found none.")
    found = diagnose(base, list(experts))
    print(found.table())
    if out and out.endswith(".svg"):
        print(f"wrote {found.write(out)}")
    elif out:
        write_json(Path(out), found.to_json())
        print(f"wrote {out}")
    return 0
