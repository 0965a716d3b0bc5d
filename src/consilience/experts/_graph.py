"""A module that computes a list of operations: what a file of another format describes, without code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consilience.core.errors import ConsilienceError
from consilience.core.model import MISFITS
from consilience.core.params import key


class Ref(NamedTuple):
    """The value of a name, in the place of an argument."""

    name: str


class Step(NamedTuple):
    """One operation: outputs = call(*args, **kwargs)."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A computation that was read from a file."""

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    output: str
    tensors: Mapping[str, Tensor]
    """The constants, by the name that steps have for them."""
    entries: Mapping[str, str]
    """The names of parameters in a state dict, by the name that steps have for them; others are buffers."""
    shape: tuple[int, ...] | None
    """The shape of one sample; None where the file leaves it open, or there are several inputs."""
    dtype: torch.dtype
    """Of the first input."""
    batch: int | None
    """The number of samples that it was written for; None for any."""


def refs(value: Any) -> set[str]:
    """Return the names that an argument refers to.

    >>> sorted(refs([Ref("a"), (1, Ref("b"))]))
    ['a', 'b']
    """
    if isinstance(value, Ref):
        return {value.name}
    if isinstance(value, list | tuple):
        return {name for inner in value for name in refs(inner)}
    return set()


def read_by(step: Step) -> set[str]:
    """Return the names that a step reads."""
    return refs(list(step.args)) | refs(list(step.kwargs.values()))


def filled(value: Any, values: Mapping[str, Any]) -> Any:
    """Return an argument with the values of its names."""
    if isinstance(value, Ref):
        return values[value.name]
    # Named tuples are settings, and hold no values of names.
    if type(value) in (list, tuple):
        return type(value)(filled(inner, values) for inner in value)
    return value


class Graph(nn.Module):
    """x [B, ...] -> the output of a program [B, C].

    Constants with fractions are parameters, the others buffers. A program that was written for one number of
    samples answers that many at a time; the last ones are repeated where some are missing.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.steps, self.inputs, self.output = program.steps, program.inputs, program.output
        self.batch = program.batch
        self.entries = nn.Module()
        # Names in files may be anything; those of a module have no dots, and hide none of its methods.
        self.places: dict[str, str] = {}
        for name, tensor in program.tensors.items():
            place = program.entries.get(name, name).replace(".", "/")
            while hasattr(self.entries, place) or not place:
                place = f"/{place}"
            self.places[name] = place
            if name in program.entries and tensor.is_floating_point():
                self.entries.register_parameter(place, nn.Parameter(tensor))
            else:
                self.entries.register_buffer(place, tensor)

        # A value is freed after the last step that reads it.
        self.dead: list[set[str]] = []
        alive = {self.output}
        for step in reversed(self.steps):
            read = read_by(step)
            self.dead.append((read | set(step.outputs)) - alive)
            alive |= read
        self.dead.reverse()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        # Inputs come by place or by name, as parts of a tree do.
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        if given.keys() != set(self.inputs):
            raise ValueError(f"inputs must be {', '.join(self.inputs)}, got {', '.join(given)}.")
        count = len(next(iter(given.values())))
        if self.batch is None or count == self.batch:
            return self._compute(given)

        outs = []
        for first in range(0, count, self.batch):
            rows = torch.arange(first, first + self.batch).clamp(max=count - 1)
            outs.append(self._compute({name: x[rows.to(x.device)] for name, x in given.items()}))
        return torch.cat(outs)[:count]

    def _compute(self, given: Mapping[str, Tensor]) -> Tensor:
        """Return the output for as many samples as one computation takes."""
        values: dict[str, Any] = dict(given)
        values |= {name: getattr(self.entries, place) for name, place in self.places.items()}
        for step, dead in zip(self.steps, self.dead, strict=True):
            kwargs = {name: filled(value, values) for name, value in step.kwargs.items()}
            found = step.call(*(filled(value, values) for value in step.args), **kwargs)
            several = found if isinstance(found, tuple | list) else (found,)
            values |= dict(zip(step.outputs, several, strict=False))
            for name in dead:
                values.pop(name, None)
        out: Tensor = values[self.output]
        return out


def graph_of(program: Program, name: str) -> Graph:
    """Return the module of a program that gives one row of logits [B, C] per sample.

    Raises ConsilienceError, with the expert's name, for a program that fails, or gives anything else.
    """
    # Found here, a missing value is named; found in a forward pass, it would be a KeyError.
    known = {*program.inputs, *program.tensors}
    for step in program.steps:
        missing = read_by(step) - known
        if missing:
            raise ConsilienceError(
                f"the file of expert {name!r} must be a complete model, got no value called {min(missing)!r}."
            )
        known |= set(step.outputs)

    module = Graph(program).eval()
    if program.shape is None:
        return module

    # What it answers to random inputs shows what it is.
    own = program.batch or 3
    x = sample_inputs(program, own)
    try:
        with torch.no_grad():
            out = module(x)
    except MISFITS as error:
        reason = str(error).partition("\n")[0]
        raise ConsilienceError(
            f"the file of expert {name!r} must be a complete model, got an operation that fails: "
            f"{reason:.200}."
        ) from error
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != own or not out.is_floating_point():
        got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ConsilienceError(
            f"expert {name!r} must give logits [B, classes] of inputs [B, ...], got {got} for {own} inputs; "
            "export the model without what comes after its last layer."
        )
    if program.batch is not None and _takes_any(module, program):
        module.batch = None
    return module


def sample_inputs(program: Program, count: int) -> Tensor:
    """Return random inputs [count, ...] of a program's type."""
    assert program.shape is not None
    if program.dtype.is_floating_point:
        return torch.rand(count, *program.shape, generator=key("sample inputs")).to(program.dtype)
    return torch.zeros(count, *program.shape, dtype=program.dtype)


def _takes_any(module: Graph, program: Program) -> bool:
    """Whether a program for a fixed number of samples answers any number as it answers that one."""
    # Most programs have their number of samples in no operation, and chunks of one sample are slow.
    if not program.dtype.is_floating_point:
        return False
    x = sample_inputs(program, 2 * (program.batch or 1) + 1)
    with torch.no_grad():
        chunked, fixed = module(x), module.batch
        module.batch = None
        try:
            together = module(x)
        except MISFITS:
            return False
        finally:
            module.batch = fixed
    return together.shape == chunked.shape and torch.allclose(together, chunked, rtol=1e-4, atol=1e-5)


def trimmed_output(steps: Sequence[Step], output: str, last: Callable[[Step], bool]) -> str:
    """Return the name of the logits: the input of the last step, where that step makes probabilities.

    >>> steps = [Step(torch.relu, (Ref("x"),), {}, ("z",)), Step(torch.sigmoid, (Ref("z"),), {}, ("p",))]
    >>> trimmed_output(steps, "p", lambda step: step.call is torch.sigmoid)
    'z'
    """
    for step in steps:
        if output in step.outputs and last(step):
            (name,) = read_by(step)
            return name
    return output


def used(steps: Sequence[Step], output: str) -> tuple[Step, ...]:
    """Return the steps that an output needs."""
    needed, kept = {output}, []
    for step in reversed(steps):
        if needed.intersection(step.outputs):
            kept.append(step)
            needed |= read_by(step)
    return tuple(reversed(kept))
