"""The diagonal of the Fisher information, exact and per sample (never the square of a batch's summed gradient)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.correction import Learned
from consilience.core.params import Params
from consilience.core.source import Examples

Pairs = list[tuple[Tensor, Tensor]]


def fisher(learned: Learned, labels: str = "model", samples: int | None = None, chunk: int = 2048) -> Params:
    """(1/N) sum over samples of (d log p(y|x) / d theta)^2, by entry.

    For values the model's distribution is a Gaussian of unit variance around its outputs. Models that are made of
    linear layers on vectors use (delta^2)^T (a^2), the same sum without one gradient a sample; all others use vmap.
    """
    examples = learned.source.train
    if samples is not None and samples < len(examples):
        examples = examples.select(torch.randperm(len(examples), generator=learned.generator)[:samples])
    kind = learned.source.kind
    keep: Tensor | None = None
    if kind == "class" and learned.task is not None:
        keep = torch.zeros(learned.model.outputs, dtype=torch.bool, device=learned.layout.device)
        keep[list(learned.source.classes)] = True
    if labels == "batches":
        return _batch_squares(learned, examples, keep)
    squares = _linear_squares(learned) or _by_vmap
    total = {n: torch.zeros_like(p) for n, p in learned.trainable.items()}
    for x, y in examples.chunks(chunk):
        for n, s in squares(learned, x, lambda out, y=y: _targets(learned, out, y, labels, keep), keep).items():  # type: ignore[misc]
            total[n] += s
    return {n: t / len(examples) for n, t in total.items()}


def _batch_squares(learned: Learned, examples: Examples, keep: Tensor | None, size: int = 32) -> Params:
    """The mean over batches of the squared gradient of the batch's mean log p(y|x): not the Fisher."""
    total = {n: torch.zeros_like(p) for n, p in learned.trainable.items()}
    leaves = {n: p.detach().requires_grad_() for n, p in learned.trainable.items()}
    batches = list(torch.randperm(len(examples), generator=learned.generator).split(size))
    for x, y in examples.batches(batches):
        with torch.enable_grad():
            out = learned.model({**learned.params, **leaves}, learned.buffers, x, learned.task, False)[0]
            score = _score(out, y, keep, learned.source.kind).mean()
        for t, g in zip(total.values(), torch.autograd.grad(score, [*leaves.values()], allow_unused=True), strict=True):
            if g is not None:
                t += g.square()
    return {n: t / len(batches) for n, t in total.items()}


