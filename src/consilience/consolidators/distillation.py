"""Consolidating by distillation: the average of the received models is trained on their joint outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from consilience.consolidators._distil import Steps, descend, is_rounding
from consilience.core.errors import ConsilienceError
from consilience.core.message import Message, Shared
from consilience.core.model import MISFITS, Model
from consilience.core.params import Layout, Params, computing, content_hash
from consilience.core.schedule import ScheduleFacts
from consilience.core.source import checked_inputs
from consilience.core.state import State
from consilience.core.synthetic import CHUNK
from consilience.core.tree import Input, cast_to, named
from consilience.core.weight_space import WeightSpace, with_weights


def _over_places(each: Tensor, inputs: Input) -> Tensor:
    """Return the mean of values [B] or [B, *places]; padding of ragged inputs does not count."""
    there = None if isinstance(inputs, Tensor) else inputs.there()
    if there is None or each.shape != there.shape:
        return each.mean()
    return each[there].mean()


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
        unlabelled = checked_inputs(self.unlabelled, "unlabelled")
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

        now = self._logits(model, new.params, new.buffers, unlabelled).softmax(1)
        if is_rounding(now, target):
            return new

        def loss(params: Params, batch: Tensor, step: int) -> Tensor:
            inputs = unlabelled[batch]
            out = model(params, new.buffers, inputs, None, False)[0]
            # The cross-entropy is KL plus the entropy of the targets, which has no gradient.
            log = (out / self.temperature).log_softmax(1)
            return -(self.temperature**2) * _over_places((target[batch] * log).sum(1), inputs)

        steps = Steps(self.steps, self.rate, self.batch_size, self.optimiser)
        theta = descend(loss, new.params, layout, len(unlabelled), steps, generator)
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
