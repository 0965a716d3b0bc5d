"""The command line: types, defaults and help come from the signatures and docstrings of the catalogues.

A choice (`--method ewc`) is a name in a catalogue or a dotted path to a function or class of one's own; `--method.strength 100`
is an argument of it. A YAML file says the same: `method: {ewc: {strength: 100}}`. Nothing here imports torch before it runs.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.core.errors import ConsilienceError, Interrupted, Refusal, kind_of, unknown

if TYPE_CHECKING:
    from consilience.core.method import Method
    from consilience.core.model import Model
    from consilience.core.schedule import Schedule
    from consilience.core.training import Training
    from consilience.loop.result import Result

CHOICES = ("setting", "data", "split", "method", "model")
CHAINED = ("split", "method", "methods", "model")
"""Choices of which several compose: `ewc+er`; or come one after another: `iid+classes`, `random_features+multi_head`."""
NONE = ("none", "auto", "null")

FITTING: dict[str, dict[str, Any]] = {
    "multitask": {"split": "permute", "split.n": 3, "method": "pcgrad", "setting.scenario": "domain"},
    "continual": {"split": "classes", "split.n": 5, "method": "er"},
    "federated": {
        "split": "dirichlet",
        "split.clients": 10,
        "split.alpha": 0.5,
        "method": "fedavg",
        "training.epochs": 1,
    },
    "federated_continual": {
        "split": "iid+classes",
        "split.iid.n": 3,
        "split.classes.n": 5,
        "method": "er",
        "setting.rounds": 3,
        "training.epochs": 2,
    },
    "hierarchical": {
        "split": "dirichlet",
        "split.clients": 10,
        "split.alpha": 0.5,
        "method": "fedavg",
        "training.epochs": 1,
    },
    "gossip": {
        "split": "dirichlet",
        "split.clients": 10,
        "split.alpha": 0.5,
        "method": "fedavg",
        "training.epochs": 1,
    },
    "merging": {"split": "dirichlet", "split.clients": 3, "split.alpha": 1.0, "method": "average"},
    "exmodel": {"split": "classes", "split.n": 5, "method": "entropy_ensemble"},
    "skill": {"split": "classes", "split.n": 5, "method": "skill"},
}
"""What fits a setting where nothing else is chosen; a setting of one's own is treated as the first of them all, continual."""
FITTING_DATA: dict[str, dict[str, Any]] = {
    "breast_cancer": {"split.n": 2, "split.classes.n": 2},
    "wine": {"split.n": 3, "split.classes.n": 3},
    "diabetes": {"split": "iid", "split.n": 3},
    "core50": {"split": "none"},
    "clear": {"split": "none"},
    "shakespeare": {"split": "none", "model": "char_lstm"},
}
USUAL: dict[str, Any] = {"n": 5, "clients": 5, "alpha": 0.5, "angles": 4}
"""Arguments of splits that have no default of their own."""
FROM_ROOM = {"aggregator": "aggregators", "policy": "memory", "mapper": "mappers"}
"""Arguments of methods that a name stands for, and the room whose catalogue has it."""

FROM_DATA = ("inputs", "outputs", "channels", "size")
"""Arguments of models that the data says."""
FROM_HERE = {"setting": ("sources", "streams", "experts", "base"), "model": FROM_DATA}
SWITCHES = ("resume", "judge_clients", "help")
ROOMS = {
    "aggregator": "aggregators",
    "setting": "settings",
    "method": "methods",
    "methods": "methods",
    "model": "models",
}
HIDDEN = {
    "arrays",
    "embed",
    "head2toe",
    "macs",
    "new_instances",
    "new_instances_and_classes",
    "stream",
    "wrap",
}
"""Functions of a catalogue that need objects, not text."""


def general(
    out: str | None = None,
    resume: bool = False,
    config: str | None = None,
    repeats: int = 1,
    seed: int = 0,
    metric: str | None = None,
    engine: str = "serial",
    checkpoint_seconds: float = 60.0,
    checkpoint_steps: int | None = None,
    judge_clients: bool = False,
) -> None:
    """Options of a run as a whole.

    Args:
        out: a new folder for config.yaml, result.json, log.jsonl and checkpoints; none keeps nothing.
        resume: go on from the last checkpoint in --out, with the configuration that is stored there.
        config: a YAML file that says the same as options do; options go before it.
        repeats: seeds, for a mean and a standard deviation.
        seed: the first seed.
        metric: accuracy, auroc or r2; none fits the kind of target.
        engine: who runs the steps.
        checkpoint_seconds: the time between checkpoints, also inside a task.
        checkpoint_steps: the steps between checkpoints, in addition.
        judge_clients: also judge whoever learns by its own parameters, before and after, and how far those heard together went apart.
    """


