"""One linear head for each task on one trunk: heads are added as sources come."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.model import Forward, Model
from consilience.core.params import Params, matches
from consilience.core.source import LabelFrame, Source
from consilience.models.module import ModuleModel

TRUNK, HEADS = "trunk.", "heads."
PER_TASK = ("adapters.", "biases.", "heads.", "toes.")
"""How the names of entries of tasks begin, in all models with heads."""


class Head(NamedTuple):
    """The head of a task: weight [k, d], bias [k], and which outputs [k] are its."""

    task: str
    weight: Tensor
    bias: Tensor
    columns: Tensor


class Heads(Model):
    """What models with a linear head for each task have in common: outputs[:, columns_t] = psi_t W_t^T + b_t.

    Subclasses say what the features psi_t [B, d] of a task are. Entries are `heads.<task>.weight` [k, d] and
    `heads.<task>.bias` [k]; the buffer `heads.<task>.columns` [k] says which outputs they are, and all others are -inf.
    With `norm="inf"` the rows of W_t are divided by their largest magnitude at every use, also in training.
    """

    own: ClassVar[tuple[str, ...]] = (HEADS,)

    def __init__(self, outputs: int, norm: Literal["inf"] | None = None) -> None:
        if outputs < 1:
            raise ConsilienceError(f"`outputs` should be at least 1. Found `outputs = {outputs}`.")
        if norm not in (None, "inf"):
            raise ConsilienceError(f"`norm` should be 'inf' or None. Found `norm = {norm!r}`.")
        self.outputs, self.norm = outputs, norm

    @property
    def uses_task(self) -> bool:
        return True

    @property
    def form(self) -> str:
        return f"rows over their {self.norm} norm" if self.norm else ""

    def reads(self, entry: str) -> bool:
        return not entry.startswith(PER_TASK) or entry.startswith(self.own)

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        if self.norm:
            raise ConsilienceError(
                "a head that is written should act as it stands. Found one whose rows are normalised."
            )
        keys = tasks(params)
        chosen = [k for k in keys if task is None or k == escape(task)]
        if len(chosen) != 1:
            raise ConsilienceError(
                f"a task label should say which head is meant. Found {task!r} and {len(keys)} heads."
            )
        return f"{HEADS}{chosen[0]}.weight", f"{HEADS}{chosen[0]}.bias"

    def head_key(self, source: Source) -> str:
        return escape(super().head_key(source))

    def check(self, frame: LabelFrame, sample: Tensor, aware: bool) -> None:
        if frame.kind == "value":
            raise ConsilienceError(
                "heads of classes need targets that are classes. Found values; use mlp or wrap."
            )
        columns = [c for classes in frame.tasks.values() for c in classes]
        if not aware and len(set(columns)) < len(columns):
            raise Refusal(
                "heads that share classes need a task label or a mapper. Found neither; use scenario='task' or 'class'."
            )
        super().check(frame, sample, aware)

    def task_of(self, entry: str) -> str | None:
        return entry[len(HEADS) :].rpartition(".")[0] if entry.startswith(HEADS) else None

    def _grow(
        self,
        params: Params,
        buffers: Params,
        source: Source,
        width: int,
        like: Tensor,
        generator: torch.Generator,
    ) -> tuple[Params, Params]:
        """With a head [k, width] for the source's task, uniform in +-1 / sqrt(width)."""
        task, classes = self.head_key(source), list(source.classes)
        at, bound = f"{HEADS}{task}", max(width, 1) ** -0.5
        weight = (2 * torch.rand(len(classes), width, generator=generator) - 1) * bound
        bias = (2 * torch.rand(len(classes), generator=generator) - 1) * bound
        columns = torch.tensor(classes, dtype=torch.long, device=like.device)
        return {**params, f"{at}.weight": weight.to(like), f"{at}.bias": bias.to(like)}, {
            **buffers,
            f"{at}.columns": columns,
        }

    def _has(self, params: Params, buffers: Params, source: Source) -> bool:
        """Whether the source's task has its head; refuses classes that do not fit."""
        task, classes = self.head_key(source), list(source.classes)
        at = f"{HEADS}{task}"
        if f"{at}.weight" in params:
            missing = sorted(set(classes) - set(buffers[f"{at}.columns"].tolist()))
            if missing:
                raise ConsilienceError(
                    f"sources of one task should have its head's classes. Found {missing[0]} in {source.name!r} of task {task!r}."
                )
            return True
        if not classes or max(classes) >= self.outputs:
            raise ConsilienceError(
                f"a source's classes should be among the {self.outputs} outputs. Found {classes} in {source.name!r}."
            )
        return False

    def _heads(self, params: Params, buffers: Params, task: str | None) -> list[Head]:
        """The heads to evaluate."""
        keys = tasks(params) if task is None else [escape(task)]
        found = [
            Head(k, params[f"{HEADS}{k}.weight"], params[f"{HEADS}{k}.bias"], buffers[f"{HEADS}{k}.columns"])
            for k in keys
            if f"{HEADS}{k}.weight" in params
        ]
        if len(found) > 1:
            columns = torch.cat([h.columns for h in found])
            if len(torch.unique(columns)) < len(columns):
                raise ConsilienceError(
                    f"heads that share output columns need a task label, or a mapper that finds the task. Found {len(found)} "
                    "heads with columns in common and no task."
                )
        return found

    def _write(self, psis: Sequence[Tensor], heads: Sequence[Head]) -> Tensor:
        """The outputs [B, C] of these heads on the features of each, -inf in the columns of no head."""
        logits = [F.linear(psi, self.rows(h.weight), h.bias) for psi, h in zip(psis, heads, strict=True)]
        out, where = (logits[0], heads[0].columns)
        if len(heads) > 1:
            out, where = torch.cat(logits, 1), torch.cat([h.columns for h in heads])
        return out.new_full((len(out), self.outputs), -torch.inf).index_copy(1, where, out)

    def rows(self, weight: Tensor) -> Tensor:
        """The rows [k, d] that act for a head's weight: as they are, or w_i / ||w_i||_inf (a row of zeros stays)."""
        if self.norm is None:
            return weight
        largest = weight.abs().amax(1, keepdim=True)
        return weight / torch.where(largest > 0, largest, torch.ones_like(largest))

    def _nothing(self, like: Tensor) -> Tensor:
        """The outputs [B, C] where there is no head."""
        return like.new_zeros(len(like), self.outputs)


