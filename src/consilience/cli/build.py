"""From options to objects: the schedule, the method, the model and the training that were asked for."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from consilience.cli.catalogue import resolve
from consilience.cli.options import FROM_DATA, Order, Part
from consilience.core.errors import ConsilienceError, kind_of

if TYPE_CHECKING:
    from consilience.core.aggregator import Aggregator
    from consilience.core.method import Method
    from consilience.core.model import Model
    from consilience.core.schedule import Schedule
    from consilience.core.training import Training


def schedule_of(order: Order) -> Schedule:
    """Build the schedule: the data, split, in the setting."""
    # A setting takes one list of sources, or one stream of sources per client.
    (setting,) = order.of("setting")
    streams = [as_list(stream) for stream in as_list(sources_of(order))]
    taken = streams if setting.upstream == "streams" else [source for stream in streams for source in stream]
    schedule = setting.call(**{setting.upstream: taken}, **order.options(setting))
    if not hasattr(schedule, "plan"):
        raise ConsilienceError(
            f"`setting` must give a Schedule, got {kind_of(schedule)} from {setting.name!r}."
        )
    return schedule  # type: ignore[no-any-return]


def sources_of(order: Order) -> Any:
    """Read the data, and split it: a source, or nested lists of sources."""
    (data,) = order.of("data")
    sources = check_sources("data", data.call(**order.options(data)), data.name)
    for split in order.of("split"):
        sources = check_sources("split", split_sources(split, sources, order.options(split)), split.name)
    return sources


def split_sources(split: Part, sources: Any, options: dict[str, Any]) -> Any:
    """Apply one split: to all sources together, or to each."""
    # A split of one source leaves lists of lists, one per client.
    if split.upstream == "sources":
        return split.call(as_list(sources), **options)
    if isinstance(sources, list | tuple):
        return [split.call(source, **options) for source in sources]
    return split.call(sources, **options)


def check_sources(choice: str, value: Any, name: str) -> Any:
    """Return the value if it is a source or nested lists of sources; refuse anything else."""
    from consilience.core.source import Source

    for entry in as_list(value):
        if isinstance(entry, list | tuple):
            check_sources(choice, entry, name)
        elif not isinstance(entry, Source):
            raise ConsilienceError(
                f"`{choice}` must give a Source or a list of them, got {kind_of(entry)} from {name!r}."
            )
    return value


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and anything else as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def method_of(order: Order, names: str, choice: str = "method") -> Method:
    """Build one method from `a+b`."""
    from consilience.core.method import Method

    wanted = [name.strip() for name in names.split("+")]
    parts = [part for name in wanted for part in order.of(choice) if part.name == name]
    return Method.of([part_method(order, part) for part in parts])


def part_method(order: Order, part: Part) -> Method:
    """Build the method of one part, with the aggregator, maker, mapper or policy that its arguments name."""
    from consilience.core.aggregator import Aggregator
    from consilience.core.correction import Correction, Mapper
    from consilience.core.method import Method

    # Arguments that take names hold text until here.
    options = order.options(part)
    for named in order.parts:
        prefix, _, argument = named.key.rpartition(".")
        if named.choice == argument and prefix == part.key:
            options[argument] = named.call(**order.options(named))

    made = part.call(**options)
    name = part.name.rpartition(".")[2]
    if isinstance(made, Method):
        return made
    # A mapper is also a correction, so it is asked for first.
    if isinstance(made, Mapper):
        return Method(name, mapper=made)
    if isinstance(made, Correction):
        return Method(name, (made,))
    if isinstance(made, Aggregator):
        return Method(name, aggregator=made)
    raise ConsilienceError(
        f"`{part.choice}` must give a Method, a Correction, a Mapper or an Aggregator, "
        f"got a {type(made).__name__} from {part.name!r}."
    )


def model_of(order: Order, schedule: Schedule) -> Model | None:
    """Build the chosen model, with the sizes of the data; None leaves the model to the run."""
    import torch

    from consilience import models

    model: Any = None
    for part in order.of("model"):
        if part.upstream and model is None:
            raise ConsilienceError(
                f"{part.name} must follow a model, as in random_features+{part.name}, but comes first."
            )
        takes = inspect.signature(part.call).parameters
        wanted = [key for key in FROM_DATA if key in takes and key in part.hidden]
        # Inputs of several parts have no such sizes; a model of the user may not ask for any.
        found = data_sizes(schedule) if wanted else {}
        sizes = {key: found[key] for key in wanted}
        before = {part.upstream: model} if part.upstream else {}
        make = partial(part.call, **order.options(part), **sizes, **before)
        model = make()

        # A module of the user is made again for every seed, so it is wrapped with the function that makes it.
        if isinstance(model, torch.nn.Module):
            model = models.wrap(make)
    return model  # type: ignore[no-any-return]


def data_sizes(schedule: Schedule) -> dict[str, int]:
    """Return the arguments of models that the data decides."""
    from consilience.core.tree import one_tensor

    x, _ = schedule.sources[0].train.first()
    inputs = one_tensor(x, "a model whose sizes the data decides")
    # Vectors have one channel.
    channels = (*inputs.shape, 1)[1]
    values = (inputs[0].numel(), len(schedule.frame.labels), channels, inputs.shape[-1])
    return dict(zip(FROM_DATA, values, strict=True))


def training_of(order: Order) -> Training:
    """Build the training."""
    from consilience.core.training import Training

    (part,) = order.of("training")
    options = order.options(part)
    if "loss" in options:
        options["loss"] = loss_of(options["loss"])
    return Training(**options)


def loss_of(value: Any) -> Any:
    """Build the loss of `focal(gamma=1)`, of a dotted path to a function, or of each task or kind.

    >>> loss_of({"class": "focal(gamma=1)"})
    {'class': Focal(weights=None, smoothing=0.0, gamma=1)}
    """
    if isinstance(value, Mapping):
        return {name: loss_of(own) for name, own in value.items()}
    if not isinstance(value, str):
        return value
    call = call_of("loss", value)
    # A function of the user is the loss itself, unless it is called.
    return call.func if "." in value and "(" not in value else call()


def aggregator_of(text: str) -> Aggregator:
    """Build an aggregator of the catalogue from `ties` or `ties(1.0)`.

    >>> aggregator_of("ties(density=0.5)")
    Ties(density=0.5)
    """
    call = call_of("aggregator", text)
    made: Aggregator = call()
    return made


def metrics_of(text: str) -> list[Any]:
    """Build the metrics of `accuracy,f1(average=micro)`: names, or dotted paths to functions of users.

    >>> metrics_of("accuracy, f1(average=micro)")
    [Accuracy(), F1(average='micro', threshold=0.5)]
    """
    found = []
    for word in listed(text):
        call = call_of("metric", str(word))
        # A function of the user is the metric itself, unless it is called.
        own = "." in str(word) and "(" not in str(word)
        found.append(call.func if own else call())
    return found


def listed(text: str) -> list[str]:
    """Split a list at its commas, but not at those between parentheses.

    >>> listed("ties(0.3, 1),dare")
    ['ties(0.3, 1)', 'dare']
    """
    # YAML may have a list, which comes here as JSON.
    if text.startswith("["):
        return [str(word) for word in json.loads(text)]
    return [word.strip() for word in re.split(r",(?![^()]*\))", text)]


def call_of(choice: str, text: str) -> partial[Any]:
    """Read a name of a catalogue, or a name with arguments, as a function with these."""
    # Only literals and plain words are accepted as arguments, so that nothing is executed.
    try:
        node = ast.parse(text.strip(), mode="eval").body
        positional = [literal(value) for value in node.args] if isinstance(node, ast.Call) else []
        keywords = node.keywords if isinstance(node, ast.Call) else []
        named = {word.arg: literal(word.value) for word in keywords if word.arg}
    except (SyntaxError, ValueError) as error:
        raise ConsilienceError(
            f"`{choice}` must be a name, or a name with its arguments, got {text!r}."
        ) from error

    name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    call = resolve(choice, name)
    if not isinstance(node, ast.Call) and "." in name:
        return partial(call)  # a function of the user may have no signature
    signature = inspect.signature(call)
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        wanted = signature.replace(return_annotation=inspect.Signature.empty)
        raise ConsilienceError(
            f"`{choice}` must have its arguments, as in {name}{wanted}, got {text!r}: {error}."
        ) from error
    return partial(call, *positional, **named)


def literal(node: ast.expr) -> Any:
    """Return the value of a literal, or a plain word as text."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
