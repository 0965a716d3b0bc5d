"""What the verbs of a correction read, and what some of them return."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.losses import DEFAULTS
from consilience.core.message import Item, Module
from consilience.core.model import Model
from consilience.core.outliers import check_features
from consilience.core.params import Layout, Params
from consilience.core.source import LabelFrame, Source, Target
from consilience.core.tree import Input

if TYPE_CHECKING:
    from consilience.core.training import Training

Memory = Mapping[tuple[str, str], Item]
"""The items of one correction by (sender, source): received ones, and this agent's own under its name."""


@dataclass(eq=False)
class Context:
    """What belongs to one correction during one visit: what it recalls, keeps private, and traces.

    In prediction a new context has `recalled` and `model` only.
    """

    recalled: Any = None
    """What `recall` returned."""
    private: Mapping[str, Tensor] = field(default_factory=dict)
    """What `begin` returned as private."""
    trace: dict[str, Tensor] = field(default_factory=dict)
    """What `trace` returned after the last step, or `trace_init` before the first."""
    flat: dict[str, Tensor] = field(default_factory=dict)
    """Vectors [n] for the steps: the groups of `recalled` that the class attribute `flat` names; after
    `prepare_step`, what that returned."""
    model: Model | None = None
    """The model, to ask which entries are what (`task_of`, `frozen`, `head`)."""
    layout: Layout | None = None
    """Where each trainable entry lies in theta; None in prediction, and before `prepare_step`."""
    start: Tensor | None = None
    """theta [n] at the start of the visit; None in prediction, and before `prepare_step`."""
    parts: tuple[str, ...] = ()
    """For `trace_init`: the names of the sources that each step has a part of, in their order."""
    sizes: tuple[int, ...] = ()
    """For `trace_init`: the number of training examples of each of these parts."""
    clock: tuple[int, int] = (0, 0)
    """(epoch, step in the epoch), for `view`, which has no `StepView`."""
    horizon: tuple[int, int] = (0, 0)
    """(epochs, steps per epoch) of the visit."""

    @property
    def theta(self) -> Tensor:
        """theta [n] at the start of the visit, where there is one: in training, after `prepare_step`."""
        assert self.start is not None
        return self.start


@dataclass(frozen=True)
class Row:
    """A further objective or constraint of a step, as `rows` returns it."""

    loss: Tensor
    """A scalar."""
    weight: float = 1.0
    """Of the objective; the batches of a visit to one source have weight 1 together."""
    kind: Literal["objective", "constraint"] = "objective"
    """A constraint is a loss that the step must not increase, but need not decrease."""
    part: int | None = None
    """The part of the step over whose samples the loss is a mean; None: over those of all sources.

    With `Training.accumulate` a micro-batch counts by its share of these samples."""


@dataclass(eq=False)
class StepView:
    """What the verbs read of one step.

    Engines that stack agents give `clock` and `horizon` as tensors in float64.
    """

    theta: Tensor
    """The trainable parameters [n]; for `penalty` a leaf, so that it can be differentiated."""
    start: Tensor
    """theta at the start of the visit [n]."""
    layout: Layout
    """Where each entry lies in theta."""
    parts: list[Batch]
    """The batches: one per source of the visit, then those of `sample`."""
    raw: list[Tensor]
    """The model's outputs [B, C, *places] for each part."""
    outputs: list[Tensor]
    """The same, with -inf in the columns of other tasks where the task is known."""
    before: Callable[[Input, str | None], Tensor]
    """before(x, task): outputs [B, C] of the model as it was at the start of the visit, without gradient."""
    clock: tuple[int, int]
    """(epoch, step in the epoch)."""
    horizon: tuple[int, int]
    """(epochs, steps per epoch) of the visit."""
    targets: list[Target]
    """What the targets of each part are."""
    answer: Callable[[int, str | None], Tensor]
    """answer(part, task): outputs [B, C] of that part for another task. A forward pass."""
    features: Callable[[int], Tensor]
    """features(part): features [B, d] of that part in eval mode. A forward pass."""
    features_before: Callable[[Input, str | None], Tensor]
    """features_before(x, task): as `features`, of the model at the start of the visit, without gradient."""
    entries: Params
    """The trainable entries by name, which `losses` and `rows` may differentiate: what `begin` added."""
    losses: Callable[[], Tensor]
    """losses(): the mean loss of each part [parts], without gradient, before corrections change it; NaN for a
    part that has no target in this step."""
    grams: Mapping[str, Tensor] | None = None
    """For `trace`: the inner products [parts, parts] of the gradients of the parts over each shared entry, as
    those of `norms`; None where `norms` is."""
    norms: Tensor | None = None
    """For `trace`: the L2 norm over shared entries of the gradient of each part [parts], with the factors of
    `losses` and without weights; None unless a correction has `needs_norms`, or an aggregator the rows, and
    in a step that is left out for numbers that are not finite ("fp16")."""


