"""Consolidating by distillation: the average of the received models is trained on their joint outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, kind_of
from consilience.core.message import Message, Shared
from consilience.core.model import MISFITS, Model
from consilience.core.optimiser import SGD, Adam
from consilience.core.params import Layout, Params, computing, content_hash
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import Examples, Source
from consilience.core.state import State
from consilience.core.tree import Input, Tree, as_input, cast_to, named, tensors_of
from consilience.core.weight_space import WeightSpace, with_weights

CHUNK = 1024
"""Inputs per forward pass without gradients."""


def inputs(unlabelled: Any) -> Input:
    """Return the inputs [N, ...] of a source, of examples, of a tensor or array, or of several by name."""
    if isinstance(unlabelled, Source):
        unlabelled = unlabelled.train
    if isinstance(unlabelled, Examples):
        return unlabelled.whole()[0]
    if isinstance(unlabelled, Tree | Mapping | tuple):
        return as_input(unlabelled, "`unlabelled`")
    try:
        return torch.as_tensor(unlabelled)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ConsilienceError(
            f"`unlabelled` must be inputs [N, ...] or a source, got {kind_of(unlabelled)}."
        ) from e


def _over_places(each: Tensor, inputs: Input) -> Tensor:
    """Return the mean of values [B] or [B, *places]; padding of ragged inputs does not count."""
    there = None if isinstance(inputs, Tensor) else inputs.there()
    if there is None or each.shape != there.shape:
        return each.mean()
    return each[there].mean()


def _is_finite(inputs: object) -> bool:
    """Whether these are inputs [N, ...], at least one, without NaN and infinity."""
    if not isinstance(inputs, Tensor | Tree) or (isinstance(inputs, Tensor) and inputs.dim() < 2):
        return False
    return len(inputs) > 0 and all(bool(part.isfinite().all()) for part in tensors_of(inputs).values())


@dataclass(frozen=True)
class Distillation(WeightSpace):
    """theta <- the average (`WeightSpace`), then steps on T^2 KL(softmax(z / T) || softmax(f(theta, u) / T)).

    z is the mean over the received models of their logits on unlabelled inputs u, and the KL is a mean over
    places where there are several; `of` "probabilities" averages softmax(z_k / T) in its place. All received
    models count equally, in eval mode, without the views of corrections. Batches are shuffled passes over u,
    seeded by the exchange; buffers are the averages. No step is taken if the average already gives the mean
    output up to rounding error (Adam would magnify it), or if no sender trained since it last received (a
    server that broadcasts). Lin et al. 2020 (FedDF: Adam, lr .001, up to 10,000 steps).
    """

    kinds: ClassVar[tuple[str, ...]] = ("class",)

    unlabelled: Input | None = field(default=None, compare=False, repr=False)
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
        unlabelled = self.unlabelled
        if not _is_finite(unlabelled):
            got = (
                f"shape {tuple(unlabelled.shape)}" if isinstance(unlabelled, Tensor) else kind_of(unlabelled)
            )
            raise ConsilienceError(f"`unlabelled` must be finite inputs [N, ...], at least one, got {got}.")

        for name, low in (("steps", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConsilienceError(f"`{name}` must be a whole number >= {low}, got {value!r}.")
        for name in ("rate", "temperature"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConsilienceError(f"`{name}` must be positive and finite, got {value}.")
        for name, choices in (("of", ("logits", "probabilities")), ("optimiser", ("adam", "sgd"))):
            value = getattr(self, name)
            if value not in choices:
                raise ConsilienceError(f"`{name}` must be {' or '.join(choices)}, got {value!r}.")

        # Two consolidators are equal, and a run may be resumed, if their inputs have one hash.
        assert unlabelled is not None
        object.__setattr__(self, "content", content_hash(named("u", unlabelled)))

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.exchanges and facts.most_received < 2:
            return (
                "it distils the joint output of several models, and one is received at a time; use fedavg, "
                "or lwf to distil while training"
            )
        if facts.model is not None:
            if facts.model.uses_task:
                return (
                    "models with heads of several tasks have no outputs in common; use one with a shared "
                    "head, such as mlp"
                )

            # Whether the inputs fit shows only in a forward pass: models do not declare their input's shape.
            assert self.unlabelled is not None
            params, buffers = facts.model.init(torch.Generator().manual_seed(0))
            like = computing(params)
            try:
                one = cast_to(self.unlabelled[:1], like.device, like.dtype)
                facts.model(params, buffers, one, None, False)
            except MISFITS as error:
                return (
                    f"`unlabelled` must fit the model's input, got inputs {tuple(self.unlabelled.shape[1:])} "
                    f"({str(error).partition(chr(10))[0][:120]})"
                )
        return super().refuse(facts)

    def receive(
        self, model: Model, state: State, fresh: Sequence[Message], by_size: bool, generator: torch.Generator
    ) -> State:
        new = super().receive(model, state, fresh, by_size, generator)
        received = [m.items["model"] for m in with_weights(fresh)]
        names = {n for weights in received for n in weights.group("params")}
        taught = {
            n: p
            for n, p in new.params.items()
            if n in names and p.is_floating_point() and not model.frozen(n)
        }
        # A broadcast holds no new models to learn from.
        if not any(m.trained for m in fresh) or not self.steps or not taught:
            return new

        layout = Layout.of(taught)
        assert self.unlabelled is not None
        unlabelled = cast_to(self.unlabelled, layout.device, layout.dtype)
        target = self._targets(model, state, received, unlabelled)

        # Adam's first steps have length lr even for a gradient of rounding errors: without a difference none
        # is taken.
        now = self._logits(model, new.params, new.buffers, unlabelled).softmax(1)
        if float((now - target).abs().max()) <= 100 * torch.finfo(layout.dtype).eps:
            return new
        theta = self._steps(model, new, layout, unlabelled, target, generator)
        return new.change(params={**new.params, **layout.split(theta)})

    def _logits(self, model: Model, params: Params, buffers: Params, unlabelled: Input) -> Tensor:
        """Compute logits [N, C] divided by the temperature, without gradients."""
        with torch.no_grad():
            outs = [model(params, buffers, inputs, None, False)[0] for inputs in unlabelled.split(CHUNK)]
            return torch.cat(outs) / self.temperature

    def _targets(self, model: Model, state: State, received: Sequence[Shared], unlabelled: Input) -> Tensor:
        """Compute the teachers' mean probabilities [N, C] at the temperature."""
        device = unlabelled.device
        total: Tensor | None = None
        for weights in received:
            # Entries that a sender did not send, such as personal ones, are the receiver's.
            params = {n: p.to(device) for n, p in {**state.params, **weights.group("params")}.items()}
            buffers = {n: b.to(device) for n, b in {**state.buffers, **weights.group("buffers")}.items()}
            out = self._logits(model, params, buffers, unlabelled)
            out = out if self.of == "logits" else out.softmax(1)
            total = out if total is None else total + out
        assert total is not None
        mean = total / len(received)
        return mean.softmax(1) if self.of == "logits" else mean

    def _steps(
        self,
        model: Model,
        state: State,
        layout: Layout,
        unlabelled: Input,
        target: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Train the parameters of the layout towards the targets; return them as one vector."""
        optimiser, theta = Adam() if self.optimiser == "adam" else SGD(), layout.flatten(state.params)
        held, order = optimiser.init(theta), torch.zeros(0, dtype=torch.long)
        with torch.enable_grad():
            for _ in range(self.steps):
                if not len(order):
                    order = torch.randperm(len(unlabelled), generator=generator)
                batch, order = order[: self.batch_size].to(unlabelled.device), order[self.batch_size :]
                leaf = theta.detach().requires_grad_()
                params = {**state.params, **layout.split(leaf)}
                inputs = unlabelled[batch]
                out = model(params, state.buffers, inputs, None, False)[0]

                # The cross-entropy is KL plus the entropy of the targets, which has no gradient.
                log = (out / self.temperature).log_softmax(1)
                each = (target[batch] * log).sum(1)
                loss = -(self.temperature**2) * _over_places(each, inputs)
                grad = torch.autograd.grad(loss, leaf)[0]
                direction, held = optimiser.update(grad, held, theta)
                theta = theta - self.rate * direction
        return theta