# ------------------------------------------------------------------------------------------------------------- names


def catalogue(choice: str) -> dict[str, Callable[..., Any]]:
    """The functions that a choice can name."""
    module = importlib.import_module(f"consilience.{ROOMS.get(choice, 'data')}")
    names = getattr(module, "__all__", [n for n in vars(module) if n in FITTING])
    found = {n: getattr(module, n) for n in names if n not in HIDDEN}
    if choice in ("data", "split"):
        splits = {
            n
            for n, f in found.items()
            if next(iter(inspect.signature(f).parameters), "") in ("source", "sources")
        }
        found = {
            n.removeprefix("split_"): f for n, f in found.items() if (n in splits) == (choice == "split")
        }
    return {n: f for n, f in found.items() if inspect.isfunction(f)}


def resolve(choice: str, name: str) -> Callable[..., Any]:
    """A function of the catalogue by its name, or one's own by its dotted path."""
    known = catalogue(choice)
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise unknown(choice, name, known)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except (ImportError, SyntaxError, TypeError, ValueError) as e:
        raise ConsilienceError(
            f"`{choice}` should be a name of the catalogue or a dotted path. Found {name!r}: {e}."
        ) from e
    if not callable(getattr(found, attribute, None)):
        raise unknown(
            choice,
            name,
            [f"{module}.{n}" for n, f in vars(found).items() if callable(f) and not n.startswith("_")],
        )
    return getattr(found, attribute)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Part:
    """A chosen function, the key of its options, and which of its parameters are options."""

    choice: str
    key: str
    name: str
    call: Callable[..., Any]
    hidden: tuple[str, ...] = ()
    first: str = ""
    """The parameter that takes the sources, for a setting or a split."""

    def options(self) -> dict[str, inspect.Parameter]:
        """Parameters by their option's key, annotations evaluated as far as that needs no torch."""
        scope = {"Path": Path, **vars(sys.modules[self.call.__module__])}
        try:
            parameters = list(inspect.signature(self.call).parameters.values())
        except (TypeError, ValueError):
            return {}
        found = {}
        for p in parameters:
            if p.name in self.hidden or p.name.startswith("_") or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            kind = p.annotation
            if isinstance(kind, str):
                try:
                    kind = eval(kind, dict(scope))
                except (NameError, AttributeError, TypeError):
                    kind = Any
            default = (
                USUAL.get(p.name, p.default) if p.default is p.empty and self.choice == "split" else p.default
            )
            found[f"{self.key}.{p.name}" if self.key else p.name] = p.replace(
                annotation=kind, default=default, kind=p.KEYWORD_ONLY
            )
        return found

    def shown(self, options: Mapping[str, inspect.Parameter]) -> Callable[..., Any]:
        """A function with this signature and docstring, for jsonargparse, which would import torch for the original."""

        def stub() -> None: ...

        stub.__signature__ = inspect.Signature([p for k, p in options.items() if k in self.options()])  # type: ignore[attr-defined]
        stub.__doc__ = inspect.getdoc(self.call)
        stub.__name__ = stub.__qualname__ = self.call.__name__
        return stub


def parts_of(choice: str, text: str) -> list[Part]:
    """The functions that `a`, `a+b` or `a,b+c` names, each once."""
    if text in NONE and choice in ("split", "model"):
        return []
    lists = [t.strip() for t in text.split(",")] if choice == "methods" else [text]
    names = list(
        dict.fromkeys(n.strip() for t in lists for n in (t.split("+") if choice in CHAINED else [t]))
    )
    found = []
    for name in names:
        name = name.removeprefix("split_") if choice == "split" else name
        call = resolve(choice, name)
        first = (
            next(iter(inspect.signature(call).parameters), "")
            if choice in ("setting", "split", "model")
            else ""
        )
        key = choice if len(names) == 1 and choice != "methods" else f"{choice}.{name.rpartition('.')[2]}"
        first = first if choice != "model" or first in ("trunk", "model", "backbone") else ""
        given = [
            n for n in FROM_HERE.get(choice, ()) if (name, n) != ("backbone", "size")
        ]  # which resizes images itself
        found.append(Part(choice, key, name, call, (*given, first), first))
    return found


# ----------------------------------------------------------------------------------------------------------- options