@dataclass(frozen=True, eq=False)
class Beginning:
    """What `begin` may read before training on `sources`."""

    model: Model
    params: Params
    """All parameters, with the entries that the model grew for these sources."""
    buffers: Params
    """All buffers."""
    sources: tuple[Source, ...]
    """The sources of the visit; `gather` may have made others of them to train on."""
    recalled: Any
    """What `recall` returned."""
    generator: torch.Generator
    """Keyed by seed, first source, number of visits, and the name of the correction."""
    predict: Callable[[Input], Tensor] | None = None
    """predict(x): class probabilities [B, C] of this agent now, over the columns of its frame."""
    experts: Mapping[tuple[str, str], Module] = field(default_factory=dict)
    """The modules that the agent predicts with, by (sender, source)."""
    grown: frozenset[str] = frozenset()
    """The entries that the model grew for this visit."""
    frame: LabelFrame | None = None
    """What the output columns and the targets of all tasks mean."""


class Begun(NamedTuple):
    """What `begin` returns.

    Frozen entries are left out of theta and of the optimiser's state, so that they cost nothing in a step.
    """

    params: Params
    """All parameters to train from."""
    private: Mapping[str, Tensor] = MappingProxyType({})
    """Tensors for this visit only, as `ctx.private`."""
    frozen: Collection[str] = ()
    """Names of entries that this visit leaves as they are."""


@dataclass(frozen=True, eq=False)
class Learned:
    """What `summarise` may read after training on a source."""

    model: Model
    """The model, seen through the views of all corrections."""
    params: Params
    """All parameters after the visit."""
    buffers: Params
    """All buffers after the visit."""
    start: Params
    """The trainable parameters at the start of the visit."""
    source: Source
    """The source, with its training examples on the device."""
    task: str | None
    """What the model is given as task for this source."""
    layout: Layout
    """Where each trainable entry lies in theta."""
    generator: torch.Generator
    """Keyed by seed, source, visit, and the name of the correction."""
    share: float = 1.0
    """1 / (number of sources of this visit)."""
    order: int = 0
    """The number of earlier visits of this agent, to any source."""
    steps: int = 0
    """The number of steps of this visit."""
    training: Training | None = None
    """The hyperparameters of the visit."""
    frame: LabelFrame | None = None
    """What the output columns and the targets of all tasks mean; None: those of this source alone."""

    @property
    def trainable(self) -> Params:
        """The trainable parameters after the visit."""
        return {name: self.params[name] for name in self.layout.names}

    @property
    def target(self) -> Target:
        """What the targets of the source are."""
        return self.target_of(self.source.target)

    def target_of(self, key: str) -> Target:
        """Return what the targets under a key of `LabelFrame.targets` are."""
        if self.frame is None:
            kind = self.source.kind
            return Target(kind, DEFAULTS[kind], complete=False)
        return self.frame.targets[key]

    @property
    def columns(self) -> tuple[int, ...] | None:
        """The output columns in which the classes of the source compete; None: all."""
        if self.frame is not None:
            return self.frame.within(self.target, self.task)
        return self.source.classes if self.task is not None and self.source.kind == "class" else None

    def sums(self, psi: Callable[[Input], Tensor], second: bool = True) -> dict[str, Tensor]:
        """Return sums over the training data in float64, for features psi(x) [B, d] and one-hot targets e_y.

        first = sum psi e_y^T [d, C]; count [C]; second = sum psi psi^T [d, d]. They are what ridge heads,
        nearest means, LDA and Mahalanobis need, and they add over sources, batches and agents. For values,
        e_y is the target itself. Samples without a target are left out.
        """
        total: dict[str, Tensor] = {}
        values, classes = self.source.kind == "value", len(self.source.labels)
        # In float64, so that sums of many agents do not depend on how the data was cut.
        for x, y, rows in self.source.labelled(1024):
            with torch.no_grad():
                features = psi(x).double()
            check_features(features, rows, self.source.name)
            targets = (y.double() if values else F.one_hot(y, classes).double()).to(features.device)
            part = {"second": features.T @ features} if second else {}
            part["first"] = features.T @ targets
            part["count"] = targets.new_tensor([len(y)]) if values else targets.sum(0)
            # Chunks of the same size on every device, so that the sums have the same order everywhere.
            total = {name: total[name] + tensor for name, tensor in part.items()} if total else part
        return total


@dataclass(frozen=True, eq=False)
class Routing:
    """What a mapper may read of a batch. All but the inputs is computed when it is asked for."""

    x: Input
    """The inputs [B, ...]."""
    features: Callable[..., Tensor]
    """features(): features [B, d] that all experts have in common; features(other): those of other inputs."""
    probabilities: Callable[[], list[Tensor]]
    """probabilities(): for each expert its class probabilities [B, classes of that expert]."""
    experts: Sequence[tuple[str, str]]
    """(sender, source) of each expert."""
    superposed: Callable[[], Callable[[Input, Tensor], Tensor]] | None = None
    """superposed(): a function of x [B, ...] and alpha [experts].

    It gives the outputs [B, C] of the model with parameters sum_k alpha_k view_k, where view_k is what expert
    k's task sees, in eval mode. Columns of no expert are -inf. It is differentiable in alpha."""
