"""What an edit takes out of a weight: the formula that every form shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from abliterate.edit.edit import Part, as_array

if TYPE_CHECKING:
    from jaxtyping import Float

    from abliterate.edit.edit import Values

# Of a column that was nearly all direction, little but rounding is left: `apply.removal` doesn't blow it up.
LEAST_LEFT = 1e-3


class Factors(NamedTuple):
    """What is taken out of a weight W [d_model, ...]: W <- W - left^T (right W), both [k, d_model] float32.

    A LoRA has exactly these factors: B = -left^T, A = right W.
    """

    left: Float[np.ndarray, "k d_model"]
    right: Float[np.ndarray, "k d_model"]


def factors(part: Part, gain: Values | None = None, centred: bool = False) -> Factors:
    """What to take out of a weight so that the stream loses what an edit says, as W <- W - left^T (right W).

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
    rows, wide = as_array(part.directions, np.float64), as_array(part.strengths, np.float64)
    if gain is None and not centred:
        return _rounded(wide[:, None] * rows, rows)
    if gain is not None:
        rows = rows * as_array(gain, np.float64)
    before = np.linalg.norm(rows, axis=-1)
    if centred:
        rows = rows - rows.mean(-1, keepdims=True)
    sizes = np.linalg.norm(rows, axis=-1)
    kept = sizes > 1e-6 * before  # not a direction that the norm lets nothing along
    rows, wide = rows[kept] / sizes[kept, None], wide[kept]
    # dividing rows of M by their norms leaves the operator as it is, since the strengths are diagonal
    gram = np.linalg.pinv(rows @ rows.T, hermitian=True)
    return _rounded(wide[:, None] * (gram @ rows), rows)


def _rounded(left: np.ndarray, right: np.ndarray) -> Factors:
    return Factors(left.astype(np.float32), right.astype(np.float32))