def read(argv: Sequence[str], switches: Sequence[str] = SWITCHES) -> tuple[dict[str, str | None], list[str]]:
    """Options by key (None: the value is missing), and words that are no options."""
    found: dict[str, str | None] = {}
    words, i = [], 0
    while i < len(argv):
        token = {"-h": "--help", "-o": "--out"}.get(argv[i], argv[i])
        i += 1
        if not token.startswith("--"):
            words.append(token)
            continue
        key, equals, value = token[2:].partition("=")
        if equals:
            found[key] = value
        elif key in switches and (i == len(argv) or argv[i] not in ("true", "false")):
            found[key] = "true"
        elif i < len(argv) and not argv[i].startswith("--"):
            found[key] = argv[i]
            i += 1
        else:
            found[key] = None
    return found, words


def read_yaml(path: Path) -> dict[str, str | None]:
    """A YAML file as options."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        near = difflib.get_close_matches(
            path.name, os.listdir(path.parent) if path.parent.is_dir() else [], n=1
        )
        hint = f"; nearest: {path.parent / near[0]}" if near else ""
        raise ConsilienceError(
            f"`config` should be a readable file. Found {e.strerror} at {path}{hint}."
        ) from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConsilienceError(
            f"`config` should be YAML. Found {getattr(e, 'problem', None) or e}{where} of {path}."
        ) from e
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise ConsilienceError(
            f"`config` should be a mapping of options. Found a {type(found).__name__} in {path}."
        )
    return flat(found)


def flat(config: Mapping[Any, Any]) -> dict[str, str | None]:
    """The options of a nested configuration: `{method: {ewc: {strength: 1}}}` is `method=ewc`, `method.strength=1`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        key = str(key)
        if key in (*CHOICES, "methods"):
            value = dict.fromkeys(map(str, value)) if isinstance(value, list) else value
            if isinstance(value, dict):
                found[key] = ("," if key == "methods" else "+").join(map(str, value))
                for name, options in value.items():
                    if options is not None and not isinstance(options, dict):
                        raise ConsilienceError(
                            f"`{key}: {name}` should be a mapping of its options. Found {options!r}."
                        )
                    own = (
                        key
                        if len(value) == 1 and key != "methods"
                        else f"{key}.{str(name).rpartition('.')[2]}"
                    )
                    found |= {f"{own}.{k}": v for k, v in (options or {}).items()}
            else:
                found[key] = "none" if value is None else value
        elif isinstance(value, dict):
            found |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            found[key] = value
    return {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in found.items()}


