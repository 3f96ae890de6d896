"""Directions out of activations made by hand."""

from __future__ import annotations

import pytest
import torch

from abliterate.directions.activations import Activations, SideStatistics
from abliterate.directions.means import Directions, Place, article_order, at, difference_of_means

LAYERS, POSITIONS, D = 5, 2, 8


@pytest.fixture
def activations():
    def side(seed):
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(LAYERS, 3, POSITIONS, D, generator=generator, dtype=torch.float64)
        variance = torch.rand(LAYERS, 3, POSITIONS, generator=generator, dtype=torch.float64) + 0.5
        return SideStatistics(10, mean, variance)

    return Activations(side(0), side(1))


def test_it_is_the_difference_of_means_normalised(activations):
    got = difference_of_means(activations)
    difference = activations.target.mean - activations.baseline.mean
    assert got.unit.dtype == torch.float32
    torch.testing.assert_close(got.unit.double() * got.length[..., None], difference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.unit.norm(dim=-1), torch.ones(LAYERS, 3, POSITIONS))
    spread = activations.target.variance + activations.baseline.variance
    torch.testing.assert_close(got.separation, difference.square().sum(-1) / spread)


def test_projected_is_orthogonal_to_the_baseline_mean_and_loses_nothing_else(activations):
    plain, projected = difference_of_means(activations), difference_of_means(activations, projected=True)
    base = activations.baseline.mean
    along = base / base.norm(dim=-1, keepdim=True)
    inner = (projected.unit.double() * along).sum(-1)
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-6, rtol=0)
    lost = plain.unit.double() * plain.length[..., None] - projected.unit.double() * projected.length[..., None]
    parallel = (lost * along).sum(-1, keepdim=True) * along
    torch.testing.assert_close(lost, parallel, atol=1e-6, rtol=0)


def test_a_site_that_does_not_exist_stays_nan(activations):
    activations.target.mean[:, 1] = float("nan")
    got = difference_of_means(activations)
    assert got.unit[:, 1].isnan().all()
    assert got.unit[:, ::2].isfinite().all()


def of_sizes(sizes):
    """Directions whose `pre`, last position has the absolute mean given for each layer."""
    unit = torch.zeros(len(sizes), 3, POSITIONS, D)
    unit[:, 0, -1] = torch.tensor(sizes)[:, None]
    ones = torch.ones(len(sizes), 3, POSITIONS)
    return Directions(unit, ones, ones)


def test_the_article_orders_by_absolute_mean_from_layer_one():
    places = article_order(of_sizes([9.0, 0.1, -0.3, 0.2, 0.0]))
    assert places == [Place(layer, "pre", -1) for layer in (2, 3, 1, 4)]


def test_the_articles_layers_can_be_limited_and_missing_sites_are_left_out():
    directions = of_sizes([9.0, 0.1, -0.3, 0.2, 0.0])
    directions.unit[3, 0, -1, 0] = float("nan")
    assert [p.layer for p in article_order(directions, layers=range(1, 4))] == [2, 1]
    assert article_order(directions, site="mid")[0].site == "mid"


def test_at_reads_the_place(activations):
    directions = difference_of_means(activations)
    assert torch.equal(at(directions, Place(3, "mid", -2)), directions.unit[3, 1, 0])
    assert str(Place(3, "mid", -2)) == "layer 3 mid position -2"
