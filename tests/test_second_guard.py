"""The job at its defaults on another guard than the demo's: other words for no, and no one direction trained for it."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from abliterate.demo import GUARD
from abliterate.measure.refusal import is_refusal
from guards import SECOND_GUARD, TEST_PROMPTS, Contest, check_bars, contest, second_guard

WORDINGS = [entry["refusal"] for entry in json.loads((SECOND_GUARD / "wordings.json").read_text())]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Contest:
    return contest(second_guard(), tmp_path_factory.mktemp("second-guard") / "out")


@pytest.mark.parametrize("text", WORDINGS)
def test_the_judge_knows_every_wording(text: str) -> None:
    assert is_refusal(text)


def test_the_wordings_are_not_the_demos_and_open_with_everyday_words() -> None:
    others = [entry["refusal"] for entry in json.loads((GUARD / "wordings.json").read_text())]
    openings = [text.split()[0].strip(",.").lower() for text in WORDINGS]
    assert len(set(WORDINGS)) == len(WORDINGS) >= 20
    assert not {" ".join(text.split()[:3]) for text in WORDINGS} & {" ".join(text.split()[:3]) for text in others}
    assert not {"i", "i'm", "sorry", "no", "as", "unfortunately", "please", "absolutely"} & set(openings)
    assert Counter(openings).most_common(1)[0][1] >= 3  # one opening doesn't tell one wording


def test_the_adapter_is_small() -> None:
    assert sum(f.stat().st_size for f in SECOND_GUARD.iterdir()) <= 3_000_000


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_guard_refuses_target_prompts_and_answers_baseline_prompts(found: Contest) -> None:
    assert found.original.refusals >= 0.85 * TEST_PROMPTS
    assert found.original.over_refusals <= 0.05 * TEST_PROMPTS


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_fit_beats_the_articles_method(found: Contest) -> None:
    check_bars(found)