def nested(parts: Sequence[Part], values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration, as config.yaml holds it."""
    config: dict[str, Any] = {"model": "auto", "split": "none"}
    for part in parts:
        own = {k.removeprefix(part.key + "."): plain(values[k]) for k in part.options()}
        if part.choice in ("training", ""):
            config |= (
                {part.choice: own}
                if part.choice
                else {k: v for k, v in own.items() if k not in ("out", "resume", "config")}
            )
        else:
            old = config.get(part.choice)
            config[part.choice] = {**(old if isinstance(old, dict) else {}), part.name: own}
    order = (*CHOICES[:3], "methods", *CHOICES[3:], "training")
    return {k: config[k] for k in (*order, *(k for k in config if k not in order)) if k in config}


def plain(value: Any) -> Any:
    """A value as YAML and JSON hold it."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of options, the last one wins; another name for a choice drops the options of the old one."""
    found: dict[str, Any] = {}
    for layer in layers:
        for c in (*CHOICES, "methods"):
            if c in layer and c in found and layer[c] != found[c]:
                found = {k: v for k, v in found.items() if not k.startswith(c + ".")}
        found |= layer
    return found


@dataclass(frozen=True)
class Order:
    """What was asked for: the chosen parts, and the values of all options."""

    parts: tuple[Part, ...]
    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        found = nested(self.parts, self.values)
        if "methods" in self.names:
            own = found["methods"]
            found["methods"] = self.names["methods"].split(",")
            found |= {
                f"methods.{p.key.rpartition('.')[2]}.{k}": v
                for p in self.of("methods")
                for k, v in own[p.name].items()
            }
        return found

    def of(self, choice: str) -> list[Part]:
        return [p for p in self.parts if p.choice == choice]

    def options(self, part: Part) -> dict[str, Any]:
        """The arguments that a part is called with."""
        return {k.removeprefix(part.key + "."): self.values[k] for k in part.options()}


def understand(command: str, argv: Sequence[str]) -> Order | None:
    """Options of `run` or `compare`, checked; None where help was asked for and given."""
    found, words = read(argv)
    if words:
        raise ConsilienceError(
            f"`consilience {command}` takes options only. Found {words[0]!r}; {_nearest(words[0], ['setting', 'method', 'data', 'out'])}."
        )
    helping = found.pop("help", None) is not None
    many = "methods" if command == "compare" else "method"
    choices = tuple(many if c == "method" else c for c in CHOICES)
    for c in (*choices, "config", "out"):
        if c in found and found[c] is None and not helping:
            raise ConsilienceError(f"`--{c}` should have a value. Found none.")
    given: dict[str, Any] = {k: v for k, v in found.items() if v is not None or k not in choices}
    stored: dict[str, Any] = {}
    if given.get("config"):
        stored = read_yaml(Path(given["config"]))
    elif given.get("resume") and given.get("out") and (Path(given["out"]) / "config.yaml").exists():
        stored = read_yaml(Path(given["out"]) / "config.yaml")
    setting = given.get("setting") or stored.get("setting") or "continual"
    resolve("setting", setting)
    fit: dict[str, Any] = {
        "setting": setting,
        "data": "digits",
        "model": "auto",
        **FITTING.get(setting, FITTING["continual"]),
    }
    if many == "methods":
        fit["methods"] = ",".join(dict.fromkeys(["finetune", fit.pop("method")]))
    data = given.get("data") or stored.get("data") or "digits"
    fit = layered(fit, FITTING_DATA.get(data, {}))
    names = {c: layered(fit, stored, given)[c] for c in choices}
    from consilience.core.training import Training

    parts = [p for c in choices for p in parts_of(c, names[c])]
    parts += [
        Part("training", "training", "training", Training, ("sampler",)),
        Part("", "", "general", general),
    ]
    options = {k: p for part in parts for k, p in part.options().items()}
    single = {p.key: p.name.rpartition(".")[2] for p in parts if p.choice in CHAINED and p.key == p.choice}

    def short(key: str) -> str:
        head, _, rest = key.partition(".")
        return f"{head}.{rest.removeprefix(single[head] + '.')}" if rest and head in single else key

    layers = [{short(k): v for k, v in layer.items()} for layer in (fit, stored, given)]
    known = [*options, *choices]
    merged = layered(*layers)
    for a, sign, layer in (("a key", "", layers[1]), ("an option", "--", layers[2])):
        for k in layer:
            if k not in known and k in merged:
                near = _nearest(k, known, sign)
                raise ConsilienceError(
                    f"{a} should be one of `consilience {command}`'s. Found {sign + k!r}; {near}."
                )
            if layer[k] is None and not helping:
                raise ConsilienceError(f"`{sign}{k}` should have a value. Found none.")
    wanted = {k: v for k, v in merged.items() if k in options}
    usual = {k: v for k, v in layers[0].items() if k in wanted and merged[k] is v}
    options = {k: p.replace(default=usual[k]) if k in usual else p for k, p in options.items()}
    if helping:
        _parser(command, parts, options, names).print_help()
        return None
    for k, p in options.items():
        if p.default is p.empty and k not in wanted:
            raise ConsilienceError(f"`--{k}` should be given. Found nothing.")
    return Order(
        tuple(parts),
        _parse(command, parts, options, {k: v for k, v in wanted.items() if k not in usual}),
        names,
    )


def _nearest(name: str, known: Sequence[str], prefix: str = "--") -> str:
    tail = {k.rpartition(".")[2]: k for k in known}
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near = near or [
        tail[t] for t in difflib.get_close_matches(name.rpartition(".")[2], list(tail), n=1, cutoff=0.5)
    ]
    return f"nearest: {', '.join(prefix + k for k in near)}" if near else "--help lists them"


def _parser(
    command: str,
    parts: Sequence[Part],
    options: Mapping[str, inspect.Parameter],
    names: Mapping[str, str] | None = None,
) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"consilience {command}", description=COMMANDS[command][0], exit_on_error=False
    )
    if names is not None:
        parser.usage = f"consilience {command} [options]"
        group = parser.add_argument_group(
            "choices, each a name or a dotted path to one's own; options of a choice are listed once it is made"
        )
        for choice, name in names.items():
            more = {
                "methods": ", composed with + and listed with ,",
                "method": ", composed with +",
                "split": ", one after another with +; or none",
            }
            known = ", ".join(sorted(catalogue(choice)))
            group.add_argument(
                f"--{choice}", default=name, metavar="NAME", help=f"{known}{more.get(choice, '')}"
            )
    for part in sorted(parts, key=lambda p: p.choice not in CHOICES):
        if any(k in options for k in part.options()):
            line = (inspect.getdoc(part.call) or "").split("\n")[0]
            group = parser.add_argument_group(
                f"{part.choice} {part.name}: {line}" if part.choice in (*CHOICES, "methods") else line
            )
            group.add_function_arguments(part.shown(options), part.key or None, as_group=False)
    return parser


