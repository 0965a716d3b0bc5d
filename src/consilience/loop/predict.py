"""Prediction: the experts of an agent, their answers to a batch, and the weights that a mapper gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.core.contexts import Context, Memory, Routing
from consilience.core.correction import Correction, overrides
from consilience.core.errors import ConsilienceError, unknown
from consilience.core.message import Item
from consilience.core.method import Method
from consilience.core.model import Model
from consilience.core.names import WHOLE
from consilience.core.params import Params
from consilience.core.schedule import Schedule
from consilience.core.state import State
from consilience.core.training import Training
from consilience.core.tree import Input, cast_to
from consilience.core.viewed import superposition

Key = tuple[str, str]
"""(sender, source) of an expert."""


class Choice(NamedTuple):
    """One expert that an agent may answer with."""

    key: Key
    entries: Params
    """The entries that it has instead of the agent's."""
    buffers: Params
    task: str | None
    columns: tuple[int, ...] | None
    """The output columns that it was trained for; None: all."""
    where: Tensor | None
    """Which column of the frame each of its outputs is, if its labels are not the frame's."""


class Prediction(NamedTuple):
    """Class probabilities (or values) [B, C], and the weights [B, experts] by which the experts answered."""

    probabilities: Tensor
    weights: Tensor | None
    keys: list[Key]


def memory_of(agent: str, state: State, correction: Correction) -> Memory:
    """Return the items of a correction: shared ones from the bank, private ones under the agent's name."""
    name = correction.name
    items: dict[Key, Item] = {
        key: message.items[name] for key, message in state.bank.items() if name in message.items
    }
    return items | {(agent, source): item for source, item in state.memory.get(name, {}).items()}


