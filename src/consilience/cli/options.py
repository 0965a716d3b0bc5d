"""Options of the command line: read from argv and YAML, checked against signatures, shown by --help.

Types, defaults and help come from the signatures and docstrings of the catalogues. A choice (`--method ewc`)
is a name in a catalogue or a dotted path to a function or class; `--method.strength 100` is one of its
arguments. A YAML file says the same: `method: {ewc: {strength: 100}}`. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal, NamedTuple, TypeVar

from consilience.cli.catalogue import TYPED, catalogue, first_argument, nearest, resolve, typed_paths
from consilience.cli.defaults import DIAGNOSE, FITTING, FITTING_DATA, SPLIT_ARGUMENTS
from consilience.core.errors import ConsilienceError, unknown

CHOICES = ("setting", "data", "split", "method", "model")
CHAINED = ("split", "method", "methods", "model")
"""Choices that take several names: `ewc+er` compose, `iid+classes` come one after another."""
NAMED = ("aggregator", "maker", "mapper", "policy")
"""Arguments of methods that take a name of a catalogue or a dotted path, and have arguments themselves."""
NONE = ("none", "auto", "null")
SWITCHES = ("resume", "judge_clients", "trust", "overwrite", "dry_run", "help")

HERE = ("out", "resume", "config", "trust", "dry_run")
"""Options of one call of the command, which config.yaml does not hold."""

FROM_DATA = ("inputs", "outputs", "channels", "size")
"""Arguments of models that the data decides."""
FROM_COMMAND = {
    "data": ("augment",),
    "setting": ("sources", "streams", "experts", "base"),
    "model": FROM_DATA,
}
"""Parameters that are no options, because the command fills them, or because they are functions."""

PRECISION = "training.precision"
DTYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
"""Values of `--dtype`, and the precision of `Training` that each means."""
RENAMED = {"scenario": "setting.scenario", PRECISION: "dtype"}
"""Options with one spelling over all commands, by the spelling that is refused."""


Options = TypeVar("Options")


class Summary(NamedTuple):
    """What --help says about a command."""

    text: str
    usage: str


COMMANDS = {
    "run": Summary("Run a method in a setting on data.", "[options]"),
    "compare": Summary("Run several methods on the same sources: one table, one report.", "[options]"),
    "diagnose": Summary(
        "Say which tasks help or harm each other when trained together, and what to do.", "[options]"
    ),
    "choose": Summary(
        "Say whether combining trained models pays, and how.", "BASE EXPERT... --data DIR [options]"
    ),
    "distil": Summary("Make one model of several.", "TEACHER... --student NAME --data DIR -o OUT [options]"),
    "exmodel": Summary(
        "Learn from a stream of trained experts, without data.", "EXPERT... --student NAME -o OUT [options]"
    ),
    "experts": Summary(
        "Train streams of experts, show their cards, and suggest some.", "train|card|suggest [options]"
    ),
    "methods": Summary("List every method: what it does, where it runs, its paper.", "[options]"),
    "merge": Summary("Merge checkpoints of any size.", "BASE EXPERT... [--aggregator NAME] -o OUT [options]"),
    "report": Summary("Print the table of finished runs, and write one report.", "DIR... [options]"),
    "check": Summary("Say whether the folders of runs are complete and undamaged.", "DIR..."),
    "demo": Summary("Run every setting on real handwritten digits, and write one report.", "[options]"),
}
"""All commands, in the order of `consilience --help`."""


@dataclass(frozen=True)
class RunOptions:
    """Options of the run.

    Args:
        out: a new folder for config.yaml, result.json, log.jsonl and checkpoints; none keeps nothing.
        resume: continue from the last checkpoint in --out (from the start, if there is none yet), with the
            configuration that is stored there.
        config: a YAML file with options; options on the command line override it.
        trust: import code that --config or the resumed folder names by dotted paths.
        repeats: number of seeds, for a mean and a standard deviation.
        seed: the first seed.
        metric: one or several of accuracy, auroc, balanced_accuracy, f1, iou, loss, mae, mean_angle, mse,
            perplexity, r2 and top_k, or dotted paths, as in "accuracy,f1(average=micro)"; the first is in the
            matrices, and none fits the kind of target.
        engine: what runs the training steps.
        checkpoint_seconds: seconds between checkpoints, also within a task.
        checkpoint_steps: steps between checkpoints, in addition.
        judge_clients: also evaluate each client with its own parameters, before and after training, and
            measure the drift between clients that are aggregated together.
        stopping: stages without a better validation score after which the run ends, with the best one's
            parameters; or a mapping of patience, least and best. None runs all stages.
        trackers: where the numbers of the log go while it runs: some of csv, tensorboard, wandb and mlflow.
    """

    out: str | None = None
    resume: bool = False
    config: str | None = None
    trust: bool = False
    repeats: int = 1
    seed: int = 0
    metric: str | None = None
    engine: Literal["serial", "batched", "ray", "auto"] = "serial"
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int | None = None
    judge_clients: bool = False
    stopping: int | dict[str, Any] | None = None
    trackers: str | None = None


@dataclass(frozen=True)
class DiagnoseOptions:
    """Options of the diagnosis.

    Args:
        out: a new folder for config.yaml, finished runs, diagnosis.json and report.html; none keeps nothing.
        resume: go on with the diagnosis in --out, with the configuration that is stored there; finished runs
            are read.
        config: a YAML file with options; options on the command line override it.
        trust: import code that --config or the resumed folder names by dotted paths.
        dry_run: print how many runs there would be, and train nothing.
        parts: some of transfer, conflicts, affinities, groups, incremental, depth, capacity, soft, balance
            and front, with commas; none does all that it can.
        budget: the most runs, of all seeds each; parts that go beyond are skipped, and named.
        domains: the domain of each task, as in {"a": "text", "b": "image"}.
        on: the data that runs are judged on. What is chosen on test data is not tested by them.
        repeats: number of seeds; one shows no intervals.
        seed: the first seed.
        metric: as of `consilience run`; it must have a direction.
        engine: what runs the training steps, but of training alone and together, which is looked at.
        probes: how often gradients are measured in training together.
    """

    out: str | None = None
    resume: bool = False
    config: str | None = None
    trust: bool = False
    dry_run: bool = False
    parts: str | None = None
    budget: int | None = None
    domains: dict[str, str] | None = None
    on: Literal["validation", "test"] = "validation"
    repeats: int = 3
    seed: int = 0
    metric: str | None = None
    engine: Literal["serial", "batched", "ray", "auto"] = "serial"
    probes: int = 10


# Parts: the chosen functions, and their parameters as options.


@dataclass(frozen=True)
class Part:
    """A chosen function, and which of its parameters are options."""

    choice: str
    key: str
    """The prefix of its options; "" for none."""
    name: str
    call: Callable[..., Any]
    hidden: tuple[str, ...] = ()
    """Parameters that are no options."""
    upstream: str = ""
    """The parameter that receives the result of the part before: sources, or a model."""

    def option(self, name: str) -> str:
        """Return the option of a parameter."""
        return f"{self.key}.{name}" if self.key else name

    def options(self) -> dict[str, inspect.Parameter]:
        """Return parameters by option, with annotations evaluated as far as that needs no torch."""
        try:
            parameters = list(inspect.signature(self.call).parameters.values())
        except (TypeError, ValueError):
            return {}
        scope = {"Path": Path, **vars(sys.modules[self.call.__module__])}
        found = {}
        for parameter in parameters:
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.name in self.hidden or parameter.name.startswith("_") or variadic:
                continue

            # An argument that takes a name is text here, and built by the command.
            kind, default = evaluated(parameter.annotation, scope), parameter.default
            if parameter.name in NAMED and not is_text(kind):
                kind = Any
            if default is parameter.empty and self.choice == "split":
                default = SPLIT_ARGUMENTS.get(parameter.name, default)
            found[self.option(parameter.name)] = parameter.replace(
                annotation=kind, default=default, kind=parameter.KEYWORD_ONLY
            )
        return found

    def stub(self, options: Mapping[str, inspect.Parameter]) -> Callable[..., Any]:
        """Make a function with this signature and docstring."""

        # jsonargparse evaluates annotations of the original, and would import torch for that.
        def stub() -> None: ...

        own = [parameter for key, parameter in options.items() if key in self.options()]
        stub.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        stub.__doc__ = inspect.getdoc(self.call)
        stub.__name__ = stub.__qualname__ = self.call.__name__
        return stub


def evaluated(annotation: Any, scope: dict[str, Any]) -> Any:
    """Evaluate an annotation that is text; Any where it names what only type checkers import."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(scope))
    except (NameError, AttributeError, TypeError):
        return Any


