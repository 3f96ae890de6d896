"""Further sets: which there are, and that nothing measured elsewhere, or learnt from, is in one."""

from __future__ import annotations

import pytest

from abliterate.common.errors import PromptError
from abliterate.prompts.further import further_sets
from abliterate.prompts.sets import load_prompts, load_sides

OWN = [f"Do wrong number {n}" for n in range(12)]


@pytest.fixture(scope="module")
def sides():
    return load_sides("bundled", "bundled")


def test_the_bundled_sets_and_ones_own(sides, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("\n".join([*OWN, sides.target.train[0].upper() + "!", sides.baseline.test[0]]))
    found = further_sets(sides, str(file), most=10, seed=3)
    assert [(one.prompts.source, one.role, len(one.prompts)) for one in found] == [
        ("bundled-varied", "target", 10), ("bundled-xstest", "baseline", 10), (str(file), "target", 10),
    ]  # fmt: skip
    assert set(found[2].prompts) < set(OWN)  # what the given sets have, however written, is left out
    assert list(found[2].prompts) == sorted(found[2].prompts, key=OWN.index)
    assert found[0].prompts == further_sets(sides, most=10, seed=3)[0].prompts
    assert found[0].prompts != further_sets(sides, most=10, seed=4)[0].prompts


def test_nothing_is_loaded_where_none_is_wanted(sides):
    assert further_sets(sides, "/no/such/file.txt", most=0) == []
    assert further_sets(sides, most=5, bundled=False) == []


def test_a_set_that_is_given_is_not_a_further_one():
    sides = load_sides("bundled-varied", "bundled")
    assert [one.prompts.source for one in further_sets(sides, most=5)] == ["bundled-xstest"]


def test_a_further_set_with_nothing_of_its_own_is_an_error(sides, tmp_path):
    file = tmp_path / "same.txt"
    file.write_text("\n".join(load_prompts("bundled:test")))
    with pytest.raises(PromptError, match=r"same\.txt is in the given sets already"):
        further_sets(sides, str(file), most=5)
    with pytest.raises(PromptError, match=r"nowhere\.txt was not found"):
        further_sets(sides, str(tmp_path / "nowhere.txt"), most=5)
