"""The diagonal of the Fisher information, exact and per sample: never the square of a batch's gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.contexts import Learned
from consilience.core.errors import ConsilienceError
from consilience.core.losses import NONE, Poisson, present
from consilience.core.params import Params
from consilience.core.source import Examples, Target
from consilience.core.tree import Input
from consilience.corrections.gradients import differentiable_in_eval, module_of, per_sample

LABELS = ("model", "all", "data", "batches")

NUMBERS = 16_000_000
"""How many numbers the gradients of several samples may take at once."""


class Weighted(NamedTuple):
    """Targets [B, ...] to differentiate at, and the weight [B] of what comes of each."""

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


class Layer(NamedTuple):
    """A layer with a rule for its gradients per sample."""

    name: str
    module: nn.Module
    shared: bool = False
    """Whether it is used once for all samples, such as an embedding of positions."""


class Use(NamedTuple):
    """The inputs and outputs of a layer in one forward pass."""

    layer: Layer
    inputs: Tensor
    outputs: Tensor


class Uses(NamedTuple):
    """The outputs of a model and of its layers in one forward pass."""

    outputs: Tensor
    layers: list[Use]


def check_labels(labels: str) -> None:
    """Raise ConsilienceError unless they are labels that `fisher` takes."""
    if labels not in LABELS:
        raise ConsilienceError(f"`labels` must be model, all, data or batches, got {labels!r}.")


def check_samples(samples: int | None) -> None:
    """Raise ConsilienceError unless it is a number of samples, or None for all."""
    if samples is not None and samples < 1:
        raise ConsilienceError(f"`samples` must be at least 1, or None for all, got {samples}.")


def refuse_all(labels: str, places: bool) -> str | None:
    """Return why a Fisher over all labels cannot be had, or None."""
    if labels == "all" and places:
        return "labels='all' would take a pass for every output at every place; use labels='model'"
    return None


@dataclass(frozen=True, eq=False)
class Likelihood:
    """log p(y | outputs) of the targets of one task, and draws from it.

    Classes have a softmax over the columns in `keep` (None: all), each of several labels a Bernoulli
    distribution, values a Gaussian of unit variance, and values that are trained by `losses.Poisson` a
    Poisson distribution. Of a sample it is the sum over its targets that are there: one for each place.
    """

    target: Target
    keep: Tensor | None

    @staticmethod
    def of(learned: Learned) -> Likelihood:
        """Return that of a source, over the classes that it competes in."""
        keep: Tensor | None = None
        if learned.columns is not None:
            keep = torch.zeros(learned.model.outputs, dtype=torch.bool, device=learned.layout.device)
            keep[list(learned.columns)] = True
        return Likelihood(learned.target, keep)

    def own(self, out: Tensor, y: Tensor) -> Tensor:
        """Return the outputs that the targets are compared with; of other classes -inf."""
        own = self.target.own(out, y)
        if self.keep is None:
            return own
        return own.masked_fill(~self.keep.view(-1, *[1] * (out.dim() - 2)), -torch.inf)

    def log(self, out: Tensor, y: Tensor) -> Tensor:
        """Return log p(y | out) of each sample [B], up to a constant."""
        own, there = self.own(out, y), present(y)
        if self.target.kind == "class":
            # One fused operation where it is possible: most targets are one class per sample.
            if y.dim() == 1 and self.target.complete:
                return -F.cross_entropy(own, y, reduction="none")
            chosen = own.log_softmax(1).gather(1, y.clamp_min(0).unsqueeze(1)).squeeze(1)
            return total(torch.where(there, chosen, 0))

        # A NaN would reach the gradients, also through what `where` leaves out.
        filled = torch.where(there, y, 0)
        if self.target.kind == "labels":
            each = -F.binary_cross_entropy_with_logits(own, filled.to(own), reduction="none")
        elif isinstance(self.target.loss, Poisson):
            each = filled * own - own.exp()
        else:
            each = -0.5 * (own - filled).square()
        return total(torch.where(there, each, 0))

    def mean(self, own: Tensor) -> Tensor:
        """Return the means of values, or the probabilities of labels, from their outputs."""
        return self.target.loss.answer(own) if self.target.kind == "value" else own.sigmoid()

    def draw(self, out: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Draw targets from the model, where y has some."""
        own = self.own(out, y)
        if self.target.kind == "class":
            # `multinomial` takes rows: one for each place.
            p = own.softmax(1).movedim(1, -1)
            drawn = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), 1, generator=generator)
            return torch.where(present(y), drawn[:, 0].view(p.shape[:-1]).to(y.device), NONE)

        if self.target.kind == "labels":
            uniform = torch.rand(y.shape, generator=generator, dtype=y.dtype).to(out.device)
            drawn = (uniform < own.sigmoid()).to(y.dtype)
        elif isinstance(self.target.loss, Poisson):
            drawn = torch.poisson(own.exp().cpu(), generator).to(out.device)
        else:
            drawn = own + torch.randn(y.shape, generator=generator, dtype=y.dtype).to(out.device)
        return torch.where(present(y), drawn, torch.nan)

    def every(self, out: Tensor, y: Tensor) -> list[Weighted]:
        """Return the targets whose weighted squares are the expectation over the model's distribution."""
        own = self.own(out, y)
        if self.target.kind == "class":
            p = own.softmax(1)
            classes = [c for c in range(p.shape[1]) if self.keep is None or bool(self.keep[c])]
            there = present(y)
            return [Weighted(torch.where(there, c, NONE), p[:, c]) for c in classes]

        # At a target that is 1 above the mean of output j, the score's gradient is that of output j.
        mean, unit = self.mean(own), torch.eye(y.shape[1], dtype=own.dtype, device=own.device)
        variance = torch.ones_like(own)
        if self.target.kind == "labels":
            variance = mean * (1 - mean)
        elif isinstance(self.target.loss, Poisson):
            variance = mean
        at = [torch.where(present(y), mean + unit[j], torch.nan) for j in range(y.shape[1])]
        return [Weighted(targets, variance[:, j]) for j, targets in enumerate(at)]


