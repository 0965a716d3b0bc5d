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
        held = _held(body)
        self.body, self.size = _fixed(body), size
        self.channels: int = next(
            (m.in_channels for m in body.modules() if isinstance(m, nn.modules.conv._ConvNd)), 3
        )
        self.mean, self.std = (self._per_channel(n, v) for n, v in (("mean", mean), ("std", std)))
        if not bool((self.std > 0).all()):
            raise ConsilienceError(f"`std` should be positive. Found `std = {tuple(std)}`.")
        digest = hashlib.blake2b(json.dumps([what, size]).encode(), digest_size=16).digest()
        self.identity = nn.Parameter(torch.tensor([*digest], dtype=torch.uint8), requires_grad=False)
        self.width = width or self._measured(held)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            if x.shape[1] != self.width:
                raise ConsilienceError(
                    f"features should have the backbone's width {self.width}. Found {x.shape[1]}."
                )
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
        x = ((x - self.mean) / self.std).contiguous(
            memory_format=torch.channels_last
        )  # a third quicker on CPUs
        out = self.body(x)
        if not isinstance(out, Tensor):
            raise ConsilienceError(
                f"a backbone should give a tensor of features. Found {type(out).__name__}."
            )
        return out.flatten(1)

    def _per_channel(self, name: str, values: Sequence[float]) -> nn.Parameter:
        given = tuple(float(v) for v in values)
        if len(given) not in (1, self.channels):
            raise ConsilienceError(
                f"`{name}` should have a number for each of {self.channels} channels. Found {len(given)}."
            )
        given = given * self.channels if len(given) == 1 else given
        return nn.Parameter(torch.tensor(given).view(-1, 1, 1), requires_grad=False)

    def blank(self) -> Tensor:
        """Zeros [1, c, H, W] as an image that the body is tried on."""
        return torch.zeros(1, self.channels, *(self.size or (32, 32))).to(self.mean)

    def _measured(self, held: list[tuple[nn.Module, str]]) -> int:
        """The number d of features of an image. A body that puts new tensors in the place of buffers may do so here, once."""
        self.width, x = -1, self.eval().blank()
        try:
            with torch.no_grad():
                try:
                    return int(self(x).shape[1])
                except TypeError:  # of a parameter that is assigned a tensor
                    for part, n in held:
                        part.register_buffer(n, part._parameters.pop(n))
                    self(x)
                    _fixed(self.body)
                    return int(self(x).shape[1])
        except ConsilienceError:
            raise
        except (AssertionError, TypeError, RuntimeError, ValueError) as e:
            raise ConsilienceError(
                f"a backbone should give features of images {[*x.shape]}{self._hint()}. Found {type(e).__name__}: {_reason(e)}."
            ) from e

    def _hint(self) -> str:
        """What may help where the body does not take its images."""
        if self.size is None:
            return "; where it wants others, give `size`"
        cfg = getattr(self.body, "pretrained_cfg", None)
        own = cfg if isinstance(cfg, dict) and cfg.get("fixed_input_size") else {}
        if self.size == tuple(own.get("input_size", self.size)[-2:]):
            return ""
        return f"; timm makes this one for that size with `img_size={self.size[0] if len({*self.size}) == 1 else self.size}`"