def sensitivity(learned: Learned, samples: int | None = None, chunk: int = 512) -> Params:
    """(1/N) sum over samples of |d ||f(x)||^2 / d theta|, by entry and per sample (never of a batch's mean). Aljundi et al. 2018."""
    examples = learned.source.train
    if samples is not None and samples < len(examples):
        examples = examples.select(torch.randperm(len(examples), generator=learned.generator)[:samples])
    fixed = {n: p for n, p in learned.params.items() if n not in learned.layout.names}

    def one(params: Params, xi: Tensor) -> Tensor:
        out = learned.model({**fixed, **params}, learned.buffers, xi[None], learned.task, False)[0]
        return torch.where(torch.isfinite(out), out, 0).square().sum()

    params = {n: p.detach() for n, p in learned.trainable.items()}
    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    size = max(1, min(chunk, 16_000_000 // max(1, learned.layout.size)))
    for x, _ in examples.chunks(size):
        for n, g in each(params, x).items():
            total[n] += g.abs().sum(0)
    return {n: t / len(examples) for n, t in total.items()}


def _score(out: Tensor, y: Tensor, keep: Tensor | None, kind: str) -> Tensor:
    """log p(y | out) of each sample [B]."""
    if kind == "value":
        return -0.5 * (out[:, : y.shape[1]] - y).square().sum(1)
    if keep is not None:
        out = out.masked_fill(~keep, -torch.inf)
    return -F.cross_entropy(out, y, reduction="none")


def _targets(learned: Learned, out: Tensor, y: Tensor, labels: str, keep: Tensor | None) -> Pairs:
    """The targets [B] (or values) to differentiate, with the weight [B] of their squares, given the outputs."""
    ones = torch.ones(len(out), dtype=learned.layout.dtype, device=out.device)
    if labels == "data":
        return [(y, ones)]
    if learned.source.kind == "value" and labels == "all":  # the score of output j is its own gradient
        own = out[:, : y.shape[1]]
        return [(own + torch.eye(y.shape[1], dtype=own.dtype, device=own.device)[j], ones) for j in range(y.shape[1])]
    if learned.source.kind == "value":
        noise = torch.randn(y.shape, generator=learned.generator, dtype=y.dtype).to(out.device)
        return [(out[:, : y.shape[1]] + noise, ones)]
    p = (out if keep is None else out.masked_fill(~keep, -torch.inf)).softmax(1)
    if labels == "model":
        return [(torch.multinomial(p.cpu(), 1, generator=learned.generator)[:, 0].to(out.device), ones)]
    classes = [c for c in range(p.shape[1]) if keep is None or bool(keep[c])]
    return [(torch.full_like(y, c), p[:, c]) for c in classes]


def _by_vmap(learned: Learned, x: Tensor, targets: Callable[[Tensor], Pairs], keep: Tensor | None) -> Params:
    """Squares of per-sample gradients by vmap(grad), summed with weights; in slices that fit in memory."""
    fixed = {n: p for n, p in learned.params.items() if n not in learned.layout.names}

    def one(params: Params, xi: Tensor, yi: Tensor) -> Tensor:
        out = learned.model({**fixed, **params}, learned.buffers, xi[None], learned.task, False)[0]
        return _score(out, yi[None], keep, learned.source.kind)[0]

    params = {n: p.detach() for n, p in learned.trainable.items()}
    with torch.no_grad():
        out = learned.model(learned.params, learned.buffers, x, learned.task, False)[0]
    slice_size = max(1, min(len(x), 16_000_000 // max(1, learned.layout.size)))
    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
    total: Params = {}
    for y, weight in targets(out):
        for xs, ys, ws in zip(x.split(slice_size), y.split(slice_size), weight.split(slice_size), strict=True):
            for n, g in each(params, xs, ys).items():
                s = torch.tensordot(ws, g.square(), dims=1)
                total[n] = total[n] + s if n in total else s
    return total


def _linear_squares(learned: Learned) -> Callable[[Learned, Tensor, Callable[[Tensor], Pairs], Tensor | None], Params] | None:
    """The fast form where every trainable entry belongs to a linear layer that sees one vector a sample, else None."""
    module = getattr(learned.model, "_module", None)
    if not isinstance(module, nn.Module):
        return None
    layers = {n: m for n, m in module.named_modules() if type(m) is nn.Linear}
    owned = {f"{n}.{leaf}" for n, m in layers.items() for leaf, _ in m.named_parameters()}
    if set(learned.layout.names) != owned or len(owned) != sum(1 for _ in module.parameters()):
        return None
    params = {n: p.detach().requires_grad_(n.endswith("bias")) for n, p in learned.params.items()}
    if not all(m.bias is not None for m in layers.values()):
        params = {n: p.detach().requires_grad_() for n, p in learned.params.items()}

    def squares(learned: Learned, x: Tensor, targets: Callable[[Tensor], Pairs], keep: Tensor | None) -> Params:
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in layers}

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            return lambda _, inputs, out: seen[name].append((inputs[0], out))

        handles = [m.register_forward_hook(hook(n)) for n, m in layers.items()]
        try:
            with torch.enable_grad():
                out, _ = learned.model(params, learned.buffers, x, learned.task, False)
        finally:
            for h in handles:
                h.remove()
        if any(len(s) != 1 or s[0][0].dim() != 2 or len(s[0][0]) != len(x) for s in seen.values()):
            return _by_vmap(learned, x, targets, keep)
        result: Params = {}
        pairs = targets(out.detach())
        for i, (y, weight) in enumerate(pairs):
            score = _score(out, y, keep, learned.source.kind).sum()
            deltas = torch.autograd.grad(score, [s[0][1] for s in seen.values()], retain_graph=i < len(pairs) - 1)
            for (n, s), d in zip(seen.items(), deltas, strict=True):
                d2 = d.square() * weight[:, None]
                made = {f"{n}.weight": d2.T @ s[0][0].detach().square()}
                if layers[n].bias is not None:
                    made[f"{n}.bias"] = d2.sum(0)
                for k, v in made.items():
                    result[k] = result[k] + v if k in result else v
        return result

    return squares