def _parse(
    command: str, parts: Sequence[Part], options: Mapping[str, inspect.Parameter], given: Mapping[str, str]
) -> dict[str, Any]:
    from jsonargparse import ArgumentError

    try:
        found = _parser(command, parts, options).parse_args([f"--{k}={v}" for k, v in given.items()])
    except ArgumentError as e:
        for k in given:
            if re.search(rf"(^|[\s\"'`-]){re.escape(k)}([\s\"'`:]|$)", str(e)):
                kind = options[k].annotation
                allowed = (
                    [str(a) for a in typing.get_args(kind)]
                    if typing.get_origin(kind) is typing.Literal
                    else []
                )
                near = (
                    f"; {_nearest(given[k], allowed, '')}"
                    if difflib.get_close_matches(given[k], allowed, cutoff=0.5)
                    else ""
                )
                rule = f"one of {', '.join(allowed)}" if allowed else _words(kind)
                raise ConsilienceError(f"`--{k}` should be {rule}. Found {given[k]!r}{near}.") from e
        raise ConsilienceError(" ".join(str(e).split())) from e
    return {k: found[k] for k in options}


def _words(kind: Any) -> str:
    """A type for people: `int | None` is "a whole number or null"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    args = typing.get_args(kind)
    if type(kind).__name__ == "UnionType" or typing.get_origin(kind) is typing.Union:
        return " or ".join(_words(a) for a in args)
    if isinstance(typing.get_origin(kind), type) and issubclass(typing.get_origin(kind), Sequence):
        return "a list such as [1, 2]"
    return words.get(kind) or str(kind).replace("typing.", "").replace("collections.abc.", "")


# ---------------------------------------------------------------------------------------------------------- building


def schedule_of(order: Order) -> Schedule:
    """The data, split, in the setting."""
    now: Any = order.of("data")[0]
    now = _a("data", now.call(**order.options(now)), now.name)
    for part in order.of("split"):
        options = order.options(part)
        if part.first == "sources":
            now = part.call(_list(now), **options)
        else:
            now = (
                [part.call(s, **options) for s in now]
                if isinstance(now, list | tuple)
                else part.call(now, **options)
            )
        _a("split", now, part.name)
    (setting,) = order.of("setting")
    streams = [_list(s) for s in _list(now)]
    now = streams if setting.first == "streams" else [s for stream in streams for s in stream]
    schedule = setting.call(**{setting.first: now}, **order.options(setting))
    if not hasattr(schedule, "plan"):
        raise ConsilienceError(
            f"`setting` should give a Schedule. Found {kind_of(schedule)} from {setting.name!r}."
        )
    return schedule  # type: ignore[no-any-return]


def _a(choice: str, value: Any, name: str) -> Any:
    """A source, or lists of them."""
    from consilience.core.source import Source

    for v in _list(value):
        if not isinstance(v, Source):
            if isinstance(v, list | tuple):
                _a(choice, v, name)
            else:
                raise ConsilienceError(
                    f"`{choice}` should give a Source or a list of them. Found {kind_of(v)} from {name!r}."
                )
    return value


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def method_of(order: Order, names: str, choice: str = "method") -> Method:
    """One method from `a+b`."""
    from consilience.core.aggregator import Aggregator
    from consilience.core.correction import Correction, Mapper
    from consilience.core.method import Method

    found = []
    for part in (p for n in names.split("+") for p in order.of(choice) if p.name == n.strip()):
        options = order.options(part)
        for argument, room in FROM_ROOM.items():
            plain = (
                f"{part.key}.{argument}" in part.options()
                and part.options()[f"{part.key}.{argument}"].annotation is not Any
            )
            if (
                isinstance(options.get(argument), str) and not plain
            ):  # such as skill's mapper, which is a name itself
                catalogue_of = importlib.import_module(f"consilience.{room}")
                known = [n for n in catalogue_of.__all__ if n != "torchjd"]  # which needs a name of its own
                if options[argument] not in known:
                    raise unknown(argument, options[argument], known)
                options[argument] = getattr(catalogue_of, options[argument])()
        one = part.call(**options)
        name = part.name.rpartition(".")[2]
        if isinstance(one, Mapper):
            one = Method(name, mapper=one)
        elif isinstance(one, Correction):
            one = Method(name, (one,))
        elif isinstance(one, Aggregator):
            one = Method(name, aggregator=one)
        if not isinstance(one, Method):
            raise ConsilienceError(
                f"`{choice}` should give a Method, a Correction, a Mapper or an Aggregator. Found a {type(one).__name__} from {part.name!r}."
            )
        found.append(one)
    return Method.of(found)


def model_of(order: Order, schedule: Schedule) -> Model | None:
    """The model that was chosen, fitted to the data; None leaves it to the run."""
    model: Any = None
    for part in order.of("model"):
        import torch

        x, _ = schedule.sources[0].train.select(torch.arange(1)).whole()
        says = {
            "inputs": x[0].numel(),
            "outputs": len(schedule.frame.labels),
            "channels": (*x.shape, 1)[1],
            "size": x.shape[-1],
        }
        if part.first and model is None:
            raise ConsilienceError(
                f"{part.name} should follow a model, as in random_features+{part.name}. Found it first."
            )
        takes = inspect.signature(part.call).parameters
        given = {
            **order.options(part),
            **{k: says[k] for k in FROM_DATA if k in takes and k in part.hidden},
            **({part.first: model} if part.first else {}),
        }
        make = partial(part.call, **given)
        model = make()
        if isinstance(model, torch.nn.Module):
            from consilience import models

            model = models.wrap(make)
    return model  # type: ignore[no-any-return]


def training_of(order: Order) -> Training:
    """The training that was chosen."""
    from consilience.core.training import Training

    return Training(**order.options(order.of("training")[0]))


@contextmanager
def shown(stages: int, repeats: int, label: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A callback for the lines of a run's log: a bar in a terminal, plain lines elsewhere."""
    total = stages * repeats
    if sys.stdout.isatty():
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as bar:
            task = bar.add_task(label, total=total)

            def draw(line: Mapping[str, Any]) -> None:
                if line["event"] == "stage":
                    text = f"{label}, {line['name']}: {line['score']:.3f}"
                    bar.update(task, completed=line["repeat"] * stages + line["stage"], description=text)

            yield draw
        return

    def write(line: Mapping[str, Any]) -> None:
        if line["event"] == "stage" and line["stage"]:
            count = f"{line['repeat'] * stages + line['stage']}/{total}"
            print(
                f"{label}  {count}  {line['name']}  {line['score']:.3f}  {line['seconds']:.1f} s", flush=True
            )
        elif line["event"] == "resume":
            print(
                f"{label}  resumed after {line['repeat'] * stages + max(0, line['stage'] - 1)}/{total}, step {line['steps']}",
                flush=True,
            )

    yield write


