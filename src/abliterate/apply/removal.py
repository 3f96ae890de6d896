"""What an edit takes out of a weight, in torch, and out of each weight of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import WriterError
from abliterate.edit.algebra import taken_out
from abliterate.edit.edit import Part
from abliterate.models.handle import Handle
from abliterate.models.writers import Writer, find_writers, layout


class Factors(NamedTuple):
    """What is taken out of a weight W [d_model, ...]: W <- W - left^T (right W), both [k, d_model] float32.

    A LoRA has exactly these factors: B = -left^T, A = right W.
    """

    left: Float[Tensor, "k d_model"]
    right: Float[Tensor, "k d_model"]


def factors(part: Part, gain: Float[Tensor, " d_model"] | None = None, centred: bool = False) -> Factors:
    """What to take out of a weight so that the stream loses what `part` says; the formula: `algebra.taken_out`.

    Args:
        part: directions [k, d_model] orthonormal, in the stream's coordinates, and strengths [k].
        gain: [d_model], what the norm behind the weight multiplies each feature by; None without a norm.
        centred: whether that norm subtracts the mean over features.

    Returns:
        Factors(left, right), computed in float64, on the CPU. For a weight whose dimension `axis` runs along d_model,
        W above is the weight with that dimension first. The same factors hold for its bias.
    """
    wide = None if gain is None else gain.detach().to("cpu", torch.float64).numpy()
    left, right = taken_out(part.directions.numpy(), part.strengths.numpy(), wide, centred)
    return Factors(torch.from_numpy(left), torch.from_numpy(right))


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
