"""Contexts: one set of weights that every task sees in its own way. Supermasks, keys, gates."""

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

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@lru_cache(maxsize=4096)
def signs(task: str, layer: str, width: int, flips: float) -> Tensor:
    """The key c [width] of a task for a layer: -1 with probability `flips`, else 1."""
    return 1.0 - 2.0 * (torch.rand(width, generator=key("psp", task, layer)) < flips)


@lru_cache(maxsize=32)
def turns(task: str, layer: str, width: int, keys: str) -> Tensor:
    """The key C [width, width] in float64 of a task for a layer: C C^T = 1.

    complex: blocks of two, [[cos phi, sin phi], [-sin phi, cos phi]], phi uniform: (x1 + i x2) e^{i phi} on pairs (x C); an odd
    last input has a sign. rotation: uniform among all orthogonal matrices: the Q of a Gaussian matrix, R's diagonal positive.
    """
    g = key("psp", keys, task, layer)
    if keys == "rotation":
        q, r = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))
        turned: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
        return turned
    phi = 2 * torch.pi * torch.rand((width + 1) // 2, generator=g, dtype=torch.float64)
    blocks = torch.stack([phi.cos(), phi.sin(), -phi.sin(), phi.cos()], 1).view(-1, 2, 2)
    c: Tensor = torch.block_diag(*blocks)[:width, :width]
    if width % 2:
        c[-1, -1] = 1.0 if phi[-1] < torch.pi else -1.0
    return c


@dataclass(frozen=True)
class PSP(Correction):
    """Parameter superposition: each task multiplies the inputs of every layer by its own key: y = (x C_t) W.

    C_t is drawn by the names of task and layer, so that nothing is kept; the weights seen are W C_t^T, W [units, inputs, ...]
    (for a convolution the inputs are its channels). `keys`: "binary", C_t = diag(c), c -1 with probability `flips`, else 1;
    "complex", phases: inputs are taken in pairs (1, 2), (3, 4), .. as x1 + i x2 and multiplied by e^{i phi}, phi uniform, which
    is a rotation of each pair (the authors' complex weights are two real ones; an odd last input has a sign); "rotation", a
    random orthogonal matrix. Layers are the shared weights of two or more dimensions, the head too. `flips` = 0 (C = 1) is
    plain training with any keys. Without a task the key is 1. Cheung et al. 2019.
    """

    flips: float = 0.5
    keys: Literal["binary", "complex", "rotation"] = "binary"

    neutral: ClassVar[dict[str, float]] = {"flips": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.flips <= 1:
            raise ConsilienceError(f"`flips` should be in [0, 1]. Found `flips = {self.flips}`.")
        if self.keys not in ("binary", "complex", "rotation"):
            raise ConsilienceError(
                f"`keys` should be binary, complex or rotation. Found `keys = {self.keys!r}`."
            )
        if self.keys != "binary" and self.flips not in (0, 0.5):
            raise ConsilienceError(
                f"`flips` is of binary keys, and should be 0.5 with others, or 0 for plain training. Found `flips = {self.flips}`."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return without_tasks(facts)

    def seen(self, w: Tensor, task: str, layer: str) -> Tensor:
        """W C_t^T over the inputs of W [units, inputs, ...]."""
        if self.keys == "binary" or not self.flips:
            c = signs(task, layer, w.shape[1], self.flips).to(w)
            return w * c.view(1, -1, *[1] * (w.ndim - 2))
        seen: Tensor = torch.tensordot(
            w, turns(task, layer, w.shape[1], self.keys).to(w), ([1], [1])
        ).movedim(-1, 1)
        return seen

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        assert ctx.model is not None
        if task is None:
            return params
        a, new = anatomy(ctx.model), dict(params)
        for n in (*a.layers, *(a.head or ())[:1]):
            new[str(n)] = self.seen(params[str(n)], task, str(n))
        return new


@lru_cache(maxsize=4096)
def gates(task: str, layer: str, units: int, fraction: float) -> Tensor:
    """The gates [units] of a task for a layer: exactly round(fraction x units) of them 0, but at least one is 1."""
    order = torch.randperm(units, generator=key("xdg", task, layer))
    return torch.ones(units).index_fill(0, order[: min(units - 1, round(fraction * units))], 0.0)


@dataclass(frozen=True)
class XdG(Correction):
    """Context-dependent gating: for each task a random `fraction` of the units of every hidden layer is silent.

    h_t = g_t * relu(W x + b), g_t in {0, 1} drawn by the names of task and layer, exactly round(fraction x units) of them 0;
    nothing is kept. Units are gated by the rows of their layers, as is exact with ReLU and max pooling, without norms; the
    head is not gated. `fraction` = 0 is plain training; composes with a penalty such as si. Without a task no unit is silent.
    Masse, Grant & Freedman 2018.
    """

    fraction: float = 0.8

    neutral: ClassVar[dict[str, float]] = {"fraction": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ConsilienceError(
                f"`fraction` of silent units should be in [0, 1). Found `fraction = {self.fraction}`."
            )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return without_tasks(facts) or (rows_with_units(facts.model) if facts.model is not None else None)

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        assert ctx.model is not None
        if task is None:
            return params
        a, new = anatomy(ctx.model), dict(params)
        for n in a.layers:
            w = params[n]
            g = gates(task, n, len(w), self.fraction).to(w)
            new[n] = w * g.view(-1, *[1] * (w.ndim - 1))
            if n in a.biases:
                new[a.biases[n]] = params[a.biases[n]] * g
        return new


class TopK(torch.autograd.Function):
    """1 for the k largest of a tensor (of equal ones the first), 0 for its others; the gradient goes straight through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, k: int) -> Tensor:
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


@dataclass(frozen=True)
class SupSup(Correction):
    """Supermasks in superposition: weights never change; each task learns a score for each weight and uses the top ones.

    W_t = M_t * c sign(W), M_t the round(`keep` x size) largest |score| of a layer, by rank; the gradient passes M_t straight
    through to the scores; c = sqrt(2 / (keep x inputs)). Layers are the shared weights of two or more dimensions, the head
    too; their biases are 0, and no shared entry is trained. Scores are entries `supsup/<task>/<layer>`; the masks travel, one
    bit a weight: agents of one origin that exchange them can all do every task. Several agents' masks of one task are averaged.
    Without a task, and for an unknown one, the masks are averaged.
    Wortsman et al. 2020.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConsilienceError(f"`keep` of the weights should be in (0, 1]. Found `keep = {self.keep}`.")

    def refuse(self, facts: ScheduleFacts) -> str | None:
        return without_tasks(facts)

    @staticmethod
    def layers(model: Model) -> tuple[str, ...]:
        """The weights that are masked."""
        a = anatomy(model)
        return (*a.layers, *(n for n in (a.head or ())[:1] if n is not None and not model.frozen(n)))

    def kept(self, size: int) -> int:
        """How many weights of a layer a task uses."""
        return max(1, round(self.keep * size))

    def mask_of(self, scores: Tensor) -> Tensor:
        """The mask of these scores."""
        mask: Tensor = TopK.apply(scores.abs(), self.kept(scores.numel()))  # type: ignore[no-untyped-call]
        return mask

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> dict[str, Any]:
        """The masks of each task by layer, and the tasks of this learn (none in predict)."""
        found: dict[str, list[dict[str, Tensor]]] = {}
        for _, item in sorted(memory.items()):
            shapes: Mapping[str, list[int]] = item.meta["shapes"]
            found.setdefault(item.meta["task"], []).append(
                {n: unpack(t, shapes[n]) for n, t in item.group("mask").items()}
            )
        masks = {t: {n: torch.stack([m[n] for m in ms]).mean(0) for n in ms[0]} for t, ms in found.items()}
        return {"masks": masks, "now": tuple(dict.fromkeys(str(s.task) for s in sources))}

    def begin(self, start: Beginning) -> Begun:
        """Scores of a new task, uniform in +-1 / sqrt(inputs)."""
        model, params, sources, generator = start.model, start.params, start.sources, start.generator
        new = dict(params)
        for s in sources:
            for n in self.layers(model):
                name = f"supsup/{s.task}/{n}"
                if name not in new:
                    bound = params[n][0].numel() ** -0.5
                    new[name] = ((2 * torch.rand(params[n].shape, generator=generator) - 1) * bound).to(
                        params[n]
                    )
        its = tuple(f"supsup/{s.task}/" for s in sources)
        others = {n for n in new if n.startswith("supsup/") and not n.startswith(its)}
        return Begun(new, frozen=others)

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        assert ctx.model is not None
        known, names = ctx.recalled, self.layers(ctx.model)
        if task in known["now"]:
            masks = {n: self.mask_of(params[f"supsup/{task}/{n}"]) for n in names}
        elif task in known["masks"]:
            masks = known["masks"][task]
        elif known["masks"]:
            masks = {n: torch.stack([m[n] for m in known["masks"].values()]).mean(0) for n in names}
        else:
            masks = {}
        new, biases = dict(params), anatomy(ctx.model)
        for n in names:
            w = params[n].detach()
            fixed = w.sign() * (2 / (self.keep * w[0].numel())) ** 0.5
            new[n] = fixed * masks[n].to(w) if n in masks else fixed
            b = biases.head[1] if biases.head and n == biases.head[0] else biases.biases.get(n)
            if b is not None:
                new[b] = torch.zeros_like(params[b])
        return new

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        """No shared entry of the model moves; scores do."""
        assert ctx.model is not None
        a = anatomy(ctx.model)
        still = {*a.layers, *a.biases.values(), *a.others, *(n for n in a.head or () if n)}
        shapes = dict(zip(step.layout.names, step.layout.shapes, strict=True))
        return spread(step.layout, {n: step.theta.new_zeros(shapes[n]) for n in still if n in shapes})

    def summarise(self, learned: Learned, ctx: Context) -> Module:
        start = f"supsup/{learned.task}/"
        masks = {n[len(start) :]: self.mask_of(s) for n, s in learned.params.items() if n.startswith(start)}
        shapes = {n: list(m.shape) for n, m in masks.items()}
        return Module(
            {f"mask/{n}": pack(m) for n, m in masks.items()}, {"task": learned.task, "shapes": shapes}
        )


def pack(mask: Tensor) -> Tensor:
    """A mask of 0 and 1 as bytes [ceil(n / 8)], one bit an entry.

    >>> unpack(pack(torch.tensor([[1.0, 0.0, 1.0]])), [1, 3]).tolist()
    [[1.0, 0.0, 1.0]]
    """
    bits = mask.reshape(-1).to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1).to(torch.uint8)


def unpack(data: Tensor, shape: list[int]) -> Tensor:
    """The mask in float32 that `pack` made."""
    bits = (data.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1
    return bits.reshape(-1)[: torch.Size(shape).numel()].view(shape).float()
