"""A module that answers every task by name: x -> {task: outputs}, each with places of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consilience.core.augment import isolated
from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError, Refusal, kind_of
from consilience.core.model import Forward, ForwardEach, for_one
from consilience.core.params import Params, computing
from consilience.core.source import LabelFrame, Source
from consilience.core.tree import Input, cast_to
from consilience.models.heads import escape, moved_columns
from consilience.models.module import Factory, ModuleModel

COLUMNS = "columns."
"""The prefix of the buffers that hold the output columns of each task."""


class Joint(ModuleModel):
    """outputs[:, columns_t] = module(x)[t] for task t; other columns are -inf.

    The module returns a mapping from tasks to outputs [B, k, *places], or to a tuple of these: the answer,
    and then earlier answers of the same shape, which `corrections.DeepSupervision` trains. Earlier answer s
    stands in the columns of the task + s C, for C columns of all tasks. Tasks may differ in their places:
    one answer per image, and one per pixel. With task None all tasks answer at once, which must then have
    the same places, columns of their own and no earlier answers.

    `widths` are k by task. The buffer `columns.<task>` [k] has a task's columns once it is trained on. An
    entry belongs to a task where the answers of no other depend on it; the trial before a run finds out.
    """

    def __init__(
        self,
        module: nn.Module | Factory,
        widths: Mapping[str, int],
        earlier: int = 0,
        name: str | None = None,
    ) -> None:
        if not isinstance(widths, Mapping) or not widths:
            raise ConsilienceError(f"`widths` must be numbers of outputs by task, got {kind_of(widths)}.")
        for width in widths.values():
            whole_number(widths=width)
        whole_number(0, earlier=earlier)
        self.widths, self.earlier = {escape(task): width for task, width in widths.items()}, earlier
        self.columns = sum(widths.values())
        # In the constructor of the parent nothing is called yet.
        self._seen: dict[str, list[Tensor]] = {}
        self._trying = False
        self._owners: dict[str, str] = {}
        self._places: dict[str, tuple[int, ...]] = {}
        super().__init__(module, self.columns * (1 + earlier), headless=True, name=name)

    @property
    def uses_task(self) -> bool:
        return True

    def task_of(self, entry: str) -> str | None:
        # All agents have all entries from the start, so that those of one task have a base too.
        return entry[len(COLUMNS) :] if entry.startswith(COLUMNS) else None

    def shared(self, entry: str) -> bool:
        return entry not in self._owners

    def head_key(self, source: Source) -> str:
        return escape(super().head_key(source))

    def features(self, params: Params, buffers: Params, x: Input, task: str | None = None) -> Tensor:
        raise ConsilienceError(
            "features need one trunk with heads, and a joint model has answers only; use models.multi_head."
        )

    # What it computes.

    def grow(
        self, params: Params, buffers: Params, source: Source, generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Note the output columns of the source's task."""
        name = COLUMNS + self.head_key(source)
        if name in buffers:
            return params, buffers
        like = next(iter(params.values()))
        return params, {**buffers, name: torch.tensor(source.classes, device=like.device)}

    def each(
        self, params: Params, buffers: Params, x: Input, tasks: Sequence[str | None], train: bool
    ) -> tuple[list[Tensor], Params]:
        out, new = self.called(params, buffers, x, train)
        return [self.read(out, task, buffers) for task in tasks], new

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        return for_one(Joint.bind_each(self, params, buffers, train))

    def bind_each(
        self, params: Params, buffers: Params, train: bool, through: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[ForwardEach, Params]:
        # The module answers all tasks at once: of equal inputs it is called once.
        module, moved = self.bind_module(params, buffers, train, through)
        held = {name: b.clone() for name, b in buffers.items() if name.startswith(COLUMNS)} | moved

        def forward(x: Input, tasks: tuple[str | None, ...]) -> list[Tensor]:
            out = module(x)
            return [self.read(out, task, held) for task in tasks]

        return forward, held

    def moved(
        self, params: Params, buffers: Params, columns: Sequence[int | None], width: int
    ) -> tuple[Params, Params]:
        return params, moved_columns(buffers, columns, COLUMNS)

    def read(self, out: Any, task: str | None, buffers: Params) -> Tensor:
        answers = self._answers(out)
        if self._trying:
            self._seen = answers
            return torch.cat([a.flatten(1) for own in answers.values() for a in own], 1)[..., None]

        chosen = [escape(task)] if task is not None else [t for t in answers if COLUMNS + t in buffers]
        # Before it is trained on, a task has no columns, and uniform answers.
        if not chosen or COLUMNS + chosen[0] not in buffers:
            like = answers.get(chosen[0] if chosen else "", next(iter(answers.values())))[0]
            return like.new_zeros(len(like), self.outputs, *like.shape[2:])

        # Earlier answers stand behind the last ones, a block of all columns each.
        pieces = [answer for t in chosen for answer in answers[t]]
        columns = [
            buffers[COLUMNS + t] + stage * self.columns for t in chosen for stage in range(len(answers[t]))
        ]
        together = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        where = columns[0] if len(columns) == 1 else torch.cat(columns)
        shape = (len(together), self.outputs, *together.shape[2:])
        return together.new_full(shape, -torch.inf).index_copy(1, where, together)

    def _answers(self, out: Any) -> dict[str, list[Tensor]]:
        """Return the answer of each task, with the earlier ones behind it."""
        if not isinstance(out, Mapping):
            raise ConsilienceError(
                f"a joint module must return a mapping from tasks to outputs, got {kind_of(out)}; "
                "models.wrap takes modules that return one tensor."
            )
        return {
            escape(task): [own] if isinstance(own, Tensor) else list(own)
            for task, own in out.items()
            if escape(task) in self.widths
        }

    # The trial before a run.

    def check(self, frame: LabelFrame, sample: Input, aware: bool, places: tuple[int, ...] = ()) -> None:
        # By name: a task that the module does not know would have no loss, or that of another.
        for task, columns in frame.tasks.items():
            width = self.widths.get(escape(task))
            if width is None:
                raise ConsilienceError(
                    f"the model must answer every task of the schedule, and has no outputs for {task!r}; "
                    f"it answers {', '.join(self.widths)}."
                )
            if width != len(columns):
                raise ConsilienceError(
                    f"the model must have one output for each of the {len(columns)} labels of {task!r}, got "
                    f"{width}; name all of them with `classes=`, or give the model as many."
                )
        self._trying = True
        try:
            super().check(frame, sample, aware, places)
            self._find_owners(frame, sample)
        finally:
            self._trying, self._seen = False, {}
        if not aware:
            self._check_unaware(frame)

    def check_outputs(self, out: object, samples: int, places: tuple[int, ...]) -> None:
        for task, width in self.widths.items():
            own = self._seen.get(task)
            if own is None:
                raise ConsilienceError(
                    f"the module must answer {task!r}, got answers for {', '.join(self._seen) or 'nothing'}."
                )
            if len(own) != 1 + self.earlier:
                raise ConsilienceError(
                    f"{task!r} must have {self.earlier} earlier answers, got {len(own) - 1}; say with "
                    "`earlier` how many all tasks have."
                )

            # Earlier answers are compared with the same targets.
            wanted = (samples, width, *own[0].shape[2:])
            for answer in own:
                if tuple(answer.shape) != wanted:
                    raise ConsilienceError(
                        f"all answers of {task!r} must be [B, {', '.join(map(str, wanted[1:]))}], got "
                        f"{tuple(answer.shape)} for {samples} samples."
                    )

        if all(own[0].shape[2:] != places for own in self._seen.values()):
            found = "; ".join(f"{task} {tuple(own[0].shape[2:])}" for task, own in self._seen.items())
            raise ConsilienceError(
                f"some task must have outputs at the places {places} of the targets, got {found}."
            )

    def _check_unaware(self, frame: LabelFrame) -> None:
        """Refuse to answer without a task where tasks cannot answer side by side."""
        shapes = {places for places in self._places.values()}
        columns = [column for own in frame.tasks.values() for column in own]
        if self.earlier or len(shapes) > 1 or len(set(columns)) < len(columns):
            raise Refusal(
                "a joint model whose tasks differ in their places, share labels or have earlier answers "
                "needs to know the task; use scenario='task'."
            )

    def _find_owners(self, frame: LabelFrame, x: Input) -> None:
        """Find the entries that the answers of one task alone depend on."""
        params, buffers = self.init(torch.Generator().manual_seed(0))
        x = cast_to(x, x.device, computing(params).dtype)
        leaves = {
            name: p.detach().clone().requires_grad_()
            for name, p in params.items()
            if p.is_floating_point() and not self.frozen(name)
        }
        with isolated(), torch.enable_grad():
            self({**params, **leaves}, buffers, x, None, False)
        seen, self._places = self._seen, {t: tuple(own[0].shape[2:]) for t, own in self._seen.items()}

        # By the graph, not by values: a unit that is dead for these samples may live for others.
        reach: dict[str, list[str]] = {name: [] for name in leaves}
        for task in frame.tasks:
            total = torch.stack([answer.sum() for answer in seen[escape(task)]]).sum()
            if not total.requires_grad:
                continue
            grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
            for name, grad in zip(leaves, grads, strict=True):
                if grad is not None:
                    reach[name].append(escape(task))
        self._owners = {name: tasks[0] for name, tasks in reach.items() if len(tasks) == 1}
