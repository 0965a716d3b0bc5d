"""Frozen feature extractors: timm models and torch modules with their image preparation, under one hash."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.errors import ConsilienceError, unknown
from consilience.core.model import Model
from consilience.core.params import finite, load
from consilience.models.module import ModuleModel, structure

Size = int | tuple[int, int] | str | None


class Preparation(NamedTuple):
    """How a user asks for images to be prepared; None stands for the default of the body."""

    size: Size
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None


class Backbone(nn.Module):
    """psi(x) [B, d] of images x [B, 1 or c, H, W] in [0, 1]: prepare them, then run the body.

    Images are resized, grey ones repeated to c channels, then (x - mean) / std. Features [B, d] are returned
    as they are. Everything that the outputs depend on is an entry, so that one hash names it: the body's
    parameters, its buffers (as parameters, because they never change), mean and std, and `identity`: 16
    bytes that are a digest of what the body is and of `size`.
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
        buffers = _buffers(body)
        self.body, self.size = _fixed(body), size
        # The first convolution says how many channels an image has.
        convolutions = (part for part in body.modules() if isinstance(part, nn.modules.conv._ConvNd))
        self.channels: int = next((part.in_channels for part in convolutions), 3)

        self.mean, self.std = self._per_channel("mean", mean), self._per_channel("std", std)
        if not bool((self.std > 0).all()):
            raise ConsilienceError(f"`std` must be positive, got {tuple(std)}.")
        # A digest, because all backbones must have entries of the same shapes.
        digest = hashlib.blake2b(json.dumps([what, size]).encode(), digest_size=16).digest()
        self.identity = nn.Parameter(torch.tensor([*digest], dtype=torch.uint8), requires_grad=False)

        self.width = width or self._measured(buffers)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            if x.shape[1] != self.width:
                raise ConsilienceError(
                    f"features must have the backbone's width {self.width}, got {x.shape[1]}."
                )
            return x
        if x.ndim != 4 or x.shape[1] not in (1, self.channels) or not x.is_floating_point():
            got = f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.")
            raise ConsilienceError(
                f"a backbone must be given images [B, 1 or {self.channels}, H, W] in [0, 1], "
                f"or its features [B, {self.width}], got {got}."
            )

        if self.size is not None and x.shape[-2:] != self.size:
            # Where images shrink, bilinear alone would skip pixels.
            smaller = x.shape[-2] > self.size[0] or x.shape[-1] > self.size[1]
            x = F.interpolate(x, self.size, mode="bilinear", antialias=smaller)
        x = (x - self.mean) / self.std

        # Channels last is faster by a third on CPUs.
        out = self.body(x.contiguous(memory_format=torch.channels_last))
        if not isinstance(out, Tensor):
            raise ConsilienceError(f"a backbone must give a tensor of features, got {type(out).__name__}.")
        return out.flatten(1)

    def blank(self) -> Tensor:
        """Return zeros [1, c, H, W] as an image to try the body on."""
        return torch.zeros(1, self.channels, *(self.size or (32, 32))).to(self.mean)

    def _per_channel(self, name: str, values: Sequence[float]) -> nn.Parameter:
        """Return one number per channel as a parameter [c, 1, 1]."""
        given = tuple(float(value) for value in values)
        if len(given) not in (1, self.channels):
            raise ConsilienceError(
                f"`{name}` must have one number, or one for each of {self.channels} channels, "
                f"got {len(given)}."
            )
        given = given * self.channels if len(given) == 1 else given
        return nn.Parameter(torch.tensor(given).view(-1, 1, 1), requires_grad=False)

    def _measured(self, buffers: list[tuple[nn.Module, str]]) -> int:
        """Return the number d of features of an image.

        A body that assigns new tensors to its buffers may do so here, once.
        """
        # `forward` names a width in its errors, and this one is not known yet.
        self.width, blank = -1, self.eval().blank()
        try:
            with torch.no_grad():
                try:
                    return int(self(blank).shape[1])
                except TypeError:
                    # It assigns a tensor where a parameter now is: give it its buffers back for one pass.
                    for part, name in buffers:
                        part.register_buffer(name, part._parameters.pop(name))
                    self(blank)
                    _fixed(self.body)
                    return int(self(blank).shape[1])
        except ConsilienceError:
            raise
        except (AssertionError, TypeError, RuntimeError, ValueError) as error:
            raise ConsilienceError(
                f"a backbone must give features of images {[*blank.shape]}{self._hint()}, "
                f"got {type(error).__name__}: {_reason(error)}."
            ) from error

    def _hint(self) -> str:
        """Return what may help where the body does not take its images."""
        if self.size is None:
            return " (if it needs others, give `size`)"
        config = getattr(self.body, "pretrained_cfg", None)
        fixed = config if isinstance(config, dict) and config.get("fixed_input_size") else {}
        if self.size == tuple(fixed.get("input_size", self.size)[-2:]):
            return ""
        size = self.size[0] if len({*self.size}) == 1 else self.size
        return f" (timm makes this model for that size with `img_size={size}`)"