class MultiHead(Heads):
    """outputs[:, columns_t] = psi(x) W_t^T + b_t for the head of task t; the other columns are -inf, which softmax takes as 0.

    With task None the columns of all heads are written, as class-incremental learning wants; heads that share a column
    need a task. Before there is any head, and for a task that has none, all outputs are zero: uniform probabilities.
    psi are the features [B, d] of the trunk, whose own head is not among the entries. Entries are `trunk.<name>`,
    `heads.<task>.weight` [k, d] and `heads.<task>.bias` [k]; the buffer `heads.<task>.columns` [k] says which outputs they
    are. A source without task label has its name for a task; dots in it become underscores. A frozen trunk runs in eval mode.
    With `norm="inf"` W_t acts with its rows divided by their infinity norm, so that rows of several heads can stand together.

    >>> from consilience.models import mlp
    >>> model = MultiHead(mlp(4, (8,)), outputs=10)
    >>> list(model.init(torch.Generator())[0]), model.task_of("heads.t.weight")
    (['trunk.1.weight', 'trunk.1.bias'], 't')
    """

    own: ClassVar[tuple[str, ...]] = (HEADS,)
    """How the names of the entries of tasks begin."""

    def __init__(self, trunk: ModuleModel, outputs: int, norm: Literal["inf"] | None = None) -> None:
        if not isinstance(trunk, ModuleModel):
            raise ConsilienceError(f"a trunk should be a model of one module. Found {type(trunk).__name__}.")
        super().__init__(outputs, norm)
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
    def draws(self) -> bool:
        return self.trunk.draws

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = self.trunk.init(generator)
        return _prefixed(params), _prefixed(buffers)

    def __call__(
        self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool
    ) -> tuple[Tensor, Params]:
        psi, new = self.trunk(_stripped(params), _stripped(buffers), x, None, train)
        return self._all(psi, self._heads(params, buffers, task)), {
            **buffers,
            **_prefixed(new),
        } if train else buffers

    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        return self.trunk.features(_stripped(params), _stripped(buffers), x)

    def from_features(self, params: Params, buffers: Params, psi: Tensor, task: str | None) -> Tensor | None:
        return self._all(psi, self._heads(params, buffers, task))

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        trunk, own = self.trunk.bind(_stripped(params), _stripped(buffers), train)
        held = {**{n: b.clone() for n, b in buffers.items() if n.startswith(HEADS)}, **_prefixed(own)}
        found: dict[str | None, list[Head]] = {}

        def forward(x: Tensor, task: str | None) -> Tensor:
            if task not in found:
                found[task] = self._heads(params, held, task)
            return self._all(trunk(x, None), found[task])

        return forward, held

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Parameters and buffers with a head for the source's task, uniform in +-1 / sqrt(d), if it has none."""
        if self._has(params, buffers, source):
            return params, buffers
        like = next(
            (p for n, p in params.items() if n.startswith(TRUNK) and p.is_floating_point()), torch.zeros(0)
        )
        return self._grow(params, buffers, source, self.trunk.width, like, generator)

    def frozen(self, entry: str) -> bool:
        if entry.startswith(TRUNK):
            return self.trunk.frozen(entry[len(TRUNK) :])
        return matches(entry, self._patterns)

    def freeze(self, patterns: Sequence[str]) -> Self:
        """The same model with the entries that match these patterns frozen too."""
        other = copy.copy(self)
        names = [n for n in self.trunk._names if matches(TRUNK + n, patterns)]
        for p in patterns:
            if not p.startswith(self.own) and not any(matches(TRUNK + n, [p]) for n in names) and p != "*":
                raise ConsilienceError(
                    f"frozen patterns should match an entry. Found none like {p!r} in {self!r}."
                )
        other.trunk = self.trunk.freeze(names)
        other._patterns = (*self._patterns, *patterns)
        return other

    def __repr__(self) -> str:
        return f"multi_head({self.trunk!r}, {self.outputs}{', norm=inf' if self.norm else ''})"

    def _all(self, psi: Tensor, heads: Sequence[Head]) -> Tensor:
        """The outputs [B, C] of these heads on the same features, zero if there are none."""
        return self._write([psi] * len(heads), heads) if heads else self._nothing(psi)


def escape(task: str) -> str:
    """A task's name as it stands in entries.

    >>> escape("digits/v1.5-a")
    'digits/v1_5-a'
    """
    return task.replace(".", "_")


def tasks(params: Params) -> list[str]:
    """The tasks that have heads, in the order of their names."""
    return sorted(
        n[len(HEADS) : -len(".weight")] for n in params if n.startswith(HEADS) and n.endswith(".weight")
    )


def _prefixed(tensors: Params) -> Params:
    return {TRUNK + n: t for n, t in tensors.items()}


def _stripped(tensors: Params) -> Params:
    return {n[len(TRUNK) :]: t for n, t in tensors.items() if n.startswith(TRUNK)}
