"""What an edit takes out of each weight of a model, and taking it out of a tensor."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import WriterError
from abliterate.edit.algebra import Factors, factors
from abliterate.edit.edit import Part
from abliterate.models.handle import Handle
from abliterate.models.writers import Writer, find_writers, layout


def weight_factors(handle: Handle, parts: dict[str, Part]) -> list[tuple[Writer, Factors]]:
    """Pair each writer that an edit names with what is taken out of its weight.

    Raises:
        WriterError: when the edit names a parameter that is not one of the model's writers, or has
            another width than the model.
    """
    known = {w.name: w for w in layout(handle).writers}
    if any(name not in known for name in parts):
        known |= {w.name: w for w in find_writers(handle, projector=True)}
    missing = [name for name in parts if name not in known]
    if missing:
        raise WriterError(
            f"the edit names {missing[0]}, which doesn't write to the stream of {handle.source}; "
            "is it for another model?"
        )
    for part in parts.values():
        if part.directions.shape[1] != handle.d_model:
            raise WriterError(
                f"the edit's directions have {part.directions.shape[1]} entries, {handle.source} has "
                f"d_model {handle.d_model}; is it for another model?"
            )
    return [(known[name], factors(part, known[name].gain, known[name].centred)) for name, part in parts.items()]


def removed(tensor: Float[Tensor, ...], change: Factors | Part, axis: int) -> Float[Tensor, ...]:
    """W - left^T (right W) with W the tensor, its axis of size d_model first; in its own dtype and device.

    Args:
        tensor: any shape with size d_model along `axis`.
        change: what `algebra.factors` gives; a Part stands for its factors with no norm behind the tensor.
        axis: dimension that runs along d_model.
    """
    if isinstance(change, Part):
        change = factors(change)
    wide = tensor.detach().float().movedim(axis, -1)
    left, right = (torch.from_numpy(factor).to(wide.device) for factor in change)
    out = wide - (wide @ right.T) @ left
    return out.movedim(-1, axis).to(tensor.dtype)
