"""Gradients per sample of any model: by vmap, or one after another where a model's forward forbids it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn

from consilience.core.errors import ConsilienceError
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.tree import Input
from consilience.core.viewed import Viewed
from consilience.core.warning import warn

Score = Callable[[Params, Input, Tensor], Tensor]
"""(parameters, inputs [1, ...], targets [1, ...]) -> a scalar."""

_ALONE: WeakSet[Model] = WeakSet()
"""Models that vmap cannot run: their samples go through them one after another."""


def per_sample(model: Model, score: Score, params: Params, x: Input, y: Tensor) -> Params:
    """Return the gradients [B, ...] of the scores of samples x [B, ...] with targets y, by entry.

    By vmap in one pass. A forward that reads the value of a tensor, as `mask.all()` in a condition does, or
    an operation that vmap does not know, such as `nn.GRU`, leaves one pass per sample; a warning says so
    once per model.
    """
    inner = unviewed(model)
    with differentiable_in_eval(inner, x.device):
        if inner in _ALONE:
            return _one_by_one(score, params, x, y)

        def one(params: Params, one_x: Input, one_y: Tensor) -> Tensor:
            return score(params, one_x[None], one_y[None])

        try:
            together: Params = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, x, y)
            return together
        except (ConsilienceError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # A fault of the model itself is raised here again, without vmap around it.
            found, why = _one_by_one(score, params, x, y), str(error).partition("\n")[0]
        _ALONE.add(inner)
        warn(
            f"gradients per sample take one pass for each sample of {getattr(inner, 'name', inner)}, "
            f"because vmap cannot run its forward ({why[:120]}); `samples` bounds their number"
        )
        return found


def _one_by_one(score: Score, params: Params, x: Input, y: Tensor) -> Params:
    """Return the gradients of the scores [B, ...], from one backward pass per sample."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for i in range(len(x)):
        with torch.enable_grad():
            value = score(leaves, x[i : i + 1], y[i : i + 1])
        grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
        # The score may not depend on any parameter, such as that of a sample without a target.
        if value.requires_grad:
            grads = torch.autograd.grad(value, [*leaves.values()], allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(leaf) if grad is None else grad)
    return {name: torch.stack(own) for name, own in rows.items()}


def unviewed(model: Model) -> Model:
    """Return the model below the views of corrections."""
    while isinstance(model, Viewed):
        model = model.model
    return model


def module_of(model: Model) -> tuple[str, object]:
    """Return the prefix of a model's entries and the torch module that it wraps, None if it wraps none.

    Of a model with heads on a trunk it is the module of the trunk.
    """
    trunk = getattr(model, "trunk", None)
    if trunk is None:
        return "", getattr(model, "module", None)
    return "trunk.", getattr(trunk, "module", None)


@contextmanager
def differentiable_in_eval(model: Model, device: torch.device) -> Iterator[None]:
    """Let recurrent layers be differentiated in eval mode, which cuDNN refuses."""
    module = module_of(unviewed(model))[1]
    recurrent = isinstance(module, nn.Module) and any(isinstance(p, nn.RNNBase) for p in module.modules())
    if device.type != "cuda" or not recurrent:
        yield
        return
    # The other kernels of recurrent layers keep what a backward pass needs in both modes.
    with torch.backends.cudnn.flags(enabled=False):
        yield
