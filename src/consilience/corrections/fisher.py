"""The diagonal of the Fisher information, exact and per sample: never the square of a batch's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.contexts import Learned
from consilience.core.errors import ConsilienceError
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Examples
from consilience.core.tree import Input

LABELS = ("model", "all", "data", "batches")

NUMBERS = 16_000_000
"""How many numbers the gradients of several samples may take at once."""


class Weighted(NamedTuple):
    """Targets [B] (or values [B, d]) to differentiate at, and the weight [B] of what comes of each."""

    targets: Tensor
    weight: Tensor


class Wanted(NamedTuple):
    """What to sum over samples: f(d score(outputs, target) / d theta), for one or more weighted targets."""

    targets: Callable[[Tensor, Tensor], list[Weighted]]
    """(outputs, given targets) -> the targets to differentiate at."""
    score: Callable[[Tensor, Tensor], Tensor]
    """(outputs, targets) -> the scores [B]."""
    transform: Callable[[Tensor], Tensor]
    """A function f of each number with f(a b) = f(a) f(b)."""


class Captured(NamedTuple):
    """The inputs and outputs of a layer in one forward pass."""

    inputs: Tensor
    outputs: Tensor


def check_labels(labels: str) -> None:
    """Raise ConsilienceError unless they are labels that `fisher` takes."""
    if labels not in LABELS:
        raise ConsilienceError(f"`labels` must be model, all, data or batches, got {labels!r}.")


def check_samples(samples: int | None) -> None:
    """Raise ConsilienceError unless it is a number of samples, or None for all."""
    if samples is not None and samples < 1:
        raise ConsilienceError(f"`samples` must be at least 1, or None for all, got {samples}.")


def fisher(
    learned: Learned,
    labels: str = "model",
    samples: int | None = None,
    chunk: int = 2048,
    of: Literal["likelihood", "logit"] = "likelihood",
) -> Params:
    """Return the diagonal Fisher (1/N) sum over samples of (d log p(y|x) / d theta)^2, by entry.

    With `of="logit"` the squares are (d logit_y / d theta)^2. For values the model's distribution is a
    Gaussian of unit variance around its outputs. Models made of linear layers, convolutions and group norms
    get the sum layer by layer from one backward pass per batch, all others by vmap.
    """
    examples = _drawn(learned, samples)
    kind = learned.source.kind
    # With a task label the answer is over the task's own classes.
    keep: Tensor | None = None
    if kind == "class" and learned.task is not None:
        keep = torch.zeros(learned.model.outputs, dtype=torch.bool, device=learned.layout.device)
        keep[list(learned.source.classes)] = True
    if labels == "batches":
        return _batch_squares(learned, examples, keep)

    def score(out: Tensor, y: Tensor) -> Tensor:
        if of == "logit" and kind == "class":
            return out.gather(1, y[:, None])[:, 0]
        return _log_likelihood(out, y, keep, kind)

    def targets(out: Tensor, y: Tensor) -> list[Weighted]:
        return _targets(learned, out, y, labels, keep)

    return _mean_over_samples(learned, examples, Wanted(targets, score, torch.square), chunk)


def sensitivity(learned: Learned, samples: int | None = None, chunk: int = 512) -> Params:
    """Return (1/N) sum over samples of |d ||f(x)||^2 / d theta|, by entry.

    The absolute value is taken per sample, never of a batch's mean. Aljundi et al. 2018.
    """

    def score(out: Tensor, _: Tensor) -> Tensor:
        # Outputs of classes that a head does not have are -inf.
        return torch.where(torch.isfinite(out), out, 0).square().sum(1)

    def targets(out: Tensor, _: Tensor) -> list[Weighted]:
        return [Weighted(out, torch.ones(len(out), dtype=out.dtype, device=out.device))]

    return _mean_over_samples(learned, _drawn(learned, samples), Wanted(targets, score, torch.abs), chunk)


def _drawn(learned: Learned, samples: int | None) -> Examples:
    """Draw so many training examples of the source, or take all."""
    examples = learned.source.train
    if samples is None or samples >= len(examples):
        return examples
    return examples.select(torch.randperm(len(examples), generator=learned.generator)[:samples])


def _mean_over_samples(learned: Learned, examples: Examples, wanted: Wanted, chunk: int) -> Params:
    """Average what is wanted over samples, by entry, layer by layer where the model allows it."""
    # An entry that no sample reaches keeps 0.
    total = {name: torch.zeros_like(p) for name, p in learned.trainable.items()}
    layers = _layers(learned)
    for x, y in examples.chunks(chunk):
        sums = _by_layers(learned, layers, x, y, wanted) if layers is not None else None
        if sums is None:
            sums = _by_vmap(learned, x, y, wanted)
        for name, s in sums.items():
            total[name] += s
    return {name: t / len(examples) for name, t in total.items()}


def _batch_squares(learned: Learned, examples: Examples, keep: Tensor | None, size: int = 32) -> Params:
    """Average over batches the square of the gradient of the batch's mean log p(y|x): not the Fisher."""
    total = {name: torch.zeros_like(p) for name, p in learned.trainable.items()}
    leaves = {name: p.detach().requires_grad_() for name, p in learned.trainable.items()}
    batches = list(torch.randperm(len(examples), generator=learned.generator).split(size))
    for x, y in examples.batches(batches):
        with torch.enable_grad():
            out = learned.model({**learned.params, **leaves}, learned.buffers, x, learned.task, False)[0]
            mean = _log_likelihood(out, y, keep, learned.source.kind).mean()
        # An entry may be unused, such as the head of another task.
        grads = torch.autograd.grad(mean, [*leaves.values()], allow_unused=True)
        for squares, grad in zip(total.values(), grads, strict=True):
            if grad is not None:
                squares += grad.square()
    return {name: t / len(batches) for name, t in total.items()}


