"""Teachers: trained models that are only asked for their answers, whatever their architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from consilience.core.errors import ConsilienceError
from consilience.core.model import Forward, Model
from consilience.core.params import Params
from consilience.core.tree import Input


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained model: x [B, ...] -> logits [B, k] of its k classes, in eval mode; differentiable in x.

    >>> from consilience.models import linear
    >>> model = linear(4, 3)
    >>> params, buffers = model.init(torch.Generator().manual_seed(0))
    >>> Teacher("a", model, params, buffers, classes=(5, 7), outputs=(0, 2))(torch.ones(2, 4)).shape
    torch.Size([2, 2])
    """

    name: str
    """Who sent it."""
    model: Model
    params: Params
    buffers: Params
    classes: tuple[int, ...]
    """The receiver's column of each of its classes."""
    outputs: tuple[int, ...]
    """Which of the model's outputs says each class."""
    task: str | None = None

    @cached_property
    def _forward(self) -> Forward:
        return self.model.bind(self.params, self.buffers, False)[0]

    def __call__(self, x: Input) -> Tensor:
        out = self._forward(x, self.task)
        return out.index_select(1, torch.tensor(self.outputs, device=out.device))

    def features(self, x: Input) -> Tensor:
        """Return the inputs of the head [B, d], those that tasks share."""
        return self.model.features(self.params, self.buffers, x)

    def watched(self, x: Input) -> tuple[Tensor, list[Norm]]:
        """Return the answers [B, k] with what the batch norms saw, in the order in which they were called."""
        with _Norms() as norms:
            out = self(x)
        return out, norms.seen

    def rows(self, x: Input) -> Tensor:
        """Return the rows [k, d] of the head for its classes: dz_k / dpsi at a sample x [1, ...].

        Raises ConsilienceError for a model without a linear head that it could find.
        """
        if not self.model.passes_features:
            raise ConsilienceError(
                f"the classifier's rows need an expert with a linear head, got {self.model!r:.80} of "
                f"{self.name!r}."
            )
        # A head that was guessed is confirmed by the first call.
        self.model.features(self.params, self.buffers, x, self.task)
        leaves: list[Tensor] = []

        def leaf(psi: Tensor) -> Tensor:
            leaves.append(psi.detach().requires_grad_())
            return leaves[-1]

        # By derivatives, because models keep their heads in different places, and some scale them at use.
        with torch.enable_grad():
            forward, _ = self.model.bind_each(self.params, self.buffers, False, leaf)
            (out,) = forward(x, (self.task,))
            found = [
                torch.autograd.grad(out[0, column].sum(), leaves[-1], retain_graph=True)[0]
                for column in self.outputs
            ]
        return torch.stack([row.reshape(-1, row.shape[-1]).sum(0) for row in found])


class Norm(NamedTuple):
    """What a batch norm in eval mode saw, and what it keeps; each [C], variances as torch keeps them (n - 1).

    The first two are differentiable in the inputs.
    """

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor
    eps: float


MODULES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
PROGRAMS = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
"""The arguments of batch norm, as modules call it, and as exported programs do."""


class _Moments(torch.autograd.Function):
    """The mean [C] and the variance [C] (n - 1) of x [B, C, ...]; torch.var_mean takes ten times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        mean = x.mean(dims, keepdim=True)
        ctx.save_for_backward(x, mean)
        # A single number has no variance, as in torch.
        ctx.others = x.numel() // x.shape[1] - 1 or torch.nan
        return mean.flatten(), (x - mean).square_().sum(dims) / ctx.others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        of_mean, of_variance = (grad.view_as(mean) for grad in grads)
        # d mean / dx = 1 / n, and d variance / dx = 2 (x - mean) / (n - 1), where the mean adds nothing.
        slope = of_variance * (2 / ctx.others)
        return torch.addcmul(of_mean / (ctx.others + 1) - slope * mean, slope, x)


class _Norms(TorchFunctionMode):
    """Notes the batch norms that are called, whatever calls them: hooks would need the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Norm] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        names = {F.batch_norm: MODULES, torch.ops.aten.batch_norm.default: PROGRAMS}.get(func)
        if names is not None:
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            # A norm without statistics uses those of its batch, and has nothing to be compared with.
            if given["running_mean"] is not None:
                x = given["input"].float() if given["input"].dtype.itemsize < 4 else given["input"]
                kept = given["running_mean"], given["running_var"]
                mean, variance = _Moments.apply(x)  # type: ignore[no-untyped-call]
                self.seen.append(Norm(mean, variance, *kept, given.get("eps", 1e-5)))
        return func(*args, **(kwargs or {}))