def is_text(kind: Any) -> bool:
    """Whether an annotation accepts text."""
    # The mapper of `skill` does: the method itself takes a name.
    return typing.get_origin(kind) is Literal or str in (kind, *typing.get_args(kind))


def parts_of(choice: str, text: str) -> list[Part]:
    """List the functions that `a`, `a+b` or `a,b+c` names, each once."""
    if text in NONE and choice in ("split", "model"):
        return []
    # A comparison lists compositions; a method in two of them has its options once.
    entries = text.split(",") if choice == "methods" else [text]
    names = [name for entry in entries for name in (entry.split("+") if choice in CHAINED else [entry])]
    names = list(dict.fromkeys(name.strip() for name in names))
    alone = len(names) == 1 and choice != "methods"
    return [part_of(choice, name, alone) for name in names]


def part_of(choice: str, name: str, alone: bool) -> Part:
    """Make the part for one name; where it is alone, its options need no name in their prefix."""
    if choice == "split":
        name = name.removeprefix("split_")
    call = resolve(choice, name)
    key = choice if alone else f"{choice}.{name.rpartition('.')[2]}"

    upstream = first_argument(call) if choice in ("setting", "split", "model") else ""
    if choice == "model" and upstream not in ("trunk", "model", "backbone", "expert"):
        upstream = ""

    # The backbone resizes images itself, so its size is an option.
    hidden = [
        argument for argument in FROM_COMMAND.get(choice, ()) if (name, argument) != ("backbone", "size")
    ]
    return Part(choice, key, name, call, (*hidden, upstream), upstream)


