"""Models: pure functions of parameters and buffers.

What whoever receives parameters must run is a Model; what only the learner does is a Correction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.core.augment import States, isolated
from consilience.core.errors import ConsilienceError
from consilience.core.params import Params, computing, content_hash, same
from consilience.core.source import LabelFrame, Source, trimmed
from consilience.core.traits import Traits, traits_of
from consilience.core.tree import Input, Tree, cast_to, named
from consilience.core.warning import warn

Forward = Callable[[Input, str | None], Tensor]
"""(x, task) -> outputs."""

ForwardEach = Callable[[Input, tuple[str | None, ...]], list[Tensor]]
"""(x, tasks) -> the outputs for each task."""


def for_one(bound: tuple[ForwardEach, Params]) -> tuple[Forward, Params]:
    """Return what `bind` does, from what `bind_each` returned."""
    each, held = bound
    return lambda x, task: each(x, (task,))[0], held


MISFITS = (RuntimeError, ValueError, IndexError, TypeError)
"""What torch raises where inputs do not fit a module."""


class Sharing(NamedTuple):
    """The weights by which a model mixes parts for a task."""

    parts: tuple[str, ...]
    """What is mixed: experts, networks of tasks, layers."""
    weights: Tensor
    """[B, parts], one row per sample, or one row for all."""
    probabilities: bool
    """Whether each row sums to 1, so that it has an entropy."""


class Model(ABC):
    """(params, buffers, x [B, ...], task, train) -> (outputs [B, C, *places], new buffers).

    x is a tensor, or a `Tree` of several. Places are where a sample has several targets: tokens, pixels.
    Entries are named tensors. An entry is frozen (`frozen`), belongs to one task (`task_of`), or is shared by
    all. Frozen entries never change, and their hash names the backbone; those of `init`, and derived buffers
    (`derived`), are held once for all agents, and are in no message and no checkpoint. `grow` adds entries
    and never changes a shape.
    """

    outputs: int
    """The number C of output columns."""

    earlier: int = 0
    """How many earlier answers come behind the last ones, for losses of their own: outputs are then
    C = outputs / (1 + earlier) columns of answers, and C columns of each earlier one."""

    traits = Traits()
    """What `probe` has found in training mode."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        # A class that computes something else for one task does so for several, unless it says how.
        rules = {"__call__": ("each",), "bind": ("bind_each", "passes_features")}
        for one, several in rules.items():
            if one in vars(cls) and several[0] not in vars(cls):
                for name in several:
                    setattr(cls, name, vars(Model)[name])

    @abstractmethod
    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        """Return the first parameters and buffers, drawn from the generator alone.

        Frozen entries that do not depend on it may be the same tensors in every call: nobody changes them.
        """

    @abstractmethod
    def __call__(
        self, params: Params, buffers: Params, x: Input, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        """Return the outputs [B, C, *places] and the new buffers; it changes none of its arguments."""

    @abstractmethod
    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        """Return the inputs of the head [B, d], in eval mode."""

    def from_features(self, params: Params, buffers: Params, psi: Tensor, task: str | None) -> Tensor | None:
        """Return the outputs [B, C] in eval mode for features psi [B, d]; None if these do not suffice.

        psi are `features` without a task.
        """
        return None

    @abstractmethod
    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        """Return a fast (x, task) -> outputs over these tensors, and the buffers that it updates in place."""

    # Several tasks on the same inputs. A model that computes something alike for all of them does it once.

    def each(
        self, params: Params, buffers: Params, x: Input, tasks: Sequence[str | None], train: bool
    ) -> tuple[list[Tensor], Params]:
        """Return the outputs [B, C, *places] for each task, and the new buffers."""
        found = []
        for task in tasks:
            out, buffers = self(params, buffers, x, task, train)
            found.append(out)
        return found, buffers

    @property
    def passes_features(self) -> bool:
        """Whether `bind_each` passes features through a function: the inputs of all heads, for all tasks."""
        return False

    def bind_each(
        self, params: Params, buffers: Params, train: bool, through: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[ForwardEach, Params]:
        """Return what `bind` does, for several tasks at once.

        Features [B, ..., d] go through a function before a head gets them, where `passes_features`: once for
        each task with a head of its own, else once for all.
        """
        forward, held = self.bind(params, buffers, train)
        return lambda x, tasks: [forward(x, task) for task in tasks], held

    def sharing(self, params: Params, buffers: Params, x: Input, task: str) -> dict[str, Sharing]:
        """Return how a task with entries mixes what tasks share, by place; {} where nothing is mixed."""
        return {}

    # The head and what grows.

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        """Return the names of the linear head's weight [C, d] and bias [C], or None for a missing bias."""
        raise ConsilienceError(
            f"a closed-form head needs a model with one linear head, got {type(self).__name__}."
        )

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Return parameters and buffers with the entries that a new source needs."""
        return params, buffers

    def head_key(self, source: Source) -> str:
        """Return the task name in the names of this source's own entries."""
        return source.task or source.name

    # What an entry is.

    def task_of(self, entry: str) -> str | None:
        """Return the task that an entry belongs to, or None if it is shared."""
        return None

    def shared(self, entry: str) -> bool:
        """Whether the losses of several tasks may reach an entry, so that step aggregators combine them.

        An entry that belongs to a task is reached by others where networks of tasks read one another.
        """
        return self.task_of(entry) is None

    def frozen(self, entry: str) -> bool:
        """Whether an entry never changes."""
        return False

    def derived(self, buffer: str) -> bool:
        """Whether the model makes a buffer itself, the same in every agent, and never changes it for good.

        Position ids are such a buffer, and the statistics of a frozen norm.
        """
        return False

    def reads(self, entry: str) -> bool:
        """Whether this model runs an entry of a received module."""
        return True

    # State dicts, as users have them.

    def state_dict(self, params: Params, buffers: Params) -> Params:
        """Return entries and buffers under all names that a state dict of the model has for them."""
        return {**params, **buffers}

    def entries_of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state dict with each tied entry once, under the name that the model has for it."""
        return dict(state)

    def moved(
        self, params: Params, buffers: Params, columns: Sequence[int | None], width: int
    ) -> tuple[Params, Params]:
        """Return entries and buffers with output i at `columns[i]`; the same objects where nothing moves.

        None stands for an output that those who ask have no column for: it goes behind their `width` columns.
        Raises ConsilienceError where outputs cannot be moved.
        """
        if stay(columns, width):
            return params, buffers
        raise ConsilienceError(
            f"outputs can be put into other columns only in a model with a linear head, got {self!r:.80}; "
            "train in the columns of the schedule's `frame`."
        )

    # What experts must have in common.

    @property
    def form(self) -> str:
        """A name for how entries act, where models of another form have entries of the same names."""
        return ""

    @property
    def feature_space(self) -> str:
        """The hash of all that features depend on; "" where some of it is trained, or drawn by a seed."""
        return ""

    def backbone(self, params: Params) -> str:
        """Return the content hash of the frozen entries; "" without any."""
        frozen = {name: tensor for name, tensor in params.items() if self.frozen(name)}
        return content_hash(frozen) if frozen else ""

    # What engines must know.

    @property
    def uses_task(self) -> bool:
        """Whether the outputs depend on the task that the model is given."""
        return False

    @property
    def reads_others(self) -> bool:
        """Whether the outputs for a task depend on entries that belong to other tasks."""
        return False

    @property
    def has_batch_norm(self) -> bool:
        """Whether outputs of a sample in training depend on the others of its batch."""
        return self.traits.mixes

    @property
    def moves_buffers(self) -> bool:
        """Whether training changes buffers, such as running statistics."""
        return self.traits.moves

    @property
    def tried(self) -> tuple[object, ...]:
        """What parts of a method may ask about and `check` may change: all that only a trial shows."""
        return (self.moves_buffers,)

    @property
    def draws(self) -> bool:
        """Whether its training forward draws random numbers (dropout). They are then keyed at every step."""
        return self.traits.draws

    def check(self, frame: LabelFrame, sample: Input, aware: bool, places: tuple[int, ...] = ()) -> None:
        """Refuse inputs that do not fit, or outputs of another form, before training; and `probe` the rest.

        `sample` has one example or two, `aware` says whether the model will be given tasks, and `places` are
        those of the targets.
        """
        params, buffers = self.init(torch.Generator().manual_seed(0))
        for name, tensor in params.items():
            if tensor.is_complex() and not self.frozen(name):
                raise ConsilienceError(
                    f"parameters must be real numbers, got {tensor.dtype} in {name!r}; keep "
                    "torch.view_as_real of it, and make it complex in `forward`."
                )

        # Frozen entries may have a shorter type than those that compute.
        dtype = computing(params).dtype
        ready = cast_to(sample, sample.device, dtype)
        given = ready.clone()
        try:
            with torch.no_grad(), isolated():
                before = States.now()
                out, _ = self(params, buffers, ready, None, False)
                drew = not before.unchanged()
        except MISFITS as error:
            raise misfit(sample, error) from error
        if drew:
            warn(
                "the model draws random numbers in eval mode too, so that its predictions differ from call "
                "to call; give functions such as F.dropout `training=self.training`"
            )
        self.check_outputs(out, len(sample), places)
        if self.outputs < len(frame.labels):
            unused = frame.unused()
            hint = " (data sets share classes only where they share their `space`)"
            if unused:
                space, name = unused[0]
                others = f" ({len(unused)} classes do not)" * (len(unused) > 1)
                hint = (
                    f"; {name!r} of {space!r} occurs in no source{others}: number classes from 0, declare "
                    "only those that there are, or give the model their outputs"
                )
            raise ConsilienceError(
                f"the model must have an output for each of the {len(frame.labels)} classes, "
                f"got {self.outputs} outputs{hint}."
            )
        if len(places) == 1 and out.shape[1] == out.shape[2]:
            self._check_order(params, buffers, ready)

        try:
            self.probe(params, buffers, ready)
        except MISFITS as error:
            raise misfit(sample, error, " in training mode") from error
        if not same(named("x", given), named("x", ready)):
            raise ConsilienceError(
                f"a model must leave its inputs as they are, and {type(self).__name__} changes them; "
                "let it change a copy."
            )

    def probe(self, params: Params, buffers: Params, x: Input) -> None:
        """Find the `traits`, which structure does not show: functions may drop units, or use a batch's mean.

        `x` has one sample or two. It raises what the model raises, and a model finds its traits once.
        """
        found = traits_of(lambda batch: self(params, buffers, batch, None, True), buffers, x)
        if not found.repeats and self.traits.repeats:
            warn(
                "the model's outputs in training differ between two calls with equal inputs, buffers and "
                "random states, so that equal seeds give other numbers, and a resumed run ends elsewhere; "
                "draw from the global random state of torch, and keep state in registered buffers"
            )
        self.traits |= found

        # What uses the mean of a batch may do so in eval mode too, if it keeps none.
        if found.mixes and found.repeats and not found.moves:
            seen = traits_of(lambda batch: self(params, buffers, batch, None, False), buffers, x)
            if seen.mixes and seen.repeats:
                warn(
                    "the model's predictions depend on the other samples of their batch; use running "
                    "statistics in eval mode"
                )

    def check_outputs(self, out: object, samples: int, places: tuple[int, ...]) -> None:
        """Refuse outputs that are not a tensor [B, C, *places], with the places of the targets."""
        wanted = f"outputs [B, {self.outputs}{', *places' * bool(places)}]"
        remedy = "say how many with models.wrap(module, outputs=...)"
        if not isinstance(out, Tensor):
            raise ConsilienceError(f"a model must return {wanted}, got {type(out).__name__}.")
        # Heads cast features to their own type, and would read token ids as such.
        if not out.is_floating_point():
            raise ConsilienceError(
                f"a model must return fractions, got {out.dtype}; token ids need an embedding before a head, "
                "and classes their scores."
            )
        # More outputs than said would have columns that nothing names.
        if tuple(out.shape) != (samples, self.outputs, *places):
            got = ["B", *out.shape[1:]] if out.dim() and len(out) == samples else list(out.shape)
            if places and out.dim() == 2 + len(places) and out.shape[1] == self.outputs:
                remedy = f"targets have the places [{', '.join(map(str, places))}]"
            elif places and out.dim() == 2 + len(places) and out.shape[-1] == self.outputs:
                remedy = "move the classes to dimension 1, as in out.transpose(1, 2)"
            elif places and out.dim() == 2:
                remedy = f'targets have {len(places)} dimensions of places; several labels are kind="labels"'
            raise ConsilienceError(
                f"a model must return {wanted}, got [{', '.join(map(str, got))}]; {remedy}."
            )

    def _check_order(self, params: Params, buffers: Params, x: Input) -> None:
        """Refuse outputs [B, T, C] with as many places as classes: only another length shows them."""
        # Not all modules take another length, and then nothing can be said.
        try:
            with torch.no_grad():
                out, _ = self(params, buffers, _shorter(x), None, False)
        except MISFITS:
            return
        if out.dim() == 3 and out.shape[1] != self.outputs:
            raise ConsilienceError(
                f"a model must return outputs [B, {self.outputs}, *places], got the places first; "
                "move the classes to dimension 1, as in out.transpose(1, 2)."
            )


def without_shared_head(model: Model) -> str | None:
    """Return why a head for all sources cannot be solved for a model, and what to use; None if it can."""
    # A model says whether it has one by refusing to name it.
    try:
        model.head(model.init(torch.Generator().manual_seed(0))[0], None)
    except ConsilienceError:
        return (
            "it solves one linear head that all sources share, and this model has none; use models.mlp or "
            "models.linear"
        )
    return None


def in_columns(
    model: Model,
    entries: tuple[Params, Params],
    columns: Sequence[int | None],
    width: int,
    source: Source,
    whose: str,
) -> tuple[Params, Params]:
    """Return parameters and buffers with their outputs at other columns, as `Model.moved` puts them.

    Raises ConsilienceError where the outputs for an example of the source do not move with the head.
    """
    if all(column is None for column in columns):
        raise ConsilienceError(
            f"{whose} must have classes of the schedule, got outputs for none of them; say what they mean "
            "with `labels=` (`Result.labels`), or give sources of its classes."
        )
    try:
        moved = model.moved(*entries, columns, width)
    except ConsilienceError as error:
        raise ConsilienceError(f"{whose} has its classes in other columns: {error}") from error
    if moved[0] is entries[0]:
        return moved

    # What a module does after its head may mix columns, and nothing says so but an example.
    x = trimmed(*source.train.first(2))[0]
    x = cast_to(x, next(iter(entries[0].values())).device, computing(entries[0]).dtype)
    with torch.no_grad():
        before, after = (model(*held, x, None, False)[0] for held in (entries, moved))
    known = [(i, column) for i, column in enumerate(columns) if column is not None]
    first, then = ([pair[side] for pair in known] for side in (0, 1))
    if not torch.allclose(before[:, first], after[:, then], rtol=1e-4, atol=1e-5):
        raise ConsilienceError(
            f"{whose} has its classes in other columns, and its outputs are not those of the linear head; "
            "name the `head` in models.wrap, or train in the columns of the schedule's `frame`."
        )
    return moved


def stay(columns: Sequence[int | None], width: int) -> bool:
    """Whether outputs i at `columns[i]` stay where they are; None is behind `width`."""
    return all(column == i or (column is None and i >= width) for i, column in enumerate(columns))


def _shorter(x: Input) -> Input:
    """Return inputs [B, T, ...] with one place less."""
    if isinstance(x, Tensor):
        return x[:, :-1]
    if x.lengths is None:
        return x.map(lambda part: part[:, :-1])
    return replace(x, lengths=x.lengths - 1).trim()


def misfit(sample: Input, error: Exception, when: str = "") -> ConsilienceError:
    """Return the error for samples that a model does not take; `when` says in which mode."""
    # Our own errors say more than their first line.
    if isinstance(error, ConsilienceError):
        return error
    shape = ", ".join(sample.parts) if isinstance(sample, Tree) else tuple(sample.shape[1:])
    line = (str(error) or type(error).__name__).splitlines()[0]
    return ConsilienceError(
        f"samples must fit the model's input{when}, got {shape}: {line}{_hint(sample, line)}."
    )


def _hint(sample: Input, line: str) -> str:
    """Return what may help where a model does not take its inputs."""
    if isinstance(sample, Tree) and "unexpected keyword argument" in line:
        return "; leave that part out, or name the parts as `forward` does"
    if "index out of range" in line and not sample.is_floating_point():
        return "; whole numbers such as token ids must be below the number of rows of the embedding"
    # Layers of weights say that two types differ, embeddings that they need whole numbers.
    words = ("dtype", "same type", "scalar type", "type Long", "Input type")
    if any(word in line for word in words):
        kind = "fractions" if sample.is_floating_point() else "whole numbers"
        return f"; the inputs are {kind}: give pixels in [0, 1] as fractions, and tokens as whole numbers"
    return ""
