"""Makers that choose samples from data: auxiliary data of any kind, or that of the experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.model import MISFITS
from consilience.core.params import computing, content_hash
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Source, checked_inputs
from consilience.core.synthetic import Maker, Wanted, answers, balanced
from consilience.core.teacher import Teacher
from consilience.core.tree import Input, cast_to, named


@dataclass(frozen=True)
class Auxiliary(Maker):
    """Samples of other data x [M, ...], each for the class y = argmax of the expert's logits.

    They are as many of each class as the data allow: what a class lacks is taken from the others. With
    `choose` "confident" they are those of the highest probability of their class, with "random" any. Carta et
    al. 2022, section 4.
    """

    data: Input | None = field(default=None, compare=False, repr=False)
    choose: Literal["confident", "random"] = "confident"
    content: str = field(default="", init=False)
    """The hash of the data."""

    def __post_init__(self) -> None:
        data = checked_inputs(self.data, "data")
        if self.choose not in ("confident", "random"):
            raise ConsilienceError(f"`choose` must be confident or random, got {self.choose!r}.")
        # Two makers are equal, and a run may be resumed, if their data have one hash.
        object.__setattr__(self, "content", content_hash(named("x", data)))

    def refuse(self, facts: ScheduleFacts, size: int) -> str | None:
        assert self.data is not None
        size //= max(1, facts.most_received)
        if len(self.data) < size:
            return (
                f"the first expert needs {size} samples of the auxiliary data, and there are "
                f"{len(self.data)}; give more, or a smaller `size`"
            )
        # Whether they fit shows only in a forward pass: models do not declare their input's shape.
        own = {name: sender.model for name, sender in facts.senders.items() if sender.model is not None}
        for name, model in {"": facts.model, **own}.items():
            if model is None:
                continue
            params, buffers = model.init(torch.Generator().manual_seed(0))
            like = computing(params)
            try:
                model(params, buffers, cast_to(self.data[:1], like.device, like.dtype), None, False)
            except MISFITS as error:
                whose = f"the model of {name!r}" if name else "the model"
                return (
                    f"auxiliary data must fit {whose}, got samples {tuple(self.data.shape[1:])} "
                    f"({str(error).partition(chr(10))[0][:120]}); give others"
                )
        return None

    def make(self, teacher: Teacher, wanted: Wanted, generator: torch.Generator) -> tuple[Input, Tensor]:
        assert self.data is not None
        chances = torch.cat(
            [
                answers(teacher, cast_to(piece, wanted.device, wanted.dtype)).softmax(1).cpu()
                for piece in self.data.split(PIECE)
            ]
        )
        top, best = chances.max(1)
        y = torch.tensor(teacher.classes)[best]
        keys = -top.double() if self.choose == "confident" else _random(len(y), generator)
        index = balanced(keys, y, wanted.counts)
        return cast_to(self.data[index], wanted.device, wanted.dtype), y[index]


@dataclass(frozen=True)
class Real(Maker):
    """Training examples of the experts' own sources: Replay ED, the upper bound of ex-model distillation.

    `sources` has one for each expert, by its task. They are as many of each class as the data allow. Carta et
    al. 2022, section 5.
    """

    sources: tuple[Source, ...] = field(default=(), compare=False, repr=False)
    content: str = field(default="", init=False)
    """The hash of the examples."""

    def __post_init__(self) -> None:
        given = self.sources if isinstance(self.sources, tuple) else ()
        if not given or not all(isinstance(source, Source) for source in given):
            raise ConsilienceError(
                f"`sources` must be those that the experts were trained on, got {kind_of(self.sources)}."
            )
        tasks = [_task(source) for source in self.sources]
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise ConsilienceError(f"`sources` must be one for each task, got several for {twice[0]!r}.")
        held = {
            f"{_task(source)}/{name}": tensor
            for source in self.sources
            for name, tensor in source.train.content().items()
        }
        object.__setattr__(self, "content", content_hash(held))

    def refuse(self, facts: ScheduleFacts, size: int) -> str | None:
        known = {_task(source): source for source in self.sources}
        for place, (name, sender) in enumerate(facts.senders.items(), 1):
            source = known.get(str(sender.task))
            if source is None:
                return (
                    f"real data must have the source of each expert, and there is none for {name!r} "
                    f"({sender.task!r}); give it, or use memory.auxiliary"
                )
            # Experts that come together share the memory from the start.
            count = size // max(place, facts.most_received)
            if len(source.train) < count:
                return (
                    f"the expert {name!r} needs {count} examples, and its source has "
                    f"{len(source.train)}; use a smaller `size`"
                )
        return None

    def make(self, teacher: Teacher, wanted: Wanted, generator: torch.Generator) -> tuple[Input, Tensor]:
        source = next(source for source in self.sources if _task(source) == teacher.task)
        # In the same order in the source and in the schedule.
        column = dict(zip(source.classes, teacher.classes, strict=True))
        y = torch.tensor([column.get(target, -1) for target in source.train.targets().tolist()])
        there = (y >= 0).nonzero()[:, 0]
        index = there[balanced(_random(len(there), generator), y[there], wanted.counts)]
        x = source.train.select(index).whole()[0]
        return cast_to(x, wanted.device, wanted.dtype), y[index]


PIECE = 1 << 14
"""Samples of auxiliary data that are moved to a device at once."""


def _task(source: Source) -> str:
    """Return the task of a source, as schedules call it."""
    return source.task or source.name


def _random(count: int, generator: torch.Generator) -> Tensor:
    """Return keys [M] in a random order."""
    return torch.rand(count, generator=generator, dtype=torch.float64)