@dataclass(eq=False)
class Predictor:
    """How an agent in one state answers. `Agent` makes one per state."""

    agent: str
    model: Model
    method: Method
    schedule: Schedule
    training: Training
    state: State

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.training.device)

    @property
    def classes(self) -> int:
        """The number of classes of the frame."""
        return len(self.schedule.frame.labels)

    @cached_property
    def views(self) -> list[tuple[Correction, Context]]:
        """The corrections that change which parameters the model sees, with what they recall."""
        seen = [correction for correction in self.method.active if overrides(correction, "view")]
        return [(correction, self._context(correction)) for correction in seen]

    def _context(self, correction: Correction) -> Context:
        recalled = correction.recall(memory_of(self.agent, self.state, correction), ())
        return Context(recalled=recalled, model=self.model)

    def viewed(self, params: Params, task: str | None) -> Params:
        """Return the parameters as the model sees them for a task."""
        for correction, ctx in self.views:
            params = correction.view(params, task, ctx)
        return params

    def cast(self, x: Input) -> Input:
        """Move inputs to the device, in the precision of the training."""
        return cast_to(x, self.device, self.training.dtype)

    def choices(self) -> list[Choice]:
        """Return the experts: modules of the bank, or the tasks between which a mapper chooses."""
        frame, found = self.schedule.frame, []
        for key, module in self.state.experts.items():
            # Classes of another frame are put where this frame has them.
            where = None if module.labels == frame.labels else frame.columns(module.labels)
            entries, buffers = module.group("entries"), module.group("buffers")
            found.append(Choice(key, entries, buffers, module.task, module.classes or None, where))
        if found or self.method.mapper is None:
            return found

        for key in self._served():
            source = self.schedule.source(key[1])
            found.append(Choice(key, {}, {}, source.task, source.classes, None))
        return found

    def _served(self) -> list[Key]:
        """Return the (sender, source) of all sources that the agent's own parameters can answer for."""
        own = [(self.agent, name) for name in self.state.visits]
        keys = dict.fromkeys([*own, *(key for key in self.state.bank if key[1] != WHOLE)])
        if keys:
            return list(keys)

        # Only parameters were received: their heads say which tasks they serve.
        heads = {self.model.task_of(name) for name in self.state.params}
        sources = [source for source in self.schedule.sources if self.model.head_key(source) in heads]
        return list(dict.fromkeys((self.agent, source.name) for source in sources))

    def outputs(
        self, params: Params, buffers: Params, x: Input, task: str | None, psi: Tensor | None = None
    ) -> Tensor:
        """Return outputs [B, C] in eval mode, before softmax; psi [B, d] are features of x, if known."""
        if psi is not None and not self.views:
            short = self.model.from_features(params, buffers, psi, task)
            if short is not None:
                return short
        return self.model(self.viewed(params, task), buffers, x, task, False)[0]

    def superposed(self, params: Params, buffers: Params) -> Callable[[Input, Tensor], Tensor]:
        """Return (x, alpha) -> outputs [B, C] of sum_k alpha_k view_k(params), k over `choices`."""
        choices = self.choices()
        if any(choice.where is not None for choice in choices):
            raise ConsilienceError(
                "experts must have the labels of this agent to be superposed, got some of another frame; "
                "use a mapper that does not superpose."
            )

        # The agent's own buffers win: one set of statistics must serve all views.
        views = []
        for choice in choices:
            views.append(self.viewed({**params, **choice.entries}, choice.task))
            buffers = {**choice.buffers, **buffers}
        combined = superposition(views)

        # Classes that no expert was trained for get no probability.
        served = {column for choice in choices for column in choice.columns or range(self.classes)}
        hidden = torch.tensor([column not in served for column in range(self.classes)], device=self.device)

        def outputs(x: Input, alpha: Tensor) -> Tensor:
            out = self.model(combined(alpha), buffers, x, None, False)[0]
            return out[:, : self.classes].masked_fill(hidden, -torch.inf)

        return outputs

    @torch.no_grad()
    def __call__(self, x: Input, task: str | None) -> Prediction:
        """Answer a batch: sum over experts of weight times the expert's probabilities."""
        choices = self._asked(task)
        batch = Experts(self, self.cast(x), choices)

        # Without experts, the agent's own parameters answer alone.
        if not choices:
            out = self.outputs(batch.params, batch.buffers, batch.x, task)
            return Prediction(self.schedule.frame.answer(out, task), None, [])

        weights = self._weights(batch, task)
        return Prediction(batch.mixture(weights), weights, batch.keys)

    @torch.no_grad()
    def route(self, x: Input) -> tuple[Tensor, list[Key]]:
        """Return the mapper's weights [B, experts] and the experts' keys, without the answers."""
        choices = self.choices()
        if not choices:
            raise ConsilienceError(f"`route` needs a mapper and experts, and {self.agent!r} has none.")
        batch = Experts(self, self.cast(x), choices)
        return self._weights(batch, None), batch.keys

    @torch.no_grad()
    def alone(self, x: Input, at: Key) -> list[Tensor]:
        """Return the answer of the expert `at`, if it is a module, and its weights, if it has an anchor."""
        choices = [choice for choice in self.choices() if choice.key == at and at in self.state.experts]
        batch, mapper = Experts(self, self.cast(x), choices), self.method.mapper
        made = [batch.answer(0, None)] if choices else []
        memory = {} if mapper is None else memory_of(self.agent, self.state, mapper)
        if mapper is not None and at in memory:
            made.append(mapper.route(self._routing(batch, [at]), {at: memory[at]}))
        return made

    def _routing(self, batch: Experts, keys: list[Key]) -> Routing:
        """Return what the mapper may read of a batch, to choose between these experts."""
        return Routing(
            batch.x,
            batch.features,
            batch.probabilities,
            keys,
            lambda: self.superposed(batch.params, batch.buffers),
        )

    def _asked(self, task: str | None) -> list[Choice]:
        """Return the experts of a task, or all. Raises ConsilienceError for a task that does not exist."""
        choices, tasks = self.choices(), self.schedule.frame.tasks
        if task is None:
            return choices

        if task not in tasks:
            # A received module or a test source may name a task that no source of the schedule has.
            others = [choice.task for choice in choices] + [source.task for source in self.schedule.judged]
            known = {*tasks, *(other for other in others if other)}
            if task not in known:
                raise unknown("task", task, known, "the schedule's tasks")

        # A task without an expert of its own is answered by all of them.
        own = [choice for choice in choices if choice.task == task]
        return own or choices

    def _weights(self, batch: Experts, task: str | None) -> Tensor:
        """Return weights [B, experts]: the mapper's, or equal ones where there is nothing to map."""
        # A single expert needs no routing, unless the mapper may reject the input.
        mapper, count = self.method.mapper, len(batch.choices)
        if mapper is None or task is not None or (count == 1 and not mapper.rejects):
            shape = (len(batch.x), count)
            return torch.full(shape, 1 / count, device=self.device, dtype=self.training.dtype)

        routing = self._routing(batch, batch.keys)
        return mapper.route(routing, memory_of(self.agent, self.state, mapper)).to(self.training.dtype)


