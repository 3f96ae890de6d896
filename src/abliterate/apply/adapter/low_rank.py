"""What is taken out of a weight as a product of low rank: exact, or the nearest where norms are kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.apply.removal import removed
from abliterate.edit.algebra import Factors

ROWS = 2**16  # rows of a weight widened to float64 at once


class LowRank(NamedTuple):
    """A change of a parameter: left @ right, [..., rows, k] and [..., k, columns], float32."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return int(self.left.shape[-1])


def low_rank(weight: Float[Tensor, ...], change: Factors, axis: int) -> LowRank:
    """The change -left^T (right W) of a weight as a product; arithmetic in float64.

    Args:
        weight: 2-D, or 3-D with the experts first; size d_model along `axis`.
        change: from `algebra.factors`.
        axis: dimension that runs along d_model.
    """
    left, right = (torch.from_numpy(factor).double() for factor in change)
    wide = weight.detach().movedim(axis, -1)
    rows = wide.reshape(-1, wide.shape[-1])
    read = torch.cat([block.double() @ right.T for block in rows.split(ROWS)])  # right W, transposed
    read = read.view(*wide.shape[:-1], len(right))
    experts = weight.shape[:-2]
    if axis == weight.ndim - 1:
        return LowRank((-read).float(), left.expand(*experts, *left.shape).float())
    return LowRank((-left.T).expand(*experts, *left.T.shape).float(), read.transpose(-1, -2).float())


def truncated(weight: Float[Tensor, ...], change: Factors, axis: int) -> tuple[LowRank, float]:
    """The best approximation, of the change's rank, of a norm-preserving change of a weight; and its relative error.

    Keeping the norms scales every column by a factor of its own, so the change has full rank. Its singular value
    decomposition cut off after k values is the nearest of rank k (Eckart and Young 1936).

    Returns:
        The factors, and |change - product| / |change| in the Frobenius norm, over all experts.
    """
    wide = weight.detach().double()
    difference = removed(wide, change, axis, keep_norms=True) - wide
    k = len(change.left)
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    root = s[..., :k].sqrt()
    low = LowRank((u[..., :k] * root[..., None, :]).float(), (root[..., :, None] * v[..., :k, :]).float())
    total = s.square().sum()
    error = float((s[..., k:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return low, error


def nothing(module: nn.Module) -> LowRank:
    """Factors that change nothing, for a layer of which only the bias counts."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return LowRank(torch.zeros(weight.shape[0], 1), torch.zeros(1, weight.shape[1]))
