"""Corrections: how what is already known bends the training on one source. Pure verbs, all optional."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, Routing, Row, StepView
from consilience.core.message import Item, Statistics
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Source

if TYPE_CHECKING:
    from consilience.core.message import Message
    from consilience.core.schedule import ScheduleFacts
    from consilience.core.state import State
    from consilience.core.training import Training

NO_TRAINING = "it bends training, and here only trained models are given; use parameter_average"
"""Why a correction refuses a schedule in which nobody learns."""


class Correction(ABC):  # noqa: B024 (every verb is optional)
    """A frozen dataclass of hyperparameters with the verbs below; each is optional and costs nothing when not overridden.

    Class attributes: `travels`, whether its items may leave the agent (they are Shared) or are Private; `flat`, groups of
    what it recalls that the step wants as flat vectors; `ends`, whether it must know where a source ends; `neutral`, the values of its fields at which it is plain training
    (it is left out of the step when all hold); `recalls`, whether it needs something known from an earlier learn to act; `constrains`, whether its
    `rows` are constraints, which need a cone as step aggregator; `widens`, whether its `view` gives entries other shapes: then it comes after all others.
    """

    shared_items: ClassVar[bool] = True
    flat: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, Any]] = {}
    needs_history: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = False
    adds_constraints: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = False
    needs_revisits: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The key of its items."""
        return type(self).__name__

    @property
    def active(self) -> bool:
        """Whether it differs from plain training at these hyperparameters."""
        return not self.neutral or any(getattr(self, k) != v for k, v in self.neutral.items())

    def default_model(self, inputs: tuple[int, ...], outputs: int) -> Model | None:
        """The model for inputs [B, *inputs] and `outputs` classes that this part asks for where a user gives none, or None."""
        return None

    def refuse(self, facts: ScheduleFacts) -> str | None:
        """Why it cannot work in such a schedule and what to do instead, or None."""
        return None

    def gather(
        self, sources: tuple[Source, ...], recalled: Any, generator: torch.Generator
    ) -> tuple[Source, ...]:
        """What this learn trains on: the given sources (their `task` None where the model is not told), or others made from them
        and what is known. The generator draws as the one that `begin` is given."""
        return sources

    def begin(self, start: Beginning) -> Begun:
        """Before training: the parameters (entries may be added on the first visit, or start elsewhere), the private
        tensors of this visit, and the entries that this visit never moves."""
        return Begun(start.params)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        """What is known at the start of a learn, or None; once per learn. Default: the sum of the statistics of all other sources."""
        names = {s.name for s in sources}
        total: Statistics | None = None
        for (_, source), item in sorted(memory.items(), key=lambda kv: (kv[0][1], kv[0][0])):
            if source not in names and isinstance(item, Statistics):
                total = item if total is None else total + item
        return total

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """What is known, laid flat (`me.flat`), settled for the training that comes; and a warning, such as of a step too long, or None."""
        return ctx.flat, None

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Further parts of a step (rehearsal), drawn outside the compiled step."""
        return []

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """The parameters as the model sees them, in the step and in predict."""
        return params

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        """The losses of the samples, {part: [B]}, bent."""
        return losses

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        """Further objectives or constraints of the step."""
        return []

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        """A scalar of `step.theta` whose gradient is added after the aggregator."""
        return step.theta.new_zeros(())

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float] | None:
        """The gradient of `penalty` as a vector [n] and a factor, where it is known; None leaves it to autograd.

        A subclass that has another `penalty` and no `pull` of its own is left to autograd too."""
        return None

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        """Factors [n] on the rows before aggregation; where 0 the entry is restored after the optimiser."""
        return torch.ones_like(step.theta)

    def trace_init(self, theta: Tensor) -> dict[str, Tensor]:
        """What `trace` folds into, at the first learn of a source; traces go on over its visits."""
        return {}

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """The trace after a step: `grad` [n] is the aggregated gradient before penalties, `delta` [n] what moves `step.theta`."""
        return ctx.trace

    def summarise(self, learned: Learned, ctx: Context) -> Item | None:
        """What to keep of this source after training: Shared if it may travel, Private if not."""
        return None

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        """The memory after absorbing `fresh`: `before.base` are the parameters when this agent last absorbed, `before.params` those that it learned since.

        A Shared item under "" is told with the agent's own parameters, and who hears it recalls it as (sender, "")."""
        return memory

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """The private memory (by source) within its budget, after storing; `learned` is the last source that was."""
        return memory


def overrides(correction: Correction, verb: str) -> bool:
    """Whether a correction has its own form of a verb.

    >>> overrides(Correction(), "penalty")
    False
    """
    return getattr(type(correction), verb) is not getattr(Correction, verb)


def knows_gradient(correction: Correction) -> bool:
    """Whether its `penalty_gradient` belongs to its `penalty`: defined in the same class, or in a subclass."""
    classes = type(correction).__mro__

    def depth(verb: str) -> int:
        return next(i for i, kind in enumerate(classes) if verb in vars(kind))

    return depth("penalty_gradient") <= depth("penalty")


class Mapper(Correction):
    """A correction that also routes: weights over the experts for each input."""

    needs_label: ClassVar[bool] = False
    """Whether it is told the true task at evaluation (an oracle)."""
    superposes: ClassVar[bool] = False
    """Whether it asks for superposed views: then some correction should have a `view`."""

    @property
    def rejects(self) -> bool:
        """Whether it may say that no expert knows an input: then a lone expert is asked about too."""
        return False

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        """Nothing: anchors are read by `route`."""
        return None

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        """Weights [B, experts], each row summing to 1; a row of zeros says that no expert knows the input."""
        raise NotImplementedError
