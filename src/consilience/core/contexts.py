"""What the verbs of a correction see, and what some of them return."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.message import Item, Module
from consilience.core.model import Model
from consilience.core.params import Layout, Params
from consilience.core.source import Source

if TYPE_CHECKING:
    from consilience.core.training import Training

Memory = Mapping[tuple[str, str], Item]
"""The items of one correction by (sender, source): shared ones from the bank, private ones under its agent's own name."""


@dataclass(eq=False)
class Context:
    """A correction's own things during one learn: what it knows (from `recall`), keeps private (from `begin`), and traces."""

    recalled: Any = None
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
    horizon: tuple[int, int] = (0, 0)
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
    `horizon` (epochs, steps an epoch); `answer(part, task)` are the outputs of that part if its task were another;
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
    horizon: tuple[int, int]
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
    recalled: Any
    generator: torch.Generator
    predict: Callable[[Tensor], Tensor] | None = None
    experts: Mapping[tuple[str, str], Module] = field(default_factory=dict)
    grown: frozenset[str] = frozenset()


class Begun(NamedTuple):
    """What `begin` returns: parameters, private tensors of this visit, and names of entries that it never moves.

    Frozen entries are left out of theta and of the optimiser state, so they cost nothing in a step.
    """

    params: Params
    private: Mapping[str, Tensor] = MappingProxyType({})
    frozen: Collection[str] = ()


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
            hot = (
                y.double() if self.source.kind == "value" else F.one_hot(y, len(self.source.labels)).double()
            )
            hot = hot.to(f.device)
            part = {"second": f.T @ f} if second else {}
            part |= {
                "first": f.T @ hot,
                "count": hot.sum(0) if self.source.kind == "class" else hot.new_tensor([len(y)]),
            }
            total = {k: total[k] + t for k, t in part.items()} if total else part
        return total


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