def total(each: Tensor) -> Tensor:
    """Return sums [B] over all but the first dimension."""
    return each if each.dim() == 1 else each.flatten(1).sum(1)


def fisher(
    learned: Learned,
    labels: str = "model",
    samples: int | None = None,
    chunk: int = 2048,
    of: Literal["likelihood", "logit"] = "likelihood",
) -> Params:
    """Return the diagonal Fisher (1/N) sum over samples of (d log p(y|x) / d theta)^2, by entry.

    With `of="logit"` the squares are (d logit_y / d theta)^2. For values the model's distribution is a
    Gaussian of unit variance around its outputs. The likelihood of a sample with targets at places is the
    product over them, so that T places give about T times the Fisher of one; N counts the samples that have a
    target. Models made of linear layers, convolutions, embeddings, layer and group norms get the sum layer by
    layer from one backward pass per batch, all others by vmap or one sample after another.
    """
    examples, likelihood = _drawn(learned, samples), Likelihood.of(learned)
    if labels == "batches":
        return _batch_squares(learned, examples, likelihood)

    def score(out: Tensor, y: Tensor) -> Tensor:
        if of == "logit" and likelihood.target.kind == "class":
            chosen = out.gather(1, y.clamp_min(0)[:, None])[:, 0]
            return chosen if likelihood.target.complete else torch.where(present(y), chosen, 0)
        return likelihood.log(out, y)

    def targets(out: Tensor, y: Tensor) -> list[Weighted]:
        if why := refuse_all(labels, y.dim() > (2 if y.is_floating_point() else 1)):
            raise ConsilienceError(f"the Fisher cannot be taken here: {why}.")
        if labels == "all":
            return likelihood.every(out, y)
        # Given or drawn, there is one target for each.
        ones = torch.ones(len(out), dtype=learned.layout.dtype, device=out.device)
        return [Weighted(y if labels == "data" else likelihood.draw(out, y, learned.generator), ones)]

    return _mean_over_samples(learned, examples, Wanted(targets, score, torch.square), chunk)


def sensitivity(learned: Learned, samples: int | None = None, chunk: int = 512) -> Params:
    """Return (1/N) sum over samples of |d ||f(x)||^2 / d theta|, by entry.

    The absolute value is taken per sample, never of a batch's mean. The norm is over the outputs that the
    source is trained by (with a task label those of the task's classes), and over all places with a target; N
    counts the samples that have one. Aljundi et al. 2018.
    """
    target, columns = learned.target, learned.columns

    def score(out: Tensor, y: Tensor) -> Tensor:
        # Outputs that nothing trained would be protected at their random values.
        own = target.own(out, y) if columns is None else out[:, list(columns)]
        # Outputs of classes that a head does not have are -inf.
        squares = torch.where(torch.isfinite(own), own, 0).square()
        if y.dim() == 1 and target.complete:
            return squares.sum(1)
        there = present(y).any(1) if y.is_floating_point() else present(y)
        return total(torch.where(there.unsqueeze(1), squares, 0))

    def targets(out: Tensor, y: Tensor) -> list[Weighted]:
        return [Weighted(y, torch.ones(len(out), dtype=out.dtype, device=out.device))]

    return _mean_over_samples(learned, _drawn(learned, samples), Wanted(targets, score, torch.abs), chunk)