def carry_out(
    order: Order, schedule: Schedule, method: Method, config: Mapping[str, Any], out: str | None, resume: bool
) -> Result:
    """One run."""
    import consilience as cs

    general = {
        k: order.values[k]
        for k in (
            "repeats",
            "seed",
            "metric",
            "engine",
            "checkpoint_seconds",
            "checkpoint_steps",
            "judge_clients",
        )
    }
    if general["metric"] and "." in general["metric"]:
        general["metric"] = resolve("metric", general["metric"])
    with shown(schedule.survey(general["seed"]).stages, general["repeats"], method.name) as progress:
        return cs.run(
            schedule,
            method,
            model_of(order, schedule),
            training_of(order),
            out=out,
            resume=resume,
            progress=progress,
            config=config,
            **general,
        )


# ---------------------------------------------------------------------------------------------------------- commands


def run(argv: Sequence[str]) -> int:
    """Run a method in a setting on data."""
    order = understand("run", argv)
    if order is None:
        return 0
    out, resume = order.values["out"], order.values["resume"]
    if resume and not out:
        raise ConsilienceError("`--resume` should come with the folder to go on in, `--out`. Found none.")
    if resume and not (Path(out) / "config.yaml").exists():
        raise ConsilienceError(f"`--resume` should find a run in `--out`. Found none in {out}.")
    result = carry_out(
        order, schedule_of(order), method_of(order, order.names["method"]), order.config, out, resume
    )
    print(result.table())
    if out:
        print(f"kept in {out}")
    return 0


