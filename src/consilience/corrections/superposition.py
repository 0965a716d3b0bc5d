"""Superposition: one set of weights that every task sees in its own way: by keys, gates or supermasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Module
from consilience.core.model import Model
from consilience.core.params import Params, key
from consilience.core.source import Source
from consilience.corrections.anatomy import anatomy, rows_with_units, spread, without_tasks
from consilience.corrections.isolation import task_entries

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@lru_cache(maxsize=4096)
def signs(task: str, layer: str, width: int, flips: float) -> Tensor:
    """Return the key c [width] of a task for a layer: -1 with probability `flips`, else 1."""
    return 1.0 - 2.0 * (torch.rand(width, generator=key("psp", task, layer)) < flips)


@lru_cache(maxsize=32)
def rotation_key(task: str, layer: str, width: int, keys: str) -> Tensor:
    """Return the orthogonal key C [width, width] of a task for a layer, in float64.

    complex: blocks of two, [[cos phi, sin phi], [-sin phi, cos phi]], phi uniform: (x1 + i x2) e^{i phi} on
    pairs (x C); an odd last input has a sign. rotation: uniform among all orthogonal matrices: the Q of a
    Gaussian matrix, with R's diagonal positive.
    """
    generator = key("psp", keys, task, layer)
    if keys == "rotation":
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        # Without this Q is not uniform, because the signs in R are a convention of the algorithm.
        rotation: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
        return rotation

    # The same angles in complex numbers would need complex parameters.
    phi = 2 * torch.pi * torch.rand((width + 1) // 2, generator=generator, dtype=torch.float64)
    blocks = torch.stack([phi.cos(), phi.sin(), -phi.sin(), phi.cos()], 1).view(-1, 2, 2)
    phases: Tensor = torch.block_diag(*blocks)[:width, :width]
    if width % 2:
        phases[-1, -1] = 1.0 if phi[-1] < torch.pi else -1.0
    return phases


@dataclass(frozen=True)
class PSP(Correction):
    """Parameter superposition: each task multiplies the inputs of every layer by its own key: y = (x C_t) W.

    C_t is drawn by the names of task and layer, so nothing is stored; the weights seen are W C_t^T, W
    [units, inputs, ...] (for a convolution the inputs are its channels). `keys`: "binary", C_t = diag(c), c
    -1 with probability `flips`, else 1; "complex", phases: inputs are taken in pairs (1, 2), (3, 4), .. as
    x1 + i x2 and multiplied by e^{i phi}, phi uniform, which is a rotation of each pair (the authors'
    complex weights are two real ones; an odd last input has a sign); "rotation", a random orthogonal matrix.
    Layers are the shared weights of two or more dimensions, and the head. `flips` = 0 (C = 1) is plain
    training with any keys. Without a task the key is 1. Cheung et al. 2019.
    """

    flips: float = 0.5
    keys: Literal["binary", "complex", "rotation"] = "binary"

    neutral: ClassVar[dict[str, float]] = {"flips": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.flips <= 1:
            raise ConsilienceError(f"`flips` must be in [0, 1], got {self.flips}.")
        if self.keys not in ("binary", "complex", "rotation"):
            raise ConsilienceError(f"`keys` must be binary, complex or rotation, got {self.keys!r}.")
        if self.keys != "binary" and self.flips not in (0, 0.5):
            raise ConsilienceError(
                f"`flips` must be 0.5, or 0 for plain training, with keys={self.keys!r}, got {self.flips}; "
                "other values need keys='binary'."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return without_tasks(facts)

    def seen(self, weight: Tensor, task: str, layer: str) -> Tensor:
        """Return the weight multiplied by the task's key over its inputs: W C_t^T."""
        width = weight.shape[1]
        if self.keys == "binary" or not self.flips:
            c = signs(task, layer, width, self.flips).to(weight)
            return weight * c.view(1, -1, *[1] * (weight.ndim - 2))

        # tensordot puts the new axis last, and a convolution's places follow the inputs.
        turned = torch.tensordot(weight, rotation_key(task, layer, width, self.keys).to(weight), ([1], [1]))
        seen: Tensor = turned.movedim(-1, 1)
        return seen

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return the parameters with the task's key on every layer."""
        assert ctx.model is not None
        if task is None:
            return params
        weights = anatomy(ctx.model).weights
        return {**params, **{name: self.seen(params[name], task, name) for name in weights}}


