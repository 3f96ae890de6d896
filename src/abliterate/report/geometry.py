"""What a report says of two clouds of activations: how far apart they lie, and how to look at them in a plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def auc(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> float:
    """Chance that a value of the first set is above one of the second, ties counted half (Mann and Whitney 1947).

    Example:
        >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    difference = positive.double()[:, None] - negative.double()[None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def silhouette(first: Float[Tensor, "n d_model"], second: Float[Tensor, "m d_model"]) -> float:
    """Mean silhouette of two clusters, Euclidean, from -1 to 1 (Rousseeuw 1987); 0 where a cluster has one point."""
    points = torch.cat([first, second]).double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    split = len(first)
    own = torch.arange(len(points)) < split
    scores = []
    for index in range(len(points)):
        mates = own == own[index]
        count = int(mates.sum()) - 1
        if count == 0:
            scores.append(0.0)
            continue
        inside = float(distances[index][mates].sum()) / count
        outside = float(distances[index][~mates].mean())
        largest = max(inside, outside)
        scores.append((outside - inside) / largest if largest > 0 else 0.0)
    return sum(scores) / len(scores)


def cosine(first: Float[Tensor, " d_model"], second: Float[Tensor, " d_model"]) -> float:
    """Cosine between two vectors, in float64; NaN when one is zero."""
    a, b = first.double(), second.double()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else float("nan")


def principal_plane(vectors: Float[Tensor, "n d_model"]) -> tuple[Float[Tensor, "n 2"], list[float]]:
    """Coordinates along the two axes of largest variance, and the share of the variance along each.

    Computed from the n x n Gram matrix in float64, which is small whatever d_model is. Coordinates are zero
    where there is no variance: the embedding of a token that all prompts share.
    """
    centred = vectors.double() - vectors.double().mean(0)
    values, columns = torch.linalg.eigh(centred @ centred.T)
    values, columns = values.flip(0).clamp_min(0), columns.flip(1)
    total = float(values.sum())
    if total <= 1e-12 * max(1.0, float(vectors.double().square().sum())):
        return torch.zeros(len(vectors), 2, dtype=torch.float64), [0.0, 0.0]
    kept = min(2, len(values))
    plane = torch.zeros(len(vectors), 2, dtype=torch.float64)
    plane[:, :kept] = columns[:, :kept] * values[:kept].sqrt()
    return plane, [float(v) / total for v in values[:2]]


def aligned_planes(
    layers: Sequence[Float[Tensor, "n d_model"]],
) -> tuple[list[Float[Tensor, "n 2"]], list[list[float]]]:
    """The principal plane of every layer, each turned or mirrored to lie as its neighbour before it does.

    Principal axes have no sign, and two of like variance swap between layers; the rotation or reflection that
    brings a layer's points closest to those of the layer before (orthogonal Procrustes, Schoenemann 1966) lets
    an eye follow them. The stream grows, so each layer is scaled to a root mean square distance of 1 from its centre.

    Returns:
        Coordinates per layer, and the shares of the variance along the principal axes before turning.
    """
    planes: list[Tensor] = []
    shares: list[list[float]] = []
    last: Tensor | None = None
    for vectors in layers:
        plane, share = principal_plane(vectors)
        size = plane.square().sum(-1).mean().sqrt()
        if float(size) > 0:
            plane = plane / size
            if last is not None:
                u, _, vt = torch.linalg.svd(plane.T @ last)
                plane = plane @ (u @ vt)
            last = plane
        planes.append(plane)
        shares.append(share)
    return planes, shares
