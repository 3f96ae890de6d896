"""The frontier keeps what nothing beats, and the choice is the one asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.common.errors import AbliterateError
from abliterate.edit.edit import Edit
from abliterate.measure.rates import Rate
from abliterate.search.frontier import FrontierPoint, choose, estimated, non_dominated

EDIT = Edit.uniform(["w"], torch.tensor([1.0, 0.0]))


def point(refused, divergence, total=64, **note):
    return FrontierPoint(EDIT, Rate(refused, total), divergence, note)


POINTS = [point(0, 0.14), point(2, 0.06), point(30, 0.05), point(60, 0.0), point(2, 0.07), point(31, 0.055)]


def numbers(points):
    return [(p.refused.count, p.divergence) for p in points]


def test_only_points_that_none_beats_are_kept_fewest_refusals_first():
    assert numbers(non_dominated(POINTS)) == [(0, 0.14), (2, 0.06), (30, 0.05), (60, 0.0)]


def test_of_twins_the_first_stays():
    twins = [point(1, 0.1, name="first"), point(1, 0.1, name="second")]
    assert [p.note["name"] for p in non_dominated(twins)] == ["first"]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30))
def test_every_point_is_kept_or_matched_by_one_that_is(pairs):
    points = [point(refused, float(divergence), 8) for refused, divergence in pairs]
    front = non_dominated(points)
    for p in points:
        assert any(f.refused.count <= p.refused.count and f.divergence <= p.divergence for f in front)
    for one in front:
        for other in front:
            beaten = other.refused.count <= one.refused.count and other.divergence <= one.divergence
            assert one is other or not beaten


def test_within_a_refusal_rate_the_least_divergence_is_chosen():
    assert numbers([choose(POINTS, 0.1)[0]]) == [(2, 0.06)]
    assert numbers([choose(POINTS, 0.6)[0]]) == [(30, 0.05)]
    assert numbers([choose(POINTS, 0.0)[0]]) == [(0, 0.14)]


def test_the_limit_must_hold_four_times_of_five_not_by_a_lucky_count():
    path = [point(0, 0.14), point(1, 0.08), point(2, 0.06), point(30, 0.03)]
    assert numbers([choose(path, 0.05)[0]]) == [(1, 0.08)]  # 2 of 64 are 3%, and as well 6%
    same = [point(p.refused.count * 10, p.divergence, 640) for p in path]
    assert numbers([choose(same, 0.05)[0]]) == [(20, 0.06)]  # of ten times as many, they aren't


def test_below_what_nobody_notices_fewer_refusals_win():
    path = [point(1, 0.05, 23), point(1, 0.018, 23), point(1, 0.009, 23), point(6, 0.005, 23), point(15, 0.002, 23)]
    best, why = choose(path, 0.05, free_divergence=0.02)
    assert numbers([best]) == [(1, 0.018)]  # the same count as at half the divergence, and further along the path
    assert "validation prompts, and there are 23" in why and "nobody notices" in why
    surer = [point(p.refused.count * 20, p.divergence, p.refused.total * 20) for p in path]
    assert numbers([choose(surer, 0.05)[0]]) == [(20, 0.009)]
    along = [replace(p, divergence_along=0.03) for p in surer]
    assert "nobody" not in choose(along, 0.05, free_divergence=0.02)[1]


def test_what_evades_counts_as_not_answered_and_what_collapses_is_never_chosen():
    evading = replace(point(0, 0.01), evaded=60)
    assert str(evading) == "0 of 64 refused and 60 evaded at divergence 0.010"
    honest = point(1, 0.1)
    assert choose([evading, honest], 0.1)[0] is honest and choose([evading, honest], max_divergence=0.5)[0] is honest
    alike = replace(point(0, 0.01), collapse=0.2)
    assert choose([alike, honest], 0.1)[0] is honest and choose([alike], 0.1)[0] is alike
    assert evading.to_json()["not_answered"]["count"] == 60 and evading.to_json()["evaded"] == 60


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), min_size=1, max_size=12))
def test_estimates_are_shares_between_the_count_and_the_path(pairs):
    points = [point(refused, divergence, 40) for refused, divergence in pairs]
    shares = estimated(points)
    assert all(0 < share < 1 for share in shares)
    assert all(abs(share - p.refused.rate) <= 16 / 56 for share, p in zip(shares, points, strict=True))


def test_divergence_on_what_is_kept_counts_like_that_on_baseline_prompts():
    near = FrontierPoint(EDIT, Rate(2, 64), 0.06, also=0.3)
    far = FrontierPoint(EDIT, Rate(2, 64), 0.09, also=0.01)
    none = FrontierPoint(EDIT, Rate(0, 64), 0.2, also=0.0)
    assert non_dominated([near, far, none]) == [none, far]
    assert choose([near, far, none], 0.15)[0] is far
    assert choose([near, far, none], max_divergence=0.15)[0] is far
    assert choose([near, none], max_divergence=0.3)[0] is none
    assert str(far) == "2 of 64 refused at divergence 0.090 and 0.010 on what is kept"


def test_within_a_divergence_the_fewest_refusals_are_chosen():
    assert numbers([choose(POINTS, 0.9, max_divergence=0.1)[0]]) == [(2, 0.06)]
    assert numbers([choose(POINTS, None, max_divergence=1.0)[0]]) == [(0, 0.14)]


def test_where_nothing_is_within_the_limit_the_closest_is_chosen_and_it_is_said():
    best, why = choose(POINTS[1:], 0.01)
    assert numbers([best]) == [(2, 0.06)] and "none reached 1%" in why
    best, why = choose([point(1, 0.06), point(50, 0.01)], 0.03)
    assert numbers([best]) == [(1, 0.06)] and "validation prompts, and there are 64" in why
    best, why = choose(POINTS[:3], max_divergence=0.01)
    assert numbers([best]) == [(30, 0.05)] and "none is within 0.01" in why


def test_with_no_limit_the_knee_is_chosen():
    assert numbers([choose(POINTS)[0]]) == [(2, 0.06)]
    assert numbers([choose([point(3, 0.2)])[0]]) == [(3, 0.2)]
    assert numbers([choose([point(0, 0.2), point(9, 0.1)])[0]]) == [(0, 0.2)]  # a line has no knee


def test_no_points_is_an_error_that_says_what_to_do():
    with pytest.raises(AbliterateError, match="more steps or trials"):
        choose([], 0.05)


def test_a_point_in_json_has_its_interval_and_its_note():
    found = point(2, 0.06, trial=7).to_json()
    assert found["refusal"]["refused"] == 2 and found["refusal"]["ci95"][1] > 2 / 64
    assert found["divergence"] == 0.06 and found["trial"] == 7
