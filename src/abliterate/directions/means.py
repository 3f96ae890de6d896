"""Directions out of activations: difference of means and its refinements."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from abliterate.directions.activations import Activations
from abliterate.models.writers import SITES


@dataclass(frozen=True)
class Directions:
    """A unit direction at every layer, site and position.

    Attributes:
        unit: [layer, site, position, d_model] float32; NaN where a site doesn't exist.
        length: [layer, site, position]: norm of the difference of means before normalising.
        separation: [layer, site, position]: squared distance of the means over the summed variances.
    """

    unit: Float[Tensor, "layer site position d_model"]
    length: Float[Tensor, "layer site position"]
    separation: Float[Tensor, "layer site position"]


@dataclass(frozen=True)
class Place:
    """Where a direction was found: layer, site name, position counted from the end (-1 the last)."""

    layer: int
    site: str
    position: int

    def __str__(self) -> str:
        return f"layer {self.layer} {self.site} position {self.position}"


def difference_of_means(activations: Activations, *, projected: bool = False) -> Directions:
    """Mean over target prompts less mean over baseline prompts, normalised (Arditi et al. 2024, section 2.3).

    Args:
        activations: from `collect`.
        projected: take the component along the baseline mean out of the difference first, so that the
            edit leaves what all prompts share alone (projected abliteration, Lai 2025).

    Example:
        >>> directions = difference_of_means(acts)
        >>> r = directions.unit[12, 0, -1]  # layer 12, site pre, last position
    """
    base = activations.baseline.mean
    difference = activations.target.mean - base
    if projected:
        along = base / base.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        difference = difference - (difference * along).sum(-1, keepdim=True) * along
    length = difference.norm(dim=-1)
    spread = activations.target.variance + activations.baseline.variance
    return Directions(
        unit=(difference / length.clamp_min(1e-30)[..., None]).float(),
        length=length,
        separation=length.square() / spread.clamp_min(1e-30),
    )


def article_order(
    directions: Directions, *, site: str = "pre", first_layer: int = 1, layers: range | None = None
) -> list[Place]:
    """The article's ordering of its candidates: by the absolute mean of the direction's entries, largest first.

    The article reads the last position at one site, from layer 1 on.
    """
    row = SITES.index(site)
    allowed = [
        layer
        for layer in range(first_layer, directions.unit.shape[0])
        if (layers is None or layer in layers) and bool(directions.unit[layer, row, -1].isfinite().all())
    ]
    size = {layer: float(directions.unit[layer, row, -1].double().mean().abs()) for layer in allowed}
    return [Place(layer, site, -1) for layer in sorted(allowed, key=lambda layer: -size[layer])]


def at(directions: Directions, place: Place) -> Float[Tensor, " d_model"]:
    """The unit direction at a place."""
    return directions.unit[place.layer, SITES.index(place.site), place.position]
