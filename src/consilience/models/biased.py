"""Beneficial biases: a frozen backbone, and for each task one number more for each output channel of its layers."""

from __future__ import annotations

from math import ceil
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from consilience.core.errors import ConsilienceError
from consilience.models.adapted import Inserted, layers_of, placed
from consilience.models.heads import HEADS
from consilience.models.module import ModuleModel

BIAS = "beneficial_bias"


class Biased(Inserted):
    """outputs[:, columns_t] = psi_t W_t^T + b_t, where psi_t are the features of a frozen backbone whose convolutions and linear
    layers give y = Conv(x) + b + B_t to task t.

    B_t [c'] has a number for each of the c' channels of a map [B, c', ..], or of the last dimension of vectors and tokens; it
    begins at 0, so that a new task has the backbone to the bit. Only the last fraction `last` of the layers have it, in module
    order, rounded up; layers that a `models.backbone` never calls are none of them. Entries are `biases.<task>.<layer>` [c'], and
    `heads.<task>` and `trunk` as in MultiHead. Before a batch norm in eval mode B is beta' = beta + gamma B / sqrt(v + eps).
    Gradients pass the backbone from the first of these layers on. Wen et al. 2021, Ge et al. 2023.

    >>> from consilience.models import mlp
    >>> model = Biased(mlp(4, (8, 8)), outputs=10)
    >>> model.layers, model.task_of("biases.t.1"), model.frozen("trunk.1.weight")
    (('1', '3'), 't', True)
    """

    own: ClassVar[tuple[str, ...]] = (HEADS, "biases.")
    kind: ClassVar[str] = "biases"
    parts: ClassVar[dict[str, str]] = {"": BIAS}

    def __init__(
        self, backbone: ModuleModel, outputs: int, last: float = 1.0, norm: Literal["inf"] | None = None
    ) -> None:
        super().__init__(backbone, outputs, norm)
        if isinstance(last, bool) or not 0 <= last <= 1:
            raise ConsilienceError(f"`last` should be in [0, 1]. Found `last = {last}`.")
        self.last = last
        every = layers_of(self.trunk._module, self.trunk.description, "biases")
        count = ceil(last * len(every) - 1e-9)
        self._place(self.trunk, every[len(every) - count :], _shifted)

    def __repr__(self) -> str:
        norm = ", norm=inf" if self.norm else ""
        return f"beneficial_biases({self.trunk.description}, {self.outputs}, {self.last}{norm})"

    def _new(self, layer: str, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"": torch.zeros(width)}


def _shifted(layer: nn.Module, args: Any, h: Any) -> Any:
    """h + B, where the layer was given B; of a tuple, such as attention gives, the first."""
    bias = layer.beneficial_bias
    assert isinstance(bias, Tensor)
    if not bias.numel():
        return None
    if isinstance(h, tuple):
        return (_shifted(layer, args, h[0]), *h[1:])
    return h + (bias if placed(layer, h, "a bias") == -1 else bias.view(-1, *[1] * (h.ndim - 2)))
