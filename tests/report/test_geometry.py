"""AUC, silhouette and the planes, against what is known of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.report.geometry import aligned_planes, auc, cosine, principal_plane, silhouette


def rotation(degrees: float) -> torch.Tensor:
    a = math.radians(degrees)
    return torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_auc_counts_pairs(positive, negative):
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auc(torch.tensor(positive), torch.tensor(negative)) == pytest.approx(sum(pairs) / len(pairs))


def test_auc_of_order():
    low, high = torch.arange(5.0), torch.arange(5.0) + 10
    assert auc(high, low) == 1
    assert auc(low, high) == 0
    assert auc(low, low) == 0.5


def test_silhouette_by_hand():
    # on a line: {0, 1} and {4}; for 0: a = 1, b = 4; for 1: a = 1, b = 3; a cluster of one counts 0
    first, second = torch.tensor([[0.0], [1.0]]), torch.tensor([[4.0]])
    assert silhouette(first, second) == pytest.approx((3 / 4 + 2 / 3 + 0) / 3)


def test_silhouette_of_one_cloud_is_low_and_of_two_is_high():
    torch.manual_seed(1)
    cloud = torch.randn(40, 16)
    assert abs(silhouette(cloud[:20], cloud[20:])) < 0.05
    assert silhouette(cloud[:20], cloud[20:] + 100) > 0.9
    assert silhouette(torch.zeros(3, 4), torch.zeros(3, 4)) == 0


def test_cosine():
    assert cosine(torch.tensor([1.0, 0]), torch.tensor([1.0, 1])) == pytest.approx(2**-0.5)
    assert math.isnan(cosine(torch.zeros(2), torch.ones(2)))


def test_principal_plane_is_that_of_the_singular_values():
    torch.manual_seed(2)
    vectors = torch.randn(30, 12, dtype=torch.float64) * torch.linspace(3, 0.1, 12)
    plane, shares = principal_plane(vectors)
    u, s, _ = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    assert torch.allclose(plane.abs(), expected.abs(), atol=1e-9)
    assert shares == pytest.approx((s.square()[:2] / s.square().sum()).tolist())


def test_layers_that_differ_by_rotation_reflection_and_size_lie_alike():
    torch.manual_seed(4)
    first = torch.randn(25, 2, dtype=torch.float64)
    mirrored = first @ torch.tensor([[1.0, 0], [0, -1]], dtype=torch.float64)
    layers = [first, 7 * first @ rotation(130), 0.3 * mirrored @ rotation(20) + 5]
    planes, shares = aligned_planes(layers)
    assert torch.allclose(planes[0], planes[1], atol=1e-9)
    assert torch.allclose(planes[0], planes[2], atol=1e-9)
    assert [sum(share) for share in shares] == pytest.approx([1, 1, 1])
    assert float(planes[1].square().sum(-1).mean()) == pytest.approx(1)


def test_axes_that_swap_are_swapped_back():
    torch.manual_seed(6)
    points, _ = torch.linalg.qr(torch.randn(30, 3, dtype=torch.float64))
    points = points - points.mean(0)
    layers = [points * torch.tensor([1.3, 1, 0.1]), points * torch.tensor([1, 1.3, 0.1])]  # another axis is the largest
    planes, _ = aligned_planes(layers)
    for axis in (0, 1):
        assert float(torch.corrcoef(torch.stack([planes[0][:, axis], planes[1][:, axis]]))[0, 1]) > 0.9


def test_a_layer_without_variance_is_skipped():
    torch.manual_seed(5)
    first = torch.randn(10, 3, dtype=torch.float64)
    planes, shares = aligned_planes([first, torch.ones(10, 3), first])
    assert not planes[1].any()
    assert shares[1] == [0, 0]
    assert torch.allclose(planes[0], planes[2], atol=1e-9)