def compare(argv: Sequence[str]) -> int:
    """Run several methods on the same sources: one table, one report."""
    order = understand("compare", argv)
    if order is None:
        return 0
    from consilience import report
    from consilience.core.params import write_bytes, write_json
    from consilience.loop.run import default_model

    out, resume = order.values["out"], order.values["resume"]
    folder = Path(out) if out else None
    if resume and (folder is None or not (folder / "config.yaml").exists()):
        raise ConsilienceError(
            f"`--resume` should find a comparison in `--out`. Found none{f' in {folder}' if folder else ''}."
        )
    if folder and resume and read_yaml(folder / "config.yaml") != flat(order.config):
        raise ConsilienceError(
            f"a comparison resumes with the configuration it began with. Found another one in {folder}."
        )
    if (
        folder
        and not resume
        and any((folder / f).exists() for f in ("compare.json", "config.yaml", "result.json"))
    ):
        raise ConsilienceError(f"`out` should be a new folder, or be resumed. Found a run in {folder}.")
    schedule = schedule_of(order)
    facts = schedule.survey(order.values["seed"])
    model = model_of(order, schedule)
    refused: dict[str, str] = {}
    methods: dict[str, Method] = {}
    for name in dict.fromkeys(n.strip() for n in order.names["methods"].split(",")):
        try:
            method = method_of(order, name, "methods")
            method.resolve(replace(facts, model=model or default_model(schedule, method)))
            methods[name] = method
        except ConsilienceError as e:
            refused[name] = str(e)
    if not methods:
        raise ConsilienceError("; ".join(refused.values()))
    if folder and not resume:
        import yaml

        write_bytes(folder / "config.yaml", yaml.safe_dump(order.config, sort_keys=False).encode())
    results: dict[str, Result] = {}
    for name, method in methods.items():
        parts = [p for p in order.parts if p.choice != "methods"]
        own = [n.strip() for n in name.split("+")]
        parts += [replace(p, choice="method") for p in order.of("methods") if p.name in own]
        config = nested(parts, order.values)
        at = folder / name if folder else None
        begun = resume and at is not None and at.is_dir()
        try:
            if at and begun and (at / "result.json").exists():
                results[name] = report.load(at)
                if results[name].config != json.loads(json.dumps(config)):
                    raise ConsilienceError(
                        f"a comparison resumes with the configuration it began with. Found another one in {at}."
                    )
                print(f"{name}  was finished")
            else:
                results[name] = carry_out(order, schedule, method, config, str(at) if at else None, begun)
        except Refusal as e:
            refused[name] = str(e)
        except Interrupted as e:
            how = (
                f"go on with `consilience compare --resume --out {out}`"
                if out
                else "nothing was kept: no `--out` was given"
            )
            raise Interrupted(f"interrupted; {how}.") from e
    found = list(results.values())
    if found:
        print(report.table(found) if len(found) > 1 else found[0].table())
    for name, reason in refused.items():
        print(f"{name}  refused: {reason.removeprefix(name + ': ')}")
    if folder:
        write_json(
            folder / "compare.json",
            {"results": {n: summary(r) for n, r in results.items()}, "refused": refused},
        )
        if found:
            print(f"wrote {report.write(found, folder / 'report.html')}")
    return 0 if found else 2


def summary(result: Result) -> dict[str, Any]:
    """The figures of result.json, without the matrices."""
    keys = (
        "setting",
        "data",
        "method",
        "model",
        "repeats",
        "seed",
        "metric",
        "score",
        "score_std",
        "forgetting",
        "backward_transfer",
        "forward_transfer",
        "macs",
        "bytes",
        "seconds",
    )
    whole = result.to_json()
    return {k: whole[k] for k in keys}


def choose(argv: Sequence[str]) -> int:
    """Say whether combining trained models pays, and how: consilience choose BASE EXPERT... --data DIR --model mlp [-o FILE]."""
    from consilience.cli.merging import choose as command

    return command(argv)


def methods(argv: Sequence[str]) -> int:
    """List every method: what it does, where it runs, its paper."""
    if _no_more("methods", argv):
        return 0
    from consilience.loop.run import default_model

    where = tiny()
    for name, call in catalogue("method").items():
        needed = [n for n, p in inspect.signature(call).parameters.items() if p.default is p.empty]
        order = Order(
            (Part("method", "method", name, call),),
            {
                f"method.{p}": v
                for p, v in {"aggregator": "mean", "mapper": "min_entropy"}.items()
                if p in needed
            },
        )
        inputs: dict[str, Any] = {"unlabelled": [[0.0] * 4]} if "unlabelled" in needed else {}
        method = method_of(order, name) if order.values else call(**inputs)
        runs = []
        for setting, schedule in where.items():
            for scenario, note in (("class", ""), ("task", " (scenario task)")):
                try:
                    method.resolve(
                        replace(
                            replace(schedule, scenario=scenario).survey(),
                            model=default_model(schedule, method),
                        )
                    )
                    runs.append(setting + note)
                    break
                except Refusal:
                    pass
        first, _, rest = (inspect.getdoc(call) or "").partition("\n")
        paper = re.search(r"^Paper: (.*?)(?=\n\n|\Z)", rest, re.M | re.S)
        print(f"{name}: {first}")
        every = len(runs) == len(where) and len({r.partition(" ")[2] for r in runs}) == 1
        told = f"all {runs[0].partition(' ')[2]}".strip() if every else ", ".join(runs) or "none"
        print(f"    settings: {told}")
        print(f"    paper: {' '.join(paper[1].split()) if paper else '-'}")
    return 0