def of_timm(
    name: str, checkpoint: str | Path | None, size: Size, mean: Any, std: Any, more: dict[str, Any]
) -> ModuleModel:
    """The backbone of a timm model: the hub's weights, those of a file, or, with `pretrained=False`, random ones that are always the same."""
    try:
        import timm
    except ImportError as e:
        raise ConsilienceError(
            "a backbone by name should have timm: pip install 'consilience[vision]'. Found none."
        ) from e
    if "num_classes" in more:
        raise ConsilienceError(
            f"a backbone gives features, and no classes. Found `num_classes = {more['num_classes']!r}`."
        )
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
        where = "; without the hub, give `checkpoint`" if pretrained else ""
        raise ConsilienceError(
            f"timm should make {name!r}{where}. Found {type(e).__name__}: {_reason(e)}."
        ) from e
    own = dict(getattr(body, "pretrained_cfg", None) or {})
    if elsewhere:
        kind = _architecture(timm, body, own.get("architecture"), more) or name
    if checkpoint is not None:
        head = own.get("classifier") or ()
        _read(body, checkpoint, (head,) if isinstance(head, str) else tuple(head))
    given: Size = tuple(own.get("input_size", (3, 224, 224))[-2:]) if size == "own" else size
    mean = own.get("mean", (0.0,)) if mean is None else mean
    std = own.get("std", (1.0,)) if std is None else std
    options = "".join(f", {k}={v!r}" for k, v in sorted(more.items()))
    return _made(body, f"timm {kind}{options}", given, mean, std, f"{name!r}{options}")


def of_module(
    module: nn.Module | Model, checkpoint: str | Path | None, size: Size, mean: Any, std: Any
) -> ModuleModel:
    """The backbone of a torch module, or of a model of one: its head is taken off."""
    model = module
    if isinstance(module, nn.Module):
        model = ModuleModel(module, headless=not any(isinstance(m, nn.Linear) for m in module.modules()))
    if not isinstance(model, ModuleModel):
        raise ConsilienceError(
            f"a backbone should be a timm model's name, a torch module or a model of one. Found {model!r}."
        )
    head = model._head
    body = copy.deepcopy(model.body()._module)
    if checkpoint is not None:
        _read(body, checkpoint, (head,) if head else ())
    given = None if size == "own" else size
    mean, std = (0.0,) if mean is None else mean, (1.0,) if std is None else std
    width = 0 if model._outputs is None else model.width
    return _made(body, structure(body), given, mean, std, model.description, width)


def _architecture(timm: Any, body: nn.Module, name: str | None, more: dict[str, Any]) -> str | None:
    """What a body from a folder or another's repository is: timm's architecture, and in what it differs from it, if it does."""
    if not name or not timm.is_model(name):
        return None
    with torch.random.fork_rng(devices=[]):
        plain = timm.create_model(name, pretrained=False, num_classes=0, **more)
    what = structure(body)
    if what == structure(plain):
        return name
    return f"{name} {hashlib.blake2b(what.encode(), digest_size=16).hexdigest()}"


def _made(
    body: nn.Module, what: str, size: Size, mean: Any, std: Any, name: str, width: int = 0
) -> ModuleModel:
    if isinstance(size, str) or (size is not None and min(_pair(size)) < 1):
        raise ConsilienceError(
            f"`size` should be one or two whole numbers >= 1, 'own' or None. Found `size = {size!r}`."
        )
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
            raise ConsilienceError(
                f"a checkpoint should have {what}. Found {verb} {', '.join(names[:3])}{more} in {path}."
            )
    common = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items() if n in own}
    for n, t in common.items():
        if t.shape != own[n].shape:
            a, b = tuple(own[n].shape), tuple(t.shape)
            raise ConsilienceError(
                f"a checkpoint's entries should have the backbone's shapes. Found {b}, not {a}, for {n!r} in {path}."
            )
    body.load_state_dict({**own, **common})


def _reason(e: Exception) -> str:
    """The first line of an error."""
    return str(e).splitlines()[0][:200].rstrip(".") if str(e) else "no reason"


def _held(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the buffers of a module stand."""
    return [(part, n) for part in module.modules() for n, b in part._buffers.items() if b is not None]


def _fixed(module: nn.Module) -> nn.Module:
    """The module with its buffers as parameters of the same names: what never changes is hashed, and nobody averages it."""
    for part, n in _held(module):
        b = part._buffers.pop(n)
        assert b is not None
        part._non_persistent_buffers_set.discard(n)
        part.register_parameter(n, nn.Parameter(b.detach().clone(), requires_grad=False))
    return module.requires_grad_(False).eval()
