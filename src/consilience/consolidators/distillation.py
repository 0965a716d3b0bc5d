"""Consolidating by distillation: the hearer's average learns what those that it heard answer together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.message import Message, Weights
from consilience.core.model import Model
from consilience.core.optimiser import SGD, Adam
from consilience.core.params import Layout, Params, content_hash
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Examples, Source
from consilience.core.state import State
from consilience.core.weight_space import WeightSpace

CHUNK = 1024


def inputs(unlabelled: Any) -> Tensor:
    """The inputs [N, ...] of a source or examples, or a tensor or an array of such."""
    if isinstance(unlabelled, Source):
        unlabelled = unlabelled.train
    if isinstance(unlabelled, Examples):
        return unlabelled.whole()[0]
    try:
        return torch.as_tensor(unlabelled)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ConsilienceError(
            f"`unlabelled` should be inputs [N, ...] or a source. Found {kind_of(unlabelled)}."
        ) from e


@dataclass(frozen=True)
class Distillation(WeightSpace):
    """theta <- the average (`WeightSpace`), then steps on T^2 KL(softmax(z / T) || softmax(f(theta, u) / T)), z the mean over the
    models heard of their logits on unlabelled inputs u.

    `of` "probabilities" averages softmax(z_k / T) in its place. All models heard count equally, in eval mode, as they are: without
    the views of corrections. Batches are shuffled passes over u, seeded by the hearer's absorption; buffers are the averages.
    Where the average answers as they do together, up to rounding, there is nothing to teach (Adam would magnify the rounding), nor
    where nobody learned since it absorbed (a server tells its clients). Lin et al. 2020 (FedDF: Adam, lr .001, up to 10,000 steps).
    """

    unlabelled: Tensor | None = field(default=None, compare=False, repr=False)
    steps: int = 100
    rate: float = 0.001
    batch_size: int = 32
    temperature: float = 1.0
    of: Literal["logits", "probabilities"] = "logits"
    optimiser: Literal["adam", "sgd"] = "adam"
    content: str = field(default="", init=False)
    """The hash of the inputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        u = self.unlabelled
        if (
            not isinstance(u, Tensor)
            or u.ndim < 2
            or not len(u)
            or (u.is_floating_point() and not u.isfinite().all())
        ):
            found = f"shape {tuple(u.shape)}" if isinstance(u, Tensor) else kind_of(u)
            raise ConsilienceError(
                f"`unlabelled` should be finite inputs [N, ...], at least one. Found {found}."
            )
        for name, low in (("steps", 0), ("batch_size", 1)):
            v = getattr(self, name)
            if isinstance(v, bool) or not isinstance(v, int) or v < low:
                raise ConsilienceError(f"`{name}` should be a whole number >= {low}. Found `{name} = {v!r}`.")
        for name in ("rate", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConsilienceError(
                    f"`{name}` should be positive and finite. Found `{name} = {getattr(self, name)}`."
                )
        if self.of not in ("logits", "probabilities"):
            raise ConsilienceError(f"`of` should be logits or probabilities. Found `of = {self.of!r}`.")
        if self.optimiser not in ("adam", "sgd"):
            raise ConsilienceError(
                f"`optimiser` should be adam or sgd. Found `optimiser = {self.optimiser!r}`."
            )
        object.__setattr__(self, "content", content_hash({"u": u}))

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.kind == "value":
            return "it distils class probabilities, and the targets are values; use fedavg"
        if facts.exchanges and facts.most_received < 2:
            return "it teaches what several models answer together, and one is heard at a time; use fedavg, or lwf for the learner"
        if facts.model is not None:
            if facts.model.uses_task:
                return "models with heads of several tasks have no outputs in common; use one with a shared head, such as mlp"
            assert self.unlabelled is not None
            try:
                facts.model(
                    *facts.model.init(torch.Generator().manual_seed(0)),
                    self.unlabelled[:1].float(),
                    None,
                    False,
                )
            except (RuntimeError, ValueError, IndexError):
                return f"`unlabelled` should fit the model's input. Found inputs {tuple(self.unlabelled.shape[1:])}"
        return super().refuse(facts)

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        new = super().receive(model, state, fresh, by_size, generator)
        heard = [m.items["model"] for m in fresh if isinstance(m.items.get("model"), Weights)]
        names = {n for w in heard for n in w.group("params")}
        taught = {
            n: p
            for n, p in new.params.items()
            if n in names and p.is_floating_point() and not model.frozen(n)
        }
        if not any(m.trained for m in fresh) or not self.steps or not taught:
            return new
        layout = Layout.of(taught)
        u = self.unlabelled
        assert u is not None
        u = u.to(layout.device, layout.dtype if u.is_floating_point() else u.dtype)
        target = self._targets(model, state, heard, u)
        with torch.no_grad():
            outs = [
                model(new.params, new.buffers, x, None, False)[0] / self.temperature for x in u.split(CHUNK)
            ]
        if float((torch.cat(outs).softmax(1) - target).abs().max()) <= 100 * torch.finfo(layout.dtype).eps:
            return new
        theta = self._steps(model, new, layout, u, target, generator)
        return new.change(params={**new.params, **layout.split(theta)})

    def _targets(self, model: Model, state: State, heard: Sequence[Any], u: Tensor) -> Tensor:
        """The teachers' probabilities [N, C] at the temperature."""
        total: Tensor | None = None
        for w in heard:
            params: Params = {n: p.to(u.device) for n, p in {**state.params, **w.group("params")}.items()}
            buffers: Params = {n: b.to(u.device) for n, b in {**state.buffers, **w.group("buffers")}.items()}
            with torch.no_grad():
                out = (
                    torch.cat([model(params, buffers, x, None, False)[0] for x in u.split(CHUNK)])
                    / self.temperature
                )
            out = out if self.of == "logits" else out.softmax(1)
            total = out if total is None else total + out
        assert total is not None
        mean = total / len(heard)
        return mean.softmax(1) if self.of == "logits" else mean

    def _steps(
        self,
        model: Model,
        state: State,
        layout: Layout,
        u: Tensor,
        target: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        optimiser, theta = Adam() if self.optimiser == "adam" else SGD(), layout.flatten(state.params)
        held, order = optimiser.init(theta), torch.zeros(0, dtype=torch.long)
        with torch.enable_grad():
            for _ in range(self.steps):
                if not len(order):
                    order = torch.randperm(len(u), generator=generator)
                batch, order = order[: self.batch_size].to(u.device), order[self.batch_size :]
                leaf = theta.detach().requires_grad_()
                out = model({**state.params, **layout.split(leaf)}, state.buffers, u[batch], None, False)[0]
                log, p = (out / self.temperature).log_softmax(1), target[batch]
                loss = -(self.temperature**2) * (p * log).sum(1).mean()  # KL up to the teachers' own entropy
                grad = torch.autograd.grad(loss, leaf)[0]
                direction, held = optimiser.update(grad, held, theta)
                theta = theta - self.rate * direction
        return theta
