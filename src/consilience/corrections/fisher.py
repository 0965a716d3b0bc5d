"""The diagonal of the Fisher information, exact and per sample (never the square of a batch's summed gradient)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.contexts import Learned
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Examples

Pairs = list[tuple[Tensor, Tensor]]
Score = Callable[[Tensor, Tensor], Tensor]
NUMBERS = 16_000_000
"""How many numbers gradients by sample may take at once."""


def fisher(
    learned: Learned,
    labels: str = "model",
    samples: int | None = None,
    chunk: int = 2048,
    of: Literal["likelihood", "logit"] = "likelihood",
) -> Params:
    """(1/N) sum over samples of (d log p(y|x) / d theta)^2, by entry; `of` the "logit", (d logit_y / d theta)^2.

    For values the model's distribution is a Gaussian of unit variance around its outputs. Models that are made of linear layers,
    convolutions and group norms get the same sum layer by layer from one backward pass of a batch, all others by vmap.
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
    total = {n: torch.zeros_like(p) for n, p in learned.trainable.items()}
    layers = _layers(learned)
    for x, y in examples.chunks(chunk):

        def score(out: Tensor, y: Tensor) -> Tensor:
            if of == "logit" and learned.source.kind == "class":
                return out.gather(1, y[:, None])[:, 0]
            return _score(out, y, keep, learned.source.kind)

        def targets(out: Tensor, y: Tensor = y) -> Pairs:
            return _targets(learned, out, y, labels, keep)

        found = _by_layers(learned, layers, x, targets, score, torch.square) if layers is not None else None
        for n, s in (_by_vmap(learned, x, targets, score, torch.square) if found is None else found).items():
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
        for t, g in zip(
            total.values(), torch.autograd.grad(score, [*leaves.values()], allow_unused=True), strict=True
        ):
            if g is not None:
                t += g.square()
    return {n: t / len(batches) for n, t in total.items()}


def sensitivity(learned: Learned, samples: int | None = None, chunk: int = 512) -> Params:
    """(1/N) sum over samples of |d ||f(x)||^2 / d theta|, by entry and per sample (never of a batch's mean). Aljundi et al. 2018."""
    examples = learned.source.train
    if samples is not None and samples < len(examples):
        examples = examples.select(torch.randperm(len(examples), generator=learned.generator)[:samples])

    def score(out: Tensor, _: Tensor) -> Tensor:
        return torch.where(torch.isfinite(out), out, 0).square().sum(1)

    def targets(out: Tensor) -> Pairs:
        return [(out, torch.ones(len(out), dtype=out.dtype, device=out.device))]

    total = {n: torch.zeros_like(p) for n, p in learned.trainable.items()}
    layers = _layers(learned)
    for x, _ in examples.chunks(chunk):
        found = _by_layers(learned, layers, x, targets, score, torch.abs) if layers is not None else None
        for n, g in (_by_vmap(learned, x, targets, score, torch.abs) if found is None else found).items():
            total[n] += g
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
        return [
            (own + torch.eye(y.shape[1], dtype=own.dtype, device=own.device)[j], ones)
            for j in range(y.shape[1])
        ]
    if learned.source.kind == "value":
        noise = torch.randn(y.shape, generator=learned.generator, dtype=y.dtype).to(out.device)
        return [(out[:, : y.shape[1]] + noise, ones)]
    p = (out if keep is None else out.masked_fill(~keep, -torch.inf)).softmax(1)
    if labels == "model":
        return [(torch.multinomial(p.cpu(), 1, generator=learned.generator)[:, 0].to(out.device), ones)]
    classes = [c for c in range(p.shape[1]) if keep is None or bool(keep[c])]
    return [(torch.full_like(y, c), p[:, c]) for c in classes]


