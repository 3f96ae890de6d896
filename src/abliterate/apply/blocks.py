"""An edit's arithmetic on a weight too large to hold in float32: in place, block by block. No files here."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.apply import Factors
from abliterate.apply.norms import rescaled
from abliterate.errors import NonFiniteError

BLOCK = 2**19  # elements widened at a time: what stays in a core's cache in float32
NARROW = 128  # columns at a time where whole columns are needed


@torch.no_grad()
def take_out(
    weight: Float[Tensor, "outer d_model inner"], change: Factors, *, keep_norms: bool = False, name: str = "a weight"
) -> None:
    """W <- W - left^T (right W) in place, for every matrix W [d_model, inner] of the stack.

    The arithmetic runs in float32 (float64 for float64), and the result is rounded once.

    Args:
        weight: contiguous, in the dtype it is stored in; changed.
        change: left and right [k, d_model], from `apply.factors`.
        keep_norms: rescale each column of W to the norm it had (see `apply.norms`).
        name: for the error.

    Raises:
        NonFiniteError: when a value is, or becomes, NaN or infinite.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left, right = change.left.to(wide), change.right.to(wide)
    if weight.shape[2] == 1:
        finite = _along_rows(weight[:, :, 0], left, right, keep_norms)
    elif keep_norms:
        finite = all(_by_columns(matrix, left, right) for matrix in weight)
    else:
        finite = all(_by_rows(matrix, left, right) for matrix in weight)
    if not finite:
        raise NonFiniteError(
            f"editing {name} gives NaN or infinite values: it holds some, or its dtype overflows; nothing was written"
        )


def _along_rows(
    rows: Float[Tensor, "n d_model"], left: Float[Tensor, "k d_model"], right: Float[Tensor, "k d_model"], keep: bool
) -> bool:
    """The same for vectors along d_model that lie in memory one after the other; whether all stayed finite."""
    step = max(1, BLOCK // rows.shape[1])
    scratch = torch.empty(min(step, len(rows)), rows.shape[1], dtype=left.dtype)
    finite = True
    for part in rows.split(step):
        block = scratch[: len(part)].copy_(part)
        norms = block.norm(dim=1) if keep else None
        inside = block @ right.T
        block.addmm_(inside, left, alpha=-1)
        if norms is not None:
            rescaled(block, norms, dim=1)
        part.copy_(block)
        finite &= _finite(inside, part)
    return finite


def _by_rows(
    matrix: Float[Tensor, "d_model inner"], left: Float[Tensor, "k d_model"], right: Float[Tensor, "k d_model"]
) -> bool:
    """Two passes over blocks of rows: right W first, then W less its share of it."""
    step = max(1, BLOCK // matrix.shape[1])
    inside = torch.zeros(len(right), matrix.shape[1], dtype=left.dtype)
    scratch = torch.empty(min(step, len(matrix)), matrix.shape[1], dtype=left.dtype)
    for low in range(0, len(matrix), step):
        part = matrix[low : low + step]
        inside.addmm_(right[:, low : low + step], scratch[: len(part)].copy_(part))
    finite = True
    for low in range(0, len(matrix), step):
        part = matrix[low : low + step]
        block = scratch[: len(part)].copy_(part)
        part.copy_(block.addmm_(left[:, low : low + step].T, inside, alpha=-1))
        finite &= _finite(inside, part)
    return finite


def _by_columns(
    matrix: Float[Tensor, "d_model inner"], left: Float[Tensor, "k d_model"], right: Float[Tensor, "k d_model"]
) -> bool:
    """Blocks of whole columns, whose norms before and after are needed."""
    finite = True
    for part in matrix.split(NARROW, dim=1):
        block = part.to(left.dtype)
        if block.data_ptr() == part.data_ptr():
            block = block.clone()
        norms = block.norm(dim=0)
        inside = right @ block
        block.addmm_(left.T, inside, alpha=-1)
        part.copy_(rescaled(block, norms, dim=0))
        finite &= _finite(inside, part)
    return finite


def _finite(inside: Tensor, written: Tensor) -> bool:
    """Whether all went well: what isn't finite in W isn't in right W either; float16 can also overflow."""
    return bool(inside.isfinite().all()) and (written.dtype != torch.float16 or bool(written.isfinite().all()))
