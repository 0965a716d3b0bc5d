"""Frozen feature extractors: timm models and torch modules, with the preparation of their images, under one hash."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.model import Model
from consilience.core.params import finite, load
from consilience.models.module import ModuleModel, structure

Size = int | tuple[int, int] | str | None


class Backbone(nn.Module):
    """psi(x) [B, d] of images x [B, 1 or c, H, W] in [0, 1]: resized, grey repeated to c channels, (x - mean) / std, then the body.

    Its own features [B, d] are given back as they are. Everything that its outputs depend on is an entry, so that one hash names it:
    the body's parameters, its buffers (as parameters, for they never change), mean and std, and `identity`, 16 bytes that stand
    for what the body is and for `size`.
    """

    def __init__(
        self,
        body: nn.Module,
        what: str,
        size: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        width: int = 0,
    ) -> None:
        super().__init__()
        self.body, self.size = _fixed(body), size
        self.channels: int = next((m.in_channels for m in body.modules() if isinstance(m, nn.modules.conv._ConvNd)), 3)
        self.mean, self.std = (self._per_channel(n, v) for n, v in (("mean", mean), ("std", std)))
        if not bool((self.std > 0).all()):
            raise ConsilienceError(f"`std` should be positive. Found `std = {tuple(std)}`.")
        digest = hashlib.blake2b(json.dumps([what, size]).encode(), digest_size=16).digest()
        self.identity = nn.Parameter(torch.tensor([*digest], dtype=torch.uint8), requires_grad=False)
        self.width = width or self._measured()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            if x.shape[1] != self.width:
                raise ConsilienceError(f"features should have the backbone's width {self.width}. Found {x.shape[1]}.")
            return x
        if x.ndim != 4 or x.shape[1] not in (1, self.channels) or not x.is_floating_point():
            found = f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.")
            raise ConsilienceError(
                f"a backbone should be given images [B, 1 or {self.channels}, H, W] in [0, 1], or its features [B, {self.width}]. "
                f"Found {found}."
            )
        if self.size is not None and x.shape[-2:] != self.size:
            smaller = x.shape[-2] > self.size[0] or x.shape[-1] > self.size[1]
            x = F.interpolate(x, self.size, mode="bilinear", antialias=smaller)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)  # a third quicker on CPUs
        out = self.body(x)
        if not isinstance(out, Tensor):
            raise ConsilienceError(f"a backbone should give a tensor of features. Found {type(out).__name__}.")
        return out.flatten(1)

    def _per_channel(self, name: str, values: Sequence[float]) -> nn.Parameter:
        given = tuple(float(v) for v in values)
        if len(given) not in (1, self.channels):
            raise ConsilienceError(f"`{name}` should have a number for each of {self.channels} channels. Found {len(given)}.")
        given = given * self.channels if len(given) == 1 else given
        return nn.Parameter(torch.tensor(given).view(-1, 1, 1), requires_grad=False)

    def _measured(self) -> int:
        """The number d of features of an image."""
        side = self.size or (32, 32)
        self.width = -1
        with torch.no_grad():
            return int(self.eval()(torch.zeros(1, self.channels, *side)).shape[1])


def of_timm(name: str, checkpoint: str | Path | None, size: Size, mean: Any, std: Any, more: dict[str, Any]) -> ModuleModel:
    """The backbone of a timm model: the hub's weights, those of a file, or, with `pretrained=False`, random ones that are always the same."""
    try:
        import timm
    except ImportError as e:
        raise ConsilienceError("a backbone by name should have timm: pip install 'consilience[vision]'. Found none.") from e
    if "num_classes" in more:
        raise ConsilienceError(f"a backbone gives features, and no classes. Found `num_classes = {more['num_classes']!r}`.")
    pretrained = more.pop("pretrained", checkpoint is None)
    if pretrained and checkpoint is not None:
        raise ConsilienceError("weights should come from `checkpoint` or with `pretrained=True`. Found both.")
    elsewhere = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    name = name if elsewhere else name.removeprefix("timm/")
    kind = name if elsewhere else name.partition(".")[0]  # a tag names weights, which are entries
    if not elsewhere and not timm.is_model(kind):
        raise unknown("name", name, timm.list_models())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            body = timm.create_model(name, pretrained=pretrained, num_classes=0, **more)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as e:
        reason = str(e).splitlines()[0][:200] if str(e) else "no reason"
        where = "; without the hub, give `checkpoint`" if pretrained else ""
        raise ConsilienceError(f"timm should make {name!r}{where}. Found {type(e).__name__}: {reason}.") from e
    own = dict(getattr(body, "pretrained_cfg", None) or {})
    if checkpoint is not None:
        head = own.get("classifier") or ()
        _read(body, checkpoint, (head,) if isinstance(head, str) else tuple(head))
    given: Size = tuple(own.get("input_size", (3, 224, 224))[-2:]) if size == "own" else size
    mean = own.get("mean", (0.0,)) if mean is None else mean
    std = own.get("std", (1.0,)) if std is None else std
    options = "".join(f", {k}={v!r}" for k, v in sorted(more.items()))
    return _made(body, f"timm {kind}{options}", given, mean, std, f"{name!r}{options}")


