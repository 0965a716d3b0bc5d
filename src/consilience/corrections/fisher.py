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
    target. Models made of linear layers, convolutions and group norms get the sum layer by layer from one
    backward pass per batch, all others by vmap or one sample after another.
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
    layers, count = _layers(learned), 0
    for x, y in examples.chunks(chunk):
        # The first samples show how the model uses its entries.
        if layers is not None and not count and _is_reused(learned, layers, x):
            layers = None
        sums = _by_layers(learned, layers, x, y, wanted) if layers is not None else None
        if sums is None:
            sums = _by_vmap(learned, x, y, wanted)
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


def _is_reused(learned: Learned, layers: dict[str, nn.Module], x: Input) -> bool:
    """Whether a trained entry is used elsewhere than in its layer, as in `F.linear(x, layer.weight.T)`.

    The gradients of layers would then be a part of the entry's own.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in learned.trainable.items()}
    with torch.enable_grad():
        out = learned.model({**learned.params, **leaves}, learned.buffers, x[:1], learned.task, False)[0]

    # The graph has one node that accumulates the gradient of each entry, with an edge from each of its uses.
    uses: dict[int, int] = {}
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for below, _ in node.next_functions:
            leaf = getattr(below, "variable", None)
            if leaf is not None:
                uses[id(leaf)] = uses.get(id(leaf), 0) + 1
            left.append(below)
    return any(uses.get(id(leaf), 0) > 1 for leaf in leaves.values())


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

    found: Params = {}
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
                    found[entry] = found[entry] + s if entry in found else s
    return found


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
