"""Corrections: how what is already known bends the training on one source. Pure verbs, all optional."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.errors import ConsilienceError
from consilience.core.message import Item, Module, Statistics
from consilience.core.model import Forward, Model
from consilience.core.params import Layout, Params
from consilience.core.source import Source

if TYPE_CHECKING:
    from consilience.core.message import Message
    from consilience.core.schedule import Facts
    from consilience.core.state import State
    from consilience.core.training import Training

Memory = Mapping[tuple[str, str], Item]
"""The items of one correction by (sender, source): shared ones from the bank, private ones under its agent's own name."""

NO_TRAINING = "it bends training, and here only trained models are given; use parameter_average"
"""Why a correction refuses a schedule in which nobody learns."""


@dataclass(eq=False)
class Me:
    """A correction's own things during one learn: what it knows (from `recall`), keeps private (from `begin`), and traces."""

    known: Any = None
    private: Mapping[str, Tensor] = field(default_factory=dict)
    trace: dict[str, Tensor] = field(default_factory=dict)
    flat: dict[str, Tensor] = field(default_factory=dict)
    """The groups of `known` that the correction's `flat` names, each one vector [n] in the layout of the step."""
    model: Model | None = None
    """Asked which entries are what."""
    layout: Layout | None = None
    """Of the step; None in predict."""
    start: Tensor | None = None
    """The trainable parameters [n] where this learn began; None in predict."""
    clock: tuple[int, int] = (0, 0)
    """(epoch, step in the epoch), for `view`, which has no `StepView`."""
    span: tuple[int, int] = (0, 0)
    """(epochs, steps an epoch)."""


@dataclass(frozen=True)
class Row:
    """A further objective of a step: a scalar loss, its weight; `kind="constraint"` for a row that only must not be opposed."""

    loss: Tensor
    weight: float = 1.0
    kind: Literal["objective", "constraint"] = "objective"


@dataclass(eq=False)
class StepView:
    """What a verb inside the step may see.

    `theta` [n] is the flat vector of trainable parameters (a leaf for `penalty`), `start` [n] where it began this learn;
    `parts` and `raw`, `outputs` are the batches with the model's outputs before and after `outputs` verbs and task masks;
    `before(x, task)` are the outputs of the model as it was when this learn began; `clock` is (epoch, step in the epoch),
    `span` (epochs, steps an epoch); `answer(part, task)` are the outputs of that part if its task were another;
    `features(part)` are the features [B, d] of that part in eval mode, and `features_before(x, task)` those that the model
    had when this learn began (a forward pass more each).
    """

    theta: Tensor
    start: Tensor
    layout: Layout
    parts: list[Batch]
    raw: list[Tensor]
    outputs: list[Tensor]
    before: Callable[[Tensor, str | None], Tensor]
    clock: tuple[int, int]
    span: tuple[int, int]
    answer: Callable[[int, str | None], Tensor]
    features: Callable[[int], Tensor]
    features_before: Callable[[Tensor, str | None], Tensor]


@dataclass(frozen=True, eq=False)
class Beginning:
    """What `begin` may read before training on `sources`.

    `params` and `buffers` are whole, with what the model grew for these sources; `known` is what `recall` gave; `predict(x)` are the
    class probabilities [B, C] that the agent answers now, over the columns of its frame, and `experts` the modules that it
    answers with, by (sender, source); `grown` are the entries that the model grew for this very learn.
    """

    model: Model
    params: Params
    buffers: Params
    sources: tuple[Source, ...]
    known: Any
    generator: torch.Generator
    predict: Callable[[Tensor], Tensor] | None = None
    experts: Mapping[tuple[str, str], Module] = field(default_factory=dict)
    grown: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Learned:
    """What `summarise` may read after training on a source.

    `params` and `buffers` are whole; `start` are the trainable parameters when this learn began; `task` is what the model
    is given for this source; `share` is 1 / (number of sources of this learn); `generator` is keyed by seed, source and visit.
    """

    model: Model
    params: Params
    buffers: Params
    start: Params
    source: Source
    task: str | None
    layout: Layout
    generator: torch.Generator
    share: float = 1.0
    order: int = 0
    """How many learns this agent did before."""
    steps: int = 0
    """How many steps this learn took."""
    training: Training | None = None

    @property
    def trainable(self) -> Params:
        """The trainable parameters."""
        return {n: self.params[n] for n in self.layout.names}

    def sums(self, psi: Callable[[Tensor], Tensor], second: bool = True) -> dict[str, Tensor]:
        """What ridge heads, nearest means, LDA and Mahalanobis need, in float64: first = sum psi e_y^T [d, C], count [C], and
        second = sum psi psi^T [d, d], over the training data, psi(x) being [B, d]. They add over sources, batches and agents."""
        total: dict[str, Tensor] = {}
        for x, y in self.source.train.chunks(1024):
            with torch.no_grad():
                f = psi(x).double()
            hot = y.double() if self.source.kind == "value" else F.one_hot(y, len(self.source.labels)).double()
            hot = hot.to(f.device)
            part = {"second": f.T @ f} if second else {}
            part |= {"first": f.T @ hot, "count": hot.sum(0) if self.source.kind == "class" else hot.new_tensor([len(y)])}
            total = {k: total[k] + t for k, t in part.items()} if total else part
        return total


