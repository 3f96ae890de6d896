"""Paired tests against values worked out by hand, and against themselves where they must agree."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.bench.paired import EXACT, compare, holm, mcnemar, mean, sign_flips, stderr


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (1, 9, 22 / 1024),  # 2 * (1 + 10) / 2^10
        (0, 6, 2 / 64),
        (8, 2, 112 / 1024),  # 2 * (1 + 10 + 45) / 2^10
        (2, 12, 212 / 16384),  # 2 * (1 + 14 + 91) / 2^14
    ],
)
def test_mcnemar_is_the_binomial_test_of_the_items_that_differ(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == pytest.approx(p, rel=1e-12)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_does_not_mind_which_is_which(a: int, b: int) -> None:
    assert mcnemar(a, b) == mcnemar(b, a) <= 1.0


def test_few_differences_are_flipped_in_every_way() -> None:
    values = [0.5, 1.0, 2.0, -0.25]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    expected = sum(total >= 3.25 - 1e-12 for total in sums) / 16
    assert sign_flips(values) == expected == 4 / 16


@given(st.integers(0, 7), st.integers(0, 7))
def test_sign_flips_of_ones_are_mcnemars_test(better: int, worse: int) -> None:
    assert better + worse <= EXACT
    assert sign_flips([1.0] * better + [-1.0] * worse) == pytest.approx(mcnemar(better, worse), abs=1e-12)


def test_many_differences_are_flipped_at_random_to_nearly_the_exact_value() -> None:
    drawn = sign_flips([1.0] * 26 + [-1.0] * 14, flips=20_000)
    exact = mcnemar(26, 14)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    assert drawn == sign_flips([1.0] * 26 + [-1.0] * 14, flips=20_000)  # the same every time


def test_holm_multiplies_by_how_many_are_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_binary_scores_get_mcnemar_and_others_sign_flips() -> None:
    binary = compare([1, 1, 0, 1], [0, 1, 0, 0])
    assert (binary.test, binary.better, binary.worse, binary.items) == ("McNemar, exact", 2, 0, 4)
    assert binary.difference == 0.5
    assert binary.p == 0.5
    graded = compare([0.5, 0.9, 0.1], [0.4, 0.3, 0.2])
    assert graded.test == "sign flips"
    assert graded.difference == pytest.approx(0.2)


def test_the_standard_error_is_of_the_paired_differences() -> None:
    found = compare([1, 1, 0, 1], [0, 1, 0, 0])  # differences 1 0 0 1: variance 1/3
    assert found.stderr == pytest.approx(math.sqrt(1 / 3 / 4))
    assert stderr([0.7]) is None
    assert mean([0.25, 0.75]) == 0.5


def test_scores_of_other_items_are_not_paired() -> None:
    with pytest.raises(ValueError, match="can't be paired"):
        compare([1.0], [1.0, 0.0])
