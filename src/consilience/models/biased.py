"""Beneficial biases: a frozen backbone, and per task one bias for each output channel of its layers."""

from __future__ import annotations

from math import ceil
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from consilience.core.errors import ConsilienceError
from consilience.core.shares import exact_share
from consilience.models.adapted import Inserted, layers_of, output_dim
from consilience.models.heads import HEADS, as_type
from consilience.models.module import ModuleModel

BIAS = "beneficial_bias"


class Biased(Inserted):
    """outputs[:, columns_t] = psi_t W_t^T + b_t; layers of a frozen backbone give y = Conv(x) + b + B_t.

    B_t [c'] has one number per channel of a map [B, c', ..], or per feature of vectors and tokens (their
    last dimension). It begins at 0, so that a new task has the outputs of the backbone, to the bit. Only the
    last fraction `last` of the convolutions and linear layers have it, in module order, rounded up; layers
    that a `models.backbone` never calls do not count. Entries are `biases.<task>.<layer>` [c'], and
    `heads.<task>` and `trunk` as in MultiHead. Before a batch norm in eval mode B has the effect of beta' =
    beta + gamma B / sqrt(v + eps). Gradients flow back to the first of these layers. Wen et al. 2021, Ge et
    al. 2023.

    >>> from consilience.models import mlp
    >>> model = Biased(mlp(4, (8, 8)), outputs=10)
    >>> model.layers, model.task_of("biases.t.1"), model.frozen("trunk.1.weight")
    (('1', '3'), 't', True)
    """

    task_prefixes: ClassVar[tuple[str, ...]] = (HEADS, "biases.")
    kind: ClassVar[str] = "biases"
    parts: ClassVar[dict[str, str]] = {"": BIAS}

    def __init__(
        self, backbone: ModuleModel, outputs: int, last: float = 1.0, norm: Literal["inf"] | None = None
    ) -> None:
        super().__init__(backbone, outputs, norm)
        # True is 1 to Python, but nobody means a fraction by it.
        if isinstance(last, bool) or not 0 <= last <= 1:
            raise ConsilienceError(f"`last` must be in [0, 1], got {last}.")
        self.last = last
        layers = layers_of(self.trunk.module, self.trunk.description, "biases")
        count = ceil(exact_share(last, len(layers)))
        self._insert(self.trunk, layers[len(layers) - count :], _add_bias)

    def __repr__(self) -> str:
        norm = ", norm=inf" if self.norm else ""
        return f"beneficial_biases({self.trunk.description}, {self.outputs}, {self.last}{norm})"

    def _initial(self, layer: str, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"": torch.zeros(width)}


def _add_bias(layer: nn.Module, args: Any, h: Any) -> Any:
    """Return h + B where the layer has a B; of a tuple, as of attention, for the first."""
    bias = layer.beneficial_bias
    assert isinstance(bias, Tensor)
    # None leaves the output as it is.
    if not bias.numel():
        return None
    if isinstance(h, tuple):
        return (_add_bias(layer, args, h[0]), *h[1:])
    added = h + (bias if output_dim(layer, h, "a bias") == -1 else bias.view(-1, *[1] * (h.ndim - 2)))
    # The backbone may compute in a shorter type, which its next layer expects.
    return as_type(added, h)
