"""Proving that every writer was found: a direction taken out of them all must be gone from the stream."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.apply.hooks import attached
from abliterate.common.errors import NonFiniteError, WriterError
from abliterate.edit.edit import Edit, normalised
from abliterate.models.handle import Handle
from abliterate.models.writers import find_writers, probe_ids, watch_sites

if TYPE_CHECKING:
    from abliterate.edit.edit import Values

PROOF_TOKENS = 64  # enough for a mixture's router to send some to most experts
_SIDE_BEFORE = {"pre": "the block before or the embedding", "mid": "attention", "post": "mlp"}


class Proof(NamedTuple):
    """Largest |r.h|/|h| left at any site when every writer is edited at strength 1, and where it came."""

    component: float
    where: str


class InStream(NamedTuple):
    """What of some directions is in the stream of a model, at every site and token of the proof's probe.

    Attributes:
        places: (block, site), in the order they came.
        share: r.h/|h| in float64.
    """

    places: list[tuple[int, str]]
    share: Float[Tensor, "place token direction"]

    def largest(self, direction: int, negligible: float = 0.0) -> Proof:
        """The largest |r.h|/|h| of a direction, and its place; where more than `negligible` came, the first place.

        What came back stays to the end: the place to name is the first, not that of the largest.
        """
        sizes = self.share[:, :, direction].abs().amax(1)
        if not len(sizes) or float(sizes.max()) == 0:
            return Proof(0.0, "nowhere")
        came_back = (sizes > negligible).nonzero().flatten() if negligible else sizes[:0]
        layer, site = self.places[int(came_back[0]) if len(came_back) else int(sizes.argmax())]
        return Proof(float(sizes.max()), f"block {layer}, {site} ({_SIDE_BEFORE[site]} writes it)")


@torch.inference_mode()
def in_stream(handle: Handle, directions: Sequence[Values], *, seed: int = 0) -> InStream:
    """Measure what of each direction the stream holds, the model being looked at as it is.

    Args:
        handle: a loaded model, with or without an edit baked or attached.
        directions: one or more, [d_model], of any length but zero.
        seed: of the probe's tokens.

    Raises:
        NonFiniteError: when the stream is not finite.
    """
    unit = torch.stack([torch.from_numpy(normalised(direction)).double() for direction in directions])
    places: list[tuple[int, str]] = []
    shares: list[Tensor] = []

    def look(layer: int, site: str, stream: Tensor) -> None:
        h = stream.reshape(-1, handle.d_model).to("cpu", torch.float64)
        if not h.isfinite().all():
            raise NonFiniteError(f"model {handle.source}: the stream at block {layer}, {site} is NaN or infinite")
        places.append((layer, site))
        shares.append((h @ unit.T) / h.norm(dim=-1, keepdim=True).clamp_min(1e-30))

    with watch_sites(handle, look, every_row=True):
        handle.hidden_states(input_ids=probe_ids(handle, seed, PROOF_TOKENS), use_cache=False)
    return InStream(places, torch.stack(shares))


def prove(handle: Handle, direction: Values | None = None, *, seed: int = 0) -> Proof:
    """Measure what is left of a direction in the residual stream.

    Without `direction`: a random one is taken out of every writer, live, at strength 1; it must vanish at
    every site. With `direction`: the model is looked at as it is (an edit already baked or attached).

    Args:
        handle: a loaded model.
        direction: [d_model] or None.
        seed: of the random direction and of the probe's tokens.

    Returns:
        Proof(component, where): the largest |r.h|/|h| over tokens and sites, in float64, and its place; when
        the direction came back, the first place where it did.

    Raises:
        NonFiniteError: when the stream is not finite.

    Example:
        >>> component, where = prove(load("demo-model", dtype="float32"))
        >>> component < 1e-5
        True
    """
    live: Any = contextlib.nullcontext()
    if direction is None:
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(handle.d_model, generator=generator, dtype=torch.float64)
        live = attached(handle, Edit.uniform(find_writers(handle), direction))
    with live:
        return in_stream(handle, [direction], seed=seed).largest(0, tolerance(handle))


def tolerance(handle: Handle) -> float:
    """Largest component that rounding alone explains: 1e-5 in float32; in half precision a share of the
    1/sqrt(d_model) that a missed writer would leave."""
    if handle.dtype in (torch.float32, torch.float64):
        return 1e-5
    eps = torch.finfo(handle.dtype).eps
    return eps * (16 * max(1, handle.layers) / handle.d_model) ** 0.5


def check_proof(handle: Handle) -> Proof:
    """Prove the writers, and stop when one was missed.

    Raises:
        WriterError: naming the site where the direction came back.
    """
    proof = prove(handle)
    if proof.component > tolerance(handle):
        raise WriterError(
            f"model {handle.source}: after editing every writer found, a component of {proof.component:.1e} is left "
            f"at {proof.where}; a writer was missed there, so nothing was changed (please report the architecture)"
        )
    return proof