def _by_vmap(
    learned: Learned,
    x: Tensor,
    targets: Callable[[Tensor], Pairs],
    score: Score,
    f: Callable[[Tensor], Tensor],
) -> Params:
    """Sums over samples of f(gradient of the sample's score) with weights, by vmap(grad); in slices that fit in memory."""
    fixed = {n: p for n, p in learned.params.items() if n not in learned.layout.names}

    def one(params: Params, xi: Tensor, yi: Tensor) -> Tensor:
        out = learned.model({**fixed, **params}, learned.buffers, xi[None], learned.task, False)[0]
        return score(out, yi[None])[0]

    params = {n: p.detach() for n, p in learned.trainable.items()}
    with torch.no_grad():
        out = learned.model(learned.params, learned.buffers, x, learned.task, False)[0]
    slice_size = max(1, min(len(x), NUMBERS // max(1, learned.layout.size)))
    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
    total: Params = {}
    for y, weight in targets(out):
        for xs, ys, ws in zip(
            x.split(slice_size), y.split(slice_size), weight.split(slice_size), strict=True
        ):
            for n, g in each(params, xs, ys).items():
                s = torch.tensordot(ws, f(g), dims=1)
                total[n] = total[n] + s if n in total else s
    return total


def module_of(model: Model) -> tuple[str, object]:
    """The torch module that a model is made of (that of its trunk, under heads), and what its names are prefixed with; None where it has none."""
    trunk = getattr(model, "trunk", None)
    return (
        ("", getattr(model, "_module", None))
        if trunk is None
        else ("trunk.", getattr(trunk, "_module", None))
    )


def _layers(learned: Learned) -> dict[str, nn.Module] | None:
    """The layers by name where every trainable entry belongs to one whose gradients are known by sample, else None.

    Of a model with heads on a trunk those of the trunk, where its entries alone are asked for.
    """
    at, module = module_of(learned.model)
    if not isinstance(module, nn.Module):
        return None
    known = {
        f"{at}{n}": m for n, m in module.named_modules() if type(m) in (nn.Linear, nn.Conv2d, nn.GroupNorm)
    }
    names = set(learned.layout.names)
    layers = {
        n: m for n, m in known.items() if any(f"{n}.{leaf}" in names for leaf, _ in m.named_parameters())
    }
    if any(
        isinstance(m, nn.Conv2d) and (m.groups > 1 or isinstance(m.padding, str) or m.padding_mode != "zeros")
        for m in layers.values()
    ):
        return None
    places = [id(p) for m in module.modules() for p in m.parameters(recurse=False)]
    tied = len(set(places)) < len(places)
    return (
        layers
        if not tied
        and names <= {f"{n}.{leaf}" for n, m in layers.items() for leaf, _ in m.named_parameters()}
        else None
    )


def _by_layers(
    learned: Learned,
    layers: dict[str, nn.Module],
    x: Tensor,
    targets: Callable[[Tensor], Pairs],
    score: Score,
    f: Callable[[Tensor], Tensor],
) -> Params | None:
    """The same sums from the inputs of the layers and the gradients of their outputs; None where a layer is not used once a sample.

    f(a b) = f(a) f(b), so that a linear layer needs f(delta)^T f(input) only; a convolution's gradient is delta times its patches.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in layers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            seen[name].append((inputs[0].detach().clone(), out))
            return out.clone()  # the next layer may work in place

        return keep

    handles = [m.register_forward_hook(hook(n)) for n, m in layers.items()]
    first = next(iter(learned.layout.names))
    params = {
        n: p.detach().requires_grad_(n == first or n.endswith("bias")) for n, p in learned.params.items()
    }
    if any(m.bias is None for m in layers.values()):
        params = {n: p.detach().requires_grad_(p.is_floating_point()) for n, p in learned.params.items()}
    try:
        with torch.enable_grad():
            out, _ = learned.model(params, learned.buffers, x, learned.task, False)
    finally:
        for h in handles:
            h.remove()
    fits = {nn.Linear: 2, nn.Conv2d: 4, nn.GroupNorm: 4}
    if any(
        len(s) != 1 or s[0][0].dim() != fits[type(layers[n])] or len(s[0][0]) != len(x)
        for n, s in seen.items()
    ):
        return None
    total: Params = {}
    pairs = targets(out.detach())
    for i, (y, weight) in enumerate(pairs):
        deltas = torch.autograd.grad(
            score(out, y).sum(), [s[0][1] for s in seen.values()], retain_graph=i < len(pairs) - 1
        )
        for (n, s), d in zip(seen.items(), deltas, strict=True):
            for leaf, v in _layer(layers[n], s[0][0], d, weight, f).items():
                k = f"{n}.{leaf}"
                if k in learned.layout.names:
                    total[k] = total[k] + v if k in total else v
    return total


def _layer(layer: nn.Module, x: Tensor, d: Tensor, weight: Tensor, f: Callable[[Tensor], Tensor]) -> Params:
    """What one layer's entries get, from its inputs x [B, ..] and the gradients d [B, ..] of its outputs."""
    if isinstance(layer, nn.Linear):
        fd = f(d) * weight[:, None]
        return {"weight": fd.T @ f(x)} | ({"bias": fd.sum(0)} if layer.bias is not None else {})
    flat = d.flatten(2)
    if isinstance(layer, nn.GroupNorm):
        unit = F.group_norm(x, layer.num_groups, eps=layer.eps).flatten(2)
        own = {"weight": (flat * unit).sum(2), "bias": flat.sum(2)}
        return {leaf: weight @ f(own[leaf]) for leaf, _ in layer.named_parameters()}
    assert isinstance(layer, nn.Conv2d)
    wanted, step = (
        layer.weight.shape,
        max(1, NUMBERS // max(1, layer.weight.numel() + x[0].numel() * layer.weight[0, 0].numel())),
    )
    total = torch.zeros(wanted.numel(), dtype=d.dtype, device=d.device)
    for xs, ds, ws in zip(x.split(step), flat.split(step), weight.split(step), strict=True):
        patches = F.unfold(xs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        total += ws @ f(torch.bmm(ds, patches.transpose(1, 2))).flatten(1)
    return {"weight": total.view(wanted)} | (
        {"bias": weight @ f(flat.sum(2))} if layer.bias is not None else {}
    )
