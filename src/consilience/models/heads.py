"""One linear head for each task on one trunk: heads are added as sources come."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.errors import ConsilienceError, Refusal
from consilience.core.model import Forward, Model
from consilience.core.params import Params, matches
from consilience.core.source import Frame, Source
from consilience.models.module import ModuleModel

TRUNK, HEADS = "trunk.", "heads."


class MultiHead(Model):
    """outputs[:, columns_t] = psi(x) W_t^T + b_t for the head of task t; the other columns are -inf, which softmax takes as 0.

    With task None the columns of all heads are written, as class-incremental learning wants; heads that share a column
    need a task. Before there is any head, and for a task that has none, all outputs are zero: uniform probabilities.
    psi are the features [B, d] of the trunk, whose own head is not among the entries. Entries are `trunk.<name>`,
    `heads.<task>.weight` [k, d] and `heads.<task>.bias` [k]; the buffer `heads.<task>.columns` [k] says which outputs they
    are. A source without task label has its name for a task; dots in it become underscores. A frozen trunk runs in eval mode.

    >>> from consilience.models import mlp
    >>> model = MultiHead(mlp(4, (8,)), outputs=10)
    >>> list(model.init(torch.Generator())[0]), model.task_of("heads.t.weight")
    (['trunk.1.weight', 'trunk.1.bias'], 't')
    """

    def __init__(self, trunk: ModuleModel, outputs: int) -> None:
        if not isinstance(trunk, ModuleModel):
            raise ConsilienceError(f"`trunk` should be a model of one module. Found {type(trunk).__name__}.")
        if outputs < 1:
            raise ConsilienceError(f"`outputs` should be at least 1. Found `outputs = {outputs}`.")
        self.trunk = trunk.body()
        self.outputs = outputs
        self._patterns: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The catalogue's name, with the trunk's."""
        return f"multi_head({self.trunk.name})"

    @property
    def uses_task(self) -> bool:
        return True

    @property
    def has_batch_norm(self) -> bool:
        return self.trunk.has_batch_norm

    @property
    def draws(self) -> bool:
        return self.trunk.draws

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = self.trunk.init(generator)
        return _prefixed(params), _prefixed(buffers)

    def __call__(self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool) -> tuple[Tensor, Params]:
        psi, new = self.trunk(_stripped(params), _stripped(buffers), x, None, train)
        out = self._write(psi, self._heads(params, buffers, task))
        return out, {**buffers, **_prefixed(new)} if train else buffers

    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        return self.trunk.features(_stripped(params), _stripped(buffers), x)

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        trunk, own = self.trunk.bind(_stripped(params), _stripped(buffers), train)
        held = {**{n: b.clone() for n, b in buffers.items() if n.startswith(HEADS)}, **_prefixed(own)}
        found: dict[str | None, list[tuple[Tensor, Tensor, Tensor]]] = {}

        def forward(x: Tensor, task: str | None) -> Tensor:
            if task not in found:
                found[task] = self._heads(params, held, task)
            return self._write(trunk(x, None), found[task])

        return forward, held

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        keys = _tasks(params)
        chosen = [k for k in keys if task is None or k == escape(task)]
        if len(chosen) != 1:
            raise ConsilienceError(f"a task label should say which head is meant. Found {task!r} and {len(keys)} heads.")
        return f"{HEADS}{chosen[0]}.weight", f"{HEADS}{chosen[0]}.bias"

    def grow(self, params: Params, buffers: Params, source: Source, generator: torch.Generator) -> tuple[Params, Params]:
        """Parameters and buffers with a head for the source's task, uniform in +-1 / sqrt(d), if it has none."""
        task, classes = self.head_key(source), list(source.classes)
        at = f"{HEADS}{task}"
        if f"{at}.weight" in params:
            missing = sorted(set(classes) - set(buffers[f"{at}.columns"].tolist()))
            if missing:
                raise ConsilienceError(
                    f"sources of one task should have its head's classes. Found {missing[0]} in {source.name!r} of task {task!r}."
                )
            return params, buffers
        if not classes or max(classes) >= self.outputs:
            raise ConsilienceError(
                f"a source's classes should be among the {self.outputs} outputs. Found {classes} in {source.name!r}."
            )
        like = next((p for n, p in params.items() if n.startswith(TRUNK) and p.is_floating_point()), torch.zeros(0))
        bound = max(self.trunk.width, 1) ** -0.5
        weight = (2 * torch.rand(len(classes), self.trunk.width, generator=generator) - 1) * bound
        bias = (2 * torch.rand(len(classes), generator=generator) - 1) * bound
        columns = torch.tensor(classes, dtype=torch.long, device=like.device)
        return {**params, f"{at}.weight": weight.to(like), f"{at}.bias": bias.to(like)}, {**buffers, f"{at}.columns": columns}

    def head_key(self, source: Source) -> str:
        return escape(super().head_key(source))

    def check(self, frame: Frame, sample: Tensor, aware: bool) -> None:
        if frame.kind == "value":
            raise ConsilienceError("heads of classes need targets that are classes. Found values; use mlp or wrap.")
        columns = [c for classes in frame.tasks.values() for c in classes]
        if not aware and len(set(columns)) < len(columns):
            raise Refusal(
                "heads that share classes need a task label or a mapper. Found neither; use scenario='task' or 'class'."
            )
        super().check(frame, sample, aware)

    def task_of(self, entry: str) -> str | None:
        return entry[len(HEADS) :].rpartition(".")[0] if entry.startswith(HEADS) else None

    def frozen(self, entry: str) -> bool:
        if entry.startswith(TRUNK):
            return self.trunk.frozen(entry[len(TRUNK) :])
        return matches(entry, self._patterns)

    def freeze(self, patterns: Sequence[str]) -> MultiHead:
        """The same model with the entries that match these patterns frozen too."""
        other = copy.copy(self)
        names = [n for n in self.trunk._names if matches(TRUNK + n, patterns)]
        for p in patterns:
            if not p.startswith(HEADS) and not any(matches(TRUNK + n, [p]) for n in names) and p != "*":
                raise ConsilienceError(f"frozen patterns should match an entry. Found none like {p!r} in {self!r}.")
        other.trunk = self.trunk.freeze(names)
        other._patterns = (*self._patterns, *patterns)
        return other

    def __repr__(self) -> str:
        return f"multi_head({self.trunk!r}, {self.outputs})"

    def _heads(self, params: Params, buffers: Params, task: str | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(weight, bias, columns) of the heads to evaluate."""
        keys = _tasks(params) if task is None else [escape(task)]
        found = [
            (params[f"{HEADS}{k}.weight"], params[f"{HEADS}{k}.bias"], buffers[f"{HEADS}{k}.columns"])
            for k in keys
            if f"{HEADS}{k}.weight" in params
        ]
        if len(found) > 1:
            columns = torch.cat([c for _, _, c in found])
            if len(torch.unique(columns)) < len(columns):
                raise ConsilienceError(
                    f"heads that share output columns need a task label, or a mapper that finds the task. Found {len(found)} "
                    "heads with columns in common and no task."
                )
        return found

    def _write(self, psi: Tensor, heads: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """The outputs [B, C] of these heads, -inf in the columns of no head, zero if there are none."""
        if not heads:
            return psi.new_zeros(len(psi), self.outputs)
        logits = [F.linear(psi, w, b) for w, b, _ in heads]
        columns = [c for _, _, c in heads]
        out, where = (logits[0], columns[0]) if len(heads) == 1 else (torch.cat(logits, 1), torch.cat(columns))
        return out.new_full((len(out), self.outputs), -torch.inf).index_copy(1, where, out)


def escape(task: str) -> str:
    """A task's name as it stands in entries.

    >>> escape("digits/v1.5-a")
    'digits/v1_5-a'
    """
    return task.replace(".", "_")


def _tasks(params: Params) -> list[str]:
    """The tasks that have heads, in the order of their names."""
    return sorted(n[len(HEADS) : -len(".weight")] for n in params if n.startswith(HEADS) and n.endswith(".weight"))


def _prefixed(tensors: Params) -> Params:
    return {TRUNK + n: t for n, t in tensors.items()}


def _stripped(tensors: Params) -> Params:
    return {n[len(TRUNK) :]: t for n, t in tensors.items() if n.startswith(TRUNK)}