def _log_likelihood(out: Tensor, y: Tensor, keep: Tensor | None, kind: str) -> Tensor:
    """Return log p(y | out) of each sample [B], over the classes in `keep` (None: all)."""
    if kind == "value":
        return -0.5 * (out[:, : y.shape[1]] - y).square().sum(1)
    if keep is not None:
        out = out.masked_fill(~keep, -torch.inf)
    return -F.cross_entropy(out, y, reduction="none")


def _targets(learned: Learned, out: Tensor, y: Tensor, labels: str, keep: Tensor | None) -> list[Weighted]:
    """Return the targets to differentiate at, given the outputs and the labels of the data."""
    ones = torch.ones(len(out), dtype=learned.layout.dtype, device=out.device)
    if labels == "data":
        return [Weighted(y, ones)]

    if learned.source.kind == "value":
        own = out[:, : y.shape[1]]
        if labels == "all":
            # At a target that differs by 1 in output j, the score's gradient is that of output j.
            unit = torch.eye(y.shape[1], dtype=own.dtype, device=own.device)
            return [Weighted(own + unit[j], ones) for j in range(y.shape[1])]
        noise = torch.randn(y.shape, generator=learned.generator, dtype=y.dtype).to(out.device)
        return [Weighted(own + noise, ones)]

    p = (out if keep is None else out.masked_fill(~keep, -torch.inf)).softmax(1)
    if labels == "model":
        drawn = torch.multinomial(p.cpu(), 1, generator=learned.generator)[:, 0]
        return [Weighted(drawn.to(out.device), ones)]
    # The expectation over classes, each weighted by its probability.
    classes = [c for c in range(p.shape[1]) if keep is None or bool(keep[c])]
    return [Weighted(torch.full_like(y, c), p[:, c]) for c in classes]


def _by_vmap(learned: Learned, x: Input, y: Tensor, wanted: Wanted) -> Params:
    """Sum what is wanted over samples by vmap(grad), in slices that fit in memory."""
    frozen = {name: p for name, p in learned.params.items() if name not in learned.layout.names}

    def one(params: Params, xi: Tensor, target: Tensor) -> Tensor:
        out = learned.model({**frozen, **params}, learned.buffers, xi[None], learned.task, False)[0]
        return wanted.score(out, target[None])[0]

    params = {name: p.detach() for name, p in learned.trainable.items()}
    with torch.no_grad():
        out = learned.model(learned.params, learned.buffers, x, learned.task, False)[0]
    size = max(1, min(len(x), NUMBERS // max(1, learned.layout.size)))
    gradients = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))

    total: Params = {}
    for targets, weight in wanted.targets(out, y):
        slices = zip(x.split(size), targets.split(size), weight.split(size), strict=True)
        for xs, ts, ws in slices:
            for name, grad in gradients(params, xs, ts).items():
                s = torch.tensordot(ws, wanted.transform(grad), dims=1)
                total[name] = total[name] + s if name in total else s
    return total


def module_of(model: Model) -> tuple[str, object]:
    """Return the prefix of a model's entries and the torch module that it wraps, None if it wraps none.

    Of a model with heads on a trunk it is the module of the trunk.
    """
    trunk = getattr(model, "trunk", None)
    if trunk is None:
        return "", getattr(model, "module", None)
    return "trunk.", getattr(trunk, "module", None)


def _layers(learned: Learned) -> dict[str, nn.Module] | None:
    """Return the trained layers by name if gradients per sample are known for all of them, else None.

    Of a model with heads on a trunk they are the layers of the trunk, if only its entries are trained.
    """
    prefix, module = module_of(learned.model)
    if not isinstance(module, nn.Module):
        return None
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm)
    names = set(learned.layout.names)
    layers = {
        f"{prefix}{name}": layer
        for name, layer in module.named_modules()
        if type(layer) in kinds
        and any(f"{prefix}{name}.{leaf}" in names for leaf, _ in layer.named_parameters())
    }
    if any(_is_unusual(layer) for layer in layers.values()):
        return None

    # Layers that share a parameter would each give only a part of its gradient.
    places = [id(p) for m in module.modules() for p in m.parameters(recurse=False)]
    tied = len(set(places)) < len(places)
    reached = {f"{name}.{leaf}" for name, layer in layers.items() for leaf, _ in layer.named_parameters()}
    return layers if not tied and names <= reached else None


