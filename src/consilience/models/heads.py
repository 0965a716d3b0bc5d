"""One linear head per task on one trunk: heads are added as sources come."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.model import Forward, ForwardEach, Model, for_one
from consilience.core.params import Params, computing, matches
from consilience.core.source import LabelFrame, Source
from consilience.core.tree import Input
from consilience.models.module import ModuleModel, no_such_entry

TRUNK, HEADS, HIDDEN = "trunk.", "heads.", "hidden."
PER_TASK = (
    *("adapters.", "attention.", "biases.", "conditions.", "gates.", "heads.", "hidden.", "nets.", "own."),
    *("stitch.", "toes."),
)
"""The prefixes of entries of tasks, in all models with heads."""


class Head(NamedTuple):
    """The head of a task: weight [k, d], bias [k], and the outputs [k] that it computes."""

    task: str
    weight: Tensor
    bias: Tensor
    columns: Tensor
    hidden: tuple[tuple[Tensor, Tensor], ...] = ()
    """Weight and bias of each layer before it."""


class Heads(Model):
    """What models with one linear head per task have in common: outputs[:, columns_t] = psi_t W_t^T + b_t.

    Subclasses compute the features psi_t [B, d] of a task. Entries are `heads.<task>.weight` [k, d] and
    `heads.<task>.bias` [k]; the buffer `heads.<task>.columns` [k] has their output columns, and all other
    columns are -inf. With `norm="inf"` the rows of W_t are divided by their largest magnitude at every use,
    also in training. With `hidden` each task has ReLU layers of these widths of its own before its head, on
    psi_t: entries `hidden.<task>.<i>.weight` and `.bias`.
    """

    task_prefixes: ClassVar[tuple[str, ...]] = (HEADS, HIDDEN)
    """The prefixes of the entries of tasks in this model."""

    def __init__(self, outputs: int, norm: Literal["inf"] | None = None, hidden: Sequence[int] = ()) -> None:
        whole_number(outputs=outputs)
        for width in hidden:
            whole_number(hidden=width)
        if norm not in (None, "inf"):
            raise ConsilienceError(f"`norm` must be 'inf' or None, got {norm!r}.")
        self.outputs, self.norm, self.hidden = outputs, norm, tuple(hidden)

    @property
    def uses_task(self) -> bool:
        return True

    @property
    def form(self) -> str:
        return f"rows over their {self.norm} norm" if self.norm else ""

    def reads(self, entry: str) -> bool:
        # A module from another kind of model may have entries that this one cannot run.
        return not entry.startswith(PER_TASK) or entry.startswith(self.task_prefixes)

    def task_of(self, entry: str) -> str | None:
        # Names of tasks have no dots: the second word of an entry of a task is its task.
        return entry.split(".")[1] if entry.startswith(self.task_prefixes) else None

    def check(self, frame: LabelFrame, sample: Input, aware: bool, places: tuple[int, ...] = ()) -> None:
        # Two heads would give two logits for one class, and no rule says which counts.
        columns = [column for classes in frame.tasks.values() for column in classes]
        if not aware and len(set(columns)) < len(columns):
            raise Refusal(
                "heads that share classes need a task label or a mapper, got neither; "
                "use scenario='task' or 'class'."
            )
        super().check(frame, sample, aware, places)

    # Which heads there are.

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        # Whoever asks will write weights into the head, and they would be normalised at use.
        if self.norm:
            raise ConsilienceError(
                "a closed-form head must act as it is written, but with norm='inf' "
                "its rows are normalised; use norm=None."
            )
        present = tasks(params)
        chosen = [present_task for present_task in present if task is None or present_task == escape(task)]
        if len(chosen) != 1:
            raise ConsilienceError(f"a task label must name one of {len(present)} heads, got {task!r}.")
        return f"{HEADS}{chosen[0]}.weight", f"{HEADS}{chosen[0]}.bias"

    def head_key(self, source: Source) -> str:
        return escape(super().head_key(source))

    def heads(self, params: Params, buffers: Params, task: str | None) -> list[Head]:
        """Return the heads to evaluate: that of the task, or of all tasks for None."""
        # A task without a head has none here, and then uniform outputs.
        asked = tasks(params) if task is None else [escape(task)]
        found = [
            Head(
                name,
                params[f"{HEADS}{name}.weight"],
                params[f"{HEADS}{name}.bias"],
                buffers[f"{HEADS}{name}.columns"],
                tuple(
                    (params[f"{HIDDEN}{name}.{i}.weight"], params[f"{HIDDEN}{name}.{i}.bias"])
                    for i in range(len(self.hidden))
                ),
            )
            for name in asked
            # A received head without weights is an error, and not a task without a head.
            if f"{HEADS}{name}.weight" in params or f"{HEADS}{name}.columns" in buffers
        ]
        if len(found) > 1:
            columns = torch.cat([head.columns for head in found])
            if len(torch.unique(columns)) < len(columns):
                raise ConsilienceError(
                    "heads that share output columns need a task label, or a mapper that finds the task, "
                    f"got {len(found)} heads with common columns and no task."
                )
        return found

    def rows(self, weight: Tensor) -> Tensor:
        """Return the rows [k, d] that act for a head's weight: w_i, or w_i / ||w_i||_inf (zeros stay)."""
        if self.norm is None:
            return weight
        # A row of zeros stays zero instead of NaN.
        largest = weight.abs().amax(1, keepdim=True)
        return weight / torch.where(largest > 0, largest, torch.ones_like(largest))

    def moved(
        self, params: Params, buffers: Params, columns: Sequence[int | None], width: int
    ) -> tuple[Params, Params]:
        return params, moved_columns(buffers, columns, HEADS)

    # For subclasses.

    def _has_head(self, params: Params, buffers: Params, source: Source) -> bool:
        """Whether the source's task has a head; refuse classes that do not fit."""
        task, classes = self.head_key(source), list(source.classes)
        head = f"{HEADS}{task}"
        if f"{head}.weight" in params:
            # A later source of a task may lack classes, but a head never gets new ones.
            missing = sorted(set(classes) - set(buffers[f"{head}.columns"].tolist()))
            if missing:
                raise ConsilienceError(
                    "all sources of a task must have classes of its head, "
                    f"got class {missing[0]} in {source.name!r} of task {task!r}."
                )
            return True

        if not classes or max(classes) >= self.outputs:
            raise ConsilienceError(
                f"a source's classes must be among the {self.outputs} outputs, "
                f"got {classes} in {source.name!r}."
            )
        return False

    def _add_head(
        self,
        params: Params,
        buffers: Params,
        source: Source,
        width: int,
        like: Tensor,
        generator: torch.Generator,
    ) -> tuple[Params, Params]:
        """Add a head for the source's task, and the layers before it, uniform in +-1 / sqrt(inputs)."""
        classes, task = list(source.classes), self.head_key(source)
        new: Params = {}
        for i, units in enumerate(self.hidden):
            new |= drawn(f"{HIDDEN}{task}.{i}", units, width, generator)
            width = units
        new |= drawn(f"{HEADS}{task}", len(classes), width, generator)
        columns = torch.tensor(classes, dtype=torch.long, device=like.device)

        params = {**params, **{name: tensor.to(like) for name, tensor in new.items()}}
        return params, {**buffers, f"{HEADS}{task}.columns": columns}

    def _outputs(self, psis: Sequence[Tensor], heads: Sequence[Head]) -> Tensor:
        """Return the outputs [B, C] of heads on the features of each; -inf in the columns of no head."""
        last = [deepened(psi, head) for psi, head in zip(psis, heads, strict=True)]
        logits = [
            F.linear(as_type(psi, head.weight), self.rows(head.weight), head.bias)
            for psi, head in zip(last, heads, strict=True)
        ]
        # Heads on places [B, *places, d] answer each place; classes come before places.
        logits = [own if own.dim() == 2 else own.movedim(-1, 1) for own in logits]
        # One head is the usual case, and needs no copies.
        out, columns = logits[0], heads[0].columns
        if len(heads) > 1:
            out, columns = torch.cat(logits, 1), torch.cat([head.columns for head in heads])
        return out.new_full((len(out), self.outputs, *out.shape[2:]), -torch.inf).index_copy(1, columns, out)

    def _no_outputs(self, like: Tensor) -> Tensor:
        """Return the outputs [B, C] without any head: zeros, which are uniform probabilities."""
        return like.new_zeros(len(like), self.outputs, *like.shape[1:-1])