def _drawn(learned: Learned, samples: int | None) -> Examples:
    """Draw so many training examples of the source, or take all."""
    examples = learned.source.train
    if samples is None or samples >= len(examples):
        return examples
    return examples.select(torch.randperm(len(examples), generator=learned.generator)[:samples])


def _counted(y: Tensor) -> int:
    """Return how many samples have a target."""
    return int(present(y).flatten(1).any(1).sum()) if y.dim() > 1 else int(present(y).sum())


def _mean_over_samples(learned: Learned, examples: Examples, wanted: Wanted, chunk: int) -> Params:
    """Average what is wanted over samples, by entry, layer by layer where the model allows it."""
    # An entry that no sample reaches keeps 0.
    found = {name: torch.zeros_like(p) for name, p in learned.trainable.items()}
    layers, count, fit = _layers(learned), 0, chunk
    for x, y in examples.chunks(chunk):
        # The first samples show how the model uses its layers, and how much of them fits in memory.
        if layers is not None and not count:
            layers, fit = _proven(learned, layers, x)
        size = len(x) if layers is None else fit
        for xs, ys in zip(x.split(size), y.split(size), strict=True):
            uses = _forward(learned, layers, xs) if layers is not None else None
            sums = (
                _by_vmap(learned, xs, ys, wanted) if uses is None else _by_layers(learned, uses, ys, wanted)
            )
            for name, s in sums.items():
                found[name] += s
        count += _counted(y)
    return {name: t / max(1, count) for name, t in found.items()}


def _batch_squares(learned: Learned, examples: Examples, likelihood: Likelihood, size: int = 32) -> Params:
    """Average over batches the square of the gradient of the batch's mean log p(y|x): not the Fisher."""
    found = {name: torch.zeros_like(p) for name, p in learned.trainable.items()}
    leaves = {name: p.detach().requires_grad_() for name, p in learned.trainable.items()}
    batches = list(torch.randperm(len(examples), generator=learned.generator).split(size))
    for x, y in examples.batches(batches):
        with torch.enable_grad():
            out = learned.model({**learned.params, **leaves}, learned.buffers, x, learned.task, False)[0]
            # The mean over the samples of the batch that have a target.
            mean = likelihood.log(out, y).mean() * (len(y) / max(1, _counted(y)))
        # An entry may be unused, such as the head of another task.
        with differentiable_in_eval(learned.model, learned.layout.device):
            grads = torch.autograd.grad(mean, [*leaves.values()], allow_unused=True)
        for squares, grad in zip(found.values(), grads, strict=True):
            if grad is not None:
                squares += grad.square()
    return {name: t / len(batches) for name, t in found.items()}


