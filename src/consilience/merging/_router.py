"""A learned router: which source an input is from, by the base's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from consilience.core.errors import ConsilienceError
from consilience.core.params import key
from consilience.core.source import Examples
from consilience.core.tree import Input, cast_to
from consilience.corrections.solved import SolvedHead
from consilience.merging._bench import CHUNK, Answers, Bench, Part

EXAMPLES = 1000
"""Training inputs per source that a router is fitted to."""


class Router(NamedTuple):
    """Scores of sources: psi @ weight [d, S] + bias [S]; `what` psi is, "features" or "outputs"."""

    weight: Tensor
    bias: Tensor
    what: str


def fitted(bench: Bench, seed: int) -> Router:
    """Fit logistic regression of the source on the base's features of training inputs; no target is read."""
    drawn = []
    for source in bench.sources:
        order = torch.randperm(len(source.train), generator=key(seed, "choose", "router", source.name))
        drawn.append(source.train.select(order[:EXAMPLES].sort().values))

    # A module whose head is unknown has outputs only.
    what = "features"
    try:
        psi = [seen(bench, examples, what) for examples in drawn]
    except ConsilienceError:
        what = "outputs"
        psi = [seen(bench, examples, what) for examples in drawn]

    number = torch.cat([torch.full((len(own),), i) for i, own in enumerate(psi)])
    targets = F.one_hot(number, len(psi)).double()
    rows = torch.cat(psi)
    weight, bias = SolvedHead("logistic").logistic(rows - rows.mean(0), targets)
    return Router(weight, bias - rows.mean(0) @ weight, what)


@torch.no_grad()
def seen(bench: Bench, examples: Examples, what: str) -> Tensor:
    """Return the base's features or outputs [N, d] of examples, in float64; 0 where they are not finite."""
    params, buffers = bench.params(bench.base), bench.buffers(bench.base)

    def psi(x: Input) -> Tensor:
        x = cast_to(x, x.device, bench.dtype)
        if what == "features":
            return bench.model.features(params, buffers, x)
        return bench.model(params, buffers, x, None, False)[0]

    found = torch.cat([psi(x) for x, _ in examples.chunks(CHUNK)]).double()
    return torch.where(found.isfinite(), found, 0.0)


def sent(bench: Bench, router: Router, picks: Sequence[str], part: Part) -> list[Answers]:
    """Return for each example the answer of the expert that was picked for the likeliest source."""
    names = list(dict.fromkeys(picks))
    expert_of = torch.tensor([names.index(name) for name in picks])
    by_expert = list(zip(*(bench.alone(name, part) for name in names), strict=True))

    found, chosen = [], {}
    for source, answers in zip(bench.sources, by_expert, strict=True):
        examples: Examples = getattr(source, part)
        # Clients often share one test set.
        if id(examples) not in chosen:
            psi = seen(bench, examples, router.what)
            chosen[id(examples)] = expert_of[(psi @ router.weight + router.bias).argmax(1)]
        expert = chosen[id(examples)]
        p = torch.stack([answer.p for answer in answers])[expert, torch.arange(len(expert))]
        found.append(Answers(p, answers[0].y, max(answer.width for answer in answers)))
    return found