@lru_cache(maxsize=4096)
def gates(task: str, layer: str, units: int, fraction: float) -> Tensor:
    """Return the gates [units] of a task for a layer: round(fraction x units) are 0, at least one is 1."""
    order = torch.randperm(units, generator=key("xdg", task, layer))
    return torch.ones(units).index_fill(0, order[: min(units - 1, round(fraction * units))], 0.0)


@dataclass(frozen=True)
class XdG(Correction):
    """Context-dependent gating: for each task a random `fraction` of every hidden layer's units is silent.

    h_t = g_t * relu(W x + b), g_t in {0, 1} drawn by the names of task and layer, exactly round(fraction x
    units) of them 0; nothing is stored. Units are gated by the rows of their layers, which is exact with
    ReLU and max pooling, without norms; the head is not gated. `fraction` = 0 is plain training; composes
    with a penalty such as si. Without a task no unit is silent. Masse, Grant & Freedman 2018.
    """

    fraction: float = 0.8

    neutral: ClassVar[dict[str, float]] = {"fraction": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ConsilienceError(f"`fraction` (of silent units) must be in [0, 1), got {self.fraction}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return without_tasks(facts) or (rows_with_units(facts.model) if facts.model is not None else None)

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return the parameters with the rows of silent units at 0."""
        assert ctx.model is not None
        if task is None:
            return params
        parts, gated = anatomy(ctx.model), dict(params)
        for name in parts.layers:
            weight = params[name]
            gate = gates(task, name, len(weight), self.fraction).to(weight)
            gated[name] = weight * gate.view(-1, *[1] * (weight.ndim - 1))

            # relu(0 x + b) would answer with the bias.
            if name in parts.biases:
                gated[parts.biases[name]] = params[parts.biases[name]] * gate
        return gated


class TopK(torch.autograd.Function):
    """1 for the k largest of a tensor (of equal ones the first), else 0; the gradient passes unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, k: int) -> Tensor:
        # `topk` does not say which of equal values it takes.
        flat = scores.reshape(-1)
        least = flat.kthvalue(flat.shape[0] - k + 1).values
        more, same = flat > least, flat == least
        return (more | (same & (same.cumsum(0) <= k - more.sum()))).to(scores).view(scores.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor, None]:
        return out, None


@dataclass(frozen=True, eq=False)
class Supermasks:
    """The masks of each task by layer, and the tasks of this visit (none in predict)."""

    masks: Mapping[str, Mapping[str, Tensor]]
    current: tuple[str, ...]

    def of(self, task: str | None, layers: tuple[str, ...]) -> Mapping[str, Tensor]:
        """Return the masks of a task; for None or an unknown one the mean over tasks, {} without any."""
        if task in self.masks:
            return self.masks[str(task)]
        if not self.masks:
            return {}
        return {n: torch.stack([masks[n] for masks in self.masks.values()]).mean(0) for n in layers}


@dataclass(frozen=True)
class SupSup(Correction):
    """Supermasks in superposition: weights are frozen; each task learns scores and uses the top weights.

    W_t = M_t * c sign(W), M_t the round(`keep` x size) largest |score| of a layer, ranked; the gradient
    passes M_t unchanged to the scores; c = sqrt(2 / (keep x inputs)). Layers are the shared weights of two
    or more dimensions, and the head; their biases are 0, and no shared entry is trained. Scores are entries
    `supsup/<task>/<layer>`. Masks are sent, one bit per weight: agents of one origin that exchange them can
    all do every task. Masks of one task from several agents are averaged. Without a task, and for an unknown
    one, the masks are averaged. Wortsman et al. 2020.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConsilienceError(f"`keep` (of the weights) must be in (0, 1], got {self.keep}.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return without_tasks(facts)

    @staticmethod
    def layers(model: Model) -> tuple[str, ...]:
        """Return the names of the weights that are masked."""
        return tuple(name for name in anatomy(model).weights if not model.frozen(name))

    def kept(self, size: int) -> int:
        """Return how many weights of a layer a task uses."""
        return max(1, round(self.keep * size))

    def mask_of(self, scores: Tensor) -> Tensor:
        """Return the mask of these scores."""
        mask: Tensor = TopK.apply(scores.abs(), self.kept(scores.numel()))  # type: ignore[no-untyped-call]
        return mask

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Supermasks:
        """Return the masks of all tasks, those of one task averaged."""
        of_task: dict[str, list[dict[str, Tensor]]] = {}
        for _, item in sorted(memory.items()):
            shapes: Mapping[str, list[int]] = item.meta["shapes"]
            unpacked = {layer: unpack(bits, shapes[layer]) for layer, bits in item.group("mask").items()}
            of_task.setdefault(item.meta["task"], []).append(unpacked)

        # The mean of several masks is no mask of 0 and 1, and is used as it is.
        masks = {
            task: {layer: torch.stack([mask[layer] for mask in several]).mean(0) for layer in several[0]}
            for task, several in of_task.items()
        }
        return Supermasks(masks, tuple(dict.fromkeys(str(source.task) for source in sources)))

    def begin(self, start: Beginning) -> Begun:
        """Add the scores of a new task, uniform in +-1 / sqrt(inputs), and freeze those of other tasks."""
        params = dict(start.params)
        for source in start.sources:
            for layer in self.layers(start.model):
                name = f"supsup/{source.task}/{layer}"
                if name not in params:
                    weight = start.params[layer]
                    drawn = 2 * torch.rand(weight.shape, generator=start.generator) - 1
                    params[name] = (drawn * weight[0].numel() ** -0.5).to(weight)

        # A vector of other tasks' scores would grow with every task, and nothing reads it.
        own = {f"supsup/{source.task}/{n}" for source in start.sources for n in self.layers(start.model)}
        others = {name for name in params if name.startswith("supsup/") and name not in own}
        return Begun(params, frozen=others)

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return the parameters with every layer's weights masked, of one size, and its bias 0."""
        assert ctx.model is not None
        recalled: Supermasks = ctx.recalled
        parts, layers, seen = anatomy(ctx.model), self.layers(ctx.model), dict(params)
        if task in recalled.current:
            # Computed from the scores, so that they get a gradient.
            masks: Mapping[str, Tensor] = {n: self.mask_of(params[f"supsup/{task}/{n}"]) for n in layers}
        else:
            masks = recalled.of(task, layers)

        # Detached, because no weight trains; the size is that of Kaiming's normal draw over the kept inputs.
        for name in layers:
            weight = params[name].detach()
            fixed = weight.sign() * (2 / (self.keep * weight[0].numel())) ** 0.5
            seen[name] = fixed * masks[name].to(weight) if name in masks else fixed
            bias = parts.bias_of(name)
            if bias is not None:
                seen[bias] = torch.zeros_like(params[bias])
        return seen

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        """Return 0 for all shared entries of the model; only scores train."""
        assert ctx.model is not None
        parts = anatomy(ctx.model)
        head = parts.head.entries if parts.head else ()
        held = {*parts.layers, *parts.biases.values(), *parts.others, *head}
        shapes = dict(zip(step.layout.names, step.layout.shapes, strict=True))
        return spread(step.layout, {n: step.theta.new_zeros(shapes[n]) for n in held if n in shapes})

    def summarise(self, learned: Learned, ctx: Context) -> Module:
        """Return the task's masks, one bit per weight."""
        scores = task_entries(learned.params, "supsup", learned.task)
        masks = {layer: self.mask_of(score) for layer, score in scores.items()}
        shapes = {layer: list(mask.shape) for layer, mask in masks.items()}
        packed = {f"mask/{layer}": pack(mask) for layer, mask in masks.items()}
        return Module(packed, {"task": learned.task, "shapes": shapes})


def pack(mask: Tensor) -> Tensor:
    """Store a mask of 0 and 1 as bytes [ceil(n / 8)], one bit per entry.

    >>> unpack(pack(torch.tensor([[1.0, 0.0, 1.0]])), [1, 3]).tolist()
    [[1.0, 0.0, 1.0]]
    """
    # Padded to whole bytes; `unpack` cuts the padding off.
    bits = mask.reshape(-1).to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1).to(torch.uint8)


def unpack(data: Tensor, shape: list[int]) -> Tensor:
    """Return the mask in float32 that `pack` stored."""
    bits = (data.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1
    return bits.reshape(-1)[: torch.Size(shape).numel()].view(shape).float()