class Correction(ABC):  # noqa: B024 (every verb is optional)
    """A frozen dataclass of hyperparameters with the verbs below; each is optional and costs nothing when not overridden.

    Class attributes: `travels`, whether its items may leave the agent (they are Shared) or are Private; `flat`, groups of
    what it recalls that the step wants as flat vectors; `ends`, whether it must know where a source ends; `neutral`, the values of its fields at which it is plain training
    (it is left out of the step when all hold); `recalls`, whether it needs something known from an earlier learn to act; `constrains`, whether its
    `rows` are constraints, which need a cone as step aggregator; `widens`, whether its `view` gives entries other shapes: then it comes after all others.
    """

    travels: ClassVar[bool] = True
    flat: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, Any]] = {}
    recalls: ClassVar[bool] = False
    ends: ClassVar[bool] = False
    constrains: ClassVar[bool] = False
    widens: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The key of its items."""
        return type(self).__name__

    @property
    def active(self) -> bool:
        """Whether it differs from plain training at these hyperparameters."""
        return not self.neutral or any(getattr(self, k) != v for k, v in self.neutral.items())

    def refuse(self, facts: Facts) -> str | None:
        """Why it cannot work in such a schedule and what to do instead, or None."""
        return None

    def gather(self, sources: tuple[Source, ...], known: Any, generator: torch.Generator) -> tuple[Source, ...]:
        """What this learn trains on: the given sources (their `task` None where the model is not told), or others made from them
        and what is known. The generator draws as the one that `begin` is given."""
        return sources

    def begin(self, start: Beginning) -> tuple[Params, Mapping[str, Tensor]]:
        """Before training: params (entries may be added on the first visit, or begin elsewhere) and private tensors of this learn."""
        return start.params, {}

    def still(self, model: Model, params: Params, sources: tuple[Source, ...]) -> Collection[str]:
        """Entries that a learn of these sources never moves: they stay out of theta, and cost nothing."""
        return ()

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        """What is known at the start of a learn, or None; once per learn. Default: the sum of the statistics of all other sources."""
        names = {s.name for s in sources}
        total: Statistics | None = None
        for (_, source), item in sorted(memory.items(), key=lambda kv: (kv[0][1], kv[0][0])):
            if source not in names and isinstance(item, Statistics):
                total = item if total is None else total + item
        return total

    def caution(self, me: Me, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """What is known, laid flat (`me.flat`), settled for the training that comes; and a warning, such as of a step too long, or None."""
        return me.flat, None

    def sample(self, me: Me, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Further parts of a step (rehearsal), drawn outside the compiled step."""
        return []

    def view(self, params: Params, task: str | None, me: Me) -> Params:
        """The parameters as the model sees them, in the step and in predict."""
        return params

    def outputs(self, out: Tensor, task: str | None, me: Me) -> Tensor:
        """The outputs [B, C] as the loss sees them, and as predict does (where `me.private` is empty)."""
        return out

    def losses(self, losses: dict[int, Tensor], step: StepView, me: Me) -> dict[int, Tensor]:
        """The losses of the samples, {part: [B]}, bent."""
        return losses

    def rows(self, step: StepView, me: Me) -> list[Row]:
        """Further objectives or constraints of the step."""
        return []

    def penalty(self, step: StepView, me: Me) -> Tensor:
        """A scalar of `step.theta` whose gradient is added after the aggregator."""
        return step.theta.new_zeros(())

    def pull(self, step: StepView, me: Me) -> tuple[Tensor, float] | None:
        """The gradient of `penalty` as a vector [n] and a factor, where it is known; None leaves it to autograd.

        A subclass that has another `penalty` and no `pull` of its own is left to autograd too."""
        return None

    def mask(self, step: StepView, me: Me) -> Tensor:
        """Factors [n] on the rows before aggregation; where 0 the entry is restored after the optimiser."""
        return torch.ones_like(step.theta)

    def trace_init(self, theta: Tensor) -> dict[str, Tensor]:
        """What `trace` folds into, at the first learn of a source; traces go on over its visits."""
        return {}

    def trace(self, step: StepView, me: Me, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """The trace after a step: `grad` [n] is the aggregated gradient before penalties, `delta` [n] what moves `step.theta`."""
        return me.trace

    def summarise(self, learned: Learned, me: Me) -> Item | None:
        """What to keep of this source after training: Shared if it may travel, Private if not."""
        return None

    def heard(self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]) -> Mapping[str, Any]:
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