class MultiHead(Heads):
    """outputs[:, columns_t] = psi(x) W_t^T + b_t for the head of task t; other columns are -inf (softmax: 0).

    With task None the columns of all heads are written, as class-incremental learning needs; heads that
    share a column need a task. Before there is a head, and for a task without one, all outputs are zero:
    uniform probabilities. psi are the features [B, d] of the trunk, whose own head is not among the entries.
    Entries are `trunk.<name>`, `heads.<task>.weight` [k, d] and `heads.<task>.bias` [k]; the buffer
    `heads.<task>.columns` [k] has their output columns. With `hidden` psi passes ReLU layers of the task
    first. The name of a source without task label is its task; dots in it become underscores. A frozen trunk
    runs in eval mode. With `norm="inf"` the rows of W_t are divided by their infinity norm at use, so that
    rows of several heads are comparable.

    >>> from consilience.models import mlp
    >>> model = MultiHead(mlp(4, (8,)), outputs=10)
    >>> list(model.init(torch.Generator())[0]), model.task_of("heads.t.weight")
    (['trunk.1.weight', 'trunk.1.bias'], 't')
    """

    def __init__(
        self,
        trunk: ModuleModel,
        outputs: int,
        norm: Literal["inf"] | None = None,
        hidden: Sequence[int] = (),
    ) -> None:
        if not isinstance(trunk, ModuleModel):
            raise ConsilienceError(
                f"a trunk must be a model of one module, as models.wrap makes it, got {type(trunk).__name__}."
            )
        super().__init__(outputs, norm, hidden)
        self.trunk = trunk.body()
        self._patterns: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The catalogue's name, with the trunk's."""
        return f"multi_head({self.trunk.name})"

    @property
    def feature_space(self) -> str:
        return self.trunk.feature_space

    @property
    def has_batch_norm(self) -> bool:
        return self.trunk.has_batch_norm

    @property
    def moves_buffers(self) -> bool:
        return self.trunk.moves_buffers

    @property
    def draws(self) -> bool:
        return self.trunk.draws

    def check(self, frame: LabelFrame, sample: Input, aware: bool, places: tuple[int, ...] = ()) -> None:
        with self.trunk.watched():
            super().check(frame, sample, aware, places)

    def check_outputs(self, out: object, samples: int, places: tuple[int, ...]) -> None:
        self.trunk.check_head()
        super().check_outputs(out, samples, places)

    def probe(self, params: Params, buffers: Params, x: Input) -> None:
        self.trunk.probe(trunk_entries(params), trunk_entries(buffers), x)

    def __repr__(self) -> str:
        deep = f", hidden={self.hidden}" if self.hidden else ""
        return f"multi_head({self.trunk!r}, {self.outputs}{', norm=inf' if self.norm else ''}{deep})"

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = self.trunk.init(generator)
        return _prefixed(params), _prefixed(buffers)

    def __call__(
        self, params: Params, buffers: Params, x: Input, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        # This class's own rule: a subclass may make several tasks out of one.
        (out,), buffers = MultiHead.each(self, params, buffers, x, (task,), train)
        return out, buffers

    def each(
        self, params: Params, buffers: Params, x: Input, tasks: Sequence[str | None], train: bool
    ) -> tuple[list[Tensor], Params]:
        psi, updated = self.trunk(trunk_entries(params), trunk_entries(buffers), x, None, train)
        found = [self._common_outputs(psi, self.heads(params, buffers, task)) for task in tasks]
        return found, {**buffers, **_prefixed(updated)} if train else buffers

    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        psi = self.trunk.features(trunk_entries(params), trunk_entries(buffers), x)
        # Layers of a task are before its head; features without a task are common to all.
        heads = self.heads(params, buffers, task) if task is not None and self.hidden else []
        return deepened(psi, heads[0]) if heads else psi

    def from_features(self, params: Params, buffers: Params, psi: Tensor, task: str | None) -> Tensor | None:
        # The mean over places does not say what each place is.
        if self.trunk.at_places:
            return None
        return self._common_outputs(psi, self.heads(params, buffers, task))

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        return for_one(MultiHead.bind_each(self, params, buffers, train))

    @property
    def passes_features(self) -> bool:
        return True

    def bind_each(
        self, params: Params, buffers: Params, train: bool, through: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[ForwardEach, Params]:
        trunk, updated = self.trunk.bind(trunk_entries(params), trunk_entries(buffers), train)
        columns = {name: tensor.clone() for name, tensor in buffers.items() if name.startswith(HEADS)}
        held = {**columns, **_prefixed(updated)}
        # To find heads reads the values of columns, which is too slow for every step.
        found: dict[str | None, list[Head]] = {}

        def forward(x: Input, tasks: tuple[str | None, ...]) -> list[Tensor]:
            for task in tasks:
                if task not in found:
                    found[task] = self.heads(params, held, task)
            psi = trunk(x, None)
            psis = [psi if through is None else through(psi) for _ in tasks]
            return [self._common_outputs(own, found[task]) for own, task in zip(psis, tasks, strict=True)]

        return forward, held

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Add a head for the source's task, uniform in +-1 / sqrt(d), if it has none."""
        if self._has_head(params, buffers, source):
            return params, buffers
        # A head is where its trunk is, in a type to compute with, which a frozen trunk's may not be.
        like = computing(trunk_entries(params))
        return self._add_head(params, buffers, source, self.trunk.width, like, generator)

    def frozen(self, entry: str) -> bool:
        if entry.startswith(TRUNK):
            return self.trunk.frozen(entry[len(TRUNK) :])
        return matches(entry, self._patterns)

    def derived(self, buffer: str) -> bool:
        return buffer.startswith(TRUNK) and self.trunk.derived(buffer[len(TRUNK) :])

    def freeze(self, patterns: Sequence[str]) -> Self:
        """Return the same model with the entries that match these patterns frozen too."""
        other = copy.copy(self)
        names = [name for name in self.trunk.entries if matches(TRUNK + name, patterns)]
        for pattern in patterns:
            # Entries of tasks may come later.
            later = pattern == "*" or pattern.startswith(self.task_prefixes)
            if not later and not any(matches(TRUNK + name, [pattern]) for name in names):
                raise no_such_entry(pattern, repr(self))
        other.trunk = self.trunk.freeze(names)
        other._patterns = (*self._patterns, *patterns)
        return other

    def _common_outputs(self, psi: Tensor, heads: Sequence[Head]) -> Tensor:
        """Return the outputs [B, C] of these heads on the same features, zero without any."""
        return self._outputs([psi] * len(heads), heads) if heads else self._no_outputs(psi)


