"""Divergence: training whose numbers are no longer finite, or whose loss grew beyond use, is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.core.errors import ConsilienceError, Diverged
from consilience.core.message import Statistics
from consilience.core.params import all_finite
from consilience.core.warning import warn

if TYPE_CHECKING:
    from consilience.loop.job import Job

GREW = 100.0
"""How many times a loss must have grown to be warned about; losses below 1 count as 1."""


def check_step(job: Job) -> None:
    """Raise Diverged where the parameters or the loss are not finite; it looks at some of the steps."""
    if not job.step.measures:
        return
    loss = None if job.step.loss is None or not job.counts_loss else float(job.step.loss)
    if loss is not None:
        job.first = loss if job.first is None else job.first
        job.peak = loss if job.peak is None else max(job.peak, loss)

    # A sum may overflow where all terms are finite, which `check_visit` sees.
    if not (math.isfinite(job.carry.theta.sum()) and math.isfinite(loss or 0.0)):
        check_visit(job)


def explain(job: Job, error: ConsilienceError) -> None:
    """Raise Diverged in the place of an error of a step whose losses are not finite, before it moves."""
    bad = [name for name, loss in job.step.each if not math.isfinite(loss)] if job.counts_loss else []
    if bad:
        names = ", ".join(map(repr, dict.fromkeys(bad)))
        raise _diverged(job, f"the training loss of {names}", job.steps + 1) from error


def check_visit(job: Job) -> None:
    """Raise Diverged where anything that the visit has changed is not finite."""
    step, carry = job.step, job.carry
    bad = job.figures.first_bad() if job.counts_loss else None
    if bad is not None:
        raise _diverged(job, f"the training loss of {', '.join(map(repr, bad[1]))}", bad[0])
    if job.counts_loss and step.loss is not None and not torch.isfinite(step.loss):
        raise _diverged(job, "the training loss")
    _check(job, job.layout.split(carry.theta), "")

    # A model may have buffers that are infinite from the start, such as masks of attention.
    moved = dict(job.moving_buffers())
    finite = {name: moved[name] for name in moved if torch.isfinite(step.start_buffers[name]).all()}
    _check(job, finite, "the buffer ")
    _check(job, carry.optimiser, "the optimiser's ")
    for correction, ctx in job.corrections:
        _check(job, ctx.trace, f"the trace of {correction.name}, ")


def check_statistics(job: Job, name: str, item: object) -> None:
    """Raise Diverged where the sums that a correction made of a source are not finite."""
    # Other items may have NaN, such as samples without a target.
    if isinstance(item, Statistics):
        _check(job, item.tensors, f"the statistic of {name}, ")


def _check(job: Job, tensors: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise _diverged(job, f"{what}{name!r}")


def warn_of_growth(job: Job, warned: set[str]) -> None:
    """Warn, once per run, of a visit whose loss grew a hundredfold and ended no better than it began."""
    if job.peak is None or job.first is None or job.step.loss is None or KEY in warned:
        return
    first, last = job.first, float(job.step.loss)
    peak = max(job.peak, last)
    if peak > GREW * max(first, 1.0) and last > 0.9 * first:
        warned.add(KEY)
        warn(
            f"{job.agent!r} diverged on {job.name!r}, though its numbers are finite: the training loss was "
            f"{first:.3g} at first, {peak:.3g} at most and {last:.3g} in the end; {remedies(job)} "
            "(later visits do not repeat this warning)"
        )


KEY = "<diverged>"
"""The key of the warning among those that were given."""


def _diverged(job: Job, what: str, step: int | None = None) -> Diverged:
    _, _, epochs, per_epoch = job.moment
    when = f"by step {job.steps}" if step is None else f"at step {step}"
    return Diverged(
        f"training diverged: {what} is NaN or infinite in {job.agent!r} on {job.name!r}, {when} of "
        f"{epochs * per_epoch}; {remedies(job)}."
    )


def remedies(job: Job) -> str:
    """Say what to try."""
    training = job.training
    found = [f"a lower `lr` (now {job.rate:g})"]
    if training.clip_norm is None and training.clip_value is None:
        found.append("`clip_norm=1`")
    names = [correction.name for correction, _ in job.corrections]
    if names:
        found.append(f"a lower strength of {', '.join(names)}")
    return f"try {', '.join(found)}, or inputs on a smaller scale"