class Experts:
    """The experts' answers to one batch; each is computed when it is first needed."""

    def __init__(self, predictor: Predictor, x: Input, choices: list[Choice]) -> None:
        self.predictor, self.x, self.choices = predictor, x, choices
        self.keys = [choice.key for choice in choices]

        # A state may be kept on another device than predictions are made on.
        self.params = {name: p.to(predictor.device) for name, p in predictor.state.params.items()}
        self.buffers = {name: b.to(predictor.device) for name, b in predictor.state.buffers.items()}
        self._features: Tensor | None = None
        self._answers: dict[int, Tensor] = {}

    def features(self, other: Tensor | None = None) -> Tensor:
        """Return the features [B, d] of the batch (computed once), or of other inputs."""
        model = self.predictor.model
        if other is not None:
            return model.features(self.params, self.buffers, self.predictor.cast(other))
        if self._features is None:
            self._features = model.features(self.params, self.buffers, self.x)
        return self._features

    def probabilities(self) -> list[Tensor]:
        """Return what each expert answers to the whole batch [B, classes of that expert]."""
        found = []
        for i, choice in enumerate(self.choices):
            if i not in self._answers:
                self._answers[i] = self.answer(i, None)
            columns = list(choice.columns) if choice.columns and choice.where is None else None
            found.append(self._answers[i] if columns is None else self._answers[i][:, columns])
        return found

    def answer(self, i: int, rows: Tensor | None) -> Tensor:
        """Return what expert i answers to these rows (None: all), in the columns of the frame [rows, C]."""
        choice, model, predictor = self.choices[i], self.predictor.model, self.predictor
        if choice.where is not None and len(predictor.schedule.frame.targets) > 1:
            raise ConsilienceError(
                f"experts must have the labels of this agent where tasks differ in their targets, and "
                f"{choice.key[1]!r} of {choice.key[0]!r} has others."
            )
        device, classes = predictor.device, predictor.classes
        entries = {name: tensor.to(device) for name, tensor in choice.entries.items()}
        buffers = {name: tensor.to(device) for name, tensor in choice.buffers.items()}

        # An expert that differs only in entries of its task stands on the features that all share.
        psi = self._features
        if any(model.task_of(name) is None for name in (*entries, *buffers)):
            psi = None
        if psi is not None and rows is not None:
            psi = psi[rows]

        x = self.x if rows is None else self.x[rows]
        out = predictor.outputs({**self.params, **entries}, {**self.buffers, **buffers}, x, choice.task, psi)
        width = classes if choice.where is None else len(choice.where)
        own = predictor.schedule.frame.answer(out, choice.task, choice.columns, width)
        if choice.where is None:
            return own

        # Classes that the expert does not know get probability 0.
        aligned = own.new_zeros(len(x), classes, *own.shape[2:])
        return aligned.index_add_(1, choice.where.to(aligned.device), own)

    def mixture(self, weights: Tensor) -> Tensor:
        """Return sum_i weights[:, i] answer_i [B, C], each kind of column over the experts that have it."""
        count, dtype = len(self.choices), self.predictor.training.dtype
        result: Tensor | None = None
        for i in range(count):
            # Mappers mostly choose one expert per input: an expert answers only rows where it has weight.
            kept, rows = self._answers.get(i), weights[:, i] > 0
            index = rows.nonzero()[:, 0]
            if not len(index) and i + 1 < count:
                continue
            part = self.answer(i, None if bool(rows.all()) else index) if kept is None else kept[index]
            if result is None:
                shape = (len(self.x), *part.shape[1:])
                result = torch.zeros(shape, device=self.predictor.device, dtype=dtype)

            # One weight for all places of a sample.
            share = weights[index, i].view(-1, *[1] * (part.dim() - 1))
            if len(index) == len(self.x):
                result += share * part
            else:
                result.index_add_(0, index, share * part)

        assert result is not None
        answered = self._answered(weights)
        return (
            result if answered is None else result / answered.view(*answered.shape, *[1] * (result.dim() - 2))
        )

    def _answered(self, weights: Tensor) -> Tensor | None:
        """Return the weight of the experts that answer each column [B, C]; None where all answer all.

        A value is no smaller because other experts have other values.
        """
        frame = self.predictor.schedule.frame
        if len(frame.targets) == 1:
            return None
        knows = weights.new_zeros(len(self.choices), self.predictor.classes)
        for i, choice in enumerate(self.choices):
            knows[i, list(choice.columns or range(self.predictor.classes))] = 1

        # Classes compete, so whoever knows some of them answers for all.
        classes = [t.columns or () for t in frame.targets.values() if t.kind == "class"]
        columns = sorted({column for own in classes for column in own})
        knows[:, columns] = knows[:, columns].amax(1, keepdim=True) if columns else 0

        answered = weights @ knows
        # No expert answers: the value stays 0.
        return torch.where(answered > 0, answered, 1)