def moved_columns(buffers: Params, columns: Sequence[int | None], prefix: str) -> Params:
    """Return buffers in which the columns of tasks [k] are those to which they move: i becomes columns[i]."""
    changed = dict(buffers)
    for name, own in buffers.items():
        if not (name.startswith(prefix) and (prefix != HEADS or name.endswith(".columns"))):
            continue
        places = [columns[column] if column < len(columns) else None for column in own.tolist()]
        if None in places:
            raise ConsilienceError(
                f"a head must answer with columns that have a label in the schedule, got column "
                f"{own.tolist()[places.index(None)]} of {len(columns)} labels in {name!r}; say what they "
                "mean with `labels=` (`Result.labels`), and give sources that declare them."
            )
        changed[name] = torch.tensor(places, dtype=own.dtype, device=own.device)
    return changed


def as_type(h: Tensor, weight: Tensor) -> Tensor:
    """Return activations in the type of a weight that acts on them, unless autocast chooses the types."""
    if h.dtype == weight.dtype or torch.is_autocast_enabled(h.device.type):
        return h
    return h.to(weight.dtype)


def drawn(name: str, outputs: int, inputs: int, generator: torch.Generator) -> Params:
    """Return the weight [outputs, inputs] and bias [outputs] of a layer, uniform in +-1 / sqrt(inputs)."""
    bound = max(inputs, 1) ** -0.5
    weight = (2 * torch.rand(outputs, inputs, generator=generator) - 1) * bound
    return {
        f"{name}.weight": weight,
        f"{name}.bias": (2 * torch.rand(outputs, generator=generator) - 1) * bound,
    }


def deepened(psi: Tensor, head: Head) -> Tensor:
    """Return features [B, (*places,) d] after the ReLU layers of a head."""
    for weight, bias in head.hidden:
        psi = F.linear(as_type(psi, weight), weight, bias).relu()
    return psi


def escape(task: str) -> str:
    """Return a task's name as it is in the names of entries.

    >>> escape("digits/v1.5-a")
    'digits/v1_5-a'
    """
    return task.replace(".", "_")


def tasks(params: Params) -> list[str]:
    """Return the tasks that have heads, in the order of their names."""
    return sorted(
        name[len(HEADS) : -len(".weight")]
        for name in params
        if name.startswith(HEADS) and name.endswith(".weight")
    )


def trunk_entries(tensors: Params) -> Params:
    """Return the entries of the trunk, under the names that the trunk has for them."""
    return {name[len(TRUNK) :]: tensor for name, tensor in tensors.items() if name.startswith(TRUNK)}


def _prefixed(tensors: Params) -> Params:
    """Return entries of the trunk under the names that the model has for them."""
    return {TRUNK + name: tensor for name, tensor in tensors.items()}
