"""Gradients of tasks while they train together: how they agree, and what a step for one does to all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.errors import ConsilienceError
from consilience.core.params import Layout, key
from consilience.core.viewed import Viewed
from consilience.engines._serial import Serial
from consilience.loop.engine import EngineEvents, Paused, Visit
from consilience.loop.job import Job

HELD = 512
"""How many validation examples a loss is measured on, at most."""


@dataclass(frozen=True)
class Reading:
    """What was measured after a step: losses [m], cosines [layers][m][m] and affinities [m][m].

    The last of the layers is all of them together. NaN where a gradient or a loss is zero.
    """

    step: int
    losses: list[float]
    cosines: list[list[list[float]]]
    affinities: list[list[float]]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Reading:
        """Return a reading from its fields, with null for NaN."""
        return cls(**_numbers(content))


def _numbers(content: Any) -> Any:
    """Return plain values with NaN for null."""
    if isinstance(content, Mapping):
        return {name: _numbers(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_numbers(value) for value in content]
    return math.nan if content is None else content


@dataclass(eq=False)
class Probe:
    """Looks at a visit at even distances, and changes nothing of it.

    At each place the gradient g_i of each task is taken on `examples` of its training examples, in eval mode,
    without the weights of a method: cos_ij = <g_i, g_j> / (|g_i| |g_j|) over entries that several tasks
    share, by layer and in all. With `looks_ahead`, the affinity of i to j is 1 - L_j(theta_i) / L_j(theta),
    theta_i being theta after one step of the run's optimiser, from rest and without decay, along g_i over the
    shared entries. Fifty et al. 2021, arXiv:2109.04617.
    """

    places: int = 10
    examples: int = 64
    looks_ahead: bool = True
    readings: dict[int, list[Reading]] = field(default_factory=dict)
    """By seed."""
    layers: tuple[str, ...] = ()
    left: dict[int, float] = field(default_factory=dict)
    """Of a visit to one task, by seed: its held-out loss, as a fraction of that before training."""

    def __call__(self, job: Job) -> None:
        """Measure after a step, if it is one of the places."""
        total = math.prod(job.step.horizon)
        count = min(self.places, total)
        places = {1 + round(k * (total - 1) / max(1, count - 1)) for k in range(count)}
        # A seed begins again, also where the run before it was interrupted.
        if job.steps == 1:
            self.readings[job.seed] = []
        if job.steps not in places and job.steps != total:
            return

        # One task has no pairs; the loss that is left says how difficult it is.
        if len(job.parts) == 1:
            before = held_loss(job, job.step.start, job.step.start_buffers)
            now = held_loss(job, job.carry.theta, job.carry.buffers)
            self.left[job.seed] = now / before if before > 0 else math.nan
            return
        self.readings[job.seed].append(self.read(job))

    def read(self, job: Job) -> Reading:
        """Measure the losses, cosines and affinities of all tasks now."""
        batches = [self._batch(job, part) for part in range(len(job.parts))]
        theta, common = job.carry.theta.detach(), common_elements(job)
        pairs = [gradient_of(job, theta, batch) for batch in batches]
        losses = torch.stack([loss for loss, _ in pairs])
        grads = torch.stack([grad for _, grad in pairs]) * common

        # Inner products add up over entries, so those of a layer and of all are sums.
        spans = layers_of(job.layout, common)
        self.layers = (*spans, "all")
        grams = [torch.stack([gram_of(grads[:, span]) for span in own]).sum(0) for own in spans.values()]
        # A model without common entries has no layers, and all its cosines are NaN.
        everything = torch.stack([gram_of(grads[:, :0]), *grams]).sum(0)
        ahead = look_ahead(job, batches, losses, grads) if self.looks_ahead else []
        return Reading(job.steps, losses.tolist(), [cosines_of(gram) for gram in (*grams, everything)], ahead)

    def _batch(self, job: Job, number: int) -> Batch:
        """Draw training examples of one task, keyed by seed and step."""
        part = job.parts[number]
        # Not by task, so that tasks on the same inputs are compared on the same examples.
        generator = key(job.seed, job.steps, "probe")
        index = torch.randperm(len(part.examples), generator=generator)[: self.examples]
        x, y = next(iter(part.examples.batches([index])))
        return Batch(x, y, part.task, source=part.source.name, target=part.source.target)


@dataclass(frozen=True, eq=False)
class Probing(Serial):
    """The serial engine, with a probe that looks at each job after its steps."""

    probe: Probe = field(default_factory=Probe)

    def train(self, visits: Sequence[Visit], events: EngineEvents, paused: Paused | None = None) -> None:
        """Train the agents in order."""

        def tick(job: Job | None) -> None:
            if job is not None:
                self.probe(job)
            events.tick(job)

        super().train(visits, replace(events, tick=tick), paused)


def loss_of(job: Job, theta: Tensor, part: Batch, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the mean loss of a batch at parameters theta [n], in eval mode; differentiable in theta."""
    # Not by the step's own forward pass, which would move buffers and draw random numbers.
    step = job.step
    params = {**step.fixed, **step.layout.split(theta)}
    model = Viewed.of(step.model, step.by_verb["view"])
    given = dict(step.carry.buffers if buffers is None else buffers)
    out = model(params, given, part.x, part.task, False)[0]
    return step.target(part).mean(step.masked(out, part), part.y, part.w)