def of_timm(
    name: str, checkpoint: str | Path | None, prepare: Preparation, options: dict[str, Any]
) -> ModuleModel:
    """Return the backbone of a timm model, with the hub's weights or those of a file.

    With `pretrained=False` among the options the weights are random, the same ones always.
    """
    try:
        import timm
    except ImportError as error:
        raise ConsilienceError(
            "a backbone by name needs timm, which is not installed; pip install 'consilience[vision]'."
        ) from error
    if "num_classes" in options:
        raise ConsilienceError(
            f"a backbone gives features and no classes, got `num_classes={options['num_classes']!r}`."
        )
    pretrained = options.pop("pretrained", checkpoint is None)
    if pretrained and checkpoint is not None:
        raise ConsilienceError(
            "weights must come from `checkpoint` or with `pretrained=True`, got both; leave one out."
        )

    # The identity has no tag: it names weights, and those are entries.
    elsewhere = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    name = name if elsewhere else name.removeprefix("timm/")
    kind = name if elsewhere else name.partition(".")[0]
    if not elsewhere and not timm.is_model(kind):
        raise unknown("name", name, timm.list_models())
    body = _timm_body(timm, name, pretrained, options)

    config = dict(getattr(body, "pretrained_cfg", None) or {})
    if elsewhere:
        kind = _architecture(timm, body, config.get("architecture"), options) or name
    if checkpoint is not None:
        head = config.get("classifier") or ()
        _load_weights(body, checkpoint, (head,) if isinstance(head, str) else tuple(head))

    own_size = tuple(config.get("input_size", (3, 224, 224))[-2:])
    asked = Preparation(
        own_size if prepare.size == "own" else prepare.size,
        config.get("mean", (0.0,)) if prepare.mean is None else prepare.mean,
        config.get("std", (1.0,)) if prepare.std is None else prepare.std,
    )
    listed = "".join(f", {option}={value!r}" for option, value in sorted(options.items()))
    return _backbone(body, f"timm {kind}{listed}", asked, f"{name!r}{listed}")


def of_module(module: nn.Module | Model, checkpoint: str | Path | None, prepare: Preparation) -> ModuleModel:
    """Return the backbone of a torch module, or of a model of one, without its head."""
    model = module
    if isinstance(module, nn.Module):
        has_linear = any(isinstance(part, nn.Linear) for part in module.modules())
        model = ModuleModel(module, headless=not has_linear)
    if not isinstance(model, ModuleModel):
        raise ConsilienceError(
            f"a backbone must be a timm model's name, a torch module or a model of one, got {model!r}."
        )

    body = copy.deepcopy(model.body().module)
    if checkpoint is not None:
        _load_weights(body, checkpoint, (model.head_layer,) if model.head_layer else ())
    asked = Preparation(
        None if prepare.size == "own" else prepare.size,
        (0.0,) if prepare.mean is None else prepare.mean,
        (1.0,) if prepare.std is None else prepare.std,
    )
    # Zero: to be measured.
    width = 0 if model.given_outputs is None else model.width
    return _backbone(body, structure(body), asked, model.description, width)