def named_parts(parts: Iterable[Part], values: Mapping[str, Any]) -> list[Part]:
    """List the functions that arguments of methods name, such as the policy of a buffer."""
    found = []
    for part in parts:
        for key, parameter in part.options().items():
            argument, name = key.rpartition(".")[2], values.get(key)
            by_name = (
                part.choice in ("method", "methods")
                and argument in NAMED
                and not is_text(parameter.annotation)
            )
            if by_name and isinstance(name, str) and name not in NONE:
                found.append(Part(argument, key, name, resolve(argument, name)))
    return found


# Reading argv and YAML into options by key.


def read(argv: Sequence[str], switches: Sequence[str] = SWITCHES) -> tuple[dict[str, str | None], list[str]]:
    """Read options by key (None: the value is missing), and words that are no options.

    Code that these options name may be imported from here on (`TYPED`).
    """
    # jsonargparse would need all options beforehand, but which ones exist depends on the choices.
    found: dict[str, str | None] = {}
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        token = {"-h": "--help", "-o": "--out"}.get(word, word)
        if not token.startswith("--"):
            words.append(token)
            continue

        key, equals, value = token[2:].partition("=")
        if equals:
            found[key] = value
        elif key in switches and (not rest or rest[0] not in ("true", "false")):
            found[key] = "true"
        elif rest and not rest[0].startswith("--"):
            found[key] = rest.pop(0)
        else:
            found[key] = None
    TYPED.set(typed_paths(found))
    return found, words