def gradient_of(job: Job, theta: Tensor, part: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch at theta [n], and its gradient [n]."""
    leaf = theta.clone().requires_grad_()
    loss = loss_of(job, leaf, part)
    (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(theta) if grad is None else grad


@torch.no_grad()
def look_ahead(job: Job, batches: Sequence[Batch], losses: Tensor, grads: Tensor) -> list[list[float]]:
    """Return the affinities [m][m]: row i says what a step along gradient i does to the loss of each task."""
    training, theta = job.training, job.carry.theta
    # Decay and momentum would move theta alike for all tasks.
    optimiser, rate = replace(training, weight_decay=0.0, decay=None).inner().at(job.last_rate)
    found = []
    for grad in grads:
        # Entries of single tasks stay, or the step would say nothing about sharing.
        direction, _ = optimiser.update(grad, optimiser.init(theta), theta)
        moved = theta - rate * direction * (grad != 0)
        after = torch.stack([loss_of(job, moved, batch) for batch in batches])
        found.append((1 - after / losses).nan_to_num(math.nan, math.nan, math.nan).tolist())
    return found


@torch.no_grad()
def held_loss(job: Job, theta: Tensor, buffers: Mapping[str, Tensor]) -> float:
    """Return the loss of a visit's first task on validation examples; on training ones without any."""
    part = job.parts[0]
    examples = part.source.validation if len(part.source.validation) else part.examples
    index = torch.arange(min(HELD, len(examples)))
    x, y = next(iter(examples.to(job.layout.device, job.layout.dtype).batches([index])))
    return float(loss_of(job, theta, Batch(x, y, part.task, target=part.source.target), buffers))


def common_elements(job: Job) -> Tensor:
    """Return which elements [n] the losses of several tasks may reach.

    Entries of one task are left out, and so are the rows of a common linear head that only one task reads.
    """
    step = job.step
    found = torch.zeros(job.layout.size, dtype=torch.bool, device=job.layout.device)
    for span in step.shared.values():
        found[span] = True

    counts = torch.zeros(step.model.outputs, dtype=torch.long)
    for part in job.parts:
        target = step.target(Batch(torch.zeros(0), torch.zeros(0), part.task, target=part.source.target))
        own = step.frame.within(target, part.task) if target.kind == "class" else target.columns
        counts[list(range(step.model.outputs) if own is None else own)] += 1

    # Only a common head has rows that are read by one task.
    try:
        names = step.model.head({**step.fixed, **step.layout.split(step.carry.theta)}, None)
    except ConsilienceError:
        # Heads of tasks are no common entries anyway.
        return found
    for name in names:
        if name in step.layout.names and step.model.task_of(name) is None:
            rows = step.layout.split(found)[name]
            if len(rows) == len(counts):
                rows[counts < 2] = False
    return found


def layers_of(layout: Layout, common: Tensor) -> dict[str, list[slice]]:
    """Return where each layer with common elements lies in theta. A layer is a module with its entries."""
    found: dict[str, list[slice]] = {}
    for name in sorted(layout.names, key=natural):
        if bool(common[layout.span(name)].any()):
            found.setdefault(name.rpartition(".")[0] or name, []).append(layout.span(name))
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names by value.

    >>> sorted(["net.10", "net.9"], key=natural)
    ['net.9', 'net.10']
    """
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]


def gram_of(rows: Tensor) -> Tensor:
    """Return the inner products [m, m] of rows [m, n], in float64."""
    wide = rows.double()
    return wide @ wide.T


def cosines_of(gram: Tensor) -> list[list[float]]:
    """Return the cosines of rows with these inner products; NaN with a row of zeros."""
    norms = gram.diagonal().sqrt()
    # Rounding may bring a cosine just above 1.
    found = (gram / torch.outer(norms, norms)).clamp(-1, 1)
    return [[float(value) for value in row] for row in found.tolist()]