def _by_vmap(learned: Learned, x: Input, y: Tensor, wanted: Wanted) -> Params:
    """Sum what is wanted over samples from the gradient of each, in slices that fit in memory."""
    frozen = {name: p for name, p in learned.params.items() if name not in learned.layout.names}

    def score(params: Params, xs: Input, targets: Tensor) -> Tensor:
        out = learned.model({**frozen, **params}, learned.buffers, xs, learned.task, False)[0]
        return wanted.score(out, targets)[0]

    params = {name: p.detach() for name, p in learned.trainable.items()}
    with torch.no_grad():
        out = learned.model(learned.params, learned.buffers, x, learned.task, False)[0]
    size = max(1, min(len(x), NUMBERS // max(1, learned.layout.size)))

    found: Params = {}
    for targets, weight in wanted.targets(out, y):
        slices = zip(x.split(size), targets.split(size), weight.split(size), strict=True)
        for xs, ts, ws in slices:
            for name, grad in per_sample(learned.model, score, params, xs, ts).items():
                s = torch.tensordot(ws, wanted.transform(grad), dims=1)
                found[name] = found[name] + s if name in found else s
    return found


def _layers(learned: Learned) -> list[Layer] | None:
    """Return the trained layers if gradients per sample are known for all of them, else None.

    Of a model with heads on a trunk they are the layers of the trunk, if only its entries are trained.
    """
    prefix, module = module_of(learned.model)
    if not isinstance(module, nn.Module):
        return None
    names = set(learned.layout.names)
    layers = [
        Layer(f"{prefix}{name}", part)
        for name, part in module.named_modules()
        if type(part) in RULES
        and any(f"{prefix}{name}.{leaf}" in names for leaf, _ in part.named_parameters())
    ]
    if any(_is_unusual(layer.module) for layer in layers):
        return None

    # Layers that share a parameter would each give only a part of its gradient.
    places = [id(p) for m in module.modules() for p in m.parameters(recurse=False)]
    tied = len(set(places)) < len(places)
    reached = {f"{layer.name}.{leaf}" for layer in layers for leaf, _ in layer.module.named_parameters()}
    return layers if not tied and names <= reached else None


def _is_unusual(layer: nn.Module) -> bool:
    """Whether the rules do not cover it, such as a convolution that `F.unfold` does not."""
    # The old weight_norm computes the weight from other parameters.
    if any(leaf not in ("weight", "bias") for leaf, _ in layer.named_parameters()):
        return True
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is not None or layer.scale_grad_by_freq
    return isinstance(layer, nn.Conv1d | nn.Conv2d) and (
        layer.groups > 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros"
    )


def _proven(learned: Learned, layers: list[Layer], x: Input) -> tuple[list[Layer] | None, int]:
    """Return the layers, marked where samples share their input, and how many samples to take at once.

    None where the rules do not hold. Each entry must have one use: `F.linear(x, layer.weight.T)` next to the
    layer would be missed. And on a few samples the rules must give the gradient of a weighted sum of scores,
    as autograd does: they do not where a correction changes the weights, or where the first dimension of a
    layer's inputs counts other things than samples.
    """
    few = x[:3]
    leaves = {name: p.detach().requires_grad_() for name, p in learned.trainable.items()}
    with torch.enable_grad():
        out = learned.model({**learned.params, **leaves}, learned.buffers, few, learned.task, False)[0]
    if not out.requires_grad or any(count > 1 for count in _uses(out, leaves).values()):
        return None, 0

    def score(out: Tensor) -> Tensor:
        # Outputs of classes that a head does not have are -inf.
        known = torch.where(torch.isfinite(out), out, 0).flatten(1)
        return known @ torch.linspace(1, 2, known.shape[1], dtype=known.dtype, device=known.device)

    # Embeddings of positions are looked up once for all samples.
    once = _shared(learned, layers, few)
    layers = [layer._replace(shared=layer.name in once) for layer in layers]
    uses = _forward(learned, layers, few)
    if uses is None:
        return None, 0
    weight = torch.arange(1.0, len(out) + 1, dtype=out.dtype, device=out.device)
    with differentiable_in_eval(learned.model, learned.layout.device):
        wanted = torch.autograd.grad(score(out) @ weight, [*leaves.values()], allow_unused=True)
        found = _by_rules(learned, uses, score(uses.outputs).sum(), weight, lambda t: t)

    # Rounding is smaller by far, and what the rules miss is larger.
    right = {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), wanted, strict=True)
    }
    largest = {name: float(g.detach().abs().max()) for name, g in right.items()}
    noise = 100 * torch.finfo(out.dtype).eps * max(largest.values())
    for name, grad in right.items():
        apart = (found[name] - grad).abs().max() if name in found else grad.abs().max()
        if float(apart) > 1e-3 * largest[name] + noise:
            return None, 0
    held = sum(use.inputs[0].numel() + use.outputs[0].numel() for use in uses.layers)
    return layers, max(1, 4 * NUMBERS // held)


def _uses(out: Tensor, leaves: Params) -> dict[str, int]:
    """Return how often each entry is used in the graph of the outputs."""
    # The graph has one node that accumulates the gradient of each entry, with an edge from each of its uses.
    names, uses = {id(leaf): name for name, leaf in leaves.items()}, dict.fromkeys(leaves, 0)
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for below, _ in node.next_functions:
            name = names.get(id(getattr(below, "variable", None)))
            if name is not None:
                uses[name] += 1
            left.append(below)
    return uses


def _shared(learned: Learned, layers: list[Layer], x: Input) -> set[str]:
    """Return the embeddings that are looked up once for all samples."""
    found: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            ids = _input_of(args, kwargs)
            if len(ids) != len(x) and (ids.dim() == 1 or len(ids) == 1):
                found.add(name)

        return look

    own = [layer for layer in layers if isinstance(layer.module, nn.Embedding)]
    if not own:
        return found
    handles = [layer.module.register_forward_pre_hook(hook(layer.name), with_kwargs=True) for layer in own]
    try:
        with torch.no_grad():
            learned.model(learned.params, learned.buffers, x, learned.task, False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _by_layers(learned: Learned, uses: Uses, y: Tensor, wanted: Wanted) -> Params:
    """Sum what is wanted over samples from the inputs of the layers and the gradients of their outputs."""
    found: Params = {}
    every = wanted.targets(uses.outputs.detach(), y)
    for i, (targets, weight) in enumerate(every):
        total = wanted.score(uses.outputs, targets).sum()
        more = _by_rules(learned, uses, total, weight, wanted.transform, keep=i < len(every) - 1)
        for name, s in more.items():
            found[name] = found[name] + s if name in found else s
    return found


def _by_rules(
    learned: Learned,
    uses: Uses,
    total: Tensor,
    weight: Tensor,
    f: Callable[[Tensor], Tensor],
    keep: bool = False,
) -> Params:
    """Sum weight x f(d total / d theta) over samples, by entry, for a sum of scores of single samples."""
    outputs = [use.outputs for use in uses.layers]
    deltas = torch.autograd.grad(total, outputs, retain_graph=keep, allow_unused=True)
    found: Params = {}
    for use, delta in zip(uses.layers, deltas, strict=True):
        # What a layer gives may be unused, such as an auxiliary output.
        if delta is None:
            continue
        rule = RULES[type(use.layer.module)]
        for leaf, s in rule(use.layer.module, use.inputs, delta, weight, f).items():
            if f"{use.layer.name}.{leaf}" in learned.layout.names:
                found[f"{use.layer.name}.{leaf}"] = s
    return found


def _forward(learned: Learned, layers: list[Layer], x: Input) -> Uses | None:
    """Return the outputs of the model and what each layer captured, with a graph between them.

    None where a layer is not used once per sample.
    """
    captured: list[Use] = []

    def expand(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        # One look-up per sample in the place of one for all.
        ids = _input_of(args, kwargs)
        ids = ids[None] if ids.dim() == 1 else ids
        return (ids.expand(len(x), *ids.shape[1:]),), {}

    def hook(layer: Layer) -> Callable[..., Tensor]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor:
            captured.append(Use(layer, _input_of(args, kwargs).detach().clone(), out))
            # The next layer may work in place.
            return out.clone()

        return keep

    # A graph must reach back to the first layer; biases and the first entry are the cheapest leaves for it.
    first = next(iter(learned.layout.names))
    all_biased = all(getattr(layer.module, "bias", None) is not None for layer in layers)
    params = {}
    for name, p in learned.params.items():
        is_leaf = name == first or name.endswith("bias") or not all_biased
        params[name] = p.detach().requires_grad_(is_leaf and p.is_floating_point())

    # Before the hooks of the user, which may change what a layer gives.
    handles = [
        layer.module.register_forward_hook(hook(layer), with_kwargs=True, prepend=True) for layer in layers
    ]
    handles += [
        layer.module.register_forward_pre_hook(expand, with_kwargs=True) for layer in layers if layer.shared
    ]
    try:
        with torch.enable_grad():
            out, _ = learned.model(params, learned.buffers, x, learned.task, False)
    finally:
        for handle in handles:
            handle.remove()

    once = {use.layer.name for use in captured if len(use.inputs) == len(x) and use.outputs.requires_grad}
    if len(captured) != len(layers) or len(once) != len(layers):
        return None
    return Uses(out, captured)


def _input_of(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """Return the input of a layer, which it was given by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


# The rules: the sums of a layer's entries, from its inputs x and the gradients of its outputs, [B, ...]. As
# f(a b) = f(a) f(b), a linear layer without places needs f(delta)^T f(x) only.


def _of_linear(
    layer: nn.Linear, x: Tensor, delta: Tensor, weight: Tensor, f: Callable[[Tensor], Tensor]
) -> Params:
    if x.dim() == 2:
        weighted = f(delta) * weight[:, None]
        return {"weight": weighted.T @ f(x), "bias": weighted.sum(0)}
    x, delta = x.flatten(1, -2), delta.flatten(1, -2)
    return {"weight": _of_places(x.mT, delta.mT, weight, f), "bias": weight @ f(delta.sum(1))}


def _of_convolution(
    layer: nn.Conv1d | nn.Conv2d, x: Tensor, delta: Tensor, weight: Tensor, f: Callable[[Tensor], Tensor]
) -> Params:
    # One dimension is two with a kernel of height 1. A padding that is a word was excluded by `_is_unusual`.
    sizes: list[Any] = [layer.kernel_size, layer.dilation, layer.padding, layer.stride]
    if isinstance(layer, nn.Conv1d):
        x, delta = x.unsqueeze(2), delta.unsqueeze(2)
        sizes = [(neutral, *size) for neutral, size in zip((1, 1, 0, 1), sizes, strict=True)]

    # The gradient is delta times the patches, of many numbers, in slices that fit in memory.
    flat, shape = delta.flatten(2), layer.weight.shape
    size = max(1, NUMBERS // max(1, layer.weight.numel() + x[0].numel() * layer.weight[0, 0].numel()))
    total = torch.zeros(shape.numel(), dtype=delta.dtype, device=delta.device)
    for xs, ds, ws in zip(x.split(size), flat.split(size), weight.split(size), strict=True):
        patches = F.unfold(xs, *sizes)
        total += ws @ f(torch.bmm(ds, patches.transpose(1, 2))).flatten(1)
    return {"weight": total.view(shape), "bias": weight @ f(flat.sum(2))}


def _of_places(x: Tensor, delta: Tensor, weight: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sum [o, i] of weight x f(sum over places), from x [B, i, P] and delta [B, o, P]."""
    rows, columns = delta.shape[1], x.shape[1]
    size = max(1, NUMBERS // max(1, rows * columns))
    total = torch.zeros(rows * columns, dtype=delta.dtype, device=delta.device)
    for xs, ds, ws in zip(x.split(size), delta.split(size), weight.split(size), strict=True):
        total += ws @ f(torch.bmm(ds, xs.mT)).flatten(1)
    return total.view(rows, columns)


def _of_group_norm(
    layer: nn.GroupNorm, x: Tensor, delta: Tensor, weight: Tensor, f: Callable[[Tensor], Tensor]
) -> Params:
    unit = F.group_norm(x, layer.num_groups, eps=layer.eps)
    shape = (len(x), x.shape[1], -1)
    own = {"weight": (delta * unit).reshape(shape).sum(2), "bias": delta.reshape(shape).sum(2)}
    return {leaf: weight @ f(each) for leaf, each in own.items()}


def _of_layer_norm(
    layer: nn.LayerNorm, x: Tensor, delta: Tensor, weight: Tensor, f: Callable[[Tensor], Tensor]
) -> Params:
    unit = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    own = {"weight": delta * unit, "bias": delta}
    shape = (len(x), -1, *layer.normalized_shape)
    return {
        leaf: torch.tensordot(weight, f(each.reshape(shape).sum(1)), dims=1) for leaf, each in own.items()
    }


def _of_embedding(
    layer: nn.Embedding, x: Tensor, delta: Tensor, weight: Tensor, f: Callable[[Tensor], Tensor]
) -> Params:
    # The gradient of a sample in a row is the sum over the places with its token; few rows have any.
    count, width = layer.weight.shape
    sample = torch.arange(len(x), device=x.device).view(-1, *[1] * (x.dim() - 1))
    keys, place = (sample * count + x).flatten().unique(return_inverse=True)
    rows = delta.new_zeros(len(keys), width).index_add_(0, place, delta.reshape(-1, width))
    token = keys % count
    weighted = f(rows) * weight[keys // count, None]
    if layer.padding_idx is not None:
        weighted = weighted.masked_fill((token == layer.padding_idx)[:, None], 0)
    return {"weight": torch.zeros_like(layer.weight, dtype=delta.dtype).index_add_(0, token, weighted)}


RULES: dict[type, Any] = {
    nn.Linear: _of_linear,
    nn.Conv1d: _of_convolution,
    nn.Conv2d: _of_convolution,
    nn.GroupNorm: _of_group_norm,
    nn.LayerNorm: _of_layer_norm,
    nn.Embedding: _of_embedding,
}
"""The layers whose gradients per sample are known: (layer, x, delta, weight, f) -> the sums by entry."""