def load_yaml(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML file, which may come from elsewhere: its size and depth are bounded."""
    import yaml

    from consilience.cli.bounded import MOST_BYTES, read_bounded

    # A pipe or a device would be waited for, or never end.
    if path.exists() and not path.is_file():
        raise ConsilienceError(f"`config` must be a file, got {path}.")
    try:
        with path.open("rb") as file:
            found = read_bounded(file.read(MOST_BYTES + 1).decode())
    except OSError as error:
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; nearest: {path.parent / near[0]}" if near else ""
        raise ConsilienceError(f"`config`: cannot read {path}: {error.strerror}{hint}.") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConsilienceError(f"`config` must be YAML, got {problem} in {path}{where}.") from error

    # An empty file is a mapping without options.
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise ConsilienceError(
            f"`config` must be a mapping of options, got a {type(found).__name__} in {path}."
        )
    if "trust" in found:
        raise ConsilienceError(f"`trust` cannot be in a file, got it in {path}; give --trust yourself.")
    return found


def read_yaml(path: Path) -> dict[str, str | None]:
    """Read a YAML file as options by key."""
    return flat(load_yaml(path))


def flat(config: Mapping[Any, Any]) -> dict[str, str | None]:
    """Flatten a configuration into options by key.

    >>> flat({"method": {"ewc": {"strength": 1}}})
    {'method': 'ewc', 'method.strength': '1'}
    """
    found: dict[str, Any] = {}
    for key, value in ((str(key), value) for key, value in config.items()):
        if key in (*CHOICES, "methods"):
            found |= flat_choice(key, value)
        elif isinstance(value, dict) and key.rpartition(".")[2] not in NAMED and key != "stopping":
            found |= {f"{key}.{option}": argument for option, argument in value.items()}
        else:
            found |= flat_argument(key, value)
    return {key: as_text(value) for key, value in found.items()}


def flat_choice(key: str, value: Any) -> dict[str, Any]:
    """Flatten a choice: a name, a list of names, or a mapping of names to their options."""
    if isinstance(value, list):
        value = dict.fromkeys(map(str, value))
    if not isinstance(value, dict):
        return {key: "none" if value is None else value}

    found: dict[str, Any] = {key: ("," if key == "methods" else "+").join(map(str, value))}
    for name, options in value.items():
        if not isinstance(options, dict | None):
            raise ConsilienceError(f"`{key}: {name}` must be a mapping of its options, got {options!r}.")
        alone = len(value) == 1 and key != "methods"
        prefix = key if alone else f"{key}.{str(name).rpartition('.')[2]}"
        for option, argument in (options or {}).items():
            found |= flat_argument(f"{prefix}.{option}", argument)
    return found


def flat_argument(key: str, value: Any) -> dict[str, Any]:
    """Flatten an argument: `policy: {herding: {size: 3}}` is `policy=herding`, `policy.size=3`."""
    named = key.rpartition(".")[2] in NAMED and isinstance(value, dict) and len(value) == 1
    if not named:
        return {key: value}
    ((name, options),) = value.items()
    if not isinstance(options, dict | None):
        raise ConsilienceError(f"`{key}: {name}` must be a mapping of its options, got {options!r}.")
    return {key: str(name)} | {f"{key}.{option}": argument for option, argument in (options or {}).items()}


def as_text(value: Any) -> str:
    """Write a value of YAML as it is written on the command line."""
    if not isinstance(value, str):
        return json.dumps(value, default=str)
    # Text may be YAML itself, which is read again with the type of its option.
    if any(sign in value for sign in "{[:&"):
        from consilience.cli.bounded import unbounded

        if problem := unbounded(value):
            raise ConsilienceError(
                "text in a configuration must have no aliases, no key twice and few levels, "
                f"got {problem} in {value[:80]!r}."
            )
    return value


def nested(parts: Sequence[Part], values: Mapping[str, Any]) -> dict[str, Any]:
    """Build the configuration that config.yaml holds."""
    config: dict[str, Any] = {"model": "auto", "split": "none"}
    # Arguments that name a function stay a plain name as long as the function has its defaults.
    by_key = {part.key: part for part in parts if part.choice in NAMED}
    for part in parts:
        own = {}
        for key in part.options():
            changed = changed_options(by_key[key], values) if key in by_key else {}
            value = {values[key]: changed} if changed else plain(values[key])
            own[key.removeprefix(part.key + ".")] = value

        if part.choice == "training":
            config["training"] = own
        elif part.choice == "":
            config |= {key: value for key, value in own.items() if key not in HERE}
        elif part.choice not in NAMED:
            old = config.get(part.choice)
            config[part.choice] = {**(old if isinstance(old, dict) else {}), part.name: own}

    # The order in which a reader would ask for them.
    order = (*CHOICES[:3], "methods", *CHOICES[3:], "training")
    rest = [key for key in config if key not in order]
    return {key: config[key] for key in (*order, *rest) if key in config}


def changed_options(part: Part, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a part that differ from their defaults."""
    options = part.options().items()
    return {
        key.removeprefix(part.key + "."): plain(values[key])
        for key, parameter in options
        if values[key] != parameter.default
    }


def plain(value: Any) -> Any:
    """Convert a value to what YAML and JSON hold."""
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    # A function is written as the dotted path that names it.
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge layers of options; later ones win, and a new name for a choice drops the options of the old one.

    >>> layered({"method": "ewc", "method.strength": 1}, {"method": "er"})
    {'method': 'er'}
    """
    found: dict[str, Any] = {}
    for layer in layers:
        changed = [key for key in layer if key in found and layer[key] != found[key]]
        for choice in changed:
            found = {key: value for key, value in found.items() if not key.startswith(choice + ".")}
        found |= layer
    return found


# The order: what was asked for, checked.


@dataclass(frozen=True)
class Order:
    """What was asked for: the chosen parts, and the values of all options."""

    parts: tuple[Part, ...]
    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    """The text of each choice, such as `ewc+er`."""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that config.yaml holds."""
        found = nested(self.parts, self.values)
        if "methods" not in self.names:
            return found

        # A method can be in several compositions, so options are stored per method, next to the list.
        by_name = found["methods"]
        found["methods"] = self.names["methods"].split(",")
        for part in self.of("methods"):
            found |= {part.option(name): value for name, value in by_name[part.name].items()}
        return found

    def of(self, choice: str) -> list[Part]:
        """Return the parts of a choice, in order."""
        return [part for part in self.parts if part.choice == choice]

    def options(self, part: Part) -> dict[str, Any]:
        """Return the arguments that a part is called with."""
        return {key.removeprefix(part.key + "."): self.values[key] for key in part.options()}

    @property
    def run(self) -> RunOptions:
        """The options of the run."""
        (part,) = (part for part in self.parts if part.call is RunOptions)
        return RunOptions(**self.options(part))

    @property
    def diagnosis(self) -> DiagnoseOptions:
        """The options of the diagnosis."""
        (part,) = (part for part in self.parts if part.call is DiagnoseOptions)
        return DiagnoseOptions(**self.options(part))


def understand(command: Literal["run", "compare", "diagnose"], argv: Sequence[str]) -> Order | None:
    """Check the options of a command with choices; None where help was asked for and printed."""
    given, helping = given_options(command, argv)
    refuse_renamed(command, given, RENAMED.values())
    choices = choices_of(command)
    for key in (*choices, "config", "out"):
        if given.get(key, "") is None and not helping:
            raise missing(key)
    # --help may come before a choice is typed: --method --help shows the default one.
    given = {key: value for key, value in given.items() if value is not None or key not in choices}

    # Later layers override earlier ones.
    stored = stored_options(given)
    layers = [fitting_options(command, layered(stored, given)), with_precision(stored), with_precision(given)]
    chosen = layered(*layers)
    names = {choice: chosen[choice] for choice in choices}
    parts = [part for choice in choices for part in parts_of(choice, names[choice])]
    if command == "diagnose":
        parts = [diagnosable(part) for part in parts]
    layers = [shortened(layer, parts) for layer in layers]
    merged = layered(*layers)
    parts += [*named_parts(parts, merged), *common_parts(command)]
    options = {key: parameter for part in parts for key, parameter in part.options().items()}

    # Options of a choice that another layer replaced are no mistake.
    for sign, layer in (("", layers[1]), ("--", layers[2])):
        left = {key: value for key, value in layer.items() if key in merged}
        check_options(command, left, [*options, *choices], helping, sign)

    # Fitting values are shown as defaults, and need no parsing.
    fitting = {key: value for key, value in layers[0].items() if key in options and merged.get(key) is value}
    options = {
        key: parameter.replace(default=fitting[key]) if key in fitting else parameter
        for key, parameter in options.items()
    }
    wanted = {key: value for key, value in merged.items() if key in options and key not in fitting}
    return order_of(command, parts, options, wanted, names, helping)


def diagnosable(part: Part) -> Part:
    """Return a part of a diagnosis, whose setting is multi-task training in one round."""
    if part.choice != "setting":
        return part
    if part.name != "multitask":
        raise ConsilienceError(f"a diagnosis is of the setting multitask, got {part.name!r}.")
    return replace(part, hidden=(*part.hidden, "rounds"))


def given_options(command: str, argv: Sequence[str]) -> tuple[dict[str, str | None], bool]:
    """Read options of a command that takes no words, and whether help was asked for."""
    given, words = read(argv)
    if words:
        raise ConsilienceError(
            f"`consilience {command}` takes options only, got {words[0]!r}; {nearest(words[0], CHOICES)}."
        )
    return given, given.pop("help", None) is not None


def choices_of(command: str) -> tuple[str, ...]:
    """Return the choices of a command: `compare` and `diagnose` take several methods, `run` takes one."""
    return tuple("methods" if command != "run" and key == "method" else key for key in CHOICES)


def stored_options(given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Read the options that a file has: the one of --config, or that of the run that is resumed."""
    if given.get("config"):
        return read_yaml(Path(str(given["config"])))
    if given.get("resume") and given.get("out"):
        path = Path(str(given["out"])) / "config.yaml"
        return read_yaml(path) if path.exists() else {}
    return {}


def fitting_options(command: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that fit the command, the chosen setting and the data."""
    setting = chosen.get("setting") or ("multitask" if command == "diagnose" else "continual")
    data = chosen.get("data") or "digits"

    # A wrong setting is refused here, before its defaults are looked up.
    resolve("setting", setting)
    fitting = {"setting": setting, "data": "digits", "model": "auto"}
    fitting |= FITTING.get(setting, FITTING["continual"])
    if command == "diagnose":
        del fitting["method"]
        fitting = layered(fitting, DIAGNOSE)
    # A comparison has plain training next to the method that fits.
    if command == "compare":
        fitting["methods"] = ",".join(dict.fromkeys(["finetune", fitting.pop("method")]))
    # Groups are several sources already, which a split would cut again.
    grouped = any(chosen.get(key, "null") not in (None, *NONE) for key in ("data.group", "data.table.group"))
    return layered(fitting, FITTING_DATA.get(data, {}), {"split": "none"} if grouped else {})


def common_parts(command: str) -> list[Part]:
    """Return the parts that every command has: the training, and the run or the diagnosis itself."""
    from consilience.core.training import Training

    return [
        Part("training", "training", "training", Training, ("sampler",)),
        Part("", "", command, DiagnoseOptions if command == "diagnose" else RunOptions),
    ]


def shortened(layer: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """Write `method.ewc.strength` as `method.strength` where ewc is the only method."""
    only = {part.key: part.name.rpartition(".")[2] for part in parts if part.key == part.choice}
    found = {}
    for key, value in layer.items():
        head, _, rest = key.partition(".")
        if rest and head in CHAINED and head in only:
            key = f"{head}.{rest.removeprefix(only[head] + '.')}"
        found[key] = value
    return found


# One spelling of the dtype and the scenario over all commands.


def refuse_renamed(command: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse an old spelling of an option, with the one that all commands have."""
    for old in RENAMED.keys() & given.keys():
        if RENAMED[old] in known:
            new = f"it is called `--{RENAMED[old]}` in all commands"
            raise ConsilienceError(f"`consilience {command}` has no option `--{old}`; {new}.")


def with_precision(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Write `dtype=float64` as `training.precision=fp64`, which is the field of `Training`."""
    found = {key: value for key, value in layer.items() if key != "dtype"}
    if "dtype" in layer:
        dtype = layer["dtype"]
        if dtype is not None and dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        found[PRECISION] = None if dtype is None else DTYPES[dtype]
    return found


def spelled(key: str) -> str:
    """Return the spelling of an option on the command line."""
    return "dtype" if key == PRECISION else key


# Checks, parsing and help, for all commands.


def check_options(
    command: str, given: Mapping[str, Any], known: Sequence[str], helping: bool = False, sign: str = "--"
) -> None:
    """Refuse options that a command does not have, and options without a value."""
    for key, value in given.items():
        if key not in known:
            near = nearest(key, map(spelled, known), sign)
            raise ConsilienceError(f"`consilience {command}` has no option {sign + key!r}; {near}.")
        if value is None and not helping:
            raise missing(key, sign)


def take_choice(given: dict[str, str | None], choice: str, default: str, helping: bool) -> str:
    """Take the name of a choice out of the options; the default where it is not given."""
    if given.get(choice, "") is None and not helping:
        raise missing(choice)
    return given.pop(choice, None) or default


def missing(key: str, sign: str = "--") -> ConsilienceError:
    """Return the error for an option without a value."""
    return ConsilienceError(f"`{sign}{spelled(key)}` needs a value.")


def order_of(
    command: str,
    parts: Sequence[Part],
    options: Mapping[str, inspect.Parameter],
    given: Mapping[str, Any],
    names: Mapping[str, str],
    helping: bool,
) -> Order | None:
    """Parse checked options; None where help was asked for, which is printed."""
    if helping:
        help_of(command, parts, options, names).print_help()
        return None
    for part in parts:
        for key in part.options():
            if options[key].default is inspect.Parameter.empty and key not in given:
                raise ConsilienceError(f"`--{key}` must be given: {part.name} has no default for it.")
    return Order(tuple(parts), parse(parts, options, given), names)


def own_options(command: str, argv: Sequence[str], kind: type[Options]) -> tuple[Options | None, list[str]]:
    """Read the options of a command without choices, and its words; None where help was printed instead."""
    given, words = read(argv)
    helping = given.pop("help", None) is not None
    part = Part("", "", command, kind)
    check_options(command, given, [*part.options(), "help"], helping)
    order = order_of(command, [part], part.options(), given, {}, helping)
    return None if order is None else kind(**order.values), words


def help_of(
    command: str,
    parts: Sequence[Part],
    options: Mapping[str, inspect.Parameter],
    names: Mapping[str, str],
) -> Any:
    """Make the parser that prints the help of a command."""
    from jsonargparse import ArgumentParser

    summary = COMMANDS[command]
    parser = ArgumentParser(prog=f"consilience {command}", description=summary.text)
    parser.usage = f"consilience {command} {summary.usage}"
    if names:
        title = "choices: a name or a dotted path; options of a choice are listed once it is made"
        group = parser.add_argument_group(title)
        for choice, name in names.items():
            known = ", ".join(sorted(catalogue(choice)))
            text = f"{known}{MORE_NAMES.get(choice, '')}"
            group.add_argument(f"--{choice}", default=name, metavar="NAME", help=text)

    for part in parts:
        shown = {key: parameter for key, parameter in options.items() if key in part.options()}
        # The precision has another spelling here, so it is described by hand.
        dtype = shown.pop(PRECISION, None)
        if not shown:
            continue
        line = (inspect.getdoc(part.call) or "").split("\n")[0].rstrip(".")
        titled = part.choice in (*CHOICES, *NAMED, "methods")
        group = parser.add_argument_group(f"{part.choice} {part.name}: {line}" if titled else line)
        group.add_function_arguments(part.stub(shown), part.key or None, as_group=False)
        if dtype is not None:
            default = next(name for name, precision in DTYPES.items() if precision == dtype.default)
            text = "of the arithmetic; bfloat16 and float16 are autocast"
            group.add_argument("--dtype", choices=list(DTYPES), default=default, help=text)
    return parser


MORE_NAMES = {
    "methods": ", composed with + and listed with ,",
    "method": ", composed with +",
    "split": ", one after another with +; or none",
    "test": "; a folder of images by class, or an .npz file; or none",
    "auxiliary": "; a folder of images, or an .npz file; or none",
    "student": "; auto fits the data",
}
"""How several names of a choice are written."""


def parse(
    parts: Sequence[Part], options: Mapping[str, inspect.Parameter], given: Mapping[str, str]
) -> dict[str, Any]:
    """Parse the values of options by their types."""
    from jsonargparse import ArgumentError, ArgumentParser

    found: dict[str, Any] = {}
    for part in parts:
        # One parser per part, because an option may also be a prefix: --method.policy, --method.policy.x.
        own = {key.removeprefix(part.key + "."): key for key in part.options()}
        words = [f"--{name}={given[key]}" for name, key in own.items() if key in given]
        parser = ArgumentParser(exit_on_error=False)
        parser.add_function_arguments(part.stub(options), None, as_group=False)
        try:
            values = parser.parse_args(words)
        except ArgumentError as error:
            texts = {key: given[key] for key in own.values() if key in given}
            raise parse_error(str(error), part, texts, options) from error
        found |= {key: values[name] for name, key in own.items()}
    return {key: found[key] for key in options}


def parse_error(
    text: str, part: Part, given: Mapping[str, str], options: Mapping[str, inspect.Parameter]
) -> ConsilienceError:
    """Say in one line which value has the wrong type."""
    for key, value in given.items():
        # jsonargparse names the option in one of several forms, and not as an attribute of the error.
        name = key.removeprefix(part.key + ".")
        if not re.search(rf"(^|[\s\"'`-]){re.escape(name)}([\s\"'`:]|$)", text):
            continue
        kind = options[key].annotation
        literals = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        allowed = [str(entry) for entry in literals]
        rule = f"one of {', '.join(allowed)}" if allowed else type_in_words(kind)
        near = difflib.get_close_matches(value, allowed, cutoff=0.5)
        hint = f"; {nearest(value, allowed, '')}" if near else ""
        return ConsilienceError(f"`--{key}` must be {rule}, got {value!r}{hint}.")
    return ConsilienceError(" ".join(text.split()))


def type_in_words(kind: Any) -> str:
    """Name a type for people.

    >>> type_in_words(int | None)
    'a whole number or null'
    """
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin = typing.get_origin(kind)
    if type(kind).__name__ == "UnionType" or origin is typing.Union:
        return " or ".join(map(type_in_words, typing.get_args(kind)))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return "a list such as [1, 2]"
    return words.get(kind) or str(kind).replace("typing.", "").replace("collections.abc.", "")
