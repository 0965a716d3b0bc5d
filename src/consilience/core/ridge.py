"""Ridge regression from sums: one solution for heads that are solved where data is, or where sums meet."""

from __future__ import annotations

import torch
from torch import Tensor


def solve(
    a: Tensor,
    b: Tensor,
    strength: float,
    samples: float = 1.0,
    average: bool = False,
    normalise: bool = False,
) -> Tensor:
    """Solve W = (A + lambda I)^-1 b [d + 1, C] in float64, from A = sum psi psi^T and b = sum psi e_y^T.

    psi has a ones column as bias. With `average` the objective is the mean loss, whose closed form needs
    lambda x samples. With `normalise` each column (with its bias) is divided by its norm without the bias
    (zero counts as 1e-6), as Fed3R does.

    >>> solve(torch.eye(2).double(), torch.ones(2, 1).double(), 1.0).flatten().round(decimals=6).tolist()
    [0.5, 0.5]
    """
    # Positive definite by the ridge, so that Cholesky is safe and twice as fast as LU.
    ridge = strength * (samples if average else 1.0)
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    head = torch.cholesky_solve(b, torch.linalg.cholesky(a + ridge * eye))
    if normalise:
        norm = head[:-1].norm(dim=0)
        head = head / torch.where(norm == 0, torch.full_like(norm, 1e-6), norm)
    return head
