"""Norm-preserving removal: the direction leaves, and the length of what each input feature writes stays.

After Lai 2025, "Norm-Preserving Biprojected Abliteration". (Its "biprojected" half is about finding the direction:
`--projected` takes the baseline mean out of it. This is the half about the weights.) A weight W [d_model, inner] that
writes to the stream writes, for input feature j, its column w_j. Removal shortens w_j by what it had along r; here
each column is then given its former length:

    w_j  <-  |w_j| / |w_j'| * w_j'        with   w_j' = w_j - left^T (right w_j)

Scaling a column doesn't turn it, so at strength 1 the direction stays out exactly. At another strength s the column
turns as without this mode, and then has its former length: what it holds of r is not (1 - s) times what it was, but
that times the column's factor. An embedding's row, which one token writes, is such a column; biases lose the
direction and are not rescaled.

In memory: `weights.bake(handle, edit, norm_preserving=True)`; on disk: `apply --norm-preserving` (`blocks`, in numpy).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.edit.algebra import LEAST_LEFT

if TYPE_CHECKING:
    from abliterate.edit.algebra import Factors


def rescaled(block: Float[Tensor, "a b"], norms: Float[Tensor, " n"], dim: int) -> Float[Tensor, "a b"]:
    """Give each vector of a block, along `dim`, the norm it had, in place.

    Vectors of which less than a thousandth is left keep what is left.

    Args:
        block: what the removal left, float32 or float64; changed and returned.
        norms: the vectors' norms before it.
        dim: the dimension of the block that runs along d_model.
    """
    left = block.norm(dim=dim)
    keep = left > LEAST_LEFT * norms
    factor = torch.where(keep, norms / torch.where(keep, left, torch.ones_like(left)), torch.ones_like(left))
    return block.mul_(factor.unsqueeze(dim))


@torch.no_grad()
def removed_keeping_norms(tensor: Float[Tensor, ...], change: Factors, axis: int) -> Float[Tensor, ...]:
    """`removal.removed`, each vector along d_model rescaled to its former norm; own dtype and device.

    Args:
        tensor: any shape with size d_model along `axis`.
        change: from `algebra.factors`.
        axis: dimension that runs along d_model.
    """
    wide = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).movedim(axis, -1)
    left, right = (torch.from_numpy(factor).to(wide.device, wide.dtype) for factor in change)
    out = (wide - (wide @ right.T) @ left).reshape(-1, wide.shape[-1])
    out = rescaled(out, wide.reshape(out.shape).norm(dim=1), dim=1).view(wide.shape)
    return out.movedim(-1, axis).to(tensor.dtype)
