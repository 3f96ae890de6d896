"""What an edit takes out of each weight of a model, and taking it out of a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import WriterError
from abliterate.edit.algebra import LEAST_LEFT, Factors, factors
from abliterate.edit.edit import Part
from abliterate.models.handle import Handle
from abliterate.models.writers import STREAM, Writer, find_writers, layout, stream_sites

BLOCK = 2**22  # values at a time


def weight_factors(handle: Handle, parts: dict[str, Part]) -> list[tuple[Writer, Factors]]:
    """Pair each writer that an edit names with what is taken out of its weight.

    Raises:
        WriterError: when the edit names a parameter that is not one of the model's writers, or has
            another width than the model.
    """
    sites = any(name.startswith(STREAM) for name in parts)
    known = stream_sites(handle) if sites else {w.name: w for w in layout(handle).writers}
    if not sites and any(name not in known for name in parts):
        known |= {w.name: w for w in find_writers(handle, projector=True)}
    missing = [name for name in parts if name not in known]
    if missing:
        raise WriterError(
            f"the edit names {missing[0]}, which doesn't write to the stream of {handle.source}; "
            "is it for another model?"
        )
    for part in parts.values():
        handle.check_width(part.directions.shape[1], "the edit's directions")
    return [(known[name], factors(part, known[name].gain, known[name].centred)) for name, part in parts.items()]


def removed(
    tensor: Float[Tensor, ...], change: Factors | Part, axis: int, *, keep_norms: bool = False
) -> Float[Tensor, ...]:  # fmt: skip
    """W - left^T (right W) with W the tensor, its axis of size d_model first; in its own dtype and device.

    The arithmetic runs in float32 (float64 for float64), some vectors at a time. With `keep_norms` each vector along
    d_model is given its former length, |w| / |w'| * w' (Lai 2025, "Norm-Preserving Biprojected Abliteration"; the
    "biprojected" half is about finding the direction: --projected). Scaling doesn't turn a vector, so at strength 1 the
    direction stays out exactly; at another strength s what is left of it is (1 - s) times the vector's factor. Vectors
    of which less than a thousandth is left keep what is left. Biases are no such weights.

    Args:
        tensor: any shape with size d_model along `axis`.
        change: what `algebra.factors` gives; a Part stands for its factors with no norm behind the tensor.
        axis: dimension that runs along d_model.
        keep_norms: rescale.
    """
    new = torch.empty_like(tensor, requires_grad=False)
    for (_, values), out in zip(pieces(tensor, change, axis, keep_norms=keep_norms), _blocks(new, axis), strict=True):
        out.copy_(values)
    return new


def pieces(
    tensor: Float[Tensor, ...], change: Factors | Part, axis: int, *, keep_norms: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Views of a tensor, some vectors along d_model each, with what `removed` makes of them: so as not to hold it all.

    A view may be overwritten before the next is asked for.
    """
    factors_ = factors(change) if isinstance(change, Part) else change
    left, right = (torch.from_numpy(factor) for factor in factors_)
    left, right = (f.to(tensor.device, torch.promote_types(tensor.dtype, torch.float32)) for f in (left, right))
    for block in _blocks(tensor.detach(), axis):
        wide = block.to(right.dtype).movedim(axis, -1)
        rest = wide - (wide @ right.T) @ left
        if keep_norms:
            before, after = (part.norm(dim=-1, keepdim=True) for part in (wide, rest))
            rest *= torch.where(after > LEAST_LEFT * before, before / after.clamp_min(1e-30), 1.0)
        yield block, rest.movedim(-1, axis).to(tensor.dtype)


def _blocks(tensor: Tensor, axis: int) -> Sequence[Tensor]:
    """Views of whole vectors along an axis, some MiB each."""
    if tensor.ndim == 1 or not tensor.numel():
        return [tensor]
    other = 0 if axis % tensor.ndim else tensor.ndim - 1
    return tensor.split(max(1, BLOCK * tensor.shape[other] // tensor.numel()), other)