def of_module(module: nn.Module | Model, checkpoint: str | Path | None, size: Size, mean: Any, std: Any) -> ModuleModel:
    """The backbone of a torch module, or of a model of one: its head is taken off."""
    model = module if isinstance(module, Model) else ModuleModel(module)
    if not isinstance(model, ModuleModel):
        raise ConsilienceError(f"a backbone should be a timm model's name, a torch module or a model of one. Found {model!r}.")
    head = model._head
    body = copy.deepcopy(model.body()._module)
    if checkpoint is not None:
        _read(body, checkpoint, (head,) if head else ())
    given = None if size == "own" else size
    mean, std = (0.0,) if mean is None else mean, (1.0,) if std is None else std
    return _made(body, structure(body), given, mean, std, model.description, model.width)


def _made(body: nn.Module, what: str, size: Size, mean: Any, std: Any, name: str, width: int = 0) -> ModuleModel:
    if isinstance(size, str) or (size is not None and min(_pair(size)) < 1):
        raise ConsilienceError(f"`size` should be one or two whole numbers >= 1, 'own' or None. Found `size = {size!r}`.")
    both = None if size is None else _pair(size)
    module = Backbone(body.float(), what, both, _tuple(mean), _tuple(std), width)
    prepared = f"{both}, mean={_tuple(mean)}, std={_tuple(std)}"
    digest = bytes(module.identity.tolist()).hex()[:8]
    described = f"backbone({name}, size={prepared}, {digest})"
    return ModuleModel(module, module.width, frozen=("*",), headless=True, name=described)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _tuple(values: Any) -> tuple[float, ...]:
    return (float(values),) if isinstance(values, (int, float)) else tuple(float(v) for v in values)


def _read(body: nn.Module, path: str | Path, head: Sequence[str]) -> None:
    """Put the weights of a safetensors file in a module, in float32; what is amiss is named, but for the classifier's."""
    tensors, _ = load(path)
    finite(tensors, str(path))
    own = body.state_dict()

    def counts(n: str) -> bool:
        return not any(n == h or n.startswith(f"{h}.") for h in head)

    for what, names in (
        ("all entries of the backbone", sorted(n for n in own.keys() - tensors.keys() if counts(n))),
        ("no others", sorted(n for n in tensors.keys() - own.keys() if counts(n))),
    ):
        if names:
            verb = "no" if what.startswith("all") else "also"
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConsilienceError(f"a checkpoint should have {what}. Found {verb} {', '.join(names[:3])}{more} in {path}.")
    common = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items() if n in own}
    for n, t in common.items():
        if t.shape != own[n].shape:
            a, b = tuple(own[n].shape), tuple(t.shape)
            raise ConsilienceError(
                f"a checkpoint's entries should have the backbone's shapes. Found {b}, not {a}, for {n!r} in {path}."
            )
    body.load_state_dict({**own, **common})


def _fixed(module: nn.Module) -> nn.Module:
    """The module with its buffers as parameters of the same names: what never changes is hashed, and nobody averages it."""
    for part in module.modules():
        for n, b in [(n, b) for n, b in part._buffers.items() if b is not None]:
            del part._buffers[n]
            part._non_persistent_buffers_set.discard(n)
            part.register_parameter(n, nn.Parameter(b.detach().clone(), requires_grad=False))
    return module.requires_grad_(False).eval()