def _is_unusual(layer: nn.Module) -> bool:
    """Whether it is a convolution that `F.unfold` does not cover: grouped, or not padded by zeros."""
    return isinstance(layer, nn.Conv2d) and (
        layer.groups > 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros"
    )


def _by_layers(
    learned: Learned, layers: dict[str, nn.Module], x: Input, y: Tensor, wanted: Wanted
) -> Params | None:
    """Sum what is wanted over samples from the inputs of the layers and the gradients of their outputs.

    f(a b) = f(a) f(b), so that a linear layer needs f(delta)^T f(input) only; the gradient of a convolution
    is delta times its patches. None where a layer is not used once per sample.
    """
    out, captured = _forward(learned, layers, x)
    dims = {nn.Linear: 2, nn.Conv2d: 4, nn.GroupNorm: 4}
    for name, uses in captured.items():
        if (
            len(uses) != 1
            or uses[0].inputs.dim() != dims[type(layers[name])]
            or len(uses[0].inputs) != len(x)
        ):
            return None
    once = {name: uses[0] for name, uses in captured.items()}

    total: Params = {}
    every = wanted.targets(out.detach(), y)
    for i, (targets, weight) in enumerate(every):
        deltas = torch.autograd.grad(
            wanted.score(out, targets).sum(),
            [use.outputs for use in once.values()],
            retain_graph=i < len(every) - 1,
        )
        for (name, use), delta in zip(once.items(), deltas, strict=True):
            for leaf, s in _layer(layers[name], use.inputs, delta, weight, wanted.transform).items():
                entry = f"{name}.{leaf}"
                if entry in learned.layout.names:
                    total[entry] = total[entry] + s if entry in total else s
    return total


def _forward(
    learned: Learned, layers: dict[str, nn.Module], x: Input
) -> tuple[Tensor, dict[str, list[Captured]]]:
    """Return the outputs of the model, and what each use of a layer captured, with a graph between them."""
    captured: dict[str, list[Captured]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            captured[name].append(Captured(inputs[0].detach().clone(), out))
            # The next layer may work in place.
            return out.clone()

        return keep

    # A graph must reach back to the first layer; biases and the first entry are the cheapest leaves for it.
    first = next(iter(learned.layout.names))
    all_biased = all(layer.bias is not None for layer in layers.values())
    params = {}
    for name, p in learned.params.items():
        is_leaf = name == first or name.endswith("bias") if all_biased else p.is_floating_point()
        params[name] = p.detach().requires_grad_(is_leaf)
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            out, _ = learned.model(params, learned.buffers, x, learned.task, False)
    finally:
        for handle in handles:
            handle.remove()
    return out, captured


def _layer(
    layer: nn.Module, x: Tensor, delta: Tensor, weight: Tensor, f: Callable[[Tensor], Tensor]
) -> Params:
    """Return the sums of one layer's entries, from its inputs x and the gradients of its outputs, [B, ..]."""
    if isinstance(layer, nn.Linear):
        weighted = f(delta) * weight[:, None]
        return {"weight": weighted.T @ f(x)} | ({"bias": weighted.sum(0)} if layer.bias is not None else {})

    flat = delta.flatten(2)
    if isinstance(layer, nn.GroupNorm):
        unit = F.group_norm(x, layer.num_groups, eps=layer.eps).flatten(2)
        own = {"weight": (flat * unit).sum(2), "bias": flat.sum(2)}
        return {leaf: weight @ f(own[leaf]) for leaf, _ in layer.named_parameters()}

    # A convolution: gradients by sample [slice, out, in x kernel] in slices that fit in memory.
    assert isinstance(layer, nn.Conv2d)
    shape, area = layer.weight.shape, layer.weight[0, 0].numel()
    size = max(1, NUMBERS // max(1, layer.weight.numel() + x[0].numel() * area))
    total = torch.zeros(shape.numel(), dtype=delta.dtype, device=delta.device)
    for xs, ds, ws in zip(x.split(size), flat.split(size), weight.split(size), strict=True):
        # A padding that is a word was excluded by `_is_unusual`.
        padding: Any = layer.padding
        patches = F.unfold(xs, layer.kernel_size, layer.dilation, padding, layer.stride)
        total += ws @ f(torch.bmm(ds, patches.transpose(1, 2))).flatten(1)
    bias = {"bias": weight @ f(flat.sum(2))} if layer.bias is not None else {}
    return {"weight": total.view(shape)} | bias