def says_pull(correction: Correction) -> bool:
    """Whether its `pull` is that of its `penalty`: defined in the same class, or in a later one."""
    kinds = type(correction).__mro__
    pull, penalty = (next(i for i, k in enumerate(kinds) if verb in vars(k)) for verb in ("pull", "penalty"))
    return pull <= penalty


class Viewed(Model):
    """A model seen through the views of corrections: f(view(params, task), x, task)."""

    def __init__(self, model: Model, views: Sequence[tuple[Correction, Me]]) -> None:
        self.model, self.views, self.outputs = model, tuple(views), model.outputs

    @staticmethod
    def of(model: Model, views: Sequence[tuple[Correction, Me]]) -> Model:
        """The model itself where nobody has a view."""
        return Viewed(model, views) if views else model

    def _seen(self, params: Params, task: str | None) -> Params:
        for c, me in self.views:
            params = c.view(params, task, me)
        return params

    def __call__(self, params: Params, buffers: Params, x: Tensor, task: str | None, train: bool) -> tuple[Tensor, Params]:
        return self.model(self._seen(params, task), buffers, x, task, train)

    def features(self, params: Params, buffers: Params, x: Tensor, task: str | None = None) -> Tensor:
        return self.model.features(self._seen(params, task), buffers, x, task)

    def bind(self, params: Params, buffers: Params, train: bool) -> tuple[Forward, Params]:
        held = {n: b.clone() for n, b in buffers.items()}

        def forward(x: Tensor, task: str | None) -> Tensor:
            out, new = self(params, held, x, task, train)
            held.update(new)
            return out

        return forward, held

    def init(self, generator: torch.Generator) -> tuple[Params, Params]:
        return self.model.init(generator)

    def head(self, params: Params, task: str | None) -> tuple[str, str | None]:
        return self.model.head(params, task)

    def grow(self, params: Params, buffers: Params, source: Source, generator: torch.Generator) -> tuple[Params, Params]:
        return self.model.grow(params, buffers, source, generator)

    def head_key(self, source: Source) -> str:
        return self.model.head_key(source)

    def task_of(self, entry: str) -> str | None:
        return self.model.task_of(entry)

    def frozen(self, entry: str) -> bool:
        return self.model.frozen(entry)

    @property
    def uses_task(self) -> bool:
        return True

    @property
    def has_batch_norm(self) -> bool:
        return self.model.has_batch_norm

    @property
    def draws(self) -> bool:
        return self.model.draws


def superposition(views: Sequence[Params]) -> Callable[[Tensor], Params]:
    """alpha [K] -> sum_k alpha_k views_k, entry by entry. What all views share, or only some have, is taken as it is.

    >>> a, b = {"w": torch.tensor([1.0]), "v": torch.ones(1)}, {"w": torch.tensor([3.0]), "v": torch.ones(1)}
    >>> superposition([a, b])(torch.tensor([0.5, 0.5]))
    {'w': tensor([2.]), 'v': tensor([1.])}
    """
    first = {n: p for view in reversed(views) for n, p in view.items()}
    apart = {}
    for n, p in first.items():
        own = [view[n] for view in views if n in view]
        if len(own) == len(views) and p.is_floating_point() and not all(o is p or torch.equal(o, p) for o in own):
            apart[n] = torch.stack(own)
    if not apart:
        raise ConsilienceError("views to superpose should differ by task. Found the same parameters for all.")
    return lambda alpha: {**first, **{n: torch.tensordot(alpha.to(p), p, 1) for n, p in apart.items()}}


@dataclass(frozen=True, eq=False)
class Routing:
    """What a mapper may see of a batch: inputs, and lazily the common features and each expert's class probabilities."""

    x: Tensor
    features: Callable[..., Tensor]
    """The features that all experts have in common, [B, d]: of x, or of other inputs that it is given."""
    probabilities: Callable[[], list[Tensor]]
    """[B, classes of that expert] each."""
    experts: Sequence[tuple[str, str]]
    """(sender, source) of each expert."""
    superposed: Callable[[], Callable[[Tensor, Tensor], Tensor]] | None = None
    """Gives (x [B, ...], alpha [experts]) -> the outputs [B, C] of the model whose parameters are sum_k alpha_k those that expert
    k's task sees, in eval mode; the columns of no expert are -inf. It can be differentiated in alpha."""


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
