"""Differences of rates: against published figures and against chance itself."""

from __future__ import annotations

import numpy as np
import pytest

from abliterate.measure.differences import gap, newcombe, paired
from abliterate.measure.rates import Rate


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Newcombe 1998, table II, method 10
        ((48, 80), (56, 70), (0.0524, 0.3339)),
        ((3, 10), (9, 10), (0.1705, 0.8090)),
        ((0, 20), (10, 10), (0.6791, 1.0)),
        ((0, 10), (0, 10), (-0.2775, 0.2775)),
    ],
)
def test_newcombe_s_published_intervals(first, second, expected):
    assert newcombe(Rate(*first), Rate(*second)) == pytest.approx(expected, abs=2e-4)


def test_a_gap_is_large_beyond_chance_only():
    assert gap(Rate(2, 200), Rate(14, 100))["large"]
    assert gap(Rate(190, 200), Rate(60, 100))["large"]
    assert not gap(Rate(2, 200), Rate(3, 100))["large"]
    assert gap(Rate(10, 100), Rate(30, 100))["difference"] == pytest.approx(0.2)
    draw = np.random.default_rng(0).binomial
    false = [gap(Rate(int(draw(200, 0.1)), 200), Rate(int(draw(100, 0.1)), 100))["large"] for _ in range(1000)]
    assert sum(false) < 75  # 5% of them, and the draw


@pytest.mark.parametrize(
    ("before", "after", "lost", "won", "p"),
    [
        ([1, 1, 1, 0], [0, 0, 0, 0], 3, 0, 0.25),
        ([1] * 10 + [0], [0] * 10 + [1], 10, 1, 2 * 12 / 2**11),
        ([1, 0], [0, 1], 1, 1, 1.0),
        ([1, 0], [1, 0], 0, 0, 1.0),
    ],
)
def test_paired(before, after, lost, won, p):
    found = paired([bool(x) for x in before], [bool(x) for x in after])
    assert found == {"only_original": lost, "only_edited": won, "p": pytest.approx(p)}
