"""Ways to apply an edit, one file each; and what they share: what an edit takes out of a weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.edit import Part
from abliterate.errors import WriterError
from abliterate.model import Handle
from abliterate.writers import Writer, find_writers, layout


class Factors(NamedTuple):
    """What is taken out of a weight W [d_model, ...]: W <- W - left^T (right W), both [k, d_model] float32.

    A LoRA has exactly these factors: B = -left^T, A = right W.
    """

    left: Float[Tensor, "k d_model"]
    right: Float[Tensor, "k d_model"]


def factors(part: Part, gain: Float[Tensor, " d_model"] | None = None, centred: bool = False) -> Factors:
    """What to take out of a weight so that the stream loses what `part` says, as W <- W - left^T (right W).

    Where nothing stands between the weight and the stream, left = diag(strengths) R and right = R, the rows
    of R being the directions. Behind a norm with gain g the stream gets, up to one scalar per token,
    g * P (W x), where P takes the mean out if the norm does (LayerNorm) and is the identity if not (RMSNorm).
    What the stream holds along r is then m^T W x with m = P (g * r), so it is m that has to leave W
    (DESIGN.md, post-norm blocks). With several directions and a strength for each, M = [m_1 ... m_k] and

        W' = W - M (M^T M)^+ diag(strengths) M^T W

    is the smallest change (in the Frobenius norm) after which the stream's component along every r_i is
    1 - strengths[i] times what it was before the norm rescales the token. It is exact for any strengths, equal
    or not, and never divides by the gain: undoing the gain, diag(1/g) (I - R A R^T) diag(g), also gives these
    components, but where an entry of g is near zero it writes huge values that the norm then scales all else
    down by.

    Args:
        part: directions [k, d_model] orthonormal, in the stream's coordinates, and strengths [k].
        gain: [d_model], what the norm behind the weight multiplies each feature by; None without a norm.
        centred: whether that norm subtracts the mean over features.

    Returns:
        Factors(left, right), computed in float64. For a weight whose dimension `axis` runs along d_model, W
        above is the weight with that dimension first. The same factors hold for its bias.
    """
    directions, strengths = part.directions.double(), part.strengths.double()
    if gain is None and not centred:
        return Factors((strengths[:, None] * directions).float(), directions.float())
    rows = directions if gain is None else directions * gain.detach().to("cpu", torch.float64)
    before = rows.norm(dim=-1)
    if centred:
        rows = rows - rows.mean(-1, keepdim=True)
    sizes = rows.norm(dim=-1)
    kept = sizes > 1e-6 * before  # not a direction that the norm lets nothing along
    rows, strengths = rows[kept] / sizes[kept, None], strengths[kept]
    # dividing rows of M by their norms leaves the operator as it is, since the strengths are diagonal
    gram = torch.linalg.pinv(rows @ rows.T, hermitian=True)
    return Factors((strengths[:, None] * (gram @ rows)).float(), rows.float())


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