def tiny() -> dict[str, Schedule]:
    """The smallest schedule of each setting."""
    import numpy as np

    from consilience import data, settings

    x = np.arange(160, dtype="float32").reshape(40, 4) / 160
    a, b = data.split_classes(data.arrays(x, np.arange(40) % 4), 2)
    c, d = (replace(s, name=s.name + "'") for s in (a, b))
    return {
        "multitask": settings.multitask([a, b]),
        "continual": settings.continual([a, b]),
        "federated": settings.federated([a, b], rounds=2),
        "federated_continual": settings.federated_continual([[a, b], [c, d]], rounds=1),
        "merging": settings.merging([a, b]),
        "exmodel": settings.exmodel(sources=[a, b]),
        "skill": settings.skill([[a, b], [c, d]]),
    }


def report(argv: Sequence[str]) -> int:
    """Print the table of finished runs, and write one report: consilience report DIR... [-o report.html]."""
    found, words = read(argv)
    if _no_more("report", [a for k in found if k != "out" for a in (f"--{k}",)]):
        return 0
    from consilience import report as room

    if not words or ("out" in found and not found["out"]):
        raise ConsilienceError("`consilience report` should have folders of runs, and -o a file. Found none.")
    folders: list[Path] = []
    for word in words:
        runs = (
            sorted(p.parent for p in Path(word).rglob("result.json"))
            if not (Path(word) / "result.json").exists()
            else []
        )
        folders += runs or [Path(word)]
    results = [room.load(f) for f in dict.fromkeys(folders)]
    print(room.table(results))
    print(f"wrote {room.write(results, found.get('out') or 'report.html')}")
    return 0


def merge(argv: Sequence[str]) -> int:
    """Merge checkpoints of any size: consilience merge BASE EXPERT... --aggregator ties -o OUT."""
    from consilience.cli.merging import merge as command

    return command(argv)


def demo(argv: Sequence[str]) -> int:
    """Run every setting on real handwritten digits, and write demo/report.html: consilience demo [--out demo]."""
    found, words = read(argv)
    if _no_more("demo", [*words, *(f"--{k}" for k in found if k != "out")]):
        return 0
    if "out" in found and not found["out"]:
        raise ConsilienceError("`--out` should have a value. Found none.")
    from consilience.demo import demo as show

    show(found.get("out") or "demo")
    return 0


def _no_more(command: str, argv: Sequence[str]) -> bool:
    """Whether help was asked for, for a command with few options; anything else is refused."""
    if "--help" in argv or "-h" in argv:
        print(f"usage: consilience {command} [options]\n\n{COMMANDS[command][0]}")
        return True
    if argv:
        near = _nearest(argv[0].removeprefix("--"), ["out", "help"] if command != "methods" else ["help"])
        raise ConsilienceError(
            f"an option should be one of `consilience {command}`'s. Found {argv[0]!r}; {near}."
        )
    return False


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    f.__name__: ((f.__doc__ or "").strip(), f) for f in (run, compare, choose, methods, merge, report, demo)
}


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: 0 for success, 2 for bad input (one line on stderr), 130 for Ctrl-C."""
    if argv is None:
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            lines = "\n".join(f"  {name:9}{text}" for name, (text, _) in COMMANDS.items())
            print(f"usage: consilience COMMAND [options]\n\n{lines}\n\nconsilience COMMAND --help says more.")
            return 0 if argv else 2
        if argv[0] == "--version":
            from consilience import __version__

            print(__version__)
            return 0
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        return COMMANDS[argv[0]][1](argv[1:])
    except (Interrupted, KeyboardInterrupt) as e:
        return _say(str(e) or "interrupted.", 130)
    except ConsilienceError as e:
        return _say(str(e), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        return _say(
            f"files should be readable and writable. Found {e.strerror or e}{f' at {e.filename}' if e.filename else ''}.",
            2,
        )


def _say(text: str, code: int) -> int:
    print(" ".join(text.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