def _timm_body(timm: Any, name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Return timm's model without its classifier."""
    try:
        # All agents and runs must have the same random weights.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            body: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        remedy = "; without the hub, give `checkpoint`" if pretrained else ""
        raise ConsilienceError(
            f"timm cannot make {name!r}, got {type(error).__name__}: {_reason(error)}{remedy}."
        ) from error
    return body


def _architecture(timm: Any, body: nn.Module, name: str | None, options: dict[str, Any]) -> str | None:
    """Return what a body from a folder or another's repository is.

    That is timm's name of the architecture, with a digest of the structure where the body differs from it.
    """
    if not name or not timm.is_model(name):
        return None
    # The weights do not count here, and torch's random state must not move.
    with torch.random.fork_rng(devices=[]):
        plain = timm.create_model(name, pretrained=False, num_classes=0, **options)
    what = structure(body)
    if what == structure(plain):
        return name
    return f"{name} {hashlib.blake2b(what.encode(), digest_size=16).hexdigest()}"


def _backbone(body: nn.Module, what: str, asked: Preparation, name: str, width: int = 0) -> ModuleModel:
    """Return the frozen headless model of a body; `what` is hashed, and `name` is shown."""
    size = asked.size
    if isinstance(size, str) or (size is not None and min(_pair(size)) < 1):
        raise ConsilienceError(f"`size` must be one or two whole numbers >= 1, 'own' or None, got {size!r}.")
    sides = None if size is None else _pair(size)
    mean, std = _floats(asked.mean), _floats(asked.std)
    module = Backbone(body.float(), what, sides, mean, std, width)
    digest = bytes(module.identity.tolist()).hex()[:8]
    description = f"backbone({name}, size={sides}, mean={mean}, std={std}, {digest})"
    return ModuleModel(module, module.width, frozen=("*",), headless=True, name=description)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _floats(values: Any) -> tuple[float, ...]:
    """Return one number or several as a tuple of floats."""
    return (float(values),) if isinstance(values, (int, float)) else tuple(float(value) for value in values)


def _load_weights(body: nn.Module, path: str | Path, head: Sequence[str]) -> None:
    """Load the weights of a safetensors file into a module, in float32.

    Entries that are missing or too many are refused by name, except those of the classifier `head`.
    """
    tensors, _ = load(path)
    # A NaN would show up much later, as features that no task can use.
    finite(tensors, str(path))
    entries = body.state_dict()

    def refuse(names: set[str], rule: str, verb: str) -> None:
        counted = sorted(
            name for name in names if not any(name == layer or name.startswith(f"{layer}.") for layer in head)
        )
        if counted:
            more = f" and {len(counted) - 3} more" if len(counted) > 3 else ""
            raise ConsilienceError(
                f"a checkpoint must have {rule}, got {verb} {', '.join(counted[:3])}{more} in {path}."
            )

    refuse(entries.keys() - tensors.keys(), "all entries of the backbone", "no")
    refuse(tensors.keys() - entries.keys(), "no entries but the backbone's", "also")

    # Integers, such as counters of norms, keep their type.
    common = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if name in entries
    }
    for name, tensor in common.items():
        if tensor.shape != entries[name].shape:
            raise ConsilienceError(
                f"a checkpoint's entries must have the backbone's shapes, got {tuple(tensor.shape)}, "
                f"not {tuple(entries[name].shape)}, for {name!r} in {path}."
            )
    body.load_state_dict({**entries, **common})


def _reason(error: Exception) -> str:
    """Return the first line of an error."""
    return str(error).splitlines()[0][:200].rstrip(".") if str(error) else "no reason"


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the parts of a module that have buffers, and the names of these."""
    return [
        (part, name) for part in module.modules() for name, held in part._buffers.items() if held is not None
    ]


def _fixed(module: nn.Module) -> nn.Module:
    """Freeze a module, with its buffers as parameters, which are hashed and never averaged."""
    for part, name in _buffers(module):
        held = part._buffers.pop(name)
        assert held is not None
        # Buffers that torch does not save are entries too, because outputs depend on them.
        part._non_persistent_buffers_set.discard(name)
        part.register_parameter(name, nn.Parameter(held.detach().clone(), requires_grad=False))
    return module.requires_grad_(False).eval()
